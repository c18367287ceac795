"""What is done to a slot between steps: saved and restored, made to forget, given phrases; on every backend."""

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


def on_gpu(bundle: Bundle, device: Any, capacity: int = 3, loop: str = "while") -> GpuBackend:
    encoders = {ms: OrtEncoder(bundle, bundle.manifest.chunk(ms), device) for ms in (80, 560)}
    return GpuBackend(bundle, device, encoders, capacity=capacity, loop=loop)


@pytest.fixture(
    params=["cpu", pytest.param("kernels", marks=needs_compiler), pytest.param("gpu", marks=pytest.mark.gpu)]
)
def make(request: pytest.FixtureRequest, small_bundle: Bundle) -> Any:
    """Makes a backend for so many streams."""
    if request.param == "cpu":
        return lambda capacity: OrtBackend(small_bundle, capacity=capacity, threads=1)
    if request.param == "kernels":
        return lambda capacity: on_gpu(small_bundle, HostDevice(), capacity)
    from nemostream.errors import BackendError
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    try:
        CudaDevice().close()
    except BackendError as error:
        pytest.skip(str(error))
    return lambda capacity: on_gpu(small_bundle, CudaDevice(), capacity)


def phrases_of(bundle: Bundle, seed: int = 0) -> Boosting:
    """So heavy that whatever is said is of them."""
    rng, vocabulary = np.random.default_rng(seed), bundle.manifest.decoder.vocabulary
    few = rng.choice(vocabulary, 8, replace=False)
    return Boosting([(rng.choice(few, rng.integers(1, 6)).tolist(), 50.0) for _ in range(30)], vocabulary)


def step(backend: Backend, bundle: Bundle, part: tuple[np.ndarray, int], slot: int, ms: int) -> list[tuple[Any, ...]]:
    """One chunk of one stream: its tokens, with all that is said of them, to the bit."""
    batch = Batch(bundle.manifest.chunk(ms), np.array([slot]), part[0][None], np.array([part[1]]))
    got = backend.submit(batch).result()
    assert not got.failed[0]
    return list(
        zip(*(array[0].tolist() for array in (got.tokens, got.frames, got.scores, got.sum_p_alpha)), strict=True)
    )


