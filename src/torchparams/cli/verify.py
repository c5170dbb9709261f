"""`torchparams verify`."""

from __future__ import annotations

import click

from torchparams.cli import options
from torchparams.cli.app import EXIT_DIFFERENCE, FINE, show, status_of
from torchparams.cli.complete import files
from torchparams.cli.options import command
from torchparams.cli.targets import source_of


@command
@options.targets
@click.option(
    "--manifest",
    metavar="FILE",
    shell_complete=files,
    help="A manifest written by torchparams digest -o, which may also stand after the target. Without one, only the "
    "file's own checksums are checked.",
)
@options.select
@click.option("--values", is_flag=True, help="Also check values, like stats --check (NaN, ±Inf, …).")
@click.option("--max-size", metavar="SIZE", help="Fail on a checkpoint of more bytes: 500M, 5GB, 2GiB.")
@options.engine
@options.as_json
def verify(
    targets: tuple[str, ...],
    manifest: str | None,
    select: str | None,
    values: bool,
    max_size: str | None,
    engine: str | None,
    as_json: bool,
) -> int:
    """Verify against a manifest, and stored checksums.

    Names every tensor that differs, is missing or is unexpected. Without a manifest, every byte is read and compared
    with the checksums of the format: torch zips have a CRC-32 of each member, other formats have none. Exits with 1 on
    any finding.

    \b
    Examples:
      torchparams verify model.safetensors manifest.json
      torchparams verify model.pt manifest.json -s 'encoder.**'
      torchparams verify model.pt                       structure, and every stored CRC-32
      torchparams verify shards/                        consistency of index and shards
      torchparams verify model.pt --values              values, too
      torchparams verify model.pt --max-size 500MB      size of the files, too
      torchparams verify 'run/step-*'                   a line each, one exit status
      torchparams verify model.safetensors manifest.json --json | jq '.differences[].name'
    """
    from torchparams.edit.plan.layout import parse_bytes
    from torchparams.io.patterns import expanded
    from torchparams.measure import several
    from torchparams.measure.manifest import is_manifest
    from torchparams.measure.verify import verify as verified
    from torchparams.render.progress import progress

    if manifest is None and len(targets) > 1 and is_manifest(targets[-1]):
        *targets, manifest = targets  # type: ignore[assignment]  # as a list
    names = expanded(targets)
    most = None if max_size is None else parse_bytes(max_size)
    with progress("reading") as tell:
        if len(names) > 1:
            found = several.several(
                names,
                several.VERIFIED,
                lambda name: several.verified(
                    verified(
                        source_of(name), manifest, select, values=values, max_nbytes=most, engine=engine, progress=tell
                    )
                ),
            )
        else:
            one = verified(
                source_of(names[0]), manifest, select, values=values, max_nbytes=most, engine=engine, progress=tell
            )
    if len(names) > 1:
        show(found, as_json)
        return status_of(found)
    show(one, as_json)
    return FINE if one.ok else EXIT_DIFFERENCE
