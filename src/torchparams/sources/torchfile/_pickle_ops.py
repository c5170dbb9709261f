"""Operations of the pickle interpreter, except those that its loop handles itself (`_pickle.py`)."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams.errors import LimitExceeded, shorten
from torchparams.sources.torchfile._pickle_values import (
    LONG_TEXT,
    Blob,
    Cut,
    Global,
    Malformed,
    Reduced,
    as_key,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torchparams.sources.torchfile._pickle_values import Buffer, Constructor

INLINE_BYTES = 4096
"""Longer byte strings are not copied, but referenced as a `Blob`."""

MARK_GONE = "its MARK was taken off the stack before"

_i32 = struct.Struct("<i").unpack_from
_u32 = struct.Struct("<I").unpack_from
_u64 = struct.Struct("<Q").unpack_from
_f64 = struct.Struct(">d").unpack_from


class Operations:
    """State of the interpreter, and a method for each operation.

    An operation takes the position after its opcode and returns the position of the next opcode.
    """

    def __init__(
        self,
        data: Buffer,
        stop: int,
        label: str,
        constructors: Mapping[tuple[str, str], Constructor],
        persistent: Callable[[Any], Any],
        file_bytes: int,
        *,
        in_file: bool,
    ) -> None:
        self.data, self.stop, self.label, self.in_file = data, stop, label, in_file
        self.constructors, self.persistent = constructors, persistent
        self.left = limits.PICKLE_OPERATIONS + file_bytes // 32
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.far: dict[str, Any] = {}
        self.texts: dict[str, str] = {}
        self.globals: dict[tuple[str, str], Global] = {}
        self.imported: list[Global] = []
        self._indirect = False
        self.encodings: dict[int, tuple[str, bytes]] = {}

    def operations(self) -> list[Callable[[int], int]]:
        """Method of each opcode. Not an attribute: the cycle would keep the buffer, a mapped file."""
        table: list[Callable[[int], int]] = [self._unknown] * 256
        for code, method in _METHODS.items():
            table[code] = getattr(self, method)
        return table

    def charge(self, cost: int) -> None:
        """Count `cost` more operations, for a constructor that processes a whole list at once.

        Raises:
            LimitExceeded: The pickle runs too many operations.
        """
        self.left -= cost
        if self.left < 0:
            raise LimitExceeded(
                "the pickle runs more operations than a file of its size may",
                where=self.label,
                hint="if you trust the file, raise torchparams.limits.PICKLE_OPERATIONS",
            )

    # --- shared by operations --------------------------------------------------------------------

    def call(self, func: Any, args: Any) -> Any:
        """The result of `func(*args)`; only known constructors are called."""
        if type(func) is Global and func.build is not None:
            made = func.build(self, func, args)
            if made is not NotImplemented:
                return made
        return self.recorded(func, args)

    def recorded(self, func: Any, args: Any) -> Reduced:
        """Record a call of something that is not a known constructor."""
        self.note_call(func)
        return Reduced(func, args)

    def note_call(self, func: Any) -> None:
        """Note that `func` would be called: a global, or the result of another call."""
        if type(func) is Global:
            func.called = True
        elif not self._indirect:
            self._indirect = True
            result = Global("", "the result of a call")
            result.called = True
            self.imported.append(result)

    def named(self, module: str, name: str) -> Global:
        """The single `Global` of that name."""
        key = (module, name)
        found = self.globals.get(key)
        if found is None:
            self.charge(4)  # it takes the memory of several operations
            found = self.globals[key] = Global(module, name, self.constructors.get(key))
            self.imported.append(found)
        return found

    def text(self, begins: int, ends: int) -> str:
        """Text at `[begins, ends)`, decoded as pickle does; invalid bytes are escaped and never raise."""
        if ends > self.stop:
            raise Cut(f"in a text of {ends - begins:,} bytes")
        try:
            text = str(self.data[begins:ends], "utf-8", "surrogatepass")
        except UnicodeDecodeError:
            text = str(self.data[begins:ends], "utf-8", "backslashreplace")
        return self.texts.setdefault(text, text) if ends - begins > LONG_TEXT else text

    def encoded(self, text: str, codec: str) -> bytes:
        """`text` encoded with `codec`; cached, because a file may request it often."""
        found = self.encodings.get(id(text))
        if found is None:
            found = self.encodings[id(text)] = (text, text.encode(codec))
        return found[1]

    def _bytes(self, begins: int, ends: int) -> bytes | Blob:
        if ends > self.stop:
            raise Cut(f"in a byte string of {ends - begins:,} bytes")
        if ends - begins > INLINE_BYTES:
            return Blob(None if self.in_file else self.data, begins, ends)
        return bytes(self.data[begins:ends])

    def _old_text(self, begins: int, ends: int) -> str | bytes | Blob:
        # Python 2 wrote text and bytes in the same way; if it decodes it is text, and encodes to the same bytes.
        raw = self._bytes(begins, ends)
        if isinstance(raw, Blob):
            return raw
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw

    def _line(self, pos: int) -> tuple[bytes, int]:
        size = 128
        while True:
            piece = bytes(self.data[pos : min(pos + size, self.stop)])
            count = piece.find(b"\n")
            if count >= 0:
                return piece[:count], pos + count + 1
            if pos + size >= self.stop:
                raise Cut("in a line of text")
            size *= 16

    def _number(self, line: bytes) -> int:
        # int() of a long decimal text takes quadratic time.
        if len(line) > LONG_TEXT or not re.fullmatch(rb"[+-]?\d+", line):
            raise Malformed(f"{shorten(repr(line))} is not an integer")
        return int(line)

    def _index(self, line: bytes) -> int:
        index = self._number(line)
        if not 0 <= index < 1 << 32:
            raise Malformed(f"{index} is not an index of the memo")
        return index

    def _since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        stack = self.stack
        if mark > len(stack):
            raise Malformed(MARK_GONE)
        items = stack[mark:]
        del stack[mark:]
        return items

    # --- operations ----------------------------------------------------------------------------

    def _unknown(self, pos: int) -> int:
        raise Malformed(f"0x{self.data[pos - 1]:02x} is not an operation of a pickle")

    def _proto(self, pos: int) -> int:
        if self.data[pos] > 5:
            raise Malformed(f"it is of protocol {self.data[pos]}; 0 to 5 are known")
        return pos + 1

    def _frame(self, pos: int) -> int:
        if pos + 8 + _u64(self.data, pos)[0] > self.stop:
            raise Cut("in a frame")
        return pos + 8

    def _pop(self, pos: int) -> int:
        # A POP directly after a MARK removes the mark.
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()
        return pos

    def _pop_mark(self, pos: int) -> int:
        self._since_mark()
        return pos

    def _dup(self, pos: int) -> int:
        self.stack.append(self.stack[-1])
        return pos

    def _none(self, pos: int) -> int:
        self.stack.append(None)
        return pos

    def _true(self, pos: int) -> int:
        self.stack.append(True)
        return pos

    def _int(self, pos: int) -> int:
        line, pos_next = self._line(pos)
        self.stack.append(line == b"01" if line in (b"00", b"01") else self._number(line))
        return pos_next

    def _long(self, pos: int) -> int:
        line, pos_next = self._line(pos)
        self.stack.append(self._number(line.removesuffix(b"L")))
        return pos_next

    def _long1(self, pos: int) -> int:
        return self._push_long(pos + 1, pos + 1 + self.data[pos])

    def _long4(self, pos: int) -> int:
        count = _i32(self.data, pos)[0]
        if count < 0:
            raise Malformed(f"an integer of {count} bytes")
        return self._push_long(pos + 4, pos + 4 + count)

    def _push_long(self, begins: int, ends: int) -> int:
        if ends > self.stop:
            raise Cut(f"in an integer of {ends - begins:,} bytes")
        self.stack.append(int.from_bytes(self.data[begins:ends], "little", signed=True))
        return ends

    def _float(self, pos: int) -> int:
        line, pos_next = self._line(pos)
        try:
            self.stack.append(float(line[:LONG_TEXT]))
        except ValueError:
            raise Malformed(f"{shorten(repr(line))} is not a number") from None
        return pos_next

    def _binfloat(self, pos: int) -> int:
        self.stack.append(_f64(self.data, pos)[0])
        return pos + 8

    def _string(self, pos: int) -> int:
        line, pos_next = self._line(pos)
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
            raise Malformed("a STRING without its quotes")
        raw = _ESCAPE.sub(_unescape, line[1:-1])
        try:
            self.stack.append(raw.decode())
        except UnicodeDecodeError:
            self.stack.append(raw)
        return pos_next

    def _short_binstring(self, pos: int) -> int:
        ends = pos + 1 + self.data[pos]
        self.stack.append(self._old_text(pos + 1, ends))
        return ends

    def _binstring(self, pos: int) -> int:
        count = _i32(self.data, pos)[0]
        if count < 0:
            raise Malformed(f"a string of {count} bytes")
        self.stack.append(self._old_text(pos + 4, pos + 4 + count))
        return pos + 4 + int(count)

    def _short_binbytes(self, pos: int) -> int:
        ends = pos + 1 + self.data[pos]
        self.stack.append(self._bytes(pos + 1, ends))
        return ends

    def _binbytes(self, pos: int) -> int:
        ends = pos + 4 + _u32(self.data, pos)[0]
        self.stack.append(self._bytes(pos + 4, ends))
        return int(ends)

    def _binbytes8(self, pos: int) -> int:
        ends = pos + 8 + _u64(self.data, pos)[0]
        self.stack.append(self._bytes(pos + 8, ends))
        return int(ends)

    def _unicode(self, pos: int) -> int:
        line, pos_next = self._line(pos)
        try:
            self.stack.append(line.decode("raw-unicode-escape"))
        except UnicodeDecodeError:
            raise Malformed("a UNICODE line that does not decode") from None
        return pos_next

    def _short_binunicode(self, pos: int) -> int:
        ends = pos + 1 + self.data[pos]
        self.stack.append(self.text(pos + 1, ends))
        return ends

    def _binunicode8(self, pos: int) -> int:
        ends = pos + 8 + _u64(self.data, pos)[0]
        self.stack.append(self.text(pos + 8, ends))
        return int(ends)

    def _empty_list(self, pos: int) -> int:
        self.stack.append([])
        return pos

    def _list(self, pos: int) -> int:
        self.stack.append(self._since_mark())
        return pos

    def _dict(self, pos: int) -> int:
        items = self._since_mark()
        made: dict[Any, Any] = {}
        self.set_items(made, items)
        self.stack.append(made)
        return pos

    def _tuple3(self, pos: int) -> int:
        stack = self.stack
        third, second = stack.pop(), stack.pop()
        stack[-1] = (stack[-1], second, third)
        return pos

    def _append(self, pos: int) -> int:
        value = self.stack.pop()
        self._extend(self.stack[-1], [value])
        return pos

    def _appends(self, pos: int) -> int:
        items = self._since_mark()
        self._extend(self.stack[-1], items)
        return pos

    def _extend(self, target: Any, items: list[Any]) -> None:
        if type(target) is list:
            target.extend(items)
        elif type(target) is Reduced:
            if target.items is None:
                target.items = []
            target.items.extend(items)
        else:
            raise Malformed(f"it appends to a {type(target).__name__}")

    def _setitem(self, pos: int) -> int:
        value = self.stack.pop()
        key = self.stack.pop()
        self.set_items(self.stack[-1], [key, value])
        return pos

    def set_items(self, target: Any, items: Sequence[Any]) -> None:
        if len(items) % 2:
            raise Malformed("a key without its value")
        if type(target) is Reduced:
            if target.pairs is None:
                target.pairs = {}
            target = target.pairs
        elif type(target) is not dict:
            raise Malformed(f"it sets a key of a {type(target).__name__}")
        rest = iter(items)
        for key in rest:
            target[key if type(key) is str else as_key(key)] = next(rest)

    def store(self, index: int) -> None:
        """Store the top of the stack in the memo."""
        value = self.stack[-1]
        if index < len(self.memo):
            self.memo[index] = value
        elif index == len(self.memo):
            self.far.pop(str(index), None)
            self.memo.append(value)
        else:
            self.far[str(index)] = value

    def fetch(self, index: int) -> Any:
        """Entry `index` of the memo."""
        if index < len(self.memo):
            return self.memo[index]
        try:
            return self.far[str(index)]
        except KeyError:
            raise Malformed(f"it fetches entry {index} of the memo, which was never stored") from None

    def _put(self, pos: int) -> int:
        line, pos_next = self._line(pos)
        self.store(self._index(line))
        return pos_next

    def _get(self, pos: int) -> int:
        line, pos_next = self._line(pos)
        self.stack.append(self.fetch(self._index(line)))
        return pos_next

    def _global(self, pos: int) -> int:
        module, pos = self._line(pos)
        name, pos = self._line(pos)
        self.stack.append(
            self.named(module.decode("utf-8", "backslashreplace"), name.decode("utf-8", "backslashreplace"))
        )
        return pos

    def _stack_global(self, pos: int) -> int:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise Malformed("the name of a global is not text")
        self.stack.append(self.named(module, name))
        return pos

    def _ext(self, pos: int, size: int) -> int:
        if pos + size > self.stop:
            raise Cut("in the code of an extension")
        code = int.from_bytes(self.data[pos : pos + size], "little")
        self.stack.append(self.named("copyreg.extension", str(code)))
        return pos + size

    def _ext1(self, pos: int) -> int:
        return self._ext(pos, 1)

    def _ext2(self, pos: int) -> int:
        return self._ext(pos, 2)

    def _ext4(self, pos: int) -> int:
        return self._ext(pos, 4)

    def _inst(self, pos: int) -> int:
        args = tuple(self._since_mark())
        pos = self._global(pos)
        self.stack[-1] = self.call(self.stack[-1], args)
        return pos

    def _obj(self, pos: int) -> int:
        items = self._since_mark()
        if not items:
            raise Malformed("an object without its class")
        self.stack.append(self.call(items[0], tuple(items[1:])))
        return pos

    def _newobj_ex(self, pos: int) -> int:
        kwargs, args = self.stack.pop(), self.stack.pop()
        self.stack[-1] = Reduced(self.stack[-1], (args, kwargs))
        return pos

    def _persid(self, pos: int) -> int:
        line, pos_next = self._line(pos)
        self.stack.append(self.persistent(line.decode("utf-8", "backslashreplace")))
        return pos_next

    def _out_of_band(self, pos: int) -> int:
        raise Malformed("it needs out-of-band buffers, which no file holds")


_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|[0-7]{1,3}|.)", re.DOTALL)
_LETTERS = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v"}


def _unescape(match: re.Match[bytes]) -> bytes:
    body = match[1]
    if body[:1] == b"x" and len(body) == 3:
        return bytes([int(body[1:], 16)])
    if body.isdigit() and body[0] < 0x38:
        return bytes([int(body, 8) & 0xFF])
    return _LETTERS.get(body, body)


_METHODS: dict[int, str] = {
    opcode[0]: method
    for opcode, method in {
        b"0": "_pop", b"1": "_pop_mark", b"2": "_dup", b"N": "_none", b"\x88": "_true",
        b"I": "_int", b"L": "_long", b"\x8a": "_long1", b"\x8b": "_long4", b"F": "_float", b"G": "_binfloat",
        b"S": "_string", b"T": "_binstring", b"U": "_short_binstring",
        b"C": "_short_binbytes", b"B": "_binbytes", b"\x8e": "_binbytes8", b"\x96": "_binbytes8",
        b"V": "_unicode", b"\x8c": "_short_binunicode", b"\x8d": "_binunicode8",
        b"]": "_empty_list", b"l": "_list", b"d": "_dict", b"\x87": "_tuple3",
        b"a": "_append", b"e": "_appends", b"s": "_setitem",
        b"\x8f": "_empty_list", b"\x90": "_appends", b"\x91": "_list",  # sets: in file order, as lists
        b"p": "_put", b"g": "_get",
        b"c": "_global", b"\x93": "_stack_global", b"\x82": "_ext1", b"\x83": "_ext2", b"\x84": "_ext4",
        b"i": "_inst", b"o": "_obj", b"\x92": "_newobj_ex",
        b"P": "_persid", b"\x80": "_proto", b"\x95": "_frame",
        b"\x97": "_out_of_band", b"\x98": "_out_of_band",
    }.items()
}  # fmt: skip
