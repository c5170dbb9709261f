from __future__ import annotations

import copy
import json
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import torchparams as tp
from torchparams.errors import NoMatch, NotReadable, OptionError
from torchparams.train.init import stream_seed

NORMAL = ("[ndim>=2]", nn.init.normal_)
ZEROS = ("**.bias", nn.init.zeros_)


def net(*, more: bool = False) -> Any:
    layers: dict[str, nn.Module] = {"first": nn.Linear(3, 4)}
    if more:
        layers["between"] = nn.Linear(4, 4)
    return nn.ModuleDict({**layers, "norm": nn.LayerNorm(4), "last": nn.Linear(4, 2)})


def values(model: nn.Module) -> dict[str, list[Any]]:
    return {name: p.tolist() for name, p in model.named_parameters()}


# --- streams ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        nn.init.normal_,
        nn.init.orthogonal_,
        partial(nn.init.kaiming_uniform_, a=0.2),
        torch.Tensor.uniform_,
        lambda w: torch.randn(w.shape),
        lambda w: nn.functional.dropout(torch.ones_like(w)),
    ],
)
def test_a_layer_more_changes_no_other(function: Any) -> None:
    small, large = net(), net(more=True)
    tp.init(small, ("[ndim>=2]", function), seed=7)
    torch.randn(3)
    tp.init(large, ("[ndim>=2]", function), seed=7)
    for name in ("first.weight", "last.weight"):
        assert torch.equal(tp.of(small)[name], tp.of(large)[name])
    assert not torch.equal(large["first"].weight[:2, :2], large["last"].weight[:2, :2])
    tp.init(large, ("[ndim>=2]", function), seed=8)
    assert not torch.equal(small["first"].weight, large["first"].weight)


def test_a_stream_is_the_seed_and_the_name() -> None:
    model = net()
    tp.init(model, NORMAL, seed=3)
    generator = torch.Generator().manual_seed(stream_seed(3, "last.weight"))
    assert torch.equal(model["last"].weight, torch.empty(2, 4).normal_(generator=generator))
    wrapped = nn.DataParallel(net())
    tp.init(wrapped, NORMAL, seed=3)
    assert torch.equal(wrapped.module["last"].weight, model["last"].weight)


def test_the_global_generators_are_put_back() -> None:
    model = net()
    torch.manual_seed(1)
    expected = torch.randn(4)
    torch.manual_seed(1)
    tp.init(model, ("**", lambda w: torch.randn(w.shape)), ZEROS, seed=0)
    assert torch.equal(torch.randn(4), expected)


def test_without_a_seed_one_is_drawn_and_told() -> None:
    a, b, c = net(), net(), net()
    torch.manual_seed(5)
    first = tp.init(a, NORMAL, ZEROS)
    second = tp.init(b, NORMAL, ZEROS)
    assert first.seed != second.seed
    tp.init(c, NORMAL, ZEROS, seed=first.seed)
    assert torch.equal(a["first"].weight, c["first"].weight)
    torch.manual_seed(5)
    assert tp.init(a, NORMAL).seed == first.seed


