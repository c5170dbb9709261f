"""What an encoding is: how a quantised parameter is recognised among stored tensors, and computed from them.

To add an encoding, write one module beside this one with a function of a name and `Tensors` that gives a `Claim`, a
`Refused`, or None, and add it to `known.ENCODINGS`. Nothing is claimed that is not fully understood: a part that is
missing, of a wrong shape or of an unknown variant is a `Refused` that names it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.errors import NotReadable, shorten
from torchparams.info import Encoded, ParameterInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torchparams.expressions.base import Expression

F32 = DType.of("float32")


@dataclass(frozen=True, slots=True)
class Claim:
    """A parameter, and the stored tensors that it is computed from.

    Attributes:
        name: The name in the unquantised model.
        shape: The shape there.
        encoding: The name of the encoding.
        parts: Names of the stored tensors, the codes first.
        build: Makes the expression from the rows of `operands`, in this order. It pickles.
        operands: The parts that hold elements; None for all.
        dtype: The type that the encoding records; None for float32.
        aliases: Further names, where these are not those of the codes.
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
        """The record of the parameter.

        Args:
            infos: The records of the stored tensors.
        """
        codes, *others = (infos[part] for part in self.parts)
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
            row: Gives the expression of a stored tensor.
        """
        return self.build(*map(row, self.parts if self.operands is None else self.operands))


@dataclass(frozen=True, slots=True)
class Refused:
    """Codes of a known encoding that are not understood.

    Attributes:
        parts: Names of the stored tensors, the codes first.
        reason: The reason, as a sentence that names the part.
    """

    parts: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Structure:
    """A parameter of a class that keeps its values in other tensors, as a source describes it.

    Attributes:
        name: The name of the parameter.
        kind: The class, without its module: `Int8Tensor`.
        parts: Attribute → name of the stored tensor, the codes first.
        attributes: Attribute → value, of the attributes that are plain: numbers, texts, lists, names of types.
        shape: The shape that the class shows; None where the source does not say it.
        dtype: The element type that the class shows; None where the source does not say it.
        aliases: Further names of the parameter.
    """

    name: str
    kind: str
    parts: Mapping[str, str]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    dtype: DType | None = None
    aliases: tuple[str, ...] = ()


def part_name(name: str, attribute: str) -> str:
    """The name of a stored tensor of a parameter that has several: as torchao spells it in safetensors files.

    >>> part_name("layers.0.weight", "qdata"), part_name("w", "scale")
    ('layers.0._weight_qdata', '_w_scale')
    """
    module, dot, last = name.rpartition(".")
    return f"{module}{dot}_{last}_{attribute}"


class Tensors:
    """The stored tensors of a source, for whoever recognises encodings.

    Args:
        infos: Their records, by canonical name.
        config: Gives the `quantization_config` beside the checkpoint; empty where there is none.
        read: Gives the bytes of a small tensor.
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
        self._excluded: tuple[set[str], list[str]] | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The `quantization_config` beside the checkpoint."""
        if self._found is None:
            self._found = self._config()
        return self._found

    @property
    def method(self) -> str:
        """The name of the method in the configuration, in lower case; empty where there is none."""
        found = self.config.get("quant_method") or self.config.get("quantization", {})
        return found.lower() if isinstance(found, str) else ""

    def unconverted(self, name: str) -> str | None:
        """What a configuration calls the module of a parameter, if it says that the module is not quantised.

        A module is named from its first component, from one in the middle to the last, or with `*` for any.
        """
        if self._excluded is None:
            stated = (self.config.get(key) for key in _EXCLUDED)
            texts = [each for given in stated if isinstance(given, list) for each in given if isinstance(each, str)]
            exact = {text for text in texts if text and not set(text) & set("*?[(^$|\\")}
            self._excluded = exact, [text for text in texts if "*" in text and not set(text) & set("[(^$|\\:")]
        exact, patterns = self._excluded
        if not exact and not patterns:
            return None
        path = name.split(".")
        # The parameter of a module is `module.weight`; fused experts are a parameter themselves.
        for parts in (path[:-1], path):
            spans = [parts[:end] for end in range(1, len(parts) + 1)] + [
                parts[start:] for start in range(1, len(parts))
            ]
            found = next((text for span in spans if (text := ".".join(span)) in exact), None)
            found = found or next((text for text in patterns if _matches(text.split("."), parts)), None)
            if found is not None:
                return found
        return None

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; that of a scalar where it has none."""
        return self.infos[name].shape or ()

    def dtype(self, name: str) -> DType:
        """The type of a tensor."""
        return self.infos[name].dtype

    def present(self, *names: str) -> tuple[str, ...]:
        """Those of `names` that there are."""
        return tuple(name for name in names if name in self.infos)

    def bytes_of(self, name: str, most: int) -> bytes:
        """The bytes of a small tensor.

        Raises:
            NotReadable: It is longer than `most`, or cannot be read.
        """
        if self.infos[name].nbytes > most:
            raise NotReadable(
                f"{quoted(name)} has {self.infos[name].nbytes:,} bytes, more than the {most:,} it may have"
            )
        return self._read(name)


_EXCLUDED = ("modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers")
"""Where configurations list modules that are not quantised: transformers, compressed-tensors, ModelOpt, vLLM."""


def _matches(pattern: list[str], path: list[str]) -> bool:
    """Whether a path begins as a pattern says, whose components may hold `*`; a `*` at its end stands for any rest.

    >>> _matches(["layers", "*", "attn"], ["layers", "3", "attn", "q"]), _matches(["a*"], ["b"])
    (True, False)
    """
    return len(pattern) <= len(path) and all(map(fnmatchcase, path, pattern))


def quoted(name: str) -> str:
    """A name as messages show it."""
    return shorten(repr(name))


def shaped(tensors: Tensors, name: str) -> str:
    """A tensor with its type and shape, as messages show it."""
    return f"{quoted(name)} ({tensors.dtype(name)} {list(tensors.shape(name))})"
