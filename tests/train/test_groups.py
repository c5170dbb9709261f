from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import torchparams as tp
from torchparams.errors import NoMatch, OptionError, SelectorSyntaxError, UnknownName, UnsupportedSource
from torchparams.render.tree import to_html
from torchparams.sources.live.tensors import LiveReading
from torchparams.train.groups import Groups


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))
        self.gamma = nn.Parameter(torch.ones(width))


class Net(nn.Module):
    def __init__(self, blocks: int = 3, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embed(x_BT)
        for block in self.blocks:
            assert isinstance(block, Block)
            x_BTD = x_BTD + block.gamma * block.mlp(block.norm2(x_BTD + block.attn.proj(block.norm1(x_BTD))))
        logits: torch.Tensor = self.head(self.norm(x_BTD))
        return logits


def options(groups: Groups) -> dict[str, dict[str, Any]]:
    """Each parameter's options."""
    return {
        name: {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in groups
        for name in group["param_names"]
    }


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


# --- what is in which group -------------------------------------------------------------------


def test_every_trainable_parameter_is_in_one_group_in_the_models_order() -> None:
    model = Net()
    model.blocks[0].requires_grad_(False)
    groups = tp.groups(model, tp.rule(tp.no_decay, weight_decay=0.0), lr=0.1, weight_decay=0.05)
    assert isinstance(groups, list)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]  # the embedding comes first
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(groups.names) == sorted(trainable)
    for group in groups:
        assert group["param_names"] == [name for name in trainable if name in set(group["param_names"])]
        assert all(p is model.get_parameter(n) for n, p in zip(group["param_names"], group["params"], strict=True))
    assert groups.frozen == tuple(name for name in names_of(model) if name.startswith("blocks.0."))


def test_without_rules_there_is_one_group() -> None:
    groups = tp.groups(Net(), lr=0.1)
    assert len(groups) == 1
    assert set(groups[0]) == {"params", "param_names", "lr"}
    assert set(tp.groups(Net())[0]) == {"params", "param_names"}


def test_a_later_rule_wins_option_by_option() -> None:
    groups = tp.groups(
        Net(),
        tp.rule("blocks.**", lr=0.2, momentum=0.9),
        tp.rule("blocks.1.**", lr=0.3),
        tp.rule("**.bias", momentum=0.0),
        lr=0.1,
    )
    found = options(groups)
    assert found["embed.weight"] == {"lr": 0.1}
    assert found["blocks.0.attn.qkv.weight"] == {"lr": 0.2, "momentum": 0.9}
    assert found["blocks.1.attn.qkv.weight"] == {"lr": 0.3, "momentum": 0.9}
    assert found["blocks.1.attn.qkv.bias"] == {"lr": 0.3, "momentum": 0.0}
    assert found["head.bias"] == {"lr": 0.1, "momentum": 0.0}


def test_there_is_one_group_for_each_set_of_options_whatever_rules_gave_them() -> None:
    rules = [tp.rule(f"blocks.{n}.**", lr=0.1 if n % 2 else 0.2, betas=[0.9, 0.95]) for n in range(6)]
    groups = tp.groups(Net(6), *rules, lr=0.3)
    assert len(groups) == 3
    assert [group["lr"] for group in groups] == [0.3, 0.2, 0.1]
    assert len(tp.groups(Net(6), *[tp.rule(f"blocks.{n}.**", lr=0.3) for n in range(6)], lr=0.3)) == 1


def test_values_that_cannot_be_compared_are_only_themselves() -> None:
    shared, other = torch.tensor(0.1), torch.tensor(0.1)
    groups = tp.groups(Net(2), tp.rule("blocks.0.**", lr=shared), tp.rule("blocks.1.**", lr=other), lr=shared)
    assert len(groups) == 2
    assert groups[0]["lr"] is shared
    assert groups[1]["lr"] is other
    assert len(tp.groups(Net(2), tp.rule("blocks.0.**", hook={"a": [1]}), tp.rule("blocks.1.**", hook={"a": [1]}))) == 2


def test_a_tied_parameter_is_in_one_group_once() -> None:
    model = Net(tied=True)
    groups = tp.groups(model, tp.rule("head.weight", lr=1.0), lr=0.1)
    assert groups.names.count("embed.weight") == 1
    assert "head.weight" not in groups.names
    assert options(groups)["embed.weight"] == {"lr": 1.0}  # its alias is as good as its name
    assert groups.explain("head.weight").name == "embed.weight"
    tensors = [tensor for group in groups for tensor in group["params"]]
    assert len(tensors) == len({id(tensor) for tensor in tensors}) == len(list(model.parameters()))


def test_buffers_are_no_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    groups = tp.groups(tp.of(model, buffers=True), tp.rule("1.**", lr=1.0))
    assert groups.names == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert groups.frozen == ()


def test_groups_of_a_selection_hold_no_more_than_that() -> None:
    model = Net()
    groups = tp.groups(tp.of(model).select("blocks.**"), tp.rule("**.bias", lr=1.0))
    assert set(groups.names) == {name for name in names_of(model) if name.startswith("blocks.")}
    with pytest.raises(NoMatch):
        tp.groups(tp.of(model).select("blocks.**"), tp.rule("head.**", lr=1.0))


def test_groups_of_named_parameters() -> None:
    model = Net()
    groups = tp.groups(dict(model.named_parameters()), tp.rule("**.bias | [ndim<2]", weight_decay=0.0))
    assert sorted(groups.names) == sorted(names_of(model))
    assert all(
        tensor is model.get_parameter(name)
        for name, tensor in zip(groups.names, (p for g in groups for p in g["params"]), strict=True)
    )


def test_names_are_canonical_under_wrappers() -> None:
    model = Net()
    groups = tp.groups(nn.DataParallel(model), tp.rule("module.head.**", lr=1.0), lr=0.1)
    assert sorted(groups.names) == sorted(names_of(model))
    assert groups.explain("module.head.weight").given[0].value == 1.0


# --- optimizers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        lambda groups: torch.optim.AdamW(groups),
        lambda groups: torch.optim.RMSprop(groups),
        lambda groups: torch.optim.Adagrad(groups),
    ],
)
def test_an_optimizer_steps_and_keeps_the_names(make: Any) -> None:
    model = Net()
    model.embed.requires_grad_(False)
    groups = tp.groups(model, tp.rule(tp.no_decay, weight_decay=0.0), weight_decay=0.05, layer_decay=0.5, lr=0.01)
    optimizer = make(groups)
    model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()["param_groups"]
    assert [group["param_names"] for group in saved] == [group["param_names"] for group in groups]
    assert [group["lr"] for group in saved] == [group["lr"] for group in groups]
    optimizer.load_state_dict(optimizer.state_dict())


