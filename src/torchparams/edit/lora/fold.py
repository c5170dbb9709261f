"""LoRA adapters in PEFT's layout, folded into a base."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torchparams.edit.convert import as_stored, choose, plan_of
from torchparams.edit.lora._adapter import read_adapter
from torchparams.edit.lora._lowrank import Folded
from torchparams.edit.lora._orientation import EMBEDDING, Orientation
from torchparams.edit.merge.matching import some
from torchparams.edit.plan.entries import Entry, dtypes_of, refuse_cast_codes
from torchparams.edit.plan.plan import MEMORY
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
    """A plan that writes a base with a LoRA adapter folded into its weights (Hu et al. 2021, arXiv:2106.09685).

    A weight becomes `W + alpha/r · B·A` (`alpha/√r` with `use_rslora`), computed in float32 (or float64) by rows and
    rounded once; PEFT rounds the product as well. Linear layers, embeddings and ungrouped convolutions are understood,
    ranks and alphas by pattern, biases of `lora_B`, and tensors that the adapter holds whole (`modules_to_save`,
    biases, embeddings, also resized ones), which take the place of the base's. Whatever else an adapter may use is
    refused by name, such as DoRA.

    Some layers store their weight as (in, out), such as `Conv1D` of transformers' GPT-2, and an adapter does not say
    which. The shapes of the factors do, unless a weight is square. Then the class of a live layer decides, or the model
    type in the `config.json` beside the base; where neither is there, it has to be stated.

    Args:
        base: Anything that has parameters, with the names that they have in the model that was tuned.
        adapter: The directory that PEFT's `save_pretrained` wrote: `adapter_config.json` and
            `adapter_model.safetensors` (or `.bin`).
        path: The target; None for a view: see `convert`.
        scale: What the change is multiplied by, beside alpha/r.
        dtype: A type for all floating-point tensors, or a mapping, selector → type.
        compute: `float32` or `float64`.
        fan_in_fan_out: Whether square weights are stored as (in, out); or what selects those that are. None for what
            the base says.
        shared: What becomes of tied tensors: see `convert`. With `clone` they are written apart, and an adapter may
            change one of them alone; PEFT's merge changes all.
        max_shard_size, metadata, format, memory, overwrite: See `convert`.
        allow_overflow: Accept results that are finite, and infinite in the weight's type.

    Raises:
        MismatchError: The base has no such weight, or one of another shape.
        NoMatch: `fan_in_fan_out` selects nothing.
        NotReadable: The adapter uses something that is not understood here; or a weight holds codes of an encoding
            that is not known, which stand beside their scales.
        PlanError: As `convert`; or the adapter's tensors and configuration do not fit; or nothing says which way round
            a weight is stored; or tied tensors are changed in different ways.

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
    source, infos = params.source, as_stored(params)
    spelled = {name: info for info in infos.values() for name in (info.name, *info.aliases)}
    found = read_adapter(adapter, spelled)
    orientation = Orientation(source, infos, fan_in_fan_out)
    changes = _Changes(found, source, spelled, orientation)
    changes.check(apart=shared == "clone")
    kinds, said = dtypes_of(dtype, infos, source.label)
    refuse_cast_codes(source, infos.values(), kinds.values())
    _refuse_codes(found, infos, source)
    entries: list[Entry] = []
    untied: list[str] = []
    for info in infos.values():
        names = (info.name, *info.aliases)
        plain = tuple(name for name in names if name not in changes)
        if plain:
            entries.append(Entry(source, info, plain, kinds[info.name]))
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
        notes.append(f"taken from the adapter as they are: {some(list(found.whole))}")
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
    # A tensor that the adapter holds whole would take the place of codes, and be read with their scales.
    changed = [
        info.name
        for info in infos.values()
        if any(name in found.pairs or name in found.whole for name in (info.name, *info.aliases))
    ]
    refuse(source.coded(), changed, source.label, "Decode the base first, or fold into one that is not quantised")
    factors = [part.name for pair in found.pairs.values() for part in (pair.a, pair.b)]
    refuse(found.source.coded(), factors, found.label, "Decode the adapter first")


