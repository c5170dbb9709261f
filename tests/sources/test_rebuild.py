from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_files import named, number, row, table, text, whole
from torchparams.dtypes import DType
from torchparams.errors import FileFormatError
from torchparams.io.packing import contiguous
from torchparams.sources.torchfile._pickle import Machine
from torchparams.sources.torchfile._pickle_values import Blob, Global, Malformed, Reduced
from torchparams.sources.torchfile._rebuild import CONSTRUCTORS
from torchparams.sources.torchfile._refs import ArrayRef, NumpyType, StorageRef, Storages, TensorRef, fits, numel_of

FLOAT = DType.of("float32")


def machine(data: bytes = b"") -> Machine:
    return Machine(data, len(data), "a.pkl", CONSTRUCTORS, Storages(), len(data), in_file=False)


def load(value: bytes) -> Any:
    return machine(whole(value, 4)).load(0)[0]


def called(module: str, name: str, *args: bytes) -> bytes:
    return named(module, name) + row(*args) + b"R"


def reference() -> TensorRef:
    return TensorRef(StorageRef("0", FLOAT, 6), FLOAT, 0, (2, 3), (3, 1))


def array() -> ArrayRef:
    made = ArrayRef()
    made.tensor = reference()
    return made


values = st.recursive(
    st.sampled_from(
        [None, True, False, 0, 1, -1, 1 << 70, 2.5, "", "torch.sparse_coo", "latin1", "f4", ">i8", b"", b"abcd"]
    )
    | st.builds(reference)
    | st.builds(array)
    | st.builds(ArrayRef)
    | st.builds(lambda: StorageRef("0", FLOAT, 6))
    | st.builds(lambda: NumpyType(FLOAT, "f4"))
    | st.builds(lambda: NumpyType(None, "O"))
    | st.builds(lambda: Blob(b"x" * 24, 0, 24))
    | st.builds(lambda: Reduced(Global("os", "system"), ()))
    | st.sampled_from([Global(*key, CONSTRUCTORS[key]) for key in CONSTRUCTORS])
    | st.sampled_from([Global("torch", "float32"), Global("os", "system"), Global("torch", "per_tensor_affine")]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=8).map(tuple)
        | st.dictionaries(st.sampled_from(["conj", "neg", 1]), inner)
    ),
    max_leaves=12,
)


@given(st.sampled_from(sorted(CONSTRUCTORS)), values, values)
def test_any_arguments_are_taken_left_or_refused(key: tuple[str, str], args: object, state: object) -> None:
    build = CONSTRUCTORS[key]
    try:
        made = build(machine(), Global(*key, build), args)
        if isinstance(made, ArrayRef | NumpyType):
            made.set_state(machine(), state)
    except Malformed as error:
        assert str(error).isprintable()


@given(st.sampled_from(sorted(CONSTRUCTORS)), st.lists(values, max_size=8).map(tuple))
def test_any_tuple_of_arguments_is_taken_left_or_refused(key: tuple[str, str], args: tuple[object, ...]) -> None:
    build = CONSTRUCTORS[key]
    try:
        build(machine(), Global(*key, build), args)
    except Malformed as error:
        assert str(error).isprintable()


def test_plain_values_of_python() -> None:
    assert load(called("_codecs", "encode", text("é"), text("latin1"))) == b"\xe9"
    assert load(called("builtins", "bytearray", text("é"), text("latin-1"))) == b"\xe9"
    assert load(called("builtins", "bytes")) == b""
    assert load(called("builtins", "set")) == []
    assert load(called("torch", "Size", row(number(2), number(3)))) == (2, 3)
    assert load(called("torch", "device", text("cuda"), number(1))) == "cuda:1"
    assert load(called("torch", "device", text("cpu"))) == "cpu"
    assert load(called("collections", "OrderedDict", b"](" + row(text("a"), number(1)) + b"e")) == {"a": 1}
    assert load(called("collections", "Counter", table({"a": number(2)}))) == {"a": 2}
    assert load(called("torch.jit._pickle", "build_intlist", b"](" + number(1) + b"e")) == [1]


@pytest.mark.parametrize(
    "value",
    [
        called("_codecs", "encode", text("重"), text("latin1")),
        called("_codecs", "encode", text("a"), text("rot13")),
        called("_codecs", "encode", number(1), text("latin1")),
        called("builtins", "complex", text("1j"), number(0)),
        called("builtins", "bytes", number(1 << 40)),
        called("builtins", "bytearray", number(1 << 40)),
        called("builtins", "list", number(3)),
        called("collections", "OrderedDict", number(3)),
        called("collections", "OrderedDict", b"](" + number(1) + b"e"),
        called("collections", "OrderedDict", number(1), number(2)),
        called("torch", "device", number(1)),
        called("numpy", "dtype", number(1)),
        called("numpy.core.multiarray", "scalar", number(1), number(2)),
    ],
)
def test_calls_that_are_not_understood_are_recorded(value: bytes) -> None:
    assert type(load(value)) is Reduced


