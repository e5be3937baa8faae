"""Every error names the site or argument, what was found, and the line to write instead."""

from __future__ import annotations

import math
import re
import warnings
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import around, delta, normal
from pyro import poutine
from pyro.infer import SVI
from references import program

from pyro_wae import WAELoss
from pyro_wae.costs import SquaredError
from pyro_wae.penalties import MMD, JensenShannon

N = 6


# A silent wrong answer would follow without these errors: they hold without Pyro's validation too.
@pytest.fixture(params=[True, False], ids=["validated", "unvalidated"])
def validation(request):
    with pyro.validation_enabled(request.param), warnings.catch_warnings():
        # Pyro warns of what is about to be refused.
        warnings.filterwarnings("ignore", message=r"(Found|z\nIf you want to enumerate)")
        yield request.param


def gap(codes, prior):
    return (codes.mean() - prior.mean()) ** 2


def raises(error, *parts):
    """The error's message holds all parts, in this order, whatever stands between."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))


plain_model, plain_guide = program(around)


def x_of(n=N):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0))


def step(model=plain_model, guide=plain_guide, x=None, penalty=gap, **options):
    return WAELoss(penalty, **options).loss_and_grads(model, guide, x_of() if x is None else x)


# Latent and observed sites


def test_a_latent_that_the_model_enumerates_one_by_one(validation):
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "sequential"})
            z = pyro.sample("z", normal(x, 2))
            pyro.sample("x", around(z + k[..., None]), obs=x)

    if validation:
        with pytest.raises(NotImplementedError, match="'k'"):  # Pyro's own
            step(model)
    else:
        with raises(ValueError, "'k' of the model is to be enumerated", "dist.MixtureSameFamily"):
            step(model)


def test_a_guide_that_lacks_an_inner_plate(validation):
    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("parts", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1))
            pyro.sample("x", dist.Normal(z, 1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x[:, :1], 1))

    parts = ["disagree at site 'z'"] if validation else ["'z'", "(6, 1) in the guide and (6, 2) in the model"]
    with raises(ValueError, *parts):
        step(model, guide, data_plate="data")


def test_a_guide_whose_data_lie_in_another_dimension(validation):
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1))
            pyro.sample("x", dist.Normal(z, 1), obs=x[:, :1])

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, 0], 1))

    with raises(ValueError, "'z'"):
        step(model, guide)


@pytest.mark.parametrize(
    ("data_plate", "found"), [(None, "Latent site 'z' is global"), ("nodes", "Observed site 'y' of batch shape (6,)")]
)
def test_edges_of_a_graph_in_a_plate_beside_that_of_the_nodes(data_plate, found):
    pairs = torch.randint(12, (6, 2), generator=torch.Generator().manual_seed(0))

    def model(x):
        with pyro.plate("nodes", len(x)):
            z = pyro.sample("z", normal(x, 2))
        with pyro.plate("edges", len(pairs)):
            pyro.sample("y", dist.Bernoulli(logits=z[pairs].prod(1).sum(1)), obs=x.new_ones(len(pairs)))

    _, guide = program(plate=lambda x: pyro.plate("nodes", len(x)))
    with raises(
        ValueError, found, "edges of a graph", "pyro.sample('pairs', dist.Bernoulli(logits=logits).to_event(1)"
    ):
        WAELoss(data_plate=data_plate).loss(model, guide, torch.randn(12, 2))


def test_a_model_that_changes_between_runs(validation):
    class Changing:
        def __init__(self, when):
            self.runs, self.when = 0, when

        def name(self):
            return "z" if self.runs < self.when else "other"

        def model(self, x):
            name = self.name()
            self.runs += 1
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Normal(0.0, 1))
                z = pyro.sample(name, dist.Normal(a[..., None].expand(N, 2), 1).to_event(1))
                pyro.sample("x", around(z), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("a", dist.Normal(x[:, 0], 1))
                pyro.sample(self.name(), around(x))

    changing = Changing(1)
    with raises(ValueError, "ran again for prior samples", "did not sample site 'z'", "same sites in every run"):
        step(changing.model, changing.guide)
    changing = Changing(2)
    with raises(ValueError, "Runs of one step", "'z': (1, 3)", "'other': (1, 3)", "write the choice into the site"):
        step(changing.model, changing.guide, num_particles=2)


# The data plate


def test_two_subsampled_plates_in_doubt(validation):
    def model(x):
        with pyro.plate("a", 60, subsample=torch.arange(6), dim=-2), pyro.plate("b", 20, subsample_size=2, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1))
            pyro.sample("x", dist.Normal(z, 1), obs=x)

    def guide(x):
        with pyro.plate("a", 60, subsample=torch.arange(6), dim=-2), pyro.plate("b", 20, subsample_size=2, dim=-1):
            pyro.sample("z", dist.Normal(x, 1))

    with raises(ValueError, "Several plates", "WAELoss(data_plate="):
        step(model, guide)


# Costs and penalties


@pytest.mark.parametrize("penalty", [None, gap])
def test_fewer_than_two_data(validation, penalty):
    with raises(ValueError, "at least 2 data and 2 prior samples, found 1 and 1", "drop_last=True"):
        step(x=x_of(1), penalty=penalty)
    with raises(ValueError, "at least 2 data", "found 1 and 4"):
        step(x=x_of(1), penalty=penalty, prior_draws=4)
    with raises(ValueError, "at least 2 data", "found 1 and"):
        step(x=x_of(1), penalty=penalty, num_particles=3, vectorize_particles=True)


def test_fewer_than_two_unmasked_data(validation):
    mask = torch.arange(N) < 1
    with raises(ValueError, "at least 2 data", "found 1 and 1"):
        step(poutine.mask(plain_model, mask=mask), plain_guide)


def test_sites_of_two_dtypes(validation):
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", normal(x, 2))
            pyro.sample("b", dist.Normal(x.new_zeros(2).double(), 1).to_event(1))
            pyro.sample("x", around(a), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", around(x))
            pyro.sample("b", around(x.double()))

    with raises(ValueError, "'b' has values of torch.float64", "'a' of torch.float32", "WAELoss({'b': MMD(), ...})"):
        step(model, guide)


def test_codes_and_prior_on_two_devices(validation):
    model, guide = program(
        lambda x: dist.Delta(x.to("meta"), event_dim=1, validate_args=False), output=lambda z: around(torch.zeros(N, 2))
    )
    with raises(ValueError, "on one device, found meta and cpu", "dist.Normal(x.new_zeros(d), 1)"):
        step(model, guide)


def test_sites_on_two_devices(validation):
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1))
            pyro.sample("b", dist.Normal(0.0, 1))
            pyro.sample("x", dist.Normal(a, 1), obs=x[:, 0])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Delta(x[:, 0]))
            pyro.sample("b", dist.Delta(x[:, 1].to("meta"), validate_args=False))

    with raises(
        ValueError, "'b' has values of torch.float32 on meta", "'a' of torch.float32 on cpu", "one dtype and device"
    ):
        step(model, guide)


# Scales


def two_scales(x):
    with pyro.plate("data", len(x)):
        with poutine.scale(scale=2.0):
            a = pyro.sample("a", normal(x, 2))
        pyro.sample("b", around(a))
        pyro.sample("x", around(a), obs=x)


def two_scales_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("a", around(x))
        pyro.sample("b", around(x))


def test_a_joint_code_of_sites_with_different_scales(validation):
    with raises(ValueError, "different scales ('a': 2, 'b': 1)", "WAELoss({'z1': MMD(), 'z2': MMD()})"):
        step(two_scales, two_scales_guide)


@pytest.mark.parametrize(
    ("x", "output", "parts"),
    [
        (x_of(), torch.zeros(N, 3), ("data of shape (6, 2)", "(Normal) is of shape (6, 3)", "the shape of the data")),
        (x_of(5), torch.zeros(N, 2), ("data of shape (5, 2)", "(Normal) is of shape (6, 2)", "the shape of the data")),
        (x_of().tolist(), torch.zeros(N, 2), ("are list", "obs=torch.as_tensor(x)")),
        (x_of().numpy(), torch.zeros(N, 2), ("are ndarray", "obs=torch.as_tensor(x)")),
        (x_of() + 1j, torch.zeros(N, 2), ("a tensor (torch.complex64, ", "dense tensors of real numbers")),
    ],
)
def test_data_that_do_not_fit_the_decoder(validation, x, output, parts):
    model, guide = program(
        lambda x: around(torch.zeros(N, 2)),
        lambda x: normal(torch.zeros(2), 2),
        lambda z: around(output),
        plate=lambda x: pyro.plate("data", N),
    )
    with raises((TypeError, ValueError), "bserved site 'x'", *parts):
        step(model, guide, x)


@pytest.mark.parametrize("count", [dist.Geometric, lambda p: dist.Binomial(3, p), dist.Poisson])
def test_a_count_has_no_one_hot_relaxation(validation, count):
    programs = program(lambda x: count(x.sigmoid()).to_event(1), lambda x: count(torch.full((2,), 0.5)).to_event(1))
    with raises(ValueError, "does not enumerate. Write a Delta on a continuous code, dist.Delta(loc)."):
        step(*programs)


def test_a_batch_in_the_event_of_a_site_without_a_plate(validation):
    programs = program(
        lambda x: dist.Delta(x).to_event(2),
        lambda x: dist.Normal(torch.zeros(N, 2), 1).to_event(2),
        lambda z: dist.Normal(z, 1).to_event(2),
        plate=lambda x: nullcontext(),
    )
    with raises(
        ValueError, "'z' is global", "of shape (6, 2), is the data, write .to_event(1) inside pyro.plate('data', 6"
    ):
        step(*programs)


# Arguments


@pytest.mark.parametrize(
    ("penalty", "parts"),
    [
        ({"y": MMD()}, ("penalty names 'y', which is no latent site", "['z']", "penalty={'z': MMD(), ...}")),
        ({}, ("penalty has no entry for the latent site 'z'", "'z': MMD()", "None to leave it free")),
        ({"z": MMD(), "u": None}, ("penalty names 'u'",)),
    ],
)
def test_a_penalty_dict_with_wrong_sites(validation, penalty, parts):
    with raises(ValueError, *parts):
        step(penalty=penalty)


@pytest.mark.parametrize("kind", [MMD, JensenShannon, lambda: JensenShannon(optimizer=None)])
def test_a_penalty_of_labels_is_taken_in_a_first_batch_that_has_them(kind):
    """The site is latent only in batches without labels; a penalty of data that are always observed is said once."""

    def model(x, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(x, 2))
            y = pyro.sample("y", normal(x, 2), obs=y)
            pyro.sample("x", dist.Normal(z + y, 1).to_event(1), obs=x)

    def guide(x, y=None):
        with pyro.plate("data", len(x)):
            if y is None:
                pyro.sample("y", delta(x))
            pyro.sample("z", delta(x))

    x = x_of()
    loss = WAELoss({"z": kind(), "y": kind()}, penalty_weight=1.0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)
    with pytest.warns(UserWarning, match="penalty names 'y', which is observed in this batch"):
        svi.step(x, x)
    assert set(loss.terms.penalties) == {"z"}
    for _ in range(2):
        svi.step(x)
        assert set(loss.terms.penalties) == {"z", "y"}
        svi.step(x, x)
        assert set(loss.terms.penalties) == {"z"}


@pytest.mark.parametrize("weight", [-1.0, -1e-9, math.inf, math.nan, -math.inf])
def test_a_penalty_weight_out_of_range(weight):
    with raises(ValueError, "penalty_weight must be a finite number >= 0", f"found {weight}", "penalty_weight=100.0"):
        WAELoss(penalty_weight=weight)


def test_the_arguments_after_the_penalty_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        WAELoss(MMD(), SquaredError())


def test_an_error_in_a_step_leaves_the_loss_usable():
    loss = WAELoss(gap)
    with pytest.raises(ValueError, match="at least 2"):
        loss.loss(plain_model, plain_guide, x_of(1))
    assert math.isfinite(loss.loss(plain_model, plain_guide, x_of()))


@pytest.mark.parametrize("site", ["z", "x"])
def test_a_mask_of_another_batch(validation, site):
    def model(x):
        keep = torch.ones(N + 1, dtype=torch.bool)
        with pyro.plate("data", len(x)):
            with pyro.poutine.mask(mask=keep if site == "z" else True):
                z = pyro.sample("z", normal(x, 2))
            with pyro.poutine.mask(mask=keep if site == "x" else True):
                pyro.sample("x", around(z), obs=x)

    with raises(ValueError, f"The mask at site '{site}' has shape ({N + 1},)", f"({N},)", "poutine.mask(mask=...)"):
        step(model)
