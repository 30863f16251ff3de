"""Settings of one tuning run that are not about data, program or budget."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from agentopt.errors import UserError
from agentopt.evaluation import check_executor
from agentopt.sandbox import tier
from agentopt.search._objectives import check_objectives


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """Options of `tune`. The defaults are the documented behaviour; every number is checked at once.

    Raises:
        UserError: a number out of its range.
    """

    concurrency: int = 8
    """Rollouts that run at the same time."""
    timeout: float = 120.0
    """Seconds for one rollout; after that it counts as failed with score 0."""
    repeats: int = 1
    """Runs per example; scores are averaged before anything is compared. For noisy programs or judges."""
    screen_size: int = 16
    """Training examples of the minibatch on which proposals are compared with their parent."""
    block_size: int = 10
    """Validation rows between two looks of the racing gate."""
    drop_alpha: float = 0.2
    """A challenger leaves the race when it is worse than the leader at this one-sided level."""
    beam: int = 2
    """Parents worked on in one round when the optimizer has many proposals."""
    pool_size: int = 8
    """Candidates kept as possible parents; the best are never evicted."""
    max_round: int = 40
    """Most proposals asked for in one round."""
    max_failures: int = 5
    """Iterations that may fail in a row before the run ends with an error."""
    max_wait: float = 300.0
    """Seconds that a streak of rate-limit or transport errors of the optimizer's model is waited out."""
    patience: int = 8
    """Iterations without a gain before the run stops."""
    perfect_score: float = 1.0
    """A minibatch on which the parent has this score everywhere is skipped (and counted)."""
    tune: tuple[str, ...] = ()
    """Globs of parameter names that are tuned although they are frozen by default (tool text, code)."""
    freeze: tuple[str, ...] = ()
    """Globs of parameter names that are left alone."""
    allow_effects: bool = False
    """Let tools with side effects run for real during tuning."""
    allow_failing_baseline: bool = False
    """Go on although the first rollouts of the baseline all fail in the same way."""
    objectives: tuple[str, ...] = ("score",)
    """What "better" means: "score", "cost", "tokens" (of the prompt) or "latency"; the score always counts."""
    capture: bool = True
    """Serve the loopback endpoint for programs that bring their own LM client."""
    template: Path | None = None
    """A file that overrides fragments of the optimizers' meta-prompts."""
    executor: str = "local"
    """Where rollouts run: `local` (this process), `ray` (a cluster on this machine, or RAY_ADDRESS), `ray://HOST:PORT`."""
    workers: int | None = None
    """Processes of the ray executor; None for one per CPU of the cluster."""

    sandbox: str = "auto"
    """The tier in which changed code runs: `auto`, `process`, `namespace`, `container` or a registered one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", check_objectives(self.objectives))
        lowest = {
            "concurrency": 1, "repeats": 1, "screen_size": 2, "block_size": 1, "beam": 1, "pool_size": 1,
            "max_round": 1, "max_failures": 1, "patience": 1,
        }  # fmt: skip
        for name, low in lowest.items():
            value: object = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise UserError(f"options: {name} must be a whole number of at least {low}; found {value!r}")
        check_executor(self.executor, self.workers)
        if self.sandbox != "auto":
            tier(self.sandbox)
        if not self.timeout > 0:
            raise UserError(f"options: timeout must be a positive number of seconds; found {self.timeout!r}")
        if not 0 < self.drop_alpha < 1:
            raise UserError(f"options: drop_alpha must lie between 0 and 1; found {self.drop_alpha!r}")
        if not self.max_wait >= 0:
            raise UserError(f"options: max_wait must not be negative; found {self.max_wait!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for the run's config."""
        data = asdict(self)
        data["template"] = None if self.template is None else str(self.template)
        for name in ("tune", "freeze", "objectives"):
            data[name] = list(data[name])
        return data

    @classmethod
    def deciding(cls) -> tuple[str, ...]:
        """Names of the options on which decisions depend: a resumed run must have the same."""
        free = {"concurrency", "timeout", "capture", "max_wait", "max_failures", "executor", "workers", "sandbox"}
        return tuple(option.name for option in fields(cls) if option.name not in free)
