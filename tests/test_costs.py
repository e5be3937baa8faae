import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import distributions as torch_dist

from pyro_wae import WAELoss
from pyro_wae.costs import (
    AbsoluteError,
    ExpectedSquaredError,
    FunctionCost,
    NegativeLogLikelihood,
    Site,
    SquaredError,
    as_cost,
    generator_output,
)

X = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
G = torch.tensor([[1.5, 2.0, 1.0], [3.0, 9.0, 6.0]])
SQUARED = torch.tensor([0.25 + 0 + 4, 1 + 16 + 0])
ABSOLUTE = torch.tensor([0.5 + 0 + 2, 1 + 4 + 0])
SCALE = torch.tensor([[0.5, 1.0, 2.0], [1.0, 0.1, 3.0]])
VARIANCE = torch.tensor([0.25 + 1 + 4, 1 + 0.01 + 9])


def observation(fn, value=X, *, shape=None, data_dim=-1, **options):
    return Site("x", fn, value, tuple(fn.batch_shape) if shape is None else shape, data_dim, **options)


def normal(loc=G, scale=SCALE):
    return dist.Normal(loc, scale).to_event(1)


def squares(x, g):
    return (x - g).square().reshape(len(x), -1).sum(1)


EVERY_COST = [SquaredError(), AbsoluteError(), ExpectedSquaredError(), NegativeLogLikelihood(), as_cost(squares)]

# The generator's output

OUTPUTS = {
    "normal": normal(),
    "laplace": dist.Laplace(G, 0.3).to_event(1),
    "delta": dist.Delta(G).to_event(1),
    "delta event": dist.Delta(G, event_dim=1),
    "masked": normal().mask(torch.tensor([True, False])),
    "masked inside": dist.Normal(G, 1.0).mask(torch.rand(2, 3) > 0.5).to_event(1),
    "multivariate": dist.MultivariateNormal(G, torch.eye(3)),
    "mixture": dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.25, 0.75]).expand(2, 2)),
        # 0.25 (G + 3) + 0.75 (G - 1) = G
        dist.Normal(torch.stack([G + 3, G - 1], 1), 1.0).to_event(1),
    ),
    "lognormal": dist.LogNormal(G.log() - 0.5, 1.0).to_event(1),
    "poisson": dist.Poisson(G).to_event(1),
}


@pytest.mark.parametrize("fn", OUTPUTS.values(), ids=OUTPUTS)
def test_output_is_the_mean(fn):
    torch.testing.assert_close(generator_output(fn), G)
    torch.testing.assert_close(SquaredError()(fn, X), SQUARED)
    torch.testing.assert_close(AbsoluteError()(fn, X), ABSOLUTE)


def test_output_of_an_expanded_distribution_has_its_shape():
    for fn in (
        dist.Normal(G[0], 1.0).to_event(1).expand([2]),
        dist.Normal(G[0], 1.0).expand([2, 3]).to_event(1),
        dist.Delta(G[0]).to_event(1).mask(True).expand([2]),
        dist.Normal(G[0], 1.0).to_event(1).mask(True).expand([2]).mask(torch.tensor([False, True])),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(1)), dist.Normal(G[:1], 1.0).to_event(1)).expand([2]),
    ):
        assert torch.equal(generator_output(fn), G[0].expand(2, 3))
        # |x_2 - g_1|^2 = 2.5^2 + 3^2 + 5^2
        assert torch.equal(SquaredError()(fn, X), torch.tensor([4.25, 6.25 + 9 + 25]))


FLOW = dist.TransformedDistribution(dist.Normal(G, 1.0), [dist.transforms.TanhTransform()])

NO_MEAN = {
    "categorical": (dist.Categorical(torch.ones(2, 4)), "Categorical has no finite mean"),
    "masked categorical": (dist.Categorical(torch.ones(2, 3, 4)).to_event(1).mask(False), "Categorical has no finite"),
    "cauchy": (dist.Cauchy(G, 1.0).to_event(1), "Cauchy has no finite mean"),
    "expanded half-cauchy": (dist.HalfCauchy(torch.ones(3)).expand([2, 3]).to_event(1), "HalfCauchy has no finite"),
    "mixture of cauchy": (
        dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), dist.Cauchy(G, 1.0)),
        "MixtureSameFamily has no finite mean",
    ),
    "flow": (FLOW.to_event(1), "TransformedDistribution has no mean"),
    "masked flow": (FLOW.mask(torch.ones(2, 3).bool()).to_event(1), "TransformedDistribution has no mean"),
}


