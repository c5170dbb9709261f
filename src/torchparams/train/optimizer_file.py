"""Optimizer state in files: safetensors with the other values as JSON in its metadata, or a torch pickle."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torchparams.errors import FileFormatError, PlanError, TorchParamsError, UnsupportedSource, nearest, shorten
from torchparams.parameters import of
from torchparams.sources.opening import format_of, split_target
from torchparams.train._placeholders import placeholder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchparams.train.optimizer import OptimizerState

KEY = "torchparams.optimizer"
"""Metadata key of a safetensors file with a state: JSON with `version` and `state`, which names the tensors."""

_VERSION = 1


# --- to a file ------------------------------------------------------------------------------------


def as_tensors(state: OptimizerState) -> tuple[dict[str, Any], str]:
    """Tensors of a state, by name in the file, and a text with all other values.

    Raises:
        PlanError: A value has no text form.

    >>> import torch
    >>> import torchparams as tp
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> as_tensors(tp.optimizer_state(model, optimizer))[1][:34]
    '{"version": 1, "state": {"dict": ['
    """
    tensors: dict[str, Any] = {}
    coded = _encoded(state.state_dict(), (), tensors)
    return tensors, json.dumps({"version": _VERSION, "state": coded}, allow_nan=False)


def _encoded(value: Any, path: tuple[str, ...], tensors: dict[str, Any]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        name = ".".join(path[1:] if path[0] == "state" else path)
        while name in tensors:
            name += "_"
        tensors[name] = value.detach()
        return {"tensor": name}
    if type(value) is float or value is None or type(value) in (bool, int, str):
        return value if type(value) is not float or math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Mapping):
        if not all(type(key) in (str, int) for key in value):
            odd = next(key for key in value if type(key) not in (str, int))
            raise PlanError(
                f"a key in it is {shorten(repr(odd))}, which a safetensors file cannot hold", where=_at(path)
            )
        return {"dict": [[key, _encoded(item, (*path, str(key)), tensors)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        coded = [_encoded(item, (*path, str(i)), tensors) for i, item in enumerate(value)]
        return {"list" if type(value) is list else "tuple": coded}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise PlanError(
        f"a safetensors file cannot hold a {type(value).__name__}: {shorten(repr(value))}",
        where=_at(path),
        hint="write a .pt file",
    )


def _at(path: tuple[str, ...]) -> str:
    return shorten(".".join(path) or "the state")


# --- from a file ----------------------------------------------------------------------------------


def read_optimizer_file(target: str) -> Any:
    """Read an optimizer state written by `torchparams.save`, `torch.save` or `torch.distributed.checkpoint`.

    It is made of plain dicts, lists and tensors. A pickle is read by torch's restricted reader, which runs no code.
    Tensors of other files are placeholders, so that the ranks of a sharded model read only their own parts.

    Args:
        target: A path; for a state inside a checkpoint, followed by `#` and its keys, joined by dots.

    Raises:
        UnsupportedSource: The file holds no optimizer state, or lacks those keys.
        FileFormatError: The file cannot be read.
    """
    path, inner = split_target(target)
    if os.path.isdir(path) or path.endswith("/"):
        return _from_directory(path, inner)
    if format_of(path).name == "safetensors":
        params = of(path)
        if KEY not in params.metadata or inner is not None:
            raise UnsupportedSource(
                "the file holds no optimizer state",
                where=target,
                hint="torchparams.save(torchparams.optimizer_state(model, optimizer), path) writes one",
            )
        return _decoded_text(params.metadata[KEY], params)
    return _inside(_unpickled(path), inner, path)


def _decoded_text(text: Any, params: Any) -> Any:
    try:
        told = json.loads(text)
        if told["version"] != _VERSION:
            raise ValueError(f"it is of version {told['version']!r}")
        return _decoded(told["state"], params)
    except TorchParamsError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, RuntimeError) as error:
        raise FileFormatError(
            f"the optimizer state in its metadata cannot be read: {shorten(str(error))}", where=params.source.label
        ) from error


def _decoded(value: Any, params: Any) -> Any:
    import torch

    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError("a list without a kind")
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return placeholder(params.source, content)
    if kind == "dict":
        return {key: _decoded(item, params) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_decoded(item, params) for item in content]
        return items if kind == "list" else tuple(items)
    if kind == "float":
        return float(content)
    if kind == "dtype" and isinstance(getattr(torch, content), torch.dtype):
        return getattr(torch, content)
    if kind == "device":
        return torch.device(content)
    raise ValueError(f"{kind!r} is not a kind of value")


def _from_directory(path: str, inner: str | None) -> Any:
    """The state in a distributed checkpoint, as it was saved: by names, or flattened."""
    from torchparams.sources.training.dcp import DcpSource, open_dcp

    where = f"{path}#{inner}" if inner else path
    source = of(path).source
    if not isinstance(source, DcpSource):
        raise UnsupportedSource(
            f"a {source.format} holds no optimizer state with its groups",
            where=where,
            hint="load the state from a distributed checkpoint, or from a file written by torchparams.save",
        )
    source = open_dcp(path)  # all of it: trainers have directories that stand for the model
    data = source.nested(lambda name: placeholder(source, name), inner)
    if isinstance(data.get("optimizers"), list) and "param_groups" not in data:
        return {"optimizers": [_by_parameter(each) for each in data["optimizers"]]}
    if _has_groups(data):
        return _by_parameter(data if "param_groups" in data else _unflattened(data))
    inside = next(_states_in(data, "." if inner else "#"), None)
    raise UnsupportedSource(
        "the checkpoint holds no optimizer state" + (" at this level" if inside else ""),
        where=where,
        hint=f"load {where}{inside}" if inside else None,
    )


def _has_groups(data: Mapping[str, Any]) -> bool:
    return any(key == "param_groups" or key.startswith("param_groups.") for key in data)


def _states_in(data: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Paths of the optimizer states in a state dict."""
    for key, value in data.items():
        if isinstance(value, dict):
            if _has_groups(value):
                yield f"{prefix}{key}"
            else:
                yield from _states_in(value, f"{prefix}{key}.")


