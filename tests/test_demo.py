import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from pyro_wae.demo import __main__ as demo
from pyro_wae.demo import digits
from pyro_wae.demo.digits import load_digits
from pyro_wae.demo.judge import frechet_distance
from pyro_wae.demo.nets import DigitWAE


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder and the printed text of one quick run."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "pyro_wae.demo", "--smoke", "--out", str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return out, finished.stdout


@pytest.mark.parametrize("name", ["overview", "samples", "reconstructions", "codes", "losses"])
def test_demo_draws_every_picture(smoke, name):
    image = pytest.importorskip("matplotlib.image")
    out, _ = smoke
    pixels = image.imread(out / f"{name}.png")
    assert pixels.shape[1] == 900
    assert pixels.std() > 0
    # Text that is cut off is dark at an edge.
    assert pixels[:, [0, -1], :3].min() > 0.5


def test_demo_writes_what_it_reached(smoke):
    out, _ = smoke
    metrics = json.loads((out / "metrics.json").read_text())
    found = {"test_cost", "reconstructions_frechet", "samples_frechet", "samples_read"}
    found |= {"heldout_mmd2", "null_mmd2_std", "heldout_p_value", "seconds"}
    assert set(metrics) == found | {"history", "options"}
    assert all(np.isfinite(metrics[key]) for key in found)
    assert 0 < metrics["heldout_p_value"] <= 1
    assert 0 <= metrics["samples_read"] <= 1
    assert {key: len(values) for key, values in metrics["history"].items()} == {"cost": 1, "penalty": 1, "weight": 1}
    assert metrics["options"]["smoke"] is True


def test_demo_says_what_it_reached_and_where_it_is(smoke):
    out, printed = smoke
    for text in ("squared error", "MMD^2", "p = ", "Frechet distance of samples", "seconds", str(out)):
        assert text in printed


@pytest.mark.parametrize(
    ("argument", "found"),
    [
        ("--epochs=0", "argument --epochs: must be >= 1, found 0"),
        ("--batch-size=1", "argument --batch-size: must be >= 2, found 1"),
        ("--zdim=1", "argument --zdim: must be >= 2, found 1"),  # pictures show a plane
        ("--seed=-1", "argument --seed: must be >= 0, found -1"),
        ("--penalty-weight=-1", "argument --penalty-weight: must be >= 0, found -1.0"),
        ("--penalty-weight=nan", "argument --penalty-weight: must be a finite number, found nan"),
        ("--learning-rate=nan", "argument --learning-rate: must be a finite number, found nan"),
        ("--prior-rate=inf", "argument --prior-rate: must be a finite number, found inf"),
        ("--learning-rate=0", "--learning-rate and --prior-rate: must be > 0"),
        ("--device=gpu", "argument --device: 'gpu' cannot be used here"),
        ("--device=meta", "argument --device: 'meta' cannot be used here"),
    ],
)
def test_an_argument_out_of_range_is_named_before_the_training(argument, found, capsys):
    with pytest.raises(SystemExit):
        demo.main([argument])
    assert found in capsys.readouterr().err


def test_a_penalty_weight_of_0_is_one():
    assert demo.make_loss(demo.parse_args(["--penalty-weight=0"])).penalty_weight.weight == 0
    assert demo.make_loss(demo.parse_args([])).penalty_weight.weight == 100


def test_a_last_batch_of_one_digit_is_left_out():
    args = demo.parse_args(["--prior=normal", "--epochs=1", "--batch-size=4"])
    history = demo.train(DigitWAE(2), torch.rand(9, 1, 28, 28), args)
    assert np.isfinite(history["cost"]).all()


def test_missing_matplotlib_is_named_before_the_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "pyro-wae\[tutorials\]"'):
        demo.main(["--smoke"])


def test_bundled_digits_are_images_with_labels():
    train_images, train_labels, test_images, test_labels = load_digits()
    for images, labels, size in ((train_images, train_labels, 10_000), (test_images, test_labels, 2_000)):
        assert images.shape == (size, 1, 28, 28)
        assert images.dtype == torch.float32
        assert (images.min(), images.max()) == (0, 1)
        assert labels.shape == (size,)
        assert labels.dtype == torch.int64


def test_held_out_digits_are_of_the_training_set_and_not_trained_on():
    train_images, _, heldout_images, heldout_labels = load_digits(parts=("train", "heldout"))
    assert heldout_images.shape == (3000, 1, 28, 28)
    assert heldout_labels.shape == (3000,)
    trained = {image.numpy().tobytes() for image in train_images}
    assert len({image.numpy().tobytes() for image in heldout_images} - trained) == 3000


def test_unknown_parts_are_named():
    with pytest.raises(ValueError, match="one is 'validation'"):
        load_digits(parts=("train", "validation"))


def test_frechet_distance_is_that_of_the_normal_laws_with_the_moments_of_the_rows():
    linalg = pytest.importorskip("scipy.linalg")
    torch.manual_seed(0)
    a, b = (
        torch.randn(300, 5, dtype=torch.float64),
        torch.rand(200, 5).double() @ torch.randn(5, 5).double(),
    )
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (a, b)]
    overlap = np.trace(linalg.sqrtm(covariances[0] @ covariances[1]).real)
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + sum(map(np.trace, covariances)) - 2 * overlap
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_bundled_digits_have_the_class_shares_of_mnist():
    # The counts of the 60,000 and of the 10,000 digits, as MNIST is published.
    mnist_train = torch.tensor([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949])
    mnist_test = torch.tensor([980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009])
    _, train_labels, _, heldout_labels, _, test_labels = load_digits(parts=("train", "heldout", "test"))
    left = mnist_train - train_labels.bincount(minlength=10)
    for labels, counts in ((train_labels, mnist_train), (heldout_labels, left), (test_labels, mnist_test)):
        expected = counts * len(labels) / counts.sum()
        assert (labels.bincount(minlength=10) - expected).abs().max() < 1


def test_unknown_digits_are_named():
    with pytest.raises(ValueError, match='name must be "bundled" or "mnist", but is \'fashion\''):
        load_digits("fashion")


def test_what_is_held_out_of_mnist_is_of_both_its_halves(monkeypatch):
    """MNIST's training digits at even and at odd places are two populations."""
    places = torch.arange(60_000)
    fake = {"train_images": places[:, None, None].expand(-1, 1, 1), "train_labels": places}
    monkeypatch.setattr(digits, "_load_mnist", lambda root: dict(fake))
    _, train, _, heldout = load_digits("mnist", parts=("train", "heldout"))
    assert torch.equal(torch.cat([train, heldout]).sort().values, places)
    assert 5000 <= len(heldout) <= 6000
    assert abs((heldout % 2).double().mean() - 0.5) < 1e-3


def test_missing_mnist_says_what_to_do_without_a_network(tmp_path, monkeypatch):
    mnist = pytest.importorskip("torchvision.datasets").MNIST

    def no_network(self):
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(mnist, "download", no_network)
    with pytest.raises(RuntimeError, match="--data bundled") as caught:
        load_digits("mnist", root=tmp_path)
    assert "train-images-idx3-ubyte.gz" in str(caught.value)
    assert str(tmp_path / "MNIST" / "raw") in str(caught.value)


def test_missing_torchvision_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "pyro-wae\[tutorials\]"'):
        load_digits("mnist")
