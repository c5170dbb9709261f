"""The bytes that digests are made of.

Weights have the same digest, whatever holds them. That of a tensor is made of its dtype, its shape and its elements, by
BLAKE3, and that of a set of their names and digests. This is **version 1**; another way would be another version, and
other digests.

    content  = BLAKE3(elements)
    tensor   = BLAKE3 in its mode "derive key" with the context "torchparams tensor digest v1", of
               dtype "[" size "," size … "]" newline  content
    set      = BLAKE3 in its mode "derive key" with the context "torchparams set digest v1", of
               length name tensor                     for every name, in the order of the names' bytes

- `elements`: every element, in C order, little-endian, without gaps; of complex numbers first the real part. Elements
  of less than a byte are packed as safetensors packs them: from the lowest bit of the first byte on, the last byte
  filled with zeros. A bool is a byte.
- `content` is 32 bytes, and what the tool b3sum prints of the same bytes; `tensor` is 32 bytes, written in hexadecimal.
- `dtype` is torch's spelling (`bfloat16`), sizes are decimal (`bfloat16[2,3]`, `float32[]` for a scalar), all ASCII.
  A `float4_e2m1fn_x2`, which is two elements, counts as two of `float4_e2m1fn` along the last dimension, as safetensors
  stores it.
- `length` is the count of the name's bytes, in 8 bytes, little-endian; names are in UTF-8.

No two different tensors, and no two different sets, are encoded by the same bytes.

**The set is that of every name**, aliases included, each with the digest of its tensor: the digest of a state dict as a
mapping. Whether tied tensors are stored once, or as copies, makes no difference, nor does the order; a name that is
missing does.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams.dtypes import DType
from torchparams.engines.base import Job, Task, Unread
from torchparams.engines.threads import ThreadEngine
from torchparams.errors import NotReadable
from torchparams.io.filebytes import paused_gc

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchparams.engines.base import Engine, Progress
    from torchparams.expressions.base import Expression
    from torchparams.info import ParameterInfo
    from torchparams.io.blocks import Block
    from torchparams.measure.lost import Lost
    from torchparams.sources.base import Source

VERSION = 1
"""Of the way digests are made."""

TENSOR_CONTEXT = f"torchparams tensor digest v{VERSION}"
SET_CONTEXT = f"torchparams set digest v{VERSION}"

_SHARED = 1 << 22  # bytes from which on a tensor may be hashed by several threads
_X2 = "float4_e2m1fn_x2"
_PROCESS = os.getpid()


COLUMNS = {"name": str, "dtype": str, "shape": list[int], "nbytes": int, "digest": str, "aliases": list[str]}
"""Attributes of `TensorDigest` → their types, for tables handed to other libraries."""


@dataclass(frozen=True, slots=True)
class TensorDigest:
    """A tensor and its digest.

    Attributes:
        name: Its canonical name.
        dtype: The element type that went into the digest.
        shape: The shape that did.
        nbytes: Bytes of its elements.
        digest: 64 hexadecimal digits.
        aliases: Its other names.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    digest: str
    aliases: tuple[str, ...] = ()
    memory: str | None = field(default=None, repr=False, compare=False)
    """Equal for tensors that are the same bytes in the same place."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its name and its aliases."""
        return (self.name, *self.aliases)

    def to_json(self) -> dict[str, Any]:
        """The tensor as a manifest lists it."""
        return {
            "name": self.name,
            "dtype": str(self.dtype),
            "shape": list(self.shape),
            "nbytes": self.nbytes,
            "digest": self.digest,
            "aliases": list(self.aliases),
        }


def encoded_as(info: ParameterInfo | Expression) -> tuple[DType, tuple[int, ...]]:
    """The dtype and the shape that go into the digest of a tensor."""
    shape = info.shape or ()
    if info.dtype == _X2 and shape:
        return DType.of("float4_e2m1fn"), (*shape[:-1], 2 * shape[-1])
    return info.dtype, shape


