"""The manifests of `deploy/kubernetes` against Kubernetes' schemas, and the container of the Deployment in a sandbox.

The sandbox has the user, the variables, the read-only root and the probes of the Deployment.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from websockets.sync.client import connect

from nemostream.errors import OptionError
from nemostream.serving.settings import Settings, read_settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.30", "1.37")  # of Kubernetes: the first with the sleep action of preStop, the newest with a schema
NAME = {"app.kubernetes.io/name": "nemostream"}
needs_bwrap = pytest.mark.skipif(
    shutil.which("bwrap") is None
    or subprocess.run(["bwrap", "--ro-bind", "/", "/", "true"], capture_output=True).returncode != 0,
    reason="needs bubblewrap, and the right to create namespaces",
)


def manifests() -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all((FOLDER / "server.yaml").read_text())}


def merged(base: Any, patch: Any) -> Any:
    """Return `base` with a strategic merge patch as kustomize applies it: lists of named objects are merged by name."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {key: merged(base[key], value) if key in base else value for key, value in patch.items()}
    named = isinstance(base, list) and isinstance(patch, list) and all("name" in one for one in base + patch)
    if named:
        patches = {one["name"]: one for one in patch}
        kept = [merged(one, patches.pop(one["name"])) if one["name"] in patches else one for one in base]
        return kept + list(patches.values())
    return patch


def gpu_deployment() -> Any:
    overlay = yaml.safe_load((FOLDER / "gpu" / "kustomization.yaml").read_text())
    (entry,) = overlay["patches"]
    patch = yaml.safe_load(entry["patch"])
    base = manifests()[patch["kind"]]
    assert base["metadata"]["name"] == patch["metadata"]["name"] and base["apiVersion"] == patch["apiVersion"]
    return merged(base, patch)


def variables(deployment: Any) -> dict[str, str]:
    """Return the variables of the container; those of secrets have a value of the test."""
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return {entry["name"]: entry.get("value", "secret") for entry in container["env"]}


