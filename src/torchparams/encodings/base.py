"""Base types of encodings: how a quantised parameter is recognised among stored tensors, and decoded.

To add an encoding, write a module in this folder with a function of a name and `Tensors` that returns a `Claim`, a
`Refused`, or None, and add it to `known.ENCODINGS`. Only claim what is fully understood: a part that is missing, has
the wrong shape, or is an unknown variant gives a `Refused` that names it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.encodings.excluded import Excluded
from torchparams.errors import NotReadable, shorten
from torchparams.info import Encoded, ParameterInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torchparams.expressions.base import Expression

F32 = DType.of("float32")


@dataclass(frozen=True, slots=True)
class Claim:
    """A parameter, and the stored tensors that it is decoded from.

    Attributes:
        name: Name in the unquantised model.
        shape: Shape in the unquantised model.
        encoding: Name of the encoding; empty for a plain tensor that is stored under another name.
        parts: Names of the stored tensors, codes first.
        build: Function that makes the expression from the rows of `operands`, in order. Must be picklable.
        operands: Parts that hold elements; None for all.
        dtype: Dtype that the encoding records; None for float32.
        aliases: Other names, if they differ from those of the codes.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    parts: tuple[str, ...]
    build: Callable[..., Expression]
    operands: tuple[str, ...] | None = None
    dtype: DType | None = None
    aliases: tuple[str, ...] = ()

    def info(self, infos: Mapping[str, ParameterInfo]) -> ParameterInfo:
        """Info of the parameter.

        Args:
            infos: Infos of the stored tensors.
        """
        codes, *others = (infos[part] for part in self.parts)
        if not self.encoding:
            return codes._replace(name=self.name, storage=None, location=None)
        numel = 1
        for size in self.shape:
            numel *= size
        return ParameterInfo(
            name=self.name,
            shape=self.shape,
            dtype=self.dtype or F32,
            numel=numel,
            nbytes=sum(each.nbytes for each in (codes, *others)),
            device=codes.device,
            kind=codes.kind,
            requires_grad=codes.requires_grad,
            module=codes.module,
            raw_name=codes.raw_name or codes.name,
            aliases=codes.aliases if self.name == codes.name else self.aliases,
            bases=codes.bases,
            encoded=Encoded(self.encoding, self.parts, self.dtype is not None),
        )

    def expression(self, row: Callable[[str], Expression]) -> Expression:
        """The parameter as an expression.

        Args:
            row: Function that returns the expression of a stored tensor.
        """
        return self.build(*map(row, self.parts if self.operands is None else self.operands))


@dataclass(frozen=True, slots=True)
class Refused:
    """Codes of a known encoding that cannot be decoded.

    Attributes:
        parts: Names of the stored tensors, codes first.
        reason: Reason as a sentence that names the part.
    """

    parts: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Structure:
    """Parameter of a class that keeps its values in other tensors, as described by a source.

    Attributes:
        name: Name of the parameter.
        kind: Class name without its module, such as `Int8Tensor`.
        parts: Attribute → name of the stored tensor, codes first.
        attributes: Plain attributes of the object: numbers, texts, lists, dtype names.
        shape: Shape that the class shows, or None if unknown.
        dtype: Dtype that the class shows, or None if unknown.
        aliases: Other names of the parameter.
    """

    name: str
    kind: str
    parts: Mapping[str, str]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    dtype: DType | None = None
    aliases: tuple[str, ...] = ()


def part_name(name: str, attribute: str) -> str:
    """Name of a stored tensor of a parameter with several, as in torchao's safetensors files.

    >>> part_name("layers.0.weight", "qdata"), part_name("w", "scale")
    ('layers.0._weight_qdata', '_w_scale')
    """
    module, dot, last = name.rpartition(".")
    return f"{module}{dot}_{last}_{attribute}"


_UNPACKED = {
    "_packed_params._packed_params.0": "weight",
    "_packed_params._packed_params.1": "bias",
    "_packed_params._packed_weight": "weight",
}
"""Names that `torch.ao.quantization` writes to a state dict, and those of the layer before it was quantised."""


def unpacked_name(name: str) -> str:
    """Name of a parameter before `torch.ao.quantization` packed it; other names are unchanged.

    >>> unpacked_name("fc._packed_params._packed_params.0"), unpacked_name("fc.weight")
    ('fc.weight', 'fc.weight')
    """
    for end, last in _UNPACKED.items():
        if name.endswith(end) and name[: len(name) - len(end)][-1:] in ("", "."):
            return name[: len(name) - len(end)] + last
    return name


class Tensors:
    """Stored tensors of a source, for functions that recognise encodings.

    Args:
        infos: Infos by canonical name.
        config: Function that returns the `quantization_config` beside the checkpoint, or an empty mapping.
        read: Function that returns the bytes of a small tensor.
    """

    def __init__(
        self,
        infos: Mapping[str, ParameterInfo],
        config: Callable[[], Mapping[str, Any]],
        read: Callable[[str], bytes],
    ) -> None:
        self.infos = infos
        self._config = config
        self._read = read
        self._found: Mapping[str, Any] | None = None
        self._excluded: Excluded | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The `quantization_config` beside the checkpoint."""
        if self._found is None:
            self._found = self._config()
        return self._found

    @property
    def method(self) -> str:
        """Name of the method in the configuration, in lower case; empty without one."""
        found = self.config.get("quant_method") or self.config.get("quantization", {})
        return found.lower() if isinstance(found, str) else ""

    def unconverted(self, name: str) -> str | None:
        """What a configuration calls the module of a parameter, if it says that the module is not quantised.

        Raises:
            NotReadable: A pattern in the configuration cannot be used.
        """
        if self._excluded is None:
            self._excluded = Excluded(self.config)
        return self._excluded.entry(name)

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; empty for a scalar."""
        return self.infos[name].shape or ()

    def dtype(self, name: str) -> DType:
        """Dtype of a tensor."""
        return self.infos[name].dtype

    def present(self, *names: str) -> tuple[str, ...]:
        """Subset of `names` that exist."""
        return tuple(name for name in names if name in self.infos)

    def bytes_of(self, name: str, most: int) -> bytes:
        """Bytes of a small tensor.

        Raises:
            NotReadable: It is longer than `most`, or cannot be read.
        """
        if self.infos[name].nbytes > most:
            raise NotReadable(f"{quoted(name)} has {self.infos[name].nbytes:,} bytes; the limit is {most:,}")
        return self._read(name)


def quoted(value: object) -> str:
    """Name or other value of a file, quoted and shortened for messages."""
    return shorten(repr(value))


def shaped(tensors: Tensors, name: str) -> str:
    """Name, dtype and shape of a tensor, for messages."""
    return f"{quoted(name)} ({tensors.dtype(name)} {shorten(str(list(tensors.shape(name))))})"
