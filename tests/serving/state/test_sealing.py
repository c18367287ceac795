"""Sealed states: what was sealed is returned, and everything else is rejected."""

from __future__ import annotations

import base64
import builtins
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemostream.errors import BackendError, OptionError
from nemostream.serving.errors import StateError, StateNotFound
from nemostream.serving.state.sealing import MAX_STATE_BYTES, Sealer, check_token, read_key, stored_name, too_large

TOKEN, OTHER = "abcDEF-_0123456789abcd", "abcDEF-_0123456789abce"
KEY = bytes(range(32))


@pytest.fixture(params=["plain", "encrypted"])
def sealer(request: pytest.FixtureRequest) -> Sealer:
    if request.param == "plain":
        return Sealer(None)
    pytest.importorskip("cryptography", reason="needs the state extra")
    return Sealer(KEY)


@pytest.fixture
def encrypting() -> Sealer:
    pytest.importorskip("cryptography", reason="needs the state extra")
    return Sealer(KEY)


# -- states ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 4000])
def test_a_sealed_state_is_opened(sealer: Sealer, data: bytes) -> None:
    opened = sealer.unseal(TOKEN, sealer.seal(TOKEN, data))
    assert opened == data and type(opened) is bytes


def test_the_format_without_a_key() -> None:
    """The format of a release must not change: servers of two versions share a store while they are updated."""
    sealed = Sealer(None).seal(TOKEN, b"data")
    assert sealed[:6] == b"NMST\x01\x00" and sealed[38:] == b"data"
    expected = hashlib.blake2b(sealed[:6] + b"data", key=TOKEN.encode(), digest_size=32, person=b"nemostream state")
    assert sealed[6:38] == expected.digest()


def test_the_format_with_a_key(encrypting: Sealer) -> None:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    sealed = encrypting.seal(TOKEN, b"data")
    header, nonce, rest = sealed[:6], sealed[6:18], sealed[18:]
    assert header == b"NMST\x01\x01" and len(rest) == len(b"data") + 16
    key = hashlib.blake2b(TOKEN.encode(), key=KEY, digest_size=32, person=b"nemostream key").digest()
    assert AESGCM(key).decrypt(nonce, rest, header + TOKEN.encode()) == b"data"


def test_an_encrypted_state_does_not_contain_its_content(encrypting: Sealer) -> None:
    text = b"the secret transcript"
    first, second = encrypting.seal(TOKEN, text), encrypting.seal(TOKEN, text)
    assert text in Sealer(None).seal(TOKEN, text)
    assert text not in first and first[6:18] != second[6:18] and first[18:] != second[18:]


@pytest.mark.parametrize("data", [b"", b"the state"])
def test_a_state_that_is_damaged_at_any_position_is_rejected(sealer: Sealer, data: bytes) -> None:
    sealed = sealer.seal(TOKEN, data)
    for position in range(len(sealed)):
        for bit in range(8):
            damaged = bytearray(sealed)
            damaged[position] ^= 1 << bit
            with pytest.raises(StateError, match=r"^the stored state of the stream cannot be used: it is .+\.$"):
                sealer.unseal(TOKEN, bytes(damaged))
        with pytest.raises(StateError, match="damaged"):
            sealer.unseal(TOKEN, sealed[:position])
    with pytest.raises(StateError, match="damaged"):
        sealer.unseal(TOKEN, sealed + b"\0")


@given(data=st.data(), content=st.binary(max_size=200), encrypted=st.booleans())
def test_changed_states_are_rejected(data: st.DataObject, content: bytes, encrypted: bool) -> None:
    """Any part is replaced by any bytes, also of another length."""
    if encrypted:
        pytest.importorskip("cryptography", reason="needs the state extra")
    sealer = Sealer(KEY if encrypted else None)
    sealed = sealer.seal(TOKEN, content)
    start = data.draw(st.integers(0, len(sealed)))
    stop = data.draw(st.integers(start, len(sealed)))
    changed = sealed[:start] + data.draw(st.binary(max_size=60)) + sealed[stop:]
    if changed == sealed:
        assert sealer.unseal(TOKEN, changed) == content
    else:
        with pytest.raises(StateError):
            sealer.unseal(TOKEN, changed)


@given(st.binary(max_size=100))
def test_bytes_that_were_not_sealed_are_rejected(content: bytes) -> None:
    with pytest.raises(StateError, match="it is damaged"):
        Sealer(None).unseal(TOKEN, content)


def test_a_state_is_not_opened_for_another_stream(sealer: Sealer) -> None:
    with pytest.raises(StateError, match="belongs to another stream"):
        sealer.unseal(OTHER, sealer.seal(TOKEN, b"data"))


