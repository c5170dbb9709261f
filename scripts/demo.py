"""The session of `make demo`: inspect, freeze and train a live network, and read its checkpoint."""

from __future__ import annotations

import ast
import os
import shlex
import sys
from pathlib import Path

from torchparams.cli.app import run

SESSION = """
# A network as people write it. What is in it, and how do I reach it?
import torch, torchparams as tp
from torch import nn
_ = torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
)
print(tp.explain(model))

# One of its tensors.
print(tp.explain(model, "1.running_mean"))

# Make model.parameters a table. Called, it is PyTorch's iterator as before.
model = tp.attach(model)
print(model.parameters)
model.parameters["3.bias"] is model[3].bias
len(list(model.parameters()))

# Freeze the first layer and the batch norm, its running statistics too.
frozen = tp.freeze(model, "0.* | 1.**")
print(frozen)

# No weight decay for biases; then a PyTorch optimizer.
no_decay = tp.rule(tp.no_decay, weight_decay=0.0)
groups = tp.groups(model, no_decay, lr=0.05, weight_decay=0.01)
optimizer = torch.optim.AdamW(groups)
print(groups)

# Train for twenty steps: which of three directions does a point lie in?
x = torch.randn(300, 2)
y = (x @ torch.tensor([[1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])).argmax(1)
written = tp.save(model, "start.safetensors")
for step in range(20):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    if step % 5 == 0 or step == 19:
        norm = tp.grad_norms(model).total
        print(f"step {step:>2}  loss {loss:.3f}  gradient {norm:.3f}")

# What moved, and by how much? The frozen layers and their running statistics
# did not.
print(tp.diff("start.safetensors", model, numeric=True))

# Is anything wrong with it?
print(tp.audit(model, optimizer))

# Save it. The same table and the same questions, on the file.
written = tp.save(model, "trained.safetensors")
print(tp.of("trained.safetensors").select("3.*"))
"""
COMMANDS = ("ls trained.safetensors --tree", "stats trained.safetensors -s ':matrix'")


def main(folder: Path) -> None:
    """Show everything; `folder` is where files are written."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    show(SESSION)
    for command in COMMANDS:
        print(f"\n$ torchparams {command}", flush=True)
        if run(shlex.split(command)):
            raise SystemExit(1)
    print(
        "\nThe files are in demo/. What next?"
        "\n  docs/parameters.md                              questions about parameters"
        "\n  .venv/bin/torchparams explain FILE.py:FUNCTION  a network of yours"
        "\n  make demo-file                                  a larger checkpoint"
    )


def show(session: str) -> None:
    """Print a session and run it, as Python's own prompt would."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    lines = session.splitlines()
    shown = 0
    for node in ast.parse(session).body:
        assert node.end_lineno is not None
        for line in lines[shown : node.lineno - 1]:
            print(line)
        for number, line in enumerate(lines[node.lineno - 1 : node.end_lineno]):
            print("..." if number else ">>>", line)
        shown = node.end_lineno
        sys.stdout.flush()
        exec(compile(ast.Interactive([node]), "<demo>", "single"), namespace)


if __name__ == "__main__":
    main(Path(__file__).resolve().parents[1] / "demo")
