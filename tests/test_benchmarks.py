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
    threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("benchmark_of_penalties", BENCHMARKS / "penalties.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    torch.set_num_threads(threads)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_sample_power", "kernel_penalty"])
def test_benchmark_prints_its_table_and_writes_it_with_its_command(name, tmp_path):
    report, markdown, printed = run_smoke(name, tmp_path)
    assert report
    assert f"    python benchmarks/{name}.py --smoke --out " in markdown
    assert markdown.strip() in printed
