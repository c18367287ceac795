"""Shared fixtures: a tiny checkpoint with random weights, its bundle, recorded speech, and NeMo as the oracle."""

from __future__ import annotations

import copy
import fcntl
import hashlib
import inspect
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import settings
from numpy.typing import NDArray

import nemostream
from nemostream.bundle import Bundle, ChunkConfig, Manifest
from nemostream.cli.main import main

SPEECH = Path(__file__).parent / "speech"
ROOT = Path(__file__).parents[1]

Floats = NDArray[np.float32]


# Shells ignore SIGINT in background jobs, and processes that tests start would inherit this.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A deadline is a timing assertion: it fails on a busy machine.
settings.register_profile("nemostream", deadline=None)
settings.load_profile("nemostream")


def pytest_configure(config: pytest.Config) -> None:
    """Give each worker of `pytest -n` a CPU of its own.

    ONNX Runtime and PyTorch start a thread per CPU; those of two workers would wait for each other, spinning.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker.startswith("gw") and hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[int(worker[2:]) % len(cpus)]})


# Files that take longest. Workers begin with them, so that none runs alone at the end. Of the slow tests, the one that
# exports the full-size model is first, because others wait for the export.
LONGEST = (
    "engines",
    "export",
    "security",
    "synthetic",
    "hostile",
    "tensorrt",
    "cuda_stub",
    "ray",
    "kernels",
    "gpu_check",
    "exactness",
    "benchmarks",
    "operations",
    "main",
    "backend",
    "docs",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
        items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def tiny_sizes(**changes: Any) -> dict[str, Any]:
    """Return the sizes of a two-layer model that uses every mechanism with little arithmetic."""
    sizes = {
        "n_layers": 2,
        "d_model": 64,
        "n_heads": 4,
        "conv_channels": 32,
        "pred_hidden": 48,
        "joint_hidden": 48,
        "vocab": 128,
        "punctuation": False,
    }
    return sizes | changes


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def make_device(request: pytest.FixtureRequest) -> Any:
    """Factory of the device under test: a CPU emulation of a GPU (takes options), or the GPU of this machine."""
    if request.param == "cpu":
        from cuda_on_cpu import MISSING
        from host_device import HostDevice

        if MISSING:
            pytest.skip("needs g++ to run the kernels on a CPU")
        return HostDevice
    from nemostream.errors import BackendError
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    try:
        CudaDevice().close()
    except BackendError as error:
        pytest.skip(str(error))
    return lambda **options: CudaDevice()


@pytest.fixture
def run_main(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A function that runs the command line and returns its exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([*map(str, arguments)])
        assert isinstance(exited.value.code, int)
        return (exited.value.code, *capfd.readouterr())

    return call


@pytest.fixture
def run(run_main: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """As `run_main`, for `transcribe`."""
    return partial(run_main, "transcribe")


@pytest.fixture(scope="session")
def small_bundle(request: pytest.FixtureRequest) -> Bundle:
    """A small bundle that emits many tokens: random weights if NeMo is installed, else the demo model."""
    from importlib.util import find_spec

    if path := os.environ.get("NEMOSTREAM_TEST_BUNDLE"):  # of the test that started this process
        return Bundle.open(path)
    return request.getfixturevalue("tiny_bundle" if find_spec("nemo") else "demo_bundle")


def export_digest() -> str:
    """Return a digest of what an exported model depends on besides its sizes: source files and versions."""
    package = Path(nemostream.__file__).parent
    harness = (package / "benchmarks" / "harness" / f"{name}.py" for name in HARNESS)
    files = [*package.glob("*.py"), *package.glob("*.flac"), *harness]
    files += [path for name in ("export", "cli") for path in (package / name).rglob("*.py")]
    digest = hashlib.sha256(platform.python_version().encode() + platform.machine().encode())
    for path in sorted(files):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    for library in ("nemo_toolkit", "torch", "transformers", "onnx", "onnxruntime", "sentencepiece", "numpy"):
        try:
            digest.update(f"{library} {version(library)}".encode())
        except PackageNotFoundError:
            digest.update(f"no {library}".encode())
    return digest.hexdigest()


HARNESS = ("random_weights", "synthetic", "tokenizers")  # what writes synthetic checkpoints


class SharedFolders:
    """Folders of models that are made once for all workers of a test run, and only read by tests.

    If the environment variable NEMOSTREAM_TEST_CACHE names a folder, they are kept there for later runs.
    """

    def __init__(self, root: Path) -> None:
        self.root, self._digest = root, export_digest()
        root.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, make: Callable[[Path], object], key: object = None) -> Path:
        """Return the folder that `make` fills. `key` is what its content depends on besides code and versions."""
        tests = Path(inspect.getsourcefile(make) or "").read_bytes()
        digest = hashlib.sha256(f"{self._digest} {key!r} ".encode() + tests).hexdigest()[:16]
        folder, complete = self.root / f"{name}-{digest}", self.root / f"{name}-{digest}.complete"
        with complete.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
                folder.mkdir()
                make(folder)
                complete.touch()
        return folder


@pytest.fixture(scope="session")
def shared_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SharedFolders:
    if kept := os.environ.get("NEMOSTREAM_TEST_CACHE"):
        return SharedFolders(Path(kept).absolute())
    base = tmp_path_factory.getbasetemp()
    return SharedFolders((base.parent if hasattr(request.config, "workerinput") else base) / "shared")


@pytest.fixture(scope="session")
def tiny_checkpoint(shared_folder: SharedFolders) -> Path:
    def make(folder: Path) -> None:
        from nemostream.benchmarks.harness.synthetic import synthetic_model

        synthetic_model(folder / "tiny.nemo", **tiny_sizes())

    return shared_folder("checkpoint", make, tiny_sizes()) / "tiny.nemo"


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, shared_folder: SharedFolders) -> Bundle:
    def make(folder: Path) -> None:
        from nemostream.export import export_checkpoint

        export_checkpoint(tiny_checkpoint, folder / "tiny")

    return Bundle.open(shared_folder("bundle", make, tiny_sizes()) / "tiny")


@dataclass(frozen=True)
class FullExport:
    """A model of the 0.6B sizes with random weights, created and exported in child processes."""

    checkpoint: Path
    bundle: Path
    stderr: str  # of the export
    peak_kib: int  # largest resident set of the two processes
    checkpoint_peak_kib: int  # of the process that created the checkpoint


@pytest.fixture(scope="session")
def full_export(shared_folder: SharedFolders) -> FullExport:
    def make(folder: Path) -> None:
        checkpoint = folder / "full.nemo"
        synthetic = [sys.executable, "-m", "nemostream.benchmarks.harness.synthetic", str(checkpoint)]
        subprocess.run(synthetic, check=True, capture_output=True, text=True)
        checkpoint_peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        export = [sys.executable, "-m", "nemostream", "export", str(checkpoint), str(folder / "bundle")]
        exported = subprocess.run(export, check=True, capture_output=True, text=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        (folder / "export.json").write_text(json.dumps([exported.stderr, peak, checkpoint_peak]))

    folder = shared_folder("full", make)
    return FullExport(folder / "full.nemo", folder / "bundle", *json.loads((folder / "export.json").read_text()))


@pytest.fixture(scope="session")
def full_bundle(full_export: FullExport) -> Bundle:
    return Bundle.open(full_export.bundle)


@pytest.fixture(scope="session")
def demo_bundle() -> Bundle:
    return Bundle.open(nemostream.demo_bundle())


@pytest.fixture(scope="session")
def clips() -> dict[str, Floats]:
    """All recordings of human speech by name, 16 kHz mono float32."""
    rows = [json.loads(line) for line in (SPEECH / "human.jsonl").read_text().splitlines()]
    found = {}
    for row in rows:
        audio, rate = soundfile.read(SPEECH / row["audio_filepath"], dtype="float32")
        assert rate == 16000
        found[Path(row["audio_filepath"]).stem] = audio
    return found


@pytest.fixture(scope="session")
def heldout() -> list[Floats]:
    """The demo model's held-out recordings (sentences and digits, many voices), 16 kHz mono float32."""
    folder = ROOT / "examples" / "demo_model" / "heldout"
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    return [soundfile.read(folder / row["audio_filepath"], dtype="float32")[0] for row in rows]


