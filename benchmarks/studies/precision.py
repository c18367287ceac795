"""What does every precision cost in words? Answered on a CPU, for GPUs too.

    python -m nemostream.benchmarks.studies.precision --manifest heldout.jsonl --json precision.json

Word error rate of a bundle (default: the packaged model) on a NeMo manifest (`audio_filepath`, `text`) without case and
punctuation, per precision and chunk size, and on how many recordings the text is exactly fp32's. "int8, CPU" is what
`nemostream build` makes for a CPU; fp16, int8 and fp8 are the graphs that TensorRT gets, run by ONNX Runtime on a CPU,
node by node as they are written (bf16 no CPU runs).
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
from nemostream.benchmarks import accuracy
from nemostream.benchmarks.harness.records import hardware
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.engine.calibration import measure_ranges
from nemostream.engine.precision import CACHE_DTYPES, write_typed
from nemostream.engine.validate import validate_engine
from nemostream.engines import build_engine, speech
from nemostream.errors import EngineValidationError, NemostreamError
from nemostream.plans import Plan, PlanStore, Recipe
from nemostream.runtime.backends.cpu import OrtBackend

_TYPED = ("fp16", "int8", "fp8")


def word_errors(bundle: Bundle, manifest: Path, folder: Path) -> list[dict[str, Any]]:
    """A row per chunk size and precision. Engines are made in `folder`."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    wanted = [row["text"] for row in rows]
    figures = []
    for chunk in bundle.manifest.chunks:
        ranges = measure_ranges(bundle, chunk, speech(bundle.manifest))
        validated, _ = build_engine(bundle, chunk, "int8", PlanStore(folder), backend="onnxruntime")
        plans = {"fp32": None, "int8, CPU": validated}
        plans |= {precision: _typed(bundle, chunk, precision, ranges, folder) for precision in _TYPED}
        exact: list[str] = []
        for precision, plan in plans.items():
            backend = OrtBackend(bundle, plans={chunk.ms: plan} if plan else None)
            with nemostream.Model(bundle, backend, chunk.ms) as model:
                texts = [model.transcribe(manifest.parent / row["audio_filepath"]).text for row in rows]
            exact = exact or texts
            counted = accuracy.word_errors(wanted, texts, accuracy.plain)
            figures.append(
                {
                    "chunk_ms": chunk.ms,
                    "precision": precision,
                    "wer": counted["wer"],
                    "recordings": len(rows),
                    "words": counted["words"],
                    "same_text_as_fp32": sum(a == b for a, b in zip(texts, exact, strict=True)),
                    "gate": dict(plan.validation) if plan and plan.validation else None,
                }
            )
    return figures


def _typed(bundle: Bundle, chunk: ChunkConfig, precision: str, ranges: dict[str, float], folder: Path) -> Plan:
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
        lambda place: write_typed(bundle, chunk, precision, ranges, place, recipe.stem),
        lambda plan: _gate(bundle, chunk, plan),
    )


def _gate(bundle: Bundle, chunk: ChunkConfig, plan: Plan) -> dict[str, Any]:
    """The gate's figures, or nothing if it refuses: that is told by the words."""
    backends = OrtBackend(bundle, 2, plans={chunk.ms: plan}), OrtBackend(bundle, 2)
    try:
        return validate_engine(bundle.manifest, chunk, plan.recipe.precision, *backends, speech(bundle.manifest))
    except EngineValidationError as error:
        print(error, file=sys.stderr)
        return {}


def show(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"{report['hardware']['cpu']}, {report['hardware']['cores']} cores; onnxruntime {report['onnxruntime']}"]
    if report["words"]:
        lines += ["", "| chunk | precision | WER | same text as fp32 | gate: least cosine |", "|---|---|---|---|---|"]
        for row in report["words"]:
            cosine = f"{row['gate']['cosine']:.5f}" if row["gate"] else "–"
            lines.append(
                f"| {row['chunk_ms']} ms | {row['precision']} | {100 * row['wer']:.2f} % | "
                f"{row['same_text_as_fp32']} of {row['recordings']} | {cosine} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nemostream.benchmarks.studies.precision", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--manifest", type=Path, required=True, help="recordings and their texts, as NeMo writes them")
    parser.add_argument("--bundle", type=Path, help="whose words are counted (default: the packaged model)")
    parser.add_argument("--json", type=Path, help="write the report with every sample here, and a .md beside it")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {
        "hardware": hardware(),
        "onnxruntime": onnxruntime.__version__,
        "command": shlex.join(sys.argv),
        "words": [],
    }
    try:
        with tempfile.TemporaryDirectory(prefix="nemostream-") as folder:
            bundle = Bundle.open(options.bundle or nemostream.demo_bundle())
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
