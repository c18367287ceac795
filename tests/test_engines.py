"""`nemostream build` end to end, and the validation of engines."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cuda_on_cpu import MISSING
from host_device import HostDevice, OrtEncoder
from prompted import prompted_bundle

import nemostream
from nemostream.bundle import Bundle
from nemostream.cli.main import main
from nemostream.engine.validate import MIN_CONFIDENCE, MIN_COSINE, MIN_STEPS, validate_engine
from nemostream.engines import build_engine, check_chunks, speech
from nemostream.errors import BackendError, EngineValidationError, NemostreamError, OptionError
from nemostream.extras import install_command
from nemostream.plans import PlanStore
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.backends.gpu.backend import GpuBackend

DEMO = str(nemostream.demo_bundle())


@pytest.fixture
def build(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*options: object, bundle: str = DEMO) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main(["build", bundle, "--engines", str(tmp_path / "engines"), *map(str, options)])
        captured = capfd.readouterr()
        return int(leaving.value.code or 0), captured.out, captured.err

    return call


# -- int8 on this CPU --------------------------------------------------------------------------------------------------


def test_int8_for_this_cpu(build: Callable[..., Any], tmp_path: Path, demo_bundle: Bundle) -> None:
    """Engines are built, validated, found again and used; transcripts equal those of fp32."""
    code, out, err = build("--backend", "onnxruntime", "--precision", "int8")
    assert code == 0, err
    engines, store = tmp_path / "engines", PlanStore(tmp_path / "engines")
    assert [Path(line).suffix for line in out.splitlines()] == [".onnx"] * 4
    assert all(Path(line).is_file() for line in out.splitlines())
    assert err.count("built in") == 4
    for plan in store.all():
        assert plan.validation["steps"] >= MIN_STEPS
        assert MIN_COSINE["int8"] <= plan.validation["cosine"] < 1
        assert plan.validation["tokens"] > 5
        assert plan.validation["rows"] == 9
        # With a scale per frame, the rows of a batch are independent, though other kernels may run than for one row.
        assert plan.validation["neighbour_difference"] == 0 <= plan.validation["batch_difference"] < 0.05
    assert err.count("; batches of up to 9 rows ") == 4
    for ms in (80, 560):
        with (
            nemostream.load(chunk_ms=ms, threads=1) as wanted,
            nemostream.load(chunk_ms=ms, threads=1, precision="int8", engines=engines) as model,
        ):
            assert model.transcribe(nemostream.demo_clip()).text == wanted.transcribe(nemostream.demo_clip()).text != ""

    before = {path: path.stat().st_mtime_ns for path in engines.iterdir()}
    code, again, err = build("--backend", "onnxruntime", "--precision", "int8")
    assert (code, again, err.count("already built")) == (0, out, 4)
    assert {path: path.stat().st_mtime_ns for path in engines.iterdir()} == before

    damaged = Path(out.splitlines()[3])
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    with pytest.raises(BackendError, match="missing or damaged"):
        nemostream.load(precision="int8", engines=engines)
    code, _, err = build("--backend", "onnxruntime", "--precision", "int8", "--chunk-ms", 1120, "--chunk-ms", 80)
    assert (code, err.count("built in"), err.count("already built")) == (0, 1, 1)
    nemostream.load(precision="int8", engines=engines).close()


def test_int8_of_a_prompted_model(demo_bundle: Bundle, tmp_path: Path) -> None:
    """Validated with different prompts in the rows of a batch, and used with one per stream."""
    bundle, store = prompted_bundle(demo_bundle, tmp_path / "bundle"), PlanStore(tmp_path / "engines")
    chunk = bundle.manifest.chunk(1120)
    plan, built = build_engine(bundle, chunk, "int8", store, backend="onnxruntime")
    assert built and (plan.validation["rows"], plan.validation["neighbour_difference"]) == (9, 0)
    engine, fp32 = OrtBackend(bundle, capacity=2, plans={1120: plan}), OrtBackend(bundle, capacity=2)
    audio = np.stack([speech(bundle.manifest)[0][: chunk.samples]] * 2)
    batch = Batch(chunk, np.arange(2), audio, np.full(2, chunk.samples), np.array([0, 6]))
    got, wanted = engine.encode(batch)[0], fp32.encode(batch)[0]
    cosines = (got * wanted).sum(-1) / (np.linalg.norm(got, axis=-1) * np.linalg.norm(wanted, axis=-1))
    assert cosines.min() > MIN_COSINE["int8"]
    assert np.abs(wanted[0] - wanted[1]).max() > 1


def test_only_built_chunk_sizes_can_be_used(build: Callable[..., Any], tmp_path: Path) -> None:
    assert build("--backend", "onnxruntime", "--precision", "int8", "--chunk-ms", 560)[0] == 0
    with nemostream.load(precision="int8", engines=tmp_path / "engines") as model:
        assert model.transcribe(nemostream.demo_clip()).text
        with pytest.raises(BackendError, match=r"no engine for chunks of 80 ms, only for 560 ms.*--chunk-ms 80"):
            model.transcribe(nemostream.demo_clip(), chunk_ms=80)
    with pytest.raises(BackendError, match="no engine for chunks of 80 ms"):
        nemostream.load(chunk_ms=80, precision="int8", engines=tmp_path / "engines")


def test_engines_of_another_bundle_are_ignored(tiny_bundle: Bundle, build: Callable[..., Any], tmp_path: Path) -> None:
    assert build("--backend", "onnxruntime", "--precision", "int8", "--chunk-ms", 560)[0] == 0
    with pytest.raises(BackendError, match=r"has no int8 engine of .*: nemostream build .* --backend onnxruntime"):
        nemostream.load(tiny_bundle.path, precision="int8", engines=tmp_path / "engines")


# -- validation --------------------------------------------------------------------------------------------------------


class FaultyBackend:
    """A backend with a fault: `encode` and `emit` change its results from step `from_step` on."""

    def __init__(self, backend: OrtBackend, **fault: Any) -> None:
        self._backend, self._fault = backend, fault
        self.reset, self._steps = backend.reset, 0

    def encode(self, batch: Batch) -> Any:
        encoded, counts = self._backend.encode(batch)
        encoded = self._fault.get("encode", lambda x: x)(encoded.copy()) if self._active() else encoded
        return encoded, counts

    def submit(self, batch: Batch) -> Any:
        step = self._backend.submit(batch)
        emissions = step.result()
        if self._active():
            self._fault.get("emit", lambda emissions: None)(emissions)
        self._steps += 1
        return step

    def _active(self) -> bool:
        return self._steps >= self._fault.get("from_step", 0)


def with_nan(encoded: np.ndarray) -> np.ndarray:
    encoded[0, 0, 3] = np.nan
    return encoded


def rotated(encoded: np.ndarray) -> np.ndarray:
    """Rotate by an angle with a cosine of 0.995: too much for 16 bit, not for 8 bit."""
    noise = np.random.default_rng(0).standard_normal(encoded.shape)
    noise -= encoded * (noise * encoded).sum(-1, keepdims=True) / (encoded * encoded).sum(-1, keepdims=True)
    noise *= np.linalg.norm(encoded, axis=-1, keepdims=True) / np.linalg.norm(noise, axis=-1, keepdims=True)
    return (0.995 * encoded + np.sqrt(1 - 0.995**2) * noise).astype(np.float32)


def other_tokens(emissions: Any) -> None:
    for row in emissions.tokens:
        row ^= 1


def wrong_above_8(encoded: np.ndarray) -> np.ndarray:
    """Give row 8 and those after it the output of other rows."""
    encoded[8:] = encoded[: len(encoded[8:])]
    return encoded


def nan_in_row_5(encoded: np.ndarray) -> np.ndarray:
    encoded[5:6] = np.nan
    return encoded


def leaking(encoded: np.ndarray) -> np.ndarray:
    """Add 3 % of the row before: not enough to fail the comparison with fp32."""
    return encoded + 0.03 * np.roll(encoded, 1, axis=0) * (len(encoded) > 1)


def other_kernels(encoded: np.ndarray) -> np.ndarray:
    """Change every row of a batch by 2 %, whatever the other rows are."""
    return rotated_by(encoded, 0.02) if len(encoded) > 1 else encoded


def rotated_by(encoded: np.ndarray, size: float) -> np.ndarray:
    """Add to every frame a change of this relative size, always the same for the same frame."""
    change = np.roll(encoded, 1, axis=-1)
    change *= size * np.linalg.norm(encoded, axis=-1, keepdims=True) / np.linalg.norm(change, axis=-1, keepdims=True)
    return encoded + change


def clip_tokens(ms: int = 560) -> int:
    """Return the number of tokens of the packaged clip, the only one the demo model is confident about."""
    with nemostream.load(chunk_ms=ms, threads=1) as model:
        tokens = model.transcribe(nemostream.demo_clip()).tokens
    assert np.mean([token.score for token in tokens]) > np.log(MIN_CONFIDENCE)
    return len(tokens)


@pytest.mark.parametrize(
    ("precision", "fault", "message"),
    [
        ("fp16", {}, None),
        (
            "fp16",
            {"encode": rotated},
            r"a cosine similarity of 0\.99\d+ with fp32 in step 1, at least 0.999 is required",
        ),
        ("fp16", {"encode": rotated, "from_step": 30}, "in step 31, at least 0.999 is required"),
        ("int8", {"encode": rotated}, None),
        ("fp8", {"encode": lambda x: -x}, "the encoder output has a cosine similarity of -1.00000"),
        ("bf16", {"encode": with_nan}, "the encoder output is not finite in step 1;"),
        ("bf16", {"encode": lambda x: x * np.inf, "from_step": 9}, "not finite in step 10;"),
        ("int8", {"emit": other_tokens}, r"it emits tokens \[\d+, .* fp32 emits \[\d+, "),
        ("int8", {"emit": lambda e: e.failed.__setitem__(0, True)}, "decoding produces values that are not finite"),
    ],
)
def test_validation(precision: str, fault: dict[str, Any], message: str | None, demo_bundle: Bundle) -> None:
    chunk = demo_bundle.manifest.chunk(560)
    candidate, reference = FaultyBackend(OrtBackend(demo_bundle, 2), **fault), OrtBackend(demo_bundle, 2)
    shares: list[float] = []

    def validate() -> dict[str, Any]:
        return validate_engine(
            demo_bundle.manifest,
            chunk,
            precision,
            candidate,
            reference,
            speech(demo_bundle.manifest),
            shares.append,  # type: ignore[arg-type]
        )

    if message:
        with pytest.raises(
            EngineValidationError, match=f"the {precision} engine for 560 ms failed validation: .*{message}"
        ) as error:
            validate()
        assert str(error.value).endswith("build another precision, or use fp32.")
    else:
        figures = validate()
        assert figures["steps"] >= 36 and figures["tokens"] == clip_tokens()
        assert (figures["cosine"] > 0.9999999) == (not fault)
        assert shares == sorted(shares) and shares[-1] == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, None),
        (other_kernels, None),
        (wrong_above_8, r"a cosine similarity of .* with fp32 in step \d, row 8 of a batch of 9, at least 0.998"),
        (nan_in_row_5, "not finite in step 1, row 5 of a batch of 8;"),
        (leaking, r"in row [036] of a batch of 8 changes by \S+ % if the other rows have other audio; at most 0.5 %"),
    ],
)
def test_validation_of_batches(
    fault: Callable[[np.ndarray], np.ndarray] | None, message: str | None, demo_bundle: Bundle
) -> None:
    """Every row has its own audio and is compared with fp32, with itself alone, and with itself beside others."""
    manifest, shares = demo_bundle.manifest, []  # type: ignore[var-annotated]
    chunk, clips = manifest.chunk(160), speech(manifest)[1:]
    candidate, reference = OrtBackend(demo_bundle, capacity=9), OrtBackend(demo_bundle, capacity=2)
    faulty = FaultyBackend(candidate, **({"encode": fault} if fault else {}))

    def validate(batches: list[int]) -> dict[str, Any]:
        return validate_engine(manifest, chunk, "fp16", faulty, reference, clips, shares.append, batches)  # type: ignore[arg-type]

    alone = validate([])
    assert alone.keys() == {"steps", "cosine", "tokens", "seconds"}  # without batches, none of the faults is detected
    shares.clear()
    if message:
        with pytest.raises(EngineValidationError, match=message):
            validate([8, 9])
        return
    figures = validate([8, 9])
    assert shares == sorted(shares) and shares[-1] == 1
    assert (figures["rows"], figures["neighbour_difference"]) == (9, 0)
    assert {name: figures[name] for name in alone} == alone
    if fault:
        assert figures["batch_difference"] == pytest.approx(0.02, rel=0.01)
    else:
        assert figures["batch_difference"] < 1e-4


def test_validation_of_a_prompted_model(demo_bundle: Bundle, tmp_path: Path) -> None:
    """Rows of a batch have different prompts, so an engine that confuses them fails."""
    bundle = prompted_bundle(demo_bundle, tmp_path / "bundle")
    manifest, clips = bundle.manifest, speech(bundle.manifest)[1:]

    class MixedPrompts(FaultyBackend):
        """Rows of a batch get the prompts of other rows, which is wrong only if those differ."""

        def encode(self, batch: Batch) -> Any:
            prompts = None if batch.prompts is None else np.roll(batch.prompts, 1)
            return super().encode(dataclasses.replace(batch, prompts=prompts))

    def validate(kind: type[FaultyBackend]) -> dict[str, Any]:
        candidate: Any = kind(OrtBackend(bundle, capacity=5))
        reference = OrtBackend(bundle, capacity=2)
        return validate_engine(manifest, manifest.chunk(160), "fp16", candidate, reference, clips, batches=[5])

    figures = validate(FaultyBackend)
    assert figures["rows"] == 5 and figures["cosine"] > 0.999999
    with pytest.raises(EngineValidationError, match=r"step 1, row 1 of a batch of 5"):
        validate(MixedPrompts)


def test_validation_of_more_rows_than_streams(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows five apart have the same audio. Wrong rows at the end of a large batch are detected too."""
    from nemostream.engine import validate

    monkeypatch.setattr(validate, "_MAX_STREAMS", 5)
    manifest = demo_bundle.manifest
    candidate, reference = OrtBackend(demo_bundle, capacity=8), OrtBackend(demo_bundle, capacity=2)

    def swapped(encoded: np.ndarray) -> np.ndarray:
        encoded[7:] = encoded[4:5]
        return encoded

    arguments: Any = (reference, speech(manifest)[1:], lambda share: None, [8])
    figures = validate_engine(manifest, manifest.chunk(160), "fp16", candidate, *arguments)
    assert figures["rows"] == 8 and figures["cosine"] > 0.999999
    faulty: Any = FaultyBackend(candidate, encode=swapped)
    with pytest.raises(EngineValidationError, match=r"in step \d, row 7 of a batch of 8"):
        validate_engine(manifest, manifest.chunk(160), "fp16", faulty, *arguments)