class NemoOracle:
    """NeMo as the reference: offline forward with the attention mask of a chunk size, and greedy decoding."""

    def __init__(self, checkpoint: Path) -> None:
        from nemo.collections.asr.models import ASRModel

        self.model = ASRModel.restore_from(str(checkpoint), map_location="cpu").eval()

    def features(self, audio: Floats, exact: bool = False) -> Floats:
        """Return NeMo's log-mel [F, M]; with `exact`, NeMo's code runs in fp64."""
        import torch

        featurizer = self.model.preprocessor.featurizer
        samples = torch.from_numpy(audio)[None]
        if exact:
            featurizer, samples = copy.deepcopy(featurizer).double(), samples.double()
            window = featurizer.window.double()
            featurizer.stft = lambda x: torch.stft(
                x,
                featurizer.n_fft,
                featurizer.hop_length,
                featurizer.win_length,
                window,
                return_complex=True,
                center=True,
                pad_mode="constant",
            )
        with torch.inference_mode():
            mel, length = featurizer(samples, torch.tensor([len(audio)]))
        return mel[0, :, : int(length[0])].T.float().numpy()

    def encode(self, mel: Floats, chunk: ChunkConfig) -> Floats:
        """Return encoder frames [T, D] of log-mel frames [F, M]."""
        import torch

        self.model.encoder.set_default_att_context_size([chunk.left, chunk.frames - 1])
        with torch.inference_mode():
            encoded, length = self.model.encoder(
                audio_signal=torch.from_numpy(mel.T[None].copy()), length=torch.tensor([len(mel)])
            )
        return encoded[0, :, : int(length[0])].T.numpy()

    def tokens(self, audio: Floats, chunk: ChunkConfig) -> list[int]:
        """Return the tokens of NeMo end to end: fp32 features, encoder, batched greedy decoding."""
        import torch

        encoded = torch.from_numpy(self.encode(self.features(audio), chunk).T[None].copy())
        with torch.inference_mode():
            hypotheses = self.model.decoding.rnnt_decoder_predictions_tensor(
                encoded, torch.tensor([encoded.shape[2]]), return_hypotheses=True
            )
        return [int(token) for token in hypotheses[0].y_sequence]


@pytest.fixture(scope="session")
def tiny_oracle(tiny_checkpoint: Path) -> NemoOracle:
    return NemoOracle(tiny_checkpoint)


@pytest.fixture(scope="session")
def demo_oracle() -> NemoOracle:
    return NemoOracle(ROOT / "examples" / "demo_model" / "demo.nemo")


def cut(manifest: Manifest, chunk: ChunkConfig, audio: Floats) -> list[tuple[Floats, int]]:
    """Return the chunks of a recording as (samples, zero-padded; valid length), derived from the contract alone."""
    frames = manifest.encoder_frames(len(audio))
    padded = np.concatenate([np.zeros(manifest.lead, np.float32), audio])
    chunks = []
    for start in range(0, -(-frames // chunk.frames) * chunk.samples, chunk.samples):
        part = padded[start : start + chunk.samples]
        chunks.append((np.pad(part, (0, chunk.samples - len(part))), len(part)))
    return chunks


@pytest.fixture(scope="session")
def cut_chunks() -> Any:
    return cut
