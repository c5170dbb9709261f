"""Float8 with scales: one row, named as in the unquantised model, with the values code × scale."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import torchparams as tp
from command import command
from torchparams.errors import NotReadable

if TYPE_CHECKING:
    from pathlib import Path

F8 = torch.float8_e4m3fn


def codes(*shape: int, dtype: torch.dtype = F8, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scales(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype)


def spread(scale: torch.Tensor, high: int, wide: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The scale of each element, by torch's own means."""
    repeated = scale.float().repeat_interleave(high, -2).repeat_interleave(wide, -1)
    return repeated[..., : shape[-2], : shape[-1]]


BLOCKS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, int], str]] = {
    "blocks": ((256, 384), (2, 3), (128, 128), "fp8-block128"),
    "short blocks at the edges": ((300, 260), (3, 3), (128, 128), "fp8-block128"),
    "less than a block high": ((64, 256), (1, 2), (64, 128), "fp8-block128"),
    "blocks of rows": ((8, 256), (8, 2), (1, 128), "fp8-group128"),
    "channels": ((8, 12), (8, 1), (1, 12), "fp8-channel"),
    "experts": ((3, 130, 256), (3, 2, 2), (128, 128), "fp8-block128"),
    "experts by channel": ((3, 5, 7), (3, 5, 1), (1, 7), "fp8-channel"),
    "experts by tensor": ((3, 5, 7), (3, 1, 1), (5, 7), "fp8-tensor"),
}


@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("end", ["_scale", "_scale_inv"])
def test_values_are_code_times_scale(case: str, end: str) -> None:
    shape, of_scale, (high, wide), encoding = BLOCKS[case]
    weight, scale = codes(*shape), scales(*of_scale, dtype=torch.bfloat16)
    params = tp.of({"l.weight": weight, f"l.weight{end}": scale, "l.bias": torch.zeros(2)})
    assert params.names == ["l.weight", "l.bias"]
    info = params.info("l.weight")
    assert (info.shape, info.dtype, info.encoding) == (shape, "float32", encoding)
    assert info.raw_names == ("l.weight", f"l.weight{end}")
    assert info.nbytes == weight.numel() + 2 * scale.numel()
    assert info.bpw == 8 * info.nbytes / weight.numel()
    assert torch.equal(params["l.weight"], weight.float() * spread(scale, high, wide, shape))


@pytest.mark.parametrize("scale", [torch.tensor(0.25), torch.tensor([0.25]), torch.full((1, 1), 0.25)])
def test_one_scale_for_all(scale: torch.Tensor) -> None:
    weight = codes(5, 7, dtype=torch.float8_e5m2)
    params = tp.of({"w": weight, "w_scale": scale})
    assert params.info("w").encoding == "fp8-tensor"
    assert torch.equal(params["w"], weight.float() * 0.25)


def test_a_convolution_by_output() -> None:
    weight, scale = codes(4, 3, 2, 2), scales(4)
    assert torch.equal(
        tp.of({"c.weight": weight, "c.weight_scale": scale})["c.weight"], weight.float() * scale.view(4, 1, 1, 1)
    )


