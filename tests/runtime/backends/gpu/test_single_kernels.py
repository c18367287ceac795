"""Each kernel alone, compared with numpy: every byte of memory after a launch, in several orders of threads and blocks.

Weights and activations of the products are small integers, so that logits are exact in every type and often equal.
The sizes include those of the published models: vocabularies of 1,025 and 13,088 logits, 640 hidden and joint units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda_on_cpu import MISSING
from decoding_model import sigmoid
from kernel_runner import ORDERS, KernelRunner, manifest

from nemostream.runtime.backends.gpu import kernels
from nemostream.runtime.decoding.boosting import MAX_TOKENS, Boosting
from nemostream.runtime.decoding.greedy import ALPHA

pytestmark = pytest.mark.skipif(MISSING, reason="needs g++ to run the kernels on a CPU")

# Layers, d_model, heads, cache frames. A ring of the first two is 4 and 8.75 times the units that a round of `gather`
# copies, that of the third 3.5 times; the layers of the last are padded.
LARGE, SHORT, PADDED = (2, 1024, 8, 70), (2, 1024, 8, 56), (3, 176, 4, 7)


# -- input and state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer", [0, 1])
@pytest.mark.parametrize("blocks", [1, 3])
def test_begin(buffer: int, blocks: int) -> None:
    # With this window, and so this lead, a full chunk has samples of one frame more than it computes.
    run = KernelRunner(manifest(window=800), slots=9, rows=7, seed=buffer)
    spec, frames = run.manifest, run.frames
    hop, factor = spec.features.hop, spec.encoder.subsampling
    slots = np.array([4, -1, 0, 8, 3, 1, 5])
    run["position"] = [0, 1 << 40, 0, 5, 2, 3, 0, 0, 7]
    run["slot_automaton"] = np.arange(9) * 10 - 1
    run["control"] = [3, 4, 5, 6, buffer, 7, 8, 9, 10]
    host = run.host("host_input", buffer)
    # A stream's first chunk, its last one with all frames, a part of them, and none; lengths above and below zero.
    part = spec.lead + hop * factor  # of three frames, the last two of which have samples
    lengths = [run.samples, run.samples, 100, 0, part, run.samples - 3 * hop, spec.lead + 1]
    host["slots"][:7], host["lengths"][:7], host["prompts"][:7] = slots, lengths, np.arange(7) + 3
    host["audio"][:] = np.random.default_rng(0).standard_normal(host["audio"].shape)

    def expected() -> None:
        for row, slot in enumerate(slots):
            run["row_slot"][row], run["row_length"][row], run["row_prompt"][row] = slot, lengths[row], row + 3
            position = 0 if slot < 0 else int(run["position"][slot])
            run["row_position"][row] = position
            run["row_automaton"][row] = -1 if slot < 0 else run["slot_automaton"][slot]
            received = position * hop * factor - spec.lead + lengths[row]
            valid = received // hop - factor * (position - 2)
            run["row_valid"][row] = 0 if slot < 0 else min(valid, factor + 1 + factor * frames)
            count = spec.encoder_frames(received) - position
            run["row_count"][row] = 0 if slot < 0 else max(0, min(count, frames))
            if slot >= 0:
                run["waveform"][row] = np.concatenate([run["tail"][slot], host["audio"][row]])
        run["control"][[*range(4), *range(5, 9)]] = 0

    run.check("begin", run.rows, blocks, expected=expected, order=blocks)
    assert {*run["row_count"][:7].tolist()} >= {0, 1, 2, 3}


def test_features() -> None:
    run = KernelRunner(manifest(mels=20), rows=4, frames=1)
    spec = run.manifest.features
    rng = np.random.default_rng(1)
    run.set_slots([2, -1, 0, 4])
    run["row_length"][:4] = run.samples, 5, 700, 0
    run["filter_bins"][:] = [[first, first + 1 + 12 * (first % 3)] for first in (*range(0, 247, 13), 256)]
    run["filter_bins"][5], run["filter_bins"][19] = 0, [250, 257]
    run["filters"][:] = rng.random(run["filters"].shape)
    run["guard"][:] = 2.0**-24
    angles = -2 * np.pi * np.arange(256) / 512
    run["twiddles"][:] = np.stack([np.cos(angles), np.sin(angles)], axis=1)

    def expected() -> None:
        for row in (0, 2, 3):
            wave = run["waveform"][row].astype(np.float64)
            emphasised = wave[1:] - spec.preemphasis * wave[:-1]
            emphasised[spec.tail - 1 + run["row_length"][row] :] = 0
            for frame in range(8):
                power = np.abs(np.fft.rfft(emphasised[spec.hop * frame :][: spec.window - 2] * run["window"], 512)) ** 2
                for mel, (first, end) in enumerate(run["filter_bins"]):
                    total = (power[first:end] * run["filters"][first:end, mel]).sum()
                    run["mel"][row, frame, mel] = np.log(total + run["guard"][0])

    start = run.copy()
    for order in ORDERS:
        run.restore(start)
        run.check("features", 8, run.rows, expected=expected, close={"mel": 1e-6}, order=order)


@pytest.mark.parametrize(
    ("encoder", "cache_dtype"), [(LARGE, "float32"), (LARGE, "float16"), (SHORT, "bfloat16"), (PADDED, "float32")]
)
def test_gather_scatter_and_reset(encoder: tuple[int, int, int, int], cache_dtype: str) -> None:
    """Rings of every position: empty, at each offset of the write position, wrapped around, beyond 32 bits."""
    run = KernelRunner(manifest(encoder), cache_dtype, slots=5, rows=4, frames=3)
    layers, _, _, cache = encoder
    slots = [3, -1, 4, 0]
    run.set_slots(slots)
    run["row_position"][:4] = 0, 9, cache - 1, (1 << 40) + 5
    active = [(row, slot) for row, slot in enumerate(slots) if slot >= 0]

    def gathered(in_place: bool) -> Callable[[], None]:
        def expected() -> None:
            for row, slot in active:
                run["row_mel_cache"][row] = run["mel_cache"][slot]
                for name in () if in_place else ("k", "v", "conv"):
                    run[f"row_{name}"][:, row] = run[name][:, slot]

        return expected

    def scattered() -> None:
        for row, slot in active:
            position = int(run["row_position"][row])
            for frame in range(run.frames):
                run["k"][:, slot, :, (position + frame) % cache] = run["k_new"][:, row, :, frame]
                run["v"][:, slot, :, (position + frame) % cache] = run["v_new"][:, row, :, frame]
            run["conv"][:, slot], run["mel_cache"][slot] = run["conv_next"][:, row], run["mel_cache_next"][row]
            run["tail"][slot] = run["waveform"][row, run.samples :]
            run["position"][slot] = position + run.frames

    def reset() -> None:
        for slot in (4, 1, 3):
            for name in ("k", "v", "conv"):
                run[name][:, slot] = 0
            run["mel_cache"][slot], run["tail"][slot], run["position"][slot] = 0, 0, 0
            run["slot_automaton"][slot] = -1
            start_decoder(slot)

    def start_decoder(slot: int) -> None:
        for name in ("predicted", "h", "c"):
            run[name][slot] = run[f"start_{name}"]
        run["node"][slot] = 0

    order = len(cache_dtype)
    start = run.copy()
    for in_place in (True, False):
        run.restore(start)
        run.check("gather", 4, layers, kernels.GATHER_BLOCKS, expected=gathered(in_place), in_place=in_place)
    run.check("scatter", 4, layers, expected=scattered, order=order)
    run["reset_slots"][:3] = 4, 1, 3
    run.check("reset", 3, layers, expected=reset, order=order)
    run.check("reset_decoder", 1, expected=lambda: start_decoder(2), slot=2)


@pytest.mark.parametrize(
    ("encoder", "cache_dtype"), [(LARGE, "float32"), (LARGE, "float16"), (SHORT, "bfloat16"), (PADDED, "float32")]
)
@pytest.mark.parametrize("order", ORDERS)
def test_copy(encoder: tuple[int, int, int, int], cache_dtype: str, order: int) -> None:
    """A source of several targets, slots in any order; entries of the lists beyond the grid are not read."""
    run = KernelRunner(manifest(encoder), cache_dtype, slots=7, rows=2)
    pairs = [(5, 0), (1, 6), (5, 3)]
    sources, targets = np.zeros((2, kernels.COPY_SLOTS), np.int32)
    sources[:3], targets[:3] = zip(*pairs, strict=True)
    sources[3:], targets[3:] = 2, 4

    def expected() -> None:
        for source, target in pairs:
            for name in ("k", "v", "conv"):
                run[name][:, target] = run[name][:, source]
            for name in (*run.layout.slot().keys() - {"k", "v", "conv"}, "slot_automaton"):
                run[name][target] = run[name][source]

    grid = (3, encoder[0], kernels.GATHER_BLOCKS)
    run.check("copy", *grid, expected=expected, order=order, sources=sources, targets=targets)


@pytest.mark.parametrize("hidden", [640, 2048])
def test_copy_of_a_large_decoder(hidden: int) -> None:
    """A launch has 2,048 threads for each slot and layer; the larger state has more elements."""
    run = KernelRunner(manifest(decoder={"hidden": hidden, "joint": 640}), slots=3, rows=2)
    slots = np.full((2, kernels.COPY_SLOTS), [[2], [1]])

    def expected() -> None:
        for name in ("k", "v", "conv"):
            run[name][:, 1] = run[name][:, 2]
        for name in (*run.layout.slot().keys() - {"k", "v", "conv"}, "slot_automaton"):
            run[name][1] = run[name][2]

    run.check("copy", 1, 2, kernels.GATHER_BLOCKS, expected=expected, sources=slots[0], targets=slots[1])


def test_reset_of_a_published_decoder() -> None:
    """Its state has more elements than a block has threads."""
    run = KernelRunner(manifest(decoder={"hidden": 640, "joint": 640}), slots=3, rows=2)

    def expected() -> None:
        for name in ("predicted", "h", "c"):
            run[name][1] = run[f"start_{name}"]
        run["node"][1] = 0

    run.check("reset_decoder", 1, expected=expected, slot=1)


def test_set_phrases() -> None:
    run = KernelRunner(manifest())

    def expected() -> None:
        run["slot_automaton"][4], run["node"][4] = 77, 0

    run.check("set_phrases", 1, expected=expected, slot=4, automaton=77)


# -- decoding ----------------------------------------------------------------------------------------------------------

# Logits with blank. The first has less than a tile, the second two tiles, the others are those of published models; the
# number of tiles of both, 33 and 409, is above 32.
VOCABULARIES = (21, 64, 1025, 13088)


def small_integers(rng: np.random.Generator, shape: tuple[int, ...], largest: int = 2) -> np.ndarray:
    return rng.integers(-largest, largest + 1, shape).astype(np.float32)


def pack_into(run: KernelRunner, name: str, matrix: np.ndarray) -> None:
    run[name] = kernels.pack(matrix, run.cache_dtype)


def list_pairs(run: KernelRunner, parity: int, rows: dict[int, tuple[int, int]]) -> list[tuple[int, int]]:
    """List the frames `begin` to `end` of rows, in this order, and return the pairs."""
    pairs = []
    for entry, (row, (begin, end)) in enumerate(rows.items()):
        run["list_rows"][parity, entry], run["list_first"][parity, entry] = row, len(pairs)
        run["row_frame"][row], run["row_end"][row] = begin, end
        pairs += [(row, frame) for frame in range(begin, end)]
    run["list_pairs"][parity, : len(pairs)] = [row * run.frames + frame for row, frame in pairs]
    run["control"][:] = [6 + parity, 0, 3, 0, 0, 0, 0, 0, 0]
    run["control"][5 + parity], run["control"][7 + parity] = len(pairs), len(rows)
    return pairs


def tile_results(logits: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the elements of `partial` and `boosted` [tiles, 4] for the logits of a pair."""
    partial, boosted = [], []
    for first in range(0, len(logits), kernels.TILE_COLUMNS):
        part = logits[first : first + kernels.TILE_COLUMNS]
        known = np.where(np.isnan(part), -np.inf, part)
        best = known.max()
        with np.errstate(invalid="ignore"):
            shifted = (part - best)[part > -np.inf]
        sums = np.exp(shifted).sum(), np.exp(ALPHA * shifted).sum()
        id_ = first + int(known.argmax())
        partial.append([np.inf if np.isnan(part).any() else best, np.int32(id_).view(np.float32), *sums])
        if bias is not None:
            biased = np.full(len(part), -np.inf)
            end = min(len(part), len(bias) - first)
            biased[:end] = known[:end] + bias[first : first + end]
            id_ = int(biased.argmax())
            boosted.append([biased[id_], np.int32(first + id_).view(np.float32), part[id_], 0])
    return np.array(partial, np.float32), np.array(boosted, np.float32)


