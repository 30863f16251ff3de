"""The page of a quantization: complete, self-contained, escaped; and the figures that terminal and page share."""

from __future__ import annotations

import html.parser
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.errors import RunError
from agentopt.observe import write_quantize_report
from agentopt.observe._layers import places
from agentopt.observe._quantize_report import BINS, SPAN, quantize_page, shape_of
from agentopt.observe._quantize_summary import gpu_bytes, kinds_of
from agentopt.observe._weight_charts import density
from agentopt.weights.gg import Quality, QuantizeResult, TensorReport
from agentopt.weights.gg._checkpoint import Checkpoint
from agentopt.weights.gg._types import Histogram

MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def tensor(name: str, *, nu: float = 1.5, sigma: float = 0.02, sqnr: float = 41.0, bins: int = 64) -> TensorReport:
    """A weight whose histogram is the density that was fitted to it."""
    edges = [6 * sigma * (2 * place / bins - 1) for place in range(bins + 1)]
    counts = tuple(round(1e6 * density((edges[i] + edges[i + 1]) / 2 / sigma, nu) / sigma) for i in range(bins))
    histogram = Histogram(-6 * sigma, 6 * sigma, counts)
    beta = sigma * math.sqrt(math.gamma(1 / nu) / math.gamma(3 / nu))
    return TensorReport(name, (64, 32), nu, beta, sigma, sqnr, 7.25, 9.0, 0.01, histogram)


def result(tmp_path: Path, layers: int = 3, quality: Quality | None = None) -> QuantizeResult:
    names = [f"model.layers.{layer}.{module}" for layer in range(layers) for module in MODULES]
    tensors = tuple(tensor(name, nu=1 + 0.1 * place, sqnr=40 + 0.5 * place) for place, name in enumerate(names))
    weights = 64 * 32 * len(tensors)
    kept = ("model.embed_tokens.weight", "model.norm.weight")
    return QuantizeResult(
        str(tmp_path / "out"),
        "rf8-gg",
        tensors,
        kept,
        bytes_before=4 * weights + 8000,
        bytes_16=2 * weights + 4000,
        bytes_after=weights + 8000,
        seconds=1.0,
        quality=quality,
        source="model <b>",
        warnings=("experts stay <as> they are",),
    )


