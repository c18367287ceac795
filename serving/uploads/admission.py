"""Admission control for uploaded recordings: limits on their number, in total and per client, and on their size."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from nemostream.errors import CapacityError
from nemostream.serving.client import Client
from nemostream.serving.metrics import Metrics
from nemostream.serving.settings import Settings

log = logging.getLogger("nemostream.serving")


class UploadAdmission:
    """Limits concurrent recordings, separately from live streams and before a request's body is read."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._bytes = 0  # reserved in memory and in temporary files
        self._clients: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """Number of recordings that are being received or transcribed."""
        return self._clients.total()

    @property
    def size(self) -> int:
        """Bytes that are reserved for them."""
        return self._bytes

    def count_of(self, client: Client) -> int:
        """Return the number of recordings of a client."""
        return self._clients[client.name]

    def admit(self, size: int | None, client: Client) -> AbstractContextManager[None]:
        """Admit a recording of `size` bytes (None: unknown) for as long as the returned context lasts.

        Raises `CapacityError` if the limit of recordings, of recordings of this client, or of bytes is reached.
        """
        limits = self._settings
        size = min(limits.max_upload_bytes if size is None else size, limits.max_upload_bytes)
        reason = ""
        if self.count >= limits.max_uploads:
            reason = f"all {limits.max_uploads} slots for recordings are in use; try again in a few seconds."
        elif limits.max_streams_per_client and self.count_of(client) >= limits.max_streams_per_client:
            reason = f"this client already sends {limits.max_streams_per_client} recordings, the maximum per client."
        elif self.count and self.size + size > limits.max_upload_total_bytes:
            reason = (
                f"the recordings that are being received already have {self.size >> 20} MiB; try again in a few "
                "seconds."
            )
        if reason:
            self._metrics.rejected.labels("CapacityError").inc()
            log.info("stream rejected", extra={"transport": "upload", "reason": reason, "peer": client.address})
            raise CapacityError(reason)
        return self._reserve(size, client)

    def _reserve(self, size: int, client: Client) -> AbstractContextManager[None]:
        return self._reserved(size, client)

    @contextmanager
    def _reserved(self, size: int, client: Client) -> Iterator[None]:
        name = client.name
        self._clients[name] += 1
        self._bytes += size
        self._metrics.uploads.set(self.count)
        try:
            yield
        finally:
            self._bytes -= size
            self._clients[name] -= 1
            if not self._clients[name]:
                del self._clients[name]
            self._metrics.uploads.set(self.count)
