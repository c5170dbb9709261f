"""Traversals of a live network: all tensors, and the other names of a tensor."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams.errors import SourceError, shorten
from torchparams.names import wrapper_component
from torchparams.sources.live.flat import KEY, add_parts, is_flat
from torchparams.sources.live.packed import packed_classes, unpacked
from torchparams.sources.live.reach import changed, explained, wrapped_key

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping

    from torch import nn

# --- all tensors ----------------------------------------------------------------------------


def holders(
    root: nn.Module,
    *,
    buffers: bool = False,
    recurse: bool = True,
    every: bool = False,
    shared: list[tuple[str, nn.Module]] | None = None,
    packed: Container[type] = (),
) -> Iterator[tuple[str, str | None, nn.Module]]:
    """Yield the modules that hold tensors, in the order of `named_modules`: canonical prefix, raw prefix, module.

    The raw prefix is None if it equals the canonical prefix. A module without submodules is yielded each time it is
    met, any other module once. With `every`, each module is yielded once for each path to it that has no cycle.

    Args:
        root: The network.
        buffers: Include modules that hold only buffers.
        recurse: Include submodules.
        every: Follow every path.
        shared: Collects modules with submodules that are met again, with their canonical prefix there.
        packed: Classes of modules to include even if they hold no tensors.

    Raises:
        HalfBuilt: A module on the path was never initialised.
    """
    # One loop with its own stack: nested generators would pass each item through one frame per level, and would end at
    # Python's recursion limit.
    try:
        if root._parameters or (buffers and root._buffers) or type(root) in packed:
            yield "", None, root
        if not recurse or not root._modules:
            return
        bearing = _bearing(root, buffers) if every else None
        met = {id(root)}
        plain: set[type] = set()
        skip = wrapped_key(root)
        stack = [("", None if skip is None else "", skip, iter(root._modules.items()), root)]
        while stack:
            prefix, raw, skip, children, parent = stack[-1]
            for key, child in children:
                if child is None:
                    continue
                below = child._modules
                if not below:
                    if child._parameters or (buffers and child._buffers) or type(child) in packed:
                        if raw is None:
                            yield f"{prefix}{key}.", None, child
                        else:
                            yield prefix if key == skip else f"{prefix}{key}.", f"{raw}{key}.", child
                    continue
                if bearing is not None and id(child) not in bearing:
                    continue
                here = prefix if key == skip else f"{prefix}{key}."
                if id(child) in met:
                    if shared is not None and all(child is not frame[-1] for frame in stack):
                        shared.append((here, child))
                    continue
                met.add(id(child))
                there = None if raw is None else f"{raw}{key}."
                if child._parameters or (buffers and child._buffers) or type(child) in packed:
                    yield here, there, child
                inside = None
                if type(child) not in plain:
                    inside = wrapped_key(child)
                    if inside is not None and there is None:
                        there = here
                    if wrapper_component(type(child)) is None:
                        plain.add(type(child))
                stack.append((here, there, inside, iter(below.items()), child))
                break
            else:
                stack.pop()
                if every:
                    met.discard(id(parent))
    except AttributeError as error:
        raise explained(error) from None
    except RuntimeError as error:
        raise changed(error, root) from None


def _bearing(root: nn.Module, buffers: bool) -> set[int]:
    """Ids of modules with tensors in or below them; the others can have as many paths and lead to nothing."""
    parents: dict[int, list[int]] = {id(root): []}
    bearing: set[int] = set()
    modules = [root]
    for module in modules:  # grows during the loop
        if module._parameters or (buffers and module._buffers):
            bearing.add(id(module))
        for child in module._modules.values():
            if child is not None:
                if id(child) not in parents:
                    parents[id(child)] = []
                    modules.append(child)
                parents[id(child)].append(id(module))
    todo = list(bearing)
    while todo:
        for parent in parents[todo.pop()]:
            if parent not in bearing:
                bearing.add(parent)
                todo.append(parent)
    return bearing


@dataclass(slots=True)
class Traversal:
    """Result of one traversal.

    Attributes:
        tensors: Canonical name → tensor, each tensor once.
        owners: The module of each tensor, in the same order.
        raws: Canonical name → raw name, if they differ.
        buffers: Canonical name of each buffer → whether it is persistent.
        tied: Whether any tensor has another name.
        shared: Modules with submodules that were met again, with their canonical prefix there.
        also: Canonical name → other names, for parameters in a flat parameter.
        packed: Canonical names of tensors in packed weights, which no module holds.
    """

    tensors: dict[str, Any]
    owners: list[nn.Module]
    raws: dict[str, str]
    buffers: dict[str, bool]
    tied: bool
    shared: list[tuple[str, nn.Module]]
    also: dict[str, list[str]] = field(default_factory=dict)
    packed: frozenset[str] = frozenset()


def list_tensors(root: nn.Module, buffers: bool, packed: bool = False) -> Traversal:
    """List all tensors of a network in one traversal.

    Args:
        root: The network.
        buffers: Include buffers.
        packed: Include tensors in packed weights.

    Raises:
        HalfBuilt: A module was never initialised.
        SourceError: Two tensors have one name.
    """
    names: list[str] = []
    tensors: list[Any] = []
    owners: list[nn.Module] = []
    raws: dict[str, str] = {}
    saved: dict[str, bool] = {}
    shared: list[tuple[str, nn.Module]] = []
    also: dict[str, list[str]] = {}
    given: list[str] = []
    classes = packed_classes() if packed else frozenset[type]()
    try:
        for prefix, raw, owner in holders(root, buffers=buffers, shared=shared, packed=classes):
            if type(owner) in classes:
                for key, tensor in unpacked(owner).items():
                    given.append(prefix + key)
                    names.append(prefix + key)
                    tensors.append(tensor)
                    owners.append(owner)
                    if raw is not None:
                        raws[prefix + key] = raw + key
                continue
            for key, tensor in owner._parameters.items():
                if tensor is not None:
                    if key == KEY and is_flat(tensor):
                        for name, *others in add_parts(root, tensor, prefix, names, tensors, owners):
                            if others:
                                also[name] = others
                        continue
                    names.append(prefix + key)
                    tensors.append(tensor)
                    owners.append(owner)
            if buffers:
                for key, buffer in owner._buffers.items():
                    if buffer is not None:
                        names.append(prefix + key)
                        tensors.append(buffer)
                        owners.append(owner)
                        saved[prefix + key] = key not in owner._non_persistent_buffers_set
            if raw is not None:
                raws.update((prefix + key, raw + key) for key, _ in _held(owner, buffers))
    except TypeError:
        refuse_odd_keys(root)
        raise
    except RuntimeError as error:
        raise changed(error, root) from None
    # Checked once for all tensors, because usually none is tied; checking each takes a fifth of the traversal.
    tied = len(set(map(id, tensors))) < len(tensors)
    if tied:
        names, tensors, owners = _firsts(names, tensors, owners, saved)
    table = dict(zip(names, tensors, strict=True))
    if len(table) < len(names):
        name, count = Counter(names).most_common(1)[0]
        raise SourceError(
            f"{count} tensors are named {name!r}",
            where=type(root).__name__,
            hint="a key of _modules, _parameters or _buffers holds a dot; register them through PyTorch's functions",
        )
    return Traversal(table, owners, raws, saved, tied or bool(shared or also), shared, also, frozenset(given))


def count_tensors(root: nn.Module, buffers: bool) -> int:
    """Number of distinct tensors of a network, including packed weights; faster than listing them.

    Raises:
        HalfBuilt: A module was never initialised.
        SourceError: Two tensors have one name, or a tensor has none.
    """
    found: list[Any] = []
    add = found.extend
    keys: set[Any] = set()
    met = {id(root)}
    modules = [root]
    packed = packed_classes()
    is_packed = type(root) in packed
    try:
        for held in (root._parameters, root._buffers) if buffers else (root._parameters,):
            keys.update(held.keys())
            add(held.values())
        for module in modules:  # grows during the loop
            below = module._modules
            keys.update(below.keys())
            for child in below.values():
                if child is None:
                    continue
                if child._modules:
                    if id(child) in met:
                        continue
                    met.add(id(child))
                    modules.append(child)
                if held := child._parameters:
                    keys.update(held.keys())
                    add(held.values())
                elif type(child) in packed:
                    is_packed = True
                if buffers and (held := child._buffers):
                    keys.update(held.keys())
                    add(held.values())
    except AttributeError as error:
        raise explained(error) from None
    except RuntimeError as error:
        raise changed(error, root) from None
    # Names may be invalid, and an FSDP flat parameter or a packed weight counts as several tensors.
    if is_packed or KEY in keys or any(type(key) is not str or "." in key for key in keys):
        return len(list_tensors(root, buffers, True).tensors)
    return len(set(map(id, found)) - {id(None)})


def modules_of(root: nn.Module) -> list[nn.Module]:
    """The modules of a network, each once, in any order; faster than `root.modules()`."""
    found = [root]
    met = {id(root)}
    for module in found:  # grows during the loop
        if below := module._modules:
            for child in below.values():
                if child is not None and id(child) not in met:
                    met.add(id(child))
                    found.append(child)
    return found


def _firsts(
    names: list[str], tensors: list[Any], owners: list[nn.Module], buffers: Mapping[str, bool]
) -> tuple[list[str], list[Any], list[nn.Module]]:
    """Keep each tensor at its first place; a tensor that is both parameter and buffer counts as the parameter."""
    first: dict[int, int] = {}
    for place, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
        held = first.setdefault(id(tensor), place)
        if held != place and names[held] in buffers and name not in buffers:
            first[id(tensor)] = place
    places = sorted(first.values())
    return [names[i] for i in places], [tensors[i] for i in places], [owners[i] for i in places]


def _held(module: nn.Module, buffers: bool) -> Iterator[tuple[str, Any]]:
    for held in (module._parameters, module._buffers) if buffers else (module._parameters,):
        for key, tensor in held.items():
            if tensor is not None:
                yield key, tensor


def refuse_odd_keys(root: nn.Module) -> None:
    """Raise if a network has the key of a tensor whose key is not a str, and which has no name.

    Raises:
        SourceError: There is such a key.
    """
    for prefix, _, owner in holders(root, buffers=True):
        for held in ("_parameters", "_buffers"):
            for key in getattr(owner, held):
                if not isinstance(key, str):
                    raise SourceError(
                        f"a key of {held} is {shorten(repr(key))}, not a text",
                        where=f"{type(root).__name__}{f', {prefix[:-1]}' if prefix else ''}",
                        hint="register tensors through PyTorch's functions",
                    )


# --- a tensor's other names -----------------------------------------------------------------


def aliases_of(root: nn.Module, buffers: bool, listing: Traversal) -> dict[str, list[str]]:
    """Canonical name → other names, in the order of `named_parameters(remove_duplicate=False)`."""
    canonical = {id(tensor): name for name, tensor in listing.tensors.items()}
    found = {name: list(others) for name, others in listing.also.items()}
    count = 0
    try:
        for prefix, _, owner in holders(root, buffers=buffers, every=True):
            for key, tensor in _held(owner, buffers):
                if key == KEY and is_flat(tensor):
                    continue  # the names of its parts are known
                name, first = prefix + key, canonical[id(tensor)]
                if name != first:
                    found.setdefault(first, []).append(name)
                    count += 1
            if count > limits.ALIASES:
                return _some_aliases(root, buffers, listing, canonical)
    except (RuntimeError, KeyError) as error:
        raise changed(error, root) from None
    return found


def _some_aliases(
    root: nn.Module, buffers: bool, listing: Traversal, canonical: Mapping[int, str]
) -> dict[str, list[str]]:
    """At least one other name for each tied tensor, without following every path.

    A tied tensor is at two places of one traversal, or below a module that the traversal met again. Each such place
    gives one other name to every tensor below it.
    """
    share = max(1, limits.ALIASES // len(canonical))
    visits: Counter[int] = Counter()
    found: dict[str, list[str]] = {}
    for outer, module in [("", root), *listing.shared]:
        if visits[id(module)] >= share:
            continue  # it has already given enough names to each of its tensors
        visits[id(module)] += 1
        for prefix, _, owner in holders(module, buffers=buffers):
            for key, tensor in _held(owner, buffers):
                if key == KEY and is_flat(tensor):
                    continue
                name, first = f"{outer}{prefix}{key}", canonical[id(tensor)]
                names = found.setdefault(first, [])
                if name != first and name not in names and len(names) < share:
                    names.append(name)
    return {first: names for first, names in found.items() if names}
