"""What does 8 bit cost in words and give in time, on this CPU?

    python -m nemostream.benchmarks.precision --manifest heldout.jsonl --speed FULL_SIZE_BUNDLE --json precision.json

Words: word error rate of a bundle (default: the packaged digits) on a NeMo manifest (`audio_filepath`, `text`), per
precision and chunk size, and on how many recordings the text is exactly fp32's. "int8, CPU" is what `nemostream build`
makes for a CPU; fp16, int8 and fp8 are the graphs that TensorRT gets, run by ONNX Runtime on the CPU, node by node as
they are written (bf16 no CPU runs).

Time: whole steps of `--speed`'s bundle (its weights may be random; they are then not gated, and nothing is said of its
words), fp32 and int8 in turns in one run, after the attention caches are full. Shown are medians, and least and most of
the ratios pair by pair.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import nemostream
from nemostream.benchmarks.floor import OtherWork, hardware
from nemostream.engine.calibration import measure_ranges
from nemostream.engine.precision import CELLS, write_int8_for_cpu, write_typed
from nemostream.engines import build_engine, speech
from nemostream.errors import GateError, NemostreamError
from nemostream.plans import Plan, PlanStore, Recipe
from nemostream.runtime.backend import Batch
from nemostream.runtime.gate import run_gate
from nemostream.runtime.ort import OrtBackend
from nemostream.spec import Bundle, Chunk

PRECISIONS = ("fp32", "int8")  # that are timed
_TYPED = ("fp16", "int8", "fp8")
_WARM_UP = 3


def word_errors(bundle: Bundle, manifest: Path, folder: Path) -> list[dict[str, Any]]:
    """A row per chunk size and precision. Engines are made in `folder`."""
    import jiwer

    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    wanted = [row["text"] for row in rows]
    figures = []
    for chunk in bundle.manifest.chunks:
        ranges = measure_ranges(bundle, chunk, speech(bundle.manifest))
        gated, _ = build_engine(bundle, chunk, "int8", PlanStore(folder), backend="onnxruntime")
        plans = {"fp32": None, "int8, CPU": gated}
        plans |= {precision: _typed(bundle, chunk, precision, ranges, folder) for precision in _TYPED}
        exact: list[str] = []
        for precision, plan in plans.items():
            backend = OrtBackend(bundle, plans={chunk.ms: plan} if plan else None)
            with nemostream.Model(bundle, backend, chunk.ms) as model:
                texts = [model.transcribe(manifest.parent / row["audio_filepath"]).text for row in rows]
            exact = exact or texts
            figures.append(
                {
                    "chunk_ms": chunk.ms,
                    "precision": precision,
                    "wer": jiwer.wer(wanted, texts),
                    "recordings": len(rows),
                    "words": sum(len(text.split()) for text in wanted),
                    "same_text_as_fp32": sum(a == b for a, b in zip(texts, exact, strict=True)),
                    "gate": dict(plan.gate) if plan and plan.gate else None,
                }
            )
    return figures


def _typed(bundle: Bundle, chunk: Chunk, precision: str, ranges: dict[str, float], folder: Path) -> Plan:
    recipe = Recipe.of(
        bundle, chunk.ms, backend="onnxruntime", library=onnxruntime.__version__, precision=precision,
        device="tried on a CPU", max_batch=0, cell=CELLS[precision],
    )  # fmt: skip
    return PlanStore(folder).put(
        recipe,
        lambda place: write_typed(bundle, chunk, precision, ranges, place, recipe.stem),
        lambda plan: _gate(bundle, chunk, plan),
    )


def _gate(bundle: Bundle, chunk: Chunk, plan: Plan) -> dict[str, Any]:
    """The gate's figures, or nothing if it refuses: that is told by the words."""
    backends = OrtBackend(bundle, 2, plans={chunk.ms: plan}), OrtBackend(bundle, 2)
    try:
        return run_gate(bundle.manifest, chunk, plan.recipe.precision, *backends, speech(bundle.manifest))
    except GateError as error:
        print(error, file=sys.stderr)
        return {}


