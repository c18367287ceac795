"""Operations of the GPU backend take effect in the order of the calls, whatever the host waits for, on every thread.

The encoder is a formula of all its inputs, so that a row with another stream's audio, state, prompt or position changes
the results. They are compared with those of a backend that completes every operation before the next one begins.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_on_cpu import MISSING
from decoding_model import VOCABULARY, make_bundle, make_weights, some_phrases
from host_device import HostDevice
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.bundle import Bundle, ChunkConfig, LanguageConfig
from nemostream.errors import BackendError, CapacityError, OptionError
from nemostream.runtime.backends.base import Batch, Emissions
from nemostream.runtime.backends.gpu import arena, kernels
from nemostream.runtime.backends.gpu.backend import LOOPS, GpuBackend
from nemostream.runtime.backends.gpu.device import OutOfMemory
from nemostream.runtime.decoding.boosting import Boosting

pytestmark = pytest.mark.skipif(MISSING, reason="needs g++ to run the kernels on a CPU")

SHORT, LONG = ChunkConfig(80, 1, 8, 1280), ChunkConfig(160, 2, 8, 2560)
CAPACITY, MAX_BATCH = 9, 6
LANGUAGES = LanguageConfig(default="b", prompts={"a": 0, "b": 3, "c": 5}, count=6)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_test_bundle(tmp_path_factory.mktemp("bundle"), "random")


def make_test_bundle(path: Path, kind: str) -> Bundle:
    made = make_bundle(path, make_weights(np.random.default_rng(2), kind))
    return Bundle(path, dataclasses.replace(made.manifest, chunks=(SHORT, LONG), languages=LANGUAGES))


class FormulaEncoder:
    """Every output of a row depends on every input of that row and of no other."""

    cache_dtype = "float32"

    def __init__(self, bundle: Bundle, chunk: ChunkConfig, device: HostDevice, capturable: bool = True) -> None:
        self._spec, self._net, self._mels = (
            bundle.manifest.encoder,
            bundle.manifest.decoder,
            bundle.manifest.features.mels,
        )
        self._chunk, self._device, self._capturable = chunk, device, capturable
        self._mix = np.random.default_rng(0).standard_normal((self._mels, self._net.joint)).astype(np.float32)
        self.bound: list[int] = []
        self.runs = 0
        self.closed = False

    @property
    def capturable(self) -> bool:
        assert self.runs >= len(self.bound), "read before the work of the last `bind` has run"
        return self._capturable

    def memory_bytes(self, rows: int) -> int:
        return 0

    def bind(self, rows: int, addresses: Mapping[str, int]) -> Callable[[], None]:
        self.bound.append(rows)
        spec, frames, d_k = self._spec, self._chunk.frames, self._spec.d_model // self._spec.heads
        ring, new = (rows, spec.heads, spec.cache, d_k), (spec.layers, rows, spec.heads, frames, d_k)
        conv = (rows, spec.d_model, spec.conv_cache)
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "mel": ((rows, spec.subsampling * frames, self._mels), np.float32),
            "mel_cache": ((rows, spec.mel_cache, self._mels), np.float32),
            "mel_cache_next": ((rows, spec.mel_cache, self._mels), np.float32),
            **{name: ((rows,), np.int64) for name in ("position", "valid", "prompt")},
            **{f"{name}_cache.{layer}": (ring, np.float32) for name in "kv" for layer in range(spec.layers)},
            **{f"conv_cache.{layer}": (conv, np.float32) for layer in range(spec.layers)},
            "encoded_joint": ((rows, frames, self._net.joint), np.float32),
            "k_new": (new, np.float32),
            "v_new": (new, np.float32),
            "conv_next": ((spec.layers, *conv), np.float32),
        }
        assert shapes.keys() == addresses.keys()
        view = {name: self._device.view(addresses[name], *shapes[name]) for name in shapes}

        def run() -> None:
            self.runs += 1
            window = np.concatenate([view["mel_cache"], view["mel"]], axis=1)
            mel = view["mel"].reshape(rows, frames, spec.subsampling, -1).mean(axis=2)
            state = view["position"] * 0.3 + view["valid"] * 0.7 + view["prompt"] + view["mel_cache"].mean(axis=(1, 2))
            for layer in range(spec.layers):
                for number, name in enumerate("kv"):
                    state = state + (number + 1) * view[f"{name}_cache.{layer}"].mean(axis=(1, 2, 3))
                state = state + 4 * view[f"conv_cache.{layer}"].mean(axis=(1, 2))
            view["encoded_joint"][:] = 2 * np.sin(mel @ self._mix + state[:, None, None])
            view["k_new"][:] = np.sin(state)[:, None, None, None] + mel.mean(axis=2)[:, None, :, None]
            view["v_new"][:] = np.cos(2 * state)[:, None, None, None] + mel.mean(axis=2)[:, None, :, None]
            view["conv_next"][:] = np.cos(state)[:, None, None]
            view["mel_cache_next"][:] = window[:, -spec.mel_cache :]

        return lambda: self._device.queue(run)

    def close(self) -> None:
        self.closed = True


def make_backend(
    bundle: Bundle, loop: str = "while", capturable: bool = True, capacity: int = CAPACITY, max_batch: int = MAX_BATCH
) -> GpuBackend:
    return make_with_encoders(bundle, loop, capturable, capacity, max_batch)[0]


def make_with_encoders(
    bundle: Bundle, loop: str = "while", capturable: bool = True, capacity: int = CAPACITY, max_batch: int = MAX_BATCH
) -> tuple[GpuBackend, list[FormulaEncoder]]:
    device = HostDevice()
    encoders = {chunk.ms: FormulaEncoder(bundle, chunk, device, capturable) for chunk in bundle.manifest.chunks}
    backend = GpuBackend(bundle, device, encoders, capacity, max_batch, loop)
    assert backend.loop == loop, backend.failures
    return backend, list(encoders.values())


def make_batch(rng: np.random.Generator, slots: Any, chunk: ChunkConfig = LONG, prompts: Any = None) -> Batch:
    audio = rng.standard_normal((len(slots), chunk.samples)).astype(np.float32)
    return Batch(chunk, np.array(slots), audio, np.full(len(slots), chunk.samples), prompts)


def as_bytes(emissions: Emissions) -> list[bytes]:
    parts = (*emissions.tokens, *emissions.frames, *emissions.scores, *emissions.sum_p_alpha, emissions.failed)
    return [part.tobytes() for part in parts]


def state_of(backend: GpuBackend) -> list[dict[str, bytes]]:
    return [{name: part.tobytes() for name, part in backend.save(slot).items()} for slot in range(backend.capacity)]


Operation = Callable[[GpuBackend], Any]  # returns a pending step, or a result to compare


def random_operations(seed: int, count: int) -> list[Operation]:
    """Batches of both chunk sizes, in place and gathered, and everything that can be done between two steps."""
    rng, found = np.random.default_rng(seed), list[Operation]()
    saved = weakref.WeakKeyDictionary[GpuBackend, dict[int, Any]]()
    phrases: dict[int, Boosting | None] = dict.fromkeys(range(CAPACITY))

    def save(slot: int) -> Operation:
        def run(backend: GpuBackend) -> Any:
            kept = saved.setdefault(backend, {})
            kept[slot] = backend.save(slot)
            return [part.tobytes() for part in kept[slot].values()]

        return run

    between = ["reset", "reset", "copy", "reset_decoder", "set_phrases", "save", "load", "encode"]
    for _ in range(count):
        slot = int(rng.integers(CAPACITY))
        slots = np.sort(rng.permutation(CAPACITY)[: rng.integers(1, 4)])
        kind = rng.choice(["submit"] * 6 + between)
        if kind in ("submit", "encode"):
            size = rng.integers(1, MAX_BATCH + 1)
            rows = np.sort(rng.permutation(CAPACITY)[:size]) if rng.random() < 0.6 else np.arange(size)
            batch = make_batch(rng, rows, (SHORT, LONG)[rng.integers(2)], rng.choice([0, 3, 5], size))
            if kind == "submit":
                found.append(lambda backend, batch=batch: backend.submit(batch))
            else:
                found.append(lambda backend, batch=batch: [part.tobytes() for part in backend.encode(batch)])
        elif kind == "reset":
            found.append(lambda backend, slots=slots: backend.reset(slots))
            phrases |= dict.fromkeys(slots.tolist())
        elif kind == "copy":
            mixed, size = rng.permutation(CAPACITY), rng.integers(1, CAPACITY)
            targets, sources = mixed[:size], rng.choice(mixed[size:], size)
            found.append(lambda backend, sources=sources, targets=targets: backend.copy(sources, targets))
        elif kind == "reset_decoder":
            found.append(lambda backend, slots=slots: backend.reset_decoder(slots))
        elif kind == "set_phrases":
            chosen = some_phrases(rng) if rng.random() < 0.7 else None
            phrases[slot] = chosen
            found.append(lambda backend, slot=slot, chosen=chosen: backend.set_phrases(slot, chosen))
        elif kind == "save":
            found.append(save(slot))
        else:  # a state with the phrases that the target has

            def load(backend: GpuBackend, slot: int = slot) -> None:
                for state in [*saved.get(backend, {}).values()][::-1]:
                    try:
                        backend.load(slot, state)
                    except OptionError:
                        continue
                    return

            found.append(load)
    return found


def complete_each(backend: GpuBackend, operations: list[Operation]) -> tuple[list[Any], list[dict[str, bytes]]]:
    """Run operations, each of which is complete before the next one. Returns the results and the final state."""
    found = []
    for operation in operations:
        result = operation(backend)
        found.append(as_bytes(result.result()) if hasattr(result, "result") else result)
        backend.device.drain()
    return found, state_of(backend)


def complete_late(
    backend: GpuBackend, operations: list[Operation], rng: np.random.Generator, most: int
) -> tuple[list[Any], list[dict[str, bytes]]]:
    """Run operations with up to `most` steps whose results were not requested; request them in any order."""
    found: list[Any] = []
    pending: list[int] = []
    for operation in operations:
        found.append(operation(backend))
        if hasattr(found[-1], "result"):
            pending.append(len(found) - 1)
        while len(pending) > most:
            index = pending.pop(int(rng.integers(len(pending))))
            found[index] = as_bytes(found[index].result())
    state = state_of(backend)
    for index in pending[::-1]:
        found[index] = as_bytes(found[index].result())
    return found, state


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> tuple[list[Operation], list[Any], list[dict[str, bytes]]]:
    operations = random_operations(0, 50)
    return operations, *complete_each(make_backend(bundle), operations)


@pytest.mark.parametrize(("loop", "capturable"), [*((loop, True) for loop in LOOPS), ("while", False)])
def test_operations_take_effect_in_the_order_of_the_calls(
    loop: str, capturable: bool, bundle: Bundle, reference: Any
) -> None:
    operations, results, state = reference
    assert sum(len(b"".join(result)) > 20 for result in results if isinstance(result, list)) > 20, "tokens are emitted"
    for most in (1, 1000) if loop == "while" and capturable else (1000,):
        backend = make_backend(bundle, loop, capturable)
        found, end = complete_late(backend, operations, np.random.default_rng(most), most)
        assert [index for index, result in enumerate(found) if result != results[index]] == []
        assert end == state
        backend.close()


def test_every_operation_makes_the_device_current(bundle: Bundle, reference: Any) -> None:
    """Each operation, result and `close` is on a thread of its own; the device rejects a thread that did not."""
    operations, results, _ = reference
    backend, encoders = make_with_encoders(bundle)

    def in_thread(work: Callable[[], Any]) -> Any:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(work()))
        thread.start()
        thread.join()
        (result,) = found
        return result

    for operation, wanted in zip(operations[:15], results[:15], strict=True):
        result = in_thread(lambda: operation(backend))  # noqa: B023
        if hasattr(result, "result"):
            result = as_bytes(in_thread(result.result))
        assert result == wanted
    batch = make_batch(np.random.default_rng(0), [0, 1])
    in_thread(lambda: backend.encode(batch))
    in_thread(lambda: backend.device.elapsed_ms(backend.stages(batch).values()))
    in_thread(lambda: backend.launches(batch))
    in_thread(lambda: backend.set_phrases(0, None))
    in_thread(lambda: backend.reset_decoder(np.array([1])))
    in_thread(lambda: backend.copy(np.array([1]), np.array([0])))
    in_thread(lambda: backend.load(1, in_thread(lambda: backend.save(1))))
    in_thread(backend.close)
    assert backend.device.closed and all(encoder.closed for encoder in encoders)


@pytest.mark.parametrize("loop", LOOPS)
def test_operations_follow_a_step_with_many_labels(loop: str, tmp_path: Path) -> None:
    """A step is not affected by an operation after it, although the host takes part in its decoding loop."""
    bundle = make_test_bundle(tmp_path, "labels")
    late, early = (make_backend(bundle, loop, capacity=2, max_batch=2) for _ in range(2))
    rng = np.random.default_rng(0)
    batch, other, phrases = make_batch(rng, [0, 1]), make_batch(rng, [0, 1], SHORT), some_phrases(rng)
    saved = early.save(0)
    operations: dict[str, Callable[[GpuBackend], Any]] = {
        "reset": lambda backend: backend.reset(np.array([0])),
        "reset_decoder": lambda backend: backend.reset_decoder(np.array([0])),
        "set_phrases": lambda backend: backend.set_phrases(1, phrases),
        "save": lambda backend: [part.tobytes() for part in backend.save(1).values()],
        "load": lambda backend: backend.load(0, saved),
        "copy": lambda backend: backend.copy(np.array([1]), np.array([0])),
        "encode": lambda backend: backend.encode(other)[0].tobytes(),
        "submit": lambda backend: as_bytes(backend.submit(other).result()),
    }
    for name, operation in operations.items():
        found = []
        for backend in (late, early):
            backend.reset(np.arange(2))
            step = backend.submit(batch)
            if backend is early:
                step.result()
                backend.device.drain()
            result = operation(backend)
            found.append((result, state_of(backend), as_bytes(step.result())))
        assert found[0] == found[1], name
        assert len(step.result().tokens[0]) == 6, "more labels than a launch of an unrolled loop finds"


@pytest.mark.parametrize("loop", LOOPS)
def test_consecutive_resets(loop: str, bundle: Bundle) -> None:
    """The list of slots is in host memory, which the device reads later."""
    backend = make_backend(bundle, loop)
    initial = state_of(backend)
    rng = np.random.default_rng(0)
    backend.submit(make_batch(rng, np.arange(6))).result()
    used = state_of(backend)
    assert all(one != other for one, other in zip(initial[:6], used[:6], strict=True))
    backend.reset(np.array([4, 0]))
    backend.reset(np.array([2]))
    backend.reset(np.array([1, 8, 7]))
    assert state_of(backend) == [initial[slot] if slot in (0, 1, 2, 4) else used[slot] for slot in range(CAPACITY)]


def test_copies_do_not_wait_for_the_device(bundle: Bundle) -> None:
    """A step stays pending however often its slots are copied, and no memory is allocated."""
    backend, rng = make_backend(bundle), np.random.default_rng(0)
    backend.set_phrases(4, some_phrases(rng))
    device = backend.device
    device.drain()
    device.launches.clear()
    arrays, queued = len(device.arrays), device.queued
    step = backend.submit(make_batch(rng, [0, 1, 4]))
    for target in (5, 6, 7, 8):
        backend.copy(np.array([4]), np.array([target]))
    backend.copy(np.array([0, 1]), np.array([2, 3]))
    assert device.launches == [] and len(device.arrays) == arrays
    assert device.queued - queued == 1 + 5, "a launch for the step, and for each call"
    step.result()
    assert "copy" not in device.launches, "the result does not wait for later copies"
    states = state_of(backend)
    assert states[4:] == [states[4]] * 5 and states[:2] == states[2:4] and states[0] != states[4]
    assert device.launches.count("copy") == 5


@pytest.mark.parametrize("count", [1, kernels.COPY_SLOTS, kernels.COPY_SLOTS + 1, 2 * kernels.COPY_SLOTS + 3])
def test_copies_of_many_slots(count: int, tmp_path: Path) -> None:
    """The copies of a call are as many launches as their lists of slots need."""
    backend = make_backend(make_test_bundle(tmp_path, "random"), "eager", capacity=40, max_batch=40)
    rng = np.random.default_rng(count)
    backend.submit(make_batch(rng, np.arange(40))).result()
    slots = rng.permutation(40)
    sources, targets = slots[20 : 20 + count], slots[:count]
    expected = state_of(backend)
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        expected[target] = expected[source]
    backend.device.launches.clear()
    backend.copy(sources, targets)
    assert state_of(backend) == expected
    assert backend.device.launches == ["copy"] * -(-count // kernels.COPY_SLOTS)
    assert backend.device.grids["copy"] == ((count - 1) % kernels.COPY_SLOTS + 1, 1, kernels.GATHER_BLOCKS)


def test_results_are_returned_again(bundle: Bundle) -> None:
    """Also after the buffer is used by other steps."""
    backend, rng = make_backend(bundle), np.random.default_rng(1)
    first = backend.submit(make_batch(rng, [0, 1, 2]))
    wanted = as_bytes(first.result())
    others = [backend.submit(make_batch(rng, [2, 3, 4])) for _ in range(3)]
    assert as_bytes(first.result()) == wanted
    assert len({tuple(as_bytes(other.result())) for other in others}) == 3


def test_stages_and_launches(bundle: Bundle) -> None:
    """They change the state as steps do; the encoder alone changes none."""
    rng = np.random.default_rng(5)
    warm_up, batch, last = (make_batch(rng, [0, 2, 5]) for _ in range(3))

    def run(work: Callable[[GpuBackend], Any], capturable: bool = True, loop: str = "while") -> tuple[Any, ...]:
        backend = make_backend(bundle, loop, capturable)
        backend.submit(warm_up).result()
        work(backend)
        return as_bytes(backend.submit(last).result()), state_of(backend)

    def stages(backend: GpuBackend) -> None:
        names = ["begin", "features", "gather", "encoder", "scatter", "finish"]
        works = backend.stages(batch)
        assert list(works) == names
        backend.device.elapsed_ms(works.values())

    def repeated(part: str) -> Callable[[GpuBackend], None]:
        def run_twice(backend: GpuBackend) -> None:
            works = getattr(backend.launches(batch), part)
            for _ in range(2):
                before = backend.device.queued
                backend.device.elapsed_ms(works)
                assert backend.device.queued - before == (1 if backend.loop != "eager" and capturable else len(works))

        return run_twice

    once = run(lambda backend: backend.encode(batch))
    assert run(stages) == once
    twice = run(lambda backend: [backend.encode(batch) for _ in range(2)])
    decoded = run(lambda backend: [backend.submit(batch).result() for _ in range(2)])
    nothing = run(lambda backend: None)
    assert len({str(each) for each in (once, twice, decoded, nothing)}) == 4
    for capturable in (True, False):
        assert run(repeated("undecoded"), capturable) == twice
        assert run(repeated("whole"), capturable) == decoded
        assert run(repeated("encoder"), capturable) == nothing
    for loop in ("unrolled", "eager"):
        assert make_backend(bundle, loop).launches(batch).whole is None
        assert run(repeated("undecoded"), loop=loop) == twice


@pytest.mark.parametrize("capturable", [True, False])
def test_slower_loops_are_reported(capturable: bool, bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    """With what the faster ones failed; the loop that was requested is not."""
    device = HostDevice(conditional=False, capturable=capturable)
    backend = GpuBackend(bundle, device, {160: FormulaEncoder(bundle, LONG, device)}, capacity=1)
    loop, failures = ("unrolled", 1) if capturable else ("eager", 2)
    assert (backend.loop, len(backend.failures)) == (loop, failures)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and f"the slower loop '{loop}': " in record.message
    assert all(failure in record.message for failure in ["no conditional nodes", *backend.failures])
    caplog.clear()
    make_backend(bundle, "eager", capacity=1, max_batch=1)
    assert not caplog.records


def test_encoder_that_never_works(bundle: Bundle) -> None:
    """The error has the reason of each kind of loop; running out of memory is no reason to try another one."""
    tried: list[int] = []

    class Failing(FormulaEncoder):
        error: BackendError = BackendError("the library failed.")

        def bind(self, rows: int, addresses: Mapping[str, int]) -> Callable[[], None]:
            tried.append(rows)
            raise self.error

    device = HostDevice()
    with pytest.raises(BackendError, match=f"no step can be run on {device.name}: .*nemostream doctor") as error:
        GpuBackend(bundle, device, {160: Failing(bundle, LONG, device)}, capacity=3)
    assert all(f"{loop}: the library failed." in str(error.value) for loop in LOOPS)
    assert tried == [3, 3, 3]
    Failing.error = OutOfMemory(5_000_000)
    with pytest.raises(BackendError, match=r"5\.0 MB cannot be allocated on .* for 3 streams"):
        GpuBackend(bundle, device, {160: Failing(bundle, LONG, device)}, capacity=3)
    assert len(tried) == 4


def test_engines_with_different_caches(bundle: Bundle) -> None:
    device = HostDevice()
    encoders = {chunk.ms: FormulaEncoder(bundle, chunk, device) for chunk in (SHORT, LONG)}
    encoders[160].cache_dtype = "float16"
    with pytest.raises(OptionError, match="the engines have caches of float16 and float32; all must have the same"):
        GpuBackend(bundle, device, encoders)
    with pytest.raises(OptionError, match="the engines have caches of no type"):
        GpuBackend(bundle, device, {})


@pytest.mark.parametrize(("size", "amount"), [(99_999, "99999 bytes"), (100_000, "0.1 MB"), (2_345_678, "2.3 MB")])
def test_amount_of_memory_that_is_missing(size: int, amount: str) -> None:
    assert str(OutOfMemory(size)) == f"the GPU is out of memory: {amount} cannot be allocated."


@pytest.mark.parametrize("loop", LOOPS)
def test_two_steps_are_in_flight(loop: str, bundle: Bundle) -> None:
    """A step is launched while the one before it runs; if the host takes part in the loop, after it is complete."""
    backend, rng = make_backend(bundle, loop), np.random.default_rng(3)
    backend.device.launches.clear()
    steps, complete = [], []
    for _ in range(4):
        steps.append(backend.submit(make_batch(rng, [0, 1])))
        complete.append(backend.device.launches.count("begin"))  # the first kernel of each step
    assert complete == ([0, 0, 1, 2] if loop == "while" else [0, 1, 2, 3])
    steps[2].result()
    assert backend.device.launches.count("begin") == 3


@pytest.mark.parametrize("slots", [[0, 2, 3], [2, 5, 7]])
def test_encoded_frames_of_each_row(slots: list[int], bundle: Bundle) -> None:
    """Output and number of frames are those of the row alone, in place and gathered, in streams that end."""
    together, alone = make_backend(bundle), make_backend(bundle)
    rng, manifest = np.random.default_rng(4), bundle.manifest
    for step in range(3):
        audio = rng.standard_normal((len(slots), LONG.samples)).astype(np.float32)
        lengths = np.array([[2560] * 3, [2560, 1300, 2560], [2559, 0, 700]][step])
        encoded, counts = together.encode(Batch(LONG, np.array(slots), audio, lengths))
        assert (encoded.shape, counts.shape) == ((3, 2, manifest.decoder.joint), (3,))
        for row in (2, 0, 1):
            batch = Batch(LONG, np.array(slots[row : row + 1]), audio[row : row + 1], lengths[row : row + 1])
            single, count = alone.encode(batch)
            received = step * LONG.samples - manifest.lead + int(lengths[row])
            frames = max(0, min(manifest.encoder_frames(received) - step * LONG.frames, LONG.frames))
            assert counts[row] == count[0] == frames
            np.testing.assert_array_equal(encoded[row], single[0])


def test_prompts_of_idle_rows(bundle: Bundle) -> None:
    """The encoder computes them too, so that their prompt must be valid: it is that of the default language."""
    backend, rng, used = make_backend(bundle), np.random.default_rng(0), np.empty(6, np.int64)
    for slots, rows in (([0, 1, 2, 3, 4], 6), ([3, 4, 7, 8], 4), ([0, 1, 2], 4), ([5, 6, 7], 4), ([0], 1)):
        prompts = rng.choice([0, 5], len(slots))
        for ids, wanted in ((prompts, prompts.tolist()), (None, [3] * len(slots))):
            backend.encode(make_batch(rng, slots, prompts=ids))
            backend.arena.read("row_prompt", used)
            assert used[:rows].tolist() == wanted + [3] * (rows - len(slots))


def test_step_that_cannot_be_started(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps before and after it return the results that they have without it."""
    rng = np.random.default_rng(6)
    batches = [make_batch(rng, [0, 2, 5]) for _ in range(5)]
    wanted = complete_each(
        make_backend(bundle), [lambda backend, batch=batch: backend.submit(batch) for batch in batches]
    )
    backend = make_backend(bundle)
    steps = []

    def fail(*_: Any) -> None:
        raise BackendError("the launch failed.")

    for batch in batches:
        with monkeypatch.context() as patch, pytest.raises(BackendError, match=r"the launch failed\."):
            patch.setattr(HostDevice, "queue", fail)
            backend.submit(batches[0])
        steps.append(backend.submit(batch))
    assert [as_bytes(step.result()) for step in steps] == wanted[0]
    assert state_of(backend) == wanted[1]


