"""`torchparams convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from torchparams.cli.app import AsJson, Raw, Select, app, show, union
from torchparams.cli.plans import (
    AllowOverflow,
    DryRun,
    Force,
    Memory,
    Metadata,
    ShardSize,
    Shared,
    Source,
    Types,
    carry_out,
    pairs,
    types_of,
)
from torchparams.cli.targets import stored


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
    raw: Raw = False,
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
        stored(source) if raw else source,
        target,
        union(select),
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
    carry_out(plan, "writing", dry_run=dry_run, as_json=as_json)
