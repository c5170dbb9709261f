"""Torch files for tests, valid and damaged, made without the code that reads them."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from typing import TYPE_CHECKING, Any

import torch

from torchparams.testing import to_torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torchparams.testing import Array


def saved(thing: object, *, legacy: bool = False, protocol: int = 2) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(thing, buffer, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    return buffer.getvalue()


def written(folder: Path, contents: bytes, name: str = "model.pt") -> str:
    path = folder / name
    path.write_bytes(contents)
    return str(path)


def members_of(contents: bytes) -> dict[str, bytes]:
    """The members of a zip, by name."""
    with zipfile.ZipFile(io.BytesIO(contents)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], *, deflate: bool = False) -> bytes:
    """A zip of these members, by Python's own writer."""
    buffer = io.BytesIO()
    how = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, contents in members.items() if hasattr(members, "items") else members:
            archive.writestr(name, contents)
    return buffer.getvalue()


def torch_zip(pickled: bytes, storages: Mapping[str, bytes] | None = None, **others: bytes) -> bytes:
    """A checkpoint of this pickle and these storages."""
    members = {"archive/data.pkl": pickled}
    members.update({f"archive/data/{key}": contents for key, contents in (storages or {}).items()})
    members.update({f"archive/{name}": contents for name, contents in others.items()})
    return zipped(members)


# --- tensors -----------------------------------------------------------------------------------------


def tensors_of(arrays: Mapping[str, Array], metadata: Mapping[str, str] | None) -> dict[str, object]:
    """Torch tensors; an array under two names is one tensor."""
    made = {id(array): to_torch(array) for array in arrays.values()}
    return {**{name: made[id(array)] for name, array in arrays.items()}, **(metadata or {})}


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(mine: torch.Tensor, theirs: torch.Tensor, name: str = "") -> None:
    assert mine.dtype == theirs.dtype, name
    assert mine.shape == theirs.shape, name
    assert bits(mine) == bits(theirs), name


# --- pickles, written operation by operation ---------------------------------------------------------


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def named(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def row(*parts: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(parts) + b"t"


def ints(values: Sequence[int]) -> bytes:
    return row(*map(number, values))


def table(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def storage(key: str, numel: int, kind: str = "Float", view: bytes | None = None) -> bytes:
    pid = [text("storage"), named("torch", f"{kind}Storage"), text(key), text("cpu"), number(numel)]
    return row(*pid, *([] if view is None else [view])) + b"Q"


def tensor(stored: bytes, shape: Sequence[int], stride: Sequence[int], offset: int = 0, *, grad: bool = False) -> bytes:
    hooks = named("collections", "OrderedDict") + b")R"
    flag = b"\x88" if grad else b"\x89"
    return (
        named("torch._utils", "_rebuild_tensor_v2")
        + row(stored, number(offset), ints(shape), ints(stride), flag, hooks)
        + b"R"
    )


def whole(value: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + value + b"."


def legacy_file(
    pickled: bytes,
    storages: Sequence[tuple[str, int, bytes]],
    *,
    magic: int = 0x1950A86A20F9469CFC6C,
    protocol: int = 1001,
    little: bool = True,
    keys: object = None,
) -> bytes:
    """A legacy file of this pickle and these storages: key, count of elements, bytes."""
    parts = [
        pickle.dumps(magic, 2),
        pickle.dumps(protocol, 2),
        pickle.dumps({"protocol_version": protocol, "little_endian": little, "type_sizes": {}}, 2),
        pickled,
        pickle.dumps([key for key, _, _ in storages] if keys is None else keys, 2),
    ]
    for _, count, contents in storages:
        parts += [struct.pack("<q", count), contents]
    return b"".join(parts)


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


class Payload:
    """Pickles to a call of `func` with `args`."""

    def __init__(self, func: Any, *args: Any) -> None:
        self.func, self.args = func, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.func, self.args


def touch_command(canary: Path) -> str:
    return f"touch {os.fspath(canary)}"
