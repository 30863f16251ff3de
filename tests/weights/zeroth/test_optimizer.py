"""ZerothOrder against dense oracles: what a probe measures, what an update writes, and what stays as it was."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import pytest

from agentopt.errors import UserError
from agentopt.weights.zeroth import NonFiniteLoss, Probe, Shift, ZerothOrder
from tests.weights.tiny import tiny

torch: Any = pytest.importorskip("torch")


class NextWord:
    """Mean cross-entropy of the next token, per example; in passes of a few examples each when asked."""

    def __init__(self, examples=6, seed=0, sizes: Sequence[int] | None = None):
        self.ids = torch.randint(3, 17, (examples, 9), generator=torch.Generator().manual_seed(seed))
        self.pass_sizes = list(sizes or [examples])

    def __call__(self, model):
        return self.losses(model, 1)[0]

    def losses(self, model, copies):
        parts = []
        for ids in self.ids.split(self.pass_sizes):
            rows = ids.repeat(copies, 1)
            logits = model(input_ids=rows).logits
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
            )
            parts.append(losses.view(copies, len(ids), -1).mean(-1))
        return torch.cat(parts, 1)


BASE, _ = tiny()


def model(dtype=None, *, tied=False):
    made = copy.deepcopy(BASE)
    if tied:
        made.config.tie_word_embeddings = True
        made.lm_head.weight = made.model.embed_tokens.weight
    made = made.to(dtype) if dtype else made
    for parameter in made.parameters():
        parameter.requires_grad_(True)
    return made


def weights(made):
    return {name: tensor.detach().clone() for name, tensor in made.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def direction(zo, site, shift, step=0):
    """The whole masked direction of a tensor, without eps."""
    from agentopt.weights.zeroth._probing import Plan

    out = torch.empty(site.size)
    zo._prober.fill_direction(Plan([], step, *zo._prober.scratch(out.device)), site, shift, out)
    return out.view(site.tensor.shape)


SETTINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "small": {"mask": "small"},
    "large": {"mask": "large", "density": 0.3},
    "random": {"mask": "random"},
    "stored": {"mask": "small", "mask_update": "stored"},
    "blocks": {"mask": "block", "density": 0.3},
    "normal": {"probe": Probe(kind="normal"), "mask": "small"},
    "low rank": {"probe": Probe(kind="lowrank", rank=2)},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_pass_measures_the_shifted_weights_and_leaves_the_true_ones(name, tied):
    made, loss = model(tied=tied), NextWord()
    zo = ZerothOrder(made, lr=1e-3, eps=1e-2, **SETTINGS[name])
    before = weights(made)
    shift = zo._shifts(0)[0]
    active = zo.mask.active(zo.sites, 0)
    variants = [(Shift(shift.seed, size, shift.right_seed),) for size in (0.01, -0.01)] + [()]
    with torch.no_grad():
        with zo._prober.at(variants, 0, active):
            found = loss.losses(made, 3)
        moved = model(tied=tied)
        named = dict(moved.named_parameters())
        for row, size in zip(found, (0.01, -0.01, 0.0), strict=True):
            for site in active:
                named[site.name].data = before[site.name] + size * direction(zo, site, shift)
            torch.testing.assert_close(row, loss(moved), rtol=1e-5, atol=1e-6)
    assert same(before, weights(made))
    assert not any("forward" in vars(module) for module in made.modules())


@pytest.mark.parametrize("mask", ["none", "small"])
def test_a_direction_per_example_is_that_of_the_example_whoever_computes_it(mask):
    made, loss = model(), NextWord(sizes=[4, 2])
    zo = ZerothOrder(made, lr=0.1, eps=1e-2, mask=mask, probe=Probe(per_example=True))
    before, shift = weights(made), zo._shifts(0)[0]
    from agentopt.weights.zeroth._flipout import Flips

    flips = Flips(zo._directions, 6)

    def noise(site, example):
        plain = direction(zo, site, shift) * flips.of(site, shift, 0)[example].view(-1, *[1] * (site.tensor.dim() - 1))
        return plain * flips.of(site, shift, 1)[example] if site.is_matrix else plain

    with torch.no_grad():
        cast(Any, zo._prober).begin(loss.pass_sizes, 1, 0)
        with zo._prober.at([(Shift(shift.seed, 0.01),), (Shift(shift.seed, -0.01),)], 0, zo.sites):
            found = loss.losses(made, 2)
        moved = model()
        named = dict(moved.named_parameters())
        for row, size in zip(found, (0.01, -0.01), strict=True):
            for example in range(6):
                for site in zo.sites:
                    named[site.name].data = before[site.name] + size * noise(site, example)
                one = NextWord()
                one.ids, one.pass_sizes = loss.ids[example : example + 1], [1]
                torch.testing.assert_close(row[example], one(moved)[0], rtol=1e-5, atol=1e-6)
    result = zo.step(loss)
    assert len(result.scalars) == 6
    for site in zo.sites:
        estimate = sum(result.scalars[example] * noise(site, example) for example in range(6))
        want = before[site.name] - 0.1 * estimate
        if site.threshold is not None:
            moves = before[site.name].abs() <= site.threshold
            want = torch.where(moves, want.clamp(-site.threshold, site.threshold), want)
        torch.testing.assert_close(site.tensor.detach(), want, rtol=1e-5, atol=1e-6)


def test_two_copies_in_one_pass_are_two_passes():
    one, two = model(), model()
    first = ZerothOrder(one, lr=1e-2, copies=1).step(NextWord())
    second = ZerothOrder(two, lr=1e-2, copies=2).step(NextWord())
    assert first.losses == pytest.approx(second.losses, rel=1e-5)
    assert first.forwards == second.forwards == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_steps_without_learning_leave_every_bit(dtype):
    """Nothing is perturbed in place, so nothing drifts; benchmarks/zeroth_precision.py does 1,000 steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = torch.nn.Sequential(torch.nn.Embedding(50, 24), torch.nn.LayerNorm(24), torch.nn.Linear(24, 7))
    made = made.to(getattr(torch, dtype))
    made[2].weight.data[0, :2] = torch.tensor([-0.0, 0.0])
    before = weights(made)
    ids = torch.arange(12)
    zo = ZerothOrder(made, lr=0.0, mask="small")
    moved = [zo.step(lambda tuned: tuned(ids).float().square().mean()).losses for _ in range(60)]
    assert len(set(moved)) > 30
    after = weights(made)
    assert all(torch.equal(_bits(before[name]), _bits(after[name])) for name in before)