ANGLES = {
    "one": dist.VonMises(torch.zeros(2, 3), 1.0).to_event(1),
    "mixture": dist.MixtureSameFamily(dist.Categorical(torch.ones(2, 4)), dist.VonMises(torch.zeros(2, 4), 1.0)),
    "mixture of events": dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2, 4)), dist.VonMises(torch.zeros(2, 4, 3), 1.0).to_event(1)
    ),
    "masked mixture": dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2, 4)), dist.VonMises(torch.zeros(2, 4), 1.0).mask(True)
    ).mask(True),
}


@pytest.mark.parametrize("fn", ANGLES.values(), ids=ANGLES)
def test_angles_are_no_numbers_on_a_line(fn):
    with pytest.raises(ValueError, match=r"distribution of angles.*FunctionCost"):
        SquaredError()(fn, torch.zeros(fn.shape()))


def test_what_has_no_density_is_not_taken_for_angles():
    fn = dist.Empirical(torch.tensor([[1.0, 3.0], [2.0, 6.0]]), torch.zeros(2, 2))
    assert SquaredError()(fn, torch.tensor([3.0, 3.0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("fn", "found"), NO_MEAN.values(), ids=NO_MEAN)
@pytest.mark.parametrize(
    "cost",
    [SquaredError(), AbsoluteError(), ExpectedSquaredError(), as_cost(squares)],
    ids=lambda cost: type(cost).__name__,
)
def test_what_has_no_mean_is_refused_with_the_remedies(fn, found, cost):
    remedy = r".*cost=NegativeLogLikelihood\(\), or .*cost=SquaredError\(decode=lambda fn: \.\.\.\)"
    value = torch.zeros(fn.shape())
    with pytest.raises(ValueError, match=found + remedy):
        cost(fn, value)
    with pytest.raises(ValueError, match="At observed site 'x': " + found):
        cost.per_datum(observation(fn, value, shape=(2,)))


def test_a_variance_that_is_infinite_by_its_law_is_refused_and_one_of_broken_parameters_is_not():
    with pytest.raises(ValueError, match=r"StudentT has no finite variance.*NegativeLogLikelihood\(\), or .*decode="):
        ExpectedSquaredError()(dist.StudentT(2.0, G, 1.0).to_event(1), X)
    assert ExpectedSquaredError()(dist.Normal(G, torch.inf).to_event(1), X).isinf().all()


def test_decode_says_what_the_output_is():
    fn = dist.Cauchy(G, 1.0).to_event(1)
    median = {"decode": lambda fn: fn.base_dist.loc}
    assert torch.equal(SquaredError(**median)(fn, X), SQUARED)
    assert torch.equal(AbsoluteError(**median)(fn, X), ABSOLUTE)
    function = FunctionCost(lambda x, g: (x - g).abs().amax(1), **median)
    assert torch.equal(function.per_datum(observation(fn)), torch.tensor([[2.0, 4.0]]))


def test_a_decoded_output_may_broadcast_and_must_fit():
    assert torch.equal(SquaredError(decode=lambda fn: G[0])(normal(), X), torch.tensor([4.25, 6.25 + 9 + 25]))
    for cost in (SquaredError(decode=lambda fn: G.mT), as_cost(squares)):
        fn = normal() if isinstance(cost, SquaredError) else normal(G.mT.expand(3, 2), 1.0)
        message = r"At observed site 'x': the generator's output has shape \(3, 2\), the data \(2, 3\)\. Give.*decode="
        with pytest.raises(ValueError, match=message):
            cost.per_datum(observation(fn, shape=(2,)))


COUNTS = {
    "Multinomial": lambda p: dist.Multinomial(10, p, validate_args=False),
    "DirichletMultinomial": lambda p: dist.DirichletMultinomial(50 * p, 1000, validate_args=False),
}
WITHIN = {
    "itself": lambda make, p: make(p),
    "mixture": lambda make, p: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(3, 2)), make(p[:, None].expand(3, 2, 4))
    ),
    "masked mixture": lambda make, p: dist.MaskedMixture(torch.tensor([True, False, True]), make(p), make(p)),
    "mask of a mixture": lambda make, p: WITHIN["mixture"](make, p).mask(torch.ones(3).bool()),
}


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("within", WITHIN)
def test_the_total_of_a_datum_is_its_own_where_the_family_has_a_fixed_one(within, counts):
    """Documents of 10, 100 and 1000 words with one law: counts at the mean of their own total cost nothing."""
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).expand(3, 4)
    docs = p * torch.tensor([[10.0], [100.0], [1000.0]])
    fn = WITHIN[within](COUNTS[counts], p)
    torch.testing.assert_close(SquaredError()(fn, docs), torch.zeros(3).double(), atol=1e-8, rtol=0)
    moved = docs + torch.tensor([1.0, -1.0, 0.0, 0.0])
    torch.testing.assert_close(AbsoluteError()(fn, moved), torch.full((3,), 2.0).double())
    assert (SquaredError()(WITHIN[within](COUNTS[counts], p.flip(1)), docs) > 1).all()


