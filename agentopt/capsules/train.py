"""Training a capsulator: a causal model with a LoRA adapter that writes shorter texts, conditioned on the budget.

    from agentopt.capsules import train
    trained = train.train(samples, model="embedded", reward=train.Reward([reader]))
    trained.save("capsulator")

Three stages: imitate verified capsules; learn to be valid (length, keep spans); learn to be useful. The updates (RLOO,
GRPO, REINFORCE) are in `_updates`, the reward in `_rewards`, the published baseline in `_nano`. Everything is drawn
from the seed: with a reader that is a pure function, equal arguments give equal weights on the same machine, also after
a resume from the checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from agentopt.capsules.counting._tokenizers import resolve_tokenizer
from agentopt.capsules.training import _checkpoint
from agentopt.capsules.training._bernoulli import UnitPolicy, UnitSettings, UnitStep, leave_one_out_changes
from agentopt.capsules.training._nano import nano_loss, repeated, utilities
from agentopt.capsules.training._policy import Policy, Written, memory_explained
from agentopt.capsules.training._readers import CausalReader, MiniLm
from agentopt.capsules.training._rewards import Question, Reader, Reward, RewardSettings, Sample, Score, SoftReader
from agentopt.capsules.training._tasks import Task, draw_tasks, with_target
from agentopt.capsules.training._train_options import STAGES, Budgets, Lora, Sampling, Settings, Stage, Update
from agentopt.capsules.training._trained import Step, Trained, fingerprint, longest_text, quiet
from agentopt.capsules.training._trl import grpo_trainer, reward_function
from agentopt.capsules.training._updates import (
    RunningMean,
    group_normalised,
    leave_one_out,
    tells_nothing,
    token_loss,
    whole_text_loss,
)
from agentopt.errors import RunError, UserError
from agentopt.evaluation import seed_number
from agentopt.weights import load as weights
from agentopt.weights.load import need

__all__ = [
    "STAGES",
    "Budgets",
    "CausalReader",
    "Lora",
    "MiniLm",
    "Question",
    "Reader",
    "Reward",
    "RewardSettings",
    "Sample",
    "Sampling",
    "Score",
    "Settings",
    "SoftReader",
    "Stage",
    "Step",
    "Trained",
    "UnitPolicy",
    "UnitSettings",
    "UnitStep",
    "Update",
    "grpo_trainer",
    "leave_one_out_changes",
    "load",
    "reward_function",
    "train",
]

Progress = Callable[[Step, Trained], None]
_SAVE_EVERY = 50


def train(
    samples: Sequence[Sample],
    *,
    model: str | Path | tuple[Any, Any] | Trained = "embedded",
    reward: Reward | None = None,
    settings: Settings | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a capsulator on `samples`.

    Args:
        samples: Documents with questions, and verified capsules to imitate where there are some.
        model: What `weights.load.model` takes, or (model, tokenizer), or a trained capsulator to go on from. With
            `lora=None`, and when going on, what is given is itself changed.
        reward: What a capsule is worth; needed unless all stages imitate.
        settings: Stages, algorithm, sizes.
        checkpoint: A file that is written every 50 steps and after every stage, and gone on from when it is there.
        progress: Called after every step, with the model as it is then; what it raises ends the run.

    Raises:
        UserError: something given does not fit; the sentence says what.
        RunError: the loss is not finite, or memory ran out.
    """
    settings = settings or Settings()
    if not samples:
        raise UserError("train: found no samples, expected at least one document.")
    if reward is None and any(stage.kind != "sft" and stage.steps for stage in settings.stages):
        raise UserError("train: found no reward, expected one for the stages 'length' and 'quality'.")
    trained = _prepare(model, settings)
    _Run(trained, samples, reward, settings, None if checkpoint is None else Path(checkpoint), progress).go()
    return trained


def load(folder: str | Path, *, device: Any = None) -> Trained | UnitPolicy:
    """A saved capsulator: a trained model's folder, or the JSON file of a unit policy.

    Raises:
        UserError: no capsulator there, or one that cannot be used here.
    """
    path = Path(folder)
    return UnitPolicy.load(path) if path.is_file() else Trained.load(path, device=device)


