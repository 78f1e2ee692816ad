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

A pass computes first and writes last, all at once (``_Writes``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .contract import BUFFERS, NUMBERS, Column, Flag, Hyper, RuleId
from .schema import ARGUMENTS, completed

NORM_EPSILON = 1e-16  # added to the norm that an ascent divides by
CLIP_EPSILON = 1e-6  # added to the norm that clipping divides by, as torch.nn.utils.clip_grad_norm_ does
SUM_CHUNK = 16384  # below the size from which torch splits a sum over threads: the order of a sum never changes

Gradients = Sequence[Tensor | None]
Numbers = Mapping[str, float]  # a rule's own, by the names in ``contract.NUMBERS``

REMEDY = ""
DEVICES = "any device"
SCALARS_ON_DEVICE = False  # hyper, steps and done are in host memory


def why_not() -> str | None:
    """None: there always is this backend."""
    return None


def serves(device: torch.device) -> bool:
    """Any device that PyTorch has."""
    return True


def bind(name: str, params: Sequence[Tensor], table: Tensor, arguments: Mapping[str, Any]) -> ops.Pass:
    """The pass ``name``, to be called with the gradients (``interpolate`` ignores them).

    Args:
        name: one of ``schema.SCHEMAS``.
        params, table: as there.
        arguments: the others but ``grads``, by name.
    """
    run, takes_grads = globals()[name], "grads" in ARGUMENTS[name]
    given = {"params": list(params), **completed(name, {**arguments, "table": table})}
    return lambda grads: run(**given, grads=grads) if takes_grads else run(**given)


class _Writes:
    """What a pass is to write, and where. It is written by one call at the pass's end: whatever a signal's handler
    raises is raised before all of it or after.
    """

    def __init__(self) -> None:
        self.targets: list[Tensor] = []
        self.values: list[Tensor] = []

    def add(self, target: Tensor, value: Tensor) -> None:
        """``value`` shares no memory with what another target is."""
        self.targets.append(target)
        self.values.append(value)

    def add_weights(self, weights: Tensor, param: Tensor, perturbed: Tensor | None, span: slice) -> None:
        """New weights go into the parameter, rounded to its dtype, and unrounded into ``perturbed`` where it is."""
        if perturbed is not None:
            self.add(perturbed[span], weights)
        self.add(vector(param), weights)

    def write(self, done: Tensor | None = None) -> None:
        """Write everything, and 1 to ``done``."""
        if done is not None:
            self.add(done, torch.ones_like(done))
        if self.targets:
            torch._foreach_copy_(self.targets, self.values)


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
    """``sq_norms[row] = (||T g||^2, ||g||^2)``: the sums of squares of T g (equation 7 of ASAM, Kwon et al. 2021) and
    of g.
    """
    writes = _Writes()
    _reduced(writes, params, grads, perturbed, table, hyper, flags, sq_norms, row)
    writes.write()


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
    done: Tensor | None = None,
) -> None:
    """``perturbed += rho * T^2 g / (||T g|| + 1e-16)``. The first ascent of a step keeps the weights in ``slow``."""
    writes = _Writes()
    if row >= 0:
        unrounded = None if slow is not None else perturbed
        sq_norms = _reduced(writes, params, grads, unrounded, table, hyper, flags, sq_norms, row)
    _ascend(writes, params, grads, perturbed, slow, table, sq_norms, hyper, flags)
    writes.write(done)


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
    rule: int,
    flags: int,
) -> None:
    """``fast = base_optimizer(fast, g)``, alone: the 2k form, where another evaluation comes before the next ascent."""
    writes = _Writes()
    descent = _Descent(writes, state, state_from, steps, steps_from, sq_norms, hyper, rule, flags)
    _descend(writes, params, grads, fast, fast_from, table, descent)
    writes.write()


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
    rule: int,
    flags: int,
) -> None:
    """``fast = base_optimizer(fast, g)``, then the next ascent of ``perturbed``: the same g is reused."""
    writes = _Writes()
    if row >= 0:
        sq_norms = _reduced(writes, params, grads, perturbed, table, hyper, flags, sq_norms, row)
    descent = _Descent(writes, state, state_from, steps, steps_from, sq_norms, hyper, rule, flags)
    _descend(writes, params, grads, fast, fast_from, table, descent)
    _ascend(writes, params, grads, perturbed, None, table, sq_norms, hyper, flags)
    writes.write()


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
    rule: int,
    flags: int,
    done: Tensor | None = None,
) -> None:
    """The last descent, then ``params = slow + alpha * (fast - slow)`` with the static alpha. ``fast`` is only read."""
    writes = _Writes()
    descent = _Descent(writes, state, state_from, steps, steps_from, sq_norms, hyper, rule, flags)
    for param, grad, place in zip(params, grads, _places(params, table), strict=True):
        _, last = descent(fast[place.span], param, grad, place, slow[place.span])
        alpha = descent.numbers[place.group][Hyper.ALPHA]
        writes.add(vector(param), torch.lerp(slow[place.span], last, alpha))
    writes.write(done)


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
    rule: int,
    flags: int,
    sums: Tensor,
    done: Tensor | None = None,
) -> None:
    """The last descent, which leaves fast_k where the perturbed weights were, and the three sums that alpha* is made
    of.

    ``fast`` and ``first`` (fast_1) are only read. ``first`` is None for k = 2: fast_1 is what this descent moves.
    """
    writes = _Writes()
    descent = _Descent(writes, state, state_from, steps, steps_from, sq_norms, hyper, rule, flags)
    by_tensor = []
    for param, grad, place in zip(params, grads, _places(params, table), strict=True):
        before, last = descent(fast[place.span], param, grad, place, slow[place.span])
        fast_1 = before if first is None or not descent.takes_place else first[place.span]
        own = alignment(fast_1 - slow[place.span], last - slow[place.span])
        writes.add_weights(last, param, perturbed, place.span)
        if flags & Flag.PER_TENSOR:
            writes.add(sums[place.row], own)
        by_tensor.append(own)
    if not flags & Flag.PER_TENSOR:
        writes.add(sums, torch.stack(by_tensor).sum(0, keepdim=True) if by_tensor else torch.zeros_like(sums))
    writes.write(done)


