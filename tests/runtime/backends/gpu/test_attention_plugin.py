"""The TensorRT plugin of the attention kernel.

Without a GPU: its errors, and what it registers, with a fake `tensorrt.plugin` that has the rules of TensorRT 11.1's.
"""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attention_kernel import make_inputs, reference

from nemostream.errors import BackendError
from nemostream.extras import install_command
from nemostream.runtime.backends.gpu import attention_plugin
from nemostream.runtime.backends.gpu.kernels import attention


class TensorDesc:
    """Shapes are symbolic: "B" for the batch, "S" for the slots; `shape` has -1 instead."""

    def __init__(self, shape_expr: tuple[Any, ...], dtype: str) -> None:
        self.shape_expr, self.dtype = shape_expr, dtype
        self.shape = tuple(-1 if isinstance(size, str) else size for size in shape_expr)


class KernelLaunchParams:
    def __init__(self) -> None:
        self.grid_x: Any = 1
        self.grid_y = self.grid_z = self.block_x = self.block_y = self.block_z = 1
        self.shared_mem = 0


class SymIntExprs(list[Any]):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class FakePlugins(types.ModuleType):
    """`tensorrt.plugin`: a registered function has annotated tensors only; `aot_impl` repeats its parameters."""

    TensorDesc, KernelLaunchParams, SymIntExprs = TensorDesc, KernelLaunchParams, SymIntExprs

    def __init__(self) -> None:
        super().__init__("tensorrt.plugin")
        self.op = types.SimpleNamespace()
        self.registered: dict[str, Any] = {}
        self.implementations: dict[str, Any] = {}

    @staticmethod
    def SymInt32(value: Any) -> Any:
        return value

    @staticmethod
    def from_shape_expr(shape: tuple[Any, ...], dtype: str) -> TensorDesc:
        return TensorDesc(shape, dtype)

    def register(self, name: str) -> Any:
        def decorator(function: Any) -> Any:
            signature = inspect.signature(function)
            assert all(issubclass(p.annotation, TensorDesc) for p in signature.parameters.values())
            assert issubclass(signature.return_annotation, TensorDesc)
            namespace, op = name.split("::")
            assert name not in self.registered
            setattr(self.op, namespace, types.SimpleNamespace(**{op: function}))
            self.registered[name] = function
            return function

        return decorator

    def aot_impl(self, name: str) -> Any:
        def decorator(function: Any) -> Any:
            signature = inspect.signature(function)
            tensors = list(inspect.signature(self.registered[name]).parameters)
            assert list(signature.parameters) == [*tensors, "outputs", "tactic"]
            assert all(issubclass(signature.parameters[tensor].annotation, TensorDesc) for tensor in tensors)
            assert signature.parameters["outputs"].annotation == tuple[TensorDesc]
            assert signature.parameters["tactic"].annotation is int
            assert signature.return_annotation == tuple[str, str, KernelLaunchParams, SymIntExprs]
            self.implementations[name] = function
            return function

        return decorator


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> FakePlugins:
    library, plugin = types.ModuleType("tensorrt"), FakePlugins()
    kinds = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}
    for name, value in {"__version__": "10.13.3.9", "plugin": plugin, "__path__": [], **kinds}.items():
        setattr(library, name, value)
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    return plugin


def descriptions(frames: int, dtype: str) -> dict[str, TensorDesc]:
    """Return the inputs as TensorRT describes them for the 0.6B model, in the order of the node."""
    shapes: dict[str, tuple[Any, ...]] = {
        "qkv": ("B", frames, 3 * 1024),
        "k_ring": ("S", 8, 70, 128),
        "v_ring": ("S", 8, 70, 128),
        "positions": (70 + 2 * frames - 1, 1024),
        "bias_u": (8, 128),
        "bias_v": (8, 128),
    }
    found = {name: TensorDesc(shape, dtype) for name, shape in shapes.items()}
    found["row_slot"], found["position"] = TensorDesc(("B",), "INT32"), TensorDesc(("B",), "INT64")
    return found | {name: TensorDesc(("B", 1), "INT64") for name in ("old_frames", "new_frames")}


