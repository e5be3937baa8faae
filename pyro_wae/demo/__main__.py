"""A Wasserstein auto-encoder that learns to write digits, in a few minutes on two CPU cores.

    python -m pyro_wae.demo
    python -m pyro_wae.demo --prior normal

The encoder maps each digit to a latent code of eight numbers, and the decoder maps a code to a digit. Training
minimises the squared error of the reconstructions (the cost) and a distance between the distribution of all codes and
the prior (the penalty). The prior is a mixture of Normals that is learnt along with the nets, or N(0, I). A sample is
a decoded prior sample. Pictures and figures are written to results/demo/.
"""

import argparse
import json
import math
import time
from pathlib import Path
from statistics import fmean

import pyro
import torch
from pyro.infer import SVI
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from pyro_wae import WAELoss
from pyro_wae.demo.digits import load_digits
from pyro_wae.demo.judge import DigitClassifier
from pyro_wae.demo.nets import DigitWAE
from pyro_wae.demo.overview import overview
from pyro_wae.diagnostics import two_sample_test
from pyro_wae.optim import Adam
from pyro_wae.penalties import MMD, PriorLikelihood
from pyro_wae.plotting import WIDTH, codes_and_prior, image_grid, loss_curves, reconstructions, styled_figure
from pyro_wae.priors import MixturePrior

TESTED = 1000
"""Held-out codes that are tested against the prior."""

SURE = 0.9
"""The least probability at which a sample counts as read by the classifier."""


def make_loss(args: argparse.Namespace) -> WAELoss:
    """The loss of either prior."""
    if args.prior == "mixture":
        # The codes go to the prior by the one, and the prior to the codes by the other, which is maximum likelihood.
        weight = 100.0 if args.penalty_weight is None else args.penalty_weight
        return WAELoss(MMD() + PriorLikelihood(), penalty_weight=weight)
    return WAELoss(MMD(), penalty_weight=args.penalty_weight)


def train(wae: DigitWAE, images: Tensor, args: argparse.Namespace) -> dict[str, list[float]]:
    """Trains on the images and returns each epoch's mean cost, penalty and penalty weight."""

    def adam_args(name: str) -> dict[str, float]:
        # The few parameters of a prior have far to go.
        return {"lr": args.prior_rate if name.startswith("prior.") else args.learning_rate}

    optimizer = Adam(adam_args, scheduler=lambda adam: CosineAnnealingLR(adam, args.epochs))
    loss = make_loss(args)
    svi = SVI(wae.model, wae.guide, optimizer, loss=loss)

    history: dict[str, list[float]] = {"cost": [], "penalty": [], "weight": []}
    wae.train()
    progress = tqdm(range(args.epochs), unit="epoch")
    for _ in progress:
        steps = []
        for batch in torch.randperm(len(images), device=images.device).split(args.batch_size):
            if len(batch) < 2:
                continue  # one datum has no distribution that a penalty could compare
            svi.step(images[batch])
            if loss.terms:
                steps.append(loss.terms.as_dict())
        optimizer.step()  # lowers the learning rate
        for key, values in history.items():
            values.append(fmean(step[key] for step in steps))
        cost, penalty, weight = (values[-1] for values in history.values())
        progress.set_postfix(cost=f"{cost:.1f}", penalty=f"{penalty:+.4f}", weight=f"{weight:.0f}")
    return history


@torch.no_grad()
def draw_pictures(wae: DigitWAE, images: Tensor, labels: Tensor, samples: Tensor, out: Path) -> None:
    """Draws test digits, their codes and reconstructions, and samples."""
    codes = wae.encoder(images)
    outputs = wae.decoder(codes)
    prior = wae.prior().sample((len(codes),))
    pictures = {
        "overview": overview(images, outputs, samples, codes, prior, labels),
        "samples": image_grid(samples, cmap="gray_r", title="Samples of the model"),
        "reconstructions": reconstructions(
            images[:30], outputs[:30], cmap="gray_r", title="Test digits and their reconstructions"
        ),
        "codes": codes_and_prior(codes, prior, labels, title="Codes of test digits beside prior samples"),
    }
    for name, figure in pictures.items():
        figure.savefig(out / f"{name}.png")


