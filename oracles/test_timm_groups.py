"""Depths and weight decay of groups compared with timm, on its architectures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters

import torchparams as tp

if TYPE_CHECKING:
    from torch import nn

SAME = [
    "convnext_atto",
    "davit_small",
    "edgenext_small",
    "efficientnet_b0",
    "efficientvit_b0",
    "focalnet_small_lrf",
    "hiera_small_224",
    "levit_128",
    "lowformer_b0",
    "mambaout_femto",
    "mobilenet_edgetpu_v2_s",
    "nextvit_small",
    "repvit_m0_9",
    "resnet18",
    "resnetv2_18",
    "resnetv2_50x1_bit",
    "shvit_s1",
    "starnet_s1",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
    "xception41",
]
"""Architectures with a depth for each block in timm too."""

FINER = [
    "coatnet_nano_cc_224",
    "efficientformer_l1",
    "gcvit_xxtiny",
    "iformer_t",
    "maxvit_tiny_rw_224",
    "mobilevit_xs",
    "mvitv2_small",
    "pvt_v2_b0",
    "twins_pcpvt_small",
]
"""Architectures of which timm takes some stages for a layer, or orders layers between stages otherwise."""


def made(name: str) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    return model


def depths(model: nn.Module) -> dict[str, int]:
    groups = tp.groups(model, lr=1.0, layer_decay=0.5)
    return {name: origin.depth or 0 for name, origin in groups.origins.items()}


def layers(model: Any) -> dict[str, int]:
    return dict(group_parameters(model, model.group_matcher(coarse=False), reverse=True))


@pytest.mark.parametrize("name", SAME)
def test_the_depths_are_timms(name: str) -> None:
    model = made(name)
    ours, theirs = depths(model), layers(model)
    last = max(ours.values())
    assert last == max(theirs.values())
    # timm counts the final norm with the last block; ours, as BEiT's own rule does, with the head.
    final = {parameter for parameter in ours if ours[parameter] == last and theirs[parameter] == last - 1}
    assert {p: d for p, d in ours.items() if p not in final} == {p: d for p, d in theirs.items() if p not in final}
    assert all(parameter.startswith(("norm.", "conv_head.", "bn2.")) for parameter in final)


@pytest.mark.parametrize("name", FINER)
def test_there_are_no_fewer_depths_than_timms(name: str) -> None:
    model = made(name)
    ours, theirs = depths(model), layers(model)
    assert len(set(ours.values())) >= len(set(theirs.values()))


@pytest.mark.parametrize("name", ["levit_128", "levit_conv_128", "tiny_vit_5m_224", "efficientformerv2_s0"])
def test_tables_of_attention_biases_are_not_decayed(name: str) -> None:
    model: Any = made(name)
    groups = tp.groups(model, tp.rule(tp.no_decay, weight_decay=0.0), weight_decay=0.05)
    spared = {name for group in groups if not group["weight_decay"] for name in group["param_names"]}
    listed = {name for name, _ in model.named_parameters() if name in model.no_weight_decay()}
    assert listed
    assert listed <= spared
