"""The sliced Wasserstein distance on the sphere, against POT, exact transport and closed forms."""

import math

import numpy as np
import pytest
import torch
from references import seeded
from torch.nn.functional import normalize

from pyro_wae.penalties.spherical import SphericalSlicedWasserstein, transport_on_circle

SIZES = [(30, 30), (30, 60), (60, 30), (30, 41), (7, 3)]


def pair(n=30, m=41, d=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(n, d, generator=generator, dtype=torch.float64)
    codes[:, 0] += 1
    prior = torch.randn(m, d, generator=generator, dtype=torch.float64)
    return normalize(codes, dim=-1).to(dtype), normalize(prior, dim=-1).to(dtype)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_transport_on_the_circle_is_exact(n, m, p, ot):
    # Oracle: the linear programme on the table of arc lengths.
    generator = np.random.default_rng(0)
    for spread in (0.01, 0.2, 1.0):
        x, y = (generator.normal(0.4, spread, n) % 1, generator.normal(0.9, 0.3, m) % 1)
        gap = np.abs(x[:, None] - y)
        expected = ot.emd2([], [], np.minimum(gap, 1 - gap) ** p)
        value = transport_on_circle(torch.tensor(x) - 0.5, torch.tensor(y) - 0.5, p)
        assert value.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_it_is_that_of_pot_on_the_same_circles(n, m, p, ot):
    codes, prior = pair(n, m)
    torch.manual_seed(3)
    frames = torch.linalg.qr(torch.empty(20, 4, 2, dtype=torch.float64).normal_()).Q
    log = ot.sliced_wasserstein_sphere(
        codes.numpy(), prior.numpy(), p=p, projections=frames.numpy(), n_projections=20, log=True
    )[1]
    # POT searches to 1e-6 in the shift, from above.
    value = seeded(SphericalSlicedWasserstein(20, p=p), codes, prior)
    assert value.item() == pytest.approx(log["projected_emds"].mean(), rel=1e-4)


def test_a_rotation_of_a_narrow_set_costs_its_angle_in_turns():
    # In the plane every frame is the whole circle; no shorter way exists for points within a small arc.
    angle = torch.linspace(0, 0.3, 9, dtype=torch.float64) + math.pi - 0.1
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    turned = torch.stack([(angle + 0.5).cos(), (angle + 0.5).sin()], -1)
    assert SphericalSlicedWasserstein(4)(turned, circle).item() == pytest.approx((0.5 / math.tau) ** 2, rel=1e-9)
    assert SphericalSlicedWasserstein(4, p=1)(turned, circle).item() == pytest.approx(0.5 / math.tau, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_float32_gives_what_float64_gives(n, m):
    codes, prior = pair(n, m)
    torch.manual_seed(0)
    # Random numbers differ between the two precisions; in the plane all frames give one value.
    codes, prior = normalize(codes[:, :2], dim=-1), normalize(prior[:, :2], dim=-1)
    value = SphericalSlicedWasserstein(3)(codes.float(), prior.float())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(SphericalSlicedWasserstein(3)(codes, prior).item(), rel=1e-5)


def test_particles_are_compared_with_all_the_prior_draws_and_averaged():
    codes, prior = pair(20, 40, d=2)
    particles = torch.stack([codes, -codes, codes.flip(-1)])
    penalty = SphericalSlicedWasserstein(3)
    expected = torch.stack([penalty(particle, prior) for particle in particles]).mean()
    assert penalty(particles, prior).item() == pytest.approx(expected.item(), rel=1e-10)


def test_codes_off_the_sphere_are_refused_at_every_call():
    codes, prior = pair()
    penalty = SphericalSlicedWasserstein()
    penalty(codes, prior)
    off = codes.clone()
    off[3] *= 1.01
    with pytest.raises(ValueError, match=r"found codes of norm 1\.01 .* codes / codes\.norm\(dim=-1, keepdim=True\)"):
        penalty(off, prior)
    penalty(codes * 1.0005, prior)
    with pytest.raises(ValueError, match=r"found prior samples of norm 2 .* dist\.ProjectedNormal"):
        penalty(codes, prior * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_code_in_bfloat16_alone_may_be_off_by_what_that_rounds(dtype):
    penalty, (codes, prior) = SphericalSlicedWasserstein(), pair(dtype=dtype)
    coarse = codes.bfloat16().to(dtype)
    assert (coarse.norm(dim=-1) - 1).abs().max() > 1e-3
    penalty(coarse, prior)
    with pytest.raises(ValueError, match=r"found codes of norm 1\.004 "):
        penalty(1.004 * codes, prior)
    with pytest.raises(ValueError, match="found codes of norm"):
        penalty((1.01 * codes).bfloat16().to(dtype), prior)


def test_where_norms_are_not_read_back_a_code_off_the_sphere_gives_nan(monkeypatch):
    # An accelerator's second call, played on the CPU: the check finds the codes off the sphere and does not raise.
    penalty = SphericalSlicedWasserstein()
    assert penalty(*pair()).isfinite()
    monkeypatch.setattr(penalty, "_check_norms", lambda codes, prior: torch.tensor(False))
    assert penalty(*pair()).isnan()


def test_nan_passes_the_check_so_that_the_loss_can_name_its_site():
    codes, prior = pair()
    codes[0] = torch.nan
    assert SphericalSlicedWasserstein()(codes, prior).isnan()


def test_codes_on_a_line_are_refused():
    with pytest.raises(ValueError, match=r"needs d >= 2, found d = 1. Write SlicedWasserstein\(\)"):
        SphericalSlicedWasserstein()(torch.ones(3, 1), torch.ones(3, 1))
