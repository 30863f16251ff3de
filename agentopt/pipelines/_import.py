"""Makes a pipeline of an "agents" solution: its operating procedure (nodes, controllers, edges) and its team of roles.

A node with one role becomes one node. Roles that speak in order become a chain; roles that a language model chooses
among become nodes that all lead to each other. A node whose controller lets a model decide where to go keeps its
self-edge and repeats at most `max_chat_nums` times; with an "order" controller it speaks once and goes on, as there.
What has no counterpart (memories, knowledge bases, model settings) is listed in `notes`, never silently dropped.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from string import Formatter
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.graph import (
    PIPELINE_END,
    PIPELINE_MAX_VISITS,
    PIPELINE_RESERVED,
    complete_pipeline,
    pipeline_inputs,
    pipeline_problems,
)
from agentopt.pipelines._agents_files import Part, Solution, read_solution

_HISTORY = "The text of the step before:\n{previous}"
_WORD_IN_BRACES = re.compile(r"(?<!\{)\{([^\W\d]\w*)\}(?!\})")


class ImportNote(UserWarning):
    """Something of an imported solution that the pipeline does not have."""


@dataclass(frozen=True)
class ImportedAgents:
    """A pipeline value, the arguments of a run, what it is for, and what could not be taken over."""

    value: dict[str, Any]
    inputs: tuple[str, ...]
    description: str = ""
    notes: tuple[str, ...] = ()

    def warn(self) -> None:
        """Show the notes as one warning."""
        if self.notes:
            warnings.warn("\n".join(("not taken over:", *self.notes)), ImportNote, stacklevel=3)

    def without_tools(self) -> ImportedAgents:
        """The same without tool names, for a pipeline that has no toolbox."""
        named = cast("dict[str, dict[str, Any]]", self.value["nodes"])
        nodes: dict[str, Any] = {name: {**node, "tools": []} for name, node in named.items()}
        return replace(self, value={**self.value, "nodes": nodes})


def load_agents_config(path: str | Path) -> dict[str, Any]:
    """The pipeline value that a `solution.json` describes; what could not be taken over is shown as a warning.

    Raises:
        UserError: a file or a key is missing or has another form than expected.
    """
    imported = load_agents(path)
    imported.warn()
    return imported.value


def load_agents(path: str | Path) -> ImportedAgents:
    """Like `load_agents_config`, with the inputs, the task's description and the notes.

    Raises:
        UserError: a file or a key is missing or has another form than expected.
    """
    return _Import(read_solution(path)).result()


@dataclass
class _Speaker:
    """One role of one node: a node of the pipeline to be."""

    name: str
    role: str
    definition: dict[str, Any]
    edges: list[str] = field(default_factory=list[str])


class _Import:
    def __init__(self, solution: Solution) -> None:
        self.sop, self.team, self.task = solution.sop, solution.team, solution.task
        self.nodes = {name: node for name, node in self.sop_nodes() if name != self.end}
        self.agents = self.team.part("agents").parts()
        self.notes: list[str] = []
        self.speakers: dict[str, list[_Speaker]] = {}

    @property
    def end(self) -> str:
        return self.sop.text("end") or "end_node"

    def sop_nodes(self) -> list[tuple[str, Part]]:
        self.sop.need("nodes", dict)
        return self.sop.part("nodes").parts()

    def result(self) -> ImportedAgents:
        root = cast("str", self.sop.need("root", str))
        if root not in self.nodes:
            raise self.sop.wrong("root", repr(root), f"one of the nodes {', '.join(map(repr, self.nodes))}")
        edges = self.edges()
        taken = {name for node in self.nodes.values() for name in _wanted(node)} | PIPELINE_RESERVED
        for name, node in self.nodes.items():
            self.speakers[name] = self.node_speakers(name, node, taken)
        for name, node in self.nodes.items():
            self.join(name, node, edges[name])
        self.note_settings()
        return self.checked(self.speakers[root][0].name)

    def edges(self) -> dict[str, list[str]]:
        """Node → next nodes, checked, "end" for the end."""
        given = self.sop.need("edges", dict)
        part = self.sop.part("edges")
        found: dict[str, list[str]] = {}
        for name in self.nodes:
            later = part.get(name, list, [])
            for target in later:
                if target != self.end and target not in self.nodes:
                    known = ", ".join(map(repr, (*self.nodes, self.end)))
                    raise part.wrong(name, repr(target), f"nodes out of {known}")
            if not later:
                self.notes.append(f"node {name}: no edges; it leads to the end")
            found[name] = [PIPELINE_END if target == self.end else target for target in later] or [PIPELINE_END]
        unknown = [name for name in given if name not in self.nodes and name != self.end]
        if unknown:
            raise part.wrong(
                unknown[0], "edges of a node that is not there", f"one of {', '.join(map(repr, self.nodes))}"
            )
        return found

    # ---- one node: its roles

    def node_speakers(self, name: str, node: Part, taken: set[str]) -> list[_Speaker]:
        described = node.part("node_roles_description")
        roles = dict.fromkeys(
            (*described.data, *node.part("node_primary_prompts").data, *node.part("node_prompt_paddings").data)
        )
        begin = node.text("begin_role")
        if begin in roles:  # speaks first
            roles = dict.fromkeys((begin, *roles))
        elif begin:
            roles = {begin: None, **roles}
        visits = cast("int", node.part("controller").get("max_chat_nums", int, 0))
        found: list[_Speaker] = []
        for role in roles or {"": None}:
            own = _identifier(name if len(roles) < 2 else f"{name}_{role}", taken)
            taken.add(own)
            definition: dict[str, Any] = {
                "description": described.text(role) if len(roles) > 1 else node.text("node_description"),
                "role": self.role_text(name, role, described.text(role), len(roles) > 1),
                "prompt": self.prompt(name, role, node),
                "lm": self.lm(name, role),
                "tools": self.tools(name, node),
            }
            if visits > 0:
                definition["max_visits"] = min(visits, PIPELINE_MAX_VISITS)
            found.append(_Speaker(own, role, definition))
        if visits > PIPELINE_MAX_VISITS:
            self.notes.append(f"node {name}: max_chat_nums {visits} is cut to {PIPELINE_MAX_VISITS}")
        for key in ("begin_query", "kb"):
            if node.data.get(key):
                self.notes.append(f"node {name}: {key}")
        return found

    def agent(self, node: str, role: str) -> tuple[str, Part] | None:
        """The member of the team that plays `role` in `node`."""
        return next(((n, a) for n, a in self.agents if a.part("agent_roles").data.get(node) == role), None)

    def role_text(self, node: str, role: str, description: str, several: bool) -> str:
        found = self.agent(node, role)
        lines = [f"You are {role}." if role and several else "", description]
        if found is None:
            self.notes.append(f"node {node}: no agent of the team plays the role {role!r}")
        else:
            name, agent = found
            style = agent.text("agent_style")
            lines += [agent.text("agent_description"), f"Style: {style}" if style else ""]
            if agent.data.get("is_user"):
                self.notes.append(f"node {node}: {name} is a person; a language model plays that part now")
        return _literal("\n".join(line for line in lines if line))

    def lm(self, node: str, role: str) -> str:
        """The language model's role: "agent", or one per agent when the team uses several models."""
        found = self.agent(node, role)
        if found is None or len(self.models()) < 2:
            return "agent"
        return _identifier(found[0], set())

    def models(self) -> dict[str, list[str]]:
        used: dict[str, list[str]] = {}
        for name, agent in self.agents:
            used.setdefault(agent.part("LLM_config").text("model") or "unnamed", []).append(name)
        return used

    def tools(self, name: str, node: Part) -> list[str]:
        given: Any = node.data.get("tools") or []
        names = [item for item in ([given] if isinstance(given, str) else given) if isinstance(item, str)]
        if given:
            self.notes.append(
                f"node {name}: the tools {', '.join(names) or 'of the node'}; give them as tools=ao.toolbox(...)"
            )
        return [item for item in names if item.isidentifier()]

    def prompt(self, name: str, role: str, node: Part) -> dict[str, Any]:
        own = node.part("node_primary_prompts").part(role)
        templates, paddings = node.part("node_prompt_templates"), node.part("node_prompt_paddings").part(role)
        texts = [_literal(own.text("TASK"))]
        for template, padding in paddings.parts():
            if template not in templates.data:
                known = ", ".join(map(repr, templates.data)) or "none"
                raise paddings.wrong(template, "a padding of no template", f"one of the templates: {known}")
            texts.append(self.padded(f"node {name}, {template}", templates.text(template), padding))
        task = "\n\n".join(text for text in texts if text)
        rules = [line.strip(" -*\t") for line in own.text("RULE").splitlines()]
        more = [_literal(own.text(key)) for key in ("EXAMPLE", "COT")]
        return {
            "task": task or _literal(node.text("node_description")) or f"Do the step {name}.",
            "principles": [_literal(rule) for rule in rules if rule],
            "output_format": _literal(own.text("STYLE")),
            "extra": "\n\n".join(text for text in more if text),
        }

    def padded(self, where: str, template: str, padding: Part) -> str:
        """A template with the values that its configuration gives; what each example gives stays a placeholder."""
        source = padding.text("value_source")
        values: Mapping[str, Any] = padding.part("value").data if source == "config" else {}
        if source not in ("config", "case"):
            raise padding.wrong("value_source", repr(source), "'config' or 'case'")
        try:
            return _converted(template, values)
        except ValueError as error:
            self.notes.append(f"{where}: its braces ({error}); they are literal text now")
            return _literal(template)

    # ---- between nodes

    def join(self, name: str, node: Part, edges: list[str]) -> None:
        """Give the speakers of one node their edges and routes."""
        controller = node.part("controller")
        roles, transit = controller.text("route_type") or "order", controller.text("transit_type") or "order"
        if roles not in ("order", "random", "llm"):
            raise controller.wrong("route_type", repr(roles), "'order', 'random' or 'llm'")
        if transit not in ("order", "random", "llm"):
            raise controller.wrong("transit_type", repr(transit), "'order', 'random' or 'llm'")
        speakers = self.speakers[name]
        if roles == "random" and len(speakers) > 1:
            self.notes.append(f"node {name}: roles in random order; they speak in order now")
        if transit == "random":
            self.notes.append(f"node {name}: a random next node; a language model chooses it now")
        chosen = transit != "order"
        out = self.way_out(name, edges, chosen)
        first = [target if target == PIPELINE_END else self.speakers[target][0].name for target in out]
        prompt = _literal(
            "\n".join(filter(None, map(controller.text, ("transit_system_prompt", "transit_last_prompt"))))
        )
        if chosen and roles == "llm" and len(speakers) > 1 and name in out:
            asked = _literal(
                "\n".join(filter(None, (controller.text("route_system_prompt"), controller.text("route_last_prompt"))))
            )
            around = [target for target in first if target != speakers[0].name]
            for speaker in speakers:
                others = [other.name for other in speakers if other is not speaker]
                _lead(speaker, [*others, *around], "\n".join(filter(None, (asked, prompt))))
            return
        if len(speakers) > 1 and (roles == "llm" or not chosen):
            self.notes.append(f"node {name}: its {len(speakers)} roles speak once each, one after the other")
        for speaker, later in pairwise(speakers):
            _lead(speaker, [later.name], "")
        _lead(speakers[-1], first, prompt if chosen else "")

    def way_out(self, name: str, edges: list[str], chosen: bool) -> list[str]:
        """Where a node leads: everything with a choosing controller, else the one that "order" takes."""
        if edges == [name]:
            self.notes.append(f"node {name}: leads to itself alone; it leads to the end as well")
            return [name, PIPELINE_END] if chosen else [PIPELINE_END]
        if chosen or len(edges) == 1:
            return edges
        # "order" takes the edge behind the self-edge, after one message.
        place = edges.index(name) if name in edges else -1
        taken = edges[(place + 1) % len(edges)]
        unused = [target for target in edges if target not in (name, taken)]
        if unused:
            self.notes.append(
                f"node {name}: the edges to {', '.join(unused)}, which its 'order' controller never takes"
            )
        return [taken]

    # ---- the whole

    def note_settings(self) -> None:
        models = self.models()
        if models:
            used = "; ".join(f"{model} for {', '.join(names)}" for model, names in models.items())
            self.notes.append(f"model settings ({used}): configure the language model roles instead")
        for name, agent in self.agents:
            for key in ("toolkit", "memory"):
                if _content(agent.data.get(key)):
                    self.notes.append(f"agent {name}: {key}")
        environment = self.team.part("environment")
        for key in ("shared_memory", "shared_toolkit"):
            if _content(environment.data.get(key)):
                self.notes.append(f"environment: {key}")
        if self.sop.data.get("global_kb"):
            self.notes.append("global_kb")

    def checked(self, root: str) -> ImportedAgents:
        speakers = [speaker for group in self.speakers.values() for speaker in group]
        edges = {speaker.name: speaker.edges for speaker in speakers}
        reached, queue = {root}, [root]
        while queue:
            later = [to for to in edges.get(queue.pop(), ()) if to not in reached]
            reached.update(later)
            queue.extend(later)
        for speaker in speakers:
            if speaker.name not in reached:
                self.notes.append(f"node {speaker.name}: nothing leads to it")
        kept = [speaker for speaker in speakers if speaker.name in reached]
        for speaker in kept:
            if speaker.name != root:
                _show_previous(speaker)
        value = complete_pipeline(
            {"root": root, "nodes": {s.name: s.definition for s in kept}, "edges": {s.name: s.edges for s in kept}}
        )
        problems = pipeline_problems(value)
        if problems:
            raise UserError(f"{self.sop.file}: the procedure makes no legal pipeline: {problems[0]}.")
        inputs = pipeline_inputs(value)
        if not inputs:
            self.notes.append("no prompt names an input; the first node is shown one called 'input'")
            extra = value["nodes"][root]["prompt"]["extra"]
            value["nodes"][root]["prompt"]["extra"] = f"{extra}\n\n{{input}}".strip()
            inputs = ("input",)
        self.notes.append("chat history: a node is shown the text of the node before it")
        return ImportedAgents(value, inputs, self.task.text("task_description"), tuple(dict.fromkeys(self.notes)))


