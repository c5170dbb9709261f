"""The audit: which rules are asked, and what is left of what they find."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from torchparams.errors import SelectorError, UnsupportedSource, nearest
from torchparams.io.filebytes import paused_gc
from torchparams.lint import rules_gradient, rules_memory, rules_model, rules_optimizer
from torchparams.lint.context import Context
from torchparams.lint.findings import SEVERITIES, Audit, Finding, Hit, Rule, Rules
from torchparams.parameters import Parameters

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

RULES: tuple[Rule, ...] = (*rules_model.RULES, *rules_memory.RULES, *rules_optimizer.RULES, *rules_gradient.RULES)
"""Every rule, by family and id."""


def audit(
    model: object,
    optimizer: Any = None,
    *,
    select: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] | None = None,
    suppress: Mapping[str, Any] | None = None,
) -> Audit:
    """Look for what is wrong with a network's parameters, its optimizer's and its gradients. Nothing is modified.

    Rules about an optimizer need one; rules about gradients look where there are any, after a backward pass. Values are
    read once. No code of the network's own runs. Every rule is described, with examples, in `docs/audit.md`.

    Args:
        model: The network.
        optimizer: What steps it: anything with `param_groups`, or a list of those that step it together.
        select: Rules to ask, by id (`M101`), by the beginning of one (`M`, `O1`) or by name; None for all.
        ignore: Rules not to ask. Where a rule is both selected and ignored, what spells more of its id wins.
        suppress: By rule, spelled like `select`, a selector of the parameters that it says nothing about:
            `{"M303": "head.**"}`. A finding's names may be others than the network's: `param_groups.1.lr_scale`.

    Raises:
        UnsupportedSource: `model` is no live network, or `optimizer` has no `param_groups`.
        SelectorError: No rule is spelled so.
        NoMatch: A selector of `suppress` hits nothing that the network has, nor anything that was found.

    >>> from torch import nn
    >>> import torchparams as tp
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layers = [nn.Linear(2, 2)]
    >>> print(tp.audit(Net()))
    Net
    error M101 hidden-parameter: parameters(), state_dict(), to() and train() pass over it, so it is never trained, \
