"""Which penalty? Trains the same nets on the bundled digits with each of them, and measures what they reach.

    python benchmarks/penalties.py

All penalties of one seed start from the same nets, see the same batches, and are trained in turns, one step each, so
that their times are comparable on a machine that has other work to do. After each seed the table is printed, and
written with all its numbers to ``--out``.
"""

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from harness import Benchmark, Report, made_by, mean_and_spread, progress, seeds_of, table
from pyro.infer import SVI
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus
from torchmetrics.image.fid import FrechetInceptionDistance

from pyro_wae import WAELoss, kernels, penalties, weights
from pyro_wae.demo.digits import load_digits
from pyro_wae.demo.nets import DigitWAE
from pyro_wae.kernels import InverseMultiquadratic
from pyro_wae.penalties import MMD, JensenShannon, Penalty, PenaltyContext

MMD_WEIGHT = 100.0
SHIFT, SCALE = 0.2, 1.2
"""Codes at which the penalties' gradients are compared, SHIFT + SCALE N(0, I): near the prior, and not on it."""


@dataclass(frozen=True)
class Choice:
    """A penalty of the table.

    Args:
        line: The line that makes it; it is this that runs.
        weight: The penalty weight, the line that makes it, or None for the one whose gradient is as large as MMD's.
        stochastic: Whether it needs a guide that draws its codes.
    """

    line: str
    weight: float | str | None = None
    stochastic: bool = False

    def make(self) -> Penalty:
        """Runs the line."""
        return eval(self.line, {**vars(kernels), **vars(penalties)})


CHOICES = {
    "none": Choice("MMD()", 0.0),
    "mmd": Choice("MMD()", MMD_WEIGHT),
    "mmd-draws": Choice("MMD(closed_form=False)"),
    "mmd-standardized": Choice("MMD(standardize=True)"),
    "mmd-gaussian": Choice("MMD(Gaussian())"),
    "energy": Choice("EnergyDistance()"),
    "sliced": Choice("SlicedWasserstein()"),
    "max-sliced": Choice("MaxSlicedWasserstein()"),
    "sinkhorn": Choice("Sinkhorn()"),
    "cramer-wold": Choice("CramerWold()"),
    "stein": Choice("KernelStein()"),
    # By hand: matched to MMD where the discriminator is at its optimum, the weight is too large for one that learns
    # one step at a time.
    "gan": Choice("JensenShannon()", 100.0),
    "gan-shared": Choice("JensenShannon(optimizer=None)", 20.0),
    "gan-log-prior": Choice("JensenShannon(optimizer=None, prior_log_prob=True)", 20.0),
    "mmd-log-variance": Choice("MMD() + LogVarianceL1(0.001)", MMD_WEIGHT, stochastic=True),
    "mmd-unit-variance": Choice("MMD() + UnitVarianceKL(0.001)", MMD_WEIGHT, stochastic=True),
}
BASELINE = "mmd"
DEFAULT_CHOICES = [name for name, choice in CHOICES.items() if not choice.stochastic]
CHOICES |= {
    "mmd-30": Choice("MMD()", 30.0),
    "mmd-300": Choice("MMD()", 300.0),
    "mmd-1000": Choice("MMD()", 1000.0),
    "mmd-linear": Choice("MMD()", "LinearSchedule(0.0, 200.0, steps=500)"),
    "mmd-constraint": Choice("MMD()", "Constraint()"),
    "mmd-constraint-300": Choice("MMD()", "Constraint(codes=300)"),
}


