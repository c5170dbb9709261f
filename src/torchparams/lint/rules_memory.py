"""Rules about the memory and the values of parameters: overlaps, broken ties, NaN, constants."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from torchparams.io.live import memory_of
from torchparams.lint.findings import AuditRule, Hit
from torchparams.lint.rules_model import at
from torchparams.names import common
from torchparams.render.tree import plural

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

    from torchparams.lint.context import Context, Member

# --- memory ---------------------------------------------------------------------------------


def _overlaps(context: Context) -> Iterator[Hit]:
    for first, second in context.sharing.partial:
        what = f"{first.name} and {second.name} share elements, but are different parameters"
        fix = f"{at(second.name)} = nn.Parameter({at(second.name)}.detach().clone())"
        yield Hit((first.name, second.name), what, fix, common((first.path, second.path)))
    for entry in context.sharing.itself:
        what = f"{entry.name} has one element at several indices, as after expand()"
        fix = f"{at(entry.name)} = nn.Parameter({at(entry.name)}.detach().clone())"
        yield Hit((entry.name,), what, fix, entry.path)


# --- ties -----------------------------------------------------------------------------------


def _broken_ties(context: Context) -> Iterator[Hit]:
    told: set[int] = set()
    for entries in context.sharing.exact:
        trainable = [entry for entry in entries if entry.tensor.requires_grad]
        if len(trainable) > 1:
            told.update(id(entry.tensor) for entry in trainable)
            yield _tie(trainable, "are different parameters with the same memory")
    for entries in _equal_matrices(context):
        if any(id(entry.tensor) not in told for entry in entries):
            yield _tie(entries, "hold the same values, but are different tensors")


def _tie(entries: list[Member], how: str) -> Hit:
    first, *others = entries
    what = f"{first.name} and {', '.join(entry.name for entry in others[:3])} {how}"
    fix = "\n".join(f"{at(other.name)} = {at(first.name)}" for other in others[:3])
    return Hit(tuple(entry.name for entry in entries), what, fix, common(entry.path for entry in entries))


def _equal_matrices(context: Context) -> Iterator[list[Member]]:
    """Groups of matrices that were probably one tensor before a copy."""
    extremes = context.extremes
    listed, pairs = _declared(context)
    counts = Counter(extremes.values())
    twice = {pair for pair, count in counts.items() if count > 1 and _spans(pair)}
    alike: dict[tuple[Any, ...], list[Member]] = {}
    for entry in context.parameters:
        tensor = entry.tensor
        if context.infos[entry.name].sharding is not None:
            continue  # no rank has its elements to compare
        if (pair := extremes.get(id(tensor))) is not None and pair in twice and is_matrix(tensor):
            alike.setdefault((tensor.shape, tensor.dtype, tensor.device, pair), []).append(entry)
    for entries in alike.values():
        if len(entries) == 1 or not any(_may_tie(entry, listed) or entry.name in pairs for entry in entries):
            continue
        same: dict[bytes, list[Member]] = {}
        for entry in entries:
            same.setdefault(_digest(entry.tensor), []).append(entry)
        for equal in same.values():
            if len(equal) > 1:
                yield from _meant(equal, listed, pairs)


def _meant(equal: list[Member], listed: set[str], pairs: dict[str, str]) -> Iterator[list[Member]]:
    """Groups among equal matrices that were tied."""
    by_name = {entry.name: entry for entry in equal}
    declared = [(by_name[pairs[name]], entry) for name, entry in by_name.items() if pairs.get(name) in by_name]
    if declared:
        first = declared[0][0]
        yield [first, *(entry for other, entry in declared if other is first)]
        return
    # A frozen copy of a trained network is a teacher. Equal parts of copies have equal names.
    for trains in (True, False):
        kept = [entry for entry in equal if entry.tensor.requires_grad is trains]
        ends = {tuple(entry.name.split(".")[-2:]) for entry in kept}
        if len(ends) > 1 and any(_may_tie(entry, listed) for entry in kept):
            # The target of the tie comes first: the embedding, or the weight that is not listed as tied.
            yield sorted(kept, key=lambda entry: (not _embeds(entry), entry.name in listed))


def _may_tie(entry: Member, listed: set[str]) -> bool:
    return entry.name in listed or _embeds(entry)


def _embeds(entry: Member) -> bool:
    return entry.key == "weight" and any(cls.__name__.endswith("Embedding") for cls in type(entry.owner).__mro__)


def _spans(pair: tuple[float, float]) -> bool:
    return math.isfinite(pair[0]) and math.isfinite(pair[1]) and pair[0] != pair[1]


def _digest(tensor: torch.Tensor) -> bytes:
    import torch
    from blake3 import blake3

    array = memory_of(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
    digest: bytes = blake3(array.data).digest()
    return digest


def _declared(context: Context) -> tuple[set[str], dict[str, str]]:
    """Ties that modules declare, as in transformers: a list of names, or a dict of name → name."""
    listed: set[str] = set()
    pairs: dict[str, str] = {}
    classes: dict[type, Any] = {}
    for path, module in context.named_modules():
        kind = type(module)
        if kind not in classes:
            declaring = (vars(cls)["_tied_weights_keys"] for cls in kind.__mro__ if "_tied_weights_keys" in vars(cls))
            classes[kind] = next(declaring, None)
        if classes[kind] is None:
            continue
        keys = vars(module).get("_tied_weights_keys", classes[kind])
        dot = f"{path}." if path else ""
        if isinstance(keys, dict):
            pairs.update((f"{dot}{a}", f"{dot}{b}") for a, b in keys.items() if isinstance(b, str))
        elif isinstance(keys, list | tuple | set):
            listed.update(f"{dot}{key}" for key in keys if isinstance(key, str))
    return listed, pairs


# --- values ---------------------------------------------------------------------------------


def _non_finite(context: Context) -> Iterator[Hit]:
    bad: dict[str, tuple[float, float]] = {}
    for entry in context.parameters:
        if (pair := context.extremes_of(entry)) is not None and not _finite(pair):
            bad[entry.name] = pair
    bad |= {name: pair for name, pair in context.decoded.items() if not _finite(pair)}
    for entry in context.buffers:
        pair = context.extremes.get(id(entry.tensor))
        # Masks are infinite on purpose, but running statistics are not. No tensor is NaN on purpose.
        if pair is not None and (math.isnan(pair[0]) or (context.is_norm(entry.owner) and not _finite(pair))):
            bad[entry.name] = pair
    if bad:
        names = tuple(bad)
        kinds = {"NaN" if math.isnan(pair[0]) else "infinite values" for pair in bad.values()}
        what = f"{plural(len(bad), 'tensor holds', 'tensors hold')} {' or '.join(sorted(kinds))}"
        fix = f"tp.stats(model, {names[0]!r})  # how many, then load or initialise it again"
        yield Hit(names, what, fix, common(name.rpartition(".")[0] for name in names))


def _finite(pair: tuple[float, float]) -> bool:
    return math.isfinite(pair[0]) and math.isfinite(pair[1])


_WEIGHT = re.compile(r"(?:.*_)?weight(?:_.*)?")


def is_matrix(tensor: torch.Tensor) -> bool:
    """True if at least two dimensions are larger than 1."""
    return tensor.ndim >= 2 and sum(size > 1 for size in tensor.shape) >= 2


def _weights(context: Context) -> Iterator[tuple[Member, float]]:
    """Weights of layers other than norms whose elements are all equal, each with its value."""
    for entry in context.parameters:
        pair = context.extremes_of(entry)
        if pair is None or pair[0] != pair[1] or math.isinf(pair[0]):
            continue
        if _WEIGHT.fullmatch(entry.key) and is_matrix(entry.tensor) and not context.is_norm(entry.owner):
            yield entry, pair[0]


def _constant(context: Context) -> Iterator[Hit]:
    found = [(entry, value) for entry, value in _weights(context) if value != 0 and entry.tensor.requires_grad]
    if found:
        first, value = found[0]
        what = f"every element of {first.name} is {value:g}"
        if len(found) > 1:
            what += f", and {plural(len(found) - 1, 'other weight is', 'other weights are')} constant too"
        fix = f"nn.init.kaiming_uniform_({at(first.name)})"
        yield Hit(tuple(entry.name for entry, _ in found), what, fix, common(entry.path for entry, _ in found))


def _zero(context: Context) -> Iterator[Hit]:
    dead = {entry.name for run in _dead(context) for entry in run}
    found = [entry for entry, value in _weights(context) if value == 0 and entry.name not in dead]
    if found:
        names = tuple(entry.name for entry in found)
        what = f"{plural(len(found), 'weight is', 'weights are')} zero in every element"
        fix = f"nn.init.kaiming_uniform_({at(found[0].name)})  # unless it is zero on purpose"
        yield Hit(names, what, fix, common(entry.path for entry in found))


def _dead_layers(context: Context) -> Iterator[Hit]:
    for run in _dead(context):
        names = tuple(entry.name for entry in run)
        what = f"the weights of {plural(len(names), 'consecutive layer')} are zero in every element"
        fix = f"nn.init.kaiming_uniform_({at(run[0].name)})  # at most one of two consecutive layers may be zero"
        yield Hit(names, what, fix, common(entry.path for entry in run))


def _dead(context: Context) -> list[list[Member]]:
    """Runs of at least two consecutive layers whose weights are zero."""
    zero = {id(entry.owner): entry for entry, value in _weights(context) if value == 0}
    if len(zero) < 2:
        return []
    from torch import nn

    weights = {id(entry.owner) for entry in context.parameters if is_matrix(entry.tensor)}
    inside = {
        id(child)
        for module in context.modules
        if isinstance(module, nn.Sequential)
        for child in module._modules.values()
        if isinstance(child, nn.Sequential)
    }
    runs: list[list[Member]] = []
    told: set[int] = set()
    for module in context.modules:
        # The order in which modules of a list or dict run is unknown.
        if id(module) in inside or isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        run: list[Member] = []
        for layer in _in_order(module):
            entry = zero.get(id(layer))
            if entry is not None and id(layer) not in told and (not run or _fits(run[-1].owner, layer)):
                run.append(entry)
            elif entry is not None or id(layer) in weights or layer._modules:
                runs.append(run)
                run = [entry] if entry is not None and id(layer) not in told else []
        runs.append(run)
        told.update(id(entry.owner) for run in runs if len(run) > 1 for entry in run)
    return [run for run in runs if len(run) > 1]


def _in_order(module: nn.Module) -> Iterator[nn.Module]:
    """Submodules that run in this order, with each Sequential replaced by its members."""
    from torch import nn

    for child in module._modules.values():
        if isinstance(child, nn.Sequential):
            yield from _in_order(child)
        elif child is not None:
            yield child


def _fits(first: nn.Module, second: nn.Module) -> bool:
    """True if the sizes allow the output of the first layer as input of the second."""
    gives = next((s for key in ("out_features", "out_channels", "embedding_dim") if (s := vars(first).get(key))), None)
    takes = next((s for key in ("in_features", "in_channels") if (s := vars(second).get(key))), None)
    if not isinstance(gives, int) or not isinstance(takes, int):
        return False
    return takes == gives or ("out_channels" in vars(first) and takes % gives == 0)  # flattened


def _odd_scales(context: Context) -> Iterator[Hit]:
    from torchparams.measure.flags import SIBLINGS, role_of
    from torchparams.measure.stats import stats
    from torchparams.parameters import Parameters

    roles: dict[tuple[str, str], list[str]] = {}
    for entry in context.parameters:
        # Tensors with extremes have readable values.
        if id(entry.tensor) in context.extremes and not entry.tensor.is_nested and is_matrix(entry.tensor):
            roles.setdefault((role_of(entry.name), str(list(entry.tensor.shape))), []).append(entry.name)
    names = [name for siblings in roles.values() if len(siblings) > SIBLINGS for name in siblings]
    if not names:
        return
    found = stats(Parameters(context.source).select(names), quantiles=())
    for flag in found.flags:
        if flag.kind == "scale":
            path = flag.name.rpartition(".")[0]
            yield Hit((flag.name,), f"{flag.name}: {flag.reason}", f"tp.stats(model, {flag.name!r})", path)


# --- the rules ------------------------------------------------------------------------------

_TIED = """\
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
"""

RULES = (
    AuditRule(
        "M201",
        "overlapping-parameters",
        "error",
        "Different parameters that share elements",
        "a step of one changes values of the other, and a checkpoint that stores both gives them separate memory",
        _overlaps,
        """\
