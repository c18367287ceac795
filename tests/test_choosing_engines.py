"""Which stored engines are used, how a backend is opened, and what `load` passes on: no engine runs."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nemostream
from nemostream import engines
from nemostream.bundle import Bundle
from nemostream.engines import build_engine, open_backend, open_gpu
from nemostream.errors import BackendError, BundleError, OptionError
from nemostream.plans import Plan, PlanStore, Recipe

VERSIONS = {"tensorrt": "11.0", "tensorrt-rtx": "2.0", "onnxruntime": "1.30"}


class Opened(BaseException):
    """Raised instead of opening a backend, with the arguments; not an error of a library."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlanStore:
    """An empty store; libraries have the versions `VERSIONS`, and the GPU is an sm89."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise Opened(*arguments, **options)

    monkeypatch.setattr(engines, "_version", VERSIONS.__getitem__)
    monkeypatch.setattr("nemostream.runtime.backends.cpu.OrtBackend", refuse)
    monkeypatch.setattr("nemostream.runtime.backends.gpu.cuda.CudaDevice", lambda: SimpleNamespace(architecture="sm89"))
    monkeypatch.setattr(engines, "open_gpu", refuse)
    return PlanStore(tmp_path / "engines")


def put(store: PlanStore, bundle: Bundle, ms: int = 560, **changes: Any) -> Plan:
    """Store a plan with files that no library reads."""
    fields = {"backend": "tensorrt", "precision": "fp16", "device": "sm89", "max_batch": 64, "cache_dtype": "float16"}
    graph = {name: changes.pop(name) for name in ("graph_sha256", "weights_sha256") if name in changes}
    fields |= changes
    recipe = Recipe.of(bundle, ms, **{"library": VERSIONS[str(fields["backend"])]} | fields)

    def build(folder: Path) -> list[Path]:
        (folder / f"{recipe.stem}.engine").write_bytes(recipe.stem.encode())
        return [folder / f"{recipe.stem}.engine"]

    recipe = dataclasses.replace(recipe, **graph)
    return store.put(recipe, build, lambda plan: {"cosine": 1.0})


INT8: dict[str, Any] = {
    "backend": "onnxruntime",
    "precision": "int8",
    "device": "cpu",
    "max_batch": 0,
    "cache_dtype": "float32",
}


def opened(bundle: Bundle, store: PlanStore, **options: Any) -> Opened:
    with pytest.raises(Opened) as caught:
        open_backend(bundle, engines=store.folder, **options)
    return caught.value


def test_engines_with_the_operator_are_preferred_where_it_runs(
    demo_bundle: Bundle, store: PlanStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix = ["+int8-linear.1"]
    monkeypatch.setattr("nemostream.runtime.backends.operators.engine_suffix", lambda: suffix[0])
    plain = put(store, demo_bundle, **INT8)
    assert opened(demo_bundle, store, precision="int8").options["plans"][560].recipe == plain.recipe
    fused = put(store, demo_bundle, **INT8, library="1.30+int8-linear.1")
    put(store, demo_bundle, **INT8, library="1.30+int8-linear.2")
    assert opened(demo_bundle, store, precision="int8").options["plans"][560].recipe == fused.recipe
    suffix[0] = ""  # not compiled, or another processor
    assert opened(demo_bundle, store, precision="int8").options["plans"][560].recipe == plain.recipe


def test_an_engine_for_this_cpu(demo_bundle: Bundle, store: PlanStore) -> None:
    plans = {ms: put(store, demo_bundle, ms, **INT8) for ms in (80, 560)}
    call = opened(demo_bundle, store, precision="int8", capacity=5, max_batch=3, threads=2)
    assert call.arguments == (demo_bundle,)
    found = call.options.pop("plans")
    assert call.options == {"capacity": 5, "max_batch": 3, "threads": 2}
    assert {ms: plan.recipe for ms, plan in found.items()} == {ms: plan.recipe for ms, plan in plans.items()}
    for precision in (None, "fp32"):
        assert opened(demo_bundle, store, precision=precision).options["plans"] is None
    assert opened(demo_bundle, store, precision="int8", chunk_ms=80)
    with pytest.raises(BackendError, match="no engine for chunks of 160 ms, only for 80, 560 ms"):
        open_backend(demo_bundle, engines=store.folder, precision="int8", chunk_ms=160)


@pytest.mark.parametrize(
    "changes",
    [
        {"graph_sha256": "a" * 64},
        {"weights_sha256": "a" * 64},
        {"precision": "fp8"},
        {"device": "cuda"},
        {"device": "sm89"},
        {"device": "cpu, not validated"},
        {"backend": "tensorrt", "library": "1.30"},
        {"library": "1.29"},
    ],
    ids=str,
)
def test_engines_that_differ_in_one_field_are_not_used_on_a_cpu(
    changes: dict[str, Any], demo_bundle: Bundle, store: PlanStore
) -> None:
    put(store, demo_bundle, **{**INT8, **changes})
    with pytest.raises(BackendError) as caught:
        open_backend(demo_bundle, engines=store.folder, precision="int8")
    assert str(caught.value) == (
        f"{store.folder} has no int8 engine of {demo_bundle.path} for this cpu: "
        f"nemostream build {demo_bundle.path} --precision int8 --backend onnxruntime"
    )
    put(store, demo_bundle, **INT8)
    assert opened(demo_bundle, store, precision="int8")


GPU: list[tuple[list[dict[str, Any]], dict[str, Any], int | None]] = [
    ([{}], {}, 0),
    ([{"precision": "bf16"}], {}, None),
    ([{"precision": "bf16"}], {"precision": "bf16"}, 0),
    ([{"device": "sm90"}, {"device": "cpu"}, {"device": "sm89, not validated"}], {}, None),
    ([{"device": "cuda", "backend": "onnxruntime", "max_batch": 0}], {}, 0),
    ([{"library": "10.9"}], {}, None),
    ([{"backend": "tensorrt-rtx"}], {}, 0),
    ([{"max_batch": 63}], {}, None),  # the default is 64
    ([{"max_batch": 63}], {"max_batch": 63}, 0),
    ([{"max_batch": 63}], {"capacity": 63}, 0),
    ([{"max_batch": 63}], {"capacity": 64, "max_batch": 64}, None),
    ([{"max_batch": 63}], {"capacity": 63, "max_batch": 64}, 0),
    # The smallest sufficient batch, and TensorRT before ONNX Runtime.
    ([{"max_batch": 256}, {"max_batch": 64}, {"max_batch": 128}, {"max_batch": 32}], {}, 1),
    ([{"max_batch": 256}, {"max_batch": 64}, {"max_batch": 128}, {"max_batch": 32}], {"max_batch": 20}, 3),
    ([{"device": "cuda", "backend": "onnxruntime", "max_batch": 0}, {"max_batch": 512}], {}, 1),
    ([{"device": "cuda", "backend": "onnxruntime", "max_batch": 0}, {"max_batch": 32}], {}, 0),
]


@pytest.mark.parametrize(("stored", "options", "chosen"), GPU, ids=range(len(GPU)))
def test_the_engine_for_a_gpu(
    stored: list[dict[str, Any]],
    options: dict[str, Any],
    chosen: int | None,
    demo_bundle: Bundle,
    store: PlanStore,
) -> None:
    plans = [put(store, demo_bundle, **changes) for changes in stored]
    options = {"capacity": 1000, **options}
    rows = min(options.get("max_batch", 64), options["capacity"])
    if chosen is None:
        precision = options.get("precision", "fp16")
        command = f"nemostream build {demo_bundle.path} --precision {precision} --max-batch {rows}"
        with pytest.raises(BackendError, match=f"has no {precision} engine of .* for this sm89: {command}$"):
            open_backend(demo_bundle, engines=store.folder, device="cuda", **options)
        return
    call = opened(demo_bundle, store, device="cuda", **options)
    bundle, device, found, capacity, max_batch = call.arguments
    assert (bundle, device.architecture) == (demo_bundle, "sm89")
    assert (capacity, max_batch) == (options["capacity"], rows)
    assert {ms: plan.recipe for ms, plan in found.items()} == {560: plans[chosen].recipe}


def test_engines_that_were_not_validated_are_validated_once(
    demo_bundle: Bundle, store: PlanStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    validated: list[tuple[int, str]] = []

    def validate(bundle: Bundle, chunk: Any, plan: Plan, progress: Any) -> dict[str, Any]:
        validated.append((chunk.ms, plan.recipe.graph))
        return {"cosine": 0.99995}

    monkeypatch.setattr(engines, "_validate", validate)
    plan = put(store, demo_bundle, 80)
    put(store, demo_bundle, 560)
    store.save_validation(plan, {})
    for _ in range(2):
        found = opened(demo_bundle, store, device="cuda").arguments[2]
        assert {ms: dict(plan.validation) for ms, plan in found.items()} == {
            80: {"cosine": 0.99995},
            560: {"cosine": 1.0},
        }
    assert validated == [(80, "encoder-80ms")]


def test_devices_and_precisions_that_do_not_exist(demo_bundle: Bundle, store: PlanStore) -> None:
    for options, message in (
        ({"device": "gpu"}, "device is 'gpu'; choose cpu or cuda"),
        ({"precision": "bf16"}, "a CPU runs fp32 and int8, not bf16"),
    ):
        with pytest.raises(OptionError, match=message):
            open_backend(demo_bundle, engines=store.folder, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (MemoryError(), BackendError, "not enough memory for 7 streams of .*; choose a smaller capacity"),
        (ValueError("bad shape\nmore"), BackendError, r"cannot be loaded \(ValueError: bad shape\): its graphs do not"),
        (OptionError("max_batch is 0."), OptionError, r"^max_batch is 0\.$"),
    ],
)
def test_errors_of_libraries_are_one_sentence(
    error: Exception, kind: type[Exception], message: str, demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("nemostream.runtime.backends.cpu.OrtBackend", fail)
    with pytest.raises(kind, match=message) as caught:
        open_backend(demo_bundle, capacity=7)
    assert "\n" not in str(caught.value)


# -- opening a GPU -----------------------------------------------------------------------------------------------------


class Closable:
    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.closed = arguments, 0

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("fails", [None, "encoder", "backend"])
def test_a_gpu_that_cannot_be_opened_is_closed(
    fails: str | None, demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Device and encoders are closed once each, so that another attempt has the memory."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    from nemostream.runtime.backends.gpu.memory import activation_bytes, encoder_sizes

    store, device, made = PlanStore(tmp_path), Closable(), list[Closable]()
    plans = {
        80: put(store, demo_bundle, 80),
        160: put(store, demo_bundle, 160, backend="onnxruntime", device="cuda", max_batch=0),
        560: put(store, demo_bundle, 560, backend="tensorrt-rtx"),
    }

    def encoder(*arguments: Any) -> Closable:
        if fails == "encoder" and len(made) == 2:
            raise RuntimeError("out of memory")
        made.append(Closable(*arguments))
        return made[-1]

    def backend(*arguments: Any, **options: Any) -> Any:
        if fails == "backend":
            raise RuntimeError("out of memory")
        return arguments, options

    monkeypatch.setattr("nemostream.runtime.backends.gpu.onnxruntime.OrtCudaEncoder", encoder)
    monkeypatch.setattr("nemostream.runtime.backends.gpu.tensorrt.TrtEncoder", encoder)
    monkeypatch.setattr("nemostream.runtime.backends.gpu.backend.GpuBackend", backend)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            open_gpu(demo_bundle, device, plans, 20, 10)
        assert [one.closed for one in made] == [1] * (3 if fails == "backend" else 2) and device.closed == 1
        return
    (bundle, opened_device, encoders), options = open_gpu(demo_bundle, device, plans, 20, 10)
    assert (bundle, opened_device, options) == (demo_bundle, device, {"capacity": 20, "max_batch": 10})
    assert encoders == dict(zip(plans, made, strict=True)) and device.closed == 0
    assert [one.closed for one in made] == [0, 0, 0]
    tensorrt, onnxruntime, rtx = (one.arguments for one in made)
    sha256 = plans[80].files[0].sha256
    assert tensorrt == (plans[80].path, "tensorrt", "float16", device, sha256)
    assert rtx == (plans[560].path, "tensorrt_rtx", "float16", device, plans[560].files[0].sha256)
    chunk = demo_bundle.manifest.chunk(160)
    row_bytes = activation_bytes(demo_bundle.manifest, chunk, encoder_sizes(demo_bundle, chunk).channels)
    assert onnxruntime == (plans[160].path, demo_bundle.graph("encoder-160ms"), "float16", device, row_bytes)


# -- building ----------------------------------------------------------------------------------------------------------


def test_an_engine_is_built_once_and_again_if_it_is_damaged(
    demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graph conversion and validation are replaced; the store and the order of the calls are real."""
    pytest.importorskip("onnx", reason="needs the build extra")
    calls: list[str] = []

    def write(bundle: Bundle, chunk: Any, folder: Path, stem: str, *, fused: bool) -> list[Path]:
        calls.append(f"build {chunk.ms}")
        (folder / f"{stem}.bin").write_bytes(b"weights")
        return [folder / f"{stem}.bin"]

    def validate(bundle: Bundle, chunk: Any, plan: Plan, progress: Any) -> dict[str, Any]:
        calls.append(f"validate {chunk.ms}")
        return {"cosine": 0.999}

    monkeypatch.setattr("nemostream.engine.precision.write_int8_for_cpu", write)
    monkeypatch.setattr(engines, "_validate", validate)
    store, chunk, messages = PlanStore(tmp_path), demo_bundle.manifest.chunk(560), list[tuple[str, float]]()
    arguments: Any = (demo_bundle, chunk, "int8", store)
    options: Any = {"backend": "onnxruntime", "progress": lambda what, share: messages.append((what, share))}
    plan, built = build_engine(*arguments, **options)
    assert built and calls == ["build 560", "validate 560"] and dict(plan.validation) == {"cosine": 0.999}
    recipe = plan.recipe
    assert (recipe.backend, recipe.precision, recipe.device) == ("onnxruntime", "int8", "cpu")
    assert (recipe.graph, recipe.max_batch, recipe.cache_dtype) == ("encoder-560ms", 0, "float32")
    assert build_engine(*arguments, **options) == (store.find(recipe), False) and len(calls) == 2 and not messages
    plan.path.write_bytes(b"damaged")
    assert build_engine(*arguments, **options)[1] and calls[2:] == ["build 560", "validate 560"]
    assert [share for _, share in messages] == [0.0] and "damaged; build the engine again" in messages[0][0]
    calls.clear()
    plan, built = build_engine(*arguments, validate=False, **options)
    assert built and calls == ["build 560"] and not plan.validation
    assert plan.recipe == dataclasses.replace(recipe, device="cpu, not validated")


