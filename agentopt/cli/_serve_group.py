"""`agentopt serve MODEL ...` beside `agentopt serve keys ...`: the first word decides which of the two it is.

A first word that is the name of a sub-command is that sub-command; anything else, an option included, belongs to
`agentopt serve` itself. A folder that is called like a sub-command is served as `./keys`. What follows `--` goes to the
engine as it stands.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

START = "MODEL"
"""Name of the command that serves: it is what stands in the usage line where a sub-command's name would."""
ENGINE_OPTIONS = "agentopt.serve.engine_options"
_SECTIONS = "rich_help_panel"


class ServeGroup(TyperGroup):
    """Takes whatever is no sub-command for the arguments of the command that serves."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the serving command in front where no other one is named."""
        named = args and args[0] in self.commands and not self.commands[args[0]].hidden
        return super().parse_args(ctx, args if named else [START, *args])


class ServeCommand(TyperCommand):
    """The command that serves: options in sections, and the group's other commands under them."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Set aside what follows `--`; the parser would take it for arguments."""
        cut = args.index("--") if "--" in args else len(args)
        if parent is not None:
            parent.meta[ENGINE_OPTIONS] = args[cut + 1 :]
        return super().make_context(info_name, args[:cut], parent=parent, **extra)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """MODEL stands there already, as the command's name."""
        return ["[OPTIONS] [-- ENGINE OPTIONS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Sections of options in the order in which they are declared, then the commands beside this one."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                place = getattr(param, _SECTIONS, None)
                usual = "Arguments" if param.param_type_name == "argument" else "Options"
                sections.setdefault(place or usual, []).append(record)
        # --help comes last, with the options that every command has.
        for name in sorted(sections, key=lambda one: one == "Options"):
            with formatter.section(name):
                formatter.write_dl(sections[name])
        if ctx.parent is not None:
            ctx.parent.command.format_commands(ctx.parent, formatter)
