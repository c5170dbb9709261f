"""Parameters of models wrapped by FSDP: slices of flat parameters, and temporary copies.

`FullyShardedDataParallel` (FSDP1) concatenates the parameters of a module into a flat parameter, and each rank keeps an
equal slice. With `use_orig_params=True`, the modules hold views of the slice, which are one-dimensional or empty;
without it, they hold no parameters at all. `fully_shard` (FSDP2) replaces DTensors by plain copies while it computes.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torchparams.errors import NotReadable
from torchparams.expressions.sharded import Box, Layout
from torchparams.info import Sharding
from torchparams.names import strip_wrappers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

KEY = "_flat_param"
"""Name under which `FullyShardedDataParallel` registers a flat parameter."""

_PART = "_torchparams_part"  # attribute of a view of a flat parameter


class FlatPart:
    """One parameter in a flat parameter.

    Args:
        handle: FSDP handle of the flat parameter.
        place: Index of the parameter in it.
    """

    def __init__(self, handle: Any, place: int) -> None:
        self._handle, self._place = handle, place

    @property
    def group(self) -> int:
        """Equal for the parameters of one flat parameter."""
        return id(self._handle)

    @property
    def group_parameter(self) -> int:
        """`id` of the flat parameter."""
        return id(self._handle.flat_param)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return tuple(self._handle.flat_param._shapes[self._place])

    def sharding(self) -> Sharding:
        """Current sharding of the parameter."""
        flat, ranks = self._handle.flat_param, _ranks(self._handle)
        if self._handle.uses_sharded_strategy and not self._handle.is_sharded(flat):
            return _copy(ranks, flat)
        first, last = self._here()
        count = last - first
        return Sharding("FSDP1", ("Flat",), (len(ranks),), ranks, (count,), count * flat.element_size(), self)

    def layout(self, name: str, label: str) -> Layout:
        """Which elements each rank keeps.

        Raises:
            NotReadable: The parameter is a DTensor inside the flat parameter.
        """
        flat = self._handle.flat_param
        if flat._param_extensions[self._place] is not None:
            raise NotReadable(
                f"{name!r} is a DTensor within a flat parameter of FullyShardedDataParallel",
                where=label,
                hint="use fully_shard instead",
            )
        begin, size = self._begin(), flat._numels[self._place]
        boxes = {}
        for number, rank in enumerate(_ranks(self._handle)):
            first, last = 0, size
            if self._handle.uses_sharded_strategy:
                run = flat._sharded_size.numel()
                first, last = (min(max((number + i) * run - begin, 0), size) for i in (0, 1))
            boxes[rank] = Box((first,), (last - first,))
        return Layout((size,), tuple(sorted(boxes)), boxes)

    def _begin(self) -> int:
        """Offset in the flat parameter, in elements; there is padding between some parameters."""
        flat = self._handle.flat_param
        at = 0
        numbers = iter(range(len(flat._numels)))
        for size, is_padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
            if not is_padding and next(numbers) == self._place:
                return at
            at += size
        raise AssertionError("a flat parameter lists each of its parameters")

    def _here(self) -> tuple[int, int]:
        """Slice of this rank's part of the flat parameter that belongs to this parameter."""
        flat = self._handle.flat_param
        if not self._handle.is_sharded(flat):
            begin = self._begin()
            return begin, begin + flat._numels[self._place]
        found = flat._shard_param_infos[self._place]
        return (found.offset_in_shard, found.offset_in_shard + found.numel_in_shard) if found.in_shard else (0, 0)

    def gradient(self, parameter: Any) -> Any:
        """The part of its gradient that this rank has, which may be empty; None where no rank has a gradient.

        Args:
            parameter: The parameter that a module holds for it.
        """
        if parameter.grad is not None:
            return parameter.grad
        flat = self._handle.flat_param
        unused = getattr(flat, "_is_grad_none_mask", None)
        if flat.grad is None or (unused is not None and unused[self._place]):
            return None
        # `zero_grad` clears the gradients of the parts; FSDP clears its own at the next forward pass.
        parts = [part for part in flat._params or () if part.numel()]
        if parameter.numel() or (parts and all(part.grad is None for part in parts)):
            return None
        return flat.grad.reshape(-1)[:0]

    def view(self) -> Any:
        """A parameter that shows the part on this rank, for models whose modules hold none."""
        import torch

        flat = self._handle.flat_param
        first, last = self._here()
        made = torch.nn.Parameter(flat.detach()[first:last], requires_grad=flat.requires_grad)
        if flat.grad is not None and flat.grad.shape == flat.shape:
            made.grad = flat.grad[first:last]
        return made


def _ranks(handle: Any) -> tuple[int, ...]:
    import torch.distributed as dist

    return tuple(dist.get_process_group_ranks(handle.process_group))


def add_parts(
    root: nn.Module, flat: Any, prefix: str, names: list[str], tensors: list[Any], owners: list[nn.Module]
) -> Iterator[list[str]]:
    """Add the parameters in a flat parameter to a listing, and yield the names of each.

    Args:
        root: The model.
        flat: The flat parameter.
        prefix: Canonical prefix of the module that holds the flat parameter.
        names, tensors, owners: The listing.
    """
    handles = (vars(module).get("_handle") for module in all_modules(root))
    handle = next(each for each in handles if each is not None and each.flat_param is flat)
    for place, (name, info) in enumerate(zip(flat._fqns, flat._param_infos, strict=True)):
        part = FlatPart(handle, place)
        view = part.view()
        setattr(view, _PART, part)
        names.append(prefix + strip_wrappers(name))
        tensors.append(view)
        owners.append(info.module)
        tied = (
            f"{other.module_name}.{other.param_name}".removeprefix(".")
            for other in flat._shared_param_infos
            if other.prim_module is info.module and other.prim_param_name == info.param_name
        )
        yield [names[-1], *(prefix + strip_wrappers(path) for path in tied)]


