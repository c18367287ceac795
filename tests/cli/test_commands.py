"""`doctor`, `build`, `export`, `info`, `--phrases`, the packaged recordings; libraries and drivers are simulated."""

from __future__ import annotations

import itertools
import json
import logging
import re
import sys
import types
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

import nemostream
from nemostream.bundle import Bundle
from nemostream.cli import doctor, gpu_memory, models
from nemostream.cli.doctor import Finding
from nemostream.cli.gpu_memory import GPUS
from nemostream.cli.main import main
from nemostream.cli.phrases import read_phrases
from nemostream.clips import read_clip
from nemostream.errors import BundleError, OptionError
from nemostream.extras import install_command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        assert isinstance(exited.value.code, int)
        return (exited.value.code, *capfd.readouterr())

    return call


# -- the driver --------------------------------------------------------------------------------------------------------


class Driver:
    """libcuda with GPUs of the given names and compute capabilities. The call `fails` returns an error."""

    def __init__(self, *gpus: tuple[str, int, int], version: int = 13000, fails: str = "") -> None:
        self.gpus, self.version, self.fails = gpus, version, fails
        self.calls = 0

    def _code(self, name: str) -> int:
        return 700 if self.fails == name else 0

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self._code("cuInit")

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return self._code("cuDriverGetVersion")

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.gpus)
        return self._code("cuDeviceGetCount")

    def cuDeviceGetName(self, name: Any, size: int, ordinal: int) -> int:
        assert size == len(name) == 256
        name.value = self.gpus[ordinal][0].encode()
        return self._code("cuDeviceGetName")

    def cuDeviceGetAttribute(self, value: Any, attribute: int, ordinal: int) -> int:
        value._obj.value = {75: self.gpus[ordinal][1], 76: self.gpus[ordinal][2]}[attribute]
        return self._code(f"cuDeviceGetAttribute {attribute}")


