"""A penalty for each site, for groups of sites by a tuple of names or a star, and what each of them receives."""

from __future__ import annotations

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import delta, normal, sites
from pyro import poutine
from references import Seen

from pyro_wae import WAELoss
from pyro_wae.kernels import Gaussian
from pyro_wae.penalties import MMD

N, SIZES = 20, {"a": 1, "b": 2, "c": 3}


def x_of(n=N):
    return torch.randn(n, sum(SIZES.values()), dtype=torch.float64)


def model(x, scales=(1.0, 1.0, 1.0)):
    """Sites a, b, c with their means at 100, 200 and 300, so that a prior draw tells where it comes from."""
    with pyro.plate("data", len(x)):
        parts = []
        for i, (name, size) in enumerate(SIZES.items(), 1):
            with poutine.scale(scale=scales[i - 1]):
                parts.append(pyro.sample(name, dist.Normal(x.new_full((size,), 100.0 * i), 1).to_event(1)))
        pyro.sample("x", dist.Normal(torch.cat(parts, -1), 1).to_event(1), obs=x)


def columns_of(x, names):
    parts = dict(zip(SIZES, x.split(list(SIZES.values()), -1), strict=True))
    return torch.cat([parts[name] for name in SIZES if name in names], -1)


_, guide = sites({name: (None, lambda x, name=name: delta(columns_of(x, name))) for name in SIZES})


@pytest.mark.parametrize("key", [("a", "c"), ("c", "a"), ("b", "c"), ("b",), ("a", "b", "c")], ids="-".join)
def test_a_tuple_compares_the_joint_code_of_its_sites_in_the_models_order(key):
    x, capture = x_of(), Seen(1.0)
    rest = {name: None for name in SIZES if name not in key}
    WAELoss({key: capture, **rest}).loss(model, guide, x)
    torch.testing.assert_close(capture.codes[0], columns_of(x, key))
    means = columns_of(torch.tensor([100.0, 200, 200, 300, 300, 300]), key)
    assert capture.prior.shape == (N, len(means))
    torch.testing.assert_close((capture.prior / 100).round(), means.expand(N, -1).double() / 100)
    assert list(capture.context.sites) == [name for name in SIZES if name in key]


def test_a_tuple_of_all_sites_is_the_joint_penalty():
    x, penalty = x_of(), MMD(Gaussian(3.0))
    values = []
    for option in (penalty, {("c", "b", "a"): penalty}):
        pyro.set_rng_seed(1)
        values.append(WAELoss(option).loss(model, guide, x))
    assert values[0] == values[1]


def test_a_site_may_be_in_several_groups_and_the_values_add():
    first, second, third = Seen(1.0), Seen(10.0), Seen(100.0)
    loss = WAELoss({("a", "b"): first, ("b", "c"): second, "b": third})
    loss.loss(model, guide, x_of())
    assert loss.terms.penalty.item() == 111
    assert {name: value.item() for name, value in loss.terms.penalties.items()} == {"a-b": 1, "b-c": 10, "b": 100}
    assert loss.terms.as_dict() == pytest.approx(
        loss.terms.as_dict() | {"penalty": 111, "penalty/a-b": 1, "penalty/b-c": 10, "penalty/b": 100}
    )


def test_the_scale_of_a_group_is_that_of_its_sites():
    loss = WAELoss({("a", "b"): Seen(1.0), "c": Seen(10.0)})
    loss.loss(model, guide, x_of(), (2.0, 2.0, 3.0))
    assert {name: value.item() for name, value in loss.terms.penalties.items()} == {"a-b": 2, "c": 30}
    with pytest.raises(ValueError, match=r"different scales \('b': 2, 'c': 3\).*{'b': MMD\(\), 'c': MMD\(\), \.\.\.}"):
        WAELoss({"a": Seen(1.0), ("b", "c"): Seen(1.0)}).loss(model, guide, x_of(), (2.0, 2.0, 3.0))


def test_the_line_for_sites_of_different_scales_names_them_and_runs():
    with pytest.raises(ValueError, match="different scales") as raised:
        WAELoss().loss(model, guide, x_of(), (2.0, 3.0, 4.0))
    line = str(raised.value).rpartition("each: ")[2].removesuffix(".")
    assert line == "WAELoss({'a': MMD(), 'b': MMD(), 'c': MMD()})"
    eval(line).loss(model, guide, x_of(), (2.0, 3.0, 4.0))


def test_masked_data_of_a_group_are_those_that_all_its_sites_mask():
    x, capture, alone, whole = x_of(), Seen(1.0), Seen(1.0), Seen(1.0)

    def masked(count, size):
        return lambda x, *_: dist.Normal(x.new_zeros(size), 1).mask(torch.arange(N)[:, None] < count).to_event(1)

    priors = {"a": (masked(5, 1), None), "b": (masked(8, 2), None), "c": (lambda x, *_: normal(x, 3), None)}
    WAELoss({("a", "b"): capture, "a": alone, "c": whole}).loss(sites(priors)[0], guide, x)
    expected = columns_of(x, ("a", "b"))[:8].clone()
    expected[5:, 0] = 0
    torch.testing.assert_close(capture.codes[0], expected)
    torch.testing.assert_close(capture.context.kept()[0], expected != 0)
    assert capture.prior.shape == (8, 3)
    assert (capture.prior[5:, 0] == 0).all()
    assert (capture.prior[:5] != 0).all()
    torch.testing.assert_close(alone.codes[0], x[:5, :1])
    torch.testing.assert_close(whole.codes[0], x[:, 3:])


