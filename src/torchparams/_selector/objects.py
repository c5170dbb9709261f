"""Selectors from Python objects: text, names, modules, parameters and functions."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torchparams._selector.parser import parse
from torchparams._selector.tree import Names, Node, Objects, Predicate, Same, union
from torchparams.errors import SelectorError, shorten


def node_of(what: object) -> Node:
    """Tree of a selector that is text, names, modules, parameters or a function.

    Raises:
        SelectorSyntaxError: The text is not a selector.
        SelectorError: The type of `what` is not supported.
    """
    if isinstance(what, str):
        return parse(what)
    if _is_object(what):
        return Objects((Same(what),))
    # Before the test for functions: a Parameters is a callable mapping.
    if isinstance(what, Iterable) and not isinstance(what, bytes | type):
        listed = list(what)
        names = frozenset(each for each in listed if isinstance(each, str))
        objects = dict.fromkeys(Same(each) for each in listed if _is_object(each))
        for each in listed:
            if not (isinstance(each, str) or _is_object(each)):
                kind = type(each).__name__
                raise SelectorError(
                    f"a selector list must contain names, modules or parameters, not a {kind}",
                    hint="join other selectors with |",
                )
        if not objects:
            return Names(names)
        # Many parameters become one term, so that the table is scanned once.
        tensors = tuple(each for each in objects if not _is_module(each.object))
        modules = (Objects((each,)) for each in objects if _is_module(each.object))
        return union(*[Names(names)] * bool(names), *modules, *[Objects(tensors)] * bool(tensors))
    if hasattr(what, "named_parameters"):
        raise SelectorError(
            f"a {type(what).__name__} is a model, not a selector (text, names or a function of ParameterInfo)",
            hint="select from it: torchparams.of(model).select(…)",
        )
    if callable(what) and not isinstance(what, type):
        return Predicate(what)
    raise SelectorError(
        f"{shorten(repr(what))} is not a selector",
        exists="a selector is text such as '**.bias', a list of names, a module or a class of modules, "
        "a function of ParameterInfo, or a Selector",
    )


def _is_object(what: object) -> bool:
    """Whether it is a module, a class of modules, or a tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and (_is_module(what) or isinstance(what, torch.Tensor))


def _is_module(what: object) -> bool:
    """Whether it is a module or a class of modules."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    return issubclass(what, torch.nn.Module) if isinstance(what, type) else isinstance(what, torch.nn.Module)
