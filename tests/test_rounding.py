"""What is left of an ascent in 16 bits: against a transcription, against the steps themselves, and in closed form."""

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lookbehind_fused import SAM
from lookbehind_fused.analysis import EffectivePerturbation, effective_perturbation
from tests.conftest import assert_equal, assert_same_state
from tests.test_analysis import NOT_NUMBERS, Network, Weights, batches, snapshot

BALLS = [(False, 0.01), (True, 0.0), (True, 0.3)]


def figures(before: Tensor, after: Tensor, eps: Tensor) -> EffectivePerturbation:
    """By their definitions, from vectors."""
    seen = (after - before).double()
    cosine = torch.dot(seen, eps) / (seen.norm() * eps.norm())
    return EffectivePerturbation((seen != 0).double().mean().item(), cosine.item(), (seen.norm() / eps.norm()).item())


def assert_figures(found: EffectivePerturbation, expected: EffectivePerturbation, tolerance: float = 1e-12) -> None:
    """The share is a count; ``tolerance`` is relative, for sums of a few hundred float64 numbers in another order."""
    assert found.share_changed == expected.share_changed
    assert found == pytest.approx(expected, rel=tolerance)
    assert all(type(figure) is float for figure in found)


def with_gradients(dtype: torch.dtype) -> Network:
    """A frozen tensor and one that the loss does not reach have none."""
    model = Network(dtype)
    model.zero_grad()
    cross_entropy(model(batches(9, dtype=dtype)[0][0]), batches(9)[0][1]).backward()
    assert [p.grad is None for p in model.parameters()].count(True) == 2
    return model


def vectors(model: nn.Module) -> tuple[Tensor, Tensor]:
    """All weights that have a gradient, and all gradients, in float64."""
    reached = [p for p in model.parameters() if p.grad is not None]
    w, g = (torch.cat([x.detach().flatten().double() for x in of]) for of in (reached, [p.grad for p in reached]))
    return w, g


def perturbation(w: Tensor, g: Tensor, rho: float, adaptive: bool, eta: float) -> Tensor:
    T = w.abs() + eta if adaptive else torch.ones_like(w)
    return rho * T * T * g / ((T * g).norm() + 1e-16)


@pytest.mark.parametrize(("adaptive", "eta"), BALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_transcription(own, dtype, adaptive, eta):
    model = with_gradients(own)
    w, g = vectors(model)
    eps = perturbation(w, g, 0.01, adaptive, eta)
    before, after = (x.to(own).to(dtype).double() for x in (w, w + eps))
    found = effective_perturbation(model, rho=0.01, adaptive=adaptive, eta=eta, dtype=dtype)
    assert_figures(found, figures(before, after, eps))
    if dtype == torch.bfloat16 or own == torch.bfloat16:
        assert 0 < found.share_changed < 0.95


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("own", [torch.float64, torch.bfloat16], ids=str)
def test_it_is_what_an_ascent_leaves_to_be_cast(backend, own, adaptive):
    model = with_gradients(own)
    eps = perturbation(*vectors(model), 0.02, adaptive, 0.1)
    found = effective_perturbation(model, rho=0.02, adaptive=adaptive, eta=0.1)
    reached = [p for p in model.parameters() if p.grad is not None]
    optimizer = SAM(reached, torch.optim.SGD, rho=0.02, adaptive=adaptive, eta=0.1, lr=0.1, backend=backend)
    before = torch.cat([p.detach().flatten().bfloat16() for p in reached])
    optimizer.ascent_step()
    after = torch.cat([p.detach().flatten().bfloat16() for p in reached])
    # bfloat16 parameters ascend in float32; none of these few is so near a tie that it is rounded another way
    assert_figures(found, figures(before.double(), after.double(), eps))


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, (0.1535, 0.3117, 3.2)), (torch.float16, (0.556, 0.7897, 1.266))], ids=str
)
def test_of_a_random_direction_little_is_left(dtype, expected):
    """A million weights in place of ten, with the same perturbation of each: rho = 0.05 for ten millions. Other weights
    give figures that differ by up to 0.006 of them. The seed that torch was given is the direction's too, which is
    another one than the weights all the same.
    """
    weights = Weights(0.045 * torch.randn(1_000_000))
    found = effective_perturbation(weights, rho=0.05 / math.sqrt(10), dtype=dtype, direction="random")
    assert found == pytest.approx(expected, rel=0.01)
    assert found.cosine * found.length_ratio == pytest.approx(1, abs=0.02)  # rounding is noise around the eps meant


def test_a_step_to_the_neighbour_or_none():
    """Above 1, bfloat16 has steps of 2^-7: what is less than half of one is lost, what is more becomes a whole one."""
    weights = Weights(torch.ones(16))
    weights.w.grad = torch.full((16,), 7.0)  # of any length
    assert effective_perturbation(weights, rho=4 * 0.0039) == (0.0, 0.0, 0.0)
    found = effective_perturbation(weights, rho=4 * 0.004)
    assert found == pytest.approx((1.0, 1.0, 2**-7 / 0.004), rel=1e-14)
    assert found.cosine <= 1


