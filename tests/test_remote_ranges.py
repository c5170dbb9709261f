"""Paths that are URLs, and ranges that are merged and cut: without fsspec, and without a server."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchparams.io import paths
from torchparams.io.remote.ranges import Ranges, cut, merged

RANGES = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 60)).map(lambda pair: (pair[0], sum(pair))), max_size=12
)


def covered(ranges: list[tuple[int, int]]) -> set[int]:
    return {at for start, stop in ranges for at in range(start, stop)}


@given(RANGES, st.integers(0, 20))
def test_merged_ranges_cover_what_was_wanted_and_small_gaps(ranges: list[tuple[int, int]], gap: int) -> None:
    found = merged(ranges, gap)
    assert covered(ranges) <= covered(found)
    assert all(start < stop for start, stop in found)
    assert all(later[0] - earlier[1] > gap for earlier, later in itertools.pairwise(found))
    assert {start for start, _ in found} <= {start for start, _ in ranges}
    if gap == 0:
        assert covered(found) == covered(ranges)


@given(st.integers(0, 1000), st.integers(1, 1000), st.integers(1, 300))
def test_a_range_is_cut_evenly(start: int, size: int, most: int) -> None:
    parts = list(cut(start, start + size, most))
    assert parts[0][0] == start and parts[-1][1] == start + size
    assert all(first[1] == second[0] for first, second in itertools.pairwise(parts))
    sizes = [stop - begin for begin, stop in parts]
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1
    assert size < most or min(sizes) >= most // 2


@given(RANGES)
def test_each_byte_that_is_wanted_is_in_one_piece(ranges: list[tuple[int, int]]) -> None:
    planned = Ranges(ranges)
    wanted = covered(ranges)
    assert sum(planned.wanted(number) for number in range(len(planned))) == len(wanted)
    for at in range(480):
        number = planned.at(at)
        if at in wanted:
            assert number is not None
        if number is not None:
            start, stop = planned[number]
            assert start <= at < stop
        after = planned.after(at)
        assert after is None or (after > at and planned.at(after) is not None)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://host/a.pt", "https://host/a.pt"),
        ("https://me:pass@host:8000/a.pt#model.net", "https://host:8000/a.pt#model.net"),
        ("https://token@host/dir/", "https://host/dir/"),
        ("http://host/b.pt?sig=1&x=/../y", "http://host/b.pt?…"),
        ("http://host/b.pt?sig=2", "http://host/b.pt?…2"),
        ("http://host/b.pt?sig=1&x=/../y", "http://host/b.pt?…"),
        ("http://host/b.pt?…2", "http://host/b.pt?…2"),
        ("ftp://me:pass@host/a.pt", "ftp://host/a.pt"),
        ("s3://bucket/a?b.pt", "s3://bucket/a?b.pt"),
        ("hf://owner/repo@refs/pr/1/a.pt", "hf://owner/repo@refs/pr/1/a.pt"),
        ("plain/a.pt#model", "plain/a.pt#model"),
        ("file:///tmp/a%20b.pt", "/tmp/a b.pt"),
    ],
)
def test_the_public_name_of_a_url(url: str, name: str) -> None:
    assert paths.public(url) == name
    assert paths.public(name) == name


def test_whoever_connects_gets_the_url_behind_a_name() -> None:
    name = paths.public("https://me:pass@far/net/model.safetensors.index.json?sig=abc")
    assert paths.full(name) == "https://me:pass@far/net/model.safetensors.index.json?sig=abc"
    shard = paths.join(paths.folder_of(name), "model-00001-of-00002.safetensors")
    assert shard == "https://far/net/model-00001-of-00002.safetensors"
    assert paths.full(shard) == "https://me:pass@far/net/model-00001-of-00002.safetensors?sig=abc"
    assert paths.full("https://far/other/model.safetensors") == "https://far/other/model.safetensors"
    assert paths.name_of(name) == "model.safetensors.index.json"