@pytest.mark.parametrize(("frames", "dtype"), [(1, "FP32"), (7, "FP16"), (14, "BF16")])
def test_registered_plugin(
    frames: int, dtype: str, plugins: FakePlugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-python")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    attention_plugin.register()
    attention_plugin.register()  # once per process
    inputs = descriptions(frames, dtype)
    assert tuple(inputs) == attention.INPUTS
    (describe,), (compile_kernel,) = plugins.registered.values(), plugins.implementations.values()
    out = describe(*inputs.values())
    assert (out.shape_expr, out.dtype) == (("B", frames, 1024), dtype)
    name, ptx, launch, scalars = compile_kernel(*inputs.values(), (out,), 0)
    assert vars(launch) == {
        "grid_x": "B",
        "grid_y": 8,
        "grid_z": 1,
        "block_x": attention.BLOCK,
        "block_y": 1,
        "block_z": 1,
        "shared_mem": 0,  # the kernel's shared memory is static
    }
    assert scalars == ["S"]
    # TensorRT passes the addresses of the inputs, the scalars, and the address of the output.
    entry = re.search(rf"\.entry {name}\((.*?)\)", ptx, re.DOTALL)
    assert entry is not None
    kinds = re.findall(r"\.param \.(\w+)", entry[1])
    assert kinds == ["u64"] * len(inputs) + ["u32"] * len(scalars) + ["u64"]
    assert ".target sm_80" in ptx and "\0" not in ptx
    # Tensors are read 16 bytes at a time; the others are the slot (32 bit), position and numbers of frames (64 bit).
    loads = set(re.findall(r"ld\.global\.[\w.]+", ptx))
    assert loads <= {f"ld.global.nc.{kind}" for kind in ("v4.u32", "v4.f32", "u32", "u64")}
    assert re.search(rf"query\[{frames * 128 * 4}\]", ptx), "shared memory for the queries of all frames"


@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "bfloat16"])
def test_ptx_is_assembled_for_newer_gpus(cache_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The declared version of PTX has all instructions that the kernel uses."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-python")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("needs ptxas of the CUDA toolkit")
    path, target = tmp_path / "attention.ptx", tmp_path / "attention.cubin"
    path.write_text(attention_plugin.ptx(14, 70, 8, 128, cache_dtype))
    assert ".version 8.0\n" in path.read_text()
    for architecture in ("sm_80", "sm_90", "sm_120"):
        subprocess.run([ptxas, f"-arch={architecture}", str(path), "-o", str(target)], check=True)
        assert attention.ENTRY.encode() in target.read_bytes()


@pytest.mark.parametrize(
    ("version", "removed", "message"),
    [
        ("10.12.0.36", None, "and 10.12.0.36 is installed"),
        ("10.13.0.35", "aot_impl", "tensorrt.plugin 10.13.0.35 lacks aot_impl"),
        ("11.1.0.106", "KernelLaunchParams", "tensorrt.plugin 11.1.0.106 lacks KernelLaunchParams"),
        ("11.1.0.106", "tensorrt.plugin", "TensorRT 11.1.0.106 cannot load them"),
        ("11.1.0.106", "tensorrt", "and TensorRT is not installed"),
    ],
)
def test_required_version(
    version: str, removed: str | None, message: str, plugins: FakePlugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names what is required, what is missing, the remedy, and that TensorRT for RTX is no remedy."""
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", version)
    if removed in ("tensorrt", "tensorrt.plugin"):
        monkeypatch.setitem(sys.modules, removed, None)
    elif removed:
        monkeypatch.delattr(FakePlugins, removed)
    with pytest.raises(BackendError, match=re.escape(message)) as error:
        attention_plugin.register()
    for part in ("needs TensorRT 10.13 or newer", install_command("tensorrt"), "TensorRT for RTX does not"):
        assert part in str(error.value)
    assert not plugins.registered


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "bfloat16"])
def test_engine_with_the_plugin(cache_dtype: str) -> None:
    """A network of one fused node, parsed from ONNX and built by TensorRT, run with rings of all slots."""
    trt = pytest.importorskip("tensorrt", reason="needs TensorRT")
    import onnx

    from nemostream.engine.attention import DOMAIN, OP
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    try:
        device = CudaDevice()
    except BackendError as error:
        pytest.skip(str(error))
    frames, cache, heads, d_k = 7, 70, 4, 32
    inputs = make_inputs(np.random.default_rng(0), frames, cache, heads, d_k, cache_dtype)
    kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in inputs.items()}
    axes = {"k_ring": "S", "v_ring": "S", "positions": None, "bias_u": None, "bias_v": None}
    values = [
        onnx.helper.make_tensor_value_info(name, kinds[name], [axes.get(name, "B") or array.shape[0], *array.shape[1:]])
        for name, array in inputs.items()
    ]
    out = onnx.helper.make_tensor_value_info("out", kinds["qkv"], ["B", frames, heads * d_k])
    node = onnx.helper.make_node(
        OP, [*attention.INPUTS], ["out"], domain=DOMAIN, plugin_namespace=DOMAIN, plugin_version="1", aot=1
    )
    graph = onnx.helper.make_graph([node], "attention", values, [out])
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)

    attention_plugin.register()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    flags = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for name, array in inputs.items():
        smallest = array.shape if axes.get(name, "B") is None else (1, *array.shape[1:])
        profile.set_shape(name, smallest, array.shape, array.shape)
    config.add_optimization_profile(profile)
    blob = builder.build_serialized_network(network, config)
    assert blob is not None
    engine = trt.Runtime(logger).deserialize_cuda_engine(blob)
    context = engine.create_execution_context()
    got = np.zeros([len(inputs["row_slot"]), frames, heads * d_k], inputs["qkv"].dtype)
    addresses = {}
    for name, array in {**inputs, "out": got}.items():
        addresses[name] = device.allocate(array.nbytes)
        device.write(addresses[name], np.ascontiguousarray(array).view(np.uint8))
        if name != "out":
            assert context.set_input_shape(name, array.shape)
        context.set_tensor_address(name, addresses[name])
    assert context.execute_async_v3(device.stream)
    device.read(addresses["out"], got.view(np.uint8))
    rounding = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[cache_dtype]
    np.testing.assert_allclose(got.astype(np.float64), reference(inputs), rtol=rounding, atol=1e-5)
    device.close()