def test_only_what_is_cast_is_rounded():
    model = with_gradients(torch.float32)
    linear = [*model.first.parameters(), *model.square.parameters(), *model.last.parameters()]
    w, g = vectors(model)
    eps = perturbation(w, g, 0.01, False, 0.0)
    is_cast = torch.cat([torch.full((p.numel(),), p in set(linear)) for p in model.parameters() if p.grad is not None])
    before, after = (x.float() for x in (w, w + eps))
    before, after = (torch.where(is_cast, x.bfloat16().float(), x) for x in (before, after))
    found = effective_perturbation(model, rho=0.01, cast=iter(linear))
    # w + eps - w in float32 cancels in the transcription as in what is measured
    assert_figures(found, figures(before.double(), after.double(), eps))
    assert found.cosine > effective_perturbation(model, rho=0.01).cosine
    assert effective_perturbation(model, rho=0.01, cast=[]) == effective_perturbation(
        model, rho=0.01, dtype=torch.float32
    )


def test_the_scale_and_the_layout_of_gradients_do_not_matter():
    weights = Weights(torch.randn(6, 8, 2, 2).to(memory_format=torch.channels_last))
    weights.empty = nn.Parameter(torch.empty(0, 3))
    weights.empty.grad = torch.empty(0, 3)
    g = torch.randn(6, 8, 2, 2)
    weights.w.grad = g
    expected = effective_perturbation(weights, rho=0.05)
    assert 0.2 < expected.share_changed < 0.9
    for other in (g.to(memory_format=torch.channels_last), 2.0**16 * g, g.to_sparse()):
        weights.w.grad = other
        assert effective_perturbation(weights, rho=0.05) == pytest.approx(expected, rel=1e-14)


def test_gradients_of_zero_and_such_as_are_not_finite_and_weights_that_overflow():
    weights = Weights(torch.randn(8))
    weights.w.grad = torch.zeros(8)
    assert effective_perturbation(weights, rho=0.1) == (0.0, 0.0, 0.0)
    for bad in (math.inf, math.nan):
        weights.w.grad = torch.ones(8)
        weights.w.grad[3] = bad
        assert all(math.isnan(figure) for figure in effective_perturbation(weights, rho=0.1))
    weights = Weights(torch.tensor([1.0, 1e5]))
    weights.w.grad = torch.ones(2)
    found = effective_perturbation(weights, rho=1.0, dtype=torch.float16)
    assert found.share_changed == 0.5
    assert math.isnan(found.cosine)
    assert math.isnan(found.length_ratio)


def test_a_random_direction_follows_its_seed_and_needs_no_gradient():
    model = with_gradients(torch.float32)
    one, again, other = (effective_perturbation(model, rho=0.1, direction="random", seed=s) for s in (1, 1, 2))
    assert one == again != other
    model.zero_grad()
    assert effective_perturbation(model, rho=0.1, direction="random", seed=1) == one


@pytest.mark.parametrize("direction", ["gradient", "random"])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_moved_and_autocast_changes_nothing(direction, own):
    model = with_gradients(own)
    x = batches(9, dtype=own)[0][0]
    before, versions = snapshot(model), [p._version for p in model.parameters()]
    plain = effective_perturbation(model, rho=0.05, direction=direction)
    assert_same_state(snapshot(model), before)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = copy.deepcopy(model).eval()(x)
        kept = model.eval()(x)  # leaves its casts in autocast's cache
        assert effective_perturbation(model, rho=0.05, direction=direction) == plain
        assert_equal("outputs", model(x), kept)
        assert_equal("outputs", outputs, kept)
    assert [p._version for p in model.parameters()] == versions
    model.train()
    model.last.eval()
    assert_same_state(snapshot(model), before)


BAD = [
    *[("rho", x, "rho: expected a finite number > 0, got") for x in (*NOT_NUMBERS, 0)],
    ("eta", -1, "eta: expected a finite number >= 0, got -1"),
    ("adaptive", 1, "adaptive: expected True or False, got 1"),
    *[
        ("dtype", x, f"dtype: expected torch.bfloat16, float16, float32 or float64, got {x!r}")
        for x in (torch.int8, torch.float8_e4m3fn, "bfloat16", None)
    ],
    ("direction", "loss", 'direction: expected "gradient" or "random", got \'loss\''),
    *[("seed", x, "seed: expected an int >= 0, got") for x in (-1, 0.5, None)],
    ("cast", 3, "cast: expected None or parameters of the model, got 3"),
    ("cast", ["w"], "cast[0]: expected a parameter of the model, got 'w'"),
    ("cast", [torch.ones(2)], "cast[0]: expected a parameter of the model, got shape (2,), float32, cpu"),
    ("model", 3, "model: expected a torch.nn.Module, got 3"),
    ("model", nn.Tanh(), "model: expected a module with parameters"),
    ("model", nn.LazyLinear(3), "parameter 0 'weight': expected an initialized parameter"),
    ("model", nn.Linear(2, 2), "model: expected a parameter with a gradient, from loss.backward(), got none"),
]


@pytest.mark.parametrize(("argument", "value", "message"), BAD)
def test_bad_arguments_are_named(argument, value, message):
    model = with_gradients(torch.float32)
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        effective_perturbation(**{"model": model, "rho": 0.1, argument: value})
    assert_same_state(snapshot(model), before)


def test_a_random_direction_of_frozen_parameters_is_refused():
    with pytest.raises(ValueError, match="model: expected a parameter that requires a gradient, got none"):
        effective_perturbation(nn.Linear(2, 2).requires_grad_(False), rho=0.1, direction="random")
