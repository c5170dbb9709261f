"""Invalid safetensors files: each gives one clear error."""

from __future__ import annotations

import json
import re
import struct
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors

import torchparams as tp
from fuzz import fuzz_safetensors
from torchparams import limits
from torchparams.errors import (
    FileFormatError,
    LimitExceeded,
    SizeMismatch,
    SourceError,
    TorchParamsError,
    TrailingBytes,
    TruncatedFile,
)
from torchparams.sources import safetensors as _safetensors
from torchparams.sources.safetensors import open_safetensors
from torchparams.testing import MemorySource, safetensors_bytes, sample

if TYPE_CHECKING:
    from pathlib import Path

U8 = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}


def made(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def reference_takes(content: bytes) -> bool:
    """Whether the format's own library takes the file."""
    try:
        safetensors.deserialize(content)  # type: ignore[no-untyped-call]  # it has no types
    except safetensors.SafetensorError:
        return False
    return True


def refused(folder: Path, content: bytes, error: type[TorchParamsError] = FileFormatError) -> str:
    """The message that the file is refused with, the file's own path left out."""
    path = folder / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(TorchParamsError) as caught:
        open_safetensors(str(path))
    assert type(caught.value) is error
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    return text.removeprefix(str(path)).removeprefix(": ")


def entry(**changes: Any) -> str:
    """A header of one entry `a`, right but for what is changed; a value of None leaves the key out."""
    about = {key: value for key, value in {**U8, **changes}.items() if value is not None}
    return json.dumps({"a": about})


# --- truncation, at every byte ---------------------------------------------------------------


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    content = safetensors_bytes({"a": sample("float32", (2,)), "b": sample("int16", (3,))}, {"format": "pt"})
    header = 8 + int.from_bytes(content[:8], "little")
    for size in range(len(content)):
        if size == 0:
            (tmp_path / "x.safetensors").write_bytes(b"")
            with pytest.raises(FileFormatError, match="The file is empty"):
                tp.of(tmp_path / "x.safetensors")
        text = refused(tmp_path, content[:size], TruncatedFile)
        if size < 8:
            assert text == f"The file ends after {size} bytes, within the 8 bytes that give the header's length"
        elif size < header:
            assert text == f"The file ends at byte {size}, within the header, which takes bytes 8 to {header}"
        else:
            name, start, stop = ("a", 0, 8) if size < header + 8 else ("b", 8, 14)
            assert text == (
                f"The file ends at byte {size}, and its tensors at byte {header + 14}: "
                f"'{name}' lies at bytes {header + start} to {header + stop}"
            )
    for size in range(1, len(content)):
        with pytest.raises(TorchParamsError):  # whichever format the head of it is taken for
            (tmp_path / "x.safetensors").write_bytes(content[:size])
            tp.of(tmp_path / "x.safetensors")


def test_trailing_bytes(tmp_path: Path) -> None:
    content = safetensors_bytes({"a": sample("float32", (2,))})
    end = len(content)
    assert refused(tmp_path, content + b"xyz", TrailingBytes) == (
        f"The tensors end at byte {end}, but the file ends at byte {end + 3}: the rest belongs to no tensor"
    )
    assert refused(tmp_path, made("{}", b"\0"), TrailingBytes) == (
        "The tensors end at byte 10, but the file ends at byte 11: the rest belongs to no tensor"
    )


# --- the header's length ---------------------------------------------------------------------


def test_a_header_that_is_too_long(tmp_path: Path) -> None:
    assert refused(tmp_path, made("{}", length=100_000_001), LimitExceeded) == (
        "The header's length, in bytes 0 to 8, is 100000001; the limit is 100000000. The file has 10 bytes."
    )
    assert refused(tmp_path, made("{}", length=(1 << 64) - 1), LimitExceeded).startswith(
        "The header's length, in bytes 0 to 8, is 18446744073709551615; the limit"
    )
    assert refused(tmp_path, made("{}", length=100_000_000), TruncatedFile) == (
        "The file ends at byte 10, within the header, which takes bytes 8 to 100000008"
    )


def test_a_limit_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEADER_BYTES", 10)
    assert "is 60; the limit is 10" in refused(tmp_path, made(entry(), b"\0"), LimitExceeded)


# --- not JSON --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", ", bytes 8 to 8: The header is empty, not a JSON object"),
        (b"   \n", ", bytes 8 to 12: The header is empty, not a JSON object"),
        (b"{", ", byte 9: The header is not JSON: expecting property name enclosed in double quotes, found its end"),
        (b'{"a":1,}', ", byte 15: The header is not JSON: "),
        (b'{"\xc3\xa9":1 x', ", byte 16: The header is not JSON: expecting ',' delimiter, found 'x'"),
        (b"{}{}", ", byte 10: The header is not JSON: extra data, found '{'"),
        (b"{}\0", ", byte 10: The header is not JSON: extra data, found '\\x00'"),
        (b"\xef\xbb\xbf{}", ", byte 8: The header is not JSON: "),
        (b'{"\xff":1}', ", byte 10: The header is not UTF-8: invalid start byte 0xff"),
        (b'{"\xed\xa0\x80":1}', ", byte 10: The header is not UTF-8: invalid continuation byte 0xed"),
        (b'{"a\nb":1}', ", byte 11: The header is not JSON: invalid control character at, found '\\n'"),
        (b'{"a":NaN}', "The header has NaN, which JSON does not allow"),
        (b'{"a":-Infinity}', "The header has -Infinity, which JSON does not allow"),
        (b'{"a":-0}', "The header has the number -0, which is not an integer"),
        (b'{"a":' + b"9" * 5000 + b"}", "The header has the number 99999999999999999999… of 5000 characters"),
        (b'{"a":' + b"[" * 5_000 + b"]" * 5_000 + b"}", "The header is nested too deeply"),
        (b'{"a":' * 5_000, "The header is nested too deeply"),
        (b"[]", "The header is an array, not an object"),
        (b"null", "The header is null, not an object"),
        (b'"a"', "The header is the text 'a', not an object"),
        (b"7", "The header is the number 7, not an object"),
        (b'{"\\ud800":1}', "The header has the text '\\ud800' with a lone surrogate"),
        (b'{"__metadata__":{"a":"\\udc00x"}}', "The header has the text '\\udc00x' with a lone surrogate"),
    ],
)
def test_headers_that_are_no_json_object(tmp_path: Path, header: bytes, message: str) -> None:
    assert message in refused(tmp_path, made(header))
    assert not reference_takes(made(header))


