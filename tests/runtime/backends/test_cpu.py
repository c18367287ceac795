"""The CPU backend against the one-stream step loop, and every array of a slot's state, on the demo model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

import nemostream
from nemostream.bundle import Bundle, LanguageConfig
from nemostream.engine import fusion
from nemostream.engine.precision import write_int8_for_cpu
from nemostream.errors import BackendError, OptionError
from nemostream.runtime.backends import cpu, operators
from nemostream.runtime.backends.base import Batch, at_least_one, check_copy, check_state
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.decoding.boosting import NO_PHRASES, Boosting
from nemostream.step_loop import padded_chunks, run_steps


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return np.tile(soundfile.read(nemostream.demo_clip(), dtype="float32")[0], 3)


@pytest.fixture(scope="module")
def phrases(demo_bundle: Bundle) -> Boosting:
    """Phrases that any token begins and that never end, so that a stream is within one of them."""
    vocabulary = demo_bundle.manifest.decoder.vocabulary
    return Boosting([([token] * 60, 50.0) for token in range(vocabulary)], vocabulary)


@pytest.fixture(scope="module")
def backend(demo_bundle: Bundle) -> Iterator[OrtBackend]:
    backend = OrtBackend(demo_bundle, capacity=4, max_batch=3, threads=1)
    yield backend
    backend.close()


def batch_of(manifest: Any, audio: np.ndarray, ms: int, step: int, slots: list[int]) -> Batch:
    """Return the complete chunk number `step` of a recording, for each of the slots."""
    chunk, rows = manifest.chunk(ms), len(slots)
    padded = np.concatenate([np.zeros(manifest.lead, np.float32), audio])
    part = padded[step * chunk.samples : (step + 1) * chunk.samples]
    return Batch(chunk, np.array(slots), np.stack([part] * rows), np.full(rows, chunk.samples))


def run(backend: OrtBackend, batches: list[Batch], row: int = 0) -> list[Any]:
    """Return all values that a row emits."""
    found = []
    for batch in batches:
        emissions = backend.submit(batch).result()
        found += [getattr(emissions, name)[row].tolist() for name in ("tokens", "frames", "scores", "sum_p_alpha")]
    return found


@pytest.mark.parametrize(
    ("ms", "samples"), [(80, 300), (80, 1479), (80, 17_339), (560, 300), (560, 9000), (560, 24_000), (560, 120_000)]
)
def test_frames_equal_those_of_the_step_loop(
    demo_bundle: Bundle, backend: OrtBackend, speech: np.ndarray, ms: int, samples: int
) -> None:
    """Recordings that end anywhere in a chunk, and one that is longer than the rings."""
    manifest, chunk, audio = demo_bundle.manifest, demo_bundle.manifest.chunk(ms), speech[10_000 : 10_000 + samples]
    steps = list(padded_chunks(manifest, chunk, audio))
    features, encoder = (
        ort.InferenceSession(demo_bundle.file(f"{kind}-{ms}ms"), providers=["CPUExecutionProvider"])
        for kind in ("features", "encoder")
    )
    backend.reset(np.array([2]))
    left = manifest.encoder_frames(samples)
    for step, outputs in zip(steps, run_steps(manifest, chunk, steps, features, encoder), strict=True):
        batch = Batch(chunk, np.array([2]), step.audio[None], np.array([step.length]))
        encoded, counts = backend.encode(batch)
        assert counts.tolist() == [min(chunk.frames, left)]
        left -= chunk.frames
        np.testing.assert_allclose(encoded[0], outputs["encoded_joint"][0], rtol=0, atol=1e-5)
    assert backend.save(2)["position"] == len(steps) * chunk.frames


def int8_plans(bundle: Bundle, folder: Path, *sizes: int) -> Any:
    """Write int8 engines and return their plans."""
    plans = {}
    for ms in sizes:
        path, _, shared = write_int8_for_cpu(bundle, bundle.manifest.chunk(ms), folder, f"int8-{ms}", fused=True)
        plans[ms] = SimpleNamespace(path=path, shared=shared, recipe=SimpleNamespace(cache_dtype="float32"))
    return plans


@pytest.mark.skipif(not operators.library(), reason="the operators have no fast code for this processor")
def test_engines_share_weights_that_are_read_once(demo_bundle: Bundle, speech: np.ndarray, tmp_path: Path) -> None:
    """A file that is replaced after the first engine was loaded does not change the results of the second one."""
    plans = int8_plans(demo_bundle, tmp_path, 80, 560)
    shared = plans[80].shared
    assert shared == plans[560].shared

    def encoded(backend: OrtBackend) -> np.ndarray:
        backend.reset(np.array([0]))
        return backend.encode(batch_of(demo_bundle.manifest, speech, 560, 0, [0]))[0].copy()

    expected = encoded(OrtBackend(demo_bundle, capacity=1, threads=1, plans=plans))
    backend = OrtBackend(demo_bundle, capacity=1, threads=1, plans=plans)
    backend.prepare(demo_bundle.manifest.chunk(80))
    shared.write_bytes(bytes([128]) * shared.stat().st_size)  # all weights are 0
    np.testing.assert_array_equal(encoded(backend), expected)
    assert not np.array_equal(encoded(OrtBackend(demo_bundle, capacity=1, threads=1, plans=plans)), expected)


@pytest.mark.skipif(not operators.library(), reason="the operators have no fast code for this processor")
@pytest.mark.parametrize("ms", [80, 560])
def test_fused_mask(
    demo_bundle: Bundle, speech: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ms: int
) -> None:
    """The second channel of the first convolution is equal to the mask, where streams begin and where they end."""
    manifest, chunk, backends = demo_bundle.manifest, demo_bundle.manifest.chunk(ms), []
    for name in ("fused", "masked"):
        (tmp_path / name).mkdir()
        plans = int8_plans(demo_bundle, tmp_path / name, ms)
        backends.append(OrtBackend(demo_bundle, capacity=4, threads=1, plans=plans))
        monkeypatch.setattr(fusion, "_fuse_mask", lambda *_: None)
    first = [
        next(node for node in onnx.load(path, load_external_data=False).graph.node if node.op_type == "Conv")
        for path in (tmp_path / name / f"int8-{ms}.onnx" for name in ("fused", "masked"))
    ]
    assert [":channels" in node.input[0] for node in first] == [True, False]
    for slot, samples in enumerate((300, 1479, 17_339, 24_000)):
        for step in padded_chunks(manifest, chunk, speech[10_000 : 10_000 + samples]):
            batch = Batch(chunk, np.array([slot]), step.audio[None], np.array([step.length]))
            fused, masked = (backend.encode(batch)[0] for backend in backends)
            np.testing.assert_array_equal(fused, masked)


@pytest.mark.skipif(not operators.library(), reason="the operators have no fast code for this processor")
def test_damaged_weights_of_an_engine_are_errors(demo_bundle: Bundle, speech: np.ndarray, tmp_path: Path) -> None:
    """A file without the last weights, an empty file and no file."""
    plans = int8_plans(demo_bundle, tmp_path, 80)
    shared, batch = plans[80].shared, batch_of(demo_bundle.manifest, speech, 80, 0, [0])
    shared.write_bytes(shared.read_bytes()[:-64])
    with pytest.raises(BackendError, match="Int8Linear: the shapes of input, weights and scales differ"):
        OrtBackend(demo_bundle, capacity=1, threads=1, plans=plans).encode(batch)
    for damage in (lambda: shared.write_bytes(b""), shared.unlink):
        damage()
        with pytest.raises(BackendError, match=f"{re.escape(str(shared))} cannot be read .*; build the engine again"):
            OrtBackend(demo_bundle, capacity=1, threads=1, plans=plans).encode(batch)


@pytest.mark.parametrize("in_place", [False, True])
def test_rows_of_scattered_slots_equal_streams_alone(
    in_place: bool, demo_bundle: Bundle, speech: np.ndarray, tmp_path: Path
) -> None:
    """Streams at different positions in slots 0, 2 and 3; later in adjacent slots; the other slot is unchanged.

    With the graph of the bundle, and with an 8-bit one that uses the caches in place.
    """
    plans: Any = None
    if in_place:
        if not operators.library():
            pytest.skip("the operators have no fast code for this processor")
        plans = int8_plans(demo_bundle, tmp_path, 560)
    backend = OrtBackend(demo_bundle, capacity=4, max_batch=3, threads=1, plans=plans)
    manifest, starts = backend.manifest, {0: 0, 2: 16_000, 3: 30_000}
    backend.encode(batch_of(manifest, speech, 560, 0, [3]))  # prepares the chunk size
    backend.reset(np.arange(4))
    untouched = backend.save(1)
    alone = {}
    for slot, start in starts.items():
        backend.reset(np.array([slot]))
        batches = [batch_of(manifest, speech[start:], 560, step, [slot]) for step in range(9)]
        alone[slot] = [run(backend, [batch]) for batch in batches], backend.save(slot)
    backend.reset(np.array([0, 2, 3]))
    for slot in (2, 2, 3):  # ahead of the others
        steps = int(backend.save(slot)["position"]) // 7
        run(backend, [batch_of(manifest, speech[starts[slot] :], 560, steps, [slot])])
    for slots in [[0, 2, 3]] * 6 + [[0, 3]] * 2 + [[0]]:
        steps = [int(backend.save(slot)["position"]) // 7 for slot in slots]
        parts = [batch_of(manifest, speech[starts[s] :], 560, k, [s]) for s, k in zip(slots, steps, strict=True)]
        batch = Batch(
            parts[0].chunk,
            np.array(slots),
            np.concatenate([part.audio for part in parts]),
            np.concatenate([part.lengths for part in parts]),
        )
        emissions = backend.submit(batch).result()
        for row, (slot, step) in enumerate(zip(slots, steps, strict=True)):
            tokens, frames, scores, sums = alone[slot][0][step]
            assert (emissions.tokens[row].tolist(), emissions.frames[row].tolist()) == (tokens, frames)
            np.testing.assert_allclose(emissions.scores[row], scores, atol=1e-3)
            np.testing.assert_allclose(emissions.sum_p_alpha[row], sums, atol=1e-2)
    for slot in (0, 3):  # at the end of their streams
        found = backend.save(slot)
        for name, array in alone[slot][1].items():
            np.testing.assert_allclose(found[name], array, atol=2e-3, err_msg=name)
    assert [int(backend.save(slot)["position"]) for slot in range(4)] == [63, 0, 56, 63]
    assert all(np.array_equal(array, untouched[name]) for name, array in backend.save(1).items())


# -- the state of a slot -----------------------------------------------------------------------------------------------


def test_a_reset_slot_equals_a_new_one(
    demo_bundle: Bundle, backend: OrtBackend, speech: np.ndarray, phrases: Boosting
) -> None:
    manifest, new = backend.manifest, OrtBackend(demo_bundle, capacity=1, threads=1)
    new.reset(np.array([0]))
    backend.reset(np.arange(4))
    backend.set_phrases(1, phrases)
    run(backend, [batch_of(manifest, speech, 560, step, [1, 2]) for step in range(12)])
    used, other = backend.save(1), backend.save(2)
    assert all(not np.array_equal(used[name], array) for name, array in new.save(0).items())
    backend.reset_decoder(np.array([1]))
    for name, array in backend.save(1).items():
        decoder = name in ("predicted", "h", "c", "node")
        np.testing.assert_array_equal(array, new.save(0)[name] if decoder else used[name], err_msg=name)
    backend.reset(np.array([1]))
    for name, array in backend.save(1).items():
        np.testing.assert_array_equal(array, new.save(0)[name], err_msg=name)
    assert all(np.array_equal(array, other[name]) for name, array in backend.save(2).items())
    assert new.save(0).keys() == {
        *("audio_tail", "mel_cache", "k", "v", "conv", "predicted", "h", "c", "node", "position", "phrases")
    }


def test_every_saved_array_changes_later_results(backend: OrtBackend, speech: np.ndarray, phrases: Boosting) -> None:
    """After 12 chunks the rings are full. A saved state is a copy, and is loaded into any slot."""
    manifest = backend.manifest
    backend.reset(np.arange(4))
    backend.set_phrases(1, phrases)
    run(backend, [batch_of(manifest, speech, 560, step, [1]) for step in range(12)])
    saved = backend.save(1)
    kept = {name: array.copy() for name, array in saved.items()}
    wanted = run(backend, [batch_of(manifest, speech, 560, step, [1]) for step in range(12, 16)])
    assert all(np.array_equal(saved[name], array) for name, array in kept.items()) and saved["node"] > 0

    def later(state: dict[str, np.ndarray]) -> list[Any]:
        backend.reset(np.array([3]))
        backend.set_phrases(3, phrases)
        backend.load(3, state)
        return run(backend, [batch_of(manifest, speech, 560, step, [3]) for step in range(12, 16)])

    assert later(saved) == wanted
    assert all(np.array_equal(saved[name], array) for name, array in kept.items())
    for name, array in saved.items():
        if name in ("phrases", "position"):
            continue
        for part in np.array_split(np.arange(array.size), min(3, array.size)):
            changed = array.copy()
            changed.flat[part] = 0 if name == "node" else array.flat[part] + 1
            assert later({**saved, name: changed}) != wanted, f"{name} {part[0]}"
    assert later({**saved, "position": saved["position"] + 1}) != wanted
    assert later(saved) == wanted


def test_phrases_begin_at_the_root_and_are_part_of_the_state(backend: OrtBackend, phrases: Boosting) -> None:
    backend.reset(np.arange(4))
    np.testing.assert_array_equal(backend.save(0)["phrases"], NO_PHRASES)
    backend.set_phrases(0, phrases)
    saved = {**backend.save(0), "node": np.array(5)}
    np.testing.assert_array_equal(saved["phrases"], phrases.digest)
    backend.load(0, saved)
    assert backend.save(0)["node"] == 5
    backend.set_phrases(0, phrases)
    assert backend.save(0)["node"] == 0
    with pytest.raises(OptionError, match="the saved state has other phrases; set the phrases it was saved with"):
        backend.load(1, saved)
    backend.set_phrases(0, None)
    np.testing.assert_array_equal(backend.save(0)["phrases"], NO_PHRASES)


def test_states_of_other_backends_are_rejected(backend: OrtBackend) -> None:
    backend.reset(np.arange(4))
    state = backend.save(0)
    for change, message in (
        ({"k": state["k"].astype(np.float16)}, "k does not fit"),
        ({"h": state["h"][..., 1:]}, "h does not fit"),
        ({"h": state["h"][..., 1:], "other": state["h"]}, "h, other do not fit"),
    ):
        with pytest.raises(OptionError, match=f"from another model, or from another kind .*: {message}"):
            backend.load(1, {**state, **change})
    with pytest.raises(OptionError, match="conv does not fit"):
        backend.load(1, {name: array for name, array in state.items() if name != "conv"})
    check_state(state, state)


def test_memory_of_a_slot(demo_bundle: Bundle) -> None:
    backend, manifest = OrtBackend(demo_bundle, capacity=2, threads=1), demo_bundle.manifest
    encoder, decoder, features = manifest.encoder, manifest.decoder, manifest.features
    values = (
        (features.window - 1 - features.hop)
        + 9 * features.mels
        + encoder.layers * encoder.d_model * (2 * encoder.cache + encoder.conv_cache)
        + decoder.joint
        + 2 * decoder.layers * decoder.hidden
    )
    assert backend.bytes_per_stream == 4 * values + 2 * 8  # float32, and two counters


# -- copies ------------------------------------------------------------------------------------------------------------

Operation = tuple[Any, ...]
History = tuple[Operation, ...]  # the operations since the reset of a slot; those of a copy begin with its source's


class Replay:
    """One slot in which histories are run, each from the saved state of its beginning; `copy` is not used."""

    def __init__(self, bundle: Bundle, speech: np.ndarray, lists: list[Boosting | None]) -> None:
        self.backend, self.speech, self.lists = OrtBackend(bundle, capacity=1, threads=1), speech, lists
        self.backend.reset(np.array([0]))
        self._found: dict[History, tuple[Any, dict[str, np.ndarray], int]] = {(): (None, self.backend.save(0), 0)}

    def apply(self, backend: OrtBackend, slot: int, operation: Operation) -> Any:
        """Run an operation in a slot of a backend and return what it emits."""
        name, *values = operation
        if name == "step":
            return run(backend, [batch_of(backend.manifest, self.speech, *values, [slot])])
        if name == "phrases":
            backend.set_phrases(slot, self.lists[values[0]])
        else:
            backend.reset_decoder(np.array([slot]))
        return None

    def after(self, history: History) -> tuple[Any, dict[str, np.ndarray], int]:
        """Return what the last operation of a history emits, the state after it, and the number of its phrases."""
        if history not in self._found:
            _, state, phrases = self.after(history[:-1])
            self.backend.set_phrases(0, self.lists[phrases])
            self.backend.load(0, state)
            emitted = self.apply(self.backend, 0, history[-1])
            phrases = history[-1][1] if history[-1][0] == "phrases" else phrases
            self._found[history] = emitted, self.backend.save(0), phrases
        return self._found[history]


@pytest.fixture(scope="module")
def replay(demo_bundle: Bundle, speech: np.ndarray, phrases: Boosting) -> Replay:
    vocabulary = demo_bundle.manifest.decoder.vocabulary
    few = Boosting([([token, token + 1], 3.0) for token in range(0, vocabulary - 1, 3)], vocabulary)
    return Replay(demo_bundle, speech, [None, phrases, few])


SLOTS = st.integers(0, 3)
CHANGES = st.one_of(
    st.tuples(st.just("step"), st.sampled_from([80, 160, 560]), st.integers(2, 5)),
    st.tuples(st.just("phrases"), st.integers(0, 2)),
    st.tuples(st.just("reset_decoder")),
)
COPIES = st.permutations(range(4)).flatmap(
    lambda slots: st.integers(1, 3).flatmap(
        lambda count: st.tuples(
            st.just("copy"),
            st.lists(st.sampled_from(slots[count:]), min_size=count, max_size=count),
            st.just(slots[:count]),
        )
    )
)


@settings(max_examples=60)
@given(st.lists(st.one_of(st.tuples(SLOTS, CHANGES), st.tuples(SLOTS, CHANGES), COPIES, SLOTS), max_size=30))
def test_interleaved_streams_and_copies(backend: OrtBackend, replay: Replay, calls: list[Any]) -> None:
    """Every slot emits what a stream with its history emits that was never copied, and ends in its state."""
    backend.reset(np.arange(4))
    history: list[History] = [()] * 4
    for call in calls:
        if isinstance(call, int):
            backend.reset(np.array([call]))
            history[call] = ()
        elif call[0] == "copy":
            _, sources, targets = call
            backend.copy(np.array(sources), np.array(targets))
            for source, target in zip(sources, targets, strict=True):
                history[target] = history[source]
        else:
            slot, operation = call
            history[slot] = (*history[slot], operation)
            assert replay.apply(backend, slot, operation) == replay.after(history[slot])[0]
    for slot in range(4):
        found, wanted = backend.save(slot), replay.after(history[slot])[1]
        assert {name: array.tobytes() for name, array in found.items()} == {
            name: array.tobytes() for name, array in wanted.items()
        }


def test_rows_of_a_copy_equal_those_of_its_source(
    demo_bundle: Bundle, speech: np.ndarray, phrases: Boosting, backend: OrtBackend
) -> None:
    """In a batch with another stream, the copy in the place of its source emits the same, bit for bit."""
    manifest, results = backend.manifest, []
    backend.reset(np.arange(4))
    backend.set_phrases(0, phrases)
    run(backend, [batch_of(manifest, speech, 560, step, [0]) for step in range(9)])
    run(backend, [batch_of(manifest, speech, 560, step, [2]) for step in range(3)])
    backend.copy(np.array([0, 2]), np.array([1, 3]))
    for slots in ([0, 2], [1, 3]):
        batches = [batch_of(manifest, speech, 560, step, slots) for step in range(9, 13)]
        emitted = [run(backend, [batch], row) for batch in batches for row in range(2)]
        results.append((emitted, [backend.save(slot) for slot in slots]))
    (first, states), (second, copies) = results
    assert first == second and any(tokens for tokens, *_ in first)
    for state, copied in zip(states, copies, strict=True):
        assert {name: array.tobytes() for name, array in state.items()} == {
            name: array.tobytes() for name, array in copied.items()
        }


# -- options and errors ------------------------------------------------------------------------------------------------


def test_sizes_and_their_limits(demo_bundle: Bundle) -> None:
    for capacity, max_batch, expected in ((5, None, 5), (5, 9, 5), (5, 2, 2), (70, None, 64)):
        backend = OrtBackend(demo_bundle, capacity, max_batch, threads=1)
        assert (backend.capacity, backend.max_batch, backend.asynchronous) == (capacity, expected, False)
    for name in ("capacity", "max_batch", "threads"):
        for value in (0, -1, True, 1.0, "2"):
            with pytest.raises(OptionError, match=f"{name} is {value!r}; it must be (a whole number of )?at least 1"):
                OrtBackend(demo_bundle, **{name: value})
    at_least_one(a=None, b=1, c=np.int64(3))


def test_copies_that_are_rejected(backend: OrtBackend) -> None:
    for sources, targets, message in (
        ([0], [4], "a target slot is 4; this backend has the slots 0 to 3"),
        ([1, -1], [0, 2], "a source slot is -1; this backend has the slots 0 to 3"),
        ([0, 0], [3, 3], "slot 3 is a target more than once; a target can have one source only"),
        ([0, 2], [2, 1], "slot 2 is both a source and a target; copy it in a call of its own"),
        ([0], [1, 2], r"have shape \(1,\) and the target slots \(2,\); give as many targets as sources"),
        ([[0]], [[1]], r"have shape \(1, 1\) .* in arrays of one dimension"),
    ):
        with pytest.raises(OptionError, match=message):
            backend.copy(np.array(sources), np.array(targets))
    check_copy(np.arange(2), np.array([3, 2]), 4)


def test_caches_that_a_cpu_cannot_run_are_rejected(demo_bundle: Bundle) -> None:
    def plans(*dtypes: str) -> Any:
        return {
            ms: SimpleNamespace(path=Path("none"), shared=None, recipe=SimpleNamespace(cache_dtype=dtype))
            for ms, dtype in zip((80, 560), dtypes, strict=False)
        }

    for dtypes in (("bfloat16",), ("float16", "float32")):
        with pytest.raises(BackendError, match=f"caches of {' and '.join(dtypes)}; float32 or float16 is required"):
            OrtBackend(demo_bundle, 1, threads=1, plans=plans(*dtypes))
    halves = OrtBackend(demo_bundle, 1, threads=1, plans=plans("float16"))
    halves.reset(np.array([0]))
    assert {name for name, array in halves.save(0).items() if array.dtype == np.float16} == {"k", "v", "conv"}
    with pytest.raises(BackendError, match="none"):  # the plan's file, not the bundle's graph
        halves.prepare(demo_bundle.manifest.chunk(80))
    with pytest.raises(BackendError, match="160"):
        halves.prepare(demo_bundle.manifest.chunk(160))


def test_threads_and_spinning_of_each_graph(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks have one thread, other graphs all. None spins after its run; a large joint has few pairs."""
    opened, session = {}, ort.InferenceSession

    def record(path: Any, options: Any, providers: list[str]) -> Any:
        stops = options.get_session_config_entry("session.force_spinning_stop")
        opened[Path(path).stem] = (options.intra_op_num_threads, stops, options.log_severity_level, providers)
        return session(path, options, providers=providers)

    monkeypatch.setattr(cpu.ort, "InferenceSession", record)
    backend = OrtBackend(demo_bundle, 1, threads=2)
    backend.prepare(demo_bundle.manifest.chunk(80))
    backend.prepare(demo_bundle.manifest.chunk(80))
    provider = ["CPUExecutionProvider"]
    assert opened == {
        "decoder": (1, "1", 3, provider),
        "joint": (1, "1", 3, provider),
        "features-80ms": (2, "1", 3, provider),
        "encoder-80ms": (2, "1", 3, provider),
    }
    assert backend.transducer.max_pairs is None
    net = demo_bundle.manifest.decoder
    sizes = {"joint": net.joint * (net.vocabulary + 1) * 4, "decoder": net.layers * 2 * net.hidden * 4 * net.hidden * 4}
    for limit in (size + change for size in sizes.values() for change in (0, -1)):
        monkeypatch.setattr(cpu, "_LARGE_BYTES", limit)
        opened.clear()
        assert OrtBackend(demo_bundle, 1, threads=2).transducer.max_pairs == (32 if sizes["joint"] > limit else None)
        for name, size in sizes.items():
            assert opened[name][:2] == (2 if size > limit else 1, "1")


