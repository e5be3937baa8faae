"""Every argument of every penalty, kernel and weight: the right values are taken, all others are named."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pyro
import pytest
import torch
from torch import nn

from pyro_wae import WAELoss, kernels, penalties, weights
from pyro_wae.kernels import Conditional, Energy, Gaussian, MultiScale, SameLabel, Scaled, UnitMean
from pyro_wae.kernels.function import ModuleKernel, as_kernel
from pyro_wae.penalties import MMD, Chain, FunctionPenalty, JensenShannon, KernelStein, PenaltyContext, ScaledPenalty


def f(*args):
    return args[0].sum()


CODES, LEARNT = torch.zeros(4, 2), torch.zeros(4, 2, requires_grad=True)
NEVER = ["no", b"1", [], {}, object(), torch.ones(2), np.ones(2), 1j]
NO_NUMBER = [*NEVER, True, np.bool_(True), torch.tensor(True), [1.0]]
NOT_FINITE = [math.nan, math.inf, -math.inf, np.float32("nan"), torch.tensor(math.inf)]


def number(*good, bad=()):
    """A finite number: also numpy's, and a tensor without dimensions."""
    return [g for x in good for g in (x, np.float32(x), np.float64(x), torch.tensor(x))], [
        *NO_NUMBER,
        *NOT_FINITE,
        *bad,
    ]


def whole(good, least):
    return [good, np.int64(good), torch.tensor(good)], [*NO_NUMBER, *NOT_FINITE, 1.5, least - 1, -1]


POSITIVE = number(0.5, 3.0, bad=[0, 0.0, -1.0])
NOT_NEGATIVE = number(0.0, 3.0, bad=[-1.0, -1e-9])
FLAG = [True, False, np.bool_(False)], [*NEVER, 0, 1, 1.0, None, math.nan]
FUNCTION = [f, nn.Identity()], [*NEVER, 3, Gaussian]
KERNEL = [Gaussian(1.0)], [*NEVER, 3, Gaussian, f]
ANY_KERNEL = [Gaussian(1.0), f], [*NEVER, 3, Gaussian]
PENALTY = [MMD()], [*NEVER, 3, MMD, f]
ORDER = number(1.0, 1.5, 2.0, bad=[0.5, 0, -1.0])

REQUIRED = {
    "FunctionKernel": {"function": f},
    "ModuleKernel": {"function": nn.Identity()},
    "FunctionPenalty": {"function": f},
    "Matern": {"nu": 1.5},
    "MultiScale": {"kernel": Gaussian(), "factors": (1.0,)},
    "RationalQuadratic": {"alpha": 1.0},
    "Scaled": {"kernel": Gaussian(), "factor": 1.0},
    "ScaledPenalty": {"penalty": MMD(), "factor": 1.0},
    "UnitMean": {"kernel": SameLabel()},
    "Conditional": {"kernel": Gaussian(), "condition_kernel": SameLabel(), "size": 1},
    "Constant": {"weight": 1.0},
    "Schedule": {"function": f},
    "LinearSchedule": {"start": 0.0, "end": 1.0, "steps": 5},
}
"""What a class cannot be made without."""

