"""The command that installs an extra. The package is on no index, so the command names the source of this copy."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit


def install_command(*extras: str) -> str:
    """Return the `pip install` command that adds `extras` to this installation, or without extras repeats it.

    pip records the source of a package (PEP 610). If it is unknown or no longer exists, the command is for a checkout.
    """
    brackets = f"[{','.join(extras)}]" if extras else ""
    try:
        recorded = json.loads(distribution("nemostream").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        recorded = {}
    url = str(recorded.get("url", ""))
    if "vcs_info" in recorded:
        vcs, commit = recorded["vcs_info"].get("vcs", "git"), recorded["vcs_info"].get("commit_id", "")
        return f"pip install 'nemostream{brackets} @ {vcs}+{url}{'@' * bool(commit)}{commit}'"
    path = Path(unquote(urlsplit(url).path))
    if url.startswith("file:") and path.exists() and "'" not in str(path):
        return f"pip install '{path}{brackets}'"
    return f"in a checkout of nemostream, pip install '.{brackets}'"
