"""Definition of digests, and their computation.

Equal weights have equal digests in every format. The digest of a tensor covers its dtype, shape and elements; the
digest of a set covers names and tensor digests. Both use BLAKE3. This is **version 1**; another definition would get
another version.

    content  = BLAKE3(elements)
    tensor   = BLAKE3 in its mode "derive key" with the context "torchparams tensor digest v1", of
               dtype "[" size "," size … "]" newline  content
    set      = BLAKE3 in its mode "derive key" with the context "torchparams set digest v1", of
               length name tensor                     for every name, in the order of the names' bytes

- `elements`: all elements in C order, little-endian, without gaps; the real part of complex numbers first. Elements
  of less than a byte are packed as in safetensors: from the lowest bit of the first byte, with the last byte padded by
  zeros. A bool is one byte.
- `content` is 32 bytes, equal to the output of the tool b3sum; `tensor` is 32 bytes, written in hexadecimal.
- `dtype` is torch's spelling (`bfloat16`), sizes are decimal (`bfloat16[2,3]`, `float32[]` for a scalar), all ASCII.
  A `float4_e2m1fn_x2` element counts as two of `float4_e2m1fn` along the last dimension, as safetensors stores it.
- `length` is the length of the name in bytes, as 8 bytes, little-endian; names are UTF-8.

The encoding is injective: different tensors, and different sets, never have the same bytes.

**A set contains every name**, including aliases, each with the digest of its tensor, like a state dict. Neither the
order nor whether tied tensors are stored once or as copies makes a difference. A missing name does.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams.dtypes import DType
from torchparams.engines.base import Job, Task, Unread
from torchparams.engines.by_name import named
from torchparams.engines.distributed import engine_for
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
"""Version of the definition."""

TENSOR_CONTEXT = f"torchparams tensor digest v{VERSION}"
SET_CONTEXT = f"torchparams set digest v{VERSION}"

_SHARED = 1 << 22  # size in bytes from which several threads may hash one tensor
_X2 = "float4_e2m1fn_x2"
_PROCESS = os.getpid()


COLUMNS = {"name": str, "dtype": str, "shape": list[int], "nbytes": int, "digest": str, "aliases": list[str]}
"""Types of the `TensorDigest` columns, for tables handed to other libraries."""


@dataclass(frozen=True, slots=True)
class TensorDigest:
    """Digest of one tensor.

    Attributes:
        name: Canonical name.
        dtype: Dtype in the digest.
        shape: Shape in the digest.
        nbytes: Bytes of the elements.
        digest: 64 hexadecimal digits.
        aliases: Other names.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    digest: str
    aliases: tuple[str, ...] = ()
    memory: str | None = field(default=None, repr=False, compare=False)
    """Key that is equal for tensors that share the same bytes."""

    @property
    def names(self) -> tuple[str, ...]:
        """Name and aliases."""
        return (self.name, *self.aliases)

    def to_json(self) -> dict[str, Any]:
        """The tensor as in a manifest."""
        return {
            "name": self.name,
            "dtype": str(self.dtype),
            "shape": list(self.shape),
            "nbytes": self.nbytes,
            "digest": self.digest,
            "aliases": list(self.aliases),
        }


def encoded_as(info: ParameterInfo | Expression) -> tuple[DType, tuple[int, ...]]:
    """Dtype and shape that enter the digest."""
    shape = info.shape or ()
    if info.dtype == _X2 and shape:
        return DType.of("float4_e2m1fn"), (*shape[:-1], 2 * shape[-1])
    return info.dtype, shape


@paused_gc()  # many objects, no cycles
def tensor_digests(
    source: Source,
    infos: Iterable[ParameterInfo],
    *,
    engine: Engine | str | None = None,
    progress: Progress | None = None,
) -> Hashed:
    """Compute the digests of tensors of one source.

    Raises:
        NotReadable: A tensor has no values.
        LimitExceeded: A file expands few bytes to very many elements.
    """
    from torchparams.io.threads import processors

    jobs: list[Job] = []
    for info in infos:
        if info.device == "meta":  # raises before an engine would loop over terabytes of nothing
            source.numpy(info.name)
        jobs.append(Job(info.name, (source.row(info.name, info),)))
    # Tensors that would keep one thread busy after all others are hashed by several threads, at a small total cost.
    share = sum(job.nbytes for job in jobs) // (2 * processors())
    digests: dict[str, str] = {}
    lost: Lost = {}
    task = DigestTask(max(share, _SHARED))
    for job, result, losses in (named(engine) or engine_for(jobs)).run(jobs, task, progress=progress):
        if isinstance(result, Unread):
            raise result.error or NotReadable(result.reason, where=source.label)
        digests[job.key] = result
        if losses is not None:
            lost[job.key] = losses
    return Hashed(
        {job.key: digests[job.key] for job in jobs}, {job.key: lost[job.key] for job in jobs if job.key in lost}
    )


class Hashed(NamedTuple):
    """Result of `tensor_digests`.

    Attributes:
        digests: Digest by name, in tensor order.
        lost: Losses of casts inside the rows.
    """

    digests: dict[str, str]
    lost: Lost


class DigestTask(Task[str, str]):
    """Task that computes the digest of each tensor, in hexadecimal.

    Args:
        large: Size in bytes from which several threads hash one block.
    """

    order = "stream"

    def __init__(self, large: int = sys.maxsize) -> None:
        self.large = large

    def begin(self, job: Job) -> DigestFold:
        """Start a hash."""
        return DigestFold(job.rows[0], several=job.nbytes >= self.large)

    def combine(self, job: Job, parts: Sequence[str]) -> str:
        """Return the only part: blocks come in order."""
        return parts[0]


class DigestFold:
    """Fold that hashes the blocks of a tensor.

    Args:
        row: Row of the tensor.
        several: Use several threads per block.
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
        """Digest in hexadecimal."""
        return tensor_digest(*encoded_as(self._row), self._hasher.digest())


def _threads() -> int:
    """Number of threads for a hasher."""
    from blake3 import blake3

    from torchparams.io.threads import processors

    # BLAKE3's shared thread pool does not exist in a forked child, which would wait forever. An explicit number starts
    # new threads.
    auto: int = blake3.AUTO
    return auto if os.getpid() == _PROCESS else min(processors(), 8)


def tensor_digest(dtype: DType, shape: Sequence[int], content: bytes) -> str:
    """Digest of a tensor, from the BLAKE3 of its elements.

    >>> from blake3 import blake3
    >>> tensor_digest(DType.of("int8"), (3,), blake3(bytes([1, 2, 3])).digest())[:16]
    'c482a4482a3017c3'
    """
    from blake3 import blake3

    head = f"{dtype}[{','.join(map(str, shape))}]\n".encode()
    return blake3(head + content, derive_key_context=TENSOR_CONTEXT).hexdigest()


def set_digest(pairs: Iterable[tuple[str, str]]) -> str:
    """Digest of a set of names, each with the digest of its tensor.

    >>> set_digest([])[:16]
    '9c81a96e38cbf681'
    """
    from blake3 import blake3

    hasher = blake3(derive_key_context=SET_CONTEXT)
    # File names that are not valid UTF-8 decode to lone surrogates.
    for name, hexadecimal in sorted((name.encode(errors="surrogatepass"), made) for name, made in pairs):
        hasher.update(len(name).to_bytes(8, "little") + name + bytes.fromhex(hexadecimal))
    return hasher.hexdigest()
