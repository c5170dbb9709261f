"""Groups compared with the rules of timm and transformers, reimplemented here from their documentation.

`bench/compare_groups.py` compares with the packages themselves.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import torch
from torch import nn

import torchparams as tp

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchparams.train.rules import Rule

# --- their rules ------------------------------------------------------------------------------


def timm_spares(model: nn.Module, listed: Iterable[str] = ()) -> set[str]:
    """`param_groups_weight_decay`: fewer than two dimensions, a name that ends in .bias, or a listed one."""
    named = set(listed)
    return {n for n, p in model.named_parameters() if p.ndim <= 1 or n.endswith(".bias") or n in named}


def transformers_spares(model: nn.Module) -> set[str]:
    """`Trainer.get_decay_parameter_names`: what is in an nn.LayerNorm, or has one of these words in its name."""
    words = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    norms = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, nn.LayerNorm))
    return {
        n
        for n, _ in model.named_parameters()
        if n.startswith(norms) or any(re.search(word, n.lower()) for word in words)
    }


def timm_layers(model: nn.Module, stem: str, block: str, last: str = "$^") -> dict[str, int]:
    """`param_groups_layer_decay`: ids by regular expressions, counted through; what matches `last` joins the id before.

    A tuple of numbers is an id of its own, and what is in no block is behind all of them.
    """
    ids: dict[str, tuple[float, ...]] = {}
    for name, _ in model.named_parameters():
        if re.match(stem, name):
            ids[name] = (0.0,)
        elif found := re.match(block, name):
            ids[name] = (1.0, *map(float, found.groups(default="0")))
        elif re.match(last, name):
            ids[name] = (1.0, math.inf)
        else:
            ids[name] = (math.inf,)
    ranks: dict[tuple[float, ...], int] = {}
    for key in sorted(set(ids.values())):
        ranks[key] = len(set(ranks.values())) - (key == (1.0, math.inf))
    return {name: ranks[key] for name, key in ids.items()}


# --- ours -------------------------------------------------------------------------------------


def spares(model: nn.Module, *more: Rule) -> set[str]:
    groups = tp.groups(model, tp.rule(tp.no_decay, weight_decay=0.0), *more, weight_decay=0.05)
    return {name for group in groups if group["weight_decay"] == 0 for name in group["param_names"]}


def layers(model: nn.Module, depth: object = None) -> dict[str, int]:
    groups = tp.groups(model, lr=1.0, layer_decay=0.5, depth=depth)
    found = {name: round(-math.log2(group["lr"])) for group in groups for name in group["param_names"]}
    return {name: max(found.values()) - steps for name, steps in found.items()}


# --- models -----------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, table: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.proj = nn.Linear(4, 4)
        if table:
            self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))


class Block(nn.Module):
    def __init__(self, table: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(4)
        self.attn = Attention(table)
        self.norm2 = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class VisionTransformer(nn.Module):
    """As timm's: tokens and positions at the top, blocks in a sequence."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.patch_embed = nn.Sequential(nn.Conv2d(3, 4, 2))
        self.blocks = nn.Sequential(*[Block() for _ in range(depth)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


class Stage(nn.Module):
    def __init__(self, depth: int, downsample: bool) -> None:
        super().__init__()
        if downsample:
            self.downsample = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
        self.blocks = nn.Sequential(*[Block(table=True) for _ in range(depth)])


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Conv2d(3, 4, 2))
        self.layers = nn.Sequential(Stage(2, False), Stage(3, True))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Bottleneck(), Bottleneck())
        self.layer2 = nn.Sequential(Bottleneck(), Bottleneck(), Bottleneck())
        self.fc = nn.Linear(4, 2)


class MambaRMSNorm(nn.Module):
    """A norm that is no nn.LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Language(nn.Module):
    """As a decoder of transformers, with what its names say wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(6, 4)
        self.relative_attention_bias = nn.Embedding(5, 2)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.input_layernorm = MambaRMSNorm()
        self.norm_f = MambaRMSNorm()
        self.adapter = nn.ModuleDict({"norm": nn.Linear(4, 4)})
        self.layer_scale = nn.Parameter(torch.ones(4))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.lm_head = nn.Linear(4, 6, bias=False)


