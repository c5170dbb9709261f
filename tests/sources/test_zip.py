from __future__ import annotations

import struct
import zipfile
from typing import TYPE_CHECKING

import pytest
import torch

from torch_files import members_of, saved, written, zipped
from torchparams.errors import FileFormatError, NotReadable, SizeMismatch, SourceError, TrailingBytes, TruncatedFile
from torchparams.io.filebytes import FileBytes
from torchparams.sources.torchfile._zip import ZipDirectory

if TYPE_CHECKING:
    from pathlib import Path

TWO = {"top/a": b"first", "top/b": b"the second"}


def directory(folder: Path, contents: bytes) -> ZipDirectory:
    return ZipDirectory(FileBytes(written(folder, contents, "a.zip")))


def contents_of(zipped_: ZipDirectory) -> dict[str, bytes]:
    starts = zipped_.starts(zipped_.members.values())
    return {m.name: b"".join(zipped_.chunks(m, starts[m.name])) for m in zipped_.members.values()}


def refusal(folder: Path, contents: bytes, kind: type[SourceError] = FileFormatError) -> str:
    with pytest.raises(SourceError) as caught:
        contents_of(directory(folder, contents))
    assert type(caught.value) is kind
    return str(caught.value).removeprefix(str(folder / "a.zip"))


def patched(contents: bytes, mark: bytes, at: int, new: bytes, which: int = 0) -> bytes:
    """`contents` with other bytes at `at` bytes after the `which`th `mark`."""
    place = -1
    for _ in range(which + 1):
        place = contents.index(mark, place + 1)
    return contents[: place + at] + new + contents[place + at + len(new) :]


LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"


@pytest.mark.parametrize("deflate", [False, True])
def test_python_s_own_zips_read_back(tmp_path: Path, deflate: bool) -> None:
    members = {**TWO, "empty": b"", "ü/名": b"x", "large": bytes(range(256)) * 10_000}
    assert contents_of(directory(tmp_path, zipped(members, deflate=deflate))) == members


def test_torch_s_zips_read_back_as_python_reads_them(tmp_path: Path) -> None:
    contents = saved({"w": torch.randn(1000), "b": torch.ones(0)})
    assert b"PK\6\6" in contents
    assert contents_of(directory(tmp_path, contents)) == members_of(contents)


def test_sizes_of_64_bits(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("wide", "w", force_zip64=True) as member:
            member.write(b"contents")
        archive.writestr("after", b"more")
    assert contents_of(ZipDirectory(FileBytes(str(path)))) == {"wide": b"contents", "after": b"more"}
    # A directory entry whose sizes and offset stand in the extra field.
    contents = zipped(TWO)
    entry = contents.index(CENTRAL)
    name = b"top/a"
    wide = struct.pack("<HHQQQ", 1, 24, 5, 5, 0)
    head = bytearray(contents[entry : entry + 46])
    head[20:28] = b"\xff" * 8
    head[30:32] = struct.pack("<H", len(wide))
    head[42:46] = b"\xff" * 4
    rest = contents[entry + 46 + len(name) :]
    end = rest.index(END)
    size, start = struct.unpack_from("<LL", rest, end + 12)
    rest = rest[: end + 12] + struct.pack("<LL", size + len(wide), start) + rest[end + 20 :]
    assert contents_of(directory(tmp_path, contents[:entry] + bytes(head) + name + wide + rest)) == TWO


def test_a_comment_is_part_of_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"1")
        archive.comment = b"with PK\5\6 in it" + bytes(30)
    assert contents_of(ZipDirectory(FileBytes(str(path)))) == {"a": b"1"}


def test_cut_at_every_byte(tmp_path: Path) -> None:
    contents = zipped(TWO)
    for size in range(1, len(contents)):
        said = refusal(tmp_path, contents[:size], TruncatedFile)
        assert said == (
            f": The zip is cut off: it has {size} bytes and no directory at its end. Copy or download the file again."
        )


def test_bytes_after_the_end(tmp_path: Path) -> None:
    contents = zipped(TWO)
    assert refusal(tmp_path, contents + b"abc", TrailingBytes) == (
        f": 3 bytes after the end of the zip, at byte {len(contents)}"
    )


def test_bytes_before_the_beginning_or_in_the_middle(tmp_path: Path) -> None:
    contents = zipped(TWO)
    start = contents.index(CENTRAL)
    for broken in (b"#!/bin/sh\n" + contents, contents[:start] + b"x" + contents[start:]):
        assert "The zip's directory takes bytes" in refusal(tmp_path, broken, SizeMismatch)
        assert "but ends at byte" in refusal(tmp_path, broken, SizeMismatch)


