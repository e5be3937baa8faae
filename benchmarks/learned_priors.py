"""Which prior? Trains the same nets on digits with a fixed prior and with learned ones, and compares their samples.

    python benchmarks/learned_priors.py

How far samples are from digits, over how far reconstructions are, is what the prior spoils: both go through the same
decoder. All trainings of one seed start from the same nets and see the same batches. After each the table is written
to ``--out`` with all its numbers.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from harness import Benchmark, Report, made_by, mean_and_spread, progress, seeds_of, table
from penalties import DigitClassifier
from pyro.distributions import transforms
from pyro.infer import SVI
from torch import Tensor, nn
from torch.nn.functional import softplus
from torchmetrics.image.fid import FrechetInceptionDistance

from pyro_wae import WAELoss
from pyro_wae.demo.digits import load_digits
from pyro_wae.demo.nets import DigitWAE
from pyro_wae.penalties import MMD, Penalty, PriorLikelihood
from pyro_wae.priors import MixturePrior, VampPrior
from pyro_wae.weights import Constraint

LEARNED = "MMD(closed_form=False) + PriorLikelihood()"


class PriorWAE(DigitWAE):
    """The nets of the quickstart with any prior."""

    def __init__(self, zdim: int) -> None:
        super().__init__(zdim)
        self.prior: nn.Module = StandardNormal(zdim)

    def model(self, x: Tensor) -> None:
        """The prior of the codes and the decoder."""
        pyro.module("decoder", self.decoder)
        pyro.module("prior", self.prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(3), obs=x)

    def draw(self, n: int) -> Tensor:
        """Draws of the prior, shape (n, zdim)."""
        return self.prior().sample((n,))


class StandardNormal(nn.Module):
    """The fixed prior N(0, I)."""

    def __init__(self, zdim: int) -> None:
        super().__init__()
        self.zdim = zdim

    def forward(self) -> Any:
        """The prior of one code."""
        return dist.Normal(torch.zeros(self.zdim), 1.0).to_event(1)


class FlowPrior(nn.Module):
    """N(0, I) through coupling layers, with the halves of a code in turns."""

    def __init__(self, zdim: int, layers: int = 6) -> None:
        super().__init__()
        self.zdim = zdim
        self.couplings = nn.ModuleList(transforms.affine_coupling(zdim, [64, 64]) for _ in range(layers))
        self.swap = transforms.Permute(torch.arange(zdim).flip(0))

    def forward(self) -> Any:
        """The prior of one code."""
        parts = [part for coupling in self.couplings for part in (coupling, self.swap)]
        return dist.TransformedDistribution(dist.Normal(torch.zeros(self.zdim), 1.0).to_event(1), parts)


class HierarchicalWAE(PriorWAE):
    """Two layers of codes, z1 ~ N(0, I) and z2 ~ N(f(z1), s(z1)), each half of the numbers."""

    def __init__(self, zdim: int) -> None:
        super().__init__(zdim)
        self.half = zdim // 2
        self.prior = nn.Sequential(
            nn.Linear(zdim - self.half, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2 * self.half)
        )

    def lower(self, z1: Tensor) -> Any:
        """The prior of z2 given z1."""
        loc, scale = self.prior(z1).chunk(2, -1)
        return dist.Normal(loc, 1e-2 + softplus(scale)).to_event(1)

    def model(self, x: Tensor) -> None:
        """Both layers and the decoder."""
        pyro.module("decoder", self.decoder)
        pyro.module("prior", self.prior)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(self.zdim - self.half), 1.0).to_event(1))
            z2 = pyro.sample("z2", self.lower(z1))
            pyro.sample("x", dist.Normal(self.decoder(torch.cat([z1, z2], -1)), 1.0).to_event(3), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder, whose code is cut in two."""
        pyro.module("encoder", self.encoder)
        z1, z2 = self.encoder(x).split([self.zdim - self.half, self.half], -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Delta(z1).to_event(1))
            pyro.sample("z2", dist.Delta(z2).to_event(1))

    def draw(self, n: int) -> Tensor:
        """Draws of both layers."""
        z1 = torch.randn(n, self.zdim - self.half)
        return torch.cat([z1, self.lower(z1).sample()], -1)


@dataclass(frozen=True)
class Choice:
    """A prior of the table.

    Args:
        line: What makes it, for the table.
        make: Makes the prior of nets and training images; None if the nets have it.
        penalty: The line that makes the penalty.
        nets: The class of the nets.
        components: For a mixture fitted afterwards to the codes of ``normal``, how many.
        rate: The learning rate of the prior.
        weight: Makes the penalty weight where it is not that of all: a number, or what WAELoss takes in its place.
    """

    line: str
    make: Callable[[DigitWAE, Tensor], nn.Module] | None = None
    penalty: str = LEARNED
    nets: type[PriorWAE] = PriorWAE
    components: int | None = None
    rate: float = 0.001
    weight: Callable[[], Any] | None = None

    def make_penalty(self) -> Penalty:
        """Runs the line."""
        return eval(self.penalty, {"MMD": MMD, "PriorLikelihood": PriorLikelihood})

    def make_weight(self, args: argparse.Namespace) -> Any:
        """The penalty weight."""
        return args.weight if self.weight is None else self.weight()


