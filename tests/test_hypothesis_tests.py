"""What both tests of codes against the prior have in common: what they take, leave alone and report."""

import json
import math
import random

import numpy as np
import pyro.distributions as dist
import pytest
import torch

from pyro_wae.diagnostics import classifier_test, two_sample_test

NORMAL = dist.Normal(torch.zeros(3), 1.0).to_event(1)
MIXTURE = dist.MixtureSameFamily(
    dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([[-2.0] * 3, [2.0] * 3]), 1.0).to_event(1)
)
PRIORS = {
    "pyro": NORMAL,
    "torch with a batch shape": torch.distributions.Normal(torch.zeros(3), 1.0),
    "uniform": dist.Uniform(-torch.ones(3), torch.ones(3)).to_event(1),
    "mixture": MIXTURE,
}
both = pytest.mark.parametrize("test", [two_sample_test, classifier_test])


@both
@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_prior_may_be_a_distribution(test, prior):
    codes = prior.sample((60,))
    assert not test(codes, prior, level=0.01).rejected
    assert test(codes + 3, prior).rejected


@both
def test_more_draws_of_a_distribution_are_taken_where_the_test_has_them(test):
    if test is two_sample_test:
        found = test(NORMAL.sample((60,)), NORMAL, prior_draws=3)
        assert (found.n, found.m) == (60, 180)
    else:
        assert test(NORMAL.sample((60,)), NORMAL).held_out == 60


@both
def test_result_depends_on_the_seed_alone_and_leaves_the_global_states(test):
    codes = torch.randn(100, 3) + 0.3
    states = [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()]  # noqa: NPY002
    first = test(codes, NORMAL, seed=3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert [np.random.get_state()[1].tolist(), random.getstate()] == states[1:]  # noqa: NPY002
    torch.manual_seed(17)
    assert test(codes, NORMAL, seed=3) == first
    assert test(codes, NORMAL, seed=4) != first


@both
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_surrounding_modes_change_nothing(test, mode):
    codes, prior = torch.randn(100, 3) + 0.5, torch.randn(100, 3)
    expected = test(codes, prior)
    with mode():
        assert test(codes.clone(), prior.clone()) == expected


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_precision_works_and_gradients_are_left_alone(test, dtype):
    codes = (torch.randn(100, 3) + 2).to(dtype).requires_grad_()
    assert test(codes, torch.randn(100, 3).to(dtype)).rejected
    assert codes.grad is None


@both
def test_result_is_readable_and_serialisable(test):
    found = test(torch.randn(40, 2) + 9, torch.randn(40, 2))
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["rejected"] is True
    assert values["p_value"] == found.p_value
    assert repr(found).startswith(f"{type(found).__name__}(p_value=")
    assert str(found).startswith("codes = prior rejected at level 0.05: p = ")
    assert "not rejected" in str(test(torch.ones(40, 2), torch.ones(30, 2)))
    said = {
        two_sample_test: r"standard deviations under the null; n = 40, m = 40; best of several kernels, ",
        classifier_test: "right on 100.0% of 40 held-out rows (95% interval 91.2% to 100.0%)",
    }
    assert said[test] in str(found)


Z = torch.zeros(20, 3, dtype=torch.float32)
ERRORS = {
    "particles": (Z[None], Z, r"codes .* found \(1, 20, 3\).*codes\[0\]"),
    "vector": (Z, Z[0], r"prior .*shape \(n, d\).*\(3,\).*prior\[:, None\]"),
    "one row": (Z[:1], Z, r"codes .*at least 2 rows.*torch.cat"),
    "no column": (Z[:, :0], Z[:, :0], r"codes .*found shape \(20, 0\)"),
    "integers": (Z.long(), Z, r"codes must be floats.*int64.*codes.float"),
    "nan": (Z, Z.clone().fill_diagonal_(math.nan), r"prior must be finite, but 3 of 60.*isfinite"),
    "columns": (Z, Z[:, :2], r"rows of one length.*\(20, 3\) and \(20, 2\)"),
    "dtype": (Z, Z.double(), r"one dtype.*float32.*float64.*codes.to\(prior\)"),
    "device": (Z, Z.to("meta"), r"on cpu and torch.float32 on meta"),
    "class": (Z, dist.Normal, "prior must be draws.*dist.Normal"),
    "event": (Z, dist.Normal(0.0, 1.0), r"shape \(\d+,\).*\(\d+, 3\).*to_event"),
}


@both
@pytest.mark.parametrize("name", ERRORS)
def test_rows_that_do_not_fit_are_named(test, name):
    codes, prior, message = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        test(codes, prior)
