"""Why a selector hits nothing, and what was perhaps meant.

Everything here is on the way to an error or an explanation. It is linear in the count of names, like selecting.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from torchparams._selector.bounded import Bounded, TooSlow
from torchparams._selector.globs import ANY_DEPTH, Alternatives, Glob, Wild, literal_glob
from torchparams._selector.parser import WORDS, parse
from torchparams._selector.table import Rows, Table, class_spellings, layer_of, modules_below
from torchparams._selector.tree import (
    Complement,
    Compound,
    Condition,
    Intersection,
    Names,
    Node,
    Objects,
    Regex,
    Union,
    Word,
    children,
    intersection,
)
from torchparams.errors import NoMatch, SelectorSyntaxError, nearest, shorten
from torchparams.render.tree import human_shape, plural

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

SHOWN = 4
"""How many values or names a message shows."""


def refuse_empty(table: Table, node: Node) -> None:
    """Raise where a part of the selector hits nothing: a term, an intersection, a complement or what it excludes.

    Raises:
        NoMatch: Some part hits nothing; the first of them, from the left, is named.
    """
    if not table.names:
        raise NoMatch(f"`{_text(node)}` matches nothing", where=table.where, exists="there are no parameters")
    _refuse(table, node, node)


def _refuse(table: Table, node: Node, whole: Node) -> None:
    for child in children(node):
        _refuse(table, child, whole)
    if isinstance(node, Names):
        _refuse_names(table, node)
    elif not table.hits(node) or (isinstance(node, Objects) and len(table.hits(node)) < len(node.objects)):
        exists, hint = why(table, node)
        place = "" if node is whole else f", in `{_text(whole)}`"
        raise NoMatch(f"`{_text(node)}` matches nothing{place}", where=table.where, exists=exists, hint=hint)


def _refuse_names(table: Table, node: Names) -> None:
    if not node.names:
        raise NoMatch("no names are given, so nothing is selected", where=table.where, hint="every parameter is `**`")
    missing = [name for name in sorted(node.names) if name not in table.places]
    if missing:
        others = f" (nor are {len(missing) - 1} others of the {len(node.names)} names)" if len(missing) > 1 else ""
        exists, hint = _computed(table, literal_glob(missing[0])) or _nearest_names(table, missing[0])
        raise NoMatch(
            f"no parameter is named {shorten(missing[0])!r}{others}", where=table.where, exists=exists, hint=hint
        )


def _text(node: Node | Glob | Regex) -> str:
    return shorten(str(node), 120)


def why(table: Table, node: Node) -> tuple[str, str | None]:
    """Why the node, of which nothing below hits nothing, hits nothing itself; and what to write instead."""
    if isinstance(node, Compound):
        return _why_compound(table, node)
    if isinstance(node, Complement):
        return f"`{_text(node.term)}` matches all {plural(len(table.names), 'parameter')}", None
    if isinstance(node, Intersection):
        return _why_intersection(table, node), None
    if isinstance(node, Names):
        return _nearest_names(table, min(node.names, default=""))
    if isinstance(node, Union):
        return "none of its terms matches anything", None
    if isinstance(node, Objects):
        return _why_objects(table, node)
    return f"the function accepts none of the {plural(len(table.names), 'parameter')}", None


def _why_objects(table: Table, node: Objects) -> tuple[str, str | None]:
    modules = modules_below(table.records.root)
    held = set(map(id, (table.records.held or {}).values()))
    for same in node.objects:
        if isinstance(same.object, type):
            if not any(isinstance(module, same.object) for module in modules):
                return f"modules of this model are {_some(Counter(type(module).__name__ for module in modules))}", None
        elif hasattr(same.object, "_modules"):
            if all(module is not same.object for module in modules):
                return "the module is not in this model", None
        elif id(same.object) not in held:
            shape = human_shape(tuple(same.object.shape))
            return f"the tensor of shape {shape} is not in this table: it holds {plural(len(held), 'other')}", None
    return "the table holds no parameter of it", None


def _why_intersection(table: Table, node: Intersection) -> str:
    rows = table.hits(node.terms[0])
    for count, term in enumerate(node.terms[1:], 1):
        both = rows & table.hits(term)
        if not both:
            before = intersection(*node.terms[:count])
            return (
                f"`{_text(before)}` matches {len(rows):,} and `{_text(term)}` matches {len(table.hits(term)):,}, "
                "but they share none"
            )
        rows = both
    raise AssertionError("an empty intersection has a term that makes it so")


def _why_compound(table: Table, node: Compound) -> tuple[str, str | None]:
    rows = set(range(len(table.names)))
    before: Compound | None = None
    if node.pattern is not None:
        rows = table.named(node.pattern)
        if not rows:
            return _why_pattern(table, node.pattern)
        before = Compound(node.pattern)
    for count, condition in enumerate(node.conditions, 1):
        left = table.narrowed(rows, condition)
        if not left:
            exists, hint = _why_condition(table, condition, rows)
            if before is not None:
                exists = f"`{_text(before)}` alone matches {len(rows):,}; {exists}"
            return exists, hint
        rows, before = left, Compound(node.pattern, node.conditions[:count])
    raise AssertionError("an empty compound has a part that makes it so")


# --- conditions ----------------------------------------------------------------------------------


def _why_condition(table: Table, condition: Condition | Word, rows: Rows) -> tuple[str, str | None]:
    infos = [table.infos[row] for row in sorted(rows)]
    among = "them" if len(rows) < len(table.names) else f"the {plural(len(infos), 'parameter')}"
    if isinstance(condition, Word):
        hint = None
        if condition.word == "buffer":
            hint = "the buffers of a live model are listed by torchparams.of(model, buffers=True)"
        return f"`{condition}` means: {WORDS[condition.word]}; none of {among} is so", hint
    field, op = condition.field, condition.op
    if field == "name" and isinstance(condition.value, Glob):
        if op == "=" and not table.named(condition.value):
            return _why_pattern(table, condition.value)
        return f"the name of none of {among} is so", None
    if field == "module":
        return _why_module(condition, Counter(info.module for info in infos if info.module), among)
    if field in ("numel", "nbytes"):
        sizes = [getattr(info, field) for info in infos]
        return f"{field} of {among} is {min(sizes):,} to {max(sizes):,}", None
    if field == "shape":
        return f"shapes of {among} are {_some(Counter(human_shape(info.shape) for info in infos))}", None
    if field == "layer":
        layers = [layer for info in infos if (layer := layer_of(info.name)) is not None]
        if not layers:
            return f"the name of none of {among} has a number", None
        return f"the first numbers in the names of {among} are {min(layers)} to {max(layers)}", None
    values = Counter("lazy" if (value := getattr(info, field)) is None else str(value) for info in infos)
    return f"{field} of {among} is {_some(values)}", None


def _why_module(condition: Condition, owners: Counter[str], among: str) -> tuple[str, str | None]:
    shorts: Counter[str] = Counter()
    for owner, count in owners.items():
        shorts[class_spellings(owner)[1]] += count
    near = nearest(condition.text.rpartition(".")[2].strip("*"), list(shorts), count=1)
    hint = f"did you mean `[module{condition.op}{near[0]}]`?" if near and condition.op == "=" else None
    return f"the owners of {among} are {_some(shorts)}", hint


def _some(values: Counter[str]) -> str:
    """The most frequent values, and how many others there are."""
    shown = [value for value, _ in values.most_common(SHOWN)]
    more = len(values) - len(shown)
    return ", ".join(map(shorten, shown)) + (f" and {plural(more, 'other')}" if more else "")


# --- patterns ------------------------------------------------------------------------------------


def _why_pattern(table: Table, pattern: Glob | Regex) -> tuple[str, str | None]:
    if isinstance(pattern, Regex):
        return _why_regex(table, pattern)
    return _why_glob(table, pattern)


def _why_regex(table: Table, pattern: Regex) -> tuple[str, str | None]:
    try:
        found = Bounded(pattern.pattern).count(table.names)
    except TooSlow:
        found = 0
    if not found:
        return _range_of_names(table), None
    exists = f"a regular expression matches the whole name; {plural(found, 'name')} only contain a match"
    inner = pattern.pattern if re.fullmatch(r"[\w.\\-]+", pattern.pattern) else f"(?:{pattern.pattern})"
    text = f"/.*{inner}.*/"
    try:
        parse(text)
    except SelectorSyntaxError:  # flags in front, which may only stand there
        return exists, "begin and end it with .*"
    return exists, f"did you mean `{text}`?"


def _computed(table: Table, glob: Glob) -> tuple[str, str] | None:
    """What a parametrised tensor is computed from, where the glob names one."""
    last = glob.components[-1]
    if len(last) != 1 or not isinstance(last[0], str):
        return None
    *above, _ = glob.components
    inside = Glob((*above, ("parametrizations",), last, (Wild.CHARACTERS,)))
    beside = Glob((*above, (last[0], Alternatives((("_g",), ("_v",), ("_orig",))))))  # of torch.nn.utils' older ones
    for meant in (inside, beside):
        if rows := table.named(meant):
            return f"it is computed from {_listed(table, rows)}", f"select `{_text(meant)}`"
    return None


def _listed(table: Table, rows: Rows) -> str:
    shown = [f"`{shorten(table.names[row])}`" for row in sorted(rows)]
    more = len(shown) - SHOWN
    return " and ".join(shown[:SHOWN]) + (f" and {plural(more, 'other')}" if more > 0 else "")


def _why_glob(table: Table, glob: Glob) -> tuple[str, str | None]:
    if computed := _computed(table, glob):
        return computed
    for reason, meant in _meant(glob):
        if count := len(table.named(meant)):
            return reason.format(plural(count, "parameter")), f"did you mean `{_text(meant)}`?"
    if "^" in str(glob) or "$" in str(glob):
        return "a glob knows only the wildcards * ** ? {}", "a regular expression stands between slashes: /.*bias/"
    vocabulary = {component for name in _spellings(table) for component in name.split(".")}
    unknown = _unknown(glob, vocabulary)
    exists = f"no name has the component {' or '.join(repr(shorten(word)) for word in unknown)}"
    corrected = _corrected(glob, vocabulary)
    for meant in () if corrected is None else (corrected, *(wider for _, wider in _meant(corrected))):
        if count := len(table.named(meant)):
            return exists, f"did you mean `{_text(meant)}` ({plural(count, 'parameter')})?"
    # Its first component may be that of a wrapper, which is not there.
    shorter = Glob(glob.components[1:])
    wrapped = glob.components[0] == tuple(unknown[:1]) and set(shorter.components) - {ANY_DEPTH}
    if wrapped and (count := len(table.named(shorter))):
        return exists, f"did you mean `{_text(shorter)}` ({plural(count, 'parameter')})?"
    near, hint = _nearest_names(table, glob.literal or str(glob))
    return f"{exists}; {near}" if unknown else near, hint


def _meant(glob: Glob) -> Iterator[tuple[str, Glob]]:
    """Globs that are easily meant by one that is too narrow, the likeliest first, and what to say of what they hit."""
    components = glob.components
    starts, ends = components[0] == ANY_DEPTH, components[-1] == ANY_DEPTH
    if not ends:
        yield "it names a module, with {} below it", Glob((*components, ANY_DEPTH))
    if not starts:
        yield "a glob matches whole names, and those of {} end so", Glob((ANY_DEPTH, *components))
    if not starts and not ends:
        yield (
            "a glob matches whole names, and those of {} hold it further in",
            Glob((ANY_DEPTH, *components, ANY_DEPTH)),
        )
    if (Wild.CHARACTERS,) in components:
        deeper = tuple(ANY_DEPTH if component == (Wild.CHARACTERS,) else component for component in components)
        yield "`*` is exactly one component, and {} would match with `**`", Glob(deeper)


def _unknown(glob: Glob, vocabulary: Collection[str]) -> list[str]:
    literals = (c[0] for c in glob.components if len(c) == 1)
    return [piece for piece in literals if isinstance(piece, str) and piece not in vocabulary]


def _corrected(glob: Glob, vocabulary: Collection[str]) -> Glob | None:
    """The glob with each component that no name has replaced by the nearest that one has."""
    nearby: dict[str, str] = {}
    for word in _unknown(glob, vocabulary):
        near = _nearest_word(word, vocabulary)
        if near is None:
            return None
        nearby[word] = near
    if not nearby:
        return None
    swapped = []
    for component in glob.components:
        piece = component[0] if len(component) == 1 else None
        swapped.append((nearby[piece],) if isinstance(piece, str) and piece in nearby else component)
    return Glob(tuple(swapped))


def _nearest_word(word: str, vocabulary: Collection[str]) -> str | None:
    slack = max(2, len(word) // 3)
    close = sorted(other for other in vocabulary if abs(len(other) - len(word)) <= slack)
    same = [other for other in close if other.casefold() == word.casefold()]
    near = same or nearest(word, close, count=1)
    return near[0] if near else None


def _nearest_names(table: Table, name: str) -> tuple[str, str | None]:
    # A name of absurd length is like none; comparing with it would be quadratic in that length.
    near = nearest(name, _spellings(table), count=3) if len(name) <= 1_000 else []
    if not near:
        return _range_of_names(table), None
    return f"the nearest names are {', '.join(repr(shorten(n)) for n in near)}", None


def _spellings(table: Table) -> list[str]:
    """The names and the aliases: each is as good in a selector."""
    return [*table.names, *(alias for _, alias in table.records.aliases)]


def _range_of_names(table: Table) -> str:
    """What the names begin with."""
    firsts = Counter(name.partition(".")[0] for name in table.names)
    return f"the names begin with {_some(firsts)}"


FEW = 4
"""How many times as many parameters a glob with `**` hits at least, for one with `*` to be remarked on."""


def narrow(table: Table, node: Node) -> str | None:
    """Of a selector that hits something with `*` where `**` would hit many more: that, in one line; else None."""
    for child in children(node):
        if not isinstance(node, Complement) and (found := narrow(table, child)):
            return found
    if not isinstance(node, Compound) or not isinstance(node.pattern, Glob):
        return None
    components = tuple(ANY_DEPTH if each == (Wild.CHARACTERS,) else each for each in node.pattern.components)
    if components == node.pattern.components:
        return None
    deeper = Compound(Glob(components), node.conditions)
    few, many = len(table.hits(node)), len(table.hits(deeper))
    if not few or many < FEW * few:
        return None
    return f"`{_text(node)}` hits {few:,} of the {many:,} parameters that `{_text(deeper)}` hits"


def suggestion(table: Table, node: Node) -> str:
    """Why a term hits nothing and what was perhaps meant, in one line, for an explanation."""
    if any(not table.hits(child) for child in children(node)):
        return "a part of it hits nothing"
    exists, hint = why(table, node)
    return hint or exists
