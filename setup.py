"""What pyproject.toml cannot say: the kernels, which are built where there is a compiler, and the tag of the wheel."""

import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

# Sums are exact only where every operation rounds as written, so nothing may be reordered.
FLAGS = ["/O2", "/fp:precise"] if sys.platform == "win32" else ["-O3", "-g0", "-std=gnu11", "-fno-fast-math"]
# Comparisons need each product as it rounds, and for merges it is part of the definition: none is fused with a sum.
UNFUSED = [] if sys.platform == "win32" else ["-ffp-contract=off"]
# One wheel serves Python 3.11 and all later ones; free-threaded Python has no stable ABI, and gets wheels of its own.
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            f"torchparams.sketch.{name}",
            [f"src/torchparams/sketch/{file}.c" for file in (name, *more)],
            depends=sorted(map(str, Path("src/torchparams/sketch").glob("*.h"))),
            extra_compile_args=flags,
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if STABLE else [],
            py_limited_api=STABLE,
            optional=True,  # without it the NumPy definitions run: slower, the same results
        )
        for name, flags, *more in (
            ("_kernels", FLAGS, "_kernels_codes", "_kernels_f32", "_kernels_f64", "_kernels_integers"),
            ("_compare", [*FLAGS, *UNFUSED], "_compare_baseline", "_compare_avx2", "_compare_avx512"),
            ("_sums", [*FLAGS, *UNFUSED]),
            ("_decode", [*FLAGS, *UNFUSED]),
            ("_batch", [*FLAGS, *UNFUSED]),
            ("_moments", FLAGS),
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE else {},
)
