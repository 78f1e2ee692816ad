"""Bases that the kernels have no rule for run on their own parameters, lent the memory of the fast weights.

Whatever such a base looks at or does - tensors listed by itself, attributes and subclasses of parameters, gradients
edited in place - it trains as it does alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import Lookbehind, MultistepSAM
from tests.algorithm1 import TorchBase, sgd
from tests.conftest import LOW_PRECISION, Duel, assert_close, assert_equal, assert_same_state, drive
from tests.distributed.launch import launch
from tests.ranks import CASES
from tests.test_family import Problem, multistep, with_microbatches
from tests.twin import TOLERANCE, Lister, Twin, scaled_apart, two_groups, values


class Marked(nn.Parameter):
    """A parameter whose class says how it is to be trained."""


def parameter(start: Tensor, number: int) -> nn.Parameter:
    """With an attribute, and every other one of a class of its own."""
    made = (Marked if number % 2 else nn.Parameter)(start)
    made.tag = 1.0 + number
    return made


class Tagged(Lister):
    """Each parameter has its own learning rate, as an attribute."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-0.03 * p.tag)


class ByClass(Lister):
    """Signs for one class of parameters, gradients for the other, whose matrices decay."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(0.02 * (p.grad.sign() if isinstance(p, Marked) else p.grad + 0.1 * p))


class Editor(Lister):
    """Decays and centres the gradient where it is, before it descends, and leaves nothing of it at the end."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(0.5).add_(p, alpha=0.2).sub_(p.grad.mean())
        super().step()
        for _, p in self.listed:
            if p.grad is not None:
                p.grad.mul_(1e3)


