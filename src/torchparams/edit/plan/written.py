"""Summary of a written plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.render.result import Result
from torchparams.render.tree import (
    Cell,
    Column,
    Row,
    Table,
    Text,
    Tree,
    cut,
    human_bytes,
    plural,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchparams.dtypes import DType
    from torchparams.expressions.casts import Losses

_ROWS_SHOWN = 20
_REMARKS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class CastLosses:
    """Losses of one cast.

    Attributes:
        name: Name in the target.
        old, new: Dtypes before and after.
        numel: Number of elements.
        losses: Counts of elements that overflowed, underflowed, or changed at all.
    """

    name: str
    old: DType
    new: DType
    numel: int
    losses: Losses

    def to_json(self) -> dict[str, Any]:
        """The losses as JSON data."""
        lost = self.losses
        counts = {"overflow": lost.overflow, "underflow": lost.underflow, "changed": lost.changed}
        return {"name": self.name, "from": str(self.old), "to": str(self.new), "numel": self.numel, **counts}


@dataclass(frozen=True, repr=False)
class Written(Result):
    """Summary of a run: files, time, and losses of casts.

    Attributes:
        path: Target path.
        files: Name and bytes of each file.
        tensors: Number of tensor names.
        nbytes: Bytes of all files.
        copied: Bytes copied unchanged from file to file.
        seconds: Duration of the run.
        casts: Losses of each cast, including casts without loss.
        dropped: Entries of the sources that were not written, each with the reason.
        notes: Notes of the plan.
    """

    path: str
    files: tuple[tuple[str, int], ...]
    tensors: int
    nbytes: int
    copied: int
    seconds: float
    casts: tuple[CastLosses, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def tree(self) -> Tree:
        """Tree of the run: one line, and a table of the casts that lost something.

        A tensor with overflow or underflow has its own row. Tensors that are only rounded share one row per pair of
        dtypes.
        """
        files = f" in {plural(len(self.files), 'file')}" if len(self.files) > 1 else ""
        speed = f", {human_bytes(int(self.nbytes / self.seconds))}/s" if self.seconds > 0 else ""
        parts: list[Text | Table] = [
            Text(
                printable(
                    f"{self.path}: {plural(self.tensors, 'tensor')}, {human_bytes(self.nbytes)}{files} "
                    f"in {self.seconds:.2f} s{speed}"
                ),
                "title",
            )
        ]
        lossy = [cast for cast in self.casts if cast.losses]
        if lossy:
            columns = (
                Column("name", style="name", shrink=True),
                Column("from", style="dtype"),
                Column("to", style="dtype"),
                *(Column(title, right=True, style="number") for title in ("numel", "overflow", "underflow", "changed")),
            )
            bad = [cast for cast in lossy if cast.losses.overflow or cast.losses.underflow]
            rounded: dict[tuple[str, str], list[CastLosses]] = {}
            for cast in lossy:
                if not (cast.losses.overflow or cast.losses.underflow):
                    rounded.setdefault((str(cast.old), str(cast.new)), []).append(cast)
            rows = cut([_row([cast]) for cast in bad], _ROWS_SHOWN, "tensors")
            parts.append(Table(columns, (*rows, *map(_row, rounded.values()))))
        exact = len(self.casts) - len(lossy)
        if exact:
            parts.append(Text(f"{plural(exact, 'tensor')} cast without a change in value", "dim"))
        return Tree((*parts, *remarks(self.dropped, self.notes)))

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON data."""
        return {
            "path": self.path,
            "files": [{"name": name, "nbytes": size} for name, size in self.files],
            "tensors": self.tensors,
            "nbytes": self.nbytes,
            "copied_bytes": self.copied,
            "seconds": self.seconds,
            "casts": [cast.to_json() for cast in self.casts],
            "dropped": [{"name": name, "why": why} for name, why in self.dropped],
            "notes": list(self.notes),
        }


def remarks(dropped: Sequence[tuple[str, str]], notes: Sequence[str]) -> list[Text]:
    """Lines for entries that are not written, and for notes, shortened."""
    parts = []
    if dropped:
        shown = ", ".join(f"{name} ({why})" for name, why in dropped[:_REMARKS_SHOWN])
        more = len(dropped) - _REMARKS_SHOWN
        parts.append(Text(printable(f"not written: {shown}{f' and {more:,} more' if more > 0 else ''}"), "warn"))
    parts += [Text(printable(note)) for note in notes[:_REMARKS_SHOWN]]
    if len(notes) > _REMARKS_SHOWN:
        parts.append(Text(f"… {len(notes) - _REMARKS_SHOWN:,} more notes"))
    return parts


def _row(casts: Sequence[CastLosses]) -> Row:
    """Row for one cast, or for several between the same dtypes."""
    first = casts[0]
    counts = {
        "numel": sum(cast.numel for cast in casts),
        "overflow": sum(cast.losses.overflow for cast in casts),
        "underflow": sum(cast.losses.underflow for cast in casts),
        "changed": sum(cast.losses.changed for cast in casts),
    }
    name = first.name if len(casts) == 1 else f"{len(casts):,} tensors, rounded"
    bad = {"overflow": "error", "underflow": "warn"}
    cells = (Cell(f"{n:,}", bad.get(title, "") if n else "") for title, n in counts.items())
    return Row((Cell(name, "" if len(casts) == 1 else "dim"), str(first.old), str(first.new), *cells))