@torch.no_grad()
def evaluate(wae: DigitWAE, images: Tensor, heldout: Tensor, classifier: DigitClassifier) -> dict[str, float]:
    """Measures on digits that were not trained on.

    The cost is that of test digits. How well codes match the prior, and samples the digits, is judged on held-out
    digits of the training set: MNIST's test set is of other writers, and differs for that reason alone.
    """
    outputs, codes = wae.decoder(wae.encoder(images)), wae.encoder(heldout)
    prior = wae.prior()
    mmd = MMD(closed_form=False)
    # The sampling noise of the estimate is its deviation between two sets of prior samples, which do match.
    null = torch.stack([mmd(prior.sample((len(codes),)), prior.sample((len(codes),))) for _ in range(20)])
    tested = codes[torch.linspace(0, len(codes) - 1, min(TESTED, len(codes))).long()]
    drawn = torch.cat([wae.decoder(prior.sample((len(tested),))) for _ in range(10)])
    sure = classifier.probabilities(drawn).amax(1) > SURE
    return {
        "test_cost": (outputs - images).square().sum((1, 2, 3)).mean().item(),
        "heldout_mmd2": mmd(codes, prior.sample((len(codes),))).item(),
        "null_mmd2_std": null.std().item(),
        "heldout_p_value": two_sample_test(tested, prior).p_value,
        "reconstructions_frechet": classifier.frechet_distance(wae.decoder(codes), heldout),
        "samples_frechet": classifier.frechet_distance(drawn, heldout),
        "samples_read": sure.double().mean().item(),
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pyro_wae.demo",
        description="Trains a Wasserstein auto-encoder of digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", choices=("bundled", "mnist"), default="bundled", help="15,000 digits, or all 70,000")
    parser.add_argument("--root", default="./mnist", help="folder of the full MNIST")
    parser.add_argument("--out", type=Path, default=Path("results/demo"), help="folder for what is made")
    parser.add_argument("--prior", choices=("mixture", "normal"), default="mixture", help="learnt, or N(0, I)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of training")
    parser.add_argument("--batch-size", type=int, default=100, help="digits in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="that of the networks")
    parser.add_argument("--prior-rate", type=float, default=3e-2, help="learning rate of the mixture prior")
    parser.add_argument("--zdim", type=int, default=8, help="the latent dimension")
    parser.add_argument(
        "--penalty-weight", type=float, help="a constant; by default 100, or with N(0, I) found while training"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the networks and the batches")
    parser.add_argument("--device", default="cpu", help="as torch names it, such as cuda")
    parser.add_argument("--smoke", action="store_true", help="run in seconds, to see that everything works")
    args = parser.parse_args(argv)
    for name in ("learning-rate", "prior-rate", "penalty-weight"):
        found = getattr(args, name.replace("-", "_"))
        if found is not None and not math.isfinite(found):
            parser.error(f"argument --{name}: must be a finite number, found {found}")
    for name, least in {"epochs": 1, "batch-size": 2, "zdim": 2, "seed": 0, "penalty-weight": 0}.items():
        found = getattr(args, name.replace("-", "_"))
        if found is not None and found < least:
            parser.error(f"argument --{name}: must be >= {least}, found {found}")
    if min(args.learning_rate, args.prior_rate) <= 0:
        parser.error("arguments --learning-rate and --prior-rate: must be > 0")
    try:
        torch.zeros(1, device=args.device).item()
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        parser.error(f"argument --device: {args.device!r} cannot be used here ({reason}). Write --device cpu")
    return args


def main(argv: list[str] | None = None) -> None:
    """Trains, evaluates, and prints the results."""
    args = parse_args(argv)
    with styled_figure((WIDTH, 1.0)):
        pass  # without matplotlib, an error before the training and not after it
    pyro.set_rng_seed(args.seed)
    parts = load_digits(args.data, root=args.root, parts=("train", "heldout", "test"))
    if args.smoke:
        args.epochs, parts = 1, tuple(part[:200] for part in parts)
    train_images, train_labels, heldout, _, test_images, test_labels = (part.to(args.device) for part in parts)
    args.out.mkdir(parents=True, exist_ok=True)

    prior = MixturePrior(100, args.zdim) if args.prior == "mixture" else None
    wae = DigitWAE(args.zdim, prior).to(args.device)
    start = time.perf_counter()
    history = train(wae, train_images, args)
    seconds = time.perf_counter() - start
    loss_curves(history).savefig(args.out / "losses.png")

    wae.eval()
    with torch.no_grad():
        samples = wae.decoder(wae.prior().sample((100,)))
    draw_pictures(wae, test_images, test_labels, samples, args.out)
    classifier = DigitClassifier().to(args.device).learn(train_images, train_labels)
    reached = evaluate(wae, test_images, heldout, classifier)

    p_value = reached["heldout_p_value"]
    options = {key: str(value) if key == "out" else value for key, value in vars(args).items()}
    metrics = {**reached, "seconds": seconds, "history": history, "options": options}
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"""
    cost of a test digit (squared error)              {reached["test_cost"]:8.2f}
    MMD^2 of held-out codes and prior                 {reached["heldout_mmd2"]:+8.4f}   p = {p_value:.2f}
    ... of prior samples and prior                    {0:+8.4f} +- {reached["null_mmd2_std"]:.4f}
    Frechet distance of held-out reconstructions      {reached["reconstructions_frechet"]:8.1f}
    Frechet distance of samples                       {reached["samples_frechet"]:8.1f}
    samples that a classifier reads at > 90 %         {100 * reached["samples_read"]:8.0f} %
    penalty weight of the last epoch                  {history["weight"][-1]:8.0f}
    seconds of training                               {seconds:8.0f}

    Pictures and metrics.json are in {args.out}/""")


if __name__ == "__main__":
    main()