class Backend(Closable):
    """A backend that records how it was opened."""

    made: list[Backend]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments)
        self.options = options
        self.made.append(self)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_validation_opens_and_closes_both_backends(
    device: str, fails: bool, demo_bundle: Bundle, store: PlanStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 on the CPU beside the engine, for the packaged speech and batches of the engine's kernels."""
    pytest.importorskip("onnx", reason="needs the build extra")
    kind = type("Recorded", (Backend,), {"made": []})
    calls: list[tuple[Any, ...]] = []

    def validate(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        arguments[6](0.25)
        if fails:
            raise OptionError("it differs.")
        return {"cosine": 0.9999}

    monkeypatch.setattr("nemostream.engine.validate.validate_engine", validate)
    monkeypatch.setattr("nemostream.runtime.backends.cpu.OrtBackend", kind)
    monkeypatch.setattr(engines, "open_gpu", kind)
    messages: list[tuple[str, float]] = []
    chunk = demo_bundle.manifest.chunk(560)
    if device == "cpu":
        monkeypatch.setattr(
            "nemostream.engine.precision.write_int8_for_cpu",
            lambda bundle, chunk, folder, stem, fused: [empty(folder / stem)],
        )

        def use() -> Any:
            options: Any = {"backend": "onnxruntime", "progress": lambda what, share: messages.append((what, share))}
            return build_engine(demo_bundle, chunk, "int8", store, **options)[0].validation
    else:
        store.save_validation(put(store, demo_bundle, max_batch=20), {})

        def use() -> Any:
            open_backend(demo_bundle, engines=store.folder, device="cuda", max_batch=20)
            return store.all()[0].validation

    if fails:
        with pytest.raises(OptionError, match="it differs"):
            use()
        assert device == "cuda" or store.all() == []
    else:
        assert use() == {"cosine": 0.9999}
    reference, candidate = kind.made[:2]
    assert (reference.arguments, reference.options) == ((demo_bundle,), {"capacity": 2})
    assert (reference.closed, candidate.closed) == (1, 1)
    ((manifest, chunk_of_call, precision, *backends, clips, _, batches),) = calls
    assert (manifest, chunk_of_call) == (demo_bundle.manifest, chunk) and backends == [candidate, reference]
    assert precision == ("int8" if device == "cpu" else "fp16")
    assert [len(clip) for clip in clips] == [len(clip) for clip in engines.speech(manifest)]
    if device == "cpu":
        assert batches == (2, 9) and messages == [("comparison with fp32", 0.25)]
        assert candidate.arguments == (demo_bundle,) and candidate.options["capacity"] == 9
        assert list(candidate.options["plans"]) == [560]
    else:
        from nemostream.engine.tensorrt import profiles
        from nemostream.runtime.backends.gpu.backend import buckets

        ends = {end for profile in profiles(20) for end in profile}
        assert set(batches) == (set(buckets(20)) | ends) - {1} and list(batches) == sorted(batches)
        assert 20 in batches and candidate.arguments[3:] == (20, 20) and list(candidate.arguments[2]) == [560]


class Library:
    """TensorRT without a compiler: an engine has the content of the graph's name."""

    name, version = "tensorrt", "11.2"

    def __init__(self, architecture: str, present: bool) -> None:
        self.architecture, self.present = architecture, present

    def build(self, graph: Path, max_batch: int, timings: Path, progress: Any) -> bytes:
        progress("compilation", 0.5)
        return f"{graph.name} {max_batch} {timings}".encode()


@pytest.mark.parametrize(("target", "architecture"), [(None, "sm89"), ("sm89", "sm89"), ("sm90", "sm90")])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_what_is_built_for_a_gpu(
    target: str | None,
    architecture: str,
    precision: str,
    demo_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Recipe, inputs of the compiler and files; only an engine for the GPU of this machine is validated."""
    pytest.importorskip("onnx", reason="needs the build extra")
    written: list[tuple[Any, ...]] = []
    messages: list[tuple[str, float]] = []

    def write(*arguments: Any) -> list[Path]:
        written.append(arguments)
        *_, folder, stem = arguments
        return [empty(folder / f"{stem}.onnx"), empty(folder / f"{stem}.bin")]

    def measure(bundle: Bundle, chunk: Any, clips: list[Any], progress: Any) -> dict[str, float]:
        assert bundle == demo_bundle and chunk.ms == 560 and len(clips) == 2
        progress(0.5)
        return {"a": 2.0}

    monkeypatch.setattr(engines, "_gpu_here", lambda: "sm89")
    monkeypatch.setattr("nemostream.engine.tensorrt.TensorRT", Library)
    monkeypatch.setattr("nemostream.engine.precision.write_typed", write)
    monkeypatch.setattr("nemostream.engine.calibration.measure_ranges", measure)
    monkeypatch.setattr(engines, "_validate", lambda bundle, chunk, plan, progress: {"chunk": chunk.ms})
    store, chunk = PlanStore(tmp_path), demo_bundle.manifest.chunk(560)
    options: Any = {"target": target, "max_batch": 1, "progress": lambda what, share: messages.append((what, share))}
    plan, built = build_engine(demo_bundle, chunk, precision, store, **options)
    recipe = Recipe.of(
        demo_bundle,
        560,
        backend="tensorrt",
        library="11.2",
        precision=precision,
        device=architecture,
        max_batch=1,
        cache_dtype="float16",
    )
    assert built and plan.recipe == recipe
    assert dict(plan.validation) == ({"chunk": 560} if architecture == "sm89" else {})
    ((bundle, chunk_written, precision_written, ranges, _, stem),) = written
    assert (bundle, chunk_written, precision_written, stem) == (demo_bundle, chunk, precision, recipe.stem)
    assert ranges == ({"a": 2.0} if precision == "int8" else None)
    timings = tmp_path / f"timings-tensorrt-11.2-{architecture}.cache"
    assert plan.path.name == f"{recipe.stem}.engine"
    assert plan.path.read_text() == f"{recipe.stem}.onnx 1 {timings}"
    assert [path.name for path in tmp_path.glob("[!.]*.onnx")] == [], "graph and weights are not kept"
    assert {path.suffix for path in tmp_path.glob("[!.]*")} == {".engine", ".json"}
    calibration = [("calibration on speech", 0.5)] if precision == "int8" else []
    assert messages == [("graph conversion", 0.0), *calibration, ("compilation", 0.5)]
    limit = 2**31
    with pytest.raises(OptionError, match=f"max_batch is {limit}: with chunks of 560 ms"):
        build_engine(demo_bundle, chunk, precision, store, max_batch=limit)
    monkeypatch.setattr(engines, "_gpu_here", lambda: "")
    with pytest.raises(BackendError, match="there is no NVIDIA GPU to build for: name one with --target"):
        build_engine(demo_bundle, chunk, precision, store)


@pytest.mark.parametrize("available", [True, False])
def test_what_is_built_for_the_cuda_provider(
    available: bool, demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is validated if ONNX Runtime has the provider."""
    pytest.importorskip("onnx", reason="needs the build extra")
    import onnxruntime

    written: list[tuple[Any, ...]] = []

    def write(*arguments: Any) -> list[Path]:
        written.append(arguments[:4])
        return [empty(arguments[4] / f"{arguments[5]}.onnx"), empty(arguments[4] / f"{arguments[5]}.bin")]

    providers = ["CPUExecutionProvider", *(["CUDAExecutionProvider"] if available else [])]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr("nemostream.engine.precision.write_typed", write)
    monkeypatch.setattr(engines, "_validate", lambda bundle, chunk, plan, progress: {"chunk": chunk.ms})
    chunk = demo_bundle.manifest.chunk(80)
    options: Any = {"backend": "onnxruntime", "target": "cuda"}
    plan, _ = build_engine(demo_bundle, chunk, "bf16", PlanStore(tmp_path), **options)
    recipe = plan.recipe
    assert (recipe.device, recipe.max_batch, recipe.cache_dtype) == ("cuda", 0, "bfloat16")
    assert (recipe.backend, recipe.library) == ("onnxruntime", onnxruntime.__version__)
    assert dict(plan.validation) == ({"chunk": 80} if available else {})
    assert written == [(demo_bundle, chunk, "bf16", None)]
    for precision in ("int8", "fp8"):
        with pytest.raises(OptionError, match=f"precision is .{precision}.; .* choose fp32, fp16 or bf16") as caught:
            build_engine(demo_bundle, chunk, precision, PlanStore(tmp_path), **options)
        assert "needs no engine" not in str(caught.value)
    with pytest.raises(OptionError, match="max_batch is 0; it must be at least 1"):
        build_engine(demo_bundle, chunk, "fp16", PlanStore(tmp_path), max_batch=0)


def empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def test_an_engine_that_does_not_fit_is_not_validated(
    demo_bundle: Bundle, store: PlanStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type("Recorded", (Backend,), {"made": []})

    def fail(*arguments: Any) -> None:
        raise BackendError("not enough memory.")

    monkeypatch.setattr("nemostream.runtime.backends.cpu.OrtBackend", kind)
    monkeypatch.setattr(engines, "open_gpu", fail)
    plan = put(store, demo_bundle, backend="onnxruntime", device="cuda", max_batch=0)
    store.save_validation(plan, {})
    message = r"validated with 64 streams in a step \(not enough memory\); build it with a smaller --max-batch"
    with pytest.raises(BackendError, match=message):
        open_backend(demo_bundle, engines=store.folder, device="cuda", capacity=500)
    assert [one.closed for one in kind.made] == [1]


# -- the public interface ----------------------------------------------------------------------------------------------


def test_load_passes_every_option_on(monkeypatch: pytest.MonkeyPatch, demo_bundle: Bundle) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise Opened(*arguments, **options)

    monkeypatch.setattr("nemostream.engines.open_backend", refuse)
    options = {
        "device": "cuda",
        "precision": "bf16",
        "capacity": 5,
        "max_batch": 4,
        "threads": 3,
        "engines": "somewhere",
    }
    with pytest.raises(Opened) as caught:
        nemostream.load(nemostream.demo_bundle(), 80, **options)  # type: ignore[arg-type]
    assert caught.value.options == options | {"chunk_ms": 80} and caught.value.arguments == (demo_bundle,)
    with pytest.raises(Opened) as caught:
        nemostream.load()
    assert caught.value.arguments == (demo_bundle,)
    assert caught.value.options == {
        "device": "cpu",
        "precision": None,
        "capacity": 64,
        "max_batch": None,
        "threads": None,
        "engines": None,
        "chunk_ms": 560,
    }
    parameters = inspect.signature(nemostream.load).parameters
    assert (parameters["confidence"].default, parameters["delay_ms"].default) == (None, 0)
    with pytest.raises(OptionError, match="chunk size 90 ms is not supported"):  # before a backend is opened
        nemostream.load(chunk_ms=90)


def test_load_sets_the_defaults_of_streams() -> None:
    confidence = nemostream.Confidence("max_prob")
    with nemostream.load(chunk_ms=1120, capacity=2, threads=1, confidence=confidence, delay_ms=160) as model:
        delayed = model.transcribe(nemostream.demo_clip()).tokens
    with nemostream.load(chunk_ms=1120, capacity=2, threads=1) as model:
        plain = model.transcribe(nemostream.demo_clip()).tokens
        wanted = model.transcribe(nemostream.demo_clip(), confidence=confidence).tokens
    assert [token.id for token in delayed] == [token.id for token in plain]
    assert [token.confidence for token in delayed] == [token.confidence for token in wanted]
    assert [token.confidence for token in delayed] != [token.confidence for token in plain]
    later = [(early, token) for early, token in zip(delayed, plain, strict=True) if token.time > 0.2]
    assert later and all(early.time == pytest.approx(token.time - 0.16) for early, token in later)


def test_names_of_the_package_are_the_classes_of_that_name() -> None:
    for name in nemostream.__all__:
        value = getattr(nemostream, name)
        if inspect.isclass(value):
            assert value.__name__ == name and value.__module__.startswith("nemostream.")
    assert nemostream.__version__.count(".") >= 2
    with pytest.raises(AttributeError, match="module 'nemostream' has no attribute 'Modell'"):
        nemostream.Modell  # noqa: B018


def test_a_package_without_its_demo_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemostream.resources.files", lambda name: tmp_path)
    with pytest.raises(BundleError, match=r"built without its demo bundle \(.*\); pass the path of a bundle"):
        nemostream.demo_bundle()
