"""Measurements of a trained model, each against brute force written out here; and the model as it was afterwards."""

import copy
import math
import re
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lookbehind_fused import analysis
from tests.conftest import assert_close, assert_equal, assert_same_state

TOLERANCE = 1e-12
BALLS = [(False, 0.01), (True, 0.0), (True, 0.3)]


class Shifted(nn.modules.batchnorm._BatchNorm):
    """A BatchNorm of its own class, with a momentum that is not the default."""

    def _check_input_dim(self, x: Tensor) -> None:
        assert x.dim() == 2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1


class Network(nn.Module):
    """BatchNorm, dropout; a frozen tensor, an expanded one, one that the loss does not reach, one used twice."""

    def __init__(self, dtype: torch.dtype = torch.float64, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = norm(6, momentum=0.3)
        self.dropout = nn.Dropout(0.5)
        self.square = nn.Linear(6, 6, bias=False)
        self.last = nn.Linear(6, 3)
        self.unused = nn.Parameter(torch.randn(5))
        self.tied = self.square.weight
        self.first.bias.requires_grad_(False)
        self.to(dtype)
        self.register_buffer("expanded", torch.ones(1, dtype=dtype).expand(3))
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.num_batches_tracked.fill_(7)
        self.last.eval()  # modes differ from module to module
        self.first.weight.grad = torch.randn_like(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(torch.tanh(self.norm(self.first(x))))
        return self.last(torch.tanh(self.square(self.square(x)))) * self.expanded


def batches(*sizes: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(n, 4, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


def snapshot(model: nn.Module) -> dict:
    """Everything that a measurement has to leave alone."""
    return {
        "state": copy.deepcopy(model.state_dict()),
        "identities": [id(x) for x in (*model.parameters(), *model.buffers())],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [(id(p.grad), p.grad if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "momentum": [getattr(module, "momentum", None) for module in model.modules()],
        "random": torch.get_rng_state(),
    }


def gradients(model: nn.Module, x: Tensor, y: Tensor, loss_fn=cross_entropy) -> list[Tensor | None]:
    """By ``backward`` on a copy of the model."""
    model.zero_grad()
    loss_fn(model(x), y).backward()
    return [p.grad for p in model.parameters()]


def moved(model: nn.Module, grads: list[Tensor | None], radius: float, adaptive: bool, eta: float) -> nn.Module:
    """A copy of the model at ``w + radius * T^2 g / (||T g|| + 1e-16)``, one parameter after another."""
    new = copy.deepcopy(model)
    square = 0.0
    for p, g in zip(model.parameters(), grads, strict=True):
        if g is not None:
            square += (((p.abs() + eta) if adaptive else 1.0) * g).square().sum().item()
    with torch.no_grad():
        for p, g in zip(new.parameters(), grads, strict=True):
            if g is not None:
                scaling = (p.abs() + eta) if adaptive else torch.ones_like(p)
                p += radius * scaling * scaling * g / (math.sqrt(square) + 1e-16)
    return new


def in_eval(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval()


# ---- sharpness -------------------------------------------------------------------------------------------------------


@pytest.mark.sample(6)
@pytest.mark.parametrize(("adaptive", "eta"), BALLS)
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, Shifted])
@pytest.mark.parametrize("m", [None, 2])
def test_sharpness_is_what_a_loop_over_parameters_finds(adaptive, eta, norm, m):
    model, loader, radii = Network(norm=norm), batches(6, 4, 8), [0.03, 0.5]
    by_hand, examples = torch.zeros(2, dtype=torch.float64), 0
    for x, y in loader:
        for start in range(0, len(x), m or len(x)):
            a, b = x[start : start + (m or len(x))], y[start : start + (m or len(x))]
            plain = in_eval(model)
            grads = gradients(plain, a, b)
            for i, radius in enumerate(radii):
                behind = moved(plain, grads, radius, adaptive, eta)
                by_hand[i] += len(a) * (cross_entropy(behind(a), b) - cross_entropy(plain(a), b)).item()
            examples += len(a)
    found = analysis.sharpness(model, cross_entropy, loader, radii, adaptive=adaptive, eta=eta, m=m)
    assert found.dtype == torch.float64
    assert_close("sharpness", found, by_hand / examples, TOLERANCE)


class Weights(nn.Module):
    """A vector of weights; what comes in does not matter."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.w


def quadratic(n: int = 6) -> tuple[Tensor, Tensor]:
    """A symmetric positive definite A and a w."""
    root = torch.randn(n, n, dtype=torch.float64)
    return root @ root.T + torch.eye(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)


def test_sharpness_of_a_quadratic_has_a_closed_form():
    """L = w'Aw / 2, g = Aw, L(w + rho g / |g|) - L(w) = rho |g| + rho^2 g'Ag / (2 g'g)."""
    A, w = quadratic()
    g, radii = A @ w, [1e-3, 0.1, 2.0]
    expected = torch.stack([r * g.norm() + r**2 * (g @ A @ g) / (2 * (g @ g)) for r in radii])
    found = analysis.sharpness(Weights(w), lambda w, _: 0.5 * w @ A @ w, batches(3), radii)
    assert_close("sharpness", found, expected, 1e-11)  # a difference of losses: digits cancel at the smallest radius


@pytest.mark.parametrize("adaptive", [False, True])
def test_no_random_direction_of_the_ball_beats_the_ascent(adaptive):
    model, loader, radius, eta = Network(), batches(8), 1e-3, 0.1
    found = analysis.sharpness(model, cross_entropy, loader, [radius], adaptive=adaptive, eta=eta).item()
    (x, y), plain = loader[0], in_eval(model)
    reached = [p for p, g in zip(plain.parameters(), gradients(plain, x, y), strict=True) if g is not None]
    start = [p.detach().clone() for p in reached]
    scaling = [w.abs() + eta if adaptive else torch.ones_like(w) for w in start]
    best = -math.inf
    with torch.no_grad():
        base = cross_entropy(plain(x), y).item()
        for _ in range(1000):
            direction = [torch.randn_like(w) for w in start]
            length = torch.stack([d.square().sum() for d in direction]).sum().sqrt()
            for p, w, t, d in zip(reached, start, scaling, direction, strict=True):
                p.copy_(w + radius * t * d / length)  # ||eps / T|| = radius
            best = max(best, cross_entropy(plain(x), y).item() - base)
    assert 0 < best < found


def test_float32_is_computed_in_float32_and_bfloat16_perturbs_from_float32():
    """One ascent of the same model: float32 agrees to its precision, bfloat16 weights are the rounded float64 ones."""
    model = Network()
    for dtype in (torch.float32, torch.bfloat16):
        low, seen = copy.deepcopy(model).to(dtype), []
        probe = low.first.weight

        def loss_fn(outputs: Tensor, targets: Tensor, probe: Tensor = probe, seen: list[Tensor] = seen) -> Tensor:
            seen.append(probe.detach().clone())
            return cross_entropy(outputs, targets)

        loader = batches(6, dtype=dtype)
        analysis.sharpness(low, loss_fn, loader, [0.5])
        grads = gradients(in_eval(low), *loader[0])
        expected = moved(
            copy.deepcopy(low).double(), [g if g is None else g.double() for g in grads], 0.5, False, 0.0
        ).first.weight
        assert_equal("at the weights", seen[0], probe.detach())
        assert seen[1].dtype == dtype
        # half a unit in the last place from rounding, and as much again from the float32 arithmetic before it
        assert_close(f"perturbed {dtype}", seen[1], expected, torch.finfo(dtype).eps)


# ---- noise -----------------------------------------------------------------------------------------------------------


def accuracy(model: nn.Module, loader: list[tuple[Tensor, Tensor]]) -> float:
    right = torch.cat([model(x).argmax(1) == y for x, y in loader])
    return right.double().mean().item()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, Shifted])
@pytest.mark.parametrize("statistics", ["none", "inputs", "pairs"])
def test_noise_robustness_is_what_a_loop_finds(norm, statistics):
    model, loader, levels = Network(norm=norm), batches(40, 31), [0.0, 0.4, 1.5]
    seen = batches(12, 20, 5)
    given = {"none": None, "inputs": [x for x, _ in seen], "pairs": seen}[statistics]
    found = analysis.noise_robustness(model, loader, levels, samples=3, statistics_loader=given, seed=11)
    generator, expected = torch.Generator().manual_seed(11), torch.zeros(3, 3, dtype=torch.float64)
    for sample in range(3):
        noise = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
        for i, level in enumerate(levels):
            noisy = in_eval(model)
            with torch.no_grad():
                for p, xi in zip(noisy.parameters(), noise, strict=True):
                    p *= 1 + level * xi
            if given is not None:
                with torch.no_grad():
                    hidden = [noisy.first(x) for x, _ in seen]
                    noisy.norm.running_mean = torch.stack([h.mean(0) for h in hidden]).mean(0)
                    noisy.norm.running_var = torch.stack([h.var(0, unbiased=True) for h in hidden]).mean(0)
            expected[i, sample] = accuracy(noisy, loader)
    assert_equal("accuracy", found, expected)
    assert found[0].unique().numel() == 1
    assert found[1:].unique().numel() > 2


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, Shifted])
def test_statistics_are_the_mean_of_those_of_the_batches(norm):
    """Seen in the accuracy's forward passes themselves."""
    model, seen, found = Network(norm=norm), batches(12, 20, 5), []

    def record(module: nn.Module, *_) -> None:
        if not module.training:
            found.append((module.running_mean.clone(), module.running_var.clone()))

    model.norm.register_forward_hook(record)
    dropping = []
    model.dropout.register_forward_hook(lambda module, *_: dropping.append(module.training))
    analysis.noise_robustness(model, batches(4), [0.0], samples=1, statistics_loader=seen)
    with torch.no_grad():
        hidden = [model.first(x) for x, _ in seen]
    ((mean, var),) = found
    assert_close("mean", mean, torch.stack([h.mean(0) for h in hidden]).mean(0), TOLERANCE)
    assert_close("variance", var, torch.stack([h.var(0, unbiased=True) for h in hidden]).mean(0), TOLERANCE)
    assert dropping == [False] * 4


def test_noise_follows_the_seed_and_is_the_same_for_all_levels():
    model, loader = Network(), batches(200)
    both = analysis.noise_robustness(model, loader, [0.5, 1.0], samples=4, seed=1)
    assert_equal("again", analysis.noise_robustness(model, loader, [0.5, 1.0], samples=4, seed=1), both)
    assert_equal("a level alone", analysis.noise_robustness(model, loader, [1.0], samples=4, seed=1)[0], both[1])
    assert not torch.equal(analysis.noise_robustness(model, loader, [0.5, 1.0], samples=4, seed=2), both)


# ---- alignment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("adaptive", "eta"), BALLS)
@pytest.mark.parametrize("k", [1, 3])
def test_gradient_alignment_is_what_a_loop_finds(adaptive, eta, k):
    model, loader = Network(), batches(6, 9)
    expected = torch.zeros(k + 1, k + 1, dtype=torch.float64)
    for x, y in loader:
        behind, vectors = in_eval(model), []
        for i in range(k + 1):
            grads = gradients(behind, x, y)
            vectors.append(torch.cat([g.flatten() for g in grads if g is not None]))
            if i < k:
                behind = moved(behind, grads, 0.4, adaptive, eta)
        for i, a in enumerate(vectors):
            for j, b in enumerate(vectors):
                expected[i, j] += torch.dot(a, b).item() / (a.norm() * b.norm()).item() / len(loader)
    found = analysis.gradient_alignment(model, cross_entropy, loader, rho=0.4, k=k, adaptive=adaptive, eta=eta)
    assert found.dtype == torch.float64
    assert_close("alignment", found, expected, TOLERANCE)
    assert_close("transposed", found.T, found, 1e-15)
    assert_close("diagonal", found.diagonal(), torch.ones(k + 1, dtype=torch.float64), 1e-15)
    assert found[0, k] < 0.999


def test_no_cosine_is_above_one():
    """Roots are rounded: without care one in a few is 1 + 2e-16, and has no arc cosine."""
    for _ in range(40):
        A, w = quadratic()
        found = analysis.gradient_alignment(
            Weights(w), lambda w, _, A=A: 0.5 * w @ A @ w, batches(2), rho=1e-9, k=1, adaptive=False
        )
        assert found.max() <= 1


def test_ascents_of_16_bit_weights_add_up_in_float32():
    """Four ascents of 0.003 from 1, where bfloat16 has steps of 2^-7: each of them alone would be rounded away."""
    model, seen = Weights(torch.ones(16, dtype=torch.bfloat16)), []

    def loss_fn(w: Tensor, _: Tensor) -> Tensor:
        seen.append(w.detach()[0].item())
        return w.sum()

    analysis.gradient_alignment(model, loss_fn, batches(2), rho=0.003 * 4, k=4)
    assert seen == [1.0, 1.0, 1 + 2**-7, 1 + 2**-7, 1 + 2 * 2**-7]


def test_the_cosine_with_a_gradient_of_zero_is_zero():
    w = torch.tensor([1.0, -2.0], dtype=torch.float64)
    found = analysis.gradient_alignment(Weights(w), lambda w, _: (0 * w).sum(), batches(2), rho=0.1, k=2)
    assert_equal("alignment", found, torch.zeros(3, 3, dtype=torch.float64))


# ---- the model afterwards --------------------------------------------------------------------------------------------

MEASUREMENTS = {
    "sharpness": lambda model, loss_fn, loader, **kw: analysis.sharpness(model, loss_fn, loader, [0.1, 0.2], m=3, **kw),
    "noise_robustness": lambda model, loss_fn, loader, **kw: analysis.noise_robustness(
        model, loader, [0.3, 0.6], samples=2, statistics_loader=loader, **kw
    ),
    "gradient_alignment": lambda model, loss_fn, loader, **kw: analysis.gradient_alignment(
        model, loss_fn, loader, rho=0.1, k=2, **kw
    ),
}


class Interrupting:
    """A forward hook that raises at its n-th call, and counts them."""

    def __init__(self, error: type[BaseException], n: float) -> None:
        self.error, self.n, self.calls = error, n, 0

    def __call__(self, *_) -> None:
        self.calls += 1
        if self.calls == self.n:
            raise self.error("stop")


@pytest.mark.sample(9)
@pytest.mark.parametrize("name", MEASUREMENTS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_model_is_as_it_was_wherever_a_measurement_ends(name, error, dtype):
    """At the end of it, or at any forward pass."""
    loader = batches(6, 3, dtype=dtype)
    model = Network(dtype)
    before = snapshot(model)
    counter = Interrupting(error, math.inf)
    handle = model.register_forward_hook(counter)
    MEASUREMENTS[name](model, cross_entropy, loader)
    handle.remove()
    assert_same_state(snapshot(model), before)
    for n in range(1, counter.calls + 1):
        handle = model.register_forward_hook(Interrupting(error, n))
        with pytest.raises(error, match="stop"):
            MEASUREMENTS[name](model, cross_entropy, loader)
        handle.remove()
        assert_same_state(snapshot(model), before, f"after call {n}")


@pytest.mark.parametrize("name", ["sharpness", "gradient_alignment"])
def test_the_model_is_as_it_was_when_the_loss_raises_or_meddles(name):
    """A loss that changes whatever it can reach before it raises, at its n-th call."""
    model, loader, calls = Network(), batches(6, 3), []
    before = snapshot(model)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) == n:
            model.train()
            model.norm.running_mean = torch.zeros(6)
            model.first.weight.requires_grad_(False)
            model.first.weight.grad.zero_()
            model.unused.grad = torch.ones_like(model.unused)
            torch.rand(3)
            raise KeyboardInterrupt
        return cross_entropy(outputs, targets)

    for n in (1, 2, 3, 4, 5, 6):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            MEASUREMENTS[name](model, loss_fn, loader)
        assert len(calls) == n
        assert_same_state(snapshot(model), before)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_loaders_that_shuffle_leave_the_global_generator_alone(name):
    data = [(x, y) for xs, ys in batches(12) for x, y in zip(xs, ys, strict=True)]
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
    model, before = Network(), torch.get_rng_state()
    MEASUREMENTS[name](model, cross_entropy, loader)
    assert_equal("random state", torch.get_rng_state(), before)


def test_gradients_are_taken_where_they_are_switched_off():
    model, loader = Network(), batches(6)
    expected = analysis.sharpness(model, cross_entropy, loader, [0.1])
    with torch.no_grad():
        assert_equal("sharpness", analysis.sharpness(model, cross_entropy, loader, [0.1]), expected)


# ---- bad input -------------------------------------------------------------------------------------------------------

NOT_NUMBERS = [math.nan, math.inf, "a", None, True, -1]
CALLS = {
    "sharpness": lambda model, loader, **kw: analysis.sharpness(
        model, kw.pop("loss_fn", cross_entropy), loader, **{"radii": [0.1], **kw}
    ),
    "noise_robustness": lambda model, loader, **kw: analysis.noise_robustness(
        model, loader, **{"levels": [0.1], "samples": 1, **kw}
    ),
    "gradient_alignment": lambda model, loader, **kw: analysis.gradient_alignment(
        model, kw.pop("loss_fn", cross_entropy), loader, **{"rho": 0.1, "k": 1, **kw}
    ),
}
PAIR = "expected pairs of tensors (inputs, targets), got"
BAD = [
    *[("sharpness", "radii", [0.1, x], "radii[1]: expected a finite number > 0, got") for x in (*NOT_NUMBERS, 0)],
    *[
        ("sharpness", "radii", x, "radii: expected a non-empty sequence of finite numbers > 0, got")
        for x in ([], (), 0.1, "0.1", None)
    ],
    *[("sharpness", "m", x, "m: expected an int >= 1, got") for x in (0, -1, 1.0, True, "2")],
    ("sharpness", "m", 4, "m: expected a divisor of every batch's size, got 4 for a batch of 6"),
    *[("noise_robustness", "levels", [x], "levels[0]: expected a finite number >= 0, got") for x in NOT_NUMBERS],
    *[
        ("noise_robustness", "levels", x, "levels: expected a non-empty sequence of finite numbers >= 0, got")
        for x in ([], 0.1, None)
    ],
    *[("noise_robustness", "samples", x, "samples: expected an int >= 1, got") for x in (0, 1.5, True, None)],
    *[("noise_robustness", "seed", x, "seed: expected an int >= 0, got") for x in (-1, 0.5, None, True)],
    *[
        ("noise_robustness", "statistics_loader", x, f"statistics_loader: expected {y}")
        for x, y in (([], "at least one batch"), (3, "an iterable of batches, got int"), (["a"], "tensors, or pairs"))
    ],
    *[("gradient_alignment", "rho", x, "rho: expected a finite number > 0, got") for x in (*NOT_NUMBERS, 0)],
    *[("gradient_alignment", "k", x, "k: expected an int >= 1, got") for x in (0, 1.0, True, None)],
    *[
        (name, argument, x, expected)
        for name in ("sharpness", "gradient_alignment")
        for argument, x, expected in (
            ("eta", -1, "eta: expected a finite number >= 0, got -1"),
            ("eta", math.nan, "eta: expected a finite number >= 0, got nan"),
            ("adaptive", 1, "adaptive: expected True or False, got 1"),
            ("loss_fn", lambda o, t: o, "loss_fn: expected a tensor of one element, got shape (6, 3)"),
            ("loss_fn", lambda o, t: 1.0, "loss_fn: expected a tensor of one element, got 1.0"),
            ("loss_fn", lambda o, t: o.detach().sum(), "loss_fn: expected a loss that depends on a parameter"),
            ("model", Network().requires_grad_(False), "model: expected a parameter that requires a gradient"),
        )
    ],
    *[
        (name, argument, x, expected)
        for name in CALLS
        for argument, x, expected in (
            ("progress", 1, "progress: expected True or False, got 1"),
            ("model", 3, "model: expected a torch.nn.Module, got 3"),
            ("model", nn.Tanh(), "model: expected a module with parameters"),
            ("model", nn.LazyLinear(3), "parameter 0 'weight': expected an initialized parameter"),
            ("loader", [], "loader: expected at least one batch"),
            ("loader", iter(()), "loader: expected at least one batch"),
            ("loader", 3, "loader: expected an iterable of batches, got int"),
            ("loader", [torch.ones(2, 4)], f"loader: {PAIR} Tensor"),
            ("loader", [(torch.ones(2, 4),)], f"loader: {PAIR} a tuple of Tensor"),
            ("loader", [(torch.ones(2, 4), [0, 1])], f"loader: {PAIR} a tuple of Tensor, list"),
            ("loader", batches(0), "at least one, got shapes (0, 4) and (0,)"),
            ("loader", [(torch.ones(2, 4), torch.ones(3))], "the same number of examples"),
        )
    ],
    (
        "noise_robustness",
        "loader",
        [(torch.ones(2, 4, dtype=torch.float64), torch.ones(2, 3))],
        "model: expected outputs of shape (N, classes, ...) for targets of shape (N, ...), got (2, 3) for (2, 3)",
    ),
]


@pytest.mark.parametrize(("name", "argument", "value", "message"), BAD)
def test_bad_arguments_are_named(name, argument, value, message):
    arguments = {"model": Network(), "loader": batches(6), argument: value}
    whole = isinstance(arguments["model"], Network)
    before = snapshot(arguments["model"]) if whole else None
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        CALLS[name](**arguments)
    if whole:
        assert_same_state(snapshot(arguments["model"]), before)


def test_an_iterator_serves_one_pass_only():
    with pytest.raises(ValueError, match="loader: expected at least one batch each time it is gone through, got none"):
        analysis.noise_robustness(Network(), iter(batches(6)), [0.0], samples=2)


# ---- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_progress_shows_a_bar_and_changes_nothing(name, capsys):
    model, loader = Network(), batches(6, 3)
    quiet = CALLS[name](model, loader)
    assert capsys.readouterr().err == ""
    assert_equal(name, CALLS[name](model, loader, progress=True), quiet)
    assert name.replace("_", " ") in capsys.readouterr().err


@pytest.mark.parametrize("name", CALLS)
def test_without_tqdm_progress_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    model = Network()
    CALLS[name](model, batches(6))
    with pytest.raises(ImportError, match=re.escape("pip install lookbehind_fused[train]")):
        CALLS[name](model, batches(6), progress=True)


def test_statistics_estimated_by_themselves() -> None:
    """The mean of the batches' own statistics; no mode and no momentum is another one afterwards, also if it fails."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3), nn.Dropout(0.5)).double()
    model[1].eval()
    batches = [torch.randn(5, 3).double(), torch.randn(7, 3).double() + 2]
    analysis.estimate_statistics(model, [(batches[0], torch.zeros(5)), batches[1]])
    expected = torch.stack([x.mean(0) for x in batches]).mean(0), torch.stack([x.var(0) for x in batches]).mean(0)
    assert_close("mean", model[0].running_mean, expected[0], 1e-14)
    assert_close("variance", model[0].running_var, expected[1], 1e-14)
    with pytest.raises(ValueError, match="^statistics_loader: expected at least one batch"):
        analysis.estimate_statistics(model, [])
    assert (model[0].momentum, model[0].training, model[1].training) == (0.3, True, False)
