"""The `config.json` beside a checkpoint, as the Hugging Face libraries write it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torchparams.errors import SourceError
from torchparams.io.files import read_whole
from torchparams.io.paths import folder_of, join
from torchparams.limits import HEADER_BYTES

if TYPE_CHECKING:
    from torchparams.sources.base import Source

_QUANTISED = (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization"),
              ("quantize_config.json", None), ("quant_config.json", None))  # fmt: skip
"""Files that describe how a checkpoint is quantised, and the key in them; None for the whole file."""


def config_beside(source: Source, name: str = "config.json") -> dict[str, Any]:
    """The configuration in the directory of a checkpoint; empty if there is none or it cannot be read."""
    if not source.files:
        return {}
    try:
        config = json.loads(read_whole(join(folder_of(source.files[0]), name), HEADER_BYTES))
    except (SourceError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def quantization_config(source: Source) -> dict[str, Any]:
    """How a checkpoint is quantised, from a configuration file beside it; empty if no file says so."""
    for name, key in _QUANTISED:
        config = config_beside(source, name)
        found = config if key is None else config.get(key) or _of_the_text_model(config, key)
        if isinstance(found, dict) and found:
            return found
    return {}


def _of_the_text_model(config: dict[str, Any], key: str) -> Any:
    inner = config.get("text_config")
    return inner.get(key) if isinstance(inner, dict) else None
