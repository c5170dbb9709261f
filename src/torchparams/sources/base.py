"""Base class of sources.

A **source** lists named parameters and reads their values. To add a file format, write a module in this folder with a
`Source` subclass and add a row to `opening.FORMATS`. Test it with a subclass of `torchparams.testing.SourceTests`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torchparams.encodings.companions import by_class, coded
from torchparams.errors import (
    UnknownName,
)
from torchparams.expressions.base import Stored
from torchparams.io.files import size_and_time
from torchparams.order import naturally
from torchparams.reading import Lone, Reading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import numpy as np
    import torch

    from torchparams.encodings.base import Structure
    from torchparams.encodings.companions import Coded
    from torchparams.expressions.base import Expression
    from torchparams.info import Location, ParameterInfo
    from torchparams.left_out import LeftOut
    from torchparams.sources.torchfile.verdict import Verdict

NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class Source(ABC):
    """Named parameters: a model, a mapping, a checkpoint file, or several files.

    Listing never reads values, and reading one tensor never reads another. The methods may be called from several
    threads at once.

    Attributes:
        label: Name in tables and messages: a path as the user wrote it, or a class name.
        format: The kind of source: `module`, `mapping`, or a file format's name.
        live: Whether the next listing may differ from this one.
    """

    label: str
    format: str
    live: bool = False
    _spellings: dict[str, str] | None = None
    _ordered: Mapping[str, ParameterInfo] | None = None

    @property
    def borrowed(self) -> bool:
        """Whether the values lie in memory that others own and may write to."""
        return self.live

    @abstractmethod
    def infos(self) -> Mapping[str, ParameterInfo]:
        """Map canonical names to infos, in the order of the source.

        A source that is not live returns the same mapping every time. The mapping may build an info only when it is
        looked up; the length and the names are cheap.
        """

    def ordered(self) -> Mapping[str, ParameterInfo]:
        """Infos in the order of tables: natural order for files, otherwise the order of the source."""
        if self.live or not self.files:
            return self.infos()
        if self._ordered is None:
            self._ordered = naturally(self.infos())
        return self._ordered

    def keys(self) -> Mapping[str, Any]:
        """A mapping whose keys are the canonical names, in order; can be cheaper than `infos`."""
        return self.infos()

    def count(self) -> int:
        """Number of tensors in the source."""
        return len(self.keys())

    def walk(self, *, recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, str, Any]]:
        """Yield name, canonical name and value of every parameter, like `nn.Module.named_parameters`.

        The two names differ for aliases, which are included only if `remove_duplicate` is False.
        """
        for name, info in self.ordered().items():
            for given in (name, *(() if remove_duplicate else info.aliases)):
                if recurse or "." not in given:
                    yield given, name, self.value(name)

    def reading(self) -> Reading:
        """One reading of the source; cheaper than `infos` for a caller that needs several fields."""
        return Reading(self.infos().values())

    def alone(self, name: str) -> Lone | None:
        """The parameter `name`, if it can be found without listing the others; otherwise None."""
        return None

    def snapshot(self, reading: Reading) -> Source:
        """A source with the contents of `reading`, a reading of this source; it never changes."""
        return imported("torchparams.sources.snapshot:SnapshotSource")(self, reading)

    def coded(self, known: Reading | None = None) -> Mapping[str, Coded]:
        """Tensors that hold codes instead of values, by canonical name; reads no values.

        Every operation that computes with values checks this: codes without their scales must not pass for numbers.

        Args:
            known: A reading of all tensors, if the caller has one; a selection may lack the scales.
        """
        found = coded(self.reading() if known is None else known, as_stored=True)
        return {**by_class(self.structures, as_stored=True), **found}

    @abstractmethod
    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """Values of the tensor with the canonical name `name`, in its own shape.

        A view of the bytes if possible; the view is read-only or private, so writing to it never changes a file.
        Otherwise a new array. dtypes that numpy lacks are returned as ml_dtypes types, and sub-byte dtypes are unpacked
        to one byte per element.

        Raises:
            NotReadable: There tensor has no readable values, such as a meta tensor or an opaque dtype.
            LimitExceeded: The tensor is larger than a limit allows.
        """

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """Values as an array that stays valid: as `numpy`, but copied if its memory may be freed earlier.

        Raises:
            NotReadable: See `numpy`.
            LimitExceeded: See `numpy`.
        """
        return self.numpy(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Values as a torch tensor, without a copy where possible."""
        from torchparams.sources.totorch import from_numpy

        info = self.infos()[name]
        return from_numpy(self.numpy(name), info)

    def value(self, name: str) -> Any:
        """The result of `params[name]`: the live tensor itself, or a tensor that is read."""
        return self.tensor(name)

    def span(self, name: str) -> Location | None:
        """Byte range that holds exactly the elements of this tensor, or None.

        The elements in it are in C order, contiguous, little-endian and uncompressed. Such a range can be scanned in
        blocks, compared, and copied from file to file.
        """
        return None

    def row(self, name: str, info: ParameterInfo | None = None) -> Expression:
        """The expression for the row with the canonical name `name`.

        Args:
            name: The name.
            info: Its info, if the caller has it.

        Raises:
            UnknownName: The source has no such row.
            NotReadable: The row is lazy (no shape, no values), or its sharding is not supported.
        """
        if self.borrowed:
            info = self.info(self.resolve(name)) if info is None else info
            if info.sharding is not None:
                sharded: Callable[..., Any] = imported("torchparams.sources.live.sharded:sharded_row")
                row: Expression = sharded(self, info)
                return row
        return Stored(self, name, info)

    def check_size(self, name: str) -> None:
        """Raise if a tensor has far more elements than bytes behind them, before any of it is read.

        Raises:
            LimitExceeded: The tensor is an expanded view of a few bytes, or a few bytes inflate to it.
        """
        return

    def shows_storage(self, name: str) -> bool:
        """Whether the elements are exactly the bytes of the storage: not conjugated, not negated."""
        value: Any = self.value(name) if self.borrowed else None
        return not (hasattr(value, "is_conj") and (value.is_conj() or value.is_neg()))

    def items(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Any]]:
        """Yield canonical name and value of every tensor, or of `names`; each value is read when it is reached."""
        for name in self.keys() if names is None else names:
            yield name, self.value(name)

    def info(self, name: str) -> ParameterInfo:
        """Info of the canonical name `name`; can be cheaper than `infos`."""
        return self.infos()[name]

    def takes(self, name: str) -> bool:
        """Whether `value`, `tensor` and `numpy` accept `name` as it is; they accept every canonical name."""
        return name in self.infos()

    def find(self, name: str) -> str | None:
        """Canonical name for a canonical name, raw name or alias; None if there is no such parameter."""
        infos = self.infos()
        if name in infos:
            return name
        if self.live:
            return next((i.name for i in infos.values() if name == i.raw_name or name in i.aliases), None)
        if self._spellings is None:
            spellings: dict[str, str] = {}
            for info in infos.values():
                for other in (info.raw_name, *info.aliases):
                    spellings.setdefault(other, info.name)
            self._spellings = spellings
        return self._spellings.get(name)

    def resolve(self, name: str) -> str:
        """Canonical name for any spelling, as `find`.

        Raises:
            UnknownName: The source has no such parameter; the message names similar ones.
        """
        found = self.find(name)
        if found is None:
            aliases = (alias for _, alias in self.reading().aliases)
            raise UnknownName.among(name, self.keys(), self.label, aliases=aliases)
        return found

    @property
    def stored(self) -> Source:
        """The source of the tensors as stored: itself, unless it decodes quantised parameters."""
        return self

    @property
    def structures(self) -> Sequence[Structure]:
        """Parameters whose class keeps its values in other tensors; the source lists those tensors."""
        return ()

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata beside the tensors: safetensors metadata, or the other entries of a checkpoint."""
        return NO_METADATA

    @property
    def mappings(self) -> tuple[str, ...]:
        """Mappings in a checkpoint that hold tensors and may follow `#` in a target, at most two levels deep."""
        return ()

    @property
    def verdict(self) -> Verdict | None:
        """What unpickling the files would do besides building tensors; None if nothing is a pickle."""
        return None

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """State of the source that its table does not list, with the reason."""
        return ()

    @property
    def files(self) -> tuple[str, ...]:
        """Files of the source; empty for a source in memory."""
        return ()

    def fingerprint(self) -> tuple[tuple[str, int, int], ...]:
        """Path, size and modification time (ns) of every file: equal as long as nobody writes to them."""
        return tuple((path, *size_and_time(path)) for path in self.files)

    def check_unchanged(self) -> None:
        """Raise if a file was changed after it was listed.

        Raises:
            SourceError: A file was changed.
        """
        return  # sources in memory are listed anew each time

    def why_empty(self) -> list[str]:
        """Sentences that explain why the source lists no tensors, if the reason is known."""
        return []

    def close(self) -> None:
        """Close open files. Arrays that were returned stay valid."""
        return  # nothing is open


def imported(home: str) -> Callable[..., Source]:
    """Import the callable that opens a kind of source."""
    module, _, attribute = home.partition(":")
    found: Callable[..., Source] = getattr(importlib.import_module(module), attribute)
    return found
