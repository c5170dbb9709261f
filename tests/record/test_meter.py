"""Numbers of many tensors at once: by the kernel and by torch, against torch's own operations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchparams.record import on_device
from torchparams.record.measured import Measured, together
from torchparams.record.meter import Meter, plain

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int32]


@pytest.fixture(params=[False, True], ids=["kernel", "torch"])
def meter(request: pytest.FixtureRequest) -> Meter:
    return Meter(by_torch=request.param)


def tensors() -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    found: list[Any] = [torch.randn(7, 9).mul(3).to(dtype) for dtype in DTYPES]
    odd = torch.randn(300)
    odd[::7], odd[5], odd[6] = 0, math.nan, -math.inf
    strided = torch.randn(6, 8)[::2, ::3]
    return [
        *found,
        None,
        odd,
        torch.randn(5, 4, 3, 2).to(memory_format=torch.channels_last),
        torch.randn(6, 8).T,
        strided,
        torch.zeros(0),
        torch.tensor(2.5),
        torch.randn(4, dtype=torch.complex64),
        torch.sparse_coo_tensor(torch.tensor([[0, 3, 0]]), torch.tensor([1.0, 2.0, 4.0]), (5,), check_invariants=True),
    ]


def wide(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.double().reshape(-1)


def test_every_number_is_that_of_torch(meter: Meter) -> None:
    given = tensors()
    found = meter.measure(given, exponents=True)
    assert found.exponents is not None
    for i, tensor in enumerate(given):
        if tensor is None:
            assert (found.counts[i], found.norms[i], found.exponents[i].sum()) == (0, 0, 0)
            continue
        values = wide(tensor)
        finite = values[torch.isfinite(values)]
        assert found.counts[i] == values.numel()
        assert found.zeros[i] == (values == 0).sum()
        assert found.nonfinite[i] == values.numel() - finite.numel()
        assert found.most[i] == (finite.abs().max() if finite.numel() else 0)
        assert found.norms[i] == pytest.approx(float(finite.norm()), rel=1e-6)
        assert found.sums[i] == pytest.approx(float(finite.sum()), rel=1e-5, abs=1e-5)
        _, exponent = torch.frexp(finite[finite != 0])
        counts = torch.bincount(exponent + 126, minlength=256).tolist()
        counts[0] += int((finite == 0).sum())
        counts[255] += int(found.nonfinite[i])
        assert found.exponents[i].tolist() == counts


def test_flags_are_where_nothing_is_finite(meter: Meter) -> None:
    given = tensors()
    assert list(meter.nonfinite(given).counts()) == [given.index(None) + 1]
    assert list(meter.nonfinite([torch.ones(3), torch.tensor([math.inf])]).counts()) == [1]
    assert meter.nonfinite([None]).counts() == {}


def test_distance(meter: Meter) -> None:
    torch.manual_seed(0)
    a = [tensor for tensor in tensors() if tensor is not None and not tensor.is_sparse and tensor.numel()]
    b = [tensor.clone() for tensor in a]
    assert meter.distance(a, b)[0, 0] == 0
    b[0] += 1
    b[7].mul_(2)
    found = meter.distance(a, b)
    assert found[0, 0] == pytest.approx(math.sqrt(63), rel=1e-6)
    assert found[7].tolist() == pytest.approx([float(wide(a[7]).norm()), float(wide(b[7]).norm())], rel=1e-6)


@pytest.mark.parametrize("scale", [1e200, 1e-200, 5e-324])
@pytest.mark.parametrize("tensors", [1, 3])
def test_norms_of_float64_neither_overflow_nor_vanish(meter: Meter, scale: float, tensors: int) -> None:
    found = meter.measure([torch.full((4,), scale, dtype=torch.float64)] * tensors)
    assert found.norms == pytest.approx(2 * scale)


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own is not typed
    """Counts the operations of torch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_operations_on_an_accelerator_do_not_grow_with_the_number_of_small_tensors() -> None:
    counts = []
    for number in (20, 2000):
        some = [torch.randn(16, 16) for _ in range(number)]
        meter = Meter(by_torch=True)
        with Counted() as counted:
            meter.measure(some, exponents=True)
            meter.measure(some)
            meter.distance(some, some)
            meter.nonfinite(some).counts()
        counts.append(counted.count)
    assert counts[0] == counts[1] < 150


def test_tensors_too_large_to_be_joined_are_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [tensor for tensor in tensors() if tensor is not None]
    together = Meter(by_torch=True).measure(given, exponents=True)
    monkeypatch.setattr(on_device, "TOGETHER", 1)
    alone = Meter(by_torch=True).measure(given, exponents=True)
    for key in ("counts", "zeros", "nonfinite", "most", "exponents"):
        assert (getattr(together, key) == getattr(alone, key)).all(), key
    for key in ("sums", "norms"):
        assert getattr(together, key) == pytest.approx(getattr(alone, key), rel=1e-6), key


def test_nothing_is_copied_where_elements_are_dense() -> None:
    for tensor in (
        torch.randn(4, 5),
        torch.randn(4, 5).T,
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ):
        assert plain(tensor).data_ptr() == tensor.data_ptr()
    strided = torch.randn(4, 6)[:, ::2]
    assert plain(strided).data_ptr() != strided.data_ptr()


def test_parts_of_ranks_add_up() -> None:
    torch.manual_seed(0)
    whole = [torch.randn(10, 4), torch.randn(8)]
    halves = [[whole[0][:6], whole[1]], [whole[0][6:], whole[1]]]
    measured = [Meter().measure(half, exponents=True) for half in halves]
    packed = [each.packed() for each in measured]
    packed[1][1] = 0  # the second tensor is a replica, which counts once
    found = Measured.unpacked(np.stack(packed))
    expected = Meter().measure(whole, exponents=True)
    for key in ("counts", "zeros", "nonfinite", "most", "exponents"):
        assert (getattr(found, key) == getattr(expected, key)).all(), key
    np.testing.assert_allclose(found.norms, expected.norms)
    np.testing.assert_allclose(found.sums, expected.sums)
    assert found.means.tolist() == pytest.approx([float(tensor.mean()) for tensor in whole])
    assert found.deviations.tolist() == pytest.approx([float(tensor.std()) for tensor in whole])
    together_ = found.grouped([[0, 1]])
    every = torch.cat([tensor.flatten() for tensor in whole])
    assert (together_.counts[0], together_.norms[0]) == (48, pytest.approx(float(every.norm())))
    assert together_.deviations[0] == pytest.approx(float(every.std()))


def test_norms_of_parts() -> None:
    assert together(np.array([[3e200, 0.0], [4e200, 0.0]])).tolist() == pytest.approx([5e200, 0.0])
