"""Checks an installed torchparams, without its sources and without torch: what `make wheel` and cibuildwheel run.

python scripts/wheel_check.py
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile

import numpy as np

import torchparams as tp

KERNELS = ("_kernels", "_compare", "_sums", "_decode", "_batch", "_moments")


def main() -> None:
    if sys.platform != "win32":  # there the NumPy definitions run
        for name in KERNELS:
            importlib.import_module(f"torchparams.sketch.{name}")
    weights = {f"layers.{i}.weight": np.linspace(-1, 1, 5000, dtype=np.float32) + i for i in range(12)}
    with tempfile.TemporaryDirectory() as folder:
        path, half = os.path.join(folder, "a.safetensors"), os.path.join(folder, "b.pt")
        tp.convert(weights, path).run()
        assert len(tp.of(path).select("layers.{-2..-1}.**").names) == 2
        assert abs(tp.stats(path).rows[3].mean - 3) < 1e-6
        assert tp.digest(path).digest == tp.digest(weights).digest
        tp.convert(path, half, dtype="bf16").run()
        assert tp.verify(half)
        assert not tp.diff(path, half, numeric=True).same
        for arguments in (["--version"], ["ls", path], ["stats", path], ["verify", half]):
            subprocess.run([sys.executable, "-m", "torchparams", *arguments], check=True, stdout=subprocess.DEVNULL)
    assert "torch" not in sys.modules
    print(f"torchparams {tp.__version__} works on {sys.platform}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
