"""The two implementations of one streaming step, behind the same two verbs: ours (ONNX Runtime) and NeMo's (PyTorch).

Both walk through the same `Feed`: rows of B streams that go on for ever. Position is counted in encoder frames; a step
of T frames at position p consumes the samples of `Batch`, or the mel frames [8p - 16, 8p + 8T - 8], 9 of them history
(the first step: [0, 8T - 8], no history).

Letters: B rows, T frames, D model width, J joint width, F mel frames, M mel bins.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.runtime.backend import Batch
from nemostream.runtime.ort import OrtBackend
from nemostream.spec import Bundle, Chunk, Manifest

Floats = NDArray[np.float32]


class Feed:
    """B streams cut out of one clip, each starting at another place of it and going round."""

    def __init__(self, manifest: Manifest, clip: Floats, rows: int, frames: int) -> None:
        samples = frames * manifest.samples_per_frame
        starts = np.arange(rows) * len(clip) // rows
        self.manifest, self.rows = manifest, rows
        self.audio: Floats = np.stack([np.resize(np.roll(clip, -start), samples) for start in starts])
        self._padded = np.pad(self.audio, ((0, 0), (manifest.lead, 0)))

    def batch(self, chunk: Chunk, position: int) -> Batch:
        start = position * self.manifest.samples_per_frame
        audio = self._padded[:, start : start + chunk.samples]
        if audio.shape[1] < chunk.samples:
            raise IndexError(f"the feed ends before frame {position + chunk.frames}")
        return Batch(chunk, np.arange(self.rows), audio, np.full(self.rows, chunk.samples))


class Side(Protocol):
    """A step of the chunk size last given to `switch`, on all rows of the feed. `position` must be where it stands."""

    def switch(self, chunk: Chunk) -> None:
        """Use this chunk size from the next step on; the state stays."""
        ...

    def encode(self, position: int) -> Any:
        """Encoder only. What it returns `frames` understands."""
        ...

    def step(self, position: int) -> Any:
        """Encoder and greedy decoding, the hypotheses carried. What it returns `tokens` understands."""
        ...

    def frames(self, encoded: Any) -> Floats:
        """[B, T, J]: the encoder's output as the joint projects it. Not timed."""
        ...

    def tokens(self, stepped: Any) -> list[list[int]]:
        """Ids each row has said in all the steps so far. Not timed."""
        ...

    def close(self) -> None: ...


class Ours:
    """`OrtBackend`. A step starts from PCM: it includes the mel front end, and the encoder the joint's projection."""

    def __init__(self, bundle: Bundle, feed: Feed, threads: int) -> None:
        self._backend = OrtBackend(bundle, capacity=feed.rows, threads=threads)
        self._backend.reset(np.arange(feed.rows))
        self._feed = feed
        self._said: list[list[int]] = [[] for _ in range(feed.rows)]

    def switch(self, chunk: Chunk) -> None:
        self._chunk = chunk
        self._backend.load(chunk)

    def encode(self, position: int) -> Floats:
        return self._backend.encode(self._feed.batch(self._chunk, position))[0]

    def step(self, position: int) -> Any:
        return self._backend.submit(self._feed.batch(self._chunk, position)).result()

    def frames(self, encoded: Floats) -> Floats:
        return encoded.copy()

    def tokens(self, stepped: Any) -> list[list[int]]:
        for row, new in zip(self._said, stepped.tokens, strict=True):
            row.extend(new.tolist())
        return self._said

    def close(self) -> None:
        self._backend.close()


