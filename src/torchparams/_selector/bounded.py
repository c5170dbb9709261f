"""Regular expressions with bounded matching time.

Python's `re` backtracks, cannot be interrupted, and needs exponential time for `(a+)+$`. This module first counts the
choices that a pattern can make on a text of some length. If there are few, `re` does the matching. If there are many,
the pattern becomes a nondeterministic automaton that reads each character once for all choices together (Thompson 1968,
doi:10.1145/363347.363387): linear in the text for every pattern.

The pattern is parsed by `re`'s own parser, so both ways agree on its meaning.
"""

from __future__ import annotations

import re
from importlib import import_module
from math import inf, log
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams import limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

_parser: Any = import_module("re._parser")

_CACHE = 4096  # cached lengths, and cached steps of an automaton
_TOGETHER = 256  # texts, or characters for an automaton, between two checks of the clock


SIMPLER = "avoid repeating a part that contains repeats or alternatives"
"""Hint for slow patterns."""


class TooSlow(Exception):
    """A pattern exceeds the limits on a text, or runs out of time."""


class _NoAutomatonError(Exception):
    """A pattern cannot be compiled to an automaton."""


class Bounded:
    r"""A regular expression with bounded matching time.

    Args:
        pattern: Regular expression in the syntax of `re`.
        steps: Maximum steps of `re` per text; `limits.REGEX_STEPS` by default.

    Raises:
        re.error: The pattern is not a regular expression. `ValueError`, `OverflowError` and `RecursionError` as in
        `re.compile`.

    >>> Bounded(r"(a+)+$").matches("a" * 5000 + "b")
    False
    >>> Bounded(r"(\w+\.)*weight").matches("layers.0.weight")
    True
    """

    def __init__(self, pattern: str, steps: int | None = None) -> None:
        self.compiled = re.compile(pattern)
        self._tree = _parser.parse(pattern)
        self._steps = steps
        self._known: dict[tuple[int, bool], float] = {}  # length of texts, anywhere → maximum steps of `re`
        self._automaton: _Automaton | None = None

    def matches(self, text: str) -> bool:
        """Whether the pattern matches the whole text.

        Raises:
            TooSlow: The pattern has too many choices on such a text, and cannot be compiled to an automaton.
        """
        return self._is_in(text, anywhere=False)

    def occurs(self, text: str) -> bool:
        """Whether the pattern matches somewhere in the text.

        Raises:
            TooSlow: As in `matches`.
        """
        return self._is_in(text, anywhere=True)

    def which(self, texts: Sequence[str]) -> list[int]:
        """Indices of the texts that the pattern matches as a whole.

        Raises:
            TooSlow: As in `matches`; or all texts together take longer than `limits.REGEX_SECONDS`.
        """
        return self._among(texts, anywhere=False)

    def count(self, texts: Sequence[str]) -> int:
        """Number of texts with a match anywhere.

        Raises:
            TooSlow: As in `which`.
        """
        return len(self._among(texts, anywhere=True))

    def replace(self, texts: Sequence[str], replacement: str) -> list[tuple[str, int]]:
        """Replace all matches in each text; returns the new texts with the number of matches, as `re.subn`.

        Raises:
            TooSlow: The pattern has too many choices on a text (an automaton cannot replace), or takes too long.
        """
        found: list[tuple[str, int]] = []
        deadline = Deadline()
        for i, text in enumerate(texts):
            if i % _TOGETHER == 0 or not self._is_safe_up_to(len(text), anywhere=True, times=_TOGETHER):
                deadline.check()
            self._check(text, anywhere=True)
            found.append(self.compiled.subn(replacement, text))
        return found

    def _among(self, texts: Sequence[str], *, anywhere: bool) -> list[int]:
        fast = self.compiled.search if anywhere else self.compiled.fullmatch
        found: list[int] = []
        deadline = Deadline()
        for start in range(0, len(texts), _TOGETHER):
            deadline.check()
            some = texts[start : start + _TOGETHER]
            if self._is_safe_up_to(max(map(len, some)), anywhere, times=len(some)):
                found += [i for i, text in enumerate(some, start) if fast(text)]
                continue
            for i, text in enumerate(some, start):
                deadline.check()
                if self._is_in(text, anywhere):
                    found.append(i)
        return found

    def _is_in(self, text: str, anywhere: bool) -> bool:
        if not self._is_safe_up_to(len(text), anywhere):
            try:
                if self._automaton is None:
                    self._automaton = _Automaton(self._tree)
                return self._automaton.accepts(text, anywhere=anywhere)
            except _NoAutomatonError:
                self._check(text, anywhere)
        found = self.compiled.search(text) if anywhere else self.compiled.fullmatch(text)
        return found is not None

    def _check(self, text: str, anywhere: bool) -> None:
        """Raise if `re` could take too many steps on a text."""
        if not self._is_safe_up_to(len(text), anywhere) and self._steps_on(text, anywhere) > self._most:
            raise TooSlow(f"could take too long on a name of {len(text):,} characters")

    def _is_safe_up_to(self, length: int, anywhere: bool, times: int = 1) -> bool:
        """Whether `re` takes few steps on any text up to a length, `times` times."""
        if (length, anywhere) not in self._known:
            if len(self._known) >= _CACHE:
                self._known.clear()
            self._known[length, anywhere] = self._steps_on(length, anywhere)
        return self._known[length, anywhere] * times <= self._most

    def _steps_on(self, text: str | int, anywhere: bool) -> float:
        length = text if isinstance(text, int) else len(text)
        choices, inner = _Choices(text).of(self._tree, self._tree.state.flags)
        begins = length + 1 if anywhere and not self._is_anchored else 1
        return choices * inner * (length + len(self.compiled.pattern) + 1) * begins

    @property
    def _most(self) -> int:
        return limits.REGEX_STEPS if self._steps is None else self._steps

    @property
    def _is_anchored(self) -> bool:
        op, value = self._tree[0] if len(self._tree) else ("", "")
        return str(op) == "AT" and _at(str(value), self._tree.state.flags) == "AT_BEGINNING_STRING"