def join_reference(run: KernelRunner, weight: np.ndarray, pairs: list[tuple[int, int]], parity: int) -> None:
    for index, (row, frame) in enumerate(pairs):
        x = run["encoded"][row, frame] + run["predicted"][run["row_slot"][row]]
        x = {"relu": lambda x: np.where(x < 0, 0, x), "sigmoid": sigmoid, "tanh": np.tanh}[
            run.manifest.decoder.activation
        ](x)
        logits = x.astype(np.float64) @ weight.astype(np.float64) + run["joint_bias"]
        phrases = run["row_automaton"][row] >= 0
        partial, boosted = tile_results(logits.astype(np.float32), run["bias"][row] if phrases else None)
        run["partial"][index] = partial
        if phrases:
            run["boosted"][index] = boosted
    run["control"][[6 - parity, 8 - parity, 3]] = 0


def ids_of(array: np.ndarray) -> np.ndarray:
    """Return the ids in `partial` or `boosted`."""
    return np.ascontiguousarray(array[..., 1]).view(np.int32)


@pytest.mark.parametrize(
    ("vocabulary", "hidden", "joint", "cache_dtype", "rows"),
    [
        (21, 16, 41, "float32", 9),  # rows of the joint are not aligned to 16 bytes
        (64, 16, 515, "float16", 3),  # just above what is staged at once
        (1025, 640, 640, "float32", 9),
        (1025, 640, 640, "bfloat16", 3),
        (13088, 640, 640, "float16", 1),
        (13088, 640, 640, "float32", 1),
    ],
)
def test_join(vocabulary: int, hidden: int, joint: int, cache_dtype: str, rows: int) -> None:
    """More pairs than the grid; equal logits within a tile; NaN and infinity at each place of a tile."""
    spec = manifest(decoder={"hidden": hidden, "joint": joint, "vocabulary": vocabulary - 1})
    run = KernelRunner(spec, cache_dtype, rows=rows, slots=rows + 2, frames=4)
    rng, parity = np.random.default_rng(vocabulary), rows % 2
    weight = small_integers(rng, (joint, vocabulary), 1)
    pack_into(run, "joint_weight", weight)
    run["encoded"], run["predicted"] = (small_integers(rng, run[name].shape, 3) for name in ("encoded", "predicted"))
    run["joint_bias"], run["bias"] = small_integers(rng, (vocabulary,), 40), small_integers(rng, run["bias"].shape, 30)
    run["row_automaton"][:rows:2] = 5
    ends = {row: (row % 2, 4 - row % 3) for row in reversed(range(rows))}
    pairs = list_pairs(run, parity, ends)
    start = run.copy()
    close = {"partial": 1e-5, "boosted": 0.0}
    orders = {21: ORDERS, 64: ORDERS[2:], 1025: (0, 3)}.get(vocabulary, (3,))
    for order in orders:
        blocks = 2 if order == 1 else 1
        run.restore(start)
        run.check(
            "join",
            blocks,
            kernels.tiles(vocabulary),
            expected=lambda: join_reference(run, weight, pairs, parity),
            close=close,
            order=order,
        )
    assert vocabulary < 100 or {*run["partial"][: len(pairs), :, 0].argmax(axis=1)} - {0}, "labels of several tiles"


