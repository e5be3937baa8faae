"""A mixture of Normals whose draws have a gradient for weights, locations and scales."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from learned_priors import mixture

SEED = 3


LOGITS = [0.2, -0.3, 0.5]
LOCS = [[1.0, 1.5, 0.5], [2.0, 0.5, 1.0], [0.0, 1.3, 0.7]]
DIRECTION = [0.7, -0.4, 0.5]


def mixture_parameters(kind):
    """Logits, locations and scales or Cholesky factors of three components, off the origin."""
    tril = torch.tensor([[0.5, 1.0, 0.7], [0.8, 0.4, 0.9], [1.2, 0.7, 0.6]]).double()
    if kind == "full":
        tril = tril.diag_embed() + torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [-0.3, 0.4, 0]]).double()
    parameters = [torch.tensor(LOGITS).double(), torch.tensor(LOCS).double(), tril]
    return [parameter.requires_grad_() for parameter in parameters]


def mean_cosine(logits, locs, tril):
    """E cos(t z), which is sum_k pi_k cos(t mu_k) exp(-t' S_k t / 2)."""
    t = torch.tensor(DIRECTION).double()
    square = (tril.mT @ t).square().sum(-1) if tril.ndim > locs.ndim else tril.square() @ t.square()
    return (logits.softmax(-1) * torch.cos(locs @ t) * torch.exp(-square / 2)).sum()


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_gradient_through_draws_is_that_of_their_mean(kind):
    """Against the closed form of E cos(t z): 100,000 draws in 50 parts, 5 standard errors, seed 3."""
    parameters = mixture_parameters(kind)
    expected = torch.autograd.grad(mean_cosine(*parameters), parameters)
    t = torch.tensor(DIRECTION).double()
    found = [
        torch.autograd.grad(torch.cos(mixture(*parameters).rsample((2000,)) @ t).mean(), parameters) for _ in range(50)
    ]
    for truth, *parts in zip(expected, *found, strict=True):
        parts = torch.stack(parts)
        error = parts.std(0) / math.sqrt(len(parts))
        if kind == "full" and truth.ndim == 3:
            truth, parts, error = truth.tril(), parts.tril(), error.tril()
        assert ((parts.mean(0) - truth).abs() <= 5 * error + 1e-12).all()
        assert error.max() < 0.1 * truth.abs().max()  # so that the bound says something


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_draws_are_those_of_the_same_mixture_without_gradients(kind):
    prior = mixture(*mixture_parameters(kind))
    plain = dist.MixtureSameFamily(prior.mixture_distribution, prior.component_distribution)
    for shape in ((), (7,), (2, 3)):
        pyro.set_rng_seed(1)
        drawn = prior.rsample(shape)
        pyro.set_rng_seed(1)
        torch.testing.assert_close(drawn, plain.sample(shape), rtol=0, atol=0)
        assert drawn.requires_grad
    assert torch.equal(prior.log_prob(drawn), plain.log_prob(drawn))
    assert not prior.sample().requires_grad


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_draws_that_move_keep_their_place_in_the_distribution(kind):
    """In one dimension the gradient is that of the quantile function, here by bisection and differences."""
    logits = torch.tensor([0.4, -0.2]).double()

    def quantile(u, locs):
        low, high = torch.full_like(u, -20), torch.full_like(u, 20)
        for _ in range(80):
            middle = (low + high) / 2
            below = (logits.softmax(-1) * torch.special.ndtr((middle[:, None] - locs) / 0.5)).sum(-1) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    locs = torch.tensor([-1.0, 1.0]).double().requires_grad_()
    tril = torch.full((2, 1), 0.5).double()
    draws = mixture(logits, locs[:, None], tril if kind == "diagonal" else tril[..., None]).rsample((5,)).flatten()
    (found,) = torch.autograd.grad(draws.sum(), locs)
    u = (logits.softmax(-1) * torch.special.ndtr((draws.detach()[:, None] - locs.detach()) / 0.5)).sum(-1)
    for index in range(2):
        step = torch.zeros(2).double()
        step[index] = 1e-5
        difference = (quantile(u, locs.detach() + step) - quantile(u, locs.detach() - step)).sum() / 2e-5
        assert found[index].item() == pytest.approx(difference.item(), rel=1e-4)


def test_a_batch_of_mixtures_has_the_gradients_of_each():
    logits, locs, scales = (parameter.detach() for parameter in mixture_parameters("diagonal"))
    batch = [torch.stack([p, p.flip(0)]).requires_grad_() for p in (logits, locs, scales)]
    pyro.set_rng_seed(0)
    draws = mixture(*batch).expand([4, 2]).rsample((6,))
    assert draws.shape == (6, 4, 2, 3)
    both = torch.autograd.grad(draws[..., 0, :].square().sum(), batch)
    assert all(gradient[1].abs().max() == 0 for gradient in both)
    assert all(gradient[0].abs().max() > 0 for gradient in both)


def test_components_far_apart_have_finite_gradients_in_float32():
    logits = torch.zeros(2, requires_grad=True)
    locs = torch.tensor([[-50.0, 0.0], [50.0, 0.0]], requires_grad=True)
    mixture(logits, locs, torch.full((2, 2), 0.1)).rsample((1000,)).square().sum(1).mean().backward()
    assert logits.grad.isfinite().all()
    # Each draw moves with its own component: d/d loc of the mean of z^2 is 2 pi_k loc_k.
    torch.testing.assert_close(locs.grad[:, 0], torch.tensor([-50.0, 50.0]), rtol=0.1, atol=0)
