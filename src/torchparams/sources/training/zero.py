"""Checkpoints of DeepSpeed's ZeRO, stages 1 to 3, as one table.

Each rank saves its partition of the float32 weights and of the optimizer state as flat tensors in
`*_optim_states.pt`. `*_model_states.pt` has the names and shapes in the order of the weights, and the tensors that are
not partitioned: buffers, and in stages 1 and 2 frozen parameters.

- Stages 1 and 2: the partitions of all ranks, concatenated, are the concatenated weights of a group, with padding at
  the end and after some parameters.
- Stage 3: each parameter is split into one part per rank; the last part is padded.

DeepSpeed's `zero_to_fp32.py` is the reference.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.errors import FileFormatError, UnknownName, shorten
from torchparams.expressions.operations import Cast, Concat, Slice
from torchparams.expressions.strided import Strided
from torchparams.info import ParameterInfo
from torchparams.io.filebytes import check_name_lengths, paused_gc
from torchparams.io.packing import contiguous
from torchparams.render.tree import listed, plural
from torchparams.sources.torchfile.nodes import plain_copy
from torchparams.sources.training._zero_files import MODEL, opened
from torchparams.sources.training.parted import PartedSource, within

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchparams.expressions.base import Expression
    from torchparams.sources.training._zero_files import Flat

OPTIMIZER = "optimizer"
"""Text after `#` for the state of the optimizer."""

Place = tuple[int, int, tuple[int, ...]]
"""Group of a parameter, its first element in the group, and its shape."""

_F32 = DType.of("float32")
_DEPTH, _NODES = 8, 10_000  # limits for an entry that is not a tensor


def open_zero(path: str, folder: str, inner: str | None = None, label: str | None = None) -> ZeroSource:
    """Open a ZeRO checkpoint.

    Args:
        path: The directory as the user wrote it.
        folder: Folder of the tag in it, or the directory itself.
        inner: `optimizer` for the optimizer state; otherwise, include only tensors below this name.
        label: Name in tables and messages; by default, the path and `inner`.

    Raises:
        FileFormatError: A rank is missing, or the sizes of the partitions do not match the shapes.
        UnknownName: No tensor is below `inner`.
    """
    with paused_gc():
        return ZeroSource(path, folder, inner, label)


class ZeroSource(PartedSource):
    """The weights of a ZeRO checkpoint, or the state of its optimizer.

    Args:
        path, folder, inner, label: See `open_zero`.
    """

    def __init__(self, path: str, folder: str, inner: str | None, label: str | None = None) -> None:
        models, optims = opened(folder)
        self._models, self._optims = models, optims
        self._model = model = models[0]
        self._world = len(optims)
        self.format = f"ZeRO stage {optims[0].stage}" if optims[0].stage else "ZeRO of BF16_Optimizer"
        head, _, rest = (inner or "").partition(".")
        self._state = head == OPTIMIZER
        self._places = self._weights()
        rows = self._moments() if self._state else self._model_rows()
        shared = {} if self._state else model.shared
        short = within(path, (rest or None) if self._state else inner, list(rows), ())
        aliases: dict[str, list[str]] = {}
        for other, name in shared.items():
            if name in short and other not in rows:
                aliases.setdefault(name, []).append(other)
        self._made = {short[name]: rows[name] for name in short}
        infos = [
            ParameterInfo(
                name, x.shape, x.dtype, x.numel, x.nbytes, "file", "tensor", raw_name=name,
                aliases=tuple(aliases.get(long, ())) if name == long else (),
            )
            for long, name in short.items() if (x := rows[long]) is not None
        ]  # fmt: skip
        super().__init__(
            label or (f"{path}#{inner}" if inner else path),
            infos,
            [each.file for each in (*models, *optims)],
            imported=[found for each in (*models, *optims) for found in each.archive.machine.imported],
            mappings=[] if inner else [OPTIMIZER],
        )
        check_name_lengths(self._infos.keys(), path)

    def _build(self, name: str) -> Expression:
        return self._made[name]

    def _entries(self) -> Mapping[str, Any]:
        left = [_NODES]
        given = self._optims[0].beside if self._state else self._model.beside
        return {name: plain_copy(value, _DEPTH, left) for name, value in given.items() if left[0] > 0}

    # --- where the weights lie -------------------------------------------------------------------

    def _weights(self) -> dict[str, Place]:
        """Name → group, first element in it, and shape. In stage 3, all groups are one, and the element is a rank's."""
        groups = self._model.shapes
        if self._optims[0].stage == 3:
            return self._interleaved()
        for optim in self._optims:
            if len(optim.groups) != len(groups):
                raise optim.error(
                    f"it has {plural(len(optim.groups), 'group')}, and {self._model.name} the shapes of {len(groups)}"
                )
        found: dict[str, Place] = {}
        for number, shapes in enumerate(groups):
            at = 0
            paddings = self._optims[0].paddings(number, len(shapes))
            for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
                found[name] = number, at, shape
                at += prod(shape) + padding
            there = sum(optim.groups[number].numel for optim in self._optims)
            # DeepSpeed pads groups to a multiple of this. Only the shapes give the positions of parameters: with
            # round_robin_gradients, param_slice_mappings have another order than the elements.
            unit = 2 * self._world
            if at > there or -(-at // unit) != -(-there // unit):
                raise self._model.error(
                    f"the shapes of group {number} take {at:,} elements, but the partitions of {self._world} ranks "
                    f"hold {there:,}"
                )
        return found

    def _interleaved(self) -> dict[str, Place]:
        found: dict[str, Place] = {}
        at = 0
        for shapes in self._model.shapes:
            for name, shape in shapes.items():
                found[name] = 0, at, shape
                at += -(-prod(shape) // self._world)
        for optim in self._optims:
            there = sum(flat.numel for flat in optim.groups)
            if there != at:
                raise optim.error(f"its partitions hold {there:,} elements, and by the shapes there are {at:,}")
        return found

    # --- rows ------------------------------------------------------------------------------------

    def _model_rows(self) -> dict[str, Expression]:
        """Rows of the weights, in the order of the model if it is known."""
        model = self._model
        rows: dict[str, Expression] = {}
        for name in self._places:
            rows[name] = self._assembled(name, [optim.groups for optim in self._optims])
        for name, shape in model.frozen.items():
            rows[name] = self._frozen(name, shape)
        for name in model.module:
            if name in rows or name in model.shared:
                continue
            x = model.source.row(f"{MODEL}.{name}")
            if self._optims[0].stage == 3 and name not in model.buffers and x.numel == 0:
                raise model.error(f"{shorten(repr(name))} is partitioned, but no file has its shape")
            # Buffers of a 16-bit model are stored in 16 bits; in the float32 model, they are float32.
            narrow = name in model.buffers and x.dtype.kind == "float" and x.dtype.bits == 16
            rows[name] = Cast(x, _F32) if narrow else x
        order = [name for name in model.module if name in rows]
        return {name: rows[name] for name in dict.fromkeys([*order, *rows])}

    def _moments(self) -> dict[str, Expression]:
        """Rows of the optimizer state."""
        keys = list(dict.fromkeys(key for states in self._optims[0].states for key in states))
        if not keys:
            raise UnknownName("it has no optimizer state", where=self._optims[0].path)
        rows: dict[str, Expression] = {}
        for name, (number, _, _) in self._places.items():
            for key in keys:
                found = self._moment(name, key, number)
                if found is not None:
                    rows[f"{name}.{key}"] = found
        return rows

    def _moment(self, name: str, key: str, number: int) -> Expression | None:
        """A state of a parameter; None if its group has no state of this name."""
        single = self._optims[0].single(number, key)
        if single is not None:
            return single
        partitions = []
        for optim in self._optims:
            flats = [optim.moment(group, key) for group in range(len(optim.groups))]
            wanted = flats if optim.stage == 3 else [flats[number]]
            if any(flat is None for flat in wanted):
                return None
            partitions.append([flat or optim.groups[group] for group, flat in enumerate(flats)])
        return self._assembled(name, partitions)

    def _assembled(self, name: str, partitions: Sequence[Sequence[Flat]]) -> Expression:
        """A parameter, assembled from the flat tensors of all ranks."""
        number, at, shape = self._places[name]
        numel = prod(shape)
        if self._optims[0].stage != 3:
            return _reshaped(_run([each[number] for each in partitions], at, at + numel), shape)
        part = -(-numel // self._world)
        runs = [x for rank, flats in enumerate(partitions)
                for x in _run(flats, at, at + max(min(part, numel - rank * part), 0))]  # fmt: skip
        return _reshaped(runs, shape) if numel else _reshaped(_run(partitions[0], 0, 0), shape)

    def _frozen(self, name: str, shape: tuple[int, ...]) -> Expression:
        """A frozen parameter: whole, or assembled from a fragment per rank."""
        numel = prod(shape)
        fragments = [model.fragment(name) for model in self._models]
        if sum(flat.numel for flat in fragments) < numel:
            raise self._model.error(
                f"the frozen {shorten(repr(name))} has the shape {list(shape)}, and its fragments hold "
                f"{sum(flat.numel for flat in fragments):,} elements"
            )
        return _reshaped(_run(fragments, 0, numel), shape)


def _run(flats: Sequence[Flat], start: int, stop: int) -> list[Expression]:
    """Elements `[start, stop)` of concatenated flat tensors."""
    starts = [0, *accumulate(flat.numel for flat in flats)]
    if start == stop:
        return [Slice(flats[0].row(), 0, 0, 0)]
    found: list[Expression] = []
    number = bisect_right(starts, start) - 1
    while start < stop:
        first, last = starts[number], min(starts[number + 1], stop)
        if start < last:
            x = flats[number].row()
            found.append(x if (start, last) == (first, first + x.numel) else Slice(x, 0, start - first, last - first))
            start = last
        number += 1
    return found


def _reshaped(runs: Sequence[Expression], shape: tuple[int, ...]) -> Expression:
    """Concatenate runs of elements and reshape them."""
    kept = [x for x in runs if x.numel] or list(runs[:1])
    dtypes = sorted({str(x.dtype) for x in kept})
    if len(dtypes) > 1:
        raise FileFormatError(f"its partitions are of {listed(dtypes)}", where=kept[0].summary())
    whole = kept[0] if len(kept) == 1 else Concat(kept)
    return Strided(whole, whole.dtype, shape, 0, contiguous(shape))
