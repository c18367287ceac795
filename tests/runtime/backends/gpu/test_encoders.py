"""The two GPU encoders without a GPU: their errors, and their calls to their libraries.

TensorRT is replaced by a fake module that records its calls. Results of engines are validated on a GPU only.
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_device import HostDevice

from nemostream.bundle import Bundle
from nemostream.errors import BackendError
from nemostream.extras import install_command
from nemostream.runtime.backends.gpu.device import OutOfMemory
from nemostream.runtime.backends.gpu.onnxruntime import OrtCudaEncoder
from nemostream.runtime.backends.gpu.tensorrt import TrtEncoder

SHAPES = {"mel": (-1, 56, 128), "k_cache.0": (-1, 4, 70, 32), "encoded_joint": (-1, 7, 128)}
PROFILES = [(1, 8), (9, 64)]


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.shapes, self.addresses, self.runs = engine, {}, {}, []
        self.profile: Any = None
        self.memory: Any = None

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: list[int]) -> bool:
        self.shapes[name] = tuple(shape)
        smallest, largest = PROFILES[self.profile]
        return smallest <= shape[0] <= largest

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def infer_shapes(self) -> list[str]:
        return [name for name in ("mel", "k_cache.0") if name not in self.shapes]

    def update_device_memory_size_for_shapes(self) -> int:
        return 1000 * int(self.shapes["mel"][0])

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        self.runs.append(stream)
        return self.engine.works


class Engine:
    num_io_tensors, num_optimization_profiles, works = len(SHAPES), len(PROFILES), True

    def __init__(self) -> None:
        self.contexts: list[Context] = []
        self.strategies: list[str] = []

    def get_tensor_name(self, index: int) -> str:
        return [*SHAPES][index]

    def get_tensor_mode(self, name: str) -> str:
        return "OUTPUT" if name == "encoded_joint" else "INPUT"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return SHAPES[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        smallest, largest = PROFILES[profile]
        return [(rows, 56, 128) for rows in (smallest, largest, largest)]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return [70_000, 64_000][profile]

    def create_runtime_config(self) -> Any:
        return types.SimpleNamespace(set_execution_context_allocation_strategy=self.strategies.append)

    def create_execution_context(self, config: Any) -> Context:
        self.contexts.append(Context(self))
        return self.contexts[-1]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("fake_tensorrt")
    engine = Engine()

    class Runtime:
        def __init__(self, log: Any) -> None: ...

        def deserialize_cuda_engine(self, blob: bytes) -> Any:
            return engine if blob == b"engine" else None

        def get_engine_validity(self, blob: bytes) -> Any:
            return types.SimpleNamespace(name="INVALID"), 5

    logger = types.SimpleNamespace(ERROR=1)
    strategy = types.SimpleNamespace(USER_MANAGED="USER_MANAGED")
    parts = {
        "__version__": "11.0",
        "Runtime": Runtime,
        "TensorIOMode": types.SimpleNamespace(INPUT="INPUT"),
        "ExecutionContextAllocationStrategy": strategy,
        "engine": engine,
    }
    for name, value in parts.items():
        setattr(module, name, value)
    module.Logger = type("Logger", (), {"__init__": lambda self, level: None, "ERROR": logger.ERROR})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_tensorrt", module)
    return module


class Device(HostDevice):
    stream = 77


ADDRESSES = {name: 4096 * (1 + index) for index, name in enumerate(SHAPES)}


@pytest.fixture
def engine_file(tmp_path: Path) -> Path:
    path = tmp_path / "test.engine"
    path.write_bytes(b"engine")
    return path


def test_tensorrt_binding(library: Any, engine_file: Path) -> None:
    """Each binding has its own context; all share one device memory, large enough for the largest so far."""
    encoder = TrtEncoder(engine_file, "fake_tensorrt", "float16", Device())
    assert (encoder.cache_dtype, encoder.capturable) == ("float16", True)
    large, small = encoder.bind(64, ADDRESSES), encoder.bind(3, ADDRESSES)
    first, second = library.engine.contexts
    assert (first.profile, second.profile) == (1, 0)
    assert first.shapes == {"mel": (64, 56, 128), "k_cache.0": (64, 4, 70, 32)}
    assert second.shapes == {"mel": (3, 56, 128), "k_cache.0": (3, 4, 70, 32)}
    assert first.addresses == second.addresses == ADDRESSES
    assert first.memory == second.memory
    address, size = first.memory
    assert size >= 64_000 and address % 256 == 0
    assert not first.runs
    large()
    small()
    assert (first.runs, second.runs) == ([77], [77])
    assert set(library.engine.strategies) == {"USER_MANAGED"}
    library.engine.works = False
    with pytest.raises(BackendError, match=r"TensorRT failed to enqueue .* for 3 rows"):
        small()


def test_tensorrt_memory(library: Any, engine_file: Path) -> None:
    """A bound for all batches up to a size; a profile for small batches may need more than that for large ones."""
    encoder = TrtEncoder(engine_file, "fake_tensorrt", "float16", Device())
    for rows in (1, 8, 9, 64):
        assert 70_000 <= encoder.memory_bytes(rows) <= 71_000
    assert not library.engine.contexts
    device = Device()
    encoder = TrtEncoder(engine_file, "fake_tensorrt", "float16", device)
    encoder.bind(64, ADDRESSES)
    encoder.bind(3, ADDRESSES)
    assert sum(map(len, device.arrays.values())) <= encoder.memory_bytes(64)


def test_invalid_engines(library: Any, engine_file: Path) -> None:
    encoder = TrtEncoder(engine_file, "fake_tensorrt", "float16", Device())
    with pytest.raises(BackendError, match=r"not built for batches of 65; build it with a larger --max-batch"):
        encoder.bind(65, ADDRESSES)
    with pytest.raises(BackendError, match="has an unknown tensor 'mel'"):
        encoder.bind(1, {name: 0 for name in ADDRESSES if name != "mel"})
    engine_file.write_bytes(b"another GPU's")
    with pytest.raises(
        BackendError, match=r"fake_tensorrt 11.0 cannot load .*INVALID, diagnostics 0x5.*nemostream build"
    ):
        TrtEncoder(engine_file, "fake_tensorrt", "float16", Device())
    with pytest.raises(
        BackendError, match="needs no_such_tensorrt .*" + re.escape(install_command("no-such-tensorrt"))
    ):
        TrtEncoder(engine_file, "no_such_tensorrt", "float16", Device())


def test_onnxruntime_without_cuda(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    graph = demo_bundle.manifest.graphs["encoder-80ms"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=re.escape(f"has no CUDA provider: {install_command('cuda')}")):
        OrtCudaEncoder(demo_bundle.file("encoder-80ms"), graph, "float32", Device(), 1000)


def test_onnxruntime_binding(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's stream, one CUDA graph per binding, no waiting; all tensors at their addresses with their types."""
    import onnxruntime

    calls: dict[str, Any] = {"in": {}, "out": {}, "runs": []}

    class Binding:
        def bind_input(self, name: str, device: str, index: int, kind: Any, shape: Any, address: int) -> None:
            calls["in"][name] = (device, index, kind, tuple(shape), address)

        def bind_output(self, name: str, device: str, index: int, kind: Any, shape: Any, address: int) -> None:
            calls["out"][name] = (device, index, kind, tuple(shape), address)

    class Session:
        def __init__(self, path: Path, options: Any, providers: Any) -> None:
            calls["providers"] = providers

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def io_binding(self) -> Binding:
            return Binding()

        def run_with_iobinding(self, binding: Binding, options: Any) -> None:
            entries = ("gpu_graph_id", "disable_synchronize_execution_providers")
            if calls.get("error"):
                raise RuntimeError(calls["error"])
            calls["runs"].append(tuple(options.get_run_config_entry(name) for name in entries))

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    graph = demo_bundle.manifest.graphs["encoder-80ms"]
    encoder = OrtCudaEncoder(demo_bundle.file("encoder-80ms"), graph, "bfloat16", Device(), 1000)
    assert not encoder.capturable
    assert encoder.memory_bytes(64) >= 64 * 1000
    layers = demo_bundle.manifest.encoder.layers
    names = [tensor.name for tensor in (*graph.inputs, *graph.outputs) if tensor.name != "encoded"]
    addresses = {name: 64 * index for index, name in enumerate(names)}
    first, second = encoder.bind(2, addresses), encoder.bind(1, addresses)
    first()
    second()
    first()
    assert calls["runs"] == [("1", "1"), ("2", "1"), ("1", "1")]
    ((provider, options),) = calls["providers"]
    assert provider == "CUDAExecutionProvider"
    assert (options["user_compute_stream"], options["enable_cuda_graph"]) == ("77", "1")
    assert calls["in"].keys() | calls["out"].keys() == set(names)
    assert calls["in"]["mel"] == ("cuda", 0, np.float32, (1, 8, 128), addresses["mel"])
    assert calls["in"]["position"][2] == np.int64
    assert calls["in"]["k_cache.5"] == ("cuda", 0, 16, (1, 4, 70, 32), addresses["k_cache.5"])  # TensorProto.BFLOAT16
    assert calls["out"]["k_new"] == ("cuda", 0, 16, (layers, 1, 4, 1, 32), addresses["k_new"])
    assert calls["out"]["encoded_joint"][2] == np.float32
    calls["error"] = "Non-zero status code: Failed to allocate memory for requested buffer of size 5000"
    with pytest.raises(OutOfMemory) as raised:
        first()
    assert raised.value.size == 5000
    calls["error"] = "an illegal memory access was encountered"
    with pytest.raises(BackendError, match="illegal memory access"):
        first()
