"""Malicious torch files: nothing runs, nothing is imported, and readable tensors are listed."""

from __future__ import annotations

import builtins
import contextlib
import copyreg
import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import torchparams as tp
from fake_infos import stored
from fuzz import fuzz_torch
from torch_files import (
    Payload,
    floats,
    ints,
    legacy_file,
    members_of,
    named,
    number,
    row,
    saved,
    storage,
    table,
    tensor,
    text,
    torch_zip,
    touch_command,
    whole,
    written,
    zipped,
)
from torchparams.cli.app import run
from torchparams.errors import FileFormatError, LimitExceeded, TorchParamsError, TruncatedFile
from torchparams.measure.flags import flags_of
from torchparams.measure.listing import tree_of
from torchparams.proposals import best_match
from torchparams.train.coverage import candidates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torchparams.parameters import Parameters

VALUES = {"0": floats(1, 2)}
FORMATS = ("zip", "legacy", "pickle")


def w(form: str) -> bytes:
    """A tensor [1, 2], as the format spells it."""
    if form == "pickle":
        array = pickle.dumps(np.array([1, 2], np.float32), 2)
        moved = bytearray(array)
        for op, _, at in pickletools.genops(array):
            if op.name in ("BINPUT", "BINGET"):
                moved[(at or 0) + 1] += 0x80  # away from the places that the payloads around it use
        return bytes(moved[2:-1])
    return tensor(storage("0", 2, view=b"N" if form == "legacy" else None), [2], [1])


def file_of(folder: Path, form: str, pickled: bytes) -> str:
    if form == "zip":
        return written(folder, torch_zip(pickled, VALUES), "a.pt")
    if form == "legacy":
        return written(folder, legacy_file(pickled, [("0", 2, VALUES["0"])]), "a.pt")
    return written(folder, pickled, "a.pkl")


