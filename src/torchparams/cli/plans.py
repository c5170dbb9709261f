"""What the commands that write files share: their options, and how a plan is shown or run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from torchparams.cli.options import argument

if TYPE_CHECKING:
    from collections.abc import Iterable

from torchparams.cli.app import show

_A_CHECKPOINT = (
    "A checkpoint (safetensors, .pt .pth .bin .ckpt), a directory of shards or its index, either with #path for a "
    "mapping inside it."
)
source = argument("source", metavar="SOURCE", help=_A_CHECKPOINT)
base = argument("base", metavar="BASE", help=_A_CHECKPOINT)
destination = argument(
    "target",
    metavar="TARGET",
    help="A file that ends in .safetensors, or in .pt .pth .bin .ckpt; or a directory, for safetensors in shards.",
)
shared = click.option(
    "--shared",
    metavar="keep|drop|clone",
    help="What becomes of tied tensors; by default they are kept in a torch file, and written under each name in "
    "safetensors, which cannot say that two are one.",
)
max_shard_size = click.option(
    "--max-shard-size", metavar="SIZE", help="Most bytes of tensors in one file: 5GB, 500M, 2GiB. For a directory."
)
metadata = click.option(
    "--metadata",
    metavar="KEY=TEXT",
    multiple=True,
    help="Text that a safetensors file says beside its tensors; repeatable.",
)
dtype = click.option(
    "--dtype",
    metavar="[SELECTOR=]DTYPE",
    multiple=True,
    help="Cast all floats (bf16), or what a selector hits ('**.norm.*=f32'); repeatable, the last wins.",
)
allow_overflow = click.option(
    "--allow-overflow", is_flag=True, help="Accept finite values that rounding makes infinite."
)
memory = click.option(
    "--memory", metavar="SIZE", default="256MiB", show_default=True, help="Memory that tensors may take."
)
force = click.option(
    "--force", "-f", is_flag=True, help="Replace the target, even a source, once the new one is complete."
)
dry_run = click.option("--dry-run", "-n", is_flag=True, help="Show what would be written, and write nothing.")


def carry_out(plan: Any, doing: str, *, dry_run: bool, as_json: bool) -> None:
    """Show a plan, or run it and show what it has written; `doing` is what its progress is called."""
    from torchparams.render.progress import progress

    if dry_run:
        show(plan, as_json)
        return
    with progress(doing) as tell:
        written = plan.run(tell)
    show(written, as_json)


def pairs(texts: Iterable[str]) -> dict[str, str] | None:
    """`KEY=TEXT` as a mapping."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not KEY=TEXT", param_hint="--metadata")
        found[key] = value
    return found or None


def types_of(texts: Iterable[str]) -> dict[str | None, str] | None:
    """`DTYPE` and `SELECTOR=DTYPE` as a mapping, selector → type; None stands for all floats."""
    found: dict[str | None, str] = {}
    for text in texts:
        selector, equals, spelling = text.rpartition("=")
        key = selector if equals else None
        found.pop(key, None)  # what is said again comes last
        found[key] = spelling
    return found or None
