"""Every figure of the GPU report comes from the field and the case of its name."""

from __future__ import annotations

from typing import Any

import pytest

from nemostream.benchmarks.gpu import report as gpu_report


def a_report() -> dict[str, Any]:
    """Return a report in which all figures differ."""
    fields = ("p50_ms", "p99_ms", "silent_p50_ms", "gathered_p50_ms", "boosted_p50_ms", "pipelined_ms", "host_ms")
    fields += ("encoder_ms", "undecoded_ms", "roofline_ms", "tokens_per_second", "whole_ms", "copy_ms")
    rows = []
    for ms in (80, 160, 560, 1120):
        for batch in (1, 64, 1024):
            figures = {name: ms + batch / 10 + number for number, name in enumerate(fields)}
            rows.append({"chunk_ms": ms, "batch": batch, "encoder": "tensorrt fp16", **figures})
    runners = {"NeMo, bf16": 16.25, "NeMo, graph": 2.75}
    baseline = [
        {
            "case": {"chunk_ms": ms, "batch": batch, "runner": runner},
            "values": {"relative_time": {"nemostream, fp16": {"median": ratio + ms + batch - 81, "min": 0.0}}},
        }
        for ms in (560, 80)
        for batch in (8, 1)
        for runner, ratio in runners.items()
    ]
    return {
        "environment": {"nvidia_smi": "H100, 570", "gpu": "H100", "commit": "abc"},
        "speed": {"rows": rows, "streams": {80: 2400, 160: 4001, "560": 5999, "1120": 8000}},
        "baseline": {"rows": baseline},
        "soak": {"flat": True, "steps": 10, "list": [1]},
        "seconds": 123.4,
    }


def test_targets_and_their_limits() -> None:
    found = [(each.name, each.target, each.measured, each.reached) for each in gpu_report.targets(a_report())]
    assert found == [
        ("encoder, 80 ms, batch 1, ÷ roofline", 2.2, pytest.approx(87.1 / 89.1), True),
        ("PCM to tokens, 80 ms, batch 1, p50, ms", 1.5, 80.1, False),
        ("PCM to tokens, 80 ms, batch 1, p99, ms", 2.5, 81.1, False),
        ("NeMo, bf16, 80 ms, batch 1, ÷ nemostream", 15, 16.25, True),
        ("NeMo, graph, 80 ms, batch 1, ÷ nemostream", 3, 2.75, False),
        ("real-time streams at 80 ms", 2400, 2400, True),
        ("real-time streams at 160 ms", 4000, 4001, True),
        ("real-time streams at 560 ms", 6000, 5999, False),
        ("real-time streams at 1120 ms", 8000, 8000, True),
        ("share of decoding in a step, 560 ms, batch 64", 0.1, pytest.approx(1 - 574.4 / 577.4), True),
        # The largest of (ms + 108.4) / (ms + 107.4), 80 ms.
        ("largest share of the host in a step, batch 1024", 0.05, pytest.approx(188.4 / 187.4), False),
    ]


@pytest.mark.parametrize(
    ("is_maximum", "measured", "reached"),
    [(True, 2.0, True), (True, 2.1, False), (False, 2.0, True), (False, 1.9, False), (True, None, None)],
)
def test_a_target_includes_its_limit(is_maximum: bool, measured: float | None, reached: bool | None) -> None:
    assert gpu_report.Target("t", 2.0, is_maximum, measured).reached is reached


def test_report() -> None:
    lines = gpu_report.show(a_report()).splitlines()
    assert lines[:4] == ["# GPU check", "", "H100, 570; commit abc; 123 s", ""]
    assert "* **soak**: {'flat': True, 'steps': 10}" in lines
    table = [line for line in lines if line.startswith("| tensorrt fp16")]
    assert table[1] == (
        "| tensorrt fp16 | 80 ms | 64 | 86.40 | 87.40 | 88.40 | 89.40 | 90.40 | 91.40 | 92.40 | 93.40 | 94.40 | 95.40 "
        "| 96.40 | 98.40 |"
    )
    head = lines[lines.index(table[0]) - 2]
    assert head == (
        "| engine | chunk | batch | p50 ms | p99 ms | silent p50 | gathered p50 | boosted p50 | pipelined | host | "
        "encoder | undecoded | roofline | tokens/s | slot copy |"
    )
    assert len(table) == 12
    assert "| real-time streams at 560 ms | ≥ 6000 | 5999 | missed |" in lines
    assert "| PCM to tokens, 80 ms, batch 1, p50, ms | ≤ 1.50 | 80.1 | missed |" in lines
    assert "| encoder, 80 ms, batch 1, ÷ roofline | ≤ 2.20 | 0.978 | reached |" in lines


