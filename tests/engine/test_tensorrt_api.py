"""Every name of TensorRT that the package uses exists in the bindings, with the expected kind of result.

The names are read from the package's sources. They are compared with the installed TensorRT for RTX, and with the lists
of TensorRT 10.13.0 (the oldest supported version) and 11.1.0 in `tensorrt_api.json`, which were read from the public
source of their bindings (github.com/NVIDIA/TensorRT, `python/src`, tags v10.13.0 and v11.1).
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from nemostream.engine import tensorrt as building
from nemostream.runtime.backends.gpu import tensorrt as running

Name = tuple[str, str]  # class, attribute; the class of names of the module itself is "module"

# Expressions in the sources, and the TensorRT class of their values.
OBJECTS = {
    building: {
        "trt": "module",
        "self._trt": "module",
        "library": "module",
        "builder": "Builder",
        "network": "INetworkDefinition",
        "parser": "OnnxParser",
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
        "tensor": "ITensor",
        "config.get_timing_cache()": "ITimingCache",
    },
    running: {
        "trt": "module",
        "self._trt": "module",
        "self._runtime": "Runtime",
        "engine": "ICudaEngine",
        "self._engine": "ICudaEngine",
        "context": "IExecutionContext",
        "self._contexts[-1]": "IExecutionContext",
        "config": "IRuntimeConfig",
        "self._cache": "IRuntimeCache",
        "validity": "EngineValidity",
    },
}
# Used only if they exist.
RTX_ONLY = {
    ("module", "ComputeCapability"),
    ("BuilderFlag", "REQUIRE_USER_ALLOCATION"),
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
    ("module", "DynamicShapesKernelSpecializationStrategy"),
    ("DynamicShapesKernelSpecializationStrategy", "EAGER"),
    ("module", "CudaGraphStrategy"),
    ("CudaGraphStrategy", "DISABLED"),
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    ("IRuntimeConfig", "cuda_graph_strategy"),
    ("IRuntimeConfig", "create_runtime_cache"),
    ("IRuntimeConfig", "set_runtime_cache"),
    ("IRuntimeCache", "serialize"),
    ("IRuntimeCache", "deserialize"),
    ("IExecutionContext", "is_stream_capturable"),
    ("Runtime", "get_engine_validity"),
    ("EngineValidity", "name"),
}
# What the sources test of the results.
RESULTS = {
    ("IBuilderConfig", "add_optimization_profile"): "int",
    ("IBuilderConfig", "set_compute_capability"): "bool",
    ("IBuilderConfig", "set_timing_cache"): "bool",
    ("OnnxParser", "parse_from_file"): "bool",
    ("IExecutionContext", "execute_async_v3"): "bool",
    ("IExecutionContext", "infer_shapes"): "list[str]",
    ("IExecutionContext", "is_stream_capturable"): "bool",
    ("IExecutionContext", "set_input_shape"): "bool",
    ("IExecutionContext", "set_optimization_profile_async"): "bool",
    ("IExecutionContext", "set_tensor_address"): "bool",
    ("IExecutionContext", "update_device_memory_size_for_shapes"): "int",
    ("ICudaEngine", "get_device_memory_size_for_profile_v2"): "int",
    ("IRuntimeCache", "deserialize"): "bool",
    ("IRuntimeConfig", "set_runtime_cache"): "bool",
    ("Runtime", "get_engine_validity"): "tuple",
}


def names_in(module: object) -> set[Name]:
    """Return the TensorRT names in the source of a module of the package."""
    objects = OBJECTS[module]  # type: ignore[index]

    def class_of(node: ast.expr) -> str | None:
        if known := objects.get(ast.unparse(node)):
            return known
        if isinstance(node, ast.Attribute) and class_of(node.value) == "module":
            return node.attr
        return None

    found, seen = set(), set()
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):  # type: ignore[attr-defined]
        owner, name = None, ""
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr"):
            owner, argument = node.args[:2]
            name = argument.value if isinstance(argument, ast.Constant) else ""
        if owner is not None and name and (kind := class_of(owner)):
            found.add((kind, name))
            seen.add(ast.unparse(owner))
    assert objects.keys() <= seen, "the source has renamed a variable"
    return found


USED = {name for module in OBJECTS for name in names_in(module) if not name[1].startswith("__")}


def test_the_sources_are_read() -> None:
    """A few names of each kind: plain, of an enumeration, in `hasattr`, of a result."""
    assert {
        ("IExecutionContext", "set_tensor_address"),
        ("TensorIOMode", "INPUT"),
        ("BuilderFlag", "REQUIRE_USER_ALLOCATION"),
        ("ITimingCache", "serialize"),
        ("IExecutionContext", "is_stream_capturable"),
        ("module", "Runtime"),
    } <= USED
    assert len(USED) > 60
    assert RTX_ONLY <= USED and RESULTS.keys() <= USED


def test_names_exist_in_tensorrt_for_rtx() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")

    def exists(kind: str, name: str) -> bool:
        return hasattr(trt if kind == "module" else getattr(trt, kind, None), name)

    assert sorted(name for name in USED if not exists(*name)) == []


@pytest.mark.parametrize("version", ["10.13.0", "11.1.0"])
def test_names_exist_in_tensorrt(version: str) -> None:
    classes = json.loads((Path(__file__).parent / "tensorrt_api.json").read_text())[version]
    missing = {
        (kind, name) for kind, name in USED if name not in (classes if kind == "module" else classes.get(kind, ()))
    }
    assert missing == RTX_ONLY


def test_results_in_tensorrt_for_rtx() -> None:
    """The documented type of every result that the sources test; a call that returned nothing would look failed."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    for (kind, name), result in RESULTS.items():
        signature = getattr(getattr(trt, kind), name).__doc__
        returned = set(re.findall(r"^(?:\d+\. )?" + name + r"\(self.*\) -> (\S.*)$", signature, re.MULTILINE))
        assert returned == {result}, f"{kind}.{name}"
    # These return nothing; success is known from later calls.
    for kind, name in (("IExecutionContext", "set_device_memory"), ("IOptimizationProfile", "set_shape")):
        assert re.search(r"\) -> None$", getattr(getattr(trt, kind), name).__doc__, re.MULTILINE), f"{kind}.{name}"
