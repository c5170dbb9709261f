"""Parameters of a recorded model, listed once, and again when the model changes."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.errors import NotReadable, UnsupportedSource
from torchparams.measure.grouping import groups_of
from torchparams.parameters import of
from torchparams.selectors import Selector
from torchparams.sources.live.flat import RESHARD, is_view, unsharded
from torchparams.sources.live.module import ModuleSource
from torchparams.sources.live.sharded import layout_of, local_of
from torchparams.sources.live.sharding import is_dtensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from torchparams.expressions.sharded import Layout
    from torchparams.info import ParameterInfo

    Array = np.ndarray[Any, Any]


class Recorded:
    """The parameters of a model, and the buffers of its frozen modules.

    A frozen module is one whose parameters are all frozen; its running statistics should not change either. Quantised
    parameters are left out: their tensors are codes, and their norms would mean nothing.

    Args:
        model: A live `nn.Module`.
        by: How to group parameters, see `tp.stats`; None for no groups.
        rows: Selector of weights whose dead rows are counted; None for none.

    Attributes:
        label: Name of the model.
        names: Names of the tensors.
        tensors: The tensors.
        trainable: Whether each has `requires_grad`.
        infos: Name → info.
        layouts: Which part of each tensor every rank keeps; None for a whole tensor.
        groups: Label of a group → indexes of its tensors.
        quantised: Names of quantised parameters.
        same: Index of each tensor before the last `refresh`; None for one that is new, or was frozen or unfrozen.

    Raises:
        UnsupportedSource: `model` is not a live model, or FSDP keeps its parameters in flat parameters only.
        NotReadable: A parameter has no values yet, or is a temporary copy of FSDP.
        NoMatch: A branch of a selector matches nothing.
    """

    def __init__(self, model: Any, by: object = None, rows: object = None) -> None:
        source = of(model).source
        if not isinstance(source, ModuleSource):
            raise UnsupportedSource(f"a recorder needs a live nn.Module, not {source.label} ({source.format})")
        self.source = source
        self.label = self.source.label
        self._by = by
        self._rows = None if rows is None else Selector.of(rows)
        self.names: list[str] = []
        self.tensors: list[torch.Tensor] = []
        self.trainable: list[bool] = []
        self.infos: dict[str, ParameterInfo] = {}
        self.refresh()
        if by is not None:
            groups_of(self.infos, by, where=self.label)

    # --- listing -----------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """List the model again; return whether its tensors have changed."""
        tensors = {**self.source.keys(), **self._frozen_buffers()}
        if self.infos:
            tensors = {name: tensor for name, tensor in tensors.items() if name not in self._left_out}
            trainable = [tensor.requires_grad for tensor in tensors.values()]
            same = len(tensors) == len(self.tensors) and all(map(_is, tensors.values(), self.tensors))
            if same and trainable == self.trainable:
                return False
        before = {name: i for i, name in enumerate(self.names)}
        old, were = self.tensors, self.trainable
        self._list(tensors)
        self.same: list[int | None] = [
            i if (i := before.get(name)) is not None and tensor is old[i] and tensor.requires_grad == were[i] else None
            for name, tensor in zip(self.names, self.tensors, strict=True)
        ]
        return True

    def _list(self, tensors: Mapping[str, torch.Tensor]) -> None:
        infos = ModuleSource(self.source.module, buffers=True).infos()
        self.quantised = [name for name in tensors if infos[name].encoded is not None]
        self._left_out = frozenset(self.quantised)
        self.names = [name for name in tensors if name not in self._left_out]
        self.tensors = [tensors[name] for name in self.names]
        self.trainable = [tensor.requires_grad for tensor in self.tensors]
        self.infos = {name: infos[name] for name in self.names}
        if not self.names:
            raise UnsupportedSource("the model has no parameters to record", where=self.label)
        self.layouts = [self._layout(name, tensor) for name, tensor in zip(self.names, self.tensors, strict=True)]
        self._sharded = [i for i, layout in enumerate(self.layouts) if layout is not None]
        place = {name: i for i, name in enumerate(self.names)}
        groups = {} if self._by is None else groups_of(self.infos, self._by, strict=False)[1]
        self.groups = {label: [place[name] for name in names] for label, names in groups.items()}
        hits = () if self._rows is None else self._rows.names(self.infos.values(), strict=True, where=self.label)
        self._counted = [i for i, name in enumerate(self.names) if name in hits and (self.infos[name].ndim or 0) > 1]

    def _frozen_buffers(self) -> dict[str, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for module in self.source.module.modules():
            if not module._buffers:
                continue
            own = [parameter.requires_grad for parameter in module._parameters.values() if parameter is not None]
            if own and not any(own):
                floating = (b for b in module._buffers.values() if b is not None and b.is_floating_point())
                found.update((id(buffer), buffer) for buffer in floating)
        if not found:
            return {}
        named = ModuleSource(self.source.module, buffers=True).keys()
        return {name: tensor for name, tensor in named.items() if id(tensor) in found}

    def _layout(self, name: str, tensor: torch.Tensor) -> Layout | None:
        info = self.infos[name]
        if info.shape is None or info.device == "meta":
            reason = info.shapeless if info.shape is None else "is on the meta device, which holds no values"
            raise NotReadable(f"{name!r} {reason}", where=self.label, hint="initialise the model first")
        if is_view(tensor):
            raise UnsupportedSource(
                f"{name!r} is in a flat parameter of FullyShardedDataParallel that hides it from the optimizer",
                where=self.label,
                hint="use fully_shard, or use_orig_params=True",
            )
        sharding = info.sharding
        if sharding is None:
            return None
        if sharding.kind == "unsharded":
            raise NotReadable(unsharded(name), where=self.label, hint=RESHARD)
        return layout_of(tensor, name, self.label) if sharding.part is None else sharding.part.layout(name, self.label)

    # --- tensors -----------------------------------------------------------------------------------

    def local(self) -> list[torch.Tensor]:
        """The current tensors; for a sharded one, the part on this rank."""
        if not self._sharded:
            return self.tensors
        return [local_of(tensor) if is_dtensor(tensor) else tensor for tensor in self.tensors]

    def gradients(self, *, whole: bool = False) -> list[torch.Tensor | None]:
        """The current gradients; for a sharded one, the part on this rank.

        Args:
            whole: Sum gradients of which ranks keep summands: one collective for each.
        """
        grads: list[Any] = list(map(attrgetter("grad"), self.tensors))
        for i in self._sharded:
            tensor: Any = self.tensors[i]
            grad = grads[i]
            if not is_dtensor(tensor):
                sharding = self.infos[self.names[i]].sharding
                assert sharding is not None and sharding.part is not None
                grads[i] = sharding.part.gradient(tensor)
            elif grad is not None:
                if whole and grad.placements != tensor.placements:
                    grad = grad.redistribute(placements=tensor.placements)
                grads[i] = local_of(grad) if is_dtensor(grad) else grad
        return grads

    def living_rows(self, grads: Sequence[torch.Tensor | None], rank: int) -> list[torch.Tensor | None]:
        """For the selected weights, the rows with a gradient in the part on this rank, as zeros and ones.

        Args:
            grads: The gradients, as from `gradients`.
            rank: This rank.
        """
        return [self._living(i, grads[i], rank) for i in self._counted]

    def _living(self, i: int, grad: torch.Tensor | None, rank: int) -> torch.Tensor | None:
        import torch

        shape = self.infos[self.names[i]].shape
        assert shape is not None
        if grad is None or grad.layout is not torch.strided:
            return None
        living = torch.zeros(shape[0], dtype=torch.uint8, device=grad.device)
        layout = self.layouts[i]
        if not grad.numel():
            return living
        if layout is None:
            return living.copy_((grad.flatten(1) != 0).any(dim=1))
        box = layout.boxes[rank]
        if len(layout.grid) == len(shape):
            living[box.offsets[0] : box.offsets[0] + box.sizes[0]] = (grad.flatten(1) != 0).any(dim=1)
        else:  # a run of elements of a flat parameter
            width = layout.grid[0] // shape[0]
            living[(grad.reshape(-1) != 0).nonzero().reshape(-1).add(box.offsets[0]) // width] = 1
        return living

    def dead_rows(self, living: Sequence[Array | None]) -> Array | None:
        """Number of rows without a gradient for every tensor, NaN for those that are not selected.

        Args:
            living: Rows with a gradient, of whole weights, in the order of `living_rows`.
        """
        if self._rows is None:
            return None
        found = np.full(len(self.names), np.nan)
        for i, rows in zip(self._counted, living, strict=True):
            if rows is not None:
                found[i] = np.count_nonzero(rows == 0)
        return found

    def head(self) -> dict[str, Any]:
        """Description of the model for `record.json`."""
        return {
            "model": self.label,
            "parameters": [
                {
                    "name": info.name,
                    "shape": None if info.shape is None else list(info.shape),
                    "dtype": str(info.dtype),
                    "numel": info.numel,
                    "requires_grad": info.requires_grad,
                }
                for info in self.infos.values()
            ],
            "quantised": self.quantised,
        }


def _is(a: object, b: object) -> bool:
    return a is b
