"""Measure the input ranges of 8-bit layers by running the fp32 step on speech.

A range must also hold for audio outside the calibration set, so it is the largest magnitude, not a percentile.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from nemostream.bundle import Bundle, ChunkConfig
from nemostream.engine.precision import quantisable, read_encoder


def measure_ranges(
    bundle: Bundle,
    chunk: ChunkConfig,
    clips: list[NDArray[np.float32]],
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, float]:
    """Return the largest input magnitude of each quantisable layer, by weight name, over clips [N] at the model's rate.

    `progress` is called with the share of the audio that is done (0 to 1).
    """
    manifest, spec = bundle.manifest, bundle.manifest.encoder
    model = read_encoder(bundle, chunk)
    names = quantisable(model)
    for weight, x in names.items():
        magnitude = f"{weight}:magnitude"
        model.graph.node.append(helper.make_node("Abs", [x], [magnitude], magnitude))
        model.graph.node.append(helper.make_node("ReduceMax", [magnitude], [f"{weight}:range"], keepdims=0))
        model.graph.output.append(helper.make_tensor_value_info(f"{weight}:range", TensorProto.FLOAT, []))
    options = ort.SessionOptions()
    # The graph is in memory; its weights are in the bundle's folder.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    encoder = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    features = ort.InferenceSession(bundle.file(f"features-{chunk.ms}ms"), providers=["CPUExecutionProvider"])
    outputs = [output.name for output in encoder.get_outputs()]
    found = dict.fromkeys(names, 0.0)
    total, done = sum(map(len, clips)), 0
    for clip in clips:
        state = {
            tensor.name: np.zeros([1 if axis == "B" else int(axis) for axis in tensor.shape], np.float32)
            for tensor in manifest.graphs[f"encoder-{chunk.ms}ms"].inputs
            if "cache" in tensor.name
        }
        tail = np.zeros((1, manifest.features.tail), np.float32)
        samples = np.concatenate([np.zeros(manifest.lead, np.float32), clip])
        for step in range(len(samples) // chunk.samples):
            position, start = step * chunk.frames, step * chunk.samples
            audio = samples[None, start : start + chunk.samples]
            mel, tail = features.run(
                ["mel", "audio_tail_next"], {"audio": audio, "audio_tail": tail, "lengths": np.array([chunk.samples])}
            )
            valid = np.array([spec.mel_cache + spec.subsampling * chunk.frames])
            inputs = {"mel": mel, "position": np.array([position]), "valid": valid, **state}
            values = dict(zip(outputs, encoder.run(outputs, inputs), strict=True))
            for weight in names:
                found[weight] = max(found[weight], float(values[f"{weight}:range"]))
            ring = (position + np.arange(chunk.frames)) % spec.cache
            state["mel_cache"] = values["mel_cache_next"]
            for layer in range(spec.layers):
                state[f"k_cache.{layer}"][:, :, ring] = values["k_new"][layer]
                state[f"v_cache.{layer}"][:, :, ring] = values["v_new"][layer]
                state[f"conv_cache.{layer}"] = values["conv_next"][layer]
            progress((done + start) / total)
        done += len(clip)
    return found
