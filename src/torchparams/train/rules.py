"""Rules: options of an optimizer for what a selector hits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torchparams._selector.table import is_bias, is_norm
from torchparams.errors import OptionError, shorten
from torchparams.records import FieldFunction
from torchparams.selectors import Selector

if TYPE_CHECKING:
    from collections.abc import Mapping

TAKEN = ("params", "param_names")
"""Keys of a parameter group that are no options: `groups` writes them."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Options for what a selector hits; made by `rule`.

    Attributes:
        selector: What they are for.
        options: Name of the option → its value.
        strict: Whether the selector has to hit something with every part of it.
    """

    selector: Selector
    options: Mapping[str, Any]
    strict: bool = True

    def __str__(self) -> str:
        return str(self.selector).replace("<function no_decay>", "no_decay")


def rule(selector: object, /, *, strict: bool = True, **options: Any) -> Rule:
    """Options of an optimizer for what `selector` hits, to be given to `groups`.

    Args:
        selector: Text in the selector language, a `Selector`, names, or a function of `ParameterInfo`.
        strict: Refuse a selector of which some part hits nothing in the model; False for a rule of a model that may not
            have such parameters.
        options: Options of the optimizer, such as `lr` and `weight_decay`; or one of your own to split groups by.

    Raises:
        SelectorSyntaxError: The text is not a selector.
        OptionError: There is no option, or one that is not an option.

    >>> import torchparams as tp
    >>> tp.rule("head.**", lr=1e-3).options["lr"]
    0.001
    """
    if not options:
        raise OptionError(
            f"the rule for `{shorten(str(Selector.of(selector)))}` has no options",
            hint="say what it sets: torchparams.rule(selector, lr=…, weight_decay=…)",
        )
    refuse_taken(options)
    return Rule(Selector.of(selector), options, strict)


def refuse_taken(options: Mapping[str, Any]) -> None:
    """Refuse options that would say what the parameters are.

    Raises:
        OptionError: One of them is `params` or `param_names`.
    """
    for name in TAKEN:
        if name in options:
            raise OptionError(f"{name!r} is no option: it is what the groups hold", hint="select with rules")


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
