"""`tp.explain`: what parameters(), buffers() and state_dict() include, Python expressions, and missing tensors."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import torchparams as tp
from torchparams.sources.live.absent import ranges
from torchparams.sources.live.access import Access


class Net(nn.Module):
    """A network with attributes."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 4, bias=False)
        self.act = nn.GELU()


class Everything(nn.Module):
    """One of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.experts = nn.ModuleDict({"a": nn.Linear(2, 2), "b-c": nn.Linear(2, 2)})
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(2))])
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.ones(2), persistent=False)
        self.hidden = [nn.Linear(2, 2) for _ in range(2)]
        self.scale = torch.ones(2)


def calls(explained: Any) -> dict[str, int]:
    return {holder.call: holder.tensors for holder in explained.holders}


def models() -> list[nn.Module]:
    shared = nn.Linear(2, 2)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    twice = nn.BatchNorm1d(2)
    buffered: Any = Net(fc=nn.Linear(2, 2))
    buffered.register_buffer("also", buffered.fc.weight)
    return [
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Linear(2, 2)),
        Everything(),
        Net(a=shared, b=nn.Sequential(shared, shared)),
        Net(a=twice, b=twice),
        normed,
        buffered,
        nn.DataParallel(nn.Sequential(nn.Linear(2, 2))),
        nn.Transformer(8, 2, 2, 2, 8, batch_first=True),
        nn.LSTM(2, 3, 2),
    ]


@pytest.mark.parametrize("model", models(), ids=lambda model: type(model).__name__)
def test_the_counts_are_those_of_pytorch(model: nn.Module) -> None:
    explained = tp.explain(model)
    assert calls(explained) == {
        "parameters()": len(list(model.parameters())),
        "named_parameters()": len(list(model.named_parameters())),
        "buffers()": len(list(model.buffers())),
        "state_dict()": len(model.state_dict()),
    }
    held = list(explained.tensors.values())
    assert sum("P" in each.where for each in held) == len(list(model.parameters()))
    names = [*((h.info.name, h.where) for h in held), *((alias, where) for h in held for alias, _, where in h.also)]
    assert {name for name, where in names if "S" in where} == {
        key.removeprefix("module.") for key in model.state_dict()
    }


@pytest.mark.parametrize("model", models(), ids=lambda model: type(model).__name__)
def test_python_reaches_each_tensor_so(model: nn.Module) -> None:
    tensors = tp.of(model, buffers=True)
    for name, held in tp.explain(model).tensors.items():
        assert eval(held.code, {"model": model}) is tensors[name], held.code
        for alias, code, _ in held.also:
            assert eval(code, {"model": model}) is tensors[name], (alias, code)


def test_expressions_for_names_that_python_cannot_spell() -> None:
    class Counts(nn.ModuleList):
        def __getitem__(self, index: Any) -> Any:
            return super().__getitem__(len(self) - 1 - index)

    odd = nn.Sequential()
    odd.add_module("1", nn.Linear(2, 2))
    model = Net(odd=odd, counts=Counts([nn.Linear(2, 2), nn.Linear(2, 2)]), experts=nn.ModuleDict({"a-b": nn.ReLU()}))
    setattr(model, "lambda", nn.Linear(2, 2))
    access = Access(model)
    assert access.module("odd.1") == "getattr(model.odd, '1')"
    assert access.tensor("counts.0.weight") == "getattr(model.counts, '0').weight"
    assert access.module("experts.a-b") == "model.experts['a-b']"
    assert access.tensor("lambda.bias") == "getattr(model, 'lambda').bias"
    for name in tp.of(model):
        assert eval(access.tensor(name), {"model": model}) is model.get_parameter(name)


def test_a_small_network_prints_so() -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, 10, bias=False))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1)
    assert (
        str(tp.explain(model, optimizer=optimizer))
        == """\
Sequential
   call                tensors  numel
P  parameters()              5    176  3 trainable, 2 frozen
   named_parameters()        5    176  the same, with their names
