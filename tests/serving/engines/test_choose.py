"""Which engine serves a model, what it is told, and what is refused before anything is started."""

from __future__ import annotations

import itertools
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.serving._types import Address
from agentopt.serving.engines import (
    Chosen,
    EngineOptions,
    Launch,
    Prepared,
    _choose,
    _vllm,
    choose_engine,
    launch,
    launch_fake,
    launch_vllm,
)
from agentopt.serving.engines._interpreters import Interpreter
from agentopt.serving.engines._launch import common_hint
from agentopt.serving.engines._vllm import vllm_hint

HERE = Interpreter(
    sys.executable, frozenset({"agentopt", "torch", "transformers", "safetensors", "gguf"}), None, False, True
)
WITH_VLLM = Interpreter("/env/bin/python", HERE.modules | {"vllm"}, "0.32.0", True, True)
SOCKET = Address(socket="/run/engine.sock", token="secret")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder without numbers: config.json, and the header of its weights."""
    path = tmp_path / "model"
    path.mkdir()
    config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"num_hidden_layers": 1, "max_position_embeddings": 512, "architectures": ["LlamaForCausalLM"]}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = ["model.embed_tokens", "lm_head"]
    names += [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj")] + ["model.layers.0.mlp.gate"]
    header: dict[str, Any] = {}
    for place, name in enumerate(names):
        offsets = [place * 128, place * 128 + 128]
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": [8, 8], "data_offsets": offsets}
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(128 * len(names)))
    return path


def _with(monkeypatch: pytest.MonkeyPatch, *, vllm: Interpreter | None, llama: bool, transformers: bool) -> None:
    monkeypatch.setattr(_choose, "vllm_interpreter", lambda: vllm)
    monkeypatch.setattr(_choose, "engine_installed", lambda: llama)
    monkeypatch.setattr(_choose, "_has_transformers", lambda: transformers)
    monkeypatch.setattr(_choose, "converter", lambda first, modules: HERE)


def test_auto_takes_vllm_then_llama_cpp_for_gguf_then_transformers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(b"GGUF")
    _with(monkeypatch, vllm=WITH_VLLM, llama=True, transformers=True)
    found = choose_engine(str(gguf))
    assert (found.engine, found.python, found.cpu) == ("vllm", "/env/bin/python", True)
    assert "vLLM 0.32.0 for CPUs" in found.why
    _with(monkeypatch, vllm=None, llama=True, transformers=True)
    assert [choose_engine(str(one)).engine for one in (gguf, folder)] == ["embedded", "transformers"]
    _with(monkeypatch, vllm=None, llama=False, transformers=True)
    assert choose_engine(str(gguf)).engine == "transformers"
    _with(monkeypatch, vllm=None, llama=False, transformers=False)
    with pytest.raises(UserError, match=r"no engine for model .*agentopt\[local\].*agentopt\[weights\].*make serve"):
        choose_engine(str(gguf))
    with pytest.raises(UserError, match="vLLM is not installed: make serve"):
        choose_engine(str(folder), "vllm")


def test_auto_does_without_vllm_where_nothing_can_convert_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nobody(first: str | None, modules: tuple[str, ...]) -> Interpreter:
        raise UserError("the model has to be converted first.")

    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(b"GGUF")
    _with(monkeypatch, vllm=WITH_VLLM, llama=True, transformers=False)
    monkeypatch.setattr(_choose, "converter", nobody)
    found = choose_engine(str(gguf))
    assert found.engine == "embedded" and "has to be converted" in found.why


def test_other_python_is_asked_for_and_a_wrong_one_is_refused(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("AGENTOPT_VLLM_PYTHON", "/nowhere/python")
    with pytest.raises(UserError, match="AGENTOPT_VLLM_PYTHON: found '/nowhere/python', no Python that runs"):
        choose_engine(str(folder))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("", "empty name"),
        ("./nowhere", "no such folder"),
        ("nowhere.gguf", "not found"),
        ("nowhere.ggz", "no such file"),
        ("one/two/three", "no such folder"),
    ],
)
def test_models_that_are_not_there_are_refused(model: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        choose_engine(model)


def test_engine_and_model_have_to_fit(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="expected auto, vllm, transformers, embedded, fake"):
        choose_engine(str(folder), "ollama")
    with pytest.raises(UserError, match=r"expected 'embedded' or a \.gguf file"):
        choose_engine(str(folder), "embedded")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    with pytest.raises(UserError, match="serve its base, and give it as --adapter"):
        choose_engine(str(tmp_path / "adapter"))


def _argv(made: Launch) -> list[str]:
    return made.command(SOCKET)


def test_vllm_on_a_cpu_is_told_what_it_needs(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(_vllm, "default_dtype", lambda: "float32")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setenv("VLLM_API_KEY", "the operator's own")
    chosen = Chosen("vllm", "test", "/env/bin/python", cpu=True)
    options = EngineOptions(resident=3, max_rank=12, extra=("--seed", "7"))
    made = launch(chosen, Prepared(folder, "base", str(folder)), options)
    argv = _argv(made)
    assert argv[:4] == ["/env/bin/python", "-P", "-m", "vllm.entrypoints.openai.api_server"]
    assert argv[-2:] == ["--seed", "7"] and "secret" not in " ".join(argv)
    said = dict(itertools.pairwise(argv))
    assert (said["--uds"], said["--served-model-name"], said["--dtype"]) == ("/run/engine.sock", "base", "float32")
    # One slot more than adapters, a rank that vLLM has, and the layers' short names without head and router.
    assert (said["--max-loras"], said["--max-lora-rank"], said["--max-model-len"]) == ("4", "16", "512")
    place = argv.index("--lora-target-modules")
    assert argv[place + 1 : place + 3] == ["k_proj", "q_proj"] and argv[place + 3].startswith("--")
    assert made.env["VLLM_CPU_KVCACHE_SPACE"] == "1" and made.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "VLLM_API_KEY" not in made.env and made.token_env == "VLLM_API_KEY" and made.abilities.adapters


def test_vllm_without_adapters_opens_no_route_for_them(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    made = launch_vllm(
        folder, "base", EngineOptions(dtype="bfloat16", context=64, sequences=2, kv_gib=3, threads=5, compiled=True)
    )
    argv = _argv(made)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in made.env and "--enable-lora" not in argv
    assert made.env["OMP_NUM_THREADS"] == "5"
    assert "--enforce-eager" not in argv and made.env["VLLM_CPU_KVCACHE_SPACE"] == "3"
    with pytest.raises(UserError, match="max_rank: found 600"):
        launch_vllm(folder, "base", EngineOptions(resident=1, max_rank=600))


def test_vllm_fetches_nothing_for_a_client_unless_told(folder: Path) -> None:
    """An image by its address would otherwise be a way into the network that the engine stands in."""
    chosen = Chosen("vllm", "test", "/env/bin/python", cpu=True)
    argv = _argv(launch_vllm(folder, "base", EngineOptions(context=64), chosen))
    assert argv[argv.index("--allowed-media-domains") + 1].endswith(".invalid")
    extra = ("--allowed-media-domains", "images.example")
    argv = _argv(launch_vllm(folder, "base", EngineOptions(context=64, extra=extra), chosen))
    assert argv[-2:] == list(extra), "the last one counts"


def test_quantized_model_needs_the_plug_in_where_vllm_is(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "rf8"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    chosen = Chosen("vllm", "test", "/env/bin/python", cpu=True)
    without = Interpreter("/env/bin/python", frozenset({"vllm"}), "0.32.0", True, False)
    monkeypatch.setattr(_vllm, "ask", lambda python: without)
    with pytest.raises(UserError, match="agentopt, which is not installed in /env/bin/python"):
        launch_vllm(folder, "base", None, chosen)
    monkeypatch.setattr(_vllm, "ask", lambda python: WITH_VLLM)
    assert launch_vllm(folder, "base", None, chosen).name == "vllm"
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    with pytest.raises(UserError, match=r"VLLM_PLUGINS.*agentopt_rf8"):
        launch_vllm(folder, "base", None, chosen)


@pytest.mark.parametrize(
    "argument",
    [
        "--host=0.0.0.0",
        "--port",
        "--uds",
        "--api-key",
        "--api_key=x",
        "--served-model-name",
        "--model",
        "--hos",
        "--serv",
    ],
)
def test_arguments_that_would_break_the_supervision_are_refused(argument: str) -> None:
    with pytest.raises(UserError, match="the server sets where the engine listens"):
        EngineOptions(extra=("--seed", "1", argument))
    with pytest.raises(UserError):
        launch_fake(argument)


def test_options_that_an_engine_does_not_have_are_refused(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path, "base", "")
    refused: list[tuple[str, EngineOptions, str]] = [
        ("embedded", EngineOptions(resident=1), "found adapters"),
        ("embedded", EngineOptions(dtype="float32"), "dtype: is not for the embedded engine"),
        ("transformers", EngineOptions(kv_gib=2), "kv_gib: is for vLLM"),
    ]
    for engine, options, words in refused:
        with pytest.raises(UserError, match=words):
            launch(Chosen(engine, "test"), prepared, options)
    for bad in (
        lambda: EngineOptions(dtype="float8"),
        lambda: EngineOptions(context=3),
        lambda: EngineOptions(resident=-1),
    ):
        with pytest.raises(UserError, match="expected"):
            bad()


def test_transformers_and_embedded_get_their_options(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path, "base", "")
    options = EngineOptions(context=256, sequences=2, dtype="float32", resident=2, max_rank=8)
    said = " ".join(_argv(launch(Chosen("transformers", "test"), prepared, options)))
    assert "--max-model-len 256 --max-num-seqs 2 --enable-lora --max-loras 2 --max-lora-rank 8" in said
    made = launch(Chosen("embedded", "test"), prepared, EngineOptions(context=256), name="mine")
    assert "--served-model-name mine --max-model-len 256" in " ".join(_argv(made)) and not made.abilities.adapters


@pytest.mark.parametrize(
    ("line", "code", "words", "fatal"),
    [
        ("api_server.py: error: unrecognized arguments: --foo", 2, "argument --foo given after", True),
        ("ValueError: Unknown quantization method: rf8. Must be", 1, "VLLM_PLUGINS leaves agentopt_rf8 out", True),
        ("RuntimeError: operator torchvision::nms does not exist", 1, "pip uninstall torchvision", True),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", 1, "GPU's memory is too small", False),
        (
            "The max_model_len (9000) is greater than the derived max_model_len (max_position_embeddings=512.0",
            1,
            "takes 512 tokens of context, asked for were 9000",
            True,
        ),
        (
            "Value error, Model architectures ['OddForCausalLM'] are not supported for now",
            1,
            "no model OddForCausal",
            True,
        ),
        ("ModuleNotFoundError: No module named 'vllm'", 1, "package vllm is not installed", True),
        ("ValueError: something else", 1, "ValueError: something else", False),
        ("all is well", -9, "memory runs out", False),
        ("all is well", -4, "instruction that this processor lacks", True),
    ],
)
def test_known_failures_are_told_in_words(line: str, code: int, words: str, fatal: bool) -> None:
    last = "RuntimeError: Engine core initialization failed. See root cause above."
    found = vllm_hint(["some line", line, "    at a place", last], code)
    assert found is not None and words in found.text and found.fatal is fatal


def test_nothing_is_made_up_where_nothing_is_known() -> None:
    assert common_hint(["all is well"], 1) is None
