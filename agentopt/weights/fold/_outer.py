"""The outer loop: meta-training of where folding starts, how far its steps go, and what it recalls.

One step draws knowledge bases, folds each by the inner loop with its graph, asks questions without the facts in the
prompt, and follows the gradient of the answers' loss through the inner steps (RECKONING, arXiv 2305.06349). The loss is
the answers' cross-entropy; in the multi-task form also that of the relevant facts, which the model recalls before it
answers, while the inner loop has seen all facts: that is what makes it keep distractors apart. With a guard, the
divergence from the base on unrelated prompts is added.

Every draw is a function of the seed and the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agentopt.errors import RunError
from agentopt.evaluation import seed_number
from agentopt.weights.finetuning import Stop
from agentopt.weights.fold import _events as events
from agentopt.weights.fold._encoding import Pick
from agentopt.weights.fold._guard import Guard
from agentopt.weights.fold._kit import Kit
from agentopt.weights.fold._measuring import Measured, measure
from agentopt.weights.fold._run_folder import BEST, CHECKPOINT, RunFolder
from agentopt.weights.fold._types import FoldTask, MetaOptions
from agentopt.weights.load import need
from agentopt.weights.zeroth._schedule import Schedule

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_ENOUGH = 10
"""Steps in a row whose gradient is no number, after which the run fails."""

_ADVICE = "use a lower inner lr (--inner-lr), rule normalized (--rule normalized) or a lower outer lr (--lr)"

Tell = Callable[[events.Event], None]


@dataclass(slots=True)
class Course:
    """What was seen so far; part of the checkpoint."""

    step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Validations, in order."""
    warnings: list[str] = field(default_factory=list[str])
    bad: int = 0
    """Steps in a row without a usable gradient."""
    seconds: float = 0.0

    @property
    def best_step(self) -> int:
        """Of the best validation; 0 before the first."""
        best = max(self.curve, key=_rank, default=None)
        return int(best["step"]) if best else 0

    @property
    def since_best(self) -> int:
        """Validations after the best one."""
        return sum(point["step"] > self.best_step for point in self.curve)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {name: getattr(self, name) for name in ("step", "curve", "warnings", "bad", "seconds")}


def _rank(point: Mapping[str, Any]) -> tuple[float, float, float]:
    """More right answers, then more exact recall, then the lower loss."""
    return point["accuracy"], point["recall_exact"] or 0.0, -point["loss"]


