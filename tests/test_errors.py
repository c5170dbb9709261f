from __future__ import annotations

import difflib

import pytest

from torchparams.errors import UnknownName, nearest


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("embeding", "embedding"),
        ("bais", "bias"),
        ("clasifier.wieght", "classifier.weight"),
        ("encoder.layers.1999.atn.weight", "encoder.layers.1999.attn.weight"),
        ("encodr.layer.7.attn.weigth", "encoder.layers.7.attn.weight"),
    ],
)
def test_the_nearest_of_very_many_names(asked: str, meant: str) -> None:
    names = [f"encoder.layers.{i}.attn.weight" for i in range(3000)]
    names += [f"w{i}" for i in range(3000)] + ["embedding", "bias", "classifier.weight"]
    assert nearest(asked, names)[0] == meant
    assert nearest(asked, names, 1) == difflib.get_close_matches(asked, names, 1)


def test_of_very_many_names_few_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def close(name: str, names: list[str], n: int, cutoff: float) -> list[str]:
        compared.append(len(names))
        return []

    monkeypatch.setattr(difflib, "get_close_matches", close)
    nearest("x", [f"layer{i}" for i in range(50_000)])
    assert compared == [500]


def test_nothing_is_near() -> None:
    assert nearest("zzz", [f"layer{i}" for i in range(5000)]) == []
    assert nearest("", ["a"] * 5000) == []
    assert nearest("", ["", *["a"] * 5000]) == [""]
    assert nearest("a", [""] * 5000) == []


def test_a_module_is_no_parameter() -> None:
    names = ["layers.0.weight", "layers.0.bias", "layers.01.bias", "my layer.bias"]
    assert str(UnknownName.among("layers.0", names, "m.pt")) == (
        "m.pt: No parameter is named 'layers.0'. It is a module with 2 parameters. "
        "The selector `layers.0.**` selects them."
    )
    assert str(UnknownName.among("my layer", names)) == (
        "No parameter is named 'my layer'. It is a module with 1 parameters."
    )


@pytest.mark.parametrize("selector", ["**.bias", ":bias", "[ndim=2]", "{a,b}.weight", "/x/"])
def test_a_selector_is_no_name(selector: str) -> None:
    assert str(UnknownName.among(selector, ["head", selector + "_"])).endswith(
        f"Did you mean '{selector}_'? For a selector, use select."
    )
    assert str(UnknownName.among(selector, ["head", "tail"])) == (
        f"No parameter is named {selector!r}. There are 2 names. For a selector, use select."
    )


def test_a_name_of_absurd_length_is_shortened() -> None:
    said = str(UnknownName.among("x" * 5000, ["head"]))
    assert said.startswith("No parameter is named 'xxx")
    assert len(said) < 250
