from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import get_total_norm

import torchparams as tp
from torchparams.errors import NoMatch, NotReadable, OptionError, ReadOnlyTable, UnknownName, UnsupportedSource
from torchparams.sources.live.module import ModuleSource
from torchparams.train._norms import combined


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def with_gradients() -> Any:
    model = net()
    model(torch.randn(5, 3)).square().sum().backward()
    return model


# --- the table --------------------------------------------------------------------------------


def test_the_same_names_over_the_gradients() -> None:
    model = with_gradients()
    grads = tp.gradients(model)
    assert grads.names == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert grads[name] is parameter.grad
        assert np.array_equal(grads.numpy(name), parameter.grad.numpy())
        assert not grads.numpy(name).flags.writeable
    assert all(a is p.grad for a, p in zip(grads(), model.parameters(), strict=True))
    assert [name for name, _ in grads.items()] == grads.names == list(grads)
    assert grads.numel == sum(p.numel() for p in model.parameters())


def test_it_is_never_stale() -> None:
    model = net()
    grads = tp.gradients(model)
    chosen = grads.select("0.**", strict=False)
    assert (len(grads), "0.weight" in grads, grads.find if hasattr(grads, "find") else None) == (0, False, None)
    model[0](torch.ones(1, 3)).sum().backward()
    assert grads.names == chosen.names == ["0.weight", "0.bias"]
    model.zero_grad()
    assert grads.names == chosen.names == []
    model[0].bias.grad = torch.ones(4)
    assert "0.bias" in grads and list(grads.infos) == ["0.bias"]


def test_records_are_of_the_gradient_with_the_owner_and_flag_of_the_parameter() -> None:
    model = with_gradients()
    info = tp.gradients(model).info("1.weight")
    assert (info.shape, info.requires_grad, info.module) == ((4,), True, "torch.nn.modules.normalization.LayerNorm")
    assert info.storage is not None and tp.of(model).info("1.weight").storage != info.storage
    assert tp.gradients(model).select(":norm").names == ["1.weight", "1.bias"]
    model[2].requires_grad_(False)  # by hand: the gradients are left over
    assert tp.gradients(model).select(":frozen").names == ["2.weight", "2.bias"]
    assert tp.gradients(model).select("2.*").select(":frozen").names == ["2.weight", "2.bias"]


def test_a_selection_of_the_model_and_wrapped_and_tied_ones() -> None:
    model = with_gradients()
    assert tp.gradients(tp.of(model).select("**.bias")).names == ["0.bias", "1.bias", "2.bias"]
    assert tp.gradients(nn.DataParallel(model)).names == tp.gradients(model).names
    assert tp.gradients(nn.DataParallel(model))["module.0.bias"] is model[0].bias.grad
    tied = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    tied["b"].weight = tied["a"].weight
    tied["a"](torch.ones(1, 2)).sum().backward()
    grads = tp.gradients(tied)
    assert grads.names == ["a.weight"]
    assert grads.info("a.weight").aliases == ("b.weight",)
    assert grads["b.weight"] is grads["a.weight"]
    assert [name for name, _ in grads.named_parameters(remove_duplicate=False)] == ["a.weight", "b.weight"]


def test_names_that_are_not_there() -> None:
    model = net()
    grads = tp.gradients(model)
    with pytest.raises(UnknownName) as caught:
        grads["0.weight"]
    assert str(caught.value) == (
        "Sequential: '0.weight' has no gradient. backward() of a result that depends on it computes one."
    )
    model[0].weight.requires_grad_(False)
    with pytest.raises(UnknownName) as caught:
        grads.info("0.weight")
    assert str(caught.value) == "Sequential: '0.weight' has no gradient. It is frozen."
    with pytest.raises(UnknownName, match=r"No parameter is named '0.wait'"):
        grads["0.wait"]
    with pytest.raises(ReadOnlyTable):
        grads["0.weight"] = 1


def test_it_needs_a_live_model() -> None:
    with pytest.raises(UnsupportedSource) as caught:
        tp.gradients({"w": torch.zeros(2)})
    assert str(caught.value) == (
        "dict: torchparams.gradients needs a live model, not a mapping. Pass the nn.Module, or a Parameters of it."
    )


def test_tables_of_one_model_combine() -> None:
    model = with_gradients()
    a, b = tp.gradients(model).select("0.*"), tp.gradients(model).select("2.*")
    assert (a | b).names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert tp.gradients(model) == tp.gradients(model) != tp.of(model)
    assert len({tp.gradients(model), tp.gradients(model)}) == 1
    assert str(tp.gradients(model)).splitlines()[0] == "gradients of Sequential (gradients)"


