"""Search: the loop that proposes, screens, gates and, once, claims; budget, plan, drivers, resume."""

from __future__ import annotations

from agentopt.search._budget import Budget
from agentopt.search._claim import Claim
from agentopt.search._driver import DRIVER_NAMES, Driver, Planner, SearchState, Step, resolve_driver
from agentopt.search._events import (
    BaselineDone,
    CandidateAccepted,
    CandidateRejected,
    Event,
    GateDone,
    GateProgress,
    MinibatchSkipped,
    ProposalMade,
    RunFinished,
    RunStarted,
    ScreenDone,
    Spend,
    TestDone,
    Warning_,
)
from agentopt.search._greedy import Greedy
from agentopt.search._lab import Lab
from agentopt.search._options import TuneOptions
from agentopt.search._plan import Plan
from agentopt.search._result import TuneResult
from agentopt.search._tune import new_run_id, tune_program

__all__ = [
    "DRIVER_NAMES",
    "BaselineDone",
    "Budget",
    "CandidateAccepted",
    "CandidateRejected",
    "Claim",
    "Driver",
    "Event",
    "GateDone",
    "GateProgress",
    "Greedy",
    "Lab",
    "MinibatchSkipped",
    "Plan",
    "Planner",
    "ProposalMade",
    "RunFinished",
    "RunStarted",
    "ScreenDone",
    "SearchState",
    "Spend",
    "Step",
    "TestDone",
    "TuneOptions",
    "TuneResult",
    "Warning_",
    "new_run_id",
    "resolve_driver",
    "tune_program",
]
