"""SQNR and code entropy of every byte format: synthetic weights beside expected figures, and real ones.

    python benchmarks/gg_numerics.py [--quick] [--data ../shared/data]

(a) Synthetic: 512 rows of 2,048 generalized-Gaussian weights per shape nu, one draw. Each cell stands beside the figure
that was expected (measured before, on another draw: two draws differ by up to 0.1 dB). (b) Mismatch: Lloyd-Max books of
one shape on data of another. (c) Real weights: rows of all linear layers of the embedded 135M model (unpacked from 4
and 8 bits), and models that are trained here. Speed: weights per CPU second on one thread.

Goals: rf8-gg with its automatic books at 39 dB or more for nu = 0.5, 41 dB for nu = 1, and 7 dB above E4M3 everywhere.
Losing cases are in the same table: RF8 is 3 dB below E4M3 for every nu; INT8 with a scale per 64 weights, which takes
3 % more bits, is level with rf8-gg at nu = 1.3 and ahead of it at nu = 2 where rows are long. In (b), books that are
too light-tailed clip; how much depends on where the outermost levels ended: ours reach further than the expected ones.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _gg_peers as peers
import torch
from _gg_models import embedded, linears, trained
from _report import ROOT, Row, write_results

from agentopt.weights import gg

NUS = (0.5, 0.8, 1.0, 1.3, 2.0)
EXPECTED: Mapping[str, str] = {
    "RF8 reference, exponent unbounded": "27.98/6.82 28.01/6.55 28.01/6.43 28.02/6.31 28.06/6.12",
    "RF8 7 significands, tensor pow2": "28.41/6.87 28.44/6.61 28.46/6.50 28.46/6.37 28.50/6.19",
    "RF8 7 significands, channel": "28.73/6.90 28.53/6.63 28.53/6.51 28.52/6.38 28.49/6.20",
    "rf8, channel": "28.73/7.01 28.58/6.74 28.57/6.62 28.55/6.49 28.54/6.30",
    "rf8, tensor pow2": "28.49/6.98 28.52/6.72 28.54/6.60 28.54/6.48 28.57/6.29",
    "RF8 read literally": "24.23/6.36 24.27/6.09 24.25/5.97 24.24/5.84 24.30/5.66",
    "E5M2, tensor": "25.55/6.18 25.55/5.91 25.56/5.79 25.56/5.67 25.57/5.49",
    "E4M3, tensor": "31.54/7.16 31.53/6.90 31.53/6.78 31.53/6.66 31.54/6.47",
    "E4M3, channel": "31.79/7.19 31.64/6.92 31.62/6.80 31.57/6.67 31.54/6.48",
    "e3m4, channel": "37.80/7.61 37.68/7.71 37.64/7.66 37.63/7.58 37.56/7.43",
    "INT8, channel": "32.17/5.10 35.84/6.07 37.46/6.42 39.25/6.77 41.68/7.19",
    "INT8, groups of 128": "37.59/6.07 39.91/6.76 40.95/7.01 42.14/7.25 43.80/7.53",
    "Lloyd-Max 256, channel": "39.21/6.76 40.96/7.22 41.72/7.38 42.58/7.52 43.91/7.69",
    "GG compander 256, channel": "39.22/6.76 40.92/7.22 41.60/7.38 42.50/7.52 43.85/7.69",
    "equal probability 256, channel": "15.36/8.00 20.90/8.00 23.40/8.00 26.52/8.00 31.25/8.00",
}
"""SQNR in dB / entropy of the codes in bits per weight, for the shapes of NUS."""
MISMATCH = {
    0.5: (39.1, 30.8, 24.0, 18.7, 13.6),
    0.8: (39.6, 40.9, 40.2, 32.5, 22.4),
    1.0: (39.6, 41.3, 41.7, 39.2, 27.8),
    1.3: (39.5, 41.5, 42.1, 42.6, 36.5),
    2.0: (39.5, 41.5, 42.3, 43.1, 43.9),
}
"""Rows: shape of the data; columns: shape of the book."""
OURS = "rf8-gg, channel, automatic book"
GOALS = {0.5: ">= 39", 1.0: ">= 41"}
REAL = ("rf8, channel", "E4M3, channel", "e3m4, channel", "INT8, channel", "INT8, groups of 64", OURS)


def formats(nu: float | None) -> dict[str, peers.Peer]:
    """Every format; those that are made for one shape only where it is known."""
    found: dict[str, peers.Peer] = {
        "RF8 reference, exponent unbounded": peers.rf8_reference,
        "RF8 7 significands, tensor pow2": lambda weight: peers.rf8_seven(weight, channel=False),
        "RF8 7 significands, channel": lambda weight: peers.rf8_seven(weight, channel=True),
        "rf8, channel": peers.rf8,
        "rf8, tensor pow2": lambda weight: peers.rf8(weight, channel=False),
        "rf8-strict, tensor pow2": lambda weight: peers.rf8(weight, "rf8-strict", channel=False),
        "RF8 read literally": peers.rf8_literal,
        "E5M2, tensor": peers.e5m2_tensor,
        "E4M3, tensor": peers.e4m3_tensor,
        "E4M3, channel": peers.e4m3,
        "e3m4, channel": peers.e3m4,
        "INT8, channel": peers.int8,
        "INT8, groups of 64": lambda weight: peers.int8_groups(weight, 64),
        "INT8, groups of 128": lambda weight: peers.int8_groups(weight, 128),
    }
    if nu is not None:
        found["Lloyd-Max 256, channel"] = lambda weight: peers.with_levels(weight, peers.lloyd_max(nu))
        found["GG compander 256, channel"] = lambda weight: peers.with_levels(weight, gg.compander(nu, 256))
        found["equal probability 256, channel"] = lambda weight: peers.with_levels(weight, peers.equal_probability(nu))
    return found


def cell(weight: torch.Tensor, peer: peers.Peer) -> dict[str, float]:
    unit, scale = peer(weight)
    return {"sqnr": gg.sqnr(weight, unit * scale), "entropy": peers.entropy(unit)}


def own(weight: torch.Tensor) -> dict[str, float]:
    encoded = gg.encode(weight)
    return {"sqnr": gg.sqnr(weight, gg.decode(encoded)), "entropy": gg.code_entropy(encoded.codes)}


def synthetic(nu: float, shape: tuple[int, int]) -> torch.Tensor:
    from agentopt.weights.gg._density import sample

    return sample(shape, nu, 0.02, generator=round(1000 * nu))


def table(shape: tuple[int, int], quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """Part (a)."""
    rows: list[Row] = []
    found: dict[str, Any] = {}
    for place, nu in enumerate(NUS):
        weight = synthetic(nu, shape)
        cells = {name: cell(weight, peer) for name, peer in formats(nu).items()} | {OURS: own(weight)}
        for name, values in cells.items():
            found.setdefault(name, {})[nu] = values
        for name, values in cells.items():
            expected = EXPECTED.get(name)
            pair = (None, None) if expected is None else tuple(map(float, expected.split()[place].split("/")))
            goal = GOALS.get(nu) if name == OURS and not quick else None
            rows += [
                _beside(f"nu {nu:g}: {name}: SQNR", values["sqnr"], "dB", pair[0], goal),
                _beside(f"nu {nu:g}: {name}: entropy", values["entropy"], "bits", pair[1], None),
            ]
        gain = cells[OURS]["sqnr"] - max(cells["E4M3, channel"]["sqnr"], cells["E4M3, tensor"]["sqnr"])
        rows.append(Row(f"nu {nu:g}: rf8-gg above E4M3", gain, "dB", None, None if quick else ">= 7"))
        loss = cells["rf8, channel"]["sqnr"] - cells["E4M3, channel"]["sqnr"]
        rows.append(Row(f"nu {nu:g}: rf8 above E4M3 (it loses)", loss, "dB"))
        for group in (64, 128):
            gain = cells[OURS]["sqnr"] - cells[f"INT8, groups of {group}"]["sqnr"]
            bits = 8 + 16 / group
            note = f"INT8 takes {bits:g} bits a weight with 16-bit scales"
            rows.append(Row(f"nu {nu:g}: rf8-gg above INT8 in groups of {group}", gain, "dB", note=note))
    return rows, found


def _beside(name: str, value: float, unit: str, expected: float | None, goal: str | None) -> Row:
    if expected is None:
        return Row(name, value, unit, None, goal)
    return Row(name, value, unit, None, goal, "expected", expected, f"{value - expected:+.3f}")


def mismatch(shape: tuple[int, int]) -> list[Row]:
    """Part (b)."""
    rows: list[Row] = []
    for nu in NUS:
        weight = synthetic(nu, shape)
        for place, book in enumerate(NUS):
            value = cell(weight, lambda weight, book=book: peers.with_levels(weight, peers.lloyd_max(book)))["sqnr"]
            rows.append(_beside(f"data nu {nu:g}, book nu {book:g}: SQNR", value, "dB", MISMATCH[nu][place], None))
    return rows


def real(name: str, weights: Mapping[str, torch.Tensor], quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """Part (c): total SQNR over all matrices of a model (errors and signals are added up), and the worst matrix."""
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        key: (lambda weight, peer=peer: torch.mul(*peer(weight))) for key, peer in formats(None).items() if key in REAL
    }
    ways[OURS] = lambda weight: gg.decode(gg.encode(weight))
    signal = sum(float(one.double().square().sum()) for one in weights.values())
    fits = sorted(float(gg.fit(one).nu) for one in weights.values())
    rows = [Row(f"{name}: fitted nu of its matrices, median", fits[len(fits) // 2], "", (fits[0], fits[-1]))]
    found: dict[str, Any] = {"nu": fits}
    for key, way in ways.items():
        decoded = {layer: way(one) for layer, one in weights.items()}
        noise = sum(float((one - decoded[layer]).double().square().sum()) for layer, one in weights.items())
        each = [gg.sqnr(one, decoded[layer]) for layer, one in weights.items()]
        found[key] = {"total": 10 * math.log10(signal / noise), "each": dict(zip(weights, each, strict=True))}
        rows.append(Row(f"{name}: {key}: SQNR", found[key]["total"], "dB", (min(each), max(each))))
    gain = found[OURS]["total"] - found["E4M3, channel"]["total"]
    rows.append(Row(f"{name}: rf8-gg above E4M3", gain, "dB", None, None if quick else ">= 7"))
    for rival in ("INT8, channel", "INT8, groups of 64"):
        rows.append(Row(f"{name}: rf8-gg above {rival}", found[OURS]["total"] - found[rival]["total"], "dB"))
    return rows, found


def speed(quick: bool) -> list[Row]:
    """Weights per CPU second; the best of some repeats, as others use the machine too."""
    rows: list[Row] = []
    for width in (576, 4096):
        weight = synthetic(1.3, ((1 << (17 if quick else 21)) // width, width))
        for format in gg.FORMATS:
            encoded, encoding = _timed(lambda weight=weight, format=format: gg.encode(weight, format), 3)
            _, decoding = _timed(lambda encoded=encoded: gg.decode(encoded), 3)
            floor = ">= 2" if format == "rf8-gg" else ">= 20" if format != "rf8-strict" else None
            name = f"{format}, rows of {width}"
            rows.append(
                Row(f"{name}: encode", weight.numel() / encoding / 1e6, "M weights/s", None, None if quick else floor)
            )
            rows.append(Row(f"{name}: decode", weight.numel() / decoding / 1e6, "M weights/s"))
    return rows


def _timed(call: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    best, found = math.inf, None
    for _ in range(repeats):
        begun = time.process_time()
        found = call()
        best = min(best, time.process_time() - begun)
    return found, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few weights: shows that everything runs")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = (32, 1024) if options.quick else (512, 2048)
    rows, numbers = table(shape, options.quick)
    print("synthetic tables done", flush=True)
    rows += mismatch(shape)
    extra: dict[str, Any] = {"synthetic": numbers}
    for width, seed in ((128, 0), (256, 0)):
        model, _, _ = trained(width, seed, 20 if options.quick else 300, options.data)
        weights = {name: module.weight.data for name, module in linears(model).items()}
        more, extra[f"width {width}"] = real(f"trained here, width {width}", weights, options.quick)
        rows += more
    print("trained models done", flush=True)
    if not options.quick:
        model, _ = embedded()
        weights = {
            name: gg.sample_rows(module.weight, 64, seed) for seed, (name, module) in enumerate(linears(model).items())
        }
        more, extra["embedded"] = real("embedded, 64 rows of each matrix", weights, options.quick)
        rows += more
    rows += speed(options.quick)
    write_results("gg_numerics", rows, quick=options.quick, extra=extra)


if __name__ == "__main__":
    main()
