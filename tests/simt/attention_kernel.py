"""The attention kernel on a CPU or GPU, a reference in float64, and inputs that cover the cases of a K/V ring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from cuda_on_cpu import compile_for_cpu
from numpy.typing import NDArray

from nemostream.runtime.backends.gpu.kernels import attention

Inputs = dict[str, NDArray[Any]]

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class CpuAttention:
    """The kernel compiled for the CPU. Its arguments are passed in the order in which TensorRT passes them."""

    def __init__(self, frames: int, cache: int, heads: int, d_k: int, cache_dtype: str) -> None:
        self.macros = attention.macros(frames, cache, heads, d_k, cache_dtype)
        self.out_shape, self.dtype = (frames, heads * d_k), DTYPES[cache_dtype]
        self._unit = compile_for_cpu(attention.source(), self.macros, [attention.ENTRY])

    def __call__(self, inputs: Mapping[str, NDArray[Any]], order: int = 0) -> NDArray[Any]:
        """Return the output [B, T, D]. `order` other than 0 shuffles threads and blocks."""
        rows, slots = len(inputs["row_slot"]), len(inputs["k_ring"])
        arrays = [np.array(inputs[name], order="C") for name in attention.INPUTS]
        assert all(array.dtype == self.dtype for array in arrays[:6]), "floating-point tensors have one type"
        out = np.full([rows, *self.out_shape], np.nan, self.dtype)
        grid, block = (rows, self.macros["HEADS"], 1), (self.macros["BLOCK"], 1, 1)
        self._unit.launch(attention.ENTRY, grid, block, [*arrays, np.int32(slots), out], order)
        return out


class GpuAttention:
    """The kernel on the GPU of this machine."""

    def __init__(self, device: Any, frames: int, cache: int, heads: int, d_k: int, cache_dtype: str) -> None:
        from nemostream.runtime.backends.gpu.cuda import compile_kernels

        self.macros = attention.macros(frames, cache, heads, d_k, cache_dtype)
        self.out_shape, self.dtype, self._device = (frames, heads * d_k), DTYPES[cache_dtype], device
        image = compile_kernels(self.macros, device.architecture, "cubin", attention.source())
        module = device._call("cuModuleLoadData", image)
        self._function = device._call("cuModuleGetFunction", module, attention.ENTRY.encode())

    def __call__(self, inputs: Mapping[str, NDArray[Any]], order: int = 0) -> NDArray[Any]:
        device, rows, slots = self._device, len(inputs["row_slot"]), len(inputs["k_ring"])
        out = np.full([rows, *self.out_shape], np.nan, self.dtype)
        values = []
        for array in (*(inputs[name] for name in attention.INPUTS), out):
            address = device.allocate(array.nbytes)
            device.write(address, np.ascontiguousarray(array).view(np.uint8))
            values.append(np.array([address], np.uint64))
        values.insert(-1, np.array([slots], np.int32))
        pointers = np.array([value.ctypes.data for value in values], np.uint64)
        grid, block = (rows, self.macros["HEADS"], 1), (self.macros["BLOCK"], 1, 1)
        device._call("cuLaunchKernel", self._function, *grid, *block, 0, device.stream, pointers.ctypes.data, 0)
        device.read(int(values[-1][0]), out.view(np.uint8))
        return out


def make_inputs(
    rng: np.random.Generator, frames: int, cache: int, heads: int, d_k: int, cache_dtype: str, left: int | None = None
) -> Inputs:
    """Return inputs of the kernel: a row for each case of position, valid frames and slot, in permuted slots.

    Cases: the first step, a ring that is empty, partly filled, full and wrapped around at every offset of its write
    position, a stream that ends within the step; slots that no row uses, and rows without a slot (the last two).
    """
    left = cache if left is None else left
    positions = [0, 1, frames, cache - 1, cache, cache + 1, 2 * cache + 3, (1 << 40) + 5]
    position = np.array([*positions, *positions[::-1], 7, 7], np.int64)
    rows, slots, width = len(position), len(position) + 3, heads * d_k
    valid = np.full(rows, frames, np.int64)
    valid[1:-2:3] = rng.integers(0, frames + 1, len(valid[1:-2:3]))
    valid[3] = -2
    valid[0], valid[len(positions) * 2 - 1] = frames, 1  # a row without any visible frame has no softmax
    slot = rng.permutation(slots)[:rows].astype(np.int32)
    slot[-2:] = -1, slots

    def normal(*shape: int, scale: float = 1.0) -> NDArray[Any]:
        return (scale * rng.standard_normal(shape)).astype(DTYPES[cache_dtype])

    qkv = normal(rows, frames, 3 * width)
    qkv[..., :width] = (qkv[..., :width].astype(np.float32) * d_k**-0.5).astype(qkv.dtype)
    return {
        "qkv": qkv,
        "k_ring": normal(slots, heads, cache, d_k),
        "v_ring": normal(slots, heads, cache, d_k),
        "positions": normal(cache + 2 * frames - 1, width),
        "bias_u": normal(heads, d_k, scale=d_k**-0.5),
        "bias_v": normal(heads, d_k, scale=d_k**-0.5),
        "row_slot": slot,
        "position": position,
        "old_frames": np.minimum(position, left)[:, None],
        "new_frames": valid[:, None],
    }


def reference(inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Return the output [B, T, D] in float64.

    Written over the frames of the stream in the order of time, and without a mask, unlike the kernel and the graph.
    """
    arrays = {name: array.astype(np.float64) for name, array in inputs.items() if array.dtype.kind not in "iu"}
    slots, heads, cache, d_k = arrays["k_ring"].shape
    rows, frames, _ = arrays["qkv"].shape
    out = np.zeros([rows, frames, heads, d_k])
    queries, new_keys, new_values = np.split(arrays["qkv"].reshape(rows, frames, 3 * heads, d_k), 3, axis=2)
    positions = arrays["positions"].reshape(-1, heads, d_k)
    for row, slot in enumerate(inputs["row_slot"].tolist()):
        if not 0 <= slot < slots:
            continue
        position, past, valid = (int(inputs[name].ravel()[row]) for name in ("position", "old_frames", "new_frames"))
        old, new = np.arange(position - past, position), np.arange(max(valid, 0))
        keys = np.concatenate([arrays["k_ring"][slot][:, old % cache].transpose(1, 0, 2), new_keys[row, new]])
        values = np.concatenate([arrays["v_ring"][slot][:, old % cache].transpose(1, 0, 2), new_values[row, new]])
        times = np.concatenate([old, position + new])
        for frame in range(frames):
            distance = position + frame - times
            shifted = positions[cache + frames - 1 - distance]  # [keys, heads, d_k]
            query = queries[row, frame]
            scores = ((query + arrays["bias_u"]) * keys).sum(-1) + ((query + arrays["bias_v"]) * shifted).sum(-1)
            weights = np.exp(scores - scores.max(axis=0))
            out[row, frame] = ((weights / weights.sum(axis=0))[..., None] * values).sum(axis=0)
    return out.reshape(rows, frames, heads * d_k)