class Outside(html.parser.HTMLParser):
    """What a page would fetch, and whether its elements are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "xlink:href")]
        if tag not in ("meta", "input", "br", "line", "circle", "path", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("path", "circle", "line"):
            return
        assert self.open.pop() == tag


# --- names -----------------------------------------------------------------------------------------------------------


def test_kinds_are_as_short_as_they_can_be() -> None:
    names = [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
        "transformer.h.11.mlp.c_proj",
        "model.layers.2.mlp.experts.7.w1",
        "lm_head",
        "score.0",
    ]
    found = places(names)
    assert [(found[name].kind, found[name].depth) for name in names] == [
        ("c_attn", 0),
        ("attn.c_proj", 0),
        ("mlp.c_proj", 11),
        ("w1", 2),
        ("lm_head", None),
        ("score.0", None),
    ]


@given(st.lists(st.text("ab.01", min_size=1), max_size=8))
def test_any_name_has_a_place(names: list[str]) -> None:
    found = places(names)
    assert set(found) == set(names)
    assert all(place.kind for place in found.values())


# --- figures ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.floats(0.3, 3.0))
def test_the_drawn_density_is_one_of_unit_variance(nu: float) -> None:
    step, reach = 0.005, 60.0
    points = [(place + 0.5) * step for place in range(int(reach / step))]
    total = 2 * step * sum(density(x, nu) for x in points)
    variance = 2 * step * sum(x * x * density(x, nu) for x in points)
    assert total == pytest.approx(1, abs=0.02)
    assert variance == pytest.approx(1, abs=0.02)


def test_histograms_are_put_on_the_scale_of_the_fit() -> None:
    shape = shape_of([tensor("a", nu=2.0, sigma=0.5), tensor("b", nu=1.0, sigma=0.001, bins=200)])
    assert sum(shape.heights) * 2 * SPAN / BINS == pytest.approx(shape.inside, abs=1e-9)
    assert shape.inside > 0.995
    middle = [place for place in range(BINS) if abs(place - BINS // 2) > 2]
    curve = [shape.curve[round(place * (len(shape.curve) - 1) / (BINS - 1))] for place in middle]
    assert [shape.heights[place] for place in middle] == pytest.approx(curve, abs=0.05)


def test_a_weight_of_zeros_is_drawn_as_nothing() -> None:
    flat = TensorReport("w", (4, 4), 2.0, 0.0, 0.0, math.inf, 0.0, 16.0, 0.0, Histogram(0.0, 0.0, (16, 0, 0, 0)))
    assert shape_of([flat]).inside == 0


def test_the_gpu_estimate_counts_what_is_kept_at_16_bits(tmp_path: Path) -> None:
    found = result(tmp_path)
    weights = 64 * 32 * 9
    assert gpu_bytes(found) == (2 * weights + 4000, round(weights * 9 / 8) + 4000)


def test_bits_are_means_over_weights() -> None:
    wide = TensorReport("layers.0.up", (3000, 1), 1, 1, 1, 40, 8.0, 8.5, 1.0, Histogram(-1, 1, (1, 1)))
    thin = TensorReport("layers.1.up", (1000, 1), 2, 1, 1, 42, 4.0, 12.5, 1.0, Histogram(-1, 1, (1, 1)))
    (kind,) = kinds_of([wide, thin])
    assert (kind.kind, kind.entropy_bits, kind.stored_bits, kind.seconds) == ("up", 7.0, 9.5, 2.0)
    assert (kind.nu.low, kind.nu.middle, kind.nu.high, kind.sqnr.middle) == (1, 1.5, 2, 41)


# --- the page --------------------------------------------------------------------------------------------------------


def write(tmp_path: Path, found: QuantizeResult, command: str = "") -> str:
    path = write_quantize_report(found, tmp_path / "new" / "report.html", command=command)
    return path.read_text(encoding="utf-8")


def test_the_page_has_everything_and_fetches_nothing(tmp_path: Path) -> None:
    found = result(tmp_path, quality=Quality(500, 10.0, 10.1, 0.0021, 0.985))
    page = write(tmp_path, found, command="agentopt quantize 'a b'")
    outside = Outside()
    outside.feed(page)
    assert (outside.fetched, outside.open) == ([], [])
    assert "http" not in page and "@import" not in page and "url(" not in page
    assert "model &lt;b&gt;" in page and "model <b>" not in page
    assert "experts stay &lt;as&gt; they are" in page
    for part in (
        "Perplexity 10.000 before, 10.100 after (+1.00%)",
        "500 tokens are few",
        "main memory is not saved",
        "agentopt quantize &#39;a b&#39;",
        "model.embed_tokens.weight",
        "2 tensors kept as they were",
        "q_proj: all 3",
    ):
        assert part in page
    rows = re.findall(r'<tr><td class="mono" data-v="\d+">([^<]+)</td>', page)
    assert rows == [one.name for one in found.tensors]
    assert page.count('<svg class="linear"') == page.count('<svg class="log"') == 3 + 9
    assert page.count('<path class="own"') == 6
    assert "<h2>Books</h2>" not in page


def test_books_are_shown_with_the_rows_that_chose_them(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    import numpy as np

    out = tmp_path / "out"
    out.mkdir()
    narrow = tuple(place / 127 for place in range(-127, 128))
    wide = tuple(math.copysign((abs(place) / 20) ** 2, place) for place in range(-127, 128))
    config = Checkpoint("rf8-gg", books=(wide, narrow), nus=(0.5, math.inf)).to_dict()
    (out / "config.json").write_text(json.dumps({"quantization_config": config}), encoding="utf-8")
    numpy.save_file({"a.book_id": np.array([[0], [1], [1]], dtype=np.uint8)}, out / "model-1.safetensors")
    numpy.save_file({"b.book_id": np.array([[1]], dtype=np.uint8)}, out / "model-2.safetensors")
    books = quantize_page(result(tmp_path)).books
    assert [(book.shape, book.share, book.outermost) for book in books] == [
        ("ν 0.5", "25.0%", "40.3σ"),
        ("uniform (ν = ∞)", "75.0%", "1.0σ"),
    ]
    assert books[1].svg.count("V") == 255
    assert "<h2>Books</h2>" in write(tmp_path, result(tmp_path))


def test_what_lost_nothing_is_called_exact(tmp_path: Path) -> None:
    lossless = tensor("model.layers.0.up", sqnr=math.inf)
    found = QuantizeResult(str(tmp_path), "rf8", (lossless,), (), 100, 50, 30, 0.1)
    page = write(tmp_path, found)
    assert "exact" in page and "inf" not in page.replace("info", "")


def test_nothing_quantized_is_a_page_too(tmp_path: Path) -> None:
    page = write(tmp_path, QuantizeResult(str(tmp_path), "rf8", (), ("a",), 100, 50, 100, 0.1))
    assert "Nothing was quantized." in page
    assert "<svg" not in page


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match="the report cannot be written") as error:
        write_quantize_report(result(tmp_path), tmp_path / "file" / "report.html")
    assert "is complete" in str(error.value)
