"""A deep Markov model of ragged sequences, trained as a Wasserstein auto-encoder.

    python tutorials/sequences.py            # one model, in about a minute on one CPU core
    python tutorials/sequences.py --compare  # each kind of penalty in turn

The data are points that rotate about the origin, by 0.8 radians in a step with a little noise, for 6 to 8 steps.
The prior is a Markov chain z_1 -> z_2 -> ... with a transition to be learned, each z_t is decoded to the point x_t, and
the guide reads a sequence from its end. The table compares samples of the model with the data.
"""

import argparse
import math
import time

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import Tensor, nn

from pyro_wae import WAELoss
from pyro_wae.penalties import MMD, Chain, EnergyDistance

SHORTEST, LONGEST = 6, 8
TURN, KEPT = 0.8, 0.97
STEP_NOISE = 0.2
PENALTIES = {
    "pairs": lambda: Chain(MMD(), order=2),
    "single steps": lambda: Chain(MMD(), order=1),
    "joint code": lambda: MMD(),
    "none": lambda: None,
}


def turning_points(n: int) -> tuple[Tensor, Tensor]:
    """Draws sequences of points in the plane, shape (n, T, 2), with 0 after their end, and their lengths."""
    lengths = torch.randint(SHORTEST, LONGEST + 1, (n,))
    turn = torch.tensor([[math.cos(TURN), math.sin(TURN)], [-math.sin(TURN), math.cos(TURN)]])
    points = [torch.randn(n, 2)]
    for _ in range(LONGEST - 1):
        points.append(KEPT * points[-1] @ turn + math.sqrt(1 - KEPT**2) * torch.randn(n, 2))
    x = torch.stack(points, 1) + 0.1 * torch.randn(n, LONGEST, 2)
    return x * (torch.arange(LONGEST) < lengths[:, None])[..., None], lengths


def net(inputs: int, outputs: int) -> nn.Sequential:
    """A small network."""
    return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, outputs))


class DeepMarkovWAE(nn.Module):
    """Model and guide of a deep Markov model, for batches of sequences of different lengths."""

    def __init__(self, z_dim: int = 2, h_dim: int = 32):
        super().__init__()
        self.z_dim = z_dim
        self.transition = net(z_dim, z_dim)
        self.emitter = net(z_dim, 2)
        self.rnn = nn.GRU(2, h_dim, batch_first=True)
        self.combiner = net(z_dim + h_dim, 2 * z_dim)

    def model(self, x: Tensor, lengths: Tensor) -> None:
        """The Markov prior of the codes, and the decoder of each step."""
        pyro.module("wae", self)
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        with pyro.plate("data", len(x)):
            z = x.new_zeros(len(x), self.z_dim)
            for t in pyro.markov(range(1, x.shape[1] + 1)):
                loc, scale = (z + self.transition(z), STEP_NOISE) if t > 1 else (z, 1.0)
                here = mask[:, t - 1 : t]
                z = pyro.sample(f"z_{t}", dist.Normal(loc, scale).mask(here).to_event(1))
                pyro.sample(f"obs_x_{t}", dist.Normal(self.emitter(z), 0.1).mask(here).to_event(1), obs=x[:, t - 1])

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        """The encoder: z_t from z_{t-1} and all points from x_t on."""
        pyro.module("wae", self)
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        h = self.summaries(x, lengths)
        with pyro.plate("data", len(x)):
            z = x.new_zeros(len(x), self.z_dim)
            for t in pyro.markov(range(1, x.shape[1] + 1)):
                loc, log_scale = self.combiner(torch.cat([z, h[:, t - 1]], -1)).chunk(2, -1)
                fn = dist.Normal(loc, (log_scale - 2).exp()).mask(mask[:, t - 1 : t])
                z = pyro.sample(f"z_{t}", fn.to_event(1))

    def summaries(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Features at step t of the recurrent network, which reads from the end of each sequence; shape (n, T, h)."""
        # Each sequence is reversed within its length, and its padding stays last.
        steps = torch.arange(x.shape[1])
        turned = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)
        h, _ = self.rnn(x.gather(1, turned[..., None].expand_as(x)))
        return h.gather(1, turned[..., None].expand_as(h))

    @torch.no_grad()
    def sample(self, n: int, steps: int) -> Tensor:
        """Samples of the model, shape (n, steps, 2)."""
        z, points = torch.randn(n, self.z_dim), []
        for t in range(1, steps + 1):
            if t > 1:
                z = z + self.transition(z) + STEP_NOISE * torch.randn_like(z)
            points.append(self.emitter(z))
        return torch.stack(points, 1)


def train(wae: DeepMarkovWAE, x: Tensor, lengths: Tensor, penalty: object, args: argparse.Namespace) -> WAELoss:
    """Trains on batches, each as long as its longest sequence."""
    pyro.clear_param_store()
    weight = args.penalty_weight if penalty is not None else 0.0
    loss = WAELoss(penalty, penalty_weight=weight)
    rate = {"lr": args.learning_rate, "lrd": 0.1 ** (1 / args.steps)}  # falls to a tenth
    svi = SVI(wae.model, wae.guide, pyro.optim.ClippedAdam(rate), loss=loss)
    for _ in range(args.steps):
        batch = torch.randint(len(x), (args.batch_size,))
        longest = int(lengths[batch].max())
        svi.step(x[batch, :longest], lengths[batch])
    return loss


def moves(x: Tensor) -> dict[str, float]:
    """Statistics of the motion of sequences of one length, (n, T, 2)."""
    turn = torch.linalg.det(torch.stack([x[:, :-1], x[:, 1:]], -1))
    # The mean of the points is 0 by symmetry.
    power = x.square().sum(-1).mean()
    lags = {f"autocorrelation, lag {k}": ((x[:, k:] * x[:, :-k]).sum(-1).mean() / power).item() for k in (1, 2, 4)}
    return {
        **lags,
        "length of a step": (x[:, 1:] - x[:, :-1]).norm(dim=-1).mean().item(),
        "turns to the left": (turn > 0).float().mean().item(),
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="train with each kind of penalty in turn")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--penalty-weight", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="run in seconds, to see that everything works")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Trains, and compares samples with the data."""
    args = parse_args(argv)
    if args.smoke:
        args.steps = 2
    pyro.set_rng_seed(args.seed)
    x, lengths = turning_points(4000)
    whole = SHORTEST  # the steps that every sequence has
    columns = {"data": moves(x[:, :whole])}
    for name in PENALTIES if args.compare else ["pairs"]:
        pyro.set_rng_seed(args.seed)
        wae, start = DeepMarkovWAE(), time.perf_counter()
        loss = train(wae, x, lengths, PENALTIES[name](), args)
        samples = wae.sample(4000, LONGEST)
        columns[name] = moves(samples[:, :whole])
        energy = EnergyDistance()(samples[:1000, :whole].flatten(1), x[:1000, :whole].flatten(1))
        columns[name] |= {
            "energy distance to the data": energy.item(),
            "cost of the last batch": loss.terms.cost.item(),
            "seconds of training": time.perf_counter() - start,
        }
    halves = x[:2000, :whole].flatten(1).chunk(2)
    columns["data"]["energy distance to the data"] = EnergyDistance()(*halves).item()

    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for row in columns[list(columns)[-1]]:
        cells = [f"{column[row]:.3g}" if row in column else "" for column in columns.values()]
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
