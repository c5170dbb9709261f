"""The ways to merge: what each needs, and which expression computes it.

To add one, write an expression (see `expressions/base.py`; `Combination` has what all share) and a row of
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
    """How one tensor is merged.

    Attributes:
        name: Its name.
        weights: A number for each source.
        densities: Likewise; empty for methods that keep all.
        scale: What the sum of task vectors is multiplied by.
        seed: Of random numbers.
        dtype: The result's type.
        compute: `float32` or `float64`.
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
    """A way to merge.

    Attributes:
        title: What it is, and whose it is.
        build: The expression of one tensor: of the base, the sources' tensors, and the recipe.
        base: Whether it needs a base.
        least, most: How many sources it takes.
        default: The weights of so many sources unless told otherwise.
        one: What a single weight means for so many sources.
        options: Which of `weights`, `density`, `scale`, `seed` and `normalize` it takes.
        signed: Whether weights may be below zero.
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
    """One number is the share of the second of two."""
    if count != 2:
        raise OptionError(
            f"one weight says how much of the second of two sources there is, and there are {count}",
            hint="give one for each source",
        )
    return (1 - weight, weight)


def _linear(base: Expression | None, parts: list[Expression], recipe: Recipe) -> Expression:
    used = [(part, weight) for part, weight in zip(parts, recipe.weights, strict=True) if weight]
    if len(used) == 1 and used[0][1] == 1:  # all of one source: its bytes are copied, where the type is its own
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
            f"the weights of slerp are 1 - t and t, and {first:g} and {second:g} do not add up to 1",
            hint="give t alone",
        )
    if not 0 <= second <= 1:
        raise OptionError(f"slerp is between two tensors: t is from 0 to 1, and not {second:g}")
    if second in (0, 1):
        return _linear(base, parts, recipe)
    a, b = parts
    return Slerp(a, b, second, recipe.dtype, recipe.compute)


def _task(base: Expression | None, parts: list[Expression], recipe: Recipe) -> Expression:
    assert base is not None  # whoever builds a merge has seen to it
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
"""Every method by its name."""
