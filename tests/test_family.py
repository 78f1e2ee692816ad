"""The methods of the family, each against a literal transcription of its own."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lookbehind_fused import ASAM, SAM, Lookbehind, MultistepSAM
from tests.algorithm1 import Formulas, Gradients, algorithm1, ascend, clip
from tests.conftest import assert_close
from tests.test_parameters import RULES

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
Gradient = Callable[[list[Tensor]], Gradients]


# ---- transcriptions --------------------------------------------------------------------------------------------------


def sam(weights: list[Tensor], gradient: Gradient, base: Formulas, rho: float, asam: bool, eta: float) -> list[Tensor]:
    """Foret et al. 2021, algorithm 1; with ``asam`` Kwon et al. 2021, algorithm 1."""
    g = gradient(weights)
    scaling = [w.abs() + eta if asam else torch.ones_like(w) for w in weights]
    length = torch.stack([(t * x).square().sum() for t, x in zip(scaling, g, strict=True)]).sum().sqrt()
    behind = [w + rho * t**2 * x / (length + 1e-16) for w, t, x in zip(weights, scaling, g, strict=True)]
    return base(weights, gradient(behind))


def multistep(
    weights: list[Tensor],
    gradient: Gradient,
    base: Formulas,
    k: int,
    rho: float,
    asam: bool,
    eta: float,
    average: bool = False,
    most: float | None = None,
) -> list[Tensor]:
    """k ascents in a row, and one descent from where they began, with the last gradient or the mean of those behind."""
    n, behind, gathered = len(weights), weights, []
    for _ in range(k):
        behind = ascend(behind, gradient(behind), [rho] * n, [asam] * n, [eta] * n)
        gathered.append(gradient(behind))
    g = [torch.stack(of_tensor).mean(0) for of_tensor in zip(*gathered, strict=True)] if average else gathered[-1]
    return base(weights, clip(g, most))


# ---- the table: class, its arguments, transcription, gradients a step ------------------------------------------------

METHODS: dict[str, tuple[Any, dict[str, Any], Callable[..., list[Tensor]], int]] = {
    "SAM": (SAM, {"rho": 0.3}, lambda *a: sam(*a, 0.3, False, 0), 2),
    "SAM-adaptive": (SAM, {"rho": 0.3, "adaptive": True, "eta": 0.1}, lambda *a: sam(*a, 0.3, True, 0.1), 2),
    "ASAM": (ASAM, {"rho": 0.7, "eta": 0.05}, lambda *a: sam(*a, 0.7, True, 0.05), 2),
    **{
        f"MultistepSAM-{k}": (
            MultistepSAM,
            {"k": k, "rho": 0.2},
            lambda *a, k=k: multistep(*a, k, 0.2, False, 0),
            k + 1,
        )
        for k in (1, 2, 3)
    },
    **{
        f"MultistepSAM-{k}-average": (
            MultistepSAM,
            {"k": k, "rho": 0.2, "average": True},
            lambda *a, k=k: multistep(*a, k, 0.2, False, 0, True),
            k + 1,
        )
        for k in (1, 2, 4)
    },
    "MultistepSAM-average-clipped": (
        MultistepSAM,
        {"k": 3, "rho": 0.2, "adaptive": True, "eta": 0.1, "average": True, "max_grad_norm": 0.7, "grad_scale": 1.0},
        lambda *a: multistep(*a, 3, 0.2, True, 0.1, True, 0.7),
        4,
    ),
    "MultistepSAM-adaptive": (
        MultistepSAM,
        {"k": 3, "rho": 0.2, "adaptive": True, "eta": 0.05},
        lambda *a: multistep(*a, 3, 0.2, True, 0.05),
        4,
    ),
}


class Problem:
    """Tensors whose gradient is a formula of the weights."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(5)
        shapes = [(5, 3), (17,), (1,)]
        draw = [torch.randn((3, *s), generator=generator, dtype=torch.float64) for s in shapes]
        self.curvature, self.slope = [d[0].abs() for d in draw], [d[1] for d in draw]
        self.params = [d[2].to(dtype).requires_grad_() for d in draw]

    def gradient(self, weights: list[Tensor]) -> Gradients:
        return [
            c.to(w.dtype) * w.tanh() + s.to(w.dtype)
            for c, w, s in zip(self.curvature, weights, self.slope, strict=True)
        ]

    def evaluate(self) -> Tensor:
        for p, g in zip(self.params, self.gradient([p.detach() for p in self.params]), strict=True):
            p.grad = g
        return torch.zeros(())