def install(driver: Driver | None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the driver; return the names of the libraries that are loaded."""
    loaded: list[str] = []

    def load(name: str) -> Driver:
        loaded.append(name)
        if driver is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return driver

    real = {name: getattr(doctor.ctypes, name) for name in ("c_int", "create_string_buffer", "byref")}
    monkeypatch.setattr(doctor, "ctypes", SimpleNamespace(CDLL=load, **real))
    return loaded


TWO = (("NVIDIA L40S", 8, 9), ("NVIDIA B200", 10, 0))


@pytest.mark.parametrize(
    ("driver", "finding", "has_gpu"),
    [
        (Driver(*TWO, version=12080), Finding("installed", "CUDA 12.8: NVIDIA L40S (sm89), NVIDIA B200 (sm100)"), True),
        (Driver(version=12110), Finding("installed", "CUDA 12.11: no GPU"), False),
        (Driver(TWO[0], version=13010), Finding("installed", "CUDA 13.1: NVIDIA L40S (sm89)"), True),
        (Driver(), Finding("installed", "CUDA 13.0: no GPU"), False),
        (
            None,
            Finding("missing", "no NVIDIA driver (libcuda); install NVIDIA's driver 580 or newer for CUDA 13"),
            False,
        ),
        *(
            (
                Driver(*TWO, fails=call),
                Finding(
                    "broken",
                    "the driver is installed but returns CUDA error 700; check that a GPU is visible to this process",
                ),
                False,
            )
            for call in (
                "cuInit",
                "cuDriverGetVersion",
                "cuDeviceGetCount",
                "cuDeviceGetName",
                "cuDeviceGetAttribute 75",
                "cuDeviceGetAttribute 76",
            )
        ),
    ],
)
def test_driver(driver: Driver | None, finding: Finding, has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = install(driver, monkeypatch)
    assert doctor._check_driver() == finding and doctor.has_gpu() == has_gpu
    monkeypatch.setattr(doctor.platform, "system", lambda: "Windows")
    doctor.has_gpu()
    assert loaded == ["libcuda.so.1", "libcuda.so.1", "nvcuda.dll"]


def test_tensorrt_for_rtx_is_compared_with_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx", reason="imported by nemostream.engine")
    from nemostream.engine import tensorrt

    library = SimpleNamespace(__version__="1.3")
    monkeypatch.setattr(doctor, "import_module", lambda name: {"tensorrt_rtx": library}[name])
    monkeypatch.setattr(tensorrt, "architectures", lambda given: ["sm89"] if given is library else [])
    monkeypatch.setattr(tensorrt, "unsupported_gpu", lambda given, gpu: f"no {gpu}")
    for gpus, finding in (
        (TWO, Finding("installed", "tensorrt_rtx 1.3, for sm89")),
        (TWO[::-1], Finding("broken", "no NVIDIA B200 (sm100)")),
        ((), Finding("installed", "tensorrt_rtx 1.3")),
    ):
        install(Driver(*gpus), monkeypatch)
        assert doctor._check_tensorrt_rtx() == finding
    install(None, monkeypatch)
    assert doctor._check_tensorrt_rtx() == Finding("installed", "tensorrt_rtx 1.3")
    monkeypatch.setattr(doctor, "import_module", missing)
    install(Driver(*TWO), monkeypatch)
    assert doctor._check_tensorrt_rtx() == Finding("missing", install_command("tensorrt-rtx"))


# -- libraries ---------------------------------------------------------------------------------------------------------


def missing(name: str) -> Any:
    raise ModuleNotFoundError(f"No module named {name!r}")


def test_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("\nlibnvinfer.so.10: cannot open\nmore lines")

    def silent(name: str) -> Any:
        raise RuntimeError

    for found, finding in (
        (missing, Finding("missing", install_command("mic"))),
        (broken, Finding("broken", "sounddevice cannot be imported (libnvinfer.so.10: cannot open)")),
        (silent, Finding("broken", "sounddevice cannot be imported (RuntimeError)")),
        (lambda name: SimpleNamespace(__version__="0.5"), Finding("installed", "sounddevice 0.5")),
        (lambda name: SimpleNamespace(), Finding("installed", "sounddevice")),
    ):
        monkeypatch.setattr(doctor, "import_module", found)
        assert doctor._check_library("sounddevice", "mic") == finding


def test_cuda_for_python(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"cuda-bindings": "13.0.1", "cuda-core": "0.3"}
    monkeypatch.setattr(doctor, "version", versions.__getitem__)
    monkeypatch.setattr(doctor, "import_module", lambda name: SimpleNamespace())
    assert doctor._check_cuda_python() == Finding("installed", "cuda-bindings 13.0.1, cuda-core 0.3")
    monkeypatch.setattr(doctor, "import_module", lambda name: missing(name) if name == "cuda.core" else None)
    assert doctor._check_cuda_python() == Finding("missing", install_command("gpu"))


def test_packages_of_the_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"onnx": "1.19", "pyyaml": "6.0", "huggingface_hub": "1.0", "nemo_toolkit": "2.5", "transformers": "5.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor, "version", version)
    everything = "onnx 1.19, pyyaml 6.0, huggingface_hub 1.0, nemo_toolkit 2.5, transformers 5.0"
    assert doctor._check_export() == Finding("installed", everything)
    for optional in ("nemo_toolkit", "transformers", "huggingface_hub"):
        versions.pop(optional)
    assert doctor._check_export() == Finding("installed", "onnx 1.19, pyyaml 6.0")
    for required in ("pyyaml", "onnx"):
        versions.pop(required)
        assert doctor._check_export() == Finding("missing", f"{required}: {install_command('export')}")


def test_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    found = doctor._check_onnxruntime_cuda()
    assert found == Finding("installed", f"onnxruntime {onnxruntime.__version__} with the CUDA provider")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    command = f"{install_command('cuda')} && pip install --force-reinstall --no-deps onnxruntime-gpu"
    assert doctor._check_onnxruntime_cuda() == Finding("missing", command)

    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("bad build\nmore")

    monkeypatch.setattr(onnxruntime, "get_available_providers", broken)
    assert doctor._check_onnxruntime_cuda() == Finding("broken", "bad build")
    monkeypatch.setattr(nemostream, "load", broken)
    assert doctor._check_onnxruntime_cpu() == Finding("broken", f"bad build: {install_command()} --force-reinstall")
    monkeypatch.setattr(nemostream, "load", lambda capacity: (_ for _ in ()).throw(BundleError("no bundle.")))
    assert doctor._check_onnxruntime_cpu() == Finding("broken", "no bundle.")


@pytest.mark.parametrize(
    ("states", "works"), [(["missing", "works", "broken"], True), (["installed", "missing"], False), (["works"], True)]
)
def test_report_of_the_machine(states: list[str], works: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Details are printed as they are: brackets are no markup, and long lines are not wrapped."""
    checks = {
        f"part {k}": lambda k=k, state=state: Finding(state, f"pip install '.[x{k}]' " + "a" * 300)  # type: ignore[misc]
        for k, state in enumerate(states)
    }
    assert doctor._print_lines(checks) == works
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"nemostream {nemostream.__version__}, Python 3.")
    assert lines[1:-1] == [
        f"{f'part {k}':18}  {state:9}  pip install '.[x{k}]' {'a' * 300}" for k, state in enumerate(states)
    ]
    assert doctor._print_json(checks) == works
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"nemostream", "python", "platform", "works", "checks"} and report["works"] == works
    assert report["checks"] == [
        {"name": f"part {k}", "state": state, "detail": f"pip install '.[x{k}]' " + "a" * 300}
        for k, state in enumerate(states)
    ]


