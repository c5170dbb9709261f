"""The memory of live tensors as arrays, without a trace on the tensors."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    from torchparams.dtypes import DType


def memory_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The array of a tensor's own memory; the tensor is on the CPU and of a type that numpy has.

    `tensor.numpy()` marks the memory as not resizable for ever, and FSDP cannot free it afterwards. This leaves it as
    it was. Freeing it leaves the array without memory: what is given to the user has to be a copy.

    >>> import torch
    >>> tensor = torch.tensor([1.0, 2.0])
    >>> memory_of(tensor).tolist(), tensor.untyped_storage().resizable()
    ([1.0, 2.0], True)
    """
    import numpy as np
    from torch._C import DisableTorchFunctionSubclass

    # A subclass may answer with code of its own.
    with DisableTorchFunctionSubclass():
        array: np.ndarray[Any, Any] = np.from_dlpack(tensor.detach())
    return array


def address_of(value: Any, dtype: DType, numel: int) -> int | None:
    """The address of the elements of a tensor or an array, where they lie in memory of this process as in a file.

    None of any other: on a device, sparse, conjugated, not contiguous, of a class of its own, whose memory was freed;
    and of one that has a different dtype or numel by now. The address is good as long as somebody holds the value and
    nobody frees its memory. Reading there leaves no trace on the value.

    Args:
        value: A tensor, or an array.
        dtype, numel: Its dtype and its count of elements, as they are known.

    >>> import torch
    >>> from torchparams.dtypes import DType
    >>> value = torch.ones(2, 3)
    >>> address_of(value, DType.of("float32"), 6) == value.data_ptr(), address_of(value.T, DType.of("float32"), 6)
    (True, None)
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _address_of_tensor(torch, value, dtype, numel)
    array: np.ndarray[Any, Any] = value
    if array.size != numel or not array.flags.c_contiguous or not array.dtype.isnative or array.dtype != dtype.numpy:
        return None
    address: int = array.__array_interface__["data"][0]
    return address


def _address_of_tensor(torch: Any, tensor: torch.Tensor, dtype: DType, numel: int) -> int | None:
    # There may be a hundred thousand of them: what is asked of each is asked in C, and once.
    cls = type(tensor)
    if cls is not torch.nn.Parameter and cls is not torch.Tensor:
        return None
    try:
        if (
            not tensor.is_cpu
            or tensor.dtype is not _torch_dtype(dtype)
            or tensor.numel() != numel
            or tensor.layout is not torch.strided
            or not tensor.is_contiguous()
            or tensor.is_neg()
            or (dtype.kind == "complex" and tensor.is_conj())
            or (tensor.storage_offset() + numel) * dtype.bits > tensor.untyped_storage().nbytes() * 8
        ):
            return None
        address: int
        try:
            address = tensor.const_data_ptr()  # type: ignore[attr-defined]  # of a lazy clone, data_ptr() makes a copy
        except AttributeError:
            address = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # a transform has wrapped it, and its memory is in other tensors
        return None
    return address if address or not numel else None


@cache
def _torch_dtype(dtype: DType) -> Any:
    import torch

    return getattr(torch, dtype.torch_name or "", None)


def read_only_copy(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy to give away of the memory of a live tensor; read-only, since writing to it would not change the tensor.

    >>> import numpy as np
    >>> read_only_copy(np.ones(2)).flags.writeable
    False
    """
    made = array.copy()
    made.flags.writeable = False
    return made
