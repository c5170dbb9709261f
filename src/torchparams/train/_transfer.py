"""Copies values from a source into the memory of a live model, tensor by tensor.

Bytes that need no conversion are read from the file straight into the parameter's memory, on several threads. Values
that need a cast are cast block by block from a mapped part of the file; values for other devices pass through a
buffer. Only tensors that are not contiguous in the file are first built as tensors of their own, one at a time.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING

from torchparams.engines.base import Folding, Job
from torchparams.engines.threads import ThreadEngine
from torchparams.io.filebytes import paused_gc
from torchparams.io.files import Files, OpenFiles, ended, read_into
from torchparams.io.threads import Shared, processors, results_of
from torchparams.render.tree import listed, plural
from torchparams.train._losses import CAST_BYTES, CASTERS, tensor_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from torchparams.engines.base import Progress
    from torchparams.info import Location
    from torchparams.io.blocks import Block
    from torchparams.train._assignment import Assignment

PIECE_BYTES = 16 << 20
"""Bytes that a thread reads into a parameter per call."""

BUFFER_BYTES = 8 << 20
"""Buffer size in bytes for copies to a different device or to a tensor that is not contiguous."""

VECTOR = 512
"""Maximum number of adjacent tensors read by one call; systems allow at least 1,024."""

_is_little = sys.byteorder == "little"

_MOST_THREADS = 16  # more are not faster: memory or disk speed is the limit


def transfer(pairs: Sequence[Assignment], progress: Progress | None = None) -> None:
    """Copy all values. Targets with the dtype of the source get the same bits.

    Args:
        pairs: Pairs with equal shapes and distinct targets, none of them on the meta device.
        progress: Callback with the bytes read so far and in total.

    Raises:
        TorchParamsError: Values cannot be read. Its notes list the tensors that were already changed.
    """
    import torch

    state = _State(pairs, progress)
    direct: list[_Direct] = []
    casts: list[Assignment] = []
    others: list[tuple[Assignment, Location | None]] = []
    with paused_gc():  # creates many objects and no cycles
        saved = _saved_from_overwriting(pairs)
        for pair in pairs:
            place = None if pair.name in saved else pair.source.span(pair.info.name)
            memory = None if place is None else _memory(pair)
            if place is not None and memory is not None:
                direct.append(_Direct(pair, place, memory))
            elif (place is not None or pair.source.format == "view") and _flat_on_cpu(pair.target) and _is_little:
                casts.append(pair)  # block by block: a part of a sharded tensor may be computed
            else:
                others.append((pair, place))
    for source in {id(pair.source): pair.source for pair in pairs}.values():
        source.check_unchanged()
    files = Files()
    opened = OpenFiles(files)
    try:
        _read_all(direct, files, state)
        _cast_all(casts, state)
        others.sort(key=lambda item: ("", 0) if item[1] is None else (item[1].file, item[1].start))
        buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        for pair, place in others:
            if pair.name in saved:
                pair.target.detach().copy_(saved.pop(pair.name))
            elif place is None or pair.info.dtype.torch_name is None or sys.byteorder != "little":
                pair.target.detach().copy_(_values(pair))
            else:
                buffer = _through(buffer, pair, place, opened)
            state.done(pair)
        files.check()
    except BaseException as error:  # Ctrl-C too leaves a partly loaded model
        error.add_note(state.note())
        raise
    finally:
        opened.close()
        if direct:
            # Bump the version for writes outside torch, as copy_ does: autograd must not run backward with the new
            # values through a graph that saved the old ones.
            torch.autograd.graph.increment_version([item.pair.target for item in direct])


class _State:
    """Progress of the transfer."""

    def __init__(self, pairs: Sequence[Assignment], progress: Progress | None) -> None:
        self._pairs = pairs
        self._progress = progress
        self._total = sum(pair.info.nbytes for pair in pairs)
        self._seen = 0
        self._done: set[str] = set()

    def done(self, pair: Assignment) -> None:
        self._done.add(pair.name)
        self._seen += pair.info.nbytes
        if self._progress is not None:
            self._progress(self._seen, self._total)

    def note(self) -> str:
        """Note for an error: tensors that were changed already, and tensors that were not."""
        left = [pair.name for pair in self._pairs if pair.name not in self._done]
        return (
            f"the model is partly loaded: {plural(len(self._done), 'tensor')} of {len(self._pairs):,} "
            f"{'holds' if len(self._done) == 1 else 'hold'} the new values; "
            f"these hold old ones, or some of both: {listed(left, 5) or 'none'}"
        )


# --- the same bits --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Direct:
    """Assignment whose bytes are read from the file straight into the parameter's memory."""

    pair: Assignment
    place: Location
    memory: memoryview


