"""Exit codes and messages of every kind of failure, and what a signal does, in this process."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

import nemostream
from nemostream import errors
from nemostream.cli import doctor, gpu_memory, interrupt, models, standard_streams
from nemostream.cli import main as module
from nemostream.cli.interrupt import Interrupted, StopRequest, exit_on_signals, signals_raise, signals_stop

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Exited(BaseException):
    """Replaces the end of the process."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore the handlers of the signals. SIGINT is ignored if the tests run as a background job."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The codes with which the process would have ended."""
    codes: list[int] = []

    def exit_now(code: int) -> None:
        codes.append(code)
        raise Exited

    monkeypatch.setattr(os, "_exit", exit_now)
    return codes


def run_doctor(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any], *arguments: str) -> int:
    """Run a command that prints a line and then does `work`."""

    def check(as_json: bool) -> Any:
        print("result")
        return work()

    monkeypatch.setattr(doctor, "check_machine", check)
    with pytest.raises(SystemExit) as exited:
        module.main(["doctor", *arguments])
    assert isinstance(exited.value.code, int)
    return exited.value.code


def raising(error: BaseException) -> Callable[[], Any]:
    def work() -> Any:
        raise error

    return work


ERRORS = [
    getattr(errors, name) for name in dir(errors) if isinstance(getattr(errors, name), type) and name.endswith("Error")
]


@pytest.mark.parametrize(
    ("work", "code", "message"),
    [
        (lambda: True, 0, ""),
        (lambda: False, 7, ""),
        *((raising(error("no luck.")), error.exit_code, "nemostream: no luck.\n") for error in ERRORS),
        (raising(typer.Exit(5)), 5, ""),
        (raising(typer.BadParameter("no such file")), 2, "nemostream: Invalid value: no such file\n"),
        (raising(FileNotFoundError(2, "No such file", "x.wav")), 1, "nemostream: x.wav: No such file.\n"),
        (raising(OSError(5, "Input/output error")), 1, "nemostream: [Errno 5] Input/output error.\n"),
        (raising(OSError("odd")), 1, "nemostream: odd.\n"),
    ],
)
def test_exit_code_and_message(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], work: Any, code: int, message: str
) -> None:
    assert run_doctor(monkeypatch, work) == code
    assert capfd.readouterr() == ("result\n", message)
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL] * 2


def test_invalid_values_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--chunk-ms", "abc"], ["--endpoint-ms", "10"], ["--decoder", "foo"]):
        with pytest.raises(SystemExit) as exited:
            module.main(["transcribe", *arguments])
        message = capfd.readouterr().err
        assert exited.value.code == 2 and arguments[0] in message and arguments[1] in message
        assert "Input" not in message and "Value error" not in message


def test_exit_codes_of_the_errors_differ() -> None:
    assert sorted(error.exit_code for error in ERRORS) == list(range(1, 12))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "nemostream: interrupted.\n"),
        (typer.Abort(), 130, "nemostream: interrupted.\n"),
        (Interrupted(signal.SIGINT), 130, "nemostream: interrupted.\n"),
        (Interrupted(signal.SIGTERM), 143, "nemostream: interrupted.\n"),
        (Interrupted(signal.SIGTERM, reported=True), 143, ""),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_process_ends_without_waiting_for_threads(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    exits: list[int],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    """What was printed is written first; a further signal prints no traceback."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written))
    with pytest.raises(Exited):
        run_doctor(monkeypatch, raising(error))
    assert exits == [code] and written.getvalue() == b"result\n" and capfd.readouterr().err == message
    with pytest.raises(Exited):
        signal.raise_signal(signal.SIGTERM)
    assert exits == [code, 143] and capfd.readouterr().err == "nemostream: interrupted.\n"


def test_unexpected_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_machine", raising_with_argument)
    with pytest.raises(RuntimeError, match="a bug"):
        module.main(["doctor"])


def raising_with_argument(as_json: bool) -> Any:
    raise RuntimeError("a bug")


def test_arguments_of_the_process(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["nemostream", "--version"])
    with pytest.raises(SystemExit) as exited:
        module.main()
    assert exited.value.code == 0
    assert capfd.readouterr().out == f"nemostream {nemostream.__version__}\n"


def test_characters_that_the_terminal_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert run_doctor(monkeypatch, lambda: print("\u00fc") is None) == 0
    assert written.getvalue() == b"result\n\\xfc\n"


# -- benchmarks --------------------------------------------------------------------------------------------------------


