"""Mutated torch files and pickles: none may crash, hang, or make the reader allocate more than its size asks for.

    python tests/fuzz/fuzz_torch.py [inputs for each reader]

Each reader runs in a process of its own, so that even a crash of the interpreter is noticed, and the input that
caused it is named.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
import pickle
import pickletools
import random
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import torchparams as tp
from torchparams import limits
from torchparams.errors import TorchParamsError
from torchparams.sources.opening import FORMATS
from torchparams.sources.torchfile import archive as _archive
from torchparams.sources.torchfile import legacy as _legacy
from torchparams.sources.torchfile import torchzip as _torchzip
from torchparams.sources.torchfile._pickle import Machine
from torchparams.sources.torchfile._pickle_values import Reduced
from torchparams.sources.torchfile._rebuild import CONSTRUCTORS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torchparams.sources.base import Source

SLACK = 1 << 20
"""Bytes that opening and reading a file of any size may take, beside twice its own."""

SECONDS = 20
"""After which an input counts as one that hangs."""

EXPANDED = limits.EXPANDED_ELEMENTS + (1 << 20)
"""Most elements that a tensor of a small file may have and be read."""

NUMBERS = (
    0, 1, 2, 3, 7, 127, 128, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 61) - 1,
    (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip

GLOBALS = tuple(
    f"c{module}\n{name}\n".encode()
    for module, name in (
        *(("os", "system"), ("builtins", "eval"), ("torch", "FloatStorage"), ("torch", "QUInt4x2Storage")),
        *(("torch", "UntypedStorage"), ("torch", "bfloat16"), ("torch", "float64")),
        *(("torch.storage", "_load_from_bytes"), *CONSTRUCTORS),
    )
)
ALL_ONES = b"\xff" * 8
PUSHES = (
    *GLOBALS, b"N", b"\x88", b"\x89", b")", b"]", b"}", b"K\x00", b"K\x01", b"K\xff", b"J\xff\xff\xff\xff",
    b"X\x01\x00\x00\x00a", b"X\x00\x00\x00\x00", b"C\x02ab", b"G\x7f\xf0\x00\x00\x00\x00\x00\x00",
    b"\x8a\x09" + ALL_ONES + b"\x00", b"K\x02\x85", b"K\x02K\x03\x86", b"K\x00\x85", b"J\xff\xff\xff\xff\x85",
    b"N\x85\x85", b"cos\nsystem\n)R", b"U\x02\xff\xfe", b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001",
    b"X\x08\x00\x00\x00_modules", b"X\x0b\x00\x00\x00_parameters", b"X\x07\x00\x00\x00storage", b"\x8c\x01a", b"C\x00",
    b"I99999999999999999999\n",
)  # fmt: skip
"""Operations that put one value on the stack."""

TOKENS = (
    *PUSHES, *(bytes([code]) for code in (*range(0x80, 0x99), *b"()NQRbtuesad]}lo012.")),
    b"h\x00", b"h\x01", b"h\x05", b"q\x01", b"j\xff\xff\xff\xff", b"r\xff\xff\xff\xff", b"X\xff\xff\xff\xff",
    b"B\xff\xff\xff\x7f", b"\x8e" + ALL_ONES, b"\x8b\xff\xff\xff\x7f", b"\x95" + ALL_ONES, b"p4294967295\n", b"g0\n",
    b"\xff", b"\n", b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06",
)  # fmt: skip

_VALUE = b"KMJXNGUhj\x88\x89)]}\x8c\x8a"  # the first bytes of operations that put one value on the stack


# --- seeds -------------------------------------------------------------------------------------------


def things() -> list[object]:
    """What checkpoints hold, small."""
    import torch

    base = torch.arange(12, dtype=torch.float32)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    return [
        {"w": base.reshape(3, 4), "t": base.reshape(3, 4).t(), "part": base[2:7], "wide": base[:1].expand(5)},
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "name": "run"},
        model,
        [torch.ones(2, dtype=torch.bfloat16), torch.ones(3, dtype=torch.float8_e5m2), torch.tensor(True)],
        {"conj": torch.ones(2, dtype=torch.complex64).conj(), "u16": torch.ones(2, dtype=torch.uint16)},
        {"p": torch.nn.Parameter(base), "sparse": torch.eye(2).to_sparse(), "meta": torch.empty(2, device="meta")},
        {"a": np.arange(6.0).reshape(2, 3), "s": np.float32(2), "by": b"abc", "set": {1, 2}, "c": 1j},
        torch.ones(3),
    ]


def seeds(legacy: bool) -> list[bytes]:
    """What `torch.save` makes of them."""
    import torch

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for protocol in (2, 4):
            for thing in things():
                buffer = io.BytesIO()
                torch.save(thing, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
                found.append(buffer.getvalue())
    return found


def pickles() -> list[bytes]:
    """What `pickle` makes of them, and of arrays."""
    arrays = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "f": np.ones((2, 3), order="F"), "b": np.zeros(600)}
    parts = [thing for thing in things() if not isinstance(thing, dict) or "sparse" not in thing]
    return [pickle.dumps(thing, protocol) for thing in [arrays, *parts] for protocol in (0, 2, 5)]


def members_of(contents: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(contents)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members: dict[str, bytes], deflate: bool) -> bytes:
    """A zip, written in the plainest way."""
    body, directory = bytearray(), bytearray()
    for name, contents in members.items():
        at = len(body)
        packed = zlib.compress(contents, 1)[2:-4] if deflate else contents
        spelled = name.encode()
        how = (20, 0, 8 if deflate else 0, 0, 0, 0, len(packed), len(contents), len(spelled), 0)
        body += b"PK\3\4" + struct.pack("<5H3L2H", *how) + spelled + packed
        directory += b"PK\1\2" + struct.pack("<6H3L5H2L", 20, *how, 0, 0, 0, 0, at) + spelled
    end = struct.pack("<4H2LH", 0, 0, len(members), len(members), len(directory), len(body), 0)
    return bytes(body + directory + b"PK\5\6" + end)


# --- mutations ---------------------------------------------------------------------------------------


def mutate(data: bytes, draw: random.Random) -> bytes:
    """`data` with one to four changes."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(changed) + 1)
        match draw.randrange(9):
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
                size = draw.choice((1, 2, 4, 8))
                value = (draw.choice(NUMBERS) + draw.choice((0, 0, -1, 1))) % (1 << 8 * size)
                changed[at : at + size] = value.to_bytes(size, "little")
    return bytes(changed)


