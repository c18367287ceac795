"""NVIDIA's Triton Inference Server: a Python backend whose sequences are live streams.

Triton's sequence batcher batches the requests of many clients, and keeps a client's requests in order and on one
engine. The model repository of `write_repository` needs only nemostream in Triton's Python.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

import nemostream
from nemostream.bundle import Bundle
from nemostream.errors import NemostreamError, OptionError
from nemostream.extras import install_command
from nemostream.runtime.streaming.aio import AsyncLiveStream
from nemostream.runtime.text.words import Result

NAME = "nemostream"
_MODEL = '''"""Written by `nemostream export --triton`."""

# Triton's Python needs nemostream. To install the version that wrote this file: {install}

from nemostream.serving.integrations.triton import TritonPythonModel  # noqa: F401
'''
_CONFIG = """# Written by `nemostream export --triton`. Live speech as sequences: 16 kHz mono, START with the first
# request, END with the last one, whose audio may be empty. The parameter chunk_ms of the first one sets the chunk size,
# the parameter language of any request the language from its audio on.
name: "{name}"
backend: "python"
max_batch_size: {streams}
input [
  {{ name: "AUDIO" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }}
]
output [
  {{ name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] }}, # the whole transcript so far; only appended to
  {{ name: "WORD_STARTS" data_type: TYPE_FP32 dims: [ -1 ] }}, # seconds
  {{ name: "LANGUAGE" data_type: TYPE_STRING dims: [ 1 ] }} # as set, or as detected; empty: not detected yet
]
sequence_batching {{
  max_sequence_idle_microseconds: {idle}
  control_input [
    {{ name: "START" control [ {{ kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] }} ] }},
    {{ name: "END" control [ {{ kind: CONTROL_SEQUENCE_END int32_false_true: [ 0, 1 ] }} ] }}
  ]
  oldest {{ max_candidate_sequences: {streams} max_queue_delay_microseconds: 2000 }}
}}
instance_group [ {{ kind: KIND_CPU count: 1 }} ] # one engine, on `device`
parameters [
  {{ key: "chunk_ms" value: {{ string_value: "{chunk_ms}" }} }},
  {{ key: "language" value: {{ string_value: "" }} }}, # of sequences that set none; empty: the model's default
  {{ key: "device" value: {{ string_value: "cpu" }} }}, # cpu, or cuda
  {{ key: "precision" value: {{ string_value: "" }} }}, # of engines built by `nemostream build`; empty: the default
  {{ key: "engines" value: {{ string_value: "" }} }}, # their folder; empty: ~/.cache/nemostream/engines
  {{ key: "threads" value: {{ string_value: "" }} }}, # of ONNX Runtime on a CPU; empty: every core
  {{ key: "max_batch" value: {{ string_value: "" }} }} # streams in one step; empty: 64
]
"""
_IDLE_SECONDS = 30
_SPARE_SLOTS = 16  # for sequences that Triton ended without notice


def bundle_in(repository: Path) -> Path:
    """Return the path of the bundle in a model repository."""
    return repository / NAME / "1" / "bundle"


def write_repository(repository: Path, *, chunk_ms: int = 560, streams: int = 256) -> None:
    """Turn a folder with a bundle at `bundle_in(repository)` into a model repository.

    An existing `config.pbtxt` is kept. Raises `BundleError` if there is no bundle.
    """
    version = bundle_in(repository).parent
    Bundle.open(bundle_in(repository)).manifest.chunk(chunk_ms)
    (version / "model.py").write_text(_MODEL.format(install=install_command()))
    config = version.parent / "config.pbtxt"
    if not config.exists():
        idle = _IDLE_SECONDS * 1_000_000
        config.write_text(_CONFIG.format(name=NAME, streams=streams, idle=idle, chunk_ms=chunk_ms))


class TritonPythonModel:
    """The interface of Triton's Python backend. Requests of one call belong to different sequences and share steps."""

    def initialize(self, args: dict[str, Any]) -> None:
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        bundle = Path(args["model_repository"]) / args["model_version"] / "bundle"
        self._model = nemostream.load(
            bundle,
            int(parameters["chunk_ms"]),
            capacity=config["max_batch_size"] + _SPARE_SLOTS,
            device=parameters["device"],
            precision=parameters["precision"] or None,
            engines=parameters["engines"] or None,
            threads=int(parameters["threads"]) if parameters["threads"] else None,
            # Not in the configurations of earlier versions, which are kept.
            max_batch=int(parameters["max_batch"]) if parameters.get("max_batch") else None,
        )
        # Earlier versions had neither this parameter nor the output LANGUAGE, and their configurations are kept.
        self._language = parameters.get("language") or None
        if self._language is not None:
            self._model.manifest.languages.name(self._language)  # raises an error now, not in every sequence
        self._outputs = {output["name"] for output in config.get("output", ())}
        self._streams: dict[str, tuple[AsyncLiveStream, float]] = {}  # with the time of their last request
        self._loop = asyncio.new_event_loop()

    def execute(self, requests: list[Any]) -> list[Any]:
        return self._loop.run_until_complete(self._execute(requests))

    def finalize(self) -> None:
        self._model.close()
        self._loop.close()

    async def _execute(self, requests: list[Any]) -> list[Any]:
        now = time.monotonic()
        for name, (stream, last_request) in list(self._streams.items()):
            if now - last_request > 2 * _IDLE_SECONDS:  # Triton ended the sequence without END
                stream.close()
                del self._streams[name]
        return await asyncio.gather(*(self._respond(request) for request in requests))

    async def _respond(self, request: Any) -> Any:
        import triton_python_backend_utils as pb_utils  # only inside Triton

        def tensor(name: str) -> Any:
            return pb_utils.get_input_tensor_by_name(request, name).as_numpy()

        name = str(request.correlation_id())  # not a control input: Triton 2.x fails to batch those of strings
        end = bool(tensor("END").flat[0])
        try:  # before anything is processed: the stream stays open, and the request can be sent again
            options = json.loads(request.parameters() or "{}")
            if "language" in options:
                options["language"] = self._model.manifest.languages.name(options["language"] or self._language)
        except (OptionError, ValueError) as error:
            if end and (stream := self._streams.pop(name, None)):  # Triton has ended the sequence
                stream[0].close()
            reason = error if isinstance(error, OptionError) else f"the request's parameters are not JSON ({error})."
            return pb_utils.InferenceResponse([], pb_utils.TritonError(str(reason)))
        try:
            result = await self._process(
                name,
                tensor("AUDIO").reshape(-1),
                bool(tensor("START").flat[0]),
                end,
                options,
            )
        except Exception as error:  # of this stream only; the other requests of the call continue
            if stream := self._streams.pop(name, None):
                stream[0].close()
            expected = isinstance(error, NemostreamError)
            message = str(error) if expected else f"the stream failed ({error!r}); start a new sequence."
            return pb_utils.InferenceResponse([], pb_utils.TritonError(message))
        starts = [word.start for word in result.words]
        outputs = [
            pb_utils.Tensor("TEXT", np.array([[result.text.encode()]], object)),
            pb_utils.Tensor("WORD_STARTS", np.array([starts], np.float32)),
        ]
        if "LANGUAGE" in self._outputs:
            outputs.append(pb_utils.Tensor("LANGUAGE", np.array([[(result.language or "").encode()]], object)))
        return pb_utils.InferenceResponse(outputs)

    async def _process(
        self, name: str, audio: np.ndarray[Any, Any], start: bool, end: bool, options: dict[str, Any]
    ) -> Result:
        if start:
            if old := self._streams.pop(name, None):
                old[0].close()
            language = options.get("language", self._language)
            stream = self._model.astream(chunk_ms=options.get("chunk_ms"), language=language)
        elif name not in self._streams:
            raise OptionError("the sequence is not open: it failed, or was idle for too long; start a new one.")
        else:
            stream = self._streams[name][0]
            if "language" in options:
                stream.set_language(options["language"])
        self._streams[name] = stream, time.monotonic()
        if len(audio):
            await stream.push(audio)
        if not end:
            return stream.result
        result = await stream.finish()
        del self._streams[name]
        return result
