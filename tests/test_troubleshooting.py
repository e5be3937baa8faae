"""The messages that docs/troubleshooting.md explains are those that users meet."""

import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from program_table import PROGRAMS, run
from programs import around, data, delta, normal, pair

from pyro_wae import WAELoss
from pyro_wae.penalties import MMD, UnitVarianceKL

PAGE = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SECTIONS = (
    PAGE.partition("### NaN and infinite values")[2].partition("### ")[0],
    PAGE.partition("## Error messages")[2],
)
LISTED = re.findall(r"^\| `(.+?)` ?(?:\(a warning\) )?\|", "\n".join(SECTIONS), re.MULTILINE)

X, INDEX, SEEN = data()


def step(programs=None, x=X, **options):
    n = len(x)
    WAELoss(**options).loss_and_grads(*(programs or pair()), x, INDEX[:n], SEEN[:n])


def learnt_mixture(x):
    logits = pyro.param("logits", torch.zeros(3))
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(x.new_zeros(3, 3), 1).to_event(1))


def nan_codes():
    return pair(code=lambda loc: delta(loc * torch.nan), output=lambda z: around(z.nan_to_num()))


def too_large(codes, prior):
    return codes.sum() * 0 + 1e30


# What the page says, by the name of a program of the table, or by a step.
CASES = {
    "The codes of latent site 'z' hold NaN": lambda: step(nan_codes()),
    "The cost of observed site 'x' is NaN": "NaN from the cost",
    "The penalty is NaN, though the codes are finite": lambda: step(
        penalty=lambda codes, prior: codes.sum() * torch.nan
    ),
    "The loss is not finite, though its parts are": lambda: step(penalty=too_large, penalty_weight=1e30),
    "... is in no plate. It is ambiguous which of its dimensions is the data": "no plate",
    "Latent site '...' is global": "global latent",
    "Several plates hold every latent and observed site": "several plates",
    "data_plate='...' is no vectorised plate": "unknown plate",
    "is only inside the sequential plate": "data one by one",
    "Model and guide share no latent site": "nothing shared",
    "The model has no observed site": "nothing observed",
    "is discrete in the guide": "discrete",
    "cannot be reparameterised in the guide": "no gradient",
    "Model and guide shapes disagree at site": "one code for all",
    "has size ... where its plates give": "dimension without a plate",
    "Shape mismatch inside plate": lambda: step(pair(output=lambda z: dist.Normal(z, 1))),
    "has no finite mean to compare the data with": "no mean",
    "the cost ... returned": lambda: step(cost=lambda x, g: (x - g).square().sum()),
    "The penalty ... must return a scalar tensor": lambda: step(penalty=lambda codes, prior: codes.sum(1)),
    "needs at least 2 data and 2 prior samples": lambda: step(x=X[:1]),
    "must have one floating dtype": lambda: step(pair(prior=lambda x: normal(x.double()))),
    "must be on one device": lambda: MMD()(X, X.to("meta")),
    "The guide is deterministic at site": lambda: step(penalty=MMD() + UnitVarianceKL()),
    "penalty has no entry for the latent site": lambda: step(penalty={}),
    "has learnable parameters but cannot be reparameterised": lambda: step(
        pair(prior=learnt_mixture), penalty=MMD(closed_form=False)
    ),
    "The mask at site '...' has shape": "mask of another batch at z",
    "has a mask in the guide that leaves out what the model keeps": lambda: step(
        pair(code=lambda loc: delta(loc).mask(loc[..., 0] > 0))
    ),
}


def test_every_message_of_the_page_is_tested_and_every_tested_one_is_on_it():
    assert sorted(LISTED) == sorted(CASES)


@pytest.mark.filterwarnings("ignore:Found .*vars in")
@pytest.mark.parametrize("text", CASES)
def test_message_is_what_the_page_says(text):
    case, pattern = CASES[text], re.compile(".*".join(map(re.escape, text.split("..."))), re.DOTALL)
    if isinstance(case, str):
        assert pattern.search(run(PROGRAMS[case])["error"])
    elif "learnable parameters" in text:
        with pytest.warns(UserWarning, match=pattern):
            case()
    else:
        with pytest.raises(ValueError, match=pattern):
            case()