# Slots of a batch, and what is expected: rows of the bucket, and whether the caches are read in place.
BATCHES = [
    ([0], 1, True),
    ([1], 1, False),
    ([0, 1], 2, True),
    ([1, 2], 2, False),
    ([0, 2], 2, False),
    ([0, 1, 2], 4, True),
    ([0, 2, 3], 4, True),
    ([1, 2, 4], 4, False),
    ([0, 1, 2, 3, 4], 6, True),
    ([0, 1, 2, 4, 5], 6, True),
    ([0, 1, 2, 3, 6], 6, False),
    ([3, 4, 5, 6, 7, 8], 6, False),
]


@pytest.mark.parametrize("loop", ["while", "eager"])
def test_bucket_and_cache_access_of_a_batch(loop: str, bundle: Bundle) -> None:
    """Nothing is copied if the slots of a batch fit in its bucket."""
    backend, rng = make_backend(bundle, loop), np.random.default_rng(0)
    assert backend.buckets == (1, 2, 4, 6)
    for chunk in (SHORT, LONG):
        for slots, rows, in_place in BATCHES:
            backend.device.steps.clear()
            backend.submit(make_batch(rng, slots, chunk)).result()
            assert {(step["rows"], step["frames"], step["in_place"]) for step in backend.device.steps} == {
                (rows, chunk.frames, in_place)
            }


