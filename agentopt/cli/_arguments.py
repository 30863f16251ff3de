"""Arguments and options that several commands share, written once so that they read the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

Run = Annotated[str, typer.Argument(metavar="RUN", help="its id, or a unique beginning of it")]
Config = Annotated[
    str | None, typer.Option("--config", "-c", help="agentopt.toml; found in the current folder by itself")
]
Store = Annotated[str | None, typer.Option("--store", help="the SQLite file  [default: .agentopt/agentopt.db]")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, nothing else")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]
