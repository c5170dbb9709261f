"""Claim: a report of 850 MB takes at most 1.3 × `stats` of them, whole processes; 1,000 tensors are drawn within 0.5 s
of opening the page, 100,000 within 2 s.

    python bench/bench_report.py [rounds, 5 by default]

Page cache warm, by turns: `torchparams report FILE -o report.html` and `torchparams stats FILE`, on a model's file in
bfloat16.

Then pages of 1,000 and of 100,000 tensors in headless Chromium, opened anew each round: when the browser first painted,
and when the first screen stood (heat map, table and labels), from the start of the navigation. Needs playwright, which
`make oracles` installs, and Debian's chromium.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

import torchparams as tp
from common import DATA, llama_file, machine, paired, print_pairs, process, torchparams

if TYPE_CHECKING:
    from pathlib import Path


def page_of(count: int) -> Path:
    """The report of so many tensors, as layers of experts have them."""
    path = DATA / f"report-{count}.html"
    values = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    names = (f"layers.{i // 1000}.experts.{i % 1000 // 2}.{('up', 'down')[i % 2]}.weight" for i in range(count))
    tp.report({name: values * np.float32(0.02 + i / 1e7) for i, name in enumerate(names)}, path)
    return path


def painted(path: Path, rounds: int) -> tuple[float, float]:
    """Medians of the milliseconds to the first paint, and to the first screen with its data."""
    from playwright.sync_api import sync_playwright

    first, drawn = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(rounds):
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto(path.resolve().as_uri())
            page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length > 0")
            first.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            drawn.append(page.evaluate("performance.getEntriesByName('drawn')[0].startTime"))
            page.close()
        browser.close()
    return statistics.median(first), statistics.median(drawn)


def main(rounds: int = 5) -> None:
    """Measure and print."""
    print(machine())
    path = llama_file("bfloat16", 850)
    target = DATA / "report.html"
    runs = {
        "torchparams report": partial(process, torchparams("report", path, "-o", target)),
        "torchparams stats": partial(process, torchparams("stats", path)),
    }
    results = paired(runs, rounds)
    print_pairs(results, "torchparams report")
    print(f"the page has {target.stat().st_size / 1e6:.2f} MB")
    for count in (1000, 100_000):
        page = page_of(count)
        first, drawn = painted(page, rounds)
        size = page.stat().st_size / 1e6
        print(f"{count:,} tensors, {size:.2f} MB: first paint {first:.0f} ms, first screen drawn {drawn:.0f} ms")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
