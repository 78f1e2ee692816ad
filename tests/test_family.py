"""The methods of the family, each against a literal transcription of its own."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor

from lookbehind_fused import ASAM, SAM, Lookbehind, MultistepSAM
from tests.algorithm1 import Formulas, Gradients, TorchBase, algorithm1, ascend, clip, each, slow_step_size
from tests.conftest import assert_close, assert_same_state
from tests.test_tensors import RULES

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


def with_microbatches(
    weights: list[Tensor],
    gradient: Callable[[list[Tensor], int], Gradients],
    base: Formulas,
    k: int,
    rho: float,
    asam: bool,
    eta: float,
    alpha: float | str,
    m: int,
    scope: str = "global",
) -> list[Tensor]:
    """m-SAM (Foret et al. 2021, section 3), and Lookbehind in the same way: every microbatch goes its own way up, the
    fast weights move by the mean of what the microbatches find at their i-th points."""
    n, found = len(weights), []
    for microbatch in range(m):
        behind, of_microbatch = weights, []
        for _ in range(k):
            behind = ascend(behind, gradient(behind, microbatch), [rho] * n, [asam] * n, [eta] * n)
            of_microbatch.append(gradient(behind, microbatch))
        found.append(of_microbatch)
    fast = first = weights
    for i in range(k):
        fast = base(fast, [torch.stack([found[j][i][t] for j in range(m)]).mean(0) for t in range(n)])
        first = fast if i == 0 else first
    return interpolated(weights, first, fast, k, alpha, scope)


def switching(
    weights: list[Tensor],
    gradient: Callable[[list[Tensor], int], Gradients],
    base: Formulas,
    k: int,
    rho: float,
    alpha: float | str,
    scope: str = "global",
) -> list[Tensor]:
    """Lookbehind with another minibatch in every inner step, for its ascent and for its descent."""
    n = len(weights)
    fast = first = behind = weights
    for i in range(1, k + 1):
        behind = ascend(behind, gradient(behind, i), [rho] * n, [False] * n, [0.0] * n)
        fast = base(fast, gradient(behind, i))
        first = fast if i == 1 else first
    return interpolated(weights, first, fast, k, alpha, scope)


def free_ascent(
    weights: list[Tensor],
    gradient: Callable[[list[Tensor], int], Gradients],
    base: Formulas,
    k: int,
    rho: float,
    asam: bool,
    eta: float,
    alpha: float | str,
    memory: dict[str, Gradients],
) -> list[Tensor]:
    """Every inner step ascends with the last gradient that there was, and evaluates one on a minibatch of its own."""
    n = len(weights)
    fast = first = behind = weights
    for i in range(1, k + 1):
        if memory:
            behind = ascend(behind, memory["last"], [rho] * n, [asam] * n, [eta] * n)
        memory["last"] = gradient(behind, i)
        fast = base(fast, memory["last"])
        first = fast if i == 1 else first
    return interpolated(weights, first, fast, k, alpha, "global")


def interpolated(
    slow: list[Tensor], first: list[Tensor], fast: list[Tensor], k: int, alpha: float | str, scope: str
) -> list[Tensor]:
    a = [f - s for f, s in zip(first, slow, strict=True)]
    b = [f - s for f, s in zip(fast, slow, strict=True)]
    alphas = each(slow_step_size(a, b, k, alpha, scope), len(slow))
    return [s + x * (f - s) for s, f, x in zip(slow, fast, alphas, strict=True)]


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
        {"k": 3, "rho": 0.2, "adaptive": True, "eta": 0.1, "average": True, "max_grad_norm": 0.7, "loss_scale": 1.0},
        lambda *a: multistep(*a, 3, 0.2, True, 0.1, True, 0.7),
        4,
    ),
    "MultistepSAM-adaptive": (
        MultistepSAM,
        {"k": 3, "rho": 0.2, "adaptive": True, "eta": 0.05},
        lambda *a: multistep(*a, 3, 0.2, True, 0.05),
        4,
    ),
    "MultistepSAM-within-rho": (
        MultistepSAM,
        {"k": 3, "rho": 0.6, "rho_scope": "total"},
        lambda *a: multistep(*a, 3, 0.2, False, 0),
        4,
    ),
}

# Methods that evaluate several minibatches or microbatches in a step: class, its arguments, what makes a transcription,
# which of them an evaluation is to see, evaluations a step.
MICROBATCH, INNER_STEP = attrgetter("microbatch"), attrgetter("inner_step")
ON_SEVERAL: dict[str, tuple[Any, dict[str, Any], Callable[[], Callable[..., list[Tensor]]], Any, int]] = {
    "within-rho": (
        Lookbehind,
        {"k": 3, "rho": 0.6, "rho_scope": "total", "alpha": 1.0},
        lambda: (
            lambda w, gradient, base: algorithm1(w, lambda x, _: gradient(x, 0), base, k=3, rho=0.2, alpha=1.0).params
        ),
        MICROBATCH,
        4,
    ),
    "SAM-microbatches": (
        SAM,
        {"rho": 0.3, "microbatches": 3},
        lambda: lambda *a: with_microbatches(*a, 1, 0.3, False, 0, 1.0, 3),
        MICROBATCH,
        6,
    ),
    "ASAM-microbatches": (
        ASAM,
        {"rho": 0.3, "eta": 0.1, "microbatches": 2},
        lambda: lambda *a: with_microbatches(*a, 1, 0.3, True, 0.1, 1.0, 2),
        MICROBATCH,
        4,
    ),
    **{
        f"Lookbehind-microbatches-{k}-{alpha}-{scope}": (
            Lookbehind,
            {"k": k, "rho": 0.2, "alpha": alpha, "alpha_scope": scope, "microbatches": 2},
            lambda k=k, alpha=alpha, scope=scope: lambda *a: with_microbatches(*a, k, 0.2, False, 0, alpha, 2, scope),
            MICROBATCH,
            2 * (k + 1),
        )
        for k, alpha, scope in (
            (2, 0.3, "global"),
            (3, 0.4, "global"),
            (2, "adaptive", "tensor"),
            (3, "adaptive", "global"),
        )
    },
    "Lookbehind-microbatches-2k": (
        Lookbehind,
        {"k": 2, "rho": 0.2, "alpha": 0.3, "microbatches": 2, "reuse_gradient": False},
        lambda: lambda *a: with_microbatches(*a, 2, 0.2, False, 0, 0.3, 2),
        MICROBATCH,
        8,
    ),
    **{
        f"switching-{k}-{alpha}-{scope}": (
            Lookbehind,
            {"k": k, "rho": 0.2, "alpha": alpha, "alpha_scope": scope, "reuse_gradient": False},
            lambda k=k, alpha=alpha, scope=scope: lambda *a: switching(*a, k, 0.2, alpha, scope),
            INNER_STEP,
            2 * k,
        )
        for k, alpha, scope in ((2, 0.5, "global"), (3, "adaptive", "global"), (2, "adaptive", "tensor"))
    },
    "SAM-free": (
        SAM,
        {"rho": 0.3, "ascent_gradient": "previous"},
        lambda: partial(free_ascent, k=1, rho=0.3, asam=False, eta=0, alpha=1.0, memory={}),
        INNER_STEP,
        1,
    ),
    "ASAM-free": (
        ASAM,
        {"rho": 0.3, "eta": 0.1, "ascent_gradient": "previous"},
        lambda: partial(free_ascent, k=1, rho=0.3, asam=True, eta=0.1, alpha=1.0, memory={}),
        INNER_STEP,
        1,
    ),
    **{
        f"Lookbehind-free-{k}-{alpha}": (
            Lookbehind,
            {"k": k, "rho": 0.2, "alpha": alpha, "ascent_gradient": "previous"},
            lambda k=k, alpha=alpha: partial(free_ascent, k=k, rho=0.2, asam=False, eta=0, alpha=alpha, memory={}),
            INNER_STEP,
            k,
        )
        for k, alpha in ((2, 0.5), (3, 0.4), (3, "adaptive"))
    },
}


class Problem:
    """Tensors whose gradient is a formula of the weights."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(5)
        shapes = [(5, 3), (17,), (1,)]
        draw = [torch.randn((3, *s), generator=generator, dtype=torch.float64) for s in shapes]
        self.curvature, self.slope = [d[0].abs() for d in draw], [d[1] for d in draw]
        self.params = [d[2].to(dtype).requires_grad_() for d in draw]

    def gradient(self, weights: list[Tensor], batch: int = 0) -> Gradients:
        return [
            c.to(w.dtype) * w.tanh() + (1 - 0.7 * batch) * s.to(w.dtype)
            for c, w, s in zip(self.curvature, weights, self.slope, strict=True)
        ]

    def evaluate(self, batch: int = 0) -> Tensor:
        for p, g in zip(self.params, self.gradient([p.detach() for p in self.params], batch), strict=True):
            p.grad = g
        return torch.full((), float(batch))


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


