"""Explanation of the tensors in `parameters()`, `buffers()`, `state_dict()` and an optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, overload

from torchparams.errors import UnknownName
from torchparams.lint.audit import network_of, optimizers_of
from torchparams.lint.context import Context
from torchparams.measure.listing import alike, leaves, tree_of
from torchparams.render.result import Result
from torchparams.render.rows import ROWS_SHOWN
from torchparams.render.tree import (
    Cell,
    Column,
    Row,
    Table,
    Text,
    Tree,
    cut,
    filled,
    human_bytes,
    human_shape,
    listed,
    plural,
    printable,
)
from torchparams.sources.live.absent import Absent, find_absent
from torchparams.sources.live.access import Access
from torchparams.sources.live.reach import plain_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from torchparams.info import ParameterInfo

ABSENT_SHOWN = 12
"""Maximum number of lines about absent tensors in a tree."""

HOLDERS = {"P": "parameters()", "B": "buffers()", "S": "state_dict()", "O": "optimizer"}
"""Letter of each holder in the table of tensors."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Call that returns tensors of the network.

    Attributes:
        call: The call, such as `parameters()`.
        tensors: Number of tensors; for `state_dict()`, number of names.
        numel: Number of their elements; a tied tensor counts once.
        note: Explanation of the numbers.
    """

    call: str
    tensors: int
    numel: int
    note: str


@dataclass(frozen=True, slots=True)
class Held:
    """Tensor of the network.

    Attributes:
        info: Info of the tensor.
        code: Python expression for it.
        where: Letters of the calls that return it: `P` parameters(), `B` buffers(), `S` state_dict(), `O` optimizer.
        also: For each further name of a tied tensor, the name, the expression, and the letters.
        group: Its optimizer group, such as `param_groups.0`, or None.
    """

    info: ParameterInfo
    code: str
    where: str
    also: tuple[tuple[str, str, str], ...] = ()
    group: str | None = None

    @property
    def owner(self) -> str:
        """Name of the owner's class, without its module."""
        return (self.info.module or "").rpartition(".")[2]

    def to_json(self) -> dict[str, Any]:
        """The tensor as JSON data."""
        return {
            "name": self.info.name,
            "python": self.code,
            "in": _in(self.where),
            "kind": self.info.kind,
            "shape": None if self.info.shape is None else list(self.info.shape),
            "dtype": str(self.info.dtype),
            "numel": self.info.numel,
            "requires_grad": self.info.requires_grad,
            "tied": [{"name": name, "python": code, "in": _in(where)} for name, code, where in self.also],
            "group": self.group,
            "owner": self.info.module,
        }


def _in(letters: str) -> list[str]:
    return [HOLDERS[letter] for letter in letters]


