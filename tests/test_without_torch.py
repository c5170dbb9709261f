"""Without torch installed: files can be read, and functions that need torch raise a one-line error."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
import json, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "pytest"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
import torchparams as tp
from torchparams.cli.app import run

def told(use):
    try:
        return repr(use())
    except Exception as error:
        return f"{type(error).__name__}: {error}"

params = tp.of(sys.argv[1])
print(json.dumps([told(use) for use in (%s,)]))
"""

CASES = [
    ("lambda: params.names", "['w', 'b']"),
    ("lambda: params.numpy('b').tolist()", "[1.0, 2.0]"),
    ("lambda: tp.stats(params)['b'].max", "2.0"),
    ("lambda: tp.diff(params, params).same", "True"),
    ("lambda: run(['show', sys.argv[1], 'absent'])", "2"),
    (
        "lambda: params['b']",
        "MissingDependency: torch is needed to give 'b' as a tensor; as an array, params.numpy(name) gives it "
        "without. pip install torch.",
    ),
    ("lambda: tp.Module", "MissingDependency: 'torch' is needed for torchparams.Module. pip install torch."),
    ("lambda: tp.testing", "MissingDependency: 'pytest' is needed for torchparams.testing. pip install pytest."),
    (
        "lambda: __import__('torchparams.cli.targets').cli.targets.table('torch.nn:Linear')",
        "MissingDependency: torch is needed to build torch.nn:Linear. pip install torch.",
    ),
    ("lambda: tp.freeze(params)", "UnsupportedSource: FILE: torchparams.freeze needs a live model, not a "),
    ("lambda: tp.init(params, seed=1)", "UnsupportedSource: FILE: torchparams.init needs a live model, not "),
    ("lambda: tp.apply_(params, '**', abs)", "UnsupportedSource: FILE: torchparams.apply_ needs a live model, not "),
    ("lambda: tp.gradients(params)", "UnsupportedSource: FILE: torchparams.gradients needs a live model, not "),
    (
        "lambda: tp.load(params, params)",
        "UnsupportedSource: FILE: torchparams.load needs a live model, not a safetensors",
    ),
    ("lambda: tp.groups(params, lr=1)", "UnsupportedSource: FILE: An optimizer needs live parameters, not a "),
    (
        "lambda: tp.audit(params)",
        "UnsupportedSource: A Parameters cannot be audited. An audit needs a live ",
    ),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file: Path = tmp_path_factory.mktemp("files") / "m.safetensors"
    file.write_bytes(safetensors_bytes({"w": np.ones((2, 3), np.float32), "b": np.array([1, 2], np.float32)}))
    program = PROGRAM % ", ".join(use for use, _ in CASES)
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    found = [answer.replace(str(file), "FILE") for answer in json.loads(done.stdout)]
    return dict(zip([use for use, _ in CASES], found, strict=True))


@pytest.mark.parametrize(("use", "answer"), CASES, ids=[answer for _, answer in CASES])
def test_without_torch(use: str, answer: str, answers: dict[str, str]) -> None:
    assert answers[use].startswith(answer)
