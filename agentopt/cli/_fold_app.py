"""`agentopt fold ...`: what each command takes. Nothing is imported before a command runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from agentopt.cli._arguments import AsJson, Config, Quiet

fold_app = typer.Typer(
    help="Fold knowledge bases into adapters; ask them.\n\nAnswers come without the facts in the prompt.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
make_app = typer.Typer(
    help="Write tasks to meta-train on.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
fold_app.add_typer(make_app, name="make")

Meta = Annotated[str, typer.Argument(help="folder of `fold train`", metavar="META")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16  [default: float32]")]
Base = Annotated[str | None, typer.Option(help="the base, when it is not where it was")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...  [default: the GPU if there is one]")]


@fold_app.command("train")
def fold_train(
    model: Annotated[
        str | None, typer.Argument(help="embedded, a folder, a .gguf file or a hub id", metavar="MODEL")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", "-t", help="JSONL: facts, question, answer, relevant; or ProofWriter")
    ] = None,
    val: Annotated[str | None, typer.Option(help="validation tasks  [default: 10 % of --tasks]")] = None,
    test: Annotated[str | None, typer.Option(help="tasks used once, at the end  [default: 10 % of --tasks]")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="the META folder")] = None,
    steps: Annotated[int | None, typer.Option(help="[default: 500]")] = None,
    lr: Annotated[float | None, typer.Option(help="of the meta-parameters  [default: 1e-3]")] = None,
    base_lr: Annotated[float | None, typer.Option(help="of the base's weights  [default: --lr]")] = None,
    rates_lr: Annotated[float | None, typer.Option(help="of the inner rates  [default: 10 x --lr]")] = None,
    documents: Annotated[int | None, typer.Option(help="knowledge bases folded per step  [default: 8]")] = None,
    questions: Annotated[int | None, typer.Option(help="asked of each  [default: 4]")] = None,
    accumulate: Annotated[int | None, typer.Option(help="batches per step  [default: 1]")] = None,
    schedule: Annotated[str | None, typer.Option(help="constant, linear or cosine  [default: cosine]")] = None,
    warmup: Annotated[int | None, typer.Option(help="steps until the full rate  [default: 0]")] = None,
    clip: Annotated[float | None, typer.Option(help="largest norm of the meta-gradient  [default: 1]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="[default: 0]")] = None,
    adapts: Annotated[str | None, typer.Option(help="lora or all weights  [default: lora]")] = None,
    trains: Annotated[
        str | None, typer.Option(help="init: the adapters' start; all: the base as well  [default: init]")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="of the adapters  [default: 16]")] = None,
    alpha: Annotated[float | None, typer.Option(help="of the adapters  [default: the rank]")] = None,
    layers: Annotated[int | None, typer.Option(help="adapt so many topmost layers  [default: all]")] = None,
    inner_steps: Annotated[int | None, typer.Option(help="steps that fold a knowledge base  [default: 4]")] = None,
    unroll: Annotated[
        str | None, typer.Option(help="second order through the last so many; 0: none; all  [default: 2]")
    ] = None,
    rule: Annotated[str | None, typer.Option(help="sgd, adamw or normalized  [default: sgd]")] = None,
    inner_lr: Annotated[float | None, typer.Option(help="where the inner rates start  [default: the rule's]")] = None,
    static_lr: Annotated[bool, typer.Option("--static-lr", help="do not learn the inner rates")] = False,
    token_weights: Annotated[bool, typer.Option("--token-weights", help="learn a weight for every token")] = False,
    row_tokens: Annotated[int | None, typer.Option(help="longest row; longer facts are cut  [default: 128]")] = None,
    single_task: Annotated[bool, typer.Option("--single-task", help="train the answer alone, no recall")] = False,
    recall_weight: Annotated[float | None, typer.Option(help="of the recalled facts' loss  [default: 1]")] = None,
    fact_share: Annotated[float | None, typer.Option(help="of it, for the facts as bare rows  [default: 0.1]")] = None,
    guard: Annotated[
        str | None, typer.Option(help="prompts, one a line, whose answers must stay  [default: a few]")
    ] = None,
    guard_weight: Annotated[float | None, typer.Option(help="of keeping them  [default: 0; 1 with --guard]")] = None,
    eval_every: Annotated[int | None, typer.Option(help="steps between validations  [default: 100]")] = None,
    eval_tasks: Annotated[int | None, typer.Option(help="validation tasks looked at  [default: 64]")] = None,
    patience: Annotated[
        int | None, typer.Option(help="validations without a new best; 0: never stop  [default: 0]")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    seed: Annotated[int | None, typer.Option(help="every random draw follows from it  [default: 0]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out; needs nothing else")] = False,
    config: Config = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Meta-train a model to fold; writes META.

    It learns to take up knowledge bases in a few gradient steps. Ctrl-C keeps everything; --resume goes on.
    """
    from agentopt.cli._fold import train_command

    values: dict[str, Any] = {
        "model": model,
        "tasks": tasks,
        "val": val,
        "test": test,
        "out": out,
        "steps": steps,
        "lr": lr,
        "base_lr": base_lr,
        "rates_lr": rates_lr,
        "documents": documents,
        "questions": questions,
        "accumulate": accumulate,
        "schedule": schedule,
        "warmup": warmup,
        "clip": clip,
        "weight_decay": weight_decay,
        "adapts": adapts,
        "trains": trains,
        "rank": rank,
        "alpha": alpha,
        "layers": layers,
        "inner_steps": inner_steps,
        "unroll": unroll,
        "rule": rule,
        "inner_lr": inner_lr,
        "learn_lr": False if static_lr else None,
        "token_weights": True if token_weights else None,
        "row_tokens": row_tokens,
        "multi_task": False if single_task else None,
        "recall_weight": recall_weight,
        "fact_share": fact_share,
        "guard": guard,
        "guard_weight": guard_weight,
        "eval_every": eval_every,
        "eval_tasks": eval_tasks,
        "patience": patience,
        "dtype": dtype,
        "device": device,
        "seed": seed,
    }
    raise typer.Exit(train_command(values, resume=resume, config=config, as_json=as_json, quiet=quiet))


