"""What freezing and unfreezing have changed: how it is put back, and how it is shown."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torchparams.errors import TorchParamsError
from torchparams.left_out import left_out_lines
from torchparams.render.result import Result
from torchparams.render.rows import ROWS_SHOWN
from torchparams.render.tree import (
    Column,
    Report,
    Row,
    Table,
    Text,
    cut,
    human_count,
    human_shape,
    listed,
    plural,
)
from torchparams.train._live import outside
from torchparams.train._statistics import StatisticsHold, hold_on

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from torch import nn

    from torchparams.left_out import LeftOut
    from torchparams.train._live import Chosen


class Steps:
    """What has been changed, with what was there before. Nothing that was so already is in it."""

    # Those that somebody can still undo. What is forgotten without that is no obstacle to the undoing of others.
    _all: ClassVar[weakref.WeakSet[Steps]] = weakref.WeakSet()
    _count: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, requires_grad: bool = False) -> None:
        self.requires_grad = requires_grad
        self._number = next(self._count)
        self._all.add(self)
        # Two lists, and not one of pairs, which would be so many objects more for the garbage collector.
        self.flipped: list[Any] = []
        self.grads: list[Any] = []
        self.cleared: list[tuple[Any, Any]] = []
        self.held: list[StatisticsHold] = []
        self.released: list[StatisticsHold] = []

    def flip(self, parameter: Any, grad: Any) -> bool:
        if parameter.requires_grad is self.requires_grad:
            return False
        parameter.requires_grad = self.requires_grad  # not requires_grad_(): a lazy parameter has only the attribute
        self.flipped.append(parameter)
        self.grads.append(grad)
        return True

    def clear(self, parameter: Any, grad: Any) -> None:
        parameter.grad = None
        self.cleared.append((parameter, grad))

    def hold(self, layer: nn.Module) -> None:
        if hold_on(layer) is None:
            hold = StatisticsHold(layer)
            hold.place()
            self.held.append(hold)

    def release(self, layer: nn.Module) -> None:
        hold = hold_on(layer)
        if hold is not None:
            hold.release()
            self.released.append(hold)

    def refuse_if_changed_since(self, where: str) -> None:
        """Raise if a later change of the same parameters or layers is not undone: what was before is before that.

        Raises:
            TorchParamsError: There is one.
        """
        ours = self._touched()
        for later in tuple(self._all):
            if later._number > self._number and not ours.isdisjoint(later._touched()):
                verb = "unfreeze" if later.requires_grad else "freeze"
                raise TorchParamsError(
                    f"a later {verb} has changed some of the same parameters or layers, and is not undone",
                    where=where,
                    exists="nothing was changed",
                    hint="undo that first: changes of the same thing are undone in the reverse order",
                )

    def _touched(self) -> set[int]:
        things = (self.flipped, (parameter for parameter, _ in self.cleared))
        layers = (hold.module for hold in (*self.held, *self.released))
        return {id(thing) for kind in (*things, layers) for thing in kind}

    def undo(self) -> None:
        # Emptied as it goes: a second undo finds nothing to do, and the gradients are not kept any longer.
        while self.held:
            hold = self.held.pop()
            if hold_on(hold.module) is hold:
                hold.release()
        while self.released:
            hold = self.released.pop()
            if hold_on(hold.module) is None:
                hold.place()
        while self.flipped:
            parameter, grad = self.flipped.pop(), self.grads.pop()
            parameter.requires_grad = not self.requires_grad
            if self.requires_grad:
                # Frozen again: what has come meanwhile is a left-over gradient, by which an optimizer would move it.
                parameter.grad = grad if grad is None or _fits(parameter, grad) else None
        while self.cleared:
            parameter, grad = self.cleared.pop()
            if parameter.grad is None and _fits(parameter, grad):
                parameter.grad = grad


def _fits(parameter: Any, grad: Any) -> bool:
    """Whether the model has not been moved to another device or type since."""
    same = (parameter.device, parameter.dtype, parameter.shape) == (grad.device, grad.dtype, grad.shape)
    return bool(same)


class Change(Result):
    """What `freeze` or `unfreeze` has done; a context manager that takes it back.

    Attributes:
        label: The model.
        names: The selected parameters, by canonical name, in the model's order.
        changed: Those of them that were otherwise before.
        statistics: The layers whose running statistics stopped (or move again), by canonical name.
        trainable: Count of elements of the model's trainable parameters, afterwards.
        numel: Count of elements of all its parameters.
    """

    did = ""
    before = ("", "")
    statistics_did = ""

    def __init__(
        self, chosen: Chosen | None, changed: tuple[str, ...], statistics: tuple[str, ...], steps: Steps
    ) -> None:
        self.changed = changed
        self.statistics = statistics
        self._steps = steps
        self.names: tuple[str, ...] = ()
        self.label = "no model"
        self.trainable = self.numel = 0
        self._sizes: Mapping[str, tuple[tuple[int, ...] | None, int]] = {}
        self._ddp = False
        self._source = None if chosen is None else chosen.source
        self._whole = chosen is not None and len(chosen.names) == len(chosen.tensors)
        self._of_no_model = chosen is None
        self._narrow = None if chosen is None else chosen.narrow
        if chosen is not None:
            records = chosen.records
            self.names = tuple(chosen.parameters())
            self.label = chosen.source.label
            self._sizes = dict(zip(records.tensors, records.column("sizes"), strict=True))
            every = chosen.parameters(records.names)
            self.numel = sum(self._sizes[name][1] for name in every)
            self.trainable = sum(self._sizes[name][1] for name, parameter in every.items() if parameter.requires_grad)
            self._ddp = "DistributedDataParallel(" in chosen.source.label

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """State of the selected modules outside their parameters and buffers, which was left alone."""
        return () if self._source is None else outside(self._source, self.names, whole=self._whole)

    def undo(self) -> None:
        """Put every flag, mode and gradient back as it was; a second time it does nothing.

        Only what this call has changed is put back, so of several freezes each can be undone by itself. Where a later
        one has changed the same parameters or layers, and you hold its result, that has to be undone first. A layer's
        mode becomes what it would be now without the freeze: a `model.eval()` in between is not forgotten. Of
        gradients, one that has come after a freeze stays; one that has come after an unfreeze goes, for it would move a
        frozen parameter.

        Raises:
            TorchParamsError: A later change has to be undone first. Nothing has changed.
        """
        self._steps.refuse_if_changed_since(self.label)
        self._steps.undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def report(self, *, limit: int | None = ROWS_SHOWN) -> Report:
        """What was done, as a report.

        Args:
            limit: Most parameters to list; None for all.
        """
        columns = (
            Column("name", style="name", shrink=True),
            Column("shape", drop=1),
            Column("numel", right=True, style="number", drop=2),
            Column("before", style="dim"),
        )
        if self._of_no_model:
            return self._record(limit)
        changed = frozenset(self.changed)
        rows = []
        for name in self.names:
            shape, numel = self._sizes[name]
            rows.append(Row((name, human_shape(shape), f"{numel:,}", self.before[name not in changed])))
        parts: list[Text | Table] = [Text(self._title(), "title"), Table(columns, cut(rows, limit, "parameters"))]
        if self.statistics:
            parts.append(Text(f"running statistics {self.statistics_did} in {which(self.statistics)}"))
        parts += self._notes()
        parts += [Text(self._narrow, "warn")] if self._narrow else []
        parts += left_out_lines(self.left_out)
        share = f", {self.trainable / self.numel:.1%}" if self.numel else ""
        parts.append(Text(f"{_count(self.trainable)} of {_count(self.numel)} parameters are trainable{share}", "dim"))
        return Report(tuple(parts))

    def _title(self) -> str:
        already = len(self.names) - len(self.changed)
        title = f"{self.label}: {self.did} {plural(len(self.names), 'tensor')}"
        return f"{title}, {already:,} of them {self.before[1]} before" if already else title

    def _record(self, limit: int | None) -> Report:
        """What was read from JSON: of shapes and counts it knows nothing."""
        title = f"a record of {plural(len(self.names), 'tensor')} to freeze; apply(model) freezes them"
        rows = [Row((name,)) for name in self.names]
        parts: list[Text | Table] = [
            Text(title, "title"),
            Table((Column("name", style="name", shrink=True),), cut(rows, limit, "names")),
        ]
        if self.statistics:
            parts.append(Text(f"running statistics to stop in {which(self.statistics)}"))
        return Report(tuple(parts))

    def _notes(self) -> list[Text | Table]:
        return []

    def to_json(self) -> dict[str, Any]:
        """What was done, as JSON takes it."""
        return {
            "names": list(self.names),
            "changed": list(self.changed),
            "statistics": list(self.statistics),
            "trainable": self.trainable,
            "numel": self.numel,
            "left_out": [each.to_json() for each in self.left_out],
        }


def which(names: Sequence[str], what: str = "layer", several: str | None = None) -> str:
    """How many modules or parameters, and the first of them.

    >>> which(["encoder.norm", ""])
    '2 layers: encoder.norm, the model itself'
    """
    return f"{plural(len(names), what, several)}: {listed(shown(names))}"


def shown(names: Sequence[str]) -> list[str]:
    """Names for a sentence; the outermost module has none."""
    return [name or "the model itself" for name in names]


def _count(n: int) -> str:
    return human_count(n) if n >= 1000 else str(n)
