"""`nemostream serve --help` without the `serve` extra: the options declared in `serving/settings.py`.

That module needs pydantic, so its source is parsed instead of imported.
"""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

from nemostream.extras import install_command


def serve_help() -> str:
    """Return the server's options with their defaults, and the command that installs the server."""
    lines = ["usage: nemostream serve [OPTIONS]", ""]
    for name, default, description in _options():
        lines.append(f"  --{name.replace('_', '-')} (default: {default})")
        lines.append(f"      {description}")
    lines += ["", f"The server is not installed: {install_command('serve')}"]
    return "\n".join(lines)


def _options() -> list[tuple[str, str, str]]:
    """Return the name, default and description of every `name: type = Field(default, description=...)`."""
    module = find_spec("nemostream.serving.settings")
    if module is None or module.origin is None:
        return []
    options = []
    for node in ast.walk(ast.parse(Path(module.origin).read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if not (isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "Field" and node.value.args):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.value.keywords}
        description = keywords.get("description")
        text = description.value if isinstance(description, ast.Constant) else ""
        options.append((node.target.id, ast.unparse(node.value.args[0]), str(text)))
    return options
