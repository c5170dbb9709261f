"""The report in a browser: no console messages, no requests, and every view shows its data."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

import torchparams as tp
from in_browser import chromium, opened
from torchparams.dtypes import DType

if TYPE_CHECKING:
    from collections.abc import Iterator

SCREENS = Path(__file__).parent / "screens"
LAYERS = 6
ROLES = ["attn.q.weight", "attn.k.weight", "mlp.up.weight", "norm.weight"]


def network(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """A small transformer, of which one tensor has a scale of its own and one a NaN."""
    numbers = np.random.default_rng(seed)
    bfloat16 = DType.of("bfloat16").numpy
    found = {"embed.weight": (numbers.standard_normal((200, 32)) * 0.02).astype(bfloat16)}
    for layer in range(LAYERS):
        for i, role in enumerate(ROLES):
            shape = (32,) if "norm" in role else (64, 32)
            scale = 0.02 * (i + 1) * (1 + layer / 20) * (10 if (layer, role) == (2, "mlp.up.weight") else 1)
            found[f"model.layers.{layer}.{role}"] = (numbers.standard_normal(shape) * scale).astype(bfloat16)
    found["model.layers.4.attn.q.weight"][0, 3] = np.nan
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one target, with everything that can be asked for."""
    path = tmp_path_factory.mktemp("one") / "r.html"
    tp.report(network(), path, spectra="**.mlp.up.weight", pictures="**.layers.4.attn.q.weight")
    return path


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two targets."""
    path = tmp_path_factory.mktemp("two") / "r.html"
    tp.report(network(), path, other=other())
    return path


def other() -> dict[str, np.ndarray[Any, Any]]:
    numbers = np.random.default_rng(1)
    found = {
        name: (value.astype(np.float32) * (1 + 0.05 * numbers.standard_normal(value.shape))).astype(value.dtype)
        if "norm" not in name
        else value
        for name, value in network().items()
    }
    del found["embed.weight"]
    return found | {"head.weight": np.ones((2, 2), np.float32)}


def shown(text: str) -> float:
    """The number that a text of the page shows."""
    return float(re.sub(r"[^\d.e-]", "", text.replace("−", "-").replace(",", "")))


# --- what is there as soon as it opens ------------------------------------------------------------


def test_rows_and_roles_are_text_as_soon_as_the_page_opens(browser: Any, one: Path) -> None:
    with opened(browser, one) as found:
        page = found.page
        assert page.title() == "dict · torchparams"
        names = page.locator("#tensors .rows .name").all_text_contents()
        assert names == list(network())
        roles = page.locator("#layers .role-labels span").all_text_contents()
        assert roles == [*(role.replace(".", "") for role in ROLES), "weight"]
        assert page.locator("#layers canvas").count() == 2
        assert page.locator("#layers canvas").first.get_attribute("data-drawn") == "std all log"
        heat = page.locator("#layers canvas").first.bounding_box()
        assert heat["y"] < 900  # on the first screen


def test_the_numbers_of_the_table_are_those_of_stats(browser: Any, one: Path) -> None:
    rows = tp.stats(network())
    with opened(browser, one) as found:
        for key in ("std", "mean", "min", "max"):
            texts = found.page.locator(f"#tensors .rows [data-key={key}]").all_text_contents()
            expected = [getattr(row, key) for row in rows]
            assert [shown(text) for text in texts] == pytest.approx(expected, rel=1e-2 if key == "mean" else 1e-3)


def test_the_overview_counts(browser: Any, one: Path) -> None:
    params = tp.of(network())
    with opened(browser, one) as found:
        values = found.page.locator("#overview .figure .detail").all_text_contents()
        assert values[0] == f"{params.numel:,}"
        assert values[2] == f"{LAYERS} layers in 1 stack"
        titles = found.page.locator("#overview .finding-title").all_text_contents()
        assert titles == ["NaN or infinite values", "Scale far from the siblings"]


# --- views ----------------------------------------------------------------------------------------


def pixels(page: Any) -> np.ndarray[Any, Any]:
    """The colour of each cell of the heat map, below its number: layers × roles × 3."""
    shot = Image.open(BytesIO(page.locator("#layers canvas").first.screenshot())).convert("RGB")
    picture = np.asarray(shot, np.int16)
    high, wide = picture.shape[0] / LAYERS, picture.shape[1] / len(ROLES)
    return np.array([[picture[int(high * y) + 3, int(wide * x) + 4] for x in range(len(ROLES))] for y in range(LAYERS)])


def test_the_heat_map_is_coloured_by_the_statistic(browser: Any, one: Path) -> None:
    rows = tp.stats(network())
    with opened(browser, one) as found:
        page = found.ready()
        cells = pixels(page).sum(axis=2)
        std = np.array([[rows[f"model.layers.{layer}.{role}"].std for role in ROLES] for layer in range(LAYERS)])
        light = cells.ravel()[std.ravel().argsort()]  # in the light theme, the greater the darker
        assert (light[:-1] >= light[1:] - 12).all()
        assert light[0] > light[-1] + 200
        page.get_by_role("button", name="per role").click()
        assert (pixels(page)[0, :3] == pixels(page)[0, 0]).all()  # the least of each role
        page.select_option("#statistic", "nonfinite")
        odd = pixels(page).sum(axis=2)
        assert odd[4, 0] < odd[3, 0] - 200


def test_a_card_tells_the_numbers_of_a_cell(browser: Any, one: Path) -> None:
    with opened(browser, one) as found:
        page = found.ready()
        box = page.locator("#layers canvas").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 2.5 / LAYERS)
        card = page.locator(".tip")
        assert card.locator(".tip-name").text_content() == "model.layers.2.mlp.up.weight"
        std = tp.stats(network())["model.layers.2.mlp.up.weight"].std
        assert shown(card.locator("dd").first.text_content()) == pytest.approx(std, rel=1e-3)
        assert "nearest siblings" in card.locator(".tip-finding").text_content()


def test_the_icicle_goes_in_and_out(browser: Any, one: Path) -> None:
    with opened(browser, one) as found:
        page = found.ready()
        blocks = page.locator("#modules g.block")
        assert blocks.count() > LAYERS * len(ROLES)
        assert page.locator("#modules svg").get_attribute("data-drawn") == "std"
        page.locator("#modules g.block[aria-label^='3,']").click()
        crumbs = page.locator("#modules .crumbs button")
        assert crumbs.all_text_contents() == ["all", "model.layers", "3"]
        assert blocks.count() == 1 + 3 + 2  # the layer; attn with two, mlp and norm that have one child each
        crumbs.first.click()
        assert crumbs.all_text_contents() == ["all"]
        page.get_by_role("button", name="elements").click()


def test_ridgelines_are_one_curve_for_each_layer(browser: Any, one: Path) -> None:
    with opened(browser, one) as found:
        page = found.ready()
        assert page.locator("#shapes g.ridge").count() == LAYERS
        labels = page.locator("#shapes select option").all_text_contents()
        assert labels == [f"model.layers.*.{role}" for role in ROLES]
        page.select_option("#shapes select", label="model.layers.*.norm.weight")
        names = [each.get_attribute("aria-label") for each in page.locator("#shapes g.ridge").all()]
        assert names == [f"model.layers.{layer}.norm.weight" for layer in range(LAYERS)]
        page.locator("#shapes g.ridge").nth(2).focus()
        page.keyboard.press("Enter")
        assert page.locator("#tensor h2").text_content() == "model.layers.2.norm.weight"


def test_a_tensor_with_all_its_charts(browser: Any, one: Path) -> None:
    name = "model.layers.4.attn.q.weight"
    with opened(browser, one) as found:
        page = found.ready()
        page.locator("#overview .name-link", has_text=name).click()
        sheet = page.locator("#tensor")
        charts = [each.get_attribute("data-chart") for each in sheet.locator("[data-chart]").all()]
        assert charts == ["Histogram", "Quantiles", "Magnitudes", "Picture", "Over the layers"]
        titles = sheet.locator("[data-chart=Histogram] .bars title").all_text_contents()
        counts = [int(re.search(r": ([\d,]+) values", title)[1].replace(",", "")) for title in titles]  # type: ignore[index]
        assert sum(counts) == 64 * 32 - 1  # one is NaN
        magnitudes = sheet.locator("[data-chart=Magnitudes] .bar-positive title").all_text_contents()
        parts = [re.search(r": ([\d,]+) positive, ([\d,]+) negative", title) for title in magnitudes]
        values = network()[name].astype(np.float64)
        assert sum(int(part[1].replace(",", "")) for part in parts if part) == (values > 0).sum()
        assert sheet.locator("canvas.picture").get_attribute("data-drawn") == "rms"
        assert "1 tile with NaN" in sheet.locator("[data-chart=Picture]").text_content()
        sheet.locator("[data-chart=Histogram]").get_by_role("button", name="log").click()
        assert sheet.locator("[data-chart=Histogram] .bars rect").count() == len(counts)
        page.keyboard.press("Escape")
        assert sheet.is_hidden()


def test_singular_values(browser: Any, one: Path) -> None:
    name = "model.layers.1.mlp.up.weight"
    (row,) = tp.spectra(network(), name)
    with opened(browser, one) as found:
        page = found.ready()
        page.evaluate("name => torchparams.show(name)", name)
        block = page.locator("#tensor [data-chart='Singular values']")
        assert block.locator("circle").count() == len(row.singular_values or ())
        facts = dict(zip(block.locator("dt").all_text_contents(), block.locator("dd").all_text_contents(), strict=True))
        assert shown(facts["stable rank"]) == pytest.approx(row.stable_rank, rel=1e-3)
        page.select_option("#statistic", "stable_rank")
        assert page.locator("#layers canvas").first.get_attribute("data-drawn") == "stable_rank all linear"


def test_two_targets_show_the_difference(browser: Any, two: Path) -> None:
    expected = tp.diff(network(), other(), numeric=True)
    with opened(browser, two) as found:
        page = found.ready()
        assert page.title() == "dict → dict · torchparams"
        assert page.locator("#layers canvas").first.get_attribute("data-drawn") == "relative all log"
        names = page.locator("#tensors .rows .name").all_text_contents()
        assert names == [row.name for row in expected.rows]
        status = page.locator("#tensors .rows [data-key=status]").all_text_contents()
        assert status == [row.status.replace("_", " ") for row in expected.rows]
        at = names.index("model.layers.3.mlp.up.weight")
        row = expected.rows[at]
        assert shown(page.locator("#tensors [data-key=relative]").nth(at + 1).text_content()) == pytest.approx(
            row.relative, rel=1e-3
        )
        assert shown(page.locator("#tensors [data-key=sqnr]").nth(at + 1).text_content()) == pytest.approx(
            row.sqnr, rel=1e-3
        )
        page.evaluate("name => torchparams.show(name)", row.name)
        assert page.locator("#tensor .bars.second rect").count() > 10


def quantised() -> dict[str, np.ndarray[Any, Any]]:
    """The network with attention in float8 and up-projections in int8 of bitsandbytes; norms stay as they are."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, value in network().items():
        wide = np.nan_to_num(value.astype(np.float32))
        if ".attn." in name:
            scale = np.abs(wide).max(axis=1, keepdims=True) / 448
            found |= {name: (wide / scale).astype(DType.of("float8_e4m3fn").numpy), f"{name}_scale": scale}
        elif ".mlp." in name:
            scale = np.abs(wide).max(axis=1)
            found |= {name: np.round(wide / scale[:, None] * 127).astype(np.int8), f"{name[:-6]}SCB": scale}
        else:
            found[name] = value
    return found


