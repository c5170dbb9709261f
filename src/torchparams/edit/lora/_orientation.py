"""Which way round a layer stores its weight: (out, in) as `torch.nn.Linear`, or (in, out) as `Conv1D` of transformers.

A LoRA adapter does not say it: PEFT writes one `fan_in_fan_out` for all layers, that of the layer it visited last. The
shapes of the factors decide unless the weight is square.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torchparams.sources.config import config_beside

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source

_CONV1D_MODELS = frozenset(
    ["clvp", "clvp_decoder", "clvp_encoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"]
)
_CONV1D_LAYERS = frozenset(["c_attn", "c_fc", "c_proj", "q_attn"])
_NESTING = 10

EMBEDDING = re.compile(r"(?:.*\.)?(?:wte|wpe|[^.]*embed(?!.*norm)[^.]*)\.weight", re.IGNORECASE)
"""Names that the weights of embeddings have."""


class Orientation:
    """What is known of the layers of a base.

    Args:
        source: The base.
        infos: Its tensors.
        stated: What the user says of the weights that nothing else decides: whether they are stored (in, out); or what
            selects those that are. None for nothing.

    Raises:
        NoMatch: A selector hits nothing.

    Attributes:
        is_tied: Whether the base's `config.json` says that input and output embeddings are one tensor.
    """

    def __init__(self, source: Source, infos: Mapping[str, ParameterInfo], stated: object) -> None:
        self._stated = stated if stated is None or isinstance(stated, bool) else _selected(stated, infos, source)
        config = config_beside(source)
        self._models = frozenset(_model_types(config))
        self._is_foreign = "auto_map" in config
        self.is_tied = config.get("tie_word_embeddings") is True

    def is_transposed(self, info: ParameterInfo) -> bool | None:
        """Whether a weight is stored (in, out); None where nothing says so."""
        if isinstance(self._stated, bool):
            return self._stated
        if self._stated is not None:
            return any(name in self._stated for name in (info.name, *info.aliases))
        if info.module is not None:
            if any(base.startswith("transformers.") and base.endswith(".Conv1D") for base in info.bases):
                return True
            return False if any(base.startswith("torch.nn.") for base in _layers(info)) else None
        if not self._models or self._is_foreign:
            return None
        if not self._models & _CONV1D_MODELS or not self.looks_transposed(info.name):
            return False
        return True if self._models <= _CONV1D_MODELS else None

    @staticmethod
    def looks_transposed(name: str) -> bool:
        """Whether a weight has the name of one that transformers stores (in, out)."""
        return name.rpartition(".")[0].rpartition(".")[2] in _CONV1D_LAYERS


def _layers(info: ParameterInfo) -> Iterator[str]:
    """The classes of a weight's owner, but for that of all modules."""
    return (base for base in info.bases if not base.endswith(".Module"))


def _selected(selector: object, infos: Mapping[str, ParameterInfo], source: Source) -> frozenset[str]:
    from torchparams.selectors import Selector

    return Selector.of(selector).names(infos.values(), strict=True, where=source.label)


def _model_types(config: Any, depth: int = 0) -> Iterator[str]:
    """The model types that a configuration names, at any depth: a model may be made of several."""
    if isinstance(config, dict) and depth < _NESTING:
        kind = config.get("model_type")
        if isinstance(kind, str) and kind:
            yield kind
        for value in config.values():
            yield from _model_types(value, depth + 1)
