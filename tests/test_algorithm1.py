"""The optimizer against the literal transcription of Algorithm 1, and the transcription against torch and by hand.

Two float64 tensors agree here when max |actual - expected| <= 1e-12 * max |expected|, for every tensor by itself:
weights, each entry of the base optimizer's state, losses, alpha.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lookbehind_fused import Lookbehind
from tests import algorithm1 as paper
from tests.algorithm1 import Formulas, Gradients, Outcome, TorchBase, adam, adamw, algorithm1, sgd
from tests.conftest import assert_close, assert_equal, assert_same_state, assert_state, assert_torchs_weights, drive

TOLERANCE = 1e-12
STEPS = 6

# name: torch's class, the formula, hyperparameters (none at its default)
BASES: dict[str, tuple[type[torch.optim.Optimizer], Callable[..., Tensor], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, sgd, {"lr": 0.11}),
    "sgd-nesterov": (
        torch.optim.SGD,
        sgd,
        {"lr": 0.07, "momentum": 0.8, "nesterov": True, "weight_decay": 0.013},
    ),
    "adam": (torch.optim.Adam, adam, {"lr": 0.013, "betas": (0.8, 0.97), "eps": 1e-5, "weight_decay": 0.02}),
    "adamw-amsgrad": (
        torch.optim.AdamW,
        adamw,
        {"lr": 0.017, "betas": (0.75, 0.6), "eps": 1e-6, "weight_decay": 0.05, "amsgrad": True},
    ),
}
MORE_BASES = {
    "sgd-dampening": (
        torch.optim.SGD,
        sgd,
        {"lr": 0.09, "momentum": 0.7, "dampening": 0.3, "weight_decay": 0.02},
    ),
    "sgd-maximize": (
        torch.optim.SGD,
        sgd,
        {"lr": 0.012, "momentum": 0.6, "dampening": 0.2, "weight_decay": 0.03, "maximize": True},
    ),
    "adam-amsgrad-maximize": (
        torch.optim.Adam,
        adam,
        {"lr": 0.011, "betas": (0.7, 0.6), "eps": 1e-5, "weight_decay": 0.04, "amsgrad": True, "maximize": True},
    ),
    "adamw": (torch.optim.AdamW, adamw, {"lr": 0.015, "betas": (0.7, 0.9), "eps": 1e-5, "weight_decay": 0.06}),
    "adamw-maximize": (
        torch.optim.AdamW,
        adamw,
        {"lr": 0.009, "betas": (0.7, 0.9), "eps": 1e-5, "weight_decay": 0.06, "maximize": True},
    ),
}
ASCENTS = {"sam": {"rho": 0.07}, "asam": {"rho": 0.3, "adaptive": True, "eta": 0.03}}
ALPHAS = {
    "0.3": {"alpha": 0.3},
    "1": {"alpha": 1.0},
    "adaptive-global": {"alpha": "adaptive", "alpha_scope": "global"},
    "adaptive-tensor": {"alpha": "adaptive", "alpha_scope": "tensor"},
}


class Net(nn.Module):
    """A small convolutional net with BatchNorm, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 3, 3, stride=2, bias=False)
        self.norm2 = nn.BatchNorm2d(3)
        self.head = nn.Linear(12, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.head(x.flatten(1))


def net(seed: int = 1) -> Net:
    torch.manual_seed(seed)
    return Net()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return (
        torch.randn(8, 2, 6, 6, generator=generator, dtype=torch.float64),
        torch.randint(5, (8,), generator=generator),
    )


def backward_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[int], Tensor]:
    """An evaluation, whatever its index: forward and backward on one minibatch."""

    def evaluate(_: int) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return evaluate


class Oracle:
    """The transcription at work on a second copy of a model: weights, base optimizer and losses of its own."""

    def __init__(self, model: nn.Module, base: Formulas | TorchBase, **settings: Any) -> None:
        self.model = copy.deepcopy(model)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.params = [p.detach().clone() for p in self.model.parameters()]
        self.base = base
        self.settings = settings
        self.losses: list[Tensor] = []

    def gradient(self, data: Callable[[int], tuple[Tensor, Tensor]]) -> Callable[[list[Tensor], int], Gradients]:
        def gradient(points: list[Tensor], index: int) -> Gradients:
            x, y = data(index)
            leaves = [p.detach().clone().requires_grad_() for p in points]
            output = torch.func.functional_call(self.model, dict(zip(self.names, leaves, strict=True)), (x,))
            loss = F.cross_entropy(output, y)
            self.losses.append(loss.detach())
            return list(torch.autograd.grad(loss, leaves))

        return gradient

    def step(self, data: Callable[[int], tuple[Tensor, Tensor]]) -> Outcome:
        """One outer step; ``data(index)`` is the minibatch of evaluation ``index``."""
        self.losses.clear()
        outcome = algorithm1(self.params, self.gradient(data), self.base, **self.settings)
        self.params = outcome.params
        return outcome


