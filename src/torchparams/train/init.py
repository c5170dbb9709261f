"""Initialisation by rules, each parameter from a random stream of its own.

A network that is built with one seed draws all its values from one stream, in the order of its layers: a layer more,
and everything behind it is another network. Here the stream of a parameter begins at `stream_seed(seed, name)`, so its
values hang on the seed, its name, its shape and type and the function, and on nothing else: not on its strides either.
(And on PyTorch: its generators on the CPU and on a GPU differ, and may change from version to version.)
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from typing import TYPE_CHECKING, Any

from torchparams.errors import OptionError, shorten
from torchparams.left_out import LeftOut, left_out_lines
from torchparams.render.result import Result
from torchparams.render.rows import ROWS_SHOWN
from torchparams.render.tree import (
    Cell,
    Column,
    Report,
    Row,
    Table,
    Text,
    cut,
    human_shape,
    listed,
    plural,
)
from torchparams.sources.live.traverse import list_tensors
from torchparams.train._live import Chosen, choose, refuse_codes
from torchparams.train._memory import all_or_nothing, give_memory, putting_back
from torchparams.train.apply import call_in_place, function_name, refuse_without_values
from torchparams.train.rules import rule_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import nn

    from torchparams.selectors import Selector
    from torchparams.train.rules import Rule


def init(
    model: object,
    *rules: Rule | tuple[object, Callable[..., Any]],
    seed: int | None = None,
    device: torch.device | str = "cpu",
) -> Initialised:
    """Initialise parameters by rules, in place; a later rule wins over an earlier one.

    Each parameter has its own random stream, from the seed and its name: adding, removing or reordering layers changes
    no other parameter. A function with an argument `generator`, as those of `torch.nn.init` have, gets one. Any other
    runs with PyTorch's global generators seeded for it; those of the CPU and of CUDA devices are put back afterwards.

    A parameter on the meta device that a rule reaches gets memory on `device`, and stays the same object: ties and an
    optimizer's references hold. So do the buffers of a normalisation layer that knows how to reset them, once its
    parameters have their memory. Other buffers stay on the meta device and are listed: only the code that made them
    knows what is in them. (Select them, from `torchparams.of(model, buffers=True)`, and give them a rule.)

    All that is asked for is done or nothing: if a function raises, every tensor gets back the values that it had, which
    are kept in memory until then, and those of the meta device go back there.

    Args:
        model: A live `nn.Module`, or a `Parameters` of one.
        rules: Pairs of a selector and a function, or the same made by `rule`. The function takes a tensor and changes
            it, or returns new values, as in `apply_`; `functools.partial` gives it options. Every selector has to hit
            something.
        seed: Where all streams begin; None draws one from PyTorch's global generator, and the result tells which.
        device: Where a parameter on the meta device gets its memory.

    Returns:
        What was done, and what no rule has reached: that is left as it is.

    Raises:
        NoMatch: A part of a selector hits nothing.
        OptionError: There is no rule, one is no pair, a function returned no tensor, or `device` has no memory.
        MismatchError: A function returned a tensor of another shape.
        NotReadable: A rule reaches a lazy parameter, or one on the meta device that cannot get memory, as those of
            torch's recurrent layers, which hold weak references to theirs.

    >>> from functools import partial
    >>> from torch import nn
    >>> import torchparams as tp
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    >>> rules = [("[ndim>=2]", partial(nn.init.kaiming_normal_, a=0.1)), ("{0,2}.bias", nn.init.zeros_)]
    >>> print(tp.init(model, *rules, seed=0))
    Sequential: initialised 4 of 6 tensors, seed 0
    name      shape   function                rule
    0.weight  [4, 3]  kaiming_normal_(a=0.1)  [ndim>=2]
    0.bias    [4]     zeros_                  {0,2}.bias
    2.weight  [2, 4]  kaiming_normal_(a=0.1)  [ndim>=2]
    2.bias    [2]     zeros_                  {0,2}.bias
    no rule reached 2 tensors: 1.weight, 1.bias
    """
    chosen = choose(model, None, "torchparams.init")
    import torch

    if not rules:
        raise OptionError(
            "init has no rules, and would initialise nothing",
            where=chosen.source.label,
            hint="give some, as in torchparams.init(model, ('**.bias', torch.nn.init.zeros_), seed=0)",
        )
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()).item())
    elif not isinstance(seed, int) or isinstance(seed, bool):
        raise OptionError(f"a seed is a whole number, not {seed!r}")
    parsed = [_rule(given) for given in rules]
    records = chosen.records.only(frozenset(chosen.names))
    of_name: dict[str, int] = {}
    for place, (selector, _, strict) in enumerate(parsed):
        of_name.update(dict.fromkeys(selector.names(records, strict=strict, where=chosen.source.label), place))
    reached = {name: chosen.tensors[name] for name in chosen.names if name in of_name}
    refuse_without_values(reached, chosen.source.label, meta=True)
    refuse_codes(chosen.source, reached, "init")
    materialised = {name: tensor for name, tensor in reached.items() if tensor.device.type == "meta"}
    with all_or_nothing() as undo:
        undo.append(give_memory(materialised, device, where=chosen.source.label))
        undo += [putting_back(tensor) for name, tensor in reached.items() if name not in materialised]
        _run(reached, {name: parsed[place][1] for name, place in of_name.items()}, seed)
        reset, without = _buffers_of_meta(chosen, device, undo) if materialised else ([], [])
    without = [n for n in chosen.names if n not in of_name and chosen.tensors[n].device.type == "meta"] + without
    return Initialised(
        chosen.source.label,
        seed,
        tuple((str(selector), function_name(function)) for selector, function, _ in parsed),
        {name: of_name[name] for name in reached},
        {name: tuple(tensor.shape) for name, tensor in reached.items()},
        tuple(name for name in chosen.names if name not in of_name),
        tuple(materialised),
        tuple(reset),
        tuple(without),
        chosen.left_out,
    )


def stream_seed(seed: int, name: str) -> int:
    """Where the random stream of the parameter `name` begins: 64 bits of BLAKE2b over the seed and the name.

    >>> stream_seed(0, "fc.weight")
    724032659631955638
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(errors="surrogatepass"), digest_size=8).digest())


