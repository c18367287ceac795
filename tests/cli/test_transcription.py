"""Order, exit codes and signals with several inputs; live input paced by a clock. The model is a fake."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from nemostream.cli import transcription
from nemostream.cli.interrupt import StopRequest
from nemostream.cli.output import Output
from nemostream.cli.transcription import _EventCollector, _pace, transcribe_files, transcribe_microphone
from nemostream.errors import NemostreamError, TruncatedAudioError
from nemostream.runtime.streaming.offline import SourceStopped
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.formats import Format
from nemostream.runtime.text.words import Result, Token

RATE, BLOCK = 8000, 65_536  # samples of a block of a file
TIMEOUT = 60


def event(kind: Any, text: str, audio: float, stable: str = "", utterance: int = 0) -> Event:
    token = Token(1, f" {text}", audio, audio + 0.08, -0.1, 0.58)
    return Event(kind, utterance, text, stable, audio, audio + 0.08, audio, 560, (token,))


class FakeStream:
    """The utterance of each push is the number of its samples."""

    def __init__(self, model: FakeModel, options: dict[str, Any]) -> None:
        self.model, self.samples, self.rate = model, 0, options["sample_rate"]
        self.closed = False

    def push_events(self, block: np.ndarray) -> list[Event]:
        self.model.on_block("stream", block)
        self.samples += len(block)
        return [event("final", f"{len(block)}", self.samples / self.rate)]

    def finish_events(self) -> list[Event]:
        return [event("final", "finished", self.samples / self.rate), event("end", "", self.samples / self.rate)]

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True


class FakeModel:
    """The transcript of a recording is its name and the number of samples that were read."""

    chunk_ms = 560

    def __init__(self, on_block: Callable[[str, np.ndarray], object] = lambda name, block: None) -> None:
        self.on_block = on_block
        self.calls: list[dict[str, Any]] = []
        self.opened: list[FakeStream] = []
        self.source_stopped = False
        self.text = "{name} {samples}"

    def transcribe(self, source: Any, on_partial: Any, on_progress: Any, **options: Any) -> Result:
        self.calls.append(options)
        name, samples, error = Path(source).stem, 0, None
        try:
            for block in source.blocks():
                self.on_block(name, block)
                samples += len(block)
                on_progress(samples / source.sample_rate)
        except SourceStopped:
            self.source_stopped = True
            options["resume"].write_text("state")
        except TruncatedAudioError as truncated:
            error = truncated
        text = self.text.format(name=name, samples=samples)
        result = Result(text, (), samples / source.sample_rate, 560, True)
        if error:
            error.result = result
            raise error
        return result

    def listen(self, source: Any, **options: Any) -> Iterator[Event]:
        self.calls.append(options)
        samples = 0
        for number, block in enumerate(source.blocks()):
            self.on_block("listen", block)
            samples += len(block)
            yield event("partial", f"{number}", samples / source.sample_rate)
            yield event("final", f"{number} {samples}", samples / source.sample_rate)

    def stream(self, **options: Any) -> FakeStream:
        self.calls.append(options)
        self.opened.append(FakeStream(self, options))
        return self.opened[-1]


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Transcribe in the folder of the files; return the exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(
        *names: str, model: FakeModel | None = None, stop: StopRequest | None = None, options: Any = None, **more: Any
    ) -> tuple[int, str, str]:
        capfd.readouterr()
        format, out = more.pop("format", Format.text), more.pop("out", None)
        split = "endpoint" in (options or {})
        with Output(names, format, out, split_utterances=split) as output:
            code = transcribe_files(
                model or FakeModel(),  # type: ignore[arg-type]
                names,
                output,
                options or {},
                stop or StopRequest(),
                **more,
            )
        return (code, *capfd.readouterr())

    return call


def write(name: str, samples: int = 2 * BLOCK, channels: int = 1) -> None:
    soundfile.write(name, np.zeros((samples, channels), np.int16), RATE, subtype="PCM_16")


def write_truncated(name: str, stated: int = 3 * BLOCK) -> None:
    write(name)
    data = bytearray(Path(name).read_bytes())
    data[40:44] = struct.pack("<I", 2 * stated)
    Path(name).write_bytes(data)


# -- exit codes and order ----------------------------------------------------------------------------------------------

MISSING = "nemostream: missing.wav does not exist.\n"
CUT = (
    "nemostream: cut.wav is cut short: 8.19 s of the 24.58 s stated in its header are missing; the audio before was "
    "processed.\n"
)


@pytest.mark.parametrize(
    ("names", "code", "out", "err"),
    [
        (["good", "good"], 0, "good.wav: good 131072\n" * 2, ""),
        (["missing", "cut"], 3, "cut.wav: cut 131072\n", MISSING + CUT),
        (["cut", "missing"], 11, "cut.wav: cut 131072\n", CUT + MISSING),
        (["good", "cut", "missing"], 11, "good.wav: good 131072\ncut.wav: cut 131072\n", CUT + MISSING),
        (["good", "missing", "good"], 3, "good.wav: good 131072\n" * 2, MISSING),
        (["missing"], 3, "", MISSING),
        (["cut"], 11, "cut 131072\n", CUT),
    ],
)
def test_exit_code_is_that_of_the_first_failure(run: Run, names: list[str], code: int, out: str, err: str) -> None:
    write("good.wav")
    write_truncated("cut.wav")
    assert run(*(f"{name}.wav" for name in names)) == (code, out, err)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (NemostreamError("no luck."), 1, "no luck."),
        (OSError(errno.EIO, os.strerror(errno.EIO)), 1, "b.wav: Input/output error."),
        (OSError("broken"), 1, "b.wav: broken."),
        (KeyError("k"), 1, "b.wav: unexpected KeyError: 'k'"),
    ],
)
def test_failed_input_does_not_affect_the_others(run: Run, error: Exception, code: int, message: str) -> None:
    for name in "abc":
        write(f"{name}.wav")

    def fail(name: str, block: np.ndarray) -> None:
        if name == "b":
            raise error

    found, out, err = run("a.wav", "b.wav", "c.wav", model=FakeModel(fail))
    assert (found, out) == (code, "a.wav: a 131072\nc.wav: c 131072\n")
    assert err.splitlines()[-1] == f"nemostream: {message}"
    assert ("Traceback" in err) == isinstance(error, KeyError) and err.count("nemostream: ") == 1


def test_closed_output_stops_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that still wait are not transcribed, and the call does not wait for those that were started."""
    for name in "ab":
        write(f"{name}.wav")
    released, finished = threading.Event(), []

    def work(name: str, block: np.ndarray) -> None:
        if name == "b":
            released.wait(TIMEOUT)
            finished.append(name)

    model = FakeModel(work)
    monkeypatch.setattr(transcription, "MAX_PARALLEL", 2)

    def closed(self: Output, name: str, text: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(Output, "_write_text", closed)
    try:
        with pytest.raises(BrokenPipeError):
            run("a.wav", *["b.wav"] * 9, model=model)
        assert len(model.calls) <= 3 and finished == []
    finally:
        released.set()


def test_sixteen_files_are_transcribed_at_a_time_and_written_in_order(run: Run) -> None:
    names = [f"{number}.wav" for number in range(18)]
    for name in names:
        write(name, 100)
    barrier, others, lock = threading.Barrier(16), threading.Semaphore(0), threading.Lock()
    running, most = 0, 0

    def work(name: str, block: np.ndarray) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if int(name) < 16:
            barrier.wait(60)
        if name == "0":  # the first is done last
            for _ in range(17):
                assert others.acquire(timeout=60)
        else:
            others.release()
        with lock:
            running -= 1

    assert run(*names, model=FakeModel(work)) == (0, "".join(f"{n}: {n[:-4]} 100\n" for n in names), "")
    assert most == 16 == barrier.parties


def test_options_reach_the_model(run: Run, tmp_path: Path) -> None:
    write("a.wav", 100, channels=2)
    model, state = FakeModel(), tmp_path / "state"
    run("a.wav", model=model, options={"vad": True}, resume=state)
    assert model.calls == [{"vad": True, "resume": state, "keep_state": True}]
    run("a.wav", model=model, options={"language": "de"})
    assert model.calls[1:] == [{"language": "de", "resume": None, "keep_state": True}]
    run("a.wav", model=model, options={"language": "de"}, realtime=True)
    assert model.calls[2:] == [{"language": "de", "sample_rate": RATE, "channels": 2}]
    run("a.wav", model=model, realtime=True, channel=2)
    assert model.calls[3:] == [{"sample_rate": RATE, "channels": 1}]
    assert run("a.wav", model=model, channel=3)[0] == 3


def test_name_that_the_system_cannot_encode(run: Run) -> None:
    code, out, err = run("a\ud800.wav")
    assert (code, out) == (3, "") and "wav cannot be read: 'utf-8' codec can't encode" in err


# -- signals -----------------------------------------------------------------------------------------------------------


def test_first_input_finishes_and_the_rest_is_not_started(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal arrives in the first block of the second input."""
    monkeypatch.setattr(transcription, "MAX_PARALLEL", 1)
    for name in "abcd":
        write(f"{name}.wav")
    stop = StopRequest()
    model = FakeModel(lambda name, block: name == "b" and not stop.is_set() and stop.set())
    assert run("a.wav", "b.wav", "c.wav", "d.wav", model=model, stop=stop) == (
        0,
        f"a.wav: a 131072\nb.wav: b {BLOCK}\n",
        "nemostream: b.wav: interrupted after 8.19 s; the text up to there is written.\n"
        "nemostream: interrupted; 2 not transcribed.\n",
    )
    assert len(model.calls) == 2 and not model.source_stopped


def test_signal_before_the_first_input(run: Run) -> None:
    write("a.wav")
    stop = StopRequest()
    stop.set()
    assert run("a.wav", stop=stop) == (0, "", "nemostream: interrupted.\n")
    assert run("a.wav", "a.wav", stop=stop) == (0, "", "nemostream: interrupted; 2 not transcribed.\n")


def test_signal_in_the_only_input(run: Run, tmp_path: Path) -> None:
    write("a.wav")
    for format, text, out, message in (
        (Format.text, "one", "one\n", "interrupted after 8.19 s; the text up to there is written"),
        (Format.text, "", "", "interrupted"),  # nothing to write
        (Format.json, "", None, "interrupted"),
    ):
        for resume in (None, tmp_path / "state"):
            stop = StopRequest()
            model = FakeModel(lambda name, block, stop=stop: stop.set())  # type: ignore[misc]
            model.text = text
            code, found, err = run("a.wav", model=model, stop=stop, format=format, resume=resume)
            assert (code, model.source_stopped) == (0, resume is not None)
            if out is None:
                assert json.loads(found)["duration"] == 8.192
            else:
                assert found == out
            saved = f"; the state is saved in {resume}, and the same command continues from it" if resume else ""
            assert err == f"nemostream: {message}{saved}.\n"
            if resume:
                assert resume.read_text() == "state"  # it is needed to continue
                resume.unlink()


def test_signal_while_a_file_is_read_in_real_time(run: Run) -> None:
    write("a.wav", 3 * 640)
    stop = StopRequest()
    code, out, err = run("a.wav", model=FakeModel(lambda name, block: stop.set()), stop=stop, realtime=True)
    assert (code, out) == (0, "640 finished\n")
    assert err == "nemostream: interrupted after 0.08 s; the text up to there is written.\n"


def test_input_that_never_opens_does_not_delay_the_end(run: Run) -> None:
    """Nothing is written to the pipe, so that its format is unknown. The other input is written."""
    os.mkfifo("fifo")
    write("a.wav", 100)
    stop, writers = StopRequest(), []

    def work(name: str, block: np.ndarray) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not writers:
            assert time.monotonic() < deadline
            with suppress(OSError):  # until the other thread has the pipe open
                writers.append(os.open("fifo", os.O_WRONLY | os.O_NONBLOCK))
            time.sleep(0.01)
        stop.set()

    try:
        code, out, err = run("fifo", "a.wav", model=FakeModel(work), stop=stop)
    finally:
        for writer in writers:
            os.close(writer)  # ends the thread that reads the pipe
    assert (code, out) == (0, "a.wav: a 100\n") and err == "nemostream: interrupted; 1 not transcribed.\n"


# -- the saved state ---------------------------------------------------------------------------------------------------


def test_state_is_deleted_after_the_result_is_written(run: Run, tmp_path: Path) -> None:
    write("a.wav", 100)
    state = tmp_path / "state"
    for out, code, kept in (("/dev/full", 1, True), (None, 0, False)):
        for file in (state, tmp_path / "state.part"):
            file.write_text("old")
        assert run("a.wav", out=out, resume=state)[0] == code
        assert state.exists() == (tmp_path / "state.part").exists() == kept


def test_state_that_cannot_be_saved(run: Run, tmp_path: Path) -> None:
    write("a.wav", 100)

    def fail(name: str, block: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    state = tmp_path / "state"
    assert run("a.wav", model=FakeModel(fail), resume=state) == (
        1,
        "",
        f"nemostream: --resume: the state cannot be saved in {state}: No space left on device.\n",
    )


# -- standard input ----------------------------------------------------------------------------------------------------


def set_standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.wav", 100, channels=2)
    write_truncated("cut.wav")
    cut = Path("cut.wav").read_bytes()
    for data, call, code in (
        (bytes(2000), {"sample_rate": 16000, "channels": 1, "vad": True}, 0),
        (Path("a.wav").read_bytes(), {"sample_rate": RATE, "channels": 2, "vad": True}, 0),
        (cut, {"sample_rate": RATE, "channels": 1, "vad": True}, 11),
    ):
        model = FakeModel()
        set_standard_input(monkeypatch, data)
        found, out, err = run("-", model=model, options={"vad": True})
        assert (found, model.calls) == (code, [call])
        assert [stream.closed for stream in model.opened] == [True]
        samples = {0: "1000" if data[:1] == b"\0" else "100"}.get(code)
        assert out.endswith(" finished\n") and (samples is None or out == f"{samples} finished\n")
        assert ("standard input is cut short" in err) == (code == 11)
    set_standard_input(monkeypatch, bytes(3))
    code, out, err = run("-")
    assert (code, out) == (3, "") and "middle of a sample" in err


@pytest.mark.parametrize("cut", [False, True])
def test_signal_while_standard_input_is_read(run: Run, monkeypatch: pytest.MonkeyPatch, cut: bool) -> None:
    """What a signal cuts off is not an error: half a sample, or a WAV file without its end."""
    write_truncated("cut.wav", 10 * BLOCK)
    stop = StopRequest()
    set_standard_input(monkeypatch, Path("cut.wav").read_bytes() if cut else bytes(300_001))
    model = FakeModel(lambda name, block: stop.is_set() or stop.set())
    code, out, err = run("-", model=model, stop=stop)
    assert code == 0 and out.endswith(" finished\n")
    assert sum(map(int, out.split()[:-1])) == (2 * BLOCK if cut else 150_000)
    assert err.startswith("nemostream: interrupted after ") and err.count("\n") == 1


@pytest.mark.parametrize("name", ["-", "a.wav"])
def test_input_that_was_opened_is_awaited_after_a_signal(run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The signal has been noticed before the input's last block is processed."""
    write("a.wav", 100)
    set_standard_input(monkeypatch, bytes(200))
    stop, noticed, wait = StopRequest(), threading.Event(), transcription.wait

    def spy(*arguments: Any, **options: Any) -> Any:
        if stop.is_set():
            noticed.set()
        return wait(*arguments, **options)

    def work(name: str, block: np.ndarray) -> None:
        stop.set()
        assert noticed.wait(10)

    monkeypatch.setattr(transcription, "wait", spy)
    code, out, err = run(name, model=FakeModel(work), stop=stop)
    assert (code, out) == (0, "100 finished\n" if name == "-" else "a 100\n") and noticed.is_set()
    assert "not transcribed" not in err


# -- events ------------------------------------------------------------------------------------------------------------


class Recorder:
    """Records what is shown and written, in order."""

    def __init__(self, writes: bool) -> None:
        self.log: list[Any] = []
        self.writes = writes

    def start(self, index: int, duration: float) -> None:
        self.log.append(("start", index, duration))

    def set_text(self, index: int, text: str, stable: int) -> None:
        self.log.append((index, text[:stable], text[stable:]))

    def set_progress(self, index: int, seconds: float) -> None:
        self.log.append(("progress", index, seconds))

    def clear_text(self, index: int) -> None:
        self.log.append(("clear", index))

    @contextmanager
    def hidden(self) -> Iterator[None]:
        self.log.append("hide")
        yield
        self.log.append("show")

    def write_utterance(self, name: str, utterance: Event) -> bool:
        self.log.append(("write", name, utterance.text))
        return self.writes


EVENTS = [
    event("partial", "a b", 1.0, "a"),
    event("final", "a bc", 2.0, "a bc"),
    event("end", "", 2.5),
    event("partial", "\u4f60", 3.0, "", 1),
    event("final", "\u4f60\u597d", 4.0, "\u4f60\u597d", 1),
    event("partial", "x", 5.0, "", 2),
]


def collect(writes: bool) -> tuple[_EventCollector, list[Any]]:
    recorder: Any = Recorder(writes)
    collector = _EventCollector(recorder, "a.wav", recorder, 7)
    collector.add(EVENTS)
    return collector, recorder.log


def test_utterances_that_are_written_leave_the_captions() -> None:
    collector, log = collect(writes=True)
    assert log == [
        (7, "a", " b"),
        (7, "a bc", ""),
        "hide",
        ("write", "a.wav", "a bc"),
        "show",
        ("clear", 7),
        (7, "", "\u4f60"),
        (7, "\u4f60\u597d", ""),
        "hide",
        ("write", "a.wav", "\u4f60\u597d"),
        "show",
        ("clear", 7),
        (7, "", "x"),
    ]
    assert collector.finals == [EVENTS[1], EVENTS[4]] and collector.duration == 5.0


def test_partials_are_withdrawn_by_a_final_without_text() -> None:
    recorder: Any = Recorder(True)
    collector = _EventCollector(recorder, "a.wav", recorder, 7)
    collector.add([event("partial", "x", 1.0), event("final", "", 2.0), event("end", "", 2.0)])
    assert recorder.log == [(7, "", "x"), (7, "", "")] and collector.finals == []


def test_utterances_that_are_not_written_yet_stay_in_the_captions() -> None:
    """Separated as the text is: by a space, or not at all after a script without spaces."""
    collector, log = collect(writes=False)
    assert [one for one in log if one[0] == 7] == [
        (7, "a", " b"),
        (7, "a bc", ""),
        (7, "a bc ", "\u4f60"),
        (7, "a bc \u4f60\u597d", ""),
        (7, "a bc \u4f60\u597d", "x"),
    ]
    assert ("clear", 7) not in log and len(collector.finals) == 2


def test_blocks_are_pushed_until_the_input_is_interrupted() -> None:
    def blocks() -> Iterator[np.ndarray]:
        yield np.zeros(300)
        yield np.zeros((100, 2))
        raise KeyboardInterrupt

    for stop_on in (KeyboardInterrupt, None):
        recorder: Any = Recorder(True)
        collector = _EventCollector(recorder, "-", recorder, 3)
        stream: Any = FakeStream(FakeModel(), {"sample_rate": 200})
        if stop_on is None:
            with pytest.raises(KeyboardInterrupt):
                collector.run(stream, blocks(), 200)
        else:
            collector.run(stream, blocks(), 200, stop_on=stop_on)
        assert [one for one in recorder.log if one[0] == "progress"] == [("progress", 3, 1.5), ("progress", 3, 2.0)]
        texts = [final.text for final in collector.finals]
        assert texts == ["300", "100", "finished"][: 3 if stop_on else 2] and collector.duration == 2.0


def test_utterances_of_a_file(run: Run) -> None:
    """Each is written when it ends, without the name of the only file."""
    write("a.wav")
    model = FakeModel()
    options = {"endpoint": object()}
    assert run("a.wav", model=model, options=options) == (0, f"0 {BLOCK}\n1 {2 * BLOCK}\n", "")
    assert model.calls == [options]
    rows = json.loads(run("a.wav", options=options, format=Format.json)[1])
    assert [one["text"] for one in rows["utterances"]] == [f"0 {BLOCK}", f"1 {2 * BLOCK}"]
    assert rows["duration"] == 16.384
    write_truncated("cut.wav")
    assert run("cut.wav", options=options) == (11, f"0 {BLOCK}\n1 {2 * BLOCK}\n", CUT)
    assert run("cut.wav", realtime=False, options=options, format=Format.json)[0] == 11


# -- real time ---------------------------------------------------------------------------------------------------------


@pytest.fixture(name="clock")
def controlled_clock(clock: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(transcription, "time", clock)
    return clock


def test_each_block_is_due_when_its_last_sample_was_recorded(clock: Any) -> None:
    """80 ms each, across the blocks of the file; a slow consumer catches up."""
    audio = np.arange(2000)
    parts, due = [], []
    for part in _pace([audio[:1500], audio[1500:]], 8000, StopRequest()):
        parts.append(part)
        due.append(round(1000 * (clock.now - 1000)))
        if len(parts) == 2:
            clock.now += 0.05
    assert [len(part) for part in parts] == [640, 640, 220, 500]
    assert np.array_equal(np.concatenate(parts), audio)
    assert due == [80, 160, 210, 250]  # the third was due at 187.5 ms
    assert [len(part) for part in _pace([audio[:3]], 4, StopRequest())] == [1, 1, 1]


def test_pace_ends_at_a_signal(clock: Any) -> None:
    stop, count = StopRequest(), 0
    for _ in _pace([np.zeros(6400)], 8000, stop):
        count += 1
        if count == 3:
            stop.set()
    assert (count, round(clock.now - 1000, 6)) == (3, 0.24)


def test_realtime_input_is_paced_and_the_stream_closed(run: Run, clock: Any) -> None:
    write("a.wav", 8000)
    model = FakeModel()
    assert run("a.wav", model=model, realtime=True) == (0, " ".join(["640"] * 12) + " 320 finished\n", "")
    assert clock.now == pytest.approx(1001.0)
    write_truncated("cut.wav")
    code, out, err = run("cut.wav", model=model, realtime=True)
    assert (code, err) == (11, CUT) and out.endswith(" finished\n")
    assert [stream.closed for stream in model.opened] == [True, True]


# -- the microphone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [False, True])
def test_microphone(live: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Blocks are copied: the device may reuse its buffer. Captions are shown with `live` only."""
    stop, blocks = StopRequest(), []

    class InputStream(nullcontext[None]):
        buffer = np.zeros((1280, 1), np.float32)

        def read(self, frames: int) -> tuple[np.ndarray, bool]:
            self.buffer += 1
            if self.buffer[0, 0] == 3:
                stop.set()
            return self.buffer[:frames], False

    device = SimpleNamespace(InputStream=lambda **options: InputStream(), PortAudioError=RuntimeError)
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    model: Any = FakeModel(lambda name, block: blocks.append(block))
    with Output(["microphone"], Format.text) as output:
        transcribe_microphone(model, output, {"vad": True}, stop, live=live)
    text = "1280 1280 1280 finished\n"
    assert capfd.readouterr() == (text, "listening; press Ctrl-C to stop\n" + (text if live else ""))
    assert [block.tolist() for block in blocks] == [[value] * 1280 for value in (1.0, 2.0, 3.0)]
    assert model.calls == [{"vad": True, "sample_rate": 16000}] and model.opened[0].closed