@pytest.mark.sample(72)
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


@pytest.mark.sample(96)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ON_SEVERAL)
def test_a_method_on_several_batches_is_its_transcription(
    backend: str, method: str, rule: str, form: str, dtype: torch.dtype
) -> None:
    make, arguments, transcribe, batch_of, count = ON_SEVERAL[method]
    (optimizer_class, formula), hyper = RULES[rule]
    problem, oracle, transcription = Problem(dtype), Problem(), transcribe()
    optimizer = make(problem.params, optimizer_class, backend=backend, **arguments, **hyper)
    if form == "pairs" and "free" in method:  # it has no such form
        problem.evaluate()
        with pytest.raises(RuntimeError, match="^ascent_step.*: expected ascent_gradient='current'.*got 'previous'"):
            optimizer.ascent_step()
        return
    expected = [p.detach().clone().double() for p in problem.params]
    base = Formulas(formula, hyper, len(problem.params))
    first_index = 1 if "free" in method else 0
    plan = optimizer.program(optimizer.reuse_gradient and form != "pairs").evaluations[first_index:]
    for _ in range(4):
        order = iter(plan)
        if form == "step" and optimizer.microbatches > 1:
            loss = optimizer.step(lambda evaluation: problem.evaluate(batch_of(evaluation)))
            assert loss == (optimizer.microbatches - 1) / 2, "the mean over the microbatches at the slow weights"
        elif form == "step":
            optimizer.step(lambda order=order: problem.evaluate(batch_of(next(order))))
        elif form == "evaluations":
            indices = [problem.evaluate(batch_of(e)) is not None and e.index for e in optimizer.evaluations()]
            assert indices == list(range(first_index, first_index + count))
        else:
            for evaluation in order:
                problem.evaluate(batch_of(evaluation))
                (optimizer.ascent_step if evaluation.ascends else optimizer.descent_step)()
        expected = transcription(expected, oracle.gradient, base)
        for i, (p, w) in enumerate(zip(problem.params, expected, strict=True)):
            assert_close(f"weights of tensor {i}", p.detach(), w, TOLERANCE[dtype] * 4)
            for key, value in base.state[i].items():
                found = torch.as_tensor(optimizer.state[p][key])
                assert_close(f"{key} of tensor {i}", found, torch.as_tensor(value), TOLERANCE[dtype] * 4)


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


