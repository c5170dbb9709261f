"""Claim: statistics of quantised files reach 0.35 of the element rate of a bf16 file; decoding is 5 × as fast as torch.

    python bench/bench_encodings.py [ROUNDS] [MEGABYTES]

Files of 800 MB of a Llama model's shapes: bfloat16, float8 in blocks of 128 × 128, and GPTQ of 4 bits in groups of 128.

- `torchparams stats` of each, whole processes by turns: elements per second, of the quantised files against bfloat16.
- The same against decoding in torch and the usual torch calls on the values. Float8 is decoded with the operations of
  transformers' `Fp8Dequantize`, without the seconds that its import takes; GPTQ as its Python packages unpack it.
- `torchparams convert --dtype bf16` of the float8 file against loading, decoding with torch and saving, and against
  `cp` and `sync` of the output. The files are compared bit for bit.
- Looking for encodings in 100,000 names, all plain or beside one tensor of integers.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from common import DATA, llama_file, llama_shapes, machine, paired, print_pairs, process, torchparams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Part = tuple[str, str, tuple[int, ...], "Callable[[], bytes]"]

CALLS = """
import sys, torch
from safetensors import safe_open
def calls(w):
    w = w.float()
    nan = torch.isfinite(w).all()
    w.mean(), w.std(), w.norm(), w.min(), w.max(), (w == 0).sum(), torch.histc(w, 64)