class StochasticDigitWAE(DigitWAE):
    """The same nets with an encoder that gives a Normal distribution of codes, for the guards of its variance."""

    def __init__(self, zdim: int) -> None:
        super().__init__(zdim)
        last = self.encoder[-1]
        self.encoder[-1] = nn.Linear(last.in_features, 2 * zdim)

    def encode(self, x: Tensor) -> dist.Normal:
        """The distribution of each digit's code."""
        loc, scale = self.encoder(x).chunk(2, -1)
        return dist.Normal(loc, 1e-3 + softplus(scale))

    def guide(self, x: Tensor) -> None:
        """The encoder, with noise."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encode(x).to_event(1))


class DigitClassifier(nn.Module):
    """A small classifier of digits, whose last hidden layer is the space of the Frechet distance."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 7 * 7, self.num_features), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(self.num_features, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (n, 1, 28, 28) to features (n, 64)."""
        return self.features(x)

    def learn(self, images: Tensor, labels: Tensor, *, epochs: int, batch_size: int) -> None:
        """Trains features and head, and then fixes them."""
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(batch_size):
                optimizer.zero_grad()
                cross_entropy(self.head(self(images[batch])), labels[batch]).backward()
                optimizer.step()
        self.requires_grad_(False)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of digits that it knows."""
        return (self.head(self(images)).argmax(1) == labels).double().mean().item()


class Training:
    """The nets, loss and optimiser of one penalty and seed, apart from those of the others."""

    def __init__(self, choice: Choice, weight: float | str, seed: int, args: argparse.Namespace) -> None:
        pyro.set_rng_seed(seed)
        self.wae = (StochasticDigitWAE if choice.stochastic else DigitWAE)(args.zdim)
        if args.encoder == "batch":
            for index, layer in enumerate(self.wae.encoder):
                if isinstance(layer, nn.GroupNorm):
                    self.wae.encoder[index] = nn.BatchNorm2d(layer.num_channels)
        self.wae.train()
        weight = eval(weight, vars(weights)) if isinstance(weight, str) else weight
        self.loss = WAELoss(penalty=choice.make(), penalty_weight=weight)
        self.optimizer = pyro.optim.CosineAnnealingLR(
            {"optimizer": torch.optim.Adam, "optim_args": adam_args, "T_max": args.steps}
        )
        self.svi = SVI(self.wae.model, self.wae.guide, self.optimizer, loss=self.loss)
        self.seconds: list[float] = []
        self.failure: str | None = None
        self._store = {"params": {}, "constraints": {}}
        self._random = pyro.util.get_rng_state()

    def step(self, images: Tensor) -> None:
        """Takes one step and its time; after a NaN, none."""
        if self.failure is not None:
            return
        pyro.util.set_rng_state(self._random)
        with pyro.get_param_store().scope(self._store):
            start = time.perf_counter()
            try:
                self.svi.step(images)
                self.optimizer.step()
            except ValueError as error:
                self.failure = str(error)
            self.seconds.append(time.perf_counter() - start)
        self._random = pyro.util.get_rng_state()

    def codes(self, images: Tensor) -> Tensor:
        """A draw of the code of each image."""
        return (
            self.wae.encode(images).sample() if isinstance(self.wae, StochasticDigitWAE) else self.wae.encoder(images)
        )


def adam_args(name: str) -> dict[str, Any]:
    """The settings of the optimiser for a parameter, by its name as in ``nn.Module.named_parameters``."""
    if name.startswith("wae_penalty."):
        return {"lr": 1e-3, "betas": (0.5, 0.99)}
    return {"lr": 1e-3}


class Judge:
    """Measures a trained auto-encoder on digits that it has not seen."""

    def __init__(self, classifier: DigitClassifier, images: Tensor, args: argparse.Namespace) -> None:
        self.images, self.args = images, args
        self.frechet = FrechetInceptionDistance(feature=classifier, reset_real_features=False, normalize=True)
        self.frechet.update(images, real=True)
        self.mmd = MMD(InverseMultiquadratic.multiscale(bandwidth=math.sqrt(2.0 * args.zdim)))
        self.context = context_of_normal(args.zdim)
        self.null = torch.tensor(
            [self.mmd2(torch.randn(len(images), args.zdim)) for _ in progress(range(args.null), "null")]
        )

    def mmd2(self, codes: Tensor) -> float:
        """The unbiased MMD^2 of codes and prior, whose terms are known in closed form."""
        return self.mmd(codes, codes.new_empty(2, codes.shape[1]).normal_(), self.context).item()

    def p_value(self, mmd2: float) -> float:
        """The share of sets of prior draws, as many as codes, that stray as far; the codes count as one of the sets."""
        return (1 + (self.null >= mmd2).sum().item()) / (1 + len(self.null))

    def frechet_distance(self, images: Tensor) -> float:
        """The Frechet distance of images and test digits in the classifier's feature space."""
        self.frechet.reset()
        self.frechet.update(images, real=False)
        return self.frechet.compute().item()

    @torch.no_grad()
    def __call__(self, training: Training) -> dict[str, float]:
        """Measures everything but the time."""
        training.wae.eval()
        pyro.set_rng_seed(0)
        codes = training.codes(self.images)
        mmd2 = self.mmd2(codes)
        return {
            "weight": float(training.loss.terms.weight),
            "test_cost": (training.wae.decoder(codes) - self.images).square().sum((1, 2, 3)).mean().item(),
            "frechet": self.frechet_distance(training.wae.decoder(torch.randn(self.args.samples, self.args.zdim))),
            "mmd2": mmd2,
            "p_value": self.p_value(mmd2),
            "mean": codes.mean(0).norm().item(),
            "spread": codes.var(0).mean().sqrt().item(),
        }


