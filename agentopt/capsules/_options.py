"""Everything about one capsule that has a sensible default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from agentopt.errors import UserError

if TYPE_CHECKING:
    from agentopt.capsules.gating._cost import Horizon, Prefix
    from agentopt.capsules.rewriting._rewrite import RewriteOptions
    from agentopt.store import Store

Scorer = Literal["auto", "bm25", "coverage", "embedding"]
STYLES = ("telegraphic", "bullets", "prose", "table")


@dataclass(frozen=True)
class CapsuleOptions:
    """How a capsule is made, judged and kept.

    Raises:
        UserError: a value outside its range.
    """

    seed: int = 0
    lossless: bool = True
    """Begin with the edits that lose nothing; False leaves every character that stays as it was."""
    scorer: Scorer = "auto"
    """How units are valued: `bm25` for a query, `coverage` without one, `embedding` where an encoder is installed."""
    styles: tuple[str, ...] = STYLES
    """The styles a rewriting model is asked for, one candidate each."""
    repairs: int = 2
    """Rounds in which a rewrite that failed its checks is sent back."""
    rewriting: RewriteOptions | None = None
    """Everything else about rewriting: templates, chunks, a judge, earlier winners."""
    trained: str | Path | Any = None
    """A trained capsulator: a folder that `capsules.train` wrote, or a loaded one."""
    margin: float = 0.05
    """How much lower the score may be before it counts as harm (a share of the score's range)."""
    confidence: float = 0.95
    """Of the one-sided bound that the gate needs above `-margin`."""
    undecided: Literal["original", "capsule"] = "original"
    """What to recommend when the data cannot show either."""
    horizon: Horizon | None = None
    """Prices and reuse over which net cost is reported; None for no cost report."""
    prefix: Prefix | None = None
    """How the text is sent over the horizon: `static` the same in every call, `query` made anew for each question about
    the same text, `tail` another text each time. None: `query` when a query was given, else `static`."""
    tools: tuple[Mapping[str, Any], ...] | None = None
    """Tool definitions that are sent with the messages: they count against the budget."""
    store: Store | str | Path | None = None
    """Where capsules and originals are kept and found again; None for nowhere."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.styles) - set(STYLES))
        if unknown or not self.styles:
            raise UserError(f"styles: found {unknown or 'none'}, expected some of {', '.join(STYLES)}.")
        for name, known in (("scorer", get_args(Scorer)), ("undecided", ("original", "capsule"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name}: found {getattr(self, name)!r}, expected one of {', '.join(known)}.")
        if not 0 < self.margin < 1:
            raise UserError(f"margin: found {self.margin}, expected a number between 0 and 1.")
        if not 0.5 < self.confidence < 1:
            raise UserError(f"confidence: found {self.confidence}, expected a number between 0.5 and 1.")
        if self.repairs < 0:
            raise UserError(f"repairs: found {self.repairs}, expected 0 or more.")
        if self.seed < 0:
            raise UserError(f"seed: found {self.seed}, expected 0 or more.")
