"""The interface of `Lookbehind`: constructor forms, the ways to drive a step, schedulers, hooks, diagnostics, memory.

Values are checked against torch's own optimizers (with rho = 0 and alpha = 1 an outer step is k steps of the base
optimizer with one gradient, bit for bit) or against gradients captured during the step. The helpers at the top serve
`test_arguments.py` and `test_checkpoint.py` too.
"""

import copy
import gc
import itertools
import math
import warnings
import weakref
from contextlib import contextmanager, suppress
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from lookbehind_fused import Lookahead, Lookbehind
from tests.conftest import assert_same_state, assert_torchs_weights, drive
from tests.twin import BASES, scaled_apart

FORMS = ["step", "evaluations", "pairs"]


class Problem:
    """A small deterministic regression: four parameters of odd sizes, fixed data."""

    def __init__(self, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
        data = torch.Generator().manual_seed(1234)
        self.inputs = torch.randn(8, 5, generator=data, dtype=torch.float64).to(dtype)
        self.targets = torch.randn(8, 3, generator=data, dtype=torch.float64).to(dtype)
        self.forwards = 0

    @property
    def params(self):
        return list(self.model.parameters())

    def values(self):
        return [p.detach().clone() for p in self.params]

    def grads(self):
        return [p.grad.detach().clone() for p in self.params]

    def loss(self):
        self.forwards += 1
        return (self.model(self.inputs) - self.targets).square().mean()

    def closure(self):
        loss = self.loss()
        loss.backward()
        return loss


def outer_step(opt, problem, form="step"):
    """One outer step of `opt` in one of its three forms."""
    return drive(opt, form, lambda index: problem.closure(), opt.k)


def plain_step(base, problem, k=1):
    """What an outer step with rho = 0 and alpha = 1 is: k steps of a torch optimizer with the gradient at `slow`.

    Returns the weights from before.
    """
    before = problem.values()
    base.zero_grad()
    problem.closure()
    for _ in range(k):
        base.step()
    return before


def freeze(value):
    """A copy of nested dicts, lists and tensors that shares no memory with the original."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: freeze(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(freeze(entry) for entry in value)
    return copy.deepcopy(value)


def snapshot(opt):
    """The weights, the base optimizer's state and the parameter groups of `opt`, copied."""
    params = [p for group in opt.param_groups for p in group["params"]]
    state = opt.base_optimizer.state
    return {
        "params": [freeze(p) for p in params],
        "identities": [id(p) for p in params],
        "state": {i: freeze(state[p]) for i, p in enumerate(params) if p in state},
        "groups": [{key: freeze(v) for key, v in group.items() if key != "params"} for group in opt.param_groups],
    }


def norm(tensors):
    """L2 norm over all elements of all tensors, in float64."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


# ---------------------------------------------------------------------------------------------------------- constructor


def test_is_an_optimizer_that_shares_groups_and_state_with_its_base(backend):
    problem = Problem()
    opt = Lookbehind(problem.model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend)
    assert isinstance(opt, torch.optim.Optimizer)
    assert type(opt.base_optimizer) is torch.optim.SGD
    assert opt.param_groups is opt.base_optimizer.param_groups
    assert opt.state is opt.base_optimizer.state
    group = opt.param_groups[0]
    assert [id(p) for p in group["params"]] == [id(p) for p in problem.params]
    assert (group["lr"], group["momentum"]) == (0.1, 0.9)
    assert (group["rho"], group["adaptive"], group["eta"]) == (0.05, False, 0.01)
    assert (opt.k, opt.alpha, opt.alpha_scope, opt.reuse_gradient, opt.max_grad_norm) == (2, 0.5, "global", True, None)
    assert (opt.nonfinite, opt.loss_scale) == ("propagate", 1.0)


def test_class_and_instance_give_the_same_trajectory(backend):
    trajectories = []
    for form in ("class", "instance", "instance with its parameters"):
        problem = Problem()
        options = {"rho": 0.1, "k": 2, "alpha": 0.7, "backend": backend}
        base = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
        if form == "class":
            opt = Lookbehind(problem.params, torch.optim.SGD, **options, **base)
        else:
            instance = torch.optim.SGD(problem.params, **base)
            opt = Lookbehind(None if form == "instance" else problem.params, instance, **options)
            assert opt.base_optimizer is instance
            assert opt.param_groups is instance.param_groups
        for _ in range(3):
            opt.step(problem.closure)
        trajectories.append(snapshot(opt))
    for other in trajectories[1:]:
        for key in ("params", "state", "groups"):
            assert_same_state(other[key], trajectories[0][key], key)
    assert not torch.equal(trajectories[0]["params"][0], Problem().params[0])


def test_an_instance_brings_its_own_groups_and_state(backend):
    problem, twin = Problem(), Problem()

    def make(p):
        groups = [{"params": p.params[:2], "lr": 0.2}, {"params": p.params[2:], "momentum": 0.5}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, dampening=0.1, foreach=False)

    base, plain = make(problem), make(twin)
    for _ in range(2):  # the buffers that torch made must be taken over, not begun anew
        plain_step(base, problem)
        plain_step(plain, twin)
    opt = Lookbehind(None, base, rho=0.0, k=2, alpha=1.0, backend=backend)
    opt.zero_grad()
    for _ in range(3):
        opt.step(problem.closure)
        plain_step(plain, twin, k=2)
    assert_same_state(problem.values(), twin.values())
    assert [g["lr"] for g in opt.param_groups] == [0.2, 0.1]
    assert [g["rho"] for g in opt.param_groups] == [0.0, 0.0]


def test_an_instance_with_a_group_that_has_its_own_rho(backend):
    problem = Problem()
    base = torch.optim.SGD([{"params": problem.params[:2], "rho": 0.3}, {"params": problem.params[2:]}], lr=0.1)
    opt = Lookbehind(None, base, backend=backend)
    assert [g["rho"] for g in opt.param_groups] == [0.3, 0.05]
    opt = Lookbehind(None, base, rho=0.1, backend=backend)
    assert [g["rho"] for g in opt.param_groups] == [0.1, 0.1]


def test_named_parameters_keep_their_names(backend):
    problem = Problem()
    names = [name for name, _ in problem.model.named_parameters()]
    opt = Lookbehind(problem.model.named_parameters(), torch.optim.SGD, lr=0.1, backend=backend)
    assert opt.param_groups[0]["param_names"] == names
    opt.step(problem.closure)
    assert opt.state_dict()["param_groups"][0]["param_names"] == names

    problem = Problem()
    named = list(problem.model.named_parameters())
    opt = Lookbehind(
        [{"params": named[:1], "rho": 0.2}, {"params": iter(named[1:])}], torch.optim.SGD, lr=0.1, backend=backend
    )
    assert [g["param_names"] for g in opt.param_groups] == [names[:1], names[1:]]


def test_params_may_be_any_iterable_of_tensors_or_groups(backend):
    results = []
    for make in (
        lambda p: iter(p.params),
        lambda p: tuple(p.params),
        lambda p: [{"params": p.params}],
        lambda p: p.model.named_parameters(),
        lambda p: ({"params": iter(half)} for half in (p.params[:1], p.params[1:])),
    ):
        problem = Problem(torch.float64)
        opt = Lookbehind(make(problem), torch.optim.SGD, lr=0.1, rho=0.1, backend=backend)
        opt.step(problem.closure)
        results.append(problem.values())
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)  # two groups may sum the norm in another order


@pytest.mark.parametrize("params", ["same", "None"])
def test_construction_changes_no_weight_and_makes_no_state(backend, params):
    problem = Problem()
    before = problem.values()
    base = torch.optim.Adam(problem.params)
    opt = Lookbehind(None if params == "None" else problem.model.parameters(), base, backend=backend)
    assert_same_state(problem.values(), before)
    assert len(opt.base_optimizer.state) == 0
    assert opt.diagnostics == {}


def test_repr_names_the_class_its_base_k_and_every_groups_rho(backend):
    problem = Problem()
    groups = [{"params": problem.params[:2], "rho": 0.375}, {"params": problem.params[2:], "rho": 0.625}]
    text = repr(Lookbehind(groups, torch.optim.AdamW, k=7, alpha=0.25, backend=backend))
    for expected in ("Lookbehind", "AdamW", "k", "7", "rho", "0.375", "0.625", "0.25"):
        assert expected in text, text


def test_attributes_follow_the_arguments(backend):
    problem = Problem()
    opt = Lookbehind(
        problem.params,
        torch.optim.SGD,
        rho=0.5,
        k=5,
        alpha="adaptive",
        alpha_scope="tensor",
        adaptive=True,
        eta=0.125,
        reuse_gradient=False,
        max_grad_norm=2.5,
        backend=backend,
        lr=0.25,
    )
    assert (opt.k, opt.alpha, opt.alpha_scope, opt.reuse_gradient) == (5, "adaptive", "tensor", False)
    assert (opt.max_grad_norm, opt.backend) == (2.5, backend)
    group = opt.param_groups[0]
    assert (group["rho"], group["adaptive"], group["eta"], group["lr"]) == (0.5, True, 0.125, 0.25)


# ------------------------------------------------------------------------------------------------------ the three forms


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_evaluations_sequence(backend, k, reuse):
    problem = Problem()
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, k=k, reuse_gradient=reuse, backend=backend)
    for _ in range(2):  # the second outer step starts from 0 again
        seen = []
        for evaluation in opt.evaluations():
            seen.append((evaluation.index, evaluation.inner_step, evaluation.perturbed))
            problem.closure()
        inner = [1, *range(1, k + 1)] if reuse else [i for i in range(1, k + 1) for _ in range(2)]
        assert seen == [(index, i, index > 0) for index, i in enumerate(inner)]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_number_of_forward_passes(backend, k):
    counts = {}
    for form, reuse in [*itertools.product(["step", "evaluations"], [True, False]), ("pairs", True)]:
        problem = Problem()
        opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, k=k, reuse_gradient=reuse, backend=backend)
        outer_step(opt, problem, form)
        counts[form, reuse] = problem.forwards
    assert counts == {
        ("step", True): k + 1,
        ("step", False): 2 * k,
        ("evaluations", True): k + 1,
        ("evaluations", False): 2 * k,
        ("pairs", True): 2 * k,
    }


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_where_the_weights_are_at_each_evaluation(backend, k, reuse, adaptive):
    """From the captured gradients the positions follow by hand: `slow`, then one ascent of length rho after another."""
    rho, eta, lr, alpha = 0.3, 0.05, 0.2, 0.4
    problem = Problem(torch.float64)
    options = {"rho": rho, "k": k, "alpha": alpha, "adaptive": adaptive, "eta": eta, "reuse_gradient": reuse}
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=lr, backend=backend, **options)
    slow = problem.values()
    at, grads = [], []
    for _ in opt.evaluations():
        at.append(problem.values())
        problem.closure()
        grads.append(problem.grads())

    assert_same_state(at[0], slow, "evaluation 0 is taken at the slow weights")
    ascending = range(k) if reuse else range(0, 2 * k, 2)  # the evaluations whose gradient is climbed
    descending = range(1, k + 1) if reuse else range(1, 2 * k, 2)
    for j in ascending:
        scale = [w.abs() + eta if adaptive else torch.ones_like(w) for w in at[j]]
        length = norm([t * g for t, g in zip(scale, grads[j], strict=True)])
        for i, (t, g) in enumerate(zip(scale, grads[j], strict=True)):
            torch.testing.assert_close(at[j + 1][i], at[j][i] + rho * t * t * g / length, rtol=1e-13, atol=1e-14)
        if not adaptive:
            moved = norm([b - a for a, b in zip(at[j], at[j + 1], strict=True)])
            assert moved == pytest.approx(rho, rel=1e-13)
    if not reuse:
        for i in range(1, k):
            assert_same_state(at[2 * i], at[2 * i - 1], "a descent leaves the perturbed weights where they are")
    for i, p in enumerate(problem.params):
        fast = slow[i] - lr * sum(grads[j][i] for j in descending)
        torch.testing.assert_close(p.detach(), slow[i] + alpha * (fast - slow[i]), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_an_outer_step_do_not_depend_on_old_gradients(backend, form):
    """Every evaluation begins from cleared gradients; in the pair form the caller clears them."""
    results = []
    for stale in (False, True):
        problem = Problem()
        opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, rho=0.2, k=3, backend=backend)
        for _ in range(2):
            if stale:
                for p in problem.params:
                    p.grad = torch.full_like(p, 0.0 if form != "pairs" else 1e3)
            outer_step(opt, problem, form)
        results.append(problem.values())
    assert_same_state(results[1], results[0])


@pytest.mark.parametrize("reuse", [True, False])
def test_gradients_are_none_when_an_evaluation_begins(backend, reuse):
    problem = Problem()
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, k=3, reuse_gradient=reuse, backend=backend)
    cleared = []

    def closure():
        cleared.append([p.grad is None for p in problem.params])
        return problem.closure()

    opt.step(closure)
    for _ in opt.evaluations():
        closure()
    assert cleared == [[True] * 4] * (2 * (4 if reuse else 6))


def test_the_library_writes_no_gradient(backend):
    """`.grad` holds what backward left there: clipping and scaling happen elsewhere."""
    problem = Problem()
    opt = Lookbehind(
        problem.params, torch.optim.SGD, lr=0.1, k=2, max_grad_norm=1e-3, weight_decay=0.1, backend=backend
    )
    left = []

    def closure():
        loss = problem.closure()
        left[:] = [(p.grad, p.grad.clone()) for p in problem.params]
        return loss

    opt.step(closure)
    for p, (grad, value) in zip(problem.params, left, strict=True):
        assert p.grad is grad
        assert_same_state(grad, value)


@pytest.mark.parametrize("make_loss", ["tensor", "float", "tuple", "object"])
@pytest.mark.parametrize("reuse", [True, False])
def test_step_returns_what_evaluation_0_returned(backend, reuse, make_loss):
    problem = Problem()
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, k=2, reuse_gradient=reuse, backend=backend)
    returned = []

    def closure():
        loss = problem.closure()
        result = {
            "tensor": loss,
            "float": loss.item(),
            "tuple": (loss, {"accuracy": 1}),
            "object": type("Loss", (), {})(),
        }[make_loss]
        returned.append(result)
        return result

    assert opt.step(closure) is returned[0]
    assert len(returned) == (3 if reuse else 4)


def test_step_returns_the_loss_at_the_unperturbed_weights(backend):
    problem = Problem()
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, rho=0.5, backend=backend)
    expected = problem.loss().detach()
    assert_same_state(opt.step(problem.closure).detach(), expected)


def test_step_accepts_the_closure_by_keyword(backend):
    problem = Problem()
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, backend=backend)
    assert opt.step(closure=problem.closure) is not None


def test_closure_and_loop_run_with_gradients_enabled_under_no_grad(backend):
    problem, twin = Problem(), Problem()
    opt, other = (Lookbehind(p.params, torch.optim.SGD, lr=0.1, backend=backend) for p in (problem, twin))
    with torch.no_grad():
        opt.step(problem.closure)
        assert not torch.is_grad_enabled()
    other.step(twin.closure)
    assert_same_state(problem.values(), twin.values())
    assert torch.is_grad_enabled()
    for _ in opt.evaluations():
        assert torch.is_grad_enabled()
        problem.closure()
    assert all(p.requires_grad and p.is_leaf for p in problem.params)


@pytest.mark.sample(24)
@pytest.mark.parametrize("constructed_with", [True, False])
@pytest.mark.parametrize("alpha", [0.3, "adaptive"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_pairs_equal_the_2k_closure_bitwise(backend, base, k, alpha, constructed_with):
    def run(form, reuse):
        problem = Problem()
        options = {"lr": 0.05, "weight_decay": 0.01}
        if base is torch.optim.SGD:
            options["momentum"] = 0.9
        opt = Lookbehind(
            problem.params, base, rho=0.2, k=k, alpha=alpha, reuse_gradient=reuse, backend=backend, **options
        )
        for _ in range(3):
            outer_step(opt, problem, form)
        return snapshot(opt), opt.diagnostics

    (closure, closure_said), (pairs, pairs_said) = run("step", False), run("pairs", constructed_with)
    assert_same_state(pairs["params"], closure["params"])
    assert_same_state(pairs["state"], closure["state"])
    assert_same_state(pairs_said, closure_said)


def test_minibatches_can_be_switched_inside_the_step(backend):
    """In the 2k form both evaluations of an inner step see the minibatch that `inner_step` names."""
    lr, rho = 0.2, 0.3
    start = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    batches = [torch.tensor(b, dtype=torch.float64) for b in ([1.0, 2.0, -1.0], [0.0, -3.0, 1.5])]
    p = nn.Parameter(start.clone())
    opt = Lookbehind([p], torch.optim.SGD, lr=lr, rho=rho, k=2, alpha=1.0, reuse_gradient=False, backend=backend)
    for evaluation in opt.evaluations():
        ((p - batches[evaluation.inner_step - 1]) ** 2).sum().backward()

    perturbed, fast = start.clone(), start.clone()
    for batch in batches:
        g = 2 * (perturbed - batch)
        perturbed = perturbed + rho * g / g.norm()
        fast = fast - lr * 2 * (perturbed - batch)
    torch.testing.assert_close(p.detach(), fast, rtol=1e-13, atol=1e-14)


def test_a_loop_that_was_never_begun_opens_nothing(backend):
    problem = Problem()
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, backend=backend)
    loop = opt.evaluations()
    opt.step(problem.closure)
    del loop
    opt.step(problem.closure)
    assert opt.state_dict()["param_groups"][0]["lr"] == 0.1


@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_abort_step_restores_weights_and_state(backend, momentum, calls):
    """After 1, 2 or 3 calls of the pair form; what follows is as if the abandoned step had never begun."""
    problem, twin = Problem(), Problem()
    options = {"lr": 0.1, "momentum": momentum, "rho": 0.2, "k": 3, "backend": backend}
    opt, other = (Lookbehind(p.params, torch.optim.SGD, **options) for p in (problem, twin))
    for warm_up in range(2):  # once with no state yet, once with
        before = snapshot(opt)
        for call in range(calls):
            opt.zero_grad()
            problem.closure()
            opt.descent_step() if call % 2 else opt.ascent_step()
        assert not torch.equal(problem.params[0], before["params"][0])
        opt.abort_step()
        assert_same_state(snapshot(opt), before, f"warm-up {warm_up}")
        opt.state_dict()  # the step is closed
        outer_step(opt, problem, "pairs")
        outer_step(other, twin, "pairs")
        assert_same_state(problem.values(), twin.values())
    assert_same_state(snapshot(opt)["state"], snapshot(other)["state"])


def test_abort_step_with_no_step_open_does_nothing(backend):
    problem = Problem()
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend)
    opt.abort_step()
    opt.step(problem.closure)
    before = snapshot(opt)
    opt.abort_step()
    opt.abort_step()
    assert_same_state(snapshot(opt), before)


@pytest.mark.parametrize("form", ["step", "evaluations"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_abort_step_inside_the_loop_ends_the_step(backend, form, at):
    """The loop does not go on with half a step: it ends or raises, and everything is as before."""
    problem, twin = Problem(), Problem()
    options = {"lr": 0.1, "momentum": 0.9, "rho": 0.2, "k": 2, "backend": backend}
    opt, other = (Lookbehind(p.params, torch.optim.SGD, **options) for p in (problem, twin))
    outer_step(opt, problem)
    outer_step(other, twin)
    before = snapshot(opt)
    evaluated = []

    def evaluate(index):
        evaluated.append(index)
        loss = problem.closure()
        if index == at:
            opt.abort_step()
        return loss

    with suppress(RuntimeError):
        drive(opt, form, evaluate, opt.k)
    assert evaluated == list(range(at + 1))
    assert_same_state(snapshot(opt), before)
    outer_step(opt, problem)
    outer_step(other, twin)
    assert_same_state(problem.values(), twin.values())


@pytest.mark.parametrize("end", ["close", "next"])
def test_a_loop_left_lying_about_does_not_disturb_the_next_step(backend, end):
    """A loop whose step was abandoned is still referred to, and ends in the middle of another one."""
    problem, twin = Problem(), Problem()
    options = {"lr": 0.1, "momentum": 0.9, "rho": 0.2, "k": 2, "backend": backend}
    opt, other = (Lookbehind(p.params, torch.optim.SGD, **options) for p in (problem, twin))
    old = opt.evaluations()
    next(old)
    problem.closure()
    next(old)
    problem.closure()
    opt.abort_step()
    for evaluation in opt.evaluations():
        if evaluation.index == 1:
            if end == "close":
                old.close()
            else:
                with pytest.raises((RuntimeError, StopIteration)):
                    next(old)
        problem.closure()
    outer_step(other, twin)
    assert_same_state(problem.values(), twin.values())
    assert_same_state(snapshot(opt)["state"], snapshot(other)["state"])


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_breaking_out_of_the_loop_restores_everything(backend, base, reuse):
    problem, twin = Problem(), Problem()
    options = {"lr": 0.05, "rho": 0.2, "k": 3, "reuse_gradient": reuse, "backend": backend}
    if base is torch.optim.SGD:
        options["momentum"] = 0.9
    opt, other = (Lookbehind(p.params, base, **options) for p in (problem, twin))
    for _ in range(2):
        for last in range(4 if reuse else 6):
            for after_backward in (False, True):
                before = snapshot(opt)
                for evaluation in opt.evaluations():
                    if evaluation.index == last and not after_backward:
                        break
                    problem.closure()
                    if evaluation.index == last:
                        break
                assert_same_state(snapshot(opt), before, f"left at evaluation {last}")
        opt.step(problem.closure)
        other.step(twin.closure)
        assert_same_state(problem.values(), twin.values())
    assert_same_state(snapshot(opt)["state"], snapshot(other)["state"])


# ---------------------------------------------------------------------------------------------- groups, changing values


def test_rho_of_each_group_scales_its_own_displacement(backend):
    """One norm over all groups, each group's displacement with its own rho; rho = 0 leaves a group where it is."""
    problem = Problem(torch.float64)
    rhos = [0.5, 0.0, 0.125]
    groups = [{"params": problem.params[:1], "rho": rhos[0]}, {"params": problem.params[1:2], "rho": rhos[1]}]
    groups.append({"params": problem.params[2:], "rho": rhos[2]})
    opt = Lookbehind(groups, torch.optim.SGD, lr=0.1, rho=9.0, k=1, backend=backend)
    slow = problem.values()
    grads = []
    for evaluation in opt.evaluations():
        if evaluation.index == 1:
            length = norm(grads)
            for i, rho in enumerate([rhos[0], rhos[1], rhos[2], rhos[2]]):
                expected = slow[i] + rho * grads[i] / length
                torch.testing.assert_close(problem.params[i].detach(), expected, rtol=1e-13, atol=1e-14)
        problem.closure()
        grads = problem.grads()


def test_adaptive_and_eta_by_group(backend):
    problem = Problem(torch.float64)
    groups = [
        {"params": problem.params[:1], "adaptive": True, "eta": 0.5},
        {"params": problem.params[1:3], "adaptive": False},
        {"params": problem.params[3:], "adaptive": True},
    ]
    opt = Lookbehind(groups, torch.optim.SGD, lr=0.1, rho=0.25, eta=0.125, k=1, backend=backend)
    slow = problem.values()
    grads = []
    for evaluation in opt.evaluations():
        if evaluation.index == 1:
            ones = [torch.ones_like(w) for w in slow]
            scale = [slow[0].abs() + 0.5, ones[1], ones[2], slow[3].abs() + 0.125]
            length = norm([t * g for t, g in zip(scale, grads, strict=True)])
            for p, w, t, g in zip(problem.params, slow, scale, grads, strict=True):
                torch.testing.assert_close(p.detach(), w + 0.25 * t * t * g / length, rtol=1e-13, atol=1e-14)
        problem.closure()
        grads = problem.grads()


@pytest.mark.parametrize("form", FORMS)
def test_changes_to_a_group_take_effect_at_the_next_step(backend, form):
    """lr, momentum, weight decay, nesterov... by group, held to torch's SGD with the same changes, bit for bit."""
    problem, twin = Problem(), Problem()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    opt, plain = (
        make([{"params": p.params[:2]}, {"params": p.params[2:], "lr": 0.05}])
        for p, make in [
            (problem, lambda g: Lookbehind(g, torch.optim.SGD, rho=0.0, k=2, alpha=1.0, backend=backend, **options)),
            (twin, lambda g: torch.optim.SGD(g, foreach=False, **options)),
        ]
    )
    changes = [
        {},
        {"lr": 0.3},
        {"weight_decay": 0.5},
        {"momentum": 0.25},
        {"dampening": 0.3},
        {"dampening": 0.0, "nesterov": True},
        {"maximize": True},
        {"momentum": 0.0, "nesterov": False},
    ]
    for change in changes:
        opt.param_groups[0].update(change)
        plain.param_groups[0].update(change)
        outer_step(opt, problem, form)
        plain_step(plain, twin, k=2)
        assert_same_state(problem.values(), twin.values(), str(change))


def test_changes_to_an_adam_group_take_effect_at_the_next_step(backend):
    problem, twin = Problem(), Problem()
    opt = Lookbehind(problem.params, torch.optim.Adam, rho=0.0, k=1, alpha=1.0, backend=backend, lr=0.1)
    plain = torch.optim.Adam(twin.params, lr=0.1, foreach=False)
    for change in ({}, {"lr": 0.03}, {"betas": (0.5, 0.8)}, {"eps": 0.1}, {"weight_decay": 0.2}, {"maximize": True}):
        opt.param_groups[0].update(change)
        plain.param_groups[0].update(change)
        outer_step(opt, problem)
        before = plain_step(plain, twin)
        assert_torchs_weights(backend, torch.optim.Adam, problem.params, twin.params, before)


def test_changes_of_rho_adaptive_and_eta_take_effect_at_the_next_step(backend):
    problem = Problem(torch.float64)
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, k=1, backend=backend)
    group = opt.param_groups[0]
    for change in ({"rho": 0.5}, {"adaptive": True}, {"eta": 0.7}, {"rho": 0.25, "adaptive": False}):
        group.update(change)
        slow = problem.values()
        grads = []
        for evaluation in opt.evaluations():
            if evaluation.index == 1:
                scale = [w.abs() + group["eta"] if group["adaptive"] else torch.ones_like(w) for w in slow]
                length = norm([t * g for t, g in zip(scale, grads, strict=True)])
                for p, w, t, g in zip(problem.params, slow, scale, grads, strict=True):
                    expected = w + group["rho"] * t * t * g / length
                    torch.testing.assert_close(p.detach(), expected, rtol=1e-13, atol=1e-14)
            problem.closure()
            grads = problem.grads()


