"""Rows as token ids: a prompt, and each thing that may follow it.

Prompt and continuation are tokenized together, as the model would meet them in running text, and then cut apart. That
is exact for every tokenizer: nothing is assumed about how it writes the space before a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, overload

from agentopt.errors import UserError
from agentopt.weights.tasks._prompts import joined

if TYPE_CHECKING:
    from agentopt.weights.tasks._rows import TaskData, TaskRow

CONTENT_FREE = ("N/A", "", "[MASK]")
"""Inputs that say nothing: what the model prefers after them is its bias (arXiv 2102.09690, section 5)."""


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One row as token ids.

    Attributes:
        id: of the row.
        place: of the row, for messages.
        prompt: token ids up to where the model begins to write.
        candidates: token ids of everything that may follow; one of them for generation.
        answer: number of the right candidate.
        texts: the candidates as text.
    """

    id: str
    place: str
    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    answer: int
    texts: tuple[str, ...]

    @property
    def length(self) -> int:
        """Positions of the row in a forward pass: the last token of a candidate is only predicted, never read."""
        return len(self.prompt) + sum(len(one) - 1 for one in self.candidates)


@dataclass(frozen=True, slots=True)
class Encoded(Sequence[EncodedExample]):
    """Encoded rows and what a forward pass over them has to know.

    Attributes:
        name: of the data.
        kind: "classification", "choice" or "generation".
        examples: in the order of the rows.
        labels: label values as text (classification).
        words: the label words, in the order of `labels`.
        pad: token id that fills short rows; it is never read.
        mean: compare candidates by their mean log-probability per token (options of different lengths) rather than
            by the sum.
        content_free: the prompt around inputs that say nothing; without candidates where those are a row's own.
        truncated: rows whose prompt lost its beginning.
        notes: what a user should know about label words, one sentence each.
    """

    name: str
    kind: Literal["classification", "choice", "generation"]
    examples: tuple[EncodedExample, ...]
    labels: tuple[str, ...]
    words: tuple[str, ...]
    pad: int
    mean: bool
    content_free: tuple[EncodedExample, ...]
    truncated: int
    notes: tuple[str, ...]

    @overload
    def __getitem__(self, index: int) -> EncodedExample: ...
    @overload
    def __getitem__(self, index: slice) -> Encoded: ...
    def __getitem__(self, index: int | slice) -> EncodedExample | Encoded:
        if isinstance(index, slice):
            return replace(self, examples=self.examples[index])
        return self.examples[index]

    def __len__(self) -> int:
        return len(self.examples)


class _Tokens:
    """The tokenizer, with a begin-of-text token where it wants one, or with the chat template."""

    def __init__(self, tokenizer: Any, max_tokens: int, chat: bool) -> None:
        self.tokenizer, self.max_tokens, self.chat = tokenizer, max_tokens, chat
        if chat and not getattr(tokenizer, "chat_template", None):
            raise UserError("chat: the tokenizer has no chat template; leave chat off for this model.")
        self.lead = [] if chat else self._lead()
        self.truncated = 0

    def _lead(self) -> list[int]:
        plain, whole = self.ids(["x"])[0], list(self.tokenizer("x")["input_ids"])
        starts = [at for at in range(len(whole)) if whole[at : at + len(plain)] == plain]
        return whole[: starts[0]] if starts else []

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def prompt_text(self, prompt: str) -> str:
        if not self.chat:
            return prompt
        turn = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)

    def encode(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]], places: Sequence[str], end: Sequence[int]
    ) -> list[tuple[list[int], list[list[int]]]]:
        """Token ids of each prompt and of its continuations, each continuation closed by `end`."""
        heads: list[str] = []
        tails: list[list[str]] = []
        for prompt, options in zip(prompts, answers, strict=True):
            # A chat template ends where the reply begins: nothing is put between.
            pairs = [(self.prompt_text(prompt), one) if self.chat else joined(prompt, one) for one in options]
            heads.append(pairs[0][0])
            tails.append([tail for _, tail in pairs])
        flat = [head + tail for head, options in zip(heads, tails, strict=True) for tail in options]
        starts, wholes = self.ids(heads), iter(self.ids(flat))
        result: list[tuple[list[int], list[list[int]]]] = []
        for number, options in enumerate(tails):
            parts = [[*self._rest(starts[number], next(wholes), tail), *end] for tail in options]
            result.append((self._fit(prompts[number], starts[number], parts, places[number]), parts))
        return result

    def _rest(self, head: list[int], whole: list[int], tail: str) -> list[int]:
        if whole[: len(head)] == head:
            return whole[len(head) :]
        # The tokenizer joined letters across the border: take the continuation as it is written after a neutral one.
        neutral, both = self.ids(["x\n", "x\n" + tail])
        return both[len(neutral) :] if both[: len(neutral)] == neutral else self.ids([tail])[0]

    def _fit(self, prompt: str, head: list[int], parts: list[list[int]], place: str) -> list[int]:
        room = self.max_tokens - max(map(len, parts)) - len(self.lead)
        if room < 1:
            longest = max(map(len, parts))
            raise UserError(
                f"{place}: the answer has {longest} tokens, which leaves no room for a prompt within "
                f"max_tokens={self.max_tokens}; raise max_tokens or shorten the answer."
            )
        if len(head) > room:
            self.truncated += 1
            head = self._shortened(prompt, len(head) - room)[-room:] if self.chat else head[-room:]
        return [*self.lead, *head]

    def _shortened(self, prompt: str, excess: int) -> list[int]:
        """The user's text loses its beginning, the turns around it stay whole."""
        content = self.ids([prompt])[0][excess:]
        return self.ids([self.prompt_text(self.tokenizer.decode(content))])[0]


