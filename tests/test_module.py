from __future__ import annotations

import copy
import inspect
import io
import os
import pickle
import subprocess
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrizations, parametrize

import torchparams as tp
from torchparams.errors import HalfBuilt, NameTaken, ReadOnlyTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Net(tp.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(self.fc(x_BI))
        return out


class Plain(nn.Module):
    """`Net` as PyTorch has it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(self.fc(x_BI))
        return out


class Attached(Plain):
    """`Plain`, attached."""

    def __init__(self) -> None:
        super().__init__()
        tp.attach(self)


def penalty(model: nn.Module) -> torch.Tensor:
    """A use of the parameters while the model runs."""
    return sum((p.square().sum() for p in model.parameters()), torch.zeros(())) + next(model.parameters()).sum()


class Penalised(Net):
    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        return super().forward(x_BI).sum() + penalty(self)


class AttachedPenalised(Attached):
    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        return super().forward(x_BI).sum() + penalty(self)


EACH = pytest.mark.parametrize("make", [Net, Attached])
EACH_PENALISED = pytest.mark.parametrize("make", [Net, Penalised, Attached, AttachedPenalised])

NAMES = ["fc.weight", "fc.bias", "body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"]
ONES = torch.ones(3, 4)


def twins(make: Callable[[], Any] = Net) -> tuple[Any, Plain]:
    net, plain = make(), Plain()
    plain.load_state_dict(net.state_dict())
    return net, plain


def same_objects(ours: Any, theirs: Any) -> bool:
    return list(map(id, ours)) == list(map(id, theirs))


# --- a mapping, and a method ------------------------------------------------------------------


@EACH
def test_uncalled_it_is_the_ordered_mapping(make: Callable[[], Any]) -> None:
    model = make()
    assert isinstance(model.parameters, tp.Parameters)
    assert list(model.parameters) == model.parameters.names == NAMES
    assert len(model.parameters) == 6
    assert model.parameters["fc.weight"] is model.fc.weight
    assert "fc.weight" in model.parameters
    assert "fc" not in model.parameters
    assert same_objects(model.parameters.values(), model.parameters())
    assert dict(model.parameters.items()) == dict(model.named_parameters())
    assert model.parameters.numel == 50
    assert model.parameters.select("**.bias").names == ["fc.bias", "body.0.bias", "body.2.bias"]
    assert (model.parameters.select("fc.*") | model.parameters.select("body.2.*")).numel == 30


@EACH
def test_called_it_is_pytorchs_iterator(make: Callable[[], Any]) -> None:
    net, plain = twins(make)
    ours, theirs = net.parameters(), plain.parameters()
    assert type(ours) is type(theirs) is types.GeneratorType
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert same_objects(net.parameters(), [p for _, p in net.named_parameters()])
    assert list(net.parameters(recurse=False)) == list(net.parameters(False)) == []
    assert inspect.signature(net.parameters).parameters.keys() == inspect.signature(plain.parameters).parameters.keys()
    with pytest.raises(TypeError, match="unexpected keyword argument 'prefix'"):
        net.parameters(prefix="p")


@EACH
def test_a_list_of_them_holds_references(make: Callable[[], Any]) -> None:
    model = make()
    copied = list(model.parameters())
    with torch.no_grad():
        copied[0].fill_(3.0)
    assert model.fc.weight.eq(3.0).all()


@EACH
def test_frozen_parameters_are_given_too(make: Callable[[], Any]) -> None:
    model = make()
    model.fc.requires_grad_(False)
    assert len(list(model.parameters())) == 6
    assert model.parameters.select(":trainable").names == NAMES[2:]


@EACH
def test_printing(make: type[Any]) -> None:
    model = make()
    model.fc.requires_grad_(False)
    assert str(model.parameters) == repr(model.parameters)
    assert repr(model.parameters).splitlines() == [
        f"{make.__name__} (module)",
        "name           shape   dtype    numel  size  trainable  module",
        "fc.weight      [4, 4]  float32     16  64 B  no         Linear",
        "fc.bias        [4]     float32      4  16 B  no         Linear",
        "body.0.weight  [4, 4]  float32     16  64 B  yes        Linear",
        "body.0.bias    [4]     float32      4  16 B  yes        Linear",
        "body.2.weight  [2, 4]  float32      8  32 B  yes        Linear",
        "body.2.bias    [2]     float32      2   8 B  yes        Linear",
        "6 tensors · 50 parameters · 200 B · 60.0% trainable",
    ]


@EACH
def test_through_the_class(make: Callable[[], Any]) -> None:
    model = make()
    assert same_objects(Net.parameters(model), model.parameters())
    assert same_objects(tp.Module.parameters(model, recurse=False), [])
    assert same_objects(nn.Module.parameters(model), model.parameters())
    assert inspect.signature(Net.parameters) == inspect.signature(nn.Module.parameters)


@EACH
def test_everything_else_is_pytorchs(make: type[Any]) -> None:
    own = {name for name in vars(tp.Module) if not name.startswith("__")}
    assert own == {"parameters", "register_parameter", "register_buffer", "add_module"}  # these refuse its name
    net, plain = twins(make)
    assert repr(net) == repr(plain).replace("Plain", make.__name__)
    assert vars(net).keys() - {"parameters"} == vars(plain).keys()
    assert list(net.state_dict()) == list(plain.state_dict()) == NAMES
    assert set(dir(net)) - {"__weakref__", "__dict__"} == set(dir(plain)) - {"__weakref__", "__dict__"}
    assert torch.equal(net(ONES), plain(ONES))


@EACH
def test_assignment_says_what_to_use(make: type[Any]) -> None:
    model: Any = make()
    with pytest.raises(TypeError) as caught:
        model.parameters["body.0.weight"] = torch.zeros(4, 4)
    assert isinstance(caught.value, ReadOnlyTable)
    assert str(caught.value) == (
        f"{make.__name__}: 'body.0.weight' cannot be set through a table of parameters. To change values: with "
        "torch.no_grad(): model.body[0].weight.copy_(…); to replace the parameter: model.body[0].weight = "
        "torch.nn.Parameter(…)."
    )
    with pytest.raises(TypeError) as caught:
        del model.parameters["fc.bias"]
    assert str(caught.value) == (
        f"{make.__name__}: 'fc.bias' cannot be deleted through a table of parameters. `del model.fc.bias`."
    )


@EACH
def test_it_is_never_stale(make: Callable[[], Any]) -> None:
    model: Any = make()
    table = model.parameters
    biases = table.select("**.bias")
    model.head = nn.Linear(2, 2)
    assert table.names == [*NAMES, "head.weight", "head.bias"]
    assert biases.names == ["fc.bias", "body.0.bias", "body.2.bias", "head.bias"]
    model.fc = nn.Linear(4, 4, bias=False)
    assert table["fc.weight"] is model.fc.weight
    assert biases.names == ["body.0.bias", "body.2.bias", "head.bias"]
    assert "fc.bias" not in biases
    del model.body
    assert table.names == ["fc.weight", "head.weight", "head.bias"]
    model.head.bias = None
    assert table.names == ["fc.weight", "head.weight"]
    assert biases.names == []


# --- as a plain method could be treated -------------------------------------------------------


def test_a_class_may_override_it() -> None:
    class Trainable(Net):
        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:  # type: ignore[override]  # as users do
            return (p for p in super().parameters(recurse) if p.requires_grad)

    model = Trainable()
    model.fc.requires_grad_(False)
    assert len(list(model.parameters())) == 4
    assert torch.optim.SGD(model.parameters(), lr=0.1).param_groups[0]["params"][0] is model.body[0].weight


def test_calling_follows_an_overridden_named_parameters() -> None:
    def last_only(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from list(nn.Module.named_parameters(self, *args, **kwargs))[-1:]

    ours = type("Ours", (Net,), {"named_parameters": last_only})()
    theirs = type("Theirs", (Plain,), {"named_parameters": last_only})()
    assert len(list(ours.parameters())) == len(list(theirs.parameters())) == 1
    assert ours.parameters.names == NAMES


def test_an_object_may_have_its_own() -> None:
    for model in twins():
        only: Any = lambda recurse=True: iter([model.fc.bias])  # noqa: B023, E731  # called in this turn of the loop
        model.parameters = only  # type: ignore[method-assign]  # as in PyTorch, a method of one object
        assert list(model.parameters()) == [model.fc.bias]
        assert sum(p.numel() for p in copy.deepcopy(model).parameters()) == 4
        del model.parameters
        assert len(list(model.parameters())) == 6


@EACH
def test_a_layer_cannot_take_its_name(make: Callable[[], Any]) -> None:
    for model in twins(make):
        with pytest.raises(KeyError, match="'parameters'"):
            model.add_module("parameters", nn.Linear(1, 1))
        with pytest.raises(KeyError, match="'parameters'"):
            model.register_buffer("parameters", torch.zeros(1))


@pytest.mark.parametrize("bases", [(tp.Module, nn.Linear), (nn.Linear, tp.Module)])
def test_several_base_classes(bases: tuple[type, ...]) -> None:
    model = type("Own", bases, {})(3, 2)
    assert model.parameters.names == ["weight", "bias"]
    assert model.parameters["bias"] is model.bias
    assert model(torch.ones(1, 3)).shape == (1, 2)
    assert same_objects(model.parameters(), [model.weight, model.bias])


class Stack(tp.Module, nn.Sequential):
    pass


def test_a_sequential_that_has_it() -> None:
    model: Any = Stack(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    assert model.parameters["0.bias"] is model[0].bias
    assert model.parameters["[2].bias"] is model[2].bias
    assert isinstance(model[:2].parameters, tp.Parameters)
    assert model[:2].parameters.names == ["0.weight", "0.bias"]


@EACH
def test_below_and_above_plain_modules(make: Callable[[], Any]) -> None:
    inner = make()
    model = nn.Sequential(nn.ModuleList([inner]), nn.ModuleDict({"a": make()}), nn.Linear(2, 2))
    assert len(list(model.parameters())) == 14
    assert tp.of(model)["0.0.fc.weight"] is inner.fc.weight
    assert inner.parameters.names == NAMES
    assert tp.of(model).info("1.a.fc.weight").module == "torch.nn.modules.linear.Linear"
    scale = tp.Module()
    scale.gain = nn.Parameter(torch.ones(1))
    assert scale.parameters.info("gain").module == "torchparams.module.Module"


@EACH
def test_tables_of_one_model_are_equal(make: Callable[[], Any]) -> None:
    model = make()
    assert model.parameters == model.parameters == tp.of(model)
    assert hash(model.parameters) == hash(model.parameters)
    assert model.parameters != make().parameters
    assert model.parameters.select("fc.*") == tp.of(model).select("fc.*")
    assert model.parameters.select("fc.*") != model.parameters


# --- optimizers -------------------------------------------------------------------------------


def optimizers() -> list[str]:
    found = {
        name: cls
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    return sorted(found)


class Embedded(tp.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=True)

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.table(x_BI[:, 0].long())
        return out


def test_there_are_optimizers() -> None:
    assert {"SGD", "Adam", "AdamW", "LBFGS", "SparseAdam", "Adafactor"} <= set(optimizers())


@pytest.mark.parametrize("name", optimizers())
@pytest.mark.parametrize("named", [False, True])
def test_every_optimizer(name: str, named: bool) -> None:
    torch.manual_seed(0)
    ours: Any = Embedded() if name == "SparseAdam" else Net()
    theirs = copy.deepcopy(ours)
    for model, listed in ((ours, ours.parameters), (theirs, lambda m=theirs: nn.Module.parameters(m))):
        if named:
            params: list[Any] = list(model.named_parameters())
        else:
            params = list(listed())
        if name == "Muon":  # takes nothing but matrices
            params = [p for p in params if (p[1] if named else p).ndim == 2]
        optimizer = getattr(torch.optim, name)(params, lr=0.01)

        def closure(model: Any = model, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(ONES).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own is not typed
            return loss

        before = closure().item()
        for _ in range(3):
            optimizer.step(closure)
        assert closure().item() < before
    for (name_a, a), (name_b, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name_a == name_b
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", optimizers())
def test_uncalled_no_optimizer_takes_it(name: str) -> None:
    optimizer: Any = getattr(torch.optim, name)
    for model in (Net(), Plain()):
        with pytest.raises(TypeError):
            optimizer(model.parameters, lr=0.01)


@EACH
def test_what_else_takes_parameters(make: Callable[[], Any]) -> None:
    net, plain = twins(make)
    for model in (net, plain):
        model(ONES).sum().backward()
    assert torch.equal(clip_grad_norm_(net.parameters(), 1.0), clip_grad_norm_(plain.parameters(), 1.0))
    vector = nn.utils.parameters_to_vector(net.parameters())
    nn.utils.vector_to_parameters(vector * 0, net.parameters())
    assert all(not p.any() for p in net.parameters())
    averaged = torch.optim.swa_utils.AveragedModel(net)
    averaged.update_parameters(net)
    assert len(list(averaged.parameters())) == 6


# --- copies and files -------------------------------------------------------------------------


@EACH
def test_a_deep_copy_has_its_own_table(make: Callable[[], Any]) -> None:
    model: Any = make()
    model.kept = model.parameters.select("fc.*")
    copied = copy.deepcopy(model)
    assert copied.parameters.names == NAMES
    assert copied.parameters["fc.weight"] is copied.fc.weight
    assert copied.parameters["fc.weight"] is not model.fc.weight
    assert torch.equal(copied.fc.weight, model.fc.weight)
    assert copied.kept["fc.weight"] is copied.fc.weight
    table = copy.deepcopy(model.parameters)
    assert type(table) is type(model.parameters)
    assert table["fc.weight"] is not model.fc.weight
    assert len(list(table())) == 6


def test_a_shallow_copy_has_its_own_table() -> None:
    model = Net()
    shallow = copy.copy(model)
    assert shallow.parameters["fc.weight"] is model.fc.weight
    shallow.__dict__["_modules"] = {}
    assert shallow.parameters.names == []
    assert model.parameters.names == NAMES


@EACH
def test_pickles(make: type[Any]) -> None:
    model = make()
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is make
    assert again.parameters.names == NAMES
    assert torch.equal(again.parameters["fc.weight"], model.fc.weight)
    table = pickle.loads(pickle.dumps(model.parameters))
    assert type(table) is type(model.parameters)
    assert table.names == NAMES
    picked = pickle.loads(pickle.dumps(model.parameters.select("fc.*")))
    assert picked.names == NAMES[:2]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).parameters.names == NAMES


@EACH
def test_state_dicts(make: Callable[[], Any]) -> None:
    net, plain = twins(make)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = make()
    assert other.load_state_dict(torch.load(file)) == plain.load_state_dict(other.state_dict())
    file.seek(0)
    other.load_state_dict(torch.load(file), assign=True)
    assert torch.equal(other(ONES), net(ONES))
    assert other.parameters["fc.weight"] is other.fc.weight


# --- what changes a module --------------------------------------------------------------------


@EACH
def test_methods_of_modules(make: Callable[[], Any]) -> None:
    model = make()
    model.requires_grad_(False)
    assert not any(info.requires_grad for info in model.parameters.infos.values())
    model.requires_grad_()
    model(ONES).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())

    def fill(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 2.0)

    model.apply(fill)
    assert model.parameters["body.2.weight"].eq(2.0).all()
    assert {info.dtype for info in model.half().parameters.infos.values()} == {"float16"}
    assert {info.dtype for info in model.to(torch.float64).parameters.infos.values()} == {"float64"}
    assert {info.device for info in model.to("meta").parameters.infos.values()} == {"meta"}
    assert {info.device for info in model.to_empty(device="cpu").parameters.infos.values()} == {"cpu"}
    assert model.train(False).training is False


def test_parametrizations() -> None:
    model = Net()
    parametrizations.weight_norm(model.fc)
    assert model.parameters.names[:3] == [
        "fc.bias",
        "fc.parametrizations.weight.original0",
        "fc.parametrizations.weight.original1",
    ]
    parametrize.remove_parametrizations(model.fc, "weight")
    assert sorted(model.parameters) == sorted(NAMES)

    class Scaled(tp.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(3))

    scaled = Scaled()
    parametrizations.orthogonal(scaled, "weight")  # gives the object a class of its own
    assert scaled.parameters.names == ["parametrizations.weight.original"]
    assert len(list(scaled.parameters())) == 1


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_modules() -> None:
    class Lazy(tp.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.LazyLinear(2)

        def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc(x_BI)
            return out

    model = Lazy()
    assert "lazy" in repr(model.parameters)
    assert model.parameters.info("fc.weight").shape is None
    model(ONES)
    assert model.parameters.info("fc.weight").shape == (2, 4)


# --- what wraps or transforms a module --------------------------------------------------------


@EACH_PENALISED
def test_compiled(make: Callable[[], Any]) -> None:
    model = make()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(ONES), model(ONES))
    compiled(ONES).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert same_objects(compiled.parameters(), model.parameters())
    assert tp.of(compiled).names == NAMES
    with torch.no_grad():
        model.fc.weight.zero_()
    assert torch.allclose(compiled(ONES), model(ONES))


@EACH_PENALISED
def test_compiled_in_place(make: Callable[[], Any]) -> None:
    model = make()
    expected = model(ONES)
    model.compile(backend="eager", fullgraph=True)
    assert torch.allclose(model(ONES), expected)
    assert model.parameters.names == NAMES


def test_the_mapping_within_a_compiled_function() -> None:
    class Mapped(Net):
        def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
            return super().forward(x_BI) * self.parameters["fc.weight"].sum()

    model = Mapped()
    assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(ONES), model(ONES))


@EACH_PENALISED
def test_exported(make: Callable[[], Any]) -> None:
    model = make()
    exported = torch.export.export(model, (ONES,))
    assert list(exported.state_dict) == NAMES
    assert torch.allclose(exported.module()(ONES), model(ONES))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripted_and_traced() -> None:
    model, jit = Net(), torch.jit
    made: Any
    for made in (jit.script(model), jit.trace(model, ONES), jit.trace(Penalised(), ONES)):  # type: ignore[no-untyped-call]  # torch's own
        assert [name for name, _ in made.named_parameters()] == NAMES
        assert tp.of(made).names == NAMES
        made(ONES)


@EACH
def test_symbolically_traced(make: Callable[[], Any]) -> None:
    model = make()
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(ONES), model(ONES))
    assert tp.of(graph).names == NAMES


@pytest.mark.parametrize("make", [Penalised, AttachedPenalised])
def test_torch_func(make: Callable[[], Any]) -> None:
    from torch.func import functional_call, grad, stack_module_state, vmap

    model = make()
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert functional_call(model, zeros, (ONES,)).item() == 0
    assert dict(model.parameters) == dict(model.named_parameters())  # they are back

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = functional_call(model, values, (ONES,))
        return out

    gradients = grad(loss)(dict(model.named_parameters()))
    model(ONES).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert torch.allclose(gradients[name], p.grad)
    stacked, _ = stack_module_state([make(), make()])
    assert vmap(loss)(stacked).shape == (2,)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'r'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@EACH
def test_distributed_data_parallel(make: Callable[[], Any]) -> None:
    model = make()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    before = wrapped(ONES).square().sum()
    before.backward()
    optimizer.step()
    assert wrapped(ONES).square().sum() < before
    assert tp.of(wrapped).names == model.parameters.names == NAMES
    assert same_objects(tp.of(wrapped)(), wrapped.parameters())


@pytest.mark.usefixtures("group")
@EACH
def test_fully_sharded(make: Callable[[], Any]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = make()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))  # changes the object's class
    assert model.parameters.names == NAMES
    assert "Error" not in repr(model.parameters)
    assert len(list(model.parameters())) == 6


def test_data_parallel() -> None:
    model = Net()
    wrapped = nn.DataParallel(model)
    assert torch.equal(wrapped(ONES), model(ONES))
    assert tp.of(wrapped).names == NAMES
    # what DataParallel does on each device: a new object with a copy of the attributes
    replica = model._replicate_for_data_parallel()  # type: ignore[no-untyped-call]  # torch's own
    assert type(replica) is Net
    assert replica.parameters.source != model.parameters.source
    assert len(list(replica.parameters())) == 6


# --- half built -------------------------------------------------------------------------------


class Forgetful(tp.Module):
    def __init__(self) -> None:
        self.shown = repr(self.parameters)


class Early(tp.Module):
    def __init__(self) -> None:
        self.seen = self.parameters
        super().__init__()
        self.fc = nn.Linear(1, 1)


MESSAGE = (
    "The __init__ of Forgetful has not called nn.Module.__init__, so it cannot hold parameters yet. "
    "Call super().__init__() first."
)


def test_before_super_init() -> None:
    model = Forgetful()
    assert model.shown == f"<Parameters of Forgetful: HalfBuilt: {MESSAGE}>"
    for use in (lambda: list(model.parameters), lambda: len(model.parameters), lambda: model.parameters["a"]):
        with pytest.raises(HalfBuilt) as caught:
            use()
        assert str(caught.value) == MESSAGE
    with pytest.raises(AttributeError):  # as in PyTorch, and by PyTorch's own code
        list(model.parameters())
    assert Early().seen.names == ["fc.weight", "fc.bias"]


def test_looking_from_a_debugger() -> None:
    class Failing(tp.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(1, 1)
            nothing: Any = object()
            self._parameters = {"no tensor": nothing}
            self._modules = {"fc": self.fc, "no module": nothing}

    model = Failing()
    assert repr(model.parameters).startswith("<Parameters of Failing: ")
    assert "Failing" in model.parameters._repr_html_()
    half = tp.Module.__new__(tp.Module)
    assert repr(half.parameters).startswith("<Parameters of Module: HalfBuilt: ")


def test_torch_is_imported_only_for_it() -> None:
    code = (
        "import sys, torchparams as tp\n"
        "assert 'torch' not in sys.modules\n"
        "tp.Module\n"
        "assert 'torch' in sys.modules and 'rich' not in sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_nothing_in_a_module_is_named_as_its_table() -> None:
    model = Net()
    attempts: dict[str, Callable[[], object]] = {
        "parameter": lambda: setattr(model, "parameters", nn.Parameter(torch.ones(1))),
        "buffer": lambda: model.register_buffer("parameters", torch.ones(1)),
        "module": lambda: model.add_module("parameters", nn.Linear(1, 1)),
    }
    for kind, attempt in attempts.items():
        with pytest.raises(NameTaken) as caught:
            attempt()
        assert isinstance(caught.value, KeyError)  # as PyTorch has it
        assert str(caught.value) == (
            f"Net: A {kind} cannot be named 'parameters', the name of the table. Choose another name."
        )
    assert list(model.parameters) == list(dict(nn.Module.named_parameters(model)))
