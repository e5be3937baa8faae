"""Metrics of samples beside held-out data, by torchmetrics and by functions."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_wae.diagnostics import precision_recall, sample_quality


def model(x, shift=None):
    """Samples with mean 2 (plus a shift), and unit variance."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1).to_event(1))
        mean = 2 + z if shift is None else 2 + z + shift
        pyro.sample("x", dist.Normal(mean, 1).to_event(1), obs=x)


def data(n=400):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(1))


def test_a_function_gets_all_data_and_as_many_samples():
    x, seen = data(), []
    assert sample_quality(model, x, lambda *pair: seen.append(pair) or "result", batch_size=150) == "result"
    ((given, samples),) = seen
    assert torch.equal(given, x)
    assert samples.shape == x.shape
    # Five standard errors of 400 draws from N(2, 1).
    assert (samples.mean(0) - 2).abs().max() < 5 / 20
    assert not torch.equal(samples[:100], samples[150:250])


def test_the_seed_decides_and_the_random_state_is_left():
    x, before = data(), torch.get_rng_state()
    one, same, other = (sample_quality(model, x, lambda _, samples: samples, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_random_decoder_adds_its_variance():
    variances = [
        sample_quality(model, data(4000), lambda _, samples: samples.var(), random=random) for random in (False, True)
    ]
    assert variances[0].item() == pytest.approx(1, rel=0.1)
    assert variances[1].item() == pytest.approx(2, rel=0.1)


def test_conditions_are_those_of_the_data_in_dicts_and_tuples():
    x, shift = data(), 100.0 * torch.arange(400.0)[:, None]

    def of_dict(batch):
        model(batch["x"], batch["shift"])

    for program, given in ((model, (x, shift)), (of_dict, {"x": x, "shift": shift})):
        samples = sample_quality(program, given, lambda _, samples: samples, batch_size=64)
        assert (samples - shift - 2).abs().max() < 6


@pytest.mark.slow  # of the imports
def test_frechet_distance_of_torchmetrics_is_that_of_the_moments():
    """FID of a feature network that does nothing, against Frechet's formula in float64 on the same samples."""
    fid = pytest.importorskip("torchmetrics.image.fid")
    scipy = pytest.importorskip("scipy.linalg")
    pytest.importorskip("torchvision")

    class Same(torch.nn.Module):
        num_features = 3

        def forward(self, images):
            return images[:, :, 0, 0]

    metric = fid.FrechetInceptionDistance(feature=Same(), normalize=True, input_img_size=(3, 1, 1))
    options = {"transform": lambda rows: rows[:, :, None, None].clamp(0, 1), "batch_size": 150}
    metric.update(torch.rand(10, 3, 1, 1), real=True)  # is reset
    found = sample_quality(model, data(), metric, **options).item()

    def moments(rows):
        rows = rows.clamp(0, 1).double()
        return rows.mean(0).numpy(), rows.T.cov().numpy()

    (mean, cov), (other, other_cov) = map(
        moments, (data(), sample_quality(model, data(), lambda _, s: s, batch_size=150))
    )
    root = scipy.sqrtm(cov @ other_cov).real
    expected = ((mean - other) ** 2).sum() + (cov + other_cov - 2 * root).trace()
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_kernel_distance_of_torchmetrics_is_near_0_for_samples_of_the_datas_law():
    kid = pytest.importorskip("torchmetrics.image.kid")
    pytest.importorskip("torchvision")

    class First(torch.nn.Module):
        def forward(self, images):
            return images[:, 0].flatten(1)

    def uniform(x, high):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(x.new_zeros(3, 4, 4), high).to_event(3))
            pyro.sample("x", dist.Normal(z, 1).to_event(3), obs=x)

    x, found = torch.rand(200, 3, 4, 4), []
    for high in (1.0, 0.5):
        with pytest.warns(UserWarning, match="Kernel Inception"):
            metric = kid.KernelInceptionDistance(feature=First(), normalize=True, subset_size=100, subsets=20)
        found.append(sample_quality(functools.partial(uniform, high=high), x, metric))
    (mean, deviation), (wrong, _) = found
    assert deviation > 1e-4  # more than rounding
    assert abs(mean) < 3 * deviation
    assert wrong > 10 * deviation


def test_precision_and_recall_are_the_fractions_inside_balls():
    torch.manual_seed(0)
    rows, drawn, k = torch.randn(12, 2).double(), 2 * torch.randn(15, 2).double(), 3

    def covered(points, manifold):
        inside = 0
        for point in points:
            for centre in manifold:
                radius = sorted((centre - other).norm().item() for other in manifold)[k]
                if (point - centre).norm() <= radius:
                    inside += 1
                    break
        return inside / len(points)

    found = precision_recall(rows, drawn, neighbours=k)
    assert found == (covered(drawn, rows), covered(rows, drawn))
    assert 0 < found.precision < found.recall


@pytest.mark.parametrize("seed", [1, 2])
def test_repeated_rows_are_inside_of_each_other(seed):
    """Every row of each set is in the other; by the formula both fractions are 1."""
    torch.manual_seed(seed)
    book = torch.randn(50, 16)
    rows, drawn = book[torch.randint(50, (701 + seed,))], book[torch.randint(50, (460 + seed,))]
    assert len(rows.unique(dim=0)) == len(drawn.unique(dim=0)) == 50
    assert precision_recall(rows, drawn) == (1, 1)


def test_rows_of_two_precisions_are_compared_in_the_higher_one():
    rows, drawn = torch.randn(2, 12, 2)
    assert precision_recall(rows.double(), drawn) == precision_recall(rows, drawn)


def test_a_transform_that_returns_nothing_is_named():
    with pytest.raises(TypeError, match=r"What transform returns must be a dense tensor.* found None"):
        sample_quality(model, data(), precision_recall, transform=lambda rows: None)


def test_a_site_that_is_not_observed_is_named():
    with pytest.raises(ValueError, match=r"site must be 'x', found 'z'"):
        sample_quality(model, data(), precision_recall, site="z")


def test_of_several_observed_sites_one_must_be_chosen():
    def two(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)
            pyro.sample("y", dist.Normal(z.sum(1), 1), obs=x[:, 0])

    with pytest.raises(ValueError, match=r"site must be 'x' or 'y', found None\. Write site='x'"):
        sample_quality(two, data(), precision_recall)
    assert sample_quality(two, data(), lambda given, _: given.shape, site="y") == (400,)


def test_precision_and_recall_do_not_depend_on_where_the_features_are():
    torch.manual_seed(0)
    real, made = torch.randn(300, 3), 1 + torch.randn(300, 3)
    near, far = (precision_recall((made + shift).double(), (real + shift).double()) for shift in (0.0, 1e4))
    single = precision_recall(made + 1e4, real + 1e4)
    assert single == far
    assert near.precision == pytest.approx(far.precision, abs=0.02)


@pytest.mark.parametrize("how", ["mask", "obs_mask"])
@pytest.mark.filterwarnings("ignore:Found vars")
def test_masked_data_do_not_reach_the_metric(how):
    def model(x, mask):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mask if how == "mask" else True):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x, obs_mask=mask if how == "obs_mask" else None)

    def largest(data, samples):
        return data.abs().max().item()

    x, mask = torch.randn(10, 3), torch.arange(10) < 6
    x[6:] = 1e6
    with pytest.raises(ValueError, match="data of site 'x' are masked"):
        sample_quality(model, (x, mask), largest)
    assert sample_quality(model, (x[:6], mask[:6]), largest) < 100


def test_samples_of_a_multinomial_have_the_totals_of_the_data():
    def model(documents):
        with pyro.plate("data", len(documents)):
            z = pyro.sample("z", dist.Normal(documents.new_zeros(3), 1).to_event(1))
            total = int(documents.sum(1).max())
            pyro.sample("x", dist.Multinomial(total, logits=z, validate_args=False), obs=documents)

    def totals(data, samples):
        return samples.sum(1)

    lengths = torch.tensor([10.0, 100.0, 0.0, 1000.0])
    documents = lengths[:, None] * torch.tensor([0.2, 0.3, 0.5])
    torch.testing.assert_close(sample_quality(model, documents, totals), lengths)
    with pytest.raises(ValueError, match=r"totals of the data of site 'x' differ .* Multinomial.* Write random=False"):
        sample_quality(model, documents, totals, random=True)
    same = documents[:1].expand(4, 3)
    assert sample_quality(model, same, totals, random=True).tolist() == [10, 10, 10, 10]
