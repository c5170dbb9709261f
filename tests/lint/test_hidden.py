"""Modules and tensors hidden in containers, and similar cases that are not hidden."""

from __future__ import annotations

import collections
import copy
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import torchparams as tp


class Net(nn.Module):
    """A network with attributes."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


@dataclass
class Parts:
    head: nn.Module
    sizes: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Slots:
    head: nn.Module
    other: Any = None


class Inherits(Parts):
    """No dataclass by itself."""


class Pair(NamedTuple):
    left: nn.Module
    right: int


def found(model: Any) -> dict[str, tuple[str, ...]]:
    """Names by the rules that found something."""
    names: dict[str, tuple[str, ...]] = {}
    for finding in tp.audit(model, select="M101,M102,M103"):
        names[finding.id] = names.get(finding.id, ()) + finding.names
    return names


def linear() -> nn.Linear:
    return nn.Linear(2, 2, bias=False)


@pytest.mark.parametrize(
    ("held", "name"),
    [
        ([linear()], "x.0.weight"),
        ((1, linear()), "x.1.weight"),
        ({"a": linear()}, "x.a.weight"),
        ({3: linear()}, "x.3.weight"),
        ({("no", "text"): linear()}, "x.0.weight"),
        ({linear()}, "x.0.weight"),
        (frozenset({linear()}), "x.0.weight"),
        (collections.deque([linear()]), "x.0.weight"),
        (collections.OrderedDict(a=linear()), "x.a.weight"),
        (collections.defaultdict(list, a=[linear()]), "x.a.0.weight"),
        (Parts(linear()), "x.head.weight"),
        (Inherits(linear()), "x.head.weight"),
        (Slots(linear()), "x.head.weight"),
        (Pair(linear(), 1), "x.0.weight"),
        ([[[linear()]]], "x.0.0.0.weight"),
        ([nn.Sequential(nn.ReLU(), linear())], "x.0.1.weight"),
        ([nn.Parameter(torch.ones(2))], "x.0"),
        ({"a": nn.Parameter(torch.ones(2))}, "x.a"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_containers(held: object, name: str) -> None:
    assert found(Net(x=held)) == {"M101": (name,)}


def test_the_fix_is_code_for_the_container() -> None:
    fixes = {
        kind: tp.audit(Net(x=held))[0].fix
        for kind, held in {
            "list": [linear()],
            "dict": {"a": linear()},
            "parameters": [nn.Parameter(torch.ones(2))],
            "named": {"a": nn.Parameter(torch.ones(2))},
            "dataclass": Parts(linear()),
        }.items()
    }
    assert fixes == {
        "list": "self.x = nn.ModuleList(self.x)",
        "dict": "self.x = nn.ModuleDict(self.x)",
        "parameters": "self.x = nn.ParameterList(self.x)",
        "named": "self.x = nn.ParameterDict(self.x)",
        "dataclass": "self.head = self.x.head  # an attribute of the module itself is registered",
    }


def test_below_the_surface_and_behind_wrappers() -> None:
    model = nn.DataParallel(nn.Sequential(Net(x=[linear()]), nn.ReLU()))
    finding = tp.audit(model, select="M101")[0]
    assert (finding.where, finding.names) == ("0", ("0.x.0.weight",))
    assert finding.what == "0.x is a list that holds 1 trainable parameter of 1 module"


def test_what_is_hidden_may_hide_more() -> None:
    inner = Net(deep=[linear()])
    inner.own = linear()
    assert found(Net(x=[inner])) == {"M101": ("x.0.own.weight", "x.0.deep.0.weight")}


def test_what_is_hidden_twice_is_found_once() -> None:
    layer = linear()
    assert found(Net(x=[layer, layer], y={"a": layer})) == {"M101": ("x.0.weight",)}


def test_frozen_modules_buffers_and_dropout_are_notes() -> None:
    teacher = linear().requires_grad_(False)
    assert found(Net(x=[teacher])) == {"M102": ("x.0.weight",)}
    assert found(Net(x=[nn.BatchNorm1d(2, affine=False)])) == {
        "M102": ("x.0.running_mean", "x.0.running_var", "x.0.num_batches_tracked")
    }
    assert found(Net(x=[nn.Sequential(nn.Dropout())])) == {"M102": ("x.0.0",)}
    assert found(Net(x=[nn.ReLU(), nn.Identity()])) == {}


def test_leaves_are_warnings() -> None:
    assert found(Net(x=torch.ones(2, requires_grad=True))) == {"M103": ("x",)}
    assert found(Net(x=[torch.ones(2, requires_grad=True)])) == {"M103": ("x.0",)}
    assert found(Net(x=torch.ones(2), y=torch.ones(2, requires_grad=True) * 2)) == {}


# --- what is no finding ---------------------------------------------------------------------


def test_what_is_registered_elsewhere_is_not_hidden() -> None:
    layers = [linear(), linear()]
    model: Any = Net(x=layers, y={"a": layers[0].weight}, layers=nn.ModuleList(layers))
    model.grouped = [nn.Sequential(*layers)]  # a module of its own, and nothing new in it
    model.seen = [layers[0].weight, layers[1].weight.detach()]
    assert found(model) == {}


def test_a_way_back_is_no_part() -> None:
    model: Any = Net(child=Net(), other=Net())
    model.child.parent = [model]
    model.child.context = {"root": model}
    assert found(model) == {}
    # Also where only a part is looked at: the parent holds what is not below the part.
    model.more = linear()
    assert found(model.child) == {}


def test_what_is_hidden_on_purpose() -> None:
    model: Any = Net()
    object.__setattr__(model, "teacher", linear())
    model.__dict__["scale"] = nn.Parameter(torch.ones(2))
    model.ref = weakref.ref(linear())
    model.made = linear
    model.space = SimpleNamespace(layer=linear())
    assert found(model) == {}


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_keep_lists_of_their_own(kind: Any) -> None:
    model: Any = kind(3, 4, num_layers=2, bidirectional=True)
    assert list(tp.audit(model)) == []
    assert list(tp.audit(copy.deepcopy(model))) == []
    torch.nn.utils.parametrizations.weight_norm(model, "weight_hh_l0")
    assert found(model) == {}
    model.weight_ih_l0 = nn.Parameter(torch.ones_like(model.weight_ih_l0))
    assert found(model) == {}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_torchs_own_layers_are_clean() -> None:
    models: list[Any] = [
        nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3),
        nn.MultiheadAttention(8, 2, kdim=4, vdim=4),
        nn.EmbeddingBag(5, 3, padding_idx=0),
        nn.Bilinear(2, 3, 4),
        nn.ConvTranspose2d(3, 4, 2),
        nn.AdaptiveLogSoftmaxWithLoss(32, 10, [4, 7]),
        nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3, affine=True), nn.PReLU(3)),
        nn.LayerNorm((4, 4)),
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        torch.nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
        torch.compile(nn.Linear(2, 2)),
    ]
    for model in models:
        assert list(tp.audit(model)) == [], model


# --- bounds ---------------------------------------------------------------------------------


def test_containers_without_end() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    deep: list[Any] = [linear()]
    for _ in range(10):
        deep = [deep]
    model = Net(loop=loop, deep=deep, words={str(i): i for i in range(100_000)})
    assert found(model) == {}


def test_a_long_chain_of_what_is_hidden() -> None:
    model: Any = Net()
    tip = model
    for _ in range(3_000):
        following: Any = Net()
        tip.next_ = [following]
        tip = following
    tip.last = linear()
    assert len(found(model)["M101"]) == 1


class Odd(nn.Module):
    """Every way to its attributes is a trap."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = linear()
        vars(self)["trap"] = Trap()  # PyTorch itself would look something up
        self.traps = [Trap(), TrapList([linear()])]

    @property
    def weight(self) -> torch.Tensor:
        raise RuntimeError("a property was read")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "fc":
            return super().__getattr__(name)
        raise RuntimeError(f"{name} was looked up")

    def __iter__(self) -> Any:
        raise RuntimeError("it was iterated")

    def __len__(self) -> int:
        raise RuntimeError("it was measured")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("it was compared")

    __hash__ = nn.Module.__hash__


class Trap:
    """An object that can only be held."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"{name} was looked up")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("it was compared")

    __hash__ = None  # type: ignore[assignment]  # not even that

    def __repr__(self) -> str:
        raise RuntimeError("it was printed")

    def __bool__(self) -> bool:
        raise RuntimeError("it was asked")


class TrapList(list[nn.Module]):
    """A list whose own iterator is a trap."""

    def __iter__(self) -> Any:
        raise RuntimeError("it was iterated")

    def __len__(self) -> int:
        raise RuntimeError("it was measured")


def test_models_that_raise_in_odd_places() -> None:
    assert found(Odd()) == {"M101": ("traps.1.0.weight",)}


def test_a_half_built_module_in_a_list() -> None:
    assert found(Net(x=[nn.Linear.__new__(nn.Linear)])) == {}
