"""What a text parameter is for, found without a language model: its labels, its subject, where its placeholders stand.

The unit is one text parameter of one program. Labels come from the choices its language model calls were given, else
from the training data. Everything else is read from the words of the original text and the names of the input fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from agentopt.optimizers._data import DataDescription
from agentopt.optimizers._legal import headline

if TYPE_CHECKING:
    from agentopt.graph import OpRecord, ParameterSpec, Subgraph
    from agentopt.optimizers._protocol import ProposeContext

_PLACEHOLDER = re.compile(r"(?<!\{)\{([^{}]*)\}(?!\})")
_OPENERS = (":", "<", '"', "'", "`", "(")
_TAG_LINE = re.compile(r"^</?[\w-]+>$")
_CUE_NAME = re.compile(r"(?:^|[._])(?:prefix|prefill|cue|lead_in|opening|answer_start|reply_start)$", re.IGNORECASE)
_INSTRUCTING_NAME = re.compile(r"(?:^|[._])(?:system|system_prompt|instructions?)$", re.IGNORECASE)
_DETERMINED = re.compile(
    r"\b(?:the|this|that|these|each|an?|following|given|provided|your|my)\s+(?=((?:[a-z][\w'-]*\s+){0,3}[a-z][\w'-]*))",
    re.IGNORECASE,
)
_STOP = frozenset(
    {
        "is", "are", "was", "were", "be", "been", "as", "into", "by", "to", "from", "in", "for", "that", "which", "who",
        "and", "or", "with", "below", "above", "of", "on", "at", "if", "it", "its", "has", "have", "does", "do", "can",
        "could", "should", "would", "will", "using", "based", "according", "given", "where", "when", "then", "so",
        "not", "no", "what", "how", "why", "whether", "belongs", "belong", "expresses", "express", "asks", "shows",
        "says", "fits", "fit", "best",
    }
)  # fmt: skip
_SKIP = frozenset(
    {
        "following", "given", "provided", "above", "below", "next", "single", "one", "same", "right", "correct",
        "appropriate", "most", "likely",
    }
)  # fmt: skip
_DECIDED = (
    "sentiment", "topic", "category", "intent", "type", "class", "queue", "priority", "emotion", "language", "genre",
    "department", "relation", "label", "kind", "answer", "tone", "stance", "subject", "answer type", "question type",
)  # fmt: skip
_LABEL_SETS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"positive", "negative", "neutral", "mixed"}), "sentiment"),
    (frozenset({"yes", "no", "true", "false", "maybe", "unknown"}), "answer"),
    (frozenset({"entailment", "contradiction", "neutral", "not_entailment"}), "relation"),
)
"""What a few very common label sets decide; any other set is called by a word of the original text, or "category"."""


@dataclass(frozen=True, slots=True)
class TextSpace:
    """What frames are filled with for one parameter."""

    name: str
    core: str
    """The original instruction without the lines that hold placeholders."""
    block: str
    """The placeholder lines, '' when the text has no placeholders (or when they stand inside sentences)."""
    fixed: bool
    """True when placeholders stand inside sentences: the original must stay whole and can only be added to."""
    labels: tuple[str, ...]
    subject: str
    noun: str
    answer: str
    """"label", "number", "json" or "text"."""
    keys: tuple[str, ...]
    field: str
    cue: bool = False
    """True for a text that begins the answer: other frames fit than for an instruction."""
    variable: str = ""
    """The one placeholder, when there is exactly one and it stands apart."""


def text_space(context: ProposeContext, spec: ParameterSpec, data: DataDescription, text: str) -> TextSpace:
    """Look at `text`, a value of `spec`, in the light of the data and the recorded calls."""
    core, block, fixed = split_placeholders(text, spec.variables)
    told = _words(context, core) or text
    labels = reply_labels(context, spec.name, data, text)
    fields = spec.variables or data.inputs
    answer = "label" if labels else (data.answer if data.answer in ("number", "json") else "text")
    return TextSpace(
        name=spec.name,
        core=core,
        block=block,
        fixed=fixed,
        labels=labels,
        subject=subject_of(told, labels, fields),
        noun=noun_of(told, labels),
        answer=answer,
        keys=tuple(data.fields),
        field=headline(fields[-1]) if fields else "Input",
        cue=is_cue(spec, text),
        variable=spec.variables[0] if block and len(spec.variables) == 1 else "",
    )


def split_placeholders(text: str, variables: Sequence[str]) -> tuple[str, str, bool]:
    """(instruction, placeholder lines, whether they cannot be told apart).

    A line counts as a placeholder line when at most a short heading stands before its placeholders and nothing after
    them. In `Classify the ticket: {ticket}` the words before the colon are instruction. Short headings after the last
    placeholder (`Label:`) belong to the placeholder lines.
    """
    whole = text.strip()
    if not variables:
        return whole, "", False
    core: list[str] = []
    block: list[str] = []
    after: list[str] = []
    for line in whole.splitlines():
        places = [match for match in _PLACEHOLDER.finditer(line) if match.group(1).split(".")[0] in variables]
        if not places:
            (after if block else core).append(line)
            continue
        if _PLACEHOLDER.sub("", line[places[0].start() :]).strip(" \t\"'`<>().,;:|-"):
            return whole, "", True
        block.extend(after)
        after = []
        before = line[: places[0].start()].rstrip()
        words = before.rstrip(":").strip(" \"'`<(")
        if not words or (len(words.split()) <= (2 if "".join(core).strip() else 1) and before.endswith(_OPENERS)):
            block.append(line.strip())
        elif before.endswith((*_OPENERS, ".", "?", "!")):
            core.append(words + ("" if words.endswith((".", "?", "!")) else "."))
            block.append("\n".join(f"{headline(match.group(1))}: {match.group(0)}" for match in places))
        else:
            return whole, "", True
    if any("{" + name + "}" not in "\n".join(block) for name in variables):
        return whole, "", True
    if after and all(len(line.split()) <= 3 and line.rstrip().endswith(":") for line in after if line.strip()):
        block.extend(after)
        after = []
    if any(_TAG_LINE.match(line.strip()) for line in (*core, *after)):
        return whole, "", True
    return "\n".join([*core, *after]).strip(), "\n".join(block).strip(), False


def _words(context: ProposeContext, core: str) -> str:
    """`core`, or for a text without words of its own the program's other prompts: they name the subject too."""
    if len(core.split()) > 3:
        return core
    others = [str(spec.default) for spec in context.specs.values() if spec.kind == "prompt"]
    return "\n".join([core, *others]).strip()


