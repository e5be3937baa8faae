"""What every penalty keeps to, whatever it computes."""

from __future__ import annotations

import copy
import math
import pickle
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from adversaries import adam
from penalty_cases import CASES, VARIANTS, D, every_case, zeroed
from programs import AutoEncoder, delta
from pyro.infer import SVI
from references import made_by_default
from torch import nn
from torch.nn.functional import normalize

from pyro_wae import WAELoss
from pyro_wae.kernels import Gaussian, Laplace, MultiScale
from pyro_wae.penalties import (
    MMD,
    Chain,
    CramerWold,
    EnergyDistance,
    JensenShannon,
    KernelStein,
    LogVarianceL1,
    MaxSlicedWasserstein,
    PenaltyContext,
    Sinkhorn,
    SlicedWasserstein,
    SphericalSlicedWasserstein,
    SumPenalty,
    UnitVarianceKL,
)

# The estimate


@every_case
def test_null_has_the_documented_mean_and_off_the_null_it_is_larger(case):
    """Null: Q_Z = P_Z, n = m = 100; 60 batches, 4 standard errors and the last digit of the documented bias; seed 0."""
    penalty = case.fitted()
    with torch.no_grad():
        null = torch.stack([penalty(case.rows(100), case.rows(100)) for _ in range(60)])
    slack = 0.06 * case.bias
    error = 4 * null.std() / math.sqrt(60)
    assert abs(null.mean() - case.bias) <= error + slack + 1e-12
    if isinstance(penalty, JensenShannon):  # which knows nothing yet
        own = adam(penalty.parameters())
        for _ in range(50):
            own.zero_grad()
            penalty(case.elsewhere(100), case.rows(100)).backward()
            own.step()
    with torch.no_grad():
        off = torch.stack([penalty(case.elsewhere(100), case.rows(100)) for _ in range(10)])
    assert off.min() > 0
    assert off.min() > null.max()


