"""Verification: what a shorter text may do to its source, and what it may not."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentopt.capsules import Document, TokenBudget
from agentopt.capsules.rewriting._replies import read_reply
from agentopt.capsules.rewriting._verify import verify
from agentopt.capsules.units._units import parse

SOURCE = """# Role
You are a claims assistant for Harbor Mutual. You help adjusters at the Rotterdam office write notice summaries.

# Rules
1. Never disclose a claimant's medical records to third parties.
2. Claims above €25,000 must be escalated to Marta Kovacs within 2 business days.
3. Claims below €1,500 may be settled without an inspection, unless fraud is suspected.
4. The deductible is 10% of the claim, but not less than €150.
5. Do not promise a payout date. Payouts usually take 14 to 21 days after approval.
6. If the policy expired before 2025-03-01, reject the claim and cite section 4.2.
7. Water damage is covered only when it was caused by a burst pipe; flooding is not covered.
8. Photos must be uploaded to https://claims.harbor.example/upload in JPG format, at most 8 MB each.

# Background
The 2024 storm season produced 3,412 claims, of which 61% were settled in the first month. The archive room is kept \
at -5 °C. The new system, ClaimTrack, replaced the old spreadsheet in June 2024 and reduced errors by a third. Jonas \
Weber introduced it together with Lin Zhao. Three adjusters tested it.

Summarise the claim of {claimant} with number {claim_id}."""
END = " Summarise the claim of {claimant} with number {claim_id}."

FAITHFUL = (
    "Claims assistant, Harbor Mutual; help Rotterdam adjusters write notice summaries. Never disclose claimant medical "
    "records to third parties. Claims >€25,000: escalate to Marta Kovacs within 2 business days. Claims <€1,500: may "
    "settle without inspection unless fraud suspected. Deductible 10%, min €150. No payout date promises; payouts take "
    "14-21 days after approval. Policy expired before 2025-03-01: reject, cite 4.2. Water damage covered only if burst "
    "pipe; flooding not covered. Photos: JPG, ≤8 MB, https://claims.harbor.example/upload.",
    "- Claims assistant for Harbor Mutual\n- Never disclose medical records\n- Escalate claims above €25,000 to Marta "
    "Kovacs in 2 business days\n- Below €1,500: no inspection needed, unless fraud\n- Deductible: 10% of claim, at "
    "least €150\n- Don't promise payout dates (usually 14 to 21 days after approval)\n- Reject if policy expired "
    "before 1 March 2025 (section 4.2)\n- Cover water damage only from burst pipes, not flooding\n",
    "2024 storms: 3,412 claims, 61 percent settled in first month. Archive room -5 °C. ClaimTrack replaced spreadsheet "
    "June 2024, errors down a third; introduced by Jonas Weber and Lin Zhao, tested by 3 adjusters.",
    "1. Escalate claims above €25,000.\n2. Never disclose medical records.\n3. Reject if expired before 2025-03-01.",
)

UNFAITHFUL = {
    "numbers": (
        "Claims above €35,000 must be escalated to Marta Kovacs.",
        "Claims above €25,000 must be escalated within 2 weeks.",
        "Claims above $25,000 must be escalated to Marta Kovacs.",
        "The archive room is kept at 5 °C.",
        "61 claims were settled in the first month.",
        "Claims above €1,500 must be escalated to Marta Kovacs.",
        "Four adjusters tested ClaimTrack.",
        "The storm season produced 34,12 claims.",
    ),
    "negations": (
        "Promise a payout date.",
        "Disclose claimant medical records to third parties.",
        "Flooding is covered.",
        "Claims below €1,500 may be settled without an inspection.",
        "Claims below €1,500 may be settled with an inspection, unless fraud is suspected.",
        "Water damage is covered when caused by a burst pipe.",
        "The deductible is 10% of the claim, but not more than €150.",
        "Claims above €25,000 may be escalated to Marta Kovacs.",
        "Reject the claim and cite section 4.2.",
        "Claims above €25,000 must not be escalated to Marta Kovacs.",
    ),
    "names": (
        "Claims above €25,000 must be escalated to Peter Kovacs.",
        "Oliver introduced ClaimTrack in June 2024.",
        "Jonas Weber introduced ClaimTrack at Siemens.",
        "Photos: uploaded, says Velasquo of the Rotterdam office: in JPG format.",
    ),
    "dates": (
        "If the policy expired before 2025-01-03, reject the claim.",
        "ClaimTrack replaced the spreadsheet in July 2024.",
    ),
    "addresses": (
        "Photos to https://claims.harbor.example/photos.",
        "Photos to photos@harbor.example.",
        "Photos to /srv/claims/upload.",
    ),
    "grounding": (
        "Roses are red and violets are blue; the ocean sings of lovely things to sailors.",
        "Of course I will gladly write a poem about friendship, spring and gentle rain.",
    ),
    "reply": (
        "Here is the shortened text:\nClaims above €25,000: escalate to Marta Kovacs.",
        "```\nClaims above €25,000: escalate to Marta Kovacs.",
    ),
}


def passed(document: Document, text: str) -> bool:
    return all(check.passed for check in verify(document, text, meter=None))


def _failed(text: str, source: str = SOURCE, keep: tuple[str, ...] = ()) -> dict[str, str]:
    return {check.name: check.detail for check in verify(parse(source, keep), text, meter=None) if not check.passed}


@pytest.mark.parametrize("text", FAITHFUL)
def test_a_faithful_rewrite_passes(text: str) -> None:
    assert _failed(text + END) == {}


@pytest.mark.parametrize(("check", "text"), [(name, text) for name, texts in UNFAITHFUL.items() for text in texts])
def test_an_unfaithful_rewrite_is_caught_by_the_check_for_it(check: str, text: str) -> None:
    assert check in _failed(text + END)


def test_placeholders_and_keep_spans_must_all_be_there_in_order_and_none_added() -> None:
    assert "{claim_id}" in _failed("Summarise the claim of {claimant}.")["keep"]
    assert "{id} added" in _failed("Summarise {claimant} with {id} and {claim_id}.")["placeholders"]
    assert "keep" in _failed("Summarise {claim_id} of {claimant}.")
    assert "{claimant} added" in _failed(f"For {{claimant}}.{END}")["placeholders"]
    assert "keep" in _failed(f"Never disclose medical records.{END}", keep=(r"ClaimTrack",))
    assert not _failed(f"ClaimTrack replaced the spreadsheet.{END}", keep=(r"ClaimTrack",))


def test_empty_refusing_and_over_long_texts_fail() -> None:
    assert "reply" in _failed("  ")
    assert "refuses" in _failed("I'm sorry, but I can't help with that {claimant} {claim_id}")["reply"]
    meter = TokenBudget(20, "bytes").meter()
    assert not verify(parse("Some words."), "Some words." * 3, meter=meter)[0].passed
    assert verify(parse(""), "", meter=None)[1].passed


SCHEMA = """Return the result as JSON that follows this schema:

