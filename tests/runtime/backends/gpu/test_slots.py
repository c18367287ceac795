"""Slot operations between steps on every backend: save, load, decoder reset, phrases."""

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
def make(request: pytest.FixtureRequest, talker: Bundle) -> Any:
    """Return a function that creates a backend with the given capacity."""
    if request.param == "cpu":
        return lambda capacity: OrtBackend(talker, capacity=capacity, threads=1)
    if request.param == "kernels":
        return lambda capacity: make_gpu_backend(talker, HostDevice(), capacity)
    from nemostream.errors import BackendError
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    try:
        CudaDevice().close()
    except BackendError as error:
        pytest.skip(str(error))
    return lambda capacity: make_gpu_backend(talker, CudaDevice(), capacity)


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
    boosted: bool, make: Any, talker: Bundle, clips: Any, cut_chunks: Any
) -> None:
    """From any chunk on, in another slot or in a backend of another capacity: equal bit for bit."""
    parts = cut_chunks(talker.manifest, talker.manifest.chunk(80), clips["librivox-sense-0870"][:64000])
    phrases = phrases_of(talker) if boosted else None
    first, second = make(3), make(2)
    first.reset(np.arange(3))
    first.set_phrases(1, phrases)
    whole, saved = [], []
    for part in parts:
        saved.append(first.save(1))
        whole.append(step(first, talker, part, 1, 80))
    assert sum(map(len, whole)) > 4
    if boosted:
        assert any(state["node"] != 0 for state in saved)
    last = first.save(1)
    for cut in (0, 7, len(parts) // 2, len(parts) - 1):
        for backend, slot in ((first, 2), (second, 0)):
            backend.reset(np.array([slot]))
            step(backend, talker, parts[-2], slot, 80)  # leaves other state in the slot
            backend.set_phrases(slot, phrases)
            backend.load(slot, saved[cut])
            assert [step(backend, talker, part, slot, 80) for part in parts[cut:]] == whole[cut:]
            end = backend.save(slot)
            assert end.keys() == last.keys()
            assert all(end[name].tobytes() == last[name].tobytes() for name in last)


def test_saved_state_is_a_copy(make: Any, talker: Bundle, clips: Any, cut_chunks: Any) -> None:
    parts = cut_chunks(talker.manifest, talker.manifest.chunk(80), clips["cards-001"])
    backend = make(2)
    backend.reset(np.arange(2))
    step(backend, talker, parts[0], 0, 80)
    saved = backend.save(0)
    before = {name: array.tobytes() for name, array in saved.items()}
    step(backend, talker, parts[1], 0, 80)
    backend.load(1, saved)
    step(backend, talker, parts[2], 1, 80)
    assert {name: array.tobytes() for name, array in saved.items()} == before


def test_incompatible_state(make: Any, talker: Bundle) -> None:
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
    backend.set_phrases(0, phrases_of(talker))
    with pytest.raises(OptionError, match="the saved state has other phrases"):
        backend.load(1, backend.save(0))
    with pytest.raises(OptionError, match="the saved state has other phrases"):
        backend.load(0, valid)
    backend.set_phrases(1, phrases_of(talker, seed=1))
    with pytest.raises(OptionError, match="the saved state has other phrases"):
        backend.load(1, backend.save(0))
    backend.set_phrases(1, None)
    assert {name: array.tobytes() for name, array in backend.save(1).items()} == before


@needs_compiler
def test_state_of_another_kind_of_backend(talker: Bundle) -> None:
    cpu, gpu = OrtBackend(talker, capacity=1), make_gpu_backend(talker, HostDevice(), 1)
    with pytest.raises(OptionError, match="another kind of backend"):
        cpu.load(0, gpu.save(0))
    with pytest.raises(OptionError, match="another kind of backend"):
        gpu.load(0, cpu.save(0))


@pytest.mark.parametrize("boosted", [False, True])
def test_reset_decoder(boosted: bool, make: Any, talker: Bundle, clips: Any, cut_chunks: Any) -> None:
    """The encoder keeps its state, the decoder starts from its initial state."""
    parts = cut_chunks(talker.manifest, talker.manifest.chunk(80), clips["librivox-sense-0870"][:64000])
    phrases, slots, emitted, different = phrases_of(talker) if boosted else None, np.array([0]), 0, 0
    chunk = talker.manifest.chunk(80)
    backend, expected = make(1), make(1)
    for cut in (5, 20):
        for each in (backend, expected):
            each.reset(slots)
            each.set_phrases(0, phrases)
        for samples, length in parts[:cut]:
            expected.encode(Batch(chunk, slots, samples[None], np.array([length])))
            step(backend, talker, (samples, length), 0, 80)
        saved = backend.save(0)
        backend.reset_decoder(slots)
        got = [step(backend, talker, part, 0, 80) for part in parts[cut:]]
        assert got == [step(expected, talker, part, 0, 80) for part in parts[cut:]]
        backend.load(0, saved)
        different += got != [step(backend, talker, part, 0, 80) for part in parts[cut:]]
        emitted += sum(map(len, got))
    assert emitted > 4
    assert different, "without the reset, other tokens are emitted"


def test_set_phrases_applies_from_the_next_step(make: Any, talker: Bundle, clips: Any, cut_chunks: Any) -> None:
    """Phrases are set, changed and removed; a reset removes them too."""
    parts = cut_chunks(talker.manifest, talker.manifest.chunk(560), clips["librivox-sense-0870"])
    first, second = phrases_of(talker, 0), phrases_of(talker, 1)

    def run(backend: Backend, phrases: list[Boosting | None]) -> list[Any]:
        tokens = []
        for part, current in zip(parts, phrases, strict=True):
            backend.set_phrases(1, current)
            tokens.append(step(backend, talker, part, 1, 560))
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
    assert [step(backend, talker, part, 1, 560) for part in parts] == plain


# -- GPU backend only --------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("loop", LOOPS)
def test_pending_steps_are_not_affected(loop: str, talker: Bundle, clips: Any, cut_chunks: Any) -> None:
    """Operations take effect in the order of the calls, also if the host takes part in the decoding loop."""
    parts = cut_chunks(talker.manifest, talker.manifest.chunk(560), clips["librivox-sense-0870"])[:8]
    gpu, cpu, chunk = (
        make_gpu_backend(talker, HostDevice(), loop=loop),
        OrtBackend(talker, 3),
        talker.manifest.chunk(560),
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
            backend.set_phrases(0, phrases_of(talker, turn))
            if turn % 3 == 2:
                backend.reset_decoder(np.array([0, 2]))
            if turn % 4 == 3:
                backend.load(2, states[-1])
        for step in pending[:-1]:
            step.result()
    emitted = 0
    for step, expected in zip(pending, wanted, strict=True):
        assert [row.tolist() for row in step.result().tokens] == [row.tolist() for row in expected.tokens]
        emitted += sum(map(len, expected.tokens))
    assert emitted > 20


@needs_compiler
def test_phrase_pool(talker: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal lists are shared and kept as long as a slot uses them; a list without room raises an error."""
    lists = [phrases_of(talker, seed) for seed in range(4)]
    sizes = [4 * (2 + 5 * len(phrases)) for phrases in lists]
    size = max(sizes[0] + sizes[1], sizes[0] + sizes[2], sizes[2] + sizes[1]) + 16
    monkeypatch.setattr(arena, "PHRASE_POOL_BYTES", size)
    backend = make_gpu_backend(talker, HostDevice(), capacity=4)
    backend.set_phrases(0, lists[0])
    backend.set_phrases(1, lists[0])
    backend.set_phrases(2, phrases_of(talker, 0))  # equal phrases in another object
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
    for slot in (2, 3):
        backend.set_phrases(slot, None)
    assert not backend.arena._pool and not backend.arena._users and not backend.arena._phrases


@needs_compiler
def test_pool_changes_do_not_affect_other_phrases(talker: Bundle, clips: Any, cut_chunks: Any) -> None:
    """Lists of other streams are added and removed while a stream keeps its phrases."""
    parts = cut_chunks(talker.manifest, talker.manifest.chunk(80), clips["librivox-sense-0880"])
    backend, phrases = make_gpu_backend(talker, HostDevice(), capacity=3), phrases_of(talker, 9)
    found = []
    for busy in (False, True):
        backend.reset(np.arange(3))
        backend.set_phrases(0, phrases_of(talker, 1) if busy else None)
        backend.set_phrases(1, phrases)
        tokens = []
        for turn, part in enumerate(parts):
            if busy:
                backend.set_phrases(2 * (turn % 2), phrases_of(talker, turn) if turn % 3 else None)
            tokens.append(step(backend, talker, part, 1, 80))
        found.append(tokens)
    assert found[0] == found[1]
