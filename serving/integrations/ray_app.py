"""Scale-out on Ray Serve: a replica has one engine, a stream stays with its replica.

`serve run nemostream.serving.integrations.ray_app:build bundle=/models/bundle device=cuda` on a Ray cluster; for
Kubernetes see `deploy/rayservice.yaml`. Ray's proxy accepts connections, balances them by the number of streams per
replica, adds and removes replicas, drains a replica before it removes it, and replaces one that died. Riva's gRPC is
not available: Ray's gRPC proxy does not support bidirectional streams.

With a state store that the replicas share, resumable streams continue on other replicas, after the death of theirs or
when it is removed. Ray waits for the requests of a replica before it calls its destructor, a WebSocket is a request,
and no hook is called before. The replica therefore polls the attribute by which Ray marks a replica that is stopping.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray._private import worker as ray_worker
from ray.util import metrics as ray_metrics
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nemostream.errors import BackendError, OptionError
from nemostream.serving.logs import log_to_stderr
from nemostream.serving.protocols.http import create_app
from nemostream.serving.service import Service
from nemostream.serving.settings import MEMORY, Settings, read_settings

log = logging.getLogger("nemostream.serving")

_TARGET_LOAD = 0.7  # share of a replica's streams above which another replica is started
_RAY_OPTIONS = ("host", "port", "grpc_port", "tls_cert", "tls_key")  # set by Ray, not by the application
_METRICS_SECONDS = 5.0  # between two exports of metrics
_STOP_POLL_SECONDS = 0.5


class Replica:
    """One engine and the streams on it."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        log_to_stderr(settings.log_format == "text")
        self._service = Service(settings)
        await asyncio.to_thread(self._service.start)
        tasks = [self._service.monitor(), self._export_metrics()]
        if settings.shares_states:
            if (replica := _ray_replica()) is None:
                log.warning("streams are not handed over when the replica is stopped: this version of Ray is unknown.")
            else:
                tasks.append(self._hand_over_when_stopping(replica))
        self._tasks = [asyncio.create_task(task) for task in tasks]

    def __serve_build_asgi_app__(self) -> ASGIApp:  # called by Ray after the constructor
        return create_app(self._service)

    async def check_health(self) -> None:
        """Raise if the replica must be replaced. Called by Ray every few seconds."""
        if self._service.state != "ready" or any(task.done() for task in self._tasks):
            raise BackendError(f"the engine is {self._service.state}.")

    async def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self._service.close)

    async def _hand_over_when_stopping(self, replica: Any) -> None:
        """Hand over resumable streams from when Ray stops this replica until it ends.

        Streams are still accepted: proxies may still assign some to this replica. They are handed over later.
        """
        while True:
            if replica._shutting_down:
                await self._service.hand_over()
            await asyncio.sleep(_STOP_POLL_SECONDS)

    async def _export_metrics(self) -> None:
        """Export counters and gauges to Ray: behind its proxy `/metrics` is that of an arbitrary replica."""
        gauges: dict[str, ray_metrics.Gauge] = {}
        while True:
            for family in self._service.metrics.families():
                for sample in family.samples if family.type in ("counter", "gauge") else ():
                    if sample.name.endswith("_created"):
                        continue
                    if sample.name not in gauges:
                        gauges[sample.name] = ray_metrics.Gauge(sample.name, family.documentation, tuple(sample.labels))
                    gauges[sample.name].set(sample.value, sample.labels)
            await asyncio.sleep(_METRICS_SECONDS)


def build(args: Mapping[str, Any]) -> serve.Application:
    """Return the application. `args` are options of `nemostream serve` (by name, as in its file), and two more.

    `min_replicas` and `max_replicas` (1 and 8) limit autoscaling. A replica uses one GPU, or `threads` (1) CPUs.
    Addresses and TLS are configured in Ray (`http_options`, an ingress). Raises `OptionError` for invalid options.
    """
    options = dict(args)
    min_replicas, max_replicas = int(options.pop("min_replicas", 1)), int(options.pop("max_replicas", 8))
    if unsupported := [name for name in _RAY_OPTIONS if name in options]:
        raise OptionError(f"{unsupported[0]} is not supported with Ray Serve: set it in Ray's http_options.")
    settings = read_settings([_flag(name, value) for name, value in options.items()])
    if settings.transports:
        raise OptionError("transports is not supported with Ray Serve; its proxies are the transports, so omit it.")
    if max_replicas > 1 and settings.state_store == MEMORY:
        log.warning(
            "state_store is memory, which replicas do not share: streams cannot be resumed on another replica. Set it "
            "to a shared folder or to redis://HOST, or to none."
        )
    settings.host = "0.0.0.0"  # the address of Ray's proxy: clients may use literal addresses in the Host header
    if settings.device == "cpu" and settings.threads is None:
        settings.threads = 1  # replicas on one machine share its cores
    resources = {"num_gpus": 1} if settings.device != "cpu" else {"num_cpus": settings.threads}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="nemostream",
        ray_actor_options=resources,
        # The replica, which measured its throughput, admits streams; there is no queue in front of it.
        max_ongoing_requests=2 * settings.max_streams,
        autoscaling_config={
            "min_replicas": min_replicas,
            "max_replicas": max_replicas,
            "initial_replicas": min_replicas,
            "target_ongoing_requests": _TARGET_LOAD * settings.max_streams,
            # Streams last for minutes: use recent load, scale up soon, scale down late.
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


class CloseOnReplicaFailure:
    """Middleware of Ray's proxy that closes a WebSocket with 1012 and a reason when its replica died."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            return await self._app(scope, receive, send)
        is_open = False

        async def receive_tracked() -> Message:
            nonlocal is_open
            message = await receive()
            is_open = is_open and message["type"] != "websocket.disconnect"
            return message

        async def send_tracked(message: Message) -> None:
            nonlocal is_open
            await send(message)
            is_open = (is_open or message["type"] == "websocket.accept") and message["type"] != "websocket.close"

        try:
            await self._app(scope, receive_tracked, send_tracked)
        finally:
            if is_open:
                reason = "the engine of this stream is gone; connect again."
                await send({"type": "websocket.close", "code": 1012, "reason": reason})


def proxy_middlewares() -> list[Middleware]:
    """Return the middlewares of Ray's proxy.

    Ray loads them if `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` is
    `nemostream.serving.integrations.ray_app:proxy_middlewares` in the environment of every node.
    """
    return [Middleware(CloseOnReplicaFailure)]


def _ray_replica() -> Any | None:
    """Return Ray's object for the replica of this process; None if it has no attribute `_shutting_down`."""
    worker = ray_worker.global_worker
    replica = getattr(worker.actors.get(worker.actor_id), "_replica_impl", None)
    return replica if hasattr(replica, "_shutting_down") else None


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}"
