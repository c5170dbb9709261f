"""Parameters and buffers that the code in a TorchScript archive declares. The code is parsed as text and never run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchparams.sources.torchfile._zip import ZipDirectory

CODE_BYTES = 64 << 20
"""Maximum number of bytes of code to read per archive; classes beyond that are unknown."""

Names = tuple[frozenset[str], frozenset[str]]

_CLASS = re.compile(r"^class ([^\s(:]+)\(Module\):$", re.MULTILINE)
_NAMES = re.compile(r"^  __(parameters|buffers)__ = \[(.*)\]$", re.MULTILINE)
_NAME = re.compile(r'"([^"]*)"')


class ScriptCode:
    """Look up the parameters and buffers that the code of a class declares.

    Args:
        directory: The archive.
        folder: Its top folder, with the slash.
    """

    def __init__(self, directory: ZipDirectory, folder: str) -> None:
        self._zip = directory
        self._folder = folder
        self._left = CODE_BYTES
        self._known: dict[str, dict[str, Names]] = {}

    def __call__(self, name: str) -> Names | None:
        """Names of the parameters and buffers of a class; None if it is not a module or not known.

        Args:
            name: Class name as in the pickle: `__torch__.torch.nn.modules.linear.Linear`.
        """
        module, _, cls = name.rpartition(".")
        if module not in self._known:
            self._known[module] = declared_in(self._text(f"{self._folder}code/{module.replace('.', '/')}.py"))
        return self._known[module].get(cls)

    def _text(self, name: str) -> str:
        member = self._zip.members.get(name)
        if member is None or member.size > self._left:
            return ""
        self._left -= member.size
        start = self._zip.starts([member])[name]
        return b"".join(self._zip.chunks(member, start)).decode("utf-8", "replace")


def declared_in(text: str) -> dict[str, Names]:
    r"""Parameters and buffers by class name, for the modules in a file of TorchScript code.

    >>> declared_in('class Net(Module):\n  __parameters__ = ["w", ]\n  __buffers__ = []\n')
    {'Net': (frozenset({'w'}), frozenset())}
    """
    starts = list(_CLASS.finditer(text))
    found = {}
    for place, match in enumerate(starts):
        end = starts[place + 1].start() if place + 1 < len(starts) else len(text)
        lists = {kind: frozenset(_NAME.findall(names)) for kind, names in _NAMES.findall(text, match.end(), end)}
        found[match[1]] = (lists.get("parameters", frozenset()), lists.get("buffers", frozenset()))
    return found
