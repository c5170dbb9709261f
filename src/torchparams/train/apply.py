"""Apply a function in place to selected parameters."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torchparams.errors import MismatchError, NoMatch, NotReadable, OptionError, shorten
from torchparams.left_out import LeftOut, left_out_lines
from torchparams.parameters import Parameters
from torchparams.render.result import Result
from torchparams.render.rows import ROWS_SHOWN
from torchparams.render.tree import Column, Row, Table, Text, Tree, cut, filled, human_shape, plural
from torchparams.selectors import Selector
from torchparams.sources.live.sharding import is_dtensor
from torchparams.train._live import choose, refuse_codes
from torchparams.train._memory import all_or_nothing, putting_back
from torchparams.train._shards import Together, refuse_copies, refuse_flat
from torchparams.train.gradients import GradientSource

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torchparams.reading import Reading


def apply_(model: object, selector: object, function: Callable[[Any], Any]) -> Applied:
    """Call `function` with each selected parameter, under `torch.no_grad()`.

    The function may change its tensor in place, as `torch.nn.init.zeros_` does, or return new values, as
    `lambda w: w * 0.5` does; returned values are copied into the tensor. The parameters stay the same objects in the
    same memory, and autograd notices the change. A tied tensor is changed once. If the function raises, every
    parameter is restored; the old values are kept in memory until the end of the call. Then there is no undo.

    Of a sharded parameter (a DTensor), the function gets the whole as a plain tensor, on every rank, and each rank
    keeps its part of the result. All ranks of its mesh make the call: they meet, gather one parameter after the other
    (a collective each), and compare the results at the end. Parameters in FSDP1's flat parameter are refused outside of
    `summon_full_params`.

    Args:
        model: A live `nn.Module`, or a `Parameters` of one (with `buffers=True`, buffers can be selected too). Pass the
            result of `torchparams.gradients` to change gradients.
        selector: Parameters to change, strictly; None selects all of `model`.
        function: Accepts a tensor; returns None, that tensor, or a new one of the same shape.

    Returns:
        The changed parameters.

    Raises:
        NoMatch: A part of the selector matches nothing.
        NotReadable: A selected parameter has no values, because it is lazy or on the meta device; or it holds codes
            of an unknown encoding with separate scales. Nothing is changed.
        OptionError: `function` is not callable, or did not return a tensor. Nothing is changed.
        MismatchError: The function returned a tensor of a different shape. Nothing is changed.
        RanksError: A rank does not make the call; or the function gives other values there, as one that draws random
            numbers does. Nothing is changed.

    >>> import torch
    >>> import torchparams as tp
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    >>> tp.apply_(model, "**.bias", torch.nn.init.zeros_).names
    ('0.bias', '1.bias')
    >>> print(tp.apply_(model, "0.weight", lambda w: w.clamp(-0.1, 0.1)))
    Sequential: applied <lambda> to 1 tensor
    name      shape
    0.weight  [2, 2]
    """
    if not callable(function):
        raise OptionError(
            f"{shorten(repr(function))} is not a function",
            hint="call torchparams.apply_(model, selector, function)",
        )
    every: Mapping[str, Any] = {}
    reading: Reading
    left_out: tuple[LeftOut, ...] = ()
    if isinstance(model, Parameters) and isinstance(model.source, GradientSource):
        label = model.source.label
        tensors = _gradients(model, selector)
        refuse_without_values(tensors, label)
        reading = model.source.reading()
    else:
        chosen = choose(model, selector, "torchparams.apply_")
        label, every, left_out = chosen.source.label, chosen.tensors, chosen.left_out
        tensors = {name: every[name] for name in chosen.names}
        refuse_without_values(tensors, label)
        refuse_codes(chosen.source, tensors, "apply_")
        reading = chosen.reading
    refuse_copies(reading, tensors, label)
    refuse_flat(reading, tensors, label)
    import torch

    together = Together(reading, tensors, label)
    together.meet(f"apply_ {function_name(function)}")
    failed: Exception | None = None
    with torch.no_grad(), all_or_nothing() as undo:
        for name, tensor in tensors.items():
            whole = together.gather(tensor) if is_dtensor(tensor) else tensor
            if failed is not None:  # the other ranks still gather what is left
                continue
            undo.append(putting_back(tensor))
            try:
                call_in_place(function, whole, name, "apply_")
                if whole is not tensor:
                    together.put(name, tensor, whole)
            except Exception as error:
                failed = error
        together.agree(failed)
        notes = [NOTHING_PASSES] if every and _all_zero(every, tensors) else []
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Applied(label, function_name(function), shapes, left_out, tuple(notes))


NOTHING_PASSES = (
    "Every weight matrix is zero now: the output does not depend on the input. While the biases are zero too, no "
    "weight gets a gradient, and training cannot start. Gradients are zeroed by optimizer.zero_grad()."
)
"""Note for a model whose weights are all zero."""


def _gradients(table: Parameters, selector: object) -> dict[str, Any]:
    """Selected gradients by name.

    Raises:
        NoMatch: There are no gradients, or a part of the selector matches nothing.
    """
    reading = table.reading()
    gradients = reading.tensors or {}
    if not gradients:
        raise NoMatch("there are no gradients", where=table.source.label, hint=" ".join(table.source.why_empty()))
    if selector is None:
        return dict(gradients)
    hits = Selector.of(selector).names(reading, strict=True, where=table.source.label)
    return {name: gradient for name, gradient in gradients.items() if name in hits}


def _all_zero(every: Mapping[str, Any], changed: Mapping[str, Any]) -> bool:
    """True if the model has at least two matrices and a change made all of them zero."""
    if any(map(is_dtensor, changed.values())):
        return False  # no rank has all of their values
    matrices = [name for name, tensor in every.items() if tensor.ndim >= 2 and tensor.numel()]
    if len(matrices) < 2 or not all(name in changed for name in matrices):
        return False
    kinds = {every[name].dtype for name in matrices}
    if not all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in kinds):
        return False
    return not any(bool(every[name].any()) for name in matrices)  # usually stops at the first


def call_in_place(function: Callable[..., Any], tensor: Any, name: str, verb: str, **options: Any) -> None:
    """Let `function` change `tensor`, in place or by its return value.

    Raises:
        OptionError: It did not return a tensor.
        MismatchError: It returned a tensor of a different shape.
    """
    import torch

    try:
        result = function(tensor, **options)
    except Exception as error:
        error.add_note(f"torchparams.{verb}: at {name}, {human_shape(tuple(tensor.shape))}; nothing was changed")
        raise
    if result is None or result is tensor:
        return
    if not isinstance(result, torch.Tensor):
        raise OptionError(
            f"the function {function_name(function)} returned {shorten(repr(result))} for {name}",
            hint="change the tensor in place, or return a tensor of new values",
        )
    if result.shape != tensor.shape:
        raise MismatchError(
            f"the function {function_name(function)} returned the shape {human_shape(tuple(result.shape))} for {name}",
            exists=f"its shape is {human_shape(tuple(tensor.shape))}",
        )
    tensor.copy_(result)


def refuse_without_values(tensors: Mapping[str, Any], where: str, *, meta: bool = False) -> None:
    """Refuse tensors that are lazy or, unless `meta`, on the meta device.

    Raises:
        NotReadable: A tensor has no values.
    """
    from torch.nn.parameter import is_lazy

    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise NotReadable(
                f"{name!r} is lazy: it has no shape or values yet",
                where=where,
                hint="run the model once to set its shape",
            )
        if not meta and tensor.device.type == "meta":
            raise NotReadable(
                f"{name!r} is on the meta device, which holds no values",
                where=where,
                hint="give it memory first: torchparams.init does, and so does model.to_empty(device='cpu')",
            )


def function_name(function: object) -> str:
    """Name of a function to show, such as `kaiming_normal_(a=0.1)`.

    >>> import functools
    >>> function_name(functools.partial(max, key=len))
    'max(key=<built-in function len>)'
    """
    if isinstance(function, functools.partial):
        given = [*map(repr, function.args), *(f"{key}={value!r}" for key, value in function.keywords.items())]
        return f"{function_name(function.func)}({', '.join(given)})"
    return getattr(function, "__name__", None) or type(function).__name__


class Applied(Result):
    """Result of `apply_`.

    Attributes:
        label: The model.
        function: Name of the function.
        shapes: Name → shape of each changed tensor, in the model's order.
        left_out: State of the selected modules outside their parameters and buffers; not changed.
        notes: Possibly surprising consequences of the change.
    """

    def __init__(
        self,
        label: str,
        function: str,
        shapes: dict[str, tuple[int, ...]],
        left_out: tuple[LeftOut, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        self.notes = notes
        self.label = label
        self.left_out = left_out
        self.function = function
        self.shapes = shapes

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the changed tensors, in the model's order."""
        return tuple(self.shapes)

    def tree(self, *, limit: int | None = ROWS_SHOWN) -> Tree:
        """Tree of the changed tensors.

        Args:
            limit: Maximum number of tensors to list; None for all.
        """
        rows = [Row((name, human_shape(shape))) for name, shape in self.shapes.items()]
        columns = Column("name", style="name", shrink=True), Column("shape")
        title = f"{self.label}: applied {self.function} to {plural(len(rows), 'tensor')}"
        table = Table(columns, cut(rows, limit, "tensors"))
        notes = (Text(filled(note), "warn") for note in self.notes)
        return Tree((Text(title, "title"), table, *left_out_lines(self.left_out), *notes))

    def to_json(self) -> dict[str, Any]:
        """The change as JSON data."""
        beside = [each.to_json() for each in self.left_out]
        return {
            "function": self.function,
            "names": list(self.names),
            "left_out": beside,
            "notes": list(self.notes),
        }