@every_case
def test_the_gradient_reaches_the_codes_and_a_fixed_prior_stays_out_of_the_graph(case):
    penalty = case.fitted()
    codes, prior = case.elsewhere(20).requires_grad_(), case.rows(30)
    value = penalty(codes, prior)
    found, nodes, seen = set(), [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        nodes += [parent for parent, _ in node.next_functions]
    assert found == {codes, *penalty.parameters()}
    value.backward()
    assert codes.grad.isfinite().all()
    if not isinstance(penalty, JensenShannon):
        assert codes.grad.abs().sum(1).min() > 0
    assert prior.grad is None


@every_case
def test_a_prior_that_learns_gets_its_gradient(case):
    penalty, prior = case.fitted(), case.rows(30).requires_grad_()
    value = penalty(case.elsewhere(20), prior)
    if not case.reads_prior:
        assert not value.requires_grad
        return
    if isinstance(penalty, JensenShannon):
        nn.init.normal_(penalty.discriminator[2].weight)
        value = penalty(case.elsewhere(20), prior)
    value.backward()
    assert prior.grad.isfinite().all()
    assert prior.grad.abs().max() > 0


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_compared_as_the_same_numbers_in_float32(case, dtype):
    codes, prior = case.elsewhere(40).to(dtype), case.rows(50).to(dtype)
    values = []
    for autocast, given in ((True, dtype), (False, torch.float32)):
        penalty = case.fitted().float()
        pyro.set_rng_seed(5)
        rows = codes.detach().to(given, copy=True).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = penalty(rows, prior.to(given))
        value.backward()
        values.append(value.detach())
        assert rows.grad.dtype == given
    assert values[0].dtype == torch.float32
    assert torch.equal(*values)


@every_case
def test_a_step_down_the_gradient_lowers_it(case):
    penalty, codes, prior = case.fitted(), case.elsewhere(40).requires_grad_(), case.rows(40)
    if isinstance(penalty, JensenShannon):
        nn.init.normal_(penalty.discriminator[2].weight)
    values = []
    for _ in range(2):
        pyro.set_rng_seed(5)
        values.append(penalty(codes, prior))
        (slope,) = torch.autograd.grad(values[-1], codes)
        moved = codes - 1e-3 * slope / slope.square().mean().sqrt()
        codes = (normalize(moved, dim=-1) if case.sphere else moved).detach().requires_grad_()
    assert values[1] < values[0]


@every_case
@pytest.mark.parametrize(("n", "m"), [(20, 20), (20, 33), (33, 20)])
def test_the_order_of_rows_does_not_matter(case, n, m):
    penalty, codes, prior = case.fitted(), case.elsewhere(n), case.rows(m)
    values = []
    for order_q, order_p in ((torch.arange(n), torch.arange(m)), (torch.randperm(n), torch.randperm(m))):
        pyro.set_rng_seed(7)
        with torch.no_grad():
            values.append(penalty(codes[order_q], prior[order_p]))
    assert values[0].shape == ()
    torch.testing.assert_close(*values, rtol=1e-7, atol=1e-12)


@every_case
def test_one_particle_is_a_code_and_several_are_averaged_over(case):
    penalty, codes, prior = case.fitted(), case.elsewhere(20), case.rows(60)
    values = []
    for shaped in (codes, codes[None], codes.expand(3, 20, D)):
        pyro.set_rng_seed(7)
        with torch.no_grad():
            values.append(penalty(shaped, prior).item())
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    assert math.isfinite(values[2])
    assert 0.5 * values[0] <= values[2] + 1e-12
    assert values[2] <= 2 * values[0] + 1e-12


@every_case
def test_float32_agrees_with_float64(case):
    codes, prior, found = case.elsewhere(30), case.rows(40), []
    wide, narrow = case.fitted(), case.make()
    narrow.load_state_dict(wide.state_dict())
    if list(narrow.parameters()):
        narrow.float()
    for penalty, dtype in ((wide, torch.float64), (narrow, torch.float32)):
        z = codes.detach().clone().to(dtype).requires_grad_()
        value = penalty(z, prior.to(dtype))
        value.backward()
        assert value.dtype == z.grad.dtype == dtype
        assert z.grad.isfinite().all()
        found.append((value.detach().double(), z.grad.double()))
    # Directions are drawn in the precision of the codes, and differ.
    if not isinstance(wide, SlicedWasserstein | MaxSlicedWasserstein | SphericalSlicedWasserstein | SumPenalty):
        (value, gradient), (value_32, gradient_32) = found
        torch.testing.assert_close(value_32, value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient_32, gradient, rtol=1e-2, atol=1e-4 * float(gradient.abs().max()))


# Those of a matching or a player that is held fixed are tested in their own files.
DIFFERENTIATED = [
    *(pytest.param(case, 4, 5, id=name) for name, case in CASES.items() if case.exact),
    *(pytest.param(case, 4, m, id=f"{name}, 4 and {m}") for name, case in VARIANTS.items() for m in (4, 5, 8)),
]


@pytest.mark.parametrize(("case", "n", "m"), DIFFERENTIATED)
def test_gradients_by_codes_and_prior_agree_with_finite_differences(case, n, m):
    penalty, prior = case.fitted(), case.rows(m, d=3).requires_grad_(case.reads_prior)

    def value(*rows):
        pyro.set_rng_seed(7)
        return penalty(*(normalize(z, dim=-1) if case.sphere else z for z in rows))

    assert torch.autograd.gradcheck(value, (case.elsewhere(n, d=3).requires_grad_(), prior))


@every_case
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_first_call_without_gradients_has_the_same_value_and_leaves_all_as_it_was(case, mode):
    penalty, codes, prior, values = case.make().double(), case.elsewhere(20).requires_grad_(), case.rows(30), []
    for context in (mode, nullcontext):
        pyro.set_rng_seed(7)
        with context():
            values.append(penalty(codes, prior))
            assert torch.is_grad_enabled() == (context is nullcontext)
    assert not values[0].requires_grad
    torch.testing.assert_close(values[0].clone(), values[1], rtol=1e-10, atol=1e-13)
    values[1].backward()
    assert codes.grad.isfinite().all()


@every_case
def test_what_the_first_prior_draws_decide_stays(case):
    penalty = case.fitted()
    kept = {name: value.clone() for name, value in tensors(penalty)}
    with torch.no_grad():
        penalty(case.elsewhere(20), case.rows(30) * (1 if case.sphere else 9))
    torch.testing.assert_close(dict(tensors(penalty)), kept, rtol=0, atol=0)


def tensors(penalty):
    return [(name, value) for name, value in penalty.state_dict().items() if isinstance(value, torch.Tensor)]


@every_case
def test_gradients_stay_finite_where_codes_coincide(case):
    penalty, prior = case.fitted(), case.rows(8)
    codes = torch.cat([prior[:2].repeat(3, 1), case.elsewhere(4)]).requires_grad_()
    penalty(codes, prior).backward()
    assert codes.grad.isfinite().all()


# Bad numbers and other defaults


@every_case
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["codes", "prior"])
def test_a_batch_that_is_not_finite_shows_in_the_value_and_leaves_nothing_behind(case, bad, where):
    penalty, codes, prior = trained_by_itself(case), case.elsewhere(20), case.rows(30)
    expected = penalty_of(penalty, codes, prior)
    if where == "prior" and not case.reads_prior:
        return
    rows = {"codes": codes.clone(), "prior": prior.clone()}
    rows[where][3, 1] = bad
    try:
        assert not penalty(rows["codes"].requires_grad_(), rows["prior"]).isfinite()
    except ValueError as error:
        assert "found" in str(error)  # noqa: PT017 - some refuse it by name
    assert all(value.isfinite().all() for _, value in tensors(penalty))
    assert penalty_of(penalty, codes, prior) == expected


