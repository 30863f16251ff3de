"""The commands `agentopt runs ...` and `agentopt trace ...`: what is in the store and in trace files."""

from __future__ import annotations

from typing import Annotated

import typer

from agentopt.cli._arguments import AsJson, Quiet, Run, Store

runs_app = typer.Typer(help="Look at recorded runs.", no_args_is_help=True, rich_markup_mode=None)
trace_app = typer.Typer(help="Look at recorded traces.", no_args_is_help=True, rich_markup_mode=None)


@runs_app.command("ls")
def runs_ls(store: Store = None, as_json: AsJson = False) -> None:
    """List the runs in the store, newest first."""
    from agentopt.cli._runs import list_runs

    list_runs(store, as_json=as_json)


@runs_app.command("show")
def runs_show(run: Run, store: Store = None, as_json: AsJson = False) -> None:
    """Show one run: claim, candidates, spend."""
    from agentopt.cli._runs import show_run

    show_run(run, store, as_json=as_json)


@runs_app.command("diff")
def runs_diff(
    run: Run,
    other: Annotated[
        str | None, typer.Argument(metavar="OTHER", help="another run; default: this run's baseline")
    ] = None,
    store: Store = None,
) -> None:
    """Show what a run changed, or how the best of two runs differ."""
    from agentopt.cli._runs import diff_runs

    diff_runs(run, other, store)


@runs_app.command("resume")
def runs_resume(run: Run, store: Store = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Continue an interrupted run as it was started."""
    from agentopt.cli._tune import resume_command

    raise typer.Exit(resume_command(run, store, as_json=as_json, quiet=quiet))


@runs_app.command("forget")
def runs_forget(
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="AGE", help="30d, 12h or 4w ago and before")
    ] = None,
    session: Annotated[str | None, typer.Option(metavar="NAME", help="those with this X-Agentopt-Session")] = None,
    key: Annotated[str | None, typer.Option(metavar="ID", help="those asked with this key")] = None,
    request: Annotated[
        list[str] | None, typer.Option("--request", metavar="ID", help="this X-Request-Id; repeatable")
    ] = None,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="those of one start of a server")] = None,
    vacuum: Annotated[
        bool, typer.Option("--vacuum", help="then rewrite the file: no byte of it is left in there")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be deleted")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Delete captured exchanges, and what was said of them.

    Of several options all must apply. Also while a server captures into the store. Tuning runs are not touched.
    """
    from agentopt.cli._runs_forget import forget_runs

    forget_runs(
        store,
        older_than=older_than,
        session=session,
        key=key,
        requests=tuple(request or ()),
        run=run,
        vacuum=vacuum,
        dry_run=dry_run,
        as_json=as_json,
    )


@trace_app.command("show")
def trace_show(
    trace: Annotated[str, typer.Argument(metavar="TRACE", help="a *.trace.jsonl file, or a trace id from the store")],
    store: Store = None,
    op: Annotated[int | None, typer.Option(help="show this op in full")] = None,
    limit: Annotated[int, typer.Option(help="ops printed at most")] = 200,
    as_json: AsJson = False,
) -> None:
    """Print a trace as a tree of calls. With inputs, outputs, errors, time and cost."""
    from agentopt.cli._trace import show_trace

    show_trace(trace, store, op=op, limit=limit, as_json=as_json)
