"""``step()`` without a closure: evaluation 0 is the gradients that are there, and ``optimizer.closure`` is called."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import ASAM, SAM, Lookahead, Lookbehind, MultistepSAM, compat
from tests.twin import BASES, SHAPES, scaled_apart, two_groups, values

METHODS: dict[str, Callable[..., Any]] = {
    "lookbehind": lambda p, b, **o: Lookbehind(p, b, k=3, alpha="adaptive", **o),
    "2k": lambda p, b, **o: Lookbehind(p, b, reuse_gradient=False, **o),
    "clipped": lambda p, b, **o: Lookbehind(p, b, max_grad_norm=0.3, **o),
    "sam": lambda p, b, **o: SAM(p, b, **o),
    "asam": lambda p, b, **o: ASAM(p, b, **o),
    "multistep": lambda p, b, **o: MultistepSAM(p, b, average=True, **o),
    "lookahead": lambda p, b, **o: Lookahead(SAM(p, b, **o), k=2),
    "single-file": lambda p, b, **o: compat.SingleFileSAM(p, b, **o),
}


class Job:
    """Parameters whose gradients are a formula of their values and of the number of the microbatch."""

    def __init__(self, method: str, base: str, groups: Any, backend: str, parts: int = 1, **options: Any) -> None:
        make, settings = BASES[base]
        self.params = [nn.Parameter(values(*shape, seed=i).clone()) for i, shape in enumerate(SHAPES)]
        self.optimizer = METHODS[method](groups(self.params), make, rho=0.2, backend=backend, **options, **settings)
        self.parts, self.calls = parts, 0

    def backward(self, part: int) -> Tensor:
        loss = sum(((p + 0.3 * part).sin() * values(*p.shape, seed=9)).sum() for p in self.params) / self.parts
        loss.backward()
        return loss.detach()

    def closure(self) -> Tensor:
        self.calls += 1
        return sum(self.backward(part) for part in range(self.parts))

    def state(self) -> list[Tensor]:
        state = self.optimizer.state
        entries = [torch.as_tensor(v) for p in self.params for v in state.get(p, {}).values() if v is not None]
        return [p.detach().clone() for p in self.params] + [v.clone() for v in entries]


@pytest.mark.sample(24)
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("groups", [two_groups, scaled_apart], ids=["one bucket", "several"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_given_gradients_are_evaluation_0(backend: str, method: str, base: str, groups: Any, parts: int) -> None:
    """The same bits as ``step(closure)``, one call of the closure less; also where they have been accumulated."""
    given, whole = (Job(method, base, groups, backend, parts) for _ in range(2))
    given.optimizer.closure = given.closure
    for number in range(4):
        if method == "single-file":  # whose step(closure) is given the first ones as it is
            whole.optimizer.zero_grad()
            whole.closure()
        whole.optimizer.step(whole.closure)
        given.optimizer.zero_grad(set_to_none=number % 2 == 0)
        for part in range(parts):
            given.backward(part)
        result = given.optimizer.step()
        assert result is None or method == "single-file"
        assert given.optimizer.evaluation is None
        for a, b in zip(given.state(), whole.state(), strict=True):
            assert torch.equal(a, b)
    assert given.calls == whole.calls - 4


def test_gradients_that_were_clipped_give_the_direction(backend: str) -> None:
    """The first ascent has the length rho whatever a trainer has divided its gradients by."""
    a, b = (Job("sam", "momentum", two_groups, backend) for _ in range(2))
    for job, most in ((a, None), (b, 1e-2)):
        job.optimizer.closure = job.closure
        job.closure()
        if most is not None:
            torch.nn.utils.clip_grad_norm_(job.params, most)
        job.optimizer.step()
    for p, q in zip(a.params, b.params, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-12)


def test_the_closure_may_be_an_argument_and_may_be_taken_away(backend: str) -> None:
    job = Job("sam", "SGD", two_groups, backend)
    optimizer = SAM(None, job.optimizer.base_optimizer, closure=job.closure, backend=backend)
    assert optimizer.closure == job.closure
    job.closure()
    optimizer.step()
    optimizer.closure = None
    job.closure()
    before = job.state()
    with pytest.raises(TypeError, match=r"^closure: expected a function .*optimizer\.closure = "):
        optimizer.step()
    assert all(map(torch.equal, job.state(), before))


@pytest.mark.parametrize("value", [1, "closure", torch.ones(())], ids=str)
def test_a_closure_that_is_no_function(backend: str, value: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    expected = r"^closure: expected a function that runs forward and backward, or None, got "
    with pytest.raises(TypeError, match=expected):
        SAM([p], torch.optim.SGD, lr=0.1, closure=value, backend=backend)
    optimizer = SAM([p], torch.optim.SGD, lr=0.1, backend=backend)
    with pytest.raises(TypeError, match=expected):
        optimizer.closure = value
    with pytest.raises(TypeError, match=r"^closure: expected a function"):
        optimizer.step(value)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "single-file"])
@pytest.mark.parametrize("left", [False, True], ids=["none", "the last step's"])
def test_no_gradients_are_there(backend: str, method: str, left: bool) -> None:
    """Neither are those that the last step has left."""
    job = Job(method, "Adam", two_groups, backend)
    job.optimizer.closure = job.closure
    if left:
        job.closure()
        job.optimizer.step()
    before = job.state()
    with pytest.raises(RuntimeError, match=r"^step\(\): expected gradients of evaluation 0 to be there"):
        job.optimizer.step()
    assert all(map(torch.equal, job.state(), before))


@pytest.mark.parametrize(
    ("name", "value"),
    [("ascent_gradient", "previous"), ("microbatches", 2), ("same_randomness", True), ("ascent_fraction", 0.5)],
)
def test_methods_whose_evaluation_0_cannot_be_given(backend: str, name: str, value: Any) -> None:
    job = Job("lookbehind", "momentum", two_groups, backend, **{name: value})
    job.optimizer.closure = lambda *_: job.closure()
    job.closure()
    before = job.state()
    with pytest.raises(ValueError, match=rf"^{name}: expected .* for a step\(\) without a closure"):
        job.optimizer.step()
    assert all(map(torch.equal, job.state(), before))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("fails", [ValueError, KeyboardInterrupt, None])
def test_a_closure_that_fails_undoes_the_step(backend: str, base: str, fails: Any) -> None:
    """Raises, or runs no backward; and the next step is that of an optimizer to which nothing happened."""
    job, untroubled = (Job("lookbehind", base, two_groups, backend) for _ in range(2))
    for one in (job, untroubled):
        one.optimizer.closure = one.closure
        one.closure()
        one.optimizer.step()

    def closure() -> Tensor | None:
        if job.calls == 5:
            if fails is not None:
                raise fails
            return None
        return job.closure()

    before = job.state()
    job.optimizer.closure = closure
    job.optimizer.zero_grad()
    job.closure()
    with pytest.raises(RuntimeError if fails is None else fails):
        job.optimizer.step()
    assert all(map(torch.equal, job.state(), before))
    job.optimizer.closure = job.closure
    for one in (job, untroubled):
        one.optimizer.zero_grad()
        one.closure()
        one.optimizer.step()
    for a, b in zip(job.state(), untroubled.state(), strict=True):
        assert torch.equal(a, b)


def test_copies_and_pickles_have_no_closure(backend: str) -> None:
    """It would run the original's model; as with torch's hooks."""
    job = Job("lookahead", "momentum", two_groups, backend)
    job.optimizer.closure = lambda: job.closure()
    job.closure()
    job.optimizer.step()
    for other in (copy.deepcopy(job.optimizer), pickle.loads(pickle.dumps(job.optimizer))):
        assert other.closure is None
    assert "closure" not in str(job.optimizer.state_dict()["param_groups"][0].keys())


def test_hooks_run_once_around_it(backend: str) -> None:
    job = Job("sam", "SGD", two_groups, backend)
    seen: list[str] = []
    job.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    job.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    job.optimizer.closure = job.closure
    job.closure()
    job.optimizer.step()
    assert seen == ["before", "after"]


# ---- no gradients at evaluation 0 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", ["step", "evaluations"])
def test_a_minibatch_that_is_skipped_skips_the_step(backend: str, base: str, form: str, accumulated: bool) -> None:
    """Nothing moves, nothing that was there is lost, and the next step is that of an optimizer that was not called."""
    job, untroubled = (Job("lookbehind", base, two_groups, backend) for _ in range(2))
    for one in (job, untroubled):
        one.optimizer.step(one.closure)
        one.optimizer.zero_grad()
    if accumulated:
        job.closure()
    grads = [None if p.grad is None else p.grad.clone() for p in job.params]
    before, values_returned = job.state(), []

    def skipped() -> Any:
        if form == "step":
            values_returned.append(job.optimizer.step(lambda: "nothing to see"))
        else:
            values_returned.extend(evaluation.index for evaluation in job.optimizer.evaluations())

    with pytest.warns(UserWarning, match="evaluation 0 has left no gradients .*: the step was skipped"):
        skipped()
    assert values_returned == ["nothing to see" if form == "step" else 0]
    assert all(map(torch.equal, job.state(), before))
    assert job.optimizer.evaluation is None
    for p, g in zip(job.params, grads, strict=True):
        assert (p.grad is None) == (g is None)
        assert g is None or torch.equal(p.grad, g)
    job.optimizer.zero_grad()
    for one in (job, untroubled):
        one.optimizer.step(one.closure)
    for a, b in zip(job.state(), untroubled.state(), strict=True):
        assert torch.equal(a, b)
