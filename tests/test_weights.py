"""Penalty weights: numbers, plans and the constraint."""

import copy
import itertools
import math
import warnings

import pyro
import pytest
import torch
from programs import AutoEncoder, delta, normal
from pyro.infer import SVI
from references import made_by_default, program

from pyro_wae import WAELoss
from pyro_wae.kernels import InverseMultiquadratic, Laplace
from pyro_wae.penalties import MMD, KernelStein
from pyro_wae.penalties.null_variance import centred_square, pair_variance
from pyro_wae.weights import Constant, Constraint, LinearSchedule, Schedule, Weight, as_weight
from pyro_wae.weights.base import weight_of_step
from pyro_wae.weights.constraint import FACTORS, LENGTHS, WARM_UP, RandomFeatures, trace_of_squared_covariance

D = 3


def make_net():
    """A small auto-encoder whose encoder shifts the data, which are draws of the prior."""
    return AutoEncoder(D, D)


def step(loss, net=None, n=64):
    net = net or make_net()
    loss.loss_and_grads(net.model, net.guide, torch.randn(n, D))
    return loss.terms


# Plans


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (Schedule(lambda step: 10.0 * step), [0.0, 10.0, 20.0, 30.0, 40.0]),
        (LinearSchedule(2.0, 8.0, steps=3), [2.0, 4.0, 6.0, 8.0, 8.0]),
        (LinearSchedule(8.0, 0.0, steps=2), [8.0, 4.0, 0.0, 0.0, 0.0]),
        (Constant(5.0), [5.0] * 5),
    ],
    ids=["schedule", "up", "down", "constant"],
)
def test_a_plan_gives_each_training_step_its_weight(weight, expected):
    loss, net, x = WAELoss(penalty_weight=weight), make_net(), torch.randn(64, D)
    for planned in expected:
        value = loss.loss_and_grads(net.model, net.guide, x)
        assert loss.terms.weight == pytest.approx(planned)
        assert value == pytest.approx((loss.terms.cost + planned * loss.terms.penalty).item(), rel=1e-6)


def test_evaluation_does_not_count_as_a_step():
    loss, net, x = WAELoss(penalty_weight=Schedule(lambda step: 1.0)), make_net(), torch.randn(64, D)
    loss.loss(net.model, net.guide, x)
    with torch.no_grad():
        loss.differentiable_loss(net.model, net.guide, x)
    assert loss.penalty_weight.step == 0
    loss.differentiable_loss(net.model, net.guide, x)
    assert loss.penalty_weight.step == 1


@pytest.mark.parametrize("make", [Constraint, lambda: LinearSchedule(0.0, 100.0, steps=10)])
@pytest.mark.parametrize("options", [{}, {"micro_batch": 16}, {"process_group": "world"}], ids=str)
def test_a_step_of_svi_without_gradients_is_an_evaluation(make, options, one_rank):
    loss, net, x = WAELoss(penalty_weight=make(), **options), make_net(), torch.randn(64, D)
    svi = SVI(net.model, net.guide, pyro.optim.SGD({"lr": 1e-2}), loss=loss)
    for _ in range(3):
        svi.step(x)
    before = copy.deepcopy((loss.penalty_weight.state_dict(), net.state_dict()))
    values = []
    with torch.no_grad():
        for evaluate in (svi.evaluate_loss, svi.step):
            pyro.set_rng_seed(0)
            values.append(evaluate(3 * x))
    assert values[0] == values[1]
    for found, kept in zip((loss.penalty_weight.state_dict(), net.state_dict()), before, strict=True):
        torch.testing.assert_close(found, kept, rtol=0, atol=0, equal_nan=True)


def test_a_nan_step_is_not_seen_by_the_weight():
    loss, net = WAELoss(penalty_weight=Constraint()), make_net()
    step(loss, net)
    before = copy.deepcopy(loss.penalty_weight.state_dict())
    loss.cost = WAELoss(cost=lambda x, g: (x - g).sum(1) * math.nan).cost
    with pytest.raises(ValueError, match="NaN"):
        step(loss, net)
    after = loss.penalty_weight.state_dict()
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before if torch.is_tensor(before[k]))
    assert loss.penalty_weight.step == 1


# Errors


