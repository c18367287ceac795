"""`nemostream doctor --plan`: figures, names of GPUs, and the printed table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemostream.bundle import Bundle
from nemostream.cli.gpu_memory import GPUS
from nemostream.cli.main import main
from nemostream.errors import BackendError
from nemostream.runtime.backends.gpu import cuda


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exited:
        main(["doctor", *arguments])
    out, err = capsys.readouterr()
    return exited.value.code, out, err


def rows_of(report: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if all(row[name] == value for name, value in wanted.items())]


def test_published_model_on_an_h100(capsys: pytest.CaptureFixture[str]) -> None:
    """Figures computed by hand, from the sizes of the model and of its tensors."""
    code, out, _ = run(capsys, "--plan", "--gpu", "h100-80gb", "--json")
    report = json.loads(out)
    assert code == 0 and report["measured"] is False
    # 81,559 MiB, less 512 MiB for the context and 512 MiB for captured graphs.
    assert report["available_bytes"] == (81_559 - 1024) << 20
    (row,) = rows_of(report, chunk_ms=[560], precision="fp16", max_batch=256)
    state = 24 * 1024 * (70 + 70 + 8) * 2 + 4 * (9 * 128 + 239 + 640 + 2 * 2 * 640) + 12
    assert row["bytes_per_stream"] == state
    assert row["activation_bytes"] == 256 * 2 * 4 * (256 * 33 * 65)
    parameters = 24 * (
        2 * 8 * 1024**2  # two feed-forward modules
        + 7 * 1024**2  # Q, K, V and output; pointwise convolutions, one with a gate
        + 9 * 1024
        + 12 * 1024
        + 2 * 1024  # depthwise convolution; six norms; position biases
    )
    parameters += 256 * (2 * 256 + 3 * 9 + 5) + 256 * 17 * 1024 + 1024 + 1024 * 640 + 640  # subsampling, joint
    assert row["weight_bytes"] == pytest.approx(2 * parameters, rel=0.02)
    gathered = 256 * 24 * 1024 * (70 + 70 + 8 + 8 + 2 * 7) * 2  # caches of a batch, and what the encoder adds to them
    assert gathered < row["buffer_bytes"] < 1.1 * gathered
    others = row["weight_bytes"] + row["activation_bytes"] + row["buffer_bytes"]
    assert 0 <= report["available_bytes"] - others - row["streams"] * (state + 4) < 2 * state
    assert report["largest_max_batch"]["560"] == (2**31 - 1) // (256 * 33 * 65)
    # Engines of all chunk sizes leave less memory than one, and larger batches less than smaller ones.
    every = [80, 160, 560, 1120]
    for precision in ("fp16", "fp32"):
        counts = [rows_of(report, chunk_ms=every, precision=precision, max_batch=n)[0]["streams"] for n in (64, 256)]
        single = rows_of(report, chunk_ms=[1120], precision=precision, max_batch=64)[0]["streams"]
        assert single > counts[0] > counts[1] > 0
    (row,) = rows_of(report, chunk_ms=every, precision="fp16", max_batch=256)
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
    assert f"{row['streams']:,} with 16-bit engines of all four chunk sizes" in page


def test_small_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Batches that do not fit are shown as such."""
    report = json.loads(run(capsys, "--plan", "--gpu", "l4-24gb", "--json")[1])
    (row,) = rows_of(report, chunk_ms=[80, 160, 560, 1120], precision="fp16", max_batch=1024)
    assert row["streams"] == 0
    assert "none" in run(capsys, "--plan", "--gpu", "l4-24gb")[1]


def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for gpu in GPUS:
        code, out, err = run(capsys, "--plan", "--gpu", gpu)
        assert (code, err) == (0, "") and gpu in out and "not measured" in out
        assert max(map(len, out.splitlines())) <= 80
    report = json.loads(run(capsys, "--plan", "--gpu", "h200-141gb", "--json")[1])
    out = run(capsys, "--plan", "--gpu", "h200-141gb")[1]
    assert all(f"{row['streams']:,} " in out for row in report["rows"])


def test_bundle(capsys: pytest.CaptureFixture[str], demo_bundle: Bundle) -> None:
    code, out, _ = run(capsys, "--plan", "--gpu", "rtx-4090-24gb", "--json", str(demo_bundle.path))
    report = json.loads(out)
    assert code == 0 and report["model"] == demo_bundle.manifest.name
    encoder = demo_bundle.manifest.encoder
    caches = encoder.layers * encoder.d_model * (2 * encoder.cache + encoder.conv_cache)
    for row in rows_of(report, precision="fp32"):
        assert 4 * caches < row["bytes_per_stream"] < 4 * caches + 10_000


def test_gpu_of_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    device = SimpleNamespace(name="NVIDIA L4", free_bytes=20 << 30, close=lambda: closed.append(True))
    monkeypatch.setattr(cuda, "CudaDevice", lambda: device)
    report = json.loads(run(capsys, "--plan", "--json")[1])
    assert (report["gpu"], report["available_bytes"]) == ("NVIDIA L4", (20 << 30) - (512 << 20)) and closed == [True]

    def no_gpu() -> Any:
        raise BackendError("no usable NVIDIA GPU; run `nemostream doctor` for details.")

    monkeypatch.setattr(cuda, "CudaDevice", no_gpu)
    code, out, err = run(capsys, "--plan")
    assert (code, out) == (2, "") and "no usable NVIDIA GPU" in err and all(name in err for name in GPUS)


def test_invalid_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "--plan", "--gpu", "h100")
    assert code == 2 and "'h100'" in err and "h100-80gb" in err
    for arguments in (["--gpu", "h100-80gb"], [str(tmp_path)]):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "") and "--plan" in err
    assert run(capsys, "--plan", "--gpu", "h100-80gb", str(tmp_path))[0] == 4
