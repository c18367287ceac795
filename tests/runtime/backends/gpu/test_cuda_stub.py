"""The GPU backend through the real cuda.core and cuda.bindings, on a CUDA driver stub (`tests/cuda_stub`).

The tests run in processes of their own, because other tests expect no GPU. This shows that the calls are those which
the packages and the rules of the driver allow, and that failures are handled. It does not show what a driver does.
"""

from __future__ import annotations

import pytest
from cuda_stub import MISSING, run_pytest

from nemostream.bundle import Bundle

pytestmark = pytest.mark.skipif(MISSING, reason="needs g++ and cuda-python")


def check(*arguments: str, bundle: Bundle | None = None, **settings: int) -> None:
    completed = run_pytest(*arguments, small_bundle=bundle and bundle.path, **settings)
    assert completed.returncode == 0, completed.stdout[-20000:] + completed.stderr[-5000:]
    assert " skipped" not in completed.stdout.splitlines()[-1], completed.stdout


def test_driver_rules() -> None:
    check("tests/cuda_stub/driver_cases.py")


def test_backend_and_faults(small_bundle: Bundle) -> None:
    check("tests/cuda_stub/backend_cases.py", bundle=small_bundle)
