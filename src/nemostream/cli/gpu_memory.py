"""The output of `nemostream doctor --plan`: how many streams fit in the memory of a GPU. Arithmetic, no measurement."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemostream.bundle import (
    Bundle,
    ChunkConfig,
    DecoderConfig,
    EncoderConfig,
    FeatureConfig,
    File,
    Manifest,
)
from nemostream.errors import BackendError, OptionError

if TYPE_CHECKING:
    from nemostream.runtime.backends.gpu.memory import EncoderSizes

# Memory in MiB, as nvidia-smi reports it: https://thundergolfer.com/blog/nvidia-gpu-memory-capacity, and public reports
# for the RTX cards. It differs by some MiB between drivers and boards.
GPUS = {
    "h200-141gb": 143_771,
    "h100-80gb": 81_559,
    "a100-80gb": 81_920,
    "a100-40gb": 40_960,
    "l40s-48gb": 46_068,
    "rtx-6000-ada-48gb": 49_140,
    "rtx-5090-32gb": 32_607,
    "rtx-4090-24gb": 24_564,
    "a10-24gb": 23_028,
    "l4-24gb": 23_034,
}
_CONTEXT_BYTES = 512 << 20  # of a CUDA context, and of the driver
_MAX_BATCHES = (64, 256, 1024)
_PRECISIONS = {"fp16": ("float16", 2), "fp32": ("float32", 4)}  # type of the caches, and bytes of a weight


def published_model() -> tuple[Manifest, EncoderSizes]:
    """Return the sizes of nvidia/nemotron-speech-streaming-en-0.6b, without files."""
    from nemostream.runtime.backends.gpu.memory import EncoderSizes

    manifest = Manifest(
        name="nemotron-speech-streaming-en-0.6b",
        features=FeatureConfig(sample_rate=16000, mels=128, window=400, hop=160, n_fft=512, preemphasis=0.97),
        encoder=EncoderConfig(layers=24, d_model=1024, heads=8, subsampling=8, cache=70, conv_cache=8),
        decoder=DecoderConfig(layers=2, hidden=640, joint=640, vocabulary=1024, max_symbols=10, activation="relu"),
        chunks=tuple(ChunkConfig(80 * frames, frames, left=70, samples=1280 * frames) for frames in (1, 2, 7, 14)),
        graphs={},
        weights=File("weights.bin", "", 0),
        tensors={},
        tokenizer=File("tokenizer.model", "", 0),
    )
    return manifest, EncoderSizes(channels=256, parameters=587_000_000)


@dataclass(frozen=True)
class Row:
    """Memory and capacity of a backend that has engines for these chunk sizes."""

    chunk_ms: tuple[int, ...]
    precision: str
    max_batch: int
    bytes_per_stream: int
    buffer_bytes: int  # of a step
    weight_bytes: int  # of encoder, decoder and front end
    activation_bytes: int  # of the encoders
    streams: int  # capacity; 0 if one batch does not fit


def print_plan(bundle: Path | None, gpu: str | None, as_json: bool) -> None:
    """Print the memory and the capacity of a model on a GPU, for each precision, chunk size and batch size.

    `gpu` is a name in `GPUS`, None the GPU of this machine; `bundle` None is the published 0.6B model. Raises
    `OptionError` for an unknown name, and if there is no GPU.
    """
    from nemostream.runtime.backends.gpu.memory import MAX_ELEMENTS, encoder_sizes, encoder_tensors

    name, available = _gpu_memory(gpu)
    if bundle is None:
        manifest, sizes = published_model()
    else:
        opened = Bundle.open(bundle)
        manifest = opened.manifest
        sizes = encoder_sizes(opened, manifest.chunks[-1])
    rows = list(_rows(manifest, sizes, available))
    limits = {
        chunk.ms: MAX_ELEMENTS // max(encoder_tensors(manifest, chunk, sizes.channels).values())
        for chunk in manifest.chunks
    }
    if as_json:
        report = {
            "gpu": name,
            "available_bytes": available,
            "model": manifest.name,
            "measured": False,
            "largest_max_batch": limits,
            "rows": [asdict(row) for row in rows],
        }
        print(json.dumps(report, indent=2))
    else:
        _print_tables(name, available, manifest, limits, rows)


def _gpu_memory(gpu: str | None) -> tuple[str, int]:
    """Return the name of the GPU and the memory, in bytes, that a backend can use."""
    from nemostream.runtime.backends.gpu.memory import RESERVED_BYTES

    if gpu is not None:
        if gpu not in GPUS:
            raise OptionError(f"--gpu is {gpu!r}; choose one of {', '.join(GPUS)}.")
        return gpu, (GPUS[gpu] << 20) - _CONTEXT_BYTES - RESERVED_BYTES
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    try:
        device = CudaDevice()
    except BackendError as error:
        reason = str(error).rstrip(".")
        raise OptionError(f"{reason}; or choose a GPU with --gpu: {', '.join(GPUS)}.") from error
    try:
        return device.name, device.free_bytes - RESERVED_BYTES
    finally:
        device.close()


def _rows(manifest: Manifest, sizes: EncoderSizes, available: int) -> Iterator[Row]:
    from nemostream.runtime.backends.gpu.memory import MemoryLayout, activation_bytes, check_max_batch

    each = [(chunk,) for chunk in manifest.chunks]
    for precision, (cache_dtype, itemsize) in _PRECISIONS.items():
        for chunks in [*each, manifest.chunks] if len(each) > 1 else each:
            for max_batch in _MAX_BATCHES:
                layout = MemoryLayout(manifest, cache_dtype, max_batch, max_batch, chunks)
                per_row = sum(activation_bytes(manifest, chunk, sizes.channels) for chunk in chunks)
                weights = len(chunks) * itemsize * sizes.parameters  # every engine has its own
                capacity = layout.largest_capacity(available - weights - max_batch * per_row)
                try:
                    check_max_batch(manifest, chunks, sizes.channels, max_batch)
                except OptionError:
                    capacity = 0
                yield Row(
                    tuple(chunk.ms for chunk in chunks),
                    precision,
                    max_batch,
                    layout.bytes_per_stream,
                    sum(layout.buffer_bytes().values()),
                    sum(layout.weight_bytes().values()) + weights,
                    max_batch * per_row,
                    capacity if capacity >= max_batch else 0,
                )


def _print_tables(name: str, available: int, manifest: Manifest, limits: dict[int, int], rows: list[Row]) -> None:
    console, encoder = Console(highlight=False), manifest.encoder
    console.print(
        f"{escape(name)}: {available / 1e9:.1f} GB for streams and engines. {escape(manifest.name)}: {encoder.layers} "
        f"layers, d_model {encoder.d_model}.\n"
        "Computed from the sizes of the model, not measured. Weights and activations of the encoder are estimates; an "
        "engine reports what it needs when it is loaded. The number of streams that the GPU can serve in time is "
        "usually lower: `nemostream bench capacity` measures it."
    )
    for precision in _PRECISIONS:
        table = Table(title=f"\n{precision}: {_precision_note(precision, rows)}", title_justify="left")
        table.add_column("chunk")
        for heading in ("max_batch", "weights", "activations", "buffers", "streams"):
            table.add_column(heading, justify="right")
        for row in rows:
            if row.precision != precision:
                continue
            first = row.max_batch == _MAX_BATCHES[0]
            chunk = f"{row.chunk_ms[0]} ms" if len(row.chunk_ms) == 1 else "all sizes"
            parts = (row.weight_bytes, row.activation_bytes, row.buffer_bytes)
            table.add_row(
                chunk if first else "",
                str(row.max_batch),
                *(f"{part / 1e9:.2f} GB" for part in parts),
                f"{row.streams:,}" if row.streams else "none",
                end_section=row.max_batch == _MAX_BATCHES[-1],
            )
        console.print(table)
    if not all(row.streams for row in rows):
        console.print("none: one batch of this size does not fit.")
    largest = ", ".join(f"{limit:,} at {ms} ms" for ms, limit in limits.items())
    console.print(f"Largest max_batch, because a tensor must have less than 2^31 elements: {largest}.")


def _precision_note(precision: str, rows: list[Row]) -> str:
    size = next(row.bytes_per_stream for row in rows if row.precision == precision)
    others = {"fp16": " The same for bf16; fp8 and int8 have smaller weights."}
    return f"{size / 1e6:.2f} MB of state per stream.{others.get(precision, '')}"
