"""merge: every method against torch on whole tensors, for all dtypes, block sizes and memory limits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchparams as tp
from bit_patterns import NUMERIC
from torch_files import saved
from torchparams.dtypes import DType
from torchparams.edit.merge._sparse import Dropped, TaskVectors, Trimmed, kept
from torchparams.edit.merge.methods import METHODS
from torchparams.edit.write import execute
from torchparams.errors import MismatchError, NoMatch, OptionError, PlanError
from torchparams.expressions.combination import combines
from torchparams.expressions.work import ThreadWork, block_of, evaluate
from torchparams.testing import safetensors_bytes, sample, to_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torchparams.expressions.base import Expression

Array = np.ndarray[Any, Any]
Tensor = torch.Tensor
FLOATS = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
BASED = [name for name, method in METHODS.items() if method.base]


# --- the methods, in whole tensors --------------------------------------------------------------


def linear(parts: list[Tensor], weights: Sequence[float]) -> Tensor:
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = total + part * weight
    return total


def slerp(parts: list[Tensor], weights: Sequence[float]) -> Tensor:
    a, b = (part.double().flatten() for part in parts)
    t = weights[1]
    omega = torch.arccos((a / a.norm()) @ (b / b.norm()))
    factors = torch.sin((1 - t) * omega) / torch.sin(omega), torch.sin(t * omega) / torch.sin(omega)
    return linear(parts, [float(factor) for factor in factors])


def task_arithmetic(base: Tensor, parts: list[Tensor], weights: Sequence[float], scale: float) -> Tensor:
    return base + scale * linear([part - base for part in parts], weights)


def elected(deltas: list[Tensor], weights: Sequence[float]) -> Tensor:
    weighted = torch.stack([delta * weight for delta, weight in zip(deltas, weights, strict=True)])
    sign = torch.where(weighted.clamp(min=0).sum(0) >= -weighted.clamp(max=0).sum(0), 1.0, -1.0)
    agree = torch.stack(deltas).sign() == sign
    count = (agree * torch.tensor(weights, dtype=base_type(deltas)).view(-1, *[1] * deltas[0].ndim)).sum(0)
    mean = (weighted * agree).sum(0) / count
    return torch.where(count == 0, torch.zeros_like(mean), mean)


def base_type(tensors: list[Tensor]) -> torch.dtype:
    return tensors[0].dtype


def ties(base: Tensor, parts: list[Tensor], weights: Sequence[float], scale: float, density: float) -> Tensor:
    deltas = [part - base for part in parts]
    trimmed = []
    for delta in deltas:
        count = max(int(density * delta.numel()), 1)
        least = delta.abs().flatten().topk(count).values[-1]
        trimmed.append(torch.where(delta.abs() >= least, delta, 0.0))
    return base + scale * elected(trimmed, weights)


def dare(
    base: Tensor, parts: list[Tensor], weights: Sequence[float], scale: float, density: float, masks: list[Tensor],
    elect: bool = False,
) -> Tensor:  # fmt: skip
    deltas = [(part - base) / density * mask for part, mask in zip(parts, masks, strict=True)]
    return base + scale * (elected(deltas, weights) if elect else linear(deltas, weights))


# --- help ---------------------------------------------------------------------------------------


def tuned(name: str, shape: tuple[int, ...], count: int, seed: int = 0) -> list[Array]:
    """A base and so many tensors near it, of a type; many of them have the same differences, some have none."""
    numbers = np.random.default_rng(seed)
    base = numbers.standard_normal(shape)
    steps = [np.round(numbers.standard_normal(shape), 1) * (numbers.random(shape) < 0.8) for _ in range(count)]
    return [x.astype(DType.of(name).numpy) for x in (base, *(base + step for step in steps))]


def wide(array: Array, compute: str = "float32") -> Tensor:
    return to_torch(array).to(getattr(torch, compute))


def rounded(total: Tensor, name: str) -> Array:
    """As torch rounds, in the bytes of numpy's array of the type."""
    made = total.to(getattr(torch, name)).contiguous()
    return made.flatten().view(torch.uint8).numpy().view(DType.of(name).numpy).reshape(tuple(total.shape))


def written(folder: Path, sources: Sequence[object], **options: Any) -> dict[str, Array]:
    path = folder / "merged.safetensors"
    tp.merge(sources, path, overwrite=True, **options).run()
    table = tp.of(str(path))
    return {name: np.array(table.numpy(name)) for name in table.names}


