"""The figure of a report: the plane of largest discrepancy, and images where there are such."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import delta, normal
from references import program
from reported import FAST, data, pair

from pyro_wae.diagnostics import report


def imaging(shape, scale=1.0, mask=True):
    def output(z):
        pixels = torch.sigmoid(z.mean(-1)).reshape(-1, *[1] * len(shape)) * scale * z.new_ones(shape)
        return dist.Normal(pixels, 1, validate_args=False).mask(mask).to_event(len(shape))

    # Data may be truth values, in which no code is drawn.
    return program(lambda x: delta((1.0 * x.flatten(1)[:, :3]).nan_to_num()), lambda x: normal(1.0 * x, 3), output)


@pytest.mark.parametrize(
    ("event", "shape"),
    [((8, 9), None), ((1, 8, 8), None), ((3, 8, 8), None), ((72,), (8, 9)), ((192,), (3, 8, 8))],
    ids=str,
)
def test_images_are_shown(event, shape):
    pytest.importorskip("matplotlib")
    x = torch.rand(60, *event)
    found = report(*imaging(event), x, shape=shape, **FAST)
    size = shape or event
    pictures = found.pictures["x"]
    torch.testing.assert_close(pictures.inputs, x[:10].reshape(10, *size))
    expected = torch.sigmoid(x.flatten(1)[:10, :3].mean(1))
    torch.testing.assert_close(pictures.outputs.flatten(1).mean(1), expected)
    # A way goes evenly from the code of datum 0 to that of datum 1.
    ends = x.flatten(1)[:2, :3].mean(1)
    ways = torch.sigmoid(torch.linspace(0, 1, pictures.steps) * (ends[1] - ends[0]) + ends[0])
    torch.testing.assert_close(pictures.paths.flatten(1).mean(1)[: pictures.steps], ways)
    assert pictures.samples.flatten(1).mean(1).unique().numel() == len(pictures.samples)
    assert len(found.plot().axes) == 2 + 1 + 3


def test_images_of_any_scale_are_shown_on_theirs():
    x = 255 * torch.rand(40, 8, 8)
    x[0, 0, 0], x[0, 0, 1] = 0, 255
    pictures = report(*imaging((8, 8), 255.0), x / 1, **FAST).pictures["x"]
    torch.testing.assert_close(pictures.inputs, x[:10] / 255)


def test_images_of_truth_values_are_shown_as_0_and_1():
    x = torch.rand(40, 8, 8) < 0.5
    pictures = report(*imaging((8, 8)), x, **FAST).pictures["x"]
    assert torch.equal(pictures.inputs, x[:10].to(pictures.inputs))
    assert torch.isfinite(pictures.outputs).all()


def test_constant_images_are_numbers_from_0_to_1():
    pictures = report(*imaging((8, 8)), torch.full((40, 8, 8), 5.0), **FAST).pictures["x"]
    for images in (pictures.samples, pictures.inputs, pictures.outputs, pictures.paths):
        assert ((images >= 0) & (images <= 1)).all()


def test_a_path_has_the_condition_of_its_start():
    def model(x, y):
        with pyro.plate("data", len(x), subsample_size=20) as index:
            z = pyro.sample("z", normal(x, 3))
            images = y[index].reshape(-1, 1, 1) + 0 * z.sum(-1).reshape(-1, 1, 1).expand(-1, 8, 8)
            pyro.sample("x", dist.Normal(images, 1).to_event(2), obs=x[index])

    def guide(x, y):
        with pyro.plate("data", len(x), subsample_size=20) as index:
            pyro.sample("z", delta(x[index].flatten(1)[:, :3]))

    y = torch.arange(40.0) / 40
    x = y.reshape(-1, 1, 1) + torch.zeros(40, 8, 8)
    pictures = report(model, guide, x, y, **FAST).pictures["x"]
    grey = pictures.paths.mean((1, 2)).reshape(-1, pictures.steps)
    starts = pictures.inputs[[0, 2, 4]].mean((1, 2))
    torch.testing.assert_close(grey, starts[:, None].expand_as(grey))


def test_missing_pixels_leave_the_others_their_scale():
    x = 200 * torch.rand(40, 8, 8) + 20
    low, high = x.amin(), x.amax()
    expected = (x[:10] - low) / (high - low)
    x[3, 2, 5], expected[3, 2, 5] = torch.nan, 0
    known = ~x.isnan()
    pictures = report(*imaging((8, 8), 255.0, known), x, **FAST).pictures["x"]
    torch.testing.assert_close(pictures.inputs, expected)
    for images in (pictures.samples, pictures.outputs, pictures.paths):
        assert images.isfinite().all()
    assert report(*imaging((8, 8), mask=torch.zeros_like(known)), torch.full_like(x, torch.nan), **FAST).pictures == {}


@pytest.mark.parametrize("event", [(64,), (30, 8), (7, 7)], ids=str)
def test_what_is_no_image_is_not_shown(event):
    assert report(*imaging(event), torch.rand(40, *event), **FAST).pictures == {}


def test_the_plane_begins_with_the_worst_direction():
    pytest.importorskip("matplotlib")
    found = report(*pair(lambda x: x + torch.tensor([0.0, 3.0, 0.0])), data(500), **FAST)
    figure = found.plot()
    codes, prior, lines = figure.axes
    assert codes.get_xlabel() == "largest discrepancy"
    shown, drawn = (
        torch.cat([torch.as_tensor(dots.get_offsets().data) for dots in axes.collections]) for axes in (codes, prior)
    )
    assert len(shown) == len(drawn) == 500
    # A shift by 3, in deviations of the 500 prior draws that are the yardstick.
    expected = 3 / found.joint.moments.prior_spread[1]
    assert shown[:, 0].mean() - drawn[:, 0].mean() == pytest.approx(expected, abs=5 * math.sqrt(2 / 500) / 0.88)
    assert abs(shown[:, 1].mean() - drawn[:, 1].mean()) < 0.3
    assert "z[1], largest discrepancy" in [text.get_text() for text in lines.get_legend().get_texts()]


def test_codes_that_are_the_one_point_of_the_prior_are_drawn():
    pytest.importorskip("matplotlib")
    found = report(*program(delta, lambda x: delta(x.new_zeros(len(x), 3))), torch.zeros(60, 3), **FAST)
    codes, _, _ = found.plot().axes
    assert codes.get_xlim()[0] < 0 < codes.get_xlim()[1]


def test_a_code_of_one_number_has_no_plane():
    pytest.importorskip("matplotlib")
    assert len(report(*pair(lambda x: x), data(300, 1), **FAST).plot().axes) == 1
