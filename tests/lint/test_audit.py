"""The audit: which rules run, suppression, output, and that it changes nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import torchparams as tp
from torchparams.errors import NoMatch, SelectorError, UnsupportedSource
from torchparams.lint.audit import RULES, rules_of
from torchparams.lint.findings import Audit, name_lines


def broken() -> Any:
    """A network with an error, a warning and a note."""
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(model[0].weight)
    nn.init.ones_(model[1].weight)
    with torch.no_grad():
        model[2].bias[0] = float("nan")
    return model


def ids(audit: Audit) -> list[str]:
    return [finding.id for finding in audit]


def test_what_it_prints() -> None:
    assert str(tp.audit(broken())) == (
        "Sequential\n"
        "error M301 non-finite-parameter: one such value can make the output and every gradient NaN\n"
        "  1 tensor holds NaN\n"
        "    2.bias\n"
        "    fix: tp.stats(model, '2.bias')  # how many, then load or initialise it again\n"
        "warning M302 constant-weight: all units compute the same output and get the same gradient, so "
        "they stay equal\n"
        "  every element of 1.weight is 1\n"
        "    1.weight\n"
        "    fix: nn.init.kaiming_uniform_(model[1].weight)\n"
        "note M303 zero-weight: earlier layers get no gradient until it changes, and it never changes if it is "
        "frozen\n"
        "  1 weight is zero in every element\n"
        "    0.weight\n"
        "    fix: nn.init.kaiming_uniform_(model[0].weight)  # unless it is zero on purpose\n"
        "1 error, 1 warning, 1 note · 6 parameter tensors · 21 of 34 rules\n"
        "not run: O101 to O110 (no optimizer was given), G101 to G103 (no gradients before backward())"
    )
    assert str(tp.audit(nn.Linear(2, 2), select="M")) == "Linear\nno findings · 2 parameter tensors · 18 rules"


def test_it_says_which_rules_had_nothing_to_look_at() -> None:
    model = nn.Linear(2, 2)
    assert list(tp.audit(model).not_run) == ["no optimizer was given", "no gradients before backward()"]
    model(torch.ones(1, 2)).sum().backward()
    (left,) = tp.audit(model).not_run.items()
    assert left == ("no optimizer was given", tuple(rule.id for rule in RULES if rule.id.startswith("O")))
    whole = tp.audit(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not whole.not_run
    assert str(whole) == "Linear\nno findings · 2 parameter tensors · 34 rules"
    assert tp.audit(model, select="O1,M1").to_json()["not_run"] == [
        {"reason": "no optimizer was given", "rules": [rule.id for rule in RULES if rule.id.startswith("O1")]}
    ]


def test_its_parts() -> None:
    audit = tp.audit(broken())
    assert (ids(audit), len(audit), audit[0].id) == (["M301", "M302", "M303"], 3, "M301")
    assert [len(part) for part in (audit.errors, audit.warnings, audit.notes)] == [1, 1, 1]
    assert audit.rules == tuple(rule.id for rule in RULES)
    assert "<p>" in audit._repr_html_()
    assert repr(audit) == str(audit)


def test_exit_codes() -> None:
    assert tp.audit(broken()).exit_code == 1
    assert tp.audit(broken(), select="M302").exit_code == 1
    assert tp.audit(broken(), select="M303").exit_code == 0
    assert tp.audit(nn.Linear(2, 2)).exit_code == 0


def test_json_has_only_its_types() -> None:
    form = tp.audit(broken(), select="M301").to_json()
    assert json.loads(json.dumps(form)) == form
    assert form == {
        "model": "Sequential",
        "parameters": 6,
        "rules": ["M301"],
        "counts": {"error": 1, "warning": 0, "note": 0},
        "suppressed": 0,
        "unread": [],
        "not_run": [],
        "findings": [
            {
                "id": "M301",
                "rule": "non-finite-parameter",
                "severity": "error",
                "what": "1 tensor holds NaN",
                "why": "one such value can make the output and every gradient NaN",
                "names": ["2.bias"],
                "where": "2",
                "fix": "tp.stats(model, '2.bias')  # how many, then load or initialise it again",
            }
        ],
        "left_out": [],
    }


def test_long_lists_are_cut_and_counted() -> None:
    names = [f"layers.{i}.fc.{key}" for i in range(20) for key in ("weight", "bias")]
    lines = list(name_lines(names))
    assert lines[0] == "layers.0.fc: weight, bias"
    assert lines[-1] == "… 28 more names in 14 more modules"
    assert list(name_lines([f"x.{i}" for i in range(30)])) == ["x: 0, 1, 2, 3, 4, 5, 6, 7, … 22 more"]
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(15))
    for layer in model:
        layer.weight.data = layer.weight.data.double()
    audit = tp.audit(model)
    assert len(audit) == 15
    assert "  … 5 more findings of M108\n" in str(audit)
    assert "more findings" not in str(audit.tree(limit=None))


# --- which rules ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("select", "ignore", "left"),
    [
        (None, None, ["M301", "M302", "M303"]),
        ("M3", None, ["M301", "M302", "M303"]),
        ("m301", None, ["M301"]),
        ("M301, M303", None, ["M301", "M303"]),
        (["M301", "zero-weight"], None, ["M301", "M303"]),
        (None, "M", []),
        (None, ["M302", "M303"], ["M301"]),
        ("M", "M30", []),
        ("M302", "M", ["M302"]),
        ("M", "constant-weight", ["M301", "M303"]),
        ("M302", "M302", []),
        ("O,G", None, []),
        ([], None, []),
    ],
)
def test_select_and_ignore(select: Any, ignore: Any, left: list[str]) -> None:
    assert ids(tp.audit(broken(), select=select, ignore=ignore)) == left


@pytest.mark.parametrize("text", ["X1", "M999", "", "M301,,M302", "M3011"])
def test_rules_that_are_not(text: str) -> None:
    with pytest.raises(SelectorError, match="No rule is called"):
        rules_of(text)
    with pytest.raises(SelectorError, match="No rule is called"):
        tp.audit(nn.Linear(1, 1), ignore=text)


def test_messages() -> None:
    with pytest.raises(SelectorError) as error:
        rules_of("hidden-parameters")
    assert str(error.value) == "No rule is called 'hidden-parameters'. Did you mean 'hidden-parameter'?"
    with pytest.raises(SelectorError) as error:
        rules_of("X")
    assert str(error.value) == "No rule is called 'X'. Ids begin with M, O, G or D, as in M101."
    with pytest.raises(UnsupportedSource) as unsupported:
        tp.audit({"weight": torch.ones(2)})
    assert str(unsupported.value) == (
        "A dict cannot be audited. An audit needs a live nn.Module. torchparams.stats looks at the values of a "
        "checkpoint."
    )
    with pytest.raises(UnsupportedSource) as unsupported:
        tp.audit(nn.Linear(1, 1), nn.Linear(1, 1).parameters())
    assert str(unsupported.value) == (
        "A generator is not an optimizer. An optimizer has param_groups. Pass the optimizer, or a list of optimizers "
        "used together."
    )


def test_a_table_of_a_model_is_the_model() -> None:
    assert ids(tp.audit(tp.of(broken()))) == ["M301", "M302", "M303"]
    with pytest.raises(UnsupportedSource):
        tp.audit(tp.of(broken()).select("0.**"))
    with pytest.raises(UnsupportedSource):
        tp.audit(tp.of({"a": torch.ones(1)}))


# --- suppression ----------------------------------------------------------------------------


def test_suppression_by_selector() -> None:
    audit = tp.audit(broken(), suppress={"M303": "0.**", "M302": "[ndim=2]"})
    assert (ids(audit), audit.suppressed) == (["M301"], 2)
    assert "\n1 error · 6 parameter tensors · 21 of 34 rules · 2 suppressed\n" in str(audit)
    assert ids(tp.audit(broken(), suppress={"M3": "**"})) == []
    assert ids(tp.audit(broken(), suppress={"zero-weight": "1.**", "M302": "**.bias"})) == ["M301", "M302", "M303"]


def test_what_is_left_of_a_finding_stays() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    tp.apply_(model, "**.weight", nn.init.zeros_)
    assert tp.audit(model, suppress={"M303": "0.**"})[0].names == ("1.weight",)


def test_suppression_of_what_the_network_does_not_name() -> None:
    model: Any = nn.Linear(2, 2)
    model.extra = {"head": nn.Linear(2, 2), "tail": nn.Linear(2, 2)}
    assert tp.audit(model, suppress={"M101": "extra.head.*"})[0].names == ("extra.tail.weight", "extra.tail.bias")
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr_scale": 1}], lr=0.1)
    assert ids(tp.audit(model, optimizer, suppress={"M101": "extra.**", "O106": "param_groups.*.lr_scale"})) == []


def test_a_suppression_that_hits_nothing() -> None:
    with pytest.raises(NoMatch):
        tp.audit(broken(), suppress={"M303": "nowhere.**"})
    with pytest.raises(SelectorError, match="No rule is called 'M9'"):
        tp.audit(broken(), suppress={"M9": "**"})


# --- nothing happens to the network ----------------------------------------------------------


def test_nothing_is_modified() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LSTM(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    model[0](torch.randn(2, 4)).sum().backward()
    optimizer.step()

    def state() -> Any:
        tensors = [(name, id(t), t.data_ptr(), t._version, t.requires_grad, id(t.grad), t.training if False else 0)
                   for name, t in (*model.named_parameters(), *model.named_buffers())]  # fmt: skip
        modes = [(name, module.training, sorted(vars(module))) for name, module in model.named_modules()]
        return tensors, modes, [sorted(group) for group in optimizer.param_groups], len(optimizer.state)

    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = state()
    tp.audit(model, optimizer)
    assert state() == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_no_forward_and_no_hook_runs() -> None:
    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, *_: object) -> None:
            raise AssertionError("forward ran")

        def parameters(self, recurse: bool = True) -> Any:
            raise AssertionError("parameters ran")

        named_parameters = named_modules = state_dict = modules = parameters  # type: ignore[assignment]  # all raise

    assert ids(tp.audit(nn.Sequential(Loud()))) == ["M111"]  # whatever its state_dict would do


def test_torch_function_of_a_subclass_does_not_run() -> None:
    class Watched(torch.Tensor):
        calls: list[str] = []  # noqa: RUF012  # one for all, on purpose

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.calls.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]  # torch's

    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(3, 3).as_subclass(Watched))
    Watched.calls.clear()
    assert ids(tp.audit(model)) == ["M302"]
    assert Watched.calls == []


# --- what it costs --------------------------------------------------------------------------


class Counted(dict[str, Any]):
    """Counts how often a module's parameters are gone through."""

    reads = 0

    def items(self) -> Any:
        type(self).reads += 1
        return super().items()


def test_the_work_is_linear() -> None:
    def reads(count: int) -> int:
        model = nn.ModuleList(nn.Linear(2, 2) for _ in range(count))
        for module in model:
            module._parameters = Counted(module._parameters)
        Counted.reads = 0
        tp.audit(model, torch.optim.SGD(model.parameters(), lr=0.1))
        return Counted.reads

    few, many = reads(20), reads(200)
    assert few > 0
    assert many <= 10 * few


def test_equal_matrices_are_compared_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchparams.lint import rules_memory

    calls: list[int] = []
    digest = rules_memory._digest

    def counted(tensor: torch.Tensor) -> bytes:
        calls.append(1)
        return digest(tensor)

    monkeypatch.setattr(rules_memory, "_digest", counted)
    model: Any = nn.ModuleList(nn.Embedding(4, 4) for _ in range(50))
    for place, layer in enumerate(model):  # one pair of extremes, and no two with the same values
        layer.weight.data.zero_()[0, 0] = 1.0
        layer.weight.data[3, 3] = -1.0
        layer.weight.data[1, 1] = place / 100
    assert ids(tp.audit(model)) == []
    assert len(calls) == 50
