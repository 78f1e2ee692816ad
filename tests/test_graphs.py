"""Captured steps: what is refused on any machine, and, by a double of CUDA's graphs, what a replay does."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lookbehind_fused import Lookbehind, graphs
from tests.conftest import assert_equal
from tests.kernels import graphed
from tests.kernels.cuda_build import missing
from tests.kernels.mutants import MISSING
from tests.kernels.test_triton import run
from tests.sampling import sample


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", graphed.table(""))
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_replays_are_the_steps_that_they_replace(backend: str, case: str) -> None:
    """Replay, replay, an eager step with another minibatch, replay, another lr: bit for bit as eager steps. Within a
    captured step the optimizer allocates nothing, uploads nothing and waits for nothing.
    """
    wanted = MISSING if backend == "triton" else missing()
    if wanted:
        pytest.skip(f"needs {wanted}")
    alone = [] if backend == "triton" or sample.everything else ["--alone"]
    printed = run(f"tests.kernels.{backend}_cases", "sm90", *alone, "--graphed", case)
    assert re.search(r"^[1-9]\d* cases, 0 failed$", printed, re.MULTILINE)


def closure() -> None:
    raise AssertionError("is not to be called")


@pytest.mark.parametrize(
    ("settings", "kind", "match"),
    [
        ({}, "cuda", r"graphed\(\): expected parameters on one CUDA device, got cpu; call step\(closure\)"),
        ({}, "cpu", "backend: expected 'triton' or 'cuda' for graphed.*, got 'native'"),
        ({"same_randomness": True}, "cpu", "same_randomness: expected False for graphed.*, got True"),
        ({"ascent_gradient": "previous"}, "cpu", "ascent_gradient: expected 'current' for graphed.*, got 'previous'"),
        ({"base": torch.optim.RMSprop}, "cpu", "base_optimizer: expected SGD, Adam or AdamW .*, got RMSprop"),
        ({"hook": True}, "cpu", r"graphed\(\): expected no weights hook"),
    ],
)
def test_what_cannot_be_captured_is_refused(
    settings: dict[str, Any], kind: str, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs.Graph, "KIND", kind)
    settings = {"base": torch.optim.SGD, "hook": False, **settings}
    p = nn.Parameter(torch.ones(3))
    base, hook = settings.pop("base"), settings.pop("hook")
    optimizer = Lookbehind([p], base, lr=0.1, backend="native", **settings)
    if kind == "cpu" and "backend" not in match:
        monkeypatch.setattr("lookbehind_fused.kernels.native.SCALARS_ON_DEVICE", True)
    if hook:
        optimizer.register_weights_hook(lambda: None)
    with pytest.raises(ValueError, match=match):
        optimizer.graphed(closure)
    assert_equal("weights", p.detach(), torch.ones(3))
    assert optimizer.evaluation is None


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((None,), TypeError, "closure: expected a function that runs forward and backward, got None"),
        ((closure, 0), ValueError, "num_warmup_iters: expected an int >= 1, got 0"),
        ((closure, 1.5), TypeError, "num_warmup_iters: expected an int >= 1, got 1.5"),
    ],
)
def test_arguments(arguments: tuple[Any, ...], error: type[Exception], match: str) -> None:
    optimizer = Lookbehind([nn.Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1)
    with pytest.raises(error, match=match):
        optimizer.graphed(*arguments)


def test_a_closure_is_to_take_its_microbatch() -> None:
    optimizer = Lookbehind([nn.Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1, microbatches=2)
    with pytest.raises(TypeError, match="closure: expected a function of the Evaluation"):
        optimizer.graphed(closure)


class Broken(graphs.Graph):
    """Captures nothing."""

    KIND = "cpu"

    def __init__(self, device: torch.device, pool: Any) -> None: ...

    def warm_up(self, run: Callable[[], Any]) -> None:
        run()

    def capture(self, run: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("steps", [0, 2])
def test_what_cannot_be_captured_leaves_everything_as_it_was(
    base: type[torch.optim.Optimizer], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, state, buffers, gradients, random states, diagnostics; and the next step is that of one that never was
    captured.
    """
    monkeypatch.setattr(graphs, "Graph", Broken)
    monkeypatch.setattr("lookbehind_fused.kernels.native.SCALARS_ON_DEVICE", True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    x = torch.randn(16, 4)
    optimizer = Lookbehind(model.parameters(), base, lr=0.1, k=2, rho=0.1, backend="native")

    def closure() -> torch.Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    for _ in range(steps):
        optimizer.step(closure)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.grad for p in model.parameters()]
    state = {n: {k: v.clone() for k, v in e.items()} for n, e in optimizer.state_dict()["state"].items()}
    figures = {name: value.clone() for name, value in optimizer.diagnostics.items()}
    random, cached = torch.get_rng_state(), torch.is_autocast_cache_enabled()
    with pytest.raises(RuntimeError, match=r"graphed\(\): expected a closure .* but RuntimeError: operation"):
        optimizer.graphed(closure)
    for name, value in model.state_dict().items():
        assert_equal(name, value, before[name])
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    now = optimizer.state_dict()["state"]
    assert now.keys() == state.keys()
    for n, entry in state.items():
        for name, value in entry.items():
            assert_equal(f"{name} of {n}", now[n][name], value)
    assert optimizer.diagnostics.keys() == figures.keys()
    for name, value in figures.items():
        assert_equal(name, optimizer.diagnostics[name], value)
    assert_equal("random state", torch.get_rng_state(), random)
    assert torch.is_autocast_cache_enabled() == cached
    assert optimizer.evaluation is None
    optimizer.step(closure)
    after = [p.detach().clone() for p in model.parameters()]
    model.load_state_dict(before)
    torch.set_rng_state(random)
    other = Lookbehind(model.parameters(), base, lr=0.1, k=2, rho=0.1, backend="native")
    if state:
        other.load_state_dict({**optimizer.state_dict(), "state": state})
    other.step(closure)
    for number, (p, w) in enumerate(zip(model.parameters(), after, strict=True)):
        assert_equal(f"weights of tensor {number}", p.detach(), w)
