"""How the server is set up: a flag, an environment variable, a line of a file, or the default, in this order.

`--max-streams 100`, `NEMOSTREAM_MAX_STREAMS=100` and `max_streams = 100` in a TOML file say the same.
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


class Limits(BaseModel):
    """What one client may take. Seconds are wall-clock seconds."""

    max_streams: int = Field(256, ge=1, description="Most streams at once; a stream more is refused.")
    idle_seconds: float = Field(30, gt=0, description="A stream that sends nothing for so long is ended.")
    max_seconds: float = Field(4 * 3600, gt=0, description="No stream lasts longer.")
    send_seconds: float = Field(10, gt=0, description="A client that does not read for so long is disconnected.")
    max_message_bytes: int = Field(1 << 20, ge=1024, description="Of one message of a live stream.")
    max_bytes_per_second: int = Field(
        4 << 20, ge=1024, description="A live stream that sends faster is read no faster than this."
    )
    max_upload_bytes: int = Field(256 << 20, ge=1024, description="Of one uploaded recording.")
    max_upload_seconds: float = Field(7200, gt=0, description="Longest duration of one uploaded recording.")
    max_uploads: int = Field(
        8, ge=1, description="Most recordings received or recognised at once; one more is rejected."
    )
    max_upload_total_bytes: int = Field(
        1 << 30, ge=1024, description="Of all recordings at once, in memory and in temporary files."
    )
    max_streams_per_client: int = Field(
        0,
        ge=0,
        description="Most streams, and most recordings, of one API key (of one address without keys); 0: no limit.",
    )
    max_connections: int = Field(
        1024,
        ge=8,
        description="Most connections to HTTP and WebSockets at once (fewer where file descriptors are few).",
    )
    max_connections_per_client: int = Field(
        0, ge=0, description="Most of them from one address; 0: three quarters of max_connections."
    )
    body_seconds: float = Field(900, gt=0, description="Longest time for the body of a request to arrive.")


class Settings(BaseSettings, Limits):
    """Options of the server."""

    model_config = SettingsConfigDict(env_prefix="NEMOSTREAM_", extra="forbid")

    bundle: Path | None = Field(None, description="Folder that `nemostream export` wrote. Default: the packaged demo.")
    chunk_ms: int = Field(560, description="Chunk size of clients that do not choose: smaller is sooner, and dearer.")
    chunks: Annotated[list[int], NoDecode] = Field(
        [], description="Chunk sizes that clients may choose (comma-separated). Default: every one of the model."
    )
    device: str = Field("cpu", description="cpu, or cuda for a GPU.")
    precision: str | None = Field(None, description="Of the engines to use (`nemostream build`).")
    engines: Path | None = Field(None, description="Folder of engines. Default: ~/.cache/nemostream/engines.")
    threads: int | None = Field(
        None, ge=1, description="Threads of ONNX Runtime on a CPU. Default: every CPU that the process may use but one."
    )
    host: str = Field("127.0.0.1", description="Address to listen at. 0.0.0.0 is every network of this machine.")
    port: int = Field(8000, ge=0, le=65535, description="Of HTTP and WebSockets; 0 takes a free one.")
    grpc_port: int = Field(50051, ge=-1, le=65535, description="Of Riva's gRPC; 0 takes a free one, -1 has none.")
    endpoint_ms: int = Field(800, ge=80, le=60_000, description="Silence after which an utterance is final.")
    measure: CliImplicitFlag[bool] = Field(
        True,
        description="Measure at the start how many streams this machine can serve, and admit no more. "
        "Otherwise the engine is only warmed.",
    )
    degrade: CliImplicitFlag[bool] = Field(
        False, description="Under overload move streams to a larger chunk, and back when it is over."
    )
    drain_seconds: float = Field(60, ge=0, description="On SIGTERM streams have so long to finish.")
    api_keys: Annotated[list[SecretStr] | None, NoDecode] = Field(
        None, description="Keys that clients must send (comma-separated). Default: no key is required."
    )
    api_keys_file: Path | None = Field(
        None, description="File with such keys, one on each line; empty lines and lines that begin with # are ignored."
    )
    tls_cert: Path | None = Field(None, description="Certificate chain, PEM. With it HTTP and gRPC are encrypted.")
    tls_key: Path | None = Field(None, description="Its private key, PEM.")
    origins: Annotated[list[str], NoDecode] = Field(
        [], description="Web origins other than our own that may call (comma-separated): https://app.example."
    )
    hosts: Annotated[list[str], NoDecode] = Field(
        [], description="Names in the Host header, besides localhost, that clients may use (comma-separated); *: any."
    )
    trusted_proxies: Annotated[list[str], NoDecode] = Field(
        ["127.0.0.1", "::1"],
        description="Addresses or networks of reverse proxies whose X-Forwarded-For and X-Forwarded-Host headers are "
        "used (comma-separated); empty: none.",
    )
    log_format: Literal["auto", "text", "json"] = Field(
        "auto", description="Log lines on standard error; auto: text on a terminal, JSON otherwise."
    )
    log_transcripts: CliImplicitFlag[bool] = Field(False, description="Write the transcripts into the log.")
    config: Path | None = Field(None, description="TOML file with these options.")

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, values: Any) -> Any:
        for name in ("api_keys", "origins", "hosts", "chunks", "trusted_proxies"):
            if isinstance(values, dict) and isinstance(values.get(name), str):
                parts = [part.strip() for part in values[name].split(",")]
                # An empty key is an error, not a key less: see `_keys`.
                values[name] = parts if name == "api_keys" else [part for part in parts if part]
        return values

    @field_validator("api_keys")
    @classmethod
    def _keys(cls, keys: list[SecretStr] | None) -> list[SecretStr] | None:
        """An empty variable or file entry must not open the server to everyone."""
        if keys is None:
            return None
        found = [SecretStr(key.get_secret_value().strip()) for key in keys]
        if not found or not all(key.get_secret_value() for key in found):
            raise ValueError("a key is empty; leave the option out for a server without keys")
        return found

    @field_validator("hosts")
    @classmethod
    def _host_names(cls, hosts: list[str]) -> list[str]:
        return [host.strip().rstrip(".").lower() for host in hosts]

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies(cls, proxies: list[str]) -> list[str]:
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
            found = _keys_in(self.api_keys_file)
            self.api_keys = [*(self.api_keys or ()), *(key for key in found if key not in (self.api_keys or ()))]
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: give both")
        for file in (self.tls_cert, self.tls_key):
            if file is not None and not file.is_file():
                raise ValueError(f"there is no file {file}")
        return self

    @property
    def public(self) -> bool:
        """Whether other machines can reach it."""
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
    """Settings from the command line, the environment and a file.

    Raises `OptionError` naming what is wrong; shows its help and leaves by `SystemExit` when asked for it.
    """
    words = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    words.add_argument("--config", default=os.environ.get("NEMOSTREAM_CONFIG"))
    file = words.parse_known_args(arguments)[0].config
    if file and not Path(file).is_file():
        raise OptionError(f"there is no configuration file {file}.")

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
        raise OptionError("; ".join(_sentence(dict(problem)) for problem in error.errors()) + ".") from error
    except (SettingsError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"the options cannot be read: {str(error).removeprefix('error parsing CLI: ')}.") from error


def _keys_in(file: Path) -> list[SecretStr]:
    """The keys in a file. Raises `ValueError` if there is none: an empty file must not open the server to everyone."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise ValueError(f"api_keys_file: cannot read {file} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"api_keys_file: {file} is not UTF-8 text") from None
    keys = [SecretStr(line) for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"api_keys_file: {file} has no key; leave the option out for a server without keys")
    return keys


def _sentence(problem: dict[str, Any]) -> str:
    name = ".".join(map(str, problem["loc"]))
    what = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {what}" if name else what
