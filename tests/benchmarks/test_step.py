"""The step benchmark end to end on a tiny model: what the report holds, and that different results are not compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemostream.errors import OptionError, ParityError
from nemostream.spec import Bundle

pytest.importorskip("nemo")

from nemostream.benchmarks.sides import load_nemo
from nemostream.benchmarks.step import TOLERANCE, compare_steps, show

pytestmark = pytest.mark.nemo


@pytest.fixture(scope="module", autouse=True)
def _small_arrays() -> Any:
    """A bandwidth is not what is tested here."""
    from nemostream.benchmarks import floor, step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "measure_machine", lambda: floor.measure_machine(1 << 20, repeats=1, size=128))
        yield


@pytest.fixture
def nemo_model(tiny_checkpoint: Path) -> Any:
    return load_nemo(tiny_checkpoint)


@pytest.mark.filterwarnings("ignore")
def test_report(tiny_bundle: Bundle, nemo_model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    report = compare_steps(tiny_bundle, nemo_model, batches=(1, 3), repeats=2, threads=1)
    assert json.loads(json.dumps(report)) == report
    assert report["hardware"]["threads"] == 1 and report["machine"]["bandwidth_gb_s"] > 0
    keys = [(row["chunk_ms"], row["batch"], row["what"]) for row in report["rows"]]
    assert keys == [(ms, b, what) for ms in (80, 160, 560, 1120) for b in (1, 3) for what in ("encoder", "step")]
    for row in report["rows"]:
        assert row["other_work_cores"] >= 0
        for side in ("ours", "nemo"):
            figures, raw = row[f"{side}_ms"], row["raw_ms"][side]
            assert len(raw) == 2 and 0 < figures["min"] <= figures["median"] <= figures["max"]
            assert (figures["min"], figures["max"]) == (min(raw), max(raw))
        assert row["ratio"]["max"] == max(
            n / o for o, n in zip(row["raw_ms"]["ours"], row["raw_ms"]["nemo"], strict=True)
        )
        floor = row["floor_ms"]
        assert floor["floor"] == floor[floor["binding"]] == max(floor["memory"], floor["compute"])
        if row["what"] == "encoder":
            assert row["max_abs_difference"] <= TOLERANCE
    show(report)
    assert "NeMo ÷ ours" in capsys.readouterr().out


def test_floor_grows_with_the_work(tiny_bundle: Bundle) -> None:
    from nemostream.benchmarks.floor import encoder_work

    short, long = (encoder_work(tiny_bundle, tiny_bundle.manifest.chunk(ms)) for ms in (80, 1120))
    spec = tiny_bundle.manifest.encoder
    # Two feed-forward nets of 4D, four attention projections and two pointwise convolutions: 23 D^2 per layer.
    assert long.flops_per_row > 14 * short.flops_per_row > 14 * 2 * 23 * spec.layers * spec.d_model**2
    assert 4 * 23 * spec.layers * spec.d_model**2 < short.weight_bytes <= tiny_bundle.manifest.weights.bytes


@pytest.mark.parametrize(
    ("part", "words"), [("encoder.layers.1", "encoders are"), ("joint.joint_net", "no point in comparing")]
)
def test_other_weights_are_not_compared(tiny_bundle: Bundle, nemo_model: Any, part: str, words: str) -> None:
    import torch

    with torch.inference_mode():
        for parameter in nemo_model.get_submodule(part).parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ParityError, match=words):
        compare_steps(tiny_bundle, nemo_model, batches=(1,), chunk_ms=(560,), repeats=10, threads=1)


def test_unknown_chunk_size(tiny_bundle: Bundle, nemo_model: Any) -> None:
    with pytest.raises(OptionError, match="choose one of 80"):
        compare_steps(tiny_bundle, nemo_model, chunk_ms=(100,))


def test_threads_are_given_back(tiny_bundle: Bundle, nemo_model: Any) -> None:
    import torch

    before = torch.get_num_threads()
    compare_steps(tiny_bundle, nemo_model, batches=(1,), chunk_ms=(1120,), repeats=1, threads=before + 1)
    assert torch.get_num_threads() == before