def scalar_sites(names):
    """Sites of these names, whose codes are the columns of the data."""
    latents = {
        name: (lambda x, *_: dist.Normal(0.0, 1), lambda x, i=i: dist.Delta(x[:, i])) for i, name in enumerate(names)
    }
    return sites(latents, lambda *z: dist.Normal(sum(z), 1), observed=lambda x: x[:, 0])


def test_a_star_stands_for_all_sites_of_that_name():
    x, steps, style = torch.randn(N, 6), Seen(1.0), Seen(1.0)
    loss = WAELoss({"z_*": steps, ("s*e",): style})
    for count in (5, 2):
        programs = scalar_sites([*(f"z_{t}" for t in range(count)), "style"])
        loss.loss(*programs, x)
        torch.testing.assert_close(steps.codes[0], x[:, :count])
        torch.testing.assert_close(style.codes[0], x[:, count : count + 1])
        assert list(loss.terms.penalties) == ["z_*", "s*e"]
    with pytest.raises(ValueError, match="no entry for the latent site 'style'"):
        WAELoss({"z_*": steps}).loss(*programs, x)
    with pytest.raises(ValueError, match=r"names 'y_\*', which is no latent site"):
        WAELoss({"z_*": steps, "style": style, "y_*": steps}).loss(*programs, x)


def test_one_penalty_for_two_sites_is_refused():
    with pytest.raises(ValueError, match=r"'a' and 'c' one MMD, .* WAELoss\(\{'a': MMD\(\), 'c': MMD\(\)\}\)"):
        WAELoss({"b": None, **dict.fromkeys("ac", MMD())})


def test_one_penalty_without_a_state_serves_several_sites():
    values = []
    for penalty in (dict.fromkeys("ac", MMD(Gaussian(1.0))), {name: MMD(Gaussian(1.0)) for name in "ac"}):
        pyro.set_rng_seed(0)
        values.append(WAELoss({"b": None, **penalty}, penalty_weight=1.0).loss(model, guide, x_of()))
    assert values[0] == values[1]


def test_only_a_star_is_special_in_a_name():
    names = ["z[0]", "z.0", "z_0", "z?", "z_01"]
    x, captures = torch.randn(N, len(names)), {name: Seen(1.0) for name in names}
    WAELoss(captures).loss(*scalar_sites(names), x)
    for i, name in enumerate(names):
        torch.testing.assert_close(captures[name].codes[0], x[:, i : i + 1])


@pytest.mark.parametrize(
    ("penalty", "message"),
    [
        ({("a", "b"): MMD()}, "no entry for the latent site 'c'"),
        ({("a", "b"): MMD(), ("c", "d"): MMD()}, "names 'd', which is no latent site; these are ['a', 'b', 'c']"),
        ({("a", "x"): MMD()}, "names 'x', which is no latent site"),
    ],
)
def test_a_group_of_wrong_sites_is_refused_by_name(penalty, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WAELoss(penalty).loss(model, guide, x_of())


@pytest.mark.parametrize("key", [(), ("a", 1), 3, frozenset({"a"}), None], ids=repr)
def test_a_key_that_is_no_name_is_refused(key):
    with pytest.raises(TypeError, match=r"name or a tuple of names, found .*Write penalty=\{'z1': MMD\(\), \('z2'"):
        WAELoss({key: MMD()})


def test_groups_that_are_all_free_are_refused():
    with pytest.raises(ValueError, match=r"leaves every latent site free \(\('a', 'b'\), 'c'\)"):
        WAELoss({("a", "b"): None, "c": None})


def test_modules_of_groups_have_valid_names_of_their_own():
    penalties = {"a.b": MMD(), "a_b": MMD(), "a_b_": MMD(), ("a", "b"): MMD(), ("a.b", "c"): MMD(), "z_*": MMD()}
    names = [name for name, _ in WAELoss(penalties).named_children() if name.startswith("penalty")]
    assert len(set(names)) == len(penalties)
    wae = WAELoss(penalties)(model, guide)  # an nn.Module, which refuses a dot
    assert {name for name, _ in wae.named_children()} >= set(names)


# A stack: a penalty at the deepest code, a cost at the others


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up1, self.up2, self.down1, self.down2 = (
            torch.nn.Linear(*sizes).double() for sizes in ((6, 3), (3, 2), (3, 6), (2, 3))
        )

    def model(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(2), 1).to_event(1))
            from_z2 = dist.Normal(self.down2(z2), 0.1).to_event(1)
            z1 = pyro.sample("z1", from_z2)
            with poutine.scale(scale=0.5):
                pyro.sample("z1_cost", from_z2, obs=z1)
            pyro.sample("x", dist.Normal(self.down1(z1), 1).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Delta(self.up1(x)).to_event(1))
            pyro.sample("z2", dist.Delta(self.up2(z1)).to_event(1))


def test_a_stack_has_a_penalty_at_the_deepest_code_and_a_cost_at_the_other():
    net, x, capture = Stack(), x_of(), Seen(0.0)
    loss = WAELoss({"z2": capture, "z1": None})
    loss.loss_and_grads(net.model, net.guide, x)
    z1 = net.up1(x)
    z2 = net.up2(z1)
    torch.testing.assert_close(capture.codes[0], z2)
    assert capture.prior.shape == (N, 2)
    expected = (x - net.down1(z1)).square().sum(1).mean() + 0.5 * (z1 - net.down2(z2)).square().sum(1).mean()
    assert loss.terms.cost.item() == pytest.approx(expected.item())
    for name, gradient in zip(
        dict(net.named_parameters()), torch.autograd.grad(expected, list(net.parameters())), strict=True
    ):
        torch.testing.assert_close(net.get_parameter(name).grad, gradient)
