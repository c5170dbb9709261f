"""The page: HTML with its data, in a file or inline in a notebook."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchparams.render.result import Result
from torchparams.render.tree import Text, Tree, human_bytes, plural, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

_MARK = b"<!--data-->"
HEIGHT = 860
"""Height of a report in a notebook, in CSS pixels."""


@cache
def _asset() -> tuple[bytes, bytes]:
    """HTML before and after the data."""
    before, mark, after = Path(__file__).with_name("page.html").read_bytes().partition(_MARK)
    assert mark  # as `make web` built it
    return before, after


def page_of(payload: Mapping[str, Any]) -> bytes:
    r"""Make the page with its data, as ASCII.

    Names are hostile input. `<` is written as `\u003c`, so no name can end the element of the data; control and
    bidirectional characters are escaped too.

    >>> b"</script><b>" in page_of({"name": "</script><b>"})
    False
    """
    before, after = _asset()
    data = json.dumps(payload, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").encode("ascii")
    return b"".join((before, b'<script type="application/json" id="data">', data, b"</script>", after))


@dataclass(frozen=True, repr=False)
class Page(Result):
    """A report in one HTML file; a notebook shows it inline.

    Attributes:
        label: The label of the target.
        other: The label of the second target; None without one.
        tensors: Count of tensors.
        findings: Count of findings.
        path: Path of the file; None for a report in memory.
        html: The page, as ASCII.
        notes: Attributes of the replaced file that could not be kept.
    """

    label: str
    other: str | None
    tensors: int
    findings: int
    path: str | None
    html: bytes = field(repr=False)
    notes: tuple[str, ...] = ()

    def tree(self) -> Tree:
        """Label, counts and path."""
        title = self.label if self.other is None else f"{self.label} and {self.other}"
        said = [plural(self.tensors, "tensor"), plural(self.findings, "finding"), human_bytes(len(self.html))]
        where = "in memory: give a path to write it" if self.path is None else self.path
        lines = (Text(printable(title), "title"), Text(" · ".join(said), "dim"), Text(printable(where)))
        return Tree((*lines, *(Text(printable(note), "dim") for note in self.notes)))

    def to_json(self) -> dict[str, Any]:
        """Labels, counts and path as JSON data."""
        return {
            "source": self.label,
            "other": self.other,
            "tensors": self.tensors,
            "findings": self.findings,
            "path": self.path,
            "nbytes": len(self.html),
        }

    def _repr_html_(self) -> str:
        # The frame isolates styles and scripts.
        try:
            text = html.escape(self.html.decode("ascii"))
        except Exception:  # half made: a repr never raises
            return super()._repr_html_()
        return (
            f'<iframe sandbox="allow-scripts" width="100%" height="{HEIGHT}" style="border:0" srcdoc="{text}"></iframe>'
        )
