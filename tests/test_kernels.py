import copy
import math
import pickle
import weakref

import numpy as np
import pyro
import pyro.contrib.gp.kernels as pyro_kernels
import pyro.distributions as dist
import pytest
import torch
from programs import around
from pyro import poutine
from pyro.infer import SVI
from references import KERNELS, LargestTensor, distances, half_mean_square, off_diagonal, program, rows
from sklearn.gaussian_process import kernels as sklearn_kernels

from pyro_wae import WAELoss
from pyro_wae.kernels import (
    Energy,
    FunctionKernel,
    Gaussian,
    InverseMultiquadratic,
    Laplace,
    Matern,
    MultiScale,
    Product,
    RationalQuadratic,
    SameLabel,
    Sum,
    UnitMean,
)
from pyro_wae.kernels.function import ModuleKernel, as_kernel
from pyro_wae.penalties import MMD

LENGTHS = [
    Gaussian,
    InverseMultiquadratic,
    Laplace,
    lambda *a: Matern(0.5, *a),
    lambda *a: Matern(1.5, *a),
    lambda *a: Matern(2.5, *a),
    lambda *a: RationalQuadratic(0.7, *a),
]

every_kernel = pytest.mark.parametrize("name", KERNELS)
every_length = pytest.mark.parametrize("kernel", LENGTHS)


def fitted(name, prior):
    kernel = KERNELS[name][0]()
    kernel.fit(prior)
    return kernel


# Values


SCIKIT_LEARN = {
    "gaussian": (Gaussian(1.3), sklearn_kernels.RBF(1.3)),
    "laplace": (Laplace(1.3), sklearn_kernels.Matern(1.3, nu=0.5)),
    "matern12": (Matern(0.5, 1.3), sklearn_kernels.Matern(1.3, nu=0.5)),
    "matern32": (Matern(1.5, 1.3), sklearn_kernels.Matern(1.3, nu=1.5)),
    "matern52": (Matern(2.5, 1.3), sklearn_kernels.Matern(1.3, nu=2.5)),
    "rational": (RationalQuadratic(0.7, 1.3), sklearn_kernels.RationalQuadratic(1.3, alpha=0.7)),
    # C / (C + r^2) is the rational quadratic with alpha = 1 and C = 2 s^2.
    "imq": (InverseMultiquadratic((2 * 1.3**2) ** 0.5), sklearn_kernels.RationalQuadratic(1.3, alpha=1.0)),
    "sum": (Gaussian(1.3) + 0.5 * Laplace(0.7), sklearn_kernels.RBF(1.3) + 0.5 * sklearn_kernels.Matern(0.7, nu=0.5)),
    "product": (
        Gaussian(1.3) * RationalQuadratic(2.0, 0.7),
        sklearn_kernels.RBF(1.3) * sklearn_kernels.RationalQuadratic(0.7, alpha=2.0),
    ),
    "sum of three": (
        Sum(Gaussian(1.3), Laplace(0.7), Matern(1.5, 2.0)),
        sklearn_kernels.RBF(1.3) + sklearn_kernels.Matern(0.7, nu=0.5) + sklearn_kernels.Matern(2.0, nu=1.5),
    ),
    "product of three": (
        Product(Gaussian(1.3), Laplace(0.7), Matern(1.5, 2.0)),
        sklearn_kernels.RBF(1.3) * sklearn_kernels.Matern(0.7, nu=0.5) * sklearn_kernels.Matern(2.0, nu=1.5),
    ),
    "multiscale": (MultiScale(Gaussian(1.3), (0.25, 4.0)), sklearn_kernels.RBF(0.65) + sklearn_kernels.RBF(2.6)),
}


@pytest.mark.parametrize(("kernel", "theirs"), SCIKIT_LEARN.values(), ids=SCIKIT_LEARN)
def test_values_are_those_of_scikit_learn(kernel, theirs):
    x, y = rows(11, 3), rows(7, 3)
    np.testing.assert_allclose(kernel(x, y), theirs(x.numpy(), y.numpy()), rtol=1e-12)


def lengthscale(value):
    return torch.tensor(value, dtype=torch.float64)


@every_kernel
def test_values_with_lengths_from_the_prior_follow_the_formula(name):
    x, y, prior = rows(11, 3), rows(7, 3), 2 * rows(50, 3) + 1
    expected = KERNELS[name][1](distances(x, y), half_mean_square(prior))
    torch.testing.assert_close(fitted(name, prior)(x, y), expected, rtol=1e-12, atol=1e-14)


