"""Servers in a process of their own, as users start them, and in this process, for tests that access internals."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import nemostream
from nemostream.bundle import Bundle, File, LanguageConfig, Tensor

pytest.importorskip("fastapi", reason="needs the serve extra")

HELDOUT = Path(__file__).parents[2] / "examples" / "demo_model" / "heldout"


@dataclass
class Running:
    """A running server and its ports."""

    http: int
    grpc: int
    process: subprocess.Popen[str] | None = None
    service: Any = None
    loop: Any = None  # event loop of a server in this process
    thread: int = 0  # identifier of the thread that runs it
    log: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    @property
    def socket(self) -> str:
        return f"ws://127.0.0.1:{self.http}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc}"

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=30) as answer:
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """Return a metric of /metrics, summed over its labels."""
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.partition("{")[0].split(" ")[0] == name)


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("NEMOSTREAM_")}


@contextmanager
def server_process(*arguments: str, **variables: str) -> Iterator[Running]:
    """Run `nemostream serve` on free ports.

    With the environment variable TEST_TRANSPORTS, servers have that many transport processes.
    """
    command = [sys.executable, "-m", "nemostream", "serve", "--port", "0", "--grpc-port", "0", *arguments]
    if (count := os.environ.get("TEST_TRANSPORTS")) and "--transports" not in arguments:
        command += ["--transports", count]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment() | variables
    )
    log: list[dict[str, Any]] = []
    assert process.stderr is not None and process.stdout is not None
    errors = process.stderr

    def read_log() -> None:
        for line in errors:
            log.append(json.loads(line) if line.startswith("{") else {"event": line})

    log_reader = threading.Thread(target=read_log, daemon=True)
    log_reader.start()
    try:
        url = process.stdout.readline().strip()
        if not url:  # it has ended, or closed its output
            log_reader.join(30)
        assert url, f"the server did not start: {log} {process.poll()}"
        running = Running(int(url.rpartition(":")[2]), 0, process, log=log)
        if url.startswith("http:"):
            running.grpc = json.loads(running.get("/readyz")[1])["grpc_port"]
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)
        process.wait(30)
        log_reader.join(5)


@contextmanager
def server_here(**settings: Any) -> Iterator[Running]:
    """Run a server on a thread of this process."""
    from nemostream.serving import server
    from nemostream.serving.settings import Settings

    started_with: list[Any] = []
    started_or_failed = threading.Event()
    state: dict[str, Any] = {}

    async def run() -> None:
        state["loop"], state["stop"] = asyncio.get_running_loop(), asyncio.Event()
        state["task"] = asyncio.current_task()

        def started(ports: dict[str, int], service: Any) -> None:
            started_with.append((ports, service))
            started_or_failed.set()

        await server.serve(Settings(port=0, grpc_port=0, **settings), started, state["stop"])

    def main() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            state["error"] = error
        finally:
            started_or_failed.set()

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    assert started_or_failed.wait(60) and started_with, state.get("error")
    ports, service = started_with[0]
    try:
        yield Running(ports["http_port"], ports["grpc_port"], None, service, state["loop"], thread.ident or 0)
    finally:
        state["loop"].call_soon_threadsafe(state["stop"].set)
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """One server process for all tests that use it only as a client."""
    with server_process("--max-streams", "64", "--no-measure", "--idle-seconds", "60") as running:
        yield running


PROMPTS = {"en-US": 0, "en": 0, "de-DE": 1, "de": 1, "ar-AR": 2, "ar": 2, "auto": 3}
TAGS = {",": "<EOU>", "▁and": "<EOB>", ".": "<de-DE>", "▁of": "<en-US>"}  # by the piece of the demo model


@pytest.fixture(scope="session")
def languages_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo model with prompts that change its words, and tags instead of some pieces, for the protocols.

    The prompts en-US and auto keep the demo model's tokens. A prompt adds a vector to the encoder's output.
    """
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    source, folder = Bundle.open(nemostream.demo_bundle()), tmp_path_factory.mktemp("languages") / "bundle"
    shutil.copytree(source.path, folder)
    manifest, count = source.manifest, len(set(PROMPTS.values()))
    noise = np.random.default_rng(1).standard_normal((count, 1, manifest.decoder.joint))
    table = (noise * np.array([0, 0.5, 1, 0])[:, None, None]).astype(np.float32)
    graphs = dict(manifest.graphs)
    for name, graph in manifest.graphs.items():
        if not name.startswith("encoder"):
            continue
        path = folder / graph.file
        model = onnx.load(path, load_external_data=False)
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = ["unprompted" if name == "encoded_joint" else name for name in names]
        model.graph.input.append(onnx.helper.make_tensor_value_info("prompt", onnx.TensorProto.INT64, ["B"]))
        model.graph.initializer.append(onnx.numpy_helper.from_array(table, "prompt.rows"))
        model.graph.node.append(onnx.helper.make_node("Gather", ["prompt.rows", "prompt"], ["prompt.row"]))
        model.graph.node.append(onnx.helper.make_node("Add", ["unprompted", "prompt.row"], ["encoded_joint"]))
        onnx.save(model, path)
        inputs = (*graph.inputs, Tensor("prompt", "int64", ("B",)))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        graphs[name] = dataclasses.replace(graph, sha256=digest, inputs=inputs)
    tokenizer = with_pieces((folder / "tokenizer.model").read_bytes(), TAGS)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    file = File("tokenizer.model", hashlib.sha256(tokenizer).hexdigest(), len(tokenizer))
    languages = LanguageConfig("en-US", PROMPTS, count)
    manifest = dataclasses.replace(manifest, name="languages", graphs=graphs, tokenizer=file, languages=languages)
    (folder / "manifest.json").write_text(manifest.to_json())
    return Bundle.open(folder)


