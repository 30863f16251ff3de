"""Edits of a pipeline: add, delete, move and rewire nodes, change how a node routes, and change what it is told.

Each edit leaves a whole, legal pipeline or is refused: the value it makes passes every check of `_pipeline_value`.
Updates of several edges that would be illegal half-way are one `RewireNodes`. An edit changes the route of a node only
where the old route no longer fits the node's edges.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from agentopt.graph._jsonvalue import JSONValue, normalize
from agentopt.graph._parameters import ParameterSpec, suggestion
from agentopt.graph._pipeline_value import (
    NODE_COMPONENTS,
    PIPELINE_END,
    PIPELINE_PREVIOUS,
    Value,
    complete_node,
    complete_route,
    node_problems,
    pipeline_problems,
    predecessors,
    route_form_problems,
    route_problems,
    runs_before,
)
from agentopt.graph._structured import EditError, StructuredEdit


@dataclass(frozen=True, slots=True)
class PipelineEdit(StructuredEdit):
    """Base of the edits of a pipeline: changes a private copy in place."""

    kinds: ClassVar[frozenset[str]] = frozenset({"pipeline"})

    def change(self, value: Any, spec: ParameterSpec | None) -> JSONValue:
        """The edited value.

        Raises:
            EditError: the edit names a node that is not there, or does not fit the pipeline.
        """
        # The checks of the declaration need its inputs; the form alone is what an edit relies on.
        found = pipeline_problems(value)
        if found:
            raise EditError(f"the pipeline is not usable as it is: {found[0]}")
        self.edit(value)
        return value

    def edit(self, value: Value) -> None:
        """Change `value` in place."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class AddNode(PipelineEdit):
    """Add `node` behind `after` ("" puts it in front of the root).

    Without `to` it stands between `after` and all its next nodes. With `to` it leads there: it replaces those next
    nodes of `after` that `to` names, and is one more next node of `after` when `to` names none of them. Missing keys of
    `definition` get their defaults; a prompt given as text is its task.
    """

    kind: ClassVar[str] = "add_node"
    node: str
    definition: Mapping[str, JSONValue]
    after: str
    to: tuple[str, ...] = ()

    def edit(self, value: Value) -> None:
        """Insert the node."""
        if self.node in value["nodes"]:
            raise EditError(f"there is a node {self.node!r} already")
        if not self.node.isidentifier():
            raise EditError(f"node name {self.node!r}: use letters, digits and underscores")
        if self.after:
            _known(value, self.after)
        node = complete_node(cast("Value", normalize(self.definition, "definition")))
        found = node_problems(node)
        if found:
            raise EditError(f"node {self.node!r} {found[0]}")
        value["nodes"][self.node] = node
        _insert(value, self.node, self.after, self.to)


@dataclass(frozen=True, slots=True)
class DeleteNode(PipelineEdit):
    """Remove a node; the nodes before it lead to the nodes behind it.

    Placeholders that named it name the node before it, or `{previous}` where that one has no such place.
    """

    kind: ClassVar[str] = "delete_node"
    node: str

    def edit(self, value: Value) -> None:
        """Remove the node."""
        _known(value, self.node)
        before = [name for name in predecessors(value["edges"]).get(self.node, []) if name != self.node]
        _take_out(value, self.node)
        del value["nodes"][self.node]
        _rename(value, self.node, before[0] if len(before) == 1 else "")


@dataclass(frozen=True, slots=True)
class MoveNode(PipelineEdit):
    """Take a node out of its place and put it between `after` and all its next nodes ("" : in front of the root)."""

    kind: ClassVar[str] = "move_node"
    node: str
    after: str

    def edit(self, value: Value) -> None:
        """Move the node."""
        _known(value, self.node)
        if self.after:
            _known(value, self.after)
        if self.after == self.node:
            raise EditError(f"node {self.node!r} cannot stand behind itself")
        _take_out(value, self.node)
        value["nodes"][self.node]["route"] = complete_route({})
        _insert(value, self.node, self.after, ())