def trained_by_itself(case):
    penalty = JensenShannon(zeroed().double(), optimizer=adam) if case is CASES["JensenShannon"] else case.fitted()
    penalty(case.elsewhere(20), case.rows(30))
    return penalty


def penalty_of(penalty, codes, prior):
    pyro.set_rng_seed(4)
    with torch.no_grad():
        return penalty(codes, prior).item()


@every_case
def test_default_dtype_and_device_have_no_influence(case):
    codes, prior, values = case.elsewhere(20, torch.float32), case.rows(30, torch.float32), []
    for dtype, device in ((torch.float32, "cpu"), (torch.float64, "meta")):
        penalty = case.make().float() if list(case.make().parameters()) else None
        # geomloss makes tensors on the default device
        with made_by_default(dtype, device if case is not CASES["Sinkhorn"] else "cpu"):
            pyro.set_rng_seed(4)
            values.append((penalty or case.make())(codes, prior))
    assert values[0].dtype == values[1].dtype == torch.float32
    assert torch.equal(*values)


def test_the_default_discriminator_is_made_in_the_codes_dtype_and_device():
    codes, prior, values = torch.ones(5, 2).float(), torch.zeros(6, 2).float(), []
    for dtype, device in ((torch.float32, "cpu"), (torch.float64, "meta")):
        with made_by_default(dtype, device):
            pyro.set_rng_seed(4)
            values.append(JensenShannon()(codes, prior))
    torch.testing.assert_close(*values)


# Conditions and sites


def test_who_accepts_a_condition_says_so():
    assert MMD().accepts_condition
    assert not KernelStein().accepts_condition
    assert not Chain().accepts_condition
    assert not any(part.accepts_condition for part in (MMD() + Chain()).modules() if isinstance(part, Chain))


