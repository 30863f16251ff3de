"""What `agentopt fold train` was asked: `[fold]` of agentopt.toml below the command line, kept for `--resume`.

Names are those of the options with underscores. The inner loop's learning rate is `inner_lr` here and `lr` in
`FoldOptions`, because a command has one `--lr`: the outer loop's.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentopt.cli._settings import table_of
from agentopt.errors import UserError
from agentopt.weights.fold import FoldOptions, MetaOptions
from agentopt.weights.fold._types import options_from

COMMAND = "command.json"
"""In the META folder: what `--resume` goes on with."""
FILES = ("tasks", "val", "test", "guard")
_OWN = ("model", *FILES, "out", "dtype", "device")
_INNER_LR = "inner_lr"


@dataclass(frozen=True, slots=True)
class FoldSettings:
    """One meta-training run, checked as far as it can be without reading a file."""

    model: str
    tasks: str
    val: str | None
    test: str | None
    guard: str | None
    dtype: str | None
    device: str | None
    fold: FoldOptions
    meta: MetaOptions
    given: Mapping[str, Any]
    """Everything that was asked for, by name."""

    @classmethod
    def of(cls, given: Mapping[str, Any], place: str) -> FoldSettings:
        """Check names, types and what belongs together; `place` names where the values stand.

        Raises:
            UserError: unknown, missing, out of range, or an option that would do nothing.
        """
        known = [*_OWN, *_names_of(FoldOptions), *_names_of(MetaOptions)]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "see agentopt fold train --help."
                raise UserError(f"{place}: unknown option {name!r}; {hint}")
        for name, option, example in (
            ("model", "MODEL", "embedded, a model folder or a hub id"),
            ("tasks", "--tasks", "a file of agentopt fold make, or rows of your own (see docs/folding.md)"),
        ):
            if given.get(name) is None:
                raise UserError(f"{option} is missing: give {example}.")
        own = {name: _text(given.get(name), name, place) for name in _OWN}
        fold = _fold_options(given, place)
        meta = {name: given[name] for name in MetaOptions.model_fields if name in given}
        _refuse_idle(given, fold)
        return cls(
            model=str(own["model"]),
            tasks=str(own["tasks"]),
            val=own["val"],
            test=own["test"],
            guard=own["guard"],
            dtype=own["dtype"],
            device=own["device"],
            fold=fold,
            meta=options_from(MetaOptions, meta, place),
            given=dict(given),
        )


def _names_of(kind: type[FoldOptions | MetaOptions]) -> list[str]:
    """Of an options type, as a command calls them."""
    if kind is MetaOptions:
        return list(kind.model_fields)
    return [_INNER_LR if name == "lr" else name for name in kind.model_fields]


def _fold_options(given: Mapping[str, Any], place: str) -> FoldOptions:
    values = {name: given[name] for name in FoldOptions.model_fields if name in given and name != "lr"}
    if _INNER_LR in given:
        values["lr"] = given[_INNER_LR]
    if isinstance(values.get("unroll"), str):
        values["unroll"] = _unroll(values["unroll"])
    if "guard" in given:
        values.setdefault("guard_weight", 1.0)
    try:
        return options_from(FoldOptions, values, place)
    except UserError as error:
        raise UserError(str(error).replace(f"{place}: lr is", f"{place}: {_INNER_LR} is")) from None


def _unroll(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise UserError(f"--unroll: found {text!r}, expected a number of inner steps, 0 for first order, or all.")
    return int(text)


def _refuse_idle(given: Mapping[str, Any], fold: FoldOptions) -> None:
    """An option that would do nothing is an error: what was asked for would silently not happen."""
    idle = {
        "with --adapts all": ("rank", "alpha") if fold.adapts == "all" else (),
        "with --single-task": () if fold.multi_task else ("recall_weight", "fact_share"),
        "with --trains init, which leaves the base as it is": () if fold.trains == "all" else ("base_lr",),
        "with --static-lr": () if fold.learn_lr else ("rates_lr",),
    }
    for why, names in idle.items():
        for name in names:
            if name in given:
                raise UserError(f"--{name.replace('_', '-')} does nothing {why}; leave it out.")


def _text(value: Any, name: str, place: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise UserError(f"{place}: {name} is {json.dumps(value, default=str)}, expected text.")


# --- where the values come from --------------------------------------------------------------------------------------


def settings_of(values: Mapping[str, Any], *, resume: bool, config: str | None) -> tuple[FoldSettings, Path]:
    """The settings of a command, and the META folder; a resumed run has its own and only checks the rest.

    Raises:
        UserError: see `FoldSettings.of`; or `resume` finds no run, or another one than the command says.
    """
    given = {name: value for name, value in values.items() if value is not None}
    table = table_of(config, "fold", paths=(*FILES, "out"))
    named = given.pop("out", None) or table.pop("out", None)
    if named is None:
        raise UserError("--out is missing: give the folder that the meta-trained folder goes to, e.g. --out meta.")
    out = Path(str(named))
    saved = saved_command(out)
    if resume:
        if saved is None:
            raise UserError(f"{out}: found no {COMMAND}, so there is nothing to resume; leave --resume out.")
        now = _portable(given)
        _check_same(out, saved, now, list(now))
        return FoldSettings.of(saved, f"{out / COMMAND}"), out
    settings = FoldSettings.of(_portable({**table, **given}), "[fold]" if table else "command line")
    if saved is not None:
        _check_same(out, saved, settings.given, [*saved, *settings.given])
    return settings, out


def saved_command(out: Path) -> dict[str, Any] | None:
    """What the run in this folder was asked; None when there is none."""
    try:
        return json.loads((out / COMMAND).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def check_free(out: Path, *, mark: str, what: str) -> None:
    """Whether a command may write into a folder: an empty or new one, or one it wrote before.

    Args:
        out: the folder.
        mark: a file that shows that it did.
        what: it is, for the sentence.

    Raises:
        UserError: it holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: found a file, expected a folder to write into.")
    others = sorted(entry.name for entry in out.glob("*")) if out.exists() else []
    if others and mark not in others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise UserError(f"{out}: found {shown} and no {what}; give an empty or new folder.")


def _portable(given: Mapping[str, Any]) -> dict[str, Any]:
    """Paths that hold from any folder; a model's name stays a name, and what is not there is told as it was typed."""
    values = dict(given)
    for name in (*FILES, "model"):
        if isinstance(values.get(name), str) and Path(values[name]).exists():
            values[name] = str(Path(values[name]).resolve())
    return values


def _check_same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if before.get(name) == now.get(name):
            continue
        option = name.replace("_", "-")
        found = f"with {option} {before[name]!r}" if name in before else f"without --{option}"
        asked = repr(now[name]) if name in now else "left out"
        raise UserError(
            f"{out}: found a run {found}, now {asked}; give the same options to go on with it, or another --out."
        )
