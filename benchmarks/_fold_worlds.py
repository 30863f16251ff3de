"""Worlds, subsets of facts and the small base model of `fold_reasoning.py`.

A task's distractors are counted for each of its questions in tests (one question, its proof and exactly so many other
statements) and for all of its questions in training (their proofs and 0 to `most` other statements).
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentopt.weights.fold import FoldFormat, FoldTask, Question, worlds

FORMAT = FoldFormat(
    fact="{fact} .", question="? {question} :", answer=" {answer}", recall=" {facts} . so:", joiner=" . "
)
"""Few tokens for models that know whole words alone."""
SIGNS = ("is", "has", "what", "to", "not", "if", "and", "of", ".", "?", ":", "so:", "yes", "no", "unknown")
Maker = Callable[[int, int, tuple[int, int], int, int], list[FoldTask]]


@dataclass(frozen=True)
class World:
    """One family of tasks: what is trained and what is tested."""

    name: str
    trained: tuple[int, int]
    """Depths (or hops) of the training tasks."""
    tested: tuple[int, ...]
    most: int
    """The most distractors in training."""
    words: tuple[str, ...]
    make: Maker
    """(count, seed, depths, distractors, questions) -> tasks with exactly so many distractors."""
    names: tuple[tuple[str, ...], ...] = ()
    """Groups of names within which training tasks are renamed at random."""
    again: int = 1
    """Training tasks that are made of one story, with other facts and names."""

    def distractors(self) -> dict[str, int]:
        """What is tested, by its name."""
        return {"clean": 0, "+2": 2, "all": self.most, "2x": 2 * self.most, "4x": 4 * self.most}

    def training(self, count: int, seed: int, questions: int = 3) -> list[FoldTask]:
        """Tasks with 0 to `most` distractors beside the proofs of 1 to `questions` questions."""
        draw = random.Random(f"{self.name}-{seed}")
        room = self.most + (questions - 1) * (self.trained[1] + 1)
        made = self.make(-(-count // self.again), seed, self.trained, room, questions)
        found: list[FoldTask] = []
        for number in range(count):
            task = made[number % len(made)]
            few = questions == 1 or draw.random() < 0.4
            asked = draw.sample(task.questions, 1 if few else min(len(task.questions), draw.randint(2, questions)))
            extra = 0 if draw.random() < 0.2 else draw.randint(0, self.most)
            one = subset(task, f"{self.name}-{seed}-{number}", asked, extra, draw)
            found.append(_renamed(one, self.names, draw))
        return found

    def test(self, count: int, seed: int, depth: int, distractors: int) -> list[FoldTask]:
        """Tasks of one question."""
        return self.make(count, 10_000 + seed * 101 + depth, (depth, depth), distractors, 1)


def subset(task: FoldTask, name: str, asked: Sequence[Question], extra: int, draw: random.Random) -> FoldTask:
    """A task with the proofs of some of its questions and at most so many of its other statements."""
    needed = sorted({place for question in asked for place in question.relevant})
    others = [place for place in range(len(task.facts)) if place not in set(needed)]
    kept = needed + draw.sample(others, min(extra, len(others)))
    draw.shuffle(kept)
    at = {old: new for new, old in enumerate(kept)}
    questions = tuple(
        dataclasses.replace(question, relevant=tuple(at[place] for place in question.relevant)) for question in asked
    )
    return FoldTask(name, tuple(task.facts[place] for place in kept), questions)


def _renamed(task: FoldTask, groups: Sequence[Sequence[str]], draw: random.Random) -> FoldTask:
    """The same with other names."""
    if not groups:
        return task
    new = {old: name for group in groups for old, name in zip(group, draw.sample(group, len(group)), strict=True)}

    def said(text: str) -> str:
        return " ".join(new.get(word, word) for word in text.split())

    questions = tuple(dataclasses.replace(question, text=said(question.text)) for question in task.questions)
    return FoldTask(task.id, tuple(said(fact) for fact in task.facts), questions)


def _chains(count: int, seed: int, depths: tuple[int, int], distractors: int, questions: int) -> list[FoldTask]:
    return worlds.chains(
        count,
        seed=seed,
        depth=depths,
        distractors=distractors,
        questions=questions,
        names=24,
        attributes=24,
        templates="body-first",
        style="plain",
    )


def _kinship(count: int, seed: int, hops: tuple[int, int], distractors: int, questions: int) -> list[FoldTask]:
    return worlds.kinship(
        count,
        seed=seed,
        hops=hops,
        noise="disconnected" if distractors else "none",
        distractors=distractors,
        questions=questions,
        women=30,
        men=30,
        templates="source-first",
        style="plain",
    )


def _theories(count: int, seed: int, depths: tuple[int, int], distractors: int, questions: int) -> list[FoldTask]:
    """Yes or no; goal first. Every depth equally often; one question and its proof, and so many statements."""
    each = -(-count // (depths[1] - depths[0] + 1))
    found = [
        worlds.rules(
            each,
            seed=seed * 16 + depth,
            depth=depth,
            depths=(depth,),
            distractors=distractors,
            facts=(4 + distractors // 2, 10 + distractors),
            rules=(max(depth, 3), max(depth + 1, min(18, 4 + distractors // 2))),
            people=(2, 6),
            body=(1, 1),
            names=8,
            attributes=20,
            unique_heads=True,
            unknown=False,
            templates="head-first",
            proof="goal-first",
            style="plain",
        )
        for depth in range(depths[0], depths[1] + 1)
    ]
    return [task for group in zip(*found, strict=True) for task in group][:count]


def _words() -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    chain = worlds.ChainOptions(names=24, attributes=24).vocabulary()
    women, men = worlds.KinshipOptions(women=30, men=30).vocabulary()
    theory = worlds.RuleOptions(names=8, attributes=20).vocabulary(relations=False)
    kin = worlds.kinship(1, seed=0)[0].questions[0].choices
    return {
        "chains": (*chain.names, *chain.attributes),
        "kinship": (*women, *men, *kin),
        "theories": (*theory.names, *theory.attributes),
    }, kin


def world(name: str) -> World:
    """One of "chains", "kinship", "theories"."""
    known, _ = _words()
    words = tuple(dict.fromkeys(word.lower() for word in (*known[name], *SIGNS)))
    if name == "chains":
        return World(name, (1, 3), (1, 2, 3, 4, 5), 8, words, _chains)
    if name == "kinship":
        women, men = worlds.KinshipOptions(women=30, men=30).vocabulary()
        groups = tuple(tuple(one.lower() for one in group) for group in (women, men))
        return World(name, (2, 4), tuple(range(2, 11)), 6, words, _kinship, groups, 2)
    return World(name, (1, 3), (1, 2, 3, 4, 5), 6, words, _theories)


def read_proofwriter(path: Path) -> list[FoldTask]:
    """Theories of ProofWriter with one question each; no proofs, so nothing is relevant."""
    found: list[FoldTask] = []
    names = {"A": "true", "B": "false", "C": "unknown"}
    for row in json.loads(path.read_text(encoding="utf-8")):
        facts = tuple(part.strip() for part in row["context"].replace("\n", " ").split(". ") if part.strip())
        asked = row["question"].rpartition("? ")[2].rstrip(".")
        question = Question(_spaced(asked), names[row["answer"]], (), None, tuple(names.values()))
        found.append(FoldTask(row["id"], tuple(_spaced(fact.rstrip(".")) for fact in facts), (question,)))
    return found


def wording_alone(train: Sequence[FoldTask], test: Sequence[FoldTask]) -> float:
    """Accuracy of the commonest label of questions with "not" and of those without: what needs no facts at all."""
    counts: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}

    def negated(task: FoldTask) -> bool:
        return " not " in task.questions[0].text

    for task in train:
        counts[negated(task)][task.questions[0].answer] += 1
    guesses = {key: found.most_common(1)[0][0] for key, found in counts.items()}
    return sum(guesses[negated(task)] == task.questions[0].answer for task in test) / len(test)


def _spaced(sentence: str) -> str:
    return sentence.lower().replace(",", " ,")


def small_model(words: Sequence[str], *, width: int, layers: int, seed: int, window: int = 512) -> tuple[Any, Any]:
    """A Llama of random weights and its tokenizer of whole words.

    Three heads of its first layer start looking one, two and three tokens back. Every pre-trained model has such heads,
    and from scratch a reader needs most of its training to find them: the base gives them to both methods.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=window,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        attention_bias=True,
        initializer_range=width**-0.5,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(width**0.5)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.5)
            layer.mlp.down_proj.weight.mul_(0.5)
        _look_back(model.model.layers[0].self_attn, 100.0)
    return model.eval(), tokenizer


def _look_back(attention: Any, theta: float, strength: float = 8.0) -> None:
    """Biases of three heads that agree, after the rotation, one, two and three tokens back."""
    import torch

    size = attention.head_dim
    frequency = theta ** (-torch.arange(0, size, 2).float() / size)
    for head, distance in enumerate((1, 2, 3)):
        rows = slice(head * size, (head + 1) * size)
        for layer in (attention.q_proj, attention.k_proj):
            layer.weight[rows] *= 0.1
        value = strength / (size / 2) ** 0.5
        cosine, sine = torch.cos(distance * frequency), torch.sin(distance * frequency)
        attention.k_proj.bias[rows] = value
        attention.q_proj.bias[rows] = value * torch.cat([cosine + sine, cosine - sine])
