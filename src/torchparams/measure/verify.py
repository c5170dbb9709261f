"""Verify sources against manifests, and against the rules of their format."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from torchparams.engines.by_name import named
from torchparams.engines.distributed import DistributedEngine
from torchparams.engines.threads import ThreadEngine
from torchparams.errors import FileFormatError, LimitExceeded, NotReadable
from torchparams.info import ParameterInfo
from torchparams.left_out import concerned, in_words
from torchparams.measure.digest import Digests, chosen
from torchparams.measure.hashing import encoded_as, tensor_digests
from torchparams.measure.integrity import FAILED, IMPOSSIBLE, OK, Check, integrity, told
from torchparams.render.result import Result
from torchparams.render.rows import ALIASES_SHOWN, ROWS_SHOWN
from torchparams.render.tree import (
    Cell,
    Column,
    Row,
    Table,
    Text,
    Tree,
    cut,
    human_bytes,
    human_shape,
    listed,
    plural,
    printable,
)
from torchparams.selectors import Selector

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torchparams.dtypes import DType
    from torchparams.engines.base import Engine, Progress
    from torchparams.measure.hashing import TensorDigest
    from torchparams.parameters import Parameters
    from torchparams.sources.base import Source
    from torchparams.sources.torchfile.verdict import Verdict

KINDS = ("content", "unreadable", "shape", "dtype", "missing", "unexpected")
"""Kinds of differences from a manifest."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference of one tensor from the manifest.

    Attributes:
        kind: One of `KINDS`: different elements, unreadable elements, different shape, different dtype (and perhaps
            shape), missing from the source, or missing from the manifest.
        names: Name, and other names with the same difference.
        expected: Digest, or dtype and shape, in the manifest; None for an unexpected tensor.
        found: Digest, or dtype and shape, in the source, or the reason why it is unreadable; None for a missing tensor.
    """

    kind: str
    names: tuple[str, ...]
    expected: str | None
    found: str | None

    @property
    def name(self) -> str:
        """First name."""
        return self.names[0]

    def to_json(self) -> dict[str, Any]:
        """The difference as JSON data, with aliases separate."""
        return {
            "kind": self.kind,
            "name": self.name,
            "aliases": list(self.names[1:]),
            "expected": self.expected,
            "found": self.found,
        }


@dataclass(frozen=True, repr=False)
class Verification(Result):
    """Result of `verify`.

    Attributes:
        source: Label of the source.
        format: Format of the source; empty if it could not be opened.
        manifest: Label of the manifest, or None.
        checks: All checks, including those that were not possible.
        differences: Differences from the manifest, in source order; missing tensors last.
        tensors: Number of checked tensors.
        nbytes: Bytes of these tensors.
    """

    source: str
    format: str
    manifest: str | None
    checks: tuple[Check, ...]
    differences: tuple[Difference, ...]
    tensors: int
    nbytes: int

    @property
    def ok(self) -> bool:
        """Whether a check passed, none failed, and there is no difference."""
        outcomes = {check.outcome for check in self.checks}
        return not self.differences and FAILED not in outcomes and OK in outcomes

    def __bool__(self) -> bool:
        return self.ok

    def to_json(self) -> dict[str, Any]:
        """The result as JSON data, with `ok`."""
        return {
            "source": self.source,
            "format": self.format,
            "manifest": self.manifest,
            "ok": self.ok,
            "tensors": self.tensors,
            "nbytes": self.nbytes,
            "checks": [check.to_json() for check in self.checks],
            "differences": [difference.to_json() for difference in self.differences],
        }

    def tree(self, limit: int | None = None) -> Tree:
        """Tree of the differences, the checks and the verdict.

        Args:
            limit: Maximum number of rows per table; None for all.
        """
        title = f"{self.source} ({self.format})" if self.format else self.source
        parts: list[Text | Table] = [Text(printable(title), "title")]
        if self.differences:
            about = (
                Column("tensor", style="name", shrink=True),
                Column("differs"),
                *(Column(title, shrink=True, yields=True) for title in ("expected", "found")),
            )
            parts.append(Table(about, cut([_row(d) for d in self.differences], limit, "differences")))
            parts.append(Text(""))
        columns = (Column("check"), Column(""), Column("result", wraps=True))
        parts.append(Table(columns, cut([check.row() for check in self.checks], limit, "checks")))
        parts.append(Text(self._verdict(), "good" if self.ok else "error"))
        return Tree(tuple(parts))

    def _verdict(self) -> str:
        looked = f"{plural(self.tensors, 'tensor')}, {human_bytes(self.nbytes)}"
        if not self.differences and all(check.outcome == IMPOSSIBLE for check in self.checks):
            return f"{looked}: nothing was compared."
        if self.ok:
            impossible = any(check.outcome == IMPOSSIBLE for check in self.checks)
            sound = "no problem found" if impossible else "all checks passed"
            return f"{looked}: {sound if self.manifest is None else 'matches the manifest'}."
        parts = []
        for kind in KINDS:
            count = sum(difference.kind == kind for difference in self.differences)
            if count:
                parts.append(f"{count:,} {_COUNTED[kind]}")
        failed = sum(check.outcome == FAILED and check.what != "digests" for check in self.checks)
        if failed:
            parts.append(f"{plural(failed, 'check')} failed")
        return f"{looked}: {', '.join(parts)}."

    def _shown(self) -> Tree:
        return self.tree(ROWS_SHOWN)


_COUNTED = {
    "content": "with different content",
    "unreadable": "not readable",
    "shape": "with a different shape",
    "dtype": "with a different dtype",
    "missing": "missing",
    "unexpected": "unexpected",
}
_DIGITS = 16  # digits of a digest in a row


def _row(difference: Difference) -> Row:
    names = difference.names
    more = len(names) - 1 - ALIASES_SHOWN
    shown = " = ".join((*names[: 1 + ALIASES_SHOWN], *([f"… {more:,} more"] if more > 0 else [])))
    said = [difference.expected or "", difference.found or ""]
    if difference.kind in ("content", "unreadable"):
        said[0] = f"{said[0][:_DIGITS]}…"
    if difference.kind == "content":
        said[1] = f"{said[1][:_DIGITS]}…"
    return Row((shown, Cell(difference.kind, "error"), *said))


def verify(
    x: object,
    manifest: str | os.PathLike[str] | Digests | None = None,
    selector: object = None,
    *,
    strict: bool = True,
    values: bool = False,
    max_nbytes: int | None = None,
    engine: Engine | str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Verify a source against a manifest, and against the rules of its own format.

    With a manifest, the digest of every tensor is recomputed; each tensor that differs, is missing or is unexpected is
    named. A name on one side only is no difference if its tensor is tied and has the same values under another of its
    names: checkpoints often store one name of a tied weight. The check `ties` lists such names. Without a manifest,
    every byte is read and compared with the checksums of the format: torch zips have a CRC-32 for each member;
    safetensors and legacy files have none, which is reported. Both ways find structural damage. A pickle that would run
    code when it is loaded fails a check that names the call; nothing is run here. A file that cannot be opened because
    it breaks the rules of its format fails a check instead of raising.

    Against a manifest, a model with sharded parameters is digested: all their ranks make the call, as for `digest`.

    Args:
        x: Model, checkpoint, mapping of tensors, or `Parameters`. Buffers of a live model are included as in `digest`.
        manifest: File written by `Digests.write` or `torchparams digest -o`; or `Digests` of another source.
        selector: Tensors to verify, in the source and in the manifest; None for all.
        strict: Raise if any branch of a selector matches nothing.
        values: Also check the values: every flag of `stats` (NaN, infinite values, all zeros, a scale far from its
            siblings, …) fails a check.
        max_nbytes: Largest size of all files of the checkpoint together, in bytes; more fails a check.
        engine: Engine to run on, or its name (`ray`); by default, threads of this process.
        progress: Callback with the bytes read so far and in total.

    Raises:
        NoMatch: A branch of the selector matches nothing in the source and in the manifest.
        SourceError: There is no such source, or it changed while it was read.
        FileFormatError: The manifest is not one, or is inconsistent.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> before = tp.digest({"w": np.array([1.0, 2.0]), "b": np.zeros(1)})
    >>> [(found.name, found.kind) for found in tp.verify({"w": np.array([1.0, 3.0])}, before).differences]
    [('w', 'content'), ('b', 'missing')]
    """
    if manifest is None:
        expected, label = None, None
    elif isinstance(manifest, Digests):
        expected, label = manifest, manifest.source
    else:
        expected, label = Digests.read(manifest), os.fspath(manifest)
    try:
        params = chosen(x, None, strict=True)
    except (FileFormatError, LimitExceeded, NotReadable) as error:
        if not isinstance(x, str | os.PathLike):
            raise
        broken = Check("structure", FAILED, told(error, os.fspath(x)))
        return Verification(os.fspath(x), "", label, (broken,), (), 0, 0)
    stated = {} if expected is None else _by_name(expected)
    infos = params.infos
    if selector is not None:
        wanted = _selected(params, stated, selector, strict)
        infos = {name: info for name, info in infos.items() if name in wanted}
        wanted |= {name for info in infos.values() for name in info.aliases}
        stated = {name: tensor for name, tensor in stated.items() if name in wanted}
    source = params.source
    differences: tuple[Difference, ...] = ()
    ties: tuple[str, ...] = ()
    whole: frozenset[str] = frozenset()
    checks: list[Check] = []
    if expected is not None:
        found = tuple(_compare(params, infos, expected, stated, named(engine) or _engine(infos), progress))
        differences = tuple(each for each in found if isinstance(each, Difference))
        ties = tuple(each for each in found if isinstance(each, str))
        whole = frozenset(infos) - {name for difference in differences for name in difference.names}
        progress = None  # the rest is small, unless there is damage
        missing = sum(difference.kind == "missing" for difference in differences)
        total = len(infos) + missing
        count = f"{len(whole):,} of {plural(total, 'tensor')} as in the manifest"
        checks.append(Check("digests", FAILED if differences else OK if total else IMPOSSIBLE, count))
        if ties:
            checks.append(Check("ties", OK, "Names on one side only, with equal values under another name", ties))
    checks += _outside(params, selector, infos)
    everything = selector is None and params.selector is None
    checks += integrity(source, infos, whole, everything=everything, read=expected is None, progress=progress)
    checks += _pickle(source.verdict)
    if max_nbytes is not None:
        checks += _size(source, max_nbytes)
    if values:
        checks += _values(params, infos, engine)
    try:
        source.check_unchanged()
    except FileFormatError as error:  # the file was truncated
        checks.append(Check("structure", FAILED, told(error, source.label)))
    nbytes = sum(info.nbytes for info in infos.values())
    return Verification(source.label, source.format, label, tuple(checks), differences, len(infos), nbytes)


