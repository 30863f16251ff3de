"""The commands and the one place where an error becomes an exit code.

Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted. A user's mistake is one sentence on stderr; only a
defect of agentopt itself shows a stack trace. Importing this module must stay under 0.3 s, so every command imports
what it needs inside its body.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from agentopt.cli._arguments import AsJson, Config, Quiet, Run, Store
from agentopt.cli._fold_app import fold_app
from agentopt.cli._runs_app import runs_app, trace_app
from agentopt.cli._serve_app import serve_app
from agentopt.errors import AgentoptError, UserError

app = typer.Typer(
    name="agentopt",
    help="Record an agent's run, send feedback backward, keep only edits that are measured to help.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(runs_app, name="runs")
app.add_typer(trace_app, name="trace")
app.add_typer(fold_app, name="fold")
app.add_typer(serve_app, name="serve")

Target = Annotated[str | None, typer.Argument(help="file.py:function or package.module:function", metavar="TARGET")]
Data = Annotated[str | None, typer.Option(help="JSONL, CSV or Parquet file")]
Train = Annotated[
    str | None, typer.Option(help="JSONL, CSV or Parquet; x.trace.jsonl; captured[:MODEL] for what was served")
]
Metric = Annotated[str | None, typer.Option("--metric", "-m", help="exact_match, contains, f1, ... or module:function")]
Columns = Annotated[str | None, typer.Option(help="columns passed to the target, comma-separated")]
Models = Annotated[
    list[str] | None, typer.Option("--model", metavar="ROLE=MODEL", help="e.g. agent=openai/gpt-4.1-mini; repeatable")
]
Label = Annotated[str | None, typer.Option(help="column that holds the expected answer")]
OutputField = Annotated[str | None, typer.Option(help="field of the output that the metric reads")]
Concurrency = Annotated[int | None, typer.Option(help="examples run at the same time  [default: 8]")]
Timeout = Annotated[float | None, typer.Option(help="seconds one example may take  [default: 120]")]
Repeats = Annotated[int | None, typer.Option(help="runs per example  [default: 1]")]
Executor = Annotated[
    str | None, typer.Option(help="local, ray (a cluster on this machine) or ray://HOST:PORT  [default: local]")
]
Workers = Annotated[int | None, typer.Option(help="processes of the ray executor  [default: one per CPU]")]
Sandbox = Annotated[
    str | None, typer.Option(help="where changed code runs: auto, process, namespace, container  [default: auto]")
]

# typer carries its own copy of click since 0.20 or so; the base of its errors is found from an error it exports.
UsageProblem: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def run() -> None:
    """Run the command line and exit with its code."""
    code: object = 0
    try:
        code = app(args=_spread_models(sys.argv[1:]), standalone_mode=False)
    except UserError as error:
        _fail(str(error), error.exit_code)
    except AgentoptError as error:
        _fail(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except UsageProblem as error:
        error.show()
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    if code == 130:  # raised above, or caught by typer and given back as the exit code
        _fail("interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _spread_models(arguments: list[str]) -> list[str]:
    """`--model agent=A optimizer=B` reads as two --model options, the way a person writes it."""
    spread: list[str] = []
    after_model = False
    for argument in arguments:
        role, sign, _ = argument.partition("=")
        if after_model and sign and role.isidentifier() and spread[-1] != "--model":
            spread.append("--model")
        after_model = argument == "--model" or (after_model and bool(sign) and role.isidentifier())
        spread.append(argument)
    return spread


def _fail(message: str, code: int) -> None:
    typer.echo(f"agentopt: {message}", err=True)
    sys.exit(code)


def _pairs(items: list[str] | None, option: str, example: str) -> dict[str, str]:
    """`name=value` items; several may stand in one value, separated by spaces or commas."""
    pairs: dict[str, str] = {}
    for item in items or []:
        for part in item.replace(",", " ").split():
            key, sign, value = part.partition("=")
            if not sign or not key or not value:
                raise UserError(f"{option} {part!r}: expected name=value, for example {example}.")
            pairs[key] = value
    return pairs


def _commas(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


@app.command()
def tune(
    target: Target = None,
    train: Train = None,
    val: Data = None,
    test: Data = None,
    metric: Metric = None,
    inputs: Columns = None,
    label: Label = None,
    output_field: OutputField = None,
    config: Config = None,
    model: Models = None,
    budget: Annotated[str | None, typer.Option(help="rollouts=600,usd=2; also tokens, proposals, minutes")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="auto, reflection, optoprime, symbolic, ... (docs/optimizers.md); a+b take turns")
    ] = None,
    driver: Annotated[
        str | None, typer.Option(help="auto, greedy, climb, beam, ucb, pareto, bayes or islands; auto says why")
    ] = None,
    objectives: Annotated[
        str | None, typer.Option(help="score,cost,tokens,latency: what counts besides the score")
    ] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option("--tune", metavar="GLOB", help="tune only what matches, frozen or not; repeatable"),
    ] = None,
    freeze: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="leave parameters that match alone; repeatable")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="every random draw follows from it  [default: 0]")] = None,
    concurrency: Concurrency = None,
    timeout: Timeout = None,
    repeats: Repeats = None,
    screen_size: Annotated[int | None, typer.Option(help="examples a proposal is screened on  [default: 16]")] = None,
    template: Annotated[str | None, typer.Option(help="file that replaces the optimizer's meta-prompt")] = None,
    allow_effects: Annotated[bool, typer.Option("--allow-effects", help="let tools with effects run for real")] = False,
    no_capture: Annotated[bool, typer.Option("--no-capture", help="no loopback endpoint for OpenAI clients")] = False,
    resume: Annotated[str | None, typer.Option(help="continue this run; nothing already paid for is repeated")] = None,
    executor: Executor = None,
    workers: Workers = None,
    sandbox: Sandbox = None,
    store: Store = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Tune TARGET on your data; keep what is measured to help. Ends with one honest held-out figure."""
    from agentopt.cli._tune import tune_command

    overrides: dict[str, Any] = {
        "target": target,
        "train": train,
        "val": val,
        "test": test,
        "metric": metric,
        "inputs": _commas(inputs),
        "label": label,
        "output_field": output_field,
        "models": _pairs(model, "--model", "agent=openai/gpt-4.1-mini"),
        "budget": _pairs([budget], "--budget", "rollouts=600") if budget else None,
        "optimizer": optimizer,
        "driver": driver,
        "objectives": _commas(objectives),
        "tune": tune,
        "freeze": freeze,
        "seed": seed,
        "concurrency": concurrency,
        "timeout": timeout,
        "repeats": repeats,
        "screen_size": screen_size,
        "template": template,
        "allow_effects": True if allow_effects else None,
        "capture": False if no_capture else None,
        "executor": executor,
        "workers": workers,
        "sandbox": sandbox,
        "store": store,
    }
    raise typer.Exit(tune_command(config, overrides, resume=resume, as_json=as_json, quiet=quiet))


