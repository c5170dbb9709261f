"""Plain English in docstrings, help texts and messages: no idioms that a reader has to decode."""

from __future__ import annotations

import ast
import re
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "torchparams"

IDIOMS = re.compile(
    r"""\b(?:
      says\ nothing | said\ no | hits\ nothing      # name what is missing; 'matches nothing'
    | [Ww]hat\ that\ which | [Hh]ow\ far\ it\ is    # name the object
    | cannot\ be\ had                               # 'has no readable values'
    | (?<!there\ )is\ no\ (?:str|number|file|table|tensor|dict|list|text|path|name|module|function|zip)\b  # 'is not a'
    | no\ function\ of                              # 'is not a function of'
    | by\ its\ own\ account                         # 'in its own header'
    | held\ against                                 # 'checked against'
    | not\ (?:read|understood|known|decoded)\ here  # 'not supported'
    | unless\ told\ otherwise                       # 'by default'
    | Told\ bytes                                   # 'Callback with the bytes …'
    )""",
    re.VERBOSE,
)

OPENINGS = re.compile(r"(?:Those|Its|All that|Everything that|Nothing is|The other's|Gives|Told|Stands|The same of)\b")
"""Words that no summary begins with: it begins with an imperative or names the object."""


def test_idioms_that_are_hard_to_read_are_absent() -> None:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [f"{path.relative_to(SOURCE)}:{number}: {match[0]!r}" for match in IDIOMS.finditer(line)]
    assert not found, "\n".join(found)


def test_summaries_begin_with_a_verb_or_the_object() -> None:
    found = []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            summary = (ast.get_docstring(node) or "") if isinstance(node, kinds) else ""
            if OPENINGS.match(summary):
                found.append(f"{path.relative_to(SOURCE)}: {summary.splitlines()[0]}")
    assert not found, "\n".join(found)
