"""Handles: reading gives the active plain value; anything else says `.value`."""

from __future__ import annotations

import copy
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt import graph
from agentopt.errors import UserError
from agentopt.graph import Candidate


def test_every_read_gives_the_active_value() -> None:
    p = graph.prompt("Hello {x}", name="p")
    with Candidate({"p": "Bye {x}"}).active():
        assert p.value == "Bye {x}"
        assert str(p) == "Bye {x}"
        assert f"{p:>8}" == " Bye {x}"
        assert p.format(x=1) == "Bye 1"
        assert "<" + p + ">" == "<Bye {x}>"
        assert p + p == "Bye {x}Bye {x}"
        assert "Bye" in p
        assert len(p) == 7
        assert "".join(p) == "Bye {x}"
        assert bool(p)
    assert p.value == "Hello {x}"


def test_demos_read_as_a_list_that_cannot_change_the_candidate() -> None:
    d = graph.demos(name="d", max_items=2)
    assert d.value == []
    assert not d
    with Candidate({"d": [{"input": "a", "output": "b", "source": "1"}]}).active():
        assert [item["output"] for item in d] == ["b"]
        assert len(d) == 1
        assert {"input": "a", "output": "b", "source": "1"} in d
        d.value.clear()
        assert d.value == [{"input": "a", "output": "b", "source": "1"}]
        first = [{"x": 1}]
        assert first + d == [{"x": 1}, *d.value]


def test_numbers_and_choices() -> None:
    n = graph.number(0, 10, name="n")
    t = graph.number(0.0, 1.0, name="t", default=0.25)
    c = graph.choice(["a", "b"], name="c")
    assert (n.value, t.value, c.value) == (5, 0.25, "a")
    assert isinstance(n.value, int)
    assert n + 1 == 6
    assert 1 + n == 6
    assert f"{t:.1f} {c}" == "0.2 a"
    with Candidate({"n": 7, "c": "b"}).active():
        assert (n.value, c.value) == (7, "b")


@pytest.mark.parametrize(
    "use",
    [
        lambda p: p.upper(),
        lambda p: p[0],
        lambda p: p * 2,
        lambda p: p % 3,
        lambda p: p < "x",
        lambda p: int(p),
        lambda p: float(p),
        lambda p: -p,
        lambda p: setattr(p, "value", "x"),
        lambda p: setattr(p, "anything", "x"),
        lambda p: range(p),
    ],
)
def test_unsupported_operation_raises_type_error_that_names_value_or_the_fix(use) -> None:
    p = graph.prompt("text", name="p")
    with pytest.raises(TypeError, match=r"'p'.*(\.value|active\(\))"):
        use(p)


@pytest.mark.parametrize("use", [lambda n: bool(n), lambda n: len(n), lambda n: 1 in n, lambda n: list(n)])
def test_number_has_no_truth_length_or_items(use) -> None:
    with pytest.raises(TypeError, match=r"\.value"):
        use(graph.number(0, 1, name="n"))


def test_code_that_needs_real_text_fails_loudly_instead_of_using_the_old_text() -> None:
    p = graph.prompt("text", name="p")
    untyped: Any = p
    uses: tuple[Any, ...] = (",".join, json.dumps, re.compile("t").match, Path)
    for use, argument in zip(uses, ([untyped], untyped, untyped, untyped), strict=True):
        with pytest.raises(TypeError):
            use(argument)
    assert not isinstance(p, (str, list, float))
    assert not callable(p)
    assert not hasattr(p, "upper")
    assert not hasattr(p, "__fspath__")


def test_equality_and_hash_are_identity_and_copies_are_the_handle() -> None:
    p = graph.prompt("text", name="p")
    assert p != "text"
    assert p == p
    assert {p: 1}[p] == 1
    assert copy.copy(p) is p
    assert copy.deepcopy({"a": [p]})["a"][0] is p


def test_handle_given_to_an_op_is_recorded_as_a_reference(tmp_path: Path) -> None:
    p = graph.prompt("text", name="p")

    @graph.step
    def ask(system: object) -> str:
        return f"{system}!"

    with graph.record() as recording:
        assert ask(p) == "text!"
    recording.trace.save(tmp_path / "t.trace.jsonl")
    for trace in (recording.trace, graph.Trace.load(tmp_path / "t.trace.jsonl")):
        (op,) = [op for op in trace.ops if op.op == "ask"]
        assert op.inputs == {"system": {"$parameter": "p"}}
        assert [kind for _, kind in op.parents] == ["parameter"]


def test_repr_reads_nothing() -> None:
    p = graph.prompt("text", name="p")
    with graph.record() as recording:
        assert repr(p) == "<prompt 'p'>"
    assert dict(recording.trace.parameters) == {}


def test_pickling_is_a_clear_error() -> None:
    reduce = graph.prompt("text", name="p").__reduce_ex__
    with pytest.raises(TypeError, match=r"'p'.*cannot be pickled.*handle\.value"):
        reduce(2)


def test_json_form_refers_to_the_parameter() -> None:
    p = graph.prompt("text", name="p")
    assert p.to_json() == {"$parameter": "p"}
    again = graph.handle_from_json({"$parameter": "p"})
    with Candidate({"p": "new"}).active():
        assert again.value == "new"
    with pytest.raises(UserError, match="no parameter 'q'"):
        graph.handle_from_json({"$parameter": "q"})
    with pytest.raises(UserError, match="expected"):
        graph.handle_from_json("p")


