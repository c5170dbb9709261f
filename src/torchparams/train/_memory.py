"""All-or-nothing changes of a model's tensors: allocate memory, restore values."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torchparams.errors import NotReadable, OptionError, shorten
from torchparams.sources.live.tensors import dispatches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch


@contextmanager
def all_or_nothing() -> Iterator[list[Callable[[], None]]]:
    """Run the functions in the list, last first, if the block raises.

    >>> with all_or_nothing() as undo:
    ...     undo.append(lambda: print("undone"))
    """
    undo: list[Callable[[], None]] = []
    try:
        yield undo
    except BaseException:  # Ctrl-C too
        for step in reversed(undo):
            step()
        raise


def putting_back(tensor: torch.Tensor) -> Callable[[], None]:
    """Return a function that restores the tensor's current values."""
    import torch

    values = tensor.detach().clone()
    held = tensor.data if tensor.layout is torch.strided and not dispatches(type(tensor)) else None

    def put_back() -> None:
        with torch.no_grad():
            if held is not None and not tensor.is_set_to(held):
                tensor.data = held
            tensor.copy_(values)

    return put_back


def give_memory(
    tensors: Mapping[str, torch.Tensor],
    device: torch.device | str | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    where: str | None = None,
) -> Callable[[], None]:
    """Allocate memory for tensors that are lazy or on the meta device, all or none. Each stays the same object.

    Args:
        tensors: The tensors by name.
        device: Device of the memory; by default torch's default device, or the CPU if that is the meta device.
        shapes: Name → shape, for lazy tensors at least.
        where: Label of the model in errors.

    Returns:
        A function that frees the memory again.

    Raises:
        OptionError: The device is invalid or has no memory.
        NotReadable: A tensor cannot be swapped, because other objects refer to its internals.
    """
    from torch.nn.parameter import is_lazy

    on = _device(device)
    with all_or_nothing() as undo:
        for name, tensor in tensors.items():
            if is_lazy(tensor):
                undo.append(_materialise(tensor, (shapes or {})[name], on))
            if tensor.device.type != "meta":
                continue
            try:
                undo.append(_swap(tensor, on))
            except RuntimeError as error:
                raise NotReadable(
                    f"{name!r} cannot be moved from the meta device: {error}",
                    where=where,
                    exists="nothing was changed",
                    hint="call model.to_empty(device='cpu') first, before an optimizer is made",
                ) from None

    def take_away() -> None:
        for step in reversed(undo):
            step()

    return take_away


def _device(device: torch.device | str | None) -> torch.device:
    import torch

    if device is None:
        default = torch.get_default_device()
        return torch.device("cpu") if default.type == "meta" else default
    try:
        given = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"device={shorten(repr(device))} is not a device: {str(error).splitlines()[0]}") from None
    if given.type == "meta":
        raise OptionError("device='meta' has no memory", hint="pass 'cpu' or an accelerator")
    return given


def _swap(tensor: torch.Tensor, device: torch.device) -> Callable[[], None]:
    import torch

    new: Any = torch.empty_like(tensor.detach(), device=device)
    if isinstance(tensor, torch.nn.Parameter):
        new = torch.nn.Parameter(new, tensor.requires_grad)
    if type(new) is not type(tensor):
        new.__class__ = type(tensor)
    # swap_tensors swaps __dict__ too, so copy the attributes set on the tensor.
    vars(new).update(vars(tensor))
    torch.utils.swap_tensors(tensor, new)  # type: ignore[no-untyped-call]  # torch does not say
    return lambda: torch.utils.swap_tensors(tensor, new)  # type: ignore[no-untyped-call]  # as above


def _materialise(tensor: Any, shape: tuple[int, ...], device: torch.device) -> Callable[[], None]:
    cls, data = type(tensor), tensor.data
    # A lazy tensor on the meta device is materialised there. _swap gives it memory later.
    tensor.materialize(shape, device=tensor.device if tensor.device.type == "meta" else device)

    def take_away() -> None:
        tensor.data = data
        tensor.__class__ = cls

    return take_away
