"""fp8 and int8 folders in loaders that know nothing of us: transformers with compressed-tensors, and vLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from agentopt.weights import gg
from tests.serve.harness import ENVIRONMENT, START
from tests.weights.gg import folders
from tests.weights.tiny import tiny

WORKER = Path(__file__).with_name("stock_worker.py")
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10, 3, 12, 5, 14, 15, 4, 4]]

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-serve"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the smallest shape that vLLM's attention takes, sure of its words."""
    import torch

    folder = tmp_path_factory.mktemp("stock") / "model"
    model, tokenizer = tiny(width=128)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(4 if "embed" in name or "head" in name else 5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def decoded(folder: Path) -> dict[str, Any]:
    """Float32 weights from the files, by the rule of the format alone."""
    import torch

    tensors = folders.stored(folder)
    found: dict[str, Any] = {}
    for name in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
        codes = tensors.get(f"{name}.weight")
        if codes is None:
            packed, width = tensors[f"{name}.weight_packed"], int(tensors[f"{name}.weight_shape"][1])
            codes = torch.stack([((packed >> (8 * at)) & 255) - 128 for at in range(4)], -1).flatten(1)[:, :width]
        found[f"{name}.weight"] = codes.float() * tensors[f"{name}.weight_scale"].float()
    return found


def logprobs(model: Any) -> list[list[float]]:
    """Of every token of the prompts after the first."""
    import torch

    found: list[list[float]] = []
    for prompt in PROMPTS:
        with torch.no_grad():
            said = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        found.append([float(said[at, token]) for at, token in enumerate(prompt[1:])])
    return found


def rebuilt(source: Path, folder: Path) -> Any:
    """The original with the decoded weights in place of its own."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source)
    weights = decoded(folder)
    assert len(weights) == 14
    model.load_state_dict({**model.state_dict(), **weights})
    return model.eval()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # by the import of compressed-tensors
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("format", gg.EXPORTS)
def test_transformers_decodes_the_same_weights(source: Path, tmp_path: Path, format: Any, dynamic: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    options = gg.QuantizeOptions(dynamic_activations=dynamic)
    gg.quantize(source, tmp_path / "out", format, options=options)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, info = loaded[0].eval(), loaded[1]
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found, expected = logprobs(model), logprobs(rebuilt(source, tmp_path / "out"))
    # The first call decompresses; after it the weights are there to be looked at.
    state = model.state_dict()
    for name, weight in decoded(tmp_path / "out").items():
        assert torch.equal(state[name].float(), weight), name
    bound = 0.3 if dynamic else 1e-5
    assert all(one == pytest.approx(two, abs=bound) for one, two in zip(found, expected, strict=True))
    assert dynamic == any(one != pytest.approx(two, abs=1e-5) for one, two in zip(found, expected, strict=True))


def test_vllm_on_a_cpu_runs_both_with_dynamic_activations(source: Path, tmp_path: Path) -> None:
    outs = [tmp_path / format for format in gg.EXPORTS]
    for format, out in zip(gg.EXPORTS, outs, strict=True):
        gg.quantize(source, out, format, options=gg.QuantizeOptions(dynamic_activations=True))
    result = tmp_path / "vllm.json"
    done = subprocess.run(
        [sys.executable, str(WORKER), str(result), *map(str, outs)],
        input=json.dumps(PROMPTS),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **ENVIRONMENT, "VLLM_CACHE_ROOT": str(tmp_path / "cache")},
        timeout=START * len(outs),
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    said = cast("list[list[list[float]]]", json.loads(result.read_text(encoding="utf-8")))
    for found, out in zip(said, outs, strict=True):
        expected = logprobs(rebuilt(source, out))
        # Activations of 8 bits move a log-probability by some hundredths; another weight would move it by ones.
        assert all(one == pytest.approx(two, abs=0.3) for one, two in zip(found, expected, strict=True))
