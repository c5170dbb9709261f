"""What can be wrong with gradients, after a backward pass."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torchparams._selector.table import is_bias
from torchparams.lint.findings import Hit, Rule
from torchparams.names import common
from torchparams.render.tree import plural

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchparams.lint.context import Context, Entry


def _none(context: Context) -> Iterator[Hit]:
    if not context.gradients:
        return  # nothing was run backward, or the gradients are already cleared
    without = [e for e in context.parameters if e.tensor.requires_grad and e.tensor.grad is None]
    if without:
        what = f"{plural(len(without), 'trainable parameter')} got no gradient, and {len(context.gradients):,} did"
        fix = "tp.freeze(model, …)  # unless forward() should use it, outside of no_grad() and detach()"
        yield _hit(without, what, fix)


def _zero(context: Context) -> Iterator[Hit]:
    extremes = context.gradient_extremes
    zero = [e for e, grad in context.gradients if e.tensor.requires_grad and extremes.get(id(grad)) == (0.0, 0.0)]
    if zero:
        gated = _gated(context)
        zero = [entry for entry in zero if not gated.intersection(("", *_around(entry.path, LEVELS)))]
    if zero:
        what = f"{plural(len(zero), 'gradient is', 'gradients are')} zero in every element"
        yield _hit(zero, what, "tp.grad_norms(model)  # shows where the gradient ends")


LEVELS = 2
"""Modules above a layer in which a gate that is still zero explains its zero gradient: its branch, and its block."""


def _gated(context: Context) -> set[str]:
    """Paths of the modules with a weight that is zero and about to move: initialised so, for the first step only.

    A layer of the network itself, its head mostly, stands behind everything: then the network is among them.
    """
    paths: set[str] = set()
    for entry, gradient in context.gradients:
        if context.extremes.get(id(entry.tensor)) == (0.0, 0.0) and not is_bias(entry.name):
            pair = context.gradient_extremes.get(id(gradient))
            if pair is not None and pair != (0.0, 0.0):
                paths.update(_around(entry.path, len(entry.name)) or [""])
    return paths


def _around(path: str, levels: int) -> list[str]:
    """The paths of the modules above, the nearest first; the network itself is none of them."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, max(0, len(parts) - 1 - levels), -1)]


def _non_finite(context: Context) -> Iterator[Hit]:
    extremes = context.gradient_extremes
    bad = []
    for entry, grad in context.gradients:
        pair = extremes.get(id(grad))
        if pair is not None and not (math.isfinite(pair[0]) and math.isfinite(pair[1])):
            bad.append(entry)
    if bad:
        what = f"{plural(len(bad), 'gradient is', 'gradients are')} not finite, the first is that of {bad[0].name}"
        if len(bad) > 1:
            what += f" and the last that of {bad[-1].name}, where backward came first"
        fix = "optimizer.zero_grad()  # skip this step\ntorch.autograd.set_detect_anomaly(True)  # names the operation"
        yield _hit(bad, what, fix)


def _hit(entries: list[Entry], what: str, fix: str) -> Hit:
    return Hit(tuple(entry.name for entry in entries), what, fix, common(entry.path for entry in entries))


_NET = """\
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.spare = nn.Linear(4, 2)

    def forward(self, x):
"""
_RUN = "\nmodel = Net()\nmodel(torch.ones(1, 4)).sum().backward()\n"

RULES = (
    Rule(
        "G101",
        "no-gradient",
        "warning",
        "A trainable parameter without a gradient, where others have one",
        "the loss does not depend on it: it is not trained, and distributed training waits for it",
        _none,
        _NET + "        return self.fc(x)\n" + _RUN,
        _NET + "        return self.fc(x) + self.spare(x)\n" + _RUN,
        "The rules about gradients look only where at least one parameter has a gradient: after `backward()`, before "
        "`zero_grad()`.",
    ),
    Rule(
        "G102",
        "zero-gradient",
        "warning",
        "A gradient that is zero in every element",
        "the step does not move it: something between it and the loss is dead, saturated or zero",
        _zero,
        "model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))\n"
        "nn.init.constant_(model[0].bias, -100.0)\nmodel(torch.ones(1, 4)).sum().backward()\n",
        "model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))\n"
        "nn.init.constant_(model[0].bias, 100.0)\nmodel(torch.ones(1, 4)).sum().backward()\n",
        "What stands before a zero-initialised layer (LoRA's second matrix, the last norm of a residual branch) has a "
        "zero gradient in the first step, and only in that. So nothing is said where a weight of the same block, or of "
        "the head, is still zero and has a gradient itself.",
    ),
    Rule(
        "G103",
        "non-finite-gradient",
        "error",
        "A gradient with NaN or infinite values",
        "one step with it makes the parameter NaN for ever",
        _non_finite,
        "model = nn.Linear(4, 2)\n(model(torch.ones(1, 4)).sum() * float('inf')).backward()\n",
        "model = nn.Linear(4, 2)\nmodel(torch.ones(1, 4)).sum().backward()\n",
        "With a `GradScaler` this is expected now and then, and `scaler.step()` skips the step: look after "
        "`scaler.unscale_()`.",
    ),
)
