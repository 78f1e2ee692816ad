"""Algorithm 1 of Lookbehind-SAM (Mordido, Malviya, Baratin, Chandar, ICML 2024), to be read beside the paper.

The oracle of the tests: plain loops over lists of tensors, nothing in place, nothing shared with ``lookbehind_fused``,
and no ``torch.optim`` in the formulas of the base optimizers. One outer step in the paper's form takes 2k gradients:

    slow = fast = perturbed = params
    for i in 1..k:
        g = grad(perturbed);   perturbed += rho * T^2 g / (||T g||_2 + 1e-16)     # ascent
        g = grad(perturbed);   fast = base_optimizer(fast, g)                     # descent
    params = slow + alpha * (fast - slow)

The second gradient of inner step i and the first gradient of inner step i + 1 are taken at the same point. With
``reuse=True`` the latter is not evaluated again, and that is the whole difference between 2k and k + 1 evaluations.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Gradients = list[Tensor | None]
"""One gradient for each parameter; ``None`` where the evaluation did not reach the parameter."""


@dataclass
class Outcome:
    """What one outer step leaves behind."""

    params: list[Tensor]
    """New weights, in the dtypes of the given ones."""
    alpha: float | list[float]
    """The slow step size that was used; for ``scope="tensor"`` with adaptive alpha one for each tensor."""
    grad_norm: float
    """L2 norm over all tensors of the gradient at evaluation 0."""
    evaluations: int
    """How many gradients were evaluated."""
    skipped: int
    """1 if the step was undone for a gradient that is not finite, else 0."""
    displacement: float
    """The shorter of ||fast_1 - slow|| and ||fast_k - slow|| (zero ones left out): how well alpha is conditioned."""


def algorithm1(
    params: Sequence[Tensor],
    gradient: Callable[[list[Tensor], int], Gradients],
    base: Callable[[list[Tensor], Gradients], list[Tensor]],
    *,
    k: int,
    rho: float | Sequence[float],
    alpha: float | str,
    scope: str = "global",
    adaptive: bool | Sequence[bool] = False,
    eta: float | Sequence[float] = 0.01,
    reuse: bool = True,
    max_grad_norm: float | None = None,
    nonfinite: str = "propagate",
    loss_scale: float = 1.0,
    arithmetic: torch.dtype | None = None,
) -> Outcome:
    """One outer step from ``params``; ``rho``, ``adaptive`` and ``eta`` may be lists with a value for each tensor.

    ``nonfinite="skip"``: a gradient that is not finite, at any evaluation, undoes the step: weights and the memory of
    ``base`` are as before, what remains is not evaluated, an adaptive alpha is NaN. ``loss_scale``: gradients are so
    many times what they should be.

    ``gradient(points, index)`` is evaluation ``index`` (0-based) at ``points``, which have the dtypes of ``params``.
    ``base(fast, gradients)`` is one step of the base optimizer, with its own memory: ``Formulas`` or ``TorchBase``.
    ``arithmetic`` is the dtype of slow, fast, perturbed and every formula: by default that of each tensor, or float32
    where the tensor has 16 bits. The live weights are the image of ``perturbed``, rounded to the dtype of the tensor.
    """
    rho, adaptive, eta = (each(value, len(params)) for value in (rho, adaptive, eta))
    working = [arithmetic or (torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype) for p in params]
    maximize = each(getattr(base, "maximize", False), len(params))
    evaluations = 0
    memory = copy.deepcopy(base) if nonfinite == "skip" else None

    class Broken(Exception):
        pass

    def evaluate(perturbed: list[Tensor]) -> Gradients:
        nonlocal evaluations
        live = [w.to(p.dtype) for w, p in zip(perturbed, params, strict=True)]
        gradients = gradient(live, evaluations)
        evaluations += 1
        g = [None if g is None else g.to(dtype) / loss_scale for g, dtype in zip(gradients, working, strict=True)]
        if evaluations == 1:
            lengths.append(norm(g))
        if nonfinite == "skip" and not math.isfinite(norm(g)):
            raise Broken
        return g

    slow = [p.detach().to(dtype, copy=True) for p, dtype in zip(params, working, strict=True)]
    fast = first = perturbed = slow
    g: Gradients = []
    lengths: list[float] = []  # of the gradient of evaluation 0
    try:
        for i in range(1, k + 1):
            if i == 1 or not reuse:
                g = evaluate(perturbed)
            # maximizing f is minimizing -f
            up = [x if x is None or not down else -x for x, down in zip(g, maximize, strict=True)]
            perturbed = ascend(perturbed, up, rho, adaptive, eta)
            g = evaluate(perturbed)
            fast = base(fast, clip(g, max_grad_norm))
            if i == 1:
                first = fast
    except Broken:
        base.__dict__ = memory.__dict__
        undone = math.nan if alpha == "adaptive" else alpha
        undone = [undone] * len(params) if alpha == "adaptive" and scope == "tensor" else undone
        return Outcome([p.detach().clone() for p in params], undone, lengths[0], evaluations, 1, math.inf)
    (grad_norm,) = lengths

    a = [f - s for f, s in zip(first, slow, strict=True)]
    b = [f - s for f, s in zip(fast, slow, strict=True)]
    alphas = slow_step_size(a, b, k, alpha, scope)
    new = [interpolate(s, f, x) for s, f, x in zip(slow, fast, each(alphas, len(params)), strict=True)]
    moved = [norm([d]) for d in a + b] if scope == "tensor" else [norm(a), norm(b)]
    return Outcome(
        params=[w.to(p.dtype) for w, p in zip(new, params, strict=True)],
        alpha=alphas,
        grad_norm=grad_norm,
        evaluations=evaluations,
        skipped=0,
        displacement=min((length for length in moved if length > 0), default=math.inf),
    )


def ascend(
    perturbed: list[Tensor], g: Gradients, rho: Sequence[float], adaptive: Sequence[bool], eta: Sequence[float]
) -> list[Tensor]:
    """perturbed + rho * T^2 g / (||T g||_2 + 1e-16), T = 1 (SAM) or |perturbed| + eta (ASAM), the norm of all
    tensors together."""
    scaling = [w.abs() + e if asam else torch.ones_like(w) for w, asam, e in zip(perturbed, adaptive, eta, strict=True)]
    length = norm([None if x is None else T * x for T, x in zip(scaling, g, strict=True)])
    return [
        w if x is None else w + r * T**2 * x / (length + 1e-16)
        for w, x, T, r in zip(perturbed, g, scaling, rho, strict=True)
    ]


def clip(g: Gradients, max_grad_norm: float | None) -> Gradients:
    """The gradients of a descent, scaled so that their common norm is at most ``max_grad_norm``."""
    if max_grad_norm is None:
        return g
    factor = min(1.0, max_grad_norm / (norm(g) + 1e-6))
    return [None if x is None else factor * x for x in g]


def slow_step_size(a: list[Tensor], b: list[Tensor], k: int, alpha: float | str, scope: str) -> float | list[float]:
    """alpha, or (cos(fast_1 - slow, fast_k - slow) + 1) / 2 for the whole weight vector or for each tensor."""
    if alpha != "adaptive":
        return float(alpha)
    if scope == "tensor":
        return [1.0 if k == 1 else (cosine([x], [y]) + 1) / 2 for x, y in zip(a, b, strict=True)]
    return 1.0 if k == 1 else (cosine(a, b) + 1) / 2  # k = 1: the two displacements are one and the same


def interpolate(slow: Tensor, fast: Tensor, alpha: float) -> Tensor:
    """slow + alpha * (fast - slow)."""
    return slow + alpha * (fast - slow)


def norm(tensors: Gradients) -> float:
    """L2 norm of all the tensors that are there, as one vector; summed in float64."""
    return math.sqrt(sum(float(x.double().square().sum()) for x in tensors if x is not None))


def cosine(a: list[Tensor], b: list[Tensor]) -> float:
    """cos of the angle between two lists of tensors, each as one vector; 0 when one of them is zero."""
    dot = sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
    return dot / (norm(a) * norm(b)) if norm(a) > 0 and norm(b) > 0 else 0.0


def each(value: Any, n: int) -> list[Any]:
    """A value for each of n tensors."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * n