def operations(data: bytes) -> list[bytes]:
    """The pickle that `data` starts with, operation by operation."""
    places = [place or 0 for _, _, place in pickletools.genops(data)]
    return [data[a:b] for a, b in zip(places, [*places[1:], places[-1] + 1], strict=True)]


def mutate_operations(parts: list[bytes], draw: random.Random) -> bytes:
    """A pickle whose operations were shuffled about: most of it is still a pickle."""
    parts = list(parts)
    for _ in range(draw.choice((1, 1, 1, 1, 2, 4))):
        at = draw.randrange(len(parts) + 1)
        match draw.randrange(12):
            case 7 | 8 | 9 | 10 if parts:
                # One value for another: the rest still fits, and meets what it does not expect.
                places = [i for i, part in enumerate(parts) if part[:1] in _VALUE and part]
                if places:
                    parts[draw.choice(places)] = draw.choice((*PUSHES, parts[draw.choice(places)]))
            case 0:
                del parts[at : at + draw.choice((1, 1, 2, 9))]
            case 1:
                parts.insert(at, draw.choice(TOKENS))
            case 2:
                parts.insert(at, draw.choice(parts or [b"N"]))
            case 3 if parts:
                parts[at % len(parts)] = draw.choice(TOKENS)
            case 4 if parts:
                start = draw.randrange(len(parts))
                parts[at:at] = parts[start : start + draw.choice((1, 4, 20, 60))]
            case 5 if parts:
                a, b = at % len(parts), draw.randrange(len(parts))
                parts[a], parts[b] = parts[b], parts[a]
            case _ if parts:
                # Another number, where one stands.
                places = [i for i, part in enumerate(parts) if part[:1] in b"KMJ\x8a" and part]
                if places:
                    value = draw.choice(NUMBERS) * draw.choice((1, 1, 1, -1))
                    raw = value.to_bytes(9, "little", signed=True)
                    parts[draw.choice(places)] = b"\x8a\x09" + raw
    return b"".join(parts)


