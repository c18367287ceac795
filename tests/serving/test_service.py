"""The rules of the service: admission, load, degradation, failures, shutdown and metrics, with a controlled clock."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nemostream
from nemostream.errors import AudioError, BackendError, CapacityError, NemostreamError, OptionError
from nemostream.runtime.text.endpointing import Endpoint
from nemostream.serving import errors, service
from nemostream.serving.client import Client, shorten
from nemostream.serving.errors import (
    Draining,
    Expired,
    StateConflict,
    StateError,
    StateNotFound,
    StateStoreError,
    StateSuperseded,
    status_of,
)
from nemostream.serving.metrics import Metrics
from nemostream.serving.settings import Settings
from nemostream.serving.uploads.admission import UploadAdmission

ONE, TWO = Client("one", "192.0.2.1"), Client("two", "192.0.2.2")


# -- start -------------------------------------------------------------------------------------------------------------


def test_the_model_is_loaded_with_the_settings(fakes: Any, model: Any, tmp_path: Path) -> None:
    fakes.start(
        model,
        bundle=tmp_path,
        chunk_ms=160,
        max_streams=7,
        max_uploads=3,
        threads=5,
        device="cuda",
        precision="fp16",
        max_batch=6,
        engines=tmp_path / "engines",
    )
    assert model.loaded_with == (
        (tmp_path, 160),
        {
            "capacity": 7 + 3 + 16,
            "threads": 5,
            "device": "cuda",
            "precision": "fp16",
            "max_batch": 6,
            "engines": tmp_path / "engines",
        },
    )


def test_warm_up_runs_one_step(model: Any) -> None:
    for ms, samples in ((80, 1280), (1120, 17920)):
        service.warm_up(model, ms)
        stream = model.streams[-1]
        assert (stream.options, stream.sample_rate, stream.channels) == ({"chunk_ms": ms}, 16000, 1)
        pushed = [call for call in stream.calls if isinstance(call, np.ndarray)]
        assert [len(pcm) for pcm in pushed] == [samples] and not stream.pushed.any()
        assert stream.closed == 1
    model.error = BackendError("no.")
    with pytest.raises(BackendError):
        service.warm_up(model, 80)
    assert model.streams[-1].closed == 1


@pytest.mark.parametrize(
    ("rate", "admitted"),
    [(20.0, 10), (21.9, 10), (22.0, 11), (1.0, 1), (0.1, 1), (198.0, 99), (200.0, 100), (1e6, 100)],
)
def test_half_of_the_measured_throughput_is_admitted(
    fakes: Any,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rate: float,
    admitted: int,
) -> None:
    caplog.set_level("INFO")
    measured: list[Any] = []

    def measure(*arguments: Any, **options: Any) -> float:
        measured.append((arguments, options))
        return rate

    monkeypatch.setattr(service, "measure_throughput", measure)
    here = fakes.start(model, measure=True, max_streams=100, max_batch=40, chunk_ms=80)
    assert measured == [((model, 80, 40), {"clock": here.clock})]
    assert here.max_streams == here.describe()["max_streams"] == fakes.metric(here, "max_streams") == admitted
    (ready,) = fakes.records(caplog, "ready")
    assert (ready.max_streams, ready.measured_streams) == (admitted, round(rate))


def test_the_time_until_the_model_is_ready_is_logged(
    fakes: Any, model: Any, clock: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def warm_up(model: Any, chunk_ms: int) -> None:
        clock.now += 2

    caplog.set_level("INFO")
    monkeypatch.setattr(service, "warm_up", warm_up)
    clock.now = 100.0
    fakes.start(model, clock, chunks=[80, 560])
    (ready,) = fakes.records(caplog, "ready")
    assert ready.load_seconds == 4.0


def test_throughput_is_that_of_the_best_step_after_the_first(fakes: Any, model: Any) -> None:
    """Five streams of 560 ms in steps of 0.05, 0.4, 0.2 and 0.25 s: 14 seconds of audio per second."""
    now = [100.0]
    durations = {1: 0.05, 2: 0.4, 3: 0.2, 4: 0.25}
    steps: dict[int, int] = {}

    class Stream(fakes.FakeStream):  # type: ignore[misc, name-defined]
        async def push(self, pcm: Any) -> list[Any]:
            assert len(pcm) == 8960 and pcm.dtype == np.float32 and 0.01 < pcm.std() < 0.1
            self.steps += 1
            if self is model.streams[0]:
                now[0] += durations[self.steps]
            steps[self.steps] = steps.get(self.steps, 0) + 1
            return []

    def astream(**options: Any) -> Any:
        assert options == {"sample_rate": 16000, "chunk_ms": 560}
        model.streams.append(Stream(model, 16000, 1, options))
        return model.streams[-1]

    model.astream = astream
    rate = service.measure_throughput(model, 560, 5, clock=lambda: now[0])
    assert rate == pytest.approx(5 * 0.56 / 0.2) and steps == dict.fromkeys(durations, 5)
    assert [stream.closed for stream in model.streams] == [1] * 5


def test_streams_are_closed_if_the_measurement_fails(model: Any) -> None:
    model.error = BackendError("no.")
    with pytest.raises(BackendError):
        service.measure_throughput(model, 560, 3)
    assert [stream.closed for stream in model.streams] == [1] * 3


def test_chunk_sizes_are_sorted_and_must_be_those_of_the_model(fakes: Any, model: Any) -> None:
    assert fakes.start(model).chunks == (80, 160, 560, 1120)
    assert fakes.start(model, chunks=[560, 80], chunk_ms=80).chunks == (80, 560)
    assert model.closed == 0
    with pytest.raises(OptionError, match=r"no chunk size of 100 ms, only \[80, 160, 560, 1120\]"):
        fakes.start(model, chunks=[80, 100])
    with pytest.raises(OptionError, match=r"chunk_ms is 560; it must be one of the chunks \(80, 160\)"):
        fakes.start(model, chunks=[80, 160])
    with pytest.raises(OptionError, match="language is 'xx'"):
        fakes.start(model, language="xx")
    assert model.closed == 3  # a model whose start fails is released


def test_states_of_a_service(fakes: Any, model: Any, clock: Any) -> None:
    here = service.Service(Settings(max_streams=9), clock)
    assert here.describe() == {"status": "starting", "streams": 0, "max_streams": 9, "uploads": 0}
    with pytest.raises(Draining, match="still starting"):
        _ = here.model
    here = fakes.start(model, clock, max_streams=9, chunks=[560, 80], language="EN", bundle=Path("/nowhere"))
    for upload in (False, True):
        here.open("test", upload=upload)
    state = {
        "status": "ready",
        "streams": 1,
        "max_streams": 9,
        "uploads": 0,
        "model": "demo",
        "chunks_ms": [80, 560],
        "chunk_ms": 560,
        "final_chunk_ms": None,
        "languages": ["en"],
        "language": "en",
        "demo": False,
    }
    assert here.describe() == state
    with here.uploads.admit(1, ONE):
        assert here.describe() == state | {"uploads": 1}
    decoders = here.decoders
    assert here.decoders is decoders and (decoders.rate, decoders.max_seconds) == (16000, 7200)
    closed: list[str] = []
    here._normalizer.close = lambda: closed.append("normalizer")
    decoders.close = lambda: closed.append("decoders")  # type: ignore[method-assign]
    here.close()
    assert here.describe()["status"] == "draining" and model.closed == 1
    assert sorted(closed) == ["decoders", "normalizer"]


def test_only_the_packaged_bundle_is_the_demo(fakes: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for bundle in (None, nemostream.demo_bundle()):
        demo = fakes.start(model, bundle=bundle)
        assert demo.demo and demo.describe()["note"] == service.DEMO_NOTE
    other = fakes.start(model, bundle=Path("/nowhere"))
    assert not other.demo

    def missing() -> Path:
        raise nemostream.BundleError("this installation has no demo model.")

    monkeypatch.setattr(nemostream, "demo_bundle", missing)
    assert not other.demo


# -- admission ---------------------------------------------------------------------------------------------------------


def test_options_of_a_stream(fakes: Any, model: Any, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "find_spec", lambda name: name)
    here = fakes.start(model, clock, endpoint_ms=900)
    session = here.open(
        "test",
        sample_rate=8000,
        channels=2,
        encoding="alaw",
        chunk_ms=160,
        language="en-GB",
        endpoint_ms=1234,
        endpoint_model=False,
        max_utterance_ms=5678,
        decoder="reset",
        phrases="phrases",  # type: ignore[arg-type]
        vad=True,
        client=ONE,
    )
    (stream,) = model.streams
    assert (stream.sample_rate, stream.channels) == (8000, 2)
    assert stream.options == {
        "chunk_ms": 160,
        "final_chunk_ms": None,
        "endpoint": Endpoint(1234, 5678, "reset", False),
        "phrases": "phrases",
        "vad": True,
        "language": "en",
    }
    assert (session.transport, session.client, session.requested_ms, session.upload) == ("test", ONE, 160, False)
    assert not session.itn and here.open("test", normalizer=here._normalizer).itn
    here.open("test")
    assert model.streams[-1].options == {
        "chunk_ms": 560,
        "final_chunk_ms": None,
        "endpoint": Endpoint(900, 300_000, "keep", True),
        "phrases": None,
        "vad": False,
        "language": "en",
    }
    assert (model.streams[-1].sample_rate, model.streams[-1].channels) == (16000, 1)


@pytest.mark.parametrize(
    ("endpoint_ms", "silence_ms"),
    [(0, 800), (None, None), (80, 80), (60_000, 60_000), (79, "79"), (60_001, "60001"), (-1, "-1")],
)
def test_silence_that_ends_an_utterance(fakes: Any, model: Any, endpoint_ms: Any, silence_ms: Any) -> None:
    here = fakes.start(model)
    if isinstance(silence_ms, str):
        with pytest.raises(OptionError, match=f"endpoint_ms is {silence_ms}; it must be from 80 to 60000"):
            here.open("test", endpoint_ms=endpoint_ms)
        assert not model.streams and fakes.metric(here, "streams_rejected_total", reason="OptionError") == 1
    else:
        here.open("test", endpoint_ms=endpoint_ms)
        assert model.streams[0].options["endpoint"].silence_ms == silence_ms


def test_vad_needs_its_extra(fakes: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here = fakes.start(model)
    monkeypatch.setattr(service, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match="lacks the vad extra"):
        here.open("test", vad=True)
    here.open("test").close()


def test_admission_counts_live_streams(fakes: Any, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    here = fakes.start(model, max_streams=2)
    first, _ = here.open("a", client=ONE), here.open("b", client=ONE)
    uploads = [here.open("a", upload=True, client=ONE) for _ in range(3)]  # admitted by `UploadAdmission`
    assert here.streams == 2 and len(here.sessions) == 5
    for _ in range(2):
        with pytest.raises(CapacityError, match="all 2 streams are in use"):
            here.open("c", client=TWO)
    assert fakes.metric(here, "streams_rejected_total", reason="CapacityError") == 2
    assert len(model.streams) == 5  # a rejected stream takes no slot
    first.close()
    uploads[0].close()
    here.open("c", client=TWO)
    counts = {kind: fakes.metric(here, "streams", transport=kind) for kind in "abc"}
    assert counts == {"a": 2, "b": 1, "c": 1}
    opened = {kind: fakes.metric(here, "streams_opened_total", transport=kind) for kind in "abc"}
    assert opened == {"a": 4, "b": 1, "c": 1}
    rejected = fakes.records(caplog, "stream rejected")
    assert [(one.transport, one.peer) for one in rejected] == [("c", "192.0.2.2")] * 2
    assert "all 2 streams" in rejected[0].reason
    last = fakes.records(caplog, "stream opened")[-1]
    assert (last.transport, last.chunk_ms, last.language, last.sample_rate, last.channels, last.peer) == (
        "c",
        560,
        "en",
        16000,
        1,
        "192.0.2.2",
    )


def test_admission_per_client(fakes: Any, model: Any) -> None:
    here = fakes.start(model, max_streams_per_client=2)
    sessions = [here.open("test", client=ONE) for _ in range(2)]
    here.open("test", upload=True, client=ONE)
    here.open("test", upload=True, client=ONE).close()
    with pytest.raises(CapacityError, match="this client has 2 open streams"):
        here.open("test", client=ONE)
    here.open("test", client=TWO)
    sessions[0].close()
    sessions[0].close()  # counts once
    sessions.append(here.open("test", client=ONE))
    with pytest.raises(CapacityError):
        here.open("test", client=ONE)
    for session in sessions:
        session.close()
    assert set(here._clients) == {"two"}  # clients without streams are forgotten
    unlimited = fakes.start(model)
    for _ in range(5):
        unlimited.open("test", client=ONE)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(Draining("no."), "Draining"), (OptionError("no."), "OptionError"), (BackendError("no."), "BackendError")],
)
def test_a_stream_that_cannot_be_opened_is_not_counted(fakes: Any, model: Any, error: Any, reason: str) -> None:
    here = fakes.start(model, max_streams=1, max_streams_per_client=1)
    model.open_error = error
    for _ in range(3):
        with pytest.raises(type(error)):
            here.open("test")
    assert fakes.metric(here, "streams_rejected_total", reason=reason) == 3 and not here.sessions
    assert fakes.metric(here, "streams_opened_total", transport="test") is None
    model.open_error = None
    here.open("test")


def test_a_stopping_service_rejects_every_stream(fakes: Any, model: Any, clock: Any) -> None:
    here = fakes.start(model, clock)
    fakes.run(clock, here.drain())
    for upload in (False, True):
        with pytest.raises(Draining, match="is stopping"):
            here.open("test", upload=upload)
    assert fakes.metric(here, "streams_rejected_total", reason="Draining") == 2 and not model.streams


def test_closed_sessions_are_counted_once(fakes: Any, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    here = fakes.start(model)
    failed, good = here.open("test", client=ONE), here.open("test", client=TWO)
    failed.audio, good.audio = 1.23456, 2.0
    for _ in range(2):
        failed.close("the reason")
        good.close()
        failed.close("another reason")
        here.session_closed(failed)
    assert fakes.metric(here, "streams_failed_total", transport="test") == 1
    assert fakes.metric(here, "streams", transport="test") == 0
    assert fakes.metric(here, "streams_opened_total", transport="test") == 2
    assert failed.error == "the reason" and good.error is None
    closed = [(one.stream, one.audio_seconds, one.error, one.peer) for one in fakes.records(caplog, "stream closed")]
    assert closed == [(failed.id, 1.23, "the reason", "192.0.2.1"), (good.id, 2.0, None, "192.0.2.2")]
    assert [stream.closed > 0 for stream in model.streams] == [True, True]


# -- options of open streams -------------------------------------------------------------------------------------------


def test_configure_changes_everything_or_nothing(
    fakes: Any, model: Any, languages_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = fakes.start(fakes.FakeModel(languages_bundle), language="de")
    session, written = here.open("test"), here.open("test", normalizer=here._normalizer)
    stream, written_stream = session._stream, written._stream
    assert stream.options["language"] == "de-DE" and here.describe()["language"] == "de-DE"
    here.open("test", language="AR").close()
    assert here.model.streams[-1].options["language"] == "ar-AR"
    for options, word in (
        ({"chunk_ms": 100, "language": "ar"}, "chunk_ms is 100; it must be one of 80, 160, 560, 1120"),
        ({"chunk_ms": 80, "language": "fr"}, "'fr'"),
        ({"chunk_ms": True}, "chunk_ms is True"),
    ):
        with pytest.raises(OptionError, match=word):
            here.configure(session, **options)
    monkeypatch.setattr("nemostream.runtime.text.itn.LANGUAGES", ("en", "de"))
    with pytest.raises(OptionError, match="inverse text normalization"):
        here.configure(written, chunk_ms=80, language="ar")
    assert stream.calls == written_stream.calls == [] and session.requested_ms == written.requested_ms == 560
    here.configure(session, chunk_ms=80)
    here.configure(session, language="ar")
    here.configure(written, chunk_ms=1120, language="en")
    assert stream.calls == [("chunk_ms", 80), ("language", "ar-AR")] and session.requested_ms == 80
    assert written_stream.calls == [("language", "en-US"), ("chunk_ms", 1120)] and written.requested_ms == 1120
    assert here.check_language(None) == "de-DE" and here.check_language("AR") == "ar-AR"


def test_phrases_are_compiled_for_two_clients_at_a_time(
    fakes: Any, model: Any, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = fakes.start(model, clock)
    peak = running = 0

    async def in_a_second(function: Any, *arguments: Any) -> Any:
        nonlocal peak, running
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(1)
        running -= 1
        return function(*arguments)

    async def main() -> list[Any]:
        return await asyncio.gather(*(here.compile_phrases(phrases) for phrases in (["a"], ["b"], ["c"], None)))

    monkeypatch.setattr(asyncio, "to_thread", in_a_second)
    assert fakes.run(clock, main()) == [*(("compiled", [name]) for name in "abc"), None]
    assert peak == 2 and clock() == 2.0


def test_inverse_text_normalization_is_loaded_for_the_language(
    fakes: Any, languages_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = fakes.start(fakes.FakeModel(languages_bundle), language="de")
    started: list[str] = []
    assert here._normalizer._clock is here.clock

    async def start(language: str) -> None:
        started.append(language)

    monkeypatch.setattr(here._normalizer, "start", start)
    monkeypatch.setattr(service, "find_spec", lambda name: name == "nemo_text_processing" or None)
    assert asyncio.run(here.normalizer(False, "fr")) is None and not started
    for language, name in ((None, "de-DE"), ("ar", "ar-AR")):
        assert asyncio.run(here.normalizer(True, language)) is here._normalizer
        assert started.pop() == name
    monkeypatch.setattr(service, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match="lacks the itn extra"):
        asyncio.run(here.normalizer(True))


# -- load --------------------------------------------------------------------------------------------------------------


def seconds_of(here: Any, *latencies: float) -> list[int]:
    """Return the degradation level after each second."""
    levels = []
    for latency in latencies:
        here.update_load(latency)
        levels.append(here.degradation_level)
    return levels


def test_three_late_seconds_are_an_overload(fakes: Any, model: Any) -> None:
    here = fakes.start(model)
    history = [(0.81, False), (9.0, False), (0.81, True), (0.81, True), (0.8, False), (2, False), (2, False), (2, True)]
    for latency, overloaded in history:
        here.update_load(latency)
        assert here.overloaded is overloaded, latency
    with pytest.raises(CapacityError, match="results are late"):
        here.open("test")
    here.open("test", upload=True)
    assert here.degradation_level == 0
    here.update_load(0.8)
    here.open("test")


def test_recordings_wait_after_one_late_second(fakes: Any, model: Any) -> None:
    here = fakes.start(model)
    assert not here.is_late
    here.update_load(0.81)
    here.open("test", upload=True)
    assert not here.is_late  # no live stream is delayed
    live = here.open("test")
    assert here.is_late
    for latency, late in ((0.8, False), (0.5, False), (1.0, True), (0.0, False)):
        here.update_load(latency)
        assert here.is_late is late, latency
    here.update_load(1.0)
    live.close()
    assert not here.is_late


def test_levels_rise_every_three_late_seconds(fakes: Any, model: Any) -> None:
    here = fakes.start(model, degrade=True)
    assert seconds_of(here, *[0.8] * 10) == [0] * 10
    assert seconds_of(here, 0.81, 0.81, 0.5, 0.81, 0.81, 0.81) == [0] * 5 + [1]
    assert seconds_of(here, *[0.81] * 9) == [1, 1, 2, 2, 2, 3, 3, 3, 3]  # the model has four chunk sizes
    assert seconds_of(here, *[5.0] * 20) == [3] * 20 and fakes.metric(here, "degradation_level") == 3


def test_levels_fall_after_ten_early_seconds(fakes: Any, model: Any) -> None:
    here = fakes.start(model, degrade=True)
    seconds_of(here, *[2.0] * 9)
    assert seconds_of(here, *[0.29] * 9, 0.3, *[0.29] * 9) == [3] * 19
    assert seconds_of(here, *[0.29] * 21) == [2, *[2] * 9, 1, *[1] * 9, 0]
    assert fakes.metric(here, "degradation_level") == 0
    assert seconds_of(here, *[0.0] * 30) == [0] * 30


def test_seconds_of_the_previous_level_do_not_count(fakes: Any, model: Any) -> None:
    here = fakes.start(model, degrade=True)
    seconds_of(here, *[0.1] * 9)
    assert seconds_of(here, 2.0, 2.0, 2.0) == [0, 0, 1]
    assert not here.overloaded  # streams are admitted at the new level until three more seconds are late
    here.open("test")
    assert seconds_of(here, 2.0, 2.0, *[0.1] * 10) == [1, 1, *[1] * 9, 0]


def test_open_streams_move_to_the_chunk_size_of_the_level(
    fakes: Any, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    here = fakes.start(model, degrade=True, chunks=[80, 560, 1120])
    sessions = {ms: here.open("test", chunk_ms=ms) for ms in (80, 560, 1120)}
    streams = {ms: session._stream for ms, session in sessions.items()}
    table = {0: {80: 80, 560: 560, 1120: 1120}, 1: {80: 560, 560: 1120, 1120: 1120}, 2: dict.fromkeys(streams, 1120)}

    def check(level: int) -> None:
        assert here.degradation_level == level == fakes.metric(here, "degradation_level")
        assert {ms: stream.calls.pop() for ms, stream in streams.items()} == {
            ms: ("chunk_ms", effective) for ms, effective in table[level].items()
        }
        for ms, effective in table[level].items():
            assert here.effective_chunk_ms(ms) == effective
            late = here.open("test", chunk_ms=ms)
            assert model.streams[-1].options["chunk_ms"] == effective and late.requested_ms == ms
            late.close()

    for level, latencies in ((1, [2.0] * 3), (2, [2.0] * 3), (1, [0.1] * 10), (0, [0.1] * 10)):
        seconds_of(here, *latencies)
        check(level)
    assert [one.degradation_level for one in fakes.records(caplog, "chunk sizes changed")] == [1, 2, 1, 0]
    seconds_of(here, *[2.0] * 3)
    here.configure(sessions[560], chunk_ms=80)
    assert streams[560].calls[-1] == ("chunk_ms", 560)
    seconds_of(here, *[2.0] * 3)
    assert streams[560].calls[-1] == ("chunk_ms", 1120) and sessions[560].requested_ms == 80


def test_load_of_each_second(fakes: Any, model: Any, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 90th percentile of the latencies, in chunks, and the step time per second of audio."""
    here = fakes.start(model, clock)
    chunk = model.manifest.chunk(160)
    loads: list[tuple[float, float]] = []
    monkeypatch.setattr(here, "update_load", lambda latency: loads.append((clock(), latency)))
    factors = []

    async def main() -> None:
        here.record_audio(100.0)  # before the first second
        monitoring = asyncio.create_task(here.monitor())
        await asyncio.sleep(0.5)
        for latencies, audio, steps in (
            ([0.3], 2.0, [0.2, 0.1]),
            ([0.05 * number for number in (7, 3, 20, 1, 19, *range(4, 7), 2, *range(8, 19))], 4.0, [0.5]),
            ([5.0, 1.0, 2.0, 4.0, 3.0, 6.0, 9.0, 8.0, 7.0, 10.0], 0.5, []),
            ([], 0.0, [0.7]),
            ([], 1.0, [0.25]),
        ):
            for latency in latencies:
                here.record_latency(160, 2 * latency, 2.0)
            here.record_audio(audio)
            for step in steps:
                model.on_step(chunk, 3, step)
            await asyncio.sleep(1)
            factors.append(fakes.metric(here, "real_time_factor"))
        monitoring.cancel()

    fakes.run(clock, main())
    assert loads == [(1.0, 0.3), (2.0, pytest.approx(0.95)), (3.0, 10.0), (4.0, 0.0), (5.0, 0.0)]
    assert factors == [pytest.approx(0.15), 0.125, 0.0, 0.0, 0.25]


