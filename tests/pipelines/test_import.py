"""Importing "agents" solutions: what becomes of nodes, roles, controllers and edges, and what is said of the rest."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from agentopt.errors import UserError
from agentopt.graph import AddNode, apply_edits, pipeline_problems
from agentopt.models import reset
from agentopt.pipelines import ImportNote, load_agents, load_agents_config


def node(name: str, *roles: str, **more: Any) -> dict[str, Any]:
    """One node of a procedure; a role's template is its name and the text in `templates`."""
    templates = more.pop("templates", {role: f"As {role} work on {{question}}." for role in roles})
    controller = {"route_type": "order", "transit_type": "order", "max_chat_nums": 20, **more.pop("controller", {})}
    return {
        "node_name": name,
        "node_description": f"does {name}",
        "controller": controller,
        "begin_role": roles[0] if roles else "",
        "node_roles_description": {role: f"{role} of {name}" for role in roles},
        "node_prompt_templates": {f"step_{role}": text for role, text in templates.items()},
        "node_prompt_paddings": {
            role: {f"step_{role}": {"value_source": "case", "value": "input_data"}} for role in templates
        },
        **more,
    }


def solution(folder: Path, nodes: dict[str, Any], edges: dict[str, Any], root: str = "", **parts: Any) -> Path:
    agents = {
        f"agent_{role}": {
            "agent_roles": {name: role},
            "LLM_config": {"model": "gpt-4"},
            "toolkit": {},
            "memory": {"short": {}},
        }
        for name, item in nodes.items()
        for role in item.get("node_roles_description", {})
    }
    sop = {"nodes": nodes, "edges": edges, "root": root or next(iter(nodes)), "end": "end_node", **parts.get("sop", {})}
    team = {"agents": {**agents, **parts.get("agents", {})}, "environment": {"shared_memory": {"short": {}}}}
    files = {
        "sop.json": sop,
        "agent_team.json": team,
        "task.json": {"task_id": "1", "task_name": "qa", "task_type": "qa", "task_description": "Answer questions."},
        "solution.json": {
            "task": "examples/elsewhere/task.json",
            "agent_team": "examples/elsewhere/agent_team.json",
            "sop": "examples/elsewhere/sop.json",
        },
    }
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data))
    return folder / "solution.json"


WRITE_CHECK = {
    "write": node("write", "writer", templates={"writer": 'Write about {topic}. Use {{braces}} and {{"x": 1}}.'}),
    "check": node("check", "checker", templates={"checker": "Improve the text."}),
}
WRITE_CHECK_EDGES = {"write": ["write", "check"], "check": ["check", "end_node"]}


def test_a_published_shape_becomes_a_chain_that_runs(tmp_path: Path) -> None:
    path = solution(tmp_path / "s", WRITE_CHECK, WRITE_CHECK_EDGES)
    with pytest.warns(ImportNote, match="model settings"):
        pipe = ao.Pipeline.from_agents(path, name="writing")
    assert pipe.inputs == ("topic",) and pipe.spec.description == "Answer questions."
    assert pipe.value["edges"] == {"write": ["check"], "check": ["end"]} and pipe.value["root"] == "write"
    prompts: list[str] = []

    def answer(request: Any) -> str:
        prompts.append(request.messages[-1]["content"])
        return "the text"

    ao.configure(models={"agent": ao.FunctionLM(answer)})
    try:
        assert pipe.run_sync(topic="cats")["path"] == ["write", "check"]
    finally:
        reset()
    assert prompts[0] == 'Write about cats. Use {braces} and {"x": 1}.'
    assert prompts[1] == "Improve the text.\n\nThe text of the step before:\nthe text"


def test_what_is_imported_can_be_edited_and_is_legal(tmp_path: Path) -> None:
    imported = load_agents(solution(tmp_path / "s", WRITE_CHECK, WRITE_CHECK_EDGES))
    assert pipeline_problems(imported.value, imported.inputs) == []
    pipe = ao.Pipeline(imported.value, name="w")
    child: Any = apply_edits(
        ao.Candidate({}), [AddNode("w", "plan", {"prompt": "Plan {topic}"}, "")], {"w": pipe.spec}
    ).get("w")
    assert child["root"] == "plan"


