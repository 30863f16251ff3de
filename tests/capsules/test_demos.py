"""Demonstrations: whole ones, far apart, as many of each label; a rationale leaves before a demonstration does."""

from agentopt.capsules import TokenBudget, extract, parse
from agentopt.capsules.extraction._demos import label_of, spread
from agentopt.capsules.extraction._terms import Vocabulary

REVIEWS = [
    ("a warm and funny film about a family dinner", "positive"),
    ("a warm and funny film about a family trip", "positive"),
    ("a warm and funny film about a family farm", "positive"),
    ("a warm and funny film about a family wedding", "positive"),
    ("dull plot with wooden acting throughout", "negative"),
    ("the soundtrack drowns every line of dialogue", "negative"),
]
PROMPT = "Classify the review.\n\n" + "\n\n".join(f"Review: {text}\nSentiment: {label}" for text, label in REVIEWS)


def test_labels_are_read_from_the_end():
    assert label_of("Review: fine\nSentiment: Positive") == "positive"
    assert label_of("Q: 2+2?\nA: It is 2+2. The answer is 4.") == "4"
    assert label_of("great film => positive") == "positive"
    assert label_of("Q: why?\nA: because the sky scatters short waves more than long ones") == ""


def test_any_beginning_of_the_order_is_balanced_and_diverse():
    vocabulary = Vocabulary()
    lists = [vocabulary.read(text) for text, _ in REVIEWS]
    order = spread(lists, len(vocabulary), [label for _, label in REVIEWS])
    assert sorted(order) == list(range(6))
    assert [REVIEWS[row][1] for row in order[:4]].count("negative") == 2


def test_answers_that_never_repeat_are_no_labels():
    vocabulary = Vocabulary()
    lists = [vocabulary.read(text) for text in ("red apple", "red apple pie", "blue whale song")]
    assert set(spread(lists, len(vocabulary), ["1", "2", "3"])[:2]) != {0, 1}


def test_demonstrations_stay_whole_and_both_labels_stay():
    meter = TokenBudget(45).meter()
    found = extract([parse(PROMPT)], meter)
    text = found.texts[0]
    assert text.startswith("Classify the review.")
    assert "Sentiment: positive" in text and "Sentiment: negative" in text
    assert text.count("Review:") == text.count("Sentiment:")
    for dropped in found.dropped:
        assert dropped.kind == "demonstration" and dropped.text in PROMPT


def test_the_rationale_leaves_before_the_demonstration():
    shots = [
        f"Question: {who} has {n} apples and buys {n} boxes with {n} apples in each of them at the market on the hill. "
        f"How many apples does {who} have at the end of the day?\nLet's think step by step\n"
        f"{who} starts with {n} apples in the kitchen at home before the trip to the market begins. "
        f"The boxes hold {n} * {n} = {n * n} apples, which are carried up the hill on a small cart. "
        f"Both numbers are added, {n} + {n * n} = {n + n * n} apples in all, and nothing is eaten on the way down. "
        "The house by the lake is where the family lives in summer and where the apples are washed. "
        f"The apples are then put into the cellar where they wait for the winter.\nThe answer is {n + n * n}"
        for who, n in (("Ada", 3), ("Ben", 5))
    ]
    text = "\n\n".join(shots)
    document = parse(text)
    assert {unit.kind for unit in document.units} == {"demonstration"}
    one = TokenBudget(1000).meter().total([shots[0]])
    found = extract([document], TokenBudget(one - 10).meter())
    assert found.texts[0].count("Question:") == found.texts[0].count("The answer is") >= 1
    assert "added" not in found.texts[0]
