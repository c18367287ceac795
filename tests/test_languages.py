"""A prompted model on the CPU backend: tokens equal NeMo's with the prompt of each chunk, whatever runs beside it.

The model is a `EncDecRNNTBPEModelWithPrompt` with random weights, whose tokens depend on the prompt.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import nemostream
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.cli.main import main
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.model import Model
from nemostream.runtime.streaming import snapshot

pytestmark = pytest.mark.nemo

Floats = NDArray[np.float32]
CHUNKS = (80, 560)
PROMPTS = {"en-US": 0, "en": 0, "de-DE": 3, "de": 3, "fr-FR": 4, "auto": 6}
NAMES = ("en-US", "de-DE", "fr-FR", "auto")
SIZES = {"n_layers": 2, "d_model": 32, "n_heads": 2, "conv_channels": 16, "pred_hidden": 24, "joint_hidden": 24}


def ids(result: nemostream.Result) -> list[int]:
    return [token.id for token in result.tokens]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nemostream.benchmarks.harness.synthetic import synthetic_model

    path, contexts = tmp_path_factory.mktemp("prompted") / "model.nemo", ((56, 6), (56, 0))
    return synthetic_model(
        path, like="nemotron-3.5", **SIZES, vocab=700, contexts=contexts, prompts=PROMPTS, num_prompts=7
    )


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Bundle:
    from nemostream.export.bundle import write_bundle
    from nemostream.export.checkpoint import open_checkpoint

    folder = checkpoint.with_name("bundle")
    folder.mkdir()
    written = write_bundle(open_checkpoint(checkpoint, checkpoint.with_name("unpacked")), folder, {})
    assert written.manifest.languages.default == "auto"
    return written


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> Iterator[Model]:
    with nemostream.load(bundle.path, capacity=8, threads=1) as model:
        yield model


class Oracle:
    """NeMo's model of the checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        from nemo.collections.asr.models import ASRModel

        self.model = ASRModel.restore_from(str(checkpoint), map_location="cpu").eval()

    def mel(self, audio: Floats) -> Any:
        import torch

        return self.model.preprocessor(input_signal=torch.from_numpy(audio)[None], length=torch.tensor([len(audio)]))

    def tokens(self, audio: Floats, chunk: ChunkConfig, language: str) -> list[int]:
        """Return the tokens of NeMo's offline forward pass with a prompt."""
        import torch

        self.model.encoder.set_default_att_context_size([chunk.left, chunk.frames - 1])
        with torch.inference_mode():
            mel, length = self.mel(audio)
            encoded, length = self.model.forward(
                processed_signal=mel,
                processed_signal_length=length,
                prompt_indices=torch.tensor([PROMPTS[language]]),
            )
        return self._decode(encoded, length)

    def tokens_of_frames(self, audio: Floats, chunk: ChunkConfig, language_of: Callable[[int], str]) -> list[int]:
        """Return the tokens with a language for each encoder frame, which NeMo's forward pass does not support."""
        import torch

        self.model.encoder.set_default_att_context_size([chunk.left, chunk.frames - 1])
        with torch.inference_mode():
            mel, length = self.mel(audio)
            encoded, length = self.model.encoder(audio_signal=mel, length=length)
            prompts = torch.tensor([PROMPTS[language_of(frame)] for frame in range(encoded.shape[2])])
            one_hot = torch.nn.functional.one_hot(prompts, self.model.num_prompts)[None].to(encoded)
            encoded = self.model.prompt_kernel(torch.cat([encoded.transpose(1, 2), one_hot], dim=2)).transpose(1, 2)
        return self._decode(encoded, length)

    def _decode(self, encoded: Any, length: Any) -> list[int]:
        import torch

        with torch.inference_mode():
            hypotheses = self.model.decoding.rnnt_decoder_predictions_tensor(encoded, length, return_hypotheses=True)
        return [int(token) for token in hypotheses[0].y_sequence]


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Oracle:
    return Oracle(checkpoint)


@pytest.fixture(scope="module")
def audio(clips: dict[str, Floats]) -> Floats:
    return np.concatenate([clips["librivox-sense-0870"], clips["cards-002"]])[: 16000 * 8]


@pytest.mark.parametrize("ms", CHUNKS)
def test_tokens_equal_nemos_in_every_language(ms: int, model: Model, oracle: Oracle, audio: Floats) -> None:
    chunk = model.manifest.chunk(ms)
    wanted = {name: oracle.tokens(audio, chunk, name) for name in NAMES}
    assert {name: ids(model.transcribe(audio, chunk_ms=ms, language=name)) for name in NAMES} == wanted
    assert ids(model.transcribe(audio, chunk_ms=ms)) == wanted["auto"]
    assert len({*map(tuple, wanted.values())}) == len(NAMES) and min(map(len, wanted.values())) >= 5


