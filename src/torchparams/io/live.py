"""Access the memory of live tensors without side effects on them."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    from torchparams.dtypes import DType


def memory_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Array over the memory of a tensor on the CPU, with a dtype that NumPy has.

    `tensor.numpy()` marks the storage as not resizable, which prevents FSDP from freeing it. This function does not. If
    the memory is freed, the array becomes invalid, so arrays for the user must be copies.

    >>> import torch
    >>> tensor = torch.tensor([1.0, 2.0])
    >>> memory_of(tensor).tolist(), tensor.untyped_storage().resizable()
    ([1.0, 2.0], True)
    """
    import numpy as np
    from torch._C import DisableTorchFunctionSubclass

    # A tensor subclass may override operations.
    with DisableTorchFunctionSubclass():
        array: np.ndarray[Any, Any] = np.from_dlpack(tensor.detach())
    return array


def address_of(value: Any, dtype: DType, numel: int) -> int | None:
    """Address of the elements of a tensor or array that is stored like in a file; otherwise None.

    None for tensors on a device, sparse, conjugated, non-contiguous, of a subclass, or with freed memory; and if dtype
    or numel changed. The address is valid as long as the object is alive and its memory is not freed. Reading there has
    no side effects.

    Args:
        value: Tensor or array.
        dtype, numel: Expected dtype and number of elements.

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
    # There may be 100,000 tensors: each check is a single C call.
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
    except (RuntimeError, NotImplementedError):  # wrapped by a transform; its memory is in other tensors
        return None
    return address if address or not numel else None


@cache
def _torch_dtype(dtype: DType) -> Any:
    import torch

    return getattr(torch, dtype.torch_name or "", None)


def read_only_copy(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Read-only copy of the memory of a live tensor, for the user: writing to it would not change the tensor.

    >>> import numpy as np
    >>> read_only_copy(np.ones(2)).flags.writeable
    False
    """
    made = array.copy()
    made.flags.writeable = False
    return made