B  buffers()                 3     17  state of layers, not trained
S  state_dict()              8    193  P + B
O  optimizer                 1     80  SGD; 2 trainable are not in it

in Python                     shape         in    trainable  owner
model[0].weight               [8, 1, 3, 3]  P-S-  no         Conv2d
model[0].bias                 [8]           P-S-  no         Conv2d
model[1].weight               [8]           P-S-  yes        BatchNorm2d
model[1].bias                 [8]           P-S-  yes        BatchNorm2d
model[1].running_mean         [8]           -BS-             BatchNorm2d
model[1].running_var          [8]           -BS-             BatchNorm2d
model[1].num_batches_tracked  []            -BS-             BatchNorm2d
model[3].weight               [10, 8]       P-SO  yes        Linear

Not among the parameters
model[2]: ReLU has no parameters.
model[3].bias: None. Linear was made without it."""
    )


def test_equal_layers_are_one_row_and_every_kind_is_there() -> None:
    text = str(tp.explain(Everything()))
    squeezed = " ".join(text.split())
    assert "model.layers[0..2].fc.weight [4, 4] P-S yes Linear" in squeezed
    assert "model.embed.weight [8, 4] P-S yes Embedding = model.head.weight tied --S" in squeezed
    assert "P + B - 1 not persistent + 1 tied name" in squeezed
    assert "model.hidden: a list that hides 4 tensors in 2 modules" in text
    assert "Write self.hidden = nn.ModuleList(self.hidden)" in text.replace("\n  ", " ")
    assert "model.scale: a plain tensor, neither parameter nor buffer." in text
    assert "model.mask: registered with persistent=False. buffers() gives it, state_dict()" in text
    assert "model.layers[0..2].act: GELU has no parameters." in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_lazy_and_computed_parameters_are_named() -> None:
    model = Net(lazy=nn.LazyLinear(2), normed=nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    kinds = {absent.kind: absent for absent in tp.explain(model).absent}
    assert kinds["lazy"].names == ("lazy.weight", "lazy.bias")
    assert kinds["computed"].codes == ("model.normed.weight",)
    assert "parametrizations.weight: original0, original1" in kinds["computed"].why


def test_what_was_put_past_the_registry_is_named() -> None:
    model: Any = Net(fc=nn.Linear(2, 2))
    object.__setattr__(model, "teacher", nn.Linear(2, 2))
    object.__setattr__(model, "free", nn.Parameter(torch.ones(2)))
    model.result = model.fc.weight * 2
    kinds = [(absent.kind, absent.names) for absent in tp.explain(model).absent]
    assert kinds == [("aside", ("teacher",)), ("aside", ("free",)), ("computed", ("result",))]
    assert not tp.audit(model), "on purpose: no finding"


def test_code_of_the_networks_own_is_named_and_not_run() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            raise AssertionError("it was run")

        def parameters(self, recurse: bool = True) -> Any:
            raise AssertionError("it was run")

    notes = tp.explain(nn.Sequential(Extra(2, 2))).notes
    assert [note.partition(" of its own")[0] for note in notes] == [
        "Extra has get_extra_state()",
        "Extra has parameters()",
    ]
    assert not tp.explain(nn.Sequential(nn.LazyLinear(2), tp.Module())).notes


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("embed.weight", "model.embed.weight is a trainable parameter of model.embed (Embedding): [8, 4], 32 elements"),
        ("head.weight", "It is tied: model.head.weight is the same tensor."),
        ("model.layers[1].fc.weight", "model.layers[1].fc.weight is a trainable parameter"),
        ("norm.running_mean", "parameters() does not. No optimizer steps a buffer."),
        ("mask", "buffers() gives it; parameters() and state_dict() do not."),
        ("hidden", "Write self.hidden = nn.ModuleList(self.hidden)."),
        ("hidden.0.weight", "hidden.0.weight is in model.hidden: a list"),
        ("model.layers[2].act", "GELU has no parameters."),
        ("layers.0.fc.bias", "None. Linear was made without it."),
        ("layers.0", "model.layers[0] is a module, Block, with 3 parameters: layers.0.norm.weight"),
        ("scale", "a plain tensor, neither parameter nor buffer"),
    ],
)
def test_one_name_is_one_paragraph(name: str, said: str) -> None:
    explained = tp.explain(Everything(), name)
    assert said in " ".join(explained.sentences)
    assert all(len(line) <= 80 for line in str(explained).splitlines())
    json.dumps(explained.to_json())


def test_the_optimizer_of_one_tensor() -> None:
    model: Any = Net(a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.a.parameters(), lr=0.1, weight_decay=0.01)
    inside = " ".join(tp.explain(model, "a.weight", optimizer=optimizer).sentences)
    assert "SGD has it in param_groups.0, with lr=0.1, weight_decay=0.01." in inside
    outside = " ".join(tp.explain(model, "b.weight", optimizer=optimizer).sentences)
    assert "The optimizer SGD does not have it: no step changes it." in outside
    other = torch.optim.SGD(nn.Linear(2, 2).parameters())
    assert "2 are not of this model" in tp.explain(model, optimizer=other).holders[-1].note


def test_a_wrong_name_has_its_neighbours() -> None:
    with pytest.raises(tp.errors.UnknownName, match=r"named 'embed.wieght'. Did you mean 'embed.weight'"):
        tp.explain(Everything(), "embed.wieght")


def test_a_checkpoint_has_no_calls_to_explain() -> None:
    with pytest.raises(tp.errors.UnsupportedSource, match=r"A checkpoint cannot be explained.*torchparams.ls lists"):
        tp.explain("model.pt")


def test_json_is_whole() -> None:
    explained = tp.explain(Everything())
    written = json.loads(json.dumps(explained.to_json()))
    assert written["tensors"][1]["python"] == "model.embed.weight"
    assert written["tensors"][1]["in"] == ["parameters()", "state_dict()"]
    assert written["tensors"][1]["tied"] == [
        {"name": "head.weight", "python": "model.head.weight", "in": ["state_dict()"]}
    ]
    assert {absent["kind"] for absent in written["absent"]} == {
        "hidden",
        "plain",
        "not-saved",
        "no-parameters",
        "not-set",
    }


# --- an empty table -------------------------------------------------------------------------------


def test_an_empty_table_says_why_and_names_attribute_and_cure() -> None:
    text = str(tp.of(Net(blocks=[nn.Linear(2, 2)])))
    assert (
        text
        == """\
