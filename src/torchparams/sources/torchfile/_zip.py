"""Strict reader of the directory of a zip file.

A zip stores most facts twice, and programs that trust different copies see different files. Here, the directory at the
end of the file is used, and every contradiction to it is an error.
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

# Only the fields that are used; x skips dates and attributes.
_LOCAL = struct.Struct("<4s2xHH4xLLLHH")  # mark, flags, method, crc, stored, size, lengths of name and extra field
_CENTRAL = struct.Struct("<4s2xBxHH4xLLLHHH8xL")  # mark, version, flags, method, crc, stored, size, lengths, header
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_COMMENT = 0xFFFF  # longest comment after the end record
_STORED, _DEFLATED = 0, 8
_VERSION = 63  # of the format that a member needs, times ten: nothing above 6.3 is specified
# Encrypted, patched, strongly encrypted, masked headers: flags that say that the contents are transformed.
_ODD_FLAGS = 1 << 0 | 1 << 5 | 1 << 6 | 1 << 13
_PIECE = 1 << 20
_ALIGNMENTS = tuple(64 << shift for shift in range(11))  # of contents; 64 unless torch.serialization is told otherwise
_METHODS = {1: "shrunk", 6: "imploded", 9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz"}


class Member:
    """One file in a zip, as described by the directory.

    Attributes:
        name: Path in the zip.
        header: Offset of its local header.
        stored: Size in the file, possibly compressed.
        size: Size of the contents.
        crc: CRC-32 of the contents; 0 may also mean that it was not computed.
        method: 0 for stored, 8 for DEFLATE.
        flags: Bit 0: encrypted. Bit 3: the local header does not have the sizes.
        version: Version of the format that it needs, times ten.
        raw: Name in the directory, as bytes.
        room: Offset of the next local header or of the directory.
        problem: How the local header contradicts the directory, after it was read, or None. Such a member is listed,
            but not read.
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
        """Whether the member is compressed."""
        return self.method != _STORED


