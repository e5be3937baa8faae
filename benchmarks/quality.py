"""Are samples as good as reconstructions? Trains with penalties, weights and priors, and compares what they reach.

    python benchmarks/quality.py penalties
    python benchmarks/quality.py constraint gan priors normal --data mnist --devices cpu cpu

Each table is a list of settings that differ in what its name says, and a file of its own. Trainings of one seed start
from the same nets and see the same batches. Samples, and the reconstructions of held-out data, are compared with the
held-out data by the Frechet distance in the features of a small classifier; held-out codes are compared with the prior
by two-sample tests.
A first part of the codes is for choosing, and the p-values of the others are reported. Held-out digits are of MNIST's
training set, because its test set is of other writers. All numbers of all seeds are written to ``--out``.
"""

import argparse
import dataclasses
import functools
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from harness import Benchmark, set_up
from pyro.distributions import transforms
from pyro.infer import SVI, Trace_ELBO
from quality_tables import TABLES, TESTED, Setting, chosen, page
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pyro_wae import WAELoss, kernels, penalties, priors, weights
from pyro_wae.demo.digits import load_digits
from pyro_wae.demo.judge import DigitClassifier, frechet_distance
from pyro_wae.demo.nets import WIDTH, Residual, StandardNormal, deep_head, digit_decoder, digit_encoder
from pyro_wae.diagnostics import two_sample_test
from pyro_wae.optim import Adam
from pyro_wae.priors import MixturePrior, VampPrior

# Data


@dataclass(frozen=True)
class Data:
    """What is learnt from: training data, data held out of them, test data, and the map to features."""

    train: Tensor
    heldout: Tensor
    test: Tensor
    features: Callable[[Tensor], Tensor]
    epochs: int

    def to(self, device: str) -> "Data":
        """The same on another device."""
        if isinstance(self.features, nn.Module):
            self.features.to(device)
        parts = (part.to(device) for part in (self.train, self.heldout, self.test))
        return Data(*parts, self.features, self.epochs)


@functools.cache
def load_data(name: str, root: str, smoke: bool, classifier_file: Path | None = None) -> Data:
    """Data by name; a classifier of digits is trained with seed 0, or read from a file that is there."""
    pyro.set_rng_seed(0)
    if name in ("bundled", "mnist"):
        parts = load_digits(name, root=root, parts=("train", "heldout", "test"))
        images, labels, heldout, _, test, _ = (part[:300] for part in parts) if smoke else parts
        classifier = DigitClassifier()
        if classifier_file is not None and classifier_file.exists():
            classifier.load_state_dict(torch.load(classifier_file))
            classifier.requires_grad_(False).eval()
        else:
            classifier.learn(images, labels, epochs=1 if smoke else 8)
        if classifier_file is not None and not classifier_file.exists():
            torch.save(classifier.state_dict(), classifier_file)
        return Data(images, heldout, test, classifier, 40 if name == "bundled" else 10)
    if name == "bars":
        from zoo import draw_pictures

        rows = draw_pictures(600 if smoke else 25_000)
        parts = rows.split([200, 200, 200] if smoke else [20_000, 3_000, 2_000])
        return Data(*parts, nn.Identity(), 20)
    from sklearn.datasets import load_breast_cancer
    from sklearn.datasets import load_digits as load_small_digits

    table = load_breast_cancer().data if name == "biopsies" else load_small_digits().data
    rows = np.log(table + table.mean(0) / 10) if name == "biopsies" else table / 16
    rows = torch.tensor(rows, dtype=torch.float32)[torch.randperm(len(rows))]
    half = len(rows) // 2
    if name == "biopsies":
        rows = (rows - rows[:half].mean(0)) / rows[:half].std(0)
    return Data(rows[:half], rows[half:], rows[half:], nn.Identity(), 600 if name == "biopsies" else 200)


# Nets


BLOCKS = {"shallow": 0, "deep": 2, "deeper": 6}
"""Residual blocks between the convolutions and the code, in encoder and decoder each."""


