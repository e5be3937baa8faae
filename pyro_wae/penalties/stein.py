"""The kernelised Stein discrepancy, which needs the prior's density and no draws of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_wae._core import checks
from pyro_wae._core.rows import squared_distances, working_precision
from pyro_wae.kernels import Kernel, RadialKernel, RationalQuadratic
from pyro_wae.penalties.base import Penalty
from pyro_wae.penalties.context import PenaltyContext
from pyro_wae.penalties.kernel_means import known_prior
from pyro_wae.penalties.pair_sums import pair_total, within


class KernelStein(Penalty):
    r"""The squared kernelised Stein discrepancy of Q_Z from a prior known by its density, E h(q, q').

    With the prior's score :math:`s(z) = \nabla \log p(z)` and a kernel k

    .. math:: h(x, y) = s(x)^\top s(y)\, k(x, y) + s(x)^\top \nabla_y k(x, y) + s(y)^\top \nabla_x k(x, y)
        + \mathrm{tr}\, \nabla_x \nabla_y k(x, y),

    whose mean over independent codes is 0 if Q_Z = P_Z. The score is taken by automatic differentiation, and gradients
    reach the codes through it too. A factor of p has no effect: the density need not be normalised.
    It must be smooth and positive on all of R^d: on a bounded support, such as that of a Uniform, h has no zero mean.
    The score is local: a wrong weight of a distant mode has little effect.

    Where the prior depends on the data, each code enters with its own datum's density. The mean is then 0 if the codes
    of every datum follow their own prior, not already if all of them together do.

    The estimate is a U-statistic and therefore sometimes negative. It leaves out the pairs of one datum, a code with
    itself and particles with each other; with several particles and a known data set size N the latter have the
    weight 1/N, as in :class:`~pyro_wae.penalties.MMD`. It is meant for the codes of an encoder: codes that are free
    parameters, one for each datum, can make it ever more negative.

    Args:
        kernel: A radial kernel that is twice differentiable in each argument: :class:`~pyro_wae.kernels.Gaussian`,
            ``InverseMultiquadratic``, ``RationalQuadratic``, ``Matern`` with nu > 1/2, and ``MultiScale``, sums,
            products and multiples of these. Default: ``RationalQuadratic(0.5)``, ``(1 + |x - y|^2 / c^2)^(-1/2)``. Its
            heavy tails make a small discrepancy mean closeness also for d >= 3, where that of a Gaussian kernel may
            vanish on codes that go to infinity. A length left as None is taken, once, from the variance of the
            context's prior: c^2 is the sum of the variances of a code's coordinates (half the mean squared distance of
            two prior samples) times the kernel's own factor.
        log_prob: The prior's log density up to a constant: maps codes (n, d) to (n,), each from its own row, in their
            precision. Default: the context's ``prior_log_prob``, which WAELoss takes from the model's own prior.

    Raises:
        TypeError: If the kernel is none of these, or ``log_prob`` cannot be called.
        ValueError: When called: if no log density is known, or its value has another shape, is not differentiable or
            not finite; if a length is unset and the prior has no variance; if codes are incomplete under a mask.

    Source: Liu, Lee, Jordan, "A Kernelized Stein Discrepancy for Goodness-of-fit Tests", 2016, arXiv:1602.03253,
    theorem 3.6; Chwialkowski, Strathmann, Gretton, "A Kernel Test of Goodness of Fit", 2016, arXiv:1602.02964; for the
    default kernel Gorham, Mackey, "Measuring Sample Quality with Kernels", 2017, arXiv:1703.01717, theorem 8.

    Example:
        >>> import torch
        >>> from pyro_wae.kernels import Gaussian
        >>> codes = torch.zeros(10, 2, requires_grad=True)
        >>> penalty = KernelStein(Gaussian(bandwidth=1.0), log_prob=lambda z: -z.square().sum(1) / 2)
        >>> print(f"{penalty(codes):.4f}")
        2.0000
    """

    needs_prior_draws = False
    accepts_condition = False

    def __init__(self, kernel: Kernel | None = None, *, log_prob: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.kernel = RationalQuadratic(0.5) if kernel is None else kernel
        if not (isinstance(self.kernel, Kernel) and self.kernel.is_smooth):
            raise TypeError(
                f"KernelStein's kernel must be a radial kernel that is twice differentiable, found {kernel!r}. "
                "Write KernelStein(RationalQuadratic(0.5)), KernelStein(Gaussian()) or KernelStein(Matern(2.5))."
            )
        if log_prob is not None:
            what = "a function of codes (n, d) with values (n,)"
            write = "KernelStein(log_prob=lambda z: -z.square().sum(1) / 2)"
            log_prob = checks.function("KernelStein's log_prob", log_prob, what, write=write)
        self.log_prob = log_prob

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        if context.shared_data and context.prior_log_prob is None:
            raise ValueError(
                "KernelStein needs the density of whole codes, but here a mask drops parts of them, or the penalty is "
                "that of one latent site of several. Write MMD(), which compares with draws."
            )
        # Codes without a graph leave one reason for a gradient: a prior that learns.
        differentiable = torch.is_grad_enabled() and (
            codes.requires_grad or self._log_prob(codes, context).requires_grad
        )
        with torch.inference_mode(False), torch.enable_grad():
            self._fit_to(context, codes.shape[2])
            # A variable of its own, by which a derivative is the partial one: the codes may depend on each other.
            z = (codes if differentiable else codes.detach()).clone()
            z = z if z.requires_grad else z.requires_grad_()
            score = self._score(z, context, create_graph=differentiable)
            rows = torch.cat([working_precision(z), working_precision(score)], dim=2).flatten(0, 1)
            rows = rows if differentiable else rows.detach()
            kernel = _SteinKernel(self.kernel, self._unit(rows))
            value = pair_total(kernel, (rows,), (within(len(rows), len(codes), context.data_size),))
        return value if differentiable else value.detach()

    def _fit_to(self, context: PenaltyContext, d: int) -> None:
        unset = self.kernel.unset()
        if not unset:
            return
        total = _total_variance(context, d)
        if total is None or not (torch.isfinite(total) and total > 0):
            found = "no variance of the prior is known" if total is None else f"the prior's is {total.item():g}"
            raise ValueError(
                f"KernelStein takes the length of {unset[0]!r} from the prior's total variance, but {found}. Give the "
                "length, as in KernelStein(RationalQuadratic(0.5, bandwidth=1.0))."
            )
        for part in unset:
            part.take_length(total)

    def _score(self, z: Tensor, context: PenaltyContext, *, create_graph: bool) -> Tensor:
        """The gradient of log p at each code, (K, n, d)."""
        log_prob = self._log_prob(z, context)
        score = None
        if log_prob.requires_grad:
            (score,) = torch.autograd.grad(log_prob.sum(), z, create_graph=create_graph, allow_unused=True)
        if score is None:
            raise ValueError(f"{_SUBJECT} must be differentiable, found one that is constant or detached. {_FIX}")
        usable = torch.isfinite(log_prob) & torch.isfinite(score).all(-1)
        # On an accelerator a look at the values would wait for it: there the NaN tells.
        if score.device.type == "cpu" and not bool(usable.all()):
            first = tuple((~usable).nonzero()[0].tolist())
            raise ValueError(
                f"{_SUBJECT} and its gradient must be finite on all of R^d, found {log_prob[first].item():g} "
                f"and {score[first].tolist()} at the code {z[first].tolist()}. {_FIX}"
            )
        return score.where(usable[..., None], torch.nan)

    def _log_prob(self, z: Tensor, context: PenaltyContext) -> Tensor:
        """The log density at each code, (K, n)."""
        if self.log_prob is not None:
            shape = z.flatten(0, 1).shape[:1]
            values = self.log_prob(z.flatten(0, 1))
        elif context.prior_log_prob is not None:
            shape = z.shape[:-1]
            try:
                values = context.prior_log_prob(z)
            except NotImplementedError as error:
                raise ValueError(f"{_SUBJECT} is needed, but the prior has none. {_FIX}") from error
        else:
            raise ValueError(f"{_SUBJECT} is needed, found none. {_FIX}")
        if not isinstance(values, Tensor) or values.shape != shape:
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"{_SUBJECT} must be one number for each code, shape {tuple(shape)}, found {got}. {_FIX}")
        return values.reshape(z.shape[:-1])

    def _unit(self, like: Tensor) -> Tensor:
        """The smallest squared length in the kernel."""
        lengths = [part.squared_unit(like) for part in self.kernel.modules() if isinstance(part, RadialKernel)]
        return torch.stack(lengths).amin()


_SUBJECT = "KernelStein: the prior's log density"
_FIX = (
    "Write KernelStein(log_prob=lambda z: ...), a function of codes (n, d) with values (n,) that may be "
    "unnormalised, or MMD(), which needs draws only."
)
_NEAREST = 1e-12


class _SteinKernel(Kernel):
    """The function h of rows (z, s(z)), finite also where two rows coincide.

    Args:
        kernel: k.
        unit: The smallest squared length in it.
    """

    def __init__(self, kernel: Kernel, unit: Tensor) -> None:
        super().__init__()
        self.kernel = kernel
        self.nearest = _NEAREST * unit

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        create_graph = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
        d, same = x.shape[1] // 2, y is x
        (x, x_score), (y, y_score) = x.split(d, 1), y.split(d, 1)
        y = x if same else y
        # For k = f(r^2): grad_x k = 2 f' (x - y) = -grad_y k and trace grad_x grad_y k = -2 d f' - 4 r^2 f''.
        # Where codes coincide a root in f would make 0 times infinity of the second.
        with torch.enable_grad():
            apart = squared_distances(x, y).clamp(min=self.nearest)
            apart = apart if apart.requires_grad else apart.requires_grad_()
            f = self.kernel.profile(apart / self.kernel.squared_unit(apart))
            slope = _derivative(f, apart, create_graph=True)
            curvature = _derivative(slope, apart, create_graph=create_graph)
        centre = (x.detach().mean(0) + y.detach().mean(0)) / 2
        x, y = x - centre, y - centre
        # (s(x) - s(y)).(x - y), which centring leaves as it is.
        pull = (x_score * x).sum(1)[:, None] + (y_score * y).sum(1) - x_score @ y.mT - x @ y_score.mT
        values = (x_score @ y_score.mT) * f - 2 * slope * pull - 2 * d * slope - 4 * apart * curvature
        return values if create_graph else values.detach()


def _derivative(values: Tensor, by: Tensor, *, create_graph: bool) -> Tensor:
    return torch.autograd.grad(values.sum(), by, create_graph=create_graph)[0]


def _total_variance(context: PenaltyContext, d: int) -> Tensor | None:
    prior = known_prior(context, d)
    if prior is None:
        return None
    try:
        return working_precision(prior.variance.detach()).sum()
    except (NotImplementedError, AttributeError):
        return None
