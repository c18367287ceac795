"""A trained model whose words depend on the prompt: `examples/two_languages`, with recordings of two speakers.

It writes spoken digits in English or in German, and with `auto` in the language that it assigns to the voice.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

import nemostream
from nemostream.bundle import Bundle
from nemostream.runtime.model import Model

pytest.importorskip("onnx", reason="exporting a bundle needs onnx")

from nemostream.export import export_checkpoint

FOLDER = Path(__file__).parents[1] / "examples" / "two_languages"
WORDS = {
    "en-US": "one two three four five six seven eight nine zero",
    "de-DE": "eins zwei drei vier fünf sechs sieben acht neun null",
}
RATE = 16000
PAUSE = 0.6  # seconds after the last sound of a group by which its tag has been emitted

Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_checkpoint(FOLDER / "two_languages.nemo", tmp_path_factory.mktemp("bundle") / "two_languages")


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> Iterator[Model]:
    with nemostream.load(bundle.path, capacity=4, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def recordings() -> dict[str, Floats]:
    """Recordings by the language that `auto` detects: each has all digits in three groups."""
    return {
        language: soundfile.read(FOLDER / f"{name}.flac", dtype="float32")[0]
        for language, name in (("en-US", "english"), ("de-DE", "german"))
    }


def text_of(language: str, first: int = 0, last: int = 10) -> str:
    return " ".join(WORDS[language].split()[first:last])


@pytest.mark.parametrize("ms", [80, 320, 560, 1120])
@pytest.mark.parametrize("voice", WORDS)
@pytest.mark.parametrize("language", WORDS)
def test_the_language_of_the_words_is_that_of_the_prompt(
    language: str, voice: str, ms: int, model: Model, recordings: dict[str, Floats]
) -> None:
    result = model.transcribe(recordings[voice], language=language, chunk_ms=ms)
    assert result.text == text_of(language)
    assert result.language == language
    assert {word.language for word in result.words} == {None}  # no tags


@pytest.mark.parametrize("ms", [80, 320, 560, 1120])
@pytest.mark.parametrize("voice", WORDS)
def test_auto_detects_the_language_of_the_voice(
    voice: str, ms: int, model: Model, recordings: dict[str, Floats]
) -> None:
    """Each of the three groups of digits ends with a tag, which is no part of the text."""
    result = model.transcribe(recordings[voice], language="auto", chunk_ms=ms)
    assert result.text == text_of(voice)
    assert [token.language for token in result.tokens].count(voice) == 3
    assert result.language == voice
    assert [word.language for word in result.words] == [voice] * 10


def test_auto_reports_a_change_of_the_voice(model: Model, recordings: dict[str, Floats]) -> None:
    """One stream with both recordings: the language changes with the first tag of the second one.

    The model omits digits of the second voice, because it was not trained with two voices in one recording.
    """
    with model.stream(language="auto") as stream:
        assert stream.language == "auto" and stream.result.language is None
        stream.push(recordings["en-US"])
        stream.push(recordings["de-DE"])
        result = stream.finish()
    assert result.text.startswith(text_of("en-US") + " ")
    assert [word.language for word in result.words[:10]] == ["en-US"] * 10
    second = result.words[10:]
    assert len(second) >= 5 and {word.language for word in second} == {"de-DE"}
    assert {word.text for word in second} <= set(WORDS["de-DE"].split())
    assert result.language == "de-DE"


@pytest.mark.parametrize("ms", [80, 560])
def test_set_language_changes_the_words_after_it(ms: int, model: Model, recordings: dict[str, Floats]) -> None:
    """The language is set in the pause after the third digit, and again after the seventh."""
    audio = recordings["en-US"]
    third, seventh = (
        round((word.end + PAUSE) * RATE)
        for word in (model.transcribe(audio, language="en-US", chunk_ms=80).words[n] for n in (2, 6))
    )
    with model.stream(language="en", chunk_ms=ms) as stream:
        stream.push(audio[:third])
        stream.set_language("de")
        assert stream.language == "de-DE"
        stream.push(audio[third:seventh])
        stream.set_language("en-US")
        stream.push(audio[seventh:])
        result = stream.finish()
    assert result.text == " ".join([text_of("en-US", 0, 3), text_of("de-DE", 3, 7), text_of("en-US", 7)])
    assert result.language == "en-US"


def test_streams_of_several_languages_side_by_side(model: Model, recordings: dict[str, Floats]) -> None:
    """Steps of the four streams run in common batches; each has the result of its own."""
    languages = ("en-US", "de-DE", "auto", "de")
    streams = [model.stream(language=language) for language in languages]
    for part in np.array_split(recordings["de-DE"], 12):
        for stream in streams:
            stream.push(part)
    results = [stream.finish() for stream in streams]
    assert [result.text for result in results] == [text_of(name) for name in ("en-US", "de-DE", "de-DE", "de-DE")]
    assert [result.language for result in results] == ["en-US", "de-DE", "de-DE", "de-DE"]
    for language, result in zip(languages, results, strict=True):
        alone = model.transcribe(recordings["de-DE"], language=language)
        assert [token.id for token in result.tokens] == [token.id for token in alone.tokens]


def test_languages_of_the_bundle(bundle: Bundle, model: Model) -> None:
    assert bundle.manifest.languages.count == 4
    assert model.languages == ("en-US", "de-DE", "auto")
    with pytest.raises(nemostream.OptionError, match="fr"):
        model.stream(language="fr")


@pytest.mark.nemo
@pytest.mark.parametrize("language", ["en-US", "de-DE", "auto"])
def test_tokens_equal_nemo(language: str, bundle: Bundle, model: Model, recordings: dict[str, Floats]) -> None:
    torch, models = pytest.importorskip("torch"), pytest.importorskip("nemo.collections.asr.models")
    nemo = models.ASRModel.restore_from(str(FOLDER / "two_languages.nemo"), map_location="cpu").eval()
    nemo.preprocessor.featurizer.dither = 0.0
    nemo.encoder.set_default_att_context_size([56, 6])
    nemo.set_inference_prompt(language)
    for audio in recordings.values():
        with torch.inference_mode():
            samples, length = torch.from_numpy(audio)[None], torch.tensor([len(audio)])
            mel, length = nemo.preprocessor(input_signal=samples, length=length)
            encoded, length = nemo.encoder(audio_signal=mel, length=length)
            encoded = nemo._apply_prompt_to_encoded(encoded)
            (expected,) = nemo.decoding.rnnt_decoder_predictions_tensor(encoded, length, return_hypotheses=True)
        result = model.transcribe(audio, language=language, chunk_ms=560)
        assert [token.id for token in result.tokens] == expected.y_sequence.tolist()
