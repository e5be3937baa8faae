"""The adversary in code space, the penalty of WAE-GAN."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_wae._core import checks
from pyro_wae._core.fitted import FittedBuffers
from pyro_wae.penalties.base import Penalty
from pyro_wae.penalties.context import PenaltyContext

LogProb = Callable[[Tensor], Tensor]
Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


DEFAULT_STEPS, DEFAULT_EVERY = 2, 4
HIDDEN_LAYERS, WIDTH, LEAK = 3, 256, 0.2


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The default optimiser of a discriminator: Adam at a rate of 1e-3 with a short memory."""
    return torch.optim.Adam(parameters, lr=1e-3, betas=(0.5, 0.99))


class JensenShannon(FittedBuffers, Penalty):
    r"""The Jensen-Shannon divergence of Q_Z and P_Z in nats, estimated by a discriminator: WAE-GAN.

    The discriminator's logit T distinguishes prior samples from codes by minimising :math:`E\,\mathrm{softplus}(-T(p))
    + E\,\mathrm{softplus}(T(q))`. At its optimum :math:`T = \log p/q`, and log 2 minus half of the minimum is the
    divergence. On points that the discriminator has not been trained on, the mean value is a lower bound: a
    discriminator that lags behind underestimates the divergence. In training its own optimiser has just taken its steps
    on the same batch, and the value may be too large: without a gradient penalty and with many steps, by tenths of a
    nat.

    The encoder's term has the discriminator's parameters detached, the discriminator's term has the codes detached. By
    default the discriminator has an optimiser of its own and takes two steps for each of the encoder's. No other
    optimiser, checkpoint hook or gradient reducer then receives its gradients. With ``optimizer=None`` one backward
    pass serves both players, and whatever optimiser is given the discriminator's parameters trains it: SVI's own does,
    with a learning rate of its own through a callable ``optim_args``, and so does a plain torch optimiser of
    ``WAELoss(...)(model, guide).parameters()``. A ``penalty_weight`` of 0 then trains no discriminator.

    The gradient penalty is what keeps codes apart. While they still lie in a small cluster, a discriminator without it
    is steep there and moves all of them the same way, more strongly than the cost can pull them apart, until they are
    one point that moves away from the discriminator.

    The discriminator's own optimiser leaves out steps that are not finite. On an accelerator, where finding out would
    wait for it, such a step has a gradient of zeros.

    Args:
        discriminator: A module that maps codes (n, d) to logits (n,) or (n, 1). Default: three hidden layers of 256
            with LeakyReLU, whose first layer takes the latent dimension d of the first codes.
        prior_log_prob: Whether log p(z) is added to the logit; the module then learns only -log q(z).
        saturating: Whether the encoder descends E log(1 - D(q)), the gradient of the value, in place of -E log D(q),
            which has the same direction at each code but does not vanish where the discriminator is confident.
        gradient_penalty: Weight of the mean of ``|dT/dz|^2`` over codes and prior samples, half each, in the
            discriminator's loss; 0 leaves it out, and only then is the optimum's value the whole divergence.
        gradient_penalty_every: The gradient penalty is computed in every k-th step of the discriminator only, with k
            times its weight ("lazy regularisation"): it costs more than the rest of the step and changes slowly.
            Default: 4, or 1 without an optimizer of its own.
        optimizer: Makes the discriminator's own optimiser of its parameters. Default:
            :func:`~pyro_wae.penalties.adversarial.adam`. None leaves the discriminator to the caller's optimiser.
        steps: Number of the own optimiser's steps for each step of the encoder. Default: 2.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument is out of range; when called, if the discriminator fails on the codes or its logits
            have another shape, or if ``prior_log_prob`` is True and the prior has no log density.

    Source: Tolstikhin, Bousquet, Gelly, Schoelkopf, "Wasserstein Auto-Encoders", 2018, arXiv:1711.01558, algorithm 1;
    Goodfellow et al., "Generative Adversarial Networks", 2014, arXiv:1406.2661; for the gradient penalty Mescheder,
    Geiger, Nowozin, "Which Training Methods for GANs do actually Converge?", 2018, arXiv:1801.04406, and for taking it
    now and then Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, arXiv:1912.04958.

    Example:
        >>> import torch
        >>> penalty = JensenShannon()
        >>> codes = torch.zeros(10, 2, requires_grad=True)
        >>> penalty(codes, torch.randn(10, 2)).backward()
        >>> codes.grad.shape
        torch.Size([10, 2])
    """

    def __init__(
        self,
        discriminator: nn.Module | None = None,
        *,
        prior_log_prob: bool = False,
        saturating: bool = False,
        gradient_penalty: float = 1.0,
        gradient_penalty_every: int | None = None,
        optimizer: Optimizer | None = adam,
        steps: int | None = None,
    ) -> None:
        super().__init__()
        if discriminator is not None:
            what = "a torch.nn.Module from codes (n, d) to logits (n, 1)"
            write = "JensenShannon(nn.Sequential(nn.Linear(d, 256), nn.ReLU(), nn.Linear(256, 1)))"
            checks.instance("JensenShannon's discriminator", discriminator, nn.Module, what, write=write)
        if optimizer is not None:
            what = "a function that makes a torch.optim.Optimizer of parameters, or None"
            write = "optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3)"
            checks.instance("JensenShannon's optimizer", optimizer, Callable, what, write=write)
        if steps is not None:
            steps = checks.whole("JensenShannon's steps", steps, write="steps=2")
        if gradient_penalty_every is not None:
            gradient_penalty_every = checks.whole(
                "JensenShannon's gradient_penalty_every", gradient_penalty_every, write="gradient_penalty_every=4"
            )
        if steps is not None and optimizer is None:
            raise ValueError(
                f"steps={steps} is for an optimizer of the discriminator's own, and optimizer=None leaves it to the "
                "caller's. Write JensenShannon(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3), "
                f"steps={steps}), or leave steps out."
            )
        self._is_default = discriminator is None
        self.discriminator = _default_discriminator() if discriminator is None else discriminator
        self.prior_log_prob = checks.flag("JensenShannon's prior_log_prob", prior_log_prob, write="prior_log_prob=True")
        self.saturating = checks.flag("JensenShannon's saturating", saturating, write="saturating=True")
        self.gradient_penalty = checks.number(
            "JensenShannon's gradient_penalty", gradient_penalty, least=0, write="gradient_penalty=1.0"
        )
        self.gradient_penalty_every = gradient_penalty_every
        self.optimizer = optimizer
        self.steps = steps
        self._taken = 0  # steps of the discriminator
        self._size: int | None = None
        self._own: torch.optim.Optimizer | None = None
        self._places: list[tuple[torch.device, torch.dtype]] = []  # of what the own optimiser trains
        self._state: dict[str, Any] | None = None
        self._learning = [name for name, value in self.discriminator.named_parameters() if value.requires_grad]
        if optimizer is not None:
            # What the own optimiser trains must look frozen to everybody else's, to DDP before the first step too.
            self._learn(False)

    def prepare(self, codes: Tensor) -> None:
        size = codes.shape[-1]
        if self._size not in (None, size):
            raise ValueError(
                f"The discriminator was made for codes of {self._size} numbers, found {size}. For another model make a "
                "WAELoss of its own. Where a latent site is observed in some batches, give each site a penalty of its "
                "own: WAELoss({'z': JensenShannon(), 'y': JensenShannon()})."
            )
        self._size = size
        checks.no_transform("JensenShannon", "trains its discriminator", write="WAELoss(MMD())")
        dtype = torch.float64 if codes.dtype == torch.float64 else torch.float32
        if self._is_lazy():
            self.discriminator.to(codes.device, dtype)
            with torch.no_grad():
                self.discriminator(codes.detach().reshape(-1, codes.shape[-1])[:2].to(dtype))
        elif any(device != codes.device or (self._is_default and kind != dtype) for device, kind in self._placed()):
            # SVI moves no loss, and a checkpoint may come from another device; `penalty.half()` may have been called.
            self.discriminator.to(codes.device, dtype if self._is_default else None)
        if self.optimizer is not None:
            self._learn(False)

    def estimate(self, codes: Tensor, prior: Tensor, context: PenaltyContext) -> Tensor:
        q, p = codes.flatten(0, 1), prior
        log_prob = functools.partial(_log_prob, n=codes.shape[1], context=context) if self.prior_log_prob else None
        training = torch.is_grad_enabled()
        if training and self.optimizer is not None and self._learning:
            self._train(q, p, log_prob, self.optimizer)
        # Copies: before the backward pass another call may train the discriminator, in place.
        parameters = {name: value.detach().clone() for name, value in self.discriminator.named_parameters()}
        adversary = functools.partial(torch.func.functional_call, self.discriminator, parameters)
        logits_q, logits_p = self._logits(adversary, q, log_prob), self._logits(adversary, p, log_prob)
        # A negative logit says "code": the encoder lowers the odds of being found out, and so does a prior that learns.
        to_encoder = -softplus(logits_q) if self.saturating else softplus(-logits_q)
        to_prior = -softplus(-logits_p) if self.saturating else softplus(logits_p)
        players = (to_encoder.mean() + to_prior.mean()) / 2
        if training and self.optimizer is None:
            players = players + self._loss(q, p, log_prob)
        value = math.log(2) - (softplus(-logits_p).mean() + softplus(logits_q).mean()).detach() / 2
        # A bounded discriminator, one that ends in a tanh, would hide an infinite code.
        value = value.where(q.isfinite().all() & p.isfinite().all(), math.nan)
        return value + (players - players.detach())

    def _logits(self, adversary: Callable[[Tensor], Any], z: Tensor, log_prob: LogProb | None) -> Tensor:
        try:
            logits = adversary(z)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            size, kind = z.shape[1], str(z.dtype).removeprefix("torch.")
            raise ValueError(
                f"The discriminator fails on codes of shape {tuple(z.shape)} and dtype {kind}: {error}. Its first "
                f"layer must take such codes: nn.LazyLinear(256), or nn.Linear({size}, 256, dtype=torch.{kind})."
            ) from error
        if not isinstance(logits, Tensor) or logits.shape not in ((len(z),), (len(z), 1)):
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"The discriminator must return one logit for each of {len(z)} codes, of shape ({len(z)},) or "
                f"({len(z)}, 1), found {found}. End it with nn.Linear(..., 1)."
            )
        logits = logits.reshape(-1)
        return logits if log_prob is None else logits + log_prob(z)

    def _loss(self, q: Tensor, p: Tensor, log_prob: LogProb | None) -> Tensor:
        """The discriminator's own loss, blind to where its points come from."""
        default = 1 if self.optimizer is None else DEFAULT_EVERY
        every = default if self.gradient_penalty_every is None else self.gradient_penalty_every
        weight = every * self.gradient_penalty if self._taken % every == 0 else 0.0
        self._taken += 1
        q, p = (points.detach().requires_grad_(weight > 0) for points in (q, p))
        logits_q = self._logits(self.discriminator, q, log_prob)
        logits_p = self._logits(self.discriminator, p, log_prob)
        loss = softplus(-logits_p).mean() + softplus(logits_q).mean()
        if weight:
            slopes = torch.autograd.grad(logits_q.sum() + logits_p.sum(), (q, p), create_graph=True)
            loss = loss + weight / 2 * sum(slope.square().sum(1).mean() for slope in slopes)
        return loss

    def get_extra_state(self) -> dict[str, Any]:
        """The state of the own optimiser and the number of the discriminator's steps, for ``state_dict``."""
        return {"optimizer": self._state if self._own is None else self._own.state_dict(), "taken": self._taken}

    def set_extra_state(self, state: Any) -> None:
        """Restores what :meth:`get_extra_state` returned."""
        self._state = copy.deepcopy(state["optimizer"])  # which another optimiser may still be writing to
        self._taken = state.get("taken", 0)  # which former states have not
        self._own = None  # made anew from the state, which may also be that before the first step

    def before_loading(self, saved: dict[str, Any]) -> None:
        # A discriminator that does not know the codes yet goes where they were, as it does in `prepare`.
        weights = [value for key, value in saved.items() if key.startswith("discriminator.")]
        if self._is_lazy() and weights and isinstance(weights[0], Tensor) and not nn.parameter.is_lazy(weights[0]):
            self.discriminator.to(weights[0].device, weights[0].dtype if weights[0].is_floating_point() else None)

    def _is_lazy(self) -> bool:
        return any(nn.parameter.is_lazy(parameter) for parameter in self.discriminator.parameters())

    def _placed(self) -> list[tuple[torch.device, torch.dtype]]:
        return [(parameter.device, parameter.dtype) for parameter in self.discriminator.parameters()]

    def _train(self, q: Tensor, p: Tensor, log_prob: LogProb | None, optimizer: Optimizer) -> None:
        are_finite = q.isfinite().all() & p.isfinite().all()
        if self._own is not None and self._places != self._placed():
            self._state, self._own = self._own.state_dict(), None  # what it keeps has not followed its parameters
        if self._own is None:
            made, what = optimizer(self.discriminator.parameters()), "a torch.optim.Optimizer"
            write = "optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3)"
            checks.instance("What optimizer returns", made, torch.optim.Optimizer, what, write=write)
            if isinstance(made, torch.optim.LBFGS):
                raise ValueError(
                    "What optimizer returns must take one gradient a step, found LBFGS, whose step asks for a closure "
                    f"and evaluates the loss several times. Write {write}."
                )
            self._own = made
            if self._state is not None:
                self._own.load_state_dict(self._state)
            self._places = self._placed()
        self._learn(True)
        try:
            for _ in range(DEFAULT_STEPS if self.steps is None else self.steps):
                self._own.zero_grad()
                self._loss(q, p, log_prob).backward()
                if self._gradient_is_usable(are_finite):
                    # Adam of torch 2.6 makes what it keeps on the default device.
                    with nullcontext() if self._own.state else q.device:
                        self._own.step()
        finally:
            self._own.zero_grad()
            self._learn(False)

    def _gradient_is_usable(self, are_finite: Tensor) -> bool:
        """Whether gradient and points are finite. On an accelerator a gradient that is not is set to 0: always True."""
        gradients = [part.grad for part in self.discriminator.parameters() if part.grad is not None]
        if not gradients:
            return True
        # A sum of numbers is finite only if all of them are, and is read faster than each.
        is_finite = torch.stack([gradient.sum() for gradient in gradients]).isfinite().all() & are_finite
        if is_finite.device.type == "cpu":
            return bool(is_finite)
        for gradient in gradients:
            gradient.copy_(gradient.where(is_finite, 0.0))
        return True

    def _learn(self, learns: bool) -> None:
        for name, parameter in self.discriminator.named_parameters():
            if name in self._learning and not nn.parameter.is_lazy(parameter):
                parameter.requires_grad_(learns)


def _default_discriminator() -> nn.Module:
    placed: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # until the first codes come
    hidden = [nn.LazyLinear(WIDTH, **placed), *(nn.Linear(WIDTH, WIDTH, **placed) for _ in range(HIDDEN_LAYERS - 1))]
    layers = [layer for linear in hidden for layer in (linear, nn.LeakyReLU(LEAK))]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1, **placed))


def _log_prob(z: Tensor, n: int, context: PenaltyContext) -> Tensor:
    if context.prior_log_prob is None:
        raise ValueError(
            "prior_log_prob=True needs the prior's log density, and there is none here. Train through WAELoss with a "
            "prior that has a log_prob and without masks, or write JensenShannon(prior_log_prob=False)."
        )
    # Prior samples that are no multiple of the data come from a caller whose density takes any number of rows.
    return context.prior_log_prob(z.unflatten(0, (-1, n)) if len(z) % n == 0 else z[None]).flatten()