@dataclass(frozen=True, slots=True, repr=False)
class Explained(Result):
    """Explanation of a network's tensors; prints as two tables and a list.

    Attributes:
        label: Label of the network.
        holders: `parameters()`, `named_parameters()`, `buffers()`, `state_dict()`, and any given optimizer.
        tensors: Every tensor by canonical name, in the network's order.
        absent: Tensors, modules and attributes that are not parameters, with the reason; probable mistakes first.
        notes: Notes about the numbers.
    """

    label: str
    holders: tuple[Holder, ...]
    tensors: dict[str, Held]
    absent: tuple[Absent, ...]
    notes: tuple[str, ...] = ()

    def tree(self, *, limit: int | None = ROWS_SHOWN) -> Tree:
        """The explanation as a tree; equal layers are one row.

        Args:
            limit: Maximum number of rows of tensors to show; None for all.
        """
        optimizer = self.holders[-1].call == HOLDERS["O"]
        letters = "PBSO" if optimizer else "PBS"
        parts: list[Text | Table] = [Text(printable(self.label), "title"), self._holders()]
        if self.tensors:
            columns = (
                Column("in Python", style="name", shrink=True),
                Column("shape", drop=2),
                Column("in"),
                Column("trainable", drop=1),
                Column("owner", style="dim", shrink=True, yields=True, drop=3),
            )
            rows = [row for line in _lines(self.tensors) for row in line.rows(letters)]
            parts += [Text(""), Table(columns, cut(rows, limit, "rows"))]
        if self.absent:
            parts += [Text(""), Text("Not among the parameters", "title")]
            shown = self.absent if limit is None else self.absent[:ABSENT_SHOWN]
            for absent in shown:
                style = "warn" if absent.kind == "hidden" else ""
                parts.append(Text(filled(str(absent), hanging=2), style))
            if len(shown) < len(self.absent):
                parts.append(Text(f"… {len(self.absent) - len(shown):,} more", "dim"))
        parts += [Text(filled(note), "warn") for note in self.notes]
        return Tree(tuple(parts))

    def _holders(self) -> Table:
        columns = (
            Column(""),
            Column("call", style="name"),
            Column("tensors", right=True, style="number"),
            Column("numel", right=True, style="number"),
            Column("", style="dim", wraps=True),
        )
        letters = {call: letter for letter, call in HOLDERS.items()}
        rows = (
            Row((Cell(letters.get(h.call, ""), "title"), h.call, f"{h.tensors:,}", f"{h.numel:,}", h.note))
            for h in self.holders
        )
        return Table(columns, tuple(rows))

    def to_json(self) -> dict[str, Any]:
        """The explanation as JSON data."""
        return {
            "model": self.label,
            "holders": [{"call": h.call, "tensors": h.tensors, "numel": h.numel, "note": h.note} for h in self.holders],
            "tensors": [held.to_json() for held in self.tensors.values()],
            "absent": [absent.to_json() for absent in self.absent],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True, repr=False)
class ExplainedName(Result):
    """Explanation of one name, in sentences.

    Attributes:
        name: The canonical name.
        sentences: The explanation.
        tensor: The tensor of that name, or None if the name is not that of a tensor.
        absent: Reasons why the name is not that of a tensor.
    """

    name: str
    sentences: tuple[str, ...]
    tensor: Held | None = None
    absent: tuple[Absent, ...] = ()

    def tree(self) -> Tree:
        """The sentences, as one paragraph below the name."""
        return Tree((Text(printable(self.name), "title"), Text(filled(" ".join(self.sentences)))))

    def to_json(self) -> dict[str, Any]:
        """The sentences and the tensor as JSON data."""
        return {
            "name": self.name,
            "sentences": list(self.sentences),
            "tensor": None if self.tensor is None else self.tensor.to_json(),
            "absent": [absent.to_json() for absent in self.absent],
        }


# --- the verb -------------------------------------------------------------------------------------


@overload
def explain(model: object, name: None = None, *, optimizer: Any = None) -> Explained: ...
@overload
def explain(model: object, name: str, *, optimizer: Any = None) -> ExplainedName: ...
def explain(model: object, name: str | None = None, *, optimizer: Any = None) -> Explained | ExplainedName:
    """Explain which tensors `parameters()`, `buffers()`, `state_dict()` and the optimizer hold, and which they lack.

    Every tensor is listed with its Python expression. Tensors, modules and attributes that are not parameters are
    listed with the reason. Nothing is modified, no value is read, and the network's own code does not run. Ranks of a
    sharded model do not communicate.

    Args:
        model: The network.
        name: Name of a tensor, as in `named_parameters()` or as a Python expression (`model.layers[0].weight`), or of
            a module or attribute that is not a parameter. None explains the whole network.
        optimizer: The optimizer (any object with `param_groups`), or a list of optimizers used together.

    Raises:
        UnsupportedSource: `model` is not a live network, or `optimizer` has no `param_groups`.
        UnknownName: The network has no such name; the message has the closest.

    >>> from torch import nn
    >>> import torchparams as tp
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.BatchNorm1d(2))
    >>> print(tp.explain(model))
    Sequential
       call                tensors  numel
    P  parameters()              4     12  all trainable
       named_parameters()        4     12  the same, with their names
    B  buffers()                 3      5  state of layers, not trained
    S  state_dict()              7     17  P + B
    <BLANKLINE>
    in Python                     shape   in   trainable  owner
    model[0].weight               [2, 3]  P-S  yes        Linear
    model[0].bias                 [2]     P-S  yes        Linear
    model[2].weight               [2]     P-S  yes        BatchNorm1d
    model[2].bias                 [2]     P-S  yes        BatchNorm1d
    model[2].running_mean         [2]     -BS             BatchNorm1d
    model[2].running_var          [2]     -BS             BatchNorm1d
    model[2].num_batches_tracked  []      -BS             BatchNorm1d
    <BLANKLINE>
    Not among the parameters
    model[1]: ReLU has no parameters.
    """
    context = Context(network_of(model, "explained", "torchparams.ls lists a checkpoint"), optimizers_of(optimizer))
    access = Access(context.model)
    absent = find_absent(context)
    held = _held(context, access)
    if name is not None:
        return _of_name(name, context, access, held, absent)
    return Explained(context.source.label, tuple(_holders(context, held)), held, tuple(absent), tuple(_notes(context)))