def _prepare(source: str | Path | tuple[Any, Any] | Trained, settings: Settings) -> Trained:
    """The base model with a fresh adapter, whose random half comes from the seed; or one that was trained already."""
    torch = need("torch")
    if isinstance(source, Trained):
        for name, weight in source.model.named_parameters():
            weight.requires_grad_("lora_" in name or not hasattr(source.model, "peft_config"))
        return dataclasses.replace(source, settings=settings.to_dict(), history=[], notes=[])
    model, tokenizer = source if isinstance(source, tuple) else weights.model(source)
    base = "" if isinstance(source, tuple) else str(source)
    digest = fingerprint(model)
    if settings.lora is None:
        model.requires_grad_(True)
    else:
        peft, config = need("peft"), settings.lora.config()
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed_number("adapter", settings.seed))
            model = peft.get_peft_model(model, config)
    return Trained(model.eval(), tokenizer, base, digest, settings.to_dict())


class _Run:
    """One training run: the stages, one step after the other."""

    def __init__(
        self,
        trained: Trained,
        samples: Sequence[Sample],
        reward: Reward | None,
        settings: Settings,
        checkpoint: Path | None,
        progress: Progress | None,
    ) -> None:
        self.trained, self.samples, self.settings = trained, samples, settings
        self.policy = Policy(trained.model, trained.tokenizer, temperature=settings.sampling.temperature)
        self.reward, self.progress, self.checkpoint = reward, progress, checkpoint
        self.tokenizers = {name: resolve_tokenizer(name) for name in settings.budgets.tokenizers}
        self.baseline = RunningMean()
        self.identity = self._identity()

    # --- stages ------------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """All stages, from the checkpoint when there is one."""
        start = self._resumed()
        for number, stage in enumerate(self.settings.stages):
            done = start.get("step", -1) if number == start.get("stage", -1) else -1
            if number < start.get("stage", 0):
                continue
            self._stage(number, stage, done + 1, start if done >= 0 else {})

    def _stage(self, number: int, stage: Stage, first: int, start: dict[str, Any]) -> None:
        optimizer = self.policy.torch.optim.AdamW(self.policy.trained, lr=stage.rate, weight_decay=0.0)
        if start and self.checkpoint is not None:
            _checkpoint.read(self.checkpoint, self.policy, optimizer, start)
        elif stage.kind != "sft":
            if not self.policy.reference:
                self.policy.freeze_reference()
            self.baseline = RunningMean()
        begun = start.get("stage_calls", self._calls())
        for step in range(first, stage.steps):
            if stage.reader_calls is not None and self._calls() - begun >= stage.reader_calls:
                break
            advice = f"sampling.microbatch (now {self.settings.sampling.microbatch}), group or longest"
            with memory_explained(self.policy.torch, f"training (stage {stage.kind}, step {step})", advice):
                self._step(number, stage, step, optimizer)
            if self.checkpoint is not None and ((step + 1) % _SAVE_EVERY == 0 or step + 1 == stage.steps):
                self._save(number, step, begun, optimizer)
        self._note(stage)

    def _step(self, number: int, stage: Stage, step: int, optimizer: Any) -> None:
        seed = seed_number("step", self.settings.seed, number, step)
        if stage.kind == "sft":
            record = self._imitate(stage, step, seed, optimizer)
        else:
            record = self._reinforce(stage, step, seed, optimizer)
        self.trained.history.append(record)
        if self.progress is not None:
            self.progress(record, self.trained)

    def _note(self, stage: Stage) -> None:
        steps = [step for step in self.trained.history if step.stage == stage.kind]
        texts = self.settings.sampling.documents
        if stage.kind == "sft" or not steps or any(step.dropped < texts for step in steps):
            return
        last = steps[-1]
        why = "all of them were valid" if last.valid == 1 and stage.kind == "length" else "the reward told no two apart"
        self.trained.notes.append(f"stage {stage.kind}: no update in {len(steps)} steps, because {why}.")

    # --- one step ----------------------------------------------------------------------------------------------------

    def _tasks(self, seed: int) -> list[Task]:
        size = self.settings.sampling.documents
        return draw_tasks(self.samples, self.settings.budgets, self.tokenizers, size, seed)

    def _imitate(self, stage: Stage, step: int, seed: int, optimizer: Any) -> Step:
        """Maximum likelihood of verified capsules."""
        tasks = [with_target(task, seed, place) for place, task in enumerate(self._tasks(seed))]
        prompts = [self.policy.prompt_ids(sample.document, meter) for sample, meter, _ in tasks]
        written = self.policy.given(prompts, [target for _, _, target in tasks])

        def loss(part: Written, _rows: slice) -> Any:
            return -self.policy.log_probs(part).sum(1) / part.mask.sum(1)

        value = self._descend(written, loss, optimizer, stage, step)
        return Step("sft", step, stage.steps, value, 0.0, 0.0, 0.0, self._calls(), 0)

    def _reinforce(self, stage: Stage, step: int, seed: int, optimizer: Any) -> Step:
        """Write groups, score them, and move towards what scored better than its group."""
        sampling, reward = self.settings.sampling, self.reward
        assert reward is not None  # checked in train()
        tasks = self._tasks(seed)
        prompts = [self.policy.prompt_ids(sample.document, meter) for sample, meter in tasks]
        longest = max(longest_text(self.policy, sample.document, meter, sampling.longest) for sample, meter in tasks)
        written = self.policy.write(prompts, each=sampling.group, longest=longest, seed=seed)
        if self.settings.algorithm == "nano" and stage.kind == "quality":
            return self._nano(stage, step, seed, tasks, written, optimizer)
        groups = [
            written.texts[place : place + sampling.group] for place in range(0, len(written.texts), sampling.group)
        ]
        quality = stage.kind == "quality"
        scores = [
            reward.scores(sample, texts, meter, seed=seed, quality=quality)
            for (sample, meter), texts in zip(tasks, groups, strict=True)
        ]
        flat = [score for group in scores for score in group]
        mean = sum(score.total for score in flat) / len(flat)
        valid = sum(score.valid for score in flat) / len(flat)
        rows, totals, dropped = self._telling([[score.total for score in group] for group in scores])
        value = kl = 0.0
        if rows:
            value, kl = self._climb(_select(written, rows), totals, stage, step, optimizer)
        return Step(stage.kind, step, stage.steps, value, mean, valid, kl, self._calls(), dropped)

    def _telling(self, groups: Sequence[Sequence[float]]) -> tuple[list[int], list[list[float]], int]:
        """Rows and rewards of the groups that compare something, and how many others there are."""
        rows: list[int] = []
        totals: list[list[float]] = []
        for place, group in enumerate(groups):
            if self.settings.algorithm == "reinforce" or not tells_nothing(group):
                rows += range(place * len(group), (place + 1) * len(group))
                totals.append(list(group))
        return rows, totals, len(groups) - len(totals)

    def _climb(
        self, written: Written, groups: list[list[float]], stage: Stage, step: int, optimizer: Any
    ) -> tuple[float, float]:
        """The policy gradient; gives the loss and the divergence from the reference."""
        torch, policy, update = self.policy.torch, self.policy, self.settings.update
        with torch.no_grad():
            old = torch.cat([policy.log_probs(part) for part, _ in self._parts(written)])
        reference = old
        if update.kl:
            with policy.as_reference():
                reference = torch.cat([policy.log_probs(part) for part, _ in self._parts(written)])
        behind = (old - reference).sum(1)
        advantage = torch.tensor(self._advantages(groups, behind.tolist()), device=policy.device)

        def loss(part: Written, rows: slice) -> Any:
            new = policy.log_probs(part)
            if self.settings.algorithm != "grpo":
                return whole_text_loss(torch, new, old[rows], advantage[rows], update.clip)
            args = (new, old[rows], reference[rows], part.mask, advantage[rows])
            return token_loss(torch, *args, clip=update.clip, kl=update.kl)

        value = 0.0
        for _ in range(update.epochs):
            value = self._descend(written, loss, optimizer, stage, step)
        return value, float(behind.mean())

    def _advantages(self, groups: list[list[float]], behind: list[float]) -> list[float]:
        """One per row. The divergence is part of the reward, except for GRPO, where it is in the loss."""
        if self.settings.algorithm == "grpo":
            return [value for group in groups for value in group_normalised(group)]
        size = len(groups[0])
        penalised = [
            [total - self.settings.update.kl * behind[place * size + row] for row, total in enumerate(group)]
            for place, group in enumerate(groups)
        ]
        if self.settings.algorithm == "reinforce":
            return self.baseline.centred([total for group in penalised for total in group])
        return [value for group in penalised for value in leave_one_out(group)]

    def _nano(
        self, stage: Stage, step: int, seed: int, tasks: Sequence[Task], written: Written, optimizer: Any
    ) -> Step:
        """The published baseline: no log-probability moves, only embeddings."""
        assert self.reward is not None
        size, torch = self.settings.sampling.group, self.policy.torch
        values: list[float] = []
        for place, (sample, meter) in enumerate(tasks):
            values += utilities(self.reward, sample, written.texts[place * size : (place + 1) * size], meter, seed=seed)
        originals = repeated(self.policy, [sample for sample, _ in tasks for _ in range(size)])
        utility = torch.tensor(values, device=self.policy.device)

        def loss(part: Written, rows: slice) -> Any:
            return nano_loss(self.policy, originals.rows(rows.start, rows.stop), part, utility[rows])

        value = self._descend(written, loss, optimizer, stage, step)
        mean = sum(values) / len(values)
        return Step(stage.kind, step, stage.steps, value, mean, 0.0, 0.0, self._calls(), 0)

    def _descend(
        self, written: Written, loss: Callable[[Written, slice], Any], optimizer: Any, stage: Stage, step: int
    ) -> float:
        """One step of the optimizer on the mean of `loss` over all rows, in parts that fit in memory."""
        torch, size = self.policy.torch, len(written.texts)
        optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for part, rows in self._parts(written):
            mean = loss(part, rows).sum() / size
            mean.backward()
            value += float(mean.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.policy.trained, self.settings.update.max_norm))
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise RunError(
                f"stage {stage.kind}, step {step}: the loss is {value} with a gradient of norm {norm}; lower the rate "
                f"(now {stage.rate:g}) or load the model in float32. The last checkpoint is from before."
            )
        optimizer.step()
        return value

    def _parts(self, written: Written) -> Iterator[tuple[Written, slice]]:
        size = self.settings.sampling.microbatch
        for start in range(0, len(written.texts), size):
            end = min(start + size, len(written.texts))
            yield written.rows(start, end), slice(start, end)

    # --- resuming ----------------------------------------------------------------------------------------------------

    def _calls(self) -> int:
        return 0 if self.reward is None else self.reward.calls

    def _identity(self) -> str:
        reward = None if self.reward is None else dataclasses.asdict(self.reward.settings)
        parts = [
            fingerprint(self.trained.model),
            self.settings.to_dict(),
            reward,
            [sample.id for sample in self.samples],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _save(self, stage: int, step: int, begun: int, optimizer: Any) -> None:
        assert self.checkpoint is not None
        state = {
            "identity": self.identity,
            "stage": stage,
            "step": step,
            "stage_calls": begun,
            "baseline": self.baseline.value,
            "reward": None if self.reward is None else self.reward.state(),
            "notes": self.trained.notes,
            "history": [dataclasses.asdict(one) for one in self.trained.history],
        }
        _checkpoint.write(self.checkpoint, self.policy, optimizer, state)

    def _resumed(self) -> dict[str, Any]:
        """The state to go on from; empty for a fresh run."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return {}
        state = _checkpoint.state_of(self.checkpoint)
        if state["identity"] != self.identity:
            raise UserError(
                f"checkpoint {self.checkpoint}: found another run's (other samples, settings, reward or base model); "
                "delete it or name another file."
            )
        self.baseline = RunningMean(state["baseline"])
        if self.reward is not None and state["reward"] is not None:
            self.reward.load_state(state["reward"])
        self.trained.history[:] = [Step(**one) for one in state["history"]]
        self.trained.notes[:] = state["notes"]
        return state


def _select(written: Written, rows: Sequence[int]) -> Written:
    places = list(rows)
    return Written(
        written.ids[places], written.attention[places], written.mask[places], [written.texts[row] for row in places]
    )
