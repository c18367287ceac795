"""Build engines, validate them, and open backends that use them.

`engine` and `runtime` do not import each other; this module connects them. Heavy modules are imported on use.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import Bundle, ChunkConfig, Manifest
from nemostream.clips import read_clip
from nemostream.errors import BackendError, NemostreamError, OptionError
from nemostream.extras import install_command
from nemostream.plans import PRECISIONS, Plan, PlanStore, Recipe, missing_engine_error

if TYPE_CHECKING:
    from nemostream.runtime.backends.base import Backend

Progress = Callable[[str, float], None]  # what is being done, and the share that is done (0 to 1)

# Supported precisions. On a CPU, ONNX Runtime supports neither 16-bit nor 8-bit floats. On a GPU, only TensorRT is
# faster with 8 bit.
_PRECISIONS = {
    ("tensorrt", None): PRECISIONS,
    ("onnxruntime", "cpu"): ("int8",),
    ("onnxruntime", "cuda"): ("fp32", "fp16", "bf16"),
}

# Batches in the validation of an engine for a CPU, which has the same kernels for all sizes.
_CPU_BATCHES = (2, 9)
# Largest batch in the validation of an engine that was built without a limit.
_MAX_VALIDATED_BATCH = 64


def build_engine(
    bundle: Bundle,
    chunk: ChunkConfig,
    precision: str,
    store: PlanStore,
    *,
    backend: str = "tensorrt",
    target: str | None = None,
    max_batch: int = 64,
    validate: bool = True,
    progress: Progress = lambda what, share: None,
) -> tuple[Plan, bool]:
    """Return the engine of one chunk size, and whether it was built by this call or found in `store`.

    `backend` is "tensorrt", for the GPU of this machine or for another named by `target` ("sm89"), or "onnxruntime",
    for this CPU or, with `target` "cuda", for its CUDA provider. An engine that can run on this machine is validated
    (`engine.validate`). A damaged engine in the store is built again.

    With `validate=False` the engine is not compared with fp32, and is stored under a name that `open_backend` does not
    use. This is meant for timing random weights, for which 8 bit would fail validation.

    Raises `EngineValidationError` if the output differs too much from fp32, `OptionError` for options that cannot be
    built, and `BackendError` if a library is missing or fails.
    """
    builder = _choose_builder(bundle, chunk, precision, backend, target, max_batch, validate)
    try:
        plan = store.find(builder.recipe)
    except BackendError as error:
        progress(str(error), 0.0)
        plan = None
    if plan:
        return plan, False
    plan = store.put(
        builder.recipe,
        lambda folder: builder.build(folder, store, progress),
        lambda built: _validate(bundle, chunk, built, progress) if builder.runs_here and validate else {},
    )
    return plan, True


def open_backend(
    bundle: Bundle,
    *,
    device: str = "cpu",
    precision: str | None = None,
    capacity: int = 64,
    max_batch: int | None = None,
    threads: int | None = None,
    engines: str | Path | None = None,
    chunk_ms: int | None = None,
) -> Backend:
    """Open a backend on the CPU or a GPU ("cuda") with the engines of `nemostream build` in the folder `engines`.

    On the CPU, "fp32" (the default) needs no engine and "int8" does; on a GPU the default is "fp16". An engine that was
    built for this GPU on another machine is validated first. Raises `BackendError` if there is no engine, or none for
    `chunk_ms`, and `EngineValidationError` if validation fails.
    """
    from nemostream.runtime.backends.cpu import OrtBackend

    store = PlanStore(engines)
    if device == "cpu":
        plans: dict[int, Plan] | None = None
        if precision not in (None, "fp32"):
            if precision not in _PRECISIONS["onnxruntime", "cpu"]:
                raise OptionError(f"a CPU runs fp32 and int8, not {precision}; choose one of them, or device='cuda'.")
            plans = _find_plans(bundle, store, "onnxruntime", precision, "cpu", 0, chunk_ms)
        with _loading(bundle, capacity):
            return OrtBackend(bundle, capacity=capacity, max_batch=max_batch, threads=threads, plans=plans)
    if device != "cuda":
        raise OptionError(f"device is {device!r}; choose cpu or cuda.")
    from nemostream.runtime.backends.base import DEFAULT_MAX_BATCH
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    rows = min(max_batch or DEFAULT_MAX_BATCH, capacity)
    gpu = CudaDevice()
    plans = _find_plans(bundle, store, None, precision or "fp16", gpu.architecture, rows, chunk_ms)
    for ms, plan in plans.items():
        if not plan.validation:
            figures = _validate(bundle, bundle.manifest.chunk(ms), plan, lambda what, share: None)
            plans[ms] = store.save_validation(plan, figures)
    with _loading(bundle, capacity):
        return open_gpu(bundle, gpu, plans, capacity, rows)


@contextlib.contextmanager
def _loading(bundle: Bundle, capacity: int) -> Iterator[None]:
    """Raise `BackendError` for the errors of libraries that load graphs which do not match the manifest."""
    try:
        yield
    except NemostreamError:
        raise
    except MemoryError as error:
        raise BackendError(
            f"not enough memory for {capacity} streams of {bundle.path}; choose a smaller capacity."
        ) from error
    except Exception as error:  # each library has its own exceptions
        reason = str(error).strip().partition("\n")[0]
        raise BackendError(
            f"{bundle.path} cannot be loaded ({type(error).__name__}: {reason}): its graphs do not match its manifest; "
            "export the checkpoint again."
        ) from error


def open_gpu(bundle: Bundle, device: Any, plans: Mapping[int, Plan], capacity: int, max_batch: int) -> Any:
    """Open a GPU backend with the encoder of each plan, by chunk size in ms. Closes the device if that fails."""
    from nemostream.runtime.backends.gpu.backend import GpuBackend, StepEncoder
    from nemostream.runtime.backends.gpu.memory import activation_bytes, check_max_batch, encoder_sizes

    encoders: dict[int, StepEncoder] = {}
    try:
        chunks = {ms: bundle.manifest.chunk(ms) for ms in plans}
        channels = {ms: encoder_sizes(bundle, chunk).channels for ms, chunk in chunks.items()}
        check_max_batch(bundle.manifest, chunks.values(), max(channels.values()), min(max_batch, capacity))
        for ms, plan in plans.items():
            recipe = plan.recipe
            if recipe.backend == "onnxruntime":
                from nemostream.runtime.backends.gpu.onnxruntime import OrtCudaEncoder

                row_bytes = activation_bytes(bundle.manifest, chunks[ms], channels[ms])
                graph = bundle.graph(recipe.graph)
                encoders[ms] = OrtCudaEncoder(plan.path, graph, recipe.cache_dtype, device, row_bytes)
            else:
                from nemostream.runtime.backends.gpu.tensorrt import TrtEncoder

                library = recipe.backend.replace("-", "_")
                encoders[ms] = TrtEncoder(plan.path, library, recipe.cache_dtype, device, plan.files[0].sha256)
        return GpuBackend(bundle, device, encoders, capacity=capacity, max_batch=max_batch)
    except BaseException:
        # Another attempt, with a smaller capacity, needs the memory.
        for encoder in encoders.values():
            encoder.close()
        device.close()
        raise


def speech(manifest: Manifest) -> list[NDArray[np.float32]]:
    """Return the packaged clips [N] at the model's sample rate: 18 s of a novel, and the clip of the demo model."""
    return [read_clip(name, manifest.features.sample_rate) for name in ("speech", "clip")]


