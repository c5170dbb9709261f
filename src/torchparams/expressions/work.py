"""What one thread computes with: readers, whose memory is used again from block to block."""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING, Any, Self

from torchparams.expressions.casts import Losses
from torchparams.io.read import Files, Reader

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from torchparams.expressions.base import Expression, Stored
    from torchparams.sources.base import Source

    Array = np.ndarray[Any, Any]

GROUP = 4
"""Elements of less than a byte that a run begins at a multiple of: so many fill whole bytes, of 4 bits and of 6."""

BLOCK_BYTES = 1 << 19
"""Bytes of an operand that are read at once: with what is made of them, they stay in a second-level cache."""


class Work:
    """Reads blocks of stored tensors, and holds what expressions prepared and counted.

    Args:
        files: Opens files, and notices those that somebody writes to.
        block_bytes: Bytes of an operand that are read at once.

    Attributes:
        block: Elements of the blocks of the expression that is computed.
        losses: What casts counted, by the expression's identity.
    """

    def __init__(self, files: Files | None = None, block_bytes: int = BLOCK_BYTES) -> None:
        self._files = Files() if files is None else files
        self._own = files is None
        self._block_bytes = block_bytes
        self._readers: list[Reader] = []
        self._slots: dict[int, int] = {}
        self._arrays: dict[int, Array] = {}
        self._mapped: list[Source] = []
        self._kept: tuple[str, Array] | None = None
        self._prepared: dict[int, Any] = {}
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
        """Close files, and let go of arrays."""
        for reader in self._readers:
            reader.close()
        self._let_go()
        self._scratch.clear()
        self._kept = None

    def _let_go(self) -> None:
        # Pages of a mapped file that were looked at count as memory of this process until the mapping ends.
        for source in self._mapped:
            source.close()
        self._mapped.clear()
        self._arrays.clear()

    # --- for whoever runs expressions --------------------------------------------------------------

    def begin(self, x: Expression, block: int | None = None) -> None:
        """Go on to an expression, and prepare it. Of the one before, its memory is used again."""
        self.block = block_of(x, self._block_bytes) if block is None else block
        self._slots.clear()
        self._owners.clear()
        self._let_go()
        self._prepared.clear()
        for part in x.walk():
            state = part.prepare(self)
            if state is not None:
                self._prepared[id(part)] = state

    # --- for expressions ---------------------------------------------------------------------------

    def blocks(self, x: Expression, *, begin: bool = False) -> Iterator[Array]:
        """All elements of an expression, block by block; each is valid until the next.

        Args:
            x: The expression, which is the one at work or an operand of it.
            begin: Prepare it first.
        """
        if begin:
            self.begin(x)
        step = max(self.block // x.granule, 1) * x.granule
        for start in range(0, x.numel, step):
            yield x.compute(start, min(start + step, x.numel), self)

    def prepared(self, x: Expression) -> Any:
        """What `x.prepare` returned."""
        return self._prepared[id(x)]

    def scratch(self, x: Expression, slot: int, count: int, dtype: np.dtype[Any]) -> Array:
        """Memory for what an expression computes with, used again from block to block and by the expressions after it.

        To get it anew for every block costs as much as to compute with it: the system gives it in pages of zeros.

        Args:
            x: Whose it is.
            slot: Which of several.
            count: How many elements.
            dtype: Their type.
        """
        import numpy as np

        key = self._owners.setdefault(id(x), len(self._owners)), slot
        found = self._scratch.get(key)
        if found is None or found.nbytes < count * dtype.itemsize:
            found = self._scratch[key] = np.empty(count * dtype.itemsize, np.uint8)
        return found[: count * dtype.itemsize].view(dtype)

    def count(self, x: Expression, lost: Losses) -> None:
        """Add to what a cast lost."""
        if lost:
            self.losses[id(x)] = self.losses.get(id(x), Losses()) + lost

    def read(self, leaf: Stored, start: int, stop: int) -> Array:
        """Elements of a stored tensor, of its own type."""
        first = start - start % GROUP if leaf.dtype.bits < 8 and leaf.place is not None else start
        values: Array
        if leaf.place is not None:
            block = self._reader(leaf).span(leaf.info, leaf.place, first, stop, leaf.place.stop)
            values = block.values()
        elif leaf.dtype.numpy_name is None:
            return self.read_bytes(leaf, leaf.dtype.nbytes(start), leaf.dtype.nbytes(stop))
        else:
            values = self._reader(leaf).array(leaf.info, self._array(leaf), first, stop).values()
        return values[start - first :]

    def read_bytes(self, x: Expression, start: int, stop: int) -> Array:
        """Bytes `[start, stop)` of a stored tensor as it lies in its file, or of a live one of a type numpy lacks."""
        import numpy as np

        (leaf,) = x.leaves()
        array = self._arrays.get(id(leaf))
        if array is None:
            array = self._arrays[id(leaf)] = _packed_bytes(leaf)
        return np.ascontiguousarray(array[start:stop])

    def _reader(self, leaf: Stored) -> Reader:
        slot = self._slots.setdefault(id(leaf), len(self._slots))
        while slot >= len(self._readers):
            self._readers.append(Reader(self._files, self._block_bytes))
        return self._readers[slot]

    def _array(self, leaf: Stored) -> Array:
        array = self._arrays.get(id(leaf))
        if array is None:
            # Tensors that are views of one compressed storage share what it was inflated to, while one of them is held.
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
    """Elements of a block: a multiple of what packed elements and the operations need.

    Args:
        x: What is computed.
        block_bytes: Bytes of an operand that are read at once.
        most: Bytes of memory that a block may take with all that is made on the way.
    """
    widest = max((leaf.dtype.bits for leaf in x.leaves()), default=32)
    count = max(block_bytes * 8 // max(widest, x.dtype.bits, 8), 1)
    if most is not None:
        count = min(count, max(most // max(x.footprint, 1), 1))
    step = lcm(GROUP, *(part.granule for part in x.walk()))
    return max(count // step, 1) * step


def evaluate(x: Expression) -> Array:
    """All elements of an expression, in its shape: for tests, and for tensors that are small.

    >>> import numpy as np
    >>> from torchparams.expressions.base import Stored
    >>> from torchparams.testing import MemorySource
    >>> evaluate(Stored(MemorySource({"w": np.arange(4).reshape(2, 2)}), "w"))
    array([[0, 1],
           [2, 3]])
    """
    import numpy as np

    with Work() as work:
        blocks = [block.copy() for block in work.blocks(x, begin=True)]
    return (np.concatenate(blocks) if blocks else np.empty(0, x.dtype.numpy)).reshape(x.shape)


def _packed_bytes(leaf: Stored) -> Array:
    """All bytes of a tensor that does not lie in a file."""
    if leaf.dtype.numpy_name is not None:
        from torchparams.io.packing import pack

        return pack(leaf.source.numpy(leaf.info.name), leaf.dtype)
    import torch

    from torchparams.io.live import memory_of

    return memory_of(leaf.source.tensor(leaf.info.name).cpu().contiguous().reshape(-1).view(torch.uint8))
