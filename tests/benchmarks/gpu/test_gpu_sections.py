"""Sections of the GPU check with fakes of the device, engines and programs: what they run and what they report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemostream.benchmarks import gpu_check
from nemostream.benchmarks.harness import records
from nemostream.errors import BackendError, EngineValidationError

pytest.importorskip("onnx", reason="needs the build extra")


@pytest.fixture
def context(tmp_path: Path) -> gpu_check.SectionContext:
    options = argparse.Namespace(minutes=1, repeats=3, section="it", batch=[1, 2], steps=10)
    return gpu_check.SectionContext(options, tmp_path)


def test_environment(context: gpu_check.SectionContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "device", lambda: SimpleNamespace(name="GPU", architecture="sm90"))
    monkeypatch.setattr(records, "hardware", lambda: {"gpu": "GPU, 570"})
    monkeypatch.setattr(records, "versions", lambda: {"numpy": "2"})
    monkeypatch.setattr(records, "commit", lambda: "abc")
    found = gpu_check.environment(context)
    assert found.pop("platform") == gpu_check.platform.platform()
    assert found == {
        "gpu": "GPU",
        "architecture": "sm90",
        "nvidia_smi": "GPU, 570",
        "libraries": {"numpy": "2"},
        "commit": "abc",
    }


def test_bandwidth(context: gpu_check.SectionContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "device", lambda: "device")
    monkeypatch.setattr(gpu_check, "copy_rate", lambda device: {"device": 3e12}[device])
    assert gpu_check.bandwidth(context) == {"copy_bytes_per_second": 3e12}


def test_speed_uses_the_bandwidth_of_an_earlier_section(
    context: gpu_check.SectionContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def measure_speed(*arguments: Any) -> Any:
        given.extend(arguments)
        return {"rows": []}

    monkeypatch.setattr(context, "full_size_bundle", lambda: "bundle")
    monkeypatch.setattr(gpu_check, "measure_speed", measure_speed)
    context.report = {"bandwidth": {"copy_bytes_per_second": 3e12}}
    assert gpu_check.full_speed(context) == {"rows": []}
    assert given == ["bundle", context.open_largest, [1, 2], 3, 3e12, context.progress, context.deadline, context.save]
    assert context.deadline == context.started + 60
    given.clear()
    context.report = {}
    gpu_check.full_speed(context)
    assert given[4] is None


def test_soak_has_the_given_steps(context: gpu_check.SectionContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_largest(bundle: Any, chunks: Any, capacity: int) -> Any:
        assert (bundle, [chunk.ms for chunk in chunks], capacity) == (context.demo, [80], 9)
        return SimpleNamespace(loop="while"), "tensorrt fp16"

    monkeypatch.setattr(context, "open_largest", open_largest)
    monkeypatch.setattr(gpu_check, "soak", lambda backend, chunk, steps: {"steps": steps})
    assert gpu_check.soaking(context) == {"steps": 10, "encoder": "tensorrt fp16", "loop": "while"}


@pytest.mark.parametrize("error", ["", "exited with 1"])
def test_outcome_of_the_tests(error: str, context: gpu_check.SectionContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    ran: list[Any] = []

    def run(command: Any, output: Path, limit: float) -> str:
        ran.append((command, limit))
        head = [f"line {number}" for number in range(200)]
        output.write_text("\n".join([*head, "FAILED a::b", "ERROR c", "1 failed"]))
        return error

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(perf_counter=lambda: context.started + 10))
    found = gpu_check.tests(context)
    assert found["passed"] == (not error) and found["error_of_pytest"] == error
    assert found["summary"] == "1 failed" and found["failed"] == ["FAILED a::b", "ERROR c"]
    assert len(found["tail"]) == 150 and found["tail"][-4] == "line 199"
    ((command, limit),) = ran
    assert command[:4] == [sys.executable, "-m", "pytest", "-q"] and command[6:8] == ["-m", "gpu"]
    assert all(Path(path).is_file() for path in command if path.endswith(".py"))
    assert limit == pytest.approx(80)  # what is left of the minute, and half of the grace of a minute
    monkeypatch.chdir(context.scratch)
    with pytest.raises(BackendError, match="has no tests"):
        gpu_check.tests(context)


def test_sanitizer(context: gpu_check.SectionContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    commands: list[Any] = []

    def run(command: Any, output: Path, limit: float) -> str:
        commands.append(command)
        output.write_text("==== ERROR SUMMARY: 0 errors\n1 passed\n")
        return ""

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: "/bin/compute-sanitizer")
    found = gpu_check.sanitizer(context)
    assert found["clean"] and found["sanitizer_summary"] == ["==== ERROR SUMMARY: 0 errors"]
    assert commands[0][:3] == ["/bin/compute-sanitizer", "--error-exitcode", "9"]
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    with pytest.raises(BackendError, match="not on the PATH"):
        gpu_check.sanitizer(context)


def test_engines_of_the_packaged_model(context: gpu_check.SectionContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """A precision that fails validation is tried at every chunk size, one that a library lacks at the first only."""
    calls: list[Any] = []

    def build_engine(bundle: Any, chunk: Any, precision: str, store: Any, **options: Any) -> Any:
        calls.append((options["backend"], options["target"], precision, chunk.ms, options["max_batch"]))
        if precision == "int8":
            raise EngineValidationError("the int8 engine failed validation: cosine 0.5.")
        if precision == "bf16":
            raise BackendError("bf16 is not supported.")
        recipe = SimpleNamespace(stem=f"{precision}-{chunk.ms}")
        return SimpleNamespace(recipe=recipe, seconds=2.0, bytes=1000, validation={"cosine": 0.99}), True

    saved: list[int] = []
    monkeypatch.setattr(gpu_check, "build_engine", build_engine)
    monkeypatch.setattr(gpu_check, "check_provider", lambda: None)
    monkeypatch.setattr(gpu_check, "PRECISIONS", ("fp16", "bf16", "int8"))
    monkeypatch.setattr(context, "save", lambda result: saved.append(len(result)))
    found = gpu_check.engines(context)
    sizes = [chunk.ms for chunk in context.demo.manifest.chunks]
    for backend in ("tensorrt", "onnxruntime"):
        assert [key for key in found if key.startswith(f"{backend} bf16")] == [f"{backend} bf16 80"]
        assert found[f"{backend} fp16 560"] == {
            "recipe": "fp16-560",
            "seconds": 2.0,
            "bytes": 1000,
            "validated": True,
            "cosine": 0.99,
        }
        for ms in sizes:
            assert "failed validation" in found[f"{backend} int8 {ms}"]["failure"]
    assert len(found) == 2 * (2 * len(sizes) + 1) and saved == list(range(1, len(found) + 1))
    assert {each[:2] + each[4:] for each in calls} == {("tensorrt", None, 8), ("onnxruntime", "cuda", 8)}
    context.deadline = 0.0
    assert gpu_check.engines(context) == {"skipped": "time limit"}


def test_engine_for_another_gpu(context: gpu_check.SectionContext, monkeypatch: pytest.MonkeyPatch) -> None:
    (context.scratch / "engine").write_bytes(b"blob")

    class Runtime:
        def __init__(self, logger: Any) -> None: ...

        def get_engine_validity(self, blob: bytes) -> Any:
            assert blob == b"blob"
            return SimpleNamespace(name="INVALID"), 0x12

        def deserialize_cuda_engine(self, blob: bytes) -> None:
            return None

    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None: ...

    def build_engine(bundle: Any, chunk: Any, precision: str, store: Any, **options: Any) -> Any:
        assert (chunk.ms, precision, options) == (80, "fp16", {"target": "sm89", "max_batch": 1})
        return SimpleNamespace(path=context.scratch / "engine"), True

    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(Runtime=Runtime, Logger=Logger))
    monkeypatch.setattr(gpu_check, "build_engine", build_engine)
    monkeypatch.setattr(context, "device", lambda: SimpleNamespace(architecture="sm90"))
    assert gpu_check.engine_for_other_gpu(context) == {
        "built_for": "sm89",
        "this_gpu": "sm90",
        "validity": "INVALID",
        "diagnostics": "0x12",
        "deserializes": False,
    }


def test_engines_of_a_context(context: gpu_check.SectionContext, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def build_engine(bundle: Any, chunk: Any, precision: str, store: Any, **options: Any) -> Any:
        calls.append((chunk.ms, precision, store, options))
        return f"plan {chunk.ms}", True

    monkeypatch.setattr(gpu_check, "build_engine", build_engine)
    monkeypatch.setattr(gpu_check, "check_provider", lambda: calls.append("checked"))
    chunks = context.demo.manifest.chunks[:2]
    assert context.build("tensorrt-rtx", context.demo, chunks, 7, "int8", False) == {80: "plan 80", 160: "plan 160"}
    options = {"backend": "tensorrt", "target": None, "max_batch": 7, "validate": False}
    assert calls == [(ms, "int8", context.store, options) for ms in (80, 160)]
    calls.clear()
    context.build("onnxruntime", context.demo, chunks[:1], 7)
    options = {"backend": "onnxruntime", "target": "cuda", "max_batch": 7, "validate": True}
    assert calls == ["checked", (80, "fp16", context.store, options)]
    monkeypatch.setattr(context, "device", lambda: "device")
    monkeypatch.setattr(gpu_check, "open_gpu", lambda *arguments: arguments)
    assert context.open(context.demo, {80: "plan"}, 7) == (context.demo, "device", {80: "plan"}, 8, 7)  # type: ignore[dict-item]


def test_largest_backend(context: gpu_check.SectionContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT, else ONNX Runtime, else no encoder; a library that failed is not tried again."""
    calls: list[str] = []
    fails = {"tensorrt"}

    def build(library: str, bundle: Any, chunks: Any, max_batch: int, validate: bool) -> Any:
        calls.append(library)
        assert (max_batch, validate) == (8, False)
        if library in fails:
            raise BackendError(f"no {library}.")
        return {80: SimpleNamespace(recipe=SimpleNamespace(backend=library))}

    monkeypatch.setattr(context, "build", build)
    monkeypatch.setattr(context, "open", lambda bundle, plans, max_batch: ("backend", max_batch))
    chunks = context.demo.manifest.chunks[:1]
    for _ in range(2):
        assert context.open_largest(context.demo, chunks, 9) == (("backend", 8), "onnxruntime fp16")
    assert calls == ["tensorrt", "onnxruntime", "onnxruntime"]
    fails.add("onnxruntime")
    made: list[Any] = []
    monkeypatch.setattr(context, "device", lambda: "device")
    monkeypatch.setattr(
        gpu_check, "GpuBackend", lambda bundle, device, encoders, **options: (list(encoders), device, options)
    )
    monkeypatch.setattr(gpu_check, "fill_encoder_output", made.append)
    backend, name = context.open_largest(context.demo, chunks, 9)
    assert backend == ([80], "device", {"capacity": 9, "max_batch": 8}) and made == [backend]
    assert name == "none (BackendError: no tensorrt.; BackendError: no onnxruntime.)"