def use(params: Parameters) -> None:
    """Everything that may be asked of a table."""
    repr(params)
    repr(params.metadata)
    for name in params:
        params.info(name)
        with contextlib.suppress(TorchParamsError):
            params.numpy(name)
        with contextlib.suppress(TorchParamsError):
            params[name]


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A path that every payload would make a file at, or write to."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "something of the file ran"


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would run or import something is a failure while the test runs."""

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"called with {args}")

    for name in ("system", "popen", "execv", "remove"):
        monkeypatch.setattr(os, name, never)
    monkeypatch.setattr(builtins, "eval", never)
    monkeypatch.setattr(pickle, "Unpickler", never)
    monkeypatch.setattr(pickle, "loads", never)
    monkeypatch.setattr(pickle, "load", never)


# --- payloads ----------------------------------------------------------------------------------------


def payloads(command: str) -> dict[str, bytes]:
    """Values whose unpickling by Python would run the command."""
    said = text(command)
    code = text(f"__import__('os').system({command!r})")
    system = named("os", "system")
    pieces = text("o") + text("s") + text("sys" + "tem")
    return {
        "os.system": system + row(said) + b"R",
        "posix.system": named("posix", "system") + row(said) + b"R",
        "eval": named("builtins", "eval") + row(code) + b"R",
        "exec of Python 2": named("__builtin__", "execfile") + row(code) + b"R",
        "INST": b"(" + said + b"ios\nsystem\n",
        "OBJ": b"(" + system + said + b"o",
        "NEWOBJ": system + row(said) + b"\x81",
        "NEWOBJ_EX": system + row(said) + b"}\x92",
        "STACK_GLOBAL": text("os") + text("system") + b"\x93" + row(said) + b"R",
        "STACK_GLOBAL with a dotted name": text("builtins") + text("eval.__call__") + b"\x93" + row(code) + b"R",
        "STACK_GLOBAL from pieces": named("operator", "add")
        + row(pieces[:6], pieces[6:12])
        + b"R"
        + b"0"
        + text("os")
        + text("system")
        + b"\x93"
        + row(said)
        + b"R",
        "a name that is computed": named("builtins", "getattr")
        + row(named("importlib", "import_module") + row(text("os")) + b"R", text("system"))
        + b"R"
        + row(said)
        + b"R",
        "nested reducers": named("builtins", "map")
        + row(system, b"](" + said + b"e")
        + b"R"
        + b"q\xe0"
        + b"0"
        + named("builtins", "list")
        + row(b"h\xe0")
        + b"R",
        "__setstate__": named("os", "system") + b")\x81" + said + b"b",
        "__setstate__ of an attribute": named("functools", "partial")
        + row(system)
        + b"R"
        + row(system, row(said), b"}", b"N")
        + b"b",
        "extension registry": b"\x82\xee" + row(said) + b"R",
        "extension registry, long": b"\x84\xee\x00\x00\x00" + row(said) + b"R",
        "persistent id": row(text("module"), system + row(said) + b"R", text("f"), text("s")) + b"Q",
        "a rebuild with a stranger inside": named("torch._tensor", "_rebuild_from_type_v2")
        + row(system, system, row(said), b"}")
        + b"R",
        "a rebuild within a rebuild": named("torch._tensor", "_rebuild_from_type_v2")
        + row(named("torch._tensor", "_rebuild_from_type_v2"), system, row(system, system, row(said), b"}"), b"}")
        + b"R",
        "a default factory": named("collections", "defaultdict") + row(system) + b"R",
        "a dtype of objects": named("numpy", "dtype") + row(text("O"), b"\x89", b"\x88") + b"R",
        "a codec": named("_codecs", "decode") + row(said, text("rot13")) + b"R",
        "torch.load of bytes": named("torch.storage", "_load_from_bytes")
        + row(b"C" + bytes([len(inner := whole(system + row(text("x")) + b"R"))]) + inner)
        + b"R",
        "compile and run": named("types", "FunctionType")
        + row(named("builtins", "compile") + row(code) + b"R", b"}")
        + b"R",
        "append to an object": system + row(said) + b"\x81(" + said + b"e",
        "set an item of an object": system + row(said) + b"\x81" + said + said + b"s",
        "a key": b"}" + system + row(said) + b"R" + number(1) + b"s",
    }


@pytest.mark.usefixtures("armed")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", payloads("x"))
def test_nothing_runs_and_the_tensors_are_listed(tmp_path: Path, canary: Path, form: str, name: str) -> None:
    copyreg.add_extension("os", "system", 0xEE)
    try:
        harm = payloads(touch_command(canary))[name]
        before = set(sys.modules)
        path = file_of(tmp_path, form, whole(table({"w": w(form), "harm": harm, "v": w(form)}), 4))
        params: Parameters | None = None
        try:
            params = tp.of(path)
        except FileFormatError as error:
            # The one payload that is a broken file: what torch would load in turn is not one of its files.
            assert (form, name) == ("pickle", "torch.load of bytes"), str(error)
        if params is not None:
            assert params.names[0] == "w"
            assert set(params.names) | set(params.info("w").aliases) >= {"w", "v"}
            assert params.numpy("w").tolist() == params.numpy("v").tolist() == [1, 2]
            use(params)
        strange = {"posix", "importlib", "types", "functools"}
        assert not {m for m in set(sys.modules) - before if not m.startswith(("torch", "numpy", "ml_dtypes"))} & strange
    finally:
        copyreg.remove_extension("os", "system", 0xEE)


def test_the_payloads_would_run_in_python_s_own_unpickler(tmp_path: Path) -> None:
    """Otherwise the tests above would prove nothing."""
    for name in ("os.system", "eval", "STACK_GLOBAL", "INST", "a name that is computed"):
        path = tmp_path / "ran"
        with contextlib.suppress(Exception):  # many end in an error after they have run
            pickle.loads(whole(payloads(touch_command(path))[name], 4))
        assert path.exists(), name
        path.unlink()


@pytest.mark.parametrize("legacy", [False, True])
def test_payloads_beside_a_model_are_named(tmp_path: Path, canary: Path, legacy: bool) -> None:
    thing = {"w": torch.ones(2), "hook": Payload(os.system, touch_command(canary)), "eval": Payload(eval, "1+1")}
    params = tp.of(written(tmp_path, saved(thing, legacy=legacy)))
    assert params.names == ["w"]
    assert params.metadata["hook"].startswith(f"{os.system.__module__}.system('touch ")
    assert params.metadata["eval"].endswith(".eval('1+1')")


def test_a_tensor_given_to_a_payload_is_listed(tmp_path: Path, canary: Path) -> None:
    harm = named("os", "system") + row(text(touch_command(canary)), w("zip")) + b"R" + table({"again": w("zip")}) + b"b"
    params = tp.of(file_of(tmp_path, "zip", whole(table({"x": harm}))))
    assert params.names == ["x.again"]
    assert params.info("x.again").aliases == ("x.args.1",)
    assert params.metadata["x"] == "an object of os.system, not built"


def test_no_module_that_the_file_names_is_imported(tmp_path: Path) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    harm = named("trap", "Trap") + b")\x81" + table({"a": number(1)}) + b"b"
    path = file_of(tmp_path, "zip", whole(table({"w": w("zip"), "harm": harm})))
    code = f"import torchparams as tp\nparams = tp.of({path!r})\nprint(params, dict(params.metadata))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{tmp_path}{os.pathsep}src"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "trap.Trap(a=1)" in done.stdout


# --- what never ends, or has no bottom -----------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_recursive_pickles(tmp_path: Path, form: str) -> None:
    cycle = b"}q\x01(" + text("w") + w(form) + text("self") + b"h\x01u"
    params = tp.of(file_of(tmp_path, form, whole(cycle)))
    assert params.names == ["w"]
    assert params.metadata["self"] == "refers back to the top"
    use(params)
    loop = b"]q\x01(h\x01h\x01e"
    params = tp.of(file_of(tmp_path, form, whole(table({"loop": loop, "w": w(form)}))))
    assert params.names == ["w"]
    use(params)


@pytest.mark.parametrize("form", FORMATS)
def test_deep_pickles(tmp_path: Path, form: str) -> None:
    depth = 100_000
    for deep in (b"]" * depth + b"a" * (depth - 1), b"N" + b"\x85" * depth, b"cos\nsystem\n" + b")R" * depth):
        params = tp.of(file_of(tmp_path, form, whole(table({"deep": deep, "w": w(form)}))))
        assert params.names == ["w"]
        use(params)
    bottom = whole(b"]" * depth + w(form) + b"a" * depth)
    with pytest.raises(LimitExceeded, match="Tensors are nested deeper than 1,000 levels"):
        tp.of(file_of(tmp_path, form, bottom))


@pytest.mark.parametrize("form", FORMATS)
def test_a_pickle_that_doubles_itself(tmp_path: Path, form: str) -> None:
    laughs = b"](" + number(1) + b"e" + b"".join(b"q\x01" + b"0](h\x01h\x01e" for _ in range(60))
    params = tp.of(file_of(tmp_path, form, whole(table({"w": w(form), "laughs": laughs}))))
    assert params.names == ["w"]
    use(params)
    lists = b"](" + w(form) + b"e" + b"".join(b"q\x01" + b"0](h\x01h\x01e" for _ in range(60))
    with pytest.raises(LimitExceeded, match="Shared parts give its tensors too many or too long names"):
        tp.of(file_of(tmp_path, form, whole(lists)))


@pytest.mark.parametrize("form", FORMATS)
def test_a_pickle_that_hardly_ends(tmp_path: Path, form: str) -> None:
    endless = whole(table({"w": w(form)}) + b"N0" * 1_500_000)
    with pytest.raises(LimitExceeded, match="The pickle runs more operations than a file of its size may"):
        tp.of(file_of(tmp_path, form, endless))


def test_keys_chosen_to_collide(tmp_path: Path) -> None:
    modulus = (1 << 61) - 1  # of Python's hash of integers
    count = 20_000
    keys = b"".join(b"\x8a\x0a" + (modulus * i).to_bytes(10, "little") + b"N" for i in range(1, count))
    tuples = b"".join(b"\x8a\x0a" + (modulus * i).to_bytes(10, "little") + b"\x85N" for i in range(1, count))
    pickled = whole(table({"w": w("zip"), "keys": b"}(" + keys + b"u", "tuples": b"}(" + tuples + b"u"}))
    path = file_of(tmp_path, "zip", pickled)
    with fuzz_torch.watched():
        assert tp.of(path).names == ["w"]


NUMBERED = [{-1: 0, -2: 0}, {0.5: 0}, {2.0: 0}, {True: 0}, {1j: 0}, {(1, 2): 0}, {1 << 70: 0}, {float("inf"): 0}]


@pytest.mark.parametrize("keyed", NUMBERED, ids=repr)
def test_no_dict_is_keyed_by_numbers_of_the_file(tmp_path: Path, keyed: dict[Any, int]) -> None:
    with pytest.raises(AssertionError, match="a dict is keyed by numbers of the file"):
        fuzz_torch.refuse_number_keys([keyed])
    for legacy in (False, True):
        path = written(tmp_path, saved({"w": torch.ones(1), "keyed": keyed}, legacy=legacy))
        with fuzz_torch.watched():
            assert tp.of(path).names == ["w"]


class Colliding(int):
    """A size of which every hash collides, as a file can choose sizes; it counts what it is compared with."""

    compared = 0

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        Colliding.compared += 1
        return int(self) == other


def test_shapes_chosen_to_collide_are_keys_of_nothing() -> None:
    count = 300
    infos = {f"l{i}.weight": stored(f"l{i}.weight", (Colliding(i + 1), Colliding(2))) for i in range(count)}
    others = {f"m{i}.weight": stored(f"m{i}.weight", (Colliding(i + 1), Colliding(2))) for i in range(count)}
    Colliding.compared = 0
    assert len(best_match(infos, others)) == count
    ours, theirs = ({name: info.shape for name, info in side.items()} for side in (infos, others))
    candidates(ours, theirs)
    tree_of(infos.values())
    (row,) = tp.stats({"w": np.ones(2)}).rows
    flags_of([row._replace(name=name, shape=info.shape) for name, info in infos.items()])
    assert Colliding.compared < 20 * count


def test_long_texts_used_again_and_again(tmp_path: Path) -> None:
    long = text("é" * 500_000) + b"q\x01"
    other = text("é" * 500_000) + b"q\x02"
    dict_ = b"}" + (b"h\x01Ns" + b"h\x02Ns") * 20_000
    encode = named("_codecs", "encode") + b"q\x03" + text("latin1") + b"q\x04"
    encoded = b"(" + b"h\x03h\x01h\x04\x86R" * 5_000 + b"t"
    classes = b"(" + b"h\x01h\x02\x93" * 5_000 + b"t"
    parts = {"long": long, "other": other, "dict": dict_, "encode": row(encode), "bytes": encoded, "classes": classes}
    path = file_of(tmp_path, "zip", whole(table({"w": w("zip"), **parts}), 4))
    size = os.path.getsize(path)
    with allocating_at_most(4 * size + (16 << 20)):
        params = tp.of(path)
    assert params.names == ["w"]
    use(params)


# --- sizes that are not there ------------------------------------------------------------------------


@contextlib.contextmanager
def allocating_at_most(nbytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= nbytes, f"{peak:,} bytes were allocated"


HUGE: dict[str, Callable[[str], bytes]] = {
    "bytes": lambda form: b"B\xff\xff\xff\xff",
    "bytes of 64 bits": lambda form: b"\x8e" + struct.pack("<Q", 1 << 62),
    "text": lambda form: b"X\xff\xff\xff\xff",
    "an integer": lambda form: b"\x8b\xff\xff\xff\x7f",
    "a memo index": lambda form: b"Nr\xff\xff\xff\xff",
    "a memo index as text": lambda form: b"Np4294967295\n",
    "a storage": lambda form: tensor(storage("0", 1 << 50, view=b"N" if form == "legacy" else None), [2], [1]),
    "a shape": lambda form: tensor(storage("0", 2, view=b"N" if form == "legacy" else None), [1 << 40], [1]),
    "a stride": lambda form: tensor(storage("0", 2, view=b"N" if form == "legacy" else None), [2], [1 << 62]),
    "an array": lambda form: (
        named("numpy.core.multiarray", "_reconstruct")
        + row(named("numpy", "ndarray"), row(number(0)), b"C\x01b")
        + b"R"
        + row(number(1), ints([1 << 40]), named("numpy", "dtype") + row(text("f8")) + b"R", b"\x89", b"C\x01\x00")
        + b"b"
    ),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", HUGE)
def test_declared_sizes_allocate_nothing(tmp_path: Path, form: str, name: str) -> None:
    path = file_of(tmp_path, form, whole(table({"w": w(form), "huge": HUGE[name](form)}), 4))
    with contextlib.suppress(TorchParamsError):  # once before counting, for what is imported on the way
        use(tp.of(path))
    with allocating_at_most(1 << 20), contextlib.suppress(TorchParamsError):
        use(tp.of(path))


def test_a_legacy_count_beyond_the_file(tmp_path: Path) -> None:
    pickled = whole(table({"w": tensor(storage("0", 1 << 55, view=b"N"), [2], [1])}))
    with pytest.raises(TruncatedFile, match="within the storage '0', which takes bytes"):
        tp.of(written(tmp_path, legacy_file(pickled, [("0", 1 << 55, b"")])))


def test_compressed_bombs(tmp_path: Path) -> None:
    contents = zipped(
        {
            "archive/data.pkl": whole(table({"w": tensor(storage("0", 1 << 22), [1 << 22], [1])})),
            "archive/data/0": bytes(4 << 22),
        },
        deflate=True,
    )
    path = written(tmp_path, contents)
    assert len(contents) < 50_000
    tp.of(path)
    with allocating_at_most(1 << 20):
        assert tp.of(path).info("w").nbytes == 4 << 22


# --- every cut and every bit -------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_cut_at_every_byte(tmp_path: Path, form: str) -> None:
    whole_file = {
        "zip": lambda: saved({"w": torch.ones(2)}),
        "legacy": lambda: saved({"w": torch.ones(2)}, legacy=True),
        "pickle": lambda: pickle.dumps({"w": np.ones(2)}),
    }[form]()
    for size in range(1, len(whole_file)):
        path = written(tmp_path, whole_file[:size], "cut.pkl" if form == "pickle" else "cut.pt")
        with pytest.raises(TruncatedFile) as caught:
            tp.of(path)
        assert str(caught.value).startswith(path)


@pytest.mark.parametrize("form", FORMATS)
def test_every_bit_of_a_small_file(tmp_path: Path, form: str) -> None:
    """Whatever one flipped bit makes of a file, it is a table or one clear error."""
    contents = {
        "zip": torch_zip(whole(table({"w": w("zip")})), VALUES),
        "legacy": legacy_file(whole(table({"w": w("legacy")})), [("0", 2, VALUES["0"])]),
        "pickle": whole(table({"w": w("pickle")})),
    }[form]
    for place in range(len(contents)):
        for bit in range(0, 8, 1 + (len(contents) > 600)):
            changed = bytearray(contents)
            changed[place] ^= 1 << bit
            fuzz_torch.attempt(tmp_path, bytes(changed), form)


@pytest.mark.parametrize("reader", fuzz_torch.READERS)
def test_some_mutated_inputs(reader: str) -> None:
    tried, taken = fuzz_torch.run(reader, 300, seed=1)
    assert tried == 300
    assert taken > 10  # or it would only test how files are refused


def test_the_fuzzer_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = members_of(saved({"w": torch.ones(2)}))
    assert contents
    monkeypatch.setattr(fuzz_torch, "look", lambda source, draw: bytes(64 << 20))
    with pytest.raises(AssertionError, match="bytes allocated for an input of"):
        fuzz_torch.attempt(tmp_path, saved({"w": torch.ones(2)}), "zip")
    empty: dict[str, int] = {}
    monkeypatch.setattr(fuzz_torch, "look", lambda source, draw: empty["x"])
    with pytest.raises(KeyError):
        fuzz_torch.attempt(tmp_path, saved({"w": torch.ones(2)}), "zip")


# --- a zip says everything twice ---------------------------------------------------------------------


def small_zip(*, deflate: bool) -> bytes:
    things = {"archive/data.pkl": whole(table({"w": w("zip")})), "archive/data/0": VALUES["0"], "archive/é": b"x"}
    return zipped(things, deflate=deflate)


def local_header(contents: bytes, name: str) -> int:
    with zipfile.ZipFile(io.BytesIO(contents)) as archive:
        return archive.getinfo(name).header_offset


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("change", [1, 0x20, 0x40, 0xFF])
def test_what_zipfile_rejects_is_not_called_well(tmp_path: Path, deflate: bool, change: int) -> None:
    contents = small_zip(deflate=deflate)
    path = tmp_path / "model.pt"
    path.write_bytes(contents)
    assert tp.verify(path).ok
    assert fuzz_torch.zipfile_takes(contents)
    rejected = 0
    for at in range(len(contents)):
        changed = bytearray(contents)
        changed[at] ^= change
        path.write_bytes(changed)
        rejected += not fuzz_torch.zipfile_takes(bytes(changed))
        assert not fuzz_torch.verified_wrongly(path, bytes(changed)), f"byte {at}"
    assert rejected > 200


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (6, 1, "'archive/data/0' is encrypted according to its own header"),
        (6, 0x40, "'archive/data/0' is encrypted according to its own header"),
        (6, 0x20, "'archive/data/0' is patched according to its own header"),
        (7, 0x20, "'archive/data/0' is masked according to its own header"),
        (14, 0x01, "'archive/data/0' has the CRC-32 0x"),
    ],
)
def test_a_local_header_that_contradicts_the_directory(tmp_path: Path, at: int, value: int, message: str) -> None:
    contents = bytearray(small_zip(deflate=False))
    place = local_header(bytes(contents), "archive/data/0") + at
    contents[place] ^= value
    path = written(tmp_path, bytes(contents))
    params = tp.of(path)
    assert params.names == ["w"]  # listing it harms nobody
    verbs: list[Callable[[], object]] = [
        lambda: params.numpy("w"),
        lambda: params["w"],
        lambda: tp.stats(path),
        lambda: tp.digest(path),
        lambda: tp.convert(path, tmp_path / "out.safetensors").run(),
        lambda: tp.diff(path, path, numeric=True),
    ]
    for verb in verbs:
        with pytest.raises(FileFormatError) as caught:
            verb()
        assert str(caught.value).startswith(f"{path}: {message}")
    (check,) = (check for check in tp.verify(path).checks if check.what == "structure")
    assert check.outcome == "failed"
    assert check.detail.startswith(message)


def test_a_local_name_that_only_begins_as_in_the_directory(tmp_path: Path) -> None:
    contents = small_zip(deflate=False)
    at = local_header(contents, "archive/data/0")
    longer = bytearray(contents)
    longer[at + 26] += 4  # the name takes four bytes of the contents
    with pytest.raises(FileFormatError, match="There is no 'archive/data/0' at byte"):
        tp.of(written(tmp_path, bytes(longer)))
    other = contents.replace("é".encode(), "è".encode(), 1)
    (check, *_) = tp.verify(written(tmp_path, other)).checks
    assert (check.what, check.outcome) == ("structure", "failed")
    assert check.detail.startswith("There is no 'archive/é' at byte")


# --- elements far beyond the bytes behind them -------------------------------------------------------


def beyond(kind: str) -> bytes:
    """A small file of a tensor `w` with more elements than anybody has time for, and of a sound one `v`."""
    sizes = {
        "expanded": ([1 << 40], [0]),
        "of a few gigabytes": ([1 << 29], [0]),
        "overlapping rows": ([1 << 20, 1 << 20], [1, 1]),
        "windows": ([1 << 11] * 3, [1, 1, 1]),
    }
    kept = storage("0", 1 << 21) if kind == "overlapping rows" else storage("0", 1 << 13)
    values = {"0": bytes(1 << 23) if kind == "overlapping rows" else bytes(1 << 15), "1": floats(1, 2)}
    things = {"v": tensor(storage("1", 2), [2], [1])}
    if kind == "many views":
        things |= {f"w{i}": tensor(kept, [1 << 10, 1 << 11], [1 + i % 4, 1], i) for i in range(300)}
    elif kind == "many plain views":
        kept, values["0"] = storage("0", 1 << 19), bytes(1 << 21)
        things |= {f"w{i}": tensor(kept, [(1 << 19) - i], [1], i) for i in range(700)}
    else:
        things["w"] = tensor(kept, *sizes[kind])
    return torch_zip(whole(table(things)), values)


KINDS = ("expanded", "of a few gigabytes", "overlapping rows", "windows", "many views", "many plain views")


@pytest.mark.parametrize("kind", KINDS)
def test_elements_far_beyond_the_bytes_are_refused_by_every_verb(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, beyond(kind))
    out = tmp_path / "out.safetensors"
    name = "w3" if kind.startswith("many") else "w"
    params = tp.of(path)
    assert {"v", name} <= set(params.names)
    target = torch.nn.Module()
    target.register_buffer("v", torch.zeros(2))
    target.register_buffer(name, torch.zeros(1))
    strict: list[Callable[[], object]] = [
        lambda: params.numpy(name),
        lambda: params[name],
        lambda: tp.digest(path),
        lambda: tp.convert(path, out),
        lambda: tp.convert(path, tmp_path / "out.pt"),
        lambda: tp.merge([path, path], out),
        lambda: tp.save(params, out),
    ]
    with allocating_at_most(32 << 20):
        for verb in strict:
            with pytest.raises(LimitExceeded, match=r"which are a view of|views of"):
                verb()
        found = tp.stats(path)
        assert found["v"].mean == 1.5
        assert name in {each.name for each in found.unread}
        assert tp.diff(path, path, numeric=True).to_json()
        checked = tp.verify(path)
    assert not checked.ok
    assert [check.outcome for check in checked.checks if check.what == "structure"] == ["failed"]
    assert not out.exists()
    assert run(["convert", path, str(out)]) == 2


@pytest.mark.parametrize("bit", ["conj", "neg"])
def test_conjugates_and_negatives_are_made_block_by_block(tmp_path: Path, bit: str) -> None:
    base = torch.arange(1, 1 + (1 << 23)).to(torch.complex64) * (1 + 2j)
    turned = base.conj() if bit == "conj" else torch._neg_view(base)
    path = written(tmp_path, saved({"w": turned}))
    plain = written(tmp_path, saved({"w": turned.resolve_conj().resolve_neg().contiguous()}), "plain.pt")
    out = tmp_path / "out.safetensors"
    tp.stats(plain)
    with allocating_at_most(48 << 20):  # the tensor takes 64 MiB
        assert tp.digest(path).tensors["w"].digest == tp.digest(plain).tensors["w"].digest
        assert tp.stats(path)["w"].l2 == tp.stats(plain)["w"].l2
        assert tp.diff(path, plain).same
        tp.convert(path, out).run()
    assert tp.diff(out, plain).same
    assert np.array_equal(tp.of(path).numpy("w"), tp.of(plain).numpy("w"))


def test_what_a_few_bytes_inflate_to_is_limited(tmp_path: Path) -> None:
    things = {"w": torch.zeros(24 << 20), "v": torch.ones(2)}
    path = written(tmp_path, zipped(members_of(saved(things)), deflate=True))
    assert os.path.getsize(path) < 1 << 20
    params = tp.of(path)
    assert params.names == ["w", "v"]
    with allocating_at_most(16 << 20):
        for verb in (lambda: params.numpy("w"), lambda: tp.digest(path), lambda: tp.convert(path, tmp_path / "o.pt")):
            with pytest.raises(LimitExceeded, match=r"the tensors inflate from .* and the limit is 64-fold"):
                verb()
        assert {each.name for each in tp.stats(path).unread} == {"w", "v"}
        assert not tp.verify(path).ok
    random = {"w": torch.randn(1 << 16), "zeros": torch.zeros(1 << 20)}
    path = written(tmp_path, zipped(members_of(saved(random)), deflate=True))
    assert tp.verify(path).ok
    assert tp.stats(path)["zeros"].zeros == 1 << 20
