"""Training a capsulator, on random models of two layers: mechanics, not quality."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from agentopt.capsules import CapsuleOptions, Document, Meter, Span, TokenBudget, train
from agentopt.capsules.counting._tokenizers import resolve_tokenizer
from agentopt.capsules.train import (
    Budgets,
    Lora,
    Reward,
    RewardSettings,
    Sample,
    Sampling,
    Settings,
    Stage,
    Step,
    Trained,
    Update,
)
from agentopt.capsules.training._nano import cut_off, nano_loss, repeated, utilities
from agentopt.capsules.training._policy import Policy, instruction
from agentopt.capsules.training._trained import halves
from agentopt.capsules.training._updates import divergence, token_loss, whole_text_loss
from agentopt.errors import RunError, UserError
from tests.capsules.facts import LookUp, document, sample
from tests.weights.tiny import tiny, tiny_folder

WORDS = ["[item]", "Shorten", "at", "most", "of", "words", ";", *"abcdef", *(str(n) for n in range(12))]
BUDGETS = Budgets(0.4, 0.9, ("words",))
SMALL = Sampling(documents=4, group=4, longest=6, microbatch=8)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def samples(count: int = 6) -> list[Sample]:
    letters = "abcdef"
    made = []
    for n in range(count):
        first, second = letters[n % 6], letters[(n + 1) % 6]
        lines = f"{first} {n}\n{second} {n + 1}\n{letters[(n + 2) % 6]} {n + 2}"
        made.append(sample(lines, {first: str(n), second: str(n + 1)}, [f"{first} {n}"]))
    return made


def settings(**changes: Any) -> Settings:
    stages = (Stage("sft", 2, 1e-2), Stage("length", 2, 1e-3), Stage("quality", 2, 1e-3))
    plain = Settings(stages=stages, budgets=BUDGETS, sampling=SMALL, lora=None, seed=3)
    return dataclasses.replace(plain, **changes)


def likes_a(texts: Sequence[str]) -> list[float]:
    return [text.split().count("a") / 6 for text in texts]


class Likes(Reward):
    """Rewards one word, so that learning is seen within a few steps."""

    def __init__(self) -> None:
        super().__init__([], RewardSettings(task=0.0))

    def scores(self, sample: Sample, texts: Sequence[str], meter: Meter, **_: Any) -> list[Any]:
        self.calls += len(texts)
        return [train.Score(value, True) for value in likes_a(texts)]


@pytest.mark.parametrize("algorithm", ["rloo", "grpo", "reinforce"])
def test_every_algorithm_climbs(algorithm: Any) -> None:
    steps = (Stage("quality", 25, 1e-2),)
    update = Update(kl=0.001, clip=0.2, epochs=2) if algorithm == "grpo" else Update(kl=0.001)
    run = settings(algorithm=algorithm, stages=steps, update=update)
    done = train.train(samples(), model=tiny(WORDS), reward=Likes(), settings=run)
    rewards = [step.reward for step in done.history]
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5]) + 0.2
    assert max(step.kl for step in done.history) > 0


def test_the_nano_loss_moves_no_token_towards_the_reward() -> None:
    """The reward is a factor of an embedding distance: a whole run on it makes the liked word no likelier."""
    model = tiny(WORDS)
    reader = LookUp()
    run = settings(algorithm="nano", stages=(Stage("quality", 3, 1e-3),))
    done = train.train(samples(), model=model, reward=Reward([reader]), settings=run)
    assert len(done.history) == 3 and done.history[-1].reader_calls > 0
    with pytest.raises(UserError, match="asks no reader"):
        train.train(samples(), model=model, reward=Likes(), settings=run)
    with pytest.raises(UserError, match="expected rloo"):
        Settings(algorithm="other")  # pyright: ignore[reportArgumentType]


def test_the_nano_loss_is_distance_times_utility_of_what_the_cut_leaves() -> None:
    import torch

    words = resolve_tokenizer("words")
    assert cut_off("a 1 ; b 2", Meter(3, words)) == "a 1 ;" and cut_off("a 1", Meter(9, words)) == "a 1"
    assert cut_off("a 1", Meter(0, words)) == ""
    one = sample("a 1 ; b 2", {"a": "9", "b": "2"})  # agreement is with the original's answer, not with gold
    reward = Reward([LookUp()])
    assert utilities(reward, one, ["a 1 ; b 2", "b 2 ; a 1"], Meter(2, words), seed=0) == [0.5, 0.5]
    policy = Policy(*tiny(WORDS))
    originals = repeated(policy, [one, one])
    capsules = policy.given([policy.prompt_ids(one.document, Meter(2, words))] * 2, ["a 1", "b 2"])
    each = nano_loss(policy, originals, capsules, torch.tensor([0.5, 0.0]))
    each[1].backward(retain_graph=True)
    assert all(weight.grad is None or weight.grad.abs().sum() == 0 for weight in policy.trained)
    each[0].backward()
    assert each[0] > 0 and any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in policy.trained)


def test_imitation_learns_the_targets() -> None:
    run = settings(stages=(Stage("sft", 60, 1e-2),))
    seen: list[Step] = []
    done = train.train(samples(2), model=tiny(WORDS), settings=run, progress=lambda step, _: seen.append(step))
    assert done.history == seen
    assert done.history[-1].loss < done.history[0].loss / 4
    one = samples(2)[0]
    assert done.compress(one.document, Meter(3, resolve_tokenizer("words"))) == one.targets[0]


def test_a_capsule_is_the_models_text_when_it_passes_and_an_extraction_when_not() -> None:
    class Says(Trained):
        said = ""

        def compress(self, document: Document, meter: Meter, seed: int = 0) -> str:
            return self.said

    text = "Lamps cost 7 coins.\n\nThey come in red.\n\nNobody knows why."
    for said, made in (("Lamps: 7 coins.", "trained"), ("Lamps: 9 coins.", "extract"), ("", "extract")):
        proposer = Says(*tiny(WORDS))
        proposer.said = said
        capsule = ao.capsule(
            text, budget=TokenBudget(6, "words"), mode="trained", options=CapsuleOptions(trained=proposer)
        )
        assert capsule.made == made and capsule.tokens <= 6
        assert bool(capsule.fallback) == (made == "extract")


def test_without_targets_the_extractive_engine_gives_them() -> None:
    bare = [Sample(one.document, one.questions) for one in samples()]
    done = train.train(bare, model=tiny(WORDS), settings=settings(stages=(Stage("sft", 2, 1e-3),)))
    assert len(done.history) == 2


def test_equal_seeds_give_equal_weights_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    def run(path: Path | None, stop: int | None = None) -> tuple[list[Step], list[float]]:
        count = 0

        def progress(step: Step, _: Trained) -> None:
            nonlocal count
            count += 1
            if count == stop:
                raise KeyboardInterrupt

        model = tiny(WORDS)
        reward = Reward([LookUp()], RewardSettings(task=0.5, agree=0.5))
        done = train.train(
            samples(), model=model, reward=reward, settings=settings(), checkpoint=path, progress=progress
        )
        return done.history, [float(weight.detach().double().sum()) for weight in model[0].parameters()]

    whole = run(None)
    assert run(None) == whole
    for stop in (3, 5):
        path = tmp_path / f"{stop}.safetensors"
        with pytest.raises(KeyboardInterrupt):
            run(path, stop)
        assert path.exists()
        assert run(path) == whole
    with pytest.raises(UserError, match="another run"):
        train.train(samples(3), model=tiny(WORDS), reward=Reward([LookUp()]), settings=settings(), checkpoint=path)
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match="delete it"):
        run(path)


def test_an_adapter_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    run = settings(lora=Lora(rank=2, alpha=4), stages=(Stage("sft", 3, 1e-2), Stage("quality", 2, 1e-3)))
    done = train.train(samples(), model=folder, reward=Likes(), settings=run)
    saved = done.save(tmp_path / "out")
    assert (saved / "adapter_model.safetensors").exists()
    assert json.loads((saved / "capsulator.json").read_text())["base_hash"] == done.base_hash
    again = train.load(saved, device="cpu")
    assert isinstance(again, Trained) and again.history == done.history
    meter = Meter(4, resolve_tokenizer("words"))
    for one in samples():
        assert again.compress(one.document, meter, seed=1) == done.compress(one.document, meter, seed=1)
    further = train.train(samples(), model=again, settings=settings(stages=(Stage("sft", 2, 1e-2),)))
    changed = [name for name, weight in further.model.named_parameters() if weight.requires_grad]
    assert changed and all("lora_" in name for name in changed) and further.base_hash == done.base_hash
    assert Trained.load(further.save(tmp_path / "on"), device="cpu").base == done.base
    with pytest.raises(UserError, match="hash"):
        Trained.load(saved, base=tiny(seed=9))


def test_an_adapter_of_an_object_asks_for_it(tmp_path: Path) -> None:
    run = settings(lora=Lora(rank=2), stages=(Stage("sft", 1, 1e-2),))
    saved = train.train(samples(), model=tiny(WORDS), settings=run).save(tmp_path / "out")
    with pytest.raises(UserError, match="base="):
        train.load(saved)
    assert isinstance(Trained.load(saved, base=tiny(WORDS)), Trained)


def test_a_whole_model_is_saved_and_loaded(tmp_path: Path) -> None:
    done = train.train(samples(), model=tiny(WORDS), settings=settings(stages=(Stage("sft", 1, 1e-2),)))
    again = Trained.load(done.save(tmp_path / "out"), device="cpu")
    meter = Meter(4, resolve_tokenizer("words"))
    assert again.compress(samples()[0].document, meter) == done.compress(samples()[0].document, meter)
    for content in ("{}", "[]", "x"):
        (tmp_path / "out" / "capsulator.json").write_text(content)
        with pytest.raises(UserError, match=r"capsulator\.json"):
            Trained.load(tmp_path / "out")
    with pytest.raises(UserError, match="expected a folder"):
        train.load(tmp_path / "nowhere")


def test_groups_of_equal_rewards_change_nothing_and_are_explained() -> None:
    class Same(Likes):
        def scores(self, sample: Sample, texts: Sequence[str], meter: Meter, **_: Any) -> list[Any]:
            return [train.Score(0.5, True) for _ in texts]

    model = tiny(WORDS)
    before = copy.deepcopy(model[0].state_dict())
    done = train.train(samples(), model=model, reward=Same(), settings=settings(stages=(Stage("quality", 2, 1e-2),)))
    assert all((before[name] == value).all() for name, value in model[0].state_dict().items())
    assert [step.dropped for step in done.history] == [4, 4]
    assert "told no two apart" in done.notes[0]


def test_what_is_not_finite_ends_the_run_in_words() -> None:
    import torch

    model, tokenizer = tiny(WORDS)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="lower the rate"):
        train.train(samples(), model=(model, tokenizer), settings=settings(stages=(Stage("sft", 1, 1e-2),)))


def test_out_of_memory_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Policy, "log_probs", full)
    with pytest.raises(RunError, match=r"sampling\.microbatch"):
        train.train(samples(), model=tiny(WORDS), settings=settings(stages=(Stage("sft", 1, 1e-2),)))


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="no samples"):
        train.train([], model=tiny(WORDS))
    with pytest.raises(UserError, match="no reward"):
        train.train(samples(), model=tiny(WORDS), settings=settings())
    with pytest.raises(UserError, match="compares at least 2"):
        settings(sampling=Sampling(group=1))
    for wrong in (
        lambda: Budgets(0.0, 0.5),
        lambda: Budgets(tokenizers=()),
        lambda: Update(epochs=2),
        lambda: Update(clip=2.0),
        lambda: Update(kl=-1.0),
        lambda: Sampling(group=0),
        lambda: Sampling(temperature=0.0),
        lambda: Stage("other", 1, 0.1),  # pyright: ignore[reportArgumentType]
        lambda: Stage("sft", 1, 2.0),
        lambda: settings(stages=()),
    ):
        with pytest.raises(UserError):
            wrong()
    long = Sample(document(" ".join(["a"] * 300)))
    with pytest.raises(UserError, match="give shorter documents"):
        train.train([long], model=tiny(WORDS), settings=settings(stages=(Stage("sft", 1, 1e-2),)))


def test_a_document_beyond_the_models_room_is_taken_in_halves() -> None:
    text = "\n".join(f"{letter} {number}" for number in range(12) for letter in "abcdef" * 2)
    doc = dataclasses.replace(document(text), keep=(Span(text.index("f 3"), text.index("f 3") + 3, "keep", "pattern"),))
    trained = Trained(*tiny(WORDS), tries=0)
    one, two = halves(doc)
    assert one.text + two.text == text and len(one.units) + len(two.units) == len(doc.units)
    for part in (one, two):
        assert all(part.text[unit.start : unit.end].strip() for unit in part.units)
        assert all(span.of(part.text) == "f 3" for span in part.keep)
    assert len(one.keep) + len(two.keep) == 1
    assert isinstance(trained.compress(doc, Meter(20, resolve_tokenizer("words"))), str)


def test_a_stage_ends_at_its_reader_calls() -> None:
    run = settings(stages=(Stage("quality", 50, 1e-3, reader_calls=40),))
    done = train.train(samples(), model=tiny(WORDS), reward=Likes(), settings=run)
    assert len(done.history) == 3 and done.history[-1].reader_calls == 48


def test_the_policy_is_told_budget_tokenizer_and_units() -> None:
    one = samples()[0]
    text = instruction(one.document, Meter(7, resolve_tokenizer("words")))
    assert "7 tokens of words" in text and text.count("[item] ") == 3


def test_log_probabilities_end_with_the_text_and_ignore_padding() -> None:
    import torch

    policy = Policy(*tiny(WORDS))
    short, long = policy.tokenizer("a 1")["input_ids"], policy.tokenizer("a 1 b 2 c 3")["input_ids"]
    both = policy.log_probs(policy.given([short, long], ["a", "a b c"]))
    alone = policy.log_probs(policy.given([short], ["a"]))
    assert torch.allclose(both[0, :2], alone[0], atol=1e-5)
    assert both[0, 2:].abs().sum() == 0 and (both[0, :2] < 0).all()
    written = policy.write([short, long], each=3, longest=5, seed=1)
    assert len(written.texts) == 6 and written.texts == policy.write([short, long], each=3, longest=5, seed=1).texts
    ends = written.ids[:, -written.mask.shape[1] :] == policy.tokenizer.eos_token_id
    for row, end in zip(written.mask, ends, strict=True):
        assert int(row.sum()) == (int(end.nonzero()[0]) + 1 if end.any() else len(row))


def test_the_reference_is_what_was_frozen() -> None:
    import torch

    policy = Policy(*tiny(WORDS))
    given = policy.given([policy.tokenizer("a 1")["input_ids"]], ["b"])
    before = policy.log_probs(given).detach()
    policy.freeze_reference()
    with torch.no_grad():
        for weight in policy.trained:
            weight.mul_(1.5)
    after = policy.log_probs(given).detach()
    with policy.as_reference():
        assert torch.allclose(policy.log_probs(given), before)
    assert torch.allclose(policy.log_probs(given), after) and not torch.allclose(before, after)


def test_gradients_are_those_of_the_formulas() -> None:
    import torch

    new = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    advantage = torch.tensor([2.0, -1.0])
    whole_text_loss(torch, new, new.detach(), advantage, None).sum().backward()
    assert new.grad is not None and new.grad.tolist() == [[-2.0, -2.0], [1.0, 1.0]]
    plain, clipped = (whole_text_loss(torch, new, new.detach(), advantage, clip).detach() for clip in (None, 0.2))
    assert clipped.tolist() == [-2.0, 1.0] and plain.tolist() == [6.0, -0.5]
    # A ratio beyond the bound has no gradient left in the direction that pays.
    far = torch.tensor([[0.5, 0.0]], requires_grad=True)
    whole_text_loss(torch, far, torch.zeros(1, 2), torch.tensor([1.0]), 0.2).sum().backward()
    assert far.grad is not None and far.grad.abs().sum() == 0
    each = token_loss(torch, new, new.detach(), new.detach(), mask, advantage, clip=0.2, kl=0.1)
    assert each.detach().tolist() == [-2.0, 1.0]
    assert (divergence(torch, new, new - 1) > 0).all() and divergence(torch, new, new).abs().max() == 0


def test_the_frozen_reader_answers_and_weighs_answers() -> None:
    model, tokenizer = tiny(WORDS)
    reader = train.CausalReader(model, tokenizer, longest=3, batch=2)
    answers = reader.answers("a 1", ["a", "b", "c"])
    assert len(answers) == 3 and answers == reader.answers("a 1", ["a", "b", "c"])
    likely = reader.likelihoods("a 1", ["a", "b", "c"], ["1", "2 3", ""])
    assert len(likely) == 3 and all(value < 0 for value in likely)
    assert reader.likelihoods("a 1", ["b"], ["2 3"]) == pytest.approx(likely[1:2], abs=1e-4)
