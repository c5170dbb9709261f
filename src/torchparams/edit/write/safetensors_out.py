"""Write safetensors files: a single file, or shards with an index as on the Hugging Face hub."""

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
    """Check that the format allows a tensor name.

    Raises:
        PlanError: The name is reserved, or cannot be encoded.
    """
    if name == "__metadata__":
        raise PlanError("the name '__metadata__' is reserved in safetensors files", hint="rename it")
    check_text(name, "the name")


def check_text(text: str, what: str) -> None:
    """Check that text can be encoded in UTF-8: no lone surrogates.

    Raises:
        PlanError: The text has a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PlanError(
            f"{what} {shorten(repr(text))} contains the lone surrogate {ascii(text[error.start])[1:-1]}, "
            "which UTF-8 cannot encode",
            hint="rename it" if what == "the name" else "leave it out",
        ) from None


def code_of(dtype: DType, name: str) -> str:
    """Dtype code of the format.

    Raises:
        PlanError: The format has no such dtype.
    """
    if dtype.code is None:
        raise PlanError(
            f"safetensors has no dtype for {dtype}",
            where=shorten(repr(name)),
            hint="write a torch file (.pt), or exclude it with -s '~[dtype=…]'" if dtype.torch_name else "exclude it",
        )
    return dtype.code


def lay_out(name: str, outputs: Sequence[Output], metadata: Mapping[str, str]) -> FileLayout:
    """Lay out one file. The header lists tensors in the order of `outputs`; the data is ordered for alignment.

    Args:
        name: File name.
        outputs: Tensors of the file.
        metadata: Value of `__metadata__`.

    Raises:
        PlanError: A dtype or name is not supported, or the header is too long.
    """
    # Widest dtypes come first, so that each tensor starts at a multiple of its element size. Memory-mapped readers such
    # as torch need that alignment.
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
                f"{x.numel} elements of {x.dtype.bits} bits do not fill a whole number of bytes",
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
            f"the header would take {human_bytes(len(text))}, the limit is {human_bytes(limits.HEADER_BYTES)}",
            where=name,
            hint="write it in shards (max_shard_size)",
        )
    head = len(text).to_bytes(8, "little") + text
    offsets = {output.name: len(head) + start for output, start in zip(outputs, starts, strict=True)}
    return FileLayout(name, len(head) + at, offsets, lambda _: [(0, head)])


def in_shards(outputs: Sequence[Output], most: int | None) -> list[list[Output]]:
    """Split outputs into shards of at most `most` bytes, in order. A larger tensor gets its own shard."""
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
    """File name of a shard, such as `model-00001-of-00003.safetensors`; numbers start at 1."""
    return f"{stem}-{number:05}-of-{count:05}.safetensors"


def index_of(weight_map: Mapping[str, str], total_size: int, metadata: Mapping[str, Any]) -> bytes:
    """Index of a sharded checkpoint, as JSON.

    Args:
        weight_map: Tensor name → file name.
        total_size: Bytes of all tensors.
        metadata: Other metadata of the index.

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
