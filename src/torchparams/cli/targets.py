"""Resolve targets: the names of sources on the command line."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torchparams.errors import SourceError, nearest
from torchparams.render.tree import listed

if TYPE_CHECKING:
    import ast
    from collections.abc import Iterator

    from torchparams.parameters import Parameters

_DOTTED = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_LIVE = re.compile(rf"{_DOTTED}:{_DOTTED}")
_FILE = re.compile(rf"(?P<path>.+\.py)(?::(?P<attribute>{_DOTTED}))?")


def is_live(target: str) -> bool:
    """Whether a target names code that makes a model. A file of that name takes precedence.

    Live targets are `package.module:callable`, `path/to/file.py:callable`, and a Python file alone, which `build`
    rejects.

    >>> is_live("mypackage.models:build"), is_live("nets/small.py:Net"), is_live("model.safetensors")
    (True, True, False)
    """
    if _FILE.fullmatch(target):
        return ":" not in target or not os.path.exists(target)
    return _LIVE.fullmatch(target) is not None and not os.path.exists(target)


def table(target: str, *, buffers: bool = False, raw: bool = False) -> Parameters:
    """Table of a target. A live model is built on the meta device, without memory for its values.

    Raises:
        SourceError: There is no such target, or its code does not make a model.
    """
    from torchparams.parameters import of

    return of(build(target) if is_live(target) else target, buffers=buffers, raw=raw)


def chosen(params: Parameters, select: str | None) -> Parameters:
    """The selected rows of a table."""
    return params if select is None else params.select(select)


def source_of(target: str, *, raw: bool = False) -> Any:
    """Argument for a verb that reads values: a path, a model with values, or with `raw`, a table."""
    return build(target, device="cpu") if is_live(target) else stored(target) if raw else target


def stored(path: str) -> Parameters:
    """Table of a checkpoint's tensors as stored."""
    from torchparams.parameters import of

    return of(path, raw=True)


def build(target: str, *, device: str = "meta") -> Any:
    """Build a model from `package.module:callable` or `path/to/file.py:callable`, under `device`.

    The callable gets no arguments; a class is a callable, and an attribute that already is a model is used directly.
    The search for a package starts in the current directory, as with `python -m`; for a file, in its own directory, as
    with `python path/to/file.py`. A model that cannot be built on the meta device is built with values, with a note on
    stderr. Output of the code goes to stderr.

    Raises:
        SourceError: There is no such module or attribute; the call failed; the result is not an `nn.Module`; or the
            target is a file without a callable: the message lists its classes and functions, which are parsed, not run.
        MissingDependency: torch is not installed.
    """
    from torchparams.sources.totorch import require_torch

    file = _FILE.fullmatch(target)
    if file is not None and file["attribute"] is None:
        raise _choices(target)
    torch = require_torch(f"to build {target}")
    with _output_to_stderr():  # output of the code is not part of the result
        return _built(target, file, torch, device)


def _built(target: str, file: re.Match[str] | None, torch: Any, device: str) -> Any:
    if file is not None:
        module_name, attribute = file["path"], file["attribute"]
        made: Any = _from_file(module_name, target)
    else:
        module_name, _, attribute = target.partition(":")
        made = _imported(module_name, target)
    for part in attribute.split("."):
        if not hasattr(made, part):
            near = nearest(part, [name for name in dir(made) if not name.startswith("_")])
            raise SourceError(
                f"{module_name!r} has no {attribute!r}",
                where=target,
                exists=None if near or file is None else _choices(module_name).exists,
                hint=f"did you mean {' or '.join(near)}?" if near else None,
            )
        made = getattr(made, part)
    if not isinstance(made, torch.nn.Module):
        made = _called(made, target, torch.device(device))
    if not isinstance(made, torch.nn.Module):
        raise SourceError(
            f"returned {_article(type(made))}, not an nn.Module",
            where=target,
            hint="name a function without required arguments that returns a model, or a model class",
        )
    return made


def _article(kind: type) -> str:
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}" if kind is not type(None) else "None"


