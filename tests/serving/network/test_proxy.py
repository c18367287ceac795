"""A real nginx in front of the server, with deploy/nginx.conf; forwarded headers without a proxy."""

from __future__ import annotations

import asyncio
import datetime
import json
import shutil
import socket as sockets
import ssl
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
import riva.client
from riva.client.proto import riva_asr_pb2 as messages
from riva.client.proto import riva_asr_pb2_grpc as calls
from websockets.asyncio.client import connect as asyncio_connect
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from nemostream.serving.network.proxies import TrustedProxies

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAME = "asr.example.com"
needs_nginx = pytest.mark.skipif(NGINX is None, reason="needs nginx (Debian: nginx-light)")


@dataclass
class Proxy:
    """An nginx in front of `server`."""

    server: Any
    port: int
    grpc: int
    cert: Path
    prefix: str = ""

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.cert))

    @property
    def origin(self) -> str:
        return f"https://{NAME}:{self.port}"

    def client(self, address: str = "127.0.0.1") -> httpx.Client:
        """Return an HTTP client that connects from a local address and resolves the server's name to loopback."""
        return httpx.Client(
            transport=_Loopback(verify=self.trust, local_address=address), base_url=self.origin + self.prefix
        )

    def stream(self, address: str = "127.0.0.1", **options: Any) -> Any:
        """Return a WebSocket connection from a local address."""
        return asyncio_connect(
            f"wss://{NAME}:{self.port}{self.prefix}/v1/stream",
            host="127.0.0.1",
            port=self.port,
            ssl=self.trust,
            local_addr=(address, 0),
            proxy=None,
            **options,
        )


class _Loopback(httpx.HTTPTransport):
    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.extensions["sni_hostname"] = NAME
        request.url = request.url.copy_with(host="127.0.0.1")  # keeps the Host header
        return super().handle_request(request)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    folder, key = tmp_path_factory.mktemp("tls"), ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)]), datetime.datetime.now(datetime.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME), x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


def free_port() -> int:
    with sockets.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@contextmanager
def nginx(
    server: Any, certificate: tuple[Path, Path], folder: Path, prefix: str = "", others: Sequence[Any] = ()
) -> Iterator[Proxy]:
    """Run nginx in `folder` with the configuration of `deploy/` on free ports, in front of one server or several."""
    proxy = Proxy(server, free_port(), free_port(), certificate[0], prefix)
    config = (Path(__file__).parents[3] / "deploy" / "nginx.conf").read_text()
    servers = [server, *others]
    for before, after in (
        ("listen 443 ssl", f"listen 127.0.0.1:{proxy.port} ssl"),
        ("/etc/ssl/asr.pem", str(certificate[0])),
        ("listen 50443 ssl", f"listen 127.0.0.1:{proxy.grpc} ssl"),
        ("/etc/ssl/asr.key", str(certificate[1])),
        ("server 127.0.0.1:8000 max_fails=0;", _lines(f"127.0.0.1:{one.http}" for one in servers)),
        ("server 127.0.0.1:50051 max_fails=0;", _lines(f"127.0.0.1:{one.grpc}" for one in servers)),
        ("proxy_pass http://nemostream;", f"proxy_pass http://nemostream{'/' * bool(prefix)};"),
    ):
        assert before in config
        config = config.replace(before, after)
    if prefix:
        config = config.replace("location / {", f"location {prefix}/ {{", 1)
    (folder / "site.conf").write_text(config)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "\n".join(f"{kind}_temp_path {folder / kind};" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder / 'pid'}; error_log {folder / 'error.log'};\n"
        f"events {{}}\nhttp {{ access_log off;\n{temporary}\ninclude {folder / 'site.conf'}; }}\n"
    )
    log = folder / "error.log"
    process = subprocess.Popen([str(NGINX), "-p", str(folder), "-e", str(log), "-c", str(folder / "nginx.conf")])
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                sockets.create_connection(("127.0.0.1", proxy.port)).close()
                break
            except ConnectionRefusedError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        yield proxy
    finally:
        process.terminate()
        process.wait(20)


