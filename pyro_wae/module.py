"""A WAE loss bound to its model and guide, as a module for plain torch optimisers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self

from pyro.infer.elbo import ELBO, ELBOModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_wae import predict
from pyro_wae._core import checks
from pyro_wae._core.distributions import leaves
from pyro_wae._core.programs import owners
from pyro_wae.step.program import Program
from pyro_wae.step.records import Terms

OPTIONS = {"random", "return_sites"}
"""Keyword arguments of :mod:`pyro_wae.predict`, which are none of the model's."""


class WAEModule(ELBOModule):
    """A WAE loss bound to its model and guide, for plain torch optimisers and everything that takes a module.

    ``parameters()`` and ``state_dict()`` hold the model, the guide and what the penalty and cost own: a discriminator,
    a bandwidth. Model and guide may be modules or methods of one. If that module keeps the loss as an attribute,
    ``self.loss = WAELoss()(self.model, self.guide)``, its nets stay with it and are not registered here a second time.
    A call returns the differentiable loss.

    Args:
        model: A Pyro model: a module, a module's method, or a function.
        guide: Its guide, likewise.
        loss: The :class:`~pyro_wae.WAELoss`.

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

    def __init__(self, model: Program, guide: Program, loss: ELBO) -> None:
        nn.Module.__init__(self)
        is_loss = isinstance(loss, ELBO) and hasattr(loss, "named_children")
        self.elbo = checks.accepted("loss", loss, is_loss, "a WAELoss", write="WAELoss()(model, guide)")
        self._last_call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._unheld: list[tuple[Tensor, int]] | None = None
        for role, program in (("model", model), ("guide", guide)):
            checks.program(role, program)
            setattr(self, role, program)
            if isinstance(program, nn.Module):
                continue
            bound = getattr(program, "__self__", None)
            for number, owner in enumerate([bound] if isinstance(bound, nn.Module) else owners(program)):
                # Once: torch.func.functional_call does not restore the parameters of a module that is held twice.
                if owner not in self.children():
                    self.add_module(f"{role}_owner" + (f"_{number}" if number else ""), owner)
        for name, module in loss.named_children():
            self.add_module(name, module)

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or a file, without the last batch."""
        return {**super().__getstate__(), "_last_call": None}

    def __setstate__(self, state: Any) -> None:
        """Takes the state of a copy, which for plain functions has other nets than they run."""
        super().__setstate__(state)
        self._leave_holder()
        if any(_is_unmade(getattr(program, "__self__", program)) for program in (self.model, self.guide)):
            return  # the copy of a module that holds this one, with those of its nets
        held = {id(module) for module in self.modules()}
        if any(id(net) not in held for program in (self.model, self.guide) for net in owners(program)):
            warnings.warn(
                "This copy of a bound module has copies of the nets, and its model or guide is a function, which runs "
                "those of the original: the copies have no influence. Make model and guide methods of one "
                "torch.nn.Module: WAELoss()(net.model, net.guide).",
                UserWarning,
                stacklevel=2,
            )

    def _leave_holder(self) -> None:
        """Lets go of a module that holds this one, which has the nets already: modules must be no circle.

        Which module holds it is not known before it is used.
        """
        owners = [(name, owner) for name, owner in self._modules.items() if owner is not None]
        found = [name for name, owner in owners if _is_unmade(owner) or self in owner.modules()]
        for name in found:
            owner = self._modules.pop(name)
            if name in ("model", "guide"):  # which it is itself
                self.__dict__[name] = owner

    # torch does these to a module and to all modules inside: a circle would have no end.

    def train(self, mode: bool = True) -> Self:
        self._leave_holder()
        return super().train(mode)

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        self._leave_holder()
        return super().apply(fn)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._leave_holder()
        return super()._apply(fn, recurse)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._leave_holder()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._leave_holder()
        for key in [key for key in state_dict if key.startswith(f"{prefix}guide_owner")]:
            if key[len(prefix) :].partition(".")[0] not in self._modules:
                del state_dict[key]  # of a version that held the module of model and guide twice
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        self._leave_holder()
        return super().extra_repr()

    @property
    def terms(self) -> Terms | None:
        """The parts of the last loss."""
        return self.elbo.terms

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The differentiable loss on a batch.

        Warns:
            UserWarning: Once, if the loss depends on parameters that are not among those of this module, and an
                optimiser has changed these and not those.
        """
        self._keep(args, kwargs)
        loss: Tensor = self.elbo.differentiable_loss(self.model, self.guide, *args, **kwargs)
        if loss.requires_grad:
            self._check_parameters(loss, (args, kwargs))
        return loss

    def encode(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The latent codes of data; see :func:`pyro_wae.predict.encode`."""
        self._keep(args, kwargs)
        return predict.encode(self.model, self.guide, *args, data_plate=self.elbo.data_plate, **kwargs)

    def decode(self, z: Tensor | Mapping[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The generator's output for latent codes; see :func:`pyro_wae.predict.decode`.

        Args:
            z: The codes of each latent site, as :meth:`encode` returns them, or a tensor where there is one site.
            args: Arguments of the model. Default: those of the last call of this module, or of :meth:`encode`,
                :meth:`decode`, :meth:`reconstruct` or :meth:`sample`. Give them where the model is conditional on them.
            kwargs: Keyword arguments of the model.
        """
        args, kwargs = self._call(args, kwargs, "decode(z, x)")
        return predict.decode(self.model, z, *args, data_plate=self.elbo.data_plate, **kwargs)

    def reconstruct(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The reconstructions of data; see :func:`pyro_wae.predict.reconstruct`."""
        self._keep(args, kwargs)
        return predict.reconstruct(self.model, self.guide, *args, data_plate=self.elbo.data_plate, **kwargs)

    def sample(self, num_samples: int, *args: Any, prior: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        """Samples of the model; see :func:`pyro_wae.predict.sample`.

        Args:
            num_samples: Number of samples.
            args: Arguments of the model; as for :meth:`decode`.
            prior: Replaces the model's own prior.
            kwargs: Keyword arguments of the model, and ``random`` and ``return_sites`` of
                :func:`pyro_wae.predict.sample`.
        """
        args, kwargs = self._call(args, kwargs, f"sample({num_samples}, x)")
        options = {"num_samples": num_samples, "prior": prior, "data_plate": self.elbo.data_plate}
        return predict.sample(self.model, *args, **options, **kwargs)

    def interpolate(self, x_a: Any, x_b: Any, steps: int = 8, **kwargs: Any) -> dict[str, Tensor]:
        """Latent interpolations between two batches of data; see :func:`pyro_wae.predict.interpolate`."""
        return predict.interpolate(self.model, self.guide, x_a, x_b, steps, data_plate=self.elbo.data_plate, **kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], line: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args or kwargs.keys() - OPTIONS:  # which go with the arguments of the last call, too
            self._keep(args, kwargs)
            return args, kwargs
        if self._last_call is None:
            raise ValueError(
                f"The model's arguments are not known: this module has not been called. Write {line}, with the data "
                "that the model is called with, or call the module on a batch first."
            )
        args, named = self._last_call
        return args, {**named, **kwargs}

    def _keep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._last_call = args, {name: value for name, value in kwargs.items() if name not in OPTIONS}

    def _check_parameters(self, loss: Tensor, arguments: Any) -> None:
        if self._unheld is None:
            given = [leaf for value in tree_leaves(arguments) if isinstance(value, Tensor) for leaf in leaves(value)]
            known = {id(value) for value in (*self.parameters(), *given)}
            # With the number of changes that each has seen, by which it can be told later whether one is trained.
            self._unheld = [(value, value._version) for value in leaves(loss) if id(value) not in known]
            self._start = sum(value._version for value in self.parameters())
        elif self._unheld and sum(value._version for value in self.parameters()) > self._start:
            # What a step makes for itself, as the codes of all ranks, is another tensor in the next one.
            found = leaves(loss)
            still = [value for value, version in self._unheld if value._version == version and value in found]
            self._unheld = []
            if still:
                shapes = ", ".join(str(tuple(value.shape)) for value in still[:4])
                warnings.warn(
                    f"The loss depends on {len(still)} parameters (of shapes {shapes} ...) that are not in "
                    "parameters() of this module, and the optimiser does not train these. Make model and guide methods "
                    "of one torch.nn.Module, WAELoss()(net.model, net.guide), and attributes of it of what is "
                    "pyro.param or a plain tensor.",
                    UserWarning,
                    stacklevel=4,
                )


def _is_unmade(module: Any) -> bool:
    """Whether it is a module whose copy is being made, and which has no parts yet."""
    return isinstance(module, nn.Module) and "_modules" not in vars(module)
