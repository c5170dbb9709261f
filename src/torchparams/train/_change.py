"""Changes by `freeze` and `unfreeze`: their undo and their trees."""

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
    Row,
    Table,
    Text,
    Tree,
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
    """Changes made by one call, with the previous state. Parameters that already had the new state are not included."""

    # Changes that can still be undone. A change whose result was dropped does not block the undo of others.
    _all: ClassVar[weakref.WeakSet[Steps]] = weakref.WeakSet()
    _count: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, requires_grad: bool = False) -> None:
        self.requires_grad = requires_grad
        self._number = next(self._count)
        self._all.add(self)
        # Two lists: a list of pairs would add one object per parameter for the garbage collector to visit.
        self.flipped: list[Any] = []
        self.grads: list[Any] = []
        self.cleared: list[tuple[Any, Any]] = []
        self.held: list[StatisticsHold] = []
        self.released: list[StatisticsHold] = []

    def flip(self, parameter: Any, grad: Any) -> bool:
        if parameter.requires_grad is self.requires_grad:
            return False
        parameter.requires_grad = self.requires_grad  # lazy parameters have no requires_grad_()
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
        """Refuse to undo while a later change of the same parameters or layers is in effect.

        Raises:
            TorchParamsError: A later change is in effect.
        """
        ours = self._touched()
        for later in tuple(self._all):
            if later._number > self._number and not ours.isdisjoint(later._touched()):
                verb = "unfreeze" if later.requires_grad else "freeze"
                raise TorchParamsError(
                    f"a later {verb} changed some of the same parameters or layers and is still in effect",
                    where=where,
                    exists="nothing was changed",
                    hint="undo the later change first",
                )

    def _touched(self) -> set[int]:
        things = (self.flipped, (parameter for parameter, _ in self.cleared))
        layers = (hold.module for hold in (*self.held, *self.released))
        return {id(thing) for kind in (*things, layers) for thing in kind}

    def undo(self) -> None:
        # Emptying the lists makes a second undo do nothing, and releases the gradients.
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
                # The parameter is frozen again. An optimizer would move it by a gradient computed in the meantime.
                parameter.grad = grad if grad is None or _fits(parameter, grad) else None
        while self.cleared:
            parameter, grad = self.cleared.pop()
            if parameter.grad is None and _fits(parameter, grad):
                parameter.grad = grad


def _fits(parameter: Any, grad: Any) -> bool:
    """True if the parameter still has the gradient's device, dtype and shape."""
    same = (parameter.device, parameter.dtype, parameter.shape) == (grad.device, grad.dtype, grad.shape)
    return bool(same)


class Change(Result):
    """Result of `freeze` or `unfreeze`. As a context manager it undoes the change on exit.

    Attributes:
        label: The model.
        names: The selected parameters, by canonical name, in the model's order.
        changed: Selected parameters whose `requires_grad` changed.
        statistics: Layers whose running statistics stopped or resumed, by canonical name.
        trainable: Number of elements in the model's trainable parameters after the change.
        numel: Number of elements in all parameters of the model.
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
            reading = chosen.reading
            self.names = tuple(chosen.parameters())
            self.label = chosen.source.label
            self._sizes = dict(zip(reading.tensors, reading.column("sizes"), strict=True))
            every = chosen.parameters(reading.names)
            self.numel = sum(self._sizes[name][1] for name in every)
            self.trainable = sum(self._sizes[name][1] for name, parameter in every.items() if parameter.requires_grad)
            self._ddp = "DistributedDataParallel(" in chosen.source.label

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """State of the selected modules outside their parameters and buffers; not changed."""
        return () if self._source is None else outside(self._source, self.names, whole=self._whole)

    def undo(self) -> None:
        """Restore every flag, mode and gradient. A second call does nothing.

        Only the changes of this call are undone, so several freezes can be undone separately. If a later change
        affects the same parameters or layers, and its result still exists, undo the later change first. A layer gets
        the mode it would have without the freeze, including any `model.eval()` called in between. Gradients computed
        after a freeze are kept. Gradients computed after an unfreeze are removed: they would move a frozen parameter.

        Raises:
            TorchParamsError: A later change must be undone first. Nothing is changed.
        """
        self._steps.refuse_if_changed_since(self.label)
        self._steps.undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def tree(self, *, limit: int | None = ROWS_SHOWN) -> Tree:
        """Tree of the change.

        Args:
            limit: Maximum number of parameters to list; None for all.
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
        return Tree(tuple(parts))

    def _title(self) -> str:
        already = len(self.names) - len(self.changed)
        title = f"{self.label}: {self.did} {plural(len(self.names), 'tensor')}"
        return f"{title}, {already:,} of them {self.before[1]} before" if already else title

    def _record(self, limit: int | None) -> Tree:
        """Tree of names read from JSON, without shapes or counts."""
        title = f"{plural(len(self.names), 'tensor')} to freeze; apply(model) freezes them"
        rows = [Row((name,)) for name in self.names]
        parts: list[Text | Table] = [
            Text(title, "title"),
            Table((Column("name", style="name", shrink=True),), cut(rows, limit, "names")),
        ]
        if self.statistics:
            parts.append(Text(f"running statistics to stop in {which(self.statistics)}"))
        return Tree(tuple(parts))

    def _notes(self) -> list[Text | Table]:
        return []

    def to_json(self) -> dict[str, Any]:
        """The change as JSON data."""
        return {
            "names": list(self.names),
            "changed": list(self.changed),
            "statistics": list(self.statistics),
            "trainable": self.trainable,
            "numel": self.numel,
            "left_out": [each.to_json() for each in self.left_out],
        }


def which(names: Sequence[str], what: str = "layer", several: str | None = None) -> str:
    """Count and first names of modules or parameters.

    >>> which(["encoder.norm", ""])
    '2 layers: encoder.norm, the model itself'
    """
    return f"{plural(len(names), what, several)}: {listed(shown(names))}"


def shown(names: Sequence[str]) -> list[str]:
    """Names for a message. The root module, whose name is empty, becomes "the model itself"."""
    return [name or "the model itself" for name in names]


def _count(n: int) -> str:
    return human_count(n) if n >= 1000 else str(n)
