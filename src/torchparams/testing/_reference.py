"""References of the test suites: a source in memory, sample arrays, and minimal files."""

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
"""Dtypes of NumPy or ml_dtypes."""

TORCH_DTYPES = tuple(str(dtype) for dtype in ALL if dtype.numpy_name and dtype.torch_name)
"""Dtypes of NumPy (or ml_dtypes) and torch."""

SAFETENSORS_DTYPES = tuple(str(dtype) for dtype in ALL if dtype.code)
"""Dtypes of the safetensors format."""


class MemorySource(Source):
    """Arrays in memory: the simplest source, and the reference for others.

    Args:
        tensors: Arrays by name. An array under several names is one entry with aliases.
        metadata: Metadata of the source.
        label: Label for tables and messages.

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
        """Infos, in the order of the mapping."""
        return self._infos

    def numpy(self, name: str) -> Array:
        """The array itself, as a read-only view."""
        return self._arrays[name]

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor with a copy of the values."""
        return to_torch(self._arrays[name])

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata that the source was created with."""
        return self._metadata


def sample(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Array with all kinds of bit patterns of a dtype: NaN, infinities, zeros of both signs, subnormals.

    Args:
        dtype: Dtype of NumPy or ml_dtypes, in any spelling.
        shape: Shape of the array.
        seed: Seed; different seeds give different arrays.

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
    r"""Elements in C order, little-endian and packed, as in a safetensors file.

    Sub-byte elements start at the lowest bit of the first byte, so the first of two 4-bit elements is in the low half
    of its byte.

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
    r"""Minimal safetensors file of tensors, in order.

    Raises:
        KeyError: The format has no such dtype.

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
    """Torch tensor with the values and strides of an array, over a copy of its memory.

    Raises:
        NotReadable: torch has no such dtype.

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
    # as_strided does not support every dtype of ml_dtypes, but supports bytes.
    raw = array.view(f"V{array.itemsize}")
    flat = np.lib.stride_tricks.as_strided(raw, (extent,), (array.itemsize,))
    memory = torch.frombuffer(bytearray(flat.tobytes()), dtype=torch.uint8).view(wanted)
    return memory.as_strided(array.shape, strides)


def assert_identical(array: Array, expected: Array, what: str = "") -> None:
    """Fail unless both arrays have equal dtype, shape and bits."""
    assert isinstance(array, np.ndarray), what
    assert array.dtype == expected.dtype, what
    assert array.shape == expected.shape, what
    assert array.tobytes() == expected.tobytes(), what


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Elements of a torch tensor in C order, as bytes.

    >>> import torch
    >>> from torchparams.testing import tensor_bytes
    >>> tensor_bytes(torch.tensor([65, 66], dtype=torch.uint8).flip(0))
    b'BA'
    """
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
