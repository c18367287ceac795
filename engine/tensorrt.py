"""Compile a typed graph into a TensorRT engine.

Uses TensorRT (10.13 or newer) or TensorRT for RTX, which have the same interface. TensorRT needs the GPU that it builds
for. TensorRT for RTX can build for a GPU that is not present, but supports only the architectures that it lists: no
data-centre GPU of compute capability 9.0 or 10.0, such as the H100.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from nemostream.errors import BackendError, NemostreamError, OptionError
from nemostream.extras import install_command

Progress = Callable[[str, float], None]  # a phase, and the share of it that is done (0 to 1)

_MODULES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
_MIN_VERSION = (10, 13)
# Largest batches of the optimisation profiles: the best kernels for a few streams differ from those for hundreds. No
# profile is for a single batch size, because TensorRT for RTX then stores a second copy of the weights in a layout for
# that size (`docs/engines.md`).
_PROFILE_ENDS = (8, 64)


def _install() -> str:
    """Return the commands that install either library."""
    return (
        f"{install_command('tensorrt')} --extra-index-url https://pypi.nvidia.com, "
        f"or, for TensorRT for RTX, {install_command('tensorrt-rtx')}"
    )


class TensorRT:
    """The installed library that builds engines for a GPU: TensorRT if it can, else TensorRT for RTX.

    `architecture` is the GPU's ("sm89"), `present` whether it is the GPU of this machine. Raises `BackendError` if no
    library is installed, it is too old or does not support the GPU, and `OptionError` if a GPU that is not present
    cannot be built for.
    """

    def __init__(self, architecture: str, present: bool) -> None:
        self.architecture, self.present = architecture, present
        missing, unsuitable = [], []
        for module, name in _MODULES.items():
            try:
                self._trt = import_module(module)
            except ImportError as error:
                missing.append(str(error))
                continue
            self.name, self.version = name, str(self._trt.__version__)
            if name == "tensorrt":
                numbers = tuple(int(number) for number in re.findall(r"\d+", self.version)[:2])
                if numbers < _MIN_VERSION:
                    raise BackendError(f"TensorRT {self.version} is too old; 10.13 or newer is required: {_install()}.")
                supported = present
            else:
                supported = architecture in architectures(self._trt)
            if supported:
                return
            unsuitable.append(self._unsupported())
        if unsuitable:
            raise unsuitable[-1]
        raise BackendError(f"TensorRT is not installed ({'; '.join(missing)}): {_install()}.")

    def _unsupported(self) -> NemostreamError:
        """Return the error for a GPU that the library cannot build for."""
        known = ", ".join(architectures(self._trt))
        if self.present:
            return BackendError(f"{unsupported_gpu(self._trt, f'this GPU ({self.architecture})')}.")
        without = f"{self.name} {self.version} cannot build for {self.architecture} without that GPU"
        if known:
            return OptionError(
                f"{without}; it can for {known}. On the machine with the GPU, use TensorRT without --target; or build "
                "here with --backend onnxruntime --target cuda."
            )
        return OptionError(
            f"{without}; build on the machine with the GPU, without --target, or install TensorRT for RTX: "
            f"{install_command('tensorrt-rtx')}."
        )

    def build(
        self, model: Path, max_batch: int, timings: Path | None = None, progress: Progress | None = None
    ) -> bytes:
        """Build the engine of the graph in `model`, with profiles for batches up to `max_batch`, and return it.

        `timings` is a file that stores kernel timings between builds. Raises `BackendError` with the library's errors.
        """
        log = _log(self._trt)
        try:
            return self._build(model, max_batch, timings, progress, log)
        except NemostreamError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:  # where C++ returns null or false, the bindings raise
            raise BackendError(
                f"{self.name} {self.version} cannot build {model.name}: {error}; {log.summary()}"
            ) from error

    def _build(self, model: Path, max_batch: int, timings: Path | None, progress: Progress | None, log: Any) -> bytes:
        trt = self._trt
        builder = trt.Builder(log)
        flags = 0
        if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):  # in TensorRT 11, all networks are
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(model)):
            errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
            raise BackendError(f"{self.name} {self.version} cannot read {model.name}: {errors or log.summary()}")
        config = builder.create_builder_config()
        config.max_aux_streams = 0  # the runtime captures the engine into its own CUDA graph
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            # TensorRT for RTX otherwise may allocate memory while it runs, which cannot be captured. With the flag, the
            # build fails if that cannot be avoided.
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if not self.present:
            config.num_compute_capabilities = 1
            if not config.set_compute_capability(getattr(trt.ComputeCapability, self.architecture.upper()), 0):
                raise BackendError(f"{self.name} {self.version} rejects {self.architecture}: {log.summary()}")
        for smallest, largest in profiles(max_batch):
            profile = builder.create_optimization_profile()
            for index in range(network.num_inputs):
                tensor = network.get_input(index)
                # Optimised for one stream, where latency matters, otherwise for the largest batch, the slowest step.
                sizes = (smallest, 1 if smallest == 1 else largest, largest)
                profile.set_shape(tensor.name, *([n if axis < 0 else axis for axis in tensor.shape] for n in sizes))
            if config.add_optimization_profile(profile) < 0:
                raise BackendError(
                    f"{self.name} {self.version} rejects the profile for batches of {smallest} to {largest} of "
                    f"{model.name}: {log.summary()}"
                )
        cache = self._timing_cache(config, timings)
        if progress:
            config.progress_monitor = _monitor(trt, progress)
        blob = builder.build_serialized_network(network, config)
        if blob is None:
            raise BackendError(f"{self.name} {self.version} cannot build {model.name}: {log.summary()}")
        if cache is not None and timings:
            # Replaced, not overwritten: it may be a link, and another process may be reading it.
            draft = timings.with_name(f".{timings.name}-{uuid.uuid4().hex}")
            draft.write_bytes(bytes(config.get_timing_cache().serialize()))
            draft.replace(timings)
        return bytes(blob)

    def _timing_cache(self, config: Any, timings: Path | None) -> Any:
        # TensorRT for RTX does not time kernels. Its timing cache has no effect and needs a GPU.
        if timings is None or self.name != "tensorrt":
            return None
        known = timings.read_bytes() if timings.is_file() else b""
        cache = config.create_timing_cache(known) or config.create_timing_cache(b"")  # damaged or from another version
        if cache is not None and not config.set_timing_cache(cache, False):
            cache = config.create_timing_cache(b"")
            if not config.set_timing_cache(cache, False):
                return None  # the build then times all kernels
        return cache


def architectures(library: Any) -> list[str]:
    """Return the GPU architectures ("sm89") that a TensorRT module lists, in ascending order.

    TensorRT for RTX supports no others. TensorRT has no list.
    """
    names = getattr(getattr(library, "ComputeCapability", None), "__members__", ())
    numbers = sorted(int(name[2:]) for name in names if re.fullmatch(r"SM\d+", name))
    return [f"sm{number}" for number in numbers]


def unsupported_gpu(library: Any, gpu: str) -> str:
    """Return the sentence, without its full stop, for a GPU that TensorRT for RTX (the module) does not support."""
    return (
        f"TensorRT for RTX {library.__version__} does not support {gpu}, only {', '.join(architectures(library))}: "
        f"install TensorRT ({install_command('tensorrt')} --extra-index-url https://pypi.nvidia.com), or install "
        f"onnxruntime-gpu ({install_command('cuda')}) and build with --backend onnxruntime --target cuda"
    )


def profiles(max_batch: int) -> list[tuple[int, int]]:
    """Return the smallest and largest batch of each optimisation profile."""
    ends = sorted({min(end, max_batch) for end in (*_PROFILE_ENDS, max_batch)})
    return list(zip([1, *(end + 1 for end in ends[:-1])], ends, strict=True))


def _log(trt: Any) -> Any:
    """Return a logger that collects errors for error messages."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def summary(self) -> str:
            return "; ".join(self.errors[:3]) or "no reason given"

    return Log()


def _monitor(trt: Any, progress: Progress) -> Any:
    """Return a progress monitor that calls `progress` about ten times per second."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.last = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.steps[name] = max(steps, 1)

        def step_complete(self, name: str, step: int) -> bool:
            if time.monotonic() - self.last > 0.1:
                self.last = time.monotonic()
                progress(name, step / self.steps.get(name, 1))
            return True

        def phase_finish(self, name: str) -> None:
            self.steps.pop(name, None)

    return Monitor()
