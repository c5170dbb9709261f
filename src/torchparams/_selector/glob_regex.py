"""Compile globs to regular expressions, for fast matching.

The expressions never backtrack into a choice that cannot have been wrong, so matching is linear in the name. If braces
would make an expression too long, `glob_match.matches`, which defines the meaning of globs, is used instead.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING

from torchparams._selector.glob_match import matches
from torchparams._selector.globs import ANY_DEPTH, Alternatives, Glob, Piece, Range, Sequence, Wild, merged

if TYPE_CHECKING:
    from collections.abc import Callable

EXPANSIONS = 256
"""Maximum number of sequences that the braces of one component may expand to."""


@lru_cache(maxsize=1024)
def matcher(glob: Glob) -> Callable[[str], object]:
    """Function from a name to a true value if `glob` matches the whole name."""
    assert not glob.from_end  # such globs depend on the other names
    try:
        pattern = to_regex(glob)
    except _TooManyError:
        return lambda name: matches(glob, name)
    return re.compile(pattern).fullmatch


class _TooManyError(Exception):
    """The braces of a component would expand to more than `EXPANSIONS` sequences."""


def to_regex(glob: Glob) -> str:
    """Regular expression for `fullmatch` that is equivalent to `glob`, and linear in the name.

    Between two `**`, components are matched at the first position that fits: their number is fixed, so a later position
    only leaves less of the name for the rest. The same holds for text between two `*` in a component if its length is
    fixed. Both are therefore atomic groups, `(?>…)`, without backtracking.
    """
    segments: list[list[str]] = [[]]
    for component in glob.components:
        if component != ANY_DEPTH:
            segments[-1].append(_component_regex(component))
        elif segments[-1] or len(segments) == 1:
            segments.append([])
    # segments[0] is the part before the first `**`, and segments[-1] the part after the last.
    head, *middle = segments
    if not middle:
        return r"\.".join(head)
    *middle, tail = middle
    pattern = ""
    ends = [r"\."] * (1 + len(middle))
    if not tail:
        ends[-1] = r"(?:\.|\Z)"  # a trailing `**` may match no component
    if head:
        pattern += r"\.".join(head) + ends[0]
    elif not middle and not tail:
        return r"(?s:.*)"
    for segment, end in zip(middle, ends[1:], strict=True):
        pattern += rf"(?>(?:[^.]*+\.)*?{_DOT.join(segment)}{end})"
    if not tail:
        return pattern + r"(?s:.*)"
    if len(tail) == 1:
        return pattern + r"(?>(?:[^.]*+\.)*)" + tail[0]
    return pattern + r"(?:[^.]*+\.)*" + _DOT.join(tail)


_DOT = r"\."


def _component_regex(component: Sequence) -> str:
    sequences = _expanded(component)
    if len(sequences) == 1:
        (sequence,) = sequences
        if all(isinstance(piece, str) for piece in sequence):
            return "".join(re.escape(str(piece)) for piece in sequence)
        if sequence == (Wild.CHARACTERS,):
            return r"[^.]*+"
    return rf"(?>(?:{'|'.join(map(_sequence_regex, sequences))})(?=\.|\Z))"


def _sequence_regex(sequence: Sequence) -> str:
    chunks: list[list[Piece]] = [[]]
    for piece in sequence:
        if piece is Wild.CHARACTERS:
            chunks.append([])
        else:
            chunks[-1].append(piece)
    first, *rest = [_chunk_regex(tuple(chunk)) for chunk in chunks]
    if not rest:
        return first
    *inner, last = rest
    return first + "".join(f"(?>[^.]*?{chunk})" for chunk in inner) + (f"[^.]*{last}" if last else "[^.]*+")


def _chunk_regex(chunk: Sequence) -> str:
    return "".join(map(_piece_regex, chunk))


def _piece_regex(piece: Piece) -> str:
    if isinstance(piece, str):
        return re.escape(piece)
    if isinstance(piece, Range):
        numbers = "|".join(_numbers_regex(piece.of_width(width), width) for width in piece.widths)
        # Where no digit can follow, all digits are consumed: a single way to match, as with fixed length.
        return f"(?>(?:{numbers})(?![0-9]))" if len(piece.widths) > 1 else f"(?>{numbers})"
    if isinstance(piece, Alternatives):
        return f"(?>{'|'.join(map(_chunk_regex, piece.items))})"
    return "[^.]"


def _numbers_regex(piece: Range, width: int) -> str:
    return _between(str(piece.first).zfill(width), str(piece.last).zfill(width))


def _between(first: str, last: str) -> str:
    """Regular expression for the digit strings from `first` to `last`, which have equal length."""
    if not first:
        return ""
    rest = len(first) - 1
    if first[0] == last[0]:
        return first[0] + _between(first[1:], last[1:])
    low, high = int(first[0]), int(last[0])
    options = []
    if first[1:].strip("0"):
        options.append(first[0] + _between(first[1:], "9" * rest))
        low += 1
    if last[1:].strip("9"):
        options.append(last[0] + _between("0" * rest, last[1:]))
        high -= 1
    if low <= high:
        options.append(f"[{low}-{high}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"


def _expanded(component: Sequence) -> list[Sequence]:
    """Sequences equivalent to the component, in which all remaining braces have a fixed length."""
    expanded: list[Sequence] = []
    for written_out in _alternatives_expanded(component):
        choices: list[list[Piece]] = []
        for i, piece in enumerate(written_out):
            following = written_out[i + 1 : i + 2]
            if isinstance(piece, Range) and len(piece.widths) > 1 and not _ends_digits(following):
                choices.append([piece.of_width(width) for width in piece.widths])
            else:
                choices.append([piece])
        if len(expanded) + prod(map(len, choices)) > EXPANSIONS:
            raise _TooManyError
        expanded += [merged(list(choice)) for choice in product(*choices)]
    return expanded


def _alternatives_expanded(sequence: Sequence) -> list[Sequence]:
    choices: list[list[Sequence]] = []
    for piece in sequence:
        if isinstance(piece, Alternatives) and _length(piece) is None:
            choices.append([written for item in piece.items for written in _alternatives_expanded(item)])
        else:
            choices.append([(piece,)])
    if prod(map(len, choices)) > EXPANSIONS:
        raise _TooManyError
    return [merged([piece for part in choice for piece in part]) for choice in product(*choices)]


def _ends_digits(following: Sequence) -> bool:
    """Whether the part after a number cannot start with a digit."""
    return not following or (isinstance(following[0], str) and following[0][0] not in "0123456789")


def _length(piece: Piece) -> int | None:
    """Number of characters that a piece matches, if fixed; otherwise None."""
    if isinstance(piece, str):
        return len(piece)
    if isinstance(piece, Range):
        return piece.widths[0] if len(piece.widths) == 1 else None
    if isinstance(piece, Alternatives):
        lengths = {_sequence_length(item) for item in piece.items}
        return lengths.pop() if len(lengths) == 1 else None
    return 1 if piece is Wild.CHARACTER else None


def _sequence_length(sequence: Sequence) -> int | None:
    total = 0
    for piece in sequence:
        length = _length(piece)
        if length is None:
            return None
        total += length
    return total
