"""What every verb on a live network begins with: the network, its tensors by name, and which of them are meant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.errors import UnsupportedSource
from torchparams.parameters import Parameters, of
from torchparams.selectors import Selector

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchparams.info import ParameterInfo
    from torchparams.sources._module import ModuleSource


@dataclass(frozen=True, slots=True)
class Chosen:
    """A selection of a live network at one moment.

    Attributes:
        source: The network.
        infos: The records of all its parameters, by canonical name.
        tensors: The tensors themselves, under the same names.
        names: Those that are selected, in the network's order.
    """

    source: ModuleSource
    infos: Mapping[str, ParameterInfo]
    tensors: Mapping[str, Any]
    names: tuple[str, ...]


def live_table(x: object, verb: str) -> tuple[ModuleSource, Parameters]:
    """The live network in `x`, and the table of it.

    Args:
        x: An `nn.Module`, or a `Parameters` of one.
        verb: What an error calls the function.

    Raises:
        UnsupportedSource: `x` is no live network.
    """
    params = of(x)
    from torchparams.sources._module import ModuleSource

    if not isinstance(params.source, ModuleSource):
        raise UnsupportedSource(
            f"{verb} works on a live model, and this is a {params.source.format}",
            where=params.source.label,
            hint="give the nn.Module, or a Parameters of it",
        )
    return params.source, params


def choose(x: object, selector: object, verb: str) -> Chosen:
    """What `selector` hits in the live network `x`, strictly; None is all of `x`.

    The records are made once: that is most of what a verb costs on a large network.

    Raises:
        UnsupportedSource: `x` is no live network.
        NoMatch: A part of the selector hits nothing.
    """
    source, params = live_table(x, verb)
    infos = source.infos()
    within = infos
    if params.selector is not None:
        names = params.selector.names(infos.values())
        within = {name: info for name, info in infos.items() if name in names}
    chosen = tuple(within)
    if selector is not None:
        hits = Selector.of(selector).names(within.values(), strict=True, where=source.label)
        chosen = tuple(name for name in within if name in hits)
    return Chosen(source, infos, source.keys(), chosen)
