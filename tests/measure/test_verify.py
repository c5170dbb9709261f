"""verify, with and without manifests."""

from __future__ import annotations

import json
import os
import stat
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchparams as tp
from torch_files import members_of, saved, written, zipped
from torchparams.errors import FileFormatError, LimitExceeded, NoMatch, SourceError, WriteError
from torchparams.measure.digest import Digests
from torchparams.measure.integrity import Check
from torchparams.testing import Array, MemorySource, element_bytes, safetensors_bytes, sample, to_torch

ARRAYS = {"a": sample("bfloat16", (3, 4)), "b": sample("float32", (5,)), "c": sample("int8", (2, 2))}


def store(folder: Path, arrays: dict[str, Array], name: str = "model.safetensors") -> str:
    return written(folder, safetensors_bytes(arrays), name)


def found(verification: Any) -> list[tuple[str, tuple[str, ...]]]:
    return [(difference.kind, difference.names) for difference in verification.differences]


def outcomes(verification: Any) -> list[tuple[str, str]]:
    return [(check.what, check.outcome) for check in verification.checks]


# --- against a manifest ----------------------------------------------------------------------


def test_the_same_weights_in_anything(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    manifest = str(tmp_path / "manifest.json")
    tp.digest(model).write(manifest)
    state = model.state_dict()
    for x in (
        model,
        state,
        written(tmp_path, saved(state)),
        written(tmp_path, saved(state, legacy=True), "old.pt"),
        store(tmp_path, {name: tp.of(state).numpy(name) for name in state}),
    ):
        verification = tp.verify(x, manifest)
        assert verification.ok, verification
        assert (verification.tensors, verification.nbytes) == (7, 92)
        assert ("digests", "ok") in outcomes(verification)


def test_every_kind_of_difference_is_named() -> None:
    before = {name: np.zeros((2, 3), np.float32) for name in ("same", "content", "shape", "dtype", "both", "missing")}
    after = {
        "same": before["same"],
        "content": before["content"] + 1,
        "shape": np.zeros((3, 2), np.float32),
        "dtype": np.zeros((2, 3), np.int32),
        "both": np.zeros(6, np.int32),
        "unexpected": np.zeros(()),
    }
    verification = tp.verify(after, tp.digest(before))
    assert not verification.ok
    assert not verification
    digests = [tp.digest(x).tensors["content"].digest for x in (before, after)]
    assert [d.to_json() for d in verification.differences] == [
        {"kind": kind, "name": name, "aliases": [], "expected": expected, "found": there}
        for kind, name, expected, there in (
            ("content", "content", digests[0], digests[1]),
            ("shape", "shape", "float32 [2, 3]", "float32 [3, 2]"),
            ("dtype", "dtype", "float32 [2, 3]", "int32 [2, 3]"),
            ("dtype", "both", "float32 [2, 3]", "int32 [6]"),
            ("unexpected", "unexpected", None, "float64 []"),
            ("missing", "missing", "float32 [2, 3]", None),
        )
    ]
    assert str(verification) == (
        "dict (mapping)\n"
        "tensor      differs     expected           found\n"
        f"content     content     {digests[0][:16]}…  {digests[1][:16]}…\n"
        "shape       shape       float32 [2, 3]     float32 [3, 2]\n"
        "dtype       dtype       float32 [2, 3]     int32 [2, 3]\n"
        "both        dtype       float32 [2, 3]     int32 [6]\n"
        "unexpected  unexpected                     float64 []\n"
        "missing     missing     float32 [2, 3]\n"
        "\n"
        "check                    result\n"
        "digests    failed        1 of 7 tensors as in the manifest\n"
        "structure  not possible  a mapping has no stored form; verify it against a manifest\n"
        "6 tensors, 128 B: 1 with different content, 1 with a different shape, 2 with a different dtype, 1 "
        "missing, 1 unexpected."
    )
    assert repr(verification) == str(verification)
    assert "<table>" in verification._repr_html_()


def test_names_of_tied_tensors_count_one_by_one() -> None:
    tied, other = np.zeros(2), np.ones(2)
    expected = tp.digest({"a": tied, "b": tied})
    assert tp.verify({"a": tied, "b": tied.copy()}, expected).ok
    assert tp.verify({"b": tied, "a": tied}, expected).ok
    assert found(tp.verify({"c": other}, expected)) == [("unexpected", ("c",)), ("missing", ("a", "b"))]
    assert found(tp.verify({"a": other, "b": other}, expected)) == [("content", ("a", "b"))]
    apart = tp.digest({"a": tied, "b": other})
    assert found(tp.verify({"a": tied, "b": tied}, apart)) == [("content", ("b",))]


def ties(verification: Any) -> tuple[str, ...]:
    return next((check.tensors for check in verification.checks if check.what == "ties"), ())


def test_a_name_that_is_missing_passes_where_its_values_are_under_an_alias() -> None:
    tied, other = np.zeros(2), np.ones(2)
    expected = tp.digest({"a": tied, "b": tied, "c": tied, "d": other})
    verification = tp.verify({"b": tied, "d": other}, expected)
    assert verification.ok
    assert ties(verification) == ("a = b", "c = b")
    assert str(verification).endswith(
        "digests    ok            2 of 2 tensors as in the manifest\n"
        "ties       ok            Names on one side only, with equal values under another name: a = b, c = b\n"
        "structure  not possible  a mapping has no stored form; verify it against a manifest\n"
        "2 tensors, 32 B: matches the manifest."
    )
    assert verification.to_json()["checks"][1]["tensors"] == ["a = b", "c = b"]


def test_a_name_that_was_not_expected_passes_where_its_values_are_under_an_alias() -> None:
    tied = np.zeros(2)
    for known in ("a", "b"):
        verification = tp.verify({"a": tied, "b": tied}, tp.digest({known: tied.copy()}))
        assert verification.ok
        assert ties(verification) == (("b = a",) if known == "a" else ("a = b",))


def test_a_name_does_not_pass_where_the_values_under_its_alias_are_others() -> None:
    tied, other = np.zeros(2), np.ones(2)
    expected = tp.digest({"a": tied, "b": tied})
    assert found(tp.verify({"a": other}, expected)) == [("content", ("a",)), ("missing", ("b",))]
    assert found(tp.verify({"a": tied.astype("float32")}, expected)) == [("dtype", ("a",)), ("missing", ("b",))]
    alone = tp.digest({"a": tied})
    assert found(tp.verify({"a": other, "b": other}, alone)) == [("content", ("a",)), ("unexpected", ("b",))]


def test_equal_values_that_no_side_ties_are_no_excuse() -> None:
    zeros = np.zeros(2)
    assert found(tp.verify({"a": zeros}, tp.digest({"a": zeros, "b": zeros.copy()}))) == [("missing", ("b",))]
    assert found(tp.verify({"a": zeros, "b": zeros.copy()}, tp.digest({"a": zeros}))) == [("unexpected", ("b",))]
    assert found(tp.verify({"b": zeros}, tp.digest({"a": zeros}))) == [("unexpected", ("b",)), ("missing", ("a",))]


def test_an_alias_beyond_the_selection_counts() -> None:
    tied, other = np.zeros(2), np.ones(2)
    expected = tp.digest({"embed": tied, "head": tied, "norm": other})
    verification = tp.verify({"embed": tied, "norm": other}, expected, "head")
    assert verification.ok
    assert ties(verification) == ("head = embed",)
    assert found(tp.verify({"embed": other, "norm": other}, expected, "head")) == [("missing", ("head",))]
    assert tp.verify({"embed": tied, "head": tied}, tp.digest({"embed": tied}), "head").ok


@given(
    names=st.lists(st.sampled_from("abcdef"), min_size=1, unique=True),
    here=st.sets(st.sampled_from("abcdef"), min_size=1),
    same=st.booleans(),
)
def test_one_of_several_tied_names_stands_for_all(names: list[str], here: set[str], same: bool) -> None:
    tied = np.arange(3)
    expected = tp.digest(dict.fromkeys(names, tied))
    there = dict.fromkeys(sorted(here), tied if same else tied + 1)
    assert tp.verify(there, expected).ok == (same and not here.isdisjoint(names))


def test_a_tied_model_and_what_its_state_dict_is_saved_to_have_one_digest(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "norm": nn.LayerNorm(2), "head": nn.Linear(2, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    state = model.state_dict()
    file = written(tmp_path, saved(state))
    assert tp.digest(model).digest == tp.digest(state).digest == tp.digest(file).digest
    assert tp.digest(model).manifest()["version"] == 1
    one = {name: value for name, value in state.items() if name != "head.weight"}
    for x in (model, state, file):
        assert ties(tp.verify(x, tp.digest(one))) == ("head.weight = embed.weight",)
        assert ties(tp.verify(one, tp.digest(x))) == ("head.weight = embed.weight",)


def test_a_selector_chooses_in_both() -> None:
    expected = tp.digest({"x.a": np.zeros(1), "x.b": np.zeros(1), "y.a": np.zeros(1)})
    there = {"x.a": np.zeros(1), "y.a": np.ones(1), "y.c": np.zeros(1)}
    assert found(tp.verify(there, expected, "x.**")) == [("missing", ("x.b",))]
    assert found(tp.verify(there, expected, "x.b")) == [("missing", ("x.b",))]
    assert found(tp.verify(there, expected, "y.**")) == [("content", ("y.a",)), ("unexpected", ("y.c",))]
    assert tp.verify(there, expected, "x.a").ok
    with pytest.raises(NoMatch):
        tp.verify(there, expected, "x.a | z")
    assert tp.verify(there, expected, "x.a | z", strict=False).ok


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_byte_flipped_anywhere_is_found_and_named(data: st.DataObject, tmp_path_factory: Any) -> None:
    contents = bytearray(safetensors_bytes(ARRAYS))
    folder = tmp_path_factory.mktemp("flip")
    expected = tp.digest(written(folder, bytes(contents), "before.safetensors"))
    place = data.draw(st.integers(0, len(contents) - 1))
    contents[place] ^= data.draw(st.integers(1, 255))
    verification = tp.verify(written(folder, bytes(contents), "after.safetensors"), expected)
    assert not verification.ok or contents[place : place + 1].isspace()
    start = 8 + struct.unpack("<Q", contents[:8])[0]
    for name, array in ARRAYS.items():
        stop = start + len(element_bytes(array))
        if start <= place < stop:
            assert found(verification) == [("content", (name,))]
        start = stop


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_byte_flipped_in_a_storage_of_a_zip_is_named_with_its_member(
    data: st.DataObject, tmp_path_factory: Any
) -> None:
    first, second = to_torch(ARRAYS["a"]), to_torch(ARRAYS["b"])
    folder = tmp_path_factory.mktemp("flip")
    path = written(folder, saved({"a": first, "tied": first, "b": second, "part": second[1:3]}))
    params = tp.of(path)
    at = params.info(data.draw(st.sampled_from(["a", "b"]))).location
    assert at is not None
    contents = bytearray((folder / "model.pt").read_bytes())
    place = data.draw(st.integers(at.start, at.stop - 1))
    contents[place] ^= data.draw(st.integers(1, 255))
    before = tp.digest(path)
    verification = tp.verify(written(folder, bytes(contents), "after.pt"))
    failed = [check for check in verification.checks if check.outcome == "failed"]
    in_first = at == params.info("a").location
    assert [check.tensors for check in failed] == [("a", "tied") if in_first else ("b", "part")]
    assert failed[0].what == f"CRC-32 of archive/data/{0 if in_first else 1}"
    named = {name for _, names in found(tp.verify(str(folder / "after.pt"), before)) for name in names}
    assert named == ({"a", "tied"} if in_first else {"b", "part"} if 4 <= place - at.start < 12 else {"b"})


DAMAGED = {"a": to_torch(ARRAYS["a"]), "b": to_torch(ARRAYS["b"])}
WHOLE = {
    "model.pt": saved(DAMAGED),
    "deflated.pt": zipped(members_of(saved(DAMAGED)), deflate=True),
    "legacy.pt": saved(DAMAGED, legacy=True),
    "model.safetensors": safetensors_bytes(ARRAYS),
}


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_damage_of_any_kind_is_a_finding_and_no_error(data: st.DataObject, tmp_path_factory: Any) -> None:
    name = data.draw(st.sampled_from(sorted(WHOLE)))
    contents = bytearray(WHOLE[name])
    place = data.draw(st.integers(0, len(contents) - 1))
    contents[place] ^= data.draw(st.integers(1, 255))
    path = written(tmp_path_factory.mktemp("damage"), bytes(contents[: data.draw(st.integers(1, 10_000))]), name)
    for manifest in (None, tp.digest(DAMAGED)):
        verification = tp.verify(path, manifest)
        assert len(contents) == os.path.getsize(path) or not verification.ok
        assert str(verification).endswith(".")


# --- without one -----------------------------------------------------------------------------


def test_safetensors_has_no_checksums(tmp_path: Path) -> None:
    path = store(tmp_path, ARRAYS)
    size = os.path.getsize(path)
    told: list[tuple[int, int]] = []
    verification = tp.verify(path, progress=lambda done, total: told.append((done, total)))
    assert verification.ok
    assert told[-1] == (size, size)
    assert str(verification) == (
        f"{path} (safetensors)\n"
        "check                    result\n"
        "structure  ok            sizes and byte ranges of the safetensors file are consistent\n"
        f"reading    ok            {size} B read\n"
        "checksums  not possible  safetensors files have none; only a manifest can show whether values changed\n"
        "3 tensors, 48 B: no problem found."
    )
    one = tp.verify(path, None, "a", progress=lambda done, total: told.append((done, total)))
    assert (one.tensors, told[-1]) == (1, (24, 24))


def test_a_file_that_cannot_be_opened_is_a_finding(tmp_path: Path) -> None:
    path = written(tmp_path, safetensors_bytes(ARRAYS)[:-1], "cut.safetensors")
    expected = tp.digest(MemorySource(ARRAYS))
    for verification in (tp.verify(path), tp.verify(path, expected)):
        (check,) = verification.checks
        assert (check.what, check.outcome, verification.ok) == ("structure", "failed", False)
        assert check.detail.startswith("The file ends at byte")
    assert str(tp.verify(path)).endswith("\n0 tensors, 0 B: 1 check failed.")
    with pytest.raises(SourceError, match="No such file"):
        tp.verify(str(tmp_path / "nothing.pt"))


def test_the_crcs_of_a_zip(tmp_path: Path) -> None:
    tied = to_torch(ARRAYS["a"])
    contents = saved({"w": tied, "tied": tied, "x": to_torch(ARRAYS["b"])})
    for name, whole in (("stored.pt", contents), ("deflated.pt", zipped(members_of(contents), deflate=True))):
        path = written(tmp_path, whole, name)
        told: list[tuple[int, int]] = []
        verification = tp.verify(path, progress=lambda *counts, told=told: told.append(counts))
        assert verification.checks[1:-1] == (
            Check("CRC-32", "ok", f"{len(members_of(whole))} members of the zip match"),
        )
        assert verification.checks[-1] == Check(
            "pickle", "ok", "calls only safe functions of torch, numpy and the standard library"
        )
        assert told[-1][0] == told[-1][1] > 0
        assert str(verification).endswith("\n2 tensors, 44 B: all checks passed.")
        # Tensors that have their digests need no CRC.
        against = tp.verify(path, tp.digest(path))
        assert against.checks[-2] == Check("CRC-32", "ok", f"{len(members_of(whole)) - 2} members of the zip match")
        chosen = tp.verify(path, None, "w")
        assert chosen.checks[-2] == Check("CRC-32", "ok", "1 member of the zip match")


def test_a_damaged_member_is_named_with_its_tensors(tmp_path: Path) -> None:
    tied = to_torch(ARRAYS["a"])
    path = written(tmp_path, saved({"w": tied, "tied": tied, "x": to_torch(ARRAYS["b"])}))
    location = tp.of(path).info("w").location
    assert location is not None
    damaged = bytearray((tmp_path / "model.pt").read_bytes())
    damaged[location.start] ^= 1
    path = written(tmp_path, bytes(damaged), "damaged.pt")
    verification = tp.verify(path)
    (check,) = [check for check in verification.checks if check.outcome == "failed"]
    assert (check.what, check.tensors) == ("CRC-32 of archive/data/0", ("w", "tied"))
    assert check.detail.startswith("stored 0x")
    line = next(line for line in str(verification).split("\n") if line.startswith("CRC-32 of"))
    assert line == f"CRC-32 of archive/data/0  failed  {check.detail}: w, tied"
    assert str(verification).endswith("\n2 tensors, 44 B: 1 check failed.")


def test_damage_in_a_compressed_member_is_named(tmp_path: Path) -> None:
    arrays = {"w": sample("float32", (50, 50)), "x": sample("int8", (3,))}
    contents = saved({name: to_torch(array) for name, array in arrays.items()})
    path = written(tmp_path, zipped(members_of(contents), deflate=True))
    expected = tp.digest(path)
    source: Any = tp.of(path).source
    (at,) = [crc.location for crc in source.stored_crcs() if crc.member.endswith("data/0")]
    damaged = bytearray((tmp_path / "model.pt").read_bytes())
    damaged[at.start : at.start + 40] = b"\xff" * 40
    path = written(tmp_path, bytes(damaged), "damaged.pt")
    assert [c.tensors for c in tp.verify(path).checks if c.outcome == "failed"] == [("w",)]
    against = tp.verify(path, expected)
    assert found(against) == [("unreadable", ("w",))]
    assert "Its compressed contents are damaged" in str(against.differences[0].found)
    assert str(against).endswith("\n2 tensors, 9.77 KiB: 1 not readable, 1 check failed.")


def test_members_without_a_crc(tmp_path: Path) -> None:
    contents = saved({"w": to_torch(ARRAYS["a"]), "empty": torch.empty(0)})
    silenced = bytearray(contents)
    at = silenced.find(b"PK\1\2")
    members = 0
    while at >= 0:
        silenced[at + 16 : at + 20] = bytes(4)
        at = silenced.find(b"PK\1\2", at + 4)
        members += 1
    verification = tp.verify(written(tmp_path, bytes(silenced)))
    assert verification.ok
    # An empty member's CRC is 0.
    assert verification.checks[1:-1] == (
        Check("CRC-32", "ok", "1 member of the zip match"),
        Check("CRC-32", "not possible", f"{members - 1} members of the zip have no CRC-32"),
    )


def test_what_torch_writes_without_computing_a_crc_is_no_finding(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = written(tmp_path, saved({"w": to_torch(ARRAYS["a"])}))
    finally:
        torch.serialization.set_crc32_options(before)
    assert tp.verify(path).ok


def test_legacy_files_and_sources_in_memory(tmp_path: Path) -> None:
    path = written(tmp_path, saved({"w": to_torch(ARRAYS["a"])}, legacy=True))
    fine = [("structure", "ok"), ("reading", "ok"), ("checksums", "not possible"), ("pickle", "ok")]
    assert outcomes(tp.verify(path)) == fine
    for x in (nn.Linear(1, 1), {"w": np.zeros(1)}):
        assert outcomes(tp.verify(x)) == [("structure", "not possible")]
        assert not tp.verify(x).ok  # nothing was compared, so nothing passed
        assert str(tp.verify(x)).endswith("8 B: nothing was compared.")


def index(folder: Path, total: int | None, suffix: str = "safetensors") -> str:
    shards = {f"model-0000{i}-of-00002.{suffix}": [name] for i, name in enumerate(("a", "b"), 1)}
    for file, names in shards.items():
        arrays = {name: ARRAYS[name] for name in names}
        contents = saved({n: to_torch(a) for n, a in arrays.items()}) if suffix == "bin" else safetensors_bytes(arrays)
        written(folder, contents, file)
    metadata = {} if total is None else {"total_size": total}
    weight_map = {name: file for file, names in shards.items() for name in names}
    text = json.dumps({"metadata": metadata, "weight_map": weight_map})
    return written(folder, text.encode(), f"model.{suffix}.index.json")


def test_shards_and_their_index(tmp_path: Path) -> None:
    path = index(tmp_path, 44)
    assert outcomes(tp.verify(path)) == [
        ("index", "ok"), ("total_size", "ok"), ("structure", "ok"), ("reading", "ok"), ("checksums", "not possible")
    ]  # fmt: skip
    assert ("total_size", "not possible") in outcomes(tp.verify(index(tmp_path, None)))
    wrong = tp.verify(index(tmp_path, 45))
    assert Check("total_size", "failed", "its total_size is 45, but its tensors take 44 bytes") in wrong.checks
    assert not wrong.ok
    os.unlink(path)
    assert outcomes(tp.verify(tmp_path))[0] == ("shards", "ok")
    os.unlink(tmp_path / "model-00002-of-00002.safetensors")
    lost = tp.verify(tmp_path)
    assert lost.checks == (
        Check("structure", "failed", "1 of 2 shards are missing: 'model-00002-of-00002.safetensors'"),
    )


def test_the_crcs_of_shards(tmp_path: Path) -> None:
    path = index(tmp_path, 44, "bin")
    assert tp.verify(path).ok
    location = tp.of(path).info("b").location
    assert location is not None
    shard = tmp_path / "model-00002-of-00002.bin"
    damaged = bytearray(shard.read_bytes())
    damaged[location.start] ^= 255
    shard.write_bytes(damaged)
    assert [check.tensors for check in tp.verify(path).checks if check.outcome == "failed"] == [("b",)]


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(tmp_path, ARRAYS)

    def failing(*arguments: Any) -> int:
        raise OSError(5, "Input/output error")

    params = tp.of(path)
    monkeypatch.setattr(os, "preadv", failing)
    verification = tp.verify(params)
    monkeypatch.undo()
    expected = f"{path}, byte 0: the file cannot be read: Input/output error"
    assert verification.checks[1] == Check("reading", "failed", expected)


def test_json(tmp_path: Path) -> None:
    verification = tp.verify({"w": np.zeros(1)}, tp.digest({"w": np.zeros(1)}))
    assert verification.to_json() == {
        "source": "dict",
        "format": "mapping",
        "manifest": "dict",
        "ok": True,
        "tensors": 1,
        "nbytes": 8,
        "checks": [
            {"check": "digests", "outcome": "ok", "detail": "1 of 1 tensor as in the manifest", "tensors": []},
            {
                "check": "structure",
                "outcome": "not possible",
                "detail": "a mapping has no stored form; verify it against a manifest",
                "tensors": [],
            },
        ],
        "differences": [],
    }


# --- manifests as files ----------------------------------------------------------------------


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    tied = np.zeros((2, 3), np.float32)
    digests = tp.digest({"a": tied, "ä\n": tied, "b": np.zeros(())})
    path = tmp_path / "manifest.json"
    digests.write(path)
    back = Digests.read(path)
    assert (back.source, back.digest, back.tensors) == ("dict", digests.digest, digests.tensors)
    assert json.loads(path.read_text()) == digests.manifest()
    lines = path.read_text().split("\n")
    assert lines[:3] == ["{", '  "format": "torchparams manifest",', '  "version": 1,']
    assert sum('"name"' in line for line in lines) == 2
    tp.digest({}).write(path)
    assert Digests.read(path).tensors == {}
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_writing_replaces_a_manifest_and_nothing_else(tmp_path: Path) -> None:
    digests = tp.digest({"w": np.zeros(1)})
    model = store(tmp_path, ARRAYS)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(WriteError) as error:
        digests.write(model)
    assert str(error.value) == (f"{model}: The file exists, and is not a manifest. Delete it, or choose another name.")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    with pytest.raises(WriteError) as error:
        digests.write(tmp_path)
    assert str(error.value) == f"{tmp_path}: Not a regular file"
    with pytest.raises(WriteError, match="no such file or directory"):
        digests.write(tmp_path / "nowhere" / "manifest.json")
    empty = tmp_path / "empty"
    empty.touch()
    link = tmp_path / "link"
    link.symlink_to(empty)
    digests.write(link)  # the link alone is replaced, as by convert
    assert not link.is_symlink()
    assert Digests.read(link).digest == digests.digest
    assert empty.read_bytes() == b""
    mask = os.umask(0o027)
    try:
        digests.write(tmp_path / "new.json")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(os.stat(tmp_path / "new.json").st_mode) == 0o640


def test_a_failed_write_leaves_the_manifest_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    tp.digest({"w": np.zeros(1)}).write(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError) as error:
        tp.digest({"w": np.ones(1)}).write(path)
    assert str(error.value) == (
        f"{path}: Writing failed: no space left on device. "
        "The target is unchanged, and temporary files were removed. Free some space, or write elsewhere."
    )
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["manifest.json"]
    with pytest.raises(WriteError, match="JSON cannot store a name"):
        tp.digest({"\udcff": np.ones(1)}).write(path)
    assert path.read_bytes() == before


def good() -> dict[str, Any]:
    return tp.digest({"w": np.zeros((2, 3), np.float32), "x": np.zeros(1)}).manifest()


def changed(change: str) -> str:
    """A manifest in which one thing is changed."""
    manifest = good()
    scope = {"m": manifest, "t": manifest["tensors"][0]}
    exec(change, scope)
    return json.dumps(manifest)


HINT = "torchparams digest TARGET -o FILE writes a manifest; torchparams diff compares two checkpoints."

BAD: dict[str, tuple[str, str]] = {
    "no JSON": (
        "{",
        ", byte 1: The manifest is not JSON: expecting property name enclosed in double quotes, found its end",
    ),
    "an array": (
        "[{}]",
        ": Not a manifest: it starts with b'[{}]'. " + HINT,
    ),
    "something else": (
        '{"weight_map": {}}',
        ": Not a manifest: it has no format. " + HINT,
    ),
    "another format": (
        changed("m['format'] = 3"),
        ": Not a manifest: its format is the number 3. " + HINT,
    ),
    "a key twice": (
        json.dumps(good())[:-1] + ', "digest": ""}',
        ": The manifest has the key 'digest' twice",
    ),
    "a later version": (
        changed("m['version'] = 2"),
        ": Its version is the number 2; the supported version is 1. Verify with the torchparams version that "
        "wrote it, or write a new manifest.",
    ),
    "true for 1": (
        changed("m['version'] = True"),
        ": Its version is true; the supported version is 1. Verify with the torchparams version that wrote it, "
        "or write a new manifest.",
    ),
    "keys missing": (changed("del m['digest'], m['source']"), ": The manifest has no source and no digest"),
    "tensors as an object": (changed("m['tensors'] = {}"), ": Its tensors is an object, not an array"),
    "a tensor as a number": (changed("m['tensors'][1] = 5"), ": Entry 1 of its tensors is the number 5, not an object"),
    "a tensor without a shape": (changed("del t['shape']"), ": Entry 0 of its tensors has no shape"),
    "a name as a number": (
        changed("t['name'] = 1"),
        ": The name in entry 0 of its tensors is the number 1, not a text",
    ),
    "an unknown dtype": (changed("t['dtype'] = 'float5'"), ": tensor 'w': Unknown dtype 'float5'"),
    "a dtype as null": (changed("t['dtype'] = None"), ": tensor 'w': Its dtype is null, not a text"),
    "a negative size": (changed("t['shape'] = [-1]"), ": tensor 'w': The number -1 is not a size"),
    "a fraction": (changed("t['shape'] = [1.5]"), ": tensor 'w': The number 1.5 is not a size"),
    "sizes without end": (changed("t['shape'] = [1] * 1025"), ": tensor 'w': Its shape has 1,025 dimensions"),
    "sizes that overflow": (
        changed("t['shape'] = [2 ** 63, 2 ** 63]"),
        ": tensor 'w': Its nbytes is 24, but float32 [9223372036854775808, 9223372036854775808] takes more "
        "than 64 bits can count",
    ),
    "other bytes": (changed("t['nbytes'] = 25"), ": tensor 'w': Its nbytes is 25, but float32 [2, 3] takes 24"),
    "a digest too short": (
        changed("t['digest'] = 'ab'"),
        ": tensor 'w': Its digest is the text 'ab', not 64 hexadecimal digits",
    ),
    "aliases as a text": (changed("t['aliases'] = 'x'"), ": tensor 'w': Its aliases is the text 'x', not an array"),
    "an alias as a number": (
        changed("t['aliases'] = [1]"),
        ": tensor 'w': One of its aliases is the number 1, not a text",
    ),
    "a name twice": (changed("t['aliases'] = ['x']"), ": It lists the tensor 'x' twice"),
    "an edited digest": (
        changed("t['digest'] = '0' * 64"),
        ": The digest of the set does not match the tensors: the manifest was edited or damaged",
    ),
    "an edited name": (
        changed("t['name'] = 'v'"),
        ": The digest of the set does not match the tensors: the manifest was edited or damaged",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_manifest_that_is_none(tmp_path: Path, what: str) -> None:
    text, message = BAD[what]
    path = written(tmp_path, text.encode(), "manifest.json")
    with pytest.raises(FileFormatError) as error:
        tp.verify({"w": np.zeros(1)}, path)
    assert str(error.value) == f"{path}{message}"


def test_a_manifest_that_is_too_long_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchparams.limits.MANIFEST_BYTES", 10)
    path = written(tmp_path, json.dumps(good()).encode(), "manifest.json")
    with pytest.raises(LimitExceeded) as error:
        Digests.read(path)
    assert str(error.value) == (
        f"{path}: The manifest has {os.path.getsize(path)} bytes; the limit is 10. "
        "If you trust the file, raise torchparams.limits.MANIFEST_BYTES."
    )
    with pytest.raises(SourceError, match="No such file"):
        Digests.read(tmp_path / "nothing.json")


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_damaged_manifest_is_one_clear_error_or_means_the_same(data: st.DataObject, tmp_path_factory: Any) -> None:
    contents = bytearray(json.dumps(good()).encode())
    place = data.draw(st.integers(0, len(contents) - 1))
    contents[place] ^= data.draw(st.integers(1, 255))
    path = written(tmp_path_factory.mktemp("manifest"), bytes(contents), "manifest.json")
    try:
        read = Digests.read(path)
    except FileFormatError as error:
        assert str(error).startswith(path)
        assert "\n" not in str(error)
    else:
        assert {name: t.digest for name, t in read.tensors.items()} == {
            t["name"]: t["digest"] for t in good()["tensors"]
        }


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("kind", ["safetensors", "pt", "shards"])
def test_a_file_that_is_rewritten_meanwhile_is_reported(kind: str, with_manifest: bool, tmp_path: Path) -> None:
    weights = {f"l.{i}.w": np.full(1 << 18, i, np.float32) for i in range(4)}
    target = f"{tmp_path}/shards/" if kind == "shards" else f"{tmp_path}/model.{kind}"
    tp.convert(weights, target, max_shard_size=1 << 20 if kind == "shards" else None).run()
    file = Path(target) / "model-00004-of-00004.safetensors" if kind == "shards" else Path(target)
    manifest = tp.digest(target) if with_manifest else None
    assert tp.verify(target, manifest)

    def rewriting(done: int, total: int) -> None:
        contents = file.read_bytes()
        new = file.with_name("new")
        new.write_bytes(contents)
        os.utime(new, ns=(1, 1))
        new.replace(file)  # another file of the same size, as writers do it

    with pytest.raises(SourceError, match="The file changed"):
        tp.verify(target, manifest, progress=rewriting)

    def cutting(done: int, total: int) -> None:
        os.truncate(file, file.stat().st_size - 1)

    tp.convert(weights, target, overwrite=True, max_shard_size=1 << 20 if kind == "shards" else None).run()
    try:
        found = tp.verify(target, manifest, progress=cutting)
    except SourceError as error:
        assert "changed" in str(error)
    else:
        assert not found
        assert any("it had " in check.detail for check in found.checks)
