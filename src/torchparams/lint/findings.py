"""What an audit is made of: a rule, what a rule hits, a finding, and the audit that holds them all.

A **rule** is data and a function. To add one, write the function in the module of its family and add a `Rule` to the
tuple `RULES` at its end: the audit, the command, `docs/audit.md` and the tests of the examples take it from there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchparams.left_out import LeftOut, left_out_lines
from torchparams.render.result import Result
from torchparams.render.tree import Cell, Column, Report, Row, Table, Text, plural, printable, to_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torchparams.lint.context import Context

SEVERITIES = ("error", "warning", "note")
"""How bad a finding is. An error is a mistake; a warning probably is one; a note is legal, and rarely what is meant."""

_STYLES = {"error": "error", "warning": "warn", "note": "dim"}

FINDINGS_SHOWN = 10
"""Findings of one rule that a report shows."""

NAME_LINES = 6
"""Lines of names, one for each module, that a report shows of one finding."""

NAMES_PER_LINE = 8
"""Names that each of them shows."""


@dataclass(frozen=True, slots=True)
class Hit:
    """What a rule's function gives for each thing that it finds.

    Attributes:
        names: The parameters, by canonical name; what has no such name is spelled the way that leads to it, with
            dots (`blocks.0.weight`, `param_groups.1.lr_scale`).
        what: What is wrong, in one sentence without a full stop.
        fix: What to do, as code.
        where: The path of the module that it is wrong in; empty for the network itself.
    """

    names: tuple[str, ...]
    what: str
    fix: str
    where: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that an audit looks for.

    Attributes:
        id: A letter for its family (`M` model, `O` optimizer, `G` gradient) and three digits.
        name: A short name of words and hyphens.
        severity: One of `SEVERITIES`.
        title: What it finds, for a list of rules.
        why: Why that matters, in one sentence.
        check: Looks, and gives what it finds.
        failing: Code that makes a `model` (and an `optimizer`, for rules about one) in which the rule finds something;
            `torch`, `nn` and `tp` are imported.
        passing: The same without the mistake.
        background: What else there is to know: what the rule leaves alone, and why. For the documentation.
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

    def finding(self, hit: Hit) -> Finding:
        """What an audit says of `hit`."""
        return Finding(self.id, self.name, self.severity, hit.names, hit.what, self.why, hit.fix, hit.where)


class Rules(Result, tuple[Rule, ...]):
    """Rules, in order; they print as a table."""

    __slots__ = ()

    def report(self) -> Report:
        """The rules as a report: id, name, severity, and what they find."""
        columns = (Column("id", style="name"), Column("name"), Column("severity"), Column("finds", wraps=True))
        rows = (Row((r.id, r.name, Cell(r.severity, _STYLES[r.severity]), r.title)) for r in self)
        return Report((Table(columns, tuple(rows)),))

    def to_json(self) -> dict[str, Any]:
        """The rules as JSON takes them."""
        return {
            "rules": [
                {"id": r.id, "name": r.name, "severity": r.severity, "title": r.title, "why": r.why} for r in self
            ]
        }


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        id: The rule's id, such as `M101`.
        rule: The rule's name.
        severity: One of `SEVERITIES`.
        names: The parameters, by canonical name; see `Hit`.
        what: What is wrong, in one sentence.
        why: Why it matters, in one sentence.
        fix: What to do, as code.
        where: The path of the module that it is wrong in; empty for the network itself.
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
        """The finding as JSON takes it."""
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

    def report(self) -> Report:
        """The finding as a report."""
        return Report((self._heading(), *self._body()))

    def _heading(self) -> Text:
        return Text(printable(f"{self.severity} {self.id} {self.rule}: {self.why}"), _STYLES.get(self.severity, ""))

    def _body(self) -> Iterator[Text]:
        yield Text(printable(f"  {self.what}"))
        for line in name_lines(self.names):
            yield Text(printable(f"    {line}"), "name")
        for place, line in enumerate(self.fix.split("\n")):
            yield Text(printable(f"    {'fix: ' if place == 0 else '     '}{line}"), "dim")

    def __str__(self) -> str:
        return to_text(self.report())


def id_range(ids: Sequence[str]) -> str:
    """The first and the last of rules' ids.

    >>> id_range(["G101", "G102", "G103"]), id_range(["G101"])
    ('G101 to G103', 'G101')
    """
    return ids[0] if len(ids) == 1 else f"{ids[0]} to {ids[-1]}"


def name_lines(names: Iterable[str]) -> Iterator[str]:
    """The names in few lines: those of one module behind its path, and what is too much counted.

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
    """What an audit found: a sequence of findings, errors first, and the rules that were asked.

    Attributes:
        label: What the network is called.
        findings: What is wrong, errors first, then by the rules' ids.
        rules: Ids of the rules that were asked.
        parameters: How many parameters were looked at.
        suppressed: How many findings `suppress` took away entirely.
        unread: Names of the tensors whose values could not be read: their class keeps them to itself, as that of a
            distributed or quantised tensor does.
        left_out: State of the network outside its parameters and buffers, which no rule looked at.
        not_run: By reason, ids of the rules that had nothing to look at.

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
        """The findings that are errors."""
        return self._of("error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that are warnings."""
        return self._of("warning")

    @property
    def notes(self) -> tuple[Finding, ...]:
        """The findings that are notes."""
        return self._of("note")

    def _of(self, severity: str) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == severity)

    @property
    def exit_code(self) -> int:
        """1 where there is an error or a warning, else 0: notes alone are no reason to fail."""
        return int(any(finding.severity != "note" for finding in self.findings))

    def report(self, *, limit: int | None = FINDINGS_SHOWN) -> Report:
        """The findings as a report, errors first and by rule, and what they are in all.

        Args:
            limit: Most findings of one rule to show; None for all.
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
        return Report(tuple(parts))

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
        """The audit as JSON takes it."""
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
