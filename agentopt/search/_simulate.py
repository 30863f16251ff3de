"""Synthetic rows behind the real search: what the loop claims when the truth is known.

Used to check the false-claim rate (random labels: no candidate is better than any other) and to compare how drivers
spend a budget, thousands of rollouts a second. A candidate's true accuracy is given by a function; its score on an
example is a fixed draw of (seed, candidate, example), correlated between candidates because examples differ in
difficulty.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from agentopt.evaluation import Dataset, EvaluationResult, EvaluationRow, Example, KeepTraces
from agentopt.graph import Candidate, ParameterSpec, SetText
from agentopt.optimizers import ProposeContext, Update
from agentopt.search._board import Split
from agentopt.search._budget import Budget
from agentopt.search._driver import Driver, Planner
from agentopt.search._events import Event
from agentopt.search._greedy import Greedy
from agentopt.search._loop import Outcome, Search, Setup
from agentopt.search._options import TuneOptions

_NORMAL = NormalDist()
PARAMETER = "synthetic.instruction"


def uniform(*parts: object) -> float:
    """A number in (0, 1) that is a pure function of `parts`."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2.0**64


def normal(*parts: object) -> float:
    """A standard normal number that is a pure function of `parts`."""
    return _NORMAL.inv_cdf(uniform(*parts))


class SyntheticRows:
    """Rows with known truth. `accuracy(candidate)` lies in 0..1; `alike` is the correlation between candidates."""

    def __init__(self, accuracy: Callable[[Candidate], float], *, seed: int = 0, alike: float = 0.4) -> None:
        self._accuracy = accuracy
        self._seed = seed
        self._alike = alike
        self._difficulty: dict[str, float] = {}
        self.asked: list[tuple[str, str, str]] = []
        """(candidate hash, dataset name, example id) in the order asked for."""

    def score(self, candidate: Candidate, example_id: str) -> float:
        """1.0 or 0.0."""
        level = min(max(self._accuracy(candidate), 1e-9), 1 - 1e-9)
        shared = self._difficulty.get(example_id)
        if shared is None:
            shared = self._difficulty[example_id] = normal(self._seed, example_id)
        own = normal(self._seed, example_id, candidate.hash)
        mixed = self._alike**0.5 * shared + (1 - self._alike) ** 0.5 * own
        return 1.0 if mixed < _NORMAL.inv_cdf(level) else 0.0

    async def evaluate(
        self,
        candidate: Candidate,
        examples: Dataset,
        *,
        ids: Sequence[str] | None = None,
        keep_traces: KeepTraces | None = None,
        on_row: Callable[[EvaluationRow], None] | None = None,
    ) -> EvaluationResult:
        """Rows without traces."""
        del keep_traces
        rows: list[EvaluationRow] = []
        for row_id in examples.ids if ids is None else ids:
            self.asked.append((candidate.hash, examples.name, row_id))
            row = EvaluationRow(candidate.hash, examples.id, row_id, 0, self._seed, self.score(candidate, row_id))
            rows.append(row)
            if on_row is not None:
                on_row(row)
        return EvaluationResult(candidate, examples, tuple(rows))


@dataclass
class TextPool:
    """An optimizer that proposes numbered texts, new ones in each round."""

    name: str = "text-pool"
    made: int = 0

    def propose(self, context: ProposeContext) -> list[Update]:
        """`context.count` fresh texts."""
        updates: list[Update] = []
        parent = str(context.parent.get(PARAMETER))
        for _ in range(context.count):
            self.made += 1
            updates.append(Update((SetText(PARAMETER, f"{parent}.{self.made}"),), source=self.name))
        return updates


def rows(name: str, count: int, seed: int = 0) -> Dataset:
    """`count` two-label examples."""
    made: Iterable[Example] = (
        Example(inputs={"text": f"{name} {seed} {i}"}, expected=("yes", "no")[i % 2]) for i in range(count)
    )
    return Dataset(name, made)


def splits(train: int = 100, validation: int = 100, test: int = 300, seed: int = 0) -> dict[Split, Dataset]:
    """Three synthetic sets."""
    return {
        "train": rows("train", train, seed),
        "validation": rows("validation", validation, seed),
        "test": rows("test", test, seed),
    }


def spec() -> ParameterSpec:
    """The one tunable text."""
    return ParameterSpec(name=PARAMETER, kind="prompt", default="start")


async def simulate(
    accuracy: Callable[[Candidate], float],
    *,
    seed: int = 0,
    budget: Budget | None = None,
    data: dict[Split, Dataset] | None = None,
    driver: Driver | Planner | None = None,
    options: TuneOptions | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Outcome:
    """One whole run on synthetic rows: baseline, rounds, final pick, claim."""
    search = Search(
        Setup(
            run_id=f"simulated-{seed}",
            program_name="synthetic",
            specs={PARAMETER: spec()},
            source=SyntheticRows(accuracy, seed=seed),
            optimizer=TextPool(),
            driver=driver or Greedy(),
            splits=data or splits(seed=seed),
            budget=budget or Budget(rollouts=1800),
            emit=on_event or (lambda _event: None),
            options=options or TuneOptions(),
            seed=seed,
        )
    )
    return await search.run()
