import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _benchmarks():
    """Benchmarks can be imported by their names, and leave torch's threads as they found them."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def ways():
    """The benchmark of kernel penalties."""
    return importlib.import_module("kernel_penalty")


# What each benchmark writes, and its numbers


def noise_of_closed_forms(report, printed):
    """Closed form has no noise given the codes, and more draws have less.

    The gradient by a fixed code is a mean over the prior draws. Ten repeats (seed 0) give the variance of one
    within about 15 percent, because its hundreds of numbers are not independent.
    """
    rows = {(r["kernel"], r["d"], r["closed_form"]): r["given_codes"] for r in report["results"]}
    exact = [key[:2] for key in rows if key[2] == "True"]
    assert set(exact) == {(k, d) for k in ("Gaussian", "7-scale IMQ") for d in (8, 64)}
    for kernel, d in exact:
        assert rows[kernel, d, "True"] == 0
        one, four = (rows[kernel, d, f"False, prior_draws={count}"] for count in (1, 4))
        assert 2.5 < one / four < 6.5, (kernel, d)


def kernel_penalties_at_all_sizes(report, printed):
    skipped = {row["way"] for row in report["skipped"]}
    assert skipped <= {"pythae", "geomloss, energy"}  # which may not be installed
    assert len(report["results"]) == 2 * (len(report["options"]["ways"]) - len(skipped))
    for row in report["results"]:
        assert row["units"] == pytest.approx(row["seconds"] / row["unit"])
        assert row["mebibytes"] >= 0


def memory_of_a_micro_batch_and_gradient_of_all_data(report, printed):
    whole, split = report["results"]
    # 16 micro-batches; pieces that do not scale with the data, and the memory that a process does not give back, add.
    assert split["peak"] < whole["peak"] / 3
    assert split["difference"] < 1e-10
    # Noise falls as one over the root of the number of codes: by 2 from 64 to 256. Twenty repeats (seeds 64 and 256) of
    # 8 numbers give each within about 8 percent.
    noise = {row["n"]: row["noise"] for row in report["noise"]}
    assert 1.5 < noise[64] / noise[256] < 2.7


def cells_whose_batch_is_known(report, printed):
    """After one epoch; principal components, which no epoch changes, show batch and type."""
    rows = {row["contender"]: row for row in report["results"]}
    nets = {'WAE, `condition="batch"`', "WAE, no condition", "scVI"}
    assert set(rows) == nets | {"principal components"}
    costs = [rows[name]["cost"] for name in nets]
    assert 0 < max(costs) < 2 * min(costs)  # all of them likelihoods of the same counts
    assert rows["principal components"]["batch"] > 0.9
    assert rows["principal components"]["type"] > 0.8
    assert all(0.4 < rows[name]["batch"] <= 1 for name in nets)


def steps_beside_the_hand_written_one(report, printed):
    rows = {row["contender"]: row for row in report["results"]}
    assert {"SVI, Trace_ELBO", "SVI, Trace_MMD", "SVI, WAELoss", "nn.Module", "nn.Module, WAE-GAN"} < set(rows)
    assert ("pythae, WAE_MMD" in rows) != ("No row for pythae" in printed)
    assert rows["plain torch"]["ratio"] == 1
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in rows.values())
    assert 0 < report["import_seconds"] < 60


BENCHMARK_CHECKS = {
    "finite_samples": None,
    "gradient_variance": noise_of_closed_forms,
    "kernel_penalty": kernel_penalties_at_all_sizes,
    "large_batches": memory_of_a_micro_batch_and_gradient_of_all_data,
    "peers": None,
    "scale": None,
    "single_cell": cells_whose_batch_is_known,
    "step": steps_beside_the_hand_written_one,
    "two_sample_power": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARK_CHECKS)
def test_benchmark_prints_its_page_and_writes_it_with_its_command_and_numbers(name, tmp_path):
    if name == "single_cell" and not all(map(importlib.util.find_spec, ("scanpy", "scvi"))):
        pytest.skip("needs scanpy and scvi-tools: make test-scvi")
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--smoke", "--out", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    report, page = json.loads((tmp_path / f"{name}.json").read_text()), (tmp_path / f"{name}.md").read_text()
    assert report["command"] == f"python benchmarks/{name}.py --smoke --out {tmp_path}"
    assert f"    {report['command']}\n\non {report['machine']}, torch {report['torch']}." in page
    assert page.strip() in finished.stdout
    assert ("picture" in report["options"]) == (tmp_path / f"{name}.png").exists()
    assert all(path.stat().st_size < 80_000 for path in tmp_path.glob("*.png"))
    if BENCHMARK_CHECKS[name] is not None:
        BENCHMARK_CHECKS[name](report, finished.stdout)


# The harness


def test_numbers_stand_to_the_right_in_a_table():
    harness = importlib.import_module("harness")
    table = harness.table(["way", "n", "mean", "line"], [["a 1", 5, "1.2 ± 0.3", "f()"], ["b", 6, "-", "3"]])
    assert table.splitlines()[1] == "| --- | ---: | ---: | --- |"
    assert table.splitlines()[3] == "| b | 6 | - | 3 |"


def test_ratios_are_to_the_base_of_the_same_round():
    # The machine is ten times as slow in the second round, which no ratio shows.
    ratios = importlib.import_module("harness").ratios({"base": [1.0, 10.0, 1.0], "other": [2.0, 20.0, 3.0]}, "base")
    assert ratios == {"base": (1, 1, 1), "other": (2, 2, 2.5)}


def test_calls_take_turns_until_it_is_enough():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    ticks = iter(range(100))
    times = importlib.import_module("harness").in_turns(runs, "cpu", lambda: next(ticks), lambda n, spent: spent >= 5)
    assert order == list("ababab")
    assert times == {"a": [1, 1, 1], "b": [1, 1, 1]}


@pytest.mark.parametrize("name", ["kernel_penalty", "large_batches", "step"])
def test_a_machine_without_cuda_is_told_of(name, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module = importlib.import_module(name)
    assert module.BENCH.start(["--threads", "1"]).devices == ["cpu"]
    assert "No rows for CUDA" in capsys.readouterr().out
    assert module.BENCH.start(["--threads", "1", "--devices", "cpu"]).devices == ["cpu"]
    assert capsys.readouterr().out == ""


def test_rows_that_became_slower_are_named(tmp_path, capsys):
    def write(folder, ratios, whole):
        rows = [{"contender": name, "nets": "MLP", "batch": 100, "device": "cpu", "ratio": r} for name, r in ratios]
        parts = [{"micro_batch": rows, "device": "cpu", "seconds": s} for rows, s in ((None, whole), (64, 3.0))]
        folder.mkdir()
        (folder / "step.json").write_text(json.dumps({"results": rows}))
        (folder / "large_batches.json").write_text(json.dumps({"results": parts}))

    # 1.05 of before is let pass; the step in parts takes as long as before, but 1.5 as long over the whole batch.
    write(tmp_path / "old", [("a", 1.0), ("b", 2.0), ("c", 1.0), ("gone", 1.0)], 1.5)
    write(tmp_path / "new", [("a", 1.05), ("b", 2.2), ("c", 0.5), ("added", 9.0)], 1.0)
    importlib.import_module("compare").main([str(tmp_path / "old"), "--newest", str(tmp_path / "new")])
    printed = capsys.readouterr().out
    assert "2 of 5 rows became slower by more than 5%." in printed
    assert "| step | b, MLP, 100, cpu | 2 | 2.2 | 1.10 |" in printed
    assert "| large_batches | 64, cpu | 2 | 3 | 1.50 |" in printed
    assert "step, gone: gone, MLP, 100, cpu" in printed
    assert "step, new: added, MLP, 100, cpu" in printed
    assert "Not compared: kernel_penalty" in printed


def test_the_model_of_scale_finds_the_constants_that_made_its_runs_and_counts_bytes():
    scale = importlib.import_module("scale")
    runs = [{"codes": n, "seconds": 2e-3 + 5e-5 * n + 1e-8 * n**2} for n in (128, 512, 1024, 2048)]
    assert scale.constants(runs) == pytest.approx((2e-3, 5e-5, 1e-8), rel=1e-6)
    # Of each of 3 other ranks 100 data: two rows of 8 numbers and a cost, of 4 bytes each.
    assert scale.bytes_received(4, 100, 8) == 3 * 100 * (8 + 8 + 1) * 4


def test_goals_stand_beside_what_was_measured(tmp_path, capsys):
    def step(contender, ratio, device="cpu"):
        return {"contender": contender, "nets": "MLP", "batch": 100, "device": device, "ratio": ratio}

    steps = [
        step("plain torch", 1.0), step("SVI, Trace_ELBO", 1.25), step("SVI, WAELoss", 1.5), step("nn.Module", 1.2),
        step("nn.Module", 9.0, "cuda"), step("SVI, WAELoss, shared Adam", 1.1),
        step("SVI, WAELoss, shared Adam, Constraint", 1.15),
    ]  # fmt: skip
    place = {"n": 2048, "d": 64, "device": "cpu", "units": 15.0, "fresh units": 4.0, "mebibytes": 9}
    seconds = {"MMD()": 1.0, "EnergyDistance()": 3.0, "geomloss, energy": 2.0}
    kernels = [{"way": way, "seconds": value, **place} for way, value in seconds.items()]
    (tmp_path / "step.json").write_text(json.dumps({"results": steps, "import_seconds": 0.04}))
    (tmp_path / "kernel_penalty.json").write_text(json.dumps({"results": kernels}))
    importlib.import_module("goals").main(["--results", str(tmp_path)])
    shared = "SVI, WAELoss, shared Adam"
    rows = (tmp_path / "speed_goals.md").read_text().splitlines()[2:]
    assert rows == [
        "| SVI, WAELoss, over SVI, Trace_ELBO | MLP, batch 100 | 1 | 1.20 | no |",
        "| nn.Module, over plain torch | MLP, batch 100 | 1.2 | 1.20 | yes |",
        f"| {shared}, Constraint: more than {shared}, in steps of plain torch | MLP, batch 100 | 0.02 | 0.05 | no |",
        "| import pyro_wae, ms | after torch and Pyro | 50 | 40.00 | yes |",
        "| EnergyDistance(), over geomloss | n = 2048, d = 64 | 1 | 1.50 | no |",
        "| MMD(), units in place | n = 2048, d = 64 | 15 | 15.00 | yes |",
        "| MMD(), units | n = 2048, d = 64 | 15 | 4.00 | yes |",
    ]
    assert rows[0] in capsys.readouterr().out


# The ways of the kernel penalties


SAME = [
    *("MMD()", "authors' formula", "one matrix of both", "direct differences", "pythae"),
    *("MMD(Gaussian())", "geomloss, Gaussian", "EnergyDistance()", "geomloss, energy"),
    *("SlicedWasserstein()", "POT, sliced", "Sinkhorn(), by geomloss", "POT, Sinkhorn"),
]
"""Ways to be compared, those of one quantity after each other."""


def test_ways_of_one_name_compute_the_same_quantity(ways):
    # Half a unit off the prior, so that no value is small. The sliced distance is over 50 random directions, for which
    # POT has a generator of its own that no seed of torch reaches: the mean of 20 draws has a standard error of about
    # 3 percent in each way, and five of them may pass. Sinkhorn is iterated to some percent.
    tolerances, found = {"POT, sliced": 0.15, "POT, Sinkhorn": 0.03}, {}
    for name in SAME:
        torch.manual_seed(0)
        q, p = torch.randn(300, 8) + 0.5, torch.randn(300, 8)
        try:
            loss = ways.WAYS[name].make(8)
        except ImportError:
            continue
        repeats = 20 if "liced" in name else 1
        value, slope = map(sum, zip(*(ways.gradient(loss, q, p) for _ in range(repeats)), strict=True))
        expected = found.setdefault(ways.WAYS[name].quantity, (value, slope))
        tolerance = tolerances.get(name, 1e-4)
        torch.testing.assert_close(value, expected[0], rtol=tolerance, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert (slope - expected[1]).norm() <= 3 * tolerance * expected[1].norm(), name


def test_autocast_leaves_the_digits_of_mmd_alone_and_takes_those_of_the_formula(ways):
    harness = importlib.import_module("harness")
    torch.manual_seed(0)
    q, p = torch.randn(100, 8) + 0.5, torch.randn(100, 8)
    for name, is_exact in (("MMD()", True), ("authors' formula", False)):
        loss = ways.WAYS[name].make(8)
        difference = ways.gradient(harness.in_bfloat16(loss), q, p)[0] / ways.gradient(loss, q, p)[0] - 1
        assert (difference.abs() < 1e-6) == is_exact, name


def test_what_would_take_too_much_or_is_not_there_is_skipped_and_named(ways, monkeypatch):
    def pretended(name, n, d, device, args, loss):
        return {"n": n, "seconds": 1.0 * n, "mebibytes": 100.0 * n}

    monkeypatch.setattr(ways, "measure", pretended)
    for options, limit in (["--gibibytes", "1"], "2 GiB"), (["--seconds", "10"], "16 s"):
        args = ways.BENCH.parse(["--sizes", "1", "4", "8", "--dimensions", "2", *options])
        found = list(ways.measure_all("MMD()", "cpu", args))
        assert [row["n"] for row in found] == [1, 4]
        assert limit in ways.reason(found[-1])
    monkeypatch.setitem(sys.modules, "pythae.models", None)
    (row,) = ways.measure_all("pythae", "cpu", ways.BENCH.parse(["--smoke"]))
    assert "pythae" in row["skipped"]


@pytest.mark.slow
def test_a_way_is_measured_in_a_process_of_its_own(ways):
    (rows,) = ways.in_processes(1, ways.measure_all, ("MMD()", "cpu", ways.BENCH.parse(["--smoke"])))
    assert [(row["n"], row["d"]) for row in rows] == [(100, 4), (300, 4)]
