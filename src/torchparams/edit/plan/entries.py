"""Tensors of sources under the names that they are to have: what is cast, shared, copied apart, and left out."""

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
class Entry:
    """A tensor that is to be written.

    Attributes:
        source: Where it is.
        info: Its record there.
        names: What it is to be called: once, or under each of its names.
        dtype: The element type that it is to have.
        expression: What it is computed by, of that type; None where it is a tensor of the source, cast if need be. Then
            the record is one without a storage: what is computed shares no memory.
    """

    source: Source
    info: ParameterInfo
    names: tuple[str, ...]
    dtype: DType
    expression: Expression | None = None


@dataclass(frozen=True)
class Made:
    """What becomes of entries.

    Attributes:
        outputs: Tensors with bytes of their own.
        views: Further names of these.
        dropped: Names that are not written, and why.
        notes: What else there is to say.
        metadata: What a safetensors file says of names that were dropped: name → the name that stands for it.
    """

    outputs: list[Output]
    views: list[View]
    dropped: list[tuple[str, str]]
    notes: list[str]
    metadata: dict[str, str]


def make(entries: Sequence[Entry], format: str, shared: str | None) -> Made:
    """Outputs for entries.

    Args:
        entries: The tensors.
        format: The format of the target.
        shared: What becomes of several names of one memory: `keep`, `drop`, `clone`; None for `keep` where the format
            can, else `clone`.

    Raises:
        PlanError: The format cannot express what is asked for.
        NotReadable: A tensor has no values here.
    """
    if shared is not None and shared not in SHARED:
        raise PlanError(f"shared={shared!r} says nothing", exists="there are 'keep', 'drop' and 'clone'")
    if shared == "keep" and format == SAFETENSORS:
        tied = next((entry for entry in entries if len(entry.names) > 1), None)
        if tied is not None:
            raise PlanError(
                f"{tied.names[0]!r} and {tied.names[1]!r} are one tensor, and safetensors cannot say so",
                hint="choose shared='drop' (one name is written) or shared='clone' (each is), or write a .pt file",
            )
    how = shared or ("clone" if format == SAFETENSORS else "keep")
    made = Made([], [], [], [], {})
    bases = _bases(entries, made) if how == "keep" and format != SAFETENSORS else {}
    for entry in entries:
        _make_one(entry, format, how, bases.get(id(entry)), made)
    _note(entries, format, how, made)
    saved = _compacted(entries, bases)
    if saved:
        made.notes.append(f"compacted: views of larger storages take {human_bytes(saved)} less")
    return made


def _make_one(entry: Entry, format: str, how: str, base: tuple[Entry, int] | None, made: Made) -> None:
    first, *others = entry.names
    info = entry.info
    if base is None:
        x = _expression(entry, format)
        made.outputs.append(Output(first, x, info.name if info.name != first else ""))
        whole = (x.dtype, x.shape, 0, _c_order(x.shape))
        holder = first
    else:
        owner, offset = base
        assert info.storage is not None and info.shape is not None  # it is a view of another's memory
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


