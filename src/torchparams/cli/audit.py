"""`torchparams audit`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from torchparams.cli.app import EXIT_DIFFERENCE, FINE, AsJson, app, show
from torchparams.cli.targets import build, is_live
from torchparams.errors import SelectorError

if TYPE_CHECKING:
    from collections.abc import Iterable


@app.command()
def audit(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET",
            help="What makes the model, or a model: package.module:callable or path/to/file.py:callable.",
            show_default=False,
        ),
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(metavar="RULE,…", help="Ask only these rules: M101, M (all of M…), names.", show_default=False),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="RULE,…", help="Do not ask these; the longer of two ids wins.", show_default=False),
    ] = None,
    suppress: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE=SELECTOR", help="Let a rule say nothing about these parameters.", show_default=False
        ),
    ] = None,
    meta: Annotated[
        bool, typer.Option("--meta", help="Build on the meta device: no memory, and no rules about values.")
    ] = False,
    rules: Annotated[bool, typer.Option("--rules", help="List the rules that would be asked, and stop.")] = False,
    as_json: AsJson = False,
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
        show(rules_of(select, ignore), as_json)
        return FINE
    if target is None:
        raise typer.BadParameter(
            "there is no TARGET; name what makes the model: package.module:callable or file.py:callable"
        )
    found = audited(
        build(target, device="meta" if meta else "cpu") if is_live(target) else target,
        select=select,
        ignore=ignore,
        suppress=_suppressions(suppress or ()),
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
