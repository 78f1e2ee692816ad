"""Steps with a gradient scaler, against a plain loop that unscales, looks and skips by itself."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import SAM, Lookahead, Lookbehind, MultistepSAM, compat, open_step
from tests.conftest import assert_close
from tests.twin import BASES

SCALE = {"init_scale": 2.0**24, "growth_interval": 4}
STEPS = 64
TOLERANCE = 1e-5  # of float32: the roundings of so many steps, of weights down to 0.05
BAD = {(3, 0): torch.inf, (5, 1): torch.nan, (9, 2): torch.inf, (20, 1): -torch.inf, (40, 2): torch.nan}
"""What the loss of a step's evaluation is multiplied by, so that steps overflow at each of theirs."""


class Job:
    """A small network in float16 autocast whose losses are scaled; its minibatch is another one at every step."""

    def __init__(self, scaler: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        layers = nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.model = nn.Sequential(*layers).to(dtype)
        for p in self.model.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).mul(0.3).to(dtype)
        self.params = list(self.model.parameters())
        self.inputs = torch.randn(5, 12, 6, generator=generator, dtype=torch.float64).to(dtype)
        self.targets = torch.randn(5, 12, 3, generator=generator, dtype=torch.float64).to(dtype)
        self.scaler, self.number, self.index = scaler, 0, 0
        self.seen: list[tuple[list[Tensor], list[Tensor]]] = []

    def closure(self) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            outputs = self.model(self.inputs[self.number % 5])
        loss = (outputs.float() - self.targets[self.number % 5]).square().mean()
        factor = BAD.get((self.number, self.index), 1.0)
        self.index += 1
        self.scaler.scale(loss * factor).backward()
        self.seen.append(([p.detach().clone() for p in self.params], [p.grad.clone() for p in self.params]))
        return loss.detach()

    def values(self) -> list[Tensor]:
        return [t.detach().clone() for t in (*self.params, *self.model.buffers())]


# ---- the forms of a step ---------------------------------------------------------------------------------------------


def by_scaler(job: Job, optimizer: Any) -> None:
    job.scaler.step(optimizer, job.closure)


def by_optimizer(job: Job, optimizer: Any) -> None:
    optimizer.step(job.closure)


def given_to_scaler(job: Job, optimizer: Any) -> None:
    optimizer.closure = job.closure
    optimizer.zero_grad()
    job.closure()
    job.scaler.step(optimizer)


def given_unscaled(job: Job, optimizer: Any) -> None:
    optimizer.closure = job.closure
    optimizer.zero_grad()
    job.closure()
    job.scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(job.params, 1e6)
    job.scaler.step(optimizer)


def in_a_loop(job: Job, optimizer: Any) -> None:
    for _ in optimizer.evaluations():
        job.closure()


def in_pairs(job: Job, optimizer: Any) -> None:
    for _ in range(getattr(optimizer, "k_steps", getattr(optimizer, "k", 1))):
        job.model.zero_grad()
        job.closure()
        optimizer.ascent_step()
        job.model.zero_grad()
        job.closure()
        optimizer.descent_step()


def in_halves(job: Job, optimizer: Any) -> None:
    optimizer.zero_grad()
    job.closure()
    optimizer.first_step(zero_grad=True)
    job.closure()
    optimizer.second_step()


def after_a_backward(job: Job, optimizer: Any) -> None:
    optimizer.zero_grad()
    job.closure()
    job.scaler.step(optimizer, job.closure)


