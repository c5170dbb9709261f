from __future__ import annotations

import collections
import contextlib
import pickle
import pickletools
import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_files import named, number, row, table, text, whole
from torchparams import limits
from torchparams.errors import FileFormatError, LimitExceeded, TruncatedFile
from torchparams.sources.torchfile._pickle import _FIXED, Machine
from torchparams.sources.torchfile._pickle_ops import _METHODS, INLINE_BYTES
from torchparams.sources.torchfile._pickle_values import Blob, Global, NumberKey, OddKey, Reduced
from torchparams.sources.torchfile._rebuild import CONSTRUCTORS
from torchparams.sources.torchfile._refs import Storages


def machine(data: bytes) -> Machine:
    return Machine(data, len(data), "a.pkl", CONSTRUCTORS, Storages(), len(data), in_file=False)


def load(data: bytes) -> Any:
    value, end = machine(data).load(0)
    assert end == len(data)
    return value


def message(data: bytes, kind: type[FileFormatError] = FileFormatError) -> str:
    with pytest.raises(FileFormatError) as caught:
        load(data)
    assert type(caught.value) is kind
    return str(caught.value)


# --- it agrees with Python's own where that is safe ----------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary()
)
keys = st.text(st.characters(exclude_categories=["Cs"])) | st.integers(-(1 << 40), 1 << 40) | st.binary() | st.none()
plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.tuples(inner, inner, inner) | st.tuples(inner),
    max_leaves=30,
)


def unkeyed(value: Any) -> Any:
    """`value` with plain numbers for its keys."""
    if type(value) is dict:
        return {k.value if type(k) is NumberKey else k: unkeyed(v) for k, v in value.items()}
    return type(value)(map(unkeyed, value)) if type(value) in (list, tuple) else value


@given(plain, st.integers(0, 5))
def test_plain_values_come_back(value: object, protocol: int) -> None:
    assert unkeyed(load(pickle.dumps(value, protocol))) == value


@given(plain, st.integers(0, 5))
def test_plain_values_come_back_from_optimised_pickles(value: object, protocol: int) -> None:
    assert unkeyed(load(pickletools.optimize(pickle.dumps(value, protocol)))) == value


@pytest.mark.parametrize("protocol", range(6))
def test_types_that_are_data(protocol: int) -> None:
    value = {
        "ordered": collections.OrderedDict(a=1, b=2),
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, x=[1]),
        "complex": 1 + 2j,
        "bytearray": bytearray(b"\x00\xff"),
        "none": (),
        "long": 1 << 3000,
    }
    assert load(pickle.dumps(value, protocol)) == value
    assert load(pickle.dumps({1}, protocol)) == [1]
    assert load(pickle.dumps(frozenset({1}), protocol)) == [1]


def test_shared_and_recursive_values_keep_their_shape() -> None:
    shared: list[Any] = [1]
    value: dict[str, Any] = {"a": shared, "b": shared}
    value["self"] = value
    for protocol in range(6):
        loaded = load(pickle.dumps(value, protocol))
        assert loaded["self"] is loaded
        assert loaded["a"] is loaded["b"]


def test_python_2_text_that_is_no_utf_8_stays_bytes() -> None:
    assert load(b"\x80\x02U\x03abc.") == "abc"
    assert load(b"\x80\x02U\x01\xff.") == b"\xff"
    assert load(b"T\x02\x00\x00\x00\xc3\xa9.") == "é"
    assert load(b"S'a\\n\\x41\\101\\'b'\n.") == "a\nAA'b"
    assert load(b'S"\\xff"\n.') == b"\xff"
    assert load(b"Vr\\u00e9\n.") == "ré"
    assert load(b"L12L\n.") == load(b"I12\n.") == 12
    assert load(b"I01\n.") is True
    assert load(b"I00\n.") is False
    assert load(b"F1.5\n.") == 1.5


def test_text_is_what_pickle_reads_and_what_is_none_is_escaped() -> None:
    assert load(whole(b"X\x03\x00\x00\x00\xed\xa0\x80")) == "\ud800"
    assert load(whole(b"X\x03\x00\x00\x00\xed\xa0\xff")) == "\\xed\\xa0\\xff"


def test_every_operation_of_every_protocol_is_known() -> None:
    hot = {ord(c) for c in "qrhjKMJX(t\x85\x86QR)\x89\x94.\x81b}u"}
    assert {ord(op.code) for op in pickletools.opcodes} == hot | set(_METHODS)
    assert not hot & set(_METHODS)
    sizes = {1: 1, 2: 2, 4: 4, 8: 8, -2: 1, -3: 4, -5: 8, -4: 4}  # pickletools' marks for counted arguments
    for op in pickletools.opcodes:
        if op.arg is not None and op.arg.n in sizes:
            assert _FIXED.get(ord(op.code)) == sizes[op.arg.n], op.name