@dataclass(frozen=True, slots=True)
class SetEdges(PipelineEdit):
    """Replace the next nodes of a node ("end" is the way out; the node itself makes it repeat).

    `route` and `max_visits` are changed with it when they are given.
    """

    kind: ClassVar[str] = "set_edges"
    node: str
    to: tuple[str, ...]
    max_visits: int | None = None
    route: Mapping[str, JSONValue] | None = None

    def edit(self, value: Value) -> None:
        """Replace the node's edges."""
        node = _known(value, self.node)
        _targets(value, self.to)
        value["edges"][self.node] = list(dict.fromkeys(self.to))
        if self.max_visits is not None:
            node["max_visits"] = self.max_visits
        if self.route is None:
            _fit_route(value, self.node)
        else:
            node["route"] = _new_route(self.node, self.route)


@dataclass(frozen=True, slots=True)
class RewireNodes(PipelineEdit):
    """Replace the edges of several nodes at once, and the root when it is given."""

    kind: ClassVar[str] = "rewire_nodes"
    edges: Mapping[str, JSONValue]
    root: str | None = None

    def edit(self, value: Value) -> None:
        """Replace the edges."""
        for name, later in self.edges.items():
            _known(value, name)
            to = [later] if isinstance(later, str) else later
            if not isinstance(to, (list, tuple)) or not all(isinstance(item, str) for item in to):
                raise EditError(f"edges of {name!r}: expected a list of next nodes")
            _targets(value, cast("Sequence[str]", to))
            value["edges"][name] = list(dict.fromkeys(cast("Sequence[str]", to)))
        if self.root is not None:
            _known(value, self.root)
            value["root"] = self.root
        for name in value["nodes"]:
            _fit_route(value, name)


@dataclass(frozen=True, slots=True)
class SetRoute(PipelineEdit):
    """Replace how a node picks its next node: `{"kind": "next"|"llm"|"field", "field", "cases", "prompt"}`."""

    kind: ClassVar[str] = "set_route"
    node: str
    route: Mapping[str, JSONValue]

    def edit(self, value: Value) -> None:
        """Replace the route."""
        _known(value, self.node)["route"] = _new_route(self.node, self.route)


@dataclass(frozen=True, slots=True)
class SetNodePrompt(PipelineEdit):
    """Replace one component of a node's prompt: task, output_format, extra or role (a text), principles (a list)."""

    kind: ClassVar[str] = "set_node_prompt"
    node: str
    component: str
    value: str | tuple[str, ...]

    def edit(self, value: Value) -> None:
        """Replace the component."""
        node = _known(value, self.node)
        components = (*NODE_COMPONENTS, "role")
        if self.component not in components:
            raise EditError(f"{self.component!r} is no component of a node; expected one of {', '.join(components)}")
        if isinstance(self.value, str) == (self.component == "principles"):
            raise EditError(
                f"{self.component!r} must be {'a list of texts' if isinstance(self.value, str) else 'text'}"
            )
        owner = node if self.component == "role" else node["prompt"]
        owner[self.component] = self.value if isinstance(self.value, str) else list(self.value)


@dataclass(frozen=True, slots=True)
class SetNodeDescription(PipelineEdit):
    """Replace what a node is for; routers and optimizers read it."""

    kind: ClassVar[str] = "set_node_description"
    node: str
    description: str

    def edit(self, value: Value) -> None:
        """Replace the description."""
        _known(value, self.node)["description"] = self.description


@dataclass(frozen=True, slots=True)
class SetNodeTools(PipelineEdit):
    """Replace the tools that a node may call; names of the pipeline's toolbox."""

    kind: ClassVar[str] = "set_node_tools"
    node: str
    tools: tuple[str, ...]

    def edit(self, value: Value) -> None:
        """Replace the tools."""
        _known(value, self.node)["tools"] = list(dict.fromkeys(self.tools))


# ---- what the edits share


def _known(value: Value, node: str) -> Value:
    found = value["nodes"].get(node)
    if found is None:
        names = list(value["nodes"])
        raise EditError(f"there is no node {node!r}{suggestion(node, names)}; the nodes are {', '.join(names)}")
    return cast("Value", found)


def _new_route(node: str, route: object) -> Value:
    given = normalize(cast("JSONValue", route), "route")
    complete = complete_route(given) if isinstance(given, Mapping) else given
    found = route_form_problems(complete)
    if found:
        raise EditError(f"node {node!r} {found[0]}")
    return cast("Value", complete)


