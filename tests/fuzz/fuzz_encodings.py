"""Mutated quantised checkpoints: each is decoded or refused in one line, and memory follows the size of the file.

    python tests/fuzz/fuzz_encodings.py [inputs]

A mutation changes one to three things of a small checkpoint of one encoding: a tensor is dropped, renamed, cut, or gets
another shape, dtype or other elements; a key of the configuration or of a `quant_state` gets another value; a pickle
gets other bytes.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch

import torchparams as tp
from fuzz.watching import draws, quiet_folder, watched
from torchparams.cli.app import run as command
from torchparams.errors import TorchParamsError
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

Array = np.ndarray[Any, Any]
Weights = dict[str, Array]
Made = tuple[Weights, dict[str, Any], dict[str, str]]
"""Tensors, configuration, and metadata of the header."""

SLACK = 40 << 20
"""Bytes that a command may allocate whatever the file: the writer has buffers."""

F8, E8M0, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16
DTYPES = [np.int8, np.uint8, np.int32, np.int64, np.float16, np.float32, F8, E8M0, BF16]
ODD: tuple[Any, ...] = (
    -1, 0, 1, 3, 7, 31, 2**31, 2**40, 2**62, 2**63, 10**40, 0.5, float("nan"), float("inf"), None, True, "",
    "l", "re:(", "re:(a*)*b", "*", "int9", "float32", "a" * 5000, [], {}, [128, 128], [1, 2, 3], [0] * 70, {"bits": 4},
    ["l"], 10**400,
)  # fmt: skip


def _fp8(random: np.random.Generator) -> Made:
    codes = random.standard_normal((40, 70)).astype(F8)
    config = {"quant_method": "fp8", "weight_block_size": [16, 32], "modules_to_not_convert": ["head"]}
    return {"l.weight": codes, "l.weight_scale_inv": random.random((3, 3)).astype(np.float32)}, config, {}


def _gptq(random: np.random.Generator) -> Made:
    weights: Weights = {
        "l.qweight": _words(random, 8, 32), "l.qzeros": _words(random, 2, 4),
        "l.scales": random.random((2, 32)).astype(np.float16), "l.g_idx": (np.arange(64) // 32).astype(np.int32),
    }  # fmt: skip
    return weights, {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}, {}


def _awq(random: np.random.Generator) -> Made:
    weights: Weights = {
        "l.qweight": _words(random, 64, 4), "l.qzeros": _words(random, 2, 4),
        "l.scales": random.random((2, 32)).astype(np.float16),
    }  # fmt: skip
    return weights, {"quant_method": "awq", "version": "gemm", "bits": 4}, {}


def _packed(random: np.random.Generator) -> Made:
    weights: Weights = {
        "l.weight_packed": _words(random, 3, 16, 8), "l.weight_scale": random.random((3, 16, 2)).astype(BF16),
        "l.weight_zero_point": _words(random, 3, 2, 2), "l.weight_shape": np.array([3, 16, 64]),
    }  # fmt: skip
    return weights, {"quant_method": "compressed-tensors", "ignore": ["re:.*head"]}, {}


def _four(random: np.random.Generator) -> Made:
    told = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [32, 64], "nested_blocksize": 256,
        "nested_offset": 0.5,
    }  # fmt: skip
    weights: Weights = {
        "l.weight": random.integers(0, 256, (1024, 1), np.uint8),
        "l.weight.absmax": random.integers(0, 256, 32, np.uint8),
        "l.weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
        "l.weight.nested_absmax": np.ones(1, np.float32),
        "l.weight.nested_quant_map": np.linspace(-1, 1, 256, dtype=np.float32),
        "l.weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(told).encode(), np.uint8),
    }  # fmt: skip
    return weights, {}, {}


def _eight(random: np.random.Generator) -> Made:
    codes = random.integers(-127, 128, (8, 16), np.int8)
    return {"l.weight": codes, "l.SCB": np.ones(8, np.float32), "l.weight_format": np.zeros((), np.uint8)}, {}, {}


def _floats(random: np.random.Generator) -> Made:
    weights: Weights = {
        "x_blocks": random.integers(0, 256, (2, 4, 3, 16), np.uint8),
        "x_scales": random.integers(99, 140, (2, 4, 3), np.uint8),
        "l.weight_packed": random.integers(0, 256, (8, 16), np.uint8), "l.weight_scale": np.ones((8, 2), F8),
        "l.weight_global_scale": np.ones(1, np.float32),
    }  # fmt: skip
    return weights, {}, {}


def _torchao(random: np.random.Generator) -> Made:
    weights: Weights = {
        "l._weight_qdata": random.integers(-8, 8, (6, 8), np.int8), "l._weight_scale": np.ones((6, 2), np.float32),
        "l._weight_zero_point": np.zeros((6, 2), np.int8),
    }  # fmt: skip
    data = {"block_size": [1, 4], "target_dtype": "int4", "dtype": {"_type": "torch.dtype", "_data": "float32"}}
    about = {"_type": "IntxUnpackedToInt8Tensor", "_data": data}
    told = {**about, "_tensor_data_names": ["qdata", "scale", "zero_point"]}
    return weights, {}, {"tensor_names": '["l.weight"]', "l.weight": json.dumps(told)}


MAKERS: dict[str, Callable[[np.random.Generator], Made]] = {
    "fp8": _fp8, "gptq": _gptq, "awq": _awq, "packed": _packed, "four bits": _four, "eight bits": _eight,
    "small floats": _floats, "torchao": _torchao,
}  # fmt: skip


def _words(random: np.random.Generator, *shape: int) -> Array:
    return random.integers(-(2**31), 2**31, shape, np.int64).astype(np.int32)


def mutated(weights: Weights, draw: random.Random) -> Weights:
    """The tensors with one changed."""
    name = draw.choice(list(weights))
    value, rest = weights[name], {key: each for key, each in weights.items() if key != name}
    kind = draw.randrange(7)
    if kind == 0:
        return rest
    if kind == 1:
        return {**rest, draw.choice(list(weights))[:-1] + draw.choice("_.2xe"): value}
    if kind == 2 and value.size:
        value = value.reshape(-1).view(np.uint8).view(_fitting(value, draw))
    elif kind == 3:
        value = value.reshape(draw.choice([(-1,), (1, -1), (-1, 1), (1, 1, -1)]))
    elif kind == 4 and value.ndim:
        value = value[: draw.choice([0, 1, max(len(value) - 1, 0)])]
    elif kind == 5 and value.ndim:
        value = np.concatenate([value, value[:1]], axis=draw.choice([0, 0, -1]) if value.ndim == 1 else 0)
    elif value.size:
        flat = value.copy().reshape(-1).view(np.uint8)
        for _ in range(draw.choice([1, 4, flat.size])):
            flat[draw.randrange(flat.size)] = draw.choice([0, 255, 127, 128, draw.randrange(256)])
        value = flat.view(value.dtype).reshape(value.shape)
    return {**rest, name: np.ascontiguousarray(value)}


def _fitting(value: Array, draw: random.Random) -> Any:
    return draw.choice([each for each in DTYPES if value.nbytes % np.dtype(each).itemsize == 0])


def value_changed(node: Any, draw: random.Random) -> Any:
    """JSON with one value exchanged."""
    found = copy.deepcopy(node)
    places = [(found, key) for key in found]
    places += [(inner, key) for inner in found.values() if isinstance(inner, dict) for key in inner]
    holder, key = draw.choice(places)
    holder[key] = draw.choice(ODD)
    return found


def changed(made: Made, draw: random.Random) -> Made:
    """A checkpoint with one to three changes."""
    weights, config, metadata = made
    for _ in range(draw.randint(1, 3)):
        state = next((name for name in weights if "quant_state" in name), None)
        kind = draw.randrange(4)
        if kind == 0 and config:
            config = value_changed(config, draw)
        elif kind == 0 and metadata:
            metadata = {**metadata, "l.weight": json.dumps(value_changed(json.loads(metadata["l.weight"]), draw))}
        elif kind == 0 and state is not None:
            with contextlib.suppress(ValueError):  # it is none any more
                told = json.loads(weights[state].tobytes())
                text = json.dumps(value_changed(told, draw)).encode()
                weights = {**weights, state: np.frombuffer(text, np.uint8)}
        elif weights:
            weights = mutated(weights, draw)
    return weights, config, metadata


def attempt(folder: Path) -> bool:
    """Whether a checkpoint is decoded; any exception that is not the library's own is a failure."""
    params = tp.of(folder)
    assert sum(info.nbytes for info in params.infos.values()) == sum(
        i.nbytes for i in tp.of(folder, raw=True).infos.values()
    )
    stats = tp.stats(params)
    assert len(stats.rows) + len(stats.unread) == len(params)
    for each in stats.unread:
        assert each.reason.isprintable()
        assert len(each.reason) < 2000, "an endless message"
    tp.digest(params)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = command(["convert", str(folder), str(folder.parent / "out"), "--dtype", "bf16", "--overwrite"])
    assert status in (0, 2), err.getvalue()
    assert (status == 2) == bool(err.getvalue())
    assert err.getvalue().count("\n") <= 1, err.getvalue()
    return bool(params.select(":quantized", strict=False))


