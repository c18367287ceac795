"""The Triton model repository: its configuration against Triton's schema, and a real Triton from PyTriton's wheel."""

from __future__ import annotations

import json
import os
import shutil
import socket as sockets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nemostream
from nemostream.cli.main import main
from nemostream.extras import install_command

tritonclient = pytest.importorskip("tritonclient", reason="needs tritonclient[grpc]")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "models"
    with pytest.raises(SystemExit) as exited:
        main(["export", "--triton", str(nemostream.demo_bundle()), str(folder)])
    assert exited.value.code == 0
    return folder


def test_configuration_matches_tritons_schema(repository: Path) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as schema

    (config,) = repository.glob("*/config.pbtxt")
    parsed = text_format.Parse(config.read_text(), schema.ModelConfig())
    assert parsed.name == config.parent.name and parsed.backend == "python" and parsed.max_batch_size == 256
    assert {tensor.name: tensor.data_type for tensor in parsed.input} == {"AUDIO": schema.TYPE_FP32}
    assert {tensor.name: tensor.data_type for tensor in parsed.output} == {
        "TEXT": schema.TYPE_STRING,
        "WORD_STARTS": schema.TYPE_FP32,
        "LANGUAGE": schema.TYPE_STRING,
    }
    kinds = {control.name: control.control[0].kind for control in parsed.sequence_batching.control_input}
    control = schema.ModelSequenceBatching.Control
    assert kinds == {
        "START": control.CONTROL_SEQUENCE_START,
        "END": control.CONTROL_SEQUENCE_END,
    }
    assert parsed.sequence_batching.oldest.max_candidate_sequences == 256
    names = {"chunk_ms", "language", "device", "precision", "engines", "threads", "max_batch"}
    assert set(parsed.parameters) == names


@pytest.mark.parametrize(("written", "passed"), [("", None), ("128", 128)])
def test_max_batch(repository: Path, monkeypatch: pytest.MonkeyPatch, written: str, passed: int | None) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as schema

    from nemostream.serving.integrations.triton import TritonPythonModel

    (config,) = repository.glob("*/config.pbtxt")
    parsed = text_format.Parse(config.read_text(), schema.ModelConfig())
    parameters = {name: {"string_value": value.string_value} for name, value in parsed.parameters.items()}
    parameters["max_batch"]["string_value"] = written
    loaded: list[Any] = []
    monkeypatch.setattr(nemostream, "load", lambda *args, **options: loaded.append(options["max_batch"]))
    TritonPythonModel().initialize(
        {
            "model_config": json.dumps({"parameters": parameters, "max_batch_size": parsed.max_batch_size}),
            "model_version": "1",
            "model_repository": str(config.parent),
        }
    )
    assert loaded == [passed]


def test_model_file_has_a_working_install_command(repository: Path) -> None:
    """`pip install nemostream` does not work, because the package is not on an index."""
    (model,) = repository.glob("*/1/model.py")
    text = model.read_text()
    assert install_command() in text and "pip install nemostream" not in text
    compile(text, str(model), "exec")


def test_changed_configuration_is_kept(repository: Path) -> None:
    (config,) = repository.glob("*/config.pbtxt")
    written = config.read_text()
    config.write_text(written + "# mine\n")
    with pytest.raises(SystemExit):
        main(["export", "--triton", str(nemostream.demo_bundle()), str(repository)])
    assert config.read_text() == written + "# mine\n"
    config.write_text(written)


