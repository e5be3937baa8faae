"""The sites that predictions name: computed ones, latent ones, and what a site without data is."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import delta
from references import program

from pyro_wae.predict import decode, encode, interpolate, reconstruct, sample

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
        torch.vmap(torch.abs),
        lambda z: torch.tensor(z),
        lambda z: torch.from_dlpack(z),
        lambda z: torch.nested.to_padded_tensor(torch.nested.nested_tensor(list(z[:, None])), 0.0)[:, 0],
    ],
    ids=["list", "numpy", "float", "in place", "set", "vmap", "tensor", "dlpack", "nested"],
)
@pytest.mark.filterwarnings("ignore:To copy construct", "ignore:The PyTorch API of nested tensors")
def test_a_latent_site_is_known_where_its_value_leaves_torch(decoder):
    def outside(n):
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.HalfNormal(1.0))
            pyro.sample("x", dist.Normal(decoder(z), 1))

    outputs = sample(outside, 5, return_sites=("z", "x"))
    torch.testing.assert_close(outputs["x"], outputs["z"])
    assert len(outputs["z"].unique()) == 5


def test_a_latent_site_that_computed_sites_alone_depend_on_is_drawn():
    def computing(x=None):
        with pyro.plate("data", 6):
            z, w = (pyro.sample(name, dist.Normal(torch.zeros(2), 1).to_event(1)) for name in "zw")
            pyro.deterministic("double", 2 * z, event_dim=1)
            if x is not None:
                pyro.sample("x", dist.Normal(w, 1).to_event(1), obs=x)

    wide = dist.Normal(torch.full((4,), 50.0), 1).to_event(1)
    both = ("z", "double")
    for outputs in (
        sample(computing, return_sites=both),
        sample(computing, torch.zeros(6, 2), return_sites=both),
        decode(computing, {"w": torch.zeros(6, 2)}, torch.zeros(6, 2), return_sites=both),
        sample(computing, prior=wide, return_sites=both),
    ):
        torch.testing.assert_close(outputs["double"], 2 * outputs["z"])
        assert len(outputs["z"].unique()) == 12
    assert (outputs["z"] > 40).all()


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_a_latent_site_that_no_site_depends_on_is_drawn_where_an_observed_site_follows():
    def leaf(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1).to_event(1))
            pyro.sample("b", dist.Normal(5 + a, 1).to_event(1))
            pyro.sample("x", dist.Normal(3 * a, 1).to_event(1), obs=x)

    def leaf_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Delta(x).to_event(1))

    x, both = torch.zeros(2000, 2), ("a", "b")
    # b - a has the standard deviation 1: within five standard errors.
    for outputs in (
        sample(leaf, x, return_sites=both),
        decode(leaf, {"a": x}, x, return_sites=both),
        interpolate(leaf, leaf_guide, x, x, 2, return_sites=both),
    ):
        noise = outputs["b"] - outputs["a"]
        assert abs(noise.std() - 1) < 5 / math.sqrt(2 * noise.numel())
    prior = dist.Normal(torch.tensor([1.0, 2.0, 3.0, 4.0]), 1e-4).to_event(1)
    outputs = sample(leaf, x[:3], num_samples=7, prior=prior, return_sites=("b", "a", "x"))
    expected = {"b": [3.0, 4.0], "a": [1.0, 2.0], "x": [3.0, 6.0]}
    expected = {name: torch.tensor([value] * 7) for name, value in expected.items()}
    torch.testing.assert_close(outputs, expected, atol=0.01, rtol=0)


def test_data_that_a_conditional_generator_is_called_without_are_means():
    def conditional(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(torch.zeros(4), 1), obs=y)
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1))
            pyro.sample("x", dist.Normal(z + y, 1))

    y = torch.tensor([0.0, 10.0, 20.0, 30.0])
    outputs = sample(conditional, y, num_samples=8, return_sites=("x", "z"))
    torch.testing.assert_close(outputs["x"], outputs["z"] + y.repeat(2))


def test_a_latent_site_is_known_from_one_draw_of_a_category_and_from_few_of_a_rare_one():
    def rare(n):
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(0.0, 1))
            kind = pyro.sample("kind", dist.Bernoulli(torch.tensor(1e-6)))
            pyro.sample("token", dist.Categorical(logits=torch.stack([1 + z + kind, -z], -1)))

    outputs = sample(rare, 1, return_sites=("z", "kind"))
    assert outputs["z"] != 0
    assert outputs["kind"] == 0


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_a_site_with_obs_mask_is_returned_as_an_observed_site():
    seen = torch.arange(6) % 2 == 0

    def masked(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            y = pyro.sample("y", dist.Normal(torch.full((2,), 7.0), 1).to_event(1), obs=x, obs_mask=seen)
            pyro.sample("x", dist.Normal(3 * z + y, 1).to_event(1), obs=x, obs_mask=seen)

    x = 1000 + torch.randn(6, 2)
    names = ("x", "z", "y", "y_unobserved")
    for outputs in (
        sample(masked, x, return_sites=names),
        decode(masked, {"z": torch.randn(6, 2)}, x, return_sites=names),
        {name: value[0] for name, value in interpolate(masked, guide, x, x, 2, return_sites=names).items()},
    ):
        read = torch.where(seen[:, None], x, outputs["y_unobserved"])
        torch.testing.assert_close(outputs["x"], 3 * outputs["z"] + read)
        torch.testing.assert_close(outputs["y"], torch.full((6, 2), 7.0))
        assert len(outputs["y_unobserved"].unique()) == 12
    found = reconstruct(masked, guide, x, return_sites=("y",))
    torch.testing.assert_close(found, {"y": torch.full((6, 2), 7.0)})


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


def test_data_whose_output_is_not_known_yet_have_codes():
    """A conditional generator that is called without its output, which it then computes."""

    def model(x, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, 1).to_event(1))
            if y is None:
                pyro.deterministic("y", 2 * z, event_dim=1)
            else:
                pyro.sample("y", dist.Normal(2 * z, 1).to_event(1), obs=y)

    def guide(x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", delta(x if y is None else y))

    x = torch.randn(6, 2)
    torch.testing.assert_close(encode(model, guide, x), {"z": x})
    torch.testing.assert_close(decode(model, encode(model, guide, x), x, return_sites=("y",)), {"y": 2 * x})
    torch.testing.assert_close(reconstruct(model, guide, x, return_sites=("y",)), {"y": 2 * x})
    with pytest.raises(ValueError, match=r"The model has no observed site.*return_sites=\('x',\)"):
        reconstruct(model, guide, x)
