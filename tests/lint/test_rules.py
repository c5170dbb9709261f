"""Every rule has a finding in its failing example and none in its passing one; the docs show these examples."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from audit_docs import audit_page, run
from torch import nn

import torchparams as tp
from torchparams.lint.audit import RULES
from torchparams.lint.findings import SEVERITIES, AuditRule

EACH = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)


@EACH
def test_the_failing_example_fails_by_this_rule_alone(rule: AuditRule) -> None:
    found = run(rule.failing, rule.ranks)
    assert [finding.id for finding in found] == [rule.id]
    (finding,) = found
    assert finding.names
    assert (finding.severity, finding.why) == (rule.severity, rule.why)


@EACH
def test_the_passing_example_passes_every_rule(rule: AuditRule) -> None:
    assert list(run(rule.passing, rule.ranks)) == []


# The others' code has parts that only the reader knows; and of M109 the fix needs a second device with memory.
WHAT_FIXES_ITSELF = set("M101 M102 M103 M104 M108 M201 M202 M302 M303 O101 O104 O108".split())  # noqa: SIM905  # shorter


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.id in WHAT_FIXES_ITSELF], ids=lambda rule: rule.id)
def test_the_fix_is_code_that_fixes(rule: AuditRule) -> None:
    torch.manual_seed(0)
    made: dict[str, Any] = {"torch": torch, "nn": nn, "tp": tp}
    exec(rule.failing, made)
    (finding,) = tp.audit(made["model"], made.get("optimizer"), select=rule.id)
    with torch.no_grad():
        exec(finding.fix, made | {"self": made["model"]})
    assert list(tp.audit(made["model"], made.get("optimizer"), select=rule.id)) == []


@EACH
def test_a_rule_is_described(rule: AuditRule) -> None:
    assert re.fullmatch(r"[MOGD]\d{3}", rule.id)
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", rule.name)
    assert rule.severity in SEVERITIES
    for text in (rule.title, rule.why):
        assert text
        assert not text.endswith(".")
        assert "\n" not in text
    assert rule.title[0].isupper()


def test_ids_and_names_are_distinct_and_in_order() -> None:
    ids = [rule.id for rule in RULES]
    assert len(set(ids)) == len(ids)
    assert len({rule.name for rule in RULES}) == len(RULES)
    for family in "MOGD":
        of_family = [id for id in ids if id[0] == family]
        assert of_family == sorted(of_family)


def test_every_rule_is_in_the_page() -> None:
    page = audit_page()
    for rule in RULES:
        assert f"### {rule.id} {rule.name}\n" in page


def zeroed(model: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Findings about zero weights, once every weight of the model is zero."""
    tp.apply_(model, "**.weight[ndim>=2]", nn.init.zeros_)
    return [(finding.id, finding.names) for finding in tp.audit(model, select="M3")]


def test_zero_layers_behind_each_other() -> None:
    class Two(nn.Module):
        def __init__(self, second: nn.Module) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)
            self.norm = nn.LayerNorm(4)
            self.b = second

    both = [("M304", ("a.weight", "b.weight"))]
    apart = [("M303", ("a.weight", "b.weight"))]
    assert zeroed(Two(nn.Linear(4, 2))) == both
    assert zeroed(Two(nn.Linear(5, 2))) == apart, "it cannot take what the first gives"
    assert zeroed(Two(nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))) == [("M304", ("a.weight", "b.1.weight"))]
    assert zeroed(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(36, 2)))[0][0] == "M304"
    assert zeroed(nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 2)))[0][0] == "M304"
    assert zeroed(nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]))[0][0] == "M303", "in what order is not known"
    assert zeroed(nn.Sequential(nn.Linear(2, 2)))[0][0] == "M303"


def test_a_layer_between_parts_zero_layers() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[2].weight)
    assert [finding.id for finding in tp.audit(model, select="M3")] == ["M303"]
    nested = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 2)))
    assert zeroed(nested) == [("M304", ("0.0.weight", "1.0.weight"))]
