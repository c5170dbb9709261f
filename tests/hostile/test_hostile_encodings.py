"""Quantised checkpoints that do not hold together: each is refused in one line, and nothing large is allocated."""

from __future__ import annotations

import json
import tracemalloc
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

import torchparams as tp
from command import command
from fuzz import fuzz_encodings

if TYPE_CHECKING:
    from pathlib import Path

Array = np.ndarray[Any, Any]
Weights = dict[str, Array]

F8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
SLACK = 32 << 20
"""Bytes that a command may allocate whatever the file: the writer has buffers."""


def fp8(**changes: Array | None) -> Weights:
    return made({"weight": np.ones((256, 384), F8), "weight_scale_inv": np.ones((2, 3), np.float32)}, changes)


def gptq(**changes: Array | None) -> Weights:
    """Four bits, 64 inputs in 2 groups, 32 outputs."""
    parts: Weights = {
        "qweight": np.zeros((8, 32), np.int32), "qzeros": np.zeros((2, 4), np.int32),
        "scales": np.ones((2, 32), np.float16), "g_idx": (np.arange(64) // 32).astype(np.int32),
    }  # fmt: skip
    return made(parts, changes)


def packed(**changes: Array | None) -> Weights:
    parts: Weights = {
        "weight_packed": np.zeros((16, 8), np.int32), "weight_scale": np.ones((16, 2), np.float32),
        "weight_shape": np.array([16, 64]),
    }  # fmt: skip
    return made(parts, changes)


def nf4(state: bytes | dict[str, Any] = b"", **changes: Array | None) -> Weights:
    told = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [32, 64]}
    text = json.dumps({**told, **state}).encode() if isinstance(state, dict) else state
    parts: Weights = {
        "weight": np.zeros((1024, 1), np.uint8), "weight.absmax": np.ones(32, np.float32),
        "weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(text or json.dumps(told).encode(), np.uint8),
    }  # fmt: skip
    return made(parts, changes)


def int8(**changes: Array | None) -> Weights:
    return made({"weight": np.ones((8, 16), np.int8), "SCB": np.ones(8, np.float32)}, changes)


def nvfp4(**changes: Array | None) -> Weights:
    parts: Weights = {
        "weight_packed": np.full((8, 16), 0x22, np.uint8), "weight_scale": np.ones((8, 2), F8),
        "weight_global_scale": np.ones(1, np.float32),
    }  # fmt: skip
    return made(parts, changes)


def mxfp4(**changes: Array | None) -> Weights:
    return made({"x_blocks": np.zeros((2, 4, 3, 16), np.uint8), "x_scales": np.zeros((2, 4, 3), np.uint8)}, changes)


def made(parts: Weights, changes: dict[str, Array | None]) -> Weights:
    spelled = {name.replace("__nf4", "").replace(".", "_"): name for name in parts}
    every = {**parts, **{spelled.get(name, name): value for name, value in changes.items()}}
    return {f"l.{name}": value for name, value in every.items() if value is not None}


def nan(*shape: int, dtype: Any = np.float32) -> Array:
    found = np.ones(shape, dtype)
    found.reshape(-1)[-1] = np.nan
    return found


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
HUGE = 1 << 40