Make = Callable[..., Any]
LOOKBEHIND: Make = lambda job, base, **o: Lookbehind(job.params, base, k=2, alpha=0.4, **o)  # noqa: E731
SAM_1: Make = lambda job, base, **o: SAM(job.params, base, **o)  # noqa: E731
# name: what steps, what makes the optimizer, and (k, alpha, whether gradients are reused) of the plain loop
FORMS: dict[str, tuple[Callable[[Job, Any], None], Make, tuple[int, float, bool]]] = {
    "scaler.step(optimizer, closure)": (by_scaler, LOOKBEHIND, (2, 0.4, True)),
    "optimizer.step(closure)": (by_optimizer, LOOKBEHIND, (2, 0.4, True)),
    "scaler.step(optimizer)": (given_to_scaler, LOOKBEHIND, (2, 0.4, True)),
    "unscale_": (given_unscaled, LOOKBEHIND, (2, 0.4, True)),
    "evaluations": (in_a_loop, LOOKBEHIND, (2, 0.4, True)),
    "pairs": (in_pairs, LOOKBEHIND, (2, 0.4, False)),
    "SAM": (by_scaler, SAM_1, (1, 1.0, True)),
    "SAM in halves": (in_halves, SAM_1, (1, 1.0, True)),
    "single-file in halves": (
        in_halves,
        lambda job, base, **o: compat.SingleFileSAM(job.params, base, **o),
        (1, 1.0, True),
    ),
    "single-file with a closure": (
        after_a_backward,
        lambda job, base, **o: compat.SingleFileSAM(job.params, base, **o),
        (1, 1.0, True),
    ),
    "authors": (
        in_pairs,
        lambda job, base, rho, scaler, backend, **o: compat.LookbehindSAM(
            base(job.params, **o), job.model, rho=rho, k_steps=2, alpha=0.4, scaler=scaler, backend=backend
        ),
        (2, 0.4, False),
    ),
    "Lookahead": (
        by_scaler,
        lambda job, base, **o: Lookahead(SAM(job.params, base, **o), 1, 0.4),
        (1, 0.4, True),
    ),
}


class Plain:
    """The same in float64, written out: algorithm 1 around a torch optimizer, each gradient unscaled and looked at.

    Its gradients are those that the job has found at the points that this loop gets to, since at points that differ by
    a rounding float16 weights may differ by 1e-3.
    """

    def __init__(
        self, job: Job, base: type[torch.optim.Optimizer], k: int, alpha: float, reuse: bool, **settings: Any
    ) -> None:
        self.job, self.k, self.alpha, self.reuse = job, k, alpha, reuse
        self.fast = [p.detach().double().requires_grad_() for p in job.params]
        self.base = base(self.fast, **settings)
        self.scale, self.good = SCALE["init_scale"], 0

    def gradient(self, weights: list[Tensor]) -> list[Tensor]:
        points, scaled = self.job.seen.pop(0)
        for point, w in zip(points, weights, strict=True):
            assert_close("point of an evaluation", point.double(), w, TOLERANCE)
        grads = [g.double() / self.scale for g in scaled]
        if not all(bool(g.isfinite().all()) for g in grads):
            raise OverflowError
        return grads

    def step(self, rho: float) -> bool:
        """Whether it happens."""
        slow, state = [w.detach().clone() for w in self.fast], copy.deepcopy(self.base.state_dict())
        try:
            perturbed = slow
            g = self.gradient(perturbed)
            for i in range(self.k):
                norm = sum(float(x.square().sum()) for x in g) ** 0.5
                perturbed = [w + rho * x / norm for w, x in zip(perturbed, g, strict=True)]
                g = self.gradient(perturbed)
                for w, x in zip(self.fast, g, strict=True):
                    w.grad = x
                self.base.step()
                if not self.reuse and i + 1 < self.k:
                    g = self.gradient(perturbed)
            new = [s + self.alpha * (f.detach() - s) for s, f in zip(slow, self.fast, strict=True)]
            self.good += 1
        except OverflowError:
            new, self.scale, self.good = slow, self.scale / 2, 0
            self.base.load_state_dict(state)
            happened = False
        else:
            happened = True
            if self.good == SCALE["growth_interval"]:
                self.scale, self.good = self.scale * 2, 0
        for w, x in zip(self.fast, new, strict=True):
            w.data.copy_(x)
        return happened


