"""The GPU benchmarks: without a GPU they say so; their code runs on a CPU at a tiny size."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks" / "gpu"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("torch")
    command = [sys.executable, str(FOLDER / "run_all.py"), *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_without_a_gpu_one_sentence_and_success() -> None:
    done = run()
    assert done.returncode == 0
    assert done.stdout.strip().count("\n") == 0
    assert "no GPU" in done.stdout


def test_the_real_shapes_are_not_tried_on_a_cpu() -> None:
    done = run("--device", "cpu")
    assert done.returncode == 2
    assert "--tiny" in done.stderr


@pytest.mark.filterwarnings("ignore")  # peft and transformers deprecate each other
@pytest.mark.parametrize("name", ["zeroth_cost", "zeroth_quality"])
def test_every_case_runs_at_a_tiny_size(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    script = FOLDER / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--device", "cpu", "--tiny", "--out", str(tmp_path)])
    monkeypatch.setattr(sys, "path", [str(FOLDER), str(FOLDER.parent), *sys.path])
    runpy.run_path(str(script), run_name="__main__")
    found = json.loads((tmp_path / f"{name}.gpu.quick.json").read_text(encoding="utf-8"))
    assert found["left_out"] == []
    names = [row["name"] for row in found["rows"]]
    if name == "zeroth_cost":
        assert len([row for row in names if row.endswith(": time")]) == 12
    else:
        assert any(row.startswith("small - all") for row in names)