def test_changes_of_k_and_alpha_take_effect_at_the_next_step(backend):
    """From torch's SGD: with rho = 0 an outer step goes the share alpha of the way that k steps go."""
    problem, twin = Problem(torch.float64), Problem(torch.float64)
    opt = Lookbehind(problem.params, torch.optim.SGD, rho=0.0, k=2, alpha=1.0, lr=0.1, momentum=0.9, backend=backend)
    plain = torch.optim.SGD(twin.params, lr=0.1, momentum=0.9)
    for k, alpha in ((2, 1.0), (3, 1.0), (3, 0.25), (1, 0.5), (4, 0.75)):
        opt.k, opt.alpha = k, alpha
        slow = problem.values()
        outer_step(opt, problem)
        plain_step(plain, twin, k)
        for p, fast, w in zip(problem.params, twin.params, slow, strict=True):
            torch.testing.assert_close(p.detach(), w + alpha * (fast.detach() - w), rtol=1e-13, atol=1e-14)
            fast.data.copy_(p.data)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_tensor_lr_gives_what_the_same_float_gives(backend, base):
    """0.125 is the same number in both; the float's path is torch's own optimizer."""
    problem, twin = Problem(), Problem()
    lr = torch.tensor(0.125)
    opt = Lookbehind(problem.params, base, rho=0.0, k=2, alpha=1.0, lr=lr, backend=backend)
    plain = base(twin.params, lr=0.125, foreach=False)
    for new in (None, 0.03125):
        if new is not None:
            opt.param_groups[0]["lr"].fill_(new)
            plain.param_groups[0]["lr"] = new
        for _ in range(2):
            outer_step(opt, problem)
            plain_step(plain, twin, k=2)
            for a, b in zip(problem.values(), twin.values(), strict=True):
                torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
    assert float(opt.param_groups[0]["lr"]) == 0.03125