@pytest.mark.sample(20)
@pytest.mark.parametrize("base", ["momentum", "AdamW", "RMSprop", "Lister"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_step_is_the_plain_loop(backend: str, form: str, base: str) -> None:
    """64 steps: the same ones overflow, which move nothing, bit by bit; the others have the plain loop's weights and
    state; and the scale goes the plain loop's way.
    """
    step, make, (k, alpha, reuse) = FORMS[form]
    kind, settings = BASES[base]
    job = Job(torch.amp.GradScaler("cpu", **SCALE))
    optimizer = make(job, kind, rho=0.1, scaler=job.scaler, backend=backend, **settings)
    plain = Plain(job, kind, k, alpha, reuse, **settings)
    inner = getattr(getattr(optimizer, "optimizer", optimizer), "base_optimizer", None) or optimizer.base_optimizer
    happened = []
    for job.number in range(STEPS):
        job.index = 0
        job.seen.clear()
        assert job.scaler.get_scale() == plain.scale, job.number
        before, state = job.values(), copy.deepcopy(inner.state_dict()["state"])
        step(job, optimizer)
        job.scaler.update()
        happened.append(plain.step(0.1))
        for p, w in zip(job.params, plain.fast, strict=True):
            assert_close(f"weights after step {job.number}", p.detach().double(), w.detach(), TOLERANCE)
            for key, value in plain.base.state[w].items():
                assert_close(
                    f"{key} after step {job.number}", *map(torch.as_tensor, (inner.state[p][key], value)), 1e-6
                )
        if not happened[-1]:
            assert all(map(torch.equal, job.params, before))
            assert_same(inner.state_dict()["state"], state)
            if form not in ("scaler.step(optimizer)", "unscale_"):  # else the scaler does not call a step at all
                assert all(p.grad is None for p in job.params)
    assert happened.count(False) >= 10
    assert all(happened[number] is False for number, index in BAD if index < (k + 1 if reuse else 2 * k))


def assert_same(a: dict[int, dict[str, Any]], b: dict[int, dict[str, Any]]) -> None:
    values = [{(i, k): v for i, entry in state.items() for k, v in entry.items()} for state in (a, b)]
    assert values[0].keys() == values[1].keys()
    for key, value in values[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(values[1][key])), key


# ---- exactness -------------------------------------------------------------------------------------------------------


class Straight(Job):
    """Without autocast, so that a scale that is a power of two changes no bit."""

    def closure(self) -> Tensor:
        loss = (self.model(self.inputs[self.number % 5]) - self.targets[self.number % 5]).square().mean()
        self.scaler.scale(loss).backward()
        return loss.detach()


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", ["momentum", "AdamW", "RMSprop"])
def test_a_scale_of_a_power_of_two_changes_no_bit(
    backend: str, base: str, form: str, max_grad_norm: float | None
) -> None:
    """Of float32, and a scaler that is disabled is none."""
    if form in ("unscale_", "authors") and max_grad_norm is not None:
        pytest.skip("a form of the same passes")
    step, make, _ = FORMS[form]
    kind, settings = BASES[base]
    options = {} if max_grad_norm is None else {"max_grad_norm": max_grad_norm}
    results = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**10), torch.amp.GradScaler("cpu", enabled=False)):
        job = Straight(scaler)
        optimizer = make(job, kind, rho=0.1, scaler=scaler, backend=backend, **options, **settings)
        for number in range(3):
            job.number = number
            step(job, optimizer)
            scaler.update()
        results.append([*job.values(), optimizer.diagnostics["grad_norm"].float()])
    for scaled, unscaled in zip(*results, strict=True):
        assert torch.equal(scaled, unscaled)