class OptimalLogit(nn.Module):
    """log p/q of the prior N(0, I) and codes SHIFT + SCALE N(0, I): what a discriminator learns in the end."""

    def __init__(self, prior_log_prob: bool) -> None:
        super().__init__()
        self.prior_log_prob = prior_log_prob

    def forward(self, z: Tensor) -> Tensor:
        """Maps codes (n, d) to logits (n,), without log p where the penalty adds it."""
        log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(1)
        log_q = dist.Normal(SHIFT, SCALE).log_prob(z).sum(1)
        return -log_q if self.prior_log_prob else log_p - log_q


def context_of_normal(zdim: int) -> PenaltyContext:
    """What WAELoss tells a penalty of the prior N(0, I)."""
    prior = dist.Normal(torch.zeros(zdim), 1.0).to_event(1)
    return PenaltyContext(
        prior=lambda: prior, prior_log_prob=prior.log_prob, encoder_variance=lambda: torch.ones(1, 2, zdim)
    )


def gradient_norm(choice: Choice, args: argparse.Namespace) -> float:
    """The root mean square, over batches of codes near the prior, of the norm of the penalty's gradient there."""
    pyro.set_rng_seed(0)
    penalty, context, squares = choice.make(), context_of_normal(args.zdim), []
    if isinstance(penalty, JensenShannon):
        penalty.discriminator, penalty.optimizer = OptimalLogit(penalty.prior_log_prob), None
    for _ in range(args.repeats):
        codes = (SHIFT + SCALE * torch.randn(args.batch_size, args.zdim)).requires_grad_()
        (gradient,) = torch.autograd.grad(penalty(codes, torch.randn(args.batch_size, args.zdim), context), codes)
        squares.append(gradient.square().sum().item())
    return math.sqrt(statistics.fmean(squares))


def one_digit(x: float) -> float:
    """Rounds to one significant digit."""
    return float(f"{x:.0e}")


def page(report: Report) -> str:
    """The table as Markdown, and under it how it came about."""
    header = [
        "penalty", "the line that makes it", "weight", "at the end", "gradient", "test cost", "Frechet", "test MMD^2",
        "p", "mean", "spread", "ms/step", "x MMD",
    ]  # fmt: skip
    rows = []
    for name, settings in report["penalties"].items():
        results = [result for result in report["results"] if result["penalty"] == name]
        finished = [result for result in results if "failure" not in result]
        if not results:
            continue

        def column(key: str, form: str, finished: list[dict[str, Any]] = finished, factor: float = 1) -> str:
            return mean_and_spread([factor * result[key] for result in finished if key in result], form)

        failed = len(results) - len(finished)
        p_values = [result["p_value"] for result in finished]
        rows.append(
            [
                name + (f" ({failed} of {len(results)} diverged)" if failed else ""),
                f"`{settings['line']}`",
                f"`{settings['weight']}`" if isinstance(settings["weight"], str) else f"{settings['weight']:g}",
                column("weight", ".0f"),
                f"{settings['gradient']:.2g}",
                column("test_cost", ".1f"),
                column("frechet", ".2f"),
                column("mmd2", ".4f"),
                f"{statistics.median(p_values):.3f}" if p_values else "-",
                column("mean", ".2f"),
                column("spread", ".3f"),
                column("seconds", ".0f", results, 1000),
                column("ratio", ".2f", results),
            ]
        )
    return f"{table(header, rows)}\n\n{caption(report)}"


def caption(report: dict[str, Any]) -> str:
    """What the columns are, and the command."""
    options, reference = report["options"], report["reference"]
    batch, samples, null, tests = options["batch_size"], options["samples"], options["null"], reference["test_digits"]
    return f"""{made_by(report)}
{seeds_of(report["results"])}, {options["steps"]} steps of {batch} digits, {options["zdim"]} numbers in a code,
{options["encoder"].capitalize()}Norm in the encoder, Adam at 0.001 lowered to 0 along a cosine (a discriminator
with betas of 0.5 and 0.99).

- *at the end*: the weight of the last step.
- *gradient*: norm of the penalty's gradient over that of `MMD()`, for {batch} codes of {SHIFT} + {SCALE} N(0, I);
  root mean square over {options["repeats"]} batches, so that sampling noise counts, and with the best of
  discriminators. The weight is 100 over it, rounded to one digit, except for `none`, `JensenShannon`, guards
  and what `--weight` sets.
- *test cost*: squared error of a test digit, summed over its pixels.
- *Frechet*: distance of {samples} samples from {tests} test digits, in the last hidden layer of a classifier
  that knows {100 * reference["accuracy"]:.1f} % of them. Training digits in the place of samples have
  {reference["frechet"]:.2f}.
- *test MMD^2*: unbiased, seven inverse multiquadratic kernels around C = {2 * options["zdim"]}, codes of the {tests}
  test digits in evaluation mode against the prior in closed form.
- *p*: its p-value, median over seeds, against {null} sets of as many prior draws, whose MMD^2 has a standard
  deviation of {reference["null_std"]:.5f}; {1 / (1 + null):.3f} is the smallest possible.
- *mean*: norm of the mean of the test codes; *spread*: root of their mean variance. The prior has 0 and 1.
- *ms/step*: median wall time, which other work on the machine lengthens; *x MMD*: over that of `MMD()`, measured
  in the same minutes, because all penalties take their steps in turns.
"""


