"""Search: the loop that proposes, screens, gates and, once, claims; budget, plan, drivers, resume."""

from __future__ import annotations

from agentopt.search._bayes import Bayes
from agentopt.search._beam import Beam
from agentopt.search._budget import Budget
from agentopt.search._claim import Claim
from agentopt.search._climb import Climb
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
from agentopt.search._islands import Islands
from agentopt.search._lab import Lab
from agentopt.search._objectives import TradeOff
from agentopt.search._options import TuneOptions
from agentopt.search._pareto import Pareto
from agentopt.search._plan import Plan
from agentopt.search._result import TuneResult
from agentopt.search._tune import new_run_id, tune_program
from agentopt.search._ucb import UCB

__all__ = [
    "DRIVER_NAMES",
    "UCB",
    "BaselineDone",
    "Bayes",
    "Beam",
    "Budget",
    "CandidateAccepted",
    "CandidateRejected",
    "Claim",
    "Climb",
    "Driver",
    "Event",
    "GateDone",
    "GateProgress",
    "Greedy",
    "Islands",
    "Lab",
    "MinibatchSkipped",
    "Pareto",
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
    "TradeOff",
    "TuneOptions",
    "TuneResult",
    "Warning_",
    "new_run_id",
    "resolve_driver",
    "tune_program",
]