@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_join_with_logits_that_are_not_finite(value: float, cache_dtype: str) -> None:
    """At the first and last logit and at the edges of each tile."""
    run = KernelRunner(manifest(decoder={"vocabulary": 100}), cache_dtype, rows=2, slots=2, frames=2)
    rng = np.random.default_rng(3)
    weight = small_integers(rng, (40, 101), 1)
    pack_into(run, "joint_weight", weight)
    run["encoded"], run["predicted"] = (small_integers(rng, run[name].shape, 3) for name in ("encoded", "predicted"))
    run["bias"] = small_integers(rng, run["bias"].shape, 30)
    run["row_automaton"][0] = 5
    pairs = list_pairs(run, 0, {0: (0, 2), 1: (0, 1)})
    start = run.copy()
    for places in ([0], [31], [32], [63], [64], [96], [99], [100], [*range(32)], [*range(96, 101)]):
        run.restore(start)
        run["joint_bias"] = small_integers(rng, (101,), 40)
        run["joint_bias"][places] = value
        # If no logit of a tile is finite, its sums are not used.
        run.check(
            "join",
            1,
            4,
            expected=lambda: join_reference(run, weight, pairs, 0),
            close={"partial": 1e-5, "boosted": 0.0},
            order=2,
        )


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_join_with_other_activations(activation: str) -> None:
    run = KernelRunner(manifest(decoder={"activation": activation}), rows=3)
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((40, 38)).astype(np.float32)
    pack_into(run, "joint_weight", weight)
    pairs = list_pairs(run, 1, {2: (0, 3), 0: (1, 3)})
    run.check("join", 1, 2, expected=lambda: join_reference(run, weight, pairs, 1), close={"partial": 1e-5})


