"""Results in polars, duckdb, pyarrow and pandas, directly and from written files."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

import torchparams as tp
from torchparams.render.files import write_table

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS: dict[str, Any] = {
    "layers.0.weight": np.array([[1.0, np.nan, np.inf], [2.0, 3.0, -np.inf]], np.float32),
    "layers.1.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scale": np.array(3, np.int64),
    "nothing": np.zeros((0, 4), np.float16),
}
TUNED = {**WEIGHTS, "layers.1.weight": WEIGHTS["layers.1.weight"] + 1}


def network() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1), torch.nn.LazyLinear(2))
    model[1](model[0](torch.ones(1, 3))).sum().backward()
    return model


RESULTS = {
    "ls": tp.ls(WEIGHTS),
    "ls of a model": tp.ls(network()),
    "stats": tp.stats(WEIGHTS),
    "stats by layer": tp.stats(WEIGHTS, by="layer"),
    "diff": tp.diff(WEIGHTS, {k: v for k, v in TUNED.items() if k != "scale"}),
    "diff by layer": tp.diff(WEIGHTS, TUNED, by="layer"),
    "digest": tp.digest(WEIGHTS),
    "norms": tp.grad_norms(network()),
    "norms by module": tp.grad_norms(network(), by="module"),
}


def plain(value: Any) -> Any:
    """A value with NaN made comparable, and a map as pairs."""
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def attributes(row: Any, columns: Mapping[str, Any]) -> dict[str, Any]:
    """What a table is to hold of a row."""
    found: dict[str, Any] = {}
    for name, kind in columns.items():
        value = getattr(row, name)
        if value is None:
            found[name] = None
        elif isinstance(kind, Mapping):
            found[name] = attributes(value, kind)
        else:
            found[name] = str(value) if kind is str else plain(value)
    return found


@pytest.mark.parametrize("name", RESULTS)
def test_columns_are_the_attributes_of_the_rows(name: str) -> None:
    result: Any = RESULTS[name]
    table = pa.table(result)
    assert table.column_names == list(result.columns)
    assert [plain(row) for row in table.to_pylist()] == [attributes(row, result.columns) for row in result.table_rows()]


@pytest.mark.parametrize("name", RESULTS)
def test_polars_and_duckdb_take_results_as_they_are(name: str) -> None:
    result: Any = RESULTS[name]
    assert not isinstance(result, Mapping | Sequence)
    table = pa.table(result)
    assert pl.DataFrame(result).shape == table.shape
    assert duckdb.sql("from result").fetchall()[0][0] == table.column("name")[0].as_py()
    assert pd.DataFrame.from_arrow(result).shape == table.shape


def test_types() -> None:
    schema = pl.DataFrame(RESULTS["stats"]).schema
    assert schema["shape"] == pl.List(pl.Int64)
    assert (schema["numel"], schema["mean"], schema["exact"]) == (pl.Int64, pl.Float64, pl.Boolean)
    stats = tp.stats(WEIGHTS)
    found = duckdb.sql("select name, mean, quantiles[0.5] from stats where isnan(mean) or mean > 2").fetchall()
    assert [row[0] for row in found] == ["layers.1.weight", "scale", "nothing"]
    assert found[0][1:] == (2.5, stats["layers.1.weight"].quantiles[2][1])
    assert math.isnan(found[2][1])


def test_a_table_of_parameters() -> None:
    params = tp.of(WEIGHTS)
    assert pa.table(params).column("name").to_pylist() == params.names
    assert duckdb.sql("select sum(numel) from params").fetchall() == [(13,)]
    assert pl.DataFrame(tp.ls(params))["shape"].to_list() == [[2, 3], [2, 3], [], [0, 4]]
    model = tp.of(network())
    table = pa.table(model.select("2.*"))
    assert table.column("shape").to_pylist() == [None, None]  # lazy
    assert pa.table(model).column("requires_grad").to_pylist() == [True] * 6


@pytest.mark.parametrize("name", RESULTS)
def test_files_hold_the_same_numbers(name: str, tmp_path: Path) -> None:
    result: Any = RESULTS[name]
    for suffix in ("csv", "json", "parquet"):
        write_table(result, str(tmp_path / f"rows.{suffix}"))
    table = pa.table(result)
    numbers = [field.name for field in table.schema if field.type in (pa.int64(), pa.float64())]
    expected = table.select(numbers).to_pandas()
    for read in (
        pd.read_csv(tmp_path / "rows.csv"),
        pd.read_json(tmp_path / "rows.json"),
        pd.read_parquet(tmp_path / "rows.parquet"),
    ):
        for column in numbers:
            assert pd.api.types.is_numeric_dtype(read[column]) or not len(expected[column].dropna()), column
            np.testing.assert_allclose(
                read[column].to_numpy(np.float64), expected[column].to_numpy(np.float64), rtol=1e-14
            )


def test_pandas_reads_numbers_in_json() -> None:
    rows = io.StringIO(json.dumps(tp.stats(WEIGHTS).to_json()["rows"]))
    assert pd.read_json(rows)[["mean", "std", "min", "max"]].dtypes.tolist() == [np.dtype("float64")] * 4
