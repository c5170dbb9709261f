"""Base class of results: objects that render themselves as a tree of texts and tables."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any

from torchparams.render.tree import Text, Tree, printable, to_html, to_text


class Result(ABC):
    """Base class of results: printing and notebooks show its tree.

    `repr` never raises: a debugger may show a partly constructed result, or a table of a deleted file.

    >>> from torchparams.render.tree import Tree, Text
    >>> class Greeting(Result):
    ...     def tree(self):
    ...         return Tree((Text("hello"),))
    >>> print(Greeting())
    hello
    >>> Greeting()._repr_html_()
    '<p>hello</p>'
    """

    __slots__ = ()

    @abstractmethod
    def tree(self) -> Tree:
        """The result as a tree of texts and tables."""

    def report(self, *args: Any, **kwargs: Any) -> Tree:
        """Deprecated name of `tree`, which will be removed in the next version."""
        warnings.warn(f"{type(self).__name__}.report is now tree", DeprecationWarning, stacklevel=2)
        return self.tree(*args, **kwargs)

    def _shown(self) -> Tree:
        """Tree that printing shows."""
        return self.tree()

    def _title(self) -> str:
        """Title of a result whose tree fails."""
        return type(self).__name__

    def __repr__(self) -> str:
        try:
            return to_text(self._shown())
        except Exception as error:
            return self._failed(error)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        try:
            return to_html(self._shown())
        except Exception as error:
            return to_html(Tree((Text(self._failed(error)),)))

    def _failed(self, error: Exception) -> str:
        try:
            title = self._title()
        except Exception:  # not even a label exists yet
            title = type(self).__name__
        return printable(f"<{title}: {type(error).__name__}: {error}>")