def of(arrays: Sequence[Array], name: str = "w") -> list[dict[str, Array]]:
    return [{name: array} for array in arrays]


def only(folder: Path, sources: Sequence[object], **options: Any) -> Array:
    return written(folder, sources, **options)["w"]


def same(ours: Array, theirs: Array) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert ours.tobytes() == theirs.tobytes()


def expression(sources: Sequence[object], **options: Any) -> Expression:
    (output,) = tp.merge(sources, "merged.safetensors", **options).outputs
    return output.expression


def refusal(error: type[Exception], sources: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        tp.merge(sources, "merged.safetensors", **options)
    return str(caught.value)


# --- each method --------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("name", FLOATS)
def test_linear_is_arithmetic_rounded_once(name: str, compute: str, tmp_path: Path) -> None:
    arrays = [sample(name, (3, 50), seed) for seed in (1, 2, 3)]
    weights = [0.2, -0.3, 0.7]
    ours = only(tmp_path, of(arrays), weights=weights, compute=compute, allow_overflow=True)
    total = linear([wide(array, compute) for array in arrays], weights)
    numbers = ~torch.isnan(total).numpy()
    assert np.array_equal(np.isnan(ours.astype(np.float64)), ~numbers)
    theirs = rounded(total, name)
    assert ours[numbers].tobytes() == theirs[numbers].tobytes()


def test_average_is_linear_with_equal_weights(tmp_path: Path) -> None:
    arrays = tuned("bfloat16", (40,), 3)
    average = only(tmp_path, of(arrays), method="average")
    same(average, rounded(linear([wide(a) for a in arrays], [0.25] * 4), "bfloat16"))
    same(average, only(tmp_path, of(arrays)))
    same(average, only(tmp_path, of(arrays), weights=[2, 2, 2, 2], normalize=True))


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 1.0])
def test_slerp(name: str, t: float, tmp_path: Path) -> None:
    arrays = tuned(name, (5, 9), 1)
    ours = only(tmp_path, of(arrays), method="slerp", weights=t)
    theirs = slerp([wide(a) for a in arrays], [1 - t, t])
    if t in (0, 1):
        same(ours, arrays[int(t)])
    elif DType.of(name).bits < 32:
        same(ours, rounded(theirs, name))
    else:
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-7)


def test_slerp_keeps_the_norm_of_a_unit_vector(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)
    arrays = [x / np.linalg.norm(x) for x in numbers.standard_normal((2, 1000))]
    for t in (0.1, 0.5, 0.9):
        ours = only(tmp_path, of(arrays), method="slerp", weights=t, compute="float64")
        assert abs(np.linalg.norm(ours) - 1) < 1e-12


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0, 2.0], [2.0, 4.0]),  # parallel
        ([1.0, 2.0], [-1.0, -2.0]),  # opposite
        ([0.0, 0.0], [1.0, 2.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([], []),
    ],
)
def test_slerp_where_there_is_no_arc_is_a_straight_line(a: list[float], b: list[float], tmp_path: Path) -> None:
    arrays = [np.array(x, np.float32) for x in (a, b)]
    same(only(tmp_path, of(arrays), method="slerp", weights=0.25), only(tmp_path, of(arrays), weights=0.25))


def test_slerp_of_what_is_not_finite_is_a_straight_line(tmp_path: Path) -> None:
    arrays = [np.array([1, value, 3], np.float32) for value in (np.inf, 2)]
    ours = only(tmp_path, of(arrays), method="slerp", weights=0.5)
    assert ours.tolist() == [1, np.inf, 3]


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("name", FLOATS)
def test_methods_with_a_base(name: str, compute: str, tmp_path: Path) -> None:
    base, *parts = tuned(name, (7, 31), 3)
    weights, scale, density = [0.5, 1.0, 2.0], 0.75, 0.3
    given = {"base": {"w": base}, "weights": weights, "scale": scale, "compute": compute, "allow_overflow": True}
    b, xs = wide(base, compute), [wide(part, compute) for part in parts]
    masks = [torch.from_numpy(kept(density, 5, i, "w", 0, base.size).reshape(base.shape)) for i in range(3)]
    for method, theirs in {
        "task_arithmetic": task_arithmetic(b, xs, weights, scale),
        "ties": ties(b, xs, weights, scale, density),
        "dare": dare(b, xs, weights, scale, density, masks),
        "dare_ties": dare(b, xs, weights, scale, density, masks, elect=True),
    }.items():
        more = {} if method == "task_arithmetic" else {"density": density}
        more |= {"seed": 5} if method.startswith("dare") else {}
        ours = only(tmp_path, of(parts), method=method, **given, **more)
        same(ours, rounded(theirs, name))