def with_blocks(net: nn.Sequential, count: int) -> nn.Sequential:
    """The net with another number of residual blocks, new ones."""
    first = next(i for i, part in enumerate(net) if isinstance(part, Residual))
    others = [part for part in net if not isinstance(part, Residual)]
    return nn.Sequential(*others[:first], *(Residual(WIDTH) for _ in range(count)), *others[first:])


def make_nets(setting: Setting, data: Data) -> tuple[nn.Module, nn.Module]:
    """The encoder and the decoder."""
    if data.train.ndim == 4:
        nets = digit_encoder(setting.zdim), digit_decoder(setting.zdim)
        if setting.nets != "deep":
            nets = tuple(with_blocks(net, BLOCKS[setting.nets]) for net in nets)
        return nets
    size = data.train.shape[1]
    if setting.nets == "deep":
        return nn.Sequential(*deep_head(size, setting.zdim)), nn.Sequential(*deep_head(setting.zdim, size))

    def shallow(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, outputs))

    return shallow(size, setting.zdim), shallow(setting.zdim, size)


class FlowPrior(nn.Module):
    """N(0, I) through six affine coupling layers, with the halves of a code in turns."""

    def __init__(self, zdim: int) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(transforms.affine_coupling(zdim, [64, 64]) for _ in range(6))
        self.register_buffer("loc", torch.zeros(zdim))

    def forward(self) -> Any:
        """The prior of one code."""
        swap = transforms.Permute(torch.arange(len(self.loc), device=self.loc.device).flip(0))
        parts = [part for coupling in self.couplings for part in (coupling, swap)]
        return dist.TransformedDistribution(dist.Normal(self.loc, 1.0).to_event(1), parts)


