"""How a report becomes text: widths, cuts, escapes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchparams.report import Cell, Column, Gap, Report, Row, Table, Text, cut, elide, fit, to_html, to_text, width_of


@pytest.mark.parametrize(
    ("name", "width", "shown"),
    [
        ("encoder.layers.11.self_attention.output.weight", 34, "en…er.la…rs.11.se…on.output.weight"),
        ("encoder.layers.11.self_attention.output.weight", 22, "e…r.l…s.11.s…n.o…t.w…t"),
        ("encoder.layers.11.self_attention.output.weight", 14, "….….11.….o….w…"),
        ("encoder.layers.11.self_attention.output.weight", 8, "enco…ght"),
        ("0.weight", 7, "0.we…ht"),
        ("embedding", 6, "emb…ng"),
        ("embed.weight = head.weight", 12, "embed.…eight"),
        ("fits.exactly", 12, "fits.exactly"),
        ("abc", 1, "…"),
        ("abc", 0, ""),
    ],
)
def test_a_name_that_is_cut(name: str, width: int, shown: str) -> None:
    assert elide(name, width) == shown


def test_equal_layers_stay_apart() -> None:
    names = [f"decoder.layers.{i}.multihead_attn.in_proj_weight" for i in range(12)]
    assert len({elide(name, 22) for name in names}) == 12


@given(st.text("ab.1_", max_size=60), st.integers(0, 70))
def test_what_is_cut_fits(text: str, width: int) -> None:
    assert len(elide(text, width)) == min(len(text), width)


def test_a_name_of_absurd_length_is_cut_at_once() -> None:
    assert len(elide("a.b" * 1_000_000, 20)) == 20


def test_widths() -> None:
    columns = (Column("name", shrink=True), Column("shape"), Column("module", shrink=True, yields=True))
    assert fit([30, 10, 20], columns, 64) == [30, 10, 20]
    assert fit([30, 10, 20], columns, 60) == [30, 10, 16]  # what yields is cut first
    assert fit([30, 10, 20], columns, 40) == [18, 10, 8]
    assert fit([30, 10, 20], columns, 10) == [8, 10, 8]  # and nothing below what can be read
    two = (Column("a", shrink=True), Column("b", shrink=True))
    assert fit([30, 20], two, 42) == [20, 20]


def test_a_table_in_its_room() -> None:
    table = Table(
        (Column("name", shrink=True), Column("numel", right=True)),
        cut([Row((f"encoder.layers.{i}.attention.weight", f"{i}")) for i in range(5)], 2, "parameters"),
    )
    report = Report((Text("title", "title"), table))
    assert to_text(report) == (
        "title\n"
        "name                               numel\n"
        "encoder.layers.0.attention.weight      0\n"
        "… 3 more parameters …\n"
        "encoder.layers.4.attention.weight      4"
    )
    assert to_text(report, 30) == (
        "title\n"
        "name                     numel\n"
        "en…r.la…s.0.at…on.we…ht      0\n"
        "… 3 more parameters …\n"
        "en…r.la…s.4.at…on.we…ht      4"
    )


def test_wide_characters_and_control_characters() -> None:
    assert width_of("重み") == 4
    assert to_text(Report((Table((Column(""), Column("")), (Row(("重み", "x")), Row(("\x1b[2J", "y")))),))) == (
        "重み     x\n\\x1b[2J  y"
    )


def test_html_is_escaped() -> None:
    table = Table((Column("<b>"),), (Row((Cell("<i>", "name"),)), Gap("… <u> …")))
    page = to_html(Report((Text("<p>"), table)))
    assert not any(tag in page for tag in ("<b>", "<i>", "<u>"))
    assert "&lt;i&gt;" in page
