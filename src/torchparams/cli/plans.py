"""What the commands that write files share: their options, and how a plan is shown or run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from torchparams.cli.app import show

_A_CHECKPOINT = (
    "A checkpoint (safetensors, .pt .pth .bin .ckpt), a directory of shards or its index, either with #path for a "
    "mapping inside it."
)
Source = Annotated[str, typer.Argument(metavar="SOURCE", help=_A_CHECKPOINT, show_default=False)]
Base = Annotated[str, typer.Argument(metavar="BASE", help=_A_CHECKPOINT, show_default=False)]
Destination = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="A file that ends in .safetensors, or in .pt .pth .bin .ckpt; or a directory, for safetensors in shards.",
        show_default=False,
    ),
]
Shared = Annotated[
    str | None,
    typer.Option(
        metavar="keep|drop|clone",
        help="What becomes of tied tensors; by default they are kept in a torch file, and written under each name in "
        "safetensors, which cannot say that two are one.",
        show_default=False,
    ),
]
ShardSize = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size",
        metavar="SIZE",
        help="Most bytes of tensors in one file: 5GB, 500M, 2GiB. For a directory.",
        show_default=False,
    ),
]
Metadata = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=TEXT", help="Text that a safetensors file says beside its tensors; repeatable.", show_default=False
    ),
]
Types = Annotated[
    list[str] | None,
    typer.Option(
        "--dtype",
        metavar="[SELECTOR=]DTYPE",
        help="Cast all floats (bf16), or what a selector hits ('**.norm.*=f32'); repeatable, the last wins.",
        show_default=False,
    ),
]
AllowOverflow = Annotated[
    bool, typer.Option("--allow-overflow", help="Accept finite values that rounding makes infinite.")
]
Memory = Annotated[str, typer.Option(metavar="SIZE", help="Memory that tensors may take.")]
Force = Annotated[
    bool, typer.Option("--force", "-f", help="Replace the target, even a source, once the new one is complete.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Show what would be written, and write nothing.")]


def carry_out(plan: Any, doing: str, *, dry_run: bool, as_json: bool) -> None:
    """Show a plan, or run it and show what it has written; `doing` is what its progress is called."""
    from torchparams.render.progress import progress

    if dry_run:
        show(plan, as_json)
        return
    with progress(doing) as tell:
        written = plan.run(tell)
    show(written, as_json)


def pairs(texts: list[str] | None) -> dict[str, str] | None:
    """`KEY=TEXT` as a mapping."""
    found = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r} is not KEY=TEXT", param_hint="--metadata")
        found[key] = value
    return found or None


def types_of(texts: list[str] | None) -> dict[str | None, str] | None:
    """`DTYPE` and `SELECTOR=DTYPE` as a mapping, selector → type; None stands for all floats."""
    found: dict[str | None, str] = {}
    for text in texts or ():
        selector, equals, spelling = text.rpartition("=")
        key = selector if equals else None
        found.pop(key, None)  # what is said again comes last
        found[key] = spelling
    return found or None
