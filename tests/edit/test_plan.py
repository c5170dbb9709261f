"""Plans: checked completely when created, printable, and repeatable."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import torchparams as tp
from torchparams.dtypes import DType
from torchparams.edit.plan.layout import Output
from torchparams.edit.plan.plan import Plan
from torchparams.errors import PlanError
from torchparams.expressions.base import Expression, Stored, Work
from torchparams.expressions.operations import Cast, Concat, Linear, Slice
from torchparams.expressions.work import evaluate
from torchparams.sources.opening import open_source
from torchparams.testing import MemorySource, safetensors_bytes, sample

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Array = np.ndarray[Any, Any]


def stored(array: Array, name: str = "w") -> Stored:
    return Stored(MemorySource({name: array}), name)


def refused(make: Callable[[], object]) -> str:
    with pytest.raises(PlanError) as caught:
        make()
    return str(caught.value)


def test_names_are_checked(tmp_path: Path) -> None:
    w, path = stored(np.ones(2)), f"{tmp_path}/x.safetensors"
    assert refused(lambda: Plan([Output("a", w), Output("a", w)], path)) == (
        f"{path}: Two tensors would have the name 'a'. Rename one."
    )
    assert refused(lambda: Plan([Output("", w)], path)) == f"{path}: A tensor would have an empty name. Rename it."


def test_a_whole_network_of_expressions_is_written_in_both_formats(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(
        safetensors_bytes({"q": sample("float32", (40, 30)), "k": sample("float32", (40, 30), seed=1)})
    )
    source = open_source(str(tmp_path / "a.safetensors"))
    q, k = Stored(source, "q"), Stored(source, "k")
    expressions: dict[str, Expression] = {
        "joined": Concat([q, k]),
        "beside": Concat([q, Slice(k, 1, 3, 9)], 1),
        "rows": Slice(q, 0, 7, 19),
        "columns": Slice(q, 1, 2, 3),
        "mean": Linear([q, k], [0.5, 0.5]),
        "half": Cast(Linear([q, k], [1, -1]), DType.of("float16")),
        "nothing": Slice(q, 0, 3, 3),
        "as it is": k,
    }
    expected = {name: evaluate(x) for name, x in expressions.items()}
    for name in ("x.safetensors", "x.pt", "x"):
        plan = Plan(
            [Output(key, x) for key, x in expressions.items()],
            tmp_path / name,
            max_shard_size=5000 if name == "x" else None,
            allow_overflow=True,
        )
        assert plan.copied == 4 * (2 * 1200 + 12 * 30 + 1200)
        plan.run()
        table = tp.of(tmp_path / name)
        assert table.names == list(expressions)
        for key, array in expected.items():
            assert table.numpy(key).tobytes() == array.tobytes()
            assert table.info(key).shape == array.shape


def test_it_runs_again(tmp_path: Path) -> None:
    plan = Plan([Output("w", Cast(stored(np.array([0.1, 1.0])), DType.of("bf16")))], tmp_path / "x.pt", overwrite=True)
    first, second = plan.run(), plan.run()
    assert first.casts == second.casts
    assert first.casts[0].losses.changed == 1


def test_what_is_prepared_is_run_in_order_by_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchparams.edit.write import execute

    monkeypatch.setattr(execute, "INLINE", -1)
    monkeypatch.setattr(execute, "PIECE", 100)

    class Cumulated(Expression):
        """A sum of all before, which holds only where blocks come one after the other."""

        def __init__(self, x: Expression) -> None:
            super().__init__(x.shape, x.dtype, (x,))

        def prepare(self, work: Work) -> list[float]:
            return [0.0]

        def compute(self, start: int, stop: int, work: Work, into: Any = None) -> Array:
            total = work.prepared(self)
            values: Array = self.operands[0].compute(start, stop, work).cumsum() + total[0]
            total[0] = values[-1]
            return values

        def summary(self) -> str:
            return f"cumulated {self.operands[0].summary()}"

    arrays = {f"t{i}": np.ones(500 + i) for i in range(5)}
    Plan([Output(name, Cumulated(stored(array))) for name, array in arrays.items()], tmp_path / "x.safetensors").run()
    for name, array in arrays.items():
        np.testing.assert_array_equal(tp.of(tmp_path / "x.safetensors").numpy(name), array.cumsum())


def test_what_it_would_hold_is_held_against_the_ceiling(tmp_path: Path) -> None:
    class Large(Expression):
        resident = 1000

        def compute(self, start: int, stop: int, work: Work, into: Any = None) -> Array:
            return np.zeros(stop - start, np.float32)

        def summary(self) -> str:
            return "zeros"

    outputs = [Output("w", Large((2,), DType.of("float32")))]
    assert refused(lambda: Plan(outputs, tmp_path / "x.pt", memory=999)) == (
        "'w': It needs 0.98 KiB of memory; the limit is 999 B. Raise the limit: memory=… (--memory)."
    )
    assert Plan(outputs, tmp_path / "x.pt", memory=1000).memory == 1000
    assert "is not a size" in refused(lambda: Plan(outputs, tmp_path / "x.pt", memory="all"))


def test_blocks_stay_within_the_ceiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Counted(Expression):
        def compute(self, start: int, stop: int, work: Work, into: Any = None) -> Array:
            sizes.append(stop - start)
            return np.zeros(stop - start, np.float32)

        def summary(self) -> str:
            return "zeros"

    x = Counted((10_000,), DType.of("float32"))
    Plan([Output("w", x)], tmp_path / "x.safetensors", memory=1000).run()
    assert max(sizes) * x.footprint <= 1000
    assert sum(sizes) == 10_000


def test_long_plans_are_cut(tmp_path: Path) -> None:
    source = MemorySource({f"t{i}": np.ones(1) for i in range(100)})
    plan = Plan(
        [Output(name, Stored(source, name)) for name in source.infos()],
        tmp_path / "x.safetensors",
        dropped=[(f"d{i}", "why not") for i in range(20)],
        notes=[f"note {i}" for i in range(11)],
    )
    text = str(plan)
    assert "… 60 more tensors …" in text
    assert "d7 (why not) and 12 more" in text
    assert text.endswith("note 7\n… 3 more notes")
    assert len(json.loads(json.dumps(plan.to_json()))["dropped"]) == 20
    assert "t50" in str(plan.tree(limit=None))


def test_a_name_cannot_drive_a_terminal(tmp_path: Path) -> None:
    plan = Plan([Output("a\x1b[31m\n", stored(np.ones(1)))], tmp_path / "x.safetensors", dropped=[("b\x1b", "c\n")])
    assert "\x1b" not in str(plan)
    assert str(plan).count("\n") == 4
    assert "\x1b" not in str(plan.run())


def test_a_repr_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan([Output("w", stored(np.ones(1)))], tmp_path / "x.safetensors")
    monkeypatch.setattr(Plan, "tree", lambda self: 1 / 0)
    assert repr(plan) == f"<Plan of {tmp_path}/x.safetensors: ZeroDivisionError: division by zero>"


def test_a_header_that_would_be_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tp.limits, "HEADER_BYTES", 100)
    outputs = [Output("w" * 200, stored(np.ones(1)))]
    assert refused(lambda: Plan(outputs, tmp_path / "x.safetensors")) == (
        "x.safetensors: The header would take 256 B, the limit is 100 B. Write it in shards (max_shard_size)."
    )


def test_no_block_is_read_that_is_not_wanted(tmp_path: Path) -> None:
    # What is copied is not listed as read: a plan of copies asks no source for values.
    class Blind(MemorySource):
        def numpy(self, name: str) -> Array:
            raise AssertionError(name)

    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes({"w": sample("float32", (3,))}))
    real = open_source(str(tmp_path / "a.safetensors"))
    blind = Blind({"w": sample("float32", (3,))})
    blind.span = real.span  # type: ignore[method-assign]  # as if its bytes lay there
    Plan([Output("w", Stored(blind, "w"))], tmp_path / "b.safetensors").run()
    assert tp.of(tmp_path / "b.safetensors").numpy("w").tobytes() == sample("float32", (3,)).tobytes()
