"""Parameter values as the optimizer's language model is shown them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from agentopt.optimizers._feedback import cut, shown
from agentopt.optimizers._legal import current_value

if TYPE_CHECKING:
    from agentopt.graph import ParameterSpec
    from agentopt.optimizers._protocol import ProposeContext

Value = Mapping[str, Any]


def value_text(context: ProposeContext, spec: ParameterSpec, node: str, limit: int) -> str:
    """The parent's value of `spec`, as far as it concerns `node` ('' for all of it), within `limit` characters."""
    value = current_value(context, spec)
    match spec.kind:
        case "pipeline":
            part = node_of(spec.name, value, node)
            text = pipeline_text(value) if part is None else node_text(part, value["nodes"][part], value["edges"])
        case "tools":
            text = tools_text(value, node)
        case "principles":
            text = principles_text(value)
        case "demos":
            text = demos_text(value, limit)
        case _:
            text = value if isinstance(value, str) else shown(value)
    return cut(text, limit) or "(empty)"


def node_of(name: str, value: Any, op: str) -> str | None:
    """The node of pipeline `name` that a call named `op` ran, None when it ran none."""
    part = op.removeprefix(f"{name}.")
    return part if part != op and part in value["nodes"] else None


def pipeline_text(value: Value) -> str:
    """A whole pipeline: root, nodes in order of declaration, edges and routes."""
    nodes = cast("Mapping[str, Value]", value["nodes"])
    return "\n".join(
        [f"root: {value['root']}", *(node_text(name, node, value["edges"]) for name, node in nodes.items())]
    )


def node_text(name: str, node: Value, edges: Mapping[str, Sequence[str]]) -> str:
    """One node of a pipeline."""
    route, prompt = cast("Value", node["route"]), cast("Value", node["prompt"])
    lines = [f"node {name}: {node['description'] or '(no description)'}"]
    lines.append(f"  next: {', '.join(edges[name])}; route: {route['kind']}{_route(route)}")
    if node["max_visits"] != 1:
        lines.append(f"  visits: {node['max_visits'] or 'no limit'}")
    if node["tools"]:
        lines.append(f"  tools: {', '.join(node['tools'])}")
    if node["role"]:
        lines.append(f"  role: {node['role']}")
    for part in ("task", "principles", "output_format", "extra"):
        text = prompt[part]
        if text:
            lines.append(f"  {part}: {text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)}")
    return "\n".join(lines)


def _route(route: Value) -> str:
    if route["kind"] == "field":
        return f" by {route['field']!r}, cases {json.dumps(route['cases'], ensure_ascii=False)}"
    return f" ({route['prompt']})" if route["prompt"] else ""


def tools_text(value: Sequence[Value], tool: str = "") -> str:
    """The tools of a toolbox; only `tool` when there is one of that name."""
    name = tool.rpartition(".")[2]
    chosen = [entry for entry in value if entry["name"] == name] or value
    return "\n\n".join(tool_text(entry) for entry in chosen) or "(no tools)"


def tool_text(entry: Value) -> str:
    """One tool."""
    lines = [
        f"tool {entry['name']}: {entry['description']}",
        f"  parameters: {json.dumps(entry['parameters'], ensure_ascii=False)}",
    ]
    source = str(entry["source"]).strip()
    lines.append(f"  code:\n{source}" if source else "  code: (a function of the program; its text is not shown)")
    for example in entry.get("examples", ()):
        lines.append(f"  example: {json.dumps(example, ensure_ascii=False, default=str)}")
    return "\n".join(lines)


def principles_text(value: Sequence[Value]) -> str:
    """The rules with their ids and counters."""
    return "\n".join(
        f"- {item['id']} (helped {item['helpful']}, harmed {item['harmful']}): {item['text']}" for item in value
    )


def demos_text(value: Sequence[Value], limit: int) -> str:
    """Demonstrations with their places."""
    size = max(60, limit // max(1, 2 * len(value)))
    return "\n".join(
        f"[{place}] {cut(str(item['input']), size)} -> {cut(str(item['output']), size)}"
        for place, item in enumerate(value)
    )