# --- entries ---------------------------------------------------------------------------------

A = "tensor 'a': "


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a":1}', A + "Its entry is the number 1, not an object"),
        ('{"a":null}', A + "Its entry is null, not an object"),
        (entry(dtype=None), A + "Its entry has no dtype"),
        (entry(shape=None, data_offsets=None), A + "Its entry has no shape and no data_offsets"),
        ('{"a":{}}', A + "Its entry has no dtype and no shape and no data_offsets"),
        (entry(dtype=3), A + "Its dtype is the number 3, not a text"),
        (entry(dtype="F13"), A + "Unknown dtype 'F13'. There are BOOL U8 I8 "),
        (entry(dtype="u8"), A + "Unknown dtype 'u8'"),
        (entry(dtype=["U8"]), A + "Its dtype is an array, not a text"),
        (entry(shape=1), A + "Its shape is the number 1, not an array"),
        (entry(shape="1"), A + "Its shape is the text '1', not an array"),
        (entry(shape={"x": 1}), A + "Its shape is an object, not an array"),
        (entry(shape=[True]), A + "Its shape holds true, not an integer"),
        (entry(shape=[1.0]), A + "Its shape holds the number 1.0, not an integer"),
        (entry(shape=["1"]), A + "Its shape holds the text '1', not an integer"),
        (entry(shape=[None]), A + "Its shape holds null, not an integer"),
        (entry(shape=[[1]]), A + "Its shape holds an array, not an integer"),
        (entry(shape=[1 << 45, "x"]), A + "Its shape holds the text 'x', not an integer"),
        (entry(shape=[-1]), A + "Its shape holds the number -1, which is negative"),
        (entry(shape=[-1, -1]), A + "Its shape holds the number -1, which is negative"),
        (entry(shape=[1 << 64, 0]), A + "Its shape holds the number 18446744073709551616, which is more than 64 bits"),
        (entry(data_offsets=[0]), A + "Its data_offsets hold 1 number, not 2"),
        (entry(data_offsets=[0, 1, 1]), A + "Its data_offsets hold 3 numbers, not 2"),
        (entry(data_offsets="01"), A + "Its data_offsets is the text '01', not an array"),
        (entry(data_offsets=[0.0, 1]), A + "Its data_offsets holds the number 0.0, not an integer"),
        (entry(data_offsets=[False, True]), A + "Its data_offsets holds false, not an integer"),
        (entry(data_offsets=[1, 0]), A + "Its data_offsets [1, 0] end before they start"),
        (entry(data_offsets=[-1, 0]), A + "Its data_offsets holds the number -1, which is negative"),
    ],
)
def test_entries_of_the_wrong_form(tmp_path: Path, header: str, message: str) -> None:
    assert refused(tmp_path, made(header, b"\0")).startswith(message)
    assert not reference_takes(made(header, b"\0"))


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (
            {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]},
            "tensor 'a': Its data_offsets [0, 20] span 20 bytes, and float32 [2, 3] takes 24 bytes",
        ),
        (
            {"dtype": "F32", "shape": [], "data_offsets": [0, 0]},
            "tensor 'a': Its data_offsets [0, 0] span 0 bytes, and float32 [] takes 4 bytes",
        ),
        (
            {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]},
            "tensor 'a': Its data_offsets [0, 2] span 2 bytes, and float4_e2m1fn [3] takes 12 bits, "
            "which is not a whole number of bytes",
        ),
        (
            {"dtype": "U8", "shape": [0, 7], "data_offsets": [0, 20]},
            "tensor 'a': Its data_offsets [0, 20] span 20 bytes, and uint8 [0, 7] takes 0 bytes",
        ),
    ],
)
def test_sizes_that_disagree(tmp_path: Path, about: dict[str, Any], message: str) -> None:
    assert refused(tmp_path, made({"a": about}, bytes(20)), SizeMismatch) == message


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("F32", [1 << 40, 1 << 40]),
        ("F64", [1 << 62]),
        ("U8", [1 << 40, 1 << 40, 0]),
        ("U8", [0, 1 << 40, 1 << 40]),
        ("U8", [(1 << 64) - 1, 0, 2]),
        ("U8", [2] * 500_000),
    ],
)
def test_sizes_that_overflow(tmp_path: Path, dtype: str, shape: list[int]) -> None:
    text = refused(tmp_path, made({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}}))
    assert re.fullmatch(r"tensor 'a': Its shape \[[0-9, …]+\] of (float32|float64|uint8) overflows 64 bits", text)
    assert len(text) < 200


