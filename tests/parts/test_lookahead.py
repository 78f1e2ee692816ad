"""Lookahead over plain and sharpness-aware optimizers, against a literal transcription."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lookbehind_fused import ASAM, SAM, Lookahead, Lookbehind, open_step
from lookbehind_fused.lookahead import LookaheadPart
from tests.algorithm1 import Formulas, adam, sgd
from tests.conftest import assert_close, assert_same_state, drive
from tests.test_family import TOLERANCE, Problem, sam
from tests.twin import BASES, scaled_apart, two_groups

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAM = {"lr": 0.05, "weight_decay": 0.01}


def plain(weights: list[Tensor], gradient: Any, base: Formulas) -> list[Tensor]:
    return base(weights, gradient(weights))


# name: the optimizer of some parameters, the formula of its base and settings, one step as a transcription
INNER: dict[str, tuple[Callable[[Any, str], Any], tuple[Any, dict[str, Any]], Callable[..., list[Tensor]]]] = {
    "SGD": (lambda params, backend: torch.optim.SGD(params, **SGD), (sgd, SGD), plain),
    "Adam": (lambda params, backend: torch.optim.Adam(params, **ADAM), (adam, ADAM), plain),
    "SAM": (
        lambda params, backend: SAM(params, torch.optim.SGD, rho=0.3, backend=backend, **SGD),
        (sgd, SGD),
        lambda *a: sam(*a, 0.3, False, 0),
    ),
    "ASAM": (
        lambda params, backend: ASAM(params, torch.optim.Adam, rho=0.4, eta=0.1, backend=backend, **ADAM),
        (adam, ADAM),
        lambda *a: sam(*a, 0.4, True, 0.1),
    ),
}


def step(optimizer: Any, problem: Problem) -> None:
    optimizer.zero_grad()
    optimizer.step(problem.evaluate)


@pytest.mark.sample(24)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("k", "alpha"), [(1, 0.3), (2, 1.0), (2, 0.5), (3, 0.8)])
@pytest.mark.parametrize("inner", INNER)
def test_lookahead_is_its_transcription(backend: str, inner: str, k: int, alpha: float, dtype: torch.dtype) -> None:
    """Zhang et al. 2019, algorithm 1: fast and slow weights, and the state, over seven steps."""
    make, (formula, hyper), one_step = INNER[inner]
    problem, oracle = Problem(dtype), Problem()
    optimizer = Lookahead(make(problem.params, backend), k, alpha, backend=backend)
    base = Formulas(formula, hyper, len(problem.params))
    slow = fast = [p.detach().clone().double() for p in problem.params]
    for t in range(1, 8):
        step(optimizer, problem)
        fast = one_step(fast, oracle.gradient, base)
        if t % k == 0:
            slow = fast = [s + alpha * (f - s) for s, f in zip(slow, fast, strict=True)]
        for i, (p, f, s) in enumerate(zip(problem.params, fast, slow, strict=True)):
            assert_close(f"fast weights of tensor {i} after step {t}", p.detach(), f, TOLERANCE[dtype] * 3)
            for key, value in base.state[i].items():
                found = torch.as_tensor(optimizer.state[p][key])
                assert_close(f"{key} of tensor {i}", found, torch.as_tensor(value), TOLERANCE[dtype] * 3)
            with optimizer.slow_weights():
                assert_close(f"slow weights of tensor {i} after step {t}", p.detach(), s, TOLERANCE[dtype] * 3)
            assert_close(f"fast weights of tensor {i} again", p.detach(), f, TOLERANCE[dtype] * 3)


@pytest.mark.parametrize("inner", INNER)
def test_k_1_and_alpha_1_is_the_optimizer_itself(backend: str, inner: str) -> None:
    """To the bit; and so is any k with alpha = 1."""
    make = INNER[inner][0]
    for k in (1, 3):
        problem, alone = Problem(torch.float32), Problem(torch.float32)
        optimizer = Lookahead(make(problem.params, backend), k, 1.0, backend=backend)
        itself = make(alone.params, backend)
        for _ in range(4):
            step(optimizer, problem)
            step(itself, alone)
        assert all(torch.equal(p, w) for p, w in zip(problem.params, alone.params, strict=True))


def test_class_and_instance_are_the_same(backend: str) -> None:
    results = []
    for form in ("class", "instance"):
        problem = Problem()
        if form == "class":
            settings = {"params": problem.params, "base_optimizer": torch.optim.SGD, "rho": 0.2, **SGD}
            optimizer = Lookahead(SAM, 2, 0.5, backend=backend, **settings)
        else:
            base = SAM(problem.params, torch.optim.SGD, rho=0.2, backend=backend, **SGD)
            optimizer = Lookahead(base, 2, 0.5, backend=backend)
        for _ in range(4):
            step(optimizer, problem)
        results.append(problem.params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_every_form_of_a_step_counts(backend: str) -> None:
    """evaluations(), first_step() and second_step(), and steps of the optimizer inside."""
    results = []
    for form in ("step", "evaluations", "halves", "inside"):
        problem = Problem()
        optimizer = Lookahead(SAM(problem.params, torch.optim.SGD, rho=0.2, backend=backend, **SGD), 2, 0.5)
        for _ in range(3):
            if form == "step":
                optimizer.step(problem.evaluate)
            elif form == "inside":
                optimizer.optimizer.step(problem.evaluate)
            elif form == "evaluations":
                for _ in optimizer.evaluations():
                    problem.evaluate()
            else:
                problem.evaluate()
                optimizer.first_step(zero_grad=True)
                problem.evaluate()
                optimizer.second_step(zero_grad=True)
        assert optimizer.inner_step == 1
        results.append(problem.params)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("after", [2, 3])
def test_goes_on_with_the_same_bits(backend: str, way: str, after: int) -> None:
    """From a saved state dict with the weights, or from a copy: between two rounds and inside one."""
    problem = Problem()
    optimizer = Lookahead(SAM(problem.params, torch.optim.SGD, rho=0.2, backend=backend, **SGD), 3, 0.5)
    for _ in range(after):
        step(optimizer, problem)
    other = Problem()
    if way == "state_dict":
        for p, w in zip(other.params, problem.params, strict=True):
            p.data.copy_(w.data)
        second = Lookahead(SAM(other.params, torch.optim.SGD, rho=0.2, backend=backend, **SGD), 3, 0.5)
        saved = copy.deepcopy(optimizer.state_dict())
        step(optimizer, problem)
        second.load_state_dict(saved)
        assert_same_state(second.state_dict(), saved)
    else:
        second = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        other.params = second.param_groups[0]["params"]
        step(optimizer, problem)
    step(second, other)
    for _ in range(3):
        step(optimizer, problem)
        step(second, other)
    assert all(torch.equal(p, w) for p, w in zip(problem.params, other.params, strict=True))
    assert_same_state(second.state_dict(), optimizer.state_dict())


def test_a_state_dict_of_the_optimizer_alone_begins_a_round(backend: str) -> None:
    problem = Problem()
    optimizer = Lookahead(torch.optim.SGD(problem.params, **SGD), 3, 0.5, backend=backend)
    alone = torch.optim.SGD(problem.params, **SGD)
    step(alone, problem)
    step(optimizer, problem)
    optimizer.load_state_dict(alone.state_dict())
    assert optimizer.inner_step == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_slow_weights_of_16_bits_are_kept_in_float32(backend: str, dtype: torch.dtype) -> None:
    """The interpolated weights are rounded once."""
    problem = Problem(dtype)
    before = [p.detach().double() for p in problem.params]
    optimizer = Lookahead(torch.optim.SGD(problem.params, lr=0.5), 1, 0.3, backend=backend)
    alone = Problem(dtype)
    step(torch.optim.SGD(alone.params, lr=0.5), alone)
    step(optimizer, problem)
    for i, (p, s, w) in enumerate(zip(problem.params, before, alone.params, strict=True)):
        exact = s + 0.3 * (w.detach().double() - s)
        assert_close(f"tensor {i}", p.detach().double(), exact, torch.finfo(dtype).eps / 2 * 1.001)


def test_odd_layouts(backend: str) -> None:
    """Channels-last, empty and 0-dim parameters, of two dtypes."""
    torch.manual_seed(3)
    shapes = [(2, 3, 4, 5), (0,), (), (7,)]
    params = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
    params[0] = params[0].detach().to(memory_format=torch.channels_last).requires_grad_()
    params[3] = params[3].detach().float().requires_grad_()
    slow = [p.detach().clone() for p in params]
    optimizer = Lookahead(torch.optim.SGD(params, lr=0.5), 2, 0.25, backend=backend)
    fast = [s.clone() for s in slow]
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        fast = [f - 0.5 * p.grad for f, p in zip(fast, params, strict=True)]
        optimizer.step()
    for i, (p, s, f) in enumerate(zip(params, slow, fast, strict=True)):
        assert_close(f"tensor {i}", p.detach(), s + 0.25 * (f - s), 1e-12 if p.dtype == torch.float64 else 1e-6)


def test_slow_weights_are_put_back_whatever_happens(backend: str) -> None:
    problem = Problem()
    optimizer = Lookahead(torch.optim.SGD(problem.params, **SGD), 3, 0.5, backend=backend)
    first = [p.detach().clone() for p in problem.params]
    step(optimizer, problem)
    fast = [p.detach().clone() for p in problem.params]

    def fail() -> None:
        with optimizer.slow_weights():
            assert all(torch.equal(p, w) for p, w in zip(problem.params, first, strict=True))
            assert torch.is_grad_enabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(p, w) for p, w in zip(problem.params, fast, strict=True))
    with optimizer.slow_weights():
        for forbidden in (
            lambda: step(optimizer, problem),
            optimizer.state_dict,
            lambda: optimizer.load_state_dict({}),
            lambda: copy.deepcopy(optimizer),
            lambda: optimizer.slow_weights().__enter__(),
        ):
            with pytest.raises(RuntimeError, match=r"expected outside of slow_weights\(\)"):
                forbidden()
        assert all(torch.equal(p, w) for p, w in zip(problem.params, first, strict=True))
    assert all(torch.equal(p, w) for p, w in zip(problem.params, fast, strict=True))


def test_slow_weights_are_not_for_an_open_step(backend: str) -> None:
    problem = Problem()
    optimizer = Lookahead(SAM(problem.params, torch.optim.SGD, rho=0.2, backend=backend, **SGD), 2, 0.5)
    problem.evaluate()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"^slow_weights\(\): expected no open step"):
        optimizer.slow_weights().__enter__()
    problem.evaluate()
    optimizer.second_step()


def test_a_step_that_fails_counts_for_nothing(backend: str) -> None:
    problem = Problem()
    optimizer = Lookahead(SAM(problem.params, torch.optim.SGD, rho=0.2, backend=backend, **SGD), 2, 0.5)
    step(optimizer, problem)
    before = [p.detach().clone() for p in problem.params]
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 // 0)
    assert optimizer.inner_step == 1
    assert all(torch.equal(p, w) for p, w in zip(problem.params, before, strict=True))


def test_weights_loaded_between_two_rounds_are_the_new_slow_ones(backend: str) -> None:
    problem = Problem()
    optimizer = Lookahead(torch.optim.SGD(problem.params, lr=0.1), 2, 0.5, backend=backend)
    for p in problem.params:
        p.data.zero_()
    for _ in range(2):
        for p in problem.params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p in problem.params:
        assert_close("weights", p.detach(), torch.full_like(p, -0.1), 1e-15)


def test_learning_rates_are_scheduled_through_it(backend: str) -> None:
    problem = Problem()
    for of_inner in (False, True):
        optimizer = Lookahead(SAM(problem.params, torch.optim.SGD, rho=0.2, backend=backend, lr=0.1), 2, 0.5)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer.optimizer if of_inner else optimizer, 1, 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in optimizer.evaluations():
                problem.evaluate()
            scheduler.step()
        assert optimizer.optimizer.param_groups[0]["lr"] == 0.05
        assert "Lookahead(k=2, alpha=0.5, SAM" in repr(optimizer)


def test_gradscaler_scales_a_plain_optimizer_and_is_refused_where_it_is_not_known() -> None:
    p = torch.ones(3, requires_grad=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = Lookahead(torch.optim.SGD([p], lr=0.5), 1, 0.5)
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_close("weights", p.detach(), torch.full((3,), 0.75), 0)
    optimizer = Lookahead(SAM([p], torch.optim.SGD, lr=0.5), 1, 0.5)
    scaler.scale(p.sum()).backward()
    with pytest.raises(RuntimeError, match=r"^scaler: expected the GradScaler"):
        scaler.step(optimizer, lambda: p.sum())
    assert_close("weights", p.detach(), torch.full((3,), 0.75), 0)

    def closure() -> Tensor:
        loss = p.sum()
        loss.backward()
        return loss

    optimizer.zero_grad()
    optimizer.step(closure)
    assert optimizer.inner_step == 0
    assert_close("weights", p.detach(), torch.full((3,), 0.5), 0)


class Derived(torch.optim.SGD):
    """Its step is torch's, so that hooks of a step run twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_step_counts_once_whatever_is_around_it(backend: str) -> None:
    """A derived class; a second Lookahead, which takes the place of the first; a parameter that was added before it."""
    torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    for make in (Derived, lambda params, lr: SAM(params, Derived, lr=lr, rho=0.0, backend=backend)):
        p = torch.ones(2, dtype=torch.float64).requires_grad_()
        inner = make([p], lr=0.5)
        Lookahead(inner, 1, 0.5, backend=backend)
        inner.add_param_group({"params": [torch.ones(1, dtype=torch.float64).requires_grad_()]})
        optimizer = Lookahead(inner, 2, 0.5, backend=backend)
        for number in (1, 0):

            def closure(p: Tensor = p) -> Tensor:
                p.grad = torch.ones_like(p)
                return torch.zeros(())

            optimizer.step(closure)
            assert optimizer.inner_step == number
        assert_close("weights", p.detach(), torch.full((2,), 0.5).double(), 1e-15)


