"""Models that are conditional on an observed y: the joint of codes and conditions is compared."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import AutoEncoder, around, delta, normal, sites
from pyro import poutine
from pyro.infer import SVI
from references import Seen, every_particles, nested, program, rows
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.costs import NegativeLogLikelihood, SquaredError
from pyro_wae.penalties import MMD, Chain, JensenShannon, KernelStein, LogVarianceL1, SlicedWasserstein

N, D = 12, 2


class Joint(Seen):
    """Keeps the rows of numbers that a penalty gets which knows nothing of conditions."""

    def prepare(self, codes):
        self.prepared = codes.shape


class Aware(Seen):
    """Keeps what a penalty gets that reads the condition itself."""

    reads_condition = True


def model(x, y, size=None):
    """A normal prior beside an argument y that no site observes."""
    with pyro.plate("data", len(x), subsample_size=size) as index:
        z = pyro.sample("z", normal(x, D))
        pyro.sample("x", around(z), obs=x[index])


def guide(x, y=None, size=None):
    with pyro.plate("data", len(x), subsample_size=size) as index:
        pyro.sample("z", delta(x[index]))


def labelled(x, y, size=None):
    """The label is a site, and the prior depends on it."""
    with pyro.plate("data", len(x), subsample_size=size) as index:
        label = pyro.sample("label", dist.Categorical(x.new_ones(3)), obs=y[index])
        z = pyro.sample("z", around(label.to(x)[..., None].expand(*label.shape, D)))
        pyro.sample("x", around(z), obs=x[index])


COSTS = {"x": SquaredError(), "label": NegativeLogLikelihood()}


def seen_by(penalty, model, guide, *args, condition="y", **options):
    WAELoss(penalty, condition=condition, **options).differentiable_loss(model, guide, *args)
    return penalty


# Finding the condition


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, y, size=None):
        return model(x, y, size)

    def method(self, x, y):
        return model(x, y)


def with_keywords(x, **options):
    return model(x, **options)


def swapped(y, x):
    return model(x, y)


Y = torch.arange(N)
CALLS = {
    "function": (model, lambda x: ((x, Y), {})),
    "keyword": (model, lambda x: ((x,), {"y": Y})),
    "module": (Owner(), lambda x: ((x, Y), {})),
    "method": (Owner().method, lambda x: ((x, Y), {})),
    "var_keyword": (with_keywords, lambda x: ((x,), {"y": Y})),
    "partial": (functools.partial(model, size=None), lambda x: ((x, Y), {})),
    "partial_of_module": (functools.partial(Owner(), size=None), lambda x: ((x, Y), {})),
    "bound by position": (functools.partial(swapped, Y), lambda x: ((x,), {})),
    "bound by name": (functools.partial(model, y=Y), lambda x: ((x,), {})),
    "handler": (poutine.scale(model, scale=1.0), lambda x: ((x, Y), {})),
    "handler_of_method": (poutine.scale(Owner().method, scale=1.0), lambda x: ((x, Y), {})),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_argument_is_found_however_the_model_is_written(call):
    program, arguments = CALLS[call]
    args, kwargs = arguments(rows(N, D))
    penalty = Aware()
    WAELoss(penalty, condition="y").differentiable_loss(program, lambda x, y=None: guide(x), *args, **kwargs)
    torch.testing.assert_close(penalty.context.condition, Y[:, None])
    assert penalty.context.shared_data
    assert penalty.codes.shape == (1, N, D)


def test_a_key_of_a_batch_that_is_a_dict_is_a_condition():
    x, y = rows(N, D), torch.arange(N)
    batch, penalty = {"x": x, "label": y}, Aware()

    def of_batch(program):
        return lambda batch: program(batch["x"], None)

    WAELoss(penalty, condition="label").loss(of_batch(model), of_batch(guide), batch)
    torch.testing.assert_close(penalty.context.condition, y[:, None])
    with pytest.raises(ValueError, match=r"arguments \['batch', 'x', 'label'\]"):
        WAELoss(penalty, condition="age").loss(of_batch(model), of_batch(guide), batch)
    # An argument comes before a key of the same name.
    WAELoss(penalty, condition="label").loss(
        lambda batch, label: model(batch["x"], None), lambda batch, label: guide(batch["x"], None), batch, -y
    )
    torch.testing.assert_close(penalty.context.condition, -y[:, None])


@every_particles
@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("condition", ["y", "label"])
def test_rows_are_those_of_the_data_in_the_step(condition, size, options):
    x, y = torch.arange(2.0 * N).reshape(N, 2), torch.arange(N) % 3
    penalty = seen_by(Aware(), labelled, guide, x, y, size, condition=condition, cost=COSTS, **options)
    particles, n = options.get("num_particles", 1), size or N
    assert penalty.codes.shape == (particles, n, D)
    taken = (penalty.codes[0, :, 0] / 2).long()
    assert len(set(taken.tolist())) == n
    torch.testing.assert_close(penalty.codes, penalty.codes[:1].expand(particles, n, D))
    torch.testing.assert_close(penalty.context.condition, y[taken][:, None])


def test_rows_of_a_batch_alone_are_taken_as_they_are():
    x, y = rows(N, D), torch.randn(5)
    penalty = seen_by(Aware(), model, guide, x, y, 5)
    torch.testing.assert_close(penalty.context.condition, y[:, None])


def test_rows_follow_a_subsample_that_the_user_gives():
    index = torch.tensor([7, 2, 9])
    programs = program(plate=lambda x: pyro.plate("data", N, subsample=index))
    model = lambda x, y: programs[0](x)  # noqa: E731
    penalty = seen_by(Aware(), model, programs[1], rows(3, D), torch.arange(N))
    torch.testing.assert_close(penalty.context.condition, index[:, None])


def test_the_data_plate_says_which_dimension_of_a_site_is_the_data():
    y = rows(4, 3)

    def output(z):
        pyro.sample("y", dist.Normal(0, 1), obs=y)
        return dist.Normal(z, 1)

    programs = program(
        dist.Delta,
        lambda x: dist.Normal(x.new_zeros(()), 1),
        output,
        plate=lambda x: nested(pyro.plate("data", 4, dim=-2), pyro.plate("time", 3, dim=-1)),
    )
    torch.testing.assert_close(seen_by(Aware(), *programs, y, data_plate="data").context.condition, y)
    torch.testing.assert_close(seen_by(Aware(), *programs, y, data_plate="time").context.condition, y.T)


@pytest.mark.parametrize("condition", ["y", "label"])
def test_rows_follow_the_mask(condition):
    kept = torch.arange(N) % 3 > 0
    x, y = rows(N, D), torch.arange(N)

    def masked(x, y):
        with pyro.plate("data", len(x)), poutine.mask(mask=kept):
            pyro.sample("label", dist.Categorical(x.new_ones(N)), obs=y)
            pyro.sample("x", around(pyro.sample("z", normal(x, D))), obs=x)

    penalty = seen_by(Aware(), masked, guide, x, y, condition=condition, cost=COSTS)
    torch.testing.assert_close(penalty.codes[0], x[kept])
    torch.testing.assert_close(penalty.context.condition, y[kept][:, None])


def test_a_condition_has_no_gradient():
    x, y = rows(N, D).requires_grad_(), rows(N, 1).requires_grad_()
    WAELoss(condition="y").differentiable_loss(model, guide, x, y).backward()
    assert x.grad is not None
    assert y.grad is None


# Penalties on rows of numbers


@every_particles
@pytest.mark.parametrize("prior_draws", [1, 2])
def test_other_penalties_see_each_datums_condition_beside_its_codes_and_its_prior_draws(prior_draws, options):
    x, y = rows(N, D), 100 * rows(N, 2, 3)
    penalty = seen_by(Joint(), model, guide, x, y, prior_draws=prior_draws, **options)
    particles = options.get("num_particles", 1)
    assert penalty.codes.shape == (particles, N, D + 6)
    assert penalty.prior.shape == (prior_draws * particles * N, D + 6)
    assert penalty.prepared[-1] == D + 6
    columns = penalty.codes[0, :, D:]
    torch.testing.assert_close(columns / columns[0, 0], y.flatten(1) / y[0, 0, 0])
    torch.testing.assert_close(penalty.codes[..., D:], columns.expand(particles, N, 6))
    torch.testing.assert_close(penalty.prior[:, D:], columns.repeat(prior_draws * particles, 1))
    # Four times as wide as the prior draws that the unit was taken from.
    torch.testing.assert_close(columns.var(0).sum(), 16 * penalty.prior[:, :D].var(0).sum())
    assert penalty.context.condition is None
    assert penalty.context.prior is None


def test_the_unit_is_kept():
    x, y = rows(N, D), rows(N, 3)
    penalty = Joint()
    loss = WAELoss(penalty, condition="y")
    loss.differentiable_loss(model, guide, x, y)
    first = penalty.codes[0, :, D:]
    loss.differentiable_loss(model, guide, x, 10 * y)
    torch.testing.assert_close(penalty.codes[0, :, D:], 10 * first)


def test_a_function_gets_the_condition_as_further_columns():
    shapes = []

    def look(codes, prior):
        shapes.append((tuple(codes.shape), tuple(prior.shape)))
        return codes.sum() * 0

    seen_by(look, model, guide, rows(N, D), rows(N, 3))
    assert shapes == [((N, D + 3), (N, D + 3))]


def test_a_sum_hands_each_part_what_it_reads():
    aware, joint = Aware(), Joint()
    seen_by(0.5 * (aware + 2.0 * joint), model, guide, rows(N, D), rows(N, 3))
    assert aware.codes.shape[-1] == D
    assert aware.context.condition.shape == (N, 3)
    assert joint.codes.shape[-1] == D + 3


def test_labels_reach_an_mmd_in_a_sum_beside_a_guard():
    noisy = program(lambda x: dist.Normal(x, 0.5).to_event(1))[1]
    WAELoss(MMD() + LogVarianceL1(), condition="y").loss(model, noisy, rows(N, D), torch.arange(N) % 3)


def test_each_sites_own_code_is_joined_with_the_condition():
    programs = sites(
        {
            "a": (lambda x: normal(x, 1), lambda x: delta(x[:, :1])),
            "b": (
                lambda x, a: dist.Normal(x.new_zeros(3), 5).to_event(1),
                lambda x: delta(torch.cat([x, x[:, 1:]], 1)),
            ),
        },
        lambda a, b: around((a + b.sum(-1, keepdim=True)).expand(-1, D)),
    )
    x, y = rows(N, D), rows(N, 2)
    parts = {"a": Joint(), "b": Joint()}
    WAELoss(parts, condition="y").loss(*programs, x, y=y)
    for name, size in (("a", 1), ("b", 3)):
        seen = parts[name]
        assert seen.codes.shape == (1, N, size + 2)
        torch.testing.assert_close(seen.codes[0, :, size:].var(0).sum(), 16 * seen.prior[:, :size].var(0).sum())
    loss = WAELoss({"a": MMD(), "b": None}, condition="y")
    assert math.isfinite(loss.loss(*programs, x, y=y))


def test_the_density_that_a_discriminator_adds_is_that_of_the_code():
    class LogProb(Joint):
        def estimate(self, codes, prior, context):
            self.log_prob = context.prior_log_prob(codes)
            return super().estimate(codes, prior, context)

    x, y = rows(N, D), torch.arange(N) % 3
    penalty = seen_by(LogProb(), labelled, guide, x, y, condition="x", cost=COSTS)
    expected = dist.Normal(y[:, None].double(), 1).log_prob(x).sum(1)
    torch.testing.assert_close(penalty.log_prob[0], expected)


# Costs


def test_a_condition_has_no_cost_unless_it_is_named():
    x, y = rows(N, D), torch.arange(N) % 3
    loss = WAELoss(condition="label")
    loss.loss(labelled, guide, x, y)
    assert list(loss.terms.costs) == ["x"]
    assert loss.terms.cost == 0
    only_x = WAELoss(cost={"x": SquaredError()}, condition="label")
    only_x.loss(labelled, guide, x, y)
    assert list(only_x.terms.costs) == ["x"]
    both = WAELoss(cost={"x": SquaredError(), "label": NegativeLogLikelihood()}, condition="label")
    both.loss(labelled, guide, x, y)
    assert both.terms.costs["label"].item() == pytest.approx(math.log(3))
    argument = WAELoss(condition="y")
    argument.loss(model, guide, x, rows(N))
    assert list(argument.terms.costs) == ["x"]


# Training


@every_particles
@pytest.mark.parametrize(
    "penalty", [MMD, JensenShannon, lambda: MMD() + SlicedWasserstein()], ids=["mmd", "gan", "sum"]
)
def test_svi_and_module_train_with_a_condition(penalty, options):
    wae, x, y = AutoEncoder(4, D), torch.randn(N, 4), torch.eye(3).repeat(N // 3, 1)
    model, guide = (lambda x, y, run=run: run(x) for run in (wae.model, wae.guide))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=WAELoss(penalty(), condition="y", **options))
    before = [value.clone() for value in wae.parameters()]
    assert all(math.isfinite(svi.step(x, y)) for _ in range(2))
    assert all((value != old).any() for value, old in zip(wae.parameters(), before, strict=True))
    bound = WAELoss(penalty(), condition="y", **options)(model, guide)
    bound(x, y)
    optimiser = torch.optim.Adam([value for value in bound.parameters() if value.requires_grad])
    bound(x, y).backward()
    optimiser.step()


# Errors


# What cannot be a condition: options of the loss, arguments after the data, and the message.
REFUSED = {
    "unknown": ({"condition": "w"}, [rows(N)], r"'w' is neither.*sites are \['x'\].*\['x', 'y', 'size'\]"),
    "latent": ({"condition": "z"}, [rows(N)], r"It is latent here.*obs="),
    "alone": ({"condition": "x"}, [None], "condition 'x' is the model's only observed site"),
    "rows": ({}, [rows(N + 1)], rf"'y' has shape \({N + 1},\).*'data' has {N} data.*needs {N} rows\."),
    "subsample": ({}, [rows(7, 2), 5], rf"shape \(7, 2\).*has 5 data in this step: it needs 5 rows, or {N} for all"),
    "scalar": ({}, [torch.tensor(1.0)], r"'y' has shape \(\)"),
    "ints": ({}, [torch.ones(N, 3).long()], r"rows of shape \(3,\) and torch.int64.*y\.float\(\)"),
    "constant": ({}, [torch.ones(N)], r"give.*no length.*MMD\(condition_kernel="),
    "nan": ({}, [torch.full((N,), math.nan)], "The condition 'y' holds NaN"),
    "scale": ({"penalty": SlicedWasserstein()}, [torch.ones(N)], r"'y' has a total variance of 0"),
    "labels": ({"penalty": SlicedWasserstein()}, [Y], r"SlicedWasserstein.*labels \(torch.int64\).*one_hot"),
    "gan": ({"penalty": MMD() + JensenShannon()}, [Y % 3], r"(?s)JensenShannon.*one_hot"),
    "stein": ({"penalty": KernelStein()}, [rows(N)], "KernelStein accepts no condition.*such as MMD"),
    "chain": ({"penalty": MMD() + 0.5 * Chain(step_size=1)}, [rows(N)], "Chain accepts no condition"),
    "steps": ({"penalty": Chain(step_size=D)}, [rows(N)], "Chain accepts no condition"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_a_condition_is_named(kind):
    options, given, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        WAELoss(**{"condition": "y", **options}).loss(model, guide, rows(N, D), *given)


@pytest.mark.parametrize(
    ("y", "found"),
    [
        (torch.eye(N).to_sparse(), r"a tensor \(torch.*Give a tensor with a row"),
        (torch.ones(N, device="meta"), r"a tensor \(torch.*Give a tensor with a row"),
        (None, "NoneType"),
    ],
    ids=["sparse", "meta", "none"],
)
def test_an_argument_without_dense_values_is_named(y, found):
    with pytest.raises(TypeError, match=f"'y' names an argument.* {found}"):
        WAELoss(condition="y").loss(model, guide, rows(N, D), y)


def test_a_condition_is_a_name():
    with pytest.raises(TypeError, match=r"condition must be the name.*found 1\. Write condition='y'"):
        WAELoss(condition=1)


def test_a_condition_masked_by_itself_is_an_error():
    def masked(x, y):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=torch.arange(N) > 3):
                pyro.sample("label", dist.Categorical(x.new_ones(3)), obs=y)
            pyro.sample("x", around(pyro.sample("z", normal(x, D))), obs=x)

    with pytest.raises(ValueError, match=r"condition='label' is masked where the latent sites \['z'\] are not"):
        WAELoss(condition="label").loss(masked, guide, rows(N, D), torch.arange(N) % 3)


# The tutorial


@pytest.mark.slow
def test_the_tutorial_prints_a_share_for_each_label_and_draws_both_grids(tmp_path):
    pytest.importorskip("matplotlib")
    script = Path(__file__).parents[1] / "tutorials" / "conditional.py"
    command = [sys.executable, str(script), "--smoke", "--out", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert "with condition='label'" in finished.stdout
    assert finished.stdout.count("%") == 2 * 11 + 1
    assert {path.name for path in tmp_path.iterdir()} == {"samples_with.png", "samples_without.png", "metrics.json"}


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
@pytest.mark.parametrize("how", ["mask", "obs_mask"])
def test_a_condition_that_lacks_beside_padding_is_an_error(how):
    padded, known = torch.arange(N) < N - 2, torch.arange(N) % 2 == 0

    def model(x, y):
        with pyro.plate("data", len(x)), poutine.mask(mask=padded):
            if how == "mask":
                with poutine.mask(mask=known):
                    pyro.sample("label", dist.Normal(x.new_zeros(()), 1), obs=x[:, 0])
            else:
                pyro.sample("label", dist.Normal(x.new_zeros(()), 1), obs=x[:, 0], obs_mask=known)
            pyro.sample("x", around(pyro.sample("z", normal(x, D))), obs=x)

    def masked_guide(x, y):
        with pyro.plate("data", len(x)), poutine.mask(mask=padded):
            pyro.sample("z", dist.Delta(x[:, :D] + 1).to_event(1))

    with pytest.raises(ValueError, match="condition='label' is masked where the latent sites"):
        WAELoss(condition="label").loss(model, masked_guide, rows(N, D), 0)


def test_a_condition_and_codes_under_one_mask_are_compared_where_it_is_true():
    padded = torch.arange(N) < N - 2

    def values_of(filled):
        def model(x):
            with pyro.plate("data", len(x)), poutine.mask(mask=padded):
                y = x[:, 0].where(padded, filled)
                pyro.sample("label", dist.Normal(x.new_zeros(()), 1), obs=y)
                pyro.sample("x", around(pyro.sample("z", normal(x, D))), obs=x)

        def masked_guide(x):
            with pyro.plate("data", len(x)), poutine.mask(mask=padded):
                pyro.sample("z", dist.Delta(x[:, :D] + 1).to_event(1))

        torch.manual_seed(0)
        return WAELoss(condition="label", penalty_weight=1.0).loss(model, masked_guide, x)

    x = rows(N, D)
    assert values_of(0.0) == values_of(7.0)