# --- keys that stand twice -------------------------------------------------------------------

FIELDS = '"dtype":"U8","shape":[1],"data_offsets":[0,1]'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (f'{{"a":{{{FIELDS}}},"a":{{{FIELDS}}}}}', "The header has the key 'a' twice"),
        (f'{{"a":{{{FIELDS}}},"\\u0061":{{{FIELDS}}}}}', "The header has the key 'a' twice"),
        (
            f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{{{FIELDS}}}}}',
            "The header has the key '__metadata__' twice",
        ),
        (f'{{"a":{{{FIELDS},"dtype":"U8"}}}}', "tensor 'a': Its entry has the key 'dtype' twice"),
        (f'{{"a":{{{FIELDS},"sh\\u0061pe":[1]}}}}', "tensor 'a': Its entry has the key 'shape' twice"),
        (f'{{"a":{{{FIELDS},"x":1,"x":1}}}}', "tensor 'a': Its entry has the key 'x' twice"),
        (
            f'{{"a":{{{FIELDS},"x":[{{"y":1,"y":1}}]}}}}',
            "tensor 'a': An object in its 'x' has the key 'y' twice",
        ),
        (f'{{"__metadata__":{{"k":"1","k":"2"}},"a":{{{FIELDS}}}}}', "__metadata__ has the key 'k' twice"),
    ],
)
def test_repeated_keys(tmp_path: Path, header: str, message: str) -> None:
    assert refused(tmp_path, made(header, b"\0")) == message


@pytest.mark.parametrize("lost", ["1", "[18446744073709551616]", "{}", '{"dtype":"U8"}', '"a:b"', "null"])
def test_a_repeated_key_whose_first_value_is_no_entry(tmp_path: Path, lost: str) -> None:
    for names in ("a", "a:b"):
        header = f'{{"{names}":{lost},"{names}":{{{FIELDS}}},"__metadata__":{{"x:y":"z:"}}}}'
        assert refused(tmp_path, made(header, b"\0")) == f"The header has the key '{names}' twice"


