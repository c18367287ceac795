"""Hypothesis profile of the fuzz tests; an environment variable raises the number of examples."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# NEMOSTREAM_FUZZ_EXAMPLES=20000 python -m pytest tests/fuzz
settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("NEMOSTREAM_FUZZ_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
