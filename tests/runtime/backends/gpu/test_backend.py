"""The GPU backend on a simulated device (`tests/simt`), compared with the CPU backend: tokens must be equal.

The kernels are compiled from the real sources, the encoder is the bundle's graph on ONNX Runtime. Checks that need a
GPU are in `python -m nemostream.benchmarks.gpu_check`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
from cuda_on_cpu import MISSING
from host_device import HostDevice, OrtEncoder, ThreadBoundEncoder

import nemostream
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import BackendError, CapacityError, OptionError
from nemostream.runtime.backends.base import Batch, Emissions
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.backends.gpu.backend import UNROLLED_ITERATIONS, GpuBackend
from nemostream.runtime.decoding.boosting import Boosting

CAPACITY = 5
needs_compiler = pytest.mark.skipif(MISSING, reason="needs g++ to run the kernels on a CPU")


def make_backend(
    bundle: Bundle, chunks_ms: Sequence[int], device: Any, capturable: bool = True, **options: Any
) -> GpuBackend:
    encoders = {ms: OrtEncoder(bundle, bundle.manifest.chunk(ms), device, capturable) for ms in chunks_ms}
    return GpuBackend(bundle, device, encoders, **{"capacity": CAPACITY, **options})


def as_lists(emissions: Emissions) -> list[tuple[list[int], list[int], bool]]:
    """Return tokens, frames and failure of each row."""
    rows = zip(emissions.tokens, emissions.frames, emissions.failed, strict=True)
    return [(tokens.tolist(), frames.tolist(), bool(failed)) for tokens, frames, failed in rows]


class Streams:
    """Streams of speech at different positions, which can be combined into batches of any chunk size."""

    def __init__(self, bundle: Bundle, clips: dict[str, np.ndarray]) -> None:
        self.manifest, self.clips = bundle.manifest, list(clips.values())
        self.audio: dict[int, np.ndarray] = {}
        self.position: dict[int, int] = {}  # in samples

    def start(self, slot: int, clip: int) -> None:
        self.audio[slot] = np.concatenate(
            [np.zeros(self.manifest.lead, np.float32), self.clips[clip % len(self.clips)]]
        )
        self.position[slot] = 0

    def copy(self, source: int, target: int) -> None:
        self.audio[target], self.position[target] = self.audio[source], self.position[source]

    def ended(self, slot: int) -> bool:
        return self.position[slot] >= len(self.audio[slot])

    def batch(self, chunk: ChunkConfig, slots: Sequence[int]) -> Batch:
        rows, lengths = np.zeros((len(slots), chunk.samples), np.float32), []
        for row, slot in zip(rows, slots, strict=True):
            part = self.audio[slot][self.position[slot] :][: chunk.samples]
            row[: len(part)] = part
            lengths.append(len(part))
            self.position[slot] += chunk.samples
        return Batch(chunk, np.array(slots), rows, np.array(lengths))


def some_phrases(rng: np.random.Generator, bundle: Bundle) -> Boosting:
    """Return phrases over few tokens, so that they occur."""
    few = rng.choice(bundle.manifest.decoder.vocabulary, 6, replace=False)
    phrases = [(rng.choice(few, rng.integers(1, 6)).tolist(), float(rng.choice([0.5, 1, 2]))) for _ in range(20)]
    return Boosting(phrases, bundle.manifest.decoder.vocabulary)


@pytest.fixture
def gpu_backend(small_bundle: Bundle, make_device: Any) -> Iterator[GpuBackend]:
    backend = make_backend(small_bundle, [80, 560], make_device())
    yield backend
    backend.close()


@pytest.mark.parametrize("seed", range(4))
def test_random_batches_of_random_streams(
    seed: int, gpu_backend: GpuBackend, small_bundle: Bundle, clips: dict[str, np.ndarray]
) -> None:
    """Random subsets of five streams, mixed chunk sizes, streams that end and start, two pending steps.

    Between steps, a random stream's phrases are set or removed, its decoder is reset, its state is saved or loaded, or
    it is copied to the slots of two others.
    """
    rng = np.random.default_rng(seed)
    gpu, cpu, streams = (
        gpu_backend,
        OrtBackend(small_bundle, capacity=CAPACITY, threads=1),
        Streams(small_bundle, clips),
    )
    pending: list[tuple[Any, Emissions]] = []
    phrases: dict[int, Boosting | None] = dict.fromkeys(range(CAPACITY))
    saved: dict[int, Any] = dict.fromkeys(range(CAPACITY))
    emitted = 0
    for slot in range(CAPACITY):
        streams.start(slot, int(rng.integers(100)))
    for backend in (gpu, cpu):
        backend.reset(np.arange(CAPACITY))
    for _ in range(30):
        ended = [slot for slot in range(CAPACITY) if streams.ended(slot)]
        for slot in ended:
            streams.start(slot, int(rng.integers(100)))
        if ended:
            for backend in (gpu, cpu):
                backend.reset(np.array(ended))
            for slot in ended:
                phrases[slot], saved[slot] = None, None
        slot = int(rng.integers(CAPACITY))
        action = rng.choice(["set_phrases", "reset_decoder", "save", "load", "copy", "nothing"])
        if action == "set_phrases":
            phrases[slot], saved[slot] = some_phrases(rng, small_bundle) if rng.random() < 0.7 else None, None
        for index, backend in enumerate((gpu, cpu)):
            if action == "set_phrases":
                backend.set_phrases(slot, phrases[slot])
            elif action == "reset_decoder":
                backend.reset_decoder(np.array([slot]))
            elif action == "load" and saved[slot]:
                backend.load(slot, saved[slot][index])
            elif action == "copy":
                backend.copy(np.array([slot, slot]), (slot + np.array([1, 3])) % CAPACITY)
        if action == "copy":
            for target in ((slot + 1) % CAPACITY, (slot + 3) % CAPACITY):
                streams.copy(slot, target)
                phrases[target], saved[target] = phrases[slot], None
        if action == "save":
            saved[slot] = (gpu.save(slot), cpu.save(slot))
        chunk = small_bundle.manifest.chunk(int(rng.choice([80, 560])))
        slots = np.sort(rng.choice(CAPACITY, rng.integers(1, CAPACITY + 1), replace=False)).tolist()
        batch = streams.batch(chunk, slots)
        pending.append((gpu.submit(batch), cpu.submit(batch).result()))
        while len(pending) > int(rng.integers(0, 2)):
            step, wanted = pending.pop(0)
            got = step.result()
            assert as_lists(got) == as_lists(wanted)
            for value, expected in zip(got.scores + got.sum_p_alpha, wanted.scores + wanted.sum_p_alpha, strict=True):
                np.testing.assert_allclose(value, expected, atol=1e-3, rtol=1e-3)
            emitted += sum(map(len, got.tokens))
    assert emitted > 20


@pytest.mark.parametrize("ms", [80, 160, 560, 1120])
def test_demo_transcripts_are_equal(
    ms: int, demo_bundle: Bundle, make_device: Any, clips: dict[str, np.ndarray]
) -> None:
    """Whole clips through the public API: the text is that of the CPU backend."""
    with (
        nemostream.load(chunk_ms=ms, threads=1) as cpu,
        nemostream.Model(demo_bundle, make_backend(demo_bundle, [ms], make_device()), ms) as gpu,
    ):
        for clip in [*clips.values()][:2]:
            wanted, got = cpu.transcribe(clip), gpu.transcribe(clip)
            assert got.text == wanted.text
            assert [(t.id, t.time) for t in got.tokens] == [(t.id, t.time) for t in wanted.tokens]
        clip = nemostream.demo_clip()
        assert gpu.transcribe(clip).text == cpu.transcribe(clip).text != ""


def test_concurrent_transcription(demo_bundle: Bundle, make_device: Any, clips: dict[str, np.ndarray]) -> None:
    names = [*clips][:4]
    with nemostream.load(chunk_ms=560, threads=1) as cpu:
        wanted = {name: cpu.transcribe(clips[name]).text for name in names}
    texts: dict[str, str] = {}
    with nemostream.Model(demo_bundle, make_backend(demo_bundle, [560], make_device())) as model:

        def work(name: str) -> None:
            texts[name] = model.transcribe(clips[name]).text

        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == wanted


@needs_compiler
def test_loaded_backend_is_used_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load` opens the backend on the thread that runs and closes it, and none other calls the device."""
    devices: list[HostDevice] = []

    def open_backend(bundle: Bundle, *, capacity: int, **options: Any) -> GpuBackend:
        devices.append(HostDevice())
        encoder = ThreadBoundEncoder(bundle, bundle.manifest.chunk(560), devices[0])
        return GpuBackend(bundle, devices[0], {560: encoder}, capacity=capacity)

    monkeypatch.setattr("nemostream.engines.open_backend", open_backend)
    clip = nemostream.demo_clip()
    with nemostream.load(device="cuda", capacity=2) as model:
        text = model.transcribe(clip, phrases=["seven"]).text
        with model.stream(phrases=["seven"]) as stream:  # its reset, phrases and closing
            stream.push(np.zeros(16000, np.float32))
        model._scheduler.call(lambda backend: backend.load(0, backend.save(0)))
    monkeypatch.undo()
    with nemostream.load(threads=1) as cpu:
        assert text == cpu.transcribe(clip, phrases=["seven"]).text != ""
    assert devices[0].closed
    assert len(devices[0].threads) == 1 and threading.get_ident() not in devices[0].threads


