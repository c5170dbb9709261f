"""A source that decodes quantised parameters: each is one row with its original name and shape."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torchparams.encodings.known import find
from torchparams.io.opened import bytes_of_file
from torchparams.sources.base import Source
from torchparams.sources.config import quantization_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from torchparams.encodings.base import Claim
    from torchparams.encodings.companions import Coded
    from torchparams.encodings.known import Found
    from torchparams.expressions.base import Expression
    from torchparams.info import Location, ParameterInfo
    from torchparams.left_out import LeftOut
    from torchparams.reading import Reading
    from torchparams.sources.torchfile.verdict import Verdict


_Read = tuple["Found", "Mapping[str, ParameterInfo]", "dict[str, Claim]"]


class DecodedSource(Source):
    """The rows of another source, with the stored tensors of each quantised parameter combined into one row.

    Args:
        base: The source of the stored tensors.

    >>> import numpy as np
    >>> from torchparams.dtypes import DType
    >>> from torchparams.testing import MemorySource
    >>> codes = np.array([[1, -2]], DType.of("float8_e4m3fn").numpy)
    >>> source = DecodedSource(MemorySource({"w": codes, "w_scale": np.array([0.5], np.float32)}))
    >>> source.numpy("w"), source.infos()["w"].encoding
    (array([[ 0.5, -1. ]], dtype=float32), 'fp8-tensor')
    """

    def __init__(self, base: Source) -> None:
        self._base = base
        self.label, self.format, self.live = base.label, base.format, base.live
        self._known: _Read | None = None

    def __eq__(self, other: object) -> bool:
        return self._base == other._base if isinstance(other, DecodedSource) else NotImplemented

    def __hash__(self) -> int:
        return hash((DecodedSource, self._base))

    def __reduce__(self) -> tuple[Any, ...]:
        return DecodedSource, (self._base,)

    # --- listing -----------------------------------------------------------------------------------

    def _read(self) -> _Read:
        """Findings of the encodings, infos, and claims by name; computed each time if the source may change."""
        if self._known is not None:
            return self._known
        base = self._base
        reading = base.reading()
        found = find(reading, lambda: quantization_config(base), lambda name: small_bytes(base, name), base.structures)
        infos = {info.name: info for info in reading.infos}
        parts = found.parts
        made: dict[str, ParameterInfo] = {}
        claims: dict[str, Claim] = {}
        for name, info in infos.items():
            if name in found.claims:
                row = found.claims[name].info(infos)
                made[row.name] = row
                claims[row.name] = found.claims[name]
            elif name not in parts:
                made[name] = info
        read = found, MappingProxyType(made), claims
        if not self.live:
            self._known = read
        return read

    def infos(self) -> Mapping[str, ParameterInfo]:
        """Infos; a quantised parameter has the position of its codes."""
        return self._read()[1]

    def coded(self, known: Reading | None = None) -> Mapping[str, Coded]:
        """Codes that no encoding claims."""
        found = self._read()[0]
        # A snapshot of a selection may lack the scales, but it still knows which tensors are codes.
        below = {name: each for name, each in self._base.coded().items() if name not in found.parts}
        return {**{name: replace(each, as_stored=False) for name, each in below.items()}, **found.coded}

    def _claim(self, name: str) -> Claim | None:
        return self._read()[2].get(name)

    def snapshot(self, reading: Reading) -> Source:
        """A decoded source of the stored tensors of `reading`."""
        claims = self._read()[2]
        names = {part for name in reading.names for part in (claims[name].parts if name in claims else (name,))}
        return DecodedSource(self._base.snapshot(self._base.reading().only(names)))

    @property
    def borrowed(self) -> bool:
        """Whether the stored tensors lie in memory that others own."""
        return self._base.borrowed

    @property
    def stored(self) -> Source:
        """Source of the stored tensors."""
        return self._base

    # --- values ------------------------------------------------------------------------------------

    def row(self, name: str, info: ParameterInfo | None = None) -> Expression:
        """Expression of a row."""
        claim = self._claim(name)
        return self._base.row(name, info) if claim is None else claim.expression(self._base.row)

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """Values of a row, decoded if it is quantised."""
        claim = self._claim(name)
        if claim is None:
            return self._base.numpy(name)
        from torchparams.expressions.work import evaluate

        return evaluate(claim.expression(self._base.row))

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """Values of a row as an array that stays valid."""
        return self._base.array(name) if self._claim(name) is None else self.numpy(name)

    def tensor(self, name: str) -> Any:
        """Values of a row as a torch tensor."""
        return self._base.tensor(name) if self._claim(name) is None else super().tensor(name)

    def value(self, name: str) -> Any:
        """The tensor of a plain row itself, if there is one."""
        return self._base.value(name) if self._claim(name) is None else self.tensor(name)

    def span(self, name: str) -> Location | None:
        """The byte range of a plain row."""
        return self._base.span(name) if self._claim(name) is None else None

    def check_size(self, name: str) -> None:
        """Raise if a plain row has far more elements than bytes behind them."""
        if self._claim(name) is None:
            self._base.check_size(name)

    def shows_storage(self, name: str) -> bool:
        """Whether the elements of a plain row are exactly the bytes of its storage."""
        return self._claim(name) is None and self._base.shows_storage(name)

    # --- delegated to the base source ---------------------------------------------------------------

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata of the checkpoint."""
        return self._base.metadata

    @property
    def mappings(self) -> tuple[str, ...]:
        """Mappings in a checkpoint that hold tensors."""
        return self._base.mappings

    @property
    def verdict(self) -> Verdict | None:
        """What unpickling the files would do besides building tensors."""
        return self._base.verdict

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """State that the stored tensors do not include."""
        return self._base.left_out

    @property
    def files(self) -> tuple[str, ...]:
        """Files of the source."""
        return self._base.files

    def fingerprint(self) -> tuple[tuple[str, int, int], ...]:
        """Path, size and modification time of every file."""
        return self._base.fingerprint()

    def check_unchanged(self) -> None:
        """Raise if a file was changed after it was listed."""
        self._base.check_unchanged()

    def why_empty(self) -> list[str]:
        """Sentences that explain why the source lists no tensors."""
        return self._base.why_empty()

    def close(self) -> None:
        """Close open files."""
        self._base.close()


def small_bytes(source: Source, name: str) -> bytes:
    """Bytes of a small stored tensor; numpy is not needed for a file."""
    place = source.span(name)
    if place is None:
        return source.numpy(name).tobytes()
    return bytes_of_file(place.file).read(place.start, place.stop)
