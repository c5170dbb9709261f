"""The directory of a zip file, read strictly.

A zip says everything twice, and programs that trust different copies see different files. Here the
directory at the end of the file is what counts, and whatever contradicts it is an error.
"""

from __future__ import annotations

import struct
from itertools import zip_longest
from typing import TYPE_CHECKING

from torchparams.errors import (
    FileFormatError,
    LimitExceeded,
    NotReadable,
    SizeMismatch,
    TrailingBytes,
    TruncatedFile,
    shorten,
)
from torchparams.render.tree import plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torchparams.io.filebytes import FileBytes

# Only what is used; x skips dates and attributes.
_LOCAL = struct.Struct("<4s2xHH4xLLLHH")  # mark, flags, method, crc, stored, size, lengths of name and extra field
_CENTRAL = struct.Struct("<4s2xBxHH4xLLLHHH8xL")  # mark, version, flags, method, crc, stored, size, lengths, header
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_COMMENT = 0xFFFF  # longest comment after the end record
_STORED, _DEFLATED = 0, 8
_VERSION = 63  # of the format that a member needs, times ten: nothing above 6.3 is specified
# Encrypted, patched, strongly encrypted, masked headers: whatever says that the contents are not what they seem.
_ODD_FLAGS = 1 << 0 | 1 << 5 | 1 << 6 | 1 << 13
_PIECE = 1 << 20
_ALIGNMENTS = tuple(64 << shift for shift in range(11))  # of contents; 64 unless torch.serialization is told otherwise
_METHODS = {1: "shrunk", 6: "imploded", 9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz"}


class Member:
    """One file in a zip, as the directory describes it.

    Attributes:
        name: Its path in the zip.
        header: Where its local header begins.
        stored: Bytes that it takes in the file, compressed or not.
        size: Bytes of its contents.
        crc: CRC-32 of its contents; 0 may also mean that nobody computed it.
        method: 0 for stored as it is, 8 for DEFLATE.
        flags: Bit 0: encrypted. Bit 3: the local header does not know the sizes.
        version: Version of the format that it needs, times ten.
        raw: Its name as it stands in the directory.
        room: Where the next member's header or the directory begins.
        problem: How its local header contradicts the directory, once somebody has looked, or None. It is listed all
            the same, and not read.
    """

    __slots__ = ("crc", "flags", "header", "method", "name", "problem", "raw", "room", "size", "stored", "version")

    def __init__(
        self, raw: bytes, header: int, stored: int, size: int, crc: int, method: int, flags: int, version: int
    ) -> None:
        self.raw, self.header, self.stored, self.size = raw, header, stored, size
        self.crc, self.method, self.flags, self.version = crc, method, flags, version
        self.name = str(raw, "utf-8", "backslashreplace")
        self.room = 0
        self.problem: str | None = None

    @property
    def compressed(self) -> bool:
        """Whether it has to be inflated."""
        return self.method != _STORED


class ZipDirectory:
    """The members of a zip file.

    Attributes:
        members: By name.

    Raises:
        TruncatedFile: The directory, or a part of it, is not there.
        TrailingBytes: Something follows its end.
        FileFormatError: It contradicts itself or the file.
    """

    def __init__(self, file: FileBytes) -> None:
        self.file = file
        start, stop, count = self._find()
        self.members = self._read(start, stop, count)
        self._check_room(start)

    def _find(self) -> tuple[int, int, int]:
        """Where the directory begins and ends, and how many members it lists."""
        file = self.file
        tail_start = max(0, file.size - _END.size - _COMMENT)
        tail = file.read(tail_start, file.size)
        at = best = tail.rfind(b"PK\5\6")
        while at >= 0:
            after = len(tail) - at - _END.size
            if after >= 0 and int.from_bytes(tail[at + 20 : at + 22], "little") == after:
                break
            at = tail.rfind(b"PK\5\6", 0, at)
        if at < 0:
            after = len(tail) - best - _END.size
            if best < 0 or after < int.from_bytes(tail[best + 20 : best + 22], "little"):
                raise TruncatedFile(
                    f"the zip is cut off: its directory should end it, and none does; {file.size:,} bytes are there",
                    where=file.path,
                    hint="copy or download the file again",
                )
            raise TrailingBytes(
                f"{plural(after, 'byte')} after the end of the zip, at byte {tail_start + best + _END.size}",
                where=file.path,
            )
        end = tail_start + at
        _, disk, first_disk, here, count, nbytes, start, _ = _END.unpack_from(tail, at)
        fields = {"members": (count, _MAX16), "bytes": (nbytes, _MAX32), "offset": (start, _MAX32)}
        locator = end - _END64_LOCATOR.size
        if locator >= 0 and file.read(locator, locator + 4) == b"PK\6\7":
            found = self._read_end64(locator)
            for name, (short, most) in fields.items():
                if short not in (most, found[name]):
                    raise SizeMismatch(
                        f"the two end records of the zip give its directory's {name} as {short:,} and {found[name]:,}",
                        where=file.path,
                    )
            count, nbytes, start, end = found["members"], found["bytes"], found["offset"], found["end"]
        elif disk or first_disk or here != count:
            raise FileFormatError("the zip is one part of several", where=file.path, hint="join its parts first")
        if start + nbytes != end:
            raise SizeMismatch(
                f"the zip's directory takes bytes {start} to {start + nbytes} by its own account, "
                f"and ends at byte {end}",
                where=file.path,
                hint="bytes were added to, or are missing from, the beginning or the middle of the file",
            )
        return start, end, count

    def _read_end64(self, locator: int) -> dict[str, int]:
        file = self.file
        _, disk, at, disks = _END64_LOCATOR.unpack(file.read(locator, locator + _END64_LOCATOR.size))
        if at + _END64.size > locator or disk or disks > 1:
            raise FileFormatError(f"the zip's 64-bit end record cannot be at byte {at}", where=file.path)
        mark, length, _, _, disk, first, here, count, nbytes, start = _END64.unpack(file.read(at, at + _END64.size))
        if mark != b"PK\6\6" or at + 12 + length != locator or here != count or disk or first:
            raise FileFormatError(f"there is no 64-bit end record of the zip at byte {at}", where=file.path)
        return {"members": count, "bytes": nbytes, "offset": start, "end": at}

    def _read(self, start: int, stop: int, count: int) -> dict[str, Member]:
        where = self.file.path
        data = self.file.read(start, stop)
        members: dict[str, Member] = {}
        pos = 0
        unpack, fixed = _CENTRAL.unpack_from, _CENTRAL.size
        for _ in range(count):
            if pos + fixed > len(data):
                raise FileFormatError(
                    f"the zip's directory lists {count:,} members and ends after {len(members):,}", where=where
                )
            mark, version, flags, method, crc, stored, size, name_len, extra_len, comment_len, header = unpack(
                data, pos
            )
            if mark != b"PK\1\2":
                raise FileFormatError(f"the zip's directory has no entry at byte {start + pos}", where=where)
            begins = pos + fixed
            pos = begins + name_len + extra_len + comment_len
            if pos > len(data):
                raise FileFormatError(f"the zip's directory ends within entry {len(members):,}", where=where)
            member = Member(data[begins : begins + name_len], header, stored, size, crc, method, flags, version)
            if stored == _MAX32 or size == _MAX32 or header == _MAX32:
                extra = data[begins + name_len : begins + name_len + extra_len]
                member.size, member.stored, member.header = _wide(extra, size, stored, header)
            if member.name in members:
                raise FileFormatError(f"the zip holds two members named {shorten(repr(member.name))}", where=where)
            members[member.name] = member
        if pos != len(data):
            raise FileFormatError(
                f"the zip's directory goes on for {len(data) - pos:,} bytes after its {count:,} members", where=where
            )
        return members

    def _check_room(self, directory: int) -> None:
        """No two members overlap, and none reaches into the directory."""
        ordered = sorted(self.members.values(), key=lambda member: member.header)
        for member, after in zip_longest(ordered, ordered[1:]):
            member.room = directory if after is None else after.header
            # The local header's extra field comes on top; it is looked at when the member is read.
            if member.header + _LOCAL.size + len(member.raw) + member.stored > member.room:
                other = "the directory" if after is None else shorten(repr(after.name))
                raise FileFormatError(
                    f"in the zip, {shorten(repr(member.name))} of {member.stored:,} bytes at byte {member.header} "
                    f"overlaps {other} at byte {member.room}",
                    where=self.file.path,
                )

    def starts(self, members: Iterable[Member]) -> dict[str, int]:
        """Where each member's contents begin, by name: after its local header, which is read for this.

        The header is held against the directory. What keeps the contents from being read is a member's `problem`.

        Raises:
            FileFormatError: The header contradicts the directory, or the contents do not fit.
            NotReadable: The member is encrypted, or compressed by something other than DEFLATE.
        """
        chosen = list(members)
        self.refuse_unreadable(chosen)
        # What `_check_room` found to be there: a header and the name.
        ranges = ((member.header, member.header + _LOCAL.size + len(member.raw)) for member in chosen)
        headers = self.file.read_each(ranges)
        return {member.name: self._begin_of(member, header) for member, header in zip(chosen, headers, strict=True)}

    def refuse_unreadable(self, members: Iterable[Member]) -> None:
        """Refuse members that are encrypted, or compressed by something other than DEFLATE.

        Raises:
            NotReadable: One is.
            SizeMismatch: One is stored as it is, in another number of bytes than it has.
        """
        where = self.file.path
        for member in members:
            if member.flags & 1:
                raise NotReadable(f"{shorten(repr(member.name))} is encrypted", where=where)
            if member.method not in (_STORED, _DEFLATED):
                how = _METHODS.get(member.method, f"compressed by method {member.method}")
                raise NotReadable(f"{shorten(repr(member.name))} is {how}; stored and DEFLATE are read", where=where)
            if member.method == _STORED and member.stored != member.size:
                raise SizeMismatch(
                    f"{shorten(repr(member.name))} is stored as it is, in {member.stored:,} bytes, "
                    f"and has {member.size:,}",
                    where=where,
                )

    def _begin_of(self, member: Member, header: bytes) -> int:
        """Where the contents of a member begin, by its local header, which is held against the directory."""
        where = self.file.path
        fixed = _LOCAL.size
        mark, flags, method, crc, stored, size, name_len, extra_len = _LOCAL.unpack_from(header)
        named = header[fixed : fixed + len(member.raw)] == member.raw and name_len == len(member.raw)
        if mark != b"PK\3\4" or method != member.method or not named:
            raise FileFormatError(
                f"there is no {shorten(repr(member.name))} at byte {member.header}, where the zip's directory has it",
                where=where,
            )
        # Writers that did not know the sizes beforehand left zeros.
        if (stored and stored not in (member.stored, _MAX32)) or (size and size not in (member.size, _MAX32)):
            raise SizeMismatch(
                f"{shorten(repr(member.name))} has {size:,} bytes by its own header and {member.size:,} by the "
                "zip's directory",
                where=where,
            )
        begin: int = member.header + fixed + name_len + extra_len
        if begin + member.stored > member.room:
            raise FileFormatError(
                f"{shorten(repr(member.name))} takes bytes {begin} to {begin + member.stored}, and what follows it "
                f"begins at byte {member.room}",
                where=where,
            )
        if stored == _MAX32 or size == _MAX32:
            extra = header[fixed + name_len : fixed + name_len + extra_len]
            if len(extra) < extra_len:
                extra = self.file.read(begin - extra_len, begin)
            size, stored = _wide(extra, size, stored)
        member.problem = _contradiction(member, flags, crc, stored, size)
        return begin

    def expected(self, members: Iterable[Member], read: Mapping[str, int]) -> dict[str, int] | None:
        """Where the contents of members begin if one writer aligned them all as torch does; None if it did not.

        For a file of which each local header would take a request. What is told of one here holds once `confirm` has
        seen its header.

        Args:
            members: The members.
            read: Where others begin, whose headers were read.

        Raises:
            NotReadable: A member is encrypted, or compressed by something other than DEFLATE.
            SizeMismatch: One is stored as it is, in another number of bytes than it has.
        """
        chosen = list(members)
        self.refuse_unreadable(chosen)
        wide = [member for member in chosen if member.size >= _MAX32 or member.header >= _MAX32]
        known = {**read, **self.starts(wide[-1:])}  # writers differ in what they note of these
        fitting = (
            size
            for size in _ALIGNMENTS
            if all(_aligned(self.members[name], size) == begin for name, begin in known.items())
        )
        alignment = next(fitting, None)
        if alignment is None:
            return None
        found = {member.name: _aligned(member, alignment) for member in chosen}
        fits = all(begin + self.members[name].stored <= self.members[name].room for name, begin in found.items())
        return found if fits else None

    def confirm(self, member: Member, begin: int, header: bytes) -> None:
        """Hold the header of a member against where its contents are expected.

        Raises:
            FileFormatError: The header contradicts the directory, or the contents are elsewhere.
        """
        found = self._begin_of(member, header)
        self.refuse(member)
        if found != begin:
            raise FileFormatError(
                f"{shorten(repr(member.name))} begins at byte {found}, not at byte {begin}, as others are aligned",
                where=self.file.path,
                hint="download the file, and name it",
            )

    def refuse(self, member: Member) -> None:
        """Refuse to read a member whose local header contradicts the directory.

        Raises:
            FileFormatError: It does.
        """
        if member.problem is not None:
            raise FileFormatError(f"{shorten(repr(member.name))} {member.problem}", where=self.file.path)

    def inflate(self, member: Member, begin: int, most: int) -> bytearray:
        """The contents of a compressed member.

        Raises:
            LimitExceeded: They are more than `most` bytes.
            SizeMismatch: They are not as many as the directory says.
            FileFormatError: They are not DEFLATE.
        """
        where = f"{self.file.path}, {shorten(member.name)}"
        if member.size > most:
            raise LimitExceeded(
                f"it inflates from {member.stored:,} to {member.size:,} bytes, and the limit is {most:,}", where=where
            )
        contents = bytearray()
        for chunk in self.chunks(member, begin):
            contents += chunk
        return contents

    def chunks(self, member: Member, begin: int) -> Iterator[bytes]:
        """The contents of a member, piece by piece; a compressed one never gives more than the directory says.

        Raises:
            SizeMismatch: They are not as many bytes as the directory says.
            FileFormatError: They are not DEFLATE.
        """
        import zlib

        self.refuse(member)
        end = begin + member.stored
        steps = ((at, min(at + _PIECE, end)) for at in range(begin, end, _PIECE))
        if not member.compressed:
            yield from self.file.read_each(steps)
            return
        machine = zlib.decompressobj(-zlib.MAX_WBITS)
        where = f"{self.file.path}, {shorten(member.name)}"
        count = 0
        try:
            for piece in self.file.read_each(steps):
                while piece and not machine.eof and count <= member.size:
                    contents = machine.decompress(piece, min(member.size - count + 1, _PIECE))
                    count += len(contents)
                    yield contents[: len(contents) - max(0, count - member.size)]
                    piece = machine.unconsumed_tail
        except zlib.error as error:
            raise FileFormatError(f"its compressed contents are damaged: {error}", where=where) from None
        if count != member.size or not machine.eof:
            more = " or more" if count >= member.size else ""
            raise SizeMismatch(
                f"it inflates to {count:,} bytes{more}, and the zip's directory says {member.size:,}", where=where
            )


def _aligned(member: Member, alignment: int) -> int:
    """Where torch puts the contents of a member: at a multiple of the alignment, behind a field that fills the room.

    So `getPadding` of torch/csrc, caffe2/serialize/inline_container.cc.
    """
    begin = member.header + _LOCAL.size + len(member.raw) + 4
    if member.size >= _MAX32 or member.header >= _MAX32:
        begin += 4 + 16 * (member.size >= _MAX32) + 8 * (member.header >= _MAX32)
    return -(-begin // alignment) * alignment


def _contradiction(member: Member, flags: int, crc: int, stored: int, size: int) -> str | None:
    """What a local header says against the directory, or what neither should say; None where all is well."""
    if member.version > _VERSION:
        return f"needs version {member.version / 10} of the zip format; {_VERSION / 10} is the last"
    odd = (flags | member.flags) & _ODD_FLAGS
    if odd:
        what = "encrypted" if odd & (1 << 0 | 1 << 6) else "patched" if odd & 1 << 5 else "masked"
        return f"is {what} by its own header" if flags & odd else f"is {what} by the zip's directory"
    # Writers that did not know them beforehand left zeros.
    if crc and crc != member.crc:
        return f"has the CRC-32 {crc:#010x} by its own header and {member.crc:#010x} by the zip's directory"
    if (stored and stored != member.stored) or (size and size != member.size):
        return f"has {size:,} bytes by its own header and {member.size:,} by the zip's directory"
    return None


def _wide(extra: bytes, *values: int) -> list[int]:
    """Sizes and offset that take 64 bits, which are in the extra field in the order size, stored, offset."""
    pos = 0
    while pos + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, pos)
        if kind == 1:
            wide = extra[pos + 4 : pos + 4 + length]
            wanted = [i for i, value in enumerate(values) if value == _MAX32]
            if len(wide) < 8 * len(wanted):
                break
            found = list(values)
            for place, i in enumerate(wanted):
                found[i] = int.from_bytes(wide[8 * place : 8 * place + 8], "little")
            return found
        pos += 4 + length
    return list(values)  # then they are meant as they stand
