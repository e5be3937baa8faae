"""The same nets and data with pythae, with Pyro's own ELBO and with this library.

    python benchmarks/peers.py

All contenders train the same nets on the same batches with Adam at the same rate. What they reach is judged on digits
that are held out of the training set: squared error, Frechet distance of reconstructions and of samples in the
features of a small classifier, and a two-sample test between codes and prior.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from harness import Benchmark, Report, made_by, progress, table
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_wae import WAELoss
from pyro_wae.demo.digits import load_digits
from pyro_wae.demo.judge import DigitClassifier
from pyro_wae.demo.nets import StandardNormal, deep_head
from pyro_wae.diagnostics import two_sample_test
from pyro_wae.optim import Adam
from pyro_wae.penalties import MMD, JensenShannon, PriorLikelihood
from pyro_wae.priors import MixturePrior

PIXELS, TESTED, RATE, PRIOR_RATE = 784, 1000, 1e-3, 3e-2


class Nets(nn.Module):
    """An encoder, with scales where it is that of a VAE, a decoder, and a prior."""

    def __init__(self, zdim: int, *, stochastic: bool = False, prior: nn.Module | None = None) -> None:
        super().__init__()
        self.zdim, self.stochastic = zdim, stochastic
        self.encoder = nn.Sequential(nn.Flatten(), *deep_head(PIXELS, 2 * zdim if stochastic else zdim))
        self.decoder = nn.Sequential(*deep_head(zdim, PIXELS), nn.Sigmoid())
        self.prior = StandardNormal(zdim) if prior is None else prior
        self.scale = 1.0

    def posterior(self, x: Tensor) -> Any:
        """The distribution of codes, a point where the encoder is deterministic."""
        if not self.stochastic:
            return dist.Delta(self.encoder(x)).to_event(1)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def model(self, x: Tensor) -> None:
        """Prior and decoder."""
        pyro.module("decoder", self.decoder)
        pyro.module("prior", self.prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))


Train = Callable[[int, Iterator[Tensor]], Nets]


def with_pyro(make: Callable[[int], tuple[Nets, Any]]) -> Train:
    """Trains by SVI, with nets and a loss."""

    def train(zdim: int, batches: Iterator[Tensor]) -> Nets:
        pyro.clear_param_store()
        nets, loss = make(zdim)
        svi = SVI(
            nets.model,
            nets.guide,
            Adam(lambda name: {"lr": PRIOR_RATE if name.startswith("prior.") else RATE}),
            loss=loss,
        )
        for batch in batches:
            svi.step(batch)
        return nets

    return train


def vae(scale: float) -> Train:
    """A VAE by Pyro's ELBO."""

    def make(zdim: int) -> tuple[Nets, Any]:
        nets = Nets(zdim, stochastic=True)
        nets.scale = scale
        return nets, Trace_ELBO()

    return with_pyro(make)


def with_pythae(kind: str, config_name: str, *, stochastic: bool = False, **options: Any) -> Train:
    """Trains a model of pythae around the same nets, in a loop of its gradients; its trainer does the same."""

    def train(zdim: int, batches: Iterator[Tensor]) -> Nets:
        from pythae import models
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn import BaseDecoder, BaseEncoder

        nets = Nets(zdim, stochastic=stochastic)

        class Encoder(BaseEncoder):
            def __init__(self) -> None:
                super().__init__()
                self.net = nets.encoder

            def forward(self, x: Tensor) -> Any:
                loc, *log_scale = self.net(x).chunk(2 if stochastic else 1, -1)
                return ModelOutput(embedding=loc, log_covariance=2 * log_scale[0] if log_scale else None)

        class Decoder(BaseDecoder):
            def __init__(self) -> None:
                super().__init__()
                self.net = nets.decoder

            def forward(self, z: Tensor) -> Any:
                return ModelOutput(reconstruction=self.net(z))

        config = getattr(models, config_name)(input_dim=(PIXELS,), latent_dim=zdim, **options)
        model = getattr(models, kind)(config, Encoder(), Decoder())
        optimizer = torch.optim.Adam(model.parameters(), RATE)
        for batch in batches:
            optimizer.zero_grad()
            model({"data": batch}).loss.backward()
            optimizer.step()
        return nets

    return train


