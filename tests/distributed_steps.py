"""Steps of several processes and of one; run by test_distributed.py, which compares the two.

``python distributed_steps.py DIRECTORY SIZES`` forks a process for each size, the number of data of that rank, and
further pairs of processes of which one ends or stays away. What they see is saved in DIRECTORY.
"""

import functools
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from adversaries import net as discriminator
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_wae import WAELoss
from pyro_wae.costs import NegativeLogLikelihood
from pyro_wae.distributed import average_gradients
from pyro_wae.kernels import Gaussian
from pyro_wae.optim import Adam
from pyro_wae.penalties import (
    MMD,
    JensenShannon,
    KernelStein,
    LogVarianceL1,
    MaxSlicedWasserstein,
    PosteriorKL,
    PriorLikelihood,
    SlicedWasserstein,
)
from pyro_wae.weights import Constraint, Schedule

N, X, D = 14, 5, 2
TIMEOUT = 6.0
"""Seconds that a rank waits for one that stays away."""

TABLE = torch.Generator().manual_seed(11)
DATA = torch.randn(N, X, dtype=torch.float64, generator=TABLE)
NOISE = torch.randn(2, 12, N, D, dtype=torch.float64, generator=TABLE)  # of guide and model, for runs and draws
LABELS = torch.randint(3, (N,), generator=TABLE)
# Some data and not others, of one rank more than of the other.
MASK = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0]).bool()
ELEMENTS = torch.rand(N, D, generator=TABLE) < 0.7


class Fed(dist.Normal):
    """A Normal whose draws come from tables, so that they are the same however the data are split."""

    _cache_tables = None

    def fed(self, tables):
        self._cache_tables = tables  # named as a transform's cache is: it is no parameter of the distribution
        return self

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, _instance).fed(self._cache_tables)

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * next(self._cache_tables)

    rsample.__module__ = dist.Normal.__module__  # the draws have the law of a Normal, and closed forms hold


class Rows:
    """Some of the data and all that belongs to them, in one argument of a model."""

    def __init__(self, rows):
        self.x, self.labels, self.mask, self.elements = DATA[rows], LABELS[rows], MASK[rows], ELEMENTS[rows]
        self.index = torch.arange(N)[rows]
        self.guide, self.model = (iter(NOISE[side][:, rows]) for side in range(2))


class Net(nn.Module):
    """A WAE with a deterministic or a random encoder, and one of several priors."""

    def __init__(self, is_random=True, prior="fixed", masked="nothing", size=None, dim=D):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(X, 8), nn.Tanh(), nn.Linear(8, 2 * dim))
        self.decoder = nn.Linear(dim, X)
        self.is_random, self.prior, self.masked, self.size, self.dim = is_random, prior, masked, size, dim
        if prior == "learnt":
            self.loc = nn.Parameter(torch.randn(dim))
        if prior == "conditional":
            self.centres = nn.Embedding(3, dim)
        self.double()

    def plate(self, rows):
        return pyro.plate("data", self.size or len(rows.x), subsample=rows.index if self.size else None)

    def mask(self, rows):
        if self.masked == "data":
            return poutine.mask(mask=rows.mask)
        # One rank has no mask at all where none of its data is masked.
        return poutine.mask(mask=True)

    def elements(self, fn, rows):
        return fn.mask(rows.elements).to_event(1) if self.masked == "elements" else fn.to_event(1)

    def fixed_prior(self, rows):
        if self.prior == "conditional":
            return Fed(self.centres(rows.labels), 1.0)
        if self.prior == "of two kinds":  # which is that of all data of a rank, or nearly
            return Fed((rows.index >= 9).double()[:, None].expand(-1, self.dim), 1.0)
        loc = self.loc if self.prior == "learnt" else rows.x.new_zeros(self.dim)
        return Fed(loc, rows.x.new_ones(self.dim)).expand([len(rows.x), self.dim])

    def model(self, rows):
        pyro.module("net", self)
        with self.plate(rows), self.mask(rows):
            if self.prior == "deep":
                top = pyro.sample("top", Fed(torch.zeros_like(rows.x[:, :D]), 1.0).fed(rows.model).to_event(1))
                fn = Fed(top.tanh(), 0.5)
            else:
                fn = self.fixed_prior(rows)
            z = pyro.sample("z", self.elements(fn.fed(rows.model), rows))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=rows.x)
            if self.prior == "conditional":
                pyro.sample("y", dist.Categorical(logits=self.decoder(z)[:, :3]), obs=rows.labels)

    def guide(self, rows):
        pyro.module("net", self)
        loc, log_scale = self.encoder(rows.x).chunk(2, -1)
        with self.plate(rows), self.mask(rows):
            if self.prior == "deep":
                pyro.sample("top", dist.Delta(loc.sin()).to_event(1))
            scale = (0.1 * log_scale).exp()
            fn = Fed(loc, scale).fed(rows.guide) if self.is_random else dist.Delta(loc + 0 * scale)
            pyro.sample("z", self.elements(fn, rows))


