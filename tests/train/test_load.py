"""Loading in place: compared with load_state_dict for each dtype, and what must not change."""

from __future__ import annotations

import json
import os
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import torchparams as tp
from torchparams.dtypes import DType
from torchparams.errors import (
    MismatchError,
    NoMatch,
    NotReadable,
    OptionError,
    SourceError,
    TruncatedFile,
    UnsupportedSource,
)
from torchparams.expressions.casts import Losses
from torchparams.train import _transfer
from torchparams.train.load import coverage, load

if TYPE_CHECKING:
    from pathlib import Path

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OTHERS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.bool, torch.uint8, torch.int16, torch.int64]


class Net(nn.Module):
    mask: torch.Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, dtype=dtype)
        self.norm = nn.BatchNorm2d(4, dtype=dtype)
        self.head = nn.Linear(4, 2, dtype=dtype)
        self.register_buffer("mask", torch.ones(2), persistent=False)


class Holder(nn.Module):
    """One parameter of any kind."""

    w: nn.Parameter

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(value, requires_grad=False)


def trained(model: Any) -> Any:
    """The same model, with values that tell its tensors apart."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))
    return model


def assert_same(model: nn.Module, other: nn.Module) -> None:
    theirs = other.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def source_of(model: nn.Module, kind: str, folder: Path) -> Any:
    state = model.state_dict()
    if kind == "safetensors":
        save_file(state, folder / "m.safetensors")
        return folder / "m.safetensors"
    if kind == "sharded":
        shards = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
        weight_map = {name: shards[i % 2] for i, name in enumerate(state)}
        for shard in shards:
            save_file({name: value for name, value in state.items() if weight_map[name] == shard}, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder
    if kind in ("zip", "legacy"):
        torch.save(state, folder / "m.pt", _use_new_zipfile_serialization=kind == "zip")
        return str(folder / "m.pt")
    if kind == "numpy":
        return {name: value.numpy() for name, value in state.items()}
    return {"mapping": state, "model": model, "table": tp.of(model, buffers=True)}[kind]


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "zip", "legacy", "numpy", "mapping", "model", "table"])
def test_every_source_fills_the_model(kind: str, tmp_path: Path) -> None:
    source, model = trained(Net()), Net()
    mask = model.mask
    found = load(model, source_of(source, kind, tmp_path))
    assert found.complete
    assert list(found.loaded) == [
        "conv.weight",
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
        "head.weight",
        "head.bias",
    ]
    assert_same(model, source)
    assert model.mask is mask
    assert model.mask.tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["safetensors", "zip", "mapping"])
def test_parameters_stay_the_objects_that_they_are(kind: str, tmp_path: Path) -> None:
    model = Net()
    model.conv.weight.requires_grad_(False)
    before = {name: (tensor, tensor.data_ptr(), tensor.requires_grad) for name, tensor in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    load(model, source_of(trained(Net()), kind, tmp_path))
    for name, tensor in model.named_parameters():
        was, address, requires_grad = before[name]
        assert tensor is was
        assert tensor.data_ptr() == address
        assert tensor.requires_grad == requires_grad
        assert tensor.is_leaf
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", [*FLOATS, *OTHERS], ids=str)
def test_every_dtype_comes_bit_by_bit(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    values = torch.randint(0, 2, (3, 5)).to(dtype)
    path = tmp_path / f"m{suffix}"
    if suffix == ".pt":
        torch.save({"w": values}, path)
    else:
        save_file({"w": values}, path)
    model = Holder(torch.zeros(3, 5, dtype=dtype))
    load(model, path)
    assert torch.equal(model.w.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", None])
@pytest.mark.parametrize("given", FLOATS, ids=str)
@pytest.mark.parametrize("wanted", FLOATS, ids=str)
def test_floats_are_cast_as_copy_does(
    given: torch.dtype, wanted: torch.dtype, suffix: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_transfer, "CAST_BYTES", 64)
    values = torch.randn(70, 5).to(given)
    values[0] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e-7]).to(given)
    x: Any = {"w": values, "odd": torch.zeros(1, dtype=torch.uint8)}
    if suffix is not None:
        x = tmp_path / f"m{suffix}"
        if suffix == ".pt":
            torch.save({"w": values}, x)
        else:
            save_file({"a": torch.zeros(3, dtype=torch.uint8), "w": values}, x)
    model = Holder(torch.zeros(70, 5, dtype=wanted))
    found = load(model, tp.of(x).select("w"))
    assert torch.equal(model.w.isnan(), values.isnan())
    assert torch.equal(model.w.nan_to_num(), values.to(wanted).nan_to_num())
    expected = {} if given == wanted else {"w": f"{given} → {wanted}".replace("torch.", "")}
    assert found.cast == expected


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (torch.float32, torch.int64),
        (torch.complex64, torch.float32),
        (torch.float32, torch.complex64),
        (torch.int64, torch.int32),
        (torch.int64, torch.float32),
        (torch.int8, torch.uint8),
        (torch.bool, torch.uint8),
    ],
)
def test_other_casts_are_mismatches(given: torch.dtype, wanted: torch.dtype) -> None:
    model = Holder(torch.ones(3, dtype=wanted))
    with pytest.raises(MismatchError) as caught:
        load(model, {"w": torch.zeros(3, dtype=given)})
    names = f"dtype {given}, not {wanted}".replace("torch.", "")
    assert str(caught.value) == (f"dict → Holder: 1 mismatched: 'w' ({names}). 0 tensors fit, and nothing was changed.")
    assert torch.equal(model.w, torch.ones(3, dtype=wanted))


@pytest.mark.parametrize(("given", "wanted"), [(torch.int8, torch.int32), (torch.uint8, torch.int16)])
def test_integers_are_cast_into_wider_ones(given: torch.dtype, wanted: torch.dtype) -> None:
    model = Holder(torch.ones(2, dtype=wanted))
    load(model, {"w": torch.tensor([1, 100]).to(given)})
    assert model.w.tolist() == [1, 100]


def test_no_cast_is_made_that_was_not_allowed() -> None:
    with pytest.raises(MismatchError, match="'w' \\(dtype float64, not float32\\)"):
        load(Holder(torch.zeros(2)), {"w": torch.zeros(2, dtype=torch.float64)}, cast=False)


def test_packed_floats_are_unpacked(tmp_path: Path) -> None:
    from torchparams.testing import MemorySource

    values = np.array([0.5, 1.0, -6.0], np.float32)
    dtype = DType.of("F4")
    model = Holder(torch.zeros(3, dtype=torch.bfloat16))
    load(model, MemorySource({"w": values.astype(dtype.numpy)}))
    assert model.w.tolist() == [0.5, 1.0, -6.0]
    header = b'{"w":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}'
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes([0x21, 0x43]))
    model = Holder(torch.zeros(4))
    load(model, path)
    assert model.w.tolist() == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("most", [1 << 20, 64])
def test_a_target_that_is_not_contiguous(
    dtype: torch.dtype, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_transfer, "BUFFER_BYTES", most)
    values = torch.randn(6, 3, 2, 2)
    save_file({"w": values}, tmp_path / "m.safetensors")
    model = Holder(torch.zeros(6, 3, 2, 2, dtype=dtype).to(memory_format=torch.channels_last))
    strides = model.w.stride()
    load(model, tmp_path / "m.safetensors")
    assert torch.equal(model.w, values.to(dtype))
    assert model.w.stride() == strides


def test_views_in_a_file_come_as_they_show(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    torch.save(
        {"a": base[:, ::2], "b": base.T, "c": base[1], "d": torch.zeros(1).expand(5), "e": base[0, 0]},
        tmp_path / "m.pt",
    )
    model = nn.ParameterDict(
        {"a": torch.zeros(4, 3), "b": torch.zeros(6, 4), "c": torch.zeros(6), "d": torch.ones(5), "e": torch.zeros(())}
    )
    load(model, tmp_path / "m.pt")
    assert torch.equal(model["a"], base[:, ::2])
    assert torch.equal(model["b"], base.T)
    assert torch.equal(model["c"], base[1])
    assert model["d"].tolist() == [0] * 5
    assert model["e"] == base[0, 0]


@pytest.mark.parametrize("kind", ["safetensors", "mapping"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_default_device_does_not_matter(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source, model = trained(Net()), Net(dtype)
    x = source_of(source, kind, tmp_path)
    with torch.device("meta"):
        load(model, x)
    assert_same(model, source.to(dtype))


def test_no_elements_and_scalars(tmp_path: Path) -> None:
    state = {"a": torch.zeros(0, 3), "b": torch.tensor(2.5), "c": torch.zeros(2, 0, dtype=torch.float64)}
    save_file(state, tmp_path / "m.safetensors")
    model = nn.ParameterDict({"a": torch.zeros(0, 3), "b": torch.tensor(0.0), "c": torch.zeros(2, 0)})
    found = load(model, tmp_path / "m.safetensors")
    assert found.complete
    assert model["b"].item() == 2.5


def test_large_tensors_are_read_in_parts_by_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transfer, "PIECE_BYTES", 128)
    monkeypatch.setattr(_transfer, "processors", lambda: 3)
    state = {f"p{i}": torch.randn(7 * i, 11) for i in range(9)}
    torch.save(state, tmp_path / "m.pt")
    model = nn.ParameterDict({name: torch.zeros_like(value) for name, value in state.items()})
    seen: list[tuple[int, int]] = []
    load(model, tmp_path / "m.pt", progress=lambda done, total: seen.append((done, total)))
    for name, value in state.items():
        assert torch.equal(model[name], value)
    total = sum(value.nbytes for value in state.values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


@pytest.mark.parametrize("most", [1, 3, 10_000])
def test_small_tensors_side_by_side_are_read_by_one_call(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    values = {f"p{i:03}": torch.arange(i % 4, dtype=torch.int16) + i for i in range(700)}
    save_file(values, path)
    calls: list[int] = []
    preadv = os.preadv

    def read(file: int, memories: list[memoryview], start: int) -> int:
        """As a system does that gives less than it is asked for: `most` bytes."""
        calls.append(len(memories))
        some, size = [], 0
        for memory in memories:
            some.append(memory[: most - size])
            size += len(some[-1])
            if size == most:
                break
        return preadv(file, some, start)

    monkeypatch.setattr(os, "preadv", read)
    model = nn.ParameterDict({n: nn.Parameter(torch.zeros_like(v), requires_grad=False) for n, v in values.items()})
    load(model, path)
    if most == 10_000:
        assert calls == [1, _transfer.VECTOR, 525 - _transfer.VECTOR]  # the header first
    assert all(torch.equal(model[name], value) for name, value in values.items())


def test_tensors_with_others_between_them_are_read_from_where_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    values = {f"p{i}": torch.full((i + 1,), float(i)) for i in range(20)}
    save_file(values, path)
    model = nn.ParameterDict({name: torch.zeros_like(value) for name, value in values.items()})
    load(model, path, [f"p{i}" for i in range(0, 20, 3)])
    for i in range(20):
        assert model[f"p{i}"].tolist() == [0.0 if i % 3 else i] * (i + 1)


def test_a_file_that_ends_within_one_of_many_small_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    values = {f"p{i}": torch.ones(2) for i in range(9)}
    save_file(values, path)
    size = path.stat().st_size
    model = nn.ParameterDict({name: torch.zeros_like(value) for name, value in values.items()})
    preadv = os.preadv

    def cut(file: int, memories: list[memoryview], start: int) -> int:
        if len(memories) > 1:  # the header is read alone
            os.truncate(path, size - 20)
        return preadv(file, memories, start)

    monkeypatch.setattr(os, "preadv", cut)
    with pytest.raises(TruncatedFile) as caught:
        load(model, path)
    assert str(caught.value) == (
        f"{path}: The file ends at byte {size - 20}, within the tensor 'p6'. It was longer when it was listed."
    )


def test_a_parameter_whose_memory_was_freed_is_a_mismatch() -> None:
    model = nn.Linear(3, 2)
    model.weight.untyped_storage().resize_(0)
    found = tp.coverage(model, {"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    assert found.mismatched["weight"].note == "the model's tensor has no memory: its storage was freed"
    assert list(found.loaded) == ["bias"]


def test_autograd_is_told() -> None:
    model = nn.Linear(2, 2)
    source = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    out = (model(torch.ones(1, 2, requires_grad=True)) ** 2).sum()
    load(model, source)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_autograd_is_told_of_what_is_read_from_a_file(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, tmp_path / "m.safetensors")
    model = nn.Linear(2, 2)
    out = (model(torch.ones(1, 2, requires_grad=True)) ** 2).sum()
    load(model, tmp_path / "m.safetensors")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    assert model.weight.grad is None or not model.weight.grad.isnan().any()


# --- what a cast loses ---------------------------------------------------------------------------


def lossy() -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([[1e5, -65520.0, float("inf")], [1e-9, 0.1, 0.5]])}


@pytest.mark.parametrize("kind", ["dict", ".safetensors", ".pt", "model"])
def test_overflow_is_refused_before_anything_changes(kind: str, tmp_path: Path) -> None:
    given: Any = lossy()
    if kind == "model":
        given = Holder(given["w"])
    elif kind != "dict":
        given = tmp_path / f"x{kind}"
        save_file(lossy(), given) if kind == ".safetensors" else torch.save(lossy(), given)
    model = Holder(torch.ones(2, 3, dtype=torch.float16))
    with pytest.raises(MismatchError) as caught:
        load(model, given, strict=False)
    assert str(caught.value).endswith(
        " → Holder: 2 values of 'w' are too large for float16. Nothing was changed. Load into a model of a wider "
        "dtype, or pass allow_overflow=True."
    )
    assert model.w.eq(1).all()
    found = load(model, given, allow_overflow=True)
    assert torch.equal(model.w, lossy()["w"].half())
    assert found.lost == {"w": Losses(2, 1, 4)}
    assert found.to_json()["loaded"][0]["lost"] == {"overflow": 2, "underflow": 1, "changed": 4}
    assert "float32 → float16; 2 overflow; 1 underflow; 4 changed" in str(found)
    assert load(Holder(torch.ones(2, 3, dtype=torch.float64)), given).lost == {}


def test_loss_of_precision_is_reported() -> None:
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    found = load(model, {"weight": torch.tensor([[1.0, 0.1], [0.5, 1.0 + 2**-8]]), "bias": torch.zeros(2)})
    assert found.lost == {"weight": Losses(0, 0, 2)}
    assert str(found) == (
        "dict → Linear\n"
        "what    name    from  note\n"
        "loaded  weight        float32 → bfloat16; 2 changed\n"
        "loaded  bias          float32 → bfloat16\n"
        "2 loaded (2 cast) · 0 missing · 0 unexpected · 0 mismatched"
    )
    assert coverage(model, {"weight": torch.full((2, 2), 0.1), "bias": torch.zeros(2)}).lost == {}
    worse = {"weight": torch.full((2, 2), 3.4e38), "bias": torch.tensor([3.4e38, 0.0])}
    with pytest.raises(
        MismatchError, match="4 values of 'weight' are too large for bfloat16, as are values of 1 other tensor"
    ):
        load(model, worse)


def test_overflow_leaves_a_meta_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Linear(1, 1, dtype=torch.float16)
    with pytest.raises(MismatchError, match="1 value of 'weight' is too large"):
        load(model, {"weight": torch.tensor([[1e6]]), "bias": torch.zeros(1)})
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("given", FLOATS)
@pytest.mark.parametrize("wanted", [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2])
def test_losses_are_those_of_torchs_cast(given: torch.dtype, wanted: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(2000, dtype=torch.float64).mul(10.0 ** torch.randint(-30, 3, (2000,))).to(given)
    values[:4] = torch.tensor([float("nan"), float("inf"), 0.0, -0.0], dtype=given)
    model = Holder(torch.zeros(2000, dtype=wanted))
    lost = load(model, {"w": values}, allow_overflow=True).lost.get("w", Losses())
    before, after = values.double(), model.w.double()
    assert lost.changed == int((before != after).sum()) - int((before.isnan() & after.isnan()).sum())
    assert lost.underflow == int(((before != 0) & (after == 0)).sum())
    assert lost.overflow == int((before.isfinite() & (before.abs() > torch.finfo(wanted).max)).sum())


def test_losses_of_complex_numbers() -> None:
    model = Holder(torch.zeros(2, dtype=torch.complex64))
    given = torch.tensor([1e300 + 1j, 0.1 + 0.5j], dtype=torch.complex128)
    with pytest.raises(MismatchError, match="too large for complex64"):
        load(model, {"w": given})
    assert load(model, {"w": given}, allow_overflow=True).lost == {"w": Losses(1, 0, 2)}


def test_nothing_is_cast_to_the_type_of_block_scales() -> None:
    model = Holder(torch.ones(2).to(torch.float8_e8m0fnu))
    with pytest.raises(MismatchError, match="dtype float32, not float8_e8m0fnu"):
        load(model, {"w": torch.tensor([-3.0, 0.0])})


# --- batch norms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".pt"])
def test_a_state_without_counters_of_batches_is_complete(suffix: str, tmp_path: Path) -> None:
    model: Any = trained(Net())
    state: Any = {name: tensor for name, tensor in trained(Net()).state_dict().items() if "batches" not in name}
    assert not nn.Module.load_state_dict(Net(), state).missing_keys
    if suffix:
        path = tmp_path / f"x{suffix}"
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        state = path
    model.norm.num_batches_tracked.fill_(5)
    found = load(model, state)
    assert found.complete and int(model.norm.num_batches_tracked) == 5
    assert found.notes == ("missing, as torch allows: norm.num_batches_tracked",)
    with torch.device("meta"):
        empty: Any = Net()
    found = load(empty, state)
    assert int(empty.norm.num_batches_tracked) == 0 and "num_batches" not in "".join(found.notes[1:])
    assert load(Net(), state, "norm.**").complete


def test_other_buffers_of_that_name_are_missing() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.register_buffer("num_batches_tracked", torch.tensor(0))

    assert list(coverage(Counts(), {"weight": torch.zeros(1)}).missing) == ["num_batches_tracked"]


# --- meta and lazy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "mapping"])
def test_a_model_on_the_meta_device_gets_memory_and_keeps_its_parameters(kind: str, tmp_path: Path) -> None:
    source = trained(Net())
    with torch.device("meta"):
        model = Net()
    model.head.weight.requires_grad_(False)
    model.head.bias.tag = "kept"  # type: ignore[attr-defined]  # an attribute of the user's
    objects = dict(model.named_parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = load(model, source_of(source, kind, tmp_path))
    assert_same(model, source)
    for name, parameter in model.named_parameters():
        assert parameter is objects[name]
        assert parameter.device.type == "cpu"
    assert not model.head.weight.requires_grad
    assert model.head.bias.tag == "kept"  # type: ignore[attr-defined]  # as above
    assert found.notes == ("still on the meta device: mask; they were not loaded, and have no values",)
    model.mask = torch.ones(2)
    model.head(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.head.bias, source.head.bias)


def test_ties_on_the_meta_device_stay() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Embedding(3, 2), "b": nn.Linear(2, 3, bias=False)})
        model["b"].weight = model["a"].weight
    load(model, {"a.weight": torch.ones(3, 2)})
    assert model["a"].weight is model["b"].weight
    assert model["b"].get_parameter("weight").tolist() == [[1, 1]] * 3


def test_memory_is_given_to_all_or_none() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lazy = nn.LazyLinear(2)
            self.fc = nn.Linear(2, 3)
            self.lstm = nn.LSTM(3, 3)

    given: Any = nn.ModuleDict({"lazy": nn.Linear(4, 2), "fc": nn.Linear(2, 3), "lstm": nn.LSTM(3, 3)})
    with torch.device("meta"):
        model = Net()
    with pytest.raises(NotReadable, match=r"lstm\.weight_ih_l0' cannot be moved"):
        load(model, given)
    assert all(p.is_meta for p in model.parameters())
    assert isinstance(model.lazy.weight, nn.UninitializedParameter)
    with pytest.raises(OptionError, match="device='meta' has no memory"):
        load(model, given, "fc.**", device="meta")
    load(model, given, "fc.** | lazy.**")
    assert torch.equal(model.fc.weight, given["fc"].weight)
    assert torch.equal(model.lazy.weight, given["lazy"].weight)


def test_a_tensor_on_the_meta_device_that_something_refers_to_weakly() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 1)
    here = weakref.ref(model.weight)
    with pytest.raises(NotReadable) as caught:
        load(model, {"weight": torch.ones(1, 2), "bias": torch.ones(1)})
    assert str(caught.value).startswith("Linear: 'weight' cannot be moved from the meta device: Cannot swap t1 because")
    assert str(caught.value).endswith("Call model.to_empty(device='cpu') first, before an optimizer is made.")
    assert here() is model.weight


def test_lazy_parameters_take_the_shape_of_what_is_loaded() -> None:
    model = nn.LazyLinear(2)
    weight = model.weight
    load(model, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    assert model.weight is weight
    assert model(torch.ones(1, 3)).tolist() == [[3, 3]]


def test_values_on_the_meta_device_are_none() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(MismatchError, match="'weight' \\(it is on the meta device, which holds no values\\)"):
        load(model, {"weight": torch.zeros(1, 2, device="meta"), "bias": torch.zeros(1)})


# --- one model's parameters exchanged --------------------------------------------------------------


def test_a_model_from_itself() -> None:
    model = trained(Net())
    copy = {name: value.clone() for name, value in model.state_dict().items()}
    load(model, model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, copy[name])


@pytest.mark.parametrize("numpy", [False, True])
def test_parameters_of_one_model_can_be_exchanged(numpy: bool) -> None:
    model = nn.ParameterDict({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])})
    x: dict[str, Any] = {"a": model["b"].detach(), "b": model["a"].detach()}
    load(model, {name: value.numpy() for name, value in x.items()} if numpy else x)
    assert model["a"].tolist() == [3, 4]
    assert model["b"].tolist() == [1, 2]


def test_views_of_one_memory_can_be_exchanged() -> None:
    memory = torch.arange(6.0)
    model = nn.ParameterDict({"a": nn.Parameter(memory[:3]), "b": nn.Parameter(memory[3:])})
    load(model, {"a": memory[1:4], "b": memory.numpy()[0:3]})
    assert memory.tolist() == [1, 2, 3, 0, 1, 2]


# --- errors ----------------------------------------------------------------------------------------


def test_nothing_changes_when_something_does_not_fit(tmp_path: Path) -> None:
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = trained(Net()).state_dict()
    state["head.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(MismatchError) as caught:
        load(model, tmp_path / "m.safetensors")
    assert str(caught.value) == (
        f"{tmp_path}/m.safetensors → Net: 1 mismatched: 'head.bias' (shape [3], not [2]). "
        "8 tensors fit, and nothing was changed. strict=False loads what fits."
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_error_on_the_way_says_what_was_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(1000), "b": torch.ones(2000)}, path)
    model = nn.ParameterDict({"a": torch.zeros(1000), "b": torch.zeros(2000)})

    def cut(done: int, total: int) -> None:
        with open(path, "r+b") as file:
            file.truncate(6000)

    monkeypatch.setattr(_transfer, "processors", lambda: 1)
    monkeypatch.setattr(_transfer, "PIECE_BYTES", 4000)
    with pytest.raises(TruncatedFile) as caught:
        load(model, path, progress=cut)
    assert str(caught.value) == (
        f"{path}: The file ends at byte 6000, within the tensor 'b'. It was longer when it was listed."
    )
    assert caught.value.__notes__ == [
        "the model is partly loaded: 1 tensor of 2 holds the new values; these hold old ones, or some of both: b"
    ]
    assert model["a"].tolist() == [1] * 1000


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_table_of_a_file_that_was_written_to_since(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    save = (lambda state: torch.save(state, path)) if suffix == ".pt" else (lambda state: save_file(state, path))
    save({"w": torch.ones(3)})
    source = tp.of(path)
    save({"a": torch.zeros(5), "w": torch.ones(3)})
    with torch.device("meta"):
        model = Holder(torch.zeros(3))
    with pytest.raises(SourceError) as caught:
        load(model, source)
    assert str(caught.value) == (f"{path}: The file changed after it was listed. Open the file again.")
    assert model.w.is_meta


def test_only_a_live_model_can_be_loaded_into() -> None:
    with pytest.raises(UnsupportedSource) as caught:
        load({"w": torch.zeros(1)}, nn.Linear(1, 1))
    assert str(caught.value) == (
        "dict: torchparams.load needs a live model, not a mapping. Pass the nn.Module, or a Parameters of it."
    )


def test_a_selector_that_hits_nothing() -> None:
    with pytest.raises(NoMatch):
        load(nn.Linear(1, 1), {"weight": torch.zeros(1, 1)}, "heads.**")


def test_sparse_expanded_and_wrapped_tensors_are_mismatches(tmp_path: Path) -> None:
    model = nn.ParameterDict({"a": torch.zeros(2), "b": torch.zeros(2)})
    torch.save({"a": torch.zeros(2).to_sparse(), "b": torch.zeros(2)}, tmp_path / "m.pt")
    found = tp.coverage(model, tmp_path / "m.pt")
    assert found.mismatched["a"].note == "it is sparse or quantised, which load does not read from a file"
    found = tp.coverage(model, {"a": torch.zeros(2).to_sparse(), "b": torch.zeros(2)})
    assert found.mismatched["a"].note == "it is sparse (torch.sparse_coo)"
    two: torch.Tensor = TwoTensor(torch.zeros(2), torch.zeros(2))  # type: ignore[no-untyped-call]  # torch's omission
    wrapped = nn.ParameterDict({"a": two, "b": torch.zeros(2)})
    found = tp.coverage(wrapped, {"a": torch.zeros(2), "b": torch.zeros(2)})
    assert found.mismatched["a"].note == "the model's tensor: a TwoTensor keeps its values in other tensors"
    found = tp.coverage(model, wrapped)
    assert found.mismatched["a"].note == "a TwoTensor keeps its values in other tensors"
    expanded = Holder(torch.zeros(1).expand(3))
    found = tp.coverage(expanded, {"w": torch.zeros(3)})
    assert found.mismatched["w"].note == "the model's tensor is expanded: several elements share one memory location"