@pytest.mark.parametrize(
    "weight",
    [LinearSchedule(0.0, 1.0, steps=2), Constraint(codes=500), Schedule(lambda step: 1.0)],
    ids=lambda w: w._get_name(),
)
def test_a_weight_shows_the_call_that_makes_it(weight):
    assert repr(weight).startswith(type(weight).__name__ + "(")
    assert as_weight(weight) is weight


def test_the_default_is_a_constraint_unless_no_penalty_draws_from_the_prior():
    assert isinstance(WAELoss().penalty_weight, Constraint)
    assert WAELoss(KernelStein()).penalty_weight(torch.tensor(7.0)) == 100.0


class Own(Weight):
    """A weight of the user's own."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, cost=None):
        return self.value


@pytest.mark.parametrize(
    ("value", "error"),
    [
        *[(value, ValueError) for value in (-1.0, math.nan, math.inf, torch.tensor(-1.0), torch.tensor(math.nan))],
        *[(value, TypeError) for value in (None, "1", True, torch.ones(1), torch.ones(1, device="meta"))],
    ],
    ids=str,
)
def test_a_weight_of_the_users_own_that_returns_no_weight_is_refused_by_its_name(value, error):
    with pytest.raises(error, match=r"^Own's weight must be a finite number >= 0, found .* Write def forward\(self, "):
        step(WAELoss(penalty_weight=Own(value)))


def test_a_weight_of_the_users_own_may_be_a_parameter():
    weight = Own(torch.nn.Parameter(torch.tensor(2.0)))
    terms = step(WAELoss(penalty_weight=weight))
    assert terms.weight == 2.0
    torch.testing.assert_close(weight.value.grad, terms.penalty)


def test_a_weight_on_an_accelerator_is_not_read():
    value = torch.tensor(-1.0, device="meta")
    assert weight_of_step(Own(value), torch.tensor(1.0)) is value


def test_a_cost_that_is_not_finite_is_the_costs_error_and_not_that_of_a_weight_that_starts_from_it():
    class OfCost(Weight):
        def forward(self, cost=None):
            return 0.1 * cost

    loss = WAELoss(cost=lambda x, g: (x - g).sum(1) * math.nan, penalty_weight=OfCost())
    with pytest.raises(ValueError, match=r"^(?!OfCost).*cost.*NaN"):
        step(loss)


# Random features


def test_the_features_product_is_the_mean_kernel():
    # With 200,000 frequencies the product's standard error is below 1 / sqrt(2 * 200,000) = 0.0016; the bound is 4.
    torch.manual_seed(0)
    prior, x = torch.randn(4000, D), 2 * torch.randn(6, D)
    features = RandomFeatures.draw(prior, 200_000, seed=1)
    phi = features.waves(x).double() * features.height
    scale = 2 * prior.double().var(0).sum().item()
    kernel = InverseMultiquadratic.multiscale(scale**0.5, FACTORS)
    fine = Laplace.multiscale((scale / 2) ** 0.5, LENGTHS)
    expected = (kernel.gram(x, x) / len(FACTORS) + fine.gram(x, x) / len(LENGTHS)) / 2
    assert (phi @ phi.T - expected).abs().max() < 0.0064


def test_codes_far_from_0_have_the_features_that_they_have_there():
    """Up to a turn of each frequency, which the product of two of them does not see."""
    prior = torch.randn(50, 3, dtype=torch.float64)
    near, far = (RandomFeatures.draw(prior + shift, 64, seed=0).waves(prior + shift) for shift in (0.0, 1e8))
    torch.testing.assert_close(far @ far.T, near @ near.T, rtol=0, atol=1e-3)


def test_the_trace_is_the_null_variance_of_the_features_kernel():
    # Both estimate E h^2 of one kernel without bias; the mean over 200 sets of 100 draws has a relative error of ~2 %.
    torch.manual_seed(0)
    prior = torch.randn(3000, D)
    features = RandomFeatures.draw(prior, 64, seed=0)
    phi = features.waves(prior).double() * features.height
    expected = centred_square(phi @ phi.T)
    waves = (features.waves(torch.randn(100, D)).double() for _ in range(200))
    found = torch.stack([trace_of_squared_covariance(own * features.height) for own in waves]).mean()
    assert found == pytest.approx(expected.item(), rel=0.08)


# The constraint


def drive(constraint, *, steps, n, d, codes_of_step, cost=50.0):
    """Shows a constraint the codes that a training at its weight would give; returns the last discrepancies."""
    found = []
    for _ in range(steps):
        codes = codes_of_step(float(constraint(torch.tensor(cost))), n, d)
        constraint.observe(torch.tensor(cost), codes[None], torch.randn(n, d))
        found.append(constraint.discrepancy.item())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("n", [64, 512])
@pytest.mark.parametrize("d", [2, 64])
def test_the_weight_settles_where_the_slack_is_just_used(n, d):
    # A training in small: at weight w the codes' mean moves, with a lag of 100 steps, to where the cost's pull of 50
    # is balanced by a penalty that grows with the square of the shift.
    torch.manual_seed(0)
    shift = [0.5]

    def lagging(weight, n, d):
        shift[0] += 0.01 * (50 / weight - shift[0])
        codes = torch.randn(n, d)
        codes[:, 0] += shift[0]
        return codes

    constraint = Constraint(codes=1000, initial=50.0, maximum=1e6)
    found = drive(constraint, steps=2500, n=n, d=d, codes_of_step=lagging)
    late = torch.tensor(found[-1000:])
    assert 0.5 < late.mean() < 1.5
    assert late[:500].mean() == pytest.approx(late[500:].mean().item(), abs=0.8)


@pytest.mark.parametrize("cost", [-3.0, 0.0])
def test_a_cost_that_is_not_positive_gives_a_positive_weight(cost):
    assert Constraint()(torch.tensor(cost)) > 0


def test_a_target_out_of_reach_is_capped_and_reported_once():
    constraint = Constraint(initial=10.0, maximum=20.0, rate=0.1)
    with pytest.warns(UserWarning, match=r"reached its maximum, 20.*Constraint\(codes=500\)") as caught:
        drive(constraint, steps=300, n=64, d=2, codes_of_step=lambda w, n, d: torch.randn(n, d) + 2.0)
    assert constraint.weight == 20.0
    assert len(caught) == 1


def test_a_weight_that_lowers_nothing_returns_to_where_it_was_and_stays():
    # Codes that differ from the prior whatever the weight is: at a rate of 0.01 the weight doubles in 70 steps.
    torch.manual_seed(0)
    constraint = Constraint(initial=10.0, maximum=1e9, rate=0.01)
    far = {"n": 64, "d": 2, "codes_of_step": lambda w, n, d: torch.randn(n, d) + 1.0}
    drive(constraint, steps=WARM_UP, **far)
    assert constraint.outcome == "rising"
    before = constraint.weight.item()
    drive(constraint, steps=300, **far)
    assert constraint.outcome == "plateau"
    assert constraint.weight.item() == pytest.approx(before, rel=0.02)
    # The discrepancy falls to its slack: the weight falls, and that is what is reported.
    drive(constraint, steps=600, n=64, d=2, codes_of_step=lambda w, n, d: torch.randn(n, d))
    assert constraint.outcome == "matched"
    assert constraint.weight < before


def test_a_weight_rises_on_while_it_lowers_the_discrepancy_or_the_cost_falls():
    torch.manual_seed(0)
    found = []
    for shrinks, falls in ((True, False), (False, True)):
        constraint = Constraint(initial=10.0, maximum=1e9, rate=0.01)
        for step in range(500):
            # A shift that is inverse to the weight, as under a cost that pulls evenly; or a cost of nets that learn.
            shift = 50 / constraint(torch.tensor(1.0)) if shrinks else 1.0
            cost = 50.0 * 0.999**step if falls else 50.0
            constraint.observe(torch.tensor(cost), torch.randn(1, 64, 2) + shift, torch.randn(64, 2))
        found.append((constraint.outcome, bool(constraint.weight > 200)))
    assert found[0][0] in ("rising", "matched")
    assert found[1] == ("rising", True)
    assert found[0][1] or found[0][0] == "matched"


def test_the_first_weight_is_a_tenth_of_the_first_cost():
    loss, net = WAELoss(penalty_weight=Constraint()), make_net()
    terms = step(loss, net)
    assert terms.weight == pytest.approx(terms.cost.item() / 10)
    assert loss.penalty_weight.largest == pytest.approx(30 * terms.cost.item(), rel=1e-5)


def test_no_weight_is_above_the_maximum_that_was_given():
    loss, net = WAELoss(penalty_weight=Constraint(maximum=0.01)), make_net()
    found = [float(step(loss, net).weight) for _ in range(3)]
    assert found == pytest.approx([0.01] * 3)


def test_after_the_warm_up_the_weight_moves_on_every_eighth_step_by_as_much_and_resumes():
    def step(constraint, seed):
        torch.manual_seed(seed)
        constraint.observe(torch.tensor(3.0), torch.randn(1, 16, D) + 3.0, torch.randn(16, D))
        return constraint.weight.item()

    whole, resumed = (Constraint(pool=4, initial=5.0, maximum=1e6) for _ in range(2))
    found = [step(whole, seed) for seed in range(WARM_UP)]
    # From the second step on codes far from the prior raise log lambda by the rate, 0.002.
    assert found[-1] == pytest.approx(5.0 * math.exp(0.002 * (WARM_UP - 1)), rel=1e-4)
    found += [step(whole, seed) for seed in range(WARM_UP, WARM_UP + 5)]
    resumed.load_state_dict(whole.state_dict())
    later = range(WARM_UP + 5, WARM_UP + 24)
    found += [step(whole, seed) for seed in later]
    assert [step(resumed, seed) for seed in later] == found[-len(later) :]
    assert torch.equal(resumed.discrepancy, whole.discrepancy)
    rises = [math.log(after / before) for before, after in itertools.pairwise(found[WARM_UP - 1 :])]
    assert rises == pytest.approx([0.016, *[0] * 7] * 3, abs=1e-5)


@pytest.mark.parametrize("pool", [4, 16])
def test_the_state_of_another_pool_is_refused_by_name(pool):
    saved = Constraint(pool=8)
    saved.observe(torch.tensor(1.0), torch.randn(1, 20, 2), torch.randn(20, 2))
    with pytest.raises(RuntimeError, match=rf"8 steps saved, and Constraint\(pool={pool}\) here. Write .*\(pool=8\)"):
        Constraint(pool=pool).load_state_dict(saved.state_dict())
    Constraint(pool=8).load_state_dict(saved.state_dict())
    Constraint(pool=pool).load_state_dict(Constraint(pool=8).state_dict())


def test_a_constraint_draws_no_random_numbers():
    net, x = make_net(), torch.randn(64, D)
    states = []
    for weight in (1.0, Constraint()):
        torch.manual_seed(0)
        WAELoss(penalty_weight=weight).loss_and_grads(net.model, net.guide, x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.slow
def test_a_constraint_makes_an_auto_encoder_match_its_prior():
    # Without a penalty the codes of a linear auto-encoder lie anywhere; the bound is two slacks.
    pyro.clear_param_store()
    torch.manual_seed(0)
    net, constraint = make_net(), Constraint(codes=500)
    loss = WAELoss(penalty_weight=constraint)
    svi = SVI(net.model, net.guide, pyro.optim.Adam({"lr": 3e-3}), loss=loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2500):
            svi.step(torch.randn(128, D) * torch.tensor([0.5, 1.0, 3.0]) + 1.0)
    assert abs(constraint.discrepancy.item()) < 2.0
    codes = net.encoder(torch.randn(5000, D) * torch.tensor([0.5, 1.0, 3.0]) + 1.0)
    assert codes.mean(0).norm() < 0.1


def test_a_constraint_measures_the_sites_that_have_a_penalty():
    def code(x):
        pyro.sample("a", delta(x.new_full((len(x), 2), 50.0)))
        return delta(torch.randn(len(x), D))

    def prior(x):
        pyro.sample("a", normal(x, 2))
        return normal(x, D)

    model, guide = program(code, prior)
    torch.manual_seed(0)
    loss = WAELoss({"a": None, "z": MMD()}, penalty_weight=Constraint())
    for _ in range(4):
        loss.loss_and_grads(model, guide, torch.randn(64, D))
    # Codes at 50 would have a discrepancy of hundreds; draws of the prior have 0 up to some noise.
    assert abs(loss.penalty_weight.discrepancy) < 40


def test_sequences_of_different_lengths_count_as_filled_up_with_zeros():
    found = []
    for padded in (False, True):
        torch.manual_seed(0)
        constraint = Constraint(pool=4)
        for size in (8, 6, 4, 8):
            codes, prior = torch.randn(16, 8), torch.randn(16, 8)
            codes[:, size:], prior[:, size:] = 0, 0
            if not padded:
                codes, prior = codes[:, :size], prior[:, :size]
            # The length is taken from the first step, and zeros do not change it.
            constraint.observe(torch.tensor(1.0), codes[None], prior)
        found.append((constraint.discrepancy, constraint.weight))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-4)


def test_longer_sequences_than_the_first_are_measured_too():
    # Codes that match in their first two numbers and not in the others.
    torch.manual_seed(0)
    constraint = Constraint(pool=4)
    for size in (2, 2, 6, 6, 6, 6):
        prior = torch.randn(64, size)
        codes = torch.randn(64, size)
        codes[:, 2:] += 3.0
        constraint.observe(torch.tensor(1.0), codes[None], prior)
    assert constraint.discrepancy > 50


@pytest.mark.parametrize(("n", "spread"), [(2, 1.0), (3, 1.0), (5, 1.0), (8, 0.0)])
def test_a_constraint_stands_small_batches_and_a_prior_without_spread(n, spread):
    constraint = Constraint()
    for _ in range(5):
        constraint.observe(torch.tensor(1.0), torch.randn(1, n, 2), 1 + spread * torch.randn(n, 2))
    assert torch.isfinite(constraint.weight)


def observed(batches, **options):
    constraint = Constraint(pool=8, **options)
    for cost, codes, prior in batches:
        constraint.observe(cost, codes, prior)
    return constraint


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.tensor(5.0), *torch.randn(2, 50, D, generator=generator).unbind()) for _ in range(count)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["cost", "codes", "prior"])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_constraint_leaves_out_a_step_that_is_not_finite(bad, part, at):
    right = [(cost, codes[None], prior) for cost, codes, prior in batches(40)]
    wrong = [value.clone() for value in right[0]]
    wrong[part].view(-1)[0] = bad
    constraint = observed([*right[:at], wrong])
    assert constraint.weight.isfinite() or (at == 0 and constraint.weight.isnan())
    assert constraint.differences.isfinite().all()
    assert constraint.discrepancy.isfinite() or at < 2
    usual, with_bad = observed(right), observed([*right[:at], wrong, *right[at:]])
    # Once the bad step has left the pool, both measure the same steps.
    torch.testing.assert_close(with_bad.discrepancy, usual.discrepancy, rtol=0.05, atol=0)
    torch.testing.assert_close(with_bad.weight, usual.weight, rtol=0.05, atol=0)


def test_the_discrepancy_is_the_mean_over_pairs_of_different_steps_in_the_deviation_of_the_null():
    """What a batch arranges within itself has no influence, and a step that is not finite takes no pair with it."""
    right = [(cost, codes[None], prior) for cost, codes, prior in batches(4)]
    nan = (right[0][0] * math.nan, *right[0][1:])
    constraint = observed([*right[:3], nan])
    features = RandomFeatures(constraint.widths, constraint.frequencies)
    phi = [[features.waves(rows).double() * features.height for rows in (codes[0], p)] for _, codes, p in right[:3]]
    rows = [codes.mean(0) - prior.mean(0) for codes, prior in phi]
    pairs = [rows[i] @ rows[j] for i in range(3) for j in range(3) if i != j]
    trace = torch.stack([trace_of_squared_covariance(prior) for _, prior in phi]).mean()
    expected = torch.stack(pairs).mean() / (trace * pair_variance(1000, 1000)).sqrt()
    torch.testing.assert_close(constraint.discrepancy.double(), expected, rtol=1e-4, atol=0)


def test_default_dtype_and_device_have_no_influence_on_a_constraint():
    found = []
    for dtype, device in ((torch.float32, "cpu"), (torch.float64, "meta")):
        data = [(cost, codes[None], prior) for cost, codes, prior in batches(6)]
        with made_by_default(dtype, device):
            constraint = observed(data)
            found.append((constraint.weight, constraint(data[0][0]), constraint.discrepancy))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