def _imported(module_name: str, target: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise SourceError(
                f"module not found: {error.name!r}",
                where=target,
                hint="the search path is the current directory, then the installed packages",
            ) from error
        raise _failed("importing", error, target) from error
    except Exception as error:  # user code may raise anything
        raise _failed("importing", error, target) from error


def _from_file(path: str, target: str) -> Any:
    if not os.path.isfile(path):
        raise _no_file(path)
    import importlib.util

    folder, name = os.path.split(os.path.abspath(path))
    name = name.removesuffix(".py")
    package: list[str] = []
    while os.path.exists(os.path.join(folder, "__init__.py")):
        folder, last = os.path.split(folder)
        package.insert(0, last)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if package:
            return importlib.import_module(".".join((*package, name)))
        # Another module may have the same name, such as `types`.
        known = f"_torchparams_{name}"
        spec = importlib.util.spec_from_file_location(known, path)
        assert spec is not None  # the name ends in .py
        assert spec.loader is not None
        module = sys.modules[known] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
        spec.loader.exec_module(module)
    except Exception as error:  # user code may raise anything
        raise _failed("importing", error, target) from error
    return module


def _no_file(path: str) -> SourceError:
    folder, name = os.path.split(path)
    there = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    near = nearest(name, [each for each in sorted(there) if each.endswith(".py")], 1)
    return SourceError(
        "no such file", where=path, hint=f"did you mean {os.path.join(folder, near[0])}?" if near else None
    )


def _choices(path: str) -> SourceError:
    """Error that lists the callables of a Python file; it is parsed, not run."""
    import ast

    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read(), path)
    except FileNotFoundError:
        return _no_file(path)
    except (OSError, SyntaxError, ValueError) as error:
        return SourceError(f"cannot be read as Python: {error}", where=path)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    wanted: list[ast.ClassDef | ast.FunctionDef]
    wanted = [node for node in classes if any("Module" in ast.unparse(base) for base in node.bases)]
    first = next(iter([node for node in wanted if not _needs(node)] or wanted or classes or functions), None)
    said = [
        f"{what} {listed([f'{node.name}({_needs(node)})' for node in nodes], 8)}"
        for what, nodes in (("the classes", classes), ("the functions", functions))
        if nodes
    ]
    return SourceError(
        "names a Python file, but no class or function in it",
        where=path,
        exists=f"it has {' and '.join(said)}" if said else "it has no classes or functions",
        hint=f"for example {path}:{first.name}" if first is not None else None,
    )


def _needs(node: ast.ClassDef | ast.FunctionDef) -> str:
    """Required arguments of a class or function."""
    import ast

    if isinstance(node, ast.ClassDef):
        inits = (each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__")
        init = next(inits, None)
        return "" if init is None else _required(init.args, 1)
    return _required(node.args, 0)


def _required(arguments: ast.arguments, given: int) -> str:
    positional = [*arguments.posonlyargs, *arguments.args]
    needed = positional[given : len(positional) - len(arguments.defaults)]
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return ", ".join(each.arg for each in (*needed, *(each for each, default in pairs if default is None)))


def _called(make: Any, target: str, device: Any) -> Any:
    if not callable(make):
        raise SourceError(f"is {_article(type(make))}, which cannot be called", where=target)
    try:
        with device:
            return make()
    except Exception as error:  # user code may raise anything
        failed = _failed(f"building it on the {device} device", error, target)
        if device.type != "meta":
            raise failed from error
    # The meta device has no values: `.item()`, `.to("cpu")` and quantisation fail there.
    try:
        made = make()
    except Exception as error:  # user code may raise anything
        raise failed from error
    sys.stderr.write(f"torchparams: {target} is built with values: {failed.what}\n")
    return made


@contextmanager
def _output_to_stderr() -> Iterator[None]:
    """Redirect all output to stderr, including that of subprocesses and C libraries."""
    sys.stdout.flush()
    with contextlib.ExitStack() as stack, contextlib.redirect_stdout(sys.stderr):
        with contextlib.suppress(OSError):  # stdout is closed
            kept = os.dup(1)
            stack.callback(os.close, kept)
            os.dup2(2, 1)
            stack.callback(os.dup2, kept, 1)
        yield


def _failed(what: str, error: Exception, target: str) -> SourceError:
    text = " ".join(str(error).split())
    return SourceError(
        f"{what} failed with {type(error).__name__}{': ' if text else ''}{text}",
        where=target,
        hint="--debug shows where",
    )
