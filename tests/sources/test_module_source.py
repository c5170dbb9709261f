from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import torchparams as tp
from torch_networks import Odd, Tied, agrees_with_torch, same
from torchparams.errors import SourceError, UnknownName
from torchparams.sources.live.module import ModuleSource
from torchparams.testing import TORCH_DTYPES, Array, SourceTests, to_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


class TestModuleSource(SourceTests):
    """A network with the tensors where their names say, and none where no module can be."""

    dtypes = TORCH_DTYPES
    names = ("a b", "a/b", "#a", "ü", "重み", "a\nb", 'a"b\\', "module.a", "_orig_mod.a", "*", "0")
    order = False  # a module's own parameters come before those of its children
    ties = strides = True
    kind = "parameter"
    device = "cpu"
    requires_grad = False

    def make(
        self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
    ) -> ModuleSource:
        made = {id(array): nn.Parameter(to_torch(array), requires_grad=False) for array in tensors.values()}
        return ModuleSource(network({name: made[id(array)] for name, array in tensors.items()}))


def network(parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    root = nn.Module()
    for name, parameter in parameters.items():
        *path, last = name.split(".")
        module = root
        for component in path:
            if component not in module._modules:
                module.add_module(component, nn.Module())
            module = module.get_submodule(component)
        module.register_parameter(last, parameter)
    return root


# --- PyTorch is the oracle --------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate = nn.Linear(4, count, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(count))
        self.shared = self.experts[0]


def networks() -> dict[str, Callable[[], nn.Module]]:
    layer = nn.Linear(3, 3)
    return {
        "linear": lambda: nn.Linear(3, 2),
        "nothing": nn.Module,
        "convolutional": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)),
        "transformer": lambda: nn.Transformer(16, 2, 2, 2, 32),
        "lstm": lambda: nn.LSTM(4, 5, num_layers=3, bidirectional=True, proj_size=2),
        "Attention": lambda: nn.MultiheadAttention(8, 2, kdim=3, vdim=5, add_bias_kv=True),
        "tied": Tied,
        "odd": Odd,
        "experts": lambda: Experts(5),
        "shared": lambda: nn.Sequential(layer, nn.ReLU(), layer, nn.Sequential(layer, Tied())),
        "shared twice": lambda: nn.Sequential(*[nn.Sequential(layer, nn.Sequential(layer))] * 3),
        "parametrized": lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(3, 3)), parametrizations.spectral_norm(nn.Conv1d(2, 2, 3))
        ),
        "lazy": lambda: nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()),
        "meta": lambda: nn.Transformer(16, 2, 1, 1, 32, device="meta"),
        "half": lambda: nn.Linear(2, 2).half(),
    }


@pytest.mark.parametrize("name", networks())
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_names_order_and_identity_are_pytorchs(name: str) -> None:
    agrees_with_torch(networks()[name]())


KEYS = st.sampled_from(["a", "b", "module", "_orig_mod", "0", "weight"])


@st.composite
def graphs(draw: st.DrawFn) -> nn.Module:
    """A network of a few modules that share each other and their tensors in any way without a cycle."""
    tensors = [nn.Parameter(torch.zeros(())) for _ in range(4)]
    buffers = [torch.zeros(()) for _ in range(2)]
    modules = [nn.Module() for _ in range(draw(st.integers(1, 6)))]
    for place, module in enumerate(modules):
        for key in draw(st.lists(KEYS, unique=True, max_size=4)):
            what = draw(st.sampled_from(["parameter", "buffer", "module", "nothing"]))
            if what == "parameter":
                module.register_parameter(key, draw(st.sampled_from([*tensors, None])))
            elif what == "buffer":
                module.register_buffer(key, draw(st.sampled_from([*buffers, None])), persistent=draw(st.booleans()))
            elif what == "module" and modules[place + 1 :]:
                module.add_module(key, draw(st.sampled_from(modules[place + 1 :])))
            else:
                module.add_module(key, None)
    return modules[0]