def some_of(images: Tensor, n: int) -> Tensor:
    """Images to start from."""
    return images[torch.randperm(len(images))[:n]]


CHOICES = {
    "normal": Choice("N(0, I)", penalty="MMD()"),
    "normal-constraint": Choice("N(0, I)", penalty="MMD()", weight=lambda: Constraint(codes=1000)),
    "mixture-full": Choice(
        "MixturePrior(50, d, full_covariance=True)",
        lambda wae, x: MixturePrior(50, wae.zdim, full_covariance=True),
        rate=0.03,
    ),
    "gmm10-after": Choice("10 Gaussians fitted to the codes of normal", components=10),
    "gmm100-after": Choice("100 Gaussians fitted to the codes of normal", components=100),
    "mixture": Choice("MixturePrior(100, d)", lambda wae, x: MixturePrior(100, wae.zdim), rate=0.03),
    "flow": Choice("6 affine couplings", lambda wae, x: FlowPrior(wae.zdim), rate=0.003),
    "vamp": Choice("VampPrior(encoder, x[:100])", lambda wae, x: VampPrior(wae.encoder, some_of(x, 100)), rate=0.01),
    "hierarchical": Choice("z1 ~ N(0, I), z2 ~ N(f(z1), s(z1))", nets=HierarchicalWAE, rate=0.003),
    "vamp-free": Choice(
        "VampPrior(encoder, x[:100], standardized=False)",
        lambda wae, x: VampPrior(wae.encoder, some_of(x, 100), standardized=False),
        rate=0.01,
    ),
    "mixture-free": Choice(
        "MixturePrior(100, d, standardized=False)",
        lambda wae, x: MixturePrior(100, wae.zdim, standardized=False),
        rate=0.03,
    ),
    "mixture-by-mmd": Choice(
        "MixturePrior(100, d)",
        lambda wae, x: MixturePrior(100, wae.zdim),
        penalty="MMD(closed_form=False)",
        rate=0.03,
    ),
}
DEFAULT_CHOICES = list(CHOICES)[:9]


class Training:
    """The nets, prior, loss and optimiser of one training; encoder and decoder of one seed start alike."""

    def __init__(self, choice: Choice, images: Tensor, seed: int, args: argparse.Namespace) -> None:
        pyro.set_rng_seed(seed)
        self.wae = choice.nets(args.zdim)
        if args.encoder == "batch":
            for index, layer in enumerate(self.wae.encoder):
                if isinstance(layer, nn.GroupNorm):
                    self.wae.encoder[index] = nn.BatchNorm2d(layer.num_channels)
        if choice.make is not None:
            self.wae.prior = choice.make(self.wae, images)
        self.wae.train()
        self.loss = WAELoss(choice.make_penalty(), penalty_weight=choice.make_weight(args))

        def adam_args(name: str) -> dict[str, float]:
            return {"lr": choice.rate if name.startswith("prior.") else 1e-3}

        self.optimizer = pyro.optim.CosineAnnealingLR(
            {"optimizer": torch.optim.Adam, "optim_args": adam_args, "T_max": args.steps}
        )
        self.svi = SVI(self.wae.model, self.wae.guide, self.optimizer, loss=self.loss)
        self.seconds: list[float] = []

    def run(self, images: Tensor, batches: list[Tensor], label: str) -> None:
        """Takes all steps."""
        pyro.clear_param_store()
        for step, batch in enumerate(progress(batches, label)):
            start = time.perf_counter()
            if step == len(batches) // 5 and isinstance(self.wae.prior, MixturePrior):
                # A fresh encoder's codes are a small heap, on which most of the components lose their weight.
                with torch.no_grad():
                    self.wae.prior.initialise(self.wae.encoder(some_of(images, 2000)))
            self.svi.step(images[batch])
            self.optimizer.step()
            self.seconds.append(time.perf_counter() - start)
        self.wae.eval()


