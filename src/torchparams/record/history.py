"""History of parameters over the steps of a training, from a record or from checkpoints."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.dtypes import DType
from torchparams.errors import OptionError, SourceError
from torchparams.info import ParameterInfo
from torchparams.io.folders import entries, is_directory
from torchparams.io.paths import folder_of, is_url, join, name_of, split_inner
from torchparams.io.patterns import expanded, is_pattern
from torchparams.order import natural
from torchparams.record.history_tree import COLUMNS, NUMBERS, History
from torchparams.record.store import is_record, read_head, read_table
from torchparams.record.watchdogs import RecordFinding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torchparams.engines.base import Engine

    Array = np.ndarray[Any, Any]

_NUMBER = re.compile(r"(?<!\d)(\d{1,18})(?!.*\d)")  # a step fits into 64 bits


def history(
    x: object,
    selector: object = None,
    *,
    steps: tuple[int | None, int | None] | None = None,
    strict: bool = True,
    engine: Engine | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> History:
    """Read the history of a training from a record or from checkpoints.

    Every checkpoint is measured, and the differences between consecutive checkpoints are the updates: `update_norm` is
    the norm of the difference to the previous checkpoint, and `update_ratio` divides it by the norm of the parameter
    there. Checkpoints have no gradients and no histograms.

    Args:
        x: The directory of a record (`tp.Recorder`); a directory with checkpoints (`step-100/`, `checkpoint-200/`,
            `epoch=3.ckpt`), a pattern such as `run/step-*` or `s3://bucket/step-*`, or a list of checkpoints. The last
            number in the name of a checkpoint is its step.
        selector: Parameters to include; None for all.
        steps: First and last step, both included; None for an open end.
        strict: Raise if any branch of a selector matches nothing.
        engine: Engine that reads checkpoints; see `tp.stats`.
        progress: Callback with the number of checkpoints done and in total.

    Raises:
        SourceError: There is no record and no checkpoint, or a file cannot be read.
        NoMatch: A branch of the selector matches nothing.
        MissingDependency: pyarrow is not installed, and `x` is a record.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> found = tp.history([{"w": np.array([3.0, 4.0])}, {"w": np.array([3.0, 3.0])}])
    >>> found.steps, found["w"]["update_ratio"].tolist()
    ((0, 1), [nan, 0.2])
    """
    if steps is not None and (len(steps) != 2 or (None not in steps and steps[0] > steps[1])):  # type: ignore[operator]
        raise OptionError(f"steps must be a first and a last step, not {steps!r}")
    if isinstance(x, str | os.PathLike) and is_record(x):
        found = _of_record(os.fspath(x))
    else:
        found = _of_checkpoints(checkpoints_of(x), steps, engine, progress)
    return found.select(selector, steps=steps, strict=strict)


# --- a record ---------------------------------------------------------------------------------------------


def _of_record(path: str) -> History:
    head = read_head(path)
    table = read_table(path, "parameters")
    names, codes = _coded(table.column("name"))
    columns: dict[str, Any] = {"step": table.column("step").to_numpy(), "session": table.column("session").to_numpy()}
    for key in NUMBERS:
        columns[key] = table.column(key).cast("float64").to_numpy()
    kinds, kind_codes = _coded(table.column("kind"))
    columns["kind"] = np.array(kinds, object)[kind_codes] if len(kinds) else np.empty(0, object)
    columns["exponent"] = table.column("exponent").cast("float64").to_numpy()
    columns["counts"] = table.column("counts")
    columns["overwritten"] = _overwritten(columns["step"], columns["session"], first := _first_steps(columns))
    logged: dict[str, dict[int, float]] = {}
    for row in _current(read_table(path, "numbers"), first):
        logged.setdefault(row["name"], {})[row["step"]] = row["value"]
    findings = [
        RecordFinding(*(row[key] for key in ("step", "rule", "name", "value", "message")))
        for row in _current(read_table(path, "findings"), first)
    ]
    return History(
        label=path,
        format="record",
        infos=_infos(head),
        names=tuple(names),
        codes=codes,
        data=columns,
        numbers=logged,
        findings=tuple(sorted(findings, key=lambda finding: finding.step)),
        repeated=(),
    )


def _coded(column: Any) -> tuple[list[str], Array]:
    """Names in a dictionary column, in the order of their first rows, and the index of the name of each row."""
    column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if not len(column):
        return [], np.empty(0, np.intp)
    return column.dictionary.to_pylist(), column.indices.to_numpy().astype(np.intp)


def _first_steps(columns: Mapping[str, Array]) -> dict[int, int]:
    """First step of each session."""
    steps, sessions = columns["step"], columns["session"]
    return {int(session): int(steps[sessions == session].min()) for session in np.unique(sessions)}


def _overwritten(steps: Array, sessions: Array, first: Mapping[int, int]) -> Array:
    """Mask of rows that a later session ran again: those at its first step or later."""
    found = np.zeros(len(steps), bool)
    for session, begin in first.items():
        found |= (sessions < session) & (steps >= begin)
    return found


def _current(table: Any, first: Mapping[int, int]) -> list[dict[str, Any]]:
    """Rows of a table that no later session ran again."""
    over = _overwritten(table.column("step").to_numpy(), table.column("session").to_numpy(), first)
    return [row for row, old in zip(table.to_pylist(), over.tolist(), strict=True) if not old]


def _infos(head: Mapping[str, Any]) -> dict[str, ParameterInfo]:
    found = {}
    for session in head["sessions"]:
        for row in session.get("parameters", ()):
            shape = None if row["shape"] is None else tuple(row["shape"])
            dtype = DType.of(row["dtype"])
            found[row["name"]] = ParameterInfo(
                row["name"],
                shape,
                dtype,
                row["numel"],
                dtype.nbytes(row["numel"]),
                "record",
                "parameter",
                row["requires_grad"],
            )
    return found


# --- checkpoints --------------------------------------------------------------------------------------------


def checkpoints_of(x: object) -> list[tuple[int, Any]]:
    """Step and target of each checkpoint, sorted by step.

    Raises:
        SourceError: There are no checkpoints.
        OptionError: Two checkpoints have the same step.
    """
    if isinstance(x, str | os.PathLike):
        path = os.fspath(x)
        targets = list(map(_opened, expanded([path]))) if is_pattern(path) else _steps_in(path)
        if not targets and not is_url(path) and not os.path.exists(path):
            raise SourceError("no such file or directory", where=path)
        if not targets:
            raise SourceError(
                "no record and no checkpoints of several steps",
                where=path,
                hint="pass the directory of a record or of checkpoints named by their steps, or a pattern",
            )
        numbers = [_NUMBER.search(name_of(split_inner(target)[0].rstrip("/"))) for target in targets]
        steps = [i if found is None else int(found[1]) for i, found in enumerate(numbers)]
        if len(set(steps)) < len(steps):
            raise OptionError("two checkpoints have the same step", where=path, hint="pass a pattern that matches one")
        return sorted(zip(steps, targets, strict=True), key=lambda pair: pair[0])
    if isinstance(x, list | tuple) and x:
        return list(enumerate(x))
    raise OptionError(f"history needs a directory, a pattern or a list of checkpoints, not {type(x).__name__}")


def has_steps(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a record, a pattern, or a directory of checkpoints that is not a checkpoint itself."""
    from torchparams.parameters import of

    path = os.fspath(path)
    if is_record(path) or is_pattern(path):
        return True
    if is_url(path) or not _steps_in(path):  # listing a server would cost a request
        return False
    try:
        of(path)
    except SourceError:
        return True
    return False