def test_a_missing_key_cannot_hide_a_repeated_one(tmp_path: Path) -> None:
    # Each of the three keys stands once per entry in the text, and yet one entry has one twice.
    header = f'{{"a":{{{FIELDS},"shape":[1]}},"b":{{"dtype":"U8","data_offsets":[1,2]}},"c":{{{FIELDS}}}}}'
    assert refused(tmp_path, made(header, b"\0")) == "tensor 'a': Its entry has the key 'shape' twice"


# --- metadata --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("null", "__metadata__ is null, not an object"),
        ("[]", "__metadata__ is an array, not an object"),
        ('"x"', "__metadata__ is the text 'x', not an object"),
        ('{"a":1}', "The value of 'a' in __metadata__ is the number 1, not a text"),
        ('{"a":null}', "The value of 'a' in __metadata__ is null, not a text"),
        ('{"a":{}}', "The value of 'a' in __metadata__ is an object, not a text"),
        ('{"a":["b"]}', "The value of 'a' in __metadata__ is an array, not a text"),
    ],
)
def test_metadata_of_the_wrong_form(tmp_path: Path, metadata: str, message: str) -> None:
    assert refused(tmp_path, made(f'{{"__metadata__":{metadata},"a":{{{FIELDS}}}}}', b"\0")) == message


# --- the tiling ------------------------------------------------------------------------------


def u8(start: int, stop: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        (
            {"a": u8(0, 4), "b": u8(3, 5)},
            5,
            "The tensors 'a' and 'b' overlap: the first ends at byte 4 of the data, the second starts at byte 3",
        ),
        (
            {"b": u8(0, 4), "a": u8(0, 4)},
            4,
            "The tensors 'a' and 'b' overlap: the first ends at byte 4 of the data, the second starts at byte 0",
        ),
        (
            {"a": u8(0, 4), "none": u8(2, 2)},
            4,
            "The tensors 'a' and 'none' overlap: the first ends at byte 4 of the data, the second starts at byte 2",
        ),
        (
            {"a": u8(0, 4), "b": u8(6, 8)},
            8,
            "Bytes 4 to 6 of the data belong to no tensor: 'a' ends before them, 'b' starts after them",
        ),
        ({"b": u8(2, 8)}, 8, "Bytes 0 to 2 of the data belong to no tensor: 'b' starts after them"),
        (
            {"a": u8(0, 4), "none": u8(7, 7)},
            7,
            "Bytes 4 to 7 of the data belong to no tensor: 'a' ends before them, 'none' starts after them",
        ),
        (
            {"a": u8(0, 4), "b": u8((1 << 64) - 3, (1 << 64) - 1)},
            4,
            f"Bytes 4 to {(1 << 64) - 3} of the data belong to no tensor: 'a' ends before them, 'b' starts after them",
        ),
    ],
)
def test_holes_and_overlaps(tmp_path: Path, header: dict[str, Any], size: int, message: str) -> None:
    content = made(header, bytes(size))
    text = refused(tmp_path, content)
    at = re.match(r", byte (\d+): ", text)
    assert at is not None
    assert text[at.end() :] == message
    assert not reference_takes(content)


def test_data_that_is_out_of_range(tmp_path: Path) -> None:
    assert refused(tmp_path, made({"a": u8(0, 4), "b": u8(4, 1 << 40)}, bytes(9)), TruncatedFile).startswith(
        f"The file ends at byte 161, and its tensors at byte {152 + (1 << 40)}: "
        f"'b' lies at bytes 156 to {152 + (1 << 40)}"
    )


def test_names_in_messages_are_short_and_on_one_line(tmp_path: Path) -> None:
    name = "x\n\x1b[31m" * 2000
    text = refused(tmp_path, made({name: {"dtype": "U8"}}))
    assert len(text) < 250
    assert text.isprintable()


# --- through the front door ------------------------------------------------------------------


