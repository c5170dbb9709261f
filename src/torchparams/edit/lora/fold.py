"""Fold a LoRA adapter in PEFT's layout into its base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchparams.edit.convert import as_stored, plan_of, select_to_write
from torchparams.edit.lora._adapter import read_adapter
from torchparams.edit.lora._lowrank import Folded
from torchparams.edit.lora._orientation import EMBEDDING, Orientation
from torchparams.edit.merge.matching import some
from torchparams.edit.plan.plan import MEMORY
from torchparams.edit.plan.to_write import ToWrite, dtypes_of, refuse_cast_codes
from torchparams.edit.save import differing
from torchparams.encodings.companions import refuse
from torchparams.errors import MismatchError, OptionError, PlanError, nearest
from torchparams.expressions.combination import combines
from torchparams.expressions.operations import Linear
from torchparams.render.tree import plural

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torchparams.dtypes import DType
    from torchparams.edit.lora._adapter import Adapter
    from torchparams.edit.plan.plan import Plan
    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source


def fold_lora(
    base: object,
    adapter: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    scale: float = 1.0,
    dtype: object = None,
    compute: str = "float32",
    fan_in_fan_out: object = None,
    shared: str | None = None,
    max_shard_size: int | str | None = None,
    metadata: Mapping[str, str] | None = None,
    format: str | None = None,
    memory: int | str = MEMORY,
    overwrite: bool = False,
    allow_overflow: bool = False,
) -> Plan:
    """Plan to fold a LoRA adapter into the weights of its base (Hu et al. 2021, arXiv:2106.09685).

    A weight becomes `W + alpha/r · B·A` (`alpha/√r` with `use_rslora`), computed in float32 or float64 and rounded
    once; PEFT also rounds the product. Linear layers, embeddings, ungrouped convolutions, patterns of ranks and alphas,
    and biases of `lora_B` are supported. Tensors that the adapter stores whole (`modules_to_save`, biases, embeddings,
    also resized ones) replace those in the base. Other features, such as DoRA, raise an error that names them.

    Some layers store their weight as (in, out), such as transformers' `Conv1D` in GPT-2. An adapter does not record
    which. The shapes of the factors decide, unless a weight is square. Then the class of a live layer decides, or the
    model type in the `config.json` beside the base. If neither does, pass `fan_in_fan_out`.

    Args:
        base: Model, checkpoint or mapping of tensors, with the names of the model that was tuned.
        adapter: Directory written by PEFT's `save_pretrained`: `adapter_config.json` and `adapter_model.safetensors`
            (or `.bin`).
        path: Target; None for a view. See `convert`.
        scale: Additional factor for the change, on top of alpha/r.
        dtype: A dtype for all floating-point tensors, or a mapping selector → dtype.
        compute: Accumulation dtype: `float32` or `float64`.
        fan_in_fan_out: Whether square weights are stored as (in, out), or a selector of such weights. None if the base
            decides.
        shared: Treatment of tied tensors; see `convert`. With `clone`, the adapter may change one of several tied
            tensors; PEFT's merge would change all.
        max_shard_size, metadata, format, memory, overwrite: See `convert`.
        allow_overflow: Allow finite results that become infinite in the dtype of the weight.

    Raises:
        MismatchError: The base lacks a weight, or has another shape.
        NoMatch: `fan_in_fan_out` matches nothing.
        NotReadable: The adapter uses an unsupported feature, or a weight holds codes of an unknown encoding.
        PlanError: As for `convert`; or the tensors do not match the configuration of the adapter; the orientation of a
            weight is unknown; or tied tensors are changed in different ways.

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
        raise OptionError(f"`compute` must be 'float32' or 'float64', not {compute!r}")
    params, dropped, notes = select_to_write(base, None)
    source, infos = params.source, as_stored(params)
    spelled = {name: info for info in infos.values() for name in (info.name, *info.aliases)}
    found = read_adapter(adapter, spelled)
    orientation = Orientation(source, infos, fan_in_fan_out)
    changes = _Changes(found, source, spelled, orientation)
    changes.check(apart=shared == "clone")
    kinds, said = dtypes_of(dtype, infos, source.label)
    refuse_cast_codes(source, infos.values(), kinds.values())
    _refuse_codes(found, infos, source)
    entries: list[ToWrite] = []
    untied: list[str] = []
    for info in infos.values():
        names = (info.name, *info.aliases)
        plain = tuple(name for name in names if name not in changes)
        if plain:
            entries.append(ToWrite(source, info, plain, kinds[info.name]))
        for name in names:
            if name in plain:
                continue
            if len(names) > 1:
                untied.append(name)
            entries.append(changes.entry(name, info, kinds[info.name], scale, compute))
    ranks = sorted({pair.a.shape[0] for pair in found.pairs.values() if pair.a.shape})
    notes.append(
        f"method: LoRA (Hu et al. 2021, arXiv:2106.09685) of {found.label}; computed in {compute}, rounded once; "
        f"{plural(len(found.pairs), 'weight')} changed, of rank {_range_of(ranks)}"
    )
    if found.whole:
        notes.append(f"replaced by tensors of the adapter: {some(list(found.whole))}")
    notes += changes.notes
    if untied:
        notes.append(f"no longer tied to others: {some(untied)}")
    return plan_of(
        entries,
        path,
        source,
        shared=shared,
        metadata=metadata,
        format=format,
        dropped=[*dropped, *found.left],
        notes=[*notes, *said],
        max_shard_size=max_shard_size,
        memory=memory,
        overwrite=overwrite,
        allow_overflow=allow_overflow,
    )