def encode_rows(data: TaskData, tokenizer: Any, *, max_tokens: int, chat: bool) -> Encoded:
    """See `TaskData.encode`."""
    if max_tokens < 2:
        raise UserError(f"max_tokens: found {max_tokens}, expected at least 2.")
    tokens = _Tokens(tokenizer, max_tokens, chat)
    kind, notes = data.kind, list[str]()
    rows = [(data.template.render(row.fields), row.candidates or data.words) for row in data.rows]
    places = [row.place for row in data.rows]
    end = [int(tokenizer.eos_token_id)] if kind == "generation" and tokenizer.eos_token_id is not None else []
    filled = [data.template.filled(text) for text in CONTENT_FREE] if kind != "generation" else []
    if kind == "classification":
        end = _check_words(data, tokens, rows[0][0], notes)
    before = tokens.truncated
    encoded = tokens.encode([text for text, _ in rows], [options for _, options in rows], places, end)
    truncated = tokens.truncated - before
    nothing = tokens.encode(filled, [data.words or ("x",) for _ in filled], filled, end)
    examples: list[EncodedExample] = []
    for row, (_, texts), (prompt, parts) in zip(data.rows, rows, encoded, strict=True):
        examples.append(_example(row, prompt, parts, texts, kind))
    free = [
        _merged(EncodedExample("", "content-free input", tuple(prompt), tuple(map(tuple, parts)), 0, data.words))
        if kind == "classification"
        else EncodedExample("", "content-free input", tuple(prompt), (), 0, ())
        for prompt, parts in nothing
        if prompt
    ]
    if truncated:
        notes.append(f"{truncated} of {len(rows)} prompts were longer than {max_tokens} tokens: cut in front.")
    return Encoded(
        name=data.name,
        kind=kind,
        examples=tuple(examples),
        labels=data.labels,
        words=data.words,
        pad=int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0),
        mean=kind == "choice",
        content_free=tuple(free),
        truncated=truncated,
        notes=tuple(notes),
    )


def _example(
    row: TaskRow, prompt: list[int], parts: list[list[int]], texts: Sequence[str], kind: str
) -> EncodedExample:
    if not prompt:
        raise UserError(f"{row.place}: the prompt is empty; expected a text in a column that the prompt shows.")
    for number, part in enumerate(parts):
        if not part:
            raise UserError(f"{row.place}: the tokenizer makes nothing of {texts[number]!r}; expected a text.")
        if part in parts[:number]:
            other = texts[parts.index(part)]
            raise UserError(
                f"{row.place}: {other!r} and {texts[number]!r} are the same to the tokenizer; expected answers that "
                f"it tells apart{' (give other words with labels=)' if kind == 'classification' else ''}."
            )
    found = EncodedExample(row.id, row.place, tuple(prompt), tuple(map(tuple, parts)), row.answer, tuple(texts))
    return _merged(found) if kind == "classification" else found


def _merged(example: EncodedExample) -> EncodedExample:
    """What all candidates begin with goes to the prompt: it adds the same to every sum, and is then computed once."""
    shortest = min(map(len, example.candidates))
    first = example.candidates[0]
    same = 0
    while same < shortest - 1 and all(one[same] == first[same] for one in example.candidates):
        same += 1
    if not same:
        return example
    rest = tuple(one[same:] for one in example.candidates)
    return replace(example, prompt=example.prompt + first[:same], candidates=rest)


def _check_words(data: TaskData, tokens: _Tokens, prompt: str, notes: list[str]) -> list[int]:
    """What closes every label word: nothing, or a line break when one word begins with another."""
    ((_, parts),) = tokens.encode([prompt], [data.words], [data.rows[0].place], [])
    unknown = getattr(tokens.tokenizer, "unk_token_id", None)
    for label, word, part in zip(data.labels, data.words, parts, strict=True):
        if not part or (unknown is not None and unknown in part):
            raise UserError(
                f"labels: the tokenizer does not know the word {word!r} of the label {label!r}; give the model a word "
                f"it knows, such as labels={{{label!r}: 'yes', ...}}."
            )
    if all(word.lstrip("-").isdecimal() for word in data.words):
        notes.append(
            f"the label words are numbers ({', '.join(data.words[:4])}), which tell the model nothing: "
            "words such as labels={'0': 'terrible', '1': 'great'} start far higher."
        )
    pairs = [(a, b) for a in range(len(parts)) for b in range(len(parts)) if a != b]
    inside = next(((a, b) for a, b in pairs if parts[b][: len(parts[a])] == parts[a] and parts[a] != parts[b]), None)
    if inside is None:
        return []
    # The shorter word could never be less likely than the longer one: close both.
    shorter, longer = (data.words[number] for number in inside)
    close = tokens.ids(["x\n"])[0][len(tokens.ids(["x"])[0]) :]
    if not close:
        raise UserError(
            f"labels: the word {longer!r} begins with {shorter!r}, and this tokenizer has no line break to close them; "
            "give words with labels= of which none begins with another."
        )
    notes.append(f"the label word {longer!r} begins with {shorter!r}: every word is closed by a line break.")
    return close
