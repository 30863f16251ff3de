"""One run from options to a checked model: plan, baselines, training, the claim, files.

Training is one loop over steps. A step is either measured, or applied again from the log when the log has it; what was
validated before is read from events.jsonl. So a resumed run takes the same decisions as one that was never interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentopt.weights.finetuning import _events as events
from agentopt.weights.finetuning import _saving as saving
from agentopt.weights.finetuning._claim import make_claim, nothing_better
from agentopt.weights.finetuning._counting import counted
from agentopt.weights.finetuning._folder import (
    BASELINES,
    LOG,
    REPORT,
    RESULT,
    RunFolder,
    read_json,
    write_json,
    write_text,
)
from agentopt.weights.finetuning._material import PRIOR_ROWS, Baselines, Material
from agentopt.weights.finetuning._memory import check_room, explained, peak_memory
from agentopt.weights.finetuning._options import FIRST_ORDER, FinetuneOptions, portable
from agentopt.weights.finetuning._rate import find_rate
from agentopt.weights.finetuning._report import render
from agentopt.weights.finetuning._result import FinetuneResult
from agentopt.weights.finetuning._subject import Subject, prepare
from agentopt.weights.finetuning._trainers import Trainer, make_trainer, rate_of
from agentopt.weights.finetuning._watch import Watch
from agentopt.weights.finetuning._zeroth import cautions
from agentopt.weights.load import need
from agentopt.weights.zeroth._types import Exchange

OnEvent = Callable[[events.Event], None]


@dataclass
class Stop:
    """How a caller ends a run: `wanted` is looked at after every step."""

    wanted: bool = False
    busy: bool = False
    """A step is being made: it ends before the run does."""


@dataclass
class Course:
    """Where the training is, and what was seen on the way; filled from events.jsonl on a resume."""

    best_step: int = 0
    best: tuple[float, float] = (-math.inf, -math.inf)
    lowest: float = math.inf
    since_best: int = 0
    validated: dict[int, tuple[float, float]] = field(default_factory=dict[int, tuple[float, float]])
    stepped: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    rate: float | None = None
    reason: str = ""
    """Why this rate, when it was measured."""
    memory: int = 0
    warnings: list[str] = field(default_factory=list[str])

    @classmethod
    def read(cls, folder: RunFolder) -> Course:
        """What earlier parts of the run have seen."""
        course = cls()
        for event in folder.events():
            if event["kind"] == "validated":
                course.validated[event["step"]] = (event["score"], event["loss"])
            elif event["kind"] == "stepped":
                course.stepped[event["step"]] = event
                course.memory = max(course.memory, event["memory"])
            elif event["kind"] == "rate_found":
                course.rate, course.reason = event["lr"], event["reason"]
            elif event["kind"] == "warned":
                course.warnings.append(event["message"])
        return course

    def judge(self, step: int, score: float, loss: float) -> bool:
        """Take a validation; whether it is the best so far: the higher score, and of equal ones the lower loss."""
        best, lower = (score, -loss) > self.best, loss < self.lowest
        if best:
            self.best, self.best_step = (score, -loss), step
        self.lowest = min(self.lowest, loss)
        # Scores of few rows stand still while the loss still falls: that is no reason to give up.
        self.since_best = 0 if best or lower else self.since_best + 1
        return best

    @property
    def seconds(self) -> float:
        """Of all measured steps."""
        return sum(event["seconds"] for event in self.stepped.values())

    def curve(self, baselines: Baselines) -> list[dict[str, float]]:
        """Validations in order, the untrained model first."""
        start = {0: (baselines.validation["zero-shot"], baselines.loss)}
        points = sorted((start | self.validated).items())
        return [{"step": step, "score": score, "loss": loss} for step, (score, loss) in points]


class Run:
    """A run that owns its folder."""

    def __init__(
        self, options: FinetuneOptions, folder: RunFolder, on_event: OnEvent, stop: Stop, exchange: Exchange | None
    ) -> None:
        self.options, self.folder, self.stop, self.exchange = options, folder, stop, exchange
        self._on_event = on_event
        self.course = Course.read(folder)
        self.warnings = self.course.warnings

    # --- telling -----------------------------------------------------------------------------------------------------

    def tell(self, event: events.Event) -> None:
        """Write and show an event."""
        self.folder.write(event)
        self._on_event(event)

    def working(self, what: str, done: int = 0, total: int | None = None) -> None:
        """Show what is being done; not kept."""
        self._on_event(events.Working(what, done, total))

    def warn(self, message: str) -> None:
        """Tell and remember."""
        if message not in self.warnings:
            self.warnings.append(message)
            self.tell(events.Warned(message))

    # --- the course --------------------------------------------------------------------------------------------------

    def go(self, *, resumed: bool) -> FinetuneResult:
        """From the rows to result.json."""
        options = self.options
        self.working("reading the rows")
        material = Material.load(options)  # before torch is loaded: what is wrong with them is said at once
        threads((self.folder.saved() or {}).get("threads"))
        self.working(f"loading {options.model}")
        with explained("loading the model", options):
            subject = prepare(options)
        material.encode(subject.tokenizer, context_of(subject))
        self.folder.describe(options, base=subject.base_hash, data=material.identity, threads=threads())
        rate = self.course.rate or rate_of(options, subject.trained_count())
        self.tell(self._plan(subject, material, rate))
        for message in (*material.notes, *cautions(options)):
            self.warn(message)
        check_room(options, subject.device, trained=subject.trained_count(), weight_bytes=subject.weight_bytes)
        with self._explained("measuring the baselines", subject, material):
            baselines = self._baselines(subject, material)
        self.course.judge(0, baselines.validation["zero-shot"], baselines.loss)
        if rate is None:
            with self._explained("trying learning rates", subject, material):
                rate = self._find_rate(subject, material)
        if self.exchange is not None:
            self.exchange.gather([rate])
        trainer = make_trainer(
            subject, options, self.folder.path, lr=rate, data=material.identity, exchange=self.exchange
        )
        try:
            with self._explained("training", subject, material):
                reason = self._train(trainer, subject, material, rate, resumed=resumed)
        finally:
            trainer.close()
        return self._finish(trainer, subject, material, baselines, rate, reason)

    def _explained(self, doing: str, subject: Subject, material: Material) -> Any:
        return explained(doing, self.options, weight_bytes=subject.weight_bytes, longest=material.longest)

    def _plan(self, subject: Subject, material: Material, rate: float | None) -> events.Planned:
        from agentopt.weights.finetuning._zeroth import chosen, forwards_per_step, settings

        options = self.options
        first = options.first_order
        return events.Planned(
            model=options.model,
            method=options.method,
            description=FIRST_ORDER[options.method] if first else chosen(options).summary,
            tune=options.weights,
            metric=material.metric,
            rows=material.rows,
            split=options.val is None,
            labels=material.labels,
            truncated=material.truncated,
            trained=subject.trained_count(),
            total=subject.total,
            weight_bytes=subject.weight_bytes,
            steps=options.steps,
            forwards_per_step=None if first else forwards_per_step(options),
            batch=options.batch,
            workers=options.workers,
            lr=rate,
            eps=None if first else settings(options)["eps"],
        )

    def _baselines(self, subject: Subject, material: Material) -> Baselines:
        """Measured once, kept in a file: a resume must not depend on measuring them again."""
        path = self.folder.path / BASELINES
        saved = read_json(path)
        if saved is None:
            total = len(material.val) + len(material.test) + min(PRIOR_ROWS, len(material.train))
            with counted(subject.model, self.working, "measuring baselines", total):
                found = material.baselines(subject.model)
            write_json(path, found.to_dict())
        else:
            found = Baselines.from_dict(saved)
        self.tell(events.BaselinesDone(found.validation, found.loss))
        return found

    def _find_rate(self, subject: Subject, material: Material) -> float:
        self.working("trying learning rates")
        found = find_rate(subject, material, self.options, self.working)
        self.course.reason = found.reason
        self.tell(events.RateFound(found.recommended, found.reason, found.clear, found.table(), found.forwards))
        if not found.clear:
            self.warn(f"--lr auto: {found.reason}.")
        return found.recommended

    # --- training ----------------------------------------------------------------------------------------------------

    def _train(self, trainer: Trainer, subject: Subject, material: Material, rate: float, *, resumed: bool) -> str:
        """Steps until the end or an early stop; the reason for stopping."""
        options = self.options
        kept = trainer.open()
        if resumed and kept:
            self.tell(events.Resumed(kept))
        watch = Watch(options, rate, trainer.eps, material.labels_in_train)
        for step in sorted(step for step in self.course.validated if step <= trainer.begin):
            self.course.judge(step, *self.course.validated[step])
        for step in range(trainer.begin + 1, options.steps + 1) if self._patient() else ():
            self._step(trainer, watch, step, subject, material)
            if step % options.eval_every == 0 or step == options.steps:
                best = self._validate(watch, step, subject, material)
                trainer.keep(best=best)
                if not trainer.agree(self._patient()):
                    break
            self._stop_if_wanted()
        if self._patient():
            return f"all {options.steps} steps done"
        return f"{options.patience} validations without a better one"

    def _patient(self) -> bool:
        return self.options.patience == 0 or self.course.since_best < self.options.patience

    def _step(self, trainer: Trainer, watch: Watch, step: int, subject: Subject, material: Material) -> None:
        """Measure one step, or apply it again from the log."""
        if trainer.again(step):
            before = self.course.stepped.get(step)
            if before is not None:
                watch.losses.append(before["loss"])
            return
        start = time.perf_counter()
        self.stop.busy = True
        try:
            measured = trainer.step(step, material)
        finally:
            self.stop.busy = False
        event = events.Stepped(
            step,
            measured.loss,
            measured.lr,
            measured.equal or not measured.moved,
            round(time.perf_counter() - start, 6),
            max(self.course.memory, peak_memory(subject.device)),
        )
        self.course.memory = event.memory
        if math.isfinite(event.loss):
            self.course.stepped[step] = event.to_dict()
            self.tell(event)
        warning = watch.see(measured.loss, equal=measured.equal, moved=measured.moved, step=step)
        if warning:
            self.warn(warning)

    def _validate(self, watch: Watch, step: int, subject: Subject, material: Material) -> bool:
        known = self.course.validated.get(step)
        if known is None:
            with counted(subject.model, self.working, f"validating after step {step}", len(material.val)):
                known = material.validate(subject.model)
            best = self.course.judge(step, *known)
            if self.course.validated and known == list(self.course.validated.values())[-1]:
                watch.nothing_moved()
            self.course.validated[step] = known
            self.tell(events.Validated(step, *known, best))
            return best
        return self.course.judge(step, *known)

    def _stop_if_wanted(self) -> None:
        if self.stop.wanted:
            raise KeyboardInterrupt

    # --- the end -----------------------------------------------------------------------------------------------------

    def _finish(
        self,
        trainer: Trainer,
        subject: Subject,
        material: Material,
        baselines: Baselines,
        rate: float,
        reason: str,
    ) -> FinetuneResult:
        """The best weights again, the test rows once, the files, and what was written loaded back."""
        options, path, best = self.options, self.folder.path, self.course.best_step
        steps = max(self.course.validated, default=0)
        checked = usage = ""
        if best:
            subject, tuned = self._best(trainer, subject, material, rate, steps)
            count = counted(subject.model, self.working, "testing the best model", len(material.test))
            with self._explained("testing", subject, material), count:
                scores = material.scores(subject.model)
            claim = make_claim(scores, baselines.to_beat(), unit=material.metric, seed=options.seed)
            checked = self._save(trainer, subject, material)
            usage = saving.usage(path, options)
            validation = {**baselines.validation, "tuned": tuned}
            test = {**_means(baselines.test), "tuned": sum(scores) / len(scores)}
        else:
            claim = nothing_better(len(material.test))
            validation, test = dict(baselines.validation), {}
        result = FinetuneResult(
            folder=str(path),
            model=options.model,
            method=options.method,
            tune=options.weights,
            metric=material.metric,
            claim=claim,
            validation=validation,
            test=test,
            lr=rate,
            eps=trainer.eps,
            best_step=best,
            steps_done=steps,
            stop_reason=reason,
            forwards=steps * trainer.cost,
            seconds=self.course.seconds,
            memory=max(self.course.memory, peak_memory(subject.device)),
            log_bytes=(path / LOG).stat().st_size if (path / LOG).exists() else 0,
            checked=checked,
            usage=usage,
            curve=self.course.curve(baselines),
            warnings=self.warnings,
            options=portable(options),
            rows=material.rows,
            rate=self.course.reason,
        )
        write_text(path / REPORT, render(result))
        write_json(path / RESULT, result.to_dict())
        self.tell(events.Finished(claim.to_dict(), reason, best, self.warnings))
        trainer.clean()
        return result

    def _best(
        self, trainer: Trainer, subject: Subject, material: Material, rate: float, steps: int
    ) -> tuple[Subject, float]:
        """The weights of the best validation: those at hand, or made again from the base and the log."""
        best = self.course.best_step
        if best != steps:
            self.working(f"going back to step {best}")
            subject = trainer.at_best(best)
        return subject, self.course.validated[best][0]

    def _save(self, trainer: Trainer, subject: Subject, material: Material) -> str:
        """Write the model, let go of it, load it back; what was compared."""
        options, path = self.options, self.folder.path
        self.working("writing the model")
        expected = material.sample(subject.model)
        digest = saving.digest(subject)
        saving.save(subject, path)
        if options.merge:
            saving.save_merged(subject, path)
        trainer.release()
        self.working("loading it back")
        return saving.check(path, options, expected, digest, material.sample)


def context_of(subject: Subject) -> int | None:
    """Tokens that the model reads; None when it does not say."""
    found: Any = getattr(subject.inner.config, "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def threads(wanted: int | None = None) -> int:
    """The threads of torch, after setting them where wanted: a sum split among more of them is another sum."""
    torch = need("torch")
    if wanted is not None and wanted != torch.get_num_threads():
        torch.set_num_threads(wanted)
    return torch.get_num_threads()


def _means(scores: dict[str, list[float]]) -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in scores.items()}


def finished(folder: Path) -> FinetuneResult | None:
    """The result of a run that is done; None while it is not."""
    saved = read_json(folder / RESULT)
    return None if saved is None else FinetuneResult.from_dict(saved)
