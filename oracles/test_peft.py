"""Each PEFT variant of a small model is folded exactly as PEFT merges it, or raises with a reason."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import torchparams as tp
from torchparams.errors import NotReadable, PlanError, TorchParamsError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PREFIX = "base_model.model."
pytestmark = pytest.mark.filterwarnings("ignore")


class Named(nn.Module):
    """A module with one that is called as adapters are, unless they are given a name."""

    def __init__(self) -> None:
        super().__init__()
        self.default, self.other = nn.Linear(6, 5), nn.Linear(6, 5)


class Small(nn.Module):
    """One layer of each kind that PEFT knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.wide = nn.Linear(6, 10)
        self.square = nn.Linear(6, 6)
        self.turned = Conv1D(9, 6)
        self.turned_square = Conv1D(6, 6)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 6, (3, 2))
        self.conv3 = nn.Conv3d(2, 3, 2)
        self.pointwise = nn.Conv2d(4, 6, 1)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 6), "v": nn.Linear(6, 4)}) for _ in range(12))
        self.named = Named()
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)


def gpt2(*, tied: bool = True) -> Any:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=8, n_positions=16, n_inner=8, tie_word_embeddings=tied
    )
    return transformers.GPT2LMHeadModel(config)


def llama(*, tied: bool = False) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=16,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


@dataclass
class Variant:
    """A variant of an adapter, as PEFT makes it."""

    name: str
    config: dict[str, Any]
    model: Callable[[], nn.Module] = Small
    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Any], object] | None = None