@given(graphs())
def test_any_network_without_a_cycle(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agrees_with_torch_shared(model)


def agrees_with_torch_shared(model: nn.Module) -> None:
    params = tp.of(model)
    everywhere = list(model.named_parameters(remove_duplicate=False))
    assert same(list(params.items()), list(model.named_parameters()))
    assert same(list(params.named_parameters()), list(model.named_parameters()))
    assert same(list(params.named_parameters(remove_duplicate=False)), everywhere)
    infos = params.infos
    assert [n for n, _ in everywhere if n not in infos] == sorted(
        (alias for info in infos.values() for alias in info.aliases), key=[n for n, _ in everywhere].index
    )
    for name, tensor in everywhere:
        assert params[name] is tensor
        assert params[params.source.resolve(name)] is tensor
    both = tp.of(model, buffers=True)
    assert [n for n, info in both.infos.items() if info.kind == "parameter"] == params.names
    assert {id(t) for t in both.values()} == {id(t) for t in (*model.parameters(), *model.buffers())}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        assert both[name] is buffer


# --- names ------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.BatchNorm1d(2)])
        self.by_name = {"first": self.layers[0]}
        self.in_order = [self.layers[1]]
        self.__dict__["short"] = self.layers[0]

    @property
    def computed(self) -> nn.Module:
        raise AssertionError("a property was run")


def test_the_path_of_attributes() -> None:
    model = Net()
    params = tp.of(model)
    for spelling in ("layers[0].weight", "by_name['first'].weight", "by_name[first].weight", "short.weight"):
        assert params[spelling] is model.layers[0].weight
        assert params.source.resolve(spelling) == "layers.0.weight"
        assert spelling in params
    assert params["in_order[0].bias"] is params["layers[1].bias"] is model.layers[1].bias
    for spelling in (
        "computed.weight", "layers[2].weight", "layers.2.weight", "in_order[7].bias", "in_order[x].bias", "weight",
        "layers[0]", "layers", "", ".", "layers..weight", "short", "training", "layers.0.weight.grad", "by_name[x].y.z",
        "layers.0.in_features", "forward", "[", "layers[0.weight",
    ):  # fmt: skip
        assert spelling not in params
        with pytest.raises(UnknownName):
            params[spelling]


def test_asking_for_a_buffer() -> None:
    params = tp.of(Net())
    assert "layers.1.running_mean" not in params
    with pytest.raises(UnknownName) as caught:
        params["layers.1.running_mean"]
    assert str(caught.value) == (
        "Net: No parameter is named 'layers.1.running_mean'. layers.1.running_mean is a buffer. "
        "List buffers too: torchparams.of(model, buffers=True)."
    )


def test_an_unknown_name() -> None:
    with pytest.raises(UnknownName) as caught:
        tp.of(Net())["layers.0.wieght"]
    assert str(caught.value).startswith(
        "Net: No parameter is named 'layers.0.wieght'. Did you mean 'layers.0.weight' or "
    )


def test_names_that_pytorch_would_refuse() -> None:
    model: Any = nn.Module()
    model._modules["a.b"] = nn.Linear(1, 1)
    model._parameters["c.d"] = nn.Parameter(torch.zeros(1))
    params = tp.of(model)
    assert params.names == ["c.d", "a.b.weight", "a.b.bias"]
    assert params["a.b.bias"] is model._modules["a.b"].bias
    model._modules["a"] = nn.Module()
    model._modules["a"]._modules["b"] = nn.Linear(1, 1)
    with pytest.raises(SourceError) as caught:
        len(params)
    assert str(caught.value) == (
        "Module: 2 tensors are named 'a.b.weight'. A key of _modules, _parameters or _buffers holds a dot; "
        "register them through PyTorch's functions."
    )


# --- costs, counted ---------------------------------------------------------------------------


class Counting(nn.Module):
    looks = 0

    def __getattribute__(self, name: str) -> Any:
        if name in ("_modules", "_parameters"):
            Counting.looks += 1
        return super().__getattribute__(name)


def counting_tree(width: int) -> nn.Module:
    root = Counting()
    for i in range(width):
        child = Counting()
        child.weight = nn.Parameter(torch.zeros(1))
        root.add_module(str(i), child)
    return root


@pytest.mark.parametrize("width", [10, 1000])
def test_one_tensor_looks_only_at_the_way_to_it(width: int) -> None:
    params = tp.of(counting_tree(width))
    for use in (
        lambda: params[f"{width - 1}.weight"],
        lambda: f"{width - 1}.weight" in params,
        lambda: params.numpy("7.weight"),
        lambda: next(params()),
        lambda: next(params.named_parameters()),
    ):
        Counting.looks = 0
        use()
        assert Counting.looks < 20


def test_the_traversal_is_linear() -> None:
    looks = []
    for width in (100, 1000):
        params = tp.of(counting_tree(width))
        for use in (
            lambda p: list(p.items()),
            lambda p: p.infos,
            lambda p: list(p()),
            repr,
            lambda p: list(p.values()),
        ):
            Counting.looks = 0
            use(params)
            looks.append((width, Counting.looks))
    assert all(count <= 10 * width + 20 for width, count in looks)


def test_a_network_deeper_than_pythons_stack() -> None:
    depth = 3 * sys.getrecursionlimit()
    module: nn.Module = nn.Linear(1, 1)
    for _ in range(depth):
        outer = nn.Module()
        outer.add_module("a", module)
        module = outer
    params = tp.of(module)
    name = "a." * depth + "weight"
    assert params.names == [name, "a." * depth + "bias"]
    assert list(params.infos) == params.names
    assert len(list(params.named_parameters(remove_duplicate=False))) == 2
    assert params[name].shape == (1, 1)
    with pytest.raises(RecursionError):
        list(module.named_parameters())


# --- the source itself ------------------------------------------------------------------------


def test_two_sources_of_one_network_are_equal() -> None:
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)
    assert ModuleSource(model) == ModuleSource(model)
    assert hash(ModuleSource(model)) == hash(ModuleSource(model))
    assert ModuleSource(model) != ModuleSource(other)
    assert ModuleSource(model) != ModuleSource(model, buffers=True)
    assert ModuleSource(model) != model
    assert (tp.of(model).select("weight") | tp.of(model).select("bias")).names == ["weight", "bias"]


