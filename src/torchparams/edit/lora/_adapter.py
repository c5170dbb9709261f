"""Adapters as PEFT saves them: what `adapter_config.json` says, and which tensors of the file belong together."""

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
from torchparams.sources.base import open_source

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping

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
    "alora_invocation_tokens": "it acts on some tokens alone (aLoRA), as no weights can",
    "arrow_config": "experts are chosen for each token (Arrow), as no weights can",
    "kasa_config": "the weights of its base are truncated first (KaSA)",
    "layer_replication": "the tuned model repeats layers of the base",
    "target_parameters": "it changes parameters that are no module's weight",
    "trainable_token_indices": "it replaces single rows of an embedding",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "use_dora": "it scales rows by learned magnitudes (DoRA)",
    "use_qalora": "it averages groups of inputs (QALoRA)",
}
# With these, the base that the adapter belongs to is the given one; others change its weights before training.
_INITS = ("gaussian", "orthogonal", "eva", "mica")

_MOST = 2**31  # beyond every rank and alpha
_STEPS = 1 << 16  # of `re` on one name, for a pattern of the file's

_FACTOR = re.compile(
    r"(?:(?P<module>.*)\.)?(?:"
    r"(?P<kind>lora_[AB])(?:\.default)*\.(?P<what>weight|bias)"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.default)*(?:\.weight)?)"
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors of one weight's change.

    Attributes:
        a: The record of `lora_A`, shape (r, in), or (r, rows) of an embedding; of a convolution with the kernel.
        b: The record of `lora_B`, shape (out, r), or (columns, r) of an embedding.
        scale: What their product is multiplied by.
        is_embedding: Whether they are of an embedding.
    """

    a: ParameterInfo
    b: ParameterInfo
    scale: float
    is_embedding: bool


@dataclass(frozen=True)
class Adapter:
    """An adapter, by the names of its base.

    Attributes:
        source: Its tensors.
        pairs: The name of a weight of the base → its factors.
        biases: The name of a bias of the base → the record of what is added to it, and what that is multiplied by.
        whole: The name of a tensor of the base → the records of what takes its place; several are copies.
        left: Tensors that change nothing, and why.
        label: What messages call it.
        keeps_apart: Whether it holds modules whole that may be tied to others in the base, and does not tie them.
    """

    source: Source
    pairs: dict[str, Pair] = field(default_factory=dict)
    biases: dict[str, tuple[ParameterInfo, float]] = field(default_factory=dict)
    whole: dict[str, list[ParameterInfo]] = field(default_factory=dict)
    left: list[tuple[str, str]] = field(default_factory=list)
    label: str = ""
    keeps_apart: bool = False


def read_adapter(path: str | os.PathLike[str], base: Container[str]) -> Adapter:
    """The adapter in a directory that PEFT's `save_pretrained` wrote.

    Args:
        path: The directory.
        base: The names of the base's tensors.

    Raises:
        SourceError: There is none.
        FileFormatError: Its configuration is not JSON, or lacks a number.
        LimitExceeded: Its patterns are too long, or take too long.
        NotReadable: It uses something that is not understood here.
        PlanError: Its tensors and its configuration do not fit.
    """
    folder = os.fspath(path)
    if os.path.isfile(folder):
        folder = os.path.dirname(folder) or "."
    where = os.path.join(folder, CONFIG)
    config = _config(where)
    file = next((f for name in _WEIGHT_FILES if os.path.exists(f := os.path.join(folder, name))), None)
    if file is None:
        raise SourceError("there are no weights of an adapter", where=folder, hint=f"they are called {WEIGHTS}")
    _refuse_unknown(config, where)
    source = open_source(file)
    keeps_apart = bool(config.get("modules_to_save")) and not config.get("ensure_weight_tying")
    adapter = Adapter(source, label=folder, keeps_apart=keeps_apart)
    # PEFT takes the adapter's name out of those of tensors, and with it a module's own name that is the same.
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
                raise PlanError(f"{module!r} has {kind} twice", where=file)
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
            adapter.left.append((name, f"{replaced!r} takes its place"))
        else:
            strange.append(name)
    if strange:
        raise NotReadable(
            f"{shorten(repr(strange[0]))} is no factor that is understood here"
            + (", of a weight-decomposed adapter (DoRA)" if "magnitude" in strange[0] else "")
            + (f"; nor are {len(strange) - 1:,} more" if len(strange) > 1 else ""),
            where=file,
            exists="understood are lora_A, lora_B, lora_embedding_A, lora_embedding_B and whole tensors",
            hint="merge it with PEFT itself",
        )
    numbers = _Numbers(config, where)
    for module, both in factors.items():
        _refuse_attention(module, base, file)
        pair = _pair(module, both, numbers, file)
        adapter.pairs[_below(module, "weight")] = pair
        if module in biases:
            adapter.biases[_below(module, "bias")] = biases.pop(module), pair.scale
    if biases:
        raise PlanError(f"of {next(iter(biases))!r} there is the bias of lora_B alone", where=file)
    if not adapter.pairs and not adapter.whole:
        raise PlanError("it holds no tensors", where=file)
    return adapter


def _below(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


class Spelling:
    """Finds the tensor of a base that an adapter means by a name.

    Args:
        base: The names of the base.
        adapters: What the adapter may have been called.
        held: The names that the adapter has.
        file: What messages call the adapter's file.
    """

    def __init__(self, base: Container[str], adapters: Iterable[str], held: Container[str], file: str) -> None:
        self._base, self._adapters, self._held, self._file = base, tuple(dict.fromkeys(adapters)), held, file

    def of(self, name: str) -> str:
        """The name in the base; one that it does not have where none fits.

        Raises:
            PlanError: Several fit.
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
                f"{name!r} is {' or '.join(map(repr, fits))}: PEFT leaves out a component that is the adapter's name",
                where=self._file,
                hint="save the adapter under a name that no module has",
            )
        return fits[0] if fits else plain


