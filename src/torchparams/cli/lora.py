"""`torchparams lora fold` and `torchparams lora extract`."""

from __future__ import annotations

from typing import Annotated

import typer

from torchparams.cli.app import AsJson, Select, app, union
from torchparams.cli.plans import (
    AllowOverflow,
    Destination,
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
from torchparams.errors import OptionError

FanInFanOut = Annotated[
    str | None,
    typer.Option(
        "--fan-in-fan-out",
        metavar="SELECTOR",
        help="The weights that are stored as (in, out), where neither shapes nor the base's config.json say so.",
        show_default=False,
    ),
]
NoFanInFanOut = Annotated[
    bool, typer.Option("--no-fan-in-fan-out", help="No weight is stored as (in, out).", show_default=False)
]

lora = typer.Typer(rich_markup_mode=None, invoke_without_command=True)
app.add_typer(lora, name="lora")


@lora.callback()
def _lora(context: typer.Context) -> None:
    """Fold a LoRA adapter into its base, or extract.

    One is extracted from the difference of two checkpoints.

    Adapters are directories as PEFT saves them. PEFT is not needed.

    \b
    Examples:
      torchparams lora fold base/ adapter/ folded/
      torchparams lora extract base/ tuned/ adapter/ --rank 16
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@lora.command()
def fold(
    base: Source,
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER",
            help="A directory with adapter_config.json and adapter_model.safetensors, as PEFT saves it.",
            show_default=False,
        ),
    ],
    target: Destination,
    scale: Annotated[
        float, typer.Option(metavar="NUMBER", help="What the change is multiplied by, beside alpha/r.")
    ] = 1.0,
    dtype: Types = None,
    compute: Annotated[str, typer.Option(metavar="float32|float64", help="What everything is computed in.")] = (
        "float32"
    ),
    fan_in_fan_out: FanInFanOut = None,
    no_fan_in_fan_out: NoFanInFanOut = False,
    allow_overflow: AllowOverflow = False,
    shared: Shared = None,
    max_shard_size: ShardSize = None,
    metadata: Metadata = None,
    memory: Memory = "256MiB",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write a base with a LoRA adapter folded into its weights.

    Computed in float32 and rounded once. What is not understood, such as DoRA, is refused by name.

    \b
    Examples:
      torchparams lora fold base.safetensors adapter/ folded.safetensors
      torchparams lora fold base/ adapter/ folded/ --scale 0.5 --max-shard-size 5GB
      torchparams lora fold base.safetensors adapter/ folded.safetensors --dry-run
    """
    from torchparams.edit.lora.fold import fold_lora

    plan = fold_lora(
        base,
        adapter,
        target,
        scale=scale,
        dtype=types_of(dtype),
        compute=compute,
        fan_in_fan_out=_stated(fan_in_fan_out, no_fan_in_fan_out),
        shared=shared,
        max_shard_size=max_shard_size,
        metadata=pairs(metadata),
        memory=memory,
        overwrite=force,
        allow_overflow=allow_overflow,
    )
    carry_out(plan, "folding", dry_run=dry_run, as_json=as_json)


@lora.command()
def extract(
    base: Source,
    tuned: Annotated[
        str, typer.Argument(metavar="TUNED", help="The checkpoint that came of the base.", show_default=False)
    ],
    target: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="The directory that is written.", show_default=False)
    ],
    rank: Annotated[int, typer.Option("--rank", "-r", metavar="NUMBER", help="The rank.", show_default=False)],
    select: Select = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            metavar="SELECTOR",
            help="The weights of embeddings, which PEFT lays out in its own way.",
            show_default="modules called wte, wpe or ...embed...",
        ),
    ] = None,
    fan_in_fan_out: FanInFanOut = None,
    no_fan_in_fan_out: NoFanInFanOut = False,
    save_rest: Annotated[
        bool,
        typer.Option(
            "--save-rest", help="Write biases, norms and whatever else differs whole, as PEFT's modules_to_save."
        ),
    ] = False,
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="The type of the factors.")] = "float32",
    base_name: Annotated[
        str,
        typer.Option(metavar="NAME", help="What the adapter says its base is: an id or a path.", show_default=False),
    ] = "",
    memory: Memory = "256MiB",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write the best LoRA adapter of a rank between a base and what was tuned from it.

    The factors are the truncated singular value decomposition of each matrix's change. It is told how much each leaves,
    and what differs that an adapter has no factors for.

    \b
    Examples:
      torchparams lora extract base.safetensors tuned.safetensors adapter/ --rank 16
      torchparams lora extract base/ tuned/ adapter/ --rank 64 --save-rest --base-name my/model
      torchparams lora extract base/ tuned/ adapter/ --rank 8 -s '**.{q,v}_proj.weight' --dtype bf16
    """
    from torchparams.edit.lora.extract import extract_lora

    plan = extract_lora(
        base,
        tuned,
        target,
        union(select),
        rank=rank,
        embeddings=embeddings,
        fan_in_fan_out=_stated(fan_in_fan_out, no_fan_in_fan_out),
        save_rest=save_rest,
        dtype=dtype,
        base_name=base_name,
        memory=memory,
        overwrite=force,
    )
    carry_out(plan, "extracting", dry_run=dry_run, as_json=as_json)


def _stated(selector: str | None, none: bool) -> str | bool | None:
    """What the user says of weights that are stored as (in, out)."""
    if selector is not None and none:
        raise OptionError("--fan-in-fan-out and --no-fan-in-fan-out exclude each other")
    return False if none else selector
