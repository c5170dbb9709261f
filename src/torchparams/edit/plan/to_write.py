"""Prepare tensors for a target: names, casts, ties, and tensors left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.edit.plan.layout import Output, View
from torchparams.edit.plan.plan import SAFETENSORS, TORCH_ZIP
from torchparams.encodings.companions import refuse
from torchparams.errors import NotReadable, PlanError, TorchParamsError, shorten
from torchparams.expressions.base import Expression, Retyped, Stored
from torchparams.expressions.operations import Cast
from torchparams.render.tree import human_bytes, plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source

SHARED = ("keep", "drop", "clone")
_PAIR, _F4 = DType.of("float4_e2m1fn_x2"), DType.of("float4_e2m1fn")
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class ToWrite:
    """A tensor to write.

    Attributes:
        source: Source that holds the tensor.
        info: Info of the tensor in that source.
        names: Names in the target; more than one if the tensor is tied.
        dtype: Dtype in the target.
        expression: Expression that computes the tensor in that dtype; None for a tensor of the source, cast if needed.
            With an expression, the info has no storage, because computed tensors share no memory.
    """

    source: Source
    info: ParameterInfo
    names: tuple[str, ...]
    dtype: DType
    expression: Expression | None = None


@dataclass(frozen=True)
class Made:
    """Outputs made from entries.

    Attributes:
        outputs: Tensors with their own bytes.
        views: Other names and views of these bytes.
        dropped: Names that are not written, each with the reason.
        notes: Notes to show.
        metadata: Safetensors metadata for dropped names: name → name of the same tensor that is written.
    """

    outputs: list[Output]
    views: list[View]
    dropped: list[tuple[str, str]]
    notes: list[str]
    metadata: dict[str, str]


def make(entries: Sequence[ToWrite], format: str, shared: str | None) -> Made:
    """Make outputs from entries.

    Args:
        entries: Tensors to write.
        format: Format of the target.
        shared: Treatment of tied tensors: `keep`, `drop` or `clone`. None selects `keep` if the format supports it,
            otherwise `clone`.

    Raises:
        PlanError: The format cannot express the request.
        NotReadable: A tensor has no values.
    """
    if shared is not None and shared not in SHARED:
        raise PlanError(f"`shared` must be 'keep', 'drop' or 'clone', not {shared!r}")
    if shared == "keep" and format == SAFETENSORS:
        tied = next((entry for entry in entries if len(entry.names) > 1), None)
        if tied is not None:
            raise PlanError(
                f"{tied.names[0]!r} and {tied.names[1]!r} are one tensor; safetensors cannot store ties",
                hint="pass shared='drop' (write one name) or shared='clone' (write each name), or write a .pt file",
            )
    how = shared or ("clone" if format == SAFETENSORS else "keep")
    made = Made([], [], [], [], {})
    bases = _bases(entries, made) if how == "keep" and format != SAFETENSORS else {}
    for entry in entries:
        _make_one(entry, format, how, bases.get(id(entry)), made)
    _note(entries, format, how, made)
    saved = _compacted(entries, bases)
    if saved:
        made.notes.append(f"compacted: {human_bytes(saved)} of storage outside the written tensors is left out")
    return made


def _make_one(entry: ToWrite, format: str, how: str, base: tuple[ToWrite, int] | None, made: Made) -> None:
    first, *others = entry.names
    info = entry.info
    if base is None:
        x = _expression(entry, format)
        made.outputs.append(Output(first, x, info.name if info.name != first else ""))
        whole = (x.dtype, x.shape, 0, _c_order(x.shape))
        holder = first
    else:
        owner, offset = base
        assert info.storage is not None and info.shape is not None  # a base implies a storage
        whole = (entry.dtype, info.shape, offset, info.storage.stride)
        holder = owner.names[0]
        made.views.append(View(first, holder, *whole))
    for name in others:
        if how == "keep":
            made.views.append(View(name, holder, *whole))
        elif how == "clone":
            made.outputs.append(Output(name, _expression(entry, format), info.name))
        else:
            made.dropped.append((name, f"it is {first}"))
            if format == SAFETENSORS:
                made.metadata[name] = first


def _expression(entry: ToWrite, format: str) -> Expression:
    stored = entry.source.row(entry.info.name, entry.info) if entry.expression is None else entry.expression
    for leaf in stored.leaves():
        _check_readable(leaf)
    if entry.expression is not None:
        return entry.expression
    shape = stored.shape
    if entry.dtype != stored.dtype:
        return Cast(stored, entry.dtype)
    # Safetensors counts four-bit elements one by one; torch counts pairs.
    if stored.dtype == _PAIR and format == SAFETENSORS:
        return Retyped(stored, _F4, (*shape[:-1], 2 * shape[-1]) if shape else (2,))
    if stored.dtype == _F4 and format == TORCH_ZIP:
        if not shape or shape[-1] % 2:
            raise PlanError(
                f"torch stores {_F4} in pairs, but the last dimension is " + (f"{shape[-1]}" if shape else "none"),
                where=shorten(repr(entry.names[0])),
            )
        return Retyped(stored, _PAIR, (*shape[:-1], shape[-1] // 2))
    return stored


def _check_readable(x: Stored) -> None:
    """Check cheaply that a tensor without a byte range has values."""
    if x.info.device == "meta":
        raise NotReadable(f"{x.info.name!r} is on the meta device, and has no values", where=x.source.label)
    if x.place is None and not x.resident and x.dtype.numpy_name is not None:
        x.source.numpy(x.info.name)


def _c_order(shape: Sequence[int]) -> tuple[int, ...]:
    from torchparams.io.packing import contiguous

    return contiguous(shape)


# --- shared memory -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Extent:
    """Byte range of a tensor in its storage."""

    entry: ToWrite
    start: int
    stop: int


def _components(entries: Iterable[ToWrite]) -> Iterator[list[_Extent]]:
    """Groups of tensors with overlapping bytes. A tensor without overlap is a group of its own."""
    by_storage: dict[tuple[int, str], list[_Extent]] = {}
    for entry in entries:
        info = entry.info
        if info.storage is None or not info.numel or info.shape is None:
            continue
        steps = zip(info.shape, info.storage.stride, strict=True)
        length = 1 + sum((size - 1) * step for size, step in steps)
        start = info.storage.offset * info.dtype.bits // 8
        stop = start + info.dtype.nbytes(length)
        by_storage.setdefault((id(entry.source), info.storage.key), []).append(_Extent(entry, start, stop))
    for extents in by_storage.values():
        extents.sort(key=lambda extent: (extent.start, -extent.stop))
        group: list[_Extent] = []
        end = -1  # maximum over all previous extents: a short view may lie inside a long one
        for extent in extents:
            if extent.start >= end and group:
                yield group
                group = []
            group.append(extent)
            end = max(end, extent.stop)
        yield group


def _bases(entries: Sequence[ToWrite], made: Made) -> dict[int, tuple[ToWrite, int]]:
    """For each entry that is a view (by `id`): the entry that holds its bytes, and the offset there, in elements."""
    found: dict[int, tuple[ToWrite, int]] = {}
    for group in _components(entries):
        if len(group) == 1:
            continue
        base = next((extent for extent in group if _is_whole(extent, group)), None)
        for extent in group:
            if extent is base:
                continue
            if base is not None and _fits(extent, base):
                offset = (extent.start - base.start) * 8 // extent.entry.info.dtype.bits
                found[id(extent.entry)] = (base.entry, offset)
                continue
            other = next(e.entry for e in group if e is not extent)
            made.notes.append(f"{extent.entry.names[0]} shares memory with {other.names[0]}, and gets its own copy")
    return found


def _is_whole(extent: _Extent, group: Sequence[_Extent]) -> bool:
    """Whether a tensor covers all bytes of a group, in order."""
    info = extent.entry.info
    if info.shape is None or info.storage is None or extent.stop - extent.start != info.nbytes:
        return False
    if not extent.entry.source.shows_storage(info.name):
        return False
    pairs = zip(info.shape, info.storage.stride, _c_order(info.shape), strict=True)
    if any(size > 1 and step != wanted for size, step, wanted in pairs):
        return False
    return extent.start == group[0].start and extent.stop == max(other.stop for other in group)


def _fits(extent: _Extent, base: _Extent) -> bool:
    """Whether a view stays valid for the base as it will be written."""
    old, new = extent.entry.info.dtype, extent.entry.dtype
    if old.bits < 8 or (extent.start - base.start) % old.itemsize:
        return False
    if not extent.entry.source.shows_storage(extent.entry.info.name):
        return False
    if base.entry.dtype == base.entry.info.dtype and old == new:
        return True
    return old == base.entry.info.dtype and new == base.entry.dtype


def _note(entries: Sequence[ToWrite], format: str, how: str, made: Made) -> None:
    tied = [entry for entry in entries if len(entry.names) > 1]
    if tied:
        shown = "; ".join(" = ".join(entry.names) for entry in tied[:_SHOWN])
        more = f"; and {len(tied) - _SHOWN:,} more" if len(tied) > _SHOWN else ""
        what = {
            "keep": "tied; ties are kept",
            "clone": f"tied; each name gets its own copy, {human_bytes(_cloned(tied))} more",
            "drop": "tied; only the first name is written",
        }[how]
        made.notes.append(f"{what}: {shown}{more}")
    if format == SAFETENSORS or how != "keep":
        for group in _components(entries):
            if len(group) > 1:
                names = ", ".join(extent.entry.names[0] for extent in group[:_SHOWN])
                more = f" and {len(group) - _SHOWN:,} more" if len(group) > _SHOWN else ""
                made.notes.append(f"{names}{more} are views of the same memory; each gets its own copy")


def _cloned(tied: Sequence[ToWrite]) -> int:
    return sum(entry.dtype.nbytes(entry.info.numel) * (len(entry.names) - 1) for entry in tied)


def _compacted(entries: Iterable[ToWrite], bases: Mapping[int, object]) -> int:
    """Bytes of file storages that no written tensor uses."""
    storages: dict[tuple[int, str], int] = {}
    written: Counter[tuple[int, str]] = Counter()
    for entry in entries:
        info = entry.info
        if info.device == "file" and info.storage is not None:
            key = (id(entry.source), info.storage.key)
            storages[key] = info.storage.nbytes
            written[key] += info.nbytes if id(entry) not in bases else 0
    return sum(max(nbytes - written[key], 0) for key, nbytes in storages.items())


# --- dtypes ------------------------------------------------------------------------------------


def dtypes_of(
    spec: object,
    infos: Mapping[str, ParameterInfo],
    label: str,
    *,
    cast: set[str] | None = None,
    asked: set[str] | None = None,
) -> tuple[dict[str, DType], list[str]]:
    """Dtype of each tensor in the target, and notes.

    Args:
        spec: None to keep dtypes; a dtype for all floats; or a mapping selector → dtype, in which later entries win. If
            a selector matches both tensors of the kind of the dtype and others, the others are kept: `{"**": "bf16"}`
            does not touch integer counters.
        infos: Infos of the tensors.
        label: Label of the source, for errors.
        cast: Set that receives the names of all tensors with a requested dtype, even if they already have it.
        asked: Set that receives the names of all tensors that the specification matches, of any kind.

    Raises:
        PlanError: The specification or a cast is invalid.
        NoMatch: A selector matches nothing.
    """
    found = {name: info.dtype for name, info in infos.items()}
    left: set[str] = set()
    if spec is None:
        return found, []
    if not isinstance(spec, Mapping):
        wanted = _dtype(spec)
        if wanted.kind != "float":
            raise PlanError(
                f"all floating-point tensors cannot be cast to {wanted}",
                where=label,
                hint="choose a floating-point dtype, or cast a selection: {selector: dtype}",
            )
        spec = {None: wanted}
    from torchparams.selectors import Selector

    for selector, spelling in spec.items():
        wanted = _dtype(spelling)
        if selector is None:
            hit = {name for name, info in infos.items() if info.dtype.kind == "float"}
        else:
            hit = set(Selector.of(selector).names(infos.values(), strict=True, where=label))
        same = {name for name in hit if _group(infos[name].dtype) == _group(wanted)}
        if hit and not same:
            example = next(name for name in infos if name in hit)
            raise PlanError(
                f"cannot cast {infos[example].dtype} to {wanted}",
                where=f"{label}: {shorten(repr(example))}",
                hint="cast floats to floats, and integers to integers",
            )
        left |= {name for name in hit - same if infos[name].dtype != wanted}
        for name in same:
            found[name] = wanted
        if cast is not None:
            cast |= same
        if asked is not None:
            asked.update(infos if selector is None else hit)
    notes = []
    if left:
        kinds = sorted({str(infos[name].dtype) for name in left})
        notes.append(f"not cast, because of another kind: {plural(len(left), 'tensor')} of {', '.join(kinds)}")
    return found, notes


def refuse_cast_codes(
    source: Source, infos: Iterable[ParameterInfo], dtypes: Iterable[DType], asked: Iterable[str] = ()
) -> None:
    """Raise if a cast would change the codes or scales of an unknown encoding, or needs their values.

    Args:
        source: Source of the tensors.
        infos: Infos of the tensors.
        dtypes: Target dtype of each.
        asked: Names of tensors whose values are wanted in another dtype.

    Raises:
        NotReadable: There is such a tensor.
    """
    cast = [info.name for info, dtype in zip(infos, dtypes, strict=True) if info.dtype != dtype]
    found = source.coded() if cast or asked else {}
    if found:
        codes = [name for name in asked if name in found and found[name].codes]
        hint = "Omit the dtype, cast only tensors without codes (--dtype SELECTOR=TYPE), or decode the checkpoint first"
        refuse(found, dict.fromkeys([*codes, *cast]), source.label, hint)


def _dtype(spelling: object) -> DType:
    try:
        return DType.of(spelling)
    except TorchParamsError as error:
        raise PlanError(error.what, hint=error.hint) from None


def _group(dtype: DType) -> str:
    return "int" if dtype.kind in ("int", "uint", "bool") else dtype.kind


def text_metadata(metadata: Mapping[Any, Any]) -> tuple[dict[str, str], list[str]]:
    """Split metadata into text entries and the names of all others."""
    text = {key: value for key, value in metadata.items() if isinstance(key, str) and isinstance(value, str)}
    return text, [str(key) for key in metadata if key not in text]
