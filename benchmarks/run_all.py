"""Run every benchmark, print the rows that miss their goal, and rewrite the leaderboard from the result files.

    python benchmarks/run_all.py [--quick] [--only NAME ...] [--table]

`--table` only rebuilds benchmarks/README.md from benchmarks/results/*.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SKIP = {"run_all.py"}


def scripts(only: list[str]) -> list[Path]:
    """The benchmark scripts, by name."""
    found = [path for path in sorted(HERE.glob("*.py")) if path.name not in SKIP and not path.name.startswith("_")]
    return [path for path in found if not only or path.stem in only]


def missed(row: dict[str, Any]) -> bool:
    """Whether a row states a goal and does not reach it."""
    goal = row.get("goal")
    if not goal:
        return False
    if row["value"] is None:
        return True
    sign, number = str(goal).split()[:2]
    return row["value"] > float(number) if sign == "<=" else row["value"] < float(number)


def figure(value: Any) -> str:
    """A number with as many digits as a reader needs."""
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def result_files(*, quick: bool = False) -> list[Path]:
    """The committed full runs, or what `--quick` just wrote."""
    found = sorted((HERE / "results").glob("*.json"))
    return [path for path in found if path.name.endswith(".quick.json") == quick]


def leaderboard() -> str:
    """benchmarks/README.md: every committed row, with its command."""
    lines = [
        "# What was measured",
        "",
        "One table per script, made from `results/*.json` by `python benchmarks/run_all.py --table`. A row that misses",
        "its goal stays. Peers were measured on the same machine and day; `tune_public` ran each task, and the peers",
        "of its seed 0, as processes of their own, some of them at the same time.",
    ]
    for path in result_files():
        data = json.loads(path.read_text(encoding="utf-8"))
        quick = " (quick form)" if data.get("quick") else ""
        lines += ["", f"## {path.stem}{quick}", "", f"`{data['command']}` · {data['date']} · {data['machine']}", ""]
        lines += [
            "| measurement | value | unit | interval | goal | met | peer | peer's value |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in data["rows"]:
            interval = " to ".join(figure(end) for end in row["interval"]) if row.get("interval") else ""
            met = "" if not row.get("goal") else "no" if missed(row) else "yes"
            cells = [row["name"], figure(row["value"]), row.get("unit", ""), interval, row.get("goal") or "", met]
            cells += [row.get("peer") or "", figure(row.get("peer_value"))]
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run, then report; exit code 1 when a script itself failed (a missed goal is reported, not hidden, not fatal)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    failed: list[str] = []
    if not options.table:
        for script in scripts(options.only):
            print(f"\n== {script.name}", flush=True)
            arguments = [sys.executable, str(script), *(["--quick"] if options.quick else [])]
            if subprocess.run(arguments, check=False).returncode:
                failed.append(script.name)
    (HERE / "README.md").write_text(leaderboard(), encoding="utf-8")
    print("\nRows that miss their goal:")
    none = True
    for path in result_files(quick=options.quick):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            if missed(row):
                none = False
                print(
                    f"  {path.stem}: {row['name']} = {figure(row['value'])} {row.get('unit', '')}, goal {row['goal']}"
                )
    if none:
        print("  none")
    for name in failed:
        print(f"  {name} did not finish")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