def wide_phrases(rng: np.random.Generator, vocabulary: int) -> Boosting:
    """Phrases with more arcs per node than a warp has threads, at several depths, and the longest failure path."""
    tokens = rng.permutation(vocabulary).tolist()
    few = tokens[:4]
    phrases = [([token], float(rng.integers(1, 9))) for token in tokens[: min(100, vocabulary - 1)]]
    phrases += [([few[0], token], float(rng.integers(1, 9))) for token in tokens[: min(50, vocabulary)]]
    phrases += [([few[1], few[0], token], float(rng.integers(1, 9))) for token in tokens[1 : min(70, vocabulary)]]
    phrases += [([few[2]] * MAX_TOKENS, 3.0), ([few[2]] * 5 + [few[0], few[3]], 2.0)]
    return Boosting(phrases, vocabulary)


def put_phrases(run: KernelRunner, phrases: dict[int, Boosting]) -> None:
    """Store the automaton of each row in the pool."""
    end = 40
    for row, each in phrases.items():
        words = kernels.automaton(each)
        run["phrase_pool"][end : end + len(words)], run["row_automaton"][row] = words, end
        end += len(words) + 24


def set_condition(run: KernelRunner, value: int) -> None:
    if run.step["looping"]:
        run["condition"][:] = value


def check_list(
    run: KernelRunner, parity: int, rows: dict[int, tuple[int, int]], start: dict[str, np.ndarray], where: str
) -> None:
    """Check that the frames `begin` to `end` of rows are listed, in any order of rows, and nothing else is written."""
    count, pairs, found = len(rows), 0, {}
    for entry in range(count):
        row, first = int(run["list_rows"][parity, entry]), int(run["list_first"][parity, entry])
        begin, end = rows[row]
        wanted = [row * run.frames + frame for frame in range(begin, end)]
        assert run["list_pairs"][parity, first : first + len(wanted)].tolist() == wanted, where
        found[row], pairs = first, pairs + len(wanted)
    assert found.keys() == rows.keys(), where
    ends = sorted((first, first + rows[row][1] - rows[row][0]) for row, first in found.items())
    assert [first for first, _ in ends] == [0, *(end for _, end in ends)][: len(ends)], where
    now = run.copy()
    run.restore(start)
    kept = {name: run[name].copy() for name in ("list_rows", "list_first", "list_pairs")}
    run.restore(now)
    for name, written in (("list_rows", count), ("list_first", count), ("list_pairs", pairs)):
        kept[name][parity, :written] = run[name][parity, :written]
        np.testing.assert_array_equal(run[name], kept[name], where)


