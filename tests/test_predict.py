"""Encoding, decoding, sampling and interpolating, on models whose answers are written out."""

import copy
import math
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import AutoEncoder, around, data, delta, encoded, pair
from pyro import poutine
from pyro.contrib.zuko import ZukoToPyro
from references import program
from torch import nn

from pyro_wae import WAELoss, priors
from pyro_wae.diagnostics import classifier_test, two_sample_test
from pyro_wae.predict import code_rows, decode, encode, interpolate, reconstruct, sample

# G(z) = 3 z + 1, with much noise around it.
model, guide = program(lambda x: delta(x - 5), output=lambda z: dist.Normal(3 * z + 1, 100).to_event(1))


def free(x=None, n=20):
    """A model that runs without data too."""
    with pyro.plate("data", n if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(50.0, 1))
        pyro.sample("x", dist.Normal(2 * z, 1e-3), obs=x)


def hierarchy(x):
    """Two latents in two plates, two observed sites; every output is a sum of latents."""
    with pyro.plate("data", len(x), dim=-2):
        a = pyro.sample("a", dist.Normal(0, 1))  # (n, 1)
        with pyro.plate("time", 3, dim=-1):
            b = pyro.sample("b", dist.Normal(10 + a, 1e-3))  # (n, 3)
            pyro.sample("x", dist.Normal(a + b, 1), obs=x)
        pyro.sample("y", dist.Delta(2 * a), obs=x[:, :1])


def hierarchy_guide(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("a", dist.Delta(x.mean(1, keepdim=True)))
        with pyro.plate("time", 3, dim=-1):
            pyro.sample("b", dist.Delta(x))


def normalised():
    """A model and a guide with BatchNorm in both."""
    encoder = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    return AutoEncoder(4, 2, encoder=encoder, decoder=nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 4)))


def test_codes_are_the_guides_values_by_site():
    x = torch.randn(7, 3)
    codes = encode(hierarchy, hierarchy_guide, x, data_plate="data")
    assert list(codes) == ["a", "b"]
    torch.testing.assert_close(codes["a"], x.mean(1, keepdim=True))
    torch.testing.assert_close(codes["b"], x)


def test_auxiliary_sites_of_the_guide_are_no_codes():
    def with_auxiliary(x):
        pyro.sample("noise", dist.Normal(0, 1), infer={"is_auxiliary": True})
        guide(x)

    assert list(encode(model, with_auxiliary, torch.randn(3, 2))) == ["z"]


def test_rows_are_codes_and_ancestral_prior_draws_side_by_side():
    x = torch.randn(500, 3)
    codes, prior = code_rows(hierarchy, hierarchy_guide, x, prior_draws=4, data_plate="data")
    torch.testing.assert_close(codes, torch.cat([x.mean(1, keepdim=True), x], 1))
    assert prior.shape == (2000, 4)
    torch.testing.assert_close(prior[:, 1:], (10 + prior[:, :1]).expand(-1, 3), atol=0.01, rtol=0)
    assert abs(prior[:, 0].std() - 1) < 5 / math.sqrt(2 * 2000)  # five standard errors of a deviation
    codes, prior = code_rows(hierarchy, hierarchy_guide, x, site="b", data_plate="data")
    torch.testing.assert_close(codes, x)
    assert prior.shape == x.shape
    assert (prior > 4).all()


def test_masked_data_are_no_rows():
    kept = torch.tensor([True, False, True])
    x = torch.randn(3, 2)
    codes, prior = code_rows(poutine.mask(model, mask=kept), guide, x, prior_draws=2)
    torch.testing.assert_close(codes, x[kept] - 5)
    assert prior.shape == (4, 2)


@pytest.mark.parametrize("count", [1, 4, 10, 11])
def test_any_number_of_codes_is_decoded_whatever_the_batch(count):
    codes = {"a": torch.randn(count, 1), "b": torch.randn(count, 3)}
    outputs = decode(hierarchy, codes, torch.zeros(4, 3), data_plate="data")
    assert list(outputs) == ["x", "y"]
    torch.testing.assert_close(outputs["x"], codes["a"] + codes["b"])
    torch.testing.assert_close(outputs["y"], 2 * codes["a"])


def test_a_latent_that_is_not_given_is_drawn_given_the_others():
    a = torch.tensor([[-50.0], [50.0]])
    outputs = decode(hierarchy, {"a": a}, torch.zeros(2, 3), data_plate="data")
    torch.testing.assert_close(outputs["x"], (2 * a + 10).expand(2, 3), atol=0.02, rtol=0)


