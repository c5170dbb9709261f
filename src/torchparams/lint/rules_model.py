"""Rules about the parameters of a network: hidden, moving, without values, of mixed dtypes or devices."""

from __future__ import annotations

from collections import Counter
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torchparams.lint.findings import AuditRule, Hit
from torchparams.names import common
from torchparams.render.tree import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch
    from torch import nn

    from torchparams.lint.context import Context, Member


def at(path: str) -> str:
    """Python expression, starting with `model`, for the module or parameter at `path`.

    >>> at("layers.0.weight")
    'model.layers[0].weight'
    """
    return "model" + "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in path.split(".") if path)


# --- hidden ---------------------------------------------------------------------------------


def _hidden(context: Context) -> Iterator[Hit]:
    for found in context.hidden:
        if not found.trainable:
            continue
        count = plural(len(found.trainable), "trainable parameter")
        held = f"of {plural(found.modules, 'module')}" if found.modules else ""
        what = f"{found.name} is a {found.container} that holds {count} {held}".rstrip()
        yield Hit(tuple(found.trainable), what, found.cure, found.owner)


def _hidden_state(context: Context) -> Iterator[Hit]:
    for found in context.hidden:
        if found.trainable or not (found.frozen or found.switched):
            continue
        names = (*found.frozen, *found.switched)
        held = (
            f"holds {plural(len(found.frozen), 'frozen parameter or buffer', 'frozen parameters and buffers')}"
            if found.frozen
            else f"holds {plural(len(found.switched), 'dropout layer')}"
        )
        yield Hit(names, f"{found.name} is a {found.container} that {held}", found.cure, found.owner)


def _leaves(context: Context) -> Iterator[Hit]:
    for found in context.hidden:
        if not found.leaves:
            continue
        many = plural(len(found.leaves), "tensor")
        held = (
            "is a tensor with requires_grad" if found.container == "attribute" else f"holds {many} with requires_grad"
        )
        fix = (
            f"self.{found.attribute} = nn.Parameter(self.{found.attribute}.detach())"
            if found.container == "attribute"
            else f"self.{found.attribute} = nn.ParameterList(map(nn.Parameter, …))"
        )
        yield Hit(tuple(found.leaves), f"{found.name} {held}, not an nn.Parameter", fix, found.owner)


# --- frozen norms ---------------------------------------------------------------------------


def _moving_norms(context: Context) -> Iterator[Hit]:
    from torch.nn.modules.batchnorm import _NormBase

    hits: dict[str, list[str]] = {}
    for buffer in context.buffers:
        path, module = buffer.path, buffer.owner
        if path in hits or not isinstance(module, _NormBase) or not _moves(module):
            continue
        affine = [tensor for tensor in module._parameters.values() if tensor is not None]
        if affine and not any(tensor.requires_grad for tensor in affine):
            moving = [key for key in ("running_mean", "running_var") if module._buffers.get(key) is not None]
            hits[path] = [f"{path}.{key}" if path else key for key in moving]
    if hits:
        one = next(iter(hits))
        what = (
            f"{one or 'the network'} is frozen, but still updates its running statistics"
            if len(hits) == 1
            else f"{len(hits):,} normalisation layers are frozen, but still update their running statistics"
        )
        fix = f"tp.freeze(model, {_below(hits)!r})"
        yield Hit(tuple(name for names in hits.values() for name in names), what, fix, common(hits))


def _moves(module: nn.Module) -> bool:
    # Read the flags that forward reads. A momentum of 0 keeps the statistics.
    stored = vars(module)
    tracks = bool(stored.get("track_running_stats")) and module._buffers.get("running_mean") is not None
    return tracks and bool(stored.get("training")) and stored.get("momentum") != 0


def _below(paths: Iterable[str]) -> str:
    listed = list(paths)
    if len(listed) == 1:
        return f"{listed[0]}.**" if listed[0] else "**"
    inside = common(listed)
    return (f"{inside}.**" if inside else "**") + ":norm:frozen"


# --- training and state ---------------------------------------------------------------------


def _nothing_trainable(context: Context) -> Iterator[Hit]:
    entries = () if context.held else context.parameters  # of what an optimizer holds, a rule of its own tells
    if entries and not any(entry.tensor.requires_grad for entry in entries):
        names = tuple(entry.name for entry in entries)
        what = f"{'all ' if len(names) > 1 else ''}{plural(len(names), 'parameter is', 'parameters are')} frozen"
        yield Hit(names, what, "tp.unfreeze(model, …)", common(entry.path for entry in entries))


def _outside(context: Context) -> Iterator[Hit]:
    for each in context.source.left_out:
        name = f"{each.name}._extra_state".removeprefix(".")
        what = f"{each.name or 'the network'} ({each.kind.rpartition('.')[2]}) {each.reason}"
        yield Hit((name,), what, "model.state_dict()  # holds it", each.name)


