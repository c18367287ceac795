"""Who sends a request, and how text from clients is quoted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

_MAX_CHARACTERS = 300  # of a client's text in a log line or an error message


@dataclass(frozen=True)
class Client:
    """The sender of a request. `name` is the key of per-client limits: an API key's number, else the address.

    `owner` is a digest of the API key, the same on all servers; empty without keys. `traceparent` and `tracestate` are
    headers of W3C Trace Context; they are set only if traces are sent.
    """

    name: str = ""
    address: str = ""
    owner: str = ""
    traceparent: str = ""
    tracestate: str = ""

    def with_trace(self, headers: Mapping[str, str]) -> Client:
        """Return the client with the trace context of a request, of which `headers` has lower-case names."""
        return replace(self, traceparent=headers.get("traceparent", ""), tracestate=headers.get("tracestate", ""))


UNKNOWN_CLIENT = Client()


def shorten(text: str) -> str:
    """Return a client's text, truncated to what a log line or an error message may contain."""
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + f"... ({len(text)} characters)"
