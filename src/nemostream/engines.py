"""Making engines, judging them, and opening a backend with them: where `engine` and `runtime` meet.

The rooms do not know each other; this does. Everything heavy is imported when it is asked for.
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
from nemostream.plans import PRECISIONS, Plan, PlanStore, Recipe, no_engine

if TYPE_CHECKING:
    from nemostream.runtime.backends.base import Backend

Progress = Callable[[str, float], None]  # what is done, and the share of it (0 to 1)

# What each kind of engine can be. ONNX Runtime has neither 16 bit nor 8-bit floats on a CPU; on a GPU we give it no
# 8 bit, which only TensorRT makes faster.
_CAN = {
    ("tensorrt", None): PRECISIONS,
    ("onnxruntime", "cpu"): ("int8",),
    ("onnxruntime", "cuda"): ("fp32", "fp16", "bf16"),
}


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
    """The engine of one chunk size, built unless `store` has it; and whether it was built now.

    `backend` is "tensorrt" (for the GPU here, or for another named by `target`, "sm89") or "onnxruntime" (for this CPU,
    or with `target` "cuda" for its CUDA provider). Wherever it can run here it is gated, and refused by `EngineValidationError` if
    it is not as good as fp32 (`runtime.gate`). An engine in the store that is damaged is built again.

    Without `validate` it is not compared, and kept under a name that `open_backend` does not look for: how long a step
    takes may be measured with random weights, which 8 bit does not serve.

    Raises `OptionError` for what cannot be built, `BackendError` if a library is missing or fails.
    """
    maker = _maker(bundle, chunk, precision, backend, target, max_batch, "" if validate else ", not validated")
    try:
        plan = store.find(maker.recipe)
    except BackendError as error:
        progress(str(error), 0.0)
        plan = None
    if plan:
        return plan, False
    plan = store.put(
        maker.recipe,
        lambda folder: maker.make(folder, store, progress),
        lambda made: _validate(bundle, chunk, made, progress) if maker.runs_here and validate else {},
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
    """A backend on the CPU or a GPU ("cuda"), with the engines that `nemostream build` left in the folder `engines`.

    On the CPU "fp32" (the default) needs none and "int8" does; a GPU's default is "fp16". An engine that was built for
    this GPU on another machine is gated before it is used. Raises `BackendError` if none is there, or none of
    `chunk_ms`.
    """
    from nemostream.runtime.backends.cpu import OrtBackend

    store = PlanStore(engines)
    if device == "cpu":
        if precision in (None, "fp32"):
            with _loading(bundle, capacity):
                return OrtBackend(bundle, capacity=capacity, max_batch=max_batch, threads=threads)
        if precision not in _CAN["onnxruntime", "cpu"]:
            raise OptionError(f"a CPU runs fp32 and int8, not {precision}; choose one of them, or device='cuda'.")
        plans = _known(bundle, store, "onnxruntime", precision, "cpu", 0, chunk_ms)
        with _loading(bundle, capacity):
            return OrtBackend(bundle, capacity=capacity, max_batch=max_batch, threads=threads, plans=plans)
    if device != "cuda":
        raise OptionError(f"device is {device!r}; choose cpu or cuda.")
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    rows = min(max_batch or 64, capacity)
    gpu = CudaDevice()
    plans = _known(bundle, store, None, precision or "fp16", gpu.architecture, rows, chunk_ms)
    for ms, plan in plans.items():
        if not plan.validation:
            figures = _validate(bundle, bundle.manifest.chunk(ms), plan, lambda what, share: None)
            plans[ms] = store.save_validation(plan, figures)
    with _loading(bundle, capacity):
        return open_gpu(bundle, gpu, plans, capacity, rows)


@contextlib.contextmanager
def _loading(bundle: Bundle, capacity: int) -> Iterator[None]:
    """What a library raises of graphs that are not what the manifest states, as a `BackendError`."""
    try:
        yield
    except NemostreamError:
        raise
    except MemoryError as error:
        raise BackendError(f"there is not enough memory for {capacity} streams of {bundle.path}; lower it.") from error
    except Exception as error:  # each library raises its own kinds
        reason = str(error).strip().partition("\n")[0]
        raise BackendError(
            f"{bundle.path} cannot be loaded ({type(error).__name__}: {reason}): its graphs do not match its manifest; "
            "export the checkpoint again."
        ) from error


def open_gpu(bundle: Bundle, device: Any, plans: Mapping[int, Plan], capacity: int, max_batch: int) -> Any:
    """The GPU backend with an encoder for each plan, by chunk size in ms."""
    from nemostream.runtime.backends.gpu.backend import GpuBackend, StepEncoder

    encoders: dict[int, StepEncoder] = {}
    for ms, plan in plans.items():
        recipe = plan.recipe
        if recipe.backend == "onnxruntime":
            from nemostream.runtime.backends.gpu.onnxruntime import OrtCudaEncoder

            graph = bundle.graph(recipe.graph)
            encoders[ms] = OrtCudaEncoder(plan.path, graph, recipe.cache_dtype, device)
        else:
            from nemostream.runtime.backends.gpu.tensorrt import TrtEncoder

            encoders[ms] = TrtEncoder(plan.path, recipe.backend.replace("-", "_"), recipe.cache_dtype, device)
    return GpuBackend(bundle, device, encoders, capacity=capacity, max_batch=max_batch)


def speech(manifest: Manifest) -> list[NDArray[np.float32]]:
    """The packaged clips [N] at the model's rate: 18 s of a novel, and what the embedded model understands."""
    return [read_clip(name, manifest.features.sample_rate) for name in ("speech", "clip")]


