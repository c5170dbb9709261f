"""Adapters as PEFT saves them: what `adapter_config.json` says, and which tensors of the file belong together."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchparams.errors import FileFormatError, NotReadable, PlanError, SourceError, shorten
from torchparams.limits import HEADER_BYTES
from torchparams.sources.base import open_source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of the base."""

_WEIGHT_FILES = (WEIGHTS, "adapter_model.bin")

# Fields that say nothing about what the tensors are, or are honoured here.
_HARMLESS = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    ]
)
# With these, the base that the adapter belongs to is the given one; others change its weights before training.
_INITS = (True, False, "gaussian", "orthogonal", "eva", None)

_MOST = 2**31  # beyond every rank and alpha

_FACTOR = re.compile(r"(?:(.*)\.)?(lora_A|lora_B)\.weight|(?:(.*)\.)?(lora_embedding_A|lora_embedding_B)(?:\.weight)?")


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors of one weight's change.

    Attributes:
        a: The record of `lora_A`, shape (r, columns), or (r, rows) of an embedding; of a convolution with the kernel.
        b: The record of `lora_B`, shape (rows, r), or (columns, r) of an embedding.
        scale: What their product is multiplied by.
        transposed: Whether the weight is the product's transpose.
    """

    a: ParameterInfo
    b: ParameterInfo
    scale: float
    transposed: bool


@dataclass(frozen=True)
class Adapter:
    """An adapter.

    Attributes:
        source: Its tensors.
        pairs: The name of a weight of the base → its factors.
        whole: The name of a tensor of the base → the record of what takes its place.
        label: What messages call it.
    """

    source: Source
    pairs: dict[str, Pair] = field(default_factory=dict)
    whole: dict[str, ParameterInfo] = field(default_factory=dict)
    label: str = ""


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """The adapter in a directory that PEFT's `save_pretrained` wrote.

    Raises:
        SourceError: There is none.
        FileFormatError: Its configuration is not JSON, or lacks a number.
        NotReadable: It uses something that is not understood here.
        PlanError: Its tensors and its configuration do not fit.
    """
    folder = os.fspath(path)
    if os.path.isfile(folder):
        folder = os.path.dirname(folder) or "."
    config = _config(os.path.join(folder, CONFIG))
    file = next((f for name in _WEIGHT_FILES if os.path.exists(f := os.path.join(folder, name))), None)
    if file is None:
        raise SourceError("there are no weights of an adapter", where=folder, hint=f"they are called {WEIGHTS}")
    _refuse_unknown(config, os.path.join(folder, CONFIG))
    source = open_source(file)
    adapter = Adapter(source, label=folder)
    factors: dict[str, dict[str, ParameterInfo]] = {}
    strange: list[str] = []
    for info in source.infos().values():
        name = info.name.removeprefix(PREFIX)
        found = _FACTOR.fullmatch(name)
        if found is not None:
            module, kind = (found[1], found[2]) if found[2] else (found[3], found[4])
            factors.setdefault(module or "", {})[kind] = info
        elif "lora_" in name or name == info.name:
            strange.append(info.name)
        else:
            adapter.whole[name.replace(".base_layer.", ".")] = info
    if strange:
        raise NotReadable(
            f"{shorten(repr(strange[0]))} is no factor that is understood here"
            + (", of a weight-decomposed adapter (DoRA)" if "magnitude" in strange[0] else "")
            + (f"; nor are {len(strange) - 1:,} more" if len(strange) > 1 else ""),
            where=file,
            exists="understood are lora_A, lora_B, lora_embedding_A, lora_embedding_B and whole tensors",
            hint="merge it with PEFT itself",
        )
    for module, both in factors.items():
        name = f"{module}.weight" if module else "weight"
        adapter.pairs[name] = _pair(module, both, config, file)
    if not adapter.pairs and not adapter.whole:
        raise PlanError("it holds no tensors", where=file)
    return adapter


def _config(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(HEADER_BYTES + 1)
    except OSError as error:
        raise SourceError(
            error.strerror or str(error), where=path, hint="an adapter is a directory that PEFT saved"
        ) from None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"it is not JSON: {error}", where=path) from None
    if not isinstance(config, dict):
        raise FileFormatError("it is JSON, and no object", where=path)
    return config


def _refuse_unknown(config: Mapping[str, Any], path: str) -> None:
    if config.get("peft_type") != "LORA":
        raise NotReadable(
            f"it is an adapter of the kind {config.get('peft_type')!r}", where=path, exists="known is 'LORA'"
        )
    init = config.get("init_lora_weights")
    if not any(init is known or (isinstance(init, str) and init == known) for known in _INITS):
        raise NotReadable(
            f"init_lora_weights={shorten(repr(init))}: it belongs to a base whose weights were changed first",
            where=path,
            hint="save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain adapter of it",
        )
    unknown = [key for key, value in config.items() if key not in _HARMLESS and value]
    if unknown:
        raise NotReadable(
            f"it uses {', '.join(f'{key}={shorten(repr(config[key]), 40)}' for key in unknown[:3])}, "
            "which is not understood here",
            where=path,
            hint="merge it with PEFT itself",
        )


def _pair(module: str, both: Mapping[str, ParameterInfo], config: Mapping[str, Any], file: str) -> Pair:
    embedding = any(kind.startswith("lora_embedding") for kind in both)
    kinds = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if set(both) != set(kinds):
        have = ", ".join(sorted(both))
        raise PlanError(f"of {module!r} there is {have} alone", where=file, hint="a change has two factors, A and B")
    a, b = (both[kind] for kind in kinds)
    if a.shape is None or b.shape is None or len(a.shape) < 2 or len(b.shape) < 2:
        raise PlanError(f"the factors of {module!r} are no matrices", where=file)
    rank = _number(config, "rank_pattern", "r", module, file)
    if a.shape[0] != b.shape[1] or a.shape[0] != rank:
        raise PlanError(
            f"the factors of {module!r} have shapes {list(a.shape)} and {list(b.shape)}, "
            f"and the configuration says r={rank:g}",
            where=file,
        )
    alpha = _number(config, "alpha_pattern", "lora_alpha", module, file)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    stored_transposed = bool(config.get("fan_in_fan_out")) and len(a.shape) == 2  # convolutions never are
    return Pair(a, b, scale, embedding or stored_transposed)


def _number(config: Mapping[str, Any], pattern: str, default: str, module: str, file: str) -> float:
    """A module's own number, as PEFT finds it: of the first pattern that matches its name's end; else that of all."""
    found = config.get(default)
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise FileFormatError(f"{pattern}={shorten(repr(patterns))} is no object", where=file)
    for key, value in patterns.items():
        try:
            # Most are plain names, for which nothing has to be compiled.
            plain = module == key or module.endswith(f".{key}")
            if plain or re.match(rf"(.*\.)?({key})$", module):
                found = value
                break
        except re.error as error:
            what = f"{key!r} in {pattern} is not a regular expression: {error.msg}"
            raise FileFormatError(what, where=file) from None
    if not isinstance(found, int | float) or isinstance(found, bool) or not 0 <= found < _MOST:
        raise FileFormatError(f"{default}={shorten(repr(found))} is not a number", where=file)
    if default == "r" and not found:
        raise FileFormatError("r=0: there is no such adapter", where=file)
    return float(found)
