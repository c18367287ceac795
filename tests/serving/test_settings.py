"""Each option of the server: its smallest and largest value, and how lists, keys and files are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemostream.errors import OptionError
from nemostream.serving.settings import Settings, read_settings

# The smallest and the largest value of an option, and values just outside; None: no limit.
BOUNDS: dict[str, tuple[Any, Any, Any, Any]] = {
    "max_streams": (1, 0, None, None),
    "idle_seconds": (0.001, 0, None, None),
    "max_seconds": (0.001, 0, None, None),
    "send_seconds": (0.001, 0, None, None),
    "max_message_bytes": (1024, 1023, None, None),
    "max_bytes_per_second": (1024, 1023, None, None),
    "max_upload_bytes": (1024, 1023, None, None),
    "max_upload_seconds": (0.001, 0, None, None),
    "max_uploads": (1, 0, None, None),
    "max_upload_total_bytes": (1024, 1023, None, None),
    "max_streams_per_client": (0, -1, None, None),
    "max_connections": (8, 7, None, None),
    "max_connections_per_client": (0, -1, None, None),
    "body_seconds": (0.001, 0, None, None),
    "threads": (1, 0, None, None),
    "max_batch": (1, 0, None, None),
    "transports": (0, -1, 64, 65),
    "port": (0, -1, 65535, 65536),
    "grpc_port": (-1, -2, 65535, 65536),
    "endpoint_ms": (80, 79, 60_000, 60_001),
    "drain_seconds": (0, -0.001, None, None),
    "state_seconds": (0.001, 0, None, None),
    "state_retention": (0.001, 0, None, None),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_of_options(name: str) -> None:
    flag, (smallest, below, largest, above) = name.replace("_", "-"), BOUNDS[name]
    for value in (smallest, largest):
        if value is not None:
            assert getattr(read_settings([f"--{flag}={value}"]), name) == value
    for value in (below, above):
        if value is not None:
            with pytest.raises(OptionError, match=f"^{name}: "):
                read_settings([f"--{flag}={value}"])


def test_every_number_has_bounds() -> None:
    numbers = {
        name
        for name, field in Settings.model_fields.items()
        if field.annotation in (int, float, int | None, float | None)
        and name not in ("chunk_ms", "final_chunk_ms")  # checked with the model
    }
    assert numbers == set(BOUNDS)


def test_the_chunk_size_of_finals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text("final_chunk_ms = 560\n")
    assert read_settings().final_chunk_ms is None
    assert read_settings([f"--config={file}"]).final_chunk_ms == 560
    monkeypatch.setenv("NEMOSTREAM_FINAL_CHUNK_MS", "1120")
    assert read_settings().final_chunk_ms == 1120 and read_settings(["--final-chunk-ms=160"]).final_chunk_ms == 160


def test_lists_are_separated_by_commas_or_written_as_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Separated by commas, with spaces around; or lists in the file."""
    wanted = {
        "origins": ["https://a.example", "https://b.example"],
        "hosts": ["a.example", "b.example"],
        "chunks": [80, 560],
        "trusted_proxies": ["10.0.0.0/8", "::1"],
    }
    flags = [
        "--origins= https://a.example ,https://b.example,",
        "--hosts=A.example., b.example",
        "--chunks=80, 560",
        "--trusted-proxies=10.0.0.0/8,::1",
    ]
    file = tmp_path / "serve.toml"
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in wanted.items()))
    for arguments in (flags, [f"--config={file}"]):
        settings = read_settings(arguments)
        assert {name: getattr(settings, name) for name in wanted} == wanted
    for name, value in wanted.items():
        monkeypatch.setenv(f"NEMOSTREAM_{name.upper()}", ",".join(map(str, value)))
    assert {name: getattr(read_settings(), name) for name in wanted} == wanted
    assert read_settings(["--trusted-proxies="]).trusted_proxies == []
    assert read_settings(["--chunks="]).chunks == []


def test_keys_of_both_sources_without_duplicates(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("two\n  # a comment\n one\n\nthree\n")

    def keys(*arguments: str) -> list[str]:
        return [key.get_secret_value() for key in read_settings(arguments).api_keys or ()]

    assert keys() == [] and keys("--api-keys= one , two") == ["one", "two"]
    assert keys(f"--api-keys-file={file}") == ["two", "one", "three"]
    assert keys("--api-keys=one,four", f"--api-keys-file={file}") == ["one", "four", "two", "three"]
    assert "hidden" not in repr(read_settings(["--api-keys=hidden"]))


def test_certificate_and_key_belong_together(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.touch()
    for arguments in ([f"--tls-cert={cert}"], [f"--tls-key={cert}"]):
        with pytest.raises(OptionError, match="tls_cert and tls_key must be set together"):
            read_settings(arguments)
    for arguments in ([f"--tls-cert={cert}", f"--tls-key={key}"], [f"--tls-cert={key}", f"--tls-key={cert}"]):
        with pytest.raises(OptionError, match=f"no such file: {key}"):
            read_settings(arguments)
    key.touch()
    assert read_settings([f"--tls-cert={cert}", f"--tls-key={key}"]).tls_key == key


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("127.0.0.1", False),
        ("127.9.9.9", False),
        ("::1", False),
        ("localhost", False),
        ("0.0.0.0", True),
        ("::", True),
        ("192.168.1.2", True),
        ("asr.example", True),
    ],
)
def test_hosts_that_other_machines_can_reach(host: str, public: bool) -> None:
    assert Settings(host=host).public is public


def test_errors_name_the_options(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        read_settings(["--max-streams=0", "--port=x"])
    message = str(caught.value)
    assert message == "max_streams: '0' must be greater than or equal to 1; port: 'x' must be a valid integer."
    (tmp_path / "keys.toml").write_text("api_keys = [12345]")
    with pytest.raises(OptionError, match="api_keys") as caught:
        read_settings([f"--config={tmp_path / 'keys.toml'}"])
    assert "12345" not in str(caught.value)
    (tmp_path / "bad.toml").write_text("port = ")
    with pytest.raises(OptionError, match=r"the options cannot be read: .*\.$"):
        read_settings([f"--config={tmp_path / 'bad.toml'}"])
    with pytest.raises(OptionError, match="no such configuration file: /nowhere"):
        read_settings(["--config=/nowhere"])
    with pytest.raises(OptionError, match=r"trusted_proxies: '10\.0\.0\.1/8' is neither"):
        read_settings(["--trusted-proxies=10.0.0.1/8"])


def test_the_configuration_file_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, port in (("a", 1), ("b", 2)):
        (tmp_path / name).write_text(f"port = {port}\n")
    monkeypatch.setenv("NEMOSTREAM_CONFIG", str(tmp_path / "a"))
    assert read_settings().port == 1 and read_settings(["--config", str(tmp_path / "b")]).port == 2
