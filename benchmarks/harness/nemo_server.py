"""A minimal server of NeMo's streaming pipeline, with the protocol of sherpa-onnx's server, for `studies.servers`.

    python -m nemostream.benchmarks.harness.nemo_server --checkpoint model.nemo --context 70 6 --port 6006

`CacheAwareRNNTPipeline` is NeMo's pipeline for live streams. One loop passes it the next chunk of every stream that has
one (batching without waiting), and sends the results. The configuration is NeMo's own
(examples/asr/conf/asr_streaming_inference/cache_aware_rnnt.yaml) for a CPU, without phrases. Prints its URL when ready.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from nemostream.benchmarks.harness.nemo import quiet

_RATE = 16000  # Hz
_SILENCE_MS = 800  # that ends an utterance, the pipeline's default and nemostream's
_DONE = "Done"  # message of the client at the end of its audio


def pipeline_config(checkpoint: Path, context: Sequence[int], streams: int) -> Any:
    """Return the configuration of the pipeline; `context` is the attention context, `streams` the maximum number."""
    from omegaconf import OmegaConf

    return OmegaConf.create(
        {
            "asr": {
                "model_name": str(checkpoint),
                "device": "cpu",
                "device_id": 0,
                "compute_dtype": "float32",
                "use_amp": False,
                "decoding": {
                    "strategy": "greedy_batch",
                    "preserve_alignments": False,
                    "fused_batch_size": -1,
                    "greedy": {"use_cuda_graph_decoder": False, "max_symbols": 10},
                },
            },
            "itn": {"batch_size": 32, "n_jobs": 1, "left_padding_size": 4},
            "confidence": {
                "exclude_blank": True,
                "aggregation": "mean",
                "method_cfg": {"name": "entropy", "entropy_type": "tsallis", "alpha": 0.5, "entropy_norm": "exp"},
            },
            "endpointing": {"stop_history_eou": _SILENCE_MS, "residue_tokens_at_end": 2},
            "streaming": {
                "sample_rate": _RATE,
                "batch_size": streams,
                "word_boundary_tolerance": 4,
                "att_context_size": list(context),
                "use_cache": True,
                "use_feat_cache": True,
                "chunk_size_in_secs": None,
                "request_type": "frame",
                "num_slots": streams,
            },
            "log_level": 40,
            "matmul_precision": "highest",
            "pipeline_type": "cache_aware",
            "asr_decoding_type": "rnnt",
            "enable_itn": False,
            "enable_nmt": False,
            "asr_output_granularity": "segment",
            "return_tail_result": False,
        }
    )


@dataclass
class _Stream:
    """A connection, and its audio that is not processed."""

    number: int
    connection: ServerConnection
    samples: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    begun: bool = False  # its first chunk was processed
    finished: bool = False  # no more audio follows
    segment: int = 0


class PipelineServer:
    """Serves the streams of a pipeline."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._chunk = round(pipeline.chunk_size_in_secs * _RATE)  # samples
        self._streams: dict[int, _Stream] = {}
        self._numbers, self._changed = itertools.count(), asyncio.Event()

    async def handle(self, connection: ServerConnection) -> None:
        """Receive the audio of a connection."""
        stream = _Stream(next(self._numbers), connection)
        self._streams[stream.number] = stream
        try:
            async for message in connection:
                if message == _DONE:
                    break
                assert isinstance(message, bytes)
                stream.samples = np.concatenate([stream.samples, np.frombuffer(message, "<f4")])
                self._changed.set()
        finally:
            stream.finished = True
            self._changed.set()
            await connection.wait_closed()

    async def run(self) -> None:
        """Process the chunks of all streams until it is cancelled."""
        while True:
            self._changed.clear()
            ready = [each for each in self._streams.values() if each.finished or len(each.samples) >= self._chunk]
            if not ready:
                await self._changed.wait()
                continue
            frames = [self._frame(stream) for stream in ready]
            outputs = await asyncio.to_thread(self._pipeline.transcribe_step, frames)
            for stream, frame, output in zip(ready, frames, outputs, strict=True):
                await self._send(stream, output, frame.is_last)

    def _frame(self, stream: _Stream) -> Any:
        """Return the next chunk of a stream; the last one is padded."""
        import torch
        from nemo.collections.asr.inference.streaming.framing.request import Frame
        from nemo.collections.asr.inference.streaming.framing.request_options import ASRRequestOptions

        chunk, stream.samples = stream.samples[: self._chunk], stream.samples[self._chunk :]
        padded = np.zeros(self._chunk, np.float32)
        padded[: len(chunk)] = chunk
        first, stream.begun = not stream.begun, True
        return Frame(
            torch.from_numpy(padded),
            stream.number,
            is_first=first,
            is_last=stream.finished and not len(stream.samples),
            length=max(len(chunk), 1),
            options=ASRRequestOptions() if first else None,
        )

    async def _send(self, stream: _Stream, output: Any, last: bool) -> None:
        if last:
            del self._streams[stream.number]
        try:
            if text := output.final_transcript.strip():
                await self._send_text(stream, text, True)
                stream.segment += 1
            elif text := output.partial_transcript.strip():
                await self._send_text(stream, text, last)
            if last:
                await stream.connection.send("Done!")
        except ConnectionClosed:
            stream.finished, stream.samples = True, stream.samples[:0]

    @staticmethod
    async def _send_text(stream: _Stream, text: str, final: bool) -> None:
        await stream.connection.send(json.dumps({"text": text, "segment": stream.segment, "is_final": final}))


async def _serve(pipeline: Any, port: int) -> None:
    server = PipelineServer(pipeline)
    async with serve(server.handle, "127.0.0.1", port, compression=None, max_size=None, ping_interval=None) as running:
        number = next(iter(running.sockets)).getsockname()[1]
        print(f"http://127.0.0.1:{number}", flush=True)
        await server.run()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="NeMo checkpoint")
    parser.add_argument("--context", type=int, nargs=2, required=True, help="attention context: left and right frames")
    parser.add_argument("--streams", type=int, default=256, help="maximum number of streams")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--port", type=int, default=0, help="port of WebSockets; 0: a free one")
    options = parser.parse_args(arguments)
    with quiet():
        import torch
        from nemo.collections.asr.inference.factory.pipeline_builder import PipelineBuilder

        torch.set_num_threads(options.threads)
        config = pipeline_config(options.checkpoint, options.context, options.streams)
        pipeline = PipelineBuilder.build_pipeline(config)
        pipeline.open_session()
    asyncio.run(_serve(pipeline, options.port))


if __name__ == "__main__":
    main()