"""
FP8 = """
def decode(q, s):
    (rows, columns), (down, across) = q.shape, s.shape
    q = q.to(torch.float32).reshape(down, rows // down, across, columns // across)
    return (q * s[:, None, :, None]).reshape(rows, columns)
with safe_open(sys.argv[1], "pt") as file:
    names = set(file.keys())
    for name in names:
        if name.endswith("_scale_inv"):
            continue
        w = file.get_tensor(name)
        if name + "_scale_inv" in names:
            w = decode(w, file.get_tensor(name + "_scale_inv"))
"""
GPTQ = """
shifts = torch.arange(0, 32, 4, dtype=torch.int32)
with safe_open(sys.argv[1], "pt") as file:
    for name in file.keys():
        if name.endswith("qweight"):
            get = lambda end: file.get_tensor(name.removesuffix("qweight") + end)
            scales, group = get("scales"), get("g_idx").long()
            zeros = ((get("qzeros")[:, :, None] >> shifts) & 15).reshape(scales.shape) + 1
            q = ((file.get_tensor(name)[:, None, :] >> shifts[None, :, None]) & 15).reshape(-1, scales.shape[1])
            w = scales[group] * (q - zeros[group])
        elif name.rpartition(".")[2] in ("qzeros", "scales", "g_idx"):
            continue
        else:
            w = file.get_tensor(name)
"""
CONVERT = """
from safetensors.torch import save_file
made = {}
"""


def written(name: str, parts: list[Part], config: dict[str, Any]) -> Path:
    """A directory with a file of these tensors and a `config.json`."""
    folder = DATA / name
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, code, shape, _ in parts:
        size = int(np.prod(shape)) * {"I32": 4, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}[code]
        header[key] = {"dtype": code, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for *_, make in parts:
            file.write(make())
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def matrices(elements: float) -> Iterator[tuple[str, int, int]]:
    """Names, outputs and inputs of the matrices of a Llama model's layers."""
    for name, shape in llama_shapes(elements).items():
        if "_proj" in name:
            yield name.removesuffix("weight"), shape[0], shape[1]


def fp8_directory(megabytes: int) -> tuple[Path, int]:
    """A file of float8 in blocks of 128 × 128, and its count of elements."""
    random = np.random.default_rng(0)
    parts: list[Part] = []
    count = 0
    for name, rows, columns in matrices(megabytes * 1e6):
        blocks = -(-rows // 128), -(-columns // 128)
        count += rows * columns

        def codes(size: int = rows * columns) -> bytes:
            return bytes(random.integers(0, 0x7F, size, np.uint8) | random.integers(0, 2, size, np.uint8) << 7)

        def scales(shape: tuple[int, int] = blocks) -> bytes:
            return bytes(random.random(shape, np.float32) * np.float32(1e-3))

        parts.append((f"{name}weight", "F8_E4M3", (rows, columns), codes))
        parts.append((f"{name}weight_scale_inv", "F32", blocks, scales))
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return written(f"fp8-{megabytes}", parts, config), count


def gptq_directory(megabytes: int) -> tuple[Path, int]:
    """A file of GPTQ of 4 bits in groups of 128, and its count of elements."""
    random = np.random.default_rng(0)

    def scales(shape: tuple[int, int]) -> bytes:
        return bytes((random.random(shape, np.float32) * 1e-2).astype(np.float16))

    def order(inputs: int) -> bytes:
        return bytes((np.arange(inputs) // 128).astype(np.int32))

    parts: list[Part] = []
    count = 0
    for name, rows, columns in matrices(2 * megabytes * 1e6):
        groups = columns // 128
        count += rows * columns
        words, zeros = (columns // 8, rows), (groups, rows // 8)
        parts += [
            (f"{name}qweight", "I32", words, partial(random.bytes, words[0] * words[1] * 4)),
            (f"{name}qzeros", "I32", zeros, partial(bytes, zeros[0] * zeros[1] * 4)),
            (f"{name}scales", "F16", (groups, rows), partial(scales, (groups, rows))),
            (f"{name}g_idx", "I32", (columns,), partial(order, columns)),
        ]
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    return written(f"gptq-{megabytes}", parts, config), count


def measure_statistics(rounds: int, megabytes: int) -> None:
    """Statistics of each file, and by torch."""
    plain = llama_file("bfloat16", megabytes)
    elements = {"bf16": os.path.getsize(plain) // 2}
    fp8, elements["fp8-block128"] = fp8_directory(megabytes)
    gptq, elements["gptq-int4-g128"] = gptq_directory(megabytes)
    results = paired(
        {
            "bf16": partial(process, torchparams("stats", plain)),
            "fp8-block128": partial(process, torchparams("stats", fp8)),
            "gptq-int4-g128": partial(process, torchparams("stats", gptq)),
        },
        rounds,
    )
    base = elements["bf16"] / results["bf16"][0]
    print(f"\ntorchparams stats, {megabytes} MB each")
    for name, (seconds, peak) in results.items():
        rate = elements[name] / seconds
        print(f"{name:<16} {seconds:>7.2f} s  {rate / 1e9:>6.2f} G elements/s  {rate / base:>5.2f} × bf16  "
              f"peak {peak / 1e6:.0f} MB")  # fmt: skip
    for name, folder, script in (("fp8-block128", fp8, FP8), ("gptq-int4-g128", gptq, GPTQ)):
        body = f"{CALLS}{script}{' ' * 8}calls(w)\n"
        seconds, peak = process([sys.executable, "-c", body, folder / "model.safetensors"])
        ratio = seconds / results[name][0]
        print(f"{name:<16} {seconds:>7.2f} s  by torch, {ratio:.1f} × as long, peak {peak / 1e6:.0f} MB")


def measure_conversion(rounds: int, megabytes: int) -> None:
    """Float8 to bfloat16."""
    folder, _ = fp8_directory(megabytes)
    ours, theirs, copied = DATA / "ours", DATA / "theirs.safetensors", DATA / "copied.safetensors"
    body = f"{CALLS}{CONVERT}{FP8}{' ' * 8}made[name] = w.to(torch.bfloat16)\nsave_file(made, sys.argv[2])\n"

    def convert() -> tuple[float, int]:
        shutil.rmtree(ours, ignore_errors=True)
        return process(torchparams("convert", folder, ours, "--dtype", "bf16"))

    def copy() -> tuple[float, int]:
        copied.unlink(missing_ok=True)
        return process(["sh", "-c", f"cp {theirs} {copied} && sync {copied}"])

    reference = partial(process, [sys.executable, "-c", body, folder / "model.safetensors", theirs])
    # The reference first: its file is what `cp` copies.
    results = paired({"load, torch, save": reference, "torchparams convert": convert, "cp and sync": copy}, rounds)
    print(f"\nfloat8 to bfloat16, {megabytes} MB")
    print_pairs(results, "torchparams convert")
    import torchparams as tp

    same = tp.diff(ours, theirs).same
    print(f"bit for bit equal: {same}")
    for path in (theirs, copied):
        path.unlink()
    shutil.rmtree(ours)
    if not same:
        raise SystemExit("the files differ")


def measure_recognition() -> None:
    """Looking for encodings where there are none."""
    from torchparams.dtypes import DType
    from torchparams.encodings.companions import coded
    from torchparams.info import ParameterInfo
    from torchparams.reading import Reading

    def info(name: str, dtype: str) -> ParameterInfo:
        return ParameterInfo(name, (4,), DType.of(dtype), 4, 16, "file", "tensor", None)

    plain = [info(f"model.layers.{i // 10}.block{i % 10}.q_proj.weight", "float32") for i in range(100_000)]
    print("\n100,000 names")
    for what, infos in {"plain": plain, "and one of integers": [*plain, info("ids", "int64")]}.items():
        times = []
        for _ in range(9):
            reading = Reading(infos)
            begun = time.process_time()
            coded(reading)
            times.append(time.process_time() - begun)
        print(f"{what:<20} {statistics.median(times) * 1e3:.0f} ms of CPU time")


def main(rounds: int = 3, megabytes: int = 800) -> None:
    """Measure and print."""
    print(machine())
    measure_statistics(rounds, megabytes)
    measure_conversion(rounds, megabytes)
    measure_recognition()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
