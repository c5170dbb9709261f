"""Checkpoints made by the converters of transformers and compressed-tensors: decoded, and loaded again when decoded."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import (
    AutoAWQConverter,
    FP8BlockDequantizer,
    ModelOptNvfp4Converter,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

import torchparams as tp

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries


def tiny() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, dtype="float32",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def is_quantised(name: str) -> bool:
    return "_proj" in name


def saved(model: Any, state: dict[str, torch.Tensor], config: dict[str, Any], folder: Path) -> Path:
    folder.mkdir()
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    told = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def loads(folder: Path, out: Path, expected: dict[str, torch.Tensor]) -> None:
    """A directory that is decoded loads in transformers, with these values."""
    tp.convert(folder, out, dtype="f32").run()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    state = model.state_dict()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("block", [[128, 128], [32, 64], None])
def test_fp8_of_transformers(block: list[int] | None, tmp_path: Path) -> None:
    model = tiny()
    config = {"quant_method": "fp8", "weight_block_size": block, "modules_to_not_convert": ["lm_head"]}
    quantiser: Any = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt="float"))
    state: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if not is_quantised(name):
            state[name] = expected[name] = value
            continue
        stored = Fp8Quantize(quantiser).convert({name: value})
        state |= stored
        codes, scales = stored[name], stored[f"{name}_scale_inv"]
        expected[name] = Fp8Dequantize(quantiser)._dequantize_one(codes, scales, torch.float32)
    folder = saved(model, state, config, tmp_path / "fp8")
    params = tp.of(folder)
    assert set(params.names) == set(expected)
    for name, value in expected.items():
        assert torch.equal(params[name], value)
        assert (params.info(name).encoding or "").startswith("fp8-") == is_quantised(name)
    rows = tp.diff(model.state_dict(), folder, numeric=True)
    assert not rows.same
    loads(folder, tmp_path / "plain", expected)


def test_integers_of_compressed_tensors(tmp_path: Path) -> None:
    model = tiny()
    arguments: dict[str, Any] = {"num_bits": 4, "strategy": "group", "group_size": 32}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(type="int", symmetric=True, **arguments))
    compressor: Any = BaseCompressor.get_value_from_registry("pack-quantized")
    state: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if not is_quantised(name):
            state[name] = expected[name] = value
            continue
        scale = value.view(len(value), -1, 32).abs().amax(-1) / 7
        stored = compressor.compress({"weight": value, "weight_scale": scale}, scheme)
        expected[name] = compressor.decompress(dict(stored), scheme)["weight"].float()
        state |= {f"{name.removesuffix('weight')}{key}": part for key, part in stored.items()}
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **arguments}}
    config = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }  # fmt: skip
    folder = saved(model, state, config, tmp_path / "int4")
    assert all(torch.equal(tp.of(folder)[name], value) for name, value in expected.items())
    loads(folder, tmp_path / "plain", expected)


def test_awq_is_what_its_converter_makes_of_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.iinfo(torch.int32)
    weights = {
        "l.qweight": torch.randint(words.min, words.max, (128, 8), dtype=torch.int32, generator=generator),
        "l.qzeros": torch.randint(words.min, words.max, (4, 8), dtype=torch.int32, generator=generator),
        "l.scales": torch.rand((4, 64), generator=generator).half(),
    }
    made = AutoAWQConverter(group_size=32).process(dict(weights))
    assert tp.of(weights).info("l.weight").encoding == "awq-int4-g32"
    assert tp.of(made).info("l.weight").encoding == "int4-g32"
    assert torch.equal(tp.of(weights)["l.weight"], tp.of(made)["l.weight"])


@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (1, 130)])
def test_blocks_with_short_edges(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand([-(-size // 128) for size in shape], generator=generator)
    weights = {"l.weight": codes, "l.weight_scale_inv": scales}
    made = FP8BlockDequantizer(targets=["re:.*"], dtype=torch.float32).process(dict(weights))
    assert torch.equal(tp.of(weights)["l.weight"], made["l.weight"])


def test_nvfp4_of_modelopt_is_what_its_converter_makes_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "l.weight": torch.randint(0, 256, (64, 32), dtype=torch.uint8, generator=generator),
        "l.weight_scale": torch.rand((64, 4), generator=generator).to(torch.float8_e4m3fn),
        "l.weight_scale_2": torch.tensor(0.25),  # of which the converter's reciprocal is exact
        "l.input_scale": torch.tensor(0.5),
    }
    made = ModelOptNvfp4Converter(targets=["re:.*"]).process(dict(weights))
    assert tp.of(weights).info("l.weight").encoding == tp.of(made).info("l.weight").encoding == "nvfp4"
    assert torch.equal(tp.of(weights)["l.weight"], tp.of(made)["l.weight"])
