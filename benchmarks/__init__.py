"""Benchmarks, one module per question: `nemostream bench NAME`, or `python -m` with the module's name.

Commands: `latency` (time of a step, and from the last sample of a chunk to its text), `capacity` (concurrent live
streams), `throughput` (recorded audio per second), `accuracy` (word error rate), `finals` (accuracy and latency of
partials and finals, with one and two chunk sizes), `baseline` (the same step in NeMo, transformers, ONNX Runtime,
sherpa-onnx and transcribe.cpp), `serve` (concurrent WebSocket clients of a server), `load` (real-time streams of any
server, through its protocol), `host` (everything around the model: CPU time per stream and step, and paced clients of a
server), `survival` (streams while servers fail), `quick` (a short form of several), `report` (tables, plots and
comparisons of results) and `gpu_check` (everything that needs a GPU).

`command` is their common command line. `harness/` contains shared code, `studies/` benchmarks of single features,
`gpu/` the parts of the GPU check.
"""

from __future__ import annotations

_FOLDERS = {
    "boosting": "studies",
    "cost": "studies",
    "features": "studies",
    "lanes": "studies",
    "precision": "studies",
    "transcripts": "studies",
    "random_bundle": "harness",
    "synthetic": "harness",
}


def module_name(benchmark: str) -> str:
    """Return the full name of the module of a benchmark."""
    return ".".join(filter(None, ("nemostream.benchmarks", _FOLDERS.get(benchmark), benchmark)))