# --- weight decay -----------------------------------------------------------------------------


def test_weight_decay_is_timms_for_usual_networks() -> None:
    for model in (VisionTransformer(), ResNet(), Swin()):
        assert spares(model) == timm_spares(model)


def test_what_timms_models_list_is_a_rule() -> None:
    model, listed = VisionTransformer(), ("cls_token", "pos_embed")
    assert timm_spares(model, listed) - spares(model) == set(listed)
    assert spares(model, tp.rule(listed, weight_decay=0.0)) == timm_spares(model, listed)
    assert spares(Swin(), tp.rule("**.relative_position_bias_table", weight_decay=0.0)) == timm_spares(
        Swin(), [name for name, _ in Swin().named_parameters() if name.endswith("bias_table")]
    )


def test_norms_and_biases_of_several_dimensions_are_ours_alone() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm((2, 2)), "attn": nn.MultiheadAttention(4, 2, add_bias_kv=True)})
    assert spares(model) - timm_spares(model) == {"norm.weight", "attn.bias_k", "attn.bias_v"}
    assert timm_spares(model) <= spares(model)


def test_weight_decay_is_transformers_for_usual_networks() -> None:
    for model in (VisionTransformer(), nn.Transformer(4, 2, 1, 1, 8, batch_first=True)):
        assert spares(model) == transformers_spares(model)


def test_each_difference_from_transformers_has_its_reason() -> None:
    model = Language()
    assert spares(model) - transformers_spares(model) == {"norm_f.weight", "layer_scale", "logit_scale"}
    assert transformers_spares(model) - spares(model) == {"relative_attention_bias.weight", "adapter.norm.weight"}
    batch_norms = {name for name, _ in ResNet().named_parameters() if "bn" in name or "downsample.1" in name}
    assert spares(ResNet()) - transformers_spares(ResNet()) == {n for n in batch_norms if n.endswith("weight")}


# --- layer decay ------------------------------------------------------------------------------


def test_layers_of_a_vision_transformer_are_timms_but_for_the_last_norm() -> None:
    model = VisionTransformer()
    theirs = timm_layers(model, r"cls_token|pos_embed|patch_embed", r"blocks\.(\d+)", r"norm")
    ours = layers(model)
    assert {name for name in ours if ours[name] != theirs[name]} == {"norm.weight", "norm.bias"}
    assert {ours["norm.weight"] - theirs["norm.weight"], ours["norm.bias"] - theirs["norm.bias"]} == {1}
    beit = timm_layers(model, r"cls_token|pos_embed|patch_embed", r"blocks\.(\d+)")
    assert ours == beit == layers(model, "blocks.{}.**")


def test_layers_of_stages_are_timms() -> None:
    # (r'^layers\.(\d+)\.downsample', (0,)): what leads over to a stage is in its first block.
    theirs = timm_layers(Swin(), r"patch_embed", r"layers\.(\d+)\.(?:downsample|blocks\.(\d+))")
    assert layers(Swin()) == theirs


def test_layers_of_a_resnet_are_timms() -> None:
    assert layers(ResNet()) == timm_layers(ResNet(), r"conv1|bn1", r"layer(\d+)\.(\d+)")
    assert layers(ResNet(), "layer{}.{}.**") == layers(ResNet())


def test_the_rate_is_written_where_an_optimizer_reads_it() -> None:
    model = VisionTransformer()
    optimizer = torch.optim.SGD(tp.groups(model, lr=1.0, layer_decay=0.5))
    before = model.cls_token.detach().clone(), model.head.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(before[0] - model.cls_token, torch.full_like(model.cls_token, 0.5**5))
    assert torch.allclose(before[1] - model.head.weight, torch.ones_like(model.head.weight))
