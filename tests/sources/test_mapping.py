"""Mappings of tensors and arrays."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import OrderedDict, UserDict, defaultdict
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import torchparams as tp
from torchparams import limits
from torchparams.errors import LimitExceeded, NotReadable, SourceError, UnknownName, UnsupportedSource
from torchparams.sources.mapping import MappingSource
from torchparams.testing import TORCH_DTYPES, Array, SourceTests, assert_identical, sample, to_torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class TestArrays(SourceTests):
    ties = strides = metadata = True
    device = "cpu"

    def make(
        self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
    ) -> MappingSource:
        return MappingSource({**tensors, **(metadata or {})})


class TestTensors(SourceTests):
    dtypes = TORCH_DTYPES
    ties = strides = metadata = True
    device = "cpu"

    def make(
        self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
    ) -> MappingSource:
        made = {id(array): to_torch(array) for array in tensors.values()}
        return MappingSource({**{name: made[id(array)] for name, array in tensors.items()}, **(metadata or {})})


class TestNested(SourceTests):
    """Every tensor in a mapping of its own."""

    names = ("a", "a b", "é", "0")
    ties = strides = True
    device = "cpu"

    def make(
        self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
    ) -> MappingSource:
        root: dict[str, Any] = {}
        for name, array in tensors.items():
            *parts, last = name.split(".")
            here = root
            for part in parts:
                here = here.setdefault(part, {})
            here[last] = array
        return MappingSource(root)

    # Here the order is that of the tree.
    order = False


# --- what is in it ---------------------------------------------------------------------------


def test_the_very_objects() -> None:
    w, b = nn.Parameter(torch.ones(2, 3)), np.zeros(3)
    params = tp.of({"w": w, "b": b})
    assert params["w"] is w
    assert params["b"] is b
    assert [id(value) for value in params.values()] == [id(w), id(b)]
    info = params.info("w")
    assert (info.kind, info.requires_grad, info.device) == ("parameter", True, "cpu")
    assert (params.info("b").kind, params.info("b").requires_grad) == ("tensor", None)


def test_it_is_read_anew() -> None:
    weights: dict[str, Any] = {"a": torch.ones(2)}
    params = tp.of(weights)
    assert params.source.live
    assert params.names == ["a"]
    weights["b"] = torch.ones(3)
    assert params.names == ["a", "b"]
    weights["a"] = torch.zeros(5)
    assert params.info("a").shape == (5,)
    assert params["a"] is weights["a"]
    del weights["a"]
    assert "a" not in params
    with pytest.raises(UnknownName, match="dict: No parameter is named 'a'"):
        params["a"]
    weights["b"] = "gone"
    assert params.names == []
    assert dict(params.metadata) == {"b": "gone"}


def test_nested_mappings() -> None:
    params = tp.of(
        {
            "epoch": 3,
            "loss": np.float64(0.5),
            "model": OrderedDict(w=torch.ones(1), inner=UserDict({"b": np.ones(2)})),
            "history": [{"loss": 1.0}, {"loss": 0.5}],
            "list": [torch.ones(3), "note", (np.ones(4),)],
            "empty": {},
        }
    )
    assert params.names == ["model.w", "model.inner.b", "list.0", "list.2.0"]
    assert dict(params.metadata) == {
        "epoch": 3,
        "loss": np.float64(0.5),
        "history": [{"loss": 1.0}, {"loss": 0.5}],
        "list.1": "note",
        "empty": {},
    }
    assert params["model.inner.b"].shape == (2,)
    assert params["list.2.0"].shape == (4,)
    assert "list.3" not in params


def test_a_mapping_of_nothing_else() -> None:
    params = tp.of({"config": {"a": [1, {"b": 2}]}})
    assert params.names == []
    assert dict(params.metadata) == {"config": {"a": [1, {"b": 2}]}}


def test_the_state_of_an_optimizer() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    params = tp.of(optimizer.state_dict())
    assert params.names == [f"state.{i}.{key}" for i in (0, 1) for key in ("step", "exp_avg", "exp_avg_sq")]
    assert params["state.0.exp_avg"] is optimizer.state_dict()["state"][0]["exp_avg"]
    assert params.info("state.1.exp_avg").shape == (2,)
    assert params.metadata["param_groups"][0]["params"] == [0, 1]


def test_the_state_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    params = tp.of(model.state_dict())
    assert params.names == list(model.state_dict())
    assert params.info("1.num_batches_tracked").shape == ()
    assert params.info("1.num_batches_tracked").dtype == "int64"


def test_missing_keys_are_not_made() -> None:
    weights: defaultdict[str, Any] = defaultdict(lambda: torch.ones(1), a=torch.ones(2))
    params = tp.of(weights)
    assert "b" not in params
    assert params.get("b") is None
    assert list(weights) == ["a"]


def test_any_mapping() -> None:
    assert tp.of(MappingProxyType({"a": np.ones(1)})).names == ["a"]
    assert tp.of(MappingProxyType({"a": np.ones(1)})).source.label == "mappingproxy"


def test_an_archive_of_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", w=np.arange(3), b=np.ones((2, 2)))
    with np.load(tmp_path / "a.npz") as archive:
        params = tp.of(archive)
        assert params.names == ["w", "b"]
        assert params.numpy("w").tolist() == [0, 1, 2]


# --- ties and memory -------------------------------------------------------------------------


def test_the_same_memory_is_one_tensor() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    params = tp.of(
        {
            "w": base,
            "same": base.detach(),
            "view": base.view(3, 4),
            "array": base.numpy(),
            "other": base.t(),
            "part": base[1],
        }
    )
    assert params.names == ["w", "other", "part"]
    assert params.info("w").aliases == ("same", "view", "array")
    assert params.info("array").name == "w"
    storages = [params.info(name).storage for name in params]
    assert len({storage.key for storage in storages if storage}) == 1
    assert [(s.offset, s.stride, s.nbytes) for s in storages if s] == [(0, (4, 1), 48), (0, (1, 4), 48), (4, (1,), 48)]


def test_tied_weights_in_a_state_dict() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    params = tp.of(model.state_dict())
    assert params.names == ["embed.weight"]
    assert params.info("head.weight").aliases == ("head.weight",)
    assert params.numel == 15


def test_equal_or_empty_tensors_are_not_tied() -> None:
    empty = np.zeros((0, 3))
    params = tp.of(
        {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(0), "d": torch.ones(0), "e": empty, "f": empty}
    )
    assert params.names == ["a", "b", "c", "d", "e"]
    assert params.info("e").aliases == ("f",)


def test_the_same_bytes_of_another_type_are_not_tied() -> None:
    bits = np.arange(4, dtype=np.int32)
    params = tp.of({"i": bits, "f": bits.view(np.float32), "m": torch.from_numpy(bits), "swapped": bits.view(">i4")})
    assert params.names == ["i", "f", "swapped"]
    assert params.info("i").aliases == ("m",)


def test_views_of_arrays() -> None:
    base = np.arange(24.0).reshape(4, 6)
    params = tp.of(
        {"reverse": base[::-1], "part": base[1:, ::2], "odd": np.frombuffer(b"x" * 9, np.uint8)[1:].view(np.int64)}
    )
    storage = params.info("reverse").storage
    assert storage is not None
    assert (storage.offset, storage.stride, storage.nbytes) == (18, (-6, 1), 192)
    part = params.info("part").storage
    assert part is not None
    assert (part.key, part.offset, part.stride) == (storage.key, 6, (6, 2))
    assert params.info("odd").storage is None  # it starts within an element
    assert_identical(params.numpy("reverse"), np.ascontiguousarray(base[::-1]))
    assert params.source.tensor("reverse").tolist() == base[::-1].tolist()


# --- values ----------------------------------------------------------------------------------


def test_the_other_byte_order() -> None:
    array = sample("int32", (2, 3))
    params = tp.of({"a": array.astype(">i4")})
    assert params.info("a").dtype == "int32"
    assert_identical(params.numpy("a"), array)
    assert params.source.tensor("a").numpy().tobytes() == array.tobytes()


def test_arrays_are_shown_and_not_handed_over() -> None:
    array, tensor = np.ones(3), torch.ones(3)
    params = tp.of({"a": array, "t": tensor})
    for name in params:
        with pytest.raises(ValueError, match="read-only"):
            params.numpy(name)[0] = 2
    assert np.shares_memory(params.numpy("a"), array)
    assert not np.shares_memory(params.numpy("t"), tensor.numpy())  # whoever frees the tensor's memory leaves the copy
    assert array.flags.writeable
    assert params.source.tensor("a").data_ptr() == array.ctypes.data
    assert params.source.tensor("t").data_ptr() == tensor.data_ptr()


def test_zero_dimensions() -> None:
    params = tp.of({"a": np.array(2.5), "b": np.array(1, ml_dtypes.bfloat16), "c": torch.tensor(3)})
    assert [info.shape for info in params.infos.values()] == [(), (), ()]
    assert params.numpy("a") == 2.5


def test_tensors_without_values() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what it will drop; checkpoints will still hold it
        quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint32)
    params = tp.of(
        {
            "meta": torch.empty(2, 3, device="meta"),
            "lazy": nn.LazyLinear(3).weight,
            "sparse": torch.eye(3).to_sparse(),
            "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "quantised": quantised,
            "conj": torch.ones(2, dtype=torch.complex64).conj(),
        }
    )
    assert params.info("meta").device == "meta"
    assert params.info("meta").nbytes == 24
    assert params.info("lazy").shape is None
    assert params.info("sparse").storage is None
    assert params.numpy("conj").tolist() == [1, 1]
    repr(params)
    for name in ("meta", "lazy", "sparse", "nested", "quantised"):
        with pytest.raises(NotReadable, match=f"^dict: '{name}': "):
            params.numpy(name)


def test_two_meta_tensors_are_two() -> None:
    first = torch.empty(2, device="meta")
    params = tp.of({"a": first, "b": torch.empty(2, device="meta"), "c": first})
    assert params.names == ["a", "b"]
    assert params.info("a").aliases == ("c",)
    a, b = (params.info(name).storage for name in "ab")
    assert a is not None
    assert b is not None
    assert a.key != b.key


def test_tensors_of_a_class_that_dispatches() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(2, 3)
    params = tp.of({"a": fake, "b": fake})
    assert params.names == ["a"]
    assert params.info("a").shape == (2, 3)
    assert params.info("a").storage is None


# --- what cannot be listed -------------------------------------------------------------------


def test_a_class_is_no_model() -> None:
    with pytest.raises(UnsupportedSource, match=r"That is a class: make a model of it, Linear\(…\)\.$"):
        tp.of(torch.nn.Linear)


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.array([1, "x"], object), "object"),
        (np.array(["a", "bc"]), "<U2"),
        (np.zeros(2, [("x", "f4"), ("y", "i4")]), "[('x', '<f4'), ('y', '<i4')]"),
        (np.zeros(2, "M8[s]"), "datetime64[s]"),
    ],
)
def test_arrays_that_no_tensor_can_hold(array: Array, dtype: str) -> None:
    with pytest.raises(UnsupportedSource) as caught:
        list(tp.of({"w": np.ones(2), "model": {"names": array}}))
    assert str(caught.value) == (
        f"dict: The entry 'model.names' is an array of {dtype}, which no tensor can hold. Leave it out, or convert it."
    )


def test_a_module_is_no_mapping() -> None:
    with pytest.raises(UnsupportedSource) as caught:
        list(tp.of({"encoder": nn.Linear(2, 2)}))
    assert str(caught.value) == (
        "dict: The entry 'encoder' is a module, a Linear. Pass its state_dict(), or the module itself."
    )


def test_two_tensors_with_one_name() -> None:
    for mapping in ({"a.b": np.ones(1), "a": {"b": np.ones(2)}}, {"0": np.ones(1), 0: np.ones(2)}):
        with pytest.raises(
            SourceError, match=r"^dict: Two tensors have the name '(a.b|0)' when keys are joined with dots"
        ):
            list(tp.of(mapping))


def test_a_mapping_that_holds_itself() -> None:
    mapping: dict[str, Any] = {"a": {"w": np.ones(1)}}
    mapping["a"]["again"] = mapping
    with pytest.raises(SourceError, match=r"^dict: The mapping contains itself, at 'a\.again'"):
        list(tp.of(mapping))


def test_a_mapping_that_is_deep() -> None:
    mapping: dict[str, Any] = {"w": np.ones(1)}
    for _ in range(limits.NESTING - 1):
        mapping = {"a": mapping}
    assert tp.of(mapping).names == ["a." * (limits.NESTING - 1) + "w"]
    with pytest.raises(LimitExceeded, match="is nested deeper than 1,000 levels"):
        list(tp.of({"a": mapping}))


def test_a_mapping_that_is_shared_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ALIASES", 100)
    mapping: dict[str, Any] = {"w": np.ones(1)}
    for _ in range(40):
        mapping = {"a": mapping, "b": mapping}
    with pytest.raises(LimitExceeded, match="Shared mappings give it too many names"):
        list(tp.of(mapping))


def test_what_is_no_source() -> None:
    for thing in (3, None, [torch.ones(1)], SimpleNamespace()):
        with pytest.raises(UnsupportedSource):
            tp.of(thing)


# --- as a source -----------------------------------------------------------------------------


def test_selections_of_one_mapping_combine() -> None:
    weights = {"a": np.ones(1), "b": np.ones((2, 2))}
    assert MappingSource(weights) == MappingSource(weights)
    assert MappingSource(weights) != MappingSource(dict(weights))
    assert (tp.of(weights).filter(lambda i: i.ndim == 1) | tp.of(weights).filter(lambda i: i.ndim == 2)).names == [
        "a",
        "b",
    ]


def test_one_name_is_found_without_a_look_at_the_others() -> None:
    class Counted(dict[str, Any]):
        walks = 0

        def items(self) -> Any:
            Counted.walks += 1
            return super().items()

    weights = Counted({f"layer.{i}": np.ones(1) for i in range(50)})
    params = tp.of(weights)
    for name in params:
        assert params[name] is weights[name]
        assert name in params
    assert Counted.walks <= 2


def test_arrays_do_not_import_torch() -> None:
    program = (
        "import sys, numpy as np, torchparams as tp; p = tp.of({'a': np.ones(2)}); "
        "print(p, p.numpy('a'), p['a'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("False")


def test_a_state_dict_says_nothing_of_what_is_trainable() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    table = tp.of(model.state_dict())
    assert {info.requires_grad for info in table.infos.values()} == {None}
    assert "trainable" not in str(table)
    with pytest.raises(tp.errors.SelectorError, match="requires_grad is not recorded"):
        table.select(":trainable")
    model[0].requires_grad_(False)
    for told in (dict(model.named_parameters()), model.state_dict(keep_vars=True)):
        assert tp.of(told).select(":frozen").names == ["0.weight", "0.bias"]
    assert tp.of({"w": torch.ones(2, requires_grad=True)}).info("w").requires_grad is True
