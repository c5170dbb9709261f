"""Initialisation by rules, with a separate random stream for each parameter.

A network built with one seed draws all its values from one stream, in the order of its layers: adding a layer changes
the values of all later ones. Here `stream_seed(seed, name)` seeds the stream of a parameter, so its values depend only
on the seed, its name, shape and dtype, and the function; not on its strides. (They also depend on PyTorch: its
generators on the CPU and on a GPU differ, and may change between versions.)
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.errors import OptionError, shorten
from torchparams.left_out import LeftOut, left_out_lines
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
    human_shape,
    listed,
    plural,
)
from torchparams.sources.live.sharding import is_dtensor
from torchparams.sources.live.traverse import list_tensors
from torchparams.train._live import Chosen, choose, refuse_codes
from torchparams.train._memory import all_or_nothing, give_memory, putting_back
from torchparams.train._shards import put_whole, refuse_flat
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
    """Initialise parameters by rules, in place; a later rule overrides an earlier one.

    Each parameter has its own random stream, seeded by the seed and its name: adding, removing or reordering layers
    changes no other parameter. A function with an argument `generator`, as in `torch.nn.init`, gets a generator. Other
    functions run with PyTorch's global generators seeded; those of the CPU and of CUDA devices are restored afterwards.

    A parameter on the meta device that a rule matches gets memory on `device`, and stays the same object: ties and
    references in an optimizer remain valid. When the parameters of a normalisation layer have memory, its buffers get
    memory and are reset, if the layer has a reset method. Other buffers stay on the meta device and are listed, because
    their values are unknown. (To initialise them, select them from `torchparams.of(model, buffers=True)` with a rule.)

    Sharded parameters (DTensors) get the values that they would have in the unsharded model: each rank draws the whole,
    one parameter at a time, and keeps its part. Nothing is communicated, so all ranks have to make the call, with the
    same seed; the function has to set every value. Parameters in FSDP1's flat parameter are refused outside of
    `summon_full_params`.

    Either all rules are applied or none: if a function raises, every tensor is restored, and tensors of the meta device
    return to it. The old values are kept in memory until the end of the call.

    Args:
        model: A live `nn.Module`, or a `Parameters` of one.
        rules: Pairs of a selector and a function, or rules made by `rule`. The function changes its tensor or returns
            new values, as in `apply_`; use `functools.partial` for options. Every selector must match something.
        seed: Seed of all streams; None draws one from PyTorch's global generator, and the result has it.
        device: Device of the memory for parameters on the meta device.

    Returns:
        The initialised tensors, and those that no rule matched, which are not changed.

    Raises:
        NoMatch: A part of a selector matches nothing.
        OptionError: There is no rule, a rule is not a pair, a function did not return a tensor, or `device` has no
            memory.
        MismatchError: A function returned a tensor of a different shape.
        NotReadable: A rule matches a lazy parameter, or one on the meta device that cannot get memory. Torch's
            recurrent layers hold weak references to their parameters, so these cannot.

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
            "init() needs at least one rule",
            where=chosen.source.label,
            hint="pass rules, as in torchparams.init(model, ('**.bias', torch.nn.init.zeros_), seed=0)",
        )
    if seed is None:
        sharded = next((name for name in chosen.names if is_dtensor(chosen.tensors[name])), None)
        if sharded is not None:
            raise OptionError(
                f"init of sharded parameters needs a seed, and {sharded} is one",
                where=chosen.source.label,
                hint="pass the same seed= on every rank",
            )
        seed = int(torch.randint(2**63 - 1, ()).item())
    elif not isinstance(seed, int) or isinstance(seed, bool):
        raise OptionError(f"`seed` must be a whole number, not {seed!r}")
    parsed = [_rule(given) for given in rules]
    reading = chosen.reading.only(frozenset(chosen.names))
    of_name: dict[str, int] = {}
    for place, (selector, _, strict) in enumerate(parsed):
        of_name.update(dict.fromkeys(selector.names(reading, strict=strict, where=chosen.source.label), place))
    reached = {name: chosen.tensors[name] for name in chosen.names if name in of_name}
    refuse_without_values(reached, chosen.source.label, meta=True)
    refuse_codes(chosen.source, reached, "init")
    refuse_flat(chosen.reading, reached, chosen.source.label)
    materialised = {name: tensor for name, tensor in reached.items() if tensor.device.type == "meta"}
    with all_or_nothing() as undo:
        undo.append(give_memory(materialised, device, where=chosen.source.label))
        undo += [putting_back(tensor) for name, tensor in reached.items() if name not in materialised]
        _run(reached, {name: parsed[place][1] for name, place in of_name.items()}, seed, chosen.source.label)
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
    """Seed of the random stream of the parameter `name`: 64 bits of BLAKE2b over the seed and the name.

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


def _run(tensors: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]], seed: int, where: str) -> None:
    import torch

    takes = {id(function): _takes_generator(function) for function in functions.values()}
    generators: dict[torch.device, torch.Generator] = {}
    cuda = sorted({tensor.device.index or 0 for tensor in tensors.values() if tensor.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=cuda):
        for name, tensor in tensors.items():
            function, device = functions[name], tensor.device
            if takes[id(function)] and device not in generators:
                generators[device] = torch.Generator(device)
            generator = generators[device] if takes[id(function)] else None
            draw = functools.partial(_draw, function, name, stream_seed(seed, name), generator)
            if is_dtensor(tensor):
                _draw_whole(draw, tensor, name, where)
            else:
                draw(tensor)


def _draw(
    function: Callable[..., Any], name: str, start: int, generator: torch.Generator | None, tensor: torch.Tensor
) -> None:
    """Initialise one tensor with its own random stream."""
    import torch

    if generator is not None:
        _call(function, tensor, name, generator=generator.manual_seed(start))
        return
    # Seeding every device is slow, and a function of a CPU tensor draws on the CPU.
    (torch.default_generator.manual_seed if tensor.device.type == "cpu" else torch.manual_seed)(start)
    _call(function, tensor, name)


def _draw_whole(draw: Callable[[Any], None], tensor: Any, name: str, where: str) -> None:
    """Initialise a DTensor: every rank makes the whole, as for a plain tensor, and keeps its part of it."""
    import torch

    fills = (math.nan, math.nan) if tensor.dtype.is_floating_point or tensor.dtype.is_complex else (0, 1)
    whole = _filled(tensor, fills[0])
    draw(whole)
    if whole.dtype.is_floating_point or whole.dtype.is_complex:
        kept = bool((whole.float() if whole.element_size() == 1 else whole).isnan().any())
    else:
        other = _filled(tensor, fills[1])
        draw(other)
        kept = not torch.equal(whole, other)
    if kept:
        raise OptionError(
            f"the function for {name} leaves some of its old values, or computes with them; no rank has all of them",
            where=where,
            hint="initialise with a function that sets every value, or call torchparams.apply_, which gathers them",
        )
    put_whole(tensor, whole.detach(), name, where)


def _filled(tensor: Any, value: Any) -> Any:
    """A plain parameter or tensor with the shape and the attributes of a DTensor."""
    import torch

    made = torch.full(tuple(tensor.shape), value, dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, torch.nn.Parameter):
        made = torch.nn.Parameter(made, tensor.requires_grad)
    own = {key: kept for key, kept in vars(tensor).items() if key not in ("_spec", "_local_tensor")}
    vars(made).update(own)
    return made


def _call(function: Callable[..., Any], tensor: Any, name: str, **options: Any) -> None:
    """Initialise one tensor. Torch draws in the order of strides, so draw into a contiguous tensor."""
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
            return False  # partial already sets one
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
    """Reset the statistics of normalisation layers. Returns the reset buffers and those still without memory."""
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


# --- results --------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class Initialised(Result):
    """Result of `init`.

    Attributes:
        label: The model.
        seed: Seed of all streams.
        rules: Selector and function of each rule, as text.
        by: Name of each initialised tensor → index of its rule, in the model's order.
        shapes: Name → shape of each initialised tensor.
        untouched: Tensors that no rule matched.
        materialised: Tensors that were on the meta device and got memory.
        reset: Buffers of normalisation layers that got memory and were reset.
        without_values: Tensors still on the meta device: buffers, and parameters that no rule matched.
        left_out: State of the model outside its parameters and buffers; not changed.
    """

    label: str
    seed: int
    rules: tuple[tuple[str, str], ...]
    by: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    untouched: tuple[str, ...]
    materialised: tuple[str, ...]
    reset: tuple[str, ...]
    without_values: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the initialised tensors, in the model's order."""
        return tuple(self.by)

    def tree(self, *, limit: int | None = ROWS_SHOWN) -> Tree:
        """Tree of the initialised tensors.

        Args:
            limit: Maximum number of tensors to list; None for all.
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
        return Tree((*parts, *left_out_lines(self.left_out)))

    def to_json(self) -> dict[str, Any]:
        """The result as JSON data."""
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