ARGUMENTS = {
    "Gaussian": {"bandwidth": POSITIVE},
    "InverseMultiquadratic": {"bandwidth": POSITIVE},
    "Laplace": {"bandwidth": POSITIVE},
    "Matern": {"nu": number(0.5, 1.5, 2.5, bad=[0, 1, 2.0, 3.5]), "bandwidth": POSITIVE},
    "RationalQuadratic": {"alpha": POSITIVE, "bandwidth": POSITIVE},
    "Energy": {"exponent": number(0.5, 1.5, bad=[0, 2, 2.5, -1.0])},
    "MultiScale": {
        "kernel": ([Gaussian(1.0)], [*KERNEL[1], Energy()]),
        "factors": (
            [[1.0, 2], (np.float32(2),), torch.ones(2), np.ones(2)],
            [3, "no", b"12", torch.tensor(2.0), [], [0.0], [-1], ["1"], [math.nan]],
        ),
    },
    "Scaled": {"kernel": KERNEL, "factor": POSITIVE},
    "UnitMean": {"kernel": KERNEL, "constant": NOT_NEGATIVE},
    "Conditional": {"kernel": KERNEL, "condition_kernel": KERNEL, "size": whole(1, 1)},
    "FunctionKernel": {"function": FUNCTION},
    "ModuleKernel": {"function": ([nn.Identity()], [*NEVER, 3, f])},
    "SameLabel": {},
    "MMD": {
        "kernel": ANY_KERNEL,
        "unbiased": FLAG,
        "standardize": FLAG,
        "closed_form": FLAG,
        "condition_kernel": ANY_KERNEL,
    },
    "EnergyDistance": {"exponent": number(0.5, 1.5, bad=[0, 2, -1.0]), "unbiased": FLAG},
    "CramerWold": {"gamma": POSITIVE, "unbiased": FLAG},
    "KernelStein": {"kernel": KERNEL, "log_prob": FUNCTION},
    "SlicedWasserstein": {"projections": whole(5, 1), "p": ORDER},
    "MaxSlicedWasserstein": {"steps": whole(5, 1), "p": ORDER, "restarts": whole(2, 1)},
    "SphericalSlicedWasserstein": {"projections": whole(5, 1), "p": ORDER},
    "Sinkhorn": {
        "p": number(1.0, 2.0, bad=[0, 1.5, 3]),
        "blur": POSITIVE,
        "scaling": number(0.5, bad=[0, 1, 1.5, -0.5]),
        "debias": FLAG,
    },
    "JensenShannon": {
        "discriminator": ([nn.Linear(2, 1)], [*NEVER, 3, f, nn.Linear]),
        "prior_log_prob": FLAG,
        "saturating": FLAG,
        "gradient_penalty": NOT_NEGATIVE,
        "gradient_penalty_every": whole(2, 1),
        "optimizer": ([torch.optim.Adam, lambda parameters: None], [*NEVER, 3, True]),
        "steps": whole(2, 1),
    },
    "Chain": {
        "penalty": ([MMD(), f], [*NEVER, 3, MMD]),
        "order": whole(2, 1),
        "step_size": whole(2, 1),
        "runs": whole(2, 1),
    },
    "LogVarianceL1": {"weight": NOT_NEGATIVE},
    "UnitVarianceKL": {"weight": NOT_NEGATIVE},
    "PriorLikelihood": {},
    "PosteriorKL": {},
    "FunctionPenalty": {"function": FUNCTION},
    "ScaledPenalty": {"penalty": PENALTY, "factor": NOT_NEGATIVE},
    "PenaltyContext": {
        "data_size": whole(100, 1),
        "shared_data": FLAG,
        **dict.fromkeys(("prior", "prior_log_prob", "encoder_variance", "encoder_kl", "kept"), ([f], [*NEVER, 3])),
        "sites": ([{"z": slice(0, 2)}], ["no", 3, [slice(0, 2)], f]),
        **dict.fromkeys(("condition", "condition_scale"), ([torch.ones(3, 1)], ["no", 3, np.ones(2), f])),
    },
    "Constant": {"weight": NOT_NEGATIVE},
    "Schedule": {"function": ([f, float], [*NEVER, 3])},
    "LinearSchedule": {"start": NOT_NEGATIVE, "end": NOT_NEGATIVE, "steps": whole(5, 1)},
    "Constraint": {
        "codes": whole(500, 2),
        "initial": POSITIVE,
        "maximum": POSITIVE,
        "rate": number(0.5, bad=[0, 1, 2.0, -1.0]),
        "pool": whole(8, 2),
    },
}
"""Each argument with values that are taken and values that are not."""

