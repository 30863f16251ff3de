"""What is started: a command for an address, its environment, and what is known of the engine beforehand."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agentopt.errors import UserError
from agentopt.serving._types import CHAT, COMPLETIONS, FORWARDED, Abilities, Address
from agentopt.serving.engines._options import EngineOptions, refuse_own

TOKEN = "AGENTOPT_ENGINE_TOKEN"
"""The environment variable in which our own engines get their bearer token: an argument could be read by anybody."""
_SECRET = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|_PAT|_DSN|DATABASE_URL|CONNECTION_STRING)$"
    r"|^AGENTOPT_(?!ENGINE_LOCK|VLLM)",
    re.IGNORECASE,
)
_KEPT = frozenset({"HF_TOKEN"})


@dataclass(frozen=True, slots=True)
class Hint:
    """What a line of an engine's log means, for a person."""

    text: str
    fatal: bool = False
    """Another start would end in the same way."""


def _no_hint(lines: Sequence[str], code: int | None) -> Hint | None:
    return None


@dataclass(frozen=True, slots=True)
class Launch:
    r"""How an engine is started.

    Attributes:
        name: vllm, transformers, embedded or fake.
        model: the name by which the engine is to know its model.
        command: (address) -> program and arguments.
        env: its whole environment, without the token.
        token_env: the variable that gets the token.
        abilities: what it can at least do, known beforehand.
        stages: (pattern, words): what a line of its log says about how far a start is; \1 is filled in.
        hint: (last lines, exit code) -> why it ended, where that is known.
        counters: finds the lines of its `/metrics` that grow with its tokens; None: it has none.
    """

    name: str
    model: str
    command: Callable[[Address], list[str]]
    env: Mapping[str, str]
    token_env: str
    abilities: Abilities
    stages: tuple[tuple[re.Pattern[str], str], ...] = ()
    hint: Callable[[Sequence[str], int | None], Hint | None] = field(default=_no_hint)
    counters: re.Pattern[str] | None = None


def engine_environment(python: str = sys.executable, **more: str) -> dict[str, str]:
    """Our environment without the secrets that are no business of an engine, and with what it needs.

    Args:
        python: the interpreter it runs in.
        more: variables for it; what the operator has set already goes first.
    """
    found = {name: value for name, value in os.environ.items() if name in _KEPT or not _SECRET.search(name)}
    if python != sys.executable:
        found.pop("VIRTUAL_ENV", None)
        found.pop("PYTHONHOME", None)
    # Compilers' helpers that are installed beside the interpreter (ninja) are looked for on the path.
    found["PATH"] = os.pathsep.join([str(Path(python).parent), found.get("PATH", os.defpath)])
    return {**more, **found, "PYTHONUNBUFFERED": "1"}


def listen(address: Address) -> list[str]:
    """The arguments that say where to listen."""
    if address.socket is not None:
        return ["--uds", address.socket]
    return ["--host", address.host, "--port", str(address.port)]


def launch_transformers(model: Path, name: str, options: EngineOptions | None = None) -> Launch:
    """Our own server over transformers, in this interpreter.

    Args:
        model: a model folder.
        name: the model's name.
        options: what it is told.

    Raises:
        UserError: an option that it does not have.
    """
    from agentopt.serving.engines._machine import default_dtype

    asked = options or EngineOptions()
    _no_kv(asked, "transformers")
    arguments = ["--model", str(model), "--served-model-name", name, "--dtype", asked.dtype or default_dtype()]
    for option, value in (("--max-model-len", asked.context), ("--max-num-seqs", asked.sequences)):
        if value is not None:
            arguments += [option, str(value)]
    if asked.resident:
        arguments += ["--enable-lora", "--max-loras", str(asked.resident), "--max-lora-rank", str(asked.max_rank)]
    more = {} if asked.threads is None else {"OMP_NUM_THREADS": str(asked.threads)}
    return Launch(
        name="transformers",
        model=name,
        command=module_command("agentopt.serving.engines.transformers_server", arguments, asked.extra),
        env=engine_environment(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false") | more,
        token_env=TOKEN,
        abilities=Abilities(
            routes=frozenset({CHAT, COMPLETIONS}), model=name, adapters=asked.resident > 0, context=asked.context
        ),
        stages=((re.compile(r"[Ll]oading"), "loading weights"),),
        hint=common_hint,
        counters=re.compile(r"^agentopt_engine_\w+_tokens_total .*$", re.MULTILINE),
    )


def launch_fake(*extra: str, model: str = "fake") -> Launch:
    """The shipped double, for tests and load measurements."""
    refuse_own(extra)
    return Launch(
        name="fake",
        model=model,
        command=module_command("agentopt.serving.fake_engine", ["--model", model], extra),
        env=engine_environment(),
        token_env="VLLM_API_KEY",
        abilities=Abilities(routes=FORWARDED, model=model, adapters=True),
        hint=common_hint,
    )


def module_command(module: str, arguments: Sequence[str], extra: Sequence[str] = ()) -> Callable[[Address], list[str]]:
    """A module of ours as a command. -P: a file in the working directory must not stand in for a package."""

    def command(address: Address) -> list[str]:
        return [sys.executable, "-P", "-m", module, *listen(address), *arguments, *extra]

    return command


def _no_kv(options: EngineOptions, engine: str) -> None:
    for option in ("kv_gib", "compiled"):
        if getattr(options, option) is not None:
            raise UserError(f"{option}: is for vLLM, found the engine {engine}; leave it out.")


_COMMON: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"error: unrecognized arguments: (.+)"), "the engine does not know the argument {0} given after `--`"),
    (re.compile(r"error: (argument .+)"), "the engine refused an argument: {0}"),
    (re.compile(r"No module named '([\w.]+)'"), "the Python package {0} is not installed in the engine's environment"),
    (re.compile(r"^(cannot start .+)"), "{0}"),
    (re.compile(r"^(?:agentopt: |error: )(.+)"), "{0}"),
)


def common_hint(lines: Sequence[str], code: int | None) -> Hint | None:
    """What any Python program says when it ends."""
    for line in reversed(lines):
        for pattern, words in _COMMON:
            found = pattern.search(line.strip())
            if found is not None:
                return Hint(words.format(*found.groups()), fatal=True)
    for line in reversed(lines):
        found = re.search(r"(?:^|\s)((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Refused)): (.+)", line)
        if found is not None:
            return Hint(f"{found[1].rpartition('.')[2]}: {found[2][:300]}")
    if code == -9:
        return Hint("it was killed (signal 9), as the system does when memory runs out")
    if code == -4:
        return Hint("an instruction that this processor lacks: it needs another build of the engine", fatal=True)
    return None