@pytest.mark.parametrize(
    "penalty", [KernelStein(), MMD() + KernelStein(), 2.0 * Chain(step_size=1), Chain(step_size=D)]
)
def test_a_condition_is_refused_by_who_accepts_none(penalty):
    codes, normal = torch.randn(20, D), dist.Normal(torch.zeros(D), 1.0).to_event(1)
    context = PenaltyContext(condition=torch.randn(20, 1), prior=lambda: normal, prior_log_prob=normal.log_prob)
    with pytest.raises(ValueError, match=r"(KernelStein|Chain) accepts no condition.*such as MMD\(\)"):
        penalty(codes, torch.randn(20, D), context)


def test_fit_reaches_every_part_that_has_a_length():
    prior = 2 * torch.randn(50, D)
    parts = [MMD(Gaussian()), Sinkhorn(), MMD(Gaussian())]
    (parts[0] + 0.1 * (parts[1] + EnergyDistance())).fit(prior)
    Chain(parts[2]).fit(prior)
    expected = prior.double().var(0).sum().item()
    assert [part.kernel.squared_length.item() for part in (parts[0], parts[2])] == pytest.approx([expected] * 2)
    assert parts[1].spread.item() == pytest.approx((2 * expected) ** 0.5)


def test_sites_reach_a_chain_within_a_sum():
    penalty = 0.5 * (MMD() + Chain(JensenShannon()))
    penalty.prepare_sites(torch.zeros(1, 4, 6), {"z1": slice(0, 2), "z2": slice(2, 4), "z3": slice(4, 6)})
    (first, *_) = penalty.parameters()
    assert first.shape == (256, 4)


# State and text