def test_a_copy_of_the_table_is_the_table_of_a_copy() -> None:
    params = tp.of(nn.Linear(1, 1))
    copied = copy.deepcopy(params)
    assert copied["weight"] is not params["weight"]
    assert copied.names == params.names


def test_a_network_is_known_without_importing_anything_more() -> None:
    code = (
        "import torch, sys\n"
        "import torchparams as tp\n"
        "before = set(sys.modules)\n"
        "repr(tp.of(torch.nn.Linear(1, 1)))\n"
        "new = {m for m in set(sys.modules) - before if not m.startswith('torchparams')}\n"
        "assert not any(m.split('.')[0] in ('torch', 'rich', 'ml_dtypes') for m in new), new\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


@pytest.mark.parametrize("held", ["_parameters", "_buffers"])
@pytest.mark.parametrize("where", ["Linear", "Sequential, 1"])
def test_keys_that_are_no_text(held: str, where: str) -> None:
    layer = nn.Linear(2, 2)
    model = layer if where == "Linear" else nn.Sequential(nn.ReLU(), layer)
    getattr(layer, held)[3] = nn.Parameter(torch.ones(1))
    params = tp.of(model, buffers=True)
    verbs: list[Callable[[], object]] = [lambda: len(params), lambda: tp.digest(params), lambda: tp.audit(model)]
    if held == "_parameters":
        verbs += [lambda: list(params.items()), lambda: list(params.named_parameters()), lambda: tp.freeze(model)]
    for verb in verbs:
        with pytest.raises(SourceError) as caught:
            verb()
        message = f"{where}: A key of {held} is 3, not a text. Register tensors through PyTorch's functions."
        assert str(caught.value) == message


# --- changes meanwhile ----------------------------------------------------------------------------

CHANGED = (
    "Sequential: The model changed while it was read, perhaps by another thread. "
    "Read it when no other thread changes it, or use a lock."
)
READINGS: dict[str, Any] = {
    "listing": lambda model: list(tp.of(model)),
    "buffers": lambda model: list(tp.of(model, buffers=True)),
    "records": lambda model: tp.of(model).infos,
    "iterator": lambda model: list(tp.of(model)()),
    "print": lambda model: tp.stats(model),
    "freeze": tp.freeze,
    "groups": lambda model: tp.groups(model, lr=1.0),
    "load": lambda model: tp.load(model, {}),
}


@pytest.mark.parametrize("reading", READINGS)
def test_a_module_added_meanwhile_is_one_clear_error(reading: str) -> None:
    class Adds(nn.Linear):
        def __getattribute__(self, name: str) -> Any:
            if name == "_parameters" and armed:
                armed.clear()
                model.add_module("more", nn.Linear(1, 1))
            return super().__getattribute__(name)

    armed: list[bool] = []
    model = nn.Sequential(Adds(1, 1), nn.Linear(1, 1))
    armed.append(True)
    with pytest.raises(SourceError) as caught:
        READINGS[reading](model)
    assert str(caught.value) == CHANGED


@pytest.mark.parametrize("reading", READINGS)
def test_a_parameter_added_meanwhile_is_one_clear_error(reading: str) -> None:
    class Changing(dict[str, Any]):
        def items(self) -> Any:
            yield from super().items()
            raise RuntimeError("dictionary keys changed during iteration")

    model = nn.Sequential(nn.Linear(1, 1))
    model[0]._parameters = Changing(model[0]._parameters)
    with pytest.raises(SourceError) as caught:
        READINGS[reading](model)
    assert str(caught.value) == CHANGED


def test_aliases_that_are_asked_for_after_a_change() -> None:
    model: Any = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[1].weight = model[0].weight
    reading = ModuleSource(model).reading()
    model.append(nn.Linear(1, 1))
    with pytest.raises(SourceError) as caught:
        list(reading.aliases)
    assert str(caught.value) == CHANGED


def test_another_thread_that_changes_the_model() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(200)))
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            model.add_module("more", nn.Linear(1, 1))
            del model._modules["more"]

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=change)
    thread.start()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            for read in (READINGS["listing"], READINGS["records"], READINGS["iterator"]):
                with contextlib.suppress(SourceError):
                    read(model)
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
