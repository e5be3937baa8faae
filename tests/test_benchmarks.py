import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MATCHED = [
    *("mmd-draws", "mmd-standardized", "mmd-gaussian", "energy"),
    *("sliced", "max-sliced", "sinkhorn", "cramer-wold", "stein"),
]


def run_smoke(name, out):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--smoke", "--out", str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return json.loads((out / f"{name}.json").read_text()), (out / f"{name}.md").read_text(), finished.stdout


def load(name):
    """A benchmark as a module, which finds its neighbours as in a run of its own."""
    threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location(f"benchmark_of_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(BENCHMARKS))
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))
    del sys.modules[spec.name]
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def penalties_run(tmp_path_factory):
    """The report, the Markdown and the printed text of a quick run."""
    pytest.importorskip("torchmetrics")
    return run_smoke("penalties", tmp_path_factory.mktemp("penalties"))


@pytest.fixture(scope="module")
def variance_run(tmp_path_factory):
    """The report, the Markdown and the printed text of a quick run."""
    return run_smoke("gradient_variance", tmp_path_factory.mktemp("gradient_variance"))


@pytest.fixture(scope="module")
def bench():
    """The benchmark of the penalties as a module."""
    pytest.importorskip("torchmetrics")
    yield from load("penalties")


def test_every_penalty_trains_and_has_a_row_of_finite_numbers(penalties_run):
    report, markdown, _ = penalties_run
    names = [result["penalty"] for result in report["results"]]
    assert names == list(report["penalties"])
    assert set(MATCHED) < set(names)
    for result in report["results"]:
        assert all(math.isfinite(value) for key, value in result.items() if key != "penalty"), result
        assert f"| {result['penalty']} | `{report['penalties'][result['penalty']]['line']}` |" in markdown


def test_table_is_printed_and_written_with_the_command_that_made_it(penalties_run):
    _, markdown, printed = penalties_run
    assert markdown in printed
    assert "    python benchmarks/penalties.py --smoke --out " in markdown


def test_weights_make_all_gradients_as_large_as_that_of_mmd(penalties_run):
    report, _, _ = penalties_run
    for name in MATCHED:
        settings = report["penalties"][name]
        # Rounding to one digit moves a number by a third at most: 1.5 becomes 1 or 2.
        assert 0.66 < settings["weight"] * settings["gradient"] / 100 < 1.51, name


def test_times_are_given_as_a_ratio_to_mmd(penalties_run):
    report, _, _ = penalties_run
    (mmd,) = (result for result in report["results"] if result["penalty"] == "mmd")
    assert mmd["ratio"] == 1
    for result in report["results"]:
        assert result["ratio"] == pytest.approx(result["seconds"] / mmd["seconds"])


def test_closed_form_has_no_noise_given_the_codes(variance_run):
    report, _, _ = variance_run
    exact = [row for row in report["results"] if row["closed_form"] == "True"]
    assert {(row["kernel"], row["d"]) for row in exact} == {
        (k, d) for k in ("Gaussian", "7-scale IMQ") for d in (8, 64)
    }
    assert all(row["given_codes"] == 0 for row in exact)


def test_noise_given_the_codes_falls_as_one_over_the_number_of_prior_draws(variance_run):
    # The gradient by a fixed code is a mean over the prior draws. Ten repeats (seed 0) give the variance of one
    # within about 15 percent, because its hundreds of numbers are not independent.
    report, _, _ = variance_run
    rows = {(row["kernel"], row["d"], row["closed_form"]): row["given_codes"] for row in report["results"]}
    for kernel, d, _ in {key for key in rows if key[2] == "True"}:
        one, four = (rows[kernel, d, f"False, prior_draws={count}"] for count in (1, 4))
        assert 2.5 < one / four < 6.5, (kernel, d)


def test_variance_table_is_printed_and_written(variance_run):
    report, markdown, printed = variance_run
    assert markdown in printed
    assert markdown.count("| Gaussian |") == markdown.count("| 7-scale IMQ |") == len(report["results"]) / 2


