"""`docs/schemas.md`: the JSON of each command and the Arrow columns of each table, from results on small inputs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
from schema_shape import NOTHING, Reference, Shape, lines, merged, misfits, shape_of

EXAMPLES: dict[str, tuple[str, ...]] = {
    "ls": (
        "ls base.safetensors -s fc.*",
        "ls run.pt",
        "ls tied.pt",
        "ls unsafe.pt",
        "ls state.pt",
        "ls net.py:build --buffers",
        "ls quantised",
        "ls codes.safetensors",
    ),
    "ls, several targets": ("ls base.safetensors run.pt broken.safetensors",),
    "show, a tensor": (
        "show base.safetensors fc.weight",
        "show tied.pt a",
        "show state.pt sparse",
        "show net.py:build 0.weight",
        "show net.py:build 1.running_mean",
        "show quantised fc.weight",
        "show quantised fc.weight --raw",
        "show codes.safetensors fc.W_q",
    ),
    "show, a metadata entry": ("show run.pt epoch",),
    "explain": ("explain net.py:build", "explain net.py:Lists"),
    "explain, one name": (
        "explain net.py:build 0.weight",
        "explain net.py:Lists layers.0.weight",
        "explain net.py:Lists again.weight",
    ),
    "stats": (
        "stats base.safetensors -s fc.*",
        "stats bad.safetensors --by module",
        "stats bad.safetensors",
        "stats odd.safetensors --wide",
        "stats state.pt",
    ),
    "stats --check, several targets": ("stats --check base.safetensors bad.safetensors broken.safetensors",),
    "spectra": ("spectra base.safetensors -s fc.*", "spectra wide.safetensors", "spectra bad.safetensors"),
    "diff": (
        "diff base.safetensors tuned.safetensors -s fc.*",
        "diff base.safetensors bad.safetensors --by module",
        "diff base.safetensors half.safetensors --numeric",
        "diff base.safetensors odd.safetensors",
        "diff run.pt#model prefixed.safetensors",
        "diff run.pt base.safetensors",
        "diff run.pt prefixed.safetensors",
        "diff base.safetensors prefixed.safetensors --rename ^module.=",
        "diff state.pt state.pt",
    ),
    "report": ("report base.safetensors -o page.html", "report base.safetensors tuned.safetensors -o page.html"),
    "digest": ("digest base.safetensors", "digest tied.pt"),
    "digest, several targets": ("digest base.safetensors run.pt tied.pt broken.safetensors",),
    "verify": (
        "verify base.safetensors",
        "verify run.pt",
        "verify unsafe.pt",
        "verify state.pt",
        "verify bad.safetensors --values",
        "verify tuned.safetensors manifest.json",
        "verify tied.pt manifest.json",
    ),
    "verify, several targets": ("verify base.safetensors bad.safetensors broken.safetensors --values",),
    "catalog": ("catalog base.safetensors broken.safetensors -o table.parquet",),
    "audit": ("audit net.py:build", "audit net.py:Lists"),
    "audit --rules": ("audit --rules",),
    "history": ("history record", "history run/step-*.safetensors"),
    "diagnose": ("diagnose record", "diagnose run/step-*.safetensors", "diagnose run/step-[12].safetensors"),
    "convert, merge, delta, apply, lora fold": (
        "convert base.safetensors out.safetensors --dtype bf16",
        "convert tied.pt untied.safetensors",
        "convert run.pt out.safetensors --force -s model.fc.weight",
        "merge base.safetensors tuned.safetensors merged.safetensors",
        "delta base.safetensors tuned.safetensors delta.safetensors",
        "apply base.safetensors delta.safetensors restored.safetensors",
    ),
    "lora extract": ("lora extract base.safetensors tuned.safetensors adapter --rank 1 --no-fan-in-fan-out",),
    "--dry-run of convert, merge, delta, apply, lora": (
        "convert base.safetensors planned.safetensors --dtype bf16 --dry-run",
        "convert tied.pt planned.pt --dry-run",
        "convert run.pt planned.safetensors --dry-run",
        *(
            f"merge base.safetensors tuned.safetensors planned.safetensors -m {method} --dry-run"
            for method in ["linear", "average", "slerp"]
        ),
        *(
            f"merge tuned.safetensors tuned.safetensors planned.safetensors -b base.safetensors -m {method} --dry-run"
            for method in ["task_arithmetic", "ties", "dare", "dare_ties"]
        ),
        "convert quantised planned.safetensors --dtype f32 --dry-run",
        "convert views.pt planned.safetensors --dry-run",
        "delta base.safetensors tuned.safetensors planned.safetensors --dry-run",
        "apply base.safetensors delta.safetensors planned.safetensors --dry-run",
        "lora extract base.safetensors tuned.safetensors planned --rank 1 --no-fan-in-fan-out --dry-run",
        "lora fold base.safetensors adapter planned.safetensors --no-fan-in-fan-out --dry-run",
    ),
    "convert --repair-index": ("convert --repair-index shards --dry-run", "convert --repair-index shards"),
}
"""Title → command lines whose JSON, taken together, is the schema. They run in this order, in one directory."""

_NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.layers = [nn.Linear(3, 3)]
        self.again = self.fc
        self.act = nn.ReLU()
"""