def test_benchmark_receives_its_arguments(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from nemostream.benchmarks import quick

    calls: list[Any] = []
    monkeypatch.setattr(quick, "main", calls.append)
    for arguments, code in ((["quick", "--sizes", "1", "-h"], 0), ([], 0), (["--help"], 0), (["-h"], 0), (["fast"], 2)):
        with pytest.raises(SystemExit) as exited:
            module.main(["bench", *arguments])
        assert exited.value.code == code
        out, err = capfd.readouterr()
        assert ("Measure speed" in out) == (arguments in ([], ["--help"], ["-h"]))
        assert ("unknown benchmark 'fast'; choose one of quick, latency" in err) == (code == 2)
    assert calls == [["--sizes", "1", "-h"]]


def test_benchmark_without_its_packages(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "nemostream.benchmarks.survival", raising=False)
    monkeypatch.setitem(sys.modules, "nemostream.client", None)
    with pytest.raises(SystemExit) as exited:
        module.main(["bench", "survival", "--help"])
    assert exited.value.code == 7
    message = capfd.readouterr().err
    assert "the benchmark needs the package nemostream.client: " in message and "[bench,serve]'" in message


def test_server_receives_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "nemostream.serving.server", SimpleNamespace(main=calls.append))
    for arguments in (["--port", "1"], ["--help"], []):
        with pytest.raises(SystemExit) as exited:
            module.main(["serve", *arguments])
        assert exited.value.code == 0
    assert calls == [["--port", "1"], ["--help"], []]


def test_doctor_receives_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(doctor, "check_machine", lambda as_json: calls.append(as_json) or True)
    monkeypatch.setattr(gpu_memory, "print_plan", lambda *arguments: calls.append(arguments))
    for arguments in (
        [],
        ["--json"],
        ["--plan"],
        ["--plan", "b", "--gpu", "g", "--json"],
    ):
        with pytest.raises(SystemExit) as exited:
            module.main(["doctor", *arguments])
        assert exited.value.code == 0
    assert calls == [False, True, (None, None, False), (Path("b"), "g", True)]


def test_every_benchmark_has_a_module() -> None:
    from importlib.util import find_spec

    from nemostream.benchmarks import module_name

    assert all(find_spec(module_name(name)) for name in module._BENCHMARKS)


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("command", ["export", "build", "bench", "info"])
def test_commands_that_write_files_clean_up_after_a_signal(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    exits: list[int],
    command: str,
    number: int,
    tmp_path: Path,
) -> None:
    """The others end at once."""
    seen: list[type[BaseException]] = []

    def work(*arguments: Any) -> None:
        try:
            signal.raise_signal(number)
        except BaseException as error:
            seen.append(type(error))
            raise

    from nemostream.benchmarks import quick

    monkeypatch.setattr(models, "_export", work)
    monkeypatch.setattr(nemostream.Bundle, "open", work)
    monkeypatch.setattr(quick, "main", work)
    arguments = {"export": ["a.nemo", "out"], "build": [str(tmp_path)], "bench": ["quick"], "info": []}[command]
    with pytest.raises(Exited):
        module.main([command, *arguments])
    assert exits == [128 + number]
    assert seen == ([Exited] if command == "info" else [Interrupted])
    assert capfd.readouterr().err == "nemostream: interrupted.\n"


@pytest.mark.parametrize(("first", "second"), [SIGNALS, SIGNALS[::-1]])
def test_first_signal_requests_a_stop_and_the_second_ends_the_process(
    exits: list[int], capfd: pytest.CaptureFixture[str], first: int, second: int
) -> None:
    previous = signal.signal(signal.SIGTERM, lambda number, frame: None), signal.getsignal(signal.SIGTERM)
    with signals_stop() as stop:
        assert (stop.is_set(), stop.number) == (False, None)
        assert select.select([stop.fileno()], [], [], 0)[0] == []
        signal.raise_signal(first)
        assert (stop.is_set(), stop.number) == (True, first)
        assert select.select([stop.fileno()], [], [], 0)[0] == [stop.fileno()]
        assert exits == [] and capfd.readouterr().err == ""
        with pytest.raises(Exited):
            signal.raise_signal(second)
        assert exits == [128 + second] and capfd.readouterr().err == "nemostream: aborted.\n"
        assert stop.number == first
    assert signal.getsignal(signal.SIGTERM) is previous[1]
    default = StopRequest()
    default.set()
    assert default.number == signal.SIGINT


def test_handlers_are_restored_after_an_error() -> None:
    with pytest.raises(Interrupted) as caught, signals_raise():
        signal.raise_signal(signal.SIGTERM)
    assert (caught.value.number, caught.value.reported, str(caught.value)) == (signal.SIGTERM, False, "SIGTERM")
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL] * 2