def test_zero_grad(backend):
    problem = Problem()
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, backend=backend)
    problem.closure()
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in problem.params)
    opt.zero_grad()
    assert all(p.grad is None for p in problem.params)


def test_added_group_is_trained_with_its_own_values(backend):
    """Parameters added after two steps follow torch's optimizer with the same group added, bit for bit."""
    problem, twin = Problem(), Problem()
    opt = Lookbehind(
        problem.params[:2], torch.optim.SGD, rho=0.0, k=2, alpha=1.0, lr=0.1, momentum=0.9, backend=backend
    )
    plain = torch.optim.SGD(twin.params[:2], lr=0.1, momentum=0.9, foreach=False)
    for step in range(4):
        if step == 2:
            frozen = problem.values()[2:]
            assert_same_state(frozen, Problem().values()[2:], "not in the optimizer, not trained")
            opt.add_param_group({"params": problem.params[2:], "lr": 0.3, "rho": 0.0, "weight_decay": 0.1})
            plain.add_param_group({"params": twin.params[2:], "lr": 0.3, "weight_decay": 0.1})
        outer_step(opt, problem)
        twin.model.zero_grad()  # the parameters outside the optimizer collect gradients too
        plain_step(plain, twin, k=2)
        assert_same_state(problem.values(), twin.values())
        problem.model.zero_grad()
    assert opt.param_groups is opt.base_optimizer.param_groups
    assert opt.param_groups[1]["momentum"] == 0.9
    assert not torch.equal(problem.params[2], frozen[0])


