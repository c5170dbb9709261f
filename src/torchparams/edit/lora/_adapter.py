"""Read adapters as PEFT saves them: `adapter_config.json` and the tensors beside it."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams._selector.bounded import Bounded, Deadline, TooSlow
from torchparams.errors import FileFormatError, LimitExceeded, NotReadable, PlanError, SourceError, shorten
from torchparams.sources.opening import open_source

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping

    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Prefix that PEFT puts before the names of the base."""

_WEIGHT_FILES = (WEIGHTS, "adapter_model.bin")

# Fields that do not affect the tensors, or are handled here.
_HARMLESS = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
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
_REASONS = {
    "alora_invocation_tokens": "it acts on some tokens only (aLoRA), which weights cannot express",
    "arrow_config": "it chooses experts for each token (Arrow), which weights cannot express",
    "kasa_config": "it truncates the weights of the base first (KaSA)",
    "layer_replication": "the tuned model repeats layers of the base",
    "target_parameters": "it changes parameters other than the weights of modules",
    "trainable_token_indices": "it replaces single rows of an embedding",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "use_dora": "it scales rows by learned magnitudes (DoRA)",
    "use_qalora": "it averages groups of inputs (QALoRA)",
}
# Initialisations that leave the weights of the base unchanged. Others change them before training.
_INITS = ("gaussian", "orthogonal", "eva", "mica")

_MOST = 2**31  # above every plausible rank and alpha
_STEPS = 1 << 16  # limit of regex steps for one name and one pattern

_FACTOR = re.compile(
    r"(?:(?P<module>.*)\.)?(?:"
    r"(?P<kind>lora_[AB])(?:\.default)*\.(?P<what>weight|bias)"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.default)*(?:\.weight)?)"
)


@dataclass(frozen=True, slots=True)
class Factors:
    """The two LoRA factors of one weight.

    Attributes:
        a: Info of `lora_A`: shape (r, in), with kernel dimensions for a convolution; (r, rows) for an embedding.
        b: Info of `lora_B`: shape (out, r); (columns, r) for an embedding.
        scale: Factor for the product of the two.
        is_embedding: Whether the weight is an embedding.
    """

    a: ParameterInfo
    b: ParameterInfo
    scale: float
    is_embedding: bool


@dataclass(frozen=True)
class Adapter:
    """An adapter, indexed by the names of its base.

    Attributes:
        source: Source of the adapter's tensors.
        pairs: Name of a base weight → its factors.
        biases: Name of a base bias → info of the tensor to add, and its scale.
        whole: Name of a base tensor → infos of its replacement. Several infos are copies of the same tensor.
        left: Adapter tensors without effect, each with the reason.
        label: Label for messages.
        keeps_apart: Whether the adapter replaces modules that may be tied in the base, without tying the replacements.
    """

    source: Source
    pairs: dict[str, Factors] = field(default_factory=dict)
    biases: dict[str, tuple[ParameterInfo, float]] = field(default_factory=dict)
    whole: dict[str, list[ParameterInfo]] = field(default_factory=dict)
    left: list[tuple[str, str]] = field(default_factory=list)
    label: str = ""
    keeps_apart: bool = False