def _held(context: Context, access: Access) -> dict[str, Held]:
    groups = {id(tensor): group.place for group in reversed(context.groups) for tensor in group.tensors}
    tensors = {entry.name: entry.tensor for entry in (*context.parameters, *context.buffers)}
    found = {}
    for name, info in context.infos.items():
        first, *others = (
            (spelled, access.tensor(spelled), _letters(spelled, access)) for spelled in (name, *info.aliases)
        )
        group = groups.get(id(tensors[name]))
        # parameters() gives a tied tensor once, under its first name.
        also = tuple(
            (alias, code, where.replace("P", "") if "P" in first[2] else where) for alias, code, where in others
        )
        found[name] = Held(info, first[1], first[2] + "O" * (group is not None), also, group)
    return found


def _letters(name: str, access: Access) -> str:
    owner, key = access.owner(name), name.rpartition(".")[2]
    if owner._parameters.get(key) is not None:
        return "PS"
    return "B" if key in owner._non_persistent_buffers_set else "BS"


def _holders(context: Context, held: dict[str, Held]) -> Iterator[Holder]:
    parameters = [h for h in held.values() if h.info.kind == "parameter"]
    buffers = [h for h in held.values() if "B" in h.where or any("B" in where for _, _, where in h.also)]
    trainable = sum(bool(h.info.requires_grad) for h in parameters)
    frozen = len(parameters) - trainable
    shares = [f"{trainable:,} trainable", f"{frozen:,} frozen"]
    if not (trainable and frozen):
        shares = ["all trainable" if trainable else "all frozen"] * bool(parameters)
    yield Holder("parameters()", len(parameters), _numel(parameters), ", ".join(shares))
    yield Holder("named_parameters()", len(parameters), _numel(parameters), "the same, with their names")
    yield Holder("buffers()", len(buffers), _numel(buffers), "state of layers, not trained" * bool(buffers))
    saved = [h for h in held.values() if "S" in h.where or any("S" in where for _, _, where in h.also)]
    keys = saved_names(context.model)
    unsaved = len(held) - len(saved)
    tied = keys - len(saved)
    note = " + ".join(["P"] * bool(parameters) + ["B"] * bool(buffers))
    note += f" - {unsaved:,} not persistent" * bool(unsaved) + f" + {plural(tied, 'tied name')}" * bool(tied)
    yield Holder("state_dict()", keys, _numel(saved), note)
    if context.optimizers:
        stepped = [h for h in held.values() if h.group is not None]
        strange = len(context.held - set(context.by_id))
        without = sum(bool(h.info.requires_grad) and h.group is None for h in parameters)
        notes = [listed(dict.fromkeys(type(optimizer).__name__ for optimizer in context.optimizers))]
        notes += [f"{without:,} trainable {'is' if without == 1 else 'are'} not in it"] * bool(without)
        notes += [f"{strange:,} {'is' if strange == 1 else 'are'} not of this model"] * bool(strange)
        yield Holder(HOLDERS["O"], len(stepped), _numel(stepped), "; ".join(notes))


def _numel(held: list[Held]) -> int:
    return sum(h.info.numel for h in held)


