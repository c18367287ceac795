"""The public Python API: names, help, kinds of sources, errors, times within the recording."""

from __future__ import annotations

import inspect
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

import nemostream
from nemostream.errors import AudioError, OptionError
from nemostream.runtime.text.formats import Transcript, ctm, srt, transcript_to_dict, vtt

RATE = 16000


@pytest.fixture(scope="module")
def model() -> Iterator[nemostream.Model]:
    with nemostream.load(capacity=4, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return soundfile.read(nemostream.demo_clip(), dtype="float32")[0]


@pytest.fixture(scope="module")
def content() -> bytes:
    return nemostream.demo_clip().read_bytes()


# -- names and options -------------------------------------------------------------------------------------------------


def test_dir_lists_only_public_names() -> None:
    assert dir(nemostream) == sorted(nemostream.__all__)
    for name in dir(nemostream):
        assert getattr(nemostream, name) is not None


OPTIONS = ("chunk_ms", "endpoint", "phrases", "confidence", "vad")
METHODS = ("stream", "astream", "listen", "transcribe", "transcribe_many")


@pytest.mark.parametrize("name", METHODS)
def test_help_shows_every_option(model: nemostream.Model, name: str) -> None:
    method = getattr(model, name)
    parameters = inspect.signature(method).parameters
    assert not any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    shown = inspect.getdoc(method) or ""
    for option in OPTIONS:
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
        assert re.search(rf"^{option}: ", shown, re.MULTILINE), option
    assert parameters["vad"].default is False and parameters["chunk_ms"].default is None


def call(model: nemostream.Model, name: str, audio: Any, **options: Any) -> Any:
    method = getattr(model, name)
    if name in ("stream", "astream"):
        return method(**options).close()
    if name == "transcribe_many":
        return list(method([audio], **options))
    return list(method(audio, **options)) if name == "listen" else method(audio, **options)


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_option_lists_the_valid_ones(model: nemostream.Model, clip: np.ndarray, name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}\(\) has no option 'voice'; its options are") as caught:
        call(model, name, clip, voice=1)
    for option in ("sample_rate", *OPTIONS):
        assert option in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("sample_rate", "16000"),
        ("sample_rate", None),
        ("sample_rate", True),
        ("endpoint", 800),
        ("confidence", "max_prob"),
        ("chunk_ms", "560"),
    ],
)
def test_a_value_of_the_wrong_type_is_an_option_error(
    model: nemostream.Model, clip: np.ndarray, name: str, option: str, value: object
) -> None:
    with pytest.raises(OptionError, match=re.escape(repr(value))):
        results = call(model, name, clip[:8000], **{option: value})
        raise results[0]  # `transcribe_many` yields the error instead of the result


@pytest.mark.parametrize("rate", [0, -1, 3999, 768_001, 10**30, float("nan"), float("inf"), 16000.5])
@pytest.mark.parametrize("name", METHODS)
def test_a_sample_rate_out_of_range_is_rejected(
    model: nemostream.Model, clip: np.ndarray, name: str, rate: float
) -> None:
    with pytest.raises(OptionError, match=r"sample_rate is .*; it must be an integer from 4000 to 768000 \(Hz\)"):
        raise call(model, name, clip[:8000], sample_rate=rate)[0]


@pytest.mark.parametrize("option", ["capacity", "threads", "max_batch", "delay_ms", "chunk_ms"])
@pytest.mark.parametrize("value", ["4", 2.5])
def test_load_rejects_options_that_are_not_numbers(option: str, value: object) -> None:
    with pytest.raises(OptionError, match=re.escape(repr(value))):
        nemostream.load(**{option: value})  # type: ignore[arg-type]


def test_numpy_numbers_are_accepted(model: nemostream.Model, clip: np.ndarray) -> None:
    result = model.transcribe(clip, sample_rate=np.int64(RATE), chunk_ms=np.int64(560))  # type: ignore[arg-type]
    assert result == model.transcribe(clip)
    with pytest.raises(OptionError, match="channels is '1'"):
        model.stream(channels="1")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="together is '4'"):
        list(model.transcribe_many([clip], together="4"))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="resume is 7; it must be the path"):
        model.transcribe(clip, resume=7)  # type: ignore[arg-type]


@pytest.mark.parametrize("audio", [np.array(0.5), np.float32(0.5), np.zeros((2, 2, 2), np.float32)])
def test_an_array_of_the_wrong_shape_is_rejected(model: nemostream.Model, audio: Any) -> None:
    for act in (model.transcribe, lambda audio: list(model.listen(audio))):
        with pytest.raises(AudioError):
            act(audio)
    (error,) = model.transcribe_many([audio])
    assert isinstance(error, AudioError)
    with model.stream() as stream, pytest.raises(AudioError):
        stream.push(audio)


# -- bytes and file objects --------------------------------------------------------------------------------------------


