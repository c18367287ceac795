"""The two GPU encoders without a GPU: their errors, and their calls to their libraries.

TensorRT is replaced by a fake module that records its calls and fails as the bindings do (their source is public; that
the names exist in the installed bindings is a test in `tests/engine/test_tensorrt_api.py`). Results of engines are
validated on a GPU only.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from cuda_on_cpu import MISSING
from host_device import HostDevice, OrtEncoder

from nemostream.bundle import Bundle, Tensor
from nemostream.engines import speech
from nemostream.errors import BackendError
from nemostream.extras import install_command
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.backends.gpu.backend import GpuBackend
from nemostream.runtime.backends.gpu.device import OutOfMemory
from nemostream.runtime.backends.gpu.onnxruntime import OrtCudaEncoder
from nemostream.runtime.backends.gpu.tensorrt import TrtEncoder, _CompiledKernels

SHAPES = {"mel": (-1, 56, 128), "k_cache.0": (-1, 4, 70, 32), "encoded_joint": (-1, 7, 128)}
PROFILES = [(1, 8), (9, 64)]


class Failures(dict[str, Any]):
    """The outcome of calls that fail, by name: an exception to raise, or a value to return."""

    def __call__(self, name: str, success: Any) -> Any:
        outcome = self.get(name, success)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class Context:
    def __init__(self, engine: Engine, config: Any) -> None:
        self.engine, self.config, self.failures = engine, config, engine.failures
        self.shapes, self.addresses, self.runs = {}, {}, []
        self.profile: Any = None
        self.memory: Any = None

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == Device.stream
        self.profile = profile
        return self.failures("set_optimization_profile_async", True)

    def set_input_shape(self, name: str, shape: list[int]) -> bool:
        self.shapes[name] = tuple(shape)
        smallest, largest = PROFILES[self.profile]
        return self.failures("set_input_shape", smallest <= shape[0] <= largest)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return self.failures("set_tensor_address", True)

    def infer_shapes(self) -> list[str]:
        return self.failures("infer_shapes", [name for name in ("mel", "k_cache.0") if name not in self.shapes])

    def update_device_memory_size_for_shapes(self) -> int:
        return self.failures("update_device_memory_size_for_shapes", 1000 * int(self.shapes["mel"][0]))

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        assert self.shapes.keys() | {"encoded_joint"} == self.addresses.keys() and self.memory
        self.runs.append(stream)
        if self.config.cache:
            self.config.cache.compile(self.shapes["mel"][0])
        return self.failures("execute_async_v3", True)


class RtxContext(Context):
    def is_stream_capturable(self, stream: int) -> bool:
        assert stream == Device.stream and self.runs, "the answer is known after the first run"
        return self.shapes["mel"][0] <= 8


class Engine:
    num_io_tensors, num_optimization_profiles = len(SHAPES), len(PROFILES)

    def __init__(self) -> None:
        self.contexts: list[Context] = []
        self.strategies: list[str] = []
        self.failures = Failures()
        self.rtx = False

    def get_tensor_name(self, index: int) -> str:
        return [*SHAPES][index]

    def get_tensor_mode(self, name: str) -> str:
        return "OUTPUT" if name == "encoded_joint" else "INPUT"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return SHAPES[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert name == "mel"
        smallest, largest = PROFILES[profile]
        return [(rows, 56, 128) for rows in (smallest, largest, largest)]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return [70_000, 64_000][profile]

    def create_runtime_config(self) -> Any:
        return self.failures("create_runtime_config", Config(self))

    def create_execution_context(self, config: Any) -> Context:
        self.contexts.append((RtxContext if self.rtx else Context)(self, config))
        return self.failures("create_execution_context", self.contexts[-1])


class Config:
    def __init__(self, engine: Engine) -> None:
        self.set_execution_context_allocation_strategy = engine.strategies.append
        self.cache: Any = None
        if engine.rtx:
            self.create_runtime_cache = RuntimeCache
            self.set_runtime_cache = self._set_runtime_cache

    def _set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    """The compiled kernels, one byte per number of rows."""

    compilations: ClassVar[list[int]] = []
    serializations: ClassVar[list[int]] = []  # how many kernels each has

    def __init__(self) -> None:
        self.rows = b""

    def compile(self, rows: int) -> None:
        if rows not in self.rows:
            self.compilations.append(rows)
            self.rows += bytes([rows])

    def serialize(self) -> bytes:
        self.serializations.append(len(self.rows))
        return b"kernels" + self.rows

    def deserialize(self, blob: bytes) -> bool:
        assert blob.startswith(b"kernels"), "only the library's own data reaches it"
        self.rows = blob[7:]
        return True


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("fake_tensorrt")
    engine = Engine()

    class Runtime:
        def __init__(self, log: Any) -> None:
            engine.failures("Runtime", None)

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


@pytest.fixture
def rtx(library: Any, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The same with what only TensorRT for RTX has."""
    library.engine.rtx = True
    library.DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(EAGER="EAGER")
    library.CudaGraphStrategy = types.SimpleNamespace(DISABLED="DISABLED")
    monkeypatch.setattr(RuntimeCache, "compilations", [])
    monkeypatch.setattr(RuntimeCache, "serializations", [])
    return library


