"""A policy that keeps or drops whole units, for training on a CPU without torch.

Every unit has a score, linear in its features. A capsule is drawn by keeping one unit after the other, each with the
probability softmax(scores) among those that still fit, until none does. That is adding Gumbel noise to the scores and
taking them from the top: keep-or-drop decisions conditioned on the budget, with an exact probability, so REINFORCE has
no bias and no capsule is ever over its budget. In use the scores are the `values` of the extractive engine, so all of
its promises hold.

Two ways to train: `UnitPolicy.reinforce` against a reward, or `UnitPolicy.imitate` what each unit was worth when it
alone was left out (`leave_one_out_changes`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agentopt.capsules._types import Document
from agentopt.capsules.counting._tokenizers import resolve_tokenizer
from agentopt.capsules.counting._tokens import Meter
from agentopt.capsules.extraction._extract import extract
from agentopt.capsules.extraction._render import render
from agentopt.capsules.training._features import Floats, features, names
from agentopt.capsules.training._rewards import Reward, Sample
from agentopt.capsules.training._tasks import draw_tasks
from agentopt.capsules.training._train_options import Budgets
from agentopt.capsules.training._updates import leave_one_out, tells_nothing
from agentopt.errors import UserError
from agentopt.evaluation import seed_number

_VERSION = 1


@dataclass(frozen=True)
class UnitSettings:
    """How a unit policy is trained.

    Raises:
        UserError: a size below 1, or a rate that is not positive.
    """

    steps: int = 300
    rate: float = 0.1
    documents: int = 8
    group: int = 8
    """Capsules per document; each is compared with the mean of the others."""
    budgets: Budgets = field(default_factory=Budgets)
    buckets: int = 256
    """Columns for words by hash; 0 for none."""
    decay: float = 1e-3
    """Pull of the weights towards 0."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.documents < 1 or self.group < 2 or self.buckets < 0:
            raise UserError("unit policy: steps and documents are at least 1, group at least 2, buckets at least 0.")
        if self.rate <= 0 or self.decay < 0:
            raise UserError("unit policy: rate is above 0, decay at least 0.")


@dataclass(frozen=True)
class UnitStep:
    """What one step of training did."""

    step: int
    steps: int
    reward: float
    reader_calls: int
    dropped: int
    """Groups with equal rewards."""


