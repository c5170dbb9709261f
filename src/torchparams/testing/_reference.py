"""What the suites hold others against: a source in memory, arrays of every kind, files written in the plainest way."""

from __future__ import annotations

import json
import math
import struct
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.dtypes import ALL, DType
from torchparams.info import ParameterInfo
from torchparams.sources.base import NO_METADATA, Source

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

Array = np.ndarray[Any, Any]

NUMPY_DTYPES = tuple(str(dtype) for dtype in ALL if dtype.numpy_name)
"""Every element type that numpy or ml_dtypes has."""

TORCH_DTYPES = tuple(str(dtype) for dtype in ALL if dtype.numpy_name and dtype.torch_name)
"""Every element type that both numpy (or ml_dtypes) and torch have."""

SAFETENSORS_DTYPES = tuple(str(dtype) for dtype in ALL if dtype.code)
"""Every element type of the safetensors format."""


class MemorySource(Source):
    """Arrays in memory: the simplest source there is, and the reference for the others.

    Args:
        tensors: Name → array. An array that stands under several names is one entry with aliases.
        metadata: What `metadata` gives.
        label: What tables and messages call it.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> from torchparams.testing import MemorySource
    >>> tp.of(MemorySource({"w": np.ones((2, 3), np.float32)})).numel
    6
    """

    format = "memory"

    def __init__(
        self, tensors: Mapping[str, Array], metadata: Mapping[str, Any] | None = None, label: str = "memory"
    ) -> None:
        self.label = label
        self._metadata = NO_METADATA if metadata is None else MappingProxyType(dict(metadata))
        self._arrays: dict[str, Array] = {}
        names: dict[int, list[str]] = {}
        for name, array in tensors.items():
            names.setdefault(id(array), []).append(name)
        infos: dict[str, ParameterInfo] = {}
        for first, *others in names.values():
            array = tensors[first]
            dtype = DType.of(array.dtype)
            self._arrays[first] = array.view()
            self._arrays[first].flags.writeable = False
            infos[first] = ParameterInfo(
                name=first,
                shape=array.shape,
                dtype=dtype,
                numel=array.size,
                nbytes=dtype.nbytes(array.size),
                device="cpu",
                kind="tensor",
                raw_name=first,
                aliases=tuple(others),
            )
        self._infos = MappingProxyType(infos)

    def __reduce__(self) -> tuple[Any, ...]:
        tensors = {name: self._arrays[i.name] for i in self._infos.values() for name in (i.name, *i.aliases)}
        return MemorySource, (tensors, dict(self._metadata), self.label)

    def infos(self) -> Mapping[str, ParameterInfo]:
        """The records, in the order of the mapping."""
        return self._infos

    def numpy(self, name: str) -> Array:
        """The array itself, as a read-only view."""
        return self._arrays[name]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor with a copy of the values."""
        return to_torch(self._arrays[name])

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the source was made with."""
        return self._metadata


def sample(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Array:
    """An array with every kind of bit pattern that `dtype` has: NaN, infinities, zeros of both signs, subnormals.

    Args:
        dtype: An element type that numpy or ml_dtypes has, in any spelling.
        shape: The array's shape.
        seed: Arrays of different seeds differ.

    >>> from torchparams.testing import sample
    >>> sample("bfloat16", (2, 3)).dtype.name
    'bfloat16'
    """
    kind = DType.of(dtype)
    count = math.prod(shape)
    draw = np.random.default_rng((seed, count))
    if kind == "bool":
        return draw.integers(0, 2, count, np.uint8).view(np.bool_).reshape(shape)
    if kind.bits < 8:
        return draw.integers(0, 1 << kind.bits, count, np.uint8).view(kind.numpy).reshape(shape)
    return draw.integers(0, 256, count * kind.itemsize, np.uint8).view(kind.numpy).reshape(shape)


def element_bytes(array: Array) -> bytes:
    r"""The elements in C order, little-endian, packed without gaps: what a safetensors file holds of them.

    Elements of less than a byte follow each other from the lowest bit of the first byte on, so that the first of
    two 4-bit elements is in the low half of their byte.

    >>> import numpy as np
    >>> from torchparams.testing import element_bytes
    >>> element_bytes(np.array([1, 2], ">i2"))
    b'\x01\x00\x02\x00'
    """
    bits = DType.of(array.dtype).bits
    if bits >= 8:
        order = array.dtype.byteorder
        return (array.byteswap() if order == ">" or (order == "=" and sys.byteorder == "big") else array).tobytes()
    codes = np.frombuffer(array.tobytes(), np.uint8)
    per_element = np.unpackbits(codes[:, None], axis=1, bitorder="little")[:, :bits]
    return np.packbits(per_element, bitorder="little").tobytes()


def safetensors_bytes(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    r"""A safetensors file of `tensors`, in their order, written in the plainest way.

    Raises:
        KeyError: The format has no such element type.

    >>> import numpy as np
    >>> from torchparams.testing import safetensors_bytes
    >>> safetensors_bytes({"w": np.array([7], np.uint8)})[8:]
    b'{"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}    \x07'
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    parts: list[bytes] = []
    start = 0
    for name, array in tensors.items():
        data = element_bytes(array)
        parts.append(data)
        header[name] = {
            "dtype": DType.of(array.dtype).code,
            "shape": list(array.shape),
            "data_offsets": [start, start + len(data)],
        }
        start += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def to_torch(array: Array) -> torch.Tensor:
    """A torch tensor with the array's values and strides, of a copy of the memory they lie in.

    Raises:
        NotReadable: torch has no such element type.

    >>> import numpy as np
    >>> from torchparams.testing import to_torch
    >>> to_torch(np.zeros((2, 3), np.float32).T).stride()
    (1, 3)
    """
    import torch

    dtype = DType.of(array.dtype)
    wanted = dtype.torch
    strides = [step // max(array.itemsize, 1) for step in array.strides]
    if array.size == 0:
        return torch.empty(array.shape, dtype=wanted)
    extent = 1 + sum((size - 1) * step for size, step in zip(array.shape, strides, strict=True))
    # as_strided does not understand every type of ml_dtypes; it does understand bytes.
    raw = array.view(f"V{array.itemsize}")
    flat = np.lib.stride_tricks.as_strided(raw, (extent,), (array.itemsize,))
    memory = torch.frombuffer(bytearray(flat.tobytes()), dtype=torch.uint8).view(wanted)
    return memory.as_strided(array.shape, strides)


def assert_identical(array: Array, expected: Array, what: str = "") -> None:
    """Fail unless both have one dtype, one shape and the same bits."""
    assert isinstance(array, np.ndarray), what
    assert array.dtype == expected.dtype, what
    assert array.shape == expected.shape, what
    assert array.tobytes() == expected.tobytes(), what


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The elements of a torch tensor in C order, as its memory holds them.

    >>> import torch
    >>> from torchparams.testing import tensor_bytes
    >>> tensor_bytes(torch.tensor([65, 66], dtype=torch.uint8).flip(0))
    b'BA'
    """
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
