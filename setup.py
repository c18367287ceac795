"""The compiled parts of the package; everything else is in pyproject.toml. The package also works without them."""

from glob import glob

from setuptools import Extension, setup

try:
    from numpy import get_include
except ImportError:  # a build without isolation
    get_include = None

OPERATORS = "src/nemostream/runtime/backends/operators"
STREAMING = "src/nemostream/runtime/streaming"

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
        ),
        Extension(
            "nemostream.runtime.streaming._host",
            [f"{STREAMING}/host.c"],
            include_dirs=[get_include()] if get_include else [],
            extra_compile_args=["-std=gnu11", "-O3", "-fvisibility=hidden"],
            py_limited_api=True,
            optional=True,  # without a C compiler or NumPy's headers, the same methods in Python are used
        ),
    ],
)