def test_added_group_has_its_own_rho_or_the_default(backend):
    problem = Problem(torch.float64)
    opt = Lookbehind(problem.params[:1], torch.optim.SGD, lr=0.1, rho=0.25, k=1, backend=backend)
    opt.step(problem.closure)
    opt.add_param_group({"params": problem.params[1], "rho": 0.5})
    opt.add_param_group({"params": iter(problem.params[2:])})
    opt.zero_grad()
    assert [g["rho"] for g in opt.param_groups] == [0.25, 0.5, 0.25]
    assert [g["eta"] for g in opt.param_groups] == [0.01] * 3
    slow = problem.values()
    grads = []
    for evaluation in opt.evaluations():
        if evaluation.index == 1:
            for p, w, g, rho in zip(problem.params, slow, grads, [0.25, 0.5, 0.25, 0.25], strict=True):
                torch.testing.assert_close(p.detach(), w + rho * g / norm(grads), rtol=1e-13, atol=1e-14)
        problem.closure()
        grads = problem.grads()


def test_a_group_added_to_the_base_is_ours_too(backend):
    """`param_groups` is one list; what the group lacks is what the constructor was given."""
    problem = Problem()
    opt = Lookbehind(problem.params[:2], torch.optim.SGD, lr=0.1, rho=0.25, eta=0.5, backend=backend)
    opt.step(problem.closure)
    opt.base_optimizer.add_param_group({"params": problem.params[2:], "lr": 0.2})
    opt.zero_grad()
    before = problem.values()
    opt.step(problem.closure)
    assert opt.param_groups is opt.base_optimizer.param_groups
    assert [(g["rho"], g["eta"], g["lr"]) for g in opt.param_groups] == [(0.25, 0.5, 0.1), (0.25, 0.5, 0.2)]
    assert all(not torch.equal(p, w) for p, w in zip(problem.params, before, strict=True))