class _Changes:
    """What an adapter changes of a base.

    Args:
        found: The adapter.
        source: The base.
        spelled: Its tensors, by every name.
        orientation: What is known of its layers.
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
        """Refuse what does not fit.

        Args:
            apart: Whether tied tensors may be written apart.

        Raises:
            MismatchError: The base has no such tensor, or one of another shape.
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
        """A tensor that the adapter holds several times, as of `bias="all"` with `modules_to_save`, is one."""
        source = self._found.source
        for name, (first, *others) in self._found.whole.items():
            for other in others:
                if differing({name: (source, first)}, {name: (source, other)}):
                    raise PlanError(
                        f"{first.name!r} and {other.name!r} are both {name!r} of the base, and differ",
                        where=self._found.label,
                    )

    def _leave_tied(self) -> None:
        """Leave out further names of tied tensors, where the base has one name of them, as transformers saves it."""
        found = self._found
        for name in [name for name in found.whole if name not in self._spelled]:
            info = found.whole[name][0]
            for other, (same, *_) in found.whole.items():
                if other in self._spelled and other not in found.pairs and not differing(
                    {name: (found.source, info)}, {name: (found.source, same)}
                ):  # fmt: skip
                    found.left.append((info.name, f"tied to {other!r}, under whose name the base has it"))
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
            exists = f"{tied[0]!r} has its shape: if they are tied, PEFT's merge would change both"
        raise MismatchError(
            f"the adapter changes {some(unknown)}, which the base does not have",
            where=self._source.label,
            exists=exists,
            hint="an adapter belongs to the model whose names it has",
        )

    def _shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape that a tensor has by the adapter."""
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
                    f"the adapter resizes {name!r} to {theirs[0]:,} rows, and {some(kept)} {verb} {ours[0]:,}",
                    where=self._found.label,
                    hint="resize the base first, as it was for training",
                )
            resized.append(f"{name!r} has {theirs[0]:,} rows and had {ours[0]:,}")
        if resized:
            self.notes.append(f"resized by the adapter: {'; '.join(resized)}")

    def _holds_embeddings(self, name: str) -> bool:
        """Whether a tensor is an embedding, or of the shape of one that the adapter holds."""
        shape = self._found.whole[name][0].shape
        return any(
            EMBEDDING.fullmatch(other) and info.shape == shape for other, (info, *_) in self._found.whole.items()
        )

    def _orient(self) -> None:
        """Find out which weights are stored transposed.

        Raises:
            PlanError: Nothing says it of some.
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
                f"nothing says whether {some(open_)} {verb} stored as (out, in) or, as by Conv1D of transformers, as "
                "(in, out)",
                where=self._source.label,
                exists="a square weight shows it by the config.json beside the base",
                hint="state it: fan_in_fan_out=False or True, or a selector of the latter "
                "(--no-fan-in-fan-out, --fan-in-fan-out SELECTOR)",
            )

    def _check_ties(self) -> None:
        """Refuse to change tied tensors in different ways: PEFT adds the change of one name to all."""
        for info in {id(info): info for info in self._spelled.values()}.values():
            names = (info.name, *info.aliases)
            some_whole = [name for name in names if name in self._found.whole]
            changed = [name for name in names if name in self and name not in self._found.whole]
            if len(names) > 1 and (changed or 0 < len(some_whole) < len(names)):
                one = (changed or some_whole)[0]
                others = [name for name in names if name != one]
                raise PlanError(
                    f"{one!r} is tied to {some(others)}, and the adapter changes it alone"
                    if not set(others) & {*changed, *some_whole}
                    else f"{one!r} is tied to {some(others)}, and the adapter changes each by itself",
                    where=self._source.label,
                    exists="PEFT's merge would change all of them" if changed else None,
                    hint="to write them apart, pass shared='clone' (--shared clone)",
                )
        replaced = [name for name in self._found.whole if EMBEDDING.fullmatch(name) and name not in self._found.pairs]
        if self._found.keeps_apart and self._orientation.is_tied and len(replaced) == 1:
            raise PlanError(
                f"the adapter replaces {replaced[0]!r} alone, which the config.json beside the base ties to the output",
                where=self._source.label,
                hint="to write it, and untie the output in config.json, pass shared='clone' (--shared clone)",
            )

    def _start(self, name: str) -> tuple[Source, ParameterInfo]:
        """What is changed: the base's tensor, or the one that takes its place."""
        whole = self._found.whole.get(name)
        return (self._source, self._spelled[name]) if whole is None else (self._found.source, whole[0])

    def entry(self, name: str, info: ParameterInfo, dtype: DType, scale: float, accumulate: str) -> Entry:
        """The entry of one name that the adapter changes."""
        source, start = self._start(name)
        pair, bias = self._found.pairs.get(name), self._found.biases.get(name)
        if pair is None and bias is None:
            return Entry(source, start, (name,), dtype if combines(start.dtype) else start.dtype)
        if not combines(info.dtype):
            raise PlanError(
                f"{name!r} is {info.dtype}, to which nothing is added",
                where=self._source.label,
                hint="take a base of floats",
            )
        x = source.row(start.name, start)
        if pair is not None:
            a, b = (self._found.source.row(part.name, part) for part in (pair.a, pair.b))
            transposed = self._transposed.get(name, False)
            x = Folded(x, a, b, pair.scale * scale, transposed=transposed, dtype=dtype, accumulate=accumulate)
        elif bias is not None:
            added = self._found.source.row(bias[0].name, bias[0])
            x = Linear((x, added), (1.0, bias[1] * scale), dtype, accumulate)
        return Entry(self._source, replace(info, shape=x.shape, aliases=(), storage=None), (name,), dtype, x)


def _range_of(numbers: list[int]) -> str:
    if not numbers:
        return "none"
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