def test_ignored_signals_stay_ignored_and_other_threads_change_nothing() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_on_signals()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert callable(signal.getsignal(signal.SIGTERM))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    thread = threading.Thread(target=exit_on_signals)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_signal_with_standard_error_closed(exits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with pytest.raises(Exited):
            interrupt._exit(signal.SIGTERM, "interrupted")
    assert exits == [143, 143]


# -- standard streams --------------------------------------------------------------------------------------------------


class Slow:
    """An unbuffered file that takes a few bytes at a time, and sometimes none, as a full non-blocking pipe does."""

    def __init__(self, *sizes: int | None) -> None:
        self.sizes, self.data = list(sizes), b""

    def write(self, data: memoryview) -> int | None:
        size = self.sizes.pop(0)
        if size is not None:
            self.data += bytes(data[:size])
        return size


def test_all_data_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Any] = []
    monkeypatch.setattr(select, "select", lambda *arguments: waits.append(arguments))
    file = Slow(3, None, 1, None, 6)
    standard_streams.write_all(file, b"0123456789")
    assert file.data == b"0123456789" and waits == [([], [file], [])] * 2 and file.sizes == []
    standard_streams.write_all(file, b"")


def test_unbuffered_data_follows_what_was_printed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("w") as file:
        file.write("first ")
        standard_streams.write_unbuffered(file, b"second ")
        assert path.read_text() == "first second "
    memory = io.TextIOWrapper(io.BytesIO())
    memory.write("first ")
    standard_streams.write_unbuffered(memory, b"second")
    assert memory.buffer.getvalue() == b"first second"  # type: ignore[attr-defined]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Standard input is a pipe; the end to write to."""
    read_end, write_end = os.pipe()
    with open(read_end, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield write_end
    os.close(write_end)


def test_standard_input_ends_after_a_signal_with_the_data_received_so_far(pipe: int) -> None:
    """The writing end stays open."""
    stop = StopRequest()
    stdin: Any = standard_streams.standard_input(stop)
    os.write(pipe, b"before")
    assert stdin.read1(100) == b"before"
    os.write(pipe, b"between")
    stop.set()
    assert stdin.read() == b"between" and stdin.read() == b""


def test_signal_while_standard_input_is_awaited(pipe: int) -> None:
    stop = StopRequest()
    stdin: Any = standard_streams.standard_input(stop)
    received: list[bytes] = []
    thread = threading.Thread(target=lambda: received.append(stdin.read()))
    thread.start()
    os.write(pipe, b"data")
    stop.set()
    thread.join(60)
    assert received == [b"data"]


def test_endless_input_is_drained_up_to_a_limit(pipe: int, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 MiB: more than a pipe holds. Waiting for data is limited to 0.2 s in all."""
    stop = StopRequest()
    waits: list[float] = []

    def ready(read: Any, write: Any, other: Any, timeout: float) -> Any:
        waits.append(timeout)
        clock.now += 0.15
        return read, [], []

    monkeypatch.setattr(standard_streams, "time", clock)
    monkeypatch.setattr(select, "select", ready)
    monkeypatch.setattr(os, "read", lambda descriptor, size: bytes(min(size, 400_000)))
    stop.set()
    stdin: Any = standard_streams.standard_input(stop)
    assert len(stdin.read()) == 1 << 20
    assert waits[:3] == pytest.approx([0.2, 0.05, 0.0]) and set(waits[2:]) == {0.0}


def test_data_that_another_process_has_read(pipe: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Any] = [BlockingIOError(), b"data", b""]

    def read(descriptor: int, size: int) -> bytes:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return bytes(result)

    os.write(pipe, b"x")
    monkeypatch.setattr(os, "read", read)
    stdin: Any = standard_streams.standard_input(StopRequest())
    assert stdin.readable() and stdin.read() == b"data" and results == []


def test_standard_input_that_is_not_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab")))
    assert standard_streams.standard_input(StopRequest()).read() == b"ab"


def test_lines_of_the_decoder_are_dropped() -> None:
    out = io.BytesIO()
    standard_streams._forward(
        [
            b"one\n",
            b"[src/libmpg123/id3.c:process_comment():587] error: No comment text\n",
            b"Note: Illegal Audio-MPEG-Header\n",
            b"a Note: of ours\n",
            b"\n",
            b" \t\n",
            b"Warning: Xing stream size off by more than 1%\n",
            b"Warning: Encountered more data after announced end of track (frame 1/2). Frankenstein!\n",
            b"Warning: other\n",
            b"[src/other.c]\n",
        ],
        out,
    )
    assert out.getvalue() == b"one\na Note: of ours\nWarning: other\n[src/other.c]\n"


def test_message_to_a_reader_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w", buffering=1) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        standard_streams.print_message("no reader.")
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            stderr.flush()
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), write_end)  # so that it can be closed
