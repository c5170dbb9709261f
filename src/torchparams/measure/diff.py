"""Compare two sources tensor by tensor, in one pass over the values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchparams.engines.base import Unread
from torchparams.errors import SelectorError
from torchparams.io.filebytes import paused_gc
from torchparams.left_out import LeftOut, concerned
from torchparams.measure.beside import part_for_rename, part_within, target_of
from torchparams.measure.comparing import can_compare_values, compare_pairs
from torchparams.measure.diff_rows import GroupDiff, TensorDiff
from torchparams.measure.diff_tree import SORT_KEYS as SORT_KEYS
from torchparams.measure.diff_tree import Diff as Diff
from torchparams.measure.grouping import groups_of
from torchparams.measure.numbers import sort_key
from torchparams.measure.pairing import Pair, pair, proposal, selected
from torchparams.parameters import ROWS_SHOWN, Parameters, of
from torchparams.reading import Reading
from torchparams.renames import Renames

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torchparams.encodings.companions import Coded
    from torchparams.engines.base import Engine, Progress
    from torchparams.info import ParameterInfo
    from torchparams.measure.lost import Lost
    from torchparams.sketch.compared import Compared
    from torchparams.sources.base import Source


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
    engine: Engine | str | None = None,
    progress: Progress | None = None,
) -> Diff:
    """Compare the parameters of A and B tensor by tensor, in one pass over the values.

    Tensors are paired by name. If shape and dtype agree, every element is compared by its **bits**: -0.0 differs from
    0.0 (changed by 0), and NaN of equal bits are the same. Sums are exact, and the maximum difference is rounded once,
    to float64 (for 64-bit integers it is an integer). So the numbers do not depend on sharding, blocks or threads. A
    complex element counts once in `changed`, and as two values in the numbers. Memory does not depend on the size of
    the sources.

    If a NaN appeared or disappeared (`nan_a`, `nan_b`), the maximum difference, the relative norm and the cosine are
    NaN. If an infinity appeared, disappeared or changed sign, the first two are infinite, and the cosine is NaN. Values
    that are NaN in both, or the same infinity in both, are excluded from the numbers.

    Codes of an unknown encoding are not numbers: their bits are compared; with `numeric` they are listed as unread.

    For a live model, the content of its state dict is compared, including persistent buffers.

    If one side is sharded, all its ranks make the call: each compares its own parts, and they gather twice (four
    collectives). Tensors that are sharded differently on the two sides are fetched by the lowest rank, in messages (two
    collectives more). Every rank gets the result of the whole.

    Args:
        a: Model, checkpoint, mapping of tensors, or `Parameters`.
        b: Source to compare with, of the same kinds.
        selector: Tensors to compare, by A's names; None for all. A match on either side is enough.
        rename: Renames from B's names to A's, in any form of `torchparams.renames`; `auto` applies the proposed rename
            for wrappers and prefixes.
        numeric: Compare exact values, also across dtypes: 2⁵³ + 1 in int64 is not 2⁵³ in float64. -0.0 then equals 0.0,
            and all NaN are equal.
        by: Group the results by `module`, `layer` (the name up to its first number), `dtype`, a number of leading name
            components, a selector, or a list of selectors.
        sort: Column to sort by, with a leading `-` for descending; see `Diff.sorted`.
        limit: Maximum number of rows per printed table; None for all.
        strict: Raise if any branch of a selector matches nothing.
        engine: Engine to run on, or its name (`ray`, `ray:ADDRESS`); by default, threads that memory-map files.
        progress: Callback with the bytes read so far and in total.

    Raises:
        NoMatch: A branch of a selector, or a rename pattern, matches nothing.
        MismatchError: The rename maps two tensors to one name.
        RenameError: The rename is invalid.
        SourceError: A source cannot be read, or changed while it was read.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> base = {"fc.weight": np.ones((2, 2), np.float32), "fc.bias": np.zeros(2, np.float32)}
    >>> tuned = {"model.fc.weight": base["fc.weight"] * 1.5, "model.fc.bias": base["fc.bias"]}
    >>> found = tp.diff(base, tuned, rename="auto")
    >>> [(row.name, row.relative) for row in found.differing]
    [('fc.weight', 0.5)]
    """
    if sort is not None:
        sort_key(SORT_KEYS, sort)  # fail before reading
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
        pairs = selected(pairs, selector, strict=strict, where=where)
    in_a, in_b = (
        params.source.coded(Reading(infos.values()) if params.selector is None else None)
        for params, infos in ((mine, infos_a), (yours, infos_b))
    )
    part, within = (None, None) if renames is not None else _part(mine.source, infos_a, yours.source, infos_b, hint)
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
        part=part,
        part_proposal=within,
    )
    return made if sort is None else made.sorted(sort)


def _part(
    a: Source,
    infos_a: Mapping[str, ParameterInfo],
    b: Source,
    infos_b: Mapping[str, ParameterInfo],
    hint: Renames | None,
) -> tuple[str | None, Renames | None]:
    """Target of the mapping in one checkpoint to compare instead, and the rename that it needs.

    Args:
        a, b: The sources.
        infos_a, infos_b: Their infos.
        hint: Rename of B's names that pairs more tensors of the whole sources.
    """
    part = part_within(a, infos_b) or part_within(b, infos_a)
    if part is not None or hint is None:
        return part, None
    moved = {old: new for old, new in hint.apply(infos_b).items() if old != new}
    for source, infos, others, new_of in (
        (b, infos_b, infos_a, moved),
        (a, infos_a, infos_b, {new: old for old, new in moved.items()}),
    ):
        path = part_for_rename(source, new_of)
        if path is None:
            continue
        inner = {name[len(path) + 1 :]: info for name, info in infos.items() if name.startswith(f"{path}.")}
        have, want = (inner, others) if source is b else (others, inner)
        within = proposal(want, have)
        if within is not None and _paired(within, have, want) >= _paired(hint, infos_b, infos_a):
            return target_of(source, path), within
    return None, None


def _paired(renames: Renames, have: Mapping[str, ParameterInfo], want: Mapping[str, ParameterInfo]) -> int:
    return sum(name in want for name in renames.apply(have).values())


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
    """Table with the content of a state dict of `x`. A `Parameters` is not changed."""
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
    engine: Engine | str | None,
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
    with paused_gc():  # many objects, no cycles
        for name, found, losses in compare_pairs(jobs, numeric=numeric, engine=engine, progress=progress):
            row = _row(by_name[name], found, numeric)
            rows[name] = row.of_codes(codes[name]) if name in codes else row
            if losses is not None:
                lost[name] = losses
    return [row for row in rows.values() if row is not None], {name: lost[name] for name in rows if name in lost}


def _codes(pairs: list[Pair], in_a: Mapping[str, Coded], in_b: Mapping[str, Coded]) -> dict[str, str]:
    """Reason why elements are not numbers in one of two tensors, by pair name."""
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
    """Status of two tensors that cannot be compared element by element, or None."""
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
    # Groups use the names in the table; a tensor of B alone may be renamed there.
    infos = {name: row.info if row.info.name == name else row.info._replace(name=name) for name, row in by_name.items()}
    how: tuple[str, ...]
    names: dict[str, list[str]] = {}
    if isinstance(by, list | tuple) and len(by) == 1:
        by = by[0]
    depth = by if isinstance(by, int) else int(by) if isinstance(by, str) and by.isdecimal() else None
    if depth is None:
        how, names = groups_of(infos, by, strict=strict, where=where)
    else:
        if depth < 1:
            raise SelectorError(f"the number of name components to group by must be at least 1, not {depth}")
        how = (str(depth),)
        for name in infos:
            names.setdefault(".".join(name.split(".")[:depth]), []).append(name)
    return how, tuple(GroupDiff.of(group, [by_name[name] for name in members]) for group, members in names.items())
