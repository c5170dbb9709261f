"""Fields of conditions, and the parser of their values."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torchparams._selector.syntax_hints import did_you_mean
from torchparams.dtypes import DType
from torchparams.errors import TorchParamsError, nearest

if TYPE_CHECKING:
    from torchparams._selector.tree import Value

FIELDS = ("name", "shape", "ndim", "numel", "nbytes", "dtype", "device", "kind", "module", "layer", "encoding", "bpw")
"""Fields of conditions."""

ORDERED = ("ndim", "numel", "nbytes", "bpw", "layer")
"""Fields that support `<`, `<=`, `>` and `>=`."""

KINDS = ("parameter", "buffer", "tensor")
"""Values of `kind`."""

UNITS = {"": 1}
UNITS |= {unit: 1000**power for power, unit in enumerate("KMGT", 1)}
UNITS |= {f"{unit}iB": 1024**power for power, unit in enumerate("KMGT", 1)}
"""Units of sizes."""

_SIZE = re.compile(r"([0-9]+(?:_[0-9]+)*)(\.[0-9]+)? *([A-Za-z]*)")
_DEVICE = re.compile(r"[A-Za-z_]\w*(:[0-9]+)?")

EXAMPLES = {
    "shape": "[shape=64x3x7x7], with * for any size; [shape=()] is a scalar's",
    "ndim": "[ndim>=2]",
    "numel": "[numel>=1M]",
    "nbytes": "[nbytes>=1MiB]",
    "layer": "[layer>=4]",
    "dtype": "[dtype=bf16]",
    "device": "[device=cuda] or [device=cuda:0]",
    "kind": "[kind=buffer]",
    "encoding": "[encoding=nf4], with * for any characters: [encoding=gptq-*]",
    "bpw": "[bpw<=4.5]",
}
"""Examples of conditions, by field."""


class ValueProblemError(Exception):
    """The text is not a value of the field.

    Attributes:
        expected: Expected syntax.
        hint: Hint, or None.
    """

    def __init__(self, expected: str, hint: str | None = None) -> None:
        super().__init__(expected)
        self.expected, self.hint = expected, hint


def read_value(field: str, text: str) -> tuple[Value, str]:
    """Parse a value; returns the value and its text. The fields `name` and `module` have globs instead.

    Raises:
        ValueProblemError: The text is not a value of the field.
    """
    if field == "shape":
        return _shape(text)
    if field == "dtype":
        return _dtype(text), text
    if field == "kind":
        return _kind(text), text
    if field == "device":
        return _device(text), text
    if field == "encoding":
        return text, text
    if field == "bpw":
        return _decimal(text), text
    return _number(text, field), text


def _shape(text: str) -> tuple[tuple[int | None, ...] | None, str]:
    if text == "lazy":
        return None, text
    listed = text[0] in "([" and text[-1] == {"(": ")", "[": "]"}[text[0]]
    inner = text[1:-1].strip() if listed else text
    if listed and not inner:
        return (), "()"
    sizes = [size.strip() for size in re.split("[,x×]", inner)]
    if listed and len(sizes) > 1 and not sizes[-1]:
        sizes.pop()  # trailing comma of a Python tuple, such as (64,)
    if not all(size == "*" or re.fullmatch("[0-9]{1,18}", size) for size in sizes):
        raise ValueProblemError("a shape", EXAMPLES["shape"])
    value = tuple(None if size == "*" else int(size) for size in sizes)
    return value, "x".join("*" if size is None else str(size) for size in value)


def _dtype(text: str) -> DType:
    try:
        return DType.of(text)
    except TorchParamsError as error:
        raise ValueProblemError("a dtype", error.hint) from None


def _kind(text: str) -> str:
    if text not in KINDS:
        near = nearest(text.lower(), KINDS)
        raise ValueProblemError(f"one of {', '.join(KINDS)}", did_you_mean(near) if near else None)
    return text


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise ValueProblemError("a device", "write cpu, cuda (any of them), cuda:0, meta, or file for a checkpoint")
    return text


def _decimal(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise ValueProblemError("a number", EXAMPLES["bpw"])
    return float(text)


def _number(text: str, field: str) -> int:
    sized = field in ("numel", "nbytes")
    expected = "a size" if sized else "a whole number"
    found = _SIZE.fullmatch(text) if len(text) <= 40 else None
    hint = "1500000, 1500K, 1.5M (decimal), 2KiB, 1MiB, 3GiB (binary)" if sized else EXAMPLES[field]
    if found is None:
        raise ValueProblemError(expected, hint)
    whole, fraction, unit = found.groups(default="")
    if unit not in UNITS or (unit and not sized):
        raise ValueProblemError(expected, hint)
    decimals = fraction.removeprefix(".")
    value, rest = divmod(int(whole.replace("_", "") + decimals) * UNITS[unit], int("1" + "0" * len(decimals)))
    if rest:
        raise ValueProblemError(
            expected, f"{text} is not a whole number of {'bytes' if field == 'nbytes' else 'elements'}"
        )
    return value