@pytest.mark.parametrize(
    ("options", "capturable", "loop", "requested", "launches"),
    [
        ({}, True, "while", "while", 1),
        ({}, False, "while", "while", 3),  # before the encoder, the encoder, after it, without waiting in between
        ({"conditional": False}, True, "unrolled", "while", 1),
        ({"conditional": False}, False, "unrolled", "while", 3),
        ({"capturable": False}, True, "eager", "while", None),
        ({}, True, "unrolled", "unrolled", 1),
        ({}, True, "eager", "eager", None),
    ],
)
def test_fallbacks_for_missing_device_features(
    options: dict[str, bool],
    capturable: bool,
    loop: str,
    requested: str,
    launches: int | None,
    make_device: Any,
    small_bundle: Bundle,
    clips: Any,
) -> None:
    device = make_device(**options)
    if options and not isinstance(device, HostDevice):
        pytest.skip("needs the simulated device")
    gpu = make_backend(small_bundle, [560], device, capturable, capacity=2, loop=requested)
    assert gpu.loop == loop
    cpu, streams, chunk = (
        OrtBackend(small_bundle, capacity=2, threads=1),
        Streams(small_bundle, clips),
        gpu.manifest.chunk(560),
    )
    cpu.reset(np.arange(2))
    for slot in (0, 1):
        streams.start(slot, slot)
    max_tokens = 0
    for slots in ([0, 1], [0, 1], [1], [0], [0, 1]):
        batch = streams.batch(chunk, slots)
        before = getattr(device, "queued", 0)
        step = gpu.submit(batch)
        if launches and isinstance(device, HostDevice):
            assert device.queued - before == launches
        wanted = cpu.submit(batch).result()
        assert as_lists(step.result()) == as_lists(wanted)
        max_tokens = max(max_tokens, *map(len, wanted.tokens))
    # More tokens than one launch of an unrolled loop can emit.
    assert max_tokens >= UNROLLED_ITERATIONS or small_bundle.manifest.name == "demo"
    gpu.close()


