"""`torchparams convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from torchparams.cli.app import AsJson, Select, app, show

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


@app.command()
def convert(
    source: Source,
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET",
            help="A file that ends in .safetensors, or in .pt .pth .bin .ckpt; or a directory, for safetensors in "
            "shards.",
            show_default=False,
        ),
    ] = None,
    select: Select = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=REPLACEMENT",
            help="What names become: '^model\\.=' or 'h\\.(\\d+)=layers.\\1'; repeatable, one after the other.",
            show_default=False,
        ),
    ] = None,
    strip_prefix: Annotated[
        str | None,
        typer.Option(metavar="PREFIX", help="Take this off the names that begin with it.", show_default=False),
    ] = None,
    dtype: Types = None,
    allow_overflow: AllowOverflow = False,
    shared: Shared = None,
    max_shard_size: ShardSize = None,
    metadata: Metadata = None,
    memory: Memory = "256MiB",
    force: Force = False,
    repair_index: Annotated[
        bool,
        typer.Option(
            "--repair-index", help="Write the index of a directory of shards anew, in place, from what they hold."
        ),
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write in another format, type, shards or part.

    The target is the old file or the complete new one, whenever the run is stopped. What is not written, shared
    or rounded is told.

    \b
    Examples:
      torchparams convert model.pt model.safetensors
      torchparams convert shards/ model.pt                          for torch.load(weights_only=True)
      torchparams convert model.safetensors out/ --max-shard-size 5GB
      torchparams convert run.ckpt#model small.safetensors --dtype bf16 --dtype '**.norm.*=f32'
      torchparams convert model.pt encoder.safetensors -s 'encoder.**' --strip-prefix encoder.
      torchparams convert model.pt out.safetensors --rename 'gamma$=weight' --dry-run
      torchparams convert --repair-index shards/
    """
    from torchparams.render.progress import progress

    if repair_index:
        from torchparams.edit.index import repair_index as repaired

        if target is not None:
            raise typer.BadParameter("an index is repaired in place: name its directory alone", param_hint="TARGET")
        show(repaired(source, dry_run=dry_run), as_json)
        return
    if target is None:
        raise typer.BadParameter("where to? Name a file or a directory", param_hint="TARGET")
    from torchparams.edit.convert import convert as planned

    plan = planned(
        source,
        target,
        select,
        rename=rename,
        strip_prefix=strip_prefix,
        dtype=types_of(dtype),
        shared=shared,
        max_shard_size=max_shard_size,
        metadata=pairs(metadata),
        memory=memory,
        overwrite=force,
        allow_overflow=allow_overflow,
    )
    if dry_run:
        show(plan, as_json)
        return
    with progress("writing") as tell:
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
