"""A small transducer in numpy, its bundle, and an encoder whose output a test sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from host_device import HostDevice

from nemostream.bundle import Bundle, ChunkConfig, DecoderConfig, EncoderConfig, FeatureConfig, File, Manifest, Weight
from nemostream.runtime.backends.gpu import kernels
from nemostream.runtime.decoding.boosting import MAX_TOKENS, Boosting

LAYERS, HIDDEN, JOINT, VOCABULARY, MAX_SYMBOLS = 2, 16, 40, 37, 3
CHUNK = ChunkConfig(ms=400, frames=5, left=8, samples=6400)


def rounded(array: np.ndarray, cache_dtype: str) -> np.ndarray:
    """Round an array to `cache_dtype` and return it in float64."""
    if cache_dtype == "float32":
        return array.astype(np.float64)
    bits = kernels.to_16bit(np.asarray(array, np.float32), cache_dtype)
    if cache_dtype == "float16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


class Net:
    """Transducer in numpy.

    Operands of products are rounded to `cache_dtype`; sums have the same order in all columns.
    """

    max_symbols = MAX_SYMBOLS

    def __init__(self, arrays: Mapping[str, np.ndarray], cache_dtype: str) -> None:
        self.arrays, self.cache_dtype = arrays, cache_dtype
        self.blank = len(arrays["joint.out.bias"]) - 1
        self._rounded = {name: rounded(array, cache_dtype) for name, array in arrays.items() if name.endswith("weight")}

    def _product(self, x: np.ndarray, name: str) -> np.ndarray:
        left, right = rounded(x, self.cache_dtype), self._rounded[f"{name}.weight"]
        return (left[:, :, None] * right[None]).sum(axis=1) + self.arrays[f"{name}.bias"]

    def predict(self, tokens: Any, h: Any, c: Any) -> Any:
        x, new_h, new_c = self.arrays["decoder.embedding"][tokens], [], []
        for layer in range(LAYERS):
            gates = self._product(np.concatenate([x, h[:, layer]], axis=1), f"decoder.lstm.{layer}")
            i, f, g, o = np.split(gates, 4, axis=1)
            new_c.append(sigmoid(f) * c[:, layer] + sigmoid(i) * np.tanh(g))
            x = sigmoid(o) * np.tanh(new_c[-1])
            new_h.append(x)
        return self._product(x, "joint.pred"), np.stack(new_h, axis=1), np.stack(new_c, axis=1)

    def join(self, encoded: Any, predicted: Any) -> Any:
        x = encoded + predicted
        return self._product(np.where(x < 0, 0, x), "joint.out")


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def make_weights(
    rng: np.random.Generator, kind: str, hidden: int = HIDDEN, joint: int = JOINT, vocabulary: int = VOCABULARY
) -> dict[str, np.ndarray]:
    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    narrow, small = (HIDDEN / hidden) ** 0.5, (JOINT / joint) ** 0.5  # so that sums are as large at every size
    arrays = {"decoder.embedding": normal(vocabulary + 1, hidden)}
    arrays["decoder.embedding"][-1] = 0
    for layer in range(LAYERS):
        arrays[f"decoder.lstm.{layer}.weight"] = normal(2 * hidden, 4 * hidden, scale=0.5 * narrow)
        arrays[f"decoder.lstm.{layer}.bias"] = normal(4 * hidden)
    arrays["joint.pred.weight"], arrays["joint.pred.bias"] = normal(hidden, joint, scale=narrow), normal(joint)
    arrays["joint.out.weight"], arrays["joint.out.bias"] = (
        normal(joint, vocabulary + 1, scale=0.3 * small),
        normal(vocabulary + 1),
    )
    out, bias = arrays["joint.out.weight"], arrays["joint.out.bias"]
    if kind == "ties":  # every logit three times, in different lanes and tiles
        out[:, 12:24], bias[12:24] = out[:, :12], bias[:12]
        out[:, 24:36], bias[24:36] = out[:, :12], bias[:12]
        out[:, 36:], bias[36:] = out[:, :2], bias[:2]  # blank too: labels of the same probability come before it
    bias[-1] += {"blanks": 100, "labels": -100, "random": 2.5}.get(kind, 0)
    if kind == "nan embedding":
        arrays["decoder.embedding"][:8] = np.nan
    if kind == "infinite logits":
        out[3, 5] = np.inf  # if unit 3 is positive
    return arrays


def make_bundle(path: Path, arrays: Mapping[str, np.ndarray]) -> Bundle:
    """Write the parts of a bundle that the GPU backend reads."""
    features = {
        "features.window_left": np.ones(199),
        "features.window_right": np.ones(199),
        "features.filters": np.ones((257, 16)),
        "features.guard": np.full(1, 1e-6),
    }
    tensors, blob = {}, b""
    for name, array in (features | dict(arrays)).items():
        tensors[name] = Weight(array.dtype.name, array.shape, len(blob))
        blob += np.ascontiguousarray(array).tobytes()
    (path / "weights.bin").write_bytes(blob)
    hidden, joint = arrays["joint.pred.weight"].shape
    vocabulary = len(arrays["joint.out.bias"]) - 1
    manifest = Manifest(
        name="test",
        features=FeatureConfig(sample_rate=16000, mels=16, window=400, hop=160, n_fft=512, preemphasis=0.97),
        encoder=EncoderConfig(layers=1, d_model=32, heads=2, subsampling=8, cache=8, conv_cache=8),
        decoder=DecoderConfig(LAYERS, hidden, joint, vocabulary, MAX_SYMBOLS, "relu"),
        chunks=(CHUNK,),
        graphs={},
        weights=File("weights.bin", "", len(blob)),
        tensors=tensors,
        tokenizer=File("tokenizer.model", "", 0),
    )
    return Bundle(path, manifest)


class GivenFrames:
    """An encoder whose output is `frames` [B, T, J]."""

    def __init__(self, device: Any, cache_dtype: str, joint: int = JOINT) -> None:
        self.device, self.cache_dtype, self.capturable = device, cache_dtype, isinstance(device, HostDevice)
        self.frames = np.zeros((0, CHUNK.frames, joint), np.float32)

    def memory_bytes(self, rows: int) -> int:
        return 0

    def bind(self, rows: int, addresses: Mapping[str, int]) -> Callable[[], None]:
        if not self.capturable:
            return lambda: self.device.write(addresses["encoded_joint"], self.frames[:rows])
        encoded = self.device.view(addresses["encoded_joint"], (rows, *self.frames.shape[1:]), np.float32)

        def run() -> None:
            encoded[: len(self.frames)] = self.frames[:rows]

        return lambda: self.device.queue(run)

    def close(self) -> None: ...


def some_phrases(rng: np.random.Generator, vocabulary: int = VOCABULARY) -> Boosting:
    """Phrases over few tokens, so that they occur, overlap, and are suffixes of one another."""
    few = rng.choice(vocabulary, 5, replace=False)
    phrases = [(rng.choice(few, rng.integers(1, 7)).tolist(), float(rng.choice([0.5, 2, 6]))) for _ in range(12)]
    return Boosting([*phrases, ([int(few[0])] * MAX_TOKENS, 1.0)], vocabulary)