def transcribed(options: dict[str, Any]) -> dict[str, Any]:
    """Options of ``Lookbehind`` under the transcription's names."""
    names = {"alpha_scope": "scope", "reuse_gradient": "reuse"}
    return {names.get(name, name): value for name, value in options.items()}


def compare(
    backend: str,
    base: str | tuple[type[torch.optim.Optimizer], Callable[..., Tensor], dict[str, Any]],
    options: dict[str, Any],
    *,
    form: str = "step",
    steps: int = STEPS,
    data: Callable[[int, int], tuple[Tensor, Tensor]] = lambda t, index: batch(t),
    oracle_base: dict[str, Any] | None = None,
    oracle_options: dict[str, Any] | None = None,
) -> None:
    """The library and the transcription, step by step.

    ``data(t, index)`` is the minibatch of evaluation ``index`` of outer step t. ``oracle_base`` and ``oracle_options``
    change single settings on the transcription's side.
    """
    optimizer_class, rule, hyper = {**BASES, **MORE_BASES}[base] if isinstance(base, str) else base
    model = net()
    params = list(model.parameters())
    optimizer = Lookbehind(params, optimizer_class, backend=backend, **options, **hyper)
    oracle = Oracle(
        model,
        Formulas(rule, {**hyper, **(oracle_base or {})}, len(params)),
        **transcribed({**options, **(oracle_options or {})}),
    )
    compare_steps(optimizer, params, model, oracle, form, steps, data)


def compare_steps(
    optimizer: Lookbehind,
    params: list[Tensor],
    model: nn.Module,
    oracle: Oracle,
    form: str,
    steps: int,
    data: Callable[[int, int], tuple[Tensor, Tensor]],
) -> None:
    k = optimizer.k
    for t in range(steps):
        losses: list[Tensor] = []

        def evaluate(index: int, t: int = t, losses: list[Tensor] = losses) -> Tensor:
            loss = backward_of(model, *data(t, index))(index)
            losses.append(loss.detach())
            return loss

        returned = drive(optimizer, form, evaluate, k)
        expected = oracle.step(lambda index, t=t: data(t, index))

        assert len(losses) == expected.evaluations == (k + 1 if oracle.settings.get("reuse", True) else 2 * k)
        assert_close("returned loss", returned, oracle.losses[0], TOLERANCE)
        assert_close("losses", torch.stack(losses), torch.stack(oracle.losses), TOLERANCE)
        for i, (p, q) in enumerate(zip(params, oracle.params, strict=True)):
            assert_close(f"step {t}, tensor {i}", p, q, TOLERANCE)
        assert_state(optimizer, params, oracle.base.state, TOLERANCE)
        assert set(optimizer.diagnostics) == {"grad_norm", "alpha", "skipped"}
        grad_norm = torch.tensor(expected.grad_norm, dtype=torch.float64)
        assert_close("grad_norm", optimizer.diagnostics["grad_norm"], grad_norm, TOLERANCE)
        alpha = torch.tensor(expected.alpha, dtype=torch.float64)
        assert_close("alpha", optimizer.diagnostics["alpha"], alpha, TOLERANCE)


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.sample(48)
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "2k"])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("ascent", ASCENTS)
def test_step_is_algorithm_1(backend: str, ascent: str, base: str, k: int, alpha: str, reuse: bool) -> None:
    compare(backend, base, {"k": k, "reuse_gradient": reuse, **ASCENTS[ascent], **ALPHAS[alpha]})


@pytest.mark.sample(24)
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "2k"])
@pytest.mark.parametrize("alpha", ["0.3", "adaptive-global"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("base", ["sgd-nesterov", "adamw-amsgrad"])
@pytest.mark.parametrize("ascent", ASCENTS)
def test_evaluations_are_algorithm_1(backend: str, ascent: str, base: str, k: int, alpha: str, reuse: bool) -> None:
    options = {"k": k, "reuse_gradient": reuse, **ASCENTS[ascent], **ALPHAS[alpha]}
    compare(backend, base, options, form="evaluations", steps=3)


@pytest.mark.sample(24)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("base", ["sgd-nesterov", "adam"])
@pytest.mark.parametrize("ascent", ASCENTS)
def test_pairs_are_algorithm_1(backend: str, ascent: str, base: str, k: int, alpha: str) -> None:
    options = {"k": k, "reuse_gradient": False, **ASCENTS[ascent], **ALPHAS[alpha]}
    compare(backend, base, options, form="pairs", steps=3)


@pytest.mark.sample(16)
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "2k"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("base", MORE_BASES)
def test_more_bases_are_algorithm_1(backend: str, base: str, k: int, reuse: bool) -> None:
    compare(backend, base, {"k": k, "reuse_gradient": reuse, **ASCENTS["asam"], **ALPHAS["adaptive-global"]})


@pytest.mark.sample(8)
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "2k"])
@pytest.mark.parametrize("max_grad_norm", [0.2, 50.0], ids=["always", "never"])
@pytest.mark.parametrize("base", ["sgd-nesterov", "adam"])
@pytest.mark.parametrize("ascent", ASCENTS)
def test_clipping_is_of_the_descent_only(
    backend: str, ascent: str, base: str, max_grad_norm: float, reuse: bool
) -> None:
    options = {"k": 3, "reuse_gradient": reuse, **ASCENTS[ascent], **ALPHAS["adaptive-tensor"]}
    compare(backend, base, {**options, "max_grad_norm": max_grad_norm})


