"""Proposals: the rename that matches two sets of parameters best, and the best match of each name."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchparams.names import WRAPPERS, strip_wrappers
from torchparams.renames import Renames, renamed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torchparams.info import ParameterInfo

    Infos = Mapping[str, ParameterInfo]

_DEEPEST = 8
"""Maximum number of components of a prefix, or of a common ending."""

_WRAPPER_COMPONENTS = frozenset(component for _, _, component in WRAPPERS)
_LAYER_COMPONENTS = _WRAPPER_COMPONENTS | {"base_layer"}  # PEFT's name for a layer with an adapter


def propose(have: Infos, want: Infos) -> Renames | None:
    """Propose the rename of `have` that matches most names and shapes in `want`.

    Candidates are the components of wrappers (see `torchparams.names`) and PEFT's `base_layer`, anywhere in the names
    of either side; the old and new names of weight norm and spectral norm; a prefix of either side, such as `model.`;
    and combinations. Linear in the number of names.

    Args:
        have: Infos of one side, by name.
        want: Infos of the other side, by name.

    Returns:
        A rename without collisions that only contains names with a match; its text describes it. None if no rename is
        better than none.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> a = tp.of({"model.w": np.zeros(3), "model.b": np.zeros(1), "epoch": np.zeros(())})
    >>> b = tp.of({"w": np.zeros(3), "b": np.zeros(1)})
    >>> print(propose(a.infos, b.infos))
    strip 'model.' from 2 of 3 names
    """
    best, most = None, _meeting(have, want, {})
    if most == min(len(have), len(want)):
        return None
    for read, said in _READINGS:
        ours = {name: read(name) for name in have}
        theirs = {read(name): name for name in want}
        if len(set(ours.values())) != len(ours) or len(theirs) != len(want):
            continue  # names would collide
        words = said(have, want)
        if read is not str and not words:
            continue
        for prefix_words, names in _by_prefix(have, want, ours, theirs):
            found = _meeting(have, want, names)
            if found > most:  # on a tie, the first and simpler one wins
                most = found
                text = ", ".join([*words, *prefix_words])
                preposition = {"add": "to", "respell": "in"}.get(text.partition(" ")[0], "from")
                count = f"{len(have):,} name{'' if len(have) == 1 else 's'}"
                best = renamed(names, f"{text} {preposition} {len(names):,} of {count}")
    return best


def _meeting(have: Infos, want: Infos, names: Mapping[str, str]) -> int:
    """Number of names in `have` that match a name and shape in `want`."""
    met = 0
    for name, info in have.items():
        other = want.get(names.get(name, name))
        met += other is not None and other.shape == info.shape
    return met


def _strip_everywhere(name: str) -> str:
    return _without(name, _WRAPPER_COMPONENTS)


def _strip_layers(name: str) -> str:
    return _without(name, _LAYER_COMPONENTS)


def _without(name: str, components: frozenset[str]) -> str:
    *path, last = name.split(".")
    return ".".join([*(component for component in path if component not in components), last])


_PARAMETRIZED = re.compile(r"(?P<path>(?:.*\.)?)parametrizations\.(?P<name>[^.]+)\.original(?P<which>[01]?)")
_SUFFIX = {"0": "_g", "1": "_v", "": "_orig"}


def _older(name: str) -> str:
    """Old name of a parametrised tensor, before PyTorch 2: `weight_g`, `weight_v`, `weight_orig`."""
    found = _PARAMETRIZED.fullmatch(name)
    return f"{found['path']}{found['name']}{_SUFFIX[found['which']]}" if found else name


def _no_words(have: Infos, want: Infos) -> list[str]:
    return []


def _older_words(have: Infos, want: Infos) -> list[str]:
    there = any(_PARAMETRIZED.fullmatch(name) for names in (have, want) for name in names)
    return ["respell parametrizations"] if there else []


def _layer_words(have: Infos, want: Infos) -> list[str]:
    return _component_words(have, want, _LAYER_COMPONENTS)


def _wrapper_words(have: Infos, want: Infos) -> list[str]:
    return _component_words(have, want, _WRAPPER_COMPONENTS)


def _component_words(have: Infos, want: Infos, known: frozenset[str]) -> list[str]:
    """Description of the change from the components of one side to those of the other."""
    found = []
    for verb, names in (("strip", have), ("add", want)):
        components = {c for name in names for c in name.split(".")[:-1] if c in known}
        if components:
            found.append(verb + " " + " and ".join(repr(c + ".") for c in sorted(components)))
    return found


_READINGS: tuple[tuple[Callable[[str], str], Callable[[Infos, Infos], list[str]]], ...] = (
    (str, _no_words),
    (strip_wrappers, _wrapper_words),
    (_strip_everywhere, _wrapper_words),
    (_strip_layers, _layer_words),
    (_older, _older_words),
)
"""Ways to normalise names of both sides, simplest first, each with its description."""


def _by_prefix(
    have: Infos, want: Infos, ours: Mapping[str, str], theirs: Mapping[str, str]
) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Candidate prefix changes, starting with none: description, and changed names.

    `ours` maps names of `have` to normalised names; `theirs` maps normalised names to names of `want`.
    """
    yield [], _meet(ours, theirs, ours)
    back = {new: old for old, new in ours.items()}
    strips: Counter[str] = Counter()
    adds: Counter[str] = Counter()
    for name, old in back.items():
        for prefix, rest in _splits(name):
            if rest in theirs and want[theirs[rest]].shape == have[old].shape:
                strips[prefix] += 1
    for name, full in theirs.items():
        for prefix, rest in _splits(name):
            if rest in back and have[back[rest]].shape == want[full].shape:
                adds[prefix] += 1
    for verb, votes in (("strip", strips), ("add", adds)):
        if not votes:
            continue
        # In repetitive networks, a longer prefix may match as many names.
        prefix = min(votes, key=lambda prefix: (-votes[prefix], len(prefix)))
        words = [f"{verb} {prefix!r}"]
        change = {
            old: name.removeprefix(prefix) if verb == "strip" else prefix + name
            for old, name in ours.items()
            if verb == "add" or name.startswith(prefix)
        }
        yield words, _meet(ours, theirs, change)
        everywhere = {old: theirs[new] for old, new in change.items() if new in theirs}
        after = [everywhere.get(old, old) for old in ours]
        if len(set(after)) == len(after):
            yield words, {old: new for old, new in everywhere.items() if old != new}


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Split a name at each of its first dots; the dot stays with the prefix."""
    at = 0
    for _ in range(_DEEPEST):
        at = name.find(".", at) + 1
        if not at:
            return
        yield name[:at], name[at:]


def _meet(ours: Mapping[str, str], theirs: Mapping[str, str], change: Mapping[str, str]) -> dict[str, str]:
    """Names to change so that they match, applying `change` only to names without a match."""
    names = {old: theirs[new] for old, new in ours.items() if new in theirs}
    taken = {names.get(old, old) for old in ours}
    for old, new in change.items():
        target = theirs.get(new)
        if old not in names and target is not None and target not in taken:
            taken.add(target)
            names[old] = target
    return {old: new for old, new in names.items() if old != new}


# --- best match -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Match:
    """Two names that are taken for the same parameter, with the reason."""

    have: str
    want: str
    reason: str


_ROLES = {
    "weight": ("weight", "gamma", "scale", "kernel"),
    "bias": ("bias", "beta", "offset", "shift"),
    "running_mean": ("running_mean", "moving_mean"),
    "running_var": ("running_var", "moving_variance", "moving_var"),
    "num_batches_tracked": ("num_batches_tracked",),
}
"""Names of a layer's tensors in torch, with their names in other libraries."""

