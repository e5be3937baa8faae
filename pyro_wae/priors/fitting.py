"""A prior that is fitted to the codes of a trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyro_wae._core.checks import number, whole
from pyro_wae._core.distributions import distribution_of, distribution_tensors
from pyro_wae.predict import code_rows
from pyro_wae.priors.mixtures import MixturePrior, VampPrior, least_scales

Prior = TypeVar("Prior")

WRITE = "priors.fit(model, guide, x, prior=MixturePrior(100, d))"


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    prior: Prior,
    steps: int = 1500,
    batch_size: int = 500,
    learning_rate: float = 0.02,
    data_plate: str | None = None,
    **kwargs: Any,
) -> Prior:
    """Fits a prior to the codes of a trained model by maximum likelihood, and leaves model and guide as they are.

    Samples of a model that was trained with a fixed prior, or without a penalty, improve when their codes come from the
    distribution that the codes have: ex-post density estimation. Fit to training data, and test on held-out codes.

    Args:
        model: The Pyro model.
        guide: Its guide.
        args: Arguments of both, the data among them.
        prior: Fitted in place: a module whose call returns the distribution of one code, such as
            :class:`MixturePrior` or a flow of zuko, or a distribution whose parameters require a gradient or are
            those of its transforms, such as a Pyro flow. A :class:`MixturePrior` starts at the codes. It and a
            :class:`VampPrior` take the codes' mean and scale: ``standardized`` is set to False. Their components'
            scales stay above a thousandth of the codes' standard deviation, because the likelihood of codes that
            repeat grows without bound as a scale goes to 0. A mixture is moved to the dtype and the device of the
            codes; the codes are moved to those of any other prior.
        steps: Steps of Adam, whose learning rate is lowered to 0 along a cosine.
        batch_size: Codes in a step.
        learning_rate: The first learning rate.
        data_plate: Name of the plate that holds the data; found if not given.
        kwargs: Keyword arguments of both.

    Returns:
        The fitted prior.

    Raises:
        ValueError: If an argument is out of range, the prior has no learnable parameter, its draws have another size
            than codes, or the fit diverges. The prior is then as it was.
        TypeError: If the prior is neither a module nor a distribution.

    Source: Ghosh, Sajjadi, Vergari, Black, Schoelkopf, "From Variational to Deterministic Autoencoders", 2020,
    arXiv:1903.12436, section 4.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Delta(x).to_event(1))
        >>> _ = torch.manual_seed(0)
        >>> prior = fit(model, guide, 3 + torch.randn(500, 2), prior=MixturePrior(5, 2), steps=100)
        >>> prior().sample((1000,)).mean(0).round()
        tensor([3., 3.])

        Samples of the model decode draws of it: ``predict.sample(model, x, num_samples=100, prior=prior)``.
    """
    steps = whole("steps", steps, least=1, write="steps=1500")
    batch_size = whole("batch_size", batch_size, least=1, write="batch_size=500")
    learning_rate = number("learning_rate", learning_rate, above=0, write="learning_rate=0.02")
    parameters = _parameters(prior)
    # Also where the caller has turned gradients off, as around an evaluation.
    with torch.inference_mode(False), torch.enable_grad():
        codes = code_rows(model, guide, *args, data_plate=data_plate, **kwargs)[0].clone()
        if isinstance(prior, MixturePrior):
            prior.to(codes)
        codes = codes.to(parameters[0])
        with _as_it_was_if_it_fails(prior, parameters, learning_rate):
            if isinstance(prior, MixturePrior):
                prior.initialise(codes)
            if isinstance(prior, MixturePrior | VampPrior):
                prior.standardized = False
            _check_size(distribution_of(prior, write=WRITE), codes.shape[1])
            _maximise(prior, parameters, codes, steps, batch_size, learning_rate)
    return prior


def _maximise(
    prior: Any, parameters: list[Tensor], codes: Tensor, steps: int, batch_size: int, learning_rate: float
) -> None:
    """Maximises the likelihood of codes (n, d)."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    least, order = _least_log_scales(prior, codes), codes.new_empty(0, dtype=torch.long)
    try:
        for _ in range(steps):
            if len(order) < min(batch_size, len(codes)):
                order = torch.randperm(len(codes), device=codes.device)
            batch, order = order[:batch_size], order[batch_size:]
            optimizer.zero_grad()
            loss = -distribution_of(prior, write=WRITE).log_prob(codes[batch]).mean()
            loss.backward(inputs=parameters)  # those of an encoder in the prior are not its own
            optimizer.step()
            scheduler.step()
            if least is not None:
                with torch.no_grad():
                    prior.log_scales.clamp_(min=least)
    finally:
        optimizer.zero_grad()


def _least_log_scales(prior: Any, codes: Tensor) -> Tensor | None:
    """The bound of the scales that a mixture learns; None for another prior."""
    if not isinstance(prior, MixturePrior | VampPrior) or not prior.log_scales.requires_grad:
        return None
    least = least_scales(codes).log().to(prior.log_scales)
    # A VampPrior has one scale for all dimensions.
    return least if isinstance(prior, MixturePrior) else least.amin()


@contextmanager
def _as_it_was_if_it_fails(prior: Any, parameters: list[Tensor], learning_rate: float) -> Iterator[None]:
    """Restores a prior whose fit raises.

    Raises:
        ValueError: If its parameters are not finite at the end.
    """
    tensors = [*prior.parameters(), *prior.buffers()] if isinstance(prior, nn.Module) else parameters
    before = [(tensor, tensor.detach().clone()) for tensor in tensors if not nn.parameter.is_lazy(tensor)]
    standardized = prior.standardized if isinstance(prior, MixturePrior | VampPrior) else False
    try:
        yield
        if not _are_finite(parameters):
            raise FloatingPointError
    except Exception as error:
        has_diverged = not _are_finite(parameters)
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        if isinstance(prior, MixturePrior | VampPrior):
            prior.standardized = standardized
        if not has_diverged:
            raise
        raise ValueError(
            "prior has parameters that are not finite after its fit, which has diverged; it is as it was. Write "
            f"priors.fit(model, guide, x, prior=prior, learning_rate={learning_rate / 10:g})."
        ) from error


def _are_finite(parameters: list[Tensor]) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in parameters if not nn.parameter.is_lazy(parameter))


def _check_size(distribution: Any, d: int) -> None:
    """Raises ValueError unless a draw is a code: broadcasting would fit one number to all dimensions."""
    shape = distribution.batch_shape + distribution.event_shape
    if shape.numel() != d:
        raise ValueError(
            f"prior must be the distribution of one code of {d} numbers, found draws of shape {tuple(shape)}. Write "
            f"prior=MixturePrior(100, {d})."
        )


def _parameters(prior: Any) -> list[Tensor]:
    is_module = isinstance(prior, nn.Module)
    tensors = prior.parameters() if is_module else distribution_tensors(distribution_of(prior, write=WRITE))
    found = [tensor for tensor in dict.fromkeys(tensors) if tensor.requires_grad and tensor.is_leaf]
    if not found:
        raise ValueError(
            f"prior has no parameter to be learnt, found {prior!r}. Write prior=MixturePrior(100, d), or a flow whose "
            "transforms are modules."
        )
    return found
