"""The attention kernel, compared with float64 and with every layer of the ONNX graphs, and compiled for GPUs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from attention_kernel import CpuAttention, GpuAttention, make_inputs, reference
from cuda_on_cpu import MISSING

from nemostream.bundle import Bundle
from nemostream.engine.attention import INPUTS, OP, fuse_attention
from nemostream.engine.precision import read_encoder
from nemostream.errors import BackendError
from nemostream.runtime.backends.gpu.kernels import attention

CACHE_DTYPES = ("float32", "float16", "bfloat16")
# Largest relative error of the result: half a unit in the last place of the output, if it is narrower than fp32.
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
FULL = (70, 8, 128)  # C, heads, d_k of the 0.6B model
# T, C, heads, d_k. They differ in the number of tiles, queries per thread, and loads per row.
SIZES = [(7, 70, 4, 32), (14, 70, 1, 128), (1, 70, 2, 64), (2, 11, 3, 8), (5, 20, 2, 40), (16, 300, 1, 16)]

needs_compiler = pytest.mark.skipif(MISSING, reason="needs g++ to run the kernels on a CPU")


@pytest.fixture(params=[pytest.param("cpu", marks=needs_compiler), pytest.param("gpu", marks=pytest.mark.gpu)])
def make_kernel(request: pytest.FixtureRequest) -> Any:
    """Return a function that compiles the kernel for T, C, heads, d_k and a type."""
    if request.param == "cpu":
        return CpuAttention
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    try:
        device = CudaDevice()
    except BackendError as error:
        pytest.skip(str(error))
    request.addfinalizer(device.close)
    return lambda *sizes: GpuAttention(device, *sizes)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_results(sizes: tuple[int, int, int, int], cache_dtype: str, make_kernel: Callable[..., Any]) -> None:
    inputs = make_inputs(np.random.default_rng(sum(sizes)), *sizes, cache_dtype, left=sizes[1] - 2)
    got, wanted = make_kernel(*sizes, cache_dtype)(inputs).astype(np.float64), reference(inputs)
    assert np.abs(wanted[:-2]).max(axis=(1, 2)).min() > 0.1
    np.testing.assert_allclose(got, wanted, rtol=ROUNDING[cache_dtype], atol=1e-5)
    assert not got[-2:].any(), "rows without a slot are zero"


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("sizes", SIZES[:3], ids=str)
def test_bits_do_not_depend_on_the_order_of_threads(
    sizes: tuple[int, int, int, int], cache_dtype: str, make_kernel: Callable[..., Any]
) -> None:
    """Detects missing barriers. On a GPU the order is the device's own."""
    inputs = make_inputs(np.random.default_rng(1), *sizes, cache_dtype)
    kernel = make_kernel(*sizes, cache_dtype)
    assert len({kernel(inputs, order=order).tobytes() for order in (0, 1, 2, 3)}) == 1


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_bits_do_not_depend_on_batch_and_slot(cache_dtype: str, make_kernel: Callable[..., Any]) -> None:
    sizes = SIZES[0]
    inputs = make_inputs(np.random.default_rng(2), *sizes, cache_dtype)
    kernel = make_kernel(*sizes, cache_dtype)
    together, by_slot = kernel(inputs), ("k_ring", "v_ring")
    by_row = ("qkv", "position", "old_frames", "new_frames")
    for row, slot in enumerate(inputs["row_slot"][:-2].tolist()):
        alone = inputs | {name: inputs[name][row : row + 1] for name in by_row}
        alone |= {name: inputs[name][slot : slot + 1] for name in by_slot} | {"row_slot": np.zeros(1, np.int32)}
        assert kernel(alone).tobytes() == together[row].tobytes()


@needs_compiler
@pytest.mark.parametrize("ms", [80, 160, 560, 1120])
def test_layers_of_the_graph(ms: int, demo_bundle: Bundle) -> None:
    """Every layer's attention equals that of the graph for the same inputs, also where no frame is visible."""
    manifest, chunk = demo_bundle.manifest, demo_bundle.manifest.chunk(ms)
    spec, frames = manifest.encoder, chunk.frames
    fused = read_encoder(demo_bundle, chunk)
    fuse_attention(fused)
    nodes = [node for node in fused.graph.node if node.op_type == OP]
    model = read_encoder(demo_bundle, chunk)
    del model.graph.output[:]
    computed = {output for node in model.graph.node for output in node.output}
    wanted = [*(node.output[0] for node in nodes), *(n for node in nodes for n in node.input if n in computed)]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(wanted))
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(demo_bundle.path))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    rng = np.random.default_rng(ms)
    position = np.array([0, 0, 1, frames, 69, 70, 71, 500, 12_345, 0])
    window = spec.mel_cache + spec.subsampling * frames
    valid = np.full(len(position), window)
    valid[1], valid[3:8:2] = window - 3, (window - 9, 20, 10)
    valid[-1] = 0
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    feed = {
        value.name: rng.standard_normal([len(position), *value.shape[1:]]).astype(kinds[value.type])
        for value in session.get_inputs()
    }
    feed |= {"position": position, "valid": valid}
    values = feed | dict(zip(dict.fromkeys(wanted), session.run(None, feed), strict=True))
    assert values[nodes[0].input[INPUTS.index("new_frames")]].min() <= 0, "a row has no visible frame"
    slots = rng.permutation(len(position) + 2)[: len(position)].astype(np.int32)
    kernel = CpuAttention(frames, spec.cache, spec.heads, spec.d_model // spec.heads, "float32")
    for node in nodes:
        inputs: dict[str, Any] = {"row_slot": slots}
        for name, value in zip(INPUTS, node.input, strict=True):
            if name in ("k_ring", "v_ring"):
                inputs[name] = np.full([len(slots) + 2, *values[value].shape[1:]], np.nan, np.float32)
                inputs[name][slots] = values[value]
            elif value in values:
                inputs[name] = values[value]
            elif name != "row_slot":
                (tensor,) = (tensor for tensor in fused.graph.initializer if tensor.name == value)
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(demo_bundle.path))
                inputs[name] = onnx.numpy_helper.to_array(tensor)
        got, expected = kernel(inputs), values[node.output[0]]
        np.testing.assert_allclose(got[:-1], expected[:-1], atol=1e-5, rtol=1e-5)
        # Masked scores are rounded to a multiple of 2**-10, because they are near -10000.
        np.testing.assert_allclose(got[-1], expected[-1], atol=2e-3)
    assert len(nodes) == spec.layers