def test_colours_by_encoding(browser: Any, tmp_path: Path) -> None:
    tp.report(quantised(), tmp_path / "r.html")
    with opened(browser, tmp_path / "r.html") as found:
        page = found.ready()
        page.select_option("#statistic", "encoding")
        assert page.locator("#layers canvas").first.get_attribute("data-drawn") == "encoding all linear"
        words = page.locator("#legend .word").all_text_contents()
        assert set(words) == {"fp8-channel", "int8-bnb", "bfloat16"}
        colours = page.locator("#legend .swatch").evaluate_all("all => all.map(each => each.style.background)")
        by_word = dict(zip(words, colours, strict=True))
        assert len(set(colours)) == 3
        drawn = pixels(page)
        for column, role in enumerate(ROLES):
            word = "fp8-channel" if "attn" in role else "int8-bnb" if "mlp" in role else "bfloat16"
            expected = [int(number) for number in re.findall(r"\d+", by_word[word])]
            assert (abs(drawn[:, column] - expected) < 8).all(), role
        assert not page.get_by_role("group", name="Scale").is_visible()
        assert page.locator("#modules svg").get_attribute("data-drawn") == "encoding"
        fills = page.locator("#modules rect").evaluate_all("all => all.map(each => each.getAttribute('fill'))")
        assert {each.replace(" ", "") for each in fills} == {each.replace(" ", "") for each in colours}
        labels = page.locator("#modules g[role=treeitem]").evaluate_all("all => all.map(e => e.ariaLabel)")
        assert any("up" in label and label.endswith("encoding int8-bnb") for label in labels)
        page.select_option("#statistic", "std")
        assert page.get_by_role("group", name="Scale").is_visible()
        assert page.locator("#legend .ramp").count() == 1


