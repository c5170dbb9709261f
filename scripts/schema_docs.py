"""`docs/schemas.md`: the JSON of each command and the Arrow columns of each table, from results on small inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np


def schema_page() -> str:
    """The page: a block for each command, a table for each result with rows."""
    parts = [
        "# JSON and Arrow schemas\n",
        "What `--json` prints and `to_json()` returns, and the columns of results as Arrow tables. Keys and columns "
        "are added, not renamed; [stability](stability.md) has the rule. The page is made from results of this "
        "version.\n",
        "`text`, `integer`, `number` and `boolean` are JSON's. A number that is not finite is the text `nan`, `inf` "
        "or `-inf`. `[…]` is a list of what it shows. `any` stands for a value that was null or empty in the example. "
        "`{name: …}` is an object whose keys are names of your data.\n",
        "## JSON\n",
    ]
    for title, value in _examples():
        parts.append(f"### {title}\n\n```text\n" + "\n".join(_shape(value)) + "\n```\n")
    parts.append("## Arrow\n")
    for title, columns in _tables():
        rows = "\n".join(f"| `{name}` | {_kind(kind)} |" for name, kind in columns.items())
        parts.append(f"### {title}\n\n| column | type |\n|---|---|\n{rows}\n")
    return "\n".join(parts)


def _examples() -> list[tuple[str, Any]]:
    import torchparams as tp

    a, b = _weights(1.0), _weights(2.0)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.safetensors")
        plan = tp.convert(a, path, dtype="bf16")
        planned, written = plan.to_json(), plan.run().to_json()
        return [
            ("ls", tp.ls(path).to_json()),
            ("stats", tp.stats(a | {"bad": np.array([np.nan, 1], np.float32)}).to_json()),
            ("spectra", tp.spectra(a).to_json()),
            ("diff", tp.diff(a, b).to_json()),
            ("digest", tp.digest(a).to_json()),
            ("verify", tp.verify(b, tp.digest(a)).to_json()),
            ("convert --dry-run, merge --dry-run, …", planned),
            ("convert, merge, delta, apply, lora", written),
        ]


def _tables() -> list[tuple[str, Mapping[str, Any]]]:
    import torchparams as tp

    a, b = _weights(1.0), _weights(2.0)
    return [
        ("tp.of, tp.ls", tp.ls(a).columns),
        ("tp.stats", tp.stats(a).columns),
        ("tp.spectra", tp.spectra(a).columns),
        ("tp.diff", tp.diff(a, b).columns),
        ("tp.digest", tp.digest(a).columns),
    ]


def _weights(scale: float) -> dict[str, Any]:
    return {
        "fc.weight": scale * np.arange(1, 13, dtype=np.float32).reshape(3, 4),
        "fc.bias": np.ones(3, np.float32),
    }


def _shape(value: Any, indent: str = "") -> list[str]:
    """Lines that show the shape of a JSON value."""
    if isinstance(value, Mapping) and value:
        if all(key in _NAMES for key in value):
            value = {"name": value[next(iter(value))]}
        return [line for key, each in value.items() for line in _keyed(str(key), each, indent)]
    return [f"{indent}{_type(value)}"]


_NAMES = frozenset(("fc.weight", "fc.bias", "bad"))


def _keyed(key: str, value: Any, indent: str) -> list[str]:
    if isinstance(value, Mapping) and value:
        return [f"{indent}{key}:", *_shape(value, indent + "  ")]
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        merged: dict[str, Any] = {}
        for each in value:
            for name, inner in each.items():
                if merged.get(name) in (None, [], {}):
                    merged[name] = inner
        return [f"{indent}{key}: [", *_shape(merged, indent + "  "), f"{indent}]"]
    return [f"{indent}{key}: {_type(value)}"]


def _type(value: Any) -> str:
    if isinstance(value, list):
        return f"[{_type(value[0])}]" if value else "[any]"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float) or value in ("nan", "inf", "-inf"):
        return "number"
    return "text" if isinstance(value, str) else "any"


def _kind(kind: Any) -> str:
    if isinstance(kind, Mapping):
        return "struct of " + ", ".join(f"`{name}` {_kind(each)}" for name, each in kind.items())
    if get_origin(kind) in (list, dict):
        inner = " → ".join(_kind(each) for each in get_args(kind))
        return f"{'list' if get_origin(kind) is list else 'map'} of {inner}"
    return {str: "string", int: "int64", float: "float64", bool: "bool"}[kind]
