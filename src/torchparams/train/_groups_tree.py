"""Parameter groups with the origin of their options, as a table and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.errors import OptionError, UnknownName, shorten
from torchparams.left_out import left_out_lines
from torchparams.render.result import Result
from torchparams.render.tree import (
    Cell,
    Column,
    Row,
    Table,
    Text,
    Tree,
    cut,
    human_count,
    listed,
    plural,
    printable,
)
from torchparams.train._explained import Explained, Given
from torchparams.train._options import plain, text
from torchparams.train.rules import TAKEN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torchparams.left_out import LeftOut
    from torchparams.sources.base import Source
    from torchparams.train.rules import Rule


LONGEST_SPELLED = 20
"""Maximum length of a selector in parameter rows; if one is longer, the rows show rule numbers instead."""

DEFAULTS = "defaults"
"""Label for options given in the call of `groups` and not by a rule."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Origin of the options of parameters; parameters matched by the same rules share one.

    Attributes:
        options: Name of the option → its value.
        by: Name of the option → index of the rule that gave it; None for the defaults.
        rules: Indices of all matching rules, in order; a later rule wins.
        depth: Depth in the network, with a layer decay; otherwise None.
        scale: Factor by which the layer decay multiplied the `lr`.
    """

    options: Mapping[str, Any]
    by: Mapping[str, int | None]
    rules: tuple[int, ...]
    depth: int | None = None
    scale: float = 1.0


class Groups(Result, list[dict[str, Any]]):
    """Parameter groups: a list of dicts for any torch optimizer, which records the origin of each option.

    Made by `groups`. Each dict holds `params`, their `param_names`, and the options. The list is ordinary: it shows the
    changes that an optimizer or a scheduler makes to the dicts. It prints as a table of every parameter with its
    options and the rule that gave them.

    Attributes:
        rules: The rules, in the given order.
        defaults: Options for parameters without a rule for that option.
        layer_decay: Factor from one depth to the next lower one, or None.
        frozen: Names of parameters that are left out because they are frozen.
        origins: Parameter name → origin of its options; frozen parameters included.
        hits: Number of parameters that each rule matches, frozen ones included.
        source: Source of the parameters.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]] = (),
        *,
        source: Source | None = None,
        rules: tuple[Rule, ...] = (),
        defaults: Mapping[str, Any] | None = None,
        layer_decay: float | None = None,
        frozen: tuple[str, ...] = (),
        origins: Mapping[str, Origin] | None = None,
        hits: tuple[int, ...] = (),
    ) -> None:
        super().__init__(groups)
        self.source = source
        self.rules = rules
        self.defaults: Mapping[str, Any] = defaults or {}
        self.layer_decay = layer_decay
        self.frozen = frozen
        self.origins: Mapping[str, Origin] = origins or {}
        self.hits = hits

    @property
    def names(self) -> list[str]:
        """Names of all parameters in the groups, group by group."""
        return [name for group in self for name in group.get("param_names", ())]

    @property
    def label(self) -> str:
        """Label of the model."""
        return "a model" if self.source is None else self.source.label

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """State of the model outside its parameters and buffers, which no optimizer trains."""
        return () if self.source is None else self.source.left_out

    def split(self, option: str) -> dict[Any, Groups]:
        """Split the groups by the value of an option, for several optimizers. The option is removed from the groups.

        Args:
            option: The option, such as `optimizer` in `rule("[ndim=2]", optimizer="muon")`.

        Returns:
            Value → its groups, in the order of the model; the key None has the groups without the option.

        Raises:
            OptionError: No group has it.

        >>> import torch
        >>> import torchparams as tp
        >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 2))
        >>> by = tp.groups(model, tp.rule("[ndim=2] & ~:embedding", optimizer="muon"), lr=0.1).split("optimizer")
        >>> {value: groups.names for value, groups in by.items()}
        {None: ['0.weight', '1.bias'], 'muon': ['1.weight']}
        >>> by["muon"][0].keys()
        dict_keys(['params', 'param_names', 'lr'])
        """
        if not any(option in group for group in self):
            given = sorted({name for group in self for name in group if name not in TAKEN})
            raise OptionError(
                f"no group has the option {option!r} to split by",
                where=self.label,
                exists=f"the options are {', '.join(given)}" if given else "the groups have no options",
                hint=f"set it in a rule: torchparams.rule(selector, {option}=…)",
            )
        parts: dict[Any, list[dict[str, Any]]] = {}
        for group in self:
            kept = {name: value for name, value in group.items() if name != option}
            parts.setdefault(group.get(option), []).append(kept)
        return {value: self._with(part) for value, part in parts.items()}

    def _with(self, groups: list[dict[str, Any]]) -> Groups:
        return Groups(
            groups,
            source=self.source,
            rules=self.rules,
            defaults=self.defaults,
            layer_decay=self.layer_decay,
            frozen=self.frozen,
            origins=self.origins,
            hits=self.hits,
        )

    def explain(self, name: str) -> Explained:
        """Explain the options of one parameter, with the rules that gave them and those that were overridden.

        Args:
            name: Any spelling of the parameter's name.

        Raises:
            UnknownName: The model has no such parameter, or these groups do not hold it.
        """
        return explain(self, self._canonical(name))

    def _canonical(self, name: str) -> str:
        if name in self.origins or self.source is None:
            return name
        found = self.source.find(name)
        if found is None or found not in self.origins:
            raise UnknownName.among(name, self.origins, self.label)
        return found

    def tree(self, *, limit: int | None = 40) -> Tree:
        """The groups as a tree, as printed.

        Args:
            limit: Maximum number of parameters to list; None for all.
        """
        return _tree(self, limit)

    def to_json(self) -> dict[str, Any]:
        """The groups as JSON data: options and names, without tensors."""
        return to_json(self)

    def _title(self) -> str:
        return f"Groups of {self.label}"


