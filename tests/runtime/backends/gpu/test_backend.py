"""The GPU backend on a device that the CPU plays (`tests/simt`), beside the CPU backend: the same tokens, always.

The kernels are the real sources, the encoder is the bundle's own graph on ONNX Runtime. What only a GPU can show is
shown by `python -m nemostream.benchmarks.gpu_check`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
from cuda_on_cpu import MISSING
from host_device import HostDevice, OrtEncoder

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


def seen(emissions: Emissions) -> list[tuple[list[int], list[int], bool]]:
    rows = zip(emissions.tokens, emissions.frames, emissions.failed, strict=True)
    return [(tokens.tolist(), frames.tolist(), bool(failed)) for tokens, frames, failed in rows]


class Talk:
    """Streams of speech at different points: hands out batches of any of them, at any chunk size."""

    def __init__(self, bundle: Bundle, clips: dict[str, np.ndarray]) -> None:
        self.manifest, self.clips = bundle.manifest, list(clips.values())
        self.audio: dict[int, np.ndarray] = {}
        self.at: dict[int, int] = {}

    def start(self, slot: int, clip: int) -> None:
        self.audio[slot] = np.concatenate(
            [np.zeros(self.manifest.lead, np.float32), self.clips[clip % len(self.clips)]]
        )
        self.at[slot] = 0

    def over(self, slot: int) -> bool:
        return self.at[slot] >= len(self.audio[slot])

    def batch(self, chunk: ChunkConfig, slots: Sequence[int]) -> Batch:
        rows, lengths = np.zeros((len(slots), chunk.samples), np.float32), []
        for row, slot in zip(rows, slots, strict=True):
            part = self.audio[slot][self.at[slot] :][: chunk.samples]
            row[: len(part)] = part
            lengths.append(len(part))
            self.at[slot] += chunk.samples
        return Batch(chunk, np.array(slots), rows, np.array(lengths))


def some_phrases(rng: np.random.Generator, bundle: Bundle) -> Boosting:
    """Over few tokens, so that they are met."""
    few = rng.choice(bundle.manifest.decoder.vocabulary, 6, replace=False)
    phrases = [(rng.choice(few, rng.integers(1, 6)).tolist(), float(rng.choice([0.5, 1, 2]))) for _ in range(20)]
    return Boosting(phrases, bundle.manifest.decoder.vocabulary)


@pytest.fixture
def talking(small_bundle: Bundle, make_device: Any) -> Iterator[GpuBackend]:
    backend = make_backend(small_bundle, [80, 560], make_device())
    yield backend
    backend.close()


@pytest.mark.parametrize("seed", range(4))
def test_any_batches_of_any_streams(
    seed: int, talking: GpuBackend, small_bundle: Bundle, clips: dict[str, np.ndarray]
) -> None:
    """Random subsets of five streams, chunk sizes mixed, streams that end and begin, two steps in flight.

    Now and then one is boosted or no longer, forgets what it said, or goes back to what it once was.
    """
    rng = np.random.default_rng(seed)
    ours, cpu, talk = talking, OrtBackend(small_bundle, capacity=CAPACITY, threads=1), Talk(small_bundle, clips)
    pending: list[tuple[Any, Emissions]] = []
    boosts: dict[int, Boosting | None] = dict.fromkeys(range(CAPACITY))
    saved: dict[int, Any] = dict.fromkeys(range(CAPACITY))
    said = 0
    for slot in range(CAPACITY):
        talk.start(slot, int(rng.integers(100)))
    for backend in (ours, cpu):
        backend.reset(np.arange(CAPACITY))
    for _ in range(30):
        over = [slot for slot in range(CAPACITY) if talk.over(slot)]
        for slot in over:
            talk.start(slot, int(rng.integers(100)))
        if over:
            for backend in (ours, cpu):
                backend.reset(np.array(over))
            for slot in over:
                boosts[slot], saved[slot] = None, None
        slot, what = int(rng.integers(CAPACITY)), rng.choice(["boost", "forget", "save", "load", "nothing"])
        if what == "boost":
            boosts[slot], saved[slot] = some_phrases(rng, small_bundle) if rng.random() < 0.7 else None, None
        for index, backend in enumerate((ours, cpu)):
            if what == "boost":
                backend.set_phrases(slot, boosts[slot])
            elif what == "forget":
                backend.reset_decoder(np.array([slot]))
            elif what == "load" and saved[slot]:
                backend.load(slot, saved[slot][index])
        if what == "save":
            saved[slot] = (ours.save(slot), cpu.save(slot))
        chunk = small_bundle.manifest.chunk(int(rng.choice([80, 560])))
        slots = np.sort(rng.choice(CAPACITY, rng.integers(1, CAPACITY + 1), replace=False)).tolist()
        batch = talk.batch(chunk, slots)
        pending.append((ours.submit(batch), cpu.submit(batch).result()))
        while len(pending) > int(rng.integers(0, 2)):
            step, wanted = pending.pop(0)
            got = step.result()
            assert seen(got) == seen(wanted)
            for mine, theirs in zip(got.scores + got.sum_p_alpha, wanted.scores + wanted.sum_p_alpha, strict=True):
                np.testing.assert_allclose(mine, theirs, atol=1e-3, rtol=1e-3)
            said += sum(map(len, got.tokens))
    assert said > 20


@pytest.mark.parametrize("ms", [80, 160, 560, 1120])
def test_the_demo_says_the_same(ms: int, demo_bundle: Bundle, make_device: Any, clips: dict[str, np.ndarray]) -> None:
    """Whole clips through scheduler and model, as users have them; the text is the CPU's."""
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


