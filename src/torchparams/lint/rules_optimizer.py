"""Rules about a network and its optimizers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from torchparams._selector.candidates import is_bias
from torchparams.errors import nearest
from torchparams.lint.findings import AuditRule, Hit
from torchparams.names import common
from torchparams.render.tree import listed, plural

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchparams.lint.context import Context, Group, Member


NAMED = 4
"""Maximum number of names listed in a fix."""


def _selecting(context: Context, chosen: list[Member]) -> str:
    """Code for a selector of exactly these parameters."""
    if len(chosen) == 1:
        return repr(chosen[0].name)
    path = common(entry.path for entry in chosen)
    inside = sum(entry.name.startswith(f"{path}.") for entry in context.parameters) if path else len(context.parameters)
    if inside == len(chosen):
        return repr(f"{path}.**" if path else "**")
    return repr([entry.name for entry in chosen]) if len(chosen) <= NAMED else "finding.names"


# --- which parameters -----------------------------------------------------------------------


def _left_out(context: Context) -> Iterator[Hit]:
    if not context.groups:
        return
    held = context.held
    left = [entry for entry in context.parameters if entry.tensor.requires_grad and id(entry.tensor) not in held]
    if left:
        names = tuple(entry.name for entry in left)
        path = common(entry.path for entry in left)
        what = f"{plural(len(left), 'trainable parameter is', 'trainable parameters are')} in no group of the optimizer"
        fix = f"tp.freeze(model, {_selecting(context, left)})  # or optimizer.add_param_group(…)"
        yield Hit(names, what, fix, path)


def _stale(context: Context) -> Iterator[Hit]:
    known = context.by_id.keys()
    if context.held <= known:
        return
    stale = {
        id(tensor): (group.name(place), tensor)
        for group in context.groups
        for place, tensor in enumerate(group.tensors)
        if id(tensor) not in known
    }
    missing: dict[Any, str] = {}
    for entry in context.parameters:
        if id(entry.tensor) not in context.held and not _is_lazy(entry.tensor):
            missing.setdefault(entry.tensor.shape, entry.name)
    replaced = [missing[t.shape] for _, t in stale.values() if not _is_lazy(t) and t.shape in missing]
    what = f"the optimizer holds {plural(len(stale), 'tensor')} that the network lacks"
    if any(info.sharding is not None for info in context.infos.values()) and replaced:
        what += ": parameters from before it was sharded"
        yield Hit(
            tuple(name for name, _ in stale.values()),
            what,
            "optimizer = Optimizer(model.parameters())  # made after fully_shard or FullyShardedDataParallel",
        )
        return
    if replaced:
        what += f"; {replaced[0]}, with the shape of one of them, is in no group"
    names = tuple(name for name, _ in stale.values())
    yield Hit(names, what, "optimizer = Optimizer(model.parameters())  # made after the last layer is replaced")


def _is_lazy(tensor: Any) -> bool:
    from torch.nn.parameter import is_lazy

    return bool(is_lazy(tensor))


def _twice(context: Context) -> Iterator[Hit]:
    if sum(len(group.tensors) for group in context.groups) == len(context.held):
        return
    counts = Counter(id(tensor) for group in context.groups for tensor in group.tensors)
    places: dict[str, list[str]] = {}
    for group in context.groups:
        for place, tensor in enumerate(group.tensors):
            if counts[id(tensor)] > 1:
                places.setdefault(context.name_in(group, place), []).append(group.place)
    name, groups = next(iter(places.items()))
    where = ", ".join(dict.fromkeys(groups))
    what = f"{plural(len(places), 'tensor is', 'tensors are')} in the optimizer several times ({name}: {where})"
    yield Hit(tuple(places), what, "optimizer = Optimizer(tp.groups(model, …))  # each parameter in one group")


def _frozen_gradients(context: Context) -> Iterator[Hit]:
    moving = [e for e, _ in context.gradients if not e.tensor.requires_grad and id(e.tensor) in context.held]
    if moving:
        names = tuple(entry.name for entry in moving)
        what = f"the optimizer holds {plural(len(moving), 'frozen parameter')} with a gradient"
        path = common(entry.path for entry in moving)
        yield Hit(names, what, f"tp.freeze(model, {_selecting(context, moving)})  # clears .grad too", path)


def _all_frozen(context: Context) -> Iterator[Hit]:
    for optimizer in context.optimizers:
        tensors = [(g, n, t) for g in context.groups if g.optimizer is optimizer for n, t in enumerate(g.tensors)]
        if tensors and not any(tensor.requires_grad for _, _, tensor in tensors):
            names = tuple(context.name_in(group, place) for group, place, _ in tensors)
            what = f"all {plural(len(names), 'tensor')} that the {type(optimizer).__name__} holds are frozen"
            yield Hit(names, what, "tp.unfreeze(model, …)  # or leave the optimizer out")


# --- options --------------------------------------------------------------------------------


def _decayed(context: Context) -> Iterator[Hit]:
    decaying: set[int] = set()
    for group in context.groups:
        decay = group.options.get("weight_decay")
        if isinstance(decay, int | float) and decay != 0:
            decaying.update(map(id, group.tensors))
    decayed = [
        entry
        for entry in (context.parameters if decaying else ())
        if (("bias" in entry.name and is_bias(entry.name)) or context.is_norm(entry.owner))
        and entry.tensor.requires_grad
        and id(entry.tensor) in decaying
    ]
    if decayed:
        names = tuple(entry.name for entry in decayed)
        what = f"weight decay applies to {plural(len(decayed), 'parameter')} of norms and biases"
        fix = "optimizer = Optimizer(tp.groups(model, tp.rule(':norm | :bias', weight_decay=0.0), weight_decay=…))"
        yield Hit(names, what, fix, common(entry.path for entry in decayed))


def _zero_rate(context: Context) -> Iterator[Hit]:
    still = [group for group in context.groups if _is_zero(group.options.get("lr")) and group.tensors]
    # A schedule that warms up begins at zero, and notes where it goes.
    still = [group for group in still if not group.options.get("initial_lr") and not group.options.get("max_lr")]
    if still:
        names = tuple(context.name_in(group, place) for group in still for place in range(len(group.tensors)))
        what = f"the lr of {listed([group.place for group in still])} is 0"
        yield Hit(names, what, f"{'optimizer.' if len(context.optimizers) == 1 else ''}{_code(still[0])}['lr'] = …")


def _code(group: Group) -> str:
    head, _, place = group.place.rpartition(".")
    return f"{head}[{place}]"


def _is_zero(rate: Any) -> bool:
    if isinstance(rate, bool):
        return False
    if isinstance(rate, int | float):
        return rate == 0
    return hasattr(rate, "item") and rate.numel() == 1 and not rate.is_meta and rate.item() == 0


KNOWN = frozenset(
    # Keys of groups, and of torch's schedulers.
    {"params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "initial_momentum"}
    # Options of some torch versions only, which state dicts carry to other versions.
    | {"swa_lr", "foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay"}
)
"""Keys of a group that torch sets for every optimizer."""


def _ignored(context: Context) -> Iterator[Hit]:
    seen: dict[tuple[int, str], list[Group]] = {}
    for group in context.groups:
        defaults = _defaults(group.optimizer)
        torchs = type(group.optimizer).__module__.startswith("torch.optim.")
        for key, value in group.options.items():
            # Labels are not options. An optimizer outside torch may read keys without a default, so only misspelt
            # defaults count there.
            if not isinstance(key, str) or isinstance(value, str) or key in KNOWN or key in defaults:
                continue
            if defaults and (torchs or nearest(key, list(defaults), 1)):
                seen.setdefault((id(group.optimizer), key), []).append(group)
    for (_, key), groups in seen.items():
        optimizer = groups[0].optimizer
        what = f"{type(optimizer).__name__} does not read the option {key!r} of {plural(len(groups), 'group')}"
        near = nearest(key, sorted(_defaults(optimizer)), 1)
        if key == "lr_scale":
            fix = "group['lr'] = lr * group.pop('lr_scale')"
        elif near:
            fix = f"group[{near[0]!r}] = group.pop({key!r})"
        else:
            fix = f"del group[{key!r}]"
        yield Hit(tuple(f"{group.place}.{key}" for group in groups), what, fix)


def _defaults(optimizer: Any) -> dict[str, Any]:
    defaults = getattr(optimizer, "defaults", None)
    return defaults if isinstance(defaults, dict) else {}


GROUPS = 32
"""Maximum number of groups without a finding: layer-wise learning rates make a group for each layer."""


def _many_groups(context: Context) -> Iterator[Hit]:
    for optimizer in context.optimizers:
        groups = [group for group in context.groups if group.optimizer is optimizer]
        if len(groups) <= GROUPS:
            continue
        kinds = Counter(_options(group) for group in groups)
        # One group for each set of options is fine.
        if len(groups) > 4 * len(kinds):
            what = f"{len(groups):,} groups have only {plural(len(kinds), 'different set')} of options"
            fix = "optimizer = Optimizer(tp.groups(model, …))  # one group for each set of options"
            yield Hit(tuple(group.place for group in groups), what, fix)


def _options(group: Group) -> tuple[tuple[str, str], ...]:
    kept = ((key, value) for key, value in group.options.items() if key not in ("params", "param_names"))
    return tuple(
        sorted((str(key), repr(value) if isinstance(value, int | float | str | tuple) else "") for key, value in kept)
    )


# --- state ----------------------------------------------------------------------------------


def _stale_state(context: Context) -> Iterator[Hit]:
    import torch

    held = context.held
    names: list[str] = []
    for which, optimizer in enumerate(context.optimizers):
        state = getattr(optimizer, "state", None)
        if not isinstance(state, dict):
            continue
        before = f"optimizers.{which}." if len(context.optimizers) > 1 else ""
        for place, key in enumerate(state):
            if isinstance(key, torch.Tensor) and not any(id(tensor) in held for tensor in context.meant(key)):
                entry = context.by_id.get(id(key))
                names.append(f"{before}state.{place}" if entry is None else entry.name)
    if names:
        what = f"the optimizer keeps state for {plural(len(names), 'tensor')} outside its groups"
        fix = (
            "held = {id(p) for group in optimizer.param_groups for p in group['params']}\n"
            "for p in [p for p in optimizer.state if id(p) not in held]:\n"
            "    del optimizer.state[p]"
        )
        yield Hit(tuple(names), what, fix)


# --- the rules ------------------------------------------------------------------------------

_MODEL = "model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))\n"
_PLAIN = _MODEL + "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"

RULES = (
    AuditRule(
        "O101",
        "not-optimized",
        "warning",
        "A trainable parameter in no group of the optimizer",
        "autograd computes its gradient at every step, but it never changes",
        _left_out,
        _MODEL + "optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)\n",
        _MODEL + "model[0].requires_grad_(False)\noptimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)\n",
        "Pass several optimizers of one network as a list: `tp.audit(model, [muon, adamw])`.",
    ),
    AuditRule(
        "O102",
        "stale-parameter",
        "warning",
        "A tensor in the optimizer that is not in the network",
        "the optimizer steps a tensor that the network no longer uses, and its replacement is not trained",
        _stale,
        _PLAIN + "model[1] = nn.Linear(8, 2)\noptimizer.add_param_group({'params': model[1].parameters()})\n",
        _MODEL + "model[1] = nn.Linear(8, 2)\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n",
        "The rule also finds parameters of a loss in the same optimizer: audit a module that holds both, or suppress "
        "them by name.",
    ),
    AuditRule(
        "O103",
        "duplicate-parameter",
        "error",
        "A tensor that is in the optimizer several times",
        "each occurrence steps it, which multiplies the learning rate and the decay",
        _twice,
        _MODEL + "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "optimizer.param_groups[0]['params'].append(model[0].weight)\n",
        _PLAIN,
    ),
    AuditRule(
        "O104",
        "frozen-with-gradient",
        "warning",
        "A frozen parameter in the optimizer with a left-over gradient",
        "the optimizer reads .grad, not requires_grad: the next step changes it",
        _frozen_gradients,
        _PLAIN + "model(torch.ones(1, 4)).sum().backward()\nmodel[0].requires_grad_(False)\n",
        _PLAIN + "model(torch.ones(1, 4)).sum().backward()\n"
        "model[0].requires_grad_(False)\nmodel[0].weight.grad = model[0].bias.grad = None\n",
        "`tp.freeze` clears the gradients of the parameters it freezes.",
    ),
    AuditRule(
        "O105",
        "decayed-norm-or-bias",
        "note",
        "Weight decay on norms and biases",
        "decay is for matrices; on a norm's scale it pulls the layer's output to zero without a benefit",
        _decayed,
        _MODEL + "optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)\n",
        _MODEL + "optimizer = torch.optim.AdamW(\n"
        "    [\n"
        "        {'params': [p for p in model.parameters() if p.ndim >= 2], 'weight_decay': 0.01},\n"
        "        {'params': [p for p in model.parameters() if p.ndim < 2], 'weight_decay': 0.0},\n"
        "    ]\n"
        ")\n",
        "Norms are identified by the class of their layer, not by their name.",
    ),
    AuditRule(
        "O106",
        "ignored-option",
        "warning",
        "An option of a group that the optimizer does not read",
        "torch accepts any key in a group but reads only known ones, so the option has no effect",
        _ignored,
        _MODEL + "optimizer = torch.optim.SGD([{'params': model.parameters(), 'lr_scale': 0.1}], lr=0.1)\n",
        _MODEL + "optimizer = torch.optim.SGD([{'params': model.parameters(), 'lr': 0.01}], lr=0.1)\n",
        "Text values are labels and are not checked, nor are keys of torch's schedulers. An optimizer outside torch "
        "may read keys without a default, so only misspelt defaults are found there. Only timm's schedulers apply "
        "`lr_scale`: suppress the rule if you use one of them.",
    ),
    AuditRule(
        "O107",
        "many-groups",
        "note",
        "Many more groups than different sets of options",
        "torch steps all tensors of a group together, and the groups one after the other, which is slower",
        _many_groups,
        "model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)])\n"
        "optimizer = torch.optim.SGD([{'params': [p]} for p in model.parameters()], lr=0.1)\n",
        "model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)])\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n",
    ),
    AuditRule(
        "O108",
        "stale-state",
        "warning",
        "State of the optimizer for a tensor outside its groups",
        "it uses memory, and optimizer.state_dict() fails with a KeyError",
        _stale_state,
        _MODEL + "optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)\n"
        "model(torch.ones(1, 4)).sum().backward()\noptimizer.step()\noptimizer.zero_grad()\n"
        "model[1].requires_grad_(False)\noptimizer.param_groups[0]['params'] = list(model[0].parameters())\n",
        _MODEL + "optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)\n"
        "model(torch.ones(1, 4)).sum().backward()\noptimizer.step()\noptimizer.zero_grad()\n",
    ),
    AuditRule(
        "O109",
        "all-frozen",
        "warning",
        "An optimizer whose tensors are all frozen",
        "its tensors get no gradients, so step() changes nothing",
        _all_frozen,
        _PLAIN + "model.requires_grad_(False)\n",
        _PLAIN + "model[0].requires_grad_(False)\n",
        "Freeze first, then make the optimizer of the trainable parameters: `tp.groups(model)` leaves frozen "
        "parameters out.",
    ),
    AuditRule(
        "O110",
        "zero-learning-rate",
        "warning",
        "A group whose learning rate is zero",
        "step() does not change its parameters",
        _zero_rate,
        _MODEL + "optimizer = torch.optim.SGD(model.parameters(), lr=0.0)\n",
        _MODEL + "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 100))\n",
        "A scheduler that warms up from zero is not a finding: it stores its target rate in the group.",
    ),
)
