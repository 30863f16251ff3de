"""The rows of a run: three parts, encoded for the model, and everything that is measured on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from agentopt.errors import UserError
from agentopt.evaluation import MIN_TEST_ROWS, overlap, seed_number
from agentopt.weights import tasks
from agentopt.weights.finetuning._options import FinetuneOptions
from agentopt.weights.load import need

MOST_TOKENS = 512
HELD_OUT = 32
"""Validation rows that the learning-rate test looks at."""
PRIOR_ROWS = 256
"""Training rows from which the labels' prior is matched."""
SAMPLE = 8
"""Test rows whose log-probabilities are compared after loading back."""
NAMES = {"zero_shot": "zero-shot", "majority": "majority", "calibrated": "calibrated", "prior": "prior-matched"}


@dataclass(frozen=True)
class Baselines:
    """What can be had without training."""

    validation: dict[str, float]
    """Name to mean score."""
    loss: float
    """Of the untrained model on validation."""
    test: dict[str, list[float]]
    """Name to the score of every test row."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Baselines:
        """The inverse of `to_dict`."""
        return cls(**data)

    def to_beat(self) -> dict[str, list[float]]:
        """Test scores of the untrained model and of the calibration that validation prefers."""
        calibrations = [name for name in ("calibrated", "prior-matched") if name in self.validation]
        names = ["zero-shot"]
        if calibrations:
            names.append(max(calibrations, key=lambda name: self.validation[name]))
        return {name: self.test[name] for name in names}


@dataclass
class Material:
    """Train, validation and test rows."""

    options: FinetuneOptions
    train: tasks.TaskData
    val: tasks.TaskData
    test: tasks.TaskData
    notes: list[str] = field(default_factory=list[str])
    encoded: dict[str, tasks.Encoded] = field(default_factory=dict[str, tasks.Encoded])
    tokenizer: Any = None
    _batches: tasks.Batches | None = None

    @classmethod
    def load(cls, options: FinetuneOptions) -> Material:
        """Read the files, and split when there is one.

        Raises:
            UserError: the file, the row, what was found, what was expected.
        """
        for option, path in (("data", options.data), ("val", options.val), ("test", options.test)):
            if path is not None and not Path(path).is_file():
                found = "found a folder" if path and Path(path).is_dir() else "no such file"
                raise UserError(f"--{option} {path!r}: {found}; give a JSONL file of rows (see docs/finetune.md).")
        whole = tasks.load_task(options.data, kind=options.kind, prompt=options.prompt, labels=options.labels)
        if options.val is None or options.test is None:
            train, val, test = whole.split(seed=options.seed)
            material = cls(options, train, val, test)
        else:
            known: dict[Any, str] | None = dict(zip(whole.labels, whole.words, strict=True)) or None
            val, test = (
                tasks.load_task(path, kind=whole.kind, prompt=options.prompt, labels=known)
                for path in (options.val, options.test)
            )
            material = cls(options, whole, val, test)
            material._leave_leaks_out()
        material._check()
        return material

    def _leave_leaks_out(self) -> None:
        """A claim is about rows that nothing was chosen by: others are no test rows."""
        shared = {*overlap(self.train.dataset, self.test.dataset), *overlap(self.val.dataset, self.test.dataset)}
        kept = [number for number, row in enumerate(self.test.rows) if row.id not in shared]
        if not kept:
            raise UserError(
                f"--test {self.options.test!r}: all of its rows are in --data or --val too; give rows that are in "
                "neither, or leave --val and --test out and --data is split."
            )
        if shared:
            gone = len(self.test) - len(kept)
            self.notes.append(f"{gone} test rows are left out, because they are training or validation rows too.")
            self.test = self.test.take(kept)
        seen = overlap(self.train.dataset, self.val.dataset)
        if seen:
            self.notes.append(
                f"{len(seen)} rows are in both train and validation: validation sees what was learned by heart as gain."
            )

    def _check(self) -> None:
        options = self.options
        if self.train.kind == "classification":
            answers = {row.answer for row in self.train.rows}
            absent = [label for number, label in enumerate(self.train.labels) if number not in answers]
            if absent:
                shown = ", ".join(map(repr, absent[:5])) + (", ..." if len(absent) > 5 else "")
                self.notes.append(f"no training row has the label {shown}: its word is only trained against.")
        texts = self.train.kind == "generation" or options.objective not in ("loss", "accuracy")
        if not texts and options.new_tokens != FinetuneOptions.model_fields["new_tokens"].default:
            raise UserError(
                f"--new-tokens is for answers that the model writes; these rows are {self.train.kind} and the "
                f"objective is {options.objective}; leave it out."
            )
        if len(self.test) < MIN_TEST_ROWS:
            self.notes.append(
                f"{len(self.test)} test rows are too few for a claim (at least {MIN_TEST_ROWS} are needed)."
            )
        if options.objective == "accuracy" and self.train.kind == "generation":
            self.notes.append("--objective accuracy on rows with free text: answers count when they match exactly.")

    @property
    def rows(self) -> dict[str, int]:
        """How many there are of each part."""
        return {"train": len(self.train), "validation": len(self.val), "test": len(self.test)}

    # --- what the rows are -------------------------------------------------------------------------------------------

    def encode(self, tokenizer: Any, positions: int | None = None) -> None:
        """Token ids of all rows.

        Args:
            tokenizer: of the model.
            positions: tokens that the model reads.

        Raises:
            UserError: the label words and the tokenizer do not fit together.
        """
        self.tokenizer = tokenizer
        most = self.options.max_tokens or min(MOST_TOKENS, positions or MOST_TOKENS)
        for name, part in (("train", self.train), ("validation", self.val), ("test", self.test)):
            with warnings.catch_warnings():  # a row beyond the model's length is cut here, so the warning is no news
                warnings.simplefilter("ignore")
                self.encoded[name] = part.encode(tokenizer, max_tokens=most, chat=self.options.chat)
        self.notes += [note for note in self.encoded["train"].notes if "were longer than" not in note]
        self._batches = tasks.Batches(
            self.encoded["train"],
            self.options.batch,
            seed_number("finetune batches", self.options.seed),
            self.options.micro_batch or self.options.batch // self.options.workers,
        )

    @property
    def identity(self) -> str:
        """A hash of all token ids and answers: of rows, prompt, label words and tokenizer at once."""
        digest = blake2b(digest_size=16)
        for name, encoded in self.encoded.items():
            digest.update(f"{name} {len(encoded)}".encode())
            for example in encoded:
                digest.update(f"{example.prompt}{example.candidates}{example.answer}".encode())
        return digest.hexdigest()

    @property
    def labels(self) -> dict[str, str]:
        """Label to word; empty where rows have no common labels."""
        return dict(zip(self.train.labels, self.train.words, strict=True))

    @property
    def labels_in_train(self) -> int | None:
        """How many different labels the training rows have."""
        if self.train.kind != "classification":
            return None
        return len({row.answer for row in self.train.rows})

    @property
    def truncated(self) -> int:
        """Rows that were cut."""
        return sum(encoded.truncated for encoded in self.encoded.values())

    @property
    def longest(self) -> int:
        """Tokens of the longest row; 0 before encoding."""
        return max((example.length for part in self.encoded.values() for example in part), default=0)

    @property
    def metric(self) -> str:
        """What the scores are."""
        if self.train.kind != "generation":
            return "accuracy"
        return "exact_match" if self.options.objective in ("loss", "accuracy") else self.options.objective

    # --- what is measured --------------------------------------------------------------------------------------------

    def objective(self, step: int, rank: int, world: int) -> Any:
        """What a step (from 0) measures: this worker's share of its batch."""
        assert self._batches is not None
        batch = self._batches.at(step)
        return self._measure(batch if world == 1 else batch.share(rank, world))

    def parts(self, step: int) -> Iterator[Callable[[Any], Any]]:
        """The same, one micro-batch after the other."""
        assert self._batches is not None
        for part in self._batches.at(step).split():
            yield self._measure(part)

    def _measure(self, batch: tasks.Batch) -> Any:
        name = self.options.objective
        generation = self.train.kind == "generation"
        if name == "loss":
            return tasks.make_objective("auto", batch)
        if name == "accuracy" and not generation:
            return tasks.make_objective("accuracy", batch)
        metric = "exact_match" if name == "accuracy" else name
        return tasks.make_objective(
            "generated", batch, tokenizer=self.tokenizer, metric=metric, max_tokens=self.options.new_tokens
        )

    def predictions(self, model: Any, part: str) -> tasks.Predictions:
        """What the model answers on the rows of a part."""
        return tasks.evaluate(
            model,
            self.encoded[part],
            batch=self._rows_at_once(),
            tokenizer=self.tokenizer,
            metric=self.metric if self.train.kind == "generation" else "exact_match",
            max_tokens=self.options.new_tokens,
        )

    def _rows_at_once(self) -> int:
        return max(1, 2 * (self.options.micro_batch or self.options.batch))

    def validate(self, model: Any) -> tuple[float, float]:
        """Mean score and mean loss on the validation rows."""
        found = self.predictions(model, "validation")
        return found.accuracy, found.loss or 0.0

    def scores(self, model: Any) -> list[float]:
        """The score of every test row."""
        return list(self.predictions(model, "test").correct)

    def baselines(self, model: Any) -> Baselines:
        """Measured on validation and test rows together, so that calibration is reckoned once."""
        val, test = self.encoded["validation"], self.encoded["test"]
        both = replace(val, examples=(*val.examples, *test.examples))
        found = tasks.baselines(
            model,
            self.encoded["train"],
            both,
            batch=self._rows_at_once(),
            tokenizer=self.tokenizer,
            metric=self.metric if self.train.kind == "generation" else "exact_match",
            max_tokens=self.options.new_tokens,
            rows=PRIOR_ROWS,
            seed=self.options.seed,
        )
        border = len(val)
        scores = {NAMES[name]: list(one.correct) for name, one in found.items()}
        return Baselines(
            {name: sum(values[:border]) / border for name, values in scores.items()},
            self.loss_on_validation(found["zero_shot"], border, model),
            {name: values[border:] for name, values in scores.items()},
        )

    def loss_on_validation(self, zero_shot: tasks.Predictions, border: int, model: Any) -> float:
        """Of the untrained model: from its log-probabilities, or measured where there are none."""
        if zero_shot.log_probabilities is None:
            return self.validate(model)[1]
        rows = self.encoded["validation"].examples
        values = [float(zero_shot.log_probabilities[row, one.answer]) for row, one in enumerate(rows)]
        return -sum(values) / border

    def held_out(self, model: Any) -> Sequence[float]:
        """Losses of a few validation rows."""
        rows = self.encoded["validation"][:HELD_OUT]
        objective = tasks.make_objective("auto", tasks.Batch.of(rows))
        with need("torch").no_grad():
            return [float(value) for value in objective(model).tolist()]

    def sample(self, model: Any) -> list[float]:
        """Log-probabilities of the answers of a few test rows, each run by itself: no padding to differ in."""
        encoded = self.encoded["test"][:SAMPLE]
        values: list[float] = []
        with need("torch").no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft says of prefixes that it numbers positions by itself
            for example in encoded:
                right = replace(example, candidates=(example.candidates[example.answer],), answer=0)
                values.append(float(tasks.log_likelihoods(model, [right], pad=encoded.pad)[0, 0, 0]))
        return values
