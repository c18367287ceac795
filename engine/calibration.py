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
from nemostream.step_loop import padded_chunks, run_steps


def measure_ranges(
    bundle: Bundle,
    chunk: ChunkConfig,
    clips: list[NDArray[np.float32]],
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, float]:
    """Return the largest input magnitude of each quantisable layer, by weight name, over clips [N] at the model's rate.

    `progress` is called with the share of the audio that is done (0 to 1).
    """
    manifest = bundle.manifest
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
    found = dict.fromkeys(names, 0.0)
    total, done = sum(map(len, clips)), 0
    for clip in clips:
        steps = [step for step in padded_chunks(manifest, chunk, clip) if step.length == chunk.samples]
        for index, values in enumerate(run_steps(manifest, chunk, steps, features, encoder)):
            for weight in names:
                found[weight] = max(found[weight], float(values[f"{weight}:range"]))
            progress((done + index * chunk.samples) / total)
        done += len(clip)
    return found
