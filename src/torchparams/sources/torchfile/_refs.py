"""Descriptions of torch and numpy objects in a pickle: storages, tensors, arrays, dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams import dtypes
from torchparams.dtypes import DType
from torchparams.errors import shorten
from torchparams.io.packing import contiguous
from torchparams.sources.torchfile._pickle_values import Blob, Global, Malformed, Rebuilt, Reduced, Services

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

UINT8 = DType.of("uint8")
DIMENSIONS = 64  # numpy's limit
SIZE_LIMIT = (1 << 63) - 1  # torch counts elements and bytes in an int64

DTYPES = {dtype.torch_name: dtype for dtype in dtypes.ALL if dtype.torch_name}
_STORAGES = {
    **{
        f"{name}Storage": DType.of(dtype)
        for name, dtype in {
            "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
            "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
            "ComplexDouble": "complex128", "ComplexFloat": "complex64",
            "QInt8": "qint8", "QInt32": "qint32", "QUInt8": "quint8", "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4",
        }.items()
    },
    "UntypedStorage": UINT8,
    "_UntypedStorage": UINT8,
}  # fmt: skip
# Bits per element, for dtypes whose tensors pack several elements into one element of the storage.
_PACKED = {"quint4x2": 4, "quint2x4": 2}


class Region:
    """Location of the bytes of a storage.

    Attributes:
        start: First byte in the file, or None if the bytes are compressed.
        nbytes: Number of bytes, uncompressed.
        big_endian: Whether the bytes are big-endian.
        problem: Why the bytes must not be read, or None.
        expected: Whether `start` is only expected; it is checked when the bytes are read.
    """

    __slots__ = ("big_endian", "expected", "nbytes", "problem", "start")

    def __init__(
        self, start: int | None, nbytes: int, big_endian: bool, problem: str | None = None, expected: bool = False
    ) -> None:
        self.start, self.nbytes, self.big_endian, self.problem = start, nbytes, big_endian, problem
        self.expected = expected


class StorageRef:
    """Memory that tensors are views of.

    Attributes:
        key: Its name in the file.
        dtype: dtype that it was saved with; uint8 for untyped storages.
        numel: Number of elements.
        start: Offset in the memory named `key`, in elements.
        is_view: Whether it is a part of that memory, as in the legacy format.
        nbytes: Size in bytes.
        inline: The bytes, if the pickle itself contains them.
        big_endian: Whether `inline` is big-endian.
        region: Location of the bytes, after it has been looked up.
    """

    __slots__ = ("big_endian", "dtype", "inline", "is_view", "key", "nbytes", "numel", "region", "start")

    def __init__(self, key: str, dtype: DType, numel: int, start: int = 0, is_view: bool = False) -> None:
        self.key, self.dtype, self.numel, self.start, self.is_view = key, dtype, numel, start, is_view
        self.nbytes = numel * dtype.bits // 8
        self.inline: bytes | Blob | None = None
        self.big_endian = False
        self.region: Region | None = None


class TensorRef(Rebuilt):
    """A tensor: a strided view of a storage, or the reason why it has none.

    Attributes:
        storage: The memory, or None.
        dtype: dtype.
        offset: First element, in elements from the start of the storage.
        shape: Shape; None for a lazy parameter.
        stride: Strides in elements.
        requires_grad: Value recorded in the file.
        is_parameter: Whether it is an `nn.Parameter`.
        problem: Why its values cannot be read, or None.
        conj: Whether the values are the conjugates of the stored elements.
        neg: Whether the values are the negatives of the stored elements.
        state: Attributes of a tensor subclass, or None.
        meta: Whether it has no values by design.
        layout: Layout if it is not strided; see `ParameterInfo.layout`.
        ragged: Whether its rows have different lengths; the shape is then that of all values.
        nbytes: Size in bytes; None for the size of its elements.
        wrapper: Class name of a tensor that keeps its values in other tensors, which are in `state`.
        quantizer: Of a quantised tensor of torch, the scheme with its scales and zero points as the pickle has them.
    """

    # Class attributes are defaults; an instance overrides only those that differ.
    is_parameter = conj = neg = meta = requires_grad = ragged = False
    problem: str | None = None
    layout: str | None = None
    nbytes: int | None = None
    state: Any = None
    wrapper: Global | None = None
    quantizer: Any = None

    def __init__(
        self,
        storage: StorageRef | None,
        dtype: DType,
        offset: int,
        shape: tuple[int, ...] | None,
        stride: tuple[int, ...],
    ) -> None:
        self.storage, self.dtype, self.offset = storage, dtype, offset
        self.shape, self.stride = shape, stride

    def replaced(self, **changes: Any) -> TensorRef:
        """A copy with some attributes changed."""
        made = TensorRef.__new__(TensorRef)
        made.__dict__.update(self.__dict__, **changes)
        return made

    @property
    def bits(self) -> int:
        """Bits per element in the storage."""
        return self.dtype.bits if self.dtype.kind != "opaque" else _PACKED.get(self.dtype, self.dtype.bits)


class NumpyType(Rebuilt):
    """A numpy dtype: its `DType` (None if no tensor has it) and byte order."""

    __slots__ = ("big_endian", "dtype", "spelling")

    def __init__(self, dtype: DType | None, spelling: str) -> None:
        self.dtype, self.spelling, self.big_endian = dtype, spelling, False

    def set_state(self, machine: Services, state: Any) -> None:
        """`(version, byte order, …)`."""
        if type(state) is tuple and len(state) > 1:
            self.big_endian = state[1] in (">", b">")


class ArrayRef(Rebuilt):
    """A numpy array, completed by its state; `tensor` is None if no tensor could hold it."""

    __slots__ = ("tensor",)

    def __init__(self) -> None:
        self.tensor: TensorRef | None = None

    def set_state(self, machine: Services, state: Any) -> None:
        """`(version, shape, dtype, Fortran order, bytes)`."""
        if type(state) is tuple and len(state) == 5:
            self.complete(machine, state[1], state[2], bool(state[3]), state[4])

    def complete(self, machine: Services, shape: Any, dtype: Any, fortran: bool, raw: Any) -> None:
        """Set the description and the bytes of the array."""
        if type(raw) is str:  # Python 2 wrote bytes like this; they decode, and encode to the same bytes
            raw = machine.encoded(raw, "utf-8")
        if type(dtype) is not NumpyType or dtype.dtype is None or not isinstance(raw, bytes | Blob):
            return
        shape = sizes(shape, "the shape of a numpy array")
        numel = numel_of(shape)
        if numel * dtype.dtype.itemsize != len(raw):
            raise Malformed(f"a numpy array of {numel:,} × {dtype.dtype} with {len(raw):,} bytes")
        storage = StorageRef("", dtype.dtype, numel)
        storage.inline, storage.big_endian = raw, dtype.big_endian
        self.tensor = TensorRef(storage, dtype.dtype, 0, shape, contiguous(shape, fortran))


def sizes(value: Any, what: str) -> tuple[int, ...]:
    """`value` as a tuple of sizes.

    Raises:
        Malformed: `value` is not a tuple of sizes.
    """
    if type(value) is not tuple:
        raise Malformed(f"{what} is {show(value)}")
    if len(value) > DIMENSIONS:
        raise Malformed(f"{what} has {len(value):,} dimensions; the maximum is {DIMENSIONS}")
    for size in value:
        if type(size) is not int or not -1 << 63 <= size <= SIZE_LIMIT:
            raise Malformed(f"{what} holds {show(size)}")
    return value


def fits(offset: Any, shape: Any, stride: Any) -> bool:
    """Whether these are a valid offset, shape and strides: integers that torch could hold."""
    if type(shape) is not tuple or type(stride) is not tuple or not len(shape) == len(stride) <= DIMENSIONS:
        return False
    for number in (offset, *shape, *stride):
        if type(number) is not int or not -1 << 63 <= number <= SIZE_LIMIT:
            return False
    return offset >= 0  # type: ignore[no-any-return]  # an int, as was just seen


def numel_of(shape: Sequence[int]) -> int:
    """Number of elements.

    Raises:
        Malformed: The number is too large for torch.
    """
    numel = 1
    for size in shape:
        if size < 0:
            raise Malformed(f"a tensor of shape {show(tuple(shape))}")
        numel *= size
        if numel > SIZE_LIMIT:
            # A later zero does not make it legal: torch also multiplies in int64.
            raise Malformed(f"a tensor of shape {show(tuple(shape))}: more elements than can be counted")
    return numel


def show(value: Any) -> str:
    if type(value) is int and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, int | float | str | bytes) or value is None:
        return shorten(repr(value))
    if type(value) is tuple and all(type(item) is int for item in value[:64]):
        return shorten("(" + ", ".join(map(show, value[:64])) + ")")
    return f"a {type(value).__name__}"


# --- storages ----------------------------------------------------------------------------------


_PERSISTENT = Global("pickle", "persistent_load")


class Storages:
    """Create storages from persistent ids, one object for each memory and dtype."""

    def __init__(self) -> None:
        self.by_key: dict[str, StorageRef] = {}
        self.others: dict[str, StorageRef] = {}

    def __call__(self, pid: Any) -> Any:
        """The storage for a persistent id; the class for torch's `("module", class, …)`."""
        if type(pid) is not tuple or not pid:
            return Reduced(_PERSISTENT, (pid,))
        kind = pid[0]
        if (kind == "module" or kind == b"module") and len(pid) == 4:
            return pid[1]
        if kind != "storage" and kind != b"storage":
            return Reduced(_PERSISTENT, pid)
        if len(pid) not in (5, 6):
            raise Malformed(f"a storage described by {len(pid)} values, not 5 or 6")
        cls, key, numel = pid[1], pid[2], pid[4]
        view = pid[5] if len(pid) == 6 else None
        if type(key) is not str or len(key) > 255:
            if type(key) is not int or not -1 << 63 <= key < 1 << 64:
                raise Malformed(f"a storage whose key is {show(key)}")
            key = str(key)
        dtype = _STORAGES.get(cls.name) if type(cls) is Global else None
        if dtype is None:
            raise Malformed(f"a storage of the unknown class {cls if type(cls) is Global else show(cls)}")
        if type(numel) is not int or not 0 <= numel <= SIZE_LIMIT >> 4:
            raise Malformed(f"a storage of {show(numel)} elements")
        if view is None:
            return self._one(key, dtype, numel)
        # The legacy format has views of storages: (key of the view, first element, count).
        if type(view) is not tuple or len(view) != 3:
            raise Malformed("a view of a storage that is not described by three values")
        _, start, count = view
        if type(start) is not int or type(count) is not int or start < 0 or count < 0 or start + count > numel:
            raise Malformed(
                f"a view of elements {show(start)} and {show(count)} more of a storage of {numel:,} elements"
            )
        self._one(key, dtype, numel)
        return self._one(key, dtype, count, start, True)

    def _one(self, key: str, dtype: DType, numel: int, start: int = 0, is_view: bool = False) -> StorageRef:
        found = self.by_key.get(key)
        if found is None:
            found = self.by_key[key] = StorageRef(key, dtype, numel)
        elif is_view or found.dtype is not dtype or found.numel != numel:
            # As one text, whose hash is randomised: a file cannot make its keys collide.
            name = f"{dtype} {numel} {start} {is_view} {key}"
            found = self.others.get(name)
            if found is None:
                found = self.others[name] = StorageRef(key, dtype, numel, start, is_view)
        return found

    @staticmethod
    def refuse(pid: Any) -> Any:
        """Used where a pickle has no storages."""
        return Reduced(_PERSISTENT, (pid,))

    def __iter__(self) -> Iterator[StorageRef]:
        yield from self.by_key.values()
        yield from self.others.values()
