"""The passes: their names and their signatures.

A pass is one walk over the tensors of a bucket. ``SCHEMAS`` is the one definition of every signature; each backend is a
module with one function per schema, of the same name and the same arguments. ``reference`` is the definition of what
each pass computes.

Arguments that recur:

``params``, ``grads``
    The tensors taking part, where PyTorch put them. A gradient has its parameter's shape and dtype; strides may differ.
    A backend may take an empty list of ``params`` beside ``grads`` for what ``table`` says of them.
``slow``, ``fast``, ``first``, ``perturbed``, ``state``
    Flat buffers of the bucket, 1-D, float32 (float64 for float64 parameters). ``perturbed`` is given for bf16 and fp16
    parameters only: elsewhere the parameters themselves hold the perturbed weights. ``state`` are the base optimizer's
    buffers in the order of its rule (``lookbehind_fused.base``).
``fast_from``, ``state_from``, ``steps_from``
    Where the old values are read, if not from the buffer that is written; None (an empty list) means in place.
    ``fast`` may be None where the fast weights need not be kept: at inner step 1 of a rule whose update is a function
    of the new state (momentum, Adam). Inner step 2 then finds them again: under ``Flag.DERIVES`` it is given the slow
    weights for the fast ones, and moves them by the state that it reads before it uses them.
``steps``
    float32, one element per tensor of the bucket: how often the base optimizer has updated it.
``table``
    int64 of shape (tensors, 3 or more) in host memory, made by ``tensor_table``: the tensor's row in ``steps`` and
    ``sums``, the start and size of its slice of every flat buffer, in elements; then its address, sizes and strides.
``sq_norms``, ``row``
    float64 of shape (buckets, 2), on the parameters' device: the sums of squares of T g and of g, which whoever reads
    them adds up. ``row`` is the bucket's own. A pass that ascends fills it first if it is not negative: with a single
    bucket the norm costs no call of its own.
``sums``
    float64 of shape (rows, 3): <a, b>, <a, a>, <b, b> of the displacements a = fast_1 - slow and b = fast_k - slow. One
    row a tensor under ``Flag.PER_TENSOR``, else one row a bucket.
``hyper``
    float64, 1-D, in host memory for backends that read it there: rho, eta, alpha, max_grad_norm, unscale, then the
    rule's own, in the order of ``lookbehind_fused.base``. A descent multiplies its gradient by ``unscale`` and, where
    it is given ``sq_norms``, clips the result to ``max_grad_norm``; an ascent is free of the gradient's scale.
``rule``, ``flags``
    Name of the update rule, and a sum of ``Flag``.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntFlag

import torch
from torch import Tensor

ADDRESS = 3  # the column of ``table`` that holds addresses; sizes and strides follow
UNSCALE = 4  # where ``hyper`` has the factor of a descent's gradient; the rule's own numbers follow


class Flag(IntFlag):
    """The yes-or-no settings of a pass, added up in its argument ``flags``."""

    ADAPTIVE = 1  # ASAM: T = |perturbed| + eta; otherwise T = 1
    PER_TENSOR = 2  # adaptive alpha for each tensor by itself
    MAXIMIZE = 4
    NESTEROV = 8
    AMSGRAD = 16
    DECOUPLED = 32  # weight decay as in AdamW
    DERIVES = 64  # inner step 2: the fast weights are not read but derived from the slow ones and the state
    SKIPS = 128  # where ``sq_norms`` are not finite, nothing moves: weights, state and steps pass through


_STATE = "Tensor(s!)[] state, Tensor[] state_from, Tensor(n!) steps, Tensor? steps_from, Tensor table"
_DESCENT = f"{_STATE}, Tensor? sq_norms, Tensor hyper, str rule, int flags"

SCHEMAS = {
    "reduce_sq_norm": "(Tensor[] params, Tensor[] grads, Tensor? perturbed, Tensor table, Tensor hyper, int flags, "
    "Tensor(a!) sq_norms, int row) -> ()",
    "ascend": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)? perturbed, Tensor(c!)? slow, Tensor table, "
    "Tensor(d!) sq_norms, int row, Tensor hyper, int flags) -> ()",
    "descend": f"(Tensor[] params, Tensor[] grads, Tensor(a!)? fast, Tensor? fast_from, {_DESCENT}) -> ()",
    "descend_ascend": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)? perturbed, Tensor(c!)? fast, "
    f"Tensor? fast_from, {_STATE}, Tensor(d!) sq_norms, int row, Tensor hyper, str rule, int flags) -> ()",
    "descend_interpolate": f"(Tensor(a!)[] params, Tensor[] grads, Tensor slow, Tensor fast, {_DESCENT}) -> ()",
    "descend_align": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)? perturbed, Tensor slow, Tensor fast, "
    f"Tensor? first, {_DESCENT}, Tensor(c!) sums) -> ()",
    "interpolate": "(Tensor(a!)[] params, Tensor? perturbed, Tensor slow, Tensor table, Tensor sums, int flags) -> ()",
}


def tensor_table(params: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
    """The argument ``table`` for tensors whose slices of the flat buffers begin at ``starts``.

    int64 of shape (tensors, 4 + 2 d), d being the largest number of dimensions: tensors with fewer have dimensions of
    one element in front.
    """
    dim = max((p.dim() for p in params), default=0)
    rows = []
    for row, (p, start) in enumerate(zip(params, starts, strict=True)):
        pad = dim - p.dim()
        sizes, strides = [*[1] * pad, *p.shape], [*[0] * pad, *p.stride()]
        rows.append([row, start, p.numel(), p.data_ptr(), *sizes, *strides])
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), ADDRESS + 1 + 2 * dim)