# Abstract, or with arguments of any number, or of subclasses alone.
ELSEWHERE = {"Kernel", "RadialKernel", "Sum", "Product", "Penalty", "SumPenalty", "KernelMean", "Weight"}


def public_classes():
    for module in (kernels, penalties, weights):
        for name in module.__all__:
            if name not in ELSEWHERE and inspect.isclass(getattr(module, name)):
                yield name, getattr(module, name)


CLASSES = dict(public_classes())


def test_the_table_holds_every_class_and_every_argument():
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    found = {
        name: {p.name for p in inspect.signature(cls).parameters.values() if p.kind not in variadic}
        for name, cls in CLASSES.items()
    }
    assert found == {name: set(arguments) for name, arguments in ARGUMENTS.items()}


def entries(which):
    for name, arguments in ARGUMENTS.items():
        for argument, values in arguments.items():
            for number, value in enumerate(values[which]):
                # No id with an address: all processes must collect the same tests.
                yield pytest.param(name, argument, value, id=f"{name}-{argument}-{type(value).__name__}-{number}")


@pytest.mark.parametrize(("name", "argument", "value"), list(entries(0)))
def test_a_right_value_is_taken(name, argument, value):
    made = CLASSES[name](**(REQUIRED.get(name, {}) | {argument: value}))
    assert isinstance(made, CLASSES[name])
    if ARGUMENTS[name][argument] in (POSITIVE, NOT_NEGATIVE, ORDER):
        assert type(getattr(made, argument)) is float
        assert getattr(made, argument) == float(value)


