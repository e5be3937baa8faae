"""Mixtures of Normals as priors, with their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_wae._core.batch_norm import batch_norm_at_rest
from pyro_wae._core.checks import accepted, flag, function, number, tensor, whole
from pyro_wae._core.distributions import innermost

LEAST_SCALE = 1e-3
"""The least scale of a component that is fitted to codes, in the codes' standard deviation. The likelihood of codes
that repeat grows without bound as a scale goes to 0."""


class NormalMixture(dist.MixtureSameFamily):
    r"""A mixture of Normals whose draws have a gradient for the weights, too.

    It is Pyro's ``MixtureSameFamily`` with an ``rsample``. Number i of a draw has, given those before it, the
    distribution function :math:`F_i(z_i \mid z_{<i}) = \sum_k w_k(z_{<i})\,\Phi(e_{ki})`, a mixture of Normals in
    one dimension: :math:`w_k(z_{<i})` is the posterior weight of component k, :math:`e_{ki}` is z_i standardised by
    that component's conditional mean and standard deviation, and :math:`\Phi` is the distribution function of the
    standard Normal. A draw that keeps every :math:`F_i` as a parameter :math:`\theta` changes moves by

    .. math:: \frac{d z_i}{d \theta} = -\frac{d F_i / d \theta}{\partial F_i / \partial z_i},

    where :math:`d F_i / d \theta` is taken at fixed :math:`z_i` and includes the motion of :math:`z_{<i}`. This is an
    unbiased gradient of every smooth function of draws, for weights, locations and scales alike.
    Its variance for the weights grows without bound as components move apart, because a draw that changes component
    crosses the gap: weights then learn better by :class:`~pyro_wae.penalties.PriorLikelihood`. (Pyro's
    ``MixtureOfDiagNormals`` has an ``rsample`` as well, whose gradient for the weights is not that of the mean over
    its draws in version 1.9.2.)

    Args:
        mixture_distribution: A ``Categorical`` of the K weights, of shape (..., K).
        component_distribution: ``Normal(loc, scale).to_event(1)`` or ``MultivariateNormal(loc, scale_tril=...)``,
            with ``batch_shape`` (..., K) and ``event_shape`` (d,).
        validate_args: As for every torch distribution.

    Raises:
        TypeError: If the weights are not a Categorical, or the components not Normals with one event dimension.

    Source: Figurnov, Mohamed, Mnih, "Implicit Reparameterization Gradients", 2018, arXiv:1805.08498, section 3.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> logits = torch.zeros(2, requires_grad=True)
        >>> components = dist.Normal(torch.tensor([[0.0], [1.0]]), 1.0).to_event(1)
        >>> NormalMixture(dist.Categorical(logits=logits), components).rsample((100,)).mean().backward()
        >>> bool(logits.grad[1] > 0)
        True
    """

    has_rsample = True

    def __init__(self, mixture_distribution: Any, component_distribution: Any, validate_args: bool | None = None):
        write = "NormalMixture(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))"
        is_categorical = isinstance(mixture_distribution, torch.distributions.Categorical)
        accepted("mixture_distribution", mixture_distribution, is_categorical, "a Categorical", write=write)
        normals = torch.distributions.Normal | torch.distributions.MultivariateNormal
        is_normal = isinstance(component_distribution, torch.distributions.Distribution) and (
            isinstance(innermost(component_distribution), normals) and len(component_distribution.event_shape) == 1
        )
        what = "Normals with one event dimension (dist.MixtureSameFamily takes other families)"
        accepted("component_distribution", component_distribution, is_normal, what, write=write)
        super().__init__(mixture_distribution, component_distribution, validate_args=validate_args)
        self._one: NormalMixture | None = None

    def expand(self, batch_shape: Any, _instance: Any = None) -> NormalMixture:
        """The same mixture for each element of a larger batch."""
        new = super().expand(batch_shape, _instance=self._get_checked_instance(NormalMixture, _instance))
        # What is computed once for all elements is not computed for each.
        new._one = self if self.batch_shape == () else self._one
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density, of shape ``value.shape[:-1]`` broadcast to ``batch_shape``."""
        if self._one is None:
            return super().log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        log_prob = self._one.log_prob(value)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, with the gradient described above; shape ``sample_shape + batch_shape + (d,)``."""
        if self._one is not None:
            return self._one.rsample(torch.Size(sample_shape) + self.batch_shape)
        with torch.no_grad():
            z = self.sample(torch.Size(sample_shape))
        component = innermost(self.component_distribution)
        tril = component.scale if isinstance(component, torch.distributions.Normal) else component.scale_tril
        leaves = [self.mixture_distribution.logits, component.loc, tril]
        if not torch.is_grad_enabled() or not any(leaf.requires_grad for leaf in leaves):
            return z
        log_weights, loc, tril = leaves
        # The distances of z from each component in its own units, e = L^-1 (z - loc), number by number: (..., K).
        units: list[Tensor] = []
        columns: list[Tensor] = []
        for i in range(z.shape[-1]):
            scale = tril[..., i] if tril.ndim == loc.ndim else tril[..., i, i]
            mean = loc[..., i]
            if tril.ndim > loc.ndim:
                mean = mean + sum(tril[..., i, j] * unit for j, unit in enumerate(units))
            value = z[..., i, None]
            unit = (value - mean) / scale
            weights = log_weights.softmax(-1)
            cdf = (weights * torch.special.ndtr(unit)).sum(-1)
            density = (weights * (-unit.square() / 2).exp() / scale).sum(-1).detach() / math.sqrt(2 * math.pi)
            column = z[..., i] - (cdf - cdf.detach()) / density
            # What comes after is conditioned on a number that moves.
            unit = (column[..., None] - mean) / scale
            log_weights = log_weights - unit.square() / 2 - scale.log()
            units.append(unit)
            columns.append(column)
        return torch.stack(columns, -1)


class MixturePrior(nn.Module):
    """A mixture of Normals with learnable weights, locations and scales.

    Only its shape is learnt: the mixture as a whole has mean 0 and variance 1 in every latent dimension, whatever its
    parameters are. This is no restriction, because encoder and decoder absorb any shift and scale. Without it prior
    and codes could shrink or drift together, while the penalty's kernel keeps the length of the first prior samples.

    Train it with the nets by ``WAELoss(MMD() + PriorLikelihood(), penalty_weight=100.0)``, and give it a larger
    learning rate, through a callable ``optim_args``: 0.03 for Adam, where the nets have 0.001.

    Args:
        components: Number of components K.
        d: Latent dimension.
        full_covariance: Whether a component has a covariance matrix; by default each dimension has its own scale.
        standardized: Whether the whole has mean 0 and variance 1.

    Raises:
        TypeError: If a size is not an integer, or an option is neither True nor False.
        ValueError: If a size is less than 1.

    Example:
        >>> import pyro
        >>> prior = MixturePrior(50, 8)
        >>> with pyro.plate("data", 100):
        ...     z = pyro.sample("z", prior())
        >>> z.shape
        torch.Size([100, 8])
    """

    def __init__(self, components: int, d: int, *, full_covariance: bool = False, standardized: bool = True) -> None:
        super().__init__()
        components = whole("components", components, write="MixturePrior(50, 8)")
        d = whole("d", d, write="MixturePrior(50, 8)")
        full_covariance = flag("full_covariance", full_covariance)
        self.standardized = flag("standardized", standardized)
        # Half of the variance between components, half within: neither points nor one Normal.
        self.logits = nn.Parameter(torch.zeros(components))
        self.locs = nn.Parameter(math.sqrt(0.5) * torch.randn(components, d))
        self.log_scales = nn.Parameter(torch.full((components, d), math.log(0.5) / 2))
        self.lower = nn.Parameter(torch.zeros(components, d, d)) if full_covariance else None

    def forward(self) -> NormalMixture:
        """The prior of one code: ``batch_shape`` (), ``event_shape`` (d,)."""
        locs, tril = self.locs, self.log_scales.exp()
        if self.lower is not None:
            tril = self.lower.tril(-1) + tril.diag_embed()
        return _mixture(self.logits, locs, tril, self.standardized)

    @torch.no_grad()
    def initialise(self, codes: Tensor) -> None:
        """Places the components on codes: k-means++ centres, with the scale that fills the space between them.

        :func:`~pyro_wae.priors.fit` starts from there. A mixture that is learnt along with the nets needs no such call.

        Args:
            codes: Shape (n, d), n >= K.

        Raises:
            TypeError: If codes are not a dense tensor.
            ValueError: If the shape is another, or a code is not finite.

        Source: Arthur, Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007.
        """
        count, d = self.locs.shape
        write = "Write prior.initialise(encoder(images[:1000]))."
        tensor("codes", codes, write="prior.initialise(encoder(images[:1000]))")
        if codes.ndim != 2 or codes.shape[1] != d or len(codes) < count:
            raise ValueError(f"codes must be of shape (n, {d}) with n >= {count}, found {tuple(codes.shape)}. {write}")
        codes = codes.to(self.locs)
        if not codes.isfinite().all():
            raise ValueError(f"codes must be finite, found NaN or infinity. {write}")
        centres = codes[torch.randint(len(codes), (1,), device=codes.device)]
        squares = (codes - centres).square().sum(1)
        for _ in range(count - 1):
            # Where all codes coincide with centres, any of them will do.
            index = torch.multinomial(squares if squares.sum() > 0 else torch.ones_like(squares), 1)
            centres = torch.cat([centres, codes[index]])
            squares = torch.minimum(squares, (codes - codes[index]).square().sum(1))
        self.logits.zero_()
        self.locs.copy_(centres)
        scales = (squares.mean() / d).sqrt().clamp(min=least_scales(codes))
        self.log_scales.copy_(scales.log().expand_as(self.log_scales))
        if self.lower is not None:
            self.lower.zero_()

    def extra_repr(self) -> str:
        components, d = self.locs.shape
        full = self.lower is not None
        return f"{components}, {d}, full_covariance={full}, standardized={self.standardized}"


class VampPrior(nn.Module):
    r"""The encoder's distribution at learnable pseudo-inputs: :math:`\sum_k \pi_k\,Q(z \mid u_k)`.

    The pseudo-inputs u_k are parameters, as are the weights. A deterministic encoder returns points,
    and each component has a learnable scale around its own; of a stochastic encoder give the mean.
    BatchNorm layers of the encoder leave their running statistics alone.

    Args:
        encoder: Maps data (K, ...) to codes (K, d). If it is a module, it stays a part of its owner: it is
            neither in ``parameters()`` nor in ``state_dict()`` of the prior.
        pseudo_inputs: Shape (K, ...), where to start; some of the data will do. They are copied.
        scale: The scale of the components to start with, a number > 0.
        standardized: Whether the whole has mean 0 and variance 1, as in :class:`MixturePrior`.

    Raises:
        ValueError: If the scale is not > 0; when called, if the encoder's codes have another shape than (K, d).
        TypeError: If the encoder cannot be called, the pseudo-inputs are not floats, or an option is of another kind.

    Source: Tomczak, Welling, "VAE with a VampPrior", AISTATS 2018, arXiv:1705.07120.

    Example:
        >>> import torch
        >>> encoder = torch.nn.Linear(5, 2)
        >>> prior = VampPrior(encoder, torch.randn(10, 5))
        >>> prior().sample((100,)).shape
        torch.Size([100, 2])
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor],
        pseudo_inputs: Tensor,
        *,
        scale: float = 0.5,
        standardized: bool = True,
    ) -> None:
        super().__init__()
        write = "VampPrior(encoder, x[:100])"
        scale = number("scale", scale, above=0, write="scale=0.5")
        # In a tuple, a module is not registered a second time.
        self._encoder = (function("encoder", encoder, "a module or a function from data to codes", write=write),)
        self.standardized = flag("standardized", standardized)
        tensor("pseudo_inputs", pseudo_inputs, write=write)
        if not pseudo_inputs.is_floating_point() or pseudo_inputs.ndim < 2 or not len(pseudo_inputs):
            raise TypeError(
                f"pseudo_inputs must be floats of shape (K, ...) with K >= 1, found {pseudo_inputs.dtype} of shape "
                f"{tuple(pseudo_inputs.shape)}. Write {write}."
            )
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.detach().clone())
        self.logits = nn.Parameter(pseudo_inputs.new_zeros(len(pseudo_inputs)))
        self.log_scales = nn.Parameter(pseudo_inputs.new_full((len(pseudo_inputs), 1), math.log(scale)))

    def forward(self) -> NormalMixture:
        """The prior of one code: ``batch_shape`` (), ``event_shape`` (d,)."""
        with batch_norm_at_rest():
            locs = self._encoder[0](self.pseudo_inputs)
        if not isinstance(locs, Tensor) or locs.ndim != 2 or len(locs) != len(self.logits):
            found = f"shape {tuple(locs.shape)}" if isinstance(locs, Tensor) else type(locs).__name__
            raise ValueError(
                f"The encoder must map {len(self.logits)} pseudo-inputs to codes of shape ({len(self.logits)}, d), "
                f"found {found}. Write VampPrior(lambda x: encoder(x).flatten(1), pseudo_inputs)."
            )
        return _mixture(self.logits, locs, self.log_scales.exp().expand_as(locs), self.standardized)

    def extra_repr(self) -> str:
        return f"pseudo_inputs={tuple(self.pseudo_inputs.shape)}, standardized={self.standardized}"


