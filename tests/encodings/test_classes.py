"""Parameters of torchao classes in files, read without torchao: the header is checked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torchparams as tp
from torchparams.dtypes import DType
from torchparams.encodings.flattened import described, structures_of

if TYPE_CHECKING:
    from pathlib import Path

RNG = np.random.default_rng(0)
CODES = RNG.integers(-128, 128, (6, 8)).astype(np.int8)
SCALE = RNG.random((6, 1)).astype(np.float32)
ZERO = RNG.integers(-9, 9, (6, 1)).astype(np.int8)


def told(kind: str, parts: list[str], **data: Any) -> dict[str, str]:
    """The metadata of one parameter `l.weight`."""
    plain = {key: {"_type": "torch.dtype", "_data": value} if key == "dtype" else value for key, value in data.items()}
    text = json.dumps({"_type": kind, "_data": plain, "_tensor_data_names": parts})
    return {"tensor_names": '["l.weight", "l.bias"]', "l.weight": text, "l.bias": '{"_type": "Tensor"}'}


def written(path: Path, metadata: dict[str, str], **parts: np.ndarray[Any, Any]) -> Path:
    tensors = {f"l._weight_{name}": value for name, value in parts.items()}
    tp.save({**tensors, "l.bias": np.ones(6, np.float32)}, path, metadata=metadata, overwrite=True)
    return path


INT8 = told("Int8Tensor", ["zero_point", "qdata", "scale"], block_size=[1, 8], dtype="float32")


def test_a_parameter_of_a_header(tmp_path: Path) -> None:
    path = written(tmp_path / "m.safetensors", INT8, qdata=CODES, scale=SCALE, zero_point=ZERO)
    params = tp.of(path)
    assert set(params.names) == {"l.weight", "l.bias"}
    info = params.info("l.weight")
    assert (info.encoding, info.dtype, info.raw_names[0]) == ("int8-channel", "float32", "l._weight_qdata")
    assert np.array_equal(params.numpy("l.weight"), (CODES.astype(np.float32) - ZERO) * SCALE)


def test_int4_adds_its_zero_points(tmp_path: Path) -> None:
    codes = RNG.integers(-8, 8, (6, 8))
    packed = (codes[:, ::2] & 15 | (codes[:, 1::2] & 15) << 4).astype(np.uint8).view(np.int8)
    scale, zero = (RNG.random((2, 6)).astype(DType.of("bfloat16").numpy) for _ in range(2))
    metadata = told("Int4Tensor", ["qdata", "scale", "zero_point"], block_size=[1, 4], shape=[6, 8])
    path = written(tmp_path / "m.safetensors", metadata, qdata=packed, scale=scale, zero_point=zero)
    wide = [np.repeat(each.astype(np.float32).T, 4, axis=1) for each in (scale, zero)]
    assert tp.of(path).info("l.weight").encoding == "int4-g4"
    assert np.array_equal(tp.of(path).numpy("l.weight"), codes.astype(np.float32) * wide[0] + wide[1])


def test_blocks_of_two_dimensions_and_of_batches(tmp_path: Path) -> None:
    codes = RNG.integers(0, 100, (2, 4, 6)).astype(np.int8)
    scale = RNG.random((2, 2, 2)).astype(np.float32)
    metadata = told("Int8Tensor", ["qdata", "scale"], block_size=[1, 2, 3], dtype="bfloat16")
    path = written(tmp_path / "m.safetensors", metadata, qdata=codes, scale=scale)
    expected = codes * np.repeat(np.repeat(scale, 2, axis=1), 3, axis=2)
    params = tp.of(path)
    assert params.info("l.weight").encoding == "int8-block2x3"
    assert torch.equal(params["l.weight"], torch.tensor(expected).to(torch.bfloat16))


REFUSED: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "another class": (told("NewTensor", ["qdata", "scale"]), {}, "has the class NewTensor, which is not supported"),
    "codes for a kernel": (told("Int4TilePackedTo4dTensor", ["qdata", "scale"]), {}, "the tensor cores of a GPU"),
    "inputs that are scaled first": (told("Int8Tensor", ["qdata", "scale", "act_pre_scale"], block_size=[1, 8],
                                          dtype="float32"), {"act_pre_scale": SCALE},
                                     "multiplies its inputs by 'l._weight_act_pre_scale'"),
    "a part that is missing": (told("Int8Tensor", ["qdata", "scale", "x"], block_size=[1, 8], dtype="float32"), {},
                               "'l._weight_x' is missing"),
    "blocks that do not divide": (told("Int8Tensor", ["qdata", "scale"], block_size=[1, 3], dtype="float32"), {},
                                  "do not match blocks of [1, 3]"),
    "blocks that are none": (told("Int8Tensor", ["qdata", "scale"], block_size="x", dtype="float32"), {}, "'x'"),
    "no type": (told("Int8Tensor", ["qdata", "scale"], block_size=[1, 8]), {}, "has no dtype for its values"),
    "an integer type": (told("Int8Tensor", ["qdata", "scale"], block_size=[1, 8], dtype="int8"), {},
                        "has no dtype for its values"),
    "other zero points": (INT8, {"zero_point": ZERO[:2]}, "do not match the scales"),
    "wide zero points": (told("Int8Tensor", ["qdata", "scale", "zero_point"], block_size=[1, 8], dtype="bfloat16"),
                         {"zero_point": ZERO.astype(np.int32)}, "are not int8"),
    "codes of another type": (INT8, {"qdata": CODES.astype(np.int16)}, "does not hold codes of Int8Tensor"),
    "scales of another type": (INT8, {"scale": SCALE.astype(np.int32)}, "are not floating-point"),
    "an unknown width": (told("IntxUnpackedToInt8Tensor", ["qdata", "scale"], block_size=[1, 8], dtype="float32",
                              target_dtype="int9"), {}, "has an unknown dtype 'int9'"),
    "int4 without zero points": (told("Int4Tensor", ["qdata", "scale"], block_size=[1, 8]), {}, "no zero point"),
    "int4 of another shape": (told("Int4Tensor", ["qdata", "scale", "zero_point"], block_size=[1, 8], shape=[6, 9]), {},
                              "does not hold codes of [6, 9]"),
    "float8 blocks": (told("Float8Tensor", ["qdata", "scale"], dtype="float32"),
                      {"qdata": CODES.view(DType.of("float8_e4m3fn").numpy), "scale": SCALE[:4]},
                      "do not match blocks"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_the_name_of_the_part(case: str, tmp_path: Path) -> None:
    metadata, parts, reason = REFUSED[case]
    path = written(
        tmp_path / "m.safetensors", metadata, **{"qdata": CODES, "scale": SCALE, "zero_point": ZERO, **parts}
    )
    assert "l.weight" not in tp.of(path).names
    unread = {each.name: each.reason for each in tp.stats(path).unread}
    assert reason in unread["l._weight_qdata"]
    assert "\n" not in unread["l._weight_qdata"]


def test_parts_of_an_unknown_class_are_not_numbers_whatever_their_names(tmp_path: Path) -> None:
    metadata = told("NF4Tensor", ["quantized_data", "scaler_mean"])
    path = written(tmp_path / "m.safetensors", metadata, quantized_data=CODES, scaler_mean=SCALE)
    for raw in (False, True):
        stats = tp.stats(tp.of(path, raw=raw))
        assert "l._weight_quantized_data" in {each.name for each in stats.unread}
        assert "l._weight_quantized_data" not in {row.name for row in stats.rows}


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["qdata", "scale", "float32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["_type", "_data", "a"]), inner),
    max_leaves=5,
)
KEYS = st.sampled_from(["_type", "_data", "_tensor_data_names", "x"])


@given(st.dictionaries(KEYS, VALUES), st.sampled_from(["Int8Tensor", "Float8Tensor", "Int4Tensor", "Tensor", "é", ""]))
def test_any_metadata_is_read_or_passed_over(entry: dict[str, Any], kind: str) -> None:
    for text in (json.dumps(entry), json.dumps({**entry, "_type": kind}), "[" * 5000, "{"):
        metadata = {"tensor_names": '["l.weight", "w", ""]', "l.weight": text, "w": text, "": text}
        for structure in structures_of(metadata, {"l._weight_qdata", "_w_scale"}):
            assert structure.parts
        described(metadata, {"l.weight"})


@pytest.mark.parametrize("text", ["", "[1]", "{}", '["l.weight", 3]', "null", "x"])
def test_a_list_of_names_that_is_none(text: str, tmp_path: Path) -> None:
    path = written(tmp_path / "m.safetensors", {**INT8, "tensor_names": text}, qdata=CODES, scale=SCALE)
    assert "l._weight_qdata" in tp.of(path).names
    assert [each.name for each in tp.stats(path).unread] == ["l._weight_qdata"]