@fold_app.command("apply")
def fold_apply(
    meta: Meta,
    docs: Annotated[
        str | None, typer.Option("--docs", "-d", help="text (a fact a line), .md, .jsonl, or a folder of them")
    ] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="the ADAPTER folder")] = None,
    base: Base = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fold one knowledge base into an adapter.

    Reports what is recalled and what is not, what contradicts, and how to serve it.
    """
    from agentopt.cli._fold_use import apply_command

    raise typer.Exit(apply_command(meta, docs, out, base=base, device=device, as_json=as_json, quiet=quiet))


@fold_app.command("ask")
def fold_ask(
    meta: Meta,
    adapter: Annotated[str, typer.Argument(help="folder of `fold apply`", metavar="ADAPTER")],
    question: Annotated[str | None, typer.Argument(metavar="QUESTION")] = None,
    choices: Annotated[str | None, typer.Option(help="the answers there are, comma-separated")] = None,
    questions: Annotated[
        str | None, typer.Option(help="many: JSONL with question, and choices and answer where known")
    ] = None,
    no_gate: Annotated[bool, typer.Option("--no-gate", help="answer from the adapter however unsure")] = False,
    base: Base = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Answer from a folded knowledge base.

    Where the fold is not sure enough, its facts are read in context, and that is said.
    """
    from agentopt.cli._fold_use import Asked, ask_command

    asked = Asked(meta, adapter, question, choices, questions, gate=not no_gate)
    raise typer.Exit(ask_command(asked, base=base, device=device, as_json=as_json, quiet=quiet))


