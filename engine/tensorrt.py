"""Compile a typed graph into a TensorRT engine.

Uses TensorRT (10.13 or newer) or TensorRT for RTX, whichever is installed; both have the same interface. TensorRT for
RTX can build for a named GPU that is not present; TensorRT needs the GPU.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from nemostream.errors import BackendError, OptionError
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
    """The installed library. Raises `BackendError` if none is installed or it is too old."""

    def __init__(self) -> None:
        failures = []
        for module, name in _MODULES.items():
            try:
                self._trt = import_module(module)
            except ImportError as error:
                failures.append(str(error))
                continue
            self.name = name
            break
        else:
            raise BackendError(f"TensorRT is not installed ({'; '.join(failures)}): {_install()}.")
        self.version = str(self._trt.__version__)
        numbers = tuple(int(number) for number in re.findall(r"\d+", self.version)[:2])
        if self.name == "tensorrt" and numbers < _MIN_VERSION:
            raise BackendError(f"TensorRT {self.version} is too old; 10.13 or newer is required: {_install()}.")

    def targets(self) -> list[str]:
        """Return the GPU architectures ("sm89") that engines can be built for without the GPU."""
        kinds = getattr(self._trt, "ComputeCapability", None)
        return sorted(name.lower() for name in dir(kinds) if re.fullmatch(r"SM\d+", name)) if kinds else []

    def build(
        self, model: Path, target: str | None, max_batch: int, timings: Path | None, progress: Progress | None = None
    ) -> bytes:
        """Build the engine of the graph in `model`, with profiles for batches up to `max_batch`, and return it.

        `target` is the architecture of another GPU ("sm89"); None is the GPU of this machine. `timings` is a file that
        stores kernel timings between builds. Raises `BackendError` with the library's errors.
        """
        trt = self._trt
        log = _log(trt)
        builder = trt.Builder(log)
        if builder is None:
            raise BackendError(f"TensorRT {self.version} cannot create a builder: {log.summary()}")
        flags = 0
        if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):  # in TensorRT 11, all networks are
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(model)):
            errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
            raise BackendError(f"TensorRT {self.version} cannot read {model.name}: {errors}")
        config = builder.create_builder_config()
        config.max_aux_streams = 0  # the runtime captures the engine into its own CUDA graph
        if target:
            config.num_compute_capabilities = 1
            config.set_compute_capability(self._capability(target), 0)
        for smallest, largest in _profiles(max_batch):
            profile = builder.create_optimization_profile()
            for index in range(network.num_inputs):
                tensor = network.get_input(index)
                # Optimised for one stream, where latency matters, otherwise for the largest batch, the slowest step.
                sizes = (smallest, 1 if smallest == 1 else largest, largest)
                profile.set_shape(tensor.name, *([n if axis < 0 else axis for axis in tensor.shape] for n in sizes))
            config.add_optimization_profile(profile)
        cache = self._timing_cache(config, timings)
        if progress:
            config.progress_monitor = _monitor(trt, progress)
        blob = builder.build_serialized_network(network, config)
        if blob is None:
            raise BackendError(f"TensorRT {self.version} cannot build {model.name}: {log.summary()}")
        if cache is not None and timings:
            # Replaced, not overwritten: it may be a link, and another process may be reading it.
            draft = timings.with_name(f".{timings.name}-{uuid.uuid4().hex}")
            draft.write_bytes(bytes(config.get_timing_cache().serialize()))
            draft.replace(timings)
        return bytes(blob)

    def _capability(self, target: str) -> Any:
        if target not in self.targets():
            known = ", ".join(self.targets())
            raise OptionError(
                f"{self.name} {self.version} cannot build for {target} without that GPU"
                + (f"; it can for {known}." if known else "; build on the machine with the GPU, without --target.")
            )
        return getattr(self._trt.ComputeCapability, target.upper())

    def _timing_cache(self, config: Any, timings: Path | None) -> Any:
        if timings is None or not hasattr(config, "create_timing_cache"):
            return None
        known = timings.read_bytes() if timings.is_file() else b""
        cache = config.create_timing_cache(known) or config.create_timing_cache(b"")  # damaged or from another version
        if cache is not None and not config.set_timing_cache(cache, False):
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        return cache


def _profiles(max_batch: int) -> list[tuple[int, int]]:
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
