"""CUDA kernels, run on the CPU and compared with numpy, and compiled for GPUs.

Decoding is tested on a small model with given encoder frames and difficult logits. The reference is `greedy_reference`
with a transducer in float64.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoding_model import (
    CHUNK,
    HIDDEN,
    JOINT,
    LAYERS,
    MAX_SYMBOLS,
    VOCABULARY,
    GivenFrames,
    Net,
    make_bundle,
    make_weights,
    rounded,
    some_phrases,
)

from nemostream.bundle import Bundle, DecoderConfig, EncoderConfig, Manifest
from nemostream.errors import BackendError
from nemostream.runtime.backends.base import Batch, Emissions
from nemostream.runtime.backends.gpu import kernels
from nemostream.runtime.backends.gpu.backend import GpuBackend, buckets
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.decoding.greedy import DecoderState, Labels, greedy_reference, label_looping

ROWS = 21  # more than a tile
CACHE_DTYPES = ("float32", "float16", "bfloat16")
# Absolute tolerance of scores. A sum may be rounded to different 16-bit values from fp32 and from float64.
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("kind", ["random", "ties", "blanks", "labels", "nan embedding", "infinite logits"])
def test_decoding_matches_reference(kind: str, cache_dtype: str, make_device: Any, tmp_path: Path) -> None:
    """Three consecutive chunks, rows that end at different frames, and two rows that are not finite in chunk 1.

    Two of three rows have phrases, different for each row.
    """
    rng = np.random.default_rng(sum(map(ord, kind)))
    arrays = make_weights(rng, kind)
    bundle, net = make_bundle(tmp_path, arrays), Net(arrays, cache_dtype)
    device = make_device(order=1 + len(kind))  # shuffles threads and blocks
    encoder = GivenFrames(device, cache_dtype)
    backend = GpuBackend(bundle, device, {CHUNK.ms: encoder}, capacity=ROWS, max_batch=ROWS)
    assert backend.loop == "while"

    start = DecoderState.initial(net, LAYERS, HIDDEN)
    states = [start.repeat(1) for _ in range(ROWS)]
    phrases_by_row = [some_phrases(rng) if row % 3 else None for row in range(ROWS)]
    for row, phrases in enumerate(phrases_by_row):
        backend.set_phrases(row, phrases)
    alive, emitted, changed = [True] * ROWS, 0, 0
    for step in range(3):
        frames = rng.standard_normal((ROWS, CHUNK.frames, JOINT)).astype(np.float32)
        if step == 1:
            frames[7, 2, 11], frames[8, 4, 0] = np.nan, np.inf
        lengths = np.full(ROWS, CHUNK.samples) if step < 2 else rng.integers(0, CHUNK.samples + 1, ROWS)
        encoder.frames = frames
        batch = Batch(CHUNK, np.arange(ROWS), np.zeros((ROWS, CHUNK.samples), np.float32), lengths)
        got = backend.submit(batch).result()
        for row in range(ROWS):
            received = step * CHUNK.samples - bundle.manifest.lead + int(lengths[row])
            count = int(np.clip(bundle.manifest.encoder_frames(received) - step * CHUNK.frames, 0, CHUNK.frames))
            wanted, finite, boosted = _reference(net, frames[row], count, states[row], alive[row], phrases_by_row[row])
            if not alive[row]:
                continue  # the results of a failed stream are undefined
            alive[row] = finite
            where = f"step {step}, row {row}"
            assert got.failed[row] == (not finite), where
            assert got.tokens[row].tolist() == wanted.tokens, where
            assert got.frames[row].tolist() == [step * CHUNK.frames + frame for frame in wanted.frames], where
            np.testing.assert_allclose(got.scores[row], wanted.scores, atol=TOLERANCE[cache_dtype], err_msg=where)
            np.testing.assert_allclose(
                got.sum_p_alpha[row], wanted.sum_p_alpha, rtol=TOLERANCE[cache_dtype], err_msg=where
            )
            emitted, changed = emitted + len(wanted.tokens), changed + boosted
    assert {"blanks": emitted == 0, "infinite logits": alive.count(False) > 10}.get(kind, emitted > 20)
    assert changed > 10 or kind in ("blanks", "infinite logits")
    if kind == "nan embedding":
        assert 3 < alive.count(True) < ROWS - 3  # some rows emitted one of these labels and some did not
    if kind not in ("nan embedding", "infinite logits"):
        assert [row for row in range(ROWS) if not alive[row]] == [7, 8]


class LargeNet(Net):
    """The same with products by BLAS, which are faster. `margin` is the smallest lead of a largest logit so far."""

    margin = np.inf

    def join(self, encoded: Any, predicted: Any) -> Any:
        logits = super().join(encoded, predicted)
        second, largest = np.partition(logits, -2, axis=1)[:, -2:].T
        self.margin = min(self.margin, float((largest - second).min()))
        return logits

    def _product(self, x: np.ndarray, name: str) -> np.ndarray:
        return rounded(x, self.cache_dtype) @ self._rounded[f"{name}.weight"] + self.arrays[f"{name}.bias"]


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize(
    ("hidden", "joint", "vocabulary", "rows", "count", "blank_bias", "seed"),
    [
        (16, 41, VOCABULARY, 17, 2, 0, 3),  # rows of the joint are not aligned to 16 bytes
        (264, 515, VOCABULARY, 17, 2, 0, 3),  # inner dimensions just above those staged at once
        (640, 640, 1024, 17, 1, 3, 4),  # published models
        pytest.param(640, 640, 13087, 3, 1, 4, 1, marks=pytest.mark.slow),
    ],
)
def test_sizes(
    hidden: int,
    joint: int,
    vocabulary: int,
    rows: int,
    count: int,
    blank_bias: float,
    seed: int,
    cache_dtype: str,
    make_device: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens and state equal those of `label_looping` in float64.

    The grids have one block along the rows, which computes both tiles of 17 rows. The last row is then equal, bit for
    bit, to the same row decoded alone. The seeds were chosen so that no rounding decides a label.
    """
    monkeypatch.setattr("nemostream.runtime.backends.gpu.backend._MAX_ROW_BLOCKS", 1)
    rng = np.random.default_rng(seed)
    arrays = make_weights(rng, "random", hidden, joint, vocabulary)
    arrays["joint.out.weight"] -= arrays["joint.out.weight"].mean(axis=0)  # labels depend on frames, not on biases
    arrays["joint.out.bias"][-1] += blank_bias
    bundle, net = make_bundle(tmp_path, arrays), LargeNet(arrays, cache_dtype)
    length = bundle.manifest.lead + bundle.manifest.features.hop * count
    assert bundle.manifest.encoder_frames(length - bundle.manifest.lead) == count
    frames = rng.standard_normal((rows, CHUNK.frames, joint)).astype(np.float32)
    phrases = [some_phrases(rng, vocabulary) if row == 1 else None for row in range(rows)]

    def decode(only: slice) -> tuple[Emissions, list[dict[str, np.ndarray]]]:
        device = make_device(order=7)
        encoder = GivenFrames(device, cache_dtype, joint)
        batch = len(frames[only])
        backend = GpuBackend(bundle, device, {CHUNK.ms: encoder}, capacity=batch, max_batch=batch)
        for slot, automaton in enumerate(phrases[only]):
            backend.set_phrases(slot, automaton)
        encoder.frames = frames[only]
        audio = np.zeros((batch, CHUNK.samples), np.float32)
        got = backend.submit(Batch(CHUNK, np.arange(batch), audio, np.full(batch, length))).result()
        states = [backend.save(slot) for slot in range(batch)]
        backend.close()
        return got, states

    got, states = decode(slice(None))
    state = DecoderState.initial(net, LAYERS, hidden).repeat(rows)
    wanted, failed = label_looping(net, frames, np.full(rows, count), state, phrases)
    assert net.margin > 0.004
    assert not failed.any() and not got.failed.any()
    for row, labels in enumerate(wanted):
        assert got.tokens[row].tolist() == labels.tokens, row
        assert got.frames[row].tolist() == labels.frames, row
        np.testing.assert_allclose(got.scores[row], labels.scores, atol=TOLERANCE[cache_dtype])
        np.testing.assert_allclose(got.sum_p_alpha[row], labels.sum_p_alpha, rtol=TOLERANCE[cache_dtype])
        for name in ("predicted", "h", "c"):
            np.testing.assert_allclose(states[row][name], getattr(state, name)[row], atol=TOLERANCE[cache_dtype])
    emitted = [token for labels in wanted for token in labels.tokens]
    assert all(labels.tokens for labels in wanted)  # so more rows than a tile has emit labels at once
    assert max(emitted) > vocabulary * 3 // 4

    if rows <= kernels.TILE_ROWS:
        return
    alone, (last,) = decode(slice(rows - 1, rows))
    for name in ("tokens", "frames", "scores", "sum_p_alpha"):
        assert getattr(alone, name)[0].tobytes() == getattr(got, name)[-1].tobytes(), name
    assert all(last[name].tobytes() == states[-1][name].tobytes() for name in ("predicted", "h", "c"))


