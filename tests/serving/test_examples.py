"""The examples, run against a server, also in a real Pipecat pipeline."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import nemostream

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_voice_agent_example(server: Any, spoken: Any) -> None:
    completed = subprocess.run(
        [sys.executable, EXAMPLES / "voice_agent.py", server.url], input=spoken[0].pcm, capture_output=True, check=True
    )
    assert completed.stdout.decode().split() == spoken[0].text.split()
    code = (EXAMPLES / "voice_agent.py").read_text().split('"""')[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


def test_the_client_in_the_documentation(server: Any, spoken: Any, tmp_path: Path) -> None:
    """Run the client of the page unchanged except for the address."""
    page = (EXAMPLES.parent / "docs" / "websocket.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 15
    (tmp_path / "voice.pcm").write_bytes(spoken[0].pcm)
    client = tmp_path / "client.py"
    client.write_text(code.replace("ws://127.0.0.1:8000", server.socket))
    completed = subprocess.run([sys.executable, client], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert completed.stdout.splitlines()[-1] == spoken[0].text


def test_the_clients_in_the_serving_page(server: Any, spoken: Any, tmp_path: Path) -> None:
    """Run the clients of Riva and OpenAI unchanged except for the address."""
    riva_client, openai_client = (
        part.split("```")[0].replace("127.0.0.1:50051", server.address).replace("http://127.0.0.1:8000", server.url)
        for part in (EXAMPLES.parent / "docs" / "serving.md").read_text().split("```python\n")[1:]
    )
    audio = np.frombuffer(spoken[0].pcm, np.int16)
    soundfile.write(tmp_path / "voice.wav", audio, 16000)
    soundfile.write(tmp_path / "talk.mp3", audio, 16000)
    outputs = [
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for code in (riva_client, openai_client)
    ]
    assert f"## {spoken[0].text}" in outputs[0] and ">> " in outputs[0]
    assert outputs[1].strip() == spoken[0].text


@pytest.mark.parametrize("final_chunk_ms", [None, 1120])
def test_pipecat(server: Any, spoken: Any, final_chunk_ms: int | None) -> None:
    pytest.importorskip("pipecat", reason="needs pipecat-ai")
    from pipecat.frames.frames import (
        EndFrame,
        Frame,
        InputAudioRawFrame,
        InterimTranscriptionFrame,
        TranscriptionFrame,
        VADUserStoppedSpeakingFrame,
    )
    from pipecat.pipeline.pipeline import Pipeline
    from pipecat.pipeline.runner import PipelineRunner
    from pipecat.pipeline.task import PipelineParams, PipelineTask
    from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
    from pipecat.transcriptions.language import Language

    frames: list[Frame] = []
    with nemostream.load(chunk_ms=final_chunk_ms or 560) as model:
        texts = [model.transcribe(clip.path).text for clip in spoken[:2]]

    class FrameRecorder(FrameProcessor):
        async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
            await super().process_frame(frame, direction)
            frames.append(frame)
            await self.push_frame(frame, direction)

    async def main() -> None:
        stt = load("pipecat_stt").NemostreamSTTService(server.url, chunk_ms=560, final_chunk_ms=final_chunk_ms)
        task = PipelineTask(
            Pipeline([stt, FrameRecorder()]), params=PipelineParams(audio_in_sample_rate=16000), idle_timeout_secs=None
        )
        running = asyncio.create_task(PipelineRunner(handle_sigint=False).run(task))

        async def finals(number: int) -> list[str]:
            async with asyncio.timeout(30):
                while True:
                    received = [frame.text for frame in frames if isinstance(frame, TranscriptionFrame)]
                    if len(received) >= number:
                        return received
                    await asyncio.sleep(0.02)

        for number, clip in enumerate(spoken[:2], 1):
            for start in range(0, len(clip.pcm), 1280):
                await task.queue_frame(InputAudioRawFrame(clip.pcm[start : start + 1280], 16000, 1))
            await asyncio.sleep(0.5)  # until the queued audio has been sent
            await task.queue_frame(VADUserStoppedSpeakingFrame(stop_secs=0.2, timestamp=time.time()))
            assert (await finals(number))[-1] == texts[number - 1]
        await task.queue_frame(EndFrame())
        async with asyncio.timeout(20):
            await running

    asyncio.run(main())
    interim = [frame.text for frame in frames if isinstance(frame, InterimTranscriptionFrame)]
    assert len(interim) >= 3
    if final_chunk_ms is None:
        assert all(any(final.startswith(text) for final in texts) for text in interim)
    assert [frame.finalized for frame in frames if isinstance(frame, TranscriptionFrame)] == [True, True]
    assert {frame.language for frame in frames if isinstance(frame, TranscriptionFrame)} == {Language.EN}