@pytest.mark.sample(8)
@pytest.mark.parametrize("form", ["evaluations", "pairs"])
@pytest.mark.parametrize("alpha", ["0.3", "adaptive-global"])
@pytest.mark.parametrize("ascent", ASCENTS)
def test_another_minibatch_in_each_inner_step(backend: str, ascent: str, alpha: str, form: str) -> None:
    """The 2k form, where inner step i takes both of its gradients on minibatch i."""
    options = {"k": 3, "reuse_gradient": False, **ASCENTS[ascent], **ALPHAS[alpha]}
    compare(backend, "sgd-nesterov", options, form=form, data=lambda t, index: batch(10 * t + index // 2))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_another_minibatch_in_each_evaluation(backend: str, alpha: str) -> None:
    options = {"k": 3, "reuse_gradient": True, **ASCENTS["asam"], **ALPHAS[alpha]}
    compare(backend, "adam", options, data=lambda t, index: batch(10 * t + index))


@pytest.mark.sample(12)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("base", ["sgd-nesterov", "adamw-amsgrad"])
def test_groups_with_settings_of_their_own(backend: str, base: str, k: int, alpha: str) -> None:
    optimizer_class, rule, hyper = BASES[base]
    model = net()
    convs = [model.conv1.weight, model.conv2.weight]
    norms = [*model.norm1.parameters(), *model.norm2.parameters()]
    head = list(model.head.parameters())
    groups = [
        {"params": norms, "weight_decay": 0.0, "rho": 0.03},
        {"params": convs, "adaptive": True, "eta": 0.05, "rho": 0.4},
        {"params": head, "lr": 0.021, "adaptive": True},
    ]
    options = {"k": k, "rho": 0.06, "eta": 0.02, **ALPHAS[alpha]}
    optimizer = Lookbehind(groups, optimizer_class, backend=backend, **options, **hyper)
    order = norms + convs + head  # of the optimizer; the model's is another
    expected_settings = {
        "rho": [0.03] * 4 + [0.4] * 2 + [0.06] * 2,
        "adaptive": [False] * 4 + [True] * 4,
        "eta": [0.02] * 4 + [0.05] * 2 + [0.02] * 2,
    }
    base_settings = [{**hyper, "weight_decay": 0.0}] * 4 + [hyper] * 2 + [{**hyper, "lr": 0.021}] * 2
    oracle = Oracle(model, Formulas(rule, base_settings, 8), **{**transcribed(options), **expected_settings})
    names = {id(p): name for name, p in model.named_parameters()}
    oracle.names = [names[id(p)] for p in order]
    oracle.params = [p.detach().clone() for p in order]
    compare_steps(optimizer, order, model, oracle, "step", STEPS, lambda t, index: batch(t))


def test_settings_may_change_between_steps(backend: str) -> None:
    """What a scheduler does: lr, rho, weight decay of a group are read at every step."""
    hyper = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.01}
    model = net()
    params = list(model.parameters())
    optimizer = Lookbehind(params, torch.optim.SGD, k=2, alpha=0.4, rho=0.05, backend=backend, **hyper)
    oracle = Oracle(model, Formulas(sgd, [dict(hyper) for _ in params], len(params)), k=2, alpha=0.4, rho=0.05)
    changes = [
        {},
        {"lr": 0.03},
        {"rho": 0.2},
        {"weight_decay": 0.1},
        {"momentum": 0.5},
        {"adaptive": True, "eta": 0.07},
    ]
    for t, change in enumerate(changes):
        optimizer.param_groups[0].update(change)
        for name, value in change.items():
            if name in ("rho", "adaptive", "eta"):
                oracle.settings[name] = value
            else:
                for settings in oracle.base.settings:
                    settings[name] = value
        compare_steps(optimizer, params, model, oracle, "step", 1, lambda _, index, t=t: batch(t))


def test_evaluation_says_where_it_is(backend: str) -> None:
    for reuse, inner_steps in ((True, [1, 1, 2, 3]), (False, [1, 1, 2, 2, 3, 3])):
        model = net()
        optimizer = Lookbehind(model.parameters(), torch.optim.SGD, lr=0.1, k=3, reuse_gradient=reuse, backend=backend)
        slow = [p.detach().clone() for p in model.parameters()]
        seen = []
        for evaluation in optimizer.evaluations():
            moved = any(not torch.equal(p, s) for p, s in zip(model.parameters(), slow, strict=True))
            assert moved == evaluation.perturbed
            assert all(p.grad is None for p in model.parameters())
            seen.append((evaluation.index, evaluation.inner_step, evaluation.perturbed))
            F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
        assert seen == [(i, inner, i > 0) for i, inner in enumerate(inner_steps)]


# ---- can the comparison fail? ----------------------------------------------------------------------------------------


@pytest.mark.sample(16)
@pytest.mark.parametrize(
    ("base", "oracle_base", "oracle_options"),
    [
        ("sgd-nesterov", {}, {"alpha": 0.3 + 1e-9}),
        ("sgd-nesterov", {}, {"alpha": "adaptive"}),
        ("sgd-nesterov", {}, {"rho": 0.07 + 1e-9}),
        ("sgd-nesterov", {}, {"adaptive": True}),
        ("sgd-nesterov", {}, {"max_grad_norm": 0.5}),
        ("sgd-nesterov", {"nesterov": False}, {}),
        ("sgd-nesterov", {"momentum": 0.8 + 1e-9}, {}),
        ("sgd-nesterov", {"weight_decay": 0.013 + 1e-9}, {}),
        ("sgd-dampening", {"dampening": 0.0}, {}),
        ("sgd-maximize", {"maximize": False}, {}),
        ("adam", {"betas": (0.8, 0.97 + 1e-9)}, {}),
        ("adam", {"betas": (0.8 + 1e-9, 0.97)}, {}),
        ("adam", {"eps": 1.001e-5}, {}),
        ("adam", {"decoupled": True}, {}),
        ("adamw-amsgrad", {"amsgrad": False}, {}),
        ("adamw", {"weight_decay": 0.06 + 1e-9}, {}),
        ("adamw-maximize", {"maximize": False}, {}),
    ],
    ids=str,
)
def test_a_wrong_setting_is_seen(
    backend: str, base: str, oracle_base: dict[str, Any], oracle_options: dict[str, Any]
) -> None:
    options = {"k": 2, **ASCENTS["sam"], **ALPHAS["0.3"]}
    compare(backend, base, options)
    with pytest.raises(AssertionError, match=r"> 1e-12|state of tensor"):
        compare(backend, base, options, oracle_base=oracle_base, oracle_options=oracle_options)


def test_wrong_scope_and_eta_are_seen(backend: str) -> None:
    options = {"k": 3, **ASCENTS["asam"], **ALPHAS["adaptive-global"]}
    for change in ({"scope": "tensor"}, {"eta": 0.0300001}):
        with pytest.raises(AssertionError, match=r"> 1e-12|same shape|assert torch.Size"):
            compare(backend, "adam", options, oracle_options=change)


def _stale_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ascent divides by the norm of the first gradient."""
    original, seen = paper.ascend, []

    def ascend(perturbed, g, rho, adaptive, eta):
        seen.append(paper.norm(g))
        ratio = paper.norm(g) / seen[0 if len(seen) % 2 else -2]  # k = 2: two ascents a step
        return original(perturbed, g, [r * ratio for r in rho], adaptive, eta)

    monkeypatch.setattr(paper, "ascend", ascend)


def _first_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """ASAM's T belongs to where the gradient was taken; here it is a little off."""
    original = paper.ascend
    monkeypatch.setattr(
        paper, "ascend", lambda w, g, rho, adaptive, eta: original(w, g, rho, adaptive, [e + 1e-9 for e in eta])
    )


def _norm_by_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is ascended by its own norm."""
    original = paper.ascend

    def ascend(perturbed, g, rho, adaptive, eta):
        rows = zip(perturbed, g, rho, adaptive, eta, strict=True)
        return [original([w], [x], [r], [a], [e])[0] for w, x, r, a, e in rows]

    monkeypatch.setattr(paper, "ascend", ascend)


def _interpolated_from_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "interpolate", lambda slow, fast, alpha: fast + alpha * (slow - fast))


def _dampened_first_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(w, g, state, **settings):
        state.setdefault("momentum_buffer", torch.zeros_like(w))
        return paper.sgd(w, g, state, **settings)

    monkeypatch.setitem(MORE_BASES, "sgd-dampening", (torch.optim.SGD, rule, MORE_BASES["sgd-dampening"][2]))


@pytest.mark.parametrize(
    "mutation",
    [_stale_norm, _first_scaling, _norm_by_tensor, _interpolated_from_fast, _dampened_first_momentum],
    ids=lambda mutation: mutation.__name__[1:],
)
def test_a_wrong_algorithm_is_seen(backend: str, monkeypatch: pytest.MonkeyPatch, mutation: Callable) -> None:
    options = {"k": 2, **ASCENTS["asam"], **ALPHAS["0.3"]}
    compare(backend, "sgd-dampening", options)
    mutation(monkeypatch)
    with pytest.raises(AssertionError, match="> 1e-12"):
        compare(backend, "sgd-dampening", options)


# ---- k + 1 against 2k ------------------------------------------------------------------------------------------------


@pytest.mark.sample(24)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("base", ["sgd-nesterov", "adamw-amsgrad", "RMSprop"])
@pytest.mark.parametrize("alpha", ["0.3", "adaptive-global"])
def test_reuse_gives_the_same_bits(backend: str, alpha: str, base: str, k: int, dtype: torch.dtype) -> None:
    """The same weights, state, loss and diagnostics from k + 1 forward passes as from 2k."""
    results = []
    for reuse in (True, False):
        model = net().to(dtype)
        passes = []
        model.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        if base == "RMSprop":
            base_optimizer, hyper = torch.optim.RMSprop, {"lr": 0.003, "momentum": 0.5}
        else:
            base_optimizer, _, hyper = BASES[base]
        optimizer = Lookbehind(
            model.parameters(),
            base_optimizer,
            k=k,
            reuse_gradient=reuse,
            backend=backend,
            **ASCENTS["asam"],
            **ALPHAS[alpha],
            **hyper,
        )
        losses = []
        for t in range(3):
            x, y = batch(t)
            passes.clear()
            losses.append(drive(optimizer, "step", backward_of(model, x.to(dtype), y), k).detach())
            assert len(passes) == (k + 1 if reuse else 2 * k)
        results.append(
            {
                "weights": [p.detach() for p in model.parameters()],
                "state": optimizer.base_optimizer.state_dict(),
                "losses": losses,
                "diagnostics": optimizer.diagnostics,
            }
        )
    assert_same_state(results[0], results[1], "k + 1 against 2k")
    assert not torch.equal(results[0]["weights"][0], next(net().to(dtype).parameters()))


# ---- textbook SAM, and the base optimizer alone ----------------------------------------------------------------------


@pytest.mark.sample(16)
@pytest.mark.parametrize("base", {**BASES, **MORE_BASES})
@pytest.mark.parametrize("ascent", ASCENTS)
def test_one_inner_step_is_textbook_sam(backend: str, ascent: str, base: str) -> None:
    """k = 1, alpha = 1 against SAM (Foret et al. 2021) and ASAM (Kwon et al. 2021) around torch's own optimizer."""
    base_optimizer, _, hyper = {**BASES, **MORE_BASES}[base]
    ours, textbook = net(), net()
    optimizer = Lookbehind(
        ours.parameters(), base_optimizer, k=1, alpha=1.0, backend=backend, **ASCENTS[ascent], **hyper
    )
    other = base_optimizer(textbook.parameters(), **hyper)
    rho, eta = ASCENTS[ascent]["rho"], ASCENTS[ascent].get("eta")
    rho = -rho if hyper.get("maximize") else rho  # maximizing f is minimizing -f
    for t in range(STEPS):
        x, y = batch(t)
        drive(optimizer, "step", backward_of(ours, x, y), 1)

        other.zero_grad()
        F.cross_entropy(textbook(x), y).backward()
        weights = list(textbook.parameters())
        with torch.no_grad():
            scales = [torch.ones_like(w) if eta is None else w.abs() + eta for w in weights]
            scale = rho / torch.stack([(s * w.grad).norm() for s, w in zip(scales, weights, strict=True)]).norm()
            before = [w.clone() for w in weights]
            for w, s in zip(weights, scales, strict=True):
                w.add_(s * s * w.grad * scale)
        other.zero_grad()
        F.cross_entropy(textbook(x), y).backward()
        with torch.no_grad():
            for w, b in zip(weights, before, strict=True):
                w.copy_(b)
        other.step()
        for p, q in zip(ours.parameters(), textbook.parameters(), strict=True):
            assert_close(f"step {t}", p, q, TOLERANCE)
    for p, q in zip(ours.parameters(), textbook.parameters(), strict=True):
        for key, value in other.state[q].items():
            assert_close(key, optimizer.base_optimizer.state[p][key], value, TOLERANCE)


PLAIN_BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd-decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.03}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.03}),
    "sgd-nesterov-maximize": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.7, "nesterov": True, "maximize": True, "weight_decay": 0.03},
    ),
    "sgd-tensor-lr": (torch.optim.SGD, {"lr": torch.tensor(0.1), "momentum": 0.7}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adam-decay-amsgrad": (
        torch.optim.Adam,
        {"lr": 0.01, "betas": (0.7, 0.8), "weight_decay": 0.1, "amsgrad": True, "eps": 1e-6},
    ),
    "adam-maximize": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    "adam-tensor-lr": (torch.optim.Adam, {"lr": torch.tensor(0.01, dtype=torch.float64), "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw-amsgrad-maximize": (
        torch.optim.AdamW,
        {"lr": 0.01, "betas": (0.7, 0.8), "weight_decay": 0.1, "amsgrad": True, "maximize": True},
    ),
    "adamw-tensor-lr": (torch.optim.AdamW, {"lr": torch.tensor(0.01, dtype=torch.float64), "weight_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True, "weight_decay": 0.1}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01, "weight_decay": 0.1}),
}


def plain_problem(
    dtype: torch.dtype, scalar: bool = True
) -> tuple[list[nn.Parameter], Callable[[int], Callable[..., Tensor]]]:
    """Parameters of odd sizes, and step t's evaluation, which leaves gradients in them."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(1,), (7,), (33, 3), (2, 3, 5, 1), (1025,), (4097,), (0,), *[()] * scalar]
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    noise = [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(5)]

    def backward(t: int) -> Callable[..., Tensor]:
        def evaluate(_: int = 0) -> Tensor:
            for p, n in zip(params, noise[t], strict=True):
                p.grad = (p.detach() * 0.3 + n).sin()
            return torch.zeros(())

        return evaluate

    return params, backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("base", PLAIN_BASES)
def test_without_ascent_it_is_the_base_optimizer_bit_for_bit(backend: str, base: str, dtype: torch.dtype) -> None:
    """rho = 0, k = 1, alpha = 1. Bits of Adam's weights on native: see ``assert_torchs_weights``."""
    base_optimizer, hyper = PLAIN_BASES[base]
    # torch multiplies a 0-dim weight with 1 - lr * weight_decay in the wider dtype of the two, if lr is a tensor
    scalar = not isinstance(hyper["lr"], Tensor)
    ours, our_backward = plain_problem(dtype, scalar)
    theirs, their_backward = plain_problem(dtype, scalar)
    optimizer = Lookbehind(ours, base_optimizer, rho=0.0, k=1, alpha=1.0, backend=backend, **hyper)
    other = base_optimizer(theirs, foreach=False, **hyper)
    for t in range(5):
        drive(optimizer, "step", our_backward(t), 1)
        their_backward(t)()
        before = [q.detach().clone() for q in theirs]
        other.step()
        assert_torchs_weights(backend, base_optimizer, ours, theirs, before)
    assert_same_state(
        optimizer.base_optimizer.state_dict()["state"], other.state_dict()["state"], "state of the base optimizer"
    )
    start, _ = plain_problem(dtype)
    assert not torch.equal(ours[2], start[2])


@pytest.mark.parametrize("momenta", [(0.9, 0.0, 0.9), (0.0, 0.9, 0.9), (0.0, 0.0, 0.8)], ids=str)
def test_momentum_may_be_switched_off_and_on(backend: str, momenta: tuple[float, ...]) -> None:
    """As torch does it: a buffer that is there is used again, and the first one is the gradient, without dampening."""
    ours, our_backward = plain_problem(torch.float64)
    theirs, their_backward = plain_problem(torch.float64)
    hyper = {"lr": 0.1, "momentum": momenta[0], "dampening": 0.4}
    optimizer = Lookbehind(ours, torch.optim.SGD, rho=0.0, k=1, alpha=1.0, backend=backend, **hyper)
    other = torch.optim.SGD(theirs, foreach=False, **hyper)
    for t, momentum in enumerate(momenta):
        optimizer.param_groups[0]["momentum"] = other.param_groups[0]["momentum"] = momentum
        drive(optimizer, "step", our_backward(t), 1)
        their_backward(t)()
        other.step()
        for p, q in zip(ours, theirs, strict=True):
            assert_equal(f"step {t}", p.detach(), q.detach())


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.AdamW])
def test_float32_tensor_lr_of_adam(backend: str, base: type[torch.optim.Optimizer]) -> None:
    """torch computes lr / (1 - beta1^t) and AdamW's 1 - lr * weight_decay in the dtype of lr; here both are float64.

    Nothing but that rounding lies between the two: one of a factor near 1 and one of a small step, five times.
    """
    ours, our_backward = plain_problem(torch.float64)
    theirs, their_backward = plain_problem(torch.float64)
    hyper = {"lr": torch.tensor(0.01), "weight_decay": 0.1}
    optimizer = Lookbehind(ours, base, rho=0.0, k=1, alpha=1.0, backend=backend, **hyper)
    other = base(theirs, foreach=False, **hyper)
    for t in range(5):
        drive(optimizer, "step", our_backward(t), 1)
        their_backward(t)()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        assert_close("weights", p, q, 5 * 2.0**-23)


@pytest.mark.parametrize("base", ["sgd-momentum", "adamw", "RMSprop"])
def test_without_ascent_alpha_interpolates_the_base_optimizer(backend: str, base: str) -> None:
    """rho = 0, k = 1: slow + alpha * (base - slow)."""
    base_optimizer, hyper = PLAIN_BASES[base]
    for alpha in (0.3, 0.8):  # torch.lerp takes another formula from 0.5 on
        ours, our_backward = plain_problem(torch.float64)
        theirs, their_backward = plain_problem(torch.float64)
        optimizer = Lookbehind(ours, base_optimizer, rho=0.0, k=1, alpha=alpha, backend=backend, **hyper)
        other = base_optimizer(theirs, **hyper)
        for t in range(5):
            drive(optimizer, "step", our_backward(t), 1)
            their_backward(t)()
            slow = [q.detach().clone() for q in theirs]
            other.step()
            with torch.no_grad():
                for p, q, s in zip(ours, theirs, slow, strict=True):
                    q.copy_(s + alpha * (q - s))
                    assert_close(f"step {t}", p, q, TOLERANCE)


# ---- base optimizers without a rule of their own ---------------------------------------------------------------------

UNFUSED = {
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.004, "alpha": 0.8, "momentum": 0.6, "centered": True, "eps": 1e-5}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.02, "lr_decay": 0.1, "eps": 1e-5, "initial_accumulator_value": 0.1}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.02, "betas": (0.6, 0.7), "eps": 1e-5, "weight_decay": 0.02}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.02, "betas": (0.6, 0.7), "eps": 1e-5, "momentum_decay": 0.01}),
}
if hasattr(torch.optim, "Muon"):
    UNFUSED["Muon"] = (torch.optim.Muon, {"lr": 0.02, "weight_decay": 0.05, "momentum": 0.7})


