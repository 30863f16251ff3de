"""`agentopt serve ...`: what each command takes. Nothing is imported before a command runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from agentopt.cli._arguments import AsJson, Config, Quiet, Store
from agentopt.cli._serve_group import ENGINE_OPTIONS, START, ServeCommand, ServeGroup

serve_app = typer.Typer(
    cls=ServeGroup,
    help="Serve a model to OpenAI clients: keys, adapters, tuned prompts.",
    rich_markup_mode=None,
)
keys_app = typer.Typer(help="API keys: who may ask, and how much.", no_args_is_help=True, rich_markup_mode=None)
adapters_app = typer.Typer(
    help="LoRA adapters of a running server: list, add, remove.", no_args_is_help=True, rich_markup_mode=None
)

_MODEL, _REACH, _LIMITS = "What is served", "Where, and for whom", "Limits"
_PROMPTS, _CAPTURE, _FILES = "Tuned prompts", "Learning from production", "Files"


@serve_app.command(START, cls=ServeCommand, hidden=True)
def serve(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="embedded, a folder, a .gguf file or a hub id", metavar="MODEL", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="what clients call it  [default: MODEL's name]", rich_help_panel=_MODEL)
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="auto, vllm, transformers, embedded or fake  [default: auto]", rich_help_panel=_MODEL),
    ] = None,
    upstream: Annotated[
        str | None,
        typer.Option(help="an engine that runs elsewhere: its URL, http://HOST:PORT", rich_help_panel=_MODEL),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="rf8-gg, ...: a byte per weight", rich_help_panel=_MODEL)
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=DIR", help="a LoRA adapter; repeatable", rich_help_panel=_MODEL),
    ] = None,
    resident: Annotated[
        int | None,
        typer.Option(metavar="N", help="adapters in the engine at a time  [default: 4]", rich_help_panel=_MODEL),
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option(metavar="N", help="largest rank of an adapter  [default: 16]", rich_help_panel=_MODEL),
    ] = None,
    host: Annotated[str | None, typer.Option(help="[default: 127.0.0.1]", rich_help_panel=_REACH)] = None,
    port: Annotated[
        int | None, typer.Option(metavar="N", help="0: any free one  [default: 8000]", rich_help_panel=_REACH)
    ] = None,
    admin_host: Annotated[str | None, typer.Option(help="[default: 127.0.0.1]", rich_help_panel=_REACH)] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(metavar="N", help="metrics, adapters, drain  [default: --port + 1]", rich_help_panel=_REACH),
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="keys that may ask: agentopt serve keys create", rich_help_panel=_REACH),
    ] = None,
    open_: Annotated[
        bool, typer.Option("--open", help="no keys, though other machines can reach it", rich_help_panel=_REACH)
    ] = False,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", metavar="ORIGIN", help="web pages that may ask; repeatable", rich_help_panel=_REACH),
    ] = None,
    max_body: Annotated[
        float | None, typer.Option(metavar="MB", help="largest request  [default: 8]", rich_help_panel=_LIMITS)
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="S", help="seconds a request may take  [default: 1800]", rich_help_panel=_LIMITS),
    ] = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(metavar="S", help="wait for requests when stopping  [default: 30]", rich_help_panel=_LIMITS),
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            "--candidate",
            metavar="NAME=FILE[@W]",
            help="a tuned prompt (best.json) as model NAME; a NAME given twice is an A/B test by weight W",
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    capsule: Annotated[
        bool, typer.Option("--capsule", help="make long system prompts shorter", rich_help_panel=_PROMPTS)
    ] = False,
    capsule_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="--capsule: longest system prompt  [default: 1024]", rich_help_panel=_PROMPTS),
    ] = None,
    capture: Annotated[
        bool,
        typer.Option("--capture", help="keep requests and replies as traces in the store", rich_help_panel=_CAPTURE),
    ] = False,
    capture_sample: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="of the exchanges that are kept  [default: 1]", rich_help_panel=_CAPTURE),
    ] = None,
    capture_days: Annotated[
        float | None,
        typer.Option(
            metavar="N", help="delete what was captured so many days ago  [default: keep]", rich_help_panel=_CAPTURE
        ),
    ] = None,
    redact: Annotated[
        list[str] | None,
        typer.Option(
            "--redact",
            metavar="FILE|REGEX",
            help="struck out before it is kept, besides mail, phone, card and key numbers",
            rich_help_panel=_CAPTURE,
        ),
    ] = None,
    store: Store = None,
    run_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="logs and state  [default: .agentopt/serve/PORT]", rich_help_panel=_FILES),
    ] = None,
    log_text: Annotated[
        bool, typer.Option("--log-text", help="prompts and replies in gateway.log too", rich_help_panel=_FILES)
    ] = False,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON line on stdout for all that happens")] = False,
    quiet: Quiet = False,
) -> None:
    """Serve MODEL: an OpenAI-compatible endpoint at http://127.0.0.1:8000/v1.

    Picks the engine (vLLM where it is installed, llama.cpp for GGUF files, else transformers), starts it, watches over
    it and starts it again. Ctrl-C lets running requests end; a second one stops at once.
    """
    from agentopt.cli._serve import serve_command

    values: dict[str, Any] = {
        "model": model,
        "name": name,
        "engine": engine,
        "upstream": upstream,
        "quantize": quantize,
        "adapters": adapter or None,
        "resident": resident,
        "max_rank": max_rank,
        "host": host,
        "port": port,
        "admin_host": admin_host,
        "admin_port": admin_port,
        "keys": keys,
        "open": True if open_ else None,
        "cors": cors or None,
        "max_body": max_body,
        "timeout": timeout,
        "drain_timeout": drain_timeout,
        "candidates": candidate or None,
        "capsule": True if capsule else None,
        "capsule_tokens": capsule_tokens,
        "capture": True if capture else None,
        "capture_sample": capture_sample,
        "capture_days": capture_days,
        "redact": redact or None,
        "store": store,
        "run_dir": run_dir,
        "log_text": True if log_text else None,
        "engine_options": context.meta.get(ENGINE_OPTIONS) or None,
    }
    raise typer.Exit(serve_command(values, config=config, as_json=as_json, quiet=quiet))


# --- a server that runs ----------------------------------------------------------------------------------------------

Port = Annotated[int | None, typer.Option(metavar="N", help="of the server, where several run here")]
RunDir = Annotated[str | None, typer.Option(metavar="DIR", help="of the server, where it was given one")]
Admin = Annotated[
    str | None,
    typer.Option(metavar="URL", help="admin address of a server elsewhere; AGENTOPT_ADMIN_TOKEN holds its token"),
]


@serve_app.command("status")
def serve_status(port: Port = None, run_dir: RunDir = None, admin: Admin = None, as_json: AsJson = False) -> None:
    """Show a running server: engine, requests, tokens, adapters."""
    from agentopt.cli._serve_remote import Where, status_command

    raise typer.Exit(status_command(Where(admin, port, run_dir), as_json=as_json))


@serve_app.command("variants")
def serve_variants(port: Port = None, run_dir: RunDir = None, admin: Admin = None, as_json: AsJson = False) -> None:
    """Compare the tuned prompts that are served under one name."""
    from agentopt.cli._serve_remote import Where, variants_command

    raise typer.Exit(variants_command(Where(admin, port, run_dir), as_json=as_json))


@serve_app.command("drain")
def serve_drain(
    timeout: Annotated[
        float, typer.Option(metavar="S", help="wait so long for requests  [default: 30]", show_default=False)
    ] = 30.0,
    port: Port = None,
    run_dir: RunDir = None,
    admin: Admin = None,
    as_json: AsJson = False,
) -> None:
    """Stop a running server once its requests have ended."""
    from agentopt.cli._serve_remote import Where, drain_command

    raise typer.Exit(drain_command(Where(admin, port, run_dir), seconds=timeout, as_json=as_json))


@adapters_app.command("list")
def adapters_list(port: Port = None, run_dir: RunDir = None, admin: Admin = None, as_json: AsJson = False) -> None:
    """List the adapters of a running server."""
    from agentopt.cli._serve_remote import Where, adapters_command

    raise typer.Exit(adapters_command(Where(admin, port, run_dir), as_json=as_json))


@adapters_app.command("add")
def adapters_add(
    item: Annotated[str, typer.Argument(metavar="NAME=DIR", help="what clients call it, and its folder")],
    port: Port = None,
    run_dir: RunDir = None,
    admin: Admin = None,
    as_json: AsJson = False,
) -> None:
    """Check an adapter and serve it as model NAME, without a restart."""
    from agentopt.cli._serve_remote import Where, add_adapter_command

    raise typer.Exit(add_adapter_command(Where(admin, port, run_dir), item, as_json=as_json))


@adapters_app.command("remove")
def adapters_remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="as `adapters list` shows it")],
    port: Port = None,
    run_dir: RunDir = None,
    admin: Admin = None,
    as_json: AsJson = False,
) -> None:
    """Serve an adapter no longer; its files stay."""
    from agentopt.cli._serve_remote import Where, remove_adapter_command

    raise typer.Exit(remove_adapter_command(Where(admin, port, run_dir), name, as_json=as_json))


# --- keys ------------------------------------------------------------------------------------------------------------

Keys = Annotated[str | None, typer.Option("--keys", metavar="FILE", help="the keys' file  [default: $AGENTOPT_KEYS]")]


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="who it is for; shown in lists")],
    keys: Keys = None,
    rpm: Annotated[int | None, typer.Option(metavar="N", help="requests a minute")] = None,
    tpm: Annotated[int | None, typer.Option(metavar="N", help="tokens a minute")] = None,
    tokens: Annotated[int | None, typer.Option(metavar="N", help="tokens in all")] = None,
    concurrency: Annotated[int | None, typer.Option(metavar="N", help="requests at a time")] = None,
    models: Annotated[
        str | None, typer.Option(metavar="GLOB,...", help="models it may ask, e.g. 'support-*,base'  [default: all]")
    ] = None,
    expires: Annotated[float | None, typer.Option(metavar="DAYS", help="[default: never]")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and show it, once. The file is made where there is none."""
    from agentopt.cli._serve_keys import create_command

    code = create_command(
        name,
        keys,
        rpm=rpm,
        tpm=tpm,
        tokens=tokens,
        concurrency=concurrency,
        models=models,
        expires=expires,
        as_json=as_json,
    )
    raise typer.Exit(code)


@keys_app.command("list")
def keys_list(
    keys: Keys = None,
    everything: Annotated[bool, typer.Option("--all", help="revoked ones too")] = False,
    as_json: AsJson = False,
) -> None:
    """List the keys, their limits and what they used. Never shows a key itself."""
    from agentopt.cli._serve_keys import list_command

    raise typer.Exit(list_command(keys, everything=everything, as_json=as_json))


@keys_app.command("revoke")
def keys_revoke(
    key: Annotated[str, typer.Argument(metavar="ID|NAME", help="as `keys list` shows them")],
    keys: Keys = None,
    as_json: AsJson = False,
) -> None:
    """Make a key invalid, within a second. Replies that are being streamed end too."""
    from agentopt.cli._serve_keys import revoke_command

    raise typer.Exit(revoke_command(key, keys, as_json=as_json))


serve_app.add_typer(keys_app, name="keys")
serve_app.add_typer(adapters_app, name="adapters")
