"""Explain why a selector matches nothing, and suggest what was meant.

This code only runs for errors and explanations. It is linear in the number of names, like selecting.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from torchparams._selector.bounded import Bounded, TooSlow
from torchparams._selector.candidates import Candidates, Rows, class_spellings, layer_of, modules_below
from torchparams._selector.globs import ANY_DEPTH, Alternatives, Glob, Range, Wild, literal_glob
from torchparams._selector.parser import WORDS, parse
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
"""Maximum number of values or names in a message."""


def refuse_empty(table: Candidates, node: Node) -> None:
    """Raise if a part of the selector (term, intersection, complement, or its operand) matches nothing.

    Raises:
        NoMatch: A part matches nothing; the leftmost is named.
    """
    if not table.names:
        raise NoMatch(f"`{_text(node)}` matches nothing", where=table.where, exists="there are no parameters")
    _refuse(table, node, node)


def _refuse(table: Candidates, node: Node, whole: Node) -> None:
    for child in children(node):
        _refuse(table, child, whole)
    if isinstance(node, Names):
        _refuse_names(table, node)
    elif not table.hits(node) or (isinstance(node, Objects) and len(table.hits(node)) < len(node.objects)):
        exists, hint = why(table, node)
        place = "" if node is whole else f", in `{_text(whole)}`"
        raise NoMatch(f"`{_text(node)}` matches nothing{place}", where=table.where, exists=exists, hint=hint)


def _refuse_names(table: Candidates, node: Names) -> None:
    if not node.names:
        raise NoMatch("the list of names is empty", where=table.where, hint="use `**` to select every parameter")
    missing = [name for name in sorted(node.names) if name not in table.places]
    if missing:
        others = (
            f" (and {len(missing) - 1} others of the {len(node.names)} names are missing)" if len(missing) > 1 else ""
        )
        exists, hint = _computed(table, literal_glob(missing[0])) or _nearest_names(table, missing[0])
        raise NoMatch(
            f"no parameter is named {shorten(missing[0])!r}{others}", where=table.where, exists=exists, hint=hint
        )


def _text(node: Node | Glob | Regex) -> str:
    return shorten(str(node), 120)


def why(table: Candidates, node: Node) -> tuple[str, str | None]:
    """Reason why a node matches nothing although its parts do, and a suggestion."""
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


def _why_objects(table: Candidates, node: Objects) -> tuple[str, str | None]:
    modules = modules_below(table.reading.root)
    held = set(map(id, (table.reading.held or {}).values()))
    for same in node.objects:
        if isinstance(same.object, type):
            if not any(isinstance(module, same.object) for module in modules):
                return (
                    f"the modules of this model are {_some(Counter(type(module).__name__ for module in modules))}",
                    None,
                )
        elif hasattr(same.object, "_modules"):
            if all(module is not same.object for module in modules):
                return "the module is not in this model", None
        elif id(same.object) not in held:
            shape = human_shape(tuple(same.object.shape))
            return f"the tensor of shape {shape} is not among the {plural(len(held), 'tensor')} of this table", None
    return "the table has no parameter of it", None


def _why_intersection(table: Candidates, node: Intersection) -> str:
    rows = table.hits(node.terms[0])
    for count, term in enumerate(node.terms[1:], 1):
        both = rows & table.hits(term)
        if not both:
            before = intersection(*node.terms[:count])
            return (
                f"`{_text(before)}` matches {len(rows):,} and `{_text(term)}` matches {len(table.hits(term)):,}, "
                "but no parameter matches both"
            )
        rows = both
    raise AssertionError("an empty intersection has a term that makes it so")


def _why_compound(table: Candidates, node: Compound) -> tuple[str, str | None]:
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


def _why_condition(table: Candidates, condition: Condition | Word, rows: Rows) -> tuple[str, str | None]:
    infos = [table.infos[row] for row in sorted(rows)]
    among = "them" if len(rows) < len(table.names) else f"the {plural(len(infos), 'parameter')}"
    if isinstance(condition, Word):
        hint = None
        if condition.word == "buffer":
            hint = "the buffers of a live model are listed by torchparams.of(model, buffers=True)"
        return f"`{condition}` means: {WORDS[condition.word]}; this holds for none of {among}", hint
    field, op = condition.field, condition.op
    if field == "name" and isinstance(condition.value, Glob):
        if op == "=" and not table.named(condition.value):
            return _why_pattern(table, condition.value)
        return f"no name of {among} matches", None
    if field == "module":
        return _why_module(condition, Counter(info.module for info in infos if info.module), among)
    if field in ("numel", "nbytes"):
        sizes = [getattr(info, field) for info in infos]
        return f"`{field}` of {among} ranges from {min(sizes):,} to {max(sizes):,}", None
    if field == "shape":
        return f"shapes of {among} are {_some(Counter(human_shape(info.shape) for info in infos))}", None
    if field == "layer":
        layers = [layer for info in infos if (layer := layer_of(info.name)) is not None]
        if not layers:
            return f"no name of {among} has a number", None
        return f"the first numbers in the names of {among} range from {min(layers)} to {max(layers)}", None
    values = Counter("lazy" if (value := getattr(info, field)) is None else str(value) for info in infos)
    return f"`{field}` of {among} is {_some(values)}", None


def _why_module(condition: Condition, owners: Counter[str], among: str) -> tuple[str, str | None]:
    shorts: Counter[str] = Counter()
    for owner, count in owners.items():
        shorts[class_spellings(owner)[1]] += count
    near = nearest(condition.text.rpartition(".")[2].strip("*"), list(shorts), count=1)
    hint = f"did you mean `[module{condition.op}{near[0]}]`?" if near and condition.op == "=" else None
    return f"the owner classes of {among} are {_some(shorts)}", hint


def _some(values: Counter[str]) -> str:
    """Most frequent values, and the count of the others."""
    shown = [value for value, _ in values.most_common(SHOWN)]
    more = len(values) - len(shown)
    return ", ".join(map(shorten, shown)) + (f" and {plural(more, 'other')}" if more else "")


# --- patterns ------------------------------------------------------------------------------------


def _why_pattern(table: Candidates, pattern: Glob | Regex) -> tuple[str, str | None]:
    if isinstance(pattern, Regex):
        return _why_regex(table, pattern)
    return _why_glob(table, pattern)


def _why_regex(table: Candidates, pattern: Regex) -> tuple[str, str | None]:
    try:
        found = Bounded(pattern.pattern).count(table.names)
    except TooSlow:
        found = 0
    if not found:
        return _range_of_names(table), None
    exists = f"a regular expression matches the whole name; {plural(found, 'name')} contain a match"
    inner = pattern.pattern if re.fullmatch(r"[\w.\\-]+", pattern.pattern) else f"(?:{pattern.pattern})"
    text = f"/.*{inner}.*/"
    try:
        parse(text)
    except SelectorSyntaxError:  # leading flags may only be at the start
        return exists, "begin and end it with .*"
    return exists, f"did you mean `{text}`?"


def _computed(table: Candidates, glob: Glob) -> tuple[str, str] | None:
    """For a parametrised tensor: the tensors that it is computed from, and a selector of these."""
    last = glob.components[-1]
    if len(last) != 1 or not isinstance(last[0], str):
        return None
    *above, _ = glob.components
    inside = Glob((*above, ("parametrizations",), last, (Wild.CHARACTERS,)))
    beside = Glob((*above, (last[0], Alternatives((("_g",), ("_v",), ("_orig",))))))  # older torch.nn.utils
    for meant in (inside, beside):
        if rows := table.named(meant):
            return f"it is computed from {_listed(table, rows)}", f"select `{_text(meant)}`"
    return None


def _listed(table: Candidates, rows: Rows) -> str:
    shown = [f"`{shorten(table.names[row])}`" for row in sorted(rows)]
    more = len(shown) - SHOWN
    return " and ".join(shown[:SHOWN]) + (f" and {plural(more, 'other')}" if more > 0 else "")


def _why_glob(table: Candidates, glob: Glob) -> tuple[str, str | None]:
    if computed := _computed(table, glob):
        return computed
    for reason, meant in _meant(glob):
        if count := len(table.named(meant)):
            return reason.format(plural(count, "parameter")), f"did you mean `{_text(meant)}`?"
    if numbers := _numbers(table, glob):
        return numbers, None
    if "^" in str(glob) or "$" in str(glob):
        return "the wildcards of a glob are * ** ? {}", "write a regular expression between slashes: /.*bias/"
    vocabulary = {component for name in _spellings(table) for component in name.split(".")}
    unknown = _unknown(glob, vocabulary)
    exists = f"no name has the component {' or '.join(repr(shorten(word)) for word in unknown)}"
    corrected = _corrected(glob, vocabulary)
    for meant in () if corrected is None else (corrected, *(wider for _, wider in _meant(corrected))):
        if count := len(table.named(meant)):
            return exists, f"did you mean `{_text(meant)}` ({plural(count, 'parameter')})?"
    # The first component may be that of a wrapper that is not present.
    shorter = Glob(glob.components[1:])
    wrapped = glob.components[0] == tuple(unknown[:1]) and set(shorter.components) - {ANY_DEPTH}
    if wrapped and (count := len(table.named(shorter))):
        return exists, f"did you mean `{_text(shorter)}` ({plural(count, 'parameter')})?"
    near, hint = _nearest_names(table, glob.literal or str(glob))
    return f"{exists}; {near}" if unknown else near, hint


def _numbers(table: Candidates, glob: Glob) -> str | None:
    """The numbers of the layers, if the pattern matches apart from its number or range."""
    for place, component in enumerate(glob.components):
        if component == ANY_DEPTH:  # what follows may be at several places
            return None
        if len(component) != 1 or not (isinstance(component[0], Range) or str(component[0]).isdecimal()):
            continue
        rows = table.named(Glob((*glob.components[:place], (Wild.CHARACTERS,), *glob.components[place + 1 :])))
        parts = {table.names[row].split(".")[place] for row in rows}
        numbers = sorted(int(part) for part in parts if part.isdecimal())
        if numbers:
            gaps = "" if len(numbers) == numbers[-1] - numbers[0] + 1 else ", with gaps"
            are = (
                f"numbers are {numbers[0]} to {numbers[-1]}{gaps}"
                if len(numbers) > 1
                else f"only number is {numbers[0]}"
            )
            return f"in the place of `{_text(Glob((component,)))}`, the {are}"
    return None


def _meant(glob: Glob) -> Iterator[tuple[str, Glob]]:
    """Wider globs that a too narrow one may mean, likeliest first, with the reason to show."""
    components = glob.components
    starts, ends = components[0] == ANY_DEPTH, components[-1] == ANY_DEPTH
    if not ends:
        yield "it names a module, with {} below it", Glob((*components, ANY_DEPTH))
    if not starts:
        yield "a glob matches whole names; this is only the end of {}", Glob((ANY_DEPTH, *components))
    if not starts and not ends:
        yield (
            "a glob matches whole names; this is only a part of {}",
            Glob((ANY_DEPTH, *components, ANY_DEPTH)),
        )
    if (Wild.CHARACTERS,) in components:
        deeper = tuple(ANY_DEPTH if component == (Wild.CHARACTERS,) else component for component in components)
        yield "`*` is exactly one component; with `**`, {} would match", Glob(deeper)


def _unknown(glob: Glob, vocabulary: Collection[str]) -> list[str]:
    literals = (c[0] for c in glob.components if len(c) == 1)
    return [piece for piece in literals if isinstance(piece, str) and piece not in vocabulary]


def _corrected(glob: Glob, vocabulary: Collection[str]) -> Glob | None:
    """Glob with each unknown component replaced by the nearest known one."""
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


def _nearest_names(table: Candidates, name: str) -> tuple[str, str | None]:
    # Skip the comparison for absurdly long names, because it is quadratic in the length.
    near = nearest(name, _spellings(table), count=3) if len(name) <= 1_000 else []
    if not near:
        return _range_of_names(table), None
    return f"the nearest names are {', '.join(repr(shorten(n)) for n in near)}", None


def _spellings(table: Candidates) -> list[str]:
    """Names and aliases; selectors accept both."""
    return [*table.names, *(alias for _, alias in table.reading.aliases)]


def _range_of_names(table: Candidates) -> str:
    """First components of the names."""
    firsts = Counter(name.partition(".")[0] for name in table.names)
    return f"the names start with {_some(firsts)}"


FEW = 4
"""Minimum factor between the matches of `**` and of `*` for a remark."""


def narrow(table: Candidates, node: Node) -> str | None:
    """Remark about a `*` that matches few parameters where `**` would match many more, or None."""
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
    return f"`{_text(node)}` matches {few:,} of the {many:,} parameters that `{_text(deeper)}` matches"


def suggestion(table: Candidates, node: Node) -> str:
    """One-line reason or suggestion for a term without matches."""
    if any(not table.hits(child) for child in children(node)):
        return "a part of it matches nothing"
    exists, hint = why(table, node)
    return hint or exists
