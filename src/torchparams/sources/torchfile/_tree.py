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
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams.errors import LimitExceeded, SourceError, UnknownName, nearest, shorten
from torchparams.io.filebytes import check_name_lengths
from torchparams.left_out import LeftOut, state_of_layer
from torchparams.names import script_class
from torchparams.render.tree import plural
from torchparams.sources.torchfile._describe import attributes_of, class_name, component_of, describe, plain_copy
from torchparams.sources.torchfile._parts import take_apart
from torchparams.sources.torchfile._pickle_values import Blob, Global, OddKey, Reduced
from torchparams.sources.torchfile._refs import ArrayRef, NumpyType, StorageRef, TensorRef, fits

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torchparams.encodings.base import Structure

_LEAVES = frozenset({str, int, float, bool, type(None), bytes, complex, Global, Blob, OddKey, NumpyType})
_CONTAINERS = (dict, list, tuple)
_VALUE_NODES = 10_000  # maximum number of parts of a metadata value to copy; larger values are described
_VALUE_DEPTH = 8
_MAPPINGS = 100  # maximum number to keep
_UNSAVED = "non-persistent buffer"  # a temporary kind


class _Parents(list[Any]):
    """Several parents: a separate type, because a parent may be a list."""


Child = tuple[str, Any, str | None, str | None]
"""Component of the name, value, kind and module."""

Declared = Callable[[str], tuple[frozenset[str], frozenset[str]] | None]
"""Returns the names of the parameters and of the buffers of a TorchScript class."""


class Named:
    """A tensor and its names.

    Attributes:
        name: The first name found.
        aliases: Other names.
        tensor: The tensor.
        kind: `parameter`, `buffer` or `tensor`.
        module: Class name of the module that holds it, or None.
        persistent: Whether a state_dict includes it.
    """

    __slots__ = ("aliases", "kind", "module", "name", "persistent", "tensor")

    def __init__(self, name: str, tensor: TensorRef, kind: str, module: str | None) -> None:
        self.persistent = kind != _UNSAVED
        self.name, self.tensor, self.kind, self.module = name, tensor, kind if self.persistent else "buffer", module
        self.aliases: list[str] = []


