"""Names and owners of tensors in wrapped networks, and of tied tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize

import torchparams as tp
from torch_networks import Tied, agrees_with_torch, same_objects
from torchparams import limits
from torchparams.errors import UnknownName

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


# --- wrappers ---------------------------------------------------------------------------------


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))


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
