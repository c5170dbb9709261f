"""Sinks send the numbers of every record to another tool during the training.

A sink is any function of a step and a mapping from names to numbers. Names have the form `weight_norm/fc.weight`, so
that tools group them by quantity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def tensorboard(writer: Any) -> Callable[[int, Mapping[str, float]], None]:
    """Make a sink that writes scalars to TensorBoard.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`, or any object with `add_scalar(name, value, step)`.

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
    """Make a sink that logs to Weights & Biases.

    Args:
        run: Result of `wandb.init()`, or any object with `log(numbers, step=step)`.

    >>> class Run:
    ...     def log(self, numbers, step):
    ...         print(step, numbers)
    >>> wandb(Run())(3, {"weight_norm/fc.weight": 1.5})
    3 {'weight_norm/fc.weight': 1.5}
    """

    def sink(step: int, numbers: Mapping[str, float]) -> None:
        run.log(dict(numbers), step=step)

    return sink
