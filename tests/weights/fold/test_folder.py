"""Folding as a user does it: what is learned, folded, asked, refused and kept."""

from __future__ import annotations

from agentopt.weights.fold import Folder
from tests.weights.fold import tiny


def test_a_trained_folder_answers_without_the_facts(tiny_folder: Folder) -> None:
    scores = tiny_folder.evaluate(tiny.tasks(32, seed=2))
    assert scores.accuracy >= 0.9
    assert scores.recall_exact is not None and scores.recall_exact >= 0.9
    adapter = tiny_folder.fold(["ann owns drum", "bob owns kite", "cid owns rope"])
    answers = tiny_folder.ask_many(adapter, ["ann owns?", "bob owns?", "cid owns?"])
    assert [one.text for one in answers] == ["drum", "kite", "rope"]
    assert [one.source for one in answers] == ["folded"] * 3
    assert answers[0].recalled == ("ann owns drum",)
