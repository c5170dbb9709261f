from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any, Self

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize

import torchparams as tp
from torchparams import limits
from torchparams.errors import HalfBuilt, NotReadable, SourceError, UnknownName
from torchparams.sources.live.module import ModuleSource
from torchparams.testing import TORCH_DTYPES, Array, SourceTests, to_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
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


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.body = nn.LSTM(4, 4, num_layers=2, bidirectional=True)
        self.head = nn.Linear(4, 10)
        self.head.weight = self.embed.weight


class Odd(nn.Module):
    """Everything that a module may hold besides plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("nothing", None)
        self.register_buffer("mask", torch.ones(3), persistent=False)
        self.register_buffer("none", None)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.add_module("gone", None)
        self.table = nn.ParameterDict({"b": nn.Parameter(torch.ones(2)), "a": nn.Parameter(torch.ones(1))})
        self.list = nn.ParameterList([torch.ones(1), torch.ones(2)])
        self.same = self.scale
        self.module = nn.Linear(2, 2, bias=False)  # a name that wrappers use, and none of theirs
        self.empty = nn.Sequential()
        self.norm = nn.BatchNorm2d(3)


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


def agrees_with_torch(model: nn.Module) -> None:
    source = ModuleSource(model)
    params = tp.of(model)
    listed = list(model.named_parameters())
    everywhere = list(model.named_parameters(remove_duplicate=False))
    direct = list(model.named_parameters(recurse=False))
    assert same(list(params.items()), listed)
    assert same(list(params.named_parameters()), listed)
    assert same([(n, t) for n, _, t in source.walk()], listed)
    assert same(list(params.named_parameters(remove_duplicate=False)), everywhere)
    assert same(list(params.named_parameters(recurse=False)), direct)
    assert same(list(params.named_parameters(prefix="p")), list(model.named_parameters(prefix="p")))
    assert same_objects(list(params()), list(model.parameters()))
    assert same_objects(list(params(recurse=False)), list(model.parameters(recurse=False)))
    assert same_objects(list(params.values()), list(model.parameters()))
    assert params.names == list(params) == [name for name, _ in listed]
    assert len(params) == len(listed)
    infos = source.infos()
    assert list(infos) == params.names
    names: dict[int, list[str]] = {}
    for name, tensor in everywhere:
        names.setdefault(id(tensor), []).append(name)
    for name, tensor in listed:
        info = infos[name]
        assert source.info(name) == info == params.info(name)
        assert [name, *info.aliases] == names[id(tensor)]
        assert info.raw_name == name
        assert info.kind == "parameter"
        assert info.requires_grad == tensor.requires_grad
        assert info.dtype == str(tensor.dtype).removeprefix("torch.")
        assert info.device == str(tensor.device)
        for spelling in (name, *info.aliases):
            assert params[spelling] is tensor
            assert spelling in params
            assert source.find(spelling) == name
    # Each module's buffers follow its parameters, as in a state dict.
    both = tp.of(model, buffers=True)
    kinds = {name: info.kind for name, info in both.infos.items()}
    assert [name for name, kind in kinds.items() if kind == "parameter"] == params.names
    buffers = dict(model.named_buffers())
    assert {name for name, kind in kinds.items() if kind == "buffer"} == buffers.keys()
    assert all(both[name] is tensor for name, tensor in buffers.items())
    assert same_objects(list(both()), list(model.parameters()))
    saved = [name for name in model.state_dict() if name in kinds]
    assert saved == [name for name, info in both.infos.items() if info.persistent]


def same(ours: list[tuple[str, Any]], theirs: list[tuple[str, Any]]) -> bool:
    return [name for name, _ in ours] == [name for name, _ in theirs] and same_objects(
        [tensor for _, tensor in ours], [tensor for _, tensor in theirs]
    )


def same_objects(ours: list[Any], theirs: list[Any]) -> bool:
    return list(map(id, ours)) == list(map(id, theirs))


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


# --- wrappers ---------------------------------------------------------------------------------


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


NAMES = ["0.weight", "0.bias", "2.0.weight", "2.0.bias"]


def check_wrapped(wrapped: nn.Module, inner: nn.Module) -> None:
    params = tp.of(wrapped)
    raw = dict(wrapped.named_parameters())
    assert params.names == tp.of(inner).names == NAMES
    assert same_objects(list(params()), list(wrapped.parameters()))
    assert [info.raw_name for info in params.infos.values()] == list(raw)
    for (name, info), (spelled, tensor) in zip(params.infos.items(), raw.items(), strict=True):
        assert params[name] is params[spelled] is tensor
        assert spelled in params
        assert params.source.resolve(spelled) == name
        assert params.info(spelled) == info
        assert info.module == "torch.nn.modules.linear.Linear"
        assert info.aliases == ()
    assert same_objects(list(params(recurse=False)), list(wrapped.parameters(recurse=False)))
    assert [name for name, _ in params.named_parameters(remove_duplicate=False)] == NAMES
    assert params.select("2.0.*").names == ["2.0.weight", "2.0.bias"]


def test_data_parallel() -> None:
    inner = small()
    wrapped = nn.DataParallel(inner)
    check_wrapped(wrapped, inner)
    check_wrapped(nn.DataParallel(wrapped), inner)
    assert tp.of(wrapped).source.label == "DataParallel(Sequential)"


@pytest.mark.usefixtures("group")
def test_distributed_data_parallel() -> None:
    inner = small()
    check_wrapped(DistributedDataParallel(inner), inner)


def test_compiled() -> None:
    inner = small()
    compiled: Any = torch.compile(inner, backend="eager")
    check_wrapped(compiled, inner)
    assert tp.of(compiled).source.label == "OptimizedModule(Sequential)"
    check_wrapped(nn.DataParallel(compiled), inner)
    again: Any = torch.compile(nn.DataParallel(inner), backend="eager")
    check_wrapped(again, inner)


def test_compiled_in_place() -> None:
    inner = small()
    inner.compile(backend="eager")
    assert tp.of(inner).names == NAMES


def test_wrappers_within() -> None:
    model: Any = small()
    expected = list(model.parameters())
    model[0] = checkpoint_wrapper(model[0])
    model[2] = torch.compile(checkpoint_wrapper(model[2]), backend="eager")
    assert tp.of(model).names == NAMES
    assert same_objects(list(tp.of(model)()), expected)
    assert [info.raw_name for info in tp.of(model).infos.values()] == [
        "0._checkpoint_wrapped_module.weight",
        "0._checkpoint_wrapped_module.bias",
        "2._orig_mod._checkpoint_wrapped_module.0.weight",
        "2._orig_mod._checkpoint_wrapped_module.0.bias",
    ]
    params = tp.of(model)
    for name, info in params.infos.items():
        assert params.source.resolve(info.raw_name) == name
        assert params[info.raw_name] is params[name]
    # a name that spells some of the wrappers is as good as one that spells all or none
    assert params["2._checkpoint_wrapped_module.0.bias"] is params["2.0.bias"]
    assert params["2._orig_mod.0.bias"] is params["2.0.bias"]


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.filterwarnings("ignore:FSDP:FutureWarning", "ignore:FSDP:UserWarning", "ignore:The FSDP:FutureWarning")
def test_fully_sharded(original: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    inner: Any = small()
    inner[2] = FullyShardedDataParallel(inner[2], use_orig_params=original, device_id=torch.device("cpu"))
    wrapped = FullyShardedDataParallel(inner, use_orig_params=original, device_id=torch.device("cpu"))
    params = tp.of(wrapped)
    assert params.names == NAMES
    assert same_objects(list(params()), list(wrapped.parameters()))
    repr(params)


def test_the_users_own_names_stay() -> None:
    model = nn.Module()
    model.module = nn.Module()
    model.module._orig_mod = nn.Linear(1, 1)
    model._checkpoint_wrapped_module = nn.Linear(1, 1, bias=False)
    names = ["module._orig_mod.weight", "module._orig_mod.bias", "_checkpoint_wrapped_module.weight"]
    assert tp.of(model).names == names
    wrapped = nn.DataParallel(model)
    assert tp.of(wrapped).names == names
    # `module.` is the wrapper's and the user's: the canonical name wins, the raw one is found where nothing else is
    params = tp.of(wrapped)
    assert params["module._orig_mod.weight"] is model.module._orig_mod.weight
    assert params["module.module._orig_mod.weight"] is model.module._orig_mod.weight
    assert params["module._checkpoint_wrapped_module.weight"] is model._checkpoint_wrapped_module.weight
    assert params.source.resolve("module._checkpoint_wrapped_module.weight") == "_checkpoint_wrapped_module.weight"


def test_what_a_wrapper_holds_itself() -> None:
    wrapped: Any = nn.DataParallel(small())
    wrapped.head = nn.Linear(2, 2)
    assert tp.of(wrapped).names == [*NAMES, "head.weight", "head.bias"]
    assert tp.of(wrapped)["head.bias"] is wrapped.head.bias
    wrapped.add_module("2", nn.Linear(1, 1))  # a name that the network has, too: now the wrapper's must be told apart
    params = tp.of(wrapped)
    assert params.names == [name for name, _ in wrapped.named_parameters()]
    assert len(params) == 8
    assert all(params[name] is tensor for name, tensor in wrapped.named_parameters())
    outer = nn.DataParallel(wrapped)
    assert tp.of(outer).names == params.names
    assert all(tp.of(outer)[name] is tensor for name, tensor in wrapped.named_parameters())


def test_a_wrapper_without_a_module() -> None:
    wrapper = nn.DataParallel(nn.Linear(1, 1))
    del wrapper.module
    assert tp.of(wrapper).names == []
    assert tp.of(wrapper).source.label == "DataParallel"


# --- ties -------------------------------------------------------------------------------------


def test_a_tied_tensor_is_one_entry() -> None:
    model = Tied()
    params = tp.of(model)
    info = params.info("embed.weight")
    assert info.aliases == ("head.weight",)
    assert "head.weight" not in params.names
    assert "head.weight" in params
    assert params["head.weight"] is params["embed.weight"] is model.head.weight
    assert params.info("head.weight") is not None
    assert params.info("head.weight").name == "embed.weight"
    assert params.numel == sum(p.numel() for p in model.parameters())
    assert params.select(":tied").names == ["embed.weight"]


def test_equal_values_are_not_tied() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    assert all(info.aliases == () for info in tp.of(model).infos.values())


def nested_twice(depth: int) -> nn.Module:
    module: nn.Module = nn.Linear(1, 1)
    for _ in range(depth):
        module = nn.Sequential(module, module)
    return module


def test_aliases_are_limited_where_sharing_nests(monkeypatch: pytest.MonkeyPatch) -> None:
    few = nested_twice(4)
    agrees_with_torch(few)
    assert len(tp.of(few).info("0.0.0.0.weight").aliases) == 15
    model = nested_twice(200)  # 2^200 paths
    params = tp.of(model)
    zeros = ".".join(["0"] * 200)
    assert params.names == [f"{zeros}.weight", f"{zeros}.bias"]
    monkeypatch.setattr(limits, "ALIASES", 50)
    for name, info in params.infos.items():
        assert 1 <= len(info.aliases) <= 25
        assert len(set(info.aliases)) == len(info.aliases)
        for alias in info.aliases:
            assert params[alias] is params[name]
    deepest = ".".join(["1"] * 200) + ".bias"
    assert params.source.resolve(deepest) == f"{zeros}.bias"
    assert len(params.select(":tied")) == 2
    walked = params.named_parameters(remove_duplicate=False)
    assert [next(walked)[0] for _ in range(3)] == [
        f"{zeros}.weight",
        f"{zeros}.bias",
        f"{zeros[:-1]}1.weight",
    ]


def test_every_tied_tensor_keeps_an_alias_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(2, 2)
    block = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), Tied()))
    model = nn.Sequential(
        nn.Sequential(layer, layer), block, nn.Sequential(block, nn.Sequential(block)), nn.Linear(1, 1)
    )
    whole = tp.of(model).infos
    monkeypatch.setattr(limits, "ALIASES", 7)
    limited = tp.of(model).infos
    assert list(limited) == list(whole)
    for name, info in limited.items():
        assert bool(info.aliases) == bool(whole[name].aliases)
        assert set(info.aliases) <= set(whole[name].aliases)
    assert sum(len(info.aliases) for info in limited.values()) < sum(len(info.aliases) for info in whole.values())


def test_sharing_modules_without_tensors_costs_nothing() -> None:
    module: nn.Module = nn.ReLU()
    for _ in range(200):
        module = nn.Sequential(module, module)
    params = tp.of(nn.Sequential(module, module, nn.Linear(1, 1)))
    assert list(params.infos) == ["2.weight", "2.bias"]
    assert [name for name, _ in params.named_parameters(remove_duplicate=False)] == ["2.weight", "2.bias"]


def test_a_module_that_contains_itself() -> None:
    inner, outer = nn.Linear(1, 1), nn.Sequential()
    outer.add_module("inner", inner)
    inner.add_module("outer", outer)
    params = tp.of(outer)
    assert params.names == [name for name, _ in outer.named_parameters()] == ["inner.weight", "inner.bias"]
    assert all(info.aliases == () for info in params.infos.values())
    assert len(list(params.named_parameters(remove_duplicate=False))) == 2
    assert params["inner.outer.inner.bias"] is inner.bias


# --- buffers ----------------------------------------------------------------------------------


def test_buffers_on_request() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), Odd())
    assert not any(info.kind == "buffer" for info in tp.of(model).infos.values())
    params = tp.of(model, buffers=True)
    assert params.names[:5] == ["0.weight", "0.bias", "0.running_mean", "0.running_var", "0.num_batches_tracked"]
    mask = params.info("1.mask")
    assert (mask.kind, mask.persistent, mask.requires_grad) == ("buffer", False, False)
    assert params.info("0.running_mean").persistent
    assert params["0.running_mean"] is model[0].running_mean
    assert params.select(":buffer").names == [name for name, _ in model.named_buffers()]
    lines = str(params).splitlines()
    assert any(line.startswith("1.mask ") and "buffer, not saved" in line for line in lines)
    assert any(line.startswith("0.running_mean ") and " buffer " in line for line in lines)


def test_calling_gives_parameters_alone() -> None:
    model = nn.BatchNorm1d(2)
    params = tp.of(model, buffers=True)
    assert same_objects(list(params()), list(model.parameters()))
    assert [name for name, _ in params.named_parameters()] == ["weight", "bias"]
    assert [name for name, _ in params.items()] == params.names
    assert len(params) == 5


def test_a_buffer_that_is_a_parameter_elsewhere() -> None:
    model = nn.Module()
    model.first = nn.Module()
    model.second = nn.Linear(2, 2)
    model.first.register_buffer("copy", model.second.weight)
    params = tp.of(model, buffers=True)
    assert params.names == tp.of(model).names == ["second.weight", "second.bias"]
    info = params.info("first.copy")
    assert (info.name, info.kind, info.aliases) == ("second.weight", "parameter", ("first.copy",))


# --- tensors of every kind --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_parameters() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    params = tp.of(model, buffers=True)
    info = params.info("0.weight")
    assert (info.shape, info.numel, info.nbytes, info.ndim, info.storage) == (None, 0, 0, None, None)
    assert (info.dtype, info.device, info.requires_grad) == ("float32", "cpu", True)
    assert params.info("1.running_mean").shape is None
    assert "lazy" in str(params)
    assert params["0.weight"] is model[0].weight
    for read in (params.numpy, params.source.tensor):
        with pytest.raises(NotReadable) as caught:
            read("0.weight")
        assert str(caught.value) == (
            "Sequential: '0.weight' is lazy: it has no shape or values yet. Run the model once to set its shape."
        )
    model(torch.ones(2, 5))
    assert params.info("0.weight").shape == (3, 5)


def test_meta_parameters() -> None:
    params = tp.of(nn.Linear(1_000_000, 1_000_000, device="meta"))
    info = params.info("weight")
    assert (info.device, info.numel, info.nbytes) == ("meta", 10**12, 4 * 10**12)
    assert params.select(":meta").names == ["weight", "bias"]
    assert params.source.tensor("weight").device.type == "meta"
    with pytest.raises(NotReadable) as caught:
        params.numpy("weight")
    assert str(caught.value) == (
        "Linear: 'weight' is on the meta device, which holds no values. "
        "Allocate memory with model.to_empty(device='cpu'), then load or initialise the model."
    )


def test_storage_tells_what_shares_memory() -> None:
    memory = torch.zeros(10)
    model = nn.Module()
    model.a = nn.Parameter(memory[:6].view(2, 3))
    model.b = nn.Parameter(memory[4:])
    model.c = nn.Parameter(torch.zeros(10))
    model.t = nn.Parameter(model.a.detach().T)
    infos = tp.of(model).infos
    a, b, c, t = (infos[name].storage for name in "abct")
    assert a and b and c and t
    assert a.key == b.key == t.key != c.key
    assert (a.offset, a.stride, a.nbytes) == (0, (3, 1), 40)
    assert (b.offset, b.stride) == (4, (1,))
    assert t.stride == (1, 3)
    assert all(info.aliases == () for info in infos.values())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages_without_an_address_differ(device: str) -> None:
    model = nn.Module()
    shape = (0, 3) if device == "cpu" else (2, 3)
    model.a = nn.Parameter(torch.empty(shape, device=device))
    model.b = nn.Parameter(torch.empty(shape, device=device))
    model.c = nn.Parameter(model.a.detach().view(-1))
    a, b, c = (info.storage for info in tp.of(model).infos.values())
    assert a and b and c
    assert a.key == c.key != b.key


def test_tensors_are_the_models_own_and_arrays_are_copies() -> None:
    model = nn.Linear(3, 2)
    params = tp.of(model)
    array = params.numpy("weight")
    before = model.weight.tolist()
    model.weight.untyped_storage().resize_(0)  # as FSDP does with what it does not need just now
    assert array.tolist() == before
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 2
    model.weight.untyped_storage().resize_(24)
    tensor = params.source.tensor("weight")
    assert not tensor.requires_grad
    assert tensor.data_ptr() == model.weight.data_ptr()


class Refusing(torch.Tensor):
    """A tensor that answers no question."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ValueError(f"not for you: {func}")