_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}


def distinct(a: str, b: str) -> bool:
    """Whether two names cannot mean the same parameter, such as a weight and a bias.

    A bias and a running mean may be the only ones left of the same shape.

    >>> distinct("norm.gamma", "ln.bias"), distinct("norm.gamma", "ln.weight"), distinct("norm.gamma", "ln.table")
    (True, False, False)
    """
    ours, theirs = (_ROLE_OF.get(name.rpartition(".")[2]) for name in (a, b))
    return ours is not None and theirs is not None and ours != theirs


def _may_be_transposed(a: str, b: str, have: Infos) -> bool:
    """Whether only one name is `kernel`, as in libraries with transposed weights, and the shape does not decide."""
    if (a.rpartition(".")[2] == "kernel") == (b.rpartition(".")[2] == "kernel"):
        return False
    shape = have[a].shape or ()
    return len(shape) >= 2 and shape == shape[::-1]


def best_match(have: Infos, want: Infos) -> list[Match]:
    """Match the names of two sides by shape, ending and number.

    Names that differ only in numbers, such as one matrix in every layer, form a series. A series of `have` matches one
    of `want` with the same shape and length if no other has the same ending; longer common endings come first. At last,
    two series match if they are the only ones left. Other libraries' names count as torch's: `gamma` as `weight`,
    `beta` as `bias`. Within a series, names match in the order of their numbers. Ambiguous names are not matched, nor
    is a square `kernel` with a `weight`, which may be its transpose. Linear in the number of names.

    Args:
        have: Infos of one side without a match so far.
        want: Infos of the other side.

    Returns:
        Pairs in the order of `have`; each name occurs at most once.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> a = tp.of({"fc.gamma": np.zeros(3), "0.kernel": np.zeros((2, 3)), "1.kernel": np.zeros((2, 3))})
    >>> b = tp.of({"out.weight": np.zeros(3), "h.0.weight": np.zeros((2, 3)), "h.1.weight": np.zeros((2, 3))})
    >>> for match in best_match(a.infos, b.infos):
    ...     print(match.have, "→", match.want, "because", match.reason)
    fc.gamma → out.weight because they are the only ones left of shape [3] and ending in 'weight'
    0.kernel → h.0.weight because their series are the only ones left of shape [2, 3] and ending in '#.weight'
    1.kernel → h.1.weight because their series are the only ones left of shape [2, 3] and ending in '#.weight'
    """
    ours, theirs = _series(have), _series(want)
    found: dict[str, Match] = {}
    for kind in ours.keys() & theirs.keys():
        shape, length = kind
        left, right = ours[kind], theirs[kind]
        for depth in range(_DEEPEST, -1, -1):
            for ending, (mine, yours) in _alone(left, right, depth).items():
                if distinct(mine[-1], yours[-1]):
                    continue
                a, b = left[mine][0], right[yours][0]
                if _may_be_transposed(a, b, have):
                    continue
                what = "they are" if length == 1 else "their series are"
                how = f" and ending in {'.'.join(ending)!r}" if depth else ""
                reason = f"{what} the only ones left of shape {shape}{how}"
                for a, b in zip(left.pop(mine), right.pop(yours), strict=True):
                    found[a] = Match(a, b, reason)
    return [found[name] for name in have if name in found]