def test_the_manifests_match_the_schemas() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    policy = yaml.safe_load((ROOT / "deploy" / "networkpolicy.yaml").read_text())
    found = [*manifests().values(), gpu_deployment(), policy]
    kinds = ["Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler", "Deployment", "NetworkPolicy"]
    assert [one["kind"] for one in found] == kinds
    for version in VERSIONS:
        for manifest in found:
            assert kubernetes_validate.validate(manifest, version, strict=True) == version
    # The schemas detect a field that does not exist.
    wrong = copy.deepcopy(found[0])
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_the_manifests_refer_to_each_other() -> None:
    found = manifests()
    deployment, service = found["Deployment"], found["Service"]
    pod = deployment["spec"]["template"]
    assert pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"] == NAME
    assert service["spec"]["selector"] == found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == NAME
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": Settings().port, "grpc": Settings().grpc_port}
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == ports
    scaler = found["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "nemostream"}
    assert "replicas" not in deployment["spec"] and scaler["minReplicas"] >= 2
    (metric,) = scaler["metrics"]
    (rule,) = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    base = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    overlay = yaml.safe_load((FOLDER / "gpu" / "kustomization.yaml").read_text())
    assert base["resources"] == ["server.yaml"] and (FOLDER / "gpu" / overlay["resources"][0]).samefile(FOLDER)
    # The network policy of Ray's pods does not apply to these.
    policy = yaml.safe_load((ROOT / "deploy" / "networkpolicy.yaml").read_text())
    assert not policy["spec"]["podSelector"]["matchLabels"].items() <= NAME.items()


def test_the_gpu_overlay_changes_the_container_only() -> None:
    base, gpu = manifests()["Deployment"], gpu_deployment()
    before, after = variables(base), variables(gpu)
    assert after == before | {
        "NEMOSTREAM_DEVICE": "cuda",
        "NEMOSTREAM_ENGINES": "/models/engines",
        "NEMOSTREAM_MAX_STREAMS": "256",
    }
    (container,) = gpu["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"]
    for name in ("readinessProbe", "securityContext", "volumeMounts", "lifecycle"):
        assert container[name] == base["spec"]["template"]["spec"]["containers"][0][name]


@pytest.mark.parametrize("overlay", [False, True], ids=["cpu", "gpu"])
def test_the_variables_are_options(overlay: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = gpu_deployment() if overlay else manifests()["Deployment"]
    for name, value in variables(deployment).items():
        assert name.removeprefix("NEMOSTREAM_").lower() in Settings.model_fields
        monkeypatch.setenv(name, value)
    settings = read_settings()
    assert settings.api_keys and settings.hosts == ["asr.example.com"] and settings.trusted_proxies == ["10.0.0.0/8"]
    assert settings.device == ("cuda" if overlay else "cpu")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    grace = pod["terminationGracePeriodSeconds"]
    # After the streams, transports and the engine have at most 10 s each for their end.
    assert grace >= container["lifecycle"]["preStop"]["sleep"]["seconds"] + settings.drain_seconds + 20
    startup = container["startupProbe"]
    assert deployment["spec"]["progressDeadlineSeconds"] > startup["periodSeconds"] * startup["failureThreshold"]
    # What is mounted: the model without the right to write, and room for all recordings.
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert str(settings.bundle).startswith("/models/") and mounts["/models"]["readOnly"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes.keys() == {mount["name"] for mount in mounts.values()}
    limit = volumes[mounts["/tmp"]["name"]]["emptyDir"]["sizeLimit"]
    assert int(limit.removesuffix("Gi")) << 30 > settings.max_upload_total_bytes


def test_variables_of_the_service_are_no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sets NEMOSTREAM_PORT for a Service of the name `nemostream`, unless service links are disabled."""
    service = manifests()["Service"]
    monkeypatch.setenv(f"{service['metadata']['name'].upper()}_PORT", "tcp://10.96.0.10:8000")
    with pytest.raises(OptionError, match="port"):
        read_settings()
    assert manifests()["Deployment"]["spec"]["template"]["spec"]["enableServiceLinks"] is False
    ray = yaml.safe_load((ROOT / "deploy" / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    for part in (ray["headGroupSpec"], *ray["workerGroupSpecs"]):
        assert part["template"]["spec"]["enableServiceLinks"] is False


# -- the container -----------------------------------------------------------------------------------------------------


@contextmanager
def container(deployment: Any, folder: Path, bundle: Path, **changes: str) -> Iterator[tuple[Any, str]]:
    """Run the server as the Deployment does: its user, no capabilities, and a read-only root except for volumes."""
    pod = deployment["spec"]["template"]["spec"]
    (spec,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and spec["securityContext"]["readOnlyRootFilesystem"]
    user = str(pod["securityContext"]["runAsUser"])
    empty = [volume["name"] for volume in pod["volumes"] if "emptyDir" in volume]
    writable = [mount["mountPath"] for mount in spec["volumeMounts"] if mount["name"] in empty]
    assert writable == ["/tmp"]
    sandbox = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--die-with-parent"]
    sandbox += [argument for path in writable for argument in ("--tmpfs", path)]
    for path in (ROOT, Path(sys.prefix), Path(sys.base_prefix)):  # where they are in a folder that is hidden
        sandbox += ["--ro-bind", str(path), str(path)]
    sandbox += ["--unshare-user", "--unshare-pid", "--uid", user, "--gid", user]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NEMOSTREAM_")}
    own = {"NEMOSTREAM_HOST": "0.0.0.0", "NEMOSTREAM_PORT": "0", "NEMOSTREAM_GRPC_PORT": "0"}  # Dockerfile, the test
    environment = inherited | variables(deployment) | own | {"NEMOSTREAM_BUNDLE": str(bundle)} | changes
    environment |= {"TMPDIR": "/tmp", "HOME": "/home/nemostream", "PYTHONPATH": str(ROOT / "src")}
    program = "import sys; from nemostream.__main__ import main; main()"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*sandbox, "--", sys.executable, "-c", program, "serve"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            cwd="/",
        )
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url, (folder / "log").read_text()
            yield process, f"127.0.0.1:{url.rpartition(':')[2]}"
        finally:
            process.kill()
            process.wait(30)


def probe(address: str, spec: Any) -> int:
    """Return the status of a probe as the kubelet sends it: the host is the address of the pod."""
    request = urllib.request.Request(f"http://{address}{spec['httpGet']['path']}", headers={"Host": "10.244.1.7:8000"})
    try:
        return int(urllib.request.urlopen(request, timeout=5).status)
    except urllib.error.HTTPError as error:
        return error.code


@needs_bwrap
def test_the_container_runs_with_a_read_only_root(demo_bundle: Any, spoken: Any, tmp_path: Path) -> None:
    deployment = manifests()["Deployment"]
    (spec,) = deployment["spec"]["template"]["spec"]["containers"]
    options = {"NEMOSTREAM_MEASURE": "false", "NEMOSTREAM_TRANSPORTS": "1"}
    with container(deployment, tmp_path, demo_bundle.path, **options) as (process, address):
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert probe(address, spec[name]) == 200
        key = {"Authorization": "Bearer secret"}
        # A recording of more than 1 MB is written to a temporary file.
        with httpx.Client(
            base_url=f"http://{address}", headers={**key, "Host": "nemostream:8000"}, timeout=60
        ) as client:
            header = (
                b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0\1\0\1\0\x80\x3e\0\0\0\x7d\0\0\2\0\x10\0data\xff\xff\xff\xff"
            )
            audio = header + spoken[0].pcm + bytes(2 << 20)
            answer = client.post("/v1/audio/transcriptions", files={"file": ("a.wav", audio)}, data={"model": "any"})
            assert answer.status_code == 200 and answer.json()["text"] == spoken[0].text
            assert (
                client.get("/metrics").status_code == 200 and httpx.get(f"http://{address}/metrics").status_code == 401
            )
        # A pod that ends is not ready, alive, and finishes its streams before the process ends.
        with connect(f"ws://{address}/v1/stream", additional_headers=key) as socket:
            socket.send(spoken[0].pcm[:32000])
            assert json.loads(socket.recv())["type"] == "ready"
            os.kill(first_child(process.pid), 15)
            deadline = time.monotonic() + 20
            while probe(address, spec["readinessProbe"]) != 503:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert probe(address, spec["livenessProbe"]) == 200
            socket.send(spoken[0].pcm[32000:])
            socket.send(json.dumps({"type": "finish"}))
            *_, last = [json.loads(event) for event in socket]
            assert last["text"] == spoken[0].text
        assert process.wait(30) == 0
    log = (tmp_path / "log").read_text()
    assert "Read-only" not in log and "Permission" not in log and "Traceback" not in log, log


def first_child(pid: int) -> int:
    """Return the process in the sandbox: bubblewrap's first process waits for it, and passes no signals on."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[0])
        if "bwrap" not in Path(f"/proc/{pid}/comm").read_text():
            return pid
    raise AssertionError("the sandbox has no process")
