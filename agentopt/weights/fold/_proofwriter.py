"""ProofWriter (arXiv 2012.13048) as it is published: the file of the Allen Institute, and the form of Logic-LM.

The first has proofs, which are kept. The second (a context, a question, options A to C) has none: where the sentences
can be read as a theory whose chainer agrees with the label, its proof is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.evaluation._files import Row
from agentopt.weights.fold._types import FoldTask, Question
from agentopt.weights.fold.worlds import Solution, parse_statement, parse_theory, sentences, solve

_OPTION = re.compile(r"\s*([A-Z])\s*[).:]\s*(.+?)\s*")
_WORDS = ("true", "false", "unknown")


def is_proofwriter(fields: Mapping[str, Any]) -> bool:
    """Whether a row has the fields of one of the two forms."""
    published = isinstance(fields.get("questions"), Mapping) and ("theory" in fields or "triples" in fields)
    return published or ("context" in fields and "options" in fields and "facts" not in fields)


def read_proofwriter(row: Row) -> tuple[FoldTask, bool]:
    """The task of a row, and whether it is all of it.

    Raises:
        UserError: a field that is missing or of another type.
    """
    return (_published(row), True) if "questions" in row.fields else (_logic_lm(row), False)


def _logic_lm(row: Row) -> FoldTask:
    context, asked, answer = (_text(row, row.fields, name) for name in ("context", "question", "answer"))
    options = row.fields["options"]
    found: dict[str, str] = {}
    for option in cast("list[object]", options) if isinstance(options, list) else []:
        parts = _OPTION.fullmatch(option) if isinstance(option, str) else None
        if parts is None:
            raise UserError(f"{row.place}: options: found {option!r}, expected text such as 'A) True'.")
        found[parts[1]] = parts[2].lower() if parts[2].lower() in _WORDS else parts[2]
    if answer not in found:
        raise UserError(f"{row.place}: answer: found {answer!r}, expected one of {', '.join(found) or 'the options'}.")
    facts = sentences(context)
    if not facts:
        raise UserError(f"{row.place}: context: found no sentences.")
    statement = asked.rsplit("? ", 1)[-1].strip()
    identity = row.fields.get("id")
    name = str(identity) if identity is not None else row.place
    relevant, depth = _proved(_solved(facts, name), statement, found[answer])
    question = Question(statement, found[answer], relevant, depth, tuple(found.values()))
    return FoldTask(name, facts, (question,), {"source": "logic-lm", "world": _world(name)})


def _proved(solution: Solution | None, statement: str, answer: str) -> tuple[tuple[int, ...], int | None]:
    """A proof of ours, where theory and statement can be read and say the same as the label."""
    if solution is None:
        return (), None
    try:
        literal = parse_statement(statement)
    except UserError:
        return (), None
    truth = {True: "true", False: "false", None: "unknown"}[solution.truth(literal)]
    return (solution.proof(literal), solution.depth(literal)) if truth == answer else ((), None)


def _world(name: str) -> str:
    return "closed" if "CWA" in name else "open"


def _published(row: Row) -> FoldTask:
    name = str(row.fields.get("id", row.place))
    places: dict[str, int] = {}
    facts: list[str] = []
    for group in ("triples", "rules"):
        for key, value in _object(row, row.fields, group).items():
            places[key] = len(facts)
            facts.append(_text(row, _fields(row, value, f"{group}.{key}"), "text", f"{group}.{key}."))
    if not facts:
        facts = list(sentences(_text(row, row.fields, "theory")))
    if not facts:
        raise UserError(f"{row.place}: found no triples, rules or sentences of a theory.")
    questions: list[Question] = []
    asked = _object(row, row.fields, "questions")
    choices = _WORDS if any(_fields(row, one, key).get("answer") == "Unknown" for key, one in asked.items()) else None
    choices = choices or (_WORDS if _world(name) == "open" else _WORDS[:2])
    solution = _solved(facts, name) if not places else None
    for key, value in asked.items():
        questions.append(_question(row, f"questions.{key}.", _fields(row, value, key), places, choices, solution))
    if not questions:
        raise UserError(f"{row.place}: questions: found an empty object, expected at least one question.")
    return FoldTask(name, tuple(facts), tuple(questions), {"source": "proofwriter", "world": _world(name)})


def _solved(facts: Sequence[str], name: str) -> Solution | None:
    try:
        return solve(parse_theory(facts, world="closed" if _world(name) == "closed" else "open"))
    except UserError:
        return None


def _question(
    row: Row,
    prefix: str,
    fields: Mapping[str, Any],
    places: Mapping[str, int],
    choices: tuple[str, ...],
    solution: Solution | None,
) -> Question:
    text = _text(row, fields, "question", prefix)
    answer = str(fields.get("answer")).lower()
    if answer not in _WORDS:
        raise UserError(
            f"{row.place}: {prefix}answer: found {fields.get('answer')!r}, expected true, false or Unknown."
        )
    depth = fields.get("QDep")
    if depth is not None and (not isinstance(depth, int) or isinstance(depth, bool) or depth < 0):
        raise UserError(f"{row.place}: {prefix}QDep: found {depth!r}, expected a number from 0.")
    relevant = _cited(fields, places)
    if not relevant and solution is not None:
        return Question(text, answer, *_proved(solution, text, answer), choices)
    # Their depth of a question that nothing proves is that of a failed search, which is another thing than ours.
    return Question(text, answer, relevant, depth if relevant else None, choices)


def _cited(fields: Mapping[str, Any], places: Mapping[str, int]) -> tuple[int, ...]:
    """The statements of the shortest proof that is given, in its order: premises stand before their rule."""
    if not str(fields.get("strategy", "proof")).endswith("proof"):
        return ()
    given = fields.get("proofsWithIntermediates")
    texts = [
        str(cast("Mapping[str, Any]", proof).get("representation", ""))
        for proof in (cast("list[object]", given) if isinstance(given, list) else [])
        if isinstance(proof, Mapping)
    ]
    texts = texts or re.split(r"\bOR\b", str(fields.get("proofs") or ""))
    proofs = [
        tuple(dict.fromkeys(places[key] for key in re.findall(r"[A-Za-z]+\d+", text) if key in places))
        for text in texts
    ]
    return min((proof for proof in proofs if proof), key=len, default=())


def _object(row: Row, fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return _fields(row, fields.get(name, {}), name)


def _fields(row: Row, value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{row.place}: {name}: found {type(value).__name__}, expected an object.")
    return cast("Mapping[str, Any]", value)


def _text(row: Row, fields: Mapping[str, Any], name: str, prefix: str = "") -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        found = "nothing" if value is None else "blank text" if isinstance(value, str) else type(value).__name__
        raise UserError(f"{row.place}: {prefix}{name}: found {found}, expected text.")
    return value
