"""Demonstrations: sets of worked examples for the language model calls that read a demos parameter.

The unit is one demos parameter. Items come from training examples alone:
- bootstrapped (as in DSPy's BootstrapFewShot): a rollout with full score, the message its call got and what it replied;
- labelled: when a call's replies are the labels, the message of any training example with its label. The message of
  an example that was not run is written the way the recorded messages were, if their form can be read off.

Sets are balanced over labels, of different sizes and orders; the size that scored well before is drawn more often.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from agentopt.evaluation import seeded
from agentopt.graph import SetDemos
from agentopt.optimizers._data import DataDescription, describe, label_of
from agentopt.optimizers._legal import Proposals, current_value
from agentopt.optimizers._memory import measured
from agentopt.optimizers._protocol import ProposeContext, Update
from agentopt.optimizers._space import call_choices, calls_in

if TYPE_CHECKING:
    from agentopt.evaluation import Example, Rollout
    from agentopt.graph import OpRecord, ParameterSpec

_MAX_CHARS = 1500
"""Longer demonstrations are left out: they push the question out of a small model's sight."""
_TRIES_PER_SET = 12


@dataclass(frozen=True, slots=True)
class Demo:
    """One possible demonstration. `label` is '' when the replies are no labels."""

    input: str
    output: str
    source: str
    label: str = ""
    bootstrapped: bool = False

    def item(self) -> dict[str, str]:
        """The value's form."""
        return {"input": self.input, "output": self.output, "source": self.source}


