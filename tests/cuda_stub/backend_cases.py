"""`CudaDevice` and `GpuBackend` on the CUDA stub. Run by `test_cuda_stub.py` in its own process.

More tests of the backend run on the stub: those of `tests/runtime/backends/gpu` that are marked `gpu`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from cuda_stub import Stub, StubEncoder

import nemostream
from nemostream.bundle import Bundle
from nemostream.errors import BackendError
from nemostream.runtime.backends.base import Backend, Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.backends.gpu.backend import LOOPS, GpuBackend
from nemostream.runtime.backends.gpu.cuda import CudaDevice, CudaEvent
from nemostream.runtime.decoding.boosting import Boosting

CHUNK_MS = 80
SLOTS = 1
UNKNOWN, OUT_OF_MEMORY, LAUNCH_FAILED, UNAVAILABLE = 999, 2, 719, 46
EVERY = int(os.environ.get("CUDA_STUB_EVERY", 1))  # calls tried of those that can fail: 1 for all of them
Tokens = list[tuple[list[int], list[int]]]


def make_backend(
    bundle: Bundle, device: CudaDevice, loop: str = "while", capturable: bool = True, capacity: int = SLOTS
) -> GpuBackend:
    encoders = {CHUNK_MS: StubEncoder(bundle, bundle.manifest.chunk(CHUNK_MS), device, capturable)}
    return GpuBackend(bundle, device, encoders, capacity, max_batch=1, loop=loop)


def batches(bundle: Bundle, audio: np.ndarray, count: int = 12) -> list[Batch]:
    chunk = bundle.manifest.chunk(CHUNK_MS)
    parts = audio[: count * chunk.samples].reshape(count, 1, chunk.samples)
    return [Batch(chunk, np.arange(1), part, np.array([chunk.samples])) for part in parts]


def run(backend: Backend, steps: Sequence[Batch]) -> Tokens:
    """Return the tokens and frames of each step from a reset on."""
    backend.reset(np.arange(SLOTS))
    emissions = [backend.submit(batch).result() for batch in steps]
    return [(each.tokens[0].tolist(), each.frames[0].tolist()) for each in emissions]


@pytest.fixture(scope="module")
def steps(small_bundle: Bundle, clips: dict[str, np.ndarray]) -> list[Batch]:
    return batches(small_bundle, next(iter(clips.values())))


@pytest.fixture(scope="module")
def wanted(small_bundle: Bundle, steps: list[Batch]) -> Tokens:
    tokens = run(OrtBackend(small_bundle, capacity=SLOTS, threads=1), steps)
    assert sum(len(ids) for ids, _ in tokens) > 2
    return tokens


@pytest.fixture
def device(stub: Stub) -> Iterator[CudaDevice]:
    device = CudaDevice()
    yield device
    device.close()


@pytest.fixture
def nothing_left(stub: Stub) -> Iterator[None]:
    """Check that a test frees everything it creates."""
    gc.collect()
    before = stub.live
    yield
    gc.collect()
    assert stub.live == before


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("loop", LOOPS)
def test_tokens_of_each_loop(
    loop: str, capturable: bool, small_bundle: Bundle, steps: list[Batch], wanted: Tokens, stub: Stub, nothing_left: Any
) -> None:
    """The tokens are the CPU backend's, nothing unwanted happens in a capture, and everything is freed."""
    gpu = make_backend(small_bundle, CudaDevice(), loop, capturable)
    assert (gpu.loop, gpu.failures) == (loop, [])
    assert run(gpu, steps) == wanted
    assert run(gpu, steps[:4]) == wanted[:4], "after a reset"
    assert stub.calls("cuStreamBeginCaptureToGraph") == (2 if loop == "while" else 0)
    assert stub.notes == []
    gpu.close()


def test_slot_operations(small_bundle: Bundle, steps: list[Batch], stub: Stub) -> None:
    """Phrases, decoder resets, and saved states between steps, compared with the CPU backend."""
    rng = np.random.default_rng(3)
    few = rng.choice(small_bundle.manifest.decoder.vocabulary, 8, replace=False)
    phrases = Boosting([(few[:3].tolist(), 20.0), (few[3:5].tolist(), 30.0)], small_bundle.manifest.decoder.vocabulary)
    gpu = make_backend(small_bundle, CudaDevice())

    def operate(backend: Backend) -> list[Any]:
        found = []
        backend.reset(np.arange(SLOTS))
        saved = None
        for index, batch in enumerate(steps):
            if index == 2:
                backend.set_phrases(0, phrases)
            if index == 5:
                saved = backend.save(0)
            if index == 7:
                backend.reset_decoder(np.array([0]))
            if index == 9:
                assert saved is not None
                backend.load(0, saved)
            if index == 11:
                backend.set_phrases(0, None)
            step = backend.submit(batch).result()
            found.append((step.tokens[0].tolist(), step.frames[0].tolist()))
        return found

    expected = operate(OrtBackend(small_bundle, capacity=SLOTS, threads=1))
    assert operate(gpu) == expected != []
    gpu.close()