def _show_previous(speaker: _Speaker) -> None:
    """Show the node the text before it, as its chat history did."""
    prompt = speaker.definition["prompt"]
    prompt["extra"] = f"{prompt['extra']}\n\n{_HISTORY}".strip()


def _lead(speaker: _Speaker, to: list[str], prompt: str) -> None:
    speaker.edges = list(dict.fromkeys(to))
    if len(speaker.edges) > 1:
        speaker.definition["route"] = {"kind": "llm", "prompt": prompt}


def _content(value: Any) -> bool:
    """Whether a setting says anything: the published files are full of empty maps of empty maps."""
    if isinstance(value, Mapping):
        return any(_content(item) for item in cast("Mapping[str, Any]", value).values())
    return bool(value)


def _identifier(name: str, taken: set[str]) -> str:
    """`name` as a node name that is not taken."""
    found = re.sub(r"\W+", "_", name).strip("_") or "node"
    found = found if not found[0].isdigit() else f"node_{found}"
    while found in taken:
        found += "_node"
    return found


def _literal(text: str) -> str:
    """`text` with nothing in it taken for a placeholder."""
    return _WORD_IN_BRACES.sub(r"{{\1}}", text)


def _converted(template: str, values: Mapping[str, Any]) -> str:
    """A `str.format` template in the pipeline's syntax, known values filled in."""
    pieces: list[str] = [""]  # literal text and fields in turn; the parser ends a literal at every escaped brace
    for literal, name, spec, conversion in Formatter().parse(template):
        pieces[-1] += literal
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"{{{name}}} is no plain name")
        if name in values:
            pieces[-1] += str(values[name])
        else:
            pieces += ["{" + name + "}", ""]
    return "".join(_literal(piece) if index % 2 == 0 else piece for index, piece in enumerate(pieces))


def _wanted(node: Part) -> list[str]:
    """The placeholders of a node's templates: names that a node of the pipeline may not have."""
    templates = node.part("node_prompt_templates")
    return [name for key in templates.data for name in _WORD_IN_BRACES.findall(templates.text(key))]
