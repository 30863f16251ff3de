"""The public face: light to import, complete, and not overwritten by its own rooms."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import agentopt

ROOT = Path(agentopt.__file__).resolve().parents[1]
OF_OTHER_ENVIRONMENTS = {"agentopt.weights.gg._vllm_method"}
"""What only vLLM's processes import, where `make test-serve` tests it."""
HEAVY = (
    "pydantic",
    "torch",
    "transformers",
    "litellm",
    "openai",
    "httpx",
    "numpy",
    "scipy",
    "ray",
    "mlflow",
    "rich",
    "starlette",
)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_loads_nothing_heavy() -> None:
    done = run_python("import sys, json, agentopt; print(json.dumps(sorted(sys.modules)))")
    loaded = set(json.loads(done.stdout))
    assert not loaded & set(HEAVY)


def test_d14_import_of_every_room_loads_no_llm_library_and_opens_no_socket() -> None:
    code = """
import socket, sys
def refuse(*a, **k): raise SystemExit("a socket was opened")
socket.socket.connect = refuse
socket.create_connection = refuse
socket.getaddrinfo = refuse
import agentopt, agentopt.graph, agentopt.models, agentopt.evaluation, agentopt.optimizers, agentopt.search
import agentopt.store
import agentopt.observe, agentopt.cli._app
agentopt.prompt, agentopt.lm, agentopt.tune
bad = {"torch", "transformers", "litellm", "openai", "ray", "mlflow", "scipy", "xllamacpp"} & set(sys.modules)
raise SystemExit(", ".join(sorted(bad)) or 0)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_every_public_name_has_its_declared_type_after_every_submodule_is_imported() -> None:
    before = {name: getattr(agentopt, name) for name in agentopt.__all__}
    for found in pkgutil.walk_packages(agentopt.__path__, "agentopt."):
        if found.name not in OF_OTHER_ENVIRONMENTS:
            importlib.import_module(found.name)
    for name, value in before.items():
        assert getattr(agentopt, name) is value
        assert not inspect.ismodule(value), name


def test_all_matches_the_lazy_table() -> None:
    assert set(agentopt.__all__) - {"__version__"} == set(agentopt._HOME)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tuen'"):
        _ = agentopt.tuen  # pyright: ignore[reportAttributeAccessIssue]


def test_the_distribution_ships_the_package_only() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    find = project["tool"]["setuptools"]["packages"]["find"]
    assert all(pattern.startswith("agentopt") for pattern in find["include"])
    assert project["project"]["version"] == agentopt.__version__
    assert (ROOT / "agentopt" / "py.typed").exists()
