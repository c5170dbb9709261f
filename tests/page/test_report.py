"""The report's data: what stands in the page is what `stats`, `diff` and numpy say of the same tensors."""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torchparams as tp
from command import command
from torchparams.dtypes import DType
from torchparams.engines.threads import ThreadEngine
from torchparams.errors import NoMatch, OptionError
from torchparams.page import measured
from torchparams.page.measuring import measure
from torchparams.page.result import Page, page_of

NUMBERS = np.random.default_rng(0)


def network(dtype: str = "bfloat16", layers: int = 3) -> dict[str, np.ndarray[Any, Any]]:
    found = {"embed.weight": NUMBERS.standard_normal((50, 8)).astype(DType.of(dtype).numpy)}
    for layer in range(layers):
        for name, shape in (("attn.q.weight", (8, 8)), ("attn.q.bias", (8,)), ("norm.weight", (8,))):
            values = NUMBERS.standard_normal(shape) * (0.1 + layer)
            found[f"layers.{layer}.{name}"] = values.astype(DType.of(dtype).numpy)
    return found


def data_of(page: Page) -> dict[str, Any]:
    found = re.search(rb'<script type="application/json" id="data">(.*?)</script>', page.html, re.DOTALL)
    assert found is not None
    form: dict[str, Any] = json.loads(found[1])
    return form


def numbers(packed: dict[str, str]) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(packed["data"]), f"<{packed['type']}")


def words(packed: dict[str, Any]) -> list[Any]:
    return [packed["words"][i] for i in numbers(packed["of"])]


# --- one target -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "float64"])
def test_the_columns_are_those_of_stats(dtype: str) -> None:
    x = network(dtype)
    form, rows = data_of(tp.report(x)), tp.stats(x)
    table, a = form["table"], form["a"]
    assert table["names"] == list(x)
    assert [tuple(shape) for shape in words(table["shape"])] == [value.shape for value in x.values()]
    assert words(table["dtype"]) == [dtype] * len(x)
    assert numbers(table["nbytes"]).tolist() == [value.nbytes for value in x.values()]
    for key in ("mean", "std", "min", "max", "l1", "l2", "linf", "entropy"):
        expected = [getattr(row, key) for row in rows]
        np.testing.assert_array_equal(numbers(a[key]), np.array(expected, np.float32), key)
    for key in ("values", "zeros", "nan", "posinf", "neginf", "distinct"):
        assert numbers(a[key]).tolist() == [getattr(row, key) for row in rows], key
    wanted = tp.stats(x, quantiles=a["quantiles"]["at"])
    expected = [[value for _, value in row.quantiles] for row in wanted]
    found = numbers(a["quantiles"]["values"]).reshape(len(x), -1)
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_a_histogram_and_what_is_beyond_it_hold_every_value() -> None:
    x = {"w": np.concatenate([NUMBERS.standard_normal(5000), [40.0, -60.0, -61.0]]).astype(np.float16)}
    form = data_of(tp.report(x))["a"]["histogram"]
    low, high = numbers(form["low"])[0], numbers(form["high"])[0]
    counts = numbers(form["counts"])
    assert len(counts) == form["bins"] == measured.FINE_BINS
    values = x["w"].astype(np.float64)
    expected = np.histogram(values, form["bins"], (float(low), float(high)))[0]
    np.testing.assert_allclose(counts, expected, atol=2)  # the ends are rounded to float32 in the page
    assert numbers(form["below"]).tolist() == [2]
    assert numbers(form["above"]).tolist() == [1]
    assert counts.sum() + 3 == len(values)


def test_octaves_are_ragged_columns() -> None:
    x = {"a": np.array([1, -3, 0.25], np.float32), "zero": np.zeros(3, np.float32), "b": np.array([8.0], np.float32)}
    form = data_of(tp.report(x))["a"]["octaves"]
    assert numbers(form["lengths"]).tolist() == [4, 0, 1]
    assert numbers(form["first"]).tolist() == [-2, 0, 3]
    assert numbers(form["negative"]).tolist() == [0, 0, 0, 1, 0]
    assert numbers(form["positive"]).tolist() == [1, 0, 1, 0, 1]


