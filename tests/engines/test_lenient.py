"""Runs that go on past tensors without values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from torchparams.engines import ThreadEngine
from torchparams.engines.lenient import LenientSource, Unread, lenient_sketches
from torchparams.errors import FileFormatError, LimitExceeded, NotReadable
from torchparams.testing import MemorySource

if TYPE_CHECKING:
    from torchparams.info import ParameterInfo
    from torchparams.sketch import Sketch

ARRAYS = {f"w{i}": np.full(3000, i, np.float32) for i in range(6)}


class Broken(MemorySource):
    """A source of which some tensors raise instead of giving values."""

    def __init__(self, errors: dict[str, Exception]) -> None:
        super().__init__(ARRAYS)
        self.errors = errors
        self.asked: list[str] = []

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        self.asked.append(name)
        if name in self.errors:
            raise self.errors[name]
        return super().numpy(name)


def mean(info: ParameterInfo, sketch: Sketch) -> float:
    assert info.numel == sketch.numel
    return sketch.mean


@pytest.mark.parametrize("threads", [1, 2])
def test_the_others_are_read(threads: int) -> None:
    source = Broken({"w1": NotReadable("it has none", hint="ask later"), "w4": LimitExceeded("too large")})
    engine = ThreadEngine(threads, block_bytes=1024, part_bytes=4096)
    found = dict(lenient_sketches(source, source.infos().values(), mean, engine=engine))
    assert found == {
        "w0": 0.0,
        "w1": Unread("w1", "it has none; ask later"),
        "w2": 2.0,
        "w3": 3.0,
        "w4": Unread("w4", "too large"),
        "w5": 5.0,
    }
    assert sorted(source.asked) == sorted(ARRAYS)  # once each, however many parts and blocks there are


def test_damage_is_an_error() -> None:
    source = Broken({"w2": FileFormatError("damaged", where="here")})
    with pytest.raises(FileFormatError, match=r"^here: damaged$"):
        dict(lenient_sketches(source, source.infos().values(), mean))


def test_what_is_not_asked_for_is_not_read() -> None:
    source = Broken({})
    infos = source.infos()
    assert dict(lenient_sketches(source, [infos["w3"]], mean)) == {"w3": 3.0}
    assert source.asked == ["w3"]


def test_it_gives_what_the_other_source_gives() -> None:
    source = MemorySource(ARRAYS)
    lenient = LenientSource(source)
    assert lenient.infos() is source.infos()
    assert lenient.span("w0") is None
    assert lenient.label == source.label
    assert np.shares_memory(lenient.numpy("w0"), source.numpy("w0"))