def test_a_generator_of_ones_own_is_kept() -> None:
    model = net()
    generator = torch.Generator().manual_seed(0)
    tp.init(model, ("first.weight", partial(nn.init.normal_, generator=generator)), seed=0)
    assert torch.equal(model["first"].weight, torch.empty(4, 3).normal_(generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    tp.init(model, NORMAL, seed=0)
    assert model["first"].weight.dtype == dtype
    assert 0.1 < model["first"].weight.float().std() < 3


def channels_last(model: Any) -> Any:
    return model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "function",
    [
        nn.init.normal_,
        nn.init.kaiming_uniform_,
        nn.init.orthogonal_,
        nn.init.dirac_,
        torch.Tensor.normal_,
        torch.randn_like,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_no_values(function: Any, dtype: torch.dtype) -> None:
    if function is nn.init.orthogonal_ and dtype is torch.bfloat16:
        dtype = torch.float64  # torch has no QR decomposition in bfloat16
    model: Any = nn.Conv2d(3, 6, 3, dtype=dtype)
    last: Any = channels_last(nn.Conv2d(3, 6, 3, dtype=dtype))
    turned: Any = nn.Conv2d(3, 6, 3, dtype=dtype)
    turned.weight = nn.Parameter(torch.empty(3, 3, 3, 6, dtype=dtype).permute(3, 2, 1, 0))
    with torch.device("meta"):
        meta: Any = channels_last(nn.Conv2d(3, 6, 3, dtype=dtype))
    for one in (model, last, turned, meta):
        tp.init(one, ("weight", function), seed=3)
    assert last.weight.stride() == meta.weight.stride() == (27, 1, 9, 3)
    assert turned.weight.stride() == (1, 6, 18, 54)
    assert all(torch.equal(model.weight, other.weight) for other in (last, turned, meta))


def test_a_function_sees_the_attributes_of_a_parameter_that_is_not_contiguous() -> None:
    def function(weight: Any) -> None:
        weight.fill_(weight.scale)
        assert isinstance(weight, nn.Parameter) and weight.requires_grad

    model: Any = channels_last(nn.Conv2d(3, 6, 3))
    weight: Any = model.weight
    weight.scale = 2.0
    tp.init(model, ("weight", function), seed=0)
    assert model.weight.unique().tolist() == [2.0]


# --- rules ------------------------------------------------------------------------------------


def test_later_rules_win_and_the_rest_is_left() -> None:
    model = net()
    before = model["norm"].weight.detach().clone()
    done = tp.init(model, NORMAL, ("**.bias", nn.init.ones_), ("last.*", nn.init.zeros_), seed=0)
    assert done.by == {"first.weight": 0, "first.bias": 1, "norm.bias": 1, "last.weight": 2, "last.bias": 2}
    assert done.untouched == ("norm.weight",) and torch.equal(model["norm"].weight, before)
    assert model["last"].weight.count_nonzero() == 0 and model["norm"].bias.tolist() == [1, 1, 1, 1]


def test_tensors_stay_the_same_objects() -> None:
    model = net()
    before = [(id(p), p.data_ptr(), p.requires_grad) for p in model.parameters()]
    tp.init(model, NORMAL, ("[ndim=1]", torch.zeros_like), seed=0)
    assert [(id(p), p.data_ptr(), p.requires_grad) for p in model.parameters()] == before


def test_tied_parameters_have_one_stream() -> None:
    model: Any = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    done = tp.init(model, ("b.weight", nn.init.normal_), seed=1)
    assert done.names == ("a.weight",)
    alone: Any = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)})
    tp.init(alone, NORMAL, seed=1)
    assert torch.equal(alone["a"].weight, model["b"].weight)


def test_selections_and_parametrised_modules() -> None:
    model = net()
    done = tp.init(tp.of(model).select("first.*"), ("**", nn.init.ones_), seed=0)
    assert (done.names, done.untouched) == (("first.weight", "first.bias"), ())
    layer = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)))
    done = tp.init(layer, ("**.original1", nn.init.ones_), seed=0)
    assert done.names == ("0.parametrizations.weight.original1",)


def test_what_is_no_rule() -> None:
    for rule in (nn.init.zeros_, ("**", 0), {"**": nn.init.zeros_}, ("**", nn.init.zeros_, 1)):
        with pytest.raises(OptionError, match="is not a rule"):
            tp.init(net(), rule, seed=0)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(OptionError) as caught:
        tp.init(net(), ("**", 0), seed=0)  # type: ignore[arg-type]  # what is tested
    assert str(caught.value) == (
        "('**', 0) is not a rule. For groups, a rule is torchparams.rule(selector, lr=…) or (selector, {'lr': …}); "
        "for init, it is torchparams.rule(selector, function) or (selector, function)."
    )
    with pytest.raises(OptionError) as caught:
        tp.init(net(), NORMAL, seed=1.5)  # type: ignore[arg-type]  # what is tested
    assert str(caught.value) == "`seed` must be a whole number, not 1.5"


def test_no_rules_are_an_error() -> None:
    for seed in (0, None):
        with pytest.raises(OptionError) as caught:
            tp.init(net(), seed=seed)
        assert str(caught.value) == (
            "ModuleDict: init() needs at least one rule. Pass rules, as in "
            "torchparams.init(model, ('**.bias', torch.nn.init.zeros_), seed=0)."
        )


def test_nothing_changes_before_all_rules_are_checked() -> None:
    model = net()
    before = values(model)
    with pytest.raises(NoMatch):
        tp.init(model, ("**", nn.init.zeros_), ("head.*", nn.init.zeros_), seed=0)
    lazy = nn.ModuleDict({"first": model["first"], "lazy": nn.LazyLinear(2)})
    with pytest.raises(NotReadable, match=r"ModuleDict: 'lazy\.weight' is lazy"):
        tp.init(lazy, ("**", nn.init.zeros_), seed=0)
    assert values(model) == before
    tp.init(lazy, ("first.*", nn.init.zeros_), seed=0)


