"""The value of a pipeline parameter: nodes, edges and routes as JSON, and every static check of it.

`{"root": node, "nodes": {node: definition}, "edges": {node: [next, ...]}}`. One node runs at a time; "end" is the way
out. A node's texts hold placeholders: `{input}` for an argument of the run, `{node}` for the latest text of a node,
`{previous}` for the text of the node that ran just before. Other braces are literal; `{{name}}` writes `{name}`.

A node runs at most `max_visits` times in one run (0: no limit of its own). A node that has used its visits is passed
over, so a pipeline without a cycle of unlimited nodes always ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

PIPELINE_END: Final = "end"
PIPELINE_PREVIOUS: Final = "previous"
DEFAULT_VISITS: Final = 3
PIPELINE_MAX_VISITS: Final = 50
ROUTE_KINDS: Final = ("next", "llm", "field")
NODE_COMPONENTS: Final = ("task", "principles", "output_format", "extra")
PIPELINE_RESERVED: Final = frozenset({PIPELINE_END, PIPELINE_PREVIOUS, "output", "path"})
"""Names that a node may not have: they mean something in edges, in placeholders or in the result of a run."""

_NODE_KEYS: Final = ("description", "role", "prompt", "lm", "tools", "route", "max_visits")
_ROUTE_KEYS: Final = ("kind", "field", "cases", "prompt")
_PLACEHOLDER: Final = re.compile(r"(?<!\{)\{([^\W\d]\w*)\}(?!\})")
_FILLED: Final = re.compile(r"\{\{([^\W\d]\w*)\}\}|(?<!\{)\{([^\W\d]\w*)\}(?!\})")

Value = dict[str, Any]
"""A pipeline value, or a part of one, that is known to have the right form."""


# ---- defaults


def complete_node(definition: Mapping[str, Any] | str) -> Value:
    """The definition with every missing key filled in; a text, or a prompt given as text, is the node's task."""
    if isinstance(definition, str):
        definition = {"prompt": definition}
    node: Value = {
        "description": "",
        "role": "",
        "prompt": {},
        "lm": "agent",
        "tools": [],
        "route": {},
        "max_visits": DEFAULT_VISITS,
        **definition,
    }
    prompt = {"task": node["prompt"]} if isinstance(node["prompt"], str) else node["prompt"]
    if isinstance(prompt, Mapping):
        node["prompt"] = {"task": "", "principles": [], "output_format": "", "extra": "", **prompt}
    route = {"kind": node["route"]} if isinstance(node["route"], str) else node["route"]
    node["route"] = complete_route(cast("Mapping[str, Any]", route)) if isinstance(route, Mapping) else route
    return node


def complete_route(route: Mapping[str, Any]) -> Value:
    """The route with every missing key filled in."""
    return {"kind": "next", "field": "", "cases": {}, "prompt": "", **route}


def complete_pipeline(value: Any) -> Any:
    """The value with missing keys filled in: node defaults, the first node as root, edges in order of the nodes.

    Without "edges" the nodes form a chain; a node that is left out of given edges leads to the end. Something that is
    no pipeline at all is returned as it is, for `pipeline_problems` to describe.
    """
    if not isinstance(value, Mapping):
        return value
    given = cast("Mapping[str, Any]", value)
    nodes = given.get("nodes")
    if not isinstance(nodes, Mapping) or not nodes:
        return dict(given)
    named = cast("Mapping[str, Any]", nodes)
    names = list(named)
    edges: Any = given.get("edges")
    if edges is None:
        edges = {name: [later] for name, later in zip(names, [*names[1:], PIPELINE_END], strict=True)}
    elif isinstance(edges, Mapping):
        stated = cast("Mapping[str, Any]", edges)
        edges = {name: _listed(stated.get(name, [PIPELINE_END])) for name in names}
        edges.update({name: _listed(to) for name, to in stated.items() if name not in edges})
    complete = {
        name: complete_node(cast("Mapping[str, Any]", node)) if isinstance(node, (str, Mapping)) else node
        for name, node in named.items()
    }
    return {**given, "root": given.get("root", names[0]), "nodes": complete, "edges": edges}


def _listed(to: Any) -> Any:
    if isinstance(to, str):
        return [to]
    return list(cast("Sequence[Any]", to)) if isinstance(to, (list, tuple)) else to