# --- no values ------------------------------------------------------------------------------


def _lazy(context: Context) -> Iterator[Hit]:
    if context.lazy:
        names = tuple(entry.name for entry in context.lazy)
        what = f"{plural(len(names), 'parameter is', 'parameters are')} lazy, without shape and values"
        fix = "model(example)  # run once before counting, initialising, saving or making the optimizer"
        yield Hit(names, what, fix, common(entry.path for entry in context.lazy))


def _on_meta(context: Context) -> tuple[list[Member], int]:
    shaped = {id(entry.tensor) for entry in context.lazy}
    entries = [entry for entry in context.parameters if id(entry.tensor) not in shaped]
    return [entry for entry in entries if entry.tensor.is_meta], len(entries)


def _some_meta(context: Context) -> Iterator[Hit]:
    meta, count = _on_meta(context)
    if meta and 2 * len(meta) <= count:
        names = tuple(entry.name for entry in meta)
        what = f"{len(names):,} of {plural(count, 'parameter')} are on the meta device"
        path = common(entry.path for entry in meta)
        fix = f"{at(path)}.to_empty(device=…)  # then load or initialise it"
        yield Hit(names, what, fix, path)


def _all_meta(context: Context) -> Iterator[Hit]:
    meta, count = _on_meta(context)
    if 2 * len(meta) > count:
        what = f"{len(meta):,} of {plural(count, 'parameter')} are on the meta device"
        fix = "model.to_empty(device='cpu')  # then load or initialise it"
        yield Hit(tuple(entry.name for entry in meta), what, fix)


# --- mixed kinds ----------------------------------------------------------------------------


def _mixed_dtypes(context: Context) -> Iterator[Hit]:
    # Only layers: a module with submodules may keep its own parameters in a wider dtype on purpose. No 8-bit
    # dtypes: their scales have a different dtype.
    kept = [entry for entry in context.parameters if _is_wide_float(entry.tensor.dtype)]
    for entries in _mixed(kept, attrgetter("tensor.dtype")):
        path, module = entries[0].path, entries[0].owner
        if not module._modules:
            told = ", ".join(f"{entry.key} is {str(entry.tensor.dtype).removeprefix('torch.')}" for entry in entries)
            usual = Counter(entry.tensor.dtype for entry in entries).most_common(1)[0][0]
            names = tuple(entry.name for entry in entries)
            yield Hit(names, f"in {path or 'the network'}, {told}", f"{at(path)}.to({usual})", path)


def _mixed_devices(context: Context) -> Iterator[Hit]:
    for entries in _mixed([*context.parameters, *context.buffers], attrgetter("tensor.device")):
        if any(entry.tensor.is_meta and id(entry.tensor) in context.by_id for entry in entries):
            continue  # M106 and M107
        path = entries[0].path
        told = ", ".join(f"{entry.key} is on {entry.tensor.device}" for entry in entries)
        usual = Counter(str(entry.tensor.device) for entry in entries).most_common(1)[0][0]
        names = tuple(entry.name for entry in entries)
        yield Hit(names, f"in {path or 'the network'}, {told}", f"{at(path)}.to({usual!r})", path)


def _is_wide_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def _mixed(entries: list[Member], kind: Callable[[Member], Any]) -> list[list[Member]]:
    """Entries of each module with more than one kind."""
    kinds = list(map(kind, entries))
    if len(set(kinds)) < 2:  # the common case
        return []
    by_owner: dict[int, tuple[list[Member], set[Any]]] = {}
    for entry, found in zip(entries, kinds, strict=True):
        listed, of = by_owner.setdefault(id(entry.owner), ([], set()))
        listed.append(entry)
        of.add(found)
    return [listed for listed, of in by_owner.values() if len(of) > 1]


# --- the rules ------------------------------------------------------------------------------

_NET = """\
class Net(nn.Module):
    def __init__(self):
        super().__init__()
"""

