"""Every error message that shows code: the line that it says to write, applied to the program, runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from program_table import PROGRAMS, run
from programs import (
    N,
    WithoutDensity,
    WithoutDraws,
    WithoutVariance,
    all_data,
    around,
    data,
    delta,
    encoded,
    normal,
    pair,
    shift,
    sites,
)
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.effect import AutoNormalMessenger
from pyro.nn import PyroModule, PyroSample
from references import of_no_size, two_structures, with_line
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.costs import ExpectedSquaredError, FunctionCost, NegativeLogLikelihood, SquaredError
from pyro_wae.kernels import Gaussian, RationalQuadratic
from pyro_wae.penalties import MMD, KernelStein, LogVarianceL1, PosteriorKL, SlicedWasserstein
from pyro_wae.predict import decode, encode, reconstruct, sample
from pyro_wae.priors import MixturePrior

PACKAGE = Path(__file__).parents[1] / "pyro_wae"
FILES = [path for room in ("step/*", "predict/*", "loss", "costs") for path in sorted(PACKAGE.glob(f"{room}.py"))]
X, INDEX, SEEN = data()
pytestmark = pytest.mark.filterwarnings("ignore:Found ", "ignore:pyro.factor", "ignore:z\nIf", "ignore:The prior")


def go(programs=None, **options):
    """Runs a step of model and guide."""
    return lambda: WAELoss(**{"penalty": MMD(Gaussian(1.0)), "penalty_weight": 1.0, **options}).loss_and_grads(
        *(pair() if programs is None else programs), X, INDEX, SEEN
    )


def of_table(name):
    """A program of program_table.py, with the error that it raises."""

    def broken():
        found = run(PROGRAMS[name])
        raise ValueError(found["error"])

    return broken


def drawn(name):
    return lambda x, index: pyro.plate(name, 2 * len(x), subsample_size=len(x))


def labels(x):
    return (x[:, 0] > 0).long()


def one_of_three(z):
    return dist.OneHotCategorical(logits=z)


def one_hot(y):
    return around(torch.nn.functional.one_hot(y, 3).float())


def of_condition(*order):
    """A model of z and y, a condition, and of x where it is named; each is centred at the one before."""

    def model(x, index, seen):
        loc = torch.zeros_like(x)
        with all_data(x, index):
            for site in order:
                loc = pyro.sample(site, around(loc), obs=None if site == "z" else x)

    return model, pair()[1]


def with_nan(codes):
    """Codes of a guide that encodes masked data too, which hold NaN."""
    return codes.where(SEEN[:, None], torch.nan)


class Weighted(PyroModule):
    """A decoder whose submodule has a weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = PyroModule()
        self.weight.w = weight

    def forward(self, x, index, seen):
        w = self.weight.w
        with all_data(x, index):
            pyro.sample("x", around(pyro.sample("z", normal(x)) * w), obs=x)


def beside(latent):
    """Model and guide with a latent outside the data plate."""

    def both(program):
        def run(x, index, seen):
            latent()
            program(x, index, seen)

        return run

    return tuple(map(both, pair()))


def with_y(change):
    """A condition of two whole numbers for each datum, or what is made of it."""
    y = change(torch.arange(2 * N).reshape(N, 2))
    programs = sites({"z": (lambda x: around(y.to(x) @ x.new_ones(2, 3)), lambda x: delta(encoded(x)))})
    return lambda: WAELoss(MMD(Gaussian(1.0)), condition="y", penalty_weight=1.0).loss(*programs, X, y=y)


def masked_by(mask_of):
    """The second latent is masked by what is read off the first or off the data."""
    return sites(
        {
            "first": (lambda x: dist.Normal(x.new_zeros(()), 1), lambda x: dist.Delta(x[:, 0])),
            "z": (lambda x, first: normal(x).mask(mask_of(first, x)), lambda x: delta(encoded(x))),
        },
        lambda first, z: around(z),
    )