@needs_compiler
def test_unknown_loop(demo_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match="loop is 'forever'"):
        make_backend(demo_bundle, [80], HostDevice(), loop="forever")


def test_encoder_output_is_equal(gpu_backend: GpuBackend, small_bundle: Bundle, clips: dict[str, np.ndarray]) -> None:
    gpu, cpu, streams = (
        gpu_backend,
        OrtBackend(small_bundle, capacity=CAPACITY, threads=1),
        Streams(small_bundle, clips),
    )
    for slot in range(CAPACITY):
        streams.start(slot, slot)
    for backend in (gpu, cpu):
        backend.reset(np.arange(CAPACITY))
    for step, slots in enumerate([[0, 1, 2], [1, 3], [4], [0, 1, 2, 3, 4], [2, 4], [3], [0, 4]]):
        batch = streams.batch(small_bundle.manifest.chunk((80, 560)[step % 2]), slots)
        (got, counts), (wanted, wanted_counts) = gpu.encode(batch), cpu.encode(batch)
        assert counts.tolist() == wanted_counts.tolist()
        np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_features_match_the_graph(gpu_backend: GpuBackend, small_bundle: Bundle, clips: dict[str, np.ndarray]) -> None:
    """Both compute in fp64 and agree to the last bits of fp32, including a stream's end and silence."""
    chunk = small_bundle.manifest.chunk(560)
    rng = np.random.default_rng(0)
    speech = max(clips.values(), key=len)
    rows = [
        speech[8000:][: chunk.samples],
        1e-4 * rng.standard_normal(chunk.samples),
        np.zeros(chunk.samples),
        -speech[4000:][: chunk.samples],
    ]
    audio = np.stack(rows).astype(np.float32)
    lengths = np.array([chunk.samples, chunk.samples, 5000, 3111])
    for row, length in zip(audio, lengths, strict=True):
        row[length:] = 0
    session = onnxruntime.InferenceSession(small_bundle.file("features-560ms"), providers=["CPUExecutionProvider"])
    tail = np.zeros((4, small_bundle.manifest.features.tail), np.float32)
    gpu_backend.reset(np.arange(4))
    for _ in range(2):  # the second time with the tail of the first
        wanted, tail = session.run(["mel", "audio_tail_next"], {"audio": audio, "audio_tail": tail, "lengths": lengths})
        gpu_backend.encode(Batch(chunk, np.arange(4), audio, lengths))
        mel = np.empty_like(wanted)
        gpu_backend.arena.read("mel", mel)
        np.testing.assert_allclose(mel, wanted, atol=2e-6)