class Device(HostDevice):
    stream = 77


ADDRESSES = {name: 4096 * (1 + index) for index, name in enumerate(SHAPES)}
SHA256 = "5" * 64


@pytest.fixture
def engine_file(tmp_path: Path) -> Path:
    path = tmp_path / "test.engine"
    path.write_bytes(b"engine")
    return path


def open_encoder(path: Path, library: str = "fake_tensorrt", sha256: str = SHA256) -> TrtEncoder:
    return TrtEncoder(path, library, "float16", Device(), sha256)


def test_tensorrt_binding(library: Any, engine_file: Path) -> None:
    """Each binding has its own context; all share one device memory, large enough for the largest so far."""
    encoder = open_encoder(engine_file)
    assert (encoder.cache_dtype, encoder.capturable) == ("float16", True)
    large, small = encoder.bind(64, {**ADDRESSES, "prompt": 4096}), encoder.bind(3, ADDRESSES)
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
    assert encoder.capturable
    assert set(library.engine.strategies) == {"USER_MANAGED"}
    assert [path.name for path in engine_file.parent.iterdir()] == [engine_file.name]  # only RTX has a cache


def test_contexts_that_cannot_be_captured(rtx: Any, engine_file: Path) -> None:
    """TensorRT for RTX reports it for each context, after its first run."""
    encoder = open_encoder(engine_file)
    for rows, capturable in ((64, False), (8, True), (9, False), (1, True)):
        encoder.bind(rows, ADDRESSES)()
        assert encoder.capturable == capturable
        config = rtx.engine.contexts[-1].config
        # A kernel that is compiled in the background, or a graph of the library, could not be captured.
        strategies = config.dynamic_shapes_kernel_specialization_strategy, config.cuda_graph_strategy
        assert strategies == ("EAGER", "DISABLED")


FAILED = RuntimeError("Error Code 3")  # pybind11 raises, where C++ returns false