def is_cue(spec: ParameterSpec, text: str) -> bool:
    """Whether a text is the beginning of an answer ("Label:", or nothing yet) and not an instruction."""
    words = text.strip()
    if spec.variables:
        return False
    if not words:
        return _INSTRUCTING_NAME.search(spec.name) is None
    return (len(words.split()) <= 3 and words.endswith(":")) or bool(_CUE_NAME.search(spec.name))


def calls_in(graph: Subgraph | None, name: str) -> list[OpRecord]:
    """The recorded language model calls that read the parameter, or else those inside the call that did."""
    if graph is None:
        return []
    ops = graph.trace.ops
    reads = {
        op.id for op in graph.ops if any(kind == "parameter" and ops[parent].op == name for parent, kind in op.parents)
    }
    direct = [op for op in graph.ops if op.kind == "lm" and op.id in reads]
    return direct or [op for op in ops if op.kind == "lm" and _inside(op, reads, ops)]


def _inside(op: OpRecord, reads: set[int], ops: Sequence[OpRecord]) -> bool:
    enclosing = op.parent_op
    while enclosing is not None:
        if enclosing in reads:
            return True
        enclosing = ops[enclosing].parent_op
    return False


def call_choices(op: OpRecord) -> tuple[str, ...]:
    """The choices a language model call was bound to, () when it was free."""
    value: Any = (op.meta or {}).get("choices") or op.inputs.get("choices") or ()
    return tuple(str(item) for item in cast("Sequence[Any]", value)) if isinstance(value, (list, tuple)) else ()


def reply_labels(context: ProposeContext, name: str, data: DataDescription, text: str) -> tuple[str, ...]:
    """The labels a call that reads this parameter may answer with, most frequent in the data first; () when free."""
    spaces = {
        choices for graph in context.graphs for op in calls_in(graph.get(name), name) if (choices := call_choices(op))
    }
    if len(spaces) == 1:
        choices = spaces.pop()
        if len(choices) > 1:
            return tuple(sorted(choices, key=lambda label: (-data.counts.get(label, 0), choices.index(label))))
    if data.answer == "label":
        return data.labels
    lowered = text.casefold()
    named = [
        labels for labels in data.fields.values() if labels and all(label.casefold() in lowered for label in labels)
    ]
    return named[0] if len(named) == 1 else ()


def subject_of(text: str, labels: Sequence[str], fields: Sequence[str]) -> str:
    """What is judged ("movie review"): the best noun phrase of the original text, else the input field's name."""
    stop = _STOP | {label.casefold() for label in labels}
    decided = {word for phrase in _DECIDED for word in phrase.split()}
    found: list[str] = []
    plain = _PLACEHOLDER.sub(" ", text)
    for match in _DETERMINED.finditer(plain):
        words: list[str] = []
        for word in match.group(1).split():
            folded = word.casefold()
            if folded in stop:
                break
            if folded not in _SKIP:
                words.append(folded)
        if words and not all(word in decided for word in words):
            found.append(" ".join(words))
    if found:
        lowered = [field.casefold().replace("_", " ") for field in fields]
        named = [phrase for phrase in found if any(field in phrase for field in lowered)]
        return (named or found)[0]
    generic = {"text", "input", "inputs", "x", "s", "prompt", "query", "message", "data"}
    if fields:
        field = fields[-1].replace("_", " ").casefold()
        return field if field not in generic - {"query", "message"} else "text"
    return "text"


def noun_of(text: str, labels: Sequence[str]) -> str:
    """What is decided about the subject ("sentiment"): a word of the original text, of the label set, or "category"."""
    folded = {label.casefold() for label in labels}
    for known, noun in _LABEL_SETS:
        if len(folded) > 1 and folded <= known:
            return noun
    lowered = text.casefold()
    found = [(lowered.find(noun), noun) for noun in _DECIDED if re.search(rf"\b{noun}\b", lowered)]
    return min(found)[1] if found else "category"


def labels_joined(labels: Sequence[str], last: str) -> str:
    """`a, b or c`."""
    if len(labels) < 2:
        return "".join(labels)
    return ", ".join(labels[:-1]) + f" {last} " + labels[-1]


def cue_text(cues: Mapping[str, Sequence[str]], labels: Sequence[str]) -> str:
    """One line per label with the words that speak for it; '' when fewer than two labels have any."""
    lines = [f"{label}: words such as {', '.join(cues[label])}" for label in labels if cues.get(label)]
    return "\n".join(lines) if len(lines) > 1 else ""
