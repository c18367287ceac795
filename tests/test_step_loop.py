"""The one-stream step loop: chunks of a recording, and caches carried from step to step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nemostream.bundle import LanguageConfig, Tensor
from nemostream.step_loop import advance_caches, padded_chunks, run_steps


@pytest.mark.parametrize("ms", [80, 560])
@pytest.mark.parametrize("samples", [0, 1, 159, 160, 320, 8759, 8760, 16000, 50_000])
def test_chunks_of_a_recording(demo_bundle, cut_chunks, ms, samples):
    manifest, chunk = demo_bundle.manifest, demo_bundle.manifest.chunk(ms)
    audio = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
    steps = list(padded_chunks(manifest, chunk, audio))
    expected = cut_chunks(manifest, chunk, audio)
    assert len(steps) == len(expected)
    for index, (step, (part, length)) in enumerate(zip(steps, expected, strict=True)):
        np.testing.assert_array_equal(step.audio, part)
        assert step.length == length
        assert step.position == index * chunk.frames
    window = manifest.encoder.mel_cache + manifest.encoder.subsampling * chunk.frames
    assert all(step.valid == window for step in steps if step.length == chunk.samples)
    if steps:  # mel frames before the window, plus the valid ones of the last window, are the recording's
        last = steps[-1]
        first = manifest.encoder.subsampling * (last.position - 2)
        assert first + last.valid == manifest.mel_frames(samples)


def test_new_rows_replace_the_oldest_rows_of_the_rings(demo_bundle):
    manifest, chunk = demo_bundle.manifest, demo_bundle.manifest.chunk(560)
    encoder = manifest.encoder
    shape = (1, encoder.heads, encoder.cache, encoder.d_model // encoder.heads)
    caches = {f"{kind}_cache.{layer}": np.zeros(shape, np.float32) for kind in "kv" for layer in range(encoder.layers)}
    position = encoder.cache - 3  # the chunk's rows wrap around the end of the ring
    rows = np.arange(1, chunk.frames + 1, dtype=np.float32)[:, None]
    new = np.broadcast_to(rows, (encoder.layers, 1, encoder.heads, chunk.frames, shape[3]))
    outputs = {"mel_cache_next": np.ones(1), "k_new": new, "v_new": -new, "conv_next": np.arange(encoder.layers)}
    advance_caches(manifest, caches, outputs, position)
    ring = caches["k_cache.1"][0, 0, :, 0]
    assert ring[-3:].tolist() == [1, 2, 3]
    assert ring[: chunk.frames - 3].tolist() == list(range(4, chunk.frames + 1))
    assert not ring[chunk.frames - 3 : -3].any()
    np.testing.assert_array_equal(caches["v_cache.1"], -caches["k_cache.1"])
    assert caches["conv_cache.1"] == 1
    assert caches["mel_cache"] == 1


def test_state_is_carried_from_step_to_step(demo_bundle):
    """Two chunks in one call equal the outputs of the graphs; a new call starts with empty caches."""
    import onnxruntime as ort

    manifest, chunk = demo_bundle.manifest, demo_bundle.manifest.chunk(560)
    features, encoder = (
        ort.InferenceSession(demo_bundle.file(f"{kind}-560ms"), providers=["CPUExecutionProvider"])
        for kind in ("features", "encoder")
    )
    audio = np.random.default_rng(0).standard_normal(2 * chunk.samples).astype(np.float32)
    steps = list(padded_chunks(manifest, chunk, audio))
    first, second, *_ = run_steps(manifest, chunk, steps, features, encoder)
    (alone,) = run_steps(manifest, chunk, steps[:1], features, encoder)
    np.testing.assert_array_equal(first["encoded"], alone["encoded"])
    (fresh,) = run_steps(manifest, chunk, steps[1:2], features, encoder)
    assert np.abs(second["encoded"] - fresh["encoded"]).max() > 1e-3
    assert {"mel", "audio_tail_next", "encoded", "encoded_joint", "k_new"} <= first.keys()


class Recorder:
    """A session that records its inputs, and returns zeros in the shapes of a graph's outputs."""

    def __init__(self, graph) -> None:
        self.graph, self.inputs = graph, []

    def get_outputs(self):
        return self.graph.outputs

    def run(self, names, feed):
        self.inputs.append(dict(feed))
        sizes = ([1 if axis == "B" else axis for axis in tensor.shape] for tensor in self.graph.outputs)
        return [np.zeros(size, np.float32) for size in sizes]


def test_prompted_encoders_get_the_prompt_of_each_step(demo_bundle):
    """The default language, unless a step has another one; other encoders have no such input."""
    chunk = demo_bundle.manifest.chunk(560)
    audio = np.zeros(3 * chunk.samples, np.float32)
    graph = demo_bundle.manifest.graphs["encoder-560ms"]
    prompted = dataclasses.replace(graph, inputs=(*graph.inputs, Tensor("prompt", "int64", ("B",))))
    manifest = dataclasses.replace(
        demo_bundle.manifest,
        graphs={**demo_bundle.manifest.graphs, "encoder-560ms": prompted},
        languages=LanguageConfig("de-DE", {"en-US": 0, "de-DE": 9}, 10),
    )
    for used, wanted in ((demo_bundle.manifest, None), (manifest, [9, 0, 9])):
        steps = list(padded_chunks(used, chunk, audio))[:3]
        steps[1] = dataclasses.replace(steps[1], prompt=0)
        features, encoder = (Recorder(used.graphs[f"{kind}-560ms"]) for kind in ("features", "encoder"))
        assert len(list(run_steps(used, chunk, steps, features, encoder))) == 3
        assert all((inputs.keys() == {tensor.name for tensor in encoder.graph.inputs}) for inputs in encoder.inputs)
        if wanted:
            got = [inputs["prompt"] for inputs in encoder.inputs]
            assert [prompt.tolist() for prompt in got] == [[prompt] for prompt in wanted]
            assert all(prompt.dtype == np.int64 for prompt in got)