def _rule(given: object) -> tuple[Selector, Callable[..., Any], bool]:
    parsed = rule_of(given)
    if parsed.function is None:
        raise OptionError(
            f"the rule for `{shorten(str(parsed.selector))}` has options of an optimizer, and init takes functions",
            hint="write (selector, torch.nn.init.zeros_), or give the rule to torchparams.groups",
        )
    return parsed.selector, parsed.function, parsed.strict


def _run(tensors: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]], seed: int) -> None:
    import torch

    takes = {id(function): _takes_generator(function) for function in functions.values()}
    generators: dict[torch.device, torch.Generator] = {}
    cuda = sorted({tensor.device.index or 0 for tensor in tensors.values() if tensor.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=cuda):
        for name, tensor in tensors.items():
            function, start, device = functions[name], stream_seed(seed, name), tensor.device
            if not takes[id(function)]:
                # Seeding every device takes its time, and a function of a tensor on the CPU draws there.
                (torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed)(start)
                _call(function, tensor, name)
                continue
            if device not in generators:
                generators[device] = torch.Generator(device)
            _call(function, tensor, name, generator=generators[device].manual_seed(start))


def _call(function: Callable[..., Any], tensor: Any, name: str, **options: Any) -> None:
    """Initialise one tensor; the values do not hang on its strides, in the order of which torch draws."""
    import torch

    if tensor.layout is not torch.strided or tensor.is_contiguous():
        call_in_place(function, tensor, name, "init", **options)
        return
    straight = tensor.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(tensor, torch.nn.Parameter):
        straight = torch.nn.Parameter(straight, tensor.requires_grad)
    vars(straight).update(vars(tensor))
    call_in_place(function, straight, name, "init", **options)
    tensor.copy_(straight)


def _takes_generator(function: Callable[..., Any]) -> bool:
    here: Any = function
    while isinstance(here, functools.partial):
        if "generator" in here.keywords:
            return False  # the caller has one already
        here = here.func
    try:
        parameter = inspect.signature(here).parameters.get("generator")
    except (TypeError, ValueError):  # a method of a tensor, written in C
        return False
    return parameter is not None and parameter.kind is not parameter.POSITIONAL_ONLY


# --- the meta device ------------------------------------------------------------------------


def _buffers_of_meta(
    chosen: Chosen, device: torch.device | str, undo: list[Callable[[], None]]
) -> tuple[list[str], list[str]]:
    """Reset the statistics of normalisation layers; what has been reset, and what is still without memory."""
    listing = list_tensors(chosen.source.module, True)
    layers: dict[int, tuple[nn.Module, list[str]]] = {}
    for (name, tensor), owner in zip(listing.tensors.items(), listing.owners, strict=True):
        if name in listing.buffers and tensor.device.type == "meta":
            layers.setdefault(id(owner), (owner, []))[1].append(name)
    reset: list[str] = []
    without: list[str] = []
    for owner, names in layers.values():
        knows = callable(getattr(owner, "reset_running_stats", None))
        if knows and not any(parameter.device.type == "meta" for parameter in owner.parameters()):
            buffers = {name: listing.tensors[name] for name in names}
            undo.append(give_memory(buffers, device, where=chosen.source.label))
            owner.reset_running_stats()  # type: ignore[operator]  # callable, as just seen
            reset += names
        else:
            without += names
    return reset, without


# --- what was done --------------------------------------------------------------------------


class Initialised(Result):
    """What `init` has done.

    Attributes:
        label: The model.
        seed: Where all streams began.
        rules: The selector and the function of each rule, as text.
        by: Name of each tensor that was initialised → place of the rule that did it, in the model's order.
        shapes: Name → shape, of the same.
        untouched: Tensors that no rule reached.
        materialised: Tensors that were on the meta device and have got memory.
        reset: Buffers of normalisation layers that have got memory and their first values.
        without_values: What is still on the meta device: parameters that no rule reached, and buffers.
        left_out: State of the model outside its parameters and buffers, which was left alone.
    """

    def __init__(
        self,
        label: str,
        seed: int,
        rules: tuple[tuple[str, str], ...],
        by: dict[str, int],
        shapes: dict[str, tuple[int, ...]],
        untouched: tuple[str, ...],
        materialised: tuple[str, ...],
        reset: tuple[str, ...],
        without_values: tuple[str, ...],
        left_out: tuple[LeftOut, ...] = (),
    ) -> None:
        self.label = label
        self.seed = seed
        self.rules = rules
        self.by = by
        self.shapes = shapes
        self.untouched = untouched
        self.materialised = materialised
        self.reset = reset
        self.without_values = without_values
        self.left_out = left_out

    @property
    def names(self) -> tuple[str, ...]:
        """What was initialised, in the model's order."""
        return tuple(self.by)

    def report(self, *, limit: int | None = ROWS_SHOWN) -> Report:
        """What was done, as a report.

        Args:
            limit: Most tensors to list; None for all.
        """
        rows = []
        for name, place in self.by.items():
            selector, function = self.rules[place]
            rows.append(Row((name, human_shape(self.shapes[name]), function, Cell(selector, "dim"))))
        columns = (
            Column("name", style="name", shrink=True),
            Column("shape", drop=1),
            Column("function"),
            Column("rule", shrink=True, yields=True),
        )
        every = len(self.by) + len(self.untouched)
        title = f"{self.label}: initialised {len(self.by):,} of {plural(every, 'tensor')}, seed {self.seed}"
        parts: list[Text | Table] = [Text(title, "title"), Table(columns, cut(rows, limit, "tensors"))]
        for names, text, style in (
            (self.untouched, "no rule reached {}: {}", "warn"),
            (self.materialised, "{} got memory: {}", ""),
            (self.reset, "reset the statistics in {}: {}", ""),
            (self.without_values, "{} on the meta device, without values: {}", "error"),
        ):
            if names:
                parts.append(Text(text.format(plural(len(names), "tensor"), listed(names)), style))
        return Report((*parts, *left_out_lines(self.left_out)))

    def to_json(self) -> dict[str, Any]:
        """What was done, as JSON takes it."""
        return {
            "seed": self.seed,
            "rules": [{"selector": selector, "function": function} for selector, function in self.rules],
            "by": dict(self.by),
            "untouched": list(self.untouched),
            "materialised": list(self.materialised),
            "reset": list(self.reset),
            "without_values": list(self.without_values),
            "left_out": [each.to_json() for each in self.left_out],
        }
