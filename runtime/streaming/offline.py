"""A whole recording, as fast as it goes: bounded memory, progress, a state that is saved as it goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

from nemostream.runtime.streaming.session import Pcm, StreamSession
from nemostream.runtime.streaming.snapshot import Checkpointer
from nemostream.runtime.text.words import Result

# Chunks that may wait at the scheduler while the next block is read: enough that it need not.
BACKLOG = 2


class SourceStopped(Exception):
    """Raised by the blocks of a recording that is to end early: the state is saved, the result is of what came."""


class Progress(float):
    """Seconds of a recording that are decoded; it knows how many there are, and guesses how long the rest will take."""

    duration: float  # seconds of the recording; 0 if nobody knows
    remaining: float  # seconds of work still to come; NaN as long as nobody knows

    def __new__(cls, decoded: float, duration: float, remaining: float) -> Progress:
        self = super().__new__(cls, decoded)
        self.duration, self.remaining = duration, remaining if duration else math.nan
        return self


def recognise(
    session: StreamSession,
    blocks: Iterable[Pcm],
    duration: float,
    on_partial: Callable[[Result], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    checkpointer: Checkpointer | None = None,
) -> Result:
    """Feed all of a recording, reading on while the model works; about a block of it waits in memory."""
    began = first = math.nan

    def report() -> None:
        nonlocal began, first
        if on_partial:
            for partial in session.collect():
                on_partial(partial)
        else:
            session.discard_results()
        if on_progress:
            now, decoded = time.monotonic(), session.decoded
            if math.isnan(began):
                began, first = now, decoded  # what was resumed took no time
            pace = (now - began) / (decoded - first) if decoded > first else math.nan
            on_progress(Progress(decoded, duration, pace * max(duration - decoded, 0.0)))

    try:
        for block in blocks:
            behind = session.behind
            session.feed(block)
            if behind:
                continue
            session.wait(BACKLOG)
            report()
            if checkpointer and checkpointer.due:
                session.wait()
                checkpointer.save(session.save())
    except SourceStopped:
        if session.behind:  # what was saved is newer than what was fed
            return session.final()
        session.wait()
        if checkpointer and (saved := session.save()).samples:
            checkpointer.save(saved)
    session.finish()
    session.wait()
    report()
    return session.final()
