"""Engines by name: what verbs, plans and commands take, and what they refuse."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

import torchparams as tp
from torchparams.cli.app import run
from torchparams.engines import RayEngine, ThreadEngine, named
from torchparams.errors import MissingDependency, OptionError
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes({"w": np.arange(12, dtype=np.float32).reshape(3, 4)}))
    return path


def test_names() -> None:
    engine = ThreadEngine(1)
    assert named(engine) is engine
    assert named(None) is None and named("threads") is None
    for text, address in (
        ("ray", None),
        ("ray:10.0.0.1:6379", "10.0.0.1:6379"),
        ("ray:ray://head:10001", "ray://head:10001"),
    ):
        found = named(text)
        assert isinstance(found, RayEngine) and found.address == address


@pytest.mark.parametrize("name", ["dask", "", "threads:4", "Ray"])
def test_other_names_are_refused_by_every_verb(name: str, file: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest"
    tp.digest(file).write(manifest)
    for call in (
        lambda: tp.stats(file, engine=name),
        lambda: tp.diff(file, file, engine=name),
        lambda: tp.digest(file, engine=name),
        lambda: tp.spectra(file, engine=name),
        lambda: tp.catalog([file], engine=name),
        lambda: tp.verify(file, manifest, engine=name),
        lambda: tp.convert(file, tmp_path / "out").run(engine=name),
    ):
        with pytest.raises(OptionError) as caught:
            call()
        assert str(caught.value) == f"No engine is named {name!r}. Names are 'threads', 'ray' and 'ray:ADDRESS'."
    assert not (tmp_path / "out").exists()


def test_threads_by_name(file: Path) -> None:
    assert tp.stats(file, engine="threads").to_json() == tp.stats(file).to_json()


def test_without_ray(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency) as caught:
        tp.stats(file, engine="ray")
    assert str(caught.value) == "The engine 'ray' needs ray, which is not installed. pip install 'torchparams[ray]'."
    with pytest.raises(MissingDependency):
        tp.convert(file, tmp_path / "out").run(engine="ray")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors"]


def test_plans_that_an_engine_does_not_write(file: Path, tmp_path: Path) -> None:
    plan = tp.convert(file, tmp_path / "one.safetensors")
    with pytest.raises(OptionError, match="On Ray, a worker writes a shard, but the plan writes one file"):
        plan.run(engine="ray")
    with pytest.raises(OptionError, match="The engine 'threads' does not write files"):
        plan.run(engine=ThreadEngine())
    assert not (tmp_path / "one.safetensors").exists()


def test_commands_refuse_other_names(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["stats", str(file), "--engine", "dask"]) == 2
    assert "No engine is named 'dask'. Names are 'threads', 'ray' and 'ray:ADDRESS'." in capsys.readouterr().err