@dataclass
class UnitPolicy:
    """Scores units; higher stays longer."""

    weights: Floats
    mean: Floats
    deviation: Floats
    buckets: int
    history: list[UnitStep] = field(default_factory=list[UnitStep])

    def values(self, document: Document, meter: Meter, query: str | None = None) -> list[float]:
        """One score per unit: what `extract(..., values=[...])` takes."""
        return self._scores(features(document, meter, query, self.buckets)).tolist()

    def compress(self, document: Document, meter: Meter, seed: int = 0, *, query: str | None = None) -> str:
        """The capsule that the extractive engine makes with these scores; `seed` breaks ties.

        Raises:
            BudgetInfeasible: what must be kept is longer than the limit.
        """
        return extract([document], meter, seed=seed, values=[self.values(document, meter, query)]).texts[0]

    def digest(self) -> str:
        """Hex sha256 of everything that decides the scores."""
        parts = (part.tobytes() for part in (self.weights, self.mean, self.deviation))
        return hashlib.sha256(b"".join((str(self.buckets).encode(), *parts))).hexdigest()

    def _scores(self, rows: Floats) -> Floats:
        return ((rows - self.mean) / self.deviation) @ self.weights

    # --- training ----------------------------------------------------------------------------------------------------

    @classmethod
    def fresh(cls, documents: Sequence[Document], meter: Meter, buckets: int = 256) -> UnitPolicy:
        """Zero weights; the scale of every feature is taken from `documents`, which must hold a unit (UserError)."""
        rows = np.concatenate([features(document, meter, None, buckets) for document in documents])
        if not len(rows):
            raise UserError("unit policy: found no unit in the documents, expected some text.")
        deviation: Floats = rows.std(0)
        zero = np.zeros(len(names(buckets)), dtype=np.float64)
        return cls(zero, rows.mean(0), np.where(deviation > 1e-9, deviation, 1.0), buckets)

    @classmethod
    def reinforce(
        cls,
        samples: Sequence[Sample],
        reward: Reward,
        settings: UnitSettings | None = None,
        *,
        start: UnitPolicy | None = None,
        progress: Callable[[UnitStep, UnitPolicy], None] | None = None,
    ) -> UnitPolicy:
        """REINFORCE with a leave-one-out baseline; reproducible from the seed.

        Args:
            samples: Documents with questions.
            reward: What a capsule is worth.
            settings: Sizes.
            start: The policy to go on from (it is not changed); None for zero weights.
            progress: Called after every step, with the policy as it is then.

        Raises:
            UserError: no samples, one that the reward cannot score, or an unknown tokenizer.
        """
        settings = settings or UnitSettings()
        if not samples:
            raise UserError("unit policy: found no samples, expected at least one document.")
        tokenizers = {name: resolve_tokenizer(name) for name in settings.budgets.tokenizers}
        unit = Meter(1, tokenizers[settings.budgets.tokenizers[0]])
        policy = cls.fresh([sample.document for sample in samples], unit, settings.buckets)
        if start is not None:
            policy = cls(start.weights.copy(), start.mean, start.deviation, start.buckets)
        rise = _Adam(policy.weights.size, settings.rate)
        for step in range(settings.steps):
            seed = seed_number("units", settings.seed, step)
            gradient, record = policy._gradient(samples, reward, settings, tokenizers, seed, step)
            policy.weights = policy.weights + rise(gradient - settings.decay * policy.weights)
            policy.history.append(record)
            if progress is not None:
                progress(record, policy)
        return policy

    def _gradient(
        self,
        samples: Sequence[Sample],
        reward: Reward,
        settings: UnitSettings,
        tokenizers: dict[str, Any],
        seed: int,
        step: int,
    ) -> tuple[Floats, UnitStep]:
        gradient = np.zeros_like(self.weights)
        rewards: list[float] = []
        dropped = 0
        for sample, meter in draw_tasks(samples, settings.budgets, tokenizers, settings.documents, seed):
            rows = (features(sample.document, meter, None, self.buckets) - self.mean) / self.deviation
            rng = np.random.default_rng(seed_number("group", seed, sample.id))
            drawn = [self._draw(sample.document, meter, rows, rng) for _ in range(settings.group)]
            totals = [s.total for s in reward.scores(sample, [text for text, _ in drawn], meter, seed=seed)]
            rewards += totals
            if tells_nothing(totals):
                dropped += 1
                continue
            for advantage, (_, slope) in zip(leave_one_out(totals), drawn, strict=True):
                gradient += advantage * slope / (settings.documents * settings.group)
        mean = sum(rewards) / len(rewards)
        return gradient, UnitStep(step, settings.steps, mean, reward.calls, dropped)

    def _draw(self, document: Document, meter: Meter, rows: Floats, rng: np.random.Generator) -> tuple[str, Floats]:
        """A capsule and the gradient of its log-probability."""
        costs = meter.units([document.text[unit.start : unit.end] for unit in document.units])
        kept = [unit.keep or document.whole for unit in document.units]
        left = meter.limit - sum(cost for cost, stays in zip(costs, kept, strict=True) if stays)
        slope, scores = np.zeros_like(self.weights), rows @ self.weights
        text = render(document, kept)
        open_ = [row for row, stays in enumerate(kept) if not stays and costs[row] <= left]
        while open_:
            chance = np.exp(scores[open_] - scores[open_].max())
            chance /= chance.sum()
            row = open_[int(rng.choice(len(open_), p=chance))]
            slope += rows[row] - chance @ rows[open_]
            kept[row] = True
            longer = render(document, kept)
            if not meter.fits([longer]):  # the parts fit but the joins do not: the draw ends here
                break
            text, left = longer, left - costs[row]
            open_ = [other for other in open_ if other != row and costs[other] <= left]
        return text, slope

    @classmethod
    def imitate(
        cls,
        documents: Sequence[Document],
        changes: Sequence[Sequence[float]],
        meter: Meter,
        *,
        buckets: int = 256,
        decay: float = 1e-3,
    ) -> UnitPolicy:
        """Fit the scores to what each unit was worth (logistic regression, weighted by how much it was).

        Args:
            documents: What was measured.
            changes: Per document and unit, how far utility fell when the unit was left out.
            meter: Counts tokens.
            buckets: Columns for words by hash.
            decay: Ridge penalty.

        Raises:
            UserError: no units, another number of changes than units, or a change that is not finite.
        """
        if [len(document.units) for document in documents] != [len(row) for row in changes]:
            raise UserError("unit policy: found another number of changes than units, expected one per unit.")
        policy = cls.fresh(documents, meter, buckets)
        raw = np.concatenate([features(document, meter, None, buckets) for document in documents])
        rows = (raw - policy.mean) / policy.deviation
        fell = np.asarray([change for row in changes for change in row], dtype=np.float64)
        if not np.isfinite(fell).all():
            raise UserError("unit policy: found a change that is not finite; look at what measured the utility.")
        scale = np.abs(fell).max() or 1.0
        wanted, weight = (fell > 0).astype(np.float64), np.maximum(np.abs(fell) / scale, 0.05)
        bias = 0.0
        for _ in range(50):  # Newton's method; the ridge keeps the matrix regular
            chance = 1.0 / (1.0 + np.exp(-np.clip(rows @ policy.weights + bias, -30, 30)))
            error, curve = weight * (wanted - chance), weight * chance * (1 - chance)
            full = np.column_stack([rows, np.ones(len(rows))])
            ridge = decay * len(rows) * np.eye(full.shape[1])
            slope = full.T @ error - ridge @ np.append(policy.weights, bias)
            move = np.linalg.solve(full.T @ (full * curve[:, None]) + ridge, slope)
            policy.weights, bias = policy.weights + move[:-1], bias + float(move[-1])
            if np.abs(move).max() < 1e-8:
                break
        return policy

    # --- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write a JSON file."""
        data = {
            "kind": "units",
            "version": _VERSION,
            "buckets": self.buckets,
            "features": names(self.buckets),
            "weights": self.weights.tolist(),
            "mean": self.mean.tolist(),
            "deviation": self.deviation.tolist(),
            "history": [asdict(step) for step in self.history],
        }
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".new")
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, target)
        return target

    @classmethod
    def load(cls, path: str | Path) -> UnitPolicy:
        """Read what `save` wrote; UserError when it is something else, or of features that have changed since."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["kind"] != "units" or data["version"] != _VERSION or data["features"] != names(data["buckets"]):
                raise UserError(f"{path}: found another kind of file or other features, expected a unit policy.")
            weights, mean, deviation = (
                np.asarray(data[name], dtype=np.float64) for name in ("weights", "mean", "deviation")
            )
            for part in (weights, mean, deviation):
                if part.shape != (len(data["features"]),) or not np.isfinite(part).all():
                    raise UserError(f"{path}: found weights of another size or not finite, expected one per feature.")
            return cls(weights, mean, deviation, data["buckets"], [UnitStep(**step) for step in data["history"]])
        except FileNotFoundError:
            raise UserError(f"{path}: no such file, expected a unit policy.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a unit policy ({error}).") from error


def leave_one_out_changes(document: Document, utility: Callable[[str], float]) -> list[float]:
    """How far `utility` falls when each unit alone is left out: the labels for `UnitPolicy.imitate`."""
    count = len(document.units)
    whole = utility(document.text)
    return [whole - utility(render(document, [other != row for other in range(count)])) for row in range(count)]


class _Adam:
    """Adaptive steps (Kingma and Ba 2015) for one vector, upwards."""

    def __init__(self, size: int, rate: float) -> None:
        self.rate, self.count = rate, 0
        self.first, self.second = np.zeros(size), np.zeros(size)

    def __call__(self, gradient: Floats) -> Floats:
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.99 * self.second + 0.01 * gradient**2
        scale = np.sqrt(self.second / (1 - 0.99**self.count)) + 1e-8
        return self.rate * self.first / (1 - 0.9**self.count) / scale
