"""What a person sees of a run: the HTML report and the rows behind it."""

from __future__ import annotations

from agentopt.observe._proposals import ProposalRow, proposals_of
from agentopt.observe._report import build_report, render, write_report

__all__ = ["ProposalRow", "build_report", "proposals_of", "render", "write_report"]
