from typing import Any

def measure(
    state: Any,
    data: Any,
    starts: Any,
    counts: Any,
    form: tuple[int, int, int, float],
    table: Any,
    quantiles: Any,
    reals: Any,
    integers: Any,
    extremes: Any,
) -> None: ...
def sizes() -> tuple[int, int, int, int, int, int]: ...
