"""`Module`: an `nn.Module` with the table of its parameters built in."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from torchparams.errors import NameTaken
from torchparams.parameters import Parameters
from torchparams.sources._module import ModuleSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


class ModuleParameters(Parameters):
    """What `model.parameters` is: the live table, and, called, PyTorch's own iterator.

    >>> import torch
    >>> import torchparams as tp
    >>> class Net(tp.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc = torch.nn.Linear(3, 2)
    >>> model = Net()
    >>> model.parameters["fc.bias"] is model.fc.bias
    True
    >>> [tuple(parameter.shape) for parameter in model.parameters()]
    [(2, 3), (2,)]
    """

    __slots__ = ()

    def __init__(self, module: nn.Module) -> None:
        super().__init__(ModuleSource(module))

    def __call__(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """What `nn.Module.parameters` gives, by PyTorch's own code.

        Args:
            recurse: Also the parameters of submodules.
        """
        # Not the table's own walk: a class may override named_parameters, and torch.compile knows this function.
        return nn.Module.parameters(self._source.module, recurse)  # type: ignore[attr-defined]  # set above

    if TYPE_CHECKING:

        def __getitem__(self, name: str) -> nn.Parameter: ...

    def __reduce__(self) -> tuple[Any, ...]:
        return ModuleParameters, (self._source.module,)  # type: ignore[attr-defined]  # set above


class _ParametersAttribute:
    """Gives each module its table when the attribute `parameters` is read.

    Not a property: that could not be replaced on one object, as a method can, and torch.jit would compile it.
    """

    def __init__(self) -> None:
        # What asks a class for its methods (torch.jit, inspect) sees PyTorch's own.
        functools.update_wrapper(self, nn.Module.parameters, assigned=("__name__", "__qualname__"))

    @overload
    def __get__(self, module: None, owner: type) -> _ParametersAttribute: ...
    @overload
    def __get__(self, module: nn.Module, owner: type) -> ModuleParameters: ...
    def __get__(self, module: nn.Module | None, owner: type) -> ModuleParameters | _ParametersAttribute:
        return self if module is None else ModuleParameters(module)

    def __call__(self, module: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
        """`Net.parameters(model)`, which is `model.parameters()`."""
        return nn.Module.parameters(module, recurse)


class Module(nn.Module):
    """An `nn.Module` whose `parameters` is the table of its parameters; called, it is PyTorch's iterator.

    Everything else is as in PyTorch: optimizers, `torch.compile`, `DistributedDataParallel`, copies, pickles and state
    dicts see an ordinary module. Only the outermost module needs to be one; a model without it has the same table in
    `torchparams.of(model)`.

    Attributes:
        parameters: The live table (see `Parameters`), an ordered mapping of names to parameters. `parameters()` gives
            what `nn.Module.parameters()` gives; `parameters` without the call is no list of tensors, and an optimizer
            refuses it.

    >>> import torch
    >>> import torchparams as tp
    >>> class Net(tp.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc = torch.nn.Linear(3, 2)
    ...
    ...     def forward(self, x_BI):
    ...         return self.fc(x_BI)
    >>> model = Net()
    >>> print(model.parameters)
    Net (module)
    name       shape   dtype    numel  size  trainable  module
    fc.weight  [2, 3]  float32      6  24 B  yes        Linear
    fc.bias    [2]     float32      2   8 B  yes        Linear
    2 tensors · 8 parameters · 32 B · 100.0% trainable
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> model.parameters.select("**.bias").names
    ['fc.bias']
    """

    parameters = _ParametersAttribute()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """See `nn.Module.register_parameter`.

        Raises:
            NameTaken: The name is `parameters`.
        """
        _refuse_taken(self, name, "parameter")
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        """See `nn.Module.register_buffer`.

        Raises:
            NameTaken: The name is `parameters`.
        """
        _refuse_taken(self, name, "buffer")
        super().register_buffer(name, tensor, persistent)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """See `nn.Module.add_module`.

        Raises:
            NameTaken: The name is `parameters`.
        """
        _refuse_taken(self, name, "module")
        super().add_module(name, module)


def _refuse_taken(module: nn.Module, name: str, kind: str) -> None:
    if name == "parameters":
        raise NameTaken(
            f"a {kind} cannot be named 'parameters': that is the table of them",
            where=type(module).__name__,
            hint="give it another name",
        )