def test_finite_samples_are_printed_and_written(tmp_path):
    report, markdown, printed = run_smoke("finite_samples", tmp_path)
    assert markdown in printed
    assert "    python benchmarks/finite_samples.py --smoke --out " in markdown
    assert len(report["tables"]["transport"]) == 8


def test_frechet_distance_is_that_of_the_normal_laws_with_the_features_moments(bench):
    torch.manual_seed(0)
    args = bench.parse_args(["--smoke"])
    classifier = bench.DigitClassifier().requires_grad_(False)
    real, fake = torch.rand(300, 1, 28, 28), torch.rand(300, 1, 28, 28) ** 2
    judge = bench.Judge(classifier, real, args)
    features = [classifier(images).double().numpy() for images in (real, fake)]
    means, covariances = [x.mean(0) for x in features], [np.cov(x, rowvar=False) for x in features]
    # The trace of (A B)^(1/2) is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric.
    values, vectors = np.linalg.eigh(covariances[0])
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(min=0)).sum()
    expected = np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1]) - 2 * overlap
    assert judge.frechet_distance(fake) == pytest.approx(expected, rel=1e-3)


def test_p_value_is_uniform_on_the_prior_and_least_off_it(bench):
    # Null: 30 sets of 200 prior draws, seed 1. Their p-values are uniform on 0.01 ... 1, and their mean has a standard
    # deviation of 0.05 for the sets and 0.03 for the 99 that they are ranked among; the bounds are four of both.
    torch.manual_seed(1)
    args = bench.parse_args(["--smoke"])
    args.null = 99
    judge = bench.Judge(bench.DigitClassifier().requires_grad_(False), torch.rand(200, 1, 28, 28), args)
    codes = torch.randn(30, 200, args.zdim)
    assert np.mean([judge.p_value(judge.mmd2(z)) for z in codes]) == pytest.approx(0.505, abs=0.25)
    assert judge.p_value(judge.mmd2(codes[0] + 0.5)) == 0.01


