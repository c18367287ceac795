"""MkDocs hooks: pages that are generated at build time, and links that work on the site and in the repository.

* `index.md`, `changelog.md` and `contributing.md` are README.md, CHANGELOG.md and CONTRIBUTING.md.
* `cli/*.md` are generated from the commands' own options, one page per command.
* Links between files of the repository point to the page on the site, or to the file on GitHub if it has no page. The
  site shows the title of a page where the text of the link is its file name.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
# Files outside docs/ that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
HOME = "---\ntitle: Home\nhide: [navigation]\n---\n\n"  # front matter
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
# A link whose text is the name of a Markdown file: the site shows that page's title.
FILE_NAME = re.compile(r"\[(?:[\w/-]+\.md)\]\((?=([\w./-]+\.md))")

sys.path.insert(0, str(ROOT / "src"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and the plots of the benchmarks."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=HOME + text if page == "index.md" else text))
    for plot in sorted((ROOT / RESULTS).glob("*.svg")):
        files.append(File.generated(config, f"{RESULTS}/{plot.name}", abs_src_path=str(plot)))
    for name, text in command_pages().items():
        files.append(File.generated(config, f"cli/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links to files of the repository point to the site, or to GitHub."""
    source = page.file.src_uri
    folder = "" if source in PAGES.values() else posixpath.dirname(f"docs/{source}")

    def target(match: re.Match[str]) -> str:
        path, anchor = posixpath.normpath(posixpath.join(folder, match[1])), match[2] or ""
        if not (ROOT / path).exists():
            return match[0]
        if path in PAGES:
            found = PAGES[path]
        elif path.startswith("docs/"):
            found = path.removeprefix("docs/")
        elif path.startswith(f"{RESULTS}/") and path.endswith(".svg"):
            found = path
        else:
            return f"{config.extra['repository']}/blob/main/{path}{anchor}"
        return posixpath.relpath(found, posixpath.dirname(source) or ".") + anchor

    def title(match: re.Match[str]) -> str:
        path = ROOT / posixpath.normpath(posixpath.join(folder, match[1]))
        heading = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE) if path.is_file() else None
        return f"[{heading[1]}](" if heading else match[0]

    return LINK.sub(target, FILE_NAME.sub(title, markdown))


# -- pages of commands -------------------------------------------------------------------------------------------------


def command_pages() -> dict[str, str]:
    """Return the Markdown of every page under `cli/`, by name."""
    from typer.main import get_command

    from nemostream.cli import main

    root: Any = get_command(main.app)
    pages = {name: f"# nemostream {name}\n\n" + _command(name, command) for name, command in root.commands.items()}
    pages["serve"] += _server_options()
    pages["bench"] += _benchmarks(main._BENCHMARKS)
    panels: dict[str, list[str]] = {}
    for name, command in root.commands.items():
        summary = (command.help or "").split("\n\n")[0].replace("\n", " ")
        panels.setdefault(command.rich_help_panel or "Commands", []).append(f"| [`{name}`]({name}.md) | {summary} |")
    tables = [
        f"## {panel}\n\n| command | description |\n| --- | --- |\n" + "\n".join(rows) for panel, rows in panels.items()
    ]
    head = f"# Command line\n\n{root.help}\n\n```sh\nnemostream COMMAND --help\n```"
    pages["index"] = "\n\n".join([head, *tables, "## Exit codes\n\n" + _exit_codes(), _options(root.params)]) + "\n"
    return pages


def _command(name: str, command: Any) -> str:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    words = [(param.metavar or param.name.upper()) + ("..." if param.nargs == -1 else "") for param in arguments]
    words = [word if param.required else f"[{word}]" for word, param in zip(words, arguments, strict=True)]
    own = "[OPTIONS]" if name != "bench" else "[OPTIONS]..."
    usage = " ".join(["nemostream", name, *([*words, own] if name == "bench" else [own, *words])])
    parts = [command.help or "", f"```text\n{usage}\n```"]
    if arguments and name != "bench":
        rows = [f"| `{param.metavar or param.name.upper()}` | {_cell(param.help)} |" for param in arguments]
        parts.append("## Arguments\n\n| argument | description |\n| --- | --- |\n" + "\n".join(rows))
    return "\n\n".join([*parts, _options(command.params)]).rstrip() + "\n"


