"""Descriptions of parameters without their values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torchparams.dtypes import DType


class Storage(NamedTuple):
    """Storage that a tensor is a view of.

    Attributes:
        key: Identifier of the storage, equal for tensors of one source that share memory.
        offset: Offset of the first element, in elements.
        stride: Strides, in elements.
        nbytes: Bytes of the whole storage.
    """

    key: str
    offset: int
    stride: tuple[int, ...]
    nbytes: int


class Location(NamedTuple):
    """Byte range `[start, stop)` of a tensor in a file.

    For a view, the range from its first to its last byte.
    """

    file: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """Encoding of a quantised parameter.

    Attributes:
        encoding: Name of the encoding, such as `fp8-block128`, `nf4` or `gptq-int4-g128`.
        parts: Names of the stored tensors, codes first.
        recorded: Whether the encoding records the dtype; otherwise values are float32.
    """

    encoding: str
    parts: tuple[str, ...]
    recorded: bool = False


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a live parameter is kept in parts by the ranks of a process group.

    Attributes:
        kind: `DTensor`; `FSDP1` for a part of the flat parameter of a `FullyShardedDataParallel`; `unsharded` for the
            parameter that FSDP2 puts in place of a DTensor between gathering it and freeing it again.
        placements: One for each dimension of the mesh, as torch prints them: `Shard(dim=0)`, `Replicate()`.
        mesh: Sizes of the mesh's dimensions.
        ranks: Global ranks of the mesh, in C order.
        local_shape: Shape of this rank's part.
        local_nbytes: Bytes of this rank's part.

    >>> Sharding("DTensor", ("Replicate()", "Shard(dim=0)"), (1, 2), (0, 1), (2, 3), 24).is_split
    True
    """

    kind: str
    placements: tuple[str, ...]
    mesh: tuple[int, ...]
    ranks: tuple[int, ...]
    local_shape: tuple[int, ...]
    local_nbytes: int
    part: Any = field(default=None, repr=False, compare=False)
    """Of a flat parameter, what knows where this one lies in it."""

    @property
    def is_split(self) -> bool:
        """Whether ranks keep different parts; else each keeps a copy of the whole, or a summand of it."""
        return self.kind == "FSDP1" or any("Shard" in placement for placement in self.placements)

    def to_json(self) -> dict[str, Any]:
        """The sharding as JSON takes it."""
        return {
            "kind": self.kind,
            "placements": list(self.placements),
            "mesh": list(self.mesh),
            "ranks": list(self.ranks),
            "local_shape": list(self.local_shape),
            "local_nbytes": self.local_nbytes,
        }


