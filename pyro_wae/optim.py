"""Optimisers for :class:`~pyro.infer.svi.SVI` that step all parameters together, in place of one optimiser for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.optim import is_scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_wae._core.checks import accepted
from pyro_wae._core.repr import CallRepr

__all__ = ["SGD", "Adam", "AdamW", "SharedOptim"]

OptimArgs = dict[str, Any] | Callable[..., dict[str, Any]]
Scheduler = Callable[[Optimizer], LRScheduler]

CONSTRUCTORS = "a class of torch optimisers that treat each parameter for itself (LBFGS does not)"
ARGUMENTS = "a dict, or a function that returns one for the name of a parameter"
SCHEDULERS = "a function that makes a scheduler for a torch optimiser"

# Adagrad's fused kernel for CUDA is younger than the oldest torch that this package runs with.
_FUSED_ON: dict[Any, tuple[str, ...]] = {
    torch.optim.Adam: ("cpu", "cuda"),
    torch.optim.AdamW: ("cpu", "cuda"),
    torch.optim.SGD: ("cpu", "cuda"),
    torch.optim.Adagrad: ("cpu",),
}
# State of the fused optimisers that a kernel reads element by element along with the parameter.
_ELEMENTWISE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")


class SharedOptim(CallRepr, PyroOptim):
    """A :class:`~pyro.optim.optim.PyroOptim` whose parameters share one torch optimiser.

    Pyro makes a torch optimiser for every parameter, and steps them in a Python loop. This one makes an optimiser for
    every distinct set of arguments, hence one as a rule, and lets torch step its parameters at once: by a fused kernel
    where there is one that serves (Adam, AdamW, and SGD without momentum, for CPU and CUDA, Adagrad for CPU), else in
    torch's own default way.

    The updates equal Pyro's up to rounding. Parameters may appear at any step, and only those that a step's model and
    guide used are moved in it. A new parameter starts as it does in Pyro, at its own first learning rate, and joins
    those whose options and scheduler are at that moment equal to its own.

    States are saved by the parameters' names, in the form in which Pyro saves them: a checkpoint of
    ``pyro.optim.Adam`` can be loaded here, and the other way round. Unlike Pyro's, :meth:`set_state` also reaches
    parameters that have already been stepped, and states are copies.

    Args:
        optim_constructor: A class of torch optimisers, such as :class:`torch.optim.Adam`. Others may be given if they
            read ``param_groups`` again at each step and treat each parameter for itself.
        optim_args: The optimiser's arguments, or a function that returns them for the name of a parameter, as it stands
            in Pyro's store with a dot for every ``$$$``: ``"decoder.weight"``. A ``"fused"`` or ``"foreach"`` in them
            takes precedence; ``{"fused": False}`` serves sparse gradients.
        clip_args: ``{"clip_norm": ...}`` or ``{"clip_value": ...}`` or both, applied to each parameter's gradient by
            itself; or a function that returns them for two names, that of the module and that of its parameter.
        scheduler: A function that makes a learning rate scheduler for a torch optimiser. :meth:`step` advances it.

    Attributes:
        optim_objs: The torch optimiser of each parameter, or its scheduler where there is one. Many parameters name
            the same one; for each optimiser once, see :attr:`optimizers`.

    Raises:
        TypeError: If an argument is not of these kinds, or the optimiser is one that mixes its parameters (LBFGS).

    Note:
        An optimiser that changes its own learning rate at each step, such as Pyro's ``ClippedAdam`` with ``lrd``, does
        so for all its parameters, whether or not the step used them; in Pyro each has a rate of its own.

    Example:
        >>> import pyro
        >>> from pyro_wae.optim import SharedOptim
        >>> optim = SharedOptim(torch.optim.RMSprop, lambda name: {"lr": 1e-3 if name.startswith("encoder") else 1e-2})
        >>> weights = [pyro.param(name, torch.ones(2)) for name in ("encoder.a", "encoder.b", "decoder.a")]
        >>> sum(w.sum() for w in weights).backward()
        >>> optim([w.unconstrained() for w in weights])
        >>> [optimizer.param_groups[0]["lr"] for optimizer in optim.optimizers]
        [0.001, 0.01]
        >>> pyro.clear_param_store()
    """

    def __init__(
        self,
        optim_constructor: Callable[..., Optimizer],
        optim_args: OptimArgs,
        clip_args: OptimArgs | None = None,
        *,
        scheduler: Scheduler | None = None,
    ) -> None:
        is_class = callable(optim_constructor) and optim_constructor is not torch.optim.LBFGS
        write = 'SharedOptim(torch.optim.Adam, {"lr": 1e-3})'
        accepted("optim_constructor", optim_constructor, is_class, CONSTRUCTORS, write=write)
        is_args = isinstance(optim_args, dict) or callable(optim_args)
        accepted("optim_args", optim_args, is_args, ARGUMENTS, write='{"lr": 1e-3}')
        is_clip = clip_args is None or isinstance(clip_args, dict) or callable(clip_args)
        accepted("clip_args", clip_args, is_clip, ARGUMENTS, write='{"clip_norm": 10.0}')
        is_maker = scheduler is None or (callable(scheduler) and not isinstance(scheduler, LRScheduler))
        write = "lambda optimizer: ExponentialLR(optimizer, gamma=0.99)"
        accepted("scheduler", scheduler, is_maker, SCHEDULERS, write=write)
        super().__init__(optim_constructor, optim_args, clip_args)
        self.optim_constructor = optim_constructor
        self.optim_args = optim_args
        self.clip_args = clip_args
        self.scheduler = scheduler
        self._names: dict[Tensor, str | None] = {}
        self._shared: list[Any] = []

    @property
    def optimizers(self) -> list[Optimizer]:
        """The torch optimisers, one for each set of options, in the order of their first parameter."""
        return [_optimizer(shared) for shared in self._shared]

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Moves the given parameters by their gradients, and no others.

        Args:
            params: Unconstrained parameters, with or without a gradient.
            *args: For the optimisers' ``step``.
            **kwargs: For the optimisers' ``step``.
        """
        active = dict.fromkeys(params)
        for p in active:
            if p not in self.optim_objs:
                self._add(p)
            # torch's clipping by value fails where there is no gradient.
            if (clip := self.grad_clip[p]) is not None and p.grad is not None:
                clip(p)
        for optimizer in self.optimizers:
            members = optimizer.param_groups[0]["params"]
            unused = [p for p in members if p not in active]
            if len(unused) == len(members):
                continue
            # SVI leaves zeros as gradients, by which momentum would go on to move what this step did not use.
            gradients = [p.grad for p in unused]
            for p in unused:
                p.grad = None
            try:
                optimizer.step(*args, **kwargs)
            finally:
                for p, gradient in zip(unused, gradients, strict=True):
                    p.grad = gradient

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Advances the learning rate schedulers, as :class:`~pyro.optim.lr_scheduler.PyroLRScheduler` does.

        Args:
            *args: For the schedulers' ``step``, such as the loss for ``ReduceLROnPlateau``.
            **kwargs: For the schedulers' ``step``.

        Raises:
            ValueError: If there is no scheduler.
        """
        if self.scheduler is None:
            raise ValueError(
                "step() advances a learning rate scheduler, and there is none; svi.step(...) moves the parameters. "
                "Write SharedOptim(..., scheduler=lambda optimizer: ExponentialLR(optimizer, gamma=0.99))."
            )
        # A loaded state waits until its parameter is used, and would miss this step.
        for name, p in pyro.get_param_store().named_parameters():
            if name in self._state_waiting_to_be_consumed and p not in self.optim_objs:
                self._add(p)
        for scheduler in self._shared:
            scheduler.step(*args, **kwargs)

    def get_state(self) -> dict[str, Any]:
        """Returns a copy of each parameter's state by its name in Pyro's store, states that still wait for it included.

        Raises:
            ValueError: If a parameter had no name when it was first moved.
        """
        if None in self._names.values():
            raise ValueError(
                "States are kept by the names of parameters in Pyro's store, found parameters that are not in it. "
                "Write pyro.module(name, module) in the model and the guide, and leave module_local_params off."
            )
        state = dict(self._state_waiting_to_be_consumed)
        current = dict(pyro.get_param_store().named_parameters())
        for p, name in self._names.items():
            # The store may have been cleared or loaded since; what has gone from it has no state to keep.
            if name is not None and current.get(name) is p:
                state[name] = _state(self.optim_objs[p], p)
        return deepcopy(state)

    def set_state(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over the state of the parameters it names, those that are still to come included.

        Options, the learning rate among them, are those of the state. What it does not name keeps its own state.

        Args:
            state_dict: From :meth:`get_state`, or from that of one of Pyro's own optimisers of the same class.
        """
        is_state = isinstance(state_dict, Mapping) and all(isinstance(own, Mapping) for own in state_dict.values())
        accepted("state_dict", state_dict, is_state, "a state by the name of each parameter", write="optim.get_state()")
        self._state_waiting_to_be_consumed.update(deepcopy(dict(state_dict)))
        for p in [p for p, name in self._names.items() if name in state_dict]:
            self._remove(p)

    def restart(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over these states and no others, those of parameters in Pyro's store at once.

        A state that waits for its parameter's next step misses what schedulers do meanwhile.

        Args:
            state_dict: As for :meth:`set_state`.
        """
        for known in (self.optim_objs, self.grad_clip, self._names, self._shared, self._state_waiting_to_be_consumed):
            known.clear()
        self.set_state(state_dict)
        for name, p in pyro.get_param_store().named_parameters():
            if name in state_dict:
                self._add(p)

    def load(self, filename: str, map_location: Any = None) -> None:
        """Takes over a state from a file that ``save(filename)`` wrote, as :meth:`set_state` does.

        Args:
            filename: The file.
            map_location: See :func:`torch.load`.
        """
        self.set_state(torch.load(filename, map_location=map_location, weights_only=True))

    def _get_optim(self, param: Tensor) -> Any:
        args = self._get_optim_args(param)
        optimizer = self.optim_constructor([param], **{**self._fused(param, args), **args})
        return optimizer if self.scheduler is None else self.scheduler(optimizer)

    def _get_optim_args(self, param: Tensor) -> dict[str, Any]:
        return self._ask("optim_args", super()._get_optim_args, param)

    def _get_grad_clip_args(self, param: Tensor) -> dict[str, Any]:
        return self._ask("clip_args", super()._get_grad_clip_args, param)

    def _ask(self, argument: str, get_args: Callable[[Tensor], dict[str, Any]], param: Tensor) -> dict[str, Any]:
        """Adds the parameter to what Pyro says by ``assert``."""
        name = pyro.get_param_store().param_name(param)
        if callable(getattr(self, argument)) and name is None:
            raise ValueError(
                f"{argument} as a function needs names, found a parameter of shape {tuple(param.shape)} that is not in "
                "Pyro's store. Write pyro.module(name, module) in the model and the guide, or give a dict."
            )
        try:
            return get_args(param)
        except AssertionError as error:
            raise TypeError(
                f"{argument} as a function must return a dict for every parameter, found something else for {name!r}. "
                'End it with a line such as return {"lr": 1e-3}, or return {} for clip_args.'
            ) from error

    def _fused(self, param: Tensor, args: Mapping[str, Any]) -> dict[str, bool]:
        if any(args.get(key) is not None for key in ("fused", "foreach", "differentiable")):
            return {}
        # The fused SGD cannot take parameters that have a velocity together with some that have none yet, and a
        # scheduler such as OneCycleLR sets a momentum later.
        if args.get("momentum") or (self.optim_constructor is torch.optim.SGD and self.scheduler is not None):
            return {}
        devices = _FUSED_ON.get(self.optim_constructor, ())
        fits = type(param) in (Tensor, nn.Parameter) and param.is_floating_point() and param.device.type in devices
        # Without fused=True torch takes foreach where it is the faster one: on CUDA.
        return {"fused": True} if fits else {}

    def _add(self, param: Tensor) -> None:
        name = pyro.get_param_store().param_name(param)
        own = self._get_optim(param)
        grad_clip = self._get_grad_clip(param)
        if name in self._state_waiting_to_be_consumed:
            _load(own, self._state_waiting_to_be_consumed[name], name, param)
            del self._state_waiting_to_be_consumed[name]
        for shared in self._shared:
            if _options(shared) == _options(own):
                optimizer = _optimizer(shared)
                optimizer.param_groups[0]["params"].append(param)
                optimizer.state.update(_optimizer(own).state)
                break
        else:
            self._shared.append(shared := own)
        self.optim_objs[param] = shared
        self.grad_clip[param] = grad_clip
        self._names[param] = name

    def _remove(self, param: Tensor) -> None:
        shared = self.optim_objs.pop(param)
        del self.grad_clip[param], self._names[param]
        optimizer = _optimizer(shared)
        optimizer.state.pop(param, None)
        group = optimizer.param_groups[0]
        group["params"] = [p for p in group["params"] if p is not param]
        if not group["params"]:
            self._shared = [other for other in self._shared if other is not shared]


def Adam(
    optim_args: OptimArgs, clip_args: OptimArgs | None = None, *, scheduler: Scheduler | None = None
) -> SharedOptim:
    """:class:`torch.optim.Adam` for SVI, in the place of ``pyro.optim.Adam``.

    Args:
        optim_args: See :class:`SharedOptim`, as for the others.
        clip_args: Likewise.
        scheduler: Likewise.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro_wae import WAELoss
        >>> from pyro_wae.optim import Adam
        >>> encoder, decoder = torch.nn.Linear(5, 2), torch.nn.Linear(2, 5)
        >>> def model(x):
        ...     pyro.module("decoder", decoder)
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
        ...         pyro.sample("x", dist.Normal(decoder(z), 1).to_event(1), obs=x)
        >>> def guide(x):
        ...     pyro.module("encoder", encoder)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Delta(encoder(x)).to_event(1))
        >>> svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=WAELoss())
        >>> loss = svi.step(torch.randn(100, 5))
        >>> len(svi.optim.optimizers)
        1
        >>> pyro.clear_param_store()
    """
    return SharedOptim(torch.optim.Adam, optim_args, clip_args, scheduler=scheduler)


def AdamW(
    optim_args: OptimArgs, clip_args: OptimArgs | None = None, *, scheduler: Scheduler | None = None
) -> SharedOptim:
    """:class:`torch.optim.AdamW` for SVI, in the place of ``pyro.optim.AdamW``; arguments as for :func:`Adam`."""
    return SharedOptim(torch.optim.AdamW, optim_args, clip_args, scheduler=scheduler)


def SGD(
    optim_args: OptimArgs, clip_args: OptimArgs | None = None, *, scheduler: Scheduler | None = None
) -> SharedOptim:
    """:class:`torch.optim.SGD` for SVI, in the place of ``pyro.optim.SGD``; arguments as for :func:`Adam`."""
    return SharedOptim(torch.optim.SGD, optim_args, clip_args, scheduler=scheduler)


def _optimizer(shared: Any) -> Optimizer:
    return shared.optimizer if is_scheduler(shared) else shared


def _options(shared: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What decides the next step but for the parameters' own state: the options, and the scheduler's state."""
    (group,) = _optimizer(shared).param_groups
    options = {key: value for key, value in group.items() if key != "params"}
    return options, shared.state_dict() if is_scheduler(shared) else None