@pytest.mark.parametrize("broken", [None, 0, 2, 4])
def test_averages_where_gradients_are_missing_not_finite_or_scaled(backend: str, broken: int | None) -> None:
    """One that is missing counts as 0; the base moves what had any, with what is left. One that is not finite undoes it
    all.
    """
    p, q = torch.ones(3, dtype=torch.float64).requires_grad_(), torch.ones(2, dtype=torch.float64).requires_grad_()
    settings = {"nonfinite": "skip", "loss_scale": 4.0, "average": True, "backend": backend}
    optimizer = MultistepSAM([p, q], torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.0, k=4, **settings)
    for evaluation in optimizer.evaluations():
        if evaluation.index != 2 or broken == 2:
            p.grad = torch.full_like(p, 8.0 if evaluation.index != broken else float("nan"))
        if evaluation.index in (1, 2):
            q.grad = torch.full_like(q, 16.0)
    assert optimizer.diagnostics["skipped"] == (broken is not None)
    if broken is None:
        assert_close("p", p.detach(), torch.full_like(p, 1 - 0.1 * 2.0 * 3 / 4).detach(), 1e-12)
        assert_close("q", q.detach(), torch.full_like(q, 1 - 0.1 * 4.0 * 2 / 4).detach(), 1e-12)
        assert set(optimizer.state) == {p, q}
    else:
        assert torch.equal(p, torch.ones_like(p))
        assert torch.equal(q, torch.ones_like(q))
        assert not optimizer.state
        assert p.grad is q.grad is None


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
    (bucket,) = optimizer._prepared.buckets
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


