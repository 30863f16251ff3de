"""What a `.ggz` archive takes: size beside its entropy and beside zstd, speed, damage found, what the grid costs.

    python benchmarks/gg_archive.py [--quick]

The embedded model (135M, made of weights of 4 to 6 bits) is written as a bf16 folder, packed at several SQNRs and
steps and without loss, and unpacked. Beside it: zstd of the same weights as bf16, and as FP8 E4M3, rf8 and rf8-gg bytes
(one scale per row; all matrices, the embedding included), each beside an archive of the same SQNR. zstd -19 sees an
eighth of the bytes, in blocks of 4 MiB spread over the file, and its ratio is taken for the whole. Seconds are the
processor's, of one thread: the machine may be shared. Quality is measured on text of this repository: mean KL
divergence per token to the bf16 model. What loses is printed too: zstd is faster by far, and no smaller archive can
beat the codes' own entropy.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _report import ROOT, Row, arguments, write_results

SQNRS = (24.0, 30.0, 36.0, 42.0, 48.0)
STEPS = (2.0**-8, 2.0**-10)
MIB = 1 << 20
BLOCK, SHARE = 4 * MIB, 8
TEXTS = ("docs/concepts.md", "docs/sandbox.md", "docs/scale.md")


def main() -> None:
    options = arguments("archive sizes, speeds and damage", seeds=1)
    with tempfile.TemporaryDirectory(prefix="gg-archive-") as place:
        rows, extra = measure(Path(place), quick=options.quick)
    write_results("gg_archive", rows, quick=options.quick, extra=extra)


def measure(place: Path, *, quick: bool) -> tuple[list[Row], dict[str, Any]]:
    import torch

    from agentopt.weights.gg import archive

    torch.set_num_threads(1)
    folder = place / "model"
    save_model(folder, quick=quick)
    before = (folder / "model.safetensors").stat().st_size
    print(f"bf16 folder: {before / 1e6:.1f} MB of weights", flush=True)
    rows: list[Row] = []
    cells: list[dict[str, Any]] = []
    quality = Quality(folder, 256 if quick else 768)
    settings: list[dict[str, Any]] = [{"sqnr": one} for one in SQNRS] + [{"step": one} for one in STEPS]
    for setting in [*settings, {"lossless": True}]:
        path = place / "model.ggz"
        result, seconds = timed(lambda path=path, setting=setting: archive.pack(folder, path, **setting))
        cell = describe(setting, result, seconds, before)
        if "lossless" not in setting:
            cell |= quality.of(path)
        cells.append(cell)
        print(cell, flush=True)
        if setting == {"sqnr": archive.DEFAULT_SQNR}:
            shutil.copy(path, place / "default.ggz")
        if setting in ({"sqnr": archive.DEFAULT_SQNR}, {"lossless": True}):
            out = place / f"out-{len(cells)}"
            _, cell["unpack_seconds"] = timed(lambda path=path, out=out: archive.unpack(path, out))
            if "lossless" in setting:
                cell["exact"] = same_folder(folder, out)
            shutil.rmtree(out)
    rows += archive_rows(cells, before, quality)
    compared = zstd_cells(place, folder, quick=quick)
    rows += zstd_rows(compared, cells)
    rows += damage_rows(place / "default.ggz", 40 if quick else 150)
    return rows, {"archives": cells, "zstd": compared, "weights_bf16_bytes": before, "peak_mib": peak()}


def save_model(folder: Path, *, quick: bool) -> None:
    """The embedded model in bf16; in a quick run a random one of two layers."""
    if not quick:
        from agentopt.weights import load

        model, tokenizer = load.model("embedded", dtype="bfloat16")
        model.save_pretrained(folder, max_shard_size="100GB")
        tokenizer.save_pretrained(folder)
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=512, tie_word_embeddings=True, **sizes)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and seconds of the processor."""
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def peak() -> float:
    """MiB of resident memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- archives --------------------------------------------------------------------------------------------------------


def describe(setting: dict[str, Any], result: Any, seconds: float, before: int) -> dict[str, Any]:
    weights = sum(one.weights for one in result.tensors)
    codings: dict[str, int] = {}
    for one in result.tensors:
        codings[one.coding] = codings.get(one.coding, 0) + 1
    return {
        **setting,
        "bytes": result.bytes_after,
        "tensor_bytes": result.tensor_bytes,
        "entropy_bytes": result.entropy_bytes,
        "over_entropy": result.tensor_bytes / result.entropy_bytes - 1,
        "bits_per_weight": 8 * result.tensor_bytes / weights,
        "of_bf16": result.tensor_bytes / before,
        "sqnr_db": result.to_dict()["sqnr_db"],
        "pack_seconds": seconds,
        "codings": codings,
    }


class Quality:
    """KL divergence and perplexity of packed weights on a little text, against the bf16 model's."""

    def __init__(self, folder: Path, tokens: int) -> None:
        import torch

        from agentopt.weights import load

        self.torch = torch
        if (folder / "tokenizer.json").is_file():
            self.model, tokenizer = load.model(folder, device="cpu")
            text = "\n".join((ROOT / name).read_text(encoding="utf-8")[:2500] for name in TEXTS)
            ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
        else:
            from transformers import AutoModelForCausalLM

            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            ids = torch.randint(0, 512, (1, tokens), generator=torch.Generator().manual_seed(0))
        self.rows = ids[:, : ids.shape[1] // 256 * 256].reshape(-1, 256)
        self.tokens = self.rows.numel()
        self.logs = self._log_probabilities()
        self.perplexity = self._perplexity(self.logs)

    def of(self, path: Path) -> dict[str, float]:
        from agentopt.weights.gg import archive

        own = dict(self.model.named_parameters())
        with archive.Archive(path) as packed, self.torch.no_grad():
            for name in packed.names:
                own[name].copy_(packed.read(name, "float32"))
        logs = self._log_probabilities()
        kl = float((self.logs.exp() * (self.logs - logs)).sum(-1).mean())
        off = float((logs - self.logs).norm() / self.logs.norm())
        return {"kl": kl, "perplexity": self._perplexity(logs), "relative_error_of_log_probabilities": off}

    def _log_probabilities(self) -> Any:
        with self.torch.no_grad():
            return self.torch.cat([self.model(row[None]).logits.float().log_softmax(-1) for row in self.rows])

    def _perplexity(self, logs: Any) -> float:
        picked = logs[:, :-1].gather(-1, self.rows[:, 1:, None])
        return float((-picked.mean()).exp())


def same_folder(one: Path, other: Path) -> bool:
    import torch
    from safetensors import safe_open

    with safe_open(str(one / "model.safetensors"), "pt") as a, safe_open(str(other / "model.safetensors"), "pt") as b:
        names = list(a.keys())
        return set(names) == set(b.keys()) and all(
            torch.equal(a.get_tensor(name).view(torch.int16), b.get_tensor(name).view(torch.int16)) for name in names
        )


def archive_rows(cells: list[dict[str, Any]], before: int, quality: Quality) -> list[Row]:
    rows: list[Row] = []
    for cell in cells:
        name = title(cell)
        note = f"{cell['tensor_bytes'] / 1e6:.1f} MB of {before / 1e6:.1f}; " + ", ".join(
            f"{count} {coding}" for coding, count in sorted(cell["codings"].items())
        )
        bits = cell["bits_per_weight"]
        entropy = bits / (1 + cell["over_entropy"])
        rows.append(Row(f"{name}: size", bits, "bits/weight", None, None, "entropy", entropy, note))
        goal = "<= 5" if "lossless" not in cell else None
        rows.append(Row(f"{name}: above its entropy", 100 * cell["over_entropy"], "%", None, goal))
        if "kl" in cell:
            note = f"perplexity {cell['perplexity']:.3f}, before {quality.perplexity:.3f}, on {quality.tokens} tokens"
            rows.append(Row(f"{name}: KL to bf16", cell["kl"], "nats/token", None, None, None, None, note))
        rows.append(Row(f"{name}: packing", before / 1e6 / cell["pack_seconds"], "MB/s of bf16"))
        if "unpack_seconds" in cell:
            rows.append(Row(f"{name}: unpacking to a folder", before / 1e6 / cell["unpack_seconds"], "MB/s of bf16"))
        if "exact" in cell:
            rows.append(Row(f"{name}: every bit is back", float(cell["exact"]), "yes = 1", None, ">= 1"))
    return rows


def title(cell: dict[str, Any]) -> str:
    if "lossless" in cell:
        return "lossless"
    return f"sqnr {cell['sqnr']:.0f} dB" if "sqnr" in cell else f"step {cell['step']:.3g} ({cell['sqnr_db']:.1f} dB)"


# --- zstd ------------------------------------------------------------------------------------------------------------


def zstd_cells(place: Path, folder: Path, *, quick: bool) -> dict[str, dict[str, Any]]:
    """Every form of the weights under zstd -3 and -19 (zlib 1 and 9 where there is no zstd)."""
    from agentopt.weights.gg import archive

    found: dict[str, dict[str, Any]] = {}
    for name, levels in (("bf16", (3, 19)), ("fp8 E4M3", (3, 19)), ("rf8", (3, 19)), ("rf8-gg", (3, 19))):
        path = place / "bytes"
        sqnr, tensors = write_bytes(folder, name, path)
        size = path.stat().st_size
        cell: dict[str, Any] = {"bytes": size, "sqnr_db": sqnr}
        if name != "bf16":
            cell["archive_bytes"], cell["entropy_bytes"] = pack_codes(place, tensors)
            cell["grid_bytes"] = archive.pack(folder, place / "same.ggz", sqnr=sqnr).tensor_bytes
        del tensors
        for level in levels:
            part = path if level == 3 or quick else some_blocks(path, place / "some")
            packed, seconds, back = compress(part, level)
            ratio = packed / part.stat().st_size
            cell[f"-{level}"] = {
                "ratio": ratio,
                "bytes": ratio * size,
                "seen_bytes": part.stat().st_size,
                "compress_mb_s": part.stat().st_size / 1e6 / seconds,
                "decompress_mb_s": part.stat().st_size / 1e6 / max(back, 1e-3),
            }
        print(name, cell, flush=True)
        found[name] = cell
    return found


def write_bytes(folder: Path, form: str, path: Path) -> tuple[float | None, dict[str, Any]]:
    """The weights in one file, matrices in this form with a scale per row: the SQNR, and the tensors."""
    import math

    import torch
    from safetensors import safe_open

    from agentopt.weights import gg

    power = noise = 0.0
    tensors: dict[str, Any] = {}
    with safe_open(str(folder / "model.safetensors"), "pt") as source:
        for name in sorted(source.keys()):
            tensor = source.get_tensor(name)
            if form == "bf16" or tensor.ndim < 2:
                tensors[name] = tensor
                continue
            if form == "fp8 E4M3":
                scale = tensor.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
                codes = (tensor.float() / scale).to(torch.float8_e4m3fn)
                tensors |= {f"{name}.qweight": codes.view(torch.uint8), f"{name}.weight_scale": scale}
                back = codes.float() * scale
            else:
                encoded = gg.encode(tensor.float(), form, name=name)  # type: ignore[arg-type]
                tensors |= {f"{name}.qweight": encoded.codes, f"{name}.weight_scale": encoded.scale}
                if encoded.book_id is not None:
                    tensors[f"{name}.book_id"] = encoded.book_id
                back = gg.decode(encoded)
            power += float(tensor.double().square().sum())
            noise += float((tensor.double() - back.double()).square().sum())
    with path.open("wb") as out:
        for part in tensors.values():
            out.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return (10 * math.log10(power / noise) if noise else None), tensors


def pack_codes(place: Path, tensors: dict[str, Any]) -> tuple[int, float]:
    """Bytes of all tensors in an archive that keeps the codes of a quantized model, and their entropy in bytes."""
    import json

    from safetensors.torch import save_file

    from agentopt.weights.gg import archive

    folder = place / "codes"
    folder.mkdir()
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "rf8"}}), encoding="utf-8")
    result = archive.pack(folder, place / "codes.ggz")
    shutil.rmtree(folder)
    return result.tensor_bytes, result.entropy_bytes


