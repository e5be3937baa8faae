"""Data that come by batches: loaders with workers, sets larger than memory, streams, and their last, smaller batch."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import AutoEncoder
from pyro.infer import SVI
from references import every_particles
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_wae import WAELoss
from pyro_wae.costs import ExpectedSquaredError
from pyro_wae.penalties import MMD, CramerWold, JensenShannon, KernelStein, SlicedWasserstein
from pyro_wae.predict import sample
from pyro_wae.weights import Constraint

X, D = 6, 2


class Net(AutoEncoder):
    """A random encoder; its plate has a size of its own, or that of the batch."""

    def __init__(self, size=None, how="subsample"):
        super().__init__(X, D, code=lambda loc: dist.Normal(loc, 0.5).to_event(1))
        self.size, self.how = size, how

    def plate(self, x):
        if self.size is None:
            return super().plate(x)
        part = {"subsample": x} if self.how == "subsample" else {"subsample_size": len(x)}
        return pyro.plate("data", self.size, **part)


def svi_of(net, loss):
    return SVI(net.model, net.guide, pyro.optim.Adam({"lr": 3e-2}), loss=loss)


def test_of_a_sparse_matrix_of_scipy_the_line_is_named_that_makes_it_data():
    rows, net = pytest.importorskip("scipy.sparse").csr_array(np.eye(10, X)), Net()
    with pytest.raises(TypeError) as raised:
        WAELoss().loss(net.model, net.guide, rows)
    (note,) = raised.value.__notes__
    assert "a sparse matrix (csr_array). Write torch.tensor(x.toarray()).float(), a batch at a time" in note
    WAELoss().loss(net.model, net.guide, torch.tensor(rows.toarray()).to(torch.get_default_dtype()))


LAYERS = {
    "linear": lambda: nn.Linear(X, D),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, X)), nn.Conv1d(1, D, X), nn.Flatten()),
    "normalisation": lambda: nn.Sequential(nn.LayerNorm(X), nn.Linear(X, D)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("of_nets", "of_data"),
    [(torch.float32, torch.float64), (torch.float32, torch.float16), (torch.float64, torch.float32)],
)
def test_of_data_of_another_precision_than_the_nets_the_line_is_named_that_changes_it(layer, of_nets, of_data):
    net = AutoEncoder(X, D, encoder=LAYERS[layer]().to(of_nets), decoder=nn.Linear(D, X, dtype=of_nets))
    x = torch.randn(10, X).to(of_data)
    calls = [
        ("Argument 1", lambda: WAELoss().loss(net.model, net.guide, x)),
        ("Argument 1['x']", lambda: WAELoss().loss(lambda b: net.model(b["x"]), lambda b: net.guide(b["x"]), {"x": x})),
        ("Argument 1", lambda: sample(net.model, x)),
    ]
    for name, call in calls:
        with pytest.raises((RuntimeError, ValueError)) as raised:
            call()
        (note,) = raised.value.__notes__
        assert f"{name} of model and guide is of {of_data}, and nets have parameters of {of_nets}" in note
        assert f"Write x.to({of_nets})" in note
    WAELoss().loss(net.model, net.guide, x.to(of_nets))


def test_data_of_another_precision_are_not_named_where_a_program_fails_for_another_reason():
    net = AutoEncoder(X, D, encoder=nn.Linear(X + 1, D))
    with pytest.raises(RuntimeError, match="shapes") as raised:
        WAELoss().loss(net.model, lambda x: net.guide(x.to(torch.get_default_dtype())), torch.randn(10, X).half())
    assert not hasattr(raised.value, "__notes__")


# How N enters


class SizeSeen(MMD):
    def estimate(self, codes, prior, context):
        self.seen = context.data_size
        return super().estimate(codes, prior, context)


@every_particles
@pytest.mark.parametrize("how", ["subsample", "subsample_size"])
@pytest.mark.parametrize(("size", "known"), [(1000, 1000), (20, None), (None, None)])
def test_a_penalty_learns_how_many_data_there_are(how, size, known, options):
    net, penalty = Net(size, how), SizeSeen()
    WAELoss(penalty, penalty_weight=1.0, **options).loss(net.model, net.guide, torch.randn(20, X))
    assert penalty.seen == known


# The last batch


LOSSES = {
    "default": lambda: WAELoss(),
    "standardised": lambda: WAELoss(MMD(standardize=True), penalty_weight=1.0),
    "sliced": lambda: WAELoss(SlicedWasserstein(20), penalty_weight=1.0),
    "Cramer-Wold": lambda: WAELoss(CramerWold(), penalty_weight=1.0),
    "adversary": lambda: WAELoss(JensenShannon(nn.Linear(D, 1)), penalty_weight=1.0),
    "Stein": lambda: WAELoss(KernelStein(), penalty_weight=1.0),
    "constraint": lambda: WAELoss(SlicedWasserstein(20), penalty_weight=Constraint(codes=50)),
    "particles": lambda: WAELoss(MMD(), penalty_weight=1.0, num_particles=2),
    "micro-batches": lambda: WAELoss(MMD(), penalty_weight=1.0, micro_batch=16),
}
every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)


@every_loss
def test_a_last_batch_of_two_rows_is_a_batch_like_any_other(make):
    net, rows = Net(102), torch.randn(102, X)
    svi = svi_of(net, make())
    sizes = []
    for _ in range(3):
        for (x,) in DataLoader(TensorDataset(rows), batch_size=50):
            assert np.isfinite(svi.step(x))
            sizes.append(len(x))
    assert sizes == 3 * [50, 50, 2]
    assert all(parameter.isfinite().all() for parameter in net.parameters())


@every_loss
def test_a_last_batch_of_one_row_is_an_error_that_says_what_to_write(make):
    svi, rows = svi_of(Net(51), make()), torch.randn(51, X)
    *whole, (last,) = DataLoader(TensorDataset(rows), batch_size=50)
    for (x,) in whole:
        svi.step(x)
    with pytest.raises(ValueError, match=r"at least 2 data .* found 1 .* Write DataLoader\(\.\.\., drop_last=True\)"):
        svi.step(last)
    assert len(DataLoader(TensorDataset(rows), batch_size=50, drop_last=True)) == len(whole)


def test_a_micro_batch_of_one_row_is_no_last_batch():
    net, x = Net(), torch.randn(17, X)
    assert np.isfinite(svi_of(net, WAELoss(MMD(), penalty_weight=1.0, micro_batch=16)).step(x))


# Documents of different lengths


SHARES = torch.tensor([0.5, 0.3, 0.2])
LENGTHS = torch.tensor([[10.0], [1000.0]]).repeat(3, 1)


def expected_error(likelihood, documents):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            pyro.sample("x", likelihood, obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(torch.ones(len(x), 2)).to_event(1))

    loss = WAELoss(cost=ExpectedSquaredError(), penalty_weight=0.0)
    return loss.loss(model, guide, documents)


def test_the_variance_of_a_document_is_that_of_its_own_length():
    likelihood = dist.Multinomial(1000, SHARES.expand(6, 3), validate_args=False)
    expected = (LENGTHS * SHARES * (1 - SHARES)).sum(1).mean().item()
    assert expected_error(likelihood, LENGTHS * SHARES) == pytest.approx(expected, rel=1e-4)


def test_where_the_variance_is_not_proportional_to_the_length_another_length_is_refused():
    likelihood = dist.DirichletMultinomial(5 * SHARES.expand(6, 3), 1000, validate_args=False)
    expected = (likelihood.variance).sum(1).mean().item()
    assert expected_error(likelihood, 1000 * SHARES.expand(6, 3)) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="differ from the total_count of DirichletMultinomial"):
        expected_error(likelihood, LENGTHS * SHARES)
