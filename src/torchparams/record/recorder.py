"""Recorder of statistics of every parameter during a training."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from torchparams.errors import OptionError, UnsupportedSource
from torchparams.measure.grouping import groups_of
from torchparams.record.meter import Meter, together
from torchparams.record.ranks import Team
from torchparams.record.reading import Reading
from torchparams.record.store import Writer
from torchparams.record.watchdogs import WATCHDOGS, YOUNG, Seen
from torchparams.render.result import Result
from torchparams.render.tree import Text, Tree, plural, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torchparams.record.meter import Measured
    from torchparams.record.watchdogs import RecordFinding, Watchdog

    Array = np.ndarray[Any, Any]
    Sink = Callable[[int, Mapping[str, float]], object]

QUANTITIES = ("weights", "gradients", "updates", "histograms")
"""Quantities to record, each with its own interval."""

LONGEST = 100
"""Default maximum number of steps between two full records."""

SHORTEST = 10
"""Default minimum number of steps between two full records."""

BUDGET = 0.005
"""Default fraction of the run time for full records."""

FLUSH_SECONDS = 30.0
FLUSH_BYTES = 64 << 20


class Recorder(Result):
    """Record statistics of every parameter during a training, at a small cost.

    Call `step` after `optimizer.step()` and before `zero_grad()`. A record has, for every parameter, the norms of the
    weight, gradient and update, the update-to-weight ratio, mean, standard deviation, largest magnitude, fraction of
    zeros, number of non-finite elements, and a histogram of magnitudes (one bin per power of two). Gradients are
    checked for non-finite elements at every step. `tp.history` and `tp.diagnose` read the record.

    The model is not changed. Inside `with`, a hook of the optimizer copies the weights before each step whose update is
    recorded, which needs memory for one more copy of the parameters.

    With several ranks, rank 0 writes. Parts of sharded parameters are combined by one collective for each record, which
    all ranks enter; steps without a record do not communicate.

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

    Attributes:
        findings: Findings so far.
        cost: Fraction of the time since the start of `with` spent on recording.

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
        self._every = _every(every)
        self._optimizers = _inner(optimizer)
        self._by, self._rows = by, rows
        self._reading = Reading(model, rows)
        self._team = Team(self._reading.tensors)
        if by is not None:
            groups_of(self._reading.infos, by, where=self._reading.label)  # raises before the training starts
        self._watchdogs = tuple(watchdogs)
        self._on_finding, self._sinks, self._quiet = on_finding, tuple(sinks), quiet
        self.path = os.fspath(path)
        self._writer = Writer(path, self._reading.head(), resume=resume) if self._team.is_first else None
        last = None if self._writer is None else self._writer.last
        self._next = self._team.agree(start if start is not None else 0 if last is None else last + 1)
        self._first = self._next
        self.findings: list[RecordFinding] = []
        self._reported: set[tuple[str, str]] = set()
        self._meter = Meter()
        self._handles: list[Any] = []
        self._old: list[Any] | None = None
        self._has_old = self._stepped = False
        self._interval = SHORTEST
        self._due = self._next  # next full record, if the interval adapts
        self._numbers: list[tuple[int, str, float]] = []
        self._pending: list[tuple[int, Any]] = []
        self._forget()
        self._spent, self._entered, self._left = 0.0, 0.0, 0.0
        self._flushed = time.monotonic()
        self._records = 0

    # --- in a training -----------------------------------------------------------------------------

    def __enter__(self) -> Self:
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))
        self._entered, self._left = time.perf_counter(), 0.0
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._old = None
        self._left = time.perf_counter()
        self._look_back()
        self.flush()

    def log(self, **numbers: float) -> None:
        """Record numbers such as the loss for the step that the next call of `step` completes.

        Args:
            numbers: Numbers by name; reading a tensor of one element waits for an accelerator.
        """
        self._numbers += [(self._next, name, float(value)) for name, value in numbers.items()]

    def step(self) -> bool:
        """Record a step if it is due; call this after `optimizer.step()` and before `zero_grad()`.

        A call without an optimizer step before it is part of gradient accumulation and is not counted. The exception is
        a non-finite gradient: then a scaler skipped the step, and it is counted.

        Returns:
            Whether a step was counted.

        Raises:
            OptionError: No parameter has a gradient, or the recorder is not in a `with` block.
        """
        begun = time.perf_counter()
        if not self._handles:
            raise OptionError("the recorder is not running", hint="call step() inside `with recorder:`")
        reading = self._reading
        grads = reading.gradients()
        if all(grad is None for grad in grads) and any(reading.trainable):
            raise OptionError(
                "no parameter has a gradient",
                where=reading.label,
                hint="call recorder.step() after optimizer.step() and before zero_grad()",
            )
        flags = self._meter.nonfinite(grads)
        if not self._stepped and not (flags.is_here and flags.places()):
            self._spend(begun)
            return False
        step, self._next = self._next, self._next + 1
        self._stepped = False
        self._pending.append((step, flags))
        due = self._due_at(step)
        if due:
            self._record(step, due, grads)
        elif flags.is_here and not self._team.is_sharded and flags.places():
            self._look_back()
            self._check_weights(step)
        elif flags.is_here and not flags.places():
            self._pending.pop()  # nothing to report
        self._has_old = False
        self._spend(begun)
        if due and self._every is None:
            self._adapt(time.perf_counter() - begun, step)
        if self._writer is not None and (
            time.monotonic() - self._flushed > FLUSH_SECONDS or self._writer.nbytes > FLUSH_BYTES
        ):
            self.flush()
        return True

    def flush(self) -> None:
        """Write what was recorded since the last flush; happens automatically about twice a minute, and at the end.

        Raises:
            WriteError: The disk is full, or cannot be written.
        """
        if self._writer is not None:
            if self._numbers:
                steps, names, values = zip(*self._numbers, strict=True)
                self._writer.add("numbers", {"step": steps, "name": names, "value": values})
                self._numbers.clear()
            self._writer.flush()
        self._flushed = time.monotonic()

    @property
    def cost(self) -> float:
        """Fraction of the time since the start of `with` spent on recording."""
        if not self._entered:
            return 0.0
        total = (self._left or time.perf_counter()) - self._entered
        return self._spent / total if total > 0 else 0.0

    # --- hooks ---------------------------------------------------------------------------------------

    def _before(self, *_: object) -> None:
        begun = time.perf_counter()
        if "updates" in self._due_at(self._next) and not self._has_old:
            self._refresh()
            self._copy()
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

    def _due_at(self, step: int) -> frozenset[str]:
        if self._every is None:
            return frozenset(QUANTITIES) if step >= self._due else frozenset()
        at = step - self._first
        return frozenset(name for name, steps in self._every.items() if at % steps == 0)

    def _adapt(self, took: float, step: int) -> None:
        """Choose the step of the next full record."""
        steps = step - self._first
        if steps and not self._team.is_sharded:
            period = (time.perf_counter() - self._entered - self._spent) / steps
            wanted = math.ceil(took / (BUDGET * period)) if period > 0 else LONGEST
            self._interval = min(max(wanted, SHORTEST), LONGEST)
        elif self._team.is_sharded:
            self._interval = LONGEST  # clocks differ between ranks, and all must enter the collective
        self._due = step + self._interval

    def _refresh(self) -> bool:
        """Read the model again; return whether a layer was replaced, frozen or unfrozen."""
        if not self._reading.refresh():
            return False
        self._forget()
        self._old, self._has_old = None, False
        return True

    def _record(self, step: int, due: frozenset[str], grads: Sequence[Any]) -> None:
        reading = self._reading
        if self._refresh():
            grads = reading.gradients()
        weights = bool(due & {"weights", "histograms"})
        none = [None] * len(grads)
        parts = [
            self._meter.measure(reading.local() if weights else none, exponents="histograms" in due),
            self._meter.measure(grads if "gradients" in due else none),
        ]
        apart = None
        if "updates" in due and self._has_old and self._old is not None:
            apart = self._meter.distance(reading.local(), self._old)
        (found, gradient), apart, first = self._team.collect(parts, apart, self._first_odd())
        dead = reading.dead_rows(grads) if "gradients" in due and self._rows is not None else None
        columns = _columns(found, gradient, apart, due, reading, dead)
        if self._writer is not None:
            count = len(reading.names)
            head: dict[str, Any] = {"step": [step] * count, "kind": ["parameter"] * count, "name": reading.names}
            self._writer.add("parameters", {**head, **columns, **_histograms(found, due)})
            if self._by is not None:
                self._groups(step, found, gradient, apart, due)
            self._sink(step, columns)
        for at in np.unique(first[np.isfinite(first)]):
            self._ask(int(at), {"grad_nonfinite": (first == at).astype(float)})
        self._watch(step, columns, apart)
        self._records += 1

    def _groups(self, step: int, found: Measured, gradient: Measured, apart: Array | None, due: frozenset[str]) -> None:
        assert self._writer is not None
        reading = self._reading
        _, groups = groups_of(reading.infos, self._by, strict=False)
        place = {name: i for i, name in enumerate(reading.names)}
        members = [[place[name] for name in names if name in place] for names in groups.values()]
        total, slope = found.grouped(members), gradient.grouped(members)
        distances = None if apart is None else np.array([together(apart[m]) for m in members])
        columns = _columns(total, slope, distances, due, None, None)
        head: dict[str, Any] = {"step": [step] * len(groups), "kind": ["group"] * len(groups), "name": list(groups)}
        self._writer.add("parameters", {**head, **columns, **_histograms(total, due)})

    def _sink(self, step: int, columns: Mapping[str, Any]) -> None:
        if not self._sinks:
            return
        numbers = {
            f"{key}/{name}": float(value)
            for key, values in columns.items()
            for name, value in zip(self._reading.names, values, strict=True)
            if value is not None
        }
        logged = {name: value for at, name, value in self._numbers if at == step}
        for sink in self._sinks:
            sink(step, {**logged, **numbers})

    # --- watchdogs ---------------------------------------------------------------------------------------

    def _forget(self) -> None:
        count = len(self._reading.names)
        self._before_columns: Mapping[str, Any] = {}
        self._ratios: list[deque[float]] = [deque(maxlen=9) for _ in range(count)]
        self._since = np.full(count, -YOUNG)  # the last step before which a parameter was zero

    def _first_odd(self) -> Array:
        """First step with a non-finite gradient since the last record, for each parameter."""
        first = np.full(len(self._reading.names), math.inf)
        for step, flags in reversed(self._pending):
            first[flags.places()] = step
        self._pending.clear()
        return first

    def _look_back(self) -> None:
        """Report non-finite gradients since the last record."""
        first = self._first_odd()
        for at in np.unique(first[np.isfinite(first)]):
            self._ask(int(at), {"grad_nonfinite": (first == at).astype(float)})

    def _check_weights(self, step: int) -> None:
        flags = self._meter.nonfinite(self._reading.local())
        if places := flags.places():
            odd = np.zeros(len(self._reading.names))
            odd[places] = self._meter.measure(self._reading.local()).nonfinite[places]
            self._ask(step, {"nonfinite": odd})

    def _watch(self, step: int, columns: Mapping[str, Any], apart: Array | None) -> None:
        if apart is not None:
            self._since[apart[:, 1] == 0] = step
        self._ask(step, columns)
        ratios = columns.get("update_ratio")
        if ratios is not None:
            for kept, ratio in zip(self._ratios, ratios, strict=True):
                if ratio is not None and math.isfinite(ratio):
                    kept.append(ratio)
        self._before_columns = {**self._before_columns, **columns}

    def _ask(self, step: int, columns: Mapping[str, Any]) -> None:
        reading = self._reading
        seen = Seen(
            step,
            reading.names,
            np.array(reading.trainable, bool),
            {key: _floats(values) for key, values in columns.items()},
            {key: _floats(values) for key, values in self._before_columns.items()},
            self._ratios,
            step - self._since < YOUNG,
        )
        fresh = []
        for watchdog in self._watchdogs:
            for finding in watchdog.look(seen):
                if (finding.rule, finding.name) not in self._reported:
                    self._reported.add((finding.rule, finding.name))
                    fresh.append(finding)
        self.findings += fresh
        if not fresh or self._writer is None:
            return
        keys = ("step", "rule", "name", "value", "message")
        self._writer.add("findings", {key: [getattr(each, key) for each in fresh] for key in keys})
        if not self._quiet:
            shown = fresh[:5]
            lines = [printable(f"torchparams: {each}") for each in shown]
            if len(fresh) > len(shown):
                lines.append(f"torchparams: step {step}: {len(fresh) - len(shown):,} more findings")
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
        parts = [Text(printable(f"Record of {self._reading.label} in {self.path}"), "title"), Text(line, "dim")]
        parts += [Text(printable(str(finding)), "warn") for finding in self.findings[:20]]
        if len(self.findings) > 20:
            parts.append(Text(f"… {len(self.findings) - 20:,} more findings …", "dim"))
        return Tree(tuple(parts))


