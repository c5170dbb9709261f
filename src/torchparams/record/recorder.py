"""Recorder of statistics of every parameter during a training."""

from __future__ import annotations

import math
import os
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from torchparams.errors import OptionError, TorchParamsError, UnsupportedSource
from torchparams.record.columns import histograms_of, numbers_of
from torchparams.record.findings_table import findings_table
from torchparams.record.measured import together
from torchparams.record.meter import Meter
from torchparams.record.ranks import Team
from torchparams.record.recorded import Recorded
from torchparams.record.schedule import Schedule
from torchparams.record.store import Writer
from torchparams.record.transfer import Transfer
from torchparams.record.watch import Watch
from torchparams.record.watchdogs import WATCHDOGS
from torchparams.render.result import Result
from torchparams.render.tree import Table, Text, Tree, plural, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torchparams.record.measured import Measured
    from torchparams.record.transfer import Flags
    from torchparams.record.watchdogs import RecordFinding, Watchdog

    Array = np.ndarray[Any, Any]
    Sink = Callable[[int, Mapping[str, float]], object]

FLUSH_SECONDS = 30.0
"""Maximum number of seconds between two flushes."""

BUFFER = (1 << 20, 64 << 20)
"""Minimum and maximum number of bytes to buffer; in between, 1 % of the model."""