def test_ties_as_its_paper_draws_it(tmp_path: Path) -> None:
    # Figure 1 of arXiv:2306.01708: trim, elect, mean of those that agree.
    base = np.zeros(4, np.float32)
    parts = [np.array(x, np.float32) for x in ([5, 0.1, -3, 0], [4, -2, 0.1, 1], [-0.2, -3, 2, 0])]
    ours = only(tmp_path, of(parts), method="ties", base={"w": base}, density=0.5)
    assert ours.tolist() == [4.5, -2.5, -3, 0]


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, -2.0, 3e-39, np.inf]), min_size=1, max_size=40),
    st.sampled_from([0.01, 0.2, 0.5, 0.9, 1.0]),
    st.sampled_from(["float32", "float64"]),
)
@settings(max_examples=50)
def test_the_trim_keeps_the_greatest_and_what_ties_with_the_least_of_them(
    values: list[float], density: float, compute: str
) -> None:
    array = np.array(values, np.float32)
    values = array.tolist()
    x = expression(of([array]), method="ties", base={"w": np.zeros_like(array)}, density=density, compute=compute)
    assert isinstance(x, Trimmed)
    least = sorted(map(abs, values), reverse=True)[max(int(density * len(values)), 1) - 1]
    assert evaluate(x).tolist() == [value if abs(value) >= least else 0 for value in values]


def test_equal_masses_of_both_signs_elect_the_positive(tmp_path: Path) -> None:
    parts = [np.array([value], np.float32) for value in (-2, 2)]
    assert only(tmp_path, of(parts), method="ties", base={"w": np.zeros(1, np.float32)}).tolist() == [2]


def test_what_is_dropped_depends_on_seed_source_name_and_place_alone() -> None:
    whole = kept(0.3, 7, 1, "w", 0, 1000)
    assert 250 < np.count_nonzero(whole) < 350
    for start, stop in ((0, 1), (1, 9), (3, 5), (8, 1000), (999, 1000), (500, 500)):
        assert kept(0.3, 7, 1, "w", start, stop).tolist() == whole[start:stop].tolist()
    for seed, number, name in ((8, 1, "w"), (7, 0, "w"), (7, 1, "v")):
        assert kept(0.3, seed, number, name, 0, 1000).tolist() != whole.tolist()
    # What numbers they are is part of what a seed means, for ever.
    assert np.flatnonzero(kept(0.5, 0, 0, "w", 0, 12)).tolist() == FIRST_KEPT


FIRST_KEPT = [0, 1, 4, 5, 9, 11]


def test_dropping_nothing_is_task_arithmetic(tmp_path: Path) -> None:
    base, *parts = tuned("bfloat16", (64,), 2)
    plain = only(tmp_path, of(parts), method="task_arithmetic", base={"w": base})
    same(plain, only(tmp_path, of(parts), method="dare", base={"w": base}, density=1.0))


def test_dropping_keeps_the_expectation(tmp_path: Path) -> None:
    base, part = np.zeros(100_000, np.float32), np.ones(100_000, np.float32)
    ours = only(tmp_path, of([part]), method="dare", base={"w": base}, density=0.1)
    assert set(ours.tolist()) == {0.0, 10.0}
    assert abs(ours.mean() - 1) < 0.05


def test_a_nan_stays_one(tmp_path: Path) -> None:
    base = np.zeros(4, np.float32)
    parts = [np.array([np.nan, 1, 2, 3], np.float32), np.array([1, 1, -1, 1], np.float32)]
    for method in BASED:
        ours = only(tmp_path, of(parts), method=method, base={"w": base})
        assert np.isnan(ours).tolist() == [True, False, False, False], method
    assert np.isnan(only(tmp_path, of(parts))).tolist() == [True, False, False, False]


# --- blocks, threads and memory -----------------------------------------------------------------