def override(text: str) -> tuple[str, float]:
    """Reads NAME=VALUE."""
    name, _, value = text.partition("=")
    if name not in CHOICES:
        raise argparse.ArgumentTypeError(f"found {name!r}; write NAME=VALUE with a name of {list(CHOICES)}")
    return name, float(value)


BENCH = Benchmark(__file__, page, smoke={"steps": 2, "seeds": 1, "samples": 100, "null": 9, "repeats": 2})
BENCH.option("--data", choices=("bundled", "mnist"), default="bundled", help="12,000 digits, or all 70,000")
BENCH.option("--root", default="./mnist", help="folder of the full MNIST")
BENCH.option("--steps", type=int, default=800, help="of each training")
BENCH.option("--seeds", type=int, default=3, help="number of trainings with each penalty")
BENCH.option(
    "--penalties",
    nargs="+",
    choices=list(CHOICES),
    default=DEFAULT_CHOICES,
    metavar="NAME",
    help="mmd is always trained",
)
BENCH.option("--weight", nargs="+", type=override, default=[], metavar="NAME=VALUE", help="set by hand")
BENCH.option("--encoder", choices=("group", "batch"), default="group", help="its normalisation")
BENCH.option("--batch-size", type=int, default=100)
BENCH.option("--zdim", type=int, default=8, help="numbers in a code")
BENCH.option("--samples", type=int, default=5000, help="for the Frechet distance")
BENCH.option("--null", type=int, default=199, help="sets of prior draws for the p-value")
BENCH.option("--repeats", type=int, default=200, help="batches to compare gradients on")
BENCH.option("--name", default="penalties", help="of the files that are written")


def batches(images: Tensor, seed: int, args: argparse.Namespace) -> list[Tensor]:
    """The batches of all steps, the same for every penalty."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    while len(found) < args.steps:
        found += torch.randperm(len(images), generator=generator).split(args.batch_size)
    return found[: args.steps]


def main(argv: list[str] | None = None) -> None:
    """Trains, measures and reports, seed by seed."""
    args = BENCH.start(argv)
    train_images, train_labels, test_images, test_labels = load_digits(args.data, root=args.root)
    if args.smoke:
        train_images, train_labels = train_images[:300], train_labels[:300]
        test_images, test_labels = test_images[:200], test_labels[:200]

    names = list(dict.fromkeys([BASELINE, *args.penalties]))
    gradients = {name: gradient_norm(CHOICES[name], args) for name in names}
    given = dict(args.weight)
    settings = {}
    for name in CHOICES:
        if name in names:
            choice, gradient = CHOICES[name], gradients[name] / gradients[BASELINE]
            weight = one_digit(MMD_WEIGHT / gradient) if choice.weight is None else choice.weight
            settings[name] = {"line": choice.line, "weight": given.get(name, weight), "gradient": gradient}

    pyro.set_rng_seed(0)
    classifier = DigitClassifier()
    classifier.learn(train_images, train_labels, epochs=1 if args.smoke else 5, batch_size=args.batch_size)
    judge = Judge(classifier, test_images, args)
    report = BENCH.report(
        args,
        penalties=settings,
        reference={
            "test_digits": len(test_images),
            "accuracy": classifier.accuracy(test_images, test_labels),
            "frechet": judge.frechet_distance(train_images[: args.samples]),
            "null_std": judge.null.std().item(),
        },
        results=[],
    )
    for seed in range(args.seeds):
        trainings = {name: Training(CHOICES[name], settings[name]["weight"], seed, args) for name in settings}
        for batch in progress(batches(train_images, seed, args), f"seed {seed}"):
            for training in trainings.values():
                training.step(train_images[batch])
        baseline = statistics.median(trainings[BASELINE].seconds)
        for name, training in trainings.items():
            seconds = statistics.median(training.seconds)
            result = {"penalty": name, "seed": seed, "seconds": seconds, "ratio": seconds / baseline}
            measured = judge(training) if training.failure is None else {"failure": training.failure}
            report["results"].append({**result, **measured})
            BENCH.write(report)
    BENCH.finish(report)


if __name__ == "__main__":
    main()
