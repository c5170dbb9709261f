"""Selection of tensors in a live model, shared by all functions that work on one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.encodings.companions import refuse
from torchparams.errors import UnsupportedSource
from torchparams.parameters import Parameters, of
from torchparams.selectors import Selector
from torchparams.train._shards import refuse_copies

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torchparams.left_out import LeftOut
    from torchparams.sources.base import Source
    from torchparams.sources.live.module import ModuleSource
    from torchparams.sources.live.tensors import LiveReading


@dataclass(frozen=True, slots=True)
class Chosen:
    """Tensors selected from a live model at one moment.

    Attributes:
        source: The model.
        reading: One reading of the model, with all tensors by canonical name.
        names: Selected names, in the model's order.
        narrow: One line about a `*` that hits a few tensors where `**` would hit many more; None without such.
    """

    source: ModuleSource
    reading: LiveReading
    names: tuple[str, ...]
    narrow: str | None = None

    @property
    def tensors(self) -> Mapping[str, Any]:
        """All tensors of the model, by canonical name."""
        return self.reading.tensors

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """State outside parameters and buffers; for a partial selection, only that of the selected modules."""
        return outside(self.source, self.names, whole=len(self.names) == len(self.tensors))

    def parameters(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Name → parameter for the selection, or for `names`. Buffers are left out."""
        # No list of pairs: tens of thousands of new tuples would trigger full garbage collections.
        names = self.names if names is None else names
        tensors = self.reading.tensors
        if not self.source.buffers:
            return {name: tensors[name] for name in names}
        kinds = dict(zip(tensors, self.reading.column("kind"), strict=True))
        return {name: tensors[name] for name in names if kinds[name] == "parameter"}


def refuse_codes(source: ModuleSource, tensors: Mapping[str, Any], verb: str) -> None:
    """Refuse to compute with quantised codes, whose values depend on separate scales.

    Args:
        source: The model.
        tensors: Canonical name → tensor that the function computes with.
        verb: Name of the function in the error.

    Raises:
        NotReadable: A tensor holds codes of an unknown encoding.
    """
    from torch.nn import Parameter

    from torchparams.sources.live.tensors import LiveReading, coded_in

    # Only narrow dtypes and tensor subclasses can hold codes. Without them the model need not be read.
    kinds = {(type(tensor), tensor.dtype) for tensor in tensors.values()}
    if any(cls is not Parameter or dtype.itemsize == 1 or not dtype.is_floating_point for cls, dtype in kinds):
        hint = f"Leave it out of the selection: {verb} would use its codes as values"
        codes = coded_in(LiveReading.of(source.module, True))  # also those that are understood: they are not written
        refuse(codes, tensors, source.label, hint, numbers=True)


def outside(source: Source, names: Iterable[str], *, whole: bool) -> tuple[LeftOut, ...]:
    """State outside the table of a source; unless `whole`, only that of the modules that own the tensors `names`."""
    found = source.left_out
    if not found or whole:
        return found
    owners = {name.rpartition(".")[0] for name in names}
    return tuple(each for each in found if each.name in owners)


def live_table(x: object, verb: str) -> tuple[ModuleSource, Parameters]:
    """The live model in `x` and its table.

    Args:
        x: An `nn.Module`, or a `Parameters` of one.
        verb: Name of the function in errors.

    Raises:
        UnsupportedSource: `x` is not a live model.
    """
    refuse_path(x, verb)
    params = of(x)
    from torchparams.sources.live.module import ModuleSource

    if not isinstance(params.source, ModuleSource):
        raise UnsupportedSource(
            f"{verb} needs a live model, not a {params.source.format}",
            where=params.source.label,
            hint="pass the nn.Module, or a Parameters of it",
        )
    return params.source, params


def refuse_path(x: object, verb: str) -> None:
    """Refuse the path of a checkpoint, with a hint to load it into a model.

    Raises:
        UnsupportedSource: `x` is a path.
    """
    if isinstance(x, str | os.PathLike):
        path = os.fspath(x)
        raise UnsupportedSource(
            f"{verb} needs a live model, not the path of a checkpoint",
            where=path,
            hint=f"build the model, fill it with torchparams.load(model, {path!r}), and pass the model",
        )


def choose(x: object, selector: object, verb: str) -> Chosen:
    """Select from the live model `x`, strictly; None selects all of `x`.

    The model is read once. Infos are made only if the selector needs them.

    Raises:
        UnsupportedSource: `x` is not a live model.
        NoMatch: A part of the selector matches nothing.
        NotReadable: A tensor is a copy that FSDP gathered for a forward pass.
    """
    source, params = live_table(x, verb)
    reading = within = source.held_reading()  # packed weights are given anew at each look: they cannot be changed
    if params.selector is not None:
        within = reading.only(params.selector.names(reading))
    names = within.names
    narrow = None
    if selector is not None:
        wanted = Selector.of(selector)
        hits = wanted.names(within, strict=True, where=source.label)
        names = [name for name in names if name in hits]
        narrow = wanted.narrow(within, source.label)
    refuse_copies(reading, names, source.label)
    return Chosen(source, reading, tuple(names), narrow)
