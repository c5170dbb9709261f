"""Weight orientation of layers: (out, in) as in `torch.nn.Linear`, or (in, out) as in transformers' `Conv1D`.

A LoRA adapter does not record the orientation: PEFT writes one `fan_in_fan_out` for all layers, from the layer it
visited last. The shapes of the factors decide, unless the weight is square.
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
"""Names of embedding weights."""


class Orientation:
    """Orientation of the layers of a base.

    Args:
        source: Source of the base.
        infos: Infos of its tensors.
        stated: Orientation given by the user for weights that nothing else decides: True for (in, out), False for (out,
            in), a selector of the (in, out) weights, or None.

    Raises:
        NoMatch: A selector matches nothing.

    Attributes:
        is_tied: Whether the `config.json` of the base ties input and output embeddings.
    """

    def __init__(self, source: Source, infos: Mapping[str, ParameterInfo], stated: object) -> None:
        self._stated = stated if stated is None or isinstance(stated, bool) else _selected(stated, infos, source)
        config = config_beside(source)
        self._models = frozenset(_model_types(config))
        self._is_foreign = "auto_map" in config
        self.is_tied = config.get("tie_word_embeddings") is True

    def is_transposed(self, info: ParameterInfo) -> bool | None:
        """Whether a weight is stored as (in, out); None if unknown."""
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
        """Whether the name is one that transformers uses for (in, out) weights."""
        return name.rpartition(".")[0].rpartition(".")[2] in _CONV1D_LAYERS


def _layers(info: ParameterInfo) -> Iterator[str]:
    """Class names of the module that owns a weight, without `Module` itself."""
    return (base for base in info.bases if not base.endswith(".Module"))


def _selected(selector: object, infos: Mapping[str, ParameterInfo], source: Source) -> frozenset[str]:
    from torchparams.selectors import Selector

    return Selector.of(selector).names(infos.values(), strict=True, where=source.label)


def _model_types(config: Any, depth: int = 0) -> Iterator[str]:
    """Model types in a configuration, at any depth: composite models nest several."""
    if isinstance(config, dict) and depth < _NESTING:
        kind = config.get("model_type")
        if isinstance(kind, str) and kind:
            yield kind
        for value in config.values():
            yield from _model_types(value, depth + 1)
