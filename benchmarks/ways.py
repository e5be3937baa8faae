"""Ways to compute a penalty: those of this library beside others' ways to compute the same quantity."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from harness import in_bfloat16
from pyro.contrib.gp import kernels as pyro_kernels
from torch import Tensor

from pyro_wae.kernels import Gaussian, InverseMultiquadratic
from pyro_wae.kernels.radial import AUTHORS_FACTORS
from pyro_wae.penalties import MMD, EnergyDistance, PenaltyContext, Sinkhorn, SlicedWasserstein

Loss = Callable[[Tensor, Tensor], Tensor]


def authors_kernel(d: int) -> InverseMultiquadratic:
    """Seven scales around C = 2 d, that of the prior N(0, I)."""
    return InverseMultiquadratic.multiscale(bandwidth=math.sqrt(2.0 * d))


def compiled(penalty: MMD) -> MMD:
    """The penalty with a compiled kernel."""
    penalty.kernel.compile_profile()
    return penalty


def closed_form(penalty: MMD, d: int) -> Loss:
    """The penalty with the prior's means in closed form."""
    prior = dist.Normal(torch.zeros(d), 1.0).to_event(1)

    def run(q: Tensor, p: Tensor) -> Tensor:
        own = prior if q.device.type == "cpu" else dist.Normal(q.new_zeros(d), 1.0).to_event(1)
        return penalty(q, p, PenaltyContext(prior=lambda: own))

    return run


def of_squares(squares: Tensor, d: int) -> Tensor:
    """The seven kernels of squared distances, one after the other."""
    return sum(2 * d * c / (2 * d * c + squares) for c in AUTHORS_FACTORS)