def test_sparse_gradients() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    model(torch.tensor([1, 3, 3])).sum().backward()
    grads = tp.gradients(model)
    assert grads["weight"].is_sparse
    assert grads.numpy("weight").tolist() == [[0, 0], [1, 1], [0, 0], [2, 2]]
    assert grads.info("weight").numel == 8
    assert tp.grad_norms(model).norms == {"weight": pytest.approx(math.sqrt(10))}


def test_statistics_of_gradients() -> None:
    model = with_gradients()
    stats = tp.stats(tp.gradients(model))
    assert stats["0.weight"].max == float(model[0].weight.grad.max())


# --- norms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 3, 0.5, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_norms_are_those_of_torch(dtype: torch.dtype, p: float) -> None:
    model = net().to(dtype)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    norms = tp.grad_norms(model, by="module", p=p)
    for name, parameter in model.named_parameters():
        assert norms.norms[name] == pytest.approx(torch.linalg.vector_norm(parameter.grad.double(), p).item(), rel=1e-5)
    flat = torch.cat([q.grad.double().flatten() for q in model.parameters()])
    assert norms.total == pytest.approx(torch.linalg.vector_norm(flat, p).item(), rel=1e-5)
    last = torch.cat([q.grad.double().flatten() for q in model[2].parameters()])
    assert norms.groups["2"] == pytest.approx(torch.linalg.vector_norm(last, p).item(), rel=1e-5)


def test_the_total_is_what_clipping_uses() -> None:
    model = with_gradients()
    expected = get_total_norm([p.grad for p in model.parameters()])
    assert tp.grad_norms(model).total == pytest.approx(expected.item(), rel=1e-6)
    assert tp.grad_norms(tp.gradients(model)).norms == tp.grad_norms(model).norms


def test_half_precision_does_not_overflow_or_vanish() -> None:
    model = nn.Linear(100, 1, bias=False, dtype=torch.float16)
    model.weight.grad = torch.full_like(model.weight, 30_000.0)
    assert tp.grad_norms(model).total == pytest.approx(300_000, rel=1e-3)
    model.weight.grad = torch.full_like(model.weight, 1e-4)
    assert tp.grad_norms(model).total == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("p", [0.5, 1, 2, 3, 8, math.inf])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.float32, (1e25, 3e38, 1e-30, 1e-44)),
        (torch.bfloat16, (1e25, 3e38, 1e-30)),
        (torch.float64, (1e200, 1e-200, 5e-324)),
        (torch.complex64, (1e25, 2e38, 1e-30)),
    ],
)
def test_values_whose_powers_overflow_or_vanish(dtype: torch.dtype, sizes: tuple[float, ...], p: float) -> None:
    for size in sizes:
        model = nn.Linear(40, 10, dtype=dtype)
        model.weight.grad = torch.full_like(model.weight, size)
        one = abs(complex(model.weight.grad[0, 0].item()))
        norms = tp.grad_norms(model, p=p)
        assert norms.norms["weight"] == pytest.approx(one * 400 ** (1 / p), rel=1e-5)
        assert norms.nonfinite == ()
        assert "not finite" not in str(norms)


def test_a_small_gradient_among_elements_that_vanish() -> None:
    model = nn.Linear(100, 100, bias=False)
    model.weight.grad = torch.full_like(model.weight, 1e-20)
    model.weight.grad[0, 0] = 1e-18  # its square is in range, the others' are lost beside it
    assert tp.grad_norms(model).total == pytest.approx(math.sqrt(9999 + 1e4) * 1e-20, rel=1e-6)


def test_a_norm_beyond_every_float_is_infinite_though_its_values_are_not() -> None:
    model = nn.Linear(10, 10, bias=False, dtype=torch.float64)
    model.weight.grad = torch.full_like(model.weight, 1.7e308)
    norms = tp.grad_norms(model)
    assert norms.total == math.inf
    assert norms.nonfinite == ()


def test_values_that_are_not_finite_whatever_the_norm() -> None:
    for p in (0.5, 2, math.inf):
        for value in (math.nan, math.inf, -math.inf):
            model: Any = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False, dtype=torch.complex64))
            for layer in model:
                layer.weight.grad = torch.ones_like(layer.weight)
            model[1].weight.grad[0, 1] = complex(0, value)
            assert tp.grad_norms(model, p=p).nonfinite == ("1.weight",)


