"""What every verb on a live network begins with: the network, its tensors by name, and which of them are meant."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.encodings.companions import refuse
from torchparams.errors import UnsupportedSource
from torchparams.parameters import Parameters, of
from torchparams.selectors import Selector

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torchparams.left_out import LeftOut
    from torchparams.sources.base import Source
    from torchparams.sources.live.module import ModuleSource
    from torchparams.sources.live.tensors import LiveRecords


@dataclass(frozen=True, slots=True)
class Chosen:
    """A selection of a live network at one moment.

    Attributes:
        source: The network.
        records: One reading of it, with all its tensors by canonical name.
        names: Those that are selected, in the network's order.
        narrow: One line about a `*` that hits a few tensors where `**` would hit many more; None without such.
    """

    source: ModuleSource
    records: LiveRecords
    names: tuple[str, ...]
    narrow: str | None = None

    @property
    def tensors(self) -> Mapping[str, Any]:
        """All tensors of the network, by canonical name."""
        return self.records.tensors

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """State outside the network's parameters and buffers; of a part of it, that of the modules that it names."""
        return outside(self.source, self.names, whole=len(self.names) == len(self.tensors))

    def parameters(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Name → tensor of what is selected, or of `names`, the buffers left out."""
        # No list of pairs: tens of thousands of new tuples make the garbage collector look at everything there is.
        names = self.names if names is None else names
        tensors = self.records.tensors
        if not self.source.buffers:
            return {name: tensors[name] for name in names}
        kinds = dict(zip(tensors, self.records.column("kind"), strict=True))
        return {name: tensors[name] for name in names if kinds[name] == "parameter"}


def refuse_codes(source: ModuleSource, tensors: Mapping[str, Any], verb: str) -> None:
    """An error where `verb` would compute with codes that stand beside their scales.

    Args:
        source: The network.
        tensors: Canonical name → tensor, of those that it would compute with.
        verb: What the error calls the function.

    Raises:
        NotReadable: One of them holds codes of an encoding that is not known.
    """
    from torch.nn import Parameter

    # The whole network is only read for what may hold codes: a narrow type, or a class of its own.
    kinds = {(type(tensor), tensor.dtype) for tensor in tensors.values()}
    if any(cls is not Parameter or dtype.itemsize == 1 or not dtype.is_floating_point for cls, dtype in kinds):
        hint = f"Leave it out of the selection: {verb} takes its elements for values"
        refuse(source.coded(), tensors, source.label, hint, numbers=True)


def outside(source: Source, names: Iterable[str], *, whole: bool) -> tuple[LeftOut, ...]:
    """State outside the table of a source; unless `whole`, of the modules that hold the tensors `names`."""
    found = source.left_out
    if not found or whole:
        return found
    owners = {name.rpartition(".")[0] for name in names}
    return tuple(each for each in found if each.name in owners)


def live_table(x: object, verb: str) -> tuple[ModuleSource, Parameters]:
    """The live network in `x`, and the table of it.

    Args:
        x: An `nn.Module`, or a `Parameters` of one.
        verb: What an error calls the function.

    Raises:
        UnsupportedSource: `x` is no live network.
    """
    refuse_path(x, verb)
    params = of(x)
    from torchparams.sources.live.module import ModuleSource

    if not isinstance(params.source, ModuleSource):
        raise UnsupportedSource(
            f"{verb} works on a live model, and this is a {params.source.format}",
            where=params.source.label,
            hint="give the nn.Module, or a Parameters of it",
        )
    return params.source, params


def refuse_path(x: object, verb: str) -> None:
    """Say what a verb takes in place of the path of a checkpoint.

    Raises:
        UnsupportedSource: `x` is a path.
    """
    if isinstance(x, str | os.PathLike):
        path = os.fspath(x)
        raise UnsupportedSource(
            f"{verb} works on a live model, and this is the path of a checkpoint",
            where=path,
            hint=f"build the model, fill it with torchparams.load(model, {path!r}), and give the model",
        )


def choose(x: object, selector: object, verb: str) -> Chosen:
    """What `selector` hits in the live network `x`, strictly; None is all of `x`.

    The network is read once, and no record of a tensor is made that the selector does not ask for.

    Raises:
        UnsupportedSource: `x` is no live network.
        NoMatch: A part of the selector hits nothing.
    """
    source, params = live_table(x, verb)
    records = within = source.records()
    if params.selector is not None:
        within = records.only(params.selector.names(records))
    names = within.names
    narrow = None
    if selector is not None:
        wanted = Selector.of(selector)
        hits = wanted.names(within, strict=True, where=source.label)
        names = [name for name in names if name in hits]
        narrow = wanted.narrow(within, source.label)
    return Chosen(source, records, tuple(names), narrow)
