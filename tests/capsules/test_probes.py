"""Questions made from a source, asked of the text that stands for it."""

from __future__ import annotations

import pytest

from agentopt.capsules.rewriting._probes import answered, ask_probes, make_probes, recall
from agentopt.capsules.units._units import parse
from agentopt.models import LMOptions, ScriptedLM

SOURCE = (
    "The bridge over the river Tamar was opened on 2 May 1859. It is 667 metres long and cost £225,000. "
    "Its engineer was Isambard Brunel. Trains cross it at 15 mph. The paint is renewed every summer."
)


def test_a_source_answers_its_own_questions_and_an_empty_text_none() -> None:
    probes = make_probes(parse(SOURCE))
    assert len(probes) >= 5
    assert recall(probes, SOURCE) == 1.0
    assert recall(probes, "") == 0.0
    assert recall((), "anything") == 0.0
    assert all("____" in probe.question and probe.answer in SOURCE for probe in probes)


def test_recall_falls_with_what_is_left_out() -> None:
    probes = make_probes(parse(SOURCE))
    half = recall(probes, "Bridge over Tamar opened 2 May 1859. 667 metres long, cost £225,000.")
    most = recall(probes, "Tamar river bridge opened 1859-05-02. 667 m long, cost £225,000. Engineer: Isambard Brunel.")
    assert 0.2 < half < most < 1.0


def test_an_answer_counts_only_beside_words_of_its_question() -> None:
    probes = [probe for probe in make_probes(parse(SOURCE)) if probe.answer.startswith("667")]
    assert answered(probes, "The bridge is 667 metres long.") == [True]
    assert answered(probes, "Lunch was eaten by 667 metres.") == [False]
    assert answered(probes, "The bridge is 1,667 metres long.") == [False]


def test_a_query_makes_what_it_asks_about_count_more() -> None:
    text = "Engineer: Isambard Brunel."
    plain = recall(make_probes(parse(SOURCE)), text)
    asked = recall(make_probes(parse(SOURCE), query="Who was the engineer?"), text)
    assert asked > plain > 0


def test_many_units_give_a_bounded_seeded_sample() -> None:
    document = parse(
        "\n".join(f"Room {number} holds {number * 7} chairs and {number * 3} desks." for number in range(400))
    )
    probes = make_probes(document, seed=1)
    assert len(probes) == 64
    assert probes == make_probes(document, seed=1) != make_probes(document, seed=2)


@pytest.mark.anyio
async def test_a_model_may_answer_them_from_the_text() -> None:
    probes = make_probes(parse("The bridge is 667 metres long. Its engineer was Isambard Brunel."))
    replies = "\n".join(f"{number}. {probe.answer}" for number, probe in enumerate(probes, 1))
    lm = ScriptedLM([replies, "no idea", "1. 667 metres"])
    options = LMOptions()
    assert await ask_probes(probes, "The text.", lm, options=options) == 1.0  # pyright: ignore[reportArgumentType]
    assert await ask_probes(probes, "The text.", lm, options=options) == 0.0  # pyright: ignore[reportArgumentType]
    some = await ask_probes(probes, "The text.", lm, options=options)  # pyright: ignore[reportArgumentType]
    assert 0.0 < some < 1.0
    assert "____" in lm.requests[0].messages[0]["content"]
    assert await ask_probes((), "The text.", lm, options=options) == 0.0  # pyright: ignore[reportArgumentType]
