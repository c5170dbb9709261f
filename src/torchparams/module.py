"""The attribute `model.parameters` as a table: `Module` has it built in, `attach` gives it to a module that exists."""

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
    _source: ModuleSource

    def __call__(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """What `nn.Module.parameters` gives, by PyTorch's own code.

        Args:
            recurse: Also the parameters of submodules.
        """
        # Not the table's own walk: a class may override named_parameters, and torch.compile knows this function.
        return nn.Module.parameters(self._source.module, recurse)

    if TYPE_CHECKING:

        def __getitem__(self, name: str) -> nn.Parameter: ...


class AttachedParameters(ModuleParameters):
    """What `attach` sets: the live table, and, called, the method `parameters` of the module's class."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[nn.Parameter]:
        """What `parameters()` gave before `attach`."""
        module = self._source.module
        return type(module).parameters(module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of that method, for what asks an object how to call it."""
        return inspect.signature(functools.partial(type(self._source.module).parameters, self._source.module))


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
        return self if module is None else ModuleParameters(ModuleSource(module))

    def __call__(self, module: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
        """`Net.parameters(model)`, which is `model.parameters()`."""
        return nn.Module.parameters(module, recurse)


class Module(nn.Module):
    """An `nn.Module` whose `parameters` is the table of its parameters; called, it is PyTorch's iterator.

    Everything else is as in PyTorch: optimizers, `torch.compile`, `DistributedDataParallel`, copies, pickles and state
    dicts see an ordinary module. Only the outermost module needs to be one. Beside another base class it comes first:
    `class Net(tp.Module, nn.Sequential)`. A module that exists already gets the same by `torchparams.attach`.

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


def attach(model: M, *, submodules: bool = False) -> M:
    """Make `model.parameters` the table of its parameters; called, it is the method that it was.

    For a model whose class you do not write: an `nn.Sequential`, a model of a library. Its class stays the same, and so
    does everything else that PyTorch sees of it. Deep copies and pickles of the model have a table of their own;
    reading such a pickle imports torchparams, a `state_dict` does not.

    The table is an attribute of the model and holds the model. So the memory of a model that you drop is freed when
    Python's garbage collector runs, or at once after `detach`. Shallow copies (`copy.copy`, the replicas of
    `nn.DataParallel`) keep the table of the original. Models that PyTorch builds anew, such as exported and scripted
    ones and copies of an `fx.GraphModule`, come without one.

    Args:
        model: The module, which is changed in place.
        submodules: Do the same to every module in it.

    Returns:
        The model itself.

    Raises:
        UnsupportedSource: `model` is not an `nn.Module`.
        NameTaken: An object in it has an attribute `parameters` of its own. Nothing is attached then.

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
                f"this object has an attribute `parameters` of its own, a {type(own).__name__}",
                where=f"{type(model).__name__}: {path}" if path else type(model).__name__,
                hint="delete that attribute first; `torchparams.of(model)` gives the table without attaching it",
            )
    for _, module in found:
        if not isinstance(type(module).parameters, _ParametersAttribute):  # those of tp.Module have it already
            # Past __setattr__, which a compiled model hands on to the model inside it.
            vars(module)["parameters"] = AttachedParameters(ModuleSource(module))
    return model


def detach(model: M) -> M:
    """Undo `attach`: `model.parameters` is the method again, and so it is of every module in the model.

    Args:
        model: The module, which is changed in place. One without a table stays as it is.

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
    """Path and module: `model`, and all below it with `submodules`."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        name = model.__name__
        raise UnsupportedSource(f"{verb} takes a model, not the class {name}", hint=f"make a model first: {name}(…)")
    if not isinstance(model, nn.Module):
        raise UnsupportedSource(f"{verb} takes an nn.Module, not {type(model).__name__}: {shorten(repr(model))}")
    return list(nn.Module.named_modules(model)) if submodules else [("", model)]