def test_the_value_alone_comes_with_a_warning_about_the_rest(tmp_path: Path) -> None:
    with pytest.warns(ImportNote, match="not taken over"):
        value = load_agents_config(tmp_path / "s" if solution(tmp_path / "s", WRITE_CHECK, WRITE_CHECK_EDGES) else "")
    assert value["nodes"]["write"]["description"] == "does write"
    assert value["nodes"]["write"]["role"] == "writer of write"
    assert value["nodes"]["write"]["max_visits"] == 20


def test_a_choosing_controller_keeps_the_self_edge_as_bounded_repeats(tmp_path: Path) -> None:
    controller = {"transit_type": "llm", "max_chat_nums": 5, "transit_system_prompt": "Is {it} done?"}
    nodes = {"write": node("write", "writer", controller=controller)}
    value = load_agents(solution(tmp_path / "s", nodes, {"write": ["write", "end_node"]})).value
    assert value["edges"] == {"write": ["write", "end"]}
    made = value["nodes"]["write"]
    assert made["max_visits"] == 5
    assert made["route"] == {"kind": "llm", "field": "", "cases": {}, "prompt": "Is {{it}} done?"}


def test_too_many_repeats_are_cut_and_said(tmp_path: Path) -> None:
    nodes = {"a": node("a", "r", controller={"transit_type": "llm", "max_chat_nums": 500})}
    imported = load_agents(solution(tmp_path / "s", nodes, {"a": ["a", "end_node"]}))
    assert imported.value["nodes"]["a"]["max_visits"] == 50
    assert "node a: max_chat_nums 500 is cut to 50" in imported.notes


def test_roles_that_speak_in_order_become_a_chain_from_the_first_speaker(tmp_path: Path) -> None:
    nodes = {"debate": node("debate", "pro", "con", begin_role="con"), "judge": node("judge", "judge")}
    imported = load_agents(solution(tmp_path / "s", nodes, {"debate": ["debate", "judge"], "judge": ["end_node"]}))
    value = imported.value
    assert value["root"] == "debate_con"
    assert value["edges"] == {"debate_con": ["debate_pro"], "debate_pro": ["judge"], "judge": ["end"]}
    assert value["nodes"]["debate_pro"]["role"] == "You are pro.\npro of debate"
    assert any("its 2 roles speak once each" in note for note in imported.notes)


def test_roles_in_random_order_speak_in_order_and_it_is_said(tmp_path: Path) -> None:
    controller = {"route_type": "random", "transit_type": "llm"}
    nodes = {"talk": node("talk", "ann", "bob", controller=controller)}
    imported = load_agents(solution(tmp_path / "s", nodes, {"talk": ["talk", "end_node"]}))
    assert imported.value["edges"] == {"talk_ann": ["talk_bob"], "talk_bob": ["talk_ann", "end"]}
    assert "node talk: roles in random order; they speak in order now" in imported.notes


def test_roles_that_a_model_chooses_lead_to_each_other(tmp_path: Path) -> None:
    controller = {
        "route_type": "llm",
        "transit_type": "llm",
        "route_system_prompt": "Who?",
        "transit_last_prompt": "Done?",
    }
    nodes = {"talk": node("talk", "ann", "bob", controller=controller)}
    value = load_agents(solution(tmp_path / "s", nodes, {"talk": ["talk", "end_node"]})).value
    assert value["edges"] == {"talk_ann": ["talk_bob", "end"], "talk_bob": ["talk_ann", "end"]}
    assert value["nodes"]["talk_bob"]["route"]["prompt"] == "Who?\nDone?"