def test_many_threads_share_it(demo_bundle: Bundle, make_device: Any, clips: dict[str, np.ndarray]) -> None:
    names = [*clips][:4]
    with nemostream.load(chunk_ms=560, threads=1) as cpu:
        wanted = {name: cpu.transcribe(clips[name]).text for name in names}
    said: dict[str, str] = {}
    with nemostream.Model(demo_bundle, make_backend(demo_bundle, [560], make_device())) as model:

        def work(name: str) -> None:
            said[name] = model.transcribe(clips[name]).text

        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert said == wanted


@pytest.mark.parametrize(
    ("options", "capturable", "loop", "asked", "launches"),
    [
        ({}, True, "while", "while", 1),
        ({}, False, "while", "while", 3),  # ours, the encoder's, ours: and no wait between them
        ({"conditional": False}, True, "unrolled", "while", 1),
        ({"conditional": False}, False, "unrolled", "while", 3),
        ({"capturable": False}, True, "eager", "while", None),
        ({}, True, "unrolled", "unrolled", 1),
        ({}, True, "eager", "eager", None),
    ],
)
def test_what_a_device_cannot_do_is_done_otherwise(
    options: dict[str, bool],
    capturable: bool,
    loop: str,
    asked: str,
    launches: int | None,
    make_device: Any,
    small_bundle: Bundle,
    clips: Any,
) -> None:
    device = make_device(**options)
    if options and not isinstance(device, HostDevice):
        pytest.skip("a real device can")
    ours = make_backend(small_bundle, [560], device, capturable, capacity=2, loop=asked)
    assert ours.loop == loop
    cpu, talk, chunk = (
        OrtBackend(small_bundle, capacity=2, threads=1),
        Talk(small_bundle, clips),
        ours.manifest.chunk(560),
    )
    cpu.reset(np.arange(2))
    for slot in (0, 1):
        talk.start(slot, slot)
    most = 0
    for slots in ([0, 1], [0, 1], [1], [0], [0, 1]):
        batch = talk.batch(chunk, slots)
        before = getattr(device, "queued", 0)
        step = ours.submit(batch)
        if launches and isinstance(device, HostDevice):
            assert device.queued - before == launches
        wanted = cpu.submit(batch).result()
        assert seen(step.result()) == seen(wanted)
        most = max(most, *map(len, wanted.tokens))
    assert (
        most >= UNROLLED_ITERATIONS or small_bundle.manifest.name == "demo"
    )  # labels and a verdict: more than an unrolled loop comes to in one launch
    ours.close()


@needs_compiler
def test_a_loop_nobody_knows(demo_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match="loop is 'forever'"):
        make_backend(demo_bundle, [80], HostDevice(), loop="forever")


