"""Structured values as lines that a person or a language model can read: principles, toolboxes, pipelines, knowledge.

Reports and diffs have values without declarations, so the form of a value says what it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from agentopt.graph._knowledge import describe_knowledge, knowledge_problems


def readable_lines(value: Any, name: str = "") -> list[str] | None:
    """The lines of a list of principles, a toolbox, a pipeline or a form of knowledge; None for any other value (the
    empty list too). `name` is the parameter's, where it is known.
    """
    if isinstance(value, Mapping):
        data = cast("Mapping[str, Any]", value)
        if isinstance(data.get("nodes"), Mapping) and isinstance(data.get("edges"), Mapping):
            return _pipeline(data)
        return _knowledge(data, name)
    if not isinstance(value, list) or not value:
        return None
    items = cast("list[Any]", value)
    if all(_has(item, "id", "text", "helpful", "harmful") for item in items):
        return [_principle(item) for item in items]
    if all(_has(item, "name", "description", "parameters", "source") for item in items):
        return [line for item in items for line in _tool(item)]
    return None


def _has(item: Any, *keys: str) -> bool:
    return isinstance(item, Mapping) and all(key in item for key in keys)


def _principle(item: Mapping[str, Any]) -> str:
    counts = f"  (helped {item['helpful']}, harmed {item['harmful']})" if item["helpful"] or item["harmful"] else ""
    return f"{item['id']}: {item['text']}{counts}"


def _tool(item: Mapping[str, Any]) -> list[str]:
    arguments = ", ".join(_map(_map(item["parameters"]).get("properties")))
    description = str(item["description"]).splitlines() or [""]
    lines = [f"{item['name']}({arguments}): {description[0]}", *(f"    {line}" for line in description[1:])]
    if item["source"]:
        lines += ["  code:", *(f"    {line}" for line in str(item["source"]).splitlines())]
    for example in map(_map, _list(item.get("examples"))):
        lines.append(f"  example: {_compact(example.get('args'))} -> {_compact(example.get('expected'))}")
    return lines


def _pipeline(value: Mapping[str, Any]) -> list[str]:
    lines = [f"starts at {value.get('root')}"]
    for name, definition in _map(value["nodes"]).items():
        node = _map(definition)
        kind = str(_map(node.get("route")).get("kind") or "next")
        chosen = "" if kind == "next" else f" (route: {kind})"
        lines.append(f"{name} -> {', '.join(map(str, _list(_map(value['edges']).get(name)))) or 'end'}{chosen}")
        lines.extend(_node(node))
    return lines


def _node(node: Mapping[str, Any]) -> list[str]:
    lines = [f"  {key}: {node[key]}" for key in ("description", "role") if node.get(key)]
    if _list(node.get("tools")):
        lines.append(f"  tools: {', '.join(map(str, _list(node['tools'])))}")
    for component, text in _map(node.get("prompt")).items():
        parts = str(text).splitlines() if isinstance(text, str) else [f"- {item}" for item in _list(text)]
        if parts:
            lines += [f"  {component}:", *(f"    {line}" for line in parts)]
    return lines


def _knowledge(value: Mapping[str, Any], name: str) -> list[str] | None:
    if knowledge_problems(value):
        return None
    text = value.get("text")
    return [describe_knowledge(value, name), *(f"  {line}" for line in str(text).splitlines() if text)]


def _map(value: Any) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