def test_largest_buckets_are_bound_first(bundle: Bundle) -> None:
    """So that contexts which share their memory allocate it once."""
    _, encoders = make_with_encoders(bundle)
    assert [encoder.bound for encoder in encoders] == [[6, 6, 4, 4, 2, 2, 1, 1]] * 2


def test_grids(tmp_path: Path) -> None:
    """A block per row, tile or warp of work, and no more than are needed."""
    bundle = make_test_bundle(tmp_path, "random")
    backend = make_backend(bundle, "eager", capacity=40, max_batch=40)
    backend.device.grids.clear()
    backend.submit(make_batch(np.random.default_rng(0), np.arange(40))).result()
    assert backend.device.grids == {
        "begin": (40, 2, 1),  # 2,560 samples, of which a thread copies at most 8
        "features": (16, 40, 1),
        "gather": (40, 1, kernels.GATHER_BLOCKS),
        "scatter": (40, 1, 1),
        "start": (40, 1, 1),
        "join": (5, 2, 1),  # 80 pairs, 38 logits
        "decide": (5, 1, 1),
        "lstm_0": (3, 2, 1),  # 40 rows, 16 units
        "lstm_1": (3, 2, 1),
        "project": (3, 2, 1),  # 40 joint units
        "finish": (32, 1, 1),
    }
    backend.device.grids.clear()
    backend.reset(np.array([3, 1, 8]))
    backend.reset_decoder(np.array([2, 7]))  # a launch for each
    backend.set_phrases(5, None)
    backend.device.drain()
    assert backend.device.grids == {"reset": (3, 1, 1), "reset_decoder": (1, 1, 1), "set_phrases": (1, 1, 1)}


