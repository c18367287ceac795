"""What tests share: a tiny checkpoint of random weights, the bundle made of it, real speech, and NeMo as the oracle."""

from __future__ import annotations

import copy
import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

import nemostream
from nemostream.bundle import Bundle, ChunkConfig, Manifest

SPEECH = Path(__file__).parent / "speech"
ROOT = Path(__file__).parents[1]

Floats = NDArray[np.float32]


def tiny_sizes(**changes: Any) -> dict[str, Any]:
    """Two small layers: every mechanism, little arithmetic."""
    sizes = {
        "n_layers": 2,
        "d_model": 64,
        "n_heads": 4,
        "conv_channels": 32,
        "pred_hidden": 48,
        "joint_hidden": 48,
        "vocab": 128,
    }
    return sizes | changes


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def make_device(request: pytest.FixtureRequest) -> Any:
    """Makes the device that a test of the GPU backend runs on: a CPU that plays one (its options), or the GPU here."""
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


@pytest.fixture(scope="session")
def talker(request: pytest.FixtureRequest) -> Bundle:
    """A bundle that says much: random weights where NeMo can make them, the embedded model elsewhere."""
    from importlib.util import find_spec

    return request.getfixturevalue("tiny_bundle" if find_spec("nemo") else "demo_bundle")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nemostream.benchmarks.harness.synthetic import synthetic_model

    return synthetic_model(tmp_path_factory.mktemp("checkpoint") / "tiny.nemo", **tiny_sizes())


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from nemostream.export import export_checkpoint

    return export_checkpoint(tiny_checkpoint, tmp_path_factory.mktemp("bundle") / "tiny")


@dataclass(frozen=True)
class FullExport:
    """The 0.6B shape with random weights, made and exported by other processes."""

    checkpoint: Path
    bundle: Path
    said: str  # while exporting, on standard error
    peak_kib: int  # memory of the larger of the two processes
    making_kib: int  # of the one that made the checkpoint


@pytest.fixture(scope="session")
def full_export(tmp_path_factory: pytest.TempPathFactory) -> FullExport:
    folder = tmp_path_factory.mktemp("full")
    checkpoint, bundle = folder / "full.nemo", folder / "bundle"
    synthetic = [sys.executable, "-m", "nemostream.benchmarks.harness.synthetic", str(checkpoint)]
    subprocess.run(synthetic, check=True, capture_output=True, text=True)
    making = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    export = [sys.executable, "-m", "nemostream", "export", str(checkpoint), str(bundle)]
    made = subprocess.run(export, check=True, capture_output=True, text=True)
    return FullExport(checkpoint, bundle, made.stderr, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, making)


@pytest.fixture(scope="session")
def full_bundle(full_export: FullExport) -> Bundle:
    return Bundle.open(full_export.bundle)


@pytest.fixture(scope="session")
def demo_bundle() -> Bundle:
    return Bundle.open(nemostream.demo_bundle())


@pytest.fixture(scope="session")
def clips() -> dict[str, Floats]:
    """Every human clip, 16 kHz mono float32, by name."""
    rows = [json.loads(line) for line in (SPEECH / "human.jsonl").read_text().splitlines()]
    found = {}
    for row in rows:
        audio, rate = soundfile.read(SPEECH / row["audio_filepath"], dtype="float32")
        assert rate == 16000
        found[Path(row["audio_filepath"]).stem] = audio
    return found


@pytest.fixture(scope="session")
def heldout() -> list[Floats]:
    """The demo model's test recordings: sentences and digits by many voices, 16 kHz mono float32."""
    folder = ROOT / "examples" / "demo_model" / "heldout"
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    return [soundfile.read(folder / row["audio_filepath"], dtype="float32")[0] for row in rows]


class NemoOracle:
    """NeMo itself: the offline forward with a chunk size's mask, and NeMo's greedy decoding of it."""

    def __init__(self, checkpoint: Path) -> None:
        from nemo.collections.asr.models import ASRModel

        self.model = ASRModel.restore_from(str(checkpoint), map_location="cpu").eval()

    def features(self, audio: Floats, exact: bool = False) -> Floats:
        """Log-mel [F, M] as NeMo computes it; `exact`, with its own code in fp64."""
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
        """[T, D] encoder frames."""
        import torch

        self.model.encoder.set_default_att_context_size([chunk.left, chunk.frames - 1])
        with torch.inference_mode():
            encoded, length = self.model.encoder(
                audio_signal=torch.from_numpy(mel.T[None].copy()), length=torch.tensor([len(mel)])
            )
        return encoded[0, :, : int(length[0])].T.numpy()

    def tokens(self, audio: Floats, chunk: ChunkConfig) -> list[int]:
        """NeMo from end to end: its own fp32 features, encoder and batched greedy decoding."""
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
    """The chunks of a whole recording, worked out from the contract alone: (samples, how many are the stream's)."""
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