class Keyed(Lister):
    """Momentum in a dict of its own, found by the tensor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        mine = self.__dict__.setdefault("mine", {})
        for _, p in self.listed:
            if p.grad is not None:
                mine[p] = 0.7 * mine[p] + p.grad if p in mine else p.grad.clone()
                p.sub_(0.05 * mine[p])


OWN = {base.__name__: base for base in (Lister, Tagged, ByClass, Editor, Keyed)}
OWN["RMSprop"] = partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True, eps=1e-5)
OWN["Adagrad"] = partial(torch.optim.Adagrad, lr=0.05, initial_accumulator_value=0.1)


# ---- it trains as it does alone --------------------------------------------------------------------------------------


@pytest.mark.sample(20)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", OWN)
def test_without_ascent_it_is_the_base_alone_bit_for_bit(backend: str, base: str, dtype: torch.dtype) -> None:
    """k = 1, alpha = 1, rho = 0: weights, state, and what is left in ``.grad``. Of 16 bits: alone in float32, whose
    weights are rounded after each step."""
    low = dtype in LOW_PRECISION
    alone_in = torch.float32 if low else dtype
    ours = [parameter(values(*shape, seed=n).to(dtype, copy=True), n) for n, shape in enumerate([(5,), (2, 3), ()])]
    theirs = [parameter(p.detach().to(alone_in, copy=True), n) for n, p in enumerate(ours)]
    if base == "Adagrad" and low:  # a constructor that makes state makes it in the parameter's dtype
        pytest.skip("its state begins as 16 bits: 0.1 rounded")
    optimizer = Lookbehind(None, OWN[base](two_groups(ours)), rho=0.0, k=1, alpha=1.0, backend=backend)
    other = OWN[base](two_groups(theirs))
    for t in range(4):

        def gradients(t: int = t) -> Tensor:
            for n, p in enumerate(ours):
                p.grad = (0.3 * p.detach() + values(*p.shape, seed=10 * t + n).to(dtype)).sin()
            for p, q in zip(ours, theirs, strict=True):
                q.grad = p.grad.to(alone_in, copy=True)
            return torch.zeros(())

        for _ in optimizer.evaluations():
            gradients()
            given = [p.grad for p in ours]
            untouched = [g.clone() for g in given]
        other.step()
        for n, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(f"step {t}: weights of tensor {n}", p.detach(), q.detach().to(dtype))
            assert p.grad is given[n], f"step {t}: tensor {n} has another gradient than it was given"
            assert_equal(f"step {t}: gradient of tensor {n}", p.grad, untouched[n] if low else q.grad)
            q.data.copy_(p.detach())
    assert_same_state(optimizer.base_optimizer.state_dict()["state"], other.state_dict()["state"])


@pytest.mark.parametrize("base", OWN)
def test_it_is_algorithm_1(backend: str, base: str) -> None:
    ways: list[dict[str, Any]] = [
        {"k": 1, "form": "step"},
        {"k": 2, "form": "evaluations", "groups": scaled_apart, "alpha": "adaptive"},
        {"k": 3, "form": "pairs", "alpha": "adaptive", "alpha_scope": "tensor"},
        {"k": 3, "form": "step", "groups": scaled_apart, "missing": {(1, 0), (2, 1)}},
        {"k": 2, "form": "step", "max_grad_norm": 0.3},
    ]
    for way in ways:
        twin = Twin(backend, (OWN[base], {}), parameter=parameter, **way)
        for _ in range(4):
            twin.step()


@pytest.mark.sample(12)
@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_clipped_scaled_skipped_and_missing(backend: str, dtype: torch.dtype, form: str) -> None:
    """A base that lists its tensors, against the formula of SGD: what it has, points, diagnostics and all."""
    reuse = form != "pairs"
    rows: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"k": 2, "alpha": 0.4, "max_grad_norm": 0.7}, {}),
        ({"k": 1, "alpha": 0.8, "loss_scale": 8.0}, {"missing": {(1, 1, 0), (1, 0, 0)}}),
        ({"k": 3, "alpha": "adaptive", "nonfinite": "skip", "loss_scale": 4.0}, {"broken": {(1, 1), (2, 3)}}),
        ({"k": 2, "alpha": 0.4, "nonfinite": "skip", "max_grad_norm": 0.7}, {"broken": {(1, 1), (1, 2), (1, 3)}}),
    ]
    for options, events in rows:
        params = [nn.Parameter(values(*shape, seed=n).to(dtype, copy=True)) for n, shape in enumerate([(5,), (2, 3)])]
        groups = [{"params": params[:1], "rho": 0.3}, {"params": params[1:], "adaptive": True, "lr": 0.05}]
        hyper = {"lr": 0.1, "momentum": 0.8}
        options = {**options, "reuse_gradient": reuse}
        exact = {"curvature": 0.0} if dtype in LOW_PRECISION else {}  # rounded weights would give other gradients
        duel = Duel(backend, groups, (Lister, sgd), hyper, options, form=form, **exact, **events)
        for _ in range(4):
            duel.step()
            duel.check(TOLERANCE if dtype == torch.float64 else 2e-6)
            duel.synchronise()


@pytest.mark.parametrize("base", OWN)
def test_means_over_microbatches(backend: str, base: str) -> None:
    """The base is lent the mean; the gradients of the last microbatch stay what they are."""
    for k, alpha in ((1, 1.0), (2, 0.4), (3, "adaptive")):
        problem, oracle = Problem(), Problem()
        tagged = [parameter(p.detach(), n) for n, p in enumerate(problem.params)]
        problem.params = tagged
        made = OWN[base](tagged)
        optimizer = Lookbehind(None, made, k=k, alpha=alpha, rho=0.2, microbatches=2, backend=backend)
        theirs = TorchBase(lambda weights: OWN[base](weights), tagged)
        for n, q in enumerate(theirs.weights):
            theirs.weights[n] = parameter(q.detach(), n)
        theirs.optimizer = OWN[base](theirs.weights)
        expected = [p.detach().clone() for p in tagged]
        for _ in range(3):
            optimizer.step(lambda evaluation, problem=problem: problem.evaluate(evaluation.microbatch))
            expected = with_microbatches(expected, oracle.gradient, theirs, k, 0.2, False, 0, alpha, 2)
            for n, (p, w) in enumerate(zip(tagged, expected, strict=True)):
                assert_close(f"{base}, k = {k}: weights of tensor {n}", p.detach(), w, 4 * TOLERANCE)


def test_the_mean_of_multistep(backend: str) -> None:
    problem, oracle = Problem(), Problem()
    optimizer = MultistepSAM(None, Lister(problem.params), k=3, rho=0.2, average=True, backend=backend)
    theirs = TorchBase(Lister, problem.params)
    expected = [p.detach().clone() for p in problem.params]
    for _ in range(3):
        optimizer.step(problem.evaluate)
        expected = multistep(expected, oracle.gradient, theirs, 3, 0.2, False, 0, True)
        for n, (p, w) in enumerate(zip(problem.params, expected, strict=True)):
            assert_close(f"weights of tensor {n}", p.detach(), w, 4 * TOLERANCE)


# ---- what it is lent -------------------------------------------------------------------------------------------------


class Spy(Lister):
    """Notes what it is lent."""

    def step(self, closure: Any = None) -> None:
        seen = []
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad
                seen.append((p, p.dtype, p.is_leaf, p.requires_grad, None if g is None else (g.data_ptr(), g.dtype)))
        self.__dict__.setdefault("seen", []).append(seen)
        super().step()


REAL_GRADIENTS: dict[str, tuple[torch.dtype, dict[str, Any], bool]] = {
    "float32": (torch.float32, {}, True),
    "float64": (torch.float64, {"alpha": "adaptive"}, True),
    "not-reused": (torch.float32, {"reuse_gradient": False}, True),
    "bfloat16": (torch.bfloat16, {}, False),
    "float16": (torch.float16, {}, False),
    "clipped": (torch.float32, {"max_grad_norm": 1e-3}, False),
    "unscaled": (torch.float32, {"loss_scale": 2.0}, False),
    "mean": (torch.float32, {"microbatches": 2}, False),
}


@pytest.mark.parametrize("name", REAL_GRADIENTS)
def test_it_is_lent_its_own_parameters_with_their_gradients(backend: str, name: str) -> None:
    """The real gradient where the base is to use it as it is. Afterwards everybody has what was theirs."""
    dtype, options, real = REAL_GRADIENTS[name]
    computed = torch.float32 if dtype in LOW_PRECISION else dtype
    params = [nn.Parameter(values(*shape, seed=n).to(dtype, copy=True)) for n, shape in enumerate([(5,), (2, 3), (4,)])]
    memory, spy = [p.data_ptr() for p in params], Spy(two_groups(params))
    optimizer = Lookbehind(None, spy, k=2, backend=backend, **options)
    for _ in range(2):
        given: list[list[Tensor]] = []

        def evaluate(*_: Any, given: list[list[Tensor]] = given) -> Tensor:
            given.append([torch.full_like(p, 1.0 + len(given)) for p in params[:2]])
            for p, g in zip(params, given[-1], strict=False):
                p.grad = g
            return torch.zeros(())

        spy.seen = []
        optimizer.step(evaluate)
        assert len(spy.seen) == 2
        descents = [1, 3] if "reuse_gradient" in options else [1, 2]
        for seen, index in zip(spy.seen, descents, strict=True):
            for n, (p, of_dtype, leaf, requires_grad, gradient) in enumerate(seen):
                assert p is params[n]
                if n == 2:
                    assert gradient is None, "it has none in this step"
                else:
                    assert (of_dtype, leaf, requires_grad) == (computed, True, True)
                    assert gradient[1] == computed
                    assert (gradient[0] == given[index][n].data_ptr()) == real
        for n, p in enumerate(params):
            assert (p.data_ptr(), p.dtype, p.is_leaf, p.requires_grad) == (memory[n], dtype, True, True)
            assert p.grad is (given[-1][n] if n < 2 else None)
            if n < 2:
                assert_equal(f"gradient {n}", p.grad, torch.full_like(p, 1.0 * len(given)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", ["Lister", "RMSprop"])
def test_the_accumulator_and_its_hooks_are_kept(backend: str, base: str, dtype: torch.dtype) -> None:
    """Whoever reduces gradients, as DDP does, hangs on the node that accumulates them."""
    params = [nn.Parameter(values(*shape, seed=n).to(dtype, copy=True)) for n, shape in enumerate([(5,), (2, 3)])]
    calls = {"accumulated": 0, "hook": 0, "node": 0}

    def count(what: str, *_: Any) -> None:
        calls[what] += 1

    def node(p: nn.Parameter) -> Any:
        return p.expand_as(p).grad_fn.next_functions[0][0]

    nodes = [node(p) for p in params]
    for p, accumulator in zip(params, nodes, strict=True):
        p.register_post_accumulate_grad_hook(partial(count, "accumulated"))
        p.register_hook(partial(count, "hook"))
        accumulator.register_hook(partial(count, "node"))
    optimizer = Lookbehind(None, OWN[base](params), k=2, backend=backend)

    def closure() -> Tensor:
        loss = sum((p.float() ** 2).sum() for p in params)
        loss.backward()
        return loss.detach()

    for steps in (1, 2):
        optimizer.step(closure)
        assert calls == dict.fromkeys(calls, steps * 3 * len(params))
        assert [node(p) for p in params] == nodes


# ---- undone ----------------------------------------------------------------------------------------------------------


class Failure(Exception):
    pass


class Raiser(Lister):
    """Moves one tensor, its state and the learning rate, and raises in its ``due``-th step from now."""

    due = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.due -= 1
        if self.due == 0:
            p = self.listed[0][1]
            p.add_(1.0)
            p.grad.mul_(2.0)
            self.state[p]["momentum_buffer"] = torch.ones_like(p)
            self.param_groups[0]["lr"] = 7.0
            raise Failure
        super().step()


@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_base_that_raises_leaves_no_trace(backend: str, dtype: torch.dtype, form: str) -> None:
    """At each descent, of the first step and of the second; then the step goes through as in an undisturbed copy."""
    for k, due, warm in [(1, 1, 0), (1, 1, 1), (2, 1, 0), (2, 2, 1), (3, 1, 1), (3, 2, 0), (3, 3, 1)]:
        sides = []
        for _ in range(2):
            params = [nn.Parameter(values(*s, seed=n).to(dtype, copy=True)) for n, s in enumerate([(5,), (2, 3)])]
            options = {"k": k, "alpha": "adaptive", "reuse_gradient": form != "pairs", "backend": backend}
            sides.append((params, Lookbehind(None, Raiser(params), **options)))

        def evaluate(params: list[nn.Parameter], index: int) -> Tensor:
            for n, p in enumerate(params):
                p.grad = 0.3 * p.detach() + values(*p.shape, seed=10 * index + n).to(dtype)
            return torch.zeros(())

        def compare(what: str, sides: list[tuple[list[nn.Parameter], Lookbehind]] = sides) -> None:
            for p, q in zip(sides[0][0], sides[1][0], strict=True):
                assert_equal(what, p.detach(), q.detach())
            assert_same_state(sides[0][1].state_dict(), sides[1][1].state_dict())

        for params, optimizer in sides * warm:
            drive(optimizer, form, partial(evaluate, params), k)
        params, optimizer = sides[0]
        memory, optimizer.base_optimizer.due = [p.data_ptr() for p in params], due
        with pytest.raises(Failure):
            drive(optimizer, form, partial(evaluate, params), k)
        compare(f"k = {k}, descent {due} has failed")
        for p, address in zip(params, memory, strict=True):
            assert (p.data_ptr(), p.dtype, p.grad.dtype) == (address, dtype, dtype)
        for params, optimizer in sides:
            drive(optimizer, form, partial(evaluate, params), k)
        compare(f"k = {k}, the step after descent {due} had failed")


# ---- on two ranks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """What went wrong with a case, rank by rank; all cases run once, in two processes."""
    return launch("tests.ranks", tmp_path_factory.mktemp("ranks"), 2)


@pytest.mark.xdist_group("ranks")  # one process of pytest runs them, not each
@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(failures: Callable[[str], list[str]], case: str) -> None:
    assert failures(case) == ["", ""], "\n\n".join(failures(case))
