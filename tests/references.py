"""What the tests compare with: float64, differences taken directly, formulas written out once more."""

import math
from contextlib import ExitStack, contextmanager

import pyro
import pytest
import torch
from programs import N, all_data, around, delta, normal, pair, sites
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_wae.kernels import Energy, Gaussian, InverseMultiquadratic, Laplace, Matern, MultiScale, RationalQuadratic
from pyro_wae.penalties import Penalty

# Each kernel with every length left to the prior, beside its value at distance r where the prior draws have
# half a mean squared distance of h. The formulas are written out here once more.
KERNELS = {
    "gaussian": (lambda: Gaussian(), lambda r, h: torch.exp(-(r**2) / (2 * h))),
    "imq": (lambda: InverseMultiquadratic(), lambda r, h: 2 * h / (2 * h + r**2)),
    "authors": (
        InverseMultiquadratic.multiscale,
        lambda r, h: sum(2 * h * c / (2 * h * c + r**2) for c in (0.1, 0.2, 0.5, 1, 2, 5, 10)),
    ),
    "laplace": (lambda: Laplace(), lambda r, h: torch.exp(-r / h**0.5)),
    "matern12": (lambda: Matern(0.5), lambda r, h: torch.exp(-r / h**0.5)),
    "matern32": (
        lambda: Matern(1.5),
        lambda r, h: (1 + 3**0.5 * r / h**0.5) * torch.exp(-(3**0.5) * r / h**0.5),
    ),
    "matern52": (
        lambda: Matern(2.5),
        lambda r, h: (1 + 5**0.5 * r / h**0.5 + 5 * r**2 / (3 * h)) * torch.exp(-(5**0.5) * r / h**0.5),
    ),
    "rational": (lambda: RationalQuadratic(0.7), lambda r, h: (1 + r**2 / (2 * 0.7 * h)) ** -0.7),
    "energy": (lambda: Energy(), lambda r, h: -r),
    "energy05": (lambda: Energy(0.5), lambda r, h: -(r**0.5)),
    "energy17": (lambda: Energy(1.7), lambda r, h: -(r**1.7)),
    "multiscale": (
        lambda: MultiScale(Laplace(), (0.25, 4.0)),
        lambda r, h: torch.exp(-r / (0.25 * h) ** 0.5) + torch.exp(-r / (4 * h) ** 0.5),
    ),
    "sum": (
        lambda: Gaussian() + 0.5 * Energy(),
        lambda r, h: torch.exp(-(r**2) / (2 * h)) - 0.5 * r,
    ),
    "product": (
        lambda: Gaussian(2.0) * InverseMultiquadratic(),
        lambda r, h: torch.exp(-(r**2) / 8) * 2 * h / (2 * h + r**2),
    ),
}


PARTICLES = [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2}]
every_particles = pytest.mark.parametrize("options", PARTICLES, ids=["one", "sequential", "vectorised"])


def differences(x, y):
    """x_i - y_j in float64, shape (n, m, d)."""
    return x.detach().double()[:, None] - y.detach().double()[None]


def distances(x, y):
    return differences(x, y).square().sum(-1).sqrt()


def half_mean_square(prior):
    """Half the mean of |p_i - p_j|^2 over the pairs i != j, written as such."""
    m = len(prior)
    return differences(prior, prior).square().sum().item() / (2 * m * (m - 1))


def off_diagonal(n):
    """Pairs of different rows."""
    return ~torch.eye(n, dtype=torch.bool)


def other_datum(row_repeats, column_repeats, n):
    """Pairs of rows whose data differ, row i having the datum i modulo n."""
    data = torch.arange(n)
    return data.repeat(row_repeats)[:, None] != data.repeat(column_repeats)


def mean_is_zero(values, *, standard_errors=3.5):
    """Whether the mean is 0 within so many of its own standard errors; 3.5 are missed once in 2000 by chance."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return abs(values.mean()) < standard_errors * values.std() / math.sqrt(len(values))


class LargestTensor(TorchDispatchMode):
    """Measures the largest tensor that is made inside of it."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


def rows(*shape, dtype=torch.float64):
    """Rows of N(0, I)."""
    return torch.randn(*shape, dtype=dtype)


def codes_and_prior(n=30, m=41, d=4, dtype=torch.float64):
    """Codes off the prior, and prior samples; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(n, d, generator=generator, dtype=torch.float64) * 1.5 + 0.5
    return codes.to(dtype), torch.randn(m, d, generator=generator, dtype=torch.float64).to(dtype)


def seeded(penalty, codes, prior):
    """The value where the directions are those after the seed 3."""
    torch.manual_seed(3)
    return penalty(codes, prior)


@contextmanager
def made_by_default(dtype, device):
    """Within, torch makes tensors of this dtype and on this device where none is named."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def nested(*plates):
    """All plates at once."""
    with ExitStack() as stack:
        yield [stack.enter_context(plate) for plate in plates]


def program(code=delta, prior=None, output=around, *, plate=all_data):
    """A model with one latent and one observed site, and its guide; a standard Normal prior unless another is given.

    Each takes the data x, and nothing of what is passed beside them.
    """
    return sites({"z": (prior or (lambda x: normal(x, x.shape[-1])), code)}, output, plate=plate)


def of_no_size(plate):
    """A model with a number for all data, outside of a plate that has a size."""

    def model(x, index, seen):
        with plate:
            pyro.sample("x", around(pyro.sample("z", normal(x).expand([N]))), obs=x)
            if plate.size == -1:
                return pyro.factor("all", torch.tensor(-1.0))
        pyro.factor("all", torch.tensor(-1.0))

    return model


def two_structures(varies):
    """Codes of one number in the first run and, if it varies, of two in the second."""
    runs = []

    def size():
        return 2 if varies and len(runs) > 1 else 1

    def model(x, index, seen):
        with all_data(x, index):
            z = pyro.sample("z", normal(x, size()))
            pyro.sample("x", around(z.sum(-1, keepdim=True).expand(len(x), 3)), obs=x)

    def guide(x, index, seen):
        runs.append(1)
        with all_data(x, index):
            pyro.sample("z", delta(x[:, : size()]))

    return model, guide


def with_line(line):
    """A model with a line in its data plate, and its guide."""

    def model(x, index, seen):
        with all_data(x, index):
            z = pyro.sample("z", normal(x))
            line(x, z)
            pyro.sample("x", around(z), obs=x)

    return model, pair()[1]


class Seen(Penalty):
    """Keeps codes, prior draws and context of each call; its value is a number, or a function of the codes."""

    codes = property(lambda self: self.calls[-1][0])
    prior = property(lambda self: self.calls[-1][1])
    context = property(lambda self: self.calls[-1][2])

    def __init__(self, value=0.0):
        super().__init__()
        self.value, self.calls = value, []

    def estimate(self, codes, prior, context):
        self.calls.append((codes, prior, context))
        return self.value(codes) if callable(self.value) else codes.sum() * 0 + self.value