# ---- microbatches ----------------------------------------------------------------------------------------------------


def test_an_evaluation_takes_its_part_of_a_batch(backend: str) -> None:
    problem = Problem()
    optimizer = SAM(problem.params, torch.optim.SGD, lr=0.1, microbatches=3, backend=backend)
    inputs = torch.arange(6)
    parts = [(problem.evaluate() is not None) and e.part(inputs).tolist() for e in optimizer.evaluations()]
    assert parts == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]


def test_a_number_of_microbatches_that_does_not_divide_the_batch(backend: str) -> None:
    problem = Problem()
    optimizer = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, momentum=0.9, microbatches=3, backend=backend)
    optimizer.step(lambda evaluation: problem.evaluate(evaluation.microbatch))
    before = [p.detach().clone() for p in problem.params]
    state = copy.deepcopy(optimizer.state_dict())

    def closure(evaluation: Any) -> Tensor:
        evaluation.part(torch.arange(6 if evaluation.microbatch < 2 else 7))
        return problem.evaluate()

    with pytest.raises(
        ValueError, match="^microbatches: expected a number that divides the batch, got 3 for a batch of 7"
    ):
        optimizer.step(closure)
    assert all(torch.equal(p, w) for p, w in zip(problem.params, before, strict=True))
    assert_same_state(optimizer.state_dict(), state)


def test_a_closure_that_does_not_take_its_microbatch(backend: str) -> None:
    problem = Problem()
    optimizer = SAM(problem.params, torch.optim.SGD, lr=0.1, microbatches=2, backend=backend)
    with pytest.raises(TypeError, match="^closure: expected a function of the Evaluation, since microbatches is 2"):
        optimizer.step(lambda: problem.evaluate())