LISTS = {"list_rows", "list_first", "list_pairs"}


@pytest.mark.parametrize("looping", [True, False])
def test_start(looping: bool) -> None:
    """Values that are not finite at each end of a row and of a block, in frames to decode and in others."""
    spec = manifest(decoder={"joint": 640, "vocabulary": 130, "hidden": 16})
    run = KernelRunner(spec, slots=14, rows=12, frames=3, looping=looping)
    rng = np.random.default_rng(0)
    flat = run["encoded"].reshape(12, -1)
    places = {1: 0, 2: 1919, 3: 255, 4: 256, 5: 0, 6: 1280, 9: 1663}  # row 5 is idle
    phrases = {row: wide_phrases(rng, 130) for row in (0, 2, 7, 8)}
    automaton = phrases[8]
    chain = automaton.next_node(0, int(automaton.token[-1]))
    deepest = int(np.flatnonzero(automaton.fail)[-1])
    for order, value in zip(ORDERS, (np.nan, np.inf, -np.inf, np.nan), strict=True):
        run.set_slots([13, 2, 4, 6, 8, -1, 0, 1, 3, 5, 7, 9])
        run["row_count"][:12] = [3, 3, 3, 2, 3, 0, 1, 0, 2, 3, 1, 3]
        run["control"] = [0, 0, 0, 0, 1, 0, 0, 0, 0]
        flat[:] = rng.standard_normal(flat.shape)
        for row, place in places.items():
            flat[row, place] = value
        put_phrases(run, phrases)
        run["node"][[13, 4, 1, 3]] = 0, 1, chain, deepest
        failed = {row for row in places if row != 5}
        listed = {row: (0, int(run["row_count"][row])) for row in (0, 8, 10, 11)}
        start = run.copy()

        def expected(failed: set[int] = failed) -> None:
            for row in range(12):
                run["row_failed"][row], run["row_frame"][row], run["row_symbols"][row] = row in failed, 0, 0
                run["row_end"][row] = 0 if row in failed else run["row_count"][row]
                run["row_label_frame"][row] = -1
            for row, each in phrases.items():
                run["bias"][row] = each.bias(int(run["node"][run["row_slot"][row]]))
            run["control"][[5, 7]] = 3 + 2 + 1 + 3, 4
            set_condition(run, 1)

        run.check("start", 12, expected=expected, unordered=LISTS, order=order)
        check_list(run, 0, listed, start, f"order {order}")
    run["row_count"][:12] = 0
    run["control"] = 0
    run.check("start", 12, expected=lambda: (expected_without_frames(run, failed), set_condition(run, 0)))


