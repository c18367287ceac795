"""The errors that nemostream raises deliberately, and their exit codes.

Every error inherits :class:`NemostreamError`, so one `except` catches all, and the built-in exception that fits it, so
that code without knowledge of nemostream handles it too. Its message is one sentence that names the problem, the value
and the remedy. The command line exits with the `exit_code` of the error:

==== ==============================
code error
==== ==============================
1    `NemostreamError`
2    `OptionError`
3    `AudioError`
4    `BundleError`
5    `CheckpointError`
6    `ParityError`
7    `BackendError`
8    `CapacityError`
9    `StreamError`
10   `EngineValidationError`
11   `TruncatedAudioError`
==== ==============================
"""

from __future__ import annotations

from typing import Any


class NemostreamError(Exception):
    """Base class of all errors that nemostream raises deliberately. Exit code 1."""

    exit_code = 1


class OptionError(NemostreamError, ValueError):
    """An option has an invalid value, for example an unknown chunk size or a negative sample rate. Exit code 2."""

    exit_code = 2


class AudioError(NemostreamError, ValueError):
    """Audio cannot be read or used: the file is missing, truncated, empty or not audio, or has NaN. Exit code 3."""

    exit_code = 3


class TruncatedAudioError(AudioError):
    """A WAV file ends before the length in its header. Exit code 11.

    The samples before the end were processed; `result` holds their transcript.
    """

    exit_code = 11
    result: Any = None


class BundleError(NemostreamError, ValueError):
    """A bundle cannot be used: not a bundle, an unsupported version, or missing or damaged files. Exit code 4."""

    exit_code = 4


class CheckpointError(NemostreamError, ValueError):
    """A checkpoint cannot be read, or the exporter does not support it. Exit code 5."""

    exit_code = 5


class ParityError(NemostreamError, ArithmeticError):
    """The output of an exported graph differs from NeMo's. Exit code 6."""

    exit_code = 6


class BackendError(NemostreamError, RuntimeError):
    """A backend is not available on this machine, or failed while running. Exit code 7."""

    exit_code = 7


class CapacityError(NemostreamError, RuntimeError):
    """No slot is free: the maximum number of streams is open. Exit code 8."""

    exit_code = 8


class StreamError(NemostreamError, RuntimeError):
    """A stream was used after its end, its state became unusable, or its connection was lost. Exit code 9."""

    exit_code = 9


class EngineValidationError(NemostreamError, ArithmeticError):
    """The output of an engine differs from that of fp32. Exit code 10."""

    exit_code = 10