def test_duplicate_members(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        contents = zipped([("top/a", b"1"), ("top/a", b"2")])
    assert refusal(tmp_path, contents) == ": The zip holds two members named 'top/a'"


def test_overlapping_members(tmp_path: Path) -> None:
    contents = zipped(TWO)
    second = contents.index(LOCAL, 1)
    both = patched(contents, CENTRAL, 42, struct.pack("<L", second), 0)
    assert refusal(tmp_path, both).startswith(": In the zip, 'top/a' of 5 bytes at byte 40 overlaps 'top/b' at byte 40")
    long = patched(contents, CENTRAL, 20, struct.pack("<LL", 99, 99), 0)
    assert refusal(tmp_path, long) == (": In the zip, 'top/a' of 99 bytes at byte 0 overlaps 'top/b' at byte 40")
    last = patched(contents, CENTRAL, 20, struct.pack("<LL", 99, 99), 1)
    assert refusal(tmp_path, last) == (": In the zip, 'top/b' of 99 bytes at byte 40 overlaps the directory at byte 85")
    beyond = patched(contents, CENTRAL, 42, struct.pack("<L", 1 << 30), 1)
    assert "overlaps the directory" in refusal(tmp_path, beyond)
    # A name and an extra field that grow only in the local header.
    grown = patched(contents, LOCAL, 28, struct.pack("<H", 20), 0)
    assert refusal(tmp_path, grown) == ": 'top/a' takes bytes 55 to 60, but the next member begins at byte 40"


def test_headers_that_contradict_the_directory(tmp_path: Path) -> None:
    contents = zipped(TWO)
    for broken in (
        patched(contents, LOCAL, 0, b"PK\3\5", 1),
        patched(contents, LOCAL, 30, b"TOP/b", 1),
        patched(contents, LOCAL, 8, b"\x08", 1),
    ):
        assert refusal(tmp_path, broken) == ": There is no 'top/b' at byte 40, where the zip's directory has it"
    size = patched(contents, LOCAL, 22, struct.pack("<L", 7), 1)
    assert refusal(tmp_path, size, SizeMismatch) == (
        ": 'top/b' has 7 bytes in its own header and 10 in the zip's directory"
    )
    assert contents_of(directory(tmp_path, patched(contents, LOCAL, 18, bytes(8), 1))) == TWO  # unknown beforehand


def test_stored_members_have_one_size(tmp_path: Path) -> None:
    contents = patched(zipped(TWO), CENTRAL, 24, struct.pack("<L", 6), 1)
    assert refusal(tmp_path, contents, SizeMismatch) == (": 'top/b' is stored uncompressed in 10 bytes, but has 6")


def test_members_that_are_not_read(tmp_path: Path) -> None:
    locked = patched(zipped(TWO), CENTRAL, 8, b"\x01", 1)
    assert refusal(tmp_path, locked, NotReadable) == ": 'top/b' is encrypted"
    for method, name in ((14, "LZMA"), (12, "bzip2"), (77, "compressed with method 77")):
        other = patched(zipped(TWO), CENTRAL, 10, bytes([method]), 1)
        assert (
            refusal(tmp_path, other, NotReadable)
            == f": 'top/b' is {name}; only stored and DEFLATE members are supported"
        )


def test_the_directory_s_own_mistakes(tmp_path: Path) -> None:
    contents = zipped(TWO)
    few = patched(patched(contents, END, 8, b"\x01"), END, 10, b"\x01")
    assert refusal(tmp_path, few).endswith("The zip's directory goes on for 51 bytes after its 1 members")
    many = patched(patched(contents, END, 8, b"\x03"), END, 10, b"\x03")
    assert refusal(tmp_path, many).endswith("The zip's directory lists 3 members and ends after 2")
    wrong = patched(contents, CENTRAL, 0, b"PK\1\3", 1)
    assert refusal(tmp_path, wrong).endswith(f"The zip's directory has no entry at byte {contents.index(CENTRAL) + 51}")
    long = patched(contents, CENTRAL, 28, b"\xff", 1)
    assert refusal(tmp_path, long).endswith("The zip's directory ends within entry 1")
    parts = patched(contents, END, 4, b"\x01")
    assert refusal(tmp_path, parts) == ": The zip is one part of several. Join its parts first."


def test_the_two_end_records_agree(tmp_path: Path) -> None:
    contents = saved({"w": torch.ones(1)})
    broken = patched(contents, END, 10, b"\x05")
    assert "The two end records of the zip give its directory's members as 5 and" in refusal(
        tmp_path, broken, SizeMismatch
    )
    lost = patched(contents, b"PK\6\6", 0, b"PK\6\5")
    assert "There is no 64-bit end record of the zip at byte" in refusal(tmp_path, lost)
    away = patched(contents, b"PK\6\7", 8, struct.pack("<Q", 1 << 60))
    assert refusal(tmp_path, away) == f": The zip's 64-bit end record cannot be at byte {1 << 60}"


def test_compressed_contents_that_are_damaged(tmp_path: Path) -> None:
    contents = zipped({"a": b"abc" * 100}, deflate=True)
    begin = 30 + 1
    for place in range(begin, contents.index(CENTRAL)):
        broken = contents[:place] + bytes([contents[place] ^ 0xFF]) + contents[place + 1 :]
        zipped_ = directory(tmp_path, broken)
        try:
            contents_of(zipped_)
        except FileFormatError as error:
            assert "Its compressed contents are damaged: " in str(error) or "It inflates to" in str(error)
    for size, said in ((299, "It inflates to 300 bytes or more"), (301, "It inflates to 300 bytes, but")):
        wrong = patched(contents, CENTRAL, 24, struct.pack("<L", size))
        wrong = patched(wrong, LOCAL, 22, struct.pack("<L", size))
        said_ = refusal(tmp_path, wrong, SizeMismatch)
        assert said in said_
        assert said_.endswith(f"the zip's directory says {size}")
