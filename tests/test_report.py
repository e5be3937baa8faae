"""The report: what it finds in codes whose faults are known, and how it shows them."""

import copy
import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine import runtime
from torch import nn
from torch.utils.data import DataLoader

from pyro_wae.costs import AbsoluteError
from pyro_wae.diagnostics import report
from pyro_wae.diagnostics.comparison import Yardstick, coverage, moments, worst_direction

FAST = {"test_codes": 300, "permutations": 99}


@pytest.fixture(autouse=True)
def _clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    assert runtime._PYRO_STACK == []


def data(n, d=3, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def pair(encode, noise=0.0):
    """A standard normal prior, and a guide that gives codes ``encode(x)``."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            code = encode(x)
            fn = dist.Normal(code, noise) if noise else dist.Delta(code)
            pyro.sample("z", fn.to_event(1))

    return model, guide


def kinds(found):
    return {alarm.kind for alarm in found.alarms}


# Geometry, on rows


def test_moments_are_those_of_the_formulas():
    prior, second = 2 * data(4000, 2, 1) + 7, 2 * data(4000, 2, 2) + 7
    codes = prior * torch.tensor([0.5, 3.0])
    found = moments(codes, prior, second, Yardstick(torch.tensor([7.0, 7.0]), torch.tensor([2.0, 2.0])))
    assert found.spread == pytest.approx(codes.std(0) / 2, rel=1e-4)
    assert found.mean == pytest.approx((codes.mean(0) - 7) / 2, rel=1e-4)
    # Codes are a linear image of the very prior draws: the variance ratios are the squares of the factors.
    assert found.narrowest == pytest.approx(0.25, rel=1e-3)
    assert found.widest == pytest.approx(9.0, rel=1e-3)
    # The eigenvalues of 4 diag(0.25, 9) and of 4 I, within five standard errors sqrt(2 / n) each.
    assert found.eigenvalue_ratio == pytest.approx(36, rel=10 * math.sqrt(2 / 4000))
    assert found.prior_eigenvalue_ratio == pytest.approx(1, abs=10 * math.sqrt(2 / 4000))


def test_a_ratio_of_variances_ignores_where_the_prior_is_constant():
    flat = torch.tensor([1.0, 0.0])
    found = moments(data(500, 2) * flat, data(500, 2, 2) * flat, data(500, 2, 3) * flat, Yardstick.of_draws(data(9, 2)))
    assert found.narrowest > 0.5
    assert found.eigenvalue_ratio is None


def test_few_rows_say_nothing_of_all_lines():
    found = moments(data(8, 4), data(8, 4, 2), data(8, 4, 3), Yardstick.of_draws(data(8, 4, 3)))
    assert found.narrowest is None
    assert found.widest_null is None


def test_the_yardstick_leaves_constant_coordinates_alone():
    draws = torch.cat([5 * data(1000, 1) + 2, torch.full((1000, 1), 3.0)], 1)
    measured = Yardstick.of_draws(draws).measure(draws)
    assert measured[:, 0].std() == pytest.approx(1, rel=1e-5)
    assert (measured[:, 1].abs() < 1e-5).all()


def test_the_worst_direction_of_a_shift_is_the_shift():
    prior, second = data(1000, 4, 2), data(1000, 4, 3)
    shift = torch.tensor([0.6, 0.0, -0.8, 0.0])
    found = worst_direction(prior + 2 * shift, prior, second, Yardstick(torch.zeros(4), torch.ones(4)), seed=0)
    assert found.weights == pytest.approx(shift.tolist(), abs=0.02)
    assert found.distance == pytest.approx(2, rel=1e-3)
    assert found.distance_null < 0.3


def test_holes_are_the_prior_draws_without_codes():
    prior, second = data(4000, 2, 2), data(4000, 2, 3)
    codes = data(8000, 2, 4)
    codes = codes[codes[:, 0] < 0.5][:4000]
    found, in_hole = coverage(codes, prior, second, Yardstick(torch.zeros(2), torch.ones(2)))
    # Draws beyond the edge by more than the radius, and the one percent expected anywhere.
    beyond = 0.5 * math.erfc((0.5 + found.radius) / math.sqrt(2))
    assert found.holes == pytest.approx(beyond, abs=0.04)
    assert prior[in_hole, 0].median() > 0.5
    assert in_hole.double().mean().item() == found.holes


def test_one_percent_is_far_where_codes_are_prior_draws():
    found, _ = coverage(data(4000, 3), data(4000, 3, 2), data(4000, 3, 3), Yardstick(torch.zeros(3), torch.ones(3)))
    # Five standard errors of a share, of which the radius has as much again.
    error = 5 * math.sqrt(2 * 0.01 * 0.99 / 4000)
    assert found.holes == pytest.approx(0.01, abs=error)
    assert found.stray == pytest.approx(0.01, abs=error)
    assert found.outliers == ()


def test_outliers_are_named():
    codes = data(500, 3)
    codes[[17, 400]] = torch.tensor([30.0, 0.0, 0.0])
    found, _ = coverage(codes, data(500, 3, 2), data(500, 3, 3), Yardstick(torch.zeros(3), torch.ones(3)))
    assert found.outliers == (17, 400)


# The whole report


def test_codes_that_match_raise_no_alarm():
    # Null: codes are prior draws. Two tests at level 0.05, so that about one seed in ten would reject.
    found = report(*pair(lambda x: x), data(1000), **FAST)
    assert found.alarms == ()
    assert found.costs["x"].mean == 0
    assert found.joint.noise.share == 0
    assert list(found.comparisons) == ["z"]
    assert found.batch_norm is None
    assert "alarms: none" in str(found)


def test_a_shift_is_found_with_its_direction_and_its_cost():
    found = report(*pair(lambda x: x + torch.tensor([0.0, 1.0, 0.0])), data(1000), **FAST)
    assert "mismatch" in kinds(found)
    assert found.joint.two_sample.rejected
    assert found.joint.classifier.rejected
    assert abs(found.joint.direction.weights[1]) > 0.95
    assert found.joint.direction.distance == pytest.approx(1, abs=0.2)
    assert found.joint.moments.mean[1] == pytest.approx(1, abs=5 * math.sqrt(2 / 1000))
    assert found.costs["x"].mean == pytest.approx(1, rel=1e-5)
    assert "+1.00 z[1]" in str(found)


def test_codes_in_other_units_are_measured_by_the_prior():
    units = torch.tensor([1000.0, 1.0, 0.001])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(5 * units, units).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(units * (5 + x + torch.tensor([0.0, 0.0, 1.0]))).to_event(1))

    found = report(model, guide, data(1000), **FAST)
    assert abs(found.joint.direction.weights[2]) > 0.95
    assert found.joint.two_sample.rejected


def test_collapsed_codes_are_narrow():
    found = report(*pair(lambda x: x * torch.tensor([1.0, 0.1, 1.0])), data(1000), **FAST)
    assert "narrow" in kinds(found)
    assert found.joint.moments.narrowest == pytest.approx(0.01, rel=0.3)
    found = report(*pair(torch.zeros_like), data(500), **FAST)  # all codes are one point
    assert {"narrow", "hole", "mismatch"} <= kinds(found)
    json.dumps(found.to_dict(), allow_nan=False)
    found.plot()


def test_codes_that_are_too_wide_stray():
    found = report(*pair(lambda x: 3 * x), data(1000), **FAST)
    assert {"wide", "stray", "mismatch"} <= kinds(found)
    assert "hole" not in kinds(found)


def test_a_hole_is_found_though_mean_and_covariance_match():
    def ring(x):
        # Turned to a fixed norm: mean 0 and covariance I, and no code near the middle.
        return nn.functional.normalize(x, dim=1) * math.sqrt(x.shape[1])

    found = report(*pair(ring), data(2000, 2), **FAST)
    assert {"hole", "mismatch"} <= kinds(found)
    assert "narrow" not in kinds(found)
    inner = found.prior[found.in_hole].norm(dim=1)
    assert (inner < 1).any()
    assert found.joint.moments.spread == pytest.approx([1, 1], abs=0.1)


def test_an_outlier_is_named_by_its_place_in_the_data():
    x = data(600)
    x[123] = 40.0
    kept = torch.ones(600, dtype=torch.bool)
    kept[:100] = False
    model, guide = pair(lambda x: x)
    found = report(poutine.mask(model, mask=kept), guide, x, **FAST)
    assert found.joint.coverage.outliers == (123,)
    assert "data number 123" in str(found)
    assert len(found.codes) == 500


def test_noise_that_collapsed_is_told_from_an_encoder_without_noise():
    small = report(*pair(lambda x: x, noise=0.01), data(1000), **FAST)
    assert small.joint.noise.share == pytest.approx(1e-4, rel=5 * math.sqrt(2 / 3000))
    assert "noise" in kinds(small)
    healthy = report(*pair(lambda x: 0.8 * x, noise=0.6), data(1000), **FAST)
    assert healthy.joint.noise.share == pytest.approx(0.36, rel=0.15)
    assert not kinds(healthy) & {"noise", "uninformative"}
    useless = report(*pair(torch.zeros_like, noise=1.0), data(1000), **FAST)
    assert "uninformative" in kinds(useless)


def hierarchical(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0, 1))
        b = pyro.sample("b", dist.Normal(a[:, None].expand(-1, 2), 0.1).to_event(1))
        pyro.sample("x", dist.Normal(b, 1).to_event(1), obs=x[:, 1:])
        pyro.sample("y", dist.Normal(a, 1), obs=x[:, 0] + 1)


def torn(x):
    """Each site matches its own prior, but the two do not belong together."""
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Delta(x[:, 0]))
        b = x[:, 1:2] + 0.1 * data(len(x), 2, seed=5)
        pyro.sample("b", dist.Delta(b).to_event(1))


def test_sites_are_compared_apart_and_together():
    found = report(hierarchical, torn, data(1000), **FAST)
    assert list(found.comparisons) == ["a", "b", "joint"]
    wrong = {(alarm.site, alarm.kind) for alarm in found.alarms}
    assert {("joint", "mismatch"), ("joint", "wide"), ("joint", "stray")} <= wrong
    # Null: each site by itself matches. Two kernel tests at level 0.05.
    assert not any(found.comparisons[site].two_sample.rejected for site in ("a", "b"))
    assert not {"wide", "narrow", "hole", "stray"} & {kind for site, kind in wrong if site != "joint"}
    assert found.joint.coordinates == ("a[0]", "b[0]", "b[1]")
    assert found.joint.two_sample.rejected
    assert list(found.costs) == ["x", "y"]
    assert found.costs["y"].mean == pytest.approx(1, rel=1e-5)
    assert found.costs["y"].standard_error == pytest.approx(0, abs=1e-6)


def test_costs_are_those_asked_for():
    model, guide = pair(lambda x: x - 2)
    assert report(model, guide, data(50), cost=AbsoluteError()).costs["x"].mean == pytest.approx(6, rel=1e-5)
    per_site = report(model, guide, data(50), cost={"x": lambda x, g: (x - g).amax(1)})
    assert per_site.costs["x"].mean == pytest.approx(2, rel=1e-5)
    with pytest.raises(ValueError, match="'w'"):
        report(model, guide, data(50), cost={"w": AbsoluteError()})


# Data in batches, masks, subsamples, conditional priors


@pytest.mark.parametrize("of", ["split", "tuples", "loader"])
def test_batches_give_what_one_call_gives(of):
    x = data(400)
    batches = {"split": x.split(100), "tuples": [(b,) for b in x.split(150)], "loader": DataLoader(x, 64)}[of]
    found = report(*pair(lambda x: x + 1), batches=batches, **FAST)
    torch.testing.assert_close(found.codes, x + 1)
    assert found.costs["x"].mean == pytest.approx(3, rel=1e-5)


def test_no_more_codes_than_asked_for():
    model, guide = pair(lambda x: x)
    read = []

    def batches():
        for index in range(10):
            read.append(index)
            yield data(100, seed=index + 1)

    assert len(report(model, guide, batches=batches(), max_codes=250, **FAST).codes) == 250
    assert read == [0, 1, 2]
    many = torch.arange(1000.0)[:, None].expand(-1, 2)
    picked = report(model, guide, many, max_codes=200, **FAST).codes[:, 0]
    assert len(picked.unique()) == 200
    assert picked.max() > 900  # not the first 200: data are often sorted


def test_a_prior_that_depends_on_the_datum_is_compared_on_the_whole():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, 0.3).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            # The prior of another datum: wrong for each, right for all together.
            pyro.sample("z", dist.Normal(x.flip(0), 0.3).to_event(1))

    found = report(model, guide, data(1000, 2), **FAST)
    assert found.alarms == ()
    # Codes of one half of the data against prior draws of the other, and half of these to judge a classifier by.
    assert found.joint.classifier.held_out == 500


def test_a_subsampled_plate_gives_its_subsample():
    x = data(500)

    def model(x):
        with pyro.plate("data", 500, subsample_size=200) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x[index])

    def guide(x):
        with pyro.plate("data", 500, subsample_size=200) as index:
            pyro.sample("z", dist.Delta(x[index]).to_event(1))

    found = report(model, guide, x, **FAST)
    assert len(found.codes) == 200
    assert found.costs["x"].mean == 0
    assert found.joint.noise.share == 0  # both runs of the guide saw the same data


# BatchNorm


class Normalised(nn.Module):
    def __init__(self, d=3):
        super().__init__()
        self.norm = nn.BatchNorm1d(d)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1).to_event(1))
            pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.norm(x)).to_event(1))


def test_batch_norm_is_compared_in_both_modes():
    # Running statistics still say mean 0 and variance 1: in eval mode the codes are the data, shifted by 2.
    module = Normalised().eval()
    before = copy.deepcopy(module.state_dict())
    found = report(module.model, module.guide, batches=(data(1000) + 2).split(100), **FAST)
    modes = found.batch_norm
    assert (modes.layers, modes.training, modes.batch_sizes) == (1, 0, (100, 100))
    # Train mode takes off the batch's mean, near 2, and divides by a deviation near 1.
    assert modes.code_shift == pytest.approx(2, rel=0.1)
    assert modes.cost_train == pytest.approx(12, rel=0.1)
    assert modes.cost_eval == pytest.approx(0, abs=1e-3)
    assert modes.penalty_train < 0 < modes.penalty_eval
    assert "batch_norm" in kinds(found)
    assert "mismatch" in kinds(found)  # of the mode the module is in
    assert "BatchNorm: 1 layer, 0 in train mode" in str(found)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert not module.norm.training


def test_batch_norm_that_agrees_in_both_modes_raises_no_alarm():
    module = Normalised()
    for _ in range(50):
        module.norm(data(1000))
    module.eval()
    found = report(module.model, module.guide, batches=[data(1000)], **FAST)
    assert "batch_norm" not in kinds(found)
    assert found.batch_norm.penalty_error is None


def test_batch_norm_in_train_mode_is_said():
    module = Normalised()
    found = report(module.model, module.guide, data(500), **FAST)
    assert any(".eval()" in alarm.message for alarm in found.alarms)
    assert module.norm.training
    assert module.norm.num_batches_tracked == 0


# What the report is


def test_the_random_state_is_neither_used_nor_changed():
    model, guide = pair(lambda x: 0.8 * x, noise=0.6)
    torch.manual_seed(5)
    first, after = report(model, guide, data(200), **FAST), torch.rand(3)
    torch.manual_seed(5)
    torch.testing.assert_close(torch.rand(3), after)
    torch.manual_seed(6)
    assert report(model, guide, data(200), **FAST).to_dict() == first.to_dict()
    assert report(model, guide, data(200), seed=1, **FAST).to_dict() != first.to_dict()


def test_the_report_is_json():
    module = Normalised()
    found = report(module.model, module.guide, batches=data(300).split(100), **FAST)
    back = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert back == found.to_dict()
    assert back["codes"] == 300
    assert back["comparisons"]["z"]["moments"]["mean"] == pytest.approx(found.joint.moments.mean)
    assert {alarm["kind"] for alarm in back["alarms"]} == kinds(found)


def test_the_text_fits_a_terminal_and_shows_the_least_alike_coordinates():
    shift = torch.zeros(30)
    shift[27] = 2
    found = report(*pair(lambda x: x + shift), data(300, 30), **FAST)
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.split()[:1] == ["z[27]"] for line in lines)
    assert "and 20 more" in str(found)


def test_a_report_keeps_its_repr_short():
    assert "tensor" not in repr(report(*pair(lambda x: x), data(50)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_codes": 1}, ValueError, "max_codes"),
        ({"test_codes": True}, ValueError, "test_codes"),
        ({"batches": []}, TypeError, "twice"),
        ({"level": 2}, ValueError, "level"),
        ({"shape": (5, 5)}, ValueError, r"shape=\(5, 5\).*'x'"),
        ({"shape": {"w": (5, 5)}}, ValueError, "'w'"),
    ],
    ids=lambda value: None if callable(value) or isinstance(value, str) else "-".join(value),
)
def test_errors_say_what_to_write(options, error, message):
    with pytest.raises(error, match=message):
        report(*pair(lambda x: x), data(50), **options)


def test_data_without_any_batch_are_an_error():
    with pytest.raises(ValueError, match="no batch"):
        report(*pair(lambda x: x), batches=[])


def test_codes_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="site 'z'"):
        report(*pair(lambda x: x / 0), data(50))


# The picture


def imaging(shape, scale=1.0):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1).to_event(1))
            pixels = torch.sigmoid(z.mean(1)).reshape(-1, *[1] * len(shape)) * scale * x.new_ones(shape)
            pyro.sample("x", dist.Normal(pixels, 1).to_event(len(shape)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x.flatten(1)[:, :3]).to_event(1))

    return model, guide


@pytest.mark.parametrize(
    ("event", "shape"),
    [((8, 9), None), ((1, 8, 8), None), ((3, 8, 8), None), ((72,), (8, 9)), ((192,), (3, 8, 8))],
    ids=str,
)
def test_images_are_shown(event, shape):
    pytest.importorskip("matplotlib")
    x = torch.rand(60, *event)
    found = report(*imaging(event), x, shape=shape, **FAST)
    size = shape or event
    pictures = found.pictures["x"]
    torch.testing.assert_close(pictures.inputs, x[:10].reshape(10, *size))
    expected = torch.sigmoid(x.flatten(1)[:10, :3].mean(1))
    torch.testing.assert_close(pictures.outputs.flatten(1).mean(1), expected)
    # A way goes evenly from the code of datum 0 to that of datum 1.
    ends = x.flatten(1)[:2, :3].mean(1)
    ways = torch.sigmoid(torch.linspace(0, 1, pictures.steps) * (ends[1] - ends[0]) + ends[0])
    torch.testing.assert_close(pictures.paths.flatten(1).mean(1)[: pictures.steps], ways)
    assert pictures.samples.flatten(1).mean(1).unique().numel() == len(pictures.samples)
    assert len(found.plot().axes) == 2 + 1 + 3


def test_images_of_any_scale_are_shown_on_theirs():
    x = 255 * torch.rand(40, 8, 8)
    x[0, 0, 0], x[0, 0, 1] = 0, 255
    pictures = report(*imaging((8, 8), 255.0), x / 1, **FAST).pictures["x"]
    torch.testing.assert_close(pictures.inputs, x[:10] / 255)


@pytest.mark.parametrize("event", [(64,), (30, 8), (7, 7)], ids=str)
def test_what_is_no_image_is_not_shown(event):
    assert report(*imaging(event), torch.rand(40, *event), **FAST).pictures == {}


def test_the_plane_begins_with_the_worst_direction():
    pytest.importorskip("matplotlib")
    found = report(*pair(lambda x: x + torch.tensor([0.0, 3.0, 0.0])), data(500), **FAST)
    figure = found.plot()
    codes, prior, lines = figure.axes
    assert codes.get_xlabel() == "largest discrepancy"
    shown, drawn = (
        torch.cat([torch.as_tensor(dots.get_offsets().data) for dots in axes.collections]) for axes in (codes, prior)
    )
    assert len(shown) == len(drawn) == 500
    # A shift by 3, in deviations of the 500 prior draws that are the yardstick.
    expected = 3 / found.joint.moments.prior_spread[1]
    assert shown[:, 0].mean() - drawn[:, 0].mean() == pytest.approx(expected, abs=5 * math.sqrt(2 / 500) / 0.88)
    assert abs(shown[:, 1].mean() - drawn[:, 1].mean()) < 0.3
    assert "z[1], largest discrepancy" in [text.get_text() for text in lines.get_legend().get_texts()]


def test_a_code_of_one_number_has_no_plane():
    pytest.importorskip("matplotlib")
    assert len(report(*pair(lambda x: x), data(300, 1), **FAST).plot().axes) == 1
