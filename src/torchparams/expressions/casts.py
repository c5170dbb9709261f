"""Cast elements to another dtype: round to nearest, ties to even, and count the losses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from torchparams.dtypes import DType

    Array = np.ndarray[Any, Any]


_CODES = 16  # dtypes of up to this many bits are cast by a table of all values


@dataclass(frozen=True, slots=True)
class Losses:
    """Number of elements that a cast changed.

    Attributes:
        overflow: Finite values that became infinite, NaN, the largest value of the dtype, or (for integers) wrapped.
        underflow: Nonzero values that became zero.
        changed: Values that changed, including overflow and underflow. NaN that stays NaN does not count.

    >>> Losses(1, 0, 2) + Losses(0, 1, 1)
    Losses(overflow=1, underflow=1, changed=3)
    """

    overflow: int = 0
    underflow: int = 0
    changed: int = 0

    def __add__(self, other: Losses) -> Losses:
        return Losses(self.overflow + other.overflow, self.underflow + other.underflow, self.changed + other.changed)

    def __bool__(self) -> bool:
        return bool(self.overflow or self.underflow or self.changed)


def castable(old: DType, new: DType) -> bool:
    """Whether a cast between two dtypes is supported.

    Numbers can be cast to floats, integers and bools to integers, complex to complex. Floats cannot be cast to
    integers: that is quantisation, which needs a scale. Nothing can be cast to `float8_e8m0fnu`, a dtype for scales
    without sign or zero.

    >>> from torchparams.dtypes import DType
    >>> f32, i8, bf16 = DType.of("F32"), DType.of("I8"), DType.of("BF16")
    >>> castable(f32, bf16), castable(i8, f32), castable(f32, i8)
    (True, True, False)
    """
    if old == new:
        return True
    if old.numpy_name is None or new.numpy_name is None or new == "float8_e8m0fnu":
        return False
    targets = {
        "float": ("float",),
        "int": ("float", "int", "uint"),
        "uint": ("float", "int", "uint"),
        "bool": ("float", "int", "uint"),
        "complex": ("complex",),
    }
    return new.kind in targets.get(old.kind, ())


def cast_counting(values: Array, old: DType, new: DType) -> tuple[Array, Losses]:
    """Cast, and count the losses.

    >>> import numpy as np
    >>> from torchparams.dtypes import DType
    >>> cast_counting(np.array([1.0, 300.5], np.float32), DType.of("F32"), DType.of("BF16"))
    (array([1, 300], dtype=bfloat16), Losses(overflow=0, underflow=0, changed=1))
    """
    import numpy as np

    if old == "float32" and new == "bfloat16" and values.flags.c_contiguous and values.flags.aligned:
        from torchparams.sketch.decode import narrow

        narrowed = narrow(values)
        if narrowed is not None:
            return narrowed[0], Losses(*narrowed[1])
    if old.kind != "float" or old.bits > _CODES or new.bits > _CODES or exact(old, new):
        after = cast(values, old, new)
        return after, losses(values, after, old, new)
    made, kinds = _cast_table(old, new)
    codes = values.view(f"u{values.itemsize}")
    found = np.take(kinds, codes, mode="clip")
    lost = Losses()
    if found.any():
        over, under, other = (int(np.count_nonzero(found == kind)) for kind in (_OVER, _UNDER, _CHANGED))
        lost = Losses(over, under, over + under + other)
    return np.take(made, codes, mode="clip"), lost


_OVER, _UNDER, _CHANGED = 1, 2, 3


@lru_cache(maxsize=8)
def _cast_table(old: DType, new: DType) -> tuple[Array, Array]:
    """Cast of every value of a dtype, and its kind of loss; looking up is several times faster than casting."""
    import numpy as np

    width = max(old.bits, 8)
    codes = np.arange(1 << width, dtype=f"u{width // 8}") & ((1 << old.bits) - 1)
    before = codes.astype(f"u{width // 8}").view(old.numpy)
    after = cast(before, old, new)
    kinds = np.zeros(len(before), np.uint8)
    over, under, changed = _kinds(widen(before, old), widen(after, new), new)
    kinds[changed], kinds[under], kinds[over] = _CHANGED, _UNDER, _OVER
    return after, kinds


def _kinds(x: Array, y: Array, new: DType) -> tuple[Array, Array, Array]:
    """Masks of overflow, underflow and any change."""
    import numpy as np

    with np.errstate(all="ignore"):
        # Dtypes without infinity and NaN saturate at the largest value.
        most = _largest(new)
        over = np.isfinite(x) & (~np.isfinite(y) | ((abs(x) > most) & (abs(y) >= most)))
        under = (y == 0) & (x != 0)
        return over, under, (x != y) & ~(np.isnan(x) & np.isnan(y))


def cast(values: Array, old: DType, new: DType) -> Array:
    """Cast values to the dtype `new`, rounded to nearest, ties to even, as `torch.Tensor.to` does.

    Args:
        values: One-dimensional array of dtype `old`.
        old, new: Dtypes.

    >>> import numpy as np
    >>> from torchparams.dtypes import DType
    >>> cast(np.array([1.0, 1.00390625], np.float32), DType.of("F32"), DType.of("BF16"))
    array([1, 1], dtype=bfloat16)
    """
    import numpy as np

    if old == new:
        return values
    if new == "float32":
        return widen(values, old)
    if old.bits <= 16 and old.kind == "float" and new.bits != 64:
        values = widen(values, old)
    elif str(old) == "float64" and new.bits < 32:
        with np.errstate(all="ignore"):
            values = values.astype(np.float32)  # as torch does
    with np.errstate(all="ignore"):
        if new == "float8_e4m3fn":
            # This dtype has no infinity: torch saturates at the largest value; ml_dtypes gives NaN.
            values = np.clip(values, -_E4M3_MOST, _E4M3_MOST)
        return values.astype(new.numpy)


_E4M3_MOST = 448.0


def widen(values: Array, dtype: DType, out: Array | None = None) -> Array:
    """Widen values of at most 16 bits to float32, exactly, several times faster than `astype`.

    Args:
        values: One-dimensional array of `dtype`.
        dtype: Dtype of the values.
        out: Optional array for the result.

    >>> import numpy as np
    >>> from torchparams.dtypes import DType
    >>> bf16 = DType.of("BF16")
    >>> widen(np.array([0.5, -2.0]).astype(bf16.numpy), bf16)
    array([ 0.5, -2. ], dtype=float32)
    """
    import numpy as np

    if out is None:
        out = np.empty(len(values), np.float32)
    if dtype == "bfloat16":
        bits = out.view(np.uint32)
        np.copyto(bits, values.view(np.uint16))  # two vectorised steps
        bits <<= np.uint32(16)
    elif dtype.kind == "float" and dtype.bits <= 8:
        np.take(_table(dtype), values.view(np.uint8), mode="clip", out=out)
    else:
        with np.errstate(all="ignore"):
            np.copyto(out, values, casting="unsafe")
    return out


@lru_cache
def _table(dtype: DType) -> Array:
    """Every value of a dtype of at most 8 bits, as float32."""
    import numpy as np

    codes = np.arange(256, dtype=np.uint8) & np.uint8((1 << dtype.bits) - 1)
    with np.errstate(all="ignore"):
        return codes.view(dtype.numpy).astype(np.float32)


def losses(before: Array, after: Array, old: DType, new: DType) -> Losses:
    """Count the losses of `after = cast(before, old, new)`.

    >>> import numpy as np
    >>> from torchparams.dtypes import DType
    >>> f32, f16 = DType.of("F32"), DType.of("F16")
    >>> before = np.array([1.0, 70000.0, 1e-9, 0.1, np.inf, np.nan], np.float32)
    >>> losses(before, cast(before, f32, f16), f32, f16)
    Losses(overflow=1, underflow=1, changed=3)
    """
    import numpy as np

    if exact(old, new):
        return Losses()
    if new.kind in ("int", "uint"):
        changed = _other_integers(before, after)
        return Losses(changed, int(np.count_nonzero(changed_to_zero(before, after))), changed)
    if old.kind == "complex":
        part = "f4" if old.bits == 64 else "f8"
        into = "f4" if new.bits == 64 else "f8"
        before, after = before.view(part), after.view(into)
    if old.kind in ("int", "uint", "bool"):
        return _of_integers(before, after, new)
    wide = np.float64 if before.dtype.itemsize == 8 else np.float32
    with np.errstate(all="ignore"):
        x = before if before.dtype == wide else cast(before, old, _float32())
        y = _wide(after, new, wide)
        differs = x != y
    if not differs.any():
        return Losses()
    # Most casts change few values; only those need closer inspection.
    kinds = _kinds(x[differs], y[differs], new)
    return Losses(*(int(np.count_nonzero(kind)) for kind in kinds))


def count_losses(values: Array, old: DType, new: DType) -> Losses:
    """Count the losses of a cast without casting; for wider floats several times faster.

    Args:
        values: One-dimensional array of dtype `old`.
        old, new: Dtypes that `cast` supports, or complex dtypes.

    >>> import numpy as np
    >>> from torchparams.dtypes import DType
    >>> values = np.array([1.0, 70000.0, 1e-9, 0.1, np.inf, np.nan], np.float32)
    >>> count_losses(values, DType.of("F32"), DType.of("F16"))
    Losses(overflow=1, underflow=1, changed=3)
    """
    import numpy as np

    if exact(old, new):
        return Losses()
    if old.kind == new.kind == "complex":
        parts = _part(old), _part(new)
        return count_losses(values.view(parts[0].numpy), *parts)
    if str(old) not in ("float32", "float64") or str(new) not in _PARTS:
        return cast_counting(values, old, new)[1]
    # A value that is normal in the new dtype is exact if the fraction bits that the new dtype lacks are zero.
    fraction, kept = _PARTS[str(old)][1], _PARTS[str(new)][1]
    bits: Array = values.view(f"u{values.itemsize}")
    unsigned = bits.dtype.type
    low = unsigned((1 << (fraction - kept)) - 1)
    least, most = (bits.dtype.type(np.array(x, values.dtype).view(bits.dtype)) for x in _normal(new))
    changed = int(np.count_nonzero(bits & low))
    magnitude = bits & unsigned((1 << (old.bits - 1)) - 1)
    magnitude -= least  # smaller values wrap around to large ones
    others = magnitude > most - least
    if not others.any():
        return Losses(0, 0, changed)
    few = values[others]
    changed -= int(np.count_nonzero(bits[others] & low))
    return cast_counting(few, old, new)[1] + Losses(0, 0, changed)


def _part(dtype: DType) -> DType:
    """Dtype of the real and imaginary parts of a complex dtype."""
    from torchparams.dtypes import DType

    return DType.of({32: "float16", 64: "float32", 128: "float64"}[dtype.bits])


def _normal(dtype: DType) -> tuple[float, float]:
    """Smallest and largest value of a float dtype with the full fraction."""
    return 2.0 ** (2 - (1 << (_PARTS[str(dtype)][0] - 1))), _largest(dtype)


def changed_to_zero(before: Array, after: Array) -> Array:
    """Mask of nonzero values that became zero."""
    changed: Array = (before != 0) & (after == 0)
    return changed


def _other_integers(before: Array, after: Array) -> int:
    import numpy as np

    # Compare in the old dtype: a wrapped value differs there, unless only the sign was lost.
    back = after.astype(before.dtype)
    wrong = back != before
    if before.dtype.kind == "i" and after.dtype.kind == "u":
        wrong |= before < 0
    elif before.dtype.kind == "u" and after.dtype.kind == "i":
        wrong |= after < 0
    return int(np.count_nonzero(wrong))


def _of_integers(before: Array, after: Array, new: DType) -> Losses:
    import numpy as np

    with np.errstate(all="ignore"):
        y = after.astype(np.float64)
        x = before.astype(np.float64)
        over = ~np.isfinite(y) | ((abs(x) > _largest(new)) & (abs(y) >= _largest(new)))
        changed = (x != y) | over
        if before.dtype.itemsize == 8 and before.dtype.kind != "b":
            # Beyond 2**53, float64 lacks some integers: compare these as integers, unless y exceeds the integer range.
            beyond = y >= (2.0**64 if before.dtype.kind == "u" else 2.0**63)
            large = ~beyond & (abs(x) > 2**53) & np.isfinite(y)
            changed |= beyond
            changed[large] = y[large].astype(before.dtype) != before[large]
    return Losses(
        int(np.count_nonzero(over)), int(np.count_nonzero((x != 0) & (y == 0))), int(np.count_nonzero(changed))
    )


def _wide(after: Array, new: DType, wide: Any) -> Array:
    if new.bits <= 16:
        values = widen(after, new)
        return values if wide == values.dtype else values.astype(wide)
    return after.astype(wide)


def _float32() -> DType:
    from torchparams.dtypes import DType

    return DType.of("float32")


def reaches_infinity(values: Array, old: DType, new: DType) -> bool:
    """Whether the magnitude of a value exceeds the range of a narrower dtype; infinity does, NaN does not.

    >>> import numpy as np
    >>> from torchparams.dtypes import DType
    >>> f32, f16, bf16 = DType.of("F32"), DType.of("F16"), DType.of("BF16")
    >>> values = np.array([70000.0], np.float32)
    >>> reaches_infinity(values, f32, f16), reaches_infinity(values, f32, bf16)
    (True, False)
    """
    most = _largest(new)
    if most >= _largest(old) or not len(values):
        return False
    import numpy as np

    # fmax and fmin ignore NaN without a copy of the values.
    return bool(np.fmax.reduce(values) > most or np.fmin.reduce(values) < -most)


@lru_cache
def _largest(dtype: DType) -> float:
    import numpy as np

    if dtype.bits <= 8:
        table = _table(dtype)
        return float(table[np.isfinite(table)].max())
    if dtype == "bfloat16":
        return float(np.uint32(0x7F7F0000).view(np.float32))
    return float(np.finfo(dtype.numpy).max)


# Bits of exponent and fraction. A dtype holds every value of another with at most as many of both. Dtypes of up to 8
# bits also differ in the meaning of bit patterns, and are compared value by value.
_PARTS = {"float16": (5, 10), "bfloat16": (8, 7), "float32": (8, 23), "float64": (11, 52)}
_PARTS |= {"complex32": (5, 10), "complex64": (8, 23), "complex128": (11, 52)}


def exact(old: DType, new: DType) -> bool:
    """Whether every value of one dtype exists in another.

    >>> from torchparams.dtypes import DType
    >>> bf16, f16, f32 = DType.of("BF16"), DType.of("F16"), DType.of("F32")
    >>> exact(bf16, f32), exact(f32, bf16), exact(bf16, f16)
    (True, False, False)
    """
    if old == new or old.kind == "bool":
        return True
    if old.kind in ("int", "uint"):
        if new.kind == "float":
            return str(new) in _PARTS and old.bits <= _PARTS[str(new)][1] + 1
        return new.bits > old.bits if old.kind == "uint" else new.kind == "int" and new.bits >= old.bits
    if old.bits <= 8:
        # float8_e8m0fnu reaches 2**-127, a subnormal number in other dtypes with 8 exponent bits.
        return new.bits >= 32
    if str(new) not in _PARTS:
        return False
    return all(a <= b for a, b in zip(_PARTS[str(old)], _PARTS[str(new)], strict=True))
