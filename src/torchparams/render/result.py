"""Base class of results: objects that render themselves as a report."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torchparams.render.tree import Report, Text, printable, to_html, to_text


class Result(ABC):
    """Base class of results: printing and notebooks show its report.

    `repr` never raises: a debugger may show a partly constructed result, or a table of a deleted file.

    >>> from torchparams.render.tree import Report, Text
    >>> class Greeting(Result):
    ...     def report(self):
    ...         return Report((Text("hello"),))
    >>> print(Greeting())
    hello
    >>> Greeting()._repr_html_()
    '<p>hello</p>'
    """

    __slots__ = ()

    @abstractmethod
    def report(self) -> Report:
        """The result as a report."""

    def _shown(self) -> Report:
        """Report that printing shows."""
        return self.report()

    def _title(self) -> str:
        """Title of a result whose report fails."""
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
            return to_html(Report((Text(self._failed(error)),)))

    def _failed(self, error: Exception) -> str:
        try:
            title = self._title()
        except Exception:  # not even a label exists yet
            title = type(self).__name__
        return printable(f"<{title}: {type(error).__name__}: {error}>")