class Nemo:
    """NeMo's official step, `conformer_stream_step`, and the encoder half of it, `cache_aware_stream_step`.

    As NeMo's streaming script calls them: eval mode, inference mode, caches and hypotheses carried, batched label
    looping. The features are computed beforehand, so the step starts from mel frames and is spared the front end.
    """

    def __init__(self, model: Any, feed: Feed) -> None:
        import torch

        self._torch, self._model, self._feed = torch, model, feed
        with torch.inference_mode():
            self._mel = _features(model, feed.audio)
        self._caches: tuple[Any, Any, Any] | None = None
        self._hypotheses: Any = None

    def switch(self, chunk: Chunk) -> None:
        self._chunk = chunk
        with _quiet():
            self._model.encoder.set_default_att_context_size([chunk.left, chunk.frames - 1])
        if self._caches is None:
            self._caches = self._model.encoder.get_initial_cache_state(batch_size=self._feed.rows)

    @property
    def cached(self) -> int:
        """Encoder frames that the attention caches of all rows hold at least."""
        return 0 if self._caches is None else int(self._caches[2].min())

    def encode(self, position: int) -> Any:
        with self._torch.inference_mode():
            encoded, _, *caches = self._model.encoder.cache_aware_stream_step(**self._inputs(position))
        self._caches = tuple(caches)
        return encoded

    def step(self, position: int) -> Any:
        with self._torch.inference_mode():
            _, _, *caches, self._hypotheses = self._model.conformer_stream_step(
                **self._inputs(position), previous_hypotheses=self._hypotheses, return_transcription=True
            )
        self._caches = tuple(caches)
        return self._hypotheses

    def frames(self, encoded: Any) -> Floats:
        with self._torch.inference_mode():
            return self._model.joint.project_encoder(encoded.transpose(1, 2)).numpy()

    def tokens(self, stepped: Any) -> list[list[int]]:
        return [[int(token) for token in hypothesis.y_sequence] for hypothesis in stepped]

    def close(self) -> None:
        self._caches = self._hypotheses = None

    def _inputs(self, position: int) -> dict[str, Any]:
        factor, first = self._feed.manifest.encoder.subsampling, position == 0
        start, end = max(factor * (position - 2), 0), factor * (position + self._chunk.frames - 1) + 1
        channel, time, length = self._caches or (None, None, None)
        return {
            "processed_signal": self._mel[:, :, start:end],
            "processed_signal_length": self._torch.full((self._feed.rows,), end - start),
            "cache_last_channel": channel,
            "cache_last_time": time,
            "cache_last_channel_len": length,
            "keep_all_outputs": False,
            "drop_extra_pre_encoded": 0 if first else self._model.encoder.streaming_cfg.drop_extra_pre_encoded,
        }


def load_nemo(checkpoint: Path) -> Any:
    """The checkpoint in NeMo, eval mode, fp32, set to batched label looping without beam, timestamps or confidence."""
    import torch
    from nemo.collections.asr.models import ASRModel
    from omegaconf import OmegaConf

    with torch.inference_mode(), _quiet():
        model = ASRModel.restore_from(str(checkpoint), map_location="cpu").eval().float()
        symbols = OmegaConf.select(model.cfg, "decoding.greedy.max_symbols", default=10) or 10
        greedy = {"max_symbols": symbols, "loop_labels": True, "use_cuda_graph_decoder": False}
        model.change_decoding_strategy(OmegaConf.create({"strategy": "greedy_batch", "greedy": greedy}), verbose=False)
    return model


def _features(model: Any, audio: Floats) -> Any:
    """NeMo's log-mel [B, M, F] by its own code in fp64: its fp32 FFT alone is off by up to 2e-4 in quiet bins."""
    import torch

    featurizer = copy.deepcopy(model.preprocessor.featurizer).double()
    window = featurizer.window.double()
    featurizer.stft = lambda x: torch.stft(
        x, featurizer.n_fft, featurizer.hop_length, featurizer.win_length, window, return_complex=True,
        center=True, pad_mode="constant",
    )  # fmt: skip
    samples = torch.from_numpy(audio).double()
    return featurizer(samples, torch.full((len(audio),), audio.shape[1]))[0].float().contiguous()


@contextmanager
def _quiet() -> Iterator[None]:
    """NeMo without its information and warnings."""
    from nemo.utils import logging as nemo_logging

    level = nemo_logging.getEffectiveLevel()
    nemo_logging.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        nemo_logging.setLevel(level)