@pytest.mark.parametrize("slots", [[0], [2], [1, 3], [0, 1, 2, 3]])
def test_other_streams_are_unchanged(slots: list[int], make_device: Any, small_bundle: Bundle, clips: Any) -> None:
    """Byte for byte, in place and gathered, with idle rows."""
    gpu, streams = make_backend(small_bundle, [80], make_device()), Streams(small_bundle, clips)
    chunk = small_bundle.manifest.chunk(80)
    for slot in range(CAPACITY):
        streams.start(slot, slot)
    for _ in range(3):
        gpu.submit(streams.batch(chunk, range(CAPACITY))).result()
    before = state_of(gpu)
    gpu.submit(streams.batch(chunk, slots)).result()
    after = state_of(gpu)
    changed = {slot for slot in range(CAPACITY) if before[slot] != after[slot]}
    assert changed == set(slots)
    gpu.close()


def state_of(backend: GpuBackend) -> list[bytes]:
    """Return all bytes of each slot."""
    memory, found = backend.arena, [b""] * backend.capacity
    layers = backend.manifest.encoder.layers
    for name, size in memory.layout.slot_bytes().items():
        array = np.empty(size, np.uint8)
        memory.read(name, array)
        outer = layers if name in ("k", "v", "conv") else 1
        for slot in range(backend.capacity):
            found[slot] += array.reshape(outer, backend.capacity, -1)[:, slot].tobytes()
    return found


def test_reset_clears_a_slot(make_device: Any, small_bundle: Bundle, clips: Any) -> None:
    """A reset removes all state of the previous stream, including values that are not finite."""
    gpu, streams = make_backend(small_bundle, [80], make_device()), Streams(small_bundle, clips)
    chunk = small_bundle.manifest.chunk(80)
    initial = state_of(gpu)
    streams.start(2, 0)
    invalid = Batch(chunk, np.array([2]), np.full((1, chunk.samples), np.nan, np.float32), np.array([chunk.samples]))
    assert gpu.submit(invalid).result().failed.tolist() == [True]
    assert state_of(gpu)[2] != initial[2]
    gpu.reset(np.array([2]))
    assert state_of(gpu) == initial
    gpu.close()


def test_nan_affects_only_its_stream(make_device: Any, small_bundle: Bundle, clips: Any) -> None:
    gpu, cpu = make_backend(small_bundle, [560], make_device()), OrtBackend(small_bundle, CAPACITY)
    streams = Streams(small_bundle, clips)
    chunk, emitted = small_bundle.manifest.chunk(560), 0
    cpu.reset(np.arange(CAPACITY))
    for slot in range(CAPACITY):
        streams.start(slot, slot)
    for step in range(4):
        batch = streams.batch(chunk, range(CAPACITY))
        if step == 1:
            batch.audio[3, 100] = np.nan
        got, wanted = gpu.submit(batch).result(), cpu.submit(batch).result()
        assert got.failed.tolist() == [step > 0 and slot == 3 for slot in range(CAPACITY)]
        for slot in (0, 1, 2, 4):
            assert as_lists(got)[slot] == as_lists(wanted)[slot]
            emitted += len(got.tokens[slot])
        assert step == 0 or not len(got.tokens[3])
    assert emitted
    gpu.close()


