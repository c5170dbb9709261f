"""Work state of a thread that computes expressions: open files, reusable memory, prepared results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from torchparams.errors import NotReadable
from torchparams.expressions.base import Work
from torchparams.expressions.casts import Losses
from torchparams.io.blocks import Block
from torchparams.io.files import Files, OpenFiles
from torchparams.io.reader import gather

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy as np

    from torchparams.expressions.base import Expression, Readable, Stored

    Array = np.ndarray[Any, Any]

GROUP = 4
"""Ranges of sub-byte elements start at multiples of this count, which fills whole bytes for 4 and 6 bits."""

_TILES = 8
"""Number of expressions with a cached tile."""

BLOCK_BYTES = 1 << 19
"""Bytes of an operand per read: small enough to stay in the L2 cache with all intermediate results."""


class ThreadWork(Work):
    """Reads blocks of stored tensors, and holds prepared results and losses of expressions.

    Args:
        files: File opener that detects changes.
        block_bytes: Bytes of an operand per read.
        strict: Whether scales that are not finite raise an error, because the values are written.

    Attributes:
        block: Elements per block of the current expression.
        losses: Losses of casts, by `id` of the expression.
    """

    def __init__(self, files: Files | None = None, block_bytes: int = BLOCK_BYTES, *, strict: bool = False) -> None:
        self.strict = strict
        self._files = Files() if files is None else files
        self._own = files is None
        self._open = OpenFiles(self._files)
        self._block_bytes = block_bytes
        self._arrays: dict[int, Array] = {}
        self._array_of: Callable[[Stored], Array] | None = None
        self._mapped: list[Readable] = []
        self._kept: tuple[str, Array] | None = None
        self._prepared: dict[int, Any] = {}
        self._latest: dict[int, tuple[Expression, int, Array]] = {}
        self._owners: dict[int, int] = {}
        self._scratch: dict[tuple[int, int], Array] = {}
        self.block = block_bytes
        self.losses: dict[int, Losses] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._own:
            self._files.check()

    def close(self) -> None:
        """Close files, and release arrays."""
        self._open.close()
        self._let_go()
        self._scratch.clear()
        self._kept = None

    def _let_go(self) -> None:
        # Touched pages of a mapped file count as memory of this process until they are unmapped.
        for source in self._mapped:
            source.close()
        self._mapped.clear()
        self._arrays.clear()

    # --- called by engines -------------------------------------------------------------------------

    def begin(
        self,
        x: Expression,
        block: int | None = None,
        *,
        prepared: Mapping[int, Any] | None = None,
        array_of: Callable[[Stored], Array] | None = None,
    ) -> None:
        """Start an expression: prepare it, and reuse the memory of the previous one.

        Args:
            x: Expression to compute.
            block: Elements per block.
            prepared: The `state` of another `Work` that prepared the same expression.
            array_of: Function that returns the array of a stored tensor without a file range, instead of its source;
                used to share arrays between threads.
        """
        self.block = block_of(x, self._block_bytes) if block is None else block
        self._owners.clear()
        self._latest.clear()
        self._let_go()
        self._array_of = array_of
        self._prepared = {} if prepared is None else dict(prepared)
        if prepared is None:
            for part in x.walk():
                state = part.prepare(self)
                if state is not None:
                    self._prepared[id(part)] = state

    @property
    def state(self) -> Mapping[int, Any]:
        """See `Work.state`."""
        return self._prepared

    # --- called by expressions ---------------------------------------------------------------------

    def blocks(self, x: Expression, *, begin: bool = False) -> Iterator[Array]:
        """See `Work.blocks`."""
        if begin:
            self.begin(x)
        step = max(self.block // x.granule, 1) * x.granule if x.granule <= self.block else self.block
        for start in range(0, x.numel, step):
            yield x.compute(start, min(start + step, x.numel), self)

    def prepared(self, x: Expression) -> Any:
        """See `Work.prepared`."""
        return self._prepared[id(x)]

    def scratch(self, x: Expression, slot: int, count: int, dtype: np.dtype[Any]) -> Array:
        """See `Work.scratch`."""
        import numpy as np

        key = self._owners.setdefault(id(x), len(self._owners)), slot
        found = self._scratch.get(key)
        if found is None or found.nbytes < count * dtype.itemsize:
            found = self._scratch[key] = np.empty(count * dtype.itemsize, np.uint8)
        return found[: count * dtype.itemsize].view(dtype)

    def compute_into(self, x: Expression, start: int, stop: int, out: Array) -> None:
        """See `Work.compute_into`."""
        mark = len(self._owners)
        values = x.compute(start, stop, self, out)
        if values is not out:
            out[...] = values
        while len(self._owners) > mark:
            self._owners.popitem()

    def latest(self, x: Expression, key: int, compute: Callable[[], Array]) -> Array:
        """See `Work.latest`."""
        kept = self._latest.get(id(x))
        if kept is None or kept[1] != key:
            self._latest.pop(id(x), None)
            if len(self._latest) == _TILES:
                self._latest.pop(next(iter(self._latest)))
            kept = self._latest[id(x)] = x, key, compute()
        return kept[2]

    def count(self, x: Expression, lost: Losses) -> None:
        """See `Work.count`."""
        if lost:
            self.losses[id(x)] = self.losses.get(id(x), Losses()) + lost

    def take_losses(self) -> Losses:
        """Losses of all casts since the last call."""
        found = sum(self.losses.values(), Losses())
        self.losses.clear()
        return found

    def read(self, leaf: Stored, start: int, stop: int, into: Array | None = None) -> Array:
        """See `Work.read`."""
        import numpy as np

        if leaf.place is None:
            if leaf.dtype.numpy_name is None:
                return self.read_bytes(leaf, leaf.dtype.nbytes(start), leaf.dtype.nbytes(stop))
            array = self._array(leaf)
            if array.flags.c_contiguous and array.dtype.isnative:
                found: Array = array.reshape(-1)[start:stop]
                return found
            out = self.scratch(leaf, 0, stop - start, array.dtype.newbyteorder("=")) if into is None else into
            if array.dtype.isnative and array.itemsize in (1, 2, 4, 8):  # integers copy faster
                gather(array.view(f"u{array.itemsize}"), out.view(f"u{array.itemsize}"), start, stop)
            else:
                gather(array, out, start, stop)
            return out
        if leaf.dtype.bits >= 8:
            out = self.scratch(leaf, 0, stop - start, leaf.dtype.numpy) if into is None else into
            self._fill(leaf, out.view(np.uint8), start * leaf.dtype.itemsize)
            return out
        from torchparams.io.packing import unpack

        first = start - start % GROUP
        begin, end = first * leaf.dtype.bits // 8, leaf.dtype.nbytes(stop)
        packed = self.scratch(leaf, 0, end - begin, np.dtype(np.uint8))
        self._fill(leaf, packed, begin)
        return unpack(packed, leaf.dtype, (stop - first,))[start - first :]

    def _fill(self, leaf: Stored, memory: Array, begin: int) -> None:
        assert leaf.place is not None
        self._open.read(leaf.place.file, memory.data.cast("B"), leaf.place.start + begin, leaf.info.name)

    def read_bytes(self, x: Expression, start: int, stop: int) -> Array:
        """See `Work.read_bytes`."""
        import numpy as np

        (leaf,) = x.leaves()
        if leaf.place is not None:
            memory = self.scratch(x, 0, stop - start, np.dtype(np.uint8))
            self._fill(leaf, memory, start)
            return memory
        array = self._arrays.get(id(leaf))
        if array is None:
            array = self._arrays[id(leaf)] = _packed_bytes(leaf)
        return np.ascontiguousarray(array[start:stop])

    def _array(self, leaf: Stored) -> Array:
        array = self._arrays.get(id(leaf))
        if array is None and self._array_of is not None:
            array = self._arrays[id(leaf)] = self._array_of(leaf)
        if array is None:
            # Views of one compressed storage share the decompressed copy while one of them is in use.
            storage = leaf.info.storage
            if self._kept is not None and (storage is None or storage.key != self._kept[0]):
                self._kept = None
            array = self._arrays[id(leaf)] = leaf.source.numpy(leaf.info.name)
            if leaf.source.files:
                self._mapped.append(leaf.source)
            if storage is not None:
                self._kept = storage.key, array
        return array


def block_of(x: Expression, block_bytes: int = BLOCK_BYTES, most: int | None = None) -> int:
    """Elements per block of an expression: a multiple of its granule if possible, always a multiple of `GROUP`.

    Args:
        x: Expression.
        block_bytes: Bytes of an operand per read.
        most: Memory limit for a block with all intermediate results, in bytes.
    """
    widest = max((leaf.dtype.bits for leaf in x.leaves()), default=32)
    count = max(block_bytes * 8 // max(widest, x.dtype.bits, 8), 1)
    if most is not None:
        count = min(count, max(most // max(x.footprint, 1), 1))
    count = max(count // GROUP, 1) * GROUP
    granule = max(x.granule, *(part.granule for part in x.walk()))
    if granule <= count and granule % GROUP == 0:
        count = count // granule * granule
    return count


def as_bytes(values: Array, x: Expression) -> memoryview:
    """Bytes of computed elements as in a file, packed."""
    import numpy as np

    if x.dtype.bits < 8 and values.dtype != np.uint8:  # otherwise already packed
        from torchparams.io.packing import pack

        return pack(values, x.dtype).data
    return np.ascontiguousarray(values).view(np.uint8).data


def computed_block(x: Expression, start: int, stop: int, work: Work) -> Block:
    """Compute a range of an expression as a block."""
    return Block(x.dtype, start, stop, as_bytes(x.compute(start, stop, work), x), packed=x.dtype.bits < 8)


def evaluate(x: Expression) -> Array:
    """Compute all elements of an expression, in its shape; for tests and small tensors.

    >>> import numpy as np
    >>> from torchparams.expressions.base import Stored
    >>> from torchparams.testing import MemorySource
    >>> evaluate(Stored(MemorySource({"w": np.arange(4).reshape(2, 2)}), "w"))
    array([[0, 1],
           [2, 3]])
    """
    import numpy as np

    out = np.empty(x.numel, x.dtype.numpy)
    at = 0
    with ThreadWork() as work:
        for block in work.blocks(x, begin=True):
            out[at : at + len(block)] = block
            at += len(block)
    return out.reshape(x.shape)


def _packed_bytes(leaf: Stored) -> Array:
    """All bytes of a tensor outside a file."""
    if leaf.dtype.numpy_name is not None:
        from torchparams.io.packing import pack

        return pack(leaf.source.numpy(leaf.info.name), leaf.dtype)
    import torch

    from torchparams.io.live import memory_of

    tensor = leaf.source.tensor(leaf.info.name)
    if tensor.layout != torch.strided or tensor.is_quantized:
        how = "quantised" if tensor.is_quantized else f"sparse ({tensor.layout})"
        raise NotReadable(f"{leaf.info.name!r} is {how}: its memory does not hold its values", where=leaf.source.label)
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return memory_of(flat)
