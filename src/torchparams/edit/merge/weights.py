"""Numbers for every tensor and every source of a merge: one for all, one a source, or by selector."""

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
    """The numbers of each tensor, one for each source.

    Args:
        spec: None for the default; a number; one for each source; or a mapping, selector → either, whose later entries
            win over earlier ones, and whose key None stands for all tensors. What nothing hits has the default.
        infos: The tensors.
        count: How many sources there are.
        one: What a single number stands for.
        default: What holds for tensors of which nothing is said.
        what: What an error calls the numbers.
        where: What an error calls the tensors' source.
        strict: Refuse a selector of which any union branch hits nothing.

    Raises:
        OptionError: Something is no number, not finite, or there are too few or too many.
        NoMatch: A selector hits nothing.

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
                hint="give one for each source, or one number alone",
            )
        return tuple(_number(each, what) for each in given)
    raise OptionError(
        f"{what}={shorten(repr(given))} is neither a number nor a list of them",
        hint="write 0.3, [0.3, 0.7], or {'layers.**': 0.3} with a selector",
    )


def _number(given: object, what: str) -> float:
    if not isinstance(given, int | float) or isinstance(given, bool) or not math.isfinite(given):
        raise OptionError(f"{shorten(repr(given))} among the {what} is not a finite number")
    return float(given)


def groups(numbers: Mapping[str, Numbers]) -> dict[Numbers, list[str]]:
    """The tensors that have the same numbers, in the order of the first of each."""
    found: dict[Numbers, list[str]] = {}
    for name, these in numbers.items():
        found.setdefault(these, []).append(name)
    return found
