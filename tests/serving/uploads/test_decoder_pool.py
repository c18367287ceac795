"""The pool of decoder processes, with processes that are fakes and a controlled clock."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from typing import Any, ClassVar

import numpy as np
import pytest

from nemostream.errors import AudioError, BackendError, OptionError, StreamError
from nemostream.serving.uploads import decoding
from nemostream.serving.uploads.decoding import DecoderPool

SAMPLES = np.arange(3, dtype=np.float32)
HEAD, BLOCK = (b"h", b'{"duration": 1.5}'), (b"b", SAMPLES.tobytes())
END = (b"e", b'{"seconds": 2.5, "warning": "cut short."}')


class Process:
    """A decoder process that sends the frames of a script; a number is seconds that pass, an exception is raised."""

    started: ClassVar[list[Process]] = []
    script: ClassVar[list[Any]] = []
    start_seconds = 0.0
    start_error: Exception | None = None

    def __init__(self) -> None:
        self.alive, self.killed = True, 0
        self.commands, self.requests = b"", []  # type: bytes, list[Any]
        self.frames = list(self.script)

    @classmethod
    async def start(cls) -> Process:
        await asyncio.sleep(cls.start_seconds)
        if cls.start_error:
            raise cls.start_error
        cls.started.append(cls())
        return cls.started[-1]

    def send_file(self, file: int, request: bytes) -> None:
        assert os.fstat(file)
        self.requests.append(json.loads(request))
        self.frames = list(self.script)

    def send(self, command: bytes) -> None:
        self.commands += command

    async def receive(self) -> tuple[bytes, bytes]:
        while isinstance(self.frames[0], int | float):
            await asyncio.sleep(self.frames.pop(0))
        frame = self.frames.pop(0)
        if isinstance(frame, Exception):
            raise frame
        return frame  # type: ignore[no-any-return]

    def kill(self) -> None:
        self.alive, self.killed = False, self.killed + 1


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> type[Process]:
    class Recorded(Process):
        started: ClassVar[list[Process]] = []
        script: ClassVar[list[Any]] = [HEAD, BLOCK, BLOCK, END]

    monkeypatch.setattr(decoding, "_DecoderProcess", Recorded)
    return Recorded


async def decode(pool: DecoderPool, blocks: int | None = None) -> Any:
    """Decode a recording, or its first blocks; return it and the samples."""
    with open(os.devnull, "rb") as file:
        async with pool.decode(file.fileno(), "a.flac") as recording:
            samples = []
            if blocks != 0:
                async for block in recording:
                    samples.append(block)
                    if len(samples) == blocks:
                        break
            return recording, samples


def test_a_recording_is_decoded_block_by_block(fakes: Any, clock: Any, process: Any) -> None:
    """Each block is requested while the one before it is processed."""
    pool = DecoderPool(16000, 99.0)
    recording, samples = fakes.run(clock, decode(pool))
    assert (recording.duration, recording.seconds, recording.warning) == (1.5, 2.5, "cut short.")
    assert [block.tolist() for block in samples] == [SAMPLES.tolist()] * 2
    (only,) = process.started
    assert only.requests == [{"name": "a.flac", "rate": 16000, "max_seconds": 99.0}] and only.commands == b"nnn"
    assert only.alive


def test_processes_are_used_again(fakes: Any, clock: Any, process: Any) -> None:
    pool = DecoderPool(16000, 99.0)

    async def main() -> None:
        for _ in range(3):
            await decode(pool)
        assert len(process.started) == 1
        process.started[0].alive = False  # it has exited
        await decode(pool)
        assert len(process.started) == 2 and process.started[0].killed == 1
        process.script = [1, HEAD, END]
        await asyncio.gather(*(decode(pool) for _ in range(4)))
        # Two processes are kept for the next recordings.
        assert len(process.started) == 5 and sum(one.alive for one in process.started) == 2
        pool.close()
        assert not any(one.alive for one in process.started)
        await decode(pool)
        assert len(process.started) == 6 and not process.started[5].alive

    fakes.run(clock, main())


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_recording_that_is_abandoned_is_stopped(fakes: Any, clock: Any, process: Any, blocks: int) -> None:
    process.script = [HEAD, BLOCK, BLOCK, 1.5, BLOCK, END]
    pool = DecoderPool(16000, 99.0)

    async def main() -> None:
        await decode(pool, blocks)
        (only,) = process.started
        assert only.alive and not pool._idle  # does not wait
        await asyncio.gather(*pool._tasks)
        assert only.commands.endswith(b"s") and pool._idle == [only] and not only.frames

    fakes.run(clock, main())


@pytest.mark.parametrize("script", [[1.9, BLOCK, 0.2, END], [EOFError()], [ConnectionResetError()]])
def test_a_process_that_does_not_stop_is_killed(fakes: Any, clock: Any, process: Any, script: list[Any]) -> None:
    process.script = [HEAD, BLOCK, *script]
    pool = DecoderPool(16000, 99.0)

    async def main() -> None:
        await decode(pool, 1)
        await asyncio.gather(*pool._tasks)
        assert process.started[0].killed == 1 and not pool._idle

    fakes.run(clock, main())
    assert clock() == (2.0 if len(script) > 1 else 0.0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("AudioError", AudioError),
        ("OptionError", OptionError),
        ("int", AudioError),
        ("Path", AudioError),
        ("x", AudioError),
    ],
)
@pytest.mark.parametrize("at", [0, 2])
def test_errors_of_a_recording_are_raised_here(
    fakes: Any, clock: Any, process: Any, kind: str, expected: Any, at: int
) -> None:
    """The process is ready for the next recording."""
    process.script = [*[HEAD, BLOCK][:at], (b"x", json.dumps({"kind": kind, "message": "the reason."}).encode())]
    pool = DecoderPool(16000, 99.0)
    with pytest.raises(expected, match=r"^the reason\.$") as caught:
        fakes.run(clock, decode(pool))
    assert type(caught.value) is expected and pool._idle == process.started and not process.started[0].killed


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (EOFError(), r"a\.flac cannot be decoded: the decoder process ended \(damaged file, more than 512 MiB"),
        (BrokenPipeError(), "the decoder process ended"),
        (60.1, r"a\.flac takes more than 60 s to decode; convert it to FLAC\."),
    ],
)
@pytest.mark.parametrize("at", [0, 2])
def test_processes_that_fail(fakes: Any, clock: Any, process: Any, frame: Any, message: str, at: int) -> None:
    process.script = [*[HEAD, BLOCK][:at], frame, EOFError()]
    pool = DecoderPool(16000, 99.0)

    async def main() -> None:
        with pytest.raises(AudioError, match=message):
            await decode(pool)
        await asyncio.gather(*pool._tasks)

    fakes.run(clock, main())
    assert process.started[0].killed and not pool._idle


def test_a_block_may_take_60_seconds(fakes: Any, clock: Any, process: Any) -> None:
    process.script = [59.9, HEAD, 59.9, BLOCK, 59.9, END]
    assert len(fakes.run(clock, decode(DecoderPool(16000, 99.0)))[1]) == 1


def test_a_process_that_starts_for_a_cancelled_request_is_kept(fakes: Any, clock: Any, process: Any) -> None:
    process.start_seconds = 5.0
    pool = DecoderPool(16000, 99.0)

    async def main() -> None:
        request = asyncio.create_task(decode(pool))
        await asyncio.sleep(1)
        request.cancel()
        await asyncio.wait([request])
        assert request.cancelled() and not process.started
        await asyncio.sleep(5)
        assert len(process.started) == 1 and pool._idle == process.started
        process.start_error = BackendError("no.")
        pool.close()
        with pytest.raises(BackendError):
            await decode(pool)

    fakes.run(clock, main())


def test_an_error_of_the_caller_is_not_changed(fakes: Any, clock: Any, process: Any) -> None:
    pool = DecoderPool(16000, 99.0)

    async def main() -> None:
        with open(os.devnull, "rb") as file, pytest.raises(StreamError, match="mine"):
            async with pool.decode(file.fileno(), "a.flac"):
                raise StreamError("mine.")
        await asyncio.gather(*pool._tasks)

    fakes.run(clock, main())
    assert pool._idle == process.started


# -- a process and its socket ------------------------------------------------------------------------------------------


def test_the_environment_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python and libraries need, and nothing else."""
    started: list[Any] = []
    monkeypatch.setattr(decoding.subprocess, "Popen", lambda *arguments, **options: started.append(options))
    names = {"PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV"}
    for name in (*names, "NEMOSTREAM_API_KEYS", "SECRET"):
        monkeypatch.setenv(name, f"of {name}")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        decoding._spawn(theirs)
        monkeypatch.delenv("LC_ALL")
        decoding._spawn(theirs)
        threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        assert started[0]["env"] == {name: f"of {name}" for name in names} | threads
        assert "LC_ALL" not in started[1]["env"] and started[0]["stdin"] == theirs.fileno()


def test_frames_are_read_whole() -> None:
    """A call that is cancelled in the middle of a frame loses none of it."""

    async def main() -> None:
        reader = asyncio.StreamReader()
        process = decoding._DecoderProcess(None, None, reader, None)  # type: ignore[arg-type]
        for start in (b"b\x03", b"\0\0\0", b"ab"):
            reader.feed_data(start)
            reading = asyncio.create_task(process.receive())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            reading.cancel()
            await asyncio.wait([reading])
        reader.feed_data(b"ce\0\0\0\0b" + (64 << 20).to_bytes(4, "little"))
        assert await process.receive() == (b"b", b"abc") and await process.receive() == (b"e", b"")
        reading = asyncio.create_task(process.receive())  # of 64 MiB, the largest frame
        await asyncio.sleep(0)
        assert not reading.done()
        reading.cancel()
        await asyncio.wait([reading])
        process._head = None
        reader.feed_data(b"b" + ((64 << 20) + 1).to_bytes(4, "little"))
        with pytest.raises(EOFError, match="a frame of 67108865 bytes"):
            await process.receive()

    asyncio.run(main())