def _targets(value: Value, to: Sequence[str]) -> None:
    if not to:
        raise EditError("a node needs at least one next node, or 'end'")
    for target in to:
        if target != PIPELINE_END:
            _known(value, target)


def _insert(value: Value, node: str, after: str, to: Sequence[str]) -> None:
    """Put a node that has no edges yet behind `after`."""
    edges: dict[str, list[str]] = value["edges"]
    if to:
        _targets(value, to)
    if not after:
        edges[node] = list(to) or [value["root"]]
        value["root"] = node
        _fit_route(value, node)
        return
    later = edges[after]
    # A node that repeats itself goes on doing so, before the new one.
    through = [target for target in later if (target in to if to else target != after)]
    edges[node] = list(dict.fromkeys(to or through)) or [PIPELINE_END]
    if through:
        # The new node takes the place of the first next node that it stands in front of.
        edges[after] = list(dict.fromkeys(node if target in through else target for target in later))
        _retarget(value["nodes"][after]["route"], lambda target: [node] if target in through else [target])
        moved, route = value["nodes"][after]["route"], value["nodes"][node]["route"]
        if len(through) == len(later) > 1 and route_problems(node, route, edges):
            # The choice between the next nodes is now made one node later.
            value["nodes"][node]["route"] = complete_route({"kind": "llm", "prompt": moved["prompt"]})
    else:
        edges[after] = [*later, node]
    for name in (after, node):
        _fit_route(value, name)


def _take_out(value: Value, node: str) -> None:
    """Let every node that leads to `node` lead to what is behind it; `node` keeps no edges."""
    edges: dict[str, list[str]] = value["edges"]
    behind = [target for target in edges[node] if target != node]
    if value["root"] == node:
        heirs = [target for target in behind if target != PIPELINE_END]
        if len(heirs) != 1:
            state = "is the only node" if not heirs else f"is the root and leads to {', '.join(heirs)}"
            raise EditError(f"node {node!r} {state}, so no single node can take its place")
        value["root"] = heirs[0]
    route = value["nodes"][node]["route"]
    del edges[node]
    for name, later in edges.items():
        if node not in later:
            continue
        alone = len(later) == 1
        # A loop through the node alone would become a node that repeats itself, which nobody asked for.
        heirs = [target for target in behind if target != name or name in later]
        merged = [heir for target in later for heir in (heirs if target == node else [target])]
        edges[name] = list(dict.fromkeys(merged)) or [PIPELINE_END]
        owner = value["nodes"][name]
        _retarget(owner["route"], lambda target, heirs=heirs: heirs[:1] if target == node else [target])
        if alone and len(edges[name]) > 1 and route["kind"] == "llm":
            owner["route"] = complete_route({"kind": "llm", "prompt": route["prompt"]})
    for name in edges:
        _fit_route(value, name)


def _retarget(route: Value, mapped: Callable[[str], list[str]]) -> None:
    route["cases"] = {case: new for case, target in route["cases"].items() for new in mapped(target)}


def _fit_route(value: Value, node: str) -> None:
    """Change the node's route if it does not fit its edges: the nearest kind that does."""
    edges: dict[str, list[str]] = value["edges"]
    owner = value["nodes"][node]
    later = edges[node]
    route = owner["route"]
    route["cases"] = {case: target for case, target in route["cases"].items() if target in later}
    if not route_problems(node, route, edges):
        return
    plain = complete_route({"prompt": route["prompt"]})
    owner["route"] = plain if not route_problems(node, plain, edges) else {**plain, "kind": "llm"}


def _rename(value: Value, old: str, new: str) -> None:
    """Let placeholders name `new` instead of `old`, or the step before where `new` cannot have run."""
    known = runs_before(value["edges"])
    for name, node in value["nodes"].items():
        stand_in = "{" + (new if new in known[name] else PIPELINE_PREVIOUS) + "}"

        def renamed(text: str, stand_in: str = stand_in) -> str:
            return re.sub(rf"(?<!\{{)\{{{old}\}}(?!\}})", lambda _: stand_in, text)

        prompt = node["prompt"]
        node["role"] = renamed(node["role"])
        node["route"]["prompt"] = renamed(node["route"]["prompt"])
        for component in NODE_COMPONENTS:
            part = prompt[component]
            prompt[component] = renamed(part) if isinstance(part, str) else [renamed(item) for item in part]