# The base optimizers, from the formulas in the documentation of torch.optim.


def sgd(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Tensor:
    """One step of SGD; the first momentum is the gradient itself, without dampening."""
    if maximize:
        g = -g
    g = g + weight_decay * w
    if momentum != 0:
        if "momentum_buffer" in state:
            state["momentum_buffer"] = momentum * state["momentum_buffer"] + (1 - dampening) * g
        else:
            state["momentum_buffer"] = g
        g = g + momentum * state["momentum_buffer"] if nesterov else state["momentum_buffer"]
    return w - lr * g


def adam(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled: bool = False,
) -> Tensor:
    """One step of Adam; ``decoupled`` shrinks the weight by itself instead of adding the decay to the gradient."""
    beta1, beta2 = betas
    if maximize:
        g = -g
    if decoupled:
        w = w - lr * weight_decay * w
    else:
        g = g + weight_decay * w
    t = state["step"] = state.get("step", 0) + 1
    m = state["exp_avg"] = beta1 * state.get("exp_avg", torch.zeros_like(w)) + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", torch.zeros_like(w)) + (1 - beta2) * g**2
    if amsgrad:
        v = state["max_exp_avg_sq"] = torch.maximum(state.get("max_exp_avg_sq", torch.zeros_like(w)), v)
    return w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)


