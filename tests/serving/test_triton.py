"""The Triton model repository: its configuration against Triton's own schema, and in Triton, which a wheel brings."""

from __future__ import annotations

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
from nemostream.cli import main
from nemostream.extras import install_command

tritonclient = pytest.importorskip("tritonclient", reason="needs tritonclient[grpc]")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "models"
    with pytest.raises(SystemExit) as left:
        main(["export", "--triton", str(nemostream.demo_bundle()), str(folder)])
    assert left.value.code == 0
    return folder


def test_the_configuration_is_tritons(repository: Path) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as schema

    (config,) = repository.glob("*/config.pbtxt")
    found = text_format.Parse(config.read_text(), schema.ModelConfig())
    assert found.name == config.parent.name and found.backend == "python" and found.max_batch_size == 256
    assert {tensor.name: tensor.data_type for tensor in found.input} == {"AUDIO": schema.TYPE_FP32}
    assert {tensor.name: tensor.data_type for tensor in found.output} == {
        "TEXT": schema.TYPE_STRING, "WORD_STARTS": schema.TYPE_FP32
    }  # fmt: skip
    kinds = {control.name: control.control[0].kind for control in found.sequence_batching.control_input}
    control = schema.ModelSequenceBatching.Control
    assert kinds == {
        "START": control.CONTROL_SEQUENCE_START,
        "END": control.CONTROL_SEQUENCE_END,
    }
    assert found.sequence_batching.oldest.max_candidate_sequences == 256
    assert set(found.parameters) == {"chunk_ms", "device", "precision", "engines", "threads"}


def test_the_written_model_names_a_command_that_installs(repository: Path) -> None:
    """`pip install nemostream` finds nothing: the package is on no index."""
    (model,) = repository.glob("*/1/model.py")
    text = model.read_text()
    assert install_command() in text and "pip install nemostream" not in text
    compile(text, str(model), "exec")


def test_a_configuration_that_was_changed_stays(repository: Path) -> None:
    (config,) = repository.glob("*/config.pbtxt")
    written = config.read_text()
    config.write_text(written + "# mine\n")
    with pytest.raises(SystemExit):
        main(["export", "--triton", str(nemostream.demo_bundle()), str(repository)])
    assert config.read_text() == written + "# mine\n"
    config.write_text(written)