def test_scales_that_are_powers_of_two() -> None:
    weight = codes(256, 256)
    scale = torch.tensor([[127, 128], [126, 120]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    params = tp.of({"l.weight": weight, "l.scale": scale})  # DeepSeek's own names
    expected = weight.float() * spread(torch.tensor([[1.0, 2.0], [0.5, 2.0**-7]]), 128, 128, (256, 256))
    assert torch.equal(params["l.weight"], expected)


REFUSED: dict[str, tuple[tuple[int, ...], torch.Tensor, str]] = {
    "too many": ((256, 256), torch.ones(5, 2), r"'l\.weight_scale' \(float32 \[5, 2\]\) do not tell the size"),
    "three dimensions": ((256, 256), torch.ones(2, 2, 2), "do not match any blocks"),
    "one for each input": ((4, 8), torch.ones(8), "do not match any blocks"),
    "no numbers": ((256, 256), torch.ones(2, 2, dtype=torch.int32), "are not floating-point"),
    "several sizes": ((1000, 1000), torch.ones(20, 20), "do not tell the size of their blocks in"),
    "nothing to scale": ((0, 4), torch.ones(0, 1), "do not match any blocks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case: str) -> None:
    shape, scale, reason = REFUSED[case]
    weights = {"l.weight": torch.zeros(shape).to(F8), "l.weight_scale": scale}
    assert tp.of(weights).names == ["l.weight", "l.weight_scale"]  # as they are stored
    unread = tp.stats(weights).unread[0]
    assert unread.name == "l.weight"
    assert "cannot be decoded" in unread.reason
    with pytest.raises(NotReadable, match=reason):
        tp.merge([weights, weights])


def test_two_scales_are_one_too_many() -> None:
    weights = {"w": codes(2, 2), "w_scale": torch.ones(1), "w_scale_inv": torch.ones(1)}
    assert [each.name for each in tp.stats(weights).unread] == ["w"]


def directory(folder: Path, block: object, weights: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    tp.save(weights, folder / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_configuration_says_how_large_blocks_are(tmp_path: Path) -> None:
    weight, scale = codes(1000, 1000), scales(20, 20)
    path = directory(tmp_path / "m", [50, 51], {"w": weight, "w_scale_inv": scale})
    assert tp.of(path).info("w").encoding == "fp8-block50x51"
    assert torch.equal(tp.of(path)["w"], weight.float() * spread(scale, 50, 51, (1000, 1000)))


@pytest.mark.parametrize("block", [[128, 128], [50], "50", [50, -1], [True, 50], [0, 0]])
def test_a_configuration_that_contradicts_the_tensors_is_refused(tmp_path: Path, block: object) -> None:
    path = directory(tmp_path / "m", block, {"w": codes(1000, 1000), "w_scale_inv": scales(20, 20)})
    (unread,) = (each for each in tp.stats(path).unread if each.name == "w")
    assert "configured blocks" in unread.reason or "the configuration" in unread.reason


# --- verbs -------------------------------------------------------------------------------------------

WEIGHTS = {"l.weight": codes(300, 260), "l.weight_scale_inv": scales(3, 3), "norm.weight": torch.ones(4)}
VALUES = WEIGHTS["l.weight"].float() * spread(WEIGHTS["l.weight_scale_inv"], 128, 128, (300, 260))


@pytest.fixture
def file(tmp_path: Path) -> str:
    tp.save(WEIGHTS, tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


def test_raw_shows_what_is_stored(file: str) -> None:
    assert tp.of(file, raw=True).names == list(WEIGHTS)
    assert tp.of(tp.of(file), raw=True).names == list(WEIGHTS)
    assert tp.of(tp.of(file).select("l.weight"), raw=True).names == ["l.weight", "l.weight_scale_inv"]
    assert tp.of(file, raw=True).info("l.weight").dtype == "float8_e4m3fn"


def test_statistics_and_comparisons_are_of_the_values(file: str) -> None:
    plain = {"l.weight": VALUES, "norm.weight": torch.ones(4)}
    assert tp.diff(plain, file).same
    assert tp.stats(file)["l.weight"].to_json() == tp.stats(plain)["l.weight"].to_json()
    assert tp.diff(file, file, numeric=True).same


def test_the_error_of_a_quantisation_is_measured(file: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = {"l.weight": VALUES + 0.01 * torch.randn(300, 260), "norm.weight": torch.ones(4)}
    row = tp.diff(base, file, numeric=True)["l.weight"]
    noise, signal = (VALUES.double() - base["l.weight"].double()).norm(), base["l.weight"].double().norm()
    assert row.sqnr == pytest.approx(20 * float((signal / noise).log10()))
    assert tp.diff(file, file, numeric=True)["l.weight"].sqnr == float("inf")
    tp.save(base, tmp_path / "base.safetensors")
    printed = command(capsys, "diff", tmp_path / "base.safetensors", file, "--numeric").out
    assert f"{row.sqnr:.1f} dB" in printed


def test_a_conversion_copies_what_is_stored_and_one_with_a_dtype_decodes(file: str, tmp_path: Path) -> None:
    plan = tp.convert(file, tmp_path / "copy.safetensors")
    assert plan.copied == plan.nbytes
    plan.run()
    assert tp.digest(tmp_path / "copy.safetensors").digest == tp.digest(file).digest
    tp.convert(file, tmp_path / "half.safetensors", dtype="bf16").run()
    half = tp.of(tmp_path / "half.safetensors")
    assert torch.equal(half["l.weight"], VALUES.bfloat16())
    assert half.names == ["l.weight", "norm.weight"]
    tp.convert(file, tmp_path / "full.safetensors", dtype="f32").run()
    assert torch.equal(tp.of(tmp_path / "full.safetensors")["l.weight"], VALUES)
    parts = tp.convert(file, selector="l.weight", rename="^l\\.=m.")
    assert [output.name for output in parts.outputs] == ["m.weight", "m.weight_scale_inv"]
    assert tp.of(parts).info("m.weight").encoding == "fp8-block128"


def test_a_directory_that_is_decoded_has_a_plain_configuration(tmp_path: Path) -> None:
    source = directory(tmp_path / "m", [128, 128], WEIGHTS)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    tp.convert(source, tmp_path / "plain", dtype="bf16").run()
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == {"model_type": "llama"}
    assert torch.equal(tp.of(tmp_path / "plain")["l.weight"], VALUES.bfloat16())
    whole = json.loads((tmp_path / "m" / "config.json").read_text())
    for name, dtype in (("copy", None), ("part", {"norm.weight": "bf16"})):
        tp.convert(source, tmp_path / name, dtype=dtype).run()
        assert json.loads((tmp_path / name / "config.json").read_text()) == whole
        assert torch.equal(tp.of(tmp_path / name)["l.weight"], VALUES)
    plan = tp.convert(source, tmp_path / "copy.safetensors")
    assert "config.json, which says how the stored tensors are decoded, is not written" in str(plan)
    tp.convert(source, source, dtype="bf16", overwrite=True).run()
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == {"model_type": "llama"}


def test_a_configuration_within_that_of_a_text_model(tmp_path: Path) -> None:
    source = directory(tmp_path / "m", [128, 128], WEIGHTS)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({"text_config": {"n": 1, **config}}))
    tp.convert(source, tmp_path / "plain", dtype="bf16").run()
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == {"text_config": {"n": 1}}


def test_a_merged_directory_has_a_plain_configuration(tmp_path: Path) -> None:
    source = directory(tmp_path / "m", [128, 128], WEIGHTS)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    tp.merge([source, {"l.weight": torch.zeros(300, 260), "norm.weight": torch.ones(4)}], tmp_path / "out").run()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "llama"}


def test_a_directory_of_which_a_part_is_decoded_has_no_configuration(tmp_path: Path) -> None:
    two = {**WEIGHTS, **{f"z{name}": value for name, value in WEIGHTS.items()}}
    source = directory(tmp_path / "m", [128, 128], two)
    plan = tp.convert(source, tmp_path / "part", dtype={"l.weight": "bf16"})
    assert "config.json, which says how the stored tensors are decoded, is not written" in str(plan)
    plan.run()
    assert not (tmp_path / "part" / "config.json").exists()


def test_a_merge_is_of_the_values(file: str) -> None:
    merged = tp.merge([file, {"l.weight": torch.zeros(300, 260), "norm.weight": torch.ones(4)}])
    assert torch.equal(tp.of(merged)["l.weight"], VALUES * 0.5)


def test_digests_and_checks_are_of_the_stored_tensors(file: str) -> None:
    assert list(tp.digest(file).tensors) == list(WEIGHTS)
    assert list(tp.digest(file, "l.weight").tensors) == ["l.weight", "l.weight_scale_inv"]
    assert tp.digest(file).digest == tp.digest(tp.of(file, raw=True)).digest
    assert tp.verify(file, tp.digest(file))


def test_loading_into_a_plain_model_decodes(file: str) -> None:
    net = torch.nn.ModuleDict({"l": torch.nn.Linear(260, 300, bias=False), "norm": torch.nn.RMSNorm(4)})
    tp.load(net, file)
    assert torch.equal(net.get_parameter("l.weight"), VALUES)


def test_selectors_know_encodings(file: str) -> None:
    params = tp.of(file)
    for selector in (":quantized", "[encoding=fp8-block128]", "[encoding=fp8-*]", "[bpw<9]", "[encoding!=nf4][ndim=2]"):
        assert params.select(selector).names == ["l.weight"]
    assert params.select("~:quantized").names == ["norm.weight"]
    assert params.select("[bpw>=32]").names == ["norm.weight"]


def test_the_commands(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    listed = command(capsys, "ls", file)
    assert "fp8-block128" in listed.out
    assert "2 tensors (3 stored)" in listed.out
    row = command(capsys, "ls", file, "--json").json["parameters"][0]
    assert (row["encoding"], row["raw_names"]) == ("fp8-block128", ["l.weight", "l.weight_scale_inv"])
    raw = command(capsys, "ls", file, "--raw").out
    assert "l.weight_scale_inv" in raw
    shown = command(capsys, "show", file, "l.weight").out
    assert "l.weight_scale_inv [3, 3] float32, model.safetensors: bytes" in shown
    assert "float8_e4m3fn" in command(capsys, "show", file, "l.weight", "--raw").out
    assert "l.weight_scale_inv" in command(capsys, "stats", file, "--raw").out


def test_a_shard_may_lie_elsewhere(tmp_path: Path) -> None:
    tp.convert(WEIGHTS, tmp_path / "shards", max_shard_size=78_030).run()
    params = tp.of(tmp_path / "shards")
    assert params.source.format.startswith("sharded")
    assert torch.equal(params["l.weight"], VALUES)
    assert tp.verify(tmp_path / "shards")


def test_a_snapshot_keeps_what_it_saw() -> None:
    weights = dict(WEIGHTS)
    kept = tp.of(weights).select("l.weight").snapshot()
    weights.clear()
    assert torch.equal(kept["l.weight"], VALUES)
    assert [output.name for output in tp.convert(kept).outputs] == ["l.weight", "l.weight_scale_inv"]


def test_a_mapping_that_changes_is_read_anew() -> None:
    weights = dict(WEIGHTS)
    params = tp.of(weights)
    weights["l.weight_scale_inv"] = weights["l.weight_scale_inv"] * 2
    assert np.array_equal(params.numpy("l.weight"), (VALUES * 2).numpy())
    del weights["l.weight_scale_inv"]
    assert params.info("l.weight").encoding is None
