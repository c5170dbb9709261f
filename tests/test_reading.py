from __future__ import annotations

import numpy as np
import pytest
from torch import nn

import torchparams as tp
from fake_infos import LINEAR, NORM, live, stored, transformer
from torchparams.reading import FieldFunction, Reading
from torchparams.sources.live.tensors import LiveReading


def test_a_reading_of_records_that_are_there() -> None:
    infos = transformer()
    reading = Reading(infos)
    assert reading.names == [info.name for info in infos]
    assert list(reading) == reading.infos == infos
    assert len(reading) == len(infos)
    assert reading.tensors is None
    assert reading.column("ndim") == [info.ndim for info in infos]
    assert reading.column("ndim") is reading.column("ndim")
    assert reading.column("owner")[0] == (infos[0].module, infos[0].bases)
    assert list(reading.aliases) == [(0, "lm_head.weight")]
    assert list(reading.raws) == []
    assert list(Reading([live("fc.w", raw="module.fc.w"), live("a", raw="a"), live("b")]).raws) == [(0, "module.fc.w")]


def test_part_of_a_reading_keeps_its_order() -> None:
    names = {"head.bias", "embeddings.word.weight"}
    for reading in (Reading(transformer()), tp.of({info.name: np.zeros(2) for info in transformer()}).reading()):
        assert reading.only(names).names == ["embeddings.word.weight", "head.bias"]
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[1].weight = model[0].weight
    part = LiveReading.of(model, False).only({"1.bias", "0.weight"})
    assert part.names == ["0.weight", "1.bias"]
    assert list(part.aliases) == [(0, "1.weight")]
    assert part.infos == [tp.of(model).info(name) for name in part.names]
    assert part.tensors["1.bias"] is model[1].bias


def test_a_reading_of_nothing() -> None:
    for reading in (Reading([]), LiveReading.of(nn.ReLU(), True)):
        assert reading.names == []
        assert list(reading) == reading.infos == []
        assert len(reading) == len(reading.column("shape")) == len(list(reading.aliases)) == 0


def test_selectors_on_one_reading_share_what_they_found() -> None:
    calls: list[str] = []
    reading = Reading(transformer())
    chosen = tp.Selector(lambda info: calls.append(info.name))
    for _ in range(3):
        assert chosen.names(reading) == frozenset()
    assert len(calls) == len(reading)
    assert tp.Selector("head.*").names(reading, strict=True) == {"head.weight", "head.bias"}


def test_a_function_of_fields_is_a_predicate() -> None:
    infos = [live("a", (2, 2), module=NORM), live("b", (3,), module=LINEAR), live("c", None), stored("d")]
    function = FieldFunction("flat", ("shape", "owner"), lambda shape, owner: shape is not None and len(shape) == 1)
    assert [function(info) for info in infos] == function.over(Reading(infos)) == [False, True, False, True]
    chosen = tp.Selector(function)
    assert str(chosen) == "<function flat>"
    assert chosen.names(infos) == {"b", "d"}
    assert (chosen & "b | c").names(infos) == {"b"}
    assert tp.Selector(lambda info: function(info)).names(infos) == chosen.names(infos)


def test_a_function_of_fields_looks_up_these_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiveReading, "infos", property(lambda self: pytest.fail("records were made")))
    asked: list[str] = []
    find = LiveReading._find
    monkeypatch.setattr(LiveReading, "_find", lambda self, field: asked.append(field) or find(self, field))  # type: ignore[func-returns-value]  # notes it
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert tp.of(model).select(FieldFunction("named", ("name",), lambda name: name == "0.bias")).names == ["0.bias"]
    assert set(asked) == {"name"}
