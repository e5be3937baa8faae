"""Steps that run as a recorded graph of tensor operations, without Python between them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_wae.decisions import NotRecordable, answered, asked
from pyro_wae.prior import leaves

__all__ = ["Backend", "Gradients", "Recorder", "graph", "inductor"]

Backend = Callable[[GraphModule, list[Tensor]], Callable[..., Sequence[Tensor]]]

MOST_RECORDINGS = 16
"""Recordings of one loss, after which new kinds of calls run as usual."""

MOST_SURPRISES = 8
"""Steps of one kind that did not fit the step before them, after which this kind runs as usual."""

MOST_CHANGES = 1000
"""Steps of one kind that change a number of a module, as while a penalty takes its unit from prior draws."""

PLAIN = (bool, int, float, str)
"""Types of attributes that are watched for changes, because their values are part of a recording."""


def graph(module: GraphModule, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Runs a recording as it is: the kernels of eager PyTorch, one after the other.

    Args:
        module: The recording.
        inputs: What it was recorded with.
    """
    return cast(Callable[..., Sequence[Tensor]], module.forward)


def inductor(module: GraphModule, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Compiles a recording with torch's own compiler, which needs a C++ compiler on a CPU.

    Random numbers stay those of eager PyTorch. Where it fails there is a warning, and the recording runs as it is.

    Args:
        module: The recording.
        inputs: What it was recorded with.
    """
    import torch._inductor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler warns of torch's own code
        try:
            compiled = torch._inductor.compile(copy.deepcopy(module), list(inputs), options={"fallback_random": True})
            return cast(Callable[..., Sequence[Tensor]], compiled)
        except Exception as error:
            reason = _first_line(error)
    warnings.warn(
        f"The recorded step could not be compiled and runs as it was recorded: {reason} Write compile=recording.graph, "
        "from pyro_wae import recording, to leave the compiler out.",
        UserWarning,
        stacklevel=2,
    )
    return graph(module, inputs)


@dataclass(frozen=True)
class Gradients:
    """The gradients of a loss, known along with its value.

    Args:
        parameters: What the loss depends on.
        values: The gradient of each, of its shape.
        keep: Whether they may be asked for twice.
    """

    parameters: Sequence[Tensor]
    values: list[Tensor]
    keep: bool = False

    def add(self) -> None:
        """Adds them to the parameters' ``grad``, as ``backward`` does."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            if parameter.grad is None:
                parameter.grad = value
            else:
                parameter.grad += value

    def attach(self, loss: Tensor) -> Tensor:
        """The loss with a graph whose backward pass gives these gradients."""
        return cast(Tensor, _Attached.apply(loss, self, *self.parameters))


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Gradients, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        if gradients is None:
            raise RuntimeError(
                "Backward was called a second time on a loss whose gradients have been handed over. Write "
                "WAELoss(..., retain_graph=True) to keep them."
            )
        values = gradients.values
        if upstream.device.type != "cpu" or upstream.item() != 1:
            values = torch._foreach_mul(values, upstream) if values else []
        elif gradients.keep:
            values = [value.clone() for value in values]
        if not gradients.keep:
            # autograd takes a gradient that nobody else holds as it is, and would copy it otherwise.
            ctx.gradients = gradients = None
        return (None, None, *values)


@dataclass(frozen=True)
class _Call:
    """One call: what it was called with, and the kind of call that it is."""

    inputs: list[Tensor]
    key: Any


@dataclass
class _Entry:
    """A kind of call: how often it has been seen, and its recording once there is one."""

    answers: list[bool]
    modules: list[nn.Module]
    watched: tuple[Any, ...]
    is_settled: bool
    recording: _Recording | None = None
    surprises: int = 0
    changes: int = 0
    is_refused: bool = False


@dataclass(frozen=True)
class _Place:
    """Where a tensor of a recording is found: a module's parameter or buffer, or in Pyro's store."""

    holder: Mapping[str, Any]
    name: str

    def get(self) -> Any:
        return self.holder.get(self.name)


@dataclass
class _Captured:
    """A tensor that a recording reads besides its inputs."""

    tensor: Tensor
    places: list[_Place]
    like: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.like = _kind(self.tensor)

    def now(self) -> Tensor | None:
        """The tensor that stands in its place now, or None where it does not fit the recording any more."""
        found = [place.get() for place in self.places] or [self.tensor]
        first = found[0]
        if any(other is not first for other in found) or not isinstance(first, Tensor) or _kind(first) != self.like:
            return None
        return first


@dataclass
class _Recording:
    run: Callable[..., Sequence[Tensor]]
    captured: list[_Captured]
    leaves: list[int]
    spec: Any
    constants: list[Any]
    parts: int
    updates: list[_Place]
    mutated: list[int]
    assumes: bool
    params: Mapping[str, Mapping[str, Any]]


class Recorder:
    """Runs a function as it is at first, records it, and then runs the recording: for each kind of call.

    It records as soon as a run has changed no plain attribute of what it reads, the second time as a rule.

    What a recording holds is what :func:`torch.fx.experimental.proxy_tensor.make_fx` sees: the tensor operations of the
    function and of its gradient. Parameters, buffers and Pyro's store are read anew at each call.

    Args:
        backend: What makes something faster of a recording, such as :func:`inductor`.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._entries: dict[Any, _Entry] = {}
        self._recordings = 0
        self._has_warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        # A recording belongs to the very tensors that it was made with, and not to copies of them.
        return Recorder, (self.backend,)

    def __call__(
        self,
        function: Callable[..., Any],
        arguments: Any,
        *,
        key: Any,
        owners: Iterable[object],
        holders: Sequence[nn.Module] = (),
        loss: Callable[[Any], Tensor],
        keep: bool = False,
    ) -> tuple[Any, Gradients | None]:
        """Runs the function, or its recording.

        Args:
            function: Takes `arguments`; gives a tree of tensors and constants.
            arguments: A tree of tensors, which may differ from call to call, and of other objects, which make calls of
                different kinds.
            key: What else makes calls of different kinds; hashable.
            owners: Objects whose plain attributes, and whose parameters and buffers, the function reads.
            holders: Modules whose parameters and buffers it reads, and no plain attributes.
            loss: Finds the loss in what the function gives.
            keep: Whether gradients may be asked for twice.

        Returns:
            What the function gives, and the gradients of the loss. They are None where the function itself has run,
            and its loss has a graph.
        """
        call = _call(arguments, key)
        if call is None:
            self._warn("an argument that is no tensor cannot be hashed, or handlers are active around the step")
            return function(arguments), None
        owners = list(owners)
        entry = self._entries.get(call.key)
        if entry is not None and entry.is_refused:
            return function(arguments), None
        if entry is not None and entry.is_settled and entry.watched == _watched(owners, entry.modules):
            if entry.recording is None:
                self._record(entry, function, arguments, call, owners, holders, loss)
            if entry.recording is not None:
                outcome = _replay(entry.recording, call, keep)
                if outcome is not None:
                    return outcome
            if entry.is_refused:
                return function(arguments), None
        return self._watch(function, arguments, call, owners, holders, entry), None

    def _watch(
        self,
        function: Callable[..., Any],
        arguments: Any,
        call: _Call,
        owners: list[object],
        holders: Sequence[nn.Module],
        before: _Entry | None,
    ) -> Any:
        """Runs the function as it is, and remembers what a recording of it has to know."""
        owned = [module for owner in owners for module in _modules(owner)]
        first = _watched(owners, owned)
        with asked() as answers, _called() as modules:
            result = function(arguments)
        is_settled = first == _watched(owners, owned)
        seen = {module: None for owner in (*owners, *modules) for module in _modules(owner)}
        for holder in holders:
            if holder not in owners:
                seen.pop(holder, None)
        entry = self._entries[call.key] = _Entry(answers, list(seen), _watched(owners, list(seen)), is_settled)
        if before is not None:
            entry.surprises = before.surprises + (before.recording is not None)
            entry.changes = before.changes + (before.recording is None)
            if entry.surprises > MOST_SURPRISES or entry.changes > MOST_CHANGES:
                entry.is_refused = True
                self._warn("something that it depends on, a module's number or what a tensor holds, keeps changing")
        return result

    def _record(
        self,
        entry: _Entry,
        function: Callable[..., Any],
        arguments: Any,
        call: _Call,
        owners: list[object],
        holders: Sequence[nn.Module],
        loss: Callable[[Any], Tensor],
    ) -> None:
        try:
            if self._recordings >= MOST_RECORDINGS:
                raise NotRecordable(
                    f"there are {MOST_RECORDINGS} recordings already. A number that changes from step to step makes a "
                    "new kind of call each time: give it as a tensor"
                )
            with _unchanged(owners, [*entry.modules, *holders]) as changes:
                recording, module, inputs = _record(
                    entry, [*entry.modules, *holders], function, arguments, call, loss, self.backend is not graph
                )
            if changes:
                entry.is_settled = False  # and may be once it has counted, or fitted, what it does now
                return
            with torch.no_grad(), _without_autocast(inputs):
                recording.run = self.backend(module, inputs)
            entry.recording = recording
            self._recordings += 1
        except Exception as error:
            entry.recording, entry.is_refused = None, True
            self._warn(_first_line(error))

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"compile: a step cannot be recorded and runs as usual: {reason.rstrip('.')}. The page 'Speed' says "
                "what can be recorded; or leave compile out.",
                UserWarning,
                stacklevel=2,
            )


def _call(arguments: Any, key: Any) -> _Call | None:
    if torch.is_inference_mode_enabled() or not all(_only_collects(handler) for handler in _PYRO_STACK):
        return None
    flat, spec = tree_flatten(arguments)
    inputs: dict[int, Tensor] = {}
    kinds = []
    for value in flat:
        if isinstance(value, Tensor):
            inputs.setdefault(id(value), value)
            kinds.append((list(inputs).index(id(value)), *_kind(value), value.is_leaf))
        else:
            kinds.append((type(value), value))
    device = next((value.device.type for value in inputs.values()), "cpu")
    state = (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
        torch.get_default_dtype(),
    )
    whole = (key, state, tuple(kinds), spec)
    try:
        hash(whole)
    except TypeError:
        return None
    return _Call(list(inputs.values()), whole)


def _only_collects(handler: object) -> bool:
    return isinstance(handler, TraceMessenger) and bool(handler.param_only)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _modules(owner: object) -> Iterator[nn.Module]:
    if isinstance(owner, nn.Module):
        yield from owner.modules()


def _watched(owners: list[object], modules: list[nn.Module]) -> tuple[Any, ...]:
    others = [owner for owner in owners if not isinstance(owner, nn.Module)]
    return tuple(
        (name, value)
        for holder in (*others, *modules)
        for name, value in getattr(holder, "__dict__", {}).items()
        if type(value) in PLAIN
    )


@contextmanager
def _unchanged(owners: list[object], modules: list[nn.Module]) -> Iterator[list[str]]:
    """Sets plain attributes back to what they were; collects the names of those that had changed."""
    holders = [vars(holder) for holder in (*owners, *modules) if hasattr(holder, "__dict__")]
    before = [{name: value for name, value in own.items() if type(value) in PLAIN} for own in holders]
    changes: list[str] = []
    try:
        yield changes
    finally:
        for own, old in zip(holders, before, strict=True):
            for name, value in old.items():
                if own.get(name) != value:
                    own[name] = value
                    changes.append(name)


@contextmanager
def _called() -> Iterator[list[nn.Module]]:
    """Collects the modules that are called."""
    modules: dict[nn.Module, None] = {}
    hook = register_module_forward_pre_hook(lambda module, inputs: modules.setdefault(module))
    found: list[nn.Module] = []
    try:
        yield found
    finally:
        hook.remove()
        found += modules


def _record(
    entry: _Entry,
    modules: list[nn.Module],
    function: Callable[..., Any],
    arguments: Any,
    call: _Call,
    loss: Callable[[Any], Tensor],
    compiles: bool,
) -> tuple[_Recording, GraphModule, list[Tensor]]:
    buffers = [_Place(module._buffers, name) for module in modules for name in module._buffers]
    before = [place.get() for place in buffers]
    copies = [None if value is None else value.detach().clone() for value in before]
    found: dict[str, Any] = {}

    def traced(*inputs: Tensor) -> list[Tensor]:
        mine = {id(old): new for old, new in zip(call.inputs, inputs, strict=True)}
        flat, spec = tree_flatten(arguments)
        own = tree_unflatten([mine.get(id(value), value) for value in flat], spec)
        with answered(entry.answers, compiles=compiles) as holds, poutine.trace(param_only=True) as params:
            result = function(own)
        parts, found["spec"] = tree_flatten(result)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        found["constants"] = [None if isinstance(part, Tensor) else part for part in parts]
        found["is_tensor"] = [isinstance(part, Tensor) for part in parts]
        value = loss(result)
        gradients: list[tuple[Tensor, Tensor]] = []
        if value.requires_grad:
            names = list(leaves(value))
            with _without_autocast([value]):
                grads = torch.autograd.grad(value, names, allow_unused=True)
            gradients = [(leaf, grad) for leaf, grad in zip(names, grads, strict=True) if grad is not None]
        found["leaves"] = [leaf for leaf, _ in gradients]
        found["updates"] = [
            place for place, old in zip(buffers, before, strict=True) if old is not None and place.get() is not old
        ]
        found["params"] = {name: dict(site) for name, site in params.trace.nodes.items() if site["type"] == "param"}
        held = [torch.stack([hold.reshape(()) for hold in holds]).all()] if holds else []
        found["sizes"] = (len(tensors), len(held))
        return [
            *(tensor.detach() for tensor in tensors),
            *held,
            *(place.get().detach() for place in found["updates"]),
            *(_dense_like(leaf, grad) for leaf, grad in gradients),
        ]

    numpy_state, state = pyro.util.get_rng_state(), _cuda_state()
    torch.clear_autocast_cache()
    try:
        with poutine.block(), pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the step before it has given them
            module = make_fx(traced)(*call.inputs)
        after = pyro.util.get_rng_state()
        if repr(after["random"]) != repr(numpy_state["random"]) or repr(after["numpy"]) != repr(numpy_state["numpy"]):
            raise NotRecordable("it draws random numbers of Python's or NumPy's, and not of torch's")
        mutated = [
            index
            for index, (old, kept) in enumerate(zip(before, copies, strict=True))
            if old is not None and kept is not None and not torch.equal(old.nan_to_num(), kept.nan_to_num())
        ]
    finally:
        torch.clear_autocast_cache()
        pyro.util.set_rng_state(numpy_state)
        _set_cuda_state(state)
        with torch.no_grad():
            for place, old, kept in zip(buffers, before, copies, strict=True):
                if old is not None:
                    place.holder[place.name] = old  # type: ignore[index]
                    old.copy_(kept)
    captured = _lift(module)
    places = _places(modules)
    state_tensors = [_Captured(tensor, places.get(id(tensor), [])) for tensor in captured]
    known = {id(tensor): index for index, tensor in enumerate([*call.inputs, *captured])}
    if any(tensor.grad_fn is not None for tensor in captured):
        raise NotRecordable("it uses a tensor that depends on parameters and was made outside of the step")
    # Tensors made within the step may be leaves too, and nobody sees their gradients.
    wanted = [index for index, leaf in enumerate(found["leaves"]) if id(leaf) in known]
    _keep_outputs(module, len(found["leaves"]), wanted)
    mutated_tensors = {id(before[index]) for index in mutated}
    recording = _Recording(
        run=module.forward,
        captured=state_tensors,
        leaves=[known[id(found["leaves"][index])] for index in wanted],
        spec=found["spec"],
        constants=list(zip(found["is_tensor"], found["constants"], strict=True)),
        parts=found["sizes"][0],
        updates=found["updates"],
        mutated=[index for index, tensor in enumerate(captured) if id(tensor) in mutated_tensors],
        assumes=bool(found["sizes"][1]),
        params=found["params"],
    )
    return recording, module, [tensor.detach() for tensor in (*call.inputs, *captured)]


def _dense_like(leaf: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the leaf's own layout, and shared with nothing."""
    if gradient.stride() == leaf.stride() and gradient._base is None:
        return gradient
    return torch.empty_like(leaf).copy_(gradient)


def _lift(module: GraphModule) -> list[Tensor]:
    """Makes inputs of the tensors that the graph holds; they follow its own."""
    captured: dict[int, Tensor] = {}
    nodes: dict[int, Any] = {}
    last = None
    for node in list(module.graph.nodes):
        if node.op == "placeholder":
            last = node
        elif node.op == "get_attr":
            tensor = getattr(module, node.target)
            if id(tensor) not in nodes:
                place = module.graph.inserting_after(last) if last else module.graph.inserting_before(None)
                with place:
                    last = nodes[id(tensor)] = module.graph.placeholder(f"captured_{len(nodes)}")
                captured[id(tensor)] = tensor
            node.replace_all_uses_with(nodes[id(tensor)])
            module.graph.erase_node(node)
    module.recompile()
    return list(captured.values())


def _keep_outputs(module: GraphModule, count: int, wanted: list[int]) -> None:
    """Leaves out some of the last `count` outputs, and what only they need."""
    (output,) = [node for node in module.graph.nodes if node.op == "output"]
    outputs = list(output.args[0])
    start = len(outputs) - count
    output.args = ([*outputs[:start], *(outputs[start + index] for index in wanted)],)
    for node in reversed(list(module.graph.nodes)):
        if node.op == "call_function" and not node.users and not _has_effect(node.target):
            module.graph.erase_node(node)
    module.recompile()


def _has_effect(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    # BatchNorm writes its statistics without saying so.
    return target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags or "batch_norm" in str(target)


def _places(modules: list[nn.Module]) -> dict[int, list[_Place]]:
    places: dict[int, list[_Place]] = {}
    holders: list[Mapping[str, Any]] = [holder for m in modules for holder in (m._parameters, m._buffers)]
    store = pyro.get_param_store()
    for holder in holders:
        for name, value in holder.items():
            if value is not None:
                places.setdefault(id(value), []).append(_Place(holder, name))
    for name, value in store.named_parameters():
        places.setdefault(id(value), []).append(_Place(_Store(), name))
    return places


class _Store(Mapping[str, Any]):
    """The unconstrained parameters of whatever Pyro's store holds now."""

    def __getitem__(self, name: str) -> Any:
        return dict(pyro.get_param_store().named_parameters())[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict(pyro.get_param_store().named_parameters()))

    def __len__(self) -> int:
        return len(dict(pyro.get_param_store().named_parameters()))


def _replay(recording: _Recording, call: _Call, keep: bool) -> tuple[Any, Gradients | None] | None:
    """What the recorded function gives now; None where the recording does not fit, and nothing has happened."""
    captured = [item.now() for item in recording.captured]
    if any(tensor is None for tensor in captured):
        return None
    inputs = [*call.inputs, *cast(list[Tensor], captured)]
    undo = _Undo(captured, recording.mutated) if recording.assumes else None
    with torch.no_grad(), _without_autocast(inputs):
        outputs = list(recording.run(*[tensor.detach() for tensor in inputs]))
    parts, rest = outputs[: recording.parts], outputs[recording.parts :]
    if undo is not None and not bool(rest.pop(0)):
        undo()
        return None
    for place in recording.updates:
        place.holder[place.name] = rest.pop(0)  # type: ignore[index]
    values = iter(parts)
    tree = tree_unflatten(
        [next(values) if is_tensor else constant for is_tensor, constant in recording.constants], recording.spec
    )
    _show_params(recording.params)
    return tree, Gradients([inputs[index] for index in recording.leaves], rest, keep)


@contextmanager
def _without_autocast(inputs: Iterable[Tensor]) -> Iterator[None]:
    """Switches autocast off, whose casts would reach what the step itself computes in full precision.

    A backward pass has its casts from the forward pass, and a recording holds them.
    """
    with ExitStack() as stack:
        for device in {tensor.device.type for tensor in inputs}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


class _Undo:
    """Takes back what a recorded step has changed, but for its results."""

    def __init__(self, captured: list[Any], mutated: list[int]) -> None:
        self.copies = [(captured[index], captured[index].detach().clone()) for index in mutated]
        self.cpu, self.cuda = torch.get_rng_state(), _cuda_state()

    def __call__(self) -> None:
        torch.set_rng_state(self.cpu)
        _set_cuda_state(self.cuda)
        with torch.no_grad():
            for tensor, kept in self.copies:
                tensor.copy_(kept)


def _show_params(params: Mapping[str, Mapping[str, Any]]) -> None:
    """Shows the parameters of a recorded step to the handlers that collect them."""
    if not _PYRO_STACK:
        return
    store = pyro.get_param_store()
    for name, site in params.items():
        value = store[name] if name in store else site["value"]
        for handler in _PYRO_STACK:
            handler.trace.add_node(name, **{**site, "value": value})


def _cuda_state() -> list[Tensor] | None:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None


def _set_cuda_state(state: list[Tensor] | None) -> None:
    if state is not None:
        torch.cuda.set_rng_state_all(state)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{text[0] if text else type(error).__name__}"
