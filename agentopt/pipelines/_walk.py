"""One walk through a pipeline: which nodes have run how often, what they said, and which one may come next.

Pure bookkeeping without any language model, so that the same rules can be tested alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

from agentopt.graph import NODE_COMPONENTS, PIPELINE_END, PIPELINE_PREVIOUS, fill_placeholders, node_placeholders

_FALLBACK_CASE = "*"


class Walk:
    """The state of one run of a legal pipeline `value` on `inputs`."""

    def __init__(self, value: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        self.nodes = cast("dict[str, dict[str, Any]]", value["nodes"])
        self.edges = cast("dict[str, list[str]]", value["edges"])
        self.inputs = dict(inputs)
        self.path: list[str] = []
        self.texts: dict[str, str] = {}
        self.sources: dict[str, Any] = {}
        """Node → its latest text as an input that is linked to the call that gave it."""

    def visited(self, node: str, text: str, source: Any) -> None:
        """Note that `node` ran and said `text`."""
        self.path.append(node)
        self.texts[node] = text
        self.sources[node] = source

    # what a node is shown

    def read(self, node: str) -> dict[str, Any]:
        """The inputs and texts that the node's placeholders name, by name; everything there is when it has none."""
        names = node_placeholders(self.nodes[node])
        if not names:
            last = {self.path[-1]: self.sources[self.path[-1]]} if self.path else {}
            return {**self.inputs, **last}
        found: dict[str, Any] = {}
        for name in names:
            if name in self.nodes:
                found[name] = self.sources.get(name, "")
            elif name == PIPELINE_PREVIOUS:
                found[name] = self.sources[self.path[-1]] if self.path else ""
            elif name in self.inputs:
                found[name] = self.inputs[name]
        return found

    def values(self) -> dict[str, str]:
        """Every placeholder that has a value now, as text; nodes that have not run are empty."""
        values = {name: shown(value) for name, value in self.inputs.items()}
        values.update({name: self.texts.get(name, "") for name in self.nodes})
        values[PIPELINE_PREVIOUS] = self.texts[self.path[-1]] if self.path else ""
        return values

    def prompt(self, node: str) -> tuple[str, str]:
        """The system text and the user text for the node."""
        definition = self.nodes[node]
        values = self.values()
        parts = cast("dict[str, Any]", definition["prompt"])
        texts = [fill_placeholders(parts["task"], values).strip()]
        if parts["principles"]:
            texts.append(
                "Principles:\n" + "\n".join(f"- {fill_placeholders(text, values)}" for text in parts["principles"])
            )
        if parts["output_format"].strip():
            texts.append("Output format:\n" + fill_placeholders(parts["output_format"], values).strip())
        if parts["extra"].strip():
            texts.append(fill_placeholders(parts["extra"], values).strip())
        if not node_placeholders(definition):
            # A node that names nothing would see nothing: it is shown the inputs and the text before it.
            given = [*self.inputs, *self.path[-1:]]
            texts.extend(f"{name}:\n{values[name]}" for name in given)
        return fill_placeholders(definition["role"], values).strip(), "\n\n".join(texts)

    # where it goes

    def options(self, node: str) -> list[str]:
        """What may come after `node` now: its next nodes that have visits left, or what stands behind those used up."""
        direct = [to for to in self.edges[node] if self._open(to)]
        if direct:
            return direct
        seen = dict.fromkeys(self.edges[node])
        for name in (queue := list(seen)):
            for later in self.edges[name]:
                if self._open(later):
                    return [later]
                if later not in seen:
                    seen[later] = None
                    queue.append(later)
        return [PIPELINE_END]

    def _open(self, name: str) -> bool:
        if name == PIPELINE_END:
            return True
        limit = self.nodes[name]["max_visits"]
        return limit == 0 or self.path.count(name) < limit

    def by_field(self, node: str, options: list[str]) -> str:
        """The next node of a "field" route: what the case of the text's field says, else the first option."""
        route = self.nodes[node]["route"]
        found = field_of(self.texts[node], route["field"])
        cases = {case.strip().casefold(): to for case, to in route["cases"].items()}
        target = cases.get(found.strip().casefold()) if found is not None else None
        target = target or cases.get(_FALLBACK_CASE)
        return target if target in options else options[0]

    def question(self, node: str, options: list[str]) -> str:
        """What an "llm" route asks."""
        route = fill_placeholders(self.nodes[node]["route"]["prompt"], self.values()).strip()
        lines = [f"- {to}: {self._about(to)}" for to in options]
        return (
            f"{route or 'Decide which step comes next.'}\n\nThe text of this step:\n{self.texts[node]}\n\n"
            "The possible next steps:\n" + "\n".join(lines) + "\n\nAnswer with the name of one of them."
        )

    def _about(self, to: str) -> str:
        if to == PIPELINE_END:
            return "finish; the text above is the answer"
        node = self.nodes[to]
        return node["description"] or " ".join(node["prompt"][NODE_COMPONENTS[0]].split())[:120]


def shown(value: Any) -> str:
    """A value as it stands in a prompt."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)


def field_of(text: str, field: str) -> str | None:
    """The value of `field` in a text: in its first JSON object, else on a line `field: value`; all of it for ""."""
    if not field:
        return text
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            data = decoder.raw_decode(text, match.start())[0]
        except (ValueError, RecursionError):
            continue
        if isinstance(data, dict) and field in data:
            return shown(cast("dict[str, Any]", data)[field])
        break
    line = re.search(rf"^[\W_]*{re.escape(field)}[\W_]*[:=]\s*(.+?)\s*$", text, re.IGNORECASE | re.MULTILINE)
    return line.group(1).strip("*_`\"' .") if line else None
