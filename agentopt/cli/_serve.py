"""`agentopt serve`: one server in the foreground, until Ctrl-C or SIGTERM.

The exit code is 0 after a stop that was asked for, 1 when the engine cannot go on, 2 for bad input.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentopt.cli._apart import Apart
from agentopt.cli._serve_live import LiveServer
from agentopt.cli._settings import DEFAULT_FILE, table_of
from agentopt.errors import UserError
from agentopt.serving._options import ServeOptions, relative_to

COMMANDS = ("keys", "adapters", "variants", "status", "drain")


def serve_command(values: Mapping[str, Any], *, config: str | None, as_json: bool, quiet: bool) -> int:
    """Serve until it is told to stop; returns the exit code."""
    from agentopt.serving._serve import serve_forever

    options = settings_of(values, config)
    _check_word(options.model)
    if as_json:
        with Apart(_print_json) as told:
            return serve_forever(options, told)
    with LiveServer(quiet=quiet) as live, Apart(live) as told:
        return serve_forever(options, told)


def settings_of(values: Mapping[str, Any], config: str | None) -> ServeOptions:
    """The options of a command above those of the table `[serve]`.

    Raises:
        UserError: see `ServeOptions.of`; or the file is missing or not TOML.
    """
    given = {name: value for name, value in values.items() if value is not None}
    table = table_of(config, "serve", paths=ServeOptions.PATHS)
    if table:
        table = relative_to(table, Path(config or DEFAULT_FILE).parent)
    return ServeOptions.of({**table, **given}, f"{config or DEFAULT_FILE} [serve]" if table else "command line")


def _check_word(model: str | None) -> None:
    """A sub-command that was misspelt, or that options stand in front of, is not looked for as a model."""
    if model is None or Path(model).exists() or "/" in model:
        return
    if model in COMMANDS:
        raise UserError(
            f"MODEL: found {model!r}; to use the command, write it first: agentopt serve {model} ...; "
            f"to serve a folder of that name, write ./{model}."
        )
    close = difflib.get_close_matches(model, COMMANDS, n=1, cutoff=0.75)
    if close:
        raise UserError(
            f"MODEL: found {model!r}, expected embedded, a folder, a .gguf file or a hub id; "
            f"or is the command agentopt serve {close[0]} meant?"
        )


def _print_json(event: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # whoever read it has gone; the server has not
        print(json.dumps(event.to_dict(), ensure_ascii=False, default=str), flush=True)
