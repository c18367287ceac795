"""TensorRT plugin for the nodes of `engine/attention.py`: attention that reads K and V through a slot table.

Experimental: it has never run, because TensorRT needs a GPU to build it, and nothing registers it by default. It uses
the ahead-of-time interface for plugins in Python (`tensorrt.plugin`): the kernel becomes a part of the engine as PTX,
so that loading the engine needs neither this module nor NVRTC. TensorRT for RTX does not have this interface.
"""

from __future__ import annotations

import re
from importlib import import_module
from types import GenericAlias
from typing import Any

from nemostream.errors import BackendError
from nemostream.extras import install_command
from nemostream.runtime.backends.gpu.cuda import compile_kernels, with_ptx_version
from nemostream.runtime.backends.gpu.kernels import attention

PLUGIN = "nemostream::RingAttention"

_MIN_VERSION = (10, 13)
_ARCHITECTURE = "sm80"  # the driver compiles the PTX for the GPU, which may be newer
_PTX_VERSION = "8.0"  # of CUDA 12.0. NVRTC declares the version of its own release, which older drivers reject


def register() -> None:
    """Register the plugin with TensorRT in this process, for building engines.

    Raises `BackendError` if TensorRT is missing or does not have ahead-of-time plugins in Python.
    """
    trt, plugin = _library()
    namespace, name = PLUGIN.split("::")
    if hasattr(getattr(plugin.op, namespace, None), name):
        return
    cache_dtypes = {trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16"}

    # TensorRT validates the names of the parameters.
    def describe(
        qkv: Any,
        k_ring: Any,
        v_ring: Any,
        positions: Any,
        bias_u: Any,
        bias_v: Any,
        row_slot: Any,
        position: Any,
        old_frames: Any,
        new_frames: Any,
    ) -> Any:
        shape = (qkv.shape_expr[0], qkv.shape_expr[1], positions.shape_expr[1])
        return plugin.from_shape_expr(shape, dtype=qkv.dtype)

    def compile_kernel(
        qkv: Any,
        k_ring: Any,
        v_ring: Any,
        positions: Any,
        bias_u: Any,
        bias_v: Any,
        row_slot: Any,
        position: Any,
        old_frames: Any,
        new_frames: Any,
        outputs: Any,
        tactic: Any,
    ) -> Any:
        frames, (heads, cache, d_k) = int(qkv.shape[1]), (int(k_ring.shape[axis]) for axis in (1, 2, 3))
        launch = plugin.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.block_x = qkv.shape_expr[0], heads, attention.BLOCK
        scalars = plugin.SymIntExprs(1)
        scalars[0] = plugin.SymInt32(k_ring.shape_expr[0])  # slots
        return attention.ENTRY, ptx(frames, cache, heads, d_k, cache_dtypes[qkv.dtype]), launch, scalars

    # TensorRT reads the annotations, and does not accept strings.
    tensors = dict.fromkeys(attention.INPUTS, plugin.TensorDesc)
    describe.__annotations__ = {**tensors, "return": plugin.TensorDesc}
    compile_kernel.__annotations__ = {
        **tensors,
        "outputs": GenericAlias(tuple, (plugin.TensorDesc,)),
        "tactic": int,
        "return": GenericAlias(tuple, (str, str, plugin.KernelLaunchParams, plugin.SymIntExprs)),
    }
    plugin.register(PLUGIN)(describe)
    plugin.aot_impl(PLUGIN)(compile_kernel)


def ptx(frames: int, cache: int, heads: int, d_k: int, cache_dtype: str) -> str:
    """Return the kernel as PTX for chunks of `frames` frames and tensors of type `cache_dtype`. Needs NVRTC."""
    macros = attention.macros(frames, cache, heads, d_k, cache_dtype)
    image = compile_kernels(macros, _ARCHITECTURE, "ptx", attention.source())
    return with_ptx_version(image.rstrip(b"\0 "), _PTX_VERSION).decode()


def _library() -> tuple[Any, Any]:
    """Return the modules `tensorrt` and `tensorrt.plugin`. Raises `BackendError` if they cannot be used."""
    needs = "attention over the K/V ring needs TensorRT 10.13 or newer with ahead-of-time plugins in Python"
    remedy = (
        f"{install_command('tensorrt')} --extra-index-url https://pypi.nvidia.com, or build the engine without it; "
        "TensorRT for RTX does not have such plugins."
    )
    try:
        trt = import_module("tensorrt")
    except ImportError as error:
        raise BackendError(f"{needs}, and TensorRT is not installed ({error}): {remedy}") from error
    version = tuple(int(number) for number in re.findall(r"\d+", str(trt.__version__))[:2])
    if version < _MIN_VERSION:
        raise BackendError(f"{needs}, and {trt.__version__} is installed: {remedy}")
    try:
        plugin = import_module("tensorrt.plugin")
    except ImportError as error:
        raise BackendError(f"{needs}; TensorRT {trt.__version__} cannot load them ({error}): {remedy}") from error
    required = ("register", "aot_impl", "op", "from_shape_expr", "TensorDesc", "KernelLaunchParams", "SymIntExprs")
    if missing := [name for name in (*required, "SymInt32") if not hasattr(plugin, name)]:
        raise BackendError(f"{needs}; tensorrt.plugin {trt.__version__} lacks {', '.join(missing)}: {remedy}")
    return trt, plugin
