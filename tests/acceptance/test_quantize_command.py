"""`agentopt quantize` as a person runs it: folders, reports, archives; interrupted and gone on with; bad input."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentopt.cli import _quantize_print
from agentopt.cli._app import app
from agentopt.errors import RunError, UserError
from tests.acceptance.warm import Done, Run, WarmCommands
from tests.weights.tiny import WORDS, tiny_folder

pytest.importorskip("torch")

ENVIRONMENT = {
    **os.environ,
    "COLUMNS": "80",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
IMPORTED = (
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.modeling_gguf_pytorch_utils",
    "safetensors.torch",
    "agentopt.weights.gg._quantize",
    "agentopt.weights.gg.archive",
    *(f"agentopt.cli._quantize{part}" for part in ("", "_archive", "_print", "_saved")),
)
LAYERS = 14
COPIED = ("load:", "serve:", "report:", "check:", "unpack:", "agentopt: ")

Here = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize")
    tiny_folder(path / "model")
    words = [WORDS[(7 * place + place // 5) % len(WORDS)].strip() for place in range(600)]
    (path / "text.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def light(warm: WarmCommands, folder: Path) -> Run:
    """Commands that end before a model is needed."""
    return warm.command("quantize", folder, ENVIRONMENT, 600)


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[Run]:
    """Commands that need weights, with torch imported for all of them at once."""
    warm = WarmCommands()
    warm.import_once(*IMPORTED)
    yield warm.command("quantize", folder, ENVIRONMENT, 600)
    warm.close()


@pytest.fixture
def here(
    made: Done, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """A command in this process: what it printed, or the error it raised."""
    assert made.returncode == 0
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")

    def quantize(*arguments: str) -> str:
        capsys.readouterr()
        assert app(args=["quantize", *arguments], standalone_mode=False) == 0
        return capsys.readouterr().out

    return quantize


@pytest.fixture(scope="module")
def made(run: Run) -> Done:
    """A quantization that nothing interrupts, in `folder / "out"`."""
    done = run("model", "--out", "out", "--calibrate", "text.txt", "--report", "report.html")
    assert done.returncode == 0, done.stderr
    return done


def words(text: str) -> str:
    return " ".join(text.split())


def fits(done: Done) -> bool:
    """No line is longer than the terminal, but those to be copied."""
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    return all(len(line.rstrip()) <= 80 or line.startswith(COPIED) for line in lines)


def test_a_quantization_shows_layers_size_quality_and_what_to_do_next(made: Done, folder: Path) -> None:
    plan, said = words(made.stderr), words(made.stdout)
    assert "plan 14 linear layers with 20.5k weights; 7 other tensors stay as they are" in plan
    assert "written model.safetensors" in plan
    assert said.startswith("Quantized to rf8-gg: 20.5k weights in 14 layers, ")
    for part in (
        "model.layers.1.self_attn.v_proj 32x32",
        "86.9 kB before",
        "a CPU decodes them when it loads and saves no memory",
        "quality Perplexity ",
        "report report.html",
        "load: model, tokenizer = agentopt.weights.load.model('out')",
        "serve: vllm serve out",
    ):
        assert part in said
    assert fits(made)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "agentopt quantize model --out out --calibrate text.txt --report report.html" in page
    assert page.count('<path class="fit"') == 2 * (7 + LAYERS)
    assert "<h2>Books</h2>" in page


def test_what_was_written_loads_and_answers_like_the_original(made: Done, folder: Path) -> None:
    import torch

    from agentopt.weights import load

    assert made.returncode == 0
    before, tokenizer = load.model(folder / "model")
    after, _ = load.model(folder / "out")
    tokens = tokenizer("red blue green one two", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        distance = (before(tokens).logits - after(tokens).logits).abs().max()
    assert 0 < float(distance) < 0.01


def test_a_folder_that_is_done_is_shown_and_reported_again(made: Done, light: Run, folder: Path) -> None:
    again = light("out")
    assert (again.returncode, again.stderr) == (0, "")
    cut = made.stdout.index("report  ")
    assert again.stdout[:cut] == made.stdout[:cut]
    value = json.loads(light("out", "--json", "--report", "again.html").stdout)
    assert value["source"].endswith("model")
    assert len(value["tensors"]) == LAYERS
    assert value["gpu_bytes"]["after"] < value["gpu_bytes"]["before"] == value["bytes_16"]
    assert value["quality"]["tokens"] > 100
    assert (folder / "again.html").stat().st_size > 10_000
    refused(light("model", "--out", "out"), folder, "agentopt quantize out shows what was made")


def test_json_is_one_object_and_every_format_can_be_asked_for(here: Here, folder: Path) -> None:
    value = json.loads(
        here("model", "--format", "e3m4", "--skip", "mlp,layers.0", "--head", "--out", "small", "--json")
    )
    assert value["format"] == "e3m4"
    names = sorted(one["name"] for one in value["tensors"])
    assert names == ["lm_head", *(f"model.layers.1.self_attn.{part}_proj" for part in "koqv")]
    config = json.loads((folder / "small" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["format"] == "e3m4"


def test_many_layers_are_summed_up_by_kind(here: Here) -> None:
    said = here("out", "--tensors")
    assert said.count("_proj") == LAYERS
    few, _quantize_print.FEW = _quantize_print.FEW, LAYERS - 1
    try:
        said = here("out")
    finally:
        _quantize_print.FEW = few
    assert "lowest SQNR (--tensors shows all layers)" in said
    assert [line.split()[:2] for line in said.splitlines() if line.startswith("q_proj")] == [["q_proj", "2"]]
    assert said.count(" 32x64 ") + said.count(" 64x32 ") + said.count(" 32x32 ") == _quantize_print.WORST
    assert max(len(line.rstrip()) for line in said.splitlines() if not line.startswith(COPIED)) <= 80


def test_interrupted_then_the_same_command_gives_the_same_folder(made: Done, run: Run, folder: Path) -> None:
    assert made.returncode == 0
    asked = ("model", "--out", "again", "--calibrate", "text.txt", "--shard-size", "4kB")
    partial = folder / "again.partial"

    def two_files() -> bool:
        return partial.is_dir() and len(list(partial.glob("model/*.safetensors"))) >= 2

    stopped = run(*asked, send=(signal.SIGINT, two_files))
    assert stopped.returncode == 130, stopped.stderr
    said = "every complete file is kept; go on with the same command: agentopt quantize model --out again"
    assert said in words(stopped.stderr)
    assert "Traceback" not in stopped.stderr
    done = run(*asked)
    assert done.returncode == 0, done.stderr
    assert "resumed   the complete files of a run before this one are kept" in done.stderr
    assert not partial.exists()
    results = [json.loads((folder / name / "quantize.json").read_text(encoding="utf-8")) for name in ("again", "out")]
    found = [[(one["name"], one["sqnr_db"], one["entropy_bits"]) for one in result["tensors"]] for result in results]
    assert found[0] == found[1]
    assert results[0]["quality"] == results[1]["quality"]


# --- archives --------------------------------------------------------------------------------------------------------


def tensors_of(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def packed(run: Run) -> Done:
    done = run("model", "--archive", "--lossless", "--out", "model.ggz")
    assert done.returncode == 0, done.stderr
    return done


def test_an_archive_is_packed_checked_and_unpacked_bit_for_bit(packed: Done, here: Here, folder: Path) -> None:
    said = words(packed.stdout)
    assert said.startswith("Packed: 21 tensors into model.ggz, ")
    assert "bit for bit" in said
    assert "above the entropy of what is coded" in said
    assert fits(packed)
    assert "Sound: 21 tensors and " in words(here("model.ggz", "--verify"))
    assert "Unpacked: 21 tensors" in words(here("model.ggz", "--archive", "--out", "unpacked"))
    before, after = tensors_of(folder / "model"), tensors_of(folder / "unpacked")
    assert set(before) == set(after)
    assert all(bool((before[name] == after[name]).all()) for name in before)


def test_an_archive_goes_straight_to_a_serving_format(packed: Done, here: Here, folder: Path) -> None:
    assert packed.returncode == 0
    for model, out in (("model.ggz", "served"), ("model", "direct")):
        here(model, "--format", "rf8", "--scale", "tensor_pow2", "--out", out, "--quiet")
    before, after = tensors_of(folder / "direct"), tensors_of(folder / "served")
    assert set(before) == set(after)
    assert all(bool((before[name] == after[name]).all()) for name in before)


def test_a_step_says_how_fine_an_archive_is(here: Here) -> None:
    value = json.loads(here("model", "--archive", "--step", "2^-10", "--out", "fine.ggz", "--json"))
    assert value["bytes_after"] < value["bytes_before"] / 2
    assert {one["step"] for one in value["tensors"]} == {None, 2.0**-10}


# --- bad input -------------------------------------------------------------------------------------------------------


def refused(done: Done, folder: Path, said: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    assert said in words(done.stderr)
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("agentopt: ")]) == 1, done.stderr
    assert done.stdout == ""
    assert not (folder / "x").exists()


def test_a_mistake_is_one_sentence_and_leaves_nothing(light: Run, folder: Path) -> None:
    refused(light("model", "--out", "x", "--format", "rf8gg"), folder, "did you mean 'rf8-gg'?")
    own = folder / "own.toml"
    own.write_text('[quantize]\nmodel = "model"\nout = "x"\nformats = "rf8"\n', encoding="utf-8")
    refused(light("--config", "own.toml"), folder, "[quantize]: unknown option 'formats'; did you mean 'format'?")


def test_a_damaged_archive_is_one_sentence(packed: Done, run: Run, folder: Path) -> None:
    assert packed.returncode == 0
    damaged = bytearray((folder / "model.ggz").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (folder / "damaged.ggz").write_bytes(damaged)
    refused(run("damaged.ggz", "--archive", "--out", "x", "--quiet"), folder, "damaged.ggz")


@pytest.fixture(scope="module")
def wrong(packed: Done, folder: Path) -> None:
    """Files and folders that are not what they should be."""
    assert packed.returncode == 0
    (folder / "empty.txt").write_text("\n \n", encoding="utf-8")
    (folder / "nothing").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine", encoding="utf-8")
    shutil.copytree(folder / "model", folder / "torn")
    with (folder / "torn" / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    (folder / "torn.ggz").write_bytes((folder / "model.ggz").read_bytes()[:9_000])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("./gone", "--out", "x"), "./gone"),
        (("nothing", "--out", "x"), "nothing"),
        (("text.txt", "--out", "x"), "text.txt: found a file, expected a model folder, a .gguf file or a .ggz archive"),
        (("out", "--out", "x"), "out"),
        (("model", "--out", "full"), "full: found a folder that is not empty"),
        (("model", "--out", "x", "--calibrate", "empty.txt"), "empty.txt"),
        (("torn", "--out", "x"), "model.safetensors"),
        (("torn.ggz", "--verify"), "torn.ggz"),
        (("gone.ggz", "--out", "x"), "gone.ggz"),
    ],
)
def test_what_only_the_files_tell_is_one_sentence_too(
    wrong: None, here: Here, folder: Path, arguments: tuple[str, ...], said: str
) -> None:
    del wrong
    with pytest.raises(UserError) as error:
        here(*arguments, "--quiet")
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not (folder / "x").exists() and not (folder / "x.partial").exists()
    assert sorted(path.name for path in (folder / "full").iterdir()) == ["notes.txt"]


def test_a_full_disk_keeps_what_is_done(here: Here, folder: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
    try:
        with pytest.raises(RunError, match="make room and run the same command again"):
            here("model", "--format", "rf8", "--out", "late", "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (folder / "late").exists()
    here("model", "--format", "rf8", "--out", "late", "--quiet")
    assert (folder / "late" / "quantize.json").is_file()


@pytest.mark.slow
@pytest.mark.embedded
def test_a_real_language_model_hardly_changes(run: Run, folder: Path) -> None:
    prose = " ".join(
        ["The ship left the harbour before noon, and by evening the coast was a thin line behind it."]
        + [
            f"On day {day} the wind turned, the crew ate bread and fish, and nobody spoke of home."
            for day in range(2, 14)
        ]
    )
    (folder / "prose.txt").write_text(prose, encoding="utf-8")
    text = ("--calibrate", "prose.txt", "--calibrate-tokens", "256")
    done = run("embedded/smollm2-135m-instruct", "--out", "real", *text, "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert len(value["tensors"]) == 210
    assert min(one["sqnr_db"] for one in value["tensors"]) > 35
    assert value["quality"]["kl"] < 0.01
    assert value["quality"]["same_top"] > 0.9
    assert value["gpu_bytes"]["after"] < 0.65 * value["gpu_bytes"]["before"]
