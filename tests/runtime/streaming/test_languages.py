"""The language of a stream: which chunks have which prompt id, who rejects a language, what results and words report.

With a fake backend whose tokens encode the audio and the prompt id of every frame. `tests/test_languages.py` has the
tests with a real model.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import re
import threading
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemostream.bundle import Bundle, LanguageConfig
from nemostream.errors import OptionError
from nemostream.runtime.model import Model
from nemostream.runtime.streaming import snapshot
from nemostream.runtime.streaming.chunker import Chunker
from nemostream.runtime.text.words import group_words

LANGUAGES = LanguageConfig("de-DE", {"en-US": 0, "en": 0, "de-DE": 3, "de": 3, "fr-FR": 4, "auto": 6}, 7)
NAMES = ("en-US", "de-DE", "fr-FR", "auto")
LEAD = 1081  # samples of silence before a stream


def noise(seed: int, samples: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


def ids(result) -> list[int]:
    return [token.id for token in result.tokens]


@pytest.fixture(scope="module")
def prompted(bundle) -> Bundle:
    return Bundle(bundle.path, dataclasses.replace(bundle.manifest, languages=LANGUAGES))


@pytest.fixture
def backend(prompted, fake):
    return fake.FakeBackend(prompted.manifest, capacity=3, max_batch=3)


@pytest.fixture
def model(prompted, backend) -> Iterator[Model]:
    with Model(prompted, backend) as model:
        yield model


def prompts_of_frames(fake, samples: int, frames: int, changes: list[tuple[int, str]]) -> list[int]:
    """Return the prompt id of every frame of a stream with chunks of `frames`.

    `changes` are languages, each set when that many samples had been pushed; the first is the one it was opened with. A
    chunk has the language that was set when its last sample was pushed.
    """
    found: list[int] = []
    for chunk in range(-(-fake.encoder_frames(samples) // frames)):
        complete = (chunk + 1) * frames * 1280 - LEAD
        found += [LANGUAGES.prompt([name for at, name in changes if at < complete][-1])] * frames
    return found


# -- chunks ------------------------------------------------------------------------------------------------------------


CLIENT = st.tuples(
    st.sampled_from([80, 160, 560]), st.lists(st.tuples(st.integers(0, 9000), st.sampled_from(NAMES)), min_size=1)
)


@given(clients=st.lists(CLIENT, min_size=1, max_size=3), size=st.integers(100, 9000), overlap=st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_chunk_has_the_language_that_was_set_when_it_was_complete(prompted, fake, clients, size, overlap):
    """Streams with changing languages side by side, pushed in parts of any size."""
    backend = fake.FakeBackend(prompted.manifest, capacity=3, max_batch=3)
    backend.asynchronous = overlap
    with Model(prompted, backend) as model:
        streams, changes = [], []
        for ms, steps in clients:
            streams.append(model.stream(chunk_ms=ms, language=steps[0][1]))
            changes.append([(0, steps[0][1])])
        pushed = [np.zeros(0, np.float32)] * len(clients)
        for number, steps in enumerate(itertools.zip_longest(*(steps for _, steps in clients))):
            for client, step in enumerate(steps):
                if step is None:
                    continue
                length, name = step
                audio = noise(100 * client + number, length)
                for at in range(0, length, size):
                    streams[client].push(audio[at : at + size])
                pushed[client] = np.concatenate([pushed[client], audio])
                streams[client].set_language(name)
                changes[client].append((len(pushed[client]), name))
                assert streams[client].language == name
        for (ms, _), stream, audio, changed in zip(clients, streams, pushed, changes, strict=True):
            prompts = prompts_of_frames(fake, len(audio), ms // 80, changed)
            wanted, _ = fake.expected(audio, prompted.manifest.decoder.vocabulary, prompts)
            assert ids(stream.finish()) == wanted


def test_rows_of_all_languages_share_a_batch(model, backend):
    blocked, released = threading.Event(), threading.Event()

    def block(batch) -> None:
        blocked.set()
        assert released.wait(20)

    backend.on_submit = block
    sessions = [model.open_session(16000, 1, language=name) for name in ("fr", "auto", None)]
    sessions[0].feed(noise(0, 9000))
    assert blocked.wait(20)
    for session in sessions:  # while the first step runs
        session.feed(noise(0, 9000))
    released.set()
    for session in sessions:
        session.wait()
    assert backend.prompts == [[4], [4, 6, 3]]


class Passes:
    """A filter that passes every chunk from sample `begin` on."""

    lead_ms = 1000

    def __init__(self, begin: int) -> None:
        self.begin = begin

    def passes(self, begin: int, end: int) -> bool:
        return begin >= self.begin

    def restart(self, at: int) -> None: ...


def test_a_chunk_that_a_filter_holds_back_keeps_its_language(prompted):
    manifest = prompted.manifest
    chunker = Chunker(manifest, manifest.chunk(80), Passes(30 * 1280), prompt=0)
    for second, prompt in enumerate((0, 3, 4, 6)):
        chunker.prompt = prompt
        chunker.accept(noise(second, 10 * 1280))
        if second == 2:
            reloaded = Chunker(manifest, manifest.chunk(80), Passes(30 * 1280))
            items = chunker.take()
            reloaded.load(chunker.save())
            chunker = reloaded
    chunker.finish()
    items += chunker.take()
    complete = [(number + 1) * 1280 - LEAD for number in range(len(items))]  # samples of the stream
    assert [item.prompt for item in items] == [(0, 3, 4, 6)[min((at - 1) // 12_800, 3)] for at in complete]
    assert {item.prompt for item in items if item.kind == "skip"} == {0, 3}
    assert [item.prompt for item in items if item.kind == "run"][:4] == [0, 3, 3, 4]  # the first, and the lead


# -- which languages ---------------------------------------------------------------------------------------------------


def test_names_of_languages(model, bundle, fake):
    assert model.languages == NAMES
    for name, canonical in {"de": "de-DE", "EN_us": "en-US", "fr": "fr-FR", "auto": "auto", None: "de-DE"}.items():
        with model.stream(language=name) as stream:
            assert stream.language == canonical
            assert stream.result.language == (None if canonical == "auto" else canonical)
    with Model(bundle, fake.FakeBackend(bundle.manifest)) as english, english.stream(language="en-GB") as stream:
        assert (english.languages, stream.language, stream.finish().language) == (("en",), "en", "en")


def test_an_unknown_language_is_rejected_before_a_slot_is_taken(model, bundle, fake):
    audio, message = noise(0, 9000), "language is 'fe-FR', which this model does not support; similar ones are fr-FR"
    for _ in range(4):  # more often than there are slots
        for open_ in (
            model.stream,
            model.astream,
            lambda **options: model.transcribe(audio, **options),
            lambda **options: list(model.listen(audio, **options)),
        ):
            with pytest.raises(OptionError, match=message):
                open_(language="fe-FR")
            with pytest.raises(OptionError, match="language is 3; it must be a text"):
                open_(language=3)
        (error,) = model.transcribe_many([audio], language="fe-FR")
        assert isinstance(error, OptionError) and re.search(message, str(error))
    assert len([model.stream() for _ in range(3)]) == 3
    with (
        Model(bundle, fake.FakeBackend(bundle.manifest)) as english,
        pytest.raises(OptionError, match="language is 'de'; this model supports 'en' only"),
    ):
        english.stream(language="de")


def test_a_rejected_change_leaves_the_stream_as_it_was(model, fake):
    audio = noise(1, 40_000)
    with model.stream(language="fr") as stream:
        stream.push(audio[:20_000])
        for name in ("xx", 3):
            with pytest.raises(OptionError, match="language is"):
                stream.set_language(name)
        assert stream.language == "fr-FR"
        stream.push(audio[20_000:])
        wanted, _ = fake.expected(audio, model.manifest.decoder.vocabulary, [4] * 40)
        assert ids(stream.finish()) == wanted
        stream.set_language("de")  # after the end it has no effect
        assert stream.finish().language == "fr-FR"


def test_every_interface_has_the_language(model, backend, fake):
    audio, vocabulary = noise(2, 60_000), model.manifest.decoder.vocabulary
    wanted, _ = fake.expected(audio, vocabulary, [4] * 60)
    assert ids(model.transcribe(audio, language="fr")) == wanted
    assert [ids(result) for result in model.transcribe_many([audio, audio], language="fr")] == [wanted] * 2
    finals = [event for event in model.listen(audio, language="fr") if event.kind == "final"]
    assert [token.id for event in finals for token in event.tokens] == wanted

    async def change() -> tuple[list[int], str]:
        async with model.astream(language="fr") as stream:
            await stream.push(audio[:30_000])
            stream.set_language("de")
            await stream.push(audio[30_000:])
            return ids(await stream.finish()), stream.language

    prompts = prompts_of_frames(fake, 60_000, 7, [(0, "fr"), (30_000, "de")])
    assert asyncio.run(change()) == (fake.expected(audio, vocabulary, prompts)[0], "de-DE")


def test_the_language_continues_after_an_end_of_utterance_and_silence(model, backend):
    with model.stream(language="fr") as stream:
        stream.push(noise(3, 20_000))
        stream.end_utterance()
        stream.push(np.concatenate([noise(4, 20_000), np.zeros(16000 * 30, np.float32), noise(5, 20_000)]))
        stream.finish()
    assert {prompt for rows in backend.prompts for prompt in rows} == {4}


# -- snapshots ---------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.fixture
def state(model, tmp_path, monkeypatch):
    """The file of a snapshot of 20 s of a recording of 60 s in French."""
    monkeypatch.setattr(snapshot, "SECONDS", 0.0)
    path = tmp_path / "state"

    def stop(seconds: float) -> None:
        if seconds > 20:
            raise Interrupted

    with pytest.raises(Interrupted):
        model.transcribe(noise(6, 16000 * 60), resume=path, on_progress=stop, language="fr")
    return path


def test_a_resumed_transcription_has_the_same_language(model, backend, state):
    audio = noise(6, 16000 * 60)
    for language, message in ((None, "'fr-FR', not 'de-DE'"), ("en", "'fr-FR', not 'en-US'")):
        with pytest.raises(OptionError, match=f"was written with language {message}"):
            model.transcribe(audio, resume=state, language=language)
    backend.prompts.clear()
    resumed = model.transcribe(audio, resume=state, language="fr-FR")
    assert 0 < len(backend.prompts) < 100 and {prompt for rows in backend.prompts for prompt in rows} == {4}
    assert resumed == model.transcribe(audio, language="fr")


def test_a_restored_stream_has_the_language_in_effect_at_the_snapshot(model, tmp_path):
    """`transcribe` cannot change the language, but sessions can."""
    checkpointer, audio = snapshot.Checkpointer(tmp_path / "state", {}), noise(7, 40_000)
    with closing(model.open_session(16000, 1, language="fr", checkpointer=checkpointer)) as session:
        session.feed(audio[:9000])
        session.set_language("de")
        session.feed(audio[9000:18_000])
        session.wait()
        assert session.result.language == "de-DE"  # of the last chunk, although the results are not collected yet
        assert [result.language for result in session.collect()] == ["fr-FR", "de-DE"]
        checkpointer.save(session.save())
    with closing(model.open_session(16000, 1, language="fr", checkpointer=checkpointer)) as session:
        assert session.language == session.result.language == "de-DE"
        for begin, end in ((0, 9000), (9000, 18_000), (18_000, 40_000)):  # the same blocks
            session.feed(audio[begin:end])
        session.finish()
        session.wait()
        assert {result.language for result in session.collect()} == {session.final().language} == {"de-DE"}


@pytest.mark.parametrize("prompts", [[1], [-1], [7], [], [4, 4], [4.0]])
def test_a_snapshot_with_other_prompt_ids_is_rejected(prompted, bundle, prompts):
    chunk = prompted.manifest.chunk(560)
    saved = Chunker(prompted.manifest, chunk, prompt=4).save()
    chunker = Chunker(prompted.manifest, chunk)
    with pytest.raises(ValueError, match="prompts"):
        chunker.load({**saved, "prompts": np.array(prompts, np.int64 if prompts != [4.0] else np.float64)})
    with pytest.raises(ValueError, match="prompts are"):
        Chunker(bundle.manifest, chunk).load(saved)  # a model of one language


# -- what is reported --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detecting(tmp_path_factory, manifest) -> Bundle:
    """A bundle whose vocabulary has language tags. The fake backend emits them at random."""
    from io import BytesIO

    data, path = BytesIO(), tmp_path_factory.mktemp("detecting")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["yes no go on stop wait now"] * 20),
        model_writer=data,
        vocab_size=40,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=["<en-US>", "<de-DE>", "<fr-FR>"],
    )
    (path / "tokenizer.model").write_bytes(data.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=data.getvalue()).get_piece_size()
    decoder = dataclasses.replace(manifest.decoder, vocabulary=pieces)
    return Bundle(path, dataclasses.replace(manifest, languages=LANGUAGES, decoder=decoder))


@pytest.mark.parametrize("overlap", [False, True])
def test_results_report_the_last_tag_or_the_language_that_was_set(detecting, fake, overlap):
    backend = fake.FakeBackend(detecting.manifest)
    backend.asynchronous = overlap
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(detecting.path / "tokenizer.model")).id_to_piece
    audio, seen = noise(9, 16000 * 12), set()
    with Model(detecting, backend) as model, model.stream(chunk_ms=80, language="auto") as stream:
        for at in range(0, len(audio), 3000):
            for result in stream.push(audio[at : at + 3000]):
                tags = [name[1:-1] for token in result.tokens if "-" in (name := pieces(token.id))]
                assert result.language == (tags[-1] if tags else None)
                seen.add(result.language)
                if tags:
                    assert "<" not in result.text
        assert seen == {None, "en-US", "de-DE", "fr-FR"} and stream.language == "auto"
        before = stream.result.language
        stream.set_language("fr")
        assert stream.result.language == before  # of the last chunk
        assert {result.language for result in stream.push(audio[:9000])} == {"fr-FR"}
        stream.set_language("auto")
        (*_, last), final = stream.push(audio[:9000]), stream.finish()
        tags = [pieces(token.id)[1:-1] for token in final.tokens if "-" in pieces(token.id)]
        assert last.language is not None and final.language == tags[-1]
        assert {word.language for word in final.words} == {"en-US", "de-DE", "fr-FR", None}
        assert final.words == group_words(final.tokens)
