"""Sinks hand the numbers of every record to another tool while the training runs.

A sink is any function of a step and a mapping from names to numbers. Names are `weight_norm/fc.weight`, so that tools
group them by the quantity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def tensorboard(writer: Any) -> Callable[[int, Mapping[str, float]], None]:
    """A sink that writes scalars to TensorBoard.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`, or anything with its `add_scalar(name, value, step)`.

    >>> class Writer:
    ...     def add_scalar(self, name, value, step):
    ...         print(step, name, value)
    >>> tensorboard(Writer())(3, {"weight_norm/fc.weight": 1.5})
    3 weight_norm/fc.weight 1.5
    """

    def sink(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return sink


def wandb(run: Any) -> Callable[[int, Mapping[str, float]], None]:
    """A sink that logs to Weights & Biases.

    Args:
        run: What `wandb.init()` gives, or anything with its `log(numbers, step=step)`.

    >>> class Run:
    ...     def log(self, numbers, step):
    ...         print(step, numbers)
    >>> wandb(Run())(3, {"weight_norm/fc.weight": 1.5})
    3 {'weight_norm/fc.weight': 1.5}
    """

    def sink(step: int, numbers: Mapping[str, float]) -> None:
        run.log(dict(numbers), step=step)

    return sink