def test_engine_with_wrong_rows_is_not_stored(
    demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: only single streams were compared."""
    encode = OrtBackend.encode

    def faulty(self: OrtBackend, batch: Batch) -> Any:
        encoded, counts = encode(self, batch)
        return (wrong_above_8(encoded.copy()) if self._plans else encoded), counts

    monkeypatch.setattr(OrtBackend, "encode", faulty)
    with pytest.raises(EngineValidationError, match="row 8 of a batch of 9"):
        build_engine(demo_bundle, demo_bundle.manifest.chunk(560), "int8", PlanStore(tmp_path), backend="onnxruntime")
    assert PlanStore(tmp_path).all() == []


def test_validation_needs_enough_speech(demo_bundle: Bundle) -> None:
    backend = OrtBackend(demo_bundle, 2)
    clips = [speech(demo_bundle.manifest)[1]]
    with pytest.raises(
        EngineValidationError, match=r"the clips have \d steps of 1120 ms; validation needs at least 12"
    ):
        validate_engine(
            demo_bundle.manifest, demo_bundle.manifest.chunk(1120), "fp16", backend, OrtBackend(demo_bundle, 2), clips
        )


@pytest.mark.parametrize("fault", ["scale", "nan"])
def test_invalid_engine_is_not_stored(
    fault: str, demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight of one layer is changed while the engine is built."""
    from nemostream.engine import precision

    write = precision.write_int8_for_cpu

    def faulty(*arguments: Any, **options: Any) -> list[Path]:
        graph, *files = write(*arguments, **options)
        model = onnx.load(graph, load_external_data=False)
        name = "encoder.layers.2.feed_forward1.linear1.weight:scale"
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        where = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
        (weights,) = (file for file in files if file.name == tensor.external_data[0].value)
        scales = np.memmap(weights, np.float32, "r+", where["offset"], tuple(tensor.dims))
        scales[:] = scales * 30 if fault == "scale" else np.nan
        scales.flush()
        return [graph, *files]

    monkeypatch.setattr(precision, "write_int8_for_cpu", faulty)
    store = PlanStore(tmp_path)
    with pytest.raises(EngineValidationError, match=r"failed validation: .*(a cosine similarity|not finite)"):
        build_engine(demo_bundle, demo_bundle.manifest.chunk(560), "int8", store, backend="onnxruntime")
    assert store.all() == [] and not [*tmp_path.glob("[!.]*")]


def test_validation_of_random_weights(tiny_bundle: Bundle) -> None:
    """The model is not confident about any clip, so only the encoder is compared, and `tokens` is 0."""
    backends = FaultyBackend(OrtBackend(tiny_bundle, 2), emit=other_tokens), OrtBackend(tiny_bundle, 2)
    chunk = tiny_bundle.manifest.chunk(560)
    figures = validate_engine(tiny_bundle.manifest, chunk, "fp16", *backends, speech(tiny_bundle.manifest))  # type: ignore[arg-type]
    assert figures["tokens"] == 0 and figures["cosine"] > 0.999999


# -- invalid options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--backend", "openvino"], 2, "choose tensorrt or onnxruntime"),
        (["--backend", "onnxruntime", "--precision", "fp32"], 2, "fp32 needs no engine: the bundle itself runs"),
        (
            ["--backend", "onnxruntime", "--precision", "fp16"],
            2,
            "precision is 'fp16'; with onnxruntime for cpu, choose int8.",
        ),
        (
            ["--backend", "onnxruntime", "--precision", "int8", "--target", "cuda"],
            2,
            "with onnxruntime for cuda, choose fp32, fp16 or bf16.",
        ),
        (
            ["--backend", "onnxruntime", "--precision", "int8", "--target", "sm89"],
            2,
            "target is 'sm89'; onnxruntime runs on cpu or cuda",
        ),
        (["--backend", "onnxruntime", "--precision", "int4"], 2, "choose one of fp32, fp16, bf16, fp8, int8"),
        (["--backend", "onnxruntime", "--precision", "int8", "--chunk-ms", 100], 2, "choose one of 80, 160, 560, 1120"),
        (["--max-batch", 0, "--target", "sm89"], 2, "max_batch is 0"),
    ],
)
def test_invalid_build_options(options: list[object], code: int, message: str, build: Callable[..., Any]) -> None:
    got, out, err = build(*options)
    assert (got, out) == (code, "")
    assert err.startswith("nemostream: ") and message in err and err.count("\n") == 1


