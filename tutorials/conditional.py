"""A decoder that is conditional on the label, with and without a penalty that compares codes label by label.

    python tutorials/conditional.py

The decoder maps a code and a label to a digit: the code should hold the style of the handwriting, the label the class.
Without a condition the penalty compares the codes of all digits together with the prior. They can match although the
sevens occupy a region of their own, and the decoder has then not been trained on most prior samples with the label 7.
``condition="label"`` compares the joint distribution of code and label. Both are trained here, one after the other, and
a small classifier counts how many samples of each label it recognises as that label. Figures and numbers are written to
results/conditional/.
"""

import argparse
import json
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import Tensor, nn
from tqdm import tqdm

from pyro_wae import WAELoss
from pyro_wae.demo.digits import load_digits
from pyro_wae.kernels import SameLabel, UnitMean
from pyro_wae.penalties import MMD
from pyro_wae.plotting import image_grid

LABELS = 10


class ConditionalWAE(nn.Module):
    """An auto-encoder of 28x28 images whose decoder sees the label, as a Pyro model and guide."""

    def __init__(self, zdim: int):
        super().__init__()
        self.zdim = zdim
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, zdim)
        )
        self.decoder = nn.Sequential(
            nn.Linear(zdim + LABELS, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 784), nn.Sigmoid(),
            nn.Unflatten(1, (1, 28, 28)),
        )  # fmt: skip

    def decode(self, z: Tensor, label: Tensor) -> Tensor:
        """A digit for each code and label."""
        return self.decoder(torch.cat([z, nn.functional.one_hot(label, LABELS).to(z)], 1))

    def model(self, x: Tensor, label: Tensor) -> None:
        """The prior of the codes, the same for every label, and the decoder."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.zdim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z, label), 1.0).to_event(3), obs=x)

    def guide(self, x: Tensor, label: Tensor) -> None:
        """The encoder, which sees the digit alone."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.encoder(x)).to_event(1))


def train(wae: ConditionalWAE, condition: str | None, images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Trains on digits and their labels."""
    optimizer = pyro.optim.CosineAnnealingLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": args.learning_rate}, "T_max": args.epochs}
    )
    # What MMD() takes by itself, but for the constant.
    penalty = MMD(condition_kernel=UnitMean(SameLabel(), constant=args.constant))
    loss = WAELoss(penalty, penalty_weight=args.penalty_weight, condition=condition)
    svi = SVI(wae.model, wae.guide, optimizer, loss=loss)
    progress = tqdm(range(args.epochs), unit="epoch", desc=f"condition={condition!r}")
    for _ in progress:
        for batch in torch.randperm(len(images)).split(args.batch_size):
            svi.step(images[batch], labels[batch])
        optimizer.step()  # lowers the learning rate
        progress.set_postfix(cost=f"{loss.terms.cost:.1f}", penalty=f"{loss.terms.penalty:+.4f}")


def train_classifier(images: Tensor, labels: Tensor, args: argparse.Namespace) -> nn.Module:
    """A small classifier of digits, which judges the samples."""
    classifier = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, LABELS),
    )  # fmt: skip
    optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3)
    for _ in tqdm(range(args.classifier_epochs), unit="epoch", desc="classifier"):
        for batch in torch.randperm(len(images)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(images[batch]), labels[batch]).backward()
            optimizer.step()
    return classifier


@torch.no_grad()
def recognised(wae: ConditionalWAE, classifier: nn.Module, count: int) -> list[float]:
    """For each label the share of its samples that the classifier reads as that label."""
    shares = []
    for label in range(LABELS):
        ordered = torch.full((count,), label)
        read = classifier(wae.decode(torch.randn(count, wae.zdim), ordered)).argmax(1)
        shares.append((read == ordered).double().mean().item())
    return shares


@torch.no_grad()
def draw(wae: ConditionalWAE, path: Path, title: str) -> None:
    """A row of samples for each label; a column shares its code."""
    codes = torch.randn(10, wae.zdim)
    digits = wae.decode(codes.repeat(LABELS, 1), torch.arange(LABELS).repeat_interleave(10))
    image_grid(digits, columns=10, cmap="gray_r", title=title).savefig(path)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/conditional"), help="folder for what is made")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--classifier-epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--zdim", type=int, default=8, help="numbers in a code")
    parser.add_argument("--penalty-weight", type=float, default=500.0)
    parser.add_argument(
        "--constant", type=float, default=0.0, help="share of pairs of different labels, over the others'"
    )
    parser.add_argument("--samples", type=int, default=1000, help="digits of each label that are counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="run in seconds, to see that everything works")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Trains both, and prints how many samples are recognised as their label."""
    args = parse_args(argv)
    pyro.set_rng_seed(args.seed)
    images, labels, test_images, test_labels = load_digits()
    if args.smoke:
        args.epochs, args.classifier_epochs, args.samples = 1, 1, 20
        images, labels, test_images, test_labels = images[:300], labels[:300], test_images[:200], test_labels[:200]
    args.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    classifier = train_classifier(images, labels, args)
    shares, costs = {}, {}
    for condition in (None, "label"):
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        wae = ConditionalWAE(args.zdim)
        train(wae, condition, images, labels, args)
        name = "without" if condition is None else "with"
        shares[name] = recognised(wae, classifier, args.samples)
        with torch.no_grad():
            accuracy = (classifier(test_images).argmax(1) == test_labels).double().mean().item()
            outputs = wae.decode(wae.encoder(test_images), test_labels)
            costs[name] = (outputs - test_images).square().sum((1, 2, 3)).mean().item()
        draw(wae, args.out / f"samples_{name}.png", f"A row for each label, {name} condition=")
    seconds = time.perf_counter() - start

    options = {key: str(value) if key == "out" else value for key, value in vars(args).items()}
    metrics = {"shares": shares, "test_cost": costs, "accuracy": accuracy, "seconds": seconds, "options": options}
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print("\n    samples recognised as their label    without condition=    with condition='label'")
    for label in range(LABELS):
        print(f"    {label:^33}    {shares['without'][label]:17.1%}    {shares['with'][label]:22.1%}")
    mean = {name: sum(values) / LABELS for name, values in shares.items()}
    print(f"    {'all':^33}    {mean['without']:17.1%}    {mean['with']:22.1%}")
    print(f"    {'cost of a test digit':^33}    {costs['without']:17.2f}    {costs['with']:22.2f}")
    print(f"""
    The classifier reads {accuracy:.1%} of the test digits. {seconds:.0f} seconds.
    Pictures and metrics.json are in {args.out}/""")


if __name__ == "__main__":
    main()
