"""The messages that docs/troubleshooting.md explains are those that users meet."""

import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_wae import WAELoss
from pyro_wae.penalties import MMD, UnitVarianceKL

PAGE = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SECTIONS = (
    PAGE.partition("### NaN and infinite values")[2].partition("### ")[0],
    PAGE.partition("## Error messages")[2],
)
LISTED = re.findall(r"^\| `(.+?)` ?(?:\(a warning\) )?\|", "\n".join(SECTIONS), re.MULTILINE)

X = torch.linspace(-1, 1, 48).reshape(8, 6)
BROKEN = X.clone()
BROKEN[0, 0] = torch.nan


def normal(d=2):
    return dist.Normal(torch.zeros(d), 1).to_event(1)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal())
        pyro.sample("x", dist.Normal(z.repeat(1, 3), 1).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(x[:, :2]).to_event(1))


def a_model(*, prior=None, output=lambda z: dist.Normal(z.repeat(1, 3), 1).to_event(1), obs=X):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal() if prior is None else prior)
            if obs is not None:
                pyro.sample("x", output(z), obs=obs)

    return model


def a_guide(encode, name="z"):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample(name, encode(x))

    return guide


def without_plate(x):
    z = pyro.sample("z", normal().expand([len(x)]))
    pyro.sample("x", dist.Normal(z.repeat(1, 3), 1).to_event(1), obs=x)


def guide_without_plate(x):
    pyro.sample("z", dist.Delta(x[:, :2]).to_event(1))


def with_global(program, value):
    def both(x):
        pyro.sample("w", value)
        program(x)

    return both


def sequential_model(x):
    for i in pyro.plate("rows", len(x)):
        z = pyro.sample(f"z{i}", normal())
        pyro.sample(f"x{i}", dist.Normal(z.repeat(3), 1).to_event(1), obs=x[i])


def sequential_guide(x):
    for i in pyro.plate("rows", len(x)):
        pyro.sample(f"z{i}", dist.Delta(x[i, :2]).to_event(1))


def grid_model(x):
    with pyro.plate("data", 8, dim=-2), pyro.plate("time", 6, dim=-1):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0, 1)), 1), obs=x)


def grid_guide(x):
    with pyro.plate("data", 8, dim=-2), pyro.plate("time", 6, dim=-1):
        pyro.sample("z", dist.Delta(x))


def undeclared_model(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(torch.zeros(6), 1)), 1), obs=x)


def undeclared_guide(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Delta(x))


def learnt_model(x):
    logits = pyro.param("logits", torch.zeros(3))
    with pyro.plate("data", len(x)):
        mixture = dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(torch.zeros(3, 2), 1).to_event(1))
        z = pyro.sample("z", mixture)
        pyro.sample("x", dist.Normal(z.repeat(1, 3), 1).to_event(1), obs=x)


def masked(program, size):
    return poutine.mask(program, mask=torch.ones(size, dtype=torch.bool))


# What the page says, by the arguments that make it: loss, model, guide, data, each None where it is the usual one.
CASES = {
    "The codes of latent site 'z' hold NaN": (
        None,
        a_model(output=lambda z: dist.Normal(z.nan_to_num().repeat(1, 3), 1).to_event(1)),
        None,
        BROKEN,
    ),
    "The cost of observed site 'x' is NaN": (None, a_model(obs=BROKEN), None, None),
    "The penalty is NaN, though the codes are finite": (
        lambda: WAELoss(lambda codes, prior: codes.sum() * torch.nan),
        None,
        None,
        None,
    ),
    "The loss is not finite, though its parts are": (
        lambda: WAELoss(lambda codes, prior: codes.sum() * 0, penalty_weight=torch.finfo(torch.float32).max * 1e10),
        None,
        None,
        None,
    ),
    "... is in no plate. It is ambiguous which of its dimensions is the data": (
        None,
        without_plate,
        guide_without_plate,
        None,
    ),
    "Latent site '...' is global": (
        None,
        with_global(model, dist.Normal(0, 1)),
        with_global(guide, dist.Delta(torch.tensor(0.0))),
        None,
    ),
    "Several plates hold every latent and observed site": (None, grid_model, grid_guide, None),
    "data_plate='...' is no vectorised plate": (lambda: WAELoss(data_plate="rows"), None, None, None),
    "is only inside the sequential plate": (None, sequential_model, sequential_guide, None),
    "Model and guide share no latent site": (None, None, a_guide(lambda x: normal(), "code"), None),
    "The model has no observed site": (None, a_model(obs=None), None, None),
    "is discrete in the guide": (None, None, a_guide(lambda x: dist.OneHotCategorical(logits=x[:, :2])), None),
    "cannot be reparameterised in the guide": (
        None,
        None,
        a_guide(lambda x: dist.MixtureSameFamily(dist.Categorical(x.new_ones(1)), normal().expand([1]))),
        None,
    ),
    "Model and guide shapes disagree at site": (
        None,
        None,
        lambda x: pyro.sample("z", dist.Delta(x[0, :2]).to_event(1)),
        None,
    ),
    "has size ... where its plates give": (None, undeclared_model, undeclared_guide, None),
    "has no finite mean to compare the data with": (
        None,
        a_model(output=lambda z: dist.Cauchy(z.repeat(1, 3), 1).to_event(1)),
        None,
        None,
    ),
    "the cost ... returned": (lambda: WAELoss(cost=lambda x, g: (x - g).square().sum()), None, None, None),
    "The penalty ... must return a scalar tensor": (
        lambda: WAELoss(lambda codes, prior: codes.sum(1)),
        None,
        None,
        None,
    ),
    "needs at least 2 data and 2 prior draws": (None, None, None, X[:1]),
    "must have one floating dtype": (None, None, None, X.double()),
    "must be on one device": (
        lambda: MMD()(X[:, :2], torch.zeros(8, 2, device="meta")),
        None,
        None,
        None,
    ),
    "The guide is deterministic at site": (lambda: WAELoss(MMD() + UnitVarianceKL()), None, None, None),
    "penalty has no entry for the latent site": (lambda: WAELoss({}), None, None, None),
    "has learnable parameters but cannot be reparameterised": (
        lambda: WAELoss(MMD(closed_form=False)),
        learnt_model,
        None,
        None,
    ),
    "The mask at site '...' has shape": (None, masked(model, 7), None, None),
}


def test_every_message_of_the_page_is_tested_and_every_tested_one_is_on_it():
    assert sorted(LISTED) == sorted(CASES)


@pytest.mark.filterwarnings("ignore:Found .*vars in")
@pytest.mark.parametrize("text", CASES)
def test_message_is_what_the_page_says(text):
    loss, its_model, its_guide, x = CASES[text]
    pattern = ".*".join(map(re.escape, text.split("...")))
    pyro.clear_param_store()

    def step():
        made = WAELoss() if loss is None else loss()
        if isinstance(made, WAELoss):
            made.loss_and_grads(its_model or model, its_guide or guide, X if x is None else x)

    if "learnable parameters" in text:
        with pytest.warns(UserWarning, match=pattern):
            step()
    else:
        with pytest.raises(ValueError, match=re.compile(pattern, re.DOTALL)):
            step()
    pyro.clear_param_store()