def read_adapter(path: str | os.PathLike[str], base: Container[str]) -> Adapter:
    """Read the adapter in a directory written by PEFT's `save_pretrained`.

    Args:
        path: Directory of the adapter.
        base: Tensor names of the base.

    Raises:
        SourceError: There is no adapter.
        FileFormatError: The configuration is not JSON, or a number is missing.
        LimitExceeded: A pattern is too long or too slow.
        NotReadable: The adapter uses an unsupported feature.
        PlanError: The tensors do not match the configuration.
    """
    folder = os.fspath(path)
    if os.path.isfile(folder):
        folder = os.path.dirname(folder) or "."
    where = os.path.join(folder, CONFIG)
    config = _config(where)
    file = next((f for name in _WEIGHT_FILES if os.path.exists(f := os.path.join(folder, name))), None)
    if file is None:
        raise SourceError("the directory has no adapter weights", where=folder, hint=f"the file name is {WEIGHTS}")
    _refuse_unknown(config, where)
    source = open_source(file)
    keeps_apart = bool(config.get("modules_to_save")) and not config.get("ensure_weight_tying")
    adapter = Adapter(source, label=folder, keeps_apart=keeps_apart)
    # PEFT removes the adapter's name from tensor names, and with it any module of the same name.
    held = {info.name.removeprefix(PREFIX) for info in source.infos().values()}
    spelling = Spelling(base, ("default", os.path.basename(os.path.abspath(folder))), held, file)
    factors: dict[str, dict[str, ParameterInfo]] = {}
    biases: dict[str, ParameterInfo] = {}
    strange: list[str] = []
    originals: list[tuple[str, str]] = []
    for info in source.infos().values():
        name = info.name.removeprefix(PREFIX)
        found = _FACTOR.fullmatch(name)
        if found is not None and name not in base:
            module, kind = found["module"] or "", found["kind"] or found["embedding"]
            group = biases if found["what"] == "bias" else factors.setdefault(module, {})
            key = module if found["what"] == "bias" else kind
            if key in group:
                raise PlanError(f"{module!r} has two tensors {kind}", where=file)
            if found["what"] == "bias" and (kind != "lora_B" or not config.get("lora_bias")):
                strange.append(info.name)
            group[key] = info
        elif name == info.name or ("lora_" in name and name not in base) or ".token_adapter." in name:
            strange.append(info.name)
        elif ".original_module." in name and name not in base:
            originals.append((info.name, spelling.of(name.replace(".original_module.", "."))))
        else:
            adapter.whole.setdefault(spelling.of(name), []).append(info)
    for name, replaced in originals:
        if replaced in adapter.whole:
            adapter.left.append((name, f"{replaced!r} replaces it"))
        else:
            strange.append(name)
    if strange:
        raise NotReadable(
            f"{shorten(repr(strange[0]))} is not a supported factor"
            + (", of a weight-decomposed adapter (DoRA)" if "magnitude" in strange[0] else "")
            + (f", and {len(strange) - 1:,} more" if len(strange) > 1 else ""),
            where=file,
            exists="supported are lora_A, lora_B, lora_embedding_A, lora_embedding_B and whole tensors",
            hint="merge it with PEFT",
        )
    numbers = _Numbers(config, where)
    for module, both in factors.items():
        _refuse_attention(module, base, file)
        pair = _pair(module, both, numbers, file)
        adapter.pairs[_below(module, "weight")] = pair
        if module in biases:
            adapter.biases[_below(module, "bias")] = biases.pop(module), pair.scale
    if biases:
        raise PlanError(f"{next(iter(biases))!r} has a bias of lora_B but no factors", where=file)
    if not adapter.pairs and not adapter.whole:
        raise PlanError("the adapter has no tensors", where=file)
    return adapter


