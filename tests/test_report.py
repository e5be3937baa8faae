"""The report: what it finds in codes whose faults are known, and how it shows them."""

import copy
import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import AutoEncoder, around, delta, normal
from programs import pair as pair_with_lines
from pyro import poutine
from references import program
from reported import FAST, data, pair
from torch import nn
from torch.utils.data import DataLoader

from pyro_wae.costs import AbsoluteError
from pyro_wae.diagnostics import report


def kinds(found):
    return {alarm.kind for alarm in found.alarms}


# The whole report


def test_a_report_under_autocast_compares_codes_in_their_own_precision():
    # Model and guide hold no matrix product, and the codes are the same; the shift is a third of a deviation.
    programs, x = pair(lambda x: x + 0.3), data(500)
    expected = report(*programs, x, **FAST).to_dict()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert report(*programs, x, **FAST).to_dict() == expected


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

    model, guide = program(
        lambda x: delta(units * (5 + x + torch.tensor([0.0, 0.0, 1.0]))),
        lambda x: dist.Normal(5 * units, units).to_event(1),
    )

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


def test_a_hole_is_found_at_any_number_of_test_codes():
    # About 7 percent of the prior's mass lies farther than the radius from all codes.
    x = data(3000, 2)
    x = x[x[:, 0] < 1.25][:2000]
    assert "hole" in kinds(report(*pair(lambda x: x), x, test_codes=40, permutations=99))


def test_a_constant_prior_has_a_report():
    model, guide = program(delta, lambda x: delta(x.new_full((len(x), 3), 0.1)))
    found = report(model, guide, data(300), **FAST)
    assert {"mismatch", "hole", "stray"} <= kinds(found)
    assert (found.joint.moments.narrowest, found.joint.moments.widest) == (None, None)
    json.dumps(found.to_dict(), allow_nan=False)
    equal = report(model, guide, torch.full((300, 3), 0.1), **FAST)
    assert equal.alarms == ()


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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("line", "sign"), [("line", -1), ("guide_line", 1)])
def test_what_a_factor_adds_is_among_the_costs(line, sign, masked):
    model, guide = pair_with_lines(**{line: lambda x, _: pyro.factor("f", x[:, 0], has_rsample=True)})
    x, kept = data(60), (torch.arange(60) < 40) | torch.tensor(not masked)
    found = report(poutine.mask(model, mask=kept), poutine.mask(guide, mask=kept), x, **FAST)
    assert list(found.costs) == ["x", "f"]
    assert found.costs["f"].mean == pytest.approx(sign * x[kept, 0].mean().item(), rel=1e-5)
    assert "cost of f: " in str(found)


# Data in batches, masks, subsamples, conditional priors


@pytest.mark.parametrize("of", ["split", "tuples", "loader"])
def test_batches_give_what_one_call_gives(of):
    x = data(400)
    batches = {"split": x.split(100), "tuples": [(b,) for b in x.split(150)], "loader": DataLoader(x, 64)}[of]
    found = report(*pair(lambda x: x + 1), batches=batches, **FAST)
    torch.testing.assert_close(found.codes, x + 1)
    assert found.costs["x"].mean == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize("labelled_first", [True, False])
def test_a_cost_is_that_of_the_batches_that_have_its_site(labelled_first):
    def model(x, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(x))
            pyro.sample("x", around(z), obs=x)
            if y is not None:
                pyro.sample("y", dist.Normal(z[:, 0], 1), obs=y)

    def guide(x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", delta(x + 1))

    x = data(100)
    batches = [(x[:30], x[:30, 0] - 1), (x[30:],)]
    found = report(model, guide, batches=batches if labelled_first else batches[::-1], **FAST)
    assert found.costs["x"].mean == pytest.approx(3, rel=1e-5)
    assert found.costs["y"].mean == pytest.approx(4, rel=1e-5)


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
    # The prior of another datum: wrong for each, right for all together.
    model, guide = program(lambda x: dist.Normal(x.flip(0), 0.3).to_event(1), lambda x: dist.Normal(x, 0.3).to_event(1))

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


def normalised():
    """Codes are the data, normalised."""
    return AutoEncoder(3, 3, encoder=nn.BatchNorm1d(3), decoder=nn.Identity())


def test_batch_norm_is_compared_in_both_modes():
    # Running statistics still say mean 0 and variance 1: in eval mode the codes are the data, shifted by 2.
    module = normalised().eval()
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
    assert not module.encoder.training


@pytest.mark.parametrize("masked", [False, True])
def test_batches_of_one_datum_are_left_out_of_the_comparison_of_modes(masked):
    module, x = normalised().eval(), data(301)
    batches = [(batch,) for batch in x.split(100)]
    model, guide = module.model, module.guide
    if masked:  # a last batch of two data of which one counts
        batches = [*batches[:3], (torch.cat([x[300:], x[:1]]),)]

        def model(x):
            with poutine.mask(mask=torch.arange(len(x)) != (1 if len(x) == 2 else -1)):
                module.model(x)

    found, whole = (report(model, guide, batches=given, **FAST) for given in (batches, batches[:3]))
    assert (len(found.codes), len(whole.codes)) == (301, 300)
    assert found.batch_norm == whole.batch_norm
    assert report(module.model, module.guide, batches=data(20).split(1), **FAST).batch_norm is None


def test_batch_norm_that_agrees_in_both_modes_raises_no_alarm():
    module = normalised()
    for _ in range(50):
        module.encoder(data(1000))
    module.eval()
    found = report(module.model, module.guide, batches=[data(1000)], **FAST)
    assert "batch_norm" not in kinds(found)
    assert found.batch_norm.penalty_error is None


def test_batch_norm_in_train_mode_is_said():
    module = normalised()
    found = report(module.model, module.guide, data(500), **FAST)
    assert any(".eval()" in alarm.message for alarm in found.alarms)
    assert module.encoder.training
    assert module.encoder.num_batches_tracked == 0


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
    module = normalised()
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
        ({"batches": []}, TypeError, "twice"),
        ({"shape": (5, 5)}, ValueError, r"shape=\(5, 5\).*'x'"),
        ({"shape": {"w": (5, 5)}}, ValueError, "'w'"),
    ],
    ids=lambda value: None if callable(value) or isinstance(value, str) else "-".join(value),
)
def test_errors_say_what_to_write(options, error, message):
    with pytest.raises(error, match=message):
        report(*pair(lambda x: x), data(50), **options)


def test_codes_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="site 'z'"):
        report(*pair(lambda x: x / 0), data(50))


def test_a_prior_of_another_precision_is_an_error():
    model, guide = program(prior=lambda x: dist.Normal(torch.zeros(3, dtype=torch.float32), 1).to_event(1))
    with pytest.raises(
        ValueError, match=r"one floating dtype, found torch\.float64 and torch\.float32\. Make the model"
    ):
        report(model, guide, data(50).double())