class Wrapped(torch.Tensor):
    """A tensor made of another one, which nobody may compute with."""

    content: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Self:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.content = inner
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks the decorator
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].content)
        raise ValueError(f"not for you: {func}")


def odd_tensors() -> dict[str, Callable[[], Any]]:
    return {
        "refusing": lambda: torch.zeros(2, 3).as_subclass(Refusing),
        "wrapped": lambda: Wrapped(torch.zeros(2, 3)),
        "sparse": lambda: torch.zeros(2, 3).to_sparse(),
        "sparse rows": lambda: torch.zeros(2, 3).to_sparse_csr(),
        "subclass": lambda: type("Mine", (nn.Parameter,), {})(torch.zeros(2, 3)),
        "strided": lambda: torch.zeros(3, 2).T,
        "expanded": lambda: torch.zeros(1, 3).expand(2, 3),
        "quantised": lambda: torch.quantize_per_tensor(torch.zeros(2, 3), 0.1, 0, torch.qint8),
        "inference": lambda: torch.inference_mode()(torch.zeros)(2, 3),
    }


@pytest.mark.parametrize("name", odd_tensors())
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_a_tensor_of_any_kind_is_listed(name: str) -> None:
    model = nn.Module()
    model.register_buffer("before", torch.zeros(1))
    model._buffers["odd"] = odd_tensors()[name]()
    params = tp.of(model, buffers=True)
    info = params.info("odd")
    assert (info.shape, info.numel, info.device) == ((2, 3), 6, "cpu")
    assert (info.storage is None) == (name in ("wrapped", "sparse", "sparse rows"))
    assert "Error" not in repr(params)
    assert params["odd"] is model._buffers["odd"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors() -> None:
    model = nn.Module()
    model.register_buffer("rows", torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]))
    info = tp.of(model, buffers=True).info("rows")
    assert info.shape is None
    with pytest.raises(NotReadable, match=r"^Module: rows: "):
        tp.of(model, buffers=True).numpy("rows")


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = nn.Linear(3, 2)
    info = tp.of(model).info("weight")
    assert (info.shape, info.device, info.storage) == ((2, 3), "cpu", None)