# -- the kinds of engine -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Maker:
    recipe: Recipe
    make: Callable[[Path, PlanStore, Progress], list[Path]]
    runs_here: bool  # so that it can be gated


def _maker(
    bundle: Bundle, chunk: ChunkConfig, precision: str, backend: str, target: str | None, max_batch: int, note: str = ""
) -> _Maker:
    """`note` is added to the name of the device."""
    if max_batch < 1:
        raise OptionError(f"max_batch is {max_batch}; it must be at least 1.")
    if backend not in ("tensorrt", "onnxruntime"):
        raise OptionError(f"backend is {backend!r}; choose tensorrt or onnxruntime.")
    where = None if backend == "tensorrt" else target or "cpu"
    if (backend, where) not in _CAN:
        raise OptionError(f"onnxruntime runs on cpu and cuda; {target!r} is neither.")
    if precision not in PRECISIONS:
        raise OptionError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    if precision not in _CAN[backend, where]:
        nothing = " fp32 needs no engine: the bundle itself runs." if (where, precision) == ("cpu", "fp32") else ""
        raise OptionError(
            f"{backend} on {where} can be built in {', '.join(_CAN[backend, where])}, not in {precision}.{nothing}"
        )
    try:
        from nemostream.engine import precision as graphs
    except ImportError as error:
        raise BackendError(f"building engines needs onnx ({error}): {install_command('build')}.") from error

    def ranges(progress: Progress) -> dict[str, float] | None:
        if precision not in ("int8", "fp8"):
            return None
        from nemostream.engine.calibration import measure_ranges

        return measure_ranges(
            bundle, chunk, speech(bundle.manifest), lambda share: progress("listening to speech", share)
        )

    if backend == "onnxruntime":
        import onnxruntime

        cpu = where == "cpu"
        cache_dtype = "float32" if cpu else graphs.CACHE_DTYPES[precision]
        recipe = Recipe.of(
            bundle,
            chunk.ms,
            backend=backend,
            library=onnxruntime.__version__,
            precision=precision,
            device=f"{where}{note}",
            max_batch=0,
            cache_dtype=cache_dtype,
        )

        def make_graph(folder: Path, store: PlanStore, progress: Progress) -> list[Path]:
            if cpu:
                return graphs.write_int8_for_cpu(bundle, chunk, folder, recipe.stem)
            return graphs.write_typed(bundle, chunk, precision, None, folder, recipe.stem)

        here = cpu or "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        return _Maker(recipe, make_graph, runs_here=here)

    from nemostream.engine.tensorrt import TensorRT

    library = TensorRT()
    # Only TensorRT for RTX builds from afar; the GPU that is here need not be named, but may be.
    gpu = _gpu_here() if target is None or target not in library.targets() else ""
    if target is None and not gpu:
        raise BackendError(
            "there is no NVIDIA GPU to build for: name one with --target (sm89), build for this CPU with --backend "
            "onnxruntime --precision int8, or see `nemostream doctor` for what the GPU here lacks."
        )
    named = None if target in (None, gpu) else target
    recipe = Recipe.of(
        bundle,
        chunk.ms,
        backend=library.name,
        library=library.version,
        precision=precision,
        device=f"{target or gpu}{note}",
        max_batch=max_batch,
        cache_dtype=graphs.CACHE_DTYPES[precision],
    )

    def make_engine(folder: Path, store: PlanStore, progress: Progress) -> list[Path]:
        progress("writing the graph", 0.0)
        graph, weights = graphs.write_typed(bundle, chunk, precision, ranges(progress), folder, recipe.stem)
        timings = store.folder / f"timings-{library.name}-{library.version}-{recipe.device}.cache"
        engine = folder / f"{recipe.stem}.engine"
        engine.write_bytes(library.build(graph, named, max_batch, timings, progress))
        graph.unlink()
        weights.unlink()
        return [engine]

    return _Maker(recipe, make_engine, runs_here=target is None)


