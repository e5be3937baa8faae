"""Kernels of the distance between two codes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae._core.fitted import FittedBuffers
from pyro_wae.kernels.base import SCRATCH, Kernel, Scratch
from pyro_wae.kernels.quadrature import matern_terms, multiquadratic_terms

AUTHORS_FACTORS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

DEFAULT_LENGTHS = (0.05, 0.15, 0.5, 5.0)
"""Those of :meth:`Laplace.multiscale`, in its bandwidth."""


class RadialKernel(FittedBuffers, Kernel):
    """A kernel of the distance alone, :math:`f(|x - y|^2 / l^2)`; subclasses define :meth:`~Kernel.profile`.

    Args:
        length: The length l, or None to take it from the prior samples.
        name: What the subclass calls its length: the attribute that keeps it, and the word in messages.

    Raises:
        TypeError: If the length is not a number.
        ValueError: If it is not positive and finite.
    """

    squared_length_factor = 1.0
    """The squared length that is taken from the prior, over half the mean squared distance of its draws."""

    squared_length: Tensor

    def __init__(self, length: float | None, *, name: str) -> None:
        super().__init__()
        if length is not None:
            length = checks.number(f"{type(self).__name__}'s {name}", length, above=0, write=f"{name}=1.0")
        self._length_name = name
        setattr(self, name, length)
        self._given = None if length is None else length**2
        if length is None:
            self.register_fitted("squared_length")

    @property
    def is_set(self) -> bool:
        return self._given is not None or self._is_fitted["squared_length"]

    def take_length(self, half_mean_square: Tensor) -> None:
        self.set_fitted("squared_length", half_mean_square * self.squared_length_factor)

    @property
    def is_radial(self) -> bool:
        return True

    @property
    def is_smooth(self) -> bool:
        return True

    def squared_unit(self, like: Tensor) -> Tensor:
        """l^2 as a scalar with the precision and device of ``like``.

        Raises:
            ValueError: If the length has neither been given nor taken from prior samples.
        """
        if not self.is_set:
            raise ValueError(
                f"{self!r} has no length yet. Give one, as in {type(self).__name__}({self._length_name}=1.0), "
                "or take it from prior samples: kernel.fit(prior)."
            )
        return self.squared_length.to(like) if self._given is None else like.new_tensor(self._given)

    def profile_and_slope_at_scales(
        self, u: Tensor, factors: Sequence[float], scratch: Scratch | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sum over factors c of the profile at ``u / c``, and its derivative, as ``profile_and_slope``."""
        values, slopes = torch.zeros_like(u), torch.zeros_like(u)
        for factor in factors:
            value, slope = self.profile_and_slope(u / factor)
            values += value
            slopes.add_(slope, alpha=1 / factor)
        return values, slopes


class MultiScale(Kernel):
    """The sum of one kernel at several lengths: the squared length times each factor.

    Args:
        kernel: A kernel with a length.
        factors: Positive factors of its *squared* length: 0.25 is half the length. (:meth:`Laplace.multiscale` takes
            lengths.)

    Raises:
        TypeError: If the kernel has no length, or a ``gram`` of its own.
        ValueError: If there is no factor, or one is not positive.

    Example:
        >>> MultiScale(Gaussian(bandwidth=1.0), (0.5, 1.0))(torch.zeros(1, 2), torch.ones(1, 2))
        tensor([[0.5032]])
    """

    kernel: RadialKernel

    def __init__(self, kernel: RadialKernel, factors: Sequence[float]) -> None:
        super().__init__()
        write = "MultiScale(Gaussian(), (0.5, 1.0, 2.0)), or add kernels: k1 + k2"
        self.kernel = checks.instance(
            "MultiScale's kernel", kernel, RadialKernel, "a kernel that has a length", write=write
        )
        if not kernel.is_radial:
            raise TypeError(
                f"MultiScale's kernel must be one of the distance alone, and {type(kernel).__name__} has a gram of its "
                "own, which no factor reaches. Write a sum of kernels of several lengths: k1 + k2."
            )
        self.factors = checks.numbers("MultiScale's factors", factors, above=0, write="factors=(0.5, 1.0, 2.0)")

    @property
    def is_radial(self) -> bool:
        return self.kernel.is_radial

    def squared_unit(self, like: Tensor) -> Tensor:
        return self.kernel.squared_unit(like)

    def profile(self, u: Tensor) -> Tensor:
        total = self.kernel.profile(u / self.factors[0])
        for factor in self.factors[1:]:
            total = total + self.kernel.profile(u / factor)
        return total

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        return self.kernel.profile_and_slope_at_scales(u, self.factors, scratch)

    def gaussian_terms(self, like: Tensor, factors: Sequence[float] = (1.0,)) -> tuple[Tensor, Tensor] | None:
        return self.kernel.gaussian_terms(like, [own * factor for factor in factors for own in self.factors])