def test_weights_written_between_steps_are_where_the_next_step_starts(backend):
    """As after an average of weights, or a checkpoint of the model loaded in place."""
    problem, twin = Problem(), Problem()
    opt = Lookbehind(problem.params, torch.optim.SGD, rho=0.0, k=2, alpha=1.0, lr=0.1, momentum=0.9, backend=backend)
    plain = torch.optim.SGD(twin.params, lr=0.1, momentum=0.9, foreach=False)
    for _ in range(3):
        for p in problem.params + twin.params:
            p.data.mul_(0.75)
        outer_step(opt, problem)
        plain_step(plain, twin, k=2)
        assert_same_state(problem.values(), twin.values())


# ---------------------------------------------------------------------------------------------------------- diagnostics


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_diagnostics_of_a_static_alpha(backend, form, adaptive):
    """`grad_norm` is the plain norm at evaluation 0, ASAM or not."""
    problem = Problem(torch.float64)
    opt = Lookbehind(
        problem.params, torch.optim.SGD, lr=0.1, rho=0.5, k=2, alpha=0.375, adaptive=adaptive, backend=backend
    )
    assert opt.diagnostics == {}
    for _ in range(2):
        problem.model.zero_grad()
        problem.closure()
        expected = norm(problem.grads())
        problem.model.zero_grad()
        outer_step(opt, problem, form)
        said = opt.diagnostics
        assert set(said) == {"grad_norm", "alpha", "skipped"}
        for value in said.values():
            assert isinstance(value, torch.Tensor)
            assert value.dim() == 0
            assert not value.requires_grad
        assert float(said["grad_norm"]) == pytest.approx(expected, rel=1e-13)
        assert float(said["alpha"]) == 0.375


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_diagnostics_of_an_adaptive_alpha(backend, scope, k):
    """(cos(fast_1 - slow, fast_k - slow) + 1) / 2 over everything or by tensor, and the step that was made with it."""
    lr, rho = 0.2, 1.5
    problem = Problem(torch.float64)
    options = {"lr": lr, "rho": rho, "k": k, "alpha": "adaptive", "alpha_scope": scope, "backend": backend}
    opt = Lookbehind([{"params": problem.params[:3]}, {"params": problem.params[3:]}], torch.optim.SGD, **options)
    slow, grads = problem.values(), []
    for _ in opt.evaluations():
        problem.closure()
        grads.append(problem.grads())
    first = [-lr * g for g in grads[1]]
    last = [-lr * sum(grads[j][i] for j in range(1, k + 1)) for i in range(4)]

    def alpha(a, b):
        inner = sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
        return (inner / (norm(a) * norm(b)) + 1) / 2

    said = opt.diagnostics["alpha"]
    if scope == "global":
        assert said.dim() == 0
        expected = [alpha(first, last)] * 4
        actual = [float(said)] * 4
    else:
        assert said.shape == (4,)
        expected = [alpha([a], [b]) for a, b in zip(first, last, strict=True)]
        actual = said.tolist()
    if k == 1:
        assert actual == [1.0] * 4
    else:
        assert actual == pytest.approx(expected, rel=1e-12)
        assert min(actual) < 0.999, "the displacements must differ for this to show anything"
    for p, w, d, a in zip(problem.params, slow, last, expected, strict=True):
        torch.testing.assert_close(p.detach(), w + a * d, rtol=1e-12, atol=1e-14)


def test_tensor_alpha_is_in_optimizer_order_across_dtypes_and_groups(backend):
    """Each tensor turns by its own angle between the two descents; float32 and float64 live in different buckets."""
    dtypes = [torch.float64, torch.float32, torch.float64, torch.float32, torch.float64]
    angles = [0.5, 1.0, 1.5, 2.0, 2.5]
    params = [nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype)) for dtype in dtypes]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.05}]
    options = {"lr": 0.1, "rho": 0.5, "k": 2, "alpha": "adaptive", "alpha_scope": "tensor"}
    opt = Lookbehind(groups, torch.optim.SGD, backend=backend, **options)
    for evaluation in opt.evaluations():
        for p, angle in zip(params, angles, strict=True):
            turned = angle if evaluation.index == 2 else 0.0
            p.grad = torch.tensor([math.cos(turned), math.sin(turned)], dtype=p.dtype)
    # fast_1 - slow is along the first gradient, fast_2 - slow along the bisector of both.
    expected = [(math.cos(angle / 2) + 1) / 2 for angle in angles]
    assert opt.diagnostics["alpha"].tolist() == pytest.approx(expected, rel=1e-6)