# --- what would run or import something stays a description -------------------------------------------


def test_globals_are_names() -> None:
    value = load(whole(named("os", "system")))
    assert type(value) is Global
    assert (value.module, value.name, repr(value)) == ("os", "system", "os.system")


@pytest.mark.parametrize(
    "data",
    [
        whole(named("os", "system") + row(text("true")) + b"R"),
        whole(text("os") + text("system") + b"\x93" + row(text("true")) + b"R", 4),
        whole(b"(" + text("true") + b"ios\nsystem\n"),
        whole(b"(" + named("os", "system") + text("true") + b"o"),
        whole(named("os", "system") + row(text("true")) + b"\x81"),
    ],
    ids=["REDUCE", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ"],
)
def test_calls_are_recorded(data: bytes) -> None:
    value = load(data)
    assert type(value) is Reduced
    assert repr(value.func) == "os.system"
    assert value.args == ("true",)


def test_keyword_arguments_state_and_items_are_recorded() -> None:
    value = load(
        whole(named("a", "B") + row(number(1)) + table({"x": number(2)}) + b"\x92" + table({"s": b"N"}) + b"b", 4)
    )
    assert (repr(value.func), value.args, value.state) == ("a.B", ((1,), {"x": 2}), {"s": None})
    value = load(whole(named("a", "B") + b")\x81(" + number(1) + number(2) + b"e" + number(3) + b"a"))
    assert value.items == [1, 2, 3]
    value = load(whole(named("a", "B") + b")\x81" + text("k") + number(1) + b"s"))
    assert value.pairs == {"k": 1}


def test_the_extension_registry_is_not_asked() -> None:
    for data in (b"\x82\x07.", b"\x83\x07\x00.", b"\x84\x07\x00\x00\x00."):
        assert repr(load(data)) == "copyreg.extension.7"


def test_persistent_ids_of_other_programs_are_recorded() -> None:
    assert load(b"Pabc\n.").args == ("abc",)
    assert load(whole(row(text("other"), number(1)) + b"Q")).args == ("other", 1)
    assert load(whole(number(3) + b"Q")).args == (3,)


def test_calls_of_calls_are_recorded() -> None:
    value = load(whole(named("builtins", "getattr") + row(named("os", "system"), text("x")) + b"R" + b")R"))
    assert type(value.func) is Reduced
    assert repr(value.func.func) == "builtins.getattr"


# --- keys and memory ---------------------------------------------------------------------------------


def test_keys_that_could_collide_or_cannot_hash_are_wrapped() -> None:
    for key in (row(number(1)), b"]", b"}", named("a", "b"), number(1 << 64), named("a", "b") + b")R"):
        (found,) = load(whole(b"}" + key + number(1) + b"s"))
        assert type(found) is OddKey
    for value in (0, 1, -1, -2, 300, (1 << 61) - 1 + 5, 1 - (1 << 64)):
        (found,) = load(whole(b"}" + number(value) + number(1) + b"s"))
        assert type(found) is NumberKey
        assert found.value == value
    for real in (0.5, 1e300, float("inf"), float("nan"), True):
        (found,) = load(pickle.dumps({real: 1}, 2))
        assert type(found) is (NumberKey if abs(real) < 1e19 else OddKey)
    assert list(load(pickle.dumps({"a": 1, None: 2, b"b": 3}, 3))) == ["a", None, b"b"]


def test_equal_numbers_are_one_key() -> None:
    pairs = b"".join(
        key + number(value) for value, key in enumerate((b"K\x01", b"\x88", b"I1\n", b"F1.0\n", b"F1.5\n"))
    )
    found = load(whole(b"}(" + pairs + b"u"))
    assert [(key.value, value) for key, value in found.items()] == [(1, 3), (1.5, 4)]


def test_the_memo_has_no_numbers_for_keys() -> None:
    # Indexes in order are places of a list; those that leave a gap are kept beside it, and may be reached later.
    stores = b"K\x05q\x00" + b"K\x06r\x02\x00\x00\x00" + b"K\x07p1\n" + b"K\x08r\xff\xff\xff\xff" + b"K\x09q\x02"
    fetches = b"h\x00" + b"g1\n" + b"h\x02" + b"j\xff\xff\xff\xff"
    assert load(whole(b"(" + stores + fetches + b"t"))[5:] == (5, 7, 9, 8)
    # MEMOIZE takes as its index how many entries there are.
    assert load(whole(b"(K\x05q\x00K\x06q\x09K\x07\x94h\x02t"))[3:] == (7,)
    with pytest.raises(FileFormatError, match="it fetches entry 3 of the memo, which was never stored"):
        load(whole(b"K\x05q\x00K\x06q\x09h\x03"))


def test_equal_long_texts_are_one_object() -> None:
    first, second = load(whole(row(text("a" * 5000), text("a" * 5000))))
    assert first is second


def test_long_byte_strings_stay_where_they_lie() -> None:
    data = pickle.dumps(bytes(INLINE_BYTES + 1), 4)
    value = load(data)
    assert type(value) is Blob
    assert (len(value), value.stop - value.start) == (INLINE_BYTES + 1,) * 2
    assert type(load(pickle.dumps(bytes(INLINE_BYTES), 4))) is bytes


@pytest.mark.parametrize(
    "data",
    [
        b"\x8e" + struct.pack("<Q", (1 << 63) - 1),
        b"\x8d" + struct.pack("<Q", (1 << 64) - 1),
        b"\x96" + struct.pack("<Q", 1 << 40),
        b"X\xff\xff\xff\xff",
        b"B\xff\xff\xff\xff",
        b"T\xff\xff\xff\x7f",
        b"\x8b\xff\xff\xff\x7f",
        b"\x95" + struct.pack("<Q", 1 << 62),
        b"Kar\xff\xff\xff\xff",
    ],
)
def test_declared_lengths_allocate_nothing(data: bytes) -> None:
    data = b"\x80\x04" + data + b"."
    runner = machine(data)
    tracemalloc.start()
    try:
        with contextlib.suppress(TruncatedFile):  # a huge index of the memo is legal, and costs nothing
            runner.load(0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def test_the_same_text_is_encoded_once() -> None:
    encode = named("_codecs", "encode") + b"q\x00" + text("é" * 5000) + b"q\x01" + text("latin1") + b"q\x02"
    calls = (b"h\x00h\x01h\x02\x86R") * 1000
    value = load(whole(b"(" + encode + b"00" + b"0" + calls + b"t"))
    assert len(value) == 1000
    assert all(item is value[0] for item in value)
    assert value[0] == b"\xe9" * 5000


# --- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\x80\x02\xff.", "The pickle is broken at byte 2: 0xff is not an operation of a pickle"),
        (b"\x80\x09.", "The pickle is broken at byte 0: it is of protocol 9; 0 to 5 are known"),
        (b"K\x01R.", "The pickle is broken at byte 2: operation b'R' finds the stack empty"),
        (b"K\x01tN.", "The pickle is broken at byte 2: operation b't' finds the stack empty"),
        (b"h\x05.", "The pickle is broken at byte 0: it fetches entry 5 of the memo, which was never stored"),
        (
            b"j\x05\x00\x00\x00.",
            "The pickle is broken at byte 0: it fetches entry 5 of the memo, which was never stored",
        ),
        (b"g7\n.", "The pickle is broken at byte 0: it fetches entry 7 of the memo, which was never stored"),
        (b"N(0000t..", "The pickle is broken at byte 4: operation b'0' finds the stack empty"),
        (b"K\x01K\x02(\x86tN.", "The pickle is broken at byte 6: TUPLE after its MARK was taken off the stack"),
        (b"]N(\x86eN.", "The pickle is broken at byte 4: its MARK was taken off the stack before"),
        (b"K\x01K\x02a.", "The pickle is broken at byte 4: it appends to a int"),
        (b"K\x01K\x02K\x03s.", "The pickle is broken at byte 6: it sets a key of a int"),
        (b"}(K\x01u.", "The pickle is broken at byte 4: a key without its value"),
        (b"Iabc\n.", "The pickle is broken at byte 0: b'abc' is not an integer"),
        (b"I1_0\n.", "The pickle is broken at byte 0: b'1_0' is not an integer"),
        (b"L" + b"9" * 2000 + b"\n.", "is not an integer"),
        (b"Fx\n.", "The pickle is broken at byte 0: b'x' is not a number"),
        (b"Sabc\n.", "The pickle is broken at byte 0: a STRING without its quotes"),
        (b"V\\u12\n.", "The pickle is broken at byte 0: a UNICODE line that does not decode"),
        (b"T\xff\xff\xff\xff.", "The pickle is broken at byte 0: a string of -1 bytes"),
        (b"\x8b\xfe\xff\xff\xff.", "The pickle is broken at byte 0: an integer of -2 bytes"),
        (b"Np99999999999\n.", "The pickle is broken at byte 1: 99999999999 is not an index of the memo"),
        (b"NN\x93.", "The pickle is broken at byte 2: the name of a global is not text"),
        (b"(oN.", "The pickle is broken at byte 1: an object without its class"),
        (b"\x97N.", "The pickle is broken at byte 0: it needs out-of-band buffers, which no file holds"),
        (b"N\x98.", "The pickle is broken at byte 1: it needs out-of-band buffers, which no file holds"),
        (b"..", ""),
    ],
)
def test_broken_pickles(data: bytes, expected: str) -> None:
    assert expected in message(data)


