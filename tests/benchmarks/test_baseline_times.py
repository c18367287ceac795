"""Comparison of runners whose steps take known times, without the packages of the competitors."""

from __future__ import annotations

import contextlib
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("onnx", reason="needs the build extra")

from nemostream.benchmarks import baseline
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.harness.plots import Bar, BarChart
from nemostream.benchmarks.harness.roofline import Machine, Work
from nemostream.bundle import Bundle
from nemostream.errors import BackendError, OptionError, ParityError

CHECKPOINT = Path(__file__).parents[2] / "examples" / "demo_model" / "demo.nemo"

time_rounds = baseline._time_rounds


class Runner:
    """A runner whose second steps take `seconds` in turn (the last one for all further ones), and emit one token each.

    The steps before them take a quarter of a second, and emit one token each.
    """

    covers, setup = "PCM to tokens", "as it is"

    def __init__(self, name: str, seconds: list[float], clock: Any, exact: bool = False, token: int = 1) -> None:
        self.name, self.exact, self._seconds, self._clock, self._token = name, exact, list(seconds), clock, token
        self.positions: list[int] = []
        self.filled: int | None = None
        self.closed = False
        self._tokens: list[list[int]] = []

    def fill_caches(self, frames: int) -> None:
        self.filled = frames
        self._tokens = [[9, 9], [9]]  # emitted before the timed steps: they do not count

    def step(self, position: int) -> None:
        self.positions.append(position)
        if len(self.positions) % 2:
            self._clock.sleep(0.25)
        else:
            self._clock.sleep(self._seconds.pop(0) if len(self._seconds) > 1 else self._seconds[0])
        for row in self._tokens:
            row.append(self._token)

    def tokens(self) -> list[list[int]] | None:
        return [list(row) for row in self._tokens] if self._token else None

    def close(self) -> None:
        self.closed = True