@app.command()
def evaluate(
    target: Target = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="JSONL, CSV or Parquet  [default: test of the config]")
    ] = None,
    metric: Metric = None,
    inputs: Columns = None,
    label: Label = None,
    output_field: OutputField = None,
    candidate: Annotated[str | None, typer.Option(help="a best.json; default: the declared values")] = None,
    config: Config = None,
    model: Models = None,
    concurrency: Concurrency = None,
    timeout: Timeout = None,
    repeats: Repeats = None,
    executor: Executor = None,
    workers: Workers = None,
    sandbox: Sandbox = None,
    store: Store = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score TARGET on a data set, with interval, errors and cost."""
    from agentopt.cli._evaluate import evaluate_command

    overrides: dict[str, Any] = {
        "target": target,
        "test": data,
        "metric": metric,
        "inputs": _commas(inputs),
        "label": label,
        "output_field": output_field,
        "models": _pairs(model, "--model", "agent=openai/gpt-4.1-mini"),
        "concurrency": concurrency,
        "timeout": timeout,
        "repeats": repeats,
        "executor": executor,
        "workers": workers,
        "sandbox": sandbox,
        "store": store,
    }
    raise typer.Exit(evaluate_command(config, overrides, candidate=candidate, as_json=as_json, quiet=quiet))


@app.command()
def capsule(
    source: Annotated[str, typer.Argument(help="file, folder, rows.jsonl, - for stdin, or cap:HANDLE", metavar="FILE")],
    budget: Annotated[int | None, typer.Option("--budget", "-b", help="tokens the result may have")] = None,
    tokenizer: Annotated[
        str, typer.Option(help="tiktoken name, tokenizer.json, model folder, GGUF, URL, bytes or words")
    ] = "o200k_base",
    query: Annotated[str | None, typer.Option(help="what the reader will be asked")] = None,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", metavar="REGEX", help="what matches is never dropped; repeatable")
    ] = None,
    mode: Annotated[str, typer.Option(help="auto, extract, rewrite or trained")] = "auto",
    model: Annotated[str | None, typer.Option("--model", help="the model that rewrites, e.g. openai/gpt-4.1")] = None,
    template: Annotated[str | None, typer.Option(help="file that replaces what the rewriting model is told")] = None,
    trained: Annotated[
        str | None, typer.Option(help="trained capsulator: its folder, or a unit policy's .json")
    ] = None,
    task: Annotated[str | None, typer.Option(help="agentopt.toml: rows, program, metric for the gate")] = None,
    parameter: Annotated[str | None, typer.Option(help="the program's prompt that FILE is  [default: found]")] = None,
    margin: Annotated[float, typer.Option(help="how much lower the score may be before it is harm")] = 0.05,
    undecided: Annotated[str, typer.Option(help="recommend original or capsule when data cannot tell")] = "original",
    calls: Annotated[int | None, typer.Option(help="reckon the cost over this many calls of --price")] = None,
    price: Annotated[str | None, typer.Option(help="provider/model whose prices and caching are used")] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="static, query or tail  [default: query with --query, else static]"),
    ] = None,
    output_tokens: Annotated[float, typer.Option(min=0, metavar="N", help="tokens of one answer, for the cost")] = 0.0,
    cluster: Annotated[str | None, typer.Option(help="column of --task whose equal rows count as one")] = None,
    sequential: Annotated[bool, typer.Option("--sequential", help="let the gate stop early, without bias")] = False,
    scorer: Annotated[str, typer.Option(help="auto, bm25, coverage or embedding")] = "auto",
    seed: Annotated[int, typer.Option(help="every random draw follows from it")] = 0,
    out: Annotated[str | None, typer.Option("--out", "-o", help="write here; needed for many files")] = None,
    concurrency: Annotated[int, typer.Option(min=1, metavar="N", help="files made at the same time")] = 4,
    store: Annotated[str | None, typer.Option("--store", help="SQLite file that keeps capsules and originals")] = None,
    as_json: AsJson = False,
    diff: Annotated[bool, typer.Option("--diff", help="show what left, what is new, what stayed")] = False,
    quiet: Quiet = False,
) -> None:
    """Make prompts, requests or files shorter: a hard token budget. Protected spans stay; harm and cost are told."""
    from agentopt.cli._capsule import CapsuleArguments, capsule_command

    arguments = CapsuleArguments(
        source=source,
        budget=budget,
        tokenizer=tokenizer,
        query=query,
        keep=tuple(keep or ()),
        mode=mode,
        model=model,
        template=template,
        trained=trained,
        task=task,
        parameter=parameter,
        margin=margin,
        undecided=undecided,
        calls=calls,
        price=price,
        prefix=prefix,
        output_tokens=output_tokens,
        cluster=cluster,
        sequential=sequential,
        scorer=scorer,
        seed=seed,
        out=out,
        concurrency=concurrency,
        store=store,
        as_json=as_json,
        diff=diff,
        quiet=quiet,
    )
    raise typer.Exit(capsule_command(arguments))


@app.command()
def finetune(
    model: Annotated[
        str | None, typer.Argument(help="embedded, a folder, a .gguf file or a hub id", metavar="MODEL")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="JSONL rows with answers")] = None,
    val: Annotated[str | None, typer.Option(help="validation rows  [default: 25 % of --data]")] = None,
    test: Annotated[str | None, typer.Option(help="test rows  [default: 25 % of --data]")] = None,
    prompt: Annotated[str | None, typer.Option(help='what precedes the answer, e.g. "{text} It was"')] = None,
    labels: Annotated[str | None, typer.Option(help='a word for each label, e.g. "0=terrible,1=great"')] = None,
    kind: Annotated[str | None, typer.Option(help="auto, classification, choice or generation")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt into the model's chat template")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="longest row in tokens  [default: 512]")] = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="see --list-methods  [default: mezo]")] = None,
    tune: Annotated[str | None, typer.Option(help="full, lora or prefix  [default: full]")] = None,
    steps: Annotated[int | None, typer.Option(help="[default: 500]")] = None,
    lr: Annotated[str | None, typer.Option(help="a number, or auto to measure it  [default: the method's]")] = None,
    eps: Annotated[float | None, typer.Option(help="length of a probe  [default: the method's]")] = None,
    density: Annotated[float | None, typer.Option(help="share of the weights that a mask trains")] = None,
    mask_update: Annotated[str | None, typer.Option(help="fixed, dynamic or stored  [default: the method's]")] = None,
    population: Annotated[int | None, typer.Option(help="directions per step")] = None,
    batch: Annotated[int | None, typer.Option(help="rows per step  [default: 16]")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="rows per forward pass  [default: the batch]")] = None,
    objective: Annotated[
        str | None, typer.Option(help="loss, accuracy, a metric or module:function  [default: loss]")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(help="tokens of a generated answer  [default: 16]")] = None,
    schedule: Annotated[str | None, typer.Option(help="constant, linear or cosine  [default: constant]")] = None,
    warmup: Annotated[int | None, typer.Option(help="steps until the full rate  [default: 0]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="[default: 0]")] = None,
    eval_every: Annotated[int | None, typer.Option(help="steps between validations  [default: 100]")] = None,
    patience: Annotated[
        int | None, typer.Option(help="validations without a new best; 0: never stop  [default: 3]")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="of a LoRA adapter  [default: 8]")] = None,
    prefix_tokens: Annotated[int | None, typer.Option(help="length of a prefix  [default: 5]")] = None,
    quantize_base: Annotated[str | None, typer.Option(help="int8: the frozen base in a quarter of the memory")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16  [default: float32]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...  [default: the GPU if there is one]")] = None,
    seed: Annotated[int | None, typer.Option(help="every random draw follows from it  [default: 0]")] = None,
    workers: Annotated[int | None, typer.Option(help="processes that share each step  [default: 1]")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="folder for model, log and report")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out; needs nothing else")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="also write the model with the LoRA adapter in it")] = False,
    list_methods: Annotated[bool, typer.Option("--list-methods", help="show the methods and exit")] = False,
    config: Config = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune MODEL on rows, without gradients or with. Inference memory, a resumable log, one honest claim."""
    from agentopt.cli._finetune import finetune_command

    values: dict[str, Any] = {
        "model": model,
        "data": data,
        "val": val,
        "test": test,
        "prompt": prompt,
        "labels": labels,
        "kind": kind,
        "chat": True if chat else None,
        "max_tokens": max_tokens,
        "method": method,
        "tune": tune,
        "steps": steps,
        "lr": lr,
        "eps": eps,
        "density": density,
        "mask_update": mask_update,
        "population": population,
        "batch": batch,
        "micro_batch": micro_batch,
        "objective": objective,
        "new_tokens": new_tokens,
        "schedule": schedule,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "eval_every": eval_every,
        "patience": patience,
        "rank": rank,
        "prefix_tokens": prefix_tokens,
        "quantize_base": quantize_base,
        "dtype": dtype,
        "device": device,
        "seed": seed,
        "workers": workers,
        "merge": True if merge else None,
    }
    code = finetune_command(
        values, folder=out, resume=resume, list_methods=list_methods, config=config, as_json=as_json, quiet=quiet
    )
    raise typer.Exit(code)