@pytest.mark.parametrize("k", [1, 3])
def test_equal_microbatches_are_one_batch(backend: str, k: int) -> None:
    results = []
    for m in (1, 4):
        problem = Problem()
        settings = {"rho": 0.2, "k": k, "alpha": 0.5, "microbatches": m, "backend": backend}
        optimizer = Lookbehind(problem.params, torch.optim.Adam, lr=0.1, **settings)
        for _ in range(3):
            optimizer.step(lambda *_, problem=problem: problem.evaluate())
        results.append(problem.params)
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert_close(f"tensor {i}", a.detach(), b.detach(), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_microbatches_of_16_bits_begin_at_the_slow_weights(backend: str, dtype: torch.dtype) -> None:
    problem, exact = Problem(dtype), Problem()
    for p, w in zip(problem.params, exact.params, strict=True):
        w.data.copy_(p.data)
    seen = []
    for one in (problem, exact):
        optimizer = Lookbehind(one.params, torch.optim.SGD, lr=0.1, rho=0.2, microbatches=2, backend=backend)
        for evaluation in optimizer.evaluations():
            if not evaluation.perturbed:
                seen.append([p.detach().clone() for p in one.params])
            one.evaluate(evaluation.microbatch)
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    for i, (p, w) in enumerate(zip(problem.params, exact.params, strict=True)):
        assert_close(f"tensor {i}", p.detach().double(), w.detach(), 4 * torch.finfo(dtype).eps)


def test_one_broken_microbatch_undoes_the_step(backend: str) -> None:
    """The others are not evaluated, but for the pair form, in which they have no effect."""
    p = torch.ones(3, dtype=torch.float64).requires_grad_()
    optimizer = SAM([p], torch.optim.SGD, lr=0.1, rho=0.0, nonfinite="skip", microbatches=2, backend=backend)
    for evaluation in optimizer.evaluations():
        p.grad = torch.full_like(p, 2.0 if evaluation.microbatch else float("inf"))
    assert torch.equal(p, torch.ones_like(p))
    assert optimizer.diagnostics["skipped"] == 1
    assert evaluation.index == 0
    for index in range(4):
        p.grad = torch.full_like(p, 2.0 if index else float("inf"))
        (optimizer.descent_step if index % 2 else optimizer.ascent_step)()
    assert torch.equal(p, torch.ones_like(p))
    assert optimizer.evaluation is p.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_microbatch_begins_at_the_slow_weights_where_a_gradient_comes_late(backend: str, dtype: torch.dtype) -> None:
    """b has no gradient at the second microbatch's first evaluation, and one at the next."""
    a, b = (torch.tensor(values, dtype=dtype).requires_grad_() for values in ([1.0, 2.0], [4.0]))
    settings = {"k": 2, "alpha": 1.0, "rho": 1.0, "microbatches": 2, "backend": backend}
    seen = []
    for evaluation in Lookbehind([a, b], torch.optim.SGD, lr=0.1, **settings).evaluations():
        seen.append(b.item())
        a.grad, b.grad = 2 * a.detach(), None if evaluation.index == 3 else 2 * b.detach()
    assert seen[4] == 4.0
    a_1 = torch.tensor([1.0, 2.0]).double() * (1 + 1 / 5**0.5)
    ascent = 8 / float((4 * a_1.square().sum() + 64).sqrt())
    assert seen[5] == pytest.approx(4 + ascent, rel=1e-12 if dtype == torch.float64 else 1e-2)


def test_a_loss_that_has_no_mean(backend: str) -> None:
    problem = Problem()
    optimizer = SAM(problem.params, torch.optim.SGD, lr=0.1, microbatches=2, backend=backend)
    before = [p.detach().clone() for p in problem.params]
    with pytest.raises(
        TypeError, match=r"^closure: expected a loss that a mean over microbatches can be taken of, got \("
    ):
        optimizer.step(lambda evaluation: (problem.evaluate(), 1))
    assert all(torch.equal(p, w) for p, w in zip(problem.params, before, strict=True))


def test_average_may_be_turned_on(backend: str) -> None:
    problem = Problem()
    optimizer = MultistepSAM(problem.params, torch.optim.SGD, lr=0.1, k=1, rho=0.2, backend=backend)
    optimizer.step(problem.evaluate)
    alone = Problem()
    for p, w in zip(alone.params, problem.params, strict=True):
        p.data.copy_(w.data)
    optimizer.average = True
    optimizer.step(problem.evaluate)
    SAM(alone.params, torch.optim.SGD, lr=0.1, rho=0.2, backend=backend).step(alone.evaluate)
    for i, (p, w) in enumerate(zip(problem.params, alone.params, strict=True)):
        assert_close(f"tensor {i}", p.detach(), w.detach(), 1e-12)


# ---- free ascent -----------------------------------------------------------------------------------------------------


def test_free_ascent_has_no_pair_form(backend: str) -> None:
    problem = Problem()
    optimizer = SAM(problem.params, torch.optim.SGD, lr=0.1, ascent_gradient="previous", backend=backend)
    problem.evaluate()
    with pytest.raises(RuntimeError, match="^ascent_step.*: expected ascent_gradient='current'.*got 'previous'"):
        optimizer.first_step()


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_free_ascent_goes_on_with_the_same_bits(backend: str, way: str) -> None:
    problem, other = Problem(), Problem()

    def make(params: list[Tensor]) -> Lookbehind:
        settings = {"rho": 0.2, "k": 2, "ascent_gradient": "previous", "backend": backend}
        return Lookbehind(params, torch.optim.SGD, lr=0.1, momentum=0.9, **settings)

    optimizer = make(problem.params)
    optimizer.step(problem.evaluate)
    if way == "state_dict":
        for p, w in zip(other.params, problem.params, strict=True):
            p.data.copy_(w.data)
        second = make(other.params)
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        second = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        other.params = second.param_groups[0]["params"]
    for _ in range(2):
        optimizer.step(problem.evaluate)
        second.step(other.evaluate)
    assert all(torch.equal(p, w) for p, w in zip(problem.params, other.params, strict=True))
    assert_same_state(second.state_dict(), optimizer.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    saved["lookbehind"]["previous"].pop()
    with pytest.raises(ValueError, match="^state_dict: expected previous gradients of shapes"):
        optimizer.load_state_dict(saved)


def test_free_ascent_that_fails_or_loses_a_gradient(backend: str) -> None:
    """Weights, state and the gradient to ascend with are those of before; a tensor without one does not ascend."""
    problem, alone = Problem(), Problem()
    settings = {"rho": 0.2, "k": 2, "ascent_gradient": "previous", "backend": backend}
    optimizer = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, momentum=0.9, **settings)
    undisturbed = Lookbehind(alone.params, torch.optim.SGD, lr=0.1, momentum=0.9, **settings)
    for one, o in ((problem, optimizer), (alone, undisturbed)):
        o.step(one.evaluate)
    for after in (0, 1):
        before, calls = [p.detach().clone() for p in problem.params], []

        def closure(calls: list = calls, after: int = after) -> Tensor:
            calls.append(problem.evaluate(3))
            return calls[-1] if len(calls) <= after else 1 // 0

        with pytest.raises(ZeroDivisionError):
            optimizer.step(closure)
        assert all(torch.equal(p, w) for p, w in zip(problem.params, before, strict=True))
    for one, o in ((problem, optimizer), (alone, undisturbed)):
        o.step(one.evaluate)
    assert all(torch.equal(p, w) for p, w in zip(problem.params, alone.params, strict=True))

    for evaluation in optimizer.evaluations():
        problem.evaluate()
        if evaluation.inner_step == 2:
            problem.params[0].grad = None
    slow = [p.detach().clone() for p in problem.params]
    for evaluation in optimizer.evaluations():
        if evaluation.inner_step == 1:
            assert torch.equal(problem.params[0], slow[0])
            assert not torch.equal(problem.params[1], slow[1])
        problem.evaluate()


def test_free_ascent_leaves_frozen_tensors_and_counts_a_skip_once(backend: str) -> None:
    p, q = (torch.ones(2, dtype=torch.float64).requires_grad_() for _ in range(2))
    settings = {"rho": 0.2, "nonfinite": "skip", "ascent_gradient": "previous", "backend": backend}
    optimizer = SAM([p, q], torch.optim.SGD, lr=0.1, **settings)
    skipped = []
    for factor in (1.0, float("nan"), 1.0):
        for _ in optimizer.evaluations():
            p.grad, q.grad = torch.full_like(p, factor), torch.ones_like(q)
        skipped.append(int(optimizer.diagnostics["skipped"]))
    assert skipped == [0, 1, 0]
    q.requires_grad_(False)
    slow = q.detach().clone()
    for _ in optimizer.evaluations():
        assert torch.equal(q, slow)
        p.grad = torch.ones_like(p)


def test_a_refused_gradient_of_a_later_bucket_leaves_the_state_of_the_first(backend: str) -> None:
    p, q = (torch.ones(3, 2, dtype=torch.float64).requires_grad_() for _ in range(2))
    for settings in ({"k": 1, "ascent_gradient": "previous"}, {"k": 2}):
        groups = [{"params": [p]}, {"params": [q]}]
        optimizer = Lookbehind(groups, torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend, **settings)
        for sparse in (False, True):
            state, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone(), q.detach().clone()]

            def step(sparse: bool = sparse, optimizer: Lookbehind = optimizer) -> None:
                for evaluation in optimizer.evaluations():
                    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
                    if sparse and evaluation.closes:
                        q.grad = torch.ones_like(q).to_sparse()

            if sparse:
                with pytest.raises(RuntimeError, match="^the gradient of parameter 1 .*: expected a dense tensor"):
                    step()
                assert_same_state(optimizer.state_dict(), state)
                assert torch.equal(p, weights[0])
                assert torch.equal(q, weights[1])
            else:
                step()