class ParameterInfo(NamedTuple):
    """Description of a named parameter: one row of a table, without values.

    Attributes:
        name: Canonical name: for a live model, without the components of wrappers.
        shape: Shape; None for a lazy parameter and for a nested tensor.
        dtype: Dtype; equal to torch's spelling, as in `dtype == "bfloat16"`.
        numel: Number of elements.
        nbytes: Bytes of the elements if contiguous; for a sparse tensor, bytes of indices and values; for a quantised
            parameter, bytes of all its stored tensors.
        device: Device in torch's spelling; `file` for a checkpoint, `meta` for a tensor without values.
        kind: `parameter`, `buffer`, or `tensor` if the source does not distinguish them.
        requires_grad: Whether autograd computes its gradient; None if not recorded.
        module: Qualified class name of the owning module; None for files and mappings.
        raw_name: Name as spelled in the source.
        aliases: Other names of the same tensor.
        storage: Storage of a view; None if every tensor owns its bytes.
        location: Byte range in a file; None for live tensors.
        bases: Class of the owning module and its base classes, for `[module=…]`, `:norm` and `:embedding`.
        persistent: Whether a state dict contains it; False for a buffer registered with `persistent=False`.
        layout: None for a strided tensor; otherwise `sparse_coo`, `sparse_csr` and the other sparse layouts of torch,
            `nested`, `jagged`, `lazy`, `quantised`, or the class of a wrapper around other tensors.
        encoded: Encoding of a quantised parameter; None for others. See also `encoding` and `raw_names`.
        sharding: Split over the ranks of a process group; None if this process has the whole tensor. Shape, `numel` and
            `nbytes` are those of the whole tensor.

    >>> import torchparams as tp
    >>> import numpy as np
    >>> tp.of({"w": np.zeros((2, 3), np.float32)}).info("w").numel
    6
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: DType
    numel: int
    nbytes: int
    device: str
    kind: str
    requires_grad: bool | None = None
    module: str | None = None
    raw_name: str = ""
    aliases: tuple[str, ...] = ()
    storage: Storage | None = None
    location: Location | None = None
    bases: tuple[str, ...] = ()
    persistent: bool = True
    layout: str | None = None
    encoded: Encoded | None = None
    sharding: Sharding | None = None

    def __repr__(self) -> str:
        shown = zip(self._fields, self, strict=True)
        return f"ParameterInfo({', '.join(f'{name}={value!r}' for name, value in shown if name != 'bases')})"

    @property
    def encoding(self) -> str | None:
        """Name of the encoding of a quantised parameter; None for others."""
        return None if self.encoded is None else self.encoded.encoding

    @property
    def raw_names(self) -> tuple[str, ...]:
        """Names of the stored tensors."""
        return (self.raw_name or self.name,) if self.encoded is None else self.encoded.parts

    @property
    def bpw(self) -> float | None:
        """Stored bits per element, including scales; None without elements."""
        return 8 * self.nbytes / self.numel if self.numel else None

    @property
    def ndim(self) -> int | None:
        """Number of dimensions; None for a lazy parameter and for a nested tensor."""
        return None if self.shape is None else len(self.shape)

    @property
    def shapeless(self) -> str:
        """Reason why it has no shape, to follow its name in a sentence."""
        if self.layout in (None, "lazy"):
            return "is lazy: it has no shape or values yet"
        return f"is nested ({self.layout}): its rows have different lengths"

    def to_json(self) -> dict[str, Any]:
        """The info as JSON data: a row of `torchparams ls --json`."""
        row: dict[str, Any] = {
            "name": self.name,
            "shape": None if self.shape is None else list(self.shape),
            "dtype": str(self.dtype),
            "numel": self.numel,
            "nbytes": self.nbytes,
            "device": self.device,
            "kind": self.kind,
            "requires_grad": self.requires_grad,
            "module": self.module,
            "raw_name": self.raw_name or self.name,
            "aliases": list(self.aliases),
            "persistent": self.persistent,
            "layout": self.layout,
            "encoding": self.encoding,
            "raw_names": list(self.raw_names),
            "bpw": self.bpw,
            "sharding": None if self.sharding is None else self.sharding.to_json(),
            "storage": None,
            "location": None,
        }
        if self.storage is not None:
            s = self.storage
            row["storage"] = {"key": s.key, "offset": s.offset, "stride": list(s.stride), "nbytes": s.nbytes}
        if self.location is not None:
            at = self.location
            row["location"] = {"file": at.file, "start": at.start, "stop": at.stop}
        return row


_new = tuple.__new__
"""Creates a named tuple from its fields in order, in half the time of its class: a header may list 100,000 tensors."""


def file_tensor(
    name: str,
    shape: tuple[int, ...],
    dtype: DType,
    numel: int,
    nbytes: int,
    file: str,
    start: int,
    stop: int,
    storage: Storage | None = None,
) -> ParameterInfo:
    """Create the info of a tensor in the bytes `[start, stop)` of a file, faster than the class does.

    >>> from torchparams.dtypes import DType
    >>> file_tensor("w", (2,), DType.of("U8"), 2, 2, "a.safetensors", 80, 82).location
    Location(file='a.safetensors', start=80, stop=82)
    """
    location = _new(Location, (file, start, stop))
    fields = (
        name, shape, dtype, numel, nbytes, "file", "tensor", None, None,
        name, (), storage, location, (), True, None, None, None,
    )  # fmt: skip
    return _new(ParameterInfo, fields)


def live_tensor(
    name: str,
    shape: tuple[int, ...] | None,
    dtype: DType,
    numel: int,
    device: str,
    kind: str,
    requires_grad: bool | None,
    owner: tuple[str | None, tuple[str, ...]],
    raw_name: str,
    aliases: tuple[str, ...],
    storage: Storage | None,
    persistent: bool,
    nbytes: int | None = None,
    layout: str | None = None,
    sharding: Sharding | None = None,
) -> ParameterInfo:
    """Create the info of a tensor of a live model, as fast as `file_tensor`; `owner` is the class name with its bases.

    >>> from torchparams.dtypes import DType
    >>> f32, net = DType.of("F32"), ("Net", ("Net",))
    >>> live_tensor("w", (2,), f32, 2, "cpu", "parameter", True, net, "w", (), None, True).nbytes
    8
    """
    size = dtype.nbytes(numel) if nbytes is None else nbytes
    module, bases = owner
    fields = (
        name, shape, dtype, numel, size, device, kind, requires_grad, module,
        raw_name, aliases, storage, None, bases, persistent, layout, None, sharding,
    )  # fmt: skip
    return _new(ParameterInfo, fields)


def view_of(key: str, offset: int, stride: tuple[int, ...], nbytes: int) -> Storage:
    """Create `Storage(key, offset, stride, nbytes)`, as fast as `file_tensor`.

    >>> view_of("cpu:0x10", 0, (3, 1), 24)
    Storage(key='cpu:0x10', offset=0, stride=(3, 1), nbytes=24)
    """
    return _new(Storage, (key, offset, stride, nbytes))
