"""Names of the tensors of a pickle, with the aliases of each; two tensors of one name are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams.errors import SourceError, shorten
from torchparams.io.filebytes import check_name_lengths
from torchparams.sources.torchfile._parts import take_apart

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchparams.encodings.base import Structure
    from torchparams.left_out import LeftOut
    from torchparams.sources.torchfile._refs import TensorRef

UNSAVED = "non-persistent buffer"
"""Kind that becomes `buffer`, with `persistent` False."""


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
        self.persistent = kind != UNSAVED
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


class Names:
    """Names of tensors, added in the order of the file.

    Attributes:
        names: Every name of a tensor, including aliases, with its entry, in order.
        structures: Tensors that are listed by the tensors that they keep.

    Args:
        label: Label of the file, for messages.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.names: dict[str, Named] = {}
        self.structures: list[Structure] = []
        self._structured: dict[int, tuple[int, TensorRef]] = {}
        self._of_memory: dict[str | int, Named | dict[str, Named]] = {}

    def add(self, name: str, tensor: TensorRef, kind: str | None, module: str | None) -> None:
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


def _view_text(tensor: TensorRef) -> str:
    # As a text, whose hash is randomised: a file cannot choose views that collide.
    start = tensor.storage.start if tensor.storage is not None else 0
    flags = f"{tensor.conj} {tensor.neg} {tensor.problem}"
    return f"{tensor.dtype} {start + tensor.offset} {tensor.shape} {tensor.stride} {flags}"