def is_view(tensor: Any) -> bool:
    """Whether a parameter was made to show a part of a flat parameter: no module holds it."""
    return getattr(tensor, _PART, None) is not None


def is_flat(tensor: Any) -> bool:
    """Whether a parameter is a flat parameter of FSDP1."""
    return hasattr(tensor, "_param_infos") and hasattr(tensor, "_fqns")


def shardings(modules: Iterable[nn.Module], tensors: Iterable[Any]) -> list[Sharding | None] | None:
    """The sharding of each live tensor; None if FSDP wraps none of the modules.

    If FSDP is not imported, the modules are not examined.

    Args:
        modules: Modules, including those that FSDP wraps.
        tensors: Parameters and buffers of the modules.
    """
    one = getattr(sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel"), "FullyShardedDataParallel", ())
    two = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    wrapped = [module for module in modules if isinstance(module, (one, two))] if (one, two) != ((), ()) else []
    if not wrapped:
        return None
    found: dict[int, Sharding] = {}
    for module in wrapped:
        found.update(_of_flat(module) if isinstance(module, one) else _of_copies(module))
    made: list[Sharding | None] = []
    for tensor in tensors:
        part = getattr(tensor, _PART, None)
        made.append(found.get(id(tensor)) if part is None else part.sharding())
    return made


def all_modules(root: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model, each once."""
    seen, todo = {id(root)}, [root]
    for module in todo:  # grows during the loop
        yield module
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                todo.append(child)


def stand_ins(modules: Iterable[nn.Module], tensors: Iterable[Any]) -> dict[int, list[Any]]:
    """Tensors of a model in whose place an optimizer holds another tensor, by the `id` of that.

    An optimizer holds a flat parameter in the place of its parts, and the DTensor in the place of the copy that FSDP
    gathered for a forward pass.

    Args:
        modules: Modules, including those that FSDP wraps.
        tensors: Parameters of the modules.
    """
    found: dict[int, list[Any]] = {}
    for tensor in tensors:
        part = getattr(tensor, _PART, None)
        if part is not None:
            found.setdefault(part.group_parameter, []).append(tensor)
    two = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    for module in modules if two else ():
        if isinstance(module, two):
            for parameter in _gathered(module):
                found[id(parameter.sharded_param)] = [parameter._unsharded_param]
    return found


def _of_flat(module: Any) -> Iterator[tuple[int, Sharding]]:
    handle = vars(module).get("_handle")
    parameters = None if handle is None else handle.flat_param._params
    if parameters is None or not handle.uses_sharded_strategy:
        return
    if handle.is_sharded(handle.flat_param):
        for place, parameter in enumerate(parameters):
            yield id(parameter), FlatPart(handle, place).sharding()
    elif handle._training_state.name != "SUMMON_FULL_PARAMS":
        for parameter in parameters:
            yield id(parameter), _copy(_ranks(handle), parameter)


def _of_copies(module: Any) -> Iterator[tuple[int, Sharding]]:
    import torch.distributed as dist

    for parameter in _gathered(module):
        copy = parameter._unsharded_param
        ranks = tuple(dist.get_process_group_ranks(parameter.mesh_info.shard_process_group))
        yield id(copy), _copy(ranks, copy)


def _gathered(module: Any) -> Iterator[Any]:
    """FSDP2's records of the parameters of a module that are gathered now."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for group in groups:
        for parameter in () if group is None else group.fsdp_params:
            if parameter.sharded_state.name == "UNSHARDED":
                yield parameter


def _copy(ranks: tuple[int, ...], tensor: Any) -> Sharding:
    nbytes = tensor.numel() * tensor.element_size()
    return Sharding("unsharded", ("Replicate()",), (len(ranks),), ranks, tuple(tensor.shape), nbytes)


def refuse_part(modules: Iterable[nn.Module], tensor: Any, name: str, label: str) -> None:
    """Raise if a tensor is only a part of a parameter, or a copy that FSDP frees again.

    Args:
        modules: The modules on the path to it, or all modules.
        tensor, name: The tensor.
        label: The model.

    Raises:
        NotReadable: The tensor is such a part or copy.
    """
    found = (shardings(modules, [tensor]) or [None])[0]
    if found is not None:
        raise NotReadable(unsharded(name) if found.kind == "unsharded" else flat_part(name), where=label, hint=RESHARD)


def flat_part(name: str) -> str:
    """Message for a part of a flat parameter."""
    return f"{name!r} is in a flat parameter of FullyShardedDataParallel, and this rank holds only a part of it"


def unsharded(name: str) -> str:
    """Message for a parameter that FSDP has gathered for a forward pass."""
    return f"{name!r} is a temporary copy that FSDP gathered for a forward pass"


RESHARD = (
    "use FullyShardedDataParallel.summon_full_params(model); with fully_shard, call reshard() on the modules first"
)