def test_an_original_and_its_quantised_form(browser: Any, tmp_path: Path) -> None:
    tp.report(network(), tmp_path / "r.html", other=quantised())
    expected = tp.diff(network(), quantised(), numeric=True)
    with opened(browser, tmp_path / "r.html") as found:
        page = found.ready()
        names = page.locator("#tensors .rows .name").all_text_contents()
        shown_sqnr = page.locator("#tensors .rows [data-key=sqnr]").all_text_contents()
        for row in expected.rows:
            if "mlp" in row.name:
                assert 20 < row.sqnr < 60
                assert shown(shown_sqnr[names.index(row.name)]) == pytest.approx(row.sqnr, rel=1e-3)
        page.select_option("#statistic", "sqnr")
        assert page.locator("#layers canvas").first.get_attribute("data-drawn") == "sqnr all linear"
        page.select_option("#statistic", "encoding-b")
        words = page.locator("#legend .word").all_text_contents()
        assert set(words) == {"fp8-channel", "int8-bnb", "bfloat16"}
        drawn = pixels(page)
        assert (drawn[:, 0] == drawn[0, 1]).all()
        assert len({tuple(drawn[0, column]) for column in range(len(ROLES))}) == 3
        page.select_option("#statistic", "encoding")  # of the original
        assert page.locator("#legend .word").all_text_contents() == ["bfloat16"]