saved or moved
      layers is a list that holds 2 trainable parameters of 1 module
        layers.0: weight, bias
        fix: self.layers = nn.ModuleList(self.layers)
    1 error · 0 parameter tensors · 18 of 31 rules
    not run: O101 to O110 (no optimizer was given), G101 to G103 (there are no gradients before backward())
    """
    rules = rules_of(select, ignore)
    context = Context(
        network_of(model, "audited", "torchparams.stats looks at the values of a checkpoint"), optimizers_of(optimizer)
    )
    from torch._C import DisableTorchFunctionSubclass

    # A subclass of tensors may answer even a question for its shape with code of its own.
    with DisableTorchFunctionSubclass(), paused_gc():
        hits = [(rule, hit) for rule in rules for hit in rule.check(context)]
    kept, suppressed = _suppress(context, hits, suppress or {})
    findings = [rule.finding(hit) for rule, hit in kept]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))  # stable: else the order of the rules
    return Audit(
        context.source.label,
        tuple(findings),
        tuple(rule.id for rule in rules),
        len(context.parameters),
        suppressed,
        tuple(context.unread),
        context.source.left_out,
        _not_run(rules, context),
    )


def _not_run(rules: Rules, context: Context) -> dict[str, tuple[str, ...]]:
    """Why rules had nothing to look at → their ids."""
    without = {
        "O": "" if context.optimizers else "no optimizer was given",
        "G": "" if context.gradients else "there are no gradients before backward()",
    }
    found: dict[str, tuple[str, ...]] = {}
    for rule in rules:
        reason = without.get(rule.id[0])
        if reason:
            found[reason] = (*found.get(reason, ()), rule.id)
    return found


def network_of(model: Any, done: str, hint: str) -> nn.Module:
    """The live network itself.

    Args:
        model: An `nn.Module`, or a `Parameters` of all of one.
        done: What an error says cannot be done: `audited`.
        hint: What it says to do with something else.

    Raises:
        UnsupportedSource: `model` is something else.
    """
    if isinstance(model, Parameters) and model.selector is None:
        model = getattr(model.source, "module", model)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        return model  # type: ignore[no-any-return]  # it was just looked at
    path = isinstance(model, str | os.PathLike)
    raise UnsupportedSource(
        f"a checkpoint cannot be {done}" if path else f"a {type(model).__name__} cannot be {done}",
        where=os.fspath(model) if path else None,
        exists="an audit looks at a live nn.Module" if done == "audited" else "this takes a live nn.Module",
        hint=hint,
    )


def optimizers_of(optimizer: Any) -> tuple[Any, ...]:
    """The optimizers, none for None.

    Raises:
        UnsupportedSource: One has no `param_groups`.
    """
    if optimizer is None:
        return ()
    listed = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
    for each in listed:
        if not isinstance(getattr(each, "param_groups", None), list | tuple):
            raise UnsupportedSource(
                f"a {type(each).__name__} is no optimizer",
                exists="an optimizer has param_groups",
                hint="pass the optimizer, or a list of those that step the network together",
            )
    return listed


# --- which rules ----------------------------------------------------------------------------


def rules_of(select: str | Iterable[str] | None = None, ignore: str | Iterable[str] | None = None) -> Rules:
    """The rules that `select` and `ignore` leave, in order; they print as a table.

    Raises:
        SelectorError: No rule is spelled so.

    >>> [rule.id for rule in rules_of("M1", ["M10", "M11"])]
    []
    >>> [rule.id for rule in rules_of("M101, hidden-leaf")]
    ['M101', 'M103']
    """
    selected = {rule.id: 0 for rule in RULES} if select is None else _spelled(select)
    ignored = {} if ignore is None else _spelled(ignore)
    return Rules(rule for rule in RULES if selected.get(rule.id, -1) > ignored.get(rule.id, -1))


def _spelled(texts: str | Iterable[str]) -> dict[str, int]:
    """Rule → how much of its id is spelled, at most."""
    found: dict[str, int] = {}
    for text in [texts] if isinstance(texts, str) else texts:
        for part in text.split(","):
            for rule, count in rules_spelled(part.strip()):
                found[rule.id] = max(count, found.get(rule.id, 0))
    return found


def rules_spelled(text: str) -> list[tuple[Rule, int]]:
    """The rules whose id begins with `text`, or the one whose name it is; and how much of the id that spells.

    Raises:
        SelectorError: There are none.
    """
    found = [(rule, len(text)) for rule in RULES if text and rule.id.startswith(text.upper())]
    found = found or [(rule, len(rule.id)) for rule in RULES if rule.name == text]
    if not found:
        near = nearest(text, [*(rule.id for rule in RULES), *(rule.name for rule in RULES)], 1)
        raise SelectorError(
            f"no rule is called {text!r}",
            exists=f"did you mean {near[0]!r}?" if near else "ids begin with M, O or G, as in M101",
        )
    return found


# --- suppression ----------------------------------------------------------------------------


def _suppress(
    context: Context, hits: list[tuple[Rule, Hit]], suppress: Mapping[str, Any]
) -> tuple[list[tuple[Rule, Hit]], int]:
    """The hits without the names that are suppressed, and how many hits had no others."""
    if not suppress:
        return hits, 0
    from torchparams.selectors import Selector

    infos = list(context.infos.values())
    known = {info.name for info in infos}
    strange = dict.fromkeys(name for _, hit in hits for name in hit.names if name not in known)
    infos += [_stand_in(name) for name in strange]
    silent: dict[str, set[str]] = {}
    for text, selector in suppress.items():
        hushed = Selector.of(selector).names(infos, strict=True, where=context.source.label)
        for rule, _ in rules_spelled(text.strip()):
            silent.setdefault(rule.id, set()).update(hushed)
    kept: list[tuple[Rule, Hit]] = []
    for rule, hit in hits:
        names = tuple(name for name in hit.names if name not in silent.get(rule.id, ()))
        if names == hit.names:
            kept.append((rule, hit))
        elif names:
            kept.append((rule, Hit(names, hit.what, hit.fix, hit.where)))
    return kept, len(hits) - len(kept)


def _stand_in(name: str) -> Any:
    """A record of something that is not in the network's table: only its name can be selected."""
    from torchparams.dtypes import DType
    from torchparams.info import ParameterInfo

    return ParameterInfo(name, None, DType.of("F32"), 0, 0, "cpu", "parameter", True)


__all__ = ["RULES", "Audit", "Finding", "audit", "rules_of"]