class Judge:
    """Measures trained nets and a prior on digits that were not trained on."""

    def __init__(
        self, classifier: DigitClassifier, images: Tensor, training_images: Tensor, args: argparse.Namespace
    ) -> None:
        self.images, self.training_images, self.args = images, training_images, args
        self.frechet = FrechetInceptionDistance(feature=classifier, reset_real_features=False, normalize=True)
        for part in images.split(1000):
            self.frechet.update(part, real=True)

    def frechet_distance(self, images: Tensor) -> float:
        """The Frechet distance of images and test digits in the classifier's feature space."""
        self.frechet.reset()
        for part in images.split(1000):
            self.frechet.update(part, real=False)
        return self.frechet.compute().item()

    @torch.no_grad()
    def __call__(self, wae: PriorWAE, draw: Callable[[int], Tensor]) -> dict[str, float]:
        """Measures everything but the time."""
        pyro.set_rng_seed(0)
        codes, n = encode(wae, self.images), len(self.images)
        outputs = decode(wae, codes)
        samples = statistics.fmean(self.frechet_distance(decode(wae, draw(n))) for _ in range(self.args.repeats))
        reconstructions = self.frechet_distance(outputs)
        unpaired = self.frechet_distance(decode(wae, encode(wae, self.training_images[:n])))
        compared = self.args.compared
        return {
            "test_cost": (outputs - self.images).square().sum((1, 2, 3)).mean().item(),
            "samples": samples,
            "reconstructions": reconstructions,
            "unpaired": unpaired,
            "ratio": samples / reconstructions,
            "mmd2": MMD(closed_form=False)(codes[:compared], draw(compared)).item(),
            "spread": codes.var(0).mean().sqrt().item(),
        }


def encode(wae: PriorWAE, images: Tensor) -> Tensor:
    """The codes of images, in parts."""
    return torch.cat([wae.encoder(part) for part in images.split(1000)])


def decode(wae: PriorWAE, codes: Tensor) -> Tensor:
    """The images of codes, in parts."""
    return torch.cat([wae.decoder(part) for part in codes.split(1000)])


