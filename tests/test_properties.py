"""What holds for every size and number, sought by hypothesis."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_wae._core import checks
from pyro_wae._core.fitted import FittedBuffers
from pyro_wae._core.rows import Site
from pyro_wae.penalties.pair_sums import across, every, within
from pyro_wae.penalties.sliced import match_quantiles, transport_along

quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)
sizes = st.integers(2, 6)
repeats = st.integers(1, 4)
data_sizes = st.one_of(st.none(), st.integers(7, 50))


# Pair weights against dense matrices


def dense(weights, rows, columns):
    """The weight of each pair, from the diagonals."""
    matrix = torch.full((rows, columns), weights.between, dtype=torch.float64)
    for offset, ratio in weights.diagonals((rows, columns)):
        matrix.diagonal(offset).mul_(ratio)
    return matrix


def same_datum(rows, columns, n):
    return torch.arange(rows)[:, None] % n == torch.arange(columns) % n


@quick
@given(n=sizes, k=repeats, size=data_sizes)
def test_weights_within_a_set_are_those_of_a_dense_mask(n, k, size):
    """A mean over pairs of different data, and one over different draws of a datum with the weight 1/N."""
    rows = n * k
    same, own = same_datum(rows, rows, n), torch.eye(rows, dtype=torch.bool)
    expected = (~same) / (~same).sum()
    if size is not None and k > 1:
        expected = (1 - 1 / size) * expected + (same & ~own) / (same & ~own).sum() / size
    torch.testing.assert_close(dense(within(rows, k, size), rows, rows), expected.double())


@quick
@given(n=sizes, k=repeats, j=repeats, size=data_sizes)
def test_weights_across_two_sets_are_those_of_a_dense_mask(n, k, j, size):
    same = same_datum(n * k, n * j, n)
    expected = (~same) / (~same).sum()
    if size is not None:
        expected = (1 - 1 / size) * expected + same / same.sum() / size
    torch.testing.assert_close(dense(across(n * k, n * j, n, size), n * k, n * j), expected.double())


@quick
@given(n=sizes, k=repeats, size=data_sizes, cuts=st.tuples(*[st.integers(0, 24)] * 4), symmetric=st.booleans())
def test_a_blocks_total_is_the_sum_of_its_weighted_values(n, k, size, cuts, symmetric):
    rows = n * k
    weights = within(rows, k, size) if symmetric else across(rows, rows, n, size)
    top, bottom = sorted(cut % (rows + 1) for cut in cuts[:2])
    left, right = sorted(cut % (rows + 1) for cut in cuts[2:])
    if top == bottom or left == right:
        return
    values = torch.randn(rows, rows, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    expected = (dense(weights, rows, rows) * values)[top:bottom, left:right].sum()
    block = values[top:bottom, left:right]
    torch.testing.assert_close(weights.total(block, (top, left)), expected)


@quick
@given(n=sizes, m=sizes)
def test_weights_of_every_pair_sum_to_1(n, m):
    torch.testing.assert_close(every(n, m, 0, 1).total(torch.ones(n, m).double()), torch.ones(()).double())


# Quantile matching


@quick
@given(n=st.integers(1, 9), m=st.integers(1, 9), shift=st.integers(-100, 100))
def test_matched_quantiles_are_the_steps_of_both_quantile_functions(n, m, shift):
    """At the middle of each piece, both indices are those of the quantile functions there."""
    rows, columns, lengths = match_quantiles(n, m, torch.tensor(shift))
    assert lengths.sum().item() == pytest.approx(1)
    assert (lengths >= 0).all()
    middle = lengths.cumsum(0) - lengths / 2
    inside = lengths > 0
    assert torch.equal(rows[inside], (middle * n).floor().long()[inside])
    moved = (middle - shift / math.lcm(n, m)) * m
    assert torch.equal(columns[inside], moved.floor().long()[inside])


@quick
@given(n=st.integers(2, 12), m=st.integers(2, 12), p=st.floats(1, 3), seed=st.integers(0, 1000))
def test_transport_on_a_line_is_that_of_pot(n, m, p, seed):
    ot = pytest.importorskip("ot")
    random = np.random.default_rng(seed)
    codes, prior = random.normal(size=(n, 1)) * 2 + 1, random.normal(size=(m, 1))
    value = transport_along(torch.ones(1, 1).double(), torch.tensor(codes)[None], torch.tensor(prior), p)
    assert value.item() == pytest.approx(ot.wasserstein_1d(codes[:, 0], prior[:, 0], p=p), rel=1e-8)


# Argument checks


@quick
@given(value=st.one_of(st.integers(), st.floats(), st.booleans(), st.text(), st.none()), least=st.integers(-5, 5))
def test_a_whole_number_is_returned_as_it_is_or_refused(value, least):
    right = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if right:
        assert checks.whole("n", value, least=least) == value
        return
    kind = ValueError if isinstance(value, int) and not isinstance(value, bool) else TypeError
    with pytest.raises(kind, match=r"n must be a whole number >= -?\d+, found (?s:.*)\. Write n="):
        checks.whole("n", value, least=least)


@quick
@given(value=st.one_of(st.integers(-9, 9), st.floats(), st.booleans(), st.text(), st.none(), st.lists(st.floats())))
def test_a_number_is_returned_as_a_float_or_refused(value):
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and 0 < value < 4:
        for same in (value, np.float64(value), torch.tensor(value, dtype=torch.float64)):
            found = checks.number("x", same, above=0, below=4, write="x=1.0")
            assert type(found) is float
            assert found == value
        return
    with pytest.raises(ValueError if is_number else TypeError, match=r"x must be a finite number > 0 and < 4, found"):
        checks.number("x", value, above=0, below=4, write="x=1.0")


@quick
@given(value=st.one_of(st.integers(0, 1), st.floats(), st.text(), st.none(), st.booleans()))
def test_a_flag_is_true_or_false_alone(value):
    if isinstance(value, bool):
        assert checks.flag("on", value) is value
        assert checks.flag("on", np.bool_(value)) is value
    else:
        with pytest.raises(TypeError, match=r"on must be True or False, found (?s:.*)\. Write on=True"):
            checks.flag("on", value)


# Buffers that the first step decides


class Fitted(FittedBuffers):
    def __init__(self):
        super().__init__()
        self.register_fitted("length")
        self.register_fitted("table", torch.empty(0), any_shape=True)


@quick
@given(
    value=st.floats(-1e6, 1e6),
    shape=st.lists(st.integers(1, 3), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_fitted_buffer_keeps_its_digits_and_shape_through_a_state(value, shape, dtype):
    first, second = Fitted(), Fitted()
    first.set_fitted("length", torch.tensor(value, dtype=dtype))
    first.set_fitted("table", torch.full(shape, value, dtype=dtype))
    second.load_state_dict(first.state_dict())
    for name in ("length", "table"):
        assert second.is_fitted(name)
        assert torch.equal(getattr(second, name), getattr(first, name))
        assert getattr(second, name).dtype == getattr(first, name).dtype
    second.load_state_dict(Fitted().state_dict())
    assert not second.is_fitted("length")
    assert not second.is_fitted("table")


def test_a_fitted_buffer_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for length"):
        Fitted().load_state_dict({"length": torch.ones(3), "table": torch.ones(2)})


def test_a_buffer_set_in_inference_mode_can_be_trained_with():
    module, x = Fitted(), torch.ones((), requires_grad=True)
    with torch.inference_mode():
        module.set_fitted("length", torch.ones(()) * 2)
    (module.length * x).backward()
    assert x.grad == 2


# The rows of a site


@st.composite
def sites(draw):
    """A site with its data plate at any dimension, inner plates around it, and particles or none."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    event = draw(st.lists(st.integers(1, 3), max_size=2))
    dims = draw(st.permutations(range(-len(shape), 0)))
    particle = dims[1] if len(dims) > 1 and draw(st.booleans()) else None
    fn = dist.Normal(torch.zeros(*shape, *event), 1).to_event(len(event))
    return Site("z", fn, torch.randn(fn.shape()), tuple(shape), dims[0], particle)


@quick
@given(sites())
def test_rows_are_the_values_of_each_datum_and_back(site):
    rows = site.value_rows()
    batch, event = site.shape, site.distribution.event_shape
    particles = 1 if site.particle_dim is None else batch[site.particle_dim]
    assert rows.shape[:2] == (particles, batch[site.data_dim])
    for place in itertools.product(*map(range, batch)):
        inner = [i for dim, i in enumerate(place, -len(place)) if dim not in (site.data_dim, site.particle_dim)]
        particle = 0 if site.particle_dim is None else place[site.particle_dim]
        torch.testing.assert_close(rows[(particle, place[site.data_dim], *inner)], site.value[place])
    flat = rows.flatten(2) if rows.ndim > 2 else rows[..., None]
    torch.testing.assert_close(site.unrows(flat, event), site.value, rtol=0, atol=0)
