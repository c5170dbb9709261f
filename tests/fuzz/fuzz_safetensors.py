"""Mutated safetensors files and indexes: none may crash, hang, or make the reader allocate more than its size asks for.

    python tests/fuzz/fuzz_safetensors.py [inputs for each reader]

The safetensors reader is also held against the format's own library: what ours takes, theirs takes with the same
tensors; what only theirs takes is refused for one of the reasons that the reader's documentation names.
"""

from __future__ import annotations

import importlib
import json
import random
import re
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors

import torchparams as tp
from torchparams.errors import NotReadable, TorchParamsError
from torchparams.sources import safetensors as _safetensors
from torchparams.sources import sharded as _sharded
from torchparams.sources.opening import FORMATS
from torchparams.testing import MemorySource, element_bytes, safetensors_bytes, sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torchparams.sources.base import Source

SLACK = 1 << 20
"""Bytes that opening and reading a file of any size may take, beside twice its own."""

SECONDS = 20
"""After which an input counts as one that hangs."""

STRICTER = re.compile(
    r"twice|overflows 64 bits|__metadata__ is null|its entry is an array|its dtype is an object|of \d+ characters"
    r"|has the number -0|is not JSON: invalid \\uXXXX|lone surrogate|overflows float64"
    r"|more than tensors need"
)
"""The reasons for which ours refuses what the reference takes."""

TOKENS: tuple[bytes, ...] = (
    b"-1", b"0", b"1", b"-0", b"1.0", b"1e0", b"255", b"4294967296", b"9223372036854775807", b"18446744073709551615",
    b"18446744073709551616", b"9" * 60, b"true", b"false", b"null", b"NaN", b"Infinity", b'""', b'"a"', b"[]", b"{}",
    b"../", b"[[[[[[[[", b'{"a":', b'"dtype":"F4"', b'"dtype":"F6_E2M3"', b'"dtype":"BOOL"', b'"shape":[0]',
    b'"shape":[]', b'"data_offsets":[0,0]', b'"__metadata__":{"a":"b"},', b'"__metadata__":', b'"weight_map":',
    b"\\ud800", b"\\u0061", b"\\", b'"', b",", b":", b" ", b"\n", b"\0", b"\xff", b"\xc3\xa9",
    b"/", b"model-00001-of-00002.safetensors",
)  # fmt: skip