def fitted_afterwards(wae: PriorWAE, images: Tensor, components: int) -> tuple[Callable[[int], Tensor], float]:
    """A mixture fitted to the codes of training images: its draws, and the seconds that it took."""
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise ImportError(
            'A mixture is fitted afterwards by scikit-learn: pip install "pyro-wae[test]". Without it, leave '
            "gmm10-after and gmm100-after out: --priors normal mixture vamp flow hierarchical"
        ) from error
    with torch.no_grad():
        codes = encode(wae, images)
    start = time.perf_counter()
    mixture = GaussianMixture(min(components, len(codes) // 2), random_state=0).fit(codes.double().numpy())
    seconds = time.perf_counter() - start

    def draw(n: int) -> Tensor:
        rows = torch.from_numpy(mixture.sample(n)[0]).float()
        return rows[torch.randperm(n)]  # they come sorted by component

    return draw, seconds


def page(report: Report) -> str:
    """The table as Markdown, and under it how it came about."""
    header = [
        "prior", "what makes it", "penalty", "weight", "rate", "test cost", "samples", "reconstructions",
        "of training digits", "ratio", "test MMD^2", "spread", "ms/step",
    ]  # fmt: skip
    rows = []
    for name, settings in report["priors"].items():
        results = [result for result in report["results"] if result["prior"] == name]
        if not results:
            continue

        def column(key: str, form: str, results: list[dict[str, Any]] = results, factor: float = 1) -> str:
            return mean_and_spread([factor * result[key] for result in results if key in result], form)

        rows.append(
            [
                name,
                settings["line"],
                f"`{settings['penalty']}`",
                f"`{settings['weight']}`",
                settings["rate"],
                column("test_cost", ".1f"),
                column("samples", ".1f"),
                column("reconstructions", ".1f"),
                column("unpaired", ".1f"),
                column("ratio", ".2f"),
                column("mmd2", ".4f"),
                column("spread", ".2f"),
                column("seconds", ".0f", factor=1000),
            ]
        )
    return f"{table(header, rows)}\n\n{caption(report)}"


def caption(report: dict[str, Any]) -> str:
    """What the columns are, and the command."""
    options, reference = report["options"], report["reference"]
    tests = reference["test_digits"]
    return f"""{made_by(report)}
{seeds_of(report["results"])}, {options["epochs"]} epochs of {reference["training_digits"]} digits,
in batches of {options["batch_size"]}, {options["zdim"]} numbers in a code,
{options["encoder"].capitalize()}Norm in the encoder, Adam at 0.001 (the prior at *rate*), lowered to 0 along a cosine.
A `MixturePrior` is put onto the codes after a fifth of the steps.

- *test cost*: squared error of a test digit, summed over its pixels.
- *samples*: Frechet distance of {tests} decoded prior draws from the {tests} test digits, in the last hidden layer of a
  classifier that knows {100 * reference["accuracy"]:.1f} % of them; mean over {options["repeats"]} sets of draws.
  {reference["floor_digits"]} training digits in the place of samples have {reference["frechet"]:.2f}.
- *reconstructions*: the same of what comes back of the {tests} test digits, which are compared with themselves
  and so are spared that part. *of training digits*: of what comes back of {reference["floor_digits"]} others,
  which are not.
- *ratio*: *samples* over *reconstructions*.
- *test MMD^2*: unbiased, of {options["compared"]} test codes and as many prior draws; its kernel's lengths are
  taken from the prior draws.
- *spread*: root of the mean variance of a number of the test codes.
- *ms/step*: median wall time, which other work on the machine lengthens. A mixture that is fitted afterwards
  took {fit_seconds(report)}.
"""


def fit_seconds(report: dict[str, Any]) -> str:
    """How long the mixtures took that were fitted afterwards."""
    fits = {result["prior"]: result["fit_seconds"] for result in report["results"] if "fit_seconds" in result}
    return ", ".join(f"{seconds:.0f} s ({name})" for name, seconds in fits.items()) or "no time here: none was"


BENCH = Benchmark(__file__, page, smoke={"epochs": 1, "seeds": 1, "compared": 100, "repeats": 1})
BENCH.option("--data", choices=("bundled", "mnist"), default="bundled", help="12,000 digits, or all 70,000")
BENCH.option("--root", default="./mnist", help="folder of the full MNIST")
BENCH.option("--epochs", type=int, default=10, help="of each training")
BENCH.option("--seeds", type=int, default=1, help="number of trainings with each prior")
BENCH.option(
    "--priors",
    nargs="+",
    choices=list(CHOICES),
    default=DEFAULT_CHOICES,
    metavar="NAME",
    help="normal is always trained",
)
BENCH.option("--weight", type=float, default=200.0, help="of the penalty")
BENCH.option("--encoder", choices=("group", "batch"), default="group", help="its normalisation")
BENCH.option("--batch-size", type=int, default=100)
BENCH.option("--zdim", type=int, default=8, help="numbers in a code")
BENCH.option("--repeats", type=int, default=5, help="sets of samples for their mean Frechet distance")
BENCH.option("--compared", type=int, default=2000, help="codes and prior draws for the test MMD^2")
BENCH.option("--name", default="learned_priors", help="of the files that are written")


def batches(n: int, seed: int, args: argparse.Namespace) -> list[Tensor]:
    """The batches of all steps, the same for every prior; none is smaller than the others."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = n // args.batch_size
    return [
        batch
        for _ in range(args.epochs)
        for batch in torch.randperm(n, generator=generator).split(args.batch_size)[:per_epoch]
    ]


def main(argv: list[str] | None = None) -> None:
    """Trains, measures and reports, prior by prior."""
    args = BENCH.start(argv)
    train_images, train_labels, test_images, test_labels = load_digits(args.data, root=args.root)
    if args.smoke:
        train_images, train_labels = train_images[:300], train_labels[:300]
        test_images, test_labels = test_images[:200], test_labels[:200]
    args.steps = args.epochs * (len(train_images) // args.batch_size)

    pyro.set_rng_seed(0)
    classifier = DigitClassifier()
    classifier.learn(train_images, train_labels, epochs=1 if args.smoke else 5, batch_size=args.batch_size)
    judge = Judge(classifier, test_images, train_images, args)
    names = [name for name in CHOICES if name == "normal" or name in args.priors]
    floor_digits = min(len(train_images), len(test_images))
    report = BENCH.report(
        args,
        priors={
            name: {
                "line": CHOICES[name].line,
                "penalty": CHOICES["normal" if CHOICES[name].components else name].penalty,
                "rate": f"{CHOICES[name].rate:g}" if "normal" not in name and not CHOICES[name].components else "-",
                "weight": str(CHOICES[name].make_weight(args)).removesuffix(".0"),
            }
            for name in names
        },
        reference={
            "training_digits": len(train_images),
            "test_digits": len(test_images),
            "accuracy": classifier.accuracy(test_images, test_labels),
            "floor_digits": floor_digits,
            "frechet": judge.frechet_distance(train_images[:floor_digits]),
        },
        results=[],
    )
    for seed in range(args.seeds):
        order = batches(len(train_images), seed, args)
        fixed: PriorWAE | None = None
        for name in names:
            choice, result = CHOICES[name], {"prior": name, "seed": seed}
            if choice.components is None:
                training = Training(choice, train_images, seed, args)
                training.run(train_images, order, f"{name}, seed {seed}")
                wae, draw = training.wae, training.wae.draw
                result["seconds"] = statistics.median(training.seconds)
                fixed = wae if name == "normal" else fixed
            else:
                wae = fixed
                draw, result["fit_seconds"] = fitted_afterwards(wae, train_images, choice.components)
            report["results"].append({**result, **judge(wae, draw)})
            BENCH.write(report)
    BENCH.finish(report)


if __name__ == "__main__":
    main()