@pytest.mark.parametrize(("name", "argument", "value"), list(entries(1)))
def test_a_wrong_value_is_an_error_that_names_the_argument_and_what_to_write(name, argument, value):
    with pytest.raises((TypeError, ValueError)) as caught:
        CLASSES[name](**(REQUIRED.get(name, {}) | {argument: value}))
    message = str(caught.value)
    named = "penalty" if name in ("Constant", "Chain") and argument in ("weight", "penalty") else argument
    assert named in message
    assert "Write" in message


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Gaussian(-1.0), ["Gaussian's bandwidth must be a finite number > 0, found -1.0. Write bandwidth=1.0"]),
        (
            lambda: penalties.SlicedWasserstein(0),
            ["must be a whole number >= 1, found 0. Write projections=50"],
        ),
        (lambda: MMD(unbiased="no"), ["unbiased must be True or False, found 'no'. Write MMD(unbiased=True)"]),
        (lambda: MMD(standardize=1), ["standardize must be True or False, found 1"]),
        (lambda: PenaltyContext(data_size=-1), ["data_size must be a whole number >= 1, found -1"]),
        (lambda: weights.Constraint(maximum=0), ["maximum must be a finite number > 0, found 0"]),
        (lambda: weights.Constraint(initial=5.0, maximum=1.0), ["initial <= maximum", "5 and 1", "initial=1."]),
        (lambda: JensenShannon(optimizer="adam"), ["optimizer must be a function", "'adam'", "torch.optim.Adam("]),
        (
            lambda: JensenShannon(optimizer=None, steps=3),
            ["leaves it to the caller's", "leave steps out"],
        ),
        (lambda: KernelStein(kernels.Laplace()), ["twice differentiable, found Laplace(", "KernelStein(Gaussian())"]),
        (lambda: MMD(unbiased=False, standardize=True), ["the V-statistic's is not. Write MMD(unbiased=True"]),
        (lambda: Gaussian(1.0) * Energy(), ["A product with Energy is not a kernel", "Laplace()"]),
        (lambda: 2.0 * (Gaussian() + Energy()) * Gaussian(), ["A product with Energy is not a kernel"]),
        (lambda: Conditional(Gaussian(), 2.0 * Energy(), 1), ["must be positive definite", "Laplace()"]),
        (lambda: kernels.Sum(), ["Sum takes one", "found none", "Write Sum("]),
        (lambda: kernels.Product(Gaussian(), 3), ["Product's kernels must be a kernel, found 3"]),
        (lambda: penalties.SumPenalty(), ["SumPenalty takes one", "found none"]),
        (lambda: penalties.SumPenalty(MMD(), f), ["SumPenalty's penalties must be a penalty"]),
        (lambda: as_kernel("rbf"), ["kernel must be a pyro_wae.kernels.Kernel or a function", "'rbf'", "MMD("]),
        (lambda: ModuleKernel(f), ["function must be a torch module"]),
        (lambda: penalties.as_penalty(Gaussian()), ["found Gaussian(", "WAELoss(MMD(kernel))"]),
        (lambda: penalties.as_penalty(2.0 * Gaussian() + Energy()), ["WAELoss(MMD(kernel))"]),
        (lambda: WAELoss({"z": Gaussian()}), ["WAELoss(MMD(kernel))"]),
        (lambda: MMD()(None, CODES), ["must be tensors", "found NoneType and Tensor", "penalty("]),
        (lambda: MMD()(CODES.numpy(), CODES), ["must be tensors", "found ndarray and Tensor"]),
        (lambda: MMD()(CODES, [1.0]), ["must be tensors", "found Tensor and list"]),
        (lambda: MMD()(CODES, CODES, {"data_size": 3}), ["context must be a PenaltyContext", "data_size=60000"]),
        (lambda: JensenShannon(optimizer=lambda _: None)(LEARNT, CODES), ["What optimizer returns must be", "Adam("]),
        (
            lambda: JensenShannon(optimizer=pyro.optim.Adam({}))(LEARNT, CODES),
            ["What optimizer returns must be", "Adam("],
        ),
        (lambda: JensenShannon(optimizer=torch.optim.LBFGS)(LEARNT, CODES), ["found LBFGS", "closure", "Adam("]),
        (lambda: penalties.as_penalty(MMD), ["penalty must be a pyro_wae.penalties.Penalty", "WAELoss(MMD())"]),
        (lambda: weights.Schedule(lambda step: -1.0)(), ["Schedule's weight of step 0", "-1.0"]),
        (
            lambda: weights.Schedule(lambda step: None)(),
            ["Schedule's weight of step 0", "found None. Write Schedule("],
        ),
    ],
)
def test_a_message_says_what_was_found_what_is_accepted_and_what_to_write(make, parts):
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("number", [3, 3.0, np.float32(3), np.int64(3), torch.tensor(3.0)])
@pytest.mark.parametrize(("part", "scaled"), [(Gaussian(1.0), Scaled), (MMD(), ScaledPenalty)])
def test_a_multiple_is_written_on_either_side_with_any_number(number, part, scaled):
    for multiple in (number * part, part * number):
        assert isinstance(multiple, scaled)
        assert multiple.factor == 3.0


@pytest.mark.parametrize("other", ["2", True, [1.0], None, np.ones(2), MMD, 1j])
@pytest.mark.parametrize("part", [Gaussian(1.0), MMD()])
def test_only_parts_and_numbers_combine(part, other):
    for combine in (lambda: part + other, lambda: part * other, lambda: other * part):
        with pytest.raises(TypeError):
            combine()


def test_options_are_kept_as_python_numbers_and_shown_as_such():
    assert repr(MultiScale(Gaussian(np.float32(0.5)), torch.tensor([1, 2]))) == (
        "MultiScale(kernel=Gaussian(bandwidth=0.5), factors=(1.0, 2.0))"
    )
    assert repr(UnitMean(SameLabel(), np.int64(1))) == "UnitMean(kernel=SameLabel(), constant=1.0)"
    assert type(Chain(order=np.int64(2)).order) is int
    assert type(PenaltyContext(data_size=torch.tensor(5)).data_size) is int
    assert FunctionPenalty(f).function is f