VALUES: tuple[object, ...] = (
    0, 1, -1, 2.5, True, None, "F32", "I8", "F4", "x", [], [0], [1], [2, 3], [0, 4], [4, 0], [0, 24], [24, 32],
    [1, True], [0, 1 << 40, 1 << 40], [1 << 40, 1 << 40], [1 << 63], [(1 << 64) - 1], [1 << 64], [-1, -1], ["a"],
    [1 << 30, "a"], [[0]], {}, {"a": "b"}, {"a": 1}, [1] * 65, [2] * 200, [0] * 9,
    {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
)  # fmt: skip


def seeds() -> list[bytes]:
    """Files that are right, small, and different."""
    few = {
        "a": sample("float32", (2, 3), 1),
        "layer.0.bias": sample("bfloat16", (4,), 2),
        "none": sample("int8", (0, 5), 3),
        "scalar": sample("float64", (), 4),
    }
    packed = {"four": sample("float4_e2m1fn", (2, 4)), "six": sample("float6_e3m2fn", (4,)), "b": sample("bool", (3,))}
    turned = (
        b'{"b":{"dtype":"U8","shape":[1],"data_offsets":[4,5]},"a":{"dtype":"I16","shape":[2],"data_offsets":[0,4]}}'
    )
    escaped = (
        b' {"\\u0061":{"shape":[2],"data_offsets":[0,2],"dtype":"U8","x":[1,{"y":null}]},"__metadata__":{"k":"v\\n"}}  '
    )
    return [
        safetensors_bytes(few),
        safetensors_bytes(few, {"format": "pt"}),
        safetensors_bytes(packed),
        safetensors_bytes({}),
        struct.pack("<Q", len(turned)) + turned + bytes(5),
        struct.pack("<Q", len(escaped)) + escaped + bytes(2),
    ]


def mutate(data: bytes, draw: random.Random) -> bytes:
    """`data` with one to four changes."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(changed) + 1)
        match draw.randrange(8):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << draw.randrange(8)
            case 1 if changed:
                changed[at % len(changed)] = draw.randrange(256)
            case 2:
                del changed[at : at + draw.choice((1, 1, 4, 30))]
            case 3:
                changed[at:at] = draw.choice(TOKENS)
            case 4:
                token = draw.choice(TOKENS)
                changed[at : at + len(token)] = token
            case 5:
                start = draw.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + draw.choice((1, 8, 60))]
            case 6:
                changed = changed[:at] if draw.random() < 0.3 else changed + bytes(draw.randrange(9))
            case _:
                numbers = list(re.finditer(rb"\d+", bytes(changed)))
                if numbers:
                    number = draw.choice(numbers)
                    delta = draw.choice((-1, 1, 2, 8, 1 << 32, 1 << 63))
                    text = draw.choice((b"%d" % (int(number[0][:30]) + delta), draw.choice(TOKENS)))
                    changed[number.start() : number.end()] = text
    return bytes(changed)


def rearrange(text: bytes, draw: random.Random) -> bytes:
    """A header that is JSON still, and says something else."""
    header = json.loads(text)
    entries = list(header.items())
    for _ in range(draw.choice((1, 1, 2, 3))):
        draw.shuffle(entries)
        if not entries or draw.random() < 0.1:
            entries.append((draw.choice(("a", "new", "é", "__metadata__", "true")), draw.choice(VALUES)))
            continue
        name, about = entries.pop()
        if draw.random() < 0.2:
            name = draw.choice(("a", "b", "-", "\n", "x" * 500))
        if type(about) is dict and draw.random() < 0.9:
            key = draw.choice(("dtype", "shape", "data_offsets", "other"))
            about = {**about, key: draw.choice((about.get(key), *VALUES))}
            if key == "shape" and type(about.get("shape")) is list and draw.random() < 0.5:
                about["shape"] = [*draw.sample(about["shape"], len(about["shape"])), 1]
            if draw.random() < 0.1:
                del about[key]
        entries.append((name, about))
    pairs = (f"{json.dumps(name)}:{json.dumps(about)}" for name, about in entries)
    return ("{" + ",".join(pairs) + "}").encode()


def hollow(text: bytes, draw: random.Random) -> bytes:
    """A header with very many of the values that take the most memory for their text."""
    value = draw.choice((b"[]", b"{}", b"[[]]", b'"ab"', b"300", b'{"a":0}'))
    many = b"[" + (value + b",") * 50_000 + value + b"]"
    return text.replace(draw.choice((b"[", b"{")), b'{"many":' + many + b",", 1)


def mutate_file(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file with changes; most keep the header's length right, so that what is behind it is reached."""
    if draw.random() < 0.25:
        return mutate(data, draw)
    length = int.from_bytes(data[:8], "little")
    header, values = data[8 : 8 + length], data[8 + length :]
    if draw.random() < 0.03:
        header = hollow(header, draw)
    else:
        header = rearrange(header, draw) if draw.random() < 0.5 else mutate(header, draw)
    return struct.pack("<Q", len(header)) + header + values


def look(source: Source) -> None:
    """Everything that may be asked of a source that opened."""
    repr(tp.of(source))
    dict(source.metadata)
    for name, info in source.infos().items():
        source.span(name)
        try:
            assert source.numpy(name).shape == info.shape
        except NotReadable:
            pass


def compare(content: bytes, source: Source | None, message: str) -> None:
    """Hold a verdict against that of the format's own library."""
    try:
        theirs = safetensors.deserialize(content)  # type: ignore[no-untyped-call]  # it has no types
    except safetensors.SafetensorError:
        theirs = None
    if source is None:
        assert theirs is None or STRICTER.search(message), f"only the reference takes it: {message}"
        return
    assert theirs is not None, "only ours takes it"
    infos = source.infos()
    assert {name for name, _ in theirs} == set(infos)
    for name, about in theirs:
        info = infos[name]
        assert (about["dtype"], tuple(about["shape"])) == (info.dtype.code, info.shape)
        # numpy has no arrays of so many dimensions, nor of zero elements with sizes beyond its own integers.
        if info.numel and info.ndim is not None and info.ndim <= 32:
            assert bytes(about["data"]) == element_bytes(source.numpy(name))


@contextmanager
def guarded(size: int) -> Iterator[None]:
    """Fail when the block allocates more than it may, or takes too long."""

    def late(*_: object) -> None:
        raise AssertionError(f"still busy after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    tracemalloc.reset_peak()
    start = tracemalloc.get_traced_memory()[0]
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] - start
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    # The objects of a valid header of very short entries take 14 times its text.
    assert peak <= 20 * size + SLACK, f"{peak} bytes allocated for an input of {size}"


def attempt(path: Path, size: int, open_one: Callable[[str], Source]) -> tuple[Source | None, str]:
    """The source, or None and what it was refused with; any other exception is a failure."""
    with guarded(size):
        try:
            source = open_one(str(path))
            look(source)
        except TorchParamsError as error:
            text = str(error)
            assert len(text) < 2000, "an endless message"
            assert text.isprintable(), f"a message that is not one line: {text!r}"
            return None, text
    return source, ""


def fuzz_safetensors(folder: Path, draw: random.Random) -> tuple[bytes, bool]:
    """One mutated safetensors file."""
    content = mutate_file(draw.choice(SEEDS), draw)
    path = folder / "x.safetensors"
    path.write_bytes(content)
    with reported(content):
        source, message = attempt(path, len(content), _safetensors.open_safetensors)
        compare(content, source, message)
        attempt(path, len(content), lambda target: tp.of(target).source)
    return content, source is not None


def fuzz_index(folder: Path, draw: random.Random) -> tuple[bytes, bool]:
    """One mutated index of two shards, of which one may be mutated too."""
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    shards = [safetensors_bytes({"a": A, "b": B}), safetensors_bytes({"c": A})]
    index = {"metadata": {"total_size": 52}, "weight_map": {"a": names[0], "c": names[1], "b": names[0]}}
    content = json.dumps(index, indent=draw.choice((None, 2))).encode()
    if draw.random() < 0.9:
        content = mutate(content, draw)
    if draw.random() < 0.2:
        damaged = draw.randrange(2)
        shards[damaged] = mutate_file(shards[damaged], draw)
    for name, shard in zip(names, shards, strict=True):
        (folder / name).write_bytes(shard)
    path = folder / "model.safetensors.index.json"
    path.write_bytes(content)
    size = len(content) + sum(map(len, shards))
    with reported(content, *shards):
        source, _ = attempt(path, size, _sharded.open_index)
        attempt(folder, size, lambda target: tp.of(target).source)
    return content, source is not None


@contextmanager
def reported(*contents: bytes) -> Iterator[None]:
    """Add the input to whatever fails."""
    try:
        yield
    except BaseException as failure:
        failure.add_note("\n".join(f"input: {content!r}" for content in contents))
        raise


SEEDS = seeds()
A, B = sample("float32", (2, 3), 1), sample("int8", (4,), 2)
READERS = (fuzz_safetensors, fuzz_index)


def run(count: int, seed: int = 0) -> dict[str, int]:
    """Try `count` inputs on each reader; reader → how many of them were taken.

    Args:
        count: Inputs for each reader.
        seed: Where they start; equal seeds give equal inputs.
    """
    taken: dict[str, int] = {}
    for fmt in FORMATS:  # what is imported on the way is not counted
        importlib.import_module(fmt.opener.partition(":")[0])
    look(MemorySource({name: sample(name, (2,)) for name in ("bfloat16", "float32")}))
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    try:
        for reader in READERS:
            with tempfile.TemporaryDirectory() as folder:
                draws = (random.Random(f"{seed} {i}") for i in range(count))
                taken[reader.__name__] = sum(reader(Path(folder), draw)[1] for draw in draws)
    finally:
        if started:
            tracemalloc.stop()
    return taken


def main(n: int = 100_000) -> None:
    """Run, and say how many inputs were taken and refused."""
    begun = time.monotonic()
    for reader, taken in run(n).items():
        print(f"{reader}: {n:,} inputs, {taken:,} taken, {n - taken:,} refused, none wrong")
    print(f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