@paused_gc()  # some objects for each tensor, and no cycles
def tensor_digests(
    source: Source,
    infos: Iterable[ParameterInfo],
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Hashed:
    """Digests of tensors of one source.

    Raises:
        NotReadable: A tensor has no values.
        LimitExceeded: A file says of a few elements that they are very many.
    """
    from torchparams.io.threads import processors

    jobs: list[Job] = []
    for info in infos:
        if info.device == "meta":  # says so itself, before an engine goes through terabytes of nothing
            source.numpy(info.name)
        jobs.append(Job(info.name, (source.row(info.name, info),)))
    # What one thread would still be busy with when the others are done is hashed by several; it costs a bit in all.
    share = sum(job.nbytes for job in jobs) // (2 * processors())
    digests: dict[str, str] = {}
    lost: Lost = {}
    task = DigestTask(max(share, _SHARED))
    for job, result, losses in (engine or ThreadEngine(mapped=True)).run(jobs, task, progress=progress):
        if isinstance(result, Unread):
            raise result.error or NotReadable(result.reason, where=source.label)
        digests[job.key] = result
        if losses is not None:
            lost[job.key] = losses
    return Hashed({job.key: digests[job.key] for job in jobs}, lost)


class Hashed(NamedTuple):
    """What `tensor_digests` gives.

    Attributes:
        digests: Name → digest, in the order of the tensors.
        lost: What casts within the rows lost.
    """

    digests: dict[str, str]
    lost: Lost


class DigestTask(Task[str, str]):
    """The task that makes the digest of every tensor, in hexadecimal.

    Args:
        large: Bytes of a tensor from which on several threads hash one block.
    """

    order = "stream"

    def __init__(self, large: int = sys.maxsize) -> None:
        self.large = large

    def begin(self, job: Job) -> DigestFold:
        """Hash from the first element on."""
        return DigestFold(job.rows[0], several=job.nbytes >= self.large)

    def combine(self, job: Job, parts: Sequence[str]) -> str:
        """There is one part."""
        return parts[0]


class DigestFold:
    """The fold that makes the digest of a tensor from its blocks.

    Args:
        row: The tensor.
        several: Let several threads work on one block.
    """

    def __init__(self, row: Expression, *, several: bool = False) -> None:
        from blake3 import blake3

        self._row = row
        self._hasher = blake3(max_threads=_threads() if several else 1)

    def update(self, block: Block) -> None:
        """Hash a block."""
        if block.dtype.bits < 8 and not block.packed:
            from torchparams.io.packing import pack

            self._hasher.update(pack(block.data, block.dtype).data)
        else:
            self._hasher.update(block.buffer)

    def finish(self) -> str:
        """The digest, in hexadecimal."""
        return tensor_digest(*encoded_as(self._row), self._hasher.digest())


def _threads() -> int:
    """How many threads a hasher may use."""
    from blake3 import blake3

    from torchparams.io.threads import processors

    # BLAKE3's own threads, which all hashers share, are not there in a child that was forked: it would wait for them
    # for ever. A number asks for threads that are new.
    auto: int = blake3.AUTO
    return auto if os.getpid() == _PROCESS else min(processors(), 8)


def tensor_digest(dtype: DType, shape: Sequence[int], content: bytes) -> str:
    """The digest of a tensor from the BLAKE3 of its elements.

    >>> from blake3 import blake3
    >>> tensor_digest(DType.of("int8"), (3,), blake3(bytes([1, 2, 3])).digest())[:16]
    'c482a4482a3017c3'
    """
    from blake3 import blake3

    head = f"{dtype}[{','.join(map(str, shape))}]\n".encode()
    return blake3(head + content, derive_key_context=TENSOR_CONTEXT).hexdigest()


def set_digest(pairs: Iterable[tuple[str, str]]) -> str:
    """The digest of a set of names, each with the digest of its tensor.

    >>> set_digest([])[:16]
    '9c81a96e38cbf681'
    """
    from blake3 import blake3

    hasher = blake3(derive_key_context=SET_CONTEXT)
    # Names that Python made up of bytes in no encoding have no UTF-8 of their own.
    for name, hexadecimal in sorted((name.encode(errors="surrogatepass"), made) for name, made in pairs):
        hasher.update(len(name).to_bytes(8, "little") + name + bytes.fromhex(hexadecimal))
    return hasher.hexdigest()
