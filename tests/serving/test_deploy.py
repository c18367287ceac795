"""The files of `deploy/`: the steps of the Dockerfile without Docker, the KubeRay manifest against Ray's schema."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemostream.serving.settings import Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def instructions() -> list[tuple[str, str]]:
    """Return the name and arguments of each Dockerfile instruction, with continued lines joined."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def test_the_dockerfile_matches_the_settings() -> None:
    steps = instructions()
    assert [name for name, _ in steps].count("FROM") == 2
    environment = dict(pair.split("=", 1) for name, rest in steps if name == "ENV" for pair in rest.split())
    prefix = "NEMOSTREAM_"
    for name in environment.keys() - {"PATH"}:
        assert name.removeprefix(prefix).lower() in Settings.model_fields, name
    defaults = Settings()
    assert next(rest for name, rest in steps if name == "EXPOSE").split() == [
        str(defaults.port),
        str(defaults.grpc_port),
    ]
    assert json.loads(next(rest for name, rest in steps if name == "ENTRYPOINT")) == ["nemostream", "serve"]
    assert next(rest for name, rest in steps if name == "USER") not in ("root", "0")
    head = (DEPLOY / "Dockerfile").read_text()
    for name in set(re.findall(rf"{prefix}(\w+)", head)):
        assert name.lower() in Settings.model_fields, name
    extras = set(re.findall(r"EXTRAS=([\w,]+)", head))
    project = (ROOT / "pyproject.toml").read_text()
    assert extras and all(f"\n{extra} = [" in project for group in extras for extra in group.split(","))


def build_context() -> set[Path]:
    """Return the files and links of the build context, relative to the root: the exceptions of Dockerfile.dockerignore
    minus what it excludes again."""
    first, *rules = [
        line for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    assert first == "*"
    included = list(itertools.takewhile(lambda rule: rule.startswith("!"), rules))
    excluded = rules[len(included) :]
    assert excluded == ["benchmarks/results", "**/__pycache__"]
    roots = [path for rule in included for path in ROOT.glob(rule.removeprefix("!"))]
    paths = {path for root in roots for path in (root, *root.rglob("*")) if path.is_file() or path.is_symlink()}
    relative = {path.relative_to(ROOT) for path in paths}
    return {
        path for path in relative if "__pycache__" not in path.parts and path.parts[:2] != ("benchmarks", "results")
    }


def test_the_build_context_contains_the_package() -> None:
    context = build_context()
    for link in (path for path in (ROOT / "src" / "nemostream").iterdir() if path.is_symlink()):
        assert link.relative_to(ROOT) in context
        code = {path.relative_to(ROOT) for path in (ROOT / link.name).rglob("*.py")}
        assert code and code <= context
    needed = {"runtime/backends/gpu/kernels/greedy.cu", "serving/protocols/page.html", "src/nemostream/clip.flac"}
    assert {Path(name) for name in needed} <= context
    assert all(path.parts[0] not in ("tests", "docs", ".git") for path in context)


@pytest.mark.slow
def test_the_dockerfile_steps_make_a_server(tmp_path: Path) -> None:
    """Run the Dockerfile's commands in local folders on its build context, then the entry point."""
    context, image = tmp_path / "context", tmp_path / "image"
    for name in build_context():
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, context / name, follow_symlinks=False)
    assert not (context / "tests").exists()
    variables = dict(os.environ, EXTRAS="serve", PIP_DISABLE_PIP_VERSION_CHECK="1")
    steps = instructions()
    last = max(index for index, (name, _) in enumerate(steps) if name == "FROM")
    for name, rest in steps[:last]:
        if name == "COPY":
            assert rest == ". /src"
            shutil.copytree(context, image / "src", symlinks=True)
        elif name == "RUN":
            command = rest.replace("/opt/", f"{image}/opt/").replace('"/src', f'"{image}/src')
            command = command.replace("python -m venv", f"{sys.executable} -m venv")
            subprocess.run(["bash", "-c", command], check=True, env=variables, capture_output=True, cwd=tmp_path)
    for name, rest in steps[last:]:
        if name == "ENV":
            pairs = dict(pair.split("=", 1) for pair in shlex.split(rest.replace("$PATH", variables["PATH"])))
            variables |= {key: value.replace("/opt/", f"{image}/opt/") for key, value in pairs.items()}
    variables |= {"NEMOSTREAM_PORT": "0", "NEMOSTREAM_GRPC_PORT": "0", "NEMOSTREAM_MEASURE": "false"}
    entry = json.loads(next(rest for name, rest in steps if name == "ENTRYPOINT"))
    program = shutil.which(entry[0], path=variables["PATH"])
    assert program and program.startswith(str(image))
    with subprocess.Popen(
        [program, *entry[1:]], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables, cwd=tmp_path
    ) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().rpartition(":")[2])
            health = json.loads(next(rest for name, rest in steps if name == "HEALTHCHECK").partition("CMD ")[2])
            health = [word.replace(":8000", f":{port}") for word in health]
            subprocess.run(health, check=True, env=variables, cwd=tmp_path)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz") as answer:
                assert json.load(answer)["status"] == "ready"
        finally:
            server.terminate()  # the signal of `docker stop`
    assert server.returncode == 0


