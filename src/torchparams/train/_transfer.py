"""Values from a source into the memory of a live model, tensor by tensor.

Bytes that need no change are read from the file straight into the parameter's own memory, on several threads. Others
are cast block by block, from a part of the file that is mapped meanwhile, or on their way to another device from a
buffer. Only what a file does not hold contiguous is made as a tensor of its own first, one at a time.
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
    from torchparams.train._pair import Pair

PIECE_BYTES = 16 << 20
"""Bytes that a thread reads into a parameter at once."""

BUFFER_BYTES = 8 << 20
"""Bytes that are read at once where they are copied to another device or to a tensor that is not contiguous."""

VECTOR = 512
"""Tensors that lie side by side in a file and are read by one call; systems take 1,024 and more."""

_MOST_THREADS = 16  # more do not read faster: the memory's or the disk's own speed is reached before


def transfer(pairs: Sequence[Pair], progress: Progress | None = None) -> None:
    """Copy all values; targets of the same dtype get the same bits.

    Args:
        pairs: Shapes are equal, no target is on the meta device, and none stands twice.
        progress: Told bytes read so far and in all.

    Raises:
        TorchParamsError: Values cannot be read. Its notes say what of the model was changed already.
    """
    import torch

    state = _State(pairs, progress)
    direct: list[_Direct] = []
    casts: list[Pair] = []
    others: list[tuple[Pair, Location | None]] = []
    with paused_gc():  # some objects for each tensor, and no cycles
        saved = _saved_from_overwriting(pairs)
        for pair in pairs:
            place = None if pair.name in saved else pair.source.span(pair.info.name)
            memory = None if place is None else _memory(pair)
            if place is not None and memory is not None:
                direct.append(_Direct(pair, place, memory))
            elif place is not None and _flat_on_cpu(pair.target) and sys.byteorder == "little":
                casts.append(pair)
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
    except BaseException as error:  # Ctrl-C too leaves a model that is partly loaded
        error.add_note(state.note())
        raise
    finally:
        opened.close()
        if direct:
            # What was not written by torch is told to autograd, as copy_ does: a graph that needs the old values
            # must not go backward over the new ones.
            torch.autograd.graph.increment_version([item.pair.target for item in direct])


class _State:
    """How far it is."""

    def __init__(self, pairs: Sequence[Pair], progress: Progress | None) -> None:
        self._pairs = pairs
        self._progress = progress
        self._total = sum(pair.info.nbytes for pair in pairs)
        self._seen = 0
        self._done: set[str] = set()

    def done(self, pair: Pair) -> None:
        self._done.add(pair.name)
        self._seen += pair.info.nbytes
        if self._progress is not None:
            self._progress(self._seen, self._total)

    def note(self) -> str:
        """What an error leaves behind."""
        left = [pair.name for pair in self._pairs if pair.name not in self._done]
        return (
            f"the model is partly loaded: {plural(len(self._done), 'tensor')} of {len(self._pairs):,} "
            f"{'holds' if len(self._done) == 1 else 'hold'} the new values; "
            f"these hold old ones, or some of both: {listed(left, 5) or 'none'}"
        )


# --- the same bits --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Direct:
    """A pair whose bytes go straight from the file into the parameter's memory."""

    pair: Pair
    place: Location
    memory: memoryview


def _memory(pair: Pair) -> memoryview | None:
    """The bytes of a target that can hold those of the file as they are; None where they need a change."""
    target = pair.target
    if (
        sys.byteorder != "little"
        or pair.info.dtype.torch_name is None
        or target.dtype != pair.info.dtype.torch
        or not _flat_on_cpu(target)
    ):
        return None
    # By its address: numpy knows neither bfloat16 nor float8, and a tensor of bytes over the same storage takes five
    # times as long to make. The pair keeps the target, and so its memory, as long as this is there.
    return memoryview((ctypes.c_ubyte * pair.info.nbytes).from_address(pair.target.data_ptr())).cast("B")


def _flat_on_cpu(target: torch.Tensor) -> bool:
    return target.device.type == "cpu" and target.is_contiguous() and not target.is_conj() and not target.is_neg()


Piece = list[tuple[_Direct, int, int]]
"""Byte ranges of tensors that a thread reads one after the other."""


def _pieces(direct: Sequence[_Direct]) -> Iterator[Piece]:
    """A part of a large tensor, or small tensors together; in the order of the files, which may be on a disk."""
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
    """The ranges of a piece that lie side by side in one file, together; without those of no bytes."""
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
    """Read ranges that lie side by side, each into its memory, in one call."""
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


def _cast_all(pairs: Sequence[Pair], state: _State) -> None:
    by_name = {pair.name: pair for pair in pairs}
    engine = ThreadEngine(CASTERS, block_bytes=CAST_BYTES, mapped=True)
    jobs = [Job(pair.name, (pair.source.row(pair.info.name, pair.info),)) for pair in pairs]
    task: Folding[None, None] = Folding(lambda job: _Casting(by_name[job.key].target), lambda job, parts: None)
    for job, _, _ in engine.run(jobs, task):
        state.done(by_name[job.key])


class _Casting:
    """Copies blocks of a file into a tensor of another dtype."""

    def __init__(self, target: torch.Tensor) -> None:
        self._flat = target.detach().view(-1)

    def update(self, block: Block) -> None:
        self._flat[block.start : block.stop].copy_(tensor_of(block))

    def finish(self) -> None:
        return


# --- through a buffer -----------------------------------------------------------------------------


def _through(buffer: torch.Tensor, pair: Pair, place: Location, files: OpenFiles) -> torch.Tensor:
    """Read, cast and copy part by part; gives back the buffer, which may have been made or grown."""
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
    """Views of at most so many elements that follow each other in C order, and where each starts.

    Of a target that is not contiguous, rows along its first dimension, at least one at a time.
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


def _values(pair: Pair) -> torch.Tensor:
    import torch

    if pair.info.dtype.torch_name is not None:
        return pair.source.tensor(pair.info.name)
    # Elements of less than a byte: torch has no such types, and every value of them is a float32.
    import numpy as np

    return torch.from_numpy(pair.source.numpy(pair.info.name).astype(np.float32))


# --- a model loaded from itself -------------------------------------------------------------------


def _saved_from_overwriting(pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """Copies of the values that lie in memory which another pair writes to, by name.

    So parameters of one model can be exchanged. Values that lie where they belong need no copy.
    """
    if not any(pair.source.borrowed for pair in pairs):
        return {}
    spans = sorted(span for pair in pairs if (span := _span(pair.target)) is not None)
    starts = [start for start, _ in spans]
    # Storages may hold each other's part when an array shows the middle of one; how far the ones before reach decides.
    reach = list(accumulate((stop for _, stop in spans), max))
    copies = {}
    for pair in pairs:
        if not pair.source.borrowed:
            continue
        value, target = pair.source.tensor(pair.info.name), pair.target
        span = _span(value)
        if span is None or (value.data_ptr() == target.data_ptr() and value.stride() == target.stride()):
            continue
        at = bisect_left(starts, span[1])  # those that start before the values end
        if at and reach[at - 1] > span[0]:
            copies[pair.name] = value.clone()
    return copies


def _span(tensor: torch.Tensor) -> tuple[int, int] | None:
    """The addresses of a tensor's storage; None where it has none."""
    import torch

    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return None
    storage = tensor.untyped_storage()
    return (storage.data_ptr(), storage.data_ptr() + storage.nbytes()) if storage.nbytes() else None
