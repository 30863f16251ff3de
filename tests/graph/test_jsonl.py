"""Trace files: round-trip of wild values, half-written files, killed writers, clear errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agentopt.graph as ao
from agentopt.errors import UserError
from agentopt.graph._values import decode, encode, freeze
from agentopt.graph.jsonl import TraceWarning

texts = st.text(st.characters(codec=None, categories=None))  # lone surrogates too
hashables = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    texts,
    st.binary(),
    st.complex_numbers(allow_nan=False),
)
values = st.recursive(
    st.one_of(hashables, st.builds(bytearray, st.binary())),
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(hashables, inner),
        st.dictionaries(st.sampled_from(["$ref", "$dict", "$tuple", "$str", "x"]), inner, max_size=1),
        st.sets(hashables),
        st.frozensets(hashables),
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(values)
def test_any_value_survives_the_json_form(value: Any) -> None:
    frozen = freeze(value)
    text = json.dumps(encode(frozen), allow_nan=False, ensure_ascii=False).encode()
    again = decode(json.loads(text))
    assert again == frozen
    assert type(again) is type(frozen)


def test_not_a_number_survives_the_json_form() -> None:
    again = decode(json.loads(json.dumps(encode({"x": [float("nan"), float("-inf")]}), allow_nan=False)))
    assert str(again) == "{'x': [nan, -inf]}"


def test_an_unknown_value_form_is_refused() -> None:
    with pytest.raises(ValueError, match="newer version"):
        decode({"$tensor": []})


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(values, values), max_size=8), st.text())
def test_a_trace_of_wild_values_survives_the_file(tmp_path_factory: Any, calls: list[Any], name: str) -> None:
    with ao.record(name) as recording:
        for x, y in calls:
            with ao.operation("step", kind="step", inputs={"x": x, name or "empty": y}) as op:
                op.annotate(meta=y)
                op.set_output(x)
        ao.note_parameter_read("p", name)
        _ = ao.node(3) + 4
    trace = recording.trace
    path = tmp_path_factory.mktemp("traces") / "run.trace.jsonl"
    trace.save(path)
    assert ao.Trace.load(path) == trace
    assert ao.Trace.from_dict(json.loads(json.dumps(trace.to_dict()))) == trace


def test_a_name_that_is_not_unicode_does_not_break_the_file(tmp_path: Path) -> None:
    with ao.record("run \ud800") as recording, ao.operation("op \udcff", inputs={"\udcff": 1}):
        pass
    loaded = ao.Trace.load(recording.trace.save(tmp_path / "odd.trace.jsonl"))
    assert (loaded.name, loaded.ops[0].inputs) == ("run ?", {"?": 1})


def failing_trace() -> ao.Trace:
    @ao.bundle
    def divides(x: int) -> float:
        return x / 0

    p = ao.parameter(1, name="p", description="a number", constraint="small")
    with ao.record("failing") as recording:
        with ao.operation("lm", kind="lm", inputs={"messages": ["é\ud800"]}) as op:
            op.report(usage=ao.Usage(3, 4, 1, 1, 1, 2, 9, 8, None), cost=0.5)
            op.set_output(object())
        with pytest.raises(ZeroDivisionError):
            divides(p)
    return recording.trace


def test_d7_records_parameters_errors_and_usage_survive_the_file(tmp_path: Path) -> None:
    trace = failing_trace()
    path = trace.save(tmp_path / "deep" / "run.trace.jsonl")
    loaded = ao.Trace.load(path)
    assert loaded == trace
    assert (loaded.usage, loaded.cost, loaded.parameters, loaded.error) == (
        trace.usage,
        trace.cost,
        trace.parameters,
        trace.error,
    )
    error = loaded.find("divides")[0].error
    assert error is not None and error.op_id == loaded.find("divides")[0].id
    assert loaded.find("lm")[0].output.mutable
    found = ao.backward(loaded, ao.Feedback(loaded.find("divides")[0].id, "fb"))
    assert found["p"].parameters["p"].constraint == "small"
    with pytest.raises(UserError, match="Node is not in the trace"):
        loaded.id_of(ao.node(1))


def chain(length: int) -> ao.Trace:
    y: Any = ao.parameter(0, name="p")
    for _ in range(length):
        y = y + 1
    return y.trace


@pytest.mark.slow
def test_100_000_operations_save_load_and_go_backward(tmp_path: Path) -> None:
    trace = chain(100_000)
    loaded = ao.Trace.load(trace.save(tmp_path / "long.trace.jsonl"))
    assert len(loaded) == 100_001
    assert loaded.output == 100_000
    assert len(ao.backward(loaded, ao.Feedback(loaded.output_id, "fb"))["p"].ops) == 100_000


def test_every_half_written_file_gives_its_whole_records(tmp_path: Path) -> None:
    trace = chain(5)
    path = trace.save(tmp_path / "run.trace.jsonl")
    data = path.read_bytes()
    header = data.index(b"\n") + 1
    for size in range(header, len(data)):
        path.write_bytes(data[:size])
        whole = data[header:size].count(b"\n")
        complete = data[size : size + 1] == b"\n"  # only the newline is missing: the record is whole
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = ao.Trace.load(path)
        assert len(loaded) == whole + complete
        assert list(loaded.ops) == list(trace.ops[: whole + complete])
        if len(loaded) < len(trace):
            assert [warning.category for warning in caught] == [TraceWarning]
            assert f"line {len(loaded) + 2}" in str(caught[0].message)
        else:
            assert caught == []


def test_a_writer_killed_in_the_middle_leaves_a_readable_file(tmp_path: Path) -> None:
    path = tmp_path / "killed.trace.jsonl"
    script = textwrap.dedent("""
        import sys
        import agentopt.graph as ao
        y = ao.node(0, trainable=True, name="p")
        for _ in range(20_000):
            y = y + 1
        trace = y.trace
        print("go", flush=True)
        while True:
            trace.save(sys.argv[1])
    """)
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            size = path.stat().st_size if path.exists() else 0
            if 200_000 < size < 900_000:
                break
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = ao.Trace.load(path)
    assert 0 < len(loaded) <= 20_001
    if len(loaded) < 20_001:
        assert f"line {len(loaded) + 2}" in str(caught[0].message)
        assert loaded.output == len(loaded) - 1
    assert ao.backward(loaded, ao.Feedback(loaded.output_id, "fb")).keys() == {"p"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1 must be a trace header"),
        ("not json\n", "line 1 must be a trace header"),
        ("[1]\n", "line 1 must be a trace header"),
        ('{"format":"agentopt.trace","version":99,"count":0}\n', "update agentopt"),
        ('{"format":"agentopt.trace","version":1,"count":1}\nbroken\n', "line 2 is not a trace record"),
        ('{"format":"agentopt.trace","version":1,"count":1}\n{"id":0}\n', "line 2 is not a trace record: op"),
        ('{"format":"agentopt.trace","version":1,"count":1}\n{"id":0,"op":"x","kind":"op","extra":1}\n', "extra"),
        ('{"format":"agentopt.trace","version":1,"count":1}\n{"id":5,"op":"x","kind":"op"}\n', "has id 5"),
        ('{"format":"agentopt.trace","version":1,"count":0}\n{"id":0,"op":"x","kind":"op"}\n', "found 1"),
        (
            '{"format":"agentopt.trace","version":1,"count":1,"output_id":7}\n{"id":0,"op":"x","kind":"op"}\n',
            "output_id 7",
        ),
        (
            '{"format":"agentopt.trace","version":1,"count":1}\n{"id":0,"op":"x","kind":"op","parents":[[0,"data"]]}\n',
            "parents",
        ),
        (
            '{"format":"agentopt.trace","version":1,"count":1}\n{"id":0,"op":"x","kind":"op","output":{"$tensor":1}}\n',
            "unknown value form",
        ),
    ],
)
def test_a_file_that_is_not_a_trace_is_one_clear_error(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.trace.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        ao.Trace.load(path)


def test_missing_files_and_unwritable_paths_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        ao.Trace.load(tmp_path / "none.trace.jsonl")
    with pytest.raises(UserError, match="cannot be written"):
        chain(1).save(tmp_path)
    with pytest.raises(UserError, match="expected format"):
        ao.Trace.from_dict({"format": "other"})


def test_an_empty_recording_survives_the_file(tmp_path: Path) -> None:
    with ao.record() as recording:
        pass
    trace = recording.trace
    assert (len(trace), trace.output, trace.output_id, trace.error) == (0, None, None, None)
    assert ao.Trace.load(trace.save(tmp_path / "empty.trace.jsonl")) == trace


def test_d14_importing_the_graph_loads_no_heavy_package() -> None:
    script = (
        "import sys, agentopt.graph; "
        "heavy = {'pydantic', 'numpy', 'anyio', 'httpx', 'litellm', 'openai', 'torch', 'sqlite3', 'asyncio'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "[]"
