"""How a batch is cut into micro-batches, and what cannot be."""

from __future__ import annotations

import pyro
import pytest
import torch
from programs import AutoEncoder, around, delta, normal
from pyro.infer.autoguide import AutoNormal
from references import program, rows
from torch import nn

from pyro_wae import WAELoss
from pyro_wae.kernels import Gaussian
from pyro_wae.penalties import KernelStein

N, D, X = 22, 2, 5
ROWS = 6  # 22 = 6 + 6 + 6 + 4: the last micro-batch is smaller


def widened(z):
    return around(z.sum(1, keepdim=True).expand(-1, X))


def test_an_autoguide_that_would_share_its_parameters_between_micro_batches_is_an_error():
    model, _ = program()
    with pytest.raises(ValueError, match=r"AutoNormal has parameters for each datum of the plate 'data'.*those of 11"):
        WAELoss(micro_batch=N // 2).loss_and_grads(model, AutoNormal(model), rows(N, X))


def test_something_made_late_is_an_error_and_no_wrong_gradient():
    net = AutoEncoder(X, D, code=around).double()
    loss = WAELoss(micro_batch=ROWS)
    loss.loss_and_grads(net.model, net.guide, rows(N, X))

    def model(x):
        pyro.param("late", lambda: torch.randn(3))
        net.model(x)

    with pytest.raises(ValueError, match="other random numbers"):
        loss.loss_and_grads(model, net.guide, rows(N, X))


def test_a_plate_that_draws_its_indices_is_an_error():
    programs = program(plate=lambda x: pyro.plate("data", 100, subsample_size=len(x)))
    with pytest.raises(ValueError, match=r"plate 'data' draws 6 of 100 by itself.*subsample=index\)"):
        WAELoss(micro_batch=ROWS).loss(*programs, rows(N, X))


def test_data_that_are_not_split_are_an_error():
    x = rows(N, X)
    model, guide = ((lambda first, given, run=run: run(given[0])) for run in program())
    with pytest.raises(ValueError, match=r"plate 'data' has 22 data in a micro-batch of 6.*first tensor argument"):
        WAELoss(micro_batch=ROWS).loss(model, guide, torch.zeros(N), [x])
    with pytest.raises(ValueError, match=r"of the arguments \(list\) none is a tensor.*svi.step\(x\)"):
        WAELoss(micro_batch=ROWS).loss(lambda given: None, lambda given: None, [x])


def test_micro_batches_of_different_structure_are_an_error():
    def code(x):
        return x[:, : D + int(len(x) < ROWS)]  # the last micro-batch

    programs = program(lambda x: delta(code(x)), lambda x: normal(x, code(x).shape[1]), widened)
    with pytest.raises(ValueError, match=r"different sites or sizes: \{'z': \(0, 2\)\} and \{'z': \(0, 3\)\}"):
        WAELoss(micro_batch=ROWS).loss(*programs, rows(N, X))


def test_arguments_of_another_length_are_passed_whole():
    seen, (run, guide) = [], program()

    def model(x, table, *, scale, y, name):
        seen.append((len(table), scale.ndim, len(y), name))
        run(x)

    x = rows(N, X)
    WAELoss(micro_batch=ROWS).loss(model, guide, x, torch.zeros(9, N), scale=torch.tensor(1.0), y=x[:, 0], name="a")
    assert seen == [(9, 0, 6, "a")] * 3 + [(9, 0, 4, "a")]


def test_a_batch_that_is_a_dict_is_split_by_its_tensors():
    x, sizes, net = rows(N, X), [], nn.Linear(X, D).double()
    run_model, run_guide = program(lambda x: delta(net(x)), lambda x: normal(x, D), widened)

    def model(batch):
        sizes.append((len(batch["x"]), len(batch["other"]["y"]), len(batch["table"]), batch["name"]))
        run_model(batch["x"])

    def guide(batch):
        run_guide(batch["x"])

    batch = {"name": "a", "x": x, "other": {"y": x[:, 0]}, "table": torch.zeros(9, N)}
    values = []
    for micro_batch in (None, ROWS):
        net.zero_grad()
        wae = WAELoss(KernelStein(Gaussian(1.0)), penalty_weight=2.0, micro_batch=micro_batch)(model, guide)
        loss = wae(batch)
        loss.backward()
        values.append([loss.detach(), net.weight.grad])
        if micro_batch is None:
            assert sizes == [(N, N, 9, "a")]
    assert set(sizes[1:]) == {(6, 6, 9, "a"), (4, 4, 9, "a")}
    torch.testing.assert_close(*values, rtol=1e-10, atol=1e-10)


def test_a_plate_of_a_fixed_size_says_which_data_it_met():
    with pytest.raises(ValueError, match="plate") as raised:
        WAELoss(micro_batch=ROWS).loss(*program(plate=lambda x: pyro.plate("data", N)), rows(N, X))
    assert any("data 0 to 5" in note and "pyro.plate('data', len(x))" in note for note in raised.value.__notes__)