def _lines(addresses: Iterable[str]) -> str:
    return "\n".join(f"server {address} max_fails=0;" for address in addresses)


@pytest.fixture(scope="module", params=["", "/asr"], ids=["root", "prefix"])
def proxied(
    request: Any, certificate: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, module_server: Any
) -> Iterator[Proxy]:
    with nginx(module_server, certificate, tmp_path_factory.mktemp("nginx"), request.param) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def module_server(serve_here: Any) -> Iterator[Any]:
    from nemostream.serving.settings import Settings

    assert Settings().trusted_proxies == ["127.0.0.1", "::1"]
    with serve_here(hosts=[NAME], measure=False) as running:
        yield running


async def transcript(stream: Any, pcm: bytes) -> str:
    async with stream as socket:
        await socket.send(pcm)
        await socket.send(json.dumps({"type": "finish"}))
        *_, last = [json.loads(event) async for event in socket]
        return str(last["text"])


@needs_nginx
def test_http_behind_nginx(proxied: Proxy, spoken: Any) -> None:
    with proxied.client() as client:
        assert client.get("/healthz").json() == {"status": "alive"} and client.head("/readyz").status_code == 200
        assert "text/html" in client.get("/", headers={"Origin": proxied.origin}).headers["Content-Type"]
        api = openai.OpenAI(base_url=proxied.origin + proxied.prefix + "/v1", api_key="any", http_client=client)
        assert api.models.retrieve("demo").id == "demo"
        assert api.audio.transcriptions.create(model="any", file=spoken[0].path).text == spoken[0].text
        *_, last = api.audio.transcriptions.create(model="any", file=spoken[0].path, stream=True)
        assert last.type == "transcript.text.done" and last.text == spoken[0].text
        for origin, status in ((proxied.origin, 200), ("https://evil.example", 403), (f"https://{NAME}", 403)):
            assert client.get("/v1/models", headers={"Origin": origin}).status_code == status
        assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
        if proxied.prefix:
            answer = client.get(proxied.origin + proxied.prefix)
            assert answer.status_code == 301 and answer.headers["Location"].endswith(proxied.prefix + "/")


@needs_nginx
def test_websockets_behind_nginx(proxied: Proxy, spoken: Any) -> None:
    assert asyncio.run(transcript(proxied.stream(origin=proxied.origin), spoken[0].pcm)) == spoken[0].text
    with pytest.raises(InvalidStatus) as caught:
        asyncio.run(transcript(proxied.stream(origin="https://evil.example"), b""))
    assert caught.value.response.status_code == 403


