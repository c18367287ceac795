"""Who sends a request, and how text from clients is quoted."""

from __future__ import annotations

from dataclasses import dataclass

_MAX_CHARACTERS = 300  # of a client's text in a log line or an error message


@dataclass(frozen=True)
class Client:
    """The sender of a request. `name` is the key of per-client limits: an API key's number, else the address.

    `owner` is a digest of the API key, the same on all servers; empty without keys.
    """

    name: str = ""
    address: str = ""
    owner: str = ""


UNKNOWN_CLIENT = Client()


def shorten(text: str) -> str:
    """Return a client's text, truncated to what a log line or an error message may contain."""
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + f"... ({len(text)} characters)"
