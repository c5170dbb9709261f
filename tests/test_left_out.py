"""State outside the table: every function reports it, and none drops it silently."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import torchparams as tp
from torch_files import saved, written
from torchparams.errors import NotReadable, PlanError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Packed(nn.Module):
    """A layer like those of bitsandbytes: its scale is in the state dict, and is neither parameter nor buffer."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
        self.scale = torch.tensor(scale)
        self.asked = 0

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.asked += 1
        destination[f"{prefix}SCB"] = self.scale


KIND = f"{__name__}.Packed"


class Counter(nn.Module):
    def __init__(self, count: int = 0) -> None:
        super().__init__()
        self.count = count

    def get_extra_state(self) -> Any:
        return {"count": self.count}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]


class Own(nn.Module):
    def state_dict(self, *args: Any, **options: Any) -> Any:
        return {**super().state_dict(*args, **options), "more": torch.ones(1)}


def add_more(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    state_dict[f"{prefix}more"] = torch.ones(1)


def net(scale: float = 1.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), Packed(scale))


def dynamic(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantise: Any = torch.ao.quantization.quantize_dynamic
        quantised: nn.Module = quantise(model, {nn.Linear})
    return quantised


def recurrent() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantise: Any = torch.ao.quantization.quantize_dynamic
        quantised: nn.Module = quantise(nn.Sequential(nn.LSTM(4, 4), nn.LSTM(4, 4)), {nn.LSTM})
    return quantised


# --- which modules -------------------------------------------------------------------------------


def test_the_ways_to_write_state() -> None:
    hooked: Any = nn.Linear(1, 1)
    instance, sound = nn.Linear(1, 1), nn.utils.spectral_norm(nn.Linear(2, 2))
    hooked.register_state_dict_post_hook(add_more)
    instance._save_to_state_dict = lambda *args: None  # type: ignore[method-assign]
    model = nn.ModuleDict(
        {"packed": Packed(), "counter": Counter(), "own": Own(), "hook": hooked, "instance": instance, "sound": sound}
    )
    found = {each.name: each.reason for each in tp.of(model).left_out}
    assert found == {
        "packed": "writes state of its own to the state dict",
        "counter": "has extra state",
        "own": "has a state_dict of its own",
        "hook": "changes the state dict with a hook, add_more",
        "instance": "writes state of its own to the state dict",
    }
    assert model["packed"].asked == 0  # no code of a module is run


def test_plain_layers_have_none() -> None:
    layers = (nn.LSTM(2, 2), nn.LazyLinear(2), nn.BatchNorm1d(2), nn.MultiheadAttention(2, 1), nn.Embedding(2, 2))
    assert tp.of(nn.ModuleList(layers)).left_out == ()
    fake: Any = torch.ao.quantization.FakeQuantize
    assert tp.of(fake()).left_out == ()  # it writes its buffers, and nothing else


def test_names_are_canonical_and_shared_modules_come_once() -> None:
    counter = Counter()
    model = nn.DataParallel(nn.Sequential(counter, nn.Sequential(counter, Packed())))
    assert [each.name for each in tp.of(model).left_out] == ["0", "1.1"]
    assert tp.of(Packed()).left_out[0].name == ""


def test_a_selection_names_the_modules_that_it_concerns() -> None:
    params = tp.of(net())
    for text, count in (("0.*", 0), ("1.weight", 1), ("**", 1), ("**.bias", 0), ("~0.*", 1)):
        assert len(params.select(text).left_out) == count, text


# --- every verb names them -----------------------------------------------------------------------

RESULTS: dict[str, Callable[[nn.Module], Any]] = {
    "ls": tp.ls,
    "ls tree": lambda model: tp.ls(model, tree=True),
    "show": lambda model: tp.show(model, "1.weight"),
    "stats": lambda model: tp.stats(model, "0.* | 1.*"),
    "diff": lambda model: tp.diff(model, model),
    "audit": tp.audit,
    "freeze": tp.freeze,
    "unfreeze": tp.unfreeze,
    "apply_": lambda model: tp.apply_(model, None, lambda tensor: tensor),
    "init": lambda model: tp.init(model, ("0.*", nn.init.zeros_)),
    "groups": lambda model: tp.groups(model, lr=0.1),
    "verify": lambda model: tp.verify(model, tp.digest(model.state_dict())),
    "load": lambda model: tp.load(model, net().state_dict(), strict=False),
    "coverage": lambda model: tp.coverage(model, net().state_dict()),
}


@pytest.mark.parametrize("verb", RESULTS)
def test_every_verb_names_the_module(verb: str) -> None:
    result = RESULTS[verb](net())
    said = str(result)
    assert f"1 ({KIND})" in said or "module (1)" in said, said
    form = json.dumps(result.to_json())
    assert (
        f'"left_out": [{{"name": "1", "kind": "{KIND}"' in form
        or "1 module (1)" in form
        or (verb in ("verify", "diff") and KIND in form)
    )


def test_printing_the_table_names_the_modules_of_one_kind_in_a_line() -> None:
    lines = str(tp.of(nn.Sequential(nn.Linear(1, 1), *(Packed() for _ in range(5))))).split("\n")
    assert lines[-2:] == [
        "not in the table: the state of 5 modules",
        f"  1, 2, 3 and 2 more ({KIND}): writes state of its own to the state dict",
    ]


# --- nothing is taken for the same ---------------------------------------------------------------


def test_models_that_differ_in_it_are_not_the_same() -> None:
    a, b = net(1.0), net(2.0)
    b.load_state_dict(a.state_dict(), strict=False)
    found = tp.diff(a, b)
    assert not found.same
    assert "state outside the table, not compared · 3 identical" in str(found)
    assert tp.diff(a, b, "0.*").same
    assert not tp.diff(a, b, "1.weight").same
    assert not tp.diff(dynamic(0), dynamic(1)).same


def test_a_digest_would_not_notice_it_and_is_refused() -> None:
    with pytest.raises(NotReadable, match=r"1 \(.*Packed\) writes state .* could have the same digest"):
        tp.digest(net())
    with pytest.raises(NotReadable, match="as does 1 more"):
        tp.digest(recurrent())
    assert tp.digest(net(), "0.*").left_out == ()
    assert tp.digest(net(1.0).state_dict()).digest != tp.digest(net(2.0).state_dict()).digest


def test_verify_does_not_pass() -> None:
    model = net()
    manifest = tp.digest(model.state_dict())
    found = tp.verify(model, manifest)
    assert not found.ok
    assert [(check.what, check.outcome) for check in found.checks][1] == ("other state", "failed")
    assert tp.verify(model, manifest, "0.*").ok
    assert not tp.verify({}, tp.digest({})).ok


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_save_refuses_and_the_state_dict_is_saved_whole(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{suffix}"
    with pytest.raises(PlanError, match=r"which would not be written.*Pass model.state_dict\(\)"):
        tp.save(net(), path)
    assert not path.exists()
    assert tp.save(net(), path, "0.*").tensors == 2
    assert tp.save(net(3.0).state_dict(), path).tensors == 4
    assert tp.of(path).numpy("1.SCB") == 3.0
    refused: tuple[Callable[[], object], ...] = (
        lambda: tp.convert(recurrent(), path),
        lambda: tp.merge([net(), net()], path),
        lambda: tp.delta(net(), net(), tmp_path / "d.safetensors"),
    )
    for verb in refused:
        with pytest.raises(PlanError, match="would not be written"):
            verb()


# --- state dicts and files -----------------------------------------------------------------------


def test_extra_state_of_a_state_dict_is_named(tmp_path: Path) -> None:
    state = nn.Sequential(nn.Linear(1, 1), Counter(3)).state_dict()
    path = written(tmp_path, saved(state))
    for x in (state, path):
        (found,) = tp.of(x).left_out
        assert (found.name, found.reason) == ("1._extra_state", "is the extra state of a layer, not a tensor")
        assert not tp.diff(x, x).same
        assert "1._extra_state" in str(tp.digest(x))
        assert tp.digest(x).to_json()["left_out"] == [found.to_json()]
        assert ("other state", "not possible") in [(c.what, c.outcome) for c in tp.verify(x).checks]
    written_file = tp.save(state, tmp_path / "a.safetensors")
    assert written_file.dropped == (("1._extra_state", "is the extra state of a layer, not a tensor"),)
    assert tp.of({"step": 3, "w": np.ones(1)}).left_out == ()


def test_packed_weights_of_a_pickled_module_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, saved(dynamic()))
    assert [each.name for each in tp.of(path).left_out] == [
        "0._packed_params._packed_params",
        "2._packed_params._packed_params",
    ]
    assert not tp.diff(path, path).same
