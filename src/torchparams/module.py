"""The attribute `model.parameters` as a table: built into `Module`, or added to an existing model by `attach`."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, TypeVar, overload

from torch import nn

from torchparams.errors import NameTaken, UnsupportedSource, shorten
from torchparams.parameters import Parameters
from torchparams.sources.live.module import ModuleSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

M = TypeVar("M", bound=nn.Module)


class ModuleParameters(Parameters):
    """The value of `model.parameters`: a live table that can be called to get PyTorch's iterator.

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
    _source: ModuleSource

    def __call__(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Iterate over parameters as `nn.Module.parameters` does, by PyTorch's own code.

        Args:
            recurse: Include the parameters of submodules.
        """
        # PyTorch's own method, because classes override named_parameters, and torch.compile knows this function.
        return nn.Module.parameters(self._source.module, recurse)

    if TYPE_CHECKING:

        def __getitem__(self, name: str) -> nn.Parameter: ...


class AttachedParameters(ModuleParameters):
    """The table that `attach` sets: calling it calls the `parameters` method of the module's class."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[nn.Parameter]:
        """Call the `parameters` method of the module's class."""
        module = self._source.module
        return type(module).parameters(module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """Signature of that method, for introspection."""
        return inspect.signature(functools.partial(type(self._source.module).parameters, self._source.module))


class _ParametersAttribute:
    """Descriptor that returns a module's table for the attribute `parameters`.

    A property could not be replaced on one instance, as a method can, and torch.jit would compile it.
    """

    def __init__(self) -> None:
        # Introspection of the class (torch.jit, inspect) sees PyTorch's method.
        functools.update_wrapper(self, nn.Module.parameters, assigned=("__name__", "__qualname__"))

    @overload
    def __get__(self, module: None, owner: type) -> _ParametersAttribute: ...
    @overload
    def __get__(self, module: nn.Module, owner: type) -> ModuleParameters: ...
    def __get__(self, module: nn.Module | None, owner: type) -> ModuleParameters | _ParametersAttribute:
        return self if module is None else ModuleParameters(ModuleSource(module))

    def __call__(self, module: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Support `Net.parameters(model)`, which equals `model.parameters()`."""
        return nn.Module.parameters(module, recurse)


class Module(nn.Module):
    """An `nn.Module` whose `parameters` is also a table of its parameters; calling it gives PyTorch's iterator.

    Everything else is as in PyTorch: optimizers, `torch.compile`, `DistributedDataParallel`, copies, pickles and state
    dicts see an ordinary module. Only the outermost module needs this class. With other base classes, list it first:
    `class Net(tp.Module, nn.Sequential)`. For an existing model, use `torchparams.attach`.

    Attributes:
        parameters: Live table (see `Parameters`), an ordered mapping of names to parameters. `parameters()` returns the
            same as `nn.Module.parameters()`. Without the call, `parameters` is not a list of tensors, and an optimizer
            rejects it.

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
        """Register a parameter; see `nn.Module.register_parameter`.

        Raises:
            NameTaken: The name is `parameters`.
        """
        _refuse_taken(self, name, "parameter")
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        """Register a buffer; see `nn.Module.register_buffer`.

        Raises:
            NameTaken: The name is `parameters`.
        """
        _refuse_taken(self, name, "buffer")
        super().register_buffer(name, tensor, persistent)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a submodule; see `nn.Module.add_module`.

        Raises:
            NameTaken: The name is `parameters`.
        """
        _refuse_taken(self, name, "module")
        super().add_module(name, module)


def _refuse_taken(module: nn.Module, name: str, kind: str) -> None:
    if name == "parameters":
        raise NameTaken(
            f"a {kind} cannot be named 'parameters', the name of the table",
            where=type(module).__name__,
            hint="choose another name",
        )


def attach(model: M, *, submodules: bool = False) -> M:
    """Make `model.parameters` a table of the parameters of an existing model.

    For models whose class you do not write, such as an `nn.Sequential` or a model of a library. Calling
    `model.parameters()` works as before, and the class and everything else that PyTorch sees stay the same. Deep copies
    and pickles of the model get their own table; loading such a pickle imports torchparams, loading a `state_dict` does
    not.

    The table is an attribute of the model, and refers to it. So a dropped model is freed by Python's garbage collector,
    or immediately after `detach`. Shallow copies (`copy.copy`, the replicas of `nn.DataParallel`) share the table of
    the original. Models that PyTorch rebuilds, such as exported and scripted ones and copies of an `fx.GraphModule`,
    have no table.

    Args:
        model: Module to change in place.
        submodules: Also attach tables to all submodules.

    Returns:
        The model itself.

    Raises:
        UnsupportedSource: `model` is not an `nn.Module`.
        NameTaken: A module has its own attribute `parameters`. Nothing is attached then.

    >>> import torchparams as tp
    >>> from torch import nn
    >>> model = tp.attach(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)))
    >>> model.parameters["0.weight"] is model[0].weight
    True
    >>> [tuple(parameter.shape) for parameter in model.parameters()]
    [(2, 3), (2,), (1, 2), (1,)]
    """
    found = _modules(model, "attach", submodules)
    for path, module in found:
        own = vars(module).get("parameters")
        if own is not None and not isinstance(own, AttachedParameters):
            raise NameTaken(
                f"this object already has its own attribute `parameters`, a {type(own).__name__}",
                where=f"{type(model).__name__}: {path}" if path else type(model).__name__,
                hint="delete that attribute first; or use `torchparams.of(model)`, which attaches nothing",
            )
    for _, module in found:
        if not isinstance(type(module).parameters, _ParametersAttribute):  # modules of class tp.Module already have it
            # Bypasses __setattr__, which a compiled model forwards to its inner model.
            vars(module)["parameters"] = AttachedParameters(ModuleSource(module))
    return model


def detach(model: M) -> M:
    """Undo `attach`: make `model.parameters` a method again, in the model and all its submodules.

    Args:
        model: Module to change in place. A model without a table is not changed.

    Returns:
        The model itself.

    Raises:
        UnsupportedSource: `model` is not an `nn.Module`.

    >>> import torchparams as tp
    >>> from torch import nn
    >>> model = tp.attach(nn.Linear(3, 2))
    >>> vars(tp.detach(model)).keys() == vars(nn.Linear(3, 2)).keys()
    True
    """
    for _, module in _modules(model, "detach", True):
        if isinstance(vars(module).get("parameters"), AttachedParameters):
            del vars(module)["parameters"]
    return model


def _modules(model: object, verb: str, submodules: bool) -> list[tuple[str, nn.Module]]:
    """Path and module of `model`, and of all submodules if requested."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        name = model.__name__
        raise UnsupportedSource(
            f"{verb}() takes a model, not the class {name}", hint=f"create a model first: {name}(…)"
        )
    if not isinstance(model, nn.Module):
        raise UnsupportedSource(f"{verb}() takes an nn.Module, not {type(model).__name__}: {shorten(repr(model))}")
    return list(nn.Module.named_modules(model)) if submodules else [("", model)]
