"""Encoder step as a TensorRT engine, which can be captured into a CUDA graph.

Works with TensorRT and TensorRT for RTX, which have the same interface. Not yet run on a GPU: see `docs/gpu.md`.

Both bindings are inconsistent about failures: some calls raise where C++ returns false, others return False, None or 0.
Every result is checked, and every exception becomes a `BackendError`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from nemostream.errors import BackendError
from nemostream.extras import install_command
from nemostream.runtime.backends.gpu.cuda import CudaDevice
from nemostream.untrusted import MIB, read_regular

_ALIGNMENT = 256  # bytes, of the device memory of a context
_REBUILD = "build it again with `nemostream build` on this machine"


class TrtEncoder:
    """`StepEncoder` for the engine in `path`, built for this GPU by `library` ("tensorrt" or "tensorrt_rtx").

    `cache_dtype` is the type of its caches, `sha256` the hash of the engine. Raises `BackendError` if the library is
    missing or cannot load the engine.
    """

    def __init__(self, path: Path, library: str, cache_dtype: str, device: CudaDevice, sha256: str) -> None:
        try:
            trt = self._trt = import_module(library)
        except ImportError as error:
            raise BackendError(
                f"{path} needs {library} ({error}): {install_command(library.replace('_', '-'))}."
            ) from error
        self.cache_dtype, self._device, self._path = cache_dtype, device, path
        self._library = f"{library} {trt.__version__}"
        self._contexts: list[Any] = []
        self._memory, self._memory_bytes = 0, 0
        self._kernels = _CompiledKernels(path, self._library, sha256, device)
        blob, reason = path.read_bytes(), ""
        try:
            self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
            self._engine = self._runtime.deserialize_cuda_engine(blob)
            if self._engine is None:
                reason = self._diagnose(blob)
        except (RuntimeError, TypeError, ValueError) as error:
            self._engine, reason = None, f" ({error})"
        if self._engine is None:
            raise BackendError(f"{self._library} cannot load {path} on {device.name}{reason}; {_REBUILD}.")

    @property
    def capturable(self) -> bool:
        """Whether the work of the last `bind` can be captured. To be read after this work has run once."""
        # Only TensorRT for RTX has contexts that may allocate memory while they run, and this call.
        query = getattr(self._contexts[-1], "is_stream_capturable", None) if self._contexts else None
        try:
            return query is None or bool(query(self._device.stream))
        except RuntimeError:
            return False

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
        profile = self._profile(rows)
        try:
            context = self._bind_context(rows, profile, addresses)
        except (RuntimeError, TypeError, ValueError) as error:
            raise BackendError(
                f"{self._library} cannot prepare {self._path} for batches of {rows} ({error}); {_REBUILD}."
            ) from error
        self._contexts.append(context)
        first = True

        def enqueue() -> None:
            nonlocal first
            try:
                enqueued = context.execute_async_v3(self._device.stream)
            except (RuntimeError, TypeError, ValueError) as error:
                raise BackendError(
                    f"{self._library} failed to enqueue {self._path} for {rows} rows ({error}); {_REBUILD}."
                ) from error
            if not enqueued:
                raise BackendError(f"{self._library} failed to enqueue {self._path} for {rows} rows; {_REBUILD}.")
            if first:
                first = False
                self._kernels.save()

        return enqueue

    def close(self) -> None:
        self._contexts.clear()
        self._kernels.close()
        self._engine = self._runtime = None

    def _bind_context(self, rows: int, profile: int, addresses: Mapping[str, int]) -> Any:
        """Return a context for batches of `rows` with its inputs, outputs and device memory.

        Each binding has its own context, because a captured context must not change. All contexts share their device
        memory, because no two run at the same time.
        """
        engine = self._engine
        context = self._new_context()
        if not context.set_optimization_profile_async(profile, self._device.stream):
            raise BackendError(f"{self._library} cannot select profile {profile} of {self._path}; {_REBUILD}.")
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if name not in addresses:
                raise BackendError(f"{self._path} has an unknown tensor {name!r}; {_REBUILD}.")
            if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT:
                shape = [rows if axis < 0 else axis for axis in engine.get_tensor_shape(name)]
                if not context.set_input_shape(name, shape):
                    raise BackendError(f"{self._path} does not accept shape {shape} for {name}; {_REBUILD}.")
            if not context.set_tensor_address(name, addresses[name]):
                raise BackendError(
                    f"{self._library} does not accept address {addresses[name]:#x} for {name} of {self._path}; "
                    f"{_REBUILD}."
                )
        if missing := context.infer_shapes():
            raise BackendError(f"{self._path} has unknown shapes for {', '.join(missing)}; {_REBUILD}.")
        needed = int(context.update_device_memory_size_for_shapes())
        if not needed and engine.get_device_memory_size_for_profile_v2(profile):  # 0 is also the result of a failure
            raise BackendError(
                f"{self._library} cannot compute the device memory of {self._path} for batches of {rows}; {_REBUILD}."
            )
        if needed > self._memory_bytes:
            size = math.ceil(needed / _ALIGNMENT) * _ALIGNMENT
            memory = self._device.allocate(size + _ALIGNMENT)
            self._memory, self._memory_bytes = math.ceil(memory / _ALIGNMENT) * _ALIGNMENT, size
        context.set_device_memory(self._memory, self._memory_bytes)
        return context

    def _new_context(self) -> Any:
        trt, engine = self._trt, self._engine
        config = engine.create_runtime_config()
        if config is None:
            raise BackendError(f"{self._library} cannot create a configuration for {self._path}; {_REBUILD}.")
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # TensorRT for RTX compiles kernels at run time, by default in the background with fallback kernels in the
            # meantime; a capture would keep the fallbacks.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # the backend captures
            self._kernels.attach(config)
        context = engine.create_execution_context(config)
        if context is None:
            raise BackendError(
                f"{self._library} cannot create a context for {self._path}; the GPU may be out of memory: choose a "
                "smaller capacity or max_batch."
            )
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


class _CompiledKernels:
    """The kernels that TensorRT for RTX compiles when an engine first runs, kept in a file beside the engine.

    One cache serves all contexts of the engine. The file begins with a hash of its content and of everything that the
    kernels depend on: a file that is damaged or from another library, engine or GPU is ignored and replaced. Errors
    only cost another compilation at the next start.
    """

    _MAX_BYTES = 512 * MIB

    def __init__(self, path: Path, library: str, sha256: str, device: CudaDevice) -> None:
        self._path = path.with_suffix(".kernels")
        self._key = "\0".join([library, sha256, device.architecture, device.name, ""]).encode()
        self._cache: Any = None
        self._stored = b""

    def attach(self, config: Any) -> None:
        """Make the contexts of a runtime configuration use the cache, which is read from the file at the first call."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._cache is None:
                return
            with contextlib.suppress(OSError, ValueError):
                content = read_regular(self._path, self._MAX_BYTES)
                if content == self._encode(content[32:]) and self._cache.deserialize(content[32:]):
                    self._stored = content
        config.set_runtime_cache(self._cache)  # without it, the context compiles its own kernels

    def save(self) -> None:
        """Write the cache to the file if it has changed."""
        try:
            blob = self._cache.serialize() if self._cache is not None else None
        except RuntimeError:
            return
        content = self._encode(bytes(blob)) if blob is not None else b""
        if content == self._stored or not 0 < len(content) <= self._MAX_BYTES:
            return
        self._stored = content
        with contextlib.suppress(OSError):
            descriptor, draft = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}-")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
                os.replace(draft, self._path)
            except OSError:
                os.unlink(draft)
                raise

    def close(self) -> None:
        self._cache = None

    def _encode(self, blob: bytes) -> bytes:
        return hashlib.sha256(self._key + blob).digest() + blob
