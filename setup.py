"""The one thing that pyproject.toml cannot say: the kernels, which are built where there is a compiler."""

import sys

from setuptools import Extension, setup

# Sums are exact only where every operation rounds as written, so nothing may be reordered.
FLAGS = ["/O2", "/fp:precise"] if sys.platform == "win32" else ["-O3", "-std=gnu11", "-fno-fast-math"]

setup(
    ext_modules=[
        Extension(
            "torchparams.sketch._kernels",
            ["src/torchparams/sketch/_kernels.c"],
            extra_compile_args=FLAGS,
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,  # without it the NumPy definitions run: slower, the same results
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
