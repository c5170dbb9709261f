"""Source of a live `nn.Module`, whose parameters are listed anew at each use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.errors import NotReadable, UnknownName
from torchparams.io.live import read_only_copy
from torchparams.names import wrapper_component
from torchparams.reading import INTRINSIC, Lone, Reading
from torchparams.sources.base import Source
from torchparams.sources.live.flat import all_modules, refuse_part
from torchparams.sources.live.parts import may_have_parts
from torchparams.sources.live.quantised import StoredModule, decoded_parts, quantised
from torchparams.sources.live.reach import attribute, changed, reach, spot_of
from torchparams.sources.live.state import state_outside, within_table
from torchparams.sources.live.tensors import LiveReading, class_names, coded_in
from torchparams.sources.live.traverse import count_tensors, holders, list_tensors, modules_of, refuse_odd_keys

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import numpy as np
    import torch
    from torch import nn

    from torchparams.encodings.companions import Coded
    from torchparams.expressions.base import Expression
    from torchparams.info import ParameterInfo
    from torchparams.left_out import LeftOut


class ModuleSource(Source):
    """The parameters of a live network, with the order and names of `named_parameters`.

    Nothing is cached between two uses, so changes to the network show. Names are canonical: without the components of
    wrappers (see `torchparams.names`). A tensor that occurs several times is listed once; its other names are aliases.

    Args:
        module: The network, or any part of it.
        buffers: List buffers too: after the parameters of each module, as `state_dict` does. `walk` always lists only
            the parameters, like `named_parameters`.

    >>> from torch import nn
    >>> from torchparams.sources.live.module import ModuleSource
    >>> list(ModuleSource(nn.BatchNorm1d(3), buffers=True).infos())
    ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """

    format = "module"
    live = True

    def __init__(self, module: nn.Module, *, buffers: bool = False) -> None:
        self.module = module
        self.buffers = buffers
        self.label = _label(module)

    # Tables made of one network at different times are tables of one source.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModuleSource):
            return NotImplemented
        return self.module is other.module and self.buffers == other.buffers

    def __hash__(self) -> int:
        return hash((id(self.module), self.buffers))

    # --- listing ---------------------------------------------------------------------------

    def keys(self) -> Mapping[str, Any]:
        """Map canonical names to tensors, without making infos."""
        return list_tensors(self.module, self.buffers, True).tensors

    def count(self) -> int:
        """Number of tensors, without making names."""
        return count_tensors(self.module, self.buffers)

    def items(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Any]]:
        """Yield canonical name and tensor of every entry, or of `names`, at the time of the call."""
        tensors = self.keys()
        return iter(tensors.items()) if names is None else ((name, tensors[name]) for name in names)

    def infos(self) -> Mapping[str, ParameterInfo]:
        """Map canonical names to infos, at the time of the call."""
        reading = self.reading()
        return dict(zip(reading.tensors, reading.infos, strict=True))

    def reading(self) -> LiveReading:
        """One reading; fields are looked up when they are needed."""
        return LiveReading.of(self.module, self.buffers, decode=quantised, packed=True)

    def held_reading(self) -> LiveReading:
        """A reading of the tensors that modules hold, without tensors in packed weights."""
        return LiveReading.of(self.module, self.buffers, decode=quantised)

    def _quantised(self, name: str) -> Source | None:
        """Source of one quantised parameter, without listing the others; None for a plain parameter."""
        spot = spot_of(self.module, name, self.buffers)
        if spot is None:  # an alias that no path of modules spells, or a name in packed weights
            reading = self.reading()
            packed: Source | None = reading.quantised.get(name) if reading.packed else None
            return packed
        if not may_have_parts(type(spot.tensor)):
            return None
        return decoded_parts(spot.name, spot.tensor, spot.modules[-1], self.label)

    def alone(self, name: str) -> Lone | None:
        """The tensor `name`, found through the modules on its path only."""
        spot = spot_of(self.module, name, self.buffers)
        if spot is None:
            return None
        # A tensor that is a parameter somewhere is a parameter; a buffer may be a parameter elsewhere.
        certain = INTRINSIC | {"kind"} if spot.persistent is None else INTRINSIC
        return Lone(LiveReading.alone(self.module, spot, quantised), certain, (*spot.modules, spot.tensor))

    def coded(self, known: Reading | None = None) -> Mapping[str, Coded]:
        """See `Source.coded`; also finds parameters whose class keeps the scales, as in bitsandbytes."""
        # A scale may be a buffer.
        whole = self.buffers or not any(module._buffers for module in modules_of(self.module))
        if isinstance(known, LiveReading) and whole:
            reading = known
        else:
            reading = LiveReading.of(self.module, True, decode=quantised)
        found = coded_in(reading)
        return {name: each for name, each in found.items() if name not in reading.quantised} if found else found

    def info(self, name: str) -> ParameterInfo:
        """Info of one tensor, without making the others."""
        return self.reading().one(name)

    def walk(self, *, recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, str, Any]]:
        """Yield name, canonical name and parameter one by one; `next(params())` stops at the first.

        With `recurse=False`, only the parameters of the outermost module, as in PyTorch; a wrapper has none.
        """
        try:
            if remove_duplicate:
                seen: set[int] = set()
                for prefix, _, owner in holders(self.module, recurse=recurse):
                    for key, tensor in owner._parameters.items():
                        if tensor is not None and (identity := id(tensor)) not in seen:
                            seen.add(identity)
                            try:
                                name = prefix + key
                            except TypeError:
                                refuse_odd_keys(self.module)
                                raise
                            yield name, name, tensor
                return
            canonical = {id(tensor): name for name, tensor in list_tensors(self.module, False).tensors.items()}
            for prefix, _, owner in holders(self.module, recurse=recurse, every=True):
                for key, tensor in owner._parameters.items():
                    if tensor is not None:
                        name = prefix + key
                        yield name, canonical.get(id(tensor), name), tensor
        except RuntimeError as error:
            raise changed(error, self.module) from None

    # --- values ----------------------------------------------------------------------------

    def value(self, name: str) -> Any:
        """The tensor itself, under any name; only modules on its path are examined."""
        tensor = reach(self.module, name, self.buffers)
        return self.keys()[self.resolve(name)] if tensor is None else tensor

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, detached and sharing memory. For a quantised parameter, its decoded values.

        Raises:
            NotReadable: The parameter is lazy and has no values yet.
        """
        source = self._quantised(name)
        if source is not None:
            values: torch.Tensor = source.tensor(name)
            return values
        detached: torch.Tensor = self._readable(name).detach()
        return detached

    def row(self, name: str, info: ParameterInfo | None = None) -> Expression:
        """Expression of a row; for a quantised parameter, computed from the stored tensors."""
        source = self._quantised(name) if info is None or info.encoded is not None else None
        return super().row(name, info) if source is None else source.row(name)

    def shows_storage(self, name: str) -> bool:
        """See `Source.shows_storage`."""
        return self._quantised(name) is None and super().shows_storage(name)

    @property
    def stored(self) -> Source:
        """Source of the stored tensors, with the parts of each quantised parameter."""
        if not self.reading().quantised:
            return self
        return StoredModule(self, self.reading)

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """Values as a read-only array: a view of the memory of the parameter if it is on the CPU.

        Raises:
            NotReadable: The parameter has no values (lazy, meta), or its class does not give them.
        """
        from torchparams.sources.totorch import to_numpy

        source = self._quantised(name)
        if source is not None:
            return source.numpy(name)
        tensor = self._readable(name)
        if tensor.device.type == "meta":
            raise NotReadable(
                f"{name!r} is on the meta device, which holds no values",
                where=self.label,
                hint="allocate memory with model.to_empty(device='cpu'), then load or initialise the model",
            )
        try:
            array = to_numpy(tensor).view()
        except NotReadable as error:
            error.where = f"{self.label}: {name}"
            raise
        array.flags.writeable = False
        return array

    def _readable(self, name: str) -> Any:
        from torch.nn.parameter import is_lazy

        tensor = self.value(name)
        if is_lazy(tensor):
            raise NotReadable(
                f"{name!r} is lazy: it has no shape or values yet",
                where=self.label,
                hint="run the model once to set its shape",
            )
        self.refuse_part(name, tensor)
        return tensor

    def refuse_part(self, name: str, tensor: Any) -> None:
        """Raise if this rank holds only a part of the parameter, or FSDP will free the tensor again.

        Raises:
            NotReadable: The tensor is such a part or copy.
        """

        def on_the_way() -> Iterator[nn.Module]:  # used only if FSDP is imported
            spot = spot_of(self.module, name, self.buffers)
            yield from all_modules(self.module) if spot is None else spot.modules

        refuse_part(on_the_way(), tensor, name, self.label)

    def why_empty(self) -> list[str]:
        """Sentences that say where the tensors of an empty table are, and how to register them."""
        from torchparams.sources.live.absent import why_empty
        from torchparams.sources.live.network import Network

        return why_empty(Network(self.module))

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """A copy of the values, which stays valid if the memory of the parameter is freed (FSDP does this).

        Raises:
            NotReadable: See `numpy`.
        """
        return read_only_copy(self.numpy(name))

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Modules that keep state outside their parameters and buffers; none of their code is run."""
        found = state_outside(self.module)
        if not found:
            return found
        reading = LiveReading.of(self.module, True, decode=quantised, packed=True)
        return within_table(self.module, found, reading)

    # --- names -----------------------------------------------------------------------------

    def takes(self, name: str) -> bool:
        """Whether `name` leads through the modules to a tensor."""
        return reach(self.module, name, self.buffers) is not None

    def find(self, name: str) -> str | None:
        """Canonical name for a canonical name, raw name, alias, or path of attributes.

        For example, `layers[0].weight` is `layers.0.weight`. Only stored attributes are followed; no property runs.
        """
        listing = list_tensors(self.module, self.buffers, True)
        if name in listing.tensors:
            return name
        tensor = reach(self.module, name, self.buffers)
        if tensor is None:
            found = next((canonical for canonical, raw in listing.raws.items() if raw == name), None)
            if found is not None:
                return found
            tensor = attribute(self.module, name)
        return None if tensor is None else next((n for n, t in listing.tensors.items() if t is tensor), None)

    def resolve(self, name: str) -> str:
        """Canonical name for any spelling, as `find`; the error says what the name is instead.

        Raises:
            UnknownName: The network has no such parameter.
        """
        found = self.find(name)
        if found is not None:
            return found
        aliases = (alias for _, alias in self.reading().aliases)
        error = UnknownName.among(name, self.keys(), self.label, aliases=aliases)
        path, _, last = name.rpartition(".")
        if not self.buffers and reach(self.module, name, True) is not None:
            error.exists, error.hint = f"{name} is a buffer", "list buffers too: torchparams.of(model, buffers=True)"
        elif self.takes(original := f"{path}{'.' * bool(path)}parametrizations.{last}.original"):
            error.exists, error.hint = f"{name} is computed by a parametrization", f"its parameter is {original!r}"
        raise error


def _label(module: nn.Module) -> str:
    """Class name, within the names of its wrappers: `DistributedDataParallel(Net)`."""
    names: list[str] = []
    while True:
        names.append(class_names(module)[0].rpartition(".")[2])
        key = wrapper_component(type(module))
        inner = None if key is None else vars(module).get("_modules", {}).get(key)
        if inner is None or len(names) > _WRAPPERS_SHOWN:
            return "(".join(names) + ")" * (len(names) - 1)
        module = inner


_WRAPPERS_SHOWN = 8