class Gaussian(RadialKernel):
    r"""The Gaussian kernel, :math:`k(x, y) = \exp(-\lVert x - y \rVert^2 / (2 s^2))`.

    Args:
        bandwidth: s, in the units of a code; None takes s^2 = half the mean squared distance of
            prior samples (d sigma^2 for N(0, sigma^2 I)).

    Raises:
        TypeError: If the bandwidth is not a number.
        ValueError: If it is not positive and finite.

    Example:
        >>> Gaussian(bandwidth=1.0)(torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        tensor([[1.0000, 0.3679]])
    """

    def __init__(self, bandwidth: float | None = None) -> None:
        super().__init__(bandwidth, name="bandwidth")

    def profile(self, u: Tensor) -> Tensor:
        return torch.exp(-u / 2)

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        values, slopes, *_ = scratch or scratch_like(u)
        torch.exp(torch.mul(u, -0.5, out=values), out=values)
        return values, torch.mul(values, -0.5, out=slopes)

    def gaussian_terms(self, like: Tensor, factors: Sequence[float] = (1.0,)) -> tuple[Tensor, Tensor] | None:
        rate = 1 / (2 * self.squared_unit(like))
        return like.new_ones(len(factors)), rate / like.new_tensor(factors)


class InverseMultiquadratic(RadialKernel):
    r"""The inverse multiquadratic kernel, :math:`k(x, y) = c^2 / (c^2 + \lVert x - y \rVert^2)`.

    Its tails are heavy: codes far from the prior still have a gradient.

    Args:
        bandwidth: c, in the units of a code; None takes c^2 = the mean squared distance of prior samples
            (2 d sigma^2 for N(0, sigma^2 I), the choice of the source).

    Source: Tolstikhin, Bousquet, Gelly, Schoelkopf, "Wasserstein Auto-Encoders", 2018, arXiv:1711.01558, section 4.

    Example:
        >>> InverseMultiquadratic(bandwidth=1.0)(torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        tensor([[1.0000, 0.3333]])
    """

    squared_length_factor = 2.0

    def __init__(self, bandwidth: float | None = None) -> None:
        super().__init__(bandwidth, name="bandwidth")

    def profile(self, u: Tensor) -> Tensor:
        return (1 + u).reciprocal()

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        return self.profile_and_slope_at_scales(u, (1.0,), scratch)

    def profile_and_slope_at_scales(
        self, u: Tensor, factors: Sequence[float], scratch: Scratch | None = None
    ) -> tuple[Tensor, Tensor]:
        values, slopes, terms, *_ = scratch or scratch_like(u)
        for index, factor in enumerate(factors):
            torch.add(u, factor, out=terms).reciprocal_()
            if index:
                values.add_(terms, alpha=factor)
                slopes.addcmul_(terms, terms, value=-factor)
            else:
                torch.mul(terms, factor, out=values)
                torch.mul(values, terms, out=slopes).neg_()
        return values, slopes

    def gaussian_terms(self, like: Tensor, factors: Sequence[float] = (1.0,)) -> tuple[Tensor, Tensor] | None:
        weights, rates = like.new_tensor(multiquadratic_terms(tuple(factors)))
        return weights, rates / self.squared_unit(like)

    @classmethod
    def multiscale(cls, bandwidth: float | None = None, factors: Sequence[float] = AUTHORS_FACTORS) -> MultiScale:
        """The sum of seven kernels with c^2 times 0.1 to 10 that the authors' code uses.

        Args:
            bandwidth: c, as for the class.
            factors: Factors of the *squared* bandwidth c^2, one for each kernel.
        """
        return MultiScale(cls(bandwidth), factors)


