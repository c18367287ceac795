"""The GPU backend through the real cuda.core and cuda.bindings, on a CUDA driver stub (`tests/cuda_stub`).

The tests run in processes of their own, because other tests expect no GPU. This shows that the calls are those which
the packages and the rules of the driver allow, and that failures are handled. It does not show what a driver does.
"""

from __future__ import annotations

import pytest
from cuda_stub import MISSING, run_pytest

from nemostream.bundle import Bundle

pytestmark = pytest.mark.skipif(MISSING, reason="needs g++ and cuda-python")


CASES, GPU_TESTS = "tests/cuda_stub/backend_cases.py", "tests/runtime/backends/gpu"


def check(*arguments: str, bundle: Bundle | None = None, **settings: int) -> None:
    completed = run_pytest(*arguments, small_bundle=bundle and bundle.path, **settings)
    output = completed.stdout[-20000:] + completed.stderr[-5000:]
    assert completed.returncode == 0 and " passed" in completed.stdout, output


def test_driver_rules() -> None:
    check("tests/cuda_stub/driver_cases.py")


def test_backend_and_some_faults(small_bundle: Bundle) -> None:
    check(CASES, bundle=small_bundle, EVERY=17)


@pytest.mark.parametrize("version", [12020, 12030])
def test_older_driver(version: int, small_bundle: Bundle) -> None:
    check(CASES, "-k", "test_older_driver", bundle=small_bundle, DRIVER_VERSION=version)


def test_no_device() -> None:
    check(CASES, "-k", "test_no_device", DEVICES=0)


@pytest.mark.slow
def test_every_fault(small_bundle: Bundle) -> None:
    check(CASES, bundle=small_bundle)


def test_some_tests_of_the_backend(small_bundle: Bundle) -> None:
    """Random batches of both chunk sizes, with all operations between steps; prompts; shuffled threads."""
    files = [f"{GPU_TESTS}/test_{name}.py" for name in ("backend", "prompts")]
    tests = "gpu-1 and test_random_batches or test_prompts and test_encoder_output"
    check(*files, "-m", "gpu", "-k", tests, bundle=small_bundle, ORDER=7)


@pytest.mark.slow
def test_all_tests_of_the_backend(small_bundle: Bundle) -> None:
    """Those that are marked `gpu`."""
    files = [f"{GPU_TESTS}/test_{name}.py" for name in ("backend", "slots", "prompts")]
    check(*files, "-m", "gpu", bundle=small_bundle)
