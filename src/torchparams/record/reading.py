"""Parameters of a recorded model, listed once, and again when the model changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.errors import UnsupportedSource
from torchparams.parameters import Parameters, of
from torchparams.selectors import Selector
from torchparams.sources.live.module import ModuleSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from torchparams.info import ParameterInfo


class Reading:
    """The parameters of a model, and the buffers of its frozen modules.

    A frozen module is one whose parameters are all frozen; its running statistics should not change either.

    Args:
        model: A live `nn.Module`.
        rows: Selector of weights whose dead rows are counted; None for none.

    Attributes:
        label: Name of the model.
        names: Names of the tensors.
        tensors: The tensors.
        trainable: Whether each has `requires_grad`.
        infos: Name → info.

    Raises:
        UnsupportedSource: `model` is not a live model.
    """

    def __init__(self, model: Any, rows: object = None) -> None:
        source = of(model).source
        if not isinstance(source, ModuleSource):
            raise UnsupportedSource(f"a recorder needs a live nn.Module, not {source.label} ({source.format})")
        self.source = source
        self.label = self.source.label
        self._rows = None if rows is None else Selector.of(rows)
        self.names: list[str] = []
        self.tensors: list[torch.Tensor] = []
        self.trainable: list[bool] = []
        self.refresh()

    def refresh(self) -> bool:
        """Read the model again; return whether its tensors have changed."""
        tensors = {**self.source.keys(), **self._frozen_buffers()}
        trainable = [tensor.requires_grad for tensor in tensors.values()]
        same = len(tensors) == len(self.tensors) and all(
            a is b for a, b in zip(tensors.values(), self.tensors, strict=True)
        )
        if same and trainable == self.trainable:
            return False
        self.names, self.tensors, self.trainable = list(tensors), list(tensors.values()), trainable
        table = Parameters(ModuleSource(self.source.module, buffers=True))
        infos = table.infos
        self.names = [table.source.resolve(name) for name in self.names]
        self.infos: dict[str, ParameterInfo] = {name: infos[name] for name in self.names}
        if self._rows is None:
            self._chosen: list[bool] = [False] * len(self.names)
        else:
            hits = self._rows.names(self.infos.values(), strict=True, where=self.label)
            self._chosen = [
                name in hits and tensor.dim() > 1 for name, tensor in zip(self.names, self.tensors, strict=True)
            ]
        return True

    def _frozen_buffers(self) -> dict[str, torch.Tensor]:
        found = {}
        for path, module in self.source.module.named_modules():
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad for parameter in own):
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.is_floating_point():
                        found[f"{path}.{name}" if path else name] = buffer
        return found

    def local(self) -> list[torch.Tensor]:
        """The current tensors, detached; for a DTensor, the part on this rank."""
        return [getattr(tensor, "_local_tensor", tensor).detach() for tensor in self.tensors]

    def gradients(self) -> list[torch.Tensor | None]:
        """The current gradients."""
        return [tensor.grad for tensor in self.tensors]

    def dead_rows(self, grads: Sequence[torch.Tensor | None]) -> list[int | None]:
        """Number of rows with an all-zero gradient, for the selected weights."""
        found: list[int | None] = []
        for grad, chosen in zip(grads, self._chosen, strict=True):
            if not chosen or grad is None or grad.layout is not _strided():
                found.append(None)
            else:
                local = getattr(grad, "_local_tensor", grad)
                found.append(int((local.flatten(1) == 0).all(dim=1).sum()))
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
        }


def _strided() -> Any:
    import torch

    return torch.strided