@every_case
@pytest.mark.parametrize("copied", ["state_dict", "deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_penalty_does(case, copied):
    penalty, codes, prior = case.fitted(), case.elsewhere(20), 2 * case.rows(30)
    if case.sphere:
        prior = case.rows(30)
    other = case.make() if copied == "state_dict" else None
    if copied == "state_dict":
        other.to(torch.float64).load_state_dict(penalty.state_dict())
    elif copied == "deepcopy":
        other = copy.deepcopy(penalty)
    else:
        other = pickle.loads(pickle.dumps(penalty))
    values = []
    for one in (penalty, other):
        pyro.set_rng_seed(3)
        values.append(one(codes, prior).detach())
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-13)


@every_case
def test_repr_is_the_call_that_makes_it(case):
    penalty = case.make()
    text = repr(penalty)
    assert "object at" not in text or not case.written
    if case.written:
        again = eval(text, {"Laplace": Laplace, "MultiScale": MultiScale} | globals())
        assert repr(again) == text
        assert type(again) is type(penalty)
    else:
        assert type(penalty).__name__ in text


# Training


def make_net(sphere):
    """Linear nets, with codes off the prior's centre."""
    prior = (lambda x: dist.ProjectedNormal(x.new_zeros(D))) if sphere else None
    net = AutoEncoder(10, D, prior=prior, code=lambda z: delta(normalize(z, dim=-1) if sphere else z))
    nn.init.constant_(net.encoder.bias, 1.5)
    return net


def trainable(case):
    """The penalty as a user would train it."""
    if case is CASES["JensenShannon"]:
        return JensenShannon(zeroed(), optimizer=adam)
    return case.make()


def distance(net, case):
    """How far the codes' mean is from the prior's, 0; what each penalty lowers."""
    x = torch.randn(500, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z = net.encoder(x)
        return (normalize(z, dim=-1) if case.sphere else z).mean(0).norm().item()


def by_svi(loss, net):
    return SVI(net.model, net.guide, pyro.optim.Adam({"lr": 3e-2}), loss=loss).step


def by_torch(loss, net):
    loss_fn = loss(net.model, net.guide)
    optimiser = torch.optim.Adam(loss_fn.parameters(), lr=3e-2)

    def step(x):
        optimiser.zero_grad()
        value = loss_fn(x)
        value.backward()
        optimiser.step()
        return value.item()

    return step


@every_case
@pytest.mark.parametrize("route", [by_svi, by_torch])
def test_it_trains_the_encoder(case, route):
    net = make_net(case.sphere)
    loss = WAELoss(trainable(case), cost=lambda x, g: 0 * g.sum(-1), penalty_weight=100.0)
    before, step = distance(net, case), route(loss, net)
    for _ in range(60):
        assert math.isfinite(step(torch.randn(64, 10)))
    assert distance(net, case) < 0.6 * before


@pytest.mark.parametrize(
    ("case", "make"),
    [
        *(pytest.param(case, lambda case=case: trainable(case), id=name) for name, case in CASES.items()),
        pytest.param(CASES["JensenShannon"], CASES["JensenShannon"].make, id="JensenShannon, one optimiser"),
    ],
)
def test_distributed_data_parallel_trains_as_the_module_alone(case, make, one_rank):
    penalty = make()
    net = make_net(case.sphere)
    losses = []
    for wrap in (nn.parallel.DistributedDataParallel, lambda module: module):
        own, own_penalty = copy.deepcopy(net), copy.deepcopy(penalty)
        loss_fn = wrap(WAELoss(own_penalty)(own.model, own.guide))
        optimiser = torch.optim.SGD(loss_fn.parameters(), lr=1e-3)
        pyro.set_rng_seed(4)
        values = []
        for _ in range(3):
            optimiser.zero_grad()
            value = loss_fn(torch.randn(32, 10))
            value.backward()
            optimiser.step()
            values.append(value.item())
        losses.append([*values, own.encoder.weight.sum().item(), *(p.sum().item() for p in own_penalty.parameters())])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# Sums, multiples and sites


def test_a_sum_is_the_sum_and_a_multiple_the_multiple():
    codes, prior = torch.randn(20, D), torch.randn(30, D)
    parts = [MMD(Gaussian(1.0)), EnergyDistance(), CramerWold(0.1)]
    values = [part(codes, prior) for part in parts]
    torch.testing.assert_close(
        (parts[0] + parts[1] + 0.3 * parts[2])(codes, prior), values[0] + values[1] + 0.3 * values[2]
    )
    torch.testing.assert_close((parts[0] * 2)(codes, prior), 2 * values[0])
    torch.testing.assert_close((0.5 * (parts[0] + parts[1]))(codes, prior), (values[0] + values[1]) / 2)
    assert (0 * parts[0])(codes, prior) == 0


def test_a_sum_hands_on_the_context_and_builds_what_its_parts_need():
    context = PenaltyContext(prior=lambda: dist.Normal(torch.zeros(D), 1).to_event(1))
    codes, prior = torch.randn(20, D), torch.randn(30, D)
    part = MMD(Gaussian(1.0))
    both = part + 0.1 * JensenShannon()
    value = both(codes, prior, context)
    assert value.isfinite()
    torch.testing.assert_close((part + part)(codes, prior, context), 2 * part(codes, prior, context))
    assert part(codes, prior, context) != part(codes, prior)
    assert not any(nn.parameter.is_lazy(parameter) for parameter in both.parameters())


def test_a_sum_needs_draws_if_a_part_does():
    assert (MMD() + LogVarianceL1()).needs_prior_draws
    assert not (KernelStein() + UnitVarianceKL()).needs_prior_draws
    assert not (0.1 * KernelStein()).needs_prior_draws
    assert (0.1 * MMD()).needs_prior_draws


def test_prior_draws_are_required_by_those_that_read_them():
    for case in CASES.values():
        penalty, codes = case.make().double(), case.rows(20)
        if case.reads_prior:
            with pytest.raises(ValueError, match=r"compares codes with prior samples, found none\. Write penalty\("):
                penalty(codes)
        else:
            assert penalty(codes).isfinite()
