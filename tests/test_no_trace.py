"""Reading does not change a live model."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import torchparams as tp

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.brain = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.eighth = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)
        self.strided = nn.Parameter(torch.randn(4, 4).T)
        self.complex = nn.Parameter(torch.randn(3, dtype=torch.complex64).conj())
        self.head = nn.Linear(4, 6, bias=False)
        tied: Any = self.embed.weight
        self.head.weight = tied
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def net() -> Net:
    model = Net()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter.detach().resolve_conj())
    return model


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    made = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    made.step()
    return made


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    grads = {f"{name}.grad": tensor.grad for name, tensor in found.items() if tensor.grad is not None}
    return {**found, **grads}


def state(model: nn.Module) -> dict[str, Any]:
    return {
        name: (
            id(tensor),
            id(tensor.grad),
            tensor._version,
            tensor.requires_grad,
            tensor.untyped_storage().resizable(),
            tensor.data_ptr(),
            tensor.is_conj(),
            tensor.detach().resolve_conj().clone().reshape(-1).view(torch.uint8).tolist(),
        )
        for name, tensor in tensors_of(model).items()
    }


READING: dict[str, Callable[[Any, Path], object]] = {
    "of": lambda model, folder: [params.numpy(name) for params in [tp.of(model, buffers=True)] for name in params],
    "of a state dict": lambda model, folder: [
        params.numpy(name) for params in [tp.of(model.state_dict())] for name in params
    ],
    "records": lambda model, folder: (tp.of(model, buffers=True).infos, list(tp.of(model).items())),
    "tensors": lambda model, folder: [tp.of(model).source.tensor(name) for name in tp.of(model)],
    "ls": lambda model, folder: (str(tp.ls(model, tree=True, buffers=True)), tp.ls(model).to_json()),
    "show": lambda model, folder: [str(tp.show(model, name)) for name in tp.of(model, buffers=True)],
    "stats": lambda model, folder: str(tp.stats(model, buffers=True)),
    "spectra": lambda model, folder: str(tp.spectra(model)),
    "diff": lambda model, folder: str(tp.diff(model, net())),
    "report": lambda model, folder: tp.report(model, folder / "r.html", other=net(), pictures="fc.*", buffers=True),
    "diff of values": lambda model, folder: str(tp.diff(model, net(), numeric=True)),
    "digest": lambda model, folder: str(tp.digest(model)),
    "duplicates": lambda model, folder: str(tp.duplicates(model, model.state_dict())),
    "verify": lambda model, folder: str(tp.verify(model, tp.digest(net()))),
    "audit": lambda model, folder: str(tp.audit(model)),
    "explain": lambda model, folder: str(tp.explain(model)),
    "gradients": lambda model, folder: [
        (str(tp.stats(grads)), [grads.numpy(name) for name in grads]) for grads in [tp.gradients(model)]
    ],
    "grad_norms": lambda model, folder: str(tp.grad_norms(model, by="[ndim=2]")),
    "coverage": lambda model, folder: str(tp.coverage(model, net().state_dict())),
    "load": lambda model, folder: tp.load(net(), model),
    "groups": lambda model, folder: str(tp.groups(model, tp.rule(tp.no_decay, weight_decay=0.0), lr=0.1)),
    "penalty": lambda model, folder: tp.penalty(model, "fc.*"),
    "Penalty": lambda model, folder: tp.Penalty(model, "fc.*", toward=model)(),
    "convert": lambda model, folder: tp.convert(model, folder / "a.pt", dtype={"fc.*": "fp16"}).run(),
    "save": lambda model, folder: tp.save(model, folder / "a.safetensors"),
    "delta": lambda model, folder: tp.delta(model, net(), folder / "d.safetensors").run(),
    "merge": lambda model, folder: tp.merge([model, net()], folder / "m.safetensors", "fc.*").run(),
    "extract_lora": lambda model, folder: tp.extract_lora(model, net(), folder / "lora", "fc.weight", rank=1).run(),
    "apply_delta": lambda model, folder: (
        tp.save(net(), folder / "d.safetensors", base=model),
        tp.apply_delta(model, folder / "d.safetensors", folder / "e.safetensors").run(),
    ),
}
"""Every verb that reads a model, called on one. `optimizer_state` has a test of its own."""

CHANGING = {"apply_", "attach", "detach", "freeze", "init", "load_optimizer_state", "unfreeze"}
ELSEWHERE = {"catalog", "diagnose", "fold_lora", "history", "optimizer_state", "repair_index", "rule", "no_decay"}
"""They take no model, or no model alone."""


@pytest.mark.parametrize("verb", READING)
def test_reading_leaves_no_trace(verb: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = net()
    before = state(model)
    READING[verb](model, tmp_path)
    assert state(model) == before


def test_the_state_of_an_optimizer_is_read_without_a_trace(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    model(torch.ones(1, 3)).sum().backward()
    steps = optimizer(model)
    before, moments = state(model), [entry["momentum_buffer"] for entry in steps.state.values()]
    found = tp.optimizer_state(model, steps)
    str(found), str(tp.stats(found.state)), tp.save(found, tmp_path / "o.safetensors")
    assert state(model) == before
    assert all(moment.untyped_storage().resizable() for moment in moments)


def test_every_verb_is_in_one_of_the_lists() -> None:
    verbs = {name for name in tp.__all__ if inspect.isfunction(getattr(tp, name))}
    listed = {verb for verb in READING if verb in verbs} | CHANGING | ELSEWHERE
    assert verbs == (listed & verbs) | {"of"}


def test_an_array_outlives_the_memory_that_it_was_read_from() -> None:
    model = nn.Linear(64, 64)
    model(torch.ones(1, 64)).sum().backward()
    tables = tp.of(model), tp.of(model.state_dict()), tp.gradients(model)
    arrays = [table.numpy("weight") for table in tables]
    expected = [model.weight.tolist(), model.weight.tolist(), model.weight.grad.tolist()]  # type: ignore[union-attr]
    for tensor in (model.weight, model.weight.grad):
        assert tensor is not None
        tensor.untyped_storage().resize_(0)
    assert [array.tolist() for array in arrays] == expected