REFUSED: dict[str, tuple[Weights, dict[str, Any], str]] = {
    # wrong counts
    "too few words": (gptq(qweight=np.zeros((7, 32), np.int32)), GPTQ, "does not hold 64 codes of 4 bits"),
    "too few groups": (gptq(g_idx=np.zeros(40, np.int32)), GPTQ, "does not hold 40 codes of 4 bits"),
    "a count of columns that is huge": (packed(weight_shape=np.array([16, HUGE])), {}, "does not hold 16 x 10995116"),
    "negative counts": (packed(weight_shape=np.array([-16, 64])), {}, "does not hold -16 x 64"),
    "more counts than dimensions": (packed(weight_shape=np.array([2, 8, 64])), {}, "does not hold 2 sizes"),
    "a shape that is huge": (nf4({"shape": [HUGE, HUGE]}), {}, "does not hold [1099511627776, 1099511627776] codes"),
    "a shape of another size": (nf4({"shape": [32, 63]}), {}, "does not hold [32, 63] codes"),
    "fewer scales than blocks": (nf4(weight_absmax=np.ones(31, np.float32)), {}, "are not 32"),
    "a table of another length": (nf4(weight_quant_map=np.ones(15, np.float32)), {}, "is not a table of 16 values"),
    # scales of another shape
    "fp8 scales of another shape": (fp8(weight_scale_inv=np.ones((3, 2), np.float32)), FP8, "not match the configured"),
    "more fp8 scales than elements": (fp8(weight_scale_inv=np.ones((257, 3), np.float32)), {}, "not match any blocks"),
    "gptq scales of another shape": (gptq(scales=np.ones((2, 31), np.float16)), GPTQ, "do not match a known layout"),
    "packed scales of another shape": (packed(weight_scale=np.ones((15, 2), np.float32)), {}, "do not match 16 rows"),
    "int8 scales of another shape": (int8(SCB=np.ones(7, np.float32)), {}, "do not match [8, 16]"),
    "nvfp4 scales of another shape": (nvfp4(weight_scale=np.ones((8, 3), F8)), {}, "are not one for each 16"),
    "mxfp4 scales of another shape": (mxfp4(x_scales=np.zeros((2, 4, 2), np.uint8)), {}, "are not one for each group"),
    "scales that are integers": (fp8(weight_scale_inv=np.ones((2, 3), np.int32)), FP8, "are not floating-point"),
    "no scales": (packed(weight_scale=None), {}, "'l.weight_scale' is missing"),
    # NaN, and zero where values are divided by it
    "a NaN in fp8 scales": (fp8(weight_scale_inv=nan(2, 3)), FP8, "A scale in 'l.weight_scale_inv' is NaN or infinite"),
    "a NaN in gptq scales": (gptq(scales=nan(2, 32, dtype=np.float16)), GPTQ, "A scale in 'l.scales"),
    "a NaN in nf4 scales": (nf4(weight_absmax=nan(32)), {}, "A scale in 'l.weight.absmax' is NaN or infinite"),
    "a NaN in an nf4 table": (nf4(weight_quant_map=nan(16)), {}, "A scale in 'l.weight.quant_map' is NaN or infinite"),
    "a NaN in int8 scales": (int8(SCB=nan(8)), {}, "A scale in 'l.SCB' is NaN or infinite"),
    "a NaN in powers of two": (mxfp4(x_scales=np.full((2, 4, 3), 255, np.uint8)), {}, "A scale in 'l.x_scales"),
    "a global scale of zero": (nvfp4(weight_global_scale=np.zeros(1, np.float32)), {}, "is NaN or infinite"),
    # groups out of range
    "a group that is too large": (gptq(g_idx=np.full(64, 2, np.int32)), GPTQ, "out of range: there are 2"),
    "a negative group": (gptq(g_idx=np.full(64, -1, np.int32)), GPTQ, "out of range: there are 2"),
    "a packed group that is too large": (packed(weight_g_idx=np.full(64, 7, np.int32)), {}, "out of range"),
    "a zero point beyond the codes": (gptq(qzeros=np.full((2, 4), -1, np.int32)), GPTQ, "larger than 14"),
    # a quant_state that is none
    "a state that is no JSON": (nf4(b"not JSON"), {}, "is not a JSON object"),
    "a state that is a list": (nf4(b"[1, 2]"), {}, "is not a JSON object"),
    "a state of brackets": (nf4(b"[" * 9000), {}, "is not a JSON object"),
    "a state that is too long": (nf4(b" " * 20000), {}, "the limit is 16,384"),
    "a state of another type": (nf4({"quant_type": "fp4"}), {}, "is of the type 'fp4'"),
    "a state with a dtype that is none": (nf4({"dtype": "float33"}), {}, "has an invalid dtype"),
    "an offset that is huge": (
        nf4({"nested_blocksize": 256, "nested_offset": 10**400}, weight_absmax=np.ones(32, np.uint8),
            **{"weight.nested_absmax": np.ones(1, np.float32), "weight.nested_quant_map": np.ones(256, np.float32)}),
        {}, "the offset 1000",
    ),
    "a state with a shape that is none": (nf4({"shape": [1e3, "x"]}), {}, "has the shape [1000.0, 'x']"),
    # block sizes that do not divide
    "blocks that do not divide": (packed(weight_scale=np.ones((16, 3), np.float32)), {}, "not divide 64 columns"),
    "groups that do not divide": (
        gptq(scales=np.ones((3, 32), np.float16), qzeros=np.zeros((3, 4), np.int32), g_idx=None),
        {**GPTQ, "group_size": -1},
        "do not divide 64 inputs",
    ),
    "blocks of nothing": (nf4({"blocksize": 0}), {}, "in blocks of 0"),
    "blocks that are huge": (nf4({"blocksize": 1 << 60}), {}, "in blocks of 1152921504606846976"),
    # a configuration that contradicts the tensors
    "other blocks in the configuration": (fp8(), {**FP8, "weight_block_size": [64, 64]}, "blocks of [64, 64]"),
    "blocks that are none in the configuration": (fp8(), {**FP8, "weight_block_size": "128"}, "not two sizes"),
    "other bits in the configuration": (gptq(), {**GPTQ, "bits": 8}, "configuration says 8 bits"),
    "an unknown format in the configuration": (gptq(), {**GPTQ, "checkpoint_format": "marlin"}, "marlin"),
    "a module that is not quantised": (fp8(), {**FP8, "modules_to_not_convert": ["l"]}, "'l' is not quantised"),
    "no configuration": (gptq(), {}, "keep config.json"),
}  # fmt: skip


