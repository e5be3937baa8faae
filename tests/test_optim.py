"""Optimisers that share one torch optimiser move parameters as one for each does."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from adversaries import net as discriminator
from optim_trajectories import (
    SCHEDULERS,
    STEPS,
    advance,
    assert_same,
    by_module_and_name,
    by_name,
    clip_by_name,
    scheduled,
    steps,
    trajectory,
    values,
)
from programs import AutoEncoder
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from pyro.optim.dct_adam import DCTAdam

from pyro_wae import WAELoss
from pyro_wae.optim import SGD, Adam, AdamW, SharedOptim
from pyro_wae.penalties import JensenShannon


@pytest.fixture(autouse=True)
def without_validation():
    with pyro.validation_enabled(False):
        yield


CASES = {
    "Adam": (torch.optim.Adam, {"lr": 0.03}),
    "Adam, not fused": (torch.optim.Adam, {"lr": 0.03, "fused": False}),
    "Adam, foreach": (torch.optim.Adam, {"lr": 0.03, "foreach": True}),
    "Adam, amsgrad": (torch.optim.Adam, {"lr": 0.03, "amsgrad": True, "weight_decay": 0.1}),
    "Adam, by name": (torch.optim.Adam, by_name),
    "Adam, by module and name": (torch.optim.Adam, by_module_and_name),
    "Adam, clip_norm": (torch.optim.Adam, {"lr": 0.03}, {"clip_norm": 0.5}),
    "Adam, clip_value": (torch.optim.Adam, {"lr": 0.03}, {"clip_value": 0.5}),
    "Adam, both clips": (torch.optim.Adam, {"lr": 0.03}, {"clip_norm": 3.0, "clip_value": 0.5}),
    "SGD, clip by name": (torch.optim.SGD, {"lr": 0.001}, clip_by_name),
    "SGD, momentum": (torch.optim.SGD, {"lr": 0.001, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.2}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.03}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.001}),
    "Pyro's ClippedAdam": (ClippedAdam, {"lr": 0.03, "clip_norm": 0.5}),
    "Pyro's DCTAdam": (DCTAdam, {"lr": 0.03}),
}


@pytest.mark.parametrize("args", CASES.values(), ids=CASES)
def test_parameters_move_as_with_an_optimiser_for_each(args):
    assert_same(trajectory(SharedOptim(*args)), trajectory(PyroOptim(*args)))


def test_optimiser_that_lowers_its_own_rate_starts_anew_for_a_late_parameter():
    def run(optim):
        early, late = (torch.ones(2, requires_grad=True) for _ in range(2))
        for step in range(20):
            params = [early] if step < 10 else [late] if step < 15 else [early, late]
            for p in params:
                p.grad = p.detach() + 1
            optim(params)
        return early, late

    args = (ClippedAdam, {"lr": 0.1, "lrd": 0.8})
    torch.testing.assert_close(run(SharedOptim(*args)), run(PyroOptim(*args)))


def test_equal_arguments_share_one_fused_optimiser():
    optim = Adam({"lr": 0.01})
    steps(optim)
    (optimizer,) = optim.optimizers
    assert optimizer.param_groups[0]["fused"] is True
    assert len(optimizer.param_groups[0]["params"]) == len(pyro.get_param_store()) == len(optim.optim_objs)


def test_each_set_of_arguments_has_an_optimiser():
    optim = Adam(by_name)
    steps(optim)
    assert sorted(o.param_groups[0]["lr"] for o in optim.optimizers) == [0.01, 0.05]


@pytest.mark.parametrize("optim_args", [{"fused": False}, {"foreach": False}, {"differentiable": True}], ids=str)
def test_the_users_choice_of_implementation_is_kept(optim_args):
    optim = SGD({"lr": 0.01, **optim_args})
    optim([torch.ones(2, requires_grad=True)])
    assert not optim.optimizers[0].param_groups[0]["fused"]


@pytest.mark.usefixtures("single_precision")
def test_parameters_that_no_fused_kernel_takes_have_their_own_optimiser():
    real, imaginary = torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.complex64, requires_grad=True)
    for p in (real, imaginary):
        p.grad = torch.ones_like(p)
    optim = Adam({"lr": 0.25})
    optim([real, imaginary])
    assert [o.param_groups[0]["fused"] for o in optim.optimizers] == [True, None]
    # The first step of Adam is the learning rate, against the gradient's sign.
    torch.testing.assert_close(real, torch.full((2,), 0.75))
    torch.testing.assert_close(imaginary, torch.full((2,), 0.75 + 0j))


def test_sparse_gradients():
    def run(optim):
        pyro.set_rng_seed(0)
        weight = torch.ones(4, 2, requires_grad=True)
        for _ in range(3):
            torch.nn.functional.embedding(torch.tensor([1, 3]), weight, sparse=True).square().sum().backward()
            optim([weight])
            weight.grad = None
        return weight

    args = {"lr": 0.1, "fused": False}
    torch.testing.assert_close(run(SGD(args)), run(pyro.optim.SGD(args)))


@pytest.mark.parametrize("fails", [False, True], ids=["", "step fails"])
def test_gradients_of_idle_parameters_are_given_back(fails):
    used, idle = (torch.ones(2, requires_grad=True) for _ in range(2))
    used.grad, idle.grad = torch.ones(2), torch.ones(2)
    optim = Adam({"lr": 0.1})
    optim([used, idle])
    gradient = idle.grad = torch.full((2,), 3.0)
    before = idle.detach().clone()

    def closure():
        assert idle.grad is None
        raise ArithmeticError

    if fails:
        with pytest.raises(ArithmeticError):
            optim([used], closure)
    else:
        optim([used])
    assert idle.grad is gradient
    assert torch.equal(idle, before)


@pytest.mark.parametrize(
    "args",
    [({"lr": 0.1}, {"clip_value": 1.0}), ({"lr": 0.1, "momentum": 0.5}, {"clip_norm": 1.0})],
    ids=["value", "norm"],
)
def test_parameter_without_gradient_stays(args):
    used, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    used.grad = torch.ones(2)
    optim = SGD(*args)
    optim([used, unused])
    assert torch.equal(unused, torch.ones(2))
    unused.grad = torch.ones(2)
    optim([used, unused])
    assert (unused < 1).all()


def test_step_with_generator_and_no_parameters():
    p = torch.ones(2, requires_grad=True)
    p.grad = torch.ones(2)
    optim = SGD({"lr": 1.0})
    optim(iter([p]))
    optim([])
    assert torch.equal(p, torch.zeros(2))


@pytest.mark.parametrize(
    ("make_loss", "num_params"),
    [(Trace_ELBO, 4), (lambda: WAELoss(JensenShannon(discriminator(), optimizer=None)), 8)],
    ids=["ELBO", "WAE-GAN"],
)
def test_nets_learn_as_with_an_optimiser_for_each_parameter(make_loss, num_params):
    def run(optim):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        net = AutoEncoder(3, 2, code=lambda z: dist.Normal(z, 0.5).to_event(1)).double()
        svi = SVI(net.model, net.guide, optim, loss=make_loss())
        for _ in range(STEPS):
            svi.step(torch.randn(20, 3, dtype=torch.float64))
        return values()

    def optim_args(name):
        return {"lr": 0.001 if name.startswith(("encoder.", "decoder.")) else 0.003}

    found, expected = run(Adam(optim_args)), run(pyro.optim.Adam(optim_args))
    assert len(found) == num_params
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_learning_rates_fall_as_with_a_scheduler_for_each(scheduler):
    ours, pyros = scheduled(*scheduler, by_name)
    assert_same(trajectory(ours, after_step=advance), trajectory(pyros, after_step=advance))


@pytest.mark.parametrize("kind", [Adam, AdamW, SGD])
def test_a_named_optimiser_is_that_of_torch_and_its_repr_the_call(kind):
    constructor = getattr(torch.optim, kind.__name__)
    assert repr(kind({"lr": 0.1}, {"clip_norm": 1.0})) == (
        f"SharedOptim(optim_constructor={constructor!r}, optim_args={{'lr': 0.1}}, "
        "clip_args={'clip_norm': 1.0}, scheduler=None)"
    )


@pytest.mark.parametrize("argument", ["optim_args", "clip_args"])
def test_functions_that_give_no_dict_are_named(argument):
    functions = {"optim_args": lambda name: {"lr": 0.1}, "clip_args": lambda module, name: {}}
    functions[argument] = lambda module, name: 0.1
    with pytest.raises(TypeError, match=rf"{argument}.*'[\w$. ]+'"):
        steps(Adam(**functions), last=1)


@pytest.mark.parametrize("argument", ["optim_args", "clip_args"])
def test_functions_need_names(argument):
    with pytest.raises(ValueError, match=rf"{argument}.*\(2,\)"):
        Adam(**{"optim_args": {"lr": 0.1}, argument: by_module_and_name})([torch.ones(2, requires_grad=True)])


def test_step_needs_a_scheduler():
    with pytest.raises(ValueError, match="there is none"):
        Adam({"lr": 0.1}).step()


def test_a_parameter_may_join_sgd_whose_scheduler_sets_a_momentum():
    def train(optim):
        pyro.clear_param_store()
        for names in ("a", "ab", "ab"):
            parts = [pyro.param(name, torch.ones(3)) for name in names]
            sum((part - 3).square().sum() for part in parts).backward()
            optim([part.unconstrained() for part in parts])
        optim.step()  # at the end of an epoch
        return {name: value.detach() for name, value in pyro.get_param_store().items()}

    cycle = {"max_lr": 0.1, "total_steps": 20}
    pyros = pyro.optim.OneCycleLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}, **cycle})
    ours = SGD({"lr": 0.01}, scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, **cycle))
    assert_same([train(ours)], [train(pyros)])