Template = tuple[str, ...]


def _series(infos: Infos) -> dict[tuple[str, int], dict[Template, list[str]]]:
    """Names that differ only in numbers, sorted by these; grouped by shape and count, then by their common template."""
    # Shapes as text: a hostile file could choose numbers whose hashes collide.
    by: dict[tuple[str, Template], list[tuple[list[tuple[int, str]], str]]] = defaultdict(list)
    for name, info in infos.items():
        if info.shape is None:
            continue
        parts = name.split(".")
        template = tuple("#" if part.isdecimal() else part for part in parts)
        digits = [part.lstrip("0") for part in parts if part.isdecimal()]  # of any length; int() has a limit
        by[str(list(info.shape)), template].append(([(len(each), each) for each in digits], name))
    found: dict[tuple[str, int], dict[Template, list[str]]] = defaultdict(dict)
    for (shape, template), names in by.items():
        found[shape, len(names)][template] = [name for _, name in sorted(names)]
    return found


def _alone(
    left: Mapping[Template, object], right: Mapping[Template, object], depth: int
) -> dict[Template, tuple[Template, Template]]:
    """Endings of `depth` components that exactly one series of each side has."""
    endings: list[dict[Template, list[Template]]] = []
    for side in (left, right):
        by: dict[Template, list[Template]] = defaultdict(list)
        for template in side:
            *path, last = template[max(len(template) - depth, 0) :] or ("",)
            by[(*path, _ROLE_OF.get(last, last))].append(template)
        endings.append(by)
    ours, theirs = endings
    return {e: (ours[e][0], theirs[e][0]) for e in ours if len(ours[e]) == 1 and len(theirs.get(e, ())) == 1}
