"""Engines by name: what `engine="ray"` and `--engine ray` stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchparams.errors import OptionError

if TYPE_CHECKING:
    from torchparams.engines.base import Engine


def named(engine: Engine | str | None) -> Engine | None:
    """The engine that a verb was given, as an object; None for the one that fits the source.

    Args:
        engine: An engine, its name, or None. Names are `threads`, `ray`, and `ray:ADDRESS` for a cluster that runs.

    Raises:
        OptionError: No engine has that name.

    >>> named("threads") is None, named("ray:10.0.0.1:6379").label
    (True, 'ray')
    """
    if not isinstance(engine, str):
        return engine
    name, _, address = engine.partition(":")
    if engine == "threads":  # the default: for sharded live models, threads together with the other ranks
        return None
    if name == "ray":
        from torchparams.engines.ray import RayEngine

        return RayEngine(address or None)
    raise OptionError(f"no engine is named {engine!r}", exists="names are 'threads', 'ray' and 'ray:ADDRESS'")


def ready(engine: Engine | str | None) -> Engine | None:
    """What `named` gives, connected: for callers that list what each of many checkpoints has to say.

    Raises:
        OptionError: No engine has that name.
        MissingDependency: Its library is not installed.
        EngineError: The cluster cannot be reached.

    >>> ready("threads") is None
    True
    """
    found = named(engine)
    from torchparams.engines.ray import RayEngine, connect

    if isinstance(found, RayEngine):
        connect(found.address)
    return found
