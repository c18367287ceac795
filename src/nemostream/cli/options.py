"""Help panels and option types that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

INPUT, RECOGNITION, OUTPUT, ENGINE, SERVER = "Input", "Recognition", "Output", "Model and engine", "Server"

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        envvar="NEMOSTREAM_API_KEY",
        metavar="KEY",
        help="API key of the server. In the environment variable, other users of the machine cannot see it.",
        rich_help_panel=SERVER,
    ),
]
EnginesOption = Annotated[
    Path | None,
    typer.Option(help="Folder of engines. Default: ~/.cache/nemostream/engines.", rich_help_panel=ENGINE),
]
