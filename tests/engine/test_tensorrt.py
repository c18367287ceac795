"""Building engines with TensorRT for RTX, without a GPU. Running them needs one."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")

from nemostream.bundle import Bundle
from nemostream.engine.calibration import measure_ranges
from nemostream.engine.precision import CACHE_DTYPES, write_typed
from nemostream.engine.tensorrt import TensorRT, _profiles
from nemostream.engines import speech
from nemostream.errors import BackendError, OptionError


@pytest.fixture(scope="module")
def library() -> TensorRT:
    return TensorRT()


@pytest.fixture(scope="module")
def ranges(demo_bundle: Bundle) -> dict[str, float]:
    return measure_ranges(demo_bundle, demo_bundle.manifest.chunk(560), speech(demo_bundle.manifest)[1:])


@pytest.mark.parametrize("ms", [80, 160, 560, 1120])
@pytest.mark.parametrize("precision", [*CACHE_DTYPES])
def test_builds(
    precision: str, ms: int, library: TensorRT, demo_bundle: Bundle, ranges: dict[str, float], tmp_path: Path
) -> None:
    graph, weights = write_typed(demo_bundle, demo_bundle.manifest.chunk(ms), precision, ranges, tmp_path, "test")
    progress: list[tuple[str, float]] = []
    engine = library.build(graph, "sm89", 4, None, lambda what, share: progress.append((what, share)))
    assert len(engine) > weights.stat().st_size // 2  # it contains the weights
    assert progress and all(0 <= share <= 1 for _, share in progress)


def test_targets(library: TensorRT, demo_bundle: Bundle, tmp_path: Path) -> None:
    assert {"sm80", "sm89", "sm120"} <= set(library.targets())
    graph, _ = write_typed(demo_bundle, demo_bundle.manifest.chunk(80), "fp16", None, tmp_path, "test")
    with pytest.raises(OptionError, match=r"cannot build for sm90 without that GPU; it can for .*sm89"):
        library.build(graph, "sm90", 4, None)


def test_invalid_graph(library: TensorRT, tmp_path: Path) -> None:
    (tmp_path / "test.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"cannot read test.onnx: .+"):
        library.build(tmp_path / "test.onnx", "sm89", 4, None)


def test_timing_cache(library: TensorRT, demo_bundle: Bundle, tmp_path: Path) -> None:
    graph, _ = write_typed(demo_bundle, demo_bundle.manifest.chunk(80), "fp16", None, tmp_path, "test")
    timings = tmp_path / "timings.cache"
    library.build(graph, "sm89", 1, timings)
    assert timings.read_bytes()
    timings.write_bytes(b"damaged")
    assert library.build(graph, "sm89", 1, timings)
    assert timings.read_bytes() != b"damaged"


def test_profiles_cover_every_batch() -> None:
    assert _profiles(1) == [(1, 1)]
    assert _profiles(8) == [(1, 8)]
    assert _profiles(100) == [(1, 8), (9, 64), (65, 100)]
    for max_batch in range(1, 300):
        rows = [row for smallest, largest in _profiles(max_batch) for row in range(smallest, largest + 1)]
        assert rows == list(range(1, max_batch + 1))


@pytest.mark.slow
@pytest.mark.nemo
@pytest.mark.parametrize("ms", [80, 160, 560, 1120])
def test_builds_the_full_size(ms: int, library: TensorRT, full_bundle: Bundle, tmp_path: Path) -> None:
    """The engine of the 0.6B encoder in fp16 contains the weights exactly once."""
    graph, weights = write_typed(full_bundle, full_bundle.manifest.chunk(ms), "fp16", None, tmp_path, "test")
    half = full_bundle.manifest.weights.bytes / 2
    assert weights.stat().st_size < 1.05 * half
    engine = library.build(graph, "sm89", 8, None)
    assert 0.9 * half < len(engine) < 1.2 * half
