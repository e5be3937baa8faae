"""Everything runs on CUDA as it does on the CPU. Skipped where there is no CUDA device."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import AutoEncoder
from pyro.infer import SVI
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.checkpoint import load_checkpoint, save_checkpoint
from pyro_wae.kernels import Gaussian
from pyro_wae.optim import Adam
from pyro_wae.penalties import (
    MMD,
    CramerWold,
    EnergyDistance,
    JensenShannon,
    KernelStein,
    LogVarianceL1,
    MaxSlicedWasserstein,
    Sinkhorn,
    SlicedWasserstein,
    UnitVarianceKL,
)
from pyro_wae.weights import Constraint

pytestmark = pytest.mark.gpu

N, X, D = 64, 12, 3

PENALTIES = {
    "MMD": lambda: MMD(),
    "standardised": lambda: MMD(standardize=True),
    "energy": lambda: EnergyDistance(),
    "sliced": lambda: SlicedWasserstein(20),
    "max-sliced": lambda: MaxSlicedWasserstein(),
    "Sinkhorn": lambda: Sinkhorn(),
    "Cramer-Wold": lambda: CramerWold(),
    "adversary": lambda: JensenShannon(),
    "adversary of the caller": lambda: JensenShannon(optimizer=None),
    "Stein": lambda: KernelStein(),
    "guards": lambda: MMD() + LogVarianceL1() + UnitVarianceKL(),
}
FIXED = ("MMD", "energy", "Cramer-Wold", "Sinkhorn")
"""Penalties that draw no random numbers."""


def random_code(numbers):
    loc, log_scale = numbers.float().chunk(2, -1)
    return dist.Normal(loc, log_scale.exp()).to_event(1)


class Net(AutoEncoder):
    """A random encoder, with BatchNorm and dropout."""

    def __init__(self):
        encoder = nn.Sequential(nn.Linear(X, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2 * D))
        decoder = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, X))
        super().__init__(X, D, encoder=encoder, decoder=decoder, code=random_code)


class FixedNet(AutoEncoder):
    """A deterministic encoder, and no layer that uses other data or draws random numbers."""

    def __init__(self):
        encoder = nn.Sequential(nn.Linear(X, 16), nn.ReLU(), nn.Linear(16, D))
        super().__init__(X, D, encoder=encoder, decoder=nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, X)))


def data(n=N):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, D, generator=generator) @ torch.randn(D, X, generator=generator)


def gradients(net):
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


@pytest.mark.parametrize("make", PENALTIES.values(), ids=PENALTIES)
def test_svi_steps_with_every_penalty(make):
    net, x = Net().cuda(), data().cuda()
    loss = WAELoss(make(), penalty_weight=1.0)
    svi = SVI(net.model, net.guide, Adam({"lr": 1e-2}), loss=loss)
    before = [parameter.clone() for parameter in net.parameters()]
    losses = [svi.step(x) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert loss.terms.penalty.device.type == "cuda"
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("name", FIXED)
def test_a_penalty_is_the_same_number_as_on_the_cpu(name):
    codes, prior = torch.randn(100, D), torch.randn(150, D)
    found = []
    for device in ("cpu", "cuda"):
        rows = codes.to(device).requires_grad_()
        value = PENALTIES[name]()(rows, prior.to(device))
        value.backward()
        found.append((value.detach().cpu(), rows.grad.cpu()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


def test_a_constraint_finds_its_weight():
    net, x = Net().cuda(), data().cuda()
    weight = Constraint(codes=50)
    svi = SVI(net.model, net.guide, Adam({"lr": 1e-2}), loss=WAELoss(SlicedWasserstein(20), penalty_weight=weight))
    for _ in range(30):
        svi.step(x)
    assert weight.weight.device.type == "cuda"
    assert weight.discrepancy.isfinite()


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    net, x = FixedNet().cuda(), data().cuda()
    found = []
    for rows in (None, 20):
        net.zero_grad()
        loss = WAELoss(lambda z, prior: z.mean(0).square().sum(), penalty_weight=1.0, micro_batch=rows)
        found.append((loss.loss_and_grads(net.model, net.guide, x), gradients(net)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_discriminator_follows_the_codes():
    net, x = Net().cuda(), data().cuda()
    discriminator = nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 1))
    svi = SVI(net.model, net.guide, Adam({"lr": 1e-2}), loss=WAELoss(JensenShannon(discriminator), penalty_weight=1.0))
    svi.step(x)
    assert {parameter.device.type for parameter in discriminator.parameters()} == {"cuda"}


@pytest.mark.parametrize(("before", "after"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("penalty", [MMD, MaxSlicedWasserstein, JensenShannon])
def test_a_checkpoint_goes_on_on_another_device(tmp_path, penalty, before, after):
    def make(device):
        pyro.clear_param_store()
        net = Net().to(device)
        loss = WAELoss(penalty(), penalty_weight=Constraint(codes=50))
        return net, SVI(net.model, net.guide, Adam({"lr": 1e-2}), loss=loss)

    net, svi = make(before)
    for _ in range(3):
        svi.step(data().to(before))
    save_checkpoint(tmp_path / "run.pt", svi=svi)
    saved = {name: value.cpu().clone() for name, value in net.state_dict().items()}
    net, svi = make(after)
    load_checkpoint(tmp_path / "run.pt", svi=svi)
    for name, value in net.state_dict().items():
        assert value.device.type == after
        assert torch.equal(value.cpu(), saved[name])
    assert torch.tensor([svi.step(data().to(after)) for _ in range(2)]).isfinite().all()


def test_bfloat16_is_within_its_unit_roundoff_of_float32():
    """|loss - float32's| <= 2^-8 |loss|, over 200 steps of a training in bfloat16."""
    net, x = FixedNet().cuda(), (data() + 0.5 * torch.randn(N, X)).cuda()
    wae = WAELoss(MMD(Gaussian(bandwidth=2.0)), penalty_weight=10.0)(net.model, net.guide)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(200):
        pyro.set_rng_seed(step)
        with torch.no_grad():
            plain = wae(x)
        pyro.set_rng_seed(step)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            mixed = wae(x)
        assert mixed.dtype == torch.float32
        assert (mixed - plain).abs() <= 2**-8 * plain.abs()
        optimizer.zero_grad()
        mixed.backward()
        optimizer.step()


@pytest.mark.parametrize("make", PENALTIES.values(), ids=PENALTIES)
def test_fp16_with_a_grad_scaler_trains_through_an_overflow(make):
    net, x = Net().cuda(), data().cuda()
    wae = WAELoss(make(), penalty_weight=1.0)(net.model, net.guide)
    with torch.no_grad():
        wae(x)  # makes a discriminator that did not know the size of a code
    optimizer = torch.optim.Adam([parameter for parameter in wae.parameters() if parameter.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = [parameter.clone() for parameter in net.parameters()]
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = wae(x)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        if step == 0:
            assert all(map(torch.equal, before, net.parameters()))
    assert scaler.get_scale() < 2.0**40
    assert sum(losses[-10:]) < sum(losses[:10])