def directory(folder: Path, weights: Weights, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    tp.save({**weights, "norm": np.ones(4, np.float32)}, folder / "model.safetensors", overwrite=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_hold_together_is_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, config, reason = REFUSED[case]
    path = directory(tmp_path / "m", weights, config)
    size = sum(each.stat().st_size for each in path.iterdir())
    command(capsys, "ls", path)  # what is imported once does not count
    out = tmp_path / "out"
    for arguments in (("convert", path, out, "--dtype", "bf16"), ("ls", path), ("stats", path)):
        tracemalloc.start()
        done = command(capsys, *arguments)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * size + SLACK, f"{peak:,} bytes"
        assert "Traceback" not in done.err
        if arguments[0] == "convert":
            assert done.status == 2
            assert reason in done.err
            assert done.err.count("\n") == 1
            assert not done.out
            assert not out.exists() or not list(out.iterdir())
        else:
            assert done.status == 0
            assert not done.err


def test_a_nan_scale_is_counted_and_flagged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = directory(tmp_path / "m", fp8(weight_scale_inv=nan(2, 3)), FP8)
    assert tp.stats(path)["l.weight"].nan == 128 * 128
    assert command(capsys, "stats", path, "--check", "--rules", "non-finite").status == 1
    assert command(capsys, "verify", path, "--values").status == 1


def test_scales_of_zero_give_zeros(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in the libraries, which write such scales for blocks of zeros."""
    path = directory(tmp_path / "m", fp8(weight_scale_inv=np.zeros((2, 3), np.float32)), FP8)
    assert tp.stats(path)["l.weight"].zeros == 256 * 384
    assert command(capsys, "stats", path, "--check", "--rules", "zero").status == 1
    assert command(capsys, "convert", path, tmp_path / "out", "--dtype", "bf16").status == 0
    assert not np.any(tp.of(tmp_path / "out").numpy("l.weight").astype(np.float32))


def test_nothing_is_left_of_a_conversion_that_is_refused_midway(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {**fp8(), **{f"z{name}": value for name, value in fp8(weight_scale_inv=nan(2, 3)).items()}}
    path = directory(tmp_path / "m", weights, FP8)
    done = command(capsys, "convert", path, tmp_path / "out.safetensors", "--dtype", "bf16")
    assert (done.status, "'zl.weight_scale_inv'" in done.err) == (2, True)
    assert [each.name for each in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"quantization_config": []}', "[" * 100_000, "\0", '{"a": 1e999}']
)
def test_a_configuration_that_is_none_is_passed_over(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = directory(tmp_path / "m", {**fp8(), **{f"g{name}": value for name, value in gptq().items()}}, FP8)
    (path / "config.json").write_text(text)
    done = command(capsys, "ls", path)
    assert (done.status, done.err) == (0, "")
    assert "fp8-block128" in done.out  # the tensors tell
    assert "keep config.json" in done.out  # they do not


def test_mutated_checkpoints_are_decoded_or_refused() -> None:
    assert 10 < fuzz_encodings.run(90) < 80
