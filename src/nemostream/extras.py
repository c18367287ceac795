"""How to install an extra. The package is on no index, so the command names where this copy was installed from."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit


def install_command(*extras: str) -> str:
    """Return the `pip install` command that adds `extras` to this installation; without any, the one that repeats it.

    pip records where a package came from (PEP 610). Where that is unknown or gone, the command is for a checkout.
    """
    wanted = f"[{','.join(extras)}]" if extras else ""
    try:
        recorded = json.loads(distribution("nemostream").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        recorded = {}
    url = str(recorded.get("url", ""))
    if "vcs_info" in recorded:
        vcs, commit = recorded["vcs_info"].get("vcs", "git"), recorded["vcs_info"].get("commit_id", "")
        return f"pip install 'nemostream{wanted} @ {vcs}+{url}{'@' * bool(commit)}{commit}'"
    path = Path(unquote(urlsplit(url).path))
    if url.startswith("file:") and path.exists() and "'" not in str(path):
        return f"pip install '{path}{wanted}'"
    return f"in a checkout of nemostream, pip install '.{wanted}'"