# -- build -------------------------------------------------------------------------------------------------------------


def plan(**validation: Any) -> Any:
    return SimpleNamespace(bytes=12_340_000, seconds=61.24, validation=validation, path=Path("/engines/x"))


@pytest.mark.parametrize(
    ("built", "validation", "text"),
    [
        (False, {}, "12.3 MB, already built; not validated yet: it will be compared with fp32 when it is loaded"),
        (
            True,
            {"cosine": 0.999987, "tokens": 41, "steps": 7},
            "12.3 MB, built in 61.2 s; cosine 0.99999 and 41 equal tokens in 7 steps",
        ),
        (
            True,
            {"cosine": 1.0, "tokens": 4, "steps": 7, "rows": 9, "batch_difference": 0.00012},
            "12.3 MB, built in 61.2 s; cosine 1.00000 and 4 equal tokens in 7 steps; batches of up to 9 rows change a "
            "row by up to 0.012 %",
        ),
        (
            False,
            {"rows": 9, "batch_difference": 0.0},
            "12.3 MB, already built; not validated yet: it will be compared with fp32 when it is loaded; batches of up "
            "to 9 rows do not change a row",
        ),
    ],
)
def test_description_of_an_engine(built: bool, validation: dict[str, Any], text: str) -> None:
    assert models._describe_plan(plan(**validation), built) == text


def test_build_passes_its_options(
    run_command: Run, demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from nemostream import engines

    calls: list[Any] = []

    def build(bundle: Any, chunk: Any, precision: str, store: Any, progress: Any, **options: Any) -> Any:
        progress("calibration", 0.5)
        calls.append((bundle.path, chunk.ms, precision, store.folder, options))
        return plan(), chunk.ms == 80

    monkeypatch.setattr(engines, "build_engine", build)
    monkeypatch.setattr(doctor, "has_gpu", lambda: False)
    path, folder = demo_bundle.path, tmp_path / "e"
    assert run_command("build", path)[0] == 7 and not calls  # TensorRT for the GPU of this machine, which has none
    code, out, err = run_command("build", path, "--target", "sm89", "--engines", folder)
    defaults = {"backend": "tensorrt", "target": "sm89", "max_batch": 64}
    sizes = [chunk.ms for chunk in demo_bundle.manifest.chunks]
    assert calls == [(path, ms, "fp16", folder, defaults) for ms in sizes]
    assert (code, out) == (0, "/engines/x\n" * len(sizes))
    lines = [line for line in err.splitlines() if "MB" in line]
    assert [line.partition(":")[0] for line in lines] == [f"fp16 for {ms} ms" for ms in sizes]
    assert ["built in" in line for line in lines] == [ms == 80 for ms in sizes]
    calls.clear()
    options = ["--backend", "onnxruntime", "--precision", "int8", "--chunk-ms", 560, "--chunk-ms", 80, "--max-batch", 9]
    assert run_command("build", path, *options, "--engines", folder)[0] == 0
    wanted = {"backend": "onnxruntime", "target": None, "max_batch": 9}
    assert sorted(calls, key=lambda call: call[1]) == [(path, ms, "int8", folder, wanted) for ms in (80, 560)]
    calls.clear()
    assert "CPU: nemostream build --backend onnxruntime" in run_command("build")[2]
    assert run_command("build", *options, "--engines", folder)[0] == 0
    assert {call[0] for call in calls} == {nemostream.demo_bundle()}
    monkeypatch.setattr(doctor, "has_gpu", lambda: True)
    assert run_command("build", path, "--chunk-ms", 80, "--engines", folder)[0] == 0


# -- export ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The calls of the exporter, which prints to standard output, as NeMo does."""
    monkeypatch.chdir(tmp_path)
    calls: list[Any] = []

    def export(checkpoint: str, out: Path, progress: Any, **options: Any) -> Any:
        print("NeMo prints this")
        progress("reading [weights]")
        calls.append((checkpoint, out, options))
        parity = {"80ms": {"steps": 5, "encoder": 1.5e-5}, "decoder": 1e-6, "reference": "NumPy"}
        return SimpleNamespace(manifest=SimpleNamespace(parity=parity))

    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "nemo" else True)
    monkeypatch.setattr(models, "_silence_libraries", lambda: None)
    monkeypatch.setitem(sys.modules, "nemostream.export", types.SimpleNamespace(export_checkpoint=export))
    return calls