# --- tools ----------------------------------------------------------------------------------------


def test_the_selector_filters_every_view(browser: Any, one: Path) -> None:
    with opened(browser, one) as found:
        page = found.ready()
        page.keyboard.press("/")
        page.keyboard.type("**.attn.**")
        page.keyboard.press("Enter")
        assert page.locator("#selected").text_content() == f"{2 * LAYERS} of {4 * LAYERS + 1} tensors"
        names = page.locator("#tensors .rows .name").all_text_contents()
        assert names == sorted(tp.of(network()).select("**.attn.**"), key=list(network()).index)
        assert page.locator("#modules g.dimmed").count() > 0
        page.select_option("#shapes select", label="model.layers.*.norm.weight")
        assert page.locator("#shapes g.ridge.dimmed").count() == LAYERS
        page.fill("#selector", "**.attn.** & [ndim")
        page.keyboard.press("Enter")
        assert "column 19" in page.locator("#selected").text_content()
        assert page.locator("#selector").get_attribute("aria-invalid") == "true"
        page.keyboard.press("Escape")
        assert page.locator("#selected").text_content() == f"{4 * LAYERS + 1} tensors"


def test_the_table_sorts(browser: Any, one: Path) -> None:
    rows = tp.stats(network())
    with opened(browser, one) as found:
        page = found.ready()
        head = page.locator("#tensors [role=columnheader][data-key=std]")
        for how, sign in (("descending", -1), ("ascending", 1)):
            head.click()
            assert head.get_attribute("aria-sort") == how
            names = page.locator("#tensors .rows .name").all_text_contents()
            assert names == [row.name for row in sorted(rows, key=lambda row: sign * row.std)]
        head.click()
        assert page.locator("#tensors .rows .name").all_text_contents() == list(network())


