"""Data that come by batches: loaders with workers, sets larger than memory, streams, and their last, smaller batch."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import AutoEncoder
from pyro.infer import SVI
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyro_wae import WAELoss
from pyro_wae.kernels import Gaussian
from pyro_wae.penalties import MMD, CramerWold, JensenShannon, KernelStein, SlicedWasserstein
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


class OnDisk(Dataset):
    """Rows of a file, of which a worker reads those that it needs."""

    def __init__(self, path, size):
        self.path, self.size = path, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        rows = np.memmap(self.path, dtype=np.float32, mode="r", shape=(self.size, X))
        return torch.from_numpy(rows[index].copy()).to(torch.get_default_dtype())


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        generator = torch.Generator().manual_seed(1)
        yield from torch.randn(self.count, X, generator=generator)


def svi_of(net, loss):
    return SVI(net.model, net.guide, pyro.optim.Adam({"lr": 3e-2}), loss=loss)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_of_a_file_are_read_by_workers_and_learnt_from(tmp_path, workers):
    size = 500
    torch.randn(size, X).float().numpy().tofile(tmp_path / "rows.bin")
    loader = DataLoader(OnDisk(tmp_path / "rows.bin", size), batch_size=50, shuffle=True, num_workers=workers)
    svi = svi_of(Net(size), WAELoss(MMD(), penalty_weight=1.0))
    losses = [[svi.step(x) for x in loader] for _ in range(3)]
    assert sum(losses[2]) < 0.9 * sum(losses[0])


def test_a_stream_is_learnt_from_by_a_plate_of_known_size():
    svi = svi_of(Net(2000), WAELoss(MMD(), penalty_weight=1.0))
    losses = [svi.step(x) for x in DataLoader(Stream(2000), batch_size=50)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_of_a_sparse_matrix_of_scipy_the_line_is_named_that_makes_it_data():
    rows, net = pytest.importorskip("scipy.sparse").csr_array(np.eye(10, X)), Net()
    with pytest.raises(TypeError) as raised:
        WAELoss().loss(net.model, net.guide, rows)
    (note,) = raised.value.__notes__
    assert "a sparse matrix (csr_array). Write torch.tensor(x.toarray()).float(), a batch at a time" in note
    WAELoss().loss(net.model, net.guide, torch.tensor(rows.toarray()).to(torch.get_default_dtype()))


# How N enters


def test_the_size_of_the_data_changes_nothing_for_one_particle():
    net, x = Net(), torch.randn(20, X)
    found = []
    for size in (None, 1000, 10**9):
        net.size = size
        pyro.set_rng_seed(1)
        net.zero_grad()
        loss = WAELoss(MMD(Gaussian(bandwidth=2.0)), penalty_weight=3.0)
        found.append((loss.loss_and_grads(net.model, net.guide, x), net.encoder.weight.grad.clone()))
    for value, gradient in found[1:]:
        assert value == found[0][0]
        assert torch.equal(gradient, found[0][1])


class SizeSeen(MMD):
    def estimate(self, codes, prior, context):
        self.seen = context.data_size
        return super().estimate(codes, prior, context)


@pytest.mark.parametrize("how", ["subsample", "subsample_size"])
@pytest.mark.parametrize(("size", "known"), [(1000, 1000), (20, None), (None, None)])
def test_a_penalty_learns_how_many_data_there_are(how, size, known):
    net, penalty = Net(size, how), SizeSeen()
    WAELoss(penalty, penalty_weight=1.0).loss(net.model, net.guide, torch.randn(20, X))
    assert penalty.seen == known


@pytest.mark.parametrize("vectorized", [False, True], ids=["one by one", "vectorised"])
def test_pairs_of_one_datum_come_back_with_their_share_of_all_pairs(vectorized):
    """MMD(N) = MMD(no N) + (pairs within a datum - pairs between data) / N: ten times N, a tenth of the difference."""
    net, x = Net().double(), torch.randn(20, X, dtype=torch.float64)
    penalty = {}
    for size in (None, 100, 1000):
        net.size = size
        pyro.set_rng_seed(1)
        loss = WAELoss(
            MMD(Gaussian(bandwidth=2.0)),
            penalty_weight=1.0,
            num_particles=3,
            vectorize_particles=vectorized,
            max_plate_nesting=1,
        )
        loss.loss(net.model, net.guide, x)
        penalty[size] = loss.terms.penalty.item()
    difference = penalty[100] - penalty[None]
    assert difference > 1e-4  # codes of one datum are closer to each other
    assert penalty[1000] - penalty[None] == pytest.approx(difference / 10, rel=1e-6)


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
