"""Which rows and which costs model and guide give: plates, scales, masks, sequences, conditioning."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import sites
from pyro import poutine
from references import Seen, nested, program
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.costs import ExpectedSquaredError, NegativeLogLikelihood


def rows(model, guide, *args, **options):
    """The codes (n, d), prior draws and terms of one step."""
    capture = Seen(torch.mean)
    loss = WAELoss(capture, **options)
    value = loss.loss_and_grads(model, guide, *args)
    terms = loss.terms.as_dict()
    assert value == pytest.approx(terms["cost"] + terms["weight"] * terms["penalty"], rel=1e-5)
    return capture.codes.squeeze(0), capture.prior, terms


def delta(value, event_dim=0):
    return dist.Delta(value, event_dim=event_dim)


def standard(d):
    return dist.Normal(torch.zeros(d), 1).to_event(1)


# The data plate


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("how", ["named", "subsampled"])
@pytest.mark.parametrize("vectorize", [False, True])
def test_two_nested_plates_give_one_row_for_each_datum(outer, how, vectorize):
    """Codes of shape (data, parts): the data plate may be the left dimension or the right one."""
    n, parts = 5, 3
    x = torch.randn(20 if how == "subsampled" else n, parts, 2)
    index = torch.tensor([3, 1, 4, 0, 2])
    data_dim, part_dim = (-2, -1) if outer else (-1, -2)

    def plates(_):
        subsample = index if how == "subsampled" else None
        return nested(
            pyro.plate("data", len(x), subsample=subsample, dim=data_dim), pyro.plate("parts", parts, dim=part_dim)
        )

    batch = x[index] if how == "subsampled" else x
    capture = Seen(torch.mean)
    loss = WAELoss(
        capture,
        data_plate="data" if how == "named" else None,
        num_particles=2 if vectorize else 1,
        vectorize_particles=vectorize,
        prior_draws=2,
    )
    programs = program(lambda x: delta(x + 1, 1), lambda x: standard(2), plate=plates)
    loss.loss(*programs, batch if outer else batch.transpose(0, 1))
    expected = batch.flatten(1) + 1
    assert len(capture.codes) == 1 + vectorize
    for codes in capture.codes:
        torch.testing.assert_close(codes, expected)
    assert capture.prior.shape == (2 * n * (1 + vectorize), parts * 2)
    assert loss.terms.cost.item() == pytest.approx(2 * parts)


def test_prior_draws_of_an_inner_plate_keep_the_layout_of_the_codes():
    scale = torch.tensor([1.0, 10.0, 100.0])
    programs = program(
        prior=lambda x: dist.Normal(torch.zeros(2), scale[:, None, None]).to_event(1),
        plate=lambda x: nested(pyro.plate("parts", 3, dim=-2), pyro.plate("data", 500, dim=-1)),
    )
    _, prior, _ = rows(*programs, torch.randn(3, 500, 2), data_plate="data")
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


def test_a_plate_reused_as_an_object_of_the_model_serves_again():
    plate, x = pyro.plate("data", 5, dim=-1), torch.randn(5)
    programs = program(
        lambda x: delta(x + 1), lambda x: dist.Normal(0.0, 1), lambda z: dist.Normal(z, 1), plate=lambda x: plate
    )
    for _ in range(2):
        codes, _, terms = rows(*programs, x)
        torch.testing.assert_close(codes, x[:, None] + 1)
        assert terms["cost"] == pytest.approx(1)


# The user's scale


@pytest.mark.parametrize(
    "scale", [0.25, 2.0, torch.tensor(3.0), torch.tensor([3.0]), (nn.Parameter(torch.tensor(2.0)), 2.0)]
)
def test_a_scale_on_the_latent_sites_scales_the_penalty_alone(scale):
    """A joint code takes one scale, which both of its sites have."""
    x = torch.randn(6)
    first, second = scale if isinstance(scale, tuple) else (scale, scale)

    def plate(x):
        return pyro.plate("data", 4 * len(x), subsample=torch.arange(len(x)))

    def model(x):
        with plate(x):
            with poutine.scale(scale=first):
                a = pyro.sample("a", dist.Normal(0.0, 1))
            with poutine.scale(scale=second):
                b = pyro.sample("b", dist.Normal(0.0, 1))
            pyro.sample("x", dist.Normal(a + b, 1), obs=2 * x)

    _, guide = sites({"a": (None, delta), "b": (None, lambda x: delta(x + 1))}, plate=plate)
    _, _, terms = rows(model, guide, x)
    assert terms["cost"] == pytest.approx(1, rel=1e-5)
    assert terms["penalty"] == pytest.approx(float(second) * (x.mean().item() + 0.5), rel=1e-5)


# Masks


def masked(x, mask, where):
    with pyro.plate("data", len(x)), poutine.mask(mask=mask if where != "fn" else torch.ones_like(mask)):
        prior = standard(2)
        z = pyro.sample("z", prior.mask(mask) if where != "poutine" else prior)
        fn = dist.Normal(z, 1).to_event(1)
        pyro.sample("x", fn.mask(mask) if where != "poutine" else fn, obs=x)


_, masked_guide = program(lambda x: delta(x + 1, 1))


@pytest.mark.parametrize("where", ["poutine", "fn", "both"])
@pytest.mark.parametrize(
    "options", [{}, {"num_particles": 2, "vectorize_particles": True}, {"num_particles": 2}], ids=str
)
def test_masked_data_are_left_out_of_codes_prior_and_mean_cost(where, options):
    x = torch.randn(6, 2)
    mask = torch.tensor([True, False, True, True, False, True])
    x[~mask] = 1e6
    capture = Seen(torch.mean)
    loss = WAELoss(capture, prior_draws=3, **options)
    loss.loss(masked, masked_guide, x, mask, where)
    particles = options.get("num_particles", 1)
    assert capture.codes.shape == (particles, 4, 2)
    for codes in capture.codes:
        torch.testing.assert_close(codes, x[mask] + 1)
    assert capture.prior.shape == (3 * 4 * particles, 2)
    assert capture.context.shared_data
    assert loss.terms.cost.item() == pytest.approx(2, rel=1e-5)


SELECTIONS = {
    "its own code": lambda code, noise: code[:, 0] > 0,
    "an element of the code": lambda code, noise: code > 0,
    "another draw of the guide": lambda code, noise: noise > 0,
    "nothing left": lambda code, noise: False,
}


@pytest.mark.parametrize("by", SELECTIONS)
def test_a_mask_that_the_guide_alone_has_is_an_error_unless_the_model_masks_as_much(by):
    """Codes that follow the prior and are selected by their values would have a penalty, whose right value is 0."""
    x, data_mask = torch.randn(200, 2), torch.arange(200) % 3 != 0

    def guide(x, mask, *args):
        with pyro.plate("data", len(x)):
            noise = pyro.sample("noise", dist.Normal(0.0, 1), infer={"is_auxiliary": True})
            kept = SELECTIONS[by](x, noise) if mask is None else mask
            fn = dist.Delta(x).mask(kept).to_event(1) if getattr(kept, "ndim", 1) == 2 else delta(x, 1).mask(kept)
            pyro.sample("z", fn)

    def model(x, _, mask=None):
        masked(x, torch.ones(200).bool() if mask is None else mask, "poutine")

    with pytest.raises(ValueError, match=r"'z' has a mask in the guide that leaves out.*around site 'z' in model"):
        WAELoss().loss(model, guide, x, None)
    for own in (data_mask, data_mask.clone(), torch.ones(200).bool()):
        codes, _, _ = rows(model, guide, x, own, data_mask)
        torch.testing.assert_close(codes, x[data_mask])


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


def vectorised_time(mask):
    return program(
        delta,
        lambda x: dist.Normal(0.0, 1),
        lambda z: dist.Normal(2 * z, 1),
        plate=lambda x: nested(
            pyro.plate("data", len(LENGTHS), dim=-2), pyro.plate("time", max(LENGTHS), dim=-1), poutine.mask(mask=mask)
        ),
    )


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


@pytest.mark.parametrize("make", [vectorised_time, lambda mask: (sequential_time, sequential_time_guide)])
@pytest.mark.parametrize("options", [{}, {"num_particles": 2, "vectorize_particles": True}], ids=str)
@pytest.mark.parametrize(
    ("cost", "constant", "factor"),
    [(None, 0, 1), (NegativeLogLikelihood(), 0.5 * math.log(2 * math.pi), 0.5), (ExpectedSquaredError(), 1, 1)],
)
def test_a_ragged_batch_costs_what_its_sequences_cost_alone(make, options, cost, constant, factor):
    """Masked steps cost nothing even where a perfect output costs something."""
    x, mask = ragged()
    capture = Seen(torch.mean)
    loss = WAELoss(capture, cost=cost, data_plate="data", **options)
    loss.loss(*make(mask), x, mask)
    expected = (constant + factor * x[mask].square()).sum().item() / len(x)  # outputs are 2 x
    assert loss.terms.cost.item() == pytest.approx(expected, rel=1e-5)
    for codes in capture.codes:
        torch.testing.assert_close(codes, x.where(mask, 0.0))
    prior = capture.prior.unflatten(0, (-1, len(LENGTHS)))
    assert (prior[:, ~mask] == 0).all()
    assert (prior[:, mask] != 0).all()
    assert capture.context.shared_data


# A plate without a size


@pytest.mark.parametrize("site", ["observed", "factor", "regulariser", "latent", "masked"])
def test_in_a_plate_without_a_size_other_numbers_of_data_are_refused_by_name(site):
    """Pyro adds up what is there; a mean over the site's own data would weigh it more."""
    x, y = torch.randn(40, 2), torch.randn(10)

    def model(x, y):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(40, 2), 1).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)
        with pyro.plate("data"), poutine.mask(mask=y > 0 if site == "masked" else True):
            if site in ("observed", "masked"):
                pyro.sample("y", dist.Normal(z[:10, 0], 1), obs=y)
            elif site == "latent":
                pyro.sample("y", dist.Normal(torch.zeros(10), 1))
            else:
                pyro.factor("y", -(z[:10, 0] - y).square() if site == "factor" else -z.square().sum())

    def guide(x, y):
        with pyro.plate("data"):
            pyro.sample("z", delta(x, 1))
        with pyro.plate("data"):
            if site == "latent":
                pyro.sample("y", delta(y))

    found = 1 if site == "regulariser" else 10
    with pytest.raises(ValueError, match=f"Site 'y' has {found} data in plate 'data', and the codes have 40"):
        WAELoss().loss(model, guide, x, y)


@pytest.mark.filterwarnings("ignore:Found plate statements in guide but not model")
def test_a_subsample_that_both_are_given_may_have_two_names():
    x, index = torch.randn(20, 2), torch.randperm(20)[:6]

    def model(x, index):
        with pyro.plate("data", 20, subsample=index):
            z = pyro.sample("z", standard(2))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x[index])

    def guide(x, index, taken=None):
        with pyro.plate("cells", 20, subsample=taken if index is None else index) as cells:
            pyro.sample("z", delta(x[cells], 1))

    assert rows(model, guide, x, index)[2]["cost"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="draws 6 of 20 in plate 'cells'"):
        WAELoss().loss(model, lambda x, index: guide(x, None, index.flip(0)), x, index)