class Zips:
    """Mutated zips: of their own bytes, or of the pickle or a storage in them."""

    def __init__(self) -> None:
        self.whole = seeds(legacy=False)
        self.members = [members_of(contents) for contents in self.whole]
        self.pickles = [operations(members["archive/data.pkl"]) for members in self.members]

    def __call__(self, draw: random.Random) -> bytes:
        i = draw.randrange(len(self.whole))
        choice = draw.random()
        if choice < 0.3:
            return mutate(self.whole[i], draw)
        members = dict(self.members[i])
        if choice < 0.85:
            pickled = b"".join(self.pickles[i])
            members["archive/data.pkl"] = (
                mutate(pickled, draw) if draw.random() < 0.4 else mutate_operations(self.pickles[i], draw)
            )
        else:
            name = draw.choice(list(members))
            match draw.randrange(4):
                case 0:
                    del members[name]
                case 1:
                    members[name] = mutate(members[name], draw)
                case 2:
                    members[draw.choice((name + "x", "data.pkl", "b/data.pkl", "archive/constants.pkl", ""))] = b""
                case _:
                    members["archive/byteorder"] = draw.choice((b"big", b"little", b"", b"middle"))
        contents = zipped(members, deflate=draw.random() < 0.3)
        return mutate(contents, draw) if draw.random() < 0.15 else contents


class Legacies:
    """Mutated legacy files: of their bytes, or of one of their pickles."""

    def __init__(self) -> None:
        self.parts = [self._split(contents) for contents in seeds(legacy=True)]

    def _split(self, contents: bytes) -> tuple[list[list[bytes]], bytes]:
        found, at = [], 0
        for _ in range(5):
            found.append(operations(contents[at:]))
            at += sum(map(len, found[-1]))
        return found, contents[at:]

    def __call__(self, draw: random.Random) -> bytes:
        parts, rest = draw.choice(self.parts)
        made = [b"".join(part) for part in parts]
        if draw.random() < 0.7:
            which = draw.choice((3, 3, 3, 3, 4, 2))
            made[which] = mutate_operations(parts[which], draw)
        contents = b"".join(made) + rest
        return mutate(contents, draw) if draw.random() < 0.5 else contents


class Pickles:
    """Mutated pickles of arrays and of tensors."""

    def __init__(self) -> None:
        self.parts = [operations(contents) for contents in pickles()]

    def __call__(self, draw: random.Random) -> bytes:
        parts = draw.choice(self.parts)
        contents = mutate_operations(parts, draw) if draw.random() < 0.6 else b"".join(parts)
        return mutate(contents, draw) if draw.random() < 0.6 else contents


READERS: dict[str, tuple[Callable[[], Callable[[random.Random], bytes]], Callable[..., Source]]] = {
    "zip": (Zips, _torchzip.open_torch_zip),
    "legacy": (Legacies, _legacy.open_legacy),
    "pickle": (Pickles, _legacy.open_plain_pickle),
}


# --- trying one --------------------------------------------------------------------------------------


def look(source: Source, draw: random.Random) -> None:
    """Everything that may be asked of a source that opened."""
    for name, info in source.infos().items():
        source.span(name)
        assert source.resolve(name) == name
        for alias in info.aliases[:3]:
            assert source.resolve(alias) == name
        try:
            assert source.numpy(name).shape == info.shape
        except TorchParamsError:
            pass
        else:
            assert info.numel <= EXPANDED, f"{name!r} has {info.numel:,} elements, and is read"
    if draw.random() < 0.1:
        assert "Error" not in repr(tp.of(source))[:200]
        repr(dict(source.metadata))
        if isinstance(source, _torchzip.TorchZipSource):
            for crc in source.stored_crcs():
                for _ in source.member_chunks(crc.member):
                    pass


class Watched(Machine):
    """A machine whose dictionaries are looked at: none may be keyed by numbers, which a file could make collide."""

    def load(self, pos: int) -> tuple[Any, int]:
        loaded = super().load(pos)
        refuse_number_keys(loaded[0])
        return loaded


def refuse_number_keys(root: object) -> None:
    """Fail where a dict that a file filled has a number, or a tuple of them, for a key."""
    stack, seen = [root], {id(root)}
    while stack:
        node = stack.pop()
        if type(node) is dict:
            numbers = [key for key in node if isinstance(key, int | float | complex | tuple)]
            assert not numbers, f"a dict is keyed by numbers of the file: {numbers[:3]}"
            parts: list[Any] = list(node.values())
        elif type(node) in (list, tuple):
            parts = list(node)  # type: ignore[call-overload]  # its type was just looked at
        elif type(node) is Reduced:
            parts = [node.func, node.args, node.state, node.items, node.pairs]
        else:
            continue
        for part in parts:
            if id(part) not in seen:
                seen.add(id(part))
                stack.append(part)