def _reference(
    net: Net, frames: np.ndarray, count: int, state: DecoderState, alive: bool, boosting: Boosting | None = None
) -> tuple[Labels, bool, int]:
    """Decode a row until a value is not finite.

    Returns the labels, whether all is finite, and the labels boosting changed.
    """
    labels, changed = Labels(), 0
    if not alive or not np.isfinite(frames).all():
        return labels, False, 0
    with np.errstate(all="ignore"):
        for frame in range(count):
            for _ in range(MAX_SYMBOLS):
                logits = net.join(frames[frame : frame + 1], state.predicted)[0]
                if not np.isfinite(logits.max()):
                    return labels, False, changed
                label = plain = int(logits.argmax())
                if label == net.blank:
                    break
                if boosting:
                    node = int(state.node[0])
                    label = int((logits[: net.blank] + boosting.bias(node)).argmax())
                    state.node[0] = boosting.next_node(node, label)
                logs = logits - np.logaddexp.reduce(logits)
                labels.append(label, frame, logs[label], np.exp(0.33 * logs).sum())
                changed += label != plain
                state.predicted, state.h, state.c = net.predict(np.array([label]), state.h, state.c)
    return labels, True, changed


@pytest.mark.parametrize("boosted", [False, True])
def test_reference_matches_greedy_reference(boosted: bool) -> None:
    rng = np.random.default_rng(5)
    net = Net(make_weights(rng, "random"), "float32")
    frames = rng.standard_normal((30, JOINT)).astype(np.float32)
    one, other = (DecoderState.initial(net, LAYERS, HIDDEN) for _ in range(2))
    boosting = some_phrases(rng) if boosted else None
    labels, alive, changed = _reference(net, frames, 30, one, True, boosting)
    wanted = greedy_reference(net, frames, other, boosting)
    assert alive
    assert (labels.tokens, labels.frames) == (wanted.tokens, wanted.frames)
    np.testing.assert_allclose(labels.scores, wanted.scores)
    np.testing.assert_allclose(labels.sum_p_alpha, wanted.sum_p_alpha)
    assert len(labels.tokens) > 5
    assert (changed > 0) == boosted


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_phrases_do_not_affect_other_rows(cache_dtype: str, make_device: Any, tmp_path: Path) -> None:
    """Output and state of half of the rows are equal bit for bit, whether the other rows have phrases or not."""
    rng = np.random.default_rng(8)
    arrays = make_weights(rng, "random")
    bundle, frames = make_bundle(tmp_path, arrays), rng.standard_normal((3, ROWS, CHUNK.frames, JOINT))
    phrases = [some_phrases(rng) for _ in range(0, ROWS, 2)]
    results: list[list[bytes]] = []
    for boosted in (False, True):
        device = make_device()
        encoder = GivenFrames(device, cache_dtype)
        backend = GpuBackend(bundle, device, {CHUNK.ms: encoder}, capacity=ROWS, max_batch=ROWS)
        for slot in range(0, ROWS, 2):
            backend.set_phrases(slot, phrases[slot // 2] if boosted else None)
        rows: list[list[bytes]] = [[] for _ in range(ROWS)]
        for part in frames.astype(np.float32):
            encoder.frames = part
            audio = np.zeros((ROWS, CHUNK.samples), np.float32)
            got = backend.submit(Batch(CHUNK, np.arange(ROWS), audio, np.full(ROWS, CHUNK.samples))).result()
            for row in range(ROWS):
                rows[row] += [array[row].tobytes() for array in (got.tokens, got.frames, got.scores, got.sum_p_alpha)]
        for row in range(ROWS):
            rows[row] += [array.tobytes() for name, array in backend.save(row).items() if name != "phrases"]
        results.append(rows)
        backend.close()
    without, beside = results
    assert without[1::2] == beside[1::2]
    assert sum(one != other for one, other in zip(without[::2], beside[::2], strict=True)) > 5


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_thread_order_does_not_change_results(cache_dtype: str, make_device: Any, tmp_path: Path) -> None:
    """Bit for bit. Detects missing barriers and dependence on an order; on a GPU the order is the device's own."""
    rng = np.random.default_rng(3)
    arrays = make_weights(rng, "random")
    frames = rng.standard_normal((ROWS, CHUNK.frames, JOINT)).astype(np.float32)
    results = []
    for order in (0, 1, 2, 3):
        device = make_device(order=order)
        encoder = GivenFrames(device, cache_dtype)
        backend = GpuBackend(make_bundle(tmp_path, arrays), device, {CHUNK.ms: encoder}, capacity=ROWS, max_batch=ROWS)
        for row in range(0, ROWS, 2):
            backend.set_phrases(row, some_phrases(np.random.default_rng(row)))
        encoder.frames = frames
        audio = np.random.default_rng(1).standard_normal((ROWS, CHUNK.samples)).astype(np.float32)
        emissions = backend.submit(Batch(CHUNK, np.arange(ROWS), audio, np.full(ROWS, CHUNK.samples))).result()
        state = np.empty((ROWS, LAYERS, HIDDEN), np.float32)
        backend.arena.read("h", state)
        parts = [*emissions.tokens, *emissions.frames, *emissions.scores, *emissions.sum_p_alpha, state]
        results.append(b"".join(part.tobytes() for part in parts))
    assert len(results[0]) > state.nbytes
    assert len(set(results)) == 1


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("depth", "columns"), [(16, 32), (40, 38), (600, 33)])
def test_packed_weights_can_be_unpacked(cache_dtype: str, depth: int, columns: int) -> None:
    """Reading the packed words in the layout of the PTX manual returns the matrix."""
    matrix = np.random.default_rng(0).standard_normal((depth, columns)).astype(np.float32)
    words = kernels.pack(matrix, cache_dtype)
    padded_depth, padded_columns = -(-depth // 16) * 16, -(-columns // 32) * 32
    found = np.zeros((padded_depth, padded_columns))
    if cache_dtype == "float32":
        tiles = words.view(np.float32).reshape(padded_columns // 32, padded_depth, 32)
        found = np.concatenate(list(tiles), axis=1).astype(np.float64)
    else:
        halves = words.view(np.uint16).reshape(padded_columns // 32, padded_depth // 16, 4, 32, 2, 2)
        for tile, k16, n8, lane, word, half in np.ndindex(halves.shape):
            group, member = divmod(lane, 4)
            bits = halves[tile, k16, n8, lane, word, half]
            value = (
                bits.view(np.float16)
                if cache_dtype == "float16"
                else (np.uint32(bits) << np.uint32(16)).view(np.float32)
            )
            found[16 * k16 + 8 * word + 2 * member + half, 32 * tile + 8 * n8 + group] = value
    np.testing.assert_array_equal(found[:depth, :columns], rounded(matrix, cache_dtype))
    assert not found[depth:].any() and not found[:, columns:].any()


@pytest.mark.parametrize(
    ("value", "float16", "bfloat16"),
    [
        (1.0, 0x3C00, 0x3F80),
        (-2.0, 0xC000, 0xC000),
        # Half way between two values: the one whose last bit is 0.
        (1 + 2**-8, 0x3C04, 0x3F80),
        (1 + 3 * 2**-8, 0x3C0C, 0x3F82),
        (-1 - 3 * 2**-8, 0xBC0C, 0xBF82),
        (1 + 2**-11, 0x3C00, 0x3F80),
        (1 + 3 * 2**-11, 0x3C02, 0x3F80),
        # Just above and below it.
        (1 + 2**-8 + 2**-23, 0x3C04, 0x3F81),
        (1 + 3 * 2**-8 - 2**-23, 0x3C0C, 0x3F81),
        (2 - 2**-9, 0x3FFE, 0x4000),  # up to the next power of two
        (2.0**-14, 0x0400, 0x3880),
        (np.inf, 0x7C00, 0x7F80),
    ],
)
def test_rounding_to_16_bits(value: float, float16: int, bfloat16: int) -> None:
    array = np.array([0, value], np.float32)
    assert kernels.to_16bit(array, "float16").tolist() == [0, float16]
    assert kernels.to_16bit(array, "bfloat16").tolist() == [0, bfloat16]
    strided = np.array([[value, 5], [0, 5]], np.float32)[:, 0]
    assert kernels.to_16bit(strided, "bfloat16").tolist() == [bfloat16, 0]


def test_ranges_of_mel_filters(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest range of bins that has all of a filter, empty for an empty filter."""
    filters = np.array(demo_bundle.weight("features.filters"))
    filters[:, :5] = 0
    for mel, bins in ((1, [0]), (2, [256]), (3, [7, 9]), (4, [0, 256])):
        filters[bins, mel] = 0.5
    monkeypatch.setattr(
        Bundle, "weight", lambda self, name, weight=Bundle.weight: filters if "filters" in name else weight(self, name)
    )
    found = kernels.weights(demo_bundle, "float32")
    assert found["filter_bins"][:5].tolist() == [[0, 0], [0, 1], [256, 257], [7, 10], [0, 257]]
    for mel, (first, end) in enumerate(found["filter_bins"]):
        np.testing.assert_array_equal(np.flatnonzero(filters[:, mel])[[0, -1]] if mel else [0, -1], [first, end - 1])


def test_buckets_cover_every_batch() -> None:
    assert buckets(1) == (1,)
    assert buckets(6) == (1, 2, 4, 6)
    assert buckets(100) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100)
    for max_batch in range(1, 300):
        found = buckets(max_batch)
        assert found[-1] == max_batch and list(found) == sorted(set(found))
        assert all(large <= 2 * small for small, large in itertools.pairwise(found))


# -- for GPUs ----------------------------------------------------------------------------------------------------------


def full_size(manifest: Manifest) -> Manifest:
    """Return the manifest with the sizes of the 0.6B model."""
    encoder = EncoderConfig(layers=24, d_model=1024, heads=8, subsampling=8, cache=70, conv_cache=8)
    decoder = DecoderConfig(layers=2, hidden=640, joint=640, vocabulary=1024, max_symbols=10, activation="relu")
    return dataclasses.replace(manifest, encoder=encoder, decoder=decoder)


@pytest.mark.parametrize("size", ["demo", "full"])
@pytest.mark.parametrize("architecture", ["sm80", "sm90", "sm120"])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_kernels_compile(
    size: str, architecture: str, cache_dtype: str, demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-python")
    from nemostream.runtime.backends.gpu.cuda import compile_kernels

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    manifest = full_size(demo_bundle.manifest) if size == "full" else demo_bundle.manifest
    macros = kernels.macros(manifest, cache_dtype, conditional=True)
    for kind, magic in (("cubin", b"\x7fELF"), ("ptx", b".visible .entry join")):
        image = compile_kernels(macros, architecture, kind)
        assert magic in image
        assert all(entry.encode() in image for entry in kernels.entries(manifest))
        assert b"cudaGraphSetConditional" in image
        (cached,) = tmp_path.rglob(f"*.{kind}")
        assert cached.read_bytes() == image
        cached.write_bytes(b"cached")
        assert compile_kernels(macros, architecture, kind) == b"cached"  # not compiled again
    if architecture == "sm80":  # the source does not depend on the architecture
        plain = compile_kernels({**macros, "CONDITIONAL": 0}, architecture, "ptx")
        assert b".visible .entry join" in plain and b"cudaGraphSetConditional" not in plain


def test_compiled_kernels_are_cached_by_everything_that_they_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-python")
    from nemostream.runtime.backends.gpu.cuda import compile_kernels

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = 'extern "C" __global__ void first(int* x) { *x = VALUE; }'
    calls: list[tuple[Any, ...]] = [
        ({"VALUE": 1}, "sm80", "ptx", source),
        ({"VALUE": 2}, "sm80", "ptx", source),
        ({"VALUE": 1}, "sm90", "ptx", source),
        ({"VALUE": 1}, "sm80", "cubin", source),
        ({"VALUE": 1}, "sm80", "ptx", source.replace("first", "second")),
    ]
    images = [compile_kernels(*call) for call in calls]
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(set(images)) == len(files) == len(calls) and {*files.values()} == {*images}
    assert [compile_kernels(*call) for call in calls] == images
    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (0, 99, 0))  # another release of the compiler
    compile_kernels(*calls[0])
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == len(calls) + 1


def test_sizes_at_the_limits(demo_bundle: Bundle) -> None:
    """Heads of 16 bytes and a window that fills the FFT except its zeros."""
    manifest = demo_bundle.manifest
    features = dataclasses.replace(manifest.features, window=514)
    encoder = dataclasses.replace(manifest.encoder, d_model=32, heads=4)
    decoder = dataclasses.replace(manifest.decoder, hidden=8, layers=1)
    found = kernels.macros(
        dataclasses.replace(manifest, features=features, encoder=encoder, decoder=decoder), "float16", conditional=False
    )
    assert (found["WINDOW"], found["HIDDEN"], found["NET_LAYERS"], found["CONDITIONAL"]) == (514, 8, 1, 0)


def test_compiler_log_is_in_the_error(demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-python")
    from nemostream.runtime.backends.gpu.cuda import compile_kernels

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    macros = kernels.macros(demo_bundle.manifest, "float32", conditional=True)
    with pytest.raises(BackendError, match=r"(?s)cannot compile the kernels for sm90.*error"):
        compile_kernels({**macros, "VOCABULARY": "invalid"}, "sm90")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": {"n_fft": 500}}, "an FFT of 500"),
        ({"features": {"window": 515}}, "a window of 515 in an FFT of 512"),
        ({"decoder": {"layers": 3}}, "a prediction network of 3 layers"),
        ({"decoder": {"hidden": 100}}, "a prediction network of 100 units"),
        ({"encoder": {"heads": 32}}, "attention heads of 8 bytes"),
    ],
)
def test_unsupported_sizes(demo_bundle: Bundle, changes: dict[str, Any], message: str) -> None:
    manifest = demo_bundle.manifest
    parts = {name: dataclasses.replace(getattr(manifest, name), **fields) for name, fields in changes.items()}
    with pytest.raises(BackendError, match=f"do not support {message}.*device='cpu'"):
        kernels.macros(dataclasses.replace(manifest, **parts), "float16", conditional=True)
