"""Sliced and max-sliced Wasserstein distances, against POT and closed forms."""

import pytest
import torch
from references import codes_and_prior, seeded
from torch.nn.functional import normalize

from pyro_wae.penalties.sliced import MaxSlicedWasserstein, SlicedWasserstein, transport_along

BOTH = [SlicedWasserstein, MaxSlicedWasserstein]
SIZES = [(30, 30), (30, 60), (60, 30), (30, 41), (7, 3)]


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_sliced_is_that_of_pot_on_the_same_directions(n, m, p, ot):
    codes, prior = codes_and_prior(n, m)
    torch.manual_seed(3)
    directions = normalize(torch.empty(20, 4, dtype=torch.float64).normal_(), dim=-1)
    expected = ot.sliced_wasserstein_distance(codes.numpy(), prior.numpy(), projections=directions.mT.numpy(), p=p) ** p
    assert seeded(SlicedWasserstein(20, p=p), codes, prior).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("penalty", BOTH)
@pytest.mark.parametrize("p", [1, 1.5, 2])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_in_one_dimension_both_are_transport_on_the_line(penalty, n, m, p, ot):
    codes, prior = codes_and_prior(n, m, d=1)
    expected = ot.wasserstein_1d(codes[:, 0].numpy(), prior[:, 0].numpy(), p=p)
    assert penalty(p=p)(codes, prior).item() == pytest.approx(expected, rel=1e-10)


def test_a_shift_by_v_has_the_value_v_squared_over_d():
    # Null: the mean over directions of (t.v)^2 is |v|^2 / d; its standard error with 20000 directions is 0.013.
    _, prior = codes_and_prior(m=20, d=5)
    shift = torch.tensor([1.0, 2.0, 0.0, -1.0, 0.5], dtype=torch.float64)
    value = seeded(SlicedWasserstein(20_000), prior + shift, prior)
    assert value.item() == pytest.approx(shift.square().sum().item() / 5, abs=4 * 0.013)


def test_every_step_has_directions_of_its_own():
    codes, prior = codes_and_prior()
    penalty = SlicedWasserstein(2)
    assert penalty(codes, prior) != penalty(codes, prior)
    assert seeded(penalty, codes, prior) == seeded(penalty, codes, prior)


@pytest.mark.parametrize("penalty", BOTH)
def test_particles_are_compared_with_all_the_prior_draws_and_averaged(penalty):
    codes, prior = codes_and_prior(20, 40, d=1)
    particles = torch.stack([codes, 2 * codes, codes - 1])
    expected = torch.stack([penalty()(particle, prior) for particle in particles]).mean()
    assert penalty()(particles, prior).item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(6, 6), (6, 7)])
def test_max_sliced_gradients_are_finite_differences_along_the_direction_found(n, m, ot):
    codes, prior = codes_and_prior(n, m, d=3)
    penalty = MaxSlicedWasserstein()
    (slope,) = torch.autograd.grad(penalty(codes.requires_grad_(), prior), codes)

    def value(shifted):
        return ot.wasserstein_1d((shifted @ penalty.direction).numpy(), (prior @ penalty.direction).numpy(), p=2)

    codes, expected = codes.detach(), torch.empty_like(slope)
    for i in range(n):
        for j in range(3):
            step = torch.zeros_like(codes)
            step[i, j] = 1e-6
            expected[i, j] = (value(codes + step) - value(codes - step)) / 2e-6
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("penalty", BOTH)
def test_equal_samples_have_value_and_gradient_0(penalty):
    _, prior = codes_and_prior()
    for p in (1, 1.5, 2):
        codes = prior.clone().requires_grad_()
        value = penalty(p=p)(codes, prior)
        value.backward()
        assert value == 0
        assert (codes.grad == 0).all()


