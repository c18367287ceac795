"""Write a bundle: graphs, weights (each once), tokenizer and manifest."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from nemostream.bundle import MANIFEST_NAME, Bundle, File, Graph, Manifest, Tensor, Weight, sha256
from nemostream.errors import OptionError
from nemostream.export.checkpoint import Checkpoint
from nemostream.export.decoder import write_decoder, write_joint
from nemostream.export.encoder import write_encoder
from nemostream.export.features import write_features
from nemostream.export.graph import WeightStore
from nemostream.export.languages import order_languages, select_language
from nemostream.export.parity import measure_parity
from nemostream.export.reference import open_reference
from nemostream.export.sources import find_source

_LIBRARIES = ("nemostream", "nemo_toolkit", "torch", "onnx", "onnxruntime", "numpy")


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    progress: Callable[[str], None] | None = None,
    *,
    language: str | None = None,
) -> Bundle:
    """Export a checkpoint into the bundle folder `out`.

    `checkpoint` is a `.nemo` file, a folder with one, a folder in transformers' format (`nemotron_asr_streaming`,
    `nemotron3_5_asr`), a model on Hugging Face as "owner/name" or "owner/name@revision", or the name of a model that
    NeMo can fetch. The graphs are compared with NeMo, transformers or NumPy (`nemostream.export.reference`) before the
    bundle appears at `out`: for each chunk size they may differ by at most 1e-4 in fp32 over at least 12 consecutive
    steps of recorded speech. An existing bundle is replaced. `progress` is called with a message before each step, and
    with warnings. `language` is that of streams that set none: the default of a prompted model, or the language of a
    model of one language, if it is not English.

    Raises `CheckpointError` if the checkpoint is not supported (before any work is done), `ParityError` if the output
    of a graph differs from the reference's, `OptionError` if `out` exists and is not a bundle, or if the model does not
    have `language`.
    """
    report = progress or (lambda message: None)
    out = Path(out)
    if out.exists() and not (out / MANIFEST_NAME).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OptionError(f"{out} exists and is not a bundle; choose another folder.")
    found = find_source(checkpoint, report)
    config = found.check()
    select_language(config.languages, language)
    for warning in config.warnings:
        report(f"warning: {warning}")

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder, unpacked = Path(temporary) / "bundle", Path(temporary) / "checkpoint"
        folder.mkdir()
        report(f"reading {found.path}")
        bundle = write_bundle(found.open(unpacked), folder, found.describe(), report, language)
        report("loading the checkpoint for the comparison")
        shutil.rmtree(unpacked, ignore_errors=True)  # as large as the checkpoint
        manifest = measure_parity(bundle, open_reference(found, unpacked), report)
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    report(f"wrote {out} ({sum(f.stat().st_size for f in out.iterdir()) / 1e6:.1f} MB)")
    return Bundle(out, manifest)


def write_bundle(
    source: Checkpoint,
    folder: Path,
    origin: Mapping[str, Any],
    report: Callable[[str], None] = lambda message: None,
    language: str | None = None,
) -> Bundle:
    """Write graphs, weights, tokenizer and manifest into an empty folder, without comparing them with a reference."""
    languages = order_languages(select_language(source.languages, language), source.pieces())
    graphs, weights, tensors = _write_graphs(source, folder, report)
    tokenizer = folder / "tokenizer.model"
    shutil.copyfile(source.tokenizer, tokenizer)
    manifest = Manifest(
        name=source.name,
        features=source.features,
        encoder=source.encoder,
        decoder=source.decoder,
        chunks=source.chunks,
        graphs=graphs,
        weights=_file(weights),
        tensors=tensors,
        tokenizer=_file(tokenizer),
        languages=languages,
        checkpoint=origin,
        versions=_versions(),
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle(folder, manifest)


def _write_graphs(
    source: Checkpoint, folder: Path, report: Callable[[str], None]
) -> tuple[dict[str, Graph], Path, dict[str, Weight]]:
    store = WeightStore(folder / "weights.bin")
    graphs = {}
    try:
        for chunk in source.chunks:
            for kind, write in (("features", write_features), ("encoder", write_encoder)):
                report(f"writing {kind}-{chunk.ms}ms")
                name = f"{kind}-{chunk.ms}ms"
                graphs[name] = _save(write(source, chunk, store), folder / f"{name}.onnx")
        for name, write_net in (("decoder", write_decoder), ("joint", write_joint)):
            report(f"writing {name}")
            graphs[name] = _save(write_net(source, store), folder / f"{name}.onnx")
    finally:
        store.close()
    return graphs, store.path, store.tensors("features.", "decoder.", "joint.")


def _save(model: onnx.ModelProto, path: Path) -> Graph:
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(path, full_check=True)
    inputs, outputs = (tuple(_tensor(value) for value in values) for values in (model.graph.input, model.graph.output))
    return Graph(path.name, sha256(path), inputs, outputs)


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    shape = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
    return Tensor(value.name, helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape)


def _file(path: Path) -> File:
    return File(path.name, sha256(path), path.stat().st_size)


def _versions() -> dict[str, str]:
    """Return the versions of those libraries that are installed."""
    versions = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
