"""Modules that do not simply own and multiply their weights: passes are held against weights that really moved."""

import functools
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights.zeroth import Probe, ZerothOrder

torch: Any = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
WIDTH, WORDS = 8, 13


class Model(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(WORDS, WIDTH), body, nn.Linear(WIDTH, WORDS)

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)))


class Body(nn.Module):
    """A part made of `parts` and what is done with them."""

    def __init__(self, run, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


class NextWord:
    def __init__(self, examples=4, tokens=6):
        self.ids = torch.randint(0, WORDS, (examples, tokens), generator=torch.Generator().manual_seed(1))

    def __call__(self, model):
        return self.losses(model, 1)[0]

    def losses(self, model, copies):
        ids = self.ids.repeat(copies, 1)
        found = F.cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
        return found.view(copies, -1)


def linear():
    return nn.Linear(WIDTH, WIDTH)


def given_another_forward():
    made = linear()
    made.forward = functools.partial(lambda own, x: 2 * own(x), made.forward)
    return made


BODIES = {
    "positions that all rows share": lambda: Body(
        lambda self, x: x + self.places(torch.arange(x.shape[1])), places=nn.Embedding(9, WIDTH)
    ),
    "positions of one row": lambda: Body(
        lambda self, x: x + self.places(torch.arange(x.shape[1])[None]), places=nn.Embedding(9, WIDTH)
    ),
    "what has no batch": lambda: Body(lambda self, x: x + self.a(torch.ones(2, WIDTH)).sum(0), a=linear()),
    "distances between tokens": lambda: Body(
        lambda self, x: x + self.a(torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1]) + 8).mean((0, 1)),
        a=nn.Embedding(17, WIDTH),
    ),
    "tokens as rows": lambda: Body(lambda self, x: self.a(x.flatten(0, 1)).view(x.shape), a=linear()),
    "a weight that a parent reads": lambda: Body(lambda self, x: F.linear(x, self.a.weight, self.a.bias), a=linear()),
    "a parameter above a layer": lambda: Body(
        lambda self, x: self.a(x * self.p) * self.s,
        a=linear(),
        p=nn.Parameter(torch.full((WIDTH,), 1.5)),
        s=nn.Parameter(torch.tensor(0.7)),
    ),
    "a layer called by name": lambda: Body(lambda self, x: self.a(input=x), a=linear()),
    "a layer used twice": lambda: Body(lambda self, x: self.a(self.a(x).relu()), a=linear()),
    "a forward of its own": given_another_forward,
    "attention of torch": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(linear()),
}


def moved_by(zo, site):
    from agentopt.weights.zeroth._probing import Plan

    out = torch.empty(site.size)
    zo._prober.fill_direction(Plan([], 0, *zo._prober.scratch(out.device)), site, zo._shifts(0)[0], out)
    return out.view(site.tensor.shape)