class Laplace(RadialKernel):
    r"""The Laplace kernel, :math:`k(x, y) = \exp(-\lVert x - y \rVert / s)`, with the Euclidean distance.

    Args:
        bandwidth: s, in the units of a code; None as in :class:`Gaussian`.

    Example:
        >>> Laplace(bandwidth=1.0)(torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        tensor([[1.0000, 0.2431]])
    """

    def __init__(self, bandwidth: float | None = None) -> None:
        super().__init__(bandwidth, name="bandwidth")

    is_smooth = False

    def profile(self, u: Tensor) -> Tensor:
        return torch.exp(-root(u))

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        return self.profile_and_slope_at_scales(u, (1.0,), scratch)

    def profile_and_slope_at_scales(
        self, u: Tensor, factors: Sequence[float], scratch: Scratch | None = None
    ) -> tuple[Tensor, Tensor]:
        values, slopes, terms, roots, inverse = scratch or scratch_like(u)
        torch.mul(u, inverse_root_into(u, inverse), out=roots)
        for index, factor in enumerate(factors):
            rate = factor**-0.5
            if index:
                torch.mul(roots, -rate, out=terms).exp_()
                values.add_(terms)
                slopes.add_(terms, alpha=-rate / 2)
            else:
                torch.mul(roots, -rate, out=values).exp_()
                torch.mul(values, -rate / 2, out=slopes)
        return values, slopes.mul_(inverse)

    def gaussian_terms(self, like: Tensor, factors: Sequence[float] = (1.0,)) -> tuple[Tensor, Tensor] | None:
        weights, rates = like.new_tensor(matern_terms(0.5, tuple(factors)))
        return weights, rates / self.squared_unit(like)

    @classmethod
    def multiscale(cls, bandwidth: float | None = None, lengths: Sequence[float] = DEFAULT_LENGTHS) -> MultiScale:
        """The sum of four kernels, s times 0.05, 0.15, 0.5 and 5.

        The short ones detect gaps between codes that are much smaller than the prior, which smooth kernels do not, and
        which decode into samples unlike the data. The long one is near the negative distance, a small part of the sum
        where codes match, and the part that has a gradient at codes far from the prior.

        Args:
            bandwidth: s, as for the class.
            lengths: Length scales in units of s, one for each kernel. (``InverseMultiquadratic.multiscale`` takes
                factors of the squared one.)

        Raises:
            TypeError: If ``lengths`` is not a sequence of numbers.
            ValueError: If there is none, or one is not positive.
        """
        lengths = checks.numbers("Laplace's lengths", lengths, above=0, write=f"lengths={DEFAULT_LENGTHS}")
        # The square of 0.05 is shown as 0.0025, and that of a tiny length keeps its digits.
        return MultiScale(cls(bandwidth), [float(f"{length**2:.12g}") for length in lengths])