def attempt_pickle(path: Path) -> bool:
    """Whether a pickle of quantised tensors is taken."""
    try:
        params = tp.of(path)
        stats = tp.stats(params)
        assert len(stats.rows) + len(stats.unread) == len(params)
    except TorchParamsError as error:
        assert str(error).isprintable()
        return False
    return True


def pickled() -> bytes:
    """A `.pt` file of torch's quantised tensors, in the form that has no checksums."""
    weight = torch.quantize_per_tensor(torch.ones(3, 4), 0.5, 1, torch.qint8)
    rows = torch.quantize_per_channel(torch.ones(3, 4), torch.ones(3), torch.zeros(3), 0, torch.quint8)
    out = io.BytesIO()
    torch.save({"a.weight": weight, "b.weight": rows}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def run(count: int, seed: int = 0) -> int:
    """Try `count` inputs: how many of them were decoded.

    Args:
        count: Inputs.
        seed: Where they start; equal seeds give equal inputs.
    """

    decoded = 0
    with quiet_folder() as home:
        whole = pickled()
        for number, draw in draws(count, seed):
            with watched(f"input {number} of seed {seed}") as trial:
                if number % 9 == 8:
                    data = bytearray(whole)
                    for _ in range(draw.randint(1, 4)):
                        data[draw.randrange(len(data))] = draw.randrange(256)
                    path = home / "model.pt"
                    path.write_bytes(data)
                    decoded += attempt_pickle(path)
                    size = len(data)
                else:
                    maker = list(MAKERS.values())[number % 9]
                    weights, config, metadata = changed(maker(np.random.default_rng(number)), draw)
                    folder = home / "checkpoint"
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                    content = safetensors_bytes({**weights, "norm": np.ones(4, np.float32)}, metadata)
                    (folder / "model.safetensors").write_bytes(content)
                    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
                    size = len(content)
                    decoded += attempt(folder)
                trial.nbytes = SLACK + 20 * size
    return decoded


if __name__ == "__main__":
    inputs = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    taken = run(inputs)
    print(f"encodings: {inputs:,} inputs, {taken:,} decoded, {inputs - taken:,} refused, none wrong")
