"""safetensors files as they are written: one, or shards with an index as the Hugging Face hub has them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams.edit.plan.layout import FileLayout
from torchparams.errors import PlanError, shorten
from torchparams.io.write import STEM
from torchparams.render.tree import human_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchparams.dtypes import DType
    from torchparams.edit.plan.layout import Output


def check_name(name: str) -> None:
    """Refuse what cannot be a tensor's name here.

    Raises:
        PlanError: The format uses the name itself, or has no way to write it.
    """
    if name == "__metadata__":
        raise PlanError("in a safetensors file, no tensor can be named '__metadata__'", hint="rename it")
    check_text(name, "the name")


def check_text(text: str, what: str) -> None:
    """Refuse text that UTF-8 has no bytes for: half of a surrogate pair.

    Raises:
        PlanError: It is such a text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PlanError(
            f"{what} {shorten(repr(text))} holds {ascii(text[error.start])[1:-1]}, half of a surrogate pair, "
            "which UTF-8 cannot hold",
            hint="rename it" if what == "the name" else "leave it out",
        ) from None


def code_of(dtype: DType, name: str) -> str:
    """The format's spelling of a type.

    Raises:
        PlanError: It has none.
    """
    if dtype.code is None:
        raise PlanError(
            f"safetensors has no dtype for {dtype}",
            where=shorten(repr(name)),
            hint="write a torch file (.pt), or leave it out with -s '~[dtype=…]'"
            if dtype.torch_name
            else "leave it out",
        )
    return dtype.code


def lay_out(name: str, outputs: Sequence[Output], metadata: Mapping[str, str]) -> FileLayout:
    """One file. Names are listed in the order of `outputs`; bytes lie so that every tensor is aligned to its element.

    Args:
        name: The file's name.
        outputs: Its tensors.
        metadata: Its `__metadata__`.

    Raises:
        PlanError: A type or a name that the format does not have, or a header of more than it allows.
    """
    # The first of the widest type, and so on: then each begins at a multiple of its element's size. Readers that look
    # at the bytes where they lie (torch's view of a mapped file is one) take nothing else.
    order = sorted(range(len(outputs)), key=lambda i: -outputs[i].expression.dtype.bits)
    starts, at = [0] * len(outputs), 0
    for i in order:
        starts[i] = at
        at += outputs[i].expression.nbytes
    for pair in metadata.items():
        for told in pair:
            check_text(told, "the metadata")
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for output, start in zip(outputs, starts, strict=True):
        x = output.expression
        check_name(output.name)
        if x.numel * x.dtype.bits % 8:
            raise PlanError(
                f"its {x.numel} elements of {x.dtype.bits} bits fill no whole number of bytes",
                where=shorten(repr(output.name)),
            )
        header[output.name] = {
            "dtype": code_of(x.dtype, output.name),
            "shape": list(x.shape),
            "data_offsets": [start, start + x.nbytes],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > limits.HEADER_BYTES:
        raise PlanError(
            f"the header would take {human_bytes(len(text))}, and the format allows {human_bytes(limits.HEADER_BYTES)}",
            where=name,
            hint="write it in shards (max_shard_size)",
        )
    head = len(text).to_bytes(8, "little") + text
    offsets = {output.name: len(head) + start for output, start in zip(outputs, starts, strict=True)}
    return FileLayout(name, len(head) + at, offsets, lambda _: [(0, head)])


def in_shards(outputs: Sequence[Output], most: int | None) -> list[list[Output]]:
    """The outputs of each shard: as many as go into `most` bytes, in order; a larger tensor has one to itself."""
    if most is None:
        return [list(outputs)]
    shards: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        nbytes = output.expression.nbytes
        if shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += nbytes
    return shards


def shard_name(number: int, count: int, stem: str = STEM) -> str:
    """`model-00001-of-00003.safetensors`, numbers from 1."""
    return f"{stem}-{number:05}-of-{count:05}.safetensors"


def index_of(weight_map: Mapping[str, str], total_size: int, metadata: Mapping[str, Any]) -> bytes:
    """The index of a set of shards, as JSON.

    Args:
        weight_map: Tensor → file name.
        total_size: Bytes of all tensors.
        metadata: What it says beside.

    >>> print(index_of({"w": "model-00001-of-00001.safetensors"}, 8, {}).decode())
    {
      "metadata": {
        "total_size": 8
      },
      "weight_map": {
        "w": "model-00001-of-00001.safetensors"
      }
    }
    <BLANKLINE>
    """
    index = {"metadata": {**metadata, "total_size": total_size}, "weight_map": dict(weight_map)}
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    check_text(text, "the index")
    return text.encode()
