"""Small complete programs: their output and effects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # as everybody writes it

import torchparams as tp

if TYPE_CHECKING:
    from collections.abc import Callable


class Linear(tp.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 1)

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(x_BI)
        return out


class Block(tp.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        return x_BI + F.relu(self.fc(self.norm(x_BI)))


class Nested(tp.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(10) for _ in range(3)])
        self.head = nn.Linear(10, 1)

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x_BI = block(x_BI)
        out: torch.Tensor = self.head(x_BI)
        return out


class Convolutional(tp.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.conv2 = nn.Conv2d(4, 8, 3)
        self.fc = nn.Linear(8 * 4 * 4, 1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x_BCHW = F.relu(self.conv1(x_BCHW))
        x_BCHW = F.relu(self.conv2(x_BCHW))
        out: torch.Tensor = self.fc(x_BCHW.view(x_BCHW.size(0), -1))
        return out


MODELS: dict[Callable[[], tp.Module], tuple[int, ...]] = {
    Linear: (4, 10),
    Nested: (4, 10),
    Convolutional: (4, 1, 8, 8),
}


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest) -> tp.Module:
    torch.manual_seed(0)
    made: tp.Module = request.param()
    return made


def test_print_the_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    print(Convolutional().parameters)
    assert capsys.readouterr().out == (
        "Convolutional (module)\n"
        "name          shape         dtype    numel      size  trainable  module\n"
        "conv1.weight  [4, 1, 3, 3]  float32     36     144 B  yes        Conv2d\n"
        "conv1.bias    [4]           float32      4      16 B  yes        Conv2d\n"
        "conv2.weight  [8, 4, 3, 3]  float32    288  1.12 KiB  yes        Conv2d\n"
        "conv2.bias    [8]           float32      8      32 B  yes        Conv2d\n"
        "fc.weight     [1, 128]      float32    128     512 B  yes        Linear\n"
        "fc.bias       [1]           float32      1       4 B  yes        Linear\n"
        "6 tensors · 465 parameters · 1.82 KiB · 100.0% trainable\n"
    )


def test_print_the_parameters_of_a_nested_model(capsys: pytest.CaptureFixture[str]) -> None:
    print(Nested().parameters)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == [name for name, _ in Nested().named_parameters()]
    assert lines[3].split() == ["blocks.0.fc.bias", "[10]", "float32", "10", "40", "B", "yes", "Linear"]


def test_list_the_parameters(model: tp.Module) -> None:
    listed = list(model.parameters())
    assert all(type(parameter) is nn.Parameter for parameter in listed)
    assert [parameter.shape for parameter in listed] == [p.shape for _, p in model.named_parameters()]
    assert sum(parameter.numel() for parameter in model.parameters()) == model.parameters.numel


def test_train(model: tp.Module) -> None:
    x, y = torch.randn(MODELS[type(model)]), torch.randn(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(50):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own is not typed
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_the_call_was_forgotten(model: tp.Module) -> None:
    with pytest.raises(TypeError, match="optimizer can only optimize Tensors, but one of the params is str"):
        torch.optim.SGD(model.parameters, lr=0.01)  # type: ignore[arg-type]  # this is what is tested


def test_fill_all_parameters(model: tp.Module) -> None:
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    assert all(bool(parameter.eq(0.5).all()) for parameter in model.parameters.values())
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.25)
    assert all(bool(parameter.eq(0.25).all()) for parameter in model.parameters())


def test_a_linear_model_of_halves_computes_by_hand() -> None:
    model = Linear()
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    assert model(torch.ones(1, 10)).item() == 5.5


def test_freeze_a_layer() -> None:
    model = Convolutional()
    for parameter in model.conv1.parameters():
        parameter.requires_grad = False
    assert {name: parameter.requires_grad for name, parameter in model.parameters.items()} == {
        "conv1.weight": False,
        "conv1.bias": False,
        "conv2.weight": True,
        "conv2.bias": True,
        "fc.weight": True,
        "fc.bias": True,
    }
    assert model.parameters.select(":frozen").names == ["conv1.weight", "conv1.bias"]
    assert str(model.parameters).endswith(" · 91.4% trainable")
    before = model.conv1.weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.ones(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    assert model.conv1.weight.grad is None
    assert torch.equal(model.conv1.weight, before)


def test_read_a_parameter_by_its_attributes() -> None:
    model = Convolutional()
    assert model.conv1.weight.shape == (4, 1, 3, 3)
    assert model.conv1.weight is model.parameters["conv1.weight"]
    stack = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    assert stack[0].bias.shape == (2,)
    assert stack[0].bias is tp.of(stack)["0.bias"]


def test_zero_everything(model: tp.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not any(bool(parameter.any()) for parameter in model.parameters())
    assert model(torch.ones(MODELS[type(model)])).abs().sum().item() == 0


def test_loop_over_names(model: tp.Module) -> None:
    seen = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert list(seen) == list(model.parameters)
    assert seen == {name: parameter.shape for name, parameter in model.parameters.items()}
    assert seen == {name: model.parameters[name].shape for name in model.parameters}


def test_weight_decay_for_matrices_alone(model: tp.Module) -> None:
    matrices = model.parameters.select(":matrix")
    others = ~matrices
    optimizer = torch.optim.AdamW(
        [{"params": list(matrices()), "weight_decay": 0.1}, {"params": list(others()), "weight_decay": 0.0}], lr=1e-3
    )
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(model.parameters)
    assert len(matrices) + len(others) == len(model.parameters)


def test_replace_the_head() -> None:
    model = Convolutional()
    table = model.parameters
    model.fc = nn.Linear(8 * 4 * 4, 10)
    assert table["fc.weight"].shape == (10, 128)
    assert table["fc.weight"] is model.fc.weight


def test_layers_in_a_plain_list_are_not_part_of_the_model() -> None:
    class Hidden(tp.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(1, 1)]

    assert len(Hidden().parameters) == len(list(Hidden().parameters())) == 0
    assert str(Hidden().parameters).endswith("0 tensors · 0 parameters · 0 B")
    (finding,) = tp.audit(Hidden()).findings
    assert finding.rule == "hidden-parameter"


def test_a_frozen_batch_norm_still_moves() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    for parameter in model.parameters():
        parameter.requires_grad = False
    before = {name: info for name, info in tp.of(model, buffers=True).infos.items() if info.kind == "buffer"}
    values = {name: tp.of(model, buffers=True)[name].clone() for name in before}
    model(torch.randn(8, 3) + 5)
    assert not torch.equal(values["0.running_mean"], tp.of(model, buffers=True)["0.running_mean"])
    tp.freeze(model, "**")
    values = {name: tp.of(model, buffers=True)[name].clone() for name in before}
    model(torch.randn(8, 3) + 5)
    assert all(torch.equal(values[name], tp.of(model, buffers=True)[name]) for name in before)


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"weight_decay": 0.1}, {}])
def test_a_frozen_parameter_moves_by_what_is_left_over(options: dict[str, Any]) -> None:
    def moved(freeze: Callable[[nn.Module], object]) -> bool:
        layer = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, **options)
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        freeze(layer)
        before = layer.weight.detach().clone()
        optimizer.step()
        return not torch.equal(before, layer.weight)

    assert moved(lambda layer: layer.requires_grad_(False))
    assert not moved(lambda layer: tp.freeze(layer))


def test_optimizer_state_goes_by_position() -> None:
    # What PyTorch does, and why state is better kept by name: the same layers in another order take each other's state.
    first = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    second = nn.ModuleDict({"b": first["b"], "a": first["a"]})
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9)
    first["a"].weight.grad, first["b"].weight.grad = torch.zeros(2, 2), torch.ones(2, 2)
    optimizer.step()
    again = torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.9)
    again.load_state_dict(optimizer.state_dict())
    assert tp.of(second).names == ["b.weight", "a.weight"]
    assert again.state[tp.of(second)["b.weight"]]["momentum_buffer"].sum() == 0
    assert again.state[tp.of(second)["a.weight"]]["momentum_buffer"].sum() == 4
    # By name, each keeps its own.
    named = torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.9)
    tp.load_optimizer_state(second, named, tp.optimizer_state(first, optimizer))
    assert named.state[tp.of(second)["a.weight"]]["momentum_buffer"].sum() == 0
    assert named.state[tp.of(second)["b.weight"]]["momentum_buffer"].sum() == 4
