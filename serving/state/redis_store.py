"""The state store in Redis or Valkey, which expire states themselves.

A stream is a hash of its newest epoch and its state. Each operation is one script, which the server runs atomically.
After `delete`, the epoch is kept until it expires, so that older epochs cannot store a state again.

A replica receives writes after clients have received the answer. If it replaces a failed server, the states and epochs
that it has not received are lost.

The package redis is in the `state` extra.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from nemostream.errors import BackendError, OptionError
from nemostream.extras import install_command
from nemostream.serving.errors import StateNotFound, StateStoreError, StateSuperseded
from nemostream.serving.state.sealing import MAX_STATE_BYTES, too_large

_TIMEOUT = 3.0  # seconds, for connecting and for each part of an answer

_PUT = """
if tonumber(ARGV[1]) < tonumber(redis.call('HGET', KEYS[1], 'epoch') or 0) then return 0 end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'data', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""
# Returns {epoch, data}, {size} if the state is too large, or {} if there is none.
_CLAIM = """
if redis.call('HEXISTS', KEYS[1], 'data') == 0 then return {} end
local size = redis.call('HSTRLEN', KEYS[1], 'data')
if size > tonumber(ARGV[1]) then return {size} end
local epoch = redis.call('HINCRBY', KEYS[1], 'epoch', 1)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {epoch, redis.call('HGET', KEYS[1], 'data')}
"""
_DELETE = """
if redis.call('HDEL', KEYS[1], 'data') == 0 then return end
redis.call('HINCRBY', KEYS[1], 'epoch', 1)
redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""


class RedisStore:
    """A `StateStore` in Redis or Valkey. Connects when it is used, and again after a failure.

    `url` is `redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]`, or `rediss://...` for TLS. Raises `BackendError` if the
    package redis is missing, and `OptionError` if the URL is invalid.
    """

    def __init__(self, url: str, retention_seconds: float) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise BackendError(
                f"a state store in Redis needs the package redis ({error}): {install_command('state')}."
            ) from error
        self._error = redis.RedisError
        self._milliseconds = max(1, round(1000 * retention_seconds))
        try:
            self._address = _address(url)
            self._client = redis.Redis.from_url(
                url,
                socket_timeout=_TIMEOUT,
                socket_connect_timeout=_TIMEOUT,
                retry=Retry(NoBackoff(), 0),  # the caller tries again, with the next state
            )
            pool = self._client.connection_pool
            pool.connection_class(**pool.connection_kwargs)  # raises an error for unknown parameters; does not connect
        except (ValueError, TypeError) as error:
            # The URL is not quoted: it may contain a password.
            raise OptionError(
                f"state_store is not a valid Redis URL ({error}); it must be "
                "redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE], or rediss:// for TLS."
            ) from error

    def put(self, token: str, epoch: int, data: bytes) -> None:
        if not self._run(_PUT, token, epoch, data, self._milliseconds):
            raise StateSuperseded

    def claim(self, token: str) -> tuple[int, bytes]:
        match self._run(_CLAIM, token, MAX_STATE_BYTES, self._milliseconds):
            case [epoch, data]:
                return int(epoch), bytes(data)
            case [size]:
                raise too_large(size)
        raise StateNotFound

    def delete(self, token: str) -> None:
        self._run(_DELETE, token, self._milliseconds)

    def sweep(self) -> int:
        return 0

    def close(self) -> None:
        self._client.close()

    def _run(self, script: str, token: str, *arguments: int | bytes) -> Any:
        try:
            return self._client.eval(script, 1, f"nemostream:state:{token}", *arguments)
        except (self._error, OSError) as error:
            raise StateStoreError(f"the state store, Redis at {self._address}, failed: {error}.") from error


def _address(url: str) -> str:
    """Return the host and port of a URL, without the password. Raises `ValueError`."""
    parts = urlsplit(url)
    try:
        return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
    except ValueError:  # its message would contain a part of a password with a slash
        raise ValueError("its port is not a number up to 65535; write / in a password as %2F") from None
