"""The compiled part of the package; everything else is in pyproject.toml."""

from glob import glob

from setuptools import Extension, setup

OPERATORS = "src/nemostream/runtime/backends/operators"

setup(
    ext_modules=[
        Extension(
            "nemostream.runtime.backends.operators._library",
            sorted(glob(f"{OPERATORS}/*.c")),
            depends=glob(f"{OPERATORS}/*.h"),
            # Without contraction, all instruction sets give the same bits.
            extra_compile_args=[
                "-std=gnu11",
                "-O3",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fvisibility=hidden",
            ],
            py_limited_api=True,  # it uses no function of Python
            optional=True,  # without a C compiler, ONNX Runtime's own operators are used (`runtime/backends/operators`)
        )
    ]
)
