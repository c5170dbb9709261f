"""Groups of tensors that look like encodings: each is decoded or refused in one line, and nothing else happens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import torchparams as tp
from torchparams.dtypes import DType
from torchparams.errors import TorchParamsError

if TYPE_CHECKING:
    import pytest

ENDS = [
    "weight", "weight_scale", "weight_scale_inv", "weight_scale_2", "SCB", "weight_format", "qweight", "qzeros",
    "scales",
    "g_idx", "weight_packed", "weight_shape", "weight_zero_point", "weight_global_scale", "weight_g_idx", "x_blocks",
    "x_scales", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4", "_weight_qdata", "_weight_scale", "_weight_zero_point", "bitmask",
    "compressed",
]  # fmt: skip
TYPES = ["int8", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e8m0fnu"]
SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 64])
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "quant_method": st.sampled_from(["gptq", "awq", "fp8", "compressed-tensors", 3]),
        "bits": st.sampled_from([2, 3, 4, 8, None, "4"]),
        "group_size": st.sampled_from([-1, 0, 8, 32, "32"]),
        "weight_block_size": st.sampled_from([[8, 8], [1], None, [0, 1]]),
        "checkpoint_format": st.sampled_from(["gptq", "gptq_v2", "marlin", 1]),
        "modules_to_not_convert": st.sampled_from([["l"], ["*"], [3], "l", None]),
        "version": st.sampled_from(["gemm", "gemv", None, []]),
    },
)
TENSORS = st.dictionaries(
    st.sampled_from(ENDS),
    st.tuples(st.sampled_from(TYPES), st.lists(SIZES, max_size=4), st.integers(0, 255)),
    min_size=2,
    max_size=7,
)


@given(TENSORS, CONFIGS)
@settings(max_examples=300)
def test_every_group_is_decoded_or_refused(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[str, list[int], int]], config: dict[str, object]
) -> None:
    folder = tmp_path_factory.mktemp("m")
    weights = {}
    for name, (spelling, shape, fill) in tensors.items():
        dtype = DType.of(spelling)
        bytes_ = np.full(int(np.prod(shape)) * dtype.itemsize, fill, np.uint8)
        weights[f"l.{name}"] = bytes_.view(dtype.numpy).reshape(shape)
    tp.save(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    params = tp.of(folder)
    assert {raw for info in params.infos.values() for raw in info.raw_names} == weights.keys()
    assert sum(info.nbytes for info in params.infos.values()) == sum(each.nbytes for each in weights.values())
    assert len(tp.stats(folder).rows) + len(tp.stats(folder).unread) == len(params)
    for name, info in params.infos.items():
        if info.encoded is not None:
            try:
                assert params.numpy(name).shape == info.shape
            except TorchParamsError as error:
                assert "\n" not in str(error)