def expected_without_frames(run: KernelRunner, failed: set[int]) -> None:
    for row in range(run.rows):
        run["row_failed"][row], run["row_end"][row] = row in failed, 0


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_decide(vocabulary: int) -> None:
    """Equal tiles, values that are not finite in each tile, phrases, limits of labels, more rows than the grid."""
    spec = manifest(decoder={"vocabulary": vocabulary - 1})
    run = KernelRunner(spec, slots=40, rows=37, frames=4, seed=vocabulary)
    rng, parity, blank = np.random.default_rng(vocabulary), vocabulary % 2, vocabulary - 1
    tiles, lists = kernels.tiles(vocabulary), [wide_phrases(rng, vocabulary - 1) for _ in range(3)]
    outcomes: set[str] = set()
    for order in ORDERS:
        run.set_slots(rng.permutation(40)[:37])
        rows = {
            int(row): (int(begin), 4)
            for row, begin in zip(rng.permutation(37)[:35], rng.integers(0, 4, 35), strict=True)
        }
        pairs = list_pairs(run, parity, rows)
        phrases = {row: lists[row % 3] for row in rows if row % 4 == 1}
        put_phrases(run, phrases)
        for row, each in phrases.items():
            run["node"][run["row_slot"][row]] = rng.integers(len(each)) if rng.random() < 0.7 else 0
        run["row_failed"] = 0
        run["row_label_frame"][:], run["row_symbols"][:] = rng.integers(-1, 4, 40), rng.integers(0, 4, 40)
        run["row_position"][:] = rng.integers(0, 1 << 20, 40)
        for index in range(len(pairs)):
            fill_tiles(rng, run["partial"][index], vocabulary)
            fill_tiles(rng, run["boosted"][index], vocabulary - 1)
            run["boosted"][index, :, 2] = rng.integers(-9, 3, tiles)
            if rng.random() < 0.6:  # blank
                run["partial"][index, -1, 0] = 4
                run["partial"][index, -1, 1] = np.int32(blank).view(np.float32)
            elif rng.random() < 0.15:
                place = rng.choice([tile for tile in (0, 1, 31, 32, 33, tiles - 1) if tile < tiles])
                run["partial"][index, place, 0] = np.inf  # as `join` writes for NaN
        start = run.copy()
        tokens, listed = decide_reference(run, rows, phrases, outcomes)
        wanted = run.copy()
        run.restore(start)

        def expected(wanted: dict[str, np.ndarray] = wanted) -> None:
            run.restore(wanted)

        blocks = 1 + order % 3
        unordered = LISTS | {"tokens", "emitted"}
        run.check("decide", blocks, expected=expected, unordered=unordered, close={"bias": 0.0}, order=order)
        check_list(run, 1 - parity, listed, start, f"order {order}")
        found = run["tokens"].view(kernels.TOKEN).ravel()[3 : 3 + len(tokens)]
        found = found[np.argsort(found["row"])]
        assert [tuple(token)[:3] for token in found.tolist()] == [token[:3] for token in tokens]
        np.testing.assert_allclose(found["score"], [token[3] for token in tokens], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found["sum_p_alpha"], [token[4] for token in tokens], rtol=1e-5)
        assert sorted(run["emitted"][: len(tokens)].tolist()) == [token[0] for token in tokens]
    assert outcomes == {"failed", "blank", "label", "boosted", "last symbol", *(["tie"] if tiles > 1 else [])}