class Deadline:
    """Time limit of a pattern on many texts together: `limits.REGEX_SECONDS` from now."""

    def __init__(self) -> None:
        self._end = monotonic() + limits.REGEX_SECONDS

    def check(self) -> None:
        """Raise if the time is over.

        Raises:
            TooSlow: The time is over.
        """
        if monotonic() >= self._end:
            raise TooSlow(f"took more than {limits.REGEX_SECONDS:g} seconds")


# --- counting choices ------------------------------------------------------------------------------


class _Choices:
    """Counts the sequences of choices that `re` can make.

    Args:
        text: The text, or the maximum length of a text.
    """

    def __init__(self, text: str | int) -> None:
        self._text = text
        self._length = text if isinstance(text, int) else len(text)

    def of(self, tree: Sequence[Any], flags: int, after: str | None = None) -> tuple[float, float]:
        """Maximum number of choice sequences, and the factor for lookaround in each step.

        Args:
            tree: Parts of a pattern.
            flags: Active flags.
            after: The next character, if known.
        """
        total, inner = 1.0, 1.0
        for op, value in reversed(tree):
            more, aside = self._one(str(op), value, flags, after)
            total, inner = total * more, max(inner, aside)
            after = chr(value) if str(op) == "LITERAL" and not flags & re.IGNORECASE else None
        return total, inner

    def _one(self, op: str, value: Any, flags: int, after: str | None) -> tuple[float, float]:
        if op == "BRANCH":
            return _either(self.of(branch, flags, after) for branch in value[1])
        if op == "SUBPATTERN":
            return self.of(value[3], (flags | value[1]) & ~value[2], after)
        if op in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            more, aside = self._repeat(value[0], value[1], value[2], flags, after)
            # A possessive repeat is not re-entered, like lookaround.
            return (1.0, max(aside, more)) if op == "POSSESSIVE_REPEAT" else (more, aside)
        if op in ("ASSERT", "ASSERT_NOT", "ATOMIC_GROUP"):
            more, aside = self.of(value if op == "ATOMIC_GROUP" else value[1], flags)
            return 1.0, more * aside * (self._length + 1)
        if op == "GROUPREF_EXISTS":
            more, aside = _either(self.of(branch, flags) for branch in value[1:] if branch is not None)
            return more + 1, aside
        return 1.0, self._length + 1.0 if op == "GROUPREF" else 1.0

    def _repeat(self, least: int, most: int, body: Any, flags: int, after: str | None) -> tuple[float, float]:
        more, aside = self.of(body, flags)
        most = max(min(most, self._length + 1), least)
        counts = most - least + 1
        if more > 1:
            return (inf if most * log(more) > 60 else more**most * counts), aside
        if after is not None and isinstance(self._text, str) and len(body) == 1 and str(body[0][0]) in _SINGLE:
            # The repeat can only end before that character.
            counts = min(counts, max(self._text.count(after), 1))
        return float(counts), aside