def test_more_tensors_are_measured_coarsely(monkeypatch: pytest.MonkeyPatch) -> None:
    x = network("float32")
    monkeypatch.setattr("torchparams.page.measuring.DETAILED", 3)
    form = data_of(tp.report(x))
    assert form["source"]["detailed"] is False
    assert form["a"]["octaves"] is None
    rows = tp.stats(x)
    histogram = form["a"]["histogram"]
    assert histogram["clipped"] is True
    assert numbers(histogram["counts"]).reshape(len(x), -1).tolist() == [list(row.histogram) for row in rows]
    np.testing.assert_array_equal(numbers(form["a"]["std"]), np.array([row.std for row in rows], np.float32))


def test_every_value_is_read_once() -> None:
    reads: list[int] = []

    class Counting(ThreadEngine):
        def run(self, jobs: Any, task: Any, *, progress: Any = None) -> Any:
            listed = list(jobs)
            reads.append(sum(job.nbytes for job in listed))
            return super().run(listed, task, progress=progress)

    x = network()
    tp.report(x, engine=Counting())
    assert reads == [sum(value.nbytes for value in x.values())]


def test_threads_and_parts_change_nothing() -> None:
    x = {"w": NUMBERS.standard_normal((300, 200)).astype(np.float32)}
    whole = tp.report(x, pictures="w", engine=ThreadEngine(threads=1))
    cut = tp.report(x, pictures="w", engine=ThreadEngine(threads=3, block_bytes=1 << 12, part_bytes=1 << 14))
    a, b = data_of(whole), data_of(cut)
    for key in ("min", "max", "nonfinite"):
        assert a["pictures"]["0"].pop(key) == b["pictures"]["0"].pop(key)
    one, other = (numbers(each["pictures"]["0"].pop("rms")) for each in (a, b))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    assert a == b


def test_a_tensor_without_values_is_listed_with_the_reason() -> None:
    form = data_of(tp.report(torch.nn.Linear(2, 3, device="meta")))
    assert form["table"]["names"] == ["weight", "bias"]
    assert numbers(form["a"]["read"]).tolist() == [0, 0]
    assert np.isnan(numbers(form["a"]["std"])).all()
    assert set(form["unread"]) == {"0", "1"}
    assert "meta" in form["unread"]["0"]


def test_nothing_at_all_is_a_page_too() -> None:
    assert data_of(tp.report({}))["table"]["names"] == []


def test_numbers_outside_of_float32_stay() -> None:
    form = data_of(tp.report({"w": np.array([1e300, -1e300, 1e-300])}))
    assert numbers(form["a"]["max"]).tolist() == [1e300]
    assert numbers(form["a"]["l1"]).tolist() == [2e300]


# --- findings -------------------------------------------------------------------------------------


def test_flags_of_stats_are_findings_with_their_tensors() -> None:
    x = network("float32")
    x["layers.1.attn.q.weight"][0, 0] = np.nan
    (finding,) = data_of(tp.report(x))["findings"]
    assert (finding["from"], finding["id"], finding["severity"]) == ("stats", "non-finite", "error")
    assert finding["count"] == 1
    assert finding["items"] == [[list(x).index("layers.1.attn.q.weight"), "1 NaN among 64 values"]]


def test_an_audit_of_a_live_model_is_among_them() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(2, 2)
            self.layers = [torch.nn.Linear(2, 2)]

    form = data_of(tp.report(Net()))
    (hidden,) = [each for each in form["findings"] if each["from"] == "audit" and each["severity"] == "error"]
    (expected,) = tp.audit(Net()).errors
    assert hidden["id"] == expected.id
    assert hidden["fix"] == expected.fix
    assert hidden["names"] == list(expected.names)  # they are in no row