def test_errors_name_the_buffer() -> None:
    assert message(b"\x80\x02\xff.").startswith("a.pkl: The pickle is broken")


@pytest.mark.parametrize("protocol", range(6))
def test_cut_at_every_byte(protocol: int) -> None:
    value = {"a": [1, 2.5, "text", b"bytes", None, True, 1 << 70], "o": collections.OrderedDict(x=(1, 2, 3, 4))}
    data = pickle.dumps(value, protocol)
    for size in range(len(data)):
        said = message(data[:size], TruncatedFile)
        assert said.startswith(f"a.pkl: The pickle that starts at byte 0 is cut off at byte {size}"), (size, said)


def test_what_a_length_is_cut_in_is_named() -> None:
    assert message(b"\x80\x04X\x10\x00\x00\x00ab.", TruncatedFile).endswith("cut off at byte 10, in a text of 16 bytes")
    assert message(b"B\x10\x00\x00\x00ab.", TruncatedFile).endswith("in a byte string of 16 bytes")
    assert message(b"\x8a\x10a.", TruncatedFile).endswith("in an integer of 16 bytes")
    assert message(b"cos\nsystem", TruncatedFile).endswith("in a line of text")
    assert message(b"\x80\x04\x95\xff\x00\x00\x00\x00\x00\x00\x00.", TruncatedFile).endswith("in a frame")


