"""Rules about gradients, after a backward pass."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torchparams._selector.candidates import is_bias
from torchparams.lint.findings import AuditRule, Hit
from torchparams.names import common
from torchparams.render.tree import plural

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchparams.lint.context import Context, Member


def _none(context: Context) -> Iterator[Hit]:
    if not context.gradients:
        return  # before backward(), or after zero_grad()
    those = {entry.name for entry, _ in context.gradients}
    without = [entry for entry in context.parameters if entry.tensor.requires_grad and entry.name not in those]
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
"""Levels above a layer, its branch and its block, in which a gate that is still zero explains a zero gradient."""


def _gated(context: Context) -> set[str]:
    """Paths of modules with a gate: a zero weight with a gradient, as initialised before the first step.

    If the gate is a direct child of the network, as heads often are, the network itself is included.
    """
    paths: set[str] = set()
    for entry, gradient in context.gradients:
        if context.extremes.get(id(entry.tensor)) == (0.0, 0.0) and not is_bias(entry.name):
            pair = context.gradient_extremes.get(id(gradient))
            if pair is not None and pair != (0.0, 0.0):
                paths.update(_around(entry.path, len(entry.name)) or [""])
    return paths


def _around(path: str, levels: int) -> list[str]:
    """Paths of the modules above, nearest first, without the network itself."""
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
        what = f"{plural(len(bad), 'gradient is', 'gradients are')} not finite, the first in {bad[0].name}"
        if len(bad) > 1:
            what += f" and the last in {bad[-1].name}, which backward reached first"
        fix = "optimizer.zero_grad()  # skip this step\ntorch.autograd.set_detect_anomaly(True)  # names the operation"
        yield _hit(bad, what, fix)


def _hit(entries: list[Member], what: str, fix: str) -> Hit:
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
    AuditRule(
        "G101",
        "no-gradient",
        "warning",
        "A trainable parameter without a gradient, while others have one",
        "the loss does not depend on it: it is not trained, and distributed training waits for it",
        _none,
        _NET + "        return self.fc(x)\n" + _RUN,
        _NET + "        return self.fc(x) + self.spare(x)\n" + _RUN,
        "Gradient rules run only if at least one parameter has a gradient: after `backward()` and before "
        "`zero_grad()`.",
    ),
    AuditRule(
        "G102",
        "zero-gradient",
        "warning",
        "A gradient that is zero in every element",
        "the step does not change it: a layer between it and the loss is dead, saturated or zero",
        _zero,
        "model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))\n"
        "nn.init.constant_(model[0].bias, -100.0)\nmodel(torch.ones(1, 4)).sum().backward()\n",
        "model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))\n"
        "nn.init.constant_(model[0].bias, 100.0)\nmodel(torch.ones(1, 4)).sum().backward()\n",
        "Layers before a zero-initialised layer (LoRA's second matrix, the last norm of a residual branch) have a zero "
        "gradient in the first step only. So there is no finding if a weight of the same block, or of the head, is "
        "still zero and has a gradient.",
    ),
    AuditRule(
        "G103",
        "non-finite-gradient",
        "error",
        "A gradient with NaN or infinite values",
        "one step with it makes the parameter NaN permanently",
        _non_finite,
        "model = nn.Linear(4, 2)\n(model(torch.ones(1, 4)).sum() * float('inf')).backward()\n",
        "model = nn.Linear(4, 2)\nmodel(torch.ones(1, 4)).sum().backward()\n",
        "With a `GradScaler` this is expected occasionally, and `scaler.step()` skips the step: audit after "
        "`scaler.unscale_()`.",
    ),
)