@every_kernel
def test_the_kernel_is_symmetric_and_one_on_slices_and_copies(name):
    x = rows(20, 3) + 5
    kernel = fitted(name, x)
    gram = kernel(x, x)
    torch.testing.assert_close(gram, gram.mT, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(kernel(x[:5], x[5:]), gram[:5, 5:], rtol=1e-10, atol=1e-12)
    # On a copy the squared distance of equal points is 0 but for rounding, 1e-14, and a root of it is more.
    torch.testing.assert_close(kernel(x, x.clone()), gram, rtol=1e-6, atol=1e-3 if name == "energy05" else 1e-6)


@every_kernel
@pytest.mark.parametrize("d", [1, 8])
def test_gram_matrices_are_positive_definite(name, d):
    """Energy kernels are so on weights that sum to 0, which is what centring leaves."""
    x = rows(60, d)
    gram = fitted(name, rows(100, d))(x, x)
    if any(isinstance(part, Energy) for part in KERNELS[name][0]().modules()):
        centring = torch.eye(60, dtype=x.dtype) - 1 / 60
        assert torch.linalg.eigvalsh(gram).min() < -1e-3
        gram = centring @ gram @ centring
    assert torch.linalg.eigvalsh(gram).min() > -1e-11 * torch.linalg.eigvalsh(gram).max()


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values_come_in_the_precision_of_the_codes_and_half_precision_is_cast_up(name, dtype):
    x, y = rows(6, 3).to(dtype), rows(5, 3).to(dtype)
    kernel = fitted(name, rows(50, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = kernel(x, y)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(values.double(), kernel(x.double(), y.double()), rtol=1e-6, atol=1e-7)


@every_kernel
def test_gradients_agree_with_finite_differences(name):
    kernel = fitted(name, rows(50, 3))
    assert torch.autograd.gradcheck(kernel, (rows(4, 3).requires_grad_(), rows(5, 3).requires_grad_()))


@every_kernel
def test_gradients_stay_finite_at_coinciding_points(name):
    """A kink has no slope at 0, but by symmetry the gradient of a pair of equal points is 0."""
    kernel = fitted(name, rows(50, 3))
    x = rows(1, 3).expand(4, 3).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kernel(x, x).sum(), x)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    y = torch.cat([x.detach(), rows(2, 3)]).requires_grad_()
    gradients = torch.autograd.grad(kernel(x, y).sum(), (x, y))
    assert all(g.isfinite().all() for g in gradients)


@every_kernel
def test_far_from_0_a_kernel_keeps_its_digits(name):
    """Shifted by a power of 2, and of numbers that float64 then still holds exactly."""
    x, y = ((256 * rows(n, 3)).round() / 256 for n in (6, 5))
    kernel, place = fitted(name, rows(50, 3)), 2.0**30
    torch.testing.assert_close(kernel(x + place, y + place), kernel(x, y), rtol=1e-10, atol=1e-12)


@every_length
def test_profiles_have_a_finite_slope_at_0(kernel):
    """Whether the clamp of the squared distances passes a gradient at its bound differs between versions of torch."""
    u = torch.zeros(3, requires_grad=True)
    kernel(1.0).profile(u).sum().backward()
    assert u.grad.isfinite().all()


# Memory


@every_kernel
def test_no_tensor_is_larger_than_the_matrix_of_pairs(name):
    n, m, d = 60, 50, 50
    x, prior = rows(n, d).requires_grad_(), rows(m, d)
    with LargestTensor() as largest:
        kernel = fitted(name, prior)
        (kernel(x, prior).sum() + kernel(x, x).sum()).backward()
    assert n * m <= largest.numel <= n * n


def test_the_memory_test_sees_a_direct_difference():
    with LargestTensor() as largest:
        FunctionKernel(lambda x, y: (x[:, None] - y).norm(dim=2))(rows(60, 50), rows(50, 50))
    assert largest.numel == 60 * 50 * 50


def test_the_unit_mean_of_many_rows_is_that_of_all_pairs_without_their_matrix(monkeypatch):
    monkeypatch.setattr("pyro_wae.kernels.conditional.MOST_FITTED_PAIRS", 7 * 60)
    prior = rows(60, 2)
    kernel = UnitMean(Gaussian(1.5))
    with LargestTensor() as largest:
        kernel.fit(prior)
    assert largest.numel <= 7 * 60
    values = ((prior[:, None] - prior).square().sum(2) / -4.5).exp()
    torch.testing.assert_close(kernel.mean, values[off_diagonal(60)].mean())


# Lengths from the prior


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lengths_are_kept_in_the_state_and_load_exactly_into_an_unset_kernel(name, dtype):
    x, y = rows(5, 3), rows(6, 3)
    kernel, other = fitted(name, rows(50, 3, dtype=dtype)), KERNELS[name][0]()
    assert all(not value.isnan() for value in kernel.state_dict().values())
    other.load_state_dict(kernel.state_dict())
    other.fit(100 * rows(50, 3))
    assert torch.equal(other(x, y), kernel(x, y))


def test_a_state_with_a_length_does_not_load_where_a_length_was_given():
    with pytest.raises(RuntimeError, match=r"Unexpected key.*squared_length"):
        Gaussian(1.0).load_state_dict(fitted("gaussian", rows(9, 3)).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*squared_length"):
        Gaussian().load_state_dict(Gaussian(1.0).state_dict())


@every_kernel
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda k: pickle.loads(pickle.dumps(k))], ids=["deepcopy", "pickle"])
def test_copies_have_the_same_values_and_lengths_of_their_own(name, copied):
    x, y = rows(5, 3), rows(6, 3)
    kernel, unset = fitted(name, rows(50, 3)), KERNELS[name][0]()
    assert torch.equal(copied(kernel)(x, y), kernel(x, y))
    duplicate = copied(unset)
    duplicate.fit(rows(50, 3))
    kernels = [part for part in unset.modules() if hasattr(part, "is_set") and "squared_length" in part._buffers]
    assert not any(part.is_set for part in kernels)


# repr


@every_kernel
def test_a_repr_evaluates_to_an_equal_kernel(name):
    kernel, prior = KERNELS[name][0](), rows(50, 3)
    again = eval(repr(kernel))
    assert repr(again) == repr(kernel)
    kernel.fit(prior)
    again.fit(prior)
    x, y = rows(5, 3), rows(6, 3)
    assert torch.equal(again(x, y), kernel(x, y))


def test_compound_reprs_keep_their_precedence():
    x, y = rows(5, 3), rows(6, 3)
    a, b, c = Gaussian(1.0), Laplace(2.0), InverseMultiquadratic(3.0**0.5)
    for kernel in ((a + b) * c, a + b * c, 2.0 * (a + b), 2.0 * a + b, 2.0 * (a * b), a * (2.0 * b), (a + b) + c):
        torch.testing.assert_close(eval(repr(kernel))(x, y), kernel(x, y), rtol=1e-14, atol=0)


def test_kernels_of_users_have_a_repr_that_names_them():
    assert repr(FunctionKernel(torch.mm)).startswith("FunctionKernel(function=<built-in")
    assert repr(as_kernel(pyro_kernels.RBF(3))) == "ModuleKernel(function=RBF())"


# Kernels that users bring


def dot_product(x, y):
    return x @ y.mT


def test_any_callable_is_a_kernel():
    x, y = rows(5, 3), rows(6, 3)
    torch.testing.assert_close(as_kernel(dot_product)(x, y), x @ y.mT)
    assert as_kernel(lambda x, y: x.new_ones(len(x), len(y)))(x, y).sum() == 30
    kernel = Gaussian(1.0)
    assert as_kernel(kernel) is kernel


def test_a_function_enters_sums_and_survives_a_pickle():
    x, y = rows(5, 3), rows(6, 3)
    kernel = pickle.loads(pickle.dumps(2.0 * FunctionKernel(dot_product) + Gaussian(1.0)))
    torch.testing.assert_close(kernel(x, y), 2 * x @ y.mT + torch.exp(-(distances(x, y) ** 2) / 2))


def test_a_function_receives_plain_tensors_of_its_own_precision():
    seen = []

    def spy(x, y):
        seen.extend([x, y])
        return x @ y.mT

    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        as_kernel(spy)(rows(5, 3, dtype=dtype), rows(6, 3, dtype=dtype))
    assert [x.dtype for x in seen[::2]] == [torch.float32, torch.float32, torch.float64]
    assert all(type(x) is torch.Tensor for x in seen)


class Bilinear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(3, dtype=torch.float64))

    def forward(self, x, y):
        return x @ self.weight @ y.mT


