"""`torchparams audit`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from torchparams.cli import options
from torchparams.cli.app import EXIT_DIFFERENCE, FINE, show
from torchparams.cli.options import argument, command
from torchparams.cli.targets import build, is_live
from torchparams.errors import SelectorError

if TYPE_CHECKING:
    from collections.abc import Iterable


@command
@argument(
    "target",
    metavar="[TARGET]",
    required=False,
    help="A model, or a function that makes one: package.module:callable or path/to/file.py:callable.",
)
@click.option(
    "--select", metavar="RULE,…", multiple=True, help="Run only these rules: ids (M101), prefixes (M), or names."
)
@click.option("--ignore", metavar="RULE,…", multiple=True, help="Skip these rules; the longer id wins over --select.")
@click.option(
    "--suppress", metavar="RULE=SELECTOR", multiple=True, help="Ignore findings of a rule on these parameters."
)
@click.option("--meta", is_flag=True, help="Build on the meta device, without memory; skips rules on values.")
@click.option("--rules", is_flag=True, help="List the selected rules, and exit.")
@options.as_json
def audit(
    target: str | None,
    select: tuple[str, ...],
    ignore: tuple[str, ...],
    suppress: tuple[str, ...],
    meta: bool,
    rules: bool,
    as_json: bool,
) -> int:
    """Find mistakes in the parameters of a model.

    Exits with 1 on any error or warning; notes alone are fine. docs/audit.md describes each rule.

    \b
    Examples:
      torchparams audit mypackage.models:build
      torchparams audit mypackage.models:build --meta
      torchparams audit mypackage.models:build --select M1,M3 --ignore M303
      torchparams audit mypackage.models:build --suppress 'M302=gates.**'
      torchparams audit --rules
      torchparams audit mypackage.models:build --json | jq '.findings[].id'
    """
    from torchparams.lint.audit import audit as audited
    from torchparams.lint.audit import rules_of

    if rules:
        show(rules_of(select or None, ignore), as_json)
        return FINE
    if target is None:
        raise click.BadParameter("TARGET is missing: name the model, as package.module:callable or file.py:callable")
    found = audited(
        build(target, device="meta" if meta else "cpu") if is_live(target) else target,
        select=select or None,
        ignore=ignore,
        suppress=_suppressions(suppress),
    )
    show(found, as_json)
    return EXIT_DIFFERENCE if found.exit_code else FINE


def _suppressions(texts: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        rule, sign, selector = text.partition("=")
        if not sign:
            raise SelectorError(f"{text!r} is not RULE=SELECTOR", exists="an example is M303=head.**")
        found[rule] = f"{found[rule]} | {selector}" if rule in found else selector
    return found
