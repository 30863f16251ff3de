"""A folder as a language model: requests with and without an adapter, usage, identity, errors, `fold:PATH`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from agentopt import graph, models
from agentopt.errors import UserError
from agentopt.models import LM, LMRefused, Reply, Request, connect
from agentopt.weights.fold import Folder
from agentopt.weights.fold._gate import Gate
from agentopt.weights.fold.client import FolderLM, Shared, fold_once, shared_folder
from tests.weights.fold.tiny import OPTIONS, THINGS, tiny_model

pytestmark = pytest.mark.anyio

FACTS = ["ann owns lamp", "bob owns rope", "cid owns coin"]


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> str:
    return str(tiny_base)


@pytest.fixture(scope="module")
def meta(tiny_meta: Path) -> Path:
    return tiny_meta


@pytest.fixture(scope="module")
def adapter(meta: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapters") / "things-1a"
    assert fold_once(meta, FACTS, out)["facts"] == FACTS
    return out


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with graph.parameter_scope():
        yield
    models.reset()


def folded(handle: ao.Knowledge, adapter: Path | str) -> Any:
    assert handle.spec.knowledge is not None
    value = {"form": "folded", "of": handle.spec.knowledge.hash, "adapter": str(adapter)}
    return ao.Candidate({handle.name: value}).active()


def asked(adapter: Path | None, *turns: tuple[str, str], **fields: Any) -> Request:
    messages = tuple({"role": role, "content": content} for role, content in turns or (("user", "ann owns?"),))
    return Request("m", messages, adapter=None if adapter is None else str(adapter), **fields)


async def test_an_adapter_answers_as_the_folder_does_and_its_facts_cost_nothing(meta: Path, adapter: Path) -> None:
    client = FolderLM(meta)
    reply = await client.send(asked(adapter, choices=THINGS))
    with Folder.load(meta) as folder:
        own = folder.ask(folder.load_adapter(adapter), "ann owns?", choices=THINGS)
    assert (reply.text, own.text, own.source) == ("lamp", "lamp", "folded")
    assert (reply.usage.input_tokens, reply.usage.calls, reply.cost) == (2, 1, 0.0)
    assert reply.usage.output_tokens >= 1
    assert (await client.send(asked(adapter))).text != ""


async def test_without_an_adapter_the_lines_before_are_read(meta: Path) -> None:
    client = FolderLM(meta)
    reply = await client.send(asked(None, ("system", "\n".join(FACTS)), ("user", "ann owns?"), choices=THINGS))
    with Folder.load(meta) as folder, folder.base_in_use():
        own = folder.reader().ask(FACTS, "ann owns?", THINGS)
    assert reply.text == own.text
    assert reply.usage.input_tokens > 9
    again = await client.send(asked(None, ("system", "\n".join(FACTS)), ("user", "bob owns?"), choices=THINGS))
    assert again.text in THINGS
    alone = await client.send(asked(None, choices=THINGS))
    assert (alone.text in THINGS, alone.usage.input_tokens) == (True, 2)


async def test_where_the_gate_falls_back_the_facts_are_counted(base: str, tmp_path: Path) -> None:
    with Folder(base, options=OPTIONS) as folder:
        folder.gate = Gate(recall=0.999)
        meta = folder.save(tmp_path / "meta")
    card = fold_once(meta, FACTS, tmp_path / "a")
    assert not card["accepted"]
    strict, open_ = FolderLM(meta), FolderLM(meta, gate=False)
    assert strict.name != open_.name
    with ao.record() as recording:
        fallen = await LM(strict).complete(user="ann owns?", choices=THINGS, knowledge=_named(tmp_path / "a"))
    free = await open_.send(asked(tmp_path / "a", choices=THINGS))
    assert fallen.usage.input_tokens > 9 > free.usage.input_tokens
    (op,) = [op for op in recording.trace.ops if op.op == "fold"]
    assert op.meta is not None and op.meta["source"] == "in-context" and "0.999" in str(op.meta["reason"])


def _named(adapter: Path) -> ao.Knowledge:
    handle = ao.knowledge("own.things", FACTS)
    assert handle.spec.knowledge is not None
    value = {"form": "folded", "of": handle.spec.knowledge.hash, "adapter": str(adapter)}
    ao.Candidate({handle.name: value}).install()
    return handle


@pytest.fixture(autouse=True)
def nothing_installed() -> Iterator[None]:
    yield
    graph.uninstall()


@pytest.mark.parametrize("folded", [True, False])
async def test_the_model_reads_what_a_server_makes_of_the_same_turns(meta: Path, adapter: Path, folded: bool) -> None:
    turns = (("system", "so: a lot\n\n not"), ("assistant", "bob owns rope"), ("user", "ann owns?"))
    with FolderLM(meta) as client:
        folder = client._shared.folder  # pyright: ignore[reportPrivateUsage]
        read: list[list[int]] = []
        seen = folder.model.get_input_embeddings().register_forward_pre_hook(
            lambda _, given: read.append(given[0].flatten().tolist())
        )
        reply = await client.send(asked(adapter if folded else None, *turns, choices=THINGS))
        seen.remove()
        served = folder.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            chat_template=(meta / "chat_template.jinja").read_text(encoding="utf-8"),
            return_dict=False,
        )
    prompt = [token for part in read for token in part][: len(served)]
    assert prompt == served and reply.usage.input_tokens == len(served) == 9


async def test_entered_it_is_loaded_and_left_it_is_freed(meta: Path, adapter: Path) -> None:
    async with FolderLM(meta) as client:
        shared = client._shared  # pyright: ignore[reportPrivateUsage]
        held = shared._folder  # pyright: ignore[reportPrivateUsage]
        assert held is not None, "before the first call"
        assert (await client.complete(user="ann owns?", choices=THINGS)).text in THINGS
        assert shared.folder is held
    assert shared._folder is None  # pyright: ignore[reportPrivateUsage]
    assert (await client.send(asked(adapter, choices=THINGS))).text == "lamp", "and loaded again when it is asked"


async def test_a_program_runs_in_both_forms_and_replies_are_cached(meta: Path, adapter: Path, tmp_path: Path) -> None:
    things = ao.knowledge("things", FACTS, folder=meta)

    @ao.agent
    async def owner(name: str) -> str:
        return (await ao.lm().complete(user=f"{name} owns?", choices=THINGS, knowledge=things)).text

    rows = [{"name": "ann", "expected": "lamp"}, {"name": "bob", "expected": "rope"}]
    assert things.spec.knowledge is not None
    read = ao.Candidate({"things": {"form": "in-context"}})
    kept = ao.Candidate({"things": {"form": "folded", "of": things.spec.knowledge.hash, "adapter": str(adapter)}})
    spent: list[float] = []
    for candidate in (read, kept, kept):
        result = await ao.aevaluate(
            owner, rows, "exact_match", candidate=candidate, models={"agent": f"fold:{meta}"}, store=tmp_path / "s.db",
            capture=False,
        )  # fmt: skip
        assert not any(row.error for row in result.rows)
        spent.append(sum(row.usage.input_tokens for row in result.rows))
    assert spent[0] > spent[1] == 4
    assert spent[2] == 0, "cached"


def test_identity_is_the_content_of_the_folder(meta: Path, tmp_path: Path) -> None:
    one = FolderLM(meta)
    assert one.name == connect(f"fold:{meta}").name and one.name.startswith("fold:meta#")
    assert shared_folder(meta) is shared_folder(meta)
    copy = tmp_path / "meta"
    copy.mkdir()
    head = json.loads((meta / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**head, "meta_hash": "other"}))
    assert FolderLM(copy).name != one.name
    assert one.deterministic


async def test_an_open_folder_and_closing(base: str, meta: Path) -> None:
    with Folder(base, options=OPTIONS) as folder:
        client = FolderLM(folder)
        assert (await client.send(asked(None, choices=THINGS))).text in THINGS
        pieces = [piece async for piece in client.stream(asked(None, choices=THINGS))]
        assert isinstance(pieces[-1], Reply) and pieces[0] == pieces[-1].text
        client.close()
        assert folder.codec is not None, "a folder that was given is not closed"
        assert Shared(folder).lock is Shared(folder).lock, "two clients over one model wait for each other"
    loaded = FolderLM(meta)
    first = await loaded.send(asked(None, choices=THINGS))
    loaded.close()
    assert (await loaded.send(asked(None, choices=THINGS))).text == first.text


async def test_folding_once_keeps_the_adapter(meta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fold_once(meta, FACTS, tmp_path / "a")
    monkeypatch.setattr(Folder, "fold", None)
    assert fold_once(meta, FACTS, tmp_path / "a") == first
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ---- what goes wrong


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (asked(None, tools=({"type": "function"},)), "cannot call tools"),
        (asked(None, schema={"type": "object"}), "JSON schema"),
        (asked(None, ("user", "q"), ("assistant", "so:")), "last user turn"),
        (Request("m", ({"role": "user", "content": [{"type": "image_url"}]},)), "text only"),
    ],
)
async def test_requests_that_a_folder_cannot_answer(meta: Path, request_: Request, match: str) -> None:
    with pytest.raises(LMRefused, match=match):
        await FolderLM(meta).send(request_)


async def test_an_adapter_that_is_not_here_is_one_sentence(meta: Path, tmp_path: Path) -> None:
    things = ao.knowledge("things", FACTS)
    with (
        folded(things, tmp_path / "gone"),
        pytest.raises(UserError, match=r"^the adapter's folder is not here .*'things' is folded"),
    ):
        await LM(FolderLM(meta)).complete("ann owns?", knowledge=things)


async def test_an_adapter_of_another_base_is_refused_by_its_hash(meta: Path, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(seed=1)
    with Folder(model, tokenizer, options=OPTIONS) as other:
        other.fold(FACTS).save(tmp_path / "other")
    with pytest.raises(UserError, match="base"):
        await FolderLM(meta).send(asked(tmp_path / "other"))


def test_no_meta_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found no meta\.json"):
        FolderLM(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        shared_folder(tmp_path / "nowhere")