def test_gradients_of_a_live_model() -> None:
    model = torch.nn.Linear(3, 2)
    assert "gradient" not in data_of(tp.report(model))["a"]
    model(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad is not None
    form = data_of(tp.report(model))
    assert numbers(form["a"]["gradient"])[0] == pytest.approx(float(model.weight.grad.norm()), rel=1e-6)
    assert words(form["table"]["grad"]) == [True, True]
    assert words(form["table"]["module"]) == ["torch.nn.modules.linear.Linear"] * 2


# --- chosen tensors -------------------------------------------------------------------------------


def test_a_picture_is_of_all_values() -> None:
    values = NUMBERS.standard_normal((300, 7, 50)).astype(np.float32)
    values[10, 3, 3] = np.inf
    form = data_of(tp.report({"w": values, "v": values[0, 0]}, pictures="w"))["pictures"]
    assert list(form) == ["0"]
    picture = form["0"]
    assert (picture["rows"], picture["columns"], picture["down"], picture["across"]) == (300, 350, 128, 128)
    matrix = values.reshape(300, 350).astype(np.float64)
    tile = np.arange(300) * 128 // 300
    begins = np.arange(128) * 350 // 128
    across = np.searchsorted(begins, np.arange(350), side="right") - 1
    for key, how in (("min", np.min), ("max", np.max), ("rms", lambda part: np.sqrt((part**2).mean()))):
        found = numbers(picture[key]).reshape(128, 128)
        for i, j in [(0, 0), (4, 65), (127, 127), (50, 3), (tile[10], across[153])]:
            part = matrix[tile == i][:, across == j]
            assert found[i, j] == pytest.approx(how(part[np.isfinite(part)]), rel=1e-6)
    assert numbers(picture["nonfinite"]).sum() == 1


def test_pictures_of_vectors_scalars_and_nothing() -> None:
    x = {"v": np.arange(3, dtype=np.float16), "s": np.array(2.0, np.float32), "e": np.zeros((0, 4), np.float32)}
    form = data_of(tp.report(x, pictures="**"))["pictures"]
    assert [(form[i]["down"], form[i]["across"]) for i in form] == [(1, 3), (1, 1)]
    assert numbers(form["0"]["min"]).tolist() == [0.0, 1.0, 2.0]


def test_a_selector_of_pictures_is_strict() -> None:
    with pytest.raises(NoMatch):
        tp.report(network(), pictures="nothing.*")


def test_singular_values_are_those_of_spectra() -> None:
    x = network("float32")
    form = data_of(tp.report(x, spectra="**.q.weight"))["spectra"]
    rows = tp.spectra(x, "**.q.weight")
    assert form == data_of(tp.report(x, spectra=rows))["spectra"]
    assert list(form) == [str(list(x).index(row.name)) for row in rows]
    for found, row in zip(form.values(), rows, strict=True):
        np.testing.assert_array_equal(numbers(found["values"]), np.array(row.singular_values, np.float32))
        assert (found["stable_rank"], found["edge"]) == (row.stable_rank, row.edge)
    with pytest.raises(NoMatch):
        tp.report(x, spectra="nothing")


def test_a_selection() -> None:
    form = data_of(tp.report(network(), selector="**.bias"))
    assert form["table"]["names"] == [f"layers.{i}.attn.q.bias" for i in range(3)]
    assert form["source"]["selector"] == "**.bias"


# --- two targets ----------------------------------------------------------------------------------


def test_a_difference_is_that_of_diff() -> None:
    a = network("float32")
    b = {f"model.{name}": value * np.float32(1.01) for name, value in a.items() if "norm" not in name}
    b["model.layers.0.attn.q.bias"] = a["layers.0.attn.q.bias"]
    b["model.extra"] = np.ones(3, np.float32)
    form = data_of(tp.report(a, other=b))
    found = tp.diff(a, b, rename="auto", numeric=True)
    assert form["table"]["names"] == [row.name for row in found.rows]
    assert words(form["difference"]["status"]) == [row.status for row in found.rows]
    for key in ("share", "max", "relative", "cosine", "sqnr"):
        expected = np.array([getattr(row, key) for row in found.rows], np.float32)
        np.testing.assert_array_equal(numbers(form["difference"][key]), expected, key)
    at = form["table"]["names"].index("embed.weight")
    assert numbers(form["b"]["std"])[at] == np.float32(tp.stats(b)["model.embed.weight"].std)
    extra = form["table"]["names"].index("model.extra")
    assert numbers(form["a"]["read"])[extra] == 0
    assert numbers(form["b"]["read"])[extra] == 1


def test_a_quantised_target_has_an_error_in_decibels() -> None:
    values = NUMBERS.standard_normal((32, 16)).astype(np.float32)
    scale = np.float32(abs(values).max() / 448)
    stored = {"w": (values / scale).astype(DType.of("float8_e4m3fn").numpy), "w_scale": np.array([scale])}
    form = data_of(tp.report({"w": values}, other=stored))
    assert 20 < numbers(form["difference"]["sqnr"])[0] < 60
    assert words(form["difference"]["encoding"]) == ["fp8-tensor"]


# --- the file -------------------------------------------------------------------------------------


def test_the_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    path.write_text("an earlier report")
    found = tp.report(network(), path)
    assert path.read_bytes() == found.html
    assert [each.name for each in tmp_path.iterdir()] == ["r.html"]


@pytest.mark.parametrize("name", ["model.safetensors", "report", "report.html.txt"])
def test_a_path_that_is_no_html_is_refused_before_anything_is_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"A report is an HTML file, not .*\. Choose a name that ends in \.html"):
        tp.report("no such file", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_report_stays_where_reading_fails(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    path.write_text("an earlier report")
    with pytest.raises(tp.TorchParamsError):
        tp.report(tmp_path / "nothing.safetensors", path)
    assert path.read_text() == "an earlier report"


def test_a_thousand_tensors_are_small() -> None:
    values = NUMBERS.standard_normal((1000, 32, 32)).astype(np.float32)
    found = tp.report({f"model.layers.{i // 10}.block{i % 10}.weight": values[i] for i in range(1000)})
    assert len(found.html) < 1_500_000


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "\"'><b>.weight",
    "a\u202egnp.weight",
    "a\x00\x1b[2J.weight",
    "\u2028.w",
    "]]>",
    "&lt;b&gt;",
    "__proto__",
    "constructor",
    "",
    "..",
]


def test_hostile_names_stay_data() -> None:
    found = tp.report({name: np.zeros(2, np.float32) for name in HOSTILE})
    assert data_of(found)["table"]["names"] == HOSTILE
    data = found.html[found.html.index(b'id="data">') + 10 :]
    data = data[: data.index(b"</script>")]
    assert b"<" not in data
    assert data.isascii()
    assert not re.search(rb"[\x00-\x1f]", data)


def test_the_page_loads_nothing() -> None:
    text = page_of({}).decode("ascii")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy[1]
    for attribute in re.findall(r"\s(?:src|href|action|srcset|poster|data)\s*=\s*[\"']?([^\"'\s>]*)", text):
        assert attribute.startswith("#"), attribute
    assert not re.search(r"url\(|@import|<link|<iframe|<object|<embed|<base", text)
    assert "require-trusted-types-for 'script'; trusted-types 'none'" in policy[1]  # no text becomes markup
    assert "eval(" not in text
    assert "fetch(" not in text


def test_the_lock_file_names_no_host() -> None:
    web = Path(__file__).resolve().parents[2] / "web"
    packages = json.loads((web / "package-lock.json").read_text())["packages"]
    assert len(packages) > 10
    assert not [name for name, each in packages.items() if "resolved" in each]
    assert "://" not in (web / "package-lock.json").read_text()
    assert "omit-lockfile-registry-resolved=true" in (web / ".npmrc").read_text()


def test_the_policy_knows_script_and_style() -> None:
    from hashlib import sha256

    text = page_of({}).decode("ascii")
    for tag in ("script", "style"):
        body = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(body) == 1
        digest = base64.b64encode(sha256(body[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in text


def test_a_notebook_shows_it_in_a_frame_of_its_own() -> None:
    found = tp.report(network())
    shown = found._repr_html_()
    inner = re.fullmatch(r'<iframe sandbox="allow-scripts"[^>]* srcdoc="([^"]*)"></iframe>', shown)
    assert inner is not None
    assert html.unescape(inner[1]).encode() == found.html


def test_how_it_prints(tmp_path: Path) -> None:
    found = tp.report({"w": np.ones((2, 2), np.float32)})
    title, about, where = str(found).splitlines()
    assert title == "dict"
    assert re.fullmatch(r"1 tensor · 1 finding · \d+ KiB", about)
    assert where == "in memory: give a path to write it"


def test_measuring_a_table_alone() -> None:
    found = measure(tp.of(network()))
    assert list(found.rows) == list(found.infos) == list(found.shapes)


# --- the command ----------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tp.save({name: torch.from_numpy(value) for name, value in network("float32").items()}, tmp_path / "m.safetensors")
    path = tmp_path / "r.html"
    done = command(capsys, "report", tmp_path / "m.safetensors", "-o", path, "-s", "layers.**", "--json")
    assert done.status == 0, done.err
    said = json.loads(done.out)
    assert said["tensors"] == 9
    assert said["nbytes"] == path.stat().st_size
    done = command(capsys, "report", tmp_path / "m.safetensors", tmp_path / "m.safetensors", "-o", path)
    assert done.status == 0, done.err
    assert b'"difference"' in path.read_bytes()
    refused = command(capsys, "report", tmp_path / "m.safetensors", "-o", tmp_path / "m.safetensors")
    assert refused.status == 2
    assert "A report is an HTML file" in refused.err