_SINGLE = ("LITERAL", "NOT_LITERAL", "ANY", "IN")  # parts that match one character


def _either(found: Iterable[tuple[float, float]]) -> tuple[float, float]:
    branches = list(found)
    return sum(more for more, _ in branches), max(aside for _, aside in branches)


# --- the automaton -----------------------------------------------------------------------------------


class _State(NamedTuple):
    """State that consumes a character, asserts a position, or has empty transitions."""

    takes: Callable[[str], bool] | None
    at: str
    to: list[int]


_MATCH = 0
_FOUND, _ANYWHERE = -1, -2  # a part has matched; a match may start at any character


class _Set(dict[Any, "_Set"]):
    """Set of simultaneous states; maps a character, or a character with its position, to the next set."""

    def __init__(self, states: frozenset[int]) -> None:
        super().__init__()
        self.states = states


class _Automaton:
    """States of a pattern, built from its end.

    Raises:
        _NoAutomatonError: The pattern has unsupported parts, or is too large.
    """

    def __init__(self, tree: Any) -> None:
        self._states = [_State(None, "", [])]
        self._start = self._sequence(tree, _MATCH, tree.state.flags)
        self._anchored = any(state.at for state in self._states)
        self._sets: dict[frozenset[int], _Set] = {}

    def _add(self, takes: Callable[[str], bool] | None, at: str, to: list[int]) -> int:
        if len(self._states) >= limits.REGEX_STATES:
            raise _NoAutomatonError
        self._states.append(_State(takes, at, to))
        return len(self._states) - 1

    def _sequence(self, items: Sequence[Any], to: int, flags: int) -> int:
        for i in range(len(items) - 1, -1, -1):
            op, value = items[i]
            to = self._one(str(op), value, to, flags)
        return to

    def _one(self, op: str, value: Any, to: int, flags: int) -> int:
        if op == "BRANCH":
            return self._add(None, "", [self._sequence(branch, to, flags) for branch in value[1]])
        if op == "SUBPATTERN":
            _, more, fewer, body = value
            return self._sequence(body, to, (flags | more) & ~fewer)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, body = value
            return self._repeat(least, most, body, to, flags)
        if op == "AT":
            return self._add(None, _at(str(value), flags), [to])
        takes = _takes(op, value, flags)
        if takes is None:
            raise _NoAutomatonError  # backreference, lookaround, or case-insensitive character
        return self._add(takes, "", [to])

    def _repeat(self, least: int, most: int, body: Any, to: int, flags: int) -> int:
        if most == int(_parser.MAXREPEAT):
            ends = [to]
            to = self._add(None, "", ends)
            ends.append(self._sequence(body, to, flags))
        else:
            end = to
            for _ in range(most - least):
                to = self._add(None, "", [self._sequence(body, to, flags), end])
        for _ in range(least):
            before = len(self._states)
            to = self._sequence(body, to, flags)
            if len(self._states) == before:
                break  # an empty body
        return to

    def accepts(self, text: str, *, anywhere: bool) -> bool:
        """Whether the pattern matches the whole text, or with `anywhere` a part of it.

        Raises:
            TooSlow: The time limit is exceeded.
        """
        here = self._set_of(frozenset([self._start, _ANYWHERE]) if anywhere else frozenset([self._start]))
        deadline = Deadline()
        for start in range(0, len(text), _TOGETHER):
            deadline.check()
            some = text[start : start + _TOGETHER]
            signs = zip(some, _positions(text, start, len(some)), strict=True) if self._anchored else some
            for sign in signs:
                after = here.get(sign)
                here = after if after is not None else self._step(here, sign)
            if not here.states or _FOUND in here.states:
                break
        if _FOUND in here.states:
            return True
        return _MATCH in self._reached(here.states, _position(text, len(text)) if self._anchored else ())

    def _step(self, here: _Set, sign: Any) -> _Set:
        """Next set of states after a character, cached."""
        char, position = sign if self._anchored else (sign, ())
        if _FOUND in here.states:
            states = here.states
        else:
            reached = self._reached(here.states, position)
            after = {
                state.to[0]
                for state in map(self._states.__getitem__, reached)
                if state.takes is not None and state.takes(char)
            }
            if _ANYWHERE in here.states:
                after = {_FOUND} if _MATCH in reached else after | {self._start, _ANYWHERE}
            states = frozenset(after)
        found = here[sign] = self._set_of(states)
        return found

    def _set_of(self, states: frozenset[int]) -> _Set:
        known = self._sets.get(states)
        if known is None:
            if len(self._sets) >= _CACHE:
                for other in self._sets.values():
                    other.clear()
                self._sets.clear()
            known = self._sets[states] = _Set(states)
        return known

    def _reached(self, states: frozenset[int], position: tuple[bool, ...]) -> set[int]:
        """States that are reachable without consuming a character."""
        found: set[int] = set()
        rest = [state for state in states if state >= 0]
        while rest:
            state = rest.pop()
            if state in found:
                continue
            found.add(state)
            takes, at, to = self._states[state]
            if takes is None and (not at or position[_POSITIONS.index(at)]):
                rest.extend(to)
        return found


