"""Transposed weights, and the names and shapes in PEFT adapters."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import torchparams as tp
from command import command
from torch_files import saved
from torchparams import limits
from torchparams.errors import (
    FileFormatError,
    LimitExceeded,
    MismatchError,
    NoMatch,
    NotReadable,
    PlanError,
    TorchParamsError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Array = np.ndarray[Any, Any]
PREFIX = "base_model.model."


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def adapter(folder: Path, tensors: Mapping[str, Array], name: str = "adapter", **config: Any) -> Path:
    """A directory as PEFT writes it."""
    made = folder / name
    made.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", **config}
    (made / "adapter_config.json").write_text(json.dumps(settings))
    tp.convert({PREFIX + name: x for name, x in tensors.items()}, made / "adapter_model.safetensors").run()
    return made


def factors(module: str, rows: int, columns: int) -> dict[str, Array]:
    return {
        f"{module}.lora_A.weight": normal(2, columns, seed=1),
        f"{module}.lora_B.weight": normal(rows, 2, seed=2),
    }


def product(tensors: Mapping[str, Array], module: str) -> Array:
    found: Array = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
    return found


def folded(base: object, adapter: Path, **options: Any) -> dict[str, Array]:
    path = adapter.parent / "folded.safetensors"
    tp.fold_lora(base, adapter, path, overwrite=True, **options).run()
    table = tp.of(str(path))
    return {name: np.array(table.numpy(name)) for name in table.names}


def message(error: type[TorchParamsError], base: object, adapter: Path, **options: Any) -> str:
    with pytest.raises(error) as caught:
        tp.fold_lora(base, adapter, adapter.parent / "x.safetensors", **options)
    return str(caught.value).replace(str(adapter.parent), "here")


def on_disk(folder: Path, tensors: Mapping[str, Array], config: Mapping[str, Any] | None) -> str:
    """A checkpoint as transformers saves it."""
    made = folder / "base"
    made.mkdir()
    tp.convert(tensors, made / "model.safetensors").run()
    if config is not None:
        (made / "config.json").write_text(json.dumps(config))
    return str(made)


# --- which way round ----------------------------------------------------------------------------

GPT2 = {
    "h.0.attn.c_proj.weight": normal(4, 4),
    "h.0.attn.c_attn.weight": normal(4, 12),
    "lm_head.weight": normal(4, 4, seed=3),
}
SQUARES = {**factors("h.0.attn.c_proj", 4, 4), **factors("lm_head", 4, 4), **factors("h.0.attn.c_attn", 12, 4)}
TURNED = {"h.0.attn.c_proj", "h.0.attn.c_attn"}


def expected(turned: set[str]) -> dict[str, Array]:
    changes = {name: product(SQUARES, name) for name in ("h.0.attn.c_proj", "h.0.attn.c_attn", "lm_head")}
    return {
        f"{name}.weight": GPT2[f"{name}.weight"] + 2 * (x.T if name in turned else x) for name, x in changes.items()
    }


def same(ours: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
    assert ours.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize(
    ("config", "turned"),
    [
        ({"model_type": "gpt2"}, TURNED),
        ({"model_type": "llama"}, {"h.0.attn.c_attn"}),  # of it the shape decides
        ({"model_type": "x", "decoder": {"model_type": "y"}}, {"h.0.attn.c_attn"}),
    ],
)
def test_the_model_type_decides_where_shapes_do_not(
    flag: bool, config: dict[str, Any], turned: set[str], tmp_path: Path
) -> None:
    path = adapter(tmp_path, SQUARES, fan_in_fan_out=flag)
    same(folded(on_disk(tmp_path, GPT2, config), path), expected(turned))


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (None, "'h.0.attn.c_proj.weight', 'lm_head.weight' are"),
        ({"architectures": ["A"]}, "'h.0.attn.c_proj.weight', 'lm_head.weight' are"),
        ({"model_type": "gpt2", "auto_map": {"AutoModel": "x.Y"}}, "'h.0.attn.c_proj.weight', 'lm_head.weight' are"),
        ({"model_type": "pair", "decoder": {"model_type": "gpt2"}}, "'h.0.attn.c_proj.weight' is"),
    ],
)
def test_where_nothing_decides_it_has_to_be_stated(config: dict[str, Any] | None, names: str, tmp_path: Path) -> None:
    path = adapter(tmp_path, SQUARES)
    base = on_disk(tmp_path, GPT2, config)
    assert message(PlanError, base, path) == (
        f"here/base/model.safetensors: Cannot tell whether {names} stored as (out, in) or as (in, out), "
        "as in transformers' Conv1D. For a square weight, a config.json beside the base would decide. Pass "
        "fan_in_fan_out: False, True, or a selector of (in, out) weights "
        "(--no-fan-in-fan-out, --fan-in-fan-out SELECTOR)."
    )
    same(folded(base, path, fan_in_fan_out="**.c_proj.weight"), expected(TURNED))
    same(folded(base, path, fan_in_fan_out=False), expected({"h.0.attn.c_attn"}))
    same(folded(base, path, fan_in_fan_out=True), expected({*TURNED, "lm_head"}))
    with pytest.raises(NoMatch):
        folded(base, path, fan_in_fan_out="nothing")


def test_it_is_stated_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, base = adapter(tmp_path, SQUARES), on_disk(tmp_path, GPT2, None)
    target = str(tmp_path / "folded.safetensors")
    for options, turned in ((["--fan-in-fan-out", "**.c_proj.weight"], TURNED), (["--no-fan-in-fan-out"], set())):
        assert command(capsys, "lora", "fold", base, path, target, "--force", *options).status == 0
        table = tp.of(target)
        same({name: table.numpy(name) for name in table.names}, expected({"h.0.attn.c_attn", *turned}))
    both = command(capsys, "lora", "fold", base, path, target, "--fan-in-fan-out", "**", "--no-fan-in-fan-out")
    assert both.status == 2
    assert "--fan-in-fan-out and --no-fan-in-fan-out cannot be used together" in both.err


def test_the_classes_of_a_live_base_decide(tmp_path: Path) -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4, 4))

    class Special(torch.nn.Linear):
        pass

    class Conv1D(Own):
        """As the class of transformers is called."""

    Conv1D.__module__ = "transformers.pytorch_utils"
    base = torch.nn.ModuleDict({"fc": Special(4, 4), "turned": Conv1D(), "own": Own()})
    both = {**factors("fc", 4, 4), **factors("turned", 4, 4)}
    made = folded(base, adapter(tmp_path, both))
    np.testing.assert_allclose(made["turned.weight"], 2 * product(both, "turned").T, rtol=1e-5, atol=1e-6)
    weight = base["fc"].weight.detach().numpy()  # type: ignore[operator]  # a Linear
    np.testing.assert_allclose(made["fc.weight"], weight + 2 * product(both, "fc"), rtol=1e-5, atol=1e-6)
    own = adapter(tmp_path, factors("own", 4, 4), "own")
    assert "Cannot tell whether 'own.weight' is stored" in message(PlanError, base, own)


@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, None])
def test_extracted_factors_are_the_way_round_that_peft_reads(config: dict[str, Any] | None, tmp_path: Path) -> None:
    base = on_disk(tmp_path, GPT2, config)
    tuned = expected(TURNED)
    options: dict[str, Any] = {} if config else {"fan_in_fan_out": "**.c_*.weight"}
    if config is None:
        with pytest.raises(PlanError, match=r"Cannot tell whether 'h\.0\.attn\.c_(attn|proj)\.weight' is stored"):
            tp.extract_lora(base, tuned, tmp_path / "adapter", rank=2)
    plan = tp.extract_lora(base, tuned, tmp_path / "adapter", rank=2, **options)
    assert plan.config["fan_in_fan_out"] is True
    shapes = {output.name.removeprefix(PREFIX): output.expression.shape for output in plan.outputs}
    assert shapes["h.0.attn.c_attn.lora_A.weight"] == (2, 4)
    assert shapes["h.0.attn.c_attn.lora_B.weight"] == (12, 2)
    plan.run()
    ours = folded(base, tmp_path / "adapter", **options)
    for name, array in tuned.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-4, atol=1e-4, err_msg=name)
    table = tp.of(str(tmp_path / "adapter" / "adapter_model.safetensors"))
    b, a = (table.numpy(f"{PREFIX}h.0.attn.c_proj.lora_{x}.weight") for x in "BA")
    np.testing.assert_allclose((b @ a).T, tuned["h.0.attn.c_proj.weight"] - GPT2["h.0.attn.c_proj.weight"], atol=1e-4)


# --- names, shapes and numbers ------------------------------------------------------------------

BASE = {
    "fc.weight": normal(6, 5),
    "fc.bias": normal(6),
    "embed.weight": normal(9, 4),
    "out.weight": normal(9, 3),
    "head.weight": normal(3, 6),
    "head.bias": normal(3),
}


def test_a_negative_alpha(tmp_path: Path) -> None:
    both = factors("fc", 6, 5)
    path = adapter(tmp_path, both, lora_alpha=-3, alpha_pattern={"other": -1})
    same(folded(BASE, path), {**BASE, "fc.weight": BASE["fc.weight"] - 1.5 * product(both, "fc")})


def test_the_bias_of_a_factor_is_added_to_that_of_the_layer(tmp_path: Path) -> None:
    tensors = {**factors("fc", 6, 5), "fc.lora_B.bias": normal(6, seed=4)}
    change = 2 * product(tensors, "fc")
    made = folded(BASE, adapter(tmp_path, tensors, lora_bias=True), scale=0.5)
    wanted = {"fc.weight": BASE["fc.weight"] + change / 2, "fc.bias": BASE["fc.bias"] + tensors["fc.lora_B.bias"]}
    same(made, {**BASE, **wanted})
    whole = {**tensors, "fc.base_layer.bias": normal(6, seed=5)}
    made = folded(BASE, adapter(tmp_path, whole, "whole", lora_bias=True, bias="all"))
    bias = whole["fc.base_layer.bias"] + 2 * tensors["fc.lora_B.bias"]
    same(made, {**BASE, "fc.weight": BASE["fc.weight"] + change, "fc.bias": bias})
    base = {"fc.weight": BASE["fc.weight"]}
    assert message(MismatchError, base, tmp_path / "whole").startswith(
        "dict: The adapter changes 'fc.bias', but the base has no such tensor"
    )
    alone = adapter(tmp_path, {"fc.lora_B.bias": normal(6)}, "alone", lora_bias=True)
    assert message(PlanError, BASE, alone) == (
        "here/alone/adapter_model.safetensors: 'fc' has a bias of lora_B but no factors"
    )


def test_the_adapters_name_in_the_names_of_tensors(tmp_path: Path) -> None:
    both = factors("fc", 6, 5)
    wanted = {**BASE, "fc.weight": BASE["fc.weight"] + 2 * product(both, "fc"), "head.bias": normal(3, seed=8)}
    for i, infix in enumerate((".default", ".default.default")):
        tensors = {name.replace(".weight", f"{infix}.weight"): x for name, x in both.items()}
        tensors["head.modules_to_save.default.bias"] = normal(3, seed=8)
        same(folded(BASE, adapter(tmp_path, tensors, str(i), modules_to_save=["head"])), wanted)
    twice = {**both, "fc.lora_A.default.weight": normal(2, 5)}
    assert message(PlanError, BASE, adapter(tmp_path, twice, "twice")) == (
        "here/twice/adapter_model.safetensors: 'fc' has two tensors lora_A"
    )


@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_module_that_is_called_as_the_adapter_is(name: str, tmp_path: Path) -> None:
    # PEFT writes `gates.default.bias` as `gates.bias`.
    base = {"gates.weight": normal(2, 2), f"gates.{name}.bias": normal(3), "fc.weight": normal(6, 5)}
    tensors = {**factors("fc", 6, 5), "gates.bias": normal(3, seed=7)}
    path = adapter(tmp_path, tensors, name, bias="all")
    assert np.array_equal(folded(base, path)[f"gates.{name}.bias"], tensors["gates.bias"])
    assert message(PlanError, {**base, "gates.bias": normal(3)}, path) == (
        f"here/{name}/adapter_model.safetensors: 'gates.bias' can mean 'gates.bias' or 'gates.{name}.bias': "
        "PEFT removes name components equal to the adapter's name. "
        "Save the adapter under a name that is not the name of a module."
    )


def test_all_biases_beside_modules_that_are_saved_whole(tmp_path: Path) -> None:
    tensors = {
        "head.weight": normal(3, 6, seed=5),
        "head.bias": normal(3, seed=6),
        "head.modules_to_save.bias": normal(3, seed=6),
        "head.original_module.bias": BASE["head.bias"],
        "fc.base_layer.bias": normal(6, seed=7),
        **factors("fc", 6, 5),
    }
    path = adapter(tmp_path, tensors, bias="all", modules_to_save=["head"])
    plan = tp.fold_lora(BASE, path, tmp_path / "x.safetensors")
    assert plan.dropped == ((f"{PREFIX}head.original_module.bias", "'head.bias' replaces it"),)
    wanted = {"head.weight": tensors["head.weight"], "head.bias": tensors["head.bias"], "fc.bias": normal(6, seed=7)}
    same(folded(BASE, path), {**BASE, **wanted, "fc.weight": BASE["fc.weight"] + 2 * product(tensors, "fc")})
    tensors["head.modules_to_save.bias"] = normal(3, seed=9)
    assert message(PlanError, BASE, adapter(tmp_path, tensors, "unequal", bias="all")).endswith(
        "head.modules_to_save.bias' both replace 'head.bias' in the base, but differ"
    )
    alone = adapter(tmp_path, {"head.original_module.bias": normal(3)}, "alone")
    assert "'base_model.model.head.original_module.bias' is not a supported factor" in message(NotReadable, BASE, alone)


def test_resized_embeddings(tmp_path: Path) -> None:
    whole = {"embed.weight": normal(12, 4, seed=5)}
    path = adapter(tmp_path, {**factors("fc", 6, 5), **whole})
    plan = tp.fold_lora(BASE, path, tmp_path / "x.safetensors")
    assert "resized by the adapter: 'embed.weight' from 9 to 12 rows" in plan.notes
    same(folded(BASE, path), {**BASE, **whole, "fc.weight": BASE["fc.weight"] + 2 * product(factors("fc", 6, 5), "fc")})
    changed = {"embed.base_layer.weight": normal(12, 4), "embed.lora_embedding_A": normal(2, 12, seed=1)}
    changed["embed.lora_embedding_B"] = normal(4, 2)
    made = folded(BASE, adapter(tmp_path, changed, "changed"))
    change = (changed["embed.lora_embedding_B"] @ changed["embed.lora_embedding_A"]).T
    same(made, {**BASE, "embed.weight": changed["embed.base_layer.weight"] + 2 * change})
    output = {**BASE, "lm_head.weight": normal(9, 4)}
    assert message(MismatchError, output, path) == (
        "here/adapter: The adapter resizes 'embed.weight' to 12 rows, but 'lm_head.weight' keeps 9. "
        "Resize the base first, as it was for training."
    )
    for name, shape in (("head.weight", (4, 6)), ("embed.weight", (9, 5))):
        wrong = adapter(tmp_path, {name: normal(*shape)}, name)
        assert "Fold into the model that the adapter was trained on." in message(MismatchError, BASE, wrong)


def test_tied_weights_of_which_the_base_has_one_name(tmp_path: Path) -> None:
    whole = normal(12, 4, seed=5)
    path = adapter(tmp_path, {"embed.weight": whole, "lm_head.weight": whole})
    plan = tp.fold_lora(BASE, path, tmp_path / "x.safetensors")
    why = "tied to 'embed.weight', the name in the base"
    assert plan.dropped == ((f"{PREFIX}lm_head.weight", why),)
    same(folded(BASE, path), {**BASE, "embed.weight": whole})
    unequal = adapter(tmp_path, {"embed.weight": whole, "lm_head.weight": whole + 1}, "unequal")
    assert "The adapter changes 'lm_head.weight', but the base has no such tensor" in message(
        MismatchError, BASE, unequal
    )
    head = adapter(tmp_path, factors("lm_head", 9, 4), "head")
    assert message(MismatchError, BASE, head) == (
        "dict: The adapter changes 'lm_head.weight', but the base has no such tensor. 'embed.weight' has the "
        "same "
        "shape: if the two are tied, PEFT's merge changes both. Fold into the model that the adapter was trained on."
    )


def test_an_embedding_that_is_saved_whole_and_tied_by_the_configuration(tmp_path: Path) -> None:
    base = on_disk(tmp_path, BASE, {"model_type": "llama", "tie_word_embeddings": True})
    tensors = {"embed.weight": normal(9, 4, seed=5)}
    path = adapter(tmp_path, tensors, modules_to_save=["embed"])
    assert message(PlanError, base, path) == (
        "here/base/model.safetensors: The adapter replaces only 'embed.weight', but the config.json beside the "
        "base ties it to the output. To write it, and untie the output in config.json, "
        "pass shared='clone' (--shared clone)."
    )
    same(folded(base, path, shared="clone"), {**BASE, **tensors})
    tied = adapter(tmp_path, tensors, "tied", modules_to_save=["embed"], ensure_weight_tying=True)
    same(folded(base, tied), {**BASE, **tensors})


def test_tied_names_that_are_changed_each(tmp_path: Path) -> None:
    shared = torch.from_numpy(normal(6, 5))
    (tmp_path / "base.pt").write_bytes(saved({"embed.weight": shared, "head.weight": shared}))
    base = str(tmp_path / "base.pt")
    path = adapter(tmp_path, {**factors("head", 6, 5), **factors("embed", 6, 5)})
    assert message(PlanError, base, path).startswith(
        "here/base.pt: 'embed.weight' is tied to 'head.weight', but the adapter changes them separately. PEFT's"
    )
    whole = {"embed.weight": normal(6, 5, seed=1), "head.weight": normal(6, 5, seed=2)}
    same(folded(base, adapter(tmp_path, whole, "whole")), whole)
    one = adapter(tmp_path, {"embed.weight": normal(6, 5, seed=1)}, "one")
    assert message(PlanError, base, one) == (
        "here/base.pt: 'embed.weight' is tied to 'head.weight', but the adapter changes it alone. "
        "To write separate tensors, pass shared='clone' (--shared clone)."
    )


def test_layers_whose_change_is_no_product(tmp_path: Path) -> None:
    base = {
        "attn.in_proj_weight": normal(12, 4),
        "attn.out_proj.weight": normal(4, 4),
        "conv.weight": normal(6, 2, 3, 3),
    }
    attention = {**factors("attn", 12, 4), **factors("attn.base_layer.out_proj", 4, 4)}
    assert message(NotReadable, base, adapter(tmp_path, attention)) == (
        "here/adapter/adapter_model.safetensors: 'attn' is a MultiheadAttention; PEFT 0.21 merges its out_proj "
        "twice. Merge it with PEFT."
    )
    grouped = {"conv.lora_A.weight": normal(4, 4, 3, 3), "conv.lora_B.weight": normal(6, 2, 1, 1)}
    assert message(NotReadable, base, adapter(tmp_path, grouped, "grouped", r=4)) == (
        "here/grouped/adapter_model.safetensors: 'conv' is a convolution with 2 groups, which is not "
        "supported. PEFT cannot merge it either."
    )
    tokens = {"embed.token_adapter.trainable_tokens_delta": normal(2, 4)}
    assert "'base_model.model.embed.token_adapter" in message(NotReadable, base, adapter(tmp_path, tokens, "tokens"))


# --- patterns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rank_pattern", "alpha_pattern"])
def test_hostile_patterns_take_no_time(kind: str, tmp_path: Path) -> None:
    module = "a" * 60 + ".fc"
    both = factors(module, 6, 5)
    options: dict[str, Any] = {kind: {"(a+)+$": 2, "((a|a)*)*b": 2, ".*.*.*.*.*.*.*.*c.c": 2, r"(a+)+\.fc": 2}}
    made = folded({f"{module}.weight": np.zeros((6, 5), np.float32)}, adapter(tmp_path, both, **options))
    scale = 2 if kind == "rank_pattern" else 1
    np.testing.assert_allclose(made[f"{module}.weight"], scale * product(both, module), rtol=1e-5, atol=1e-5)


def test_patterns_beyond_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = factors("a" * 60, 6, 5)
    base = {"a" * 60 + ".weight": normal(6, 5)}

    def refused(error: type[TorchParamsError], pattern: str) -> str:
        (tmp_path / "n").mkdir(exist_ok=True)
        count = len(list((tmp_path / "n").iterdir()))
        path = adapter(tmp_path / "n", both, str(count), alpha_pattern={pattern: 1})
        return message(error, base, path).partition("adapter_config.json: ")[2]

    assert refused(LimitExceeded, "x" * 1001) == "A pattern in alpha_pattern has 1,001 characters; the limit is 1,000"
    assert refused(LimitExceeded, r"(?=(a+)+b)c") == (
        "'(?=(a+)+b)c' in alpha_pattern could take too long on a name of 60 characters"
    )
    assert refused(FileFormatError, "(?P<1>x)").startswith("'(?P<1>x)' in alpha_pattern is not a regular expression: ")
    assert refused(FileFormatError, "x{99999999999}").startswith("'x{99999999999}' in alpha_pattern is not a regular")
    monkeypatch.setattr(limits, "REGEX_SECONDS", 0)
    assert refused(LimitExceeded, "x") == "'x' in alpha_pattern took more than 0 seconds"
