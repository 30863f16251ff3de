"""Instructions without a language model: texts put together from frames, and a model of which parts score well.

The unit is a recipe: one choice per slot (head, answer, cues, tail, label order, layout, form of the placeholder
lines). All recipes of a parameter (a seeded sample when there are very many) form its pool. Which recipe to try next is
Thompson sampling on an additive model: a recipe's mean score is a sum of one weight per choice, with the frames' priors
as prior means and the measured scores of past proposals as data. So what won in one recipe is crossed with the other
choices by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import numpy as np
import numpy.typing as npt

from agentopt.evaluation import seed_number, seeded
from agentopt.optimizers._legal import headline
from agentopt.optimizers._space import TextSpace, cue_text, labels_joined
from agentopt.optimizers._templates import Fragment, Templates

Array = npt.NDArray[np.float64]

SLOTS = ("head", "answer", "cues", "tail", "order", "layout", "block")
MAX_POOL = 20_000
_MAX_ORDERS = 6
_PRIOR_SPREAD = 0.07
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
        key: str,
        extra_head: str | None = None,
    ) -> None:
        """`key` decides which sample is drawn of a pool that is too large: the same one in every round of a run.

        `extra_head` is a further text to build on (a proposal of another optimizer that became the parent).
        """
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
        self.texts, recipes = self._enumerate(key)
        self._recipes = recipes
        self._index = {text: place for place, text in enumerate(self.texts)}
        # Row r's weights: the intercept (column 0) and one column per slot.
        self._used = np.array(
            [
                [0, *(self._columns[slot, place] for slot, place in zip(SLOTS, recipe, strict=True))]
                for recipe in recipes
            ],
            dtype=np.int32,
        )

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
            if slot == "cue" and space.cue:
                slot = "head"
            elif space.cue:
                continue
            if slot in SLOTS and rest.partition(".")[0] in kinds and self._usable(fragment, slot):
                found[slot].append((fragment, fragment.prior))
        if extra_head is not None:
            found["head"].insert(0, (Fragment("head.any.current", extra_head), 0.02))
        for slot in ("head", "answer", "cues", "tail"):
            if slot != "head" or space.block or space.cue or not found["head"]:
                found[slot].insert(0, (Fragment(f"{slot}.any.none", ""), 0.0))
        found["order"] = [(order, 0.0) for order in self._orders()]
        found["layout"] = [("after", 0.0), ("before", -0.02)] if space.block else [("after", 0.0)]
        found["block"] = [(block, 0.0) for block in self._blocks()]
        return found

    def _usable(self, fragment: Fragment, slot: str) -> bool:
        space = self._space
        if slot == "head" and space.fixed and "original" not in fragment.placeholders:
            return False
        if slot == "head" and not space.core and "original" in fragment.placeholders:
            return False
        if slot == "tail" and (space.fixed or not space.block):
            return False  # the end of a system message is not where the answer begins
        return not ("cues" in fragment.placeholders and not cue_text(self._cues, space.labels))

    def _blocks(self) -> list[str]:
        """Forms of the placeholder lines: as they are, and under other headings when there is one placeholder."""
        space = self._space
        if not space.variable:
            return [space.block]
        place = "{" + space.variable + "}"
        last = space.subject.split()[-1]
        headings = dict.fromkeys([headline(space.subject), headline(last), space.field, "Text", "Sentence", "Input"])
        forms = [space.block, place, *(f"{heading}: {place}" for heading in headings)]
        return list(dict.fromkeys(forms))

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

    def _enumerate(self, key: str) -> tuple[list[str], list[tuple[int, ...]]]:
        sizes = [len(self._choices[slot]) for slot in SLOTS]
        total = int(np.prod(sizes))
        if total <= MAX_POOL:
            recipes: Iterable[tuple[int, ...]] = product(*map(range, sizes))
        else:
            rng = seeded("frames", key, self._space.name)
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
        head, answer, cues, tail, order, layout, block = (
            self._choices[slot][place][0] for slot, place in zip(SLOTS, recipe, strict=True)
        )
        space = self._space
        values = {
            "original": space.core,
            "subject": space.subject,
            "subject_title": headline(space.subject),
            "noun": space.noun,
            "noun_title": headline(space.noun),
            "labels_or": labels_joined(order, "or"),
            "labels_comma": ", ".join(order),
            "labels_lines": "\n".join(f"- {label}" for label in order),
            "cues": cue_text(self._cues, order),
            "keys": ", ".join(space.keys),
            "field": space.field,
        }
        body = " ".join(part for part in (head.fill(values).strip(), answer.fill(values).strip()) if part)
        body = "\n".join(part for part in (body, cues.fill(values).strip()) if part)
        parts = [block, body] if layout == "before" else [body, block]
        text = "\n\n".join(part for part in parts if part)
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
            used = self._used[row]
            precision[np.ix_(used, used)] += 1.0 / seen.variance
            moment[used] += seen.score / seen.variance
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
        expected = mean[self._used].sum(axis=1)
        factor = np.linalg.cholesky(covariance + 1e-12 * np.eye(len(mean)))
        heads = self._used[:, 1]
        penalty: Array = np.zeros(len(mean))
        picked: list[tuple[str, str]] = []
        while len(picked) < count and bool(open_rows.any()):
            best = len(picked) % 3 == 0
            weights = mean + factor @ rng.standard_normal(len(mean))
            values = expected if best else weights[self._used].sum(axis=1)
            # A head that was picked often in this round gives way: the same sentence with other endings says little.
            row = int(np.argmax(np.where(open_rows, values - penalty[heads], -np.inf)))
            open_rows[row] = False
            penalty[heads[row]] += 0.01
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
            elif slot == "block" and place:
                words.append(f"input as {value!r}")
        return ", ".join(words)
