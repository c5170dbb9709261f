"""Types of an audit: rule, hit, finding, and the audit that holds them.

A **rule** is data and a function. To add one, write the function in the module of its family and add an
`AuditRule` to the tuple `RULES` at its end. The audit, the command, `docs/audit.md` and the tests of the examples read
this tuple.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchparams.left_out import LeftOut, left_out_lines
from torchparams.render.result import Result
from torchparams.render.tree import Cell, Column, Row, Table, Text, Tree, plural, printable, to_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torchparams.lint.context import Context

SEVERITIES = ("error", "warning", "note")
"""Severities. An error is a mistake, a warning is probably one, and a note is legal but rarely intended."""

_STYLES = {"error": "error", "warning": "warn", "note": "dim"}

FINDINGS_SHOWN = 10
"""Maximum number of findings of one rule in a tree."""

NAME_LINES = 6
"""Maximum number of lines of names, one for each module, for one finding in a tree."""

NAMES_PER_LINE = 8
"""Maximum number of names in such a line."""


@dataclass(frozen=True, slots=True)
class Hit:
    """Result of a rule's function for each mistake that it finds.

    Attributes:
        names: Canonical names of the parameters; other objects are named by their path, with dots
            (`blocks.0.weight`, `param_groups.1.lr_scale`).
        what: Description of the mistake, in one sentence without a full stop.
        fix: Code that fixes it.
        where: Path of the module with the mistake; empty for the network itself.
    """

    names: tuple[str, ...]
    what: str
    fix: str
    where: str = ""


@dataclass(frozen=True, slots=True)
class AuditRule:
    """Mistake that an audit looks for.

    Attributes:
        id: A letter for its family (`M` model, `O` optimizer, `G` gradient, `D` distributed) and three digits.
        name: A short name of words and hyphens.
        severity: One of `SEVERITIES`.
        title: Description for a list of rules.
        why: Reason why it matters, in one sentence.
        check: Function that yields the hits.
        failing: Example with a finding: code that makes a `model` (and an `optimizer`, for optimizer rules); `torch`,
            `nn` and `tp` are imported.
        passing: The same code without the mistake.
        background: Background for the documentation, such as exceptions of the rule and their reasons.
        ranks: Processes that run the examples, in a process group.
    """

    id: str
    name: str
    severity: str
    title: str
    why: str
    check: Callable[[Context], Iterable[Hit]]
    failing: str
    passing: str
    background: str = ""
    ranks: int = 1

    def finding(self, hit: Hit) -> Finding:
        """The finding for `hit`."""
        return Finding(self.id, self.name, self.severity, hit.names, hit.what, self.why, hit.fix, hit.where)


class Rules(Result, tuple[AuditRule, ...]):
    """Rules, in order; they print as a table."""

    __slots__ = ()

    def tree(self) -> Tree:
        """The rules as a tree: id, name, severity and title."""
        columns = (Column("id", style="name"), Column("name"), Column("severity"), Column("finds", wraps=True))
        rows = (Row((r.id, r.name, Cell(r.severity, _STYLES[r.severity]), r.title)) for r in self)
        return Tree((Table(columns, tuple(rows)),))

    def to_json(self) -> dict[str, Any]:
        """The rules as JSON data."""
        return {
            "rules": [
                {"id": r.id, "name": r.name, "severity": r.severity, "title": r.title, "why": r.why} for r in self
            ]
        }


@dataclass(frozen=True, slots=True)
class Finding:
    """Mistake found by an audit.

    Attributes:
        id: The rule's id, such as `M101`.
        rule: The rule's name.
        severity: One of `SEVERITIES`.
        names: Canonical names of the parameters; see `Hit`.
        what: Description of the mistake, in one sentence.
        why: Reason why it matters, in one sentence.
        fix: Code that fixes it.
        where: Path of the module with the mistake; empty for the network itself.
    """

    id: str
    rule: str
    severity: str
    names: tuple[str, ...]
    what: str
    why: str
    fix: str
    where: str = ""

    def to_json(self) -> dict[str, Any]:
        """The finding as JSON data."""
        return {
            "id": self.id,
            "rule": self.rule,
            "severity": self.severity,
            "names": list(self.names),
            "what": self.what,
            "why": self.why,
            "fix": self.fix,
            "where": self.where,
        }

    def tree(self) -> Tree:
        """The finding as a tree."""
        return Tree((self._heading(), *self._body()))

    def report(self) -> Tree:
        """Deprecated name of `tree`, which will be removed in the next version."""
        warnings.warn("Finding.report is now tree", DeprecationWarning, stacklevel=2)
        return self.tree()

    def _heading(self) -> Text:
        return Text(printable(f"{self.severity} {self.id} {self.rule}: {self.why}"), _STYLES.get(self.severity, ""))

    def _body(self) -> Iterator[Text]:
        yield Text(printable(f"  {self.what}"))
        for line in name_lines(self.names):
            yield Text(printable(f"    {line}"), "name")
        for place, line in enumerate(self.fix.split("\n")):
            yield Text(printable(f"    {'fix: ' if place == 0 else '     '}{line}"), "dim")

    def __str__(self) -> str:
        return to_text(self.tree())


def id_range(ids: Sequence[str]) -> str:
    """Range of rule ids, for a message.

    >>> id_range(["G101", "G102", "G103"]), id_range(["G101"])
    ('G101 to G103', 'G101')
    """
    return ids[0] if len(ids) == 1 else f"{ids[0]} to {ids[-1]}"


def name_lines(names: Iterable[str]) -> Iterator[str]:
    """Names in a few lines, one line for each module; names beyond the limits are counted.

    >>> list(name_lines(["a.fc.weight", "a.fc.bias", "scale"]))
    ['a.fc: weight, bias', 'scale']
    """
    by: dict[str, list[str]] = {}
    for name in names:
        path, _, last = name.rpartition(".")
        by.setdefault(path, []).append(last)
    for place, (path, lasts) in enumerate(by.items()):
        if place == NAME_LINES:
            left = sum(map(len, list(by.values())[place:]))
            yield f"… {plural(left, 'more name')} in {plural(len(by) - place, 'more module')}"
            return
        more = len(lasts) - NAMES_PER_LINE
        shown = ", ".join(lasts[:NAMES_PER_LINE]) + (f", … {more:,} more" if more > 0 else "")
        if not path:
            yield shown
        elif len(lasts) == 1:
            yield f"{path}.{shown}"
        else:
            yield f"{path}: {shown}"


@dataclass(frozen=True, slots=True, repr=False)
class Audit(Result):
    """Result of an audit: a sequence of findings, errors first, and the rules that ran.

    Attributes:
        label: Label of the network.
        findings: Findings, errors first, then by the rules' ids.
        rules: Ids of the selected rules.
        parameters: Number of parameters in the network.
        suppressed: Number of findings that `suppress` removed entirely.
        unread: Names of tensors whose values could not be read because their class does not expose them, as in
            distributed tensors and in quantised ones of unknown classes.
        left_out: State of the network outside its parameters and buffers, which no rule checked.
        not_run: Reason → ids of the rules that could not run.

    >>> from torch import nn
    >>> import torchparams as tp
    >>> found = tp.audit(nn.Linear(2, 2))
    >>> len(found), found.exit_code
    (0, 0)
    """

    label: str
    findings: tuple[Finding, ...]
    rules: tuple[str, ...]
    parameters: int
    suppressed: int = 0
    unread: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    not_run: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __getitem__(self, place: int) -> Finding:
        return self.findings[place]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that are errors."""
        return self._of("error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings that are warnings."""
        return self._of("warning")

    @property
    def notes(self) -> tuple[Finding, ...]:
        """Findings that are notes."""
        return self._of("note")

    def _of(self, severity: str) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == severity)

    @property
    def exit_code(self) -> int:
        """1 if there is an error or a warning, otherwise 0, even with notes."""
        return int(any(finding.severity != "note" for finding in self.findings))

    def tree(self, *, limit: int | None = FINDINGS_SHOWN) -> Tree:
        """The findings as a tree, errors first, grouped by rule, with a summary.

        Args:
            limit: Maximum number of findings of one rule to show; None for all.
        """
        parts: list[Text] = [Text(printable(self.label), "title")]
        by_rule: dict[str, list[Finding]] = {}
        for finding in self.findings:
            by_rule.setdefault(finding.id, []).append(finding)
        for findings in by_rule.values():
            parts.append(findings[0]._heading())
            for finding in findings[:limit]:
                parts += finding._body()
            if limit is not None and len(findings) > limit:
                parts.append(Text(f"  … {plural(len(findings) - limit, 'more finding')} of {findings[0].id}"))
        if self.unread:
            parts.append(Text(f"{plural(len(self.unread), 'tensor')} whose values could not be read", "warn"))
            parts += [Text(printable(f"    {line}"), "name") for line in name_lines(self.unread)]
        parts += left_out_lines(self.left_out)
        parts.append(Text(self._summary(), "dim" if self.findings else "good"))
        if self.not_run:
            reasons = (f"{id_range(ids)} ({reason})" for reason, ids in self.not_run.items())
            parts.append(Text(f"not run: {', '.join(reasons)}", "dim"))
        return Tree(tuple(parts))

    def _summary(self) -> str:
        counts = Counter(finding.severity for finding in self.findings)
        found = ", ".join(plural(counts[severity], severity) for severity in SEVERITIES if counts[severity])
        idle = sum(map(len, self.not_run.values()))
        rules = plural(len(self.rules), "rule")
        said = [found or "no findings", plural(self.parameters, "parameter tensor")]
        said.append(f"{len(self.rules) - idle:,} of {rules}" if idle else rules)
        if self.suppressed:
            said.append(f"{self.suppressed:,} suppressed")
        return " · ".join(said)

    def to_json(self) -> dict[str, Any]:
        """The audit as JSON data."""
        return {
            "model": self.label,
            "parameters": self.parameters,
            "rules": list(self.rules),
            "counts": {severity: len(self._of(severity)) for severity in SEVERITIES},
            "suppressed": self.suppressed,
            "unread": list(self.unread),
            "not_run": [{"reason": reason, "rules": list(ids)} for reason, ids in self.not_run.items()],
            "findings": [finding.to_json() for finding in self.findings],
            "left_out": [each.to_json() for each in self.left_out],
        }