def _state(shared: Any, param: Tensor) -> dict[str, Any]:
    """The state of one parameter, as if it had an optimiser of its own: the form in which Pyro saves it."""
    options, scheduler = _options(shared)
    own = _optimizer(shared).state
    state = {"state": {0: own[param]} if param in own else {}, "param_groups": [{**options, "params": [0]}]}
    return state if scheduler is None else {"scheduler": scheduler, "optimizer": state}


def _load(own: Any, state: Mapping[str, Any], name: str, param: Tensor) -> None:
    """Loads what :func:`_state` gave into the optimiser of one parameter."""
    if is_scheduler(own) != ("scheduler" in state):
        found, there = ("without", "is one") if is_scheduler(own) else ("with", "is none")
        raise ValueError(
            f"The state of {name!r} was saved {found} a scheduler, and here there {there}. "
            "Write SharedOptim(..., scheduler=...) as it was when the state was saved."
        )
    saved = state["optimizer"] if is_scheduler(own) else state
    for key, value in saved["state"].get(0, {}).items():
        # A fused kernel would read past the end of a state that is smaller than its parameter.
        if key in _ELEMENTWISE and isinstance(value, Tensor) and value.shape != param.shape:
            raise ValueError(
                f"The state of {name!r} has {key} of shape {tuple(value.shape)}, and the parameter has shape "
                f"{tuple(param.shape)}. Load the state of a model with layers of the same sizes."
            )
    optimizer = _optimizer(own)
    (group,) = optimizer.param_groups
    # How a step is computed belongs to this machine, and decides where torch keeps the count of steps.
    here = {key: group[key] for key in ("fused", "foreach") if key in group}
    optimizer.load_state_dict({**saved, "param_groups": [{**saved["param_groups"][0], **here}]})
    if is_scheduler(own):
        own.load_state_dict(state["scheduler"])
