from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import torchparams as tp
from torchparams.errors import MismatchError, NoMatch, NotReadable, OptionError, UnknownName, UnsupportedSource

if TYPE_CHECKING:
    from pathlib import Path


def net(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)


def moved(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() + 0.5 * torch.randn_like(p) for name, p in model.named_parameters()}


def by_hand(model: nn.Module, p: int, base: dict[str, torch.Tensor] | None, names: list[str]) -> Any:
    total: Any = torch.zeros((), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if name in names:
            difference = parameter.double() - (0 if base is None else base[name].double())
            total = total + difference.abs().pow(p).sum()
    return total


@pytest.mark.parametrize("toward", [False, True])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_those_written_out(dtype: torch.dtype, p: int, toward: bool) -> None:
    model = net(dtype)
    base = moved(model) if toward else None
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    expected = by_hand(model, p, base, names)
    gradients = torch.autograd.grad(expected, [q for n, q in model.named_parameters() if n in names])
    got = tp.penalty(model, "0.** | 2.**", p=p, toward=base)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.shape == () and got.item() == pytest.approx(expected.item(), rel=1e-5)
    got.backward()  # type: ignore[no-untyped-call]  # torch does not say
    for name, gradient in zip(names, gradients, strict=True):
        tolerance = 1e-2 if dtype.itemsize == 2 else 1e-5
        assert torch.allclose(tp.gradients(model)[name], gradient, rtol=tolerance, atol=tolerance)
    assert model[1].weight.grad is None


def test_the_gradient_of_a_gradient() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    assert torch.autograd.gradgradcheck(lambda w: torch.stack(torch._foreach_norm([w], 2)).square().sum(), model.weight)
    (first,) = torch.autograd.grad(tp.penalty(model), model.weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), model.weight)
    assert torch.allclose(second, torch.full_like(second, 2))


@pytest.mark.parametrize("p", [1, 2])
def test_at_the_target_the_gradient_is_zero(p: int) -> None:
    model = net()
    pull = tp.Penalty(model, p=p, toward=model)
    pull().backward()  # type: ignore[no-untyped-call]  # torch does not say
    assert pull().item() == 0.0
    assert all(q.grad.count_nonzero() == 0 for q in model.parameters())


@pytest.mark.parametrize("toward", ["model", "state_dict", "table"])
def test_a_target_that_shares_the_memory_of_the_model_is_copied(toward: str) -> None:
    model = net()
    targets = {"model": model, "state_dict": model.state_dict(), "table": tp.of(model)}
    pull = tp.Penalty(model, "0.weight", toward=targets[toward])
    tp.apply_(model, "0.weight", lambda w: w + 1)
    assert pull().item() == pytest.approx(12)


def test_toward_a_checkpoint(tmp_path: Path) -> None:
    model = net()
    path = tmp_path / "base.safetensors"
    base = moved(model)
    save_file(base, path)
    expected = by_hand(model, 2, base, ["0.weight", "0.bias"]).item()
    assert tp.penalty(model, "0.**", toward=path).item() == pytest.approx(expected)
    pull = tp.Penalty(model, "0.**", toward=str(path))
    gc.collect()
    assert pull().item() == pytest.approx(expected)
    save_file({name: tensor.bfloat16() for name, tensor in base.items()}, path)
    assert tp.penalty(model, "0.**", toward=path).item() == pytest.approx(expected, rel=1e-2)
    assert repr(pull) == f"Penalty(2 tensors of Sequential, p=2, toward {path})"
    assert repr(tp.Penalty(model, p=1)) == "Penalty(6 tensors of Sequential, p=1)"


def test_l2_sp_pulls_back() -> None:
    model = net()
    pull = tp.Penalty(model, "0.**", toward=model)
    start = model[0].weight.detach().clone()
    tp.apply_(model, "0.**", lambda w: w + torch.randn_like(w))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (pull() / 2).backward()  # type: ignore[no-untyped-call]  # torch does not say
        optimizer.step()
    assert torch.allclose(model[0].weight, start, atol=0.02)


def test_weight_decay_is_half_of_it() -> None:
    model, other = net(), net()
    torch.optim.SGD(model.parameters(), lr=0.1).zero_grad()
    (0.3 / 2 * tp.penalty(model)).backward()  # type: ignore[no-untyped-call]  # torch does not say
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for parameter in other.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(other.parameters(), lr=0.1, weight_decay=0.3).step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b)


