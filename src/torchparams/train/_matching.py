"""Match the tensors of a source with those of a model, by name, shape and dtype."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torchparams.errors import MismatchError, TorchParamsError
from torchparams.io.filebytes import paused_gc
from torchparams.order import natural
from torchparams.parameters import Parameters, stored
from torchparams.proposals import best_match, propose
from torchparams.reading import InfosByName
from torchparams.renames import Renames, renamed
from torchparams.render.tree import listed, plural
from torchparams.sources.live.module import ModuleSource
from torchparams.sources.live.tensors import LiveReading, coded_in
from torchparams.sources.opening import open_source
from torchparams.train._assignment import Assignment
from torchparams.train._fit import (
    EXTRA_STATE,
    beside_tensors,
    problem,
    same_values,
    shown,
)
from torchparams.train._live import live_table
from torchparams.train._memory import give_memory
from torchparams.train.coverage import Coverage, Item, candidates, grouped

if TYPE_CHECKING:
    import torch
    from torch import nn

    from torchparams.encodings.companions import Coded
    from torchparams.info import ParameterInfo
    from torchparams.left_out import LeftOut
    from torchparams.proposals import Match
    from torchparams.reading import Reading

_MATCHED_AMONG = 10_000  # names on both sides; above that, only shapes and endings are compared


def matching(model: Any, x: Any, selector: object, rename: object, cast: bool) -> Matching:
    """The assignment for `torchparams.load`, with its arguments."""
    with paused_gc():  # listing and matching create many objects and no cycles
        return Matching(model, x, selector, rename, cast)


class Matching:
    """Assignment of source tensors to model tensors.

    Args:
        model, x, selector, rename, cast: As for `torchparams.load`.

    Attributes:
        coverage: What fits, and what does not.
        live, given: The two sources.
    """

    def __init__(self, model: Any, x: Any, selector: object, rename: object, cast: bool) -> None:
        source, table = live_table(model, "torchparams.load")
        if not isinstance(model, Parameters):
            table = Parameters(ModuleSource(source.module, buffers=True))
        if selector is not None:
            table = table.select(selector)
        self.module: nn.Module = source.module
        self.live = ModuleSource(source.module, buffers=True)
        reading = self.reading = LiveReading.of(source.module, True)  # the tensors as they are held
        self.targets: Mapping[str, torch.Tensor] = reading.tensors
        self.model_infos = InfosByName(reading)
        self.saved = dict(zip(reading.names, reading.column("persistent"), strict=True))
        chosen = reading.names if table == Parameters(self.live) else table.names
        self.wanted = InfosByName(reading, [name for name in chosen if self.saved.get(name)])
        given = _table_of(x)
        if self._live_coded:  # quantised layers accept the stored codes
            given = stored(given)
        self.given = given.source
        # The order matters only to a proposal by position; sorting all names of a file costs more than matching them.
        plain = given.selector is None and rename != "auto"
        self._given_records = self.given.reading() if plain else given.reading()
        persistent = zip(self._given_records.names, self._given_records.column("persistent"), strict=True)
        self.given_infos = InfosByName(self._given_records, [name for name, is_saved in persistent if is_saved])
        self._arguments = model, x, selector
        self._cast = cast
        self._loaded: dict[str, tuple[str, Item]] = {}  # canonical name → the canonical one in the source, item
        self.coverage = self._match(rename)

    def _match(self, rename: object) -> Coverage:
        have = _spellings(self._given_records, self.given_infos)
        rename_text = ""
        if isinstance(rename, str) and rename == "auto":
            renames, rename_text = self._proposed(have)
        else:
            renames = Renames.of(rename)
            rename_text = str(renames) if renames else ""
        names = renames.apply(have, where=self.given.label) if renames else dict(zip(have, have, strict=True))

        found: dict[str, list[str]] = {}
        unexpected: dict[str, str] = {}
        left_out: list[str] = []
        places = _Places(self.live, self.reading)
        for source_name, name in names.items():
            canonical = name if name in self.targets else places.find(name)
            if canonical is None:
                unexpected[source_name] = name
            elif canonical in self.wanted:
                found.setdefault(canonical, []).append(source_name)
            elif self.saved[canonical]:
                left_out.append(source_name)
            else:
                unexpected[source_name] = name

        if self.given.files:
            unexpected = {name: unexpected[name] for name in natural(unexpected)}
            left_out = natural(left_out)
        missing = [name for name in self.wanted if name not in found]
        self.counters = _counters(missing, self.reading)
        missing = [name for name in missing if name not in self.counters]
        mismatched = self._judge_all(found, have)
        extra, hooked = beside_tensors(self.module)
        places_of_extra = {f"{name}.{EXTRA_STATE}".removeprefix(".") for name in extra}
        strangers = {source: name for source, name in unexpected.items() if name not in places_of_extra}
        selected = len(self.wanted) < sum(self.saved.values())
        if selected:  # with a selector, tensors that the model lacks are left out, not unexpected
            left_out += strangers
            strangers = {}
        missing_items, unexpected_items, mismatched_items = self._with_candidates(missing, strangers, have, mismatched)
        return Coverage(
            self.live.label,
            self.given.label,
            grouped(item for _, item in self._loaded.values()),
            missing_items,
            unexpected_items,
            mismatched_items,
            tuple(left_out),
            rename_text,
            (*_notes(self.counters, extra, hooked), *_own_state(self.live.left_out, extra)),
        )

    def _proposed(self, spelled: Mapping[str, str]) -> tuple[Renames, str]:
        """The rename found by `"auto"`, and its description."""
        have = {name: self.given_infos[canonical] for name, canonical in spelled.items()}
        want = {
            name: self.model_infos[canonical] for name, canonical in _spellings(self.reading, self.model_infos).items()
        }
        proposal = propose(have, want)
        names = proposal.apply(have) if proposal else dict(zip(have, have, strict=True))
        places = _Places(self.live, self.reading)
        met = {places.find(name) for name in names.values()}
        free = {source: have[source] for source, name in names.items() if places.find(name) is None}
        left = {name: info for name, info in self.wanted.items() if name not in met}
        matches = best_match(free, left)
        texts = [str(proposal)] if proposal else []
        if matches:
            reasons = [f"{match.have} → {match.want}" for match in matches]
            texts.append(f"{plural(len(matches), 'pair')} by shape and position: {listed(reasons)}")
        merged = {**names, **{match.have: match.want for match in matches}}
        changes = {old: new for old, new in merged.items() if old != new}
        text = ", ".join(texts)
        return renamed(changes, text) if changes else Renames(), text

    def _judge_all(self, found: Mapping[str, list[str]], have: Mapping[str, str]) -> dict[str, Item]:
        """Judges each tensor that something was found for: remembers what fits, and gives what does not."""
        ours = dict(zip(self.reading.names, self.reading.column("dense"), strict=True))
        theirs = dict(zip(self._given_records.names, self._given_records.column("dense"), strict=True))
        mismatched: dict[str, Item] = {}
        for name in self.wanted:
            sources = found.get(name)
            if sources is None:
                continue
            first = sources[0]
            given, dense = have[first], ours[name]
            if len(sources) == 1 and dense is not None and dense == theirs[given]:
                self._loaded[name] = given, Item(name, first)  # nearly all: nothing more needs to be known of them
                continue
            item = self._judge(name, sources, have)
            if name not in self._loaded:
                mismatched[name] = item
        return mismatched

    def _judge(self, name: str, sources: list[str], have: Mapping[str, str]) -> Item:
        """Make the item of one tensor found in the source, and add its pair if it fits."""
        info, target, first = self.wanted[name], self.targets[name], sources[0]
        given = {source: self.given_infos[have[source]] for source in sources}
        more: tuple[str, ...] = ()
        distinct = sources
        if len(sources) > 1:  # several spellings of one source tensor count once
            more = tuple(sources[1:])
            distinct = list({have[source]: source for source in reversed(sources)}.values())
        for source in distinct:
            why = problem(given[source], self.given, info, target, cast=self._cast)
            if not why and given[source].dtype != info.dtype:
                why = self._codes(given[source], info)
            if why:
                return Item(name, source, why, also=tuple(other for other in sources if other != source))
        if len(distinct) > 1:
            differing = self._differing(given, distinct[::-1])
            if differing is not None:
                note = f"tied in the model, but {differing} holds different values"
                return Item(name, first, note, also=more)
        dtype = given[first].dtype
        note = "" if dtype is info.dtype or dtype == info.dtype else f"{dtype} → {info.dtype}"
        item = Item(name, first, note, also=more)
        self._loaded[name] = have[first], item
        return item

    def _codes(self, given: ParameterInfo, wanted: ParameterInfo) -> str:
        """Reason against a cast between quantised codes and values; empty if neither side holds codes."""
        for source, name, prefix in (
            (self._given_coded, given.name, ""),
            (self._live_coded, wanted.name, "in the model: "),
        ):
            if name in source and not source[name].numbers:
                return f"dtype {given.dtype}, not {wanted.dtype}; {prefix}{source[name].reason}"
        return ""

    @cached_property
    def _given_coded(self) -> Mapping[str, Coded]:
        return self.given.coded()

    @cached_property
    def _live_coded(self) -> Mapping[str, Coded]:
        return coded_in(self.reading)

    def _differing(self, given: Mapping[str, ParameterInfo], names: list[str]) -> str | None:
        first, *others = (given[name] for name in names)
        for name, other in zip(names[1:], others, strict=True):
            if other.dtype != first.dtype or not same_values(self.given, first, other):
                return name
        return None

    def _with_candidates(
        self,
        missing: Sequence[str],
        strangers: Mapping[str, str],
        have: Mapping[str, str],
        mismatched: Mapping[str, Item],
    ) -> tuple[Mapping[str, Item], Mapping[str, Item], Mapping[str, Item]]:
        """Missing, unexpected and mismatched items, each with the nearest name of the other side."""
        for_missing, for_strangers = self._nearest(missing, {name: have[source] for source, name in strangers.items()})
        unsaved = {name for name, is_saved in self.saved.items() if not is_saved}
        note = "a buffer of the model that is not saved"
        wanted = {name: self.wanted[name] for name, item in mismatched.items() if item.note.startswith("shape")}
        others: dict[str, str] = {}
        if wanted:
            free = {name: self.given_infos[have[source]] for source, name in strangers.items()}
            others = {match.want: match.have for match in best_match(free, wanted)}
        return (
            grouped(Item(name, nearest=for_missing.get(name)) for name in missing),
            grouped(
                Item(name, source, note if name in unsaved else "", for_strangers.get(name))
                for source, name in strangers.items()
            ),
            grouped(item._replace(nearest=others.get(name)) for name, item in mismatched.items()),
        )

    def _nearest(self, missing: Sequence[str], strangers: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
        """The nearest stranger of each missing name, and the reverse.

        Args:
            missing: Names of the model.
            strangers: Name after renaming → canonical name in the source.
        """
        if not (missing and strangers):
            return {}, {}
        ours, theirs = (
            dict(zip(reading.names, reading.column("shape"), strict=True))
            for reading in (self.reading, self._given_records)
        )
        matches: Sequence[Match] = ()
        if len(missing) + len(strangers) <= _MATCHED_AMONG:
            matches = best_match(
                {name: self.wanted[name] for name in missing},
                {name: self.given_infos[canonical] for name, canonical in strangers.items()},
            )
        return candidates(
            {name: ours[name] for name in missing},
            {name: theirs[canonical] for name, canonical in strangers.items()},
            matches,
        )

    @property
    def where(self) -> str:
        """Label of source and model for messages."""
        return f"{self.given.label} → {self.live.label}"

    # --- results ---------------------------------------------------------------------------------

    def pairs(self) -> list[Assignment]:
        """The tensors to copy."""
        with paused_gc():
            infos, targets = self.given_infos, self.targets
            return [
                Assignment(name, targets[name], self.given, infos[given]) for name, (given, _) in self._loaded.items()
            ]

    @property
    def without_memory(self) -> dict[str, torch.Tensor]:
        """Name → tensor, for loaded tensors that are lazy or on the meta device."""
        columns = self.reading.names, self.reading.column("shape"), self.reading.column("device")
        names = (name for name, shape, device in zip(*columns, strict=True) if shape is None or device == "meta")
        return {name: self.targets[name] for name in names if name in self._loaded}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of the loaded tensors."""
        return {name: self.given_infos[given].shape or () for name, (given, _) in self._loaded.items()}

    def set_counters(self, device: Any) -> None:
        """Set batch counters that the source lacks and that have no memory to zero, as torch does."""
        meta = {name: self.targets[name] for name in self.counters if self.wanted[name].device == "meta"}
        give_memory(meta, device, where=self.live.label)
        for tensor in meta.values():
            tensor.zero_()

    def left_on_meta(self) -> Iterator[str]:
        """A sentence on tensors that still have no memory."""
        done = {*self._loaded, *self.counters}
        devices = zip(self.reading.names, self.reading.column("device"), strict=True)
        left = [name for name, device in devices if device == "meta" and name not in done]
        if left:
            yield f"still on the meta device: {listed(left)}; they were not loaded, and have no values"

    def refuse_nothing(self, rename: object) -> None:
        """Raise if no tensor would be loaded, even with `strict=False`."""
        if not self._loaded:
            raise MismatchError(
                "none of its tensors fit the model",
                where=self.where,
                exists=f"it holds {listed(self.given_infos) or 'nothing'}; "
                f"the model {listed(self.wanted) or 'nothing that is saved'}",
                hint=self.hint(rename, False),
            )

    def hint(self, rename: object, strict: bool | Collection[str]) -> str | None:
        """Hint for an incomplete coverage."""
        if self.coverage.complete:
            return None
        inside = self._nested()
        if inside is not None:
            return inside
        if rename is None and self.coverage.missing and self.coverage.unexpected:
            try:
                automatic = matching(*self._arguments, "auto", self._cast).coverage
            except TorchParamsError:
                automatic = self.coverage
            if len(automatic.loaded) > len(self.coverage.loaded):
                return f'pass rename="auto": {automatic.rename}'
        if isinstance(self.given, ModuleSource) and not self.given.buffers:
            return "pass the model itself, not a table without its buffers"
        return "strict=False loads what fits" if strict and self.coverage.loaded else None

    def _nested(self) -> str | None:
        """Hint naming the nested mapping in `x` that holds the model."""
        heads: dict[str, int] = {}
        for name in self.given_infos:
            head, _, rest = name.partition(".")
            heads[head] = heads.get(head, 0) + (rest in self.wanted)
        if not heads:
            return None
        best = max(heads, key=lambda head: heads[head])
        if heads[best] <= len(self._loaded):
            return None
        mapping = getattr(self.given.stored, "mapping", None)
        if isinstance(mapping, Mapping):
            return f"pass the mapping under {best!r}" if isinstance(mapping.get(best), Mapping) else None
        if not self.given.files:
            return None
        target = f"{self.given.label}{'.' if '#' in self.given.label else '#'}{best}"
        try:
            open_source(target).close()
        except TorchParamsError:
            return None  # flat names with a common prefix need a rename
        return f"load {target!r}"


