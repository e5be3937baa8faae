"""The Sinkhorn divergence, against POT's exact transport and closed forms."""

import builtins

import pytest
import torch
from references import codes_and_prior

from pyro_wae.penalties.sinkhorn import Sinkhorn

pytest.importorskip("geomloss")
ot = pytest.importorskip("ot")


def exact(codes, prior, p):
    metric = {1: "euclidean", 2: "sqeuclidean"}[p]
    return ot.emd2([], [], ot.dist(codes.detach().numpy(), prior.detach().numpy(), metric))


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(("n", "m", "d"), [(30, 30, 3), (30, 41, 3), (40, 25, 1), (30, 30, 8)])
def test_it_goes_to_exact_transport_as_the_blur_goes_to_0(n, m, d, p, debias):
    codes, prior = codes_and_prior(n, m, d)
    value = Sinkhorn(p, blur={1: 0.001, 2: 0.01}[p], scaling=0.98, debias=debias)(codes, prior)
    assert value.item() == pytest.approx(exact(codes, prior, p), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("blur", [None, 0.1, 3.0])
def test_a_shift_by_v_has_the_value_v_squared(blur, dtype):
    _, prior = codes_and_prior(d=3, dtype=dtype)
    shift = torch.tensor([100.0, -20.0, 3.0], dtype=dtype)
    assert Sinkhorn(blur=blur)(prior + shift, prior).item() == pytest.approx(shift.square().sum().item(), rel=1e-5)


def test_the_iterations_do_not_depend_on_the_last_digits_of_the_spread():
    codes, prior = codes_and_prior()
    values = [Sinkhorn()(unit * codes, unit * prior).item() / unit**2 for unit in (1 + i / 20 for i in range(20))]
    assert max(values) - min(values) < 1e-6 * values[0]


@pytest.mark.parametrize("scaling", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("blur", [None, 0.5, 0.8, 1.1, 1.5, 1.9, 2.3, 20.0])
def test_the_default_number_of_iterations_is_enough_at_any_blur(blur, scaling):
    codes, prior = codes_and_prior()
    right = Sinkhorn(blur=blur, scaling=0.99)(codes, prior).item()
    assert Sinkhorn(blur=blur, scaling=scaling)(codes, prior).item() == pytest.approx(right, rel=0.03)


def means_apart(codes, prior):
    return (codes.mean(0) - prior.mean(0)).square().sum()


def independent_coupling(codes, prior):
    return torch.cdist(codes, prior).square().mean()


def half_energy_distance(codes, prior):
    mean = {pair: torch.cdist(*pair).mean() for pair in ((codes, prior), (codes, codes), (prior, prior))}
    return mean[codes, prior] - mean[codes, codes] / 2 - mean[prior, prior] / 2


@pytest.mark.parametrize(
    ("penalty", "limit"),
    [
        (lambda: Sinkhorn(blur=1e3), means_apart),
        (lambda: Sinkhorn(blur=1e3, debias=False), independent_coupling),
        (lambda: Sinkhorn(1, blur=1e4), half_energy_distance),
    ],
)
def test_for_large_blur_it_goes_to_its_limit(penalty, limit):
    codes, prior = codes_and_prior()
    assert penalty()(codes, prior).item() == pytest.approx(limit(codes, prior).item(), rel=1e-3)


def test_equal_samples_have_value_and_gradient_0_and_others_more():
    codes, prior = codes_and_prior()
    same = prior.clone().requires_grad_()
    value = Sinkhorn()(same, prior[torch.randperm(41)])
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert same.grad.abs().max() < 1e-12
    assert Sinkhorn()(codes, prior) > 0.5


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("m", [6, 7])
def test_gradients_are_finite_differences(m, p, debias):
    # geomloss's gradient is that of the converged value, so the descent is slow here; 3 random ways, seed 0.
    codes, prior = codes_and_prior(6, m)
    penalty = Sinkhorn(p, blur=2.0, scaling=0.98, debias=debias)
    penalty.fit(prior)
    slopes = torch.autograd.grad(penalty(codes.requires_grad_(), prior.requires_grad_()), (codes, prior))
    torch.manual_seed(0)
    for _ in range(3):
        ways = torch.randn_like(codes), torch.randn_like(prior)
        with torch.no_grad():
            ends = [penalty(codes + e * ways[0], prior + e * ways[1]).item() for e in (1e-4, -1e-4)]
        along = sum((slope * way).sum().item() for slope, way in zip(slopes, ways, strict=True))
        assert along == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=2e-3, abs=5e-3)


def test_far_codes_are_called_back_though_the_descent_starts_at_the_priors_size():
    # Null: the gradient is 2 (z - matched prior draw) / n, which for codes 1000 times too wide is nearly 2 z / n.
    codes, prior = codes_and_prior(dtype=torch.float32)
    codes = (1000 * (codes - codes.mean(0))).requires_grad_()
    Sinkhorn()(codes, prior).backward()
    assert torch.cosine_similarity(codes.grad.flatten(), codes.detach().flatten(), 0) > 0.999


def test_float32_far_from_0_keeps_its_digits():
    codes, prior = codes_and_prior()
    codes, prior = (codes * 64).round() / 64 + 4096, (prior * 64).round() / 64 + 4096
    for p in (1, 2):
        value = Sinkhorn(p)(codes.float(), prior.float())
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(Sinkhorn(p)(codes, prior).item(), rel=1e-3)


@pytest.mark.parametrize("d", [8, 64])
def test_the_default_blur_keeps_the_direction_of_the_gradient(d):
    # Null: cosines of 0.83 (d = 8) and 0.54 (d = 64) with the gradient between N(0, I) and codes with one coordinate
    # shifted by 1, one narrowed to 0.5 and one widened to 1.5; mean of 8 batches of n = m = 100, seed 0.
    torch.manual_seed(0)

    def cosine(penalty):
        u, prior = torch.randn(2, 100, d)
        codes, expected = u.clone(), torch.zeros(100, d)
        codes[:, 0] += 1
        codes[:, 1] *= 0.5
        codes[:, 2] *= 1.5
        expected[:, 0], expected[:, 1], expected[:, 2] = 1, -0.5 * u[:, 1], 0.5 * u[:, 2]
        penalty(codes.requires_grad_(), prior).backward()
        return torch.cosine_similarity(codes.grad.flatten(), expected.flatten(), 0).item()

    default = sum(cosine(Sinkhorn()) for _ in range(8)) / 8
    assert default == pytest.approx({8: 0.83, 64: 0.54}[d], abs=0.04)
    assert default > 1.5 * sum(cosine(Sinkhorn(blur=0.05)) for _ in range(8)) / 8


def test_each_particle_is_compared_with_its_share_of_the_prior_draws():
    codes, prior = codes_and_prior(20, 60)
    particles = torch.stack([codes, 2 * codes, codes - 1])
    penalty = Sinkhorn(blur=1.0)
    penalty.fit(prior)
    parts = [penalty(particle, share) for particle, share in zip(particles, prior.chunk(3), strict=True)]
    assert penalty(particles, prior).item() == pytest.approx(sum(parts).item() / 3, rel=1e-10)
    whole = [penalty(particle, prior[:59]) for particle in particles]
    assert penalty(particles, prior[:59]).item() == pytest.approx(sum(whole).item() / 3, rel=1e-10)


def test_the_blur_is_taken_once_from_the_prior_and_kept():
    codes, prior = codes_and_prior()
    penalty = Sinkhorn()
    penalty(100 * codes, prior)
    squares = torch.cdist(prior, prior).square().sum() / (41 * 40)
    assert penalty.spread.item() == pytest.approx(squares.sqrt().item(), rel=1e-12)
    value = penalty(codes, 10 * prior)
    # Half the spread, given as a number, is the same penalty.
    given = Sinkhorn(blur=0.5 * penalty.spread.item())
    given.fit(prior)
    assert given(codes, 10 * prior).item() == pytest.approx(value.item(), rel=1e-12)


def test_a_prior_without_spread_gives_no_blur():
    codes, _ = codes_and_prior(d=3)
    prior = torch.ones(5, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"spread .* of 0, .* Sinkhorn\(blur=1.0\)"):
        Sinkhorn()(codes, prior)
    # Against one point there is one coupling.
    value = Sinkhorn(blur=0.01, scaling=0.9)(codes, prior)
    assert value.item() == pytest.approx((codes - 1).square().sum(1).mean().item(), rel=1e-2)
    with pytest.raises(ValueError, match=r"spread .* of nan"):
        Sinkhorn(blur=1.0)(codes, prior * torch.nan)


def test_without_geomloss_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("geomloss"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'Run: pip install "pyro-wae\[sinkhorn\]"'):
        Sinkhorn()


@pytest.mark.parametrize("p", [1, 2])
def test_a_second_derivative_which_geomloss_has_not_is_refused(p):
    codes, prior = codes_and_prior(20, 20, 2)
    value = Sinkhorn(p)(codes.requires_grad_(), prior)
    torch.autograd.grad(value, codes, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*create_graph=True.*MMD"):
        torch.autograd.grad(value, codes, create_graph=True)


def test_a_transform_of_torch_takes_the_first_derivative():
    codes, prior = codes_and_prior(20, 20, 2)
    found = torch.func.grad(lambda codes: Sinkhorn(blur=0.5)(codes, prior))(codes)
    (expected,) = torch.autograd.grad(Sinkhorn(blur=0.5)(codes.requires_grad_(), prior), codes)
    torch.testing.assert_close(found, expected)
