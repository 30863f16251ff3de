"""Record what a program did as a graph, and send feedback backward through it."""

from __future__ import annotations

from agentopt.graph._backward import Subgraph, backward
from agentopt.graph._errors import ExecutionError
from agentopt.graph._live import note_parameter_read, stop_tracing
from agentopt.graph._recording import Operation, Recording, current_recording, operation, record, report_usage
from agentopt.graph._records import EdgeKind, ErrorRecord, Feedback, OpRecord, TracedParameter, Usage
from agentopt.graph._trace import Trace
from agentopt.graph._values import Reference

__all__ = [
    "EdgeKind",
    "ErrorRecord",
    "ExecutionError",
    "Feedback",
    "OpRecord",
    "Operation",
    "Recording",
    "Reference",
    "Subgraph",
    "Trace",
    "TracedParameter",
    "Usage",
    "backward",
    "current_recording",
    "note_parameter_read",
    "operation",
    "record",
    "report_usage",
    "stop_tracing",
]