def test_an_optimizer_of_ones_own() -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1, "ratio": 1.0})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # never called
            raise NotImplementedError

    optimizer = Own(tp.groups(Net(), tp.rule("head.**", ratio=2.0)))
    assert [group["ratio"] for group in optimizer.param_groups] == [1.0, 2.0]


def test_no_group_has_a_key_that_nobody_gave() -> None:
    groups = tp.groups(Net(), tp.rule("**.bias", weight_decay=0.0), lr=0.1, weight_decay=0.1, layer_decay=0.5)
    assert {key for group in groups for key in group} == {"params", "param_names", "lr", "weight_decay"}


def test_split_gives_a_list_for_each_optimizer() -> None:
    model = Net()
    groups = tp.groups(
        model,
        tp.rule("[ndim=2] & ~:embedding & ~head.**", optimizer="muon", lr=0.02),
        tp.rule(tp.no_decay, weight_decay=0.0),
        lr=0.001,
        weight_decay=0.1,
    )
    by = groups.split("optimizer")
    assert list(by) == [None, "muon"]
    assert all(isinstance(part, Groups) for part in by.values())
    assert sorted([*by[None].names, *by["muon"].names]) == sorted(names_of(model))
    assert all("optimizer" not in group for part in by.values() for group in part)
    assert any("optimizer" in group for group in groups)  # the whole is as it was
    assert "head.weight" in by[None].names
    for part in by.values():
        torch.optim.SGD(part)
    assert by["muon"].explain("blocks.0.attn.qkv.weight").group == 0
    assert "embed.weight" not in str(by["muon"]).split("given by")[1]
    with pytest.raises(UnknownName):
        by["muon"].explain("embed.weight")
    with pytest.raises(OptionError) as error:
        groups.split("family")
    assert str(error.value) == (
        "Net: No group has the option 'family' to split by. The options are lr, optimizer, weight_decay. "
        "Set it in a rule: torchparams.rule(selector, family=…)."
    )
    named = tp.groups(model, tp.rule("head.**", optimizer="muon"), optimizer="adamw").split("optimizer")
    assert list(named) == ["adamw", "muon"]