class Given:
    """Tensors under names that the caller chose, instead of a `Contents`.

    Args:
        tensors: Name → tensor.
    """

    def __init__(self, tensors: Mapping[str, TensorRef]) -> None:
        self.names = {name: Named(name, tensor, "tensor", None) for name, tensor in tensors.items()}
        self.metadata: dict[str, Any] = {}
        self.left_out: list[LeftOut] = []
        self.mappings: list[str] = []
        self.structures: list[Structure] = []


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
        self.structures: list[Structure] = []
        self._structured: dict[int, tuple[int, TensorRef]] = {}
        self._declared = declared or (lambda name: None)
        self.names: dict[str, Named] = {}
        self.metadata: dict[str, Any] = {}
        self._tensors: dict[int, tuple[Any, TensorRef | None]] = {}
        self._of_memory: dict[str | int, Named | dict[str, Named]] = {}
        self._value_nodes = 10 * _VALUE_NODES
        self._name_characters = limits.NAME_CHARACTERS
        if inner:
            root = self._resolve(root, inner)
            self.left_out.clear()  # what was met on the way there
        self._holders, edges = self._find_holders(root)
        self._steps = edges + limits.ALIASES
        tensor = self._tensor(root)
        if tensor is not None:
            self._add("tensor", tensor, None, None)
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
        holders, leaves = self._holders, _LEAVES
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
                    self._add(name, tensor, kind, module)
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

    def _add(self, name: str, tensor: TensorRef, kind: str | None, module: str | None) -> None:
        """List a tensor; a tensor of a known class that keeps others is listed by those."""
        special = tensor.wrapper is not None or tensor.quantizer is not None
        if special and (described := take_apart(name, tensor)) is not None:
            structure, parts = described
            kind = kind or ("parameter" if tensor.is_parameter else "tensor")
            first = self._structured.setdefault(id(tensor), (len(self.structures), tensor))[0]
            if first < len(self.structures):  # an alias
                known = self.structures[first]
                self.structures[first] = replace(known, aliases=(*known.aliases, name))
                return
            self.structures.append(structure)
            for part, inner in parts.items():
                self._add_one(part, inner, kind, module)
        else:
            self._add_one(name, tensor, kind, module)

    def _add_one(self, name: str, tensor: TensorRef, kind: str | None, module: str | None) -> None:
        if len(name) > limits.NAME_LENGTH:
            check_name_lengths((name,), self.label)
        storage = tensor.storage
        memory = id(tensor) if storage is None else storage.key if storage.inline is None else id(storage)
        known = self._of_memory.get(memory)
        entry = None if known is None else self._tied(known, tensor)
        if entry is None:
            entry = Named(name, tensor, kind or ("parameter" if tensor.is_parameter else "tensor"), module)
            self._of_memory[memory] = entry if known is None else self._together(known, entry)
        elif tensor.is_parameter and not entry.tensor.is_parameter:
            entry.tensor = entry.tensor.replaced(is_parameter=True, requires_grad=tensor.requires_grad)
            entry.kind = "parameter"
        namesake = self.names.get(name)
        if namesake is None:
            self.names[name] = entry
            if name != entry.name:
                entry.aliases.append(name)
        elif namesake is not entry:
            first = name.partition(".")[0]
            raise SourceError(
                f"two tensors have the name {shorten(repr(name))} when nested names are joined with dots",
                where=self.label,
                hint=f"list a part of the file, as in '{self.label}#{shorten(first)}'",
            )

    def _tied(self, known: Named | dict[str, Named], tensor: TensorRef) -> Named | None:
        """The entry of the same elements, among entries of one memory."""
        if isinstance(known, dict):
            return known.get(_view_text(tensor))
        return known if _view_text(known.tensor) == _view_text(tensor) else None

    def _together(self, known: Named | dict[str, Named], entry: Named) -> dict[str, Named]:
        """Entries of one memory, by their view of it; built only if the memory has several."""
        views = known if isinstance(known, dict) else {_view_text(known.tensor): known}
        views[_view_text(entry.tensor)] = entry
        return views

    # --- what holds what -----------------------------------------------------------------------

    def _find_holders(self, root: Any) -> tuple[set[int], int]:
        """Ids of all containers that hold a tensor at any depth, and the number of references seen."""
        # Most have one parent; a list is created only for several.
        parents: dict[int, Any] = {id(root): None}
        found: list[Any] = []
        edges = 0
        stack = [root]
        while stack:
            node = stack.pop()
            if self._tensor(node) is not None:
                continue  # its parts are the tensor
            holds = False
            for child in _parts(node):
                edges += 1
                kind = type(child)
                if kind in _LEAVES:
                    continue
                if kind is TensorRef or self._tensor(child) is not None:
                    holds = True
                    continue
                if not child and kind in _CONTAINERS:
                    continue
                known = parents.get(id(child), parents)
                if known is parents:
                    stack.append(child)
                if known is parents or known is None:
                    parents[id(child)] = node
                elif type(known) is _Parents:
                    known.append(node)
                else:
                    parents[id(child)] = _Parents((known, node))
            if holds:
                found.append(node)
        holders: set[int] = set()
        while found:
            node = found.pop()
            if id(node) not in holders:
                holders.add(id(node))
                above = parents[id(node)]
                if type(above) is _Parents:
                    found.extend(above)
                elif above is not None:
                    found.append(above)
        return holders, edges

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
                yield component_of(key), child, _UNSAVED if key in names else "buffer", module
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
        if type(child) in _LEAVES or (id(child) not in self._holders and self._tensor(child) is None):
            return False
        name = self._join(prefix, component_of(key))
        said = f"an attribute of {module}"
        if type(child) is Reduced and self._tensor(child) is None:  # such as packed weights, which are saved
            self._note(name, f"{said}, an object that holds tensors: {describe(child)}")
            self.left_out.append(LeftOut(name, class_name(child), f"is {said}, an object that holds tensors"))
        else:
            self._note(name, f"in no state_dict, {said}: {describe(child)}")
        return True

    def _tensor(self, node: Any) -> TensorRef | None:
        """`node` as a tensor, in any of the forms that files use."""
        kind = type(node)
        if kind is TensorRef:
            return node  # type: ignore[no-any-return]  # its type was just looked at
        if kind is ArrayRef:
            return node.tensor  # type: ignore[no-any-return]
        if kind is not StorageRef and kind is not Reduced:
            return None
        known = self._tensors.get(id(node))
        if known is None:
            made = _storage_tensor(node) if kind is StorageRef else _old_tensor(node)
            known = self._tensors[id(node)] = (node, made)  # with the node, which keeps its id taken
        return known[1]

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

    # --- #inner --------------------------------------------------------------------------------

    def _resolve(self, root: Any, inner: str) -> Any:
        """Resolve the dotted path `inner`; keys may contain dots, and the longest match is tried first."""
        self._holders, self._steps = set(), 1 << 62
        best = (0, root)
        seen = set()
        stack = [(0, root)]
        while stack:
            start, node = stack.pop()
            if start > len(inner):
                return node
            if start >= best[0]:
                best = (start, node)
            if (start, id(node)) in seen:
                continue
            seen.add((start, id(node)))
            fitting = []
            for component, child, _, _ in self._children(node, None):
                if inner.startswith(component, start) and inner[start + len(component) :][:1] in ("", "."):
                    fitting.append((start + len(component) + 1, child))
            stack.extend(sorted(fitting, key=lambda hit: hit[0]))
        self.metadata = {}
        start, node = best
        held = [(component, child) for component, child, _, _ in self._children(node, None)]
        self.metadata = {}
        place = f"{inner[: start - 1]!r}" if start else "the file"
        near = nearest(inner[start:], [component for component, _ in held[:2000]])
        shown = ", ".join(f"{shorten(component, 40)} ({self._contents(child)})" for component, child in held[:8])
        more = f" and {len(held) - 8:,} more" if len(held) > 8 else ""
        hint = f"did you mean '#{inner[:start]}{near[0]}'?" if near else None
        below = sum(component.startswith(f"{inner[start:]}.") for component, _ in held)
        if below:  # a state_dict is flat: its names contain dots
            leave = f"use '#{inner[: start - 1]}'" if start else f"leave #{inner} out"
            shown, more = f"{plural(below, 'name')} with this prefix, but no nested mapping", ""
            hint = f"{leave}, and select by name: {inner[start:]}.**"
        raise UnknownName(
            f"there is no {inner[start:]!r} in {place}",
            where=self.label,
            exists=f"there {'is' if below == 1 else 'are'} {shown}{more}" if held else f"{place} is {describe(node)}",
            hint=hint,
        )

    def _contents(self, node: Any) -> str:
        """A short description of the contents of `node`."""
        if type(node) in _LEAVES or self._tensor(node) is not None:
            return describe(node)
        seen, stack, count = {id(node)}, [node], 0
        while stack:
            for child in _parts(stack.pop()):
                if type(child) in _LEAVES or id(child) in seen:
                    continue
                seen.add(id(child))
                if self._tensor(child) is not None:
                    count += 1
                else:
                    stack.append(child)
        return f"{count:,} tensors" if count else describe(node)