def test_an_error_says_where() -> None:
    with pytest.raises(ValueError, match="Fan in and fan out") as caught:
        tp.init(net(), ("**", nn.init.xavier_normal_), seed=0)
    assert caught.value.__notes__ == ["torchparams.init: at first.bias, [4]; nothing was changed"]


# --- the meta device --------------------------------------------------------------------------


class Rotary(nn.Module):
    inv_freq: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.ones(2), persistent=False)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.tied = nn.Linear(3, 4, bias=False)
        self.tied.weight = self.fc.weight
        self.bn = nn.BatchNorm1d(4)
        self.plain = nn.BatchNorm1d(4, affine=False)
        self.rotary = Rotary()


def deep(device: str = "meta") -> Any:
    with torch.device(device):
        return Deep()


EVERYTHING = (NORMAL, ("[ndim=1]", nn.init.ones_))


def test_a_meta_model_gets_the_values_that_another_would_have() -> None:
    model, other = deep(), deep("cpu")
    before = [id(p) for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tp.init(other, *EVERYTHING, seed=4)
    done = tp.init(model, *EVERYTHING, seed=4)
    assert values(model) == values(other)
    assert [id(p) for p in model.parameters()] == before == [id(p) for p in optimizer.param_groups[0]["params"]]
    assert model.tied.weight is model.fc.weight
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    assert done.materialised == ("fc.weight", "fc.bias", "bn.weight", "bn.bias")
    model.fc(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def test_statistics_are_reset_and_other_buffers_listed() -> None:
    model = deep()
    done = tp.init(model, *EVERYTHING, seed=4)
    assert done.reset == tuple(
        f"{layer}.{name}"
        for layer in ("bn", "plain")
        for name in ("running_mean", "running_var", "num_batches_tracked")
    )
    assert (model.bn.running_var.tolist(), int(model.plain.num_batches_tracked)) == ([1, 1, 1, 1], 0)
    assert done.without_values == ("rotary.inv_freq",)
    tp.init(tp.of(model, buffers=True), ("rotary.inv_freq", lambda w: torch.arange(2.0)), seed=4)
    assert model.rotary.inv_freq.tolist() == [0, 1]


def test_what_no_rule_reaches_stays_on_meta() -> None:
    model = deep()
    done = tp.init(model, ("fc.*", nn.init.ones_), seed=4)
    assert model.bn.weight.is_meta and model.bn.running_mean.is_meta
    assert "bn.weight" in done.without_values and "bn.running_mean" in done.without_values
    assert "fc.bias" not in done.without_values


def test_attributes_flags_and_subclasses_of_meta_parameters() -> None:
    class Special(nn.Parameter):
        no_decay: bool

    model: Any = nn.Module()
    with torch.device("meta"):
        model.a = Special(torch.empty(2, 3))
        model.b = nn.Parameter(torch.empty(3, 2).t(), requires_grad=False)
    model.a.no_decay = True
    tp.init(model, ("**", nn.init.ones_), seed=0)
    assert type(model.a) is Special and model.a.no_decay and model.a.device.type == "cpu"
    assert not model.b.requires_grad and model.b.stride() == (1, 2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 3)
        self.lstm = nn.LSTM(3, 3)


def recurrent() -> Any:
    with torch.device("meta"):
        return Recurrent()


def test_what_cannot_get_memory_is_refused_before_anything_changes() -> None:
    model = recurrent()
    before = [id(p) for p in model.parameters()]
    with pytest.raises(NotReadable) as caught:
        tp.init(model, ("**", nn.init.uniform_), seed=0)
    assert str(caught.value) == (
        "Recurrent: 'lstm.weight_ih_l0' cannot be moved from the meta device: Cannot swap t1 because it has weakref "
        "associated with it. Nothing was changed. Call model.to_empty(device='cpu') first, before an optimizer is made."
    )
    assert all(p.is_meta for p in model.parameters())
    assert [id(p) for p in model.parameters()] == before
    tp.init(model, ("fc.*", nn.init.uniform_), seed=0)
    tp.init(model.to_empty(device="cpu"), ("**", nn.init.uniform_), seed=0)


@pytest.mark.parametrize("device", ["meta", "nonsense"])
def test_a_device_without_memory(device: str) -> None:
    model = deep()
    with pytest.raises(OptionError, match="device="):
        tp.init(model, *EVERYTHING, seed=0, device=device)
    assert all(p.is_meta for p in model.parameters())


def test_an_error_on_the_way_changes_nothing() -> None:
    def fails(weight: torch.Tensor) -> None:
        weight.fill_(7)
        raise ValueError

    class Fails(nn.BatchNorm1d):
        def reset_running_stats(self) -> None:
            if self.running_mean is not None and not self.running_mean.is_meta:
                raise ValueError

    with_values: Any = net()
    before = values(with_values)
    with pytest.raises(ValueError):
        tp.init(with_values, NORMAL, ("last.bias", fails), seed=0)
    assert values(with_values) == before
    model = deep()
    with pytest.raises(ValueError):
        tp.init(model, *EVERYTHING, ("bn.bias", fails), seed=0)
    assert all(t.is_meta for t in model.state_dict().values())
    with torch.device("meta"):
        model.plain = Fails(4, affine=False)
        model.bn = nn.BatchNorm1d(4)
    model.fc.weight.mark = 3
    with pytest.raises(ValueError):
        tp.init(model, *EVERYTHING, seed=0)
    assert all(t.is_meta for t in model.state_dict().values())
    assert model.fc.weight.mark == 3 and model.tied.weight is model.fc.weight
    model.plain = nn.BatchNorm1d(4, affine=False)
    other = deep("cpu")
    for one in (model, other):
        tp.init(one, *EVERYTHING, seed=4)
    assert values(model) == values(other)


# --- what is printed --------------------------------------------------------------------------


def test_the_report() -> None:
    model = deep()
    done = tp.init(model, ("fc.*", nn.init.ones_), ("bn.bias", nn.init.zeros_), seed=9)
    assert str(done) == (
        "Deep: initialised 3 of 4 tensors, seed 9\n"
        "name       shape   function  rule\n"
        "fc.weight  [4, 3]  ones_     fc.*\n"
        "fc.bias    [4]     ones_     fc.*\n"
        "bn.bias    [4]     zeros_    bn.bias\n"
        "no rule reached 1 tensor: bn.weight\n"
        "3 tensors got memory: fc.weight, fc.bias, bn.bias\n"
        "reset the statistics in 3 tensors: plain.running_mean, plain.running_var, plain.num_batches_tracked\n"
        "5 tensors on the meta device, without values: bn.weight, bn.running_mean, bn.running_var and 2 more"
    )
    data = json.loads(json.dumps(done.to_json()))
    assert data["rules"][1] == {"selector": "bn.bias", "function": "zeros_"}
    assert done._repr_html_().startswith('<p style="font-weight:bold">Deep: initialised')
    many = nn.Sequential(*[nn.Linear(1, 1) for _ in range(30)])
    assert "… 20 more tensors …" in str(tp.init(many, ("**", nn.init.zeros_), seed=0))


def test_the_result_is_read_only_and_pickles() -> None:
    done = tp.init(net(), NORMAL, seed=1)
    for copied in (copy.copy(done), pickle.loads(pickle.dumps(done))):
        assert str(copied) == str(done) and copied.to_json() == done.to_json() and copied.shapes == done.shapes
    with pytest.raises(AttributeError):
        done.seed = 2  # type: ignore[misc]
    assert len({done, tp.init(net(), NORMAL, seed=1)}) == 2


def test_rules_of_one_kind_serve_init_and_groups() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    done = tp.init(model, tp.rule("**.bias", nn.init.ones_), ("**.weight", nn.init.zeros_), seed=0)
    assert done.names == ("0.weight", "0.bias")
    assert tp.init(model, tp.rule("nothing.**", nn.init.ones_, strict=False), seed=0).names == ()
    groups = tp.groups(model, ("**.bias", {"weight_decay": 0.0}), tp.rule("**.weight", lr=0.5), lr=0.1)
    assert [(group["lr"], group["param_names"]) for group in groups] == [(0.5, ["0.weight"]), (0.1, ["0.bias"])]
    with pytest.raises(OptionError, match="has a function, and groups takes options"):
        tp.groups(model, tp.rule("**", nn.init.zeros_))
    with pytest.raises(OptionError, match="has options of an optimizer, and init takes functions"):
        tp.init(model, tp.rule("**", lr=0.1), seed=0)
    with pytest.raises(OptionError, match="has a function and options"):
        tp.rule("**", nn.init.zeros_, lr=0.1)
    with pytest.raises(OptionError, match="is not a rule"):
        tp.rule("**", 3, lr=0.1)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(OptionError, match="lr=nan"):
        tp.groups(model, ("**", {"lr": float("nan")}))