def test_groups_are_copied_and_pickled_as_lists_are() -> None:
    groups = tp.groups(Net(1), tp.rule(tp.no_decay, weight_decay=0.0), tp.rule("head.**", lr=1.0), lr=0.1)
    for copied in (copy.deepcopy(groups), pickle.loads(pickle.dumps(groups))):
        assert copied.names == groups.names
        assert str(copied) == str(groups)
        assert copied[0]["params"][0] is not groups[0]["params"][0]


# --- no_decay ---------------------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


class RMSNorm2d(Scale):
    pass


class Normalizer(Scale):
    pass


def test_no_decay_knows_norms_by_their_class_and_biases_by_their_own_name() -> None:
    model = nn.ModuleDict(
        {
            "scale": RMSNorm2d(),
            "norm": nn.Linear(2, 2),  # a linear layer, whatever it is called
            "not": Normalizer(),
            "relative_attention_bias": nn.Embedding(3, 2),
            "attn": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "table": nn.Embedding(4, 2),
            "wide": nn.LayerNorm((2, 2)),
            "rnn": nn.LSTM(2, 2),
        }
    )
    model.register_parameter("temperature", nn.Parameter(torch.tensor(1.0)))
    spared = tp.of(model).select(tp.no_decay).names
    assert spared == [
        "temperature",
        "scale.weight",
        "norm.bias",
        "attn.in_proj_bias",
        "attn.bias_k",
        "attn.bias_v",
        "attn.out_proj.bias",
        "wide.weight",
        "wide.bias",
        "rnn.bias_ih_l0",
        "rnn.bias_hh_l0",
    ]
    assert [name for name, info in tp.of(model).infos.items() if info.name in spared] == spared


def test_no_decay_is_what_its_parts_are() -> None:
    model = Net()
    params = tp.of(model)
    assert params.select(tp.no_decay).names == params.select(":norm | :bias | [ndim<2]").names
    assert params.filter(lambda info: bool(tp.no_decay.names([info]))).names == params.select(tp.no_decay).names


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.LayerNorm(2), nn.Sequential(nn.Linear(2, 2, bias=False), nn.RMSNorm(2))]
)
def test_no_part_of_no_decay_need_be_there(model: nn.Module) -> None:
    assert tp.groups(model, tp.rule(tp.no_decay, weight_decay=0.0))


def test_no_decay_that_spares_nothing_is_an_error_unless_one_says_so() -> None:
    model = nn.Linear(2, 2, bias=False)
    with pytest.raises(NoMatch, match="`<function no_decay>` matches nothing"):
        tp.groups(model, tp.rule(tp.no_decay, weight_decay=0.0))
    groups = tp.groups(model, tp.rule(tp.no_decay, strict=False, weight_decay=0.0), weight_decay=0.1)
    assert options(groups) == {"weight": {"weight_decay": 0.1}}
    assert groups.hits == (0,)


def test_no_decay_of_a_file_goes_by_shape_and_name() -> None:
    arrays = {name: tensor.detach().numpy() for name, tensor in Net(1).state_dict().items()}
    assert tp.of(arrays).select(tp.no_decay).names == tp.of(Net(1)).select(tp.no_decay).names


def test_embeddings_are_spared_where_one_says_so() -> None:
    found = options(tp.groups(Net(), tp.rule(tp.no_decay | ":embedding", weight_decay=0.0), weight_decay=0.1))
    assert found["embed.weight"] == {"weight_decay": 0.0}
    with pytest.raises(NoMatch, match="`:embedding` matches nothing"):
        tp.groups(nn.Linear(2, 2), tp.rule(tp.no_decay | ":embedding", weight_decay=0.0))


