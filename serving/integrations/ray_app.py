"""Scale-out on Ray Serve: a replica is one engine, a stream stays with its replica.

`serve run nemostream.serving.integrations.ray_app:build bundle=/models/bundle device=cuda` on a Ray cluster; for Kubernetes see
`deploy/rayservice.yaml`. Ray's proxy takes connections in, balances them over the replicas by how many streams each
has, adds and removes replicas, lets one finish its streams before it goes, and replaces one that died.
Riva's gRPC is not served: Ray's gRPC proxy does not carry streams in both directions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.util import metrics as ray_metrics
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nemostream.errors import BackendError, OptionError
from nemostream.serving.protocols.http import create_app
from nemostream.serving.server import log_to_stderr
from nemostream.serving.service import Service
from nemostream.serving.settings import Settings, read_settings

_FILL = 0.7  # of a replica's streams; beyond it another replica is started
_RAYS = ("host", "port", "grpc_port", "tls_cert", "tls_key")
_SHARED_SECONDS = 5.0


class Replica:
    """One engine and the streams on it."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        log_to_stderr(settings.log_format == "text")
        self._service = Service(settings)
        await asyncio.to_thread(self._service.start)
        self._tasks = [asyncio.create_task(self._service.watch()), asyncio.create_task(self._share())]

    def __serve_build_asgi_app__(self) -> ASGIApp:  # what Ray calls for the application, after the constructor
        return create_app(self._service)

    async def check_health(self) -> None:
        """Ray asks every few seconds, and replaces a replica that raises."""
        if self._service.state != "ready" or any(task.done() for task in self._tasks):
            raise BackendError(f"the engine is {self._service.state}.")

    async def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self._service.close)

    async def _share(self) -> None:
        """Give Ray our counters and gauges: behind its proxy `/metrics` answers for any one of the replicas."""
        gauges: dict[str, ray_metrics.Gauge] = {}
        while True:
            for family in self._service.metrics.registry.collect():
                for sample in family.samples if family.type in ("counter", "gauge") else ():
                    if sample.name.endswith("_created"):
                        continue
                    if sample.name not in gauges:
                        gauges[sample.name] = ray_metrics.Gauge(sample.name, family.documentation, tuple(sample.labels))
                    gauges[sample.name].set(sample.value, sample.labels)
            await asyncio.sleep(_SHARED_SECONDS)


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application, of the options of `nemostream serve` (by name, as in its file), and two more.

    `min_replicas` and `max_replicas` (1 and 8) bound what autoscaling does; a replica has one GPU, or `threads` (1) of
    a CPU. Addresses and TLS are Ray's (`http_options`, an ingress). Raises `OptionError` for what cannot be used.
    """
    given = dict(args)
    least, most = int(given.pop("min_replicas", 1)), int(given.pop("max_replicas", 8))
    if foreign := [name for name in _RAYS if name in given]:
        raise OptionError(f"{foreign[0]} is not an option here: Ray's proxy listens, see Ray's http_options.")
    settings = read_settings([_flag(name, value) for name, value in given.items()])
    settings.host = "0.0.0.0"  # where Ray's proxy listens, which decides the addresses that clients may name
    if settings.device == "cpu" and settings.threads is None:
        settings.threads = 1  # or the replicas of a machine fight for its cores
    resources = {"num_gpus": 1} if settings.device != "cpu" else {"num_cpus": settings.threads}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="nemostream",
        ray_actor_options=resources,
        # Whether a stream is let in is the replica's to say, which measured itself: no queue before it.
        max_ongoing_requests=2 * settings.max_streams,
        autoscaling_config={
            "min_replicas": least,
            "max_replicas": most,
            "initial_replicas": least,
            "target_ongoing_requests": _FILL * settings.max_streams,
            # Streams last for minutes: look at now, add soon, take away late.
            "metrics_interval_s": 2,
            "look_back_period_s": 6,
            "upscale_delay_s": 5,
            "downscale_delay_s": 300,
        },
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_period_s=5,
        health_check_timeout_s=15,
    )
    return deployment.bind(settings)


class Goodbye:
    """Around Ray's proxy: a WebSocket whose replica died is closed with 1012 and a reason, not cut off."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            return await self._app(scope, receive, send)
        open_ = False

        async def received() -> Message:
            nonlocal open_
            message = await receive()
            open_ = open_ and message["type"] != "websocket.disconnect"
            return message

        async def sent(message: Message) -> None:
            nonlocal open_
            await send(message)
            open_ = (open_ or message["type"] == "websocket.accept") and message["type"] != "websocket.close"

        try:
            await self._app(scope, received, sent)
        finally:
            if open_:
                reason = "the engine of this stream is gone; connect again for another one."
                await send({"type": "websocket.close", "code": 1012, "reason": reason})


def proxy_middlewares() -> list[Middleware]:
    """For the nodes' environment, as `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`: module, colon, this name."""
    return [Middleware(Goodbye)]


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}"
