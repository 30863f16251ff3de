"""Instructions without a language model: texts put together from frames, and a model of which parts score well.

The unit is a `Recipe`: one choice per slot (head, answer, cues, tail, label order, layout). All recipes of a parameter
(a seeded sample when there are very many) form its pool. Which recipe to try next is Thompson sampling on an additive
model: a recipe's mean score is a sum of one weight per choice, with the frames' priors as prior means and the measured
scores of past proposals as data. So what won in one recipe is crossed with the other choices by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import numpy as np
import numpy.typing as npt

from agentopt.optimizers._draws import seed_number, seeded
from agentopt.optimizers._space import TextSpace, cue_text, labels_joined
from agentopt.optimizers._templates import Fragment, Templates

Array = npt.NDArray[np.float64]

SLOTS = ("head", "answer", "cues", "tail", "order", "layout")
MAX_POOL = 4000
_MAX_ORDERS = 6
_PRIOR_SPREAD = 0.04
"""Standard deviation of a choice's weight around its prior, in score points."""
_INTERCEPT_SPREAD = 0.5


@dataclass(frozen=True, slots=True)
class Observation:
    """A measured text: mean score and the variance of that mean."""

    text: str
    score: float
    variance: float


class Pool:
    """All texts that frames make for one parameter, each with its recipe. Deterministic for equal arguments."""

    def __init__(
        self,
        space: TextSpace,
        templates: Templates,
        *,
        cues: Mapping[str, Sequence[str]],
        seed: int,
        extra_head: str | None = None,
    ) -> None:
        """`extra_head` is a further text to build on (a proposal of another optimizer that became the parent)."""
        self._space = space
        self._cues = cues
        self._choices = self._collect(templates, extra_head)
        self._columns: dict[tuple[str, int], int] = {}
        priors: list[float] = [0.0]
        for slot in SLOTS:
            for place, (_, prior) in enumerate(self._choices[slot]):
                self._columns[slot, place] = len(priors)
                priors.append(prior)
        self._prior: Array = np.array(priors)
        self.texts, self._recipes = self._enumerate(seed)
        self._index = {text: place for place, text in enumerate(self.texts)}
        self._design: Array = np.zeros((len(self.texts), len(priors)))
        for row, recipe in enumerate(self._recipes):
            self._design[row, 0] = 1.0
            for slot, place in zip(SLOTS, recipe, strict=True):
                self._design[row, self._columns[slot, place]] = 1.0

    def __len__(self) -> int:
        return len(self.texts)

    def __contains__(self, text: object) -> bool:
        return text in self._index

    # --- building --------------------------------------------------------------------------------------------------

    def _collect(self, templates: Templates, extra_head: str | None) -> dict[str, list[tuple[Any, float]]]:
        space = self._space
        kinds = {space.answer, "any"}
        found: dict[str, list[tuple[Any, float]]] = {slot: [] for slot in SLOTS}
        for fragment in templates.values():
            slot, _, rest = fragment.name.partition(".")
            kind = rest.partition(".")[0]
            if slot in SLOTS and kind in kinds and self._usable(fragment, slot):
                found[slot].append((fragment, fragment.prior))
        if extra_head is not None:
            found["head"].insert(0, (Fragment("head.any.current", extra_head), 0.02))
        for slot in ("answer", "cues", "tail"):
            found[slot].insert(0, (Fragment(f"{slot}.any.none", ""), 0.0))
        found["order"] = [(order, 0.0) for order in self._orders()]
        layouts = [("after", 0.0), ("before", -0.01)] if space.block else [("after", 0.0)]
        found["layout"] = list(layouts)
        return found

    def _usable(self, fragment: Fragment, slot: str) -> bool:
        space = self._space
        if slot == "head" and (space.fixed or not space.core) and "original" not in fragment.placeholders:
            return False
        if slot == "tail" and space.fixed:
            return False
        return not ("cues" in fragment.placeholders and not cue_text(self._cues, space.labels))

    def _orders(self) -> list[tuple[str, ...]]:
        labels = self._space.labels
        if len(labels) < 2:
            return [labels]
        if len(labels) <= 3:
            return list(permutations(labels))[:_MAX_ORDERS]
        ordered = [labels, labels[::-1], tuple(sorted(labels)), tuple(sorted(labels, reverse=True))]
        half = len(labels) // 2
        ordered.extend([labels[half:] + labels[:half], labels[1:] + labels[:1]])
        return list(dict.fromkeys(ordered))[:_MAX_ORDERS]

    def _enumerate(self, seed: int) -> tuple[list[str], list[tuple[int, ...]]]:
        sizes = [len(self._choices[slot]) for slot in SLOTS]
        total = int(np.prod(sizes))
        if total <= MAX_POOL:
            recipes: Iterable[tuple[int, ...]] = product(*map(range, sizes))
        else:
            rng = seeded("frames", seed, self._space.name)
            first = [tuple(0 for _ in sizes)]
            for slot, size in enumerate(sizes):
                first.extend(tuple(value if s == slot else 0 for s in range(len(sizes))) for value in range(size))
            drawn = (tuple(rng.randrange(size) for size in sizes) for _ in range(4 * MAX_POOL))
            recipes = (*first, *drawn)
        texts: dict[str, tuple[int, ...]] = {}
        for recipe in recipes:
            texts.setdefault(self._text(recipe), recipe)
            if len(texts) >= MAX_POOL:
                break
        return list(texts), list(texts.values())

    def _text(self, recipe: tuple[int, ...]) -> str:
        head, answer, cues, tail, order, layout = (
            self._choices[slot][place][0] for slot, place in zip(SLOTS, recipe, strict=True)
        )
        space = self._space
        values = {
            "original": space.core,
            "subject": space.subject,
            "noun": space.noun,
            "labels_or": labels_joined(order, "or"),
            "labels_comma": ", ".join(order),
            "labels_lines": "\n".join(f"- {label}" for label in order),
            "cues": cue_text(self._cues, order),
            "keys": ", ".join(space.keys),
            "field": space.field,
        }
        body = " ".join(part for part in (head.fill(values).strip(), answer.fill(values).strip()) if part)
        body = "\n".join(part for part in (body, cues.fill(values).strip()) if part)
        parts = [body]
        if space.block:
            parts = [space.block, body] if layout == "before" else [body, space.block]
        text = "\n\n".join(parts)
        ending = tail.fill(values).strip()
        return f"{text}\n{ending}" if ending else text

    # --- choosing --------------------------------------------------------------------------------------------------

    def posterior(self, observations: Sequence[Observation]) -> tuple[Array, Array]:
        """Mean and covariance of the weights given measured texts; texts that are not in the pool are left out."""
        spread = np.full(len(self._prior), _PRIOR_SPREAD**-2)
        spread[0] = _INTERCEPT_SPREAD**-2
        precision = np.diag(spread)
        moment = spread * self._prior
        moment[0] += spread[0] * 0.5
        for seen in observations:
            row = self._index.get(seen.text)
            if row is None:
                continue
            features = self._design[row]
            precision += np.outer(features, features) / seen.variance
            moment += features * (seen.score / seen.variance)
        covariance: Array = np.linalg.inv(precision)
        return covariance @ moment, covariance

    def ranked(
        self, observations: Sequence[Observation], *, count: int, seed_parts: Sequence[str | int]
    ) -> list[tuple[str, str]]:
        """Up to `count` texts to try next with a word on why: every third the best by mean, the rest Thompson draws."""
        mean, covariance = self.posterior(observations)
        rng = np.random.default_rng(seed_number("thompson", *seed_parts))
        tried = {seen.text for seen in observations}
        open_rows = np.array([text not in tried for text in self.texts], dtype=bool)
        expected = self._design @ mean
        factor = np.linalg.cholesky(covariance + 1e-12 * np.eye(len(mean)))
        heads = np.array([recipe[0] for recipe in self._recipes])
        used: dict[int, int] = {}
        picked: list[tuple[str, str]] = []
        while len(picked) < count and bool(open_rows.any()):
            best = len(picked) % 3 == 0
            values = expected if best else self._design @ (mean + factor @ rng.standard_normal(len(mean)))
            # A head that was picked often in this round gives way: the same sentence with other endings says little.
            penalty = np.array([used.get(int(head), 0) for head in heads]) * 0.01
            row = int(np.argmax(np.where(open_rows, values - penalty, -np.inf)))
            open_rows[row] = False
            used[int(heads[row])] = used.get(int(heads[row]), 0) + 1
            picked.append((self.texts[row], f"{self.describe(row)}; expected {expected[row]:.2f}"))
        return picked

    def describe(self, row: int) -> str:
        """The recipe of a text in words, for the report."""
        recipe = self._recipes[row]
        words: list[str] = []
        for slot, place in zip(SLOTS, recipe, strict=True):
            value = self._choices[slot][place][0]
            if isinstance(value, Fragment):
                label = value.name.rsplit(".", 1)[-1]
                if label != "none":
                    words.append(f"{slot} {label}")
            elif slot == "order" and len(value) > 1:
                words.append(f"labels {'/'.join(value)}" if len(value) <= 4 else f"label order {place}")
        return ", ".join(words)