def _view_text(tensor: TensorRef) -> str:
    # As a text, whose hash is randomised: a file cannot choose views that collide.
    start = tensor.storage.start if tensor.storage is not None else 0
    flags = f"{tensor.conj} {tensor.neg} {tensor.problem}"
    return f"{tensor.dtype} {start + tensor.offset} {tensor.shape} {tensor.stride} {flags}"


def _parts(node: Any) -> Iterator[Any]:
    """Yield everything that `node` refers to."""
    kind = type(node)
    if kind is dict:
        yield from node.values()
    elif kind is list or kind is tuple:
        yield from node
    elif kind is Reduced:
        yield from (node.func, node.args, node.state, node.items, node.pairs)
    elif kind is TensorRef and node.storage is None:
        yield node.state


def _is_module(attributes: list[dict[Any, Any]]) -> bool:
    if not attributes:
        return False
    state = attributes[0]
    return type(state.get("_modules")) is dict and type(state.get("_parameters")) is dict


def _is_script(node: Reduced) -> bool:
    return type(node.func) is Global and node.func.module.startswith("__torch__")


def _storage_tensor(storage: StorageRef) -> TensorRef:
    return TensorRef(storage, storage.dtype, 0, (storage.numel,), (1,))


def _old_tensor(node: Reduced) -> TensorRef | None:
    """A tensor or parameter as pickled by torch before version 0.4: a class and a state."""
    func = node.func
    if type(func) is not Global or func.name not in ("Parameter", "Variable"):
        return _old_data(node)
    for values in (node.state, node.args):
        if type(values) is tuple and values:
            data = values[0] if type(values[0]) is TensorRef else _old_data(values[0])
            if data is not None:
                flags = [value for value in values[1:4] if type(value) is bool]
                is_parameter = func.name == "Parameter"
                return data.replaced(is_parameter=is_parameter, requires_grad=flags[0] if flags else is_parameter)
    return None


def _old_data(node: Any) -> TensorRef | None:
    """`torch.FloatTensor` with the state `(storage, offset, shape, stride)`."""
    if type(node) is not Reduced or type(node.func) is not Global or type(node.state) is not tuple:
        return None
    if not node.func.module.startswith("torch") or not node.func.name.endswith("Tensor") or len(node.state) != 4:
        return None
    storage, offset, shape, stride = node.state
    if type(storage) is not StorageRef or not fits(offset, shape, stride):
        return None
    return TensorRef(storage, storage.dtype, offset, shape, stride)
