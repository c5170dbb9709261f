"""`torchparams convert`."""

from __future__ import annotations

import click

from torchparams.cli import options, plans
from torchparams.cli.app import show
from torchparams.cli.options import argument, command
from torchparams.cli.plans import carry_out, pairs, types_of
from torchparams.cli.targets import stored


@command
@plans.source
@argument(
    "target",
    metavar="[TARGET]",
    required=False,
    help="Output file (.safetensors, .pt, .pth, .bin or .ckpt), or a directory for safetensors in shards.",
)
@options.select
@click.option(
    "--rename",
    metavar="REGEX=REPLACEMENT",
    multiple=True,
    help="Rename tensors: '^model\\.=' or 'h\\.(\\d+)=layers.\\1'; repeatable, applied in order.",
)
@click.option("--strip-prefix", metavar="PREFIX", help="Remove this prefix from names.")
@plans.dtype
@plans.allow_overflow
@plans.shared
@plans.max_shard_size
@plans.metadata
@plans.memory
@plans.force
@click.option("--repair-index", is_flag=True, help="Rebuild the index of a directory of shards in place.")
@options.engine
@plans.dry_run
@options.raw
@options.as_json
def convert(
    source: str,
    target: str | None,
    select: str | None,
    rename: tuple[str, ...],
    strip_prefix: str | None,
    dtype: tuple[str, ...],
    allow_overflow: bool,
    shared: str | None,
    max_shard_size: str | None,
    metadata: tuple[str, ...],
    memory: str,
    force: bool,
    repair_index: bool,
    engine: str | None,
    dry_run: bool,
    raw: bool,
    as_json: bool,
) -> None:
    """Convert to another format or dtype, re-shard, or extract a part.

    At every moment, the target is the old file or the complete new one. The output lists what was left out, tied or
    rounded.

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
            raise click.BadParameter("an index is repaired in place: omit TARGET", param_hint="TARGET")
        show(repaired(source, dry_run=dry_run), as_json)
        return
    if target is None:
        raise click.BadParameter("TARGET is missing: name a file or a directory", param_hint="TARGET")
    from torchparams.edit.convert import convert as planned

    plan = planned(
        stored(source) if raw else source,
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
    carry_out(plan, "writing", engine=engine, dry_run=dry_run, as_json=as_json)
