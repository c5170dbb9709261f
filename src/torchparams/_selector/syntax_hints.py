"""Hints for common mistakes in the text of a selector."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

FIELD_HINTS = {
    "size": "use [numel>1M] for elements, [nbytes>1MiB] for bytes, [shape=64x3] for the shape",
    "type": "use [dtype=bf16], [module=Linear] for the owner's class, or [kind=buffer]",
    "class": "the owner's class is [module=Linear]",
    "cls": "the owner's class is [module=Linear]",
    "owner": "the owner's class is [module=Linear]",
    "requires_grad": "write :trainable or :frozen",
    "dim": "the number of dimensions is [ndim=2]",
    "dims": "the number of dimensions is [ndim=2]",
    "rank": "the number of dimensions is [ndim=2]",
    "bytes": "write [nbytes>1MiB]",
    "params": "write [numel>1M]",
    "parameters": "write [numel>1M]",
}
"""Hint for a word that is not a field."""

WORD_HINTS = {
    "not": "the complement is written `~`",
    "weight": "write **.weight",
    "weights": "write **.weight",
    "parameter": "write [kind=parameter]",
    "parameters": "write [kind=parameter]",
    "requires_grad": "write :trainable or :frozen",
    "linear": "write [module=Linear]",
    "conv": "write [module=Conv*]",
    "conv2d": "write [module=Conv2d]",
    "attention": "write [module=*Attention]",
    "scalar": "write [ndim=0]",
    "vector": "write [ndim=1]",
    "lazy": "write [shape=lazy]",
}
"""Hint for a word that is not in the language."""

JOIN_HINTS = {
    "and": "an intersection is written `a & b`",
    "or": "a union is written `a | b`",
    "not": "a complement is written `~a`, a difference `a & ~b`",
    ",": "a union is written `a | b`",
    ";": "a union is written `a | b`",
    "+": "a union is written `a | b`",
    "-": "a difference is written `a & ~b`",
    "!": "a complement is written `~a`, a difference `a & ~b`",
    "~": "a difference is written `a & ~b`",
    "=": "write a condition in brackets: [dtype=bf16]",
    "<": "write a condition in brackets: [ndim<2]",
    ">": "write a condition in brackets: [ndim>2]",
}
"""Hint for text where terms are joined."""

OPERATOR_HINTS = {
    "==": "write a single `=`",
    "===": "write a single `=`",
    "=<": "write <=",
    "=>": "write >=",
    "<>": "write !=",
    "=~": "write a regular expression as a term: /.*bias/",
    "~=": "write a regular expression as a term: /.*bias/",
    "^=": "name and module take wildcards: [name=encoder.**]",
    "$=": "name and module take wildcards: [name=**.bias]",
    "*=": "name and module take wildcards: [module=*Norm]",
    ":": "write [field=value]",
}
"""Hint for an operator that is not in the language."""


def did_you_mean(near: Iterable[str]) -> str:
    """Hint with the nearest valid words."""
    return f"did you mean {' or '.join(near)}?"
