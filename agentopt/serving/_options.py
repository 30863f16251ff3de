"""What `agentopt serve` can be told: names, types, defaults, and which of them fit together.

The same fields are the table `[serve]` of agentopt.toml. Nothing is opened here: whether a model, a port or a file of
keys is there shows when the server starts.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, cast
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from agentopt.errors import UserError
from agentopt.serving.engines._options import refuse_own

EngineName = Literal["auto", "vllm", "transformers", "embedded", "fake"]
KEYS_VARIABLE, UPSTREAM_VARIABLE = "AGENTOPT_KEYS", "AGENTOPT_UPSTREAM_TOKEN"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


class ServeOptions(BaseModel):
    """One server. Units: seconds, tokens, megabytes (2^20 bytes) where a field says nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    """`embedded`, a folder, a .gguf file or a hub id. With `upstream`, where it may be left out: that engine's name."""
    name: str | None = None
    """What clients call the base; by default the model's own name."""
    engine: EngineName = "auto"
    upstream: str | None = None
    """URL of an engine that is started by somebody else. Its token is in AGENTOPT_UPSTREAM_TOKEN."""
    quantize: str | None = None
    """Format to quantize the base to before it is served; the result is kept for the next start."""
    adapters: tuple[str, ...] = ()
    """`name=DIR` each; a table name = "DIR" in agentopt.toml."""
    resident: int = Field(default=4, ge=0, le=256)
    """Adapters that the engine holds at a time; 0 serves none and saves the memory."""
    max_rank: int = Field(default=16, ge=1, le=512)
    """Largest rank of an adapter."""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0: any free one."""
    admin_host: str = "127.0.0.1"
    admin_port: int | None = Field(default=None, ge=0, le=65535)
    """By default the one after `port`."""
    keys: str | None = None
    """SQLite file of the keys; by default AGENTOPT_KEYS, and without that anybody may ask."""
    open: bool = False
    """No keys although other machines can reach it."""
    cors: tuple[str, ...] = ()
    """Origins of web pages that may ask from a browser."""
    max_body: float = Field(default=8, gt=0, le=1024)
    """Largest request."""
    timeout: float = Field(default=1800, gt=0)
    """A whole request may take so long."""
    drain_timeout: float = Field(default=30, ge=0)
    """How long a stop waits for requests that run."""
    candidates: tuple[str, ...] = ()
    """`NAME=FILE[@WEIGHT]` each; the same NAME several times is an A/B test."""
    capsule: bool = False
    """Make long system prompts shorter."""
    capsule_tokens: int = Field(default=1024, ge=32)
    """Longest system prompt, with `capsule`."""
    capture: bool = False
    """Keep exchanges as traces in the store."""
    capture_sample: float = Field(default=1.0, gt=0, le=1)
    """Share of the exchanges that is kept."""
    capture_days: float | None = Field(default=None, gt=0, le=36500)
    """What was captured so many days ago is deleted; by default it is kept."""
    redact: tuple[str, ...] = ()
    """Files of patterns, or patterns, that are struck out besides those that always are."""
    store: str | None = None
    """The SQLite file; by default .agentopt/agentopt.db."""
    run_dir: str | None = None
    """Folder of logs and state; by default .agentopt/serve/PORT."""
    log_text: bool = False
    """Prompts and replies in the log too."""
    engine_options: tuple[str, ...] = ()
    """More arguments for the engine, as its own command takes them."""

    PATHS: ClassVar[tuple[str, ...]] = ("keys", "store", "run_dir")
    """Fields that are paths; adapters and candidates hold paths too."""

    @field_validator("adapters", "candidates", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """A table becomes `name=value`, several values of a name one each."""
        if not isinstance(value, Mapping):
            return value
        table = cast("Mapping[str, Any]", value)
        return tuple(
            f"{name}={one}"
            for name, given in table.items()
            for one in (cast("list[Any]", given) if isinstance(given, list) else [given])
        )

    @property
    def admin(self) -> int:
        """The admin port; 0 for any free one."""
        if self.admin_port is not None:
            return self.admin_port
        return self.port + 1 if self.port else 0

    @property
    def keys_file(self) -> str | None:
        """Where the keys are, or None when anybody may ask."""
        return None if self.open else self.keys or os.environ.get(KEYS_VARIABLE) or None

    def adapter_pairs(self) -> dict[str, str]:
        """Name to folder.

        Raises:
            UserError: one of them is no `name=DIR`, or a name is there twice.
        """
        found: dict[str, str] = {}
        for item in self.adapters:
            name, sign, folder = item.partition("=")
            if not sign or not folder or not _NAME.fullmatch(name):
                raise UserError(f"--adapter: found {item!r}, expected NAME=DIR, for example handbook=./handbook.")
            if name in found:
                raise UserError(f"--adapter: the name {name!r} is given twice; every adapter is a model of its own.")
            found[name] = folder
        return found

    @classmethod
    def of(cls, given: Mapping[str, Any], place: str) -> ServeOptions:
        """Check names, types and what belongs together.

        Args:
            given: values by field name.
            place: where they stand, for the sentence.

        Raises:
            UserError: unknown, of another type, out of range, or an option that would do nothing or is not safe.
        """
        try:
            options = cls.model_validate(dict(given))
        except ValidationError as error:
            raise UserError(_sentence(error, place)) from None
        _check_model(options)
        _check_together(options, given)
        _check_reach(options)
        options.adapter_pairs()
        return options


def _sentence(error: ValidationError, place: str) -> str:
    """The first problem in the words of the command line."""
    import difflib

    first = error.errors()[0]
    field = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(field, list(ServeOptions.model_fields), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see agentopt serve --help."
        return f"{place}: unknown option {field!r}; {hint}"
    expected = first["msg"].removeprefix("Input should be ").replace("a valid tuple", "a list")
    return f"--{field.replace('_', '-')}: found {first['input']!r}, expected {expected[0].lower()}{expected[1:]}."


def _check_model(options: ServeOptions) -> None:
    if options.model is None and options.upstream is None:
        raise UserError(
            "MODEL is missing: give embedded, a model folder, a .gguf file or a hub id, "
            "or --upstream URL for an engine that runs already."
        )
    if options.name is not None and not _NAME.fullmatch(options.name):
        raise UserError(f"--name: found {options.name!r}, expected letters, digits and . _ - / : (128 at most).")
    if options.upstream is not None:
        from agentopt.serving.engines._external import parse_upstream

        try:
            parse_upstream(options.upstream)
        except UserError as error:
            raise UserError(f"--{error}") from None
    for origin in options.cors:
        parts = urlsplit(origin)
        if origin != "*" and (parts.scheme not in ("http", "https") or not parts.hostname or parts.path):
            raise UserError(f"--cors: found {origin!r}, expected an origin such as https://app.example.org, or '*'.")


def _check_together(options: ServeOptions, given: Mapping[str, Any]) -> None:
    """An option that would do nothing is an error: what was asked for would silently not happen."""
    if options.upstream is not None:
        for name in ("quantize", "engine_options"):
            if given.get(name):
                what = "options after --" if name == "engine_options" else f"--{name}"
                raise UserError(f"{what}: nothing is started with --upstream; give it to the engine itself.")
        if options.engine != "auto":
            raise UserError(f"--engine {options.engine}: the engine of --upstream runs already; leave one of them out.")
        if options.adapters:
            raise UserError("--adapter with --upstream: that engine's adapters are loaded where it was started.")
    refuse_own(options.engine_options)
    if options.adapters and options.resident == 0:
        raise UserError("--resident 0 serves no adapter; leave it or --adapter out.")
    needs = {"capture_sample": "capture", "capture_days": "capture", "redact": "capture", "capsule_tokens": "capsule"}
    for name, switch in needs.items():
        if given.get(name) and not getattr(options, switch):
            raise UserError(f"--{name.replace('_', '-')} does nothing without --{switch}; add it.")
    if given.get("store") and not options.capture and not options.capsule:
        raise UserError("--store does nothing without --capture or --capsule; add one, or leave it out.")
    if options.open and options.keys:
        raise UserError("--open means no keys, and --keys names some; give one of them.")


def _check_reach(options: ServeOptions) -> None:
    """Nobody opens a model to other machines without meaning to."""
    if options.keys_file is None and not options.open and not loopback(options.host):
        raise UserError(
            f"--host {options.host}: other machines could use the model without a key; give --keys FILE "
            "(agentopt serve keys create NAME --keys FILE makes one), or --open if that is meant."
        )
    if (
        options.admin_port not in (None, 0)
        and options.admin_port == options.port
        and options.host == options.admin_host
    ):
        raise UserError(f"--admin-port {options.admin_port} is the public port; the admin side has one of its own.")
    if options.admin > 65535:
        raise UserError(f"--port {options.port}: there is none after it for the admin side; give --admin-port too.")


def loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def relative_to(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The table of a configuration file with its adapters' and candidates' paths as seen from that file's folder."""
    found = dict(table)
    for name in ("adapters", "candidates"):
        value = found.get(name)
        if isinstance(value, Mapping):
            value = [
                f"{key}={one}"
                for key, given in cast("Mapping[str, Any]", value).items()
                for one in (cast("list[Any]", given) if isinstance(given, list) else [given])
            ]
        if isinstance(value, list):
            found[name] = [_resolved(one, folder) for one in cast("list[Any]", value)]
    model = found.get("model")
    if isinstance(model, str) and (folder / model).exists():
        found["model"] = str((folder / model).resolve())
    return found


def _resolved(item: Any, folder: Path) -> Any:
    if not isinstance(item, str) or "=" not in item:
        return item
    name, _, rest = item.partition("=")
    base = re.split(r"[@?]", rest, maxsplit=1)[0]
    # `base` stands for the plain model in an A/B test.
    return item if base == "base" or not base else f"{name}={(folder / base).resolve()}{rest[len(base) :]}"
