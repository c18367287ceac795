"""Requests of Triton's Python backend: sequences, options, outputs and errors. The model and Triton are fakes."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nemostream.errors import AudioError, OptionError
from nemostream.runtime.text.words import Result, Token
from nemostream.serving.integrations import triton

PARAMETERS = {"chunk_ms": "160", "device": "cpu", "precision": "", "engines": "", "threads": ""}


class Stream:
    """Its text has the number of samples of each push."""

    def __init__(self, model: Any, options: Any) -> None:
        self.options, self.closed, self.words = options, 0, []  # type: Any, int, list[str]
        self.language, self._model = options["language"], model

    @property
    def result(self) -> Result:
        tokens = tuple(Token(0, " " + word, number / 2, number, 0.0, 0.0) for number, word in enumerate(self.words))
        return Result(" ".join(self.words), tokens, 0.0, 80, True, language=self.language)

    async def push(self, audio: Any) -> None:
        self._model.active += 1
        await asyncio.sleep(0)
        self._model.peak = max(self._model.peak, self._model.active)
        self._model.active -= 1
        if self._model.error:
            raise self._model.error
        self.words.append(str(len(audio)))

    async def finish(self) -> Result:
        self.words.append("end")
        return self.result

    def set_language(self, language: str) -> None:
        self.language = language

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def clock(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = fakes.VirtualClock()
    monkeypatch.setattr(triton, "time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def model(fakes: Any, languages_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    model = SimpleNamespace(
        manifest=languages_bundle.manifest, streams=[], error=None, active=0, peak=0, closed=0, loaded=None
    )

    def astream(**options: Any) -> Stream:
        model.streams.append(Stream(model, options))
        return model.streams[-1]

    def load(*arguments: Any, **options: Any) -> Any:
        model.loaded = arguments, options
        return model

    def close() -> None:
        model.closed += 1

    model.astream, model.close = astream, close
    monkeypatch.setattr("nemostream.load", load)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fakes.triton_utils())
    return model


@pytest.fixture
def initialized(model: Any) -> Iterator[Callable[..., triton.TritonPythonModel]]:
    """A function that returns an initialized backend. It is finalized at the end, if the test does not do that."""
    backends: list[triton.TritonPythonModel] = []

    def initialize(outputs: Any = ("TEXT", "WORD_STARTS", "LANGUAGE"), **parameters: str) -> triton.TritonPythonModel:
        config = {
            "max_batch_size": 9,
            "parameters": {name: {"string_value": value} for name, value in (PARAMETERS | parameters).items()},
            "output": [{"name": name} for name in outputs],
        }
        backend = triton.TritonPythonModel()
        arguments = {"model_config": json.dumps(config), "model_repository": "/models/nemostream", "model_version": "3"}
        backend.initialize(arguments)
        backends.append(backend)
        return backend

    yield initialize
    for backend in backends:
        if not backend._loop.is_closed():
            backend.finalize()


def request(name: int, samples: int = 5, start: int = 0, end: int = 0, parameters: Any = None) -> Any:
    text = parameters if isinstance(parameters, str) else json.dumps(parameters) if parameters else ""
    return SimpleNamespace(
        AUDIO=np.zeros((1, samples), np.float32),
        START=np.array([[start]]),
        END=np.array([[end]]),
        correlation_id=lambda: name,
        parameters=lambda: text,
    )


def text(response: Any) -> str:
    return str(response["TEXT"][0, 0].decode()) if isinstance(response, dict) else str(response)


def test_the_model_is_loaded_with_the_parameters(model: Any, initialized: Any) -> None:
    initialized()
    empty = {"device": "cpu", "precision": None, "engines": None, "threads": None, "max_batch": None}
    assert model.loaded == ((Path("/models/nemostream/3/bundle"), 160), {"capacity": 25} | empty)
    values = {"device": "cuda", "precision": "fp16", "engines": "/engines", "threads": "5", "max_batch": "7"}
    backend = initialized(**values, language="de")
    assert model.loaded[1] == {"capacity": 25} | values | {"threads": 5, "max_batch": 7}
    backend.finalize()
    assert model.closed == 1
    with pytest.raises(OptionError, match="'xx'"):
        initialized(language="xx")


def test_a_sequence_is_a_stream(model: Any, initialized: Any) -> None:
    backend = initialized(language="de")
    first, second = backend.execute([request(1, start=1), request(2, 7, 1, parameters={"chunk_ms": 80})])
    assert (text(first), text(second), model.peak) == ("5", "7", 2)  # requests of a call share steps
    assert [stream.options for stream in model.streams] == [
        {"chunk_ms": None, "language": "de"},
        {"chunk_ms": 80, "language": "de"},
    ]
    (response,) = backend.execute([request(1, 3)])
    assert response["TEXT"].tolist() == [[b"5 3"]] and response["WORD_STARTS"].tolist() == [[0.0, 0.5]]
    assert response["WORD_STARTS"].dtype == np.float32 and response["LANGUAGE"].tolist() == [[b"de"]]
    (last,) = backend.execute([request(1, 0, end=1)])
    assert text(last) == "5 3 end"
    (closed,) = backend.execute([request(1)])
    assert closed == "the sequence is not open: it failed, or was idle for too long; start a new one."
    (whole,) = backend.execute([request(3, 4, 1, 1)])
    assert text(whole) == "4 end" and not model.streams[1].closed


def test_a_sequence_that_starts_again_is_a_new_stream(model: Any, initialized: Any) -> None:
    backend = initialized()
    backend.execute([request(1, start=1)])
    (again,) = backend.execute([request(1, 6, 1)])
    assert text(again) == "6" and [stream.closed for stream in model.streams] == [1, 0]


def test_the_language_of_a_sequence_can_be_changed(model: Any, initialized: Any) -> None:
    backend = initialized(language="de")
    backend.execute(
        [request(1, start=1, parameters={"language": "ar"}), request(2, start=1, parameters={"language": ""})]
    )
    assert [stream.options["language"] for stream in model.streams] == ["ar-AR", "de-DE"]
    backend.execute([request(1, parameters={"language": "en"})])
    assert [stream.language for stream in model.streams] == ["en-US", "de-DE"]
    model.streams[0].language = None  # not detected yet
    assert backend.execute([request(1)])[0]["LANGUAGE"].tolist() == [[b""]]
    assert initialized()._language is None


def test_earlier_configurations_have_no_output_for_the_language(model: Any, initialized: Any) -> None:
    (response,) = initialized(outputs=("TEXT", "WORD_STARTS")).execute([request(1, start=1)])
    assert set(response) == {"TEXT", "WORD_STARTS"}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [("{", "the request's parameters are not JSON"), ({"language": "xx"}, "'xx'"), ({"language": 7}, "language is 7")],
)
def test_invalid_parameters_leave_the_sequence_open(
    model: Any, initialized: Any, parameters: Any, message: str
) -> None:
    backend = initialized()
    backend.execute([request(1, start=1)])
    assert message in backend.execute([request(1, parameters=parameters)])[0]
    assert text(backend.execute([request(1, 3)])[0]) == "5 3" and not model.streams[0].closed
    assert message in backend.execute([request(1, end=1, parameters=parameters)])[0]  # Triton has ended the sequence
    assert model.streams[0].closed == 1 and "not open" in backend.execute([request(1)])[0]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AudioError("NaN."), "NaN."),
        (ZeroDivisionError("x"), "the stream failed (ZeroDivisionError('x')); start a new sequence."),
    ],
)
def test_an_error_ends_its_sequence(model: Any, initialized: Any, error: Any, message: str) -> None:
    backend = initialized()
    backend.execute([request(1, start=1)])
    model.error = error
    assert backend.execute([request(1)]) == [message] and model.streams[0].closed == 1
    model.error = None
    assert "not open" in backend.execute([request(1)])[0]


def test_sequences_that_triton_ended_are_closed(model: Any, initialized: Any, clock: Any) -> None:
    """After twice Triton's idle timeout, which is 30 s."""
    backend = initialized()
    for name, at in ((1, 0), (2, 10)):
        clock.now = at
        backend.execute([request(name, start=1)])
    clock.now = 60
    backend.execute([request(3, start=1)])
    assert [stream.closed for stream in model.streams] == [0, 0, 0]
    clock.now = 60.5
    assert "not open" in backend.execute([request(1)])[0]
    assert [stream.closed for stream in model.streams] == [1, 0, 0]
    backend.execute([request(2)])
    clock.now = 120
    backend.execute([request(2)])
    assert [stream.closed for stream in model.streams] == [1, 0, 0]
