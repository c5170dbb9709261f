"""Findings of the page: flags of `stats`, and findings of an audit."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torchparams.lint.findings import Audit
    from torchparams.measure.flags import Flag
    from torchparams.parameters import Parameters

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


def audit_of(params: Parameters) -> Audit | None:
    """Audit of a live model; None for other sources."""
    module = getattr(params.source, "module", None)
    torch = sys.modules.get("torch")
    if torch is None or params.source.format != "module" or not isinstance(module, torch.nn.Module):
        return None
    from torchparams.lint.audit import audit

    return audit(module)