def interpolate(
    params: Sequence[Tensor],
    perturbed: Tensor | None,
    slow: Tensor,
    table: Tensor,
    sums: Tensor,
    flags: int,
    dtype: torch.dtype | None = None,
) -> None:
    """``params = slow + alpha* (fast_k - slow)``: fast_k is what ``descend_align`` left, alpha* comes from ``sums``."""
    writes = _Writes()
    alpha = adaptive_alpha(sums if flags & Flag.PER_TENSOR else sums.sum(0))
    for param, place in zip(params, _places(params, table), strict=True):
        if dtype not in (None, param.dtype):
            raise TypeError(f"params: expected {dtype} as the argument dtype says, got {param.dtype}")
        fast = vector(param) if perturbed is None else perturbed[place.span]
        weight = alpha[place.row] if flags & Flag.PER_TENSOR else alpha
        writes.add(vector(param), torch.lerp(slow[place.span], fast, weight.to(slow.dtype)))
    writes.write()


# ---- their halves ----------------------------------------------------------------------------------------------------


def _reduced(
    writes: _Writes,
    params: Sequence[Tensor],
    grads: Gradients,
    perturbed: Tensor | None,
    table: Tensor,
    hyper: Tensor,
    flags: int,
    sq_norms: Tensor,
    row: int,
) -> Tensor:
    """``sq_norms`` as they will be when row ``row`` is written."""
    squares = [torch.zeros_like(sq_norms[row])]
    for param, grad, place in zip(params, grads, _places(params, table), strict=True):
        if grad is None:
            continue
        weights = vector(param) if perturbed is None else perturbed[place.span]
        g = _gradient(grad, param)
        scaled = plain = ordered_sum(g.double().square())
        if flags & Flag.ADAPTIVE:
            eta = hyper[place.group, Hyper.ETA].item()
            scaled = ordered_sum((_scaling(weights.to(g.dtype), eta) * g).double().square())
        squares.append(torch.stack([scaled, plain]))
    of_bucket = torch.stack(squares).sum(0)
    writes.add(sq_norms[row], of_bucket)
    filled = sq_norms.clone()
    filled[row] = of_bucket
    return filled