@pytest.mark.usefixtures("single_precision")
def test_float32_far_from_0_keeps_its_digits(ot):
    codes, prior = codes_and_prior()
    # Numbers that float32 holds exactly, so that only the arithmetic differs.
    codes, prior = (codes * 64).round() / 64 + 4096, (prior * 64).round() / 64 + 4096
    directions = normalize(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    expected = ot.sliced_wasserstein_distance(
        codes.numpy(), prior.numpy(), projections=directions.mT.double().numpy(), p=2
    )
    value = transport_along(directions, codes.float()[None], prior.float(), 2).mean()
    assert value.item() == pytest.approx(expected**2, rel=1e-5)


def test_max_sliced_finds_a_shift():
    # The maximum of |t.v|^2 over unit vectors is |v|^2, at v / |v|.
    _, prior = codes_and_prior(m=50, d=16)
    shift = torch.linspace(-1, 1, 16, dtype=torch.float64)
    penalty = MaxSlicedWasserstein()
    assert penalty(prior + shift, prior).item() == pytest.approx(shift.square().sum().item(), rel=1e-6)
    assert (penalty.direction @ shift).abs().item() == pytest.approx(shift.norm().item(), rel=1e-6)


@pytest.mark.parametrize("p", [1, 2])
def test_max_sliced_comes_near_the_best_of_all_angles_in_the_plane(p, ot):
    codes, prior = codes_and_prior(n=50, m=70, d=2)
    angles = torch.linspace(0, torch.pi, 2000, dtype=torch.float64)
    projections = torch.stack([angles.cos(), angles.sin()]).numpy()
    best = ot.max_sliced_wasserstein_distance(codes.numpy(), prior.numpy(), projections=projections, p=p) ** p
    value = seeded(MaxSlicedWasserstein(40, p=p), codes, prior).item()
    assert best * 0.999 < value < best * 1.001


def test_max_sliced_sees_a_change_of_shape_better_than_many_random_directions(ot):
    torch.manual_seed(8)
    prior = torch.randn(300, 20, dtype=torch.float64)
    codes = torch.randn(300, 20, dtype=torch.float64)
    codes[:, 3] *= 3
    bound = ot.max_sliced_wasserstein_distance(codes.numpy(), prior.numpy(), n_projections=2000, seed=0) ** 2
    assert MaxSlicedWasserstein()(codes, prior).item() > 2 * bound


@pytest.mark.usefixtures("single_precision")
def test_max_sliced_gets_better_from_step_to_step():
    # Codes that differ in the spread of one of 60 coordinates, so that the means show nothing; fresh batches, seed 2.
    torch.manual_seed(2)
    warm = MaxSlicedWasserstein(steps=1, restarts=1)
    alignment = []
    for _ in range(30):
        codes, prior = torch.randn(2, 200, 60)
        codes[:, 3] *= 3
        for penalty in (warm, MaxSlicedWasserstein(steps=1, restarts=1)):
            penalty(codes - codes.mean(0), prior - prior.mean(0))
            alignment.append(penalty.direction[3].abs())
    warm_alignment, cold_alignment = torch.stack(alignment).unflatten(0, (-1, 2))[10:].mean(0)
    assert warm_alignment > 0.9
    assert cold_alignment < 0.75


def test_max_sliced_keeps_nothing_of_a_step_without_gradients():
    codes, prior = codes_and_prior()
    penalty = MaxSlicedWasserstein()
    with torch.no_grad():
        penalty(codes, prior)
    assert penalty.direction.shape == (0,)
    penalty(codes, prior)
    kept = penalty.direction
    assert kept.norm().item() == pytest.approx(1)
    assert not kept.requires_grad
    with torch.no_grad():
        penalty(-2 * codes, prior)
    assert torch.equal(penalty.direction, kept)


def test_max_sliced_starts_afresh_for_codes_of_another_size():
    codes, prior = codes_and_prior()
    penalty = MaxSlicedWasserstein()
    penalty(codes, prior)
    assert penalty(codes[:, :2], prior[:, :2]).isfinite()


def test_max_sliced_recovers_from_a_step_of_nan():
    codes, prior = codes_and_prior()
    penalty = MaxSlicedWasserstein()
    assert penalty(codes * torch.nan, prior).isnan()
    assert penalty(codes, prior).isfinite()
