"""A pickle interpreter that executes no code.

A pickle is a program for a stack machine. Two of its operations import something and call it. Here, a global stays a
name (`Global`) and a call is only recorded (`Reduced`), unless the name is in the table of known constructors
(`_rebuild.py`). So a file can describe anything but execute nothing.

The interpreter also protects itself against hostile files:

- Time and memory. There are no jumps, so a pickle always ends. An operation allocates about 100 bytes at most, and
  `limits.PICKLE_OPERATIONS` limits their number in proportion to the file size. Declared lengths are checked against
  the available bytes before anything is allocated.
- Hashing. Numbers from the file, which could be chosen to collide, are never used as dict keys directly. Number keys
  are wrapped in `NumberKey`, which hashes their text; keys that are slow to hash or compare are wrapped in `OddKey`,
  which hashes by identity. The memo is a list; indexes that leave gaps are stored by their text.
- Nesting. The interpreter does not recurse, and does not traverse what it built.
"""

from __future__ import annotations

import struct
from itertools import repeat
from operator import length_hint
from typing import Any

from torchparams.errors import FileFormatError, TruncatedFile
from torchparams.sources.torchfile._pickle_ops import MARK_GONE, Operations
from torchparams.sources.torchfile._pickle_values import LONG_TEXT, Cut, Global, Malformed, Rebuilt, Reduced

_u16 = struct.Struct("<H").unpack_from
_i32 = struct.Struct("<i").unpack_from
_u32 = struct.Struct("<I").unpack_from

# Operations handled in the loop itself: most of a state_dict consists of them.
_BINPUT, _LONG_BINPUT, _BINGET, _LONG_BINGET = b"qrhj"
_BININT1, _BININT2, _BININT, _BINUNICODE = b"KMJX"
_MARK, _TUPLE, _TUPLE1, _TUPLE2 = b"(t\x85\x86"
_BINPERSID, _REDUCE, _EMPTY_TUPLE, _NEWFALSE, _MEMOIZE, _STOP = b"QR)\x89\x94."
_NEWOBJ, _BUILD, _EMPTY_DICT, _SETITEMS = b"\x81b}u"
_PROTOCOL_2 = 0x80  # operations from here on came with protocol 2
# Number of bytes after an operation of fixed length, to tell an empty stack from a truncated file.
_FIXED = {
    **dict.fromkeys(b"qhKUC\x80\x82\x8a\x8c", 1),
    **dict.fromkeys(b"M\x83", 2),
    **dict.fromkeys(b"rjJXTB\x84\x8b", 4),
    **dict.fromkeys(b"G\x8d\x8e\x95\x96", 8),
}


_BEYOND = "it goes on beyond its end"


