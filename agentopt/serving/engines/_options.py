"""What an engine may be told, and what its supervisor may be told."""

from __future__ import annotations

from dataclasses import dataclass

from agentopt.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
OWN_OPTIONS = ("--model", "--served-model-name", "--host", "--port", "--uds", "--api-key", "--root-path")
"""Options of engines that the supervision sets itself."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is told; None: what suits the machine and the model.

    Attributes:
        context: longest prompt and reply together, tokens.
        sequences: requests computed at a time.
        dtype: float32, bfloat16 or float16.
        resident: LoRA adapters at a time; 0: no adapters can be loaded.
        max_rank: largest rank of an adapter.
        threads: that compute, on a CPU.
        kv_gib: memory for keys and values on a CPU, GiB (vLLM).
        compiled: vLLM: compile the model (a longer start, faster tokens).
        extra: arguments for the engine itself, passed last.
    """

    context: int | None = None
    sequences: int | None = None
    dtype: str | None = None
    resident: int = 0
    max_rank: int = 16
    threads: int | None = None
    kv_gib: int | None = None
    compiled: bool | None = None
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"dtype: found {self.dtype!r}, expected {', '.join(DTYPES)}.")
        for name, least in (("context", 16), ("sequences", 1), ("max_rank", 1), ("threads", 1), ("kv_gib", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}: found {value}, expected {least} or more.")
        if self.resident < 0:
            raise UserError(f"resident: found {self.resident}, expected 0 or more adapters.")
        refuse_own(self.extra)


def refuse_own(extra: tuple[str, ...]) -> None:
    """Arguments after `--` may not take the engine out of the gateway's hands.

    Raises:
        UserError: one of them would.
    """
    for argument in extra:
        option = argument.partition("=")[0].replace("_", "-")
        # argparse takes any beginning of a long option that is unique, so "--hos" would be "--host".
        if any(option == own or (len(option) > 3 and own.startswith(option)) for own in OWN_OPTIONS):
            raise UserError(
                f"engine argument {argument!r}: the server sets where the engine listens, its name and its key itself; "
                "leave it out (--host and --port before the `--` are the public address)."
            )


@dataclass(frozen=True, slots=True)
class SupervisorOptions:
    """How an engine is watched; all times in seconds.

    Attributes:
        start_timeout: a start that takes longer has failed.
        health_interval: between two looks at an engine that is ready.
        health_timeout: within which it must answer one.
        hung_after: without an answer for so long (and twice in a row) it is killed and started again.
        token_within: an engine that a request found silent has so long for one token, twice, before it counts as hung.
        stop_grace: between TERM and KILL.
        first_delay: before the first restart; doubled for each that follows.
        longest_delay: between two starts.
        stable_after: an engine that was ready for so long starts afresh with `first_delay`.
        failed_starts: so many in a row, none of them ready, and it is not tried again.
        log_bytes: size of one file of the log.
        log_files: how many there are.
    """

    start_timeout: float = 900.0
    health_interval: float = 5.0
    health_timeout: float = 10.0
    hung_after: float = 30.0
    token_within: float = 30.0
    stop_grace: float = 15.0
    first_delay: float = 1.0
    longest_delay: float = 60.0
    stable_after: float = 60.0
    failed_starts: int = 5
    log_bytes: int = 10 << 20
    log_files: int = 3
