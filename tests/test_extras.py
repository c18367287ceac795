"""The command that installs an extra names the source of this copy."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemostream.extras import install_command

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("recorded", "command"),
    [
        ({"url": "file://FOLDER", "dir_info": {}}, "pip install 'FOLDER[serve,vad]'"),
        ({"url": "file://FOLDER/a%20b.whl", "archive_info": {}}, "pip install 'FOLDER/a b.whl[serve,vad]'"),
        (
            {"url": "https://host/x.git", "vcs_info": {"vcs": "git", "commit_id": "ab12"}},
            "pip install 'nemostream[serve,vad] @ git+https://host/x.git@ab12'",
        ),
        (
            {"url": "https://host/x", "vcs_info": {"vcs": "hg"}},
            "pip install 'nemostream[serve,vad] @ hg+https://host/x'",
        ),
        ({"url": "https://host/x", "vcs_info": {}}, "pip install 'nemostream[serve,vad] @ git+https://host/x'"),
        # A quote would end the argument of the shell; an archive on a server is not named by pip's record of it.
        ({"url": "file://FOLDER/it's", "dir_info": {}}, "in a checkout of nemostream, pip install '.[serve,vad]'"),
        ({"url": "https://hostFOLDER", "archive_info": {}}, "in a checkout of nemostream, pip install '.[serve,vad]'"),
        ({"url": "file:///gone/away", "dir_info": {}}, "in a checkout of nemostream, pip install '.[serve,vad]'"),
        (None, "in a checkout of nemostream, pip install '.[serve,vad]'"),
    ],
)
def test_the_source_of_the_installation(
    recorded: Any, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a b.whl", "it's"):
        (tmp_path / name).write_bytes(b"")
    text = None if recorded is None else json.dumps(recorded).replace("FOLDER", str(tmp_path))
    monkeypatch.setattr("nemostream.extras.distribution", lambda name: SimpleNamespace(read_text=lambda file: text))
    assert install_command("serve", "vad") == command.replace("FOLDER", str(tmp_path))


def test_without_a_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("nemostream.extras.distribution", missing)
    assert install_command("mic") == "in a checkout of nemostream, pip install '.[mic]'"
    assert install_command() == "in a checkout of nemostream, pip install '.'"


def test_a_damaged_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemostream.extras.distribution", lambda name: SimpleNamespace(read_text=lambda file: "{"))
    assert install_command("mic").endswith("pip install '.[mic]'")


def test_pip_accepts_the_command_of_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with `--dry-run`; without an extra nothing is downloaded."""
    text = json.dumps({"url": ROOT.as_uri(), "dir_info": {}})
    monkeypatch.setattr("nemostream.extras.distribution", lambda name: SimpleNamespace(read_text=lambda file: text))
    program, *arguments = shlex.split(install_command())
    assert program == "pip"
    command = [sys.executable, "-m", "pip", *arguments, "--dry-run", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "Would install nemostream-" in done.stdout, done.stderr


def test_no_text_suggests_installing_from_an_index() -> None:
    """The package is on no index, so `pip install nemostream` fails."""
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]
    folders = ("src", "runtime", "engine", "export", "serving", "benchmarks")
    code = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    from_index = re.compile(r"pip install (?:-\S+ )*'?nemostream(?!\[.*\] @|\{)")
    found = {str(path.relative_to(ROOT)): from_index.findall(path.read_text("utf-8")) for path in [*pages, *code]}
    found.pop("src/nemostream/extras.py")
    assert {name: lines for name, lines in found.items() if lines} == {}