def test_frozen_parameters_are_left_alone(backend: str) -> None:
    """Also infinite ones, and those that are frozen and set free between two rounds."""
    p, mask = torch.ones(2).requires_grad_(), torch.tensor([0.0, float("-inf")])
    optimizer = Lookahead(torch.optim.SGD([p, mask], lr=0.5), 1, 0.5, backend=backend)
    for frozen in (False, True, False):
        p.requires_grad_(not frozen)
        before = p.detach().clone()
        p.grad = None if frozen else torch.ones_like(p)
        optimizer.step()
        assert_close("weights", p.detach(), before - (0.0 if frozen else 0.25), 0)
        assert torch.equal(mask, torch.tensor([0.0, float("-inf")]))


@pytest.mark.parametrize("inner", INNER)
def test_a_parameter_frozen_within_a_round_stays_where_it_is(backend: str, inner: str) -> None:
    """The pull moves the others; set free again, it is pulled from where it was then."""
    problem = Problem()
    optimizer = Lookahead(INNER[inner][0](problem.params, backend), 2, 0.5, backend=backend)
    frozen, other = problem.params[:2]

    def one() -> None:
        def evaluate() -> Tensor:
            loss = problem.evaluate()
            frozen.grad = frozen.grad if frozen.requires_grad else None
            return loss

        optimizer.zero_grad()
        optimizer.step(evaluate)

    one()
    frozen.requires_grad_(False)
    before, others = frozen.detach().clone(), other.detach().clone()
    for _ in range(3):
        one()
        assert torch.equal(frozen, before)
        with optimizer.slow_weights():
            assert torch.equal(frozen, before)
    assert not torch.equal(other, others)
    assert optimizer.inner_step == 0
    frozen.requires_grad_(True)
    one()
    fast = frozen.detach().clone()
    with optimizer.slow_weights():
        assert torch.equal(frozen, before)
    assert not torch.equal(fast, before)


