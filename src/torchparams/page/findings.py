"""Findings of the page: flags of `stats`, and findings of an audit and of the watchdogs of a record."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torchparams.lint.findings import Audit
    from torchparams.measure.flags import Flag
    from torchparams.parameters import Parameters
    from torchparams.record.watchdogs import RecordFinding

MOST = 1000
"""Maximum number of tensors of a finding; further ones are counted."""

_SEVERITY = {"non-finite": "error"}
_TITLES = {
    "non-finite": "NaN or infinite values",
    "zero": "All values are zero",
    "constant": "All values are equal",
    "saturated": "Values at the limit of the dtype",
    "scale": "Scale far from the siblings",
}


def of_flags(flags: Iterable[Flag], places: Mapping[str, int]) -> list[dict[str, Any]]:
    """One finding for each kind of flag, with a reason for each tensor."""
    kinds: dict[str, list[Flag]] = {}
    for flag in flags:
        kinds.setdefault(flag.kind, []).append(flag)
    return [
        {
            "from": "stats",
            "id": kind,
            "severity": _SEVERITY.get(kind, "warning"),
            "title": _TITLES[kind],
            "count": len(found),
            "items": [[places[flag.name], flag.reason] for flag in found[:MOST]],
        }
        for kind, found in kinds.items()
    ]


def of_audit(audit: Audit, places: Mapping[str, int]) -> list[dict[str, Any]]:
    """Findings of an audit: tensors by index, and names that are not in the table."""
    return [
        {
            "from": "audit",
            "id": finding.id,
            "severity": finding.severity,
            "title": finding.rule.replace("-", " ").capitalize(),
            "what": finding.what,
            "why": finding.why,
            "fix": finding.fix,
            "where": finding.where,
            "count": len(finding.names),
            "items": [[places[name], ""] for name in finding.names[:MOST] if name in places],
            "names": [name for name in finding.names[:MOST] if name not in places],
        }
        for finding in audit.findings
    ]


def of_record(findings: Iterable[RecordFinding], places: Mapping[str, int]) -> list[dict[str, Any]]:
    """One finding for each rule of a watchdog, with the message and the step for each tensor, by its first step."""
    from torchparams.record.watchdogs import WATCHDOGS

    about = {watchdog.name: watchdog.about for watchdog in WATCHDOGS}
    rules: dict[str, list[RecordFinding]] = {}
    for finding in findings:
        rules.setdefault(finding.rule, []).append(finding)
    return [
        {
            "from": "record",
            "id": rule,
            "severity": "error" if rule.startswith("nonfinite") else "warning",
            "title": rule.replace("-", " ").capitalize(),
            "why": about.get(rule, ""),
            "count": len(found),
            "items": [[places[each.name], each.message, each.step] for each in found[:MOST] if each.name in places],
            "names": [str(each) for each in found[:MOST] if each.name not in places],
        }
        for rule, found in rules.items()
    ]


def audit_of(params: Parameters) -> Audit | None:
    """Audit of a live model; None for other sources."""
    module = getattr(params.source, "module", None)
    torch = sys.modules.get("torch")
    if torch is None or params.source.format != "module" or not isinstance(module, torch.nn.Module):
        return None
    from torchparams.lint.audit import audit

    return audit(module)