class Matern(RadialKernel):
    r"""The Matern kernel of half-integer order, with :math:`t = \sqrt{2 \nu}\, \lVert x - y \rVert / s`.

    It is :math:`e^{-t}` for nu = 1/2, :math:`(1 + t) e^{-t}` for nu = 3/2, :math:`(1 + t + t^2 / 3) e^{-t}` for nu =
    5/2.

    Args:
        nu: 0.5, 1.5 or 2.5.
        bandwidth: s, in the units of a code; None as in :class:`Gaussian`.

    Raises:
        ValueError: For another nu.

    Source: Rasmussen, Williams, "Gaussian Processes for Machine Learning", 2006, equation 4.17.

    Example:
        >>> Matern(1.5, bandwidth=1.0)(torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        tensor([[1.0000, 0.2978]])
    """

    def __init__(self, nu: float, bandwidth: float | None = None) -> None:
        super().__init__(bandwidth, name="bandwidth")
        self.nu = checks.choice(
            "Matern's nu", checks.number("Matern's nu", nu, write="Matern(1.5)"), (0.5, 1.5, 2.5), write="Matern(1.5)"
        )

    @property
    def is_smooth(self) -> bool:
        return self.nu > 1

    def profile(self, u: Tensor) -> Tensor:
        t = root(2 * self.nu * u)
        if self.nu == 0.5:
            return torch.exp(-t)
        return (1 + t) * torch.exp(-t) if self.nu == 1.5 else (1 + t + t.square() / 3) * torch.exp(-t)

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        values, slopes, t, *_ = scratch or scratch_like(u)
        inverse_root_into(u, slopes)
        torch.mul(u, slopes, out=t).mul_(math.sqrt(2 * self.nu))
        torch.neg(t, out=values).exp_()
        if self.nu == 0.5:
            return values, slopes.mul_(values).mul_(-0.5)
        # With e = exp(-t): d/du = nu / t d/dt, and d/dt is -t e for nu = 3/2 and -t (1 + t) e / 3 for nu = 5/2.
        if self.nu == 1.5:
            torch.mul(values, -1.5, out=slopes)
            return values.addcmul_(values, t), slopes
        torch.addcmul(values, values, t, out=slopes)
        values.mul_(t.square_().div_(3)).add_(slopes)
        return values, slopes.mul_(-5 / 6)

    def gaussian_terms(self, like: Tensor, factors: Sequence[float] = (1.0,)) -> tuple[Tensor, Tensor] | None:
        weights, rates = like.new_tensor(matern_terms(self.nu, tuple(factors)))
        return weights, rates / self.squared_unit(like)


class RationalQuadratic(RadialKernel):
    r"""The rational quadratic kernel, :math:`k(x, y) = (1 + \lVert x - y \rVert^2 / (2 \alpha s^2))^{-\alpha}`.

    Args:
        alpha: The weight of the tails, > 0; as alpha grows, the kernel goes to :class:`Gaussian`.
        bandwidth: s, in the units of a code; None as in :class:`Gaussian`.

    Raises:
        ValueError: If alpha is not positive.

    Example:
        >>> RationalQuadratic(0.5, bandwidth=1.0)(torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        tensor([[1.0000, 0.5774]])
    """

    def __init__(self, alpha: float, bandwidth: float | None = None) -> None:
        super().__init__(bandwidth, name="bandwidth")
        self.alpha = checks.number("RationalQuadratic's alpha", alpha, above=0, write="alpha=1.0")

    def profile(self, u: Tensor) -> Tensor:
        return (1 + u / (2 * self.alpha)) ** -self.alpha

    def profile_and_slope(self, u: Tensor, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
        values, slopes, base, *_ = scratch or scratch_like(u)
        torch.div(u, 2 * self.alpha, out=base).add_(1)
        torch.pow(base, -self.alpha, out=values)
        return values, torch.div(values, base, out=slopes).mul_(-0.5)


def root(u: Tensor) -> Tensor:
    """The square root, with slope 0 at 0."""
    # Its own slope is infinite there, and 0 times infinity on the diagonal would be NaN: below the smallest normal
    # number the clamp passes no gradient.
    return u.clamp(min=torch.finfo(u.dtype).tiny).sqrt()


def inverse_root_into(u: Tensor, out: Tensor) -> Tensor:
    """1 / sqrt(u), or 0 where that would be infinite; a processor takes it in less time than the root."""
    return torch.threshold(u, torch.finfo(u.dtype).tiny, math.inf, out=out).rsqrt_()


def scratch_like(u: Tensor) -> Scratch:
    """Tensors to work in, of the shape of u."""
    return tuple(torch.empty_like(u) for _ in range(SCRATCH))
