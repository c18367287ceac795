"""Minimal streaming client for a voice agent: prints the transcript of each utterance.

$ pip install websockets
$ nemostream serve &
$ python voice_agent.py < voice.pcm          # 16 kHz mono 16-bit PCM: a file, or arecord -f S16_LE -r 16000
"""

import asyncio
import json
import sys

from websockets.asyncio.client import connect


async def main(url: str = "ws://127.0.0.1:8000/v1/stream?chunk_ms=160") -> None:
    async with connect(url) as socket, asyncio.TaskGroup() as tasks:

        async def send_audio() -> None:
            while pcm := await asyncio.to_thread(sys.stdin.buffer.read, 3200):
                await socket.send(pcm)
            await socket.send(json.dumps({"type": "finish"}))

        tasks.create_task(send_audio())
        async for message in socket:
            event = json.loads(message)
            if event["type"] == "final":  # the utterance is over: the agent would respond here
                print(event["text"], flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