def test_invalid_load_options(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], type[NemostreamError], str]] = [
        ({"device": "tpu"}, OptionError, "device is 'tpu'; choose cpu or cuda"),
        ({"precision": "fp16"}, OptionError, "a CPU runs fp32 and int8, not fp16"),
        ({"precision": "int8"}, BackendError, "has no int8 engine of .*: nemostream build .* --backend onnxruntime"),
        ({"precision": "int8", "max_batch": 0}, BackendError, "has no int8 engine"),
        ({"max_batch": 0}, OptionError, "max_batch is 0"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            nemostream.load(engines=tmp_path, **options)


def test_check_chunks(demo_bundle: Bundle) -> None:
    assert [chunk.ms for chunk in check_chunks(demo_bundle, None)] == [80, 160, 560, 1120]
    assert [chunk.ms for chunk in check_chunks(demo_bundle, [560, 80])] == [560, 80]
    with pytest.raises(OptionError):
        check_chunks(demo_bundle, [90])


# -- building for a GPU ------------------------------------------------------------------------------------------------


def test_build_for_another_gpu(build: Callable[..., Any], tmp_path: Path) -> None:
    """An interrupted build continues with the next chunk size. The engines are not validated, as the output states."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    code, out, err = build("--target", "sm89", "--chunk-ms", 80, "--max-batch", 2)
    assert code == 0, err
    assert "not validated yet: it will be compared with fp32 when it is loaded" in err
    code, both, err = build("--target", "sm89", "--chunk-ms", 80, "--chunk-ms", 160, "--max-batch", 2)
    assert (code, both.splitlines()[0], err.count("already built"), err.count("built in")) == (0, out.strip(), 1, 1)
    for plan in PlanStore(tmp_path / "engines").all():
        assert (plan.recipe.device, plan.recipe.backend, plan.recipe.cache_dtype) == ("sm89", "tensorrt-rtx", "float16")
        assert dict(plan.validation) == {} and plan.path.suffix == ".engine"
    code, _, err = build("--target", "sm70")
    assert code == 2 and "cannot build for sm70 without that GPU" in err


def test_build_for_the_cuda_provider(build: Callable[..., Any], tmp_path: Path) -> None:
    code, out, err = build("--backend", "onnxruntime", "--target", "cuda", "--chunk-ms", 80)
    assert code == 0, err
    (plan,) = PlanStore(tmp_path / "engines").all()
    assert (plan.recipe.precision, plan.recipe.device, plan.recipe.cache_dtype) == ("fp16", "cuda", "float16")
    onnx.checker.check_model(out.strip(), full_check=True)


def test_build_without_a_gpu(build: Callable[..., Any]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    pytest.importorskip("cuda.core", reason="needs cuda-core")
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU here")
    code, out, err = build()
    assert (code, out) == (7, "") and "no NVIDIA GPU to build for: name one with --target (sm89)" in err
    with pytest.raises(BackendError, match="no usable NVIDIA GPU"):
        nemostream.load(device="cuda")


def test_build_for_an_h100_with_tensorrt_for_rtx(
    demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: an engine was built for a GPU that the library does not support."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    from nemostream import engines

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(engines, "_gpu_here", lambda: "sm90")
    chunk, store = demo_bundle.manifest.chunk(80), PlanStore(tmp_path)
    for target in (None, "sm90"):
        with pytest.raises(
            BackendError, match=r"does not support this GPU \(sm90\), only sm75, .*--backend onnxruntime"
        ):
            build_engine(demo_bundle, chunk, "fp16", store, target=target)
    options = (demo_bundle, chunk, "fp16", "tensorrt")
    assert not engines._choose_builder(*options, "sm89", 8, True).runs_here  # another GPU's
    monkeypatch.setattr(engines, "_gpu_here", lambda: "sm89")
    for target in (None, "sm89"):
        builder = engines._choose_builder(*options, target, 8, True)
        assert (builder.runs_here, builder.recipe.device, builder.recipe.backend) == (True, "sm89", "tensorrt-rtx")


def test_build_without_tensorrt(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from nemostream.engine import tensorrt

    monkeypatch.setattr(tensorrt, "_MODULES", {"no_such_tensorrt": "tensorrt"})
    code, out, err = build("--target", "sm89")
    assert (code, out) == (7, "")
    assert "TensorRT is not installed (No module named 'no_such_tensorrt'): " + install_command("tensorrt") in err


@pytest.mark.skipif(MISSING, reason="needs g++ to run the kernels on a CPU")
def test_engine_from_another_machine_is_validated_when_loaded(
    build: Callable[..., Any], tmp_path: Path, demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is simulated on the CPU, the engine is replaced by ONNX Runtime, first with wrong results."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    assert build("--target", "sm89", "--chunk-ms", 560, "--max-batch", 2)[0] == 0
    store, encoder = PlanStore(tmp_path / "engines"), OrtEncoder

    def open_gpu(bundle: Bundle, device: Any, plans: Any, capacity: int, max_batch: int) -> Any:
        encoders = {ms: encoder(bundle, bundle.manifest.chunk(ms), device) for ms in plans}
        return GpuBackend(bundle, device, encoders, capacity=capacity, max_batch=max_batch)

    class Sm89(HostDevice):
        architecture = "sm89"

    class WrongEncoder(OrtEncoder):
        def bind(self, rows: int, addresses: Any) -> Any:
            enqueue, encoded = super().bind(rows, addresses), addresses["encoded_joint"]
            size = (rows, 7, demo_bundle.manifest.decoder.joint)

            def negate() -> None:
                self._device.view(encoded, size, np.float32)[...] *= -1

            def run() -> None:
                enqueue()
                self._device.queue(negate)

            return run

    monkeypatch.setattr("nemostream.runtime.backends.gpu.cuda.CudaDevice", Sm89)
    monkeypatch.setattr("nemostream.engines.open_gpu", open_gpu)
    options: dict[str, Any] = {"device": "cuda", "engines": store.folder, "max_batch": 2}
    encoder = WrongEncoder
    with pytest.raises(
        EngineValidationError, match=r"the fp16 engine for 560 ms failed validation: .*cosine similarity of -1"
    ):
        nemostream.load(**options)
    assert not store.all()[0].validation
    encoder = OrtEncoder
    with nemostream.load(**options) as model, nemostream.load(threads=1) as cpu:
        assert model.transcribe(nemostream.demo_clip()).text == cpu.transcribe(nemostream.demo_clip()).text
    (plan,) = store.all()
    assert plan.validation["steps"] == 42 and plan.validation["cosine"] > 0.99999
    with pytest.raises(BackendError, match=r"has no fp16 engine .* for this sm89: nemostream build .* --max-batch 64"):
        nemostream.load(device="cuda", engines=store.folder)  # the engine is for batches of at most 2


def test_engines_with_unverified_hashes_are_not_used(demo_bundle: Bundle, tmp_path: Path) -> None:
    """Regression: a description under another name was used without checking the paths and hashes of its files."""
    import onnxruntime

    from nemostream.engines import open_backend
    from nemostream.plans import Recipe

    recipe = Recipe.of(
        demo_bundle,
        560,
        backend="onnxruntime",
        library=onnxruntime.__version__,
        precision="int8",
        device="cpu",
        max_batch=0,
        cache_dtype="float32",
    )
    store, outside = PlanStore(tmp_path / "engines"), tmp_path / "outside.onnx"
    shutil.copy(demo_bundle.file("encoder-560ms"), outside)
    shutil.copy(demo_bundle.path / "weights.bin", tmp_path)

    def make(folder: Path) -> list[Path]:
        for name in ("encoder-560ms.onnx", "weights.bin"):
            shutil.copy(demo_bundle.path / name, folder)
        return [folder / "encoder-560ms.onnx", folder / "weights.bin"]

    store.put(recipe, make, lambda plan: {})
    open_backend(demo_bundle, precision="int8", engines=store.folder).close()  # it is used under its own name
    described = store.folder / f"{recipe.stem}.json"
    document = json.loads(described.read_text())
    document["files"][0] = {"file": str(outside), "sha256": "0" * 64, "bytes": 1}
    described.unlink()
    (store.folder / "anything.json").write_text(json.dumps(document))
    with pytest.raises(BackendError, match="has no int8 engine"):
        open_backend(demo_bundle, precision="int8", engines=store.folder)
    described.write_text(json.dumps(document))
    with pytest.raises(BackendError, match="has no int8 engine"):
        open_backend(demo_bundle, precision="int8", engines=store.folder)
    document["files"][0] |= {"file": "encoder-560ms.onnx"}
    described.write_text(json.dumps(document))
    with pytest.raises(BackendError, match="missing or damaged; build the engine again"):
        open_backend(demo_bundle, precision="int8", engines=store.folder)


def test_graphs_that_do_not_match_the_manifest(demo_bundle: Bundle) -> None:
    from nemostream.engines import open_backend

    decoder = dataclasses.replace(demo_bundle.manifest.decoder, layers=2)
    bundle = Bundle(demo_bundle.path, dataclasses.replace(demo_bundle.manifest, decoder=decoder))
    with pytest.raises(
        BackendError, match="its graphs do not match its manifest; export the checkpoint again"
    ) as error:
        open_backend(bundle, capacity=2)
    assert "\n" not in str(error.value)
