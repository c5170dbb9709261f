"""Tensors of every kind in a network, and networks that are not whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import pytest
import torch
from torch import nn

import torchparams as tp
from torch_networks import Odd, Tied, same_objects
from torchparams.errors import HalfBuilt, NotReadable
from torchparams.sources.live.module import ModuleSource

if TYPE_CHECKING:
    from collections.abc import Callable


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