@needs_nginx
def test_grpc_behind_nginx(proxied: Proxy, spoken: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    # nginx appends the client's address, itself a trusted proxy, to the forwarded address.
    auth = riva.client.Auth(
        uri=f"localhost:{proxied.grpc}",
        use_ssl=True,
        ssl_root_cert=str(proxied.cert),
        metadata_args=[["x-forwarded-for", "192.0.2.7"]],
    )
    config = riva.client.RecognitionConfig(sample_rate_hertz=16000)
    service = riva.client.ASRService(auth)
    results = service.offline_recognize(spoken[0].pcm, config).results
    assert results[0].alternatives[0].transcript.strip() == spoken[0].text
    streaming = riva.client.StreamingRecognitionConfig(config=config)
    parts = [spoken[0].pcm[start : start + 6400] for start in range(0, len(spoken[0].pcm), 6400)]
    transcripts = [
        result.alternatives[0].transcript
        for answer in service.streaming_response_generator(parts, streaming)
        for result in answer.results
        if result.is_final
    ]
    assert " ".join(text.strip() for text in transcripts) == spoken[0].text
    peers = {record.peer for record in caplog.records if record.getMessage() == "stream opened"}  # type: ignore[attr-defined]
    assert peers == {"192.0.2.7"}


@needs_nginx
def test_limits_per_client_behind_nginx(
    certificate: tuple[Path, Path], tmp_path: Path, serve_here: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Limits apply to the client's address, not to that of the proxy or a forged header."""
    caplog.set_level("INFO")
    with (
        serve_here(hosts=[NAME], measure=False, max_streams_per_client=1) as server,
        nginx(server, certificate, tmp_path) as proxy,
    ):

        async def clients() -> None:
            async with proxy.stream("127.0.0.2"), proxy.stream("127.0.0.3"):
                for forged in ({}, {"X-Forwarded-For": "192.0.2.9"}):
                    with pytest.raises(InvalidStatus) as caught:
                        await proxy.stream("127.0.0.2", additional_headers=forged)
                    assert caught.value.response.status_code == 429

        asyncio.run(clients())
        opened = [record.peer for record in caplog.records if record.getMessage() == "stream opened"]  # type: ignore[attr-defined]
        assert sorted(opened) == ["127.0.0.2", "127.0.0.3"]
    with (
        serve_here(hosts=[NAME], measure=False, max_connections_per_client=2) as server,
        nginx(server, certificate, tmp_path) as proxy,
    ):

        async def connections() -> None:
            async with proxy.stream("127.0.0.2"), proxy.stream("127.0.0.2"):
                with pytest.raises(InvalidStatus) as caught:
                    await proxy.stream("127.0.0.2")
                assert caught.value.response.status_code == 503
                async with proxy.stream("127.0.0.3"), proxy.stream("127.0.0.3"):
                    with proxy.client("127.0.0.4") as other, proxy.client("127.0.0.2") as full:
                        assert other.get("/healthz").status_code == 200
                        answer = full.get("/healthz")
                        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")

        asyncio.run(connections())


@needs_nginx
def test_a_full_server_is_skipped(certificate: tuple[Path, Path], tmp_path: Path, serve_here: Any, spoken: Any) -> None:
    """Streams go to the other server while one is full. If both are, the client receives the server's rejection."""
    options = {"hosts": [NAME], "measure": False}
    with (
        serve_here(max_streams=1, **options) as small,
        serve_here(max_streams=2, **options) as large,
        nginx(small, certificate, tmp_path, others=[large]) as proxy,
    ):

        async def clients() -> None:
            async with proxy.stream(), proxy.stream(), proxy.stream() as last:
                assert (small.service.streams, large.service.streams) == (1, 2)
                with pytest.raises(InvalidStatus) as caught:
                    await proxy.stream()
                assert caught.value.response.status_code == 429 and caught.value.response.headers["Retry-After"]
                await last.close()
                while large.service.streams == 2:
                    await asyncio.sleep(0.01)
                assert await transcript(proxy.stream(), spoken[0].pcm) == spoken[0].text

        asyncio.run(clients())


@needs_nginx
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: chromium)")
def test_the_page_behind_nginx(proxied: Proxy, spoken: Any) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--autoplay-policy=no-user-gesture-required",
                "--disable-background-networking",
                f"--host-resolver-rules=MAP {NAME} 127.0.0.1",
            ],
        )
        page = browser.new_context(ignore_https_errors=True).new_page()
        urls: list[str] = []
        page.on("request", lambda request: urls.append(request.url))
        page.on("websocket", lambda socket: urls.append(socket.url))
        page.goto(f"{proxied.origin}{proxied.prefix}/")
        page.wait_for_selector("#chunks input", state="attached")
        assert "recognises English numbers" in page.inner_text("#note")
        page.set_input_files("#file", spoken[0].path)
        page.wait_for_selector("#status:text-is('Done')", timeout=30_000)
        captions, words = page.inner_text("#captions").split(), spoken[0].text.split()
        assert sum(word in captions for word in words) >= len(words) - 2
        allowed = (
            f"{proxied.origin}{proxied.prefix}/",
            f"wss://{NAME}:{proxied.port}{proxied.prefix}/",
            "blob:",
            "data:",
        )
        assert all(url.startswith(allowed) for url in urls), urls
        assert any(url.startswith("wss:") for url in urls)
        browser.close()