@pytest.mark.usefixtures("group")
def test_distributed_tensors() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
    params = tp.of(model)
    info = params.info("weight")
    assert (info.shape, info.numel, info.storage) == ((2, 3), 6, None)
    assert "Error" not in repr(params)
    with pytest.raises(NotReadable) as caught:
        params.numpy("weight")
    assert str(caught.value) == (
        "Linear: weight: A DTensor keeps its values in other tensors. "
        "Convert it to a plain tensor first: full_tensor() of a DTensor, dequantize() of a quantised tensor."
    )


def test_within_a_transform_of_torch_func() -> None:
    seen = []

    class Looking(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((repr(tp.of(self)), tp.of(self).info("weight").shape))
            return super().forward(x)

    model = Looking(3, 2)

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(model, values, (torch.ones(1, 3),))
        return out.sum()

    values = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.grad(loss)(values)
    torch.func.vmap(loss)({name: torch.stack([value] * 4) for name, value in values.items()})
    assert [shape for _, shape in seen] == [(2, 3), (2, 3)]
    assert all("Error" not in text for text, _ in seen)


def test_no_operation_is_run_on_a_tensor() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Nothing(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own is not typed
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"{func} was run")

    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LSTM(2, 2), Tied())
    with Nothing():  # type: ignore[no-untyped-call]  # as above
        params = tp.of(model, buffers=True)
        assert "Error" not in repr(params)
        params._repr_html_()
        assert len(params) == len(params.infos)
        assert params.numel > 0
        assert params.select("**.bias").nbytes > 0
        assert params["0.weight"] is model[0].weight
        list(params())


