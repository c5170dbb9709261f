"""The base class of results: an object that says by a report how it looks."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torchparams.render.tree import Report, Text, printable, to_html, to_text


class Result(ABC):
    """The base class of results: prints as its report, and shows it in a notebook.

    A `repr` never raises: a debugger may show a result that is half made, or a table of a file that is gone.

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
        """The report that printing shows."""
        return self.report()

    def _title(self) -> str:
        """A name for a result whose report fails."""
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
        except Exception:  # it has not even a label yet
            title = type(self).__name__
        return printable(f"<{title}: {type(error).__name__}: {error}>")
