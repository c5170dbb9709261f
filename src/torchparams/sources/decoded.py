"""A source with its quantised parameters decoded: each is one row, named and shaped as in the unquantised model."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torchparams.encodings.known import Found, find
from torchparams.io.opened import bytes_of_file
from torchparams.sources.base import Source
from torchparams.sources.config import quantization_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from torchparams.encodings.base import Claim
    from torchparams.encodings.companions import Coded
    from torchparams.expressions.base import Expression
    from torchparams.info import Location, ParameterInfo
    from torchparams.left_out import LeftOut
    from torchparams.records import Records
    from torchparams.sources.torchfile.verdict import Verdict


class DecodedSource(Source):
    """The rows of another source, of which the parts of a quantised parameter are one.

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
        self._known: tuple[Found, Mapping[str, ParameterInfo]] | None = None

    def __eq__(self, other: object) -> bool:
        return self._base == other._base if isinstance(other, DecodedSource) else NotImplemented

    def __hash__(self) -> int:
        return hash((DecodedSource, self._base))

    def __reduce__(self) -> tuple[Any, ...]:
        return DecodedSource, (self._base,)

    # --- listing -----------------------------------------------------------------------------------

    def _read(self) -> tuple[Found, Mapping[str, ParameterInfo]]:
        """What the encodings claim, and the records; of a source that may change, anew each time."""
        if self._known is not None:
            return self._known
        base = self._base
        records = base.records()
        found = find(records, lambda: quantization_config(base), lambda name: small_bytes(base, name), base.structures)
        infos = {info.name: info for info in records.infos}
        parts = found.parts
        made: dict[str, ParameterInfo] = {}
        for name, info in infos.items():
            if name in found.claims:
                row = found.claims[name].info(infos)
                made[row.name] = row
            elif name not in parts:
                made[name] = info
        read = found, MappingProxyType(made)
        if not self.live:
            self._known = read
        return read

    def infos(self) -> Mapping[str, ParameterInfo]:
        """The records; a quantised parameter stands where its codes do."""
        return self._read()[1]

    def coded(self, known: Records | None = None) -> Mapping[str, Coded]:
        """The codes that no encoding claims."""
        found = self._read()[0]
        # A snapshot of a selection may lack the scales, and knows the codes all the same.
        known_below = {name: each for name, each in self._base.coded().items() if name not in found.parts}
        return {**known_below, **found.coded}

    def _claim(self, name: str) -> Claim | None:
        found, infos = self._read()
        info = infos.get(name)
        if info is None or info.encoded is None:
            return None
        return found.claims[info.encoded.parts[0]]

    def snapshot(self, records: Records) -> Source:
        """A source of what the stored tensors of `records` hold, decoded."""
        names = {name for info in records.infos for name in (info.raw_names if info.encoded else (info.name,))}
        return DecodedSource(self._base.snapshot(self._base.records().only(names)))

    @property
    def borrowed(self) -> bool:
        """Whether the stored tensors lie in memory that belongs to others."""
        return self._base.borrowed

    @property
    def stored(self) -> Source:
        """The source of the stored tensors."""
        return self._base

    # --- values ------------------------------------------------------------------------------------

    def row(self, name: str, info: ParameterInfo | None = None) -> Expression:
        """The expression of a row."""
        claim = self._claim(name)
        return self._base.row(name, info) if claim is None else claim.expression(self._base.row)

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """The values of a row, decoded where it is quantised."""
        claim = self._claim(name)
        if claim is None:
            return self._base.numpy(name)
        from torchparams.expressions.work import evaluate

        return evaluate(claim.expression(self._base.row))

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """The values of a row as an array to keep."""
        return self._base.array(name) if self._claim(name) is None else self.numpy(name)

    def tensor(self, name: str) -> Any:
        """The values of a row as a torch tensor."""
        return self._base.tensor(name) if self._claim(name) is None else super().tensor(name)

    def value(self, name: str) -> Any:
        """The tensor of a plain row itself where there is one."""
        return self._base.value(name) if self._claim(name) is None else self.tensor(name)

    def span(self, name: str) -> Location | None:
        """The byte range of a plain row."""
        return self._base.span(name) if self._claim(name) is None else None

    def check_size(self, name: str) -> None:
        """Refuse a plain row that has far more elements than there are bytes behind them."""
        if self._claim(name) is None:
            self._base.check_size(name)

    def shows_storage(self, name: str) -> bool:
        """Whether the elements of a plain row are those of its storage."""
        return self._claim(name) is None and self._base.shows_storage(name)

    # --- the rest is the other's -------------------------------------------------------------------

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the checkpoint says of itself."""
        return self._base.metadata

    @property
    def mappings(self) -> tuple[str, ...]:
        """The mappings within a checkpoint that hold tensors."""
        return self._base.mappings

    @property
    def verdict(self) -> Verdict | None:
        """What unpickling the files would do beside making tensors."""
        return self._base.verdict

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """State that the stored tensors do not hold."""
        return self._base.left_out

    @property
    def files(self) -> tuple[str, ...]:
        """The files it is read from."""
        return self._base.files

    def fingerprint(self) -> tuple[tuple[str, int, int], ...]:
        """Path, size and modification time of every file."""
        return self._base.fingerprint()

    def check_unchanged(self) -> None:
        """Refuse files that were written to since they were listed."""
        self._base.check_unchanged()

    def why_empty(self) -> list[str]:
        """Sentences that say why it lists nothing."""
        return self._base.why_empty()

    def close(self) -> None:
        """Let go of open files."""
        self._base.close()


def small_bytes(source: Source, name: str) -> bytes:
    """The bytes of a small stored tensor; of a file, without numpy."""
    place = source.span(name)
    if place is None:
        return source.numpy(name).tobytes()
    return bytes_of_file(place.file).read(place.start, place.stop)
