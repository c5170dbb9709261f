"""The package as it is published: the tag of its wheels, lowest versions, and the workflow files."""

from __future__ import annotations

import re
import runpy
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest
import setuptools
import yaml
from lowest import lowest

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("free_threaded", [False, True])
def test_free_threaded_python_gets_no_stable_abi(monkeypatch: pytest.MonkeyPatch, free_threaded: bool) -> None:
    called: dict[str, Any] = {}
    known = sysconfig.get_config_var
    monkeypatch.setattr(
        sysconfig, "get_config_var", lambda name: free_threaded if name == "Py_GIL_DISABLED" else known(name)
    )
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: called.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    assert called["options"] == ({} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp311"}})
    for extension in called["ext_modules"]:
        assert extension.py_limited_api is not free_threaded
        assert any(name == "Py_LIMITED_API" for name, _ in extension.define_macros) is not free_threaded
    sources = [ROOT / path for extension in called["ext_modules"] for path in extension.sources]
    assert sorted(sources) == sorted((ROOT / "src" / "torchparams" / "sketch").glob("*.c"))


def test_the_lowest_versions_are_those_stated() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    found = lowest(text)
    assert found["numpy"] == "1.26" and found["torch"] == "2.6"
    page = (ROOT / "docs" / "stability.md").read_text()
    for requirement in tomllib.loads(text)["project"]["dependencies"]:
        name, version = requirement.split(">=")
        assert re.search(rf"^\| `{name}` \| {re.escape(version)} \| .+ \| .+ \|$", page, re.MULTILINE), requirement
    with pytest.raises(SystemExit):
        lowest(text.replace('"numpy>=1.26"', '"numpy>=1.26,<3"'))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_least_permissions_limits_and_no_address(path: Path) -> None:
    text = path.read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {}
    assert "://" not in text
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            called = re.fullmatch(r"make (.*)", step.get("run", ""))
            assert called is None or set(called[1].split()) <= targets
            for script in re.findall(r"scripts/\w+\.py|tests/[\w/.]+", step.get("run", "")):
                assert (ROOT / script).exists(), script


def test_the_jobs_are_there() -> None:
    jobs = {name for path in WORKFLOWS for name in yaml.safe_load(path.read_text())["jobs"]}
    assert {"lint", "test", "lowest", "wheels", "sdist", "site", "publish"} <= jobs
