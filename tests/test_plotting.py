import sys

import numpy as np
import pytest
import torch

from pyro_wae.plotting import codes_and_prior, image_grid, loss_curves, quantiles, reconstructions

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


def mosaic_of(figure):
    (axes,) = figure.axes
    (picture,) = axes.images
    return picture.get_array()


def images_in(mosaic, height, width):
    """How many images lie in a mosaic of random pixels: the pixels that are painted over those of one image."""
    return np.ma.masked_invalid(mosaic).count() / (height * width)


@pytest.mark.parametrize("shape", [(7, 10, 8), (7, 1, 10, 8)])
@pytest.mark.parametrize("as_input", [torch.Tensor.numpy, torch.Tensor.requires_grad_, torch.Tensor.bfloat16])
def test_image_grid_shows_every_grey_image_once(shape, as_input):
    figure = image_grid(as_input(torch.rand(shape)), columns=3)
    mosaic = mosaic_of(figure)
    assert images_in(mosaic, 10, 8) == 7
    assert mosaic.shape == (3 * 10 + 2, 3 * 8 + 2)


def test_image_grid_keeps_order_and_pixels():
    images = torch.rand(4, 5, 5)
    mosaic = mosaic_of(image_grid(images, columns=2))
    np.testing.assert_allclose(mosaic[:5, 6:], images[1], rtol=1e-6)
    np.testing.assert_allclose(mosaic[6:, :5], images[2], rtol=1e-6)


def test_image_grid_is_about_square_by_default():
    height, width = mosaic_of(image_grid(torch.rand(100, 28, 28))).shape
    assert height == width


def test_image_grid_shows_colour():
    images = torch.rand(2, 3, 6, 6)
    mosaic = mosaic_of(image_grid(images, columns=2))
    assert mosaic.shape == (6, 13, 3)
    np.testing.assert_allclose(mosaic[:, :6], images[0].permute(1, 2, 0), rtol=1e-6)


def test_bytes_are_shown_on_the_scale_of_floats():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    np.testing.assert_allclose(mosaic_of(image_grid(images)), mosaic_of(image_grid(images / 255)), rtol=1e-6)


def test_values_outside_the_unit_interval_are_clipped():
    mosaic = mosaic_of(image_grid(torch.tensor([[[-1.0, 2.0]]])))
    np.testing.assert_array_equal(mosaic, [[0.0, 1.0]])


def test_reconstructions_put_each_output_below_its_input():
    inputs, outputs = torch.rand(5, 1, 10, 10), torch.rand(5, 1, 10, 10)
    figure = reconstructions(inputs, outputs, columns=3)
    mosaic = mosaic_of(figure)
    assert images_in(mosaic, 10, 10) == 10
    np.testing.assert_allclose(mosaic[:10, :10], inputs[0, 0], rtol=1e-6)
    np.testing.assert_allclose(mosaic[11:21, :10], outputs[0, 0], rtol=1e-6)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["data", "reconstruction", "data", "reconstruction"]


def test_images_in_lists_that_differ_in_shape_are_told_the_line_that_serves():
    inputs, outputs = torch.rand(5, 1, 4, 4).tolist(), torch.rand(5, 2, 8).tolist()
    with pytest.raises(ValueError, match=r"\(5, 1, 4, 4\), found \(5, 2, 8\)\. Write ") as raised:
        reconstructions(inputs, outputs)
    line = str(raised.value).partition("Write ")[2].removesuffix(".")
    reconstructions(inputs, eval(line, {"torch": torch, "outputs": outputs}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2])
def test_codes_in_less_than_single_precision_are_drawn(dtype):
    codes = torch.randn(9, 2).to(dtype)
    shown = codes_and_prior(codes, codes).axes[0].collections[0].get_offsets()
    np.testing.assert_array_equal(shown, codes.float())


def test_codes_and_prior_of_one_point_are_drawn():
    left, _ = codes_and_prior(torch.ones(5, 2), torch.ones(5, 2)).axes
    assert left.get_xlim()[0] < 1 < left.get_xlim()[1]


def test_codes_and_prior_draws_both_clouds_on_the_same_limits():
    figure = codes_and_prior(torch.randn(50, 8), torch.randn(70, 8))
    left, right = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["codes", "prior samples"]
    assert len(left.collections[0].get_offsets()) == 50
    assert len(right.collections[0].get_offsets()) == 70
    assert left.get_xlim() == right.get_xlim()
    assert left.get_ylim() == right.get_ylim()


def test_codes_and_prior_shows_the_plane_that_fits_worst():
    generator = torch.Generator().manual_seed(0)
    prior = torch.randn(4000, 6, generator=generator)
    codes = torch.randn(4000, 6, generator=generator)
    prior[:, 3], codes[:, 3] = 3 * prior[:, 3], 0.3 * codes[:, 3]  # variances of 9 and 0.09: an eigenvalue of -8.91
    codes[:, 4] *= 2.8  # the variance is 7.84 where the prior's is 1: an eigenvalue of 6.84
    codes[:, 1] += 2.0  # the mean is off by 2: an eigenvalue of 4
    figure = codes_and_prior(codes, prior)
    shown = np.asarray(figure.axes[0].collections[0].get_offsets())
    for column, expected in ((0, codes[:, 3]), (1, codes[:, 4])):
        assert abs(np.corrcoef(shown[:, column], expected)[0, 1]) > 0.99