# Costs of random decoders


def test_expected_squared_error_adds_the_variance():
    torch.testing.assert_close(ExpectedSquaredError()(normal(), X), SQUARED + VARIANCE)
    torch.testing.assert_close(ExpectedSquaredError()(dist.Delta(G).to_event(1), X), SQUARED)
    torch.testing.assert_close(ExpectedSquaredError()(dist.Laplace(G, SCALE).to_event(1), X), SQUARED + 2 * VARIANCE)
    covariance = torch.diag_embed(SCALE**2) + 0.005
    torch.testing.assert_close(
        ExpectedSquaredError()(dist.MultivariateNormal(G, covariance), X), SQUARED + VARIANCE + 0.015
    )


@pytest.mark.parametrize(
    "fn",
    [
        dist.Gamma(G, 2.0).to_event(1),
        OUTPUTS["mixture"],
        dist.Bernoulli(G / 10).to_event(1),
        dist.StudentT(9.0, G, SCALE).to_event(1).mask(False),
    ],
    ids=["gamma", "mixture", "bernoulli", "student"],
)
def test_expected_squared_error_is_the_mean_over_outputs(fn):
    """200,000 draws, seed 0, 5 standard errors."""
    errors = (X - fn.sample((200_000,))).square().sum(-1).double()
    standard_error = errors.std(0) / 200_000**0.5
    assert ((ExpectedSquaredError()(fn, X) - errors.mean(0)).abs() < 5 * standard_error).all()


@pytest.mark.parametrize(
    ("fn", "theirs", "value"),
    [
        (normal(), torch_dist.Normal(G, SCALE), X),
        (dist.Laplace(G, SCALE).to_event(1), torch_dist.Laplace(G, SCALE), X),
        (dist.Bernoulli(logits=G).to_event(1), torch_dist.Bernoulli(logits=G), (X > 2).to(G.dtype)),
        (dist.Poisson(G).to_event(1), torch_dist.Poisson(G), X),
        (dist.Cauchy(G, SCALE).to_event(1), torch_dist.Cauchy(G, SCALE), X),
    ],
    ids=["normal", "laplace", "bernoulli", "poisson", "cauchy"],
)
def test_negative_log_likelihood_is_that_of_torch(fn, theirs, value):
    torch.testing.assert_close(NegativeLogLikelihood()(fn, value), -theirs.log_prob(value).sum(1))


# One number for each datum


PLATES = {
    # Batch shape and data dimension: the data plate is rightmost, in the middle, leftmost.
    "rightmost": ((4, 3, 5), -1),
    "middle": ((4, 5, 3), -2),
    "leftmost": ((5, 4, 3), -3),
    "alone": ((5,), -1),
    "with an empty dimension": ((5, 1, 3), -3),
}


