"""`torchparams verify`."""

from __future__ import annotations

import click

from torchparams.cli import options
from torchparams.cli.app import EXIT_DIFFERENCE, FINE, show
from torchparams.cli.options import argument, command
from torchparams.cli.targets import build, is_live


@command
@options.target
@argument(
    "manifest",
    metavar="[MANIFEST]",
    required=False,
    help="A manifest written by torchparams digest -o; without one, only the file's own checksums are checked.",
)
@options.select
@click.option("--values", is_flag=True, help="Also check values, like stats --check (NaN, ±Inf, …).")
@options.as_json
def verify(target: str, manifest: str | None, select: str | None, values: bool, as_json: bool) -> int:
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
      torchparams verify model.safetensors manifest.json --json | jq '.differences[].name'
    """
    from torchparams.measure.verify import verify as verified
    from torchparams.render.progress import progress

    with progress("reading") as tell:
        x = build(target, device="cpu") if is_live(target) else target
        found = verified(x, manifest, select, values=values, progress=tell)
    show(found, as_json)
    return FINE if found.ok else EXIT_DIFFERENCE
