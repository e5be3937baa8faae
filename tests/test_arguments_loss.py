"""Every argument of the loss, its module, the costs and `predict`: the right values are taken, all others are named."""

from __future__ import annotations

import dataclasses
import inspect
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import normal
from references import program
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from pyro_wae import WAELoss, WAEModule, costs, predict
from pyro_wae.costs import (
    AbsoluteError,
    ExpectedSquaredError,
    FunctionCost,
    NegativeLogLikelihood,
    SquaredError,
    as_cost,
    generator_output,
)
from pyro_wae.penalties import MMD
from pyro_wae.weights import Constant

X = torch.randn(6, 3)
SPARSE, META, EMPTY = X.to_sparse(), X.to("meta"), X[:0]
ANYTHING = [object(), b"1", 1j, {1}, np.ones(2), torch.ones(2), SPARSE, META]
NO_FUNCTION = [*ANYTHING, 3, "no", [1.0], MMD]
NO_FLAG = [*ANYTHING, "yes", 1, 0.0, np.int64(1), torch.tensor(1), [True]]
NO_COUNT = [*ANYTHING, None, 0, -1, 1.5, "3", True, np.float32(2), torch.tensor(2.0), torch.tensor(True), math.nan, [1]]
NO_NAME = [*ANYTHING, 3, ["data"], ("data",), True]
NO_NAMES = [object(), 3, 1j, True, "x", b"x", np.ones(2), X, (), [], ("y",), [3], {1}]
NO_TENSOR = [object(), None, 3, "no", [1.0], {1}, X.numpy(), SPARSE, META, X + 1j, nn.Linear]
NO_DATA = [X > 0, X.long(), None, "no", 3, 1.5, [1.0], X.tolist(), X.numpy(), object(), torch.tensor(1.0), X + 1j]
NO_DATA += [SPARSE, META, EMPTY, X / 0]


model, guide = program(prior=lambda x: normal(x, 3))


def f(x, g):
    return (x - g).square().flatten(1).sum(1)


PRIOR = dist.Normal(torch.zeros(3), 1).to_event(1)
GAUSSIAN = dist.Normal(torch.zeros(6, 3), 1).to_event(1)

