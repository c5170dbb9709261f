"""Hypothesis strategies for globs and selectors, realistic and arbitrary."""

from __future__ import annotations

from hypothesis import strategies as st

from torchparams._selector.glob_reader import read_glob
from torchparams._selector.globs import ANY_DEPTH, Alternatives, Glob, Piece, Range, Wild, merged


def glob(text: str) -> Glob:
    """The glob that the whole of `text` is."""
    found, end = read_glob(text, 0)
    assert end == len(text)
    return found


NAMES = st.text("ab01.", max_size=8)
PIECES: st.SearchStrategy[Piece] = st.deferred(
    lambda: (
        st.sampled_from(["a", "b", "ab", "0", "1", "10"])
        | st.sampled_from([Wild.CHARACTER, Wild.CHARACTERS])
        | st.builds(lambda a, b: Range(min(a, b), max(a, b)), st.integers(0, 12), st.integers(0, 25))
        | st.builds(lambda a, b: Range(a, b, 2), st.integers(0, 9), st.integers(9, 12))
        | st.lists(st.lists(PIECES, max_size=2).map(merged), min_size=2, max_size=3).map(tuple).map(Alternatives)
    )
)
COMPONENTS = st.lists(PIECES, max_size=4).map(merged)
GLOBS = st.lists(COMPONENTS | st.just(ANY_DEPTH), min_size=1, max_size=5).map(tuple).map(Glob)

TEXTS = st.text("ab.|&~()[]:=!<>/\\\"' *?{},0159") | st.lists(
    st.sampled_from(
        [
            *(
                "a",
                "**",
                "**.a",
                "{a,b}",
                "{0..5}",
                "/a.*/",
                "[ndim<2]",
                "[dtype=bf16]",
                "[shape=2x*]",
                ":bias",
                ":norm",
            ),
            *(
                "[name=**.a]",
                "[module=Linear]",
                "[numel>=1.5K]",
                "|",
                "&",
                "~",
                "(",
                ")",
                " ",
                "and",
                ",",
                '"a b"',
                "\\|",
            ),
        ]
    )
).map("".join)
"""Texts that are nearly selectors."""
