"""The passes in plain PyTorch: the definition of every kernel, to be read beside the paper.

Algorithm 1 of Lookbehind (Mordido et al., ICML 2024), one outer step with the gradient reused::

    slow = fast = perturbed = params;  g = grad(perturbed)
    for i in 1..k:
        perturbed += rho * T^2 g / (||T g||_2 + 1e-16)      ascend
        g = grad(perturbed)
        fast = base_optimizer(fast, g)                      descend
    params = slow + alpha * (fast - slow)                   interpolate

Signatures and the meaning of the arguments: ``kernels.schema``. Every tensor is seen as a vector in memory order. A
gradient that is None (this backend alone accepts it) stands for a tensor that the evaluation did not reach: it is
neither ascended nor updated, but its values still move from ``*_from`` to where the next pass reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .schema import ADDRESS, UNSCALE, Flag

NORM_EPSILON = 1e-16  # added to the norm that an ascent divides by
CLIP_EPSILON = 1e-6  # added to the norm that clipping divides by, as torch.nn.utils.clip_grad_norm_ does
SUM_CHUNK = 16384  # below the size from which torch splits a sum over threads: the order of a sum never changes

Gradients = Sequence[Tensor | None]

REMEDY = ""
DEVICES = "any device"
SCALARS_ON_DEVICE = False  # hyper and steps are read by the host


def why_not() -> str | None:
    """None: there always is this backend."""
    return None


def serves(device: torch.device) -> bool:
    """Any device that PyTorch has."""
    return True


# ---- passes ----------------------------------------------------------------------------------------------------------


def reduce_sq_norm(
    params: Sequence[Tensor],
    grads: Gradients,
    perturbed: Tensor | None,
    table: Tensor,
    hyper: Tensor,
    flags: int,
    sq_norms: Tensor,
    row: int,
) -> None:
    """``sq_norms[row]`` = the sums of squares of T g (equation 7 of ASAM, Kwon et al. 2021) and of g."""
    _, eta, *_ = hyper.tolist()
    squares = []
    for param, grad, (_, span) in zip(params, grads, _rows(table), strict=True):
        weights = vector(param) if perturbed is None else perturbed[span]
        g = _gradient(grad, param)
        scaled = plain = ordered_sum(g.double().square())
        if flags & Flag.ADAPTIVE:
            scaled = ordered_sum((_scaling(weights.to(g.dtype), eta) * g).double().square())
        squares.append(torch.stack([scaled, plain]))
    sq_norms[row].copy_(torch.stack(squares).sum(0))


def ascend(
    params: Sequence[Tensor],
    grads: Gradients,
    perturbed: Tensor | None,
    slow: Tensor | None,
    table: Tensor,
    sq_norms: Tensor,
    row: int,
    hyper: Tensor,
    flags: int,
) -> None:
    """``perturbed += rho * T^2 g / (||T g|| + 1e-16)``. The first ascent of a step keeps the weights in ``slow``."""
    for number, (param, (_, span)) in enumerate(zip(params, _rows(table), strict=True)):  # before anything is written
        if param.numel() != span.stop - span.start:
            raise RuntimeError(
                f"params: tensor {number} has {param.numel()} elements, expected {span.stop - span.start}"
            )
    if row >= 0:
        reduce_sq_norm(params, grads, None if slow is not None else perturbed, table, hyper, flags, sq_norms, row)
    for param, grad, (_, span) in zip(params, grads, _rows(table), strict=True):
        if slow is None:
            weights = vector(param) if perturbed is None else perturbed[span]
        else:
            weights = slow[span].copy_(vector(param))
        if grad is not None:
            weights = _ascended(weights, _gradient(grad, param), sq_norms, hyper, flags)
        _store(weights, param, perturbed, span)


def descend(
    params: Sequence[Tensor],
    grads: Gradients,
    fast: Tensor | None,
    fast_from: Tensor | None,
    state: Sequence[Tensor],
    state_from: Sequence[Tensor],
    steps: Tensor,
    steps_from: Tensor | None,
    table: Tensor,
    sq_norms: Tensor | None,
    hyper: Tensor,
    rule: str,
    flags: int,
) -> None:
    """``fast = base_optimizer(fast, g)``, alone: the 2k form, where another evaluation comes before the next ascent."""
    descent = _Descent(state, state_from, steps, steps_from, sq_norms, hyper, rule, flags)
    for param, grad, (row, span) in zip(params, grads, _rows(table), strict=True):
        _, moved = descent(_other(fast_from, fast)[span], param, grad, row, span)
        if fast is not None:
            fast[span].copy_(moved)


def descend_ascend(
    params: Sequence[Tensor],
    grads: Gradients,
    perturbed: Tensor | None,
    fast: Tensor | None,
    fast_from: Tensor | None,
    state: Sequence[Tensor],
    state_from: Sequence[Tensor],
    steps: Tensor,
    steps_from: Tensor | None,
    table: Tensor,
    sq_norms: Tensor,
    row: int,
    hyper: Tensor,
    rule: str,
    flags: int,
) -> None:
    """``fast = base_optimizer(fast, g)``, then the next ascent of ``perturbed``: the same g is reused."""
    if row >= 0:
        reduce_sq_norm(params, grads, perturbed, table, hyper, flags, sq_norms, row)
    descend(params, grads, fast, fast_from, state, state_from, steps, steps_from, table, sq_norms, hyper, rule, flags)
    ascend(params, grads, perturbed, None, table, sq_norms, -1, hyper, flags)


def descend_interpolate(
    params: Sequence[Tensor],
    grads: Gradients,
    slow: Tensor,
    fast: Tensor,
    state: Sequence[Tensor],
    state_from: Sequence[Tensor],
    steps: Tensor,
    steps_from: Tensor | None,
    table: Tensor,
    sq_norms: Tensor | None,
    hyper: Tensor,
    rule: str,
    flags: int,
) -> None:
    """The last descent, then ``params = slow + alpha * (fast - slow)`` with the static alpha. ``fast`` is only read."""
    _, _, alpha, *_ = hyper.tolist()
    descent = _Descent(state, state_from, steps, steps_from, sq_norms, hyper, rule, flags)
    for param, grad, (row, span) in zip(params, grads, _rows(table), strict=True):
        _, last = descent(fast[span], param, grad, row, span)
        vector(param).copy_(torch.lerp(slow[span], last, alpha))


def descend_align(
    params: Sequence[Tensor],
    grads: Gradients,
    perturbed: Tensor | None,
    slow: Tensor,
    fast: Tensor,
    first: Tensor | None,
    state: Sequence[Tensor],
    state_from: Sequence[Tensor],
    steps: Tensor,
    steps_from: Tensor | None,
    table: Tensor,
    sq_norms: Tensor | None,
    hyper: Tensor,
    rule: str,
    flags: int,
    sums: Tensor,
) -> None:
    """The last descent, which leaves fast_k where the perturbed weights were, and the three sums that alpha* is made
    of.

    ``fast`` and ``first`` (fast_1) are only read. ``first`` is None for k = 2: fast_1 is what this descent moves.
    """
    descent = _Descent(state, state_from, steps, steps_from, sq_norms, hyper, rule, flags)
    by_tensor = []
    for param, grad, (row, span) in zip(params, grads, _rows(table), strict=True):
        before, last = descent(fast[span], param, grad, row, span)
        fast_1 = before if first is None else first[span]
        by_tensor.append(alignment(fast_1 - slow[span], last - slow[span]))
        _store(last, param, perturbed, span)
    if flags & Flag.PER_TENSOR:
        sums[[row for row, _ in _rows(table)]] = torch.stack(by_tensor)
    else:
        sums.copy_(torch.stack(by_tensor).sum(0, keepdim=True))


def interpolate(
    params: Sequence[Tensor], perturbed: Tensor | None, slow: Tensor, table: Tensor, sums: Tensor, flags: int
) -> None:
    """``params = slow + alpha* (fast_k - slow)``: fast_k is what ``descend_align`` left, alpha* comes from ``sums``."""
    alpha = adaptive_alpha(sums if flags & Flag.PER_TENSOR else sums.sum(0))
    for param, (row, span) in zip(params, _rows(table), strict=True):
        fast = vector(param) if perturbed is None else perturbed[span]
        weight = alpha[row] if flags & Flag.PER_TENSOR else alpha
        vector(param).copy_(torch.lerp(slow[span], fast, weight.to(slow.dtype)))


# ---- update rules: base_optimizer(fast, g) ---------------------------------------------------------------------------


def sgd(w: Tensor, g: Tensor, state: Sequence[Tensor], step: int, hyper: Sequence[float], flags: int):
    """torch.optim.SGD. ``step`` counts this tensor's updates from 1; at the first the momentum is the gradient."""
    lr, momentum, dampening, weight_decay = hyper
    if flags & Flag.MAXIMIZE:
        g = -g
    if weight_decay:
        g = g.add(w, alpha=weight_decay)
    if not state:
        return w.add(g, alpha=-lr), state
    (momentum_buffer,) = state
    momentum_buffer = g if step == 1 else (momentum_buffer * momentum).add(g, alpha=1 - dampening)
    if flags & Flag.NESTEROV:
        return w.add(g.add(momentum_buffer, alpha=momentum), alpha=-lr), (momentum_buffer,)
    return sgd_by_state(w, (momentum_buffer,), step, hyper, flags), (momentum_buffer,)


