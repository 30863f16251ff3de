"""The report page, from what is in the store."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from agentopt.observe import write_report
from agentopt.store import Store

Payload = dict[str, Any]


def page(tmp_path: Path, events: list[tuple[str, Payload]], summary: Payload | None = None) -> str:
    store = Store.open(":memory:")
    store.create_run("20260101-000000-aaaa", {"program": "desk.py:desk", "metric": "exact_match"})
    for kind, payload in events:
        store.append_event("20260101-000000-aaaa", kind, {"kind": kind, **payload})
    store.update_run("20260101-000000-aaaa", status="done", summary=summary or {})
    store.flush()
    text = write_report(store, "20260101-000000-aaaa", tmp_path / "report.html").read_text(encoding="utf-8")
    store.close()
    return text


def drop(source: str, problem: str, tries: int = 1) -> Payload:
    return {"source": source, "problem": problem, "tries": tries}


def test_the_same_problem_is_told_once_whatever_the_example(tmp_path: Path) -> None:
    drops = [drop("symbolic.loss", f"example {number:016x}: no comments") for number in range(7)]
    drops.append(drop("symbolic.prompt", "the answer <b>could</b> not be read", 4))
    text = page(tmp_path, [("proposal_made", {"iteration": 0, "dropped": drops})])
    assert "8 answers or edits" in text
    assert text.count("some examples: no comments") == 1
    assert "7 times" in text
    assert "4 tries" in text
    assert "the answer &lt;b&gt;could&lt;/b&gt; not be read" in text


def test_a_screened_proposal_stands_at_its_own_parent(tmp_path: Path) -> None:
    rejected = {"stage": "screen", "reason": "no gain", "source": "by"}
    events = [
        ("baseline_done", {"mean": 0.2, "plan": {}}),
        ("screen_done", {"iteration": 0, "scores": {"good": 0.6}, "passed": ["good"], "rows": 4}),
        (
            "candidate_accepted",
            {"iteration": 0, "candidate": "good", "parent": "base", "source": "by", "validation": 0.8},
        ),
        ("spend", {"totals": {"rollouts": 10}}),
        ("screen_done", {"iteration": 1, "scores": {"same": 0.0}, "passed": [], "rows": 4}),
        ("candidate_rejected", {"iteration": 1, "candidate": "same", "parent": "good", **rejected}),
        ("spend", {"totals": {"rollouts": 20}}),
    ]
    heights = re.findall(r'<circle class="(dot[^"]*)" cx="[\d.]+" cy="([\d.]+)"', page(tmp_path, events))
    assert [kind for kind, _ in heights] == ["dot ok", "dot"]
    assert heights[0][1] == heights[1][1]


def test_the_verdict_is_said_once(tmp_path: Path) -> None:
    claim = {"status": "improved", "text": "Improved: 0.2 to 0.8 on 40 untouched test rows."}
    text = page(tmp_path, [], {"claim": claim})
    assert "<strong>Improved</strong><br>0.2 to 0.8 on 40" in text