def test_diagnostics_belong_to_the_last_finished_step_and_are_not_overwritten(backend):
    """A value kept from one step is still that step's value after the next one."""
    problem = Problem()
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, rho=0.5, k=2, alpha="adaptive", backend=backend)
    kept, copies = [], []
    for _ in range(3):
        opt.step(problem.closure)
        kept.append(opt.diagnostics)
        copies.append(freeze(opt.diagnostics))
    assert_same_state(kept, copies)
    assert len({float(d["grad_norm"]) for d in copies}) == 3


def test_diagnostics_are_not_those_of_an_abandoned_step(backend):
    problem = Problem()
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, rho=0.5, k=3, alpha="adaptive", backend=backend)
    opt.step(problem.closure)
    assert opt.diagnostics
    for evaluation in opt.evaluations():
        (problem.loss() * 100).backward()
        if evaluation.index == 3:
            break
    assert opt.diagnostics == {}


# ----------------------------------------------------------------------------------------------------------- schedulers

SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1.0 / (1 + epoch)),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=8, cycle_momentum=True),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.25, total_iters=2), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[2],
    ),
}


@pytest.mark.sample(40)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("on", ["lookbehind", "base"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(backend, name, base, on, form):
    """The trajectory is that of the torch optimizer under the same scheduler, and nothing warns."""
    problem, twin = Problem(), Problem()
    options = {"lr": 0.1, "momentum": 0.9} if base is torch.optim.SGD else {"lr": 0.1}
    opt = Lookbehind(problem.params, base, rho=0.0, k=1, alpha=1.0, backend=backend, **options)
    plain = base(twin.params, foreach=False, **options)
    lrs, moments = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = SCHEDULERS[name](opt if on == "lookbehind" else opt.base_optimizer)
        reference = SCHEDULERS[name](plain)
        for _ in range(5):
            group = opt.param_groups[0]
            lrs.append(group["lr"])
            moments.append(group["momentum"] if base is torch.optim.SGD else group["betas"])
            outer_step(opt, problem, form)
            before = plain_step(plain, twin)
            assert_torchs_weights(backend, base, problem.params, twin.params, before)
            scheduler.step()
            reference.step()
    assert len(set(lrs)) > 2, "the schedule must change the lr for this to show anything"
    if name == "OneCycleLR":
        assert len(set(moments)) > 2, "momentum (SGD) or betas (Adam) must have been cycled"


@pytest.mark.parametrize("on", ["lookbehind", "base"])
def test_scheduler_that_steps_before_the_optimizer_still_warns(backend, on):
    """The silence above is earned: construction does not count as a step."""
    problem = Problem()
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, backend=backend)
    scheduler = torch.optim.lr_scheduler.StepLR(opt if on == "lookbehind" else opt.base_optimizer, step_size=1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_reduce_on_plateau_and_a_scheduler_on_an_unfused_base(backend):
    problem = Problem()
    opt = Lookbehind(problem.params, torch.optim.RMSprop, lr=0.01, k=2, backend=backend)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0)
    decay = torch.optim.lr_scheduler.StepLR(opt.base_optimizer, step_size=1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(problem.closure)
        plateau.step(1.0)
        decay.step()
        assert opt.param_groups[0]["lr"] == 0.005
        opt.step(problem.closure)
        plateau.step(2.0)
        assert opt.param_groups[0]["lr"] == 0.0025
        before = problem.values()
        opt.step(problem.closure)
    assert not torch.equal(problem.params[0], before[0])


# ---------------------------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("form", FORMS)
def test_step_hooks_fire_once_per_outer_step_around_the_evaluations(backend, form, base):
    problem = Problem()
    opt = Lookbehind(problem.params, base, lr=0.1, k=2, reuse_gradient=False, backend=backend)
    events = []
    weights = {}

    def hook(name):
        def record(optimizer, args, kwargs):
            if optimizer is opt:
                events.append(name)
                weights[name] = problem.values()

        return record

    original = problem.closure

    def closure():
        events.append("evaluation")
        return original()

    problem.closure = closure
    global_hooks = [
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    try:
        opt.register_step_pre_hook(hook("pre"))
        removable = opt.register_step_post_hook(hook("post"))
        for _ in range(2):
            slow = problem.values()
            events.clear()
            outer_step(opt, problem, form)
            # In the pair form the optimizer enters the step after the caller's first backward.
            begin = ["evaluation", "global pre", "pre"] if form == "pairs" else ["global pre", "pre", "evaluation"]
            assert events == [*begin, *["evaluation"] * 3, "post", "global post"]
            assert_same_state(weights["pre"], slow)
            assert_same_state(weights["post"], problem.values())
        removable.remove()
        events.clear()
        outer_step(opt, problem, form)
        assert "post" not in events
        assert events.count("pre") == 1
    finally:
        for handle in global_hooks:
            handle.remove()


def test_a_pre_hook_may_replace_the_closure(backend):
    problem, other = Problem(), []
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, backend=backend)

    def replacement():
        other.append(1)
        return problem.closure()

    opt.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, replacement), {}))
    opt.step(lambda: pytest.fail("the hook replaced this closure"))
    assert len(other) == 3


# what a step is refused for: sets it, given the optimizer
REFUSED = {
    "a step is open": lambda opt: opt.ascent_step(),
    "k": lambda opt: setattr(opt, "k", 0),
    "alpha": lambda opt: setattr(opt, "alpha", 2.0),
    "loss_scale": lambda opt: setattr(opt, "loss_scale", -1.0),
    "backend": lambda opt: setattr(opt, "backend", "nonsense"),
    "rho": lambda opt: opt.param_groups[0].update(rho=-1.0),
    "adaptive": lambda opt: opt.param_groups[0].update(adaptive="yes"),
    "a parameter": lambda opt: setattr(opt.param_groups[0]["params"][0], "data", torch.zeros(1)),
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_hooks_do_not_fire_for_a_refused_step(backend, base, reason):
    problem = Problem()
    opt = Lookbehind(problem.params, base, lr=0.1, backend=backend)
    opt.step(problem.closure)
    if reason == "a step is open":
        problem.closure()
    else:
        opt.zero_grad()
    REFUSED[reason](opt)
    fired = []
    opt.register_step_pre_hook(lambda *_: fired.append(1))
    opt.register_step_post_hook(lambda *_: fired.append(1))
    before = problem.values()
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        next(iter(opt.evaluations()))
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        opt.ascent_step()
    assert fired == []
    assert reason == "a step is open" or opt.evaluation is None
    assert_same_state(problem.values(), before)


@pytest.mark.parametrize("form", FORMS)
def test_a_pre_hook_may_change_settings_and_groups(backend, form):
    """They are those of the step that it precedes."""
    weights = []
    for hooked in (True, False):
        problem = Problem()
        opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, reuse_gradient=False, backend=backend)
        outer_step(opt, problem, form)

        def change(optimizer, args, kwargs):
            optimizer.alpha = 0.9
            optimizer.param_groups[0].update(lr=0.02, rho=0.3, momentum=0.5)

        if hooked:
            opt.register_step_pre_hook(change)
        else:
            change(opt, (), {})
        outer_step(opt, problem, form)
        weights.append(problem.values())
    assert_same_state(weights[0], weights[1])