def check_chunks(bundle: Bundle, chunk_ms: Sequence[int] | None) -> list[ChunkConfig]:
    """Return the given chunk sizes, or all. Raises `OptionError` for one the model does not have."""
    return [bundle.manifest.chunk(ms) for ms in chunk_ms] if chunk_ms else list(bundle.manifest.chunks)


# -- builders ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Builder:
    """What to build, and the function that builds it in an empty folder and returns the files."""

    recipe: Recipe
    build: Callable[[Path, PlanStore, Progress], list[Path]]
    runs_here: bool  # whether the engine can run, and so be validated, on this machine


def _choose_builder(
    bundle: Bundle,
    chunk: ChunkConfig,
    precision: str,
    backend: str,
    target: str | None,
    max_batch: int,
    validate: bool,
) -> _Builder:
    """Check the options of `build_engine` and return the builder for them."""
    if max_batch < 1:
        raise OptionError(f"max_batch is {max_batch}; it must be at least 1.")
    if backend not in ("tensorrt", "onnxruntime"):
        raise OptionError(f"backend is {backend!r}; choose tensorrt or onnxruntime.")
    provider = None if backend == "tensorrt" else target or "cpu"
    if (backend, provider) not in _PRECISIONS:
        raise OptionError(f"target is {target!r}; onnxruntime runs on cpu or cuda.")
    if precision not in PRECISIONS:
        raise OptionError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    supported = _PRECISIONS[backend, provider]
    if precision not in supported:
        hint = " fp32 needs no engine: the bundle itself runs." if (provider, precision) == ("cpu", "fp32") else ""
        allowed = " or ".join(filter(None, [", ".join(supported[:-1]), supported[-1]]))
        raise OptionError(f"precision is {precision!r}; with {backend} for {provider}, choose {allowed}.{hint}")
    try:
        import nemostream.engine.precision  # noqa: F401
    except ImportError as error:
        raise BackendError(f"building engines needs onnx ({error}): {install_command('build')}.") from error
    note = "" if validate else ", not validated"  # part of the device's name, so that `open_backend` does not find it
    if provider:
        return _onnxruntime_builder(bundle, chunk, precision, provider, note)
    from nemostream.runtime.backends.gpu.memory import check_max_batch, encoder_sizes

    check_max_batch(bundle.manifest, [chunk], encoder_sizes(bundle, chunk).channels, max_batch)
    return _tensorrt_builder(bundle, chunk, precision, target, max_batch, note)


