"""What `nemostream transcribe` passes to the model and to the transcription, and which options exclude each other."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nemostream
from nemostream.cli import transcribe as module
from nemostream.cli.output import Output
from nemostream.errors import CapacityError
from nemostream.runtime.text.endpointing import Endpoint
from nemostream.runtime.text.formats import Format

load = nemostream.load  # which the fixture `model` replaces

Run = Callable[..., tuple[int, str, str]]


class FakeModel:
    """Records how it was loaded and used."""

    chunk_ms = 560
    manifest = SimpleNamespace(languages=SimpleNamespace(name=lambda language: f"<{language}>"))

    def __init__(self) -> None:
        self.loaded: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.log: list[str] = []
        self.streams: list[dict[str, Any]] = []
        self.files: list[SimpleNamespace] = []
        self.microphone: list[SimpleNamespace] = []
        self.exit_code, self.signal_in_files, self.signal_in_microphone = 0, 0, 0

    def load(self, *arguments: Any, **options: Any) -> FakeModel:
        self.loaded = arguments, options
        self.log.append("load")
        return self

    def stream(self, **options: Any) -> Any:
        self.streams.append(options)
        return SimpleNamespace(finish_events=lambda: [], close=lambda: self.log.append("stream closed"))

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.log.append("close")

    def transcribe_files(self, model: Any, names: Any, output: Output, options: Any, stop: Any, **more: Any) -> int:
        self.files.append(SimpleNamespace(names=names, output=output, options=options, **more))
        self.log.append("files")
        if self.signal_in_files:
            signal.raise_signal(self.signal_in_files)
            assert stop.number == self.signal_in_files
        return self.exit_code

    def transcribe_microphone(self, model: Any, output: Output, options: Any, stop: Any, **more: Any) -> None:
        self.microphone.append(SimpleNamespace(output=output, options=options, **more))
        self.log.append("microphone")
        if self.signal_in_microphone:
            signal.raise_signal(self.signal_in_microphone)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    model = FakeModel()
    monkeypatch.setattr(nemostream, "load", model.load)
    monkeypatch.setattr(nemostream, "InverseNormalizer", lambda language: f"itn {language}", raising=False)
    monkeypatch.setattr(module, "transcribe_files", model.transcribe_files)
    monkeypatch.setattr(module, "transcribe_microphone", model.transcribe_microphone)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab")))
    return model


@pytest.mark.parametrize(
    ("names", "capacity"), [(["a"], 2), (["a", "b", "c"], 6), (["a"] * 15, 30), (["a"] * 17, 32), (["--mic"], 2)]
)
def test_two_slots_per_parallel_file(run: Run, model: FakeModel, names: list[str], capacity: int) -> None:
    """A failed file may hold its slot until the current step ends."""
    assert run(*names)[0] == 0
    assert model.loaded[1]["capacity"] == capacity
    assert model.log == ["load", "stream closed", "microphone" if names == ["--mic"] else "files", "close"]


@pytest.mark.parametrize("count", [1, 16])
def test_slots_for_accurate_lanes(run: Run, model: FakeModel, count: int) -> None:
    """A failed file may hold its two slots, and for every 16 lanes one slot is reserved."""
    assert run(*["a"] * count, "--final-chunk-ms", 1120)[0] == 0
    with load(capacity=model.loaded[1]["capacity"]) as real:
        streams = [real.stream(final_chunk_ms=1120) for _ in range(2 * count)]
        for stream in streams:
            stream.close()


def test_options_of_the_model(run: Run, model: FakeModel, tmp_path: Path) -> None:
    run("a")
    nothing = {"capacity": 2, "threads": None, "device": "cpu", "precision": None, "engines": None, "delay_ms": 0}
    assert model.loaded == ((None, 560), nothing)
    run(
        *("a", "--bundle", tmp_path / "b", "--chunk-ms", 80, "--threads", 3, "--device", "cuda"),
        *("--precision", "int8", "--engines", tmp_path / "e", "--delay-ms", 40),
    )
    given = {"threads": 3, "device": "cuda", "precision": "int8", "engines": tmp_path / "e", "delay_ms": 40}
    assert model.loaded == ((tmp_path / "b", 80), {"capacity": 2, **given})


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["--endpoint-ms", 800], {"endpoint": Endpoint(silence_ms=800, decoder="keep")}),
        (["--endpoint-ms", 80, "--decoder", "reset"], {"endpoint": Endpoint(silence_ms=80, decoder="reset")}),
        (["--endpoint-ms", 800, "--decoder", "keep"], {"endpoint": Endpoint(silence_ms=800, decoder="keep")}),
        (["--decoder", "keep"], {}),
        (["--language", "de"], {"language": "de"}),
        (["--phrases", "one", "--phrases", "two:3"], {"phrases": {"one": 1.0, "two": 3.0}}),
        (["--vad"], {"vad": True}),
        (["--final-chunk-ms", 1120], {"final_chunk_ms": 1120}),
    ],
)
def test_options_of_streams(run: Run, model: FakeModel, arguments: list[Any], options: dict[str, Any]) -> None:
    """They are tried before the first file, and the same for the microphone."""
    for more in (["a"], ["--mic"]):
        assert run(*more, *arguments)[0] == 0
    assert model.streams == [options, options]
    assert [model.files[0].options, model.microphone[0].options] == [options, options]
    assert model.files[0].output._split_utterances == ("--endpoint-ms" in arguments)


def test_options_of_the_transcription(run: Run, model: FakeModel, tmp_path: Path) -> None:
    state = tmp_path / "state"
    for arguments, wanted in (
        (["a", "b"], {}),
        (["a", "--realtime"], {"realtime": True}),
        (["a", "--realtime", "--live"], {"realtime": True, "live": True}),
        (["-", "--live"], {"live": True}),
        (["a", "--resume", state], {"resume": state}),
        (["a", "b", "--channel", 2], {"channel": 2}),
    ):
        assert run(*arguments)[0] == 0, arguments
        names = [name for name in arguments if name in ("a", "b", "-")]
        given = vars(model.files.pop()).copy()
        output = given.pop("output")
        assert given == {
            "names": names,
            "options": {},
            "realtime": False,
            "live": False,
            "resume": None,
            "channel": None,
            **wanted,
        }
        assert (output.format, output.itn, output._channel) == (Format.text, None, wanted.get("channel"))
    run("--mic", "--live", "--format", "json", "--itn", "--language", "fr")
    (call,) = model.microphone
    assert call.live and call.output.format is Format.json and call.output.itn == "itn <fr>"
    run("a", "--itn")
    assert model.files.pop().output.itn == "itn <None>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to transcribe: give a FILE, - for standard input, or --mic"),
        (["-", "-"], "standard input (-) is given more than once"),
        (["a", "--live"], "--live needs a single live input"),
        (["a", "b", "--realtime", "--live"], "--live needs a single live input"),
        (["a", "--mic", "--live"], "--live needs a single live input"),
        (["-", "a", "--live"], "--live needs a single live input"),
        (["a", "b", "--resume", "s"], "--resume needs a single FILE"),
        (["-", "--resume", "s"], "--resume needs a single FILE"),
        (["--mic", "--resume", "s"], "--resume needs a single FILE"),
        (["a", "--mic", "--resume", "s"], "--resume needs a single FILE"),
        (["a", "--realtime", "--resume", "s"], "--resume needs a single FILE"),
        (["a", "--endpoint-ms", 800, "--resume", "s"], "--resume needs a single FILE"),
        (["-", "--channel", 1], "--channel applies to files only"),
        (["a", "-", "--channel", 1], "--channel applies to files only"),
        (["--mic", "--channel", 1], "--channel applies to files only"),
        (["a", "--decoder", "reset"], "--decoder reset needs --endpoint-ms"),
        (["a", "--resume", "none/s"], "--resume: there is no folder none for s"),
        (["a", "--resume", "a"], "--resume and the recording are the same file, a"),
        (["a", "--resume", "s", "--out", "./s"], "--resume and --out are the same file, s"),
        (["a", "--resume", "."], "--resume: . is a folder"),
    ],
)
def test_options_that_exclude_each_other(
    run: Run, model: FakeModel, arguments: list[Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"nemostream: {message}")
    assert model.log == [] and list(tmp_path.iterdir()) == []


class FakeRemoteModel:
    def __init__(self, model: FakeModel) -> None:
        self.created: list[tuple[Any, ...]] = []
        self.stream = model.stream

    def __call__(self, *arguments: Any) -> FakeRemoteModel:
        self.created.append(arguments)
        return self


@pytest.fixture
def remote(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> FakeRemoteModel:
    remote = FakeRemoteModel(model)
    monkeypatch.setattr(module, "RemoteModel", remote)
    return remote


def test_a_server_takes_the_place_of_the_model(
    run: Run, model: FakeModel, remote: FakeRemoteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("a", "b", "--realtime", "--server", "http://x", "--server", "http://y", "--itn", "--vad")[0] == 0
    assert model.files.pop().output.itn is None  # the server has normalized the text
    monkeypatch.setenv("NEMOSTREAM_API_KEY", "of the environment")
    assert run("-", "--server", "http://x", "--chunk-ms", 80)[0] == 0
    assert run("--mic", "--server", "http://x", "--api-key", "given")[0] == 0
    assert remote.created == [
        (["http://x", "http://y"], None, 560, True),
        (["http://x"], "of the environment", 80, False),
        (["http://x"], "given", 560, False),
    ]
    assert model.streams == [{"vad": True}, {}, {}] and "load" not in model.log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "--server needs live input: FILE with --realtime, - or --mic"),
        (["a", "-"], "--server needs live input"),
        (["a", "--mic"], "--server needs live input"),
        (["a", "--realtime", "--bundle", "b"], "--bundle applies to a local model, not to --server"),
        (["a", "--realtime", "--device", "cuda"], "--device applies to a local model"),
        (["a", "--realtime", "--precision", "fp32"], "--precision applies to a local model"),
        (["a", "--realtime", "--engines", "e"], "--engines applies to a local model"),
        (["a", "--realtime", "--threads", 1], "--threads applies to a local model"),
        (["a", "--realtime", "--delay-ms", 80], "--delay-ms applies to a local model"),
    ],
)
def test_options_that_exclude_a_server(
    run: Run, model: FakeModel, remote: FakeRemoteModel, arguments: list[Any], message: str
) -> None:
    code, out, err = run(*arguments, "--server", "http://x")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"nemostream: {message}")
    assert model.log == [] and remote.created == []


def test_standard_input_must_be_a_pipe(run: Run, model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = SimpleNamespace(isatty=lambda: True)
    for stdin, message in ((None, "standard input is closed"), (terminal, "standard input is not a pipe")):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run("-")[0] == 2 and message in run("-")[2]
        assert run("a")[0] == 0  # it is not read


def test_invalid_stream_options_are_reported_once(run: Run, model: FakeModel) -> None:
    def fail(**options: Any) -> Any:
        raise CapacityError("all slots are in use.")

    model.stream = fail  # type: ignore[method-assign]
    assert run("a", "b") == (8, "", "nemostream: all slots are in use.\n") and model.log == ["load", "close"]


@pytest.mark.parametrize(
    ("arguments", "code", "in_files", "in_microphone", "expected", "log"),
    [
        (["a"], 11, 0, 0, 11, ["files"]),
        (["a"], 3, signal.SIGINT, 0, 130, ["files"]),
        (["a"], 0, signal.SIGTERM, 0, 143, ["files"]),
        (["a", "--mic"], 3, 0, signal.SIGINT, 3, ["files", "microphone"]),  # Ctrl-C is the normal end
        (["a", "--mic"], 3, 0, signal.SIGTERM, 143, ["files", "microphone"]),
        (["a", "--mic"], 0, signal.SIGINT, 0, 130, ["files"]),
        (["--mic"], 0, 0, signal.SIGINT, 0, ["microphone"]),
    ],
)
def test_exit_code(
    run: Run,
    model: FakeModel,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    in_files: int,
    in_microphone: int,
    expected: int,
    log: list[str],
) -> None:
    def exit_now(code: int) -> Any:
        raise SystemExit(code)

    monkeypatch.setattr("nemostream.cli.main._exit_now", exit_now)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # SIGINT may be ignored
    before = [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        model.exit_code, model.signal_in_files, model.signal_in_microphone = code, in_files, in_microphone
        assert run(*arguments) == (expected, "", "")  # the transcription reports the signal
        assert model.log == ["load", "stream closed", *log, "close"]
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