@pytest.mark.parametrize("module", [Bilinear, lambda: pyro_kernels.RBF(3)], ids=["torch", "pyro"])
def test_a_module_is_frozen_and_passes_gradients_to_codes(module):
    kernel = as_kernel(module())
    assert isinstance(kernel, ModuleKernel)
    x = rows(5, 3).requires_grad_()
    kernel(x, rows(6, 3)).sum().backward()
    assert x.grad.abs().sum() > 0
    assert list(kernel.parameters())
    assert all(not p.requires_grad and p.grad is None for p in kernel.parameters())


@pytest.mark.parametrize(
    "theirs",
    [
        lambda: pyro_kernels.RBF(3, variance=lengthscale(2.0), lengthscale=lengthscale(1.3)),
        lambda: pyro_kernels.RBF(3, lengthscale=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)),
        lambda: pyro_kernels.Linear(3),
        lambda: pyro_kernels.Sum(pyro_kernels.RBF(3), pyro_kernels.Matern32(3, lengthscale=lengthscale(0.5))),
        lambda: pyro_kernels.Product(pyro_kernels.Exponential(3), pyro_kernels.Polynomial(3, degree=2)),
    ],
    ids=["rbf", "ard", "linear", "sum", "product"],
)
def test_pyro_kernels_keep_their_values_and_the_param_store_stays_empty(theirs):
    x, y = rows(11, 3), rows(7, 3)
    expected = theirs()(x, y).detach()
    pyro.clear_param_store()
    kernel = as_kernel(theirs())
    with poutine.trace(param_only=True) as captured:
        values = kernel(x, y)
    torch.testing.assert_close(values, expected)
    assert list(pyro.get_param_store().keys()) == []
    assert not captured.trace.nodes