def _outside(params: Parameters, selector: object, infos: Mapping[str, ParameterInfo]) -> Iterator[Check]:
    """Check for state outside every table, which a manifest cannot cover; for a live model it fails."""
    found = params.left_out
    if selector is not None:
        found = concerned(found, Selector.of(selector), infos)
    for outcome, beside in (
        (FAILED, [each for each in found if each.live]),
        (IMPOSSIBLE, [each for each in found if not each.live]),
    ):
        if beside:
            yield Check("other state", outcome, f"not compared: {in_words(beside)}")


def _pickle(verdict: Verdict | None) -> Iterator[Check]:
    """Check for code that unpickling the file would run; none without a pickle."""
    if verdict is not None:
        needs = f"; needs the classes {listed(verdict.classes, 4)}" if verdict.classes else ""
        fine = f"calls only safe functions of torch, numpy and the standard library{needs}"
        yield Check("pickle", OK if verdict.alarm is None else FAILED, verdict.alarm or fine)


def _size(source: Source, most: int) -> Iterator[Check]:
    """Check of the size of all files together; not possible without files."""
    if not source.files:
        yield Check("size", IMPOSSIBLE, f"a {source.format} has no files")
        return
    size = sum(size for _, size, _ in source.fingerprint())
    limit = f"{human_bytes(size)}; the limit is {human_bytes(most)}"
    yield Check("size", OK if size <= most else FAILED, limit)


