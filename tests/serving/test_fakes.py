"""The event loop with a controlled clock."""

from __future__ import annotations

import asyncio
import time
from typing import Any


def test_the_clock_waits_for_threads_and_advances_to_timers(fakes: Any, clock: Any) -> None:
    async def main() -> list[float]:
        timer = asyncio.create_task(asyncio.sleep(5))
        times = []
        for seconds in (0.02, 0.01):
            await asyncio.to_thread(time.sleep, seconds)
            times.append(clock())
        await timer
        return [*times, clock()]

    assert fakes.run(clock, main()) == [0.0, 0.0, 5.0]