def test_sparse_values_whose_squares_overflow() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    model.weight.grad = torch.sparse_coo_tensor(
        torch.tensor([[1, 1]]), torch.tensor([[1e25, 0.0], [2e25, 0.0]]), (4, 2), check_invariants=True
    )
    assert tp.grad_norms(model).total == pytest.approx(3e25, rel=1e-6)


def test_mixed_types_and_kinds_keep_their_places() -> None:
    model: Any = nn.ModuleList([nn.Linear(2, 2, bias=False, dtype=d) for d in (torch.float32, torch.float64) * 2])
    model.append(nn.Embedding(3, 2, sparse=True))
    model.append(nn.Linear(1, 1, bias=False, dtype=torch.complex64))
    for n, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, n + 1)
    model[4].weight.grad = torch.sparse_coo_tensor(
        torch.tensor([[0, 0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]]), (3, 2), check_invariants=True
    )
    assert list(tp.grad_norms(model).norms.values()) == [2.0, 4.0, 6.0, 8.0, 3.0, 6.0]


@pytest.mark.parametrize("p", [2, math.inf])
def test_nothing_and_empty_tensors(p: float) -> None:
    norms = tp.grad_norms(net(), by="module", p=p)
    assert (norms.norms, norms.groups, norms.total, norms.nonfinite) == ({}, {}, 0.0, ())
    model = nn.Linear(1, 2)
    model.weight = nn.Parameter(torch.zeros(2, 0))
    model.weight.grad, model.bias.grad = torch.zeros(2, 0), torch.ones(2)
    assert tp.grad_norms(model, p=p).norms["weight"] == 0.0


def test_the_graph_is_left_alone() -> None:
    weight = torch.ones(2, requires_grad=True)
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = (weight * 2)[None]
    assert tp.grad_norms(model).total == pytest.approx(math.sqrt(8))


def test_one_norm_and_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def count(name: str, original: Any) -> Any:
        def counted(*args: Any, **more: Any) -> Any:
            calls.append(name)
            return original(*args, **more)

        return counted

    monkeypatch.setattr(torch, "_foreach_norm", count("norm", torch._foreach_norm))
    monkeypatch.setattr(torch.Tensor, "tolist", count("tolist", torch.Tensor.tolist))
    model = with_gradients()
    model[2].double()
    model[2].weight.grad = model[2].weight.grad.double()
    _ = tp.grad_norms(model, by="module").total
    assert calls == ["norm", "norm", "tolist"]  # two types


def test_groups_by_selectors() -> None:
    model = with_gradients()
    norms = tp.grad_norms(model, by={"matrices": "[ndim=2]", "all": "**"})
    assert norms.members == {"matrices": ("0.weight", "2.weight"), "all": tuple(norms.norms)}
    assert norms.groups["all"] == norms.total
    assert list(tp.grad_norms(model, by=["0.*", ":norm"]).groups) == ["0.*", ":norm"]
    assert list(tp.grad_norms(model, by=":norm").members.values()) == [("1.weight", "1.bias")]
    assert tp.grad_norms(nn.Linear(2, 2), by="**").groups == {"**": 0.0}
    with pytest.raises(NoMatch):
        tp.grad_norms(model, by=["head.*"])
    chosen = tp.of(model).select("0.* | 1.*")
    assert list(tp.grad_norms(chosen, by="module").groups) == ["0", "1"]
    assert list(tp.grad_norms(tp.gradients(model).select("2.*")).norms) == ["2.weight", "2.bias"]


def test_what_is_not_finite_is_named_first() -> None:
    model = with_gradients()
    model[1].bias.grad[0] = math.nan
    model[2].weight.grad[0, 0] = math.inf
    norms = tp.grad_norms(model)
    assert norms.nonfinite == ("1.bias", "2.weight")
    assert math.isnan(norms.total)
    lines = str(norms).splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["1.bias", "2.weight"]
    assert lines[-1] == "not finite: 1.bias, 2.weight"
    data = json.loads(json.dumps(norms.to_json(), allow_nan=False))
    assert (data["total"], data["norms"]["2.weight"]) == ("nan", "inf")