# ---- texts and placeholders


def placeholders(text: str) -> tuple[str, ...]:
    """The names in `{name}` places, in order of first use."""
    return tuple(dict.fromkeys(match.group(1) for match in _PLACEHOLDER.finditer(text)))


def fill_placeholders(text: str, values: Mapping[str, str]) -> str:
    """`text` with every placeholder of a known name replaced; what replaces it is not looked at again."""

    def replaced(match: re.Match[str]) -> str:
        literal, name = match.groups()
        return "{" + literal + "}" if literal is not None else values.get(name, match.group())

    return _FILLED.sub(replaced, text)


def node_texts(node: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every text of a node that may hold placeholders, as (where, text)."""
    prompt = node["prompt"]
    return [
        ("role", node["role"]),
        ("task", prompt["task"]),
        *((f"principle {number}", text) for number, text in enumerate(prompt["principles"], 1)),
        ("output_format", prompt["output_format"]),
        ("extra", prompt["extra"]),
        ("route prompt", node["route"]["prompt"]),
    ]


def node_placeholders(node: Mapping[str, Any]) -> tuple[str, ...]:
    """The placeholders of all texts of a node, in order of first use."""
    return tuple(dict.fromkeys(name for _, text in node_texts(node) for name in placeholders(text)))


def pipeline_inputs(value: Mapping[str, Any]) -> tuple[str, ...]:
    """The placeholders of a well-formed pipeline that are no nodes: the arguments of a run, root's first."""
    nodes = cast("Mapping[str, Value]", value["nodes"])
    order = [name for name in reachable(value["edges"], [value["root"]]) if name in nodes]
    names = (name for node in (*order, *nodes) for name in node_placeholders(nodes[node]))
    return tuple(dict.fromkeys(name for name in names if name not in nodes and name != PIPELINE_PREVIOUS))


# ---- the graph


def reachable(edges: Mapping[str, Sequence[str]], start: Iterable[str]) -> dict[str, None]:
    """Everything that can be walked to from `start`, itself included, nearest first; "end" has no next."""
    seen = dict.fromkeys(start)
    queue = list(seen)
    for name in queue:
        for later in edges.get(name, ()):
            if later not in seen:
                seen[later] = None
                queue.append(later)
    return seen


def predecessors(edges: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Node → the nodes that lead to it, in order of declaration."""
    before: dict[str, list[str]] = {}
    for name, later in edges.items():
        for target in later:
            before.setdefault(target, []).append(name)
    return before


def runs_before(edges: Mapping[str, Sequence[str]]) -> dict[str, set[str]]:
    """Node → the nodes that can have run when it runs (itself only when it stands on a cycle)."""
    after = {name: reachable(edges, edges[name]) for name in edges}
    return {name: {earlier for earlier in edges if name in after[earlier]} for name in edges}


def find_cycle(edges: Mapping[str, Sequence[str]], among: Iterable[str]) -> list[str] | None:
    """The nodes of one cycle that uses only nodes of `among`, None when there is none."""
    allowed = set(among)
    inside = {name: [to for to in edges.get(name, ()) if to in allowed] for name in edges if name in allowed}
    for start in inside:
        parent: dict[str, str] = {}
        queue = [start]
        for name in queue:
            for later in inside[name]:
                if later == start:
                    path = [name]
                    while path[-1] != start:
                        path.append(parent[path[-1]])
                    return path[::-1]
                if later not in parent:
                    parent[later] = name
                    queue.append(later)
    return None


# ---- checks


def pipeline_problems(
    value: Any, inputs: Sequence[str] | None = None, *, max_nodes: int | None = None, with_tools: bool = True
) -> list[str]:
    """What is wrong with a pipeline value, a clear clause each; an empty list when nothing is.

    Args:
        value: the whole value, complete (see `complete_pipeline`).
        inputs: the arguments a run has; None leaves names that are no nodes unchecked.
        max_nodes: how many nodes there may be.
        with_tools: whether there is a toolbox that nodes can name tools of.
    """
    found = _form_problems(value)
    if found:
        return found
    nodes = cast("dict[str, Value]", value["nodes"])
    if max_nodes is not None and len(nodes) > max_nodes:
        found.append(f"has {len(nodes)} nodes, at most {max_nodes} are allowed")
    for name, node in nodes.items():
        found.extend(f"node {name!r} {clause}" for clause in node_problems(node))
        if inputs is not None and name in inputs:
            found.append(f"node {name!r} has the name of an input; give the node another name")
        if not with_tools and not found and node["tools"]:
            found.append(f"node {name!r} names tools, but the pipeline has no toolbox")
    found = found or _edge_problems(value)
    found = found or [*_graph_problems(value), *_route_problems(value)]
    return found or _placeholder_problems(value, inputs)


def _form_problems(value: Any) -> list[str]:
    if not isinstance(value, Mapping):
        return [f"expected a map with root, nodes and edges, found {type(value).__name__}"]
    pipeline = cast("Mapping[str, Any]", value)
    for key in pipeline:
        if key not in ("root", "nodes", "edges"):
            return [f"unknown key {key!r}; the keys are root, nodes, edges"]
    nodes, edges = pipeline.get("nodes"), pipeline.get("edges")
    if not isinstance(nodes, Mapping) or not nodes:
        return ["'nodes' must be a map with at least one node"]
    if not isinstance(edges, Mapping):
        return ["'edges' must be a map from a node to the list of its next nodes"]
    found: list[str] = []
    for name, node in cast("Mapping[str, Any]", nodes).items():
        if not name.isidentifier() or name in PIPELINE_RESERVED:
            found.append(
                f"node name {name!r}: use letters, digits and underscores, and none of {_named(PIPELINE_RESERVED)}"
            )
        if not isinstance(node, Mapping):
            found.append(f"node {name!r} must be a map, found {type(node).__name__}")
    if not isinstance(pipeline.get("root"), str) or pipeline["root"] not in nodes:
        found.append(
            f"root {pipeline.get('root')!r} is no node; the nodes are {_named(cast('Mapping[str, Any]', nodes))}"
        )
    return found


def node_problems(node: Mapping[str, Any]) -> list[str]:
    """What is wrong with the form of a complete node."""
    wrong = [key for key in _NODE_KEYS if key not in node] + [key for key in node if key not in _NODE_KEYS]
    if wrong:
        return [f"must have exactly the keys {', '.join(_NODE_KEYS)}; {wrong[0]!r} is missing or unknown"]
    found = [f"{key!r} must be text" for key in ("description", "role", "lm") if not isinstance(node[key], str)]
    if not found and not node["lm"].strip():
        found.append("'lm' must name a language model role such as 'agent'")
    if not _texts(node["tools"]):
        found.append("'tools' must be a list of tool names")
    visits = node["max_visits"]
    if isinstance(visits, bool) or not isinstance(visits, int) or not 0 <= visits <= PIPELINE_MAX_VISITS:
        found.append(
            f"'max_visits' must be a whole number from 0 (no limit) to {PIPELINE_MAX_VISITS}, found {visits!r}"
        )
    return [*found, *_prompt_problems(node["prompt"]), *route_form_problems(node["route"])]


def _prompt_problems(prompt: Any) -> list[str]:
    if not isinstance(prompt, Mapping) or set(cast("Mapping[str, Any]", prompt)) != set(NODE_COMPONENTS):
        return [f"'prompt' must be a map with exactly the keys {', '.join(NODE_COMPONENTS)}"]
    parts = cast("Mapping[str, Any]", prompt)
    found = [
        f"prompt {key!r} must be text"
        for key in NODE_COMPONENTS
        if key != "principles" and not isinstance(parts[key], str)
    ]
    if not _texts(parts["principles"]):
        found.append("prompt 'principles' must be a list of texts")
    if not found and not parts["task"].strip():
        found.append("prompt 'task' is empty; say what the node does")
    return found


def route_form_problems(route: Any) -> list[str]:
    """What is wrong with the form of a complete route."""
    if not isinstance(route, Mapping) or set(cast("Mapping[str, Any]", route)) != set(_ROUTE_KEYS):
        return [f"'route' must be a map with exactly the keys {', '.join(_ROUTE_KEYS)}"]
    parts = cast("Mapping[str, Any]", route)
    found: list[str] = []
    if parts["kind"] not in ROUTE_KINDS:
        found.append(f"route kind {parts['kind']!r} is none of {', '.join(ROUTE_KINDS)}")
    found.extend(f"route {key!r} must be text" for key in ("field", "prompt") if not isinstance(parts[key], str))
    cases = parts["cases"]
    if not isinstance(cases, Mapping) or not _texts(list(cast("Mapping[str, Any]", cases).values())):
        found.append("route 'cases' must be a map from a value to a next node")
    return found


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in cast("list[Any]", value))


def _edge_problems(value: Mapping[str, Any]) -> list[str]:
    nodes, edges = cast("Value", value["nodes"]), cast("Value", value["edges"])
    found = [f"edges: {name!r} is no node" for name in edges if name not in nodes]
    for name in nodes:
        later = edges.get(name)
        if not _texts(later) or not later:
            found.append(f"node {name!r} needs a list with at least one next node, or 'end'")
            continue
        targets = cast("list[str]", later)
        found.extend(
            f"edge {name} → {to}: {to!r} is no node" for to in targets if to != PIPELINE_END and to not in nodes
        )
        if len(set(targets)) < len(targets):
            found.append(f"node {name!r} lists a next node twice")
    return found


def _graph_problems(value: Mapping[str, Any]) -> list[str]:
    nodes, edges = cast("dict[str, Value]", value["nodes"]), cast("dict[str, list[str]]", value["edges"])
    started = reachable(edges, [value["root"]])
    found = [
        f"node {name!r} is an orphan: no path from the root {value['root']!r} leads to it"
        for name in nodes
        if name not in started
    ]
    found.extend(
        f"the end cannot be reached from node {name!r}"
        for name in nodes
        if PIPELINE_END not in reachable(edges, [name])
    )
    cycle = find_cycle(edges, (name for name, node in nodes.items() if node["max_visits"] == 0))
    if cycle:
        found.append(
            f"the cycle {' → '.join([*cycle, cycle[0]])} is not bounded; give one of its nodes a max_visits above 0"
        )
    return found


def _route_problems(value: Mapping[str, Any]) -> list[str]:
    edges = cast("dict[str, list[str]]", value["edges"])
    return [
        f"node {name!r}: {clause}"
        for name, node in cast("dict[str, Value]", value["nodes"]).items()
        for clause in route_problems(name, node["route"], edges)
    ]


def route_problems(node: str, route: Mapping[str, Any], edges: Mapping[str, Sequence[str]]) -> list[str]:
    """Why a well-formed route does not fit the edges of its node."""
    later = edges[node]
    match route["kind"]:
        case "llm":
            return [] if len(later) > 1 else ["route 'llm' needs at least two next nodes to choose from; use 'next'"]
        case "field":
            return _field_problems(route["cases"], later)
        case _:
            # "next" takes the first next node that has visits left, so only one that comes back here is ever used up.
            stuck = [to for to in later[:-1] if to == PIPELINE_END or node not in reachable(edges, [to])]
            if not stuck:
                return []
            unused = ", ".join(later[later.index(stuck[0]) + 1 :])
            return [f"route 'next' always takes {stuck[0]!r} and never {unused}; use route 'llm' or 'field'"]


def _field_problems(cases: Mapping[str, str], later: Sequence[str]) -> list[str]:
    if len(later) < 2:
        return ["route 'field' needs at least two next nodes to choose from; use 'next'"]
    foreign = [to for to in cases.values() if to not in later]
    if foreign:
        return [f"route case leads to {foreign[0]!r}, which is none of its next nodes {', '.join(later)}"]
    unused = [to for to in later[1:] if to not in cases.values()]
    if unused:
        return [f"no route case leads to {unused[0]!r}; the first next node alone is taken when no case fits"]
    return []


def _placeholder_problems(value: Mapping[str, Any], inputs: Sequence[str] | None) -> list[str]:
    nodes = cast("dict[str, Value]", value["nodes"])
    before = runs_before(value["edges"])
    known = f"inputs: {', '.join(inputs or ()) or 'none'}; nodes: {', '.join(nodes)}"
    found: list[str] = []
    for name, node in nodes.items():
        for where, text in node_texts(node):
            for used in placeholders(text):
                if used in nodes and used not in before[name]:
                    found.append(f"node {name!r}, {where}: {{{used}}} cannot have run before {name!r}")
                elif used not in nodes and used != PIPELINE_PREVIOUS and inputs is not None and used not in inputs:
                    found.append(f"node {name!r}, {where}: {{{used}}} is neither an input nor a node ({known})")
    return found


def _named(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