def fill_tiles(rng: np.random.Generator, tiles: np.ndarray, labels: int) -> None:
    """Write results of tiles: ids of `labels` labels, and few values, many of which are equal."""
    count = len(tiles)
    ids = np.minimum(np.arange(count) * 32 + rng.integers(0, 32, count), labels - 1)
    tiles[:, 0] = rng.integers(-3, 4, count)
    tiles[:, 1] = ids.astype(np.int32).view(np.float32)
    tiles[:, 2:] = 1 + rng.random((count, 2))
    if count > 33:
        tiles[[*range(33)], 0] = rng.choice([-3, 3])  # the largest may be in a later round of a warp


def decide_reference(
    run: KernelRunner, rows: dict[int, tuple[int, int]], phrases: dict[int, Boosting], outcomes: set[str]
) -> tuple[list[tuple[Any, ...]], dict[int, tuple[int, int]]]:
    """Update the memory as `decide` does. Returns the tokens by row, and the frames to list."""
    blank, limit = run.manifest.decoder.vocabulary, run.manifest.decoder.max_symbols
    tokens: list[tuple[Any, ...]] = []
    listed: dict[int, tuple[int, int]] = {}
    parity = run["control"][0] % 2
    for entry, (row, (begin, end)) in enumerate(rows.items()):
        slot, first = int(run["row_slot"][row]), int(run["list_first"][parity, entry])
        for frame in range(begin, end):
            tiles = run["partial"][first + frame - begin]
            best, id_, tied = lowest_largest(tiles)
            if not np.isfinite(best) or id_ != blank:
                break
        else:
            run["row_frame"][row] = end
            outcomes.add("blank")
            continue
        if not np.isfinite(best):
            run["row_failed"][row], run["row_frame"][row], run["row_end"][row] = 1, 0, 0
            outcomes.add("failed")
            continue
        outcomes.update({"label", "tie"} if tied else {"label"})
        x = tiles[:, 0].astype(np.float64) - best
        score = -np.log((tiles[:, 2] * np.exp(x)).sum())
        total = (tiles[:, 3] * np.exp(ALPHA * x)).sum() * np.exp(ALPHA * score)
        if row in phrases:
            boosted = run["boosted"][first + frame - begin]
            _, id_, _ = lowest_largest(boosted)
            score += boosted[id_ // 32, 2] - best
            node = phrases[row].next_node(int(run["node"][slot]), id_)
            run["node"][slot], run["bias"][row] = node, phrases[row].bias(node)
            outcomes.add("boosted")
        symbols = int(run["row_symbols"][row]) + 1 if run["row_label_frame"][row] == frame else 1
        following = frame + (symbols >= limit)
        if symbols >= limit:
            outcomes.add("last symbol")
        run["row_label_frame"][row], run["row_symbols"][row], run["row_label"][row] = frame, symbols, id_
        run["row_frame"][row] = following
        tokens.append((row, id_, int(run["row_position"][row]) + frame, score, total))
        if following < end:
            listed[row] = (following, end)
    control = run["control"]
    control[0], control[2], control[3] = control[0] + 1, control[2] + len(tokens), len(tokens)
    control[6 - parity] = sum(end - begin for begin, end in listed.values())
    control[8 - parity] = len(listed)
    set_condition(run, len(listed) > 0)
    return sorted(tokens), listed


def lowest_largest(tiles: np.ndarray) -> tuple[float, int, bool]:
    """Return the largest value, the lowest id that has it, and whether several have it."""
    best = tiles[:, 0].max()
    ids = ids_of(tiles)[tiles[:, 0] == best] if np.isfinite(best) else ids_of(tiles)
    return float(best), int(ids.min()), len(ids) > 1


NETS = [  # hidden, joint, layers, type
    (640, 640, 2, "float32"),
    (640, 640, 2, "bfloat16"),
    (264, 515, 2, "float16"),  # just above what is staged at once
    (24, 41, 1, "float32"),
]


def eighths(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers that every type represents exactly."""
    return small_integers(rng, shape, 8) / 8


@pytest.mark.parametrize(("hidden", "joint", "layers", "cache_dtype"), NETS)
def test_prediction_network(hidden: int, joint: int, layers: int, cache_dtype: str) -> None:
    """More rows that emit than a tile has, all of them in one block or two; rows that do not emit; none that does."""
    spec = manifest(decoder={"hidden": hidden, "joint": joint, "layers": layers})
    run = KernelRunner(spec, cache_dtype, slots=24, rows=21, frames=2)
    rng = np.random.default_rng(hidden)
    weights = [small_integers(rng, (2 * hidden, 4 * hidden), 1) / 32 for _ in range(layers)]
    columns = [8 * tile + unit + gate * hidden for tile in range(hidden // 8) for gate in range(4) for unit in range(8)]
    run["lstm_weight"] = np.stack([kernels.pack(weight[:, columns], cache_dtype) for weight in weights])
    projection = small_integers(rng, (hidden, joint), 1) / 32
    pack_into(run, "project_weight", projection)
    run["embedding"], run["h"] = eighths(rng, run["embedding"].shape), eighths(rng, run["h"].shape)
    run["h_next"] = eighths(rng, run["h_next"].shape)
    run["row_label"][:21] = rng.integers(0, 37, 21)
    bias = run["lstm_bias"].reshape(layers, 4, hidden)

    def lstm(layer: int, emitted: list[int]) -> None:
        for row in emitted:
            slot = run["row_slot"][row]
            x = run["h_next"][row, layer - 1] if layer else run["embedding"][run["row_label"][row]]
            joined = np.concatenate([x, run["h"][slot, layer]]).astype(np.float64)
            i, f, g, o = (joined @ weights[layer]).reshape(4, hidden) + bias[layer]
            run["c"][slot, layer] = sigmoid(f) * run["c"][slot, layer] + sigmoid(i) * np.tanh(g)
            run["h_next"][row, layer] = sigmoid(o) * np.tanh(run["c"][slot, layer])

    def project(emitted: list[int]) -> None:
        for row in emitted:
            slot = run["row_slot"][row]
            run["predicted"][slot] = run["h_next"][row, -1].astype(np.float64) @ projection + run["project_bias"]
            run["h"][slot] = run["h_next"][row]

    start = run.copy()
    for order, blocks in ((0, 1), (1, 2), (3, 1)) if hidden < 600 else ((3, 1),):
        emitted = rng.permutation(21)[:18].tolist()
        for count in (18, 0):
            for layer in range(layers):
                run.restore(start)
                run["emitted"][:18], run["control"][3] = emitted, count
                run.check(
                    f"lstm_{layer}",
                    blocks,
                    hidden // 8,
                    expected=lambda: lstm(layer, emitted[:count]),  # noqa: B023
                    close={"c": 2e-6, "h_next": 2e-6},
                    order=order,
                )
            run.restore(start)
            run["emitted"][:18], run["control"][3] = emitted, count
            run.check(
                "project",
                blocks,
                kernels.tiles(joint),
                expected=lambda: project(emitted[:count]),  # noqa: B023
                close={"predicted": 1e-5},
                order=order,
            )


@pytest.mark.parametrize("buffer", [0, 1])
@pytest.mark.parametrize("undecided", [0, 5])
def test_finish(undecided: int, buffer: int) -> None:
    """More tokens than the grid has threads; rows that failed; the buffer changes only after the last iteration."""
    run = KernelRunner(manifest(), rows=300, slots=300, frames=1)
    tokens, parity = run["tokens"].view(kernels.TOKEN).ravel(), buffer ^ (undecided > 0)
    run["row_failed"][:300] = np.random.default_rng(0).integers(0, 2, 300)
    other = 1 - parity
    start = run.copy()

    def expected() -> None:
        host = run.host("host_output", buffer)
        host["count"][:], host["undecided"][:], host["failed"][:300] = count, undecided, run["row_failed"][:300]
        host["tokens"][:count] = tokens[:count]
        run["control"][4] = buffer if undecided else 1 - buffer

    for order, (blocks, count) in enumerate(((1, 0), (3, 470), (1, 470), (2, 1))):
        run.restore(start)
        run["control"] = [8 + parity, 0, count, 3, buffer, 0, 0, 4, 4]
        run["control"][5 + parity], run["control"][5 + other] = undecided, 9
        run.check("finish", blocks, expected=expected, order=order)