@pytest.mark.parametrize("encoder", ["group", "batch"])
def test_trainings_start_alike_and_do_not_touch_each_other(bench, encoder):
    args = bench.parse_args(["--smoke", "--encoder", encoder])
    images = torch.rand(3, 20, 1, 28, 28)
    alone = bench.Training(bench.CHOICES["sliced"], 90.0, 0, args)
    for batch in images:
        alone.step(batch)
    beside, other = (bench.Training(bench.CHOICES[name], 90.0, 0, args) for name in ("sliced", "gan-shared"))
    for left, right in zip(beside.wae.parameters(), other.wae.parameters(), strict=True):
        assert torch.equal(left, right)
    for batch in images:
        other.step(batch)
        beside.step(batch)
    for left, right in zip(alone.wae.parameters(), beside.wae.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_training_that_fails_is_reported_and_ends_alone(bench):
    args = bench.parse_args(["--smoke"])
    training = bench.Training(bench.CHOICES["mmd"], 100.0, 0, args)
    training.step(torch.full((20, 1, 28, 28), math.nan))
    training.step(torch.rand(20, 1, 28, 28))
    assert training.failure is not None
    assert len(training.seconds) == 1


@pytest.mark.parametrize("name", ["mmd-log-variance", "mmd-unit-variance"])
def test_guards_train_with_an_encoder_that_draws(bench, name):
    args = bench.parse_args(["--smoke"])
    training = bench.Training(bench.CHOICES[name], 100.0, 0, args)
    training.step(torch.rand(20, 1, 28, 28))
    assert training.failure is None
    assert bench.gradient_norm(bench.CHOICES[name], args) > 0
    images = torch.rand(20, 1, 28, 28)
    assert not torch.equal(training.codes(images), training.codes(images))


def test_only_the_discriminator_has_its_own_settings(bench):
    args = bench.parse_args(["--smoke"])
    training = bench.Training(bench.CHOICES["gan-shared"], 20.0, 0, args)
    training.step(torch.rand(20, 1, 28, 28))
    betas = {parameter: s.optimizer.param_groups[0]["betas"] for parameter, s in training.optimizer.optim_objs.items()}
    discriminator = set(training.loss.penalty.discriminator.parameters())
    assert len(discriminator) == 10
    for parameter, found in betas.items():
        assert found == ((0.5, 0.99) if parameter in discriminator else (0.9, 0.999))
    assert discriminator < set(betas)


def test_unknown_penalty_in_weight_is_named(bench, capsys):
    with pytest.raises(SystemExit):
        bench.parse_args(["--weight", "mdm=3"])
    assert "found 'mdm'; write NAME=VALUE" in capsys.readouterr().err
    assert bench.parse_args(["--weight", "sinkhorn=3"]).weight == [("sinkhorn", 3.0)]


def test_table_tells_how_many_trainings_diverged(bench, penalties_run):
    report, _, _ = penalties_run
    results = [
        {key: result[key] for key in ("penalty", "seed", "seconds", "ratio")} | {"failure": "NaN"}
        if result["penalty"] == "gan"
        else result
        for result in report["results"]
    ]
    table = bench.summary({**report, "results": results})
    assert table.count("(1 of 1 diverged)") == table.count("| gan (1 of 1 diverged) |") == 1


@pytest.fixture(scope="module")
def ways():
    """The benchmark of kernel penalties as a module."""
    yield from load("kernel_penalty")


@pytest.fixture(scope="module")
def kernel_run(tmp_path_factory):
    """The report, the Markdown, the printed text and the folder of a quick run."""
    out = tmp_path_factory.mktemp("kernel_penalty")
    return *run_smoke("kernel_penalty", out), out


@pytest.fixture(scope="module")
def step_run(tmp_path_factory):
    """The report, the Markdown, the printed text and the folder of a quick run."""
    out = tmp_path_factory.mktemp("step")
    return *run_smoke("step", out), out


def test_kernel_penalties_are_measured_at_all_sizes_and_drawn(kernel_run):
    report, markdown, printed, out = kernel_run
    skipped = {row["way"] for row in report["skipped"]}
    assert skipped <= {"pythae", "geomloss, energy"}  # which may not be installed
    assert len(report["results"]) == 2 * (len(report["options"]["ways"]) - len(skipped))
    for row in report["results"]:
        assert row["units"] == pytest.approx(row["seconds"] / row["unit"])
        assert row["mebibytes"] >= 0
    assert {row["way"] for row in report["growth"]} == set(report["options"]["ways"]) - skipped
    assert markdown.strip() in printed
    assert "    python benchmarks/kernel_penalty.py --smoke --out " in markdown
    assert 0 < (out / "kernel_penalty.png").stat().st_size < 80_000


def test_steps_are_measured_beside_the_hand_written_one_and_drawn(step_run):
    report, markdown, printed, out = step_run
    rows = {row["contender"]: row for row in report["results"]}
    assert {"SVI, Trace_ELBO", "SVI, Trace_MMD", "SVI, WAELoss, shared Adam, recorded", "nn.Module"} < set(rows)
    assert ("pythae, WAE_MMD" in rows) != ("No row for pythae" in printed)
    assert rows["plain torch"]["ratio"] == 1
    for row in rows.values():
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
    assert markdown.strip() in printed
    assert "    python benchmarks/step.py --smoke --out " in markdown
    assert 0 < (out / "step.png").stat().st_size < 80_000


@pytest.mark.parametrize("name", ["kernel_penalty", "step"])
def test_a_machine_without_cuda_is_told_of(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import devices

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in load(name):
        assert devices.present(module.parse_args([]).devices) == ["cpu"]
        assert "No rows for CUDA" in capsys.readouterr().out
        assert devices.present(module.parse_args(["--devices", "cpu"]).devices) == ["cpu"]
        assert capsys.readouterr().out == ""


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
    tolerances = {"POT, sliced": 0.15, "POT, Sinkhorn": 0.03}
    found = {}
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
    import devices

    torch.manual_seed(0)
    q, p = torch.randn(100, 8) + 0.5, torch.randn(100, 8)
    for name, is_exact in (("MMD()", True), ("authors' formula", False)):
        loss = ways.WAYS[name].make(8)
        difference = ways.gradient(devices.in_bfloat16(loss), q, p)[0] / ways.gradient(loss, q, p)[0] - 1
        assert (difference.abs() < 1e-6) == is_exact, name


def test_the_fit_of_cost_finds_its_two_parts(ways):
    sizes = (512, 2048, 8192)
    rows = [{"n": n, "seconds": 3e-6 * n + 2e-9 * n**2} for n in sizes]
    assert ways.costs(rows) == pytest.approx((3e-6, 2e-9), rel=1e-6)
    # Steeper than a square, where a would be negative.
    per_code, per_pair = ways.costs([{"n": n, "seconds": 1e-12 * n**3} for n in sizes])
    assert per_code == 0 < per_pair
    assert ways.exponent([{"n": n, "seconds": 1e-6 * n**1.5} for n in sizes], "seconds", 0) == pytest.approx(1.5)
    assert ways.exponent([{"n": 512, "mebibytes": 0.0}, {"n": 2048, "mebibytes": 5.0}], "mebibytes", 1) is None


def test_what_would_take_too_much_is_skipped_and_named(ways, monkeypatch):
    def pretended(name, n, d, device, args, loss):
        return {"n": n, "seconds": 1.0 * n, "mebibytes": 100.0 * n}

    monkeypatch.setattr(ways, "measure", pretended)
    for options, limit in (["--gibibytes", "1"], "2 GiB"), (["--seconds", "10"], "16 s"):
        args = ways.parse_args(["--sizes", "1", "4", "8", "--dimensions", "2", *options])
        found = list(ways.measure_all("MMD()", "cpu", args))
        assert [row["n"] for row in found] == [1, 4]
        assert limit in ways.reason(found[-1])


def test_a_library_that_is_not_there_costs_one_row(ways, monkeypatch):
    monkeypatch.setitem(sys.modules, "pythae.models", None)
    (row,) = ways.measure_all("pythae", "cpu", ways.parse_args(["--smoke"]))
    assert "pythae" in row["skipped"]


def test_a_way_is_measured_in_a_process_of_its_own(ways):
    args = ways.parse_args(["--smoke"])
    rows = list(ways.in_a_process("MMD()", "cpu", args))
    assert [(row["n"], row["d"]) for row in rows] == [(100, 4), (300, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_sample_power", "large_batches"])
def test_benchmark_prints_its_table_and_writes_it_with_its_command(name, tmp_path):
    report, markdown, printed = run_smoke(name, tmp_path)
    assert report
    assert f"    python benchmarks/{name}.py --smoke --out " in markdown
    assert markdown.strip() in printed


@pytest.fixture
def goals():
    """The goals as a module."""
    yield from load("goals")


def test_goals_stand_beside_what_was_measured(goals, tmp_path, capsys):
    def step(contender, ratio, device="cpu"):
        return {"contender": contender, "nets": "MLP", "batch": 100, "device": device, "ratio": ratio}

    steps = [
        step("plain torch", 1.0), step("SVI, Trace_ELBO", 1.25), step("SVI, WAELoss", 1.5), step("nn.Module", 1.2),
        step("nn.Module", 9.0, "cuda"),
    ]  # fmt: skip
    kernel = {"way": "MMD()", "n": 2048, "d": 64, "device": "cpu", "units": 15.0, "fresh units": 4.0, "mebibytes": 9}
    (tmp_path / "step.json").write_text(json.dumps({"results": steps}))
    (tmp_path / "kernel_penalty.json").write_text(json.dumps({"results": [kernel]}))
    goals.main(["--results", str(tmp_path)])
    rows = (tmp_path / "speed_goals.md").read_text().splitlines()[2:]
    assert rows == [
        "| SVI, WAELoss, over SVI, Trace_ELBO | MLP, batch 100 | 1 | 1.20 | no |",
        "| nn.Module, over plain torch | MLP, batch 100 | 1.2 | 1.20 | yes |",
        "| MMD(), units in place | n = 2048, d = 64 | 15 | 15.00 | yes |",
        "| MMD(), units | n = 2048, d = 64 | 15 | 4.00 | yes |",
    ]
    assert rows[0] in capsys.readouterr().out