def _onnxruntime_builder(bundle: Bundle, chunk: ChunkConfig, precision: str, provider: str, note: str) -> _Builder:
    import onnxruntime

    from nemostream.engine import precision as graphs
    from nemostream.runtime.backends.operators import engine_suffix

    cpu = provider == "cpu"
    recipe = Recipe.of(
        bundle,
        chunk.ms,
        backend="onnxruntime",
        library=onnxruntime.__version__ + (engine_suffix() if cpu else ""),
        precision=precision,
        device=f"{provider}{note}",
        max_batch=0,
        cache_dtype="float32" if cpu else graphs.CACHE_DTYPES[precision],
    )

    def build(folder: Path, store: PlanStore, progress: Progress) -> list[Path]:
        if cpu:
            return graphs.write_int8_for_cpu(bundle, chunk, folder, recipe.stem, fused=bool(engine_suffix()))
        return graphs.write_typed(bundle, chunk, precision, None, folder, recipe.stem)

    return _Builder(recipe, build, cpu or "CUDAExecutionProvider" in onnxruntime.get_available_providers())


def _tensorrt_builder(
    bundle: Bundle, chunk: ChunkConfig, precision: str, target: str | None, max_batch: int, note: str
) -> _Builder:
    from nemostream.engine import precision as graphs
    from nemostream.engine.tensorrt import TensorRT

    local_gpu = _gpu_here()
    architecture = target or local_gpu
    if not architecture:
        raise BackendError(
            "there is no NVIDIA GPU to build for: name one with --target (sm89), build for this CPU with --backend "
            "onnxruntime --precision int8, or run `nemostream doctor` to see what the GPU of this machine lacks."
        )
    library = TensorRT(architecture, present=architecture == local_gpu)
    recipe = Recipe.of(
        bundle,
        chunk.ms,
        backend=library.name,
        library=library.version,
        precision=precision,
        device=f"{architecture}{note}",
        max_batch=max_batch,
        cache_dtype=graphs.CACHE_DTYPES[precision],
    )

    def build(folder: Path, store: PlanStore, progress: Progress) -> list[Path]:
        progress("graph conversion", 0.0)
        ranges = _measure_ranges(bundle, chunk, progress) if precision in ("int8", "fp8") else None
        graph, weights = graphs.write_typed(bundle, chunk, precision, ranges, folder, recipe.stem)
        timings = store.folder / f"timings-{library.name}-{library.version}-{recipe.device}.cache"
        engine = folder / f"{recipe.stem}.engine"
        engine.write_bytes(library.build(graph, max_batch, timings, progress))
        graph.unlink()
        weights.unlink()
        return [engine]

    return _Builder(recipe, build, runs_here=library.present)


def _measure_ranges(bundle: Bundle, chunk: ChunkConfig, progress: Progress) -> dict[str, float]:
    from nemostream.engine.calibration import measure_ranges

    return measure_ranges(
        bundle, chunk, speech(bundle.manifest), lambda share: progress("calibration on speech", share)
    )


def _gpu_here() -> str:
    """Return the architecture of this machine's GPU ("sm89"), or an empty string without one."""
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    try:
        device = CudaDevice()
    except BackendError:
        return ""
    try:
        return device.architecture
    finally:
        device.close()


