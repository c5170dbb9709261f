"""Shared options of commands that write files, and how plans are shown or run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from torchparams.cli.options import argument

if TYPE_CHECKING:
    from collections.abc import Iterable

from torchparams.cli.app import show

_A_CHECKPOINT = (
    "A checkpoint (.safetensors .pt .pth .bin .ckpt), a directory of shards or its index, optionally with #path for a "
    "nested mapping."
)
source = argument("source", metavar="SOURCE", help=_A_CHECKPOINT)
base = argument("base", metavar="BASE", help=_A_CHECKPOINT)
destination = argument(
    "target",
    metavar="TARGET",
    help="Output file (.safetensors, .pt, .pth, .bin or .ckpt), or a directory for safetensors in shards.",
)
shared = click.option(
    "--shared",
    metavar="keep|drop|clone",
    help="Tied tensors: keep the tie, write one name, or write each name. Torch files default to keep, "
    "safetensors (which cannot store ties) to clone.",
)
max_shard_size = click.option(
    "--max-shard-size", metavar="SIZE", help="Maximum bytes of tensors per file: 5GB, 500M, 2GiB. Directories only."
)
metadata = click.option(
    "--metadata",
    metavar="KEY=TEXT",
    multiple=True,
    help="Text metadata for a safetensors file; repeatable.",
)
dtype = click.option(
    "--dtype",
    metavar="[SELECTOR=]DTYPE",
    multiple=True,
    help="Cast all floats (bf16), or a selection ('**.norm.*=f32'); repeatable, the last wins.",
)
allow_overflow = click.option(
    "--allow-overflow", is_flag=True, help="Allow rounding that turns finite values into infinity."
)
memory = click.option("--memory", metavar="SIZE", default="256MiB", show_default=True, help="Memory limit for tensors.")
force = click.option(
    "--force", "-f", is_flag=True, help="Replace an existing target, even a source, once the new one is complete."
)
dry_run = click.option("--dry-run", "-n", is_flag=True, help="Show the plan without writing.")


def carry_out(plan: Any, doing: str, *, engine: str | None = None, dry_run: bool, as_json: bool) -> None:
    """Show a plan, or run it and show the summary. `doing` labels the progress bar."""
    from torchparams.render.progress import progress

    if dry_run:
        show(plan, as_json)
        return
    with progress(doing) as tell:
        # Plans of adapters have no engine to choose.
        written = plan.run(tell) if engine is None else plan.run(tell, engine=engine)
    show(written, as_json)


def pairs(texts: Iterable[str]) -> dict[str, str] | None:
    """Parse `KEY=TEXT` options into a mapping."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not KEY=TEXT", param_hint="--metadata")
        found[key] = value
    return found or None


def types_of(texts: Iterable[str]) -> dict[str | None, str] | None:
    """Parse `DTYPE` and `SELECTOR=DTYPE` into a mapping selector → dtype; None stands for all floats."""
    found: dict[str | None, str] = {}
    for text in texts:
        selector, equals, spelling = text.rpartition("=")
        key = selector if equals else None
        found.pop(key, None)  # a repeated key moves to the end
        found[key] = spelling
    return found or None