def schema_page() -> str:
    """The page: a block for each command, a table for each result with rows."""
    parts = [
        "# JSON and Arrow schemas\n",
        "What `--json` prints and `to_json()` returns, and the columns of results as Arrow tables. Keys and columns "
        "are added, not renamed; [stability](stability.md) has the rule. The page is made from results of this "
        "version; a test compares it with results on other data.\n",
        "`text`, `integer`, `number` and `boolean` are JSON's. A number that is not finite is the text `nan`, `inf` "
        "or `-inf`. `[…]` is a list of what it shows, and `{name: …}` an object whose keys are names of your data. "
        "`?` marks a key that is not always there. What was null or empty in all examples is shown as `null`, `[…]` "
        "or `{}`. An error is a line on stderr with exit status 2, and no JSON.\n",
        "## JSON\n",
    ]
    shapes = schemas()
    for title, shape in shapes.items():
        parts.append(f"### {title}\n\n```text\n" + "\n".join(lines(shape)) + "\n```\n")
    parts.append("## Arrow\n")
    for title, columns in _tables():
        rows = "\n".join(f"| `{name}` | {_kind(kind)} |" for name, kind in columns.items())
        parts.append(f"### {title}\n\n| column | type |\n|---|---|\n{rows}\n")
    return "\n".join(parts)


def schemas() -> dict[str, Shape]:
    """Title → shape of the JSON, over all examples; last, the shape of an operation."""
    found: dict[str, Shape] = {}
    operations = NOTHING
    with inputs():
        for title, commands in EXAMPLES.items():
            for line in commands:
                value, more = simplified(printed(line))
                found[title] = merged(found.get(title, NOTHING), shape_of(value, is_name))
                for each in more:
                    operations = merged(operations, shape_of(each, is_name))
    found["operation"] = operations
    return found


