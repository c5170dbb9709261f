"""`torchparams merge`."""

from __future__ import annotations

from typing import Annotated

import typer

from torchparams.cli.app import AsJson, Select, app, union
from torchparams.cli.plans import (
    AllowOverflow,
    DryRun,
    Force,
    Memory,
    Metadata,
    ShardSize,
    Shared,
    Types,
    carry_out,
    pairs,
    types_of,
)


@app.command()
def merge(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE... TARGET",
            help="Checkpoints of one network; and last, what is written: a file that ends in .safetensors or .pt, or a "
            "directory.",
            show_default=False,
        ),
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            metavar="METHOD",
            help="linear, average, slerp; or, with --base: task_arithmetic, ties, dare, dare_ties.",
        ),
    ] = "linear",
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight",
            "-w",
            metavar="[SELECTOR=]W[,W...]",
            help="A weight for each source: -w 0.3,0.7, or -w 0.3 -w 0.7. One alone is the share of the second of two "
            "(t of slerp); with a base, the weight of each source. With a selector, of what it hits; repeatable, the "
            "last wins.",
            show_default="equal shares; with a base, 1",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", metavar="BASE", help="What the sources were tuned from.", show_default=False),
    ] = None,
    density: Annotated[
        list[str] | None,
        typer.Option(
            "--density",
            "-d",
            metavar="[SELECTOR=]D[,D...]",
            help="For ties and dare, the share of differences from the base that is kept: spelled like weights.",
            show_default="1",
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER", help="With a base, what the sum of differences is multiplied by.", show_default="1"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="For dare, of the random numbers.", show_default="0")
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide the weights of linear by their sum.")] = False,
    select: Select = None,
    dtype: Types = None,
    compute: Annotated[str, typer.Option(metavar="float32|float64", help="What everything is computed in.")] = (
        "float32"
    ),
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=REPLACEMENT",
            help="What names of the other sources become, so that they meet those of the first or of the base; "
            "repeatable, one after the other.",
            show_default=False,
        ),
    ] = None,
    missing: Annotated[
        str,
        typer.Option(
            metavar="refuse|keep|drop",
            help="What becomes of tensors that not every source has; those that are kept are taken as they are.",
        ),
    ] = "refuse",
    allow_overflow: AllowOverflow = False,
    shared: Shared = None,
    max_shard_size: ShardSize = None,
    metadata: Metadata = None,
    memory: Memory = "256MiB",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
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
        raise typer.BadParameter("name the sources, and last what is written", param_hint="SOURCE... TARGET")
    plan = planned(
        sources,
        target,
        union(select),
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


def numbers(texts: list[str] | None, option: str) -> dict[str | None, float | list[float]] | None:
    """`W,W` and `SELECTOR=W,W` as a mapping, selector → numbers; None stands for all tensors, and comes first."""
    plain: list[float] = []
    found: dict[str | None, float | list[float]] = {}
    for text in texts or ():
        selector, equals, given = text.rpartition("=")
        try:
            values = [float(each) for each in given.split(",")]
        except ValueError:
            raise typer.BadParameter(
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
