"""The GPU benchmarks: without a GPU they say so; their code runs on a CPU at a tiny size."""

from __future__ import annotations

import json
import os
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


@pytest.mark.slow
def test_every_case_runs_at_a_tiny_size(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    done = run("--device", "cpu", "--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    found = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()}
    cost, quality = found["zeroth_cost.gpu.quick.json"], found["zeroth_quality.gpu.quick.json"]
    assert len([row for row in cost["rows"] if row["name"].endswith(": time")]) == 24 - 1
    assert any(row["name"].startswith("small - all") for row in quality["rows"])
    assert cost["left_out"] == quality["left_out"] == []
