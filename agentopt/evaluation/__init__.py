"""Data, programs, metrics, the evaluator, and the statistics that may be claimed from its rows."""

from __future__ import annotations

from agentopt.evaluation._data import MIN_TEST_ROWS, Dataset, Example, content_hash, overlap, split_dataset
from agentopt.evaluation._draws import seed_number, seeded
from agentopt.evaluation._evaluator import Evaluator
from agentopt.evaluation._executors import Executor, RemoteExecutor, Work, check_executor, open_executor
from agentopt.evaluation._judge import Judge
from agentopt.evaluation._metrics import Metric, MetricSpec, resolve_metric
from agentopt.evaluation._program import Program, load_program
from agentopt.evaluation._readers import Source, load_dataset
from agentopt.evaluation._rows import (
    EvaluationOptions,
    EvaluationResult,
    EvaluationRow,
    KeepTraces,
    Rollout,
    Score,
)
from agentopt.evaluation._statistics import (
    TestResult,
    binomial_lower_bound,
    bootstrap_interval,
    mcnemar_exact,
    paired_test,
    sign_flip_test,
    smallest_detectable_difference,
    wilcoxon,
)
from agentopt.evaluation._verdict import Verdict, detectable_difference, p_text, verdict, verdict_text

__all__ = [
    "MIN_TEST_ROWS",
    "Dataset",
    "EvaluationOptions",
    "EvaluationResult",
    "EvaluationRow",
    "Evaluator",
    "Example",
    "Executor",
    "Judge",
    "KeepTraces",
    "Metric",
    "MetricSpec",
    "Program",
    "RemoteExecutor",
    "Rollout",
    "Score",
    "Source",
    "TestResult",
    "Verdict",
    "Work",
    "binomial_lower_bound",
    "bootstrap_interval",
    "check_executor",
    "content_hash",
    "detectable_difference",
    "load_dataset",
    "load_program",
    "mcnemar_exact",
    "open_executor",
    "overlap",
    "p_text",
    "paired_test",
    "resolve_metric",
    "seed_number",
    "seeded",
    "sign_flip_test",
    "smallest_detectable_difference",
    "split_dataset",
    "verdict",
    "verdict_text",
    "wilcoxon",
]