def test_steps_of_two_threads_are_added(fakes: Any, model: Any, clock: Any) -> None:
    """The step time of a second is complete if another thread records a step meanwhile."""
    here, chunk = fakes.start(model, clock), model.manifest.chunk(80)
    threads: list[threading.Thread] = []
    lock, waits_or_done = threading.Lock(), threading.Event()

    class Lock:
        def __enter__(self) -> None:
            if threading.current_thread() in threads:
                waits_or_done.set()
            lock.acquire()

        def __exit__(self, *error: Any) -> None:
            lock.release()

    def other_step() -> None:
        model.on_step(chunk, 1, 1.0)
        waits_or_done.set()

    class Seconds(float):
        def __add__(self, other: float) -> float:  # between reading and writing the sum
            threads.append(threading.Thread(target=other_step))
            threads[-1].start()
            assert waits_or_done.wait(10)
            return float(other) + float(self)

        __radd__ = __add__

    here._lock = Lock()
    here.metrics.steps = mock.Mock()

    async def main() -> None:
        monitoring = asyncio.create_task(here.monitor())
        await asyncio.sleep(0.5)
        here.record_audio(2.0)
        model.on_step(chunk, 1, Seconds(0.5))
        (thread,) = threads
        thread.join()
        await asyncio.sleep(1)
        monitoring.cancel()

    fakes.run(clock, main())
    assert fakes.metric(here, "real_time_factor") == 0.75