def test_a_pyro_kernel_takes_no_notice_of_a_users_parameter_of_the_same_name():
    x, y = rows(11, 3), rows(7, 3)
    pyro.param("lengthscale", torch.tensor(100.0), constraint=dist.constraints.positive)
    pyro.param("variance", torch.tensor(7.0))
    kernel = as_kernel(pyro_kernels.RBF(3, lengthscale=lengthscale(0.5)))
    torch.testing.assert_close(kernel(x, y), torch.exp(-(distances(x, y) ** 2) / 0.5))
    assert pyro.param("lengthscale").item() == pytest.approx(100)
    assert pyro.param("variance").item() == 7


def test_pyro_kernels_leave_svi_its_own_parameters():
    """SVI finds what to step by an attribute of the parameters, which leaving a scope of the store takes away."""

    def code(x):
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        return dist.Normal(pyro.param("encoder", torch.tensor(0.5)) * x, scale).to_event(1)

    model, guide = program(code, output=lambda z: around(pyro.param("decoder", torch.tensor(1.0)) * z))
    kernels = [pyro_kernels.RBF(2, lengthscale=torch.tensor(s)) for s in (0.5, 4.0)]
    loss = WAELoss(MMD(as_kernel(kernels[0]) + as_kernel(kernels[1])))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss)
    before = None
    for _ in range(3):
        svi.step(torch.randn(20, 2))
        store = pyro.get_param_store()
        after = {name: value.item() for name, value in store.items()}
        assert set(after) == {"decoder", "encoder", "scale"}
        assert before is None or all(before[name] != after[name] for name in after)
        before = after
    assert all(isinstance(value.unconstrained, weakref.ref) for value in store.values())
    assert [kernel.lengthscale.item() for kernel in kernels] == pytest.approx([0.5, 4.0])


# Errors


SHAPES = r"Gaussian\(x, y\) takes x of shape \(n, d\).*found \(.*x\.flatten\(1\)"
NO_SPREAD = r"total variance of {},.*Laplace\(bandwidth=None\)\. Give the length"
PAIRS = r"must return shape \(5, 6\), found {}\. Return one value for each pair"
UNSET = r"has no length yet\. Give one, as in \w+\(bandwidth=1\.0\).*kernel\.fit\(prior\)"
XY, WHOLE = (torch.zeros(5, 3), torch.zeros(6, 3)), torch.arange(6).view(3, 2)


