"""Explanations of modules and attributes of a network that are not among its parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from torchparams.render.tree import listed, plural
from torchparams.sources.live.access import Access

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

    from torchparams.sources.live.hidden import Found
    from torchparams.sources.live.network import Network

CODES_SHOWN = 3
"""Number of expressions on one line."""


@dataclass(frozen=True, slots=True)
class Absent:
    """Modules or attributes that are missing from the parameters for one reason.

    Attributes:
        kind: `no-parameters`, `not-set`, `hidden`, `plain`, `computed`, `aside`, `lazy` or `not-saved`.
        names: Their names, with dots; empty for the network itself.
        codes: Python expressions for them.
        why: What they are, and why they are missing.
        cure: What to write instead; None if nothing is wrong.
        inside: Names of the tensors in a container.
    """

    kind: str
    names: tuple[str, ...]
    codes: tuple[str, ...]
    why: str
    cure: str | None = None
    inside: tuple[str, ...] = ()

    def __str__(self) -> str:
        cure = f" {self.cure}" if self.cure else ""
        return f"{listed(ranges(self.codes), CODES_SHOWN)}: {self.why}{cure}"

    def to_json(self) -> dict[str, Any]:
        """The explanation as JSON data."""
        return {
            "kind": self.kind,
            "names": list(self.names),
            "python": list(self.codes),
            "why": self.why,
            "cure": self.cure,
            "inside": list(self.inside),
        }


def ranges(codes: Iterable[str]) -> list[str]:
    """Shorten a list of Python expressions: consecutive indexes become one range.

    >>> ranges([f"model.layers[{i}].act" for i in range(12)])
    ['model.layers[0..11].act']
    """
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for code in codes:
        parts = _INDEX.split(code)
        alike.setdefault(tuple(parts[::2]), []).append(parts)
    split = [parts for same in alike.values() for parts in same]
    while True:
        joined: list[list[str]] = []
        for parts in split:
            if joined and (both := _joined(joined[-1], parts)):
                joined[-1] = both
            else:
                joined.append(parts)
        if len(joined) == len(split):
            return ["".join(f"[{part}]" if at % 2 else part for at, part in enumerate(parts)) for parts in joined]
        split = joined


_INDEX = re.compile(r"\[(\d+(?:\.\.\d+)?)\]")


def _joined(left: list[str], right: list[str]) -> list[str] | None:
    """Join two expressions that differ in one index, if the second index follows the first."""
    if len(left) != len(right):
        return None
    different = [at for at, (a, b) in enumerate(zip(left, right, strict=True)) if a != b]
    if len(different) != 1 or different[0] % 2 == 0:
        return None
    (at,) = different
    first, _, last = left[at].partition("..")
    begin, _, end = right[at].partition("..")
    if int(begin) != int(last or first) + 1:
        return None
    return [*left[:at], f"{first}..{end or begin}", *left[at + 1 :]]


def find_absent(network: Network) -> list[Absent]:
    """Everything in a network that is not a parameter, with probable mistakes first.

    >>> from torch import nn
    >>> from torchparams.sources.live.network import Network
    >>> for absent in find_absent(Network(nn.Sequential(nn.ReLU(), nn.Linear(2, 2, bias=False)))):
    ...     print(absent)
    model[0]: ReLU has no parameters.
    model[1].bias: None. Linear was made without it.
    """
    access = Access(network.model)
    return [
        *(absent for found in network.hidden for absent in _unregistered(found, access)),
        *_lazy(network, access),
        *_computed(network, access),
        *_not_saved(network, access),
        *_none(network, access),
    ]


def why_empty(network: Network) -> list[str]:
    """Sentences that explain why the network has no parameters."""
    found = [str(absent) for absent in find_absent(network) if absent.kind in ("hidden", "plain", "aside", "computed")]
    if not found:
        classes = dict.fromkeys(type(module).__name__ for module in network.modules)
        found.append(
            f"{listed(classes, 5)} has no parameters."
            if len(classes) == 1
            else f"None of its {plural(len(network.modules), 'module')} has parameters: {listed(classes, 5)}."
        )
    if network.buffers:
        found.append(f"It has {plural(len(network.buffers), 'buffer')}: tp.of(model, buffers=True) lists them.")
    return found


# --- not registered in nn.Module --------------------------------------------------------------------


def _unregistered(found: Found, access: Access) -> Iterator[Absent]:
    code = (access.tensor(found.name),)
    name = (found.name,)
    held = (*found.trainable, *found.frozen)
    if held or found.switched:
        count = plural(len(held), "tensor") if held else plural(len(found.switched), "dropout layer")
        within = f" in {plural(found.modules, 'module')}" if held and found.modules else ""
        why = f"a {found.container} that hides {count}{within}: nn.Module does not look into a {found.container}."
        yield Absent("hidden", name, code, why, f"Write {found.cure}", (*held, *found.switched))
    if found.leaves or found.plain:
        inside = (*found.leaves, *found.plain)
        alone = found.container == "attribute"
        trained = " with requires_grad" if found.leaves else ""
        why = (
            f"a plain tensor{trained}, neither parameter nor buffer."
            if alone
            else f"a {found.container} with {plural(len(inside), 'plain tensor')}{trained}."
        )
        yield Absent("plain", name, code, why, _registering(found), () if alone else inside)
    if found.computed:
        inside = () if found.container == "attribute" else tuple(found.computed)
        why = "the result of an operation on other tensors, which autograd recorded."
        yield Absent("computed", name, code, why, None, inside)
    if found.aside:
        why = "set without nn.Module.__setattr__, so it is not registered."
        yield Absent("aside", name, code, why, None)


def _registering(found: Found) -> str:
    here = f"self.{found.attribute}"
    if found.container != "attribute":
        kind = "nn.ParameterDict" if found.container == "dict" else "nn.ParameterList"
        return f"To train them, write {here} = {kind}(…)."
    trained = f"{here} = nn.Parameter({here})"
    if found.leaves:
        return f"Write {here} = nn.Parameter({here}.detach())"
    return f"To train it, write {trained}; to save and move it, self.register_buffer({found.attribute!r}, …)"


# --- registered, but not a parameter ----------------------------------------------------------------


def _lazy(network: Network, access: Access) -> Iterator[Absent]:
    from torch.nn.parameter import is_lazy

    names = tuple(entry.name for entry in (*network.parameters, *network.buffers) if is_lazy(entry.tensor))
    if names:
        codes = tuple(map(access.tensor, names))
        why = "in parameters(), but lazy: it has no shape and no values before the first forward pass."
        yield Absent("lazy", names, codes, why, "Run model(example) once")


def _computed(network: Network, access: Access) -> Iterator[Absent]:
    from torch.nn.utils.parametrize import ParametrizationList

    for path, module in network.named_modules():
        if isinstance(module, ParametrizationList):
            owner, _, key = path.rpartition(".")
            owner = owner.rpartition(".")[0]  # parametrizations
            name = f"{owner}.{key}" if owner else key
            steps = " and ".join(type(step).__name__.lstrip("_") for step in module._modules.values())
            held = ", ".join(k for k in (*module._parameters, *module._buffers))
            why = f"computed by {steps} at each access. The parameters are parametrizations.{key}: {held}."
            yield Absent("computed", (name,), (access.tensor(name),), why)


def _not_saved(network: Network, access: Access) -> Iterator[Absent]:
    names = tuple(
        entry.name for entry in network.buffers if entry.key in vars(entry.owner)["_non_persistent_buffers_set"]
    )
    if names:
        why = "registered with persistent=False. buffers() gives them, state_dict() does not."
        if len(names) == 1:
            why = why.replace("them", "it")
        yield Absent("not-saved", names, tuple(map(access.tensor, names)), why)


def _none(network: Network, access: Access) -> Iterator[Absent]:
    """Modules without parameters, by class, and parameters that a layer was built without."""
    from torch.nn.utils.parametrize import ParametrizationList

    steps = {
        id(step) for module in network.modules if isinstance(module, ParametrizationList) for step in module.children()
    }
    hiding = {found.owner for found in network.hidden if found.container != "attribute"}
    without: dict[str, list[str]] = {}
    unset: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for path, module in network.named_modules():
        kind = type(module).__name__
        held = chain(module._modules.values(), module._parameters.values())
        if all(each is None for each in held):
            if id(module) not in steps and path not in hiding:
                without.setdefault(_bare(module), []).append(path)
            continue
        keys = [key for key, each in (*module._parameters.items(), *module._buffers.items()) if each is None]
        if keys:
            unset.setdefault((kind, tuple(keys)), []).append(f"{path}." if path else "")
    for why, paths in without.items():
        yield Absent("no-parameters", tuple(paths), tuple(map(access.module, paths)), why)
    for (kind, lacking), prefixes in unset.items():
        names = tuple(prefix + key for key in lacking for prefix in prefixes)
        why = f"None. {kind} was made without {'it' if len(lacking) == 1 else 'them'}."
        yield Absent("not-set", names, tuple(map(access.tensor, names)), why)


def _bare(module: nn.Module) -> str:
    from torch import nn

    kind = type(module).__name__
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        return f"{kind} is empty."
    buffers = sum(buffer is not None for buffer in module._buffers.values())
    return f"{kind} has {plural(buffers, 'buffer')} and no parameters." if buffers else f"{kind} has no parameters."