# --- what is refused --------------------------------------------------------------------------


def test_every_rule_must_match() -> None:
    with pytest.raises(NoMatch) as error:
        tp.groups(Net(), tp.rule("blocks.**", lr=1.0), tp.rule("**.bias | heads.**", lr=1.0))
    assert "`heads.**` matches nothing" in str(error.value)
    assert tp.groups(Net(), tp.rule("heads.**", strict=False, lr=1.0)).hits == (0,)


def test_a_rule_may_hit_frozen_parameters_alone() -> None:
    model = Net()
    model.embed.requires_grad_(False)
    groups = tp.groups(model, tp.rule("embed.**", lr=1.0), lr=0.1)
    assert groups.frozen == ("embed.weight",)
    assert {group["lr"] for group in groups} == {0.1}


def test_nothing_trainable_is_an_error() -> None:
    with pytest.raises(NoMatch) as error:
        tp.groups(nn.Linear(2, 2).requires_grad_(False))
    assert str(error.value) == (
        "Linear: There is no trainable parameter for an optimizer. 2 parameters, all frozen. "
        "torchparams.unfreeze(model, selector) makes some trainable."
    )
    with pytest.raises(NoMatch, match="There are no parameters"):
        tp.groups(nn.ReLU())


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(OptionError) as error:
        tp.groups(Net(), "**.bias", lr=0.1)  # type: ignore[arg-type]  # that is the point
    assert str(error.value).startswith(
        "'**.bias' is not a rule. For groups, a rule is torchparams.rule(selector, lr=…)"
    )
    with pytest.raises(OptionError) as error:
        tp.rule("**.bias")
    assert str(error.value) == (
        "The rule for `**.bias` has no options. Pass options: torchparams.rule(selector, lr=…, weight_decay=…)."
    )
    for make in (lambda: tp.rule("**", params=[]), lambda: tp.groups(Net(), param_names=[])):
        with pytest.raises(OptionError, match="is not an option: it holds the parameters"):
            make()
    with pytest.raises(SelectorSyntaxError):
        tp.rule("**.bias |", lr=1.0)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": NAN}, "lr=nan would make every parameter NaN"),
        ({"momentum": NAN}, "momentum=nan would make every parameter NaN"),
        ({"temperature": NAN}, "temperature=nan would make every parameter NaN"),
        ({"betas": (0.9, NAN)}, "betas=(0.9, nan) would make every parameter NaN"),
        ({"lr": torch.tensor(NAN)}, "lr=tensor(nan) would make every parameter NaN"),
        ({"lr": np.float32(NAN)}, "lr=np.float32(nan) would make every parameter NaN"),
        ({"lr": INF}, "lr=inf is not a finite number from 0 on"),
        ({"lr": -1e-3}, "lr=-0.001 is not a finite number from 0 on"),
        ({"lr": torch.tensor([-1.0])}, "lr=tensor([-1.]) is not a finite number from 0 on"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 is not a finite number from 0 on"),
        ({"weight_decay": INF}, "weight_decay=inf is not a finite number from 0 on"),
        ({"eps": -1e-8}, "eps=-1e-08 is not a finite number from 0 on"),
        ({"eps": (None, -1.0)}, "eps=(None, -1.0) is not a finite number from 0 on"),
        ({"momentum": -1}, "momentum=-1 is not a finite number from 0 on"),
        ({"betas": (0.9, 1.0)}, "betas=(0.9, 1.0) is not from 0 on and below 1"),
        ({"betas": [-0.1, 0.9]}, "betas=[-0.1, 0.9] is not from 0 on and below 1"),
        ({"alpha": -INF}, "alpha=-inf is not a finite number from 0 on"),
    ],
)
def test_numbers_that_no_optimizer_can_use(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        tp.groups(Net(), **options)
    assert str(error.value) == f"Net: {message}"
    with pytest.raises(OptionError) as error:
        tp.rule("head.**", **options)
    assert str(error.value) == f"the rule for `head.**`: {message}"


def test_numbers_that_an_optimizer_can_use() -> None:
    for options in (
        {"lr": 0, "weight_decay": 0.0, "betas": (0.0, 0.999), "eps": (None, 1e-3)},
        {"lr": torch.tensor(1e-3), "betas": (torch.tensor(0.9), 0.95, 0.99), "momentum": 0},
        {"lr": None, "clip_threshold": INF, "beta2_decay": -0.8, "dampening": -1.0, "optimizer": "muon"},
        {"lr": torch.empty((), device="meta"), "betas": None, "nesterov": True},
    ):
        assert len(tp.groups(Net(), tp.rule("**.bias", **options), **options)) == 1


def test_a_file_has_no_groups(tmp_path: Any) -> None:
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    with pytest.raises(UnsupportedSource) as error:
        tp.groups(tmp_path / "net.pt", lr=0.1)
    assert "torchparams.groups needs a live model, not the path of a checkpoint" in str(error.value)


# --- what is printed --------------------------------------------------------------------------


def small() -> Groups:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[1].requires_grad_(False)
    return tp.groups(
        model,
        tp.rule(tp.no_decay, weight_decay=0.0),
        tp.rule("2.**", lr=0.01),
        lr=0.001,
        weight_decay=0.05,
        layer_decay=0.5,
        depth="{}.*",
    )


def test_printing_shows_every_parameter_with_its_options_and_what_gave_them() -> None:
    assert str(small()).split("\n") == [
        "4 groups of Sequential: 4 parameter tensors",
        "group  tensors  parameters       lr  weight_decay",
        "    0        1           6  0.00025          0.05",
        "    1        1           3  0.00025             0",
        "    2        1           6     0.01          0.05",
        "    3        1           2     0.01             0",
        "",
        "rule      hits  sets",
        "no_decay     4  weight_decay=0",
        "2.**         2  lr=0.01",
        "",
        "parameter  group       lr  weight_decay  depth  given by",
        "0.weight       0  0.00025          0.05      1  lr: defaults × 0.25",
        "0.bias         1  0.00025             0      1  lr: defaults × 0.25; weight_decay: no_decay",
        "2.weight       2     0.01          0.05      3  lr: 2.**",
        "2.bias         3     0.01             0      3  lr: 2.**; weight_decay: no_decay",
        "left out, frozen: 2 tensors: 1.weight, 1.bias",
    ]


def test_long_selectors_stand_once_and_their_numbers_in_the_rows() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    groups = tp.groups(
        model,
        tp.rule("[ndim=2] & ~:embedding & ~3.**", optimizer="muon", lr=0.02),
        tp.rule(tp.no_decay, weight_decay=0.0),
        lr=0.001,
        weight_decay=0.05,
    )
    shown = str(groups)
    assert shown.split("\n")[6:] == [
        "rule  selector                        hits  sets",
        "   0  [ndim=2] & ~:embedding & ~3.**     1  optimizer='muon', lr=0.02",
        "   1  no_decay                           4  weight_decay=0",
        "",
        "parameter  group     lr  weight_decay  optimizer  given by",
        "0.weight       0  0.001          0.05          –  defaults",
        "1.weight       1   0.02          0.05     'muon'  lr, optimizer: rule 0",
        "1.bias         2  0.001             0          –  weight_decay: rule 1",
        "2.weight       2  0.001             0          –  weight_decay: rule 1",
        "2.bias         2  0.001             0          –  weight_decay: rule 1",
        "3.weight       0  0.001          0.05          –  defaults",
        "3.bias         2  0.001             0          –  weight_decay: rule 1",
    ]
    assert max(map(len, shown.split("\n"))) <= 80
    assert groups.explain("1.weight").given[0].by == "[ndim=2] & ~:embedding & ~3.**"


def test_an_explanation_says_what_was_overridden() -> None:
    groups = small()
    assert str(groups.explain("2.bias")).split("\n") == [
        "2.bias is in group 3, at depth 3",
        "option        value  given by  instead of",
        "lr             0.01  2.**      0.001 (defaults)",
        "weight_decay      0  no_decay  0.05 (defaults)",
    ]
    frozen = groups.explain("1.weight")
    assert str(frozen).split("\n")[0] == "1.weight is in no group: it is frozen, at depth 2"
    assert frozen.group is None
    assert frozen.rules == ("no_decay",)
    assert json.loads(json.dumps(frozen.to_json()))["options"]["lr"] == {
        "value": 0.0005,
        "by": "defaults × 0.5",
        "instead": [],
    }
    assert "no_decay" in frozen._repr_html_()
    with pytest.raises(UnknownName, match=r"No parameter is named '2\.weights'"):
        groups.explain("2.weights")


def test_what_an_optimizer_or_a_scheduler_writes_is_shown() -> None:
    groups = small()
    optimizer = torch.optim.AdamW(groups)
    optimizer.param_groups[0]["lr"] = 0.5
    shown = str(groups)
    assert "betas" not in shown
    assert "0.weight       0      0.5          0.05      1  lr: changed since" in shown
    assert groups.explain("0.weight").given[0].by == "changed since"
    assert groups.explain("0.weight").given[0].value == 0.5


def test_json_has_only_json_types() -> None:
    groups = small()
    groups[0]["eps"] = float("inf")
    groups[0]["lr"] = torch.tensor(0.5)
    made = json.loads(json.dumps(groups.to_json(), allow_nan=False))
    assert made["model"] == "Sequential"
    assert made["layer_decay"] == 0.5
    assert made["groups"][0]["options"] == {"lr": "tensor(0.5000)", "weight_decay": 0.05, "eps": "inf"}
    assert made["groups"][1] == {
        "options": {"lr": 0.00025, "weight_decay": 0.0},
        "names": ["0.bias"],
        "tensors": 1,
        "numel": 3,
    }
    assert made["rules"][0] == {"selector": "no_decay", "strict": True, "hits": 4, "options": {"weight_decay": 0.0}}
    assert made["parameters"]["2.bias"] == {"group": 3, "depth": 3, "by": {"lr": 1, "weight_decay": 0}}
    assert made["frozen"] == ["1.weight", "1.bias"]
    assert made["defaults"] == {"lr": 0.001, "weight_decay": 0.05}


def test_a_long_table_is_cut_in_the_middle() -> None:
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(100)])
    shown = str(tp.groups(model, lr=0.1))
    assert "… 160 more parameters …" in shown
    assert len(shown.split("\n")) < 60
    assert len(str(tp.groups(model, lr=0.1).tree(limit=None)).split("\n")) > 200
    assert "160 more" in to_html(tp.groups(model, lr=0.1).tree())