def _refuse_attention(module: str, base: Container[str], file: str) -> None:
    if ".base_layer." in f"{module}." or _below(module, "in_proj_weight") in base:
        attention = module.partition(".base_layer.")[0]
        raise NotReadable(
            f"{attention!r} is a MultiheadAttention, of which PEFT 0.21 merges the change of out_proj twice",
            where=file,
            hint="merge it with PEFT itself",
        )


def _config(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(limits.HEADER_BYTES + 1)
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
    if isinstance(init, str) and init.lower() not in _INITS:
        raise NotReadable(
            f"init_lora_weights={shorten(repr(init))}: it belongs to a base whose weights were changed first",
            where=path,
            hint="save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain adapter of it",
        )
    if not isinstance(init, str | bool | None):
        raise FileFormatError(
            f"init_lora_weights={shorten(repr(init))} is neither a word nor true or false", where=path
        )
    unknown = [key for key, value in config.items() if key not in _HARMLESS and value]
    if unknown:
        reason = next((_REASONS[key] for key in unknown if key in _REASONS), "which is not understood here")
        raise NotReadable(
            f"it uses {', '.join(f'{key}={shorten(repr(config[key]), 40)}' for key in unknown[:3])}, "
            + ("which is not understood here: " if reason in _REASONS.values() else "")
            + reason,
            where=path,
            hint=None if reason.endswith("as no weights can") else "merge it with PEFT itself",
        )


def _pair(module: str, both: Mapping[str, ParameterInfo], numbers: _Numbers, file: str) -> Pair:
    embedding = any(kind.startswith("lora_embedding") for kind in both)
    kinds = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if set(both) != set(kinds):
        have = ", ".join(sorted(both))
        raise PlanError(f"of {module!r} there is {have} alone", where=file, hint="a change has two factors, A and B")
    a, b = (both[kind] for kind in kinds)
    if a.shape is None or b.shape is None or len(a.shape) < 2 or len(b.shape) < 2:
        raise PlanError(f"the factors of {module!r} are no matrices", where=file)
    rank = numbers.rank(module)
    groups, rest = divmod(a.shape[0], b.shape[1] or 1)
    if len(a.shape) > 2 and groups > 1 and not rest and a.shape[0] == rank:
        raise NotReadable(
            f"{module!r} is a convolution in {groups} groups, whose change is no product of the factors",
            where=file,
            exists="PEFT does not merge it either",
        )
    if a.shape[0] != b.shape[1] or a.shape[0] != rank:
        raise PlanError(
            f"the factors of {module!r} have shapes {list(a.shape)} and {list(b.shape)}, "
            f"and the configuration says r={rank:g}",
            where=file,
        )
    return Pair(a, b, numbers.scale(module, rank), embedding)


class _Numbers:
    """The rank and the scale of each module, as PEFT finds them.

    Of the first pattern that matches a name's end; else those of all.

    Args:
        config: The configuration.
        where: Its file.

    Raises:
        FileFormatError: Patterns are no object, or one is not a regular expression.
        LimitExceeded: A pattern is too long.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config, self._where = config, where
        self._patterns = {key: list(self._compiled(key)) for key in ("rank_pattern", "alpha_pattern")}
        self._deadline = Deadline()

    def rank(self, module: str) -> float:
        """The rank of a module."""
        found = self._of(module, "rank_pattern", "r")
        if found < 1:
            raise FileFormatError(f"r={found:g}: there is no such adapter", where=self._where)
        return found

    def scale(self, module: str, rank: float) -> float:
        """What a module's product is multiplied by."""
        alpha = self._of(module, "alpha_pattern", "lora_alpha")
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _compiled(self, kind: str) -> Iterator[tuple[str, Bounded, Any]]:
        patterns = self._config.get(kind) or {}
        if not isinstance(patterns, dict):
            raise FileFormatError(f"{kind}={shorten(repr(patterns))} is no object", where=self._where)
        for key, value in patterns.items():
            if len(key) > limits.REGEX_CHARACTERS:
                raise LimitExceeded(
                    f"a pattern in {kind} has {len(key):,} characters, and may have {limits.REGEX_CHARACTERS:,}",
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
            # Most are plain names, for which nothing has to be matched.
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
