"""The memory of live tensors as arrays, without a trace on the tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch


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


def read_only_copy(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy to give away of the memory of a live tensor; read-only, since writing to it would not change the tensor.

    >>> import numpy as np
    >>> read_only_copy(np.ones(2)).flags.writeable
    False
    """
    made = array.copy()
    made.flags.writeable = False
    return made
