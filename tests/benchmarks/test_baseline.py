"""The ladder end to end on the embedded model: who takes part, what is told, and that different results are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemostream.benchmarks import record, report
from nemostream.benchmarks.floor import Machine
from nemostream.errors import OptionError, ParityError
from nemostream.spec import Bundle

pytest.importorskip("nemo")

from nemostream.benchmarks import baseline, sides

pytestmark = pytest.mark.nemo

CHECKPOINT = Path(__file__).parents[2] / "examples" / "demo_model" / "demo.nemo"
MACHINE = Machine(1e10, {"fp32": 1e11, "int8": 4e11}, {"read": 10.0})


def ladder(bundle: Bundle, names: tuple[str, ...], **options: Any) -> record.Record:
    options = {"batches": (2,), "chunk_ms": (560,), "repeats": 2, "threads": 1, "machine": MACHINE} | options
    return baseline.compare_steps(bundle, CHECKPOINT, names, **options)


@pytest.mark.filterwarnings("ignore")
def test_everybody(demo_bundle: Bundle, tmp_path: Path) -> None:
    names = ["ours fp32", "ours int8", "nemo fp32", "nemo bf16", "nemo graph", "transformers", "onnx"]
    try:
        import sherpa_onnx  # noqa: F401

        names += ["sherpa fp32", "sherpa int8"]
    except ImportError:
        pass
    result = ladder(demo_bundle, tuple(names), batches=(1, 3))
    import torch

    missing = [] if torch.cuda.is_available() else ["nemo graph"]
    assert list(result["method"]["left_out"]) == missing
    assert len(result["rows"]) == 2 * (len(names) - len(missing))
    by_side = {row["case"]["side"]: row for row in result["rows"] if row["case"]["batch"] == 3}
    assert by_side["nemostream, fp32"]["values"]["times_ours"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    for name, row in by_side.items():
        assert len(row["ms"]["step"]) == 2 and row["values"]["covers"]
        ours = by_side["nemostream, fp32"]["ms"]["step"]
        ratios = [theirs / mine for theirs, mine in zip(row["ms"]["step"], ours, strict=True)]
        assert row["values"]["times_ours"]["max"] == pytest.approx(max(ratios), rel=1e-2)
        if name != "transformers":
            assert row["values"]["same_tokens"] >= (1.0 if name in ("nemostream, fp32", "NeMo, fp32") else 0.5)
    assert by_side["nemostream, int8"]["values"]["floor_ms"]["floor"] > 0
    record.write(result, tmp_path / "x.json")
    text = report.write_report([record.read(tmp_path / "x.json")], tmp_path / "x.md")
    assert text.count("| 560 ms | 3 |") == len(by_side) and (tmp_path / "x-steps.png").exists()


def test_other_weights_are_not_compared(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    load = sides.load_nemo

    def other(checkpoint: Path) -> Any:
        model = load(checkpoint)
        with torch.inference_mode():
            for parameter in model.joint.joint_net.parameters():
                parameter += 3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        return model

    monkeypatch.setattr(baseline, "load_nemo", other)
    with pytest.raises(ParityError, match="no point in comparing"):
        ladder(demo_bundle, ("ours fp32", "nemo fp32"), repeats=20)


def test_unknown_chunk_size_and_side(demo_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match="choose one of 80"):
        ladder(demo_bundle, ("ours fp32",), chunk_ms=(100,))
    with pytest.raises(OptionError, match="there is no side 'kaldi'"):
        ladder(demo_bundle, ("kaldi",))
    with pytest.raises(OptionError, match="at least 1"):
        ladder(demo_bundle, ("ours fp32",), repeats=0)


def test_threads_are_given_back(demo_bundle: Bundle) -> None:
    import torch

    before = torch.get_num_threads()
    with pytest.raises(OptionError):
        ladder(demo_bundle, ("ours fp32",), chunk_ms=(100,), threads=before + 1)
    assert torch.get_num_threads() == before


def test_nemos_export_says_what_nemo_says(demo_bundle: Bundle, tmp_path: Path) -> None:
    """The opponent is set up right: from the second chunk on its words are NeMo's, alone and in a batch."""
    model = sides.load_nemo(CHECKPOINT)
    chunk = demo_bundle.manifest.chunk(560)
    exported = sides.export_nemo(model, demo_bundle.manifest, chunk, tmp_path / "exported")
    clip = sides_clip(demo_bundle)
    feed = sides.Feed(demo_bundle.manifest, clip, 2, 8 * chunk.frames)
    onnx = sides.NemoOnnx(exported, model, feed, chunk, 1)
    onnx.fill(8 * chunk.frames)
    nemo = sides.Nemo(model, feed, chunk)
    nemo._use(chunk)
    for step in range(8):
        nemo.step(step * chunk.frames)
    assert record.agreement(nemo.tokens(), onnx.tokens()) > 0.9
    assert sum(map(len, nemo.tokens())) > 4


def sides_clip(bundle: Bundle) -> Any:
    from nemostream.engines import speech

    return speech(bundle.manifest)[1]
