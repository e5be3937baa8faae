"""Every public name beside the step takes a bad argument for what it is: the error names it and says what to write."""

import math
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from programs import normal
from references import program
from torch import nn

from pyro_wae import checkpoint, diagnostics, optim, plotting, priors
from pyro_wae.checkpoint import load_checkpoint, save_checkpoint
from pyro_wae.diagnostics import classifier_test, precision_recall, report, sample_quality, two_sample_test
from pyro_wae.optim import SGD, Adam, AdamW, SharedOptim
from pyro_wae.plotting import codes_and_prior, image_grid, loss_curves, quantiles, reconstructions
from pyro_wae.priors import MixturePrior, NormalMixture, VampPrior

ROWS = torch.randn(20, 3)
IMAGES = torch.rand(4, 1, 8, 8)
SPARSE = torch.eye(3).to_sparse()
META = torch.empty(20, 3, device="meta")
NO_ROWS = [None, "codes", [[1.0], [2.0, 3.0]], 3, META, SPARSE, ROWS[:0], ROWS / 0, ROWS[0], object()]
NO_FLAG = [None, "yes", 1, 0.0, torch.tensor(1)]
NO_COUNT = [None, 0, -1, 1.5, "3", True, torch.ones(2)]
NO_LEVEL = [None, 0, 1, -0.1, 2, "0.05", True, float("nan")]
NO_SEED = [None, 0.5, "0", True, 2**70]
NO_TITLE = [3, b"title", ["title"], ROWS, ROWS.numpy()]
NO_IMAGES = [None, "images", IMAGES[:, :, :0], IMAGES[0, 0, 0], META, object(), torch.rand(2, 5, 8, 8)]
NO_CMAP = ["no such map", "", 3, None]


def pair(x):
    raise AssertionError("arguments are checked first")


def test_of(call, **bad):
    """Calls with one argument that is bad."""
    return [(call, name, value) for name, values in bad.items() for value in values]


test_of.__test__ = False


class Metric:
    """As those of torchmetrics, of which an instance is wanted."""

    def reset(self): ...
    def update(self, x, real): ...
    def compute(self): ...


coded, encoded = program(prior=lambda x: normal(x, 3))