def test_an_order_controller_takes_the_edge_behind_the_self_edge(tmp_path: Path) -> None:
    nodes = {name: node(name, "r") for name in ("a", "b", "c")}
    edges = {"a": ["c", "a", "b"], "b": ["end_node"], "c": ["end_node"]}
    imported = load_agents(solution(tmp_path / "s", nodes, edges))
    assert imported.value["edges"] == {"a": ["b"], "b": ["end"]}
    assert "node a: the edges to c, which its 'order' controller never takes" in imported.notes
    assert "node c: nothing leads to it" in imported.notes


def test_components_and_configured_values_are_taken_over(tmp_path: Path) -> None:
    made = node(
        "a",
        "r",
        templates={"r": "Use {language} for {question}."},
        node_primary_prompts={
            "r": {
                "TASK": "Solve it.",
                "RULE": "- short\n- exact",
                "STYLE": "JSON",
                "EXAMPLE": "1+1",
                "COT": "Think {hard}.",
            }
        },
        node_prompt_paddings={"r": {"step_r": {"value_source": "config", "value": {"language": "Latin"}}}},
    )
    prompt = load_agents(solution(tmp_path / "s", {"a": made}, {"a": ["end_node"]})).value["nodes"]["a"]["prompt"]
    assert prompt == {
        "task": "Solve it.\n\nUse Latin for {question}.",
        "principles": ["short", "exact"],
        "output_format": "JSON",
        "extra": "1+1\n\nThink {{hard}}.",
    }


def test_several_models_become_several_roles(tmp_path: Path) -> None:
    agents = {
        "agent_checker": {"agent_roles": {"check": "checker"}, "LLM_config": {"model": "small"}, "agent_style": "dry"}
    }
    imported = load_agents(solution(tmp_path / "s", WRITE_CHECK, WRITE_CHECK_EDGES, agents=agents))
    assert [imported.value["nodes"][name]["lm"] for name in ("write", "check")] == ["agent_writer", "agent_checker"]
    assert imported.value["nodes"]["check"]["role"] == "checker of check\nStyle: dry"


def test_node_names_that_cannot_be_placeholders_are_changed(tmp_path: Path) -> None:
    nodes = {"Task Allocation!": node("x", "r", templates={"r": "{question} {path}"}), "question": node("y", "r")}
    value = load_agents(
        solution(tmp_path / "s", nodes, {"Task Allocation!": ["question"], "question": ["end_node"]})
    ).value
    assert value["edges"] == {"Task_Allocation": ["question_node"], "question_node": ["end"]}


def test_whatever_has_no_counterpart_is_listed(tmp_path: Path) -> None:
    nodes = {"a": node("a", "r", kb={"file": "x"}, begin_query="Hello", tools=["search"], templates={"r": "{a[0]} {"})}
    agents = {
        "agent_r": {
            "agent_roles": {"a": "r"},
            "is_user": True,
            "toolkit": {"tools": ["search"]},
            "memory": {"long": {"path": "x"}},
            "LLM_config": {"model": "gpt-4"},
        }
    }
    path = solution(tmp_path / "s", nodes, {"a": ["end_node"]}, agents=agents, sop={"global_kb": {"file": "x"}})
    imported = load_agents(path)
    for part in (
        "begin_query",
        "kb",
        "the tools search",
        "is a person",
        "its braces",
        "toolkit",
        "memory",
        "global_kb",
    ):
        assert any(part in note for note in imported.notes), part
    assert imported.inputs == ("input",)  # no prompt names an input, so the first node is shown one
    assert imported.value["nodes"]["a"]["tools"] == ["search"]
    with pytest.warns(ImportNote):
        assert ao.Pipeline.from_agents(path, name="p").value["nodes"]["a"]["tools"] == []


