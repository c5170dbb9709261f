from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

import pytest

import torchparams as tp
from torchparams.render.result import Result
from torchparams.render.tree import Text, Tree

if TYPE_CHECKING:
    from collections.abc import Iterator


def results() -> Iterator[type[Result]]:
    for found in pkgutil.walk_packages(tp.__path__, "torchparams."):
        # Callbacks import the library that they are for.
        if not any(part in found.name for part in (".testing", ".record.callbacks.", "__main__")):
            importlib.import_module(found.name)
    todo: list[type[Result]] = list(Result.__subclasses__())
    for cls in todo:  # grows during the loop
        todo += cls.__subclasses__()
    yield from (cls for cls in todo if cls.__module__.startswith("torchparams."))


def test_every_result_prints_by_the_base_class() -> None:
    found = {cls.__name__: cls for cls in results()}
    assert {"Parameters", "Stats", "Diff", "Digests", "Plan", "Written", "Audit", "Groups", "Explanation"} <= set(found)
    for cls in found.values():
        assert cls.__repr__ is Result.__repr__, cls  # a dataclass writes one of its own, unless repr=False
        assert cls.__str__ is Result.__str__, cls
        if cls.__name__ != "Page":  # which shows itself in a frame
            assert cls._repr_html_ is Result._repr_html_, cls


def test_the_public_results_are_results() -> None:
    for name in tp.__all__:
        public = getattr(tp, name)
        if isinstance(public, type) and hasattr(public, "tree") and hasattr(public, "_repr_html_"):
            assert issubclass(public, Result), name


class Broken(Result):
    def tree(self) -> Tree:
        raise RuntimeError("no <such>\x1b report")


class Whole(Result):
    def tree(self) -> Tree:
        return Tree((Text("a <b>", "title"),))


def test_a_repr_never_raises() -> None:
    assert repr(Broken()) == str(Broken()) == "<Broken: RuntimeError: no <such>\\x1b report>"
    assert Broken()._repr_html_() == "<p>&lt;Broken: RuntimeError: no &lt;such&gt;\\x1b report&gt;</p>"


@pytest.mark.parametrize("cls", list(results()), ids=lambda cls: cls.__name__)
def test_the_repr_of_a_half_made_result_never_raises(cls: type[Result]) -> None:
    made = cls.__new__(cls)
    assert repr(made).startswith(f"<{cls.__name__}") or repr(made)
    assert made._repr_html_()


def test_a_result_prints_its_report() -> None:
    assert repr(Whole()) == str(Whole()) == "a <b>"
    assert "a &lt;b&gt;" in Whole()._repr_html_()