class Machine(Operations):
    """Run the pickles of one buffer.

    Args:
        data: The buffer.
        stop: End of the bytes that may belong to a pickle.
        label: Name of the buffer in messages: a path, or a member of a zip.
        constructors: Replacements for known constructors, by module and name.
        persistent: Converts a persistent id to a value; raises `Malformed`.
        file_bytes: Size of the whole file; the limit on operations is proportional to it.
        in_file: Whether the buffer is the whole file, so that positions in it are file offsets.
    """

    def load(self, pos: int) -> tuple[Any, int]:
        """Run the pickle at byte `pos`; return its value and the byte after its end.

        Raises:
            TruncatedFile: The pickle continues beyond the end of the buffer.
            FileFormatError: The data is not a pickle.
            LimitExceeded: The pickle runs too many operations.
        """
        data, table, persistent = self.data, self.operations(), self.persistent
        stack: list[Any] = []
        marks: list[int] = []
        memo: list[Any] = []
        far: dict[str, Any] = {}
        self.stack, self.marks, self.memo, self.far = stack, marks, memo, far
        push, remember = stack.append, memo.append
        begin = pos
        allowed = self.left
        operations = repeat(None, allowed)
        try:
            # Ordered by frequency; `pos` moves only after an operation has succeeded.
            for _ in operations:
                op = data[pos]
                pos += 1
                if op == _LONG_BINPUT:
                    index = _u32(data, pos)[0]
                    if index == len(memo) and not far:
                        remember(stack[-1])
                    else:
                        self.store(index)
                    pos += 4
                elif op == _BININT1:
                    push(data[pos])
                    pos += 1
                elif op == _BINGET:
                    index = data[pos]
                    push(memo[index] if index < len(memo) else self.fetch(index))
                    pos += 1
                elif op >= _PROTOCOL_2:
                    if op == _MEMOIZE:
                        if far:
                            self.store(len(memo) + len(far))
                        else:
                            remember(stack[-1])
                    elif op == _TUPLE2:
                        second = stack.pop()
                        stack[-1] = (stack[-1], second)
                    elif op == _TUPLE1:
                        stack[-1] = (stack[-1],)
                    elif op == _NEWFALSE:
                        push(False)
                    elif op == _NEWOBJ:
                        args = stack.pop()
                        func = stack[-1]
                        build = func.build if type(func) is Global else None
                        made = NotImplemented if build is None else build(self, func, args)
                        # Only classes can be called here, so no call is recorded.
                        stack[-1] = Reduced(func, args) if made is NotImplemented else made
                    else:
                        pos = table[op](pos)
                elif op == _MARK:
                    marks.append(len(stack))
                elif op == _TUPLE:
                    mark = marks.pop()
                    if mark > len(stack):
                        raise Malformed("TUPLE after its MARK was taken off the stack")
                    items = tuple(stack[mark:])
                    del stack[mark:]
                    push(items)
                elif op == _BINUNICODE:
                    begins = pos + 4
                    ends = begins + _u32(data, pos)[0]
                    if ends - begins > LONG_TEXT or ends > self.stop:
                        push(self.text(begins, ends))
                    else:
                        try:
                            push(str(data[begins:ends], "utf-8"))
                        except UnicodeDecodeError:
                            push(self.text(begins, ends))
                    pos = ends
                elif op == _REDUCE:
                    args = stack.pop()
                    func = stack[-1]
                    build = func.build if type(func) is Global else None
                    made = NotImplemented if build is None else build(self, func, args)
                    stack[-1] = self.recorded(func, args) if made is NotImplemented else made
                elif op == _BINPERSID:
                    stack[-1] = persistent(stack[-1])
                elif op == _EMPTY_TUPLE:
                    push(())
                elif op == _BININT2:
                    push(_u16(data, pos)[0])
                    pos += 2
                elif op == _BINPUT:
                    index = data[pos]
                    if index == len(memo) and not far:
                        remember(stack[-1])
                    else:
                        self.store(index)
                    pos += 1
                elif op == _BININT:
                    push(_i32(data, pos)[0])
                    pos += 4
                elif op == _LONG_BINGET:
                    index = _u32(data, pos)[0]
                    push(memo[index] if index < len(memo) else self.fetch(index))
                    pos += 4
                elif op == _BUILD:
                    state = stack.pop()
                    target = stack[-1]
                    if type(target) is Reduced:
                        target.state = state
                    elif isinstance(target, Rebuilt):
                        target.set_state(self, state)
                    # Attributes of a dict (the `_metadata` of a state_dict) and similar hold no parameters: dropped.
                elif op == _EMPTY_DICT:
                    push({})
                elif op == _SETITEMS:
                    mark = marks.pop()
                    if mark > len(stack):
                        raise Malformed(MARK_GONE)
                    pairs = stack[mark:]
                    del stack[mark:]
                    self.set_items(stack[-1], pairs)
                elif op == _STOP:
                    break
                else:
                    pos = table[op](pos)
            else:
                self.charge(self.left + 1)
            if pos > self.stop:
                raise Cut(_BEYOND)
            value = stack.pop()
        except (Malformed, IndexError, struct.error) as error:
            raise self._error(error, begin, pos) from None
        self.charge(allowed - length_hint(operations))
        self.stack, self.marks, self.memo, self.far = [], [], [], {}
        return value, pos

    def _error(self, error: Exception, begin: int, pos: int) -> FileFormatError:
        """The error for what went wrong after byte `pos`."""
        from torchparams.sources.torchfile.verdict import judge

        alarm = judge(self.imported).alarm
        hint = None if alarm is None else f"before that it {alarm}"
        at = pos - 1
        op = self.data[at] if begin <= at < len(self.data) else 0
        if isinstance(error, Cut) or pos >= self.stop or pos + _FIXED.get(op, 0) > self.stop:
            # Bytes after the end belong to another part of the file follow are no operations.
            detail = "" if not isinstance(error, Cut) else f", {error}" if at < self.stop else f", {_BEYOND}"
            return TruncatedFile(
                f"the pickle that starts at byte {begin} is cut off at byte {self.stop}{detail}",
                where=self.label,
                hint=hint,
            )
        if isinstance(error, Malformed):
            what = str(error)
        else:
            what = f"operation {bytes([op])!r} finds the stack empty"
        return FileFormatError(f"the pickle is broken at byte {at}: {what}", where=self.label, hint=hint)
