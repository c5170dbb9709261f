"""ZeRO checkpoints that DeepSpeed wrote, held against what DeepSpeed makes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torchparams as tp

os.environ["DS_ACCELERATOR"] = "cpu"
from deepspeed.utils import zero_to_fp32

WORLDS = (1, 2, 4)


@pytest.fixture(scope="session")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints: what `zero_files.py` writes with 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("zero")
    script = Path(__file__).with_name("zero_files.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", ["zero2", "zero3", "bf16-3"])
def test_it_is_what_zero_to_fp32_gives(zero: Path, case: str, world: int) -> None:
    ours, theirs = zero / f"{case}-{world}", zero / f"{case}-{world}.pt"
    assert tp.diff(ours, theirs).same
    assert tp.digest(ours).digest == tp.digest(theirs).digest
    assert tp.of(ours).infos["embed.weight"].aliases == ("head.weight",)


@pytest.mark.parametrize("world", WORLDS)
def test_stage_1_has_the_frozen_parameter_too(zero: Path, world: int) -> None:
    """`zero_to_fp32` leaves it out, as that stage does not note its shape; it is in the model's own state dict."""
    ours, theirs = tp.of(zero / f"zero1-{world}"), tp.of(zero / f"zero1-{world}.pt")
    assert set(ours.names) - set(theirs.names) == {"layers.1.weight"}
    assert tp.diff(ours.select("~layers.1.weight"), theirs).same
    module = tp.of(f"{zero}/zero1-{world}/global_step2/mp_rank_00_model_states.pt#module")
    assert tp.diff(ours, module).same


@pytest.mark.parametrize("world", WORLDS)
def test_bf16_optimizer(zero: Path, world: int) -> None:
    """`zero_to_fp32` does not read it; rounded to bfloat16, the weights are those that the model computes with."""
    ours = tp.of(zero / f"bf16-{world}")
    state = torch.load(f"{zero}/bf16-{world}/global_step2/mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert set(ours.names) == set(state) - {"head.weight"}
    for name in ours.names:
        assert torch.equal(ours[name].to(state[name].dtype), state[name])
    assert ours.infos["embed.weight"].dtype == "float32"


def joined_by_deepspeed(tag: str, key: str, world: int) -> dict[str, Any]:
    """Join the moments as `zero_to_fp32` joins the weights."""
    models = zero_to_fp32.parse_model_states(zero_to_fp32.get_model_state_files(tag))
    files = [torch.load(file, weights_only=False) for file in zero_to_fp32.get_optim_files(tag)]
    optims = [file["optimizer_state_dict"] for file in files]
    found: dict[str, Any] = {}
    is_3 = "fp32_flat_groups" in optims[0]
    held = "optimizer_state_dict" if is_3 else "base_optimizer_state"
    flats = [[state[key] for state in optim[held]["state"].values()] for optim in optims]
    if is_3:
        zero_to_fp32._zero3_merge_trainable_params(found, world, flats, models)
    else:
        paddings = optims[0].get("param_alignment_paddings")
        zero_to_fp32._zero2_merge_trainable_params(found, world, flats, models, paddings)
    return found


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", ["zero1", "zero2", "zero3", "bf16", "bf16-3"])
def test_moments(zero: Path, case: str, world: int) -> None:
    ours = tp.of(f"{zero}/{case}-{world}#optimizer")
    for key in ("exp_avg", "exp_avg_sq"):
        theirs = joined_by_deepspeed(f"{zero}/{case}-{world}/global_step2", key, world)
        assert {name.removesuffix(f".{key}") for name in ours.names if name.endswith(f".{key}")} == set(theirs)
        for name, values in theirs.items():
            np.testing.assert_array_equal(ours.numpy(f"{name}.{key}"), values.contiguous().numpy())
    assert {float(ours.numpy(name)) for name in ours.names if name.endswith(".step")} == {2.0}
