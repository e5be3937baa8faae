"""A classifier as a two-sample test: can a small net distinguish held-out codes from prior samples?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from pyro_wae._core.checks import number, whole
from pyro_wae._core.random_state import isolated_seed
from pyro_wae._core.rows import working_precision
from pyro_wae.diagnostics.hypothesis_test import HypothesisTest, as_rows, new_generator, prior_rows


@dataclass(frozen=True, kw_only=True)
class ClassifierTest(HypothesisTest):
    """The result of :func:`classifier_test`; ``str(result)`` is a line of text.

    Args:
        p_value: The probability, under random guessing, of an accuracy at least as high as the observed one.
        level: Level at which the test was to reject.
        accuracy: Fraction of held-out rows that were classified correctly; 1/2 on average if codes are samples of the
            prior.
        low: Lower end of the accuracy's confidence interval at 1 - ``level``.
        high: Upper end.
        held_out: Number of held-out rows, half of them codes.
    """

    accuracy: float
    low: float
    high: float
    held_out: int

    def __str__(self) -> str:
        return self._sentence(
            f"a classifier is right on {self.accuracy:.1%} of {self.held_out} held-out rows "
            f"({1 - self.level:.0%} interval {self.low:.1%} to {self.high:.1%})"
        )


def classifier_test(
    codes: Tensor,
    prior: Tensor | Any,
    *,
    width: int = 64,
    steps: int = 50,
    level: float = 0.05,
    seed: int = 0,
) -> ClassifierTest:
    """Tests whether codes are samples of the prior, by the accuracy of a small classifier on held-out rows.

    A net of two hidden layers is trained on one half of the codes and as many prior samples, and evaluated on the other
    half. The result is easy to interpret, since 50 % is a guess, and needs no kernel. It has half the rows for each
    purpose, so :func:`two_sample_test` detects smaller differences.

    The halves are not exchanged for a second fit. Each net would have learnt from the rows that test the other, their
    errors would be correlated, and a binomial test over all rows would reject too often.

    Args:
        codes: Shape (n, d), an independent draw a row.
        prior: Prior samples of shape (m, d), or the distribution of one code (anything with ``sample(shape)``), of
            which n draws are taken. Of n != m rows only the smaller number of each is used: a guess is right half of
            the time.
        width: Width of the hidden layers.
        steps: Number of Adam steps, each on all rows of the training half. More steps overfit, unless there are many
            codes and their difference is intricate.
        level: The probability of rejecting codes that are samples of the prior, at most.
        seed: Seed of halves, net and draws. The global random state is restored.

    Returns:
        The result. The p-value is binomial and one-sided; the interval is Wilson's.

    Raises:
        TypeError: If codes are not a tensor, the prior is neither tensor nor distribution, or an option is not a
            number.
        ValueError: If shape, dtype, device or a value of codes and prior does not fit, an option is out of range, or
            rows are too few to reject at the level at all.

    Source: Lopez-Paz, Oquab, "Revisiting Classifier Two-Sample Tests", ICLR 2017, arXiv:1610.06545; Wilson, "Probable
    Inference, the Law of Succession, and Statistical Inference", JASA 22, 1927 (interval).

    Example:
        >>> import torch
        >>> codes = 2.0 * torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
        >>> classifier_test(codes, torch.distributions.Normal(torch.zeros(4), 1.0)).rejected
        True
    """
    level = number("level", level, above=0, below=1, write="level=0.05")
    width, steps = whole("width", width, write="width=64"), whole("steps", steps, write="steps=50")
    rows = as_rows(codes, "codes")
    generator, draw_seed = new_generator(seed)
    draws = prior_rows(rows, prior, prior_draws=1, seed=draw_seed)
    each = min(len(rows), len(draws))
    held_out = 2 * (each // 2)
    if 0.5**held_out > level:
        raise ValueError(
            f"{len(rows)} codes and {len(draws)} prior samples leave {held_out} held-out rows, too few to reject at "
            f"level={level:g}. Give {2 * math.ceil(-math.log2(level) / 2)} of each at least; hundreds are better."
        )
    halves = []
    for sample in (rows, draws):
        order = torch.randperm(len(sample), generator=generator, device="cpu")[:each]
        shuffled = working_precision(sample[order.to(sample.device)])
        halves.append((shuffled[each // 2 :], shuffled[: each // 2]))
    (learn_codes, judge_codes), (learn_draws, judge_draws) = _standardized(halves)
    with isolated_seed(draw_seed + 1, rows.device), torch.autocast(rows.device.type, enabled=False):
        net = _trained(learn_codes, learn_draws, width=width, steps=steps)
        right = int((net(judge_codes) > 0).sum() + (net(judge_draws) <= 0).sum())
    low, high = _wilson(right, held_out, level)
    return ClassifierTest(
        accuracy=right / held_out,
        low=low,
        high=high,
        p_value=_binomial_tail(right, held_out),
        level=level,
        held_out=held_out,
    )


def _trained(codes: Tensor, draws: Tensor, *, width: int, steps: int) -> nn.Module:
    """A net that is positive on codes, from equally many rows of both."""
    with torch.inference_mode(False), torch.enable_grad():
        rows = torch.cat([codes, draws])
        labels = torch.cat([rows.new_ones(len(codes)), rows.new_zeros(len(draws))])
        # Another default device might hold no values, and another default dtype draws other ones.
        linear = partial(nn.Linear, device="cpu", dtype=rows.dtype)
        net = nn.Sequential(
            linear(rows.shape[1], width), nn.ReLU(), linear(width, width), nn.ReLU(), linear(width, 1), nn.Flatten(0)
        ).to(rows.device)
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(net(rows), labels).backward()
            optimizer.step()
    return net.requires_grad_(False)


def _standardized(halves: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, ...]]:
    """All rows in units of the training rows' deviations, because the net's start suits one scale only."""
    learnt = torch.cat([learn for learn, _ in halves])
    mean, deviation = learnt.mean(0), learnt.std(0)
    deviation = torch.where(deviation > 0, deviation, 1)
    return [tuple(((rows - mean) / deviation).float() for rows in half) for half in halves]


def _binomial_tail(successes: int, trials: int) -> float:
    """P(X >= successes) for X binomial with probability 1/2."""
    k = torch.arange(successes, trials + 1, dtype=torch.float64, device="cpu")
    total = torch.tensor(trials + 1.0, dtype=torch.float64, device="cpu").lgamma()
    logs = total - (k + 1).lgamma() - (trials - k + 1).lgamma() - trials * math.log(2)
    return min(1.0, logs.exp().sum().item())


def _wilson(successes: int, trials: int, level: float) -> tuple[float, float]:
    """Wilson's interval at 1 - level of a probability, from its share of successes."""
    z2 = NormalDist().inv_cdf(1 - level / 2) ** 2
    share = successes / trials
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)