def test_rounds(demo_bundle: Bundle, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three warm-up rounds do not count; every step is after a pause and another step, which are not timed."""
    made: list[float] = []

    class OtherWork:
        def __init__(self) -> None:
            self.begin = clock.now
            made.append(clock.now)

        def cores(self) -> float:
            return clock.now - self.begin

    monkeypatch.setattr(baseline, "OtherWork", OtherWork)
    runners = [
        Runner("a", [9.0, 9.0, 9.0, 1.0, 2.0], clock),
        Runner("b", [7.0, 7.0, 7.0, 4.0, 8.0], clock),
        Runner("c", [0.5], clock),
    ]
    begin = clock.now
    rounds, other = baseline._time_rounds(runners, demo_bundle.manifest.chunk(160), 70, 2, clock, clock.sleep)  # type: ignore[arg-type]
    assert rounds == [pytest.approx({"a": 1.0, "b": 4.0, "c": 0.5}), pytest.approx({"a": 2.0, "b": 8.0, "c": 0.5})]
    assert {tuple(runner.positions) for runner in runners} == {tuple(range(70, 90, 2))}
    # Measured during the timed rounds: 15.5 + 0.5 seconds of timed steps, six others, and six pauses.
    assert other == pytest.approx(16.0 + 6 * 0.27)
    assert clock.now - begin == pytest.approx(3 * 16.5 + 16.0 + 15 * 0.27)
    many, _ = baseline._time_rounds(runners, demo_bundle.manifest.chunk(160), 70, 12, clock, clock.sleep)  # type: ignore[arg-type]
    assert len({tuple(found) for found in many}) > 3  # the order is random


class Factory:
    """Creates the given runners; others cannot be created."""

    device_type = "cpu"

    def __init__(self, bundle: Bundle, runners: dict[str, Runner]) -> None:
        self.bundle, self.runners = bundle, runners
        self.messages: list[str] = []
        self.exported: list[int] = []
        self.feeds: list[Any] = []

    def progress(self, message: str) -> None:
        self.messages.append(message)

    def export(self, chunk: Any) -> None:
        self.exported.append(chunk.ms)

    def create(self, name: str, feed: Any, chunk: Any, stack: contextlib.ExitStack) -> Runner:
        self.feeds.append(feed)
        if name not in self.runners:
            raise BackendError(f"{name} is not available\nhere")
        return self.runners[name]


def compare(demo_bundle: Bundle, runners: list[Runner], monkeypatch: pytest.MonkeyPatch, *more: str) -> Any:
    clock = runners[0]._clock

    def encoder_work(bundle: Bundle, chunk: Any, precision: str, device: str) -> Work:
        assert (chunk.ms, device) == (160, "cpu")
        return Work({"fp32": 4_000_000, "int8": 1_000_000}[precision], 1e6)

    monkeypatch.setattr(baseline, "encoder_work", encoder_work)
    monkeypatch.setattr(baseline, "OtherWork", lambda: SimpleNamespace(cores=lambda: 0.01234))
    monkeypatch.setattr(baseline, "_time_rounds", lambda *given: time_rounds(*given, clock, clock.sleep))
    factory: Any = Factory(demo_bundle, {runner.name: runner for runner in runners})
    machine = Machine(1e9, {"fp32": 1e9, "int8": 4e9}, {})
    names = [runner.name for runner in runners] + list(more)
    return factory, baseline._compare(factory, names, demo_bundle.manifest.chunk(160), 2, 2, machine)


def test_runners_of_one_stream(demo_bundle: Bundle, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take part at batch 1 of every chunk size, and the report has the reason for the other batch sizes."""
    pytest.importorskip("torch")
    compared = []

    def compare(factory: Any, names: list[str], chunk: Any, batch: int, *rest: Any) -> Any:
        compared.append((chunk.ms, batch, names))
        return [], {"sherpa int8": "missing"} if "sherpa int8" in names else {}

    factory = SimpleNamespace(discard_exports=lambda: None)
    monkeypatch.setattr(baseline, "_compare", compare)
    monkeypatch.setattr(baseline, "RunnerFactory", lambda *given: contextlib.nullcontext(factory))
    names = ["nemostream int8", "sherpa int8", "transcribe.cpp q8", "transcribe.cpp fp32"]
    options: Any = {"chunk_ms": (80, 560), "machine": Machine(1.0, {}, {})}
    found = baseline.compare_steps(demo_bundle, CHECKPOINT, names, (8, 1, 2), **options)
    several, single = names[:1], [names[0], *names[2:]]
    assert compared[0] == (80, 8, names[:2])
    assert compared[1:] == [(80, 1, single), (80, 2, several), (560, 8, several), (560, 1, single), (560, 2, several)]
    reason = "not at batch 8, 2: one stream per model"
    assert found["method"]["skipped"] == {"sherpa int8": "missing", names[2]: reason, names[3]: reason}
    found = baseline.compare_steps(demo_bundle, CHECKPOINT, names[2:], (1,), **options)
    assert found["method"]["skipped"] == {}


def test_rows_of_the_runners(demo_bundle: Bundle, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times relative to nemostream are competitor ÷ nemostream, of the same round."""
    runners = [
        Runner("nemostream, fp32", [1.0, 1.0, 1.0, 2.0, 4.0], clock, exact=True),
        Runner("nemostream, int8", [1.0, 1.0, 1.0, 1.0, 1.0], clock, token=2),
        Runner("NeMo, fp32", [1.0, 1.0, 1.0, 6.0, 8.0], clock, exact=True),
        Runner("transformers", [1.0, 1.0, 1.0, 1.0, 3.0], clock, token=0),
    ]
    factory, (rows, skipped) = compare(demo_bundle, runners, monkeypatch, "sherpa fp32")
    assert skipped == {"sherpa fp32": "BackendError: sherpa fp32 is not available"}
    assert factory.messages == ["skipping sherpa fp32: BackendError: sherpa fp32 is not available"]
    assert factory.exported == [160]
    fp32, int8, nemo, transformers = rows
    assert [row["case"]["runner"] for row in rows] == [runner.name for runner in runners]
    assert nemo["case"] == {"chunk_ms": 160, "batch": 2, "runner": "NeMo, fp32"}
    assert [row["ms"]["step"] for row in rows] == [
        pytest.approx(each) for each in ([2000.0, 4000.0], [1000.0] * 2, [6000.0, 8000.0], [1000.0, 3000.0])
    ]
    assert nemo["values"]["relative_time"] == {
        "nemostream, fp32": pytest.approx({"median": 2.5, "min": 2.0, "max": 3.0}),
        "nemostream, int8": pytest.approx({"median": 7.0, "min": 6.0, "max": 8.0}),
    }
    assert transformers["values"]["relative_time"]["nemostream, fp32"] == pytest.approx(
        {"median": 0.625, "min": 0.5, "max": 0.75}
    )
    # Ten steps of one token, in 10 * 160 ms of each of two streams; those while the caches were filled do not count.
    assert nemo["values"]["tokens_per_second"] == pytest.approx(2 * 10 / (2 * 10 * 0.16))
    assert "tokens_per_second" not in transformers["values"] and "same_tokens" not in transformers["values"]
    assert (fp32["values"]["same_tokens"], int8["values"]["same_tokens"]) == (1.0, 0.0)
    # 4 MB at 1 GB/s, 1 MB at 1 GB/s; 2 rows of a million operations at 1 and at 4 GFLOP/s.
    assert fp32["values"]["roofline_ms"] == {"memory": 4.0, "compute": 2.0, "roofline": 4.0, "bound_by": "memory"}
    assert int8["values"]["roofline_ms"] == {"memory": 1.0, "compute": 0.5, "roofline": 1.0, "bound_by": "memory"}
    assert "roofline_ms" not in nemo["values"]
    assert {row["values"]["other_work_cores"] for row in rows} == {0.012}
    assert (nemo["values"]["covers"], nemo["values"]["setup"]) == ("PCM to tokens", "as it is")
    # The caches hold 70 frames: five steps of the longest chunk, 14 frames; the audio is as long as all steps.
    assert {runner.filled for runner in runners} == {70} and all(runner.closed for runner in runners)
    assert {tuple(runner.positions) for runner in runners} == {tuple(range(70, 90, 2))}
    assert {feed.audio.shape for feed in factory.feeds} == {(2, 90 * 1280)}


def test_tokens_are_compared_with_those_of_nemostream_without_nemo(
    demo_bundle: Bundle, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runners = [Runner("nemostream, int8", [1.0], clock), Runner("sherpa fp32", [1.0], clock, token=3)]
    _, (rows, skipped) = compare(demo_bundle, runners, monkeypatch)
    assert [row["values"]["same_tokens"] for row in rows] == [1.0, 0.0] and skipped == {}
    factory, (rows, _) = compare(demo_bundle, [Runner("onnx", [1.0], clock)], monkeypatch)
    assert rows[0]["values"]["same_tokens"] == 1.0 and rows[0]["values"]["relative_time"] == {}
    assert factory.exported == [160]


def test_exact_runners_must_agree(demo_bundle: Bundle, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runners = [
        Runner("nemostream, fp32", [1.0], clock, exact=True),
        Runner("nemo bf16", [1.0], clock, token=7),
        Runner("transformers", [1.0], clock, exact=True, token=0),
        Runner("NeMo, fp32", [1.0], clock, exact=True, token=7),
    ]
    with pytest.raises(ParityError, match="NeMo, fp32 and nemostream, fp32 emitted different tokens"):
        compare(demo_bundle, runners, monkeypatch)
    assert all(runner.closed for runner in runners)


def test_table_headline_and_plot() -> None:
    def row(batch: int, runner: str, times: list[float], **values: Any) -> records.Row:
        case = {"chunk_ms": 80, "batch": batch, "runner": runner}
        values = {"covers": "PCM to tokens", "setup": f"set up {runner}", "other_work_cores": 0.05} | values
        return records.row(case, {"step": times}, values)

    bound = {"memory": 1.0, "compute": 0.5, "roofline": 1.0, "bound_by": "memory"}
    one = {"median": 1.0, "min": 1.0, "max": 1.0}
    own = {"relative_time": {"nemostream, fp32": one}, "roofline_ms": bound, "tokens_per_second": 3.46}
    other = {"median": 2.5, "min": 2.0, "max": 3.0}
    rows = [
        row(1, "nemostream, fp32", [4.0, 2.0], same_tokens=1.0, **own),
        row(1, "NeMo, fp32", [6.0], same_tokens=0.9876, relative_time={"nemostream, fp32": other}),
        row(8, "nemostream, fp32", [8.0], same_tokens=1.0, **own),
        row(8, "NeMo, fp32", [20.0, 40.0], relative_time={"nemostream, fp32": other}, covers="mel to encoder frames"),
    ]
    method = {"device": "cpu", "threads": 2, "repeats": 5, "warm_up": 3, "machine": {"read": 10.0}}
    method |= {"skipped": {"x": "y"}}
    result = records.record("baseline", rows, model={"name": "m", "layers": 3, "d_model": 4}, method=method)
    result["hardware"] |= {"gpu": None, "cpu": "CPU", "cores": 2}
    text = baseline.show(result)
    assert "2 threads, 5 rounds after 3 warm-up rounds." in text and "above 1 is slower than nemostream." in text
    assert (
        "| 80 ms | 1 | nemostream, fp32 | 3.00 [2.00–4.00] | 4.00 | 1.00 [1.00–1.00] | 1.00, memory | 50 % | 3.5 | "
        "100.0 % | PCM to tokens |"
    ) in text
    assert (
        "| 80 ms | 1 | NeMo, fp32 | 6.00 [6.00–6.00] | 6.00 | 2.50 [2.00–3.00] |  |  |  | 98.8 % | PCM to tokens |"
        in text
    )
    assert "Other processes used 0.05 cores. Measured rates: read 10 GB/s." in text
    assert "* NeMo, fp32: set up NeMo, fp32." in text and "Skipped: x (y)." in text
    assert baseline.headline(result) == (
        "**One step of 8 streams at 80 ms**, median: nemostream, fp32 8.00 ms; NeMo, fp32 20.0 ms (2.50). In "
        "parentheses: time relative to nemostream, fp32, above 1 = slower. Model *m* (3 layers, d_model 4), 2 threads, "
        "CPU, 2 cores."
    )
    int8 = row(8, "nemostream, int8", [4.0], relative_time={"nemostream, int8": one})
    quicker = {**other, "median": 5.0}
    both = row(8, "NeMo, fp32", [20.0], relative_time={"nemostream, fp32": other, "nemostream, int8": quicker})
    assert (
        "nemostream, fp32 8.00 ms; nemostream, int8 4.00 ms; NeMo, fp32 20.0 ms (2.50, 5.00). In parentheses: time "
        "relative to nemostream, fp32 and to nemostream, int8, above 1 = slower."
    ) in baseline.headline(result | {"rows": [rows[2], int8, both]})
    chart = baseline.charts(result)["steps"]
    assert isinstance(chart, BarChart)
    assert chart.rows == ["nemostream, fp32", "NeMo, fp32"] and chart.emphasised == ["nemostream, fp32"]
    assert [(panel.heading, panel.bars) for panel in chart.panels] == [
        ("80 ms chunks, 1 stream", [Bar([2.0], "2.00 ms", (2.0, 4.0)), Bar([6.0], "6.00 ms, 2.5×", (6.0, 6.0))]),
        ("80 ms chunks, 8 streams", [Bar([8.0], "8.00 ms", (8.0, 8.0)), Bar([20.0], "20.0 ms, 2.5×", (20.0, 40.0))]),
    ]
    assert chart.title == "NeMo takes 2.5 times as long as nemostream (fp32)"
    assert chart.subtitle.endswith(" ×: relative to nemostream, fp32. NeMo, fp32: mel to encoder frames.")
    name, largest = baseline.overview(result)
    assert name == "step-times" and [panel.heading for panel in largest.panels] == ["80 ms chunks, 8 streams"]
    result["rows"] = rows[1:2]  # without nemostream
    rows[1]["values"]["relative_time"] = {}
    (alone,) = baseline.charts(result).values()
    assert isinstance(alone, BarChart) and alone.panels[0].bars == [Bar([6.0], "6.00 ms", (6.0, 6.0))]
    assert alone.title == "Time of one step"


def test_the_fastest_runner_is_first() -> None:
    """By the mean over the panels of the time relative to the slowest; runners may be missing in a panel."""
    rows = [
        records.row(
            {"chunk_ms": ms, "batch": 1, "runner": runner}, {"step": [time]}, {"relative_time": {}, "covers": "tokens"}
        )
        for ms, runner, time in ((80, "a", 5.0), (80, "b", 10.0), (80, "c", 1.0), (560, "a", 9.0), (560, "b", 4.0))
    ]
    chart = baseline._step_chart(rows, 1)
    assert chart.rows == ["c", "b", "a"]  # 0.1, (1 + 4 / 9) / 2, (5 / 10 + 1) / 2
    assert [[bar and bar.parts for bar in panel.bars] for panel in chart.panels] == [
        [[1.0], [10.0], [5.0]],
        [None, [4.0], [9.0]],
    ]


# -- the whole comparison ----------------------------------------------------------------------------------------------


class Threads:
    """Replaces PyTorch: only the number of threads is used."""

    def __init__(self) -> None:
        self.set: list[int] = []

    def get_num_threads(self) -> int:
        return self.set[-1] if self.set else 5

    def set_num_threads(self, number: int) -> None:
        self.set.append(number)


def test_runners_that_cannot_run_are_tried_once(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every chunk size and batch, without the runners that were skipped before; threads are restored."""
    torch, calls, log = Threads(), list[Any](), list[Any]()

    class Factory:
        def __init__(self, *arguments: Any) -> None:
            log.append(arguments[2:5])

        def __enter__(self) -> Factory:
            return self

        def __exit__(self, *error: object) -> None:
            log.append("closed")

        def discard_exports(self) -> None:
            log.append("discarded")

    def compare(factory: Any, names: Any, chunk: Any, batch: int, repeats: int, machine: Any) -> Any:
        calls.append((tuple(names), chunk.ms, batch, repeats, machine))
        assert torch.get_num_threads() == 3
        row = records.row({"chunk_ms": chunk.ms, "batch": batch}, {})
        return [row], ({"onnx": "missing"} if len(calls) == 2 else {})

    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(baseline, "RunnerFactory", Factory)
    monkeypatch.setattr(baseline, "_compare", compare)
    monkeypatch.setattr(baseline, "sha256", lambda path: demo_bundle.manifest.checkpoint["sha256"])
    machine = Machine(1.0, {}, {"read": 2.0})
    names = ("nemo fp32", "onnx")
    result = baseline.compare_steps(
        demo_bundle,
        "checkpoint",  # type: ignore[arg-type]
        names,
        (1, 8),
        (80, 560),
        7,
        3,
        engines="engines",  # type: ignore[arg-type]
        machine=machine,
    )
    assert calls == [
        (names, 80, 1, 7, machine),
        (names, 80, 8, 7, machine),
        (names[:1], 560, 1, 7, machine),
        (names[:1], 560, 8, 7, machine),
    ]
    assert log == [("cpu", 3, "engines"), "discarded", "discarded", "closed"] and torch.set == [3, 5]
    assert [(row["case"]["chunk_ms"], row["case"]["batch"]) for row in result["rows"]] == [
        (80, 1),
        (80, 8),
        (560, 1),
        (560, 8),
    ]
    assert result["benchmark"] == "baseline"
    assert result["model"] == records.model_of(demo_bundle.manifest) | {
        "checkpoint": dict(demo_bundle.manifest.checkpoint)
    }
    assert result["method"] == {
        "repeats": 7,
        "warm_up": 3,
        "round_steps": 2,
        "threads": 3,
        "device": "cpu",
        "order": "random in each round",
        "machine": {"read": 2.0},
        "skipped": {"onnx": "missing"},
    }


@pytest.mark.parametrize(("device", "machine"), [("cpu", ("cpu", 3)), ("cuda", "gpu"), ("cuda:onnxruntime", "gpu")])
def test_machine_of_a_comparison(
    device: str, machine: Any, demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default it is measured on the device, and all runners of the device are compared."""
    calls: list[Any] = []

    def compare(factory: Any, names: Any, chunk: Any, batch: int, repeats: int, machine: Any) -> Any:
        calls.append((tuple(names), machine.flops))
        return [], {}

    monkeypatch.setitem(sys.modules, "torch", Threads())
    monkeypatch.setattr(baseline, "RunnerFactory", lambda *arguments: contextlib.nullcontext(Exports()))
    monkeypatch.setattr(baseline, "_compare", compare)
    monkeypatch.setattr(baseline, "sha256", lambda path: demo_bundle.manifest.checkpoint["sha256"])
    monkeypatch.setattr(baseline, "measure_machine", lambda threads: Machine(1.0, ("cpu", threads), {}))  # type: ignore[arg-type]
    monkeypatch.setattr(baseline, "measure_gpu", lambda: Machine(1.0, "gpu", {}))  # type: ignore[arg-type]
    baseline.compare_steps(demo_bundle, "x", None, (1,), (80,), 1, 3, device)  # type: ignore[arg-type]
    assert calls == [(baseline.RUNNERS[device.partition(":")[0]], machine)]


@pytest.mark.parametrize(("available", "device"), [(True, "cuda"), (False, "cpu")])
def test_default_device(available: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that PyTorch can use, else the CPU; `--device` takes precedence."""
    used: list[str] = []

    def compare_steps(*arguments: Any, **options: Any) -> records.Record:
        used.append(inspect.signature(compare).bind(*arguments, **options).arguments["device"])
        return {}

    compare = baseline.compare_steps
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: available)))
    monkeypatch.setattr(baseline, "prepared", lambda *arguments: contextlib.nullcontext(("checkpoint", "bundle")))
    monkeypatch.setattr(baseline, "compare_steps", compare_steps)
    monkeypatch.setattr(baseline.command, "run", lambda measure, options: measure())
    baseline.main([])
    baseline.main(["--device", "cuda:onnxruntime"])
    assert used == [device, "cuda:onnxruntime"]


class Exports:
    def discard_exports(self) -> None: ...


@pytest.mark.parametrize(
    ("available", "enough"),
    [(0, True), (7 * 1000 + (1 << 30) - 1, False), (7 * 1000 + (1 << 30), True), (1 << 40, True)],
)
def test_memory_for_all_runners(
    available: int, enough: bool, demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven times the size of the checkpoint and 1 GiB; 0 if the free memory is not known."""
    monkeypatch.setattr(baseline, "find_spec", lambda name: "spec")
    monkeypatch.setattr(records, "available_memory", lambda: available)
    checkpoint = tmp_path / "model.nemo"
    checkpoint.write_bytes(bytes(1000))
    expected = contextlib.nullcontext() if enough else pytest.raises(OptionError, match="about 1 GiB of free memory")
    with expected, baseline.prepared(checkpoint, demo_bundle.path, lambda message: None) as (path, bundle):
        assert path == checkpoint and bundle.manifest.name == "demo"
