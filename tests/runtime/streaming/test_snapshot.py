"""Snapshots of recordings: equal results after interruptions, files of other recordings, malformed files."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemostream.bundle import Bundle
from nemostream.errors import OptionError
from nemostream.runtime.model import Model
from nemostream.runtime.streaming import snapshot
from nemostream.runtime.text.endpointing import Endpoint


class Interrupted(Exception):
    pass


def noise(seed: int, samples: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


@pytest.fixture
def model(bundle, fake):
    with Model(bundle, fake.FakeBackend(bundle.manifest, 2, 2)) as model:
        yield model


@pytest.fixture
def save_every_block(monkeypatch):
    """Save snapshots often, without waiting for the disk."""
    monkeypatch.setattr(snapshot, "SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def interrupted(model: Model, source, state: Path, after: int, **options) -> bool:
    """Transcribe, and fail after `after` blocks. Return whether it failed."""
    remaining = [after]

    def stop(seconds):
        remaining[0] -= 1
        if remaining[0] < 0:
            raise Interrupted

    try:
        model.transcribe(source, resume=state, on_progress=stop, **options)
    except Interrupted:
        return True
    return False


@given(
    samples=st.integers(70_000, 600_000),
    rate=st.sampled_from([16000, 48000, 8000]),
    ms=st.sampled_from([80, 560, 1120]),
    stops=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    endpoint=st.sampled_from([None, Endpoint(decoder="reset")]),
    overlap=st.booleans(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_result_does_not_depend_on_interruptions(
    bundle, fake, tmp_path, save_every_block, samples, rate, ms, stops, endpoint, overlap
):
    backend = fake.FakeBackend(bundle.manifest, 2, 2)
    backend.asynchronous = overlap
    audio, state = noise(samples, samples), tmp_path / "state"
    options = {"sample_rate": rate, "chunk_ms": ms, "endpoint": endpoint, "phrases": ["the fox"]}
    with Model(bundle, backend) as model:
        wanted = model.transcribe(audio, **options)
        for after in stops:
            if interrupted(model, audio, state, after, **options):
                assert state.exists() or after == 0
        partials = []
        assert model.transcribe(audio, resume=state, on_partial=partials.append, **options) == wanted
        assert not state.exists() and not list(tmp_path.iterdir())
    assert all(wanted.tokens[: len(partial.tokens)] == partial.tokens for partial in partials)


def test_a_resumed_transcription_runs_only_the_remaining_audio(model, tmp_path, save_every_block):
    audio, steps, state = noise(0, 16000 * 60), [], tmp_path / "state"
    model.watch(lambda chunk, rows, seconds: steps.append(rows))
    model.transcribe(audio)
    whole, progress = len(steps), []
    assert interrupted(model, audio, state, 10)
    steps.clear()
    model.transcribe(audio, resume=state, on_progress=lambda seconds: progress.append(seconds))
    assert len(steps) < 0.45 * whole
    assert progress[0] > 30 and progress[-1] == 60 and progress == sorted(progress)


def test_progress_estimates_the_remaining_time(model, tmp_path):
    reports = []
    soundfile.write(tmp_path / "a.wav", noise(1, 16000 * 60), 16000)
    for source in (tmp_path / "a.wav", noise(1, 16000 * 60)):
        reports.clear()
        model.transcribe(source, on_progress=reports.append)
        assert all(one.duration == 60 for one in reports) and len(reports) > 5
        assert np.isnan(reports[0].remaining) and reports[-1].remaining == 0 == 60 - reports[-1]
        assert all(one.remaining > 0 for one in reports[1:-2])


def saved(model: Model, audio: np.ndarray, state: Path, **options) -> bytes:
    """Return the content of a snapshot file."""
    assert interrupted(model, audio, state, 2, **options)
    return state.read_bytes()


def test_a_snapshot_of_another_transcription_is_rejected_and_kept(bundle, fake, model, tmp_path, save_every_block):
    audio, state = noise(2, 400_000), tmp_path / "state"
    data = saved(model, audio, state)
    other = audio.copy()
    other[5] += 1
    for source, options, message in (
        (other, {}, "was written for another recording"),
        (audio[:70_000], {}, "was written for another recording"),
        (audio, {"sample_rate": 8000}, "was written with sample_rate 16000, not 8000"),
        (np.stack([audio, audio], 1), {}, "was written with channels 1, not 2"),
        (audio, {"chunk_ms": 80}, "was written with chunk_ms 560, not 80"),
        (audio, {"endpoint": Endpoint()}, "was written with endpoint"),
        (audio, {"phrases": ["fox"]}, "was written with phrases None"),
    ):
        for _ in range(3):  # more often than there are slots
            with pytest.raises(OptionError, match=f"resume: {state} {message}.*; delete it to start over"):
                model.transcribe(source, resume=state, **options)
    renamed = replace(bundle.manifest, name="other")
    for other_model, name in (
        (Model(Bundle(bundle.path, renamed), fake.FakeBackend(renamed)), "model"),
        (Model(bundle, fake.FakeBackend(bundle.manifest), engine="cuda, fp16"), "engine"),
    ):
        with other_model, pytest.raises(OptionError, match=f"was written with {name} "):
            other_model.transcribe(audio, resume=state)
    assert state.read_bytes() == data
    assert model.transcribe(audio, resume=state) == model.transcribe(audio)


def test_a_file_that_is_not_a_snapshot_is_rejected(model, tmp_path, save_every_block):
    audio, state = noise(3, 400_000), tmp_path / "state"
    data = saved(model, audio, state)
    np.savez(tmp_path / "foreign.npz", a=np.zeros(3))
    foreign = (tmp_path / "foreign.npz").read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    for content in (b"", b"junk", data[:-100], data[: len(data) // 2], foreign, bytes(flipped)):
        state.write_bytes(content)
        with pytest.raises(OptionError, match="is damaged or not a snapshot file; delete it to start over"):
            model.transcribe(audio, resume=state)
    with pytest.raises(OptionError, match="there is no folder"):
        model.transcribe(audio, resume=tmp_path / "none" / "state")
    with pytest.raises(OptionError, match="which is a folder; it must be the path of a file"):
        model.transcribe(audio, resume=tmp_path)


def test_a_failed_save_keeps_the_previous_snapshot(model, tmp_path, save_every_block, monkeypatch):
    audio, state = noise(4, 400_000), tmp_path / "state"
    data = saved(model, audio, state)

    def raise_(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot.os, "fsync", raise_)
    with pytest.raises(OSError, match="No space left"):
        model.transcribe(audio, resume=state)
    monkeypatch.undo()
    assert state.read_bytes() == data
    assert model.transcribe(audio, resume=state) == model.transcribe(audio)
    assert not list(tmp_path.iterdir())


def test_every_field_of_the_document_is_checked(model, tmp_path, save_every_block):
    audio, state = noise(8, 400_000), tmp_path / "state"
    options = {"endpoint": Endpoint(), "phrases": ["the fox"]}
    data = saved(model, audio, state, **options)
    with np.load(io.BytesIO(data)) as file:
        document = json.loads(file["document"].tobytes())
    assert document.keys() == {"about", "samples", "digest"}
    assert document["about"].keys() == {
        *("version", "model", "engine", "sample_rate", "channels", "chunk_ms"),
        *("final_chunk_ms", "endpoint", "phrases", "vad", "language"),
    }
    changes = {"another recording": [("digest", "0" * 32), ("digest", "")]}
    changes |= {"is damaged": [("samples", document["samples"] + 1), ("samples", document["samples"] - 1)]}
    for name, value in document["about"].items():
        about = {key: found for key, found in document["about"].items() if key != name}
        other = value + 1 if isinstance(value, int) else f"{value} 2"
        changes[f"was written with {name} "] = [("about", about), ("about", {**about, name: other})]
    for message, documents in changes.items():
        for name, value in documents:
            state.write_bytes(edited_snapshot(data, lambda document, arrays, n=name, v=value: document.update({n: v})))
            with pytest.raises(OptionError, match=message):
                model.transcribe(audio, resume=state, **options)
    state.write_bytes(data)
    assert model.transcribe(audio, resume=state, **options) == model.transcribe(audio, **options)


class PassAll:
    """A filter without a state of interest."""

    lead_ms = 80

    def push(self, samples): ...

    def passes(self, begin, end):
        return True

    def restart(self, at): ...

    def save(self):
        return {"state": np.zeros(1)}

    def load(self, state): ...


def test_what_identifies_a_transcription(bundle, fake, tmp_path, save_every_block, monkeypatch):
    """The same values in another spelling are accepted; other weights under the same name and other filters are not."""
    audio, state = noise(9, 400_000), tmp_path / "state"
    monkeypatch.setattr(Model, "_new_vad_filter", lambda model: PassAll())
    with Model(bundle, fake.FakeBackend(bundle.manifest, 2, 2), chunk_ms=80, engine="cpu") as model:
        saved(model, audio, state, phrases=["the fox"])
        for options in ({"vad": True}, {"phrases": {"the fox": 2.0}}, {"phrases": None}, {"chunk_ms": 160}):
            with pytest.raises(OptionError, match=f"was written with {next(iter(options))} "):
                model.transcribe(audio, resume=state, **{"phrases": ["the fox"], **options})
    weights = replace(bundle.manifest, weights=replace(bundle.manifest.weights, sha256="1" * 64))
    with (
        Model(Bundle(bundle.path, weights), fake.FakeBackend(weights), chunk_ms=80, engine="cpu") as other,
        pytest.raises(OptionError, match="was written with model "),
    ):
        other.transcribe(audio, resume=state, phrases=["the fox"])
    with Model(bundle, fake.FakeBackend(bundle.manifest), chunk_ms=560, engine="cpu") as again:
        options = {"chunk_ms": 80, "phrases": again.compile_phrases({"the fox": 1.0}), "vad": False}
        assert again.transcribe(audio, resume=state, **options) == again.transcribe(audio, **options)


def test_snapshots_are_due_at_a_fixed_interval(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(snapshot.time, "monotonic", lambda: now)
    checkpointer, empty = snapshot.Checkpointer(tmp_path / "state", {}), snapshot.StreamSnapshot({}, 0, "")
    for save_at in (1030.0, 1067.5):
        now = save_at - 0.001
        assert not checkpointer.due
        now = save_at
        assert checkpointer.due
        now += 7.5  # saving is late
        checkpointer.save(empty)
        assert not checkpointer.due


def test_a_snapshot_is_complete_on_disk_before_it_replaces_the_file(tmp_path, monkeypatch):
    checkpointer, synchronized = snapshot.Checkpointer(tmp_path / "state", {}), []

    def fsync(descriptor):
        assert not (tmp_path / "state").exists()
        with np.load(tmp_path / "state.part") as file:
            synchronized.append(file["slot.values"].tolist())

    monkeypatch.setattr(snapshot.os, "fsync", fsync)
    checkpointer.save(snapshot.StreamSnapshot({"slot": {"values": np.arange(3)}}, 0, ""))
    assert synchronized == [[0, 1, 2]] and [path.name for path in tmp_path.iterdir()] == ["state"]
    (tmp_path / "state.part").write_text("of a killed process")
    checkpointer.done()
    assert not list(tmp_path.iterdir())


# -- malformed snapshots -----------------------------------------------------------------------------------------------


def edited_snapshot(data: bytes, change) -> bytes:
    """Return a snapshot file whose document and arrays were modified by `change`, as `Checkpointer.save` writes it."""
    with np.load(io.BytesIO(data)) as file:
        arrays = {name: file[name] for name in file.files}
    document = json.loads(arrays.pop("document").tobytes())
    change(document, arrays)
    out = io.BytesIO()
    np.savez(out, document=np.frombuffer(json.dumps(document).encode(), np.uint8), **arrays)
    return out.getvalue()


def put(name, value):
    return lambda document, arrays: arrays.update({name: value(arrays[name])})


def count(name, index, value):
    def change(document, arrays):
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value

    return change


def without(part):
    def change(document, arrays):
        for name in [name for name in arrays if name.startswith(part)]:
            del arrays[name]

    return change


PARTS = ("chunker", "hypothesis", "guard", "endpoint", "slot", "slot.position", "chunker.counts", "hypothesis.tokens")
MALFORMED_SNAPSHOTS = {
    "no parts": lambda document, arrays: arrays.clear(),
    "another part": lambda document, arrays: arrays.update({"other.counts": np.zeros(1)}),
    **{f"no {part}": without(part) for part in PARTS},
    **{f"chunker.counts[{i}] = {v}": count("chunker.counts", i, v) for i in range(7) for v in (-1, 10**15, 2**62)},
    "a size that is not a chunk size": count("chunker.sizes", 0, 77),
    "no sizes": put("chunker.sizes", lambda array: array[:0]),
    "sizes of millions of chunks": put("chunker.sizes", lambda array: np.full(10**6, 560)),
    "filling": put("chunker.filling", lambda array: array[:-1]),
    "filling in fp64": put("chunker.filling", lambda array: array.astype(float)),
    "filling of NaN": put("chunker.filling", lambda array: array * np.nan),
    "flags": put("chunker.flags", lambda array: array[:1]),
    "flags of another type": put("chunker.flags", lambda array: array.astype(np.int64)),
    "a token below the vocabulary": count("hypothesis.tokens", 0, -1),
    "a token beyond the vocabulary": count("hypothesis.tokens", 0, 10**6),
    "a position before the start": count("hypothesis.sample_positions", 0, -5),
    "fewer scores": put("hypothesis.scores", lambda array: array[1:]),
    "scores of NaN": put("hypothesis.scores", lambda array: array * np.nan),
    "tokens in two dimensions": put("hypothesis.tokens", lambda array: array[None]),
    "an endpointer with other tokens": count("endpoint.counts", 0, 10**6),
    "an utterance before the start": count("endpoint.counts", 1, -7),
    "counts of utterances": put("endpoint.counts", lambda array: array[:1]),
    "a guard with other tokens": count("guard.counts", 0, 10**6),
    "a position below zero": put("slot.position", lambda array: np.array(-1)),
    "another position": put("slot.position", lambda array: array + 7),
    "positions": put("slot.position", lambda array: np.zeros(5, np.int64)),
    "samples below zero": lambda document, arrays: document.update(samples=-1),
    "samples that are not a number": lambda document, arrays: document.update(samples="5"),
    "samples of 2 ** 60": lambda document, arrays: document.update(samples=2**60),
    "a digest that is not a string": lambda document, arrays: document.update(digest=[1]),
    "about a list": lambda document, arrays: document.update(about=[]),
    "no about": lambda document, arrays: document.pop("about"),
}


@pytest.mark.parametrize("change", MALFORMED_SNAPSHOTS.values(), ids=MALFORMED_SNAPSHOTS.keys())
def test_a_malformed_snapshot_is_an_option_error(model, tmp_path, save_every_block, change):
    audio, state = noise(5, 400_000), tmp_path / "state"
    data = edited_snapshot(saved(model, audio, state, endpoint=Endpoint()), change)
    state.write_bytes(data)
    for _ in range(3):  # more often than there are slots
        with pytest.raises(OptionError, match=r"resume: .*state .*|the saved state is from another model"):
            model.transcribe(audio, resume=state, endpoint=Endpoint())
    assert state.read_bytes() == data
    assert model.transcribe(audio, endpoint=Endpoint()).tokens  # the model still works


def test_damaged_values_and_large_documents_are_rejected(model, tmp_path, save_every_block):
    audio, state = noise(9, 400_000), tmp_path / "state"
    data = saved(model, audio, state)
    with np.load(io.BytesIO(data)) as file:
        scores, document = file["hypothesis.scores"].tobytes(), file["document"].tobytes()
    at = data.index(scores) + len(scores) - 1  # another score is a valid value: only the checksum differs
    damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    with np.load(io.BytesIO(data)) as file:
        arrays = {name: file[name] for name in file.files}
    large = io.BytesIO()
    np.savez(large, **{**arrays, "document": np.frombuffer(document.ljust(2 << 20), np.uint8)})
    for content in (damaged, large.getvalue()):
        state.write_bytes(content)
        with pytest.raises(OptionError, match="is damaged or not a snapshot file"):
            model.transcribe(audio, resume=state)


def test_a_file_that_appears_while_a_snapshot_is_saved_is_not_written_to(tmp_path, monkeypatch):
    victim, checkpointer = tmp_path / "victim", snapshot.Checkpointer(tmp_path / "state", {})
    victim.write_text("precious")
    (tmp_path / "state.part").symlink_to(victim)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok: None)  # the link is created after it
    with pytest.raises(FileExistsError):
        checkpointer.save(snapshot.StreamSnapshot({}, 0, ""))
    assert victim.read_text() == "precious"


def test_the_node_of_the_phrases_must_exist(bundle, fake, tmp_path, save_every_block):
    """A GPU does not check the node, which is an index into the automaton."""

    class Nodes(fake.FakeBackend):
        def save(self, slot):
            return {**super().save(slot), "node": np.array(0)}

    audio, state = noise(9, 400_000), tmp_path / "state"
    with Model(bundle, Nodes(bundle.manifest, 2, 2)) as model:
        for phrases, nodes in ((None, 1), (["the fox"], len(model.compile_phrases(["the fox"])))):
            data = saved(model, audio, state, phrases=phrases)
            for node in (-1, nodes):
                state.write_bytes(edited_snapshot(data, put("slot.node", lambda array, node=node: np.array(node))))
                with pytest.raises(OptionError, match=f"its node is {node}; the automaton has {nodes} nodes"):
                    model.transcribe(audio, resume=state, phrases=phrases)
            state.write_bytes(edited_snapshot(data, put("slot.node", lambda array, n=nodes: np.array(n - 1))))
            assert model.transcribe(audio, resume=state, phrases=phrases).final


def zipped(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of two members of one name
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


def npy(header: str, content: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + content


def test_limits_are_checked_before_a_snapshot_is_read(model, tmp_path):
    array = io.BytesIO()
    np.save(array, np.zeros(10))
    numbers = "{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }"
    huge = npy(numbers % 2**40)
    bomb = zipped(("document.npy", npy(numbers % 2**28, bytes(2**28))), compression=zipfile.ZIP_DEFLATED)
    pickled = io.BytesIO()
    np.save(pickled, np.array([object], object), allow_pickle=True)
    for content in (
        bomb,
        zipped(("document.npy", huge)),
        zipped(("document.npy", pickled.getvalue())),
        zipped(("document.npy", npy("(" * 5000))),
        zipped(("document.npy", npy("{'descr': [('a', 'O')], 'fortran_order': False, 'shape': (1,), }"))),
        zipped(*[("document.npy", array.getvalue())] * 2),
        zipped(*[(f"a.{'b' * n}.npy", array.getvalue()) for n in range(1, 100)]),
        zipped(("../x.npy", array.getvalue())),
        zipped(("document.npy", npy(numbers % 99999, b"[" * 99999))),
    ):
        (tmp_path / "state").write_bytes(content)
        tracemalloc.start()
        with pytest.raises(OptionError, match="is damaged or not a snapshot file; delete it to start over"):
            model.transcribe(noise(6, 1000), resume=tmp_path / "state")
        assert tracemalloc.get_traced_memory()[1] < 20e6
        tracemalloc.stop()


def test_a_snapshot_must_be_a_regular_file(model, tmp_path, save_every_block):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(OptionError, match="is damaged or not a snapshot file"):
            model.transcribe(noise(7, 1000), resume=tmp_path / name)
    victim, state = tmp_path / "victim", tmp_path / "state"
    victim.write_text("precious")
    (tmp_path / "state.part").symlink_to(victim)
    saved(model, noise(7, 400_000), state)
    assert victim.read_text() == "precious" and state.stat().st_mode & 0o777 == 0o600
