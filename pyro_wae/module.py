"""A WAE loss bound to its model and guide, as a module for plain torch optimisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyro.infer.elbo import ELBOModule
from torch import nn

from pyro_wae.step.terms import Terms

if TYPE_CHECKING:
    from pyro_wae.loss import WAELoss

__all__ = ["WAEModule"]


class WAEModule(ELBOModule):
    """A WAE loss bound to its model and guide, for plain torch optimisers and everything that takes a module.

    ``parameters()`` and ``state_dict()`` hold the model, the guide and what the penalty and cost own: a discriminator,
    a bandwidth. Model and guide may be modules or methods of one. A call gives the differentiable loss.

    Args:
        model: A Pyro model: a module, a module's method, or a function.
        guide: Its guide, likewise.
        loss: The loss.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_wae import WAELoss
        >>> class AutoEncoder(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder, self.decoder = torch.nn.Linear(5, 2), torch.nn.Linear(2, 5)
        ...     def model(self, x):
        ...         with pyro.plate("data", len(x)):
        ...             z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
        ...             pyro.sample("x", dist.Normal(self.decoder(z), 1).to_event(1), obs=x)
        ...     def guide(self, x):
        ...         with pyro.plate("data", len(x)):
        ...             pyro.sample("z", dist.Delta(self.encoder(x)).to_event(1))
        >>> wae = AutoEncoder()
        >>> loss_fn = WAELoss()(wae.model, wae.guide)
        >>> optimiser = torch.optim.Adam(loss_fn.parameters())
        >>> loss_fn(torch.randn(64, 5)).backward()
        >>> optimiser.step()
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], loss: WAELoss) -> None:
        nn.Module.__init__(self)
        self.elbo = loss
        for role, program in (("model", model), ("guide", guide)):
            if not callable(program):
                raise TypeError(f"The {role} must be a module or a function, found {program!r}.")
            setattr(self, role, program)
            owner = getattr(program, "__self__", None)
            if isinstance(owner, nn.Module):
                self.add_module(f"{role}_owner", owner)
        for name, module in loss.named_children():
            self.add_module(name, module)

    @property
    def terms(self) -> Terms | None:
        """The parts of the last loss."""
        return self.elbo.terms