def test_arguments_have_one_order() -> None:
    """In the graph, in the kernel, and in the list by which both are tested."""
    assert attention.INPUTS == INPUTS
    source = attention.source()
    signature = re.search(rf"{attention.ENTRY}\((.*?)\) \{{", source, re.DOTALL)
    assert signature is not None
    names = re.findall(r"(\w+)[,)]?\s*(?://.*)?$", signature[1] + ")", re.MULTILINE)
    assert tuple(name for name in names if name) == attention.ARGUMENTS


@pytest.mark.parametrize(
    ("sizes", "tile"),
    [
        ((7, *FULL, "float16"), 128),  # 128 rows of 272 bytes, 7 queries of 128 units, and 7 x 77 scores: 40,556 bytes
        ((7, *FULL, "float32"), 64),  # 64 rows of 528 bytes, with 5,740 bytes of queries and scores: 39,532 bytes
        ((27, *FULL, "float32"), 32),
        ((20, 300, 1, 64, "bfloat16"), 128),  # 48 KiB
        ((58, 70, 1, 64, "float16"), 32),  # 48 KiB
    ],
)
def test_as_many_rows_are_staged_as_fit(sizes: tuple[int, int, int, int, str], tile: int) -> None:
    """In the 48 KiB of shared memory that a block has. Staged rows have an odd number of 16-byte vectors."""
    frames, cache, heads, d_k, cache_dtype = sizes
    assert attention.macros(*sizes) == {
        "FRAMES": frames,
        "CACHE": cache,
        "HEADS": heads,
        "D_K": d_k,
        "TILE": tile,
        "BLOCK": 256,
        "CELL_TYPE": CACHE_DTYPES.index(cache_dtype),
    }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((7, 70, 4, 44, "float16"), "heads of 88 bytes; a multiple of 16"),
        ((7, 70, 4, 2, "float32"), "heads of 8 bytes; a multiple of 16"),
        ((100, 70, 1, 128, "float32"), "shared memory for 100 frames and heads of 512 bytes"),
        ((59, 70, 1, 64, "float16"), "needs 50156 bytes of shared memory for 59 frames and heads of 128 bytes"),
    ],
)
def test_unsupported_sizes(sizes: Any, message: str) -> None:
    with pytest.raises(BackendError, match=f"{message}.*build the engine without it"):
        attention.macros(*sizes)


# -- for GPUs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 7, 14])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("architecture", ["sm80", "sm90", "sm120"])
def test_resources(architecture: str, cache_dtype: str, frames: int) -> None:
    """At the sizes of the 0.6B model no registers are spilled, and those of three blocks fit into a multiprocessor."""
    used = ptxas(attention.macros(frames, *FULL, cache_dtype), architecture)
    assert used["spilled"] == used["stack"] == 0
    assert used["registers"] <= 80
    assert used["shared"] <= 48 << 10


def ptxas(macros: dict[str, int], architecture: str) -> dict[str, int]:
    """Return the resources of a thread and block, reported by the assembler."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-python")
    options = [f"-arch={architecture.replace('sm', 'sm_')}", "--std=c++17", "--ptxas-options=-v"]
    options += [f"-D{name}={value}" for name, value in macros.items()]
    _, program = nvrtc.nvrtcCreateProgram(attention.source().encode(), b"attention.cu", 0, None, None)
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytes(max(2, size))  # CPython shares all objects of one byte, and NVRTC writes into this one
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(program)
    text = log.decode()
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, text
    patterns = {
        "registers": r"Used (\d+) registers",
        "shared": r"(\d+) bytes smem",
        "stack": r"(\d+) bytes stack frame",
        "spilled": r"(\d+) bytes spill stores",
    }
    found = {name: re.search(pattern, text) for name, pattern in patterns.items()}
    assert all(found.values()), text
    return {name: int(match[1]) for name, match in found.items() if match}
