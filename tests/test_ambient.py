"""No tensor of this library's own depends on the default dtype or device, on grad mode, or on autocast."""

import copy
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import SAM, LambdaSchedule, Lookahead, Lookbehind, MultistepSAM, analysis, buffers_at_slow
from lookbehind_fused.compat import LookbehindSAM, SingleFileSAM
from tests.conftest import assert_same_state
from tests.kernels.mutants import ROOT
from tests.twin import BASES

METHODS: dict[str, Callable[..., Any]] = {
    "lookbehind": lambda p, b, **o: Lookbehind(p, b, k=3, alpha="adaptive", max_grad_norm=0.5, **o),
    "tensor": lambda p, b, **o: Lookbehind(p, b, k=2, alpha="adaptive", alpha_scope="tensor", adaptive=True, **o),
    "sam": lambda p, b, **o: SAM(p, b, nonfinite="skip", loss_scale=torch.tensor(4.0, device="cpu"), **o),
    "multistep": lambda p, b, **o: MultistepSAM(p, b, average=True, **o),
    "free": lambda p, b, **o: Lookbehind(p, b, ascent_gradient="previous", **o),
    "lookahead": lambda p, b, **o: Lookahead(SAM(p, b, **o), k=2, backend=o["backend"]),
}
# torch's RMSprop makes its own step count where the default is, and fails there by itself
OURS = [base for base in BASES if base != "RMSprop"]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


AMBIENT: dict[str, Callable[[], Any]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "device": default_device,
    "with device": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def trained(method: str, base: str, backend: str, form: str, dtype: torch.dtype) -> Any:
    """Weights and state after some steps, copies, round trips and figures."""
    shapes = [(3, 4), (5,), ()]
    starts = [torch.linspace(-1, 2, torch.Size(s).numel(), dtype=torch.float64, device="cpu").view(s) for s in shapes]
    params = [nn.Parameter(start.to(dtype, copy=True)) for start in starts]
    make, settings = BASES[base]
    optimizer = METHODS[method](params, make, rho=0.1, backend=backend, **settings)

    def evaluate(*_: Any) -> Tensor:
        for number, (p, start) in enumerate(zip(params, starts, strict=True)):
            p.grad = (0.3 * p.detach().double() + (0.5 + number) * start).to(dtype)
        return torch.zeros((), device="cpu")

    figures = []
    for step in range(4):
        if form == "step":
            optimizer.step(evaluate)
        else:
            for _ in optimizer.evaluations():
                evaluate()
        figures.append(getattr(optimizer, "diagnostics", {}))
        if step == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step == 2 and base != "Lister":  # torch copies of an optimizer what it knows of
            params, optimizer = copy.deepcopy((params, optimizer))
    if method == "lookahead":
        with optimizer.slow_weights():
            figures.append([p.detach().clone() for p in params])
    return [p.detach() for p in params], optimizer.state_dict()["state"], figures


@pytest.mark.sample(60)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["step", "evaluations"])
@pytest.mark.parametrize("base", OURS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ambient", AMBIENT)
def test_training_is_the_same(
    backend: str, ambient: str, method: str, base: str, form: str, dtype: torch.dtype
) -> None:
    """Bit by bit; with the defaults changed before anything is made."""
    expected = trained(method, base, backend, form, dtype)
    with AMBIENT[ambient]():
        found = trained(method, base, backend, form, dtype)
    assert_same_state(found, expected)


@pytest.mark.parametrize("ambient", ["float64", "bfloat16", "device", "with device"])
def test_everything_else_is_the_same(ambient: str, backend: str) -> None:
    """Analysis, schedules, the compatible forms, buffers at slow weights."""

    def run(around: Callable[[], Any]) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        inputs, targets = torch.linspace(-1, 1, 32).view(8, 4), torch.arange(8) % 3
        loss = nn.CrossEntropyLoss()
        found: list[Any] = []

        def closure() -> Tensor:
            value = loss(model(inputs), targets)
            value.backward()
            return value

        with around():
            model_optimizer = SAM(model.parameters(), torch.optim.Adam, lr=0.01, buffers_at_slow=model, backend=backend)
            schedule = LambdaSchedule(model_optimizer, rho=lambda step: 0.9**step)
            for _ in range(3):
                found.append(model_optimizer.step(closure).detach())
                schedule.step()
            with buffers_at_slow(model):
                model(inputs)
            authors = LookbehindSAM(torch.optim.SGD(model.parameters(), lr=0.01), model, k_steps=2, rho=0.1, alpha=0.5)
            model.zero_grad()
            for _ in range(2):
                for half in (authors.ascent_step, authors.descent_step):
                    closure()
                    half()
            single = SingleFileSAM(model.parameters(), torch.optim.SGD, lr=0.01, backend=backend)
            closure()
            single.step(closure)
            model.eval()
            data = [(inputs, targets)]
            found += [
                analysis.sharpness(model, loss, data, radii=[0.1]),
                analysis.noise_robustness(model, data, levels=[0.1], samples=2),
                analysis.gradient_alignment(model, loss, data, rho=0.1, k=2),
                analysis.effective_perturbation(model, rho=0.1),
                analysis.effective_perturbation(model, rho=0.1, direction="random"),
            ]
            saved = io.BytesIO()
            torch.save(model_optimizer.state_dict(), saved)
        return found, model.state_dict()

    assert_same_state(run(AMBIENT[ambient]), run(torch.enable_grad))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_steps_are_counted_beyond_256(dtype: str) -> None:
    """In a process whose default is set before the library is imported."""
    code = (
        f"import torch; torch.set_default_dtype(torch.{dtype})\n"
        "from lookbehind_fused import SAM\n"
        "p = torch.nn.Parameter(torch.ones(2, dtype=torch.float32))\n"
        "optimizer = SAM([p], torch.optim.Adam, lr=1e-4)\n"
        "def closure():\n"
        "    p.grad = torch.ones_like(p)\n"
        "    return 0.0\n"
        "for _ in range(300): optimizer.step(closure)\n"
        "print(float(optimizer.state[p]['step']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "300.0\n", done.stderr