def sgd_by_state(w: Tensor, state: Sequence[Tensor], step: int, hyper: Sequence[float], flags: int) -> Tensor:
    """What an update with momentum, not Nesterov's, makes of the weights when it has left ``state``."""
    lr, *_ = hyper
    return w.add(state[0], alpha=-lr)


def adam(w: Tensor, g: Tensor, state: Sequence[Tensor], step: int, hyper: Sequence[float], flags: int):
    """torch.optim.Adam (Kingma and Ba 2015, algorithm 1) and AdamW (Loshchilov and Hutter 2019)."""
    _, beta1, beta2, _, weight_decay = hyper
    if flags & Flag.MAXIMIZE:
        g = -g
    if weight_decay and not flags & Flag.DECOUPLED:
        g = g.add(w, alpha=weight_decay)
    exp_avg, exp_avg_sq, *max_exp_avg_sq = state
    exp_avg = exp_avg.lerp(g, 1 - beta1)
    exp_avg_sq = (exp_avg_sq * beta2).addcmul(g, g, value=1 - beta2)
    if flags & Flag.AMSGRAD:
        max_exp_avg_sq = [torch.maximum(*max_exp_avg_sq, exp_avg_sq)]
    state = (exp_avg, exp_avg_sq, *max_exp_avg_sq)
    return adam_by_state(w, state, step, hyper, flags), state


