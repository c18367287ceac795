"""The baseline on the packaged model: runners, reports, and errors if results differ."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemostream import engines
from nemostream.benchmarks import report
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.roofline import Machine
from nemostream.benchmarks.harness.synthetic import speech
from nemostream.benchmarks.harness.timed import AudioFeed, timed_backend
from nemostream.bundle import Bundle
from nemostream.errors import BackendError, OptionError, ParityError

pytest.importorskip("nemo")

from nemostream.benchmarks import baseline
from nemostream.benchmarks.harness import competitors, nemo, runners

pytestmark = pytest.mark.nemo

CHECKPOINT = Path(__file__).parents[2] / "examples" / "demo_model" / "demo.nemo"
MACHINE = Machine(1e10, {"fp32": 1e11, "int8": 4e11}, {"read": 10.0})
NEMOSTREAM_RUNNERS = ("nemostream, fp32", "nemostream, int8")


def compare(bundle: Bundle, names: tuple[str, ...], **options: Any) -> records.Record:
    options = {"batches": (2,), "chunk_ms": (560,), "repeats": 2, "threads": 1, "machine": MACHINE} | options
    return baseline.compare_steps(bundle, CHECKPOINT, names, **options)


@pytest.mark.filterwarnings("ignore")
def test_all_runners(demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sherpa_onnx", reason="needs the bench extra")
    # Speech like the training data: on other speech, small differences change the tokens.
    clip = engines.speech(demo_bundle.manifest)[1]
    monkeypatch.setattr(baseline, "speech", lambda: np.tile(np.append(clip, np.zeros(8000, np.float32)), 4))
    names = [name for name in competitors.RUNNERS["cpu"] if "compile" not in name]
    names += ["nemo graph", "nemo built-in graph"]  # skipped without a GPU
    result = compare(demo_bundle, tuple(names), batches=(1, 3))
    assert set(result["method"]["skipped"]) == {"nemo graph", "nemo built-in graph", "transcribe.cpp q8"}
    assert "a CUDA graph needs a GPU" in result["method"]["skipped"]["nemo graph"]
    single = [row for row in result["rows"] if row["case"]["runner"] == "transcribe.cpp, q8"]
    assert len(single) == (find_spec("transcribe_cpp") is not None)
    assert all(row["case"]["batch"] == 1 and row["values"]["same_tokens"] >= 0.9 for row in single)
    assert len(result["rows"]) - len(single) == 2 * (len(names) - 3)
    by_runner = {row["case"]["runner"]: row for row in result["rows"] if row["case"]["batch"] == 3}
    own = by_runner["nemostream, fp32"]["values"]["relative_time"]["nemostream, fp32"]
    assert own == {"median": 1.0, "min": 1.0, "max": 1.0}
    for name, row in by_runner.items():
        assert len(row["ms"]["step"]) == 2 and row["values"]["covers"] and row["values"]["setup"]
        for reference in NEMOSTREAM_RUNNERS:
            pairs = zip(row["ms"]["step"], by_runner[reference]["ms"]["step"], strict=True)
            ratios = [a / b for a, b in pairs]
            assert row["values"]["relative_time"][reference]["max"] == pytest.approx(max(ratios), rel=1e-2)
        if name != "transformers":
            exact = name in ("nemostream, fp32", "NeMo, fp32")
            assert row["values"]["same_tokens"] >= (1.0 if exact else 0.5)
    assert by_runner["nemostream, int8"]["values"]["roofline_ms"]["roofline"] > 0
    records.write(result, tmp_path / "x.json")
    text, _ = report.write_report([records.read(tmp_path / "x.json")], tmp_path / "x.md")
    assert text.count("| 560 ms | 3 |") == len(by_runner) and (tmp_path / "x-steps.png").exists()
    assert all(f"* {name}: " in text for name in by_runner) and "Skipped: nemo graph (OptionError" in text
    assert "nemo built-in graph (OptionError" in text


def test_ratios() -> None:
    """Ratios are computed per round, so that a slow round of both does not change them."""
    assert baseline.ratios([2.0, 30.0, 3.0], [1.0, 10.0, 2.0]) == {"median": 2.0, "min": 1.5, "max": 3.0}


@pytest.mark.slow
def test_compiled(demo_bundle: Bundle) -> None:
    """torch.compile in fp32 emits the same tokens as NeMo, and does not compile in a timed round. Takes a minute."""
    import torch

    result = compare(demo_bundle, ("nemostream fp32", "nemo fp32", "nemo compile"), batches=(1,))
    compiled = {row["case"]["runner"]: row for row in result["rows"]}["NeMo, compile"]
    assert compiled["values"]["same_tokens"] == 1.0 and compiled["figures"]["step"]["max"] < 1000
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def test_command(demo_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    arguments += [
        "--runners",
        "nemostream fp32",
        "nemo fp32",
        "--repeats",
        "2",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert _run(["bench", "baseline", *arguments]) == 0
    output = capsys.readouterr().out
    assert output.startswith("## baseline") and (tmp_path / "baseline-steps.svg").exists()
    result = records.read(tmp_path / "baseline.json")
    assert [row["case"]["runner"] for row in result["rows"]] == ["nemostream, fp32", "NeMo, fp32"]
    headline = baseline.headline(result)
    for row in result["rows"]:
        relative = row["values"]["relative_time"]["nemostream, fp32"]["median"]
        suffix = "" if row["case"]["runner"].startswith("nemostream") else f" ({relative:.2f})"
        assert f"{row['case']['runner']} {tables.digits(row['figures']['step']['p50'])} ms{suffix}" in headline


# -- parts for a GPU, tested on a CPU ----------------------------------------------------------------------------------


def test_captured_step(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder step on static buffers, run again instead of captured, gives the tokens of the eager step."""
    monkeypatch.setattr(nemo, "record_graph", lambda work: work)
    model, chunk = nemo.load_nemo(CHECKPOINT), demo_bundle.manifest.chunk(560)
    feed = AudioFeed(demo_bundle.manifest, speech(), 2, 98)
    tokens = []
    for kind in ("bf16", "graph"):
        runner = nemo.NemoRunner(model, feed, chunk, kind)
        runner.fill_caches(70)
        for position in range(70, 98, 7):
            runner.step(position)
        tokens.append(runner.tokens())
        runner.close()
    assert tokens[0] == tokens[1] and sum(map(len, tokens[0])) > 4