def test_export(run_command: Run, exported: list[Any]) -> None:
    """Only the folder goes to standard output."""
    code, out, err = run_command("export", "owner/name@main", "out/bundle")
    assert (code, out) == (0, "out/bundle\n")
    assert exported == [("owner/name@main", Path("out/bundle"), {"language": None})]
    assert "NeMo prints this\n" in err and re.search(r"^ +\d+\.\d s  reading \[weights\]$", err, re.MULTILINE)
    assert "    80ms: 5 steps, encoder within 1.5e-05 of NumPy\n" in err and "decoder" not in err
    run_command("export", "a.nemo", "out", "--language", "hi")
    assert exported[1:] == [("a.nemo", Path("out"), {"language": "hi"})]


def test_export_without_a_library(run_command: Run, exported: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for absent in (["onnx"], ["yaml"], ["onnx", "yaml"]):
        monkeypatch.setattr(models, "find_spec", lambda name, absent=absent: None if name in absent else True)
        code, out, err = run_command("export", "a.nemo", "out")
        assert (code, out) == (7, "")
        assert err == f"nemostream: exporting needs {' and '.join(absent)}: {install_command('export')}\n"
    monkeypatch.setattr(models, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "nemostream.export", None)
    code, out, err = run_command("export", "a.nemo", "out")
    assert code == 7 and "the export extra cannot be imported (" in err and exported == []


def test_libraries_log_errors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after the second call, which adds nothing to the process."""
    monkeypatch.setenv("HF_HUB_VERBOSITY", "info")
    logger = logging.getLogger("nemo_logger")
    monkeypatch.setattr(logger, "filters", [])
    with warnings.catch_warnings():
        for _ in range(2):
            models._silence_libraries()
    shown = [
        level for level in (logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL) if passes(logger, level)
    ]
    assert shown == [logging.ERROR, logging.CRITICAL] and len(logger.filters) == 1


def passes(logger: logging.Logger, level: int) -> bool:
    return bool(logger.filter(logger.makeRecord("nemo", level, "nemo.py", 1, "message", (), None)))


def test_export_of_a_triton_repository(
    run_command: Run, exported: list[Any], demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a checkpoint, or with a copy of a bundle."""
    from nemostream.serving.integrations import triton

    written: list[Path] = []
    monkeypatch.setattr(triton, "write_repository", written.append)
    out = tmp_path / "models"
    assert run_command("export", "a.nemo", out, "--triton", "--language", "hi")[:2] == (0, f"{out}\n")
    assert exported == [("a.nemo", triton.bundle_in(out), {"language": "hi"})] and written == [out]
    code, _, err = run_command("export", demo_bundle.path, out, "--triton", "--language", "hi")
    assert code == 2 and "--language applies to the export of a checkpoint" in err and len(written) == 1
    assert run_command("export", demo_bundle.path, out, "--triton")[:2] == (0, f"{out}\n")
    assert Bundle.open(triton.bundle_in(out)).manifest == demo_bundle.manifest
    assert len(exported) == 1 and written == [out, out]
    assert run_command("export", demo_bundle.path, out, "--triton")[0] == 0  # again, into the same folder
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{}")
    assert run_command("export", damaged, out, "--triton")[0] == 4 and len(written) == 3


# -- info --------------------------------------------------------------------------------------------------------------


def test_every_row_of_a_bundle(run_command: Run, demo_bundle: Bundle) -> None:
    manifest = demo_bundle.manifest
    sizes = {name: (demo_bundle.path / f"{name}.onnx").stat().st_size for name in manifest.graphs}
    total = sum(sizes.values()) + (demo_bundle.path / "weights.bin").stat().st_size
    encoder, decoder, features, source = manifest.encoder, manifest.decoder, manifest.features, manifest.checkpoint
    out = run_command("info", demo_bundle.path)[1]
    for line in (
        f"model      {manifest.name}, {total / 1e6:.1f} MB in {demo_bundle.path}",
        f"audio      {features.sample_rate} Hz, {features.mels} mel bins, {features.window}/{features.hop} samples",
        f"encoder    {encoder.layers} layers, {encoder.d_model} wide, {encoder.heads} heads, {encoder.cache} frames of "
        f"context, x{encoder.subsampling} subsampling",
        f"decoder    {decoder.layers} LSTM layer(s) of {decoder.hidden}, joint {decoder.joint}, {decoder.vocabulary} "
        f"tokens, max. {decoder.max_symbols} per frame",
        "languages  en by default",
        f"checkpoint {source['source']}, sha256 {source['sha256'][:16]}…",
    ):
        assert f"{line}\n" in out
    rows = [re.findall(r"[^│┃\s](?:[^│┃]*[^│┃\s])?", line) for line in out.splitlines() if "│" in line]
    parity = manifest.parity
    assert rows == [
        *(
            [
                f"{chunk.ms} ms",
                str(chunk.frames),
                f"{chunk.left} frames",
                str(parity[f"{chunk.ms}ms"]["steps"]),
                f"{parity[f'{chunk.ms}ms']['features']:.1e}",
                f"{parity[f'{chunk.ms}ms']['encoder']:.1e}",
            ]
            for chunk in manifest.chunks
        ),
        *(
            [name, size(sizes[name]), str(len(graph.inputs)), str(len(graph.outputs))]
            for name, graph in manifest.graphs.items()
        ),
        ["shared weights", size(manifest.weights.bytes)],
    ]
    assert f"Also: decoder {parity['decoder']:.1e}, joint {parity['joint']:.1e}." in out


def size(count: int) -> str:
    return f"{count / 1000:.0f} kB" if count < 1_000_000 else f"{count / 1_000_000:.1f} MB"


# -- memory of a GPU ---------------------------------------------------------------------------------------------------


def test_table_of_the_memory_of_a_gpu(run_command: Run) -> None:
    """Every figure of the table is that of the JSON report."""
    for gpu in GPUS:
        report = json.loads(run_command("doctor", "--plan", "--gpu", gpu, "--json")[1])
        out = run_command("doctor", "--plan", "--gpu", gpu)[1]
        assert out.startswith(f"{gpu}: {report['available_bytes'] / 1e9:.1f} GB for streams and engines. ")
        rows = [re.findall(r"[^│\s](?:[^│]*[^│\s])?", line) for line in out.splitlines() if "│" in line]
        wanted = []
        for row in report["rows"]:
            label = f"{row['chunk_ms'][0]} ms" if len(row["chunk_ms"]) == 1 else "all sizes"
            figures = [f"{row[key] / 1e9:.2f} GB" for key in ("weight_bytes", "activation_bytes", "buffer_bytes")]
            wanted.append(
                [label] * (row["max_batch"] == 64)
                + [str(row["max_batch"]), *figures, f"{row['streams']:,}" if row["streams"] else "none"]
            )
        assert rows == wanted and len(rows) == 2 * 5 * 3
        headings = [line.replace("┃", " ").split() for line in out.splitlines() if "┃" in line]
        assert headings == [["chunk", "max_batch", "weights", "activations", "buffers", "streams"]] * 2
        assert ("none: one batch of this size does not fit" in out) == any(not row["streams"] for row in report["rows"])
        for precision in ("fp16", "fp32"):
            state = next(row["bytes_per_stream"] for row in report["rows"] if row["precision"] == precision)
            assert f"{precision}: {state / 1e6:.2f} MB of state per stream." in out
        limits = ", ".join(f"{limit:,} at {ms} ms" for ms, limit in report["largest_max_batch"].items())
        assert f"{limits}." in " ".join(out.split())


def test_batches_that_are_too_large_for_a_tensor_have_no_streams(run_command: Run) -> None:
    report = json.loads(run_command("doctor", "--plan", "--gpu", "h200-141gb", "--json")[1])
    limits = report["largest_max_batch"]
    checked = set()
    for row in report["rows"]:
        fits = all(row["max_batch"] <= limits[str(ms)] for ms in row["chunk_ms"])
        checked.add(fits)
        assert fits or row["streams"] == 0
        assert row["streams"] == 0 or row["streams"] >= row["max_batch"]
        weights = len(row["chunk_ms"]) * 587_000_000 * (2 if row["precision"] == "fp16" else 4)
        assert 0 < row["weight_bytes"] - weights < 100e6  # the decoder
    assert True in checked


@pytest.mark.parametrize("index", [0, 8, 29])
def test_memory_for_exactly_one_batch(index: int) -> None:
    """With the least memory in which a row has any streams, it has one batch of them."""
    manifest, sizes = gpu_memory.published_model()

    def streams(available: int) -> tuple[int, int]:
        row = next(itertools.islice(gpu_memory._rows(manifest, sizes, available), index, None))
        return row.streams, row.max_batch

    low, high = 0, 1 << 40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if streams(middle)[0] else (middle, high)
    count, max_batch = streams(high)
    assert count == max_batch


# -- phrases and recordings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "phrase", "weight"),
    [
        ("pound", "pound", 1.0),
        ("pound key:2.5", "pound key", 2.5),
        ("pound : 3", "pound", 3.0),
        ("a:b:4", "a:b", 4.0),
        ("10:30", "10:30", 1.0),  # without a letter: not a weight
        ("10_5:30", "10_5:30", 1.0),
        ("\u00e9:2", "\u00e9", 2.0),
        ("pound:", "pound:", 1.0),
        ("pound:x", "pound:x", 1.0),
        ("AC/DC", "AC/DC", 1.0),
        ("a.text", "a.text", 1.0),
        ("names.txt please", "names.txt please", 1.0),
        ("line\nbreak:2", "line\nbreak", 2.0),
    ],
)
def test_phrase(value: str, phrase: str, weight: float) -> None:
    assert read_phrases([value]) == {phrase: weight}


