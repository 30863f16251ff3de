"""`python -m agentopt` is the `agentopt` command."""

from __future__ import annotations

from agentopt.cli import main

if __name__ == "__main__":
    main()