base = torch.randn(12)
model = nn.ParameterDict({"a": nn.Parameter(base[:8]), "b": nn.Parameter(base[4:])})
""",
        """\
base = torch.randn(12)
model = nn.ParameterDict({"a": nn.Parameter(base[:8]), "b": nn.Parameter(base[8:])})
""",
        "Views that interleave without sharing an element (columns of one matrix) do not overlap. "
        "Exact ties are not overlaps. A parameter made by `expand()` overlaps itself.",
    ),
    AuditRule(
        "M202",
        "broken-tie",
        "warning",
        "Weights that were tied, and were separated by a copy",
        "they are now trained separately, and stored twice",
        _broken_ties,
        _TIED + "        self.head.weight = nn.Parameter(self.embed.weight.detach().clone())\n\nmodel = Net()\n",
        _TIED + "        self.head.weight = self.embed.weight\n\nmodel = Net()\n",
        "The rule finds an embedding and a different layer with the same values, weights named in a module's "
        "`_tied_weights_keys`, and two trainable parameters with the same memory. Equal parts of copies (a teacher, "
        "two towers, layers made by `deepcopy`) are not ties.",
    ),
    AuditRule(
        "M301",
        "non-finite-parameter",
        "error",
        "NaN or infinite values",
        "one such value can make the output and every gradient NaN",
        _non_finite,
        "model = nn.Linear(4, 2)\nmodel.weight.data[0, 1] = float('nan')\n",
        "model = nn.Linear(4, 2)\n",
        "Infinite buffers count only in normalisation layers: masks are infinite on purpose.",
    ),
    AuditRule(
        "M302",
        "constant-weight",
        "warning",
        "A trainable weight matrix whose elements are all equal and not zero",
        "all units compute the same output and get the same gradient, so they stay equal",
        _constant,
        "model = nn.Linear(4, 2)\nnn.init.ones_(model.weight)\n",
        "model = nn.Linear(4, 2)\nnn.init.xavier_uniform_(model.weight)\n",
        "The rule checks parameters called `weight` (or `weight_…`, `…_weight`) with two dimensions larger than 1, in "
        "layers other than norms. A frozen one is a fixed filter, such as an average.",
    ),
    AuditRule(
        "M303",
        "zero-weight",
        "note",
        "A weight matrix whose elements are all zero",
        "earlier layers get no gradient until it changes, and it never changes if it is frozen",
        _zero,
        "model = nn.Linear(4, 2)\nnn.init.zeros_(model.weight)\n",
        "model = nn.Linear(4, 2)\n",
        "This is often on purpose: the last layer of a residual branch, the second matrix of LoRA, a new head.",
    ),
    AuditRule(
        "M304",
        "zero-layers",
        "warning",
        "Consecutive layers whose weights are all zero",
        "the output does not depend on the input, and while their biases are zero too, no weight gets a gradient",
        _dead_layers,
        "model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))\n"
        "tp.apply_(model, '**.weight', nn.init.zeros_)\n",
        "model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))\n",
        "Layers are consecutive if an `nn.Sequential` or a different module holds them in this order and their sizes "
        "fit. The order in which modules of an `nn.ModuleList` or `nn.ModuleDict` run is unknown. A single zero layer "
        "is only the note M303.",
    ),
    AuditRule(
        "M305",
        "odd-scale",
        "warning",
        "A weight matrix whose scale is far from that of its siblings",
        "layers of one kind have similar scales: an outlier was initialised, loaded, scaled or trained differently",
        _odd_scales,
        "model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(8)])\n"
        "with torch.no_grad():\n    model[3].weight.mul_(20)\n",
        "model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(8)])\n",
        "The flag `scale` of `tp.stats`. Siblings are matrices of one shape whose names differ only in numbers; there "
        "are at least five of them, and each is compared with the eight nearest.",
    ),
)