# ---- 16 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["never", "state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("inner", ["SGD", "SAM"])
def test_steps_smaller_than_a_rounding_add_up(backend: str, inner: str, way: str) -> None:
    """100 steps of 1/128, which is one unit in the last place of bfloat16, whose tenth alone would be lost. The slow
    weights are those of the formula, and go through a checkpoint in the middle unrounded."""
    k, alpha, steps = 1, 0.1, 100

    def make(p: Tensor) -> Lookahead:
        base = torch.optim.SGD([p], lr=1 / 128)
        return Lookahead(base if inner == "SGD" else SAM(None, base, rho=0.0, backend=backend), k, alpha)

    p = torch.ones(3, dtype=torch.bfloat16).requires_grad_()
    optimizer = make(p)
    slow = torch.ones(3)
    for number in range(steps):
        if number == steps // 2 and way == "state_dict":
            saved, p = optimizer.state_dict(), p.detach().clone().requires_grad_()
            assert saved["lookahead"]["slow"][0].dtype == torch.float32
            optimizer = make(p)
            optimizer.load_state_dict(saved)
        elif number == steps // 2 and way != "never":
            optimizer = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
            (p,) = optimizer.param_groups[0]["params"]

        def evaluate(p: Tensor = p) -> Tensor:
            p.grad = -torch.ones_like(p)
            return torch.zeros(())

        optimizer.step(evaluate)
        slow += alpha * ((slow.bfloat16() + 1 / 128).float() - slow)
        assert torch.equal(p, slow.bfloat16())
        assert_close("slow weights", optimizer.state_dict()["lookahead"]["slow"][0], slow, 1e-6)
    assert float(p.detach()[0]) > 1.03