@pytest.mark.parametrize("ms", CHUNKS)
def test_a_change_of_the_language_equals_nemo(ms: int, model: Model, oracle: Oracle, audio: Floats) -> None:
    """The chunk being filled has the new language, however the audio around the change is pushed."""
    chunk, rng = model.manifest.chunk(ms), np.random.default_rng(ms)
    changes = {0: "fr-FR", 30_011: "auto", 30_700: "en-US", 70_000: "de-DE", 100_001: "fr-FR"}

    def language_of(frame: int) -> str:
        complete = (frame // chunk.frames + 1) * chunk.samples - model.manifest.lead
        return [name for at, name in changes.items() if at < complete][-1]

    wanted = oracle.tokens_of_frames(audio, chunk, language_of)
    assert wanted not in [oracle.tokens(audio, chunk, name) for name in NAMES]
    for _ in range(3):
        with model.stream(chunk_ms=ms) as stream:
            for begin, end in zip(changes, [*[*changes][1:], len(audio)], strict=True):
                stream.set_language(changes[begin])
                while begin < end:
                    size = min(int(rng.integers(1, 9000)), end - begin)
                    stream.push(audio[begin : begin + size])
                    begin += size
            assert ids(stream.finish()) == wanted


@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokens_do_not_depend_on_other_streams_languages_slots_and_pushes(
    data: st.DataObject, model: Model, audio: Floats
) -> None:
    job = st.tuples(st.sampled_from(NAMES), st.sampled_from(CHUNKS), st.integers(0, 30_000), st.integers(500, 30_000))
    jobs = data.draw(st.lists(job, min_size=2, max_size=6))
    order = data.draw(
        st.permutations([i for i, (_, _, begin, size) in enumerate(jobs) for _ in range(40_000 // size + 1)])
    )
    at = [begin for _, _, begin, _ in jobs]
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(model.stream(language=name, chunk_ms=ms)) for name, ms, _, _ in jobs]
        for i in order:
            _, _, begin, size = jobs[i]
            streams[i].push(audio[at[i] : min(at[i] + size, begin + 40_000)])
            at[i] = min(at[i] + size, begin + 40_000)
        got = [ids(stream.finish()) for stream in streams]
    for (name, ms, begin, _), tokens in zip(jobs, got, strict=True):
        assert tokens == ids(model.transcribe(audio[begin : begin + 40_000], language=name, chunk_ms=ms))


def test_a_saved_slot_continues_in_another_slot_and_language(bundle: Bundle, audio: Floats) -> None:
    """Slots hold no language: it comes with every batch, and without one it is the default."""
    chunk, emitted = bundle.manifest.chunk(560), []
    parts = [audio[i * chunk.samples :][: chunk.samples] for i in range(12)]
    for slots in ([0] * 12, [0] * 6 + [2] * 6):
        backend, tokens = OrtBackend(bundle, capacity=3, threads=1), []
        backend.reset(np.arange(3))
        for step, (slot, part) in enumerate(zip(slots, parts, strict=True)):
            if step and slot != slots[step - 1]:
                backend.load(slot, backend.save(slots[step - 1]))
            prompts = None if step % 3 == 2 else np.array([(4, 3)[step % 3]])
            batch = Batch(chunk, np.array([slot]), part[None], np.array([chunk.samples]), prompts)
            tokens.append(backend.submit(batch).result().tokens[0].tolist())
        emitted.append(tokens)
    assert emitted[0] == emitted[1] and sum(map(len, emitted[0])) > 10
    backend.reset(np.arange(3))
    explicit = [
        backend.submit(Batch(chunk, np.array([1]), part[None], np.array([chunk.samples]), np.array([6]))).result()
        for part in parts
    ]
    backend.reset(np.arange(3))
    default = [
        backend.submit(Batch(chunk, np.array([1]), part[None], np.array([chunk.samples]))).result() for part in parts
    ]
    assert [one.tokens[0].tolist() for one in explicit] == [one.tokens[0].tolist() for one in default]


def test_an_interrupted_transcription_continues_in_its_language(
    model: Model, clips: dict[str, Floats], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "SECONDS", 0.0)
    audio, state = np.tile(clips["librivox-sense-0870"], 4), tmp_path / "state"

    class Interrupted(Exception): ...

    def stop(seconds: float) -> None:
        if seconds > 10:
            raise Interrupted

    with pytest.raises(Interrupted):
        model.transcribe(audio, resume=state, on_progress=stop, language="fr")
    wanted = model.transcribe(audio, language="fr")
    assert model.transcribe(audio, resume=state, language="fr") == wanted
    assert ids(wanted) != ids(model.transcribe(audio, language="en"))


def test_command_line(
    bundle: Bundle, model: Model, capfd: pytest.CaptureFixture[str], clips: dict[str, Floats], tmp_path: Path
) -> None:
    import soundfile

    def run(*arguments: object) -> tuple[object, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([*map(str, arguments)])
        return (exited.value.code, *capfd.readouterr())

    path = tmp_path / "a.wav"
    soundfile.write(path, clips["cards-002"], 16000, subtype="FLOAT")
    for name in ("fr", "auto"):
        code, out, _ = run("transcribe", path, "--bundle", bundle.path, "--language", name, "--format", "json")
        wanted = model.transcribe(clips["cards-002"], language=name)
        assert (code, [token["id"] for token in json.loads(out)["tokens"]]) == (0, ids(wanted))
        assert json.loads(out).get("language") == {"fr": "fr-FR", "auto": None}[name]
    code, out, err = run("transcribe", path, "--bundle", bundle.path, "--language", "frr")
    assert (code, out) == (2, "")
    assert "language is 'frr', which this model does not support; similar ones are fr-FR." in " ".join(err.split())
    code, out, _ = run("info", bundle.path)
    assert code == 0 and "languages  auto by default, en-US (en), de-DE (de), fr-FR\n" in out