# -- compose -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_the_compose_file_matches_the_schema() -> None:
    """Compose itself is not run. The schema is that of the Compose specification."""
    pytest.importorskip("check_jsonschema", reason="needs check-jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(DEPLOY / "compose.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_starts_a_valid_server(compose: Any) -> None:
    server = compose["services"]["server"]
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    options = {name.removeprefix("NEMOSTREAM_").lower(): value for name, value in server["environment"].items()}
    assert options.keys() <= Settings.model_fields.keys()
    assert float(server["stop_grace_period"].removesuffix("s")) >= float(options["drain_seconds"]) + 20
    # The folder of the store is in a volume, at a path of the image that belongs to the server's user.
    mounts = [mount.rpartition(":")[0] if mount.endswith(":ro") else mount for mount in server["volumes"]]
    targets = {mount.rpartition(":")[2]: mount.rpartition(":")[0] for mount in mounts}
    store = Path(options["state_store"])
    assert targets[str(store.parent)] in compose["volumes"]
    assert f"install --directory --owner=1000 --group=1000 {store.parent}" in (DEPLOY / "Dockerfile").read_text()
    # Without a variable, the bundle is the demo model.
    (default,) = re.findall(r"^\$\{BUNDLE:-(.+)\}$", targets[options["bundle"]])
    assert (DEPLOY / default).samefile(ROOT / "src" / "nemostream" / "demo")
    variables = set(re.findall(r"NEMOSTREAM_(\w+)", (DEPLOY / "compose.yaml").read_text()))
    assert {name.lower() for name in variables} <= Settings.model_fields.keys()


def test_the_compose_file_exposes_nothing(compose: Any) -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert "healthcheck" in service or "HEALTHCHECK" in (ROOT / service["build"]["dockerfile"]).read_text()
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), "a version is fixed"
        assert set(service["secrets"]) <= compose["secrets"].keys()
        for mount in service["volumes"]:
            source = mount.partition(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists() and mount.endswith(":ro")
            elif not source.startswith("$"):
                assert source in compose["volumes"]
    for secret in compose["secrets"].values():
        file = (DEPLOY / secret["file"]).relative_to(ROOT)
        assert str(file) in ignored


def test_prometheus_and_grafana_are_connected(compose: Any) -> None:
    """The names of services, secrets and mounted files in the configurations are those of the compose file."""
    services = compose["services"]
    (scrape,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = scrape["static_configs"][0]["targets"]
    assert target == f"server:{Settings().port}" and "server" in services
    secret = Path(scrape["authorization"]["credentials_file"])
    assert secret.name in services["prometheus"]["secrets"] and str(secret.parent) == "/run/secrets"
    assert services["server"]["environment"]["NEMOSTREAM_API_KEYS_FILE"] == str(secret)
    (source,) = yaml.safe_load((DEPLOY / "grafana" / "datasource.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services
    dashboard = json.loads((DEPLOY / "grafana" / "nemostream.json").read_text())
    (variable,) = [one for one in dashboard["templating"]["list"] if one["type"] == "datasource"]
    assert variable["current"]["value"] == source["uid"] and variable["query"] == source["type"]
    (provider,) = yaml.safe_load((DEPLOY / "grafana" / "provider.yaml").read_text())["providers"]
    targets = [mount.split(":")[1] for mount in services["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/nemostream.json" in targets
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in targets


# -- KubeRay -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service() -> Any:
    return yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())


def test_ray_accepts_the_application(service: Any) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="needs the ray extra")
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    from nemostream.serving.integrations import ray_app

    assert module == ray_app.__name__ and name == "build"
    assert config.http_options.port == 8000 and config.http_options.host == "0.0.0.0"
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    # Build it like Ray does: the options are valid, and a replica fits into a worker.
    deployment = ray_app.build(application.args)._bound_deployment
    (worker,) = group["template"]["spec"]["containers"]
    assert deployment.ray_actor_options["num_gpus"] == int(worker["resources"]["limits"]["nvidia.com/gpu"]) == 1
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (group["minReplicas"], group["maxReplicas"])
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= application.args["drain_seconds"]
    assert service["spec"]["rayClusterDeletionDelaySeconds"] >= application.args["drain_seconds"]
    assert service["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"] is True


def test_the_manifest_is_a_rayservice(service: Any) -> None:
    """Check the fields that the KubeRay operator reads. The whole manifest was validated against the CRD (v1) once."""
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert set(service["spec"]) <= {
        "serviceUnhealthySecondThreshold",
        "deploymentUnhealthySecondThreshold",
        "rayClusterDeletionDelaySeconds",
        "upgradeStrategy",
        "serveConfigV2",
        "rayClusterConfig",
    }
    cluster = service["spec"]["rayClusterConfig"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", cluster["rayVersion"])
    head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0" and isinstance(group["rayStartParams"], dict)
    for pod in (head["template"]["spec"], group["template"]["spec"]):
        (container,) = pod["containers"]
        variables = {entry["name"]: entry for entry in container["env"]}
        callback = variables["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]["value"]
        module, _, name = callback.partition(":")
        assert callable(getattr(sys.modules.get(module) or __import__(module, fromlist=[name]), name))
        assert variables["NEMOSTREAM_API_KEYS"]["valueFrom"]["secretKeyRef"] == {
            "name": "nemostream",
            "key": "api-keys",
        }
        assert "api_keys" in Settings.model_fields
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


def test_all_replicas_keep_states_on_the_same_volume(service: Any) -> None:
    args = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]
    store = Path(args["state_store"])
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    mounts = {Path(mount["mountPath"]): mount for mount in group["containers"][0]["volumeMounts"]}
    # The server creates a folder in the volume, which other users can access.
    mount = mounts[store.parent]
    assert "readOnly" not in mount
    (volume,) = [volume for volume in group["volumes"] if volume["name"] == mount["name"]]
    assert set(volume) == {"name", "persistentVolumeClaim"} and "readOnly" not in volume["persistentVolumeClaim"]


def test_the_ray_version_satisfies_the_extra(service: Any) -> None:
    minimum = re.search(r"ray\[serve\]>=(\d+)\.(\d+)", (ROOT / "pyproject.toml").read_text())
    assert minimum
    major, minor, _ = service["spec"]["rayClusterConfig"]["rayVersion"].split(".")
    assert (int(major), int(minor)) >= tuple(map(int, minimum.groups()))


def test_clients_can_reach_only_the_server(service: Any) -> None:
    """Ray's own ports allow every client that reaches them to execute code."""
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for part in (head, group):
        assert "dashboard-host" not in part["rayStartParams"] and "ray-client-server-port" not in part["rayStartParams"]
        pod = part["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000
        for container in pod["containers"]:
            assert 10001 not in {port["containerPort"] for port in container["ports"]}
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    assert group["template"]["spec"]["automountServiceAccountToken"] is False
    policy = yaml.safe_load((DEPLOY / "networkpolicy.yaml").read_text())
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    labels = policy["spec"]["podSelector"]["matchLabels"]
    assert all(part["template"]["metadata"]["labels"] == labels for part in (head, group))
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    own, *others = policy["spec"]["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": labels}}]}  # any port, but only between these pods
    ports = [(rule["from"], [port["port"] for port in rule["ports"]]) for rule in others]
    (operator, dashboard), (clients, served) = ports
    assert dashboard == [8265] and served == [8000]
    assert operator[0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
    assert all(source["namespaceSelector"].get("matchLabels") for source in clients)


# -- versions ----------------------------------------------------------------------------------------------------------

# The first versions without known vulnerabilities that affect nemostream, from their advisories (docs/security.md).
MIN_VERSIONS = {
    "python-multipart": "0.0.31",
    "starlette": "1.3.1",
    "h11": "0.16",
    "protobuf": "6.33.5",
    "sentencepiece": "0.2.1",
    "onnx": "1.21",
    "torch": "2.10",
    "ray": "2.55",
    "aiohttp": "3.13.4",
}


def required(*extras: str) -> list[Any]:
    """Return the requirements of the package and of `extras` (default: all extras)."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in extras or optional for line in optional[name])]
    requirements = [Requirement(line) for line in lines]
    return [requirement for requirement in requirements if requirement.name != "nemostream"]


def pinned() -> dict[str, str]:
    from packaging.utils import canonicalize_name

    lines = [line for line in (DEPLOY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    versions = {canonicalize_name(name): version for name, version in pairs}
    assert len(versions) == len(lines)
    return versions


def test_requirements_exclude_vulnerable_versions() -> None:
    from packaging.version import Version

    named = set()
    for requirement in required():
        if requirement.name in MIN_VERSIONS:
            minimum = [spec.version for spec in requirement.specifier if spec.operator == ">="]
            assert minimum and Version(minimum[0]) >= Version(MIN_VERSIONS[requirement.name]), str(requirement)
            named.add(requirement.name)
    assert named == MIN_VERSIONS.keys()
    images = pinned()
    for name in MIN_VERSIONS.keys() & images.keys():
        assert Version(images[name]) >= Version(MIN_VERSIONS[name]), name


def test_the_image_pins_every_package_that_it_installs() -> None:
    """The pins cover all dependencies of the extras serve, state and ray, as declared by the installed packages."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    versions, seen = pinned(), set()
    pending = required("serve", "state", "ray")
    while pending:
        requirement = pending.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        assert name in versions, f"{requirement} is not in deploy/constraints.txt"
        assert requirement.specifier.contains(versions[name], prereleases=True), f"{requirement}: {versions[name]}"
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            inner = [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:
            continue  # the extra is not installed
        environments = [
            {"extra": extra, "python_version": "3.12", "python_full_version": "3.12.12"} for extra in extras or {""}
        ]
        pending += [one for one in inner if not one.marker or any(one.marker.evaluate(env) for env in environments)]
    assert len(seen) > 30
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert '--constraint "/src/deploy/constraints.txt"' in dockerfile
    assert re.search(r"^ARG PYTHON=3\.\d+\.\d+-slim-\w+$", dockerfile, re.MULTILINE), "the base image has a version"
    assert Path("deploy/constraints.txt") in build_context()


# -- docs/deploy.md ----------------------------------------------------------------------------------------------------


def table(after: str) -> list[list[float]]:
    """Return the numbers of the first table after a text of the page, without the header."""
    lines = (ROOT / "docs" / "deploy.md").read_text().split(after)[1].splitlines()
    rest = itertools.dropwhile(lambda line: not line.startswith("|"), lines)
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), rest))
    return [[float(re.sub(r"[,%\s]", "", cell)) for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_the_capacity_table_is_correct() -> None:
    for gpus, spare, streams, messages, cores, network, state in table("16-bit caches:"):
        exact = 0.7 * 256 * (gpus - spare)
        assert streams == int(exact) and messages == round(10 * exact)
        assert cores == pytest.approx(messages * 0.00082, abs=0.06)
        assert network == pytest.approx(exact * 272e3 / 1e9, abs=0.006)
        assert state == pytest.approx(256 * 7.3e6 / 1e9, abs=0.06)
    assert [row[0] for row in table("16-bit caches:")] == [1, 10, 100, 1000]
    for calls, busy, enough, share in table("counts as a stream."):
        assert busy == calls * 300 / 3600
        assert enough == round(busy + 3 * busy**0.5) and share == int(300 / busy**0.5 + 0.5)


def test_the_capacity_plan_quotes_the_results() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    results = ROOT / "benchmarks" / "results"
    serve = json.loads(gzip.decompress((results / "serve-demo-cpu-2-cores.json.gz").read_bytes()))
    rows = {row["case"]["streams"]: row for row in serve["rows"]}
    maximum = max(n for n, row in rows.items() if row["values"]["passed"])
    above = min(n for n in rows if n > maximum)
    p99 = {n: f"{rows[n]['figures']['final text']['p99']:.0f} ms" for n in (maximum, above)}
    assert rows[maximum]["case"]["packet_ms"] == 100
    assert f"{maximum} streams, p99 {p99[maximum]}; of {above} streams {p99[above]}" in page
    latency = json.loads((results / "latency-cpu-2-cores.json").read_text())
    case = {"chunk_ms": 560, "batch": 8, "precision": "int8", "backend": "cpu"}
    (step,) = [row for row in latency["rows"] if row["case"] == case]
    p50 = step["figures"]["step"]["p50"]
    assert f"t(8) = {p50:.0f} ms" in page and f"8 · 560 / {p50:.0f} = {int(8 * 560 / p50)}" in page
    assert f"{step['values']['bytes_per_stream'] / 1e6:.1f} MB" in page