class FirstMasked(Net):
    """The first rank's data have a mask, and others' not."""

    def mask(self, rows):
        return poutine.mask(mask=rows.index != 2) if 0 in rows.index else poutine.mask(mask=True)


class ByIndex(Net):
    """Takes the numbers of its data, in a tensor that can be split."""

    def model(self, index):
        super().model(Rows(index))

    def guide(self, index):
        super().guide(Rows(index))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@dataclass
class Case:
    """A loss and a net; both are made from the random state of the rank."""

    options: object
    net: object = Net
    steps: int = 1
    exact: float = 1e-10

    def module(self, **group):
        net = self.net()
        return WAELoss(**{"penalty_weight": 10.0, **self.options()}, **group)(net.model, net.guide)


CASES = {
    "MMD": Case(lambda: {"penalty": MMD()}),
    "MMD of draws": Case(lambda: {"penalty": MMD(Gaussian(), closed_form=False), "prior_draws": 3}),
    "V-statistic": Case(lambda: {"penalty": MMD(Gaussian(), unbiased=False)}, lambda: Net(is_random=False)),
    "standardised": Case(lambda: {"penalty": MMD(Gaussian(), standardize=True, closed_form=False)}, steps=3),
    "sliced": Case(lambda: {"penalty": SlicedWasserstein(7)}, steps=2),
    "max-sliced": Case(lambda: {"penalty": MaxSlicedWasserstein(3)}, steps=2),
    "a function": Case(lambda: {"penalty": lambda codes, prior: (codes.mean(0) - prior.mean(0)).square().sum()}),
    "guard": Case(lambda: {"penalty": MMD() + LogVarianceL1(0.1)}),
    "guard under a mask": Case(lambda: {"penalty": MMD() + LogVarianceL1(0.1)}, lambda: Net(masked="data")),
    "InfoVAE": Case(lambda: {"penalty": MMD() + 0.1 * PosteriorKL()}),
    "InfoVAE under a mask": Case(lambda: {"penalty": MMD() + 0.1 * PosteriorKL()}, lambda: Net(masked="data")),
    "Stein": Case(lambda: {"penalty": KernelStein(), "num_particles": 2}),
    "particles": Case(lambda: {"penalty": MMD(), "num_particles": 2, "prior_draws": 2}),
    "particles of a data set": Case(lambda: {"penalty": MMD(), "num_particles": 2}, lambda: Net(size=100)),
    "masked data": Case(lambda: {"penalty": MMD()}, lambda: Net(masked="data")),
    "masked elements": Case(lambda: {"penalty": MMD()}, lambda: Net(masked="elements")),
    "a mask on one rank": Case(lambda: {"penalty": MMD()}, FirstMasked),
    "hierarchy": Case(lambda: {"penalty": MMD()}, lambda: Net(prior="deep")),
    "a prior that differs between ranks": Case(lambda: {"penalty": MMD()}, lambda: Net(prior="of two kinds")),
    "sites apart": Case(
        lambda: {"penalty": {"top": MMD(), "z": SlicedWasserstein(5)}}, lambda: Net(prior="deep"), steps=2
    ),
    "learnt prior": Case(lambda: {"penalty": MMD(closed_form=False)}, lambda: Net(prior="learnt")),
    "learnt prior in closed form": Case(lambda: {"penalty": MMD(Gaussian())}, lambda: Net(prior="learnt")),
    "learnt prior by its density": Case(lambda: {"penalty": MMD() + PriorLikelihood()}, lambda: Net(prior="learnt")),
    "labels": Case(lambda: {"penalty": MMD(), "condition": "y"}, lambda: Net(prior="conditional")),
    "a condition of floats": Case(
        lambda: {"penalty": SlicedWasserstein(5), "condition": "x", "cost": NegativeLogLikelihood()},
        lambda: Net(prior="conditional"),
    ),
    "constraint": Case(lambda: {"penalty": MMD(), "penalty_weight": Constraint(pool=4)}, steps=10, exact=1e-6),
    "WAE-GAN": Case(lambda: {"penalty": JensenShannon(discriminator(), optimizer=sgd)}, steps=3),
    "WAE-GAN with the density": Case(
        lambda: {"penalty": JensenShannon(discriminator(), optimizer=sgd, prior_log_prob=True)}
    ),
    "WAE-GAN by one optimiser": Case(lambda: {"penalty": JensenShannon(discriminator(), optimizer=None)}, steps=3),
    "WAE-GAN, 100 steps": Case(
        lambda: {"penalty": JensenShannon(discriminator(), optimizer=sgd)}, steps=100, exact=1e-6
    ),
    "WAE-GAN by one optimiser, 100 steps": Case(
        lambda: {"penalty": JensenShannon(discriminator(), optimizer=None)}, steps=100, exact=1e-6
    ),
}


