"""Encoder step as a TensorRT engine, which can be captured into a CUDA graph.

Works with TensorRT and TensorRT for RTX, which have the same interface. Not yet run on a GPU: see `docs/gpu.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from nemostream.errors import BackendError
from nemostream.extras import install_command
from nemostream.runtime.backends.gpu.cuda import CudaDevice

_ALIGNMENT = 256  # bytes, of the device memory of a context


class TrtEncoder:
    """`StepEncoder` for the engine in `path`, built for this GPU by `library` ("tensorrt" or "tensorrt_rtx").

    `cache_dtype` is the type of its caches. Raises `BackendError` if the library is missing or cannot load the engine.
    """

    capturable = True

    def __init__(self, path: Path, library: str, cache_dtype: str, device: CudaDevice) -> None:
        try:
            trt = self._trt = import_module(library)
        except ImportError as error:
            raise BackendError(
                f"{path} needs {library} ({error}): {install_command(library.replace('_', '-'))}."
            ) from error
        self.cache_dtype, self._device, self._path = cache_dtype, device, path
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        blob = path.read_bytes()
        self._engine = self._runtime.deserialize_cuda_engine(blob)
        if self._engine is None:
            raise BackendError(
                f"{library} {trt.__version__} cannot load {path} on {device.name}{self._diagnose(blob)}; "
                "build it again with `nemostream build` on this machine."
            )
        self._contexts: list[Any] = []
        self._memory, self._memory_bytes = 0, 0

    def memory_bytes(self, rows: int) -> int:
        engine = self._engine
        # The size of a profile is that of its largest batch, so it is an upper bound.
        sizes = [
            int(engine.get_device_memory_size_for_profile_v2(profile))
            for profile in range(engine.num_optimization_profiles)
            if engine.get_tensor_profile_shape("mel", profile)[0][0] <= rows
        ]
        return max(sizes, default=0) + 2 * _ALIGNMENT

    def bind(self, rows: int, addresses: Mapping[str, int]) -> Callable[[], None]:
        trt, engine = self._trt, self._engine
        # Each binding has its own context, because a captured context must not change. All contexts share their
        # device memory, because no two run at the same time.
        context = self._new_context()
        if not context.set_optimization_profile_async(self._profile(rows), self._device.stream):
            raise BackendError(
                f"{self._path} has no profile for batches of {rows}; build it with a larger --max-batch."
            )
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if name not in addresses:
                raise BackendError(f"{self._path} has an unknown tensor {name!r}; build it again.")
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                shape = [rows if axis < 0 else axis for axis in engine.get_tensor_shape(name)]
                if not context.set_input_shape(name, shape):
                    raise BackendError(f"{self._path} does not accept shape {shape} for {name}; build it again.")
            context.set_tensor_address(name, addresses[name])
        if missing := context.infer_shapes():
            raise BackendError(f"{self._path} has unknown shapes for {', '.join(missing)}; build it again.")
        needed = int(context.update_device_memory_size_for_shapes())
        if needed > self._memory_bytes:
            self._memory_bytes = math.ceil(needed / _ALIGNMENT) * _ALIGNMENT
            memory = self._device.allocate(self._memory_bytes + _ALIGNMENT)
            self._memory = math.ceil(memory / _ALIGNMENT) * _ALIGNMENT
        context.set_device_memory(self._memory, self._memory_bytes)
        self._contexts.append(context)

        def enqueue() -> None:
            if not context.execute_async_v3(self._device.stream):
                raise BackendError(f"TensorRT failed to enqueue {self._path} for {rows} rows.")

        return enqueue

    def close(self) -> None:
        self._contexts.clear()
        del self._engine, self._runtime

    def _new_context(self) -> Any:
        trt, engine = self._trt, self._engine
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # TensorRT for RTX compiles kernels at run time, by default in the background with fallback kernels in the
            # meantime; a capture would keep the fallbacks.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # the backend captures
        context = engine.create_execution_context(config)
        if context is None:
            raise BackendError(f"TensorRT cannot create a context for {self._path}; the GPU may be out of memory.")
        return context

    def _profile(self, rows: int) -> int:
        """Return the first profile that includes this batch size; profiles are in ascending order."""
        for profile in range(self._engine.num_optimization_profiles):
            smallest, _, largest = self._engine.get_tensor_profile_shape("mel", profile)
            if smallest[0] <= rows <= largest[0]:
                return profile
        raise BackendError(f"{self._path} was not built for batches of {rows}; build it with a larger --max-batch.")

    def _diagnose(self, blob: bytes) -> str:
        """Return the library's diagnostics for an engine it cannot load, if available."""
        try:
            validity, diagnostics = self._runtime.get_engine_validity(blob)
        except Exception:  # only TensorRT for RTX has this call, and it may fail
            return ""
        return f" ({validity.name}, diagnostics {diagnostics:#x})"
