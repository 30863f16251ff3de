"""What a tuning run says of knowledge: the documents at the start, the forms that are tried, folds that failed."""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

import agentopt as ao
from agentopt import graph
from agentopt.cli._console import diff_lines
from agentopt.cli._progress import LiveRun


@pytest.fixture(autouse=True)
def handbook() -> Iterator[ao.Knowledge]:
    with graph.parameter_scope():
        yield ao.knowledge("desk.handbook", ["Parcels leave at noon.", "Letters leave at six."], folder="meta")


def test_a_run_tells_documents_forms_and_failed_folds() -> None:
    written = StringIO()
    view = LiveRun(console=Console(file=written, width=200))
    plan = {"search": 10, "text": ""}
    view.on_baseline_done(
        SimpleNamespace(mean=0.5, rows=4, errors=0, tunable=["desk.handbook", "else"], tools={}, plan=plan)
    )
    made = {"source": "knowledge.folded", "rationale": "desk.handbook: in-context -> folded (adapter a, recall 0.97)"}
    drop = {"source": "knowledge.folded", "problem": "desk.handbook: the gate refuses the adapter", "tries": 1}
    for _ in range(2):
        view.on_proposal_made(SimpleNamespace(updates=[made], dropped=[drop], outcome="ok", detail="", iteration=0))
    lines = written.getvalue().splitlines()
    assert (
        "  desk.handbook: 2 documents, in-context (about 11 tokens); may become a capsule, or folded with meta" in lines
    )
    assert lines.count("  tries desk.handbook: in-context -> folded (adapter a, recall 0.97)") == 1
    assert lines.count("  not folded: desk.handbook: the gate refuses the adapter") == 1


def test_a_diff_names_the_forms() -> None:
    after = {"form": "folded", "of": "x", "adapter": "adapters/desk", "recall": 0.97}
    assert diff_lines({"form": "in-context"}, after, "desk.handbook") == [
        ("-", "in-context (about 11 tokens)"),
        ("+", "folded (adapter adapters/desk, recall 0.97)"),
    ]