@contextlib.contextmanager
def inputs() -> Iterator[None]:
    """A temporary directory with the files of the examples, as the current one."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            _write()
            yield
        finally:
            os.chdir(here)


def printed(line: str) -> Any:
    """The JSON that a command prints.

    Raises:
        SystemExit: It prints none.
    """
    from torchparams.cli.app import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        run([*shlex.split(line), "--json"])
    try:
        return json.loads(out.getvalue())
    except json.JSONDecodeError:
        raise SystemExit(f"torchparams {line} --json printed no JSON:\n{out.getvalue()}{err.getvalue()}") from None


def simplified(value: Any) -> tuple[Any, list[Any]]:
    """A JSON value with references in place of what has a section of its own, and of a file's own data.

    These are operations, which nest to any depth, and results of one of several targets.

    Returns:
        The value, and the operations.
    """
    found: list[Any] = []

    def replaced(value: Any) -> Any:
        if isinstance(value, list):
            return [replaced(each) for each in value]
        if not isinstance(value, dict):
            return value
        value = {
            key: Reference("any value") if key in ("metadata", "value") and "step" not in value else replaced(each)
            for key, each in value.items()
        }
        if "operation" in value:
            found.append(value)
            return Reference("operation")
        if "target" in value and "outcome" in value:
            own = {key: each for key, each in value.items() if key in ("target", "outcome", "error")}
            return own if "error" in own else {**own, "and": Reference("the keys of one target")}
        return value

    return replaced(value), found


def unlisted(title: str, value: Any, shapes: Mapping[str, Shape]) -> list[str]:
    """Fields of a result that the schema of this title lacks."""
    value, operations = simplified(value)
    return misfits(shapes[title], value) + [
        line for each in operations for line in misfits(shapes["operation"], each, "operation")
    ]


def is_name(key: str) -> bool:
    """Whether a key of the examples is a name of the data: a tensor, a file or a quantile."""
    return key[0].isdigit() or "/" in key or "." in key


def _write() -> None:
    import torch
    from torch import nn

    import torchparams as tp

    base = _weights(1.0)
    tp.save(base, "base.safetensors")
    tp.save(_weights(2.0), "tuned.safetensors")
    tp.save(base | {"fc.bias": np.array([np.nan, np.inf, 1], np.float32)}, "bad.safetensors")
    tp.save({"fc.weight": np.ones((3, 3), np.float16), "other": np.zeros(2, np.int64)}, "odd.safetensors")
    tp.save({f"module.{name}": value for name, value in base.items()}, "prefixed.safetensors")
    tp.save({"w": np.random.default_rng(0).standard_normal((80, 60)).astype(np.float32)}, "wide.safetensors")
    tp.convert("base.safetensors", "half.safetensors", dtype="bf16").run()
    tp.convert("base.safetensors", "shards", max_shard_size=50).run()
    tp.digest("base.safetensors").write("manifest.json")
    Path("broken.safetensors").write_bytes(Path("base.safetensors").read_bytes()[:-4])
    Path("net.py").write_text(_NET)
    Path("run").mkdir()
    for step in (1.0, 2.0, 3.0, np.nan):
        tp.save(_weights(step), f"run/step-{np.nan_to_num(step, nan=4):.0f}.safetensors")

    tensors = {name: torch.from_numpy(value) for name, value in base.items()}
    torch.save({"model": tensors, "epoch": 3, "args": {"lr": 0.1}}, "run.pt")
    torch.save({"a": tensors["fc.weight"], "b": tensors["fc.weight"], "part": tensors["fc.weight"][1]}, "tied.pt")
    torch.save({"w": tensors["fc.weight"], "call": _Call()}, "unsafe.pt")
    torch.save({"t": tensors["fc.weight"].T, "e": torch.ones(1).expand(3)}, "views.pt")
    state = {"fc._extra_state": {"step": 1}, "sparse": tensors["fc.weight"].to_sparse(), "args": _Foreign()}
    torch.save(tensors | state, "state.pt")
    codes = torch.ones(4, 4).to(torch.float8_e4m3fn)
    tp.save({"fc.W_q": torch.zeros(2, 2, dtype=torch.uint8), "fc.scale": torch.ones(2)}, "codes.safetensors")
    Path("quantised").mkdir()
    tp.save({"fc.weight": codes, "fc.weight_scale_inv": torch.ones(1, 1)}, "quantised/model.safetensors")
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    Path("quantised/config.json").write_text(json.dumps({"quantization_config": quantisation}))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tp.Recorder(model, optimizer, "record", every=1, quiet=True) as recorder:
        for step in range(4):
            optimizer.zero_grad()
            (model(torch.ones(2, 4)).square().sum() * (1.0 if step < 3 else np.nan)).backward()
            optimizer.step()
            recorder.step()


class _Foreign:
    """An object of a class that a reader does not know."""


class _Call:
    """A pickle that would run a command."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


def _weights(scale: float) -> dict[str, Any]:
    return {
        "fc.weight": scale * np.arange(1, 13, dtype=np.float32).reshape(3, 4),
        "fc.bias": np.ones(3, np.float32),
    }


def _tables() -> list[tuple[str, Mapping[str, Any]]]:
    import torchparams as tp
    from torchparams.measure.catalog import Catalog
    from torchparams.record.history_tree import History
    from torchparams.train.grad_norms import GradNorms

    a, b = _weights(1.0), _weights(2.0)
    return [
        ("tp.of, tp.ls", tp.ls(a).columns),
        ("tp.stats", tp.stats(a).columns),
        ("tp.spectra", tp.spectra(a).columns),
        ("tp.diff", tp.diff(a, b).columns),
        ("tp.digest", tp.digest(a).columns),
        ("tp.grad_norms", GradNorms.columns),
        ("tp.history", History.columns),
        ("tp.catalog", Catalog.columns),
    ]


def _kind(kind: Any) -> str:
    if isinstance(kind, Mapping):
        return "struct of " + ", ".join(f"`{name}` {_kind(each)}" for name, each in kind.items())
    if get_origin(kind) in (list, dict):
        inner = " → ".join(_kind(each) for each in get_args(kind))
        return f"{'list' if get_origin(kind) is list else 'map'} of {inner}"
    return {str: "string", int: "int64", float: "float64", bool: "bool"}[kind]