def test_memory_is_trimmed_every_15_seconds(
    fakes: Any, model: Any, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def immediately(function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    trimmed: list[float] = []
    monkeypatch.setattr(asyncio, "to_thread", immediately)
    monkeypatch.setattr(service.Trimmer, "trim", lambda trimmer, streams: trimmed.append(clock()))
    here = fakes.start(model, clock)

    async def main() -> None:
        monitoring = asyncio.create_task(here.monitor())
        await asyncio.sleep(46.5)
        monitoring.cancel()

    fakes.run(clock, main())
    assert trimmed == [15.0, 30.0, 45.0]


# -- accurate lanes ----------------------------------------------------------------------------------------------------


def lanes_of(here: Any) -> list[tuple[int, int | None]]:
    """Return the chunk sizes that the streams have, in the order of their opening."""
    return [(stream.chunk_ms, stream.final_chunk_ms) for stream in here.model.streams]


def test_chunk_size_of_finals(fakes: Any, model: Any) -> None:
    here = fakes.start(model, chunk_ms=80, final_chunk_ms=560)
    assert here.describe()["final_chunk_ms"] == 560
    for options in ({}, {"final_chunk_ms": 1120}, {"final_chunk_ms": 0}, {"chunk_ms": 160}, {"chunk_ms": 560}):
        here.open("test", **options)
    assert lanes_of(here) == [(80, 560), (80, 1120), (80, None), (160, 560), (560, None)]
    assert here.accurate_streams == 4  # the last one gets its lane if its chunks become smaller
    for value, message in (
        (80, "final_chunk_ms is 80; with chunk_ms 80 it must be one of 160, 560, 1120, 0"),
        (100, "final_chunk_ms is 100"),
        (True, "final_chunk_ms is True"),
        (-1, "final_chunk_ms is -1"),
    ):
        with pytest.raises(OptionError, match=message):
            here.open("test", final_chunk_ms=value)
    with pytest.raises(OptionError, match="with chunk_ms 1120 it must be one of 0"):
        here.open("test", chunk_ms=1120, final_chunk_ms=560)


def test_recordings_have_the_chunk_size_of_finals_only(fakes: Any, model: Any) -> None:
    here = fakes.start(model, chunk_ms=80, final_chunk_ms=560)
    for options in ({}, {"final_chunk_ms": 1120}, {"final_chunk_ms": 0}, {"chunk_ms": 160}):
        here.open("test", upload=True, **options)
    here.open("test", upload=True, chunk_ms=160, final_chunk_ms=1120)
    assert lanes_of(here) == [(560, None), (1120, None), (80, None), (160, None), (1120, None)]
    assert here.accurate_streams == 0


def test_the_default_of_finals_must_be_larger(fakes: Any, model: Any) -> None:
    for final_ms, chunks in ((560, []), (80, []), (1120, [80, 560]), (100, [])):
        with pytest.raises(OptionError, match=f"final_chunk_ms is {final_ms}; it must be one of the chunks larger"):
            fakes.start(model, chunk_ms=560, final_chunk_ms=final_ms, chunks=chunks)


def test_a_stream_with_an_accurate_lane_takes_two_slots(fakes: Any, model: Any) -> None:
    here = fakes.start(model, max_streams=35, chunk_ms=80)
    sessions = [here.open("test", final_chunk_ms=560) for _ in range(16)]  # and one reserved slot
    with pytest.raises(CapacityError, match="all 35 slots are in use or reserved"):
        here.open("test", final_chunk_ms=560)
    plain = [here.open("test") for _ in range(2)]
    with pytest.raises(CapacityError, match="all 35 slots"):
        here.open("test")
    with pytest.raises(CapacityError, match="all 35 slots"):
        here.configure(plain[0], chunk_ms=160, final_chunk_ms=560)
    assert plain[0].requested_ms == 80 and not plain[0]._stream.calls  # nothing is changed
    here.configure(sessions[0], final_chunk_ms=0)
    here.open("test")
    sessions[1].close()
    here.configure(sessions[0], final_chunk_ms=1120)
    here.open("test")
    with pytest.raises(CapacityError, match="all 35 slots"):
        here.open("test")


@pytest.mark.parametrize("count", [1, 16, 17, 40])
def test_the_maximum_number_of_streams_fits_with_accurate_lanes(fakes: Any, model: Any, count: int) -> None:
    """The scheduler has slots for all of them, their lanes and, for every 16, a branch; besides recordings."""
    here = fakes.start(model, max_streams=count, chunk_ms=80, final_chunk_ms=560, max_uploads=3)
    capacity = model.loaded_with[1]["capacity"]
    for _ in range(count):
        here.open("test")
    with pytest.raises(CapacityError, match=f"all {count} streams are in use"):
        here.open("test")
    assert capacity == 2 * count + -(-count // 16) + 3 + 16
    with nemostream.load(chunk_ms=80, capacity=capacity - 3 - 16) as real:
        streams = [real.stream(final_chunk_ms=560) for _ in range(count)]
        with pytest.raises(CapacityError):
            real.stream(final_chunk_ms=560)
        for stream in streams:
            stream.close()


def test_both_chunk_sizes_are_measured(fakes: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {80: 60.0, 560: 120.0}  # a second of audio takes 1/60 and 1/120 s
    monkeypatch.setattr(service, "measure_throughput", lambda model, ms, streams, clock: rates[ms])
    here = fakes.start(model, measure=True, chunk_ms=80, final_chunk_ms=560)
    assert here.max_streams == 20
    assert fakes.start(model, measure=True, chunk_ms=80).max_streams == 30


def test_accurate_lanes_are_disabled_first(fakes: Any, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    here = fakes.start(model, chunk_ms=80, degrade=True)
    here.open("test", final_chunk_ms=1120)
    here.open("test")
    seconds_of(here, 2.0, 2.0)
    assert lanes_of(here) == [(80, 1120), (80, None)]
    seconds_of(here, 2.0)
    assert lanes_of(here) == [(80, None), (80, None)] and not here.overloaded  # streams are admitted, without lanes
    late = here.open("test", final_chunk_ms=560)
    assert lanes_of(here)[-1] == (80, None) and late.requested_final_ms == 560
    here.configure(late, final_chunk_ms=1120)
    assert lanes_of(here)[-1] == (80, None) and fakes.metric(here, "lanes_shed_total") == 2
    seconds_of(here, 2.0, 2.0)
    assert [size for size, _ in lanes_of(here)] == [80] * 3
    seconds_of(here, 2.0)
    assert lanes_of(here) == [(160, None)] * 3 and here.degradation_level == 1
    seconds_of(here, *[0.1] * 10)
    assert lanes_of(here) == [(80, None)] * 3
    seconds_of(here, *[0.1] * 9)
    assert lanes_of(here) == [(80, None)] * 3
    seconds_of(here, 0.1)
    assert lanes_of(here) == [(80, 1120), (80, None), (80, 1120)]
    assert fakes.metric(here, "lanes_shed_total") == 2
    changes = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert changes == ["accurate lanes disabled", *["chunk sizes changed"] * 2, "accurate lanes enabled"]


def test_streams_are_rejected_after_accurate_lanes_were_disabled(fakes: Any, model: Any) -> None:
    here = fakes.start(model, chunk_ms=80)
    here.open("test", final_chunk_ms=1120)
    for _ in range(3):
        assert not here.overloaded
        here.update_load(2.0)
    here.open("test")
    for _ in range(3):
        assert not here.overloaded
        here.update_load(2.0)
    with pytest.raises(CapacityError, match="results are late"):
        here.open("test")


def test_an_accurate_lane_is_opened_again(fakes: Any, model: Any) -> None:
    """If it failed, or if a stream that is ending still had the slot."""
    here = fakes.start(model, chunk_ms=80)
    here.open("test", final_chunk_ms=560)
    (stream,) = model.streams
    stream.final_chunk_ms, model.lane_error = None, CapacityError("no slot.")
    here.update_load(0.1)
    assert stream.final_chunk_ms is None and not stream.calls
    model.lane_error = None
    here.update_load(0.1)
    assert stream.final_chunk_ms == 560 and fakes.metric(here, "lanes_shed_total") == 0


def test_an_accurate_lane_is_not_changed_while_a_thread_accepts_audio(fakes: Any, model: Any) -> None:
    here = fakes.start(model, chunk_ms=80)
    session = here.open("test")
    (stream,) = model.streams
    stream.feeding = True
    here.configure(session, final_chunk_ms=560)
    here.update_load(0.1)
    assert stream.final_chunk_ms is None and session.requested_final_ms == 560
    stream.feeding = False
    here.update_load(0.1)
    assert stream.final_chunk_ms == 560


def test_larger_chunks_than_those_of_finals_disable_the_lane(fakes: Any, model: Any) -> None:
    here = fakes.start(model, chunk_ms=80, final_chunk_ms=560)
    session = here.open("test")
    for chunk_ms, final_ms in ((1120, None), (160, 560), (560, None), (80, 560)):
        here.configure(session, chunk_ms=chunk_ms)
        assert lanes_of(here) == [(chunk_ms, final_ms)]
    with pytest.raises(OptionError, match="final_chunk_ms is 160; with chunk_ms 560"):
        here.configure(session, chunk_ms=560, final_chunk_ms=160)
    assert lanes_of(here) == [(80, 560)]
    session.close()
    here.update_load(0.1)  # a session that ended is not changed


def test_finals_of_the_small_chunks_are_counted(fakes: Any, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    here = fakes.start(model, chunk_ms=80, final_chunk_ms=560)
    model.on_fallback(BackendError("the step failed."))
    assert fakes.metric(here, "final_fallbacks_total") == 1
    (record,) = fakes.records(caplog, "final of the small chunks")
    assert record.reason == "the step failed."


# -- failures of the engine --------------------------------------------------------------------------------------------


def test_five_failures_in_a_row_need_a_restart(fakes: Any, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    here = fakes.start(model)
    chunk, error = model.manifest.chunk(80), RuntimeError("the step failed.")

    def fail(times: int) -> str:
        for _ in range(times):
            model.on_failure(error)
        return str(here.state)

    assert fail(4) == "ready"
    model.on_step(chunk, 1, 0.1)  # a successful step
    assert fail(4) == "ready" and not fakes.records(caplog, "engine failed")
    assert fail(1) == "failed" and fail(3) == "failed"
    (record,) = fakes.records(caplog, "engine failed")
    assert (record.failures, record.reason) == (5, "the step failed.")
    model.on_step(chunk, 1, 0.1)
    assert here.state == "ready" and fail(4) == "ready" and fail(1) == "failed"
    here.close()
    assert here.state == "draining"
    model.on_step(chunk, 1, 0.1)
    assert here.state == "draining" and fail(9) == "draining"


# -- shutdown ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upload", [False, True])
def test_draining_waits_for_the_last_session(
    fakes: Any, model: Any, clock: Any, caplog: pytest.LogCaptureFixture, upload: bool
) -> None:
    caplog.set_level("INFO")
    here = fakes.start(model, clock, drain_seconds=60)
    times = []

    async def main() -> None:
        early = here.open("test")
        early.close()
        first, second = here.open("test"), here.open("test", upload=upload)
        draining = asyncio.create_task(here.drain())
        await asyncio.sleep(3)
        assert here.state == "draining"
        first.close()
        await asyncio.sleep(4)
        assert not draining.done()
        second.close()
        await draining
        times.append(clock())

    fakes.run(clock, main())
    assert times == [7.0] and [one.streams for one in fakes.records(caplog, "draining")] == [2]


def test_draining_has_a_time_limit(fakes: Any, model: Any, clock: Any) -> None:
    here = fakes.start(model, clock, drain_seconds=12)
    here.open("test")
    fakes.run(clock, here.drain())
    assert clock() == 12.0 and here.state == "draining"
    idle = fakes.start(model, clock)
    fakes.run(clock, idle.drain())
    assert clock() == 12.0


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_of_steps_and_results(fakes: Any, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    here = fakes.start(model, device="cpu")
    info = {"version": nemostream.__version__, "model": "demo", "device": "cpu", "transports": "0"}
    assert fakes.metric(here, "info", **info) == 1
    assert abs(fakes.metric(here, "start_time_seconds") - time.time()) < 3600
    for rows, seconds in ((1, 0.05), (5, 0.3)):
        model.on_step(model.manifest.chunk(80), rows, seconds)
    model.waiting = 7
    model.on_step(model.manifest.chunk(560), 2, 0.5)
    assert fakes.metric(here, "step_waiting_streams_sum") == 7
    assert fakes.metric(here, "step_waiting_streams_bucket", le="0.0") == 2
    assert fakes.metric(here, "step_failures_total") == 0
    model.on_failure(RuntimeError("the step failed."))
    assert fakes.metric(here, "step_failures_total") == 1
    assert fakes.metric(here, "step_seconds_count", chunk_ms="80") == 2
    assert fakes.metric(here, "step_seconds_sum", chunk_ms="80") == pytest.approx(0.35)
    assert fakes.metric(here, "step_seconds_sum", chunk_ms="560") == 0.5
    assert fakes.metric(here, "step_streams_sum") == 8 and fakes.metric(here, "step_streams_count") == 3
    here.record_latency(80, 0.25, 0.08)
    here.record_latency(560, 0.5, 0.56)
    assert fakes.metric(here, "latency_seconds_sum", chunk_ms="80") == 0.25
    assert fakes.metric(here, "latency_seconds_sum", chunk_ms="560") == 0.5
    for seconds in (0.5, 0.25):
        here.record_audio(seconds)
    assert fakes.metric(here, "audio_seconds_total") == 0.75
    session, event = here.open("test", client=ONE), fakes.event("final", "secret words", 3)
    caplog.set_level("INFO")
    here.record_utterance(session, event)
    assert not fakes.records(caplog, "utterance")
    here.settings.log_transcripts = True
    here.record_utterance(session, event)
    assert fakes.metric(here, "utterances_total") == 2
    (record,) = fakes.records(caplog, "utterance")
    assert (record.stream, record.utterance, record.text, record.peer) == (session.id, 3, "secret words", "192.0.2.1")


@given(st.lists(st.sampled_from([0.0, 0.004, 0.005, 0.08, 0.0800001, 1.12, 5.0, 5.1, 90.0])))
def test_observing_many_values_is_observing_each(values: list[float]) -> None:
    found = []
    for at_once in (True, False):
        metrics = Metrics()
        latency = metrics.latency.labels(80)
        if at_once:
            latency.observe_all(values)
        else:
            for value in values:
                latency.observe(value)
        (family,) = metrics.latency.collect()
        found.append(
            {(one.name, one.labels.get("le")): one.value for one in family.samples if one.name[-7:] != "created"}
        )
    assert found[0] == {name: pytest.approx(value) for name, value in found[1].items()} and len(found[0]) > 10


def test_histograms_resolve_each_chunk_size(fakes: Any, model: Any) -> None:
    """A step or a result that takes as long as its chunk is in the bucket that ends there."""
    here = fakes.start(model)
    for chunk in model.manifest.chunks:
        model.on_step(chunk, 1, chunk.ms / 1000)
        here.record_latency(chunk.ms, chunk.ms / 1000, 1.0)
        for name in ("step_seconds", "latency_seconds"):
            labels = {"chunk_ms": str(chunk.ms), "le": str(chunk.ms / 1000)}
            assert fakes.metric(here, f"{name}_bucket", **labels) == 1, (name, chunk.ms)
    text = here.metrics.text().decode()
    assert 'nemostream_step_seconds_count{chunk_ms="80"} 1.0' in text
    assert Metrics().registry.get_sample_value("nemostream_audio_seconds_total") == 0  # of another server


# -- errors ------------------------------------------------------------------------------------------------------------

STATUSES = {
    Draining: ("draining", 503, "server_error", "UNAVAILABLE", 1012, 5, None),
    CapacityError: ("capacity", 429, "rate_limit_error", "RESOURCE_EXHAUSTED", 1013, 2, None),
    OptionError: ("option", 400, "invalid_request_error", "INVALID_ARGUMENT", 1008, None, None),
    AudioError: ("audio", 400, "invalid_request_error", "INVALID_ARGUMENT", 1007, None, None),
    Expired: ("expired", 408, "invalid_request_error", "DEADLINE_EXCEEDED", 1008, None, "session_expired"),
    StateStoreError: ("state", 503, "server_error", "UNAVAILABLE", 1013, 5, None),
    StateConflict: ("state", 409, "invalid_request_error", "OUT_OF_RANGE", 1008, None, None),
    StateSuperseded: ("state", 409, "invalid_request_error", "ABORTED", 1008, None, None),
    StateNotFound: ("state", 404, "invalid_request_error", "NOT_FOUND", 1008, None, None),
    StateError: ("state", 404, "invalid_request_error", "NOT_FOUND", 1008, None, None),
    BackendError: ("model", 500, "server_error", "INTERNAL", 1011, None, None),
    NemostreamError: ("model", 500, "server_error", "INTERNAL", 1011, None, None),
}


@pytest.mark.parametrize("error", STATUSES)
def test_every_error_has_a_status_in_each_protocol(error: type[NemostreamError]) -> None:
    from nemostream.serving.network.responses import exception_response

    status = status_of(error("the reason."))
    code, http, type_, grpc, close, retry, realtime = STATUSES[error]
    assert (status.code, status.http, status.type, status.grpc, status.close) == (code, http, type_, grpc, close)
    assert (status.retry_seconds, status.realtime_code) == (retry, realtime)
    response = exception_response(error("the reason."))
    assert response.status_code == http and response.headers.get("retry-after") == (str(retry) if retry else None)
    body = {"message": "the reason.", "type": type_, "code": code, "param": None}
    assert json.loads(response.body) == {"error": body}


def test_errors_of_other_processes() -> None:
    assert type(errors.error_of("AudioError", "x.")) is AudioError
    for name in ("Any", "annotations", "Unknown", "__name__"):
        assert type(errors.error_of(name, "x.")) is BackendError
        assert type(errors.error_of(name, "x.", AudioError)) is AudioError
    assert str(errors.error_of("StreamError", "the reason.")) == "the reason."


def test_text_of_clients_is_truncated() -> None:
    assert shorten("x" * 300) == "x" * 300
    assert shorten("x" * 301) == "x" * 300 + "... (301 characters)"
    assert errors.openai_error("m", "t", "c", "p") == {"message": "m", "type": "t", "code": "c", "param": "p"}


# -- recordings --------------------------------------------------------------------------------------------------------


def admission(**limits: Any) -> tuple[UploadAdmission, Metrics]:
    metrics = Metrics()
    return UploadAdmission(Settings(**limits), metrics), metrics


def gauge(metrics: Metrics) -> Any:
    return metrics.registry.get_sample_value("nemostream_uploads")


def test_recordings_are_admitted_up_to_their_number(fakes: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    uploads, metrics = admission(max_uploads=2)
    with uploads.admit(1, ONE):
        assert uploads.count == gauge(metrics) == 1
        with uploads.admit(1, ONE):
            assert uploads.count == gauge(metrics) == 2
            with pytest.raises(CapacityError, match="all 2 slots for recordings are in use"):
                uploads.admit(1, TWO)
        assert uploads.count == gauge(metrics) == 1
        with pytest.raises(RuntimeError), uploads.admit(1, TWO):
            raise RuntimeError
    assert uploads.count == gauge(metrics) == 0
    assert metrics.registry.get_sample_value("nemostream_streams_rejected_total", {"reason": "CapacityError"}) == 1
    (record,) = fakes.records(caplog, "stream rejected")
    assert (record.transport, record.peer) == ("upload", "192.0.2.2")


def test_recordings_are_admitted_up_to_their_number_per_client() -> None:
    uploads, _ = admission(max_streams_per_client=1)
    with uploads.admit(1, ONE), uploads.admit(1, TWO):
        for client in (ONE, TWO):
            with pytest.raises(CapacityError, match="already sends 1 recordings"):
                uploads.admit(1, client)
    for _ in range(2):  # released
        with uploads.admit(1, ONE):
            pass
    unlimited, _ = admission()
    with unlimited.admit(1, ONE), unlimited.admit(1, ONE):
        pass


def test_recordings_are_admitted_up_to_their_total_size() -> None:
    uploads, _ = admission(max_upload_total_bytes=10_000, max_upload_bytes=6000)
    with uploads.admit(6000, ONE):
        with uploads.admit(4000, TWO), pytest.raises(CapacityError, match="already have 0 MiB"):
            uploads.admit(1, TWO)
        with pytest.raises(CapacityError):
            uploads.admit(4001, TWO)
        with pytest.raises(CapacityError):
            uploads.admit(None, TWO)  # unknown: as much as a recording may have
    with uploads.admit(4000, ONE), uploads.admit(10**9, TWO):  # larger ones are rejected while they are read
        pass
    with uploads.admit(None, ONE), uploads.admit(4000, TWO), pytest.raises(CapacityError):
        uploads.admit(1, ONE)
    small, _ = admission(max_upload_total_bytes=1024, max_upload_bytes=4096)
    with small.admit(4096, ONE):  # a single one is always admitted
        pass