def _ascend(
    writes: _Writes,
    params: Sequence[Tensor],
    grads: Gradients,
    perturbed: Tensor | None,
    slow: Tensor | None,
    table: Tensor,
    sq_norms: Tensor,
    hyper: Tensor,
    flags: int,
) -> None:
    numbers = hyper.tolist()
    for param, grad, place in zip(params, grads, _places(params, table), strict=True):
        if slow is None:
            weights = vector(param) if perturbed is None else perturbed[place.span]
        else:
            weights = vector(param).to(slow.dtype, copy=True)
            writes.add(slow[place.span], weights)
        if grad is not None:
            rho, eta = numbers[place.group][Hyper.RHO], numbers[place.group][Hyper.ETA]
            weights = _ascended(weights, _gradient(grad, param), sq_norms, rho, eta, flags)
        writes.add_weights(weights, param, perturbed, place.span)


def _descend(
    writes: _Writes,
    params: Sequence[Tensor],
    grads: Gradients,
    fast: Tensor | None,
    fast_from: Tensor | None,
    table: Tensor,
    descent: _Descent,
) -> None:
    source = _required("fast", fast if fast_from is None else fast_from)
    for param, grad, place in zip(params, grads, _places(params, table), strict=True):
        _, moved = descent(source[place.span], param, grad, place)
        if fast is not None:
            writes.add(fast[place.span], moved)


# ---- update rules: base_optimizer(fast, g) ---------------------------------------------------------------------------

Updated = tuple[Tensor, Sequence[Tensor]]
"""New weights and state."""


def sgd(w: Tensor, g: Tensor, state: Sequence[Tensor], step: int, hyper: Numbers, flags: int) -> Updated:
    """torch.optim.SGD. ``step`` counts this tensor's updates from 1; at the first the momentum is the gradient."""
    lr, momentum, weight_decay = hyper["lr"], hyper["momentum"], hyper["weight_decay"]
    if flags & Flag.MAXIMIZE:
        g = -g
    if weight_decay:
        g = g.add(w, alpha=weight_decay)
    if not state:
        return w.add(g, alpha=-lr), state
    (momentum_buffer,) = state
    momentum_buffer = g if step == 1 else (momentum_buffer * momentum).add(g, alpha=1 - hyper["dampening"])
    if flags & Flag.NESTEROV:
        return w.add(g.add(momentum_buffer, alpha=momentum), alpha=-lr), (momentum_buffer,)
    return sgd_by_state(w, (momentum_buffer,), step, hyper, flags), (momentum_buffer,)


def sgd_by_state(w: Tensor, state: Sequence[Tensor], step: int, hyper: Numbers, flags: int) -> Tensor:
    """What an update with momentum, not Nesterov's, makes of the weights when it has left ``state``."""
    return w.add(state[0], alpha=-hyper["lr"])