def fit_a_sum(prior):
    Gaussian(1.0).fit(prior)  # which has its length
    (Gaussian(1.0) + Laplace()).fit(prior)


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        (Gaussian(1.0), (torch.zeros(4), torch.zeros(5, 3)), SHAPES),
        (Gaussian(1.0), (torch.zeros(4, 3), torch.zeros(5, 2)), SHAPES),
        (Gaussian(1.0), (torch.zeros(2, 4, 3), torch.zeros(5, 3)), SHAPES),
        (Gaussian(1.0), (WHOLE, WHOLE), r"takes floats, found torch\.int64 and torch\.int64\. Write x\.float\(\)"),
        (fit_a_sum, (torch.ones(9, 3),), NO_SPREAD.format("0")),
        (fit_a_sum, (torch.full((9, 3), math.nan),), NO_SPREAD.format("nan")),
        (fit_a_sum, (torch.tensor([[0.0], [math.inf]]),), NO_SPREAD.format("nan")),
        (Gaussian().fit, (torch.zeros(1, 3),), "at least 2 prior samples, found 1"),
        (Gaussian().fit, (torch.tensor(1.0),), "at least 2 prior samples, found 1"),
        (as_kernel(lambda x, y: (x @ y.mT).sum()), XY, PAIRS.format(r"shape \(\)")),
        (as_kernel(lambda x, y: y @ x.mT), XY, PAIRS.format(r"shape \(6, 5\)")),
        (as_kernel(lambda x, y: x.sum(1)), XY, PAIRS.format(r"shape \(5,\)")),
        (as_kernel(lambda x, y: 1.0), XY, PAIRS.format("float")),
        *((kernel(), XY, UNSET) for kernel in LENGTHS),
    ],
)
def test_what_does_not_fit_is_named_with_the_line_to_write(call, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(*arguments)


@pytest.mark.parametrize("other", [[[0.0, 1.0]], np.ones((4, 2)), None, 3])
def test_what_is_no_tensor_is_named_with_the_line_to_write(other):
    x = torch.zeros(4, 2)
    for arguments, name in (((other, x), "x"), ((x, other), "y")):
        with pytest.raises(TypeError, match=rf"Laplace's {name} must be a tensor.* Write torch\.as_tensor\({name}\)"):
            Laplace(1.0)(*arguments)
    with pytest.raises(TypeError, match=r"prior must be a dense tensor.* Write kernel\.fit\("):
        Laplace().fit(other)


@pytest.mark.parametrize(
    "held", [lambda x: x.numpy(), lambda x: x.tolist(), lambda x: x.to_sparse()], ids=["a", "l", "s"]
)
def test_the_line_to_write_for_prior_samples_that_are_no_dense_tensor_serves(held):
    prior, (kernel, expected) = torch.randn(9, 3), (Gaussian(), Gaussian())
    with pytest.raises(TypeError, match="found") as raised:
        kernel.fit(held(prior))
    exec(
        str(raised.value).partition("Write ")[2].removesuffix("."),
        {"kernel": kernel, "torch": torch, "prior": held(prior)},
    )
    expected.fit(prior)
    torch.testing.assert_close(kernel.squared_length, expected.squared_length)


@pytest.mark.parametrize("lengths", [0.5, None, "abc", [], (-0.5,), (0.0,), (math.nan,), torch.tensor(2.0)])
def test_lengths_of_several_scales_are_positive_numbers(lengths):
    with pytest.raises((TypeError, ValueError), match=r"Laplace's lengths must be .*found .* Write lengths=\(0\.05, "):
        Laplace.multiscale(lengths=lengths)


@pytest.mark.parametrize("lengths", [(0.05, 0.15, 0.5, 5.0), (1e-7,), (3.3e-6, 2.0), torch.tensor([0.5, 2.0])])
def test_several_scales_are_those_of_their_lengths(lengths):
    origin, kernel = torch.zeros(1, 1, dtype=torch.float64), Laplace.multiscale(1.0, lengths)
    for distance in (1e-7, 3e-6, 1.0):
        expected = sum(math.exp(-distance / float(s)) for s in lengths)
        assert kernel(origin, origin + distance).item() == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_nan_is_no_label_of_its_own():
    labels = torch.tensor([[0.0], [float("nan")], [1.0]])
    found = SameLabel()(labels, labels)
    assert found[1].isnan().all()
    assert found[0, [0, 2]].tolist() == [1, 0]
