"""Claim: groups equal those of timm and transformers where these are correct; every other difference is documented.

    TIMM_PYTHON=/path/to/an/environment/bin/python python bench/compare_groups.py

Needs timm and transformers, which are installed in an environment of their own; `TIMM_PYTHON` names its interpreter.
For each architecture the two ways are compared by name: which parameters weight decay spares, and by which factor a
layer decay multiplies the learning rate. Differences are printed by their reason; `docs/optimizer_groups.md` lists the
reasons. Models are made on the meta device, without weights.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

TIMM = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "convnext_atto",
    "convnextv2_atto",
    "resnet18",
    "resnet50",
    "regnety_002",
    "efficientnet_b0",
    "efficientnetv2_rw_t",
    "mobilenetv3_small_100",
    "mixer_s16_224",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "coatnet_0_rw_224",
    "maxvit_tiny_rw_224",
    "pvt_v2_b0",
    "poolformer_s12",
    "densenet121",
    "vgg11_bn",
)
DECAY = 0.75


def main() -> None:
    """Compare, in the environment that has the packages."""
    python = os.environ.get("TIMM_PYTHON")
    if python is None:
        raise SystemExit("set TIMM_PYTHON to the interpreter of an environment with timm, transformers and torchparams")
    raise SystemExit(subprocess.run([python, __file__, "here"], check=False).returncode)


def here() -> None:
    """Compare, in this process."""
    import timm
    import torch
    import transformers

    print(f"timm {timm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}\n")
    print("timm: weight decay, then layer decay\n")
    for name in TIMM:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        print(f"{name}\n  decay  {_differences(timm_decay(model))}\n  layers {timm_layers(model)}")
    print("\ntransformers: weight decay\n")
    for name, model in hugging_face():
        print(f"{name}\n  decay  {_differences(transformers_decay(model))}")


def ours(model: nn.Module) -> set[str]:
    """Names of what `no_decay` spares."""
    import torchparams as tp

    groups = tp.groups(model, tp.rule(tp.no_decay, weight_decay=0.0), weight_decay=0.05)
    return {name for group in groups if group["weight_decay"] == 0 for name in group["param_names"]}


def timm_decay(model: nn.Module) -> tuple[set[str], set[str], nn.Module]:
    """What ours and timm spare."""
    from timm.optim import param_groups_weight_decay

    listed: Any = getattr(model, "no_weight_decay", tuple)
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=listed())
    spared = {id(tensor) for group in groups if group["weight_decay"] == 0 for tensor in group["params"]}
    return ours(model), {name for name, tensor in model.named_parameters() if id(tensor) in spared}, model


def transformers_decay(model: nn.Module) -> tuple[set[str], set[str], nn.Module]:
    """What ours and transformers spare."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))
    return ours(model), {name for name, _ in model.named_parameters()} - decayed, model


def _differences(found: tuple[set[str], set[str], nn.Module]) -> str:
    mine, theirs, model = found
    if mine == theirs:
        return f"equal ({len(mine)} of {len(list(model.parameters()))} spared)"
    return f"spared by us alone: {_kinds(mine - theirs, model)}; by them alone: {_kinds(theirs - mine, model)}"


def _kinds(names: set[str], model: nn.Module) -> str:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    kinds = Counter(f"{re.sub(r'[0-9]+', '#', name)} {len(shapes[name])}-d" for name in sorted(names))
    return ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common()) or "none"


def timm_layers(model: nn.Module) -> str:
    """How the factors of ours and timm compare."""
    from timm.optim import param_groups_layer_decay

    import torchparams as tp
    from torchparams.errors import TorchParamsError

    theirs = {}
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    for group in param_groups_layer_decay(model, 0.05, layer_decay=DECAY):
        theirs.update({names[id(tensor)]: group["lr_scale"] for tensor in group["params"]})
    try:
        groups = tp.groups(model, lr=1.0, layer_decay=DECAY)
    except TorchParamsError as error:
        return f"{type(error).__name__}: {error}"
    mine = {name: group["lr"] for group in groups for name in group["param_names"]}
    deeper: Counter[str] = Counter()
    for name in mine:
        steps = round(_steps(theirs[name]) - _steps(mine[name]))
        if steps:
            deeper[f"{re.sub(r'[0-9]+', '#', name)} {steps:+d}"] += 1
    levels = f"{len(set(mine.values()))} depths, theirs {len(set(theirs.values()))}"
    if not deeper:
        return f"equal ({levels})"
    shown = ", ".join(f"{count} × {kind}" for kind, count in deeper.most_common(8))
    return f"{levels}; {sum(deeper.values())} of {len(mine)} differ, by depths: {shown}"


def _steps(scale: float) -> float:
    import math

    return math.log(scale) / math.log(DECAY)


def hugging_face() -> Iterator[tuple[str, nn.Module]]:
    """Small models of transformers, on the meta device."""
    import torch
    import transformers as hf

    tiny: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    makers: dict[str, Callable[[], Any]] = {
        "BERT": lambda: hf.BertForMaskedLM(hf.BertConfig(**tiny, intermediate_size=64)),
        "ALBERT": lambda: hf.AlbertModel(hf.AlbertConfig(**tiny, embedding_size=16, intermediate_size=64)),
        "GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=2)),
        "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**tiny, intermediate_size=64)),
        "Qwen3-MoE": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**tiny, num_experts=4, intermediate_size=64)),
        "GPT-OSS": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**tiny, num_local_experts=4, intermediate_size=64)),
        "Mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(hidden_size=32, num_hidden_layers=2)),
        "T5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(d_model=32, num_layers=2, num_heads=2, d_ff=64)),
        "BART": lambda: hf.BartModel(hf.BartConfig(d_model=32, encoder_layers=2, decoder_layers=2)),
        "ViT": lambda: hf.ViTForImageClassification(hf.ViTConfig(**tiny, intermediate_size=64)),
        "BEiT": lambda: hf.BeitModel(hf.BeitConfig(**tiny, intermediate_size=64, use_relative_position_bias=True)),
        "DINOv2": lambda: hf.Dinov2Model(hf.Dinov2Config(**tiny)),
        "Swin": lambda: hf.SwinModel(hf.SwinConfig(embed_dim=24, depths=[1, 1], num_heads=[2, 2])),
        "ConvNeXt": lambda: hf.ConvNextModel(hf.ConvNextConfig()),
        "ResNet": lambda: hf.ResNetModel(hf.ResNetConfig()),
        "CLIP": lambda: hf.CLIPModel(hf.CLIPConfig()),
        "Whisper": lambda: hf.WhisperModel(hf.WhisperConfig(d_model=48, encoder_layers=2, decoder_layers=2)),
        "Wav2Vec2": lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**tiny, intermediate_size=64)),
    }
    for name, make in makers.items():
        try:
            with torch.device("meta"):
                model = make()
        except Exception as error:  # a version of transformers without it, or with other options
            print(f"{name}: not made ({type(error).__name__}: {error})", file=sys.stderr)
            continue
        yield name, model


if __name__ == "__main__":
    here() if sys.argv[1:] == ["here"] else main()
