"""Pickles that would run code are reported; classes of other packages alone are not."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import math
import os
import pathlib
import pickle
import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import torchparams as tp
from command import command
from torch_files import saved, torch_zip, written
from torchparams.errors import FileFormatError
from torchparams.sources.torchfile.verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Captured = pytest.CaptureFixture[str]


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any] | Call, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def verdict_of(tmp_path: Path, thing: object, *, protocol: int = 2) -> Verdict:
    path = written(tmp_path, saved({"w": torch.ones(2), "x": thing}, protocol=protocol))
    found = tp.of(path).source.verdict
    assert found is not None
    return found


HARMLESS: list[Any] = [
    {"epoch": 3, "best": 0.5, "names": ("a", "b"), "all": {1, 2}, "raw": b"\xff", "z": 1j},
    collections.OrderedDict(a=1), collections.defaultdict(list), collections.Counter("ab"), collections.deque([1]),
    np.float32(2), np.ones(2), np.dtype("f4"), np.random.default_rng(0), np.random.RandomState(0), np.ma.ones(2),
    torch.Size([1]), torch.device("cpu"), torch.float16, torch.ones(2).to_sparse(), nn.Parameter(torch.ones(2)),
    nn.Linear(2, 2), nn.TransformerEncoderLayer(4, 2, activation=nn.functional.gelu), math.sqrt, print, int,
    argparse.Namespace(lr=1), pathlib.PurePosixPath("a"), datetime.timedelta(1), functools.partial(int, base=2),
    slice(3), Exception("a"), torch.optim.SGD([torch.ones(1)], lr=1),
]  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_checkpoints_hold_is_no_alarm(tmp_path: Path, protocol: int) -> None:
    for thing in HARMLESS:
        assert verdict_of(tmp_path, thing, protocol=protocol) == Verdict(), thing


def test_a_class_of_another_package_is_listed_without_alarm(tmp_path: Path, capsys: Captured) -> None:
    class_name = f"{__name__}.Config"
    found = verdict_of(tmp_path, Config())
    assert (found.classes, found.alarm) == ((class_name,), None)
    path = tmp_path / "model.pt"
    ran = command(capsys, "verify", path)
    assert ran.status == 0
    assert (
        f"calls only safe functions of torch, numpy and the standard library; needs the classes {class_name}" in ran.out
    )
    assert command(capsys, "ls", path).out.splitlines()[-1] == f"the pickle needs the classes {class_name}"


class Config:
    def __init__(self) -> None:
        self.dim = 3


EXECUTING: dict[str, tuple[Any, str]] = {
    "system": (Call(os.system, "true"), "calls posix.system"),
    "eval": (Call(eval, "1"), "calls __builtin__.eval"),
    "Popen": (Call(subprocess.Popen, ["true"]), "calls commands.Popen"),
    "load": (Call(torch.load, "x.pt"), "calls torch.serialization.load"),
    "getattr and a call": (Call(Call(getattr, Config, "dim"), 1), "calls the result of a call"),
    "through torch": (
        Call(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, ("true",), {}),
        "calls posix.system",
    ),
    "named": ({"function": os.system}, "names posix.system"),
    "within a list": ([[Call(os.system, "true")]], "calls posix.system"),
    "of a package": (Call(pytest.main, ["x"]), "calls _pytest.config.main"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", EXECUTING)
def test_a_call_is_named(tmp_path: Path, capsys: Captured, kind: str, legacy: bool) -> None:
    thing, said = EXECUTING[kind]
    if kind == "getattr and a call":
        thing = pickled_call_of_a_result()
        path = written(tmp_path, torch_zip(thing, {"0": bytes(8)}))
    else:
        path = written(tmp_path, saved({"w": torch.ones(2), "x": thing}, legacy=legacy))
    ran = command(capsys, "verify", path)
    assert ran.status == 1
    assert f"{said}: do not unpickle" in ran.out
    assert "1 check failed" in ran.out
    ran = command(capsys, "ls", path)
    assert ran.status == 0
    assert f"the pickle {said}: do not unpickle" in ran.out.splitlines()
    form = command(capsys, "ls", path, "--json").json["pickle"]
    assert sum(map(len, (form["calls"], form["names"]))) >= 1


def pickled_call_of_a_result() -> bytes:
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI2\ntQI0\n(I2\nt(I1\nt"
    )
    tensor += b"I00\nccollections\nOrderedDict\n(tRtR"
    return b"\x80\x02}(X\1\0\0\0w" + tensor + b"X\1\0\0\0xc__builtin__\ngetattr\n(cmylib\nThing\nS'run'\ntR(I1\ntRu."


def test_a_call_whose_result_is_thrown_away_is_named(tmp_path: Path) -> None:
    contents = b"\x80\x02cposix\nsystem\n(S'true'\ntR0}X\1\0\0\0wK\1s."
    with pytest.raises(FileFormatError, match=r"it is a dict of 1 item\. It calls posix\.system: do not unpickle\.$"):
        tp.of(written(tmp_path, torch_zip(contents)))


@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".bin", ""])
@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_a_bare_pickle_of_any_protocol(tmp_path: Path, capsys: Captured, protocol: int, suffix: str) -> None:
    path = written(tmp_path, pickle.dumps(Call(os.system, "true"), protocol), f"a{suffix}")
    ran = command(capsys, "verify", path)
    assert ran.status == 1
    assert "calls posix.system: do not unpickle" in ran.out
    assert command(capsys, "ls", path).err == (
        f"torchparams: {path}: The pickle contains no tensors and no numeric arrays: it is posix.system('true'). "
        "It calls posix.system: do not unpickle.\n"
    )


def test_a_pickle_that_breaks_after_the_call(tmp_path: Path, capsys: Captured) -> None:
    for contents in (b"\x80\x02cposix\nsystem\n(S'true'\ntRR.", b"\x80\x02cposix\nsystem\n(S'true'\ntR"):
        path = written(tmp_path, contents, "a.pkl")
        ran = command(capsys, "verify", path)
        assert ran.status == 1
        assert "Before that it calls posix.system: do not unpickle" in ran.out


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path, legacy: bool) -> None:
    with pytest.raises(FileFormatError, match=r"The checkpoint contains no tensors .*: it is a dict of 2 items$"):
        tp.of(written(tmp_path, saved({"epoch": 3, "lr": 0.1}, legacy=legacy)))
    assert len(tp.of(written(tmp_path, saved(nn.ReLU().state_dict(), legacy=legacy)))) == 0


@pytest.mark.parametrize(
    ("module", "name"),
    [("torch.utils.collect_env", "subprocess.Popen"), ("torch", "os.system"), ("torch.testing", "Popen")],
)
def test_a_function_that_another_module_imports(tmp_path: Path, module: str, name: str) -> None:
    contents = pickle.dumps({"w": np.ones(2)}, 4)[:-1]
    call = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93\x8c\4true\x85R0"
    path = written(tmp_path, contents + call + b".", "a.pkl")
    found = tp.of(path).source.verdict
    assert found is not None
    assert found.alarm == f"calls {module}.{name}: do not unpickle"


def test_an_embedded_pickle_is_judged_too(tmp_path: Path) -> None:
    class Embedded:
        def __reduce__(self) -> Any:
            return torch.storage._load_from_bytes, (saved(Call(os.system, "true"), legacy=True),)

    path = written(tmp_path, pickle.dumps({"w": np.ones(2), "x": Embedded()}), "a.pkl")
    with pytest.raises(FileFormatError, match=r"calls posix\.system: do not unpickle"):
        tp.of(path)


def test_shards_are_judged_together(tmp_path: Path) -> None:
    for number, thing in enumerate((Config(), Call(os.system, "true")), 1):
        name = f"pytorch_model-0000{number}-of-00002.bin"
        written(tmp_path, saved({f"w{number}": torch.ones(2), f"x{number}": thing}), name)
    found = tp.of(tmp_path).source.verdict
    assert found == Verdict(("posix.system",), (), (f"{__name__}.Config",))
