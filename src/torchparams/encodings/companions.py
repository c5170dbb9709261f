"""Find tensors that hold codes, which need companion tensors such as scales to become values.

A quantised checkpoint stores a weight as codes of an integer or float8 dtype, with scales in a tensor of a related
name: `X_scale_inv` beside `X`, `l.SCB` beside `l.weight`, `l.scales` beside `l.qweight`. Codes look like numbers, but
statistics of codes are wrong by any factor. Names and dtypes are enough to recognise them; no values are read.

`logit_scale` and the scales of a key-value cache (`attn.k_scale`) are plain numbers, because no tensor has the
related name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchparams.dtypes import ALL
from torchparams.errors import NotReadable, shorten
from torchparams.render.tree import Text, plural, printable

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

    from torchparams.dtypes import DType
    from torchparams.encodings.base import Structure
    from torchparams.reading import Reading

CODES = frozenset(
    dtype
    for dtype in ALL
    if dtype.kind in ("int", "uint")
    or (dtype.kind == "opaque" and not dtype.startswith(("qint", "quint")))
    or (dtype.kind == "float" and dtype.bits <= 8)
)  # fmt: skip
"""Dtypes that can store codes. torch's quantised dtypes contain their own scales."""

_BNB = (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_FEW = 1000
_INDEXED = 16  # rows that are searched one by one
LINES_SHOWN = 8
"""Maximum number of tensors named below a table."""

_SCALES = ("_scale", "_scale_inv", "_scales", "_scale_2", "_global_scale")
_ZEROS = ("_zero_point", "_zero_points", "_zeros", "_zp")

Group = tuple[str, tuple[str, ...], tuple[str, ...]]

GROUPS: tuple[Group, ...] = (
    ("", (*_SCALES, *_ZEROS, *_BNB, "_absmax", "_SCB", ".SCB", ".scale", ".scales", ".zero_point"),
     ("_g_idx", "_shape", ".nested_absmax", ".nested_quant_map")),
    ("weight", ("SCB", "scale", "scales", "scale_inv", "zeros", "zero", "zero_point", "weights_scaling_factor",
                "per_channel_scale"), ("biases", "weight_format", "g_idx")),
    ("qweight", ("qzeros", "scales", "scale", "weight_scale", "g_idx"), ("weight_global_scale", "perm")),
    ("_packed", (*_SCALES, "_shape"), (*_ZEROS, "_g_idx")),
    ("_blocks", ("_scales", "_scale"), ()),
    ("q_weight", ("q_scale", "q_scale_max"), ("q_groups", "q_group_map", "q_perm", "q_invperm")),
    ("W_q", ("scale", "scales", "scale_q", "zero", "zeros"), ("zero_q",)),
    ("_data", ("_scale", "_shift"), ()),
    ("_data._data", ("_scale", "_shift"), ()),
    ("_qdata", _SCALES, _ZEROS),
    ("_int_repr", _SCALES, _ZEROS),
    ("codes", ("scales",), ("codebooks",)),
    ("Qidxs", ("SU", "SV"), ("codebook_id",)),
    ("trellis", ("suh", "svh", "su", "sv"), ()),
    ("indices", ("centroids.weight",), ()),
    ("state1", ("absmax1", "qmap1"), ("max1", "new_max1")),
    ("state2", ("absmax2", "qmap2"), ("max2", "new_max2")),
    ("B", ("s",), ()),
    ("bitmask", ("compressed",), ("shape", "row_offsets")),
)  # fmt: skip
"""Suffix of names that may hold codes; suffixes of companions that prove it; suffixes of further companions."""


PACKINGS: tuple[tuple[str, str, str], ...] = (
    ("q_weight", "q_scale", "EXL2"),
    ("trellis", "suh", "EXL3"),
    ("W_q", "scale", "HQQ"),
    ("codes", "codebooks", "AQLM"),
    ("Qidxs", "SU", "QuIP#"),
    ("indices", "centroids.weight", "VPTQ"),
    ("weight", "weight_scales", "EETQ"),
    ("weight", "biases", "MLX"),
    ("_data", "_scale", "quanto"),
    ("B", "s", "Marlin"),
    ("bitmask", "compressed", "compressed-tensors' sparse format"),
    ("state1", "absmax1", "an 8-bit optimizer of bitsandbytes"),
    ("state2", "absmax2", "an 8-bit optimizer of bitsandbytes"),
)
"""Suffix of codes that are recognised and not decoded, suffix of a companion, and name of the packing."""


@dataclass(frozen=True, slots=True)
class Coded:
    """Tensor that holds codes, or belongs to codes, which are not decoded.

    Attributes:
        name: Canonical name.
        beside: For codes, the name of a companion, or of the class that keeps the scales; for a companion, the name of
            the codes.
        codes: Whether it holds the codes; otherwise it is a companion.
        numbers: Whether its elements are numbers anyway, such as floating-point scales.
        by_class: Whether `beside` is a class.
        packing: Name of the packing, if it is recognised.
        why: Reason why these codes, or those that it belongs to, cannot be decoded though their encoding is known, as
            a sentence; empty if it is unknown.
        as_stored: Whether the source lists tensors as they are stored, so their encoding may be known.
    """

    name: str
    beside: str
    codes: bool
    numbers: bool = False
    by_class: bool = False
    why: str = ""
    packing: str = ""
    as_stored: bool = False

    @property
    def reason(self) -> str:
        """Reason why its elements are not values, as a sentence."""
        if self.why:
            why = f"{self.why[:1].lower()}{self.why[1:]}"
            if self.codes:
                return f"Holds codes that cannot be decoded: {why}"
            return f"Belongs to the codes in {quoted(self.beside)}, which cannot be decoded: {why}"
        codes = "Holds codes, listed as stored" if self.as_stored else "Holds codes of an unknown encoding"
        if self.by_class:
            return f"{codes}: their values need the scales that {shorten(self.beside)} keeps"
        if self.codes and self.packing:
            return f"Holds codes of {self.packing}, which is not decoded: their values need {quoted(self.beside)}"
        if self.codes:
            return f"{codes}: their values need {quoted(self.beside)}"
        which = "listed as stored" if self.as_stored else "whose encoding is unknown"
        return f"Belongs to the codes in {quoted(self.beside)}, {which}"


def coded(reading: Reading, *, as_stored: bool = False) -> dict[str, Coded]:
    """Find codes, and their companions, by canonical name.

    Linear in the number of names, and almost free if no tensor has a dtype in `CODES`.

    Args:
        reading: Reading of all tensors of a source; a selection may lack companions.
        as_stored: Whether the source lists tensors as they are stored; see `Coded`.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> weights = {"l.weight": np.zeros((2, 2), np.int8), "l.SCB": np.ones(2), "step": np.zeros(1, np.int64)}
    >>> found = coded(tp.of(weights).reading())
    >>> found["l.weight"].reason
    "Holds codes of an unknown encoding: their values need 'l.SCB'"
    >>> found["l.SCB"].numbers, "step" in found
    (True, False)
    """
    dtypes: Sequence[DType] = reading.column("dtype")
    if CODES.isdisjoint(dict.fromkeys(dtypes)):
        return {}
    names, aliases = reading.names, list(reading.aliases)
    suspects = [name for name, dtype in zip(names, dtypes, strict=True) if dtype in CODES]
    suspects += [alias for row, alias in aliases if dtypes[row] in CODES]
    # Four-bit codes may be stored in any dtype.
    spelled = (*names, *(alias for _, alias in aliases)) if aliases else names
    text = "\n".join(spelled)  # searched in a hundredth of the time of a loop over names
    if any(end in text for end in _BNB):
        owners = (name.removesuffix(end) for name in spelled for end in _BNB if name.endswith(end))
        suspects += dict.fromkeys(owner for owner in owners if not owner.endswith(_BNB))
    # For a few suspects (counters, positions), only the names of their possible companions are looked up.
    few = len(suspects) <= _FEW
    groups = _Groups(None if few else {name[name.rfind(".") + 1 :] for name in spelled})
    wanted = {other for name in suspects for other in _wanted(name, groups)} if few else set()
    there = wanted.intersection(names)
    if few and len(there) <= _INDEXED:
        rows = {name: names.index(name) for name in there}
    else:
        rows = {name: row for row, name in enumerate(names) if not few or name in there}
    for row, alias in aliases:
        if not few or alias in wanted:
            rows.setdefault(alias, row)
    suspects = [name for name in suspects if name in rows]
    found: dict[str, Coded] = {}
    members: dict[str, Coded] = {}
    for name in suspects:
        beside = _companions(name, rows, groups)
        if beside:
            canonical = names[rows[name]]
            packing = _packing_of(name, beside)
            found.setdefault(canonical, Coded(canonical, beside[0], True, packing=packing, as_stored=as_stored))
            for other in beside:
                at = rows[other]
                numbers = dtypes[at] not in CODES
                members.setdefault(names[at], Coded(names[at], name, False, numbers, as_stored=as_stored))
    return {**members, **found}


def by_class(structures: Iterable[Structure], *, as_stored: bool = False) -> dict[str, Coded]:
    """Stored tensors of parameters whose class keeps the values, by canonical name.

    >>> from torchparams.encodings.base import Structure
    >>> by_class([Structure("w", "NF4Tensor", {"quantized_data": "_w_quantized_data"})])["_w_quantized_data"].reason
    'Holds codes of an unknown encoding: their values need the scales that NF4Tensor keeps'
    """
    return {
        part: Coded(part, structure.kind, True, by_class=True, as_stored=as_stored)
        for structure in structures
        for part in structure.parts.values()
    }


class _Groups(dict[str, tuple[Group, ...]]):
    """Possible groups for the last component of a name; cached, because most names have none.

    Args:
        lasts: Last components of all names, of which large networks have few; None for any.
    """

    def __init__(self, lasts: Container[str] | None) -> None:
        self._lasts = lasts

    def __missing__(self, last: str) -> tuple[Group, ...]:
        found = []
        for ending, telling, further in GROUPS:
            if last.endswith(ending.rpartition(".")[2]):
                stem = None if "." in ending else last[: len(last) - len(ending)]
                there = tuple(end for end in telling if self._possible(stem, end))
                if there:
                    found.append((ending, there, tuple(end for end in further if self._possible(stem, end))))
        made = self[last] = tuple(found)
        return made

    def _possible(self, stem: str | None, end: str) -> bool:
        return stem is None or self._lasts is None or (stem + end).rpartition(".")[2] in self._lasts


def _wanted(name: str, groups: _Groups) -> Iterator[str]:
    """Yield a name and all possible names of its companions."""
    yield name
    for ending, telling, further in groups[name[name.rfind(".") + 1 :]]:
        if name.endswith(ending):
            stem = name[: len(name) - len(ending)]
            yield from (stem + end for end in (*telling, *further))


def _companions(name: str, rows: Mapping[str, int], groups: _Groups) -> list[str]:
    """Companions of a name that prove that it holds codes, and further ones; empty without proof."""
    found: dict[str, None] = {}
    for ending, telling, further in groups[name[name.rfind(".") + 1 :]]:
        if name.endswith(ending):
            stem = name[: len(name) - len(ending)]
            there = [other for end in telling if (other := stem + end) in rows]
            if there:
                found.update(dict.fromkeys([*there, *(other for end in further if (other := stem + end) in rows)]))
    return [other for other in found if rows[other] != rows[name]]


def undecoded_lines(found: Mapping[str, str]) -> list[Text]:
    """Lines below a table that name the tensors whose codes are not decoded; empty if there are none.

    Args:
        found: Name → reason as a sentence.

    >>> [line.text for line in undecoded_lines({"l.W_q": "Holds codes of an unknown encoding"})]
    ['listed as stored: 1 tensor of codes that are not decoded', '  l.W_q: Holds codes of an unknown encoding']
    """
    if not found:
        return []
    what = plural(len(found), "tensor of codes that are", "tensors of codes that are")
    lines = [Text(f"listed as stored: {what} not decoded", "warn")]
    lines += [Text(printable(f"  {name}: {reason}"), "warn") for name, reason in list(found.items())[:LINES_SHOWN]]
    if len(found) > LINES_SHOWN:
        lines.append(Text(f"  … {plural(len(found) - LINES_SHOWN, 'more tensor')} …", "dim"))
    return lines


def _packing_of(name: str, beside: Sequence[str]) -> str:
    """Name of the packing that writes such a name with such companions; empty if none is known."""
    for ending, companion, packing in PACKINGS:
        if name.endswith(ending) and f"{name[: len(name) - len(ending)]}{companion}" in beside:
            return packing
    return ""


def quoted(name: str) -> str:
    """Name quoted for messages."""
    return shorten(repr(name))


def refuse(found: Mapping[str, Coded], names: Iterable[str], where: str, hint: str, *, numbers: bool = False) -> None:
    """Raise if values would be computed from codes.

    Args:
        found: Result of `coded` for the source.
        names: Canonical names of the tensors to compute with.
        where: Label of the source.
        hint: Hint for the error.
        numbers: Whether companions that are numbers may be used.

    Raises:
        NotReadable: A tensor holds codes, or belongs to codes.
    """
    if not found:
        return
    hit = [found[name] for name in names if name in found and not (numbers and found[name].numbers)]
    if hit:
        first = next((each for each in hit if each.codes), hit[0])
        more = f"The same applies to {plural(len(hit) - 1, 'other tensor')}" if len(hit) > 1 else None
        raise NotReadable(first.reason, where=f"{where}: {quoted(first.name)}", exists=more, hint=hint)
