"""Registry of encodings, and the search for quantised parameters in a source.

A quantised checkpoint stores a weight as several tensors. Each encoding recognises its own by names, dtypes and shapes,
and by the configuration beside the checkpoint. If these are not sufficient, nothing is claimed.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchparams.encodings.base import Claim, Refused, Tensors, quoted
from torchparams.encodings.companions import Coded, coded
from torchparams.errors import NotReadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torchparams.encodings.base import Structure
    from torchparams.info import ParameterInfo
    from torchparams.reading import Reading

ENCODINGS: tuple[str, ...] = (
    "torchparams.encodings.compressed:claim",
    "torchparams.encodings.fp4:claim",
    "torchparams.encodings.gptq:claim",
    "torchparams.encodings.bitsandbytes:claim",
    "torchparams.encodings.fp8:claim",
)
"""`module:function` of each encoding, tried in order; imported once there are codes."""


@dataclass(frozen=True)
class Found:
    """Quantised parameters of a source.

    Attributes:
        claims: Decodable parameters, by the name of their codes.
        coded: Tensors that hold codes, or belong to codes, that cannot be decoded.
    """

    claims: Mapping[str, Claim] = field(default_factory=dict)
    coded: Mapping[str, Coded] = field(default_factory=dict)

    @property
    def parts(self) -> set[str]:
        """Names of the stored tensors of all claims."""
        return {part for claim in self.claims.values() for part in claim.parts}


NOTHING = Found()


def find(
    reading: Reading,
    config: Callable[[], Mapping[str, Any]],
    read: Callable[[str], bytes],
    structures: Iterable[Structure] = (),
) -> Found:
    """Find quantised parameters, and codes that cannot be decoded.

    Args:
        reading: Reading of all stored tensors.
        config: Function that returns the `quantization_config` beside the checkpoint, or an empty mapping.
        read: Function that returns the bytes of a small tensor.
        structures: Parameters of classes that keep their values in other tensors.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> from torchparams.dtypes import DType
    >>> weights = {"w": np.ones((2, 3), DType.of("float8_e4m3fn").numpy), "w_scale": np.ones(1, np.float32)}
    >>> [claim.encoding for claim in find(tp.of(weights, raw=True).reading(), dict, lambda name: b"").claims.values()]
    ['fp8-tensor']
    """
    unknown = coded(reading)
    if not unknown and not structures:
        return NOTHING
    infos = {info.name: info for info in reading.infos}
    tensors = Tensors(infos, config, read)
    claims: dict[str, Claim] = {}
    refused: dict[str, Coded] = {}
    taken: set[str] = set()
    for structure in structures:
        from torchparams.encodings.classes import structured, unpacked_biases

        described = structured(structure, tensors)
        if isinstance(described, Refused):
            refused.update(_refused(described, infos))
        elif taken.isdisjoint(described.parts) and described.name not in infos:
            claims[described.parts[0]] = described
            taken.update(described.parts)
            for bias in unpacked_biases(described, infos):
                claims[bias.parts[0]] = bias
                taken.update(bias.parts)
    for name in [each.name for each in unknown.values() if each.codes]:
        found = None if name in taken or name in refused else _claimed(name, tensors)
        if isinstance(found, Claim):
            # Each row has one name, and each stored tensor belongs to one row.
            if taken.isdisjoint(found.parts) and (found.name in found.parts or found.name not in infos):
                claims[name] = found
                taken.update(found.parts)
        elif found is not None:
            refused.update(_refused(found, infos))
    rest = {name: each for name, each in unknown.items() if name not in taken}
    return Found(claims, {**rest, **{name: each for name, each in refused.items() if name not in taken}})


def _claimed(name: str, tensors: Tensors) -> Claim | Refused | None:
    for claim in _functions():
        try:
            found = claim(name, tensors)
        except NotReadable as error:
            return Refused((name,), error.what)
        if isinstance(found, Claim):
            try:
                module = tensors.unconverted(found.name)
            except NotReadable as error:
                return Refused(found.parts, error.what)
            # Then it is either no code, or the configuration is that of another checkpoint.
            if module is not None:
                return Refused(found.parts, f"The configuration says that {quoted(module)} is not quantised")
        if found is not None:
            return found
    return None


def _functions() -> Iterator[Callable[[str, Tensors], Claim | Refused | None]]:
    for home in ENCODINGS:
        module, _, function = home.partition(":")
        yield getattr(importlib.import_module(module), function)


def _refused(found: Refused, infos: Mapping[str, ParameterInfo]) -> Iterator[tuple[str, Coded]]:
    codes, *others = found.parts
    yield codes, Coded(codes, codes, True, why=found.reason)
    for name in others:
        if name in infos:
            number = infos[name].dtype.kind == "float" and infos[name].dtype.bits > 8
            yield name, Coded(name, codes, False, number, why=found.reason)
