"""`agentopt capsule`: one text, one request, or many files, made shorter under a hard budget.

The text goes to stdout exactly as counted (a newline is added on a terminal only), what there is to say about it to
stderr, so that `agentopt capsule ... > FILE` gives a file within the budget.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.text import Text

from agentopt.cli._console import err, hanging, out, short, usd
from agentopt.cli._settings import load_settings
from agentopt.errors import RunError, UserError

if TYPE_CHECKING:
    from agentopt.capsules import Capsule, Horizon

STREAM_BYTES = 16_000_000
"""Files longer than this are read in pieces."""


@dataclass(frozen=True)
class CapsuleArguments:
    """What the command line said; see `agentopt capsule --help`."""

    source: str
    budget: int | None
    tokenizer: str
    query: str | None
    keep: tuple[str, ...]
    mode: str
    model: str | None
    template: str | None
    trained: str | None
    task: str | None
    parameter: str | None
    margin: float
    undecided: str
    calls: int | None
    price: str | None
    prefix: str | None
    output_tokens: float
    cluster: str | None
    sequential: bool
    scorer: str
    seed: int
    out: str | None
    concurrency: int
    store: str | None
    as_json: bool
    diff: bool
    quiet: bool

    def keywords(self) -> dict[str, Any]:
        """The arguments of `agentopt.capsule`.

        Raises:
            UserError: one of them is missing or unusable.
        """
        from agentopt.capsules import CapsuleOptions, RewriteOptions, TokenBudget

        if self.budget is None:
            raise UserError("--budget is missing: give the tokens the result may have, for example --budget 300.")
        self._refuse_idle()
        options = CapsuleOptions(
            seed=self.seed,
            scorer=_one_of("--scorer", self.scorer, ("auto", "bm25", "coverage", "embedding")),
            rewriting=None if self.template is None else RewriteOptions(template=Path(self.template)),
            trained=self.trained,
            margin=self.margin,
            undecided=_one_of("--undecided", self.undecided, ("original", "capsule")),
            horizon=self._horizon(),
            prefix=None if self.prefix is None else _one_of("--prefix", self.prefix, ("static", "query", "tail")),
            store=self.store,
        )
        return {
            "budget": TokenBudget(self.budget, self.tokenizer),
            "keep": self.keep,
            "mode": self.mode,
            "query": self.query,
            "lm": self.model,
            "options": options,
        }

    def _refuse_idle(self) -> None:
        """An option that would do nothing is an error: what was asked for would silently not happen."""
        idle: dict[str, dict[str, object]] = {}
        if self.task is None:
            asked = {"--parameter": self.parameter, "--cluster": self.cluster, "--sequential": self.sequential}
            idle["--task"] = dict(asked)
        if self.calls is None and self.price is None:
            idle["--calls and --price"] = {"--prefix": self.prefix, "--output-tokens": self.output_tokens}
        if self.model is None:
            idle["--model"] = {"--template": self.template}
        for needed, options in idle.items():
            for option, value in options.items():
                if value:
                    raise UserError(f"{option} does nothing without {needed}; give that too, or leave {option} out.")

    def _horizon(self) -> Horizon | None:
        if self.calls is None and self.price is None:
            return None
        if self.calls is None or self.price is None:
            raise UserError("--calls and --price belong together: how many calls, and of which provider/model.")
        from agentopt.capsules import Horizon

        return Horizon(model=self.price, calls=self.calls, output_tokens=self.output_tokens)


def _one_of(option: str, value: str, choices: Sequence[str]) -> Any:
    if value not in choices:
        raise UserError(f"{option}: found {value!r}, expected {', '.join(choices[:-1])} or {choices[-1]}.")
    return value


def capsule_command(arguments: CapsuleArguments) -> int:
    """Make the capsule or capsules; the exit code is 1 when items of a batch failed."""
    if arguments.source.startswith("cap:"):
        return _original(arguments)
    path = Path(arguments.source)
    if arguments.source != "-" and not path.exists():
        raise UserError(f"{arguments.source}: no such file or folder; give a path, or - for standard input.")
    if arguments.source != "-" and (path.is_dir() or path.suffix == ".jsonl"):
        from agentopt.cli._capsule_batch import batch_command

        return batch_command(arguments, path)
    if arguments.source != "-" and path.stat().st_size > STREAM_BYTES:
        return _stream(arguments, path)
    _show(arguments, _made(arguments))
    return 0


def _made(arguments: CapsuleArguments) -> Capsule:
    from agentopt._api import capsule

    keywords = arguments.keywords()
    source = _source(arguments.source)
    if arguments.task is None:
        return capsule(source, **keywords)
    from agentopt.capsules import Task
    from agentopt.models import configure
    from agentopt.sandbox import sandboxed

    if not Path(str(arguments.task)).is_file():
        raise UserError(f"--task {arguments.task}: no such file; give an agentopt.toml with target, train and metric.")
    settings = load_settings(arguments.task, {"store": arguments.store})
    configure(models=settings.models)
    asked = {"prompt": arguments.parameter, "cluster": arguments.cluster, "sequential": arguments.sequential}
    task = Task.from_config({**settings.model_dump(), **asked})
    options = replace(keywords["options"], store=settings.store)
    with sandboxed(settings.sandbox):
        return capsule(source, **{**keywords, "task": task, "options": options})


def _original(arguments: CapsuleArguments) -> int:
    """Print the text that a handle stands for; with a budget the part of it that fits the query best."""
    from agentopt.capsules import Originals
    from agentopt.store import Store

    with Store.open(arguments.store) as store:
        originals = Originals(store, tokenizer=arguments.tokenizer)
        text = originals.get(arguments.source, query=arguments.query, max_tokens=arguments.budget)
    if arguments.out is not None:
        write_text(Path(arguments.out), text)
    else:
        _print_exactly(text)
    return 0


def read_text(path: str) -> str:
    """The text of a file, or of standard input for `-`.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    name = "standard input" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error}).") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = data[error.start : error.start + 4].hex(" ")
        raise UserError(
            f"{name}: not UTF-8 at byte {error.start:,} (found {found}); convert it, for example with "
            "iconv -f latin1 -t utf-8."
        ) from None


