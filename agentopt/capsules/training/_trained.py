"""A trained capsulator: proposes a shorter text for a document and a budget; saved as an adapter folder with a JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from agentopt.capsules._types import Document, Unit
from agentopt.capsules.counting._tokens import Meter
from agentopt.capsules.training._policy import Policy, memory_explained
from agentopt.capsules.training._rewards import distance_from_valid
from agentopt.errors import UserError
from agentopt.weights import load as weights
from agentopt.weights.load import need

FILE = "capsulator.json"
_VERSION = 1


@dataclass(frozen=True)
class Step:
    """What one step of training did."""

    stage: str
    step: int
    steps: int
    loss: float
    reward: float
    """Mean over the texts that were written; 0 while imitating."""
    valid: float
    """Share of them that were within the budget with every keep span."""
    kl: float
    """Mean divergence of a text from the reference, in nats."""
    reader_calls: int
    """In all, up to here."""
    dropped: int
    """Groups that had equal rewards and told nothing."""


@dataclass
class Trained:
    """A model that writes capsules.

    What it writes is a proposal: `ao.capsule(..., options=CapsuleOptions(trained=...))` verifies and cuts it.
    """

    model: Any
    tokenizer: Any
    base: str = ""
    """Where the base model comes from; empty when it was given as an object."""
    base_hash: str = ""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    history: list[Step] = field(default_factory=list[Step])
    notes: list[str] = field(default_factory=list[str])
    """What a person should know about the training."""
    tries: int = 8
    """Texts drawn when the most likely one is not valid."""

    def compress(self, document: Document, meter: Meter, seed: int = 0) -> str:
        """The most likely text; when it is not valid, the first valid of `tries` drawn with `seed`, else the nearest.

        A document that is longer than what the model reads is taken in halves, which share the budget by their tokens.

        Raises:
            UserError: one unit alone is longer than what the model reads.
            RunError: out of memory.
        """
        sampling: dict[str, Any] = self.settings.get("sampling", {})
        policy = Policy(self.model, self.tokenizer, temperature=sampling.get("temperature", 1.0))
        if len(document.units) > 1 and not policy.readable(document, meter):
            parts = halves(document)
            counts = [max(1, meter.total([part.text])) for part in parts]
            shares = [max(1, meter.limit * count // sum(counts)) for count in counts]
            texts = [
                self.compress(part, Meter(share, meter.tokenizer), seed)
                for part, share in zip(parts, shares, strict=True)
            ]
            return "\n".join(text for text in texts if text)
        prompt = policy.prompt_ids(document, meter)
        longest = longest_text(policy, document, meter, sampling.get("longest", 512))
        with memory_explained(policy.torch, "writing a capsule", "the length of the document"):
            text = policy.write([prompt], each=1, longest=longest, seed=seed, greedy=True).texts[0]
            if self.tries < 1 or distance_from_valid(document, text, meter) == 0:
                return text
            drawn = policy.write([prompt], each=self.tries, longest=longest, seed=seed).texts
        return min([text, *drawn], key=lambda one: distance_from_valid(document, one, meter))

    def digest(self) -> str:
        """Hex sha256 of everything that decides what is written: all that was trained, the base model, how it draws."""
        adapter = hasattr(self.model, "peft_config")
        base = self.base_hash if adapter else ""
        found = hashlib.sha256(json.dumps([base, self.settings.get("sampling"), self.tries]).encode())
        for name, weight in self.model.named_parameters():
            if "lora_" in name or not adapter:
                found.update(name.encode())
                found.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write the adapter (or the whole model, when all of it was trained) and `capsulator.json`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        adapter = hasattr(self.model, "peft_config")
        with quiet():
            self.model.save_pretrained(str(path), **({"save_embedding_layers": False} if adapter else {}))
            self.tokenizer.save_pretrained(str(path))
        data = {
            "kind": "trained",
            "version": _VERSION,
            "adapter": adapter,
            "base": self.base,
            "base_hash": self.base_hash,
            "settings": self.settings,
            "notes": self.notes,
            "history": [asdict(step) for step in self.history],
        }
        temporary = path / f"{FILE}.new"
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path / FILE)
        return path

    @classmethod
    def load(cls, folder: str | Path, *, base: tuple[Any, Any] | str | None = None, device: Any = None) -> Trained:
        """Read what `save` wrote.

        Args:
            folder: Where it is.
            base: The base model, by name or as (model, tokenizer); None for the one named in the file.
            device: Where the model goes; None for the GPU when there is one.

        Raises:
            UserError: no capsulator there, no base model, or another one than it was trained on.
        """
        path = Path(folder)
        data = read_json(path, "trained")
        if not data["adapter"]:
            model, tokenizer = weights.model(path, device=device)
        else:
            model, tokenizer = _with_adapter(path, data, base, device)
        history = [Step(**step) for step in data["history"]]
        return cls(model, tokenizer, data["base"], data["base_hash"], data["settings"], history, data["notes"])


def read_json(folder: Path, kind: str) -> dict[str, Any]:
    """The `capsulator.json` of a folder, when it is of this kind."""
    try:
        data = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: found no {FILE}, expected a folder that a trained capsulator was saved to."
        ) from None
    except ValueError as error:
        raise UserError(f"{folder / FILE}: not JSON ({error}).") from error
    found = data.get("kind") if isinstance(data, dict) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    if found != kind or data.get("version") != _VERSION:  # pyright: ignore[reportUnknownMemberType]
        raise UserError(f"{folder / FILE}: found kind {found!r}, expected {kind!r} of version {_VERSION}.")
    return data  # pyright: ignore[reportUnknownVariableType]


def _with_adapter(path: Path, data: dict[str, Any], base: tuple[Any, Any] | str | None, device: Any) -> tuple[Any, Any]:
    peft = need("peft")
    source: Any = base or data["base"]
    if not source:
        raise UserError(f"{path}: the base model was given as an object; give it again with base=(model, tokenizer).")
    model, tokenizer = base if isinstance(base, tuple) else weights.model(str(source), device=device)
    found = fingerprint(model)
    if found != data["base_hash"]:
        raise UserError(
            f"{path}: the adapter was trained on a base model with hash {data['base_hash']}, found {found}; give the "
            "same one with base=."
        )
    with quiet():
        return peft.PeftModel.from_pretrained(model, str(path), is_trainable=False).eval(), tokenizer


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without the notices that libraries send one another about names that will change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def fingerprint(model: Any) -> str:
    """Twelve hex digits over names, shapes and a sample of every weight: tells base models apart in milliseconds."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 16)][:16].float().cpu().tolist()
        digest.update(f"{name} {tuple(weight.shape)} {[f'{value:.3g}' for value in some]}".encode())
    return digest.hexdigest()[:12]


def longest_text(policy: Policy, document: Document, meter: Meter, limit: int) -> int:
    """Tokens of the policy's own tokenizer that a capsule of this budget can reasonably need, at most `limit`."""
    share = min(1.0, meter.limit / max(1, meter.total([document.text])))
    return min(limit, 8 + math.ceil(1.25 * share * len(policy.text_ids(document.text))))


def halves(document: Document) -> tuple[Document, Document]:
    """The document cut between two units, near the middle of its characters."""
    units, middle = document.units, len(document.text) / 2
    first = min(range(1, len(units)), key=lambda row: abs(units[row].start - middle))
    border = units[first].start

    def part(start: int, end: int, rows: Sequence[Unit]) -> Document:
        moved = tuple(replace(unit, start=unit.start - start, end=unit.end - start, heading=-1) for unit in rows)
        keep = tuple(
            replace(span, start=span.start - start, end=span.end - start)
            for span in document.keep
            if start <= span.start and span.end <= end
        )
        return replace(document, text=document.text[start:end], units=moved, keep=keep)

    return part(0, border, units[:first]), part(border, len(document.text), units[first:])
