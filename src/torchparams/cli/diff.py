"""`torchparams diff`."""

from __future__ import annotations

from typing import Annotated

import typer

from torchparams.cli.app import EXIT_DIFFERENCE, AsJson, Output, Raw, Select, app, show, union
from torchparams.cli.targets import source_of


@app.command()
def diff(
    a: Annotated[
        str,
        typer.Argument(metavar="A", help="A checkpoint or a model, named as everywhere.", show_default=False),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="What it is compared with.", show_default=False)],
    select: Select = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=TEXT",
            help="Rename B's parameters before; several go one after the other. auto: what is proposed where names "
            "differ by a prefix.",
            show_default=False,
        ),
    ] = None,
    numeric: Annotated[
        bool, typer.Option("--numeric", help="Compare values, also of two dtypes; else bits decide.")
    ] = False,
    by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT",
            help="Sum up by module, layer or dtype, by the first N components of names, or for each SELECTOR given so.",
            show_default=False,
        ),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Order by name, numel, changed, share, max, relative or cosine; -COLUMN for descending "
            "(--sort=-relative).",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Most rows shown; the middle is left out and counted.", show_default=False
        ),
    ] = None,
    raw: Raw = False,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Compare: which tensors changed, and how much.

    Every element is compared. Exits with 0 if all are the same, with 1 if not, with 2 after an error.

    \b
    Examples:
      torchparams diff base.safetensors tuned.safetensors
      torchparams diff base/ tuned/ --by layer
      torchparams diff base.pt lightning.ckpt#state_dict --rename auto
      torchparams diff a.pt b.pt --rename '^encoder\\.=backbone.' -s 'backbone.**'
      torchparams diff model-fp32.safetensors model-bf16.safetensors --numeric
      torchparams diff a.safetensors b.safetensors --sort=-relative --limit 10
      torchparams diff a.safetensors b.safetensors --json | jq '.tensors[].name'
    """
    from torchparams.measure.diff import diff as difference_of
    from torchparams.render.progress import progress

    mine, yours = (source_of(target, raw=raw) for target in (a, b))
    with progress("comparing") as tell:
        found = difference_of(
            mine,
            yours,
            union(select),
            rename="auto" if rename == ["auto"] else rename or None,
            numeric=numeric,
            by=by or None,
            sort=sort,
            limit=limit,
            progress=tell,
        )
    show(found, as_json, output)
    if not found.same:
        raise typer.Exit(EXIT_DIFFERENCE)