# ---- skipped steps ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["host", "device"])
def decided_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who knows whether a step happens: on GPUs the device alone, where the base is fused. As if so on CPUs."""
    if request.param == "device":
        monkeypatch.setattr(open_step, "on_host", lambda buckets, own_step: own_step is not None)
    return request.param


@pytest.mark.usefixtures("decided_by")
@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("groups", [two_groups, scaled_apart], ids=["one bucket", "several"])
@pytest.mark.parametrize("base", BASES)
def test_a_skipped_step_does_not_count(backend: str, base: str, groups: Callable, form: str) -> None:
    """One without a descent: what it leaves is as if it had not been, wherever in a round, and the round goes on."""
    make, settings = BASES[base]
    for k in (1, 2):
        results = []
        for broken in ({0, 2, 3}, set()):
            params = [torch.ones(3, dtype=torch.float64).requires_grad_() for _ in range(3)]
            inner = make(groups(params), **settings)
            optimizer = Lookbehind(None, inner, k=k, rho=0.1, nonfinite="skip", backend=backend)
            lookahead = Lookahead(optimizer, 2, 0.5)
            counted = []
            for number in range(7):
                if number in {0, 2, 3} and not broken:
                    continue

                def evaluate(index: int, params: Any = params, bad: bool = number in broken) -> Tensor:
                    for p in params:
                        p.grad = (1 + index) * p.detach() + 0.1
                    params[-1].grad[-1] = float("nan") if bad else 1.0
                    return torch.zeros(())

                before = [p.detach().clone() for p in params]
                drive(lookahead, form, evaluate, k)
                counted.append(lookahead.inner_step)
                if number in broken:
                    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
            assert counted == ([0, 1, 1, 1, 0, 1, 0] if broken else [1, 0, 1, 0])
            results.append(params)
        for p, q in zip(*results, strict=True):
            assert torch.equal(p, q)


@pytest.mark.usefixtures("decided_by")
def test_a_step_with_any_broken_gradient_does_not_count(backend: str) -> None:
    """Of an ascent, of a descent, of both."""
    for bad, counts in ((0, False), (1, False), (2, False), ((1, 2), False), ((), True)):
        p = torch.ones(3).requires_grad_()
        inner = Lookbehind([p], torch.optim.SGD, lr=0.1, k=2, nonfinite="skip", backend=backend)
        lookahead = Lookahead(inner, 5)
        for evaluation in lookahead.evaluations():
            broken = evaluation.index in (bad if isinstance(bad, tuple) else (bad,))
            p.grad = torch.full_like(p, float("inf") if broken else 1.0)
        assert lookahead.inner_step == counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_device_decides_is_not_waited_for(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Count, slow weights and pull over two rounds are those that the host would have decided on, bit by bit, also of a
    parameter that is frozen in between; and what Lookahead does for them reads nothing.
    """
    results = []
    for by_host in (True, False):
        monkeypatch.setattr(open_step, "on_host", lambda buckets, own_step, by_host=by_host: by_host)
        params = [torch.linspace(-1, 1, n).to(dtype).requires_grad_() for n in (5, 3)]
        inner = Lookbehind(params, torch.optim.SGD, lr=0.1, momentum=0.9, nonfinite="skip", backend=backend)
        lookahead, seen = Lookahead(inner, 3, 0.3), Reads()
        for verb in ("begin", "commit"):
            own = getattr(LookaheadPart, verb)
            monkeypatch.setattr(LookaheadPart, verb, lambda part, own=own, seen=seen: seen.during(own, part))
        rounds = []
        for number in range(9):
            seen.reads *= number > 1  # the first builds the slow weights' table, which is the host's
            params[1].requires_grad_(number not in (4, 5))
            for evaluation in lookahead.evaluations():
                for p in params:
                    if p.requires_grad:
                        p.grad = torch.cos(3 * p.detach())
                if number in (1, 3, 6) and evaluation.index == number % 3:
                    params[0].grad[2] = torch.inf
            rounds += [p.detach().clone() for p in params]
            if number == 5:
                rounds += lookahead.state_dict()["lookahead"]["slow"]
        assert by_host or not seen.reads
        results.append([*rounds, lookahead.inner_step, *lookahead.state_dict()["lookahead"]["slow"]])
        monkeypatch.undo()
    for host, device in zip(*results, strict=True):
        assert torch.equal(host, device) if isinstance(host, Tensor) else host == device == 0


