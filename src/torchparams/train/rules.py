"""Rules: options of an optimizer for what a selector hits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import inf, isnan
from numbers import Real
from typing import TYPE_CHECKING, Any

from torchparams._selector.table import is_bias, is_norm
from torchparams.errors import OptionError, shorten
from torchparams.records import FieldFunction
from torchparams.selectors import Selector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TAKEN = ("params", "param_names")
"""Keys of a parameter group that are no options: `groups` writes them."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Options, or a function, for what a selector hits; made by `rule`.

    Attributes:
        selector: What they are for.
        options: Name of the option → its value.
        strict: Whether the selector has to hit something with every part of it.
        function: What initialises it; None of a rule for an optimizer.
    """

    selector: Selector
    options: Mapping[str, Any]
    strict: bool = True
    function: Callable[..., Any] | None = None

    def __str__(self) -> str:
        return str(self.selector).replace("<function no_decay>", "no_decay")


def rule(
    selector: object, function: Callable[..., Any] | None = None, /, *, strict: bool = True, **options: Any
) -> Rule:
    """A rule for what `selector` hits: options of an optimizer for `groups`, or a function for `init`.

    Both also take pairs: `(selector, {"lr": 1e-3})`, `(selector, function)`.

    Args:
        selector: Text in the selector language, a `Selector`, names, or a function of `ParameterInfo`.
        function: For `init`: takes a tensor, and changes it or returns new values.
        strict: Refuse a selector of which some part hits nothing in the model; False for a rule of a model that may not
            have such parameters.
        options: Options of the optimizer, such as `lr` and `weight_decay`; or one of your own to split groups by.

    Raises:
        SelectorSyntaxError: The text is not a selector.
        OptionError: There is no option, or one that is not an option, or a number that no optimizer can use.

    >>> import torch
    >>> import torchparams as tp
    >>> tp.rule("head.**", lr=1e-3).options["lr"]
    0.001
    >>> tp.rule("**.bias", torch.nn.init.zeros_).function.__name__
    'zeros_'
    """
    if function is not None:
        if not callable(function):
            raise not_a_rule((selector, function))
        if options:
            raise OptionError(
                f"the rule for `{shorten(str(Selector.of(selector)))}` has a function and options",
                hint="options are for torchparams.groups, a function is for torchparams.init; "
                "functools.partial gives a function its own options",
            )
        return Rule(Selector.of(selector), {}, strict, function)
    if not options:
        raise OptionError(
            f"the rule for `{shorten(str(Selector.of(selector)))}` has no options",
            hint="say what it sets: torchparams.rule(selector, lr=…, weight_decay=…)",
        )
    refuse_wrong(options, f"the rule for `{shorten(str(Selector.of(selector)))}`")
    return Rule(Selector.of(selector), options, strict)


def rule_of(given: object) -> Rule:
    """What `rule` gave, or a pair, as a rule.

    Raises:
        OptionError: It is neither.

    >>> rule_of(("head.**", {"lr": 1e-3})).options
    {'lr': 0.001}
    """
    if isinstance(given, Rule):
        return given
    if isinstance(given, tuple | list) and len(given) == 2:
        selector, what = given
        if isinstance(what, Mapping) and all(isinstance(key, str) for key in what):
            refuse_wrong(what, f"the rule for `{shorten(str(Selector.of(selector)))}`")
            return Rule(Selector.of(selector), dict(what))
        if callable(what):
            return Rule(Selector.of(selector), {}, True, what)
    raise not_a_rule(given)


def not_a_rule(given: object) -> OptionError:
    """The error for something that is not a rule."""
    return OptionError(
        f"{shorten(repr(given))} is not a rule",
        exists="for groups, a rule is torchparams.rule(selector, lr=…) or (selector, {'lr': …}); for init, it is "
        "torchparams.rule(selector, function) or (selector, function)",
    )


_AT_LEAST_0 = ("lr", "weight_decay", "eps", "momentum", "alpha", "rho", "lr_decay", "initial_accumulator_value")
"""Options that torch's optimizers refuse below zero, as a default; in a group they look at none."""


def refuse_wrong(options: Mapping[str, Any], where: str | None = None) -> None:
    """Refuse options that say what the parameters are, and numbers that would only ruin a training.

    An optimizer checks its defaults, not what stands in a group. So NaN is refused wherever it stands; infinity and
    what is below zero where torch's optimizers do so; and betas outside of [0, 1).

    Args:
        options: Name of the option → its value.
        where: What an error calls what they are for.

    Raises:
        OptionError: There is such an option.
    """
    for name in TAKEN:
        if name in options:
            raise OptionError(f"{name!r} is no option: it is what the groups hold", hint="select with rules")
    for name, value in options.items():
        for number in _numbers(value):
            wrong = None
            if isnan(number):
                wrong = "and NaN makes every parameter NaN"
            elif name == "betas" and not 0 <= number < 1:
                wrong = "and a beta is from 0 on and below 1"
            elif name in _AT_LEAST_0 and not 0 <= number < inf:
                wrong = "and it is a finite number from 0 on"
            if wrong is not None:
                raise OptionError(f"{name} is {shorten(repr(value))}, {wrong}", where=where)


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in an option: itself, those of a tuple, and a tensor of one element that has a value."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, Real) or _is_scalar(value):
        yield float(value)


def _is_scalar(value: Any) -> bool:
    """Whether an option is a tensor of one real number."""
    return hasattr(value, "numel") and value.numel() == 1 and value.device.type != "meta" and not value.is_complex()


# The same classes come again and again.
_is_norm = lru_cache(maxsize=1024)(is_norm)


def _takes_no_decay(name: str, owner: tuple[str | None, tuple[str, ...]], ndim: int | None) -> bool:
    return (ndim is not None and ndim < 2) or _is_norm(owner) or is_bias(name)


no_decay = Selector(FieldFunction("no_decay", ("name", "owner", "ndim"), _takes_no_decay))
"""What weight decay is usually kept from: norms, biases, and whatever has fewer than two dimensions.

A norm is known by the class of its layer (as by `:norm`), a bias by its own name (as by `:bias`); scales and gates of
one number or one row are neither and have fewer than two dimensions. Weight decay pulls a weight towards zero to bound
what a product with it can do, and these are no products' weights: a norm's scale belongs at one.

Embeddings are decayed, as in most training of language models; `no_decay | ":embedding"` leaves them out as well.
It hits something in any usual model, and no part of it need be there: a model without norms is no error. Of a file,
which does not record the classes of layers, it takes the biases and what has fewer than two dimensions.

>>> import torch
>>> import torchparams as tp
>>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm((3, 3)))
>>> tp.of(model).select(tp.no_decay).names
['0.bias', '1.weight', '1.bias']
"""