def adam_by_state(w: Tensor, state: Sequence[Tensor], step: int, hyper: Sequence[float], flags: int) -> Tensor:
    """What update number ``step`` makes of the weights when it has left ``state``; its last entry is the second moment
    that is divided by.
    """
    lr, beta1, beta2, eps, weight_decay = hyper
    if weight_decay and flags & Flag.DECOUPLED:
        w = w * (1 - lr * weight_decay)
    denominator = (state[-1].sqrt() / (1 - beta2**step) ** 0.5).add(eps)
    return w.addcdiv(state[0], denominator, value=-lr / (1 - beta1**step))


def none(w: Tensor, g: Tensor, state: Sequence[Tensor], step: int, hyper: Sequence[float], flags: int):
    """The base optimizer is not fused: its own ``step()`` has moved ``fast`` already."""
    return w, state


RULES = {"sgd": sgd, "adam": adam, "none": none}
BY_STATE = {"sgd": sgd_by_state, "adam": adam_by_state}


class _Descent:
    """``base_optimizer(fast, g)`` for one tensor after another, with its state read and written."""

    def __init__(self, state, state_from, steps, steps_from, sq_norms, hyper, rule, flags) -> None:
        _, _, _, max_grad_norm, unscale, *self.hyper = hyper.tolist()
        most = None if sq_norms is None or math.isinf(max_grad_norm) else max_grad_norm
        self.rule, self.flags = RULES[rule], flags
        self.derive = BY_STATE[rule] if flags & Flag.DERIVES else None
        self.state, self.state_from = state, state_from or state
        self.steps, self.steps_from = steps, _other(steps_from, steps)
        self.scale = gradient_scale(sq_norms, most, None if unscale == 1 else hyper[UNSCALE])
        self.moves = finite(sq_norms) if flags & Flag.SKIPS else None

    def __call__(self, fast: Tensor, param: Tensor, grad: Tensor | None, row: int, span: slice):
        """The fast weights before and after."""
        old = [buffer[span] for buffer in self.state_from]
        step = self.steps_from[row]
        if self.derive is not None:
            fast = self.derive(fast, old, int(step), self.hyper, self.flags)
        if grad is None:
            moved, new = fast, old
        else:
            g = _gradient(grad, param) if self.scale is None else _gradient(grad, param) * self.scale
            moved, new = self.rule(fast, g, old, int(step) + 1, self.hyper, self.flags)
            if self.moves is None:
                step = step + 1
            else:
                step = step + self.moves.to(step.device)
                moved = torch.where(self.moves, moved, fast)
                new = [torch.where(self.moves, *pair) for pair in zip(new, old, strict=True)]
        for buffer, value in zip(self.state, new, strict=True):
            buffer[span].copy_(value)
        self.steps[row] = step
        return fast, moved