def _counters(missing: Iterable[str], reading: LiveReading) -> list[str]:
    """Missing batch counters. Early versions of torch did not save them, and torch's load does not need them."""
    names = [name for name in missing if name.rpartition(".")[2] == _COUNTER]
    if not names:
        return []
    from torch.nn.modules.batchnorm import _NormBase

    owners = dict(zip(reading.tensors, reading.owners, strict=True))
    return [name for name in names if isinstance(owners[name], _NormBase)]


_COUNTER = "num_batches_tracked"


def _notes(counters: list[str], extra: list[str], hooked: list[str]) -> Iterator[str]:
    """Sentences on counters that were not loaded, extra state, and load hooks."""
    if counters:
        yield f"missing, as torch allows: {listed(counters)}"
    if extra:
        yield (
            f"not loaded: the extra state of {plural(len(extra), 'module')} ({listed(map(shown, extra))}); "
            "pass it to set_extra_state"
        )
    if hooked:
        yield (
            f"not run: the code that {plural(len(hooked), 'module')} ({listed(map(shown, hooked))}) hooks into "
            "load_state_dict"
        )


def _own_state(left_out: Iterable[LeftOut], extra: list[str]) -> Iterator[str]:
    """A sentence on modules with custom state outside `get_extra_state`."""
    others = [shown(each.name) for each in left_out if each.name not in extra]
    if others:
        yield (
            f"not loaded: the state that {plural(len(others), 'module')} ({listed(others)}) "
            f"{'keeps' if len(others) == 1 else 'keep'} outside parameters and buffers; load_state_dict loads it"
        )