def _validate(bundle: Bundle, chunk: ChunkConfig, plan: Plan, progress: Progress) -> dict[str, Any]:
    """Run an engine beside fp32 and return the figures of `engine.validate.validate_engine`."""
    from nemostream.engine.validate import validate_engine
    from nemostream.runtime.backends.cpu import OrtBackend

    reference = OrtBackend(bundle, capacity=2)
    plans = {chunk.ms: plan}
    candidate: Any
    if plan.recipe.device == "cpu":
        batches: tuple[int, ...] = _CPU_BATCHES
        candidate = OrtBackend(bundle, capacity=max(batches), plans=plans)
    else:
        from nemostream.engine.tensorrt import profiles
        from nemostream.runtime.backends.gpu.backend import buckets
        from nemostream.runtime.backends.gpu.cuda import CudaDevice

        max_batch = plan.recipe.max_batch or _MAX_VALIDATED_BATCH
        # Every batch size for which steps are captured, and both ends of every optimisation profile.
        ends = {end for profile in profiles(max_batch) for end in profile}
        batches = tuple(sorted({*buckets(max_batch), *ends} - {1}))
        try:
            candidate = open_gpu(bundle, CudaDevice(), plans, max(2, max_batch), max_batch)
        except BackendError as error:
            reference.close()
            raise BackendError(
                f"the engine cannot be validated with {max_batch} streams in a step ({str(error).rstrip('.')}); "
                "build it with a smaller --max-batch."
            ) from error
    try:
        return validate_engine(
            bundle.manifest,
            chunk,
            plan.recipe.precision,
            candidate,
            reference,
            speech(bundle.manifest),
            lambda share: progress("comparison with fp32", share),
            batches,
        )
    finally:
        candidate.close()
        reference.close()


def _find_plans(
    bundle: Bundle,
    store: PlanStore,
    backend: str | None,
    precision: str,
    device: str,
    max_batch: int,
    chunk_ms: int | None,
) -> dict[int, Plan]:
    """Return the stored engines that fit, by chunk size in ms.

    Raises `BackendError` with the command that builds them if there is none, or none for `chunk_ms`.
    """
    devices = (device,) if device == "cpu" else (device, "cuda")
    stored = store.all()
    plans: dict[int, Plan] = {}
    for chunk in bundle.manifest.chunks:
        name = f"encoder-{chunk.ms}ms"
        graph = bundle.graph(name)
        found = [
            plan
            for plan in stored
            if plan.recipe.graph == name
            and plan.recipe.graph_sha256 == graph.sha256
            and plan.recipe.weights_sha256 == bundle.manifest.weights.sha256
            and plan.recipe.precision == precision
            and plan.recipe.device in devices
            and (backend is None or plan.recipe.backend == backend)
            and (plan.recipe.max_batch >= max_batch or not plan.recipe.max_batch)
            and _runs_here(plan.recipe)
        ]
        if found:  # TensorRT before ONNX Runtime, our operator before its own, then the smallest sufficient batch
            best = min(found, key=lambda plan: _preference(plan.recipe))
            # `find` checks the hashes of its files, `all` does not.
            if plan := store.find(best.recipe):
                plans[chunk.ms] = plan
    if not plans:
        command = f"nemostream build {bundle.path} --precision {precision}"
        command += " --backend onnxruntime" if device == "cpu" else f" --max-batch {max_batch}"
        raise BackendError(f"{store.folder} has no {precision} engine of {bundle.path} for this {device}: {command}")
    if chunk_ms is not None and chunk_ms not in plans:
        raise missing_engine_error(chunk_ms, plans)
    return plans


def _preference(recipe: Recipe) -> tuple[bool, bool, int]:
    return recipe.backend == "onnxruntime", "+" not in recipe.library, recipe.max_batch


def _runs_here(recipe: Recipe) -> bool:
    """Return whether the library that built an engine is installed, in the same version."""
    from nemostream.runtime.backends.operators import engine_suffix

    version = _version(recipe.backend)
    return recipe.library == version or (recipe.device == "cpu" and recipe.library == version + engine_suffix())


def _version(backend: str) -> str:
    """Return the installed version of the library that runs these engines; empty if it is not installed."""
    from importlib import import_module

    try:
        return str(import_module(backend.replace("-", "_")).__version__)
    except ImportError:
        return ""
