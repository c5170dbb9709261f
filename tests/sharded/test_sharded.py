"""The checks of `tests/sharded`, each in groups of 1, 2 and 4 processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import process_group

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULES = ("sharded.reading", "sharded.training", "sharded.storing", "sharded.auditing", "sharded.examples")

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
