"""Every error nemostream raises on purpose.

Each one is a sentence its reader can act on, inherits :class:`NemostreamError` (catch one thing) and the builtin it
would otherwise have been (code that knows nothing of us still behaves), and maps to one exit code of the command line.
"""

from __future__ import annotations

from typing import Any


class NemostreamError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class OptionError(NemostreamError, ValueError):
    """An option has a value that cannot work (an unknown chunk size, a negative rate)."""

    exit_code = 2


class AudioError(NemostreamError, ValueError):
    """Audio that cannot be read or used: missing, truncated, not audio, empty, NaN."""

    exit_code = 3


class TruncatedAudioError(AudioError):
    """A WAV file that ends before its header promises. All that is there was processed: `result` is what came of it."""

    exit_code = 11
    result: Any = None


class BundleError(NemostreamError, ValueError):
    """A bundle that cannot be used: not a bundle, another version, damaged files."""

    exit_code = 4


class CheckpointError(NemostreamError, ValueError):
    """A checkpoint the exporter does not support, or cannot read."""

    exit_code = 5


class ParityError(NemostreamError, ArithmeticError):
    """An exported graph that does not compute what NeMo computes."""

    exit_code = 6


class BackendError(NemostreamError, RuntimeError):
    """A backend that cannot run here, or that failed while running."""

    exit_code = 7


class EngineValidationError(NemostreamError, ArithmeticError):
    """An engine that does not say what fp32 says."""

    exit_code = 10


class CapacityError(NemostreamError, RuntimeError):
    """No slot is free: the model already serves as many streams as it was made for."""

    exit_code = 8


class StreamError(NemostreamError, RuntimeError):
    """A stream used after its end, or one that the model could not go on with."""

    exit_code = 9
