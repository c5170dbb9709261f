"""Rules: optimizer options for selected parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import inf, isnan
from numbers import Real
from typing import TYPE_CHECKING, Any

from torchparams._selector.candidates import is_bias, is_norm
from torchparams.errors import OptionError, shorten
from torchparams.reading import FieldFunction
from torchparams.selectors import Selector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TAKEN = ("params", "param_names")
"""Keys of a parameter group that are not options: `groups` writes them."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Optimizer options, or an initialisation function, for selected parameters; made by `rule`.

    Attributes:
        selector: Selector of the parameters.
        options: Name of the option → its value.
        strict: True if every part of the selector must match something.
        function: Function that initialises a parameter; None for optimizer options.
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
    """Make a rule for the parameters that `selector` matches: optimizer options for `groups`, or a function for `init`.

    Both also accept pairs: `(selector, {"lr": 1e-3})`, `(selector, function)`.

    Args:
        selector: Text in the selector language, a `Selector`, names, or a function of `ParameterInfo`.
        function: For `init`: accepts a tensor, and changes it or returns new values.
        strict: Refuse a selector with a part that matches nothing in the model; False for a rule that may match no
            parameters.
        options: Options of the optimizer, such as `lr` and `weight_decay`, or your own option to split groups by.

    Raises:
        SelectorSyntaxError: The text is not a selector.
        OptionError: There are no options, or an option is reserved or invalid for any optimizer.

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
            hint="pass options: torchparams.rule(selector, lr=…, weight_decay=…)",
        )
    refuse_wrong(options, f"the rule for `{shorten(str(Selector.of(selector)))}`")
    return Rule(Selector.of(selector), options, strict)


def rule_of(given: object) -> Rule:
    """Convert a rule or a pair to a rule.

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
"""Options that torch's optimizers refuse below zero as defaults; they do not check groups."""


def refuse_wrong(options: Mapping[str, Any], where: str | None = None) -> None:
    """Refuse reserved keys and invalid numbers.

    An optimizer checks its defaults but not its groups. So NaN is always refused; infinite and negative numbers are
    refused where torch's optimizers refuse them; and betas must be in [0, 1).

    Args:
        options: Name of the option → its value.
        where: Label in errors.

    Raises:
        OptionError: An option is reserved or invalid.
    """
    for name in TAKEN:
        if name in options:
            raise OptionError(f"{name!r} is not an option: it holds the parameters", hint="select them with rules")
    for name, value in options.items():
        for number in _numbers(value):
            wrong = None
            if isnan(number):
                wrong = "would make every parameter NaN"
            elif name == "betas" and not 0 <= number < 1:
                wrong = "is not from 0 on and below 1"
            elif name in _AT_LEAST_0 and not 0 <= number < inf:
                wrong = "is not a finite number from 0 on"
            if wrong is not None:
                raise OptionError(f"{name}={shorten(repr(value))} {wrong}", where=where)


def _numbers(value: Any) -> Iterator[float]:
    """Numbers in an option: a number, the numbers of a tuple, or the value of a tensor of one element."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, Real) or _is_scalar(value):
        yield float(value)


def _is_scalar(value: Any) -> bool:
    """True if an option is a tensor of one real number."""
    return hasattr(value, "numel") and value.numel() == 1 and value.device.type != "meta" and not value.is_complex()


# Cached: many parameters have the same owner class.
_is_norm = lru_cache(maxsize=1024)(is_norm)


def _takes_no_decay(name: str, owner: tuple[str | None, tuple[str, ...]], ndim: int | None) -> bool:
    return (ndim is not None and ndim < 2) or _is_norm(owner) or is_bias(name)


no_decay = Selector(FieldFunction("no_decay", ("name", "owner", "ndim"), _takes_no_decay))
"""Selector of parameters usually excluded from weight decay: norms, biases, and tensors of fewer than two dimensions.

A norm is identified by the class of its layer (as by `:norm`), a bias by its own name (as by `:bias`); scales and gates
of one number or one row have fewer than two dimensions. Weight decay pulls the weights of products towards zero to
bound their output. These parameters are not weights of products: a norm's scale belongs at one.

Embeddings are decayed, as in most training of language models; `no_decay | ":embedding"` leaves them out as well.
It is not strict: a model without norms or biases is valid. Files do not record the classes of layers; from a file, it
selects the biases and the tensors of fewer than two dimensions.

>>> import torch
>>> import torchparams as tp
>>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm((3, 3)))
>>> tp.of(model).select(tp.no_decay).names
['0.bias', '1.weight', '1.bias']
"""