def test_pydantic_field_takes_a_handle_and_serializes_the_active_value() -> None:
    import pydantic

    p = graph.prompt("old", name="p")

    class Config(pydantic.BaseModel):
        system: graph.Prompt
        plain: str = ""

    config = Config(system=p)
    assert config.system is p
    with Candidate({"p": "new"}).active():
        assert config.model_dump() == {"system": "new", "plain": ""}
        assert json.loads(config.model_dump_json()) == {"system": "new", "plain": ""}
    again = Config.model_validate({"system": {"$parameter": "p"}})
    assert again.system.spec is p.spec
    assert Config.model_json_schema()["properties"]["system"] is not None
    with pytest.raises(pydantic.ValidationError, match="parameter handle"):
        Config.model_validate({"system": "text"})
    with pytest.raises(pydantic.ValidationError, match="string"):
        Config(system=p, plain=p)  # type: ignore[arg-type]


def test_graph_room_imports_no_pydantic() -> None:
    code = "import sys, agentopt.graph, agentopt.sandbox; sys.exit('pydantic' in sys.modules or 'anyio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.text(max_size=60))
def test_format_equals_str_format_of_the_active_text(text: str) -> None:
    with graph.parameter_scope():
        template = text.replace("{", "{{").replace("}", "}}") + "{x}"
        p = graph.prompt(template, name="p")
        assert p.spec.variables == ("x",)
        assert p.format(x="v") == text + "v"


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        ("plain", ()),
        ("{a} and {b} and {a}", ("a", "b")),
        ("{{a}} {{{b}}}", ("b",)),
        ("{user.name} {items[0]} {x!r:>{width}}", ("user", "items", "x", "width")),
        ('Reply {"label": "x"}', ()),
        ('{ticket}: reply {"label": 1}', ("ticket",)),
        ("half { open {ticket}", ("ticket",)),
        ("{größe} {名前}", ("größe", "名前")),
        ("{} {0}", ()),
    ],
)
def test_variables_are_inferred(text: str, variables: tuple[str, ...]) -> None:
    assert graph.prompt(text, name="p").spec.variables == variables


def test_same_declaration_twice_is_one_parameter() -> None:
    one, two = graph.prompt("text", name="p"), graph.prompt("text", name="p")
    assert one.spec is two.spec
    assert list(graph.declared_parameters()) == ["p"]


@pytest.mark.parametrize(
    "second",
    [
        lambda: graph.prompt("other", name="p"),
        lambda: graph.choice(["text"], name="p"),
        lambda: graph.prompt("text", name="p", variables=["text"]),
    ],
)
def test_same_name_with_another_default_is_an_error_that_names_both_places(second) -> None:
    graph.prompt("text", name="p")
    with pytest.raises(UserError, match=r"'p' is declared twice.*test_handles\.py:\d+ and .*test_handles\.py:\d+"):
        second()


def test_module_that_is_executed_again_may_change_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = tmp_path / "reloaded_program.py"
    source.write_text("from agentopt import graph\np = graph.prompt('one', name='reloaded')\n")
    module = importlib.import_module("reloaded_program")
    source.write_text("from agentopt import graph\np = graph.prompt('number two', name='reloaded')\n")
    importlib.reload(module)
    assert graph.declared_parameters("reloaded_program")["reloaded"].default == "number two"
    source.write_text("from agentopt import graph\np = graph.prompt('3', name='reloaded')\n")
    del sys.modules["reloaded_program"]
    module = importlib.import_module("reloaded_program")
    assert module.p.value == "3"
    source.write_text(
        "from agentopt import graph\np = graph.prompt('4', name='reloaded')\nq = graph.prompt('5', name='reloaded')\n"
    )
    with pytest.raises(UserError, match="declared twice"):
        importlib.reload(module)
    del sys.modules["reloaded_program"]


def test_declarations_are_found_by_module() -> None:
    graph.prompt("a", name="a")
    assert list(graph.declared_parameters(__name__)) == ["a"]
    assert graph.declared_parameters("elsewhere") == {}
    spec = graph.declared_parameters()["a"]
    assert spec.file == __file__
    assert spec.place == f"{__file__}:{spec.line}"


@pytest.mark.parametrize(
    ("declare", "words"),
    [
        (lambda: graph.prompt(3, name="p"), "must be text"),  # type: ignore[arg-type]
        (lambda: graph.prompt("x", name=""), "parameter name"),
        (lambda: graph.prompt("x", name="a\nb"), "parameter name"),
        (lambda: graph.prompt("x", name="p", variables="abc"), "list of names"),
        (lambda: graph.prompt("x", name="p", constraint=lambda text: "too short"), "too short"),
        (lambda: graph.demos(name="p", max_items=0), "max_items"),
        (lambda: graph.demos(name="p", default=[{"input": "x"}]), "'output' must be text"),
        (lambda: graph.number(2, 1, name="p"), "lower bound"),
        (lambda: graph.number(0, 1, name="p", default=4), "outside the bounds"),
        (lambda: graph.number("a", 1, name="p"), "low must be a number"),  # type: ignore[arg-type]
        (lambda: graph.number(float("nan"), 1, name="p"), "bound"),
        (lambda: graph.choice([], name="p"), "at least one"),
        (lambda: graph.choice("abc", name="p"), "list"),
        (lambda: graph.choice(["a"], name="p", default="b"), "none of the options"),
        (lambda: graph.choice([object()], name="p"), "JSON"),  # type: ignore[list-item]
    ],
)
def test_bad_declaration_is_one_clear_sentence(declare, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        declare()
    assert "'p'" in str(caught.value) or "name" in str(caught.value)