def test_half_precision_sums_do_not_overflow() -> None:
    model = nn.Linear(100, 1, bias=False, dtype=torch.float16)
    tp.apply_(model, None, lambda w: torch.full_like(w, 200.0))
    assert tp.penalty(model).item() == 4_000_000
    assert tp.penalty(model, toward={"weight": np.full((1, 100), -200, np.float16)}).item() == 16_000_000


def test_mixed_types_and_complex() -> None:
    model = nn.ModuleList(
        [nn.Linear(2, 1, bias=False, dtype=d) for d in (torch.float16, torch.float64, torch.complex64)]
    )
    tp.apply_(model, None, torch.ones_like)
    assert tp.penalty(model).item() == pytest.approx(6)
    assert tp.penalty(model).dtype == torch.float64


def test_tied_parameters_count_once() -> None:
    tied: Any = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    tied["b"].weight = tied["a"].weight
    tp.apply_(tied, None, torch.ones_like)
    assert tp.penalty(tied, "b.weight").item() == 4
    assert tp.penalty(tied, toward={"b.weight": torch.zeros(2, 2)}).item() == 4
    assert tp.penalty(tied, toward=tied).item() == 0


def test_a_replaced_parameter_is_not_missed() -> None:
    model = net()
    pull = tp.Penalty(model, "2.weight", toward=model)
    model[2].weight = nn.Parameter(model[2].weight.detach() + 1)
    assert pull().item() == pytest.approx(8)
    model[2] = nn.Linear(4, 3)
    with pytest.raises(MismatchError) as caught:
        pull()
    assert str(caught.value) == (
        "Sequential: '2.weight' has the shape [2, 4]. In the model it has [3, 4]. Leave it out of the selection."
    )
    model[2] = nn.ReLU()
    with pytest.raises(UnknownName):
        pull()


def test_wrapped_models_and_selections() -> None:
    model = net()
    assert tp.penalty(nn.DataParallel(model), "0.**", toward=model).item() == 0
    assert tp.penalty(tp.of(model).select("0.**")).item() == tp.penalty(model, "0.**").item()
    assert not tp.penalty(model.requires_grad_(False)).requires_grad


def test_targets_that_do_not_fit() -> None:
    model = net()
    with pytest.raises(MismatchError) as caught:
        tp.penalty(model, toward={"0.weight": torch.zeros(4, 3), "0.bias": torch.zeros(4)})
    assert str(caught.value) == (
        "dict: 4 of 6 selected parameters are missing: 1.weight, 1.bias, 2.weight and 1 more. The nearest to "
        "'1.weight' is '0.weight'. Select the parameters it has, and penalise the rest without toward."
    )
    with pytest.raises(MismatchError) as caught:
        tp.penalty(model, "0.bias", toward={"0.bias": torch.zeros(1)})
    assert str(caught.value) == (
        "dict: '0.bias' has the shape [1]. In the model it has [4]. Leave it out of the selection."
    )
    with pytest.raises(NotReadable, match="is on the meta device"):
        tp.penalty(model, "0.bias", toward={"0.bias": torch.zeros(4, device="meta")})


def test_what_cannot_be_penalised() -> None:
    for p in (0, 3, 1.5):
        with pytest.raises(OptionError) as caught:
            tp.penalty(net(), p=p)  # type: ignore[arg-type]  # what is tested
        assert str(caught.value) == f"`p` must be 1 or 2, not {p}"
    integers = nn.Linear(2, 2)
    integers.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(OptionError) as caught:
        tp.penalty(integers)
    assert str(caught.value) == (
        "Linear: 'weight' holds integers, which have no gradient. Leave it out of the selection."
    )
    with pytest.raises(OptionError, match="nothing to penalise"):
        tp.penalty(nn.ReLU())
    with pytest.raises(NotReadable, match="'weight' is lazy"):
        tp.penalty(nn.LazyLinear(2))
    with pytest.raises(NoMatch):
        tp.penalty(net(), "head.**")
    with pytest.raises(UnsupportedSource):
        tp.penalty({"w": torch.zeros(2)})