def test_step_that_fills_every_buffer(tmp_path: Path) -> None:
    """All rows emit as many tokens as they can; nothing is written beyond an array, in either host buffer."""
    bundle = make_test_bundle(tmp_path, "labels")
    backend, rng = make_backend(bundle, capacity=8, max_batch=8), np.random.default_rng(0)
    layout, limit = backend.arena.layout, bundle.manifest.decoder.max_symbols
    assert (layout.max_rows, layout.max_frames, layout.max_tokens) == (8, 2, 8 * 2 * limit)
    for slot in range(8):
        backend.set_phrases(slot, some_phrases(rng))
    for _ in range(3):
        found = backend.submit(make_batch(rng, np.arange(8))).result()
        assert [len(tokens) for tokens in found.tokens] == [2 * limit] * 8
        assert [np.bincount(frames - frames.min()).tolist() for frames in found.frames] == [[limit, limit]] * 8
        assert not found.failed.any()


# -- phrase pool -------------------------------------------------------------------------------------------------------


def position_of(backend: GpuBackend, slot: int, phrases: Boosting) -> int:
    """Return the position of a slot's automaton in the pool, in words. Asserts that it is that of `phrases`."""
    image, words = kernels.automaton(phrases), np.empty(backend.capacity, np.int32)
    backend.arena.read("slot_automaton", words)
    pool = np.empty(words[slot] + len(image), np.int32)
    backend.arena.read("phrase_pool", pool)
    np.testing.assert_array_equal(pool[words[slot] :], image)
    return int(words[slot])


