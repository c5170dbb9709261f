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
    help="What torchparams digest -o wrote; without, what the file's own format can tell is checked.",
)
@options.select
@click.option("--values", is_flag=True, help="Also find NaN, ±Inf and what else stats --check finds.")
@options.as_json
def verify(target: str, manifest: str | None, select: str | None, values: bool, as_json: bool) -> int:
    """Check against a manifest, and what is stored.

    Every tensor that differs, is missing or was not expected is named. Without a manifest, every byte is read and
    compared with what the format stores for that: torch zips have a CRC-32 of each member, other formats nothing.
    Exits with 1 where anything was found.

    \b
    Examples:
      torchparams verify model.safetensors manifest.json
      torchparams verify model.pt manifest.json -s 'encoder.**'
      torchparams verify model.pt                       structure, and every stored CRC-32
      torchparams verify shards/                        index and shards, both ways
      torchparams verify model.pt --values              and no NaN, no ±Inf, nothing odd
      torchparams verify model.safetensors manifest.json --json | jq '.differences[].name'
    """
    from torchparams.measure.verify import verify as verified
    from torchparams.render.progress import progress

    with progress("reading") as tell:
        x = build(target, device="cpu") if is_live(target) else target
        found = verified(x, manifest, select, values=values, progress=tell)
    show(found, as_json)
    return FINE if found.ok else EXIT_DIFFERENCE
