"""For every expression, any range has the same bits as in the whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchparams.dtypes import DType
from torchparams.edit.lora._lowrank import Folded
from torchparams.edit.merge._slerp import Slerp
from torchparams.edit.merge._sparse import Dropped, TaskVectors, Trimmed
from torchparams.encodings.packed import Bytes, Nibbles, Rescaled, Transposed, Unpacked
from torchparams.encodings.scaled import BlockScaled
from torchparams.expressions.assembled import Assembled, Chunk
from torchparams.expressions.operations import Cast, Concat, Elementwise, Linear, Slice
from torchparams.expressions.strided import Strided
from torchparams.expressions.work import ThreadWork, evaluate
from torchparams.testing import MemorySource

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchparams.expressions.base import Expression

BF16, F32 = DType.of("bf16"), DType.of("f32")


def stored(seed: int, shape: tuple[int, ...] = (37, 41), transposed: bool = False) -> Expression:
    array = np.random.default_rng(seed).standard_normal(shape[::-1] if transposed else shape).astype(np.float32)
    return MemorySource({f"w{seed}": array.T if transposed else array}).row(f"w{seed}")


def packed() -> Expression:
    array = np.random.default_rng(5).standard_normal((37, 44)).astype(DType.of("float4_e2m1fn").numpy)
    return MemorySource({"w": array}).row("w")


EXPRESSIONS: dict[str, Callable[[], Expression]] = {
    "stored": lambda: stored(0),
    "stored transposed": lambda: stored(0, transposed=True),
    "packed": packed,
    "slice of rows": lambda: Slice(stored(0), 0, 3, 30),
    "slice of columns": lambda: Slice(stored(0), 1, 3, 30),
    "concat of rows": lambda: Concat([stored(0), stored(1), Slice(stored(2), 0, 1, 2)]),
    "concat of columns": lambda: Concat([stored(0), Linear([stored(1), stored(2)], [1, 2]), stored(3)], dim=1),
    "assembled of rows": lambda: assembled([(0, 0, 20, 41), (20, 0, 1, 41), (21, 0, 16, 41)]),
    "assembled of columns": lambda: assembled([(0, 0, 37, 5), (0, 5, 37, 36)]),
    "assembled of a grid": lambda: assembled([(0, 0, 20, 7), (0, 7, 20, 34), (20, 0, 17, 7), (20, 7, 17, 34)]),
    "assembled of a spiral": lambda: assembled(
        [(0, 0, 9, 30), (0, 30, 30, 11), (30, 9, 7, 32), (9, 0, 28, 9), (9, 9, 21, 21)]
    ),
    "assembled of blocks": lambda: assembled(
        [(0, 0, 0, 3, 2, 5), (0, 0, 5, 3, 2, 2), (0, 2, 0, 1, 2, 7), (1, 2, 0, 2, 2, 7)], (3, 4, 7)
    ),
    "assembled of computed": lambda: Assembled(
        (4, 6),
        F32,
        [
            Chunk((0, 3), Strided(stored(1), F32, (4, 3), 0, (3, 1))),
            Chunk((0, 0), Slice(Slice(stored(0), 1, 0, 3), 0, 5, 9)),
        ],
    ),
    "cast": lambda: Cast(stored(0), BF16),
    "linear": lambda: Linear([stored(0), stored(1), stored(0)], [0.3, 0.4, 0.5], BF16),
    "linear of computed": lambda: Linear([Slice(stored(0), 1, 0, 9), Cast(Slice(stored(1), 1, 5, 14), F32)], [1, 2]),
    "linear of itself": lambda: Linear([x := Cast(stored(0), BF16), x], [1, 2]),
    "linear in float64": lambda: Linear([stored(0), stored(1)], [0.3, 0.4], BF16, "float64"),
    "elementwise": lambda: Elementwise(np.multiply, stored(0), stored(1)),
    "transposed view": lambda: Strided(stored(0), F32, (41, 37), 0, (1, 41)),
    "view of a run": lambda: Strided(stored(0), F32, (3, 5), 17, (5, 1)),
    "slerp": lambda: Slerp(stored(0), stored(1), 0.3),
    "task vectors": lambda: TaskVectors(stored(0), [stored(1), stored(2)], [1, 0.5], elect=True),
    "ties": lambda: Trimmed(stored(0), [stored(1), stored(2)], [1, 0.5], densities=[0.3, 0.5], elect=True),
    "dare": lambda: Dropped(stored(0), [stored(1)], [1], densities=[0.5], seed=1, name="w"),
    "folded": lambda: Folded(stored(0), stored(1, (3, 41)), stored(2, (37, 3)), 0.5),
    "folded in tiles": lambda: folded_in_tiles(),
    "block scaled": lambda: block_scaled(),
    "turned": lambda: Transposed(stored(0)),
    "unpacked": lambda: Unpacked(words(37, 5), 8, (37, 19), 1),
    "unpacked and turned": lambda: Unpacked(words(6, 41), 3, (41, 60), 0, turned=True),
    "nibbles": lambda: Nibbles(Bytes(words(37, 5), DType.of("U8"), (37 * 20,)), (37 * 40,)),
    "rescaled": lambda: Rescaled(stored(0), stored(1, (1, 1)), divide=True),
    "block scaled with zero points": lambda: with_zeros(),
    "block scaled by experts": lambda: block_scaled((5, 7, 41), (7, 41), (3, 8)),
}


def assembled(boxes: list[tuple[int, ...]], shape: tuple[int, ...] = (37, 41)) -> Expression:
    """A tensor cut into boxes, each given as its offsets and its sizes."""
    whole = np.random.default_rng(9).standard_normal(shape).astype(BF16.numpy)
    chunks, ndim = [], len(shape)
    for number, box in enumerate(boxes):
        part = whole[tuple(slice(at, at + size) for at, size in zip(box[:ndim], box[ndim:], strict=True))]
        chunks.append(Chunk(box[:ndim], MemorySource({f"part{number}": part.copy()}).row(f"part{number}")))
    x = Assembled(shape, BF16, chunks)
    assert evaluate(x).tobytes() == whole.tobytes()
    return x


def words(rows: int, columns: int) -> Expression:
    array = np.random.default_rng(7).integers(-(1 << 31), 1 << 31, (rows, columns)).astype(np.int32)
    return MemorySource({"words": array}).row("words")


def with_zeros() -> Expression:
    rng = np.random.default_rng(8)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "codes": rng.integers(0, 16, (37, 41)).astype(np.uint8),
        "scales": rng.standard_normal((37, 6)).astype(np.float16),
        "zeros": rng.integers(0, 15, (37, 6)).astype(np.uint8),
        "index": rng.integers(0, 6, 41),
    }
    codes, scales, zeros, index = map(MemorySource(arrays).row, arrays)
    return BlockScaled(codes, scales, (37, 41), (1, 7), zeros=zeros, above=1, index=index, factor=0.3)


def block_scaled(
    shape: tuple[int, ...] = (37, 41), matrix: tuple[int, int] = (37, 41), block: tuple[int, int] = (8, 16)
) -> Expression:
    rng = np.random.default_rng(3)
    codes = rng.integers(-128, 128, shape).astype(np.int8)
    lines = [-(-size // side) for size, side in zip(matrix, block, strict=True)]
    scales = rng.standard_normal((*shape[:-2], *lines)).astype(np.float16)
    source = MemorySource({"codes": codes, "scales": scales})
    return BlockScaled(source.row("codes"), source.row("scales"), matrix, block, dtype=BF16)


def folded_in_tiles() -> Expression:
    x = Folded(stored(0), stored(1, (3, 41)), stored(2, (37, 3)), 0.5)
    x._tile, x.granule = 4, 4 * 41
    return x


@pytest.mark.parametrize("name", EXPRESSIONS)
@given(data=st.data())
def test_any_range_has_the_bits_of_the_whole(name: str, data: st.DataObject) -> None:
    x = EXPRESSIONS[name]()
    whole = evaluate(x).reshape(-1)
    block = data.draw(st.integers(1, 2 * x.numel), label="block")
    with ThreadWork() as work:
        work.begin(x, block)
        for _ in range(4):
            start = data.draw(st.integers(0, x.numel - 1), label="start")
            stop = data.draw(st.integers(start + 1, x.numel), label="stop")
            into: Any = np.empty(stop - start, x.dtype.numpy) if data.draw(st.booleans(), label="into") else None
            found = x.compute(start, stop, work, into)
            assert found.tobytes() == whole[start:stop].tobytes()
