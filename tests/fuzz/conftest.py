"""How many examples the fuzzing targets run: a few hundred in the normal run, more by hand."""

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
