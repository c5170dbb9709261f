"""Check the import rules: which part of the package may import which, without cycles.

    python scripts/check_imports.py

A folder is a room: a module with an underscore is imported only within its room. Imports inside functions count; those
for the type checker alone count for cycles only. What a rule says is in `LAYERS`.
"""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "torchparams"

LAYERS: tuple[frozenset[str], ...] = tuple(
    map(
        frozenset,
        (
            {"errors", "limits"},
            {"dtypes"},
            {"info", "reading"},
            {"render", "left_out", "names", "order", "_selector", "selectors", "renames", "proposals"},
            {"io", "sketch"},
            {"expressions"},
            {"encodings"},
            {"parameters", "mapping_views", "sources", "module"},
            {"engines"},
            {"measure", "train", "lint", "edit", "record"},
            {"page"},
            {"cli", "__main__"},
        ),
    )
)
"""Layers from the bottom up: a part may import from its own layer and from layers below it."""

BESIDE = {
    ("edit", "measure"),
    ("edit", "train"),
    ("lint", "train"),
    ("lint", "measure"),
    ("record", "measure"),
}
"""Imports allowed between the packages of the top layer."""

ANYWHERE = {"testing"}
"""May import everything; nothing imports it."""


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Map dotted module names, without the package, to files.

    An extension module maps to the C file that initialises it; its other C files are no modules.
    """
    found = {}
    extensions = (path for path in package.rglob("*.c") if f"PyInit_{path.stem}(" in path.read_text())
    for path in sorted([*package.rglob("*.py"), *extensions]):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, name: str = "torchparams", *, types: bool = False) -> Iterator[str]:
    """Modules of the package that a module imports at run time; with `types`, also for the type checker."""
    for node in ast.iter_child_nodes(tree):
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == name)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == name:
            base = node.module.partition(".")[2]
            for alias in node.names:
                yield f"{base}.{alias.name}" if base else alias.name
        yield from imports(node, name, types=types)


def graph(package: Path = PACKAGE, *, types: bool = False) -> dict[str, set[str]]:
    """Imports of each module; with `types`, also those for the type checker."""
    known = modules(package)
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        wanted = set()
        for target in imports(ast.parse(path.read_text() if path.suffix == ".py" else ""), types=types):
            # `from torchparams.info import ParameterInfo` imports the module info, not a module ParameterInfo.
            module = target if target in known else target.rpartition(".")[0]
            if module and module != name:
                wanted.add(module)
        found[name] = wanted
    return found


def outside(name: str, target: str) -> bool:
    """Whether an import crosses folders; modules with an underscore are private to their folder.

    >>> outside("edit.merge.merge", "edit.merge._slerp"), outside("measure.diff", "edit.merge._slerp")
    (False, True)
    """
    parts = target.split(".")
    private = next((i for i, part in enumerate(parts) if part.startswith("_")), None)
    if not private:  # none, or a room of the package itself
        return False
    room = parts[:private]
    return name.split(".")[: len(room)] != room


def violations(edges: dict[str, set[str]]) -> list[str]:
    """Errors: one line for each forbidden import and for a cycle."""
    layer = {part: i for i, parts in enumerate(LAYERS) for part in parts}
    verbs = next(parts for parts in LAYERS if "measure" in parts)
    found = []
    for name, wanted in sorted(edges.items()):
        part = name.split(".")[0]
        if part in ANYWHERE or not part:
            continue
        if part not in layer:
            found.append(f"{name}: in no layer")
            continue
        for target in sorted(wanted):
            other = target.split(".")[0]
            if other in ANYWHERE:
                found.append(f"{name} imports {target}, which is for tests")
            elif layer[other] > layer[part]:
                found.append(f"{name} imports {target}, which stands above it")
            elif part in verbs and other in verbs and part != other and (part, other) not in BESIDE:
                found.append(f"{name} imports {target}: these verbs do not know each other")
        found += [
            f"{name} imports {target}, which is private to its room"
            for target in sorted(wanted)
            if outside(name, target)
        ]
    return found + cycles(edges)


def cycles(edges: dict[str, set[str]]) -> list[str]:
    """One line for a cycle, if there is one."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return ["a cycle: " + " → ".join(error.args[1])]
    return []


def typed(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Each module and those it imports, for types too, without the package itself.

    The package imports all public names for the type checker.
    """
    edges = graph(package, types=True)
    return {name: wanted for name, wanted in edges.items() if name}


def main() -> int:
    found = violations(graph())
    found = found or cycles(typed())
    print("\n".join(found) or f"imports go one way ({len(modules())} modules)")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