def test_free_ascent_can_be_turned_on_and_off(backend: str) -> None:
    """As SAM in between; the first step after it is turned on has nothing to ascend with."""
    problem = Problem()
    optimizer = SAM(problem.params, torch.optim.SGD, lr=0.1, rho=0.2, backend=backend)
    counts = []
    for gradient in ("current", "previous", "previous", "current", "previous"):
        optimizer.ascent_gradient = gradient
        slow = [p.detach().clone() for p in problem.params]
        moved = []
        for _ in optimizer.evaluations():
            moved.append(not torch.equal(problem.params[0], slow[0]))
            problem.evaluate()
        counts.append(moved)
    assert counts == [[False, True], [False], [True], [False, True], [False]]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "method", ["SAM-microbatches", "Lookbehind-microbatches-2-0.3-global", "Lookbehind-free-2-0.5"]
)
def test_a_base_of_its_own_step_in_several_buckets(backend: str, method: str, groups: int) -> None:
    """Adagrad, which has no rule: torch's own step in the transcription too. One parameter group, and two."""
    make, arguments, transcribe, batch_of, _ = ON_SEVERAL[method]
    problem, oracle, transcription = Problem(), Problem(), transcribe()
    params = problem.params if groups == 1 else [{"params": problem.params[:1]}, {"params": problem.params[1:]}]
    optimizer = make(params, torch.optim.Adagrad, lr=0.1, backend=backend, **arguments)
    expected = [p.detach().clone() for p in problem.params]
    base = TorchBase(torch.optim.Adagrad, expected, lr=0.1)
    for _ in range(3):
        for evaluation in optimizer.evaluations():
            problem.evaluate(batch_of(evaluation))
        expected = transcription(expected, oracle.gradient, base)
        for i, (p, w) in enumerate(zip(problem.params, expected, strict=True)):
            assert_close(f"tensor {i}", p.detach(), w, 1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"microbatches": 0}, ValueError, "microbatches: expected an int >= 1, got 0"),
        ({"microbatches": 2.0}, TypeError, "microbatches: expected an int >= 1, got 2.0"),
        ({"rho_scope": "all"}, ValueError, """rho_scope: expected "step" or "total", got 'all'"""),
        ({"ascent_gradient": "last"}, ValueError, """ascent_gradient: expected "current" or "previous", got 'last'"""),
        (
            {"ascent_gradient": "previous", "microbatches": 2},
            ValueError,
            "ascent_gradient: expected 'current' with micro",
        ),
        (
            {"ascent_gradient": "previous", "reuse_gradient": False},
            ValueError,
            "ascent_gradient: expected 'current' with",
        ),
        ({"buffers_at_slow": 1}, TypeError, "buffers_at_slow: expected a torch.nn.Module, got 1"),
        (
            {"buffers_at_slow": torch.nn.Linear(1, 1), "ascent_gradient": "previous"},
            ValueError,
            "buffers_at_slow: expected None with ascent_gradient='previous'",
        ),
    ],
)
def test_bad_settings(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    problem = Problem()
    base = torch.optim.SGD(problem.params, lr=0.1)
    keys = list(base.param_groups[0])
    with pytest.raises(error, match=f"^{message}"):
        Lookbehind(None, base, **arguments)
    assert list(base.param_groups[0]) == keys
    optimizer = Lookbehind(None, base)
    before = [p.detach().clone() for p in problem.params]
    for name, value in arguments.items():
        setattr(optimizer, name, value)
    if "Module" not in message:
        with pytest.raises(error, match=f"^{message}"):
            optimizer.step(problem.evaluate)
        assert all(torch.equal(p, w) for p, w in zip(problem.params, before, strict=True))
