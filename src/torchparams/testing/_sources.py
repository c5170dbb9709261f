"""Contract of sources, as tests."""

from __future__ import annotations

import copy
import json
import math
import pickle
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import torchparams as tp
from torchparams.dtypes import DType
from torchparams.errors import NotReadable, UnknownName
from torchparams.info import ParameterInfo
from torchparams.testing._files import FileTests
from torchparams.testing._inputs import big_between, few, folder, limited
from torchparams.testing._reference import (
    NUMPY_DTYPES,
    TORCH_DTYPES,
    Array,
    assert_identical,
    sample,
    tensor_bytes,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torchparams.sources.base import Source


class SourceTests(FileTests):
    """Contract of `torchparams.sources.base.Source`, as tests.

    Subclass it in a test module, under a name that starts with `Test`, write `make`, and set the attributes that
    differ. No test can be turned off: an attribute declares what the source supports, and both answers are tested.

    Attributes:
        dtypes: Supported dtypes, in torch's spelling.
        torch_dtypes: Dtypes that `Source.tensor` supports.
        names: Supported names, besides plain ones.
        order: Whether the listing keeps the order of the mapping. If not, only the set of names is compared.
        ties: Whether one array under two names is one entry with an alias, instead of two entries.
        strides: Whether the `storage` of infos keeps strides and shared memory.
        spans: Whether `span` knows the bytes of a contiguous tensor.
        located: Whether infos know them too; False for sources that find them only when values are read.
        metadata: Whether `make` can store metadata (text by name).
        kind, device, requires_grad: Expected values in the infos.

    >>> from torchparams.testing import MemorySource, SourceTests
    >>> class TestMemory(SourceTests):
    ...     ties = metadata = True
    ...     device = "cpu"
    ...
    ...     def make(self, folder, tensors, metadata=None):
    ...         return MemorySource(tensors, metadata)
    """

    dtypes: tuple[str, ...] = NUMPY_DTYPES
    torch_dtypes: tuple[str, ...] = TORCH_DTYPES
    names: tuple[str, ...] = ("", ".", "a..b", "a b", "a/b", "#a", "ü", "重み", "a\nb", 'a"b\\', "module.a", "*", "0")
    order: bool = True
    ties: bool = False
    strides: bool = False
    spans: bool = False
    metadata: bool = False
    kind: str = "tensor"
    device: str = "file"
    requires_grad: bool | None = None

    def make(self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> Source:
        """Make a source from `tensors`, in order.

        Args:
            folder: Empty directory for files.
            tensors: Arrays by name, with ml_dtypes if NumPy lacks a dtype. An array may be strided, and may occur under
                two names. `to_torch` converts one to a torch tensor.
            metadata: Text metadata to store; only passed if the attribute `metadata` is set.
        """
        raise NotImplementedError

    # This hook is the only way to parametrise tests by an attribute of a subclass.
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrise tests by the supported dtypes and names."""
        for argument, values in (("dtype", self.dtypes), ("torch_dtype", self.torch_dtypes), ("odd_name", self.names)):
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, values, ids=[ascii(value) for value in values])

    # --- listing ---------------------------------------------------------------------------

    def test_names_and_order(self, tmp_path: Path) -> None:
        """The names are those of the mapping, in its order."""
        tensors = few()
        source = self.make(tmp_path, tensors)
        assert set(source.infos()) == set(tensors)
        assert list(source.keys()) == list(source.infos())
        if self.order:
            assert list(source.infos()) == list(tensors)

    def test_infos_agree_with_the_arrays(self, tmp_path: Path) -> None:
        """Every info agrees with its array."""
        tensors = few()
        source = self.make(tmp_path, tensors)
        for name, info in source.infos().items():
            array = tensors[name]
            assert isinstance(info, ParameterInfo)
            assert (info.name, info.raw_name or name) == (name, name)
            assert info.shape == array.shape
            assert all(type(size) is int for size in info.shape or ())
            assert info.ndim == array.ndim
            assert type(info.dtype) is DType
            assert info.dtype == DType.of(array.dtype)
            assert (info.numel, info.nbytes) == (array.size, array.nbytes)
            assert (info.kind, info.device, info.requires_grad) == (self.kind, self.device, self.requires_grad)
            assert info.aliases == ()
            assert hash(info) == hash(info._replace())
            assert info == info._replace()
            json.dumps(info.to_json())

    def test_infos_are_frozen(self, tmp_path: Path) -> None:
        """Attributes of infos cannot be set."""
        source = self.make(tmp_path, few())
        for info in source.infos().values():
            with pytest.raises(AttributeError):
                info.name = "other"  # type: ignore[misc]  # this is what is tested

    def test_infos_know_the_dtype(self, tmp_path: Path, dtype: str) -> None:
        """Every dtype is listed by torch's name, with its size."""
        array = sample(dtype, (4, 2))
        info = self.make(tmp_path, {"a": array}).infos()["a"]
        assert info.dtype == dtype
        assert info.nbytes == 8 * DType.of(dtype).bits // 8

    def test_a_table_of_nothing(self, tmp_path: Path) -> None:
        """A source may have no tensors."""
        source = self.make(tmp_path, {})
        assert len(source.infos()) == 0
        assert list(source.walk()) == []
        assert len(tp.of(source)) == tp.of(source).numel == 0

    def test_listing_again(self, tmp_path: Path) -> None:
        """Listing twice gives equal results, and the same mapping unless the source is live."""
        source = self.make(tmp_path, few())
        assert dict(source.infos()) == dict(source.infos())
        if not source.live:
            assert source.infos() is source.infos()

    def test_looking_up_one_name(self, tmp_path: Path) -> None:
        """`info`, `items`, `takes` and `find` agree with the listing."""
        source = self.make(tmp_path, few())
        infos = source.infos()
        for name in infos:
            assert source.info(name) == infos[name]
            assert source.takes(name)
            assert source.find(name) == name
        for missing in ("zzz", "fc", "fc.", ".fc.weight", "weight", "fc.weight.0"):
            assert not source.takes(missing)
            assert source.find(missing) is None
        assert [name for name, _ in source.items()] == list(infos)
        assert source.count() == len(infos)
        alone = {name: source.alone(name) for name in infos}
        assert {name: name if lone is None else lone.reading.names for name, lone in alone.items()} == {
            name: name if alone[name] is None else [name] for name in infos
        }
        some = list(infos)[::-2]
        assert [(name, tuple(value.shape)) for name, value in source.items(some)] == [
            (name, infos[name].shape) for name in some
        ]

    def test_any_name(self, tmp_path: Path, odd_name: str) -> None:
        """A tensor with any name is listed, found, read and printed."""
        arrays = {odd_name: sample("float32", (2, 3), 1), "other": sample("float32", (3,), 2)}
        source = self.make(tmp_path, arrays)
        assert set(source.infos()) == set(arrays)
        assert source.infos()[odd_name].name == odd_name
        assert source.resolve(odd_name) == odd_name
        assert_identical(source.numpy(odd_name), arrays[odd_name])
        repr(tp.of(source))

    def test_metadata(self, tmp_path: Path) -> None:
        """Metadata is returned as stored."""
        if self.metadata:
            stored = {"format": "pt", "note": "ü\n", "": ""}
            assert dict(self.make(tmp_path, few(), stored).metadata) == stored
        else:
            assert isinstance(self.make(tmp_path, few()).metadata, Mapping)

    # --- values ----------------------------------------------------------------------------

    def test_values(self, tmp_path: Path, dtype: str) -> None:
        """Values are read bit for bit, with dtype and shape."""
        bits = DType.of(dtype).bits
        shapes: tuple[tuple[int, ...], ...] = ((), (1,), (7,), (8,), (3, 5), (4, 2, 1), (0,), (2, 0, 3), (16, 9))
        # Files have no padding: use counts of sub-byte elements that fill whole bytes.
        fit = [shape for shape in shapes if math.prod(shape) * bits % 8 == 0]
        tensors = {f"t{i}": sample(dtype, shape, i) for i, shape in enumerate(fit)}
        source = self.make(tmp_path, tensors)
        for name, array in tensors.items():
            assert_identical(source.numpy(name), array, f"{dtype} {array.shape}")

    def test_not_a_number_and_infinity(self, tmp_path: Path) -> None:
        """NaN payloads, infinities, negative zero and subnormal values survive."""
        bits = np.array([0x7FC00000, 0xFFC00001, 0x7F800001, 0x7F800000, 0xFF800000, 0x80000000, 1], np.uint32)
        source = self.make(tmp_path, {"a": bits.view(np.float32)})
        assert source.numpy("a").view(np.uint32).tolist() == bits.tolist()

    def test_tensors(self, tmp_path: Path, torch_dtype: str) -> None:
        """`tensor` gives a torch tensor with the same bits."""
        import torch

        tensors = {
            "scalar": sample(torch_dtype, ()),
            "matrix": sample(torch_dtype, (5, 3)),
            "none": sample(torch_dtype, (0, 2)),
        }
        source = self.make(tmp_path, tensors)
        for name, array in tensors.items():
            tensor = source.tensor(name)
            assert isinstance(tensor, torch.Tensor)
            assert str(tensor.dtype) == f"torch.{torch_dtype}"
            assert tuple(tensor.shape) == array.shape
            assert tensor_bytes(tensor) == array.tobytes()

    def test_dtypes_that_torch_lacks(self, tmp_path: Path) -> None:
        """`tensor` raises for dtypes that torch lacks, and names them."""
        for dtype in (DType.of(dtype) for dtype in self.dtypes):
            if dtype.torch_name is None:
                source = self.make(folder(tmp_path, dtype), {"a": sample(dtype, (8,))})
                with pytest.raises(NotReadable, match=dtype):
                    source.tensor("a")

    def test_walking(self, tmp_path: Path) -> None:
        """`walk` has the order of the listing, and the semantics of `named_parameters`."""
        tensors = few()
        source = self.make(tmp_path, tensors)
        walked = [(name, canonical) for name, canonical, _ in source.walk()]
        assert walked == [(name, name) for name in source.infos()]
        flat = [name for name, _, _ in source.walk(recurse=False)]
        assert flat == [name for name in source.infos() if "." not in name]
        for name, _, value in source.walk():
            assert tuple(value.shape) == tensors[name].shape

    def test_arrays_in_any_layout(self, tmp_path: Path) -> None:
        """Values of non-contiguous arrays are read correctly."""
        base = sample("float32", (6, 8))
        tensors = {
            "transposed": base.T,
            "rows": base[::2],
            "columns": base[:, 3],
            "part": base[1:3, 2:7],
            "fortran": np.asfortranarray(sample("int16", (3, 4), 1)),
            "expanded": np.broadcast_to(sample("float64", (1, 3), 2), (4, 3)),
        }
        source = self.make(tmp_path, tensors)
        for name, array in tensors.items():
            assert_identical(source.numpy(name), array, name)
            assert source.infos()[name].nbytes == array.nbytes
            storage = source.infos()[name].storage
            if self.strides:
                assert storage is not None, name
                assert storage.stride == tuple(step // array.itemsize for step in array.strides), name
            span = source.span(name)
            if span is not None:
                assert span.stop - span.start == array.nbytes, name

    def test_a_big_tensor(self, tmp_path: Path) -> None:
        """A tensor of many pages is read completely."""
        big = sample("float32", (1 << 10, 1 << 9))
        source = self.make(tmp_path, {"before": sample("int64", (3,)), "big": big, "after": sample("int64", (3,))})
        assert_identical(source.numpy("big"), big)

    def test_one_array_under_two_names(self, tmp_path: Path) -> None:
        """A tied tensor is one entry with an alias, or two entries; an equal copy is never tied."""
        array = sample("float32", (4, 3))
        equal = array.copy()
        source = self.make(tmp_path, {"a.w": array, "other": equal, "b.w": array})
        params = tp.of(source)
        assert_identical(source.numpy("a.w"), array)
        if not self.ties:
            assert set(source.infos()) == {"a.w", "other", "b.w"}
            assert_identical(source.numpy("b.w"), array)
            assert params.numel == 36
            return
        assert set(source.infos()) == {"a.w", "other"}
        if self.order:
            assert list(source.infos()) == ["a.w", "other"]
        assert source.infos()["a.w"].aliases == ("b.w",)
        assert source.infos()["other"].aliases == ()
        assert source.resolve("b.w") == source.find("b.w") == "a.w"
        assert list(source.keys()) == list(source.infos())
        assert params.numel == 24
        assert "b.w" in params
        assert params.info("b.w") == params.info("a.w")
        assert_identical(params.numpy("b.w"), array)
        given = [(name, canonical) for name, canonical, _ in source.walk(remove_duplicate=False)]
        assert sorted(given) == [("a.w", "a.w"), ("b.w", "a.w"), ("other", "other")]

    # --- reading no more than requested ------------------------------------------------------

    def test_listing_reads_no_values(self, tmp_path: Path) -> None:
        """Listing and printing read and allocate a small part of the size of the values."""

        def look(source: Source) -> None:
            assert len(source.infos()) == len(source.keys())
            repr(tp.of(source))
            tp.of(source)._repr_html_()
            assert tp.of(source).numel > 0

        look(self.make(folder(tmp_path, "imports"), few()))  # excludes imports from the count
        source = self.make(folder(tmp_path, "counted"), big_between())
        with limited():
            look(source)

    def test_printing_never_asks_for_values(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Printing works even if reading values raises."""
        source = self.make(tmp_path, few())

        def never(*args: object) -> Any:
            raise AssertionError("a value was asked for")

        for method in ("numpy", "tensor", "value"):
            monkeypatch.setattr(type(source), method, never)
        assert "Error" not in repr(tp.of(source))
        assert "<table>" in tp.of(source)._repr_html_()

    def test_reading_one_tensor_reads_no_other(self, tmp_path: Path) -> None:
        """Reading a small tensor between big ones reads and allocates little."""
        tensors = big_between()
        for _, _, value in self.make(folder(tmp_path, "imports"), few()).walk():
            del value  # excludes imports from the count
        source = self.make(folder(tmp_path, "counted"), tensors)
        source.infos()
        with limited():
            values = source.numpy("small")
        assert_identical(values, tensors["small"])
        with limited():
            tensor = source.value("small")
        assert tuple(tensor.shape) == tensors["small"].shape

    # --- unknown names -----------------------------------------------------------------------

    def test_unknown_names(self, tmp_path: Path) -> None:
        """An unknown name raises an error with the nearest names."""
        source = self.make(tmp_path, {"encoder.weight": sample("float32", (2,)), "head": sample("float32", (2,))})
        assert source.resolve("head") == "head"
        with pytest.raises(UnknownName) as caught:
            source.resolve("encoder.wieght")
        assert str(caught.value).startswith(
            f"{source.label}: No parameter is named 'encoder.wieght'. Did you mean 'encoder.weight'?"
        )
        with pytest.raises(UnknownName, match="There are 2 names"):
            source.resolve("zzzzzzzz")
        with pytest.raises(KeyError):
            tp.of(source)["zzzzzzzz"]

    # --- threads -----------------------------------------------------------------------------

    def test_threads(self, tmp_path: Path) -> None:
        """Threads that list and read at the same time get the same results."""
        tensors = {f"t{i}": sample("float32", (i % 7, 3), i) for i in range(24)}
        source = self.make(tmp_path, tensors)
        failures: list[BaseException] = []
        together = threading.Barrier(6)

        def read(shift: int) -> None:
            try:
                together.wait()
                names = list(source.infos())
                for name in names[shift:] + names[:shift]:
                    assert_identical(source.numpy(name), tensors[name])
                    assert source.span(name) == source.span(name)
                    assert tuple(source.value(name).shape) == tensors[name].shape
            except BaseException as failure:  # a thread cannot raise in the caller
                failures.append(failure)

        threads = [threading.Thread(target=read, args=(4 * i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []

    # --- tables ------------------------------------------------------------------------------

    def test_the_table(self, tmp_path: Path) -> None:
        """`torchparams.of` gives a mapping that agrees with the source."""
        tensors = few()
        source = self.make(tmp_path, tensors)
        params = tp.of(source)
        assert tp.of(params) is params
        assert params.source is source
        assert len(params) == len(tensors)
        assert list(params) == params.names == list(params.keys()) == list(source.infos())
        assert set(params.names) == set(tensors)
        assert all(name in params for name in tensors)
        assert "zzz" not in params
        assert params.get("zzz") is None
        assert params.numel == sum(array.size for array in tensors.values())
        assert params.nbytes == sum(array.nbytes for array in tensors.values())
        assert dict(params.metadata) == dict(source.metadata)
        for name, value in params.items():
            assert tuple(value.shape) == tensors[name].shape
            assert params.info(name) == source.infos()[name]
            assert_identical(params.numpy(name), tensors[name])
        assert [tuple(value.shape) for value in params()] == [tensors[name].shape for name in params]
        assert [name for name, _ in params.named_parameters(prefix="p")] == [f"p.{name}" for name in params]
        text = repr(params)
        assert text.startswith(f"{source.label} ({source.format})")
        assert all(name in text for name in tensors)

    def test_copies(self, tmp_path: Path) -> None:
        """Tables can be copied and pickled, for other processes; the copy reads the same."""
        tensors = few()
        params = tp.of(self.make(tmp_path, tensors))
        for table in (params, params.select("**.weight")):
            for again in (copy.copy(table), copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
                assert again.names == table.names
                assert (again.source.label, again.source.format) == (params.source.label, params.source.format)
                assert again.infos == table.infos or self.device != "file"  # addresses belong to the copy
                for name in again:
                    assert_identical(again.numpy(name), tensors[name])

    def test_selecting(self, tmp_path: Path) -> None:
        """Selections are tables, and combine like sets."""
        tensors = few()
        params = tp.of(self.make(tmp_path, tensors))
        matrices = params.filter(lambda info: info.ndim == 2)
        assert matrices.names == [name for name in params if tensors[name].ndim == 2]
        rest = params - matrices
        assert rest.names == [name for name in params if tensors[name].ndim != 2]
        assert (matrices | rest).names == params.names
        assert (matrices & rest).names == []
        assert (~matrices).names == rest.names
        assert matrices.numel + rest.numel == params.numel
        for name in rest:
            assert name not in matrices
            with pytest.raises(KeyError):
                matrices[name]
        weights = params.select("**.weight")
        assert weights.names == [name for name in params if name.endswith(".weight")]
        assert {name: weights.numpy(name).tobytes() for name in weights} == {
            name: array.tobytes() for name, array in tensors.items() if name.endswith(".weight")
        }
