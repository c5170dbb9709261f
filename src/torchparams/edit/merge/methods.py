"""Merge methods: options of each, and the expression that computes it.

To add a method, write an expression (see `expressions/base.py`; `Combination` holds the common part) and a row of
`METHODS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchparams.edit.merge._slerp import Slerp
from torchparams.edit.merge._sparse import Dropped, TaskVectors, Trimmed
from torchparams.errors import OptionError
from torchparams.expressions.operations import Cast, Linear

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchparams.dtypes import DType
    from torchparams.expressions.base import Expression


@dataclass(frozen=True, slots=True)
class Recipe:
    """Merge parameters of one tensor.

    Attributes:
        name: Name of the tensor.
        weights: Weight of each source.
        densities: Density of each source; empty for methods without density.
        scale: Factor for the sum of task vectors.
        seed: Seed of the random numbers.
        dtype: Dtype of the result.
        compute: Dtype of the computation: `float32` or `float64`.
    """

    name: str
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    scale: float
    seed: int
    dtype: DType
    compute: str


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method.

    Attributes:
        title: Title with author and reference.
        build: Function that builds the expression of one tensor from the base, the sources' tensors, and the recipe.
        base: Whether the method needs a base.
        least, most: Minimum and maximum number of sources.
        default: Default weights for a number of sources.
        one: Weights for a number of sources, from a single number.
        options: Supported options among `weights`, `density`, `scale`, `seed` and `normalize`.
        signed: Whether weights may be negative.
    """

    title: str
    build: Callable[[Expression | None, list[Expression], Recipe], Expression]
    base: bool = False
    least: int = 2
    most: int | None = None
    default: Callable[[int], tuple[float, ...]] = lambda count: (1.0,) * count
    one: Callable[[int, float], tuple[float, ...]] = lambda count, weight: (weight,) * count
    options: tuple[str, ...] = ("weights",)
    signed: bool = True


def _equal(count: int) -> tuple[float, ...]:
    return (1 / count,) * count


def _share(count: int, weight: float) -> tuple[float, ...]:
    """Weights of two sources from the share of the second."""
    if count != 2:
        raise OptionError(
            f"a single weight is the share of the second of two sources, but there are {count}",
            hint="pass one weight for each source",
        )
    return (1 - weight, weight)


def _linear(base: Expression | None, parts: list[Expression], recipe: Recipe) -> Expression:
    used = [(part, weight) for part, weight in zip(parts, recipe.weights, strict=True) if weight]
    if len(used) == 1 and used[0][1] == 1:  # a single source with weight 1: its bytes are copied if the dtype matches
        part = used[0][0]
        return part if part.dtype == recipe.dtype else Cast(part, recipe.dtype)
    used = used or [(parts[0], 0.0)]
    return Linear(
        [part for part, _ in used],
        [weight for _, weight in used],
        recipe.dtype,
        recipe.compute,
    )


def _slerp(base: Expression | None, parts: list[Expression], recipe: Recipe) -> Expression:
    first, second = recipe.weights
    if abs(first + second - 1) > 1e-9:
        raise OptionError(
            f"the weights of slerp are 1 - t and t, but {first:g} and {second:g} do not add up to 1",
            hint="pass t alone",
        )
    if not 0 <= second <= 1:
        raise OptionError(f"the weight of slerp must be between 0 and 1, not {second:g}")
    if second in (0, 1):
        return _linear(base, parts, recipe)
    a, b = parts
    return Slerp(a, b, second, recipe.dtype, recipe.compute)


def _task(base: Expression | None, parts: list[Expression], recipe: Recipe) -> Expression:
    assert base is not None  # checked by `merge`
    return TaskVectors(base, parts, recipe.weights, recipe.scale, dtype=recipe.dtype, accumulate=recipe.compute)


def _ties(base: Expression | None, parts: list[Expression], recipe: Recipe) -> Expression:
    assert base is not None  # as above
    return Trimmed(
        base, parts, recipe.weights, recipe.scale,
        densities=recipe.densities, elect=True, dtype=recipe.dtype, accumulate=recipe.compute,
    )  # fmt: skip


def _dare(base: Expression | None, parts: list[Expression], recipe: Recipe, elect: bool = False) -> Expression:
    assert base is not None  # as above
    return Dropped(
        base, parts, recipe.weights, recipe.scale,
        densities=recipe.densities, seed=recipe.seed, name=recipe.name, elect=elect,
        dtype=recipe.dtype, accumulate=recipe.compute,
    )  # fmt: skip


def _dare_ties(base: Expression | None, parts: list[Expression], recipe: Recipe) -> Expression:
    return _dare(base, parts, recipe, elect=True)


METHODS: dict[str, Method] = {
    "linear": Method(
        "weighted sum (model soup, Wortsman et al. 2022, arXiv:2203.05482)",
        _linear,
        default=_equal,
        one=_share,
        options=(
            "weights",
            "normalize",
        ),
    ),
    "average": Method(
        "average (model soup, Wortsman et al. 2022, arXiv:2203.05482)", _linear, default=_equal, options=()
    ),
    "slerp": Method(
        "spherical interpolation (Shoemake 1985, doi:10.1145/325334.325242)",
        _slerp,
        most=2,
        default=_equal,
        one=_share,
    ),
    "task_arithmetic": Method(
        "task arithmetic (Ilharco et al. 2022, arXiv:2212.04089)",
        _task,
        base=True,
        least=1,
        options=(
            "weights",
            "scale",
        ),
    ),
    "ties": Method(
        "TIES (Yadav et al. 2023, arXiv:2306.01708)",
        _ties,
        base=True,
        least=1,
        options=("weights", "density", "scale"),
        signed=False,
    ),
    "dare": Method(
        "DARE (Yu et al. 2023, arXiv:2311.03099)",
        _dare,
        base=True,
        least=1,
        options=("weights", "density", "scale", "seed"),
    ),
    "dare_ties": Method(
        "DARE (Yu et al. 2023, arXiv:2311.03099) with the elected signs of TIES (arXiv:2306.01708)",
        _dare_ties,
        base=True,
        least=1,
        options=("weights", "density", "scale", "seed"),
        signed=False,
    ),
}
"""All methods by name."""
