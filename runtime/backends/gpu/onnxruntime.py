"""Encoder step on ONNX Runtime's CUDA provider, the fallback without TensorRT.

It runs on the backend's stream between two of its graph launches, from a CUDA graph that ONNX Runtime captures itself,
and does not wait for the device. ONNX Runtime keeps these graphs per thread, and captures them in the first run on each
thread. Not yet run on a GPU: see `docs/gpu.md`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from nemostream.bundle import Graph
from nemostream.errors import BackendError
from nemostream.extras import install_command
from nemostream.runtime.backends.gpu.cuda import CudaDevice
from nemostream.runtime.backends.gpu.device import OutOfMemory

_BFLOAT16 = 16  # TensorProto.BFLOAT16; numpy has no such type
_TYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": _BFLOAT16}


def check_provider() -> None:
    """Raise `BackendError` if the installed ONNX Runtime has no CUDA provider."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise BackendError(
            "the installed ONNX Runtime has no CUDA provider: "
            f"{install_command('cuda')} && pip install --force-reinstall --no-deps onnxruntime-gpu."
        )


class OrtCudaEncoder:
    """`StepEncoder` for the typed graph in `path`; `graph` is the bundle's graph, with the same names and shapes.

    `row_bytes` is an estimate of the working memory per row (`memory.activation_bytes`).
    Raises `BackendError` if the installed ONNX Runtime has no CUDA provider or cannot load the graph.
    """

    capturable = False  # ONNX Runtime captures its own graph; captures do not nest

    def __init__(self, path: Path, graph: Graph, cache_dtype: str, device: CudaDevice, row_bytes: int) -> None:
        check_provider()
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA libraries from Python packages
        self.cache_dtype, self._graph, self._path = cache_dtype, graph, path
        options = ort.SessionOptions()
        options.log_severity_level = 3
        provider = {
            "user_compute_stream": str(device.stream),
            "enable_cuda_graph": "1",
            "use_tf32": "0",  # validation compares with fp32
        }
        try:
            self._session = ort.InferenceSession(path, options, providers=[("CUDAExecutionProvider", provider)])
        except Exception as error:  # ONNX Runtime has its own exceptions
            raise BackendError(f"ONNX Runtime cannot load {path} on {device.name}: {error}") from error
        if "CUDAExecutionProvider" not in self._session.get_providers():
            raise BackendError(
                f"ONNX Runtime's CUDA provider does not work on {device.name}; run `nemostream doctor` for details."
            )
        self._row_bytes = row_bytes
        self._bindings = 0  # each has a CUDA graph of its own

    def memory_bytes(self, rows: int) -> int:
        return 2 * rows * self._row_bytes  # ONNX Runtime doubles its memory whenever it grows

    def bind(self, rows: int, addresses: Mapping[str, int]) -> Callable[[], None]:
        binding = self._session.io_binding()
        caches = ("k_cache.", "v_cache.", "conv_cache.", "k_new", "v_new", "conv_next")
        for tensors, bind in ((self._graph.inputs, binding.bind_input), (self._graph.outputs, binding.bind_output)):
            for tensor in tensors:
                if tensor.name not in addresses:  # `encoded` is not used
                    continue
                dtype = _TYPES[self.cache_dtype] if tensor.name.startswith(caches) else np.dtype(tensor.dtype).type
                shape = [rows if axis == "B" else int(axis) for axis in tensor.shape]
                bind(tensor.name, "cuda", 0, dtype, shape, addresses[tensor.name])
        self._bindings += 1
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(self._bindings))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def enqueue() -> None:
            try:
                self._session.run_with_iobinding(binding, options)
            except Exception as error:  # ONNX Runtime has its own exceptions
                if size := re.search(r"Failed to allocate memory for requested buffer of size (\d+)", str(error)):
                    raise OutOfMemory(int(size[1])) from error
                raise BackendError(f"ONNX Runtime failed in {self._path}: {error}") from error

        return enqueue

    def close(self) -> None:
        self._session = None
