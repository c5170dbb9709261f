"""Sparse and nested tensors, and tensors made of others: each is one entry with a layout."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import torchparams as tp
from torch_files import saved, written
from torchparams.errors import NotReadable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.*(prototype|beta state|Sparse CSR).*:UserWarning")


Two: Any = TwoTensor


def nested(jagged: bool) -> torch.Tensor:
    rows = [torch.ones(2), torch.ones(3)]
    made: torch.Tensor = torch.nested.nested_tensor(rows, layout=torch.jagged if jagged else torch.strided)
    return made


def odd() -> dict[str, Any]:
    """Tensors of every layout; name, as in the expected table below."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        square = torch.eye(4)
        return {
            "plain": torch.ones(3),
            "coo": square.to_sparse(),
            "csr": square.to_sparse_csr(),
            "csc": square.to_sparse_csc(),
            "bsr": square.to_sparse_bsr((2, 2)),
            "bsc": square.to_sparse_bsc((2, 2)),
            "nested": nested(False),
            "jagged": nested(True),
            "wrapped": Two(torch.ones(2, 4), torch.zeros(2, 4)),
        }


# shape, numel, bytes, layout
EXPECTED: Mapping[str, tuple[tuple[int, ...] | None, int, int, str | None]] = {
    "plain": ((3,), 3, 12, None),
    "coo": ((4, 4), 16, 2 * 4 * 8 + 4 * 4, "sparse_coo"),
    "csr": ((4, 4), 16, 5 * 8 + 4 * 8 + 4 * 4, "sparse_csr"),
    "csc": ((4, 4), 16, 5 * 8 + 4 * 8 + 4 * 4, "sparse_csc"),
    "bsr": ((4, 4), 16, 3 * 8 + 2 * 8 + 8 * 4, "sparse_bsr"),
    "bsc": ((4, 4), 16, 3 * 8 + 2 * 8 + 8 * 4, "sparse_bsc"),
    "nested": (None, 5, 20, "nested"),
    "jagged": (None, 5, 20, "jagged"),
    "wrapped": ((2, 4), 8, 32, "TwoTensor"),
}


class Holder(nn.Module):
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def as_kind(kind: str, tensors: dict[str, torch.Tensor], folder: Path) -> Any:
    if kind == "file":
        return written(folder, saved(tensors))
    return Holder(tensors) if kind == "module" else tensors


@pytest.mark.parametrize("kind", ["module", "mapping", "file"])
def test_each_is_one_entry_that_says_what_it_is(kind: str, tmp_path: Path) -> None:
    tensors = odd()
    x = as_kind(kind, tensors, tmp_path)
    params = tp.of(x, buffers=True)
    assert {n: (i.shape, i.numel, i.nbytes, i.layout) for n, i in params.infos.items()} == EXPECTED
    shown = str(params)
    for line in ("[4, 4] sparse_coo", "[2, 4] TwoTensor", " nested ", " jagged "):
        assert line in shown
    assert params.info("coo").to_json()["layout"] == "sparse_coo"
    assert "lazy" not in shown


@pytest.mark.parametrize("kind", ["module", "mapping", "file"])
def test_the_others_are_read_beside_them(kind: str, tmp_path: Path) -> None:
    tensors = odd()
    x = as_kind(kind, tensors, tmp_path)
    found = tp.stats(x, buffers=True)
    assert [row.name for row in found] == ["plain"]
    assert {each.name for each in found.unread} == set(EXPECTED) - {"plain"}
    assert all("lazy" not in each.reason for each in found.unread)
    counts = tp.diff(x, x).counts
    assert (counts["identical"], counts["unread"]) == (1, len(EXPECTED) - 1)
    for name in set(EXPECTED) - {"plain"}:
        with pytest.raises(NotReadable, match=name):
            tp.of(x, buffers=True).numpy(name)
        with pytest.raises(NotReadable, match=name):
            tp.digest(x, name)
    assert tp.digest(x, "plain").tensors["plain"].nbytes == 12
    assert tp.save(x, tmp_path / "plain.safetensors", "plain").tensors == 1


def test_a_parameter_that_wraps_is_counted_once(tmp_path: Path) -> None:
    wrapped = nn.Parameter(Two(torch.ones(2, 4), torch.zeros(2, 4)))
    path = written(tmp_path, saved({"w": wrapped}))
    (info,) = tp.of(path).infos.values()
    assert (info.kind, info.requires_grad, info.numel) == ("parameter", True, 8)
    assert tp.of(path).numel == tp.of({"w": wrapped}).numel == 8


# --- TorchScript ---------------------------------------------------------------------------------


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("b", torch.ones(2))
        self.attribute = torch.ones(5)
        self.table = {"x": torch.ones(4)}
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.w.sum() + self.attribute.sum() + self.table["x"].sum()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_lists_its_parameters_and_buffers_only(tmp_path: Path) -> None:
    model = Scripted()
    script: Any = torch.jit.script
    torch.jit.save(script(model), str(tmp_path / "script.pt"))
    params = tp.of(tmp_path / "script.pt")
    assert sorted(params.names) == sorted(model.state_dict())
    kinds = {info.name: info.kind for info in params.infos.values()}
    parameters = dict(model.named_parameters())
    assert kinds == {name: "parameter" if name in parameters else "buffer" for name in model.state_dict()}
    assert params.metadata["attribute"] == f"in no state_dict, an attribute of {__name__}.Scripted: a tensor, float32 5"
    assert "table" in params.metadata
    assert tp.diff(model, params).same
