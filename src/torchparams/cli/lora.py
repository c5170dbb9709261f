"""`torchparams lora fold` and `torchparams lora extract`."""

from __future__ import annotations

import click

from torchparams.cli import options, plans
from torchparams.cli.options import Command, argument
from torchparams.cli.plans import carry_out, pairs, types_of
from torchparams.errors import OptionError

_fan_in_fan_out = click.option(
    "--fan-in-fan-out",
    metavar="SELECTOR",
    help="Weights stored as (in, out); needed if shapes and the base's config.json do not decide.",
)
_no_fan_in_fan_out = click.option("--no-fan-in-fan-out", is_flag=True, help="All weights are stored as (out, in).")


@click.group(invoke_without_command=True, subcommand_metavar="COMMAND [ARGS]...")
@click.pass_context
def lora(context: click.Context) -> None:
    """Fold a LoRA adapter into its base, or extract one from two checkpoints.

    Adapters are directories in PEFT's layout. PEFT is not needed.

    \b
    Examples:
      torchparams lora fold base/ adapter/ folded/
      torchparams lora extract base/ tuned/ adapter/ --rank 16
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@lora.command(cls=Command)
@plans.base
@argument(
    "adapter",
    metavar="ADAPTER",
    help="An adapter directory in PEFT's layout: adapter_config.json and adapter_model.safetensors.",
)
@plans.destination
@click.option(
    "--scale",
    metavar="NUMBER",
    type=float,
    default=1.0,
    show_default=True,
    help="Additional factor for the change, on top of alpha/r.",
)
@plans.dtype
@click.option(
    "--compute", metavar="float32|float64", default="float32", show_default=True, help="Dtype of the computation."
)
@_fan_in_fan_out
@_no_fan_in_fan_out
@plans.allow_overflow
@plans.shared
@plans.max_shard_size
@plans.metadata
@plans.memory
@plans.force
@plans.dry_run
@options.as_json
def fold(
    base: str,
    adapter: str,
    target: str,
    scale: float,
    dtype: tuple[str, ...],
    compute: str,
    fan_in_fan_out: str | None,
    no_fan_in_fan_out: bool,
    allow_overflow: bool,
    shared: str | None,
    max_shard_size: str | None,
    metadata: tuple[str, ...],
    memory: str,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Fold a LoRA adapter into the weights of its base.

    Computes in float32 and rounds once. Unsupported features, such as DoRA, are an error.

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


@lora.command(cls=Command)
@plans.base
@argument("tuned", metavar="TUNED", help="A checkpoint tuned from the base.")
@argument("target", metavar="ADAPTER", help="Output directory.")
@click.option("--rank", "-r", metavar="NUMBER", type=int, required=True, help="The rank.")
@options.select
@click.option(
    "--embeddings",
    metavar="SELECTOR",
    show_default="modules called wte, wpe or ...embed...",
    help="Weights of embeddings, for which PEFT uses another layout.",
)
@_fan_in_fan_out
@_no_fan_in_fan_out
@click.option(
    "--save-rest",
    is_flag=True,
    help="Write other differing tensors (biases, norms, …) whole, as PEFT's modules_to_save.",
)
@click.option("--dtype", metavar="DTYPE", default="float32", show_default=True, help="Dtype of the factors.")
@click.option(
    "--base-name", metavar="NAME", default="", help="Base named in the adapter's configuration: an id or a path."
)
@plans.memory
@plans.force
@plans.dry_run
@options.as_json
def extract(
    base: str,
    tuned: str,
    target: str,
    rank: int,
    select: str | None,
    embeddings: str | None,
    fan_in_fan_out: str | None,
    no_fan_in_fan_out: bool,
    save_rest: bool,
    dtype: str,
    base_name: str,
    memory: str,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Extract the best LoRA adapter of a given rank from a base and a tuned checkpoint.

    The factors are the truncated singular value decomposition of each matrix's difference. The output lists the error
    of each matrix, and differing tensors without factors.

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
        select,
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
    """Orientation given on the command line."""
    if selector is not None and none:
        raise OptionError("--fan-in-fan-out and --no-fan-in-fan-out cannot be used together")
    return False if none else selector
