"""Engines: documents at once are each alone, nothing is kept that is not needed, the model is left as it was."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

from agentopt.errors import RunError, UserError
from agentopt.weights.fold import FoldOptions

torch = pytest.importorskip("torch")

from agentopt.weights.fold import _head, _rates  # noqa: E402
from agentopt.weights.fold._attention import check_attention, twice_differentiable  # noqa: E402
from agentopt.weights.fold._engine import make_engine  # noqa: E402
from agentopt.weights.fold._head import Head  # noqa: E402
from agentopt.weights.fold._inner import fold_rows  # noqa: E402
from agentopt.weights.fold._meta import new_meta  # noqa: E402
from agentopt.weights.fold._rows import Rows, work  # noqa: E402
from tests.weights.fold.test_inner import VOCABULARY, exact, gpt2, llama, outer_loss, rows, started  # noqa: E402

_ = exact  # a fixture
EXACT = pytest.mark.usefixtures("exact")
BOTH = pytest.mark.parametrize("adapts", ["lora", "all"])


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(one) == list(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-12)


@EXACT
@BOTH
@pytest.mark.parametrize("build", [llama, gpt2])
def test_documents_at_once_are_each_alone(adapts: str, build: Any) -> None:
    engine, meta = started(build, adapts=adapts, rule="adamw")
    given = rows(4)
    together = fold_rows(engine, meta, given, graph=False)
    alone = [fold_rows(engine, meta, given.part(place, place + 1), graph=False) for place in range(4)]
    same(together, {name: torch.cat([one[name] for one in alone]) for name in together})
    same(together, fold_rows(engine, meta, given, graph=False, documents_at_once=3))
    nll = engine.nll(together, given)
    assert nll.shape == given.ids.shape and bool(((nll > 0) == (given.scaled("row").weight > 0)).all())
    for place in range(4):
        torch.testing.assert_close(nll[place : place + 1], engine.nll(alone[place], given.part(place, place + 1)))


@EXACT
@BOTH
def test_padding_counts_for_nothing(adapts: str) -> None:
    engine, meta = started(llama, adapts=adapts, token_weights=True)
    given = rows(2)
    ids = torch.full((2, 4, 11), 5)
    weight = torch.zeros(2, 4, 11, dtype=torch.float64)
    ids[:, :2, :6], weight[:, :2, :6] = given.ids, given.weight
    weight[:, :, 0] = 1  # a row's first token is never predicted
    same(fold_rows(engine, meta, given, graph=False), fold_rows(engine, meta, Rows(ids, weight), graph=False))


@BOTH
def test_a_document_without_facts_stays_at_the_start(adapts: str) -> None:
    engine, meta = started(gpt2, adapts=adapts, token_weights=True, rule="normalized")
    given = rows(2)
    given.weight[1] = 0
    state = fold_rows(engine, meta, given, graph=False)
    same({name: tensor[1] for name, tensor in state.items()}, {n: t.detach() for n, t in meta.init.items()})
    assert not any(torch.equal(tensor[0], meta.init[name]) for name, tensor in state.items() if "lora" in name)
    nothing = Rows(given.ids, torch.zeros(given.ids.shape))
    start = {name: tensor.detach() for name, tensor in meta.init.items()}
    same(fold_rows(engine, meta, nothing, graph=False), engine.expand(start, 2))


@BOTH
def test_hidden_states_are_those_that_predict(adapts: str) -> None:
    engine, meta = started(llama, adapts=adapts, trains="all")
    given = rows(2)
    state = fold_rows(engine, meta, given, graph=False)
    nll, hidden = engine.nll_hidden(state, given)
    torch.testing.assert_close(nll, engine.nll(state, given))
    with engine.using({name: tensor[1:] if adapts == "lora" else tensor[1] for name, tensor in state.items()}):
        last = engine.model.model(input_ids=given.ids[1]).last_hidden_state
    torch.testing.assert_close(hidden[1, 1, 1:4], last[1, :3])
    assert hidden.shape == (*given.ids.shape, 16) and not hidden[:, :, 4:].any()


@BOTH
def test_inference_keeps_nothing(adapts: str) -> None:
    engine, meta = started(gpt2, adapts=adapts, token_weights=True)
    with_graph = fold_rows(engine, meta, rows(2), graph=True)
    without = fold_rows(engine, meta, rows(2), graph=False)
    same({name: tensor.detach() for name, tensor in with_graph.items()}, without)
    assert all(tensor.requires_grad for tensor in with_graph.values())
    assert not any(tensor.requires_grad for tensor in without.values())
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def saved_bytes(engine: Any, meta: Any) -> int:
    class Kept:
        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor
            alive.add(self)

    alive: weakref.WeakSet[Kept] = weakref.WeakSet()
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        state = fold_rows(engine, meta, rows(4, 8, 20), graph=True)
    stores = [kept.tensor.untyped_storage() for kept in alive]
    assert state
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


def test_early_steps_and_checkpointed_steps_keep_no_graph_of_the_model() -> None:
    kept = {
        (unroll, checkpoint): saved_bytes(*started(gpt2, unroll=unroll, checkpoint=checkpoint, inner_steps=4))
        for unroll in (0, 1, None)
        for checkpoint in (True, False)
    }
    assert kept[None, True] < 0.1 * kept[1, False] < 0.05 * kept[None, False]
    assert kept[0, False] == kept[0, True] < 0.1 * kept[1, False]


def test_layers_under_the_adapted_ones_run_once() -> None:
    engine, meta = started(llama, layers=1)
    assert {name.split(".")[2] for name in meta.init} == {"1"}
    blocks = engine.model.model.layers
    counts = [0, 0]
    for place, block in enumerate(blocks):
        inner = block.self_attn.forward

        def counted(*args: Any, _place: int = place, _inner: Any = inner, **kwargs: Any) -> Any:
            counts[_place] += 1
            return _inner(*args, **kwargs)

        block.self_attn.forward = counted
    state = fold_rows(engine, meta, rows(2), graph=False)
    assert counts == [1, 3]
    prepared = engine.work(rows(2))
    first, _ = engine.tokens(state, prepared)
    again, _ = engine.tokens(state, prepared)
    torch.testing.assert_close(first, again)
    torch.testing.assert_close(first, engine.tokens(state, engine.work(rows(2)))[0])


@pytest.mark.parametrize("options", [{}, {"trains": "all"}, {"adapts": "all"}])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_model_is_left_as_it_was(build: Any, options: dict[str, Any]) -> None:
    model = build().train()
    next(model.parameters()).requires_grad_(False)
    before = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()}
    engine, meta = started(lambda: model, **options)
    given = rows(2)
    assert not model.training
    with torch.no_grad():
        for tensor in (*meta.shared.values(), *(meta.init.values() if "adapts" in options else ())):
            tensor.mul_(1.1)
    state = fold_rows(engine, meta, given, graph=False)
    one = {name: tensor[1] for name, tensor in state.items()}
    with engine.using(one):
        logits = model(input_ids=given.ids[1]).logits
    keep = torch.zeros(given.ids.shape, dtype=torch.bool)
    keep[1, :, 1:] = True
    torch.testing.assert_close(engine.logits_at(state, given, keep), logits[:, :-1].reshape(-1, VOCABULARY))
    base = engine.logits_at(None, given, keep)
    engine.close()
    assert model.training
    model.eval()
    torch.testing.assert_close(base, model(input_ids=given.ids[1]).logits[:, :-1].reshape(-1, VOCABULARY))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (tensor, needs) in before.items():
        assert torch.equal(after[name], tensor) and after[name].requires_grad == needs
    assert not any("forward" in module.__dict__ for module in model.modules())


@EXACT
def test_documents_one_after_the_other_where_vmap_is_not_possible() -> None:
    engine, meta = started(llama, adapts="all")
    whole: Any = engine
    together = fold_rows(engine, meta, rows(3), graph=False)
    assert whole._batched
    whole._batched = False
    same(together, fold_rows(engine, meta, rows(3), graph=False))


def test_a_loop_that_leaves_the_numbers_names_the_document_and_the_step() -> None:
    engine, meta = started(gpt2)
    given = rows(3)
    given.weight[1] *= float("inf")
    with pytest.raises(RunError, match=r"in step 0 .* document 1;"):
        fold_rows(engine, meta, given, graph=False, documents_at_once=1)
    with torch.no_grad():
        for raw in meta.rates.values():
            raw[1] = float("inf")
    with pytest.raises(RunError, match=r"in step 1 .* document 0, 1;"):
        fold_rows(engine, meta, rows(2), graph=True)


def test_kernels_without_a_second_derivative_are_refused() -> None:
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"'flash_attention_2'.*unroll=0"):
        make_engine(model, FoldOptions())
    check_attention(model, 0)
    model.config._attn_implementation = "sdpa"
    q = torch.randn(1, 2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def attend(x: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    with twice_differentiable(model):
        assert torch.autograd.gradgradcheck(attend, (q,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 3}, "layers is 3, expected at most 2"),
        ({"targets": ("nowhere",)}, "'nowhere'.*q_proj"),
        ({"targets": ("embed_tokens",)}, "'embed_tokens'"),
    ],
)
def test_options_that_do_not_fit_the_model(options: dict[str, Any], message: str) -> None:
    model = llama()
    with pytest.raises(UserError, match=message):
        make_engine(model, FoldOptions(**options))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_fused_activation_computes_the_same_and_only_within() -> None:
    model = gpt2()
    given = rows(1)
    keep = torch.zeros(given.ids.shape, dtype=torch.bool)
    keep[:, :, 1:] = True
    before = model(input_ids=given.ids[0]).logits[:, :-1].reshape(-1, VOCABULARY)
    engine = make_engine(model, FoldOptions())
    assert len(_head.fused(model)) == 2
    torch.testing.assert_close(engine.logits_at(None, given, keep), before, rtol=1e-9, atol=1e-12)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_model_that_has_adapters_is_refused_and_left_alone() -> None:
    model = llama().train()
    first = make_engine(model, FoldOptions())
    model.train()
    with pytest.raises(UserError, match="adapters already"):
        make_engine(model, FoldOptions())
    assert model.training
    first.close()
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_the_lean_head_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_head, "_CHUNK", 1)  # chunks of 16
    head = Head(llama())
    assert head.plain
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(17, 16, dtype=torch.float64, generator=draw).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (17,), generator=draw)
    logits = torch.nn.functional.linear(hidden, head.module.weight.detach())
    torch.testing.assert_close(head.lean_nll(hidden, targets), _head.nll(logits, targets))
    assert torch.autograd.gradcheck(lambda h: head.lean_nll(h, targets), (hidden,))
    assert torch.autograd.gradgradcheck(lambda h: head.lean_nll(h, targets), (hidden,))
    assert head.lean_nll(hidden[:0], targets[:0]).shape == (0,)


def test_a_head_that_is_not_the_last_step_is_used_as_the_model_uses_it() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
    )
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(config).eval()
    assert not Head(model).plain
    options = FoldOptions(rank=2, inner_steps=2)
    engine = make_engine(model, options)
    meta = new_meta(engine, options)
    given = rows(2)
    state = fold_rows(engine, meta, given, graph=True)
    with engine.using({name: tensor[0] for name, tensor in state.items()}):
        logits = model(input_ids=given.ids[0]).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, 0], given.ids[0, :, 1], reduction="none")
    torch.testing.assert_close(engine.nll(state, given)[0, :, 1], wanted)
    torch.autograd.grad(engine.nll(state, given).sum(), list(meta.init.values()))


@BOTH
def test_a_base_of_16_bits(adapts: str) -> None:
    model = gpt2().to(torch.bfloat16)
    asked: dict[str, Any] = {"adapts": adapts, "rank": 2, "inner_steps": 2, "token_weights": True, "lr": 0.01}
    options = FoldOptions(**asked)
    engine = make_engine(model, options)
    meta = new_meta(engine, options)
    assert {tensor.dtype for held in meta.parameters().values() for tensor in held} == {torch.float32}
    loss = outer_loss(engine, meta)
    assert loss.dtype == torch.float64  # of the test's weights
    found = torch.autograd.grad(loss, list(meta.init.values()))
    assert all(bool(torch.isfinite(one).all()) for one in found)


def test_rates_are_positive_and_start_where_they_are_asked_to() -> None:
    for lr in (1e-6, 1e-3, 1.0, 50.0):
        options = FoldOptions(lr=lr, learn_lr=False)
        made = _rates.new_rates(["x"], options, torch.zeros(1, dtype=torch.float64))["x"]
        assert made.shape == (4,) and not made.requires_grad
        assert _rates.rate(made).tolist() == pytest.approx([lr] * 4)
    engine, meta = started(gpt2, learn_lr=False)
    assert set(meta.parameters()) == {"init"}
    engine.close()


def test_token_weights_start_at_one_and_keep_a_document_at_its_total() -> None:
    given = rows(2)
    prepared = work(given, "cpu")
    hidden = torch.randn(len(prepared.targets), 16, generator=torch.Generator().manual_seed(0))
    net = _rates.new_token_weights(16, 0, torch.zeros(1))
    torch.testing.assert_close(_rates.token_weight(net, hidden), torch.ones(len(hidden)))
    torch.testing.assert_close(_rates.coefficients(prepared, hidden, net).double(), prepared.weight)
    with torch.no_grad():
        net["out.weight"] += torch.arange(32) / 10
    moved = _rates.coefficients(prepared, hidden, net).double()
    assert not torch.allclose(moved, prepared.weight)
    for document in (0, 1):
        mine = prepared.document == document
        assert float(moved[mine].sum().detach()) == pytest.approx(float(prepared.weight[mine].sum()))


def test_meta_parameters_are_a_function_of_the_seed_and_go_through_files() -> None:
    one, first = started(gpt2, token_weights=True, trains="all")
    other, second = started(gpt2, token_weights=True, trains="all", seed=1)
    again, third = started(gpt2, token_weights=True, trains="all")
    assert all(torch.equal(tensor, third.init[name]) for name, tensor in first.init.items())
    assert not any(torch.equal(tensor, second.init[name]) for name, tensor in first.init.items())
    held = list(second.init.values())
    second.load_state_dict(first.state_dict())
    assert all(mine is now for mine, now in zip(held, second.init.values(), strict=True))
    state = first.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in second.state_dict().items())
    given = rows(2)
    same(fold_rows(one, first, given, graph=False), fold_rows(other, second, given, graph=False))
    state.pop(next(iter(state)))
    with pytest.raises(UserError, match=r"found nothing for the meta-parameter 'init/.*', expected \("):
        third.load_state_dict(state)
    again.close()


def test_rows_of_other_shapes_are_refused() -> None:
    with pytest.raises(UserError, match=r"\(2, 3\).*expected \(documents, rows, tokens\)"):
        Rows(torch.zeros(2, 3), torch.zeros(2, 3))
    given = rows(2)
    assert given.scaled("document").weight.sum((1, 2)).tolist() == pytest.approx([1, 1])
    assert given.scaled("row").weight.sum(2).flatten().tolist() == pytest.approx([1] * 4)
    assert given.scaled("root").weight.sum(2).flatten().tolist() == pytest.approx([0.5**0.5] * 4)
    engine, meta = started(gpt2)
    with pytest.raises(UserError, match="documents_at_once is 0"):
        fold_rows(engine, meta, given, graph=False, documents_at_once=0)