def test_copy(small_bundle: Bundle, steps: list[Batch], wanted: Tokens, stub: Stub) -> None:
    """Of a stream whose step is pending: one launch, nothing else. The copy continues while its source is reset."""
    gpu = make_backend(small_bundle, CudaDevice(), capacity=3)
    run(gpu, steps[:4])
    pending = gpu.submit(steps[4])
    calls = [stub.calls("*"), stub.calls("cuLaunchKernel")]
    gpu.copy(np.array([0, 0]), np.array([2, 1]))
    assert [stub.calls("*"), stub.calls("cuLaunchKernel")] == [number + 1 for number in calls]
    gpu.reset(np.array([0]))
    assert pending.result().tokens[0].tolist() == wanted[4][0]
    for slot in (2, 1):
        found = [gpu.submit(dataclasses.replace(batch, slots=np.array([slot]))).result() for batch in steps[5:]]
        assert [(each.tokens[0].tolist(), each.frames[0].tolist()) for each in found] == wanted[5:]
    assert stub.notes == []
    gpu.close()


def test_backend_on_another_thread(small_bundle: Bundle, steps: list[Batch], wanted: Tokens, stub: Stub) -> None:
    """A backend is built on one thread; another makes the device current and runs it."""
    gpu, found = make_backend(small_bundle, CudaDevice()), []
    thread = threading.Thread(target=lambda: found.append(run(gpu, steps)))
    thread.start()
    thread.join()
    assert found == [wanted]
    gpu.close()


def test_result_is_not_ready_before_the_wait(small_bundle: Bundle, steps: list[Batch], stub: Stub) -> None:
    """The stub runs a step only when the host waits, so a missing wait would read old results."""
    gpu = make_backend(small_bundle, CudaDevice())
    run(gpu, steps[:2])
    executed = stub.calls("execute")
    step = gpu.submit(steps[2])
    assert stub.calls("execute") == executed
    step.result()
    assert stub.calls("execute") > executed
    gpu.close()