def test_the_report() -> None:
    model = net()
    for n, parameter in enumerate(list(model.parameters())[:-1]):
        parameter.grad = torch.full_like(parameter, n)
    assert str(tp.grad_norms(model, p=1)) == (
        "Sequential: gradient norms, p = 1\n"
        "name      norm\n"
        "0.weight     0\n"
        "0.bias       4\n"
        "1.weight     8\n"
        "1.bias      12\n"
        "2.weight    32\n"
        "──────────────\n"
        "total       56\n"
        "1 trainable parameter has no gradient: 2.bias"
    )
    norms = tp.grad_norms(model, by="module", p=math.inf)
    assert norms.without == ("2.bias",)
    assert "p = inf" in str(norms)
    assert norms._repr_html_().startswith('<p style="font-weight:bold">Sequential')
    assert norms.to_json()["groups"]["0"] == {"norm": 1.0, "names": ["0.weight", "0.bias"]}
    assert "(top level)" in str(tp.grad_norms(model[0], by="module"))


def test_norms_are_read_only_and_pickle() -> None:
    norms = tp.grad_norms(with_gradients(), by="module")
    for copied in (copy.copy(norms), pickle.loads(pickle.dumps(norms))):
        assert str(copied) == str(norms) and copied.to_json() == norms.to_json() and copied.total == norms.total
    with pytest.raises(AttributeError):
        norms.p = 1  # type: ignore[misc]
    assert len({norms, tp.grad_norms(with_gradients())}) == 2


def test_norms_that_do_not_exist() -> None:
    for p in (0, -1, math.nan, "2"):
        with pytest.raises(OptionError) as caught:
            tp.grad_norms(net(), p=p)  # type: ignore[arg-type]  # what is tested
        assert str(caught.value) == f"`p` must be a positive number or math.inf, not {p!r}"


def test_gradients_without_values() -> None:
    model = nn.Linear(2, 2, device="meta")
    model.weight.grad = torch.empty(2, 2, device="meta")
    with pytest.raises(NotReadable) as caught:
        tp.grad_norms(model)
    assert str(caught.value) == "Linear: The gradient of 'weight' is on the meta device, which holds no values"


def test_the_network_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    original = ModuleSource.keys

    def counted(self: ModuleSource) -> Any:
        reads.append(1)
        return original(self)

    monkeypatch.setattr(ModuleSource, "keys", counted)
    tp.grad_norms(with_gradients(), by="module")
    assert len(reads) == 1


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 1e300) | st.just(math.inf) | st.just(math.nan), max_size=6),
    st.sampled_from([0.5, 1, 2, 4, math.inf]),
)
def test_norms_of_norms(parts: list[float], p: float) -> None:
    with np.errstate(all="ignore"):
        whole = np.array(parts, np.longdouble)
        expected = (whole.max(initial=0) if p == math.inf else (whole**p).sum() ** np.longdouble(1 / p)).astype(float)
    assert combined(parts, p) == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_norms_of_norms_far_out() -> None:
    assert combined([1e308, 1e308], 3) == pytest.approx(1e308 * 2 ** (1 / 3))
    assert combined([1e-300, 1e-300], 2) == pytest.approx(math.sqrt(2) * 1e-300)


@pytest.mark.parametrize("named", [True, False])
def test_norms_by_the_groups_of_an_optimizer(named: bool) -> None:
    model = with_gradients()
    groups = tp.groups(model, tp.rule(tp.no_decay, weight_decay=0.0), lr=0.1, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups if named else [{"params": group["params"]} for group in groups])
    norms = tp.grad_norms(model, by=optimizer.param_groups)
    assert norms.members == {f"group {place}": tuple(group["param_names"]) for place, group in enumerate(groups)}
    for place, group in enumerate(groups):
        expected = get_total_norm([p.grad for p in group["params"]])
        assert norms.groups[f"group {place}"] == pytest.approx(float(expected), rel=1e-6)
    assert tp.grad_norms(model, by=groups).groups == norms.groups


def test_norms_group_as_every_verb_does_and_are_a_dict() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 1)).double()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    plain = tp.grad_norms(model)
    assert dict(plain) == plain.norms
    assert list(plain) == list(plain.keys()) and len(plain) == 6
    layers = tp.grad_norms(model, by="layer")
    assert layers.members["0"] == ("0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias")
    assert dict(layers) == layers.groups and layers["0"] == layers.groups["0"]
    assert layers["1.bias"] == 1.0
    assert list(tp.grad_norms(model, by="dtype").members) == ["float64"]
    assert tp.grad_norms(model, by=["module"]).members == tp.grad_norms(model, by="module").members
    with pytest.raises(UnknownName):
        plain["0.0.wieght"]
