"""Which rows and which costs model and guide give: plates, scales, masks, sequences, conditioning."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.costs import AbsoluteError, ExpectedSquaredError, NegativeLogLikelihood, SquaredError
from pyro_wae.kernels import Gaussian
from pyro_wae.penalties import MMD, Penalty


class Capture(Penalty):
    """A penalty that keeps the rows and the context that reach it; its value is the mean of the codes."""

    def __init__(self):
        super().__init__()
        self.codes, self.prior, self.context = None, None, None

    def estimate(self, codes, prior, context):
        self.codes, self.prior, self.context = codes.detach(), prior.detach(), context
        return codes.mean()


def rows(model, guide, *args, **options):
    """The codes (n, d), prior draws and terms of one step."""
    capture = Capture()
    loss = WAELoss(capture, **options)
    value = loss.loss_and_grads(model, guide, *args)
    terms = loss.terms.as_dict()
    assert value == pytest.approx(terms["cost"] + terms["weight"] * terms["penalty"], rel=1e-5)
    return capture.codes.squeeze(0), capture.prior, terms


def delta(value, event_dim=0):
    return dist.Delta(value, event_dim=event_dim)


# The data plate


def autoencoder(x, index=None, size=None, dim=None, **kwargs):
    with pyro.plate("data", len(x), subsample_size=size, subsample=index, dim=dim) as ind:
        shape = (len(ind), 2)
        z = pyro.sample("z", dist.Normal(x.new_zeros(shape), 1).to_event(1))
        pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x[ind])


def encode(x, index=None, size=None, dim=None, shift=1.0):
    with pyro.plate("data", len(x), subsample_size=size, subsample=index, dim=dim) as ind:
        pyro.sample("z", delta(x[ind] + shift, 1))


def test_the_loss_is_per_datum_whatever_the_size_of_the_data_set():
    batch = torch.randn(6, 2)
    expected = {}
    for n in (6, 60, 600):
        x = torch.cat([batch, torch.randn(n - 6, 2)])
        codes, prior, terms = rows(autoencoder, encode, x, torch.arange(6))
        torch.testing.assert_close(codes, batch + 1)
        assert prior.shape == (6, 2)
        assert terms["cost"] == pytest.approx(2)  # two elements off by 1
        expected.setdefault("penalty", terms["penalty"])
        assert terms == pytest.approx(terms | {"penalty": batch.mean().item() + 1})


def test_the_size_of_the_data_set_reaches_the_penalty():
    x = torch.randn(30, 2)
    for options, expected in (((torch.arange(6),), 30), ((None, 6), 30), ((), None)):
        capture = Capture()
        WAELoss(capture).loss(autoencoder, encode, x, *options)
        assert capture.context.data_size == expected


def test_a_random_subsample_pairs_codes_with_their_own_data():
    x = torch.randn(100, 2)
    codes, prior, terms = rows(autoencoder, encode, x, None, 7)
    assert codes.shape == prior.shape == (7, 2)
    assert terms["cost"] == pytest.approx(2, rel=1e-5)


def test_a_plate_without_a_size_takes_that_of_its_sites():
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", delta(x + 1, 1))

    x = torch.randn(9, 2)
    codes, prior, terms = rows(model, guide, x)
    torch.testing.assert_close(codes, x + 1)
    assert prior.shape == (9, 2)
    assert terms["cost"] == pytest.approx(2)


def test_a_data_plate_may_have_any_dim():
    x = torch.randn(9, 2)

    def model(x):
        with pyro.plate("data", len(x), dim=-3):
            z = pyro.sample("z", dist.Normal(0.0, 1).expand([1, 1, 2]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x[:, None, None])

    def guide(x):
        with pyro.plate("data", len(x), dim=-3):
            pyro.sample("z", delta(x[:, None, None] + 1, 1))

    for options in ({}, {"num_particles": 2, "vectorize_particles": True}):
        capture = Capture()
        loss = WAELoss(capture, **options)
        loss.loss(model, guide, x)
        for codes in capture.codes:
            torch.testing.assert_close(codes, x + 1)
        assert loss.terms.cost.item() == pytest.approx(2)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("how", ["named", "subsampled"])
@pytest.mark.parametrize("vectorize", [False, True])
def test_two_nested_plates_give_one_row_for_each_datum(outer, how, vectorize):
    """Codes of shape (data, parts): the data plate may be the left dimension or the right one."""
    n, parts = 5, 3
    x = torch.randn(20 if how == "subsampled" else n, parts, 2)
    index = torch.tensor([3, 1, 4, 0, 2])
    data_dim, part_dim = (-2, -1) if outer else (-1, -2)

    def plates():
        subsample = index if how == "subsampled" else None
        return pyro.plate("data", len(x), subsample=subsample, dim=data_dim), pyro.plate("parts", parts, dim=part_dim)

    def batch(x):
        x = x[index] if how == "subsampled" else x
        return x if outer else x.transpose(0, 1)

    def model(x):
        data, part = plates()
        with data, part:
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=batch(x))

    def guide(x):
        data, part = plates()
        with data, part:
            pyro.sample("z", delta(batch(x) + 1, 1))

    capture = Capture()
    loss = WAELoss(
        capture,
        data_plate="data" if how == "named" else None,
        num_particles=2 if vectorize else 1,
        vectorize_particles=vectorize,
        prior_draws=2,
    )
    loss.loss(model, guide, x)
    expected = (x[index] if how == "subsampled" else x).flatten(1) + 1
    assert len(capture.codes) == 1 + vectorize
    for codes in capture.codes:
        torch.testing.assert_close(codes, expected)
    assert capture.prior.shape == (2 * n * (1 + vectorize), parts * 2)
    assert loss.terms.cost.item() == pytest.approx(2 * parts)


def test_naming_the_other_plate_takes_its_rows():
    x = torch.randn(5, 3)

    def model(x):
        with pyro.plate("a", 5, dim=-2), pyro.plate("b", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1))
            pyro.sample("x", dist.Normal(z, 1), obs=x)

    def guide(x):
        with pyro.plate("a", 5, dim=-2), pyro.plate("b", 3, dim=-1):
            pyro.sample("z", delta(x + 1))

    codes, _, terms = rows(model, guide, x, data_plate="a")
    torch.testing.assert_close(codes, x + 1)
    assert terms["cost"] == pytest.approx(3)
    codes, _, terms = rows(model, guide, x, data_plate="b")
    torch.testing.assert_close(codes, x.T + 1)
    assert terms["cost"] == pytest.approx(5)


def test_prior_draws_of_an_inner_plate_keep_the_layout_of_the_codes():
    scale = torch.tensor([1.0, 10.0, 100.0])

    def model(x):
        with pyro.plate("parts", 3, dim=-2), pyro.plate("data", 500, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale[:, None, None]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("parts", 3, dim=-2), pyro.plate("data", 500, dim=-1):
            pyro.sample("z", delta(x, 1))

    _, prior, _ = rows(model, guide, torch.randn(3, 500, 2), data_plate="data")
    # Relative standard error of a standard deviation from 500 draws: 0.03.
    torch.testing.assert_close(prior.std(0), scale.repeat_interleave(2), rtol=0.13, atol=0)


def test_an_observed_site_may_lie_in_fewer_or_more_inner_plates_than_the_latent():
    x, y = torch.randn(4), torch.randn(4, 3, 6)

    def model(x, y):
        data, part, step = pyro.plate("data", 4, dim=-3), pyro.plate("parts", 3, dim=-2), pyro.plate("t", 6, dim=-1)
        with data:
            with part:
                z = pyro.sample("z", dist.Normal(0.0, 1))
            pyro.sample("x", dist.Normal(z.sum(-2, keepdim=True), 1), obs=x[:, None, None])
            with part, step:
                pyro.sample("y", dist.Normal(z, 1), obs=y)

    def guide(x, y):
        with pyro.plate("data", 4, dim=-3), pyro.plate("parts", 3, dim=-2):
            pyro.sample("z", delta(x[:, None, None].expand(4, 3, 1)))

    codes, _, terms = rows(model, guide, x, y)
    torch.testing.assert_close(codes, x[:, None].expand(4, 3))
    assert terms["cost/x"] == pytest.approx((2 * x).square().mean().item(), rel=1e-5)
    assert terms["cost/y"] == pytest.approx((x[:, None, None] - y).square().sum((1, 2)).mean().item(), rel=1e-5)


def test_a_sequential_plate_makes_its_sites_columns():
    x = torch.randn(5, 3)

    def model(x):
        data = pyro.plate("data", 5)
        for i in pyro.plate("parts", 3):
            with data:
                z = pyro.sample(f"z{i}", dist.Normal(0.0, 1))
                pyro.sample(f"x{i}", dist.Normal(z, 1), obs=x[:, i])

    def guide(x):
        data = pyro.plate("data", 5)
        for i in reversed(list(pyro.plate("parts", 3))):
            with data:
                pyro.sample(f"z{i}", delta(x[:, i] + 1))

    codes, prior, terms = rows(model, guide, x)
    torch.testing.assert_close(codes, x + 1)
    assert prior.shape == (5, 3)
    assert terms["cost"] == pytest.approx(3)
    assert terms["cost/x2"] == pytest.approx(1)


def test_a_subsampled_sequential_plate_replays_its_indices_for_the_prior():
    x = torch.randn(5, 10)

    def model(x):
        data = pyro.plate("data", 5)
        for i in pyro.plate("parts", 10, subsample_size=2):
            with data:
                z = pyro.sample(f"z{i}", dist.Normal(100.0 * i, 1))
                pyro.sample(f"x{i}", dist.Normal(z, 1), obs=x[:, i])

    def guide(x):
        data = pyro.plate("data", 5)
        for i in pyro.plate("parts", 10, subsample_size=2):
            with data:
                pyro.sample(f"z{i}", delta(x[:, i] + 100 * i))

    codes, prior, _ = rows(model, guide, x)
    torch.testing.assert_close((codes / 100).mean(0).round(), (prior / 100).mean(0).round())


def test_sites_of_different_event_dims_stand_side_by_side():
    x = torch.randn(5, 7)

    def model(x):
        with pyro.plate("data", 5):
            a = pyro.sample("a", dist.Normal(0.0, 1))
            b = pyro.sample("b", dist.Normal(torch.zeros(2), 1).to_event(1))
            c = pyro.sample("c", dist.Normal(torch.zeros(2, 2), 1).to_event(2))
            mean = torch.cat([a[..., None], b, c.flatten(-2)], -1)
            pyro.sample("x", dist.Normal(mean, 1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", 5):
            pyro.sample("c", delta(x[:, 3:].reshape(5, 2, 2) + 1, 2))
            pyro.sample("a", delta(x[:, 0] + 1))
            pyro.sample("b", delta(x[:, 1:3] + 1, 1))

    for options in ({}, {"num_particles": 3, "vectorize_particles": True}):
        capture = Capture()
        loss = WAELoss(capture, **options)
        loss.loss(model, guide, x)
        for codes in capture.codes:
            torch.testing.assert_close(codes, x + 1)
        assert loss.terms.cost.item() == pytest.approx(7)


def test_a_plate_reused_as_an_object_of_the_model_serves_again():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.plate = pyro.plate("data", 5, dim=-1)

        def forward(self, x):
            with self.plate:
                z = pyro.sample("z", dist.Normal(0.0, 1))
                z2 = pyro.sample("z2", dist.Normal(z, 1))
                pyro.sample("x", dist.Normal(z2, 1), obs=x)

        def guide(self, x):
            with self.plate:
                pyro.sample("z", delta(x))
                pyro.sample("z2", delta(x + 1))

    net, x = Model(), torch.randn(5)
    for _ in range(2):
        codes, _, terms = rows(net, net.guide, x)
        torch.testing.assert_close(codes, torch.stack([x, x + 1], 1))
        assert terms["cost"] == pytest.approx(1)


# The user's scale


def scaled(x, latent=1.0, observed=1.0):
    with pyro.plate("data", 4 * len(x), subsample=torch.arange(len(x))):
        with poutine.scale(scale=latent):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
        with poutine.scale(scale=observed):
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)


def scaled_guide(x, *args):
    with pyro.plate("data", 4 * len(x), subsample=torch.arange(len(x))):
        pyro.sample("z", delta(x + 1, 1))


@pytest.mark.parametrize("scale", [0.25, 3.0, torch.tensor(3.0)])
@pytest.mark.parametrize("cost", [None, lambda x, g: (x - g).square().sum(1)])
def test_a_scale_on_the_observed_site_scales_its_cost_alone(scale, cost):
    x = torch.randn(6, 2)
    _, _, terms = rows(scaled, scaled_guide, x, 1.0, scale, cost=cost)
    assert terms["cost"] == pytest.approx(2 * float(scale), rel=1e-5)
    assert terms["penalty"] == pytest.approx(x.mean().item() + 1, rel=1e-5)


@pytest.mark.parametrize("cost", [None, lambda x, g: (x - g).square().sum(1), NegativeLogLikelihood()])
@pytest.mark.parametrize("options", [{}, {"num_particles": 2, "vectorize_particles": True}], ids=str)
def test_a_scale_for_each_datum_weighs_its_cost(cost, options):
    x, weights = torch.randn(6, 2), torch.arange(1.0, 7.0)
    loss = WAELoss(Capture(), cost=cost, **options)
    loss.loss(scaled, scaled_guide, x, 1.0, weights)
    one = 1 + torch.log(torch.tensor(2 * torch.pi)).item() if isinstance(cost, NegativeLogLikelihood) else 2
    assert loss.terms.cost.item() == pytest.approx(one * weights.mean().item(), rel=1e-5)


@pytest.mark.parametrize("scale", [0.25, torch.tensor(3.0), torch.tensor([3.0])])
def test_a_scale_on_the_latent_site_scales_the_penalty_alone(scale):
    x = torch.randn(6, 2)
    _, _, terms = rows(scaled, scaled_guide, x, scale)
    assert terms["cost"] == pytest.approx(2, rel=1e-5)
    assert terms["penalty"] == pytest.approx(float(scale) * (x.mean().item() + 1), rel=1e-5)


def test_scale_handlers_multiply():
    x = torch.randn(6, 2)
    model = poutine.scale(poutine.scale(scaled, scale=2.0), scale=3.0)
    _, _, terms = rows(model, scaled_guide, x)
    assert terms["cost"] == pytest.approx(12, rel=1e-5)
    assert terms["penalty"] == pytest.approx(6 * (x.mean().item() + 1), rel=1e-5)


def two_scales(x, first, second):
    with pyro.plate("data", len(x)):
        with poutine.scale(scale=first):
            a = pyro.sample("a", dist.Normal(0.0, 1))
        with poutine.scale(scale=second):
            b = pyro.sample("b", dist.Normal(0.0, 1))
        pyro.sample("x", dist.Normal(a + b, 1), obs=x)


def two_codes(x, *args):
    with pyro.plate("data", len(x)):
        pyro.sample("a", delta(x))
        pyro.sample("b", delta(x + 1))


def test_sites_compared_apart_have_their_own_scales():
    x = torch.randn(6)
    loss = WAELoss({"a": Capture(), "b": Capture()})
    loss.loss(two_scales, two_codes, x, 2.0, 5.0)
    assert loss.terms.penalties["a"].item() == pytest.approx(2 * x.mean().item(), rel=1e-5)
    assert loss.terms.penalties["b"].item() == pytest.approx(5 * (x.mean().item() + 1), rel=1e-5)


def test_a_joint_code_takes_one_scale():
    x = torch.randn(6)
    learnt = nn.Parameter(torch.tensor(2.0))
    for first, second in ((2.0, 2.0), (learnt, learnt), (learnt, 2.0)):
        _, _, terms = rows(two_scales, two_codes, x, first, second)
        assert terms["penalty"] == pytest.approx(2 * (x.mean().item() + 0.5), rel=1e-5)


# Masks


def masked(x, mask, where):
    with pyro.plate("data", len(x)), poutine.mask(mask=mask if where != "fn" else torch.ones_like(mask)):
        prior = dist.Normal(x.new_zeros(2), 1).to_event(1)
        z = pyro.sample("z", prior.mask(mask) if where != "poutine" else prior)
        fn = dist.Normal(z, 1).to_event(1)
        pyro.sample("x", fn.mask(mask) if where != "poutine" else fn, obs=x)


def masked_guide(x, *args):
    with pyro.plate("data", len(x)):
        pyro.sample("z", delta(x + 1, 1))


@pytest.mark.parametrize("where", ["poutine", "fn", "both"])
@pytest.mark.parametrize(
    "options", [{}, {"num_particles": 2, "vectorize_particles": True}, {"num_particles": 2}], ids=str
)
def test_masked_data_are_left_out_of_codes_prior_and_mean_cost(where, options):
    x = torch.randn(6, 2)
    mask = torch.tensor([True, False, True, True, False, True])
    x[~mask] = 1e6
    capture = Capture()
    loss = WAELoss(capture, prior_draws=3, **options)
    loss.loss(masked, masked_guide, x, mask, where)
    particles = options.get("num_particles", 1)
    assert capture.codes.shape == (particles, 4, 2)
    for codes in capture.codes:
        torch.testing.assert_close(codes, x[mask] + 1)
    assert capture.prior.shape == (3 * 4 * particles, 2)
    assert capture.context.shared_data
    assert loss.terms.cost.item() == pytest.approx(2, rel=1e-5)


def test_masks_of_handler_and_distribution_are_joined():
    x, a, b = torch.randn(4, 2), torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 0]).bool()

    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=a):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1).mask(b), obs=x + torch.arange(4.0)[:, None])

    _, _, terms = rows(model, masked_guide, x)
    assert terms["cost"] == pytest.approx(2)  # datum 0 alone, two elements off by 1


@pytest.mark.parametrize("cost", [SquaredError(), AbsoluteError(), lambda x, g: (x - g).abs().sum(1)])
def test_missing_elements_of_an_event_cost_nothing_and_pass_no_nan(cost):
    """Elements are missing where x is NaN, marked by fn.mask under to_event."""
    x = torch.randn(5, 3)
    seen = torch.rand(5, 3) > 0.4
    seen[0] = False
    weight = torch.eye(3).requires_grad_()

    def model(x):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 1).mask(seen).to_event(1), obs=x.where(seen, torch.nan))

    def guide(x):
        with pyro.plate("data", 5):
            pyro.sample("z", delta(x + 1, 1))

    loss = WAELoss(Capture(), cost=cost, penalty_weight=0.0)
    with pyro.validation_enabled(False):
        loss.differentiable_loss(model, guide, x).backward()
    # Datum 0 has nothing observed: four remain, each element off by 1.
    assert loss.terms.cost.item() == pytest.approx(seen[seen.any(1)].sum().item() / seen.any(1).sum().item(), rel=1e-5)
    assert weight.grad.isfinite().all()


def test_two_observed_sites_share_the_count_of_data_with_anything_observed():
    x = torch.randn(4)
    a, b = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([0, 1, 1, 0]).bool()

    def model(x):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1))
            with poutine.mask(mask=a):
                pyro.sample("a", dist.Normal(z, 1), obs=x)
            with poutine.mask(mask=b):
                pyro.sample("b", dist.Normal(z, 1), obs=x - 1)

    def guide(x):
        with pyro.plate("data", 4):
            pyro.sample("z", delta(x + 1))

    _, _, terms = rows(model, guide, x)
    assert terms["cost/a"] == pytest.approx(2 * 1 / 3, rel=1e-5)
    assert terms["cost/b"] == pytest.approx(2 * 4 / 3, rel=1e-5)


# Ragged sequences

LENGTHS = [4, 2, 3, 1, 4]


def ragged():
    x = torch.randn(len(LENGTHS), max(LENGTHS))
    for i, length in enumerate(LENGTHS):
        x[i, length:] = 1e5
    return x, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def vectorised_time(x, mask):
    with pyro.plate("data", len(x), dim=-2), pyro.plate("time", x.shape[1], dim=-1), poutine.mask(mask=mask):
        z = pyro.sample("z", dist.Normal(0.0, 1))
        pyro.sample("x", dist.Normal(2 * z, 1), obs=x)


def vectorised_time_guide(x, mask):
    with pyro.plate("data", len(x), dim=-2), pyro.plate("time", x.shape[1], dim=-1), poutine.mask(mask=mask):
        pyro.sample("z", delta(x))


def sequential_time(x, mask):
    with pyro.plate("data", len(x)):
        last = torch.zeros(len(x))
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=mask[:, t]):
                last = pyro.sample(f"z{t}", dist.Normal(0.5 * last, 1))
                pyro.sample(f"x{t}", dist.Normal(2 * last, 1), obs=x[:, t])


def sequential_time_guide(x, mask):
    with pyro.plate("data", len(x)):
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=mask[:, t]):
                pyro.sample(f"z{t}", delta(x[:, t]))


@pytest.mark.parametrize(
    ("model", "guide"),
    [(vectorised_time, vectorised_time_guide), (sequential_time, sequential_time_guide)],
    ids=["plate", "markov"],
)
@pytest.mark.parametrize("options", [{}, {"num_particles": 2, "vectorize_particles": True}], ids=str)
def test_a_ragged_batch_costs_what_its_sequences_cost_alone(model, guide, options):
    x, mask = ragged()
    capture = Capture()
    loss = WAELoss(capture, data_plate="data", **options)
    loss.loss(model, guide, x, mask)
    alone = []
    for i, length in enumerate(LENGTHS):
        # Twice the one sequence, for a penalty needs two data.
        pair = x[[i, i], :length]
        one = WAELoss(Capture(), data_plate="data")
        one.loss(model, guide, pair, torch.ones_like(pair).bool())
        alone.append(one.terms.cost.item())
        by_hand = pair[0].square().sum().item()  # the decoder gives 2 x
        assert alone[-1] == pytest.approx(by_hand, rel=1e-5)
    assert loss.terms.cost.item() == pytest.approx(sum(alone) / len(alone), rel=1e-5)
    for codes in capture.codes:
        torch.testing.assert_close(codes, x.where(mask, 0.0))
    prior = capture.prior.unflatten(0, (-1, len(LENGTHS)))
    assert (prior[:, ~mask] == 0).all()
    assert (prior[:, mask] != 0).all()
    assert capture.context.shared_data


@pytest.mark.parametrize(
    ("cost", "constant", "factor"),
    [(NegativeLogLikelihood(), 0.5 * math.log(2 * math.pi), 0.5), (ExpectedSquaredError(), 1.0, 1.0)],
)
def test_masked_steps_cost_nothing_even_where_a_perfect_output_costs_something(cost, constant, factor):
    x, mask = ragged()
    _, _, terms = rows(vectorised_time, vectorised_time_guide, x, mask, data_plate="data", cost=cost)
    expected = (constant + factor * x[mask].square()).sum().item() / len(LENGTHS)
    assert terms["cost"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("particles", [1, 3])
def test_ragged_codes_that_match_the_prior_have_no_penalty(particles):
    """Codes drawn from the prior, one mask for both: 300 unbiased estimates have mean 0 within 4 standard errors."""
    _, mask = ragged()
    x = torch.randn(len(LENGTHS), max(LENGTHS))

    def guide(x, mask):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("time", x.shape[1], dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1))

    loss = WAELoss(MMD(Gaussian(1.0)), data_plate="data", num_particles=particles, vectorize_particles=True)
    values = []
    for _ in range(300):
        loss.loss(vectorised_time, guide, x, mask)
        values.append(loss.terms.penalty)
    values = torch.stack(values)
    assert abs(values.mean()) < 4 * values.std() / 300**0.5


# Sites that are neither codes nor costs


def test_an_auxiliary_site_of_a_discrete_guide_is_no_error():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1))
            pyro.sample("x", dist.Normal(a, 1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Bernoulli(0.5), infer={"is_auxiliary": True})
            pyro.sample("a", delta(x + u))

    codes, _, _ = rows(model, guide, torch.zeros(50))
    assert set(codes.flatten().tolist()) == {0, 1}


def test_obs_mask_imputes_a_site_that_is_no_code():
    x, seen = torch.randn(6), torch.tensor([1, 1, 0, 1, 0, 1]).bool()

    def model(x):
        with pyro.plate("data", 6):
            a = pyro.sample("a", dist.Normal(0.0, 1))
            pyro.sample("x", dist.Normal(a, 1), obs=x.where(seen, 1e6), obs_mask=seen)

    def guide(x):
        with pyro.plate("data", 6):
            pyro.sample("a", delta(x + 1))
            with poutine.mask(mask=~seen):
                pyro.sample("x_unobserved", delta(torch.full((6,), 1e6)))

    codes, _, terms = rows(model, guide, x)
    torch.testing.assert_close(codes, x[:, None] + 1)
    assert set(terms) == {"cost", "cost/x", "penalty", "weight"}
    assert terms["cost"] == pytest.approx(1, rel=1e-5)  # the mean over the four that were observed
    loss = WAELoss(Capture(), cost={"x": AbsoluteError()})
    loss.loss(model, guide, x)
    assert loss.terms.costs["x"].item() == pytest.approx(1, rel=1e-5)


# Options by site


def test_costs_by_site():
    x = torch.randn(6)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1))
            pyro.sample("s", dist.Normal(a, 1), obs=x)
            pyro.sample("e", dist.Normal(a, 3.0), obs=x)
            pyro.sample("f", dist.Normal(a, 1), obs=x)
            pyro.sample("n", dist.Normal(a, 1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", delta(x + 2))

    costs = {
        "n": NegativeLogLikelihood(),
        "s": SquaredError(),
        "e": ExpectedSquaredError(),
        "f": lambda x, g: (x - g).abs() + 1,
    }
    _, _, terms = rows(model, guide, x, cost=costs)
    assert terms["cost/s"] == pytest.approx(4, rel=1e-5)
    assert terms["cost/e"] == pytest.approx(4 + 9, rel=1e-5)
    assert terms["cost/f"] == pytest.approx(3, rel=1e-5)
    assert terms["cost/n"] == pytest.approx(2 + 0.5 * torch.log(torch.tensor(2 * torch.pi)).item(), rel=1e-5)


def test_penalties_by_site_see_their_own_columns_and_draws():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.full((2,), 50.0), 1).to_event(1))
            b = pyro.sample("b", dist.Normal(-50.0, 1))
            pyro.sample("x", dist.Normal(a.sum(-1) + b, 1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", delta(x[:, None] + torch.tensor([1.0, 2.0]), 1))
            pyro.sample("b", delta(x + 3))

    x, a, b = torch.randn(6), Capture(), Capture()
    WAELoss({"b": b, "a": a}, prior_draws=2).loss(model, guide, x)
    torch.testing.assert_close(a.codes[0], torch.stack([x + 1, x + 2], 1))
    torch.testing.assert_close(b.codes[0], x[:, None] + 3)
    assert a.prior.shape == (12, 2)
    assert (a.prior > 40).all()
    assert b.prior.shape == (12, 1)
    assert (b.prior < -40).all()


def test_a_mask_on_one_site_leaves_the_others_whole():
    x, mask = torch.randn(4), torch.tensor([True, False, True, True])

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1))
            with poutine.mask(mask=mask):
                pyro.sample("b", dist.Normal(0.0, 1))
            pyro.sample("x", dist.Normal(a, 1), obs=x)

    codes, prior, _ = rows(model, two_codes, x)
    torch.testing.assert_close(codes, torch.stack([x, (x + 1).where(mask, 0.0)], 1))
    assert prior[1, 1] == 0
    assert (prior[mask] != 0).all()
    a, b = Capture(), Capture()
    WAELoss({"a": a, "b": b}).loss(model, two_codes, x)
    assert a.codes.shape == (1, 4, 1)
    assert b.codes.shape == (1, 3, 1)
