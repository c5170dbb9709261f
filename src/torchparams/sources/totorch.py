"""Arrays to torch tensors and back, without a copy where possible."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams.dtypes import DType
from torchparams.errors import LimitExceeded, MissingDependency, NotReadable, TorchParamsError
from torchparams.io.live import memory_of
from torchparams.sources.live.tensors import dispatches

if TYPE_CHECKING:
    import numpy as np
    import torch

    from torchparams.info import ParameterInfo

_ML_DTYPES = frozenset(
    {"bfloat16", *(f"float8_{kind}" for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu"))}
)


def require_torch(why: str) -> Any:
    """The module torch.

    Args:
        why: What it is needed for, beginning with `to`.

    Raises:
        MissingDependency: It is not installed.

    >>> require_torch("to build a model").__name__
    'torch'
    """
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingDependency(f"torch is needed {why}", hint="pip install torch") from None


def from_numpy(array: np.ndarray[Any, Any], info: ParameterInfo) -> torch.Tensor:
    """The array as a tensor of the same memory; of a copy where torch cannot take the array as it is.

    Copied are arrays that are read-only, not aligned, in a foreign byte order, or with negative strides or strides
    that are no multiple of the element.

    Args:
        array: Any shape, of the type that `info.dtype.numpy` is.
        info: Of which tensor it holds the values.

    Raises:
        NotReadable: torch has no such type.
        LimitExceeded: An expanded array would have to be copied.

    >>> import numpy as np
    >>> from torchparams.testing import MemorySource
    >>> values = np.array([1.0, 2.0], np.float32)
    >>> from_numpy(values, MemorySource({"w": values}).infos()["w"])
    tensor([1., 2.])
    """
    require_torch(f"to give {info.name!r} as a tensor; as an array, params.numpy(name) gives it without")
    import torch

    wanted = _torch_type(info.dtype, info.name)
    if not _shareable(array):
        if 0 in array.strides and array.size > limits.EXPANDED_ELEMENTS:
            raise LimitExceeded(
                f"{info.name!r} is an expanded array of {array.size:,} elements, and would have to be copied",
                hint="if you trust it, raise torchparams.limits.EXPANDED_ELEMENTS",
            )
        array = array.astype(array.dtype.newbyteorder("="), order="C", copy=True)
    if info.dtype in _ML_DTYPES:
        # torch takes no type of ml_dtypes, but integers of that size, and sees its own type in them.
        return torch.from_numpy(array.view(f"u{array.itemsize}")).view(wanted)
    return torch.from_numpy(array)


def from_bytes(memory: Any, info: ParameterInfo, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """A tensor over memory that may be written to, of any type that torch has.

    Args:
        memory: The bytes from the first to the last element.
        info: Of which tensor it holds the values.
        shape: The tensor's shape.
        stride: Distances between neighbours along each dimension, in elements.

    Raises:
        NotReadable: torch has no such type.

    >>> import numpy as np
    >>> from torchparams.testing import MemorySource
    >>> info = MemorySource({"w": np.zeros((2, 2), np.int16)}).infos()["w"]
    >>> from_bytes(bytearray([1, 0, 2, 0, 3, 0]), info, (2, 2), (1, 1))
    tensor([[1, 2],
            [2, 3]], dtype=torch.int16)
    """
    require_torch(f"to give {info.name!r} as a tensor; as an array, params.numpy(name) gives it without")
    import torch

    wanted = _torch_type(info.dtype, info.name)
    if 0 in shape:
        return torch.empty(shape, dtype=wanted)
    return torch.frombuffer(memory, dtype=torch.uint8).view(wanted).as_strided(shape, stride)


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's values as an array: of the same memory for tensors on the CPU, of a copy for others.

    The memory stays resizable, and freeing it leaves the array without: see `torchparams.io.live`. bfloat16 and float8
    come as ml_dtypes' types. Lazy conjugation and negation are carried out.

    Args:
        tensor: Of any shape and device; a `Parameter`, and one that requires grad, too.

    Raises:
        NotReadable: It is sparse, quantised, nested, on the meta device, or of a type that numpy lacks.

    >>> import torch
    >>> to_numpy(torch.tensor([1.5, -2.0], dtype=torch.bfloat16))
    array([1.5, -2], dtype=bfloat16)
    """
    import torch

    if dispatches(type(tensor)) and not tensor.is_nested:
        raise NotReadable(
            f"it is a {type(tensor).__name__}, which keeps its values in other tensors",
            hint="make a plain tensor of it first: full_tensor() of a DTensor, dequantize() of a quantised one",
        )
    tensor = tensor.detach()
    if tensor.is_nested:
        raise NotReadable("a nested tensor has rows of different lengths, and no array")
    if tensor.layout != torch.strided:
        raise NotReadable(f"a sparse tensor ({tensor.layout}) has no array", hint="pass tensor.to_dense()")
    if tensor.is_quantized:
        raise NotReadable(
            f"a quantised tensor ({tensor.dtype}) has no array", hint="pass tensor.dequantize() or tensor.int_repr()"
        )
    if tensor.device.type == "meta":
        raise NotReadable("a tensor on the meta device has a shape and no values")
    if _was_freed(tensor):
        raise NotReadable(
            "its memory was freed, as a sharded model's is between two uses", hint="gather the model first"
        )
    try:
        dtype = DType.of(tensor.dtype)
    except TorchParamsError:
        raise NotReadable(f"numpy and ml_dtypes have no dtype for {tensor.dtype}") from None
    wanted = dtype.numpy
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    if dtype in _ML_DTYPES:
        return memory_of(tensor.view(torch.uint8 if dtype.itemsize == 1 else torch.int16)).view(wanted)
    return memory_of(tensor)


def _was_freed(tensor: torch.Tensor) -> bool:
    """Whether a tensor shows elements beyond the end of its memory."""
    if not tensor.numel():
        return False
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return end > tensor.untyped_storage().nbytes()


def _shareable(array: np.ndarray[Any, Any]) -> bool:
    """Whether torch can take the array's memory as it is, and without a warning."""
    flags = array.flags
    if not flags.writeable or not flags.aligned or not array.dtype.isnative:
        return False
    return all(step >= 0 and step % array.itemsize == 0 for step in array.strides)


def _torch_type(dtype: DType, name: str) -> torch.dtype:
    try:
        return dtype.torch
    except NotReadable as error:
        error.where = repr(name)
        raise