class Recorder(Result):
    """Record statistics of every parameter during a training, at a small cost.

    Call `step` after `optimizer.step()` and before `zero_grad()`. A record has, for every parameter, the norms of the
    weight, gradient and update, the update-to-weight ratio, mean, standard deviation, largest magnitude, fraction of
    zeros, number of non-finite elements, and a histogram of magnitudes (one bin per power of two). Gradients are
    checked for non-finite elements at every step. `tp.history` and `tp.diagnose` read the record.

    The model is not changed. Inside `with`, a hook of the optimizer copies the weights before each step whose update is
    recorded, which needs memory for one more copy of the parameters.

    With several ranks, the first writes, prints and makes callbacks. Parts of sharded parameters are combined by one
    collective for each record, which all ranks enter; steps without a record do not communicate.

    Args:
        model: A live `nn.Module`.
        optimizer: Its optimizer, or a list of them.
        path: Directory of the record; created if it does not exist.
        every: Steps between two records: a number, or a mapping from `weights`, `gradients`, `updates` and `histograms`
            to numbers, where 0 or a missing key means never. None records everything at step 0 and at least every 100
            steps, or more often if that costs less than 0.5 % of the run.
        by: Groups to record too: `module`, `layer` or `dtype`, a selector or a list of them.
        rows: Selector of weights whose dead rows are counted: rows with only zero gradients.
        resume: Continue the record in `path`, after its last step.
        start: Number of the first step; 0, or the one after the last of a resumed record.
        watchdogs: Checks to run.
        on_finding: Callback with every finding, a `RecordFinding`.
        sinks: Callbacks with the step and the numbers of every record, under names such as `weight_norm/fc.weight`: see
            `record.sinks`.
        quiet: Do not print findings to standard error.

    Raises:
        UnsupportedSource: `model` is not a module, or `optimizer` not an optimizer.
        OptionError: `every` has an unknown key.
        WriteError: `path` already has a record, or cannot be written.
        MissingDependency: pyarrow is not installed.

    >>> import tempfile, torch
    >>> import torchparams as tp
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with tp.Recorder(model, optimizer, folder) as recorder:
    ...         for _ in range(3):
    ...             loss = model(torch.ones(1, 3)).square().sum()
    ...             loss.backward()
    ...             optimizer.step()
    ...             recorder.log(loss=loss.item())
    ...             _ = recorder.step()
    ...             optimizer.zero_grad()
    ...     found = tp.history(folder)
    >>> found.names, found.steps
    (('weight', 'bias'), (0,))
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        path: str | os.PathLike[str],
        *,
        every: int | Mapping[str, int] | None = None,
        by: object = None,
        rows: object = None,
        resume: bool = False,
        start: int | None = None,
        watchdogs: Iterable[Watchdog] = WATCHDOGS,
        on_finding: Callable[[RecordFinding], object] | None = None,
        sinks: Iterable[Sink] = (),
        quiet: bool = False,
    ) -> None:
        self._schedule = Schedule(every)
        self._optimizers = _inner(optimizer)
        self._reading = reading = Recorded(model, by, rows)
        self._team = Team(reading.names, reading.layouts)
        self._watch = Watch(watchdogs)
        self._watch.parameters(reading.names, reading.trainable)
        self._on_finding, self._sinks, self._quiet = on_finding, tuple(sinks), quiet
        self.path = os.fspath(path)
        self._writer: Writer | None = None
        error: TorchParamsError | None = None
        if self._team.is_first:
            try:
                self._writer = Writer(path, reading.head(), resume=resume)
            except TorchParamsError as caught:
                error = caught
        last = None if self._writer is None else self._writer.last
        first = start if start is not None else 0 if last is None else last + 1
        self._next = self._first = self._team.agree(first, error)
        self._schedule.begin(self._first)
        self._meter = Meter()
        self._handles: list[Any] = []
        self._old: list[Any] | None = None
        self._has_old = self._stepped = False
        self._refreshed = -1  # step for which the model was listed
        self._numbers: list[tuple[int, str, float]] = []
        self._pending: list[tuple[int, list[str], Flags]] = []
        self._spent, self._entered, self._left = 0.0, 0.0, 0.0
        self._copying = 0.0
        self._flushed = time.monotonic()
        self._buffer = min(max(sum(info.nbytes for info in reading.infos.values()) // 100, BUFFER[0]), BUFFER[1])
        self._records = 0

    # --- in a training -----------------------------------------------------------------------------

    def __enter__(self) -> Self:
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))
        self._entered, self._left = time.perf_counter(), 0.0
        return self

    def __exit__(self, error: object = None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._old = None
        begun = time.perf_counter()
        # After an error, other ranks may be elsewhere.
        first, counts = self._first_odd()
        if self._team.is_sharded and error is None:
            first, counts = self._team.earliest(first), np.full_like(counts, np.nan)
        self._report_odd(first, counts)
        self.flush()
        self._spend(begun)
        self._left = time.perf_counter()

    def log(self, **numbers: float) -> None:
        """Record numbers such as the loss for the step that the next call of `step` completes.

        Args:
            numbers: Numbers by name; reading a tensor of one element waits for an accelerator.
        """
        self._numbers += [(self._next, name, float(value)) for name, value in numbers.items()]

    def step(self) -> bool:
        """Record a step if it is due; call this after `optimizer.step()` and before `zero_grad()`.

        A call without an optimizer step before it is not counted: it is part of gradient accumulation, or a scaler
        skipped the step. Non-finite gradients of such a call are found under the number of the next step.

        Returns:
            Whether a step was counted.

        Raises:
            OptionError: No parameter has a gradient, or the recorder is not in a `with` block.
        """
        begun = time.perf_counter()
        if not self._handles:
            raise OptionError("the recorder is not running", hint="call step() inside `with recorder:`")
        grads = self._gradients()
        due = self._schedule.due(self._next) if self._stepped else frozenset()
        here = not self._team.is_sharded
        if "gradients" not in due:  # else the record counts them
            flags = self._meter.nonfinite(grads)
            if not flags.is_here or flags.counts():
                self._pending.append((self._next, self._reading.names, flags))
            here = here and flags.is_here
        if not self._stepped:
            if here:
                self._look_back()
            self._spend(begun)
            return False
        step, self._next = self._next, self._next + 1
        self._stepped = False
        if due:
            self._record(step, due)
        elif here and self._pending:
            self._look_back()
            self._check_weights(step)
        self._has_old = False
        self._spend(begun)
        if due:
            took = time.perf_counter() - begun + self._copying
            steps = step - self._first
            period = (time.perf_counter() - self._entered - self._spent) / steps if steps else None
            self._schedule.adapt(step, took, None if self._team.is_sharded else period)
            self._copying = 0.0
        if self._writer is not None and (
            time.monotonic() - self._flushed > FLUSH_SECONDS or self._writer.nbytes > self._buffer
        ):
            begun = time.perf_counter()
            self.flush()
            self._spend(begun)
        return True

    def _gradients(self) -> list[Any]:
        """The gradients of this step; the model is listed again if there are none."""
        reading = self._reading
        grads = reading.gradients()
        if any(grad is not None for grad in grads) or not any(reading.trainable):
            return grads
        if self._refresh():
            return self._gradients()
        raise OptionError(
            "no parameter has a gradient",
            where=reading.label,
            hint="call recorder.step() after optimizer.step() and before zero_grad()",
        )

    def flush(self) -> None:
        """Write what was recorded since the last flush; happens automatically about twice a minute, and at the end.

        Raises:
            WriteError: The disk is full, or cannot be written.
        """
        if self._writer is not None:
            if self._numbers:
                steps, names, values = map(list, zip(*self._numbers, strict=True))
                self._writer.add("numbers", {"step": steps, "name": names, "value": values})
                self._numbers.clear()
            self._writer.flush(self._next - 1 if self._next > self._first else None)
        self._flushed = time.monotonic()

    @property
    def findings(self) -> list[RecordFinding]:
        """Findings so far."""
        return self._watch.findings

    @property
    def cost(self) -> float:
        """Fraction of the time since the start of `with` spent on recording."""
        if not self._entered:
            return 0.0
        total = (self._left or time.perf_counter()) - self._entered
        return self._spent / total if total > 0 else 0.0

    # --- hooks ---------------------------------------------------------------------------------------

    def _before(self, *_: object) -> None:
        if self._has_old or "updates" not in self._schedule.due(self._next):
            return
        begun = time.perf_counter()
        self._refresh()
        self._refreshed = self._next
        self._copy()
        self._copying += time.perf_counter() - begun
        self._spend(begun)

    def _after(self, *_: object) -> None:
        self._stepped = True

    def _copy(self) -> None:
        import torch

        with torch.no_grad():
            tensors = self._reading.local()
            if self._old is None:
                self._old = [torch.empty_like(tensor, memory_format=torch.preserve_format) for tensor in tensors]
            torch._foreach_copy_(self._old, tensors)
        self._has_old = True

    def _spend(self, begun: float) -> None:
        self._spent += time.perf_counter() - begun

    # --- a record --------------------------------------------------------------------------------------

    def _refresh(self) -> bool:
        """List the model again; return whether a layer was replaced, frozen or unfrozen."""
        reading = self._reading
        if not reading.refresh():
            return False
        self._team.place(reading.layouts)
        self._watch.parameters(reading.names, reading.trainable, reading.same)
        self._old, self._has_old = None, False
        return True

    def _record(self, step: int, due: frozenset[str]) -> None:
        reading, meter = self._reading, self._meter
        if self._refreshed != step:
            self._refresh()
        grads = reading.gradients(whole="gradients" in due)
        weights = bool(due & {"weights", "histograms"})
        none = [None] * len(grads)
        transfer = Transfer()
        parts = [
            meter.measure(reading.local() if weights else none, exponents="histograms" in due, transfer=transfer),
            meter.measure(grads if "gradients" in due else none, transfer=transfer),
        ]
        update = None
        if "updates" in due and self._has_old and self._old is not None:
            update = meter.distance(reading.local(), self._old, transfer=transfer)
        rows = reading.living_rows(grads, self._team.here) if "gradients" in due else []
        living: list[Any] = [None] * len(rows)
        for i, each in enumerate(rows):
            if each is not None:
                transfer.add(each, partial(living.__setitem__, i))
        for _, _, flags in self._pending:
            flags.ask(transfer)
        transfer.fetch()
        first, counts = self._first_odd()
        (weight, gradient), update, first, living = self._team.collect(parts, update, first, living)
        dead = reading.dead_rows(living) if "gradients" in due else None
        columns = numbers_of(weight, gradient, update, due, dead)
        if self._writer is not None:
            head = {"step": step, "kind": "parameter", "name": reading.names}
            self._writer.add("parameters", {**head, **columns, **histograms_of(weight, due)})
            self._groups(step, weight, gradient, update, due)
            self._sink(step, columns)
        counts = np.full_like(counts, np.nan) if self._team.is_sharded else counts
        self._report_odd(np.where(first < step, first, np.inf), counts)
        self._report(self._watch.record(step, columns))
        self._report_odd(first, counts)  # of this step, if the record does not have them
        odd = np.isfinite(first).any() or gradient.nonfinite.any()
        if odd and "weights" not in due and not self._team.is_sharded:
            self._check_weights(step)
        self._records += 1

    def _groups(
        self, step: int, weight: Measured, gradient: Measured, update: Array | None, due: frozenset[str]
    ) -> None:
        members = list(self._reading.groups.values())
        if not members or self._writer is None:
            return
        norms = None if update is None else np.array([together(update[each]) for each in members])
        total = weight.grouped(members)
        head = {"step": step, "kind": "group", "name": list(self._reading.groups)}
        columns = numbers_of(total, gradient.grouped(members), norms, due)
        self._writer.add("parameters", {**head, **columns, **histograms_of(total, due)})

    def _sink(self, step: int, columns: Mapping[str, Array]) -> None:
        if not self._sinks:
            return
        numbers = {
            f"{key}/{name}": value
            for key, values in columns.items()
            for name, value in zip(self._reading.names, values.tolist(), strict=True)
            if not math.isnan(value)
        }
        logged = {name: value for at, name, value in self._numbers if at == step}
        for sink in self._sinks:
            sink(step, {**logged, **numbers})

    # --- watchdogs ---------------------------------------------------------------------------------------

    def _first_odd(self) -> tuple[Array, Array]:
        """First step with a non-finite gradient since the last record, infinite for none, and how many elements."""
        place = {name: i for i, name in enumerate(self._reading.names)} if self._pending else {}
        first, counts = np.full((2, len(self._reading.names)), np.inf)
        for step, names, flags in reversed(self._pending):
            for i, count in flags.counts().items():
                if (at := place.get(names[i])) is not None:
                    first[at], counts[at] = step, count
        self._pending.clear()
        return first, counts

    def _report_odd(self, first: Array, counts: Array) -> None:
        """Report non-finite gradients."""
        counts = np.where(np.isnan(counts), np.inf, counts)
        for step in np.unique(first[np.isfinite(first)]).tolist():
            odd = {"grad_nonfinite": np.where(first == step, counts, 0)}
            self._report(self._watch.look(int(step), odd))

    def _look_back(self) -> None:
        """Report non-finite gradients since the last record."""
        if self._pending:
            self._report_odd(*self._first_odd())

    def _check_weights(self, step: int) -> None:
        counts = self._meter.measure(self._reading.local()).nonfinite
        self._report(self._watch.look(step, {"nonfinite": counts}))

    def _report(self, fresh: list[RecordFinding]) -> None:
        if not fresh or self._writer is None:
            return
        keys = ("step", "rule", "name", "value", "message")
        self._writer.add("findings", {key: [getattr(each, key) for each in fresh] for key in keys})
        if not self._quiet:
            shown = fresh[:5]
            lines = [printable(f"torchparams: {each}") for each in shown]
            if len(fresh) > len(shown):
                more = plural(len(fresh) - len(shown), "more finding")
                lines.append(f"torchparams: step {fresh[0].step}: {more}")
            print("\n".join(lines), file=sys.stderr)
        for finding in fresh:
            if self._on_finding is not None:
                self._on_finding(finding)
        self.flush()

    # --- printing ------------------------------------------------------------------------------------------

    def tree(self) -> Tree:
        """Steps, records, cost and findings."""
        steps = self._next - self._first
        line = (
            f"{plural(steps, 'step')} · {plural(self._records, 'record')} of "
            f"{plural(len(self._reading.names), 'parameter')} · {self.cost:.1%} of the time"
        )
        parts: list[Text | Table] = [
            Text(printable(f"Record of {self._reading.label} in {self.path}"), "title"),
            Text(line, "dim"),
        ]
        if quantised := self._reading.quantised:
            parts.append(Text(f"{plural(len(quantised), 'quantised parameter')} not recorded", "dim"))
        if self.findings:
            parts += [Text(plural(len(self.findings), "finding"), "warn"), findings_table(self.findings)]
        return Tree(tuple(parts))


def _inner(optimizer: Any) -> list[Any]:
    """The optimizers themselves, without wrappers."""
    from torch.optim import Optimizer

    found = []
    for each in optimizer if isinstance(optimizer, list | tuple) else [optimizer]:
        inner = each
        while isinstance(getattr(inner, "optimizer", None), Optimizer):
            inner = inner.optimizer
        if not isinstance(inner, Optimizer):
            raise UnsupportedSource(f"{type(each).__qualname__} is not an optimizer of torch")
        found.append(inner)
    return found
