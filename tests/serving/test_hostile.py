"""All attacks at once beside live streams: two minutes in which nothing that the others get may change.

`NEMOSTREAM_HOSTILE_SECONDS` sets another length.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import connect

SECONDS = float(os.environ.get("NEMOSTREAM_HOSTILE_SECONDS", "120"))
STREAMS, PIECE = 20, 0.1  # seconds of a message
ADDED = 0.25  # seconds: the 99th percentile of latency with attacks, less the one without
GROWTH = 96  # MiB that the process may have gained: arenas of its threads, not what clients sent


class Live:
    """A client that sends audio at the pace of speech, and notes when results came."""

    def __init__(self, pcm: bytes) -> None:
        self.pcm, self.text = pcm, ""
        self.latencies: list[float] = []

    async def run(self, url: str, delay: float, paced: bool = True) -> None:
        await asyncio.sleep(delay)
        sent: list[tuple[float, float]] = []  # seconds of audio, when they were sent
        async with connect(url, ping_interval=None, max_size=None) as socket:

            async def send() -> None:
                size, began = int(PIECE * 32000), time.perf_counter()
                for number, start in enumerate(range(0, len(self.pcm), size)):
                    if paced:
                        await asyncio.sleep(began + PIECE * number - time.perf_counter())
                    end = start + len(self.pcm[start : start + size])
                    sent.append((end / 32000, time.perf_counter()))
                    await socket.send(self.pcm[start:end])
                await socket.send('{"type": "finish"}')

            sending = asyncio.create_task(send())
            async for message in socket:
                event, now = json.loads(message), time.perf_counter()
                if event["type"] == "partial":
                    at = bisect_left(sent, (event["audio"] - 1e-3, 0.0))
                    self.latencies.append(now - sent[min(at, len(sent) - 1)][1])
                elif event["type"] == "done":
                    self.text = event["text"]
            await sending


def streams(running: Any, pcm: list[bytes]) -> list[Live]:
    """Live streams side by side, and all that came back."""

    async def main() -> list[Live]:
        lives = [Live(audio) for audio in pcm]
        phases = np.random.default_rng(0).uniform(0, 0.56, len(lives))
        url = running.socket + "/v1/stream?chunk_ms=560"
        await asyncio.gather(*(live.run(url, float(phase)) for live, phase in zip(lives, phases, strict=True)))
        return lives

    return asyncio.run(main())


def percentile(lives: list[Live]) -> float:
    found = sorted(latency for live in lives for latency in live.latencies)
    assert len(found) >= 20
    return found[int(0.99 * len(found))]


def memory(running: Any) -> float:
    """Resident memory of the server's process, MiB."""
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def speech(spoken: Any, seconds: float) -> list[bytes]:
    """Each stream says something else."""
    found = []
    for number in range(STREAMS):
        clips = [spoken[(number + turn) % len(spoken)].pcm + bytes(32000) for turn in range(len(spoken))]
        audio = b"".join(clips)
        found.append((audio * (1 + int(32000 * seconds) // len(audio)))[: int(32000 * seconds) // 2 * 2])
    return found


def attack(running: Any, seconds: float) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("attacks.py")
    command = [sys.executable, str(script), str(running.http), str(running.grpc), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_live_streams_beside_all_attacks(serve_process: Any, spoken: Any) -> None:
    limits = ["--max-streams", "64", "--no-measure", "--max-uploads", "4"]
    with serve_process(*limits, PYTHONFAULTHANDLER="1") as running:
        quiet = streams(running, speech(spoken, 20))
        # The same attacks for a moment: what is allocated once is there before memory is compared.
        attack(running, 10).communicate(timeout=120)
        pcm = speech(spoken, SECONDS)
        wanted = [Live(audio) for audio in pcm]

        async def reference() -> None:  # what each stream gets on its own, as fast as it goes
            for live in wanted:
                await live.run(running.socket + "/v1/stream?chunk_ms=560", 0, paced=False)

        asyncio.run(reference())
        before = memory(running)
        attacking = attack(running, SECONDS - 5)
        lives = streams(running, pcm)
        ran, errors = attacking.communicate(timeout=120)
        counts = json.loads(ran)
        assert attacking.returncode == 0 and min(counts.values()) >= 5, (counts, errors[-2000:])
        assert running.process.poll() is None, running.log[-20:]
        deadline = time.monotonic() + 20
        while (state := json.loads(running.get("/readyz")[1]))["streams"] or state["uploads"]:
            assert time.monotonic() < deadline, state
            time.sleep(0.5)
        while memory(running) >= before + GROWTH and time.monotonic() < deadline + 30:
            time.sleep(1)  # the server gives memory back every 15 s
        after = memory(running)
        added = percentile(lives) - percentile(quiet)
        print(
            f"{SECONDS:.0f} s, attacks {counts}; p99 {1000 * percentile(quiet):.0f} ms without, "
            f"{1000 * percentile(lives):.0f} ms with; memory {before:.0f} -> {after:.0f} MiB"
        )
        assert [live.text for live in lives] == [live.text for live in wanted]
        assert added < ADDED
        assert after < before + GROWTH