def step_times(bundle: Bundle, chunk: Chunk, rows: int, repeats: int, threads: int | None) -> dict[str, Any]:
    """Seconds of a whole step of `rows` streams, fp32 and int8 in turns."""
    with tempfile.TemporaryDirectory(prefix="nemostream-") as folder:
        plan = _ungated(bundle, chunk, Path(folder))
        backends = {
            "fp32": OrtBackend(bundle, capacity=rows, threads=threads),
            "int8": OrtBackend(bundle, capacity=rows, threads=threads, plans={chunk.ms: plan}),
        }
        audio = np.tile(speech(bundle.manifest)[0], 1 + (chunk.samples * (repeats + 200)) // (16000 * 18))
        others, pairs = OtherWork(), []
        for backend in backends.values():
            backend.reset(np.arange(rows))
        filled = -(-chunk.left // chunk.frames)
        for step in range(filled + _WARM_UP + repeats):
            part = np.ascontiguousarray(
                np.tile(audio[step * chunk.samples : (step + 1) * chunk.samples], (rows, 1)), dtype=np.float32
            )
            batch = Batch(chunk, np.arange(rows), part, np.full(rows, chunk.samples))
            seconds = {}
            for name in PRECISIONS if step % 2 else PRECISIONS[::-1]:
                start = time.perf_counter()
                backends[name].submit(batch).result()
                seconds[name] = time.perf_counter() - start
            pairs.append(seconds)
        pairs = pairs[filled + _WARM_UP :]
    ratios = [pair["fp32"] / pair["int8"] for pair in pairs]
    return {
        "chunk_ms": chunk.ms,
        "batch": rows,
        **{f"{name}_ms": 1000 * statistics.median(pair[name] for pair in pairs) for name in PRECISIONS},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "raw_ms": [{name: 1000 * pair[name] for name in PRECISIONS} for pair in pairs],
        "other_work_cores": others.cores(),
    }


def _ungated(bundle: Bundle, chunk: Chunk, folder: Path) -> Plan:
    recipe = Recipe.of(
        bundle, chunk.ms, backend="onnxruntime", library=onnxruntime.__version__, precision="int8", device="cpu",
        max_batch=0, cell="float32",
    )  # fmt: skip
    return PlanStore(folder).put(
        recipe, lambda place: write_int8_for_cpu(bundle, chunk, place, recipe.stem), lambda plan: {}
    )


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
    if report["times"]:
        lines += ["", "| chunk | batch | fp32, ms | int8, ms | fp32 ÷ int8 |", "|---|---|---|---|---|"]
        for row in report["times"]:
            ratio = "{median:.2f} [{min:.2f}–{max:.2f}]".format(**row["ratio"])
            lines.append(
                f"| {row['chunk_ms']} ms | {row['batch']} | {row['fp32_ms']:.0f} | {row['int8_ms']:.0f} | {ratio} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nemostream.benchmarks.precision", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--manifest", type=Path, help="recordings and their texts, as NeMo writes them")
    parser.add_argument("--bundle", type=Path, help="whose words are counted (default: the packaged digits)")
    parser.add_argument("--speed", type=Path, metavar="BUNDLE", help="whose steps are timed (default: none)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--chunk-ms", type=int, nargs="+", help="to be timed; default: all that the model has")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write the report with every sample here, and a .md beside it")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {
        "hardware": hardware(),
        "onnxruntime": onnxruntime.__version__,
        "command": shlex.join(sys.argv),
        "words": [],
        "times": [],
    }
    try:
        if options.manifest:
            with tempfile.TemporaryDirectory(prefix="nemostream-") as folder:
                bundle = Bundle.open(options.bundle or nemostream.demo_bundle())
                report["words"] = word_errors(bundle, options.manifest, Path(folder))
        if options.speed:
            bundle = Bundle.open(options.speed)
            for ms in options.chunk_ms or [chunk.ms for chunk in bundle.manifest.chunks]:
                for rows in options.batch:
                    print(f"timing {ms} ms, batch {rows}", file=sys.stderr, flush=True)
                    chunk = bundle.manifest.chunk(ms)
                    report["times"].append(step_times(bundle, chunk, rows, options.repeats, options.threads))
    except NemostreamError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        options.json.with_suffix(".md").write_text(show(report), encoding="utf-8")
    print(show(report), end="")


if __name__ == "__main__":
    main()