def test_everything_is_reached_by_keyboard(browser: Any, one: Path) -> None:
    with opened(browser, one) as found:
        page = found.ready()
        page.locator("#layers canvas").first.focus()
        for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowRight", "Enter"):
            page.keyboard.press(key)
        assert page.locator("#tensor h2").text_content() == "model.layers.2.attn.k.weight"
        page.keyboard.press("ArrowRight")  # the next layer
        assert page.locator("#tensor h2").text_content() == "model.layers.3.attn.k.weight"
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.tagName") == "CANVAS"
        page.locator("#tensors [role=grid]").focus()
        for key in ("ArrowDown", "ArrowDown", "Enter"):
            page.keyboard.press(key)
        assert page.locator("#tensor h2").text_content() == list(network())[2]


def test_an_address_leads_back(browser: Any, one: Path) -> None:
    with opened(browser, one) as found:
        page = found.ready()
        page.select_option("#statistic", "kurtosis")
        page.evaluate("torchparams.state.select('**.mlp.**')")
        page.evaluate("torchparams.show('model.layers.1.mlp.up.weight')")
        page.reload()
        page = found.ready()
        assert page.locator("#statistic").input_value() == "kurtosis"
        assert page.locator("#selector").input_value() == "**.mlp.**"
        assert page.locator("#tensor h2").text_content() == "model.layers.1.mlp.up.weight"


def test_light_and_dark(browser: Any, one: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, one, dark=True) as found:
        page = found.ready()
        assert page.evaluate(ground) == "rgb(13, 16, 20)"
        least = pixels(page)[0, 0].sum()
        page.click("#theme")
        assert page.evaluate(ground) == "rgb(251, 250, 248)"
        assert pixels(page)[0, 0].sum() > least + 150


# --- hostile and large ----------------------------------------------------------------------------

HOSTILE = [
    "</script><script>alert(1)</script>.weight",
    "<img src=x onerror=alert(1)>.weight",
    "\"'><svg onload=alert(1)>.bias",
    "layers.0.<b>bold</b>.weight",
    "layers.1.<b>bold</b>.weight",
    "a\u202egnp.weight",
    "nul\x00\x1b[2J\u2028.weight",
    "\ud800.weight",
    "__proto__.constructor",
    "",
    "x" * 3000,
]


