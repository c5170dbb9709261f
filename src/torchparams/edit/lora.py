"""LoRA adapters in PEFT's layout, folded into a base."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchparams.edit._adapter import read_adapter
from torchparams.edit._lowrank import Folded
from torchparams.edit._matching import some
from torchparams.edit.convert import choose, plan_of
from torchparams.edit.entries import Entry, dtypes_of, refuse_cast_codes
from torchparams.edit.plan import MEMORY
from torchparams.encodings.companions import refuse
from torchparams.errors import MismatchError, OptionError, PlanError, nearest
from torchparams.expressions.base import Stored
from torchparams.expressions.combination import combines
from torchparams.report import plural

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torchparams.dtypes import DType
    from torchparams.edit._adapter import Adapter
    from torchparams.edit.plan import Plan
    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source


def fold_lora(
    base: object,
    adapter: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    dtype: object = None,
    compute: str = "float32",
    shared: str | None = None,
    max_shard_size: int | str | None = None,
    metadata: Mapping[str, str] | None = None,
    format: str | None = None,
    memory: int | str = MEMORY,
    overwrite: bool = False,
    allow_overflow: bool = False,
) -> Plan:
    """A plan that writes a base with a LoRA adapter folded into its weights (Hu et al. 2021, arXiv:2106.09685).

    A weight becomes `W + alpha/r · B·A` (`alpha/√r` with `use_rslora`), computed in float32 (or float64) by rows and
    rounded once; PEFT rounds the product as well. Linear layers, embeddings and ungrouped convolutions are understood,
    ranks and alphas by pattern, `fan_in_fan_out`, and tensors that the adapter holds whole (`modules_to_save`, biases,
    embeddings), which take the place of the base's. Whatever else an adapter may use is refused by name, such as DoRA.

    Args:
        base: Anything that has parameters, with the names that they have in the model that was tuned.
        adapter: The directory that PEFT's `save_pretrained` wrote: `adapter_config.json` and
            `adapter_model.safetensors` (or `.bin`).
        path: The target: see `convert`.
        scale: What the change is multiplied by, beside alpha/r.
        dtype: A type for all floating-point tensors, or a mapping, selector → type.
        compute: `float32` or `float64`.
        shared, max_shard_size, metadata, format, memory, overwrite: See `convert`.
        allow_overflow: Accept results that are finite, and infinite in the weight's type.

    Raises:
        MismatchError: The base has no such weight, or one of another shape.
        NotReadable: The adapter uses something that is not understood here; or a weight holds codes of an encoding
            that is not known, which stand beside their scales.
        PlanError: As `convert`; or the adapter's tensors and configuration do not fit.

    >>> import json, os, tempfile
    >>> import numpy as np
    >>> import torchparams as tp
    >>> base = {"fc.weight": np.zeros((2, 3), np.float32), "fc.bias": np.zeros(2, np.float32)}
    >>> factors = {"A": np.ones((1, 3), np.float32), "B": np.ones((2, 1), np.float32)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2}
    ...     with open(f"{folder}/adapter_config.json", "w") as file:
    ...         json.dump(config, file)
    ...     tensors = {f"base_model.model.fc.lora_{x}.weight": array for x, array in factors.items()}
    ...     _ = tp.convert(tensors, f"{folder}/adapter_model.safetensors").run()
    ...     _ = tp.fold_lora(base, folder, f"{folder}/folded.safetensors").run()
    ...     print(tp.of(f"{folder}/folded.safetensors").numpy("fc.weight"))
    [[2. 2. 2.]
     [2. 2. 2.]]
    """
    if compute not in ("float32", "float64"):
        raise OptionError(f"compute={compute!r} says nothing", exists="there are 'float32' and 'float64'")
    params, dropped, notes = choose(base, None)
    source, infos = params.source, params.infos
    found = read_adapter(adapter)
    spelled = {name: info for info in infos.values() for name in (info.name, *info.aliases)}
    _check_names(found, spelled, source)
    kinds, said = dtypes_of(dtype, infos, source.label)
    refuse_cast_codes(source, infos.values(), kinds.values())
    _refuse_codes(found, infos, source)
    entries: list[Entry] = []
    untied: list[str] = []
    for info in infos.values():
        names = (info.name, *info.aliases)
        plain = tuple(name for name in names if name not in found.pairs and name not in found.whole)
        if plain:
            entries.append(Entry(source, info, plain, kinds[info.name]))
        for name in names:
            if name in plain:
                continue
            if len(names) > 1:
                untied.append(name)
            entries.append(
                _changed(
                    name, source, info, found,
                    scale=scale, dtype=kinds[info.name], accumulate=compute, allow_overflow=allow_overflow,
                )
            )  # fmt: skip
    ranks = sorted({pair.a.shape[0] for pair in found.pairs.values() if pair.a.shape})
    notes.append(
        f"method: LoRA (Hu et al. 2021, arXiv:2106.09685) of {found.label}; computed in {compute}, rounded once; "
        f"{plural(len(found.pairs), 'weight')} changed, of rank {_range_of(ranks)}"
    )
    if found.whole:
        notes.append(f"taken from the adapter as they are: {some(list(found.whole))}")
    if untied:
        notes.append(f"no longer tied to others: {some(untied)}")
    return plan_of(
        entries,
        path,
        source,
        shared=shared,
        metadata=metadata,
        format=format,
        dropped=dropped,
        notes=[*notes, *said],
        max_shard_size=max_shard_size,
        memory=memory,
        overwrite=overwrite,
        allow_overflow=allow_overflow,
    )


def _check_names(found: Adapter, spelled: Mapping[str, ParameterInfo], source: Source) -> None:
    unknown = [name for name in (*found.pairs, *found.whole) if name not in spelled]
    if unknown:
        near = nearest(unknown[0], list(spelled))
        raise MismatchError(
            f"the adapter changes {some(unknown)}, which the base does not have",
            where=source.label,
            exists=f"did you mean {near[0]!r}?" if near else None,
            hint="an adapter belongs to the model whose names it has",
        )
    for name, info in found.whole.items():
        if info.shape != spelled[name].shape:
            raise MismatchError(
                f"{name!r} has shape {list(spelled[name].shape or ())} in {source.label} and {list(info.shape or ())} "
                "in the adapter",
                hint="a base whose embedding was resized has to be resized first",
            )


def _refuse_codes(found: Adapter, infos: Mapping[str, ParameterInfo], source: Source) -> None:
    # A tensor that the adapter holds whole would take the place of codes, and be read with their scales.
    changed = [
        info.name
        for info in infos.values()
        if any(name in found.pairs or name in found.whole for name in (info.name, *info.aliases))
    ]
    refuse(source.coded(), changed, source.label, "Decode the base first, or fold into one that is not quantised")
    factors = [part.name for pair in found.pairs.values() for part in (pair.a, pair.b)]
    refuse(found.source.coded(), factors, found.label, "Decode the adapter first")


def _changed(
    name: str, source: Source, info: ParameterInfo, found: Adapter, *, scale: float, dtype: DType, **options: Any
) -> Entry:
    """The entry of one name that an adapter changes."""
    whole = found.whole.get(name)
    start = (found.source, whole) if whole is not None else (source, info)
    if name not in found.pairs:
        return Entry(*start, (name,), dtype if combines(start[1].dtype) else start[1].dtype)
    pair = found.pairs[name]
    if not combines(info.dtype):
        raise PlanError(
            f"{name!r} is {info.dtype}, to which nothing is added", where=source.label, hint="take a base of floats"
        )
    x = Folded(
        Stored(start[0], start[1].name, start[1]),
        Stored(found.source, pair.a.name, pair.a),
        Stored(found.source, pair.b.name, pair.b),
        pair.scale * scale,
        transposed=pair.transposed,
        dtype=dtype,
        **options,
    )
    return Entry(source, replace(info, aliases=(), storage=None), (name,), dtype, x)


def _range_of(numbers: list[int]) -> str:
    if not numbers:
        return "none"
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