def dtype(spelling: str, order: str = "<") -> bytes:
    return called("numpy", "dtype", text(spelling), b"\x89", b"\x88") + row(number(3), text(order), *[b"N"] * 3) + b"b"


@pytest.mark.parametrize(
    ("spelling", "raw", "expected"),
    [
        ("f4", b"\x00\x00\xc0\x3f", 1.5),
        ("f8", b"\x00\x00\x00\x00\x00\x00\xf8\x3f", 1.5),
        ("f2", b"\x00\x3e", 1.5),
        ("i8", b"\xff" * 8, -1),
        ("u2", b"\x01\x02", 0x0201),
        ("b1", b"\x01", True),
    ],
)
def test_numpy_scalars_are_values(spelling: str, raw: bytes, expected: float) -> None:
    scalar = ("numpy._core.multiarray", "scalar")
    assert load(called(*scalar, dtype(spelling), b"C" + bytes([len(raw)]) + raw)) == expected
    assert load(called(*scalar, dtype(spelling, ">"), b"C" + bytes([len(raw)]) + raw[::-1])) == expected
    assert type(load(called(*scalar, dtype(spelling), b"C\x09" + bytes(9)))) is Reduced
    assert type(load(called(*scalar, dtype("U4"), b"C\x01a"))) is Reduced


def test_tensors_of_other_devices() -> None:
    for name in ("_rebuild_device_tensor_from_numpy", "_rebuild_xla_tensor", "_rebuild_device_tensor_from_cpu_tensor"):
        build = CONSTRUCTORS["torch._utils", name]
        func = Global("torch._utils", name, build)
        for data in (array(), reference()):
            made = build(machine(), func, (data, Global("torch", "float32"), "xla:0", True))
            assert (made.requires_grad, made.problem, made.shape) == (True, None, (2, 3))
            made = build(machine(), func, (data, Global("torch", "bfloat16"), "xla:0", True))
            assert made.problem == "stored as float32, to be converted to bfloat16"
        assert build(machine(), func, (ArrayRef(), Global("torch", "float32"), "xla:0", True)) is NotImplemented


def test_objects_of_protocol_0() -> None:
    value = load(called("copy_reg", "_reconstructor", named("lib", "Thing"), named("builtins", "object"), b"N"))
    assert (type(value), repr(value.func)) == (Reduced, "lib.Thing")


def test_errors_say_what_was_given() -> None:
    def said(value: bytes) -> str:
        with pytest.raises(FileFormatError) as caught:
            load(value)
        return str(caught.value).partition(": The pickle is broken at byte ")[2].partition(": ")[2]

    assert said(called("torch._utils", "_rebuild_tensor", number(1))) == (
        "torch._utils._rebuild_tensor with 1 arguments; it takes 4 to 4"
    )
    assert said(called("torch._utils", "_rebuild_meta_tensor_no_storage", number(1), b"N", b"N", b"N")) == (
        "the shape of a tensor is None"
    )
    meta = ("torch._utils", "_rebuild_meta_tensor_no_storage")
    assert said(called(*meta, number(1), row(number(1)), row(number(1)), b"N")) == (
        "torch._utils._rebuild_meta_tensor_no_storage with the dtype 1, which is unknown"
    )
    assert said(called(*meta, named("torch", "f"), row(*[number(1)] * 65), row(), b"N")) == (
        "the shape of a tensor has 65 dimensions; the maximum is 64"
    )
    assert said(called(*meta, named("torch", "f"), row(text("a")), row(), b"N")) == "the shape of a tensor holds 'a'"
    assert said(called(*meta, named("torch", "f"), row(number(1 << 200)), row(), b"N")) == (
        "the shape of a tensor holds an integer of 201 bits"
    )
    assert said(called("torch._utils", "_rebuild_sparse_tensor", text("x"), row())) == (
        "torch._utils._rebuild_sparse_tensor without its indices, values and shape"
    )


@given(st.lists(st.integers(0, 5), max_size=5))
def test_contiguous_strides_are_numpy_s(shape: list[int]) -> None:
    import numpy as np

    for fortran, order in ((False, "C"), (True, "F")):
        made = np.empty(shape, np.int8, order=order)  # type: ignore[call-overload]  # either is an order
        if made.size:
            assert contiguous(shape, fortran) == made.strides


def test_what_fits_in_torch() -> None:
    assert fits(0, (), ())
    assert fits(3, (1, 2), (0, -1))  # a negative stride is one; that no view has it is said with its name
    assert not fits(True, (1,), (1,))
    assert not fits(0, [1], (1,))
    assert not fits(0, (1,), (1, 2))
    assert not fits(0, (1 << 63,), (1,))
    assert not fits(-1, (1,), (1,))
    assert not fits(0, (1.0,), (1,))
    with pytest.raises(Malformed, match="more elements than can be counted"):
        numel_of((1 << 32, 1 << 32, 0))
