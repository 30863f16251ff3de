"""What a text says about a quantization: which input columns matter, and how far the new model is from the original.

The first half of the text weighs the columns, the second half is measured on, so that nothing is measured on what it
was fitted to. The original model is loaded for it; the quantized weights are decoded into it one layer at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from agentopt.errors import UserError
from agentopt.weights import _events as events
from agentopt.weights import load
from agentopt.weights.finetuning._memory import available, size
from agentopt.weights.gg._coders import Coder
from agentopt.weights.gg._other_sources import LoadedSource
from agentopt.weights.gg._partial import Partial
from agentopt.weights.gg._plan import Layer
from agentopt.weights.gg._shards import write_file
from agentopt.weights.gg._source import FolderSource, WeightSource
from agentopt.weights.gg._types import Quality, QuantizeOptions

COLUMN = "text"
_COLUMNS = "columns.safetensors"
_LETTERS = 40
"""Per token that are read of a long text: no tokenizer makes longer tokens of ordinary text."""
_POSITIONS = 64
"""Whose distributions are compared at once."""

Tell = Callable[[events.Event], None]


def text_digest(path: str) -> str:
    """The sha256 of a text file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"calibrate: {path}: cannot be read ({error.strerror or error}).") from None


def read_text(path: str, letters: int) -> str:
    """The beginning of a text: a .txt file as it is, or the column `text` of a .jsonl file.

    Args:
        path: the file.
        letters: how many characters are enough.

    Raises:
        UserError: it is neither, or holds no text.
    """
    file = Path(path).expanduser()
    if file.suffix not in (".txt", ".jsonl"):
        raise UserError(f"calibrate: {path}: found {file.suffix or 'no extension'!r}, expected a .txt or .jsonl file.")
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(letters) if file.suffix == ".txt" else _joined(stream, path, letters)
    except OSError as error:
        raise UserError(f"calibrate: {path}: cannot be read ({error.strerror or error}).") from None
    except UnicodeDecodeError as error:
        raise UserError(f"calibrate: {path}: is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    if not text.strip():
        raise UserError(f"calibrate: {path}: found no text, expected some thousand words.")
    return text


def _joined(lines: Any, path: str, letters: int) -> str:
    found: list[str] = []
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"calibrate: {path}, line {number}: is not JSON ({error}).") from None
        text = cast("dict[str, Any]", row).get(COLUMN) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UserError(
                f'calibrate: {path}, line {number}: found no text in "{COLUMN}", expected {{"text": "..."}}.'
            )
        found.append(text)
        count += len(text)
        if count > letters:
            break
    return "\n\n".join(found)