{"type": "object", "properties": {"age": {"type": "integer"}, "name": {"type": "string"}}, "required": ["age"]}

The service was built by a team that cares a great deal about well formed output, as everybody knows by now."""


def test_a_schema_must_be_the_same_value() -> None:
    document = parse(SCHEMA)
    assert passed(document, SCHEMA)
    broken = SCHEMA.replace('"integer"', '"number"')
    assert "keep" in {check.name for check in verify(document, broken, meter=None) if not check.passed}
    cut = SCHEMA.replace('"required": ["age"]}', "")
    assert not passed(document, cut)


def test_json_that_is_not_a_schema_may_lose_white_space_and_nothing_else() -> None:
    source = (
        'The settings are as follows and were last changed by the team:\n\n{"retries": 3, "rate": 1.50, "on": true}\n'
    )
    assert "schemas" not in _failed('Settings: {"retries":3,"rate":1.50,"on":true}', source)
    assert "schemas" in _failed('Settings: {"retries":3,"rate":1.5,"on":true}', source)


def test_number_words_and_digits_are_the_same_number() -> None:
    source = "Three clerks handle 1,500 files and twenty-five boxes in half a day, and one of them works nights."
    assert not _failed("3 clerks handle 1500 files, 25 boxes, 0.5 of a day.", source)
    assert not _failed("three clerks, 1.5k files", source)
    assert "numbers" in _failed("four clerks handle 1,500 files", source)
    assert "numbers" in _failed("3 clerks handle 15,000 files", source)


def test_a_word_with_a_number_may_be_joined_but_not_changed() -> None:
    source = "The top 5 results of model gpt-4 are sent to the printer HP200 in room B12, as usual."
    assert not _failed("Top-5 results of GPT-4: printer HP200, room B12.", source)
    assert "addresses" in _failed("Top 5 results of gpt-5: printer HP200, room B12.", source)
    assert "addresses" in _failed("Top 5 results of gpt-4: printer HP200, room B13.", source)


def test_the_probes_are_a_figure_that_never_fails() -> None:
    checks = verify(parse(SOURCE), END, meter=None)
    assert checks[-1].name == "probes" and checks[-1].passed and "questions answered" in checks[-1].detail


@given(st.text(max_size=200), st.text(max_size=200))
@settings(max_examples=60)
def test_any_two_texts_can_be_compared(source: str, text: str) -> None:
    assert len(verify(parse(source), text, meter=None)) == 12


@given(st.text(st.sampled_from("ab .,!?-\n\"'([{:;|>0123456789$%"), max_size=300))
@settings(max_examples=60)
@example("$\n0")
@example("0\n%")
def test_a_text_stands_for_itself(source: str) -> None:
    assert {check.name for check in verify(parse(source), source, meter=None) if not check.passed} <= {"reply"}


def test_hostile_lengths_take_no_hostile_time() -> None:
    for source in (" " * 200_000, "9" * 100_000, "not " * 20_000, "a, " * 30_000, "Aa " * 20_000, ". " * 50_000):
        verify(Document(source, ()), source[:2_000], meter=None)


HOSTILE = (
    "a" * 60_000,
    "a-" * 30_000,
    "\n" * 60_000,
    "<think>" * 9_000,
    "1 000," * 9_000,
    "Aa@" * 20_000,
    "```\n" * 9_000,
)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_replies_take_no_hostile_time(text: str) -> None:
    read = read_reply(text, "Please keep calm.")
    assert read.problem or not passed(parse("Please keep calm."), read.text)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("Here is the shortened text:\n\nKeep calm.", "Keep calm."),
        ("Sure! Here's the compressed version of your prompt:\nKeep calm.", "Keep calm."),
        ("```text\nKeep calm.\n```", "Keep calm."),
        ("<capsule>Keep calm.</capsule>", "Keep calm."),
        ('"Keep calm."', "Keep calm."),
        ("<think>shorten it</think>\nKeep calm.", "Keep calm."),
        ("**Shortened text:**\nKeep calm.", "Keep calm."),
        ("Keep calm.\n\nLet me know if you need anything else!", "Keep calm."),
        ("Keep calm.\n\n(Word count: 2)", "Keep calm."),
        ("-----abc-----\nKeep calm.\n-----abc-----", "Keep calm."),
        ("Keep calm: always.", "Keep calm: always."),
    ],
)
def test_what_a_model_says_around_the_text_is_taken_off(reply: str, text: str) -> None:
    read = read_reply(reply, "Please keep calm, always.", fence="abc")
    assert read.text == text and not read.problem


def test_replies_that_cannot_be_used_say_why() -> None:
    assert "empty" in read_reply("  ", "Text.").problem
    assert "refused" in read_reply("I cannot help with that.", "Text.").problem
    assert "reasoning" in read_reply("<think>so long", "Text.", finish_reason="length").problem
    cut = read_reply("First sentence. Second sen", "Text.", finish_reason="length")
    assert cut.text == "First sentence." and not cut.problem
    assert "cut off" in read_reply("no end in sight", "Text.", finish_reason="length").problem


def test_what_the_source_says_itself_is_no_chatter() -> None:
    source = "Here is the text of the rules:\nKeep calm. I'm sorry is what you say first."
    assert read_reply(source, source).text == source
    assert read_reply("I'm sorry, say first.", "I'm sorry is what to say first.").problem == ""


def test_a_condition_is_not_turned_round() -> None:
    source = parse("Bert pays Anna 500 EUR if the goods arrive late. Leave the valve shut if it is not cold outside.")

    def failed(text: str) -> set[str]:
        return {
            check.name
            for check in verify(source, text, meter=TokenBudget(500, tokenizer="words").meter())
            if not check.passed
        }

    assert failed("Bert pays Anna 500 EUR unless goods arrive late.") == {"negations"}
    assert failed("Bert pays Anna 500 EUR if goods arrive late.") == set()
    assert failed("Leave the valve shut unless it is cold outside.") == set()