def test_a_state_is_not_opened_with_another_key(encrypting: Sealer) -> None:
    with pytest.raises(StateError, match="encrypted with another key"):
        Sealer(bytes(32)).unseal(TOKEN, encrypting.seal(TOKEN, b"data"))


def test_servers_with_and_without_a_key(encrypting: Sealer) -> None:
    plain = Sealer(None)
    with pytest.raises(StateError, match=r"it is encrypted, and this server has no key; set state_key_file"):
        plain.unseal(TOKEN, encrypting.seal(TOKEN, b"data"))
    with pytest.raises(StateError, match=r"it is not encrypted, but this server has a key; set state_key_file"):
        encrypting.unseal(TOKEN, plain.seal(TOKEN, b"data"))


def test_another_version_of_the_format_is_named(sealer: Sealer) -> None:
    sealed = bytearray(sealer.seal(TOKEN, b"data"))
    sealed[4] = 2
    with pytest.raises(StateError, match=r"it is of version 2 of the format; this server supports version 1\."):
        sealer.unseal(TOKEN, bytes(sealed))


def test_the_size_of_a_state_that_is_too_large_is_named() -> None:
    assert MAX_STATE_BYTES == 1 << 30
    message = "the stored state of the stream cannot be used: it has 1073741825 bytes, and at most 1073741824 are read."
    assert str(too_large(MAX_STATE_BYTES + 1)) == message


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["a" * 22, "a" * 64, TOKEN])
def test_tokens(token: str) -> None:
    check_token(token)
    name = stored_name(token)
    assert token not in name and stored_name(token) == name != stored_name(token[:-1] + "~")
    check_token(name)  # stores accept the name as a token


@pytest.mark.parametrize("token", ["", "a" * 21, "a" * 65, "../" + "a" * 30, "a" * 30 + "\n", "a" * 30 + "/", "é" * 30])
def test_other_text_is_no_token(token: str) -> None:
    with pytest.raises(StateNotFound, match="the token is not one of a stream"):
        check_token(token)


# -- keys --------------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32))
def test_keys_are_read_in_all_notations(tmp_path_factory: pytest.TempPathFactory, key: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "key"
    standard, url_safe = base64.b64encode(key).decode(), base64.urlsafe_b64encode(key).decode()
    for text in (key.hex(), key.hex().upper(), standard, standard.rstrip("="), url_safe, f"  {url_safe}\r\n"):
        file.write_text(text)
        assert read_key(file) == key


def test_the_output_of_the_proposed_command_is_a_key(tmp_path: Path) -> None:
    """`openssl rand -base64 32` prints a line of base64."""
    (tmp_path / "key").write_text(base64.encodebytes(KEY).decode())
    assert read_key(tmp_path / "key") == KEY


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff" * 32, "is not text"),
        (b"not a key!", "is neither base64 nor hexadecimal"),
        (KEY.hex().encode() + b"\n" + KEY.hex().encode(), "is neither base64 nor hexadecimal"),
        (b"A" * 5, "is neither base64 nor hexadecimal"),
        (KEY.hex().encode()[:62], "has 62 characters, which are not 32 bytes"),
        (base64.b64encode(KEY[:31]), "has 44 characters, which are not 32 bytes"),
        (base64.b64encode(KEY + b"x"), "has 44 characters, which are not 32 bytes"),
        (b"A" * 1025, "is not a key file: it is larger than the limit of 1024 bytes"),
    ],
)
def test_files_that_are_not_keys(content: bytes, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(OptionError) as caught:
        read_key(file)
    assert str(caught.value) == (
        f"state_key_file: {file} {problem}; it must contain 32 bytes as base64 or hexadecimal characters, for example "
        "the output of `openssl rand -base64 32`."
    )


def test_key_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot be read \(No such file or directory\)"):
        read_key(tmp_path / "missing")
    with pytest.raises(OptionError, match=r"cannot be read \(.+ is not a regular file\)"):
        read_key(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OptionError, match=r"cannot be read \(.+ is not a regular file\)"):
        read_key(tmp_path / "fifo")


@pytest.mark.parametrize("size", [0, 16, 31, 33, 64])
def test_a_key_has_32_bytes(size: int) -> None:
    with pytest.raises(OptionError, match=f"has {size} bytes; it must have 32"):
        Sealer(bytes(size))


def test_the_package_of_the_cipher_is_needed_only_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("cryptography"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    assert Sealer(None).seal(TOKEN, b"data")
    with pytest.raises(
        BackendError, match=r"encrypted states need the package cryptography \(No module.+\): .+\[state\]"
    ):
        Sealer(KEY)
