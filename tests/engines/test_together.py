"""Small tensors that are read and measured together."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import torchparams as tp
from torchparams.dtypes import DType
from torchparams.engines import Job, ThreadEngine, jobs_of
from torchparams.errors import TruncatedFile
from torchparams.io.live import address_of
from torchparams.measure.columns import Rows
from torchparams.measure.stats import Stats, StatsTask
from torchparams.sketch import batch, native
from torchparams.sources.live.module import ModuleSource
from torchparams.sources.live.traverse import list_tensors
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from pathlib import Path

ENGINES = {
    "one thread": lambda: ThreadEngine(1),
    "two threads": lambda: ThreadEngine(2, block_bytes=1 << 12, part_bytes=1 << 16),
    "mapped": lambda: ThreadEngine(2, mapped=True),
}


def mixture() -> dict[str, np.ndarray[Any, Any]]:
    """Small tensors of many types, large ones between them, and empty ones."""
    numbers = np.random.default_rng(0)
    found: dict[str, np.ndarray[Any, Any]] = {}
    types = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "int64", "int32", "uint8", "bool")
    for i in range(400):
        shape = (int(numbers.integers(0, 40)), int(numbers.integers(0, 12)))
        with np.errstate(invalid="ignore"):
            found[f"layers.{i}.w"] = (numbers.standard_normal(shape) * 3).astype(DType.of(types[i % 9]).numpy)
    found["scalar"] = np.array(2.5, np.float32)
    found["layers.7.large"] = numbers.standard_normal((300, 300)).astype(np.float32)
    found["layers.100.odd"] = np.array([[1, np.nan], [np.inf, -np.inf]], np.float32)
    return found


def one_by_one(monkeypatch: pytest.MonkeyPatch, x: object, **options: Any) -> Stats:
    """Statistics without the kernel for many."""
    with monkeypatch.context() as patch:
        patch.setattr(batch, "takes", lambda dtype, numel: False)
        return tp.stats(x, **options)


@pytest.mark.parametrize("make", ENGINES.values(), ids=list(ENGINES))
def test_statistics_are_those_that_are_taken_one_by_one(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes(mixture()))
    expected = one_by_one(monkeypatch, str(path), quantiles=[0.1, 0.5])
    found = tp.stats(str(path), quantiles=[0.1, 0.5], engine=make())
    assert str(found) == str(expected)
    assert found.to_json() == expected.to_json()
    assert found.rows == expected.rows and found.flags == expected.flags
    assert tp.stats(str(path), quantiles=[]).rows[3].quantiles == ()
    assert found.sorted("-numel").rows[0].name == "layers.7.large"


def test_arrays_and_tensors_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = mixture()
    state: dict[str, Any] = {name: torch.randn(7, 3, dtype=torch.float64).to(torch.bfloat16) for name in "ab"}
    state |= {"turned": torch.randn(4, 5).t(), "part": torch.randn(9)[2:5], "grad": torch.ones(3, requires_grad=True)}
    state |= {"conjugate": torch.randn(3, dtype=torch.complex64).conj(), "negative": torch.randn(2, dtype=torch.cfloat)}
    state |= {"imaginary": torch.randn(3, dtype=torch.complex64).conj().imag, "wide": torch.ones(1).expand(4)}
    state |= {
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "big": np.arange(3, dtype=">i4"),
    }
    for x in (arrays, state):
        assert tp.stats(x).to_json() == one_by_one(monkeypatch, x).to_json()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5)) for _ in range(20))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.turned = nn.Parameter(torch.randn(3, 4).t())


def test_a_model_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    found = tp.stats(model, buffers=True)
    assert found.to_json() == one_by_one(monkeypatch, model, buffers=True).to_json()
    state = model.state_dict(keep_vars=True)
    assert all(tensor.untyped_storage().resizable() for tensor in state.values())
    with torch.no_grad():
        model.get_parameter("layers.3.0.weight").fill_(7)
    assert tp.stats(model)["layers.3.0.weight"].mean == 7  # read anew, not remembered
    assert found["layers.3.0.weight"].mean != 7


@pytest.mark.parametrize("buffers", [False, True])
def test_a_model_is_read_once(buffers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3) if buffers else nn.ReLU())
    listed: list[nn.Module] = []

    def counting(root: nn.Module, *more: bool) -> Any:
        listed.append(root)
        return list_tensors(root, *more)

    monkeypatch.setattr("torchparams.sources.live.tensors.list_tensors", counting)
    monkeypatch.setattr(ModuleSource, "value", lambda source, name: pytest.fail(f"{name} is looked up"))
    assert len(tp.stats(model, buffers=buffers)) == (7 if buffers else 2)
    assert len(listed) == 1


def test_scales_may_be_buffers_that_are_not_listed() -> None:
    coded = nn.Module()
    coded.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    coded.register_buffer("weight_scale", torch.ones(2))
    assert [each.name for each in tp.stats(coded).unread] == ["weight"]


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    model.layers[0].forward(torch.ones(2, 4)).sum().backward()
    gradients = tp.gradients(model)
    assert len(tp.stats(gradients)) == 4
    assert tp.stats(gradients).to_json() == one_by_one(monkeypatch, gradients).to_json()


def test_addresses_are_of_plain_contiguous_memory_alone() -> None:
    f32 = DType.of("float32")
    plain = torch.randn(6)
    assert address_of(plain, f32, 6) == plain.data_ptr()
    assert address_of(nn.Parameter(plain), f32, 6) == plain.data_ptr()
    assert address_of(plain[2:], f32, 4) == plain.data_ptr() + 8
    assert address_of(torch.ones(0), f32, 0) == 0
    array = np.ones(3, np.float32)
    assert address_of(array, f32, 3) == array.__array_interface__["data"][0]

    class Own(torch.Tensor):
        pass

    others: list[Any] = [plain.double(), plain[::2], plain[:5], torch.ones(6, device="meta"), torch.ones(6).to_sparse()]
    others += [
        plain.as_subclass(Own),
        np.ones(6),
        np.ones(12, np.float32)[::2],
        np.ones(6, ">f4"),
        plain.view(2, 3).t(),
    ]
    assert [address_of(other, f32, 6) for other in others] == [None] * len(others)

    def within(row: torch.Tensor) -> torch.Tensor:
        assert address_of(row, f32, 3) is None
        return row

    torch.func.vmap(within)(torch.ones(2, 3))


def test_freed_memory_is_not_read() -> None:
    freed = nn.Parameter(torch.ones(4))
    freed.untyped_storage().resize_(0)
    model = nn.ParameterDict({"a": nn.Parameter(torch.ones(4)), "freed": freed})
    assert address_of(freed, DType.of("float32"), 4) is None
    found = tp.stats(model)
    assert [row.name for row in found] == ["a"]
    assert [(each.name, each.reason.split(",")[0]) for each in found.unread] == [("freed", "its memory was freed")]


@pytest.mark.parametrize("make", ENGINES.values(), ids=list(ENGINES))
def test_a_file_that_was_cut_names_the_tensor(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    content = safetensors_bytes({f"{i:03}": np.ones(100, np.float32) for i in range(200)})
    path.write_bytes(content)
    params = tp.of(str(path))
    with open(path, "r+b") as file:
        file.truncate(len(content) - 400 * 100 - 8)
    monkeypatch.setattr(params.source, "check_unchanged", lambda: None)  # it is cut while it is read
    with pytest.raises(TruncatedFile, match="within the tensor '099'"):
        list(make().run([Job.of((params.source, name)) for name in params], StatsTask([0.5])))


def test_progress_and_leaving_early(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes({f"{i}": np.ones(1000, np.float32) for i in range(3000)}))
    seen: list[tuple[int, int]] = []
    tp.stats(str(path), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12_000_000, 12_000_000)
    source = tp.of(str(path)).source
    run = ThreadEngine(2).run(jobs_of(source), StatsTask([0.5]))
    assert next(iter(run)).job.key in source.infos()
    run.close()  # type: ignore[attr-defined]  # a generator


def test_rows_are_made_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {f"layers.{i}.w": np.random.default_rng(i).standard_normal((4, 4)).astype(np.float32) for i in range(50)}
    weights["zero"] = np.zeros((3, 3), np.float32)
    found = tp.stats(weights)
    assert isinstance(found.rows, Rows) and (found.rows._made is None) is native.uses_c()
    assert [flag.name for flag in found.flags] == ["zero"]
    assert found.rows == tuple(found) and tuple(found) == found.rows and hash(found.rows) == hash(tuple(found))
    assert found.rows[:2] == tuple(found)[:2] and found.rows[-1].name == "zero"
    assert repr(found.rows) == repr(tuple(found))
    assert pickle.loads(pickle.dumps(found.rows)) == found.rows