@pytest.fixture(scope="module")
def triton(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Triton's address. The wheel of PyTriton has the server, its Python backend, and a stub per Python.

    It lies in a folder of its own with the numpy that its backend was built for: an older one than ours.
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
    needs = subprocess.run(["ldd", stub], env=environment, capture_output=True, text=True).stdout
    if "not found" in needs:
        pytest.skip(f"Triton's Python {python} is not on this machine: {needs}")
    ports = []
    for _ in range(2):
        with sockets.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    log = tmp_path_factory.mktemp("log") / "triton.log"
    with log.open("w") as told:
        process = subprocess.Popen(
            [home / "bin" / "tritonserver", f"--model-repository={repository}",
             f"--backend-directory={backends}", "--http-address=127.0.0.1", f"--http-port={ports[0]}",
             "--grpc-address=127.0.0.1", f"--grpc-port={ports[1]}", "--allow-metrics=false",
             "--exit-timeout-secs=1"],
            env=environment, stdout=told, stderr=told,
        )  # fmt: skip
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


class Caller:
    """Sequences over Triton's stream, with its own client."""

    def __init__(self, address: str) -> None:
        import queue

        from tritonclient import grpc

        self._grpc, self._client = grpc, grpc.InferenceServerClient(address)
        self._answers: queue.Queue[Any] = queue.Queue()
        self._client.start_stream(lambda result, error: self._answers.put((result, error)))

    def send(self, sequence: int | str, audio: np.ndarray[Any, Any], **options: Any) -> None:
        tensor = self._grpc.InferInput("AUDIO", [1, len(audio)], "FP32")
        tensor.set_data_from_numpy(audio[None])
        self._client.async_stream_infer(
            "nemostream", [tensor], sequence_id=sequence, request_id=str(sequence), **options
        )

    def answer(self) -> tuple[str, str, list[float]]:
        result, error = self._answers.get(timeout=60)
        if error is not None:
            raise error
        text = result.as_numpy("TEXT")[0, 0].decode()
        return result.get_response().id, text, result.as_numpy("WORD_STARTS")[0].tolist()

    def close(self) -> None:
        self._client.stop_stream()
        self._client.close()


def pieces(pcm: bytes, size: int) -> list[np.ndarray[Any, Any]]:
    audio = np.frombuffer(pcm, np.int16).astype(np.float32) / 32768
    return [audio[start : start + size] for start in range(0, len(audio), size)]


def test_sequences_side_by_side_say_what_transcribe_says(triton: str, spoken: Any) -> None:
    caller = Caller(triton)
    clips: dict[int | str, Any] = dict(enumerate(spoken, 1))
    clips |= {f"call-{number}": clip for number, clip in enumerate(spoken[:3])}  # ids may be strings too
    waiting = {name: pieces(clip.pcm, 4000 + 500 * index) for index, (name, clip) in enumerate(clips.items())}
    count = {name: len(parts) for name, parts in waiting.items()}
    heard: dict[str, list[str]] = {str(name): [] for name in clips}
    starts: dict[str, list[float]] = {}
    try:
        while any(waiting.values()):
            asked = 0
            for name, parts in waiting.items():
                if parts:
                    start = len(parts) == count[name]
                    caller.send(name, parts.pop(0), sequence_start=start, sequence_end=not parts)
                    asked += 1
            for _ in range(asked):
                answered, text, times = caller.answer()
                heard[answered].append(text)
                starts[answered] = times
    finally:
        caller.close()
    with nemostream.load() as model:
        for name, clip in clips.items():
            assert heard[str(name)][-1] == clip.text
            assert all(clip.text.startswith(text) for text in heard[str(name)])
            result = model.transcribe(clip.path)
            # The last encoder frame can begin after the recording's end; times of words are clipped to it.
            wanted = [min(token.time, result.duration) for token in result.tokens if token.text.startswith(" ")]
            assert starts[str(name)] == pytest.approx(wanted, abs=1e-6)
    assert len(set(heard["1"])) >= 3  # it was live


def test_a_sequence_chooses_its_chunk_size(triton: str, spoken: Any) -> None:
    with nemostream.load(chunk_ms=80) as model:
        wanted = model.transcribe(spoken[0].path).text
    caller = Caller(triton)
    try:
        first, *rest = pieces(spoken[0].pcm, 1600)
        caller.send(1, first, sequence_start=True, parameters={"chunk_ms": 80})
        said = [caller.answer()[1]]
        for part in rest:
            caller.send(1, part)
            said.append(caller.answer()[1])
        caller.send(1, np.zeros(0, np.float32), sequence_end=True)
        assert caller.answer()[1] == wanted
        assert len(set(said)) == len(wanted.split()) + 1 or len(set(said)) >= 6  # a word at a time
    finally:
        caller.close()


def test_a_bad_sequence_fails_alone(triton: str, spoken: Any) -> None:
    from tritonclient.utils import InferenceServerException

    caller = Caller(triton)
    audio = pieces(spoken[0].pcm, 10**9)[0]
    half = len(audio) // 2
    try:
        caller.send(1, audio[:half], sequence_start=True)
        caller.answer()
        caller.send(2, np.full(1000, np.nan, np.float32), sequence_start=True)
        with pytest.raises(InferenceServerException, match=r"not finite|NaN"):
            caller.answer()
        caller.send(2, audio[:half])
        with pytest.raises(InferenceServerException, match="begin it anew"):
            caller.answer()
        caller.send(3, audio[:half], sequence_start=True, parameters={"chunk_ms": 123})
        with pytest.raises(InferenceServerException, match="123"):
            caller.answer()
        caller.send(1, audio[half:], sequence_end=True)
        assert caller.answer()[1] == spoken[0].text
    finally:
        caller.close()


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["export", "--triton", str(tmp_path), str(tmp_path / "models")])
    assert left.value.code == 4 and "manifest" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()