# --- all of them ---------------------------------------------------------------------------------


def _tree(groups: Groups, limit: int | None) -> Tree:
    """Tree of the groups, the rules, and every parameter with its options and their origin."""
    options = _options(groups)
    count = sum(len(group["params"]) for group in groups)
    parts: list[Text | Table] = [
        Text(
            printable(f"{plural(len(groups), 'group')} of {groups.label}: {plural(count, 'parameter tensor')}"),
            "title",
        ),
        _group_table(groups, options),
    ]
    if groups.rules:
        parts += [Text(""), _rule_table(groups)]
    parts += [Text(""), _parameter_table(groups, options, limit)]
    if groups.frozen:
        text = f"left out, frozen: {plural(len(groups.frozen), 'tensor')}: {listed(groups.frozen)}"
        parts.append(Text(printable(text), "dim"))
    return Tree((*parts, *left_out_lines(groups.left_out)))


def _options(groups: Groups) -> list[str]:
    """Names of the options given by the defaults or a rule, without options added by an optimizer."""
    given = dict.fromkeys((*groups.defaults, *(option for rule in groups.rules for option in rule.options)))
    return [option for option in given if any(option in group for group in groups)]


def _group_table(groups: Groups, options: Sequence[str]) -> Table:
    columns = (
        Column("group", right=True),
        Column("tensors", right=True, style="number"),
        Column("parameters", right=True, style="number"),
        *(Column(option, right=True) for option in options),
    )
    rows = [
        Row(
            (
                str(place),
                f"{len(group['params']):,}",
                human_count(_numel(group["params"])),
                *(_value(group, option) for option in options),
            )
        )
        for place, group in enumerate(groups)
    ]
    return Table(columns, cut(rows, 40, "groups"))


def _rule_table(groups: Groups) -> Table:
    numbered = _numbered(groups)
    columns = (
        *([Column("rule", right=True), Column("selector", style="name", shrink=True)] if numbered else []),
        *([] if numbered else [Column("rule", style="name", shrink=True)]),
        Column("hits", right=True, style="number"),
        Column("sets"),
    )
    rows = [
        Row(
            (
                *([str(place)] if numbered else []),
                shorten(str(rule), 100),
                Cell(f"{hits:,}", "" if hits else "warn"),
                ", ".join(f"{option}={text(value)}" for option, value in rule.options.items()),
            )
        )
        for place, (rule, hits) in enumerate(zip(groups.rules, groups.hits, strict=True))
    ]
    return Table(columns, cut(rows, 40, "rules"))


def _numbered(groups: Groups) -> bool:
    """True if rows show rule numbers, because some selector is too long to repeat in every row."""
    return any(len(str(rule)) > LONGEST_SPELLED for rule in groups.rules)


def _parameter_table(groups: Groups, options: Sequence[str], limit: int | None) -> Table:
    decayed = groups.layer_decay is not None
    columns = (
        Column("parameter", style="name", shrink=True),
        Column("group", right=True),
        *(Column(option, right=True, drop=drop) for drop, option in enumerate(options)),
        *([Column("depth", right=True, drop=1)] if decayed else []),
        Column("given by", style="dim", shrink=True, yields=True, drop=len(options) + 1),
    )
    places = places_of(groups)
    # Cut first, so that only the shown rows are built.
    kept = cut([Row((name,)) for name in groups.origins if name in places], limit, "parameters")

    def row(name: str) -> Row:
        origin, place = groups.origins[name], places[name]
        group = groups[place]
        depth = [] if not decayed else ["" if origin.depth is None else str(origin.depth)]
        values = (_value(group, option) for option in options)
        return Row((name, str(place), *values, *depth, _given_by(groups, origin, group)))

    return Table(columns, tuple(row(str(line.cells[0])) if isinstance(line, Row) else line for line in kept))


