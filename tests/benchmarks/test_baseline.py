"""The ladder end to end on the embedded model: who takes part, what is told, and that different results are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemostream import engines
from nemostream.benchmarks import report
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.harness.roofline import Machine
from nemostream.benchmarks.harness.synthetic import speech
from nemostream.benchmarks.harness.timed import Feed, timed_backend
from nemostream.bundle import Bundle
from nemostream.errors import BackendError, OptionError, ParityError

pytest.importorskip("nemo")

from nemostream.benchmarks import baseline
from nemostream.benchmarks.harness import competitors, nemo, runners

pytestmark = pytest.mark.nemo

CHECKPOINT = Path(__file__).parents[2] / "examples" / "demo_model" / "demo.nemo"
MACHINE = Machine(1e10, {"fp32": 1e11, "int8": 4e11}, {"read": 10.0})
OURS = ("nemostream, fp32", "nemostream, int8")


def ladder(bundle: Bundle, names: tuple[str, ...], **options: Any) -> records.Record:
    options = {"batches": (2,), "chunk_ms": (560,), "repeats": 2, "threads": 1, "machine": MACHINE} | options
    return baseline.compare_steps(bundle, CHECKPOINT, names, **options)


@pytest.mark.filterwarnings("ignore")
def test_everybody(demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sherpa_onnx", reason="needs the bench extra")
    # A voice that the model knows: of others it guesses among equals, and each side otherwise.
    clip = engines.speech(demo_bundle.manifest)[1]
    monkeypatch.setattr(baseline, "speech", lambda: np.tile(np.append(clip, np.zeros(8000, np.float32)), 4))
    names = [name for name in competitors.SIDES["cpu"] if "compile" not in name] + ["nemo graph"]
    result = ladder(demo_bundle, tuple(names), batches=(1, 3))
    assert list(result["method"]["left_out"]) == ["nemo graph"]
    assert "a CUDA graph needs a GPU" in result["method"]["left_out"]["nemo graph"]
    assert len(result["rows"]) == 2 * (len(names) - 1)
    by_side = {row["case"]["side"]: row for row in result["rows"] if row["case"]["batch"] == 3}
    assert by_side["nemostream, fp32"]["values"]["times"]["nemostream, fp32"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    for name, row in by_side.items():
        assert len(row["ms"]["step"]) == 2 and row["values"]["covers"] and row["values"]["setup"]
        for our in OURS:
            ratios = [a / b for a, b in zip(row["ms"]["step"], by_side[our]["ms"]["step"], strict=True)]
            assert row["values"]["times"][our]["max"] == pytest.approx(max(ratios), rel=1e-2)
        if name != "transformers":
            exact = name in ("nemostream, fp32", "NeMo, fp32")
            assert row["values"]["same_tokens"] >= (1.0 if exact else 0.5)
    assert by_side["nemostream, int8"]["values"]["floor_ms"]["floor"] > 0
    records.write(result, tmp_path / "x.json")
    text = report.write_report([records.read(tmp_path / "x.json")], tmp_path / "x.md")
    assert text.count("| 560 ms | 3 |") == len(by_side) and (tmp_path / "x-steps.png").exists()
    assert all(f"* {name}: " in text for name in by_side) and "Left out: nemo graph (OptionError" in text


def test_ratios_by_hand() -> None:
    """By round, so that a slow round of both is none of the ratio's business."""
    assert baseline.ratios([2.0, 30.0, 3.0], [1.0, 10.0, 2.0]) == {"median": 2.0, "min": 1.5, "max": 3.0}