def test_post_hooks_do_not_fire_for_an_abandoned_step(backend):
    problem = Problem()
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, backend=backend)
    fired = []
    opt.register_step_post_hook(lambda *_: fired.append(1))
    for _ in opt.evaluations():
        problem.closure()
        break
    problem.closure()
    opt.ascent_step()
    opt.abort_step()

    def abort_at_the_end():
        for evaluation in opt.evaluations():
            problem.closure()
            if evaluation.closes:
                opt.abort_step()

    with pytest.raises(RuntimeError, match="abort_step"):
        abort_at_the_end()
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert fired == []
    opt.step(problem.closure)
    assert fired == [1]


def test_the_profiler_sees_the_step(backend):
    problem = Problem()
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, backend=backend)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step(problem.closure)
        opt.step(problem.closure)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get("Optimizer.step#Lookbehind.step") == 2


# ------------------------------------------------------------------------------------------------ host reads and memory


class HostReads(TorchDispatchMode):
    """Records every value that the host asks a tensor for, while `watching`."""

    READS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "allclose", "masked_select")
    UNDISPATCHED = ("tolist", "numpy", "__array__")  # these look at memory without a dispatched operation

    def __init__(self, monkeypatch):
        super().__init__()
        self.watching = False
        self.read = []
        for name in self.UNDISPATCHED:
            monkeypatch.setattr(torch.Tensor, name, self.spied(getattr(torch.Tensor, name)))

    def spied(self, method):
        def spy(tensor, *args, **kwargs):
            value = method(tensor, *args, **kwargs)
            self.note(method.__name__, value)
            return value

        return spy

    def note(self, name, value):
        if self.watching:
            self.read.append(f"{name} {value}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.READS:
            self.note(func.overloadpacket.__name__, result)
        return result


@pytest.mark.sample(6)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_no_value_computed_from_gradients_is_read_by_the_host(backend, base, scope, form, monkeypatch):
    """Norm, alpha and clipping stay on the device: what the host reads (settings, Adam's counter) is the same whatever
    the gradients are: clipped or not, zero, infinite or NaN.
    """
    options = {"rho": 0.1, "k": 3, "alpha": "adaptive", "alpha_scope": scope, "adaptive": True, "max_grad_norm": 0.1}
    reads = HostReads(monkeypatch)
    seen = []
    for scale in (1.0, 1e-3, 1e3, 0.0, math.inf, math.nan):
        problem = Problem()
        opt = Lookbehind(problem.params, base, lr=0.1, reuse_gradient=form != "step", backend=backend, **options)

        def evaluate(index, problem=problem, scale=scale):
            reads.watching = False
            loss = problem.loss() * scale
            loss.backward()
            reads.watching = True
            return loss

        reads.read = []
        with reads:
            for _ in range(2):
                drive(opt, form, evaluate, opt.k)
                diagnostics = opt.diagnostics
            seen.append(reads.read)
            reads.read = []
            float(diagnostics["grad_norm"])
        reads.watching = False
        assert len(reads.read) == 1, "the instrument must see a read"
    assert all(other == seen[0] for other in seen[1:])


@contextmanager
def count_storages():
    """A function that returns the bytes of the storages which Python tensors made in this block still reach."""
    gc.collect()
    gc.freeze()  # what is there already is neither collected nor listed below

    def count(besides=()):
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor):  # not isinstance: a weak proxy may be dead
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        for tensor in besides:
            storages.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(storages.values())

    try:
        yield count
    finally:
        gc.unfreeze()


SIZES = [(200, 100), (999,), (64, 33), (7,), ()]
ELEMENTS = sum(math.prod(size) for size in SIZES)

MEMORY = [
    # dtype, base, base options, state buffers, options, buffers of fp32 (fp64) the size of the model besides the state
    (torch.float32, torch.optim.SGD, {}, 0, {"k": 1, "alpha": 0.5}, 1),
    (torch.float32, torch.optim.SGD, {"momentum": 0.9}, 1, {"k": 1, "alpha": 0.5}, 1),
    (torch.float32, torch.optim.SGD, {"momentum": 0.9}, 1, {"k": 1, "alpha": "adaptive"}, 1),
    (torch.float32, torch.optim.SGD, {}, 0, {"k": 2, "alpha": 0.5}, 2),
    (torch.float32, torch.optim.SGD, {"momentum": 0.9}, 2, {"k": 2, "alpha": 0.5}, 1),
    (torch.float32, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, 2, {"k": 2, "alpha": 0.5}, 2),
    (torch.float32, torch.optim.SGD, {"momentum": 0.9}, 2, {"k": 2, "alpha": "adaptive"}, 1),
    (torch.float32, torch.optim.SGD, {"momentum": 0.9}, 2, {"k": 3, "alpha": 0.5}, 2),
    (torch.float32, torch.optim.SGD, {"momentum": 0.9}, 2, {"k": 3, "alpha": "adaptive"}, 3),
    (torch.float32, torch.optim.SGD, {"momentum": 0.9}, 2, {"k": 3, "alpha": "adaptive", "adaptive": True}, 3),
    (torch.float32, torch.optim.SGD, {"momentum": 0.9}, 2, {"k": 5, "alpha": "adaptive"}, 3),
    (torch.float32, torch.optim.SGD, {"momentum": 0.9}, 2, {"k": 2, "alpha": 0.5, "max_grad_norm": 1.0}, 1),
    (torch.float64, torch.optim.SGD, {"momentum": 0.9}, 2, {"k": 3, "alpha": "adaptive"}, 3),
    (torch.bfloat16, torch.optim.SGD, {"momentum": 0.9}, 1, {"k": 1, "alpha": 0.5}, 2),
    (torch.bfloat16, torch.optim.SGD, {"momentum": 0.9}, 2, {"k": 2, "alpha": 0.5}, 2),
    (torch.float16, torch.optim.SGD, {"momentum": 0.9}, 2, {"k": 3, "alpha": "adaptive"}, 4),
    (torch.float32, torch.optim.Adam, {}, 2, {"k": 1, "alpha": 0.5}, 1),
    (torch.float32, torch.optim.Adam, {}, 4, {"k": 2, "alpha": 0.5}, 1),
    (torch.float32, torch.optim.AdamW, {"amsgrad": True}, 6, {"k": 3, "alpha": "adaptive"}, 3),
    (torch.float32, torch.optim.RMSprop, {}, 2, {"k": 2, "alpha": 0.5}, 2),
    (torch.bfloat16, torch.optim.RMSprop, {}, 2, {"k": 2, "alpha": 0.5}, 3),
]