def test_missing_wait_changes_the_tokens(
    small_bundle: Bundle, steps: list[Batch], wanted: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check above is sensitive: without the wait for a step, its result is that of an earlier step."""
    gpu = make_backend(small_bundle, CudaDevice())
    monkeypatch.setattr(CudaEvent, "wait", lambda event: None)
    assert run(gpu, steps) != wanted
    monkeypatch.undo()
    gpu.close()


def test_device(stub: Stub, nothing_left: Any) -> None:
    """Memory, copies, captures, events and timing of `CudaDevice`, with nothing left after `close`."""
    device = CudaDevice()
    assert (device.name, device.architecture) == ("CUDA stub", "sm90")
    free = device.free_bytes
    first, second = device.allocate(1000), device.allocate(1000)
    assert free - device.free_bytes >= 2000
    array = np.arange(250, dtype=np.float32)
    found = np.ones_like(array)
    device.read(first, found)
    assert not found.any(), "memory is zeroed"
    device.write(first, array)
    # Device memory of the stub is host memory: the copy has run before `write` returns.
    assert (np.ctypeslib.as_array((ctypes.c_float * 250).from_address(first)) == array).all()
    pinned = device.allocate_host(1000).view(np.float32)
    device.read(first, pinned)  # a driver does not wait for a copy to such memory
    assert (pinned == array).all()
    assert device.allocate(0) and len(device.allocate_host(0))
    graph = device.capture(lambda: device.copy(second, first, 1000))
    device.read(second, found)
    assert not found.any(), "a capture runs nothing"
    assert device.elapsed_ms([graph.launch]) >= 0
    device.read(second, found)
    np.testing.assert_array_equal(found, array)
    assert not device.allocate_host(100).any()
    device.free(second)
    event = device.record_event()
    event.wait()
    del event, graph
    device.close()
    device.close()


# -- missing features --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("failures", "kind", "loop"), [(1, "ptx", "while"), (2, "cubin", "unrolled")])
def test_kernel_variant_that_does_not_load(
    failures: int, kind: str, loop: str, small_bundle: Bundle, steps: list[Batch], wanted: Tokens, stub: Stub
) -> None:
    for n in range(1, failures + 1):
        stub.fail("cuModuleLoadData", n, 218)
    gpu = make_backend(small_bundle, CudaDevice())
    assert (gpu._kernels.format, gpu.loop, len(gpu.failures)) == (kind, loop, failures)
    assert run(gpu, steps) == wanted
    gpu.close()


def test_no_variant_loads(small_bundle: Bundle, device: CudaDevice, stub: Stub) -> None:
    for n in range(1, 5):
        stub.fail("cuModuleLoadData", n, 222)
    with pytest.raises(BackendError, match=r"no variant of the kernels can be loaded.*UNSUPPORTED_PTX_VERSION"):
        make_backend(small_bundle, device)


class WaitingEncoder(StubEncoder):
    """An encoder that waits for the device, as some libraries do in every call."""

    def bind(self, rows: int, addresses: Mapping[str, int]) -> Callable[[], None]:
        enqueue = super().bind(rows, addresses)

        def run() -> None:
            enqueue()
            self._device._call("cuStreamSynchronize", self._device.stream)

        return run


def test_encoder_that_cannot_be_captured(small_bundle: Bundle, steps: list[Batch], wanted: Tokens, stub: Stub) -> None:
    """It claims that it can, but invalidates each capture: the step is not captured, and the tokens are right."""
    device = CudaDevice()
    encoder = WaitingEncoder(small_bundle, small_bundle.manifest.chunk(CHUNK_MS), device)
    gpu = GpuBackend(small_bundle, device, {CHUNK_MS: encoder}, SLOTS)
    assert gpu.loop == "eager" and all("CAPTURE_UNSUPPORTED" in failure for failure in gpu.failures)
    assert stub.violations == ["cuStreamSynchronize was called for a capturing stream"] * 2
    stub.clear()
    assert run(gpu, steps) == wanted
    gpu.close()


DRIVER = int(os.environ.get("CUDA_STUB_DRIVER_VERSION", 13000))


@pytest.mark.skipif(DRIVER == 13000, reason="needs another driver version")
def test_older_driver(small_bundle: Bundle, steps: list[Batch], wanted: Tokens, stub: Stub) -> None:
    """Before 12.3 there are no conditional nodes, and cuda.core cannot capture; 12.3 has no `cuFuncLoad`."""
    gpu = make_backend(small_bundle, CudaDevice())
    assert gpu.loop == ("while" if DRIVER >= 12030 else "eager"), gpu.failures
    assert run(gpu, steps) == wanted
    gpu.close()


@pytest.mark.skipif("CUDA_STUB_DEVICES" not in os.environ, reason="needs a machine without a device")
def test_no_device() -> None:
    with pytest.raises(BackendError, match=r"no usable NVIDIA GPU .*NO_DEVICE.*nemostream doctor"):
        CudaDevice()


# -- faults ------------------------------------------------------------------------------------------------------------


def calls_to_fail(stub: Stub, function: str, work: Callable[[], Any], every: int = EVERY) -> range:
    """Return which calls of a function to fail: of those that are made if nothing fails, every n-th."""
    stub.clear()
    work()
    calls = stub.calls(function)
    stub.clear()
    assert calls
    return range(1, calls + 1, every)


def build_and_close(bundle: Bundle, loop: str = "while") -> None:
    make_backend(bundle, CudaDevice(), loop).close()


@pytest.mark.parametrize("function", ["cuMemAlloc", "cuMemHostAlloc"])
def test_out_of_memory_at_each_allocation(function: str, small_bundle: Bundle, stub: Stub, nothing_left: Any) -> None:
    for n in calls_to_fail(stub, function, lambda: build_and_close(small_bundle)):
        device = CudaDevice()
        stub.fail(function, n, OUT_OF_MEMORY)
        with pytest.raises(BackendError, match=r"smaller capacity|smaller max_batch|or less|use one with more"):
            make_backend(small_bundle, device)
        device.close()
        stub.clear()
    build_and_close(small_bundle)


@pytest.mark.parametrize("loop", ["while", "unrolled"])
def test_capture_invalidated_at_each_operation(
    loop: str, small_bundle: Bundle, steps: list[Batch], wanted: Tokens, stub: Stub
) -> None:
    """Another kind of loop is captured, and the tokens are the same."""
    loops = set()
    for n in calls_to_fail(stub, "capture", lambda: build_and_close(small_bundle, loop)):
        stub.fail("capture", n, UNKNOWN)
        gpu = make_backend(small_bundle, CudaDevice(), loop)
        assert gpu.failures and gpu.loop != loop, n
        loops.add(gpu.loop)
        assert run(gpu, steps[:4]) == wanted[:4], n
        gpu.close()
        stub.clear()
    assert loops == {LOOPS[LOOPS.index(loop) + 1]}


GRAPH_FUNCTIONS = (
    "cuStreamCreateWithPriority",
    "cuStreamBeginCapture",
    "cuStreamGetCaptureInfo",
    "cuGraphConditionalHandleCreate",
    "cuGraphAddNode",
    "cuStreamUpdateCaptureDependencies",
    "cuStreamBeginCaptureToGraph",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithParams",
    "cuGraphUpload",
)


@pytest.mark.parametrize("function", GRAPH_FUNCTIONS)
def test_graph_function_that_fails(
    function: str, small_bundle: Bundle, steps: list[Batch], wanted: Tokens, stub: Stub
) -> None:
    """At each of its calls: another loop with the same tokens, or an error that names what failed."""
    for n in calls_to_fail(stub, function, lambda: build_and_close(small_bundle)):
        stub.fail(function, n, UNKNOWN)
        try:
            gpu = make_backend(small_bundle, CudaDevice())
        except BackendError as error:
            assert "no usable NVIDIA GPU" in str(error)
        else:
            assert gpu.failures and gpu.loop != "while", n
            assert run(gpu, steps[:4]) == wanted[:4], n
            gpu.close()
        stub.clear()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("n", [1, 9])
def test_failed_kernel(n: int, loop: str, small_bundle: Bundle, steps: list[Batch], wanted: Tokens, stub: Stub) -> None:
    """The step and all later steps raise; a CPU backend in the same process is unaffected."""
    cpu = OrtBackend(small_bundle, capacity=SLOTS, threads=1)
    gpu = make_backend(small_bundle, CudaDevice(), loop)
    assert run(gpu, steps[:3]) == wanted[:3]
    stub.fail("execute", n, LAUNCH_FAILED)
    with pytest.raises(BackendError, match=r"LAUNCH_FAILED.*restart"):
        gpu.submit(steps[3]).result()
    for _ in range(3):
        with pytest.raises(BackendError, match=r"LAUNCH_FAILED|could not be started"):
            gpu.submit(steps[4]).result()
    with pytest.raises(BackendError):
        gpu.reset(np.arange(SLOTS))
    assert run(cpu, steps) == wanted
    gpu.close()
    assert run(cpu, steps) == wanted


@pytest.mark.parametrize("loop", LOOPS)
def test_lost_device_at_each_call(
    loop: str, small_bundle: Bundle, steps: list[Batch], wanted: Tokens, stub: Stub
) -> None:
    """The device is lost at each driver call of the first steps."""
    cpu = OrtBackend(small_bundle, capacity=SLOTS, threads=1)

    def first_steps(n: int) -> int:
        gpu = make_backend(small_bundle, CudaDevice(), loop)
        stub.clear()
        if n:
            stub.fail("*", n, UNAVAILABLE, sticky=True)
        try:
            assert run(gpu, steps[:2]) == wanted[:2]
            assert not n
        except BackendError as error:
            assert n and ("the GPU" in str(error) or "could not be started" in str(error))
        calls = stub.calls("*")
        gpu.close()
        stub.clear()
        return calls

    for n in range(1, first_steps(0), EVERY):
        first_steps(n)
    assert run(cpu, steps) == wanted


def test_lost_device_while_building(small_bundle: Bundle, stub: Stub) -> None:
    for n in calls_to_fail(stub, "*", lambda: build_and_close(small_bundle), every=8 * EVERY):
        stub.fail("*", n, UNAVAILABLE, sticky=True)
        try:
            build_and_close(small_bundle)
        except BackendError as error:
            assert "UNAVAILABLE" in str(error) or "the GPU" in str(error) or "no usable NVIDIA GPU" in str(error), n
        gc.collect()
        stub.clear()


def test_streams_on_a_lost_device(demo_bundle: Bundle, stub: Stub) -> None:
    """Streams of the lost device end with an error; a model on the CPU transcribes as before."""
    clip = nemostream.demo_clip()
    with nemostream.load(chunk_ms=CHUNK_MS, threads=1) as cpu:
        text = cpu.transcribe(clip).text
        # More than one slot: that of a failed stream is released when the step after the failed one is done.
        with nemostream.Model(demo_bundle, make_backend(demo_bundle, CudaDevice(), capacity=4), CHUNK_MS) as gpu:
            stub.fail("execute", 200, LAUNCH_FAILED)
            with pytest.raises(BackendError, match="LAUNCH_FAILED"):
                gpu.transcribe(clip)
            with pytest.raises(BackendError):
                gpu.transcribe(clip)
            assert cpu.transcribe(clip).text == text
        assert cpu.transcribe(clip).text == text