@pytest.mark.slow
def test_compiled(demo_bundle: Bundle) -> None:
    """torch.compile takes a minute, in fp32 it says what NeMo says, and nothing is compiled in a timed round."""
    import torch

    result = ladder(demo_bundle, ("ours fp32", "nemo fp32", "nemo compile"), batches=(1,))
    compiled = {row["case"]["side"]: row for row in result["rows"]}["NeMo, compile"]
    assert compiled["values"]["same_tokens"] == 1.0 and compiled["figures"]["step"]["max"] < 1000
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def test_by_its_command(demo_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nemostream.cli.main import _run

    arguments = [
        "--checkpoint",
        str(CHECKPOINT),
        "--bundle",
        str(demo_bundle.path),
        "--chunk-ms",
        "560",
        "--batch",
        "1",
    ]
    arguments += ["--sides", "ours fp32", "nemo fp32", "--repeats", "2", "--out", str(tmp_path), "--device", "cpu"]
    assert _run(["bench", "baseline", *arguments]) == 0
    said = capsys.readouterr().out
    assert said.startswith("## baseline") and (tmp_path / "baseline-steps.svg").exists()
    result = records.read(tmp_path / "baseline.json")
    assert [row["case"]["side"] for row in result["rows"]] == ["nemostream, fp32", "NeMo, fp32"]
    assert baseline.headline(result).count("\n| ") == 4  # two lines of head, two sides


# -- what only a GPU can run, as far as a CPU can show it --------------------------------------------------------------


def test_the_captured_step(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is not recorded but run again, on its static buffers: it must say what the eager step says."""
    monkeypatch.setattr(nemo, "record_graph", lambda work: work)
    model, chunk = nemo.load_nemo(CHECKPOINT), demo_bundle.manifest.chunk(560)
    feed = Feed(demo_bundle.manifest, speech(), 2, 98)
    said = []
    for kind in ("bf16", "graph"):
        side = nemo.Nemo(model, feed, chunk, kind)
        side.fill(70)
        for position in range(70, 98, 7):
            side.step(position)
        said.append(side.tokens())
        side.close()
    assert said[0] == said[1] and sum(map(len, said[0])) > 4


def test_the_captured_step_asks_the_host_for_nothing(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture fails on whatever waits for a number from the device, or brings one there."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    def record_graph(work: Any) -> Any:
        work()  # the first run may set things up
        with Watch():
            work()
        return work

    monkeypatch.setattr(nemo, "record_graph", record_graph)
    chunk = demo_bundle.manifest.chunk(80)
    side = nemo.Nemo(nemo.load_nemo(CHECKPOINT), Feed(demo_bundle.manifest, speech(), 2, 80), chunk, "graph")
    side.fill(70)
    assert {"layer_norm", "copy_"} <= seen  # it was watched
    waiting = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh"}
    assert not seen & waiting
    assert torch.is_tensor(side._outputs[0])


def test_a_gpus_ladder(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU all sides run on it, ours by an engine made for it; each is left out by name where not."""
    with pytest.raises(BackendError, match="no NVIDIA GPU"), timed_backend(demo_bundle, [], "fp16", 1, device="cuda"):
        pass
    asked: list[str] = []

    def load(checkpoint: Path, device: str = "cpu") -> Any:
        asked.append(device)
        return sides_model

    sides_model = nemo.load_nemo(CHECKPOINT)
    monkeypatch.setattr(competitors, "load_nemo", load)
    result = ladder(demo_bundle, ("ours fp16", "nemo fp32"), device="cuda")
    assert asked == ["cuda"]
    assert "no NVIDIA GPU" in result["method"]["left_out"]["ours fp16"]
    (row,) = result["rows"]
    assert row["values"]["times"] == {} and result["method"]["device"] == "cuda"
    with pytest.raises(OptionError, match="choose cpu or cuda"):
        ladder(demo_bundle, ("ours fp32",), device="tpu")


def test_other_weights_are_not_compared(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    load = nemo.load_nemo

    def other(checkpoint: Path, device: str = "cpu") -> Any:
        model = load(checkpoint, device)
        with torch.inference_mode():
            for parameter in model.joint.joint_net.parameters():
                parameter += 3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        return model

    monkeypatch.setattr(competitors, "load_nemo", other)
    with pytest.raises(ParityError, match="no point in comparing"):
        ladder(demo_bundle, ("ours fp32", "nemo fp32"), repeats=20)


def test_a_bundle_of_another_checkpoint_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(ParityError, match="was made of another checkpoint"):
        ladder(tiny_bundle, ("ours fp32", "nemo fp32"))


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
    model = nemo.load_nemo(CHECKPOINT)
    chunk = demo_bundle.manifest.chunk(560)
    exported = nemo.export_nemo(model, demo_bundle.manifest, chunk, tmp_path / "exported")
    feed = Feed(demo_bundle.manifest, engines.speech(demo_bundle.manifest)[1], 2, 8 * chunk.frames)
    onnx = runners.NemoOnnx(exported, model, feed, chunk, 1)
    onnx.fill(8 * chunk.frames)
    theirs = nemo.Nemo(model, feed, chunk)
    theirs._use(chunk)
    for step in range(8):
        theirs.step(step * chunk.frames)
    rest = [row[3:] for row in theirs.tokens()]  # without the first chunk's words, which NeMo's export hears otherwise
    assert records.agreement(rest, onnx.tokens()) > 0.9
    assert sum(map(len, rest)) > 4
