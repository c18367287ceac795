"""A prompted bundle made by hand: the graphs of a bundle of one language, with prompt layers after the encoder."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from nemostream.bundle import MANIFEST_NAME, Bundle, Graph, LanguageConfig, Tensor

LANGUAGES = LanguageConfig(default="de-DE", prompts={"en-US": 0, "de-DE": 3, "fr-FR": 4, "auto": 6}, count=7)
HIDDEN = 96  # of the prompt layers


def prompt_weights(d_model: int, seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Return weights with which the prompt changes the encoder output as much as the audio does."""
    rng = np.random.default_rng(seed)
    arrays = {
        "prompt.table": rng.standard_normal((LANGUAGES.count, HIDDEN)),
        "prompt.in.weight": rng.standard_normal((d_model, HIDDEN)) / np.sqrt(d_model),
        "prompt.out.weight": rng.standard_normal((HIDDEN, d_model)) * scale / np.sqrt(HIDDEN),
        "prompt.out.bias": rng.standard_normal(d_model) * 0.1 * scale,
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def prompted_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """Write a copy of a bundle of one language with prompt layers to `folder` and return it."""
    shutil.copytree(bundle.path, folder, dirs_exist_ok=True)
    graphs = dict(bundle.manifest.graphs)
    for name, graph in graphs.items():
        if name.startswith("encoder-"):
            model = onnx.load(folder / graph.file, load_external_data=False)
            add_prompt_layers(model, bundle.manifest.encoder.d_model)
            content = model.SerializeToString(deterministic=True)
            (folder / graph.file).write_bytes(content)
            inputs = (*graph.inputs, Tensor("prompt", "int64", ("B",)))
            graphs[name] = Graph(graph.file, hashlib.sha256(content).hexdigest(), inputs, graph.outputs)
    manifest = dataclasses.replace(bundle.manifest, graphs=graphs, languages=LANGUAGES)
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return Bundle.open(folder)


def add_prompt_layers(model: onnx.ModelProto, d_model: int) -> None:
    """Add the input `prompt` [B] and `ReLU(x W1 + table[prompt]) W2 + b` after the last layer, whose output is x."""
    graph = model.graph
    encoded = next(node for node in graph.node if node.name == "output/encoded").input[0]
    graph.input.append(helper.make_tensor_value_info("prompt", onnx.TensorProto.INT64, ["B"]))
    for name, array in prompt_weights(d_model).items():
        graph.initializer.append(numpy_helper.from_array(array, name))
    graph.initializer.append(numpy_helper.from_array(np.array([1]), "prompt/axis"))
    added = [
        helper.make_node(kind, inputs, [f"prompt/{name}"], name=f"prompt/{name}")
        for kind, inputs, name in (
            ("MatMul", [encoded, "prompt.in.weight"], "in"),
            ("Gather", ["prompt.table", "prompt"], "row"),
            ("Unsqueeze", ["prompt/row", "prompt/axis"], "rows"),
            ("Add", ["prompt/in", "prompt/rows"], "sum"),
            ("Relu", ["prompt/sum"], "hidden"),
            ("MatMul", ["prompt/hidden", "prompt.out.weight"], "out"),
            ("Add", ["prompt/out", "prompt.out.bias"], "encoded"),
        )
    ]
    nodes, first = list(graph.node), min(i for i, node in enumerate(graph.node) if encoded in node.input)
    for node in nodes[first:]:
        for index, name in enumerate(node.input):
            if name == encoded:
                node.input[index] = "prompt/encoded"
    del graph.node[:]
    graph.node.extend([*nodes[:first], *added, *nodes[first:]])
