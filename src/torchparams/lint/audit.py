"""The audit: select rules, run them, and suppress findings."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from torchparams.errors import SelectorError, UnsupportedSource, nearest
from torchparams.io.filebytes import paused_gc
from torchparams.lint import rules_gradient, rules_memory, rules_model, rules_optimizer, rules_ranks
from torchparams.lint.context import Context
from torchparams.lint.findings import SEVERITIES, Audit, AuditRule, Finding, Hit, Rules
from torchparams.parameters import Parameters

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

RULES: tuple[AuditRule, ...] = (
    *(*rules_model.RULES, *rules_memory.RULES, *rules_optimizer.RULES, *rules_gradient.RULES),
    *rules_ranks.RULES,
)
"""All rules, by family and id."""


def audit(
    model: object,
    optimizer: Any = None,
    *,
    select: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] | None = None,
    suppress: Mapping[str, Any] | None = None,
    ranks: bool | None = None,
) -> Audit:
    """Find mistakes in a network's parameters, optimizers and gradients. Nothing is modified.

    Optimizer rules need an optimizer; gradient rules need gradients, from a backward pass. Values are read once. The
    network's own code does not run. `docs/audit.md` describes every rule, with examples.

    A model that several ranks share (`DistributedDataParallel`, DTensors, FSDP) is audited on all of them: they meet,
    and gather once (two collectives of torch), so that values are those of whole parameters, and every rank gets the
    same findings about them. The rule about scales (M305) reads such a model once more.

    Args:
        model: The network.
        optimizer: The optimizer (any object with `param_groups`), or a list of optimizers used together.
        select: Rules to run, by id (`M101`), prefix of an id (`M`, `O1`) or name; None for all.
        ignore: Rules to skip. If a rule is both selected and ignored, the longer prefix wins.
        suppress: AuditRule, spelled as in `select` → selector of parameters to exclude from its findings, such as
            `{"M303": "head.**"}`. It also matches other names in findings, such as `param_groups.1.lr_scale`.
        ranks: False to audit on this rank alone: nothing is communicated, and sharded values are not read.

    Raises:
        UnsupportedSource: `model` is not a live network, or `optimizer` has no `param_groups`.
        SelectorError: A rule does not exist.
        RanksError: A rank that shares the model does not make the call.
        NoMatch: A selector of `suppress` matches neither a parameter nor a name in a finding.

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
    1 error · 0 parameter tensors · 21 of 34 rules
    not run: O101 to O110 (no optimizer was given), G101 to G103 (no gradients before backward())
    """
    rules = rules_of(select, ignore)
    context = Context(
        network_of(model, "audited", "torchparams.stats looks at the values of a checkpoint"),
        optimizers_of(optimizer),
        together=ranks,
    )
    from torch._C import DisableTorchFunctionSubclass

    # Tensor subclasses may run their own code even for `shape`.
    with DisableTorchFunctionSubclass(), paused_gc():
        _ = context.across  # before any rule: all ranks exchange the same
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
    """Reason → ids of the rules that could not run."""
    without = {
        "O": "" if context.optimizers else "no optimizer was given",
        "G": "" if context.gradients else "no gradients before backward()",
        "D": "ranks=False asks no other rank" if context.ranks and context.across is None else "",
    }
    found: dict[str, tuple[str, ...]] = {}
    for rule in rules:
        reason = without.get(rule.id[0])
        if reason:
            found[reason] = (*found.get(reason, ()), rule.id)
    return found


def network_of(model: Any, done: str, hint: str) -> nn.Module:
    """Check for a live network and return it.

    Args:
        model: An `nn.Module`, or a `Parameters` of all of one.
        done: Participle for errors, such as `audited`.
        hint: Hint for errors about other objects.

    Raises:
        UnsupportedSource: `model` is something else.
    """
    if isinstance(model, Parameters) and model.selector is None:
        model = getattr(model.source, "module", model)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        return model  # type: ignore[no-any-return]  # checked above
    path = isinstance(model, str | os.PathLike)
    raise UnsupportedSource(
        f"a checkpoint cannot be {done}" if path else f"a {type(model).__name__} cannot be {done}",
        where=os.fspath(model) if path else None,
        exists="an audit needs a live nn.Module" if done == "audited" else "a live nn.Module is needed",
        hint=hint,
    )


def optimizers_of(optimizer: Any) -> tuple[Any, ...]:
    """The optimizers as a tuple; empty for None.

    Raises:
        UnsupportedSource: An object has no `param_groups`.
    """
    if optimizer is None:
        return ()
    listed = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
    for each in listed:
        if not isinstance(getattr(each, "param_groups", None), list | tuple):
            raise UnsupportedSource(
                f"a {type(each).__name__} is not an optimizer",
                exists="an optimizer has param_groups",
                hint="pass the optimizer, or a list of optimizers used together",
            )
    return listed


# --- which rules ----------------------------------------------------------------------------


def rules_of(select: str | Iterable[str] | None = None, ignore: str | Iterable[str] | None = None) -> Rules:
    """Rules chosen by `select` and `ignore`, in order; they print as a table.

    Raises:
        SelectorError: A rule does not exist.

    >>> [rule.id for rule in rules_of("M1", ["M10", "M11"])]
    []
    >>> [rule.id for rule in rules_of("M101, hidden-leaf")]
    ['M101', 'M103']
    """
    selected = {rule.id: 0 for rule in RULES} if select is None else _spelled(select)
    ignored = {} if ignore is None else _spelled(ignore)
    return Rules(rule for rule in RULES if selected.get(rule.id, -1) > ignored.get(rule.id, -1))


def _spelled(texts: str | Iterable[str]) -> dict[str, int]:
    """Rule → length of the longest given prefix of its id."""
    found: dict[str, int] = {}
    for text in [texts] if isinstance(texts, str) else texts:
        for part in text.split(","):
            for rule, count in rules_spelled(part.strip()):
                found[rule.id] = max(count, found.get(rule.id, 0))
    return found


def rules_spelled(text: str) -> list[tuple[AuditRule, int]]:
    """Rules whose id begins with `text` or whose name is `text`, each with the length of the matched prefix.

    Raises:
        SelectorError: No rule matches.
    """
    found = [(rule, len(text)) for rule in RULES if text and rule.id.startswith(text.upper())]
    found = found or [(rule, len(rule.id)) for rule in RULES if rule.name == text]
    if not found:
        near = nearest(text, [*(rule.id for rule in RULES), *(rule.name for rule in RULES)], 1)
        raise SelectorError(
            f"no rule is called {text!r}",
            exists=f"did you mean {near[0]!r}?" if near else "ids begin with M, O, G or D, as in M101",
        )
    return found


# --- suppression ----------------------------------------------------------------------------


def _suppress(
    context: Context, hits: list[tuple[AuditRule, Hit]], suppress: Mapping[str, Any]
) -> tuple[list[tuple[AuditRule, Hit]], int]:
    """Hits without suppressed names, and the number of hits that were suppressed entirely."""
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
    kept: list[tuple[AuditRule, Hit]] = []
    for rule, hit in hits:
        names = tuple(name for name in hit.names if name not in silent.get(rule.id, ()))
        if names == hit.names:
            kept.append((rule, hit))
        elif names:
            kept.append((rule, Hit(names, hit.what, hit.fix, hit.where)))
    return kept, len(hits) - len(kept)


def _stand_in(name: str) -> Any:
    """Info of a name outside the network's table; only its name can be selected."""
    from torchparams.dtypes import DType
    from torchparams.info import ParameterInfo

    return ParameterInfo(name, None, DType.of("F32"), 0, 0, "cpu", "parameter", True)


__all__ = ["RULES", "Audit", "Finding", "audit", "rules_of"]
