"""Prefix tuning: peft agrees on the same numbers, forward and generate; several prefixes in a batch; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights import prefix
from tests.weights.test_adapters import IDS, close, gpt2, llama
from tests.weights.tiny import tiny

torch = pytest.importorskip("torch")

# peft asks transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]])


def output(model: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, **kwargs).logits


def written(model: Any, **kwargs: Any) -> Any:
    return model.generate(
        input_ids=IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False, pad_token_id=0, **kwargs
    )


@pytest.mark.parametrize("make", [llama, gpt2])
def test_peft_agrees_both_ways(make: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    tuned = prefix.attach(make(), tokens=3, seed=2)
    with torch.no_grad():
        tuned.prefix.mul_(3)
    tuned.save(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(make(), str(tmp_path / "ours"))
    close(output(theirs), output(tuned))
    assert torch.equal(written(theirs), written(tuned))
    assert torch.equal(written(tuned, use_cache=False), written(tuned))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = prefix.load(make(), tmp_path / "theirs")
    assert torch.equal(again.prefix, tuned.prefix)


def test_activations_are_those_of_real_tokens() -> None:
    """A row behind the prefix reads as it does behind the tokens themselves."""
    model = llama()
    tuned = prefix.attach(model, tokens=2, seed=5)
    pairs = torch.cartesian_prod(torch.arange(17), torch.arange(17))
    with torch.no_grad():
        whole = model(input_ids=torch.cat([pairs, torch.tensor([[3, 4]]).expand(len(pairs), 2)], dim=1)).logits[:, 2:]
        behind = tuned(input_ids=torch.tensor([[3, 4]])).logits
    assert int(((whole - behind).abs().amax(dim=(1, 2)) < 1e-5).sum()) == 1
    assert [name for name, one in tuned.named_parameters() if one.requires_grad] == ["prefix"]
    assert tuned.config is model.config
    assert all(one.requires_grad for one in tuned.detach_model().parameters())


def test_several_prefixes_in_one_batch_and_learning() -> None:
    tuned = prefix.attach(llama(), tokens=2, init="random", seed=1)
    assert torch.equal(tuned.prefix, prefix.attach(llama(), tokens=2, init="random", seed=1).prefix)
    pair = torch.stack([tuned.prefix.detach(), tuned.prefix.detach() * 50])
    with torch.no_grad():
        both = tuned.functional(pair, input_ids=IDS).logits
        for number in range(2):
            alone = tuned.functional(pair[number], input_ids=IDS).logits
            close(both[2 * number : 2 * number + 2], alone[2 * number : 2 * number + 2])
    with pytest.raises(UserError, match="batch of 4 rows for 3 prefixes"):
        tuned.functional(torch.cat([pair, pair[:1]]), input_ids=IDS)
    optimizer = torch.optim.AdamW([tuned.prefix], lr=0.05)
    losses = []
    for _ in range(4):
        loss = tuned(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_refusals(tmp_path: Path) -> None:
    wrong: dict[str, Any]
    for wrong, says in [({"tokens": 0}, "tokens is 0"), ({"init": "zero"}, "init is 'zero'")]:
        with pytest.raises(UserError, match=says):
            prefix.attach(llama(), **wrong)
    tuned = prefix.attach(llama(), tokens=2)
    with pytest.raises(UserError, match="neither input_ids"):
        tuned()
    tuned.save(tmp_path)
    with pytest.raises(UserError, match=r"expected \(2, 64\)"):
        prefix.load(tiny(width=16)[0], tmp_path)
