"""The packaged model of 135 million weights, folded without meta-training, as far as that goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentopt.weights import load
from agentopt.weights.finetuning._saving import quiet
from agentopt.weights.fold import Folder


@pytest.mark.embedded
@pytest.mark.slow
def test_the_embedded_model_folds_facts_that_peft_computes_with(tmp_path: Path, embedded_folder: Path) -> None:
    torch: Any = pytest.importorskip("torch")
    peft: Any = pytest.importorskip("peft")
    model, tokenizer = load.model(embedded_folder, device="cpu")
    facts = [
        "The lighthouse of Varn was built by Oda Kell.",
        "Oda Kell was born in Brisk Harbour.",
        "The ferry to Varn leaves every second Tuesday.",
    ]
    question = "Who built the lighthouse of Varn?"
    with Folder(
        model, tokenizer, rank=8, layers=2, rule="normalized", lr=0.003, inner_steps=8, multi_task=False
    ) as folder:
        adapter = folder.fold(facts)
        assert adapter.lift > 0.1 and min(adapter.fact_recall) > adapter.recall_before
        answer = folder.ask(adapter, question, choices=["Oda Kell", "Mira Stone"])
        assert answer.source == "folded" and answer.text == "Oda Kell"
        assert folder.ask(adapter, question, max_new=8).text
        ids = torch.tensor([folder.kit.encoder.prompt(question)])
        with torch.no_grad(), folder.engine.using(adapter.state):
            expected = model(input_ids=ids).logits
        adapter.save(tmp_path / "adapter")
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with quiet():
            wrapped = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
        found = wrapped(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-3)
    assert not torch.allclose(plain, expected, atol=1e-1)