def saved_names(model: nn.Module) -> int:
    """Number of names in `state_dict()`: a module that is registered twice is saved under both paths.

    >>> from torch import nn
    >>> layer = nn.Linear(2, 2)
    >>> saved_names(nn.Sequential(layer, nn.ReLU(), layer))
    4
    """
    counts: dict[int, int] = {}
    entered: set[int] = set()
    stack = [model]
    while stack:
        module = stack[-1]
        children = [child for child in module._modules.values() if child is not None]
        if id(module) not in entered:
            entered.add(id(module))
            stack += (child for child in children if id(child) not in entered)
            continue
        stack.pop()
        if id(module) not in counts:
            unsaved = module._non_persistent_buffers_set
            own = sum(tensor is not None for tensor in module._parameters.values())
            own += sum(buffer is not None and key not in unsaved for key, buffer in module._buffers.items())
            counts[id(module)] = own + sum(counts.get(id(child), 0) for child in children)
    return counts[id(model)]


def _notes(context: Context) -> Iterator[str]:
    """Notes on calls whose result depends on the network's own code."""
    from torch import nn

    writes = ("get_extra_state", "_save_to_state_dict", "state_dict")
    gives = ("parameters", "named_parameters", "buffers", "named_buffers")
    for names, what in ((writes, "the content of state_dict()"), (gives, "their results")):
        classes: dict[type, list[str]] = {}
        for cls in dict.fromkeys(map(type, context.modules)):
            own = [name for name in names if _own(cls, name, getattr(nn.Module, name))]
            if own:
                classes[cls] = own
        for cls, own in classes.items():
            calls = " and ".join(f"{name}()" for name in own)
            yield f"{cls.__name__} has {calls} of its own, which was not run: {what} may differ from this table."
    hooked = dict.fromkeys(type(module).__name__ for module in context.modules if module._state_dict_hooks)
    if hooked:
        yield f"{listed(hooked)} has hooks on state_dict(), which were not run: its content may differ."


def _own(cls: type, name: str, original: Any) -> bool:
    """True if a class overrides the method, except in PyTorch's lazy modules and in this library."""
    home = next(base for base in cls.__mro__ if name in vars(base))
    return (
        vars(home)[name] is not original
        and home.__module__.split(".")[0] != "torchparams"
        and (home.__module__ != "torch.nn.modules.lazy")
    )


# --- lines of tensors -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Line:
    """Line of a tensor, or of the same tensor in several equal layers."""

    held: Held
    code: str

    def rows(self, letters: str) -> Iterator[Row]:
        held = self.held
        trainable = Cell("yes", "good") if held.info.requires_grad else Cell("no", "dim")
        if held.info.kind == "buffer" and not held.info.requires_grad:
            trainable = Cell("")
        yield Row((self.code, human_shape(held.info.shape), _pattern(held.where, letters), trainable, held.owner))
        for _, code, where in held.also:
            yield Row((f"= {code}", Cell("tied", "dim"), _pattern(where, letters), "", ""))


def _pattern(where: str, letters: str) -> str:
    return "".join(letter if letter in where else "-" for letter in letters)


def _lines(tensors: dict[str, Held]) -> Iterator[_Line]:
    root = tree_of((held.info for held in tensors.values()), alike=lambda info: (alike(info), tensors[info.name].where))
    for parts, info in leaves(root):
        held = tensors[info.name]
        yield _Line(held, _ranged(held.code, parts))


def _ranged(code: str, parts: tuple[str, ...]) -> str:
    """`model.layers[0].weight` for the layers 0 to 11: `model.layers[0..11].weight`."""
    at = 0
    for part in parts:
        if part.startswith("{") and (".." in part or "," in part):
            numbers = part[1:-1]
            first = numbers.replace(",", ".").partition(".")[0]
            at = code.find(f"[{first}]", at)
            if at < 0:
                return f"{code} …"
            code = f"{code[:at]}[{numbers}]{code[at + len(first) + 2 :]}"
            at += len(numbers) + 2
        elif part.isdecimal():
            at = max(code.find(f"[{part}]", at), 0) + len(part) + 2
    return code


