from typing import Any

def scaled(
    codes: Any,
    table: Any,
    scales: Any,
    zeros: Any,
    index: Any,
    columns: int,
    height: int,
    width: int,
    lines: int,
    start: int,
    out: Any,
) -> None: ...
def unpack(
    words: Any,
    bits: int,
    order: bytes,
    codes: int,
    lanes: int,
    word_step: int,
    lane_step: int,
    code_out: int,
    lane_out: int,
    out: Any,
) -> None: ...
def levels() -> int: ...
def use(level: int) -> None: ...
def narrow(values: Any, out: Any) -> tuple[int, int, int]: ...
