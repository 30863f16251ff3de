"""The capsulator's reward in trl's trainers, for whoever trains with trl already.

    trainer = grpo_trainer(samples, reward, model=train.weights.model("embedded"), folder="out")
    trainer.train()

trl calls `f(prompts, completions, **columns)` with the columns of its dataset; ours are `sample` (place in `samples`),
`limit` and `budget_tokenizer` (the budget that the prompt names).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentopt.capsules.counting._tokenizers import resolve_tokenizer
from agentopt.capsules.counting._tokens import Meter, Tokenizer
from agentopt.capsules.training._policy import Policy
from agentopt.capsules.training._rewards import Reward, Sample
from agentopt.capsules.training._tasks import draw_budget
from agentopt.capsules.training._train_options import Settings
from agentopt.errors import UserError
from agentopt.evaluation import seed_number, seeded
from agentopt.weights.load import need

RewardFunction = Callable[..., list[float]]
INSTALL = "pip install 'agentopt[trl]'"


def reward_function(
    samples: Sequence[Sample], reward: Reward, *, quality: bool = True, seed: int = 0
) -> RewardFunction:
    """What trl calls after each generation: one reward per completion.

    Completions of one prompt are scored as a group, with the same questions; the questions change with trl's step.

    Args:
        samples: What the dataset's column `sample` counts.
        reward: The reward.
        quality: False rewards being valid only, the stage before quality.
        seed: Draws the questions.
    """
    known: dict[str, Tokenizer] = {}

    def capsule_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        places, limits, names = columns["sample"], columns["limit"], columns["budget_tokenizer"]
        state = columns.get("trainer_state")
        number = seed_number("trl", seed, 0 if state is None else int(state.global_step))
        groups: dict[tuple[int, int, str], list[int]] = {}
        for row in range(len(prompts)):
            groups.setdefault((int(places[row]), int(limits[row]), str(names[row])), []).append(row)
        result = [0.0] * len(prompts)
        for (place, limit, name), rows in groups.items():
            if name not in known:
                known[name] = resolve_tokenizer(name)
            texts = [_text(completions[row]) for row in rows]
            scores = reward.scores(samples[place], texts, Meter(limit, known[name]), seed=number, quality=quality)
            for row, score in zip(rows, scores, strict=True):
                result[row] = score.total
        return result

    return capsule_reward


def grpo_trainer(
    samples: Sequence[Sample],
    reward: Reward,
    *,
    model: tuple[Any, Any],
    folder: str | Path,
    settings: Settings | None = None,
    config: Mapping[str, Any] | None = None,
) -> Any:
    """A trl GRPOTrainer (RLOOTrainer for `algorithm="rloo"`) with this reward, the adapter and the sizes of `settings`.

    Args:
        samples: The documents; every one gets one budget.
        reward: The reward.
        model: (model, tokenizer).
        folder: Where trl writes.
        settings: Steps and rate are those of the last stage.
        config: Fields of trl's own config that replace ours.

    Raises:
        UserError: trl, peft or datasets is not installed, or an algorithm that trl is not used for.
    """
    trl, datasets = _trl("trl"), _trl("datasets")
    settings = settings or Settings(algorithm="grpo")
    if settings.algorithm not in ("grpo", "rloo"):
        raise UserError(f"algorithm: found {settings.algorithm!r}, trl is used here for grpo and rloo.")
    grpo = settings.algorithm == "grpo"
    trainer, fields = (trl.GRPOTrainer, trl.GRPOConfig) if grpo else (trl.RLOOTrainer, trl.RLOOConfig)
    arguments: dict[str, Any] = _arguments(settings, Path(folder))
    if grpo:
        arguments |= {"loss_type": "grpo", "scale_rewards": "group"}
    arguments |= {"use_cpu": next(model[0].parameters()).device.type == "cpu"}
    return trainer(
        model=model[0],
        reward_funcs=reward_function(samples, reward, seed=settings.seed),
        args=fields(**{**arguments, **(config or {})}),
        train_dataset=datasets.Dataset.from_list(_rows(samples, model, settings)),
        processing_class=model[1],
        peft_config=None if settings.lora is None else settings.lora.config(),
    )


def _arguments(settings: Settings, folder: Path) -> dict[str, Any]:
    sampling, update, stage = settings.sampling, settings.update, settings.stages[-1]
    rows = sampling.documents * sampling.group
    each = sampling.microbatch if rows % sampling.microbatch == 0 else sampling.group
    return {
        "output_dir": os.fspath(folder),
        "per_device_train_batch_size": each,
        "gradient_accumulation_steps": rows // each,
        "num_generations": sampling.group,
        "max_completion_length": sampling.longest,
        "temperature": sampling.temperature,
        "top_k": 0,
        "max_steps": stage.steps,
        "learning_rate": stage.rate,
        "lr_scheduler_type": "constant",
        "beta": update.kl,
        "epsilon": update.clip or 0.2,
        "num_iterations": update.epochs,
        "max_grad_norm": update.max_norm,
        "seed": settings.seed,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "remove_unused_columns": False,
    }


def _rows(samples: Sequence[Sample], model: tuple[Any, Any], settings: Settings) -> list[dict[str, Any]]:
    policy = Policy(*model)
    rows: list[dict[str, Any]] = []
    for place, sample in enumerate(samples):
        rng = seeded("trl", settings.seed, sample.id)
        name = rng.choice(settings.budgets.tokenizers)
        meter = draw_budget(sample, settings.budgets, resolve_tokenizer(name), rng)
        prompt = policy.prompt(sample.document, meter)
        rows.append({"prompt": prompt, "sample": place, "limit": meter.limit, "budget_tokenizer": name})
    return rows


def _text(completion: Any) -> str:
    """A completion is a string for a plain prompt, a list of messages for a chat."""
    return completion.strip() if isinstance(completion, str) else str(completion[-1]["content"]).strip()


def _trl(module: str) -> Any:
    try:
        return need(module)
    except UserError as error:
        raise UserError(f"this needs {module}, which is not installed: {INSTALL}") from error