def _bits(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("mask", "update"),
    [("small", "fixed"), ("large", "fixed"), ("random", "fixed"), ("small", "stored"), ("large", "stored")],
)
def test_a_fixed_mask_keeps_its_set(mask, update, dtype):
    made = model(getattr(torch, dtype))
    before = weights(made)
    probe = Probe(normalize="std")
    zo = ZerothOrder(made, lr=0.5, eps=1e-2, mask=mask, density=0.4, mask_update=update, probe=probe)
    first = {site.name: direction(zo, site, zo._shifts(0)[0]) != 0 for site in zo.sites}
    for _ in range(4):
        zo.step(NextWord())
    for site in zo.sites:
        moving = first[site.name]
        if site.is_matrix:
            assert float(moving.float().mean()) == pytest.approx(0.4, abs=0.08)
            assert torch.equal(before[site.name][~moving], site.tensor.detach()[~moving])
        shift = zo._shifts(4)[0]
        assert torch.equal(direction(zo, site, shift, 4) != 0, moving)


def test_a_dynamic_mask_stops_what_outgrows_it():
    made = model()
    zo = ZerothOrder(made, lr=0.05, mask="small", mask_update="dynamic", probe=Probe(normalize="std"))
    zo.step(NextWord())
    grown = [site for site in zo.sites if site.is_matrix and bool((site.tensor.abs() > (site.threshold or 0)).any())]
    after = weights(made)
    zo.step(NextWord())
    for site in grown:
        outside = after[site.name].abs() > site.threshold
        assert torch.equal(after[site.name][outside], site.tensor.detach()[outside])


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "sgd"},
        {"method": "sign"},
        {"method": "momentum", "mask": "small"},
        {"method": "adam"},
        {"method": "hizoo", "probe": Probe(kind="normal")},
        {"method": "conservative"},
        {"method": "jvp"},
        {"probe": Probe(kind="lowrank", rank=2, lazy=3)},
        {"probe": Probe(sides=1, population=4, normalize="std")},
        {"probe": Probe(per_example=True, normalize="std"), "mask": "small"},
        {"mask": "block", "density": 0.01, "mask_update": "dynamic"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_records_alone_make_the_same_weights(settings, dtype):
    if settings.get("method") == "jvp" and dtype == "bfloat16":
        settings = {**settings, "lr": 1e-3}
    made = model(getattr(torch, dtype))
    given: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "seed": 3, **settings}
    zo = ZerothOrder(made, **given)
    results = [zo.step(NextWord(seed=number)) for number in range(4)]
    again = model(getattr(torch, dtype))
    given["lr"] = 9.0
    other = ZerothOrder(again, **given)
    for result in results:
        other.update(result.step, zo_seed(3, result.step), result.scalars, result.lr)
    assert same(weights(made), weights(again))
    assert not same(weights(made), weights(model(getattr(torch, dtype))))


