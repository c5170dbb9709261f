"""Results for several targets of one command: a line for each, and one exit status."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.errors import TorchParamsError
from torchparams.render.result import Result
from torchparams.render.rows import ROWS_SHOWN
from torchparams.render.tree import Cell, Column, Row, Table, Text, Tree, human_bytes, human_count, plural, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torchparams.measure.digest import Digests, Duplicates
    from torchparams.measure.stats import Stats
    from torchparams.measure.verify import Verification
    from torchparams.parameters import Parameters

FINE, FINDING, ERROR = "fine", "finding", "error"
_SIGNS = {FINE: "good", FINDING: "warn", ERROR: "error"}


@dataclass(frozen=True, slots=True)
class Answer:
    """Result for one target.

    Attributes:
        target: The target.
        outcome: `fine`, `finding`, or `error` if it could not be read.
        cells: Cells of the table; for an error, its message.
        form: The result as JSON data; None for an error.
    """

    target: str
    outcome: str
    cells: tuple[str, ...]
    form: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """The result as JSON data."""
        error = {"error": self.cells[0]} if self.outcome == ERROR else {}
        return {"target": self.target, "outcome": self.outcome, **error, **(self.form or {})}


@dataclass(frozen=True, repr=False)
class Several(Result):
    """Results for several targets; prints as a table with a line for each.

    Attributes:
        columns: Titles of the columns.
        answers: Results, in the order of the targets.
    """

    columns: tuple[str, ...]
    answers: tuple[Answer, ...]

    @property
    def outcome(self) -> str:
        """The worst outcome: `error`, `finding` or `fine`."""
        outcomes = {answer.outcome for answer in self.answers}
        return next((each for each in (ERROR, FINDING) if each in outcomes), FINE)

    def to_json(self) -> dict[str, Any]:
        """The results as JSON data."""
        return {"outcome": self.outcome, "targets": [answer.to_json() for answer in self.answers]}

    def tree(self) -> Tree:
        """The table, and the number of targets per outcome."""
        columns = [Column("target", style="name", shrink=True)]
        columns += [Column(title, right=True) for title in self.columns[:-1]]
        columns.append(Column(self.columns[-1], wraps=True))
        rows = []
        for answer in self.answers:
            *most, last = (
                answer.cells if answer.outcome != ERROR else [*[""] * (len(self.columns) - 1), answer.cells[0]]
            )
            style = None if answer.outcome == FINE else _SIGNS[answer.outcome]
            rows.append(Row((answer.target, *most, Cell(last, style) if style else last)))
        counts = [
            (FINE, "fine"),
            (FINDING, "with findings"),
            (ERROR, "not read"),
        ]
        said = [
            f"{count:,} {words}"
            for outcome, words in counts
            if (count := sum(answer.outcome == outcome for answer in self.answers))
        ]
        total = f"{plural(len(self.answers), 'target')}: {', '.join(said)}"
        return Tree((Table(tuple(columns), tuple(rows)), Text(total, "dim" if self.outcome == FINE else "warn")))


@dataclass(frozen=True, repr=False)
class Shared(Several):
    """Digests of several targets, and the tensors that are in more than one place.

    Attributes:
        duplicates: The digests of the targets that could be read, and their duplicates.
    """

    duplicates: Duplicates

    def to_json(self) -> dict[str, Any]:
        """`sources`, `same_content` and `extra_bytes` as in `duplicates`, and `errors`: messages by target."""
        errors = {answer.target: answer.cells[0] for answer in self.answers if answer.outcome == ERROR}
        return {**self.duplicates.to_json(), "errors": errors}

    def tree(self) -> Tree:
        """The line of each target, and the duplicates."""
        return Tree((*super().tree().parts, *self.duplicates.shared(ROWS_SHOWN).parts))


def several(
    targets: Iterable[Any],
    columns: Sequence[str],
    answer: Callable[[Any], tuple[str, Sequence[str], dict[str, Any] | None]],
) -> Several:
    """Run a function on every target; an error of one target does not stop the others.

    Args:
        targets: The targets.
        columns: Titles of the columns.
        answer: Callable that returns outcome, cells and JSON data of one target.
    """
    found = []
    for target in targets:
        try:
            outcome, cells, form = answer(target)
        except TorchParamsError as error:
            found.append(Answer(str(target), ERROR, (printable(_said(error, str(target))),), None))
        else:
            found.append(Answer(str(target), outcome, tuple(cells), form))
    return Several(tuple(columns), tuple(found))


def _said(error: TorchParamsError, target: str) -> str:
    """Message without the name of the target, which the table shows already."""
    return str(error).removeprefix(f"{target}: ")


LISTED = ("tensors", "parameters", "size", "format")
CHECKED = ("tensors", "flags")
VERIFIED = ("tensors", "verdict")
DIGESTED = ("tensors", "digest")


def listed(params: Parameters) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """The line of a listing."""
    from torchparams.measure.listing import ls

    infos = params.infos.values()
    source = params.source
    cells = (f"{len(infos):,}", human_count(params.numel), human_bytes(params.nbytes), source.format)
    return FINE, cells, ls(params).to_json()


def checked(stats: Stats, kinds: Iterable[str]) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """The line of statistics: the number of flags of each of the given kinds, and the first tensor that has it."""
    from torchparams.measure.flags import KINDS

    names: dict[str, list[str]] = {}
    for flag in stats.flags:
        names.setdefault(flag.kind, []).append(flag.name)
    wanted = frozenset(kinds)
    found = {kind: names[kind] for kind in KINDS if kind in names and kind in wanted}
    said = (f"{len(of):,} {kind} ({printable(of[0])}{', …' if len(of) > 1 else ''})" for kind, of in found.items())
    cells = (f"{len(stats.infos):,}", ", ".join(said) or "none")
    return FINDING if found else FINE, cells, stats.to_json()


def verified(found: Verification) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """The line of a verification."""
    failed = [check for check in found.checks if check.outcome == "failed"]
    if found.ok:
        said = "ok"
    elif found.differences:
        said = f"{plural(len(found.differences), 'difference')}, first {found.differences[0].name}"
    elif failed:
        said = f"{failed[0].what}: {failed[0].detail}"
    else:
        said = "nothing to verify against"
    return FINE if found.ok else FINDING, (f"{found.tensors:,}", said), found.to_json()


def digested(found: Digests, kept: list[Digests]) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """The line of a digest, which is also kept for the search of duplicates."""
    kept.append(found)
    return FINE, (f"{len(found.tensors):,}", found.digest), found.to_json()