class ZipDirectory:
    """The members of a zip file.

    Attributes:
        members: By name.

    Raises:
        TruncatedFile: The directory, or a part of it, is missing.
        TrailingBytes: There is data after its end.
        FileFormatError: The directory contradicts itself or the file.
    """

    def __init__(self, file: FileBytes) -> None:
        self.file = file
        start, stop, count = self._find()
        self.members = self._read(start, stop, count)
        self._check_room(start)

    def _find(self) -> tuple[int, int, int]:
        """Start and end of the directory, and the number of its members."""
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
                    f"the zip is cut off: it has {file.size:,} bytes and no directory at its end",
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
                f"the zip's directory takes bytes {start} to {start + nbytes} in its end record, "
                f"but ends at byte {end}",
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
        """Check that no two members overlap, and that none overlaps the directory."""
        ordered = sorted(self.members.values(), key=lambda member: member.header)
        for member, after in zip_longest(ordered, ordered[1:]):
            member.room = directory if after is None else after.header
            # The extra field of the local header comes on top; it is checked when the member is read.
            if member.header + _LOCAL.size + len(member.raw) + member.stored > member.room:
                other = "the directory" if after is None else shorten(repr(after.name))
                raise FileFormatError(
                    f"in the zip, {shorten(repr(member.name))} of {member.stored:,} bytes at byte {member.header} "
                    f"overlaps {other} at byte {member.room}",
                    where=self.file.path,
                )

    def starts(self, members: Iterable[Member]) -> dict[str, int]:
        """Offset of the contents of each member, by name; reads the local headers.

        Each header is checked against the directory. What prevents reading is stored as `problem` of the member.

        Raises:
            FileFormatError: The header contradicts the directory, or the contents do not fit.
            NotReadable: A member is encrypted, or compressed with a method other than DEFLATE.
        """
        chosen = list(members)
        self.refuse_unreadable(chosen)
        # `_check_room` made sure that these bytes exist: a header and the name.
        ranges = ((member.header, member.header + _LOCAL.size + len(member.raw)) for member in chosen)
        headers = self.file.read_each(ranges)
        return {member.name: self._begin_of(member, header) for member, header in zip(chosen, headers, strict=True)}

    def refuse_unreadable(self, members: Iterable[Member]) -> None:
        """Raise if members are encrypted, or compressed with a method other than DEFLATE.

        Raises:
            NotReadable: A member is encrypted or compressed in such a way.
            SizeMismatch: A stored member has two different sizes.
        """
        where = self.file.path
        for member in members:
            if member.flags & 1:
                raise NotReadable(f"{shorten(repr(member.name))} is encrypted", where=where)
            if member.method not in (_STORED, _DEFLATED):
                how = _METHODS.get(member.method, f"compressed with method {member.method}")
                raise NotReadable(
                    f"{shorten(repr(member.name))} is {how}; only stored and DEFLATE members are supported", where=where
                )
            if member.method == _STORED and member.stored != member.size:
                raise SizeMismatch(
                    f"{shorten(repr(member.name))} is stored uncompressed in {member.stored:,} bytes, "
                    f"but has {member.size:,}",
                    where=where,
                )

    def _begin_of(self, member: Member, header: bytes) -> int:
        """Offset of the contents of a member, from its local header, which is checked against the directory."""
        where = self.file.path
        fixed = _LOCAL.size
        mark, flags, method, crc, stored, size, name_len, extra_len = _LOCAL.unpack_from(header)
        named = header[fixed : fixed + len(member.raw)] == member.raw and name_len == len(member.raw)
        if mark != b"PK\3\4" or method != member.method or not named:
            raise FileFormatError(
                f"there is no {shorten(repr(member.name))} at byte {member.header}, where the zip's directory has it",
                where=where,
            )
        # Writers that did not know the sizes in advance wrote zeros.
        if (stored and stored not in (member.stored, _MAX32)) or (size and size not in (member.size, _MAX32)):
            raise SizeMismatch(
                f"{shorten(repr(member.name))} has {size:,} bytes in its own header and {member.size:,} in the "
                "zip's directory",
                where=where,
            )
        begin: int = member.header + fixed + name_len + extra_len
        if begin + member.stored > member.room:
            raise FileFormatError(
                f"{shorten(repr(member.name))} takes bytes {begin} to {begin + member.stored}, but the next member "
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
        """Expected offsets of the contents if one writer aligned all members as torch does; otherwise None.

        Used for a remote file, where reading each local header would need a request. The offsets are valid only after
        `confirm` has checked the header.

        Args:
            members: The members.
            read: Offsets of members whose headers were read.

        Raises:
            NotReadable: A member is encrypted, or compressed with a method other than DEFLATE.
            SizeMismatch: A stored member has two different sizes.
        """
        chosen = list(members)
        self.refuse_unreadable(chosen)
        wide = [member for member in chosen if member.size >= _MAX32 or member.header >= _MAX32]
        known = {**read, **self.starts(wide[-1:])}  # writers differ in the headers of these
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
        """Check the header of a member against the expected offset of its contents.

        Raises:
            FileFormatError: The header contradicts the directory, or the contents are elsewhere.
        """
        found = self._begin_of(member, header)
        self.refuse(member)
        if found != begin:
            raise FileFormatError(
                f"{shorten(repr(member.name))} begins at byte {found}, not at byte {begin}, as the alignment of "
                "other members suggests",
                where=self.file.path,
                hint="download the file and open the copy",
            )

    def refuse(self, member: Member) -> None:
        """Raise if the local header of a member contradicts the directory.

        Raises:
            FileFormatError: The header contradicts the directory.
        """
        if member.problem is not None:
            raise FileFormatError(f"{shorten(repr(member.name))} {member.problem}", where=self.file.path)

    def inflate(self, member: Member, begin: int, most: int) -> bytearray:
        """Contents of a compressed member.

        Raises:
            LimitExceeded: The contents are more than `most` bytes.
            SizeMismatch: The size differs from the directory.
            FileFormatError: The contents are not DEFLATE.
        """
        where = f"{self.file.path}, {shorten(member.name)}"
        if member.size > most:
            raise LimitExceeded(
                f"it inflates from {member.stored:,} to {member.size:,} bytes; the limit is {most:,}", where=where
            )
        contents = bytearray()
        for chunk in self.chunks(member, begin):
            contents += chunk
        return contents

    def chunks(self, member: Member, begin: int) -> Iterator[bytes]:
        """Yield the contents of a member in pieces; never more than the size in the directory.

        Raises:
            SizeMismatch: The size differs from the directory.
            FileFormatError: The contents are not DEFLATE.
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
                f"it inflates to {count:,} bytes{more}, but the zip's directory says {member.size:,}", where=where
            )


def _aligned(member: Member, alignment: int) -> int:
    """Where torch puts the contents of a member: at a multiple of the alignment, after a padding field.

    See `getPadding` in torch/csrc, caffe2/serialize/inline_container.cc.
    """
    begin = member.header + _LOCAL.size + len(member.raw) + 4
    if member.size >= _MAX32 or member.header >= _MAX32:
        begin += 4 + 16 * (member.size >= _MAX32) + 8 * (member.header >= _MAX32)
    return -(-begin // alignment) * alignment


def _contradiction(member: Member, flags: int, crc: int, stored: int, size: int) -> str | None:
    """How a local header contradicts the directory, or uses an unsupported feature; None if all is well."""
    if member.version > _VERSION:
        return f"needs version {member.version / 10} of the zip format; the last version is {_VERSION / 10}"
    odd = (flags | member.flags) & _ODD_FLAGS
    if odd:
        what = "encrypted" if odd & (1 << 0 | 1 << 6) else "patched" if odd & 1 << 5 else "masked"
        return (
            f"is {what} according to its own header" if flags & odd else f"is {what} according to the zip's directory"
        )
    # Writers that did not know them in advance wrote zeros.
    if crc and crc != member.crc:
        return f"has the CRC-32 {crc:#010x} in its own header and {member.crc:#010x} in the zip's directory"
    if (stored and stored != member.stored) or (size and size != member.size):
        return f"has {size:,} bytes in its own header and {member.size:,} in the zip's directory"
    return None


def _wide(extra: bytes, *values: int) -> list[int]:
    """64-bit sizes and offset, stored in the extra field in the order size, stored, offset."""
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
    return list(values)  # the values are valid as they are