@pytest.mark.parametrize("boosted", [False, True])
def test_a_stream_goes_on_elsewhere(
    boosted: bool, make: Any, small_bundle: Bundle, clips: Any, cut_chunks: Any
) -> None:
    """Cut anywhere, on in another slot or in another backend of another size: the same to the bit."""
    parts = cut_chunks(small_bundle.manifest, small_bundle.manifest.chunk(80), clips["librivox-sense-0870"][:64000])
    phrases = phrases_of(small_bundle) if boosted else None
    here, there = make(3), make(2)
    here.reset(np.arange(3))
    here.set_phrases(1, phrases)
    whole, saved = [], []
    for part in parts:
        saved.append(here.save(1))
        whole.append(step(here, small_bundle, part, 1, 80))
    assert sum(map(len, whole)) > 4
    if boosted:
        assert any(state["node"] != 0 for state in saved)
    last = here.save(1)
    for cut in (0, 7, len(parts) // 2, len(parts) - 1):
        for backend, slot in ((here, 2), (there, 0)):
            backend.reset(np.array([slot]))
            step(backend, small_bundle, parts[-2], slot, 80)  # whatever was there before
            backend.set_phrases(slot, phrases)
            backend.load(slot, saved[cut])
            assert [step(backend, small_bundle, part, slot, 80) for part in parts[cut:]] == whole[cut:]
            end = backend.save(slot)
            assert end.keys() == last.keys()
            assert all(end[name].tobytes() == last[name].tobytes() for name in last)


def test_a_saved_state_is_a_copy(make: Any, small_bundle: Bundle, clips: Any, cut_chunks: Any) -> None:
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


def test_a_state_that_does_not_fit(make: Any, small_bundle: Bundle) -> None:
    backend = make(2)
    backend.reset(np.arange(2))
    good = backend.save(0)
    kept = {name: array.tobytes() for name, array in backend.save(1).items()}
    bad = {
        "k do": {**good, "k": good["k"][:, :-1], "v": good["v"].astype(np.float64)},
        "mel_cache does": {name: array for name, array in good.items() if name != "mel_cache"},
        "more does": {**good, "more": good["h"]},
        "position does": {**good, "position": good["position"][None]},
    }
    for words, state in bad.items():
        with pytest.raises(
            OptionError, match=f"another model, or from another kind .*{words.split()[0]}.* {words.split()[1]} not"
        ):
            backend.load(1, state)
    backend.set_phrases(0, phrases_of(small_bundle))
    with pytest.raises(OptionError, match="the saved state has other phrases"):
        backend.load(1, backend.save(0))
    with pytest.raises(OptionError, match="the saved state has other phrases"):
        backend.load(0, good)
    backend.set_phrases(1, phrases_of(small_bundle, seed=1))
    with pytest.raises(OptionError, match="the saved state has other phrases"):
        backend.load(1, backend.save(0))
    backend.set_phrases(1, None)
    assert {name: array.tobytes() for name, array in backend.save(1).items()} == kept


@needs_compiler
def test_a_state_of_another_kind_of_backend(small_bundle: Bundle) -> None:
    cpu, gpu = OrtBackend(small_bundle, capacity=1), on_gpu(small_bundle, HostDevice(), 1)
    with pytest.raises(OptionError, match="another kind of backend"):
        cpu.load(0, gpu.save(0))
    with pytest.raises(OptionError, match="another kind of backend"):
        gpu.load(0, cpu.save(0))


@pytest.mark.parametrize("boosted", [False, True])
def test_forgetting_is_to_have_said_nothing(
    boosted: bool, make: Any, small_bundle: Bundle, clips: Any, cut_chunks: Any
) -> None:
    """From there on it is a stream whose encoder has heard everything, and whose decoder begins."""
    parts = cut_chunks(small_bundle.manifest, small_bundle.manifest.chunk(80), clips["librivox-sense-0870"][:64000])
    phrases, slots, said, remembered = phrases_of(small_bundle) if boosted else None, np.array([0]), 0, 0
    chunk = small_bundle.manifest.chunk(80)
    backend, fresh = make(1), make(1)
    for cut in (5, 20):
        for one in (backend, fresh):
            one.reset(slots)
            one.set_phrases(0, phrases)
        for samples, length in parts[:cut]:
            fresh.encode(Batch(chunk, slots, samples[None], np.array([length])))
            step(backend, small_bundle, (samples, length), 0, 80)
        kept = backend.save(0)
        backend.reset_decoder(slots)
        got = [step(backend, small_bundle, part, 0, 80) for part in parts[cut:]]
        assert got == [step(fresh, small_bundle, part, 0, 80) for part in parts[cut:]]
        backend.load(0, kept)
        remembered += got != [step(backend, small_bundle, part, 0, 80) for part in parts[cut:]]
        said += sum(map(len, got))
    assert said > 4
    assert remembered, "had it not forgotten, it would have gone on otherwise"


def test_phrases_from_the_next_step_on(make: Any, small_bundle: Bundle, clips: Any, cut_chunks: Any) -> None:
    """Given, changed, taken away; a reset takes them too."""
    parts = cut_chunks(small_bundle.manifest, small_bundle.manifest.chunk(560), clips["librivox-sense-0870"])
    one, other = phrases_of(small_bundle, 0), phrases_of(small_bundle, 1)

    def run(backend: Backend, boosts: list[Boosting | None]) -> list[Any]:
        said = []
        for part, boosting in zip(parts, boosts, strict=True):
            backend.set_phrases(1, boosting)
            said.append(step(backend, small_bundle, part, 1, 560))
        return said

    backend, found = make(2), []
    for boosts in ([None, one, other], [None, None, None], [None, one, None]):
        backend.reset(np.array([0, 1]))
        found.append(run(backend, [boosts[min(at // 3, 2)] for at in range(len(parts))]))
    changed, plain, back = found
    assert changed[:3] == plain[:3] == back[:3]
    assert changed[3:6] == back[3:6] != plain[3:6]
    assert changed[6:] != back[6:]
    backend.set_phrases(1, one)
    backend.reset(np.array([0, 1]))
    assert [step(backend, small_bundle, part, 1, 560) for part in parts] == plain


# -- the kernels' own --------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("loop", LOOPS)
def test_a_step_under_way_does_not_notice(loop: str, small_bundle: Bundle, clips: Any, cut_chunks: Any) -> None:
    """Everything is done in the order in which it was asked for, also where the host has a part in the loop."""
    parts = cut_chunks(small_bundle.manifest, small_bundle.manifest.chunk(560), clips["librivox-sense-0870"])[:8]
    ours, cpu, chunk = (
        on_gpu(small_bundle, HostDevice(), loop=loop),
        OrtBackend(small_bundle, 3),
        small_bundle.manifest.chunk(560),
    )
    assert ours.loop == loop
    cpu.reset(np.arange(3))
    pending, wanted, saved = [], [], [[], []]
    for turn, (samples, length) in enumerate(parts):
        batch = Batch(chunk, np.array([0, 2]), np.stack([samples, samples]), np.array([length, length]))
        pending.append(ours.submit(batch))
        wanted.append(cpu.submit(batch).result())
        for backend, states in zip((ours, cpu), saved, strict=True):
            if turn % 4 == 1:
                states.append(backend.save(2))
            backend.set_phrases(0, phrases_of(small_bundle, turn))
            if turn % 3 == 2:
                backend.reset_decoder(np.array([0, 2]))
            if turn % 4 == 3:
                backend.load(2, states[-1])
        for step in pending[:-1]:
            step.result()
    said = 0
    for step, theirs in zip(pending, wanted, strict=True):
        assert [row.tolist() for row in step.result().tokens] == [row.tolist() for row in theirs.tokens]
        said += sum(map(len, theirs.tokens))
    assert said > 20


@needs_compiler
def test_the_pool_of_phrases(small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists are shared, kept as long as a slot has them, and refused when there is no room."""
    lists = [phrases_of(small_bundle, seed) for seed in range(4)]
    sizes = [4 * (2 + 5 * len(phrases)) for phrases in lists]
    room = max(sizes[0] + sizes[1], sizes[0] + sizes[2], sizes[2] + sizes[1]) + 16
    monkeypatch.setattr(arena, "PHRASE_POOL_BYTES", room)
    backend = on_gpu(small_bundle, HostDevice(), capacity=4)
    backend.set_phrases(0, lists[0])
    backend.set_phrases(1, lists[0])
    backend.set_phrases(2, phrases_of(small_bundle, 0))  # the same phrases, another time
    backend.set_phrases(3, lists[1])
    assert len(backend.arena._pool) == 2
    with pytest.raises(
        CapacityError, match=rf"need {sizes[2]} bytes of the {room} .* {sizes[0] + sizes[1]} are in use"
    ):
        backend.set_phrases(3, lists[2])
    assert np.array_equal(backend.save(3)["phrases"], lists[1].digest)
    backend.set_phrases(0, None)
    backend.reset(np.array([1]))
    with pytest.raises(CapacityError):
        backend.set_phrases(3, lists[2])  # slot 2 has the first still
    backend.set_phrases(2, None)
    backend.set_phrases(2, lists[2])
    assert len(backend.arena._pool) == 2
    for slot in (2, 3):
        backend.set_phrases(slot, None)
    assert not backend.arena._pool and not backend.arena._users and not backend.arena._phrases


@needs_compiler
def test_other_phrases_do_not_move_those_that_are_there(small_bundle: Bundle, clips: Any, cut_chunks: Any) -> None:
    """Lists come and go around a stream that keeps its own."""
    parts = cut_chunks(small_bundle.manifest, small_bundle.manifest.chunk(80), clips["librivox-sense-0880"])
    backend, mine = on_gpu(small_bundle, HostDevice(), capacity=3), phrases_of(small_bundle, 9)
    found = []
    for busy in (False, True):
        backend.reset(np.arange(3))
        backend.set_phrases(0, phrases_of(small_bundle, 1) if busy else None)
        backend.set_phrases(1, mine)
        said = []
        for turn, part in enumerate(parts):
            if busy:
                backend.set_phrases(2 * (turn % 2), phrases_of(small_bundle, turn) if turn % 3 else None)
            said.append(step(backend, small_bundle, part, 1, 80))
        found.append(said)
    assert found[0] == found[1]