def test_hostile_names_stay_text(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    weights = {name: np.full((2, 2), i + 1, np.float32) for i, name in enumerate(HOSTILE)}
    weights[HOSTILE[0]][0, 0] = np.nan
    tp.report(weights, path)
    with opened(browser, path) as found:
        page = found.ready()
        names = page.evaluate("torchparams.select('**')")
        assert names == HOSTILE
        for name in HOSTILE:
            page.evaluate("name => torchparams.show(name)", name)
            assert page.locator("#tensor").is_visible()
            page.locator("#tensor").get_by_role("button", name="Select").click()
            assert page.locator("#selected").text_content() == f"1 of {len(HOSTILE)} tensors"
        assert page.locator("main img, main b:not([class]), main svg[onload], #tensor img").count() == len(
            page.locator("#overview .types-legend b").all()
        )
        assert page.evaluate("document.scripts.length") == 2
        text = page.evaluate("document.body.innerText")
        assert "\u202e" not in text
        assert "\\u202egnp" in page.evaluate("torchparams.show('a\u202egnp.weight'), document.body.innerText")


def test_a_hundred_thousand_tensors_scroll(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    values = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    names = [f"layers.{i // 500}.experts.{i % 500 // 2}.{'up' if i % 2 else 'down'}.weight" for i in range(100_000)]
    tp.report({name: values.copy() for name in names}, path)
    with opened(browser, path) as found:
        page = found.ready()
        table = page.locator("#tensors [role=grid]")
        assert table.get_attribute("aria-rowcount") == "100001"
        assert page.locator("#tensors .rows .row").count() < 120
        table.focus()
        page.keyboard.press("End")
        page.wait_for_function("document.querySelector('#tensors .rows .row:last-child').ariaRowIndex === '100001'")
        assert page.locator("#tensors .rows .name").last.text_content() == names[-1]
        page.evaluate("torchparams.state.select('layers.7.**.up.*')")
        assert page.locator("#selected").text_content() == "250 of 100,000 tensors"
        assert page.locator("#modules g.block").count() < 5000


def test_a_notebook_shows_the_same_page(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><title>n</title>{tp.report(network())._repr_html_()}")
    with opened(browser, path) as found:
        frame = found.page.frame_locator("iframe")
        frame.locator("html[data-ready=all]").wait_for()
        assert frame.locator("#tensors .rows .name").all_text_contents() == list(network())
        frame.locator("#overview .name-link").first.click()
        assert frame.locator("#tensor h2").text_content() == "model.layers.4.attn.q.weight"
        found.asked = [each for each in found.asked if each != "about:srcdoc"]


def test_a_live_model(browser: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    model[0].weight.requires_grad_(False)
    model(torch.ones(1, 8)).sum().backward()
    path = tmp_path / "r.html"
    tp.report(model, path)
    with opened(browser, path) as found:
        page = found.ready()
        assert page.evaluate("torchparams.select(':frozen')") == ["0.weight"]
        assert page.evaluate("torchparams.select('[module=Linear]').length") == 8
        page.select_option("#statistic", "gradient")
        assert "trainable" in page.locator("#overview").text_content()


# --- how it looks ---------------------------------------------------------------------------------

SCENES = {
    "light": ("one", False, None),
    "dark": ("one", True, "torchparams.show('model.layers.2.mlp.up.weight')"),
    "difference": ("two", False, None),
}


@pytest.mark.parametrize("scene", SCENES)
def test_it_looks_as_it_did(scene: str, browser: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Compared as small pictures, so that another font is no difference and a view that is missing is one."""
    fixture, dark, action = SCENES[scene]
    with opened(browser, request.getfixturevalue(fixture), dark=dark) as found:
        page = found.ready()
        if action:
            page.evaluate(action)
        page.mouse.move(0, 0)
        page.screenshot(path=tmp_path / "now.png", full_page=True, animations="disabled")
    now = Image.open(tmp_path / "now.png").convert("RGB")
    kept = SCREENS / f"{scene}.png"
    if not kept.exists():  # a new scene: look at it, and commit it
        kept.parent.mkdir(exist_ok=True)
        now.resize((now.width // 8, now.height // 8), Image.Resampling.BOX).save(kept, optimize=True)
        pytest.fail(f"{kept} was missing, and is written now")
    before = Image.open(kept).convert("RGB")
    assert abs(now.height - before.height * 8) < 0.04 * now.height
    small = np.asarray(now.resize(before.size, Image.Resampling.BOX), np.int16)
    difference = abs(small - np.asarray(before, np.int16)).max(axis=2)
    assert (difference > 40).mean() < 0.015, f"{(difference > 40).mean():.1%} of it differ from {kept}"


# --- over the steps of a training -----------------------------------------------------------------

NASTY = '</script><img src=x onerror="alert(1)">\u202e'


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a training whose learning rate explodes at step 6."""
    torch.manual_seed(0)
    blocks = [torch.nn.ModuleDict({NASTY: torch.nn.Linear(8, 8), "out": torch.nn.Linear(8, 8)}) for _ in range(LAYERS)]
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(blocks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    path = tmp_path_factory.mktemp("training") / "run"
    with tp.Recorder(model, optimizer, path, every=1, quiet=True) as recorder:
        for step in range(8):
            optimizer.zero_grad()
            x = torch.randn(16, 8)
            for block in blocks:
                x = x + block["out"](torch.tanh(block[NASTY](x)))
            loss: Any = (x**2).mean()
            loss.backward()
            optimizer.param_groups[0]["lr"] = 1e3 if step == 6 else 0.05
            optimizer.step()
            recorder.log(**{NASTY: float(step), "loss": loss.item()})
            recorder.step()
    return path


def test_the_slider_shows_another_step_in_every_view(browser: Any, training: Path, tmp_path: Path) -> None:
    tp.report(training, tmp_path / "r.html")
    history = tp.history(training)
    names = [name for name in history.names if name.endswith("out.weight")]
    with opened(browser, tmp_path / "r.html") as found:
        page = found.ready()
        slider, heat, said = (
            page.get_by_role("slider", name="Step"),
            page.locator("#layers canvas").first,
            page.locator("#steps output"),
        )

        def at(step: int) -> np.ndarray[Any, Any]:
            """The colours at a step; the tables and the attributes of the views are those of the step."""
            page.locator(f"#layers canvas[data-step='{step}']").first.wait_for()
            assert page.locator("#modules svg").get_attribute("data-step") == str(step)
            assert said.text_content() == f"step {step} · {step + 1} of 8"
            for key in ("weight_norm", "std", "max_abs", "grad_norm", "update_ratio"):
                rows = page.locator("#tensors .rows .row").filter(has=page.locator("[title$='.out.weight']"))
                texts = rows.locator(f"[data-key={key}]").all_text_contents()
                expected = [history[name][key][step] for name in names]
                assert [shown(text) if text != "–" else np.nan for text in texts] == pytest.approx(
                    expected, rel=5e-3, nan_ok=True
                )
            return np.asarray(Image.open(BytesIO(heat.screenshot())).convert("RGB"), np.int16)

        page.select_option("#statistic", "update_ratio")
        last = at(7)
        slider.focus()
        page.keyboard.press("Home")
        first = at(0)
        page.keyboard.press("ArrowRight")
        second = at(1)
        assert (first != second).any()  # there is no update ratio before the second record
        assert (second != last).any()
        page.get_by_role("button", name="Next step").click()
        at(2)

        # The loss over the steps, with a line at the step that is shown.
        curve = page.locator(".logged .curve")
        assert page.locator(".logged select option").all_text_contents() == [NASTY.replace("\u202e", "\\u202e"), "loss"]
        assert curve.get_attribute("data-points") == "8"
        assert curve.get_attribute("d").count("L") == 7
        assert page.locator(".logged .now").get_attribute("data-step") == "2"

        # A finding leads to its tensor at its step.
        item = page.locator("#overview .finding-items li").first
        finding = next(
            each for each in history.findings if each.name == item.locator("button").get_attribute("data-name")
        )
        item.locator("button").click()
        at(finding.step)
        sheet = page.locator("#tensor")
        assert f"step {finding.step}" in sheet.locator(".callout").first.text_content()
        curves = sheet.locator("[data-chart='Over the steps'] .curve")
        counts = [int(each.get_attribute("data-points")) for each in curves.all()]
        series = history[finding.name]
        assert counts == [int((series[key] > 0).sum()) for key in ("update_ratio", "weight_norm", "grad_norm")]
        sheet.get_by_role("group", name="Scale of the curves").get_by_role("button", name="linear").click()
        assert curves.count() == 3

        # The keys of the slider keep the focus while the sheet is open.
        slider.focus()
        page.keyboard.press("ArrowLeft")
        at(finding.step - 1)
        assert page.evaluate("document.activeElement.id") == "step"
        assert sheet.locator(".now").first.get_attribute("data-step") == str(finding.step - 1)
