"""BackSlash: its steps against brute force, and an optimizer like any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from agentopt.errors import UserError
from agentopt.weights import gg
from agentopt.weights.gg import _backslash


def layer(values: torch.Tensor) -> nn.Linear:
    found = nn.Linear(values.shape[1], values.shape[0])
    with torch.no_grad():
        found.weight.copy_(values)
        found.bias.fill_(0.05)
    return found


def shrink(weight: torch.Tensor, lam: float, nu: Any = 1.0, lr: float = 1.0, **options: Any) -> torch.Tensor:
    """One step without a gradient: the penalty alone."""
    module = layer(weight)
    gg.BackSlash(torch.optim.SGD(module.parameters(), lr=lr), lam, nu, **options).step()
    return module.weight.detach()


WEIGHT = torch.tensor([[0.5, -0.02, 0.0, 1e-4], [-1.5, 0.3, 0.001, -0.0]])


def test_laplacian_prior_is_soft_thresholding() -> None:
    found = shrink(WEIGHT, lam=0.1, lr=0.1)
    assert torch.allclose(found, nn.functional.softshrink(WEIGHT, 0.01))
    assert found[0, 3] == 0.0
    assert torch.equal(shrink(WEIGHT, lam=0.0), WEIGHT)


@pytest.mark.parametrize("nu", [1.05, 1.5, 2.0, 2.8])
@pytest.mark.parametrize("tau", [1e-3, 0.1, 3.0])
def test_convex_step_is_the_proximal_point(nu: float, tau: float) -> None:
    weight = WEIGHT.double()
    found = weight.clone()
    _backslash.shrink_(found, tau, nu)
    # Brute force: no other magnitude on a fine grid is better.
    grid = torch.linspace(0, 2, 20_001, dtype=torch.float64)
    for was, now in zip(weight.flatten().tolist(), found.flatten().tolist(), strict=True):

        def cost(x: torch.Tensor, was: float = was) -> torch.Tensor:
            return (x - abs(was)) ** 2 / 2 + tau * (x + 1e-5) ** nu

        assert float(cost(torch.tensor(abs(now), dtype=torch.float64))) <= float(cost(grid).min()) + 1e-12


@pytest.mark.parametrize("nu", [0.2, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("lam", [0.01, 1.0, 100.0])
def test_signs_never_turn_zeros_stay_and_the_penalty_falls(nu: float, lam: float) -> None:
    weight = gg.sample((20, 30), 1.0, 0.3, generator=1)
    weight[0, :5] = 0.0
    found = shrink(weight, lam, nu)
    assert bool((found * weight >= 0).all())
    assert bool((found.abs() <= weight.abs()).all())
    assert bool((found[weight == 0] == 0).all())
    assert not bool(torch.signbit(found[found == 0]).any())
    if nu <= 1:
        # A majorise-minimise step: distance and penalty together do not grow.
        penalty = [float(lam * (one.abs() + 1e-5).pow(nu).sum()) for one in (weight, found)]
        assert float((found - weight).square().sum() / 2) + penalty[1] <= penalty[0] + 1e-4 * penalty[0]


def test_the_published_step_crosses_zero_where_ours_does_not() -> None:
    weight = torch.full((2, 2), 0.01)
    published = shrink(weight, 2.0, 0.5, prox=False, scale_by_lr=False, per_count=True, eps=1e-5)
    assert torch.allclose(published, 0.01 - 2.0 / 4 * 0.5 * (weight + 1e-5).pow(-0.5))
    assert bool((published < 0).all())
    assert bool((shrink(weight, 0.5, 0.5) == 0).all())


def test_the_shape_is_estimated_over_the_model_or_per_tensor() -> None:
    model = nn.Sequential(layer(gg.sample((60, 50), 2.0, 0.1)), layer(gg.sample((60, 60), 0.7, 0.1, generator=1)))
    both = torch.cat([one.weight.detach().flatten() for one in model])  # pyright: ignore[reportArgumentType, reportCallIssue]
    expected = gg.fit(both, trim=0.0).nu
    optimizer = gg.BackSlash(torch.optim.SGD(model.parameters(), lr=0.0), 1.0)
    assert optimizer.record().nu == pytest.approx(expected, rel=1e-6)
    alone = gg.BackSlash(torch.optim.SGD(model[1].parameters(), lr=0.0), 1.0, per="tensor")
    assert alone.record().nu == pytest.approx(gg.fit(model[1].weight, trim=0.0).nu, rel=1e-6)  # pyright: ignore[reportArgumentType]
    mean = gg.BackSlash(torch.optim.SGD(model.parameters(), lr=0.0), 1.0, per="tensor").record().nu
    assert mean > expected


def test_every_steps_the_shape_is_estimated_again() -> None:
    module = layer(gg.sample((40, 40), 2.0, 1.0))
    optimizer = gg.BackSlash(torch.optim.SGD(module.parameters(), lr=1.0), 0.01, every=3)
    shapes: list[float] = []
    for _ in range(7):
        optimizer.step()
        shapes.append(optimizer.record().nu)
    assert shapes[0] == shapes[1] == shapes[2] != shapes[3]
    assert shapes[3] == shapes[5] != shapes[6]


def test_groups_have_their_own_rate_and_strength_and_vectors_are_left_alone() -> None:
    one, two, three = (layer(torch.ones(2, 2)) for _ in range(3))
    bias = one.bias.detach().clone()
    groups = [
        {"params": one.parameters()},
        {"params": two.parameters(), "lr": 0.2},
        {"params": three.parameters(), "lam": 0.0},
    ]
    optimizer = gg.BackSlash(torch.optim.SGD(groups, lr=0.1), 1.0, 1.0)
    optimizer.step()
    assert [float(module.weight.detach()[0, 0]) for module in (one, two, three)] == pytest.approx([0.9, 0.8, 1.0])
    assert torch.equal(one.bias, bias)
    only_bias = gg.BackSlash(torch.optim.SGD(one.parameters(), lr=0.1), 1.0, 1.0, only=lambda weight: weight.ndim == 1)
    only_bias.step()
    assert torch.allclose(one.bias, nn.functional.softshrink(bias, 0.1))


def training(
    lam: float, steps: int, optimizer_of: Any = None, resume_at: int = -1, freeze_at: int = -1
) -> tuple[nn.Module, Any]:
    """A regression with two useful inputs out of twenty."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 20, generator=generator)
    y = x[:, :1] - 2 * x[:, 1:2]
    module = layer(gg.sample((1, 20), 1.0, 0.3, generator=2))
    make = optimizer_of or (lambda parameters: torch.optim.AdamW(parameters, lr=0.03))

    def wrap() -> Any:
        return gg.BackSlash(make(module.parameters()), lam, log_every=10)

    optimizer = wrap()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for step in range(steps):
        if step == resume_at:
            saved, rate = optimizer.state_dict(), schedule.state_dict()
            optimizer = wrap()
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
            optimizer.load_state_dict(saved)
            schedule.load_state_dict(rate)
        if step == freeze_at:
            optimizer.freeze_zeros()
        optimizer.zero_grad()
        loss = (module(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    return module, optimizer


def test_useless_weights_become_zero_and_useful_ones_stay() -> None:
    module, optimizer = training(0.3, 200)
    weight = module.weight.detach()[0]  # pyright: ignore[reportCallIssue]
    assert int((weight == 0).sum()) >= 16
    assert weight[:2].tolist() == pytest.approx([1.0, -2.0], abs=0.3)
    log = optimizer.log()
    assert [record.step for record in log] == list(range(10, 201, 10))
    assert (log[-1].zeros, log[-1].bits < log[0].bits) == (pytest.approx(float((weight == 0).float().mean())), True)
    assert log[-1].nu < log[0].nu
    assert log[-1].sigma == pytest.approx(float(weight.square().mean().sqrt()), rel=1e-5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_a_resumed_training_goes_on_as_if_it_had_not_stopped() -> None:
    straight, first = training(0.1, 40)
    resumed, second = training(0.1, 40, resume_at=25)
    assert torch.equal(straight.weight, resumed.weight)  # pyright: ignore[reportArgumentType]
    assert first.log() == second.log()


def test_frozen_zeros_stay_and_the_rest_wins_back_what_the_shrinking_cost() -> None:
    module, optimizer = training(0.3, 300, freeze_at=150, resume_at=200)
    weight = module.weight.detach()[0]  # pyright: ignore[reportCallIssue]
    zeros = optimizer.log()[14].zeros
    assert zeros >= 0.7
    assert [record.zeros for record in optimizer.log()[14:]] == [zeros] * 16
    shrunk, _ = training(0.3, 150)
    first = shrunk.weight.detach()[0]  # pyright: ignore[reportCallIssue]
    assert torch.equal(weight == 0, first == 0)
    assert abs(float(weight[1]) + 2) < abs(float(first[1]) + 2)


def test_any_optimizer_a_bare_state_and_a_closure() -> None:
    def lbfgs(parameters: Any) -> Any:
        return torch.optim.LBFGS(parameters, lr=0.5, max_iter=2)

    module = layer(torch.ones(1, 3))
    optimizer = gg.BackSlash(lbfgs(module.parameters()), 0.01, 1.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = module(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > float(closure().detach())
    bare = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    bare.step()
    wrapped = gg.BackSlash(torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9), 0.01)
    wrapped.load_state_dict(bare.state_dict())
    assert wrapped.param_groups[0]["lr"] == 0.1
    assert wrapped.steps == 0
    wrapped.add_param_group({"params": layer(torch.ones(2, 2)).parameters()})
    calls: list[str] = []
    wrapped.register_step_post_hook(lambda *_: calls.append("after"))
    wrapped.step()
    assert calls == ["after"]
    assert len(wrapped.param_groups) == len(wrapped.inner.param_groups) == 2


def test_the_gradient_scaler_takes_it() -> None:
    module = layer(torch.ones(1, 2))
    optimizer = gg.BackSlash(torch.optim.SGD(module.parameters(), lr=0.1), 1.0, 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for x, moves in ((torch.ones(1, 2), True), (torch.full((1, 2), torch.inf), False)):
        before = module.weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(module(x).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, module.weight) is not moves  # an infinite gradient skips shrinking too


def test_ranks_add_their_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer(gg.sample((30, 30), 2.0, 1.0))
    other = gg.sample((30, 30), 0.5, 3.0, generator=1)

    def all_reduce(sums: torch.Tensor) -> None:
        sums += torch.tensor([[900.0, float(other.abs().sum()), float(other.square().sum())]])

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    optimizer = gg.BackSlash(torch.optim.SGD(module.parameters(), lr=0.1), 1.0)
    together = torch.cat([module.weight.detach(), other])
    assert optimizer.record().nu == pytest.approx(gg.fit(together, trim=0.0).nu, rel=1e-5)


def test_mistakes_are_named() -> None:
    def sgd(dtype: torch.dtype = torch.float32) -> Any:
        return torch.optim.SGD(nn.Linear(2, 2, dtype=dtype).parameters(), lr=0.1)

    for call in (
        lambda: gg.BackSlash(sgd(), -1.0),
        lambda: gg.BackSlash(sgd(), 1.0, 0.0),
        lambda: gg.BackSlash(sgd(), 1.0, eps=0.0),
        lambda: gg.BackSlash(sgd(), 1.0, every=0),
        lambda: gg.BackSlash(sgd(), 1.0, per="row"),  # pyright: ignore[reportArgumentType]
        lambda: gg.BackSlash(sgd(torch.bfloat16), 1.0),
        lambda: gg.BackSlash(torch.optim.SGD(nn.LayerNorm(2).parameters(), lr=0.1), 1.0),
    ):
        with pytest.raises(UserError, match="found"):
            call()
