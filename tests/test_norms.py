"""Gradients that are not finite, and gradients of a scaled loss, against the transcription of Algorithm 1."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lookbehind_fused import Lookahead, Lookbehind
from lookbehind_fused.open_step import OpenStep
from tests.conftest import LOW_PRECISION, Duel, assert_close
from tests.test_tensors import RULES

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6}
ALPHAS = {
    "0.3": {"alpha": 0.3},
    "adaptive-global": {"alpha": "adaptive"},
    "adaptive-tensor": {"alpha": "adaptive", "alpha_scope": "tensor"},
}
BROKEN = {  # (step, evaluation), for k = 3
    "none": [],
    "the first ascent": [(0, 0), (1, 0)],
    "the first descent": [(0, 1), (1, 1)],
    "between": [(0, 2), (1, 2)],
    "the last descent": [(0, 3), (1, 3)],
    "all descents": [(0, 1), (0, 2), (0, 3)],
    "everything": [(1, 0), (1, 1), (1, 2), (1, 3)],
}


def groups(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Two of them: each learns from the other's norm that nothing is to move."""
    generator = torch.Generator().manual_seed(3)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return [{"params": [tensor(5, 7), tensor(33)], "rho": 0.2}, {"params": [tensor(3), tensor(1), tensor(2, 3, 4)]}]


def duel(backend: str, dtype: torch.dtype, rule: str, broken: Any, **options: Any) -> Duel:
    options = {"k": 3, "rho": 0.1, "nonfinite": "skip", **options}
    low = dtype in LOW_PRECISION
    return Duel(
        backend, groups(dtype), *RULES[rule], options, broken=broken, curvature=0.0 if low else 1.0,
        form="step" if options.get("reuse_gradient", True) else "evaluations",
    )  # fmt: skip


def run(duel: Duel, dtype: torch.dtype, steps: int = 3) -> None:
    for _ in range(steps):
        duel.step()
        assert all(bool(p.isfinite().all()) for p in duel.params)
        duel.check(TOLERANCE[dtype] * 4)
        duel.synchronise()


@pytest.mark.sample(24)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_evaluation_moves_nothing(backend: str, broken: str, rule: str, alpha: str) -> None:
    """The whole step is undone: neither weights nor state, whichever evaluation it is; the next step is as ever."""
    run(duel(backend, torch.float64, rule, BROKEN[broken], **ALPHAS[alpha]), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("broken", BROKEN)
def test_in_other_dtypes(backend: str, broken: str, dtype: torch.dtype) -> None:
    rule = next(iter(RULES))
    run(duel(backend, dtype, rule, BROKEN[broken], alpha="adaptive", adaptive=True, eta=0.03), dtype, steps=1)


@pytest.mark.sample(16)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("evaluation", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.4}, {"adaptive": True}], ids=str)
def test_with_few_inner_steps(backend: str, k: int, alpha: str, evaluation: int, options: dict[str, Any]) -> None:
    """k = 1 writes the state in place; k = 2 would derive fast_1, had its update not been skipped."""
    for rule in RULES:
        run(duel(backend, torch.float64, rule, [(1, evaluation)], k=k, **ALPHAS[alpha], **options), torch.float64)


@pytest.mark.sample(4)
@pytest.mark.parametrize("evaluation", range(6))
def test_in_the_2k_form(backend: str, evaluation: int) -> None:
    for alpha in ALPHAS.values():
        options = {"reuse_gradient": False, **alpha}
        run(duel(backend, torch.float64, "adam", [(1, evaluation)], **options), torch.float64)


def test_a_single_group(backend: str) -> None:
    """The pass that ascends has found the norm itself."""
    one = Duel(
        backend, groups(torch.float64)[:1], *RULES["adam"], {"k": 3, "alpha": 0.4, "nonfinite": "skip"},
        broken=[(0, 0), (0, 2), (1, 1), (2, 3)],
    )  # fmt: skip
    run(one, torch.float64)


def test_a_base_optimizer_of_its_own_step(backend: str) -> None:
    """RMSprop is not a rule: after a broken gradient its step() is not called, and what it has done is undone."""
    calls: list[int] = []

    class Counted(torch.optim.RMSprop):
        def step(self, closure: Any = None) -> Any:
            calls.append(1)
            return super().step(closure)

    def train(evaluations: list[bool]) -> Tensor:
        p = torch.linspace(-1, 1, 7).requires_grad_()
        optimizer = Lookbehind([p], Counted, lr=0.01, k=2, rho=0.1, nonfinite="skip", backend=backend)
        for evaluation in optimizer.evaluations():
            p.grad = p.detach() + 0.5 if evaluations[evaluation.index] else torch.full_like(p, float("inf"))
        assert optimizer.diagnostics["skipped"] == 1
        assert p.grad is None
        assert not optimizer.state
        return p.detach()

    before = torch.linspace(-1, 1, 7)
    assert torch.equal(train([True, False, False]), before)
    assert calls == []
    assert torch.equal(train([True, True, False]), before)
    assert len(calls) == 1


