"""`agentopt.toml`: one run's configuration, layered file < environment < command line.

Unit: one resolved `Settings` object. It knows names, types and where a value came from; it does not open data files or
import the target. Relative paths in a file are relative to that file, so a run can be started from anywhere.
Every mistake becomes one sentence that names the file, the field, what was found and what was expected.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from agentopt.errors import UserError

DEFAULT_FILE = "agentopt.toml"


class BudgetSettings(BaseModel):
    """`[budget]`: what a run may spend; an absent limit is no limit."""

    model_config = ConfigDict(extra="forbid")
    usd: float | None = Field(default=None, gt=0)
    """US dollars, over every LM call of the run."""
    tokens: int | None = Field(default=None, gt=0)
    """Input plus output tokens."""
    rollouts: int | None = Field(default=None, gt=0)
    """Program runs on one example, validation and screening together; the test set is not counted."""
    proposals: int | None = Field(default=None, gt=0)
    """Candidates asked of the optimizer."""
    minutes: float | None = Field(default=None, gt=0)
    """Wall time."""


class Settings(BaseModel):
    """One run of `agentopt tune` or `agentopt evaluate`, fully resolved."""

    model_config = ConfigDict(extra="forbid")

    target: str | None = None
    """`file.py:function` or `package.module:function`."""
    train: str | None = None
    val: str | None = None
    test: str | None = None
    metric: str | None = None
    inputs: list[str] | None = None
    """Columns passed to the target; by default those that match its signature."""
    label: str | None = None
    """Column that holds the expected answer; by default expected, label or answer."""
    output_field: str | None = None
    """Field of the target's output that the metric reads."""
    models: dict[str, str] = Field(default_factory=dict)
    """Role to model: agent, optimizer, judge."""
    budget: BudgetSettings = Field(default_factory=BudgetSettings)
    optimizer: str = "auto"
    driver: str = "auto"
    objectives: list[str] = Field(default_factory=lambda: ["score"])
    """What counts besides the score: cost, tokens (of the prompt), latency."""
    tune: list[str] = Field(default_factory=list)
    """Globs of parameters to tune, frozen ones (tool text, code) included; empty for all that are not frozen."""
    freeze: list[str] = Field(default_factory=list)
    """Globs of parameters to leave as they are."""
    seed: int = 0
    concurrency: int = Field(default=8, ge=1)
    timeout: float = Field(default=120.0, gt=0)
    """Seconds one example may take."""
    repeats: int = Field(default=1, ge=1)
    """Runs of the program per example; more than one averages out a noisy model."""
    screen_size: int = Field(default=16, ge=2)
    """Examples in the minibatch that a proposal is screened on."""
    capture: bool = True
    """Start the loopback endpoint, so that agents with an OpenAI client of their own are seen."""
    allow_effects: bool = False
    """Let tools declared with effects=True run for real."""
    template: str | None = None
    """A file that replaces the optimizer's meta-prompt."""
    executor: str = "local"
    """Where examples run: local, ray or ray://HOST:PORT."""
    workers: int | None = Field(default=None, ge=1)
    """Processes of the ray executor; by default one per CPU of the cluster."""
    sandbox: str = "auto"
    """The tier in which changed code runs: auto, process, namespace, container or a registered one."""
    store: str | None = None
    """The SQLite file; by default .agentopt/agentopt.db."""
    finetune: dict[str, Any] = Field(default_factory=dict)
    """Options of `agentopt finetune`, which checks them itself."""
    fold: dict[str, Any] = Field(default_factory=dict)
    """Options of `agentopt fold train`, which checks them itself."""
    quantize: dict[str, Any] = Field(default_factory=dict)
    """Options of `agentopt quantize`, which checks them itself."""
    serve: dict[str, Any] = Field(default_factory=dict)
    """Options of `agentopt serve`, which checks them itself."""

    PATHS: ClassVar[tuple[str, ...]] = ("train", "val", "test", "template", "store")

    @field_validator("inputs", "tune", "freeze", "objectives", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value


class _FileAndEnvironment(Settings, BaseSettings):
    """The two lower layers: what `load_settings` read from the file, and AGENTOPT_* above it."""

    model_config = SettingsConfigDict(extra="forbid", env_prefix="AGENTOPT_", env_nested_delimiter="__")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment first, then the file's values, which arrive as init arguments."""
        return env_settings, init_settings


def read_file(path: Path) -> dict[str, Any]:
    """Parse `agentopt.toml` (or the `[tool.agentopt]` table of a pyproject.toml); paths become absolute.

    Raises:
        UserError: the file is missing or is not TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path}: configuration file not found; write one, or leave --config out and pass options."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}.") from None
    if path.name == "pyproject.toml":
        data = data.get("tool", {}).get("agentopt", {})
    for key in Settings.PATHS:
        if isinstance(data.get(key), str):
            data[key] = str((path.parent / data[key]).resolve())
    target = data.get("target")
    if isinstance(target, str) and ".py:" in target:
        file, _, name = target.rpartition(":")
        data["target"] = f"{(path.parent / file).resolve()}:{name}"
    return data


def table_of(config: str | None, name: str, *, paths: Sequence[str]) -> dict[str, Any]:
    """The table of agentopt.toml with this name, empty without a file; values at `paths` are relative to the file.

    Raises:
        UserError: the file is missing or is not TOML, or what stands there is no table; or it has a key that no
            command knows, which would leave out a misspelt table unsaid.
    """
    path = Path(config or DEFAULT_FILE)
    if config is None and not path.exists():
        return {}
    data = read_file(path)
    for key in data:
        if key not in Settings.model_fields:
            raise UserError(_unknown(str(path), key, list(Settings.model_fields)))
    found: Any = data.get(name, {})
    if not isinstance(found, dict):
        raise UserError(f"{path}: {name} is {found!r}, expected a table [{name}].")
    table = dict(cast("dict[str, Any]", found))
    for key in paths:
        if isinstance(table.get(key), str):
            table[key] = str((path.parent / table[key]).resolve())
    return table


def load_settings(config: str | None, overrides: dict[str, Any]) -> Settings:
    """Merge file, environment and command line.

    Args:
        config: path of the file; None takes ./agentopt.toml when it exists.
        overrides: what the command line gave; None values are absent.

    Raises:
        UserError: unknown key (with the nearest known one), wrong type, or out of range.
    """
    path = Path(config) if config else Path(DEFAULT_FILE)
    origin = str(path)
    data = read_file(path) if config or path.exists() else {}
    given = {key: value for key, value in overrides.items() if value is not None and value != {} and value != []}
    try:
        layered = _FileAndEnvironment(**data)
        merged = layered.model_dump(exclude_unset=True)
        for key, value in given.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
        return Settings.model_validate(merged)
    except ValidationError as error:
        raise UserError(_one_sentence(error, origin, given)) from None


def _one_sentence(error: ValidationError, origin: str, given: dict[str, Any]) -> str:
    """The first problem, as: where, which field, what was found, what is expected."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    where = "command line" if str(first["loc"][0]) in given else origin
    if first["type"] == "extra_forbidden":
        inner = len(first["loc"]) > 1 and first["loc"][0] == "budget"
        return _unknown(where, field, list((BudgetSettings if inner else Settings).model_fields))
    expected = first["msg"].removeprefix("Input should be ")
    return f"{where}: {field} is {first['input']!r}; expected: {expected[0].lower()}{expected[1:]}."


def _unknown(where: str, field: str, known: list[str]) -> str:
    close = difflib.get_close_matches(field.rpartition(".")[2], known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}."
    return f"{where}: unknown key {field!r}; {hint}"