@pytest.mark.parametrize(("shape", "data_dim"), PLATES.values(), ids=PLATES)
@pytest.mark.parametrize("event", [(), (2,), (2, 3)])
@pytest.mark.parametrize("cost", EVERY_COST, ids=lambda cost: type(cost).__name__)
def test_inner_plates_are_summed_wherever_the_data_plate_is(shape, data_dim, event, cost):
    loc, scale, x = torch.randn(shape + event), torch.rand(shape + event) + 0.5, torch.randn(shape + event)
    elementwise = {
        AbsoluteError: (x - loc).abs(),
        ExpectedSquaredError: (x - loc) ** 2 + scale**2,
        NegativeLogLikelihood: -torch_dist.Normal(loc, scale).log_prob(x),
    }.get(type(cost), (x - loc) ** 2)
    fn = dist.Normal(loc, scale).to_event(len(event))
    expected = elementwise.movedim(len(shape) + data_dim, 0).reshape(5, -1).sum(1)
    torch.testing.assert_close(cost.per_datum(observation(fn, x, data_dim=data_dim)), expected[None])


def test_a_function_receives_data_first_then_inner_plates_then_the_event():
    shapes = []

    def spy(x, g):
        shapes.append((tuple(x.shape), tuple(g.shape)))
        return squares(x, g)

    for shape, data_dim in (((4, 5), -1), ((5, 4), -2)):
        fn = dist.Normal(torch.zeros(*shape, 2, 3), 1.0).to_event(2)
        FunctionCost(spy).per_datum(observation(fn, torch.zeros(fn.shape()), data_dim=data_dim))
    assert shapes == [((5, 4, 2, 3), (5, 4, 2, 3))] * 2


# Scale


@pytest.mark.parametrize("cost", EVERY_COST, ids=lambda cost: type(cost).__name__)
def test_a_scale_multiplies_the_cost(cost):
    plain = cost.per_datum(observation(normal()))
    scale = torch.tensor([2.0, 0.5])
    torch.testing.assert_close(cost.per_datum(observation(normal(), scale=3.0)), 3 * plain)
    torch.testing.assert_close(cost.per_datum(observation(normal(), scale=torch.tensor(3.0))), 3 * plain)
    torch.testing.assert_close(cost.per_datum(observation(normal(), scale=scale)), scale * plain)


@pytest.mark.parametrize("cost", [SquaredError(), as_cost(squares)], ids=lambda cost: type(cost).__name__)
def test_a_scale_of_each_datum_finds_its_dimension(cost):
    loc, x, scale = torch.randn(5, 4, 2), torch.randn(5, 4, 2), torch.rand(5, 1)
    values = cost.per_datum(observation(dist.Normal(loc, 1.0).to_event(1), x, data_dim=-2, scale=scale))
    torch.testing.assert_close(values, ((x - loc).square().sum((1, 2)) * scale[:, 0])[None])


def test_a_scale_of_each_inner_element_needs_a_cost_that_sees_them_apart():
    loc, x, scale = torch.randn(5, 4), torch.randn(5, 4), torch.rand(5, 4)
    site = observation(dist.Normal(loc, 1.0), x, data_dim=-2, scale=scale)
    torch.testing.assert_close(SquaredError().per_datum(site), ((x - loc).square() * scale).sum(1)[None])
    with pytest.raises(ValueError, match=r"poutine\.scale has shape \(5, 4\)\. Scale whole data, or take SquaredError"):
        as_cost(squares).per_datum(site)


# Masks


def test_a_masked_datum_costs_nothing():
    for cost in EVERY_COST:
        masked = cost.per_datum(observation(normal(), mask=torch.tensor([[True], [False]])))
        torch.testing.assert_close(masked[0, 0], cost.per_datum(observation(normal()))[0, 0])
        assert masked[0, 1] == 0


OUTPUT_COSTS = [
    (SquaredError(), lambda x, g: (x - g) ** 2),
    (AbsoluteError(), lambda x, g: (x - g).abs()),
    (as_cost(squares), lambda x, g: (x - g) ** 2),
    (as_cost(lambda x, g: (x - g).square().flatten(1).sum(1).sqrt()), None),
]


