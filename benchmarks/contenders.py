"""Who is measured: the same outer step written in four ways, all driven alike.

Every contender has ``evaluations()``: one outer step, a generator that yields wherever it wants gradients in
``p.grad``. What runs between two yields is its own work. All clear the gradients before they yield, and all use SGD
with momentum and weight decay as the base optimizer. ``naive`` takes 2k gradients and an adaptive alpha for each
tensor, as the public code does; the others take k + 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lookbehind_fused import Lookbehind
from lookbehind_fused.kernels import SCHEMAS, native

NATIVE = "native"
"""The backend under test."""

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Settings:
    """What a step is run with. ``asam`` is T = |w| + eta; ``scope`` matters to an adaptive alpha alone."""

    k: int = 2
    asam: bool = False
    alpha: float | str = 0.5
    scope: str = "tensor"
    rho: float = 0.05
    eta: float = 0.01
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4

    @property
    def adaptive(self) -> bool:
        """Whether alpha comes from the cosine of two displacements; with k = 1 there is only one, and alpha is 1."""
        return self.alpha == "adaptive" and self.k > 1

    @property
    def static_alpha(self) -> float:
        """The alpha that is used where it is not found from displacements."""
        return 1.0 if isinstance(self.alpha, str) else self.alpha


def copies(params: Tensors) -> list[Tensor]:
    """Memory of each tensor's own, zeroed, so that no page is touched for the first time while the clock runs."""
    return [torch.zeros_like(p, requires_grad=False) for p in params]


def clear(params: Tensors) -> None:
    """Drop the gradients."""
    for p in params:
        p.grad = None


class Naive:
    """The loop as the public code has it: per-parameter torch ops, 2k gradients, and copies around the base's step.

    This project's own transcription. A step keeps five copies of the model: epsilon, slow, fast, backup and momentum.
    """

    def __init__(self, params: Tensors, settings: Settings) -> None:
        self.params, self.settings = list(params), settings
        self.base = torch.optim.SGD(
            self.params, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, foreach=False
        )
        self.state = {p: {"slow": p.detach().clone(), "fast": p.detach().clone()} for p in self.params}

    def evaluations(self) -> Iterator[int]:
        """One outer step of 2k gradients."""
        for i in range(self.settings.k):
            yield 2 * i
            self.ascent_step()
            yield 2 * i + 1
            self.descent_step(i)

    @torch.no_grad()
    def ascent_step(self) -> None:
        """Perturb the weights by a kept epsilon tensor for each parameter."""
        rho, eta, asam = self.settings.rho, self.settings.eta, self.settings.asam
        norms = []
        for p in self.params:
            if p.grad is None:
                continue
            epsilon = self.state[p].get("epsilon")
            if epsilon is None:
                epsilon = self.state[p]["epsilon"] = torch.clone(p).detach()
            if asam:
                epsilon.copy_(p)
                epsilon.abs_().add_(eta)
                p.grad.mul_(epsilon)
            norms.append(torch.norm(p.grad, p=2))
        norm = torch.norm(torch.stack(norms), p=2) + 1e-16
        for p in self.params:
            if p.grad is None:
                continue
            epsilon = self.state[p]["epsilon"]
            if asam:
                p.grad.mul_(epsilon)
            epsilon.copy_(p.grad)
            epsilon.mul_(rho / norm)
            p.add_(epsilon)
        self.base.zero_grad()

    @torch.no_grad()
    def descent_step(self, i: int) -> None:
        """Run the base optimizer on the fast weights; the last inner step interpolates, the others restore."""
        for p in self.params:
            state = self.state[p]
            if "backup" not in state:
                state["backup"] = torch.empty_like(p)
            state["backup"].copy_(p)
            p.copy_(state["fast"])
        self.base.step()
        self.base.zero_grad()
        last = i == self.settings.k - 1
        for p in self.params:
            state = self.state[p]
            if not last:
                state["fast"].copy_(p)
                if i == 0 and self.settings.adaptive:
                    state["first"] = p - state["slow"]
                p.copy_(state["backup"])
                continue
            alpha = self.settings.static_alpha
            if self.settings.adaptive:
                displacement = p - state["slow"]
                cosine = torch.nn.functional.cosine_similarity(state["first"].flatten(), displacement.flatten(), dim=0)
                alpha = (cosine + 1) / 2
                p.mul_(alpha).add_(state["slow"] * (1 - alpha))
            else:
                p.mul_(alpha).add_(state["slow"], alpha=1 - alpha)
            state["slow"].copy_(p)
            state["fast"].copy_(p)


