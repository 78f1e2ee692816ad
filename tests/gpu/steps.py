"""Whole steps on a GPU: beside the reference on the CPU, of a model that moves, with a model's own backward passes."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from lookbehind_fused import ASAM, Lookahead, Lookbehind, MultistepSAM, analysis
from tests.compare import LOW_PRECISION, scaled_error
from tests.gpu.machine import here

SETTINGS = [
    {"k": k, "alpha": alpha, "alpha_scope": scope, "adaptive": adaptive, "max_grad_norm": most}
    for k, (alpha, scope), adaptive, most in itertools.product(
        (1, 2, 3), ((0.6, "global"), ("adaptive", "global"), ("adaptive", "tensor")), (False, True), (None, 0.5)
    )
]
FAMILY = [
    {"method": MultistepSAM, "k": 3, "average": True},
    {"k": 2, "alpha": 0.4, "microbatches": 2},
    {"k": 3, "alpha": "adaptive", "ascent_gradient": "previous"},
    {"k": 3, "alpha": 1.0, "rho_scope": "total"},
    {"method": ASAM, "lookahead": 2},
]
BASES = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.01}),
]


def step_cases(sample: int = 1) -> list[tuple[Any, dict[str, Any]]]:
    """Base optimizers and settings of whole steps, every ``sample``-th of them; and the family over the first base."""
    return [*itertools.product(BASES, SETTINGS)][::sample] + [(BASES[0], method) for method in FAMILY]


def trained(
    device: str, backend: str, base: Any, settings: dict[str, Any], dtype: torch.dtype, steps: int = 3
) -> Tensor:
    """The weights after some steps; gradients are a formula of the weights, so that nothing else differs."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(130, 70), (5000,), (3, 3), (), (7,)]
    params = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype)) for s in shapes]
    slopes = [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]
    own = dict(settings)
    make, inner_steps = own.pop("method", Lookbehind), own.pop("lookahead", None)
    optimizer = make(params, base[0], rho=0.1, backend=backend, **own, **base[1])
    if inner_steps:
        optimizer = Lookahead(optimizer, inner_steps, 0.3, backend=backend)
    for step in range(steps):
        for evaluation in optimizer.evaluations():
            for p, slope in zip(params, slopes, strict=True):
                p.grad = 0.3 * p.detach() + (1 + 0.2 * ((step + evaluation.index) % 3)) * slope
    return torch.cat([p.detach().flatten() for p in params]).double().cpu()


def whole_steps(backend: str, dtype: str) -> str:
    """Each setting and base optimizer, in float64 or float32, beside the reference in float64."""
    worst, bound = 0.0, {"float64": 1e-12, "float32": 3 * 2e-6}[dtype]
    cases = step_cases(here.chosen(1, 7, 11))
    for base, settings in cases:
        expected = trained("cpu", "reference", base, settings, torch.float64)
        found = trained(here.device, backend, base, settings, getattr(torch, dtype))
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= bound:
            raise AssertionError(f"{base[0].__name__} {settings}: {error:.1e} > {bound:.1e}")
        worst = max(worst, error)
    return f"{len(cases)} settings, largest error {worst:.1e}"


def along(places: list[str], backend: str, base: Any, settings: dict[str, Any]) -> Tensor:
    """The weights after a step in each place that the model is moved to; without settings, torch's own steps."""
    torch.manual_seed(0)
    model, (make, own) = nn.Sequential(nn.Linear(70, 130), nn.Linear(130, 3)).double(), base
    optimizer = Lookbehind(model.parameters(), make, **settings, **own) if settings else make(model.parameters(), **own)
    for step, place in enumerate(places):
        model.to(place)
        if settings:
            optimizer.backend = "auto" if place == "cpu" else backend
        if make is torch.optim.RMSprop:  # a base that runs its own step has state that torch moves when it is loaded
            optimizer.load_state_dict(optimizer.state_dict())
        for index in (evaluation.index for evaluation in optimizer.evaluations()) if settings else (1,):
            for p in model.parameters():
                slope = torch.linspace(-1, 1 + step, p.numel(), dtype=p.dtype).view_as(p).to(place)
                p.grad = (0.3 + 0.1 * index) * p.detach() + slope
        if not settings:
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()


def moved(backend: str) -> str:
    """As if it had stayed, with torch's own step and with Lookbehind's."""
    bases = [*BASES, (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5})]
    places = ["cpu", "cpu", here.device, here.device, "cpu", here.device]
    for base in bases:
        for settings, stays in (({"rho": 0.0, "k": 1, "alpha": 1.0}, {}), ({"k": 3, "alpha": "adaptive"},) * 2):
            found = along(places, backend, base, settings)
            expected = along(["cpu"] * len(places), "reference", base, stays)
            error = float((found - expected).abs().max() / expected.abs().max())
            if not error <= 1e-12:
                raise AssertionError(f"{base[0].__name__} {settings}: {error:.1e} > 1e-12")
    return f"{len(bases)} bases"