def _by_parameter(data: Any) -> Any:
    """A state whose keys have their types again: the checkpoint has texts, also for positions of parameters.

    Data of another form is returned unchanged, and refused later.
    """
    if not isinstance(data, dict) or not isinstance(data.get("param_groups"), list):
        return data
    state = data.get("state", {})  # an empty dict is not saved
    lists = [group["params"] for group in data["param_groups"] if isinstance(group, dict) and "params" in group]
    if isinstance(state, dict) and any(type(key) is int for keys in lists if isinstance(keys, list) for key in keys):
        state = {int(key) if key.isdecimal() else key: value for key, value in state.items()}
    return {**data, "state": state}


def _unflattened(data: Mapping[str, Any]) -> dict[str, Any]:
    """The state of `get_optimizer_state_dict` with `flatten_optimizer_state_dict`: one key for each value.

    Parameters with equal options are one group.
    """
    state: dict[str, dict[str, Any]] = {}
    options: dict[str, dict[str, Any]] = {}
    for key, value in data.items():
        kind, _, rest = key.partition(".")
        name, _, last = rest.rpartition(".")
        if kind in ("state", "param_groups") and name:
            (state if kind == "state" else options).setdefault(name, {})[last] = value
    groups: list[dict[str, Any]] = []
    for name, own in options.items():
        group = next((group for group in groups if {**group, "params": None} == {**own, "params": None}), None)
        if group is None:
            groups.append({**own, "params": [name]})
        else:
            group["params"].append(name)
    return {"state": state, "param_groups": groups}


def _unpickled(path: str) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise FileFormatError(
            f"torch.load(weights_only=True) cannot read it: {shorten(str(error), 200)}", where=path
        ) from error


def _inside(data: Any, inner: str | None, path: str) -> Any:
    if inner is not None:
        for key in inner.split("."):
            if isinstance(data, Mapping) and key in data:
                data = data[key]
            elif isinstance(data, list | tuple) and key.isdecimal() and int(key) < len(data):
                data = data[int(key)]
            else:
                near = nearest(key, [str(k) for k in data] if isinstance(data, Mapping) else [])
                raise UnsupportedSource(
                    f"there is no {shorten(repr(key))} in the file",
                    where=f"{path}#{inner}",
                    exists=f"did you mean {near[0]!r}?" if near else None,
                )
        return data
    if isinstance(data, Mapping) and "param_groups" not in data and set(data) != {"optimizers"}:
        found = [key for key, value in data.items() if isinstance(value, Mapping) and "param_groups" in value]
        if found:
            raise UnsupportedSource(
                "the file is a checkpoint with an optimizer state inside", where=path, hint=f"load {path}#{found[0]}"
            )
    return data
