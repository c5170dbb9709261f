"""Dtypes of checkpoints, with their spellings in torch, NumPy and safetensors.

NumPy, ml_dtypes and torch are imported only when one of their dtypes is requested.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.errors import NotReadable, TorchParamsError

if TYPE_CHECKING:
    import numpy as np
    import torch


class DType(str):
    """Dtype of elements: a string (torch's spelling) that also knows its size.

    Attributes:
        bits: Bits per element.
        kind: `float`, `int`, `uint`, `bool`, `complex` or `opaque` (quantised and packed dtypes).
        code: Spelling in safetensors (`BF16`), or None.
        numpy_name: Name in NumPy or ml_dtypes, or None.
        torch_name: Name in torch, or None.

    >>> DType.of("BF16"), DType.of("torch.bfloat16").bits, DType.of("bf16") == "bfloat16"
    ('bfloat16', 16, True)
    """

    bits: int
    kind: str
    code: str | None
    numpy_name: str | None
    torch_name: str | None

    @staticmethod
    def of(spelling: object) -> DType:
        """Dtype for a spelling of torch, NumPy or safetensors, or for one of their dtype objects.

        Raises:
            TorchParamsError: The spelling is unknown.
        """
        if isinstance(spelling, DType):
            return spelling
        text = spelling if isinstance(spelling, str) else getattr(spelling, "name", None) or str(spelling)
        found = BY_SPELLING.get(text) or BY_SPELLING.get(text.removeprefix("torch.").lower())
        if found is None:
            raise TorchParamsError(
                f"unknown dtype {text!r}",
                hint="use a spelling of torch, numpy or safetensors, such as bfloat16, bf16, float32, F32, "
                "float8_e4m3fn, int64",
            )
        return found

    @property
    def itemsize(self) -> int:
        """Bytes per element; 0 for sub-byte dtypes, whose elements are packed."""
        return self.bits // 8

    def nbytes(self, numel: int) -> int:
        """Bytes of `numel` contiguous elements (packed, rounded up to a whole byte)."""
        return (numel * self.bits + 7) // 8

    @property
    def numpy(self) -> np.dtype[Any]:
        """NumPy or ml_dtypes dtype.

        Raises:
            NotReadable: Neither package has this dtype.
        """
        if self.numpy_name is None:
            raise NotReadable(f"numpy and ml_dtypes have no dtype for {self}")
        import numpy as np

        if not hasattr(np, self.numpy_name):
            import ml_dtypes

            made: np.dtype[Any] = np.dtype(getattr(ml_dtypes, self.numpy_name))
            return made
        return np.dtype(self.numpy_name)

    @property
    def torch(self) -> torch.dtype:
        """torch dtype.

        Raises:
            NotReadable: The installed torch has no such dtype.
        """
        import torch

        found = getattr(torch, self.torch_name or "", None)
        if not isinstance(found, torch.dtype):
            raise NotReadable(f"torch {torch.__version__} has no dtype for {self}")
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return DType.of, (str(self),)


_SAME = "="  # same name as in torch


def _make(name: str, bits: int, kind: str, code: str | None, numpy_name: str | None, torch_name: str | None) -> DType:
    made = DType(name)
    made.bits, made.kind, made.code = bits, kind, code
    made.numpy_name = name if numpy_name == _SAME else numpy_name
    made.torch_name = name if torch_name == _SAME else torch_name
    return made


# fmt: off
ALL: tuple[DType, ...] = tuple(_make(*row) for row in (
    # name                 bits kind      safetensors    numpy             torch
    ("bool",                 8, "bool",    "BOOL",        _SAME,            _SAME),
    ("uint8",                8, "uint",    "U8",          _SAME,            _SAME),
    ("int8",                 8, "int",     "I8",          _SAME,            _SAME),
    ("uint16",              16, "uint",    "U16",         _SAME,            _SAME),
    ("int16",               16, "int",     "I16",         _SAME,            _SAME),
    ("uint32",              32, "uint",    "U32",         _SAME,            _SAME),
    ("int32",               32, "int",     "I32",         _SAME,            _SAME),
    ("uint64",              64, "uint",    "U64",         _SAME,            _SAME),
    ("int64",               64, "int",     "I64",         _SAME,            _SAME),
    ("float16",             16, "float",   "F16",         _SAME,            _SAME),
    ("bfloat16",            16, "float",   "BF16",        _SAME,            _SAME),
    ("float32",             32, "float",   "F32",         _SAME,            _SAME),
    ("float64",             64, "float",   "F64",         _SAME,            _SAME),
    ("float8_e4m3fn",        8, "float",   "F8_E4M3",     _SAME,            _SAME),
    ("float8_e5m2",          8, "float",   "F8_E5M2",     _SAME,            _SAME),
    ("float8_e4m3fnuz",      8, "float",   "F8_E4M3FNUZ", _SAME,            _SAME),
    ("float8_e5m2fnuz",      8, "float",   "F8_E5M2FNUZ", _SAME,            _SAME),
    ("float8_e8m0fnu",       8, "float",   "F8_E8M0",     _SAME,            _SAME),
    ("float6_e2m3fn",        6, "float",   "F6_E2M3",     _SAME,            None),
    ("float6_e3m2fn",        6, "float",   "F6_E3M2",     _SAME,            None),
    ("float4_e2m1fn",        4, "float",   "F4",          _SAME,            None),
    ("complex32",           32, "complex", None,          None,             _SAME),
    ("complex64",           64, "complex", "C64",         _SAME,            _SAME),
    ("complex128",         128, "complex", None,          _SAME,            _SAME),
    ("float4_e2m1fn_x2",     8, "opaque",  None,          None,             _SAME),
    ("qint8",                8, "opaque",  None,          None,             _SAME),
    ("quint8",               8, "opaque",  None,          None,             _SAME),
    ("qint32",              32, "opaque",  None,          None,             _SAME),
    ("quint4x2",             8, "opaque",  None,          None,             _SAME),
    ("quint2x4",             8, "opaque",  None,          None,             _SAME),
    *((f"bits{b}", max(b, 8), "opaque", None, None, _SAME) for b in (8, 16)),
    *((f"bits{p}", 8, "opaque", None, None, _SAME) for p in ("1x8", "2x4", "4x2")),
    # torch stores each sub-byte integer in a byte
    *((f"{s}int{b}", 8, "opaque", None, None, _SAME) for s in ("", "u") for b in range(1, 8)),
))
# fmt: on

BY_CODE: dict[str, DType] = {dtype.code: dtype for dtype in ALL if dtype.code}
"""Dtypes by their spelling in safetensors."""

_NICKNAMES = {
    "half": "float16",
    "float": "float32",
    "double": "float64",
    "short": "int16",
    "int": "int32",
    "long": "int64",
    "byte": "uint8",
    "char": "int8",
    "bool_": "bool",
    "chalf": "complex32",
    "cfloat": "complex64",
    "cdouble": "complex128",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}
_BY_NAME: dict[str, DType] = {str(dtype): dtype for dtype in ALL}
BY_SPELLING: dict[str, DType] = {
    **{code.lower(): dtype for code, dtype in BY_CODE.items()},
    **{nick: _BY_NAME[name] for nick, name in _NICKNAMES.items()},
    **BY_CODE,
    **_BY_NAME,
}
"""Every spelling → type."""