@needs_compiler
def test_memory_per_stream_and_capacity_limit(demo_bundle: Bundle) -> None:
    gpu = make_backend(demo_bundle, [80], HostDevice(), capacity=3)
    encoder, net = demo_bundle.manifest.encoder, demo_bundle.manifest.decoder
    caches = encoder.layers * encoder.d_model * (2 * encoder.cache + encoder.conv_cache) * 4
    other = 4 * (9 * 128 + 239 + net.joint + 2 * net.layers * net.hidden) + 4 + 8
    assert gpu.bytes_per_stream == caches + other
    gpu.close()

    limit = 600 << 20
    with pytest.raises(
        BackendError, match=r"1000 streams .* 0\.6 GB are free; load the model with capacity=(\d+)"
    ) as error:
        make_backend(demo_bundle, [80], HostDevice(free_bytes=limit), capacity=1000, max_batch=2)
    fit = int(str(error.value).split("capacity=")[1].split()[0])
    make_backend(demo_bundle, [80], HostDevice(free_bytes=limit), capacity=fit, max_batch=2).close()
    with pytest.raises(BackendError, match="capacity="):
        make_backend(demo_bundle, [80], HostDevice(free_bytes=limit), capacity=fit + 1, max_batch=2)
    with pytest.raises(BackendError, match="free memory on this GPU, or use one with more"):
        make_backend(demo_bundle, [80], HostDevice(free_bytes=1 << 20), capacity=4)


@needs_compiler
def test_all_slots_taken(demo_bundle: Bundle) -> None:
    with nemostream.Model(demo_bundle, make_backend(demo_bundle, [80], HostDevice(), capacity=2), 80) as model:
        with model.stream(), model.stream(), pytest.raises(CapacityError, match="all 2 slots are taken"):
            model.stream()
        with model.stream() as stream:
            stream.push(np.zeros(16000, np.float32))


@needs_compiler
def test_chunk_size_without_an_engine(demo_bundle: Bundle) -> None:
    with nemostream.Model(demo_bundle, make_backend(demo_bundle, [80], HostDevice()), 80) as model:
        with pytest.raises(BackendError, match=r"chunks of 560 ms, .*nemostream build BUNDLE --chunk-ms 560"):
            model.transcribe(nemostream.demo_clip(), chunk_ms=560)
        assert model.transcribe(nemostream.demo_clip()).text


@pytest.mark.parametrize("options", [{"capacity": 0}, {"max_batch": 0}])
def test_invalid_options(demo_bundle: Bundle, options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="it must be at least 1"):
        make_backend(demo_bundle, [80], HostDevice(), **options)


@needs_compiler
def test_failed_step_fails_only_its_streams(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device fails once: waiting streams get the error, and later streams work."""
    gpu = make_backend(demo_bundle, [560], HostDevice())
    original, fail = HostDevice.drain, [False]

    def drain(device: HostDevice, end: int | None = None) -> None:
        original(device, end)
        if fail[0]:
            fail[0] = False
            raise BackendError("the GPU failed in a step.")

    monkeypatch.setattr(HostDevice, "drain", drain)
    with nemostream.Model(demo_bundle, gpu) as model:
        wanted = model.transcribe(nemostream.demo_clip()).text
        with pytest.raises(BackendError, match="failed in a step"), model.stream() as stream:
            fail[0] = True
            stream.push(np.zeros(16000, np.float32))
        assert model.transcribe(nemostream.demo_clip()).text == wanted


@needs_compiler
def test_lost_device_fails_all_its_streams(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open streams and new ones raise, closing works, and streams on another backend are unchanged."""
    device, clip = HostDevice(), nemostream.demo_clip()
    original, lost = HostDevice.drain, [False]

    def drain(self: HostDevice, end: int | None = None) -> None:
        if self is device and lost[0]:
            raise BackendError("the GPU failed: restart the process.")
        original(self, end)

    monkeypatch.setattr(HostDevice, "drain", drain)
    with (
        nemostream.load(threads=1) as cpu,
        nemostream.Model(demo_bundle, make_backend(demo_bundle, [560], device)) as model,
        nemostream.Model(demo_bundle, make_backend(demo_bundle, [560], HostDevice())) as other,
    ):
        streams = [model.open_session(16000, 1) for _ in range(2)]
        for stream in streams:
            stream.feed(np.zeros(16000, np.float32))
            stream.wait()
        lost[0] = True
        for _ in range(3):
            streams.append(model.open_session(16000, 1))
        for stream in streams:
            with pytest.raises(BackendError, match="restart the process"):
                stream.feed(np.zeros(16000, np.float32))
                stream.wait()
        assert other.transcribe(clip).text == cpu.transcribe(clip).text != ""
    assert device.closed