def test_phrases_fill_the_pool(pool_backend: GpuBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to its last byte; a list takes the first gap that is large enough, also one of exactly its size."""
    lists = [Boosting([([token, token], 1.0)], VOCABULARY) for token in range(6)]
    (words,) = {len(kernels.automaton(phrases)) for phrases in lists}
    large = Boosting([([token], 1.0) for token in range(20)], VOCABULARY)
    monkeypatch.setattr(arena, "PHRASE_POOL_BYTES", 4 * 4 * words)
    pool_backend.reset(np.arange(5))
    for slot in range(4):
        pool_backend.set_phrases(slot, lists[slot])
        assert position_of(pool_backend, slot, lists[slot]) == slot * words
    used = 4 * 4 * words
    with pytest.raises(CapacityError, match=f"need {4 * words} bytes of the {used} .* of which {used} are in use"):
        pool_backend.set_phrases(4, lists[4])
    for removed in (2, 1):
        pool_backend.set_phrases(removed, None)
    size = kernels.automaton(large).nbytes
    with pytest.raises(CapacityError, match=f"need {size} bytes of the {used} .* of which {used // 2} are in use"):
        pool_backend.set_phrases(4, large)
    for slot, phrases, position in ((1, lists[4], words), (4, lists[5], 2 * words)):
        pool_backend.set_phrases(slot, phrases)
        assert position_of(pool_backend, slot, phrases) == position
    for slot in (0, 3):
        assert position_of(pool_backend, slot, lists[slot]) == slot * words
    pool_backend.reset(np.arange(5))


def test_saved_state_names_the_phrases(pool_backend: GpuBackend) -> None:
    """It can be loaded only into a slot with the same phrases: its node is one of their automaton."""
    one, other = (Boosting([([token], 1.0)], VOCABULARY) for token in (1, 2))
    pool_backend.reset(np.arange(5))
    pool_backend.set_phrases(1, one)
    pool_backend.set_phrases(2, other)
    pool_backend.set_phrases(3, Boosting([([1], 1.0)], VOCABULARY))
    states = [pool_backend.save(slot) for slot in range(5)]
    same = {(slot, slot) for slot in range(5)} | {(0, 4), (4, 0), (1, 3), (3, 1)}
    for slot in range(5):
        for source in range(5):
            if (slot, source) in same:
                pool_backend.load(slot, states[source])
            else:
                with pytest.raises(OptionError, match="the saved state has other phrases"):
                    pool_backend.load(slot, states[source])
    pool_backend.reset(np.arange(5))


@pytest.fixture(scope="module")
def pool_backend(bundle: Bundle) -> Iterator[GpuBackend]:
    backend = make_backend(bundle, "eager", capacity=5, max_batch=1)
    yield backend
    backend.close()


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 12)), min_size=1, max_size=30))
def test_phrases_of_each_slot_are_in_the_pool(pool_backend: GpuBackend, calls: list[tuple[int, int]]) -> None:
    """Lists of different lengths are set, removed and copied; each slot's automaton is the one that it got last.

    A call has a slot, and the number of a list, -1 for none, or 8 and the number of a slot whose phrases are copied.
    """
    lists = [Boosting([([token], 1.0) for token in range(1 + 4 * size)], VOCABULARY) for size in range(8)]
    images = [kernels.automaton(phrases) for phrases in lists]
    current: dict[int, int] = {}
    backend = pool_backend
    pool_bytes = images[7].nbytes + images[6].nbytes + images[2].nbytes

    def used(of: Mapping[int, int]) -> int:
        return sum(images[index].nbytes for index in set(of.values()))

    backend.reset(np.arange(5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "PHRASE_POOL_BYTES", pool_bytes)
        for slot, call in calls:
            index = call
            if call >= 8:
                if slot == call - 8:
                    continue
                index = current.get(call - 8, -1)
            try:
                if call >= 8:
                    backend.copy(np.array([call - 8]), np.array([slot]))
                else:
                    backend.set_phrases(slot, lists[index] if index >= 0 else None)
            except CapacityError:
                assert call < 8
                # Every gap between the lists is too small. The slot's old list is in use until the new one is written.
                live = set(current.values())
                assert index >= 0 and index not in live
                assert pool_bytes - used(current) < (len(live) + 1) * images[index].nbytes
            else:
                current = {**current, slot: index} if index >= 0 else {s: i for s, i in current.items() if s != slot}
                assert used(current) <= pool_bytes
            words, pool = np.empty(5, np.int32), np.empty(pool_bytes // 4, np.int32)
            backend.arena.read("slot_automaton", words)
            backend.arena.read("phrase_pool", pool)
            for other in range(5):
                if other not in current:
                    assert words[other] == -1
                    continue
                image = images[current[other]]
                np.testing.assert_array_equal(pool[words[other] :][: len(image)], image)
            assert len({words[slot] for slot in current}) == len(set(current.values())), "equal lists are stored once"
    backend.reset(np.arange(5))
