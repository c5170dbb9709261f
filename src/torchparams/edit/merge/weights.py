"""Parse weights of a merge: one for all tensors, one per source, or by selector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torchparams.errors import OptionError, shorten
from torchparams.render.tree import plural

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchparams.info import ParameterInfo

    Numbers = tuple[float, ...]


def per_tensor(
    spec: object,
    infos: Mapping[str, ParameterInfo],
    count: int,
    *,
    one: Callable[[float], Numbers],
    default: Numbers,
    what: str,
    where: str | None = None,
    strict: bool = True,
) -> dict[str, Numbers]:
    """Weights of each tensor, one per source.

    Args:
        spec: None for the default; a number; one number per source; or a mapping selector → either, in which later
            entries win, and the key None selects all tensors. Tensors without a match get the default.
        infos: Infos of the tensors.
        count: Number of sources.
        one: Function that turns a single number into one per source.
        default: Weights of tensors without a match.
        what: Name of the option, for errors.
        where: Label of the source, for errors.
        strict: Raise if any branch of a selector matches nothing.

    Raises:
        OptionError: A value is not a finite number, or the count of numbers is wrong.
        NoMatch: A selector matches nothing.

    >>> import torchparams as tp, numpy as np
    >>> infos = tp.of({"a": np.zeros(1), "b": np.zeros(1)}).infos
    >>> per_tensor({"a": [1, 2]}, infos, 2, one=lambda x: (1 - x, x), default=(0.5, 0.5), what="weights")
    {'a': (1.0, 2.0), 'b': (0.5, 0.5)}
    """
    found = dict.fromkeys(infos, default)
    if spec is None:
        return found
    from torchparams.selectors import Selector

    for selector, given in (spec if isinstance(spec, Mapping) else {None: spec}).items():
        numbers = _numbers(given, count, one, what)
        hit = infos if selector is None else Selector.of(selector).names(infos.values(), strict=strict, where=where)
        for name in hit:
            found[name] = numbers
    return found


def _numbers(given: object, count: int, one: Callable[[float], Numbers], what: str) -> Numbers:
    if isinstance(given, int | float) and not isinstance(given, bool):
        return one(_number(given, what))
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        if len(given) != count:
            raise OptionError(
                f"{plural(len(given), 'number')} for {plural(count, 'source')}: {what}={shorten(repr(list(given)))}",
                hint="pass one number per source, or a single number",
            )
        return tuple(_number(each, what) for each in given)
    raise OptionError(
        f"{what} must be a number or a list of numbers, not {shorten(repr(given))}",
        hint="write 0.3, [0.3, 0.7], or {'layers.**': 0.3} with a selector",
    )


def _number(given: object, what: str) -> float:
    if not isinstance(given, int | float) or isinstance(given, bool) or not math.isfinite(given):
        raise OptionError(f"{what} must be finite numbers, not {shorten(repr(given))}")
    return float(given)


def groups(numbers: Mapping[str, Numbers]) -> dict[Numbers, list[str]]:
    """Tensors grouped by equal weights, in order of first appearance."""
    found: dict[Numbers, list[str]] = {}
    for name, these in numbers.items():
        found.setdefault(these, []).append(name)
    return found