def test_what_the_front_door_says(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for content, message in [
        (b"hello", "The file ends after 5 bytes, within the 8 bytes"),
        (b"x" * 100, "The header's length, in bytes 0 to 8, is 8680820740569200760; the limit is 100000000"),
    ]:
        path.write_bytes(content)
        with pytest.raises(SourceError, match=re.escape(message)):
            tp.of(path)


@pytest.mark.parametrize("fault", ["overlap", "hole", "cut"])
def test_ranges_of_a_header_as_writers_write_it_are_judged_in_one_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    # The strict reading takes five times as long, and would find what the fast one has found.
    count = 1000
    header = {f"t{i}": u8(i, i + 1) for i in range(count)}
    header["t500"] = u8(499, 500) if fault == "overlap" else u8(500, 500) if fault == "hole" else u8(500, 501)
    monkeypatch.setattr(_safetensors, "_strict", lambda header, file: pytest.fail("the header was read twice"))
    content = made(header, bytes(count - (fault == "cut")))
    said = refused(tmp_path, content, TruncatedFile if fault == "cut" else FileFormatError)
    expected = {
        "overlap": "The tensors 't499' and 't500' overlap: the first ends at byte 500",
        "hole": "Bytes 500 to 501 of the data belong to no tensor: 't500' ends before them",
        "cut": "The file ends at byte",
    }
    assert expected[fault] in said


# --- memory and time -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":[' + b"[]," * 100_000 + b"[]]}",
        b'{"a":[' + b"{}," * 100_000 + b"{}]}",
        b'{"a":[' + b'"ab",' * 100_000 + b'"ab"]}',
        b'{"a":[' + b"300," * 100_000 + b"300]}",
        b'{"a":{' + b",".join(b'"%d":0' % i for i in range(100_000)) + b"}}",
        b'{"a":[' + b"[]," * 6_000 + b"[]]}",
        b'{"a":{"dtype":"U8","shape":[' + b"9999999999," * 50_000 + b'1],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[100000000000,"x"],"data_offsets":[0,0]}}',
        b" " * 300_000 + b"{",
        b'{"' + b"\\u0061" * 100_000 + b'":1}',
    ],
)
def test_memory_stays_within_a_multiple_of_the_header(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(made(header))
    tracemalloc.start()
    with pytest.raises(TorchParamsError):
        open_safetensors(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * len(header) + (1 << 20)  # a valid header of very short entries takes 14 times its own


def test_brackets_in_texts_are_no_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    note = "[{" * 50_000 + '"\\'
    path.write_bytes(safetensors_bytes({"[" * 4_000: np.zeros(2, np.float32)}, {"note": note}))
    assert tp.of(path).metadata["note"] == note
    path.write_bytes(safetensors_bytes({f"t{i}": np.zeros((), np.uint8) for i in range(20_000)}))
    assert len(tp.of(path)) == 20_000


def test_no_json_that_is_hardly_more_than_brackets(tmp_path: Path) -> None:
    hollow = b"[" + b"[]," * 100_000 + b"[]]"
    said = refused(tmp_path, made(b'{"a":' + hollow + b"}"))
    assert said == "The header of 300,010 bytes has 100,003 arrays and objects, more than tensors need"
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(b'{"weight_map":{},"metadata":' + hollow + b"}")
    with pytest.raises(FileFormatError, match="The index of 300,033 bytes has 100,004 arrays and objects"):
        tp.of(index)


def test_values_take_no_more_than_their_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(
        safetensors_bytes({"f4": sample("float4_e2m1fn", (1 << 20,)), "f32": np.zeros(1 << 18, np.float32)})
    )
    source = open_safetensors(str(path))
    source.numpy("f32")
    tracemalloc.start()
    for name in source.infos():
        source.numpy(name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * path.stat().st_size


def test_mutated_files() -> None:
    taken = fuzz_safetensors.run(300, seed=1)
    assert all(0 < count < 300 for count in taken.values()), "mutations that leave everything right or nothing"


def test_the_fuzzer_notices() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(AssertionError, match="bytes allocated for an input of 10"), fuzz_safetensors.guarded(10):
            bytes(2 * fuzz_safetensors.SLACK)
    finally:
        tracemalloc.stop()
    with pytest.raises(AssertionError, match="only ours takes it"):
        fuzz_safetensors.compare(b"{}", MemorySource({}), "")
    with pytest.raises(AssertionError, match="only the reference takes it: because"):
        fuzz_safetensors.compare(made("{}"), None, "because")