# ---- formulas --------------------------------------------------------------------------------------------------------


def total_norm(sq_norms: Tensor, column: int = 0) -> Tensor:
    """0-dim float64: ||T g|| (column 0) or ||g|| (column 1) over all buckets, from shape (buckets, 2)."""
    return sq_norms[:, column].sum().sqrt()


def gradient_scale(sq_norms: Tensor | None, max_grad_norm: float | None, unscale: Tensor | None) -> Tensor | None:
    """``unscale * min(1, max_grad_norm / (||unscale * g|| + 1e-6))``, 0-dim float64, what a descent multiplies its
    gradient by; None for 1. Nothing is clipped where ``max_grad_norm`` is None, which needs no ``sq_norms``.
    """
    if max_grad_norm is None:
        return unscale
    norm = total_norm(sq_norms, 1)
    if unscale is None:
        return (max_grad_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
    unscale = unscale.to(norm.device)
    return unscale * (max_grad_norm / (unscale.abs() * norm + CLIP_EPSILON)).clamp(max=1.0)


def finite(sq_norms: Tensor) -> Tensor:
    """Whether ||T g|| and ||g|| over all buckets are finite: shape (..., buckets, 2) to bool of shape (...)."""
    return sq_norms.sum(-2).isfinite().all(-1)


def alignment(a: Tensor, b: Tensor) -> Tensor:
    """(<a, b>, <a, a>, <b, b>), float64 of shape (3,), of two vectors."""
    a, b = a.double(), b.double()
    return torch.stack([ordered_sum(a * b), ordered_sum(a * a), ordered_sum(b * b)])


def adaptive_alpha(sums: Tensor) -> Tensor:
    """alpha* = (cos + 1) / 2 (Mordido et al. 2024), shape (..., 3) to (...). The cosine of a zero vector is 0."""
    dot, a, b = sums.unbind(-1)
    norms = a.sqrt() * b.sqrt()
    cosine = torch.where(norms == 0, 0.0, dot / norms).clamp(-1.0, 1.0)
    return (cosine + 1) / 2


def ordered_sum(x: Tensor) -> Tensor:
    """Sum of a vector, 0-dim, in an order that does not depend on the number of threads."""
    while x.numel() > SUM_CHUNK:
        whole = x.numel() // SUM_CHUNK * SUM_CHUNK
        x = torch.cat([x[:whole].view(-1, SUM_CHUNK).sum(1), x[whole:].sum().view(1)])
    return x.sum()


def _scaling(weights: Tensor, eta: float) -> Tensor:
    """ASAM's T_w = |w| + eta (Kwon et al. 2021, section 3.2)."""
    return weights.abs() + eta


def _ascended(weights: Tensor, g: Tensor, sq_norms: Tensor, hyper: Tensor, flags: int) -> Tensor:
    rho, eta, *_ = hyper.tolist()
    if flags & Flag.ADAPTIVE:
        g = _scaling(weights, eta).square() * g
    ascended = weights + g * (rho / (total_norm(sq_norms) + NORM_EPSILON))
    return torch.where(finite(sq_norms), ascended, weights) if flags & Flag.SKIPS else ascended


# ---- tensors ---------------------------------------------------------------------------------------------------------


def vector(x: Tensor) -> Tensor:
    """A dense tensor's elements in memory order, sharing its memory and version counter."""
    return x.detach().as_strided((x.numel(),), (1,))


def _rows(table: Tensor) -> Iterator[tuple[int, slice]]:
    """Each tensor's row in ``steps`` and ``sums`` and its slice of the flat buffers."""
    for row, start, size in table[:, :ADDRESS].tolist():
        yield row, slice(start, start + size)


def _gradient(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient as a vector in its parameter's memory order, in the dtype that is computed in."""
    if grad.dtype != param.dtype:
        raise TypeError(f"grads: expected {param.dtype} as the parameter has, got {grad.dtype}")
    if grad.stride() != param.stride():
        grad = torch.empty_strided(param.shape, param.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)
    return vector(grad).to(torch.float64 if param.dtype == torch.float64 else torch.float32)


def _other(source: Tensor | None, target: Tensor | None) -> Tensor | None:
    return target if source is None else source


def _store(weights: Tensor, param: Tensor, perturbed: Tensor | None, span: slice) -> None:
    """New weights go into the parameter, rounded to its dtype, and unrounded into ``perturbed`` where there is one."""
    if perturbed is not None:
        perturbed[span].copy_(weights)
    vector(param).copy_(weights)