def run(optimizer: Lookbehind, problem: Problem, form: str, gradients: int) -> int:
    """One outer step; how many gradients it took."""
    count = 0

    def evaluate() -> Tensor:
        nonlocal count
        count += 1
        return problem.evaluate()

    if form == "step":
        optimizer.step(evaluate)
    elif form == "evaluations":
        for _ in optimizer.evaluations():
            evaluate()
    else:  # the halves, as trainers call them that own everything
        halves = (optimizer.first_step, optimizer.second_step) if isinstance(optimizer, SAM) else None
        for number in range(gradients):
            evaluate()
            last = number + 1 == gradients
            if halves:
                halves[last](zero_grad=True)
                assert all(p.grad is None for p in problem.params)
            else:
                (optimizer.descent_step if last else optimizer.ascent_step)()
    return count


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", ["step", "evaluations", "halves"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_transcription(backend: str, method: str, rule: str, form: str, dtype: torch.dtype) -> None:
    """Weights and the base's state over three steps, from the class and from an instance of the base."""
    make, arguments, transcription, gradients = METHODS[method]
    (optimizer_class, formula), hyper = RULES[rule]
    problem, oracle = Problem(dtype), Problem()
    if form == "evaluations":
        optimizer = make(None, optimizer_class(problem.params, **hyper), backend=backend, **arguments)
    else:
        optimizer = make(problem.params, optimizer_class, backend=backend, **arguments, **hyper)
    expected, base = [p.detach().clone() for p in problem.params], Formulas(formula, hyper, len(problem.params))
    expected = [w.double() for w in expected]
    for _ in range(3):
        assert run(optimizer, problem, form, gradients) == gradients
        expected = transcription(expected, oracle.gradient, base)
        for i, (p, w) in enumerate(zip(problem.params, expected, strict=True)):
            assert_close(f"weights of tensor {i}", p.detach(), w, TOLERANCE[dtype] * 3)
            for key, value in base.state[i].items():
                found = torch.as_tensor(optimizer.state[p][key])
                assert_close(f"{key} of tensor {i}", found, torch.as_tensor(value), TOLERANCE[dtype] * 3)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_the_same_is_the_same_to_the_bit(backend: str, rule: str) -> None:
    """SAM, MultistepSAM with k = 1, Lookbehind with k = 1 and alpha = 1; ASAM likewise."""
    (optimizer_class, _), hyper = RULES[rule]
    for same in (
        [(SAM, {}), (MultistepSAM, {"k": 1}), (Lookbehind, {"k": 1, "alpha": 1.0})],
        [(ASAM, {}), (SAM, {"adaptive": True}), (MultistepSAM, {"k": 1, "adaptive": True})],
    ):
        results = []
        for make, arguments in same:
            problem = Problem()
            optimizer = make(problem.params, optimizer_class, rho=0.2, backend=backend, **arguments, **hyper)
            for _ in range(3):
                optimizer.step(problem.evaluate)
            results.append(problem.params)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("k", [2, 3])
def test_lookbehind_over_plain_sgd_averages_gradients(backend: str, k: int) -> None:
    """With alpha = 1 / k (Mordido et al. 2024, section 3)."""
    results = []
    for make, arguments in ((MultistepSAM, {"average": True}), (Lookbehind, {"alpha": 1 / k})):
        problem = Problem()
        optimizer = make(problem.params, torch.optim.SGD, lr=0.1, rho=0.2, k=k, backend=backend, **arguments)
        for _ in range(3):
            optimizer.step(problem.evaluate)
        results.append(problem.params)
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert_close(f"tensor {i}", a.detach(), b.detach(), 1e-12)