@pytest.mark.parametrize(("d", "plane", "shown"), [(5, (3, 1), [3, 1]), (2, None, [0, 1])], ids=["chosen", "all"])
def test_codes_and_prior_shows_the_chosen_coordinates_or_both(d, plane, shown):
    codes = torch.randn(20, d)
    figure = codes_and_prior(codes, torch.randn(20, d), plane=plane)
    np.testing.assert_allclose(figure.axes[0].collections[0].get_offsets(), codes[:, shown], rtol=1e-6)
    assert figure.axes[0].get_xlabel() == f"coordinate {shown[0]}"


@pytest.mark.parametrize("number", [1, 10, 11, 20])
def test_classes_have_colours_and_a_legend(number):
    labels = torch.arange(number).repeat(5)
    codes = torch.randn(len(labels), 3)
    figure = codes_and_prior(codes, codes, labels)
    left = figure.axes[0]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [str(label) for label in range(number)]
    assert len(np.unique(left.collections[0].get_facecolors(), axis=0)) == number
    assert len({str(dot.get_color()) for dot in legend.legend_handles}) == number


class Column:
    """What numpy makes an array of objects of, as a column of a table."""

    def __array__(self, dtype=None, copy=None):
        return np.array(["T cell", "B cell"] * 3, dtype=object)


@pytest.mark.parametrize(
    "labels", [Column(), np.asarray(Column()), np.asarray(Column()).astype(str), ["T cell", "B cell"] * 3]
)
def test_labels_are_strings_however_they_are_held(labels):
    codes = torch.randn(6, 3)
    (legend,) = codes_and_prior(codes, codes, labels).legends
    assert [text.get_text() for text in legend.get_texts()] == ["B cell", "T cell"]


def test_labels_that_cannot_be_sorted_are_written_as_strings():
    codes, labels = torch.randn(6, 3), ["T cell", None] * 3
    with pytest.raises(
        TypeError, match=r"labels must be .* numbers or strings, found list\. Write labels=\[str"
    ) as raised:
        codes_and_prior(codes, codes, labels)
    written = eval(str(raised.value).partition("Write labels=")[2].removesuffix("."), {"labels": labels})
    (legend,) = codes_and_prior(codes, codes, written).legends
    assert [text.get_text() for text in legend.get_texts()] == ["None", "T cell"]


def test_more_classes_than_colours_are_refused():
    with pytest.raises(ValueError, match=r"labels must be of at most 20 classes.* found 21\. Write labels=None"):
        codes_and_prior(torch.randn(42, 3), torch.randn(42, 3), torch.arange(42) % 21)


def test_loss_curves_have_a_panel_each_against_the_unit():
    history = {"cost": [torch.tensor(3.0), 2.0, 1.0], "penalty": [0.2, 0.0, -0.1]}
    figure = loss_curves(history, unit="step")
    cost, penalty = figure.axes
    assert (cost.get_title(), penalty.get_title()) == ("cost", "penalty")
    np.testing.assert_array_equal(cost.lines[0].get_xydata(), [[1, 3], [2, 2], [3, 1]])
    np.testing.assert_array_equal(penalty.lines[0].get_ydata(), history["penalty"])
    assert penalty.get_xlabel() == "step"


def test_figures_can_be_saved_and_leave_pyplot_alone(tmp_path):
    from matplotlib import pyplot

    before = dict(matplotlib.rcParams)
    figure = image_grid(torch.rand(4, 5, 5), title="four")
    figure.savefig(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert figure._suptitle.get_text() == "four"
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


def test_missing_matplotlib_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "pyro-wae\[tutorials\]"'):
        image_grid(torch.rand(4, 5, 5))


def test_quantiles_lie_on_the_line_that_the_prior_gives():
    prior = 5 * torch.randn(4000, 2) + 100
    (axes,) = quantiles(2 * (prior - 100) + 110, prior, names=["a", "b"]).axes
    diagonal, *lines = axes.lines
    np.testing.assert_allclose(*diagonal.get_data())
    assert len(lines) == 2
    for line in lines:
        of_prior, of_codes = line.get_data()
        # Twice as wide, and shifted by (110 - 100) / 5 prior deviations, but for the sampled mean of the prior.
        np.testing.assert_allclose(of_codes - 2 * of_prior, 2, atol=0.1)
        assert abs(np.interp(0, of_prior, np.linspace(0, 1, len(of_prior))) - 0.5) < 0.05


def test_the_coordinate_that_strays_most_is_named():
    codes = torch.randn(500, 5)
    codes[:, 3] += 2
    (axes,) = quantiles(codes, torch.randn(500, 5)).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["coordinate 3, largest discrepancy"]


def test_quantiles_of_a_single_constant_coordinate_are_shown():
    assert len(quantiles(torch.ones(50, 1), torch.ones(50, 1), title="constant").axes) == 1
