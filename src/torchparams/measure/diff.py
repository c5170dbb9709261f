"""Two sources compared, tensor by tensor, in one pass over the values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torchparams.engines.base import Unread
from torchparams.errors import SelectorError
from torchparams.io.filebytes import paused_gc
from torchparams.left_out import LeftOut, concerned
from torchparams.measure.beside import part_within
from torchparams.measure.comparing import can_compare_values, compare_pairs
from torchparams.measure.diff_report import SORT_KEYS as SORT_KEYS
from torchparams.measure.diff_report import Diff as Diff
from torchparams.measure.diff_rows import GroupDiff, TensorDiff
from torchparams.measure.grouping import groups_of
from torchparams.measure.numbers import sort_key
from torchparams.measure.pairing import Pair, choose, pair, proposal
from torchparams.parameters import ROWS_SHOWN, Parameters, of
from torchparams.records import Records
from torchparams.renames import Renames

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torchparams.encodings.companions import Coded
    from torchparams.engines.base import Engine, Progress
    from torchparams.info import ParameterInfo
    from torchparams.measure.lost import Lost
    from torchparams.sketch.compared import Compared


def diff(
    a: object,
    b: object,
    selector: object = None,
    *,
    rename: object = None,
    numeric: bool = False,
    by: object = None,
    sort: str | None = None,
    limit: int | None = ROWS_SHOWN,
    strict: bool = True,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Diff:
    """How the parameters of B differ from those of A, tensor by tensor, in one pass over the values.

    Tensors go together by name. Of two with one shape and one dtype every element is compared, and its **bits** decide:
    -0.0 is not 0.0 (changed, by 0), and two NaN of the same bits are the same. The greatest difference is rounded once,
    to float64 (that of 64-bit integers is an integer), and sums are exact: so the numbers are the same wherever the
    tensors lie, however they are cut and however many threads read them. A complex element counts as changed once, and
    is two values in the numbers. Memory is that of the rows, whatever the size of the sources.

    Where a NaN came or went (`nan_a`, `nan_b`), the greatest difference, the relative norm and the cosine are NaN, and
    are printed so; where an infinity came, went or turned, the first two are infinite, and there is no cosine. Values
    that are the same infinity in both, or NaN in both, have no part in the numbers.

    Codes of an encoding that is not known, which stand beside their scales, are no numbers: their bits are compared,
    and with `numeric` they are listed as unread.

    Of a live model, what a state dict holds is compared: buffers too, but for those that are not saved.

    Args:
        a: Anything that has parameters: a model, a checkpoint's path, a mapping of tensors, a `Parameters`.
        b: What it is compared with.
        selector: Which tensors; None for all. Names are A's; a tensor that it hits on either side is compared.
        rename: What the names of B are called in A, in any spelling of `torchparams.renames`; `auto` for what is
            proposed where names differ by a wrapper's components or by a prefix.
        numeric: Let values decide, exactly and also across dtypes: 2⁵³ + 1 in int64 is not 2⁵³ in float64. Then -0.0 is
            0.0, and NaN is NaN.
        by: Sum up by `module`, by `layer` (the name up to and including its first number), by `dtype`, or by the first
            few components of names, given as their count; or by a selector or a list of them.
        sort: What to order rows by, `-` before it for descending; see `Diff.sorted`.
        limit: Most rows of each table that printing shows; None for all.
        strict: Refuse selectors of which any union branch hits nothing.
        engine: What runs it; a `ThreadEngine` that maps files unless given.
        progress: Told bytes read and bytes in all.

    Raises:
        NoMatch: A selector's branch hits nothing, or a pattern of a rename.
        MismatchError: The rename gives two tensors one name.
        RenameError: It is not a rename.
        SourceError: A source cannot be read, or was written to meanwhile.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> base = {"fc.weight": np.ones((2, 2), np.float32), "fc.bias": np.zeros(2, np.float32)}
    >>> tuned = {"model.fc.weight": base["fc.weight"] * 1.5, "model.fc.bias": base["fc.bias"]}
    >>> found = tp.diff(base, tuned, rename="auto")
    >>> [(row.name, row.relative) for row in found.differing]
    [('fc.weight', 0.5)]
    """
    if sort is not None:
        sort_key(SORT_KEYS, sort)  # before anything is read
    mine, yours = _saved(a), _saved(b)
    infos_a, infos_b = _infos(mine), _infos(yours)
    where = f"{mine.source.label} and {yours.source.label}"
    renames, hint = None, None
    if rename is None:
        hint = proposal(infos_a, infos_b)
    elif isinstance(rename, str) and rename == "auto":
        renames = proposal(infos_a, infos_b)
    else:
        renames = Renames.of(rename)
    pairs = pair(infos_a, infos_b, renames or Renames(), yours.source.label)
    if selector is not None:
        pairs = choose(pairs, selector, strict=strict, where=where)
    in_a, in_b = (
        params.source.coded(Records(infos.values()) if params.selector is None else None)
        for params, infos in ((mine, infos_a), (yours, infos_b))
    )
    rows, lost = _compare(mine, yours, pairs, _codes(pairs, in_a, in_b), numeric, engine, progress)
    grouped = None if by is None else _groups(rows, by, strict, where)
    made = Diff(
        a=mine.source.label,
        b=yours.source.label,
        selector=None if selector is None else _text(selector),
        numeric=numeric,
        rename=renames,
        proposal=hint,
        rows=tuple(rows),
        by=None if grouped is None else grouped[0],
        groups=() if grouped is None else grouped[1],
        limit=limit,
        left_out_a=_left_out(mine, selector, rows),
        left_out_b=_left_out(yours, selector, rows),
        lost=lost,
        part=part_within(mine.source, infos_b) or part_within(yours.source, infos_a) if renames is None else None,
    )
    return made if sort is None else made.sorted(sort)


def _left_out(params: Parameters, selector: object, rows: Iterable[TensorDiff]) -> tuple[LeftOut, ...]:
    found = params.left_out
    if not found or selector is None:
        return found
    from torchparams.selectors import Selector

    return concerned(found, Selector.of(selector), [row.name for row in rows])


def _text(selector: object) -> str:
    from torchparams.selectors import Selector

    return str(Selector.of(selector))


def _saved(x: object) -> Parameters:
    """The table of what a state dict of `x` would hold; a table is taken as it is."""
    return of(x, buffers=True)


def _infos(params: Parameters) -> Mapping[str, ParameterInfo]:
    infos = params.infos
    if params.source.format != "module" or all(info.persistent for info in infos.values()):
        return infos
    return {name: info for name, info in infos.items() if info.persistent}


def _compare(
    a: Parameters,
    b: Parameters,
    pairs: list[Pair],
    codes: Mapping[str, str],
    numeric: bool,
    engine: Engine | None,
    progress: Progress | None,
) -> tuple[list[TensorDiff], Lost]:
    rows: dict[str, TensorDiff | None] = {}
    lost: Lost = {}
    jobs = []
    for p in pairs:
        status = _apart(p, numeric)
        if numeric and p.name in codes and status in (None, "dtype"):
            status = "unread"
        reason = codes[p.name] if status == "unread" else ""
        rows[p.name] = None if status is None else TensorDiff(p.name, status, p.a, p.b, reason=reason)
        if status is None and p.a is not None and p.b is not None:
            jobs.append((p.name, (a.source, p.a), (b.source, p.b)))
    by_name = {p.name: p for p in pairs}
    with paused_gc():  # some objects for each tensor, and no cycles
        for name, found, losses in compare_pairs(jobs, numeric=numeric, engine=engine, progress=progress):
            row = _row(by_name[name], found, numeric)
            rows[name] = row.of_codes(codes[name]) if name in codes else row
            if losses is not None:
                lost[name] = losses
    return [row for row in rows.values() if row is not None], lost


def _codes(pairs: list[Pair], in_a: Mapping[str, Coded], in_b: Mapping[str, Coded]) -> dict[str, str]:
    """Why elements are no numbers in one of two tensors, by the name of the pair."""
    if not in_a and not in_b:
        return {}
    found: dict[str, str] = {}
    for p in pairs:
        sides = [in_a.get(p.a.name) if p.a else None, in_b.get(p.b.name) if p.b else None]
        reason = next((side.reason for side in sides if side is not None and not side.numbers), None)
        if reason is not None:
            found[p.name] = reason
    return found


def _apart(p: Pair, numeric: bool) -> str | None:
    """What keeps two tensors from being compared element by element."""
    if p.b is None:
        return "only_a"
    if p.a is None:
        return "only_b"
    if p.a.shape != p.b.shape:
        return "shape"
    if p.a.dtype != p.b.dtype and not (numeric and can_compare_values(p.a.dtype, p.b.dtype)):
        return "dtype"
    return None


def _row(p: Pair, found: Compared | Unread, numeric: bool) -> TensorDiff:
    if isinstance(found, Unread):
        return TensorDiff(p.name, "unread", p.a, p.b, reason=found.reason)
    status = "changed" if found.changed else "equal" if numeric else "identical"
    return TensorDiff(p.name, status, p.a, p.b, found)


def _groups(
    rows: Iterable[TensorDiff], by: object, strict: bool, where: str
) -> tuple[tuple[str, ...], tuple[GroupDiff, ...]]:
    by_name = {row.name: row for row in rows}
    # A group is of the names in the table, which a tensor of B alone may have by a rename.
    infos = {name: row.info if row.info.name == name else replace(row.info, name=name) for name, row in by_name.items()}
    how: tuple[str, ...]
    names: dict[str, list[str]] = {}
    if isinstance(by, list | tuple) and len(by) == 1:
        by = by[0]
    depth = by if isinstance(by, int) else int(by) if isinstance(by, str) and by.isdecimal() else None
    if depth is None:
        how, names = groups_of(infos, by, strict=strict, where=where)
    else:
        if depth < 1:
            raise SelectorError(f"names are grouped by their first component or more, not by {depth}")
        how = (str(depth),)
        for name in infos:
            names.setdefault(".".join(name.split(".")[:depth]), []).append(name)
    return how, tuple(GroupDiff.of(group, [by_name[name] for name in members]) for group, members in names.items())