def test_averages_where_gradients_are_missing_not_finite_or_scaled(backend: str) -> None:
    """Each counts as 0; the base moves what had any, with what is left."""
    p, q = torch.ones(3, dtype=torch.float64).requires_grad_(), torch.ones(2, dtype=torch.float64).requires_grad_()
    settings = {"nonfinite": "skip", "grad_scale": 4.0, "average": True, "backend": backend}
    optimizer = MultistepSAM([p, q], torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.0, k=4, **settings)
    for evaluation in optimizer.evaluations():
        p.grad = torch.full_like(p, 8.0 if evaluation.index != 2 else float("nan"))
        if evaluation.index == 1:
            q.grad = torch.full_like(q, 16.0)
    assert_close("p", p.detach(), torch.full_like(p, 1 - 0.1 * 2.0 * 3 / 4).detach(), 1e-12)
    assert_close("q", q.detach(), torch.full_like(q, 1 - 0.1 * 4.0 * 1 / 4).detach(), 1e-12)
    assert optimizer.diagnostics["skipped"] == 1
    assert set(optimizer.state) == {p, q}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_averages_of_16_bits(backend: str, dtype: torch.dtype) -> None:
    """The mean is kept in float32 and rounded once; a base of its own step() takes it too."""
    for base in (torch.optim.SGD, torch.optim.Adagrad):
        problem, exact = Problem(dtype), Problem()
        for p, w in zip(problem.params, exact.params, strict=True):
            w.data.copy_(p.data)
        for one in (problem, exact):
            optimizer = MultistepSAM(one.params, base, lr=0.1, rho=0.2, k=3, average=True, backend=backend)
            optimizer.step(one.evaluate)
        for i, (p, w) in enumerate(zip(problem.params, exact.params, strict=True)):
            assert_close(f"tensor {i}", p.detach().double(), w.detach(), 4 * torch.finfo(dtype).eps)


def test_copies_know_whether_they_average(backend: str) -> None:
    problem = Problem()
    optimizer = MultistepSAM(problem.params, torch.optim.SGD, lr=0.1, k=3, average=True, backend=backend)
    optimizer.step(problem.evaluate)
    assert copy.deepcopy(optimizer).average is True
    with pytest.raises(TypeError, match="^average: expected True or False, got 2"):
        MultistepSAM(problem.params, torch.optim.SGD, lr=0.1, average=2)


def test_multistep_keeps_one_copy(backend: str) -> None:
    """The slow weights: no fast ones, and no working copy of the state."""
    problem = Problem()
    optimizer = MultistepSAM(problem.params, torch.optim.Adam, lr=0.01, k=4, backend=backend)
    optimizer.step(problem.evaluate)
    (bucket,) = optimizer._buckets
    assert sorted(bucket.buffers) == ["exp_avg", "exp_avg_sq", "slow"]


@pytest.mark.parametrize("after", range(1, 4))
def test_an_exception_in_a_multistep(backend: str, after: int) -> None:
    problem = Problem()
    optimizer = MultistepSAM(problem.params, torch.optim.SGD, lr=0.1, momentum=0.9, k=3, backend=backend)
    optimizer.step(problem.evaluate)
    before = [p.detach().clone() for p in problem.params]
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in problem.params]
    calls = []

    def closure() -> Tensor:
        calls.append(problem.evaluate())
        return calls[-1] if len(calls) <= after else 1 // 0

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert all(torch.equal(p, w) for p, w in zip(problem.params, before, strict=True))
    assert all(
        torch.equal(optimizer.state[p]["momentum_buffer"], m) for p, m in zip(problem.params, momenta, strict=True)
    )


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [(SAM, "k", 2), (SAM, "alpha", 0.5), (ASAM, "adaptive", False), (MultistepSAM, "alpha", 0.5), (SAM, "rho", -1.0),
     (MultistepSAM, "k", 0), (MultistepSAM, "reuse_gradient", False)],
)  # fmt: skip
def test_what_a_method_does_not_take(make: Any, name: str, value: Any) -> None:
    """Named, with what came; nothing is changed."""
    problem = Problem()
    base = torch.optim.SGD(problem.params, lr=0.1)
    keys = list(base.param_groups[0])
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .*got {value!r}"):
        make(None, base, **{name: value})
    assert list(base.param_groups[0]) == keys


def test_the_method_may_change_during_training(backend: str) -> None:
    """SAM, then Lookbehind with k = 3, then SAM again: settings of one optimizer, the base's state carried along."""
    problem, oracle = Problem(), Problem()
    (optimizer_class, formula), hyper = RULES["sgd"]
    optimizer = SAM(problem.params, optimizer_class, rho=0.2, backend=backend, **hyper)
    weights, base = [p.detach().clone() for p in problem.params], Formulas(formula, hyper, 3)
    for k, alpha in ((1, 1.0), (3, 0.5), (1, 1.0)):
        optimizer.k, optimizer.alpha = k, alpha
        for _ in range(2):
            optimizer.step(problem.evaluate)
            outcome = algorithm1(weights, lambda w, index: oracle.gradient(w), base, k=k, rho=0.2, alpha=alpha)
            weights = outcome.params
            for i, (p, w) in enumerate(zip(problem.params, weights, strict=True)):
                assert_close(f"k = {k}, tensor {i}", p.detach(), w, 1e-12)
