"""Table of the findings of watchdogs: a row for each step and rule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torchparams.measure.stats_tree import number
from torchparams.render.tree import Column, Row, Table, cut

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchparams.record.watchdogs import RecordFinding

ROWS_SHOWN = 10


def findings_table(findings: Iterable[RecordFinding]) -> Table:
    """Table of findings, by step and rule: how many parameters, the first one, and its value.

    >>> from torchparams.record.watchdogs import RecordFinding
    >>> found = [RecordFinding(3, "dead-rows", name, 2.0, "") for name in ("a", "b")]
    >>> [row.cells for row in findings_table(found).rows]
    [('3', 'dead-rows', '2', 'a', '2')]
    """
    groups: dict[tuple[int, str], list[RecordFinding]] = {}
    for finding in findings:
        groups.setdefault((finding.step, finding.rule), []).append(finding)
    columns = (
        Column("step", right=True),
        Column("finding"),
        Column("parameters", right=True, drop=1),
        Column("first", style="name", shrink=True),
        Column("value", right=True),
    )
    rows = [
        Row((f"{step:,}", rule, f"{len(found):,}", found[0].name, _value(found[0].value)))
        for (step, rule), found in groups.items()
    ]
    return Table(columns, cut(rows, ROWS_SHOWN))


def _value(value: float) -> str:
    return "–" if math.isnan(value) else number(value)