# --- owners -----------------------------------------------------------------------------------


class Own(nn.Linear):
    pass


def test_the_owner_and_its_bases() -> None:
    params = tp.of(nn.Sequential(Own(2, 2), nn.BatchNorm2d(2)))
    info = params.info("0.weight")
    assert info.module == f"{__name__}.Own"
    assert info.bases == (f"{__name__}.Own", "torch.nn.modules.linear.Linear", "torch.nn.modules.module.Module")
    assert params.info("1.weight").bases[-3:] == (
        "torch.nn.modules.batchnorm._BatchNorm",
        "torch.nn.modules.batchnorm._NormBase",
        "torch.nn.modules.module.Module",
    )
    assert params.select("[module=Linear]").names == ["0.weight", "0.bias"]
    assert params.select(":norm").names == ["1.weight", "1.bias"]


def test_parametrizations() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3)))
    params = tp.of(model)
    assert params.names == ["0.bias", "0.parametrizations.weight.original"]
    before = [b.clone() for b in model.buffers()]
    assert "0.weight" not in params
    with pytest.raises(UnknownName) as caught:
        params["0.weight"]
    assert str(caught.value) == (
        "Sequential: No parameter is named '0.weight'. 0.weight is computed by a parametrization. "
        "Its parameter is '0.parametrizations.weight.original'."
    )
    # asking ran no parametrization: the power iteration of a spectral norm has not moved
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    parametrize.remove_parametrizations(model[0], "weight")
    assert params.names == ["0.bias", "0.weight"]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripted_and_traced() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4)))
    jit: Any = torch.jit
    for made in (jit.script(model), jit.trace(model.eval(), torch.ones(2, 3))):
        agrees_with_torch(made)
        params = tp.of(made)
        assert params.source.label == "Sequential"
        assert params.info("2.0.weight").module == "torch.nn.modules.linear.Linear"
        assert params.select(":norm").names == ["1.weight", "1.bias"]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripted_and_saved(tmp_path: Path) -> None:
    jit: Any = torch.jit
    jit.save(jit.script(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))), str(tmp_path / "m.pt"))
    agrees_with_torch(jit.load(str(tmp_path / "m.pt")))


