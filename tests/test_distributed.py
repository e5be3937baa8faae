"""Steps of several processes against one process with all data; the processes are started once for all tests."""

import subprocess
import sys
from pathlib import Path

import distributed_steps as steps
import pyro
import pytest
import torch
from programs import AutoEncoder, around
from pyro.infer import SVI
from test_docs import code

from pyro_wae import WAELoss
from pyro_wae.distributed import average_gradients
from pyro_wae.optim import Adam
from pyro_wae.penalties import MMD

SCRIPT = Path(steps.__file__)
PAGE = SCRIPT.parents[1] / "docs" / "distributed.md"
SIZES = {"2": [9, 5], "4": [5, 1, 4, 4]}
EVERYTHING = slice(0, steps.N)

# A prior that differs between ranks is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:The prior of latent site")


@pytest.fixture(scope="module", params=["2", pytest.param("4", marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    """What each rank has seen."""
    directory, sizes = tmp_path_factory.mktemp("ranks"), SIZES[request.param]
    command = [sys.executable, SCRIPT, directory, ",".join(map(str, sizes))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    found = {name: torch.load(directory / f"{name}0.pt") for name in ("ended", "away")}
    return [{**torch.load(directory / f"steps{rank}.pt"), **found} for rank in range(len(sizes))]


def sizes_of(ranks):
    return SIZES[str(len(ranks))]


def assert_same(found, expected, exact):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            torch.as_tensor(found[name]),
            torch.as_tensor(value),
            rtol=exact,
            atol=exact,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


# One process with all data


@pytest.mark.filterwarnings("ignore:The prior of latent site 'z' differs between data")
@pytest.mark.parametrize("name", steps.CASES)
def test_the_gradient_averaged_by_ddp_is_that_of_one_process_with_all_data(name, ranks):
    case, found = steps.CASES[name], [rank["cases"][name] for rank in ranks]
    steps.seed(name)
    whole = steps.train(case, EVERYTHING, directions=found[0]["directions"] or None)
    for seen in found:
        for part in ("gradients", "terms", "state"):
            assert_same(seen[part], whole[part], case.exact)
        torch.testing.assert_close(seen["loss"], whole["loss"], rtol=case.exact, atol=case.exact)
    assert any(gradient.abs().max() > 1e-3 for gradient in whole["gradients"].values())


@pytest.mark.parametrize("name", steps.CASES)
def test_all_ranks_have_the_same_numbers_to_the_last_bit(name, ranks):
    first, *others = (rank["cases"][name] for rank in ranks)
    for other in others:
        for part in ("gradients", "terms", "state"):
            assert_same(other[part], first[part], 0.0)
        assert len(other["directions"]) == len(first["directions"])
        assert all(map(torch.equal, other["directions"], first["directions"]))


def test_random_directions_are_new_in_each_step(ranks):
    first, second = ranks[0]["cases"]["sliced"]["directions"]
    assert first.shape == second.shape
    assert not torch.equal(first, second)


def test_micro_batches_of_each_rank_are_one_batch_of_all(ranks):
    steps.seed("MMD")
    whole = steps.train(steps.IN_PARTS, EVERYTHING, batch=torch.arange(steps.N))
    for rank in ranks:
        assert_same(rank["micro-batches"]["gradients"], whole["gradients"], 1e-10)
        assert_same(rank["micro-batches"]["terms"], whole["terms"], 1e-10)


def test_a_process_group_serves_as_well_as_its_name(ranks):
    for rank in ranks:
        assert_same(rank["a group"]["gradients"], rank["cases"]["MMD"]["gradients"], 0.0)


def test_without_a_group_each_rank_compares_its_own_codes(ranks):
    for number, (rank, rows) in enumerate(zip(ranks, steps.ranks_of(sizes_of(ranks)), strict=True)):
        if rows.stop - rows.start < 2:
            continue
        steps.seed("MMD", number)
        alone = steps.train(steps.CASES["MMD"], rows)
        assert_same(rank["per rank"]["gradients"], alone["gradients"], 1e-12)
        assert_same(rank["per rank"]["terms"], alone["terms"], 1e-12)


# Without DDP


@pytest.mark.parametrize(
    ("name", "loss"), [("svi", steps.constrained), ("svi with an adversary", steps.adversarial)], ids=["MMD", "WAE-GAN"]
)
def test_svi_trains_all_ranks_as_one_process_that_starts_from_the_first(name, loss, ranks):
    first, *others = found = [rank[name] for rank in ranks]
    steps.seed("MMD")
    whole = steps.train_by_svi(EVERYTHING, loss(), start=first["before"], runs_before=1)
    for seen in found:
        assert seen["losses"] == pytest.approx(whole["losses"], rel=1e-8)
        assert_same(seen["state"], whole["state"], 1e-8)
        assert_same(seen["terms"], whole["terms"], 1e-8)
        assert_same(seen["state"], first["state"], 0.0)
    assert not torch.equal(others[0]["before"]["decoder.weight"], first["before"]["decoder.weight"])


def test_gradients_averaged_by_hand_train_as_one_process(ranks):
    whole = steps.train_by_hand(EVERYTHING, steps.constrained(), lambda parameters: None)
    for rank in ranks:
        assert_same(rank["by hand"], whole, 1e-8)


def test_average_of_gradients_that_all_some_or_no_ranks_have(ranks):
    count = len(ranks)
    for rank in ranks:
        everywhere, somewhere, nowhere = rank["averaged"]
        torch.testing.assert_close(everywhere, torch.full((2, 3), (count + 1) / 2))
        torch.testing.assert_close(somewhere, torch.full((2, 3), 12.0 / count))
        assert nowhere is None


# What goes wrong


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("one seed", "ValueError", "Ranks 0 and 1 have the same random state"),
        ("options", "ValueError", "1 prior samples of each datum, without gradients. Rank "),
        ("reduction", "ValueError", "an option of WAELoss differs, such as reduction"),
        ("weight's function", "ValueError", "a function computes that was given as penalty_weight"),
        ("penalty's function", "ValueError", "a function computes that was given as penalty_weight, penalty or cost"),
        ("sizes", "ValueError", "size that differs between ranks: 100, 101"),
        ("density", "ValueError", "known only for the data of this rank"),
        ("nets", "ValueError", "(7) are not those of rank 0 (6)"),
        ("parameters of data", "ValueError", "and all ranks would share those of "),
        ("NaN", "ValueError", "The cost of observed site 'x' is NaN"),
        ("no error", "none", ""),
    ],
)
def test_a_step_that_fails_for_all_says_so_on_every_rank_at_once(what, kind, says, ranks):
    for rank in ranks:
        found = rank["errors"][what]
        assert found["kind"] == kind
        assert says in found["text"]
        assert found["seconds"] < 20  # where the time-out is 60


@pytest.mark.parametrize("what", ["model", "first step"])
def test_a_rank_that_fails_tells_the_others_before_the_time_out(what, ranks):
    *others, failed = (rank["errors"][what] for rank in ranks)
    assert failed["kind"] == "KeyError"
    for other in others:
        assert other["kind"] == "RuntimeError"
        assert f"failed on rank {len(others)}" in other["text"]
        assert other["seconds"] < 20


def test_a_rank_that_ends_ends_the_others(ranks):
    assert ranks[0]["ended"]["first"]["kind"] == "none"
    second = ranks[0]["ended"]["second"]
    assert second["kind"] == "RuntimeError"
    assert "rank 0 waited for the other ranks" in second["text"]
    assert second["seconds"] < 30  # where the time-out is 60


def test_a_rank_that_stays_away_ends_the_others_after_the_time_out(ranks):
    assert ranks[0]["away"]["first"]["kind"] == "none"
    second = ranks[0]["away"]["second"]
    assert second["kind"] == "RuntimeError"
    assert "rank 0 waited for the other ranks" in second["text"]
    assert steps.TIMEOUT - 0.5 < second["seconds"] < steps.TIMEOUT + 30


# In one process


def test_the_argument_is_checked():
    with pytest.raises(TypeError, match=r"process_group must be 'world', a process group .* found True"):
        WAELoss(process_group=True)
    with pytest.raises(TypeError, match="process_group must be 'world'"):
        average_gradients([], process_group=None)
    assert "process_group='world'" in repr(WAELoss(process_group="world"))


def test_without_init_process_group_a_step_says_what_to_call():
    net = steps.Net()
    loss = WAELoss(MMD(), process_group="world")
    with pytest.raises(ValueError, match="init_process_group"):
        loss.loss(net.model, net.guide, steps.Rows(EVERYTHING))
    with pytest.raises(ValueError, match="init_process_group"):
        average_gradients([])


def test_ddp_takes_the_default_discriminator_after_a_first_run(one_rank):
    net = steps.Net()
    module = WAELoss(steps.JensenShannon(), process_group="world")(net.model, net.guide)
    with torch.no_grad():
        module(steps.Rows(EVERYTHING))
    before = module.elbo.penalty.discriminator[0].weight.clone()
    torch.nn.parallel.DistributedDataParallel(module)(steps.Rows(EVERYTHING)).backward()
    assert not torch.equal(before, module.elbo.penalty.discriminator[0].weight)
    assert net.encoder[0].weight.grad.abs().max() > 0


def test_one_rank_is_as_good_as_none(one_rank):
    results = []
    for group in ({}, {"process_group": "world"}):
        steps.seed("particles")
        results.append(steps.train(steps.CASES["particles"], EVERYTHING, **group))
    assert_same(results[1]["gradients"], results[0]["gradients"], 1e-12)
    assert_same(results[1]["terms"], results[0]["terms"], 1e-12)


def test_a_penalty_does_not_move_the_random_numbers_of_a_rank(one_rank):
    net, states = steps.Net(), []
    for count in (1, 50):
        pyro.set_rng_seed(0)
        loss = WAELoss(steps.SlicedWasserstein(count), process_group="world", penalty_weight=1.0)
        loss.loss(net.model, net.guide, steps.Rows(EVERYTHING))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_all_ways_to_the_loss_draw_the_same_random_numbers(one_rank):
    net = AutoEncoder(steps.X, 2, code=around)
    values = []
    for way in ("loss", "differentiable_loss", "loss_and_grads"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = WAELoss(penalty_weight=1.0, process_group="world")
        values.append(torch.as_tensor(getattr(loss, way)(net.model, net.guide, steps.DATA.float())).item())
    assert len(set(values)) == 1


def test_svi_makes_and_trains_the_default_discriminator(one_rank):
    net, loss = steps.Net(), WAELoss(steps.JensenShannon(), process_group="world")
    svi = SVI(net.model, net.guide, Adam({"lr": 0.01}), loss=loss)
    svi.step(steps.Rows(EVERYTHING))
    before = loss.penalty.discriminator[0].weight.clone()
    svi.step(steps.Rows(EVERYTHING))
    assert not torch.equal(before, loss.penalty.discriminator[0].weight)


def test_a_function_that_is_made_by_the_codes_it_sees(one_rank):
    class Made(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.LazyLinear(1, dtype=torch.float64)

        def forward(self, codes, prior):
            return (self.layer(codes).mean() - self.layer(prior).mean()).square()

    net, loss = steps.Net(), WAELoss(Made(), process_group="world", penalty_weight=1.0)
    values = [loss.loss(net.model, net.guide, steps.Rows(EVERYTHING)) for _ in range(2)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.slow
def test_the_training_of_the_page_runs_in_two_processes(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(code(PAGE))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("Terms(cost=")