@fold_app.command("estimate")
def fold_estimate(
    model: Annotated[str, typer.Argument(help="embedded, a folder, a .gguf file or a hub id", metavar="MODEL")],
    context: Annotated[int | None, typer.Option(help="tokens of the knowledge base")] = None,
    questions: Annotated[int | None, typer.Option(help="asked of it")] = None,
    question_tokens: Annotated[int | None, typer.Option(help="tokens of a question  [default: 32]")] = None,
    answer_tokens: Annotated[int | None, typer.Option(help="recalled facts and answer  [default: 8]")] = None,
    inner_steps: Annotated[int | None, typer.Option(help="[default: 4]")] = None,
    rank: Annotated[int | None, typer.Option(help="[default: 16]")] = None,
    layers: Annotated[int | None, typer.Option(help="adapted topmost layers  [default: all]")] = None,
    row_tokens: Annotated[int | None, typer.Option(help="[default: 128]")] = None,
    concurrent: Annotated[int | None, typer.Option(help="questions answered at the same time  [default: 1]")] = None,
    no_measure: Annotated[bool, typer.Option("--no-measure", help="no time, only operations and memory")] = False,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare the cost with reading in context.

    Operations, time and memory of folding, of a cached context, and of re-reading.
    """
    from agentopt.cli._fold_use import estimate_command

    values: dict[str, Any] = {
        "question_tokens": question_tokens,
        "answer_tokens": answer_tokens,
        "inner_steps": inner_steps,
        "rank": rank,
        "layers": layers,
        "row_tokens": row_tokens,
        "concurrent": concurrent,
    }
    code = estimate_command(
        model, context, questions, values, measure=not no_measure, dtype=dtype, device=device, as_json=as_json,
        quiet=quiet,
    )  # fmt: skip
    raise typer.Exit(code)


Out = Annotated[str | None, typer.Option("--out", "-o", help="the JSONL file to write")]
Count = Annotated[int, typer.Option("--count", "-n", help="knowledge bases")]
Seed = Annotated[int, typer.Option(help="every random draw follows from it")]
Nonsense = Annotated[bool, typer.Option("--nonsense", help="words that mean nothing, against what a model knows")]
Style = Annotated[str | None, typer.Option(help="sentences, or plain for models of few words")]
Templates = Annotated[str | None, typer.Option(help="train: all forms but one; test: that one  [default: all]")]
PerTask = Annotated[int | None, typer.Option(help="asked of each knowledge base, at most")]


@make_app.command("rules")
def make_rules(
    count: Count = 1000,
    depth: Annotated[int | None, typer.Option(help="of the deepest proof in a theory  [default: 3]")] = None,
    depths: Annotated[str | None, typer.Option(help="asked, e.g. 2 or 0,1,2  [default: all]")] = None,
    world: Annotated[str | None, typer.Option(help="open (unknown is an answer) or closed  [default: open]")] = None,
    kind: Annotated[str | None, typer.Option(help="attributes, relations or mixed  [default: attributes]")] = None,
    no_negation: Annotated[bool, typer.Option("--no-negation", help="no negations in theories")] = False,
    positive: Annotated[bool, typer.Option("--positive", help="ask no negated statements")] = False,
    facts: Annotated[str | None, typer.Option(help="facts of a theory  [default: 1-16]")] = None,
    rules: Annotated[str | None, typer.Option(help="rules of a theory  [default: 1-8]")] = None,
    distractors: Annotated[
        str | None, typer.Option(help="all: whole theories; 4 or 0-8: a proof and so many others  [default: all]")
    ] = None,
    questions: PerTask = None,
    templates: Templates = None,
    style: Style = None,
    nonsense: Nonsense = False,
    seed: Seed = 0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Rule theories with minimal proofs.

    Facts, rules, and statements that follow from them, are refuted, or stay open.
    """
    from agentopt.cli._fold_make import make_command, numbers_of, range_of

    values: dict[str, Any] = {
        "depth": depth,
        "depths": numbers_of("--depths", depths),
        "world": world,
        "kind": kind,
        "negation": False if no_negation else None,
        "negated": False if positive else None,
        "facts": range_of("--facts", facts, both=True),
        "rules": range_of("--rules", rules, both=True),
        "distractors": distractors if distractors == "all" else range_of("--distractors", distractors),
        "questions": questions,
        "templates": templates,
        "style": style,
        "nonsense": True if nonsense else None,
    }
    raise typer.Exit(make_command("rules", count, seed, values, out, as_json=as_json))


@make_app.command("kinship")
def make_kinship(
    count: Count = 1000,
    hops: Annotated[str | None, typer.Option(help="facts on the path of a question  [default: 2-4]")] = None,
    noise: Annotated[
        str | None, typer.Option(help="none, supporting, irrelevant or disconnected  [default: none]")
    ] = None,
    distractors: Annotated[str | None, typer.Option(help="noise facts  [default: 1 to half the hops]")] = None,
    neutral: Annotated[bool, typer.Option("--neutral", help="answers without gender: grandchild")] = False,
    split: Annotated[
        str | None, typer.Option(help="train or test: 80 / 20 by sequence of relations  [default: all]")
    ] = None,
    questions: PerTask = None,
    templates: Templates = None,
    style: Style = None,
    nonsense: Nonsense = False,
    seed: Seed = 0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Family stories: which relation follows?"""
    from agentopt.cli._fold_make import make_command, range_of

    values: dict[str, Any] = {
        "hops": range_of("--hops", hops),
        "noise": noise,
        "distractors": range_of("--distractors", distractors),
        "gendered": False if neutral else None,
        "split": split,
        "questions": questions,
        "templates": templates,
        "style": style,
        "nonsense": True if nonsense else None,
    }
    raise typer.Exit(make_command("kinship", count, seed, values, out, as_json=as_json))


@make_app.command("chains")
def make_chains(
    count: Count = 1000,
    depth: Annotated[str | None, typer.Option(help="rules on the chain of a question  [default: 2]")] = None,
    distractors: Annotated[str | None, typer.Option(help="other statements, e.g. 6 or 0-6  [default: 0]")] = None,
    ask: Annotated[str | None, typer.Option(help="end: which attribute; statement: yes or no  [default: end]")] = None,
    names: Annotated[int | None, typer.Option(help="different names  [default: 8]")] = None,
    attributes: Annotated[int | None, typer.Option(help="different attributes  [default: 16]")] = None,
    questions: PerTask = None,
    style: Annotated[str | None, typer.Option(help="plain or sentences  [default: plain]")] = None,
    nonsense: Nonsense = False,
    seed: Seed = 0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """The smallest tasks, for models of few words.

    bob is red, red is round, round is kind: bob is ...?
    """
    from agentopt.cli._fold_make import make_command, range_of

    values: dict[str, Any] = {
        "depth": range_of("--depth", depth),
        "distractors": range_of("--distractors", distractors),
        "ask": ask,
        "names": names,
        "attributes": attributes,
        "questions": questions,
        "style": style,
        "nonsense": True if nonsense else None,
    }
    raise typer.Exit(make_command("chains", count, seed, values, out, as_json=as_json))
