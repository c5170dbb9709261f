"""Codes packed in words and bytes: each encoding against a packer and a decoder written from its description."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import torchparams as tp
import torchparams.encodings.scaled as scaled_module
from command import command
from torchparams.dtypes import DType
from torchparams.encodings.packed import Unpacked
from torchparams.encodings.scaled import FP4, BlockScaled
from torchparams.expressions.work import ThreadWork, evaluate
from torchparams.testing import MemorySource

if TYPE_CHECKING:
    from pathlib import Path

    from torchparams.expressions.base import Work

Array = np.ndarray[Any, Any]
F8 = DType.of("float8_e4m3fn").numpy
BF16 = DType.of("bfloat16").numpy


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def bitstream(codes: Array, bits: int) -> Array:
    """Codes along the first axis as one stream of bits, the lowest first, in words of 32."""
    planes = (codes[:, None, :] >> np.arange(bits)[None, :, None] & 1).reshape(-1, codes.shape[1])
    padded = np.pad(planes, ((0, -len(planes) % 32), (0, 0))).reshape(-1, 32, codes.shape[1]).astype(np.uint64)
    words: Array = (padded << np.arange(32, dtype=np.uint64)[None, :, None]).sum(1).astype(np.uint32).view(np.int32)
    return words


def directory(folder: Path, weights: dict[str, Array], config: dict[str, Any] | None) -> str:
    folder.mkdir(exist_ok=True)
    tp.save(weights, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return str(folder)


def sole(path: object) -> tuple[Array, Any]:
    params = tp.of(path)
    (name,) = params.names
    return params.numpy(name), params.info(name)


# --- GPTQ ----------------------------------------------------------------------------------------------


def gptq(bits: int, inputs: int = 96, outputs: int = 64, groups: int = 3, above: int = 1, order: str = "plain") -> Any:
    random = rng()
    codes = random.integers(0, 1 << bits, (inputs, outputs))
    zeros = random.integers(above, 1 << bits, (groups, outputs))
    scales = random.random((groups, outputs)).astype(np.float16)
    group = np.arange(inputs) // (inputs // groups)
    if order == "act":
        group = random.permutation(group)
    weights = {
        "l.qweight": bitstream(codes, bits),
        "l.qzeros": np.ascontiguousarray(bitstream((zeros - above).T, bits).T),
        "l.scales": scales,
        "l.g_idx": group.astype(np.int32),
    }
    if order == "none":
        del weights["l.g_idx"]
    values = (codes - zeros[group]).astype(np.float32) * scales[group].astype(np.float32)
    return weights, values.T


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["plain", "act", "none"])
@pytest.mark.parametrize("above", [0, 1])
def test_gptq(bits: int, order: str, above: int, tmp_path: Path) -> None:
    weights, expected = gptq(bits, above=above, order=order)
    format = "gptq" if above else "gptq_v2"
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": format}
    values, info = sole(directory(tmp_path / "m", weights, config))
    assert (info.name, info.shape, info.dtype) == ("l.weight", (64, 96), "float32")
    assert info.encoding == f"gptq-int{bits}-g32"
    assert set(info.raw_names) == weights.keys()
    assert info.nbytes == sum(each.nbytes for each in weights.values())
    assert np.array_equal(values, expected)


def test_gptq_in_several_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchparams.encodings import packed

    monkeypatch.setattr(packed, "TILE", 96 * 32)
    weights, expected = gptq(4, outputs=160, order="act")
    path = directory(tmp_path / "m", weights, {"quant_method": "gptq", "bits": 4})
    assert np.array_equal(sole(path)[0], expected)
    monkeypatch.setattr(packed, "_PIECES", 3)
    assert np.array_equal(sole(path)[0], expected)
    assert tp.stats(path)["l.weight"].max == expected.max()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["plain", "act"])
def test_the_stored_order_has_the_same_elements(bits: int, order: str, tmp_path: Path) -> None:
    weights, expected = gptq(bits, order=order)
    row = tp.of(directory(tmp_path, weights, {"quant_method": "gptq", "bits": bits})).source.row("l.weight")
    stored = row.unordered()
    assert stored is not row
    assert np.array_equal(evaluate(stored), expected.T)
    with ThreadWork() as work:
        work.begin(stored)
        for start, stop in ((0, 1), (63, 65), (5, 700), (stored.numel - 3, stored.numel)):
            assert np.array_equal(stored.compute(start, stop, work), expected.T.reshape(-1)[start:stop])


def test_statistics_read_packed_words_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, expected = gptq(4, 256, 64, 2)
    path = directory(tmp_path, weights, {"quant_method": "gptq", "bits": 4})
    monkeypatch.setattr(Unpacked, "columns_of", lambda *_: pytest.fail("columns were read"))
    found = tp.stats(path).rows[0]
    plain = tp.stats({"l.weight": expected}).rows[0]
    assert (found.mean, found.std, found.min, found.max) == (plain.mean, plain.std, plain.min, plain.max)


@pytest.mark.parametrize("kept", [0, 1 << 18])
def test_scales_are_kept_or_read_for_each_part(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled_module, "KEPT", kept)
    codes, scales = rng().integers(-9, 9, (1, 1000)).astype(np.int8), rng().random((1, 34)).astype(np.float32)
    source = MemorySource({"c": codes, "s": scales})
    row = BlockScaled(source.row("c"), source.row("s"), (1, 1000), (1, 30))
    expected = (codes * np.repeat(scales, 30, axis=1)[:, :1000]).reshape(-1)
    with ThreadWork() as work:
        work.begin(row)
        for start, stop in ((0, 1000), (29, 31), (30, 60), (61, 299), (990, 1000)):
            assert np.array_equal(row.compute(start, stop, work), expected[start:stop])


def test_gptq_without_a_configuration_is_refused() -> None:
    weights, _ = gptq(4)
    reasons = {each.name: each.reason for each in tp.stats(weights).unread}
    assert "keep config.json" in reasons["l.qweight"]
    assert tp.of(weights).names == list(weights)


def broken(weights: dict[str, Array], **changes: Array | None) -> dict[str, Array]:
    made = {name: changes.get(name.partition(".")[2], value) for name, value in weights.items()}
    return {name: value for name, value in made.items() if value is not None}


GPTQ: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no scales": ({"scales": None}, {}, r"'l\.scales' is missing"),
    "no zero points": ({"qzeros": None}, {}, r"'l\.qzeros' is missing"),
    "zero points of another shape": ({"qzeros": np.zeros((3, 7), np.int32)}, {}, "zero points"),
    "groups that do not divide": (
        {"scales": np.ones((7, 64), np.float16), "qzeros": np.zeros((7, 8), np.int32)},
        {},
        "7",
    ),
    "a list of groups that is none": ({"g_idx": np.zeros((2, 2), np.int32)}, {}, "g_idx"),
    "too few words": ({"qweight": np.zeros((5, 64), np.int32)}, {}, "does not hold 96 codes"),
    "another count of bits": ({}, {"bits": 8}, "The configuration says 8 bits|the configuration says 8 bits"),
    "an unknown format": ({}, {"checkpoint_format": "marlin"}, "marlin"),
    "codes of another type": ({"qweight": np.zeros((12, 64), np.int16)}, {}, "is not an int32 matrix"),
    "empty": ({"qweight": np.zeros((0, 64), np.int32)}, {}, "is not an int32 matrix"),
}


@pytest.mark.parametrize("case", GPTQ)
def test_gptq_that_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    changes, config, reason = GPTQ[case]
    weights = broken(gptq(4)[0], **changes)
    path = directory(tmp_path / "m", weights, {"quant_method": "gptq", "bits": 4, **config})
    unread = {each.name: each.reason for each in tp.stats(path).unread}
    assert re.search(reason, unread["l.qweight"]), unread


def test_values_that_have_no_one_meaning_are_refused_when_they_are_read(tmp_path: Path) -> None:
    weights, _ = gptq(4)
    config = {"quant_method": "gptq", "bits": 4}
    for change, reason in (
        ({"g_idx": np.full(96, 3, np.int32)}, "out of range"),
        ({"g_idx": np.full(96, -1, np.int32)}, "out of range"),
        ({"qzeros": np.full((3, 8), -1, np.int32)}, "larger than 14"),
    ):
        path = directory(tmp_path / "m", broken(weights, **change), config)
        (unread,) = tp.stats(path).unread
        assert reason in unread.reason


# --- AWQ ------------------------------------------------------------------------------------------------


def pack_awq(codes: Array) -> Array:
    fields = codes.reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].astype(np.uint64)
    words: Array = (fields << (4 * np.arange(8, dtype=np.uint64))).sum(-1).astype(np.uint32).view(np.int32)
    return words


def awq() -> tuple[dict[str, Array], Array]:
    random = rng()
    codes, zeros = random.integers(0, 16, (64, 40)), random.integers(0, 16, (2, 40))
    scales = random.random((2, 40)).astype(np.float16)
    weights = {"l.qweight": pack_awq(codes), "l.qzeros": pack_awq(zeros), "l.scales": scales}
    group = np.arange(64) // 32
    return weights, ((codes - zeros[group]).astype(np.float32) * scales[group].astype(np.float32)).T


def test_awq_needs_no_configuration(tmp_path: Path) -> None:
    weights, expected = awq()
    for path in (weights, directory(tmp_path / "m", weights, {"quant_method": "awq", "version": "gemm", "bits": 4})):
        values, info = sole(path)
        assert (info.name, info.shape, info.encoding) == ("l.weight", (40, 64), "awq-int4-g32")
        assert np.array_equal(values, expected)


@pytest.mark.parametrize("config", [{"version": "gemv"}, {"version": "marlin"}, {"bits": 8}, {"version": 3}])
def test_other_versions_of_awq_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    path = directory(tmp_path / "m", awq()[0], {"quant_method": "awq", **config})
    assert {each.name for each in tp.stats(path).unread} >= {"l.qweight"}


# --- four-bit floats -----------------------------------------------------------------------------------


def nibbles(codes: Array) -> Array:
    packed: Array = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
    return packed


TABLE = np.array(FP4, np.float32)


def test_mxfp4_has_the_orientation_of_the_layer() -> None:
    random = rng()
    codes, powers = random.integers(0, 16, (3, 20, 64)), random.integers(110, 135, (3, 20, 2)).astype(np.uint8)
    weights = {"e.gate_up_proj_blocks": nibbles(codes).reshape(3, 20, 2, 16), "e.gate_up_proj_scales": powers}
    values, info = sole(weights)
    assert (info.name, info.shape, info.encoding) == ("e.gate_up_proj", (3, 64, 20), "mxfp4")
    assert info.bpw == 4.25
    expected = np.ldexp(TABLE[codes], powers.astype(np.int32).repeat(32, -1) - 127)
    assert np.array_equal(values, expected.swapaxes(1, 2))
    assert tp.stats(weights)["e.gate_up_proj"].max == expected.max()


@pytest.mark.parametrize("divide", [False, True])
def test_nvfp4(divide: bool) -> None:
    random = rng()
    codes, scales = random.integers(0, 16, (10, 48)), (random.random((10, 3)) * 100).astype(F8)
    whole = np.array([0.37], np.float32)
    weights = (
        {"l.weight_packed": nibbles(codes), "l.weight_scale": scales, "l.weight_global_scale": whole}
        if divide  # compressed-tensors
        else {"l.weight": nibbles(codes), "l.weight_scale": scales, "l.weight_scale_2": whole.reshape(())}
    )
    values, info = sole(weights)
    assert (info.name, info.shape, info.encoding) == ("l.weight", (10, 48), "nvfp4")
    wide = scales.astype(np.float32)
    assert np.array_equal(values, TABLE[codes] * (wide / whole if divide else wide * whole).repeat(16, -1))


def test_mxfp4_of_compressed_tensors() -> None:
    random = rng()
    codes, powers = random.integers(0, 16, (10, 64)), random.integers(110, 135, (10, 2)).astype(np.uint8)
    values, info = sole({"l.weight_packed": nibbles(codes), "l.weight_scale": powers})
    assert (info.name, info.encoding) == ("l.weight", "mxfp4")
    assert np.array_equal(values, np.ldexp(TABLE[codes], powers.astype(np.int32).repeat(32, -1) - 127))


FP4_REFUSED: dict[str, dict[str, Array]] = {
    "blocks of another size": {"x_blocks": np.zeros((2, 3, 4, 8), np.uint8), "x_scales": np.zeros((2, 3, 4), np.uint8)},
    "too few powers": {"x_blocks": np.zeros((2, 3, 4, 16), np.uint8), "x_scales": np.zeros((2, 3, 3), np.uint8)},
    "scales of another shape": {
        "w": np.zeros((4, 16), np.uint8), "w_scale": np.ones((4, 3), F8), "w_scale_2": np.ones((), np.float32),
    },
    "scales of another type": {
        "w": np.zeros((4, 16), np.uint8), "w_scale": np.ones((4, 2), BF16), "w_scale_2": np.ones((), np.float32),
    },
    "several scales of all": {
        "w": np.zeros((4, 16), np.uint8), "w_scale": np.ones((4, 2), F8), "w_scale_2": np.ones(2, np.float32),
    },
    "no scales": {"w": np.zeros((4, 16), np.uint8), "w_scale_2": np.ones((), np.float32)},
    "nothing": {"w_packed": np.zeros((0, 16), np.uint8), "w_scale": np.ones((0, 1), np.uint8)},
}  # fmt: skip


@pytest.mark.parametrize("case", FP4_REFUSED)
def test_four_bit_floats_that_do_not_fit_are_refused(case: str) -> None:
    weights = FP4_REFUSED[case]
    assert tp.of(weights).names == list(weights)
    assert next(iter(weights)) in {each.name for each in tp.stats(weights).unread}


# --- compressed-tensors ---------------------------------------------------------------------------------


def packed(bits: int, zeros: bool, columns: int = 64, groups: int = 2) -> tuple[dict[str, Array], Array]:
    random = rng()
    half = 1 << (bits - 1)
    codes = random.integers(-half, half, (24, columns))
    points = random.integers(-half, half, (24, groups)) * zeros
    scales = random.random((24, groups)).astype(BF16)
    weights = {
        "l.weight_packed": np.ascontiguousarray(bitstream((codes + half).T, bits).T),
        "l.weight_scale": scales,
        "l.weight_shape": np.array([24, columns]),
    }
    if zeros:
        weights["l.weight_zero_point"] = bitstream(points + half, bits)
    group = np.arange(columns) // (columns // groups)
    return weights, (codes - points[:, group]).astype(np.float32) * scales.astype(np.float32)[:, group]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("columns", [64, 62])
def test_pack_quantized(bits: int, zeros: bool, columns: int) -> None:
    weights, expected = packed(bits, zeros, columns)
    values, info = sole(weights)
    assert (info.name, info.shape, info.encoding) == ("l.weight", (24, columns), f"int{bits}-g{columns // 2}")
    assert np.array_equal(values, expected)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("columns", [64, 62])
def test_pack_quantized_experts(bits: int, zeros: bool, columns: int) -> None:
    weights, expected = packed(bits, zeros, columns)
    other = {name: value[::-1].copy() for name, value in weights.items()}
    if zeros:  # packed along the rows
        other["l.weight_zero_point"] = weights["l.weight_zero_point"]
    one, _ = sole({**other, "l.weight_shape": weights["l.weight_shape"]})
    experts = {name: np.stack([value, other[name], value]) for name, value in weights.items()}
    experts["l.weight_shape"] = np.array([3, 24, columns])
    values, info = sole(experts)
    assert (info.name, info.shape, info.encoding) == ("l.weight", (3, 24, columns), f"int{bits}-g{columns // 2}")
    assert np.array_equal(values, np.stack([expected, one, expected]))
    assert np.array_equal(one, expected[::-1]) != zeros
    assert tp.stats(experts)["l.weight"].max == values.max()


def test_an_order_of_experts_is_refused() -> None:
    weights, _ = packed(4, False)
    experts = {name: np.stack([value, value]) for name, value in weights.items()}
    experts |= {"l.weight_shape": np.array([2, 24, 64]), "l.weight_g_idx": np.zeros((2, 64), np.int32)}
    assert "'l.weight_g_idx'" in tp.stats(experts).unread[0].reason


def test_pack_quantized_in_the_order_of_activations() -> None:
    weights, _ = packed(4, False)
    order = rng().permutation(np.arange(64) // 32).astype(np.int32)
    values, _ = sole({**weights, "l.weight_g_idx": order})
    plain, _ = sole(weights)
    scales = weights["l.weight_scale"].astype(np.float32)
    assert np.allclose(values / scales[:, order], plain / scales.repeat(32, -1))


def test_the_width_of_a_few_columns_is_that_of_the_configuration() -> None:
    weights, _ = packed(4, False, columns=8, groups=1)
    [unread] = [each for each in tp.stats(weights).unread if each.name == "l.weight_packed"]
    assert "fits several widths (1, 2, 3, 4 bits), and config.json states none of them" in unread.reason


@pytest.mark.parametrize(
    "change",
    [
        {"weight_shape": np.array([24, 1 << 60])},
        {"weight_shape": np.array([-24, 64])},
        {"weight_shape": np.array([24])},
        {"weight_shape": np.array([1, 24, 64])},
        {"weight_shape": None},
        {"weight_scale": None},
        {"weight_scale": np.ones((24, 3), np.float32)},
        {"weight_scale": np.ones((3, 24), np.float32)},
        {"weight_zero_point": np.zeros((1, 2), np.int32)},
    ],
)
def test_pack_quantized_that_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    weights = broken(packed(4, True)[0], **change)
    assert "l.weight_packed" in {each.name for each in tp.stats(weights).unread}


def test_int8_with_scales_needs_a_configuration(tmp_path: Path) -> None:
    weights = {
        "l.weight": rng().integers(-128, 128, (6, 8)).astype(np.int8),
        "l.weight_scale": np.full((6, 1), 0.5, "f4"),
    }
    assert tp.of(weights).info("l.weight").encoding is None
    values, info = sole(directory(tmp_path / "m", weights, {"quant_method": "compressed-tensors"}))
    assert info.encoding == "int8-channel"
    assert np.array_equal(values, weights["l.weight"] * np.float32(0.5))


def test_int8_with_zero_points(tmp_path: Path) -> None:
    codes, zeros = rng().integers(-128, 128, (6, 8)).astype(np.int8), rng().integers(-9, 9, (6, 1)).astype(np.int8)
    weights = {"l.weight": codes, "l.weight_scale": np.full((6, 1), 0.5, "f4"), "l.weight_zero_point": zeros}
    config = {"quant_method": "compressed-tensors"}
    values, info = sole(directory(tmp_path / "m", weights, config))
    assert (info.encoding, len(info.raw_names)) == ("int8-channel", 3)
    assert np.array_equal(values, (codes.astype(np.float32) - zeros) * np.float32(0.5))
    for wrong in (zeros[:3], zeros.astype(np.int32)):
        path = directory(tmp_path / "m", {**weights, "l.weight_zero_point": wrong}, config)
        assert "zero points 'l.weight_zero_point'" in {e.name: e.reason for e in tp.stats(path).unread}["l.weight"]
    floats = {**weights, "l.weight": codes.view(F8)}
    reasons = {each.name: each.reason for each in tp.stats(floats).unread}
    assert "zero points of floats ('l.weight_zero_point') are unknown" in reasons["l.weight"]


def test_show_decodes_no_more_than_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = rng().integers(0, 256, (3, 20, 2, 16)).astype(np.uint8)
    experts = {"x_blocks": blocks, "x_scales": np.full((3, 20, 2), 127, np.uint8)}
    gptq_directory = directory(tmp_path / "m", gptq(4)[0], {"quant_method": "gptq", "bits": 4})
    narrow = {"w": np.ones((20, 1), F8), "w_scale": np.full((20, 1), 0.5, np.float32)}
    for x, name in ((experts, "x"), (gptq_directory, "l.weight"), (narrow, "w"), (packed(4, True)[0], "l.weight")):
        whole = tp.of(x).numpy(name)
        plain = tp.show({"v": whole}, "v").to_json()["values"]
        decoded: list[int] = []
        compute = BlockScaled.compute

        def counted(self: BlockScaled, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
            decoded.append(stop - start)  # noqa: B023
            return compute(self, start, stop, work, into)  # noqa: B023

        monkeypatch.setattr(BlockScaled, "compute", counted)
        assert tp.show(x, name).to_json()["values"] == plain
        monkeypatch.undo()
        assert sum(decoded) == (6 * whole.shape[-1] if whole.shape[-1] > 1 else whole.size)


def test_six_bits_and_eight_with_powers_of_two() -> None:
    codes = rng().integers(0, 64, (4, 64))
    word = sum(codes.reshape(4, 16, 4)[..., i] << 6 * i for i in range(4))
    packed = np.stack([word >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8).reshape(4, 48)
    scale = rng().integers(120, 130, (4, 2)).astype(np.uint8)
    factor = np.repeat(np.exp2(scale.astype(np.float32) - 127), 32, axis=1)
    values, info = sole({"l.weight_packed": packed, "l.weight_scale": scale})
    magnitude = np.where(codes & 24, (1 + (codes & 7) / 8) * 2.0 ** ((codes >> 3 & 3) - 1), (codes & 7) / 8)
    assert (info.encoding, info.shape, info.bpw) == ("mxfp6", (4, 64), 6.25)
    assert np.array_equal(values, np.where(codes & 32, -magnitude, magnitude) * factor)
    eight = rng().integers(0, 120, (4, 64)).astype(np.uint8).view(F8)
    values, info = sole({"l.weight": eight, "l.weight_scale": scale})
    assert (info.encoding, info.bpw) == ("mxfp8", 8.25)
    assert np.array_equal(values, eight.astype(np.float32) * factor)


def test_zero_points_of_floats_are_refused() -> None:
    weights = {
        "l.weight_packed": np.zeros((4, 32), np.uint8), "l.weight_scale": np.zeros((4, 2), np.uint8),
        "l.weight_zero_point": np.zeros((4, 2), np.uint8),
    }  # fmt: skip
    assert "'l.weight_zero_point'" in tp.stats(weights).unread[0].reason


EXCLUDED: list[tuple[dict[str, Any], str | None]] = [
    ({"modules_to_not_convert": ["lm_head"]}, "lm_head"),
    ({"modules_to_not_convert": ["model.layers.0"]}, "model.layers.0"),
    ({"ignore": ["layers.0.fc"]}, "layers.0.fc"),
    ({"exclude_modules": ["model.layers.*.fc"]}, "model.layers.*.fc"),
    ({"ignored_layers": ["fc"]}, "fc"),
    ({"ignore": ["re:.*fc"]}, "re:.*fc"),
    ({"ignore": ["re:model[.]layers[.][0-9]+[.]fc$"]}, "re:model[.]layers[.][0-9]+[.]fc$"),
    ({"ignore": ["re:fc", "re:.*fc2", "re:.*c$b", "re:layers.*", "re:.*weight"]}, None),
    ({"ignore": ["Linear", "LlamaMLP"]}, None),  # a file does not tell classes
    ({"modules_to_not_convert": ["model.layers.00", "ayers.0.fc", "c", "layers", 3, None, ""]}, None),
    ({"modules_to_not_convert": "fc"}, None),
    ({}, None),
]


@pytest.mark.parametrize(("config", "module"), EXCLUDED)
def test_modules_that_are_not_converted_hold_no_codes(
    config: dict[str, Any], module: str | None, tmp_path: Path
) -> None:
    names = ["lm_head.weight"] if module == "lm_head" else ["model.layers.0.fc.weight"]
    weights: dict[str, Array] = {name: np.ones((4, 4), F8) for name in names}
    weights |= {f"{name}_scale": np.ones((), np.float32) for name in names}
    path = directory(tmp_path / "m", weights, {"quant_method": "fp8", **config})
    unread = [each.reason for each in tp.stats(path).unread]
    if module is None:
        assert not unread
    else:
        assert f"the configuration says that '{module}' is not quantised" in unread[0]


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("re:(", "is not a regular expression"),
        ("re:a)|(b", "is not a regular expression"),
        ("re:" + "a" * 2000, "is not a regular expression"),
        ("re:" + "(" * 900, "is not a regular expression"),
        (r"re:(a*)*\1(a|b|ab)*\1$", "could take too long"),
    ],
)
def test_patterns_of_a_configuration_that_cannot_be_used_are_refused(
    pattern: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a" * 60 + ".weight"
    weights: dict[str, Array] = {name: np.ones((4, 4), F8), f"{name}_scale": np.ones((), np.float32)}
    path = directory(tmp_path / "m", weights, {"quant_method": "compressed-tensors", "ignore": [pattern]})
    assert reason in tp.stats(path).unread[0].reason
    done = command(capsys, "convert", path, tmp_path / "out", "--dtype", "f32")
    assert (done.status, done.err.count("Traceback")) == (2, 0)
    assert reason in done.err


def test_a_pattern_that_makes_choices_without_end_takes_no_time(tmp_path: Path) -> None:
    name = "a" * 200 + ".weight"
    weights: dict[str, Array] = {name: np.ones((4, 4), F8), f"{name}_scale": np.ones((), np.float32)}
    path = directory(tmp_path / "m", weights, {"quant_method": "fp8", "ignore": ["re:(a+)+b$", "re:(a|aa)+$"]})
    assert "'re:(a|aa)+$' is not quantised" in tp.stats(path).unread[0].reason