@pytest.fixture(params=["host", "device"])
def decided_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who knows whether a gradient is finite: on GPUs the device alone, where the base is fused. As if so on CPUs."""
    if request.param == "device":
        monkeypatch.setattr(open_step, "on_host", lambda buckets, own_step: own_step is not None)
    return request.param


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("base", ["momentum", "AdamW", "RMSprop"])
def test_an_overflow_undoes_the_whole_step(backend: str, base: str, at: int, decided_by: str) -> None:
    """Weights, state and buffers; in the middle of training too; and of one step alone the scaler learns."""
    kind, settings = BASES[base]
    job = Job(torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2))
    options = {"rho": 0.1, "buffers_at_slow": job.model, "scaler": job.scaler, "backend": backend}
    optimizer = LOOKBEHIND(job, kind, **options, **settings)
    number = next(number for number, index in BAD if index == at)
    scales = []
    for now in (0, 1, number, 2, 4):
        job.number, job.index = now, 0
        before, state = job.values(), copy.deepcopy(optimizer.base_optimizer.state_dict()["state"])
        job.scaler.step(optimizer, job.closure)
        job.scaler.update()
        scales.append(job.scaler.get_scale())
        assert optimizer.diagnostics["skipped"] == (now == number)
        if now == number:
            assert all(map(torch.equal, job.values(), before))
            assert_same(optimizer.base_optimizer.state_dict()["state"], state)
            assert all(p.grad is None for p in job.params)
            early = decided_by == "host" or base == "RMSprop"
            assert job.index == (at + 1 if early else 3)
        else:
            assert not any(map(torch.equal, job.values()[:2], before[:2]))
    assert scales == [16.0, 32.0, 16.0, 16.0, 32.0]


def test_scales_are_those_of_plain_sgd_under_the_same_overflows(backend: str) -> None:
    """Where the loss is linear, a step overflows at evaluation 0 or not at all, and so for both."""
    trajectories = []
    for make in (
        lambda p, scaler: torch.optim.SGD([p], lr=0.01),
        lambda p, scaler: SAM([p], torch.optim.SGD, lr=0.01, scaler=scaler, backend=backend),
        lambda p, scaler: MultistepSAM([p], torch.optim.SGD, k=3, lr=0.01, scaler=scaler, backend=backend),
    ):
        p = torch.ones(4).requires_grad_()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
        optimizer, scales = make(p, scaler), []
        for number in range(40):

            def closure(p: Tensor = p, scaler: Any = scaler, factor: float = 1.0 + number % 7) -> Tensor:
                loss = (p * factor).sum()
                scaler.scale(loss).backward()
                return loss.detach()

            if isinstance(optimizer, Lookbehind):
                scaler.step(optimizer, closure)
            else:
                optimizer.zero_grad()
                closure()
                scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        trajectories.append(scales)
    assert len(set(trajectories[0])) > 2
    assert trajectories[0] == trajectories[1] == trajectories[2]


@pytest.mark.parametrize("scale", [torch.inf, torch.nan])
def test_a_scale_that_is_not_finite_undoes_the_step(backend: str, scale: float, decided_by: str) -> None:
    p = torch.ones(3).requires_grad_()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = SAM([p], torch.optim.SGD, lr=0.1, scaler=scaler, backend=backend)
    scaler._scale.fill_(scale)
    for _ in optimizer.evaluations():
        p.grad = torch.ones(3)  # which this scale has not given
    assert torch.equal(p.detach(), torch.ones(3))
    assert optimizer.diagnostics["skipped"] == 1
    assert decided_by


def test_two_optimizers_share_a_scaler(backend: str) -> None:
    """torch's pattern of GANs: either may overflow alone, and the scale is halved once."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    first, second = Job(scaler), Job(scaler, seed=1)
    optimizers = [SAM(job.params, torch.optim.SGD, lr=0.1, scaler=scaler, backend=backend) for job in (first, second)]
    for number in (0, 3, 1):
        first.number, second.number, first.index, second.index = number, number, 0, 3  # 3 is never bad
        before = first.values(), second.values()
        for job, optimizer in zip((first, second), optimizers, strict=True):
            scaler.step(optimizer, job.closure)
        scaler.update()
        for job, was, moves in zip((first, second), before, (number != 3, True), strict=True):
            assert any(not torch.equal(a, b) for a, b in zip(job.params, was, strict=False)) == moves
    assert scaler.get_scale() == 2.0**9


def test_lookahead_does_not_count_a_step_that_overflows(backend: str, decided_by: str) -> None:
    job = Job(torch.amp.GradScaler("cpu", init_scale=16.0))
    lookahead = Lookahead(SAM(job.params, torch.optim.SGD, lr=0.1, scaler=job.scaler, backend=backend), 3)
    counts = []
    for number in (0, 3, 1, 5, 2, 4):
        job.number, job.index = number, 0
        job.scaler.step(lookahead, job.closure)
        job.scaler.update()
        counts.append(lookahead.inner_step)
    assert counts == [1, 1, 2, 2, 0, 1]
    assert decided_by