class Net(nn.Module):
    """An auto-encoder with any prior, as a Pyro model and guide."""

    def __init__(self, setting: Setting, data: Data) -> None:
        super().__init__()
        self.noise, self.scale = setting.noise, 1.0
        self.is_vae = setting.penalty.startswith("VAE")
        if self.is_vae:
            self.scale = float(setting.penalty[4:-1])
        encoder, self.decoder = make_nets(setting, data)
        self.encoder = encoder
        d = setting.zdim
        self.log_scale = nn.Linear(d, d) if self.is_vae else nn.Identity()
        names = {"MixturePrior": MixturePrior, "VampPrior": VampPrior, "FlowPrior": FlowPrior}
        names |= {"d": d, "encoder": encoder, "x": data.train}
        self.prior = StandardNormal(d) if setting.prior is None else eval(setting.prior, names)

    def model(self, x: Tensor) -> None:
        """The prior and the decoder."""
        pyro.module("decoder", self.decoder)
        pyro.module("prior", self.prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(x.ndim - 1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder."""
        pyro.module("encoder", self.encoder)
        loc = self.encoder(x)
        if self.is_vae:
            pyro.module("log_scale", self.log_scale)
        with pyro.plate("data", len(x)):
            if self.is_vae:
                fn = dist.Normal(loc, (self.log_scale(loc) - 2).exp())
            else:
                fn = dist.Normal(loc, self.noise) if self.noise else dist.Delta(loc)
            pyro.sample("z", fn.to_event(1))


# One training


def falling(begin: float, end: float, step: int) -> float:
    """The factor of a learning rate that falls along a cosine between two steps."""
    return (1 + math.cos(math.pi * min(1.0, max(0.0, (step - begin) / (end - begin))))) / 2


def train(setting: Setting, seed: int, data: Data, args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """Trains, and returns the judged nets and what the training showed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    net = Net(setting, data).to(args.device).train()
    epochs = setting.epochs or args.epochs or data.epochs
    steps = 3 if args.smoke else epochs * (len(data.train) // setting.batch)
    if net.is_vae:
        loss: Any = Trace_ELBO()
    else:
        names = {**vars(kernels), **vars(penalties), **vars(weights), "nn": nn}
        loss = WAELoss(eval(setting.penalty, names), penalty_weight=eval(setting.weight, names))

    def adam_args(name: str) -> dict[str, float]:
        return {"lr": setting.rate if name.startswith("prior.") else 1e-3}

    def scheduler(adam: torch.optim.Optimizer) -> Any:
        if not setting.prior_last:
            return CosineAnnealingLR(adam, steps)
        begin, end = (0.78, 1.0) if adam.param_groups[0]["lr"] == setting.rate else (0.0, 0.88)
        return LambdaLR(adam, functools.partial(falling, begin * steps, end * steps))

    optimizer = Adam(adam_args, scheduler=scheduler)
    svi = SVI(net.model, net.guide, optimizer, loss=loss)
    average = None
    if setting.average is not None:
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(setting.average), use_buffers=True)
    generator = torch.Generator().manual_seed(seed)
    order, start = torch.empty(0, dtype=torch.long), time.perf_counter()
    for step in range(steps):
        if len(order) < setting.batch:
            order = torch.randperm(len(data.train), generator=generator)
        batch, order = order[: setting.batch], order[setting.batch :]
        if setting.initialise and step == steps // 5:
            with torch.no_grad():
                net.prior.initialise(net.encoder(data.train[:2000]))
        svi.step(data.train[batch.to(args.device)])
        optimizer.step()
        if average is not None:
            average.update_parameters(net)
    seconds = time.perf_counter() - start
    shown: dict[str, Any] = {"ms": 1000 * seconds / steps}
    if not net.is_vae:
        shown["weight_at_end"] = float(loss.terms.weight)
        shown["outcome"] = getattr(loss.penalty_weight, "outcome", None)
    judged = net if average is None else average.module
    return judged.eval(), shown


@torch.no_grad()
def judge(net: nn.Module, data: Data, setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Measures on data that were not trained on."""
    pyro.set_rng_seed(0)
    outputs, heldout_outputs = (in_parts(net.decoder, encode(net, part)) for part in (data.test, data.heldout))
    prior, n = net.prior(), 300 if args.smoke else max(10_000, len(data.train))
    samples = in_parts(net.decoder, prior.sample((n,)))
    others = in_parts(net.decoder, encode(net, data.train))

    def frechet(rows: Tensor, others: Tensor) -> float:
        return frechet_distance(*(in_parts(data.features, part).flatten(1) for part in (rows, others)))

    p_values = [two_sample_test(codes.cpu(), prior.sample((len(codes),)).cpu()).p_value for codes in tested(net, data)]
    codes = in_parts(net.encoder, data.heldout)
    found = {
        "spread": codes.var(0).mean().sqrt().item(),
        "test_cost": (outputs - data.test).square().flatten(1).sum(1).mean().item(),
        "reconstructions": frechet(heldout_outputs, data.heldout),
        "of_training_data": frechet(others, data.heldout),
        "samples": frechet(samples, data.heldout),
        "p_for_choosing": p_values[0],
        "p_values": p_values[1:],
    }
    if setting.fitted:
        with torch.enable_grad():
            fitted = priors.fit(
                net.model, net.guide, data.train,
                prior=MixturePrior(setting.fitted, setting.zdim, full_covariance=True),
                steps=3 if args.smoke else 10 * setting.fitted, batch_size=1000,
            )  # fmt: skip
        found["fitted_afterwards"] = frechet(in_parts(net.decoder, fitted().sample((n,))), data.heldout)
        last = list(tested(net, data))[-1]
        found["fitted_p"] = two_sample_test(last.cpu(), fitted().sample((len(last),)).cpu()).p_value
    return found


def tested(net: nn.Module, data: Data) -> Iterator[Tensor]:
    """Codes of the parts of the held-out data, of which the first is for choosing."""
    parts = max(2, len(data.heldout) // TESTED)
    for first in range(parts):
        yield encode(net, data.heldout[first::parts][:TESTED])


def encode(net: nn.Module, rows: Tensor) -> Tensor:
    """A code of each datum, drawn where the encoder is random."""
    codes = in_parts(net.encoder, rows)
    if net.is_vae:
        return codes + (net.log_scale(codes) - 2).exp() * torch.randn_like(codes)
    return codes + net.noise * torch.randn_like(codes)


def in_parts(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """A function of rows, a thousand at a time."""
    return torch.cat([function(part) for part in rows.split(1000)])


# Everything


WORKER = argparse.Namespace()
"""The options of this process where it is a worker, its own device among them."""


def as_row(job: tuple[str, Setting, int], args: argparse.Namespace = WORKER) -> dict[str, Any]:
    """Trains and measures one setting of a table with one seed."""
    table, setting, seed = job
    data = load_data(setting.data or args.data, args.root, args.smoke, args.classifier).to(args.device)
    row: dict[str, Any] = {"table": table, "seed": seed, **dataclasses.asdict(setting)}
    row |= {"data": setting.data or args.data, "epochs": setting.epochs or args.epochs or data.epochs}
    try:
        net, shown = train(setting, seed, data, args)
        row |= {**shown, **judge(net, data, setting, args)}
    except Exception as error:  # one row less is no reason to lose the others
        row["failure"] = f"{type(error).__name__}: {error}"[:300]
    return row


def start_worker(devices: Any, args: argparse.Namespace) -> None:
    """Gives a new process one of the devices for all of its work."""
    set_up(args.threads)
    vars(WORKER).update(vars(args), device=devices.get())


def run(jobs: list[tuple[str, Setting, int]], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of all jobs, from a process for each device named."""
    if len(args.devices) == 1:
        args.device = args.devices[0]
        yield from (as_row(job, args) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    devices = context.SimpleQueue()
    for device in args.devices:
        devices.put(device)
    with context.Pool(len(args.devices), start_worker, (devices, args)) as pool:
        yield from pool.imap_unordered(as_row, jobs)


BENCH = Benchmark(__file__, page, smoke={"seeds": [0]})
BENCH.option("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; all if left out")
BENCH.option("--data", choices=("bundled", "mnist"), default="bundled", help="of the digits")
BENCH.option("--root", default="./mnist", help="folder of the full MNIST")
BENCH.option("--seeds", type=int, nargs="+", default=[0, 1, 2])
BENCH.option("--epochs", type=int, help="of each training; by default 40, or 10 of the full MNIST")
BENCH.option("--only", default="", help="settings that have this in their name, penalty or nets")
BENCH.option("--devices", nargs="+", default=["cpu"], help="a process for each, such as cpu cpu cuda")
BENCH.option("--classifier", type=Path, help="file of the classifier, written where missing")


def main(argv: list[str] | None = None) -> None:
    """Trains everything, seed by seed, and writes what there is after each training."""
    args = BENCH.start(argv)
    unknown = [name for name in args.tables if name not in TABLES]
    if unknown:
        BENCH.parser.error(f"no table is called {unknown[0]!r}; these are {', '.join(TABLES)}")
    settings = chosen(args.tables or list(TABLES), args.only)
    if not settings:
        BENCH.parser.error(f"no setting has {args.only!r} in its name, penalty or nets: write --only IMQ")
    if args.classifier is not None:
        load_data(args.data, args.root, args.smoke, args.classifier)
    reports = {name: BENCH.report(args, results=[]) for name, _ in settings}
    for name, report in reports.items():
        report["options"]["name"] = f"quality_{name}" + ("_mnist" if args.data == "mnist" else "")
    for row in run([(name, setting, seed) for seed in args.seeds for name, setting in settings], args):
        shown = {key: row[key] for key in ("test_cost", "samples", "p_values", "ms", "failure") if key in row}
        print(row["table"], row["name"], row["nets"], row["weight"], row["seed"], shown, flush=True)
        report = reports[row["table"]]
        report["results"].append(row)
        BENCH.write(report)
    for report in reports.values():
        BENCH.finish(report)


if __name__ == "__main__":
    main()
