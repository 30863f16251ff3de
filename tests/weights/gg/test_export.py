"""fp8 and int8 in the stock layout. That stock loaders read it the same way is tested in tests/serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights import gg
from agentopt.weights.gg import QuantizeOptions
from tests.weights.gg import folders

torch: Any = pytest.importorskip("torch")

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16 with a row of zeros and one of tiny weights."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("export") / "model"
    folders.write(folder, dtype="bfloat16")
    tensors = folders.stored(folder)
    tensors[f"{LAYER}.weight"][3] = 0
    tensors[f"{LAYER}.weight"][4] *= 1e-30
    save_file(tensors, folder / "model.safetensors")
    return folder


def nearest(weight: Any, scale: Any, grid: Any) -> Any:
    """The nearest value of a grid, by looking at all of them."""
    unit = weight.double() / scale.double()
    place = (unit[..., None] - grid).abs().argmin(-1)
    return (grid[place] * scale.double()).float()


def test_fp8_is_the_nearest_e4m3_per_row(source: Path, tmp_path: Path) -> None:
    result = gg.quantize(source, tmp_path / "out", "fp8")
    stored, weight = folders.stored(tmp_path / "out"), folders.stored(source)[f"{LAYER}.weight"]
    codes, scale = stored[f"{LAYER}.weight"], stored[f"{LAYER}.weight_scale"]
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == weight.shape
    assert scale.shape == (64, 1) and scale.dtype == torch.bfloat16
    decoded = codes.float() * scale.float()
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    best = nearest(weight, scale, every[every.isfinite()])
    error, least = ((one - weight.float()).abs() for one in (decoded, best))
    assert torch.allclose(error, least, rtol=1e-6, atol=0)
    assert not decoded[3].any() and decoded[4].any()
    report = next(one for one in result.tensors if one.name == LAYER)
    assert report.sqnr_db == pytest.approx(gg.sqnr(weight.float(), decoded)) and report.sqnr_db > 30
    assert f"{LAYER}.qweight" not in stored and "transformers_weights" not in config(tmp_path / "out")


def config(folder: Path) -> dict[str, Any]:
    """config.json."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_int8_is_packed_four_to_a_word(source: Path, tmp_path: Path) -> None:
    gg.quantize(source, tmp_path / "out", "int8", options=QuantizeOptions(head=True))
    stored, weight = folders.stored(tmp_path / "out"), folders.stored(source)[f"{LAYER}.weight"]
    packed, scale = stored[f"{LAYER}.weight_packed"], stored[f"{LAYER}.weight_scale"]
    assert packed.dtype == torch.int32 and packed.shape == (64, 8)
    assert stored[f"{LAYER}.weight_shape"].tolist() == [64, 32]
    codes = torch.stack([((packed >> (8 * at)) & 255) - 128 for at in range(4)], -1).view(64, 32)
    expected = (weight.float() / scale.float()).round().clamp(-127, 127)
    assert torch.equal(codes.float(), expected)
    assert codes[3].abs().max() == 0 and codes.abs().amax(1)[0] >= 126
    assert "lm_head.weight_packed" in stored


@pytest.mark.parametrize("format", gg.EXPORTS)
def test_the_config_says_what_stock_loaders_look_for(source: Path, tmp_path: Path, format: Any) -> None:
    gg.quantize(source, tmp_path / "out", format, options=QuantizeOptions(skip=("layers.1",)))
    found = config(tmp_path / "out")["quantization_config"]
    group = found["config_groups"]["group_0"]
    assert found["quant_method"] == "compressed-tensors" and found["quantization_status"] == "compressed"
    assert found["format"] == {"fp8": "float-quantized", "int8": "pack-quantized"}[format]
    assert group["targets"] == ["Linear"] and group["input_activations"] is None
    assert group["weights"]["strategy"] == "channel" and group["weights"]["num_bits"] == 8
    # What is left out is named in full: a stock loader compares whole names.
    assert set(found["ignore"]) == {"lm_head", *(f"model.layers.1.{part}" for part in PARTS)}


PARTS = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{one}_proj" for one in "kqvo"))


def test_dynamic_activations_are_asked_for_in_the_config(source: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(dynamic_activations=True)
    wanted: list[tuple[Any, str, Any]] = [("fp8", "float", torch.float8_e4m3fn), ("int8", "int", torch.int8)]
    for format, kind, number in wanted:
        gg.quantize(source, tmp_path / format, format, options=options)
        found = config(tmp_path / format)["quantization_config"]
        group = found["config_groups"]["group_0"]
        assert found["format"] == f"{kind}-quantized"
        assert (group["input_activations"]["type"], group["input_activations"]["dynamic"]) == (kind, True)
        assert folders.stored(tmp_path / format)[f"{LAYER}.weight"].dtype == number
    with pytest.raises(UserError, match="dynamic_activations: is for fp8 and int8"):
        gg.quantize(source, tmp_path / "own", "rf8", options=options)


def test_what_the_stock_layout_has_no_place_for_is_refused(tmp_path: Path) -> None:
    folders.write(tmp_path / "gpt2", kind="gpt2")
    with pytest.raises(UserError, match=r"found Conv1D layers .*give one of the formats rf8-gg"):
        gg.quantize(tmp_path / "gpt2", tmp_path / "out", "fp8")
    folders.write(tmp_path / "tied", tied=True)
    with pytest.raises(UserError, match="the head is the embedding"):
        gg.quantize(tmp_path / "tied", tmp_path / "out", "int8", options=QuantizeOptions(head=True))
    assert not (tmp_path / "out.partial").exists()
