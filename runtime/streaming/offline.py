"""Transcribe a whole recording as fast as possible: bounded memory, progress and snapshots."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

from nemostream.runtime.streaming.session import Pcm, StreamSession
from nemostream.runtime.streaming.snapshot import Checkpointer
from nemostream.runtime.text.words import Result

BACKLOG = 2  # chunks queued at the scheduler while the next block is read: enough to keep it busy


class SourceStopped(Exception):
    """Raised by the blocks of a recording to end it early. A snapshot is saved; the result covers the audio so far."""


class Progress(float):
    """Seconds of a recording that are processed, with its duration and an estimate of the remaining time."""

    duration: float  # seconds of the recording; 0 if unknown
    remaining: float  # estimated seconds until the transcription is complete; NaN while unknown

    def __new__(cls, decoded: float, duration: float, remaining: float) -> Progress:
        self = super().__new__(cls, decoded)
        self.duration, self.remaining = duration, remaining if duration else math.nan
        return self


def transcribe_recording(
    session: StreamSession,
    blocks: Iterable[Pcm],
    duration: float,
    on_partial: Callable[[Result], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    checkpointer: Checkpointer | None = None,
) -> Result:
    """Transcribe a recording and return its final result.

    Reads ahead while the model processes; about one block is in memory. `duration` is in seconds, 0 if unknown.
    """
    start_time = start_decoded = math.nan

    def report() -> None:
        nonlocal start_time, start_decoded
        if on_partial:
            for partial in session.collect():
                on_partial(partial)
        else:
            session.discard_results()
        if on_progress:
            now, decoded = time.monotonic(), session.decoded
            if math.isnan(start_time):
                start_time, start_decoded = now, decoded  # audio from a snapshot took no time
            advanced = decoded - start_decoded
            time_per_second = (now - start_time) / advanced if advanced > 0 else math.nan
            on_progress(Progress(decoded, duration, time_per_second * max(duration - decoded, 0.0)))

    try:
        for block in blocks:
            replaying = session.replaying
            session.feed(block)
            if replaying:
                continue
            session.wait(BACKLOG)
            report()
            if checkpointer and checkpointer.due and session.saveable:
                session.wait()
                checkpointer.save(session.save())
    except SourceStopped:
        if session.replaying:  # the saved snapshot is ahead of the audio fed so far: keep it
            return session.final()
        session.wait()
        if checkpointer and session.saveable and (snapshot := session.save()).samples:
            checkpointer.save(snapshot)
    session.finish()
    session.wait()
    report()
    return session.final()