class StreamingGraph:
    """The interface of NeMo's helper for CUDA graphs (pull request 15863). It counts steps and captures nothing."""

    def __init__(self, encoder: Any, warmup_steps: int) -> None:
        self.warmup_steps, self.mode, self.steps = warmup_steps, None, 0
        self._step = encoder.cache_aware_stream_step

    def force_cuda_graphs_mode(self, mode: str) -> None:
        self.mode = mode

    def __call__(self, **inputs: Any) -> Any:
        # Only steps of this kind are captured.
        assert inputs["processed_signal_length"] is not None and not inputs["keep_all_outputs"]
        self.steps += 1
        return self._step(**inputs)


def set_streaming_cuda_graphs(encoder: Any, enabled: bool, warmup_steps: int = 3) -> StreamingGraph | None:
    vars(encoder).pop("cache_aware_stream_step", None)
    if enabled:
        encoder.cache_aware_stream_step = StreamingGraph(encoder, warmup_steps)
    return vars(encoder).get("cache_aware_stream_step")


def test_built_in_graph(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo's CUDA graph is captured before the timed steps, must not fall back to eager, and is removed on close."""
    from nemo.collections.asr.modules import ConformerEncoder

    monkeypatch.setattr(ConformerEncoder, "set_streaming_cuda_graphs", set_streaming_cuda_graphs, raising=False)
    chunk = demo_bundle.manifest.chunk(560)
    feed = AudioFeed(demo_bundle.manifest, speech(), 1, 98)
    tokens, models = [], []
    with competitors.RunnerFactory(demo_bundle, CHECKPOINT, "cpu", 1, None, lambda message: None) as factory:
        with pytest.raises(OptionError, match="a CUDA graph needs a GPU"):
            factory.create("nemo built-in graph", feed, chunk, contextlib.ExitStack())
        for module in (competitors, nemo):
            monkeypatch.setattr(module, "check_built_in_graph", lambda model: None)
        for name in ("nemo bf16", "nemo built-in graph"):
            runner = factory.create(name, feed, chunk, contextlib.ExitStack())
            models.append(runner._model)
            runner.fill_caches(70)
            helper = vars(runner._model.encoder).get("cache_aware_stream_step")
            assert (helper is None) == (name == "nemo bf16")
            if helper:
                assert helper.mode == "full_graph" and helper.steps == helper.warmup_steps + 1
            for position in range(70, 98, 7):
                runner.step(position)
            if helper:
                assert helper.steps == helper.warmup_steps + 1 + 4
            tokens.append(runner.tokens())
            runner.close()
            assert "cache_aware_stream_step" not in vars(runner._model.encoder)
    assert models[0] is not models[1]  # the other runners stay eager
    assert tokens[0] == tokens[1] and sum(map(len, tokens[0])) > 4


def test_built_in_graph_is_detected() -> None:
    """Versions up to 3.0.0 have none."""
    from types import SimpleNamespace

    from nemo import __version__
    from nemo.collections.asr.modules import ConformerEncoder

    if hasattr(ConformerEncoder, "set_streaming_cuda_graphs"):
        pytest.skip("this version has it")
    with pytest.raises(OptionError, match=f"NeMo {__version__} has no CUDA graph of its own for the encoder step"):
        nemo.check_built_in_graph(SimpleNamespace(encoder=ConformerEncoder))


def test_captured_step_does_not_synchronise(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture fails for operators that copy values between host and device."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    def record_graph(work: Any) -> Any:
        work()  # the first run may initialise
        with Watch():
            work()
        return work

    monkeypatch.setattr(nemo, "record_graph", record_graph)
    chunk = demo_bundle.manifest.chunk(80)
    feed = AudioFeed(demo_bundle.manifest, speech(), 2, 80)
    runner = nemo.NemoRunner(nemo.load_nemo(CHECKPOINT), feed, chunk, "graph")
    runner.fill_caches(70)
    assert {"layer_norm", "copy_"} <= seen  # operators were recorded
    waiting = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh"}
    assert not seen & waiting
    assert torch.is_tensor(runner._outputs[0])


def test_baseline_on_a_gpu(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """With device "cuda" all runners use the GPU; runners that cannot be created are reported as skipped."""
    with (
        pytest.raises(BackendError, match="no usable NVIDIA GPU"),
        timed_backend(demo_bundle, [], "fp16", 1, device="cuda"),
    ):
        pass
    devices: list[str] = []

    def load(checkpoint: Path, device: str = "cpu") -> Any:
        devices.append(device)
        return model

    model = nemo.load_nemo(CHECKPOINT)
    monkeypatch.setattr(competitors, "load_nemo", load)
    result = compare(demo_bundle, ("nemostream fp16", "nemo fp32"), device="cuda")
    assert devices == ["cuda"]
    assert "no usable NVIDIA GPU" in result["method"]["skipped"]["nemostream fp16"]
    (row,) = result["rows"]
    assert row["values"]["relative_time"] == {} and result["method"]["device"] == "cuda"
    with pytest.raises(OptionError, match="choose cpu or cuda"):
        compare(demo_bundle, ("nemostream fp32",), device="tpu")


def test_different_tokens_raise_an_error(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    load = nemo.load_nemo

    def other(checkpoint: Path, device: str = "cpu") -> Any:
        model = load(checkpoint, device)
        with torch.inference_mode():
            for parameter in model.joint.joint_net.parameters():
                parameter += 3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        return model

    monkeypatch.setattr(competitors, "load_nemo", other)
    with pytest.raises(ParityError, match="their times cannot be compared"):
        compare(demo_bundle, ("nemostream fp32", "nemo fp32"), repeats=20)


def test_bundle_of_another_checkpoint_is_rejected(tiny_bundle: Bundle) -> None:
    with pytest.raises(ParityError, match="is an export of another checkpoint"):
        compare(tiny_bundle, ("nemostream fp32", "nemo fp32"))


def test_unknown_chunk_size_and_runner(demo_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match="choose one of 80"):
        compare(demo_bundle, ("nemostream fp32",), chunk_ms=(100,))
    with pytest.raises(OptionError, match="unknown runner 'kaldi'"):
        compare(demo_bundle, ("kaldi",))
    with pytest.raises(OptionError, match="at least 1"):
        compare(demo_bundle, ("nemostream fp32",), repeats=0)


def test_number_of_threads_is_restored(demo_bundle: Bundle) -> None:
    import torch

    before = torch.get_num_threads()
    with pytest.raises(OptionError):
        compare(demo_bundle, ("nemostream fp32",), chunk_ms=(100,), threads=before + 1)
    assert torch.get_num_threads() == before


def test_onnx_export_of_nemo(demo_bundle: Bundle, tmp_path: Path) -> None:
    """From the second chunk on, the runner of NeMo's export emits almost all tokens of NeMo."""
    model = nemo.load_nemo(CHECKPOINT)
    chunk = demo_bundle.manifest.chunk(560)
    exported = nemo.export_nemo(model, demo_bundle.manifest, chunk, tmp_path / "exported")
    feed = AudioFeed(demo_bundle.manifest, engines.speech(demo_bundle.manifest)[1], 2, 8 * chunk.frames)
    onnx = runners.NemoOnnxRunner(exported, model, feed, chunk, 1)
    onnx.fill_caches(8 * chunk.frames)
    reference = nemo.NemoRunner(model, feed, chunk)
    reference._set_chunk(chunk)
    for step in range(8):
        reference.step(step * chunk.frames)
    rest = [row[3:] for row in reference.tokens()]  # without the first chunk, which the export processes differently
    assert records.agreement(rest, onnx.tokens()) > 0.9
    assert sum(map(len, rest)) > 4