@pytest.mark.parametrize(("cost", "elementwise"), OUTPUT_COSTS, ids=["squared", "absolute", "function", "root"])
@pytest.mark.parametrize(("event", "data_dim"), [(0, -3), (1, -2), (2, -1)])
def test_masked_elements_may_be_nan(cost, elementwise, event, data_dim):
    """The mask leaves elements out of the value and the gradient of a datum, and the whole of the last datum."""
    loc, x = torch.randn(4, 3, 2, requires_grad=True), torch.randn(4, 3, 2)
    mask = torch.rand(4, 3, 2) < 0.6
    mask[0], mask[-1] = True, False
    fn = dist.Normal(loc, 1.0, validate_args=False).to_event(event)
    values = cost.per_datum(observation(fn, x.masked_fill(~mask, torch.nan), data_dim=data_dim, mask=mask))
    (gradient,) = torch.autograd.grad(values.sum(), loc)
    difference = (x - loc.detach()) * mask
    if elementwise is None:
        expected = difference.square().sum((1, 2)).sqrt()
    else:
        expected = (elementwise(x, loc.detach()) * mask).sum((1, 2))
    torch.testing.assert_close(values.detach(), expected[None])
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).all()


def test_a_masked_likelihood_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    NegativeLogLikelihood().per_datum(observation(normal(), mask=torch.tensor([[True], [False]])))
    assert torch.equal(torch.get_rng_state(), before)


def test_observations_know_which_data_have_anything_observed():
    mask = torch.tensor([[True, False, False], [False, False, False]])
    assert observation(normal(), mask=mask).kept.tolist() == [[True, False]]
    assert observation(normal(), mask=torch.tensor([[True], [False]])).kept.tolist() == [[True, False]]
    assert observation(dist.Normal(G, 1.0), shape=(2, 3), data_dim=-2, mask=mask).kept.tolist() == [[True, False]]
    assert observation(normal()).kept is None


def test_expected_squared_error_refuses_a_part_of_an_event():
    mask = torch.tensor([[True, False, True], [True, True, True]])
    with pytest.raises(ValueError, match=r"At observed site 'x': ExpectedSquaredError cannot leave out a part of an"):
        ExpectedSquaredError().per_datum(observation(normal(), mask=mask))
    as_plates = observation(dist.Normal(G, SCALE), shape=(2, 3), data_dim=-2, mask=mask)
    expected = ((X - G) ** 2 + SCALE**2) * mask
    torch.testing.assert_close(ExpectedSquaredError().per_datum(as_plates), expected.sum(1)[None])


# Through a model: the mean cost, over the data that have anything observed