class Calibration:
    """The original model and a text.

    Args:
        source: where the model was opened from: a folder, or a model in memory.
        options: `calibrate` is the text.
        tell: told what is being done.
        check_stop: called between rows.

    Raises:
        UserError: the text is not usable, or the model cannot be loaded whole.
    """

    def __init__(
        self, source: WeightSource, options: QuantizeOptions, tell: Tell, check_stop: Callable[[], None]
    ) -> None:
        assert options.calibrate is not None
        self._tell, self._check_stop = tell, check_stop
        text = read_text(options.calibrate, options.calibrate_tokens * _LETTERS)
        self._tell(events.Working("loading the original model"))
        self._model, tokenizer = _original(source)
        rows = token_rows(tokenizer, text, options, self._longest())
        half = len(rows) // 2
        self._fitted, self._measured = rows[:half], rows[half:]

    def _longest(self) -> int:
        return int(getattr(self._model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)

    # --- what matters ------------------------------------------------------------------------------------------------

    def columns(self, layers: Sequence[Layer], partial: Partial) -> dict[str, Tensor]:
        """Mean square activation of every input column, by the layer's name; kept for a call that goes on.

        A layer that the text never reaches, as an unused expert, has no entry.
        """
        st = load.need("safetensors.torch")
        path = partial.path / _COLUMNS
        if path.is_file():
            return st.load(path.read_bytes())
        sums: dict[str, Tensor] = {}
        handles = [self._watch(layer, sums) for layer in layers]
        try:
            for at, row in enumerate(self._fitted):
                self._check_stop()
                self._tell(events.Working("weighing input columns", at, len(self._fitted)))
                self._logits(row)
        finally:
            for handle in handles:
                handle.remove()
        found = {name: (total / total.mean()).float().contiguous() for name, total in sums.items() if total.any()}
        write_file(path, st.save(found))
        return found

    def _watch(self, layer: Layer, sums: dict[str, Tensor]) -> Any:
        """Sum the squares of what goes into a layer; of an embedding, into the head that it also is."""
        module = self._model.get_output_embeddings() if layer.embedding else self._model.get_submodule(layer.module)

        def add(module: Any, given: tuple[Tensor, ...]) -> None:
            del module
            squares = given[0].detach().float().reshape(-1, layer.shape[1]).square().sum(0).double().cpu()
            sums[layer.name] = sums.get(layer.name, torch.zeros_like(squares)) + squares

        return module.register_forward_pre_hook(add)

    # --- how far -----------------------------------------------------------------------------------------------------

    def quality(self, layers: Sequence[Layer], coder: Coder, stored: WeightSource) -> Quality:
        """Both models on the second half of the text, row by row."""
        before = after = kl = 0.0
        same = tokens = 0
        with _swapped(self._model, layers, coder, stored) as switch:
            for at, row in enumerate(self._measured):
                self._check_stop()
                self._tell(events.Working("measuring against the original", at, len(self._measured)))
                original = self._logits(row)
                switch["on"] = True
                new = self._logits(row)
                switch["on"] = False
                for start in range(0, len(row) - 1, _POSITIONS):
                    part = slice(start, min(start + _POSITIONS, len(row) - 1))
                    target = torch.tensor(row[part.start + 1 : part.stop + 1])
                    p, q = (one[part].double().log_softmax(-1) for one in (original, new))
                    before -= float(p.gather(1, target[:, None]).sum())
                    after -= float(q.gather(1, target[:, None]).sum())
                    kl += float((p.exp() * (p - q)).sum())
                    same += int((p.argmax(-1) == q.argmax(-1)).sum())
                    tokens += len(target)
        # exp of the mean overflows where a model is certain of the wrong thing; no perplexity is above e^700.
        perplexity = [math.exp(min(loss / tokens, 700.0)) for loss in (before, after)]
        return Quality(tokens, perplexity[0], perplexity[1], max(kl / tokens, 0.0), same / tokens)

    def _logits(self, row: Sequence[int]) -> Tensor:
        ids = torch.tensor([row], device=self._model.device)
        with torch.no_grad():
            return self._model(input_ids=ids, use_cache=False).logits[0].cpu()


def token_rows(tokenizer: Any, text: str, options: QuantizeOptions, longest: int) -> list[list[int]]:
    """Rows of equal length, each with the tokenizer's first token where it has one; at least two.

    Raises:
        UserError: the text is too short.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: options.calibrate_tokens]
    lead: list[int] = tokenizer("")["input_ids"][:1]
    lead = lead if lead and lead[0] == tokenizer.bos_token_id else []
    length = min(options.sequence, longest - len(lead), len(ids) // 2)
    if length < 2:
        raise UserError(f"calibrate: {options.calibrate}: found {len(ids)} tokens, expected some thousand.")
    return [lead + ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def _original(source: WeightSource) -> tuple[Any, Any]:
    if isinstance(source, LoadedSource):
        if source.tokenizer is None:
            raise UserError("calibrate: found a model without a tokenizer, expected one to read the text with.")
        return source.model, source.tokenizer
    if not isinstance(source, FolderSource):
        raise UserError(
            f"calibrate: found {source.name!r}, which is not loaded as a model; unpack it into a folder first, or "
            "leave calibrate out."
        )
    needed = 4 * sum(math.prod(source.shape(name)) for name in source.names)
    free = available("cpu")
    if free is not None and needed > free:
        raise UserError(
            f"calibrate: the original model needs {size(needed)} of memory in float32 and {size(free)} are free; "
            "leave calibrate out: the rest of the quantization needs no such room."
        )
    return load.model(source.path, device="cpu")


@contextlib.contextmanager
def _swapped(model: Any, layers: Sequence[Layer], coder: Coder, stored: WeightSource) -> Generator[dict[str, bool]]:
    """While "on", every layer computes with its decoded weight; it is decoded when the layer is called and let go."""
    switch = {"on": False}
    handles: list[Any] = []
    for layer in layers:
        modules = [model.get_submodule(layer.module)]
        if layer.embedding:
            modules.append(model.get_output_embeddings())
        for module in modules:
            enter, leave = _exchange(layer, coder, stored, switch)
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield switch
    finally:
        for handle in handles:
            handle.remove()


def _exchange(
    layer: Layer, coder: Coder, stored: WeightSource, switch: Mapping[str, bool]
) -> tuple[Callable[..., None], Callable[..., None]]:
    kept: list[Tensor] = []

    def enter(module: Any, given: Any) -> None:
        del given
        if not switch["on"]:
            return
        parts = {entry.name.removeprefix(f"{layer.name}."): stored.read(entry.name) for entry in coder.entries(layer)}
        weight = coder.decode(layer, parts)
        kept.append(module.weight.data)
        module.weight.data = (weight.T if layer.transposed else weight).to(kept[0])

    def leave(module: Any, given: Any, result: Any) -> None:
        del given, result
        if kept:
            module.weight.data = kept.pop()

    return enter, leave