def by_product(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances by one product of matrices."""
    return x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.mT


def unbiased(qq: Tensor, pp: Tensor, qp: Tensor) -> Tensor:
    """The U-statistic of three matrices of a kernel."""
    n, m = qp.shape
    within = (qq.sum() - qq.diagonal().sum()) / (n * (n - 1)) + (pp.sum() - pp.diagonal().sum()) / (m * (m - 1))
    return within - 2 * qp.mean()


def direct_differences(q: Tensor, p: Tensor) -> Tensor:
    """Squared distances by all differences, an (n, m, d) tensor for each pair of sets."""
    return unbiased(*(of_squares((x[:, None] - y).square().sum(2), q.shape[1]) for x, y in ((q, q), (p, p), (q, p))))


def stacked(q: Tensor, p: Tensor) -> Tensor:
    """One matrix of codes and prior samples together."""
    n, both = len(q), torch.cat([q, p])
    gram = of_squares(by_product(both, both), q.shape[1])
    return unbiased(gram[:n, :n], gram[n:, n:], gram[:n, n:])


def authors(q: Tensor, p: Tensor) -> Tensor:
    """The formula of the authors' code: three matrices of distances, and for each scale a sum without the diagonal."""
    (n, d), off = q.shape, 1 - torch.eye(len(q), device=q.device)
    qq, pp, qp = by_product(q, q), by_product(p, p), by_product(q, p)
    total = q.new_zeros(())
    for c in AUTHORS_FACTORS:
        scale = 2 * d * c
        within = (off * (scale / (scale + qq) + scale / (scale + pp))).sum() / (n * (n - 1))
        total = total + within - 2 * (scale / (scale + qp)).sum() / n**2
    return total


def trace_mmd(d: int) -> Loss:
    """The formula of pyro.infer.Trace_MMD, a biased estimate, with seven of Pyro's kernels."""
    kernel = None
    for c in AUTHORS_FACTORS:
        length = torch.tensor(math.sqrt(d * c))
        part = pyro_kernels.RationalQuadratic(d, lengthscale=length, scale_mixture=torch.tensor(1.0))
        kernel = part if kernel is None else pyro_kernels.Sum(kernel, part)

    def run(q: Tensor, p: Tensor) -> Tensor:
        own = kernel.to(q.device)
        return own(q).mean() + own(p).mean() - 2 * own(q, p).mean()

    return run


def pythae(d: int) -> Loss:
    """The penalty of pythae's WAE_MMD, whose kernel has the authors' seven scales by default."""
    from pythae.models import WAE_MMD, WAE_MMD_Config

    model = WAE_MMD(WAE_MMD_Config(input_dim=(1,), latent_dim=d))

    def run(q: Tensor, p: Tensor) -> Tensor:
        nothing = q.new_zeros(len(q), 1)
        return model.loss_function(nothing, nothing, q, p)[2]

    return run


def geomloss(name: str, **options: Any) -> Loss:
    """A kernel norm of geomloss, half the square of the biased distance, made twice as large."""
    from geomloss import SamplesLoss

    loss = SamplesLoss(name, backend="tensorized", **options)
    return lambda q, p: 2 * loss(q, p)


def pot_sliced(d: int) -> Loss:
    """POT's sliced Wasserstein distance, squared."""
    from ot import sliced_wasserstein_distance

    return lambda q, p: sliced_wasserstein_distance(q, p, n_projections=50) ** 2


def pot_sinkhorn(d: int) -> Loss:
    """POT's transport smoothed by an entropy, less half of that of each set with itself."""
    from ot import solve_sample

    def transport(x: Tensor, y: Tensor) -> Tensor:
        # "envelope": the gradient is that of the plan held fixed, and no iteration is kept. In float32 the default
        # tolerance of 1e-9 is never reached.
        return solve_sample(x, y, reg=2 * blur(d) ** 2, tol=1e-5, grad="envelope").value

    return lambda q, p: transport(q, p) - transport(q, q) / 2 - transport(p, p) / 2


def blur(d: int) -> float:
    """Half the root mean squared distance of draws from N(0, I), the default of Sinkhorn."""
    return math.sqrt(d / 2)


@dataclass(frozen=True)
class Way:
    """One way to compute a quantity.

    Args:
        quantity: What is computed; the same in all ways of one name.
        make: Gives the loss for codes of d numbers.
        keeps_digits: Whether its errors are measured: those of the unbiased estimate with prior samples.
        is_for: The devices that it runs on.
    """

    quantity: str
    make: Callable[[int], Loss]
    keeps_digits: bool = False
    is_for: tuple[str, ...] = ("cpu", "cuda")


IMQ, BIASED_IMQ = "MMD, 7 inverse multiquadratic kernels", "MMD, 7 inverse multiquadratic kernels, biased"
GAUSSIAN, ENERGY = "MMD, Gaussian kernel, biased", "energy distance, biased"
SLICED, SINKHORN = "sliced Wasserstein, 50 projections", "Sinkhorn divergence"
CUDA = ("cuda",)

WAYS: dict[str, Way] = {
    "MMD()": Way(IMQ, lambda d: MMD(authors_kernel(d)), True),
    "MMD(), compiled": Way(IMQ, lambda d: compiled(MMD(authors_kernel(d))), True),
    "MMD(), closed form": Way(IMQ, lambda d: closed_form(MMD(authors_kernel(d)), d)),
    "MMD(), closed form, compiled": Way(IMQ, lambda d: closed_form(compiled(MMD(authors_kernel(d))), d)),
    "MMD(), bf16 autocast": Way(IMQ, lambda d: in_bfloat16(MMD(authors_kernel(d))), True, CUDA),
    "authors' formula": Way(IMQ, lambda d: authors, True),
    "authors' formula, bf16 autocast": Way(IMQ, lambda d: in_bfloat16(authors), True, CUDA),
    "one matrix of both": Way(IMQ, lambda d: stacked, True),
    "direct differences": Way(IMQ, lambda d: direct_differences, True),
    "pythae": Way(IMQ, pythae, True),
    "Trace_MMD's formula": Way(BIASED_IMQ, trace_mmd),
    "MMD(Gaussian())": Way(GAUSSIAN, lambda d: MMD(Gaussian(math.sqrt(d)), unbiased=False)),
    "geomloss, Gaussian": Way(GAUSSIAN, lambda d: geomloss("gaussian", blur=math.sqrt(d))),
    "EnergyDistance()": Way(ENERGY, lambda d: EnergyDistance(unbiased=False)),
    "geomloss, energy": Way(ENERGY, lambda d: geomloss("energy")),
    "SlicedWasserstein()": Way(SLICED, lambda d: SlicedWasserstein()),
    "POT, sliced": Way(SLICED, pot_sliced),
    "Sinkhorn(), by geomloss": Way(SINKHORN, lambda d: Sinkhorn(blur=blur(d))),
    "POT, Sinkhorn": Way(SINKHORN, pot_sinkhorn),
}
PICTURE = (
    "MMD()", "MMD(), compiled", "MMD(), closed form",
    "authors' formula", "Trace_MMD's formula", "pythae", "geomloss, Gaussian",
)  # fmt: skip
"""The ways that are drawn, in as many colours; ours as whole lines."""
