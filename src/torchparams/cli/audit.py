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
    help="What makes the model, or a model: package.module:callable or path/to/file.py:callable.",
)
@click.option("--select", metavar="RULE,…", multiple=True, help="Ask only these rules: M101, M (all of M…), names.")
@click.option("--ignore", metavar="RULE,…", multiple=True, help="Do not ask these; the longer of two ids wins.")
@click.option(
    "--suppress", metavar="RULE=SELECTOR", multiple=True, help="Let a rule say nothing about these parameters."
)
@click.option("--meta", is_flag=True, help="Build on the meta device: no memory, and no rules about values.")
@click.option("--rules", is_flag=True, help="List the rules that would be asked, and stop.")
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
    """Find what is wrong with a model's parameters.

    The exit status is 1 where there is an error or a warning; notes alone are fine. docs/audit.md describes each rule.

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
        raise click.BadParameter(
            "there is no TARGET; name what makes the model: package.module:callable or file.py:callable"
        )
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
            raise SelectorError(f"{text!r} is no suppression", exists="one is a rule and a selector: M303=head.**")
        found[rule] = f"{found[rule]} | {selector}" if rule in found else selector
    return found