@pytest.mark.sample(16)
@pytest.mark.parametrize(("dtype", "base", "base_options", "states", "options", "buffers"), MEMORY)
def test_extra_memory(backend, dtype, base, base_options, states, options, buffers):
    """`slow`; for k >= 2 a working copy of each state (an abandoned step must leave the base's own alone) and `fast`,
    but not for k = 2 where it can be derived; `first` for adaptive alpha with k >= 3; `perturbed` for low precision. No
    gradient is held on to.
    """
    unit = ELEMENTS * (8 if dtype is torch.float64 else 4)
    # Slack: 64-byte alignment of each tensor's slice in each buffer, tables, scalars.
    most = unit * (states + buffers) + 64 * len(SIZES) * (states + buffers) + 4096
    with count_storages() as count:
        params = [nn.Parameter(torch.ones(size, dtype=dtype)) for size in SIZES]

        def evaluate(index):
            loss = sum(p.float().square().sum() for p in params)
            loss.backward()
            return loss.detach()

        opt = Lookbehind(params, base, lr=0.01, backend=backend, **options, **base_options)
        for form in FORMS:
            drive(opt, form, evaluate, opt.k)
        during = []
        for evaluation in opt.evaluations():
            during.append(count(besides=params))
            evaluate(evaluation.index)
        opt.zero_grad()
        after = count(besides=params)
    copies = 1 if options["k"] == 1 else 2
    state = sum(t.numel() * t.element_size() for s in opt.base_optimizer.state.values() for t in s.values())
    assert state >= unit * states // copies, "the base's state must be there to be counted"
    assert after >= unit * (states + 1), "at least the state and `slow`: the instrument must see them"
    assert after <= most, f"after a step: {after / unit:.3f} times the model"
    assert max(during) <= most, f"during a step: {max(during) / unit:.3f} times the model"


class Allocated(TorchDispatchMode):
    """Holds, once each, the memory of at least so many bytes that ops return."""

    def __init__(self, least):
        super().__init__()
        self.least = least
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= self.least:
                self.storages.setdefault(x.untyped_storage()._cdata, x)
        return result


# extra copies of the model beside the base's state: slow; and from k = 2 on the working momentum; fast; first. All of
# them are needed: as long as the step can be undone slow and the momentum before it are, first is until the end.
@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({"k": 1}, 1),
        ({"k": 2}, 2),
        ({"k": 3}, 3),
        ({"k": 2, "alpha": "adaptive"}, 2),
        ({"k": 5, "alpha": "adaptive"}, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["step", "evaluations"])
def test_copies_of_the_model(backend, options, copies, form):
    """Counted from what is allocated while the optimizer is built and makes its first steps."""
    params = [nn.Parameter(torch.ones(7, 11)) for _ in range(20)]  # so that what is made for one of them is small
    grads = [torch.ones_like(p) for p in params]
    unit = sum(p.numel() * p.element_size() for p in params)

    def evaluate(index):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        return torch.zeros(())

    with Allocated(unit) as allocated:
        opt = Lookbehind(params, torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend, **options)
        for _ in range(2):
            drive(opt, form, evaluate, opt.k)
    sizes = [x.untyped_storage().nbytes() for x in allocated.storages.values()]
    assert all(unit <= size <= unit + 64 * len(params) for size in sizes)
    assert len(sizes) == copies + 1


def test_memory_does_not_grow_from_step_to_step(backend):
    totals = []
    with count_storages() as count:
        problem = Problem()
        opt = Lookbehind(problem.params, torch.optim.Adam, k=3, alpha="adaptive", alpha_scope="tensor", backend=backend)
        for _ in range(4):
            for form in FORMS:
                outer_step(opt, problem, form)
                opt.zero_grad()
                opt.state_dict()
            totals.append(count())
    assert totals[1] == totals[2] == totals[3]


def test_a_dropped_optimizer_frees_its_memory(backend):
    """No global table keeps a dead optimizer's buffers or model alive."""
    problem = Problem()
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, momentum=0.9, k=2, backend=backend)
    torch.optim.lr_scheduler.StepLR(opt, 1)
    for form in FORMS:
        outer_step(opt, problem, form)
    dead = [weakref.ref(opt), weakref.ref(opt.base_optimizer), weakref.ref(problem.params[0])]
    del opt, problem
    gc.collect()
    assert [ref() for ref in dead] == [None, None, None]


@pytest.mark.sample(24)
@pytest.mark.parametrize("ends", ["well", "by an exception", "by a refusal", "aborted"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", BASES)
def test_it_takes_no_collector_to_free_an_optimizer(backend, base, form, ends):
    """Whatever refers to what, there is no cycle: with everything around it, after steps that end in any way."""

    def evaluate(index, params, broken=False):
        for p in params:
            p.grad = torch.ones_like(p)
        if broken and index == 1:
            if ends == "by an exception":
                raise ZeroDivisionError
            params[0].grad = params[0].grad.to_sparse()
        return torch.zeros(())

    def live():
        make, settings = BASES[base]
        params = [torch.ones(3, dtype=torch.float64).requires_grad_() for _ in range(3)]
        opt = Lookbehind(None, make(scaled_apart(params), **settings), k=2, backend=backend)
        lookahead = Lookahead(opt, 2)
        for _ in range(2):
            drive(lookahead, form, partial(evaluate, params=params), 2)
        if ends == "aborted":
            opt.ascent_step()
            opt.slow_weights()
            opt.abort_step()
        elif ends != "well":
            with suppress(ZeroDivisionError, RuntimeError):
                drive(lookahead, form, partial(evaluate, params=params, broken=True), 2)
            lookahead.abort_step()  # the pairs are the caller's own
        assert opt.evaluation is None
        for read in (opt.state_dict, lookahead.state_dict, lambda: opt.diagnostics):
            read()
        bucket = opt._prepared.buckets[0]
        return [*map(weakref.ref, (opt, lookahead, opt.base_optimizer, params[0], bucket, bucket.norms))]

    live()  # what torch imports when it is used for the first time has cycles of its own
    gc.collect()
    gc.disable()
    try:
        assert [ref() for ref in live()] == [None] * 6
    finally:
        gc.enable()


def test_two_optimizers_do_not_disturb_one_another(backend):
    """Steps interleaved, even inside one another's evaluations."""
    results = []
    for interleaved in (False, True):
        one, two = Problem(seed=1), Problem(seed=2)
        first, second = (
            Lookbehind(p.params, torch.optim.Adam, lr=0.05, rho=0.2, k=2, alpha="adaptive", backend=backend)
            for p in (one, two)
        )
        for _ in range(2):
            if interleaved:
                for _, _ in itertools.zip_longest(first.evaluations(), second.evaluations()):
                    two.closure()
                    one.closure()
            else:
                first.step(one.closure)
                second.step(two.closure)
        results.append([one.values(), two.values(), freeze(first.diagnostics), freeze(second.diagnostics)])
    assert_same_state(results[1], results[0])


def test_k_changed_together_with_the_memory_format(backend):
    """Two reasons to prepare anew at the same time."""
    weights = []
    for memory_formats in (True, False):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).double()
        inputs = torch.randn(2, 3, 8, 8).double()
        optimizer = Lookbehind(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, k=1, backend=backend)
        for k, memory_format in ((1, torch.contiguous_format), (4, torch.channels_last), (2, torch.channels_last)):
            optimizer.k = k
            model.to(memory_format=memory_format if memory_formats else torch.contiguous_format)
            for _ in optimizer.evaluations():
                model(inputs).square().mean().backward()
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-14)
