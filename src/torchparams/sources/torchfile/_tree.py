"""Names for the contents of a pickle: every tensor gets a name, everything else becomes metadata.

- A dict contributes its keys and a list its indexes, joined with dots; a flat state_dict keeps its names.
- A pickled `nn.Module` contributes its parameters and buffers, in the order of its state_dict. Other tensor
  attributes are described in the metadata. A TorchScript module is listed in the same way; its code declares which
  attributes are parameters and buffers.
- A tensor made of other tensors (distributed, quantised) is one entry. Its parts are not listed.
- Any other object that was not built contributes its attributes, its items, and its call arguments under `args`.
- A tensor that is the whole file, or the whole of `#inner`, is named `tensor`.

The contents may contain themselves, or one dict ten thousand times. So every recursion has a bound, and every path that
is followed is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams.errors import LimitExceeded, SourceError
from torchparams.io.filebytes import check_name_lengths
from torchparams.left_out import LeftOut, state_of_layer
from torchparams.names import script_class
from torchparams.sources.torchfile._describe import attributes_of, class_name, component_of, describe, plain_copy
from torchparams.sources.torchfile._holders import LEAVES, find_holders
from torchparams.sources.torchfile._inner import resolve
from torchparams.sources.torchfile._names import UNSAVED, Names
from torchparams.sources.torchfile._pickle_values import Global, Reduced
from torchparams.sources.torchfile._refs import TensorRef
from torchparams.sources.torchfile._tensor_forms import Tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchparams.sources.torchfile._holders import Child


_VALUE_NODES = 10_000  # maximum number of parts of a metadata value to copy; larger values are described
_VALUE_DEPTH = 8
_MAPPINGS = 100  # maximum number to keep

Declared = Callable[[str], tuple[frozenset[str], frozenset[str]] | None]
"""Returns the names of the parameters and of the buffers of a TorchScript class."""


class Contents:
    """Everything in `root`, or in the part that `inner` names.

    Attributes:
        names: Every name of a tensor, including aliases, with its entry, in the order of the file.
        metadata: Everything but the tensors: plain values, and descriptions of other objects.
        left_out: The part of the metadata that is state of layers.
        mappings: Names of dicts with tensors in them, from the two outermost levels.
        structures: Tensors that are listed by the tensors that they keep.

    Args:
        root: Contents of the pickle.
        inner: Dotted path of the part to list, or None for everything.
        label: Label of the file, for messages.
        declared: Returns the parameters and buffers that the code of a TorchScript class declares; None if it is not a
            module or not known.

    Raises:
        UnknownName: `inner` does not exist.
        SourceError: Two tensors have the same name, or `inner` contains not a tensors.
        LimitExceeded: The contents are nested too deeply, or shared parts create too many names.
    """

    def __init__(self, root: Any, inner: str | None, label: str, declared: Declared | None = None) -> None:
        self.label = label
        self.left_out: list[LeftOut] = []
        self.mappings: list[str] = []
        self._declared = declared or (lambda name: None)
        self._listed = Names(label)
        self.names, self.structures = self._listed.names, self._listed.structures
        self._tensor = Tensors().of
        self.metadata: dict[str, Any] = {}
        self._value_nodes = 10 * _VALUE_NODES
        self._name_characters = limits.NAME_CHARACTERS
        if inner:
            self._holders: set[int] = set()
            self._steps = 1 << 62
            root = resolve(root, inner, lambda node: self._children(node, None), self._tensor, label)
            self.left_out.clear()  # what was met on the way there
        self._holders, edges = find_holders(root, self._tensor)
        self._steps = edges + limits.ALIASES
        tensor = self._tensor(root)
        if tensor is not None:
            self._listed.add("tensor", tensor, None, None)
        if id(root) in self._holders:
            self._walk(root)
        elif tensor is None:
            if inner:
                raise SourceError(
                    f"{inner!r} contains no tensors: it is {describe(root)}",
                    where=label,
                    hint="leave out the part after # to list the whole file",
                )
            self._note_all(root)

    # --- the walk ------------------------------------------------------------------------------

    def _walk(self, root: Any) -> None:
        """Follow every path to a tensor, in the order of the file."""
        holders, leaves, add = self._holders, LEAVES, self._listed.add
        on_path = {id(root): "the top"}
        stack: list[tuple[str | None, Any, Iterator[Child]]] = [(None, root, self._children(root, None))]
        while stack:
            prefix, node, children = stack[-1]
            for component, child, kind, module in children:
                self._steps -= 1
                if type(child) in leaves:
                    self._note(self._join(prefix, component), child)
                    continue
                name = self._join(prefix, component)
                tensor = child if type(child) is TensorRef else self._tensor(child)
                if tensor is not None:
                    add(name, tensor, kind, module)
                if id(child) not in holders:
                    if tensor is None:
                        self._note(name, child)
                elif id(child) in on_path:
                    self._note(name, f"refers back to {on_path[id(child)]}")
                else:
                    if len(stack) >= limits.NESTING:
                        raise LimitExceeded(
                            f"tensors are nested deeper than {limits.NESTING:,} levels",
                            where=self.label,
                            hint="if you trust the file, raise torchparams.limits.NESTING",
                        )
                    if len(name) > limits.NAME_LENGTH:
                        check_name_lengths((name,), self.label)
                    if len(stack) <= 2 and type(child) is dict and len(self.mappings) < _MAPPINGS:
                        self.mappings.append(name)
                    on_path[id(child)] = name
                    stack.append((name, child, self._children(child, name)))
                    break
            else:
                del on_path[id(node)]
                stack.pop()

    def _join(self, prefix: str | None, component: str) -> str:
        name = component if prefix is None else f"{prefix}.{component}"
        self._name_characters -= len(name)
        if self._steps < 0 or self._name_characters < 0:
            limit = "ALIASES" if self._steps < 0 else "NAME_CHARACTERS"
            raise LimitExceeded(
                "shared parts give its tensors too many or too long names",
                where=self.label,
                exists=f"{len(self.names):,} names were listed so far",
                hint=f"list a part of it with #path, or raise torchparams.limits.{limit}",
            )
        return name

    # --- the contents of a container ------------------------------------------------------------

    def _children(self, node: Any, prefix: str | None) -> Iterator[Child]:
        """Yield component of the name, value, kind and module of the contents of `node`."""
        kind = type(node)
        if kind is dict:
            for key, child in node.items():
                yield key if type(key) is str else component_of(key), child, None, None
        elif kind is list or kind is tuple:
            for index, child in enumerate(node):
                yield str(index), child, None, None
        elif kind is TensorRef:
            yield from self._children(node.state, prefix)
        elif kind is Reduced:
            attributes = attributes_of(node)
            if _is_module(attributes):
                yield from self._module_children(node, attributes, prefix)
                return
            script = _is_script(node)
            if prefix is None or not script:
                self.metadata["(top)" if prefix is None else prefix] = f"an object of {class_name(node)}, not built"
            module = script_class(class_name(node)) if script else None
            names = self._declared(class_name(node)) if script else None
            if names is not None and module is not None:
                yield from self._script_children(attributes, names, module, prefix)
                return
            for part in attributes:
                for key, child in part.items():
                    if script and key in ("training", "_is_full_backward_hook"):
                        continue  # every module of torch.jit has them
                    yield component_of(key), child, None, module
            if not attributes and node.state is not None:
                yield "state", node.state, None, None
            for key, child in (node.pairs or {}).items():
                yield component_of(key), child, None, None
            for index, child in enumerate(node.items or ()):
                yield str(index), child, None, None
            if node.args not in ((), None):
                yield "args", node.args, None, None
            if type(node.func) is not Global:
                yield "func", node.func, None, None

    def _module_children(self, node: Reduced, attributes: list[dict[Any, Any]], prefix: str | None) -> Iterator[Child]:
        """Yield the contents of the state_dict of a pickled `nn.Module`, in its order."""
        state = attributes[0]
        module = class_name(node)
        if prefix is None:
            self.metadata["(top)"] = f"a module of class {module}, not built"
        for key, child in state["_parameters"].items():
            if child is not None:
                yield component_of(key), child, "parameter", module
        hidden = state.get("_non_persistent_buffers_set")
        hidden = hidden if type(hidden) is list else []
        self._steps -= len(hidden)
        names = {key for key in hidden if type(key) is str} if self._steps > 0 else set()
        for key, child in state["_buffers"].items() if type(state.get("_buffers")) is dict else ():
            if child is not None:
                yield component_of(key), child, UNSAVED if key in names else "buffer", module
        for key, child in state["_modules"].items():
            if child is not None:
                yield component_of(key), child, None, None
        for part in attributes:
            for key, child in part.items():
                if key not in ("_parameters", "_buffers", "_modules"):
                    self._note_attribute(prefix, key, child, module)

    def _script_children(
        self,
        attributes: list[dict[Any, Any]],
        names: tuple[frozenset[str], frozenset[str]],
        module: str,
        prefix: str | None,
    ) -> Iterator[Child]:
        """Yield the contents of the state_dict of a TorchScript module, in the order of its attributes."""
        parameters, buffers = names
        for part in attributes:
            for key, child in part.items():
                if key in ("training", "_is_full_backward_hook"):
                    continue  # every module of torch.jit has them
                component = component_of(key)
                if component in parameters or component in buffers:
                    if child is not None:
                        yield component, child, "parameter" if component in parameters else "buffer", module
                elif type(child) is Reduced and _is_script(child) and self._declared(class_name(child)) is not None:
                    yield component, child, None, None
                elif not self._note_attribute(prefix, key, child, module):
                    yield component, child, None, module

    def _note_attribute(self, prefix: str | None, key: Any, child: Any, module: str) -> bool:
        """Describe a module attribute that holds tensors in the metadata; return whether it holds any."""
        if type(child) in LEAVES or (id(child) not in self._holders and self._tensor(child) is None):
            return False
        name = self._join(prefix, component_of(key))
        said = f"an attribute of {module}"
        if type(child) is Reduced and self._tensor(child) is None:  # such as packed weights, which are saved
            self._note(name, f"{said}, an object that holds tensors: {describe(child)}")
            self.left_out.append(LeftOut(name, class_name(child), f"is {said}, an object that holds tensors"))
        else:
            self._note(name, f"in no state_dict, {said}: {describe(child)}")
        return True

    # --- metadata ------------------------------------------------------------------------------

    def _note_all(self, root: Any) -> None:
        """Add the metadata of contents without tensors."""
        if type(root) is dict and len(root) <= _VALUE_NODES:
            for key, value in root.items():
                self._note(self._join(None, component_of(key)), value)
        else:
            self._note("(top)", root)

    def _note(self, name: str, value: Any) -> None:
        if name in self.metadata:
            self._name_characters -= len(name) + 4
            name += " (2)"
        self.metadata[name] = self._plain(value)
        if value is not None:
            kind = class_name(value) if type(value) is Reduced else type(value).__name__
            reason = state_of_layer(name, kind)
            if reason is not None:
                self.left_out.append(LeftOut(name, kind, reason))

    def _plain(self, value: Any) -> Any:
        """`value` as JSON data, or a description if it is too large or not plain."""
        allowed = min(self._value_nodes, _VALUE_NODES)
        budget = [allowed]
        copied = plain_copy(value, _VALUE_DEPTH, budget)
        self._value_nodes -= allowed - max(budget[0], 0)
        return copied if budget[0] >= 0 else describe(value)


def _is_module(attributes: list[dict[Any, Any]]) -> bool:
    if not attributes:
        return False
    state = attributes[0]
    return type(state.get("_modules")) is dict and type(state.get("_parameters")) is dict


def _is_script(node: Reduced) -> bool:
    return type(node.func) is Global and node.func.module.startswith("__torch__")
