"""Every python block of the README and of docs/ runs, in order, in one namespace per file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao

ROOT = Path(ao.__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    ao.Candidate({"review.instruction": "x"}).save(tmp_path / "best.json")
    prompt = "Sort the mail of {customer}. " + "A letter goes left, a parcel goes right. " * 200
    (tmp_path / "prompt.txt").write_text(prompt, encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": page.stem}
    blocks = BLOCK.findall(text)
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}[{number}]", "exec"), namespace)
    assert text.count("```python") == len(blocks)
