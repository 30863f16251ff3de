"""Training with gradients: AdamW on a LoRA adapter or on all weights, the baselines beside the zeroth-order methods.

A log of scalars cannot hold gradients, so a resume goes on from a checkpoint (weights and moments in one safetensors
file) that is replaced as a whole at every validation; the steps after it are made again, to the same bits.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agentopt.errors import RunError, UserError
from agentopt.weights.finetuning._options import FIRST_ORDER_RATES, FinetuneOptions
from agentopt.weights.finetuning._subject import Subject
from agentopt.weights.load import need
from agentopt.weights.zeroth._schedule import Schedule

CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"
MAX_NORM = 1.0
_MOMENTS = ("exp_avg", "exp_avg_sq")


class FirstOrder:
    """AdamW (arXiv 1711.05101) with the gradient clipped to norm 1."""

    def __init__(self, subject: Subject, options: FinetuneOptions, schedule: Schedule, folder: Path) -> None:
        self.torch = need("torch")
        self.subject, self.options, self.schedule, self.folder = subject, options, schedule, folder
        self.weights = subject.trained()
        self.lr = options.lr if isinstance(options.lr, float) else FIRST_ORDER_RATES[options.weights]
        self.optimizer: Any = self.torch.optim.AdamW(
            list(self.weights.values()), lr=self.lr, weight_decay=options.weight_decay
        )
        self.done = 0

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.schedule.lr(self.done, self.lr)

    def step(self, parts: Iterator[Callable[[Any], Any]]) -> tuple[float, bool]:
        """One step on the mean loss over all examples of the batch; (loss, whether anything moved).

        Args:
            parts: objectives of the micro-batches, each giving a loss per example that carries a gradient.
        """
        torch = self.torch
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        with torch.enable_grad():
            for objective in parts:
                losses = objective(self.subject.model)
                part = losses.sum() / self.options.batch
                part.backward()
                total += float(part.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.weights.values()), MAX_NORM))
        if not (math.isfinite(total) and math.isfinite(norm)):
            return math.nan, False
        self.optimizer.step()
        self.done += 1
        return total, norm > 0

    # --- files -------------------------------------------------------------------------------------------------------

    def keep(self, *, best: bool) -> None:
        """Write the checkpoint to resume from and, when the weights are the best so far, those.

        Raises:
            RunError: the disk does not take it.
        """
        state = {name: weight.detach().contiguous() for name, weight in self.weights.items()}
        if best:
            self._write(self.folder / BEST, state, {"step": self.done})
        tensors = {f"weight.{name}": value for name, value in state.items()}
        for name, weight in self.weights.items():
            moments = self.optimizer.state.get(weight, {})
            tensors |= {f"{moment}.{name}": moments[moment].contiguous() for moment in _MOMENTS if moment in moments}
        self._write(self.folder / CHECKPOINT, tensors, {"step": self.done})

    def _write(self, path: Path, tensors: dict[str, Any], state: dict[str, int]) -> None:
        temporary = path.with_name(path.name + ".new")
        try:
            need("safetensors.torch").save_file(tensors, str(temporary), metadata={"state": json.dumps(state)})
            os.replace(temporary, path)
        except (OSError, need("safetensors").SafetensorError) as error:
            raise RunError(f"{path}: cannot be written ({error}); make room and run the same command again.") from error

    def resume(self) -> int:
        """Go on from the checkpoint when there is one; the steps that were done."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return 0
        tensors, self.done = self._read(path)
        with self.torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[f"weight.{name}"])
                if f"exp_avg.{name}" in tensors:
                    moments = {moment: tensors[f"{moment}.{name}"].to(weight.device) for moment in _MOMENTS}
                    self.optimizer.state[weight] = {"step": self.torch.tensor(float(self.done)), **moments}
        return self.done

    def to_best(self) -> None:
        """The weights of the best validation."""
        tensors, _ = self._read(self.folder / BEST)
        self.subject.put(tensors)

    def _read(self, path: Path) -> tuple[dict[str, Any], int]:
        safetensors = need("safetensors")
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                state = json.loads(file.metadata()["state"])
            return need("safetensors.torch").load_file(str(path)), int(state["step"])
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); delete the folder and start anew.") from error

    def release(self) -> None:
        """Let go of weights and moments."""
        self.weights, self.optimizer = {}, None
        self.subject.release()

    def clean(self) -> None:
        """Delete what only a resume needs."""
        for name in (CHECKPOINT, BEST):
            (self.folder / name).unlink(missing_ok=True)