def zo_seed(seed, step):
    from agentopt.weights.zeroth import probe_seed

    return probe_seed(seed, step, 0)


@pytest.mark.parametrize("name", ["mezo", "fzoo", "grzo", "lozo", "zo-adam", "zo-conservative", "forward-gradient"])
def test_presets_lower_the_loss(name):
    made, loss = model(), NextWord()
    start = float(loss(made).detach().mean())
    tuned: dict[str, Any] = {"lr": 3e-3, "eps": 1e-3} if name != "zo-adam" else {"lr": 3e-4}
    zo = ZerothOrder.preset(name, made, **tuned)
    for _ in range(25):
        zo.step(loss)
    assert float(loss(made).detach().mean()) < start


def test_any_scalar_is_a_loss():
    made = model()
    calls = []

    def reward(tuned):
        calls.append(tuned)
        return -float(tuned.lm_head.weight.detach().sum())

    result = ZerothOrder(made, lr=1e-3).step(reward)
    # The first call shows that the loss reads a tensor itself; from then on it sees the shifted one there.
    assert len(calls) == 3 and calls[0] is made and result.forwards == 2
    assert result.losses[0] != result.losses[1] and result.moved


def test_a_loss_that_is_no_number_changes_nothing():
    made = model()
    before = weights(made)
    zo = ZerothOrder(made, lr=1e-3)
    with pytest.raises(NonFiniteLoss, match=r"step 0: the loss of example 0 is nan.*learning rate"):
        zo.step(lambda _: float("nan"))
    assert same(before, weights(made)) and zo.step_number == 0


def test_weight_decay_spares_vectors_and_what_does_not_move():
    made = model()
    before = weights(made)
    zo = ZerothOrder(made, lr=0.1, weight_decay=1.0, mask="small", density=0.5, mask_update="dynamic")
    zo.step(lambda _: 1.0)
    for site in zo.sites:
        if not site.is_matrix:
            assert torch.equal(before[site.name], site.tensor.detach())
        else:
            small = before[site.name].abs() <= site.threshold
            torch.testing.assert_close(site.tensor.detach()[small], before[site.name][small] * 0.9)
            assert torch.equal(site.tensor.detach()[~small], before[site.name][~small])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr: found -1.0"),
        ({"eps": 0.0}, "eps: found 0.0"),
        ({"density": 0.0}, "density: found 0.0"),
        ({"mask": "tiny"}, "mask: found 'tiny'"),
        ({"method": "sgdd"}, "method: found 'sgdd'"),
        ({"mask": "small", "probe": Probe(kind="lowrank")}, "low-rank probe"),
        ({"method": "conservative", "weight_decay": 0.1}, "conservative"),
        ({"method": "hizoo"}, "hizoo"),
        ({"trainable": lambda name: False}, "nothing to tune"),
        ({"schedule": "steps"}, "schedule"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    given: dict[str, Any] = {"lr": 1e-3, **settings}
    with pytest.raises(UserError, match=message):
        ZerothOrder(model(), **given)


def test_records_of_another_run_are_refused():
    zo = ZerothOrder(model(), lr=1e-3, seed=1)
    with pytest.raises(UserError, match="next step is 0"):
        zo.update(1, zo_seed(1, 1), [0.5], 1e-3)
    with pytest.raises(UserError, match="seed"):
        zo.update(0, zo_seed(2, 0), [0.5], 1e-3)
