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
    help="Checkpoints of one network; and last, what is written: a file that ends in .safetensors or .pt, or a "
    "directory.",
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
    help="A weight for each source: -w 0.3,0.7, or -w 0.3 -w 0.7. One alone is the share of the second of two (t of "
    "slerp); with a base, the weight of each source. With a selector, of what it hits; repeatable, the last wins.",
)
@click.option("--base", "-b", metavar="BASE", shell_complete=files, help="What the sources were tuned from.")
@click.option(
    "--density",
    "-d",
    metavar="[SELECTOR=]D[,D...]",
    multiple=True,
    show_default="1",
    help="For ties and dare, the share of differences from the base that is kept: spelled like weights.",
)
@click.option(
    "--scale",
    metavar="NUMBER",
    type=float,
    show_default="1",
    help="With a base, what the sum of differences is multiplied by.",
)
@click.option("--seed", metavar="NUMBER", type=int, show_default="0", help="For dare, of the random numbers.")
@click.option("--normalize", is_flag=True, help="Divide the weights of linear by their sum.")
@options.select
@plans.dtype
@click.option(
    "--compute", metavar="float32|float64", default="float32", show_default=True, help="What everything is computed in."
)
@click.option(
    "--rename",
    metavar="REGEX=REPLACEMENT",
    multiple=True,
    help="What names of the other sources become, so that they meet those of the first or of the base; repeatable, "
    "one after the other.",
)
@click.option(
    "--missing",
    metavar="refuse|keep|drop",
    default="refuse",
    show_default=True,
    help="What becomes of tensors that not every source has; those that are kept are taken as they are.",
)
@plans.allow_overflow
@plans.shared
@plans.max_shard_size
@plans.metadata
@plans.memory
@plans.force
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
    dry_run: bool,
    as_json: bool,
) -> None:
    """Merge checkpoints of one network to one.

    Everything is computed in float32 and rounded once, in as little memory as is asked for. The types are those of the
    first source, or of the base. Tensors that are not floats are taken from there.

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
        raise click.BadParameter("name the sources, and last what is written", param_hint="SOURCE... TARGET")
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
    carry_out(plan, "merging", dry_run=dry_run, as_json=as_json)


def numbers(texts: Iterable[str], option: str) -> dict[str | None, float | list[float]] | None:
    """`W,W` and `SELECTOR=W,W` as a mapping, selector → numbers; None stands for all tensors, and comes first."""
    plain: list[float] = []
    found: dict[str | None, float | list[float]] = {}
    for text in texts:
        selector, equals, given = text.rpartition("=")
        try:
            values = [float(each) for each in given.split(",")]
        except ValueError:
            raise click.BadParameter(
                f"{given!r} is no number, and not several with commas between them", param_hint=option
            ) from None
        if equals:
            found.pop(selector, None)  # what is said again comes last
            found[selector] = values[0] if len(values) == 1 else values
        else:
            plain += values
    if plain:
        found = {None: plain[0] if len(plain) == 1 else plain, **found}
    return found or None
