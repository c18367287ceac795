"""Slot operations between steps on every backend: save, load, copy, decoder reset, phrases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_on_cpu import MISSING
from host_device import HostDevice, OrtEncoder

from nemostream.bundle import Bundle
from nemostream.errors import CapacityError, OptionError
from nemostream.runtime.backends.base import Backend, Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.backends.gpu import arena
from nemostream.runtime.backends.gpu.backend import LOOPS, GpuBackend
from nemostream.runtime.decoding.boosting import Boosting

Parts = list[tuple[np.ndarray, int]]
needs_compiler = pytest.mark.skipif(MISSING, reason="needs g++ to run the kernels on a CPU")


def make_gpu_backend(bundle: Bundle, device: Any, capacity: int = 3, loop: str = "while") -> GpuBackend:
    encoders = {ms: OrtEncoder(bundle, bundle.manifest.chunk(ms), device) for ms in (80, 560)}
    return GpuBackend(bundle, device, encoders, capacity=capacity, loop=loop)


@pytest.fixture(
    params=["cpu", pytest.param("kernels", marks=needs_compiler), pytest.param("gpu", marks=pytest.mark.gpu)]
)
def make(request: pytest.FixtureRequest, small_bundle: Bundle) -> Any:
    """Return a function that creates a backend with the given capacity."""
    if request.param == "cpu":
        return lambda capacity: OrtBackend(small_bundle, capacity=capacity, threads=1)
    if request.param == "kernels":
        return lambda capacity: make_gpu_backend(small_bundle, HostDevice(), capacity)
    from nemostream.errors import BackendError
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    try:
        CudaDevice().close()
    except BackendError as error:
        pytest.skip(str(error))
    return lambda capacity: make_gpu_backend(small_bundle, CudaDevice(), capacity)


def phrases_of(bundle: Bundle, seed: int = 0) -> Boosting:
    """Return phrases with weights so large that all emitted tokens belong to them."""
    rng, vocabulary = np.random.default_rng(seed), bundle.manifest.decoder.vocabulary
    few = rng.choice(vocabulary, 8, replace=False)
    return Boosting([(rng.choice(few, rng.integers(1, 6)).tolist(), 50.0) for _ in range(30)], vocabulary)


def step(backend: Backend, bundle: Bundle, part: tuple[np.ndarray, int], slot: int, ms: int) -> list[tuple[Any, ...]]:
    """Run one chunk of one stream and return all values of each emitted token."""
    batch = Batch(bundle.manifest.chunk(ms), np.array([slot]), part[0][None], np.array([part[1]]))
    got = backend.submit(batch).result()
    assert not got.failed[0]
    return list(
        zip(*(array[0].tolist() for array in (got.tokens, got.frames, got.scores, got.sum_p_alpha)), strict=True)
    )


@pytest.mark.parametrize("boosted", [False, True])
def test_saved_stream_continues_in_another_slot(
    boosted: bool, make: Any, small_bundle: Bundle, clips: Any, cut_chunks: Any
) -> None:
    """From any chunk on, in another slot or in a backend of another capacity: equal bit for bit."""
    parts = cut_chunks(small_bundle.manifest, small_bundle.manifest.chunk(80), clips["librivox-sense-0870"][:64000])
    phrases = phrases_of(small_bundle) if boosted else None
    first, second = make(3), make(2)
    first.reset(np.arange(3))
    first.set_phrases(1, phrases)
    whole, saved = [], []
    for part in parts:
        saved.append(first.save(1))
        whole.append(step(first, small_bundle, part, 1, 80))
    assert sum(map(len, whole)) > 4
    if boosted:
        assert any(state["node"] != 0 for state in saved)
    last = first.save(1)
    for cut in (0, 7, len(parts) // 2, len(parts) - 1):
        for backend, slot in ((first, 2), (second, 0)):
            backend.reset(np.array([slot]))
            step(backend, small_bundle, parts[-2], slot, 80)  # leaves other state in the slot
            backend.set_phrases(slot, phrases)
            backend.load(slot, saved[cut])
            assert [step(backend, small_bundle, part, slot, 80) for part in parts[cut:]] == whole[cut:]
            end = backend.save(slot)
            assert end.keys() == last.keys()
            assert all(end[name].tobytes() == last[name].tobytes() for name in last)


def test_saved_state_is_a_copy(make: Any, small_bundle: Bundle, clips: Any, cut_chunks: Any) -> None:
    parts = cut_chunks(small_bundle.manifest, small_bundle.manifest.chunk(80), clips["cards-001"])
    backend = make(2)
    backend.reset(np.arange(2))
    step(backend, small_bundle, parts[0], 0, 80)
    saved = backend.save(0)
    before = {name: array.tobytes() for name, array in saved.items()}
    step(backend, small_bundle, parts[1], 0, 80)
    backend.load(1, saved)
    step(backend, small_bundle, parts[2], 1, 80)
    assert {name: array.tobytes() for name, array in saved.items()} == before


def test_incompatible_state(make: Any, small_bundle: Bundle) -> None:
    backend = make(2)
    backend.reset(np.arange(2))
    valid = backend.save(0)
    before = {name: array.tobytes() for name, array in backend.save(1).items()}
    invalid = {
        "k do": {**valid, "k": valid["k"][:, :-1], "v": valid["v"].astype(np.float64)},
        "mel_cache does": {name: array for name, array in valid.items() if name != "mel_cache"},
        "more does": {**valid, "more": valid["h"]},
        "position does": {**valid, "position": valid["position"][None]},
    }
    for message, state in invalid.items():
        with pytest.raises(
            OptionError, match=f"another model, or from another kind .*{message.split()[0]}.* {message.split()[1]} not"
        ):
            backend.load(1, state)
    backend.set_phrases(0, phrases_of(small_bundle))
    with pytest.raises(OptionError, match="the saved state has other phrases"):
        backend.load(1, backend.save(0))
    with pytest.raises(OptionError, match="the saved state has other phrases"):
        backend.load(0, valid)
    backend.set_phrases(1, phrases_of(small_bundle, seed=1))
    with pytest.raises(OptionError, match="the saved state has other phrases"):
        backend.load(1, backend.save(0))
    backend.set_phrases(1, None)
    assert {name: array.tobytes() for name, array in backend.save(1).items()} == before


@needs_compiler
def test_state_of_another_kind_of_backend(small_bundle: Bundle) -> None:
    cpu, gpu = OrtBackend(small_bundle, capacity=1), make_gpu_backend(small_bundle, HostDevice(), 1)
    with pytest.raises(OptionError, match="another kind of backend"):
        cpu.load(0, gpu.save(0))
    with pytest.raises(OptionError, match="another kind of backend"):
        gpu.load(0, cpu.save(0))


@pytest.mark.parametrize("boosted", [False, True])
def test_reset_decoder(boosted: bool, make: Any, small_bundle: Bundle, clips: Any, cut_chunks: Any) -> None:
    """The encoder keeps its state, the decoder starts from its initial state."""
    parts = cut_chunks(small_bundle.manifest, small_bundle.manifest.chunk(80), clips["librivox-sense-0870"][:64000])
    phrases, slots, emitted, different = phrases_of(small_bundle) if boosted else None, np.array([0]), 0, 0
    chunk = small_bundle.manifest.chunk(80)
    backend, expected = make(1), make(1)
    for cut in (5, 20):
        for each in (backend, expected):
            each.reset(slots)
            each.set_phrases(0, phrases)
        for samples, length in parts[:cut]:
            expected.encode(Batch(chunk, slots, samples[None], np.array([length])))
            step(backend, small_bundle, (samples, length), 0, 80)
        saved = backend.save(0)
        backend.reset_decoder(slots)
        got = [step(backend, small_bundle, part, 0, 80) for part in parts[cut:]]
        assert got == [step(expected, small_bundle, part, 0, 80) for part in parts[cut:]]
        backend.load(0, saved)
        different += got != [step(backend, small_bundle, part, 0, 80) for part in parts[cut:]]
        emitted += sum(map(len, got))
    assert emitted > 4
    assert different, "without the reset, other tokens are emitted"


def test_set_phrases_applies_from_the_next_step(make: Any, small_bundle: Bundle, clips: Any, cut_chunks: Any) -> None:
    """Phrases are set, changed and removed; a reset removes them too."""
    parts = cut_chunks(small_bundle.manifest, small_bundle.manifest.chunk(560), clips["librivox-sense-0870"])
    first, second = phrases_of(small_bundle, 0), phrases_of(small_bundle, 1)

    def run(backend: Backend, phrases: list[Boosting | None]) -> list[Any]:
        tokens = []
        for part, current in zip(parts, phrases, strict=True):
            backend.set_phrases(1, current)
            tokens.append(step(backend, small_bundle, part, 1, 560))
        return tokens

    backend, found = make(2), []
    for phrases in ([None, first, second], [None, None, None], [None, first, None]):
        backend.reset(np.array([0, 1]))
        found.append(run(backend, [phrases[min(index // 3, 2)] for index in range(len(parts))]))
    changed, plain, removed = found
    assert changed[:3] == plain[:3] == removed[:3]
    assert changed[3:6] == removed[3:6] != plain[3:6]
    assert changed[6:] != removed[6:]
    backend.set_phrases(1, first)
    backend.reset(np.array([0, 1]))
    assert [step(backend, small_bundle, part, 1, 560) for part in parts] == plain


# -- copy --------------------------------------------------------------------------------------------------------------


def state_of(backend: Backend, slot: int) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in backend.save(slot).items()}


@pytest.mark.parametrize("boosted", [False, True])
def test_copied_stream_continues_in_both_slots(
    boosted: bool, make: Any, small_bundle: Bundle, clips: Any, cut_chunks: Any
) -> None:
    """From any chunk on, both are equal bit for bit to the stream without a copy, and to a saved and loaded one."""
    chunk = small_bundle.manifest.chunk(80)
    parts = cut_chunks(small_bundle.manifest, chunk, clips["librivox-sense-0870"][:64000])
    phrases = phrases_of(small_bundle) if boosted else None
    alone, backend, loaded = make(1), make(4), make(1)
    alone.reset(np.arange(1))
    alone.set_phrases(0, phrases)
    whole, states = [], []
    for part in parts:
        states.append(state_of(alone, 0))
        whole.append(step(alone, small_bundle, part, 0, 80))
    states.append(state_of(alone, 0))
    assert sum(map(len, whole)) > 4
    for cut in (0, 9, len(parts) // 2, len(parts) - 1):
        backend.reset(np.arange(4))
        for slot in (0, 3):  # have another state, and other phrases
            backend.set_phrases(slot, phrases_of(small_bundle, slot))
            step(backend, small_bundle, parts[-2], slot, 80)
        backend.set_phrases(1, phrases)
        for part in parts[:cut]:
            step(backend, small_bundle, part, 1, 80)
        backend.copy(np.array([1, 1]), np.array([3, 0]))
        assert [state_of(backend, slot) for slot in (0, 1, 3)] == [states[cut]] * 3
        loaded.reset(np.arange(1))
        loaded.set_phrases(0, phrases)
        loaded.load(0, backend.save(1))
        for part in parts[:5]:  # other audio than that of the source
            step(backend, small_bundle, part, 3, 80)
        other = state_of(backend, 3)
        assert other != state_of(backend, 1) == states[cut]
        for number, part in enumerate(parts[cut:], cut):
            found = [step(backend, small_bundle, part, slot, 80) for slot in (0, 1)]
            assert found == [whole[number]] * 2 == [step(loaded, small_bundle, part, 0, 80)] * 2
        assert state_of(backend, 0) == state_of(backend, 1) == state_of(loaded, 0) == states[-1]
        assert state_of(backend, 3) == other


def test_copies_change_their_chunk_size(make: Any, small_bundle: Bundle, clips: Any, cut_chunks: Any) -> None:
    """A stream of 80 ms is copied; the copy continues with 560 ms, the source with 80 ms."""
    short, long = (
        cut_chunks(small_bundle.manifest, small_bundle.manifest.chunk(ms), clips["librivox-sense-0870"])
        for ms in (80, 560)
    )
    backend, expected, cut = make(3), make(2), 4
    for each in (backend, expected):
        each.reset(np.arange(each.capacity))
    for part in short[: 7 * cut]:
        step(backend, small_bundle, part, 0, 80)
        for slot in (0, 1):
            step(expected, small_bundle, part, slot, 80)
    backend.copy(np.array([0]), np.array([2]))
    tokens = 0
    for number in range(cut, cut + 3):
        wanted = step(expected, small_bundle, long[number], 1, 560)
        assert step(backend, small_bundle, long[number], 2, 560) == wanted
        tokens += len(wanted)
        for part in short[7 * number : 7 * number + 7]:
            assert step(backend, small_bundle, part, 0, 80) == step(expected, small_bundle, part, 0, 80)
    assert tokens > 4
    assert state_of(backend, 2) == state_of(expected, 1) != state_of(backend, 0) == state_of(expected, 0)


def test_copy_while_a_step_is_pending(make: Any, small_bundle: Bundle, clips: Any, cut_chunks: Any) -> None:
    """A copy has the state after the pending steps of its source; those of its target return what they do without."""
    chunk = small_bundle.manifest.chunk(80)
    parts = cut_chunks(small_bundle.manifest, chunk, clips["librivox-sense-0870"][:40000])
    backend, expected = make(3), make(3)
    for each in (backend, expected):
        each.reset(np.arange(3))
        each.set_phrases(0, phrases_of(small_bundle))
    tokens = 0
    for first in range(0, len(parts) - 1, 2):
        steps: list[list[Any]] = [[], []]
        for slot, part in ((0, parts[first]), (1, parts[first + 1])):
            batch = Batch(chunk, np.array([slot]), part[0][None], np.array([part[1]]))
            steps[0].append(backend.submit(batch))
            steps[1].append(expected.submit(batch).result())
        backend.copy(np.array([0]), np.array([1]))
        expected.set_phrases(1, phrases_of(small_bundle))
        expected.load(1, expected.save(0))
        for found, wanted in zip(steps[0], steps[1], strict=True):
            assert found.result().tokens[0].tolist() == wanted.tokens[0].tolist()
            assert found.result().scores[0].tolist() == wanted.scores[0].tolist()
            tokens += len(wanted.all_tokens)
        assert [state_of(backend, slot) for slot in range(3)] == [state_of(expected, slot) for slot in range(3)]
    assert tokens > 10


def test_phrases_of_a_copy_are_its_own(make: Any, small_bundle: Bundle, clips: Any, cut_chunks: Any) -> None:
    """Source and copy have the same phrases until one of them changes; a reset of one keeps those of the other."""
    parts = cut_chunks(small_bundle.manifest, small_bundle.manifest.chunk(560), clips["librivox-sense-0870"])[:6]
    lists = [phrases_of(small_bundle, seed) for seed in range(3)]
    backend, alone = make(3), make(1)

    def stream(backend: Backend, slot: int) -> list[Any]:
        return [step(backend, small_bundle, part, slot, 560) for part in parts]

    results = []
    for phrases in (*lists, None):
        alone.reset(np.arange(1))
        alone.set_phrases(0, phrases)
        results.append(stream(alone, 0))
    assert all(one != other for i, one in enumerate(results) for other in results[:i])
    for released, kept in ((0, 2), (2, 0)):  # source, copy
        for release in (lambda slot: backend.set_phrases(slot, None), lambda slot: backend.reset(np.array([slot]))):
            backend.reset(np.arange(3))
            backend.set_phrases(0, lists[0])
            backend.copy(np.array([0]), np.array([2]))
            release(released)
            backend.set_phrases(1, lists[1])  # is stored in the first gap, which must not be the other slot's list
            assert [stream(backend, slot) for slot in (released, 1, kept)] == [results[3], results[1], results[0]]
    backend.reset(np.arange(3))
    for slot in range(3):
        backend.set_phrases(slot, lists[slot])
    backend.copy(np.array([1, 1]), np.array([0, 2]))  # nothing uses the other lists any more
    assert [stream(backend, slot) for slot in range(3)] == [results[1]] * 3


COPY_ERRORS = [
    ([0], [3], "a target slot is 3; this backend has the slots 0 to 2"),
    ([0, -1], [1, 2], "a source slot is -1; this backend has the slots 0 to 2"),
    ([0, 0], [2, 2], "slot 2 is a target more than once; a target can have one source only"),
    ([0, 1], [1, 2], "slot 1 is both a source and a target; copy it in a call of its own"),
    ([0], [0], "slot 0 is both a source and a target"),
    ([0, 1], [2], r"the source slots have shape \(2,\) and the target slots \(1,\); give as many targets as sources"),
    ([[0]], [[1]], r"shape \(1, 1\) .* in arrays of one dimension"),
]


def test_copies_that_are_rejected(make: Any, small_bundle: Bundle, clips: Any, cut_chunks: Any) -> None:
    """No slot is then changed; an empty copy changes none either."""
    parts = cut_chunks(small_bundle.manifest, small_bundle.manifest.chunk(80), clips["cards-001"])
    backend = make(3)
    backend.reset(np.arange(3))
    backend.set_phrases(1, phrases_of(small_bundle))
    for slot in range(3):
        step(backend, small_bundle, parts[slot], slot, 80)
    before = [state_of(backend, slot) for slot in range(3)]
    for sources, targets, message in COPY_ERRORS:
        with pytest.raises(OptionError, match=message):
            backend.copy(np.array(sources), np.array(targets))
    backend.copy(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert [state_of(backend, slot) for slot in range(3)] == before
    assert len({str(state) for state in before}) == 3


# -- GPU backend only --------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("loop", LOOPS)
def test_pending_steps_are_not_affected(loop: str, small_bundle: Bundle, clips: Any, cut_chunks: Any) -> None:
    """Operations take effect in the order of the calls, also if the host takes part in the decoding loop."""
    parts = cut_chunks(small_bundle.manifest, small_bundle.manifest.chunk(560), clips["librivox-sense-0870"])[:8]
    gpu, cpu, chunk = (
        make_gpu_backend(small_bundle, HostDevice(), loop=loop),
        OrtBackend(small_bundle, 3),
        small_bundle.manifest.chunk(560),
    )
    assert gpu.loop == loop
    cpu.reset(np.arange(3))
    pending, wanted, saved = [], [], [[], []]
    for turn, (samples, length) in enumerate(parts):
        batch = Batch(chunk, np.array([0, 2]), np.stack([samples, samples]), np.array([length, length]))
        pending.append(gpu.submit(batch))
        wanted.append(cpu.submit(batch).result())
        for backend, states in zip((gpu, cpu), saved, strict=True):
            if turn % 4 == 1:
                states.append(backend.save(2))
            backend.set_phrases(0, phrases_of(small_bundle, turn))
            if turn % 3 == 2:
                backend.reset_decoder(np.array([0, 2]))
            if turn % 4 == 3:
                backend.load(2, states[-1])
            if turn % 4 == 0:
                backend.copy(np.array([0]), np.array([1 + turn % 8 // 4]))
        for step in pending[:-1]:
            step.result()
    emitted = 0
    for step, expected in zip(pending, wanted, strict=True):
        assert [row.tolist() for row in step.result().tokens] == [row.tolist() for row in expected.tokens]
        emitted += sum(map(len, expected.tokens))
    assert emitted > 20


@needs_compiler
def test_phrase_pool(small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal lists are shared and kept as long as a slot uses them; a list without room raises an error."""
    lists = [phrases_of(small_bundle, seed) for seed in range(4)]
    sizes = [4 * (2 + 5 * len(phrases)) for phrases in lists]
    size = max(sizes[0] + sizes[1], sizes[0] + sizes[2], sizes[2] + sizes[1]) + 16
    monkeypatch.setattr(arena, "PHRASE_POOL_BYTES", size)
    backend = make_gpu_backend(small_bundle, HostDevice(), capacity=4)
    backend.set_phrases(0, lists[0])
    backend.set_phrases(1, lists[0])
    backend.set_phrases(2, phrases_of(small_bundle, 0))  # equal phrases in another object
    backend.set_phrases(3, lists[1])
    assert len(backend.arena._pool) == 2
    with pytest.raises(
        CapacityError, match=rf"need {sizes[2]} bytes of the {size} .* {sizes[0] + sizes[1]} are in use"
    ):
        backend.set_phrases(3, lists[2])
    assert np.array_equal(backend.save(3)["phrases"], lists[1].digest)
    backend.set_phrases(0, None)
    backend.reset(np.array([1]))
    with pytest.raises(CapacityError):
        backend.set_phrases(3, lists[2])  # slot 2 still uses the first list
    backend.set_phrases(2, None)
    backend.set_phrases(2, lists[2])
    assert len(backend.arena._pool) == 2
    backend.copy(np.array([2, 2]), np.array([1, 3]))
    assert len(backend.arena._pool) == 1 and backend.arena._users.total() == 3
    backend.set_phrases(2, None)
    backend.reset(np.array([1]))
    backend.set_phrases(0, lists[1])
    with pytest.raises(CapacityError):
        backend.set_phrases(2, lists[0])  # slot 3 still uses the copied list
    backend.copy(np.array([1]), np.array([0]))  # a source without phrases
    backend.set_phrases(2, lists[0])
    assert len(backend.arena._pool) == 2 and backend.arena._users.total() == 2
    for slot in (2, 3):
        backend.set_phrases(slot, None)
    assert not backend.arena._pool and not backend.arena._users and not backend.arena._phrases


@needs_compiler
def test_pool_changes_do_not_affect_other_phrases(small_bundle: Bundle, clips: Any, cut_chunks: Any) -> None:
    """Lists of other streams are added and removed while a stream keeps its phrases."""
    parts = cut_chunks(small_bundle.manifest, small_bundle.manifest.chunk(80), clips["librivox-sense-0880"])
    backend, phrases = make_gpu_backend(small_bundle, HostDevice(), capacity=3), phrases_of(small_bundle, 9)
    found = []
    for busy in (False, True):
        backend.reset(np.arange(3))
        backend.set_phrases(0, phrases_of(small_bundle, 1) if busy else None)
        backend.set_phrases(1, phrases)
        tokens = []
        for turn, part in enumerate(parts):
            if busy:
                backend.set_phrases(2 * (turn % 2), phrases_of(small_bundle, turn) if turn % 3 else None)
            tokens.append(step(backend, small_bundle, part, 1, 80))
        found.append(tokens)
    assert found[0] == found[1]
