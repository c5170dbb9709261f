"""Merge several checkpoints of one network into one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torchparams.edit.convert import plan_of
from torchparams.edit.merge.matching import SHOWN, Matched, some
from torchparams.edit.merge.methods import METHODS, Recipe
from torchparams.edit.merge.weights import groups, per_tensor
from torchparams.edit.plan.layout import parse_bytes
from torchparams.edit.plan.plan import MEMORY
from torchparams.edit.plan.to_write import ToWrite, dtypes_of, refuse_cast_codes
from torchparams.errors import OptionError, nearest
from torchparams.render.tree import human_bytes, plural

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torchparams.edit.merge.methods import Method
    from torchparams.edit.plan.plan import Plan


def merge(
    sources: Sequence[object],
    path: str | os.PathLike[str] | None = None,
    selector: object = None,
    *,
    method: str = "linear",
    weights: object = None,
    base: object = None,
    density: object = None,
    scale: float | None = None,
    seed: int | None = None,
    normalize: bool = False,
    dtype: object = None,
    compute: str = "float32",
    rename: object = None,
    missing: str = "refuse",
    shared: str | None = None,
    max_shard_size: int | str | None = None,
    metadata: Mapping[str, str] | None = None,
    format: str | None = None,
    memory: int | str = MEMORY,
    overwrite: bool = False,
    allow_overflow: bool = False,
    strict: bool = True,
) -> Plan:
    """Plan to merge checkpoints of one network, tensor by tensor; `run` writes the result.

    | method | each element | |
    |---|---|---|
    | `linear` | `Σ weight · x`; by default the average | Wortsman et al. 2022, arXiv:2203.05482 |
    | `average` | the average | same |
    | `slerp` | spherical interpolation at t from the first to the second | Shoemake 1985, doi:10.1145/325334.325242 |
    | `task_arithmetic` | `base + scale · Σ weight · (x − base)` | Ilharco et al. 2022, arXiv:2212.04089 |
    | `ties` | `task_arithmetic` with the greatest differences of elected sign | Yadav et al. 2023, arXiv:2306.01708 |
    | `dare` | `task_arithmetic` with randomly dropped, rescaled differences | Yu et al. 2023, arXiv:2311.03099 |
    | `dare_ties` | `dare` with the elected signs of `ties` | both |

    Everything is computed in float32 or float64, in the order of the sources, and rounded once. Dtypes follow the first
    source, or the base if there is one. The result does not depend on the memory limit or the number of threads.
    Non-float tensors, such as counters, are copied from the first source or the base, and the plan lists them.

    All sources must have the same names and shapes. A single weight for two sources is the share of the second: for
    `linear` it means `(1 − weight, weight)`, for `slerp` it is t. With a base, a single weight applies to every source.
    `linear` does not read a source of weight zero.

    Args:
        sources: Two or more models, checkpoints or mappings of tensors; one is enough with a base.
        path: Target; None for a view. See `convert`.
        selector: Tensors to write; None for all.
        method: One of the methods above.
        weights: A number; one number per source; or a mapping selector → either, in which later entries win, and the
            key None selects all tensors. Defaults to equal shares that add up to 1; with a base, to 1 for each source.
        base: Checkpoint that the sources were tuned from.
        density: For `ties` and `dare`: share of differences to keep, above 0, up to 1. Same forms as `weights`.
        scale: For methods with a base: factor for the sum of differences. Defaults to 1.
        seed: For `dare`: seed of the random numbers. Defaults to 0.
        normalize: For `linear`: divide the weights by their sum.
        dtype: A dtype for all floating-point tensors, or a mapping selector → dtype.
        compute: Dtype of the computation: `float32` or `float64`.
        rename: Renames for the other sources, to match the names of the first source or the base. A rename need not
            match in every source.
        missing: Treatment of tensors that some sources lack: `refuse`, `keep` (copy from the first source that has
            them) or `drop`.
        shared, max_shard_size, metadata, format, memory, overwrite: See `convert`.
        allow_overflow: Allow finite results that become infinite in the dtype of the result.
        strict: Raise if any branch of a selector matches nothing.

    Raises:
        MismatchError: Names or shapes differ.
        OptionError: There are too few sources, a weight is invalid, or the method does not take an option.
        PlanError: As for `convert`; or non-float tensors with more than one element differ between sources.
        NotReadable: A tensor holds codes of an unknown encoding.
        NoMatch: A selector or rename matches nothing.

    >>> import numpy as np, tempfile
    >>> import torchparams as tp
    >>> a, b = {"w": np.zeros(2, np.float32)}, {"w": np.array([1, 2], np.float32)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = tp.merge([a, b], f"{folder}/merged.safetensors", weights=0.25).run()
    ...     print(tp.of(f"{folder}/merged.safetensors").numpy("w"))
    [0.25 0.5 ]
    """
    how = _method(method)
    given = _listed(sources, base, how, method)
    _check_options(how, method, weights=weights, density=density, scale=scale, seed=seed, normalize=normalize)
    if compute not in ("float32", "float64"):
        raise OptionError(f"`compute` must be 'float32' or 'float64', not {compute!r}")
    tables = Matched(([base] if base is not None else []) + given, selector, rename, missing, strict=strict)
    count, first = len(given), tables.label(0)
    infos = tables.infos
    shares = per_tensor(
        weights, infos, count, one=lambda x: how.one(count, x), default=how.default(count), what="weights",
        where=first, strict=strict,
    )  # fmt: skip
    densities = per_tensor(
        density, infos, count, one=lambda x: (x,) * count, default=(1.0,) * count, what="density",
        where=first, strict=strict,
    )  # fmt: skip
    shares = _checked(shares, densities, how, method, normalize=normalize)
    kinds, notes = dtypes_of(dtype, infos, first)
    for (source, info), name in ((found[0], names[0]) for names, found in tables.tensors if len(found) == 1):
        refuse_cast_codes(source, [info], [kinds[name]])

    entries: list[ToWrite] = []
    merged: dict[str, tuple[float, ...]] = {}
    for names, found in tables.tensors:
        (source, info), name = found[0], names[0]
        if len(found) == 1:
            entries.append(ToWrite(source, info, names, kinds[name]))
            continue
        parts = [source.row(info.name, info) for source, info in found]
        recipe = Recipe(
            name, shares[name], densities[name] if "density" in how.options else (),
            1.0 if scale is None else float(scale), seed or 0, kinds[name], compute,
        )  # fmt: skip
        x = how.build(parts[0], parts[1:], recipe) if how.base else how.build(None, parts, recipe)
        merged[name] = shares[name]
        entries.append(ToWrite(source, info._replace(storage=None), names, x.dtype, x))
    told = _told(how, tables, merged, densities, scale, seed, compute, count)
    return plan_of(
        entries,
        path,
        tables.sources[0],
        shared=shared,
        metadata=metadata,
        format=format,
        dropped=tables.dropped,
        notes=[*told, f"memory: at most {human_bytes(parse_bytes(memory))} for tensors", *tables.notes, *notes],
        max_shard_size=max_shard_size,
        memory=memory,
        overwrite=overwrite,
        allow_overflow=allow_overflow,
    )


# --- options -----------------------------------------------------------------------------------


def _method(name: str) -> Method:
    if name not in METHODS:
        near = nearest(name, list(METHODS))
        raise OptionError(
            f"unknown method {name!r}",
            exists=f"methods are {', '.join(METHODS)}",
            hint=f"did you mean {near[0]}?" if near else None,
        )
    return METHODS[name]


def _listed(sources: Sequence[object], base: object, how: Method, name: str) -> list[object]:
    if isinstance(sources, str | bytes) or not isinstance(sources, Sequence):
        raise OptionError("sources must be a list", hint="write merge([a, b], path)")
    given = list(sources)
    if how.base and base is None:
        raise OptionError(
            f"method {name!r} needs the base that the sources were tuned from", hint="pass base=… (--base BASE)"
        )
    if base is not None and not how.base:
        others = ", ".join(other for other, method in METHODS.items() if method.base)
        raise OptionError(f"method {name!r} takes no base", exists=f"methods with a base are {others}")
    if len(given) < how.least or (how.most is not None and len(given) > how.most):
        wanted = f"{how.least}" if how.most == how.least else f"{how.least} or more"
        raise OptionError(
            f"method {name!r} takes {wanted} source{'' if wanted == '1' else 's'}, but there {_are(len(given))}"
        )
    return given


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"


def _check_options(how: Method, name: str, **options: object) -> None:
    for option, value in options.items():
        if value is None or value is False:
            continue
        if option not in how.options:
            those = [other for other, method in METHODS.items() if option in method.options]
            raise OptionError(
                f"method {name!r} does not take {option}", exists=f"methods with {option} are {', '.join(those)}"
            )
    scale, seed = options["scale"], options["seed"]
    if isinstance(scale, bool) or not (scale is None or (isinstance(scale, int | float) and math.isfinite(scale))):
        raise OptionError(f"`scale` must be a finite number, not {scale!r}")
    if isinstance(seed, bool) or not (seed is None or isinstance(seed, int)):
        raise OptionError(f"`seed` must be an integer, not {seed!r}")


def _checked(
    shares: dict[str, tuple[float, ...]],
    densities: dict[str, tuple[float, ...]],
    how: Method,
    name: str,
    *,
    normalize: bool,
) -> dict[str, tuple[float, ...]]:
    """Weights after checks, normalised on request."""
    for these in groups(densities):
        for density in these:
            if not 0 < density <= 1:
                raise OptionError(f"a density must be above 0 and at most 1, not {density:g}")
    found: dict[tuple[float, ...], tuple[float, ...]] = {}
    for these in groups(shares):
        if not how.signed and min(these) < 0:
            raise OptionError(f"method {name!r} elects signs, and needs non-negative weights, not {min(these):g}")
        total = math.fsum(these)
        if normalize and not total:
            raise OptionError("the weights add up to zero, and cannot be normalised")
        found[these] = tuple(weight / total for weight in these) if normalize else these
    return {name: found[these] for name, these in shares.items()}


# --- notes -------------------------------------------------------------------------------------


def _told(
    how: Method,
    tables: Matched,
    merged: Mapping[str, tuple[float, ...]],
    densities: Mapping[str, tuple[float, ...]],
    scale: float | None,
    seed: int | None,
    compute: str,
    count: int,
) -> list[str]:
    words = [f"method: {how.title}", f"computed in {compute}, rounded once"]
    if "density" in how.options:
        found = list(groups({name: densities[name] for name in merged if name in densities}))
        words.append(f"density {' | '.join(_numbers(these) for these in found[:SHOWN])}{'…' * (len(found) > SHOWN)}")
    if "scale" in how.options:
        words.append(f"scale {1 if scale is None else scale:g}")
    if "seed" in how.options:
        words.append(f"seed {seed or 0}")
    if how.base:
        words.append(f"base {tables.label(0)}")
    labels = [source.label for source in tables.sources[-count:]]
    told = ["; ".join(words)]
    by_weight = groups(merged)
    for these, names in list(by_weight.items())[:SHOWN]:
        parts = ", ".join(f"{weight:g} {label}" for weight, label in zip(these, labels, strict=True))
        every = "" if len(by_weight) == 1 else f": {some(names)}"
        told.append(f"weights {parts}, of {plural(len(names), 'tensor')}{every}")
    if len(by_weight) > SHOWN:
        told.append(f"and {plural(len(by_weight) - SHOWN, 'other set')} of weights")
    return told


def _numbers(these: tuple[float, ...]) -> str:
    return f"{these[0]:g}" if len(set(these)) == 1 else ", ".join(f"{each:g}" for each in these)