def _below(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


class Spelling:
    """Maps adapter names to base names.

    Args:
        base: Tensor names of the base.
        adapters: Possible names of the adapter.
        held: Tensor names of the adapter.
        file: File name for messages.
    """

    def __init__(self, base: Container[str], adapters: Iterable[str], held: Container[str], file: str) -> None:
        self._base, self._adapters, self._held, self._file = base, tuple(dict.fromkeys(adapters)), held, file

    def of(self, name: str) -> str:
        """Name in the base, or a name that is not in the base if nothing matches.

        Raises:
            PlanError: Several names match.
        """
        plain = name
        if name not in self._base:
            parts = name.split(".")
            parts = [part for part in parts[:-1] if part != "base_layer"] + parts[-1:]
            while "modules_to_save" in parts:
                at = parts.index("modules_to_save")
                stop = at + 2 if parts[at + 1 : at + 2] == ["default"] and len(parts) > at + 2 else at + 1
                parts[at:stop] = []
            plain = ".".join(parts)
        module, _, last = plain.rpartition(".")
        fits = [plain] if plain in self._base else []
        longer = [f"{module}.{one}.{last}" for one in self._adapters if module]
        fits += [name for name in longer if name in self._base and name not in self._held]
        if len(fits) > 1:
            raise PlanError(
                f"{name!r} can mean {' or '.join(map(repr, fits))}: PEFT removes name components equal to the "
                "adapter's name",
                where=self._file,
                hint="save the adapter under a name that is not the name of a module",
            )
        return fits[0] if fits else plain


def _refuse_attention(module: str, base: Container[str], file: str) -> None:
    if ".base_layer." in f"{module}." or _below(module, "in_proj_weight") in base:
        attention = module.partition(".base_layer.")[0]
        raise NotReadable(
            f"{attention!r} is a MultiheadAttention; PEFT 0.21 merges its out_proj twice",
            where=file,
            hint="merge it with PEFT",
        )


def _config(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(limits.HEADER_BYTES + 1)
    except OSError as error:
        raise SourceError(
            error.strerror or str(error), where=path, hint="an adapter is a directory saved by PEFT"
        ) from None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"it is not JSON: {error}", where=path) from None
    if not isinstance(config, dict):
        raise FileFormatError("the JSON is not an object", where=path)
    return config


def _refuse_unknown(config: Mapping[str, Any], path: str) -> None:
    if config.get("peft_type") != "LORA":
        raise NotReadable(
            f"the adapter type {config.get('peft_type')!r} is not supported",
            where=path,
            exists="the supported type is 'LORA'",
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _INITS:
        raise NotReadable(
            f"init_lora_weights={shorten(repr(init))}: this initialisation changed the weights of the base",
            where=path,
            hint="save it with PEFT's path_initial_model_for_weight_conversion, which writes a plain adapter",
        )
    if not isinstance(init, str | bool | None):
        raise FileFormatError(f"init_lora_weights={shorten(repr(init))} must be text, true or false", where=path)
    unknown = [key for key, value in config.items() if key not in _HARMLESS and value]
    if unknown:
        reason = next((_REASONS[key] for key in unknown if key in _REASONS), "which is not supported")
        raise NotReadable(
            f"it uses {', '.join(f'{key}={shorten(repr(config[key]), 40)}' for key in unknown[:3])}, "
            + ("which is not supported: " if reason in _REASONS.values() else "")
            + reason,
            where=path,
            hint=None if reason.endswith("which weights cannot express") else "merge it with PEFT",
        )


def _pair(module: str, both: Mapping[str, ParameterInfo], numbers: _Numbers, file: str) -> Factors:
    embedding = any(kind.startswith("lora_embedding") for kind in both)
    kinds = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if set(both) != set(kinds):
        have = ", ".join(sorted(both))
        raise PlanError(f"{module!r} has {have} only", where=file, hint="LoRA needs two factors, A and B")
    a, b = (both[kind] for kind in kinds)
    if a.shape is None or b.shape is None or len(a.shape) < 2 or len(b.shape) < 2:
        raise PlanError(f"the factors of {module!r} are not matrices", where=file)
    rank = numbers.rank(module)
    groups, rest = divmod(a.shape[0], b.shape[1] or 1)
    if len(a.shape) > 2 and groups > 1 and not rest and a.shape[0] == rank:
        raise NotReadable(
            f"{module!r} is a convolution with {groups} groups, which is not supported",
            where=file,
            exists="PEFT cannot merge it either",
        )
    if a.shape[0] != b.shape[1] or a.shape[0] != rank:
        raise PlanError(
            f"the factors of {module!r} have shapes {list(a.shape)} and {list(b.shape)}, "
            f"but the configuration says r={rank:g}",
            where=file,
        )
    return Factors(a, b, numbers.scale(module, rank), embedding)


class _Numbers:
    """Rank and scale of each module, by PEFT's rules.

    The first pattern that matches the end of a module name decides; otherwise the default of the configuration.

    Args:
        config: Configuration of the adapter.
        where: Path of the configuration, for messages.

    Raises:
        FileFormatError: The patterns are not an object, or a pattern is not a regular expression.
        LimitExceeded: A pattern is too long.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config, self._where = config, where
        self._patterns = {key: list(self._compiled(key)) for key in ("rank_pattern", "alpha_pattern")}
        self._deadline = Deadline()

    def rank(self, module: str) -> float:
        """Rank of a module."""
        found = self._of(module, "rank_pattern", "r")
        if found < 1:
            raise FileFormatError(f"r={found:g}: the rank must be at least 1", where=self._where)
        return found

    def scale(self, module: str, rank: float) -> float:
        """Factor for the product of a module's factors."""
        alpha = self._of(module, "alpha_pattern", "lora_alpha")
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _compiled(self, kind: str) -> Iterator[tuple[str, Bounded, Any]]:
        patterns = self._config.get(kind) or {}
        if not isinstance(patterns, dict):
            raise FileFormatError(f"{kind}={shorten(repr(patterns))} is not an object", where=self._where)
        for key, value in patterns.items():
            if len(key) > limits.REGEX_CHARACTERS:
                raise LimitExceeded(
                    f"a pattern in {kind} has {len(key):,} characters; the limit is {limits.REGEX_CHARACTERS:,}",
                    where=self._where,
                )
            try:
                yield key, Bounded(rf"\A(.*\.)?({key})$", _STEPS), value
            except (re.error, ValueError, OverflowError, RecursionError) as error:
                reason = error.msg if isinstance(error, re.error) else str(error)
                what = f"{shorten(repr(key))} in {kind} is not a regular expression: {reason}"
                raise FileFormatError(what, where=self._where) from None

    def _of(self, module: str, patterns: str, default: str) -> float:
        found = self._config.get(default)
        for key, pattern, value in self._patterns[patterns]:
            # Most patterns are plain names and need no regular expression.
            plain = _PLAIN.fullmatch(key) and (module == key or module.endswith(f".{key}"))
            try:
                self._deadline.check()
                if plain or pattern.occurs(module):
                    found = value
                    break
            except TooSlow as error:
                raise LimitExceeded(f"{shorten(repr(key))} in {patterns} {error}", where=self._where) from None
        if not isinstance(found, int | float) or isinstance(found, bool) or not -_MOST < found < _MOST:
            raise FileFormatError(f"{default}={shorten(repr(found))} is not a number", where=self._where)
        return float(found)


_PLAIN = re.compile(r"[\w.-]+")
