"""Flags: what is flagged, the wording, and that healthy models have none."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import torchparams as tp
from torchparams.measure.flags import role_of

if TYPE_CHECKING:
    from collections.abc import Iterable

Array = np.ndarray[Any, Any]


def flags(tensors: Any, **options: Any) -> list[tuple[str, str, str]]:
    return [(flag.name, flag.kind, flag.reason) for flag in tp.stats(tensors, **options).flags]


def normal(*shape: int, scale: float = 0.02, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def layers(
    scales: Iterable[float], name: str = "layers.{}.fc.weight", shape: tuple[int, ...] = (16, 16)
) -> dict[str, Array]:
    values = normal(*shape, scale=1)
    values /= values.std(ddof=1)
    return {name.format(i): values * np.float32(scale) for i, scale in enumerate(scales)}


# --- a tensor by itself ----------------------------------------------------------------------------


def test_values_that_are_not_finite() -> None:
    bad = normal(50, 60)
    bad[0, :3], bad[1, 0], bad[2, :2] = np.nan, np.inf, -np.inf
    assert flags({"w": bad}) == [("w", "non-finite", "3 NaN and 1 +Inf and 2 -Inf among 3,000 values")]
    assert flags({"b": np.array([np.nan], np.float16)}) == [("b", "non-finite", "1 NaN among 1 value")]
    assert flags({"z": np.array([1, complex(np.nan, 0)])}) == [("z", "non-finite", "1 NaN among 4 values")]


def test_all_zero_and_constant_matrices() -> None:
    assert flags({"w": np.zeros((3, 4), np.float32)}) == [("w", "zero", "all 12 values are 0")]
    assert flags({"w": np.full((3, 4), 0.5, np.float16)}) == [("w", "constant", "all 12 values are 0.5")]


@pytest.mark.parametrize(
    "array",
    [
        np.ones(64, np.float32), np.zeros(64, np.float32), np.zeros((1, 64, 1), np.float32), np.ones((), np.float32),
        np.zeros((1, 1), np.float32), np.zeros((0, 3), np.float32), np.ones((8, 8), bool), np.zeros((8, 8), np.int32),
    ],
)  # fmt: skip
def test_constant_vectors_and_integers_are_normal(array: Array) -> None:
    assert flags({"w": array}) == []


def test_masks_are_normal() -> None:
    mask = np.triu(np.full((8, 8), -np.inf, np.float32), 1)
    lowest = np.triu(np.full((8, 8), np.finfo(np.float16).min, np.float16), 1)
    brain = np.triu(np.full((8, 8), torch.finfo(torch.bfloat16).min, ml_dtypes.bfloat16), 1)
    assert flags({"a": mask, "b": lowest, "c": brain}) == []
    assert [kind for _, kind, _ in flags({"w": np.full((8, 8), -np.inf, np.float32)})] == ["non-finite"]


def test_saturated_floats() -> None:
    half = normal(100, 100).astype(np.float16)
    half[0, 0], half[0, 1] = 65504, -65504
    assert flags({"w": half}) == [
        ("w", "saturated", "2 of 10,000 values (2e-4) are ±65504, the largest value of float16")
    ]
    eighth = normal(100, 100, scale=200).astype(np.float32).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    ((name, kind, reason),) = flags({"w": eighth})
    assert (name, kind) == ("w", "saturated")
    assert reason.endswith("%) are ±448, the largest value of float8_e4m3fn")


def test_float8_scaled_to_its_range_is_normal() -> None:
    blocks = normal(200, 128)
    scaled = (blocks / abs(blocks).max(axis=1, keepdims=True) * 448).astype(ml_dtypes.float8_e4m3fn)
    assert flags({"w": scaled}) == []
    fours = (blocks.reshape(-1, 16) / abs(blocks.reshape(-1, 16)).max(axis=1, keepdims=True) * 6).astype(
        ml_dtypes.float4_e2m1fn
    )
    assert flags({"w": fours}) == []


# --- beside its siblings ----------------------------------------------------------------------------


def test_roles() -> None:
    assert role_of("h.0.attn.weight") == "h.*.attn.weight"
    assert role_of("layer1.0.conv2.weight") == "layer1.*.conv2.weight"


def test_a_scale_far_from_its_siblings() -> None:
    scales = [0.02] * 12
    scales[7] = 0.2
    ((name, kind, reason),) = flags(layers(scales))
    assert (name, kind) == ("layers.7.fc.weight", "scale")
    assert reason == "its std 0.2 is 10.0 times the 0.02 of its 8 nearest siblings layers.*.fc.weight"
    scales[7] = 0.001
    ((_, _, reason),) = flags(layers(scales))
    assert reason == "its std 0.001 is 1/20.0 of the 0.02 of its 8 nearest siblings layers.*.fc.weight"


def test_a_few_siblings_say_nothing() -> None:
    assert flags(layers([0.02, 0.02, 0.02, 5.0])) == []
    ((_, _, reason),) = flags(layers([0.02, 0.02, 0.02, 0.02, 5.0]))
    assert reason.endswith("of its 4 nearest siblings layers.*.fc.weight")


def test_siblings_have_one_shape() -> None:
    assert flags({**layers([0.02] * 4), "layers.9.fc.weight": normal(4, 4, scale=3)}) == []


@pytest.mark.parametrize(
    "scales",
    [
        [0.02 / math.sqrt(i + 1) for i in range(80)],  # 1/√depth, as in Mitchell's initialisation
        [0.02 * 1.2**i for i in range(40)],
        [0.02, 0.06] * 10,
        [0.02 * (1 + (i * 7) % 3) for i in range(30)],
        [0.06] + [0.02] * 30,
    ],
)
def test_trends_and_variety_are_normal(scales: list[float]) -> None:
    weights = layers(scales)
    assert flags(weights) == []
    assert flags({name: weights[name] for name in sorted(weights)}) == []  # 1, 10, 11, 2


def test_scales_of_vectors_are_not_compared() -> None:
    scales = [0.02] * 12
    scales[3] = 5.0
    assert flags(layers(scales, "layers.{}.norm.weight", (64,))) == []


def test_a_constant_vector_among_siblings_that_are_not() -> None:
    biases = layers([0.02] * 6, "layers.{}.fc.bias", (64,))
    biases["layers.2.fc.bias"][:] = 0
    assert flags(biases) == [
        ("layers.2.fc.bias", "zero", "all 64 values are 0; of 5 siblings layers.*.fc.bias none is constant")
    ]
    biases["layers.3.fc.bias"][:] = 1
    assert flags(biases) == []  # a third of them: it is a habit
    alone = {f"layers.{i}.s": np.full(1, i, np.float32) for i in range(8)}
    assert flags(alone) == []


def test_flags_are_of_tensors_also_where_rows_are_groups() -> None:
    bad = {**layers([0.02] * 3), "layers.1.bad.weight": np.full((2, 2), np.nan, np.float32)}
    found = tp.stats(bad, by="layer")
    assert [flag.name for flag in found.flags] == ["layers.1.bad.weight"]


def test_the_most_serious_flag_comes_first_and_tensors_keep_their_order() -> None:
    scales = [0.02] * 10
    scales[4] = 2.0
    weights = layers(scales)
    weights["layers.4.fc.weight"][0, 0] = np.nan
    weights["layers.2.fc.weight"][:] = 0
    assert [(name, kind) for name, kind, _ in flags(weights)] == [
        ("layers.2.fc.weight", "zero"), ("layers.4.fc.weight", "non-finite"), ("layers.4.fc.weight", "scale"),
    ]  # fmt: skip


def test_flags_stand_below_the_table() -> None:
    zeros = {f"w{i}": np.zeros((2, 2), np.float32) for i in range(4)}
    bad = {**zeros, "bad": np.full((1, 1), np.nan, np.float32)}
    lines = str(tp.stats(bad, limit=3)).splitlines()
    assert lines[-5:] == [
        "flags: 4 zero, 1 non-finite",
        "  w0: all 4 values are 0",
        "  w1: all 4 values are 0",
        "  w2: all 4 values are 0",
        "  … 2 more …",
    ]


# --- sound models -----------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 4)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


def gpt2_like(depth: int) -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(100, 32), "h": nn.ModuleList(Block(32) for _ in range(depth))})
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * depth) if name.endswith("down.weight") else 1))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


def plain_mlp() -> nn.Module:
    sizes = [784, 512, 256, 128, 64, 32, 10]
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def convolutions() -> nn.Module:
    widths = [3, 8, 8, 16, 16, 32, 32, 64]
    parts = [nn.Sequential(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b)) for a, b in pairwise(widths)]
    model = nn.Sequential(*parts)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: gpt2_like(12),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 6, enable_nested_tensor=False),
        lambda: nn.LSTM(16, 24, num_layers=6, bidirectional=True),
        plain_mlp,
        convolutions,
        lambda: nn.Sequential(*(nn.Bilinear(8, 8, 8) for _ in range(6))),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_models_have_no_flags(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert flags(make().to(dtype), buffers=True) == []


def test_a_trained_model_has_no_flags() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU()) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.randn(64, 16)
    for _ in range(30):
        optimizer.zero_grad()
        ((model(data) - data.roll(1, 1)) ** 2).mean().backward()
        optimizer.step()
    assert flags(model) == []
    assert flags({name: parameter.grad for name, parameter in model.named_parameters()}) == []
    assert flags(optimizer.state_dict()) == []
