"""The inner loop's meta-gradients: against finite differences, against a reference written out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from agentopt.weights.fold import FoldOptions
from tests.weights.tiny import tiny

torch = pytest.importorskip("torch")

from agentopt.weights.fold import _step  # noqa: E402
from agentopt.weights.fold._engine import Engine, make_engine  # noqa: E402
from agentopt.weights.fold._inner import fold_rows  # noqa: E402
from agentopt.weights.fold._meta import MetaParameters, new_meta  # noqa: E402
from agentopt.weights.fold._rates import rate  # noqa: E402
from agentopt.weights.fold._rows import Rows  # noqa: E402

VOCABULARY = 17


def llama() -> Any:
    return tiny(width=16)[0].double()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).double().eval()


def rows(documents: int, count: int = 2, length: int = 6, seed: int = 0) -> Rows:
    """Random tokens; the last two columns are padding, and a first row is shorter."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (documents, count, length), generator=draw)
    weight = torch.ones(documents, count, length, dtype=torch.float64)
    weight[:, :, length - 2 :] = 0
    weight[:, 0, 3:] = 0
    return Rows(ids, weight).scaled("row")


def started(build: Any, **options: Any) -> tuple[Engine, MetaParameters]:
    """An engine, and meta-parameters that are away from their start where that is a special place."""
    lr = 0.002 if options.get("adapts") == "all" else 0.05
    values: dict[str, Any] = {"rank": 2, "inner_steps": 3, "unroll": None, "lr": lr, **options}
    asked = FoldOptions(**values)
    engine = make_engine(build(), asked)
    meta = new_meta(engine, asked)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*meta.rates.values(), *meta.token_weights.values()):
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype))
        if engine.options.adapts == "lora":
            for tensor in meta.init.values():
                tensor.mul_(5)
    return engine, meta


def outer_loss(engine: Engine, meta: MetaParameters, documents: int = 2, graph: bool = True) -> Any:
    state = fold_rows(engine, meta, rows(documents), graph=graph)
    asked = rows(documents, 3, 5, seed=9)
    return (engine.nll(state, asked) * asked.weight).sum()


def gradients(engine: Engine, meta: MetaParameters) -> dict[str, list[Any]]:
    kinds = meta.parameters()
    flat = [tensor for held in kinds.values() for tensor in held]
    found = iter(torch.autograd.grad(outer_loss(engine, meta), flat, materialize_grads=True))
    return {kind: [next(found) for _ in held] for kind, held in kinds.items()}


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64 all through, and an AdamW that is smooth where gradients are small."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def norm(self: Any, hidden: Any) -> Any:
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(_step, "_EPS", 0.05)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("rule", ["sgd", "normalized", "adamw"])
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (llama, {"token_weights": True}),
        (llama, {"layers": 1}),
        (llama, {"adapts": "all", "token_weights": True}),
        (gpt2, {"trains": "all", "token_weights": True}),
        (gpt2, {"adapts": "all"}),
    ],
)
def test_meta_gradients_are_those_of_finite_differences(build: Any, options: dict[str, Any], rule: str) -> None:
    engine, meta = started(build, rule=rule, **options)
    found = gradients(engine, meta)
    assert set(found) == {"init", "rates"} | ({"token_weights"} if "token_weights" in options else set()) | (
        {"shared"} if options.get("trains") else set()
    )
    draw = torch.Generator().manual_seed(4)
    for kind, tensors in meta.parameters().items():
        along = [torch.randn(tensor.shape, generator=draw, dtype=torch.float64) for tensor in tensors]
        size = sum(float(one.square().sum()) for one in along) ** 0.5
        along = [one / size for one in along]
        measured = slope_along(engine, meta, tensors, along)
        computed = sum(float((one * way).sum()) for one, way in zip(found[kind], along, strict=True))
        assert computed == pytest.approx(measured, rel=1e-6, abs=1e-10), kind
        assert abs(computed) > 1e-6, kind


def slope_along(engine: Engine, meta: MetaParameters, tensors: list[Any], along: list[Any], h: float = 1e-4) -> float:
    """The derivative in one direction by central differences of fourth order."""
    start = [tensor.detach().clone() for tensor in tensors]
    values: dict[int, float] = {}
    for times in (-2, -1, 1, 2):
        with torch.no_grad():
            for tensor, own, way in zip(tensors, start, along, strict=True):
                tensor.copy_(own + times * h * way)
        values[times] = float(outer_loss(engine, meta, graph=False).detach())
    with torch.no_grad():
        for tensor, own in zip(tensors, start, strict=True):
            tensor.copy_(own)
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h)


@pytest.mark.parametrize("unroll", [1, None])
@pytest.mark.parametrize(
    "options",
    [
        {"rule": "adamw", "token_weights": True, "trains": "all"},
        {"rule": "sgd", "layers": 1},
        {"rule": "normalized", "adapts": "all", "token_weights": True},
    ],
)
def test_checkpointed_steps_have_the_same_gradients(options: dict[str, Any], unroll: int | None) -> None:
    given: list[dict[str, list[Any]]] = []
    for checkpoint in (True, False):
        engine, meta = started(gpt2, checkpoint=checkpoint, unroll=unroll, **options)
        given.append(gradients(engine, meta))
    for kind, tensors in given[0].items():
        for one, other in zip(tensors, given[1][kind], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


def by_hand(engine: Engine, meta: MetaParameters, documents: int, unroll: int) -> Any:
    """Truncated folding of LoRA factors as it is written down: a document at a time, plain logits."""
    from torch.nn.functional import cross_entropy

    held: Any = engine

    def loss(phi: dict[str, Any], ids: Any, weight: Any) -> Any:
        with held.adapters.use(phi):
            logits = engine.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        each = cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1), reduction="none")
        return (each * weight[:, 1:].reshape(-1)).sum()

    engine.model.set_attn_implementation("eager")
    inner, asked = rows(documents), rows(documents, 3, 5, seed=9)
    steps = engine.options.inner_steps
    total = 0.0
    for place in range(documents):
        phi: dict[str, Any] = dict(meta.init)
        for number in range(steps):
            value = loss(phi, inner.ids[place], inner.weight[place])
            g = torch.autograd.grad(value, list(phi.values()), create_graph=True)
            if number < steps - unroll:
                g = [one.detach() for one in g]
            phi = {
                name: old - rate(meta.rates[name][number]) * one
                for (name, old), one in zip(phi.items(), g, strict=True)
            }
        total = total + loss(phi, asked.ids[place], asked.weight[place])
    return total


@pytest.mark.parametrize("unroll", [0, 1, 2, 3])
def test_truncation_is_what_its_definition_says(unroll: int) -> None:
    engine, meta = started(gpt2, unroll=unroll)
    found = gradients(engine, meta)
    wanted = torch.autograd.grad(by_hand(engine, meta, 2, unroll), [*meta.init.values(), *meta.rates.values()])
    for one, other in zip([*found["init"], *found["rates"]], wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_first_order_is_the_outer_gradient_at_the_end_of_the_loop() -> None:
    engine, meta = started(llama, unroll=0, adapts="all", rule="adamw")
    found = gradients(engine, meta)
    state = fold_rows(engine, meta, rows(2), graph=False)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    asked = rows(2, 3, 5, seed=9)
    loss = (engine.nll(leaves, asked) * asked.weight).sum()
    for one, other in zip(found["init"], torch.autograd.grad(loss, list(leaves.values())), strict=True):
        torch.testing.assert_close(one, other.sum(0), rtol=1e-9, atol=1e-12)
