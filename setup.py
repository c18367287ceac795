"""The compiled part of the package; everything else is in pyproject.toml."""

from setuptools import Extension, setup

BACKENDS = "src/nemostream/runtime/backends"

setup(
    ext_modules=[
        Extension(
            "nemostream.runtime.backends._int8_linear",
            [f"{BACKENDS}/int8_linear.c"],
            depends=[f"{BACKENDS}/onnxruntime_abi.h"],
            # Without contraction, all instruction sets give the same bits.
            extra_compile_args=["-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
            py_limited_api=True,  # it uses no function of Python
            optional=True,  # without a C compiler, ONNX Runtime's own operators are used (`runtime/backends/int8.py`)
        )
    ]
)