def test_diagnostics_are_free_of_the_scale(backend: str) -> None:
    """In every form, unscaled by whomever."""
    for form, (step, make, _) in FORMS.items():
        job = Straight(torch.amp.GradScaler("cpu", init_scale=512.0))
        optimizer = make(job, torch.optim.SGD, rho=0.1, scaler=job.scaler, backend=backend, lr=0.1)
        other = Straight(torch.amp.GradScaler("cpu", enabled=False))
        other.closure()
        norm = sum(float(p.grad.double().square().sum()) for p in other.params) ** 0.5
        step(job, optimizer)
        assert float(optimizer.diagnostics["grad_norm"]) == pytest.approx(norm, rel=1e-6), form


# ---- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.0, "scaler", torch.ones(()), []], ids=str)
def test_a_scaler_that_is_none(backend: str, value: Any) -> None:
    p = torch.ones(3).requires_grad_()
    with pytest.raises(TypeError, match=r"^scaler: expected a torch\.amp\.GradScaler or None, got "):
        SAM([p], torch.optim.SGD, lr=0.1, scaler=value, backend=backend)
    optimizer = SAM([p], torch.optim.SGD, lr=0.1, backend=backend)
    with pytest.raises(TypeError, match=r"^scaler: expected a torch\.amp\.GradScaler or None, got "):
        optimizer.scaler = value
    assert optimizer.scaler is None


@pytest.mark.parametrize("form", ["closure", "given", "by none"])
def test_another_scaler_is_refused(backend: str, form: str) -> None:
    """It has scaled by its own scale, and would not hear of an overflow; a copy of the optimizer has such a one."""
    job = Job(torch.amp.GradScaler("cpu", init_scale=2.0**16))
    job.scaler.scale(torch.ones(()))
    own = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = SAM(job.params, torch.optim.SGD, lr=0.1, scaler=own, backend=backend)
    before = job.values()
    if form == "closure":
        with pytest.raises(RuntimeError, match="^scaler: expected the GradScaler whose step.. calls .* got another"):
            job.scaler.step(optimizer, job.closure)
        assert job.index == 0
    else:
        optimizer.closure = job.closure
        job.closure()
        with pytest.raises(RuntimeError, match=r"^step\(\): expected to be called by scaler\.step\(optimizer\)"):
            optimizer.step() if form == "by none" else job.scaler.step(optimizer)
        assert job.index == 1
    assert all(map(torch.equal, job.params, before))
    disabled = SAM(
        job.params, torch.optim.SGD, lr=0.1, scaler=torch.amp.GradScaler("cpu", enabled=False), backend=backend
    )
    other = torch.amp.GradScaler("cpu")
    other.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="got one that is disabled"):
        other.step(disabled, job.closure)
    assert all(map(torch.equal, job.params, before))


def test_a_scaler_is_not_changed_inside_a_step(backend: str) -> None:
    p = torch.ones(3).requires_grad_()
    optimizer = SAM([p], torch.optim.SGD, lr=0.1, backend=backend)
    p.grad = torch.ones(3)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"^scaler: expected no open step"):
        optimizer.scaler = torch.amp.GradScaler("cpu")
    optimizer.second_step()


def test_its_scale_is_there_from_the_beginning(backend: str) -> None:
    """A ``GradScaler`` makes it at the first loss; ``scaler.step(optimizer, closure)`` asks for it before."""
    p = torch.ones(3).requires_grad_()
    for late in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer = SAM([p], torch.optim.SGD, lr=0.1, scaler=None if late else scaler, backend=backend)
        if late:
            optimizer.scaler = scaler

        def closure(scaler: Any = scaler) -> Tensor:
            scaler.scale(p.sum()).backward()
            return p.sum().detach()

        scaler.step(optimizer, closure)
        scaler.update()


