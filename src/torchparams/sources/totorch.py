"""Conversion between arrays and torch tensors, without a copy where possible."""

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
    """Import torch.

    Args:
        why: The purpose, beginning with `to`.

    Raises:
        MissingDependency: torch is not installed.

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
    """Convert an array to a tensor of the same memory, or of a copy if torch cannot use the memory.

    Arrays are copied if they are read-only, unaligned, in a foreign byte order, or have strides that are negative or no
    multiple of the element size.

    Args:
        array: Array of any shape, with the dtype `info.dtype.numpy`.
        info: Info of the tensor whose values it holds.

    Raises:
        NotReadable: torch has no such dtype.
        LimitExceeded: The array is expanded and would have to be copied.

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
        # torch takes integers of the same size in place of ml_dtypes types, and can view them as its own dtype.
        return torch.from_numpy(array.view(f"u{array.itemsize}")).view(wanted)
    return torch.from_numpy(array)


def from_bytes(memory: Any, info: ParameterInfo, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """Make a tensor over writable memory, of any dtype that torch has.

    Args:
        memory: Bytes from the first to the last element.
        info: Info of the tensor whose values it holds.
        shape: Shape of the tensor.
        stride: Stride of each dimension, in elements.

    Raises:
        NotReadable: torch has no such dtype.

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
    """Convert a tensor to an array: of the same memory for tensors on the CPU, otherwise of a copy.

    The memory stays resizable, and freeing it makes the array invalid: see `torchparams.io.live`. bfloat16 and float8
    become ml_dtypes types. Lazy conjugation and negation are carried out.

    Args:
        tensor: Tensor of any shape and device, including a `Parameter` or a tensor that requires grad.

    Raises:
        NotReadable: The tensor is sparse, quantised, nested or on the meta device, or numpy lacks its dtype.

    >>> import torch
    >>> to_numpy(torch.tensor([1.5, -2.0], dtype=torch.bfloat16))
    array([1.5, -2], dtype=bfloat16)
    """
    import torch

    if dispatches(type(tensor)) and not tensor.is_nested:
        raise NotReadable(
            f"a {type(tensor).__name__} keeps its values in other tensors",
            hint="convert it to a plain tensor first: full_tensor() of a DTensor, dequantize() of a quantised tensor",
        )
    tensor = tensor.detach()
    if tensor.is_nested:
        raise NotReadable("a nested tensor has rows of different lengths and cannot become an array")
    if tensor.layout != torch.strided:
        raise NotReadable(f"a sparse tensor ({tensor.layout}) cannot become an array", hint="pass tensor.to_dense()")
    if tensor.is_quantized:
        raise NotReadable(
            f"a quantised tensor ({tensor.dtype}) cannot become an array",
            hint="pass tensor.dequantize() or tensor.int_repr()",
        )
    if tensor.device.type == "meta":
        raise NotReadable("a tensor on the meta device has a shape but no values")
    if _was_freed(tensor):
        raise NotReadable("its memory was freed, as in a sharded model between two uses", hint="gather the model first")
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
    """Whether a tensor has elements beyond the end of its memory."""
    if not tensor.numel():
        return False
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return end > tensor.untyped_storage().nbytes()


def _shareable(array: np.ndarray[Any, Any]) -> bool:
    """Whether torch can use the memory of the array directly and without a warning."""
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