class Reads(TorchDispatchMode):
    """Counts what the host reads of a tensor."""

    reads = 0

    def during(self, do: Callable[..., Any], *arguments: Any) -> Any:
        with self:
            return do(*arguments)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_that_gradscaler_skips_does_not_count() -> None:
    """Of an optimizer that looks for itself whether a gradient was not finite, and of one that does not."""
    for fused in (True, False):
        p = torch.ones(3).requires_grad_()
        lookahead = Lookahead(torch.optim.SGD([p], lr=0.1, fused=fused), 3)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor, count in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
            lookahead.zero_grad()
            scaler.scale((factor * p).sum()).backward()
            scaler.step(lookahead)
            scaler.update()
            assert lookahead.inner_step == count, fused


def test_k_may_be_lowered_within_a_round(backend: str) -> None:
    problem = Problem()
    optimizer = Lookahead(torch.optim.SGD(problem.params, **SGD), 5, 0.5, backend=backend)
    for _ in range(3):
        step(optimizer, problem)
    optimizer.k = 2
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(optimizer, problem)
    assert optimizer.inner_step == 0


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k: expected an int >= 1, got 0"),
        ({"k": 1.5}, TypeError, "k: expected an int >= 1, got 1.5"),
        ({"alpha": 0.0}, ValueError, r"alpha: expected a number in \(0, 1\], got 0.0"),
        ({"alpha": float("nan")}, ValueError, r"alpha: expected a number in \(0, 1\], got nan"),
        ({"alpha": "adaptive"}, TypeError, r"alpha: expected a number in \(0, 1\], got 'adaptive'"),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
        ({"lr": 0.1}, TypeError, "lr: expected only with a class as optimizer"),
        ({"params": []}, TypeError, "params: expected only with a class as optimizer"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    problem = Problem()
    base = torch.optim.SGD(problem.params, lr=0.1)
    with pytest.raises(error, match=f"^{message}"):
        Lookahead(base, **arguments)
    assert len(base.param_groups) == 1


def test_it_wants_an_optimizer() -> None:
    problem = Problem()
    base = Lookahead(torch.optim.SGD(problem.params, lr=0.1))
    for other in (base, problem.params, None):
        with pytest.raises(TypeError, match="^optimizer: expected a torch optimizer other than Lookahead, got"):
            Lookahead(other)


@pytest.mark.parametrize("through", ["lookahead", "optimizer"])
def test_parameters_added_later(backend: str, through: str) -> None:
    problem = Problem()
    inner = SAM(problem.params, torch.optim.SGD, rho=0.2, backend=backend, **SGD)
    optimizer = Lookahead(inner, 2, 0.5, backend=backend)
    step(optimizer, problem)
    before = [p.detach().clone() for p in problem.params]
    new = torch.ones(2, requires_grad=True)
    if through == "lookahead":
        with pytest.raises(
            RuntimeError, match=r"^add_param_group\(\): expected the parameters that Lookahead was built"
        ):
            optimizer.add_param_group({"params": [new]})
        assert len(optimizer.param_groups) == 1
        step(optimizer, problem)
        return
    inner.add_param_group({"params": [new]})
    with pytest.raises(
        RuntimeError, match="^param_groups: expected the 3 parameters that Lookahead was built with, got 4"
    ):
        step(optimizer, problem)
    assert all(torch.equal(p, w) for p, w in zip(problem.params, before, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 3}, "expected k 2 of Lookahead, got 3"),
        ({"inner_step": -1}, "expected inner_step of at least 0, got -1"),
        ({"slow": []}, "expected slow weights of shapes"),
    ],
)
def test_bad_state_dicts(change: dict[str, Any], message: str) -> None:
    problem = Problem()
    optimizer = Lookahead(torch.optim.SGD(problem.params, **SGD), 2, 0.5)
    step(optimizer, problem)
    good = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"^state_dict: {message}"):
        optimizer.load_state_dict({**good, "lookahead": {**good["lookahead"], **change}})
    assert_same_state(optimizer.state_dict(), good)


