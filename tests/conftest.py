"""What every test shares: the backends, seeds, poisoned memory, and the ways to drive a step and to compare."""

import itertools
import os
import random
import signal
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lookbehind_fused import Lookbehind
from tests.algorithm1 import Formulas, Gradients, algorithm1
from tests.compare import LOW_PRECISION, assert_equal, scaled_error
from tests.sampling import (  # noqa: F401  pytest looks for hooks here
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_configure_node,
    pytest_sessionstart,
)

BACKENDS = os.environ.get("LOOKBEHIND_TEST_BACKENDS", "reference native").split()
"""Every test that takes the fixture ``backend`` runs on each of these."""


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Name of the backend that the test gives to ``Lookbehind``."""
    return request.param


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Processes that tests start can be interrupted, also where a shell has started this one in the background: such
    ignore SIGINT, and so does what they start.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    """Seeds, one thread, and NaN in all fresh memory, so that a buffer which is read before it is written shows.

    One thread: the tensors here are small, and test processes that run side by side would only fight over the cores.
    Tests of the thread count set it themselves.
    """
    random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filling
    torch.set_num_threads(threads)


def drive(optimizer: Any, form: str, evaluate: Callable[[int], Tensor], k: int) -> Tensor:
    """One outer step in one of the three forms; ``evaluate(index)`` leaves gradients and returns a loss.

    Returns the loss of evaluation 0.
    """
    if form == "step":
        counter = itertools.count()
        return optimizer.step(lambda *_: evaluate(next(counter)))
    losses = []
    if form == "evaluations":
        for evaluation in optimizer.evaluations():
            losses.append(evaluate(evaluation.index))
    elif form == "pairs":
        for i in range(k):
            optimizer.zero_grad()
            losses.append(evaluate(2 * i))
            optimizer.ascent_step()
            optimizer.zero_grad()
            losses.append(evaluate(2 * i + 1))
            optimizer.descent_step()
    else:
        raise ValueError(f"unknown form {form!r}")
    return losses[0]


def error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected| over one tensor: 0 for equal, inf where it is not a number."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = (actual - expected).abs().max().item() if actual.numel() else 0.0
    if difference == 0.0:
        return 0.0
    size = expected.abs().max().item()
    return difference / size if size > 0 and difference < float("inf") else float("inf")


def assert_close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """``error`` must not exceed ``tolerance``."""
    found = error(actual, expected)
    assert found <= tolerance, f"{what}: {found:.2e} > {tolerance:.0e}\n{actual}\n{expected}"


def assert_torchs_weights(
    backend: str,
    base: type[torch.optim.Optimizer],
    ours: list[Tensor],
    theirs: list[Tensor],
    before: list[Tensor],
    updates: int = 1,
) -> None:
    """``ours`` are the weights that torch's ``base`` gives from the same weights ``before``: to the last bit.

    But for Adam and AdamW on native. torch.sqrt on the CPU is off by a unit in the last place in many numbers, ours is
    rounded correctly. An update goes through that root, two divisions, a sum and a product: four units in its last
    place, and then one in the weight's, for each of ``updates``. ``theirs`` are then set to ``ours``, so that the next
    gradients are the same and the state, which the root has no part in, stays comparable bit for bit.
    """
    rounds_otherwise = backend == "native" and base in (torch.optim.Adam, torch.optim.AdamW)
    for i, (p, q, w) in enumerate(zip(ours, theirs, before, strict=True)):
        if not rounds_otherwise:
            assert_equal(f"weights of tensor {i}", p.detach(), q.detach())
            continue
        eps = torch.finfo(q.dtype).eps
        with torch.no_grad():
            bound = updates * eps * (4 * (q - w).abs() + torch.maximum(q.abs(), w.abs()))
            assert p.dtype == q.dtype
            beyond = ~((p - q).abs() <= bound)
            assert not bool(beyond.any()), f"weights of tensor {i}: {int(beyond.sum())} of {q.numel()}\n{p}\n{q}"
            q.copy_(p)


def assert_same_state(actual: Any, expected: Any, what: str = "state") -> None:
    """Two nested ``state_dict`` are the same to the last bit, keys and types included."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), what
        assert_equal(what, actual, expected)
    elif isinstance(expected, dict):
        assert isinstance(actual, dict), what
        assert set(actual) == set(expected), what
        for key in expected:
            assert_same_state(actual[key], expected[key], f"{what}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), what
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same_state(a, e, f"{what}[{i}]")
    else:
        assert actual == expected, what


def assert_state(optimizer: Any, params: list[Tensor], expected: list[dict[str, Any]], tolerance: float) -> float:
    """The base optimizer's state of every parameter has exactly the expected entries, each within ``tolerance``.

    Returns the largest error.
    """
    worst = 0.0
    for i, (p, entries) in enumerate(zip(params, expected, strict=True)):
        found = dict(optimizer.base_optimizer.state.get(p, {}))
        assert set(found) == set(entries), f"state of tensor {i}"
        for key, value in entries.items():
            value = torch.as_tensor(value, dtype=torch.float64)
            actual = torch.as_tensor(found[key])
            assert_close(f"{key} of tensor {i}", actual, value, tolerance)
            worst = max(worst, error(actual, value))
    return worst


class Duel:
    """The library and the transcription on the same tensors, with gradients that are a formula of the weights.

    Args:
        groups: parameter groups with ``params`` and what is their own: rho, adaptive, eta, the base's settings.
        base: torch's class and the formula.
        hyper: settings of the base optimizer, for all groups.
        options: of ``Lookbehind``, beside ``backend``.
        oracle_dtype: the transcription works on tensors of this dtype instead of the parameters' own.
        arithmetic: see ``algorithm1``.
        curvature: how much the gradient depends on the weights; 0 takes rounding of the weights out of the comparison.
        missing: (step, evaluation, tensor) for each gradient that is None.
        broken: (step, evaluation) of which the last tensor's gradient has a NaN.
        gradient_layout: makes the tensor that is put into ``.grad`` out of (tensor number, gradient).
    """

    def __init__(
        self,
        backend: str,
        groups: list[dict[str, Any]],
        base: tuple[type[torch.optim.Optimizer], Callable[..., Tensor]],
        hyper: dict[str, Any],
        options: dict[str, Any],
        *,
        form: str = "step",
        oracle_dtype: torch.dtype | None = None,
        arithmetic: torch.dtype | None = None,
        curvature: float = 1.0,
        missing: Collection[tuple[int, int, int]] = (),
        broken: Collection[tuple[int, int]] = (),
        gradient_layout: Callable[[int, Tensor], Tensor] = lambda i, g: g,
        seed: int = 0,
    ) -> None:
        self.params = [p for group in groups for p in group["params"]]
        own = [{k: v for k, v in group.items() if k != "params"} for group in groups for _ in group["params"]]
        generator = torch.Generator().manual_seed(seed)
        self.curvature = [
            curvature * (0.2 + torch.rand(p.shape, generator=generator, dtype=torch.float64)) for p in self.params
        ]
        self.slope = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in self.params]
        self.form, self.missing, self.broken, self.gradient_layout = form, set(missing), set(broken), gradient_layout
        self.optimizer = Lookbehind(groups, base[0], backend=backend, **options, **hyper)

        self.oracle_dtype = oracle_dtype
        self.settings: dict[str, Any] = {
            "k": options["k"],
            "alpha": options["alpha"],
            "scope": options.get("alpha_scope", "global"),
            "reuse": options.get("reuse_gradient", True),
            "max_grad_norm": options.get("max_grad_norm"),
            "nonfinite": options.get("nonfinite", "propagate"),
            "loss_scale": float(options.get("loss_scale", 1.0)),
            "arithmetic": arithmetic,
        }
        for name, default in {"rho": 0.05, "adaptive": False, "eta": 0.01}.items():
            self.settings[name] = [mine.pop(name, options.get(name, default)) for mine in own]
        self.base = Formulas(base[1], [{**hyper, **mine} for mine in own], len(own))
        self.steps = 0
        self.synchronise()

    def synchronise(self) -> None:
        """Give the transcription the library's weights: the next step starts from the same point."""
        self.expected = [p.detach().clone().to(self.oracle_dtype or p.dtype) for p in self.params]

    def gradient(self, w: Tensor, i: int, index: int) -> Tensor | None:
        """Gradient of tensor i at w: linear in w, other at every evaluation of every step, in the dtype of w."""
        if (self.steps, index, i) in self.missing:
            return None
        phase = 1 + 0.25 * ((3 * self.steps + 2 * index + i) % 5)
        g = self.curvature[i].to(w.dtype) * w + phase * self.slope[i].to(w.dtype)
        g = g * self.settings["loss_scale"]
        if (self.steps, index) in self.broken and i == len(self.params) - 1:
            g.view(-1)[-1] = float("nan")
        return g

    def step(self) -> None:
        """One outer step on both sides. ``points`` and ``expected_points``: the weights at each evaluation."""
        self.points: list[list[Tensor]] = []
        self.expected_points: list[list[Tensor]] = []

        def evaluate(index: int) -> Tensor:
            self.points.append([p.detach().clone() for p in self.params])
            for i, p in enumerate(self.params):
                assert p.grad is None, "each evaluation starts from cleared gradients"
                g = self.gradient(p.detach(), i, index)
                if g is not None:
                    p.grad = self.gradient_layout(i, g)
            return torch.zeros(())

        def gradient(points: list[Tensor], index: int) -> Gradients:
            self.expected_points.append(points)
            return [self.gradient(w, i, index) for i, w in enumerate(points)]

        drive(self.optimizer, self.form, evaluate, self.optimizer.k)
        evaluations = range(len(self.points))
        self.took_part = [
            i for i in range(len(self.params)) if any((self.steps, e, i) not in self.missing for e in evaluations)
        ]
        self.outcome = algorithm1(self.expected, gradient, self.base, **self.settings)
        self.expected = self.outcome.params
        self.steps += 1

    def _alphas(self) -> tuple[Tensor, Tensor]:
        """Found and expected alpha; by tensor only of those that had a gradient in the step."""
        found = self.optimizer.diagnostics["alpha"]
        expected = torch.tensor(self.outcome.alpha, dtype=torch.float64)
        assert found.shape == expected.shape
        found, expected = found.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0)  # of a step that was undone
        if found.ndim == 0:
            return found, expected
        return found[self.took_part], expected[self.took_part]

    def check(self, tolerance: float) -> dict[str, float]:
        """Compare weights, the points of every evaluation, state and diagnostics; the largest error of each.

        An error is max |actual - expected| / max(1, max |expected|): weights and gradients here are of the size of one.
        Weights of 16 bits may also be a unit in the last place apart, if a rounding boundary lies between the two.
        """
        if self.outcome.skipped and self.form == "pairs":  # which has the caller evaluate the rest
            del self.points[len(self.expected_points) :]
        assert len(self.points) == len(self.expected_points)
        errors: dict[str, float] = {}

        def compare(what: str, actual: Tensor, expected: Tensor, bound: float) -> None:
            found = scaled_error(actual, expected)
            assert found <= bound, f"{what}: {found:.2e} > {bound:.0e}"
            kind = what.split()[0]
            errors[kind] = max(errors.get(kind, 0.0), found)

        for i, p in enumerate(self.params):
            bound = torch.finfo(p.dtype).eps if p.dtype in LOW_PRECISION else tolerance
            compare(f"weights of tensor {i}", p, self.expected[i], bound)
            for e, (points, expected_points) in enumerate(zip(self.points, self.expected_points, strict=True)):
                compare(f"points of tensor {i} at evaluation {e}", points[i], expected_points[i], bound)
            found = dict(self.optimizer.base_optimizer.state.get(p, {}))
            entries = self.base.state[i]
            assert set(found) == set(entries) or (self.broken and not entries), f"state of tensor {i}"
            for key in found.keys() - entries.keys():  # all of its updates were skipped
                assert not torch.as_tensor(found[key]).any(), f"{key} of tensor {i}"
            for key in entries:
                compare(
                    f"state {key} of tensor {i}", torch.as_tensor(found[key]), torch.as_tensor(entries[key]), tolerance
                )
        grad_norm = torch.tensor(self.outcome.grad_norm, dtype=torch.float64)
        found = self.optimizer.diagnostics["grad_norm"]
        if grad_norm.isnan():
            assert found.isnan()
        else:
            compare("grad_norm", found, grad_norm, tolerance)
        assert self.optimizer.diagnostics["skipped"] == self.outcome.skipped
        # alpha comes from displacements, in which the rounding of the weights is magnified
        compare("alpha", *self._alphas(), tolerance * (1 + 1 / self.outcome.displacement))
        return errors
