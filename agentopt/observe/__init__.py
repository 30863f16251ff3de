"""What a person sees of a run: the HTML reports and the rows behind them."""

from __future__ import annotations

from agentopt.observe._proposals import ProposalRow, proposals_of
from agentopt.observe._quantize_report import write_quantize_report
from agentopt.observe._report import build_report, render, write_report

__all__ = ["ProposalRow", "build_report", "proposals_of", "render", "write_quantize_report", "write_report"]