def no_variance(loc):
    return dist.TransformedDistribution(dist.Normal(loc, 1), [dist.transforms.TanhTransform()]).to_event(1)


def choice(logits=lambda b: b):
    """A guide that draws a truth value beside its codes."""
    return go(pair(guide_line=lambda x, seen: pyro.sample("k", dist.Bernoulli(logits=logits(x[:, 0] * shift())))))


def by_itself(kind):
    """The divergence of a guide that Pyro makes of the model."""
    return lambda: go((model := pair()[0], kind(model)), penalty=PosteriorKL())()


def angles(z):
    return dist.VonMises(z, 1.0).to_event(1)


def chord(x, g):
    return (2 - 2 * (x - g).cos()).reshape(len(x), -1).sum(1)


def bounded(line):
    """An observed distribution that has no mean, with a cost."""
    return go(pair(output=lambda z: dist.Cauchy(z, 1).to_event(1)), cost=line)


def masked_normal(loc):
    return dist.Normal(loc, 1.0).mask(X[:, :1] > 0).to_event(1)


def masked_prior(x):
    return masked_normal(torch.zeros_like(encoded(x)))


GUARD = {"penalty": MMD(Gaussian(1.0)) + LogVarianceL1()}
GAUSSIAN_GUIDE = pair(code=lambda loc: dist.Normal(loc, 1.0).to_event(1))
# The message, by what it shows: a program that it is for, and the same with the line that it says to write.
WITHOUT_Y = with_line(lambda x, z: pyro.sample("y", around(z)))
UNDRAWN = pair(prior=lambda x: WithoutDraws(x.new_zeros(3), 1).to_event(1))
CASES = {
    "penalty={'z1': MMD(), ('z2', 'z3'): MMD()}": (
        lambda: WAELoss({3: MMD()}),
        lambda: WAELoss(penalty={"z1": MMD(), ("z2", "z3"): MMD()}),
    ),
    "Write one, with the sum of their penalties": (
        lambda: WAELoss({"z": MMD(), ("z",): MMD()}),
        go(penalty={"z": MMD() + MMD()}),
    ),
    "WAELoss({'z': MMD(), ...}), or train without: WAELoss(penalty_weight=0.0)": (
        lambda: WAELoss({"z": None}),
        go(penalty_weight=0.0),
    ),
    "pyro.sample('q', ..., obs=q) in the data plate, or name an argument": (
        go(condition="q"),
        go(pair(line=lambda x, z: 0 * pyro.sample("q", around(z), obs=x)), condition="q"),
    ),
    "y.float()": (with_y(lambda y: y), with_y(lambda y: y.float())),
    "pyro.sample('x', ..., obs=x) for the decoder's output": (
        go(of_condition("z", "y"), condition="y"),
        go(of_condition("y", "z", "x"), condition="y"),
    ),
    "cost={'x': SquaredError(), ...}": (go(cost={"y": SquaredError()}), go(cost={"x": SquaredError()})),
    "cost={..., 'x': SquaredError()}": (go(cost={}), go(cost={"x": SquaredError()})),
    "data_plate='data'.": (go(data_plate="rows"), go(data_plate="data")),
    "WAELoss(data_plate='data')": (
        of_table("several plates"),
        go(PROGRAMS["several plates"].make(), data_plate="data"),
    ),
    "with pyro.plate('data', n): pyro.sample('z0', ...)": (of_table("data one by one"), go()),
    "w = pyro.param('w', ...), and leave it out of the guide": (
        of_table("global latent"),
        go(pair(line=lambda x, z: 0 * pyro.param("w", torch.ones(3)))),
    ),
    "self.weight.w = nn.Parameter(...), and leave it out of the guide": (
        go(
            (
                Weighted(PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))),
                beside(lambda: pyro.sample("weight.w", delta(torch.ones(3))))[1],
            )
        ),
        go((Weighted(nn.Parameter(torch.ones(3))), pair()[1])),
    ),
    "in model and guide: with pyro.plate('data', 8): pyro.sample('z', ...)": (of_table("no plate"), go()),
    "mask that is computed from the data": (
        go(masked_by(lambda first, x: first > 0)),
        go(masked_by(lambda first, x: x[:, 0] > 0)),
    ),
    "around site 'z' in model and guide": (
        go(pair(code=lambda loc: delta(loc).mask(X[:, 0] > 0))),
        go(tuple(poutine.mask(program, mask=X[:, 0] > 0) for program in pair())),
    ),
    "write the model's as dist.Normal(x.new_zeros((3,)), 1).to_event(1)": (
        lambda: unvalidated(go(pair(prior=lambda x: normal(x, 2)))),
        go(pair(prior=lambda x: dist.Normal(x.new_zeros((3,)), 1).to_event(1))),
    ),
    "pyro.factor('f', value.sum(-1))": (
        go(pair(line=lambda x, z: pyro.factor("f", x[:, :1] * torch.ones(N)))),
        go(pair(line=lambda x, z: pyro.factor("f", (x[:, :1] * torch.ones(N)).sum(-1)))),
    ),
    "Write .to_event(1) if it belongs to the value of one datum": (
        go(pair(observed=lambda x: x[:, 0], output=lambda z: dist.Normal(z[:, :1], 1))),
        go(pair(observed=lambda x: x[:, :1], output=lambda z: dist.Normal(z[:, :1], 1).to_event(1))),
    ),
    "Write obs=x.unsqueeze(-1)": (
        go(pair(observed=lambda x: x[:, 0], output=lambda z: around(z[:, :1]))),
        go(pair(observed=lambda x: x[:, 0].unsqueeze(-1), output=lambda z: around(z[:, :1]))),
    ),
    "obs=torch.nn.functional.one_hot(x, classes)": (
        lambda: unvalidated(go(pair(observed=labels, output=one_of_three))),
        go(pair(observed=lambda x: torch.nn.functional.one_hot(labels(x), 3), output=one_of_three)),
    ),
    "Write in the guide: x = x.nan_to_num()": (
        lambda: unvalidated(go(pair(code=lambda loc: delta(with_nan(loc)), seen_alone=True))),
        go(pair(code=lambda loc: delta(with_nan(loc).nan_to_num()), seen_alone=True)),
    ),
    "z = pyro.sample('z', ...)": (of_table("nothing shared"), go()),
    "pyro.sample('x', ..., obs=x); ": (of_table("nothing observed"), go()),
    "pyro.factor('label', -distribution.log_prob(value), has_rsample=True)": (
        of_table("guide observes"),
        go(
            pair(
                guide_line=lambda x, seen: pyro.factor(
                    "label", -dist.Bernoulli(logits=encoded(x)[:, 0]).log_prob(seen.float()), has_rsample=True
                )
            )
        ),
    ),
    "pyro.sample('z', dist.Delta(value).to_event(1))": (
        go((pair()[0], lambda x, index, seen: pyro.deterministic("z", encoded(x), event_dim=1))),
        go(pair(code=lambda loc: dist.Delta(loc).to_event(1))),
    ),
    "pyro.factor('y_density', log_density)": (
        go(pair(line=lambda x, z: 0 * pyro.sample("y", dist.Delta(x, x[:, 0], event_dim=1), obs=x))),
        go(pair(line=lambda x, z: pyro.factor("y_density", x[:, 0]))),
    ),
    "poutine.scale around both, or around the model": (
        of_table("scale in the guide"),
        go(tuple(poutine.scale(program, scale=2.0) for program in pair())),
    ),
    "inside the same plates as the model's": (lambda: unvalidated(of_table("one code for all")), go()),
    "poutine.scale(scale=0.5)": (
        of_table("scale for each datum"),
        go((poutine.scale(pair()[0], scale=0.5), pair()[1])),
    ),
    "pyro.sample('x', ..., obs=x.to_dense())": (
        go(pair(observed=lambda x: x.to_sparse())),
        go(pair(observed=lambda x: x.to_sparse().to_dense())),
    ),
    "Write .to_event(1), which leaves the first dimension to the data plate": (
        lambda: unvalidated(go(pair(output=lambda z: dist.Normal(z, 1).to_event(2)))),
        go(pair(output=lambda z: dist.Normal(z, 1).to_event(1))),
    ),
    "write .to_event(1) inside pyro.plate('data', 8)": (of_table("batch in the event"), go()),
    "dist.RelaxedBernoulliStraightThrough(temperature, logits=...)": (
        of_table("enumerated in the guide"),
        go(
            pair(
                code=lambda loc: dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), logits=loc).to_event(1),
                prior=lambda x: dist.Bernoulli(x.new_full((3,), 0.5)).to_event(1),
            )
        ),
    ),
    "dist.OneHotCategoricalStraightThrough or dist.RelaxedOneHotCategorical": (
        of_table("discrete"),
        go(pair(code=lambda loc: dist.OneHotCategoricalStraightThrough(logits=loc))),
    ),
    "or detached parameters, such as logits.detach()": (choice(), choice(lambda logits: logits.detach())),
    "in the model and leave it out of the guide: WAELoss(condition='y')": (
        go(sites({"y": (lambda x: dist.Categorical(x.new_ones(3)), lambda x: dist.Delta(x.argmax(-1)))}, one_hot)),
        go(of_condition("y", "z", "x"), condition="y"),
    ),
    "Write if mask.sum() > 1: svi.step(x)": (
        go((poutine.mask(pair()[0], mask=torch.arange(N) < 1), pair()[1])),
        go((poutine.mask(pair()[0], mask=torch.arange(N) < 2), pair()[1])),
    ),
    "dist.Normal(loc, scale), or dist.Delta(loc)": (of_table("no gradient"), go(GAUSSIAN_GUIDE)),
    "poutine.mask(mask=...) with one truth value for each datum": (
        of_table("mask of another batch at z"),
        go((poutine.mask(pair()[0], mask=torch.ones(N).bool()), pair()[1])),
    ),
    "write the choice into the site's distribution": (
        lambda: go(two_structures(True), num_particles=2)(),
        go(two_structures(False), num_particles=2),
    ),
    "guard out, or write dist.Normal(loc, scale) in the guide": (go(**GUARD), go(GAUSSIAN_GUIDE, **GUARD)),
    "or AutoNormalMessenger(model)": (by_itself(AutoNormal), by_itself(AutoNormalMessenger)),
    "needs. Write dist.Normal(loc, scale) in the guide": (
        go(pair(code=no_variance), **GUARD),
        go(GAUSSIAN_GUIDE, **GUARD),
    ),
    "PosteriorKL out, or write dist.Normal(loc, scale) in the guide": (
        go(penalty=PosteriorKL()),
        go(GAUSSIAN_GUIDE, penalty=PosteriorKL()),
    ),
    "Write .mask(mask) in both": (
        go(pair(prior=masked_prior, code=lambda loc: dist.Normal(loc, 1.0).to_event(1)), penalty=PosteriorKL()),
        go(pair(prior=masked_prior, code=masked_normal), penalty=PosteriorKL()),
    ),
    "encoder = torch.compile(encoder)": (lambda: WAELoss(jit_options={}), lambda: torch.compile(nn.Linear(2, 2))),
    "Write max_plate_nesting": (lambda: WAELoss(max_iarange_nesting=1), lambda: WAELoss(max_plate_nesting=1)),
    "WAELoss(MMD(kernel))": (lambda: WAELoss(kernel=Gaussian()), lambda: WAELoss(MMD(Gaussian()))),
    "WAELoss(penalty_weight=...)": (lambda: WAELoss(mmd_scale=1.0), lambda: WAELoss(penalty_weight=1.0)),
    "cost=SquaredError(decode=...) or cost=NegativeLogLikelihood()": (
        go(pair(output=lambda z: WithoutVariance(z, 1).to_event(1)), cost=ExpectedSquaredError()),
        go(pair(output=lambda z: WithoutVariance(z, 1).to_event(1)), cost=SquaredError(decode=lambda fn: fn.mean)),
    ),
    "cost=SquaredError(decode=lambda fn: ...)": (
        bounded(None),
        bounded(SquaredError(decode=lambda fn: fn.base_dist.loc)),
    ),
    "log_prob alone: WAELoss(KernelStein(RationalQuadratic(0.5, bandwidth=1.0)))": (
        go(UNDRAWN, penalty=SlicedWasserstein()),
        go(UNDRAWN, penalty=KernelStein(RationalQuadratic(0.5, bandwidth=1.0))),
    ),
    "torch.tensor([0, 0]).float()": (
        go(pair(prior=lambda x: dist.Normal(torch.tensor([0, 0, 0]), 1).to_event(1))),
        go(pair(prior=lambda x: dist.Normal(torch.tensor([0, 0, 0]).float(), 1).to_event(1))),
    ),
    "has no log_prob. Write cost=SquaredError()": (
        go(pair(output=lambda z: WithoutDensity(z, 1).to_event(1)), cost=NegativeLogLikelihood()),
        go(pair(output=lambda z: WithoutDensity(z, 1).to_event(1)), cost=SquaredError()),
    ),
    "cost=NegativeLogLikelihood(), or say": (bounded(None), bounded(NegativeLogLikelihood())),
    "decode=lambda fn: fn.mean), the squared chord": (
        go(pair(output=angles)),
        go(pair(output=angles), cost=FunctionCost(chord, decode=lambda fn: fn.mean)),
    ),
    "cost=lambda x, g: (x - g).abs().flatten(1).sum(1)": (
        lambda: WAELoss(cost=3),
        go(cost=lambda x, g: (x - g).abs().flatten(1).sum(1)),
    ),
    "write (x - g).square().flatten(1).sum(1)": (
        go(cost=lambda x, g: ((x - g) > 0).any(1)),
        go(cost=lambda x, g: (x - g).square().flatten(1).sum(1)),
    ),
    f"Write pyro.plate('data', {N}), and outside of it what all data share": (
        go((of_no_size(pyro.plate("data")), pair()[1])),
        go((of_no_size(pyro.plate("data", N)), pair()[1])),
    ),
    "codes={'z': ...}": (
        lambda: decode(pair()[0], {"w": X}, X, INDEX, SEEN),
        lambda: decode(pair()[0], {"z": X}, X, INDEX, SEEN),
    ),
    "prior=priors.fit(model, guide, x, prior=MixturePrior(100, 3))": (
        lambda: sample(pair()[0], X, INDEX, SEEN, prior=MixturePrior(5, 2)),
        lambda: sample(pair()[0], X, INDEX, SEEN, prior=MixturePrior(5, 3)),
    ),
    "pyro.deterministic('y', value, event_dim=1)": (
        lambda: sample(with_line(lambda x, z: pyro.deterministic("y", z))[0], X, INDEX, SEEN, return_sites=("y",)),
        lambda: sample(
            with_line(lambda x, z: pyro.deterministic("y", z, event_dim=1))[0], X, INDEX, SEEN, return_sites=("y",)
        ),
    ),
    "pyro.factor('y', log_density)": (
        go(with_line(lambda x, z: pyro.sample("y", dist.Delta(0 * x[:, 0], z[:, 0]), obs=0 * x[:, 0]))),
        go(with_line(lambda x, z: pyro.factor("y", z[:, 0]))),
    ),
    "subsample_size=": (
        go(pair(plate=drawn("data"), guide_plate=drawn("cells"))),
        go(pair(plate=drawn("data"), guide_plate=drawn("data"))),
    ),
    "z = z + ...": (go(pair(line=lambda x, z: z.add_(1))), go(pair(line=lambda x, z: 1))),
    "dist.TorchDistribution": (go(pair(prior=lambda x: lambda: x)), go(pair())),
    "dist.Independent(...)": (
        go(pair(output=lambda z: torch.distributions.Independent(torch.distributions.Normal(z, 1.0), 1))),
        go(pair(output=lambda z: dist.Independent(dist.Normal(z, 1.0), 1))),
    ),
    "x, return_sites=('y',)), with the same arguments": (
        lambda: reconstruct(*WITHOUT_Y, X, INDEX, SEEN, return_sites=("y",)),
        lambda: decode(WITHOUT_Y[0], encode(*WITHOUT_Y, X, INDEX, SEEN), X, INDEX, SEEN, return_sites=("y",)),
    ),
    "return_sites=('z',)": (
        lambda: sample(pair()[0], X, INDEX, SEEN, return_sites=["w"]),
        lambda: sample(pair()[0], X, INDEX, SEEN, return_sites=("z",)),
    ),
    "random=True for a draw instead": (
        lambda: reconstruct(*pair(output=lambda z: dist.Cauchy(z, 1).to_event(1)), X, INDEX, SEEN),
        lambda: reconstruct(*pair(output=lambda z: dist.Cauchy(z, 1).to_event(1)), X, INDEX, SEEN, random=True),
    ),
}


