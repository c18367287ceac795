"""The command that installs an extra works where this copy came from."""

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
        ({"url": "file:///gone/away", "dir_info": {}}, "in a checkout of nemostream, pip install '.[serve,vad]'"),
        (None, "in a checkout of nemostream, pip install '.[serve,vad]'"),
    ],
)
def test_where_it_came_from(recorded: Any, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b.whl").write_bytes(b"")
    text = None if recorded is None else json.dumps(recorded).replace("FOLDER", str(tmp_path))
    monkeypatch.setattr("nemostream.extras.distribution", lambda name: SimpleNamespace(read_text=lambda file: text))
    assert install_command("serve", "vad") == command.replace("FOLDER", str(tmp_path))


def test_without_a_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("nemostream.extras.distribution", missing)
    assert install_command("mic").endswith("pip install '.[mic]'")


def test_pip_takes_the_command_of_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the installing, which `--dry-run` leaves out; nothing is downloaded without an extra."""
    text = json.dumps({"url": ROOT.as_uri(), "dir_info": {}})
    monkeypatch.setattr("nemostream.extras.distribution", lambda name: SimpleNamespace(read_text=lambda file: text))
    program, *arguments = shlex.split(install_command())
    assert program == "pip"
    command = [sys.executable, "-m", "pip", *arguments, "--dry-run", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "Would install nemostream-" in done.stdout, done.stderr


def test_no_page_and_no_hint_names_an_index_that_does_not_have_it() -> None:
    """`pip install nemostream` finds nothing: the package is on no index."""
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]
    folders = ("src", "runtime", "engine", "export", "benchmarks")
    code = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    wrong = re.compile(r"pip install (?:-\S+ )*'?nemostream(?!\[.*\] @|\{)")
    found = {str(path.relative_to(ROOT)): wrong.findall(path.read_text("utf-8")) for path in [*pages, *code]}
    found.pop("src/nemostream/extras.py")
    assert {name: lines for name, lines in found.items() if lines} == {}
