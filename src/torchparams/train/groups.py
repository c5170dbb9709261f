"""Parameter groups for any torch optimizer, from rules on selectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.errors import NoMatch, OptionError, UnsupportedSource
from torchparams.parameters import of
from torchparams.render.tree import plural
from torchparams.train._groups_tree import Groups as Groups
from torchparams.train._groups_tree import Origin as Origin
from torchparams.train._live import refuse_path
from torchparams.train._shards import refuse_copies, refuse_views
from torchparams.train.depth import depths
from torchparams.train.rules import Rule, refuse_wrong, rule_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torchparams.parameters import Parameters
    from torchparams.reading import Reading


def groups(
    model: object,
    /,
    *rules: Rule | tuple[object, Mapping[str, Any]],
    layer_decay: float | None = None,
    depth: object = None,
    **defaults: Any,
) -> Groups:
    """Parameter groups of `model` for any torch optimizer.

    Each trainable parameter is in exactly one group, a tied parameter once. Frozen parameters are left out and listed.
    There is one group for each distinct set of options, so that an optimizer can still step many parameters together.
    Groups are in the order of their first parameters, and parameters are in the model's order. Each group holds
    `param_names`, which the optimizer keeps in its `state_dict`. Rules see the shapes of whole parameters if they are
    sharded; ranks do not communicate.

    Args:
        model: A live `nn.Module`, a `Parameters` of one, or a mapping of names to parameters.
        rules: Made by `rule`, or pairs of a selector and a dict of options; if two set the same option of a
            parameter, the later wins.
        layer_decay: Multiply the `lr` of each parameter by `layer_decay ** (deepest - depth)`, where `deepest` is the
            greatest depth in the model (Clark et al., ELECTRA, 2020; Bao et al., BEiT, 2021).
        depth: Origin of the depth: None for the order of the modules (see `train.depth.blocks_of`); a pattern with `{}`
            for the block's number, such as `"encoder.layer.{}.**"`; or a function of `ParameterInfo`.
        defaults: Options for parameters without a rule for that option. Options set neither here nor in a rule get the
            optimizer's own default.

    Raises:
        NoMatch: A part of a rule's selector matches nothing, or there is no trainable parameter.
        OptionError: A layer decay has no `lr`, no depth, or is out of range; or an option is invalid for any
            optimizer, such as NaN or a negative weight decay.
        UnsupportedSource: The parameters are not live.

    >>> import torch
    >>> import torchparams as tp
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    >>> groups = tp.groups(model, tp.rule(tp.no_decay, weight_decay=0.0), lr=1e-3, weight_decay=0.05)
    >>> optimizer = torch.optim.AdamW(groups)
    >>> [(group["weight_decay"], group["param_names"]) for group in groups]
    [(0.05, ['0.weight', '2.weight']), (0.0, ['0.bias', '1.weight', '1.bias', '2.bias'])]
    """
    refuse_path(model, "torchparams.groups")
    params = of(model)
    parsed = tuple(map(_rule, rules))
    _refuse_wrong(params, layer_decay, depth, defaults)
    reading = _parameters(params.reading())
    tensors = _tensors(params, reading)
    where = params.source.label
    refuse_copies(reading, reading.names, where)
    refuse_views(tensors, where, "groups")
    masks, hits = _masks(parsed, reading, where)
    deep: Iterable[int | None] = [None] * len(reading)
    deepest = 0
    if layer_decay is not None:
        deep, deepest = _depths(params, reading, depth)
    made: dict[tuple[int, int | None], tuple[Origin, dict[str, Any] | None]] = {}
    by_options: dict[Any, dict[str, Any]] = {}
    scaled: dict[tuple[Any, int], Any] = {}
    origins: dict[str, Origin] = {}
    frozen: list[str] = []
    for name, trainable, at in zip(reading.names, reading.column("requires_grad"), deep, strict=True):
        mask = masks.get(name, 0)
        known_origin = made.get((mask, at))
        if known_origin is None:
            origin = _origin(mask, parsed, defaults)
            if layer_decay is not None and at is not None:
                origin = _decayed(origin, at, layer_decay ** (deepest - at), scaled, name, where)
            known_origin = made[mask, at] = (origin, None)
        origin, group = known_origin
        origins[name] = origin
        if not trainable:
            frozen.append(name)
            continue
        if group is None:
            if layer_decay is not None and "lr" not in origin.options:
                raise OptionError(
                    f"a layer decay multiplies the lr, and {name!r} has none",
                    where=where,
                    hint="set one for all: torchparams.groups(model, …, lr=1e-3, layer_decay=0.75)",
                )
            key = frozenset((option, _key(value)) for option, value in origin.options.items())
            group = by_options.get(key)
            if group is None:
                group = by_options[key] = {"params": [], "param_names": [], **origin.options}
            made[mask, at] = (origin, group)
        group["params"].append(tensors[name])
        group["param_names"].append(name)
    if not by_options:
        raise NoMatch(
            "there is no trainable parameter for an optimizer",
            where=where,
            exists=f"{plural(len(frozen), 'parameter')}, all frozen" if frozen else "there are no parameters",
            hint="torchparams.unfreeze(model, selector) makes some trainable" if frozen else None,
        )
    return Groups(
        by_options.values(),
        source=params.source,
        rules=parsed,
        defaults=defaults,
        layer_decay=layer_decay,
        frozen=tuple(frozen),
        origins=origins,
        hits=hits,
    )


def _rule(given: object) -> Rule:
    parsed = rule_of(given)
    if parsed.function is not None:
        raise OptionError(
            f"the rule for `{parsed}` has a function, and groups takes options",
            hint="write torchparams.rule(selector, lr=…, weight_decay=…), or give the rule to torchparams.init",
        )
    return parsed


def _refuse_wrong(params: Parameters, layer_decay: object, depth: object, defaults: Mapping[str, Any]) -> None:
    refuse_wrong(defaults, params.source.label)
    if layer_decay is None:
        if depth is not None:
            raise OptionError("`depth` needs a `layer_decay`", hint="pass layer_decay=0.75 too")
    elif isinstance(layer_decay, bool) or not isinstance(layer_decay, int | float) or not 0 < layer_decay <= 1:
        raise OptionError(
            f"layer_decay must be a factor above 0 and up to 1, not {layer_decay!r}",
            hint="0.75 gives each block three quarters of the rate of the next",
        )
    if not params.source.live:
        raise UnsupportedSource(
            f"an optimizer needs live parameters, not a {params.source.format}",
            where=params.source.label,
            hint="load it into a model with torchparams.load, and pass the model",
        )


def _parameters(reading: Reading) -> Reading:
    """The reading without buffers, which optimizers do not step."""
    kinds = reading.column("kind")
    if "buffer" not in kinds:
        return reading
    return reading.only({name for name, kind in zip(reading.names, kinds, strict=True) if kind != "buffer"})


def _masks(rules: tuple[Rule, ...], reading: Reading, where: str) -> tuple[dict[str, int], tuple[int, ...]]:
    """Parameter name → bit mask of the matching rules, and the number of parameters that each rule matches."""
    masks: dict[str, int] = {}
    hits = []
    for place, one in enumerate(rules):
        names = one.selector.names(reading, strict=one.strict, where=where)
        hits.append(len(names))
        for name in names:
            masks[name] = masks.get(name, 0) | 1 << place
    return masks, tuple(hits)


def _depths(params: Parameters, reading: Reading, depth: object) -> tuple[Iterable[int], int]:
    """Depth of each parameter, and the greatest depth in the model."""
    # For a selection, depths are still those in the whole model, so that several selections agree.
    whole = reading if params.selector is None else _parameters(params.source.reading())
    found = depths(whole, getattr(params.source, "module", None), depth, params.source.label)
    deepest = max(found, default=0)
    if whole is reading:
        return found, deepest
    return map(dict(zip(whole.names, found, strict=True)).__getitem__, reading.names), deepest


def _tensors(params: Parameters, reading: Reading) -> Mapping[str, Any]:
    """Name → parameter."""
    if reading.tensors is not None:
        return reading.tensors
    tensors = dict(params.source.items(reading.names))
    for name, tensor in tensors.items():
        if not hasattr(tensor, "requires_grad"):
            raise UnsupportedSource(
                f"an optimizer needs torch tensors, and {name} is a {type(tensor).__name__}", where=params.source.label
            )
    return tensors


def _origin(mask: int, rules: tuple[Rule, ...], defaults: Mapping[str, Any]) -> Origin:
    options: dict[str, Any] = dict(defaults)
    by: dict[str, int | None] = dict.fromkeys(defaults)
    places = []
    while mask:
        lowest = mask & -mask
        place = lowest.bit_length() - 1
        mask ^= lowest
        places.append(place)
        for option, value in rules[place].options.items():
            options[option] = value
            by[option] = place
    return Origin(options, by, tuple(places))


def _decayed(
    origin: Origin, depth: int, scale: float, scaled: dict[tuple[Any, int], Any], name: str, where: str
) -> Origin:
    if "lr" not in origin.options:
        return Origin(origin.options, origin.by, origin.rules, depth)
    base = origin.options["lr"]
    # A tensor lr (for a capturable optimizer) is multiplied once per depth, not once per set of rules.
    key = (_key(base), depth)
    if key not in scaled:
        try:
            scaled[key] = base * scale
        except TypeError:
            raise OptionError(
                f"a layer decay multiplies the lr, and that of {name!r} is {base!r}", where=where
            ) from None
    return Origin({**origin.options, "lr": scaled[key]}, origin.by, origin.rules, depth, scale)


def _key(value: Any) -> Any:
    """Key that is equal for equal options; tensors and unhashable values are compared by identity."""
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_key, value))
    if isinstance(value, dict):
        return dict, tuple((key, _key(item)) for key, item in value.items())
    if value is None or isinstance(value, int | float | complex | str | bytes):
        return value
    return id(value)