def zipfile_takes(content: bytes) -> bool:
    """Whether Python's own reader finds nothing wrong with a zip."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, UnicodeError, ValueError, OSError):
        return False
    except (struct.error, zlib.error):
        return False


def verified_wrongly(path: Path, content: bytes) -> bool:
    """Whether `verify` calls a zip well that Python's own reader rejects."""
    if zipfile_takes(content):
        return False
    try:
        found = tp.verify(path)
    except TorchParamsError:
        return False
    return found.ok and all(check.outcome == "ok" for check in found.checks)


@contextmanager
def watched() -> Iterator[None]:
    """Let the readers run their pickles on `Watched` machines."""
    homes: tuple[Any, ...] = (_archive, _legacy)
    for home in homes:
        home.Machine = Watched
    try:
        yield
    finally:
        for home in homes:
            home.Machine = Machine


@contextmanager
def guarded(size: int) -> Iterator[None]:
    """Fail when the block allocates more than it may, or takes too long."""

    def late(*_: object) -> None:
        raise AssertionError(f"still busy after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    tracemalloc.reset_peak()
    start = tracemalloc.get_traced_memory()[0]
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] - start
    finally:
        if started:
            tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert peak <= 2 * size + SLACK, f"{peak} bytes allocated for an input of {size}"


def attempt(folder: Path, content: bytes, reader: str, draw: random.Random | None = None) -> bool:
    """Whether the reader takes the input; any exception that is not the library's own is a failure."""
    draw = draw or random.Random(len(content))
    path = folder / "input"
    path.write_bytes(content)
    opener = READERS[reader][1]
    if draw.random() < 0.1:  # whoever the front door takes it to
        opener = lambda target, inner: tp.of(f"{target}#{inner}" if inner else target).source  # noqa: E731
    inner = None if draw.random() < 0.85 else draw.choice(("model", "0", "w", "a.b"))
    with guarded(len(content)), watched():
        try:
            look(opener(str(path), inner), draw)
        except TorchParamsError as error:
            text = str(error)
            assert len(text) < 2000, "an endless message"
            assert text.isprintable(), f"a message that is not one line: {text!r}"
            return False
    if reader == "zip":
        assert not verified_wrongly(path, content), "zipfile rejects it, and verify finds nothing wrong"
    return True


def run(reader: str, count: int, seed: int = 0) -> tuple[int, int]:
    """Try `count` inputs on a reader: how many were tried, how many taken.

    Args:
        reader: One of `READERS`.
        count: Inputs.
        seed: Where they start; equal seeds give equal inputs.
    """
    for fmt in FORMATS:  # what is imported on the way is not counted
        importlib.import_module(fmt.opener.partition(":")[0])
    make = READERS[reader][0]()
    taken = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        warm = random.Random(0)
        warm.random = lambda: 0.05  # type: ignore[method-assign]  # so that `look` does all it can
        for content in (seeds(False)[0], seeds(True)[0], pickles()[1]):
            (folder / "warm").write_bytes(content)
            look(tp.of(str(folder / "warm")).source, warm)
        for i in range(count):
            draw = random.Random(f"{seed} {i}")
            content = make(draw)
            try:
                taken += attempt(folder, content, reader, draw)
            except BaseException as failure:
                failure.add_note(f"input {i} of seed {seed}: {content!r}")
                raise
    return count, taken


def _child(reader: str, count: int, seed: int, answer: Any) -> None:
    answer.send(run(reader, count, seed))


def main(n: int = 100_000) -> None:
    """Run every reader in a process of its own, and say how many inputs were taken and refused."""
    context = multiprocessing.get_context("spawn")
    pieces = max(1, n // 10_000)
    for reader in READERS:
        begun = time.monotonic()
        tried = taken = 0
        for piece in range(pieces):
            count = n * (piece + 1) // pieces - n * piece // pieces
            ours, theirs = context.Pipe()
            process = context.Process(target=_child, args=(reader, count, piece, theirs))
            process.start()
            process.join()
            if process.exitcode != 0:
                raise SystemExit(f"{reader}: failed with seed {piece} (exit code {process.exitcode})")
            done, took = ours.recv()
            tried, taken = tried + done, taken + took
        seconds = time.monotonic() - begun
        print(f"{reader}: {tried:,} inputs, {taken:,} taken, {tried - taken:,} refused, none wrong, {seconds:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