def _every(every: int | Mapping[str, int] | None) -> dict[str, int] | None:
    if every is None:
        return None
    asked = dict(every) if isinstance(every, Mapping) else dict.fromkeys(QUANTITIES, every)
    for name, steps in asked.items():
        if name not in QUANTITIES:
            raise OptionError(f"every has the key {name!r}", exists=f"quantities are {', '.join(QUANTITIES)}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise OptionError(f"every must be a number of steps, not {steps!r}")
    return {name: steps for name, steps in asked.items() if steps}


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


def _columns(
    found: Measured,
    gradient: Measured,
    apart: Array | None,
    due: frozenset[str],
    reading: Reading | None,
    dead: list[int | None] | None,
) -> dict[str, Any]:
    """Values by column of the record; None if there are none."""
    columns: dict[str, Any] = {}
    if "weights" in due:
        with np.errstate(all="ignore"):
            columns["weight_norm"] = found.norms
            columns["mean"] = found.means
            columns["std"] = found.deviations
            columns["max_abs"] = found.most
            columns["zeros"] = found.zeros / np.maximum(found.counts, 1)
            columns["nonfinite"] = found.nonfinite
    if "gradients" in due:
        none = gradient.counts == 0
        columns["grad_norm"] = [None if gone else float(v) for gone, v in zip(none, gradient.norms, strict=True)]
        columns["grad_nonfinite"] = [None if gone else int(v) for gone, v in zip(none, gradient.nonfinite, strict=True)]
    if apart is not None:
        with np.errstate(all="ignore"):
            ratios = np.where(apart[:, 1] > 0, apart[:, 0] / apart[:, 1], np.nan)
        columns["update_norm"] = apart[:, 0]
        columns["update_ratio"] = [None if math.isnan(ratio) else float(ratio) for ratio in ratios]
    if dead is not None:
        columns["dead_rows"] = dead
    return columns


def _histograms(found: Measured, due: frozenset[str]) -> dict[str, Any]:
    if "histograms" not in due or found.exponents is None:
        return {}
    first, counts = [], []
    for row, zeros in zip(found.exponents, found.zeros, strict=True):
        small = row[:-1].copy()  # the last bin counts non-finite elements
        small[0] -= zeros
        used = np.flatnonzero(small)
        first.append(int(used[0]) - 127 if len(used) else None)
        counts.append(small[used[0] : used[-1] + 1] if len(used) else [])
    return {"exponent": first, "counts": counts}


def _floats(values: Any) -> Array:
    return np.array([math.nan if value is None else value for value in values], np.float64)