@pytest.mark.parametrize(
    ("call", "outcome", "message"),
    [
        ("create_runtime_config", None, "cannot create a configuration"),
        ("create_execution_context", None, "cannot create a context .* choose a smaller capacity or max_batch"),
        ("set_optimization_profile_async", FAILED, r"cannot prepare .* for batches of 3 \(Error Code 3\)"),
        ("set_optimization_profile_async", False, "cannot select profile 0"),
        ("set_input_shape", FAILED, r"cannot prepare .* for batches of 3 \(Error Code 3\)"),
        ("set_input_shape", False, r"does not accept shape \[3, 56, 128\] for mel"),
        ("set_tensor_address", False, "does not accept address 0x1000 for mel"),
        ("infer_shapes", FAILED, r"cannot prepare .* for batches of 3 \(Error Code 3\)"),
        ("infer_shapes", ["mel"], "has unknown shapes for mel"),
        ("update_device_memory_size_for_shapes", 0, "cannot compute the device memory of .* for batches of 3"),
        ("execute_async_v3", FAILED, r"failed to enqueue .* for 3 rows \(Error Code 3\)"),
        ("execute_async_v3", False, "failed to enqueue .* for 3 rows"),
    ],
)
def test_failing_calls(call: str, outcome: Any, message: str, library: Any, engine_file: Path) -> None:
    """Regression: exceptions of the bindings reached the caller, and a rejected address was used."""
    encoder = open_encoder(engine_file)
    library.engine.failures[call] = outcome
    with pytest.raises(BackendError, match=message) as error:
        encoder.bind(3, ADDRESSES)()
    assert str(engine_file) in str(error.value)
    assert "nemostream build" in str(error.value) or "capacity" in str(error.value)


def test_closing_twice(library: Any, engine_file: Path) -> None:
    """Benchmarks close a backend that their model has closed."""
    encoder = open_encoder(engine_file)
    encoder.bind(3, ADDRESSES)
    encoder.close()
    encoder.close()


def test_tensorrt_memory(library: Any, engine_file: Path) -> None:
    """A bound for all batches up to a size; a profile for small batches may need more than that for large ones."""
    encoder = open_encoder(engine_file)
    for rows in (1, 8, 9, 64):
        assert 70_000 <= encoder.memory_bytes(rows) <= 71_000
    assert not library.engine.contexts
    device = Device()
    encoder = TrtEncoder(engine_file, "fake_tensorrt", "float16", device, SHA256)
    encoder.bind(64, ADDRESSES)
    encoder.bind(3, ADDRESSES)
    assert sum(map(len, device.arrays.values())) <= encoder.memory_bytes(64)


def test_device_memory_is_aligned(library: Any, engine_file: Path) -> None:
    """It is within what was allocated, wherever an allocation begins."""
    allocated: list[tuple[int, int]] = []

    class Unaligned(Device):
        def allocate(self, size: int) -> int:
            allocated.append((10_001, size))
            return 10_001

    encoder = TrtEncoder(engine_file, "fake_tensorrt", "float16", Unaligned(), SHA256)
    for rows, count in ((9, 1), (64, 2), (9, 2), (64, 2)):  # allocated again only if it is too small
        encoder.bind(rows, ADDRESSES)
        address, size = library.engine.contexts[-1].memory
        (begin, allocation) = allocated[-1]
        assert len(allocated) == count
        assert size >= 1000 * rows and address % 256 == 0
        assert begin <= address and address + size <= begin + allocation


def test_invalid_engines(library: Any, engine_file: Path) -> None:
    encoder = open_encoder(engine_file)
    with pytest.raises(BackendError, match=r"not built for batches of 65; build it with a larger --max-batch"):
        encoder.bind(65, ADDRESSES)
    with pytest.raises(BackendError, match="has an unknown tensor 'mel'"):
        encoder.bind(1, {name: 0 for name in ADDRESSES if name != "mel"})
    engine_file.write_bytes(b"another GPU's")
    with pytest.raises(
        BackendError, match=r"fake_tensorrt 11.0 cannot load .*INVALID, diagnostics 0x5.*nemostream build"
    ):
        open_encoder(engine_file)
    library.engine.failures["Runtime"] = TypeError("factory function returned nullptr")
    with pytest.raises(BackendError, match=r"fake_tensorrt 11.0 cannot load .*\(factory function.*nemostream build"):
        open_encoder(engine_file)
    with pytest.raises(
        BackendError, match="needs no_such_tensorrt .*" + re.escape(install_command("no-such-tensorrt"))
    ):
        open_encoder(engine_file, "no_such_tensorrt")


