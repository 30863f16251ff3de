"""The arena itself, and the oracle: the numbers that every optimizer's test relies on."""

from __future__ import annotations

import pytest

import agentopt as ao
from agentopt.errors import UserError
from agentopt.models import Request
from tests.optimizers import arena

pytestmark = pytest.mark.anyio


async def test_the_arena_has_a_bottom_and_a_known_top() -> None:
    task = arena.RulesTask(k=3)
    assert await task.score(arena.baseline(task)) == 0.0
    assert await task.score(ao.Candidate({"rules.instruction": task.optimum})) == 1.0
    half = ao.Candidate({"rules.instruction": arena.improved(arena.BASE, {2})})
    assert await task.score(half) == pytest.approx(13 / 40)


async def test_a_perfect_reflector_a_garbage_one_and_a_leaking_one() -> None:
    task = arena.RulesTask()
    good = await arena.run(task, "optoprime", arena.perfect_lm())
    assert good.best.get("rules.instruction") == task.optimum
    assert good.claim.status == "improved"
    bad = await arena.run(task, "optoprime", arena.garbage_lm(), rollouts=300)
    assert bad.validation["best"] >= bad.validation["baseline"]
    leaking = await arena.run(task, "optoprime", arena.leaking_lm(task), rollouts=300)
    assert not arena.leaks(task, leaking.best)


def request(text: str, seed: int = 0) -> Request:
    return Request("m", ({"role": "user", "content": text},), options=ao.LMOptions(seed=seed))


async def test_an_oracle_is_right_as_often_as_its_quality_says_and_always_in_the_same_places() -> None:
    texts = [f"question {number}" for number in range(400)]
    oracle = ao.OracleLM(lambda asked: "the right answer", quality=0.7, seed=3)
    again = ao.OracleLM(lambda asked: "the right answer", quality=0.7, seed=3)
    replies = [(await oracle.send(request(text))).text for text in texts]
    assert replies == [(await again.send(request(text))).text for text in texts]
    assert 0.6 < sum(reply == "the right answer" for reply in replies) / len(replies) < 0.8
    wrong = {reply for reply in replies if reply != "the right answer"}
    assert "" in wrong
    assert any("sorry" in reply for reply in wrong)
    assert any("the right answer".startswith(reply) and reply for reply in wrong)
    other = ao.OracleLM(lambda asked: "the right answer", quality=0.7, seed=4)
    assert replies != [(await other.send(request(text))).text for text in texts]


def test_an_oracle_refuses_numbers_and_faults_it_does_not_know() -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        ao.OracleLM(lambda asked: "", quality=1.5)
    with pytest.raises(UserError, match="'lies'"):
        ao.OracleLM(lambda asked: "", quality=0.5, faults=("lies",))
    with pytest.raises(UserError, match="found none"):
        ao.OracleLM(lambda asked: "", quality=0.5, faults=())