class Demonstrations:
    """Proposes `SetDemos` edits.

    Args:
        threshold: score from which a rollout counts as a success.
        max_chars: longest message plus reply of one demonstration.
    """

    name = "demonstrations"

    def __init__(self, *, threshold: float = 1.0, max_chars: int = _MAX_CHARS) -> None:
        self._threshold = threshold
        self._max_chars = max_chars

    def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates, each of one demos parameter; [] when no demonstration can be had."""
        specs = [spec for spec in context.specs.values() if spec.kind == "demos"]
        proposals = Proposals(context)
        if not specs:
            return []
        data = describe(context.train)
        stocks = {spec.name: self.stock(context, spec, data) for spec in specs}
        specs = [spec for spec in specs if stocks[spec.name]]
        for place in range(context.count * _TRIES_PER_SET if specs else 0):
            if proposals.full:
                break
            spec = specs[(context.iteration + place) % len(specs)]
            rng = seeded("demos", context.seed, context.iteration, context.parent.hash, spec.name, place)
            items, why = self._draw(context, spec, stocks[spec.name], rng)
            if items:
                proposals.offer(Update((SetDemos(spec.name, [item.item() for item in items]),), why, self.name))
        return proposals.updates

    # --- stock -----------------------------------------------------------------------------------------------------

    def stock(self, context: ProposeContext, spec: ParameterSpec, data: DataDescription | None = None) -> list[Demo]:
        """Every demonstration that can be had for `spec`, in training order, one per message."""
        data = data or describe(context.train)
        train = {example.id: example for example in context.train}
        found: dict[str, Demo] = {}
        messages: list[tuple[str, Mapping[str, Any]]] = []
        spaces: set[tuple[str, ...]] = set()
        graphs = zip(context.rollouts, context.graphs, strict=True)
        for rollout, graph in graphs:
            example = train.get(rollout.example.id)
            if example is None or spec.name not in graph:
                continue
            for op in calls_in(graph[spec.name], spec.name):
                message = last_user_message(op)
                if message is None:
                    continue
                labels = call_choices(op)
                spaces.add(labels)
                messages.append((message, example.inputs))
                demo = self._from_call(rollout, op, message, labels)
                if demo is not None:
                    found.setdefault(demo.input, demo)
        labels = next(iter(spaces)) if len(spaces) == 1 else ()
        if not labels and data.answer == "label" and self._answers_are_labels(context, data):
            labels = data.labels
        for demo in _labelled(context.train, labels, form_of(messages, data)):
            found.setdefault(demo.input, demo)
        order = {example.id: place for place, example in enumerate(context.train)}
        usable = [demo for demo in found.values() if len(demo.input) + len(demo.output) <= self._max_chars]
        return sorted(usable, key=lambda demo: (order[demo.source], demo.input))

    def _from_call(self, rollout: Rollout, op: OpRecord, message: str, labels: Sequence[str]) -> Demo | None:
        reply = reply_text(op)
        label = label_of(rollout.example.expected, labels) if labels else None
        if rollout.row.score >= self._threshold and not rollout.row.error and reply:
            return Demo(message, reply, rollout.example.id, reply if label is not None else "", True)
        if label is not None:
            return Demo(message, label, rollout.example.id, label)
        return None

    @staticmethod
    def _answers_are_labels(context: ProposeContext, data: DataDescription) -> bool:
        """Whether the program answers with labels: most recorded outputs are one (or nothing is recorded)."""
        outputs = [rollout.row.output for rollout in context.rollouts if not rollout.row.error]
        good = sum(isinstance(output, str) and output.strip() in data.labels for output in outputs)
        return not outputs or 2 * good >= len(outputs)

    # --- sets ------------------------------------------------------------------------------------------------------

    def _draw(
        self, context: ProposeContext, spec: ParameterSpec, stock: Sequence[Demo], rng: random.Random
    ) -> tuple[list[Demo], str]:
        present = _present(context, spec, stock)
        if present and rng.random() < 0.5:
            return _changed(present, stock, spec, rng)
        size = _size(context, spec, stock, rng)
        items = balanced_set(stock, size, rng)
        labels = Counter(demo.label for demo in items if demo.label)
        counted = f" ({', '.join(f'{count} {label}' for label, count in sorted(labels.items()))})" if labels else ""
        return items, f"{len(items)} demonstrations{counted}"


def balanced_set(stock: Sequence[Demo], size: int, rng: random.Random) -> list[Demo]:
    """`size` demonstrations, labels as equal in number as possible, taking turns in a seeded label order.

    Within a label, successes of the program come before labelled ones; otherwise the draw is uniform.
    """
    groups: dict[str, list[Demo]] = {}
    for demo in stock:
        groups.setdefault(demo.label, []).append(demo)
    for label in sorted(groups):
        rng.shuffle(groups[label])
        groups[label].sort(key=lambda demo: not demo.bootstrapped)
    order = sorted(groups)
    rng.shuffle(order)
    items: list[Demo] = []
    while len(items) < size and any(groups.values()):
        for label in order:
            if groups[label] and len(items) < size:
                items.append(groups[label].pop(0))
    return items


def sizes_for(spec: ParameterSpec, stock: Sequence[Demo]) -> list[int]:
    """Set sizes worth trying: whole rounds over the labels where they fit, else powers of two; at most `max_items`."""
    limit = min(len(stock), spec.max_items if spec.max_items is not None else 8)
    labels = len({demo.label for demo in stock})
    if 1 < labels <= limit:
        return [labels * rounds for rounds in range(1, limit // labels + 1)]
    return [size for size in (1, 2, 3, 4, 6, 8, 12, 16) if size <= limit]


def _size(context: ProposeContext, spec: ParameterSpec, stock: Sequence[Demo], rng: random.Random) -> int:
    """A size drawn by Thompson sampling over what sets of each size scored so far.

    Before anything is measured smaller sets are somewhat more likely: with a small model which examples are shown
    matters more than how many, and a long set tilts the replies towards one label.
    """
    sizes = sizes_for(spec, stock)
    if not sizes:
        return 0
    scores: dict[int, list[float]] = {size: [] for size in sizes}
    everything: list[float] = []
    for past in context.history:
        score = measured(past)
        for edit in past.update.edits:
            if isinstance(edit, SetDemos) and edit.name == spec.name and score is not None:
                scores.setdefault(len(edit.items), []).append(score)
                everything.append(score)
    overall = sum(everything) / len(everything) if everything else 0.5

    def sampled(size: int) -> float:
        seen = scores[size]
        mean = (sum(seen) + 2 * (overall - 0.03 * sizes.index(size))) / (len(seen) + 2)
        return rng.gauss(mean, 0.12 / (len(seen) + 1) ** 0.5)

    return max(sizes, key=sampled)


def _present(context: ProposeContext, spec: ParameterSpec, stock: Sequence[Demo]) -> list[Demo]:
    """The parent's demonstrations, with their labels where the stock knows them."""
    known = {(demo.input, demo.output): demo for demo in stock}
    value = current_value(context, spec)
    items: list[Demo] = []
    for raw in cast("list[Any]", value) if isinstance(value, list) else []:
        if isinstance(raw, Mapping):
            entry = cast("Mapping[str, Any]", raw)
            text, output = str(entry.get("input", "")), str(entry.get("output", ""))
            plain = Demo(text, output, str(entry.get("source", "")), output if len(output) < 60 else "")
            items.append(known.get((text, output), plain))
    return items