def test_compiled_kernels_are_kept(rtx: Any, engine_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compiled once per number of rows, at any later start only what is missing."""
    kept = engine_file.with_suffix(".kernels")

    def start(*rows: int, **options: Any) -> list[int]:
        """Return for which rows kernels are compiled."""
        RuntimeCache.compilations.clear()
        encoder = open_encoder(engine_file, **options)
        for work in [encoder.bind(count, ADDRESSES) for count in rows]:
            work()
            work()
        encoder.close()
        return RuntimeCache.compilations[:]

    assert start(64, 3) == [64, 3]
    assert (kept.stat().st_mode & 0o777, len([*engine_file.parent.iterdir()])) == (0o600, 2)
    before = kept.stat().st_mtime_ns
    assert start(64, 3) == []
    assert kept.stat().st_mtime_ns == before  # not written again
    assert start(64, 3, 1) == [1]
    assert start(1, 3, 64) == []

    assert start(1, sha256="6" * 64) == [1]  # another engine, which replaces the file
    assert start(1, 3) == [1, 3]
    monkeypatch.setattr(Device, "name", "another GPU")
    assert start(1) == [1]
    monkeypatch.setattr(rtx, "__version__", "12.0")
    assert start(1) == [1]

    content = kept.read_bytes()
    for damaged in (b"", b"x", content[:-1], content + b"x", b"x" + content[1:], b"kernels"):
        kept.write_bytes(damaged)
        assert start(1) == [1]
        assert kept.read_bytes() == content
    monkeypatch.setattr(_CompiledKernels, "_MAX_BYTES", len(content) - 1)
    assert start(1) == [1]  # larger than the limit: not read
    assert kept.read_bytes() == content  # and not written
    kept.unlink()
    kept.mkdir()  # neither readable nor replaceable
    assert start(1) == [1]
    assert [path.name for path in engine_file.parent.iterdir() if path.is_file()] == [engine_file.name]


def test_kernels_are_saved_after_the_first_run_of_each_binding(rtx: Any, engine_file: Path) -> None:
    """Not in every step: the library copies all of them."""
    encoder = open_encoder(engine_file)
    works = [encoder.bind(rows, ADDRESSES) for rows in (64, 3)]
    for _ in range(3):
        for work in works:
            work()
    assert RuntimeCache.serializations == [1, 2]


@pytest.mark.skipif(MISSING, reason="needs g++ to run the kernels on a CPU")
def test_only_bindings_that_cannot_be_captured_leave_the_graph(demo_bundle: Bundle) -> None:
    """Batches of one are a single launch, larger ones three; the tokens are those of the CPU backend."""

    class Encoder(OrtEncoder):
        capturable = True

        def bind(self, rows: int, addresses: Any) -> Any:
            self.capturable = rows == 1
            return super().bind(rows, addresses)

    chunk, device = demo_bundle.manifest.chunk(560), HostDevice()
    gpu = GpuBackend(demo_bundle, device, {560: Encoder(demo_bundle, chunk, device)}, capacity=2)
    cpu, audio = OrtBackend(demo_bundle, capacity=2, threads=1), speech(demo_bundle.manifest)[1]
    cpu.reset(np.arange(2))
    assert (gpu.loop, gpu.failures) == ("while", [])
    tokens = 0
    for step, slots in enumerate([[0, 1], [1], [0, 1], [0], [0, 1]]):
        samples = audio[step * chunk.samples :][: chunk.samples]
        batch = Batch(chunk, np.array(slots), np.stack([samples] * len(slots)), np.full(len(slots), len(samples)))
        before = device.queued
        pending = gpu.submit(batch)
        assert device.queued - before == (1 if len(slots) == 1 else 3)
        got, wanted = pending.result().tokens, cpu.submit(batch).result().tokens
        assert [row.tolist() for row in got] == [row.tolist() for row in wanted]
        tokens += sum(map(len, wanted))
    assert tokens
    gpu.close()


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
        rows = 0

        def bind_input(self, name: str, device: str, index: int, kind: Any, shape: Any, address: int) -> None:
            self.rows = shape[0]
            calls["in"][name] = (device, index, kind, tuple(shape), address)

        def bind_output(self, name: str, device: str, index: int, kind: Any, shape: Any, address: int) -> None:
            calls["out"][name] = (device, index, kind, tuple(shape), address)

    class Session:
        def __init__(self, path: Path, options: Any, providers: Any) -> None:
            calls["path"], calls["providers"] = path, providers
            assert isinstance(options, onnxruntime.SessionOptions)

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def io_binding(self) -> Binding:
            return Binding()

        def run_with_iobinding(self, binding: Binding, options: Any) -> None:
            entries = ("gpu_graph_id", "disable_synchronize_execution_providers")
            if calls.get("error"):
                raise RuntimeError(calls["error"])
            calls["runs"].append((binding.rows, *(options.get_run_config_entry(name) for name in entries)))

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: calls.update(preloaded=True), raising=False)
    graph = demo_bundle.manifest.graphs["encoder-80ms"]
    encoder = OrtCudaEncoder(demo_bundle.file("encoder-80ms"), graph, "bfloat16", Device(), 1000)
    assert not encoder.capturable
    assert encoder.memory_bytes(64) == 2 * 64 * 1000  # ONNX Runtime doubles its memory whenever it grows
    assert calls["preloaded"]
    layers = demo_bundle.manifest.encoder.layers
    names = [tensor.name for tensor in (*graph.inputs, *graph.outputs) if tensor.name != "encoded"]
    addresses = {name: 64 * index for index, name in enumerate(names)} | {"prompt": 4096}  # of prompted models only
    first, second = encoder.bind(2, addresses), encoder.bind(1, addresses)
    first()
    second()
    first()
    assert calls["runs"] == [(2, "1", "1"), (1, "2", "1"), (2, "1", "1")]
    assert calls["path"] == demo_bundle.file("encoder-80ms")
    ((provider, options),) = calls["providers"]
    assert provider == "CUDAExecutionProvider"
    assert options == {"user_compute_stream": "77", "enable_cuda_graph": "1", "use_tf32": "0"}
    assert calls["in"].keys() | calls["out"].keys() == set(names)
    assert calls["in"]["mel"] == ("cuda", 0, np.float32, (1, 8, 128), addresses["mel"])
    assert calls["in"]["position"][2] == np.int64
    assert calls["in"]["k_cache.5"] == ("cuda", 0, 16, (1, 4, 70, 32), addresses["k_cache.5"])  # TensorProto.BFLOAT16
    assert calls["out"]["k_new"] == ("cuda", 0, 16, (layers, 1, 4, 1, 32), addresses["k_new"])
    assert calls["out"]["encoded_joint"][2] == np.float32
    prompted = dataclasses.replace(graph, inputs=(*graph.inputs, Tensor("prompt", "int64", ("B",))))
    OrtCudaEncoder(demo_bundle.file("encoder-80ms"), prompted, "bfloat16", Device(), 1000).bind(3, addresses)
    assert calls["in"]["prompt"] == ("cuda", 0, np.int64, (3,), 4096)
    calls["error"] = "Non-zero status code: Failed to allocate memory for requested buffer of size 5000"
    with pytest.raises(OutOfMemory) as raised:
        first()
    assert raised.value.size == 5000
    calls["error"] = "an illegal memory access was encountered"
    with pytest.raises(BackendError, match="illegal memory access"):
        first()
    monkeypatch.setattr(Session, "get_providers", lambda self: ["CPUExecutionProvider"])  # as ONNX Runtime falls back
    with pytest.raises(BackendError, match=r"CUDA provider does not work on .*; run `nemostream doctor`"):
        OrtCudaEncoder(demo_bundle.file("encoder-80ms"), graph, "bfloat16", Device(), 1000)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: Session("", None, {}.pop("no graph")))
    with pytest.raises(BackendError, match=r"ONNX Runtime cannot load .* on .*: 'no graph'"):
        OrtCudaEncoder(demo_bundle.file("encoder-80ms"), graph, "bfloat16", Device(), 1000)
