"""`make bench-gpu`: every GPU benchmark of the weights rooms, one after the other, and one table of all their rows.

    python benchmarks/gpu/run_all.py

Needs Python 3.12, torch with CUDA, Triton, transformers, peft and NumPy; agentopt is imported from this source tree.
Together they end within 22 minutes. Without a GPU it says so and exits 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _gpu import Row, options, print_table

SCRIPTS = {"zeroth_cost": 4.5, "zeroth_quality": 3.5, "gg_gemm": 7.0, "serve_tokens": 4.0}
"""Minutes after which a script begins nothing new."""

GRACE = 60
"""Seconds that a script may take after that, before it is stopped; what it wrote stays."""


def main() -> None:
    given = options(__doc__ or "", minutes=0)
    folder: Path = given.out
    failed: list[str] = []
    for name, minutes in SCRIPTS.items():
        print(f"== {name}", flush=True)
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), "--minutes", str(minutes)]
        command += ["--out", str(folder), "--device", given.device, *(["--tiny"] if given.tiny else [])]
        try:
            if subprocess.run(command, check=False, timeout=60 * minutes + GRACE).returncode:
                failed.append(f"{name} failed")
        except subprocess.TimeoutExpired:
            failed.append(f"{name} was stopped")
    print("\n== all rows")
    rows = [
        Row(**row)
        for name in SCRIPTS
        if (path := folder / f"{name}.gpu{'.quick' if given.tiny else ''}.json").exists()
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
    ]
    print_table(rows)
    missed = [row.name for row in rows if row.met is False]
    print(f"\ngoals missed: {', '.join(missed)}" if missed else "\nall goals met")
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