def test_the_encoder_agrees_frame_by_frame(
    talking: GpuBackend, small_bundle: Bundle, clips: dict[str, np.ndarray]
) -> None:
    ours, cpu, talk = talking, OrtBackend(small_bundle, capacity=CAPACITY, threads=1), Talk(small_bundle, clips)
    for slot in range(CAPACITY):
        talk.start(slot, slot)
    for backend in (ours, cpu):
        backend.reset(np.arange(CAPACITY))
    for step, slots in enumerate([[0, 1, 2], [1, 3], [4], [0, 1, 2, 3, 4], [2, 4], [3], [0, 4]]):
        batch = talk.batch(small_bundle.manifest.chunk((80, 560)[step % 2]), slots)
        (mine, counts), (theirs, wanted) = ours.encode(batch), cpu.encode(batch)
        assert counts.tolist() == wanted.tolist()
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_the_features_are_the_graphs(talking: GpuBackend, small_bundle: Bundle, clips: dict[str, np.ndarray]) -> None:
    """fp64 as in ONNX: to the last bits of fp32, a stream's end and silence included."""
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
    talking.reset(np.arange(4))
    for _ in range(2):  # the second time with the first one's tail
        wanted, tail = session.run(["mel", "audio_tail_next"], {"audio": audio, "audio_tail": tail, "lengths": lengths})
        talking.encode(Batch(chunk, np.arange(4), audio, lengths))
        mel = np.empty_like(wanted)
        talking.arena.read("mel", mel)
        np.testing.assert_allclose(mel, wanted, atol=2e-6)


@pytest.mark.parametrize("slots", [[0], [2], [1, 3], [0, 1, 2, 3]])
def test_streams_that_are_not_in_the_batch_are_left_alone(
    slots: list[int], make_device: Any, small_bundle: Bundle, clips: Any
) -> None:
    """Byte for byte, in place or gathered, idle rows included."""
    ours, talk = make_backend(small_bundle, [80], make_device()), Talk(small_bundle, clips)
    chunk = small_bundle.manifest.chunk(80)
    for slot in range(CAPACITY):
        talk.start(slot, slot)
    for _ in range(3):
        ours.submit(talk.batch(chunk, range(CAPACITY))).result()
    before = state_of(ours)
    ours.submit(talk.batch(chunk, slots)).result()
    after = state_of(ours)
    changed = {slot for slot in range(CAPACITY) if before[slot] != after[slot]}
    assert changed == set(slots)
    ours.close()


def state_of(backend: GpuBackend) -> list[bytes]:
    """Every byte of every slot."""
    memory, found = backend.arena, [b""] * backend.capacity
    layers = backend.manifest.encoder.layers
    for name, size in memory.slot_bytes.items():
        array = np.empty(size, np.uint8)
        memory.read(name, array)
        outer = layers if name in ("k", "v", "conv") else 1
        for slot in range(backend.capacity):
            found[slot] += array.reshape(outer, backend.capacity, -1)[:, slot].tobytes()
    return found


def test_a_slot_begins_again(make_device: Any, small_bundle: Bundle, clips: Any) -> None:
    """A reset leaves nothing of the stream before, not even what was not finite."""
    ours, talk = make_backend(small_bundle, [80], make_device()), Talk(small_bundle, clips)
    chunk = small_bundle.manifest.chunk(80)
    fresh = state_of(ours)
    talk.start(2, 0)
    poison = Batch(chunk, np.array([2]), np.full((1, chunk.samples), np.nan, np.float32), np.array([chunk.samples]))
    assert ours.submit(poison).result().failed.tolist() == [True]
    assert state_of(ours)[2] != fresh[2]
    ours.reset(np.array([2]))
    assert state_of(ours) == fresh
    ours.close()


