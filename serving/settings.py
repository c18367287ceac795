"""Options of the server, from flags, environment variables, a TOML file or defaults, in this order.

`--max-streams 100`, `NEMOSTREAM_MAX_STREAMS=100` and `max_streams = 100` in the file are equivalent.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliImplicitFlag,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from nemostream.errors import OptionError
from nemostream.serving.network.proxies import TrustedProxies
from nemostream.untrusted import describe_invalid

MEMORY = "memory"  # `state_store`: states that end with the server


class Limits(BaseModel):
    """Limits of streams, recordings and connections. Seconds are wall-clock seconds."""

    max_streams: int = Field(256, ge=1, description="Maximum number of open live streams; more are rejected.")
    idle_seconds: float = Field(30, gt=0, description="Idle timeout of a stream that sends nothing.")
    max_seconds: float = Field(4 * 3600, gt=0, description="Maximum duration of a stream.")
    send_seconds: float = Field(10, gt=0, description="Timeout for a client that does not read its results.")
    max_message_bytes: int = Field(1 << 20, ge=1024, description="Maximum size of a message of a live stream.")
    max_bytes_per_second: int = Field(
        4 << 20, ge=1024, description="Maximum rate at which a live stream is read; faster clients are slowed down."
    )
    max_upload_bytes: int = Field(256 << 20, ge=1024, description="Maximum size of an uploaded recording.")
    max_upload_seconds: float = Field(7200, gt=0, description="Maximum duration of an uploaded recording.")
    max_uploads: int = Field(
        8, ge=1, description="Maximum number of recordings received or transcribed at once; more are rejected."
    )
    max_upload_total_bytes: int = Field(
        1 << 30, ge=1024, description="Maximum total size of all recordings at once, in memory and in temporary files."
    )
    max_streams_per_client: int = Field(
        0,
        ge=0,
        description="Maximum number of streams and of recordings per API key (per address without keys); 0: no limit.",
    )
    max_connections: int = Field(
        1024,
        ge=8,
        description="Maximum number of HTTP and WebSocket connections (fewer if file descriptors are scarce).",
    )
    max_connections_per_client: int = Field(
        0, ge=0, description="Maximum number of connections per address; 0: three quarters of max_connections."
    )
    body_seconds: float = Field(900, gt=0, description="Timeout for receiving the body of a request.")


class Settings(BaseSettings, Limits):
    """Options of the server."""

    model_config = SettingsConfigDict(env_prefix="NEMOSTREAM_", extra="forbid")

    bundle: Path | None = Field(
        None, description="Bundle folder written by `nemostream export`. Default: the packaged demo."
    )
    chunk_ms: int = Field(560, description="Default chunk size in milliseconds. Smaller: lower latency, more compute.")
    final_chunk_ms: int | None = Field(
        None,
        description="Default chunk size in milliseconds for the text of finals, larger than chunk_ms; each stream then "
        "takes two slots. Default: that of chunk_ms.",
    )
    chunks: Annotated[list[int], NoDecode] = Field(
        [], description="Chunk sizes that clients may choose (comma-separated). Default: all of the model."
    )
    language: str | None = Field(
        None, description="Language of clients that set none: de-DE, or auto to detect it. Default: the model's."
    )
    device: str = Field("cpu", description="Device: cpu, or cuda for a GPU.")
    precision: str | None = Field(None, description="Precision of the engines to use (`nemostream build`).")
    engines: Path | None = Field(None, description="Folder of engines. Default: ~/.cache/nemostream/engines.")
    threads: int | None = Field(
        None,
        ge=1,
        description="Threads of ONNX Runtime on a CPU. Default: the CPUs that the process may use, less one for each "
        "process that serves the protocols.",
    )
    max_batch: int | None = Field(
        None,
        ge=1,
        description="Maximum number of streams in one step. Default: 64. On a GPU at most that of the engines "
        "(`nemostream build --max-batch`).",
    )
    transports: int = Field(
        0,
        ge=0,
        le=64,
        description="Number of processes that serve the protocols for one engine process; 0: one process for all.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0: all networks of this machine.")
    port: int = Field(8000, ge=0, le=65535, description="Port for HTTP and WebSockets; 0: a free port.")
    grpc_port: int = Field(50051, ge=-1, le=65535, description="Port for Riva's gRPC; 0: a free port, -1: no gRPC.")
    endpoint_ms: int = Field(800, ge=80, le=60_000, description="Silence in milliseconds that ends an utterance.")
    measure: CliImplicitFlag[bool] = Field(
        True,
        description="Measure the number of streams that this machine can serve when it starts, and admit no more. "
        "Otherwise only warm up the engines.",
    )
    degrade: CliImplicitFlag[bool] = Field(
        False, description="Move streams to larger chunks under overload, and back afterwards."
    )
    drain_seconds: float = Field(60, ge=0, description="Time for streams to finish after SIGTERM.")
    state_store: str = Field(
        MEMORY,
        description="Where the states of resumable streams are kept: memory (of this server), none, the path of a "
        "folder that may be shared by servers, or redis://HOST (Redis or Valkey).",
    )
    state_seconds: float = Field(
        5, gt=0, description="Seconds between two stored states of a resumable stream; clients keep as much audio."
    )
    state_retention: float = Field(
        300, gt=0, description="Seconds for which the state of a stream without a connection is kept."
    )
    state_key_file: Path | None = Field(
        None, description="File with a key of 32 bytes (base64 or hexadecimal) that encrypts the states."
    )
    api_keys: Annotated[list[SecretStr] | None, NoDecode] = Field(
        None, description="API keys that clients must send (comma-separated). Default: no key is required."
    )
    api_keys_file: Path | None = Field(
        None, description="File with API keys, one per line; empty lines and lines that start with # are ignored."
    )
    tls_cert: Path | None = Field(None, description="Certificate chain (PEM); encrypts HTTP and gRPC.")
    tls_key: Path | None = Field(None, description="Private key of the certificate (PEM).")
    origins: Annotated[list[str], NoDecode] = Field(
        [], description="Other web origins whose pages may use the server (comma-separated): https://app.example."
    )
    hosts: Annotated[list[str], NoDecode] = Field(
        [],
        description="Host names besides localhost that clients may send in the Host header (comma-separated); *: any.",
    )
    trusted_proxies: Annotated[list[str], NoDecode] = Field(
        ["127.0.0.1", "::1"],
        description="Addresses or networks of reverse proxies whose X-Forwarded-For and X-Forwarded-Host headers are "
        "used (comma-separated); empty: none.",
    )
    log_format: Literal["auto", "text", "json"] = Field(
        "auto", description="Format of the log on standard error; auto: text on a terminal, JSON otherwise."
    )
    otel: CliImplicitFlag[bool] = Field(
        False,
        description="Send traces and metrics to an OpenTelemetry collector, as the OTEL_* environment variables "
        "configure it (needs the otel extra).",
    )
    log_transcripts: CliImplicitFlag[bool] = Field(False, description="Write transcripts to the log.")
    config: Path | None = Field(None, description="TOML file with these options.")

    @model_validator(mode="before")
    @classmethod
    def _split_lists(cls, values: Any) -> Any:
        for name in ("api_keys", "origins", "hosts", "chunks", "trusted_proxies"):
            if isinstance(values, dict) and isinstance(values.get(name), str):
                parts = [part.strip() for part in values[name].split(",")]
                # An empty key is an error (`_check_keys`), so it is not dropped.
                values[name] = parts if name == "api_keys" else [part for part in parts if part]
        return values

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, keys: list[SecretStr] | None) -> list[SecretStr] | None:
        """Reject empty keys: an empty variable or file entry must not disable access control."""
        if keys is None:
            return None
        stripped = [SecretStr(key.get_secret_value().strip()) for key in keys]
        if not stripped or not all(key.get_secret_value() for key in stripped):
            raise ValueError("a key is empty; omit the option for a server without keys")
        return stripped

    @field_validator("hosts")
    @classmethod
    def _normalize_hosts(cls, hosts: list[str]) -> list[str]:
        return [host.strip().rstrip(".").lower() for host in hosts]

    @field_validator("trusted_proxies")
    @classmethod
    def _check_proxies(cls, proxies: list[str]) -> list[str]:
        for proxy in proxies:
            try:
                TrustedProxies([proxy])
            except ValueError:
                raise ValueError(
                    f"{proxy!r} is neither an IP address nor a network such as 10.0.0.0/8 (host bits must be 0)"
                ) from None
        return proxies

    @model_validator(mode="after")
    def _read_keys(self) -> Settings:
        if self.api_keys_file is not None:
            keys = self.api_keys or []
            self.api_keys = keys + [key for key in _read_keys_file(self.api_keys_file) if key not in keys]
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key must be set together")
        for file in (self.tls_cert, self.tls_key):
            if file is not None and not file.is_file():
                raise ValueError(f"no such file: {file}")
        return self

    @property
    def shares_states(self) -> bool:
        """Whether another server can continue a stream. It could not with states in memory."""
        return self.state_store not in (MEMORY, "none")

    @property
    def public(self) -> bool:
        """Whether other machines can reach the server."""
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def read_settings(arguments: Sequence[str] = ()) -> Settings:
    """Return the settings from the command line, the environment and a file.

    Raises `OptionError` that names the invalid options, and `SystemExit` after printing the help for `--help`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=os.environ.get("NEMOSTREAM_CONFIG"))
    file = parser.parse_known_args(arguments)[0].config
    if file and not Path(file).is_file():
        raise OptionError(f"no such configuration file: {file}.")

    class FromFile(Settings):
        __doc__ = Settings.__doc__
        model_config = SettingsConfigDict(
            toml_file=file,
            cli_prog_name="nemostream serve",
            cli_kebab_case=True,
            cli_avoid_json=True,
            cli_hide_none_type=True,
            cli_show_env_vars=True,
        )

    try:
        return CliApp.run(FromFile, list(arguments), cli_exit_on_error=False)
    except ValidationError as error:
        raise OptionError("; ".join(_describe(dict(details)) for details in error.errors()) + ".") from error
    except (SettingsError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"the options cannot be read: {str(error).removeprefix('error parsing CLI: ')}.") from error


def _read_keys_file(file: Path) -> list[SecretStr]:
    """Return the keys in a file. Raises `ValueError` if it has none: an empty file must not disable access control."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise ValueError(f"api_keys_file: cannot read {file} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"api_keys_file: {file} is not UTF-8 text") from None
    keys = [SecretStr(line) for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"api_keys_file: {file} has no key; omit the option for a server without keys")
    return keys


def _describe(details: dict[str, Any]) -> str:
    """Return the message of one of pydantic's errors, with the name of the option."""
    name = ".".join(map(str, details["loc"]))
    message = describe_invalid(details, secret=name.startswith("api_keys"))
    return f"{name}: {message}" if name else message
