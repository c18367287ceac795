"""`deploy/nemostream.service` with systemd's own checks, and the server under its restrictions without systemd."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import signal
import socket as sockets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import riva.client
from websockets.sync.client import connect

from nemostream.errors import BundleError, OptionError
from nemostream.serving.settings import Settings

UNIT = Path(__file__).parents[2] / "deploy" / "nemostream.service"
MAX_EXPOSURE = 20  # tenths; 1.4 of 10 with systemd 252
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (systemd)")


def directives(name: str) -> list[str]:
    """Return the values of a directive, in order."""
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


def directive(name: str) -> str:
    (value,) = directives(name)
    return value


def systemd_analyze(*arguments: object) -> str:
    done = subprocess.run(["systemd-analyze", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_systemd
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    program = directive("ExecStart").split()[0]
    unit.write_text(UNIT.read_text().replace(program, str(Path(sys.executable))))
    assert systemd_analyze("verify", unit) == ""
    unit.write_text(unit.read_text().replace("ProtectSystem=strict", "ProtectSystem=very"))
    with pytest.raises(AssertionError):  # warnings are detected
        assert systemd_analyze("verify", unit) == ""


@needs_systemd
def test_the_exposure_is_low() -> None:
    systemd_analyze("security", "--offline=true", f"--threshold={MAX_EXPOSURE}", UNIT)


def test_the_unit_matches_the_server() -> None:
    options = dict(pair.split("=", 1) for pair in directives("Environment"))
    assert {name.removeprefix("NEMOSTREAM_").lower() for name in options} <= Settings.model_fields.keys()
    variables = set(re.findall(r"NEMOSTREAM_(\w+)", UNIT.read_text()))
    assert {name.lower() for name in variables} <= Settings.model_fields.keys()
    drain = float(options["NEMOSTREAM_DRAIN_SECONDS"])
    assert drain + 20 <= float(directive("TimeoutStopSec"))  # 10 s each for the end of transports and engine
    credential, _, source = directive("LoadCredential").partition(":")
    assert options["NEMOSTREAM_API_KEYS_FILE"] == f"%d/{credential}" and f"> {source})" in UNIT.read_text()
    assert options["NEMOSTREAM_STATE_STORE"].startswith(f"%S/{directive('StateDirectory')}/")
    assert directive("RestartPreventExitStatus") == f"{OptionError.exit_code} {BundleError.exit_code}"
    assert int(directive("LimitNOFILE")) > 2 * Settings().max_connections
    assert directive("KillMode") == "mixed"  # SIGTERM to the first process only


# -- the restrictions, without systemd ---------------------------------------------------------------------------------

PR_GET_MDWE = 66
# Installs a filter of system calls as systemd does, except that a call that is not allowed ends the process, forbids
# memory that becomes executable, and starts Python.
RESTRICTED = """
import ctypes, errno, json, os, socket, sys
import pyseccomp as seccomp

options = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_NO_NEW_PRIVS, PR_SET_MDWE = 38, 65
assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 and libc.prctl(PR_SET_MDWE, 1, 0, 0, 0) == 0
rules = seccomp.SyscallFilter(seccomp.KILL_PROCESS)
for name in options["calls"]:
    if name == "socket":
        for family in options["families"]:
            rules.add_rule(seccomp.ALLOW, name, seccomp.Arg(0, seccomp.EQ, getattr(socket, family)))
        allowed = {int(getattr(socket, family)) for family in options["families"]}
        for family in set(range(46)) - allowed:
            rules.add_rule(seccomp.ERRNO(errno.EAFNOSUPPORT), name, seccomp.Arg(0, seccomp.EQ, family))
        continue
    try:
        rules.add_rule(seccomp.ALLOW, name)
    except (ValueError, OSError):  # a call of another architecture
        pass
rules.load()
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def system_calls(group: str) -> set[str]:
    """Return the names of a group of system calls, with those of the groups in it."""
    lines = systemd_analyze("syscall-filter", group).splitlines()[1:]
    names = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return {call for name in names for call in (system_calls(name) if name.startswith("@") else {name})}


def allowed_calls() -> set[str]:
    calls: set[str] = set()
    for groups in directives("SystemCallFilter"):
        for group in groups.removeprefix("~").split():
            calls = calls - system_calls(group) if groups.startswith("~") else calls | system_calls(group)
    return calls


@pytest.fixture
def restricted(tmp_path: Path) -> list[str]:
    """The beginning of a command line that starts Python under the restrictions of the unit."""
    pytest.importorskip("pyseccomp", reason="needs pyseccomp")
    libc = ctypes.CDLL(None)
    if libc.prctl(PR_GET_MDWE, 0, 0, 0, 0) < 0:
        pytest.skip("needs Linux 6.3")
    calls = allowed_calls()
    assert "execve" in calls and "mount" not in calls and "chroot" not in calls
    families = directive("RestrictAddressFamilies").split()
    assert directive("MemoryDenyWriteExecute") == "yes"
    program = tmp_path / "restricted.py"
    program.write_text(RESTRICTED)
    return [sys.executable, str(program), json.dumps({"calls": sorted(calls), "families": families})]


@needs_systemd
def test_forbidden_calls_end_the_process(restricted: list[str]) -> None:
    def code(program: str) -> int:
        return subprocess.run([*restricted, "-c", program], capture_output=True).returncode

    assert code("import os; os.getcwd()") == 0
    assert code("import os; os.chroot('/')") == -signal.SIGSYS
    assert code("import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)") == 1
    assert code("import mmap; mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)") == 1


@needs_systemd
def test_the_server_runs_under_the_restrictions(restricted: list[str], spoken: Any, tmp_path: Path) -> None:
    """Streams, recordings in a process of their own, gRPC, and the state store; then SIGTERM ends it."""
    with sockets.create_server(("127.0.0.1", 0)) as listening:
        port = int(listening.getsockname()[1])
    arguments = ["serve", "--no-measure", "--port", str(port), "--grpc-port", "0", "--transports", "1"]
    arguments += ["--state-store", str(tmp_path / "streams"), "--state-seconds", "0.2"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*restricted, "-m", "nemostream", *arguments], stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip(), (tmp_path / "log").read_text()
            url = f"127.0.0.1:{port}"
            with connect(f"ws://{url}/v1/stream?resumable=1") as socket:
                for start in range(0, len(spoken[0].pcm), 16000):
                    socket.send(spoken[0].pcm[start : start + 16000])
                    time.sleep(0.05)
                socket.send(json.dumps({"type": "finish"}))
                events = [json.loads(event) for event in socket]
            assert events[-1]["text"] == spoken[0].text and "stored" in {event["type"] for event in events}
            with spoken[0].path.open("rb") as file:
                form = {"files": {"file": file}, "data": {"model": "any"}, "timeout": 60}
                assert httpx.post(f"http://{url}/v1/audio/transcriptions", **form).json()["text"] == spoken[0].text
            address = f"127.0.0.1:{httpx.get(f'http://{url}/readyz').json()['grpc_port']}"
            recognizer = riva.client.ASRService(riva.client.Auth(uri=address))
            config = riva.client.RecognitionConfig(sample_rate_hertz=16000)
            (result,) = recognizer.offline_recognize(spoken[0].pcm, config).results
            assert result.alternatives[0].transcript.strip() == spoken[0].text
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait(30)
    lines = (tmp_path / "log").read_text()
    assert "process ended" not in lines and "Traceback" not in lines, lines
