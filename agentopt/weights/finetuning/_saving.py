"""Writing what was tuned, and loading it back with the libraries that will: transformers and peft.

OUT/             the model (safetensors), or the PEFT adapter; the tokenizer
OUT/merged/      with --merge: the base with the adapter added into its weights
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from agentopt.errors import RunError, UserError
from agentopt.weights import load
from agentopt.weights.finetuning._folder import options_of
from agentopt.weights.finetuning._options import FinetuneOptions
from agentopt.weights.finetuning._subject import Subject
from agentopt.weights.load import need
from agentopt.weights.zeroth._fingerprint import fingerprint

MERGED = "merged"
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
"""How far a log-probability may be from what it was before saving: other layers add in another order."""

Scores = Callable[[Any], Sequence[float]]
"""Log-probabilities that a model gives to a few rows."""


def digest(subject: Subject) -> str | None:
    """Fingerprint of all weights, when all of them were tuned."""
    return fingerprint(subject.inner.named_parameters()) if subject.handle is None else None


def save(subject: Subject, folder: Path) -> None:
    """Write the model or adapter with its tokenizer.

    Raises:
        RunError: it cannot be written.
    """
    with quiet(), _written(folder):
        subject.tokenizer.save_pretrained(str(folder))
        if subject.handle is None:
            subject.inner.save_pretrained(str(folder))
        else:
            subject.handle.save(folder)


@contextlib.contextmanager
def _written(folder: Path) -> Generator[None]:
    """A disk that does not take a model is a RunError that says what to do; safetensors has an error of its own."""
    try:
        yield
    except (OSError, need("safetensors").SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise RunError(
            f"{folder}: the model cannot be written ({why}); nothing is lost, make room and run the same command again."
        ) from error


def save_merged(subject: Subject, folder: Path) -> None:
    """Write the base with the adapter added into its weights; the subject's model is that model afterwards.

    Raises:
        RunError: it cannot be written.
    """
    model = subject.handle.merge_()
    with quiet(), _written(folder / MERGED):
        model.save_pretrained(str(folder / MERGED))
        subject.tokenizer.save_pretrained(str(folder / MERGED))


def load_finetuned(folder: str | Path, *, device: Any = None) -> tuple[Any, Any]:
    """What a finished run has written, as (model, tokenizer): a model folder, or the base with the adapter on it.

    Raises:
        UserError: there is no finished run, or its base is not to be had.
    """
    path = Path(folder)
    options = options_of(path)
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise UserError(f"{path}: the run has not written a model yet; go on with it: agentopt finetune --resume.")
    return _loaded(path, options, device)


def _loaded(path: Path, options: FinetuneOptions, device: Any) -> tuple[Any, Any]:
    if options.weights == "full":
        return load.model(path, dtype=options.dtype, device=device)
    model, tokenizer = load.model(options.model, dtype=options.dtype, device=device)
    with quiet():
        return need("peft").PeftModel.from_pretrained(model, str(path)).eval(), tokenizer


def check(folder: Path, options: FinetuneOptions, expected: Sequence[float], before: str | None, scores: Scores) -> str:
    """Load what was written and compare; one sentence on what was compared.

    Args:
        folder: of the run, with `run.json`.
        options: of the run.
        expected: what `scores` gave before saving.
        before: fingerprint of the weights before saving, when all of them were tuned.
        scores: gives the log-probabilities of a few rows.

    Raises:
        RunError: what is loaded is not what was saved.
    """
    model, _ = _loaded(folder, options, options.device)
    if before is not None:
        found = fingerprint(model.named_parameters())
        if found != before:
            raise RunError(f"{folder}: the model that loads back is not the one that was saved ({found}, {before}).")
    now = list(scores(model))
    gap = max((abs(one - two) for one, two in zip(expected, now, strict=True)), default=0.0)
    if options.quantize_base is not None:
        return f"loaded back with peft on the base without int8; log-probabilities differ by up to {gap:.2g}"
    if not math.isfinite(gap) or gap > TOLERANCE[options.dtype]:
        raise RunError(
            f"{folder}: what was saved loads back with other answers (a log-probability differs by {gap:.3g}); keep "
            "the folder: its log still holds the run."
        )
    if options.merge:
        merged, _ = load.model(folder / MERGED, dtype=options.dtype, device=options.device)
        gap = max(gap, *(abs(one - two) for one, two in zip(expected, scores(merged), strict=True)))
        if not gap <= TOLERANCE[options.dtype]:
            raise RunError(
                f"{folder / MERGED}: the merged model gives other answers (a log-probability differs by {gap:.3g}); "
                f"use the adapter in {folder}."
            )
    how = "transformers, all weights bit for bit" if before is not None else "peft"
    how += ", and merged with transformers" if options.merge else ""
    return f"loaded back with {how}; log-probabilities differ by up to {gap:.2g}"


def usage(folder: Path, options: FinetuneOptions) -> str:
    """Lines of Python that load what was written."""
    if options.weights == "full":
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})"
        )
    return f"from agentopt.weights.finetuning import load_finetuned\nmodel, tokenizer = load_finetuned({str(folder)!r})"


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without the notices that libraries send one another about names that will change, and without their bars."""
    logging = need("transformers").utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