def least_scales(codes: Tensor) -> Tensor:
    """The scales (d,) of components below which codes (n, d) are points: a share of the codes' standard deviation.

    A dimension without spread has the root mean square of all of them, and codes that coincide have 1 in its place.
    """
    variances = codes.var(0, correction=0)
    # The mean of equal numbers may be off by their last digit.
    variances = variances.where(variances > (8 * torch.finfo(codes.dtype).eps * codes.abs().amax(0)).square(), 0.0)
    mean = variances.mean()
    return LEAST_SCALE * variances.where(variances > 0, mean.where(mean > 0, 1.0)).sqrt()


def _mixture(logits: Tensor, locs: Tensor, tril: Tensor, standardized: bool) -> NormalMixture:
    """The mixture with scales (K, d) or Cholesky factors (K, d, d)."""
    full = tril.ndim > locs.ndim
    if standardized:
        weights = logits.softmax(-1)[:, None]
        mean = (weights * locs).sum(0)
        within = tril.square().sum(-1) if full else tril.square()
        unit = (weights * ((locs - mean).square() + within)).sum(0).sqrt()
        locs, tril = (locs - mean) / unit, tril / (unit[:, None] if full else unit)
    component = dist.MultivariateNormal(locs, scale_tril=tril) if full else dist.Normal(locs, tril).to_event(1)
    return NormalMixture(dist.Categorical(logits=logits), component)
