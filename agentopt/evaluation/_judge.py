"""An LLM judge with a rubric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agentopt.evaluation._data import Example
from agentopt.evaluation._rows import Score

if TYPE_CHECKING:
    from agentopt.graph import Trace
    from agentopt.models import LM


class Judge:
    """Scores an output against a rubric with a language model (role "judge")."""

    needs_expected = False

    def __init__(self, rubric: str, lm: LM | None = None, *, name: str = "judge") -> None:
        self.rubric = rubric
        self.lm = lm
        self.name = name

    async def __call__(self, output: Any, expected: Any, example: Example, trace: Trace | None) -> Score:
        """The judge's score in [0, 1], with its reasons as feedback."""
        raise NotImplementedError
