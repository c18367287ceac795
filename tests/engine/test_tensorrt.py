"""Building engines with TensorRT for RTX, without a GPU. Running them needs one."""

from __future__ import annotations

import itertools
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")

import tensorrt_rtx as trt
from prompted import LANGUAGES

from nemostream.bundle import Bundle
from nemostream.engine import tensorrt
from nemostream.engine.calibration import measure_ranges
from nemostream.engine.precision import CACHE_DTYPES, quantisable, read_encoder, write_typed
from nemostream.engine.tensorrt import TensorRT, architectures, profiles
from nemostream.engines import speech
from nemostream.errors import BackendError, OptionError
from nemostream.extras import install_command


@pytest.fixture(scope="module")
def library() -> TensorRT:
    return TensorRT("sm89", present=False)


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings with which networks are built, read from the real configuration."""
    settings: list[dict[str, Any]] = []

    class Builder(trt.Builder):
        def __init__(self, log: Any) -> None:
            super().__init__(log)
            self.profiles: list[Any] = []

        def create_optimization_profile(self) -> Any:
            self.profiles.append(super().create_optimization_profile())
            return self.profiles[-1]

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            settings.append(
                {
                    "user_allocation": config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION),
                    "capability": config.get_compute_capability(0),
                    "profiles": config.num_optimization_profiles,
                    "auxiliary_streams": config.max_aux_streams,
                    "strongly_typed": network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
                    "batches": [[shape[0] for shape in profile.get_shape("mel")] for profile in self.profiles],
                    "inputs": {
                        tensor.name: (tuple(tensor.shape), tensor.dtype)
                        for tensor in map(network.get_input, range(network.num_inputs))
                    },
                }
            )
            return super().build_serialized_network(network, config)

    monkeypatch.setattr(trt, "Builder", Builder)
    return settings


@pytest.fixture(scope="module")
def ranges(demo_bundle: Bundle) -> dict[str, float]:
    return measure_ranges(demo_bundle, demo_bundle.manifest.chunk(560), speech(demo_bundle.manifest)[1:])


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny prompted model that the exporter wrote."""
    from nemostream.benchmarks.harness.random_bundle import random_bundle
    from nemostream.benchmarks.harness.synthetic import Sizes

    sizes = Sizes(n_layers=2, d_model=64, n_heads=4, conv_channels=32, pred_hidden=48, joint_hidden=48, vocab=128)
    return random_bundle(tmp_path_factory.mktemp("prompted") / "bundle", sizes=sizes, languages=LANGUAGES)


@pytest.mark.parametrize("ms", [560, *(pytest.param(ms, marks=pytest.mark.slow) for ms in (80, 160, 1120))])
@pytest.mark.parametrize("precision", [*CACHE_DTYPES])
def test_builds(
    precision: str,
    ms: int,
    library: TensorRT,
    networks: list[dict[str, Any]],
    demo_bundle: Bundle,
    ranges: dict[str, float],
    tmp_path: Path,
) -> None:
    """Without memory allocation at run time: the build fails if an engine could not be captured."""
    graph, weights = write_typed(demo_bundle, demo_bundle.manifest.chunk(ms), precision, ranges, tmp_path, "test")
    progress: list[tuple[str, float]] = []
    timings = tmp_path / "timings.cache"
    engine = library.build(graph, 4, timings, lambda what, share: progress.append((what, share)))
    assert not timings.exists()  # TensorRT for RTX does not time kernels
    (network,) = networks
    inputs = {tensor.name for tensor in demo_bundle.graph(f"encoder-{ms}ms").inputs}
    assert network.pop("inputs").keys() == inputs
    assert network == {
        "user_allocation": True,
        "capability": trt.ComputeCapability.SM89,
        "profiles": 1,
        "auxiliary_streams": 0,  # the backend captures the engine into its own graph
        "strongly_typed": True,
        "batches": [[1, 1, 4]],
    }
    assert len(engine) > weights.stat().st_size // 2  # it contains the weights
    assert progress and all(0 <= share <= 1 for _, share in progress)