def test_a_second_step_before_update_is_refused(backend: str) -> None:
    """Before anything moves, as ``GradScaler.step`` does it."""
    job = Job(torch.amp.GradScaler("cpu", init_scale=16.0))
    optimizer = SAM(job.params, torch.optim.SGD, lr=0.1, scaler=job.scaler, backend=backend)
    optimizer.step(job.closure)
    before = job.values()
    with pytest.raises(RuntimeError, match=r"^scaler: expected scaler\.update\(\) after each step"):
        optimizer.step(job.closure)
    assert all(map(torch.equal, job.values(), before))
    job.scaler.update()
    optimizer.step(job.closure)
    job.scaler.update()


def test_a_step_that_failed_may_be_tried_again_at_once(backend: str) -> None:
    """What fails is not told to the scaler."""
    job = Job(torch.amp.GradScaler("cpu", init_scale=16.0))
    optimizer = SAM(job.params, torch.optim.SGD, lr=0.1, scaler=job.scaler, backend=backend)

    def fails() -> Tensor:
        if job.index == 1:
            raise ValueError("out of data")
        return job.closure()

    before = job.values()
    with pytest.raises(ValueError, match="out of data"):
        optimizer.step(fails)
    assert all(map(torch.equal, job.params, before))
    optimizer.step(job.closure)
    job.scaler.update()
    assert optimizer.diagnostics["skipped"] == 0


def test_unscaling_between_two_halves_is_refused(backend: str) -> None:
    """Those gradients would be unscaled twice."""
    job = Job(torch.amp.GradScaler("cpu", init_scale=16.0))
    optimizer = SAM(job.params, torch.optim.SGD, lr=0.1, scaler=job.scaler, backend=backend)
    before = job.values()
    job.closure()
    optimizer.first_step(zero_grad=True)
    job.closure()
    job.scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"^evaluation 1: expected gradients as scaler\.scale\(loss\) gives them"):
        optimizer.second_step()
    assert all(map(torch.equal, job.params, before))


def test_a_minibatch_without_a_backward_is_no_overflow(backend: str) -> None:
    p = torch.ones(3).requires_grad_()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    optimizer = SAM([p], torch.optim.SGD, lr=0.1, scaler=scaler, backend=backend)
    with pytest.warns(UserWarning, match="evaluation 0 has left no gradients"):
        scaler.step(optimizer, lambda: None)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert torch.equal(p.detach(), torch.ones(3))


def test_copies_and_pickles_have_the_scaler(backend: str) -> None:
    """A copy that did not would use scaled gradients as they are."""
    for way in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        job = Job(torch.amp.GradScaler("cpu", init_scale=16.0))
        optimizer = SAM(job.params, torch.optim.SGD, lr=0.1, scaler=job.scaler, closure=job.closure, backend=backend)
        optimizer.step(job.closure)
        job.scaler.update()
        other, scaler, model = way((optimizer, job.scaler, job.model))
        assert other.closure is None
        assert other.scaler is scaler is not job.scaler
        assert scaler.get_scale() == 16.0
        for one, with_scaler, of_model in ((optimizer, job.scaler, job.model), (other, scaler, model)):
            job.scaler, job.model, job.params, job.index = with_scaler, of_model, list(of_model.parameters()), 0
            with_scaler.step(one, job.closure)  # before any other use of it
            with_scaler.update()
        (of_one,), (of_other,) = (group["params"][:1] for o in (optimizer, other) for group in o.param_groups)
        assert torch.equal(of_one, of_other)
        assert of_one is not of_other


def test_grad_scale_is_loss_scale_now(backend: str) -> None:
    """``GradScaler`` writes and deletes an attribute of the old name."""
    p = torch.ones(3).requires_grad_()
    with pytest.warns(DeprecationWarning, match="loss_scale"):
        optimizer = SAM([p], torch.optim.SGD, lr=0.1, grad_scale=4.0, backend=backend)
    assert optimizer.loss_scale == 4.0
    optimizer.grad_scale = 8.0

    def closure() -> None:
        p.grad = torch.full((3,), 8.0)

    with pytest.warns(DeprecationWarning, match="loss_scale"):
        optimizer.step(closure)
    assert optimizer.loss_scale == 8.0
    assert_close("weights", p.detach(), torch.full((3,), 0.9), 1e-6)
