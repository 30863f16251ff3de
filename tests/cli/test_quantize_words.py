"""What `agentopt quantize` may be asked, and which of its jobs that is; names in the live view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt.cli._quantize_live import remaining, tail
from agentopt.cli._quantize_settings import QuantizeSettings, bytes_of, settings_of
from agentopt.errors import UserError

GIVEN = {"model": "m", "out": "x"}
PACKED = {"model": "m", "out": "x.ggz", "archive": True}


def test_defaults_are_those_of_the_library() -> None:
    settings = QuantizeSettings.of(GIVEN, "here")
    assert (settings.job, settings.format, settings.report) == ("quantize", "rf8-gg", None)
    assert settings.options.shard_bytes == 1 << 30


@pytest.mark.parametrize(
    ("values", "job"),
    [
        (GIVEN, "quantize"),
        ({"model": "m.ggz", "out": "x"}, "quantize"),
        (PACKED, "pack"),
        ({"model": "m.ggz", "out": "x", "archive": True}, "unpack"),
        ({"model": "m.ggz", "verify": True}, "verify"),
    ],
)
def test_model_and_options_say_what_is_done(values: dict[str, Any], job: str) -> None:
    assert QuantizeSettings.of(values, "here").job == job


def test_a_folder_that_is_done_is_shown(tmp_path: Path) -> None:
    (tmp_path / "quantize.json").write_text("{}", encoding="utf-8")
    assert QuantizeSettings.of({"model": str(tmp_path), "report": "r.html"}, "here").job == "show"
    with pytest.raises(UserError, match="does nothing without --out, when a quantized folder is shown"):
        QuantizeSettings.of({"model": str(tmp_path), "seed": 1}, "here")


def test_options_reach_the_library_as_it_takes_them(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("text", encoding="utf-8")
    values = {"skip": ["mlp,layers.0", "head"], "head": True, "refine": False, "shard_size": "2 GiB", "seed": 3}
    options = QuantizeSettings.of({**GIVEN, **values, "calibrate": str(tmp_path / "t.txt")}, "here").options
    assert options.skip == ("mlp", "layers.0", "head")
    assert (options.head, options.refine, options.shard_bytes, options.seed) == (True, False, 2 << 30, 3)
    assert options.calibrate == str(tmp_path / "t.txt")
    stock = QuantizeSettings.of({**GIVEN, "format": "int8", "dynamic_activations": True}, "here").options
    assert stock.dynamic_activations
    assert QuantizeSettings.of({**PACKED, "step": "2**-12"}, "here").step == 2.0**-12
    assert QuantizeSettings.of({**PACKED, "sqnr": 40}, "here").sqnr == 40.0
    assert QuantizeSettings.of({**PACKED, "lossless": True}, "here").lossless


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"out": "x"}, "MODEL is missing"),
        ({"model": "m"}, "--out is missing: give the new folder"),
        ({"model": "m", "archive": True}, "--out is missing: give the archive"),
        ({**GIVEN, "archive": True}, "--out: found 'x', expected the name of an archive that ends in .ggz"),
        ({**GIVEN, "out": "x.ggz"}, "the name of an archive, expected that of a folder; add --archive to pack MODEL"),
        ({"model": "m.ggz", "out": "x.ggz", "archive": True}, "MODEL is unpacked into a folder"),
        ({"model": "m.ggz", "out": "x", "archive": True, "dtype": "int8"}, "--dtype: found 'int8', expected one of"),
        ({**GIVEN, "format": "rf8gg"}, "--format: found 'rf8gg', expected rf8, rf8-strict, rf8-gg, e3m4, fp8, int8"),
        ({**GIVEN, "format": "zebra"}, "docs/quantize.md says which one is for what"),
        ({**GIVEN, "calibrate": "gone.txt"}, "--calibrate 'gone.txt': no such file"),
        ({**GIVEN, "calibrate": "."}, "--calibrate '.': a folder"),
        ({**GIVEN, "calibrate_tokens": 90}, "--calibrate-tokens does nothing without --calibrate"),
        ({**GIVEN, "report": "."}, "--report: found the folder '.'"),
        ({**GIVEN, "scale": "row"}, "--scale: found 'row', expected channel or tensor_pow2"),
        ({**GIVEN, "scale": "tensor_pow2"}, "--scale tensor_pow2 is for rf8 and rf8-strict"),
        ({**GIVEN, "format": "rf8", "refine": False}, "--no-refine does nothing with --format rf8"),
        ({**GIVEN, "dynamic_activations": True}, "--dynamic-activations is for fp8 and int8; with --format rf8-gg"),
        ({**GIVEN, "shard_size": "big"}, "--shard-size: found 'big', expected a size such as 1GB"),
        ({**GIVEN, "shard_size": "0"}, "--shard-size: found 0, expected 1 or more"),
        ({**GIVEN, "step": "0.1"}, "--step does nothing without --archive; add --archive"),
        ({**GIVEN, "dtype": "bfloat16"}, "--dtype does nothing without --archive; leave it out"),
        ({**GIVEN, "verify": True}, "--verify: found 'm', expected a .ggz archive"),
        ({**PACKED, "format": "rf8"}, "--format does nothing when an archive is packed"),
        ({**PACKED, "step": "fine"}, "--step: found 'fine', expected a number above 0 or a power such as 2^-10"),
        ({**PACKED, "step": "-1"}, "--step: found -1, expected the distance of two levels"),
        ({**PACKED, "step": "nan"}, "--step: found nan"),
        ({**PACKED, "sqnr": 0}, "--sqnr: found 0, expected decibels"),
        ({**PACKED, "sqnr": 40, "step": "2^-9"}, "--step and --sqnr: each says how fine the archive is"),
        ({**GIVEN, "seed": "one"}, 'here: seed is "one", expected a whole number'),
        ({**GIVEN, "head": 1}, "here: head is 1, expected true or false"),
        ({**GIVEN, "skip": "mlp"}, 'here: skip is "mlp", expected a list of names'),
        ({**GIVEN, "formats": "rf8"}, "here: unknown option 'formats'; did you mean 'format'?"),
        ({**GIVEN, "zebra": 1}, "here: unknown option 'zebra'; see agentopt quantize --help"),
    ],
)
def test_what_does_not_fit_is_one_sentence(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        QuantizeSettings.of(values, "here")
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_what_is_there_already_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "a.ggz").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"found the archive '.*a\.ggz', expected a new name"):
        QuantizeSettings.of({**PACKED, "out": str(tmp_path / "a.ggz")}, "here")
    done = tmp_path / "a b"
    done.mkdir()
    (done / "quantize.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError) as error:
        QuantizeSettings.of({**GIVEN, "out": str(done)}, "here")
    assert f"agentopt quantize '{done}' shows what was made" in str(error.value)  # as it can be pasted


def test_the_command_line_wins_over_the_file_and_paths_are_relative_to_it(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[quantize]\nmodel = "m"\nout = "x"\nformat = "fp8"\nseed = 3\n', encoding="utf-8")
    settings = settings_of({"format": "int8", "seed": None}, str(own))
    assert (settings.format, settings.options.seed, settings.out) == ("int8", 3, str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("text", "number"),
    [("1GB", 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2 << 30), ("1.5k", 1500), ("77", 77), (77, 77), ("1TB", 10**12)],
)
def test_sizes(text: str | int, number: int) -> None:
    assert bytes_of(text) == number


@given(st.text("ab.", min_size=1, max_size=40), st.integers(4, 30))
def test_a_shortened_name_fits_and_ends_as_it_did(name: str, width: int) -> None:
    found = tail(name, width)
    assert len(found) <= width
    assert name.endswith(found.removeprefix("…"))


def test_names_are_cut_at_dots() -> None:
    assert tail("model.layers.12.self_attn.k_proj", 26) == "…12.self_attn.k_proj"
    assert tail("model.layers.12.self_attn.k_proj", 40) == "model.layers.12.self_attn.k_proj"
    assert tail("averyveryverylongname", 10) == "…ylongname"


def test_the_last_second_is_not_counted_down() -> None:
    assert remaining(75) == "75.0 s left"
    assert remaining(0.4) == remaining(-1) == ""
