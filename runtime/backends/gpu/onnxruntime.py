"""The encoder step on ONNX Runtime's CUDA provider, the fallback where there is no TensorRT.

It runs on our stream between two recordings of ours, from a CUDA graph that it records by itself, and never waits for
the device. Not yet run on a GPU: `docs/gpu.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from nemostream.bundle import Graph
from nemostream.errors import BackendError
from nemostream.extras import install_command
from nemostream.runtime.backends.gpu.cuda import CudaDevice

_BFLOAT16 = 16  # TensorProto.BFLOAT16: numpy has no such type
_TYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": _BFLOAT16}


def check_provider() -> None:
    """Raises `BackendError` if this ONNX Runtime has no CUDA provider."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise BackendError(
            "this ONNX Runtime has no CUDA provider: "
            f"{install_command('cuda')} && pip install --force-reinstall --no-deps onnxruntime-gpu."
        )


class OrtCudaEncoder:
    """The typed graph in `path`; `graph` is the bundle's own, whose names and shapes it shares.

    Raises `BackendError` if this ONNX Runtime has no CUDA provider, or refuses the graph.
    """

    capturable = False  # ONNX Runtime records by itself; one recording cannot hold another

    def __init__(self, path: Path, graph: Graph, cache_dtype: str, device: CudaDevice) -> None:
        check_provider()
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA's libraries from their own Python packages
        self.cache_dtype, self._graph, self._path = cache_dtype, graph, path
        options = ort.SessionOptions()
        options.log_severity_level = 3
        provider = {
            "user_compute_stream": str(device.stream),
            "enable_cuda_graph": "1",
            "use_tf32": "0",  # the gate compares with fp32
        }
        try:
            self._session = ort.InferenceSession(path, options, providers=[("CUDAExecutionProvider", provider)])
        except Exception as error:  # ONNX Runtime raises its own kinds
            raise BackendError(f"ONNX Runtime cannot load {path} on {device.name}: {error}") from error
        if "CUDAExecutionProvider" not in self._session.get_providers():
            raise BackendError(f"ONNX Runtime's CUDA provider does not work on {device.name}; see `nemostream doctor`.")
        self._recordings = 0

    def bind(self, rows: int, addresses: Mapping[str, int]) -> Callable[[], None]:
        binding = self._session.io_binding()
        caches = ("k_cache.", "v_cache.", "conv_cache.", "k_new", "v_new", "conv_next")
        for tensors, bind in ((self._graph.inputs, binding.bind_input), (self._graph.outputs, binding.bind_output)):
            for tensor in tensors:
                if tensor.name not in addresses:  # `encoded`, which nobody reads
                    continue
                kind = _TYPES[self.cache_dtype] if tensor.name.startswith(caches) else np.dtype(tensor.dtype).type
                shape = [rows if axis == "B" else int(axis) for axis in tensor.shape]
                bind(tensor.name, "cuda", 0, kind, shape, addresses[tensor.name])
        self._recordings += 1
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(self._recordings))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def enqueue() -> None:
            try:
                self._session.run_with_iobinding(binding, options)
            except Exception as error:  # ONNX Runtime raises its own kinds
                raise BackendError(f"ONNX Runtime failed in {self._path}: {error}") from error

        return enqueue

    def close(self) -> None:
        del self._session