def mean_cost(fn, cost, *, mask=True, scale=1.0, plate=lambda: pyro.plate("data", 2)):
    """The cost that WAELoss reports of a model whose observed site has the distribution fn."""

    def model():
        data = plate()
        with data, pyro.plate("codes", 1, dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        with data, pyro.poutine.mask(mask=mask), pyro.poutine.scale(scale=scale):
            pyro.sample("x", fn, obs=X)

    def guide():
        with plate(), pyro.plate("codes", 1, dim=-2):
            pyro.sample("z", dist.Delta(torch.zeros(1, 2)))

    loss = WAELoss(cost=cost, data_plate="data")
    loss.loss(model, guide)
    return loss.terms.cost


INNER_MASK = torch.tensor([[True, True, False], [True, False, True]])


@pytest.mark.parametrize(
    ("cost", "elementwise"),
    [
        (SquaredError(), (X - G) ** 2),
        (AbsoluteError(), (X - G).abs()),
        (squares, (X - G) ** 2),
        (NegativeLogLikelihood(), -torch_dist.Normal(G, SCALE).log_prob(X)),
    ],
    ids=["squared", "absolute", "function", "likelihood"],
)
def test_masks_of_handler_and_distribution_act_alike(cost, elementwise):
    datum, within = torch.tensor([False, True]), elementwise * INNER_MASK
    inner = dist.Normal(G, SCALE).mask(INNER_MASK).to_event(1)
    for fn, mask, expected in (
        (normal(), True, elementwise.sum() / 2),
        (normal(), datum, elementwise[1].sum()),
        (normal().mask(datum), True, elementwise[1].sum()),
        (inner, True, within.sum() / 2),
        (inner, datum, within[1].sum()),
        (inner.mask(datum), True, within[1].sum()),
    ):
        assert mean_cost(fn, cost, mask=mask) == pytest.approx(expected.item())


def test_a_users_scale_multiplies_and_that_of_a_subsample_does_not():
    assert mean_cost(normal(), None, scale=3.0) == pytest.approx(3 * (4.25 + 17) / 2)
    assert mean_cost(normal(), None, scale=torch.tensor([2.0, 1.0])) == pytest.approx((2 * 4.25 + 17) / 2)
    subsampled = {"plate": lambda: pyro.plate("data", 100, subsample_size=2)}
    assert mean_cost(normal(), None, **subsampled) == pytest.approx((4.25 + 17) / 2)
    assert mean_cost(normal(), None, scale=3.0, **subsampled) == pytest.approx(3 * (4.25 + 17) / 2)


# Data and shapes


def test_whole_numbers_are_data():
    x = X.long()
    for cost, expected in ((SquaredError(), SQUARED), (AbsoluteError(), ABSOLUTE), (as_cost(squares), SQUARED)):
        for fn in (normal(), dist.Poisson(G).to_event(1)):
            assert torch.equal(cost.per_datum(observation(fn, x)), expected[None])
            masked = cost.per_datum(observation(fn, x, mask=torch.tensor([[False], [True]])))
            assert torch.equal(masked, expected * torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_truth_values_and_whole_numbers_have_the_likelihood_of_the_same_floats(dtype):
    bits, fn = (X > 0).to(G.dtype), dist.Bernoulli(logits=G).to_event(1)
    assert torch.equal(NegativeLogLikelihood()(fn, bits.to(dtype)), -fn.log_prob(bits))
    assert torch.equal(SquaredError()(fn, bits.to(dtype)), (bits - G.sigmoid()).square().sum(1))


class Elementwise(SquaredError):
    def forward(self, distribution, value):
        return (value - self.output(distribution)).square()


WRONG = {
    "scalar": (lambda x, g: (x - g).sum(), r"shape \(\)"),
    "not summed": (lambda x, g: x - g, r"shape \(2, 3\)"),
    "kept dimension": (lambda x, g: (x - g).sum(1, keepdim=True), r"shape \(2, 1\)"),
    "float": (lambda x, g: 1.0, "float"),
    "summed over data": (lambda x, g: (x - g).sum(0), r"shape \(3,\)"),
    "not summed by a cost": (Elementwise(), r"shape \(2, 3\)"),
}


@pytest.mark.parametrize(("cost", "found"), WRONG.values(), ids=WRONG)
def test_a_cost_of_the_wrong_shape_is_refused(cost, found):
    message = (
        rf"At observed site 'x', the cost .* returned {found} where shape \(2,\) is needed.*\.flatten\(1\)\.sum\(1\)"
    )
    with pytest.raises(ValueError, match=message):
        as_cost(cost).per_datum(observation(normal()))


def test_a_cost_stays_what_it_is():
    cost = SquaredError()
    assert as_cost(cost) is cost
    assert isinstance(as_cost(squares), FunctionCost)


# repr and pickle


@pytest.mark.parametrize(
    "call",
    ["SquaredError(decode=None)", "AbsoluteError(decode=None)", "ExpectedSquaredError()", "NegativeLogLikelihood()"],
)
def test_repr_is_the_call_that_makes_it(call):
    assert repr(eval(call)) == call


def test_reprs_name_functions():
    assert repr(SquaredError(decode=generator_output)).startswith("SquaredError(decode=<function generator_output")
    assert repr(as_cost(squares)).startswith("FunctionCost(function=<function squares")


@pytest.mark.parametrize(
    "cost", [*EVERY_COST, SquaredError(decode=generator_output)], ids=lambda cost: type(cost).__name__
)
def test_a_pickled_cost_is_the_same(cost):
    site = observation(normal())
    assert torch.equal(pickle.loads(pickle.dumps(cost)).per_datum(site), cost.per_datum(site))


def test_a_function_computes_with_bytes_as_with_numbers():
    # In bytes 2 * 200 would be 144.
    x = torch.tensor([[0, 1], [200, 255]], dtype=torch.uint8)
    distribution = dist.Normal(torch.ones(2, 2), 1.0).to_event(1)
    cost = FunctionCost(lambda x, g: (2 * x - g).abs().sum(1))
    torch.testing.assert_close(cost(distribution, x), torch.tensor([2.0, 908.0]))