def unvalidated(call):
    with pyro.validation_enabled(False):
        call()


def message(call):
    with pytest.raises((ValueError, TypeError)) as raised:
        call()
    return str(raised.value)


@pytest.mark.parametrize("line", CASES)
def test_the_line_is_shown_and_runs(line):
    broken, fixed = CASES[line]
    assert line in message(broken)
    pyro.clear_param_store()
    fixed()


@pytest.mark.parametrize("name", ["beta/topic", "w[0]", "layer 1", "a-b", "class", "net$$$weight", "1st"])
def test_the_line_for_a_global_latent_is_python_whatever_its_name(name):
    programs = beside(lambda: pyro.sample(name, delta(torch.ones(3))))
    line = message(go(programs)).partition("the model, ")[2].partition(", and leave")[0]
    line = line.removeprefix("in place of poutine.lift, ").replace("...", "torch.ones(3)")
    names = {"pyro": pyro, "torch": torch, "net": nn.Linear(2, 2)}
    exec(line, names)
    assert (name if "net" not in name else "net$$$bias") in pyro.get_param_store()


@pytest.mark.parametrize("size", [N, 12])
def test_a_latent_in_a_plate_of_its_own_is_told_how_all_data_share_it(size):
    def latent():
        with pyro.plate("weights", size):
            pyro.sample("w", dist.Delta(torch.ones(size)))

    found = message(go(beside(latent)))
    assert "w = pyro.param('w', ...)" in found
    assert ("ambiguous" in found) == (size == N)


def texts():
    """The texts of the sources that say what to write, as patterns, with the place of each."""
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr | ast.BinOp | ast.Expr)
            for part in ast.walk(node)
            if part is not node and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in inner:
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                pieces = [
                    re.escape(p.value) if isinstance(p, ast.Constant) and isinstance(p.value, str) else ".*"
                    for p in parts
                ]
                if re.search(r"\brite|[Ww]rite\\? ", "".join(pieces)):
                    yield f"{path.name}:{node.lineno}", "".join(pieces)


def test_every_text_that_says_what_to_write_has_its_case():
    found = []
    for broken, _ in CASES.values():
        pyro.clear_param_store()
        found.append(message(broken))
    missing = [
        (place, pattern) for place, pattern in texts() if not any(re.search(pattern, text, re.DOTALL) for text in found)
    ]
    assert not missing