def made(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(BODIES[name]()).eval()


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("name", BODIES)
def test_every_weight_is_measured_where_it_moves(name, copies):
    model, loss = made(name), NextWord(tokens=8 if name.startswith(("positions", "distances")) else 6)
    own = {module: vars(module).get("forward") for module in model.modules()}
    zo = ZerothOrder(model, lr=0.0, eps=0.05, mask="random", copies=copies)
    before = {site.name: site.tensor.detach().clone() for site in zo.sites}
    result = zo.step(loss)
    assert all(torch.equal(before[site.name], site.tensor) for site in zo.sites)
    assert {module: vars(module).get("forward") for module in model.modules()} == own
    noise = {site.name: moved_by(zo, site) for site in zo.sites}
    for found, size in zip(result.losses, (0.05, -0.05), strict=True):
        for site in zo.sites:
            site.tensor.data = before[site.name] + size * noise[site.name]
        with torch.no_grad():
            assert found == pytest.approx(float(loss(model).mean()), abs=2e-6)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("name", ["positions that all rows share", "tokens as rows", "a parameter above a layer"])
def test_every_example_has_a_direction_of_its_own_there_too(name, copies):
    from agentopt.weights.zeroth._flipout import Flips

    model, loss = made(name), NextWord(examples=2)  # six tokens: positions could be taken for rows
    zo = ZerothOrder(model, lr=0.0, eps=0.05, probe=Probe(per_example=True), copies=copies)
    scalars, shift = zo.step(loss).scalars, zo._shifts(0)[0]
    flips = Flips(zo._directions, 2)
    before = {site.name: site.tensor.detach().clone() for site in zo.sites}
    for example, found in enumerate(scalars):
        losses = list[float]()
        for size in (0.05, -0.05):
            for site in zo.sites:
                left = flips.of(site, shift, 0)[example]
                signs = torch.outer(left, flips.of(site, shift, 1)[example]) if site.is_matrix else left
                site.tensor.data = before[site.name] + size * moved_by(zo, site) * signs.view(site.tensor.shape)
            with torch.no_grad():
                losses.append(float(loss(model)[example]))
        for site in zo.sites:
            site.tensor.data = before[site.name]
        assert found == pytest.approx((losses[0] - losses[1]) / 0.1 / 2, abs=2e-5)


def test_adapters_side_by_side_are_measured_too():
    from agentopt.weights import adapters

    model = made("a layer used twice")
    held = adapters.attach(model, rank=2, copies=2)
    for tensor in held.parameters().values():
        nn.init.normal_(tensor, std=0.3, generator=torch.Generator().manual_seed(0))
    one = ZerothOrder(model, lr=0.0, eps=0.05, copies=1).step(NextWord())
    two = ZerothOrder(model, lr=0.0, eps=0.05, copies=2).step(NextWord())
    assert one.losses == pytest.approx(two.losses, abs=1e-6)
    assert one.losses[0] != one.losses[1]


def test_a_derivative_reaches_weights_that_a_parent_reads():
    model, loss = made("a weight that a parent reads"), NextWord()
    zo = ZerothOrder(model, lr=0.0, method="jvp")
    (found,) = zo.step(loss).scalars
    loss(model).mean().backward()
    assert found == pytest.approx(sum(float((moved_by(zo, site) * site.tensor.grad).sum()) for site in zo.sites))


def test_examples_cannot_share_a_weight_that_a_parent_reads():
    zo = ZerothOrder(made("a weight that a parent reads"), lr=0.0, probe=Probe(per_example=True))
    with pytest.raises(UserError, match=r"body\.a\.weight"):
        zo.step(NextWord())


def test_a_loss_that_ignores_copies_is_refused():
    class Plain(NextWord):
        def losses(self, model, copies):
            return super().losses(model, 1)[0]

    with pytest.raises(UserError, match="copies=1"):
        ZerothOrder(made("a layer used twice"), lr=0.0, copies=2).step(Plain())


@pytest.mark.parametrize("update", ["fixed", "dynamic"])
def test_zeros_move_under_a_mask_of_small_weights(update):
    model = made("a layer used twice")
    nn.init.zeros_(model.head.weight)
    zo = ZerothOrder(model, lr=0.1, mask="small", mask_update=update)
    for _ in range(2):
        before = model.head.weight.detach().clone()
        zo.step(NextWord())
        assert bool((model.head.weight != before).all())


def test_a_mask_of_all_weights_is_none():
    one, two = made("a layer used twice"), made("a layer used twice")
    ZerothOrder(one, lr=0.1).step(NextWord())
    ZerothOrder(two, lr=0.1, mask="small", density=1.0).step(NextWord())
    assert all(torch.equal(left, right) for left, right in zip(one.parameters(), two.parameters(), strict=True))


def test_only_formats_that_updates_can_round_to_are_tuned():
    with pytest.raises(UserError, match="float64, expected float32, bfloat16 or float16"):
        ZerothOrder(made("a layer used twice").double(), lr=0.1)


def test_workers_with_unlike_shares_cannot_have_a_direction_per_example():
    class Other:
        rank, world = 0, 2

        def gather(self, values):
            return [list(values), list(values)[: len(values) // 2]]

        def close(self): ...

    zo = ZerothOrder(made("a layer used twice"), lr=0.1, probe=Probe(per_example=True), exchange=Other())
    with pytest.raises(UserError, match="4, 2 examples"):
        zo.step(NextWord())


def test_dropout_would_drown_what_is_measured():
    model = Model(nn.Dropout(0.1))
    zo = ZerothOrder(model, lr=0.0)
    with pytest.raises(UserError, match=r"body: found Dropout in training mode.*model\.eval\(\)"):
        zo.step(NextWord())
    model.eval()
    zo.step(NextWord())