class Foreach:
    """The k + 1 form by hand with ``torch._foreach_*``: gradients reused, no copy that can be avoided."""

    def __init__(self, params: Tensors, settings: Settings) -> None:
        self.params, self.settings = list(params), settings
        self.slow, self.momentum = copies(params), copies(params)
        self.fast = copies(params) if settings.k > 1 else []
        self.first = copies(params) if settings.adaptive and settings.k > 2 else []

    def evaluations(self) -> Iterator[int]:
        """One outer step of k + 1 gradients."""
        for index in range(self.settings.k + 1):
            clear(self.params)
            yield index
            self.use_gradients(index)

    @torch.no_grad()
    def use_gradients(self, index: int) -> None:
        """What follows evaluation ``index``."""
        k = self.settings.k
        grads = [p.grad for p in self.params]
        if index == 0:
            torch._foreach_copy_(self.slow, self.params)
        if index > 0:
            self.descend(index, grads)
        if index < k:
            self.ascend(grads)
        elif self.settings.adaptive:
            self.interpolate_adaptively()
        else:
            self.interpolate()

    def ascend(self, grads: Tensors) -> None:
        """p += rho T^2 g / ||T g||."""
        if self.settings.asam:
            scaling = torch._foreach_abs(self.params)
            torch._foreach_add_(scaling, self.settings.eta)
            grads = torch._foreach_mul(scaling, grads)
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        if self.settings.asam:
            torch._foreach_mul_(grads, scaling)
        torch._foreach_add_(self.params, grads, alpha=self.settings.rho / (float(norm) + 1e-16))

    def descend(self, index: int, grads: Tensors) -> None:
        """SGD on the fast weights. At the last inner step it leaves fast_k in ``fast`` (k = 1: in the parameters)."""
        s = self.settings
        fast = self.fast
        if index == 1:
            torch._foreach_copy_(self.first or self.fast or self.params, self.slow)
            fast = self.first or self.fast or self.params
        elif index == 2 and self.first:
            torch._foreach_copy_(self.fast, self.first)
        elif index == s.k and s.adaptive and not self.first:  # k = 2: fast_1 stays in ``fast``
            torch._foreach_copy_(self.params, self.fast)
            fast = self.params
        torch._foreach_mul_(self.momentum, s.momentum)
        torch._foreach_add_(self.momentum, grads)
        torch._foreach_add_(self.momentum, fast, alpha=s.weight_decay)
        torch._foreach_add_(fast, self.momentum, alpha=-s.lr)

    def interpolate(self) -> None:
        """p = slow + alpha (fast - slow)."""
        alpha = self.settings.static_alpha
        if self.fast:
            torch._foreach_copy_(self.params, self.slow)
            torch._foreach_lerp_(self.params, self.fast, alpha)
        elif alpha != 1:
            torch._foreach_lerp_(self.params, self.slow, 1 - alpha)

    def interpolate_adaptively(self) -> None:
        """The same with alpha* = (cos(fast_1 - slow, fast_k - slow) + 1) / 2."""
        first = torch._foreach_sub(self.first or self.fast, self.slow)
        last = torch._foreach_sub(self.fast if self.first else self.params, self.slow)
        dots = torch.stack([torch.dot(a.view(-1), b.view(-1)) for a, b in zip(first, last, strict=True)])
        a, b = torch.stack(torch._foreach_norm(first)), torch.stack(torch._foreach_norm(last))
        torch._foreach_copy_(self.params, self.slow)
        if self.settings.scope == "global":
            alpha = ((dots.sum() / (a.norm() * b.norm())).clamp(-1, 1) + 1) / 2
            torch._foreach_add_(self.params, last, alpha=float(alpha))
        else:
            alpha = ((torch.nan_to_num(dots / (a * b))).clamp(-1, 1) + 1) / 2
            torch._foreach_mul_(last, alpha.tolist())
            torch._foreach_add_(self.params, last)