class Mlp(nn.Module):
    """Matrices only, which is what Muon takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(72, 7, bias=False), nn.Tanh(), nn.Linear(7, 5, bias=False)
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.sample(24)
@pytest.mark.parametrize("form", ["step", "pairs"])
@pytest.mark.parametrize("alpha", ["0.3", "adaptive-tensor"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("base", UNFUSED)
def test_any_base_optimizer(backend: str, base: str, k: int, alpha: str, form: str) -> None:
    base_optimizer, hyper = UNFUSED[base]
    model = Mlp() if base == "Muon" else net()
    params = list(model.parameters())
    options = {"k": k, "reuse_gradient": form == "step", **ASCENTS["asam"], **ALPHAS[alpha]}
    # RMSprop's smoothing constant is called alpha, so it has to come inside an instance
    base_instance = base_optimizer(params, **hyper)
    optimizer = Lookbehind(None, base_instance, backend=backend, **options)
    oracle = Oracle(model, TorchBase(base_optimizer, params, **hyper), **transcribed(options))
    compare_steps(optimizer, params, model, oracle, form, STEPS, lambda t, index: batch(t))


@pytest.mark.parametrize("base", ["RMSprop", "Adagrad"])
def test_clipping_with_any_base_optimizer(backend: str, base: str) -> None:
    base_optimizer, hyper = UNFUSED[base]
    model = net()
    params = list(model.parameters())
    options = {"k": 2, "max_grad_norm": 0.2, **ASCENTS["sam"], **ALPHAS["0.3"]}
    optimizer = Lookbehind(None, base_optimizer(params, **hyper), backend=backend, **options)
    oracle = Oracle(model, TorchBase(base_optimizer, params, **hyper), **transcribed(options))
    compare_steps(optimizer, params, model, oracle, "step", STEPS, lambda t, index: batch(t))


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("dtype", "base", "alpha"),
    [
        (torch.float32, "sgd-nesterov", "adaptive-global"),
        (torch.float32, "adamw-amsgrad", "adaptive-tensor"),
        (torch.float64, "adamw-amsgrad", "adaptive-global"),
        (torch.bfloat16, "sgd-nesterov", "adaptive-tensor"),
    ],
    ids=str,
)
def test_result_does_not_depend_on_the_number_of_threads(
    backend: str, dtype: torch.dtype, base: str, alpha: str
) -> None:
    """Given the same gradients: with 1, 2 and 7 threads, and from one run to the next."""
    base_optimizer, _, hyper = BASES[base]
    shapes = [(1_000_003,), (33,), (257, 129), (32_769,), (), (3, 5, 7, 11)]
    generator = torch.Generator().manual_seed(9)
    start = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    gradients = [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(4)]

    def run(threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        params = [nn.Parameter(s.clone()) for s in start]
        options = {**ASCENTS["asam"], **ALPHAS[alpha], "k": 3, "max_grad_norm": 1.0}
        optimizer = Lookbehind(params, base_optimizer, backend=backend, **options, **hyper)

        def evaluate(index: int) -> Tensor:
            for p, g in zip(params, gradients[index], strict=True):
                p.grad = g.clone()
            return torch.zeros(())

        drive(optimizer, "step", evaluate, 3)
        return {
            "weights": [p.detach() for p in params],
            "state": optimizer.base_optimizer.state_dict(),
            "diagnostics": optimizer.diagnostics,
        }

    first = run(1)
    assert not torch.equal(first["weights"][0], start[0])
    for threads in (1, 2, 7):
        assert_same_state(run(threads), first, f"{threads} threads")


# ---- the transcription itself ----------------------------------------------------------------------------------------


def test_transcription_by_hand() -> None:
    """loss = w^2 / 2, so the gradient is w: worked out on paper. rho = 0.1, lr = 0.5, alpha = 0.5, from w = 1."""
    seen: list[float] = []

    def gradient(points: list[Tensor], _: int) -> Gradients:
        seen.append(points[0].item())
        return [points[0]]

    w = [torch.tensor([1.0], dtype=torch.float64)]
    outcome = algorithm1(w, gradient, Formulas(sgd, {"lr": 0.5}, 1), k=2, rho=0.1, alpha=0.5)
    # perturbed: 1, 1.1, 1.2; fast: 1 - 0.55 = 0.45, then 0.45 - 0.6 = -0.15; 1 + 0.5 * (-0.15 - 1) = 0.425
    assert seen == pytest.approx([1.0, 1.1, 1.2], abs=1e-15)
    assert outcome.params[0].item() == pytest.approx(0.425, abs=1e-15)
    assert outcome.evaluations == 3

    seen.clear()
    outcome = algorithm1(w, gradient, Formulas(sgd, {"lr": 0.5}, 1), k=2, rho=0.1, alpha=0.5, reuse=False)
    assert seen == pytest.approx([1.0, 1.1, 1.1, 1.2], abs=1e-15)
    assert outcome.params[0].item() == pytest.approx(0.425, abs=1e-15)

    # ASAM with eta = 0.5: T = 1.5, so perturbed = 1 + 0.1 * 1.5^2 * 1 / (1.5 * 1) = 1.15
    seen.clear()
    algorithm1(w, gradient, Formulas(sgd, {"lr": 0.5}, 1), k=1, rho=0.1, alpha=1.0, adaptive=True, eta=0.5)
    assert seen == pytest.approx([1.0, 1.15], abs=1e-15)


def test_transcribed_alpha_by_hand() -> None:
    """Displacements (-1, 0) and (-1, -1): cos = 1 / sqrt(2). By tensor: 1 for the first; the zero gives 1/2."""
    w = [torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    one, nothing = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    gradients = [[one, one], [one, nothing], [nothing, one]]
    settings = {"k": 2, "rho": 0.1, "alpha": "adaptive"}
    outcome = algorithm1(w, lambda _, i: gradients[i], Formulas(sgd, {"lr": 1.0}, 2), **settings)
    assert outcome.alpha == pytest.approx((0.5**0.5 + 1) / 2, abs=1e-15)
    outcome = algorithm1(w, lambda _, i: gradients[i], Formulas(sgd, {"lr": 1.0}, 2), scope="tensor", **settings)
    assert outcome.alpha == pytest.approx([1.0, 0.5], abs=1e-15)


@pytest.mark.parametrize("base", {**BASES, **MORE_BASES})
def test_transcribed_base_optimizers_are_torchs(base: str) -> None:
    """The formulas against torch.optim: as the base of the whole loop, with gradients that come and go."""
    base_optimizer, rule, hyper = {**BASES, **MORE_BASES}[base]
    generator = torch.Generator().manual_seed(3)
    start = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3,), (2, 2), ())]
    noise = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3,), (2, 2), ())]
    formulas, torchs = Formulas(rule, hyper, 3), TorchBase(base_optimizer, start, **hyper)
    ours, theirs = start, start
    for t, _ in itertools.product(range(4), range(2)):

        def gradient(points: list[Tensor], index: int, t: int = t) -> Gradients:
            return [
                None if (i + t + index) % 4 == 0 else (p + (t + 1) * n).sin()
                for i, (p, n) in enumerate(zip(points, noise, strict=True))
            ]

        settings = {"k": 2, "rho": 0.1, "alpha": 0.6, "adaptive": [True, False, True], "eta": 0.1}
        ours = algorithm1(ours, gradient, formulas, **settings).params
        theirs = algorithm1(theirs, gradient, torchs, **settings).params
        for p, q in zip(ours, theirs, strict=True):
            assert_close(base, p, q, 1e-14)
    for mine, other in zip(formulas.state, torchs.state, strict=True):
        assert set(mine) == set(other)
        for key, value in other.items():
            assert_close(key, torch.as_tensor(mine[key], dtype=torch.float64), value, 1e-14)