CONTENDERS: dict[str, Train] = {
    "pythae, `WAE_MMD_Config()`": with_pythae("WAE_MMD", "WAE_MMD_Config"),
    "pythae, `WAE_MMD_Config(reg_weight=100)`": with_pythae("WAE_MMD", "WAE_MMD_Config", reg_weight=100.0),
    "pythae, `VAEConfig()`": with_pythae("VAE", "VAEConfig", stochastic=True),
    "Pyro, `Trace_ELBO()`, decoder scale 0.15": vae(0.15),
    "pyro_wae, `WAELoss()`": with_pyro(lambda d: (Nets(d), WAELoss())),
    "pyro_wae, `WAELoss(JensenShannon())`": with_pyro(lambda d: (Nets(d), WAELoss(JensenShannon()))),
    "pyro_wae, `MixturePrior`, `WAELoss(MMD() + PriorLikelihood(), penalty_weight=100.0)`": with_pyro(
        lambda d: (Nets(d, prior=MixturePrior(100, d)), WAELoss(MMD() + PriorLikelihood(), penalty_weight=100.0))
    ),
}  # fmt: skip


@torch.no_grad()
def judge(nets: Nets, held_out: Tensor, classifier: DigitClassifier) -> dict[str, float]:
    """What the nets reach on held-out digits, of shape (n, 784)."""
    nets.eval()
    codes = nets.posterior(held_out)()
    outputs, prior = nets.decoder(codes), nets.prior()
    samples = nets.decoder(prior.sample((len(held_out),)))
    digits, outputs_as_images, samples = (images.view(-1, 1, 28, 28) for images in (held_out, outputs, samples))
    return {
        "cost": (outputs - held_out).square().sum(1).mean().item(),
        "reconstructions": classifier.frechet_distance(outputs_as_images, digits),
        "samples": classifier.frechet_distance(samples, digits),
        "p": two_sample_test(codes[:TESTED], prior).p_value,
    }


def measure(name: str, seed: int, args: argparse.Namespace, parts: Any, classifier: DigitClassifier) -> dict[str, Any]:
    """Trains one contender from one seed."""
    pyro.set_rng_seed(seed)
    train, held_out = parts

    def batches() -> Iterator[Tensor]:
        for epoch in range(args.epochs):
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1000 * seed + epoch))
            yield from (train[rows] for rows in order.split(args.batch))

    nets = CONTENDERS[name](args.zdim, batches())
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))
    return {"contender": name, "seed": seed, **judge(nets, held_out[order], classifier)}


def page(report: Report) -> str:
    """The table, and how it came about."""
    header = ["contender", "squared error", "Frechet, reconstructions", "Frechet, samples", "p of codes, by seed"]
    rows = []
    for name in dict.fromkeys(result["contender"] for result in report["results"]):
        own = [result for result in report["results"] if result["contender"] == name]
        means = (statistics.fmean(result[key] for result in own) for key in ("cost", "reconstructions", "samples"))
        rows.append([name, *(f"{mean:.1f}" for mean in means), " ".join(f"{result['p']:.3f}" for result in own)])
    options, seeds = report["options"], len(report["options"]["seeds"])
    return f"""{table(header, rows)}

{made_by(report)}
Means over {seeds} seed{"s" * (seeds > 1)}; {options["epochs"]} epochs of batches of {options["batch"]},
latent dimension {options["zdim"]}; 3000 held-out digits and as many samples, {TESTED} codes in each test.
"""


BENCH = Benchmark(__file__, page, smoke={"epochs": 1, "seeds": [0], "data": 300})
BENCH.option("--seeds", type=int, nargs="+", default=[0, 1, 2])
BENCH.option("--epochs", type=int, default=20)
BENCH.option("--batch", type=int, default=100)
BENCH.option("--zdim", type=int, default=8)
BENCH.option("--data", type=int, default=10_000, help="at most so many training digits")


def main(argv: list[str] | None = None) -> None:
    """Trains all, and reports."""
    args = BENCH.start(argv)
    train, labels, held_out, _ = load_digits(parts=("train", "heldout"))
    train, labels, held_out = train[: args.data], labels[: args.data], held_out[: args.data]
    pyro.set_rng_seed(0)
    classifier = DigitClassifier().learn(train, labels)
    parts, results = (train.flatten(1), held_out.flatten(1)), []
    for seed in args.seeds:
        for name in progress(CONTENDERS, f"seed {seed}"):
            results.append(measure(name, seed, args, parts, classifier))
            BENCH.write(BENCH.report(args, results=results))
    BENCH.finish(BENCH.report(args, results=results))


if __name__ == "__main__":
    main()
