"""`torchparams merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from torchparams.cli import options, plans
from torchparams.cli.complete import files
from torchparams.cli.options import argument, command
from torchparams.cli.plans import carry_out, pairs, types_of

if TYPE_CHECKING:
    from collections.abc import Iterable


@command
@argument(
    "paths",
    metavar="SOURCE... TARGET",
    nargs=-1,
    required=True,
    help="Checkpoints of one network; last, the output: a .safetensors or .pt file, or a directory.",
)
@click.option(
    "--method",
    "-m",
    metavar="METHOD",
    default="linear",
    show_default=True,
    help="linear, average, slerp; or, with --base: task_arithmetic, ties, dare, dare_ties.",
)
@click.option(
    "--weight",
    "-w",
    metavar="[SELECTOR=]W[,W...]",
    multiple=True,
    show_default="equal shares; with a base, 1",
    help="A weight for each source: -w 0.3,0.7, or -w 0.3 -w 0.7. A single weight is the share of the second "
    "of two sources (t of "
    "slerp), or with a base, the weight of each source. SELECTOR=W applies to a selection; repeatable, the last wins.",
)
@click.option(
    "--base", "-b", metavar="BASE", shell_complete=files, help="The checkpoint that the sources were tuned from."
)
@click.option(
    "--density",
    "-d",
    metavar="[SELECTOR=]D[,D...]",
    multiple=True,
    show_default="1",
    help="For ties and dare: share of differences from the base to keep; same syntax as weights.",
)
@click.option(
    "--scale",
    metavar="NUMBER",
    type=float,
    show_default="1",
    help="With a base: factor for the sum of differences.",
)
@click.option("--seed", metavar="NUMBER", type=int, show_default="0", help="For dare: seed of the random numbers.")
@click.option("--normalize", is_flag=True, help="For linear: divide the weights by their sum.")
@options.select
@plans.dtype
@click.option(
    "--compute", metavar="float32|float64", default="float32", show_default=True, help="Dtype of the computation."
)
@click.option(
    "--rename",
    metavar="REGEX=REPLACEMENT",
    multiple=True,
    help="Rename tensors of the other sources to match the first source or the base; repeatable, applied in order.",
)
@click.option(
    "--missing",
    metavar="refuse|keep|drop",
    default="refuse",
    show_default=True,
    help="Tensors that some sources lack: refuse, keep (copy unchanged) or drop.",
)
@plans.allow_overflow
@plans.shared
@plans.max_shard_size
@plans.metadata
@plans.memory
@plans.force
@options.engine
@plans.dry_run
@options.as_json
def merge(
    paths: tuple[str, ...],
    method: str,
    weight: tuple[str, ...],
    base: str | None,
    density: tuple[str, ...],
    scale: float | None,
    seed: int | None,
    normalize: bool,
    select: str | None,
    dtype: tuple[str, ...],
    compute: str,
    rename: tuple[str, ...],
    missing: str,
    allow_overflow: bool,
    shared: str | None,
    max_shard_size: str | None,
    metadata: tuple[str, ...],
    memory: str,
    force: bool,
    engine: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Merge several checkpoints of one network into one.

    Computes in float32 and rounds once, within the memory limit. Dtypes, and all tensors that are not floats, come from
    the first source, or from the base.

    \b
    Examples:
      torchparams merge a.safetensors b.safetensors c.safetensors soup.safetensors
      torchparams merge a.safetensors b.safetensors out.safetensors -w 0.3          0.7 of a, 0.3 of b
      torchparams merge a/ b/ out/ -m slerp -w 0.5 -w 'layers.{0..10}.**=0.3'
      torchparams merge a.pt b.pt c.pt out.pt -w 0.5,0.25,0.25 -w 'head.**=1,0,0' --dry-run
      torchparams merge math/ code/ both/ --base llama/ -m task_arithmetic --scale 0.8
      torchparams merge math/ code/ both/ --base llama/ -m ties -d 0.2
      torchparams merge math/ code/ both/ --base llama/ -m dare_ties -d 0.1 --seed 7
    """
    from torchparams.edit.merge.merge import merge as planned

    *sources, target = paths
    if not sources:
        raise click.BadParameter("name the sources, and the output last", param_hint="SOURCE... TARGET")
    plan = planned(
        sources,
        target,
        select,
        method=method,
        weights=numbers(weight, "--weight"),
        base=base,
        density=numbers(density, "--density"),
        scale=scale,
        seed=seed,
        normalize=normalize,
        dtype=types_of(dtype),
        compute=compute,
        rename=rename,
        missing=missing,
        shared=shared,
        max_shard_size=max_shard_size,
        metadata=pairs(metadata),
        memory=memory,
        overwrite=force,
        allow_overflow=allow_overflow,
    )
    carry_out(plan, "merging", engine=engine, dry_run=dry_run, as_json=as_json)


def numbers(texts: Iterable[str], option: str) -> dict[str | None, float | list[float]] | None:
    """Parse `W,W` and `SELECTOR=W,W` into a mapping selector → numbers. None, for all tensors, comes first."""
    plain: list[float] = []
    found: dict[str | None, float | list[float]] = {}
    for text in texts:
        selector, equals, given = text.rpartition("=")
        try:
            values = [float(each) for each in given.split(",")]
        except ValueError:
            raise click.BadParameter(
                f"{given!r} is not a number, or several separated by commas", param_hint=option
            ) from None
        if equals:
            found.pop(selector, None)  # a repeated key moves to the end
            found[selector] = values[0] if len(values) == 1 else values
        else:
            plain += values
    if plain:
        found = {None: plain[0] if len(plain) == 1 else plain, **found}
    return found or None
