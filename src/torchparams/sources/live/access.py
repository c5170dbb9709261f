"""Python expressions for modules and tensors: `model.layers[3].attn.q.weight`."""

from __future__ import annotations

from keyword import iskeyword
from typing import TYPE_CHECKING

from torchparams.sources.live.reach import wrapped_key

if TYPE_CHECKING:
    from torch import nn


class Access:
    """Python expressions for everything in a network.

    Names may omit the components of wrappers; the expression includes them, because Python needs them.

    Args:
        root: The network.
        variable: The expression for the network itself.

    >>> from torch import nn
    >>> access = Access(nn.Sequential(nn.ModuleDict({"a-b": nn.Linear(2, 2)})))
    >>> access.tensor("0.a-b.weight")
    "model[0]['a-b'].weight"
    """

    def __init__(self, root: nn.Module, variable: str = "model") -> None:
        self._found: dict[str, tuple[nn.Module, str]] = {"": (root, variable)}
        self._numbered: dict[int, list[str]] = {}

    def module(self, path: str) -> str:
        """Expression for the module at `path`."""
        return self._reach(path)[1]

    def tensor(self, name: str) -> str:
        """Expression for the parameter, buffer or other attribute `name`."""
        owner, code = self._owner(name)
        return self._item(owner, code, name.rpartition(".")[2])

    def owner(self, name: str) -> nn.Module:
        """The module that holds the parameter, buffer or other attribute `name`."""
        return self._owner(name)[0]

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, last = name.rpartition(".")
        module, code = self._reach(path)
        return self._inside(module, code, last)

    def _reach(self, path: str) -> tuple[nn.Module, str]:
        # Paths are cached: each module is reached from its parent.
        todo = []
        while path not in self._found:
            todo.append(path)
            path = path.rpartition(".")[0]
        module, code = self._found[path]
        for longer in reversed(todo):
            key = longer.rpartition(".")[2]
            module, code = self._inside(module, code, key)
            child = module._modules[key]
            if child is None:
                raise KeyError(longer)
            module, code = child, self._item(module, code, key)
            self._found[longer] = module, code
        return module, code

    def _inside(self, module: nn.Module, code: str, key: str) -> tuple[nn.Module, str]:
        """The module that has `key` itself: `module`, or a module that it wraps."""
        while not _has(module, key) and (wrapped := wrapped_key(module)) is not None:
            inner = module._modules[wrapped]
            assert inner is not None  # wrapped_key has seen it
            module, code = inner, self._item(module, code, wrapped)
        return module, code

    def _item(self, module: nn.Module, code: str, key: str) -> str:
        from torch import nn

        # A subclass may have its own __getitem__ that returns something else.
        getitem = getattr(type(module), "__getitem__", None)
        if key.isdecimal() and getitem in (nn.Sequential.__getitem__, nn.ModuleList.__getitem__):
            if id(module) not in self._numbered:
                self._numbered[id(module)] = list(module._modules)
            keys = self._numbered[id(module)]
            if int(key) < len(keys) and keys[int(key)] == key:
                return f"{code}[{key}]"
        elif key.isdecimal() and getitem is nn.ParameterList.__getitem__:
            return f"{code}[{key}]"
        if key.isidentifier() and not iskeyword(key):
            return f"{code}.{key}"
        if getitem in (nn.ModuleDict.__getitem__, nn.ParameterDict.__getitem__):
            return f"{code}[{key!r}]"
        return f"getattr({code}, {key!r})"


def _has(module: nn.Module, key: str) -> bool:
    return key in module._modules or key in module._parameters or key in module._buffers or key in vars(module)
