"""The checks of `tests/sharded`, each in groups of 1, 2 and 4 processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import process_group

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODULES = (
    *("sharded.reading", "sharded.training", "sharded.storing", "sharded.communicating"),
    *("sharded.recording", "sharded.auditing", "sharded.examples"),
)

pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture(scope="session")
def groups() -> Iterator[process_group.Groups]:
    """The groups of processes."""
    yield from process_group.groups()


@pytest.mark.parametrize(
    ("world", "module", "name"),
    [pytest.param(*each, id=f"{each[2]}-{each[0]}") for each in process_group.checks(*MODULES)],
)
def test_check(groups: process_group.Groups, world: int, module: str, name: str) -> None:
    groups.run(world, module, name)


def test_a_run_goes_on_with_other_ranks_and_shards(groups: process_group.Groups, tmp_path: Path) -> None:
    for step in ("save", "go_on"):
        for world in process_group.WORLDS:
            groups.run(world, "sharded.runs", step, str(tmp_path))