def _options(params: list[Any]) -> str:
    """Return one table per panel of options."""
    panels: dict[str, list[tuple[str, str, str]]] = {}
    for param in params:
        if param.param_type_name != "option" or param.hidden:
            continue
        flags = ", ".join(f"`{flag}`" for flag in [*param.opts, *param.secondary_opts])
        default = "" if param.default in (None, False, (), []) or callable(param.default) else f"`{param.default}`"
        panels.setdefault(param.rich_help_panel or "Options", []).append((flags, default, _cell(param.help)))
    return "\n\n".join(f"## {panel}\n\n{_table(rows)}" for panel, rows in panels.items())


def _table(rows: list[tuple[str, str, str]]) -> str:
    """Return a table of options, without a column of defaults if there are none."""
    if any(default for _, default, _ in rows):
        head, lines = "| option | default | description |\n| --- | --- | --- |", [" | ".join(row) for row in rows]
    else:
        head, lines = "| option | description |\n| --- | --- |", [f"{flags} | {text}" for flags, _, text in rows]
    return "\n".join([head, *(f"| {line} |" for line in lines)])


def _server_options() -> str:
    """Return the table of the server's options, each with its environment variable."""
    from nemostream.serving.settings import Settings

    rows = []
    for name, field in Settings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        flags = f"`{flag}`, `--no-{flag[2:]}`" if isinstance(field.default, bool) else f"`{flag}`"
        default = ",".join(map(str, field.default)) if isinstance(field.default, list) else field.default
        shown = f"`{default}`" if default not in (None, "") and not isinstance(default, bool) else ""
        shown = "yes" if default is True else "no" if default is False else shown
        rows.append((flags, shown, _cell(field.description)))
    return (
        f"\n## Options\n\n{_table(rows)}"
        "\n\nEvery option is also an environment variable (`NEMOSTREAM_MAX_STREAMS`) and a key of the TOML file that "
        "`--config` names (`max_streams`). Flags take precedence over the environment, the environment over the file.\n"
        "\nThe guide is [Serving](../serving.md).\n"
    )


def _benchmarks(names: tuple[str, ...]) -> str:
    environment = {**os.environ, "COLUMNS": "96", "NO_COLOR": "1", "PYTHONPATH": str(ROOT / "src")}
    parts = []
    for name in names:
        done = subprocess.run(
            [sys.executable, "-m", "nemostream", "bench", name, "--help"],
            capture_output=True,
            text=True,
            env=environment,
        )
        if done.returncode:
            raise RuntimeError(f"nemostream bench {name} --help failed: {done.stderr}")
        parts.append(f"\n## bench {name}\n\n```text\n{done.stdout.strip()}\n```\n")
    return "".join(parts)


def _exit_codes() -> str:
    from nemostream import errors

    rows = [(1, "`OSError`", "The operating system refused something: a full disk, no permission.")]
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.NemostreamError) and kind is not errors.NemostreamError:
            rows.append((kind.exit_code, f"`{kind.__name__}`", " ".join((kind.__doc__ or "").split())))
    rows += [
        (130, "", "Ctrl-C (SIGINT)"),
        (143, "", "SIGTERM"),
        (141, "", "The reader of standard output closed it."),
    ]
    lines = [f"| {code} | {name} | {_cell(text)} |" for code, name, text in sorted(rows)]
    return "| code | Python exception | meaning |\n| --- | --- | --- |\n" + "\n".join(lines)


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("*", "\\*")