FOLDED = [
    Variant("linear", {"target_modules": ["wide", "square", "q", "v"]}),
    Variant("one rank, another alpha", {"target_modules": ["wide"], "r": 1, "lora_alpha": 7}),
    Variant("negative alpha", {"target_modules": ["wide"], "lora_alpha": -3}),
    Variant("alpha zero", {"target_modules": ["wide"], "lora_alpha": 0}),
    Variant("rslora", {"target_modules": ["wide", "q"], "use_rslora": True, "r": 3}),
    Variant("embedding", {"target_modules": ["embed"]}),
    Variant("conv1d", {"target_modules": ["conv1"]}),
    Variant("conv2d", {"target_modules": ["conv2", "pointwise"]}),
    Variant("conv3d", {"target_modules": ["conv3"]}),
    Variant("Conv1D of transformers", {"target_modules": ["turned", "turned_square"]}),
    Variant("Conv1D last", {"target_modules": ["wide", "turned", "turned_square"]}),
    Variant("Conv1D first", {"target_modules": ["turned", "turned_square", "q", "head"]}),
    Variant(
        "patterns",
        {
            "target_modules": ["q", "v"],
            "rank_pattern": {r"layers\.[0-3]\.q": 2, "layers.1.v": 3, "q": 5, "^layers.11.v": 1},
            "alpha_pattern": {r"(layers\.)+\d+\.q": 9, "1.v": 4},
        },
    ),
    Variant("regex targets", {"target_modules": r".*layers\.(3|7)\.[qv]"}),
    Variant("all-linear", {"target_modules": "all-linear"}, model=llama),
    Variant("some layers", {"target_modules": ["q"], "layers_to_transform": [1, 2], "layers_pattern": "layers"}),
    Variant("excluded", {"target_modules": ["q", "v"], "exclude_modules": ["layers.3.q"]}),
    Variant("bias all", {"target_modules": ["wide", "conv1"], "bias": "all"}),
    Variant("bias lora_only", {"target_modules": ["wide", "v"], "bias": "lora_only"}),
    Variant("lora_bias", {"target_modules": ["wide", "conv2"], "lora_bias": True}),
    Variant("lora_bias, bias all", {"target_modules": ["wide", "q"], "lora_bias": True, "bias": "all"}),
    Variant("modules_to_save", {"target_modules": ["q"], "modules_to_save": ["head", "norm", "embed"]}),
    Variant("modules_to_save, bias all", {"target_modules": ["q"], "modules_to_save": ["head"], "bias": "all"}),
    Variant("a module called default", {"target_modules": ["default", "other"], "bias": "all"}),
    Variant("a saved module with one called default", {"target_modules": ["q"], "modules_to_save": ["named"]}),
    Variant("gaussian", {"target_modules": ["wide"], "init_lora_weights": "gaussian"}),
    Variant("orthogonal", {"target_modules": ["q"], "init_lora_weights": "orthogonal", "r": 2}),
    Variant("mica", {"target_modules": ["wide"], "init_lora_weights": "mica", "r": 2}),
    Variant("eva", {"target_modules": ["wide"], "init_lora_weights": "eva"}),
    Variant("unused sub-configurations", {"target_modules": ["wide"], "eva_config": {}, "lora_ga_config": {}}),
    Variant("untied GPT-2, square", {"target_modules": ["attn.c_proj", "lm_head"]}, model=lambda: gpt2(tied=False)),
    Variant("GPT-2, c_attn and lm_head", {"target_modules": ["c_attn", "lm_head"]}, model=lambda: gpt2(tied=False)),
    Variant("tied GPT-2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}, model=gpt2),
    Variant("tied GPT-2, its embedding", {"target_modules": ["wte", "c_attn"]}, model=gpt2),
    Variant("llama, embedding and head", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, model=llama),
    Variant("llama, head saved", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, model=llama),
    Variant(
        "resized",
        {"target_modules": ["q_proj"]},
        model=llama,
        change=lambda model: model.resize_token_embeddings(21),
        options={"save_embedding_layers": True},
    ),
    Variant(
        "resized and tied",
        {"target_modules": ["q_proj"]},
        model=lambda: llama(tied=True),
        change=lambda model: model.resize_token_embeddings(21),
        options={"save_embedding_layers": True},
    ),
]

REFUSED = [
    (Variant("dora", {"target_modules": ["wide"], "use_dora": True}), "DoRA"),
    (Variant("dora of a convolution", {"target_modules": ["conv2"], "use_dora": True}), "DoRA"),
    (Variant("attention", {"target_modules": ["attention"]}), "'attention' is a MultiheadAttention"),
    (Variant("groups", {"target_modules": ["grouped"], "r": 4}), "'grouped' is a convolution with 2 groups"),
    (Variant("parameters", {"target_parameters": ["wide.weight"], "target_modules": []}), "target_parameters"),
    (Variant("tokens", {"target_modules": ["q"], "trainable_token_indices": {"embed": [1, 2]}}), "single rows"),
    (
        Variant("copies", {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}, model=llama),
        "repeats layers of the base",
    ),
    (Variant("pissa", {"target_modules": ["wide"], "init_lora_weights": "pissa"}), "init_lora_weights='pissa'"),
    (Variant("olora", {"target_modules": ["wide"], "init_lora_weights": "olora"}), "init_lora_weights='olora'"),
    (
        Variant("alora", {"target_modules": ["wide"], "alora_invocation_tokens": [1]}),
        "some tokens only",
    ),
    (Variant("kasa", {"target_modules": ["wide"], "kasa_config": peft.KasaConfig()}), "KaSA"),
    (Variant("velora", {"target_modules": ["wide"], "velora_config": {}}), "velora_config="),
    (
        Variant(
            "resized and changed",
            {"target_modules": ["embed_tokens", "q_proj"]},
            model=llama,
            change=lambda model: model.resize_token_embeddings(21),
            options={"save_embedding_layers": True},
        ),
        "resizes 'model.embed_tokens.weight' to 21 rows, but 'lm_head.weight' keeps 16",
    ),
    (
        Variant("tied, its head", {"target_modules": ["lm_head"]}, model=gpt2),
        "'lm_head.weight', but the base has no such tensor. 'transformer.wte.weight' has the same shape: if",
    ),
    (
        Variant("tied, its embedding saved", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
                model=lambda: llama(tied=True)),
        "The adapter replaces only 'model.embed_tokens.weight'",
    ),
]  # fmt: skip

OTHERS = {
    "ADALORA": peft.AdaLoraConfig(target_modules=["wide"], total_step=10),
    "BOFT": peft.BOFTConfig(target_modules=["wide"], boft_block_size=2),
    "FOURIERFT": peft.FourierFTConfig(target_modules=["wide"], n_frequency=5),
    "HRA": peft.HRAConfig(target_modules=["wide"], r=2),
    "IA3": peft.IA3Config(target_modules=["wide"], feedforward_modules=[]),
    "LN_TUNING": peft.LNTuningConfig(target_modules=["norm"]),
    "LOHA": peft.LoHaConfig(target_modules=["wide"]),
    "LOKR": peft.LoKrConfig(target_modules=["wide"]),
    "OFT": peft.OFTConfig(target_modules=["wide"], r=0, oft_block_size=2),
    "RANDLORA": peft.RandLoraConfig(target_modules=["wide"]),
    "SHIRA": peft.ShiraConfig(target_modules=["wide"], r=2),
    "TRAINABLE_TOKENS": peft.TrainableTokensConfig(target_modules=["embed"], token_indices=[1]),
    "VBLORA": peft.VBLoRAConfig(target_modules=["square"], num_vectors=4, vector_length=2, topk=2),
    "VERA": peft.VeraConfig(target_modules=["wide"]),
}


def made(variant: Variant, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model that is tuned; its base and the adapter are saved, the latter with random values."""
    torch.manual_seed(0)
    model = variant.model()
    save(model, folder / "base")
    if variant.change is not None:
        variant.change(model)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": True, **variant.config})
    tuned = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, x in tuned.named_parameters():
            if x.requires_grad or "lora_" in name:
                x += 0.3 * torch.randn_like(x)
    tuned.save_pretrained(str(folder / "adapter"), **variant.options)
    return tuned, before


def save(model: nn.Module, folder: Path) -> None:
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        torch.save(model.state_dict(), folder / "model.pt")


def base_of(folder: Path) -> str:
    return str(folder / "base" / "model.pt" if (folder / "base" / "model.pt").exists() else folder / "base")


SQUARE = "{turned_square,turned}.weight"


def folded(base: object, folder: Path, name: str = "adapter", **options: Any) -> dict[str, torch.Tensor]:
    path = folder / "folded.safetensors"
    tp.fold_lora(base, folder / name, path, overwrite=True, **options).run()
    table = tp.of(str(path))
    return {name: torch.from_numpy(table.numpy(name).copy()) for name in table.names}


def check(ours: dict[str, torch.Tensor], merged: nn.Module, before: dict[str, torch.Tensor]) -> None:
    expected = merged.state_dict()
    missing = expected.keys() - ours.keys()
    for name in missing:  # of tied weights a base that transformers saved has one name
        assert name == "lm_head.weight"
        assert any(
            x.shape == expected[name].shape and torch.allclose(x, expected[name], atol=1e-5) for x in ours.values()
        )
    assert ours.keys() <= expected.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert any(not torch.equal(before[name], x) for name, x in ours.items())


@pytest.mark.parametrize("variant", FOLDED, ids=lambda variant: variant.name)
def test_a_variant_is_folded_as_peft_merges_it(variant: Variant, tmp_path: Path) -> None:
    tuned, before = made(variant, tmp_path)
    options = {} if (tmp_path / "base" / "config.json").exists() else {"fan_in_fan_out": SQUARE}
    ours = folded(base_of(tmp_path), tmp_path, **options)
    if variant.config.get("lora_alpha") == 0:
        before = {name: x + 1 for name, x in before.items()}
    check(ours, tuned.merge_and_unload(), before)


@pytest.mark.parametrize("variant", FOLDED[:20], ids=lambda variant: variant.name)
def test_the_classes_of_a_live_base_say_which_way_round_weights_are(variant: Variant, tmp_path: Path) -> None:
    tuned, before = made(variant, tmp_path)
    base = variant.model()
    base.load_state_dict(before)
    ours = folded(base, tmp_path)
    if variant.config.get("lora_alpha") == 0:
        before = {name: x + 1 for name, x in before.items()}
    check(ours, tuned.merge_and_unload(), before)


@pytest.mark.parametrize(("variant", "reason"), REFUSED, ids=lambda value: getattr(value, "name", ""))
def test_a_variant_is_refused_with_its_reason(variant: Variant, reason: str, tmp_path: Path) -> None:
    made(variant, tmp_path)
    with pytest.raises(TorchParamsError) as caught:
        tp.fold_lora(base_of(tmp_path), tmp_path / "adapter", tmp_path / "x.safetensors")
    assert reason in str(caught.value)


@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_of_adapter_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    get_peft_model(Small(), OTHERS[kind]).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(NotReadable, match=f"The adapter type '{kind}' is not supported"):
        tp.fold_lora(Small(), tmp_path / "adapter", tmp_path / "x.safetensors")


def test_a_square_weight_whose_base_says_nothing_is_refused(tmp_path: Path) -> None:
    tuned, before = made(Variant("", {"target_modules": ["square", "turned_square", "wide"]}), tmp_path)
    with pytest.raises(PlanError, match=r"Cannot tell whether 'square\.weight', 'turned_square\.weight' are stored"):
        folded(base_of(tmp_path), tmp_path)
    check(folded(base_of(tmp_path), tmp_path, fan_in_fan_out=SQUARE), tuned.merge_and_unload(), before)


def test_half_precision_is_within_a_rounding_of_peft(tmp_path: Path) -> None:
    variant = Variant("", {"target_modules": ["wide", "embed"]}, model=lambda: Small().to(torch.bfloat16))
    tuned, _ = made(variant, tmp_path)
    path = tmp_path / "folded.pt"
    tp.fold_lora(base_of(tmp_path), tmp_path / "adapter", path).run()
    ours, expected = torch.load(path), tuned.merge_and_unload().state_dict()
    for name, x in expected.items():
        torch.testing.assert_close(ours[name], x, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("tied", [False, True])
def test_an_extracted_adapter_is_one_to_peft(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = gpt2(tied=tied)
    base.save_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, x in tuned.named_parameters():
            if name.endswith(("c_proj.weight", "c_attn.weight", "wte.weight")):
                x += torch.randn(x.shape[0], 2) @ torch.randn(2, x.shape[1])
    tuned.save_pretrained(tmp_path / "tuned")
    tp.extract_lora(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "adapter", rank=2).run()
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    for name, x in tuned.state_dict().items():
        torch.testing.assert_close(loaded[name], x, rtol=1e-3, atol=1e-4, msg=name)


def test_an_adapter_with_a_name_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Small()
    config = LoraConfig(target_modules=["wide"], bias="all", init_lora_weights=False)
    tuned = get_peft_model(copy.deepcopy(base), config, adapter_name="other")
    with torch.no_grad():
        for name, x in tuned.named_parameters():
            if name.endswith(".bias"):
                x += 1
    tuned.save_pretrained(str(tmp_path))
    assert PREFIX + "named.bias" in tp.of(str(tmp_path / "other" / "adapter_model.safetensors")).names
    check(folded(base, tmp_path, "other"), tuned.merge_and_unload(), base.state_dict())


def test_the_configuration_says_nothing_of_single_layers(tmp_path: Path) -> None:
    made(Variant("", {"target_modules": ["attn.c_proj", "lm_head"]}, model=lambda: gpt2(tied=False)), tmp_path)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tp.fold_lora(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "x.safetensors")
