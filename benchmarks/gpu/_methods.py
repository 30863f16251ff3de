"""What a step is compared with on a GPU, in our own words, and the loss that all of them measure.

`InPlace` is MeZO as published (arXiv 2305.17333): normal noise drawn again from one seed for every pass, the weights
moved in place to plus eps, to minus eps, back, and along the estimate. With masks it is the naive form of Sparse-MeZO
(arXiv 2402.15751): one stored bool per weight, multiplied in at every pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional


class LastToken:
    """Cross-entropy of the token after each row; several copies of the weights in one pass."""

    def __init__(self, vocabulary: int, rows: int, tokens: int, device: str) -> None:
        dice = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, vocabulary, (rows, tokens), generator=dice).to(device)
        self.answers = torch.randint(0, vocabulary, (rows,), generator=dice).to(device)

    def __call__(self, model: Any) -> Any:
        return self.losses(model, 1)[0]

    def losses(self, model: Any, copies: int) -> Any:
        ids = self.ids.repeat(copies, 1)
        logits = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1].float()
        return functional.cross_entropy(logits, self.answers.repeat(copies), reduction="none").view(copies, -1)


@torch.no_grad()
def stored_masks(model: Any, density: float = 0.5) -> dict[str, Any]:
    """A bool for every weight of every matrix: whether it is among the smallest."""
    masks: dict[str, Any] = {}
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            # A threshold from a sample: which weights it lets through does not matter for what the step costs.
            sample = weight.flatten()[:: max(1, weight.numel() // 100_000)].abs().float()
            masks[name] = weight.abs() <= sample.quantile(density)
    return masks


class InPlace:
    """MeZO in place, in the weights' own precision."""

    def __init__(self, model: Any, lr: float, eps: float = 1e-3, masks: Mapping[str, Any] | None = None) -> None:
        self.model, self.lr, self.eps, self.masks, self.number = model, lr, eps, masks or {}, 0

    @torch.no_grad()
    def step(self, loss_fn: Callable[[Any], Any]) -> float:
        self.number += 1
        self._move(self.eps)
        plus = float(loss_fn(self.model).mean())
        self._move(-2 * self.eps)
        minus = float(loss_fn(self.model).mean())
        self._move(self.eps)
        self._move(-self.lr * (plus - minus) / (2 * self.eps))
        return (plus + minus) / 2

    def _move(self, scale: float) -> None:
        generator = torch.Generator(self.model.device).manual_seed(self.number)
        for name, weight in self.model.named_parameters():
            z = torch.empty_like(weight).normal_(generator=generator)
            if name in self.masks:
                z.mul_(self.masks[name])
            weight.add_(z, alpha=scale)


class Adam:
    """AdamW on the weights that require a gradient."""

    def __init__(self, model: Any, lr: float) -> None:
        self.model = model
        parameters = [one for one in model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)

    def step(self, loss_fn: Callable[[Any], Any]) -> float:
        with torch.enable_grad():
            loss = loss_fn(self.model).mean()
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