CALLS = {
    "fit": test_of(
        lambda **bad: priors.fit(coded, encoded, ROWS, **{"prior": MixturePrior(2, 3), **bad}),
        prior=[3, "mixture", nn.Linear(2, 3), MixturePrior(2, 4), dist.Normal(torch.ones(1, requires_grad=True), 1)],
        steps=NO_COUNT,
        batch_size=NO_COUNT,
        learning_rate=[0.0, -1.0, "fast", math.nan],
    ),
    "two_sample_test": test_of(
        lambda **bad: two_sample_test(**{"codes": ROWS, "prior": ROWS, **bad}),
        codes=NO_ROWS,
        prior=[value for value in NO_ROWS if value is not META],
        kernel=[3, "gaussian"],
        aggregate=NO_FLAG,
        permutations=NO_COUNT,
        level=NO_LEVEL,
        seed=NO_SEED,
    ),
    "two_sample_test of a distribution": test_of(
        lambda **bad: two_sample_test(ROWS, dist.Normal(torch.zeros(3), 1).to_event(1), **bad), prior_draws=NO_COUNT
    ),
    "classifier_test": test_of(
        lambda **bad: classifier_test(**{"codes": ROWS, "prior": ROWS, **bad}),
        codes=NO_ROWS,
        prior=[value for value in NO_ROWS if value is not META],
        width=NO_COUNT,
        steps=NO_COUNT,
        level=NO_LEVEL,
        seed=NO_SEED,
    ),
    "report": test_of(
        lambda **bad: report(pair, pair, torch.randn(20, 3), **bad),
        max_codes=[*NO_COUNT, 1],
        test_codes=[*NO_COUNT, 1],
        permutations=NO_COUNT,
        level=NO_LEVEL,
        data_plate=[3, ["data"]],
        cost=[3, "squared"],
        seed=NO_SEED,
        batches=[3],
        shape=[3, "28x28", torch.tensor(28), ["28", "28"], {"x": 28}, (4.0, 5.0), (-4, -5)],
    ),
    "report of batches": test_of(
        lambda **bad: report(pair, pair, **bad), batches=[3, ROWS, "loader", {"x": ROWS}, [], torch.randn]
    ),
    "sample_quality": test_of(
        lambda **bad: sample_quality(pair, **{"x": ROWS, "metric": precision_recall, **bad}),
        x=[None, "codes", 3, ROWS[:0], ROWS[0, 0], SPARSE, META],
        metric=[None, 3, "FID", torch.nn.Linear, Metric],
        site=[3, ["x"]],
        transform=[3, "flatten"],
        batch_size=NO_COUNT,
        random=NO_FLAG,
        seed=NO_SEED,
    ),
    "precision_recall": test_of(
        lambda **bad: precision_recall(**{"data": ROWS, "samples": ROWS, **bad}),
        data=NO_ROWS,
        samples=[*NO_ROWS, ROWS[:, :2]],
        neighbours=[*NO_COUNT, 20],
    ),
    "image_grid": test_of(
        lambda **bad: image_grid(**{"images": IMAGES, **bad}),
        images=NO_IMAGES,
        columns=NO_COUNT[1:],
        title=NO_TITLE,
        cmap=NO_CMAP,
    ),
    "reconstructions": test_of(
        lambda **bad: reconstructions(**{"inputs": IMAGES, "outputs": IMAGES, **bad}),
        inputs=NO_IMAGES,
        outputs=[*NO_IMAGES, IMAGES[:2], IMAGES[:2].tolist()],
        columns=NO_COUNT[1:],
        title=NO_TITLE,
        cmap=NO_CMAP,
    ),
    "codes_and_prior": test_of(
        lambda **bad: codes_and_prior(**{"codes": ROWS, "prior": ROWS, **bad}),
        codes=NO_ROWS,
        prior=[*NO_ROWS, ROWS[:, :2]],
        labels=[torch.zeros(8), 3, META[:, 0], object(), [None] * 20, [dist.Normal] * 20],
        plane=[(0, 3), (1, 1), 0, (0, 1, 2), "01", (0.0, 1.0), (True, False), ([0], [1]), (ROWS, ROWS)],
        title=NO_TITLE,
    ),
    "quantiles": test_of(
        lambda **bad: quantiles(**{"codes": ROWS, "prior": ROWS, **bad}),
        codes=NO_ROWS,
        prior=[*NO_ROWS, ROWS[:, :2]],
        names=[["a"], "abc", 3],
        title=NO_TITLE,
    ),
    "loss_curves": test_of(
        lambda **bad: loss_curves(**{"history": {"cost": [1.0], "penalty": [0.5]}, **bad}),
        history=[
            None,
            [1.0],
            {"cost": [1.0]},
            {"cost": [1.0], "penalty": []},
            {"cost": [], "penalty": []},
            {"cost": 3, "penalty": 3},
            {"cost": ["high"], "penalty": [0.5]},
            {"cost": [1.0], 1: [2.0]},
        ],
        unit=[None, 3],
        title=NO_TITLE,
    ),
    "SharedOptim": test_of(
        lambda **bad: SharedOptim(**{"optim_constructor": torch.optim.Adam, "optim_args": {}, **bad}),
        optim_constructor=[None, "Adam", torch.optim.LBFGS],
        optim_args=[None, 0.1, "lr"],
        clip_args=[10.0, "norm"],
        scheduler=[0.9, torch.optim.lr_scheduler.ExponentialLR(torch.optim.SGD([torch.ones(1)]), 0.9)],
    ),
    "SharedOptim.set_state": test_of(lambda **bad: Adam({}).set_state(**bad), state_dict=[None, 3, {"a": 1}]),
    "SharedOptim.restart": test_of(lambda **bad: Adam({}).restart(**bad), state_dict=[None, 3, {"a": 1}]),
    **{
        kind.__name__: test_of(
            lambda kind=kind, **bad: kind(**{"optim_args": {}, **bad}),
            optim_args=[None, 0.1, "lr"],
            clip_args=[10.0],
            scheduler=[0.9],
        )
        for kind in (Adam, AdamW, SGD)
    },
    "MixturePrior": test_of(
        lambda **bad: MixturePrior(**{"components": 5, "d": 2, **bad}),
        components=NO_COUNT,
        d=NO_COUNT,
        full_covariance=NO_FLAG,
        standardized=NO_FLAG,
    ),
    "MixturePrior.initialise": test_of(
        lambda **bad: MixturePrior(5, 3).initialise(**bad),
        codes=[None, 3, ROWS[:4], ROWS[:, :2], ROWS / 0, [[1.0]], SPARSE, META, ROWS + 1j],
    ),
    "VampPrior": test_of(
        lambda **bad: VampPrior(**{"encoder": nn.Linear(3, 2), "pseudo_inputs": ROWS, **bad}),
        encoder=[None, "encoder", nn.Linear],
        pseudo_inputs=[None, [1.0], ROWS.long(), ROWS[0], ROWS[:0], ROWS.numpy(), SPARSE, META],
        scale=[None, 0.0, -1, float("inf"), "1", True],
        standardized=NO_FLAG,
    ),
    "NormalMixture": test_of(
        lambda **bad: NormalMixture(
            **{
                "mixture_distribution": dist.Categorical(torch.ones(2)),
                "component_distribution": dist.Normal(torch.zeros(2, 3), 1.0).to_event(1),
                **bad,
            }
        ),
        mixture_distribution=[None, torch.ones(2)],
        component_distribution=[None, dist.Laplace(torch.zeros(2, 3), 1.0).to_event(1), dist.Normal(0.0, 1.0)],
    ),
    "save_checkpoint": test_of(
        lambda path="run.pt", **bad: save_checkpoint(path, **{"net": nn.Linear(1, 1), **bad}),
        path=[None, 3, "", ".", Path("..")],
        extra=[3, "text", [1], {1: object()}],
        net=[None, 3, "text", [nn.Linear(1, 1)], nn.Linear],
    ),
    "load_checkpoint": test_of(
        lambda path="run.pt", **bad: load_checkpoint(path, **{"net": nn.Linear(1, 1), **bad}),
        path=[None, 3, "", ".", Path("..")],
        net=[None, 3, "text", [nn.Linear(1, 1)]],
    ),
}
ADVICE = ("Write ", "write ", "Leave out ", "Take ", "Give ", "Join ", "Keep ", "Draw")
CASES = [
    pytest.param(*case, id=f"{function}-{case[1]}-{number}")
    for function, cases in CALLS.items()
    for number, case in enumerate(cases)
]