def _source(path: str) -> str | list[dict[str, Any]]:
    """The text, or the messages when a `.json` file holds a list of them (alone or under `messages`)."""
    text = read_text(path)
    if Path(path).suffix != ".json":
        return text
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, dict):
        value = cast("dict[str, Any]", value).get("messages")
    if isinstance(value, list) and value and all(_is_message(item) for item in cast("list[Any]", value)):
        return cast("list[dict[str, Any]]", value)
    return text


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(cast("dict[str, Any]", item).get("role"), str)


def _stream(arguments: CapsuleArguments, path: Path) -> int:
    """A file that is too long to be held as a whole: extraction in pieces."""
    from agentopt.capsules import stream

    keywords = arguments.keywords()
    asked = {"--task": arguments.task, "--model": arguments.model, "--trained": arguments.trained}
    asked |= {"--diff": arguments.diff, "--price": arguments.price, "--store": arguments.store}
    whole = [option for option, value in asked.items() if value]
    if whole or arguments.mode not in ("auto", "extract"):
        option = whole[0] if whole else f"--mode {arguments.mode}"
        raise UserError(
            f"{path}: a file of more than {STREAM_BYTES // 10**6} MB is read in pieces, and {option} needs all of it; "
            "split the file, or leave the option out."
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            made = stream(
                iter(lambda: file.read(1 << 16), ""),
                keywords["budget"],
                query=arguments.query,
                keep=arguments.keep,
                scorer=keywords["options"].scorer,
                seed=arguments.seed,
            )
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); convert it, for example with iconv -t utf-8.") from None
    if arguments.out is not None:
        write_text(Path(arguments.out), made.text)
    if arguments.as_json:
        print(json.dumps(asdict(made), ensure_ascii=False, indent=2))
    elif arguments.out is None:
        _print_exactly(made.text)
    if not arguments.quiet and not arguments.as_json:
        line = (
            f"{made.tokens:,} tokens ({made.tokenizer}), budget {made.limit:,}, of {made.characters:,} characters "
            f"read in pieces: extract; {made.dropped:,} of {made.units:,} units dropped"
        )
        err().print(Text(line), soft_wrap=True)
    return 0