def test_reconstructions_are_the_decoded_codes():
    x = torch.randn(6, 2)
    torch.testing.assert_close(reconstruct(model, guide, x)["x"], 3 * (x - 5) + 1)


def test_a_random_output_is_a_draw():
    x = torch.randn(5000, 2)
    noise = reconstruct(model, guide, x, random=True)["x"] - (3 * (x - 5) + 1)
    assert abs(noise.std() - 100) < 5 * 100 / math.sqrt(2 * noise.numel())


def test_reconstructions_of_a_subsample_belong_to_one_subsample():
    data = torch.arange(100.0)

    def subsampled(x):
        with pyro.plate("data", 100, subsample_size=10) as index:
            z = pyro.sample("z", dist.Normal(0, 1))
            # The output tells which data the model saw and which code it got.
            pyro.sample("x", dist.Normal(1000 * z + x[index], 1), obs=x[index])

    def encoder(x):
        with pyro.plate("data", 100, subsample_size=10) as index:
            pyro.sample("z", dist.Delta(x[index]))

    outputs = reconstruct(subsampled, encoder, data)["x"]
    assert outputs.shape == (10,)
    torch.testing.assert_close(outputs // 1000, outputs % 1000)
    first = interpolate(subsampled, encoder, data, data, 2)["x"][0]
    torch.testing.assert_close(first // 1000, first % 1000)


def test_runs_that_are_joined_take_one_subsample_inside_of_the_data():
    """The output tells which genes a run has taken, and of which data."""

    def model(x):
        genes = pyro.plate("genes", 50, subsample_size=4, dim=-1)
        with pyro.plate("cells", 100, subsample_size=5, dim=-2) as cells:
            z = pyro.sample("z", dist.Normal(x.new_zeros(5, 1), 0.01))
            with genes as index:
                y = x[cells][:, index]
                pyro.sample("x", dist.Normal(y + z, 1), obs=y)

    x = 1000.0 * torch.arange(100)[:, None] + torch.arange(50)
    calls = (
        lambda: sample(model, x, num_samples=40, data_plate="cells"),
        lambda: decode(model, torch.zeros(40, 1), x, data_plate="cells"),
    )
    for call in calls:
        outputs = call()["x"].round()
        assert (outputs % 1000 == outputs[0] % 1000).all()
        assert len((outputs // 1000).unique()) > 5


def test_sampling_draws_codes_from_the_prior():
    x = torch.full((4, 2), 1e6)
    outputs = sample(model, x, num_samples=5001)["x"]
    assert outputs.shape == (5001, 2)
    # 3 z + 1 with z ~ N(0, 1), within five standard errors.
    assert abs(outputs.mean() - 1) < 5 * 3 / math.sqrt(outputs.numel())
    assert abs(outputs.std() - 3) < 5 * 3 / math.sqrt(2 * outputs.numel())
    assert len(outputs.unique(dim=0)) == 5001


def test_an_option_of_a_bound_module_goes_with_the_arguments_of_its_last_call():
    wae = WAELoss()(model, guide)
    wae.reconstruct(torch.zeros(4, 2))
    outputs = wae.sample(5000, random=True)["x"]
    # The variance is that of 3 z + 1 and of the noise, 9 + 100^2: within five standard errors.
    expected = math.sqrt(9 + 100**2)
    assert abs(outputs.std() - expected) < 5 * expected / math.sqrt(2 * outputs.numel())


def test_samples_of_a_hierarchy_join_along_the_data():
    assert sample(hierarchy, torch.zeros(7, 3))["x"].shape == (7, 3)
    outputs = sample(hierarchy, torch.zeros(4, 3), num_samples=10, data_plate="data")
    assert outputs["x"].shape == (10, 3)
    assert outputs["y"].shape == (10, 1)
    # x = a + b = 2 a + 10, y = 2 a.
    torch.testing.assert_close(outputs["x"], (outputs["y"] + 10).expand(10, 3), atol=0.01, rtol=0)


def test_a_model_may_run_without_data():
    outputs = sample(free, num_samples=30, return_sites=["x"], n=20)
    assert outputs["x"].shape == (30,)
    assert (outputs["x"] > 80).all()
    given = decode(free, {"z": torch.arange(20.0)}, return_sites=["x"])["x"]
    torch.testing.assert_close(given, 2 * torch.arange(20.0))
    with pytest.raises(ValueError, match=r"return_sites=\('x',\)"):
        sample(free)
    outputs = sample(free, n=3, prior=dist.Delta(torch.tensor(5.0)), return_sites=["x"])
    torch.testing.assert_close(outputs, {"x": torch.full((3,), 10.0)})


def test_return_sites_leave_out_the_others():
    x = torch.randn(4, 3)
    options = {"return_sites": ["y"], "data_plate": "data"}
    assert list(reconstruct(hierarchy, hierarchy_guide, x, **options)) == ["y"]
    assert list(decode(hierarchy, {"a": x[:, :1]}, x, **options)) == ["y"]
    assert list(interpolate(hierarchy, hierarchy_guide, x, x, 2, **options)) == ["y"]
    assert list(sample(hierarchy, x, return_sites=["y"])) == ["y"]


@pytest.mark.parametrize("path", ["linear", "spherical"])
def test_a_way_begins_and_ends_at_the_data(path):
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    outputs = interpolate(hierarchy, hierarchy_guide, a, b, 4, path=path, data_plate="data")
    assert outputs["x"].shape == (4, 5, 3)
    for end, x in ((0, a), (-1, b)):
        torch.testing.assert_close(outputs["x"][end], x.mean(1, keepdim=True) + x)
        torch.testing.assert_close(outputs["y"][end], 2 * x.mean(1, keepdim=True))


def test_the_straight_way_is_even():
    a, b = torch.randn(5, 2), torch.randn(5, 2)
    outputs = interpolate(model, guide, a, b, 5)["x"]
    for step in range(5):
        torch.testing.assert_close(outputs[step], 3 * (a + step / 4 * (b - a) - 5) + 1, atol=1e-4, rtol=1e-5)


def test_the_spherical_way_turns_and_changes_its_norm_evenly():
    # From (1, 0) to (0, 3): a quarter turn, here in three steps of 30 degrees, norms 1, 5/3, 7/3, 3.
    a, b = torch.tensor([[6.0, 5.0]]), torch.tensor([[5.0, 8.0]])
    codes = (interpolate(model, guide, a, b, 4, path="spherical")["x"][:, 0] - 1) / 3
    angles = torch.tensor([0, math.pi / 6, math.pi / 3, math.pi / 2])
    norms = torch.tensor([1, 5 / 3, 7 / 3, 3])
    expected = norms[:, None] * torch.stack([angles.cos(), angles.sin()], 1)
    torch.testing.assert_close(codes, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("other", [[-1.0, 0.0], [0.0, 0.0], [2.0, 0.0], [1.0, 0.0]], ids=str)
def test_codes_on_one_line_through_zero_are_joined_by_it(other):
    a, b = torch.tensor([[6.0, 5.0]]), torch.tensor([other]) + 5
    codes = (interpolate(model, guide, a, b, 3, path="spherical")["x"][1, 0] - 1) / 3
    torch.testing.assert_close(codes, (torch.tensor([1.0, 0.0]) + torch.tensor(other)) / 2, atol=1e-5, rtol=0)


def test_arguments_come_as_a_tuple_where_there_are_several():
    x, index, seen = data()
    middle = interpolate(*pair(), (x, index, seen), (3 * x, index, seen), 3)["x"][1]
    torch.testing.assert_close(middle, 2 * encoded(x))


CALLS = {
    "encode": lambda m, x: encode(m.model, m.guide, x)["z"],
    "rows": lambda m, x: code_rows(m.model, m.guide, x)[0],
    "decode": lambda m, x: decode(m.model, {"z": x[:, :2]}, x)["x"],
    "reconstruct": lambda m, x: reconstruct(m.model, m.guide, x)["x"],
    "sample": lambda m, x: sample(m.model, x, num_samples=3)["x"],
    "interpolate": lambda m, x: interpolate(m.model, m.guide, x, x.flip(0), 3)["x"],
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_modules_stay_as_they_are_and_nothing_has_a_graph(call, training):
    module = normalised().train(training)
    before = copy.deepcopy(module.state_dict())
    value = call(module, torch.randn(8, 4))
    assert not value.requires_grad
    for name, after in module.state_dict().items():
        torch.testing.assert_close(after, before[name], rtol=0, atol=0, msg=name)
    assert all(part.training == training for part in module.modules())


def test_batch_norm_that_another_thread_trains_meanwhile_goes_on():
    norm = nn.BatchNorm1d(2)

    def busy(x):
        thread = threading.Thread(target=lambda: norm(torch.randn(8, 2)))
        thread.start()
        thread.join()
        guide(x)

    code_rows(model, busy, torch.randn(3, 2))
    assert norm.num_batches_tracked == 1


def test_batch_norm_normalises_by_the_batch_in_train_mode_alone():
    module, x = normalised(), torch.randn(8, 4) + 20
    codes = encode(module.model, module.guide, x)["z"]
    torch.testing.assert_close(codes.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    with torch.no_grad():
        expected = module.eval().encoder(x)
    torch.testing.assert_close(encode(module.model, module.guide, x)["z"], expected)


def test_a_module_that_is_the_model_itself():
    class Generator(nn.Module):
        def forward(self, x):
            return model(x)

    class Encoder(nn.Module):
        def forward(self, x):
            return guide(x)

    x = torch.randn(3, 2)
    torch.testing.assert_close(reconstruct(Generator(), Encoder(), x)["x"], 3 * (x - 5) + 1)


def test_codes_of_different_numbers_are_named():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"same number.*'b': 2"):
        decode(hierarchy, {"a": x[:, :1], "b": x[:2]}, x, data_plate="data")


# A prior in place of the model's own


class Flow(nn.Module):
    """A module whose call returns a distribution, as the flows of zuko."""

    def forward(self):
        base = dist.Normal(torch.zeros(4), 1e-4).to_event(1)
        return dist.TransformedDistribution(
            base, dist.transforms.AffineTransform(torch.tensor([1.0, 2.0, 3.0, 4.0]), 1)
        )


@pytest.mark.parametrize("prior", [Flow(), Flow()()], ids=["module", "distribution"])
def test_codes_of_a_given_prior_are_cut_into_the_latent_sites_in_the_models_order(prior):
    # A row is (a, b1, b2, b3), near (1, 2, 3, 4): x = a + b, y = 2 a.
    outputs = sample(hierarchy, torch.zeros(5, 3), num_samples=7, prior=prior, data_plate="data")
    torch.testing.assert_close(outputs["x"], torch.tensor([3.0, 4.0, 5.0]).expand(7, 3), atol=0.01, rtol=0)
    torch.testing.assert_close(outputs["y"], torch.tensor([[2.0]]).expand(7, 1), atol=0.01, rtol=0)
    assert len(outputs["y"].unique()) == 7


def test_a_prior_that_draws_codes_of_data_gives_their_reconstructions():
    # The data lie on dimension -2 beside the time: the cut undoes code_rows.
    x = torch.randn(6, 3)
    rows, _ = code_rows(hierarchy, hierarchy_guide, x, data_plate="data")

    class Codes:
        def sample(self, shape):
            return rows[: shape[0]]

    expected = reconstruct(hierarchy, hierarchy_guide, x, data_plate="data")
    for outputs in (
        sample(hierarchy, x, prior=Codes(), data_plate="data"),
        WAELoss(data_plate="data")(hierarchy, hierarchy_guide).sample(6, x, prior=Codes()),
    ):
        assert outputs.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(outputs[name], value)


def test_a_fitted_prior_samples_where_the_codes_are():
    # Codes N(-5, 1) of data N(0, 1), far from the model's prior: x = 3 z + 1 has the mean -14.
    pyro.set_rng_seed(0)
    fitted = priors.fit(model, guide, torch.randn(500, 2), prior=priors.MixturePrior(3, 2), steps=400)
    bound = WAELoss()(model, guide)
    bound(torch.randn(20, 2))
    outputs = bound.sample(2000, prior=fitted)["x"]
    assert outputs.shape == (2000, 2)
    # Three standard deviations of the outputs over the root of 500 data, and the fit's own error.
    torch.testing.assert_close(outputs.mean(0), torch.full((2,), -14.0), atol=0.5, rtol=0)


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_a_given_prior_is_that_of_the_guides_sites_and_the_model_draws_its_own():
    """The indicator of a mixture, its level for all data and the code, of which the guide samples the code alone."""

    def mixture(x):
        level = pyro.sample("level", dist.Normal(0.0, 1e-3))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            z = pyro.sample("z", dist.Normal(level + 10.0 * k[:, None] - torch.ones(2), 1).to_event(1))
            pyro.sample("x", dist.Normal(3 * z + 1, 100).to_event(1), obs=x)

    x = torch.randn(20, 2)
    prior = priors.fit(mixture, guide, x, prior=priors.MixturePrior(2, 2), steps=2)
    outputs = sample(mixture, x, num_samples=50, prior=prior, return_sites=("x", "z", "k"))
    torch.testing.assert_close(outputs["x"], 3 * outputs["z"] + 1)
    assert (outputs["z"] < 0).all()  # as the codes, x - 5
    assert set(outputs["k"].tolist()) == {0, 1}
    with pytest.raises(ValueError, match=r"\{'k': 1, 'z': 2\} have size 3 together"):
        sample(mixture, x, prior=priors.MixturePrior(2, 4))


class Points(torch.distributions.Distribution):
    """What a flow of zuko is to Pyro's wrapper, which has no ``sample`` and no ``repr``."""

    arg_constraints: dict = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self):
        super().__init__(event_shape=torch.Size([2]), validate_args=False)

    def rsample(self, shape=()):
        return torch.tensor([1.0, 3.0]).expand(*shape, 2)


model_of_two, _ = program(output=lambda z: around(2 * z))


@pytest.mark.parametrize("way", ["sample", "module", "test", "classifier"])
def test_a_prior_that_can_only_be_called_is_called(way):
    x = torch.zeros(20, 2)
    draws = {
        "sample": lambda: sample(model_of_two, x, num_samples=3, prior=ZukoToPyro(Points()))["x"],
        "module": lambda: WAELoss()(model_of_two, lambda x: None).sample(3, x, prior=ZukoToPyro(Points()))["x"],
        "test": lambda: two_sample_test(torch.randn(20, 2), ZukoToPyro(Points()), permutations=19).p_value,
        "classifier": lambda: classifier_test(torch.randn(20, 2), ZukoToPyro(Points())).p_value,
    }[way]()
    expected = torch.tensor([[2.0, 6.0]] * 3)
    assert torch.equal(draws, expected) if way in ("sample", "module") else draws < 0.2


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_a_site_with_obs_mask_is_reconstructed_from_its_code():
    seen = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            pyro.sample("x", dist.Normal(3 * z, 1).to_event(1), obs=x, obs_mask=seen)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x + 1).to_event(1))

    x = torch.randn(3, 2)
    torch.testing.assert_close(reconstruct(model, guide, x)["x"], 3 * (x + 1))
    torch.testing.assert_close(decode(model, x, x)["x"], 3 * x)


def test_an_interpolation_takes_one_subsample_at_both_ends():
    def model(x):
        with pyro.plate("data", 20, subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x[index])

    def guide(x):
        with pyro.plate("data", 20, subsample_size=5) as index:
            pyro.sample("z", dist.Delta(x[index]).to_event(1))

    x = torch.arange(20.0)[:, None]
    start, end = interpolate(model, guide, x, x + 1000, 2)["x"]
    assert torch.equal(end - start, torch.full((5, 1), 1000.0))


def test_the_ends_of_an_interpolation_have_one_condition():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            pyro.sample("x", dist.Normal(nn.functional.dropout(z + y[:, None], 0.5), 1).to_event(1), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x - y[:, None]).to_event(1))

    x, y = torch.randn(6, 2), torch.arange(6.0)
    assert interpolate(model, guide, (x, y), (-x, y.clone()), 3)["x"].shape == (3, 6, 2)
    assert interpolate(model, guide, (x, y), (-x, y), 3, random=True)["x"].shape == (3, 6, 2)
    with pytest.raises(ValueError, match=r"site 'x' differs .* x_a=\(x, y\), x_b=\(other, y\)"):
        interpolate(model, guide, (x, y), (-x, y + 1), 3)


X, *REST = data()


@pytest.mark.parametrize(
    "angles", [lambda z: dist.VonMises(z, 5.0), lambda z: dist.VonMises(z, 5.0).mask(True)], ids=["plain", "masked"]
)
def test_the_output_of_a_distribution_of_angles_is_its_mean_direction(angles):
    programs = pair(code=lambda loc: delta(loc.tanh()), output=lambda z: angles(z).to_event(1))
    found = reconstruct(*programs, X, *REST)["x"]
    assert torch.equal(found, encode(*programs, X, *REST)["z"])
    assert sample(programs[0], X, *REST)["x"].shape == X.shape


def mixed_angles(z):
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.VonMises(torch.stack([z, -z], -1), 1.0))


@pytest.mark.parametrize("family", [lambda z: dist.Cauchy(z, 1.0), mixed_angles], ids=["Cauchy", "MixtureSameFamily"])
def test_what_has_no_mean_to_return_is_named_by_its_family(family, request):
    with pytest.raises(ValueError, match=rf"'x' \({request.node.callspec.id}\) has no mean .*Write random=True"):
        reconstruct(*pair(output=lambda z: family(z).to_event(1)), X, *REST)
