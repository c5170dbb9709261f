"""Options of one parameter, with the rules that gave them and the values they replaced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchparams.render.result import Result
from torchparams.render.tree import Column, Row, Table, Text, Tree, printable
from torchparams.train._options import plain, text


@dataclass(frozen=True, slots=True)
class Given:
    """One option of one parameter.

    Attributes:
        option: Its name.
        value: Its value.
        by: Selector of the rule that gave it, or `defaults`; with the factor of a layer decay.
        instead: Overridden origins and their values, last first.
    """

    option: str
    value: Any
    by: str
    instead: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, repr=False)
class Explained(Result):
    """Options of one parameter and their origins; prints as a table.

    Attributes:
        name: The parameter.
        group: Index of its group; None if it is left out because it is frozen.
        depth: Its depth in the network, with a layer decay; otherwise None.
        given: Its options.
        rules: Selectors of all rules that match it, in order.
    """

    name: str
    group: int | None
    depth: int | None
    given: tuple[Given, ...]
    rules: tuple[str, ...]

    def tree(self) -> Tree:
        """The explanation as a tree, as printed."""
        where = "is in no group: it is frozen" if self.group is None else f"is in group {self.group}"
        deep = "" if self.depth is None else f", at depth {self.depth}"
        parts: list[Text | Table] = [Text(printable(f"{self.name} {where}{deep}"), "title")]
        if self.given:
            columns = (
                Column("option", style="name"),
                Column("value", right=True),
                Column("given by", shrink=True),
                Column("instead of", style="dim", shrink=True, yields=True),
            )
            rows = tuple(
                Row((one.option, text(one.value), one.by, ", ".join(f"{text(v)} ({by})" for by, v in one.instead)))
                for one in self.given
            )
            parts.append(Table(columns, rows))
        return Tree(tuple(parts))

    def to_json(self) -> dict[str, Any]:
        """The explanation as JSON data."""
        return {
            "name": self.name,
            "group": self.group,
            "depth": self.depth,
            "rules": list(self.rules),
            "options": {
                one.option: {
                    "value": plain(one.value),
                    "by": one.by,
                    "instead": [{"value": plain(value), "by": by} for by, value in one.instead],
                }
                for one in self.given
            },
        }