@app.command()
def quantize(
    model: Annotated[
        str | None, typer.Argument(help="embedded, a folder, a .gguf file, a hub id or a .ggz archive", metavar="MODEL")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", "-f", help="rf8-gg, rf8, rf8-strict, e3m4, fp8 or int8  [default: rf8-gg]"),
    ] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="the new folder; with --archive the .ggz file")] = None,
    calibrate: Annotated[
        str | None, typer.Option(help="text (.txt, or .jsonl with text): weighs columns, then measures perplexity")
    ] = None,
    calibrate_tokens: Annotated[int | None, typer.Option(help="tokens of it that are read  [default: 16384]")] = None,
    report: Annotated[str | None, typer.Option(help="an HTML page: every layer, histograms, depth, books")] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", metavar="NAME", help="leave these layers: a name or parts of one; repeatable"),
    ] = None,
    head: Annotated[bool, typer.Option("--head", help="also the output head (and the embedding tied to it)")] = False,
    scale: Annotated[
        str | None, typer.Option(help="channel, or tensor_pow2 for rf8 and rf8-strict  [default: channel]")
    ] = None,
    no_refine: Annotated[bool, typer.Option("--no-refine", help="rf8-gg: books of the formula, not fitted")] = False,
    dynamic_activations: Annotated[
        bool, typer.Option("--dynamic-activations", help="fp8, int8: servers quantize activations too, as they run")
    ] = False,
    shard_size: Annotated[str | None, typer.Option(help="largest file, e.g. 500MB  [default: 1GiB]")] = None,
    archive: Annotated[bool, typer.Option("--archive", help="pack MODEL into --out x.ggz, or unpack a .ggz")] = False,
    step: Annotated[str | None, typer.Option(help="archive: distance of two levels, e.g. 2^-10")] = None,
    sqnr: Annotated[float | None, typer.Option(help="archive: decibels of every tensor  [default: 42]")] = None,
    lossless: Annotated[bool, typer.Option("--lossless", help="archive: bit for bit")] = False,
    dtype: Annotated[str | None, typer.Option(help="unpack to bfloat16, ...  [default: as it was]")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="only read the checksums of a .ggz")] = False,
    seed: Annotated[int | None, typer.Option(help="of the rows that are sampled for the books  [default: 0]")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="print every layer, however many")] = False,
    config: Config = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write MODEL with a byte per weight, or as an archive. For transformers, peft and vLLM alike.

    Ctrl-C keeps every complete file; the same command goes on. A folder that is done is shown again without --out.
    """
    from agentopt.cli._quantize import quantize_command

    values: dict[str, Any] = {
        "model": model,
        "format": format,
        "out": out,
        "calibrate": calibrate,
        "calibrate_tokens": calibrate_tokens,
        "report": report,
        "skip": skip or None,
        "head": True if head else None,
        "scale": scale,
        "refine": False if no_refine else None,
        "dynamic_activations": True if dynamic_activations else None,
        "shard_size": shard_size,
        "archive": True if archive else None,
        "step": step,
        "sqnr": sqnr,
        "lossless": True if lossless else None,
        "dtype": dtype,
        "verify": True if verify else None,
        "seed": seed,
    }
    raise typer.Exit(quantize_command(values, tensors=tensors, config=config, as_json=as_json, quiet=quiet))


@app.command()
def export(
    run: Run,
    out: Annotated[str, typer.Option("--out", "-o", help="file to write; .json or .toml")] = "best.json",
    candidate: Annotated[str, typer.Option(help="best, baseline, or a candidate hash")] = "best",
    store: Store = None,
) -> None:
    """Write a candidate as a plain file. A program loads it without a store: ao.load(FILE).install()."""
    from agentopt.cli._runs import export_candidate

    export_candidate(run, out, candidate, store)


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="install what the main job needs and lacks")] = False,
    no_engine: Annotated[bool, typer.Option("--no-engine", help="do not time the embedded engine")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what is installed and what is missing. Names the command that fixes it; times the embedded engine."""
    from agentopt.cli._doctor import doctor_command

    raise typer.Exit(doctor_command(fix=fix, engine=not no_engine, as_json=as_json))


@app.callback(invoke_without_command=True)
def _root(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[bool, typer.Option("--version", help="print the version and exit", is_eager=True)] = False,
) -> None:
    """Record an agent's run, send feedback backward, keep only edits that are measured to help."""
    if version:
        import agentopt

        typer.echo(f"agentopt {agentopt.__version__}")
        raise typer.Exit(0)