Net (module)
model.blocks: a list that hides 2 tensors in 1 module: nn.Module does not look
  into a list. Write self.blocks = nn.ModuleList(self.blocks)
0 tensors · 0 parameters · 0 B"""
    )


def test_other_reasons_for_an_empty_table() -> None:
    assert "ReLU has no parameters." in str(tp.of(nn.ReLU()))
    assert "None of its 2 modules has parameters: Sequential, ReLU." in str(tp.of(nn.Sequential(nn.ReLU())))
    assert "3 buffers: tp.of(model, buffers=True)" in str(tp.of(nn.BatchNorm1d(2, affine=False)))
    assert "self.w = nn.Parameter(self.w)" in str(tp.of(Net(w=torch.ones(2))))
    assert "No parameter has a gradient" in str(tp.gradients(nn.Linear(2, 2)))
    assert "Every parameter is frozen" in str(tp.gradients(nn.Linear(2, 2).requires_grad_(False)))
    assert "nn.ModuleList" in str(tp.gradients(Net(blocks=[nn.Linear(2, 2)])))


def test_expressions_that_count_on_are_one() -> None:
    assert ranges(["m[0].a", "m[0].b", "m[1].a", "m[1].b", "m[3].a"]) == ["m[0..1].a", "m[3].a", "m[0..1].b"]
    assert ranges([f"m[{i}][{j}]" for i in range(3) for j in range(2)]) == ["m[0..2][0..1]"]
