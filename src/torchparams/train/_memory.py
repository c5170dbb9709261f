"""What verbs that change a model's tensors do or leave undone as a whole: giving memory, and putting values back."""

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
    """Run what stands in the list, the last first, if the block raises.

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
    """A function that gives a tensor the values that it has now."""
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
    """Give tensors that are lazy or on the meta device memory; all of them or none. Each stays the object that it is.

    Args:
        tensors: The tensors by name.
        device: Where; torch's default device unless given, and the CPU where that is the meta device.
        shapes: Name → shape, of lazy ones at least.
        where: What an error calls the model.

    Returns:
        A function that takes the memory away again.

    Raises:
        OptionError: The device is none that has memory.
        NotReadable: Something else refers to the insides of a tensor.
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
                    f"{name} cannot be moved from the meta device: {error}",
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
        raise OptionError(f"device={shorten(repr(device))} is no device: {str(error).splitlines()[0]}") from None
    if given.type == "meta":
        raise OptionError("device='meta' has no memory to give", hint="give 'cpu', or an accelerator")
    return given


def _swap(tensor: torch.Tensor, device: torch.device) -> Callable[[], None]:
    import torch

    new: Any = torch.empty_like(tensor.detach(), device=device)
    if isinstance(tensor, torch.nn.Parameter):
        new = torch.nn.Parameter(new, tensor.requires_grad)
    if type(new) is not type(tensor):
        new.__class__ = type(tensor)
    # Everything is swapped, and so are attributes that somebody has set on the tensor.
    vars(new).update(vars(tensor))
    torch.utils.swap_tensors(tensor, new)  # type: ignore[no-untyped-call]  # torch does not say
    return lambda: torch.utils.swap_tensors(tensor, new)  # type: ignore[no-untyped-call]  # as above


def _materialise(tensor: Any, shape: tuple[int, ...], device: torch.device) -> Callable[[], None]:
    cls, data = type(tensor), tensor.data
    # One on the meta device takes no memory of another: it gets it as the others there do.
    tensor.materialize(shape, device=tensor.device if tensor.device.type == "meta" else device)

    def take_away() -> None:
        tensor.data = data
        tensor.__class__ = cls

    return take_away
