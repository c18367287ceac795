"""The format of stored states. Each is bound to the token of its stream, so that it cannot be used under another one.

A header of 6 bytes (magic, version, whether the content is encrypted) is followed by

* without a key: 32 bytes of BLAKE2b, keyed by the token, of the header and the content; and the content
* with a key: a nonce of 12 bytes; and the content in AES-256-GCM, with the header and the token as associated data

NIST SP 800-38D allows 2**32 random nonces per key, which a busy server would reach in months. So each stream has a key
of its own, derived from the server's key and the token.

This module does not depend on the content of a state. AES is in the package cryptography: the `state` extra.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
import struct
from pathlib import Path
from typing import Any

from nemostream.errors import BackendError, OptionError
from nemostream.extras import install_command
from nemostream.serving.errors import StateError, StateNotFound
from nemostream.untrusted import read_regular

MAX_STATE_BYTES = 1 << 30  # of one stored state
KEY_BYTES = 32
TOKEN = re.compile(r"[A-Za-z0-9_-]{22,64}")

_MAX_KEY_FILE_BYTES = 1024
_MAGIC, _VERSION, _PLAIN, _ENCRYPTED = b"NMST", 1, 0, 1
_HEADER = struct.Struct("<4sBB")
_DIGEST_BYTES, _NONCE_BYTES = 32, 12


def check_token(token: str) -> None:
    """Raise `StateNotFound` unless `token` consists of 22 to 64 of the characters A-Z, a-z, 0-9, `-` and `_`."""
    if not TOKEN.fullmatch(token):
        raise StateNotFound("the token is not one of a stream; open a new stream.")


def stored_name(token: str) -> str:
    """Return the name of a stream in a store, from which the token cannot be computed.

    A token gives access to the transcript of its stream. It must not be visible to a user who can list the store but
    does not have the key.
    """
    return hashlib.blake2b(token.encode(), digest_size=24, person=b"nemostream name").hexdigest()


class Sealer:
    """Seals and opens states; encrypts them if there is a key of 32 bytes. Thread-safe.

    Raises `OptionError` if the key has another size, `BackendError` if the package cryptography is missing.
    """

    def __init__(self, key: bytes | None) -> None:
        self._key = key
        if key is not None:
            if len(key) != KEY_BYTES:
                raise OptionError(f"the key of the state store has {len(key)} bytes; it must have {KEY_BYTES}.")
            try:
                from cryptography.exceptions import InvalidTag
                from cryptography.hazmat.primitives.ciphers.aead import AESGCM
            except ImportError as error:
                command = install_command("state")
                raise BackendError(f"encrypted states need the package cryptography ({error}): {command}.") from error
            self._aes, self._invalid = AESGCM, InvalidTag

    def seal(self, token: str, data: bytes) -> bytes:
        """Return the state of a stream in the format of this module."""
        if self._key is None:
            header = _HEADER.pack(_MAGIC, _VERSION, _PLAIN)
            return b"".join((header, _digest(token, header, data), data))
        header, nonce = _HEADER.pack(_MAGIC, _VERSION, _ENCRYPTED), secrets.token_bytes(_NONCE_BYTES)
        return b"".join((header, nonce, self._cipher(token).encrypt(nonce, data, header + token.encode())))

    def unseal(self, token: str, sealed: bytes) -> bytes:
        """Return the content of a sealed state.

        Raises `StateError` if it is damaged or incomplete, of another stream, key or version, or if it is encrypted
        but there is no key or vice versa.
        """
        if len(sealed) < _HEADER.size:
            raise _unusable("it is damaged")
        header, content = sealed[: _HEADER.size], memoryview(sealed)[_HEADER.size :]
        magic, version, kind = _HEADER.unpack(header)
        if magic != _MAGIC or kind not in (_PLAIN, _ENCRYPTED):
            raise _unusable("it is damaged")
        if version != _VERSION:
            raise _unusable(f"it is of version {version} of the format; this server supports version {_VERSION}")
        if kind == _ENCRYPTED and self._key is None:
            raise _unusable(
                "it is encrypted, and this server has no key; set state_key_file to that of the other servers"
            )
        if kind == _PLAIN and self._key is not None:
            raise _unusable("it is not encrypted, but this server has a key; set state_key_file on all servers")
        if kind == _PLAIN:
            digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if not hmac.compare_digest(digest, _digest(token, header, data)):
                raise _unusable("it is damaged or belongs to another stream")
            return bytes(data)
        try:
            nonce, encrypted = content[:_NONCE_BYTES], content[_NONCE_BYTES:]
            data = self._cipher(token).decrypt(nonce, encrypted, header + token.encode())
        except (self._invalid, ValueError) as error:  # ValueError: a nonce that is too short
            raise _unusable("it is damaged, belongs to another stream or was encrypted with another key") from error
        return bytes(data)

    def _cipher(self, token: str) -> Any:
        assert self._key is not None
        key = hashlib.blake2b(token.encode(), key=self._key, digest_size=KEY_BYTES, person=b"nemostream key")
        return self._aes(key.digest())


def _digest(token: str, header: bytes, data: bytes | memoryview) -> bytes:
    state = hashlib.blake2b(header, key=token.encode(), digest_size=_DIGEST_BYTES, person=b"nemostream state")
    state.update(data)
    return state.digest()


def too_large(size: int) -> StateError:
    """Return the error for a stored state that is not read because of its size in bytes."""
    return _unusable(f"it has {size} bytes, and at most {MAX_STATE_BYTES} are read")


def _unusable(reason: str) -> StateError:
    return StateError(f"the stored state of the stream cannot be used: {reason}.")


def read_key(path: Path) -> bytes:
    """Return the 32 bytes in a file of base64 (either alphabet) or hexadecimal characters.

    Raises `OptionError` for any other file.
    """
    try:
        text = read_regular(path, _MAX_KEY_FILE_BYTES).decode("ascii").strip()
    except OSError as error:
        raise _invalid_key(path, f"cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise _invalid_key(path, "is not text") from error
    except ValueError as error:  # larger than the limit
        raise _invalid_key(path, f"is not a key file: {error}") from error
    if not text:
        raise _invalid_key(path, "is empty")
    try:
        if re.fullmatch(f"[0-9a-fA-F]{{{2 * KEY_BYTES}}}", text):  # these characters are also base64, of 48 bytes
            return bytes.fromhex(text)
        standard = text.rstrip("=").translate(str.maketrans("-_", "+/"))
        key = base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True)
    except binascii.Error as error:
        raise _invalid_key(path, "is neither base64 nor hexadecimal") from error
    if len(key) != KEY_BYTES:
        raise _invalid_key(path, f"has {len(text)} characters, which are not {KEY_BYTES} bytes")
    return key


def _invalid_key(path: Path, problem: str) -> OptionError:
    # The content is not quoted: it may be a secret.
    return OptionError(
        f"state_key_file: {path} {problem}; it must contain {KEY_BYTES} bytes as base64 or hexadecimal characters, for "
        f"example the output of `openssl rand -base64 {KEY_BYTES}`."
    )