# For each call its arguments, each with values that are taken and values that are not.
CALLS = {
    "WAELoss": (
        WAELoss,
        {
            "penalty": ([None, MMD(), f, {"z": None, "w": f}], [*NO_FUNCTION, {"z": 3}, {3: MMD()}, {"z": None}]),
            "cost": ([None, SquaredError(), f, {"x": f}], [*NO_FUNCTION, {"x": 3}, {"x": SquaredError}]),
            "penalty_weight": ([None, 0, 1.5, np.float32(2), Constant(1.0)], [*ANYTHING, -1, math.nan, "1", True, f]),
            "data_plate": ([None, "data"], NO_NAME),
            "num_particles": ([1, np.int64(2), torch.tensor(3)], NO_COUNT),
            "vectorize_particles": ([True, np.bool_(False)], NO_FLAG),
            "max_plate_nesting": ([0, 2, math.inf, np.int64(1)], [*ANYTHING, None, -1, 1.5, math.nan, "1", True, [1]]),
            "retain_graph": ([None, True, False], NO_FLAG),
            "prior_draws": ([1, np.int64(2), torch.tensor(3)], NO_COUNT),
            "condition": ([None, "y"], NO_NAME),
            "micro_batch": ([None, 4, np.int64(4)], [value for value in NO_COUNT if value is not None]),
            "process_group": ([None], [*ANYTHING, "no", 3, True, [1]]),
            "reduction": (["mean", "sum"], [*ANYTHING, None, "max", 1, True, ["mean"]]),
        },
    ),
    "WAEModule": (
        lambda **given: WAEModule(**{"model": model, "guide": guide, "loss": WAELoss()} | given),
        {
            "model": ([model, nn.Identity()], [*NO_FUNCTION, None]),
            "guide": ([guide, nn.Identity()], [*NO_FUNCTION, None]),
            "loss": ([WAELoss()], [*NO_FUNCTION, None, f, WAELoss, pyro.infer.Trace_ELBO()]),
        },
    ),
    "WAELoss.loss": (
        lambda **given: WAELoss().loss(**{"model": model, "guide": guide, "x": X} | given),
        {"model": ([model], [*NO_FUNCTION, None]), "guide": ([guide], [*NO_FUNCTION, None])},
    ),
    "SquaredError": (SquaredError, {"decode": ([None, f], NO_FUNCTION)}),
    "AbsoluteError": (AbsoluteError, {"decode": ([None, f], NO_FUNCTION)}),
    "ExpectedSquaredError": (ExpectedSquaredError, {}),
    "NegativeLogLikelihood": (NegativeLogLikelihood, {}),
    "FunctionCost": (
        lambda **given: FunctionCost(**{"function": f} | given),
        {"function": ([f, nn.L1Loss()], [*NO_FUNCTION, None]), "decode": ([None, f], NO_FUNCTION)},
    ),
    "as_cost": (as_cost, {"cost": ([f, SquaredError()], [*NO_FUNCTION, None])}),
    "generator_output": (
        generator_output,
        {"distribution": ([GAUSSIAN], [*NO_FUNCTION, None, dist.Normal, dist.Cauchy(0.0, 1.0)])},
    ),
    **{
        f"{type(cost).__name__} of data": (
            lambda cost=cost, **given: cost(**{"distribution": GAUSSIAN, "value": X} | given),
            {
                "distribution": ([GAUSSIAN], [*NO_FUNCTION, None, dist.Normal]),
                "value": ([X, X.long(), X > 0], [*NO_TENSOR, torch.tensor(1.0)]),
            },
        )
        for cost in (SquaredError(), AbsoluteError(), ExpectedSquaredError(), NegativeLogLikelihood(), FunctionCost(f))
    },
    "encode": (
        lambda **given: predict.encode(**{"model": model, "guide": guide, "x": X} | given),
        {
            "model": ([model], [*NO_FUNCTION, None]),
            "guide": ([guide], [*NO_FUNCTION, None]),
            "data_plate": ([None, "data"], NO_NAME),
        },
    ),
    "code_rows": (
        lambda **given: predict.code_rows(**{"model": model, "guide": guide, "x": X} | given),
        {
            "model": ([model], [*NO_FUNCTION, None]),
            "guide": ([guide], [*NO_FUNCTION, None]),
            "site": ([None, "z"], [*ANYTHING, "x", 3, ["z"]]),
            "prior_draws": ([1, np.int64(2)], NO_COUNT),
            "data_plate": ([None, "data"], NO_NAME),
        },
    ),
    "decode": (
        lambda **given: predict.decode(**{"model": model, "codes": {"z": X}, "x": X} | given),
        {
            "model": ([model], [*NO_FUNCTION, None]),
            "codes": (
                [X, {"z": X[:2]}],
                [*NO_TENSOR, {}, {"w": X}, X[0], X[:, :2], X[:0], *({"z": value} for value in NO_TENSOR)],
            ),
            "return_sites": ([None, ("x",), ["x"], {"x": 1}.keys()], NO_NAMES),
            "random": ([True, np.bool_(False)], NO_FLAG),
            "data_plate": ([None, "data"], NO_NAME),
        },
    ),
    "reconstruct": (
        lambda **given: predict.reconstruct(**{"model": model, "guide": guide, "x": X} | given),
        {
            "model": ([model], [*NO_FUNCTION, None]),
            "guide": ([guide], [*NO_FUNCTION, None]),
            "return_sites": ([None, ("x",)], NO_NAMES),
            "random": ([True, np.bool_(False)], NO_FLAG),
            "data_plate": ([None, "data"], NO_NAME),
        },
    ),
    "sample": (
        lambda **given: predict.sample(**{"model": model, "x": X, "num_samples": 9} | given),
        {
            "model": ([model], [*NO_FUNCTION, None]),
            "num_samples": ([None, 3, np.int64(20)], [value for value in NO_COUNT if value is not None]),
            "prior": (
                [None, PRIOR],
                [*NO_FUNCTION, dist.Normal(torch.zeros(2), 1)],
            ),
            "return_sites": ([None, ("x",), ("z", "x")], NO_NAMES),
            "random": ([True, np.bool_(False)], NO_FLAG),
            "data_plate": ([None, "data"], NO_NAME),
        },
    ),
    "interpolate": (
        lambda **given: predict.interpolate(**{"model": model, "guide": guide, "x_a": X, "x_b": X, "steps": 3} | given),
        {
            "model": ([model], [*NO_FUNCTION, None]),
            "guide": ([guide], [*NO_FUNCTION, None]),
            "x_a": ([X, (X,), X > 0, X.long()], [*NO_DATA[2:-1], X[:2]]),
            "x_b": ([X, (X,), X > 0, X.long()], [*NO_DATA[2:-1], X[:2]]),
            "steps": ([2, np.int64(3)], [*NO_COUNT, 1]),
            "path": (["linear", "spherical"], [*ANYTHING, None, "curved", 1]),
            "return_sites": ([None, ("x",)], NO_NAMES),
            "random": ([True, np.bool_(False)], NO_FLAG),
            "data_plate": ([None, "data"], NO_NAME),
        },
    ),
}
ADVICE = ("Write ", "write ", "Give ", "Say ", "Call it ", "Shuffle ", "Sum over ", "Take ", "look at the ")