class _Places:
    """Lookup of canonical names from any spelling that the model accepts."""

    def __init__(self, source: ModuleSource, reading: LiveReading) -> None:
        self._source = source
        self._reading = reading
        self._canonical = reading.tensors
        self._others: dict[str, str] | None = None
        self._names: dict[int, str] | None = None

    def find(self, name: str) -> str | None:
        """The canonical name, or None."""
        if name in self._canonical:
            return name
        if self._others is None:
            names = self._reading.names
            self._others = {other: names[row] for row, other in (*self._reading.aliases, *self._reading.raws)}
        found = self._others.get(name)
        if found is not None:
            return found
        # The rest are unknown names and raw spellings of aliases, which only wrapped models have.
        if not self._source.takes(name):
            return None
        if self._names is None:
            self._names = {id(tensor): canonical for canonical, tensor in self._source.keys().items()}
        return self._names.get(id(self._source.value(name)))


def _spellings(reading: Reading, among: Collection[str]) -> dict[str, str]:
    """Every name of those `among` a reading's, aliases included, in order → the canonical name."""
    names = reading.names
    if not reading.aliases and len(among) == len(names):
        return dict(zip(names, names, strict=True))
    others: dict[str, list[str]] = {}
    for row, other in reading.aliases:
        others.setdefault(names[row], []).append(other)
    return {
        name: canonical for canonical in names if canonical in among for name in (canonical, *others.get(canonical, ()))
    }


def _table_of(x: Any) -> Parameters:
    return x if isinstance(x, Parameters) else Parameters(open_source(x, buffers=True))
