"""From a declaration to a kept adapter: a real folder, a real fold, and a tuning run that measures both forms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from agentopt import graph, models
from agentopt.errors import UserError
from agentopt.weights.fold.client import FolderLM
from tests.weights.fold.tiny import NAMES, THINGS

pytestmark = pytest.mark.anyio

OWNERS = dict(zip(NAMES[:3], THINGS[:3], strict=True))
ROWS = [{"name": name, "turn": turn, "expected": thing} for turn in range(24) for name, thing in OWNERS.items()]


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with graph.parameter_scope():
        yield
    models.reset()


def program(meta: Path) -> Any:
    things = ao.knowledge("own.things", [f"{name} owns {thing}" for name, thing in OWNERS.items()], folder=meta)

    @ao.agent
    async def owner(name: str, turn: int) -> str:
        return (await ao.lm().complete(user=f"{name} owns?", choices=THINGS, knowledge=things)).text

    return owner


@pytest.mark.parametrize("optimizer", ["knowledge", "auto"])
async def test_folding_is_kept_because_it_is_as_good_and_cheaper(
    tiny_meta: Path, tmp_path: Path, optimizer: str
) -> None:
    result = await ao.atune(
        program(tiny_meta), train=ROWS, metric="exact_match", optimizer=optimizer, budget=ao.Budget(rollouts=250),
        options=ao.TuneOptions(screen_size=6, objectives=("score", "tokens"), capture=False),
        models={"agent": f"fold:{tiny_meta}"}, store="runs.db",
    )  # fmt: skip
    value: Any = result.best["own.things"]
    assert value["form"] == "folded"
    assert result.validation["best"] >= max(result.validation["baseline"], 0.9)
    spent = {row["on_front"]: row["prompt_tokens"] for row in result.trade_offs}
    assert spent[True] == 2, "the question alone"
    assert max(row["prompt_tokens"] for row in result.trade_offs) > 9
    adapter = Path(value["adapter"])
    assert adapter.parent == Path("adapters") and (adapter / "adapter_model.safetensors").is_file()
    card = json.loads((adapter / "fold.json").read_text())
    assert (card["base_hash"], card["facts"][0]) == (value["base_hash"], "ann owns lamp")
    page = (tmp_path / "runs" / result.run_id / "report.html").read_text()
    assert "in-context (about 10 tokens)" in page and "folded (adapter adapters/own.things-" in page


async def test_a_best_json_without_its_adapter_is_one_sentence(tiny_meta: Path, tmp_path: Path) -> None:
    owner = program(tiny_meta)
    of = graph.declared_parameters()["own.things"].to_dict()["documents"]
    value = {"form": "folded", "of": of, "adapter": "adapters/own.things-0123"}
    ao.Candidate({"own.things": value}).save(tmp_path / "best.json")
    models.configure({"agent": FolderLM(tiny_meta)})
    with ao.load(tmp_path / "best.json").active(), pytest.raises(UserError) as caught:
        await owner("ann", 0)
    text = str(caught.value)
    assert text.startswith("the adapter's folder is not here")
    assert "parameter 'own.things' is folded into adapters/own.things-0123" in text
    assert "\n" not in text


async def test_an_adapter_of_changed_documents_is_refused_before_any_row(tiny_meta: Path) -> None:
    owner = program(tiny_meta)
    candidate = ao.Candidate({"own.things": {"form": "folded", "of": "0" * 16, "adapter": "adapters/own.things-0123"}})
    with pytest.raises(UserError, match=r"^parameter 'own\.things': made of other documents is the adapter"):
        await ao.aevaluate(owner, ROWS, "exact_match", candidate=candidate, models={"agent": "fold:none"}, store="s.db")