@pytest.mark.parametrize(
    "value", ["./a", "../a", "/a", "~/a", "~", "a.txt", "a.tsv", "a.csv", "a.lst", "a.list", "x\0/", "a" * 999 + ".txt"]
)
def test_phrase_that_looks_like_a_file(value: str) -> None:
    if value == "x\0/":
        assert read_phrases([value]) == {value: 1.0}  # not a valid path
        return
    with pytest.raises(OptionError, match="--phrases: no such file: "):
        read_phrases([value])


def test_files_of_phrases(tmp_path: Path) -> None:
    """Later values replace earlier ones."""
    path = tmp_path / "a.txt"
    path.write_text("one\t2\n\n  two words  \t 3.5 \nthree:4\n\t9\nfour\t\n")
    expected = {"one": 2.0, "two words": 3.5, "three:4": 1.0, "four": 1.0}
    assert read_phrases([str(path)]) == expected
    assert read_phrases(["one:7", "zero", str(path), "four:8"]) == {"zero": 1.0} | expected | {"four": 8.0}
    path.write_text("one\t2\ntwo\tx\n")
    with pytest.raises(OptionError, match=f"^--phrases: {path}, line 2: 'x' is not a weight; it must be a number"):
        read_phrases([str(path)])
    with pytest.raises(OptionError, match=r"^--phrases a:1\.2\.3: '1\.2\.3' is not a weight"):
        read_phrases(["a:1.2.3"])
    path.write_bytes(b"f\xfcr")
    with pytest.raises(OptionError, match=f"--phrases: {path} is not UTF-8 text"):
        read_phrases([str(path)])


@pytest.mark.parametrize("name", ["clip", "speech"])
def test_packaged_recordings(name: str) -> None:
    audio, rate = soundfile.read(nemostream.demo_clip().with_name(f"{name}.flac"), dtype="float32")
    assert rate == 16000 and len(audio) / rate == pytest.approx(18 if name == "speech" else 4.3, abs=0.6)
    assert np.array_equal(read_clip(name, 16000), audio) and read_clip(name, 16000).dtype == np.float32
    assert np.array_equal(read_clip(name, 8000), soxr.resample(audio, 16000, 8000))