ENTRIES = [(call, argument) for call, (_, arguments) in CALLS.items() for argument in arguments]


def message(call):
    """What a call raises, with the notes on it."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  an error of the user's own function has a note
        call()
    notes = getattr(caught.value, "__notes__", [])
    assert notes or isinstance(caught.value, TypeError | ValueError), caught.value
    return " | ".join([str(caught.value), *notes])


@pytest.mark.parametrize(("call", "argument"), ENTRIES)
def test_a_right_value_is_taken(call, argument):
    with pyro.validation_enabled(False):
        for value in CALLS[call][1][argument][0]:
            CALLS[call][0](**{argument: value})


@pytest.mark.parametrize(("call", "argument"), ENTRIES)
def test_a_wrong_value_is_an_error_that_names_the_argument_and_what_to_write(call, argument):
    for value in CALLS[call][1][argument][1]:
        found = message(lambda value=value: CALLS[call][0](**{argument: value}))
        named = [argument, "model and guide"] if argument in ("x_a", "x_b") else [argument]
        if isinstance(value, dist.Cauchy):
            named = ["Cauchy"]
        assert any(name in found for name in named), (value, found)
        assert any(word in found for word in ADVICE), (value, found)


ROUTES = {
    "loss": lambda x: WAELoss().loss(model, guide, x),
    "loss_and_grads": lambda x: WAELoss().loss_and_grads(model, guide, x),
    "differentiable_loss": lambda x: WAELoss().differentiable_loss(model, guide, x),
    "module": lambda x: WAELoss()(model, guide)(x),
    "vectorised": lambda x: WAELoss(num_particles=2, vectorize_particles=True).loss(model, guide, x),
    "micro-batches": lambda x: WAELoss(micro_batch=2).loss_and_grads(model, guide, x),
    "encode": lambda x: WAELoss()(model, guide).encode(x),
    "reconstruct": lambda x: WAELoss()(model, guide).reconstruct(x),
    "decode": lambda x: WAELoss()(model, guide).decode(X, x),
    "sample": lambda x: WAELoss()(model, guide).sample(7, x),
    "code_rows": lambda x: predict.code_rows(model, guide, x),
}


@dataclasses.dataclass
class Batch:
    x: torch.Tensor


@dataclasses.dataclass(slots=True)
class Slotted:
    x: torch.Tensor


@pytest.mark.parametrize("route", ["loss_and_grads", "micro-batches", "sample"])
@pytest.mark.parametrize(
    "batch",
    [{"x": X}, [X, X], (X,), Batch(X), {"x": {"a": X}}, pack_sequence([X]), Batch(Batch(X)), Slotted(X), [Batch([X])]],
    ids=range(9),
)
def test_a_batch_that_holds_tensors_is_not_what_is_wrong(batch, route):
    """The error is the program's own, or says that there is nothing to split."""
    with pytest.raises((TypeError, ValueError, AttributeError, KeyError, IndexError)) as caught:
        ROUTES[route](batch)
    assert not any("data are a tensor" in note for note in getattr(caught.value, "__notes__", []))


def test_what_is_wrong_within_a_batch_is_named():
    for value, found in ((X.numpy(), "ndarray"), (SPARSE, "a sparse tensor"), (META, "on the meta device")):
        text = message(lambda value=value: ROUTES["loss"]({"x": X, "counts": value}))
        assert f"Argument 1['counts'] of model and guide is {found}" in text


TRAINED = list(ROUTES)[:6]


@pytest.mark.parametrize("route", ROUTES)
def test_data_that_are_none_are_an_error_of_the_program_with_a_note(route):
    for place, value in enumerate(NO_DATA):
        is_nan = value is NO_DATA[-1]
        if (is_nan and route not in TRAINED) or (place < 2 and route in ("encode", "reconstruct")):
            ROUTES[route](value)  # the output of the nets, whatever it is
            continue
        found = message(lambda value=value: ROUTES[route](value))
        named = ["latent site 'z' hold"] if is_nan else ["Argument 1 of model and guide is ", "none is a tensor with"]
        assert any(name in found for name in named), (value, found)
        assert any(word in found for word in ADVICE), (value, found)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_right_data_are_taken(route, dtype):
    ROUTES[route](X.to(dtype))


