"""Statements in words: English sentences in two to four forms, or a plain form for models with few words.

plain       "ada is brave", "brave is calm", "brave and not shy is calm" (head first: "calm if brave and not shy"),
            "otter greets mole", "if x greets mole and x is shy then x is calm"
sentences   "Ada is brave.", "If someone is brave and calm then they are shy.", "All brave people are calm.",
            "Someone is calm if they are brave."

`templates` says which forms are used: "train" leaves out the last one of each kind of statement, "test" uses that one
alone; "head-first" and "body-first" use one form, because a model that reads from left to right can only write from
what comes first to what comes later.
"""

from __future__ import annotations

import random
from typing import Literal as OneOf

from agentopt.weights.fold.worlds._logic import ANY, IS, Clause, Literal
from agentopt.weights.fold.worlds._names import base

Style = OneOf["sentences", "plain"]
Templates = OneOf["all", "train", "test", "head-first", "body-first"]


class Writer:
    """Writes statements in one style."""

    def __init__(self, style: Style, templates: Templates, *, people: bool) -> None:
        self.style: Style = style
        self.templates: Templates = templates
        self.someone, self.they, self.group = ("someone", "they", "people") if people else ("something", "it", "things")

    def statement(self, clause: Clause, draw: random.Random) -> str:
        """A fact or a rule."""
        if self.style == "plain":
            return _plain_rule(clause, self.templates) if clause.body else plain(clause.head)
        forms = self._rule_forms(clause) if clause.body else self._fact_forms(clause.head)
        return _sentence(self._pick(forms, draw))

    def question(self, literal: Literal, draw: random.Random) -> str:
        """A statement to be judged."""
        if self.style == "plain":
            return plain(literal)
        said = self._literal(literal)
        forms = [f"is it true that {said}", f"does it follow that {said}"]
        if self.templates in ("head-first", "body-first"):
            forms = forms[:1]
        return _sentence(self._pick(forms, draw))[:-1] + "?"

    def _pick(self, forms: list[str], draw: random.Random) -> str:
        """One of the forms: a rule's last one begins with its head, the others with its body."""
        if self.templates in ("head-first", "body-first"):
            return forms[-1] if self.templates == "head-first" else forms[0]
        if self.templates != "all":
            forms = forms[:-1] if self.templates == "train" else forms[-1:]
        return draw.choice(forms)

    def _fact_forms(self, literal: Literal) -> list[str]:
        said = self._literal(literal)
        return [said] if self.templates in ("head-first", "body-first") else [said, f"it is known that {said}"]

    def _rule_forms(self, clause: Clause) -> list[str]:
        head, body = clause.head, clause.body
        named = self.someone if head.subject == ANY else ""
        forms = [f"if {self._body(body)} then {self._literal(head, self.they)}"]
        general = head.subject == ANY and all(part.subject == ANY and part.verb == IS for part in (head, *body))
        if general:
            end = _quality(head)
            if all(part.positive for part in body):
                forms.append(f"all {', '.join(part.object for part in body)} {self.group} are {end}")
            who = "everyone who" if self.group == "people" else "everything that"
            forms.append(f"{who} is {' and '.join(_quality(part) for part in body)} is {end}")
        forms.append(f"{self._literal(head, named)} if {self._body(body, self.they if named else self.someone)}")
        return forms

    def _body(self, body: tuple[Literal, ...], first: str | None = None) -> str:
        name = first or self.someone
        said: list[str] = []
        for place, literal in enumerate(body):
            before = body[place - 1] if place else None
            if before is not None and literal.verb == before.verb == IS and literal.subject == before.subject:
                said.append(_quality(literal))
            else:
                said.append(self._literal(literal, name))
            if literal.subject == ANY:
                name = self.they
        return " and ".join(said)

    def _literal(self, literal: Literal, variable: str = "") -> str:
        """One statement; `variable` is the word for the subject that is not named."""
        open_ = literal.subject == ANY
        subject = variable if open_ else noun(literal.subject)
        plural = open_ and variable == "they"
        if literal.verb == IS:
            return f"{subject} {'are' if plural else 'is'} {_quality(literal)}"
        target = noun(literal.object)
        if literal.positive:
            return f"{subject} {base(literal.verb) if plural else literal.verb} {target}"
        return f"{subject} {'do' if plural else 'does'} not {base(literal.verb)} {target}"


def noun(name: str) -> str:
    """A name as it is, a kind of animal with its article."""
    return name if name[:1].isupper() else f"the {name}"


def _quality(literal: Literal) -> str:
    return literal.object if literal.positive else f"not {literal.object}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def plain(literal: Literal, subject: str | None = None) -> str:
    """The plain form of a statement."""
    name = (subject or literal.subject).lower()
    if literal.verb == IS:
        return f"{name} is {_quality(literal)}"
    return f"{name} {'' if literal.positive else 'not '}{literal.verb} {literal.object.lower()}"


def _plain_rule(clause: Clause, templates: Templates) -> str:
    head, body = clause.head, clause.body
    if all(part.subject == ANY and part.verb == IS for part in (head, *body)):
        conditions = " and ".join(_quality(part) for part in body)
        return f"{_quality(head)} if {conditions}" if templates == "head-first" else f"{conditions} is {_quality(head)}"
    said = [plain(part, "x" if part.subject == ANY else None) for part in (*body, head)]
    conditions = " and ".join(said[:-1])
    return f"{said[-1]} if {conditions}" if templates == "head-first" else f"if {conditions} then {said[-1]}"
