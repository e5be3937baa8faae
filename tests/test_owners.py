"""The modules behind a model or a guide are found wherever a program keeps them."""

import functools
import warnings

import pyro
import pytest
import torch
from programs import around, delta, normal
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from references import program
from torch import nn

from pyro_wae import WAELoss
from pyro_wae._core.programs import owners, wrapped_module


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 3)

    def model(self, x):
        return self.decoder(x)

    def forward(self, x):
        return self.decoder(x)


both, other = Both(), nn.Linear(2, 3)
networks = {"first": both, "second": other}


class Plain:
    """No module, with modules as attributes."""

    def __init__(self):
        self.network, self.more = both, [other]

    def model(self, x):
        return self.network(x)

    def __call__(self, x):
        return self.network(x)


def logged(function):
    @functools.wraps(function)
    def run(*args):
        return function(*args)

    return run


def unnamed(function):
    return lambda *args: function(*args)


def reads_a_global(x):
    return both(x)


def reads_a_dict(x):
    return networks["first"](x) + networks["second"](x)


def calls_a_function(x):
    return reads_a_global(x)


def calls_itself(x):
    return calls_itself(other(x))


def nested(x):
    def inner():
        return [both(row) for row in x]

    return inner()


def reads_an_attribute_of_that_name(x):
    return x.both


def torch_only(x):
    return torch.nn.functional.relu(x) + pyro.sample("z", x)


def of_closure():
    own = both
    return lambda x: own(x)


def of_unfilled_cell():
    def run(x):
        return late(both(x))

    if run is None:
        late = other
    return run


WRAPPED = {
    "module": both,
    "method": both.model,
    "scale": poutine.scale(both, scale=0.1),
    "scale of a method": poutine.scale(both.model, scale=0.1),
    "condition": pyro.condition(both, data={"x": torch.zeros(1)}),
    "reparam": poutine.reparam(both.model, config={"z": LocScaleReparam()}),
    "trace": poutine.trace(both),
    "two handlers": poutine.block(poutine.scale(both, scale=0.1), hide=["z"]),
    "partial": functools.partial(both, 1),
    "partial's argument": functools.partial(Both.model, both),
    "decorator": logged(both.model),
}
REFERRED = {
    "partial's keyword": functools.partial(torch_only, net=both),
    "partial's list": functools.partial(torch_only, [both]),
    "global": reads_a_global,
    "function that reads a global": calls_a_function,
    "function within": nested,
    "closure": of_closure(),
    "closure with a name that is not filled": of_unfilled_cell(),
    "default": lambda x, net=both: net(x),
    "keyword default": lambda x, *, nets=(both,): nets[0](x),
    "handler around a lambda": poutine.scale(lambda x: both(x), scale=0.1),
    "decorator without wraps": unnamed(both.model),
    "lambda of a submodule and its owner": lambda x: both.decoder(x) + both(x),
}


@pytest.mark.parametrize("program", [*WRAPPED.values(), *REFERRED.values()], ids=[*WRAPPED, *REFERRED])
def test_the_module_behind_a_program_is_found(program):
    found = owners(program)
    assert len(found) == 1
    assert found[0] is both


@pytest.mark.parametrize(
    "program",
    [reads_a_dict, lambda x: both(x) + other(x), Plain().model, Plain(), poutine.scale(Plain().model, scale=0.1)],
    ids=["dict", "lambda", "plain object's method", "callable object", "handler of a plain object's method"],
)
def test_several_modules_are_found_in_order(program):
    assert owners(program) == [both, other]


def test_a_submodule_is_left_out_where_its_module_is_found():
    decoder = both.decoder
    assert owners(lambda x: decoder(both(x))) == [both]


def test_a_recursive_function_ends():
    assert owners(calls_itself) == [other]


@pytest.mark.parametrize(
    "program", [torch_only, reads_an_attribute_of_that_name, Both, len, None, pyro.sample, functools.partial(len, [])]
)
def test_nothing_is_found_where_there_is_no_module(program):
    assert owners(program) == []


@pytest.mark.parametrize("program", WRAPPED.values(), ids=WRAPPED)
def test_what_is_wrapped_is_the_module(program):
    assert wrapped_module(program) is both


@pytest.mark.parametrize("program", [reads_a_global, of_closure(), Plain().model, None])
def test_references_are_not_wrapped(program):
    assert wrapped_module(program) is None


# Parameters that an optimiser of the bound module does not train


def plain_tensor():
    weight = torch.ones(2, 3, requires_grad=True)
    return lambda: weight


UNSEEN = {
    "pyro.param": lambda: lambda: pyro.param("weight", lambda: torch.ones(2, 3)),
    "plain tensor": plain_tensor,
    "nothing": lambda: lambda: torch.ones(2, 3),
    "module": lambda: lambda: both.decoder(torch.eye(2)),
}


@pytest.mark.parametrize("kind", UNSEEN)
@pytest.mark.parametrize("is_trained", [True, False])
def test_parameters_that_are_left_untrained_are_said_once(kind, is_trained):
    """Nothing is said where the user's optimiser has them."""
    weight = UNSEEN[kind]()
    encoder = nn.Linear(3, 2)

    model, guide = program(lambda x: delta(encoder(x)), lambda x: normal(x, 2), lambda z: around(z @ weight()[:2, :3]))

    wae, x = WAELoss(penalty_weight=1.0)(model, guide), torch.randn(6, 3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(4):
            loss = wae(x)
            loss.backward()
            extra = [weight()] if is_trained and weight().is_leaf and weight().requires_grad else []
            torch.optim.SGD([*wae.parameters(), *extra], 1e-3).step()
    found = [str(warning.message) for warning in said]
    assert len(found) == (kind in ("pyro.param", "plain tensor") and not is_trained), found
    assert all("1 parameters (of shapes (2, 3)" in text for text in found)