class Outer:
    """One meta-training run.

    Args:
        kit: what is trained.
        tasks: to train on.
        val: to choose by.
        options: how.
        guard: unrelated prompts; None without the guard.
        folder: where it is kept; None for nowhere.
        tell: told of everything.
        stop: looked at after every step.
    """

    def __init__(
        self,
        kit: Kit,
        tasks: Sequence[FoldTask],
        val: Sequence[FoldTask],
        options: MetaOptions,
        guard: Guard | None,
        folder: RunFolder | None,
        tell: Tell,
        stop: Stop,
    ) -> None:
        self.torch = need("torch")
        self.kit, self.tasks, self.options, self.guard, self.folder, self.stop = (
            kit,
            tasks,
            options,
            guard,
            folder,
            stop,
        )
        self.val = val[: options.eval_tasks]
        self._tell = tell
        self.course = Course()
        self.schedule = Schedule(options.schedule, options.warmup, options.steps)
        self.named = {name: tensor for name, tensor in kit.named().items() if tensor.requires_grad}
        self.optimizer, self.rates = self._optimizer()
        self._best: dict[str, Any] | None = None
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def _optimizer(self) -> tuple[Any, list[float]]:
        options = self.options
        rates = {
            "init": options.lr,
            "token_weights": options.lr,
            "rates": 10 * options.lr if options.rates_lr is None else options.rates_lr,
            "shared": options.lr if options.base_lr is None else options.base_lr,
        }
        if self.kit.options.adapts == "all":
            rates["init"] = rates["shared"]  # the start of what is adapted is the base itself
        groups: list[dict[str, Any]] = []
        for kind, lr in rates.items():
            tensors = [tensor for name, tensor in self.named.items() if name.partition("/")[0] == kind]
            decay = 0.0 if kind == "rates" else options.weight_decay
            groups += [{"params": tensors, "lr": lr, "weight_decay": decay}] if tensors else []
        return self.torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8), [group["lr"] for group in groups]

    def tell(self, event: events.Event) -> None:
        """Write an event and show it."""
        if self.folder is not None:
            self.folder.write(event)
        self._tell(event)

    def warn(self, message: str) -> None:
        """Tell what the user should know, once."""
        if message not in self.course.warnings:
            self.course.warnings.append(message)
            self.tell(events.Warned(message))

    # --- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Steps until the end or an early stop, then the best meta-parameters again; the reason for stopping.

        Raises:
            RunError: losses that are no numbers; a disk that is full.
            KeyboardInterrupt: `stop.wanted` was set.
        """
        options = self.options
        self._validate_if_due()  # a run that was ended while it validated
        while self.course.step < options.steps and self._patient():
            self._step()
            self._validate_if_due()
            if self.stop.wanted:
                self._keep()
                raise KeyboardInterrupt
        reason = f"all {options.steps} steps done"
        if not self._patient():
            reason = f"{options.patience} validations without a better one"
        self._to_best()
        return reason

    def _validate_if_due(self) -> None:
        step, curve = self.course.step, self.course.curve
        due = step and (step % self.options.eval_every == 0 or step == self.options.steps)
        if due and (not curve or curve[-1]["step"] != step):
            self._keep()
            self._validate()

    def _patient(self) -> bool:
        return self.options.patience == 0 or self.course.since_best < self.options.patience

    def _step(self) -> None:
        course = self.course
        started = time.perf_counter()
        for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = self.schedule.lr(course.step, base)
        self.stop.busy = True
        try:
            sums, norm, wrong = self._gradient()
            if not wrong:
                self.optimizer.step()
                course.bad = 0
            else:
                self._bad_step(wrong)
        finally:
            self.stop.busy = False
        course.step += 1
        seconds = time.perf_counter() - started
        course.seconds += seconds
        if not wrong:
            recall = sums[2] if self.kit.options.multi_task else None
            guarded = sums[3] if self.guard is not None else None
            lr = self.optimizer.param_groups[0]["lr"]
            self.tell(events.Stepped(course.step, sums[0], sums[1], recall, guarded, lr, norm, round(seconds, 6)))

    def _gradient(self) -> tuple[list[float], float, str]:
        """Losses (all, answers, recall, guard), norm of the meta-gradient, and what is wrong with it, if anything."""
        options = self.options
        self.optimizer.zero_grad(set_to_none=True)
        sums = [0.0] * 4
        for part in range(options.accumulate):
            picks = self._draw(part)
            try:
                losses = self._losses(picks, part)
            except RunError as error:  # the inner loop left the numbers
                tasks = ", ".join(repr(pick.task.id) for pick in picks[:8])
                return sums, math.nan, f"{error} The documents are the tasks {tasks}{', ...' * (len(picks) > 8)}."
            (losses[0] / options.accumulate).backward()
            found = [float(one.detach()) / options.accumulate for one in losses]
            sums = [one + two for one, two in zip(sums, found, strict=True)]
        norm = float(self.torch.nn.utils.clip_grad_norm_(list(self.named.values()), options.clip))
        return sums, norm, "" if math.isfinite(norm + sums[0]) else "The meta-gradient is no number."

    def _bad_step(self, wrong: str) -> None:
        self.course.bad += 1
        step = self.course.step + 1
        if not any(" is left out. " in message for message in self.course.warnings):
            self.warn(f"step {step} is left out. {wrong}")
        if self.course.bad >= _ENOUGH:
            raise RunError(f"meta-training: {_ENOUGH} steps in a row (to step {step}) failed; {_ADVICE}. {wrong}")

    def _losses(self, picks: Sequence[Pick], part: int) -> tuple[Any, Any, Any, Any]:
        """Of one batch: all, answers, recalled facts, guard."""
        kit = self.kit
        state = kit.folded([pick.facts for pick in picks], graph=True)
        answer, recall = kit.losses(state, kit.encoder.questions(picks))
        total = answer
        if kit.options.multi_task:
            rows = kit.row_loss(state, picks) if kit.options.fact_share else 0.0
            total = total + kit.options.recall_weight * (recall + kit.options.fact_share * rows)
        guarded = answer.new_zeros(())
        if self.guard is not None:
            guarded = self.guard.divergence(state, len(picks), self.course.step, part)
            total = total + kit.options.guard_weight * guarded
        return total, answer, recall, guarded

    def _draw(self, part: int) -> list[Pick]:
        """The knowledge bases of this step: each once in an epoch, their facts in a new order every time."""
        options = self.options
        first = (self.course.step * options.accumulate + part) * options.documents
        picks: list[Pick] = []
        for position in range(first, first + options.documents):
            epoch, place = divmod(position, len(self.tasks))
            task = self.tasks[self._order(epoch)[place]]
            draw = _generator("fold-pick", options.seed, position)
            questions = draw.permutation(len(task.questions))[: options.questions].tolist()
            picks.append(Pick(task, tuple(draw.permutation(len(task.facts)).tolist()), tuple(questions)))
        return picks

    def _order(self, epoch: int) -> list[int]:
        if self._shuffled[0] != epoch:
            draw = _generator("fold-epoch", self.options.seed, epoch)
            self._shuffled = epoch, draw.permutation(len(self.tasks)).tolist()
        return self._shuffled[1]

    # --- validation --------------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        step, course = self.course.step, self.course
        found = self.measured(f"validating after step {step}")
        if not math.isfinite(found.loss):
            raise RunError(f"meta-training: the validation loss after step {step} is no number; {_ADVICE}.")
        event = events.Validated(
            step=step,
            accuracy=found.scores.accuracy,
            recall_exact=found.scores.recall_exact,
            recall_set=found.scores.recall_set,
            recall=found.recall,
            loss=found.loss,
            best=False,
        )
        point = event.to_dict()
        point.pop("kind")
        course.curve.append(point)
        point["best"] = course.best_step == step
        self.tell(events.Validated(**point))
        if point["best"]:
            self._keep_best()
        self._keep()

    def measured(self, what: str) -> Measured:
        """The validation tasks, folded and asked."""

        def tell(done: int) -> None:
            self._tell(events.Working(what, done, len(self.val)))

        return measure(self.kit, self.val, questions=self.options.questions, tell=tell)

    # --- files -------------------------------------------------------------------------------------------------------

    def _keep_best(self) -> None:
        if self.folder is None:
            self._best = self.kit.meta.state_dict()
        else:
            self.folder.put(BEST, self.kit.meta.state_dict(), {"step": self.course.step})

    def _keep(self) -> None:
        """Write the checkpoint to resume from."""
        if self.folder is None:
            return
        tensors = {f"meta/{name}": value for name, value in self.kit.meta.state_dict().items()}
        for name, tensor in self.named.items():
            moments = self.optimizer.state.get(tensor, {})
            tensors |= {f"{moment}/{name}": moments[moment].clone() for moment in _MOMENTS if moment in moments}
        self.folder.put(CHECKPOINT, tensors, self.course.to_dict())

    def resume(self) -> int:
        """Go on from the checkpoint when there is one; the steps that were done."""
        if self.folder is None:
            return 0
        kept = self.folder.get(CHECKPOINT)
        if kept is None:
            self.folder.go_on(0)
            return 0
        tensors, state = kept
        self.course = Course(**state)
        own = {name.removeprefix("meta/"): value for name, value in tensors.items() if name.startswith("meta/")}
        self.kit.meta.load_state_dict(own)
        for name, tensor in self.named.items():
            moments = {moment: tensors[f"{moment}/{name}"] for moment in _MOMENTS if f"{moment}/{name}" in tensors}
            if moments:
                on = {moment: moments[moment].to(tensor.device) for moment in _MOMENTS[:2]}
                self.optimizer.state[tensor] = {**on, "step": moments["step"]}
        self.folder.go_on(self.course.step)
        return self.course.step

    def _to_best(self) -> None:
        """The meta-parameters of the best validation."""
        if self.folder is not None:
            kept = self.folder.get(BEST)
            self._best = None if kept is None else kept[0]
        if self._best is not None and self.course.best_step != self.course.step:
            self.kit.meta.load_state_dict(self._best)
        self._best = None


def _generator(*parts: str | int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed_number(*parts)))
