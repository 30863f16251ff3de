"""The main job with the real embedded model, on a slice of the shipped example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao

EXAMPLE = Path(ao.__file__).resolve().parents[1] / "traces" / "ticket_triage"


@pytest.mark.embedded
@pytest.mark.slow
def test_tune_with_the_embedded_model_ends_with_a_claim_within_its_budget(agentopt: Any, project: Path) -> None:
    for part, rows in (("train", 16), ("val", 12), ("test", 30)):
        lines = (EXAMPLE / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
        (project / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = ("--config", str(EXAMPLE / "agentopt.toml"), "--screen-size", "6", "--budget", "rollouts=130")
    files = [word for part in ("train", "val", "test") for word in (f"--{part}", f"{part}.jsonl")]
    done = agentopt.cold("tune", *arguments, *files, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["claim"]["n"] == 30
    assert result["claim"]["status"] in ("improved", "not_improved", "worse", "kept_baseline")
    assert 12 < result["cost"]["rollouts"] <= 130
    assert result["cost"]["tokens"] > 0
    assert set(result["best"]["values"]) >= {"triage.instruction", "triage.cue"}
