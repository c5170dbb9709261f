"""Weights packed by compressed-tensors have the same values as in that library."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

import torchparams as tp

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the library

WEIGHT = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))


def grouped(most: float, group: int) -> torch.Tensor:
    return WEIGHT.view(64, -1, group).abs().amax(-1) / most


INTEGERS: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
    "int4-g32": ({"num_bits": 4, "strategy": "group", "group_size": 32}, grouped(7, 32)),
    "int8-channel": ({"num_bits": 8, "strategy": "channel"}, grouped(127, 128)),
    "int4-channel": ({"num_bits": 4, "strategy": "channel"}, grouped(7, 128)),
    "int3-g32": ({"num_bits": 3, "strategy": "group", "group_size": 32}, grouped(3, 32)),
    "int5-g64": ({"num_bits": 5, "strategy": "group", "group_size": 64}, grouped(15, 64)),
    "int6-channel": ({"num_bits": 6, "strategy": "channel"}, grouped(31, 128)),
    "int7-g64": ({"num_bits": 7, "strategy": "group", "group_size": 64}, grouped(63, 64)),
    "int2-g16": ({"num_bits": 2, "strategy": "group", "group_size": 16}, grouped(1, 16)),
}


@pytest.mark.parametrize("encoding", INTEGERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_of_compressed_tensors(encoding: str, symmetric: bool) -> None:
    arguments, scale = INTEGERS[encoding]
    half = 1 << (arguments["num_bits"] - 1)
    zeros = torch.zeros(scale.shape, dtype=torch.int8)
    if not symmetric:
        zeros = torch.randint(-half, half, scale.shape, dtype=torch.int8)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(type="int", symmetric=symmetric, **arguments)
    )
    compressor: Any = BaseCompressor.get_value_from_registry("pack-quantized")
    state = {"weight": WEIGHT, "weight_scale": scale, "weight_zero_point": zeros}
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    params = tp.of({f"l.{name}": value for name, value in stored.items()})
    assert params.info("l.weight").encoding == encoding
    assert set(params.info("l.weight").raw_names) == {f"l.{name}" for name in stored}
    assert torch.equal(params["l.weight"], expected.float())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_integers_of_experts(bits: int, symmetric: bool) -> None:
    experts = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0))
    half = 1 << (bits - 1)
    scale = experts.view(3, 40, -1, 32).abs().amax(-1) / (half - 1)
    zeros = torch.zeros(scale.shape, dtype=torch.int8)
    if not symmetric:
        zeros = torch.randint(-half, half, scale.shape, dtype=torch.int8)
    arguments: dict[str, Any] = {"num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": symmetric}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(type="int", **arguments))
    compressor: Any = BaseCompressor.get_value_from_registry("pack-quantized")
    one = [{"weight": experts[i], "weight_scale": scale[i], "weight_zero_point": zeros[i]} for i in range(3)]
    # Quantised one by one, and packed together, as the library packs a stack of matrices.
    each = [compressor.compress(state, scheme) for state in one]
    expected = torch.stack([compressor.decompress(dict(state), scheme)["weight"] for state in each])
    stored = {name: torch.stack([state[name] for state in each]) for name in each[0] if name != "weight_shape"}
    together = pack_to_int32(torch.stack([unpack_from_int32(s["weight_packed"], bits, (40, 64)) for s in each]), bits)
    assert torch.equal(stored["weight_packed"], together)
    stored["weight_shape"] = torch.tensor(experts.shape)
    params = tp.of({f"l.{name}": value for name, value in stored.items()})
    assert (params.info("l.weight").encoding, params.info("l.weight").shape) == (f"int{bits}-g32", (3, 40, 64))
    assert torch.equal(params["l.weight"], expected.float())


def test_nvfp4_of_compressed_tensors() -> None:
    whole = torch.tensor([448 * 6 / float(WEIGHT.abs().max())])
    arguments: dict[str, Any] = {
        "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
        "scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn,
    }  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    compressor: Any = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    scale = (grouped(6, 16) * whole).to(torch.float8_e4m3fn).float()
    stored = compressor.compress({"weight": WEIGHT, "weight_scale": scale, "weight_global_scale": whole}, scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"].float()
    params = tp.of({f"l.{name}": value for name, value in stored.items()})
    assert params.info("l.weight").encoding == "nvfp4"
    # The library rounds scales and products to bfloat16; values here are float32.
    assert torch.allclose(params["l.weight"], expected, rtol=2.0**-7, atol=0)


MX = {
    "mxfp4": ("mxfp4-pack-quantized", 4, 6.0),
    "mxfp6": ("mxfp6-pack-quantized", 6, 7.5),
    "mxfp8": ("mxfp8-quantized", 8, 448.0),
}


@pytest.mark.parametrize("encoding", MX)
def test_floats_with_powers_of_two(encoding: str) -> None:
    name, bits, most = MX[encoding]
    arguments: dict[str, Any] = {
        "num_bits": bits, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
        "scale_dtype": torch.uint8,
    }  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    compressor: Any = BaseCompressor.get_value_from_registry(name)
    scale = torch.exp2(torch.ceil(torch.log2(grouped(most, 32)))).bfloat16()
    stored = compressor.compress({"weight": WEIGHT, "weight_scale": scale}, scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"].float()
    params = tp.of({f"l.{key}": value for key, value in stored.items()})
    assert params.info("l.weight").encoding == encoding
    assert torch.equal(params["l.weight"], expected)  # these products are exact in bfloat16


EIGHT_BITS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "tensor": ({"strategy": "tensor"}, (64, 128)),
    "channel": ({"strategy": "channel"}, (1, 128)),
    "group32": ({"strategy": "group", "group_size": 32}, (1, 32)),
    "block16x32": ({"strategy": "block", "block_structure": [16, 32]}, (16, 32)),
    "block64x2": ({"strategy": "block", "block_structure": [64, 2]}, (64, 2)),  # which the tensors do not tell
}


@pytest.mark.parametrize("called", EIGHT_BITS)
@pytest.mark.parametrize("kind", ["float", "int", "int with zero points"])
def test_eight_bits_that_are_not_packed(kind: str, called: str, tmp_path: Path) -> None:
    arguments, (high, wide) = EIGHT_BITS[called]
    symmetric = kind != "int with zero points"
    if not symmetric and called.startswith("block"):
        return  # the library knows no zero points of blocks
    kind = kind.split()[0]
    name, most, family = ("float-quantized", 448.0, "fp8") if kind == "float" else ("int-quantized", 127.0, "int8")
    scale = WEIGHT.view(64 // high, high, 128 // wide, wide).abs().amax((1, 3)) / most
    if called == "tensor":
        scale = scale.reshape(1)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=8, type=kind, symmetric=symmetric, **arguments)
    )
    compressor: Any = BaseCompressor.get_value_from_registry(name)
    given = {"weight": WEIGHT, "weight_scale": scale}
    if not symmetric:
        given["weight_zero_point"] = torch.randint(-20, 20, scale.shape, dtype=torch.int8)
    stored = compressor.compress(given, scheme)
    assert ("weight_zero_point" in stored) != symmetric
    expected = compressor.decompress(dict(stored), scheme)["weight"].float()
    save_file({f"l.{key}": value.contiguous() for key, value in stored.items()}, tmp_path / "model.safetensors")
    config = {
        "quant_method": "compressed-tensors",
        "format": name,
        "weight_block_size": arguments.get("block_structure"),
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    params = tp.of(tmp_path)
    assert params.info("l.weight").encoding == f"{family}-{called}"
    assert len(params.info("l.weight").raw_names) == len(stored)
    assert torch.equal(params["l.weight"], expected)