class Pipe:
    """A binary file object that can only be read, in small blocks, and not seeked."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(min(size, 1000) if size > 0 else -1)


SOURCES: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "BytesIO": io.BytesIO,
    "pipe": Pipe,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_the_content_of_a_file_is_transcribed_like_the_file(model: nemostream.Model, content: bytes, kind: str) -> None:
    wanted = model.transcribe(nemostream.demo_clip())
    assert wanted.text.startswith("After the tone")
    assert model.transcribe(SOURCES[kind](content)) == wanted
    assert list(model.transcribe_many([SOURCES[kind](content)])) == [wanted]
    finals = [event.text for event in model.listen(SOURCES[kind](content)) if event.kind == "final"]
    assert finals == [wanted.text]


def test_file_objects_are_read_from_their_position_and_not_closed(
    model: nemostream.Model, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "two"
    path.write_bytes(b"header" + content)
    with path.open("rb") as file:
        file.read(6)
        assert model.transcribe(file).text == model.transcribe(nemostream.demo_clip()).text
        assert not file.closed
    reader, writer = os.pipe()
    thread = threading.Thread(target=lambda: (os.write(writer, content), os.close(writer)))
    thread.start()
    with os.fdopen(reader, "rb") as file:
        assert model.transcribe(file).text == model.transcribe(nemostream.demo_clip()).text
    thread.join()


def test_unreadable_content_is_rejected(
    model: nemostream.Model, clip: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pcm = (clip * 32767).astype("<i2").tobytes()
    for source, message in (
        (b"", "the audio given as bytes is empty"),
        (io.BytesIO(), "the file object is empty"),
        (pcm, "the audio given as bytes cannot be read as audio"),
        (io.BytesIO(pcm), "the file object cannot be read as audio"),
        (io.StringIO("text"), "returns str, not bytes; open it with 'rb'"),
    ):
        for act in (model.transcribe, lambda source: list(model.listen(source))):
            if hasattr(source, "seek"):
                source.seek(0)
            with pytest.raises(AudioError, match=message):
                act(source)
    assert not list(tmp_path.iterdir())  # temporary files
    for other in (7, None, [0.1, 0.2]):
        with pytest.raises(AudioError, match=r"must be a path, a numpy array, the bytes of an audio file .*, not"):
            model.transcribe(other)  # type: ignore[arg-type]


# -- times -------------------------------------------------------------------------------------------------------------


def to_seconds(stamp: str) -> float:
    hours, minutes, seconds = stamp.replace(",", ".").split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


@pytest.mark.parametrize("ms", [80, 560])
@pytest.mark.parametrize("rate", [RATE, 44100])
def test_words_end_within_the_recording(model: nemostream.Model, clip: np.ndarray, ms: int, rate: int) -> None:
    """Wherever the recording is cut, also within a frame and after a word."""
    clipped = 0
    for cut in range(RATE, len(clip), 3700):
        audio = clip[:cut] if rate == RATE else soxr.resample(clip[:cut], RATE, rate)
        end = len(audio) / rate
        result = model.transcribe(audio, sample_rate=rate, chunk_ms=ms)
        assert all(token.end <= end for token in result.tokens)
        assert all(word.start <= word.end <= end for word in result.words)
        clipped += any(token.end != pytest.approx(token.time + 0.08) for token in result.tokens)
        events = list(model.listen(audio, sample_rate=rate, chunk_ms=ms))
        finals = [event for event in events if event.kind == "final"]
        for event in finals:
            assert event.start <= event.end <= end and all(word.end <= end for word in event.words)
            assert event.words == event.words[: event.words_from] + event.new_words
        with model.stream(sample_rate=rate, chunk_ms=ms) as stream:  # a forced end, with no audio after it
            stream.push_events(audio)
            forced = stream.end_utterance()
            stream.finish_events()
            assert all(word.end <= end + 1 / RATE for event in forced for word in event.words)
            assert all(word.end <= end + 1 / RATE for word in stream.result.words)
        if not result.words:
            continue
        transcript = Transcript("a.wav", result.text, list(result.words), end, list(result.tokens), ms)
        assert transcript_to_dict(transcript)["words"][-1]["end"] <= end + 0.0005
        *_, start, length, _, _ = ctm(result.words, "a.wav").splitlines()[-1].split()
        assert float(start) + float(length) <= end + 0.001
        for text in (srt(result.words, end), vtt(result.words, end)):
            assert max(to_seconds(stamp) for stamp in re.findall(r"--> ([\d:.,]+)", text)) <= end + 0.001
    assert clipped


# -- digital silence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ms", [80, 160, 560, 1120])
@pytest.mark.parametrize("rate", [RATE, 8000])
def test_minutes_of_digital_silence_change_no_words(
    model: nemostream.Model, clip: np.ndarray, ms: int, rate: int
) -> None:
    audio = clip if rate == RATE else soxr.resample(clip, RATE, rate)
    alone = model.transcribe(audio, sample_rate=rate, chunk_ms=ms)
    assert "busy message and then press the pound key" in alone.text
    for seconds in (60, 150.3):
        silence = np.zeros(round(seconds * rate), np.float32)
        before = model.transcribe(np.concatenate([silence, audio]), sample_rate=rate, chunk_ms=ms)
        assert [word.text for word in before.words] == [word.text for word in alone.words]
        assert [word.start for word in before.words] == pytest.approx(
            [word.start + len(silence) / rate for word in alone.words], abs=1e-3
        )
        within = model.transcribe(np.concatenate([audio, silence, audio]), sample_rate=rate, chunk_ms=ms)
        assert [word.text for word in within.words] == [word.text for word in alone.words] * 2
