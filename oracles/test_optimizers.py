"""For optimizers of timm and bitsandbytes, training continues with the same bits as after torch's `load_state_dict`."""

from __future__ import annotations

import copy
import inspect
import random
from typing import TYPE_CHECKING, Any

import accelerate
import bitsandbytes
import pytest
import timm.optim
import torch
from torch import nn

import torchparams as tp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small take many times as long on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """A small network whose first weight is more than one block of bitsandbytes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 40)
        self.second = nn.Linear(40, 3)

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.tanh(self.first(x_BI)))
        return out


def step(model: nn.Module, optimizer: Any, number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    inputs = torch.randn(4, 8)
    optimizer.zero_grad()
    second_order = bool(getattr(optimizer, "is_second_order", False))
    (model(inputs) - 1).pow(2).mean().backward(create_graph=second_order)
    optimizer.step()
    optimizer.zero_grad()


def reseed(*optimizers: Any) -> None:
    """Random streams are no part of what an optimizer saves; torch's own loading leaves them alone too."""
    for optimizer in optimizers:
        for inner in (optimizer, *(value for value in vars(optimizer).values() if hasattr(value, "param_groups"))):
            if hasattr(inner, "rng"):
                inner.rng = random.Random(7)
            if hasattr(inner, "generator"):
                inner.generator.manual_seed(7)


def copied(model: nn.Module) -> nn.Module:
    """The same values with no gradients, whose graph a copy would not take."""
    other = Net()
    other.load_state_dict(model.state_dict())
    return other


def goes_on(make: Callable[[nn.Module], Any], folder: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = make(model)
    for number in range(3):
        step(model, optimizer, number)
    state = tp.optimizer_state(model, optimizer)
    tp.save(state, folder / "state.safetensors")
    tp.save(state, folder / "state.pt")
    expected = copied(model)
    by_torch = make(expected)
    by_torch.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x, options in ((state, False), (folder / "state.safetensors", True), (folder / "state.pt", False)):
        mine, theirs = copied(model), copied(expected)
        going_on, reference = make(mine), make(theirs)
        reference.load_state_dict(copy.deepcopy(by_torch.state_dict()))
        found = tp.load_optimizer_state(mine, going_on, x, options=options)
        assert found.complete
        assert len(found.loaded) == 4
        reseed(going_on, reference)
        for number in range(3, 12):  # beyond the six steps after which Lookahead looks
            step(theirs, reference, number)
            step(mine, going_on, number)
        for (name, a), b in zip(theirs.named_parameters(), mine.parameters(), strict=True):
            assert torch.equal(a, b), name
        assert str(going_on.state_dict()) == str(reference.state_dict())


TIMM = [name for name in timm.optim.list_optimizers() if not name.startswith(("bnb", "fused"))]


@pytest.mark.parametrize("name", [*TIMM, "lookahead_adamw", "lookahead_lamb", "lookahead_sgd"])
def test_timm(name: str, tmp_path: Path) -> None:
    goes_on(lambda model: timm.optim.create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.01), tmp_path)


# The two left out do not step on a CPU in this version.
BITSANDBYTES = [
    name
    for name, kind in vars(bitsandbytes.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and "AdEMAMix32bit" not in name
]


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bitsandbytes(name: str, tmp_path: Path) -> None:
    kind = getattr(bitsandbytes.optim, name)
    options: dict[str, Any] = {"lr": 1e-3}
    if any(part in name for part in ("SGD", "RMSprop", "LARS")):
        options["momentum"] = 0.9
    if "min_8bit_size" in inspect.signature(kind).parameters:
        options["min_8bit_size"] = 64
    goes_on(lambda model: kind(model.parameters(), **options), tmp_path)


def test_most_of_them_run() -> None:
    assert len(TIMM) > 60
    assert len(BITSANDBYTES) > 30


@pytest.mark.parametrize("inner", ["AdamW", "lamb"])
def test_accelerate(inner: str, tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)

    def make(model: nn.Module) -> Any:
        optimizer = (
            torch.optim.AdamW(model.parameters())
            if inner == "AdamW"
            else timm.optim.create_optimizer_v2(model, opt=inner, lr=1e-3)
        )
        return accelerator.prepare_optimizer(optimizer)

    goes_on(make, tmp_path)


def test_from_accelerate_to_a_plain_optimizer() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = Net()
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(model.parameters()))
    step(model, optimizer, 0)
    plain = torch.optim.AdamW(model.parameters())
    assert tp.load_optimizer_state(model, plain, tp.optimizer_state(model, optimizer)).complete
    assert torch.equal(plain.state[model.first.weight]["exp_avg"], optimizer.state[model.first.weight]["exp_avg"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (bitsandbytes.optim.Adam, torch.optim.Adam),
        (torch.optim.Adam, bitsandbytes.optim.Adam),
        (bitsandbytes.optim.Lion, bitsandbytes.optim.Adam),
        (torch.optim.AdamW, timm.optim.Lion),
        (timm.optim.Lamb, torch.optim.AdamW),
    ],
)
def test_one_name_in_two_libraries(old: Any, new: Any) -> None:
    model = Net()
    saved = old(model.parameters(), lr=1e-3)
    step(model, saved, 0)
    optimizer = new(model.parameters(), lr=1e-3)
    step(model, optimizer, 1)
    before = str(optimizer.state_dict())
    for x in (tp.optimizer_state(model, saved), {**tp.optimizer_state(model, saved).state_dict(), "optimizer": ""}):
        with pytest.raises(tp.errors.MismatchError):
            tp.load_optimizer_state(model, optimizer, x, strict=False)
        assert str(optimizer.state_dict()) == before
