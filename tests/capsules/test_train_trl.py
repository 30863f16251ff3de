"""The reward inside trl's trainers: two real steps of each on a random model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentopt.capsules.train import (
    Budgets,
    Lora,
    Reward,
    Sampling,
    Settings,
    Stage,
    Update,
    grpo_trainer,
    reward_function,
)
from agentopt.errors import UserError
from tests.capsules.facts import LookUp, sample
from tests.weights.tiny import tiny

WORDS = ["[item]", "Shorten", "at", "most", "of", "words", ";", *"abcdef", *(str(n) for n in range(12))]
SAMPLES = [sample(f"a {n}\nb {n + 1}\nc {n + 2}", {"a": str(n), "b": str(n + 1)}) for n in range(6)]
LIBRARIES = (
    "ignore::FutureWarning:transformers",
    "ignore::FutureWarning:peft",
    "ignore::FutureWarning:trl",
    "ignore::DeprecationWarning",
    "ignore:.*pin_memory.*:UserWarning",
)


def settings(algorithm: Any) -> Settings:
    return Settings(
        algorithm,
        (Stage("quality", 2, 1e-3),),
        Budgets(0.4, 0.9, ("words",)),
        Sampling(documents=2, group=2, longest=6, microbatch=4),
        Update(kl=0.01),
        Lora(rank=2),
    )


def test_rewards_of_one_prompt_are_a_group() -> None:
    function = reward_function(SAMPLES, Reward([LookUp()]))
    columns = {"sample": [0, 0, 1, 1], "limit": [2, 2, 9, 9], "budget_tokenizer": ["words"] * 4}
    chat = [{"role": "assistant", "content": "a 1 ; b 2"}]
    rewards = function(["p"] * 4, ["a 0", "a 0 ; b 1 ; c 2", chat, "c 3"], **columns)
    assert rewards[0] == 0.5 and rewards[1] < 0 and rewards[2] == 1.0 and rewards[3] == 0.0
    stepped = function(
        ["p"], ["a 0"], sample=[0], limit=[2], budget_tokenizer=["words"], trainer_state=SimpleNamespace(global_step=3)
    )
    assert stepped == [0.5]


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
@pytest.mark.filterwarnings(*LIBRARIES)
def test_two_real_steps(algorithm: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    import torch

    torch.set_num_threads(1)
    model = tiny(WORDS)
    reward = Reward([LookUp()])
    trainer = grpo_trainer(
        SAMPLES,
        reward,
        model=model,
        folder=tmp_path / "out",
        settings=settings(algorithm),
        config={"disable_tqdm": True, "dataloader_pin_memory": False},
    )
    done = trainer.train()
    assert done.global_step == 2
    assert "peft" in type(trainer.model).__module__


def test_only_what_trl_has() -> None:
    pytest.importorskip("trl")
    with pytest.raises(UserError, match="grpo and rloo"):
        grpo_trainer(SAMPLES, Reward([LookUp()]), model=tiny(WORDS), folder="out", settings=settings("nano"))
