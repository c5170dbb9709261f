from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_files import assert_same, bits
from torchparams import limits
from torchparams.dtypes import DType
from torchparams.errors import LimitExceeded, NotReadable
from torchparams.info import ParameterInfo
from torchparams.sources.totorch import from_bytes, from_numpy, to_numpy
from torchparams.testing import TORCH_DTYPES, sample, to_torch

if TYPE_CHECKING:
    from torchparams.testing import Array


def info_of(dtype: str, shape: tuple[int, ...] = ()) -> ParameterInfo:
    kind = DType.of(dtype)
    return ParameterInfo("w", shape, kind, 0, 0, "file", "tensor")


def layouts(array: Array) -> dict[str, Array]:
    """The array, which is 4 × 6, in every layout that torch can take as it is."""
    return {
        "plain": array,
        "transposed": array.T,
        "rows": array[::2],
        "column": array[:, 3],
        "part": array[1:3, 2:5],
        "scalar": array[2, 3, ...],
        "empty": array[:0],
        "expanded": np.ndarray((5, 6), array.dtype, array.view("u1"), strides=(0, array.itemsize)),
    }


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_arrays_become_tensors_of_the_same_memory(dtype: str) -> None:
    for name, array in layouts(sample(dtype, (4, 6))).items():
        tensor = from_numpy(array, info_of(dtype))
        assert str(tensor.dtype) == f"torch.{dtype}"
        assert tuple(tensor.shape) == array.shape
        assert bits(tensor) == array.tobytes(), name
        if array.size:
            assert tensor.data_ptr() == array.__array_interface__["data"][0], name


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_tensors_become_arrays_of_the_same_memory(dtype: str) -> None:
    base = to_torch(sample(dtype, (4, 6)))
    for tensor in (base, base.t(), base[::2], base[:, 3], base[2, 3], base[:0], base[:1].expand(3, 6)):
        array = to_numpy(tensor)
        assert array.dtype == DType.of(dtype).numpy
        assert array.shape == tuple(tensor.shape)
        assert array.tobytes() == bits(tensor)
        if array.size:
            assert tensor.data_ptr() == array.__array_interface__["data"][0]


@given(st.sampled_from(TORCH_DTYPES), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 99))
def test_there_and_back(dtype: str, shape: list[int], seed: int) -> None:
    array = sample(dtype, tuple(shape), seed)
    back = to_numpy(from_numpy(array, info_of(dtype)))
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_arrays_that_torch_cannot_share_are_copied() -> None:
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    read_only = base.copy()
    read_only.flags.writeable = False
    shifted = np.frombuffer(bytearray(49), np.uint8)[1:].view(np.float32)
    fields = np.zeros(3, [("a", "f4"), ("b", "u1")])["a"]
    for array in (read_only, base[::-1], base.astype(">f4"), shifted, fields, read_only[::2].T):
        tensor = from_numpy(array, info_of("float32"))
        assert tensor.tolist() == array.tolist()
        before = array.tolist()
        tensor.zero_()
        assert array.tolist() == before


def test_an_expanded_array_is_copied_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.broadcast_to(np.float32(1), (10,))
    assert from_numpy(array, info_of("float32")).tolist() == [1] * 10
    monkeypatch.setattr(limits, "EXPANDED_ELEMENTS", 9)
    with pytest.raises(LimitExceeded, match="'w' is an expanded array of 10 elements, and would have to be copied"):
        from_numpy(array, info_of("float32"))


def test_types_that_torch_lacks() -> None:
    for dtype in ("float4_e2m1fn", "float6_e2m3fn"):
        with pytest.raises(NotReadable, match=rf"'w': torch .* has no dtype for {dtype}"):
            from_numpy(sample(dtype, (4,)), info_of(dtype))
        with pytest.raises(NotReadable, match=rf"'w': torch .* has no dtype for {dtype}"):
            from_bytes(bytearray(4), info_of(dtype), (4,), (1,))


def test_types_that_numpy_lacks_come_from_bytes() -> None:
    tensor = from_bytes(bytearray(range(8)), info_of("bits8"), (2, 2), (4, 1))
    assert str(tensor.dtype) == "torch.bits8"
    assert tensor.view(torch.uint8).tolist() == [[0, 1], [4, 5]]
    assert from_bytes(b"", info_of("bits8"), (0, 3), (3, 1)).shape == (0, 3)


def test_parameters_and_tensors_in_a_graph() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    assert to_numpy(parameter).tolist() == [1, 1, 1]
    assert to_numpy(parameter * 2).tolist() == [2, 2, 2]


def test_lazy_conjugates_and_negatives() -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    assert to_numpy(values.conj()).tolist() == [1 - 2j, 3 + 4j]
    assert to_numpy(values.conj().imag).tolist() == [-2, 4]


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:torch.quantize", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: torch.eye(2).to_sparse(),
            "A sparse tensor (torch.sparse_coo) cannot become an array. Pass tensor.to_dense().",
        ),
        (lambda: torch.eye(2).to_sparse_csr(), "A sparse tensor (torch.sparse_csr) cannot become an array"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "A quantised tensor (torch.qint8)"),
        (lambda: torch.empty(2, device="meta"), "A tensor on the meta device has a shape but no values"),
        (lambda: torch.empty(2, dtype=torch.bits8), "numpy and ml_dtypes have no dtype for bits8"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "A nested tensor has rows of different"),
    ],
)
def test_tensors_without_an_array(make: Any, said: str) -> None:
    with pytest.raises(NotReadable) as caught:
        to_numpy(make())
    assert str(caught.value).startswith(said)


def test_helpers_agree() -> None:
    array = sample("bfloat16", (3, 2))
    assert_same(from_numpy(array, info_of("bfloat16")), to_torch(array))