IN_PARTS = Case(lambda: {"penalty": MMD(Gaussian(), closed_form=False)}, ByIndex)


class Directions:
    """Notes what ``Tensor.normal_`` draws, which are a penalty's directions, or gives what was drawn elsewhere."""

    def __init__(self, given=None):
        self.given, self.drawn = given, []

    def __enter__(self):
        self.usual = usual = torch.Tensor.normal_

        def normal_(tensor, *args, **kwargs):
            if kwargs:  # from a generator of its own, alike everywhere
                return usual(tensor, *args, **kwargs)
            value = usual(tensor, *args) if self.given is None else tensor.copy_(self.given[len(self.drawn)])
            self.drawn.append(value.clone())
            return value

        torch.Tensor.normal_ = normal_
        return self

    def __exit__(self, *error):
        torch.Tensor.normal_ = self.usual


def train(case, rows, wrap=lambda module: module, directions=None, batch=None, **group):
    """Trains and says what a rank sees: loss, terms and gradients of the last step, and the state at the end."""
    module = case.module(**group)
    wrapped = wrap(module)
    optimizer = torch.optim.SGD((p for p in module.parameters() if p.requires_grad), lr=0.02)
    with Directions(directions) as seen:
        for _ in range(case.steps):
            optimizer.zero_grad()
            loss = wrapped(Rows(rows) if batch is None else batch)
            loss.backward()
            gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
            optimizer.step()
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    return {
        "loss": loss.detach(),
        "terms": module.terms.as_dict(),
        "gradients": gradients,
        "state": {name: value.clone() for name, value in state.items()},
        "directions": seen.drawn,
    }


def ranks_of(sizes):
    starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def seed(case, rank=0):
    pyro.clear_param_store()
    pyro.set_rng_seed(1000 * (1 + list(CASES).index(case)) + rank)


def constrained(**group):
    return WAELoss(MMD(closed_form=False), penalty_weight=Constraint(pool=4), **group)


def adversarial(**group):
    return WAELoss(JensenShannon(discriminator(), optimizer=sgd), penalty_weight=10.0, **group)


def train_by_svi(rows, loss, start=None, runs_before=0):
    """Five steps of SVI, from a state if one is given, after some runs that have used up their noise."""
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    if start is not None:
        net.load_state_dict(start)
    svi = SVI(net.model, net.guide, Adam({"lr": 0.01}), loss=loss)
    losses = []
    for step in range(5):
        batch = Rows(rows)
        for _ in range(runs_before if step == 0 else 0):
            next(batch.guide), next(batch.model)
        losses.append(svi.step(batch))
    state = {**net.state_dict(), **dict(loss.penalty.named_parameters())}
    return {"losses": losses, "state": state, "before": before, "terms": loss.terms.as_dict()}


def train_by_hand(rows, loss, average):
    pyro.set_rng_seed(3)  # one state of all nets,
    net = Net()
    pyro.set_rng_seed(30 + rows.start)  # and random numbers of its own for each rank
    module = loss(net.model, net.guide)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        module(Rows(rows)).backward()
        average(module.parameters())
        optimizer.step()
    return dict(net.state_dict())


