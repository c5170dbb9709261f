"""What one thread computes expressions with: open files, memory that is used again, and prepared states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from torchparams.errors import NotReadable
from torchparams.expressions.casts import Losses
from torchparams.io.blocks import Block
from torchparams.io.files import Files, OpenFiles
from torchparams.io.reader import gather

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy as np

    from torchparams.expressions.base import Expression, Stored
    from torchparams.sources.base import Source

    Array = np.ndarray[Any, Any]

GROUP = 4
"""Elements of less than a byte that a run begins at a multiple of: so many fill whole bytes, of 4 bits and of 6."""

_TILES = 8
"""Expressions of which a tile is kept."""

BLOCK_BYTES = 1 << 19
"""Bytes of an operand that are read at once: with all that is made of them, they stay in a second-level cache."""


class Work:
    """Reads blocks of stored tensors, and holds what expressions prepared and counted.

    Args:
        files: Opens files, and notices those that somebody writes to.
        block_bytes: Bytes of an operand that are read at once.

    Attributes:
        block: Elements of the blocks of the expression that is computed.
        losses: What casts lost, by the expression's identity.
    """

    def __init__(self, files: Files | None = None, block_bytes: int = BLOCK_BYTES) -> None:
        self._files = Files() if files is None else files
        self._own = files is None
        self._open = OpenFiles(self._files)
        self._block_bytes = block_bytes
        self._arrays: dict[int, Array] = {}
        self._array_of: Callable[[Stored], Array] | None = None
        self._mapped: list[Source] = []
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
        """Close files, and let go of arrays."""
        self._open.close()
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

    def begin(
        self,
        x: Expression,
        block: int | None = None,
        *,
        prepared: Mapping[int, Any] | None = None,
        array_of: Callable[[Stored], Array] | None = None,
    ) -> None:
        """Go on to an expression, and prepare it; the memory of the one before is used again.

        Args:
            x: The expression.
            block: Elements of its blocks.
            prepared: The `state` of another `Work` that has prepared this very expression.
            array_of: Gives the array of a stored tensor that is not a range of a file, in place of its source; for
                arrays that several threads share.
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
        """What was prepared, by the expression's identity; other threads may go on with it."""
        return self._prepared

    # --- for expressions ---------------------------------------------------------------------------

    def blocks(self, x: Expression, *, begin: bool = False) -> Iterator[Array]:
        """All elements of an expression, block by block; each is valid until the next.

        Args:
            x: The expression, which is the one at work or an operand of it.
            begin: Prepare it first.
        """
        if begin:
            self.begin(x)
        step = max(self.block // x.granule, 1) * x.granule if x.granule <= self.block else self.block
        for start in range(0, x.numel, step):
            yield x.compute(start, min(start + step, x.numel), self)

    def prepared(self, x: Expression) -> Any:
        """What `x.prepare` returned."""
        return self._prepared[id(x)]

    def scratch(self, x: Expression, slot: int, count: int, dtype: np.dtype[Any]) -> Array:
        """Memory for what an expression computes with, used again from block to block and by the expressions after it.

        To get it anew for every block costs as much as to compute with it: the system gives it in pages of zeros.

        Args:
            x: The expression that asks.
            slot: Which of several memories.
            count: Count of elements.
            dtype: Their type.
        """
        import numpy as np

        key = self._owners.setdefault(id(x), len(self._owners)), slot
        found = self._scratch.get(key)
        if found is None or found.nbytes < count * dtype.itemsize:
            found = self._scratch[key] = np.empty(count * dtype.itemsize, np.uint8)
        return found[: count * dtype.itemsize].view(dtype)

    def compute_into(self, x: Expression, start: int, stop: int, out: Array) -> None:
        """Elements `[start, stop)` of an expression, put into `out`.

        For operands of which one is done before the next begins: the memory they compute with is the same, so that it
        does not depend on how many there are.
        """
        mark = len(self._owners)
        values = x.compute(start, stop, self, out)
        if values is not out:
            out[...] = values
        while len(self._owners) > mark:
            self._owners.popitem()

    def latest(self, x: Expression, key: int, compute: Callable[[], Array]) -> Array:
        """What `compute` gives, kept until the next of `x`, or of several others: for tiles that blocks share."""
        kept = self._latest.get(id(x))
        if kept is None or kept[1] != key:
            self._latest.pop(id(x), None)
            if len(self._latest) == _TILES:
                self._latest.pop(next(iter(self._latest)))
            kept = self._latest[id(x)] = x, key, compute()
        return kept[2]

    def count(self, x: Expression, lost: Losses) -> None:
        """Add to what a cast lost."""
        if lost:
            self.losses[id(x)] = self.losses.get(id(x), Losses()) + lost

    def take_losses(self) -> Losses:
        """What all casts lost since the last call."""
        found = sum(self.losses.values(), Losses())
        self.losses.clear()
        return found

    def read(self, leaf: Stored, start: int, stop: int, into: Array | None = None) -> Array:
        """Elements of a stored tensor, of its own type; in `into` where it is given and they can be read there."""
        import numpy as np

        if leaf.place is None:
            if leaf.dtype.numpy_name is None:
                return self.read_bytes(leaf, leaf.dtype.nbytes(start), leaf.dtype.nbytes(stop))
            array = self._array(leaf)
            if array.flags.c_contiguous and array.dtype.isnative:
                found: Array = array.reshape(-1)[start:stop]
                return found
            out = self.scratch(leaf, 0, stop - start, array.dtype.newbyteorder("=")) if into is None else into
            if array.dtype.isnative and array.itemsize in (1, 2, 4, 8):  # as integers, which copy faster
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
        """Bytes `[start, stop)` of a stored tensor, packed as in a file; also of a type that numpy lacks."""
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
    """Elements of a block of an expression: a multiple of its granule where that fits, always one of `GROUP`.

    Args:
        x: The expression.
        block_bytes: Bytes of an operand that are read at once.
        most: Bytes of memory that a block may take with all that is made on the way.
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
    """The bytes that a file holds for these elements of an expression, packed."""
    import numpy as np

    if x.dtype.bits < 8 and values.dtype != np.uint8:  # else they are packed already
        from torchparams.io.packing import pack

        return pack(values, x.dtype).data
    return np.ascontiguousarray(values).view(np.uint8).data


def computed_block(x: Expression, start: int, stop: int, work: Work) -> Block:
    """Elements of an expression, as a block."""
    return Block(x.dtype, start, stop, as_bytes(x.compute(start, stop, work), x), packed=x.dtype.bits < 8)


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

    out = np.empty(x.numel, x.dtype.numpy)
    at = 0
    with Work() as work:
        for block in work.blocks(x, begin=True):
            out[at : at + len(block)] = block
            at += len(block)
    return out.reshape(x.shape)


def _packed_bytes(leaf: Stored) -> Array:
    """All bytes of a tensor that does not lie in a file."""
    if leaf.dtype.numpy_name is not None:
        from torchparams.io.packing import pack

        return pack(leaf.source.numpy(leaf.info.name), leaf.dtype)
    import torch

    from torchparams.io.live import memory_of

    tensor = leaf.source.tensor(leaf.info.name)
    if tensor.layout != torch.strided or tensor.is_quantized:
        how = "quantised" if tensor.is_quantized else f"sparse ({tensor.layout})"
        raise NotReadable(
            f"{leaf.info.name} is {how}: its values are not the bytes of its memory", where=leaf.source.label
        )
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return memory_of(flat)
