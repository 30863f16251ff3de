"""A user's path: `agentopt finetune` on the embedded model and SST-2, from a plain prompt to a claim on test rows.

    python benchmarks/finetune_path.py --data DIR [--quick] [--steps 150]

DIR has classification/sst2/stsa.binary.{train,dev,test}, which are not part of this project. 1,000 rows train, 200
choose the step, 400 of the test file are used once. The goal is the claim `improved` in under 30 minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _report import Row, write_results

FILES = {"train": ("train", 1000), "val": ("dev", 200), "test": ("test", 400)}
TASK = ("--prompt", "{text} It was", "--labels", "0=terrible,1=great")


def write_rows(data: Path, folder: Path, share: float) -> None:
    """The three JSONL files, drawn with a fixed seed."""
    for name, (source, count) in FILES.items():
        rows: list[str] = []
        with (data / "classification" / "sst2" / f"stsa.binary.{source}").open(encoding="utf-8") as lines:
            for line in lines:
                label, _, text = line.rstrip("\n").partition(" ")
                rows.append(json.dumps({"text": text, "label": int(label)}))
        random.Random(0).shuffle(rows)
        kept = rows[: max(8, int(count * share))]
        (folder / f"{name}.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")


def tune(folder: Path, steps: int, every: int) -> dict[str, Any]:
    """Run the command; what it prints with --json, and the minutes it took."""
    files = [word for name in FILES for word in (("--data" if name == "train" else f"--{name}"), f"{name}.jsonl")]
    how = ("--method", "mezo", "--lr", "3e-5", "--steps", str(steps), "--eval-every", str(every), "--patience", "0")
    command = [sys.executable, "-m", "agentopt", "finetune", "embedded/smollm2-135m-instruct", *files, *TASK, *how]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--out", "tuned", "--json"], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    )
    return {**json.loads(done.stdout), "minutes": (time.perf_counter() - start) / 60}


def rows_of(result: dict[str, Any]) -> list[Row]:
    """What the claim says, the baselines beside it."""
    claim = result["claim"]
    against = claim["against"].get("zero-shot")
    rows = [Row(f"test accuracy, {name}", value, "share") for name, value in result["test"].items()]
    rows.append(
        Row(
            "claim `improved`: tuned minus zero-shot",
            against["difference"] if against else 0.0,
            "share",
            interval=tuple(against["interval"]) if against else None,
            goal=">= 0.0001",
            note=claim["text"],
        )
    )
    rows += [
        Row(f"validation accuracy after {int(point['step'])} steps", point["score"], "share")
        for point in result["curve"]
    ]
    rows.append(Row("the whole command, start to claim", result["minutes"], "minutes", goal="<= 30"))
    rows.append(Row("the log that the weights can be made from again", result["log_bytes"], "bytes"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 steps on a few rows")
    parser.add_argument("--data", type=Path, help="folder with classification/sst2")
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    if arguments.data is None:
        print("finetune_path: needs --data DIR with classification/sst2; nothing was measured.")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(arguments.data.resolve(), folder, 0.05 if arguments.quick else 1.0)
        steps = 8 if arguments.quick else arguments.steps
        result = tune(folder, steps, max(1, steps // 3))
    write_results("finetune_path", rows_of(result), quick=arguments.quick)


if __name__ == "__main__":
    main()