@pytest.mark.parametrize("part", ["cost", "decode", "penalty"])
def test_what_a_function_returns_is_checked(part):
    several = [torch.ones(2), torch.ones(6) > 0, torch.ones(6).to_sparse()]
    # One number for all may be an output, as it may be the mean of a distribution.
    one = [] if part == "decode" else [torch.tensor(True), torch.tensor(1)]
    for value in [*NO_TENSOR, *several, *one]:
        options = {
            "cost": {"cost": lambda x, g, value=value: value},
            "penalty": {"penalty": lambda codes, prior, value=value: value},
            "decode": {"cost": SquaredError(decode=lambda fn, value=value: value)},
        }
        found = message(lambda given=options[part]: WAELoss(**given).loss_and_grads(model, guide, X))
        assert {"cost": "the cost", "penalty": "The penalty", "decode": "generator's output"}[part] in found
        assert any(word in found for word in (*ADVICE, "Reduce it over", "Return floats")), (value, found)


def test_every_public_name_and_every_argument_is_swept():
    names = {*costs.__all__, *predict.__all__, "WAELoss", "WAEModule"}
    assert names - {"Cost", "Site"} == {name for name in CALLS if name.isidentifier()}
    for name in sorted(names - {"Cost", "Site"}):
        public = getattr(costs, name, None) or getattr(predict, name, None) or {"WAELoss": WAELoss}.get(name, WAEModule)
        variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        arguments = {p.name for p in inspect.signature(public).parameters.values() if p.kind not in variadic}
        assert arguments == set(CALLS[name][1]), name
    methods = {name for name, value in vars(WAEModule).items() if inspect.isfunction(value) and name[0] != "_"}
    methods -= {"train", "apply", "state_dict", "extra_repr"}  # as torch's
    assert methods == {"forward", "encode", "decode", "reconstruct", "sample", "interpolate"}


def test_a_keyword_that_comes_first_is_not_taken_for_the_data():
    def broken(y, x):
        raise RuntimeError("this model's own")

    with pytest.raises(RuntimeError) as caught:
        WAELoss().loss(broken, broken, y=torch.arange(4), x=X)
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("batch", [[X], (X,)], ids=["list", "tuple"])
def test_a_batch_of_a_tensor_dataset_has_a_note(batch):
    with pytest.raises((TypeError, AttributeError)) as caught:
        WAELoss().loss(model, guide, batch)
    assert (
        f"a {type(batch).__name__}. If it is a batch of a loader, write svi.step(*batch)" in caught.value.__notes__[0]
    )


def by_index(index, x_all):
    """Data that are an index into a table."""
    return pyro.plate("data", len(x_all), subsample=index), x_all[index]


def of_index(index, x_all):
    plate, x = by_index(index, x_all)
    with plate:
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(1, keepdim=True).expand_as(x), 1).to_event(1), obs=x)


def guide_of_index(index, x_all):
    plate, x = by_index(index, x_all)
    with plate:
        pyro.sample("z", dist.Delta(x[:, :2]).to_event(1))


@pytest.mark.parametrize(("micro_batch", "count"), [(None, 6), (2, 4)])
def test_an_index_beyond_its_table_has_no_note(micro_batch, count):
    loss = WAELoss(penalty_weight=1.0, micro_batch=micro_batch)
    loss.loss(of_index, guide_of_index, torch.arange(count), X)
    with pytest.raises(IndexError) as caught:
        loss.loss(of_index, guide_of_index, torch.arange(count) + 7 - count, X)
    assert not any("Write" in note or "[x_all]" in note for note in getattr(caught.value, "__notes__", []))


def test_a_table_that_micro_batches_split_with_its_index_is_told_to_stay_whole_in_a_list():
    loss, index = WAELoss(penalty_weight=1.0, micro_batch=2), torch.arange(6)
    with pytest.raises(IndexError) as caught:
        loss.loss(of_index, guide_of_index, index, X)
    assert "svi.step(index, [x_all])" in caught.value.__notes__[-1]
    assert not any("x.float()" in note for note in caught.value.__notes__)
    loss.loss(lambda i, table: of_index(i, *table), lambda i, table: guide_of_index(i, *table), index, [X])


def test_whole_numbers_beside_labels_are_still_named():
    for args in ((X.long(), X[:, 0]), (X.long(),)):
        assert "is of torch.int64, in which nothing is drawn. Write x.float()" in message(
            lambda args=args: WAELoss().loss(lambda x, *_: model(x), lambda x, *_: guide(x), *args)
        )
