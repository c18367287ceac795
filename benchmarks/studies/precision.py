"""Word error rate of each precision, measured on a CPU for GPUs too.

    python -m nemostream.benchmarks.studies.precision --manifest heldout.jsonl --json precision.json

Measures, for each precision and chunk size, the word error rate of a bundle (default: the packaged model) on a NeMo
manifest (`audio_filepath`, `text`) without case and punctuation, and the number of recordings whose text is the same as
in fp32. "int8, CPU" is the engine that `nemostream build` makes for a CPU. fp16, int8 and fp8 are the graphs that
TensorRT receives, run by ONNX Runtime on a CPU node by node as written. bf16 is not supported by ONNX Runtime on CPUs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

import nemostream
from nemostream.benchmarks import accuracy, command
from nemostream.benchmarks.harness.records import hardware
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.engine.calibration import measure_ranges
from nemostream.engine.precision import CACHE_DTYPES, write_typed
from nemostream.engine.validate import validate_engine
from nemostream.engines import build_engine, speech
from nemostream.errors import EngineValidationError, NemostreamError
from nemostream.plans import Plan, PlanStore, Recipe
from nemostream.runtime.backends.cpu import OrtBackend

_GPU_PRECISIONS = ("fp16", "int8", "fp8")


def word_errors(bundle: Bundle, manifest: Path, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each chunk size and precision. Engines are built in `folder`."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    references = [row["text"] for row in rows]
    figures = []
    for chunk in bundle.manifest.chunks:
        ranges = measure_ranges(bundle, chunk, speech(bundle.manifest))
        validated, _ = build_engine(bundle, chunk, "int8", PlanStore(folder), backend="onnxruntime")
        plans = {"fp32": None, "int8, CPU": validated}
        plans |= {precision: _gpu_plan(bundle, chunk, precision, ranges, folder) for precision in _GPU_PRECISIONS}
        fp32_texts: list[str] = []
        for precision, plan in plans.items():
            backend = OrtBackend(bundle, plans={chunk.ms: plan} if plan else None)
            with nemostream.Model(bundle, backend, chunk.ms) as model:
                texts = [model.transcribe(manifest.parent / row["audio_filepath"]).text for row in rows]
            fp32_texts = fp32_texts or texts
            errors = accuracy.word_errors(references, texts, accuracy.plain)
            figures.append(
                {
                    "chunk_ms": chunk.ms,
                    "precision": precision,
                    "wer": errors["wer"],
                    "recordings": len(rows),
                    "words": errors["words"],
                    "same_text_as_fp32": sum(a == b for a, b in zip(texts, fp32_texts, strict=True)),
                    "validation": dict(plan.validation) if plan and plan.validation else None,
                }
            )
    return figures


def _gpu_plan(bundle: Bundle, chunk: ChunkConfig, precision: str, ranges: dict[str, float], folder: Path) -> Plan:
    """Return a plan that runs the graph of a GPU engine in ONNX Runtime."""
    recipe = Recipe.of(
        bundle,
        chunk.ms,
        backend="onnxruntime",
        library=onnxruntime.__version__,
        precision=precision,
        device="tried on a CPU",
        max_batch=0,
        cache_dtype=CACHE_DTYPES[precision],
    )
    return PlanStore(folder).put(
        recipe,
        lambda path: write_typed(bundle, chunk, precision, ranges, path, recipe.stem),
        lambda plan: _validate(bundle, chunk, plan),
    )


def _validate(bundle: Bundle, chunk: ChunkConfig, plan: Plan) -> dict[str, Any]:
    """Return the figures of the engine validation; empty if it fails, as the word error rate shows the effect."""
    backends = OrtBackend(bundle, 2, plans={chunk.ms: plan}), OrtBackend(bundle, 2)
    try:
        return validate_engine(bundle.manifest, chunk, plan.recipe.precision, *backends, speech(bundle.manifest))
    except EngineValidationError as error:
        print(error, file=sys.stderr)
        return {}


def show(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [f"{report['hardware']['cpu']}, {report['hardware']['cores']} cores; onnxruntime {report['onnxruntime']}"]
    if report["words"]:
        lines += [
            "",
            "| chunk | precision | WER | same text as fp32 | validation: minimum cosine |",
            "|---|---|---|---|---|",
        ]
        for row in report["words"]:
            cosine = f"{row['validation']['cosine']:.5f}" if row["validation"] else "–"
            lines.append(
                f"| {row['chunk_ms']} ms | {row['precision']} | {100 * row['wer']:.2f} % | "
                f"{row['same_text_as_fp32']} of {row['recordings']} | {cosine} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nemostream.benchmarks.studies.precision", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--manifest", type=Path, required=True, help="NeMo manifest of the recordings")
    parser.add_argument("--bundle", type=Path, help="bundle to run (default: the packaged model)")
    parser.add_argument("--json", type=Path, help="JSON file to write; a .md file is written next to it")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {
        "hardware": hardware(),
        "onnxruntime": onnxruntime.__version__,
        "command": shlex.join(sys.argv),
        "words": [],
    }
    try:
        with tempfile.TemporaryDirectory(prefix="nemostream-") as folder:
            bundle = command.open_bundle(options.bundle)
            report["words"] = word_errors(bundle, options.manifest, Path(folder))
    except NemostreamError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        options.json.with_suffix(".md").write_text(show(report), encoding="utf-8")
    print(show(report), end="")


if __name__ == "__main__":
    main()
