"""Minimal streaming client for a voice agent: prints the transcript of each utterance.

$ pip install '.[client]'                    # in a checkout
$ nemostream serve &
$ python voice_agent.py < voice.pcm          # 16 kHz mono 16-bit PCM: a file, or arecord -f S16_LE -r 16000
"""

import asyncio
import sys

from nemostream.client import AsyncStream


async def main(*servers: str) -> None:
    async with AsyncStream(servers, chunk_ms=160) as stream, asyncio.TaskGroup() as tasks:

        async def send_audio() -> None:
            while pcm := await asyncio.to_thread(sys.stdin.buffer.read, 3200):
                await stream.send(pcm)
            await stream.finish()

        tasks.create_task(send_audio())
        async for event in stream:
            if event.type == "final":  # the utterance is over: the agent would respond here
                print(event.text, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:] or ["http://127.0.0.1:8000"]))
