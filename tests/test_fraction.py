"""Ascents by the gradient of a part of the minibatch (``ascent_fraction``), against a transcription over batches."""

import copy
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lookbehind_fused import ASAM, SAM, Evaluation, Lookahead, Lookbehind, MultistepSAM, compat
from tests.algorithm1 import Formulas, TorchBase, ascend, clip, norm, slow_step_size
from tests.conftest import assert_close, assert_equal, assert_same_state
from tests.test_tensors import RULES
from tests.twin import values

N, TOLERANCE = 10, 1e-12


def predictions(weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
    first, bias, last = weights
    return (inputs @ first + bias).tanh() @ last


def loss_of(weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Of examples that differ, so that no part of a minibatch has the gradient of another."""
    return (predictions(weights, inputs) - inputs.sin().sum(-1)).square().mean()


def minibatch(step: int) -> Tensor:
    return values(N, 3, seed=step)


def start() -> list[Tensor]:
    return [values(3, 5, seed=50).clone(), values(5, seed=51).clone(), values(5, seed=52).clone()]


def by_hand(
    weights: list[Tensor],
    inputs: Tensor,
    base: Callable[..., list[Tensor]],
    few: int,
    *,
    k: int = 1,
    rho: float = 0.2,
    asam: bool = False,
    eta: float = 0.0,
    alpha: float | str = 1.0,
    scope: str = "global",
    reuse: bool = True,
    most: float | None = None,
    multistep: bool = False,
    average: bool = False,
) -> tuple[list[Tensor], float, float]:
    """New weights; loss and length of the gradient at evaluation 0. ``few``: how many examples an ascent sees of the
    ``inputs`` where its gradient is for nothing else. ``multistep``: k ascents and one descent.
    """

    def gradient(points: list[Tensor], examples: Tensor) -> list[Tensor]:
        points = [w.detach().clone().requires_grad_() for w in points]
        return list(torch.autograd.grad(loss_of(points, examples), points))

    n = len(weights)
    loss, length = float(loss_of(weights, inputs[:few])), 0.0
    fast = first = behind = weights
    gathered: list[list[Tensor]] = []
    for i in range(1, k + 1):
        if i == 1 or not reuse or (multistep and not average):
            g = gradient(behind, inputs[:few])
        length = norm(g) if i == 1 else length
        behind = ascend(behind, g, [rho] * n, [asam] * n, [eta] * n)
        if multistep and not average and i < k:
            continue
        g = gradient(behind, inputs)
        if multistep:
            gathered.append(g)
            continue
        fast = base(fast, clip(g, most))
        first = fast if i == 1 else first
    if multistep:
        return base(weights, [torch.stack(of_one).mean(0) for of_one in zip(*gathered, strict=True)]), loss, length
    a, b = ([w - s for w, s in zip(moved, weights, strict=True)] for moved in (first, fast))
    alphas = slow_step_size(a, b, k, alpha, scope)
    alphas = alphas if isinstance(alphas, list) else [alphas] * n
    return [s + x * (f - s) for s, f, x in zip(weights, fast, alphas, strict=True)], loss, length


LOOKBEHIND = {
    f"Lookbehind-{k}-{alpha}-{scope}-{'reuse' if reuse else '2k'}": (
        Lookbehind,
        {"k": k, "rho": 0.2, "alpha": alpha, "alpha_scope": scope, "reuse_gradient": reuse},
        {"k": k, "alpha": alpha, "scope": scope, "reuse": reuse},
        ["few", *["all"] * k] if reuse else ["few", "all"] * k,
    )
    for k, alpha, scope in ((1, 0.6, "global"), (2, 0.4, "global"), (3, 0.5, "global"), (2, "adaptive", "tensor"),
                            (3, "adaptive", "global"))
    for reuse in (True, False)
}  # fmt: skip
METHODS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], list[str]]] = {
    "SAM": (SAM, {"rho": 0.2}, {}, ["few", "all"]),
    "ASAM": (ASAM, {"rho": 0.7, "eta": 0.1}, {"rho": 0.7, "asam": True, "eta": 0.1}, ["few", "all"]),
    "clipped": (
        Lookbehind,
        {"k": 2, "rho": 0.2, "alpha": 0.5, "max_grad_norm": 0.3},
        {"k": 2, "alpha": 0.5, "most": 0.3},
        ["few", "all", "all"],
    ),
    "Lookbehind-ASAM": (
        Lookbehind,
        {"k": 3, "rho": 0.5, "adaptive": True, "eta": 0.05, "alpha": "adaptive"},
        {"k": 3, "rho": 0.5, "asam": True, "eta": 0.05, "alpha": "adaptive"},
        ["few", "all", "all", "all"],
    ),
    **LOOKBEHIND,
    "MultistepSAM": (MultistepSAM, {"k": 3, "rho": 0.2}, {"k": 3, "multistep": True}, ["few", "few", "few", "all"]),
    "MultistepSAM-average": (
        MultistepSAM,
        {"k": 3, "rho": 0.2, "average": True},
        {"k": 3, "multistep": True, "average": True},
        ["few", "all", "all", "all"],
    ),
}
"""Class, its arguments, those of ``by_hand``, what its evaluations see."""

PARTS = {0.25: 2, 0.5: 5, 0.35: 4, 0.01: 1, 1: N}
"""Of ten examples: 2.5 and 3.5 become the even neighbour, 0.1 is one at least."""


class Work:
    """Parameters over minibatches that differ from step to step.

    Attributes:
        seen: of the last step, how many examples each evaluation had.
    """

    def __init__(self, make: Callable[[list[nn.Parameter]], Any]) -> None:
        self.params = [nn.Parameter(w) for w in start()]
        self.optimizer, self.steps, self.seen = make(self.params), 0, list[int]()

    def closure(self, evaluation: Evaluation | None = None) -> Tensor:
        examples = minibatch(self.steps)
        examples = examples if evaluation is None else evaluation.part(examples)
        self.seen.append(len(examples))
        loss = loss_of(self.params, examples)
        loss.backward()
        return loss.detach()

    def step(self, form: str = "step") -> Any:
        """The loss of evaluation 0."""
        self.seen = []
        if form == "step":
            loss = self.optimizer.step(self.closure)
        else:
            loss, *_ = [self.closure(evaluation) for evaluation in self.optimizer.evaluations()]
        self.steps += 1
        return loss


def theirs(base: str, params: Sequence[Tensor]) -> tuple[Any, dict[str, Any], Any]:
    """Class and settings of a base, and what stands for it in the transcription; Adagrad runs its own step."""
    if base == "Adagrad":
        return torch.optim.Adagrad, {"lr": 0.05}, TorchBase(torch.optim.Adagrad, params, lr=0.05)
    (kind, formula), hyper = RULES[base]
    return kind, hyper, Formulas(formula, hyper, len(params))


@pytest.mark.sample(72)
@pytest.mark.parametrize("fraction", PARTS)
@pytest.mark.parametrize("form", ["step", "evaluations"])
@pytest.mark.parametrize("base", [*RULES, "Adagrad"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_transcription(backend: str, method: str, base: str, form: str, fraction: float) -> None:
    """Weights, the loss that is returned, the length of the first gradient, what evaluations have seen; three steps."""
    make, arguments, by_hands, sees = METHODS[method]
    kind, hyper, formula = theirs(base, start())
    work = Work(lambda p: make(p, kind, ascent_fraction=fraction, backend=backend, **arguments, **hyper))
    expected = start()
    for number in range(3):
        found = work.step(form)
        expected, loss, length = by_hand(expected, minibatch(number), formula, PARTS[fraction], **by_hands)
        for i, (p, w) in enumerate(zip(work.params, expected, strict=True)):
            assert_close(f"weights of tensor {i}", p.detach(), w, TOLERANCE * 10)
        assert float(found) == pytest.approx(loss, rel=1e-10)
        assert float(work.optimizer.diagnostics["grad_norm"]) == pytest.approx(length, rel=1e-10)
        assert work.seen == [PARTS[fraction] if what == "few" else N for what in sees]


@pytest.mark.parametrize("size", range(1, 40))
@pytest.mark.parametrize("fraction", [1 / 2, 1 / 3, 1 / 4, 0.1, 1 / 16, 1e-9, 0.999, 1])
def test_a_part_is_rounded_to_the_nearest(fraction: float, size: int) -> None:
    """Whatever is nearer is wrong, a half is the even one, and one is there always."""
    part = Evaluation(0, 1, False, ascends=True, fraction=fraction).part(torch.arange(size))
    assert part.tolist() == list(range(len(part)))
    assert len(part) >= 1
    away = abs(len(part) - fraction * size)
    assert away <= 0.5 or len(part) == 1
    assert away != 0.5 or len(part) % 2 == 0 or len(part) == 1


# ---- what it goes together with --------------------------------------------------------------------------------------


def quarter(params: Any, base: type[Optimizer] = torch.optim.SGD, **settings: Any) -> Lookbehind:
    settings = {"lr": 0.05, "momentum": 0.9, "rho": 0.2, "k": 2, "ascent_fraction": 0.25, **settings}
    return Lookbehind(params, base, **settings)


def test_a_scaler_knows_an_overflow_of_the_part(backend: str) -> None:
    """The step is undone, and the next one is as without it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    work = Work(lambda p: quarter(p, backend=backend, scaler=scaler))
    plain = Work(lambda p: quarter(p, backend=backend))
    broken = [True]

    def closure(evaluation: Evaluation) -> Tensor:
        loss = loss_of(work.params, evaluation.part(minibatch(work.steps)))
        scaler.scale(loss).backward()
        if evaluation.index == 0 and broken.pop():
            work.params[0].grad[0, 0] = float("inf")
        broken.append(False)
        return loss.detach()

    for number in range(3):
        before = [p.detach().clone() for p in work.params]
        scaler.step(work.optimizer, closure)
        scaler.update()
        if number == 0:
            assert all(map(torch.equal, work.params, before))
            assert work.optimizer.diagnostics["skipped"] == 1
            continue
        plain.step()
        work.steps += 1
        for i, (p, q) in enumerate(zip(work.params, plain.params, strict=True)):
            assert_close(f"tensor {i}", p.detach(), q.detach(), TOLERANCE)


def test_lookahead_gives_its_closure_the_evaluation(backend: str) -> None:
    work = Work(
        lambda p: Lookahead(SAM(p, torch.optim.SGD, lr=0.05, rho=0.2, ascent_fraction=0.5, backend=backend), 2, 0.4)
    )
    formula = theirs("sgd", start())[2]
    formula.settings = [{"lr": 0.05}] * 3
    expected, slow = start(), start()
    for number in range(4):
        work.step()
        expected, *_ = by_hand(expected, minibatch(number), formula, 5)
        if number % 2:
            expected = slow = [s + 0.4 * (w - s) for s, w in zip(slow, expected, strict=True)]
        for i, (p, w) in enumerate(zip(work.params, expected, strict=True)):
            assert_close(f"step {number}, tensor {i}", p.detach(), w, TOLERANCE)


def test_buffers_at_the_slow_weights_are_those_of_the_part(backend: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    alone = copy.deepcopy(model)
    optimizer = quarter(model.parameters(), ascent_fraction=0.5, backend=backend, buffers_at_slow=model)

    def closure(evaluation: Evaluation) -> Tensor:
        loss = model(evaluation.part(minibatch(0))).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    alone(minibatch(0)[:5])
    for (name, b), c in zip(model.named_buffers(), alone.buffers(), strict=True):
        assert_equal(name, b, c)


def test_a_compiled_evaluation_takes_its_part() -> None:
    """Within one graph an evaluation, with forward, backward by hand, and the passes."""
    work, eager = (Work(lambda p: quarter(p, backend="native", ascent_fraction=0.5)) for _ in range(2))

    def evaluate(evaluation: Evaluation, inputs: Tensor) -> None:
        examples = evaluation.part(inputs)
        first, bias, last = work.params
        with torch.no_grad():
            hidden = (examples @ first + bias).tanh()
            error = 2 * (hidden @ last - examples.sin().sum(-1)) / len(examples)
            before = error[:, None] * last * (1 - hidden**2)
            for p, g in zip(work.params, (examples.T @ before, before.sum(0), error @ hidden), strict=True):
                p.grad = g
        work.optimizer.apply(evaluation)

    torch._dynamo.reset()
    compiled = torch.compile(evaluate, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        for evaluation in work.optimizer.evaluations(apply=False):
            compiled(evaluation, minibatch(work.steps))
        work.steps += 1
        eager.step()
        for i, (p, q) in enumerate(zip(work.params, eager.params, strict=True)):
            assert_close(f"tensor {i}", p.detach(), q.detach(), TOLERANCE)
    torch._dynamo.reset()


def test_a_step_that_fails_on_its_part_is_undone(backend: str) -> None:
    work = Work(lambda p: quarter(p, backend=backend))
    work.step()
    before, state = [p.detach().clone() for p in work.params], copy.deepcopy(work.optimizer.state_dict())
    for fails_at in range(3):

        def closure(evaluation: Evaluation, fails_at: int = fails_at) -> Tensor:
            if evaluation.index == fails_at:
                raise ZeroDivisionError
            return work.closure(evaluation)

        with pytest.raises(ZeroDivisionError):
            work.optimizer.step(closure)
        assert all(map(torch.equal, work.params, before))
        work.optimizer.zero_grad()
        assert_same_state(work.optimizer.state_dict(), state)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_have_it(way: Callable[[Any], Any]) -> None:
    optimizer = Work(quarter).optimizer
    assert way(optimizer).ascent_fraction == 0.25
    assert "    ascent_fraction: 0.25\n" in repr(optimizer)


def test_it_may_change_between_steps(backend: str) -> None:
    """As a schedule may have it; the base's state goes on."""
    work = Work(lambda p: SAM(p, torch.optim.SGD, rho=0.2, backend=backend, **RULES["sgd"][1]))
    expected, formula = start(), theirs("sgd", start())[2]
    for number, fraction in enumerate((0.5, 0.25, 1.0, 0.5)):
        work.optimizer.ascent_fraction = fraction
        work.step("evaluations")
        expected, *_ = by_hand(expected, minibatch(number), formula, PARTS[fraction])
        for i, (p, w) in enumerate(zip(work.params, expected, strict=True)):
            assert_close(f"fraction {fraction}, tensor {i}", p.detach(), w, TOLERANCE)


# ---- what is refused -------------------------------------------------------------------------------------------------


def unchanged_by(work: Work, kind: type[Exception], match: str, do: Callable[[], Any]) -> None:
    before, state = [p.detach().clone() for p in work.params], copy.deepcopy(work.optimizer.state_dict())
    with pytest.raises(kind, match=match):
        do()
    assert all(map(torch.equal, work.params, before))
    assert_same_state(work.optimizer.state_dict(), state)


@pytest.mark.parametrize("value", [0, 0.0, -0.25, 1.5, float("nan"), float("inf")])
def test_numbers_outside(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^ascent_fraction: expected a number in \(0, 1\], got {value!r}"):
        Work(partial(quarter, ascent_fraction=value))


@pytest.mark.parametrize("value", [True, "1/4", None])
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^ascent_fraction: expected a number in \(0, 1\], got {value!r}"):
        Work(partial(quarter, ascent_fraction=value))


@pytest.mark.parametrize(("name", "value"), [("microbatches", 2), ("ascent_gradient", "previous")])
def test_settings_that_say_themselves_what_ascents_follow(name: str, value: Any) -> None:
    match = rf"^ascent_fraction: expected 1.0 with {name}={value!r}.*got 0.25"
    with pytest.raises(ValueError, match=match):
        Work(partial(quarter, **{name: value}))
    work = Work(quarter)
    work.step()
    setattr(work.optimizer, name, value)
    with pytest.raises(ValueError, match=match):
        work.step()


def test_given_gradients_are_refused(backend: str) -> None:
    work = Work(lambda p: quarter(p, backend=backend))
    work.step()
    work.optimizer.zero_grad()
    work.optimizer.closure = work.closure
    loss_of(work.params, minibatch(1)).backward()
    unchanged_by(work, ValueError, r"^ascent_fraction: expected 1.0 for a step\(\) without a clos", work.optimizer.step)


def test_pairs_are_refused(backend: str) -> None:
    """Whoever runs them has the part in his own hands."""
    work = Work(lambda p: SAM(p, torch.optim.SGD, lr=0.05, rho=0.2, ascent_fraction=0.5, backend=backend))
    work.step()
    work.optimizer.zero_grad()
    loss_of(work.params, minibatch(1)[:5]).backward()
    match = r"^ascent_step\(\): expected ascent_fraction=1.0, since it uses the gradients that are there, got 0.5"
    unchanged_by(work, RuntimeError, match, work.optimizer.first_step)
    work.optimizer.ascent_fraction = 1.0
    expected, formula = [p.detach().clone() for p in work.params], theirs("sgd", start())[2]
    formula.settings = [{"lr": 0.05}] * 3
    work.optimizer.first_step(zero_grad=True)
    loss_of(work.params, minibatch(1)).backward()
    work.optimizer.second_step()
    expected, *_ = by_hand(expected, minibatch(1), formula, 5)
    for i, (p, w) in enumerate(zip(work.params, expected, strict=True)):
        assert_close(f"tensor {i}", p.detach(), w, TOLERANCE)


def test_a_closure_that_does_not_take_its_part(backend: str) -> None:
    work = Work(lambda p: quarter(p, backend=backend))
    match = r"^closure: expected a function of the Evaluation, since ascent_fraction is 0.25: evaluation.part\(batch\)"
    unchanged_by(work, TypeError, match, lambda: work.optimizer.step(lambda: torch.zeros(())))


def test_a_method_without_a_gradient_for_an_ascent_alone(backend: str) -> None:
    """Here the descent takes the mean of all: nothing would be saved."""
    from lookbehind_fused.program import Program, Trace

    class Penalty(Lookbehind):
        def program(self, reuse_gradient: bool) -> Program:
            trace = Trace()
            for _ in range(2):
                trace.evaluate(1)
                trace.gather("mean")
                trace.ascend()
            trace.evaluate(1)
            trace.gather("mean")
            trace.descend("mean")
            return trace.program()

    work = Work(lambda p: Penalty(p, torch.optim.SGD, lr=0.05, ascent_fraction=0.25, backend=backend))
    match = "^ascent_fraction: expected 1.0 for a method none of whose gradients is for an ascent alone, got 0.25"
    unchanged_by(work, ValueError, match, work.step)
    work.optimizer.ascent_fraction = 1.0
    work.step("evaluations")
    assert work.seen == [N] * 3


def test_other_forms_of_the_constructor_refuse_it() -> None:
    params = [nn.Parameter(w) for w in start()]
    with pytest.raises(TypeError, match="^ascent_fraction: expected no such argument for SingleFileSAM, got 0.5"):
        compat.SingleFileSAM(params, torch.optim.SGD, lr=0.1, ascent_fraction=0.5)
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match="^ascent_fraction: expected no such argument for SAM, got 0.5"):
        compat.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, ascent_fraction=0.5)