def test_builds_several_profiles(
    library: TensorRT, networks: list[dict[str, Any]], demo_bundle: Bundle, tmp_path: Path
) -> None:
    graph, _ = write_typed(demo_bundle, demo_bundle.manifest.chunk(80), "fp16", None, tmp_path, "test")
    assert library.build(graph, 9)
    (network,) = networks
    assert (network["profiles"], network["user_allocation"]) == (2, True)
    assert network["batches"] == [[1, 1, 8], [9, 9, 9]], "the smallest batch, that to optimise for, and the largest"


FAST_BUILDS = {("sm80", "fp16"), ("sm86", "bf16"), ("sm89", "fp8"), ("sm120", "int8")}
BUILDS = [
    pytest.param(*build, marks=[] if build in FAST_BUILDS else pytest.mark.slow)
    for build in itertools.product(("sm80", "sm86", "sm89", "sm120"), CACHE_DTYPES)
    if build not in (("sm80", "fp8"), ("sm86", "fp8"))  # GPUs without fp8
]


@pytest.mark.parametrize(("architecture", "precision"), BUILDS)
def test_builds_prompted_models(
    architecture: str, precision: str, networks: list[dict[str, Any]], prompted: Bundle, tmp_path: Path
) -> None:
    """The prompts are an input like the positions, whose only axis is the batch."""
    chunk = prompted.manifest.chunk(560)
    ranges = dict.fromkeys(quantisable(read_encoder(prompted, chunk)), 4.0)
    graph, _ = write_typed(prompted, chunk, precision, ranges, tmp_path, "test")
    assert TensorRT(architecture, present=False).build(graph, 9)
    (network,) = networks
    assert (network["profiles"], network["user_allocation"]) == (2, True)
    assert network["capability"] == getattr(trt.ComputeCapability, architecture.upper())
    assert network["inputs"]["prompt"] == ((-1,), trt.int64)
    assert network["inputs"].keys() == {tensor.name for tensor in prompted.graph("encoder-560ms").inputs}


