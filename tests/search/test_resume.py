"""kill -9 and resume: the same final candidate, nothing paid for twice (dspy#8705)."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.search import DRIVER_NAMES
from agentopt.search._events import Spend, Warning_
from agentopt.search._resume import EventLog, Replay, check_same
from agentopt.store import EventRow

SCRIPT = Path(__file__).with_name("resumable.py")
CONCURRENCY = 4
POINTS = sorted(random.Random(20_26).sample(range(2, 320), 5))


def tune(folder: Path, kill_after: int | None = None, driver: str = "auto") -> dict[str, Any] | None:
    """One process; None when it was killed."""
    command = [sys.executable, str(SCRIPT), str(folder / "runs.db"), str(folder / "calls.log"), "run", driver]
    done = subprocess.run(
        command + ([] if kill_after is None else [str(kill_after)]), capture_output=True, text=True, timeout=120
    )
    if done.returncode == -signal.SIGKILL:
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def paid(folder: Path) -> Counter[str]:
    return Counter((folder / "calls.log").read_text(encoding="utf-8").splitlines())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Counter[str]]:
    folder = tmp_path_factory.mktemp("whole")
    result = tune(folder)
    assert result is not None
    return result, paid(folder)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_kill_9_and_resume_gives_the_same_candidate_and_repeats_no_paid_call_f6(
    point: int, tmp_path: Path, uninterrupted: tuple[dict[str, Any], Counter[str]]
) -> None:
    whole, calls = uninterrupted
    assert tune(tmp_path, kill_after=point) is None
    assert tune(tmp_path) == whole
    again = paid(tmp_path)
    assert set(again) == set(calls), "the same calls, whenever the process died"
    # A call in flight had not reached the store; there are at most `concurrency` of them.
    assert sum(count - 1 for count in again.values()) <= CONCURRENCY
    assert max(again.values()) <= 2


@pytest.mark.slow
def test_killed_many_times_the_run_still_ends_the_same_f6(
    tmp_path: Path, uninterrupted: tuple[dict[str, Any], Counter[str]]
) -> None:
    whole, calls = uninterrupted
    kills = 0
    while tune(tmp_path, kill_after=90) is None:
        kills += 1
        assert kills < 10
    assert kills >= 3
    assert tune(tmp_path) == whole, "a finished run is read back"
    again = paid(tmp_path)
    assert set(again) == set(calls)
    assert sum(count - 1 for count in again.values()) <= CONCURRENCY * kills


@pytest.mark.slow
@pytest.mark.parametrize("driver", [name for name in DRIVER_NAMES if name != "greedy"])
def test_every_driver_survives_kill_9_f6(driver: str, tmp_path: Path) -> None:
    """Killed early and late, then resumed: as if nothing had happened."""
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    whole = tune(tmp_path / "whole", driver=driver)
    assert whole is not None
    calls = paid(tmp_path / "whole")
    total, kills, folder = sum(calls.values()), 0, tmp_path / "killed"
    for share in (0.15, 0.45):  # of all calls, counted anew in each process
        kills += tune(folder, kill_after=int(share * total), driver=driver) is None
    assert kills == 2
    assert tune(folder, driver=driver) == whole
    again = paid(folder)
    assert set(again) == set(calls), "the same calls, whenever the process died"
    assert sum(count - 1 for count in again.values()) <= CONCURRENCY * kills


def row(seq: int, kind: str, **payload: Any) -> EventRow:
    return EventRow(seq, 0.0, kind, {"kind": kind, **payload})


def made(iteration: int, outcome: str) -> EventRow:
    return row(iteration, "proposal_made", iteration=iteration, parent="p", outcome=outcome, updates=[], detail="")


def test_stored_proposals_are_replayed_and_final_failures_are_asked_again() -> None:
    events = [made(0, "ok"), made(1, "error"), made(2, "ok"), made(3, "error"), made(4, "none")]
    plain = Replay(events)
    assert [getattr(plain.proposal(i, "p"), "outcome", None) for i in range(6)] == [
        "ok", "error", "ok", "error", "none", None,
    ]  # fmt: skip
    assert plain.proposal(0, "other parent") is None
    counted = Replay([replace(made(0, "ok"), payload={**made(0, "ok").payload, "calls": 4}), made(1, "ok")])
    assert [getattr(counted.proposal(i, "p"), "calls", None) for i in range(2)] == [4, 0], "older runs did not keep it"
    retried = Replay(events, retry_failures=True)
    assert [retried.proposal(i, "p") is not None for i in range(5)] == [True, True, True, False, False]


def test_replayed_events_are_shown_but_not_stored_twice() -> None:
    stored: list[str] = []
    shown: list[str] = []
    log = EventLog(
        lambda kind, _payload: stored.append(kind),
        lambda event: shown.append(event.kind),
        [row(1, "warning", message="x"), row(2, "spend")],
    )
    log.emit(Warning_("x"))
    assert log.replaying
    log.emit(Spend(0, None, {}))
    log.emit(Spend(1, None, {}))
    assert stored == ["spend"]
    assert shown == ["warning", "spend", "spend"]
    assert not log.replaying


def test_a_run_is_not_resumed_with_another_budget_or_other_data() -> None:
    check_same({"seed": 1, "extra": 2}, {"seed": 1}, "r")
    with pytest.raises(UserError, match=r"cannot resume run r: seed was 1 and is now 2"):
        check_same({"seed": 1}, {"seed": 2}, "r")