def averaged(rank):
    """Three parameters, of which all ranks have a gradient, the first alone, and none."""
    parameters = [nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    parameters[0].grad = torch.full((2, 3), 1.0 + rank)
    if rank == 0:
        parameters[1].grad = torch.full((2, 3), 12.0)
    average_gradients(parameters)
    return [parameter.grad for parameter in parameters]


def message(function):
    """What an error says, its class and how long it took."""
    start = time.monotonic()
    kind, text = "none", ""
    try:
        function()
    except Exception as error:
        kind, text = type(error).__name__, " ".join([str(error), *getattr(error, "__notes__", [])])
    return {"kind": kind, "text": text, "seconds": time.monotonic() - start}


def one_step(net, rows, **options):
    return message(lambda: WAELoss(process_group="world", **options).loss(net.model, net.guide, Rows(rows)))


def errors(rank, rows):
    """Steps that fail, by what is wrong with them."""
    last = distributed.get_world_size() - 1

    def broken(rows):
        raise KeyError("a key of this rank's own")

    def of_nan(rows):
        net.guide(rows)
        rows.x = rows.x + (torch.nan if rank == last else 0.0)

    found = {}
    pyro.set_rng_seed(5)
    net = Net()
    found["one seed"] = one_step(net, rows)
    pyro.set_rng_seed(5 + rank)
    found["options"] = one_step(net, rows, prior_draws=2 if rank == last else 1)
    factor = 2.0 if rank == last else 1.0
    found["reduction"] = one_step(net, rows, reduction="sum" if rank == last else "mean")
    found["weight's function"] = one_step(net, rows, penalty_weight=Schedule(lambda step: factor))
    found["penalty's function"] = one_step(net, rows, penalty=lambda codes, prior: factor * codes.square().mean())
    found["sizes"] = one_step(Net(size=100 + rank), rows)
    found["density"] = one_step(Net(prior="deep"), rows, penalty=KernelStein(Gaussian(1.0)))
    loss = WAELoss(process_group="world")
    found["model"] = message(lambda: loss.loss(broken if rank == last else net.model, net.guide, Rows(rows)))
    found["NaN"] = message(lambda: loss.loss(net.model, of_nan, Rows(rows)))
    automatic = AutoNormal(poutine.block(net.model, hide=["x"]))
    found["parameters of data"] = message(lambda: WAELoss(process_group="world").loss(net.model, automatic, Rows(rows)))
    other = Net(prior="learnt" if rank == last else "fixed")
    found["nets"] = message(lambda: loss.loss_and_grads(other.model, other.guide, Rows(rows)))
    found["first step"] = message(
        lambda: loss.loss_and_grads(broken if rank == last else net.model, net.guide, Rows(rows))
    )
    found["no error"] = one_step(net, rows)
    return found


def all_steps(rank, sizes):
    """Everything that ranks do together."""
    rows = ranks_of(sizes)[rank]
    results = {"cases": {}}
    for name, case in CASES.items():
        seed(name, rank)
        results["cases"][name] = train(case, rows, DistributedDataParallel, process_group="world")
    seed("MMD", rank)
    everyone = distributed.new_group(range(len(sizes)))
    results["a group"] = train(CASES["MMD"], rows, DistributedDataParallel, process_group=everyone)
    seed("MMD", rank)
    index = torch.arange(N)[rows]
    results["micro-batches"] = train(
        IN_PARTS, rows, DistributedDataParallel, batch=index, process_group="world", micro_batch=2
    )
    seed("MMD", rank)
    if sizes[rank] > 1:  # one code cannot be compared
        results["per rank"] = train(CASES["MMD"], rows)
    seed("MMD", rank)
    results["svi"] = train_by_svi(rows, constrained(process_group="world"))
    seed("MMD", rank)
    results["svi with an adversary"] = train_by_svi(rows, adversarial(process_group="world"))
    results["by hand"] = train_by_hand(rows, constrained(process_group="world"), average_gradients)
    results["averaged"] = averaged(rank)
    results["errors"] = errors(rank, rows)
    return results


def left_alone(rank, sizes, leave):
    """The second step of the first rank, in which the last one does not take part."""
    net, rows = Net(), ranks_of(sizes)[rank]
    first = one_step(net, rows)
    if rank:
        leave()
    return {"first": first, "second": one_step(net, rows)}


def start(directory, name, function, sizes, timeout):
    """Forks the ranks of a group of processes, and gives their numbers."""
    processes = []
    for rank in range(len(sizes)):
        process = os.fork()
        if process:
            processes.append(process)
            continue
        status = 1
        try:
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{directory}/{name}.store",
                rank=rank,
                world_size=len(sizes),
                timeout=timedelta(seconds=timeout),
            )
            pyro.set_rng_seed(rank)
            torch.save(function(rank, sizes), f"{directory}/{name}{rank}.pt")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return processes


def main():
    directory, sizes = Path(sys.argv[1]), [int(size) for size in sys.argv[2].split(",")]
    torch.set_num_threads(1)
    # What torch imports in a first step is imported once, before there are several processes.
    WAELoss(MMD()).loss(Net().model, Net().guide, Rows(slice(0, N)))
    groups = [
        start(directory, "ended", functools.partial(left_alone, leave=lambda: os._exit(0)), [7, 7], 60),
        start(directory, "away", functools.partial(left_alone, leave=lambda: time.sleep(600)), [7, 7], TIMEOUT),
        start(directory, "steps", all_steps, sizes, 60),
    ]
    codes = [os.waitstatus_to_exitcode(os.waitpid(ranks[0], 0)[1]) for ranks in groups]
    codes += [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in groups[2][1:]]
    for ranks in groups[:2]:
        os.kill(ranks[1], signal.SIGKILL)
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
