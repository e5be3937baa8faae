"""The sites that predictions name: computed ones, latent ones, and what a site without data is."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import delta
from references import program

from pyro_wae.predict import decode, interpolate, reconstruct, sample

# G(z) = 3 z + 1, with much noise around it.
model, guide = program(lambda x: delta(x - 5), output=lambda z: dist.Normal(3 * z + 1, 100).to_event(1))


def test_sites_of_pyro_deterministic_are_returned_where_they_are_named():
    def computing(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
            double = pyro.deterministic("double", 2 * z, event_dim=1)
            pyro.sample("x", dist.Normal(double + 1, 1).to_event(1), obs=x)

    x, z = torch.randn(3, 2), torch.randn(7, 2)
    assert list(sample(computing, x)) == list(reconstruct(computing, guide, x)) == ["x"]
    torch.testing.assert_close(decode(computing, z, x, return_sites=("double", "x")), {"double": 2 * z, "x": 2 * z + 1})
    torch.testing.assert_close(reconstruct(computing, guide, x, return_sites=["double"]), {"double": 2 * (x - 5)})
    drawn = sample(computing, x, num_samples=8, return_sites=("double", "x"))
    torch.testing.assert_close(drawn["x"], drawn["double"] + 1)
    assert drawn["double"].shape == (8, 2)
    with pytest.raises(ValueError, match=r"not among the sites \['x', 'z', 'double'\]"):
        reconstruct(computing, guide, x, return_sites=("triple",))


def test_latent_sites_come_with_the_outputs_that_they_were_decoded_to():
    """Each of the calls draws, or takes, the code once: x is 3 z + 1 of the z beside it."""
    x, both = torch.randn(6, 2), ("x", "z")
    wide = dist.Normal(torch.full((2,), 50.0), 1).to_event(1)
    calls = {
        "one run": lambda: sample(model, x, return_sites=both),
        "several runs": lambda: sample(model, x, num_samples=20, return_sites=both),
        "the code alone first": lambda: sample(model, x, num_samples=20, return_sites=("z", "x")),
        "another prior": lambda: sample(model, x, prior=wide, return_sites=both),
        "given codes": lambda: decode(model, torch.randn(9, 2), x, return_sites=both),
        "codes of data": lambda: reconstruct(model, guide, x, return_sites=both),
        "a path": lambda: interpolate(model, guide, x, -x, 3, return_sites=both),
    }
    for name, call in calls.items():
        outputs = call()
        torch.testing.assert_close(outputs["x"], 3 * outputs["z"] + 1, msg=lambda text, name=name: f"{name}: {text}")
        assert len(outputs["z"].unique()) > 5
    assert (calls["another prior"]()["z"] > 40).all()
    assert (sample(model, x, num_samples=50, prior=wide, return_sites=["z"])["z"] > 40).all()
    assert len(sample(model, x, num_samples=50, return_sites=["z"])["z"].unique()) == 100


@pytest.mark.parametrize(
    "likelihood",
    [
        lambda z: dist.MultivariateNormal(3 * z + 1, torch.eye(2)),
        lambda z: dist.Dirichlet((3 * z + 1).exp()),
        lambda z: dist.OneHotCategorical(logits=3 * z + 1),
        lambda z: dist.Multinomial(9, logits=3 * z + 1, validate_args=False),
        lambda z: dist.TransformedDistribution(
            dist.Normal(torch.zeros(2), 1).to_event(1), [dist.transforms.AffineTransform(3 * z + 1, 1.0).inv]
        ),
    ],
)
def test_latent_sites_are_known_whatever_the_likelihood_and_the_computed_sites(likelihood):
    def computing(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
            pyro.deterministic("mu", 3 * z + 1, event_dim=1)
            pyro.sample("x", likelihood(z), obs=x)

    outputs = sample(computing, torch.full((6, 2), 0.5), num_samples=20, return_sites=("mu", "z"))
    torch.testing.assert_close(outputs["mu"], 3 * outputs["z"] + 1)
    assert len(outputs["z"].unique()) == 40


def test_of_sites_without_data_those_that_others_depend_on_are_drawn_and_the_others_are_means():
    def chain(n):
        with pyro.plate("data", n):
            kind = pyro.sample("kind", dist.Categorical(torch.ones(3)))
            z = pyro.sample("z", dist.Normal(10.0 * kind, 1))
            pyro.sample("x", dist.Normal(2 * z, 1))
            pyro.sample("y", dist.Poisson((z - 50).exp()))

    outputs = sample(chain, 40, return_sites=("x", "y", "z", "kind"))
    torch.testing.assert_close(outputs["x"], 2 * outputs["z"])
    torch.testing.assert_close(outputs["y"], (outputs["z"] - 50).exp())
    assert set(outputs["kind"].tolist()) == {0, 1, 2}
    assert (outputs["z"] - 10 * outputs["kind"]).abs().max() < 6
    # z given: kind is drawn after its prior, and x is of this z.
    outputs = decode(chain, {"z": torch.arange(40.0)}, 40, return_sites=("x", "z", "kind"))
    torch.testing.assert_close(outputs["x"], 2 * torch.arange(40.0))
    drawn = sample(chain, 4000, return_sites=("x", "z"), random=True)
    # As x comes from z, it differs by noise alone, of variance 1: within five standard errors.
    assert abs((drawn["x"] - 2 * drawn["z"]).var() - 1) < 5 * math.sqrt(2 / 4000)


@pytest.mark.parametrize(
    "decoder",
    [
        lambda z: torch.tensor(z.tolist()),
        lambda z: torch.as_tensor(2 * z.numpy() / 2),
        lambda z: torch.stack([torch.tensor(float(number)) for number in z]),
        lambda z: torch.zeros(5).copy_(z),
        lambda z: [values := torch.zeros(5), values.__setitem__(slice(None), z)][0],
    ],
    ids=["list", "numpy", "float", "in place", "set"],
)
def test_a_latent_site_is_known_where_its_value_leaves_torch(decoder):
    def outside(n):
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(0.0, 1))
            pyro.sample("x", dist.Normal(decoder(z), 1))

    outputs = sample(outside, 5, return_sites=("z", "x"))
    torch.testing.assert_close(outputs["x"], outputs["z"])
    assert outputs["z"].all()


def test_a_computed_site_whose_data_dimension_is_not_known_is_refused():
    def model(x, event_dim=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            pyro.deterministic("mu", 3 * z, event_dim=event_dim)
            pyro.sample("x", dist.Normal(3 * z, 1).to_event(1), obs=x)

    x, z = torch.zeros(4, 2), torch.randn(6, 2)
    for call in (lambda: decode(model, z, x, return_sites=("mu",)), lambda: sample(model, x, return_sites=("mu",))):
        with pytest.raises(ValueError, match=r"Write pyro.deterministic\('mu', value, event_dim=1\)"):
            call()
    torch.testing.assert_close(decode(model, z, x, event_dim=1, return_sites=("mu",))["mu"], 3 * z)