def adam(w: Tensor, g: Tensor, state: Sequence[Tensor], step: int, hyper: Numbers, flags: int) -> Updated:
    """torch.optim.Adam (Kingma and Ba 2015, algorithm 1) and AdamW (Loshchilov and Hutter 2019)."""
    beta1, beta2, weight_decay = hyper["beta1"], hyper["beta2"], hyper["weight_decay"]
    if flags & Flag.MAXIMIZE:
        g = -g
    if weight_decay and not flags & Flag.DECOUPLED:
        g = g.add(w, alpha=weight_decay)
    exp_avg, exp_avg_sq, *max_exp_avg_sq = state
    exp_avg = exp_avg.lerp(g, 1 - beta1)
    exp_avg_sq = (exp_avg_sq * beta2).addcmul(g, g, value=1 - beta2)
    max_exp_avg_sq = [torch.maximum(largest, exp_avg_sq) for largest in max_exp_avg_sq]  # of AMSGrad, the third buffer
    state = (exp_avg, exp_avg_sq, *max_exp_avg_sq)
    return adam_by_state(w, state, step, hyper, flags), state


def adam_by_state(w: Tensor, state: Sequence[Tensor], step: int, hyper: Numbers, flags: int) -> Tensor:
    """What update number ``step`` makes of the weights when it has left ``state``; its last entry is the second moment
    that is divided by.
    """
    lr, beta1, beta2, weight_decay = hyper["lr"], hyper["beta1"], hyper["beta2"], hyper["weight_decay"]
    if weight_decay and flags & Flag.DECOUPLED:
        w = w * (1 - lr * weight_decay)
    denominator = (state[-1].sqrt() / (1 - beta2**step) ** 0.5).add(hyper["eps"])
    return w.addcdiv(state[0], denominator, value=-lr / (1 - beta1**step))


def none(w: Tensor, g: Tensor, state: Sequence[Tensor], step: int, hyper: Numbers, flags: int) -> Updated:
    """The base optimizer is not fused: its own ``step()`` has moved ``fast`` already."""
    return w, state


RULES = {RuleId.NONE: none, RuleId.SGD: sgd, RuleId.MOMENTUM: sgd, RuleId.ADAM: adam, RuleId.AMSGRAD: adam}
BY_STATE = {RuleId.MOMENTUM: sgd_by_state, RuleId.ADAM: adam_by_state, RuleId.AMSGRAD: adam_by_state}