# -- forwarded headers, without a proxy --------------------------------------------------------------------------------


def test_forwarded_headers_of_untrusted_peers_are_ignored(serve_here: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    forged = {"X-Forwarded-For": "192.0.2.7", "X-Forwarded-Host": NAME}
    for trusted, address, status in ([], "127.0.0.1", 403), (["127.0.0.0/8"], "192.0.2.7", 200):
        caplog.clear()
        with serve_here(measure=False, hosts=[NAME], api_keys=["k"], trusted_proxies=trusted) as running:
            authorized = {"Authorization": "Bearer k", "Origin": f"https://{NAME}"}
            assert running.get("/v1/models", **authorized, **forged)[0] == status
            assert running.get("/v1/models", **forged)[0] == 401
            with pytest.raises(InvalidStatus), connect(f"{running.socket}/v1/stream", additional_headers=forged):
                pass
            with grpc.insecure_channel(running.address) as channel, pytest.raises(grpc.RpcError):
                calls.RivaSpeechRecognitionStub(channel).GetRivaSpeechRecognitionConfig(
                    messages.RivaSpeechRecognitionConfigRequest(), metadata=[("x-forwarded-for", "192.0.2.7")]
                )
        denied = [record.peer for record in caplog.records if record.getMessage() == "request denied"]  # type: ignore[attr-defined]
        assert denied == [address] * (4 if status == 403 else 3)


def test_forwarded_host_is_checked_like_the_host(serve_here: Any) -> None:
    """A page that uses DNS rebinding to a loopback address can set X-Forwarded-Host but not Host."""
    with serve_here(measure=False, hosts=[NAME]) as running, ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=running.url))
        for host, forwarded, status in (
            ("localhost", NAME, 200),
            ("evil.example", NAME, 403),
            ("localhost", "evil.example", 403),
            ("localhost", "", 403),
            ("localhost", f"{NAME}, upstream", 200),
            ("localhost", "[", 403),
        ):
            answer = client.get("/v1/models", headers={"Host": host, "X-Forwarded-Host": forwarded})
            assert answer.status_code == status, (host, forwarded)
        assert client.get("/v1/models", headers={"Origin": "https://["}).status_code == 403


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("10.0.0.1", "192.0.2.1", "192.0.2.1"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("192.0.2.5", "192.0.2.1", "192.0.2.5"),
        ("10.0.0.1", "198.51.100.1, 192.0.2.1", "192.0.2.1"),
        ("10.0.0.1", "192.0.2.1,10.0.0.2, 10.9.9.9", "192.0.2.1"),
        ("10.0.0.1", "192.0.2.1:1234", "192.0.2.1"),
        ("10.0.0.1", "[2001:db8::1]:1234", "2001:db8::1"),
        ("10.0.0.1", "2001:DB8::1", "2001:db8::1"),
        ("10.0.0.1", "::ffff:192.0.2.1", "192.0.2.1"),
        ("::ffff:10.0.0.1", "192.0.2.1", "192.0.2.1"),
        ("10.0.0.1", "192.0.2.1, unknown", "10.0.0.1"),
        ("10.0.0.1", "192.0.2.1, unknown, 10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "10.0.0.2", "10.0.0.2"),
        ("", "192.0.2.1", ""),
        ("10.0.0.1", "x\r\nevil", "10.0.0.1"),
        ("::1", "192.0.2.1", "192.0.2.1"),
    ],
)
def test_client_is_the_last_untrusted_address(peer: str, forwarded: str, address: str) -> None:
    assert TrustedProxies(["10.0.0.0/8", "::1"]).client(peer, forwarded) == address
    assert TrustedProxies([]).client(peer, forwarded) == peer
