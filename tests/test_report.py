"""Reports as text: widths, shortening, escapes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchparams.render.cut import elide, elide_all, width_of
from torchparams.render.terminal import _LOOKS
from torchparams.render.tree import (
    _CSS,
    Cell,
    Column,
    Gap,
    Row,
    Table,
    Text,
    Tree,
    cut,
    fit,
    least_width,
    to_html,
    to_text,
)


@pytest.mark.parametrize(
    ("name", "width", "shown"),
    [
        ("encoder.layers.11.self_attention.output.weight", 40, "encoder.….11.self_a…ention.output.weight"),
        ("encoder.layers.11.self_attention.output.weight", 34, "encoder.….11.sel…ion.output.weight"),
        ("encoder.layers.11.self_attention.output.weight", 28, "encoder.….11.….output.weight"),
        ("encoder.layers.11.self_attention.output.weight", 22, "encoder.….11.….weight"),
        ("encoder.layers.11.self_attention.output.weight", 14, "encoder…weight"),
        ("layers.{0..23}.attention.weight", 24, "layers.{0..23}.….weight"),
        ("    attention_projection", 14, "    atten…tion"),
        ("0.weight", 7, "0.w…ght"),
        ("embedding", 6, "emb…ng"),
        ("embed.weight = head.output.weight", 28, "embed.weight = head.….weight"),
        ("embed.weight = head.weight", 16, "embed.weight = …"),
        ("重み重み重み", 7, "重…み"),
        ("fits.exactly", 12, "fits.exactly"),
        ("abc", 1, "…"),
        ("abc", 0, ""),
    ],
)
def test_a_name_that_is_cut(name: str, width: int, shown: str) -> None:
    assert elide(name, width) == shown


def test_names_that_are_cut_stay_apart() -> None:
    names = [
        f"model.decoder.layers.{i}.{part}.{end}"
        for i in range(12)
        for part in ("self_attention", "cross_attention", "self_attention.projection", "multihead")
        for end in ("weight", "bias")
    ]
    for width in range(22, 50):
        cut = elide_all(names, width)
        assert len(set(cut.values())) == len(names)
        for name, text in cut.items():
            assert len(text) <= width
            assert text.split(".")[0] == "model"
            assert text.split(".")[-1] == name.split(".")[-1]


def test_a_name_that_cannot_be_cut_apart_stays_whole() -> None:
    long = [f"{'a' * 40}{c}{'b' * 40}" for c in "xy"]
    assert list(elide_all(long, 20).values()) == long
    assert elide_all(["aaaaaaaaaa…bbbbbbbbb", "a" * 30 + "b" * 30], 20)["a" * 30 + "b" * 30] == "a" * 30 + "b" * 30


_names = st.lists(st.sampled_from(["a", "bb", "long_component", "longer_component", "0", "11", "weight"]), max_size=7)


@given(st.lists(_names.map(".".join), max_size=12), st.integers(1, 40))
def test_no_two_cut_names_are_equal(names: list[str], width: int) -> None:
    cut = elide_all(names, width)
    assert len(set(cut.values())) == len(set(names))
    assert all(len(text) <= width or text == name for name, text in cut.items())


@given(st.text("ab.1_", max_size=60), st.integers(0, 70))
def test_what_is_cut_fits(text: str, width: int) -> None:
    assert len(elide(text, width)) <= width
    assert (elide(text, width) == text) == (len(text) <= width)


def test_a_name_of_absurd_length_is_cut_at_once() -> None:
    assert len(elide("a.b" * 1_000_000, 20)) == 20


def fitted(widths: list[int], columns: tuple[Column, ...], room: int) -> dict[str, int]:
    least = [least_width(column, width, ["x" * width]) for column, width in zip(columns, widths, strict=True)]
    shown, taken = fit(widths, least, columns, room)
    return {columns[i].title: taken[i] for i in shown}


def test_what_gives_way_first() -> None:
    columns = (
        Column("name", style="name", shrink=True),
        Column("shape"),
        Column("dtype", drop=1),
        Column("numel", drop=2),
        Column("module", shrink=True, yields=True, drop=3),
    )
    widths = [30, 10, 8, 9, 20]
    assert fitted(widths, columns, 85) == {"name": 30, "shape": 10, "dtype": 8, "numel": 9, "module": 20}
    assert fitted(widths, columns, 80) == {"name": 30, "shape": 10, "dtype": 8, "numel": 9, "module": 15}
    assert fitted(widths, columns, 76) == {"name": 30, "shape": 10, "dtype": 8, "numel": 9}
    assert fitted(widths, columns, 55) == {"name": 30, "shape": 10, "dtype": 8}
    assert fitted(widths, columns, 42) == {"name": 30, "shape": 10}  # no name is cut while a column can go
    assert fitted(widths, columns, 30) == {"name": 18, "shape": 10}
    assert fitted(widths, columns, 5) == {"name": 8, "shape": 10}  # and nothing below what can be read


def test_further_names_of_a_tied_tensor_give_way_before_columns() -> None:
    columns = (Column("name", style="name", shrink=True), Column("numel", drop=1))
    table = Table(columns, (Row(("embed.weight = lm_head.output_projection.weight", "12")), Row(("bias", "3"))))
    assert to_text(Tree((table,)), 40) == (
        "name                             numel\n"
        "embed.weight = lm_head.….weight  12\n"
        "bias                             3"
    )


def test_columns_that_are_left_out_are_named() -> None:
    table = Table(
        (Column("name", style="name", shrink=True), Column("numel", right=True, drop=1), Column("size", right=True)),
        (Row(("encoder.attention.weight", "1,000", "4 KiB")), Row(("encoder.attention.bias", "10", "40 B"))),
    )
    assert to_text(Tree((table,)), 33) == (
        "name                       size\n"
        "encoder.attention.weight  4 KiB\n"
        "encoder.attention.bias     40 B\n"
        "not shown in 33 columns: numel"
    )
    assert "numel" in to_text(Tree((table,))).splitlines()[0]  # a pipe gets all of it


def test_sentences_go_on_in_the_next_line() -> None:
    table = Table((Column("check"), Column("result", wraps=True)), (Row(("sizes", "what the file says holds " * 2)),))
    text = Text("  a sentence that is longer than the screen is broken between words", "warn")
    assert to_text(Tree((table, text)), 40) == (
        "check  result\n"
        "sizes  what the file says holds what the\n"
        "       file says holds\n"
        "  a sentence that is longer than the\n"
        "    screen is broken between words"
    )


def test_a_table_in_its_room() -> None:
    table = Table(
        (Column("name", style="name", shrink=True), Column("numel", right=True)),
        cut([Row((f"encoder.layers.{i}.attention.weight", f"{i}")) for i in range(5)], 2, "parameters"),
    )
    report = Tree((Text("title", "title"), table))
    assert to_text(report) == (
        "title\n"
        "name                               numel\n"
        "encoder.layers.0.attention.weight      0\n"
        "… 3 more parameters …\n"
        "encoder.layers.4.attention.weight      4"
    )
    assert to_text(report, 30) == (
        "title\n"
        "name                  numel\n"
        "encoder.….0.….weight      0\n"
        "… 3 more parameters …\n"
        "encoder.….4.….weight      4"
    )


def test_wide_characters_and_control_characters() -> None:
    assert width_of("重み") == 4
    assert to_text(Tree((Table((Column(""), Column("")), (Row(("重み", "x")), Row(("\x1b[2J", "y")))),))) == (
        "重み     x\n\\x1b[2J  y"
    )


def test_html_is_escaped() -> None:
    table = Table((Column("<b>"),), (Row((Cell("<i>", "name"),)), Gap("… <u> …")))
    page = to_html(Tree((Text("<p>"), table)))
    assert not any(tag in page for tag in ("<b>", "<i>", "<u>"))
    assert "&lt;i&gt;" in page


def test_a_notebook_shows_bars_and_findings() -> None:
    columns = (Column("name", style="name"), Column("NaN", right=True), Column("histogram", style="bars"))
    page = to_html(Tree((Table(columns, (Row(("w", Cell("3", "error"), "▁ █")),)), Text("to look at", "warn"))))
    assert re.search(r'<td style="[^"]*font-family:monospace[^"]*">▁ █</td>', page)
    assert re.search(r'<td style="[^"]*color:#e03535[^"]*">3</td>', page)
    assert re.search(r'<p style="color:#c0620a;font-weight:bold">to look at</p>', page)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    """The contrast of WCAG 2."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("look", sorted({*_LOOKS.values(), *_CSS.values()}))
def test_every_colour_can_be_read_on_black_and_on_white(look: str) -> None:
    if number := re.search(r"38;5;(\d+)", look):
        levels = (0, 95, 135, 175, 215, 255)
        place = int(number[1]) - 16
        colour = "".join(f"{levels[place // step % 6]:02x}" for step in (36, 6, 1))
    elif css := re.search(r"color:#(\w{6})", look):
        colour = css[1]
    else:
        assert not re.search("3[0-7]|9[0-7]|color", look)  # a colour of the theme, of which nothing is known
        return
    assert contrast(colour, "000000") > 3.5
    assert contrast(colour, "ffffff") > 3.5