def _memory(pair: Assignment) -> memoryview | None:
    """Memory of a target that can hold the file's bytes unchanged; None if they need a conversion."""
    target = pair.target
    if (
        sys.byteorder != "little"
        or pair.info.dtype.torch_name is None
        or target.dtype != pair.info.dtype.torch
        or not _flat_on_cpu(target)
    ):
        return None
    # By address: numpy has neither bfloat16 nor float8, and a byte tensor over the same storage takes five times as
    # long to make. The pair keeps the target's memory alive.
    return memoryview((ctypes.c_ubyte * pair.info.nbytes).from_address(pair.target.data_ptr())).cast("B")


def _flat_on_cpu(target: torch.Tensor) -> bool:
    return target.device.type == "cpu" and target.is_contiguous() and not target.is_conj() and not target.is_neg()


Piece = list[tuple[_Direct, int, int]]
"""Byte ranges of tensors that one thread reads in sequence."""


def _pieces(direct: Sequence[_Direct]) -> Iterator[Piece]:
    """Parts of large tensors, and groups of small tensors, in file order for sequential disk reads."""
    batch: Piece = []
    size = 0
    for item in sorted(direct, key=lambda item: (item.place.file, item.place.start)):
        for start in range(0, max(len(item.memory), 1), PIECE_BYTES):
            stop = min(start + PIECE_BYTES, len(item.memory))
            batch.append((item, start, stop))
            size += stop - start
            if size >= PIECE_BYTES // 2:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _runs(piece: Piece) -> Iterator[Piece]:
    """Groups of adjacent ranges in one file; empty ranges are left out."""
    run: Piece = []
    file, at = "", -1
    for item, start, stop in piece:
        if start == stop:
            continue
        begin = item.place.start + start
        if run and (begin != at or item.place.file != file or len(run) == VECTOR):
            yield run
            run = []
        run.append((item, start, stop))
        file, at = item.place.file, item.place.start + stop
    if run:
        yield run


def _read_all(direct: Sequence[_Direct], files: Files, state: _State) -> None:
    left = {item.pair.name: len(item.memory) for item in direct}
    stop = threading.Event()
    with paused_gc():
        listed = list(_pieces(direct))
    pieces = Shared(listed)

    def read() -> Iterator[Piece]:
        opened = OpenFiles(files)
        try:
            for piece in pieces:
                for run in _runs(piece):
                    if stop.is_set():
                        return
                    _read_run(run, opened)
                yield piece
        finally:
            opened.close()

    for piece in results_of([read() for _ in range(min(processors(), _MOST_THREADS, max(len(listed), 1)))], stop):
        for item, start, end in piece:
            left[item.pair.name] -= end - start
            if not left[item.pair.name]:
                state.done(item.pair)


def _read_run(run: Piece, files: OpenFiles) -> None:
    """Read adjacent ranges, each into its own memory, in one call."""
    first, start, _ = run[0]
    path, at = first.place.file, first.place.start + start
    memories = [item.memory[begin:end] for item, begin, end in run]
    got = read_into(files.get(path), memories, at, path)
    for (item, _, _), memory in zip(run, memories, strict=True):
        if got < len(memory):
            raise ended(path, at + got, item.pair.info.name)
        got -= len(memory)
        at += len(memory)