def test_a_poisoned_stream_harms_no_other(make_device: Any, small_bundle: Bundle, clips: Any) -> None:
    ours, cpu = make_backend(small_bundle, [560], make_device()), OrtBackend(small_bundle, CAPACITY)
    talk = Talk(small_bundle, clips)
    chunk, said = small_bundle.manifest.chunk(560), 0
    cpu.reset(np.arange(CAPACITY))
    for slot in range(CAPACITY):
        talk.start(slot, slot)
    for step in range(4):
        batch = talk.batch(chunk, range(CAPACITY))
        if step == 1:
            batch.audio[3, 100] = np.nan
        got, wanted = ours.submit(batch).result(), cpu.submit(batch).result()
        assert got.failed.tolist() == [step > 0 and slot == 3 for slot in range(CAPACITY)]
        for slot in (0, 1, 2, 4):
            assert seen(got)[slot] == seen(wanted)[slot]
            said += len(got.tokens[slot])
        assert step == 0 or not len(got.tokens[3])
    assert said
    ours.close()


@needs_compiler
def test_memory_is_told_and_capacity_refused(demo_bundle: Bundle) -> None:
    ours = make_backend(demo_bundle, [80], HostDevice(), capacity=3)
    encoder, net = demo_bundle.manifest.encoder, demo_bundle.manifest.decoder
    caches = encoder.layers * encoder.d_model * (2 * encoder.cache + encoder.conv_cache) * 4
    rest = 4 * (9 * 128 + 239 + net.joint + 2 * net.layers * net.hidden) + 4 + 8
    assert ours.bytes_per_stream == caches + rest
    ours.close()

    small = 600 << 20
    with pytest.raises(
        BackendError, match=r"1000 streams .* 0\.6 GB are free; load the model with capacity=(\d+)"
    ) as error:
        make_backend(demo_bundle, [80], HostDevice(free_bytes=small), capacity=1000, max_batch=2)
    fits = int(str(error.value).split("capacity=")[1].split()[0])
    make_backend(demo_bundle, [80], HostDevice(free_bytes=small), capacity=fits, max_batch=2).close()
    with pytest.raises(BackendError, match="capacity="):
        make_backend(demo_bundle, [80], HostDevice(free_bytes=small), capacity=fits + 1, max_batch=2)
    with pytest.raises(BackendError, match="choose a smaller max_batch"):
        make_backend(demo_bundle, [80], HostDevice(free_bytes=1 << 20), capacity=4)


@needs_compiler
def test_no_more_streams_than_slots(demo_bundle: Bundle) -> None:
    with nemostream.Model(demo_bundle, make_backend(demo_bundle, [80], HostDevice(), capacity=2), 80) as model:
        with model.stream(), model.stream(), pytest.raises(CapacityError, match="all 2 slots are taken"):
            model.stream()
        with model.stream() as stream:
            stream.push(np.zeros(16000, np.float32))


@needs_compiler
def test_a_chunk_size_without_an_engine(demo_bundle: Bundle) -> None:
    with nemostream.Model(demo_bundle, make_backend(demo_bundle, [80], HostDevice()), 80) as model:
        with pytest.raises(BackendError, match=r"chunks of 560 ms, .*nemostream build BUNDLE --chunk-ms 560"):
            model.transcribe(nemostream.demo_clip(), chunk_ms=560)
        assert model.transcribe(nemostream.demo_clip()).text


@pytest.mark.parametrize("options", [{"capacity": 0}, {"max_batch": 0}])
def test_bad_options(demo_bundle: Bundle, options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="it must be at least 1"):
        make_backend(demo_bundle, [80], HostDevice(), **options)


@needs_compiler
def test_a_step_that_fails_takes_its_streams_only(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue breaks once: those who waited for it hear of it, and the backend serves on."""
    ours = make_backend(demo_bundle, [560], HostDevice())
    wait, broken = HostDevice.drain, [False]

    def drain(device: HostDevice) -> None:
        wait(device)
        if broken[0]:
            broken[0] = False
            raise BackendError("the GPU failed in a step.")

    monkeypatch.setattr(HostDevice, "drain", drain)
    with nemostream.Model(demo_bundle, ours) as model:
        wanted = model.transcribe(nemostream.demo_clip()).text
        with pytest.raises(BackendError, match="failed in a step"), model.stream() as stream:
            broken[0] = True
            stream.push(np.zeros(16000, np.float32))
        assert model.transcribe(nemostream.demo_clip()).text == wanted