def places_of(groups: Groups) -> dict[str, int]:
    """Name → index of the parameter's group."""
    return {name: place for place, group in enumerate(groups) for name in group.get("param_names", ())}


def _value(group: dict[str, Any], option: str) -> Cell | str:
    return text(group[option]) if option in group else Cell("–", "dim")


def _given_by(groups: Groups, origin: Origin, group: dict[str, Any]) -> str:
    """Origin of the options. Defaults are omitted if a rule gave other options."""
    givers: dict[str, list[str]] = {}
    numbered = _numbered(groups)
    for option in origin.options:
        if option in group:
            by = giver(groups, origin, option, group, numbered=numbered)
            givers.setdefault(by, []).append(option)
    if len(givers) == 1:
        return next(iter(givers))
    return "; ".join(f"{', '.join(options)}: {by}" for by, options in givers.items() if by != DEFAULTS)


def giver(
    groups: Groups, origin: Origin, option: str, group: dict[str, Any] | None = None, *, numbered: bool = False
) -> str:
    """Origin of an option: a rule or the defaults, with any layer decay, or "changed since"."""
    if group is not None and option in group and not _same(group[option], origin.options[option]):
        return "changed since"  # by a scheduler, or by code that holds the dict
    place = origin.by[option]
    if place is None:
        by = DEFAULTS
    else:
        by = f"rule {place}" if numbered else shorten(str(groups.rules[place]), 100)
    if option == "lr" and origin.scale != 1:
        return f"{by} × {origin.scale:.4g}"
    return by


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    try:
        return bool(a == b)
    except Exception:  # tensors and arrays with several values are compared by identity only
        return False


def _numel(tensors: Iterable[Any]) -> int:
    from torch.nn.parameter import is_lazy

    return sum(0 if is_lazy(tensor) else tensor.numel() for tensor in tensors)


# --- JSON ----------------------------------------------------------------------------------------


def to_json(groups: Groups) -> dict[str, Any]:
    """The groups as JSON data."""
    places = places_of(groups)
    return {
        "model": groups.label,
        "layer_decay": groups.layer_decay,
        "defaults": {option: plain(value) for option, value in groups.defaults.items()},
        "rules": [
            {
                "selector": str(rule),
                "strict": rule.strict,
                "hits": hits,
                "options": {option: plain(value) for option, value in rule.options.items()},
            }
            for rule, hits in zip(groups.rules, groups.hits, strict=True)
        ],
        "groups": [
            {
                "options": {option: plain(value) for option, value in group.items() if option not in TAKEN},
                "names": list(group.get("param_names", ())),
                "tensors": len(group["params"]),
                "numel": _numel(group["params"]),
            }
            for group in groups
        ],
        "parameters": {
            name: {
                "group": places[name],
                "depth": origin.depth,
                # Index of the rule that gave each option; null for the defaults.
                "by": dict(origin.by),
            }
            for name, origin in groups.origins.items()
            if name in places
        },
        "frozen": list(groups.frozen),
        "left_out": [each.to_json() for each in groups.left_out],
    }


# --- one of them ---------------------------------------------------------------------------------


def explain(groups: Groups, name: str) -> Explained:
    """Explain the options of the parameter with the canonical name `name`."""
    origin = groups.origins.get(name)
    place = next((place for place, group in enumerate(groups) if name in group.get("param_names", ())), None)
    if origin is None or (place is None and name not in set(groups.frozen)):
        raise UnknownName.among(name, groups.names, groups.label)
    group = None if place is None else groups[place]
    given = []
    for option, value in origin.options.items():
        if group is not None and option not in group:
            continue  # split by it
        winner = origin.by[option]
        instead = [
            (shorten(str(groups.rules[rule]), 100), groups.rules[rule].options[option])
            for rule in reversed(origin.rules)
            if rule != winner and option in groups.rules[rule].options
        ]
        if winner is not None and option in groups.defaults:
            instead.append((DEFAULTS, groups.defaults[option]))
        now = value if group is None else group[option]
        given.append(Given(option, now, giver(groups, origin, option, group), tuple(instead)))
    rules = tuple(str(groups.rules[rule]) for rule in origin.rules)
    return Explained(name, place, origin.depth, tuple(given), rules)
