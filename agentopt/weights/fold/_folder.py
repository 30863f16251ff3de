"""The folder: it learns how to fold, folds knowledge bases into adapters, and answers questions with them.

    with Folder("embedded", rank=8, layers=4) as folder:
        folder.meta_train(tasks, out="meta")
        adapter = folder.fold(["Anne is kind.", "Kind people are nice."])
        print(folder.ask(adapter, "Is Anne nice?", choices=["yes", "no"]).text)

RECKONING (arXiv 2305.06349) with `adapts="all"`, PERK (arXiv 2507.06415) with LoRA factors on a frozen base.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from agentopt.errors import UserError
from agentopt.weights import load
from agentopt.weights.finetuning import Stop
from agentopt.weights.fold import _files as files
from agentopt.weights.fold._adapter import Adapter
from agentopt.weights.fold._answers import Answer
from agentopt.weights.fold._asking import answer_pairs
from agentopt.weights.fold._chat import chat_template
from agentopt.weights.fold._codec import Codec
from agentopt.weights.fold._encoding import Encoder, check_tasks
from agentopt.weights.fold._events import Event
from agentopt.weights.fold._folding import fold_bases
from agentopt.weights.fold._gate import Gate
from agentopt.weights.fold._incontext import InContext, Prefix, window_of
from agentopt.weights.fold._kit import MAX_NEW, Kit
from agentopt.weights.fold._measuring import measure
from agentopt.weights.fold._result import MetaResult
from agentopt.weights.fold._scores import FoldScores
from agentopt.weights.fold._types import FoldOptions, FoldTask, MetaOptions, Question, options_from
from agentopt.weights.load import need

_PREFIXES = 8
"""Contexts whose keys and values are kept for adapters that fell back."""


class Folder:
    """A base model with the meta-parameters to fold knowledge into it; a context manager.

    Args:
        base: a model of transformers, or a name or path as `load.model` takes it.
        tokenizer: needed with a model; otherwise the base's own.
        options: what is adapted and how; see `FoldOptions`.
        device: where a named base is loaded.
        dtype: as what a named base is loaded.
        fields: options by name, in place of `options`.

    Raises:
        UserError: an option that does not fit the model, or a model without a tokenizer.
    """

    def __init__(
        self,
        base: Any,
        tokenizer: Any = None,
        *,
        options: FoldOptions | None = None,
        device: Any = None,
        dtype: Any = None,
        **fields: Any,
    ) -> None:
        need("torch")
        self.options = _options(FoldOptions, options, fields, "fold")
        if isinstance(base, (str, Path)):
            self.base_name: str | None = str(base)
            self.model, own = load.model(base, device=device, dtype=dtype)
            tokenizer = tokenizer or own
        else:
            self.base_name = getattr(getattr(base, "config", None), "_name_or_path", None) or None
            self.model = base
        if tokenizer is None:
            raise UserError("fold: found a model without a tokenizer, expected Folder(model, tokenizer).")
        self.tokenizer = tokenizer
        self.path: Path | None = None
        """The META folder, once there is one."""
        self.gate: Gate | None = None
        """Thresholds under which questions are answered in context; None for no gate."""
        self.result: MetaResult | None = None
        """Of the meta-training."""
        self._prefixes: OrderedDict[Adapter, Prefix] = OrderedDict()
        self.lock = threading.RLock()
        """Held by clients while they use the folder: its model computes with one set of adapters at a time."""
        self._names: dict[str, Any] = dict(self.model.named_parameters())
        self._kit: Kit | None = self._make_kit()
        self.base_hash = files.base_hash(self._names, self.kit)

    def _make_kit(self) -> Kit:
        from agentopt.weights.fold._engine import make_engine
        from agentopt.weights.fold._meta import new_meta

        codec = Codec(self.tokenizer, self.options.format, multi_task=self.options.multi_task)
        if len(codec.lead) + 1 >= self.options.row_tokens:
            raise UserError(f"fold: row_tokens is {self.options.row_tokens}, expected more than begin of text needs.")
        engine = make_engine(self.model, self.options)
        try:
            return Kit(engine, new_meta(engine, self.options), Encoder(codec, self.options.row_tokens), self.options)
        except BaseException:  # out of memory, Ctrl-C: nobody has a folder to close
            engine.close()
            raise

    def __repr__(self) -> str:
        where = self.base_name or type(self.model).__name__
        return f"Folder({where!r}, adapts={self.options.adapts!r}, inner_steps={self.options.inner_steps})"

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the model back as it was; adapters that were not saved can no longer be asked."""
        if self._kit is not None:
            self._kit.engine.close()
            self._kit = None
            self._prefixes.clear()

    @property
    def kit(self) -> Kit:
        """Engine, meta-parameters and encoder.

        Raises:
            UserError: the folder is closed.
        """
        if self._kit is None:
            raise UserError("fold: this folder is closed; make a new one.")
        return self._kit

    @property
    def codec(self) -> Codec:
        """Tokenizer and format."""
        return self.kit.codec

    @property
    def engine(self) -> Any:
        """What computes with adapted tensors."""
        return self.kit.engine

    @property
    def meta(self) -> Any:
        """What meta-training learns."""
        return self.kit.meta

    @property
    def chat_template(self) -> str:
        """Jinja that makes of chat turns the prompt this folder was trained with, for servers; also a file in META."""
        return chat_template(self.codec)

    @property
    def meta_hash(self) -> str:
        """A name for options and meta-parameters."""
        return files.meta_hash(self.kit, self.base_hash)

    # --- meta-training -----------------------------------------------------------------------------------------------

    def meta_train(
        self,
        tasks: Sequence[FoldTask],
        *,
        val: Sequence[FoldTask] | None = None,
        options: MetaOptions | None = None,
        guard: Sequence[str] = (),
        out: str | Path | None = None,
        resume: bool = False,
        on_event: Callable[[Event], None] | None = None,
        stop: Stop | None = None,
        **fields: Any,
    ) -> MetaResult:
        """Learn to fold, from knowledge bases with questions; this folder then has the best meta-parameters.

        Args:
            tasks: to train on.
            val: to choose by; None holds out a tenth of the tasks, drawn by the seed.
            options: see `MetaOptions`.
            guard: unrelated texts for `guard_weight`; none for a few built-in sentences.
            out: the META folder to write; the same call again goes on with an interrupted run, to the same bits.
            resume: expect a run in `out`.
            on_event: told of everything as it happens.
            stop: set its `wanted` to end after the step that is being made, with everything kept.
            fields: options by name, in place of `options`.

        Raises:
            UserError: tasks, options or folder do not fit.
            RunError: losses are no numbers, or the disk is full.
            KeyboardInterrupt: `stop.wanted` was set.
        """
        from agentopt.weights.fold._training import meta_train

        wanted = _options(MetaOptions, options, fields, "meta_train")
        tell = on_event or _silent
        self.result = meta_train(self, tasks, val, wanted, guard, out, tell, stop or Stop(), resume=resume)
        self._prefixes.clear()
        return self.result

    # --- folding -----------------------------------------------------------------------------------------------------

    def fold(self, docs: Sequence[str]) -> Adapter:
        """Write a knowledge base into an adapter.

        Args:
            docs: facts, a sentence each; a text longer than a row is cut, and told in `Adapter.warnings`.

        Raises:
            UserError: no documents, or an empty one.
            RunError: the inner loop is no longer finite.
        """
        return self.fold_many([docs])[0]

    def fold_many(self, bases: Sequence[Sequence[str]], *, documents: int = 8) -> list[Adapter]:
        """Fold several knowledge bases, at most `documents` at once; long ones by themselves."""
        return fold_bases(self, bases, documents)

    def judge(self, adapter: Adapter) -> None:
        """Say whether the gate takes an adapter."""
        if self.gate is None:
            adapter.reason = "no gate: meta-training has not calibrated one"
            return
        decision = self.gate.adapter(adapter.recall, adapter.recall_before)
        adapter.accepted, adapter.reason, adapter.threshold = decision.accepted, decision.reason, self.gate.recall

    # --- asking ------------------------------------------------------------------------------------------------------

    def ask(
        self,
        adapter: Adapter,
        question: str | Question,
        *,
        choices: Sequence[str] = (),
        context: Sequence[str] = (),
        gate: bool = True,
        max_new: int | None = None,
    ) -> Answer:
        """Answer a question from a folded knowledge base, without its facts in the prompt.

        Args:
            adapter: of `fold` or `load_adapter`.
            question: a text, or a question with choices of its own.
            choices: the answers there are; the likeliest is given. Without, what the model writes.
            context: lines before the question that are not folded, such as instructions.
            gate: where the gate does not trust fold or answer, read the facts in context instead, and say so.
            max_new: most tokens of recalled facts, and of an answer; None for what meta-training saw.

        Raises:
            UserError: an adapter for another base, or an empty question.
        """
        return self.ask_many(adapter, [question], choices=choices, context=context, gate=gate, max_new=max_new)[0]

    def ask_many(
        self,
        adapter: Adapter,
        questions: Sequence[str | Question],
        *,
        choices: Sequence[str] = (),
        context: Sequence[str] = (),
        gate: bool = True,
        max_new: int | None = None,
    ) -> list[Answer]:
        """Answer several questions from one knowledge base, each after the same context."""
        asked = [_question(one, choices) for one in questions]
        return self.ask_pairs([(adapter, one) for one in asked], context=context, gate=gate, max_new=max_new)

    def ask_pairs(
        self,
        pairs: Sequence[tuple[Adapter, str | Question]],
        *,
        context: Sequence[str] = (),
        gate: bool = True,
        max_new: int | None = None,
    ) -> list[Answer]:
        """Answer questions from several knowledge bases, their adapters side by side in one batch."""
        asked = [(adapter, _question(question, ())) for adapter, question in pairs]
        for adapter in dict.fromkeys(adapter for adapter, _ in asked):
            self._check_mine(adapter)
        if isinstance(context, str):
            raise UserError("ask: found one text as context, expected a list of lines: context=[text].")
        return answer_pairs(self, asked, context, gate=gate, max_new=max_new)

    def reader(self, max_new: int | None = None) -> InContext:
        """What reads the facts where the gate does not trust a fold: the base, which answers at once.

        Ask it within `base_in_use`.
        """
        most = max_new or self.kit.max_new
        return InContext(self.model, self.tokenizer, format=self.options.format, multi_task=False, max_new=most)

    def base_in_use(self) -> Any:
        """Within, `model` computes as the base does (as meta-training left it)."""
        return self.engine.using({} if self.options.adapts == "lora" else self.meta.init)

    def prefix(self, adapter: Adapter) -> Prefix:
        """Keys and values of an adapter's facts, read once; within `base_in_use`."""
        if adapter not in self._prefixes:
            self._prefixes[adapter] = self.reader().prefix(adapter.facts)
            while len(self._prefixes) > _PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(adapter)
        return self._prefixes[adapter]

    def _check_mine(self, adapter: Adapter) -> None:
        if adapter.base_hash != self.base_hash:
            raise UserError(
                f"adapter: it was folded for another base (hash {adapter.base_hash[:12]}, this one has "
                f"{self.base_hash[:12]}); fold its documents again with this folder."
            )

    # --- measuring ---------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        tasks: Sequence[FoldTask],
        *,
        questions: int | None = None,
        documents: int = 16,
        max_new: int | None = None,
    ) -> FoldScores:
        """Fold every task and ask its questions, without the gate.

        Args:
            tasks: knowledge bases with questions.
            questions: at most so many of each, the first ones; None for all.
            documents: folded at once.
            max_new: most tokens of recalled facts, and of an answer; None for what meta-training saw.

        Raises:
            UserError: no tasks, or one that cannot be asked.
        """
        check_tasks(tasks, "evaluate")
        return measure(self.kit, tasks, questions=questions, documents=documents, max_new=max_new).scores

    # --- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write a META folder; `Folder.load` reads it.

        Raises:
            RunError: it cannot be written.
        """
        folder = Path(path).expanduser()
        kit = self.kit
        head = {
            "options": self.options.model_dump(mode="json"),
            "base": {
                "name": self.base_name,
                "hash": self.base_hash,
                "dtype": str(next(iter(self._names.values())).dtype).removeprefix("torch."),
                "own": bool(files.base_weights(kit)),
            },
            "meta_hash": self.meta_hash,
            "gate": None if self.gate is None else self.gate.to_dict(),
            "max_new": kit.max_new,
            "result": None if self.result is None else self.result.to_dict(),
        }
        files.save_meta(folder, kit, self.tokenizer, head)
        self.path = folder
        return folder

    @classmethod
    def load(cls, path: str | Path, *, base: Any = None, tokenizer: Any = None, device: Any = None) -> Folder:
        """The folder of a META folder.

        Args:
            path: of `save`, or the `out` of meta-training.
            base: the base, when it is not where it was, or not to be loaded again.
            tokenizer: in place of the stored one.
            device: where a named base is loaded.

        Raises:
            UserError: no META folder, or the base is another one than it was.
        """
        folder = Path(path).expanduser()
        head = files.read_meta(folder)
        own, about = head["base"]["own"], head["base"]
        if base is None:
            base = folder / files.BASE if own else about["name"]
        if base is None:
            raise UserError(f"{path}: its base was a model without a name; give it: Folder.load(path, base=model).")
        options = options_from(FoldOptions, head["options"], str(folder / files.META))
        tokenizer = tokenizer or files.read_tokenizer(folder)
        found = cls(base, tokenizer, options=options, device=device, dtype=None if own else about["dtype"])
        if found.base_hash != about["hash"]:
            found.close()
            raise UserError(
                f"{path}: it was trained for another base (hash {about['hash'][:12]}, {str(about['name'])!r}); this "
                f"one has {found.base_hash[:12]}."
            )
        found.base_name = about["name"]
        try:
            found.restore(folder, head)
        except BaseException:
            found.close()
            raise
        return found

    def restore(self, folder: Path, head: dict[str, Any]) -> None:
        """Take meta-parameters, thresholds and summary of a META folder for this base."""
        kit = self.kit
        kit.meta.load_state_dict({**kit.meta.state_dict(), **files.read_init(folder)})
        kit.max_new = int(head.get("max_new", MAX_NEW))
        self.gate = None if head["gate"] is None else Gate.from_dict(head["gate"])
        self.result = None if head["result"] is None else MetaResult.from_dict(head["result"], str(folder))
        self.path = folder

    def load_adapter(self, path: str | Path) -> Adapter:
        """An adapter that was saved; `accepted` is what this folder's gate says.

        Raises:
            UserError: no adapter, or one for another base.
        """
        adapter = files.read_adapter(path, self.kit, self.base_hash)
        adapter.write = self.write_adapter
        self.judge(adapter)
        if adapter.meta_hash != self.meta_hash:
            adapter.reason += "; other meta-parameters folded it, so the gate's thresholds may not suit it"
        return adapter

    def write_adapter(self, adapter: Adapter, path: Path) -> None:
        """What `Adapter.save` does."""
        kit = self.kit
        self._check_mine(adapter)
        base = None
        if files.base_weights(kit) and self.options.adapts == "lora":
            if self.path is None:
                raise UserError(
                    "adapter: its base was trained and is not on disk yet; save the folder first: save(META)."
                )
            base = str((self.path / files.BASE).resolve())
        gate = None if self.gate is None else self.gate.to_dict()
        files.save_adapter(adapter, path, kit, self.tokenizer, base, {"thresholds": gate, "base": self.base_name})

    @property
    def total(self) -> int:
        """Weights of the base."""
        return sum(tensor.numel() for tensor in self._names.values())

    def window(self) -> int | None:
        """Most tokens that the base reads."""
        return window_of(self.model.config)

    def renamed_base(self) -> None:
        """Meta-training has moved the base's weights: it has another hash now."""
        self.base_hash = files.base_hash(self._names, self.kit)


def _options(kind: Any, given: Any, fields: dict[str, Any], place: str) -> Any:
    if given is None:
        return options_from(kind, fields, place)
    if fields:
        raise UserError(f"{place}: found options= and {', '.join(fields)}, expected one of both.")
    return given


def _question(one: str | Question, choices: Sequence[str]) -> Question:
    question = Question(one, "", choices=tuple(choices)) if isinstance(one, str) else one
    if not question.text.strip():
        raise UserError("ask: found an empty question, expected text.")
    return question


def _silent(event: Event) -> None:
    """Nobody listens."""
