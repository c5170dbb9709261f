"""Targets: what a command line calls a source."""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from torchparams.errors import SourceError, nearest

if TYPE_CHECKING:
    from torchparams.parameters import Parameters

_LIVE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_live(target: str) -> bool:
    """Whether a target names code that makes a model: `package.module:callable`, unless a file has that name.

    >>> is_live("mypackage.models:build"), is_live("model.safetensors"), is_live("run.ckpt#model")
    (True, False, False)
    """
    return _LIVE.fullmatch(target) is not None and not os.path.exists(target)


def table(target: str, *, buffers: bool = False) -> Parameters:
    """The table of a target; a live model is built on the meta device, without memory for its values.

    Raises:
        SourceError: There is no such target, or its code does not make a model.
    """
    from torchparams.parameters import of

    return of(build(target) if is_live(target) else target, buffers=buffers)


def build(target: str, *, device: str = "meta") -> Any:
    """The model that `package.module:callable` makes, called without arguments under `device`.

    The current directory comes first in the search for the package, as with `python -m`. An attribute that is a
    model already is taken as it is, and a class is a callable.

    Raises:
        SourceError: No such module or attribute; the call failed; what it gave is no `nn.Module`.
        MissingDependency: torch is not installed.
    """
    from torchparams.sources._totorch import require_torch

    torch = require_torch(f"to build {target}")
    module_name, _, attribute = target.partition(":")
    made: Any = _imported(module_name, target)
    for part in attribute.split("."):
        if not hasattr(made, part):
            near = nearest(part, [name for name in dir(made) if not name.startswith("_")])
            raise SourceError(
                f"{module_name} has no {attribute!r}",
                where=target,
                hint=f"did you mean {' or '.join(near)}?" if near else None,
            )
        made = getattr(made, part)
    if not isinstance(made, torch.nn.Module):
        made = _called(made, target, torch.device(device))
    if not isinstance(made, torch.nn.Module):
        raise SourceError(
            f"gave a {type(made).__module__}.{type(made).__qualname__}, not an nn.Module",
            where=target,
            hint="name a function without required arguments that returns the model, or its class",
        )
    return made


def _imported(module_name: str, target: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise SourceError(
                f"no module is named {error.name!r}",
                where=target,
                hint="it is looked for in the current directory, then among the installed packages",
            ) from error
        raise _failed("importing", error, target) from error
    except Exception as error:  # code of the user's: whatever it raises is told in one line
        raise _failed("importing", error, target) from error


def _called(make: Any, target: str, device: Any) -> Any:
    if not callable(make):
        raise SourceError(f"is a {type(make).__name__}, which cannot be called", where=target)
    try:
        with device:
            return make()
    except Exception as error:  # as above
        raise _failed(f"building it on the {device} device", error, target) from error


def _failed(what: str, error: Exception, target: str) -> SourceError:
    text = " ".join(str(error).split())
    return SourceError(
        f"{what} failed with {type(error).__name__}{': ' if text else ''}{text}",
        where=target,
        hint="--debug shows where",
    )