def _engine(infos: Mapping[str, ParameterInfo]) -> Engine:
    sharded = any(info.sharding is not None for info in infos.values())
    return DistributedEngine(ThreadEngine()) if sharded else ThreadEngine()


def _values(params: Parameters, infos: Mapping[str, ParameterInfo], engine: Engine | str | None) -> Iterator[Check]:
    """Checks for each kind of flag of `stats`, and for tensors whose values cannot be read."""
    from torchparams.measure.flags import kinds_of
    from torchparams.measure.stats import stats

    try:
        found = stats(params.filter(lambda info: info.name in infos), engine=engine)
    except (FileFormatError, LimitExceeded) as error:  # another check reports the damage
        yield Check("values", FAILED, told(error, params.source.label))
        return
    for kind in kinds_of(found.flags):
        names = tuple(flag.name for flag in found.flags if flag.kind == kind)
        yield Check("values", FAILED, kind, names)
    if not found.flags and found.rows:
        yield Check("values", OK, f"{plural(len(found.rows), 'tensor')}: no flags")
    if found.unread:
        names = tuple(each.name for each in found.unread)
        yield Check("values", IMPOSSIBLE, "values that cannot be read as numbers", names)


def _by_name(expected: Digests) -> dict[str, TensorDigest]:
    """Tensors of a manifest by every name, including aliases."""
    return {name: tensor for tensor in expected.tensors.values() for name in tensor.names}