def _show(arguments: CapsuleArguments, made: Capsule) -> None:
    if arguments.out is not None:
        write_text(Path(arguments.out), content_of(made))
    if arguments.as_json:
        print(json.dumps(made.to_dict(), ensure_ascii=False, indent=2, default=str))
    elif arguments.diff:
        print_units(out(), made)
    elif arguments.out is None:
        _print_exactly(content_of(made))
    if not arguments.quiet and not arguments.as_json:
        for line in summary(made):
            err().print(Text(line), soft_wrap=True)


def _print_exactly(text: str) -> None:
    """The characters that were counted, and a line end only where a person looks at them."""
    try:
        sys.stdout.buffer.write(text.encode("utf-8", "surrogatepass"))
        if sys.stdout.isatty():
            sys.stdout.buffer.write(b"\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        raise RunError(f"standard output: cannot be written ({error.strerror or error}).") from None


def content_of(made: Capsule) -> str:
    """What is written for a capsule: its text, or its messages as JSON."""
    if made.messages is None:
        return made.text
    return json.dumps(list(made.messages), ensure_ascii=False, indent=2) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write exactly `text`.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    except (OSError, UnicodeEncodeError) as error:
        raise UserError(f"{path}: cannot be written ({error}).") from None


def summary(made: Capsule) -> list[str]:
    """What a person wants to know, a line each."""
    head = f"{made.tokens:,} of {made.original_tokens:,} tokens ({made.tokenizer}), budget {made.limit:,}: {made.made}"
    left = [f"{len(made.dropped):,} units dropped"] if made.dropped else []
    if made.lossless_saved:
        left.append(f"{made.lossless_saved:,} tokens saved without loss")
    lines = [head + (f"; {', '.join(left)}" if left else "")]
    if made.fallback:
        lines.append(f"fell back: {made.fallback}")
    lines += [f"check failed: {check.name}: {check.detail}" for check in made.checks if not check.passed]
    if made.gate is not None:
        gate = made.gate
        lines.append(
            f"gate ({gate.kind}): {gate.verdict}; {gate.original:.3f} -> {gate.capsule:.3f} on {gate.n_gate} rows, "
            f"lower bound {gate.lower_bound:+.3f}, margin {gate.margin:g}" + (f"; {gate.reason}" if gate.reason else "")
        )
    if made.cost is not None:
        cost = made.cost
        lines.append(
            f"cost over {cost.calls:,} calls: {usd(cost.original_usd)} -> {usd(cost.capsule_usd)}; {cost.reason}"
        )
    return [*lines, f"recommended: {made.recommended}{_why(made)}"]


def _why(made: Capsule) -> str:
    if made.made == "unchanged":
        return " (it is within the budget as it is)"
    if made.gate is None:
        return " (harm was not measured: give --task)"
    return ""


def print_units(console: Console, made: Capsule) -> None:
    """The original line by line, with what left marked `-` and what is new `+`."""
    for sign, line in unit_diff(made):
        style = {"-": "red", "+": "green"}.get(sign, "")
        for place, piece in enumerate(hanging(line, console.width - 2)):
            console.print(Text(f"{' ' if place else sign} {piece}", style=style))


def unit_diff(made: Capsule) -> Sequence[tuple[str, str]]:
    """(sign, unit) pairs in the order of the original."""
    import difflib

    from agentopt.capsules import parse

    before = [_line(made.original, unit.start, unit.end) for unit in parse(made.original).units]
    after = [_line(made.text, unit.start, unit.end) for unit in parse(made.text).units]
    signed: list[tuple[str, str]] = []
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for what, one, two, three, four in matcher.get_opcodes():
        if what == "equal":
            signed += [(" ", line) for line in before[one:two]]
        else:
            signed += [("-", line) for line in before[one:two]]
            signed += [("+", line) for line in after[three:four]]
    return signed


def _line(text: str, start: int, end: int) -> str:
    return short(text[start:end], 10_000)