def test_configurations_in_place_of_paths_and_a_missing_end(tmp_path: Path) -> None:
    path = solution(tmp_path / "s", WRITE_CHECK, {"write": ["check"]})
    sop = json.loads((tmp_path / "s" / "sop.json").read_text())
    team = json.loads((tmp_path / "s" / "agent_team.json").read_text())
    del sop["end"]
    path.write_text(json.dumps({"sop": sop, "agent_team": team}))
    imported = load_agents(path)
    assert imported.value["edges"] == {"write": ["check"], "check": ["end"]}
    assert "node check: no edges; it leads to the end" in imported.notes and imported.description == ""


# ---- errors: one sentence with file, field, found and expected


def broken(tmp_path: Path, file: str, change: Any) -> str:
    path = solution(tmp_path / "s", WRITE_CHECK, WRITE_CHECK_EDGES)
    target = tmp_path / "s" / file
    data = json.loads(target.read_text())
    change(data)
    target.write_text(json.dumps(data))
    with pytest.raises(UserError) as caught, warnings.catch_warnings():
        load_agents(path)
    said = str(caught.value)
    assert said.endswith(".") and "\n" not in said
    return said


def test_a_missing_key_is_named_with_the_keys_there_are(tmp_path: Path) -> None:
    said = broken(tmp_path, "sop.json", lambda data: data.pop("edges"))
    assert "sop.json: field 'edges': found nothing (the keys are 'nodes', 'root', 'end'); expected a map." in said
    assert "field 'agent_team'" in broken(tmp_path, "solution.json", lambda data: data.pop("agent_team"))


def test_wrong_references_are_named(tmp_path: Path) -> None:
    said = broken(tmp_path, "sop.json", lambda data: data.update(root="start"))
    assert "field 'root': found 'start'; expected one of the nodes 'write', 'check'." in said
    said = broken(tmp_path, "sop.json", lambda data: data["edges"].update(write=["nowhere"]))
    assert "field 'edges.write': found 'nowhere'; expected nodes out of 'write', 'check', 'end_node'." in said
    said = broken(tmp_path, "sop.json", lambda data: data["edges"].update(ghost=["write"]))
    assert "field 'edges.ghost'" in said
    said = broken(tmp_path, "sop.json", lambda data: data["edges"].update(check=["write"]))
    assert "the procedure makes no legal pipeline: the end cannot be reached" in said


def test_wrong_types_and_words_are_named(tmp_path: Path) -> None:
    said = broken(tmp_path, "sop.json", lambda data: data["nodes"]["write"].update(controller="order"))
    assert "field 'nodes.write.controller': found \"order\"; expected a map." in said
    said = broken(tmp_path, "sop.json", lambda data: data["nodes"]["write"]["controller"].update(transit_type="jump"))
    assert "nodes.write.controller.transit_type': found 'jump'; expected 'order', 'random' or 'llm'." in said
    said = broken(tmp_path, "sop.json", lambda data: data["nodes"]["write"]["controller"].update(max_chat_nums="many"))
    assert 'max_chat_nums\': found "many"; expected a whole number.' in said
    said = broken(tmp_path, "sop.json", lambda data: data["nodes"]["write"].update(node_prompt_templates={}))
    assert "found a padding of no template; expected one of the templates: none." in said
    said = broken(
        tmp_path,
        "sop.json",
        lambda data: data["nodes"]["write"]["node_prompt_paddings"]["writer"]["step_writer"].update(value_source="web"),
    )
    assert "value_source': found 'web'; expected 'config' or 'case'." in said


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"nothing.json: No such file or directory; expected the path of a solution.json"
    ):
        load_agents(tmp_path / "nothing.json")
    path = solution(tmp_path / "s", WRITE_CHECK, WRITE_CHECK_EDGES)
    (tmp_path / "s" / "sop.json").unlink()
    with pytest.raises(
        UserError, match=r"solution.json: field 'sop': found 'examples/elsewhere/sop.json', which is no f"
    ):
        load_agents(path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"solution.json: found text that is no JSON .* expected a JSON map"):
        load_agents(path)
    path.write_text("[]")
    with pytest.raises(UserError, match=r"solution.json: found \[\]; expected a JSON map"):
        load_agents(path)
