"""Parser of the selector language.

    selector := inter ( "|" inter )*            union
    inter    := unary ( "&" unary )*            intersection
    unary    := "~" unary | "(" selector ")" | compound
    compound := ( glob | "/" regex "/" )? ( "[" field op value "]" | ":" word )*      at least one part

`torchparams.selectors` describes the meaning; `glob_reader` parses globs, `fields` the values of conditions.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, NoReturn

from torchparams import limits
from torchparams._selector.fields import EXAMPLES, FIELDS, ORDERED, ValueProblemError, read_value
from torchparams._selector.glob_reader import read_glob, starts_glob
from torchparams._selector.syntax_hints import FIELD_HINTS, JOIN_HINTS, OPERATOR_HINTS, WORD_HINTS, did_you_mean
from torchparams._selector.tree import (
    Compound,
    Condition,
    Node,
    Regex,
    Value,
    Word,
    complement,
    intersection,
    union,
)
from torchparams.errors import SelectorSyntaxError, nearest, shorten

if TYPE_CHECKING:
    from torchparams._selector.globs import Glob


WORDS: dict[str, str] = {
    "trainable": "requires_grad is True",
    "frozen": "requires_grad is False, buffers left out",
    "tied": "has several names",
    "buffer": "a buffer of a module",
    "bias": "the last component is bias, biases, bias_…, …_bias or …_biases",
    "norm": "the owner is a normalisation layer",
    "embedding": "the owner is an embedding",
    "matrix": "has at least two dimensions",
    "meta": "on the meta device, without values",
    "quantized": "has an encoding: stored as codes with scales",
    "sharded": "split over the ranks of a process group",
}
"""Words of the language, with their meaning."""


@lru_cache(maxsize=1024)
def parse(text: str) -> Node:
    """Parse a selector.

    Raises:
        SelectorSyntaxError: The text is not a selector; the error has the column, and the expected syntax.
    """
    return _Parser(text).whole()


_OPERATOR = re.compile(r"[=!<>~^$*:|]+")
_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_WORD = re.compile(r"\w+")
_OPERATORS = ("=", "!=", "<", "<=", ">", ">=")


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def blanks(self) -> str:
        """Skip white space, and return the next character."""
        while self.peek().isspace():
            self.at += 1
        return self.peek()

    def fail(self, expected: str, hint: str | None = None, at: int | None = None, found: str | None = None) -> NoReturn:
        column = (self.at if at is None else at) + 1
        found = shorten(found, 40) if found else None
        raise SelectorSyntaxError(self.text, column, expected, found=found, hint=hint) from None

    def whole(self) -> Node:
        if not self.blanks():
            self.fail("a selector", "use `**` to select every parameter", at=0, found="nothing")
        node = self.union(0)
        if self.peek():
            self.stray("`|`, `&` or the end")
        return node

    # Each of these methods also skips the white space after its part.

    def union(self, depth: int) -> Node:
        terms = [self.intersection(depth)]
        while self.peek() == "|":
            self.joint("|")
            terms.append(self.intersection(depth))
        return union(*terms)

    def intersection(self, depth: int) -> Node:
        terms = [self.unary(depth)]
        while self.peek() == "&":
            self.joint("&")
            terms.append(self.unary(depth))
        return intersection(*terms)

    def joint(self, sign: str) -> None:
        self.at += 1
        if self.peek() == sign:
            kind = "union" if sign == "|" else "intersection"
            self.fail("a selector", f"use a single `{sign}` for the {kind}: `a {sign} b`")

    def unary(self, depth: int) -> Node:
        complements = 0
        while self.blanks() == "~":
            complements += 1
            self.shallow(depth + complements)
            self.at += 1
        if self.peek() == "(":
            node = self.parenthesis(depth + complements + 1)
        else:
            node = self.compound()
        for _ in range(complements):
            node = complement(node)
        return node

    def shallow(self, depth: int) -> None:
        if depth > limits.SELECTOR_NESTING:
            self.fail(f"at most {limits.SELECTOR_NESTING} levels of `(` and `~`")

    def parenthesis(self, depth: int) -> Node:
        opening = self.at
        self.shallow(depth)
        self.at += 1
        if self.blanks() == ")":
            self.fail("a selector", "use `**` to select every parameter")
        node = self.union(depth)
        if not self.peek():
            self.fail("`)`", f"the parenthesis at column {opening + 1} is not closed")
        if self.peek() != ")":
            self.stray("`|`, `&` or `)`")
        self.at += 1
        if self.peek() and self.peek() in "[:":
            self.fail("`|`, `&` or the end", f"join them with `&`: (…) & {self.text[self.at :]}")
        self.blanks()
        return node

    def compound(self) -> Compound:
        start = self.at
        char = self.peek()
        pattern: Glob | Regex | None = None
        if char == "/":
            pattern = self.regex()
        elif char == "." or starts_glob(char):
            pattern, self.at = read_glob(self.text, self.at)
        conditions: list[Condition | Word] = []
        while (char := self.peek()) and char in "[:":
            conditions.append(self.condition() if char == "[" else self.word())
        if self.at == start:
            self.no_term()
        self.blanks()
        return Compound(pattern, tuple(conditions))

    def no_term(self) -> NoReturn:
        char = self.peek()
        hint = JOIN_HINTS.get(char)
        if char == ")":
            hint = "there is no open parenthesis"
        elif char == "]":
            hint = "there is no open bracket"
        elif char and char in "|&":
            hint = f"`{char}` needs a selector on both sides"
        elif char == "}":
            hint = "there is no open brace"
        self.fail("a selector", hint)

    def stray(self, expected: str) -> NoReturn:
        """Raise for text after the end of a term."""
        char = self.peek()
        word = _WORD.match(self.text, self.at)
        before = re.split(r"[\s(|&~]+", self.text[: self.at].rstrip())[-1]
        hint = None
        if meant := _respelled(self.text):
            hint = f"did you mean `{meant}`?"
        elif word and word[0].lower() in JOIN_HINTS:
            hint = JOIN_HINTS[word[0].lower()]
        elif before in ("not", "and", "or"):
            hint = JOIN_HINTS[before]
        elif char == ")":
            hint = "there is no open parenthesis"
        elif char in "]}":
            hint = f"there is no open {'bracket' if char == ']' else 'brace'}"
        elif char in JOIN_HINTS:
            hint = JOIN_HINTS[char]
        elif self.text[self.at - 1].isspace():
            hint = (
                "write the parts of a term without spaces, as in **.weight:trainable; join two terms by `|` or `&`; "
                'quote a name with a space: "my layer".weight'
            )
        elif char == "(":
            hint = "join two terms by `|` or `&`"
        elif char == "`":
            hint = 'quote a name with this character: "a`b".weight'
        self.fail(expected, hint, found=repr(word[0]) if word else None)

    def regex(self) -> Regex:
        opening = self.at
        self.at += 1
        while (char := self.peek()) != "/":
            if not char:
                self.fail("a closing `/`", f"the regular expression at column {opening + 1} is not closed")
            self.at = min(self.at + (2 if char == "\\" else 1), len(self.text))
        pattern = self.text[opening + 1 : self.at]
        if not pattern:
            self.fail("a regular expression", 'write "" for the empty name')
        self.at += 1
        compile_regex(pattern, self.text, opening + 1)
        if flag := _WORD.match(self.text, self.at):
            self.fail(
                "`[`, `:`, `|`, `&` or the end", f"write flags inside: /(?{flag[0]}){pattern}/", found=repr(flag[0])
            )
        return Regex(pattern)

    def word(self) -> Word:
        self.at += 1
        found = _WORD.match(self.text, self.at)
        if found is None:
            self.fail(f"a word: {', '.join(WORDS)}", 'quote a name with a colon: "a:b"')
        word = found[0]
        if word not in WORDS:
            near = nearest(word.lower(), list(WORDS))
            if word in FIELDS:
                hint: str | None = f"`{word}` is a field: write [{word}=…]"
            else:
                hint = WORD_HINTS.get(word.lower()) or (did_you_mean(f":{n}" for n in near) if near else None)
            self.fail(f"a word ({', '.join(WORDS)})", hint, found=repr(word))
        self.at = found.end()
        return Word(word)

    def condition(self) -> Condition:
        opening = self.at
        self.at += 1
        self.blanks()
        field = self.field()
        self.blanks()
        op = self.operator(field)
        self.blanks()
        value, text = self.value(field, op, opening)
        if self.blanks() != "]":
            self.fail("`]`", f"the bracket at column {opening + 1} is not closed" if not self.peek() else None)
        self.at += 1
        return Condition(field, op, value, text)

    def field(self) -> str:
        found = _IDENTIFIER.match(self.text, self.at)
        if found is None:
            hint = None
            if self.peek() and self.peek() in "0123456789":
                hint = "write an index as a component, after a dot: layer.0"
            self.fail(f"a field: {', '.join(FIELDS)}", hint)
        field = found[0]
        if field not in FIELDS:
            near = nearest(field.lower(), FIELDS)
            if field in WORDS:
                hint = f"`{field}` is a word: write :{field}"
            else:
                hint = FIELD_HINTS.get(field.lower()) or (did_you_mean(near) if near else None)
            self.fail(f"a field ({', '.join(FIELDS)})", hint, found=repr(field))
        self.at = found.end()
        return field

    def operator(self, field: str) -> str:
        found = _OPERATOR.match(self.text, self.at)
        allowed = _OPERATORS if field in ORDERED else _OPERATORS[:2]
        op = found[0] if found else ""
        if field in ("name", "module", "shape") and op.rstrip("*") in allowed:
            op = op.rstrip("*")  # the stars belong to the value
        if op not in allowed:
            hint = OPERATOR_HINTS.get(op)
            if op in _OPERATORS:
                hint = f"`{field}` has no order; use it with {', '.join(ORDERED)}"
            self.fail(f"one of {' '.join(allowed)}", hint, found=f"`{op}`" if op else None)
        self.at += len(op)
        return op

    def value(self, field: str, op: str, opening: int) -> tuple[Value, str]:
        """Parse a value; returns the value and its text."""
        if field in ("name", "module"):
            if self.peek() == "/":
                self.fail("a glob", "write a regular expression as a term: /.*bias/")
            if self.peek() in ("", "]"):
                self.fail("a glob", "[name=**.bias]" if field == "name" else "[module=*Norm]")
            start = self.at
            glob, self.at = read_glob(self.text, self.at)
            if field == "module" and glob.from_end:
                self.fail("a glob for a class", "numbers from the end are for names only", at=start)
            return glob, str(glob)
        start = self.at
        text = self.raw_value(opening)
        if not text:
            self.fail(f"a value for {field}", EXAMPLES[field], at=start)
        try:
            return read_value(field, text)
        except ValueProblemError as problem:
            self.fail(problem.expected, problem.hint, at=start, found=repr(text))

    def raw_value(self, opening: int) -> str:
        quote_ = self.peek()
        if quote_ in ("'", '"'):
            stop = self.text.find(quote_, self.at + 1)
            if stop < 0:
                self.fail(f"a closing {quote_}", f"the quote at column {self.at + 1} is not closed", at=len(self.text))
            text = self.text[self.at + 1 : stop]
            self.at = stop + 1
            return text.strip()
        # A shape may contain brackets, as printed in tables.
        inner = self.text.find("]", self.at) + 1 if quote_ == "[" else self.at
        stop = self.text.find("]", inner)
        if stop < 0 or (quote_ == "[" and not inner):
            hint = f"the bracket at column {opening + 1} is not closed"
            self.fail("`]`", hint, at=len(self.text))
        text = self.text[self.at : stop]
        self.at = stop
        return text.strip()


_SPELLED = re.compile(r"(?:(?<=[\s()])|^)(and|or|not)(?=[\s(])\s*", re.IGNORECASE)
_SIGNS = {"and": "& ", "or": "| ", "not": "~"}


def _respelled(text: str) -> str | None:
    """Text with `and`, `or` and `not` replaced by operators, if that is a valid selector; otherwise None."""
    meant = _SPELLED.sub(lambda found: _SIGNS[found[1].lower()], text)
    if meant == text:
        return None
    try:
        return str(parse(meant))
    except SelectorSyntaxError:
        return None


def compile_regex(pattern: str, text: str, start: int) -> None:
    """Check a regular expression; an error has its position in the selector."""
    try:
        re.compile(pattern)
    except re.error as error:
        at, message = start + (error.pos or 0), error.msg
    except (ValueError, OverflowError) as error:
        at, message = start, str(error)
    except RecursionError:
        at, message = start, "nested too deeply"
    except Warning as warning:  # re may emit warnings about the pattern, which are treated as errors
        at, message = start, str(warning)
    else:
        return
    raise SelectorSyntaxError(
        text, min(at, len(text)) + 1, "a regular expression", hint=f"Python's re says: {message}"
    ) from None