@pytest.mark.parametrize(("call", "name", "value"), CASES)
def test_a_bad_argument_is_named_with_what_to_write(call, name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError)) as error:
        call(**{name: value})
    message = str(error.value)
    assert name in message
    assert any(word in message for word in ADVICE)
    assert not list(tmp_path.iterdir())


def test_every_public_name_is_swept():
    swept = {name.split(".")[0].split(" ")[0] for name in CALLS}
    results = {name for name in diagnostics.__all__ if name[0].isupper()}  # records that functions return
    public = {name for module in (checkpoint, diagnostics, optim, plotting, priors) for name in module.__all__}
    assert public - results == swept


@pytest.mark.parametrize(
    "call",
    [
        lambda np: two_sample_test(ROWS, ROWS, permutations=np.int64(99), level=torch.tensor(0.05), seed=np.int32(1)),
        lambda np: classifier_test(ROWS, ROWS, width=torch.tensor(8), steps=np.int8(2), level=np.float32(0.05)),
        lambda np: MixturePrior(np.int64(5), torch.tensor(2), standardized=np.bool_(True)),
        lambda np: VampPrior(nn.Linear(3, 2), ROWS, scale=np.float64(0.5)),
        lambda np: image_grid(IMAGES, columns=np.int64(2)),
        lambda np: codes_and_prior(ROWS.numpy(), ROWS.tolist(), np.array(["a", "b"] * 10), plane=[0, 2]),
        lambda np: loss_curves({"cost": (1, 2), "penalty": np.ones(2)}),
    ],
)
def test_numbers_of_numpy_and_tensors_are_numbers(call):
    call(pytest.importorskip("numpy"))