def test_rows_without_a_figure() -> None:
    report = {"speed": {"rows": [{"chunk_ms": 80, "batch": 1, "encoder": "e", "p50_ms": 1.0}]}, "seconds": 1.0}
    assert "| e | 80 ms | 1 | 1.00 | – | – | – | – | – | – | – | – | – | – | – |" in gpu_report.show(report)


def test_first_sections() -> None:
    """Times by batch, sizes in GB, and how sections without a result ended."""
    row = {"chunk_ms": 560, "encoder": "e", "p99_ms": 0.0}
    report = {
        "tokens_tensorrt": {"equal": True, "tokens": 96, "streams": 8, "rows": [{**row, "batch": 1, "p50_ms": 1.5}]},
        "speed_tensorrt": {
            "rows": [{**row, "batch": 1, "p50_ms": 2.125}, {**row, "batch": 8, "p50_ms": 12.5}],
            "engine_bytes": 1_234_000_000,
        },
        "tokens_tensorrt_rtx": {"equal": False, "different_streams": 3, "streams": 8},
        "tokens_onnxruntime": {"equal": False, "validation_error": "no"},
        "speed_onnxruntime": {"error": "crashed"},
        "seconds": 1.0,
    }
    lines = gpu_report.show(report).splitlines()
    assert lines[2:5] == [
        "* **Incorrect**: tokens differ from those of the CPU backend with TensorRT for RTX and ONNX Runtime.",
        "* Tokens equal those of the CPU backend with TensorRT.",
        "* **Step time**: 2.12 ms (p50) for 1 streams at 560 ms, full-size model, TensorRT fp16.",
    ]
    assert lines[6:11] == [
        "| library, fp16 | tokens | packaged model, p50 ms | full-size model, p50 ms | its engine, GB |",
        "| --- | --- | --- | --- | --- |",
        "| TensorRT | equal (96 in 8 streams) | 1: 1.50 | 1: 2.12, 8: 12.5 | 1.23 |",
        "| TensorRT for RTX | different in 3 of 8 streams | – | – | – |",
        "| ONNX Runtime | engine failed validation | – | failed | – |",
    ]


def test_sections_without_a_result() -> None:
    report = {
        "soak": {"not_run": "8 minutes are over"},
        "tests": {"not_run": "8 minutes are over"},
        "int8": {"unavailable": "no TensorRT"},
        "engines": {"error": "crashed"},
        "loading": {"kernels": {}},
        "seconds": 1.0,
    }
    assert gpu_report.show(report).splitlines()[2:] == [
        "None; commit None; 1 s",
        "",
        "* **int8**: not available: no TensorRT",
        "* **engines**: failed: crashed",
        "* **loading**: see the JSON file",
        "",
        "Not run (8 minutes are over); run them with `--only soak tests`.",
    ]
    assert gpu_report.verdict({"speed_tensorrt": {"error": "crashed"}}) == [
        "**No verdict**: no library has run to the end of the comparison of tokens.",
        "**Step time**: none was measured.",
    ]


def test_relative_time_of_a_run_without_nemostream() -> None:
    case = {"chunk_ms": 80, "batch": 1, "runner": "NeMo, bf16"}
    report = {"baseline": {"rows": [{"case": case, "values": {"relative_time": {}}}]}}
    found = {each.name: each.measured for each in gpu_report.targets(report)}
    assert found["NeMo, bf16, 80 ms, batch 1, ÷ nemostream"] is None