# --- cast -----------------------------------------------------------------------------------------


def _cast_all(pairs: Sequence[Assignment], state: _State) -> None:
    by_name = {pair.name: pair for pair in pairs}
    engine = ThreadEngine(CASTERS, block_bytes=CAST_BYTES, mapped=True)
    jobs = [Job(pair.name, (pair.source.row(pair.info.name, pair.info),)) for pair in pairs]
    task: Folding[None, None] = Folding(lambda job: _Casting(by_name[job.key].target), lambda job, parts: None)
    for job, _, _ in engine.run(jobs, task):
        state.done(by_name[job.key])


class _Casting:
    """Copies blocks of a file into a tensor of a different dtype."""

    def __init__(self, target: torch.Tensor) -> None:
        self._flat = target.detach().view(-1)

    def update(self, block: Block) -> None:
        self._flat[block.start : block.stop].copy_(tensor_of(block))

    def finish(self) -> None:
        return


# --- through a buffer -----------------------------------------------------------------------------


def _through(buffer: torch.Tensor, pair: Assignment, place: Location, files: OpenFiles) -> torch.Tensor:
    """Read, cast and copy part by part. Returns the buffer, which may have grown."""
    import torch

    target, dtype = pair.target.detach(), pair.info.dtype
    for view, start in _parts(target, BUFFER_BYTES // dtype.itemsize):
        size = view.numel() * dtype.itemsize
        if len(buffer) < size:
            buffer = torch.empty(max(size, min(BUFFER_BYTES, pair.info.nbytes)), dtype=torch.uint8, device="cpu")
        begin = place.start + start * dtype.itemsize
        if size:
            files.read(place.file, buffer[:size].numpy().data, begin, pair.info.name)
        view.copy_(buffer[:size].view(dtype.torch).view(view.shape))
    return buffer


def _parts(target: torch.Tensor, most: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Views of at most `most` elements, consecutive in C order, each with its start.

    If the target is not contiguous, a view has at least one row along the first dimension.
    """
    if target.is_contiguous():
        flat = target.view(-1)
        for start in range(0, flat.numel(), most):
            yield flat[start : start + most], start
        return
    row = prod(target.shape[1:])
    step = max(most // max(row, 1), 1)
    for first in range(0, target.shape[0], step):
        yield target[first : first + step], first * row


def _values(pair: Assignment) -> torch.Tensor:
    import torch

    if pair.info.dtype.torch_name is not None:
        return pair.source.tensor(pair.info.name)
    # Torch has no dtypes of less than a byte. Their values are exact in float32.
    import numpy as np

    return torch.from_numpy(pair.source.numpy(pair.info.name).astype(np.float32))


# --- a model loaded from itself -------------------------------------------------------------------


def _saved_from_overwriting(pairs: Sequence[Assignment]) -> dict[str, torch.Tensor]:
    """Name → copy of values in memory that a different pair writes to.

    The copies allow parameters of one model to be swapped. Values already in their target need no copy.
    """
    if not any(pair.source.borrowed for pair in pairs):
        return {}
    spans = sorted(span for pair in pairs if (span := _span(pair.target)) is not None)
    starts = [start for start, _ in spans]
    # Storages may overlap if an array views the middle of one, so compare with the running maximum of the ends.
    reach = list(accumulate((stop for _, stop in spans), max))
    copies = {}
    for pair in pairs:
        if not pair.source.borrowed:
            continue
        value, target = pair.source.tensor(pair.info.name), pair.target
        span = _span(value)
        if span is None or (value.data_ptr() == target.data_ptr() and value.stride() == target.stride()):
            continue
        at = bisect_left(starts, span[1])  # storages that start before the values end
        if at and reach[at - 1] > span[0]:
            copies[pair.name] = value.clone()
    return copies


def _span(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Start and end address of a tensor's storage, or None."""
    import torch

    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return None
    storage = tensor.untyped_storage()
    return (storage.data_ptr(), storage.data_ptr() + storage.nbytes()) if storage.nbytes() else None