RULES = (
    AuditRule(
        "M101",
        "hidden-parameter",
        "error",
        "Trainable parameters in a list, dict, tuple, set or dataclass",
        "parameters(), state_dict(), to() and train() pass over it, so it is never trained, saved or moved",
        _hidden,
        _NET + "        self.layers = [nn.Linear(8, 8) for _ in range(2)]\n\nmodel = Net()\n",
        _NET + "        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))\n\nmodel = Net()\n",
        "Modules and parameters that are also registered elsewhere (such as in a `ModuleList`) are not hidden, nor is "
        "a reference to a parent. A module or `nn.Parameter` set by `object.__setattr__`, which bypasses "
        "`nn.Module.__setattr__`, is hidden on purpose. The rule checks containers four levels deep, and the first "
        "10,000 items of each.",
    ),
    AuditRule(
        "M102",
        "hidden-state",
        "note",
        "Frozen parameters, buffers or dropout in a list, dict, tuple, set or dataclass",
        "to() does not move it, state_dict() does not save it, and train() and eval() do not switch it",
        _hidden_state,
        _NET + "        self.drops = [nn.Dropout(0.1), nn.Dropout(0.2)]\n\nmodel = Net()\n",
        _NET + "        self.drops = nn.ModuleList([nn.Dropout(0.1), nn.Dropout(0.2)])\n\nmodel = Net()\n",
        "This is only a note, because a frozen teacher is often put into a list so that it is not saved.",
    ),
    AuditRule(
        "M103",
        "hidden-leaf",
        "warning",
        "A tensor with requires_grad that is a plain attribute",
        "autograd computes its gradient, but parameters() and state_dict() lack it, so no optimizer gets it",
        _leaves,
        _NET + "        self.scale = torch.ones(8, requires_grad=True)\n\nmodel = Net()\n",
        _NET + "        self.scale = nn.Parameter(torch.ones(8))\n\nmodel = Net()\n",
        "Only leaf tensors count. A stored result (`self.last_output = x`) is not a leaf.",
    ),
    AuditRule(
        "M104",
        "moving-frozen-norm",
        "warning",
        "A frozen normalisation layer whose running statistics move",
        "requires_grad=False stops the optimizer, not forward(), which updates running statistics in training",
        _moving_norms,
        """\
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
model[1].requires_grad_(False)
""",
        """\
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
tp.freeze(model, "1.**")
""",
        "The layer's weight and bias must both be frozen; layers without them are not checked. `tp.freeze` stops the "
        "statistics too, and they stay stopped after `model.train()`, which would undo an `eval()` of one layer.",
    ),
    AuditRule(
        "M105",
        "lazy-parameter",
        "warning",
        "A lazy parameter that has no shape yet",
        "it cannot be counted, initialised or stepped before the first forward pass sets its shape",
        _lazy,
        "model = nn.Sequential(nn.LazyLinear(8), nn.ReLU())\n",
        "model = nn.Sequential(nn.LazyLinear(8), nn.ReLU())\nmodel(torch.zeros(1, 4))\n",
    ),
    AuditRule(
        "M106",
        "meta-parameter",
        "error",
        "Some parameters, but not most, are on the meta device",
        "a parameter on the meta device has no values: it was not loaded or initialised",
        _some_meta,
        "model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2, device='meta'))\n",
        "model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))\n",
        "If most parameters are on the meta device, the network was built there on purpose: see M107.",
    ),
    AuditRule(
        "M107",
        "meta-model",
        "note",
        "Most or all parameters are on the meta device",
        "the rules about values cannot run",
        _all_meta,
        "with torch.device('meta'):\n    model = nn.Linear(4, 8)\n",
        "model = nn.Linear(4, 8)\n",
        "The few other parameters (such as those made from constructor arguments) are not a finding.",
    ),
    AuditRule(
        "M108",
        "mixed-dtype",
        "warning",
        "A layer with parameters of several floating-point dtypes",
        "most operations need a single dtype, and a partial cast of a network is easily overlooked",
        _mixed_dtypes,
        "model = nn.Linear(4, 8)\nmodel.weight.data = model.weight.data.bfloat16()\n",
        "model = nn.Linear(4, 8).bfloat16()\n",
        "Only layers without submodules count, and no 8-bit dtypes: scales of quantised weights differ in dtype. "
        "Buffers do not count: a BatchNorm in half precision keeps its statistics in float32.",
    ),
    AuditRule(
        "M109",
        "mixed-device",
        "warning",
        "A module with parameters and buffers on several devices",
        "operations need tensors on a single device",
        _mixed_devices,
        "model = nn.BatchNorm1d(4)\nmodel.running_mean = model.running_mean.to('meta')\n",
        "model = nn.BatchNorm1d(4)\n",
    ),
    AuditRule(
        "M110",
        "nothing-trainable",
        "note",
        "A network without trainable parameters",
        "backward() has no gradients to compute and raises; for inference this is fine",
        _nothing_trainable,
        "model = nn.Linear(4, 2).requires_grad_(False)\n",
        "model = nn.Linear(4, 2)\nmodel.weight.requires_grad_(False)\n",
    ),
    AuditRule(
        "M111",
        "state-outside",
        "note",
        "A module with state that is neither a parameter nor a buffer",
        "parameters() and buffers() do not list it: code that freezes, counts, compares or saves by them misses it",
        _outside,
        "class Scaled(nn.Linear):\n    def get_extra_state(self):\n        return {'scale': 3}\n\n"
        "    def set_extra_state(self, state):\n        pass\n\nmodel = nn.Sequential(Scaled(4, 2))\n",
        "model = nn.Sequential(nn.Linear(4, 2))\n",
        "Layers write such state by `get_extra_state`, `_save_to_state_dict` or a state dict hook.",
    ),
)