def _selected(params: Parameters, listed: Mapping[str, TensorDigest], selector: object, strict: bool) -> set[str]:
    """Names that a selector matches in the source or, for missing tensors, in the manifest."""
    there = {name for info in params.infos.values() for name in (info.name, *info.aliases)}
    missing = [
        ParameterInfo(name, t.shape, t.dtype, prod(t.shape), t.nbytes, "file", "tensor", raw_name=name)
        for name, t in listed.items()
        if name not in there
    ]
    reading = [*params.infos.values(), *missing]
    return set(Selector.of(selector).names(reading, strict=strict, where=params.source.label))


def _compare(
    params: Parameters,
    infos: Mapping[str, ParameterInfo],
    expected: Digests,
    listed: Mapping[str, TensorDigest],
    engine: Engine,
    progress: Progress | None,
) -> Iterator[Difference | str]:
    """Tensors that differ from the manifest; or, as text, a name whose values exist under another name."""
    everything = _by_name(expected)
    held = _twins(params, infos, listed)
    comparable = [
        info
        for info in {**infos, **{info.name: info for info in held.values()}}.values()
        if any((entry := everything.get(name)) and _type(entry) == encoded_as(info) for name in _names(info))
    ]
    found = _hashed(params.source, comparable, engine, progress)
    seen: set[str] = set()
    for name, info in infos.items():
        groups: dict[tuple[str, str | None, str | None], list[str]] = {}
        # A name missing from the manifest is fine if the manifest has the tensor under another name, with the same
        # values.
        twin = next((o for o in _names(info) if _difference(everything.get(o), info, found.get(name)) is None), None)
        for other in _names(info):
            seen.add(other)
            if twin is not None and other not in everything:
                yield f"{other} = {twin}"
                continue
            how = _difference(listed.get(other), info, found.get(name))
            if how is not None:
                groups.setdefault(how, []).append(other)
        for (kind, wanted, there), names in groups.items():
            yield Difference(kind, tuple(names), wanted, there)
    for name, tensor in listed.items():
        if name not in seen:
            absent = [other for other in tensor.names if other in listed and other not in seen]
            seen.update(absent)
            twins = ((other, held[other]) for other in tensor.names if other in held)
            same = next((o for o, info in twins if _difference(tensor, info, found.get(info.name)) is None), None)
            if same is None:
                yield Difference("missing", tuple(absent), _spelled(*_type(tensor)), None)
            else:
                yield from (f"{other} = {same}" for other in absent)


def _names(info: ParameterInfo) -> tuple[str, ...]:
    return (info.name, *info.aliases)


def _twins(
    params: Parameters, infos: Mapping[str, ParameterInfo], listed: Mapping[str, TensorDigest]
) -> dict[str, ParameterInfo]:
    """For missing names: other names of the same tensor in the source, even outside the selection."""
    there = {name for info in infos.values() for name in _names(info)}
    wanted = {twin for name, tensor in listed.items() if name not in there for twin in tensor.names if twin != name}
    if not wanted:
        return {}
    return {name: info for info in params.infos.values() for name in _names(info) if name in wanted}


def _difference(
    expected: TensorDigest | None, info: ParameterInfo, found: str | FileFormatError | LimitExceeded | None
) -> tuple[str, str | None, str | None] | None:
    """Difference of a tensor from one name in a manifest: kind, expected, found."""
    here = encoded_as(info)
    if expected is None:
        return "unexpected", None, _spelled(*here)
    there = _type(expected)
    if there != here:
        return "dtype" if there[0] != here[0] else "shape", _spelled(*there), _spelled(*here)
    if isinstance(found, FileFormatError | LimitExceeded):
        return "unreadable", expected.digest, str(found)
    return None if expected.digest == found else ("content", expected.digest, found)


def _hashed(
    source: Source, infos: list[ParameterInfo], engine: Engine, progress: Progress | None
) -> dict[str, str | FileFormatError | LimitExceeded]:
    """Digest by name, or the error if the tensor cannot be read."""
    try:
        return dict(tensor_digests(source, infos, engine=engine, progress=progress).digests)
    except (FileFormatError, LimitExceeded):
        pass  # reading the tensors one by one shows which are affected
    found: dict[str, str | FileFormatError | LimitExceeded] = {}
    for info in infos:
        try:
            found |= tensor_digests(source, [info], engine=engine).digests
        except (FileFormatError, LimitExceeded) as error:
            found[info.name] = error
    return found


def _type(tensor: TensorDigest) -> tuple[DType, tuple[int, ...]]:
    return tensor.dtype, tensor.shape


def _spelled(dtype: DType, shape: tuple[int, ...]) -> str:
    return f"{dtype} {human_shape(shape)}"