def test_memory_of_a_failed_attempt_is_freed(
    context: gpu_check.SectionContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    def backend(*arguments: Any, **options: Any) -> Any:
        raise BackendError("too little memory.")

    monkeypatch.setattr(context, "build", backend)
    monkeypatch.setattr(context, "device", lambda: SimpleNamespace(close=lambda: closed.append("closed")))
    monkeypatch.setattr(gpu_check, "GpuBackend", backend)
    with pytest.raises(BackendError, match="too little memory"):
        context.open_largest(context.demo, context.demo.manifest.chunks[:1], 257)
    assert closed == ["closed"] * 3  # 256, 128 and 64 rows


# -- processes and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('out')", ""),
        ("exit(3)", "exited with 3"),
        ("import os; os.kill(os.getpid(), 15)", "exited with SIGTERM"),
    ],
)
def test_reason_why_a_command_failed(code: str, reason: str, tmp_path: Path) -> None:
    assert gpu_check.run([sys.executable, "-c", code], tmp_path / "log", 60) == reason
    assert ((tmp_path / "log").read_text() == "out\n") == (not reason)


def test_files_are_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    assert gpu_check.read(path) == {}
    gpu_check.write(path, gpu_check.as_json({"a": Path("b")}))
    assert gpu_check.read(path) == {"a": "b"} and [each.name for each in path.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize("only", [None, ["soak"]])
def test_whole_check(
    only: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report is written after each section; sections that are run alone are added to an earlier report."""
    from nemostream.runtime.backends.gpu import cuda

    monkeypatch.setattr(cuda, "CudaDevice", lambda: SimpleNamespace(name="My GPU", close=lambda: None))
    environment = {"gpu": "My GPU"}
    path = tmp_path / "gpu-My-GPU.json"
    path.write_text(json.dumps({"environment": environment, "bandwidth": {"rate": 5}, "seconds": 2.0}))
    calls: list[Any] = []

    def in_processes(sections: Any, command: Any, scratch: Path, minutes: float, save: Any, progress: Any) -> None:
        calls.append((list(sections), minutes))
        assert command("soak", 1.5) == [
            *(sys.executable, "-m", "nemostream.benchmarks.gpu_check", "--section", "soak", "--scratch", str(scratch)),
            *("--minutes", "1.5", "--steps", "7", "--repeats", "5", "--batch", "1", "2"),
        ]
        save({"environment": environment, "soak": {"flat": True}, "seconds": 3.0})
        assert gpu_check.read(scratch / "report.json") == gpu_check.read(path)

    monkeypatch.setattr(gpu_check, "in_processes", in_processes)
    arguments = ["--out", str(tmp_path), "--batch", "1", "2", "--repeats", "5", "--steps", "7", "--minutes", "4"]
    gpu_check.main([*arguments, *(["--only", *only] if only else [])])
    names = ["environment", "soak"] if only else list(gpu_check.SECTIONS)
    assert calls == [(names, 4.0)]
    report = gpu_check.read(path)
    assert report["seconds"] == (5.0 if only else 3.0) and ("bandwidth" in report) == bool(only)
    assert report["command"]
    text = path.with_suffix(".md").read_text()
    assert "**soak**: {'flat': True}" in text and capsys.readouterr().out == text