def same_bits(backend: str) -> str:
    settings = {"k": 3, "alpha": "adaptive"}
    runs = [trained(here.device, backend, BASES[0], settings, torch.float32, steps=5) for _ in range(5)]
    if not all(torch.equal(run, runs[0]) for run in runs):
        raise AssertionError("five runs differ")
    return "5 runs"


def gradients(backend: str) -> str:
    from tests.kernels.gradients import far_apart, large, lazy_views

    lazy_views(backend, here.device)
    far_apart(backend, here.device)
    large(backend, here.device)
    return "negated, conjugate; beta1 of 0, 0.25, 0.5, 0.9; up to 1e37"


class Network(nn.Module):
    """Layers whose gradients come in the layouts that gradients come in: channels last, of a matrix, of a vector."""

    def __init__(self) -> None:
        super().__init__()
        features = [nn.Conv2d(3, 33, 3, bias=False), nn.BatchNorm2d(33), nn.ReLU(), nn.Conv2d(33, 70, 3, stride=2)]
        head = [nn.ReLU(), nn.Flatten(), nn.Linear(70 * 9, 65), nn.LayerNorm(65), nn.Linear(65, 10)]
        self.layers = nn.Sequential(*features, *head)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


TRAINED = [
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}),
    (torch.optim.AdamW, {"lr": 1e-3}),
]


def backward_passes(backend: str) -> str:
    """Gradients of a network's backward passes, at another address each time, beside the reference in float64 on the
    CPU that is given the same gradients: weights at every evaluation and after every step.
    """
    worst, addresses = 0.0, set()
    ways = [*itertools.product((torch.float64, torch.float32, torch.bfloat16), TRAINED, (0.5, "adaptive"))]
    for dtype, (base, own), alpha in ways[:: here.chosen(1, 1, 5)]:
        torch.manual_seed(0)
        network = Network().to(here.device, dtype, memory_format=torch.channels_last)
        params = [*network.parameters()]
        theirs = [nn.Parameter(p.detach().double().cpu().clone()) for p in params]
        settings = {"k": 3, "alpha": alpha, "rho": 0.1, **own}
        ours = Lookbehind(params, base, backend=backend, **settings)
        other = Lookbehind(theirs, base, backend="reference", **settings)
        bound = {torch.float64: 1e-12, torch.float32: 6e-6}.get(dtype, torch.finfo(torch.bfloat16).eps)
        held: list[list[Tensor]] = []  # so that no address comes twice

        def compare(where: str, params: Any = params, theirs: Any = theirs, bound: float = bound) -> float:
            errors = [scaled_error(p.cpu(), q) for p, q in zip(params, theirs, strict=True)]
            if not max(errors) <= bound:
                number = errors.index(max(errors))
                raise AssertionError(f"{where}: tensor {number}: {errors[number]:.1e} > {bound:.1e}")
            return max(errors)

        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(16, 3, 9, 9, generator=generator).to(here.device, dtype)
            y = torch.randint(10, (16,), generator=generator).to(here.device)
            what = f"{base.__name__} {alpha} {dtype}, step {step}"
            for evaluation, _ in zip(ours.evaluations(), other.evaluations(), strict=True):
                error = compare(f"{what}, evaluation {evaluation.index}")
                nn.functional.cross_entropy(network(x).float(), y).backward()
                held.append([p.grad for p in params])
                for p, q in zip(params, theirs, strict=True):
                    q.grad = p.grad.detach().double().cpu().clone()
            error = max(error, compare(what))
            if dtype in LOW_PRECISION:  # a step begins at rounded weights: both at the same
                for p, q in zip(params, theirs, strict=True):
                    q.data.copy_(p.detach())
            worst = max(worst, 0.0 if dtype in LOW_PRECISION else error)
        found = {tuple(g.data_ptr() for g in grads) for grads in held}
        if len(found) != len(held):
            raise AssertionError(f"{len(found)} sets of addresses in {len(held)} evaluations")
        addresses |= found
    return f"{len(addresses)} evaluations, largest error of 32 and 64 bits {worst:.1e}"


def analysed() -> str:
    """Sharpness and what else is measured of a model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    model.double().eval()
    batch, loss_fn = (torch.randn(64, 3, 8, 8).double(), torch.arange(64) % 5), nn.functional.cross_entropy
    found = []
    for device in ("cpu", here.device):
        model.to(device)
        figures = [
            analysis.sharpness(model, loss_fn, [batch], radii=[0.05, 0.5], m=16, adaptive=adaptive)
            for adaptive in (False, True)
        ]
        figures += [analysis.gradient_alignment(model, loss_fn, [batch], rho=0.05, k=3).flatten()]
        figures += [analysis.noise_robustness(model, [batch], levels=[0.0, 0.1]).flatten().double()]
        model.zero_grad()
        loss_fn(model(batch[0].to(device)), batch[1].to(device)).backward()
        figures += [torch.tensor(analysis.effective_perturbation(model, rho=0.05)).double()]
        found.append(torch.cat([x.cpu() for x in figures]))
    error = float((found[0] - found[1]).abs().max())
    if not error <= 1e-9:
        raise AssertionError(f"{found[0]} on the CPU, {found[1]} on the GPU")
    return f"{len(found[0])} figures, largest difference {error:.1e}"