_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


def _steps_in(folder: str) -> list[str]:
    """Checkpoints in a directory: files and directories with a number in their names."""
    if not is_directory(folder):
        return []
    try:
        found = entries(folder)
    except OSError as error:
        raise SourceError(error.strerror or str(error), where=folder) from None
    names = [name for name, is_folder in found.items() if is_folder or name.endswith(_SUFFIXES)]
    return [_opened(join(folder, name)) for name in natural(names) if _NUMBER.search(name)]


def _opened(target: str) -> str:
    """The target under which a checkpoint is opened: the URL of a directory ends in `/`."""
    is_file = not is_url(target) or "#" in target or target.endswith((*_SUFFIXES, "/"))
    return target if is_file else f"{target}/"


def _of_checkpoints(
    checkpoints: Sequence[tuple[int, Any]],
    steps: tuple[int | None, int | None] | None,
    engine: Engine | None,
    progress: Callable[[int, int], None] | None,
) -> History:
    from torchparams.measure.diff import diff
    from torchparams.measure.stats import stats
    from torchparams.parameters import of
    from torchparams.record.changes import changes

    if steps is not None:
        first, last = steps
        checkpoints = [
            (step, target)
            for step, target in checkpoints
            if (first is None or step >= first) and (last is None or step <= last)
        ]
    infos: dict[str, ParameterInfo] = {}
    rows: list[tuple[int, str, dict[str, float]]] = []
    repeated: list[tuple[int, int]] = []
    before: tuple[int, Any] | None = None
    norms: dict[str, float] = {}
    for done, (step, target) in enumerate(checkpoints):
        params = of(target)
        infos.update(params.infos)
        measured = stats(params, engine=engine)
        updates: dict[str, float] = {}
        if before is not None:
            updates = changes(before[1], params, engine)
            if not any(norm > 0 for norm in updates.values()) and diff(before[1], params, engine=engine).same:
                repeated.append((step, before[0]))
        for each in measured:
            update, norm = updates.get(each.name, np.nan), norms.get(each.name, 0.0)
            rows.append(
                (
                    step,
                    each.name,
                    {
                        "weight_norm": each.l2,
                        "mean": each.mean,
                        "std": each.std,
                        "max_abs": float(each.linf),
                        "zeros": each.zeros / each.values if each.values else 0.0,
                        "nonfinite": float(each.nonfinite),
                        "update_norm": update,
                        "update_ratio": update / norm if norm else np.nan,
                    },
                )
            )
        before, norms = (step, params), {each.name: each.l2 for each in measured}
        if progress is not None:
            progress(done + 1, len(checkpoints))
    names = list(dict.fromkeys(name for _, name, _ in rows))
    place = {name: i for i, name in enumerate(names)}
    columns: dict[str, Any] = {"step": np.array([step for step, _, _ in rows], np.int64)}
    for key in NUMBERS:
        columns[key] = np.array([row.get(key, np.nan) for _, _, row in rows], np.float64)
    count = len(rows)
    columns["session"], columns["overwritten"] = np.zeros(count, np.int16), np.zeros(count, bool)
    columns["kind"] = np.full(count, "parameter", object)
    columns["exponent"], columns["counts"] = np.full(count, np.nan), None
    assert set(columns) | {"name"} == set(COLUMNS)
    return History(
        label=_label(checkpoints),
        format="checkpoints",
        infos=infos,
        names=tuple(names),
        codes=np.array([place[name] for _, name, _ in rows], np.intp),
        data=columns,
        numbers={},
        findings=(),
        repeated=tuple(repeated),
    )


def _label(checkpoints: Iterable[tuple[int, Any]]) -> str:
    targets = [target for _, target in checkpoints]
    if not targets or not all(isinstance(target, str | os.PathLike) for target in targets):
        return f"{len(targets)} checkpoints"
    paths = [os.fspath(target).rstrip("/") for target in targets]
    if any(map(is_url, paths)):
        folders = {folder_of(path) for path in paths}
        return f"{folders.pop()}/" if len(folders) == 1 else f"{len(targets)} checkpoints"
    common: str = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return common