@pytest.mark.parametrize("large", [False, True])
def test_pairs_in_a_call_of_a_large_joint(
    demo_bundle: Bundle, speech: np.ndarray, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr(cpu, "_LARGE_BYTES", 0)
    backend, pairs = OrtBackend(demo_bundle, 3, threads=1), []

    def wrap(name: str, stage: Any) -> Any:
        def join(outputs: list[str], inputs: dict[str, np.ndarray]) -> Any:
            pairs.append(len(inputs["predicted"]))
            return stage(outputs, inputs)

        return join if name == "joint" else stage

    backend.reset(np.arange(3))
    with backend.wrapped_stages(backend.manifest.chunk(1120), wrap):
        run(backend, [batch_of(backend.manifest, speech, 1120, 0, [0, 1, 2])])
    assert pairs[0] == (30 if large else 42)  # frames of three rows: at most 32 // 3 of each, or all 14


def test_stages_are_wrapped_and_restored(backend: OrtBackend, speech: np.ndarray) -> None:
    chunk, calls = backend.manifest.chunk(560), []

    def wrap(name: str, stage: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return stage(*args, **options)

        return call

    backend.reset(np.array([0]))
    first = batch_of(backend.manifest, speech, 560, 0, [0])
    wanted = run(backend, [first])
    backend.reset(np.array([0]))
    with backend.wrapped_stages(chunk, wrap):
        assert run(backend, [first]) == wanted
    assert calls[:3] == ["encode", "features", "encoder"] and set(calls[3:]) <= {"joint", "decoder"} and calls[3:]
    calls.clear()
    with pytest.raises(ZeroDivisionError), backend.wrapped_stages(chunk, wrap):
        raise ZeroDivisionError
    backend.reset(np.array([0]))
    assert run(backend, [first]) == wanted and calls == []


def test_a_step_that_fails_is_a_backend_error_and_does_not_advance(backend: OrtBackend, speech: np.ndarray) -> None:
    def wrap(name: str, stage: Any) -> Any:
        def fail(*args: Any) -> None:
            raise RuntimeError("no memory")

        return fail if name == "encoder" else stage

    chunk = backend.manifest.chunk(80)
    backend.reset(np.array([0]))
    with (
        backend.wrapped_stages(chunk, wrap),
        pytest.raises(BackendError, match="ONNX Runtime failed in a 80 ms step: no memory"),
    ):
        backend.submit(batch_of(backend.manifest, speech, 80, 0, [0]))
    assert backend.save(0)["position"] == 0


def test_prompt_ids_of_a_batch(backend: OrtBackend) -> None:
    languages = LanguageConfig("de-DE", {"en-US": 0, "de-DE": 3}, 5)
    one = batch_of(backend.manifest, np.ones(9000, np.float32), 80, 0, [0, 2])
    prompts = lambda *ids: Batch(one.chunk, one.slots, one.audio, one.lengths, np.array(ids))  # noqa: E731
    assert one.prompt_ids(languages).tolist() == [3, 3]
    assert prompts(4, 0).prompt_ids(languages).tolist() == [4, 0]
    assert prompts(4, 9).prompt_ids(LanguageConfig()).tolist() == [0, 0]  # a model of one language
    for invalid in (-1, 5):
        with pytest.raises(OptionError, match=f"a prompt id is {invalid}; this model has the ids 0 to 4"):
            prompts(0, invalid).prompt_ids(languages)