def test_what_is_propagated(backend: str) -> None:
    """The default: NaN weights, as from the base optimizer alone; nothing is counted."""
    p = torch.ones(3).requires_grad_()
    optimizer = Lookbehind([p], torch.optim.SGD, lr=0.1, backend=backend)
    for _ in optimizer.evaluations():
        p.grad = torch.full_like(p, float("nan"))
    assert bool(p.isnan().all())
    assert optimizer.diagnostics["skipped"] == 0


# ---- loss_scale ------------------------------------------------------------------------------------------------------


@pytest.mark.sample(12)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.4}, {"adaptive": True, "k": 1}], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_scaled_loss_makes_no_difference(backend: str, rule: str, options: dict[str, Any], as_tensor: bool) -> None:
    """Weights, state and the norm in diagnostics, for a scale that changes from step to step."""
    scale = torch.tensor(1024.0) if as_tensor else 1024.0
    one = duel(backend, torch.float64, rule, [(1, 1)], alpha=0.4, loss_scale=scale, **options)
    for now in (1024.0, 3.0, 0.25):
        one.settings["loss_scale"] = now
        if as_tensor:
            scale.fill_(now)
        else:
            one.optimizer.loss_scale = now
        run(one, torch.float64, steps=1)
    one.settings["loss_scale"] = one.optimizer.loss_scale = 1.0
    run(one, torch.float64, steps=1)


def test_a_scaled_loss_for_a_base_of_its_own_step(backend: str) -> None:
    def trained(scale: float) -> Tensor:
        p = torch.linspace(-1, 1, 7).double().requires_grad_()
        options = {"k": 2, "rho": 0.1, "max_grad_norm": 0.3, "loss_scale": scale, "backend": backend}
        optimizer = Lookbehind([p], torch.optim.Adagrad, lr=0.01, **options)
        for _ in optimizer.evaluations():
            p.grad = (p.detach() + 0.5) * scale
        return p.detach()

    assert_close("weights", trained(512.0), trained(1.0), 1e-12)


def test_float16_gradients_that_overflow_are_skipped_until_the_scale_fits(backend: str) -> None:
    """What a GradScaler does, with the optimizer's own count: the scale is halved when an evaluation was skipped."""
    p = torch.full((4,), 2.0, dtype=torch.float16).requires_grad_()
    scale = torch.tensor(2.0**16)
    optimizer = Lookbehind(
        [p], torch.optim.SGD, lr=0.125, rho=0.0, k=1, alpha=1.0, nonfinite="skip", loss_scale=scale, backend=backend
    )

    def closure() -> Tensor:
        loss = 0.5 * p.square().sum()
        (loss * scale.to(loss.dtype)).backward()
        return loss

    skipped = 0
    for _ in range(4):
        optimizer.step(closure)
        now = int(optimizer.diagnostics["skipped"])
        skipped += now
        scale.mul_(0.5 if now else 1.0)
    assert skipped > 0
    assert float(p.detach()[0]) < 2.0
    assert optimizer.diagnostics["skipped"] == 0
    assert_close("grad_norm", optimizer.diagnostics["grad_norm"], 2 * p.detach().double()[0] / (1 - 0.125), 1e-3)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_an_interrupt_behind_the_last_pass_does_not_make_it_happen(
    backend: str, base: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever settles a step then asks for the verdict too."""
    p = torch.linspace(-1, 1, 7).requires_grad_()
    optimizer = Lookbehind([p], base, lr=0.1, momentum=0.9, k=2, rho=0.1, nonfinite="skip", backend=backend)
    lookahead = Lookahead(optimizer, 5)
    before = p.detach().clone()

    def interrupted(step: OpenStep) -> None:  # what comes behind the last passes
        monkeypatch.undo()
        raise KeyboardInterrupt

    def train() -> None:
        for evaluation in lookahead.evaluations():
            p.grad = torch.full_like(p, float("inf") if evaluation.closes else 1.0)

    monkeypatch.setattr(OpenStep, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert torch.equal(p.detach(), before)
    assert lookahead.inner_step == 0
    assert not optimizer.state
    assert p.grad is None
