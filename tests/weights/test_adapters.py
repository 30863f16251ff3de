"""Low-rank adapters: the batched layer, what peft reads and writes, merging, functional factors, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights import adapters
from tests.weights.tiny import tiny

torch = pytest.importorskip("torch")

# peft asks transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3], [5, 5, 4, 10], [11, 12, 13, 3]])


def gpt2() -> Any:
    """A random GPT-2, whose linear layers are `Conv1D`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=17, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
        ).eval()


def llama() -> Any:
    return tiny()[0]


def fill(held: adapters.Adapters, seed: int = 1) -> None:
    """Factors with an effect: `lora_B` is no longer zero."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in held.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)


def logits(model: Any, ids: Any = IDS) -> Any:
    with torch.no_grad():
        return model(input_ids=ids).logits


def close(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=1e-5, atol=5e-6)


# --- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [None, [0, 1, 2, 0, 1, 2], [2, 2, 0], []])
def test_gradients_of_the_batched_form_are_those_of_the_naive_form(index: list[int] | None) -> None:
    random = torch.Generator().manual_seed(0)
    adapters_count = 1 if index == [] else 3

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=random, dtype=torch.float64).requires_grad_()

    x, a, b = draw(6, 2, 5), draw(adapters_count, 2, 5), draw(adapters_count, 4, 2)
    which = torch.tensor(index) if index else None
    of_row = [0] * 6 if index == [] else [0, 0, 1, 1, 2, 2] if index is None else [2, 2, 2, 2, 0, 0]
    of_row = index if index and len(index) == 6 else of_row

    def batched(x: Any, a: Any, b: Any) -> Any:
        return adapters.lora_delta(x, a, b, which, 0.7)

    def naive(x: Any, a: Any, b: Any) -> Any:
        return torch.stack([0.7 * row @ a[one].T @ b[one].T for row, one in zip(x, of_row, strict=True)])

    close(batched(x, a, b), naive(x, a, b))
    mine = torch.autograd.grad(batched(x, a, b).square().sum(), (x, a, b))
    for one, other in zip(mine, torch.autograd.grad(naive(x, a, b).square().sum(), (x, a, b)), strict=True):
        close(one, other)
    assert torch.autograd.gradcheck(batched, (x, a, b))
    assert torch.autograd.gradgradcheck(batched, (x, a, b))


def test_flat_rows_and_one_shared_factor() -> None:
    random = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(*shape, generator=random) for shape in ((4, 5), (2, 5), (2, 3, 2)))
    delta = adapters.lora_delta(x, a, b, torch.tensor([1, 0, 0, 1]))
    close(delta, torch.stack([x[row] @ a.T @ b[one].T for row, one in enumerate([1, 0, 0, 1])]))
    with pytest.raises(UserError, match=r"batch of 4 rows for an index of 3"):
        adapters.lora_delta(x, a, b, torch.tensor([1, 0, 0]))


def test_torch_func_maps_over_adapters() -> None:
    layer = adapters.LoraLinear(torch.nn.Linear(5, 3), rank=2, alpha=4)
    random = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(*shape, generator=random) for shape in ((4, 6, 5), (4, 2, 5), (4, 3, 2)))

    def loss(a: Any, b: Any, x: Any) -> Any:
        return layer.functional(x, a, b).square().mean()

    mapped = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(a, b, x)
    for number in range(4):
        one = torch.func.grad(loss, argnums=(0, 1))(a[number], b[number], x[number])
        close(mapped[0][number], one[0])
        close(mapped[1][number], one[1])


# --- a model with adapters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2])
def test_attached_changes_nothing_merged_is_attached_detached_is_the_base(make: Any) -> None:
    model = make()
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    held = adapters.attach(model, rank=3, alpha=6)
    assert torch.equal(logits(model), before)
    assert not any(".lm_head" in f".{name}" for name in held.parameters())
    assert {name for name, one in model.named_parameters() if one.requires_grad} == set(held.parameters())
    fill(held)
    with_adapter = logits(model)
    assert not torch.allclose(with_adapter, before, atol=1e-3)
    assert held.detach_model() is model
    assert torch.equal(logits(model), before)
    assert [name for name, one in model.named_parameters() if one.requires_grad] == names
    again = adapters.attach(model, rank=3, alpha=6)
    again.fill({}, "nothing")
    fill(again)
    again.merge_()
    close(logits(model), with_adapter)
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("make", [llama, gpt2])
def test_each_row_has_its_own_adapter(make: Any) -> None:
    model = make()
    held = adapters.attach(model, rank=2, copies=2)
    fill(held)
    singles = []
    for copy in range(2):
        with held.rows([copy] * 4):
            singles.append(logits(model))
    assert not torch.allclose(singles[0], singles[1], atol=1e-3)
    with held.rows([1, 0, 0, 1]):
        mixed = logits(model)
    for row, copy in enumerate([1, 0, 0, 1]):
        close(mixed[row], singles[copy][row])
    both = logits(model)  # two equal chunks
    with held.rows([0, 0, 1, 1]):
        assert torch.equal(logits(model), both)
    close(both[:2], singles[0][:2])
    close(both[2:], singles[1][2:])


def test_factors_that_are_computed_carry_second_derivatives() -> None:
    model = llama()
    held = adapters.attach(model, rank=2, targets=["q_proj", "down_proj"])
    fill(held)
    state = {name: tensor.requires_grad_() for name, tensor in held.state().items()}

    def loss(state: dict[str, Any]) -> Any:
        with held.use(state), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return model(input_ids=IDS, labels=IDS).loss

    plain = model(input_ids=IDS, labels=IDS).loss
    close(loss(state), plain)
    slopes = torch.autograd.grad(loss(state), list(state.values()), create_graph=True)
    stepped = {name: one - 0.1 * slope for (name, one), slope in zip(state.items(), slopes, strict=True)}
    outer = torch.autograd.grad(loss(stepped), list(state.values()))
    assert all(torch.isfinite(one).all() and one.abs().max() > 0 for one in outer)
    # Two documents in two adapters equal one after the other.
    pair = {name: torch.stack([one, one * 0.5]).detach() for name, one in state.items()}
    with held.use(pair), held.rows([1, 0, 0, 1]):
        mixed = logits(model)
    with held.use({name: one[1] for name, one in pair.items()}):
        close(mixed[[0, 3]], logits(model)[[0, 3]])
    assert torch.equal(model(input_ids=IDS, labels=IDS).loss, plain)


def test_sixteen_bit_base_float_factors_one_step_learns() -> None:
    model = llama().bfloat16()
    held = adapters.attach(model, rank=4, seed=3)
    assert {one.dtype for one in held.parameters().values()} == {torch.float32}
    optimizer = torch.optim.AdamW(held.parameters().values(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]


def test_the_seed_decides_the_start_alone() -> None:
    states = [adapters.attach(llama(), rank=2, seed=seed, targets=targets).state() for seed, targets in
              [(0, "all-linear"), (0, "q_proj"), (1, "q_proj")]]  # fmt: skip
    name = "model.layers.1.self_attn.q_proj.lora_A"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[1][name], states[2][name])
    assert states[0][name].shape == (2, 32)
    assert states[0][name].abs().max() <= 32**-0.5


# --- peft ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2])
def test_peft_loads_what_we_save(make: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    model = make()
    held = adapters.attach(model, rank=3, alpha=5, copies=2)
    fill(held)
    with held.rows([1] * 4):
        ours = logits(model)
    held.save(tmp_path, copy=1)
    close(logits(PeftModel.from_pretrained(make(), str(tmp_path))), ours)
    other = make()
    again = adapters.load(other, tmp_path)
    close(logits(other), ours)
    assert again.save(tmp_path / "again") == tmp_path / "again"
    close(logits(PeftModel.from_pretrained(make(), str(tmp_path / "again"))), ours)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_we_load_what_peft_saves(make: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "up_proj"] if make is llama else ["c_attn", "c_fc"]
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_rslora=True, fan_in_fan_out=make is gpt2,
        init_lora_weights=False, task_type="CAUSAL_LM",
        rank_pattern={targets[0]: 2}, alpha_pattern={r"0\..*" + targets[1]: 3},
    )  # fmt: skip
    theirs = get_peft_model(make(), config).eval()
    theirs.save_pretrained(str(tmp_path))
    model = make()
    held = adapters.load(model, tmp_path)
    close(logits(model), logits(theirs))
    # Into one of several adapters of a larger rank, on more layers.
    wide = make()
    room = adapters.attach(wide, rank=5, alpha=1, copies=2)
    fill(room)
    room.load(tmp_path, copy=1)
    with room.rows([1] * 4):
        close(logits(wide), logits(theirs))
    held.save(tmp_path / "again")
    again = make()
    adapters.load(again, tmp_path / "again")
    close(logits(again), logits(theirs))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    model = llama()
    wrong: dict[str, Any]
    for wrong, says in [
        ({"rank": 0}, "rank is 0"),
        ({"copies": 1.5}, "copies is 1.5"),
        ({"alpha": 0}, "alpha > 0"),
        ({"targets": []}, "targets is empty"),
        ({"targets": ["q_prj"]}, "'q_prj'.*no layer has this name.*q_proj"),
        ({"targets": ["embed_tokens"]}, "names a Embedding"),
    ]:
        with pytest.raises(UserError, match=says):
            adapters.attach(model, **wrong)
    held = adapters.attach(model, rank=2, copies=2)
    with pytest.raises(UserError, match="has adapters already"):
        adapters.attach(model)
    for rows in ([0, 2], [-1], []):
        with pytest.raises(UserError, match="from 0 to 1"), held.rows(rows):
            pass
    name = "model.layers.0.mlp.up_proj.lora_A"
    for state, says in [
        ({"lora_A": torch.zeros(2, 32)}, "expected names such as"),
        ({name: torch.zeros(3, 32)}, r"expected \(2, 32\)"),
        ({name: torch.zeros(3, 2, 32), name.replace("_A", "_B"): torch.zeros(4, 64, 2)}, "3 adapters but .* 4"),
    ]:
        with pytest.raises(UserError, match=says), held.use(state):
            pass
    with pytest.raises(UserError, match="batch of 3 rows"):
        logits(model, IDS[:3])
    with pytest.raises(UserError, match="copy 2"):
        held.save(tmp_path, copy=2)
    held.detach_model()
    with pytest.raises(UserError, match="have left their model"):
        held.merge_()
    tied = llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(UserError, match=r"lm_head shares its weight with model\.embed_tokens\.weight"):
        adapters.attach(tied, targets=["lm_head"]).merge_()


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    held = adapters.attach(llama(), rank=2, targets="q_proj")
    with pytest.raises(UserError, match="no such folder"):
        adapters.load(llama(), tmp_path / "none")
    with pytest.raises(UserError, match=r"no readable adapter_config\.json"):
        adapters.load(llama(), tmp_path)
    held.save(tmp_path)
    with pytest.raises(UserError, match=r"has factors for model\.layers"):
        adapters.load(gpt2(), tmp_path)
    with pytest.raises(UserError, match=r"model\.layers\..*q_proj has \(rank, in, out\) = \(2, 32, 32\)"):
        adapters.load(tiny(width=16)[0], tmp_path)
    with pytest.raises(UserError, match="or a smaller rank"):
        adapters.attach(llama(), rank=1).load(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, says in [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "changes the base model"),
        ({"peft_type": "IA3"}, "peft_type 'IA3', expected 'LORA'"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
    ]:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=says):
            adapters.load(llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        adapters.load(llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        adapters.load(llama(), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        adapters.load(llama(), tmp_path)
    with pytest.raises(UserError, match="found a file"):
        held.save(tmp_path / "adapter_config.json")


def test_importing_loads_no_torch() -> None:
    code = "import sys; from agentopt.weights import adapters; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