def _refuse_codes(found: Adapter, infos: Mapping[str, ParameterInfo], source: Source) -> None:
    # A whole tensor from the adapter would replace codes, and be decoded with their scales.
    changed = [
        info.name
        for info in infos.values()
        if any(name in found.pairs or name in found.whole for name in (info.name, *info.aliases))
    ]
    refuse(source.coded(), changed, source.label, "Decode the base first, or fold into an unquantised base")
    factors = [part.name for pair in found.pairs.values() for part in (pair.a, pair.b)]
    refuse(found.source.coded(), factors, found.label, "Decode the adapter first")


class _Changes:
    """Changes that an adapter makes to a base.

    Args:
        found: The adapter.
        source: Source of the base.
        spelled: Tensors of the base by every name.
        orientation: Orientation of the layers of the base.
    """

    def __init__(
        self, found: Adapter, source: Source, spelled: Mapping[str, ParameterInfo], orientation: Orientation
    ) -> None:
        self._found, self._source, self._spelled, self._orientation = found, source, spelled, orientation
        self._transposed: dict[str, bool] = {}
        self.notes: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._found.pairs or name in self._found.biases or name in self._found.whole

    def check(self, *, apart: bool) -> None:
        """Raise if the adapter does not fit the base.

        Args:
            apart: Whether tied tensors may be written separately.

        Raises:
            MismatchError: The base lacks a tensor, or has another shape.
            PlanError: See `fold_lora`.
        """
        self._check_copies()
        self._leave_tied()
        self._check_names()
        self._check_shapes()
        self._orient()
        if not apart:
            self._check_ties()

    def _check_copies(self) -> None:
        """Check that copies of a tensor in the adapter agree; `bias="all"` with `modules_to_save` writes two."""
        source = self._found.source
        for name, (first, *others) in self._found.whole.items():
            for other in others:
                if differing({name: (source, first)}, {name: (source, other)}):
                    raise PlanError(
                        f"{first.name!r} and {other.name!r} both replace {name!r} in the base, but differ",
                        where=self._found.label,
                    )

    def _leave_tied(self) -> None:
        """Drop other names of a tied tensor that the base has under one name, as transformers saves it."""
        found = self._found
        for name in [name for name in found.whole if name not in self._spelled]:
            info = found.whole[name][0]
            for other, (same, *_) in found.whole.items():
                if other in self._spelled and other not in found.pairs and not differing(
                    {name: (found.source, info)}, {name: (found.source, same)}
                ):  # fmt: skip
                    found.left.append((info.name, f"tied to {other!r}, the name in the base"))
                    del found.whole[name]
                    break

    def _check_names(self) -> None:
        found = self._found
        names = dict.fromkeys((*found.pairs, *found.biases, *found.whole))
        unknown = [name for name in names if name not in self._spelled]
        if not unknown:
            return
        near = nearest(unknown[0], list(self._spelled))
        exists = f"did you mean {near[0]!r}?" if near else None
        shape = self._shape_of(unknown[0])
        tied = [name for name, info in self._spelled.items() if EMBEDDING.fullmatch(name) and info.shape == shape]
        if tied:
            exists = f"{tied[0]!r} has the same shape: if the two are tied, PEFT's merge changes both"
        raise MismatchError(
            f"the adapter changes {some(unknown)}, but the base has no such tensor",
            where=self._source.label,
            exists=exists,
            hint="fold into the model that the adapter was trained on",
        )

    def _shape_of(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor according to the adapter."""
        if name in self._found.whole:
            return self._found.whole[name][0].shape
        pair = self._found.pairs.get(name)
        if pair is None or pair.a.shape is None or pair.b.shape is None:
            return None
        return (pair.b.shape[0], *pair.a.shape[1:])

    def _check_shapes(self) -> None:
        resized = []
        for name, (taken, *_) in self._found.whole.items():
            ours, theirs = self._spelled[name].shape, taken.shape
            if ours == theirs:
                continue
            if not (ours and theirs and len(ours) == 2 and ours[1:] == theirs[1:] and self._holds_embeddings(name)):
                raise MismatchError(
                    f"{name!r} has shape {list(ours or ())} in {self._source.label} and {list(theirs or ())} "
                    "in the adapter",
                    hint="fold into the model that the adapter was trained on",
                )
            whole = self._found.whole
            kept = [other for other, info in self._spelled.items() if info.shape == ours and other not in whole]
            if kept:
                verb = "keeps" if len(kept) == 1 else "keep"
                raise MismatchError(
                    f"the adapter resizes {name!r} to {theirs[0]:,} rows, but {some(kept)} {verb} {ours[0]:,}",
                    where=self._found.label,
                    hint="resize the base first, as it was for training",
                )
            resized.append(f"{name!r} from {ours[0]:,} to {theirs[0]:,} rows")
        if resized:
            self.notes.append(f"resized by the adapter: {'; '.join(resized)}")

    def _holds_embeddings(self, name: str) -> bool:
        """Whether a tensor is an embedding, or has the shape of an embedding in the adapter."""
        shape = self._found.whole[name][0].shape
        return any(
            EMBEDDING.fullmatch(other) and info.shape == shape for other, (info, *_) in self._found.whole.items()
        )

    def _orient(self) -> None:
        """Determine which weights are stored transposed.

        Raises:
            PlanError: The orientation of a weight is unknown.
        """
        open_: list[str] = []
        for name, pair in self._found.pairs.items():
            shape = self._start(name)[1].shape
            if pair.is_embedding:
                self._transposed[name] = True
            elif shape is not None and len(shape) == 2 and len(pair.a.shape or ()) == 2:
                assert pair.a.shape is not None
                assert pair.b.shape is not None
                plain = (pair.b.shape[0], pair.a.shape[1])
                known = plain != shape if plain != plain[::-1] else None
                if known is None:
                    known = self._orientation.is_transposed(self._spelled[name])
                if known is None:
                    open_.append(name)
                self._transposed[name] = bool(known) and plain[::-1] == shape
        if open_:
            verb = "is" if len(open_) == 1 else "are"
            raise PlanError(
                f"cannot tell whether {some(open_)} {verb} stored as (out, in) or as "
                "(in, out), as in transformers' Conv1D",
                where=self._source.label,
                exists="for a square weight, a config.json beside the base would decide",
                hint="pass fan_in_fan_out: False, True, or a selector of (in, out) weights "
                "(--no-fan-in-fan-out, --fan-in-fan-out SELECTOR)",
            )

    def _check_ties(self) -> None:
        """Raise if tied tensors are changed in different ways: PEFT adds the change of one name to all."""
        for info in {id(info): info for info in self._spelled.values()}.values():
            names = (info.name, *info.aliases)
            some_whole = [name for name in names if name in self._found.whole]
            changed = [name for name in names if name in self and name not in self._found.whole]
            if len(names) > 1 and (changed or 0 < len(some_whole) < len(names)):
                one = (changed or some_whole)[0]
                others = [name for name in names if name != one]
                raise PlanError(
                    f"{one!r} is tied to {some(others)}, but the adapter changes it alone"
                    if not set(others) & {*changed, *some_whole}
                    else f"{one!r} is tied to {some(others)}, but the adapter changes them separately",
                    where=self._source.label,
                    exists="PEFT's merge would change all of them" if changed else None,
                    hint="to write separate tensors, pass shared='clone' (--shared clone)",
                )
        replaced = [name for name in self._found.whole if EMBEDDING.fullmatch(name) and name not in self._found.pairs]
        if self._found.keeps_apart and self._orientation.is_tied and len(replaced) == 1:
            raise PlanError(
                f"the adapter replaces only {replaced[0]!r}, but the config.json beside the base ties it to the output",
                where=self._source.label,
                hint="to write it, and untie the output in config.json, pass shared='clone' (--shared clone)",
            )

    def _start(self, name: str) -> tuple[Source, ParameterInfo]:
        """Tensor to change: from the base, or its replacement from the adapter."""
        whole = self._found.whole.get(name)
        return (self._source, self._spelled[name]) if whole is None else (self._found.source, whole[0])

    def entry(self, name: str, info: ParameterInfo, dtype: DType, scale: float, accumulate: str) -> ToWrite:
        """Tensor to write for one name that the adapter changes."""
        source, start = self._start(name)
        pair, bias = self._found.pairs.get(name), self._found.biases.get(name)
        if pair is None and bias is None:
            return ToWrite(source, start, (name,), dtype if combines(start.dtype) else start.dtype)
        if not combines(info.dtype):
            raise PlanError(
                f"cannot add to {name!r} of dtype {info.dtype}",
                where=self._source.label,
                hint="use a base with floating-point weights",
            )
        x = source.row(start.name, start)
        if pair is not None:
            a, b = (self._found.source.row(part.name, part) for part in (pair.a, pair.b))
            transposed = self._transposed.get(name, False)
            x = Folded(x, a, b, pair.scale * scale, transposed=transposed, dtype=dtype, accumulate=accumulate)
        elif bias is not None:
            added = self._found.source.row(bias[0].name, bias[0])
            x = Linear((x, added), (1.0, bias[1] * scale), dtype, accumulate)
        return ToWrite(self._source, info._replace(shape=x.shape, aliases=(), storage=None), (name,), dtype, x)


def _range_of(numbers: list[int]) -> str:
    if not numbers:
        return "none"
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
