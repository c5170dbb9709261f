"""MXFP4 weights have the same values as in transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import torchparams as tp

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the library


def test_mxfp4_as_gpt_oss_stores_it() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 40, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 150, (3, 40, 4), dtype=torch.uint8, generator=generator)
    expected = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)
    params = tp.of({"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales})
    assert params.names == ["experts.down_proj"]
    assert torch.equal(params["experts.down_proj"], expected)