def test_supported_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT for RTX does not support the H100 (sm90), whether or not it is present."""
    known = architectures(trt)
    assert {"sm86", "sm89", "sm120"} <= set(known) and not {"sm90", "sm100"} & set(known)
    assert known == sorted(known, key=lambda name: int(name[2:]))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert TensorRT("sm89", present=True).name == "tensorrt-rtx"
    with pytest.raises(BackendError) as unsupported:
        TensorRT("sm90", present=True)
    message = str(unsupported.value)
    assert "TensorRT for RTX" in message and "does not support this GPU (sm90), only sm75," in message
    assert install_command("tensorrt") in message and install_command("cuda") in message
    assert "--backend onnxruntime --target cuda" in message
    for absent in ("sm90", "none", "current", "sm89; x"):
        with pytest.raises(
            OptionError, match=rf"cannot build for {absent} without that GPU; it can for .*sm89.*--backend"
        ):
            TensorRT(absent, present=False)


def test_choice_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT for the GPU of this machine; TensorRT for RTX for a GPU that is not present."""
    full = types.ModuleType("tensorrt")
    monkeypatch.setattr(full, "__version__", "11.1.0.106", raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt", full)
    for architecture, present, name in (
        ("sm89", True, "tensorrt"),
        ("sm90", True, "tensorrt"),
        ("sm89", False, "tensorrt-rtx"),
    ):
        assert TensorRT(architecture, present).name == name
    with pytest.raises(OptionError, match=r"tensorrt-rtx .* cannot build for sm90 without that GPU"):
        TensorRT("sm90", present=False)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(
        OptionError, match=r"tensorrt 11\.1.* cannot build for sm89 without that GPU; build on the machine"
    ):
        TensorRT("sm89", present=False)
    monkeypatch.setattr(full, "__version__", "10.12.0")
    with pytest.raises(BackendError, match=r"TensorRT 10\.12\.0 is too old"):
        TensorRT("sm89", present=True)


def test_invalid_graph(library: TensorRT, tmp_path: Path) -> None:
    (tmp_path / "test.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"cannot read test.onnx: .+"):
        library.build(tmp_path / "test.onnx", 4)


def test_errors_of_the_library(library: TensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bindings raise if a constructor returns null; the library logs the reason."""

    def no_builder(log: Any) -> None:
        log.log(trt.ILogger.ERROR, "driver too old")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt, "Builder", no_builder)
    with pytest.raises(BackendError, match=r"cannot build test.onnx: pybind11.*nullptr; driver too old"):
        library.build(tmp_path / "test.onnx", 4)


def test_failing_calls_of_the_builder(library: TensorRT, demo_bundle: Bundle, tmp_path: Path, monkeypatch: Any) -> None:
    """Errors have at most three messages of the library, and no warnings."""
    graph, _ = write_typed(demo_bundle, demo_bundle.manifest.chunk(80), "fp16", None, tmp_path, "test")
    results: dict[str, Any] = {}

    class Config:
        """A configuration some of whose calls fail."""

        def __init__(self, config: Any) -> None:
            self.__dict__["config"] = config

        def __getattr__(self, name: str) -> Any:
            return (lambda *_: results[name]) if name in results else getattr(self.config, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self.config, name, value)

    class Builder(trt.Builder):
        def __init__(self, log: Any) -> None:
            super().__init__(log)
            self.log = log

        def create_builder_config(self) -> Any:
            return Config(super().create_builder_config())

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            for severity, message in (
                (trt.ILogger.WARNING, "a warning"),
                (trt.ILogger.INTERNAL_ERROR, "first"),
                (trt.ILogger.INFO, "information"),
                *((trt.ILogger.ERROR, message) for message in ("second", "third", "fourth")),
            ):
                self.log.log(severity, message)
            return None

    monkeypatch.setattr(trt, "Builder", Builder)
    name = f"{library.name} {library.version}"
    for call, result, message in (
        ("set_compute_capability", False, f"{name} rejects sm89: no reason given"),
        ("add_optimization_profile", -1, f"{name} rejects the profile for batches of 1 to 8 of test.onnx: no reason"),
        (None, None, f"{name} cannot build test.onnx: first; second; third$"),
    ):
        results.clear()
        results.update({call: result} if call else {})
        with pytest.raises(BackendError, match=message):
            library.build(graph, 9)


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of each phase, at most ten times per second."""
    clock, reported = [1000.0], list[tuple[str, float]]()
    monkeypatch.setattr(tensorrt, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monitor = tensorrt._monitor(trt, lambda phase, share: reported.append((phase, share)))
    monitor.phase_start("outer", None, 4)
    monitor.phase_start("inner", "outer", 0)
    for phase, step, seconds in (("outer", 1, 0.0), ("inner", 0, 0.09), ("outer", 3, 0.02), ("inner", 1, 0.2)):
        clock[0] += seconds
        assert monitor.step_complete(phase, step), "the build continues"
    monitor.phase_finish("inner")
    monitor.phase_finish("inner")
    assert reported == [("outer", 0.25), ("outer", 0.75), ("inner", 1.0)]


def test_timing_cache(library: TensorRT, demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only TensorRT has one; TensorRT for RTX still accepts its calls."""
    graph, _ = write_typed(demo_bundle, demo_bundle.manifest.chunk(80), "fp16", None, tmp_path, "test")
    timings = tmp_path / "timings.cache"
    monkeypatch.setattr(library, "name", "tensorrt")
    library.build(graph, 1, timings)
    assert timings.read_bytes()
    timings.write_bytes(b"damaged")
    assert library.build(graph, 1, timings)
    assert timings.read_bytes() != b"damaged"


def test_profiles_cover_every_batch() -> None:
    assert profiles(1) == [(1, 1)]
    assert profiles(8) == [(1, 8)]
    assert profiles(100) == [(1, 8), (9, 64), (65, 100)]
    for max_batch in range(1, 300):
        rows = [row for smallest, largest in profiles(max_batch) for row in range(smallest, largest + 1)]
        assert rows == list(range(1, max_batch + 1))


@pytest.mark.slow
@pytest.mark.nemo
@pytest.mark.parametrize("ms", [80, 160, 560, 1120])
def test_builds_the_full_size(ms: int, library: TensorRT, full_bundle: Bundle, tmp_path: Path) -> None:
    """The engine of the 0.6B encoder in fp16 contains the weights exactly once."""
    graph, weights = write_typed(full_bundle, full_bundle.manifest.chunk(ms), "fp16", None, tmp_path, "test")
    half = full_bundle.manifest.weights.bytes / 2
    assert weights.stat().st_size < 1.05 * half
    engine = library.build(graph, 8)
    assert 0.9 * half < len(engine) < 1.2 * half