# --- one name -------------------------------------------------------------------------------------


def _of_name(name: str, context: Context, access: Access, held: dict[str, Held], absent: list[Absent]) -> ExplainedName:
    spelled = name.removeprefix("model").removeprefix(".") if name.startswith(("model.", "model[")) else name
    spelled = plain_name(spelled)
    found = context.source.find(spelled) or context.source.find(name)
    if found is not None:
        return ExplainedName(found, tuple(_sentences(held[found], context)), held[found])
    for wanted in (spelled, name):
        reasons = [each for each in absent if wanted in each.names or wanted in each.inside]
        if reasons:
            return ExplainedName(wanted, tuple(_absent_sentences(wanted, reasons, access)), None, tuple(reasons))
        below = [each for each in held if each.startswith(f"{wanted}.") or not wanted]
        if below:
            return ExplainedName(wanted, tuple(_module_sentences(wanted, below, held, access)))
    also = (each for reason in absent for each in (*reason.names, *reason.inside))
    aliases = (alias for each in held.values() for alias, _, _ in each.also)
    raise UnknownName.among(spelled, held, context.source.label, aliases=chain(aliases, also))


def _absent_sentences(name: str, reasons: list[Absent], access: Access) -> Iterator[str]:
    for reason in reasons:
        where = f"{name} is in " if name in reason.inside else ""
        code = reason.codes[reason.names.index(name)] if name in reason.names else reason.codes[0]
        cure = f" {reason.cure}." if reason.cure else ""
        yield f"{where}{code}: {reason.why}{cure}"


def _module_sentences(path: str, below: list[str], held: dict[str, Held], access: Access) -> Iterator[str]:
    parameters = [each for each in below if held[each].info.kind == "parameter"]
    buffers = len(below) - len(parameters)
    has = plural(len(parameters), "parameter") + (f" and {plural(buffers, 'buffer')}" if buffers else "")
    kind = type(access.owner(f"{path}.x")).__name__
    yield f"{access.module(path)} is a module, {kind}, with {has}: {listed(below, 6)}."
    yield f"list({access.module(path)}.parameters()) gives its parameters; the selector {path}.** names them."


def _sentences(held: Held, context: Context) -> Iterator[str]:
    info, code = held.info, held.code
    parent = code.rpartition(".")[0] if "." in code else code
    size = "lazy, without a shape yet"
    if info.shape is not None:
        elements = f"{plural(info.numel, 'element')} of {info.dtype}"
        size = f"{human_shape(info.shape)}, {elements}, {human_bytes(info.nbytes)} on {info.device}"
    buffer = info.kind == "buffer"
    state = "" if buffer else "trainable " if info.requires_grad else "frozen "
    yield f"{code} is a {state}{info.kind} of {parent} ({held.owner}): {size}."
    if buffer:
        saved = "buffers() and state_dict() give it" if info.persistent else "buffers() gives it"
        others = "parameters() does" if info.persistent else "parameters() and state_dict() do"
        yield f"{saved}; {others} not. No optimizer steps a buffer."
    else:
        yield "parameters(), named_parameters() and state_dict() give it; buffers() does not."
        if not info.requires_grad:
            yield "It is frozen: requires_grad is False, so backward() computes no gradient for it."
    if held.also:
        others = listed([also for _, also, _ in held.also])
        yield f"It is tied: {others} is the same tensor. parameters() gives it once, state_dict() under each name."
    if context.optimizers and not buffer:
        yield _stepped(held, context)


def _stepped(held: Held, context: Context) -> str:
    if held.group is None:
        which = listed(dict.fromkeys(type(optimizer).__name__ for optimizer in context.optimizers))
        return f"The optimizer {which} does not have it: no step changes it."
    group = next(group for group in context.groups if group.place == held.group)
    told = {key: group.options.get(key) for key in ("lr", "weight_decay")}
    options = [f"{key}={value:g}" for key, value in told.items() if isinstance(value, int | float)]
    return f"The optimizer {type(group.optimizer).__name__} has it in {group.place}, with {', '.join(options)}."