class Compiled:
    """The phases of the step as foreach code for ``torch.compile``, which fuses them: one graph a phase.

    Hyperparameters are 0-dim tensors, so that a schedule recompiles nothing. A list longer than ``CHUNK`` goes through
    the graph piece by piece, as the compile time grows faster than the list.
    """

    CHUNK = 160

    def __init__(self, params: Tensors, settings: Settings) -> None:
        self.params, self.settings = list(params), settings
        self.slow, self.momentum = copies(params), copies(params)
        self.fast = copies(params) if settings.k > 1 else []
        self.first = copies(params) if settings.adaptive and settings.k > 2 else []
        names = ("rho", "eta", "lr", "momentum", "weight_decay", "static_alpha")
        self.hyper = [torch.tensor(getattr(settings, name), dtype=torch.float64) for name in names]
        pieces = -(-len(self.params) // self.CHUNK)
        size = -(-len(self.params) // pieces)
        self.pieces = [slice(start, start + size) for start in range(0, len(self.params), size)]

    def evaluations(self) -> Iterator[int]:
        """One outer step of k + 1 gradients."""
        for index in range(self.settings.k + 1):
            clear(self.params)
            yield index
            self.use_gradients(index)

    @torch.no_grad()
    def use_gradients(self, index: int) -> None:
        """What follows evaluation ``index``: one graph, one more for an adaptive alpha, and for the norm of pieces."""
        s, k = self.settings, self.settings.k
        grads = [p.grad for p in self.params]
        norm = self.norm(grads) if index < k and len(self.pieces) > 1 else None
        first = self.first or self.fast
        source = self.slow if index == 1 else first if index == 2 else self.fast
        target = first if index == 1 else self.fast
        sums = []
        for at in self.pieces:
            params, g, slow, momentum = self.params[at], grads[at], self.slow[at], self.momentum[at]
            if index == 0:
                _ascend_first(params, g, slow, norm, self.hyper, s.asam)
            elif index < k:
                _descend_ascend(params, g, source[at], target[at], momentum, norm, self.hyper, s.asam)
            elif s.adaptive:
                sums.append(_descend_align(params, g, source[at], first[at], slow, momentum, self.hyper))
            else:
                _descend_interpolate(params, g, source[at], slow, momentum, self.hyper)
        if sums:
            alphas = torch.cat(sums)
            if s.scope == "global":
                alphas = alphas.sum(0, keepdim=True).expand_as(alphas)
            for at in self.pieces:
                _interpolate(self.params[at], self.slow[at], alphas[at])

    def norm(self, grads: Tensors) -> Tensor:
        """||T g|| over all pieces."""
        parts = [_sq_norm(self.params[at], grads[at], self.hyper, self.settings.asam) for at in self.pieces]
        return torch.stack(parts).sum().sqrt()


def compiled(phase):
    """One graph, for exactly these shapes."""
    return torch.compile(phase, fullgraph=True, dynamic=False)


def _sum_of_squares(params, grads, hyper, asam):
    if asam:
        grads = torch._foreach_mul(torch._foreach_add(torch._foreach_abs(params), hyper[1]), grads)
    return torch.stack([g.square().sum() for g in grads]).sum()


_sq_norm = compiled(_sum_of_squares)


def _ascend(params, grads, norm, hyper, asam):
    if norm is None:
        norm = _sum_of_squares(params, grads, hyper, asam).sqrt()
    step = hyper[0] / (norm + 1e-16)
    if asam:
        scaling = torch._foreach_add(torch._foreach_abs(params), hyper[1])
        grads = torch._foreach_mul(torch._foreach_mul(grads, scaling), scaling)
    torch._foreach_add_(params, torch._foreach_mul(grads, step))


def _descend(source, grads, momentum, hyper):
    _, _, lr, mu, weight_decay, _ = hyper
    grads = torch._foreach_add(grads, torch._foreach_mul(source, weight_decay))
    torch._foreach_mul_(momentum, mu)
    torch._foreach_add_(momentum, grads)
    return torch._foreach_sub(source, torch._foreach_mul(momentum, lr))


@compiled
def _ascend_first(params, grads, slow, norm, hyper, asam):
    torch._foreach_copy_(slow, params)
    _ascend(params, grads, norm, hyper, asam)


@compiled
def _descend_ascend(params, grads, source, target, momentum, norm, hyper, asam):
    torch._foreach_copy_(target, _descend(source, grads, momentum, hyper))
    _ascend(params, grads, norm, hyper, asam)


@compiled
def _descend_interpolate(params, grads, source, slow, momentum, hyper):
    moved = torch._foreach_sub(_descend(source, grads, momentum, hyper), slow)
    torch._foreach_copy_(params, torch._foreach_add(slow, torch._foreach_mul(moved, hyper[5])))


@compiled
def _descend_align(params, grads, source, first, slow, momentum, hyper):
    """Leaves fast_k in ``params``; returns <a, b>, <a, a>, <b, b> of each tensor, shape (tensors, 3)."""
    last = _descend(source, grads, momentum, hyper)
    a, b = torch._foreach_sub(first, slow), torch._foreach_sub(last, slow)
    torch._foreach_copy_(params, last)
    return torch.stack(
        [torch.stack([(x * y).sum(), x.square().sum(), y.square().sum()]) for x, y in zip(a, b, strict=True)]
    )


@compiled
def _interpolate(params, slow, sums):
    dot, a, b = sums.unbind(1)
    norms = a.sqrt() * b.sqrt()
    alphas = (torch.where(norms > 0, dot / norms, 0.0).clamp(-1, 1) + 1) / 2
    for p, s, alpha in zip(params, slow, alphas.unbind(), strict=True):
        p.copy_(s + alpha * (p - s))


class Fused(Lookbehind):
    """``Lookbehind`` with one of its backends."""

    def __init__(self, params: Tensors, settings: Settings, backend: str = NATIVE) -> None:
        super().__init__(
            params,
            torch.optim.SGD,
            rho=settings.rho,
            k=settings.k,
            alpha=settings.alpha,
            alpha_scope=settings.scope,
            adaptive=settings.asam,
            eta=settings.eta,
            backend=backend,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )


class OpsAlone(Fused):
    """What a step of native costs at the least: the ops that it calls, and around them nothing but clearing and reading
    gradients and bumping version counters. It takes nothing into account that may have changed since the second step,
    which it repeats, and leaves nothing to be restored. For a static alpha: then each evaluation has one op.
    """

    def __init__(self, params: Tensors, settings: Settings) -> None:
        assert not settings.adaptive
        super().__init__(params, settings)
        self.held, self.steps, self.calls = list(params), 0, []

    def evaluations(self) -> Iterator[int]:
        """One outer step: the first two as native takes them."""
        self.steps += 1
        if self.steps <= 2:
            self.calls.clear()
            with self._recorded():
                yield from super().evaluations()
            return
        for op, before, after, written in self.calls:
            clear(self.held)
            yield 0
            with torch.no_grad():
                op(*before, [p.grad for p in self.held], *after)
                increment_version(written)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep the calls: the op, what it is given before and after the gradients, and what it writes."""
        with ExitStack() as stack:
            for name in SCHEMAS:
                op = getattr(torch.ops.lookbehind_fused, name).default
                noted = partial(self._note, op, getattr(native, name))
                stack.enter_context(patch.object(native, name, noted))
            yield

    def _note(self, op: Any, run: Any, **arguments: Any) -> None:
        run(**arguments)
        schema = op._schema.arguments
        values = {**arguments, "params": []}  # reached by the addresses in ``table``
        where = [a.name for a in schema].index("grads")
        written = [arguments[a.name] for a in schema if a.alias_info is not None and a.alias_info.is_write]
        tensors = [t for value in written for t in (value if isinstance(value, list) else [value]) if t is not None]
        given = [values[a.name] for a in schema]
        self.calls.append((op, given[:where], given[where + 1 :], tensors))


CONTENDERS = {"naive": Naive, "foreach": Foreach, "compiled": Compiled, "native": Fused}
"""Those that are compared with each other."""
ALL = {**CONTENDERS, "ops": OpsAlone}