def some_blocks(path: Path, out: Path) -> Path:
    with path.open("rb") as source, out.open("wb") as target:
        for number in range(0, path.stat().st_size // BLOCK + 1, SHARE):
            source.seek(number * BLOCK)
            target.write(source.read(BLOCK))
    return out


def compress(path: Path, level: int) -> tuple[int, float, float]:
    """Bytes after, seconds of the processor to compress and to decompress."""
    binary, packed = shutil.which("zstd"), path.with_suffix(".packed")
    if binary is None:
        level = {3: 1, 19: 9}[level]
        data, seconds = timed(lambda: zlib.compress(path.read_bytes(), level))
        return len(data), seconds, timed(lambda: zlib.decompress(data))[1]
    there = children(binary, "-q", "-f", "-T1", f"-{level}", str(path), "-o", str(packed))
    back = children(binary, "-q", "-f", "-d", str(packed), "-o", str(path.with_suffix(".back")))
    return packed.stat().st_size, there, back


def children(*command: str) -> float:
    """Seconds of the processor of another program."""
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime


def zstd_rows(compared: dict[str, dict[str, Any]], cells: list[dict[str, Any]]) -> list[Row]:
    """Beside an archive of the same SQNR; the bf16 weights beside one that keeps every bit."""
    rows: list[Row] = []
    exact = next(cell for cell in cells if "lossless" in cell)
    tool = "zstd" if shutil.which("zstd") else "zlib"
    for name, cell in compared.items():
        ours = cell.get("grid_bytes", exact["tensor_bytes"])
        exactness = "every bit" if cell["sqnr_db"] is None else f"{cell['sqnr_db']:.1f} dB"
        for level in ("-3", "-19"):
            found = cell[level]
            note = f"{exactness}; an archive as exact takes {ours / found['bytes']:.3f} of it; "
            note += f"{tool} packs {found['compress_mb_s']:.1f} and unpacks {found['decompress_mb_s']:.0f} MB/s of it"
            rows.append(
                Row(f"{tool} {level} of {name}", found["bytes"] / 1e6, "MB", None, None, "archive", ours / 1e6, note)
            )
        if "archive_bytes" in cell:
            over = 100 * (cell["archive_bytes"] / cell["entropy_bytes"] - 1)
            best = min(cell["-3"]["bytes"], cell["-19"]["bytes"]) / 1e6
            mine, note = cell["archive_bytes"] / 1e6, f"{over:.2f} % above their entropy"
            rows.append(Row(f"codes of {name} in an archive", mine, "MB", None, None, f"best {tool}", best, note))
    return rows


# --- damage ----------------------------------------------------------------------------------------------------------


def damage_rows(path: Path, changes: int) -> list[Row]:
    """One changed byte at a time, a third each in header, index and payload; and lengths that are wrong."""
    import random
    import struct

    found, kinds = 0, 0
    draw = random.Random(0)
    with path.open("r+b") as file:
        head = file.read(80)
        begin, length = struct.unpack_from("<QQ", head, 16)
        for number in range(changes):
            low, high = ((0, 80), (begin, begin + length), (80, begin))[number % 3]
            place = draw.randrange(low, high)
            byte = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([byte[0] ^ draw.randrange(1, 256)]), place)
            found += damaged(path, place)
            os.pwrite(file.fileno(), byte, place)
        whole = begin + length
        for size in (0, 79, begin, whole - 1, whole + 1):
            file.truncate(size) if size > whole else None
            cut = path.with_name("cut.ggz")
            with path.open("rb") as source:
                cut.write_bytes(source.read(size) if size < whole else source.read())
            kinds += damaged(cut, None)
    return [
        Row("changed bytes that are found", 100 * found / changes, f"% of {changes}", None, ">= 100"),
        Row("cut off or too long, found", 100 * kinds / 5, "% of 5", None, ">= 100"),
    ]


def damaged(path: Path, place: int | None) -> bool:
    """Whether opening the archive, or reading what this byte belongs to, tells of damage."""
    from agentopt.errors import UserError
    from agentopt.weights.gg import archive

    try:
        with archive.Archive(path) as packed:
            if place is None:
                packed.verify()
                return False
            for name, stored in packed._tensors.items():
                if any(at[0] <= place < at[0] + at[1] for one in stored.streams for at in one.sections):
                    packed.read(name)
            packed.files()
    except UserError:
        return True
    return False


if __name__ == "__main__":
    main()