def _expression(entry: Entry, format: str) -> Expression:
    stored = entry.source.row(entry.info.name, entry.info) if entry.expression is None else entry.expression
    for leaf in stored.leaves():
        _check_readable(leaf)
    if entry.expression is not None:
        return entry.expression
    shape = stored.shape
    if entry.dtype != stored.dtype:
        return Cast(stored, entry.dtype)
    # Elements of four bits are counted one by one in the one format, and in pairs in the other.
    if stored.dtype == _PAIR and format == SAFETENSORS:
        return Retyped(stored, _F4, (*shape[:-1], 2 * shape[-1]) if shape else (2,))
    if stored.dtype == _F4 and format == TORCH_ZIP:
        if not shape or shape[-1] % 2:
            raise PlanError(
                f"torch holds elements of {_F4} in pairs, and its last dimension has "
                + (f"{shape[-1]}" if shape else "none"),
                where=shorten(repr(entry.names[0])),
            )
        return Retyped(stored, _PAIR, (*shape[:-1], shape[-1] // 2))
    return stored


def _check_readable(x: Stored) -> None:
    """Ask for what is not a run of bytes, where that costs nothing: it may have no values."""
    if x.info.device == "meta":
        raise NotReadable(f"{x.info.name!r} is on the meta device: it has a shape and no values", where=x.source.label)
    if x.place is None and not x.resident and x.dtype.numpy_name is not None:
        x.source.numpy(x.info.name)


def _c_order(shape: Sequence[int]) -> tuple[int, ...]:
    from torchparams.io.packing import contiguous

    return contiguous(shape)


# --- memory that tensors share -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Extent:
    """The bytes of a storage that a tensor is a view of."""

    entry: Entry
    start: int
    stop: int


def _components(entries: Iterable[Entry]) -> Iterator[list[_Extent]]:
    """Tensors whose bytes overlap, those that overlap with no other alone."""
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
        end = -1  # of all before, not of the last: a short view may lie within a long one
        for extent in extents:
            if extent.start >= end and group:
                yield group
                group = []
            group.append(extent)
            end = max(end, extent.stop)
        yield group


def _bases(entries: Sequence[Entry], made: Made) -> dict[int, tuple[Entry, int]]:
    """The identity of an entry → the entry whose bytes it is a view of, and where it begins there, in its elements."""
    found: dict[int, tuple[Entry, int]] = {}
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
            made.notes.append(f"{extent.entry.names[0]} shares memory with {other.names[0]}, and is written apart")
    return found


def _is_whole(extent: _Extent, group: Sequence[_Extent]) -> bool:
    """Whether a tensor is, in order, all bytes of a group."""
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
    """Whether a view of a base is one of what the base becomes."""
    old, new = extent.entry.info.dtype, extent.entry.dtype
    if old.bits < 8 or (extent.start - base.start) % old.itemsize:
        return False
    if not extent.entry.source.shows_storage(extent.entry.info.name):
        return False
    if base.entry.dtype == base.entry.info.dtype and old == new:
        return True
    return old == base.entry.info.dtype and new == base.entry.dtype


def _note(entries: Sequence[Entry], format: str, how: str, made: Made) -> None:
    tied = [entry for entry in entries if len(entry.names) > 1]
    if tied:
        shown = "; ".join(" = ".join(entry.names) for entry in tied[:_SHOWN])
        more = f"; and {len(tied) - _SHOWN:,} more" if len(tied) > _SHOWN else ""
        what = {
            "keep": "tied, and kept so",
            "clone": f"tied, and written under each name, which takes {human_bytes(_cloned(tied))} more",
            "drop": "tied, and written under the first name",
        }[how]
        made.notes.append(f"{what}: {shown}{more}")
    if format == SAFETENSORS or how != "keep":
        for group in _components(entries):
            if len(group) > 1:
                names = ", ".join(extent.entry.names[0] for extent in group[:_SHOWN])
                more = f" and {len(group) - _SHOWN:,} more" if len(group) > _SHOWN else ""
                made.notes.append(f"{names}{more} are views of the same memory, and are written apart")


def _cloned(tied: Sequence[Entry]) -> int:
    return sum(entry.dtype.nbytes(entry.info.numel) * (len(entry.names) - 1) for entry in tied)


def _compacted(entries: Iterable[Entry], bases: Mapping[int, object]) -> int:
    """Bytes that storages take in files of sources beyond what is written of them."""
    storages: dict[tuple[int, str], int] = {}
    written: Counter[tuple[int, str]] = Counter()
    for entry in entries:
        info = entry.info
        if info.device == "file" and info.storage is not None:
            key = (id(entry.source), info.storage.key)
            storages[key] = info.storage.nbytes
            written[key] += info.nbytes if id(entry) not in bases else 0
    return sum(max(nbytes - written[key], 0) for key, nbytes in storages.items())


# --- element types -----------------------------------------------------------------------------


def dtypes_of(
    spec: object, infos: Mapping[str, ParameterInfo], label: str, *, cast: set[str] | None = None
) -> tuple[dict[str, DType], list[str]]:
    """The type that each tensor is to have, and what there is to say about it.

    Args:
        spec: None for their own; a type for all floats; or a mapping, selector → type, whose later entries win over
            earlier ones. A selector that hits tensors of another kind leaves those as they are, where it hits one of
            the type's kind too: `{"**": "bf16"}` does not touch counters.
        infos: The tensors.
        label: What an error calls the source.
        cast: Names are added of tensors that a type was named for, be it the one they have.

    Raises:
        PlanError: A cast that has no meaning, or a specification that has none.
        NoMatch: A selector hits nothing.
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
                hint="name a float type, or cast a selection: {selector: dtype}",
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
                f"{infos[example].dtype} is not cast to {wanted}",
                where=f"{label}: {shorten(repr(example))}",
                hint="floats are cast to floats, and integers to integers",
            )
        left |= {name for name in hit - same if infos[name].dtype != wanted}
        for name in same:
            found[name] = wanted
        if cast is not None:
            cast |= same
    notes = []
    if left:
        kinds = sorted({str(infos[name].dtype) for name in left})
        notes.append(f"not cast, as of another kind: {plural(len(left), 'tensor')} of {', '.join(kinds)}")
    return found, notes


def refuse_cast_codes(source: Source, infos: Iterable[ParameterInfo], dtypes: Iterable[DType]) -> None:
    """An error where a tensor of codes, or a companion of codes, would be cast.

    Args:
        source: The source.
        infos: Records of its tensors.
        dtypes: The type that each is to have.

    Raises:
        NotReadable: There is one.
    """
    cast = [info.name for info, dtype in zip(infos, dtypes, strict=True) if info.dtype != dtype]
    if cast:
        hint = "Leave out the dtype, name tensors without codes (--dtype SELECTOR=TYPE), or decode the checkpoint first"
        refuse(source.coded(), cast, source.label, hint)


def _dtype(spelling: object) -> DType:
    try:
        return DType.of(spelling)
    except TorchParamsError as error:
        raise PlanError(error.what, hint=error.hint) from None


def _group(dtype: DType) -> str:
    return "int" if dtype.kind in ("int", "uint", "bool") else dtype.kind


def text_metadata(metadata: Mapping[Any, Any]) -> tuple[dict[str, str], list[str]]:
    """What of a source's metadata is text, and the names of the rest."""
    text = {key: value for key, value in metadata.items() if isinstance(key, str) and isinstance(value, str)}
    return text, [str(key) for key in metadata if key not in text]