def test_a_module_with_its_own_named_parameters() -> None:
    class Quiet(nn.Linear):
        def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
            yield "only", nn.Parameter(self.weight)

        def named_modules(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("the table reads the modules themselves")

    assert tp.of(nn.Sequential(Quiet(2, 2))).names == ["0.weight", "0.bias"]


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


# --- modules that are not whole ---------------------------------------------------------------


class Late(nn.Module):
    def __init__(self) -> None:
        self.early = repr(tp.of(self))
        super().__init__()


class Never(nn.Module):
    def __init__(self) -> None:
        pass


@pytest.mark.parametrize("inside", [False, True])
def test_before_the_init_of_pytorch(inside: bool) -> None:
    model: nn.Module = Never()
    if inside:
        model = nn.Sequential(nn.Linear(1, 1), Never())
    params = tp.of(model)
    message = (
        "The __init__ of Never has not called nn.Module.__init__, so it cannot hold parameters yet. "
        "Call super().__init__() first."
    )
    for use in (len, list, lambda p: p.infos, lambda p: p["1.x"], lambda p: next(p.select("**")()), lambda p: "a" in p):
        with pytest.raises(HalfBuilt) as caught:
            use(params)
        assert str(caught.value) == message
        assert isinstance(caught.value, AttributeError)
    assert repr(params) == f"<Parameters of {params.source.label}: HalfBuilt: {message}>"
    assert "HalfBuilt" in params._repr_html_()
    assert "HalfBuilt" in Late().early


def test_an_attribute_error_of_the_users_own_is_not_hidden() -> None:
    class Broken(nn.Module):
        def __getattribute__(self, name: str) -> Any:
            if name == "_modules":
                raise AttributeError(name)
            return super().__getattribute__(name)

    with pytest.raises(AttributeError, match="'Broken' object has no attribute '_modules'"):
        ModuleSource(nn.Sequential(Broken())).keys()


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
