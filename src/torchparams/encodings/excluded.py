"""Modules that a configuration lists as not quantised."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams._selector.bounded import Bounded, Deadline, TooSlow
from torchparams.errors import NotReadable, shorten

if TYPE_CHECKING:
    from collections.abc import Mapping

KEYS = ("modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers")
"""Where configurations list such modules: transformers, compressed-tensors, ModelOpt, vLLM."""

_REGEX = "re:"
_STEPS = 1 << 16  # limit of regex steps for one name and one pattern


class Excluded:
    """Modules that a configuration lists as not quantised.

    An entry names a module from its first component, or from one in the middle to the last; `*` stands for any
    characters of a component; an entry that begins with `re:` is a regular expression for the start of a name, as in
    compressed-tensors. Names of classes, such as `Linear`, are passed over: a file does not tell classes.

    Args:
        config: The `quantization_config`.

    >>> excluded = Excluded({"ignore": ["lm_head", "re:.*mlp[.]gate$"]})
    >>> excluded.entry("lm_head.weight"), excluded.entry("l.0.mlp.gate.weight"), excluded.entry("l.0.mlp.up.weight")
    ('lm_head', 're:.*mlp[.]gate$', None)
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        stated = (config.get(key) for key in KEYS)
        texts = [each for given in stated if isinstance(given, list) for each in given if isinstance(each, str)]
        self._exact = {text for text in texts if text and not set(text) & set("*?[(^$|\\")}
        self._patterns = [text.split(".") for text in texts if "*" in text and not set(text) & set("[(^$|\\:")]
        self._regexes = list(dict.fromkeys(text for text in texts if text.startswith(_REGEX)))
        self._compiled: list[Bounded] | None = None
        self._deadline: Deadline | None = None

    def entry(self, name: str) -> str | None:
        """The entry for the module of a parameter; None if there is none.

        Raises:
            NotReadable: A regular expression of the configuration is invalid or takes too long.
        """
        if not self._exact and not self._patterns and not self._regexes:
            return None
        path = name.split(".")
        # The parameter of a module is `module.weight`; fused experts are a parameter themselves.
        for parts in (path[:-1], path):
            spans = [parts[:end] for end in range(1, len(parts) + 1)]
            spans += [parts[start:] for start in range(1, len(parts))]
            for text in map(".".join, spans):
                if text in self._exact:
                    return text
            for pattern in self._patterns:
                self._in_time(".".join(pattern))
                if _begins(pattern, parts):
                    return ".".join(pattern)
        return self._by_regex(name if path[-1] != "weight" else name[: -len(".weight")])

    def _by_regex(self, module: str) -> str | None:
        if self._compiled is None:
            self._compiled = [_compiled(text) for text in self._regexes]
        for text, regex in zip(self._regexes, self._compiled, strict=True):
            self._in_time(text)
            try:
                if regex.matches(module):
                    return text
            except TooSlow as error:
                raise NotReadable(f"the configuration's {shorten(repr(text))} {error}") from None
        return None

    def _in_time(self, text: str) -> None:
        self._deadline = self._deadline or Deadline()
        try:
            self._deadline.check()
        except TooSlow as error:
            raise NotReadable(
                f"the configuration's {shorten(repr(text))} {error}, with the entries before it"
            ) from None


def _compiled(text: str) -> Bounded:
    pattern = text.removeprefix(_REGEX)
    try:
        if len(pattern) > limits.REGEX_CHARACTERS:
            raise ValueError
        re.compile(pattern)  # alone: it may close a bracket that it did not open
        return Bounded(f"(?:{pattern})(?s:.*)", _STEPS)
    except (re.error, ValueError, OverflowError, RecursionError):
        raise NotReadable(f"the configuration's {shorten(repr(text))} is not a regular expression of names") from None


def _begins(pattern: list[str], path: list[str]) -> bool:
    """Whether a path begins as a pattern says, whose components may hold `*`; a `*` at its end stands for any rest.

    >>> _begins(["layers", "*", "attn"], ["layers", "3", "attn", "q"]), _begins(["a*"], ["b"])
    (True, False)
    """
    return len(pattern) <= len(path) and all(map(fnmatchcase, path, pattern))