_POSITIONS = (
    "AT_BEGINNING_STRING",
    "AT_BEGINNING_LINE",
    "AT_END_STRING",
    "AT_END_LINE",
    "AT_END",
    "AT_BOUNDARY",
    "AT_NON_BOUNDARY",
    "ascii AT_BOUNDARY",
    "ascii AT_NON_BOUNDARY",
)


_NONE_IN_EMPTY = re.fullmatch(r"\B", "") is not None  # changed in Python 3.14


def _at(name: str, flags: int) -> str:
    if name == "AT_BEGINNING":
        return "AT_BEGINNING_LINE" if flags & re.MULTILINE else "AT_BEGINNING_STRING"
    if name == "AT_END" and flags & re.MULTILINE:
        return "AT_END_LINE"
    return f"ascii {name}" if name.endswith("BOUNDARY") and flags & re.ASCII else name


def _positions(text: str, start: int, count: int) -> Iterator[tuple[bool, ...]]:
    return (_position(text, i) for i in range(start, start + count))


def _position(text: str, i: int) -> tuple[bool, ...]:
    """Truth of each of `_POSITIONS` at an index of a text."""
    before, after = text[i - 1 : i] if i else "", text[i : i + 1]
    edge = _word(before) != _word(after)
    ascii_edge = (before.isascii() and _word(before)) != (after.isascii() and _word(after))
    is_not = bool(text) or _NONE_IN_EMPTY
    return (
        i == 0,
        i == 0 or before == "\n",
        not after,
        not after or after == "\n",
        not after or (after == "\n" and i == len(text) - 1),
        edge,
        not edge and is_not,
        ascii_edge,
        not ascii_edge and is_not,
    )


def _word(char: str) -> bool:
    return char.isalnum() or char == "_"


_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal,
    "SPACE": str.isspace,
    "WORD": _word,
}
_ASCII_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": lambda char: char in "0123456789",
    "SPACE": lambda char: char in " \t\n\r\f\v",
    "WORD": lambda char: char.isascii() and _word(char),
}


def _takes(op: str, value: Any, flags: int) -> Callable[[str], bool] | None:
    """Predicate for one character; None if the part is not a single character, or ignores case."""
    if op == "ANY":
        return (lambda char: True) if flags & re.DOTALL else (lambda char: char != "\n")
    if flags & re.IGNORECASE:
        return None
    if op == "LITERAL":
        return chr(value).__eq__
    if op == "NOT_LITERAL":
        return chr(value).__ne__
    if op != "IN":
        return None
    tests = list(_tests(value, flags))
    if str(value[0][0]) == "NEGATE":
        return lambda char: not any(test(char) for test in tests)
    return lambda char: any(test(char) for test in tests)


def _tests(items: Any, flags: int) -> Iterator[Callable[[str], bool]]:
    for op, value in items:
        kind = str(op)
        if kind == "LITERAL":
            yield chr(value).__eq__
        elif kind == "RANGE":
            yield _between(*value)
        elif kind == "CATEGORY":
            yield _category(str(value).removeprefix("CATEGORY_"), flags)


def _between(first: int, last: int) -> Callable[[str], bool]:
    return lambda char: first <= ord(char) <= last


def _category(name: str, flags: int) -> Callable[[str], bool]:
    test = (_ASCII_CATEGORIES if flags & re.ASCII else _CATEGORIES)[name.removeprefix("NOT_")]
    return (lambda char: not test(char)) if name.startswith("NOT_") else test