def adamw(w: Tensor, g: Tensor, state: dict[str, Any], *, weight_decay: float = 1e-2, **settings: Any) -> Tensor:
    """One step of AdamW: Adam with decoupled weight decay."""
    return adam(w, g, state, weight_decay=weight_decay, decoupled=True, **settings)


class Formulas:
    """A base optimizer from one of the formulas above; ``settings`` may be a list with a dict for each tensor."""

    def __init__(
        self, rule: Callable[..., Tensor], settings: dict[str, Any] | list[dict[str, Any]], count: int
    ) -> None:
        self.rule = rule
        self.settings = each(settings, count)
        self.maximize = [bool(own.get("maximize")) for own in self.settings]
        self.state: list[dict[str, Any]] = [{} for _ in range(count)]

    def __call__(self, fast: list[Tensor], g: Gradients) -> list[Tensor]:
        """New weights; a tensor without a gradient keeps its weight and its state."""
        return [
            w if x is None else self.rule(w, x, state, **settings)
            for w, x, state, settings in zip(fast, g, self.state, self.settings, strict=True)
        ]


class TorchBase:
    """Any torch optimizer as the base: its own ``step()`` on tensors that nothing else touches."""

    def __init__(
        self, optimizer: Callable[..., torch.optim.Optimizer], like: Sequence[Tensor], **settings: Any
    ) -> None:
        self.weights = [torch.nn.Parameter(w.detach().clone()) for w in like]
        self.optimizer = optimizer(self.weights, **settings)
        self.maximize = [bool(settings.get("maximize"))] * len(self.weights)

    @property
    def state(self) -> list[dict[str, Any]]:
        """The optimizer's own state, tensor by tensor."""
        return [dict(self.optimizer.state.get(w, {})) for w in self.weights]

    def __call__(self, fast: list[Tensor], g: Gradients) -> list[Tensor]:
        """New weights; a tensor without a gradient is left to the optimizer, which skips it."""
        with torch.no_grad():
            for w, value, x in zip(self.weights, fast, g, strict=True):
                w.copy_(value)
                w.grad = None if x is None else x.clone()
        self.optimizer.step()
        return [w.detach().clone() for w in self.weights]