def in_blocks(x: Expression, block: int) -> bytes:
    """The elements, computed in blocks of so many, or as few more as the operation needs."""
    step = block_of(x, 1, most=1)
    with ThreadWork(block_bytes=64) as work:
        size = max(block // step, 1) * step
        work.begin(x, size)
        return b"".join(
            x.compute(start, min(start + size, x.numel), work).tobytes() for start in range(0, x.numel, size)
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_blocks_do_not_matter(method: str, name: str) -> None:
    base, *parts = tuned(name, (3, 5000), 2, seed=3)
    options: dict[str, Any] = {"base": {"w": base}} if METHODS[method].base else {}
    options |= {"density": 0.25} if "density" in METHODS[method].options else {}
    x = expression(of(parts), method=method, **options)
    whole = evaluate(x).tobytes()
    for block in (100, 4096, 20_000):
        assert in_blocks(x, block) == whole


def test_threads_and_memory_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *parts = tuned("bfloat16", (64, 300), 2)
    for method in METHODS:
        options = {"method": method, **({"base": {"w": base}} if METHODS[method].base else {})}
        found = []
        for inline, memory in ((1 << 30, "256MiB"), (1, "256MiB"), (1, "200KB")):
            monkeypatch.setattr(execute, "INLINE", inline)
            monkeypatch.setattr(execute, "PIECE", 1 << 12)
            found.append(only(tmp_path, of(parts), memory=memory, **options).tobytes())
        assert len(set(found)) == 1, method


def test_what_is_held_for_an_element_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    import tracemalloc

    shape = (1 << 21,)
    files = []
    for i, array in enumerate(tuned("bfloat16", shape, 2)):
        files.append(str(tmp_path / f"{i}.safetensors"))
        (tmp_path / f"{i}.safetensors").write_bytes(safetensors_bytes({"w": array}))
    for method in METHODS:
        options: dict[str, Any] = {"method": method, **({"base": files[0]} if METHODS[method].base else {})}
        plan = tp.merge(files[1:], tmp_path / "out.safetensors", overwrite=True, memory="2MB", **options)
        tracemalloc.start()
        try:
            plan.run()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 6e6, method  # 2 MB of blocks; readers and counts of patterns beside


# --- types, names and ties ----------------------------------------------------------------------


def test_the_types_are_those_of_the_first_or_of_the_base(tmp_path: Path) -> None:
    a, b = sample("float32", (6,), 1), sample("bfloat16", (6,), 2)
    a[~np.isfinite(a)] = 0
    assert only(tmp_path, of([a, b])).dtype == np.float32
    assert str(only(tmp_path, of([b, a])).dtype) == "bfloat16"
    assert str(only(tmp_path, of([a]), method="task_arithmetic", base={"w": b}).dtype) == "bfloat16"
    assert only(tmp_path, of([b, a]), dtype="f64").dtype == np.float64
    two = {"w": np.ones(2, np.float32), "v": np.ones(2, np.float32)}
    made = written(tmp_path, [two, two], dtype={"w": "f16"})
    assert [str(array.dtype) for array in made.values()] == ["float16", "float32"]


@pytest.mark.parametrize("name", NUMERIC)
def test_every_type_is_merged_or_taken_as_it_is(name: str, tmp_path: Path) -> None:
    array = sample(name, (4, 6), 1)
    if DType.of(name).code is None:
        return
    plan = tp.merge(of([array, array]), tmp_path / "m.safetensors", allow_overflow=True)
    taken = [note for note in plan.notes if note.startswith("not floats")]
    assert bool(taken) is not combines(DType.of(name))
    plan.run()
    made = tp.of(str(tmp_path / "m.safetensors")).numpy("w")
    if taken:
        same(np.ascontiguousarray(made), array)


def test_counters_are_those_of_the_first(tmp_path: Path) -> None:
    sources = [
        {"w": np.full(2, i, np.float32), "steps": np.array(i), "ids": np.arange(3), "mask": np.array([True])}
        for i in (1, 3)
    ]
    plan = tp.merge(sources, tmp_path / "m.safetensors")
    assert plan.notes[-2:] == (
        "not floats, copied from dict: 'steps', 'ids', 'mask'",
        "different values in other sources: 'steps'",
    )
    made = written(tmp_path, sources)
    assert [array.tolist() for array in made.values()] == [[2, 2], 1, [0, 1, 2], [True]]
    assert refusal(PlanError, [{"codes": np.arange(3)}, {"codes": np.arange(3) + 1}]) == (
        "dict: 'codes' differs between the sources, and int64 cannot be averaged. "
        "Exclude it with a selector (-s), or convert it to floats first."
    )
    assert refusal(MismatchError, [{"w": np.zeros(1)}, {"w": np.zeros(1, np.int8)}]) == (
        "'w' is float64 in dict and int8 in dict. Convert one of the sources first."
    )


def test_names_must_be_the_same(tmp_path: Path) -> None:
    a, b = {"w": np.zeros(1), "v": np.ones(1)}, {"w": np.full(1, 2.0), "u": np.full(1, 5.0)}
    assert refusal(MismatchError, [a, b]) == (
        "The sources have different tensors: 'v' not in dict; 'u' of dict not in dict. "
        "Pass missing='keep' to copy them from the first source that has them, or missing='drop'."
    )
    assert {name: x.tolist() for name, x in written(tmp_path, [a, b], missing="keep").items()} == {
        "w": [1],
        "v": [1],
        "u": [5],
    }
    plan = tp.merge([a, b], tmp_path / "m.safetensors", overwrite=True, missing="drop")
    assert [output.name for output in plan.outputs] == ["w"]
    assert plan.dropped == (("v", "not in every source"), ("u", "not in every source"))
    assert refusal(PlanError, [{"w": np.zeros(1)}, {"v": np.zeros(1)}], missing="drop") == (
        "dict: The sources have no tensor in common"
    )
    assert refusal(OptionError, [a, b], missing="skip") == ("`missing` must be 'refuse', 'keep' or 'drop', not 'skip'")
    assert refusal(MismatchError, [{"w": np.zeros((2, 3))}, {"w": np.zeros((3, 2))}]) == (
        "Shapes differ: 'w' is [2, 3] in dict and [3, 2] in dict. -s '~w' merges only the others."
    )


def test_names_of_others_are_renamed(tmp_path: Path) -> None:
    a, b = {"w": np.zeros(1), "v": np.ones(1)}, {"model.w": np.full(1, 2.0), "model.v": np.full(1, 5.0)}
    assert refusal(MismatchError, [a, b]) == (
        "The sources have different tensors: 'w', 'v' not in dict; 'model.w', 'model.v' of dict not in dict. "
        "Rename the tensors of dict (strip 'model.' from 2 of 2 names): rename=… (--rename)."
    )
    made = written(tmp_path, [a, a, b], rename=r"^model\.=", weights=[0, 0.5, 0.5])
    assert {name: x.tolist() for name, x in made.items()} == {"w": [1], "v": [3]}
    assert refusal(NoMatch, [a, a], rename=r"^module\.=") == ("dict: The rename pattern '^module\\\\.' matches no name")


def test_names_of_one_tensor_stay_one_where_all_tie_them(tmp_path: Path) -> None:
    def tied(value: float, tie: bool) -> dict[str, Tensor]:
        head = torch.full((2,), value)
        return {"embed": head, "head": head if tie else head + 1, "other": torch.full((1,), value)}

    for name, state in (("a", tied(1.0, True)), ("b", tied(3.0, True)), ("c", tied(3.0, False))):
        (tmp_path / f"{name}.pt").write_bytes(saved(state))
    a, b, c = (str(tmp_path / f"{name}.pt") for name in "abc")
    out = tmp_path / "out.pt"
    tp.merge([a, b], out).run()
    state = torch.load(out, weights_only=True)
    assert state["embed"].data_ptr() == state["head"].data_ptr()
    assert state["embed"].tolist() == [2, 2]
    tp.merge([a, c], out, overwrite=True).run()
    state = torch.load(out, weights_only=True)
    assert (state["embed"].tolist(), state["head"].tolist()) == ([2, 2], [2.5, 2.5])
    assert [o.name for o in tp.merge([a, b], tmp_path / "o.safetensors", shared="drop").outputs] == ["embed", "other"]


def test_views_of_one_storage_are_merged_apart(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    (tmp_path / "a.pt").write_bytes(saved({"whole": whole, "part": whole[2:4]}))
    a, out = str(tmp_path / "a.pt"), tmp_path / "out.pt"
    tp.merge([a, a], out, weights={None: [1, 1], "part": [1, 2]}).run()
    state = torch.load(out, weights_only=True)
    assert (state["whole"].tolist(), state["part"].tolist()) == ([0, 2, 4, 6, 8, 10], [6, 9])


def test_models_and_shards_are_sources_too(tmp_path: Path) -> None:
    models = [torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)) for _ in range(2)]
    tp.convert(models[1], tmp_path / "shards", max_shard_size=16).run()
    made = written(tmp_path, [models[0], str(tmp_path / "shards")], weights=0.5)
    states = [model.state_dict() for model in models]
    assert list(made) == list(states[0])
    for name, array in made.items():
        mean = states[0][name] if "num" in name else states[0][name] * 0.5 + states[1][name] * 0.5
        assert array.tolist() == mean.tolist()


# --- weights ------------------------------------------------------------------------------------

LAYERS = [{f"layers.{i}.w": np.full(1, value) for i in range(3)} for value in (0.0, 1.0, 10.0)]


def weighed(folder: Path, sources: Sequence[Mapping[str, Array]], weights: object, **options: Any) -> list[float]:
    return [float(array[0]) for array in written(folder, sources, weights=weights, **options).values()]


@pytest.mark.parametrize(
    ("count", "weights", "expected"),
    [
        (2, None, [0.5, 0.5, 0.5]),
        (2, 0.25, [0.25, 0.25, 0.25]),
        (2, [0.25, 0.25], [0.25, 0.25, 0.25]),
        (3, [1, 2, 3], [32, 32, 32]),
        (2, {"layers.{0..1}.**": 0.25}, [0.25, 0.25, 0.5]),
        (2, {None: 0.1, "layers.1.w": [3, 2]}, [0.1, 2, 0.1]),
        (2, {"**": 0.1, "layers.1.w": 0.2, "layers.{1..2}.w": 0.3}, [0.1, 0.3, 0.3]),
        (3, {"layers.0.w": (0, 1, 0.5)}, [6, 11 / 3, 11 / 3]),
    ],
)
def test_weights(count: int, weights: object, expected: list[float], tmp_path: Path) -> None:
    assert weighed(tmp_path, LAYERS[:count], weights) == pytest.approx(expected)


def test_weights_of_methods_with_a_base(tmp_path: Path) -> None:
    given: dict[str, Any] = {"method": "task_arithmetic", "base": LAYERS[0]}
    assert weighed(tmp_path, LAYERS[1:], None, **given) == [11, 11, 11]
    assert weighed(tmp_path, LAYERS[1:], 0.5, **given) == [5.5, 5.5, 5.5]
    assert weighed(tmp_path, LAYERS[1:], {"layers.2.w": [0, 1]}, scale=2, **given) == [22, 22, 20]
    assert weighed(tmp_path, LAYERS[2:], -1, **given) == [-10, -10, -10]


def test_a_source_of_weight_zero_is_not_read(tmp_path: Path) -> None:
    bad = {"w": np.array([np.nan])}
    assert only(tmp_path, [{"w": np.ones(1)}, bad], weights=[2, 0]).tolist() == [2]
    for name, value in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.safetensors").write_bytes(safetensors_bytes({"w": np.full(1, value, np.float32)}))
    plan = tp.merge([str(tmp_path / f"{name}.safetensors") for name in "ab"], tmp_path / "c.safetensors", weights=1.0)
    assert plan.copied == 4  # all of the second: its bytes go from file to file
    plan.run()
    assert tp.of(str(tmp_path / "c.safetensors")).numpy("w").tolist() == [2]


def test_only_a_selection_is_written(tmp_path: Path) -> None:
    assert list(written(tmp_path, LAYERS[:2], selector="layers.{0,2}.w")) == ["layers.0.w", "layers.2.w"]
    other = {**LAYERS[1], "more": np.zeros(1)}  # of what is not selected, differences do not matter
    assert list(written(tmp_path, [LAYERS[0], other], selector="layers.1.w")) == ["layers.1.w"]


# --- what is refused ----------------------------------------------------------------------------

W = {"w": np.zeros(2, np.float32)}
ERRORS: list[tuple[Callable[[], object], str]] = [
    (lambda: tp.merge([W], "m.safetensors"), "Method 'linear' takes 2 or more sources, but there is 1"),
    (lambda: tp.merge([W] * 3, "m.safetensors", method="slerp"), "Method 'slerp' takes 2 sources, but there are 3"),
    (
        lambda: tp.merge([], "m.safetensors", method="ties", base=W),
        "Method 'ties' takes 1 or more sources, but there are 0",
    ),
    (lambda: tp.merge(W, "m.safetensors"), "Sources must be a list. Write merge([a, b], path)."),  # type: ignore[arg-type]  # what people try
    (lambda: tp.merge("a.pt", "m.safetensors"), "Sources must be a list. Write merge([a, b], path)."),
    (
        lambda: tp.merge([W, W], "m.safetensors", method="tie"),
        "Unknown method 'tie'. "
        "Methods are linear, average, slerp, task_arithmetic, ties, dare, dare_ties. Did you mean ties?",
    ),
    (
        lambda: tp.merge([W, W], "m.safetensors", method="ties"),
        "Method 'ties' needs the base that the sources were tuned from. Pass base=… (--base BASE).",
    ),
    (
        lambda: tp.merge([W, W], "m.safetensors", base=W),
        "Method 'linear' takes no base. Methods with a base are task_arithmetic, ties, dare, dare_ties.",
    ),
    (
        lambda: tp.merge([W, W], "m.safetensors", density=0.5),
        "Method 'linear' does not take density. Methods with density are ties, dare, dare_ties.",
    ),
    (
        lambda: tp.merge([W, W], "m.safetensors", method="average", weights=0.5),
        "Method 'average' does not take weights. Methods with weights are linear, slerp, task_arithmetic, ties, dare, "
        "dare_ties.",
    ),
    (
        lambda: tp.merge([W, W], "m.safetensors", method="slerp", normalize=True),
        "Method 'slerp' does not take normalize. Methods with normalize are linear.",
    ),
    (
        lambda: tp.merge([W, W, W], "m.safetensors", weights=0.5),
        "A single weight is the share of the second of two sources, but there are 3. Pass one weight for each source.",
    ),
    (
        lambda: tp.merge([W, W], "m.safetensors", weights=[0.1, 0.2, 0.3]),
        "3 numbers for 2 sources: weights=[0.1, 0.2, 0.3]. Pass one number per source, or a single number.",
    ),
    (
        lambda: tp.merge([W, W], "m.safetensors", weights=[0.5, float("nan")]),
        "Weights must be finite numbers, not nan",
    ),
    (
        lambda: tp.merge([W, W], "m.safetensors", weights="0.5"),
        "Weights must be a number or a list of numbers, not '0.5'. "
        "Write 0.3, [0.3, 0.7], or {'layers.**': 0.3} with a selector.",
    ),
    (
        lambda: tp.merge([W, W], "m.safetensors", weights=[1, -1], normalize=True),
        "The weights add up to zero, and cannot be normalised",
    ),
    (
        lambda: tp.merge([W, W], "m.safetensors", method="slerp", weights=[1, 1]),
        "The weights of slerp are 1 - t and t, but 1 and 1 do not add up to 1. Pass t alone.",
    ),
    (
        lambda: tp.merge([W, W], "m.safetensors", method="slerp", weights=1.5),
        "The weight of slerp must be between 0 and 1, not 1.5",
    ),
    *(
        (
            lambda density=density: tp.merge([W], "m.safetensors", method="dare", base=W, density=density),
            f"A density must be above 0 and at most 1, not {density:g}",
        )
        for density in (0.0, -0.5, 1.5)
    ),
    (
        lambda: tp.merge([W, W], "m.safetensors", method="ties", base=W, weights=[1, -1]),
        "Method 'ties' elects signs, and needs non-negative weights, not -1",
    ),
    (
        lambda: tp.merge([W], "m.safetensors", method="dare", base=W, scale=float("inf")),
        "`scale` must be a finite number, not inf",
    ),
    (lambda: tp.merge([W], "m.safetensors", method="dare", base=W, seed=True), "`seed` must be an integer, not True"),
    (
        lambda: tp.merge([W, W], "m.safetensors", compute="float16"),
        "`compute` must be 'float32' or 'float64', not 'float16'",
    ),
    (lambda: tp.merge([{}, {}], "m.safetensors"), "dict: The source has no tensors"),
]


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_what_is_refused(number: int) -> None:
    call, message = ERRORS[number]
    with pytest.raises((OptionError, PlanError)) as caught:
        call()
    assert str(caught.value) == message


def test_selectors_of_weights_are_strict() -> None:
    assert "`layer.*` matches nothing" in refusal(NoMatch, LAYERS[:2], weights={"layer.*": 0.5})
    tp.merge(LAYERS[:2], "m.safetensors", weights={"layer.*": 0.5}, strict=False)


def test_a_sum_beyond_the_type_is_refused(tmp_path: Path) -> None:
    sources = of([np.array([60_000, 1], np.float16)] * 2)
    plan = tp.merge(sources, tmp_path / "m.safetensors", weights=[1, 1])
    with pytest.raises(PlanError) as caught:
        plan.run()
    assert str(caught.value) == (
        "w: At least 1 value is too large for float16. Nothing was written. "
        "Choose a wider dtype, or pass allow_overflow=True (--allow-overflow)."
    )
    assert not list(tmp_path.iterdir())
    assert only(tmp_path, sources, weights=[1, 1], allow_overflow=True).tolist() == [np.inf, 2]
    infinite = of([np.array([np.inf, 1], np.float16)] * 2)  # what was infinite may stay so
    assert only(tmp_path, infinite, weights=[1, 1]).tolist() == [np.inf, 2]


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare"])
def test_a_sum_beyond_the_type_of_the_sum_is_refused(method: str, compute: str, tmp_path: Path) -> None:
    kind = np.dtype(compute).type
    large = np.finfo(kind).max
    sources = of([np.array([large, 1, np.inf], kind)] * 2)
    options: dict[str, Any] = {"method": method, "compute": compute, "weights": [3, 3]}
    if method != "linear":
        options["base"] = {"w": np.array([-large / 2, 0, 0], kind)}
    plan = tp.merge(sources, tmp_path / "m.safetensors", **options)
    with pytest.raises(PlanError, match=rf"1 value is too large for {compute}\. Nothing was written"):
        plan.run()
    assert not np.isfinite(only(tmp_path, sources, allow_overflow=True, **options)[[0, 2]]).any()


# --- what the plan says -------------------------------------------------------------------------


def test_the_plan_says_what_is_done(tmp_path: Path) -> None:
    for i, source in enumerate(LAYERS):
        (tmp_path / f"{i}.safetensors").write_bytes(safetensors_bytes(source))
    base, a, b = (str(tmp_path / f"{i}.safetensors") for i in range(3))
    plan = tp.merge(
        [a, b], tmp_path / "m.safetensors", method="dare_ties", base=base, density=0.5, weights={"layers.0.w": [1, 0.5]}
    )
    text = str(plan)
    assert "dare_ties [1, 0.5]·layers.0.w" in text
    assert plan.notes == (
        "method: DARE (Yu et al. 2023, arXiv:2311.03099) with the elected signs of TIES (arXiv:2306.01708); "
        f"computed in float32, rounded once; density 0.5; scale 1; seed 0; base {base}",
        f"weights 1 {a}, 0.5 {b}, of 1 tensor: 'layers.0.w'",
        f"weights 1 {a}, 1 {b}, of 2 tensors: 'layers.1.w', 'layers.2.w'",
        "memory: at most 256 MiB for tensors",
    )
    told = json.loads(json.dumps(plan.to_json()))["tensors"][0]["from"]
    assert {key: told[key] for key in told if key != "operands"} == {
        "operation": "dropped",
        "accumulate": "float32",
        "method": "dare_ties",
        "weights": [1.0, 0.5],
        "scale": 1.0,
        "elect": True,
        "densities": [0.5, 0.5],
        "seed": 0,
    }
    assert [operand["source"] for operand in told["operands"]] == [base, a, b]


def test_parts_of_a_plan_are_what_they_say() -> None:
    kinds = {"task_arithmetic": TaskVectors, "ties": Trimmed, "dare": Dropped, "dare_ties": Dropped}
    for method, kind in kinds.items():
        x = expression([W], method=method, base=W)
        assert type(x).__name__ == kind.__name__
        title = method.replace("_", " ") if kind is TaskVectors else method
        assert x.summary() == f"{title} [1]·w"
    assert expression([W, W], method="slerp").summary() == "slerp(w, t=0.5)"


def test_other_vocabularies_are_left_out_by_the_selector_that_is_proposed() -> None:
    def made(rows: int) -> dict[str, Any]:
        shapes = {"embed.weight": (rows, 2), "my layer.w": (2,), "head.weight": (rows, 2), "fc.weight": (2, 2)}
        return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}

    with pytest.raises(MismatchError) as caught:
        tp.merge([made(5), made(6)])
    said = str(caught.value)
    assert "-s '~(embed.weight | head.weight)' merges only the others" in said
    selector = said.partition("-s '")[2].partition("'")[0]
    assert tp.of(tp.merge([made(5), made(6)], selector=selector)).names == ["my layer.w", "fc.weight"]