def _changed(
    present: Sequence[Demo], stock: Sequence[Demo], spec: ParameterSpec, rng: random.Random
) -> tuple[list[Demo], str]:
    """A small change of the parent's set: swap one for another of its label, another order, one fewer, or one more."""
    items = list(present)
    taken = {demo.input for demo in items}
    spare = [demo for demo in stock if demo.input not in taken]
    kind = rng.choice(("swap", "swap", "order", "drop", "add"))
    place = rng.randrange(len(items))
    same = [demo for demo in spare if demo.label == items[place].label] or spare
    if kind == "swap" and same:
        items[place] = rng.choice(same)
        return items, f"swaps demonstration {place + 1} for another"
    limit = spec.max_items if spec.max_items is not None else 8
    if kind == "add" and spare and len(items) < limit:
        counts = Counter(demo.label for demo in items)
        rare = min(counts[demo.label] for demo in spare)
        items.insert(rng.randrange(len(items) + 1), rng.choice([d for d in spare if counts[d.label] == rare]))
        return items, "adds a demonstration of the rarest label"
    if kind == "drop" and len(items) > 1:
        del items[place]
        return items, f"drops demonstration {place + 1}"
    rng.shuffle(items)
    return items, "the same demonstrations in another order"


# --- reading recorded calls ------------------------------------------------------------------------------------------


def last_user_message(op: OpRecord) -> str | None:
    """The text of a call's last user turn; None for images, tools' results and calls without messages."""
    messages: Any = (op.meta or {}).get("messages") or op.inputs.get("messages")
    if not isinstance(messages, (list, tuple)):
        user = op.inputs.get("user")
        return user if isinstance(user, str) else None
    for message in reversed(cast("Sequence[Any]", messages)):
        if isinstance(message, Mapping):
            entry = cast("Mapping[str, Any]", message)
            if entry.get("role") == "user":
                content = entry.get("content")
                return content if isinstance(content, str) and content.strip() else None
    return None


def reply_text(op: OpRecord) -> str:
    """A call's reply as text, '' when there is none."""
    output: Any = op.output
    if isinstance(output, Mapping):
        output = cast("Mapping[str, Any]", output).get("text")
    if output is not None and not isinstance(output, str):
        output = getattr(getattr(output, "value", None), "text", None)
    return output.strip() if isinstance(output, str) else ""


Form = tuple[str, ...]
"""A message as literal text and field names in turns: text, field, text, field, ..., text."""


def form_of(messages: Sequence[tuple[str, Mapping[str, Any]]], data: DataDescription) -> Form | None:
    """The form all `messages` share once their example's input fields are taken out; None when they share none.

    Without any recorded message, an example with a single input field is taken to be sent as it is.
    """
    forms = {_form(message, inputs) for message, inputs in messages}
    if len(forms) == 1:
        form = forms.pop()
        return form if form is not None and len(form) > 1 else None
    if not messages and len(data.inputs) == 1:
        return ("", data.inputs[0], "")
    return None


def _form(message: str, inputs: Mapping[str, Any]) -> Form | None:
    fields = sorted(
        ((name, str(value)) for name, value in inputs.items() if isinstance(value, (str, int, float)) and str(value)),
        key=lambda field: -len(field[1]),
    )
    pieces: list[tuple[str, bool]] = [(message, False)]
    for name, value in fields:
        split: list[tuple[str, bool]] = []
        for text, is_field in pieces:
            # A short value may stand in the text by chance; it counts only where it stands alone.
            at = -1 if is_field else text.find(value)
            if at < 0 or (len(value) < 3 and text != value):
                split.append((text, is_field))
            else:
                split.extend([(text[:at], False), (name, True), (text[at + len(value) :], False)])
        pieces = split
    return tuple(text for text, _ in pieces) if len(pieces) > 1 else None


def fill_form(form: Form, inputs: Mapping[str, Any]) -> str | None:
    """The message of an example; None when it lacks a field."""
    parts: list[str] = []
    for place, piece in enumerate(form):
        if place % 2 == 0:
            parts.append(piece)
        elif inputs.get(piece) is None:
            return None
        else:
            parts.append(str(inputs[piece]))
    return "".join(parts)


def _labelled(train: Sequence[Example], labels: Sequence[str], form: Form | None) -> list[Demo]:
    if not labels or form is None:
        return []
    found: list[Demo] = []
    for example in train:
        label = label_of(example.expected, labels)
        message = fill_form(form, example.inputs)
        if label is not None and message and message.strip():
            found.append(Demo(message, label, example.id, label))
    return found
