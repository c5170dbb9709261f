"""Tensors that share memory: tied tensors, views, and their storages."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import torchparams as tp
from torch_files import saved, written
from torchparams.errors import MismatchError, PlanError
from torchparams.render.tree import human_bytes

if TYPE_CHECKING:
    from pathlib import Path


def refusal(error: type[Exception], *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        tp.convert(*arguments, **options)
    return str(caught.value)


def tied() -> dict[str, torch.Tensor]:
    w = torch.arange(12.0).reshape(3, 4)
    return {"embed": w, "head": w, "t": w.T, "row": w[1], "apart": torch.zeros(100)[3:5], "odd": w[:, 1:3]}


def test_a_torch_file_keeps_what_is_shared(tmp_path: Path) -> None:
    source = written(tmp_path, saved(tied()))
    for x in (source, tied()):
        plan = tp.convert(x, tmp_path / "x.pt", overwrite=True)
        assert [output.name for output in plan.outputs] == ["embed", "apart"]
        plan.run()
        loaded = torch.load(tmp_path / "x.pt", weights_only=True)
        assert len({loaded[name].untyped_storage().data_ptr() for name in tied() if name != "apart"}) == 1
        for name, tensor in tied().items():
            assert torch.equal(loaded[name], tensor)
        assert loaded["apart"].untyped_storage().nbytes() == 8
    assert tp.convert(source, tmp_path / "y.pt").notes == (
        "tied; ties are kept: embed = head",
        "compacted: 392 B of storage outside the written tensors is left out",
    )


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_what_compacting_saves_is_what_views_do_not_show(suffix: str, tmp_path: Path) -> None:
    big = torch.zeros(1000, 100)
    # A column reaches over nearly the whole storage, and shows a hundredth of it. An empty view has one, too.
    source = written(tmp_path, saved({"rows": big[:10], "column": big[:, 5], "none": torch.zeros(50)[:0]}))
    plan = tp.convert(source, tmp_path / f"x.{suffix}")
    saves = 400_000 - 4000 - 4000 + 200
    assert plan.notes[-1] == f"compacted: {human_bytes(saves)} of storage outside the written tensors is left out"
    assert os.path.getsize(source) - plan.run().nbytes > 388_000


def test_a_cast_keeps_it_too(tmp_path: Path) -> None:
    tp.convert(tied(), tmp_path / "x.pt", dtype="bf16").run()
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert len({loaded[name].untyped_storage().data_ptr() for name in tied() if name != "apart"}) == 1
    for name, tensor in tied().items():
        assert torch.equal(loaded[name], tensor.bfloat16())
    plan = tp.convert(tied(), tmp_path / "y.pt", dtype={"row": "f64"})
    assert "row shares memory with embed, and gets its own copy" in plan.notes
    plan.run()
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True)["row"], tied()["row"].double())


def test_views_of_which_none_is_the_whole_are_written_apart(tmp_path: Path) -> None:
    w = torch.arange(10.0)
    plan = tp.convert({"a": w[:6], "b": w[4:]}, tmp_path / "x.pt")
    assert plan.notes == (
        "a shares memory with b, and gets its own copy",
        "b shares memory with a, and gets its own copy",
    )
    plan.run()
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True)["b"], w[4:])


@pytest.mark.parametrize("in_file", [False, True])
def test_conjugates_and_negatives_are_written_as_what_they_show(in_file: bool, tmp_path: Path) -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    state = {"z": z, "conj": z.conj(), "part": z[1:]}
    if not in_file:  # torch.save takes no memory that is seen as two types
        state |= {"neg": z.conj().imag, "real": z.real}
    source: object = written(tmp_path, saved(state)) if in_file else state
    for path in (tmp_path / "x.pt", tmp_path / "x.safetensors"):
        tp.convert(source, path).run()
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert loaded["conj"].untyped_storage().data_ptr() != loaded["z"].untyped_storage().data_ptr()
    for name, tensor in state.items():
        assert torch.equal(loaded[name].resolve_conj(), tensor.resolve_conj())
        assert torch.equal(load_file(tmp_path / "x.safetensors")[name], tensor.resolve_conj().resolve_neg())
    assert loaded["part"].untyped_storage().data_ptr() == loaded["z"].untyped_storage().data_ptr()


def test_a_short_view_in_a_long_one_does_not_end_it(tmp_path: Path) -> None:
    # The running maximum of ends counts, not the end of the last.
    w = torch.arange(10.0)
    plan = tp.convert({"long": w, "short": w[1:2], "late": w[5:6]}, tmp_path / "x.pt")
    assert [(view.name, view.base, view.offset) for view in plan.views] == [("short", "long", 1), ("late", "long", 5)]


def test_safetensors_writes_tied_names_each_or_one(tmp_path: Path) -> None:
    source = written(tmp_path, saved(tied()))
    path = tmp_path / "x.safetensors"
    plan = tp.convert(source, path)
    assert plan.notes == (
        "tied; each name gets its own copy, 48 B more: embed = head",
        "embed, t, odd and 1 more are views of the same memory; each gets its own copy",
        "compacted: 392 B of storage outside the written tensors is left out",
    )
    plan.run()
    loaded = load_file(path)
    for name, tensor in tied().items():
        assert torch.equal(loaded[name], tensor)
    plan = tp.convert(source, path, shared="drop", overwrite=True)
    assert plan.dropped == (("head", "it is embed"),)
    assert plan.notes[0] == "tied; only the first name is written: embed = head"
    plan.run()
    with safe_open(path, "pt") as file:
        assert "head" not in file.keys()  # noqa: SIM118  # it is no mapping
        assert file.metadata() == {"format": "pt", "head": "embed"}
    assert refusal(PlanError, source, path, shared="keep") == (
        "'embed' and 'head' are one tensor; safetensors cannot store ties. Pass shared='drop' (write one name) "
        "or shared='clone' (write each name), or write a .pt file."
    )
    assert refusal(PlanError, source, path, shared="some") == ("`shared` must be 'keep', 'drop' or 'clone', not 'some'")
    assert refusal(PlanError, source, path, shared="drop", metadata={"head": "x"}, overwrite=True).endswith(
        "The metadata key 'head' is also the name of a tied tensor that the metadata must record"
    )


def test_a_renamed_alias(tmp_path: Path) -> None:
    w = torch.ones(2)
    tp.convert({"a": w, "b": w}, tmp_path / "x.pt", rename={"a": "c"}).run()
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert list(loaded) == ["c", "b"]
    assert loaded["c"].data_ptr() == loaded["b"].data_ptr()
    assert refusal(MismatchError, {"a": w, "b": w}, tmp_path / "y.pt", rename={"a": "b"}) == (
        "dict: 'a' and 'b' would both be named 'b'"
    )


def test_expanded_tensors_are_written_out(tmp_path: Path) -> None:
    source = written(tmp_path, saved({"w": torch.tensor([1.0, 2.0]).expand(3, 2)}))
    tp.convert(source, tmp_path / "x.safetensors").run()
    assert load_file(tmp_path / "x.safetensors")["w"].tolist() == [[1, 2]] * 3