def with_pieces(tokenizer: bytes, changes: dict[str, str]) -> bytes:
    """Return a SentencePiece model with other pieces, which are user-defined symbols as in NVIDIA's tokenizers."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    # SentencePiece's own module requires a newer protobuf than Riva's client allows.
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="pieces.proto", package="pieces", syntax="proto2")
    piece = file.message_type.add(name="Piece")
    piece.field.add(name="piece", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    piece.field.add(name="type", number=3, type=kinds.TYPE_INT32, label=kinds.LABEL_OPTIONAL)
    pieces = file.message_type.add(name="Model").field.add(name="pieces", number=1, type_name=".pieces.Piece")
    pieces.type, pieces.label = kinds.TYPE_MESSAGE, kinds.LABEL_REPEATED
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    model = message_factory.GetMessageClass(pool.FindMessageTypeByName("pieces.Model")).FromString(tokenizer)
    for one in model.pieces:  # the other fields are kept as unknown ones
        if one.piece in changes:
            one.piece, one.type = changes[one.piece], 4
    return bytes(model.SerializeToString())


@pytest.fixture(scope="session")
def languages_server(languages_bundle: Bundle) -> Iterator[Running]:
    """One server process of a model of several languages, which emits tags."""
    with server_process("--bundle", str(languages_bundle.path), "--no-measure", "--idle-seconds", "60") as running:
        yield running


@pytest.fixture(scope="session")
def serve_here() -> Callable[..., Any]:
    return server_here


@pytest.fixture(scope="session")
def serve_process() -> Callable[..., Any]:
    return server_process


@dataclass(frozen=True)
class Clip:
    path: Path
    pcm: bytes = field(repr=False)  # 16 kHz mono 16 bit
    text: str = ""  # output of `nemostream transcribe`
    seconds: float = 0.0


@pytest.fixture(scope="session")
def spoken() -> list[Clip]:
    """Recordings with their offline transcripts at 560 ms."""
    rows = [json.loads(line) for line in (HELDOUT / "heldout.jsonl").read_text().splitlines()][:8]
    clips = []
    with nemostream.load() as model:
        for path in [nemostream.demo_clip(), *(HELDOUT / row["audio_filepath"] for row in rows)]:
            audio, rate = soundfile.read(path, dtype="int16")
            assert rate == 16000
            clips.append(Clip(path, audio.tobytes(), model.transcribe(path).text, len(audio) / rate))
    assert all(clip.text for clip in clips)
    return clips


@pytest.fixture(scope="session")
def fakes() -> Any:
    """The module `fakes.py`, which is not on `sys.path` in pytest's importlib mode."""
    name = "nemostream_tests_serving_fakes"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("fakes.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clock(fakes: Any) -> Any:
    """A clock that the test advances, or its event loop."""
    return fakes.VirtualClock()


@pytest.fixture
def model(fakes: Any) -> Any:
    """A model without an engine."""
    return fakes.FakeModel()
