"""Tables exported to Arrow and to files; the oracles test them in other libraries."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import torchparams as tp
from command import command
from torchparams.errors import MissingDependency, OptionError, WriteError
from torchparams.info import ParameterInfo
from torchparams.measure.diff_rows import COLUMNS as DIFFS
from torchparams.measure.diff_rows import GROUP_COLUMNS, GroupDiff, TensorDiff
from torchparams.measure.hashing import COLUMNS as DIGESTS
from torchparams.measure.hashing import TensorDigest
from torchparams.measure.tensor_stats import COLUMNS as STATS
from torchparams.measure.tensor_stats import TensorStats
from torchparams.render.arrow import _validity, stream
from torchparams.render.files import write_table
from torchparams.render.rows import INFO_COLUMNS
from torchparams.render.tabular import Tabular

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = {"fc.weight": np.array([[1.0, np.nan], [np.inf, 2.0]], np.float32), "fc.bias": np.zeros(2, np.float16)}


def results() -> dict[str, Any]:
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    return {
        "ls": tp.ls(WEIGHTS),
        "stats": tp.stats(WEIGHTS),
        "diff": tp.diff(WEIGHTS, WEIGHTS),
        "diff by": tp.diff(WEIGHTS, WEIGHTS, by="layer"),
        "digest": tp.digest(WEIGHTS),
        "norms": tp.grad_norms(model),
    }


@pytest.mark.parametrize("name", ["ls", "stats", "diff", "diff by", "digest", "norms"])
def test_no_result_is_a_mapping_or_a_sequence(name: str) -> None:
    result = results()[name]
    assert isinstance(result, Tabular)
    assert not isinstance(result, Mapping | Sequence)  # polars would take it apart before it asks for Arrow
    assert next(iter(result.columns)) == "name"
    assert all(hasattr(row, column) for row in result.table_rows() for column in result.columns)


@pytest.mark.parametrize(
    ("row", "columns", "apart"),
    [
        (ParameterInfo, INFO_COLUMNS, {"encoded", "sharding"}),  # their parts are columns
        (TensorStats, STATS, set()),
        (TensorDigest, DIGESTS, {"memory"}),  # an address, which means nothing elsewhere
        (TensorDiff, DIFFS, {"compared"}),  # its numbers are columns
        (GroupDiff, GROUP_COLUMNS, {"compared", "numbers"}),
    ],
)
def test_every_field_of_a_row_is_a_column(row: Any, columns: Mapping[str, Any], apart: set[str]) -> None:
    names = row._fields if issubclass(row, tuple) else [field.name for field in fields(row)]  # of a named tuple
    assert set(names) - set(columns) == apart


def test_what_is_there_in_bits() -> None:
    assert _validity([1, 2]) is None
    assert _validity([1, None, 3, *[None] * 6, 5]) == bytes([0b101, 0b10])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nanoarrow", None)
    with pytest.raises(MissingDependency, match=r"nanoarrow .*\. pip install 'torchparams\[arrow\]'"):
        stream(tp.stats(WEIGHTS).rows, tp.stats(WEIGHTS).columns)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match=r"pyarrow .*\. pip install 'torchparams\[parquet\]'"):
        write_table(tp.stats(WEIGHTS), str(tmp_path / "stats.parquet"))
    assert not [*tmp_path.iterdir()]


def test_csv_and_json(tmp_path: Path) -> None:
    found = tp.stats(WEIGHTS)
    for _ in range(2):  # an earlier file is replaced
        write_table(found, str(tmp_path / "stats.csv"))
        write_table(found, str(tmp_path / "stats.json"))
    with open(tmp_path / "stats.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(found.columns)
    assert [(row["name"], json.loads(row["shape"]), row["max"]) for row in rows] == [
        ("fc.weight", [2, 2], "inf"),
        ("fc.bias", [2], "0.0"),
    ]
    read = json.loads((tmp_path / "stats.json").read_text())
    assert [(row["name"], row["shape"], row["max"], row["saturated"]) for row in read] == [
        ("fc.weight", [2, 2], "inf", None),
        ("fc.bias", [2], 0.0, 0),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stats.csv", "stats.json"]


def test_a_file_that_is_no_table_is_not_replaced(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {}}')
    with pytest.raises(WriteError, match="not a JSON table"):
        write_table(tp.stats(WEIGHTS), str(index))
    assert index.read_text() == '{"weight_map": {}}'
    with pytest.raises(OptionError, match=r"has the suffix \.txt\. Use the suffix \.csv, \.json or \.parquet"):
        write_table(tp.stats(WEIGHTS), str(tmp_path / "stats.txt"))
    with pytest.raises(WriteError, match="No such file or directory"):
        write_table(tp.stats(WEIGHTS), str(tmp_path / "none" / "stats.csv"))


@pytest.mark.parametrize("verb", ["ls", "stats", "diff"])
def test_the_command_line(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tp.save(WEIGHTS, "m.safetensors")
    targets = ["m.safetensors"] * (2 if verb == "diff" else 1)
    ran = command(capsys, verb, *targets, "-o", "rows.csv")
    assert (ran.status, ran.out) == (0, "2 rows  rows.csv\n")
    assert (tmp_path / "rows.csv").read_text().startswith("name,")
    assert command(capsys, verb, *targets, "-o", "rows.json", "--json").json
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 2