def test_printing_never_raises() -> None:
    groups = small()
    groups.append({"params": [nn.Parameter(torch.zeros(2))], "lr": 1.0})
    assert "5 groups" in repr(groups)
    groups.append({})
    assert repr(groups).startswith("<Groups of Sequential: KeyError")
    assert Groups().tree() is not None
    assert "0 groups" in repr(Groups())
    lazy = tp.groups(nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2)), lr=0.1)
    assert "2 parameter tensors" not in repr(lazy)
    assert "4 parameter tensors" in repr(lazy)
    assert "4 parameter tensors" in lazy._repr_html_()


# --- costs, counted ---------------------------------------------------------------------------


def test_a_model_is_read_once_and_no_records_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[int] = []
    of = LiveReading.of
    monkeypatch.setattr(LiveReading, "of", lambda *args, **options: readings.append(1) or of(*args, **options))  # type: ignore[func-returns-value]  # counts
    monkeypatch.setattr(LiveReading, "infos", property(lambda self: pytest.fail("records were made")))
    model = Net()
    tp.groups(model, tp.rule(tp.no_decay, weight_decay=0.0), tp.rule("head.**", lr=1.0), lr=0.1, layer_decay=0.9)
    assert readings == [1]


def test_options_are_put_together_once_for_each_set_of_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchparams.train import groups as module

    made: list[int] = []
    origin = module._origin
    monkeypatch.setattr(module, "_origin", lambda *args: made.append(1) or origin(*args))  # type: ignore[func-returns-value]  # counts
    for layers in (10, 200):
        made.clear()
        model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(layers)])
        groups = tp.groups(model, tp.rule("**.bias", lr=1.0), tp.rule("{0..4}.*", lr=2.0))
        assert len(made) == 4
        assert len(groups) == 3
