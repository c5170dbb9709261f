"""The questions of the page on catalogs, with duckdb and polars, on checkpoints whose answers are known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pytest
from safetensors.numpy import save_file

import torchparams as tp

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "catalog.md").read_text()
QUERIES = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    embed, head = np.arange(100, dtype=np.float32), np.ones(10, np.float32)
    runs = {
        "a/step-1": {"embed.weight": embed, "head": head},
        "a/step-2": {"embed.weight": embed, "head": head},
        "a/step-10": {"embed.weight": embed, "head": 2 * head},
        "b/step-1": {"embed.weight": embed, "head": 2 * head, "adapter": head},
        "c/step-3": {"embed.weight": embed + 1, "head": head * np.nan},
    }
    for name, tensors in runs.items():
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors")
    tp.catalog("runs/*/step-*", "catalog.parquet", digest=True, stats=True)
    return tmp_path


@pytest.mark.usefixtures("catalog")
def test_the_answers_of_duckdb() -> None:
    share, saved, ancestor, first, same = (duckdb.sql(query).fetchall() for query in QUERIES)
    assert [file for (file,) in share] == ["runs/a/step-1", "runs/a/step-10", "runs/a/step-2", "runs/b/step-1"]
    # Of the embedding three copies of 400 bytes; of the head two of 40, and one each of its double.
    assert saved == [(3 * 400 + 2 * 40 + 40,)]
    assert ancestor == [("runs/a/step-10", 440)]
    assert first == [("runs/c/step-3", "head", 10)]
    assert same == [(["runs/a/step-1", "runs/a/step-2"],)]


@pytest.mark.usefixtures("catalog")
def test_the_answer_of_polars() -> None:
    (block,) = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)
    *lines, last = block.strip().splitlines()
    names: dict[str, Any] = {"polars": polars}
    exec("\n".join(lines), names)
    found = eval(last, names)
    assert sorted(found.to_list()) == ["runs/a/step-1", "runs/a/step-10", "runs/a/step-2", "runs/b/step-1"]
