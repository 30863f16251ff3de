"""The command line: `agentopt ...`. Parse, call one function, print."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `agentopt` script."""
    from agentopt.cli._app import run

    run()


__all__ = ["main"]