def _gpu_here() -> str:
    """The architecture of this machine's GPU; empty if there is none."""
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
    from nemostream.engine.validate import validate_engine
    from nemostream.runtime.backends.cpu import OrtBackend

    reference = OrtBackend(bundle, capacity=2)
    plans = {chunk.ms: plan}
    candidate: Any
    if plan.recipe.device == "cpu":
        candidate = OrtBackend(bundle, capacity=2, plans=plans)
    else:
        from nemostream.runtime.backends.gpu.cuda import CudaDevice

        candidate = open_gpu(bundle, CudaDevice(), plans, 2, 2)
    try:
        return validate_engine(
            bundle.manifest,
            chunk,
            plan.recipe.precision,
            candidate,
            reference,
            speech(bundle.manifest),
            lambda share: progress("comparing with fp32", share),
        )
    finally:
        candidate.close()
        reference.close()


def _known(
    bundle: Bundle,
    store: PlanStore,
    backend: str | None,
    precision: str,
    device: str,
    max_batch: int,
    chunk_ms: int | None,
) -> dict[int, Plan]:
    """The engines there are, by chunk size. Raises `BackendError` naming the command that builds them if none is, or
    none of `chunk_ms`."""
    devices = (device,) if device == "cpu" else (device, "cuda")
    kept = store.all()
    plans: dict[int, Plan] = {}
    for chunk in bundle.manifest.chunks:
        name = f"encoder-{chunk.ms}ms"
        graph = bundle.graph(name)
        found = [
            plan
            for plan in kept
            if plan.recipe.graph == name
            and plan.recipe.graph_sha256 == graph.sha256
            and plan.recipe.weights_sha256 == bundle.manifest.weights.sha256
            and plan.recipe.precision == precision
            and plan.recipe.device in devices
            and (backend is None or plan.recipe.backend == backend)
            and (plan.recipe.max_batch >= max_batch or not plan.recipe.max_batch)
            and plan.recipe.library == _version(plan.recipe.backend)
        ]
        if found:  # TensorRT before ONNX Runtime, the closest batch first
            best = min(found, key=lambda plan: (plan.recipe.backend == "onnxruntime", plan.recipe.max_batch))
            # Only what `find` returns was checked against its hashes.
            if plan := store.find(best.recipe):
                plans[chunk.ms] = plan
    if not plans:
        command = f"nemostream build {bundle.path} --precision {precision}"
        command += " --backend onnxruntime" if device == "cpu" else f" --max-batch {max_batch}"
        raise BackendError(f"{store.folder} has no {precision} engine of {bundle.path} for this {device}: {command}")
    if chunk_ms is not None and chunk_ms not in plans:
        raise no_engine(chunk_ms, plans)
    return plans


def _version(backend: str) -> str:
    """Version of the library that would run it now; empty if it is not here."""
    from importlib import import_module

    try:
        return str(import_module(backend.replace("-", "_")).__version__)
    except ImportError:
        return ""


def check_chunks(bundle: Bundle, chunk_ms: Sequence[int] | None) -> list[ChunkConfig]:
    """The chunks named, or all. Raises `OptionError` for one the model does not have."""
    return [bundle.manifest.chunk(ms) for ms in chunk_ms] if chunk_ms else list(bundle.manifest.chunks)