class _Descent:
    """``base_optimizer(fast, g)`` for one tensor after another, with its state read and written."""

    def __init__(
        self,
        writes: _Writes,
        state: Sequence[Tensor],
        state_from: Sequence[Tensor],
        steps: Tensor,
        steps_from: Tensor | None,
        sq_norms: Tensor | None,
        hyper: Tensor,
        rule: int,
        flags: int,
    ) -> None:
        buffers, names = BUFFERS[RuleId(rule)], NUMBERS[RuleId(rule)]
        if len(state) != buffers or len(state_from) not in (0, buffers):
            raise RuntimeError(
                f"state, state_from: expected {buffers} buffers for {RuleId(rule).name}, got {len(state)} and "
                f"{len(state_from)}"
            )
        if hyper.size(1) < Hyper.OF_RULE + len(names):
            raise RuntimeError(f"hyper: expected {Hyper.OF_RULE + len(names)} numbers a group, got {hyper.size(1)}")
        self.writes, self.rule, self.flags = writes, RULES[RuleId(rule)], flags
        self.derive = BY_STATE[RuleId(rule)] if flags & Flag.DERIVES else None
        self.state, self.state_from = state, state_from or state
        self.steps, self.steps_from = steps, _other(steps_from, steps)
        self.numbers = hyper.tolist()
        self.own = [dict(zip(names, numbers[Hyper.OF_RULE :], strict=False)) for numbers in self.numbers]
        self.scales = [self._scale(sq_norms, group) for group in hyper]
        self.moves = finite(_required("sq_norms", sq_norms)) if flags & Flag.SKIPS else None
        self.takes_place = self.moves is None or bool(self.moves)

    @staticmethod
    def _scale(sq_norms: Tensor | None, group: Tensor) -> Tensor | None:
        max_grad_norm, unscale = group[Hyper.MAX_GRAD_NORM].item(), group[Hyper.UNSCALE]
        most = None if sq_norms is None or math.isinf(max_grad_norm) else max_grad_norm
        return gradient_scale(sq_norms, most, None if unscale == 1 else unscale)

    def __call__(
        self, fast: Tensor, param: Tensor, grad: Tensor | None, place: _Place, slow: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The fast weights before and after. The last descent of a step is given ``slow``: where it does not move, the
        step has not taken place, so that the fast weights are the slow ones, and state and steps stay.
        """
        old = [buffer[place.span] for buffer in self.state_from]
        step, hyper = self.steps_from[place.row], self.own[place.group]
        if self.derive is not None:
            fast = self.derive(fast, old, int(step), hyper, self.flags)
        if grad is None:
            moved, new = fast, old
        else:
            scale = self.scales[place.group]
            g = _gradient(grad, param) if scale is None else _gradient(grad, param) * scale
            moved, state = self.rule(fast, g, old, int(step) + 1, hyper, self.flags)
            new = [*state]
            step = step + 1
            if self.moves is not None and slow is None:
                step = step - 1 + self.moves.to(step.device)
                moved = torch.where(self.moves, moved, fast)
                new = [torch.where(self.moves, *pair) for pair in zip(new, old, strict=True)]
        if self.moves is not None and slow is not None:
            fast, moved = torch.where(self.moves, fast, slow), torch.where(self.moves, moved, slow)
            step = torch.where(self.moves.to(step.device), step, self.steps[place.row])
            as_it_is = [buffer[place.span] for buffer in self.state]
            new = [torch.where(self.moves, *pair) for pair in zip(new, as_it_is, strict=True)]
        for buffer, value in zip(self.state, new, strict=True):
            self.writes.add(buffer[place.span], value)
        self.writes.add(self.steps[place.row], step)
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
    norm = total_norm(_required("sq_norms", sq_norms), 1)
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


def _ascended(weights: Tensor, g: Tensor, sq_norms: Tensor, rho: float, eta: float, flags: int) -> Tensor:
    if flags & Flag.ADAPTIVE:
        g = _scaling(weights, eta).square() * g
    ascended = weights + g * (rho / (total_norm(sq_norms) + NORM_EPSILON))
    return torch.where(finite(sq_norms), ascended, weights) if flags & Flag.SKIPS else ascended


# ---- tensors ---------------------------------------------------------------------------------------------------------


def vector(x: Tensor) -> Tensor:
    """A dense tensor's elements in memory order, sharing its memory and version counter."""
    return x.detach().as_strided((x.numel(),), (1,))


class _Place(NamedTuple):
    """A tensor's row in ``steps`` and ``sums``, its slice of the flat buffers, its row in ``hyper``."""

    row: int
    span: slice
    group: int


def _places(params: Sequence[Tensor], table: Tensor) -> Iterator[_Place]:
    for number, (param, columns) in enumerate(zip(params, table[:, : Column.ADDRESS].tolist(), strict=True)):
        start, size = columns[Column.START], columns[Column.SIZE]
        if param.numel() != size:
            raise RuntimeError(f"params: tensor {number} has {param.numel()} elements, expected {size}")
        yield _Place(columns[Column.ROW], slice(start, start + size), columns[Column.GROUP])


def _gradient(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient as a vector in its parameter's memory order, in the dtype that is computed in."""
    if grad.dtype != param.dtype:
        raise TypeError(f"grads: expected {param.dtype} as the parameter has, got {grad.dtype}")
    if grad.stride() != param.stride():
        grad = torch.empty_strided(param.shape, param.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)
    return vector(grad).to(torch.float64 if param.dtype == torch.float64 else torch.float32)


def _other(source: Tensor | None, target: Tensor) -> Tensor:
    return target if source is None else source


def _required(name: str, x: Tensor | None) -> Tensor:
    if x is None:
        raise RuntimeError(f"{name}: expected a tensor, got None")
    return x