def test_settings_that_became_bad_and_layouts_that_changed_inside_a_round() -> None:
    p = torch.randn(2, 3, 4, 5).requires_grad_()
    optimizer = Lookahead(torch.optim.SGD([p], lr=0.1), 2, 0.5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = p.detach().clone()
    optimizer.alpha = float("nan")
    with pytest.raises(ValueError, match=r"^alpha: expected a number in \(0, 1\], got nan"):
        optimizer.step()
    optimizer.alpha = 0.5
    p.data = p.data.to(memory_format=torch.channels_last)
    with pytest.raises(
        RuntimeError, match="^a parameter was given another dtype, device or memory layout after 1 of 2"
    ):
        optimizer.step()
    assert torch.equal(p, before)


def test_lookbehind_inside_keeps_what_is_its_own(backend: str) -> None:
    problem = Problem()
    inner = Lookbehind(problem.params, torch.optim.SGD, k=3, alpha="adaptive", backend=backend, **SGD)
    optimizer = Lookahead(inner, 2, 0.5, backend=backend)
    step(optimizer, problem)
    assert optimizer.k == 2
    assert inner.k == 3
    assert set(optimizer.diagnostics) == {"grad_norm", "alpha", "skipped"}
    with pytest.raises(AttributeError, match="nonsense"):
        _ = optimizer.nonsense
