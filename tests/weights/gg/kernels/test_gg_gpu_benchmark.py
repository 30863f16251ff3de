"""The GPU benchmark of byte layers: without a GPU it says so; its code runs on a CPU at a tiny size."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[4] / "benchmarks" / "gpu"


def test_without_a_gpu_one_sentence_and_success() -> None:
    pytest.importorskip("torch")
    command = [sys.executable, str(FOLDER / "gg_gemm.py")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0
    assert "no GPU" in done.stdout


def test_every_case_runs_at_a_tiny_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = FOLDER / "gg_gemm.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--device", "cpu", "--tiny", "--out", str(tmp_path)])
    monkeypatch.setattr(sys, "path", [str(FOLDER), str(FOLDER.parent), *sys.path])
    runpy.run_path(str(script), run_name="__main__")
    found = json.loads((tmp_path / "gg_gemm.gpu.quick.json").read_text(encoding="utf-8"))
    assert found["left_out"] == []
    rows = {row["name"]: row for row in found["rows"]}
    for format in ("rf8", "rf8-gg", "e3m4"):
        assert rows[f"{format}: codes that decode otherwise"]["value"] == 0
        assert rows[f"{format}: error of a product"]["value"] < 1e-2
        assert rows[f"{format} 64x48 M=1: speed over bf16"]["goal"] == ">= 1.7"
        assert rows[f"{format} 64x48 M=512: speed over bf16"]["goal"] == ">= 0.9"
    assert set(found["extra"]["microseconds"]) == {"64x48 M=1", "64x48 M=3", "64x48 M=512"}
    assert len([name for name in rows if " by " in name]) == 3
