"""The watch over fuzzed inputs notices what hangs and what allocates too much, and names the input."""

from __future__ import annotations

import signal
import tracemalloc

import pytest

from fuzz import watching


def test_an_input_that_hangs_fails_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "SECONDS", 0.05)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(AssertionError, match="still busy") as found, watching.watched("input 7"):
        while True:
            pass
    assert found.value.__notes__ == ["input 7"]
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_an_input_that_allocates_too_much_fails_with_its_name() -> None:
    for allowed in (1 << 20, 1 << 24):
        try:
            with watching.watched("input 8") as trial:
                trial.nbytes = allowed
                bytearray(1 << 22)
        except AssertionError as error:
            assert allowed == 1 << 20 and error.__notes__ == ["input 8"] and "bytes allocated" in str(error)
        else:
            assert allowed == 1 << 24
    assert not tracemalloc.is_tracing()


def test_equal_seeds_give_equal_inputs() -> None:
    first, second, other = ([draw.random() for _, draw in watching.draws(5, seed)] for seed in (1, 1, 2))
    assert first == second != other and len(set(first)) == 5