@pytest.fixture(scope="module")
def triton(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start Triton and return its address. PyTriton's wheel has the server, its Python backend and a stub per Python.

    The wheel is in a separate folder with the numpy that its backend was built for, which is older than nemostream's.
    """
    folder = Path(sys.prefix) / "triton"
    home = folder / "pytriton" / "tritonserver"
    if not home.is_dir():
        pytest.skip("needs Triton: pip install --no-deps --target .venv/triton nvidia-pytriton==0.7.0 numpy==1.26.4")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    backends = tmp_path_factory.mktemp("backends")
    shutil.copytree(home / "backends" / "python", backends / "python")
    stub = home / "python_backend_stubs" / python / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    # The stub embeds the system's Python, which ignores virtual environments but searches the stub's own folder. The
    # package is linked by its location, because an editable install has no folder in site-packages.
    (backends / "python" / "nemostream").symlink_to(Path(nemostream.__file__).parent)
    for packages in (folder, *(Path(path) for path in sys.path if path.endswith("site-packages"))):
        for entry in packages.iterdir():
            if not (backends / "python" / entry.name).exists():
                (backends / "python" / entry.name).symlink_to(entry)
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder / "nvidia_pytriton.libs")}
    libraries = subprocess.run(["ldd", stub], env=environment, capture_output=True, text=True).stdout
    if "not found" in libraries:
        pytest.skip(f"Triton's Python {python} is not on this machine: {libraries}")
    ports = []
    for _ in range(2):
        with sockets.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    log = tmp_path_factory.mktemp("log") / "triton.log"
    with log.open("w") as log_file:
        process = subprocess.Popen(
            [
                home / "bin" / "tritonserver",
                f"--model-repository={repository}",
                f"--backend-directory={backends}",
                "--http-address=127.0.0.1",
                f"--http-port={ports[0]}",
                "--grpc-address=127.0.0.1",
                f"--grpc-port={ports[1]}",
                "--allow-metrics=false",
                "--exit-timeout-secs=1",
            ],
            env=environment,
            stdout=log_file,
            stderr=log_file,
        )
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    client = InferenceServerClient(f"127.0.0.1:{ports[1]}")
    end = time.monotonic() + 60
    try:
        while True:
            try:
                if client.is_model_ready("nemostream"):
                    break
            except InferenceServerException:
                pass
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{ports[1]}"
    finally:
        client.close()
        process.terminate()
        process.wait(60)


class SequenceClient:
    """Sends sequences over a stream of Triton's own client."""

    def __init__(self, address: str) -> None:
        import queue

        from tritonclient import grpc

        self._grpc, self._client = grpc, grpc.InferenceServerClient(address)
        self._results: queue.Queue[Any] = queue.Queue()
        self._client.start_stream(lambda result, error: self._results.put((result, error)))

    def send(self, sequence: int | str, audio: np.ndarray[Any, Any], **options: Any) -> None:
        tensor = self._grpc.InferInput("AUDIO", [1, len(audio)], "FP32")
        tensor.set_data_from_numpy(audio[None])
        self._client.async_stream_infer(
            "nemostream", [tensor], sequence_id=sequence, request_id=str(sequence), **options
        )

    def receive(self) -> tuple[str, str, list[float]]:
        result, error = self._results.get(timeout=60)
        if error is not None:
            raise error
        assert result.as_numpy("LANGUAGE").tolist() == [[b"en"]]
        text = result.as_numpy("TEXT")[0, 0].decode()
        return result.get_response().id, text, result.as_numpy("WORD_STARTS")[0].tolist()

    def close(self) -> None:
        self._client.stop_stream()
        self._client.close()


def split(pcm: bytes, size: int) -> list[np.ndarray[Any, Any]]:
    audio = np.frombuffer(pcm, np.int16).astype(np.float32) / 32768
    return [audio[start : start + size] for start in range(0, len(audio), size)]


def test_concurrent_sequences_give_the_same_text_as_transcribe(triton: str, spoken: Any) -> None:
    client = SequenceClient(triton)
    clips: dict[int | str, Any] = dict(enumerate(spoken, 1))
    clips |= {f"call-{number}": clip for number, clip in enumerate(spoken[:3])}  # ids can be strings
    pending = {name: split(clip.pcm, 4000 + 500 * index) for index, (name, clip) in enumerate(clips.items())}
    count = {name: len(parts) for name, parts in pending.items()}
    texts: dict[str, list[str]] = {str(name): [] for name in clips}
    starts: dict[str, list[float]] = {}
    try:
        while any(pending.values()):
            requests = 0
            for name, parts in pending.items():
                if parts:
                    start = len(parts) == count[name]
                    client.send(name, parts.pop(0), sequence_start=start, sequence_end=not parts)
                    requests += 1
            for _ in range(requests):
                sequence, text, times = client.receive()
                texts[sequence].append(text)
                starts[sequence] = times
    finally:
        client.close()
    with nemostream.load() as model:
        for name, clip in clips.items():
            assert texts[str(name)][-1] == clip.text
            assert all(clip.text.startswith(text) for text in texts[str(name)])
            result = model.transcribe(clip.path)
            # The last encoder frame can begin after the recording's end; times of words are clipped to it.
            expected = [min(token.time, result.duration) for token in result.tokens if token.text.startswith(" ")]
            assert starts[str(name)] == pytest.approx(expected, abs=1e-6)
    assert len(set(texts["1"])) >= 3  # partial results


def test_a_sequence_chooses_its_chunk_size(triton: str, spoken: Any) -> None:
    with nemostream.load(chunk_ms=80) as model:
        expected = model.transcribe(spoken[0].path).text
    client = SequenceClient(triton)
    try:
        first, *rest = split(spoken[0].pcm, 1600)
        client.send(1, first, sequence_start=True, parameters={"chunk_ms": 80})
        texts = [client.receive()[1]]
        for part in rest:
            client.send(1, part)
            texts.append(client.receive()[1])
        client.send(1, np.zeros(0, np.float32), sequence_end=True)
        assert client.receive()[1] == expected
        assert len(set(texts)) == len(expected.split()) + 1 or len(set(texts)) >= 6  # a word at a time
    finally:
        client.close()


def test_a_failed_sequence_does_not_affect_others(triton: str, spoken: Any) -> None:
    from tritonclient.utils import InferenceServerException

    client = SequenceClient(triton)
    audio = split(spoken[0].pcm, 10**9)[0]
    half = len(audio) // 2
    try:
        client.send(1, audio[:half], sequence_start=True)
        client.receive()
        client.send(2, np.full(1000, np.nan, np.float32), sequence_start=True)
        with pytest.raises(InferenceServerException, match=r"not finite|NaN"):
            client.receive()
        client.send(2, audio[:half])
        with pytest.raises(InferenceServerException, match="start a new one"):
            client.receive()
        client.send(3, audio[:half], sequence_start=True, parameters={"chunk_ms": 123})
        with pytest.raises(InferenceServerException, match="123"):
            client.receive()
        client.send(3, audio[:half], sequence_start=True, parameters={"language": "de"})
        with pytest.raises(InferenceServerException, match="'de'; this model supports 'en' only"):
            client.receive()
        client.send(1, audio[half:], parameters={"language": "fr"})  # rejected; the sequence stays open
        with pytest.raises(InferenceServerException, match="'fr'; this model supports 'en' only"):
            client.receive()
        client.send(1, audio[half:], sequence_end=True, parameters={"language": "en-US"})
        assert client.receive()[1] == spoken[0].text
    finally:
        client.close()


def test_languages_of_sequences(languages_bundle: Any, spoken: Any, tmp_path: Path) -> None:
    """The language of the configuration, of a sequence, and a change during a sequence."""
    import asyncio

    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as schema

    from nemostream.serving.integrations.triton import TritonPythonModel, bundle_in, write_repository

    bundle = bundle_in(tmp_path)
    bundle.parent.mkdir(parents=True)
    bundle.symlink_to(languages_bundle.path)
    write_repository(tmp_path)
    (config,) = tmp_path.glob("*/config.pbtxt")
    parsed = text_format.Parse(config.read_text(), schema.ModelConfig())
    audio = split(spoken[0].pcm, 10**9)[0]
    at = 3 * 8960 + 100
    with nemostream.load(languages_bundle.path) as model:
        expected = {name: model.transcribe(audio, language=name) for name in ("de-DE", "ar-AR")}
        with model.stream(language="ar") as stream:
            stream.push(audio[:at])
            stream.set_language("de")
            stream.push(audio[at:])
            changed = stream.finish()

    def initialized(language: str) -> TritonPythonModel:
        parsed.parameters["language"].string_value = language
        document = {
            "parameters": {name: {"string_value": value.string_value} for name, value in parsed.parameters.items()},
            "output": [{"name": tensor.name} for tensor in parsed.output],
            "max_batch_size": parsed.max_batch_size,
        }
        folder = {"model_repository": str(config.parent), "model_version": "1"}
        model = TritonPythonModel()
        model.initialize({"model_config": json.dumps(document), **folder})
        return model

    model = initialized("de")

    async def process() -> None:
        assert await model._process("1", audio, True, True, {}) == expected["de-DE"]
        assert await model._process("1", audio, True, True, {"language": "ar"}) == expected["ar-AR"]
        first = await model._process("1", audio[:at], True, False, {"language": "ar"})
        last = await model._process("1", audio[at:], False, True, {"language": "de"})
        assert first.language == "ar-AR" and last == changed and last.language == "de-DE"

    asyncio.run(process())
    model.finalize()
    assert changed.text not in {result.text for result in expected.values()}
    with pytest.raises(nemostream.OptionError, match="similar ones are de-DE"):
        initialized("de-AT")


def test_the_language_of_a_bundle_is_not_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["export", "--triton", "--language", "de", str(nemostream.demo_bundle()), str(tmp_path / "models")])
    assert exited.value.code == 2 and "--language applies to the export" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_folder_that_is_neither_a_bundle_nor_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["export", "--triton", str(tmp_path), str(tmp_path / "models")])
    assert exited.value.code == 5 and "neither a .nemo file" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()