def test_a_pickle_that_goes_on_beyond_its_end() -> None:
    data = whole(row(number(1), number(2)))
    runner = Machine(data + b"...", len(data) - 1, "a.pkl", {}, Storages(), 100, in_file=False)
    with pytest.raises(TruncatedFile, match="cut off at byte 8, it goes on beyond its end"):
        runner.load(0)
    # what lies behind it in the file is no part of it: as an operation, P would read a line of text
    for after in (b"PK\x05\x06", b"X\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f"):
        with pytest.raises(TruncatedFile, match=r"is cut off at byte 3, it goes on beyond its end$"):
            Machine(b"\x80\x02}" + after, 3, "a.pkl", {}, Storages(), 100, in_file=True).load(0)


# --- limits ------------------------------------------------------------------------------------------


def test_operations_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PICKLE_OPERATIONS", 100)
    load(whole(b"N0" * 40 + b"N"))
    with pytest.raises(LimitExceeded) as caught:
        load(whole(b"N0" * 60 + b"N"))
    assert str(caught.value) == (
        "a.pkl: The pickle runs more operations than a file of its size may. "
        "If you trust the file, raise torchparams.limits.PICKLE_OPERATIONS."
    )


def test_what_a_constructor_does_to_a_list_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = b"(" + row(text("a"), number(1)) * 20 + b"l"
    again = named("collections", "OrderedDict") + b"q\x00" + pairs + b"\x85q\x01" + b"0" + b"R" * 0
    calls = b"h\x00h\x01R" * 10
    data = whole(b"(" + again + b"0" + calls + b"t")
    assert len(load(data)) == 10
    monkeypatch.setattr(limits, "PICKLE_OPERATIONS", 300)
    with pytest.raises(LimitExceeded):
        load(data)


def test_deep_nesting_needs_no_recursion() -> None:
    depth = 200_000
    value = load(b"]" * depth + b"a" * (depth - 1) + b".")
    for _ in range(depth - 1):
        (value,) = value
    assert value == []
    value = load(b"N" + b"\x85" * depth + b".")
    for _ in range(depth):
        (value,) = value
    assert value is None
    calls = load(b"N" + b"\x85" * 10 + b"cos\nsystem\n" + b")R" * depth + b".")
    while type(calls) is Reduced:
        calls = calls.func
    assert repr(calls) == "os.system"


def test_several_pickles_in_one_buffer() -> None:
    data = pickle.dumps([1], 2) + pickle.dumps("b", 4)
    runner = machine(data)
    first, at = runner.load(0)
    second, end = runner.load(at)
    assert (first, second, end) == ([1], "b", len(data))
